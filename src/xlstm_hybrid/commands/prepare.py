"""`xlstm-hybrid prepare`: the rows of a stage, on disk or on the screen."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Overwrite
from xlstm_hybrid.conversion.load import load_tokenizer
from xlstm_hybrid.data import IGNORE, packed_rows, pieces, scored_runs
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher, teacher_of


def prepare(
    tokenizer: Annotated[
        str,
        Argument(help="Checkpoint directory or hub id whose tokenizer writes the rows; or RECIPE.yaml: its teacher's."),
    ],
    out: Annotated[
        Path | None, Argument(help="Folder of the rows, made new, for `load_from_disk` and cache-teacher.")
    ] = None,
    recipe: Annotated[
        Path | None, Option("--recipe", help=f"Recipe with the settings and the data of the stage; {TINY} by default.")
    ] = None,
    expert: Annotated[str | None, Option("--expert", help="Rows of this expert; of stage I by default.")] = None,
    count: Annotated[int | None, Option(help="Number of rows; as many as the recipe's steps read by default.")] = None,
    show: Annotated[
        int | None, Option(min=1, help="Print so many documents of the rows: green, or in [[ ]], what is scored.")
    ] = None,
    overwrite: Overwrite = False,
):
    """Write the packed rows that a stage of the recipe will read.

    Example: xlstm-hybrid prepare recipes/tiny_teacher/tiny-llama runs/rows --recipe recipes/tiny.yaml --expert memory
    """
    if tokenizer.endswith((".yaml", ".yml")):
        if recipe is not None:
            raise ConfigError(f"{tokenizer} and --recipe {recipe} are two recipes: name one")
        loaded = load_recipe(tokenizer)
        tokenizer = str(resolve_teacher(loaded))
    else:
        loaded = load_recipe(recipe or TINY)
        tokenizer = str(teacher_of(loaded, tokenizer))
    if out is None and (show is None or count is not None or overwrite):
        raise ConfigError("no OUT for the rows: name a folder, or print some of them with --show 3 alone")
    if out is not None:
        check_output(out, inputs=[tokenizer], overwrite=overwrite)
    if show is not None:
        show_documents(tokenizer, loaded, expert, show)
    if out is not None:
        rows = pipeline.prepare(tokenizer, out, loaded, expert, count, overwrite)
        print(f"{rows} rows of {loaded.length} tokens in {out}")


def show_documents(tokenizer, recipe, expert, count):
    """Print the first documents of a stage's rows, what is scored in green; in [[ ]] where the terminal has no colours."""
    revision = recipe.revision if tokenizer == recipe.teacher else None
    tokenizer = load_tokenizer(tokenizer, revision)
    console = Console(soft_wrap=True)
    plain = console.color_system is None or console.no_color
    found = [piece for row in packed_rows(recipe, tokenizer, count, expert) for piece in pieces(row)]
    found = [(ids, labels) for ids, labels in found if any(label != IGNORE for label in labels)]  # no padding
    for n, (ids, labels) in enumerate(found[:count]):
        scored = sum(label != IGNORE for label in labels)
        console.print(f"--- document {n + 1}: {len(ids)} tokens, {scored} scored", style="bold", highlight=False)
        text = Text()
        for words, is_scored in scored_runs(tokenizer, ids, labels):
            text.append(f"[[{words}]]" if is_scored and plain else words, "green" if is_scored else "dim")
        console.print(text)
