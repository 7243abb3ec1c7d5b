"""`xlstm-hybrid convert`: a student before training."""

from pathlib import Path
from typing import Annotated

import typer

from xlstm_hybrid.commands.options import Overwrite
from xlstm_hybrid.conversion.convert import convert as convert_teacher
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.schema import read_yaml


def convert(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory of the student, made new.")],
    sliding_window: Annotated[int, typer.Option(help="Window of the hybrid layers, tokens.")] = 512,
    num_sink_tokens: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 4,
    layer_types: Annotated[
        str | None,
        typer.Option(help="'teacher', or comma-separated types, one per layer; all hybrid_sliding by default."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the teacher's by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    options: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="YAML or JSON with fields of the student's config, as plan-layers writes it; they win."
        ),
    ] = None,
    overwrite: Overwrite = False,
):
    """Make a student of a teacher: weights copied, new parameters initialised.

    The report accounts for every tensor of the teacher and of the student.

    Example: xlstm-hybrid convert meta-llama/Llama-3.2-1B runs/converted --sliding-window 512
    """
    types = layer_types.split(",") if layer_types and layer_types != "teacher" else layer_types
    fields = {
        "sliding_window": sliding_window,
        "num_sink_tokens": num_sink_tokens,
        "layer_types": types,
        "dtype": dtype,
    }
    print(convert_teacher(teacher, out, **(fields | read_fields(options)), revision=revision, overwrite=overwrite))


def read_fields(path):
    """Fields of the student's config in a file, {} without one; in a recipe they are the section `student`."""
    content = {} if path is None else read_yaml(path)
    if not isinstance(content, dict) or {"revision", "overwrite", "teacher", "out"} & set(content):
        raise ConfigError(
            f"{path.name}: expected fields of the student's config, such as sliding_window; teacher, out and revision are arguments"
        )
    return content
