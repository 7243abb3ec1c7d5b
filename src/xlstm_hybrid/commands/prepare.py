"""`xlstm-hybrid prepare`: the rows of a stage, on disk."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Overwrite, Recipe
from xlstm_hybrid.recipe.schema import load_recipe


def prepare(
    tokenizer: Annotated[str, Argument(help="Checkpoint directory or hub id whose tokenizer writes the rows.")],
    out: Annotated[Path, Argument(help="Folder of the rows, made new, for `load_from_disk` and cache-teacher.")],
    recipe: Recipe = TINY,
    expert: Annotated[str | None, Option("--expert", help="Rows of this expert; of stage I by default.")] = None,
    count: Annotated[int | None, Option(help="Number of rows; as many as the recipe's steps read by default.")] = None,
    overwrite: Overwrite = False,
):
    """Write the packed rows that a stage of the recipe will read.

    Example: xlstm-hybrid prepare recipes/tiny_teacher/tiny-llama runs/rows --recipe recipes/tiny.yaml --expert memory
    """
    check_output(out, inputs=[tokenizer], overwrite=overwrite)
    loaded = load_recipe(recipe)
    rows = pipeline.prepare(tokenizer, out, loaded, expert, count, overwrite)
    print(f"{rows} rows of {loaded.length} tokens in {out}")
