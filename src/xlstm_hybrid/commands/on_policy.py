"""`xlstm-hybrid on-policy`: distillation on the student's own samples, in one process or under `accelerate launch`."""

import json
from pathlib import Path

import typer

from xlstm_hybrid import pipeline
from xlstm_hybrid.commands.options import TINY, ExpertOption, Overwrite, RecipeOption, recipe_and_expert, settings_of
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig


def on_policy(
    context: typer.Context,
    student: Path,
    teacher: str,
    out: Path,
    recipe: RecipeOption = TINY,
    expert: ExpertOption = None,
    overwrite: Overwrite = False,
):
    """Distil a teacher into a student on the student's own samples.

    The prompts are those of one expert of the recipe. Fields of OnPolicyKDConfig may follow and go before the recipe's section on_policy:
    --max_steps 100.

    Example: xlstm-hybrid on-policy runs/expert meta-llama/Llama-3.2-1B-Instruct runs/spoken --recipe mine.yaml --expert chat
    """
    overrides = settings_of(context, OnPolicyKDConfig, student, teacher, out)
    loaded, name = recipe_and_expert(recipe, expert)
    print(json.dumps(pipeline.on_policy(student, teacher, out, loaded, name, overwrite, overrides)))
