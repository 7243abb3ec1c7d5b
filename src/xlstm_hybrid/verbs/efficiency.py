"""`xlstm-hybrid efficiency`: what a student costs beside its teacher, as tables, a picture and JSON."""

import math
import os
import platform
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

FORMAT_VERSION = 1
SIDES = ("teacher", "student")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES = {  # published configurations: (model type, fields)
    "llama-3.1-8b": ("llama", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
                               "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "qwen2.5-7b": ("qwen2", {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                             "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                             "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}  # fmt: skip
SMALL = {"lengths": (1024, 4096, 16384), "contexts": (), "batches": (1,)}  # of the checkpoints, where nothing is asked for
LONG = {"lengths": (16384, 32768, 65536), "contexts": (131072,), "batches": (1, 8)}  # of the shapes, as the paper has them
FIGURES = {  # title: part of a row, field, factor
    "Time to first token, ms": ("prefill", "seconds", 1e3),
    "Decoding, tokens per second": ("decode", "tokens_per_second", 1),
    "Peak memory of reading the prompt, beyond the weights, MiB": ("memory", "prefill_peak_bytes", 2**-20),
    "Peak memory of decoding, cache included, beyond the weights, MiB": ("memory", "decode_peak_bytes", 2**-20),
    "Cache, MiB": ("memory", "cache_bytes", 2**-20),
    "Energy per token of the prompt, J": ("prefill", "joules_per_token", 1),
    "Energy per token decoded, J": ("decode", "joules_per_token", 1),
}


# --- models and their checks ---------------------------------------------------------------------------------------


def load_checkpoint(path, dtype, device):
    """A model for inference; importable, so that another process can load it, too.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from xlstm_hybrid.errors import CheckpointError
    from xlstm_hybrid.verify import DTYPES

    disable_progress_bar()  # every process that measures memory loads anew
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(path).name}: cannot be loaded ({error}); expected a checkpoint directory or hub id") from error


def random_model(shape, role, dtype, device, layers=None):
    """A teacher or student with random weights in one of `SHAPES`; `layers`: fewer than it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from xlstm_hybrid.families import student_config
    from xlstm_hybrid.verify import DTYPES

    kind, fields = SHAPES[shape]
    config = AutoConfig.for_model(kind, **fields | ({"num_hidden_layers": layers} if layers else {}))
    config = student_config(config) if role == "student" else config
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in (model._keep_in_fp32_modules_strict or ()):
            parameter.data = parameter.data.float()  # as loading a checkpoint does
    return model.eval()


def decoding_difference(model, cache="dynamic", *, length=64, steps=4, seed=0):
    """Largest difference between the logits of what is timed and those of one call without a cache, in standard deviations of the latter.

    What is timed: a prompt of `length` tokens, then `steps` tokens one by one, two rows.
    """
    import torch

    from xlstm_hybrid.efficiency import new_cache

    ids = torch.randint(model.config.vocab_size, (2, length + steps), generator=torch.Generator().manual_seed(seed)).to(model.device)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, length - 1 :].double()
        held = new_cache(model, cache, length + steps)
        got = [model(ids[:, :length], past_key_values=held, use_cache=True, logits_to_keep=1).logits]
        got += [model(ids[:, t : t + 1], past_key_values=held, use_cache=True).logits for t in range(length, length + steps)]
    return ((torch.cat(got, 1).double() - want).abs().max() / want.std()).item()


def checks(student, teacher, cache, proof=None):
    """What is timed against one call without a cache, on both models as they are timed; then `verify` on the student, or on `proof()` for it."""
    import time

    from xlstm_hybrid.verify import Result, bound, default_length, verify

    length = default_length(student.config)
    for name, model in (("teacher", teacher), ("student", student)):
        begin, difference = time.perf_counter(), decoding_difference(model, cache, length=length)
        allowed, dtype = bound(model.dtype, model.config.num_hidden_layers), str(model.dtype).removeprefix("torch.")
        yield Result(f"{name}: prompt and steps = one call", difference, allowed, dtype, time.perf_counter() - begin)
    yield from verify(proof() if proof else student)


# --- the report ----------------------------------------------------------------------------------------------------


def surroundings(device):
    """Machine, clock and versions, for the file of results."""
    import torch

    from xlstm_hybrid.artifacts import versions

    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    machine = {"cpu": cpu, "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "clock": "from the call to its end"}
    else:
        machine |= {"threads": 1, "clock": "CPU seconds of the process, one thread"}
    return {"format_version": FORMAT_VERSION, "machine": machine, "versions": versions()}


def tables(pair):
    """`(title, rows)` of each figure that was measured, header first."""
    from xlstm_hybrid.compare import number

    for title, (part, field, factor) in FIGURES.items():
        cells = [[row.get(part, {}).get(name, {}).get(field) for name in (*SIDES, "gain")] for row in pair["rows"]]
        if any(value is not None for row in cells for value in row):
            lines = [
                [
                    row["length"],
                    row["batch"],
                    *(number(None if x is None else x * scale) for x, scale in zip(found, (factor, factor, 1), strict=True)),
                ]
                for row, found in zip(pair["rows"], cells, strict=True)
            ]
            yield title, [["tokens", "batch", "teacher", "student", "gain"], *lines]


def notes(pair):
    """Sentences on what the figures rest on and what is missing."""
    from xlstm_hybrid.efficiency import MIN_ENERGY_SECONDS

    teacher, student = (pair[name] for name in SIDES)
    sizes = [f"{s['name']} ({s['model_type']}, {s['parameters']:,} parameters, {s['weight_bytes'] / 2**20:.4g} MiB of {s['dtype']} weights)"
             for s in (teacher, student)]  # fmt: skip
    yield f"Teacher {sizes[0]}, attention {teacher['attention']}; student {sizes[1]}."
    settings = pair["settings"]
    yield f"{len(pair['checks'])} checks passed before anything was measured."
    yield f"{settings['cache']} cache; {settings['rounds']} rounds in turns, {settings['steps']} tokens decoded in each."
    yield "Gain: how much less, or faster, than the teacher; for times the median of the ratios of paired rounds. Above 1 the student is ahead."
    longest, limit = max(row["length"] for row in pair["rows"]), min(s["max_position_embeddings"] or math.inf for s in (teacher, student))
    if longest > limit:
        yield f"Contexts beyond {limit} tokens are longer than the models are made for: what they cost, not what they are worth."
    energy = pair["energy"]
    if energy["absent"]:
        yield f"Energy: no figure. {energy['absent']}."
    elif not any("joules_per_token" in row[part].get("student", {}) for row in pair["rows"] for part in ("prefill", "decode") if part in row):
        yield f"Energy: no figure, no round took the {MIN_ENERGY_SECONDS} s that {energy['source']} needs."
    else:
        yield f"Energy from {energy['source']}: the whole device's, whoever used it, in rounds of at least {MIN_ENERGY_SECONDS} s."
    if all(row["memory"].get(name, {}).get("decode_peak_bytes") is None for row in pair["rows"] for name in SIDES):
        yield "Peak memory: no figure, this platform has no counter of it."
    for row in pair["rows"]:
        for what, why in row["absent"].items():
            yield f"{row['length']} tokens, batch {row['batch']}, {what}: {why}."


def markdown(results, pictures=()):
    """The report of `results`: `surroundings` and under `pairs` what `measure` returned; `pictures`: names of those that are there."""
    from xlstm_hybrid.artifacts import markdown_table

    machine = results["machine"]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ["# Efficiency", f"{machine.get('gpu') or machine['cpu']}; times are {machine['clock']}; {told}."]
    for j, pair in enumerate(results["pairs"]):
        parts += [f"## {pair['student']['name']} beside {pair['teacher']['name']}", "\n".join(f"* {note}" for note in notes(pair))]
        parts += [f"![Figures against the context]({picture_name(j)})"] if picture_name(j) in pictures else []
        parts += [f"### {title}\n\n{markdown_table(rows)}" for title, rows in tables(pair)]
    return "\n\n".join(parts) + "\n"


def picture_name(j):
    return f"efficiency{j or ''}.png"


def picture(pair):
    """A matplotlib figure with a panel per table, against L, a line per side and batch: teacher dashed, student solid; None without a figure."""
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
                points = [(row["length"], row.get(part, {}).get(name, {}).get(field)) for row in pair["rows"] if row["batch"] == B]
                points = sorted((L, factor * value) for L, value in points if value)
                axes.plot(*zip(*points, strict=True) if points else ([], []), marker=marks[j % len(marks)], label=f"{name}, batch {B}", **style)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="tokens of context", xscale="log", yscale="log")
        axes.set_xticks(lengths := sorted({row["length"] for row in pair["rows"]}), [f"{L:,}" for L in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
    drawn.axes[0].legend(fontsize=8)
    return drawn


def write_efficiency(results, folder, pictures):
    """Write efficiency.json, efficiency.md and `pictures`, {file name: bytes}; returns the names."""
    from xlstm_hybrid.artifacts import write_file, write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "efficiency.json", results)
    for name, content in pictures.items():
        write_file(folder / name, content)
    write_file(folder / "efficiency.md", markdown(results, pictures).encode())
    return ["efficiency.json", "efficiency.md", *pictures]


# --- the verb ------------------------------------------------------------------------------------------------------


def numbers(text, name):
    """The whole numbers of a comma-separated option, None if it was not given."""
    from xlstm_hybrid.errors import EvaluationError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise EvaluationError(f"--{name} {text}: expected whole numbers separated by commas, such as 1024,4096")
    return tuple(map(int, parts))


def plans_of(teacher, student, shapes, dtype, device, cache, asked):
    """`(student Side, teacher Side, Settings, checks)` of each pair: the checkpoints, then random weights in each shape.

    Raises:
        ConfigError: a STUDENT that is none. EvaluationError: settings or a shape that cannot be used.
    """
    from transformers import AutoConfig

    from xlstm_hybrid.efficiency import Settings, Side
    from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError

    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise EvaluationError(f"--shapes {','.join(unknown)}: expected some of {', '.join(SHAPES)}, or none")
    try:
        kind = AutoConfig.from_pretrained(student).model_type
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(student).name}: no configuration ({error}); expected a checkpoint directory or hub id") from error
    if kind != "xlstm_hybrid":
        raise ConfigError(f"{Path(student).name}: a {kind} model, expected xlstm_hybrid as STUDENT; TEACHER comes first")

    def settings(default):
        return Settings(**{name: default.get(name) if value is None else value for name, value in asked.items()}, cache=cache)

    sides = [Side(Path(path).resolve().name, partial(load_checkpoint, path, dtype, device)) for path in (student, teacher)]
    plans = [(*sides, settings(SMALL), partial(checks, cache=cache))]
    for shape in shapes:
        sides = [Side(f"{shape} {role}, random weights", partial(random_model, shape, role, dtype, device)) for role in ("student", "teacher")]
        proof = partial(random_model, shape, "student", dtype, device, layers=2)
        plans.append((*sides, settings(LONG), partial(checks, cache=cache, proof=proof)))
    return plans


def efficiency(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    student: Annotated[str, typer.Argument(help="Student: checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for efficiency.json, .md and pictures.")],
    lengths: Annotated[str | None, typer.Option(help="Tokens of the prompts, such as 1024,4096,16384.")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows at once, such as 1,8.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Further lengths, for decoding and memory only.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Random weights as well: llama-3.1-8b, qwen2.5-7b, or none; both on a GPU, none on a CPU by default.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of both models; bfloat16 on a GPU and float32 on a CPU by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one by default.")] = None,
    cache: Annotated[str, typer.Option(help="dynamic, as generate has it, or static, allocated at its full length.")] = "dynamic",
    rounds: Annotated[int, typer.Option(help="Rounds in which teacher and student take turns.")] = 5,
    steps: Annotated[int, typer.Option(help="Tokens decoded per round.")] = 8,
    pictures: Annotated[bool, typer.Option(help="Draw pictures; they need matplotlib.")] = True,
):
    """Measure STUDENT beside TEACHER: time to first token, decoding, peak memory, cache, energy. Nothing is measured if a check fails."""
    import torch
    from rich.console import Console

    from xlstm_hybrid.efficiency import measure
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.report import as_png
    from xlstm_hybrid.verbs.compare import show
    from xlstm_hybrid.verify import DTYPES

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch finds no GPU; use --device cpu, or install torch for CUDA and its driver")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    chosen = [name for name in (",".join(SHAPES if on_gpu else ()) if shapes is None else shapes).split(",") if name not in ("", "none")]
    asked = {name: numbers(text, name) for name, text in (("lengths", lengths), ("batches", batches), ("contexts", contexts))}
    plans = plans_of(teacher, student, chosen, dtype, device, cache, asked | {"rounds": rounds, "steps": steps})
    console = Console(width=None if Console().is_terminal else 120, emoji=False, highlight=False)
    results, images = surroundings(torch.device(device)) | {"pairs": []}, {}
    for j, (*sides, settings, proofs) in enumerate(plans):
        with Console(stderr=True).status("loading") as status:
            pair = measure(*sides, settings, proofs, report=status.update)
        results["pairs"].append(pair)
        if pictures and (image := as_png(picture, pair)):
            images[picture_name(j)] = image
        files = write_efficiency(results, out, images)  # after each pair: a long run leaves what it has
        for title, rows in tables(pair):
            show(console, "title", title)
            show(console, "table", rows)
        show(console, "list", notes(pair))
    console.print(f"wrote {', '.join(files)}", markup=False, soft_wrap=True)


VERBS = [efficiency]
