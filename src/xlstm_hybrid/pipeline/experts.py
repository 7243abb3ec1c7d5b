"""The experts of a recipe from one aligned start, in one launch or one each. Their stages are the run's, so that `run`
goes on from them.
"""

import shlex

from rich.table import Table

from xlstm_hybrid.checkpoint.files import MANIFEST, digest, read_provenance, verify_files
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline.run import Run, check_trainer_settings


def make_experts(recipe, out=None, only=(), start=None, redo=False, merge=False, console=None):
    """Distil domain experts, on their own samples too where the recipe has a section `on_policy`.

    Launches that share `out`, each with other experts, may run at once: the start is made by one of them, the others
    wait for it.

    Args:
        out: run directory; the recipe's own by default.
        only: names of the experts to make; all by default.
        start: aligned student that they start from; by default the recipe's, converted and aligned in `out` unless it
            is there.
        redo: make again what was made with other settings or from another start.
        merge: make one student of the experts as well, as soon as all of them are there.
    Returns:
        `{name: directory}` of the experts of the recipe that are there, in its order.
    Raises:
        ConfigError: a name or a setting that the recipe or its trainers do not have; experts of another start in `out`.
        CheckpointError: `start` has no manifest, or differs from it.
    """
    for name in only:
        recipe.mix(name)
    check_trainer_settings(recipe)
    run = Run(recipe, out, redo, console, start)
    if start is not None:
        verify_files(start)
    run.make(*run.named("convert", "calibrate", "align"))
    aligned, chosen = run.path(run.aligned), [name for name in recipe.experts if name in only or not only]
    before = digest(aligned / MANIFEST)
    others = from_another_start(run, before, [name for name in recipe.experts if name not in chosen])
    if others and not redo:
        raise ConfigError(
            f"{', '.join(others)} in {run.out.name}: made from another start than {aligned.name} (manifest {before[:12]}...), which no merge "
            "takes; name it with --start, pass --redo to make them again one by one, or choose another --out"
        )
    for name in chosen:
        run.make(*run.named(f"distill:{name}", f"on-policy:{name}"))
    if digest(aligned / MANIFEST) != before or from_another_start(run, before, chosen):
        raise ConfigError(
            f"{aligned.name} has changed while experts were made from it: make {', '.join(chosen)} again with --redo"
        )
    run.console.print(expert_table(run, before))
    done = {name: run.path(stage) for name, stage in run.experts.items() if run.path(stage).is_dir()}
    student = None
    if merge and len(done) == len(recipe.experts):
        run.make(*run.named("merge", "multi-teacher"))
        student = run.path(run.models["student"])
    run.console.print(next_step(run, done, start, student), soft_wrap=True, markup=False, highlight=False)
    return done


def distilled(directory):
    """The record of stage II of an expert, {} where there is none."""
    return next((s for s in reversed(read_provenance(directory)) if s["stage"].startswith("distill:")), {})


def from_another_start(run, start, names):
    """Experts among `names` that are there and were distilled from another checkpoint than that with the manifest
    `start`.
    """
    folders = {name: run.path(run.named(f"distill:{name}")[0]) for name in names}
    there = {name: folder for name, folder in folders.items() if (folder / MANIFEST).is_file()}
    return [name for name, folder in there.items() if distilled(folder).get("parent_manifest") != start]


def expert_table(run, start):
    """What each stage of an expert took and where it ended, from its record: steps, loss, divergence from the teacher
    (nats), share of its first choices, seconds; "–" for what is not there.
    """
    others = from_another_start(run, start, run.recipe.experts)
    table = Table(title=f"experts of {run.recipe.name}, in {run.out.name}/")
    for column in ("checkpoint", "steps", "loss", "divergence", "top-1", "s", "start"):
        table.add_column(column, justify="left" if column in ("checkpoint", "start") else "right", no_wrap=True)
    for name in run.recipe.experts:
        for stage in run.named(f"distill:{name}", f"on-policy:{name}"):
            record = next((s for s in reversed(read_provenance(run.path(stage))) if s["stage"] == stage.name), None)
            if record is None:
                table.add_row(stage.folder, *["–"] * 5, "not made")
                continue
            figures, seconds = record.get("figures") or {}, record.get("seconds")
            values = figures.get("loss"), figures.get("divergence", figures.get("kl")), figures.get("top1_agreement")
            cells = ["–" if value is None else f"{value:.4g}" for value in values]
            cells += ["–" if seconds is None else f"{seconds:,.0f}", "another" if name in others else start[:8]]
            table.add_row(stage.folder, str(record["config"].get("max_steps", "–")), *cells)
    return table


def next_step(run, done, start, student):
    """What to run next, in words that a shell understands behind the colon."""
    recipe = run.recipe
    missing = [part for name in recipe.experts if name not in done for part in ("--only", name)]
    here = ["--out", str(run.out)] if str(run.out) != recipe.out else []
    again = ["xlstm-hybrid", "experts", str(recipe.path), *here, *(["--start", str(start)] if start else [])]
    if missing:
        return f"next, the other experts: {shlex.join([*again, *missing])}"
    if student is not None:
        evaluating = shlex.join(["xlstm-hybrid", "evaluate", str(student), "--recipe", str(recipe.path)])
        return f"next, evaluate the student: {evaluating}"
    if start is not None:  # `run` would make the recipe's own start
        return f"next, merge them as the recipe says: {shlex.join([*again, '--merge'])}"
    return f"next, merge them, evaluate and report: {shlex.join(['xlstm-hybrid', 'run', str(recipe.path), *here])}"
