"""`xlstm-hybrid align`: stage I, in one process or under `accelerate launch -m xlstm_hybrid align`."""

import typer

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Out, Overwrite, Recipe, Student, overrides_of
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.training.alignment import AlignmentConfig


def align(context: typer.Context, student: Student, out: Out, recipe: Recipe = TINY, overwrite: Overwrite = False):
    """Stage I: train the new parameters against the attention that they replace.

    Fields of AlignmentConfig may follow and go before the recipe's: --learning_rate 5e-3 --max_steps 100.

    Example: xlstm-hybrid align runs/converted runs/aligned --recipe recipes/tiny.yaml
    """
    overrides = overrides_of(context, AlignmentConfig, student, out)
    check_output(out, inputs=[student], overwrite=overwrite)
    figures = pipeline.align(student, out, load_recipe(recipe), overwrite, overrides)
    for layer in figures["relative_error"]:
        print(f"layer {layer['layer']}: relative error {layer['before']:.3f} -> {layer['after']:.3f}")
