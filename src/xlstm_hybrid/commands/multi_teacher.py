"""`xlstm-hybrid multi-teacher`: experts teach one student, in one process or under `accelerate launch`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Out, Overwrite, Recipe, overrides_of
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig


def multi_teacher(
    context: typer.Context,
    student: Annotated[Path, Argument(help="The aligned start of the experts, or what they were merged into.")],
    out: Out,
    expert: Annotated[list[str], Option(help="NAME=DIRECTORY of an expert of the recipe; repeatable.")],
    recipe: Recipe = TINY,
    overwrite: Overwrite = False,
):
    """Distil several experts into one student on its own samples.

    Each expert scores what the student answers to the prompts of its domain. The settings are the recipe's merge.on_policy; fields of
    OnPolicyKDConfig may follow and go before them: --max_steps 100.

    Example: xlstm-hybrid multi-teacher runs/aligned runs/taught --expert math=runs/math --expert code=runs/code --recipe mine.yaml
    """
    overrides = overrides_of(context, OnPolicyKDConfig, student, out)
    named = [entry.partition("=")[::2] for entry in expert]
    if wrong := [entry for entry, (name, directory) in zip(expert, named, strict=True) if not (name and directory)]:
        raise ConfigError(f"--expert {wrong[0]}: expected NAME=DIRECTORY")
    if len(dict(named)) < len(named):
        raise ConfigError(f"--expert: {[name for name, _ in named]} names an expert twice")
    check_output(out, inputs=[student, *dict(named).values()], overwrite=overwrite)
    print(json.dumps(pipeline.multi_teacher(student, dict(named), out, load_recipe(recipe), overwrite, overrides)))
