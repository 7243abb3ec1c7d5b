"""`xlstm-hybrid efficiency`: what a student costs beside its teacher, as tables, a picture and JSON."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from xlstm_hybrid.commands.compare import show
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError, EvaluationError
from xlstm_hybrid.evaluation.efficiency import measure_pair
from xlstm_hybrid.evaluation.efficiency_pairs import SHAPES, planned_pairs
from xlstm_hybrid.evaluation.equivalence import DTYPES
from xlstm_hybrid.reports.efficiency import (
    draw_pair,
    efficiency_notes,
    machine_and_versions,
    picture_name,
    record_efficiency,
    tables,
    write_efficiency,
)
from xlstm_hybrid.reports.plots import as_png


def efficiency(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    student: Annotated[str, typer.Argument(help="Student: checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for efficiency.json, .md and pictures.")],
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of the prompts, such as 1024,4096; by default what takes a CPU minutes.")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Rows at once, such as 1,8.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Further lengths, for decoding and memory only.")] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Random weights as well: llama-3.1-8b, qwen2.5-7b, or none; both on a GPU, none on a CPU by default."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of both models; bfloat16, or float32 where that is quicker, by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one by default.")] = None,
    cache: Annotated[
        str, typer.Option(help="dynamic, as generate has it, or static, allocated at its full length.")
    ] = "dynamic",
    rounds: Annotated[int, typer.Option(help="Rounds in which teacher and student take turns.")] = 5,
    steps: Annotated[int, typer.Option(help="Tokens decoded per round.")] = 8,
    pictures: Annotated[bool, typer.Option(help="Draw pictures; they need matplotlib.")] = True,
    record: Annotated[
        bool, typer.Option("--record", help="Add the figures to the record of STUDENT, a directory, for its card.")
    ] = False,
):
    """Measure a student beside its teacher: latency, speed, memory, cache, energy.

    Nothing is measured if a check of either model fails.

    Example: xlstm-hybrid efficiency recipes/tiny_teacher/tiny-llama runs/tiny/student --out efficiency --lengths 1024
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}: torch finds no GPU; use --device cpu, or install torch for CUDA and its driver"
        )
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    dtype = dtype_for(device, dtype)
    chosen = [
        name
        for name in (",".join(SHAPES if on_gpu else ()) if shapes is None else shapes).split(",")
        if name not in ("", "none")
    ]
    asked = {
        name: numbers(text, name) for name, text in (("lengths", lengths), ("batches", batches), ("contexts", contexts))
    }
    console = Console(width=None if Console().is_terminal else 120, emoji=False, highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    plans = planned_pairs(
        teacher, student, chosen, dtype, device, cache, asked | {"rounds": rounds, "steps": steps}, say
    )
    results, images = machine_and_versions(torch.device(device)) | {"pairs": []}, {}
    for j, (*sides, settings, proofs) in enumerate(plans):
        with Console(stderr=True).status("loading") as status:
            pair = measure_pair(*sides, settings, proofs, report=status.update)
        results["pairs"].append(pair)
        if pictures and (image := as_png(draw_pair, pair)):
            images[picture_name(j)] = image
        files = write_efficiency(results, out, images)  # after each pair: a long run leaves what it has
        for title, rows in tables(pair):
            show(console, "title", title)
            show(console, "table", rows)
        show(console, "list", efficiency_notes(pair))
    console.print(f"wrote {', '.join(files)}", markup=False, soft_wrap=True)
    if record:
        record_efficiency(results, student)


def numbers(text, name):
    """The whole numbers of a comma-separated option, None if it was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise EvaluationError(f"--{name} {text}: expected whole numbers separated by commas, such as 1024,4096")
    return tuple(map(int, parts))
