"""What is left when a command is interrupted: what was finished and is kept, and how to go on."""

import contextlib
import json
from pathlib import Path

from xlstm_hybrid.checkpoint.files import checkpoints_by_step, verify_files
from xlstm_hybrid.errors import CheckpointError, XLSTMHybridError
from xlstm_hybrid.recipe.schema import load_recipe, read_yaml

TRAINERS = ("align", "distill", "on-policy", "multi-teacher", "distil-xlstm")
CHECKPOINTS = "--save_strategy steps --save_steps 100 keeps checkpoints on the way"


def after_interrupt(command, params):
    """One line for a command that was interrupted, from what stands where it writes.

    Args:
        params: its arguments and options by name, as typer has them.
    """
    out = params.get("out")
    if out is None and command in ("run", "experts", "distil-xlstm"):
        out = out_of(params["recipe"])
    kept = [] if out is None else list(kept_at(Path(out)))
    if kept:
        return f"interrupted; finished and kept: {'; '.join(kept)}. Start the same command again to go on"
    hint = f" ({CHECKPOINTS})" if command in TRAINERS else ""
    return f"interrupted; nothing was finished yet, nothing half-written is left. Start the same command again{hint}"


def kept_at(out):
    """What the next call of the same command need not do again, in words."""
    if notes := sorted(out.glob("stages/*.json"), key=lambda path: path.stat().st_mtime_ns):
        names = [
            path.stem.replace("-", ":", 1) for path in notes if "spec" in content(path) and "seconds" in content(path)
        ]
        names += [f"evaluate:{path.stem}" for path in sorted(out.glob("evaluation/*.json")) if "spec" in content(path)]
        if names:
            yield f"{', '.join(names)} in {out}"
    if first := content(out / "index.json").get("first_rows"):
        yield f"{len(list(out.glob('shard-*.json')))} of {len(first) - 1} shards in {out}"
    if tasks := sorted(path.parent.name for path in out.rglob("harness.json")):
        yield f"the tasks {', '.join(tasks)} in {out}"
    if pairs := content(out / "efficiency.json").get("pairs"):
        yield f"{len(pairs)} measured pairs in {out}/efficiency.json"
    for table in (out.with_name(f"{out.name}.search.json"), *out.glob("stages/search-*.json")):
        if points := content(table).get("points"):
            yield f"{len(points)} candidates of the search in {table}"
    for folder in (out.with_name(f".run-{out.name}"), *out.glob(".run-*"), *out.glob("*/.run-*")):
        if whole := [path for path in checkpoints_by_step(folder) if is_whole(path)]:
            yield f"{whole[-1].name} in {folder}"
    for folder in (out.with_name(f"{out.name}.streaming"), *out.glob("*.streaming")):
        if groups := content(folder / "streaming.json").get("groups"):
            yield f"{len(groups)} groups of layers in {folder}"
    for folder in (out.with_name(f".calibrating-{out.name}"), *out.glob(".calibrating-*")):
        if layers := content(folder / "calibration.json").get("layers"):
            yield f"{len(layers)} calibrated layers in {folder}"


def out_of(recipe):
    """The run directory of a recipe, of `distil-xlstm` as well; None where it cannot be read."""
    with contextlib.suppress(XLSTMHybridError, OSError):
        return load_recipe(recipe).out
    with contextlib.suppress(XLSTMHybridError, OSError, AttributeError):
        return read_yaml(recipe).get("out")


def is_whole(checkpoint):
    """Whether a checkpoint has the files of its manifest; they are not hashed, whoever interrupts does not wait."""
    with contextlib.suppress(CheckpointError):
        verify_files(checkpoint, level="size")
        return True
    return False


def content(path):
    """The object in a JSON file, {} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
