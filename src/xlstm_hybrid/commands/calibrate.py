"""`xlstm-hybrid calibrate`: stage 0, feature maps and gates in closed form."""

from typing import Annotated

import typer
from rich.console import Console

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Out, Overwrite, Recipe, Student
from xlstm_hybrid.recipe.schema import load_recipe

Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens to fit to; the recipe's by default.")]


def calibrate(student: Student, out: Out, recipe: Recipe = TINY, tokens: Tokens = None, overwrite: Overwrite = False):
    """Stage 0: set the new parameters in closed form, from the teacher's attention.

    Layer by layer, without gradients. Interrupted, it goes on behind the last finished layer.

    Example: xlstm-hybrid calibrate runs/converted runs/calibrated --recipe recipes/tiny.yaml
    """
    check_output(out, inputs=[student], overwrite=overwrite)
    with Console(stderr=True).status("reading") as status:

        def report(layer, figures):
            status.update(f"layer {layer} is done")
            errors = " -> ".join(f"{figures[name]:.3f}" for name in ("before", "after"))
            closed = f", {figures['closed']} of {figures['heads']} gates closed" if figures["closed"] else ""
            print(f"layer {layer}: relative error {errors} (window alone {figures['window']:.3f}){closed}")

        pipeline.calibrate(student, out, load_recipe(recipe), overwrite, tokens, report)
