"""Options that several commands share, and how they are read."""

from pathlib import Path
from typing import Annotated

import typer

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline import parse_overrides
from xlstm_hybrid.recipe.schema import load_recipe

RecipeOption = Annotated[Path, typer.Option("--recipe", help="Recipe with the settings and the data of the stage.")]
ExpertOption = Annotated[
    str | None, typer.Option("--expert", help="Name of the expert in the recipe; its only one by default.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")]
TINY = Path("recipes/tiny.yaml")


def settings_of(context, config, *arguments):
    """The options of a trainer's config that stand behind a command's own, as `{name: value}`."""
    if misplaced := next((str(a) for a in arguments if str(a).startswith("-")), None):
        raise ConfigError(f"{misplaced}: options of {config.__name__} come behind the positional arguments")
    return parse_overrides(config, context.args)


def recipe_and_expert(path, expert=None):
    """`(recipe, name of the expert)`; the recipe's only expert where none is named."""
    recipe = load_recipe(path)
    return recipe, recipe.expert(expert)
