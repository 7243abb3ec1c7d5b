"""The report of what `efficiency.measure_pair` found: tables, sentences, a picture, files, and an entry in a
checkpoint's record.
"""

import math
import os
import platform
from pathlib import Path

import torch

from xlstm_hybrid.checkpoint.files import append_stage, installed_versions, markdown_table, write_file, write_json
from xlstm_hybrid.evaluation.efficiency import MIN_ENERGY_SECONDS, SIDES
from xlstm_hybrid.reports.plots import BLUE, INK, figure
from xlstm_hybrid.reports.text import NONE, number

FORMAT_VERSION = 1
FIGURES = {  # title: part of a row, field, factor
    "Time to first token, ms": ("prefill", "seconds", 1e3),
    "Decoding, tokens per second": ("decode", "tokens_per_second", 1),
    "Peak memory of reading the prompt, beyond the weights, MiB": ("memory", "prefill_peak_bytes", 2**-20),
    "Peak memory of decoding, cache included, beyond the weights, MiB": ("memory", "decode_peak_bytes", 2**-20),
    "Cache, MiB": ("memory", "cache_bytes", 2**-20),
    "Energy per token of the prompt, J": ("prefill", "joules_per_token", 1),
    "Energy per token decoded, J": ("decode", "joules_per_token", 1),
}
RECORDED = (  # name in a checkpoint's record, part of a row, field
    ("cache_bytes", "memory", "cache_bytes"),
    ("tokens_per_second", "decode", "tokens_per_second"),
    ("first_token_s", "prefill", "seconds"),
)


