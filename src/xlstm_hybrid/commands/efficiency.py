"""`xlstm-hybrid efficiency`: what a student costs beside its teacher, as tables, a picture and JSON."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import PROVENANCE
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.compare import print_section
from xlstm_hybrid.commands.options import Teacher
from xlstm_hybrid.environment.devices import device_of
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
    teacher: Teacher,
    student: Annotated[str, Argument(help="Student: checkpoint directory or hub id.")],
    out: Annotated[Path, Option(help="Folder for efficiency.json, .md and pictures.")],
    lengths: Annotated[str | None, Option(help="Tokens of the prompts: 1024,4096; default: minutes on a CPU.")] = None,
    batches: Annotated[str | None, Option(help="Rows at once, such as 1,8.")] = None,
    contexts: Annotated[str | None, Option(help="Further lengths, for decoding and memory only.")] = None,
    shapes: Annotated[
        str | None, Option(help="Random weights: llama-3.1-8b, qwen2.5-7b, none; by default both on a GPU, else none.")
    ] = None,
    dtype: Annotated[str | None, Option(help="Of both models; by default bfloat16, or float32 if quicker.")] = None,
    device: Annotated[str | None, Option(help="Where to run; a GPU if there is one by default.")] = None,
    cache: Annotated[str, Option(help="dynamic, as in generate, or static, allocated at full length.")] = "dynamic",
    rounds: Annotated[int, Option(help="Rounds in which teacher and student take turns.")] = 5,
    steps: Annotated[int, Option(help="Tokens decoded per round.")] = 8,
    pictures: Annotated[bool, Option(help="Draw pictures; they need matplotlib.")] = True,
    record: Annotated[bool, Option("--record", help="Add the figures to STUDENT's record, for its card.")] = False,
):
    """Measure a student beside its teacher: latency, speed, memory, cache, energy.

    Nothing is measured if a check of either model fails.

    Example: xlstm-hybrid efficiency recipes/tiny_teacher/tiny-llama runs/tiny/student --out efficiency --lengths 1024
    """
    check_output(out, "folder", [teacher, student])
    if record:
        check_output(Path(student) / PROVENANCE, "file")
    device = device_of(device)
    on_gpu = torch.device(device).type == "cuda"
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    dtype = dtype_for(device, dtype)
    names = (",".join(SHAPES if on_gpu else ()) if shapes is None else shapes).split(",")
    chosen = [name for name in names if name not in ("", "none")]
    asked = {"lengths": whole_numbers(lengths, "lengths"), "batches": whole_numbers(batches, "batches")}
    asked |= {"contexts": whole_numbers(contexts, "contexts"), "rounds": rounds, "steps": steps}
    console = Console(width=None if Console().is_terminal else 120, emoji=False, highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    plans = planned_pairs(teacher, student, chosen, dtype, device, cache, asked, say)
    results, images = machine_and_versions(torch.device(device)) | {"pairs": []}, {}
    for j, (*sides, settings, proofs) in enumerate(plans):
        with Console(stderr=True).status("loading") as status:
            pair = measure_pair(*sides, settings, proofs, report=status.update)
        results["pairs"].append(pair)
        if pictures and (image := as_png(draw_pair, pair)):
            images[picture_name(j)] = image
        files = write_efficiency(results, out, images)  # after each pair: a long run leaves what it has
        for title, rows in tables(pair):
            print_section(console, "title", title)
            print_section(console, "table", rows)
        print_section(console, "list", efficiency_notes(pair))
    console.print(f"wrote {', '.join(files)}", markup=False, soft_wrap=True)
    if record:
        record_efficiency(results, student)


def whole_numbers(text, name):
    """The whole numbers of a comma-separated option, None if it was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise EvaluationError(f"--{name} {text}: expected whole numbers separated by commas, such as 1024,4096")
    return tuple(map(int, parts))
