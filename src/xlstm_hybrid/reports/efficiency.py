"""The report of what `efficiency.measure` found: tables, sentences, a picture, files, and an entry in a checkpoint's
record.
"""

import math
import os
import platform
from pathlib import Path

import torch

from xlstm_hybrid.checkpoint.files import append_stage, installed_versions, markdown_table, write_file, write_json
from xlstm_hybrid.evaluation.comparison import number
from xlstm_hybrid.evaluation.efficiency import MIN_ENERGY_SECONDS, SIDES

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


def surroundings(device):
    """Machine, clock and versions, for the file of results."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    machine = {"cpu": cpu, "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "clock": "from the call to its end"}
    else:
        machine |= {"threads": 1, "clock": "CPU seconds of the process, one thread"}
    return {"format_version": FORMAT_VERSION, "machine": machine, "versions": installed_versions()}


def tables(pair):
    """`(title, rows)` of each figure that was measured, header first."""
    for title, (part, field, factor) in FIGURES.items():
        cells = [[row.get(part, {}).get(name, {}).get(field) for name in (*SIDES, "gain")] for row in pair["rows"]]
        if any(value is not None for row in cells for value in row):
            lines = [
                [
                    row["length"],
                    row["batch"],
                    *(
                        number(None if x is None else x * scale)
                        for x, scale in zip(found, (factor, factor, 1), strict=True)
                    ),
                ]
                for row, found in zip(pair["rows"], cells, strict=True)
            ]
            yield title, [["tokens", "batch", "teacher", "student", "gain"], *lines]


def notes(pair):
    """Sentences on what the figures rest on and what is missing."""
    teacher, student = (pair[name] for name in SIDES)
    sizes = [
        f"{s['name']} ({s['model_type']}, {s['parameters']:,} parameters, {s['weight_bytes'] / 2**20:.4g} MiB of {s['dtype']} weights)"
        for s in (teacher, student)
    ]
    yield f"Teacher {sizes[0]}, attention {teacher['attention']}; student {sizes[1]}."
    settings = pair["settings"]
    parts = [check["name"].rpartition(", ")[2] for check in pair["checks"] if check["name"].endswith(" layers")]
    some = f", {len(parts)} of them on {parts[0]} of the student (`xlstm-hybrid verify` takes all)" if parts else ""
    yield f"{len(pair['checks'])} checks passed before anything was measured{some}."
    yield f"{settings['cache']} cache; {settings['rounds']} rounds in turns, {settings['steps']} tokens decoded in each."
    yield "Gain: how much less, or faster, than the teacher; for times the median of the ratios of paired rounds. Above 1 the student is ahead."
    longest, limit = (
        max(row["length"] for row in pair["rows"]),
        min(s["max_position_embeddings"] or math.inf for s in (teacher, student)),
    )
    if longest > limit:
        yield f"Contexts beyond {limit} tokens are longer than the models are made for: what they cost, not what they are worth."
    energy = pair["energy"]
    if energy["absent"]:
        yield f"Energy: no figure. {energy['absent']}."
    elif not any(
        "joules_per_token" in row[part].get("student", {})
        for row in pair["rows"]
        for part in ("prefill", "decode")
        if part in row
    ):
        yield f"Energy: no figure, no round took the {MIN_ENERGY_SECONDS} s that {energy['source']} needs."
    else:
        yield f"Energy from {energy['source']}: the whole device's, whoever used it, in rounds of at least {MIN_ENERGY_SECONDS} s."
    if all(row["memory"].get(name, {}).get("decode_peak_bytes") is None for row in pair["rows"] for name in SIDES):
        yield "Peak memory: no figure, this platform has no counter of it."
    for row in pair["rows"]:
        for what, why in row["absent"].items():
            yield f"{row['length']} tokens, batch {row['batch']}, {what}: {why}."


def markdown(results, pictures=()):
    """The report of `results`: `surroundings` and under `pairs` what `measure` returned; `pictures`: names of those
    that are there.
    """
    machine = results["machine"]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ["# Efficiency", f"{machine.get('gpu') or machine['cpu']}; times are {machine['clock']}; {told}."]
    for j, pair in enumerate(results["pairs"]):
        parts += [
            f"## {pair['student']['name']} beside {pair['teacher']['name']}",
            "\n".join(f"* {note}" for note in notes(pair)),
        ]
        parts += [f"![Figures against the context]({picture_name(j)})"] if picture_name(j) in pictures else []
        parts += [f"### {title}\n\n{markdown_table(rows)}" for title, rows in tables(pair)]
    return "\n\n".join(parts) + "\n"


def picture_name(j):
    return f"efficiency{j or ''}.png"


def picture(pair):
    """A matplotlib figure with a panel per table, against L, a line per side and batch: teacher dashed, student solid;
    None without a figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown, marks = [(title, *FIGURES[title]) for title, _ in tables(pair)], "osD^vP*X"
    if not shown:
        return None
    drawn = Figure(figsize=(11, 3.6 * math.ceil(len(shown) / 2)), layout="constrained")
    panels = drawn.subplots(math.ceil(len(shown) / 2), 2, squeeze=False).flat
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, (title, part, field, factor) in zip(panels, shown, strict=False):
        for j, B in enumerate(dict.fromkeys(row["batch"] for row in pair["rows"])):
            for name, style in (("teacher", {"color": "0.35", "linestyle": "--"}), ("student", {"color": "C0"})):
                points = [
                    (row["length"], row.get(part, {}).get(name, {}).get(field))
                    for row in pair["rows"]
                    if row["batch"] == B
                ]
                points = sorted((L, factor * value) for L, value in points if value)
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []),
                    marker=marks[j % len(marks)],
                    label=f"{name}, batch {B}",
                    **style,
                )
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="tokens of context", xscale="log", yscale="log")
        axes.set_xticks(lengths := sorted({row["length"] for row in pair["rows"]}), [f"{L:,}" for L in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
    drawn.axes[0].legend(fontsize=8)
    return drawn


def draw_efficiency(results):
    """What teacher and student cost, a panel per figure."""
    return picture(results["efficiency"]["pairs"][0]) if results.get("efficiency") else None


def write_efficiency(results, folder, pictures):
    """Write efficiency.json, efficiency.md and `pictures`, {file name: bytes}; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "efficiency.json", results)
    for name, content in pictures.items():
        write_file(folder / name, content)
    write_file(folder / "efficiency.md", markdown(results, pictures).encode())
    return ["efficiency.json", "efficiency.md", *pictures]


def recorded(pair):
    """What a checkpoint's record keeps: one flat row per length and batch, of the figures that were measured, with the
    student's gain.
    """
    fields = {
        "cache_bytes": ("memory", "cache_bytes"),
        "tokens_per_second": ("decode", "tokens_per_second"),
        "first_token_s": ("prefill", "seconds"),
    }
    rows = []
    for row in pair["rows"]:
        found = {"tokens": row["length"], "batch": row["batch"]}
        for name, (part, field) in fields.items():
            found |= {f"{side}_{name}": row.get(part, {}).get(side, {}).get(field) for side in (*SIDES, "gain")}
        rows.append(found)
    return rows


def record(results, directory):
    """Add the first pair of an efficiency report to the record of the student's checkpoint, as the stage "efficiency",
    for its card.

    Raises:
        CheckpointError: see `artifacts.append_stage`.
    """
    pair = results["pairs"][0]
    machine = {key: results["machine"][key] for key in ("gpu", "cpu", "clock") if key in results["machine"]}
    config = {
        **machine,
        "teacher": pair["teacher"]["name"],
        "dtype": pair["student"]["dtype"],
        **{key: pair["settings"][key] for key in ("cache", "rounds", "steps")},
        "checks_passed": len(pair["checks"]),
    }
    append_stage(directory, "efficiency", config=config, figures={"rows": recorded(pair)})
