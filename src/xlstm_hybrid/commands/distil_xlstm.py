"""`xlstm-hybrid distil-xlstm`: the fully recurrent student of the second paper, its own way."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Overwrite, overrides_of
from xlstm_hybrid.distil_xlstm import run
from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig
from xlstm_hybrid.pipeline.settings import is_main
from xlstm_hybrid.recipe.schema import resolve_teacher

TINY = Path("recipes/distil_tiny.yaml")


def distil_xlstm(
    context: typer.Context,
    recipe: Annotated[Path, Argument(help="Recipe with a section delta.")] = TINY,
    out: Annotated[Path | None, Option(help="Run directory; the recipe's by default.")] = None,
    beside: Annotated[Path | None, Option(help="results.json of a hybrid's run, for a column in the table.")] = None,
    plan_only: Annotated[bool, Option("--plan", help="Count parameters, tokens and steps; needs no weights.")] = False,
    overwrite: Overwrite = False,
):
    """Distil a recipe's teacher into a fully recurrent student (Distil-xLSTM).

    Its blocks are sLSTM and mLSTM; it is evaluated beside its teacher. Fields of DeltaKDConfig may follow and go before the recipe's:
    --learning_rate 1e-3.

    Example: xlstm-hybrid distil-xlstm recipes/distil_tiny.yaml --out runs/distil-tiny
    """
    overrides = overrides_of(context, DeltaKDConfig, recipe)
    loaded, rows = run.read_delta_recipe(recipe)
    teacher = resolve_teacher(loaded)
    if plan_only:
        print(json.dumps(run.planned(loaded, teacher, rows, overrides), indent=1))
        return
    folder = Path(out or loaded.out)
    check_output(folder, "folder", [teacher])
    folder.mkdir(parents=True, exist_ok=True)
    run.make_student(loaded, teacher, folder, overwrite)
    log = run.distil(folder / "converted", teacher, folder / "student", loaded, rows, overwrite, overrides)
    if not is_main():
        return
    run.draw_log(log, folder / "curves.png")
    if loaded.evaluate is not None:
        models = {"teacher": teacher, "converted": folder / "converted", "student": folder / "student"}
        found = run.scores(models, loaded, beside)
        (folder / "results.json").write_text(json.dumps({"scores": found, "log": log}, indent=1), encoding="utf-8")
        report = run.score_table(found)
        (folder / "report.md").write_text(f"# {loaded.name}\n\n{report}\n\n![curves](curves.png)\n", encoding="utf-8")
        print(report)
