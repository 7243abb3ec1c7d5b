"""`xlstm-hybrid plan`: what a run will need, before it starts."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Revision
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.planning.run import hours, human, machine_of, read_config, settings_text
from xlstm_hybrid.planning.run import plan as plan_run
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher, teacher_of

OF_GPUS = ("gpus", "memory", "gpu", "tflops", "utilisation")
STEPS = (
    "What does not fit: take more GPUs, shorter rows (data.sequence_length), a store in the place of the teacher, train: mixer or LoRA in stage II; "
    "stage I can align a few layers at a time (align: layers_at_a_time)."
)


def plan(
    context: typer.Context,
    teacher: Annotated[
        str,
        Argument(
            help="Directory with a config.json, hub id or GGUF file, no weights needed; or RECIPE.yaml: its teacher."
        ),
    ],
    gpus: Annotated[int, Option(help="Number of GPUs.")] = 8,
    memory: Annotated[float, Option(help="Memory of each, in GB (10^9 bytes).")] = 80,
    recipe: Annotated[Path | None, Option(help="Recipe; by default the paper's steps and tokens.")] = None,
    gpu: Annotated[str, Option(help="Kind, for its peak FLOP/s: a100, h100, h200 or b200.")] = "h100",
    tflops: Annotated[float | None, Option(help="Peak TFLOP/s of another kind (bfloat16, dense).")] = None,
    utilisation: Annotated[float, Option(help="Share of the peak that training reaches; an assumption.")] = 0.35,
    revision: Revision = None,
    measure: Annotated[
        bool, Option("--measure", help="Time a few steps on the CPU at hand, and plan for it in the place of GPUs.")
    ] = False,
    out: Annotated[Path | None, Option("--json", help="File for the plan, JSON.")] = None,
):
    """Say whether a run fits, how long it takes and which settings to use.

    Per stage, with the bytes that it leaves on the disk. Exit code 1 if a stage does not fit.

    Example: xlstm-hybrid plan Qwen/Qwen3-1.7B --gpus 4 --memory 24 --recipe recipes/qwen3-1.7b.yaml
    """
    if out is not None:
        check_output(out, "file")
    if teacher.endswith((".yaml", ".yml")):
        if recipe is not None or revision is not None:
            raise ConfigError(f"{teacher}: a recipe names its teacher and revision; leave out --recipe and --revision")
        loaded = load_recipe(teacher)
        teacher, revision = str(resolve_teacher(loaded)), loaded.revision
    else:
        loaded = load_recipe(recipe) if recipe else None
        teacher = str(teacher_of(loaded, teacher)) if recipe else teacher
    if measure:
        given = [name for name in OF_GPUS if context.get_parameter_source(name).name != "DEFAULT"]
        if given:
            raise ConfigError(f"--measure is for the CPU at hand, --{given[0]} for GPUs: leave one out")
        plan_measured(read_config(teacher, revision), loaded, Path(teacher).name, out)
        return
    machine = machine_of(gpus, memory * 1e9, gpu, tflops and tflops * 1e12, utilisation)
    found = plan_run(read_config(teacher, revision), machine, loaded, name=Path(teacher).name)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for part in plan_lines(found):
        console.print(part)
    if out is not None:
        write_json(out, found.as_dict())
    if not found.fits:
        raise typer.Exit(1)


def plan_measured(config, recipe, name, out):
    """Print, and write where `out` is a file, what a CPU does; exit code 1 if a stage does not fit into its memory."""
    from xlstm_hybrid.pipeline.speed import measure_speed

    found = measure_speed(config, recipe)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for part in measured_lines(found, name):
        console.print(part)
    if out is not None:
        write_json(out, found.as_dict())
    if not found.fits:
        raise typer.Exit(1)


def measured_lines(found, name):
    """What was measured as a table and lines for the terminal."""
    table = Table("stage", "tokens/s", "tokens", "time", "memory")
    for stage, speed in found.stages.items():
        row = [stage, f"{speed.tokens_per_second:,.0f}"]
        if speed.tokens is not None:
            short = "" if speed.peak <= found.room else f", {human(speed.peak - found.room)} short"
            row += [f"{speed.tokens:,}", hours(speed.seconds), human(speed.peak) + short]
        table.add_row(*row)
    yield f"[bold]{name}[/bold] on this CPU, {found.threads} threads, {'bfloat16' if found.bf16 else 'float32'}"
    yield table
    total = sum(speed.seconds or 0 for speed in found.stages.values())
    yield f"in all {hours(total)} of training; evaluation comes on top, at about the rate of the forward"
    yield (
        f"measured: {found.layers} of {found.of_layers} layers and the LM head, random weights, rows of {found.length} tokens, one at a "
        "time; other processes make it slower"
    )


def plan_lines(found):
    """The plan as tables and lines for the terminal."""
    s, machine = found.shape, found.machine
    yield f"[bold]{s.name}[/bold]: {s.teacher:,} parameters; its student {s.student:,}, {s.new:,} of them new ({s.hybrid} of {s.L} layers hybrid)"
    if s.idle:
        active = f"{s.teacher - s.idle:,} parameters of the teacher, {s.student - s.idle:,} of the student"
        yield f"active in a token, which goes through some experts only: {active}"
    stages = Table("stage", "fits", "peak per GPU", "settings", "tokens", "tokens/s", "time")
    parts = Table("memory per GPU", *found.stages)
    for kind, e in found.stages.items():
        job = found.jobs[kind]
        fits = "yes" if e.fits else f"NO, {human(e.peak - machine.room)} short"
        tokens = f"{job.tokens / 1e9:.2f}e9" + (f" x {job.experts} experts" if job.experts > 1 else "")
        speed = f"{e.tokens_per_second:,.0f}"
        stages.add_row(kind, fits, human(e.peak), settings_text(job, e.setting), tokens, speed, hours(e.seconds))
    for name in dict.fromkeys(name for e in found.stages.values() for name in e.memory):
        parts.add_row(name, *(human(e.memory[name]) if name in e.memory else "" for e in found.stages.values()))
    yield stages
    yield parts
    yield "disk: " + ", ".join(f"{name} {human(size)}" for name, size in found.disk.items())
    ours, theirs = (sum(found.cache[side].values()) for side in ("student", "teacher"))
    yield f"cache of one sequence of {found.cache['length']:,} tokens, bfloat16: {human(ours)}; the teacher's {human(theirs)}"
    yield f"teacher online: {hours(found.store['online_seconds'])} of the time of stage II, no disk; a store of its targets, filled once:"
    for k, size in found.store["stores"].items():
        yield f"  top_k {k:>4}: {human(size)}, {hours(found.store['fill_seconds'])} to fill, read in every run in the place of the teacher"
    yield from (f"warning: {line}" for line in found.warnings)
    if not found.fits:
        yield STEPS
    yield "Estimates, none of them measured on a GPU:"
    for line in found.assumptions:
        yield f"  - {line}"
