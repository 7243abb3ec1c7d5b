"""`xlstm-hybrid on-policy`: distillation on the student's own samples, in one process or under `accelerate launch`."""

import json

import typer

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Expert, Out, Overwrite, Recipe, Student, Teacher, overrides_of
from xlstm_hybrid.recipe.schema import load_recipe, teacher_of
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig


def on_policy(
    context: typer.Context,
    student: Student,
    teacher: Teacher,
    out: Out,
    recipe: Recipe = TINY,
    expert: Expert = None,
    overwrite: Overwrite = False,
):
    """Distil a teacher into a student on the student's own samples.

    The prompts are those of one expert of the recipe. Fields of OnPolicyKDConfig may follow and go before the recipe's section on_policy:
    --max_steps 100.

    Example: xlstm-hybrid on-policy runs/expert meta-llama/Llama-3.2-1B-Instruct runs/spoken --recipe mine.yaml --expert chat
    """
    overrides = overrides_of(context, OnPolicyKDConfig, student, teacher, out)
    loaded = load_recipe(recipe)
    teacher = teacher_of(loaded, teacher)
    check_output(out, inputs=[student, teacher], overwrite=overwrite)
    print(json.dumps(pipeline.on_policy(student, teacher, out, loaded, loaded.expert(expert), overwrite, overrides)))
