"""The experts of a recipe from one aligned start, in one launch or one each; the stages are the road's, so that `run` goes on from them."""

import shlex

from rich.table import Table

from xlstm_hybrid.checkpoint.files import MANIFEST, digest, read_provenance
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline.road import Road, check_settings


def make_experts(recipe, out=None, only=(), start=None, redo=False, merge=False, console=None):
    """Distil domain experts, on their own samples too where the recipe has a section `on_policy` (METHOD 1.4).

    Launches that share `out`, each with other experts, may run at once: the start is made by one of them, the others wait for it.

    Args:
        out: run directory; the recipe's own by default.
        only: names of the experts to make; all by default.
        start: aligned student that they start from; by default the recipe's, converted and aligned in `out` unless it is there.
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
    check_settings(recipe)
    road = Road(recipe, out, redo, console, start)
    aligned, chosen = road.start()[1], [name for name in recipe.experts if name in only or not only]
    before = digest(aligned / MANIFEST)
    others = strangers(road, before, [name for name in recipe.experts if name not in chosen])
    if others and not redo:
        raise ConfigError(
            f"{', '.join(others)} in {road.out.name}: made from another start than {aligned.name} (manifest {before[:12]}...), which no merge "
            "takes; name it with --start, pass --redo to make them again one by one, or choose another --out"
        )
    made = {name: road.expert(name, aligned) for name in chosen}
    if digest(aligned / MANIFEST) != before or strangers(road, before, made):
        raise ConfigError(f"{aligned.name} has changed while experts were made from it: make {', '.join(made)} again with --redo")
    road.console.print(expert_table(road, before))
    done = {name: road.expert_folder(name) for name in recipe.experts if road.expert_folder(name).is_dir()}
    student = road.merged(done, aligned) if merge and len(done) == len(recipe.experts) else None
    road.console.print(next_step(road, done, start, student), soft_wrap=True, markup=False, highlight=False)
    return done


def distilled(directory):
    """The record of stage II of an expert, {} where there is none."""
    return next((s for s in reversed(read_provenance(directory)) if s["stage"].startswith("distill:")), {})


def strangers(road, start, names):
    """Experts among `names` that are there and were distilled from another checkpoint than that with the manifest `start`."""
    there = [name for name in names if (road.folder[f"distill:{name}"] / MANIFEST).is_file()]
    return [name for name in there if distilled(road.folder[f"distill:{name}"]).get("parent_manifest") != start]


def expert_table(road, start):
    """What each stage of an expert took and where it ended, from its record; "–" for what is not there."""
    table, other = Table(title=f"experts of {road.recipe.name}, in {road.out.name}/"), strangers(road, start, road.recipe.experts)
    for column in ("checkpoint", "steps", "loss", "divergence", "top-1", "s", "start"):
        table.add_column(column, justify="left" if column in ("checkpoint", "start") else "right", no_wrap=True)
    for name in road.recipe.experts:
        for stage in ("distill", "on-policy")[: 1 + (road.recipe.on_policy is not None)]:
            folder = road.folder[f"{stage}:{name}"]
            record = next((s for s in reversed(read_provenance(folder)) if s["stage"] == f"{stage}:{name}"), None)
            cells = ["–"] * 5 + ["not made"] if record is None else [*cells_of(record), "another" if name in other else start[:8]]
            table.add_row(str(folder.relative_to(road.out)), *cells)
    return table


def cells_of(record):
    """Steps, loss, divergence from the teacher (nats), share of its first choices, seconds."""
    figures, seconds = record.get("figures") or {}, record.get("seconds")
    values = figures.get("loss"), figures.get("divergence", figures.get("kl")), figures.get("top1_agreement")
    shown = ["–" if value is None else f"{value:.4g}" for value in values]
    return [str(record["config"].get("max_steps", "–")), *shown, "–" if seconds is None else f"{seconds:,.0f}"]


def next_step(road, done, start, student):
    """What to run next, in words that a shell understands behind the colon."""
    recipe = road.recipe
    missing = [part for name in recipe.experts if name not in done for part in ("--only", name)]
    here = ["--out", str(road.out)] if str(road.out) != recipe.out else []
    again = ["xlstm-hybrid", "experts", str(recipe.path), *here, *(["--start", str(start)] if start else [])]
    if missing:
        return f"next, the other experts: {shlex.join([*again, *missing])}"
    if student is not None:
        return f"next, judge the student: {shlex.join(['xlstm-hybrid', 'evaluate', str(student), '--recipe', str(recipe.path)])}"
    if start is not None:  # `run` would make the recipe's own start
        return f"next, merge them as the recipe says: {shlex.join([*again, '--merge'])}"
    return f"next, merge them, judge and report: {shlex.join(['xlstm-hybrid', 'run', str(recipe.path), *here])}"