def machine_and_versions(device):
    """Machine, clock and versions, for the file of results."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    machine = {"cpu": next(names, platform.processor()), "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "clock": "from the call to its end"}
    else:
        machine |= {"threads": 1, "clock": "CPU seconds of the process, one thread"}
    return {"format_version": FORMAT_VERSION, "machine": machine, "versions": installed_versions()}


def value_of(row, part, side, field):
    """A figure of a row; None where it was not measured."""
    return row.get(part, {}).get(side, {}).get(field)


def tables(pair):
    """`(title, rows)` of each figure that was measured, header first."""
    for title, (part, field, factor) in FIGURES.items():
        scales, lines = {"teacher": factor, "student": factor, "gain": 1}, []
        for row in pair["rows"]:
            values = [(value_of(row, part, side, field), scale) for side, scale in scales.items()]
            lines.append([row["length"], row["batch"], *(number(None if x is None else x * k) for x, k in values)])
        if any(cell != NONE for line in lines for cell in line[2:]):
            yield title, [["tokens", "batch", *scales], *lines]


def efficiency_notes(pair):
    """Sentences on what the figures rest on and what is missing."""
    sides, rows, settings, energy = [pair[name] for name in SIDES], pair["rows"], pair["settings"], pair["energy"]
    teacher, student = (
        f"{s['name']} ({s['model_type']}, {s['parameters']:,} parameters, {s['weight_bytes'] / 2**20:.4g} MiB of {s['dtype']} weights)"
        for s in sides
    )
    yield f"Teacher {teacher}, attention {sides[0]['attention']}; student {student}."
    parts = [check["name"].rpartition(", ")[2] for check in pair["checks"] if check["name"].endswith(" layers")]
    some = f", {len(parts)} of them on {parts[0]} of the student (`xlstm-hybrid verify` takes all)" if parts else ""
    yield f"{len(pair['checks'])} checks passed before anything was measured{some}."
    yield f"{settings['cache']} cache; {settings['rounds']} rounds in turns, {settings['steps']} tokens decoded in each."
    yield "Gain: how much less, or faster, than the teacher; for times the median of the ratios of paired rounds. Above 1 the student is ahead."
    limit = min(s["max_position_embeddings"] or math.inf for s in sides)
    if max(row["length"] for row in rows) > limit:
        yield f"Contexts beyond {limit} tokens are longer than the models are made for: what they cost, not what they are worth."
    if energy["absent"]:
        yield f"Energy: no figure. {energy['absent']}."
    elif not any(
        "joules_per_token" in row.get(p, {}).get("student", {}) for row in rows for p in ("prefill", "decode")
    ):
        yield f"Energy: no figure, no round took the {MIN_ENERGY_SECONDS} s that {energy['source']} needs."
    else:
        yield f"Energy from {energy['source']}: the whole device's, whoever used it, in rounds of at least {MIN_ENERGY_SECONDS} s."
    if all("memory" not in row for row in rows):
        yield "Peak memory and cache: not measured."
    elif all(value_of(row, "memory", name, "decode_peak_bytes") is None for row in rows for name in SIDES):
        yield "Peak memory: no figure, this platform has no counter of it."
    for row in rows:
        for what, why in row["absent"].items():
            yield f"{row['length']} tokens, batch {row['batch']}, {what}: {why}."


def efficiency_markdown(results, pictures=()):
    """The report of `results`: `machine_and_versions` and under `pairs` what `measure_pair` returned; `pictures`: names
    of those that are there.
    """
    machine = results["machine"]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ["# Efficiency", f"{machine.get('gpu') or machine['cpu']}; times are {machine['clock']}; {told}."]
    for j, pair in enumerate(results["pairs"]):
        parts.append(f"## {pair['student']['name']} beside {pair['teacher']['name']}")
        parts.append("\n".join(f"* {note}" for note in efficiency_notes(pair)))
        parts += [f"![Figures against the context]({picture_name(j)})"] if picture_name(j) in pictures else []
        parts += [f"### {title}\n\n{markdown_table(rows)}" for title, rows in tables(pair)]
    return "\n\n".join(parts) + "\n"


def picture_name(j):
    return f"efficiency{j or ''}.png"


def draw_pair(pair):
    """A matplotlib figure with a panel per table, against L, a line per side and batch: teacher dashed, student solid;
    None without a figure.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown, marks = [(title, *FIGURES[title]) for title, _ in tables(pair)], "osD^vP*X"
    if not shown:
        return None
    count = math.ceil(len(shown) / 2)
    picture, panels = figure(columns=2, width=11, height=3.6 * count, rows=count)
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, (title, part, field, factor) in zip(panels, shown, strict=False):
        for j, B in enumerate(dict.fromkeys(row["batch"] for row in pair["rows"])):
            rows = [row for row in pair["rows"] if row["batch"] == B]
            for name, style in (("teacher", {"color": INK, "linestyle": "--"}), ("student", {"color": BLUE})):
                values = [(row["length"], value_of(row, part, name, field)) for row in rows]
                points = list(zip(*sorted((L, factor * value) for L, value in values if value), strict=True))
                axes.plot(*points or ([], []), marker=marks[j % len(marks)], label=f"{name}, batch {B}", **style)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="tokens of context", xscale="log", yscale="log")
        axes.set_xticks(lengths := sorted({row["length"] for row in pair["rows"]}), [f"{L:,}" for L in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
    picture.axes[0].legend(fontsize=8)
    return picture


def draw_efficiency(results):
    """What teacher and student cost, a panel per figure."""
    return draw_pair(results["efficiency"]["pairs"][0]) if results.get("efficiency") else None


def write_efficiency(results, folder, pictures):
    """Write efficiency.json, efficiency.md and `pictures`, {file name: bytes}; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "efficiency.json", results)
    for name, content in pictures.items():
        write_file(folder / name, content)
    write_file(folder / "efficiency.md", efficiency_markdown(results, pictures).encode())
    return ["efficiency.json", "efficiency.md", *pictures]


def record_efficiency(results, directory):
    """Add the first pair of an efficiency report to the record of the student's checkpoint, as the stage "efficiency",
    for its card: one flat row per length and batch, of the figures that were measured, with the student's gain.

    Raises:
        CheckpointError: see `checkpoint.files.append_stage`.
    """
    pair, machine = results["pairs"][0], results["machine"]
    config = {
        **{key: machine[key] for key in ("gpu", "cpu", "clock") if key in machine},
        "teacher": pair["teacher"]["name"],
        "dtype": pair["student"]["dtype"],
        **{key: pair["settings"][key] for key in ("cache", "rounds", "steps")},
        "checks_passed": len(pair["checks"]),
    }
    rows = [{"tokens": row["length"], "batch": row["batch"]} for row in pair["rows"]]
    for flat, row in zip(rows, pair["rows"], strict=True):
        for name, part, field in RECORDED:
            flat |= {f"{side}_{name}": value_of(row, part, side, field) for side in (*SIDES, "gain")}
    append_stage(directory, "efficiency", config=config, figures={"rows": rows})
