"""`xlstm-hybrid distill`: stage II, in one process or under `accelerate launch -m xlstm_hybrid distill`."""

import json

import typer

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Expert, Out, Overwrite, Recipe, Student, Teacher, overrides_of
from xlstm_hybrid.recipe.schema import load_recipe, teacher_of
from xlstm_hybrid.training.distillation import SparseKDConfig


def distill(
    context: typer.Context,
    student: Student,
    teacher: Teacher,
    out: Out,
    recipe: Recipe = TINY,
    expert: Expert = None,
    overwrite: Overwrite = False,
):
    """Stage II: distil one domain expert of the recipe from its teacher.

    Fields of SparseKDConfig may follow and go before the recipe's: --learning_rate 1e-5 --top_k 64.

    Example: xlstm-hybrid distill runs/aligned recipes/tiny_teacher/tiny-llama runs/expert --recipe tiny --expert memory
    """
    overrides = overrides_of(context, SparseKDConfig, student, teacher, out)
    loaded = load_recipe(recipe)
    teacher = teacher_of(loaded, teacher)
    check_output(out, inputs=[student, teacher], overwrite=overwrite)
    print(json.dumps(pipeline.distill(student, teacher, out, loaded, loaded.expert(expert), overwrite, overrides)))
