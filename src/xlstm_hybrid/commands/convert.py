"""`xlstm-hybrid convert`: a student before training."""

from pathlib import Path
from typing import Annotated

from typer import Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Out, Overwrite, Revision, Teacher
from xlstm_hybrid.conversion.convert import convert as convert_teacher
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.schema import read_yaml


def convert(
    teacher: Teacher,
    out: Out,
    sliding_window: Annotated[int, Option(help="Window of the hybrid layers, tokens.")] = 512,
    num_sink_tokens: Annotated[int, Option(help="First tokens that stay visible.")] = 4,
    layer_types: Annotated[
        str | None, Option(help="'teacher', or comma-separated types, one per layer; all hybrid_sliding by default.")
    ] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; the teacher's by default.")] = None,
    revision: Revision = None,
    gguf_file: Annotated[str | None, Option(help="GGUF file in the directory or of the hub id.")] = None,
    options: Annotated[
        Path | None,
        Option(exists=True, help="YAML or JSON of the student's config, as plan-layers writes it; it wins."),
    ] = None,
    overwrite: Overwrite = False,
):
    """Make a student of a teacher: weights copied, new parameters initialised.

    The report accounts for every tensor of the teacher and of the student.

    Example: xlstm-hybrid convert meta-llama/Llama-3.2-1B runs/converted --sliding-window 512
    """
    check_output(out, inputs=[teacher], overwrite=overwrite)
    types = layer_types.split(",") if layer_types and layer_types != "teacher" else layer_types
    fields = {
        "sliding_window": sliding_window,
        "num_sink_tokens": num_sink_tokens,
        "layer_types": types,
        "dtype": dtype,
    }
    given = {} if options is None else read_yaml(options)  # in a recipe they are the section `student`
    if not isinstance(given, dict) or {"revision", "overwrite", "teacher", "out", "gguf_file"} & set(given):
        raise ConfigError(
            f"{options.name}: expected fields of the student's config, such as sliding_window; teacher, out and revision are arguments"
        )
    place = {"revision": revision, "gguf_file": gguf_file, "overwrite": overwrite}
    report = convert_teacher(teacher, out, **(fields | given), **place)
    print(report)
    print(f"{out}: a student of {len(report.layer_types)} layers; next: xlstm-hybrid verify {out}")
