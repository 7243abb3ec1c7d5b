"""`xlstm-hybrid experts`: the domain experts of a recipe."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.pipeline import make_experts
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher


def experts(
    recipe: Annotated[Path, Argument(help="A recipe, for example recipes/tiny.yaml.")],
    out: Annotated[Path | None, Option(help="Run directory; the recipe's own by default.")] = None,
    only: Annotated[list[str] | None, Option(help="Expert to make; repeatable. All by default.")] = None,
    start: Annotated[Path | None, Option(help="Aligned student; by default the recipe's, made if missing.")] = None,
    merge: Annotated[bool, Option("--merge", help="Merge them as the recipe says, once all are there.")] = False,
    redo: Annotated[bool, Option("--redo", help="Make again what has other settings or another start.")] = False,
):
    """Distil the domain experts of a recipe from one aligned start.

    Here or in several launches, on one machine or more. Started again, it resumes.

    Example: xlstm-hybrid experts recipes/tiny.yaml --only memory
    """
    loaded = load_recipe(recipe)
    check_output(out or loaded.out, "folder", [resolve_teacher(loaded), *([start] if start else ())])
    make_experts(loaded, out, only or (), start, redo, merge)
