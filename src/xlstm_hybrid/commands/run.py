"""`xlstm-hybrid run`: a whole recipe."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.pipeline import Run
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher


def run(
    recipe: Annotated[Path, Argument(help="A recipe, for example recipes/tiny.yaml.")],
    out: Annotated[Path | None, Option(help="Run directory; the recipe's own by default.")] = None,
    redo: Annotated[bool, Option("--redo", help="Make stages again whose settings have changed.")] = False,
):
    """Run a whole recipe: convert, align, distil experts, merge, evaluate, report.

    Started again, it resumes: finished stages are kept.

    Example: xlstm-hybrid run tiny --out runs/tiny
    """
    loaded = load_recipe(recipe)
    check_output(out or loaded.out, "folder", [resolve_teacher(loaded)])
    Run(loaded, out, redo).run()
