"""What a user feels: a student beside its teacher, from the first token. `python benchmarks/model.py --help`.

    python benchmarks/model.py --out model.json --picture model.png          random weights in SmolLM2-135M's shape
    python benchmarks/model.py --student STUDENT --teacher TEACHER --parts prefill,decode --contexts 128,512

Parts: `prefill` (a prompt in one call, to its first logits), `decode` (tokens after a prompt, with each cache),
`cache` (its bytes), `calls` (operations that torch dispatches per decoded token and layer: no clock is needed to see them
grow), `training` (a step of stage I and of stage II, forward, backward and optimiser, over one forward of the teacher, and
the peak of memory in a process of its own).

Nothing is measured before cached and uncached logits of both models agree, with every cache and dtype that is asked for.
Teacher and student take turns and a gain is the median of the rounds' ratios, teacher over student: above 1 the student is
quicker. `--clock cpu` counts the process's CPU seconds, which other work on the machine disturbs least, over all threads;
`--clock wall` counts what a user waits for, and is what tells about more than one thread.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import transformers
from gpu import commit_of
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_hybrid.checkpoint.files import markdown_table, write_file, write_json
from xlstm_hybrid.errors import XLSTMHybridError
from xlstm_hybrid.evaluation.efficiency import (
    SIDES,
    Meter,
    Peak,
    Settings,
    about,
    apart,
    checked,
    decoder,
    filled,
    first_token,
    medians_and_gain,
    new_cache,
    next_tokens,
    take_turns,
    token_rows,
)
from xlstm_hybrid.evaluation.efficiency_checks import decoding_difference, load_checkpoint
from xlstm_hybrid.evaluation.efficiency_pairs import FIELDS, SHAPES, random_model
from xlstm_hybrid.evaluation.equivalence import DTYPES, Result
from xlstm_hybrid.model import linear
from xlstm_hybrid.model.generation_checks import bound_of
from xlstm_hybrid.planning.cache_size import allocated_bytes
from xlstm_hybrid.reports.efficiency import machine_and_versions
from xlstm_hybrid.reports.plots import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, as_png, figure

ROPE = {"rope_type": "default", "rope_theta": 1e5}
SMALL = {  # values of FIELDS; the models' words are theirs, whatever the longest context is
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 1e-5, ROPE),
    "tiny": (128, 32, 48, 2, 4, 2, 1e-5, ROPE),
}
for name, values in SMALL.items():
    SHAPES[name] = ("llama", dict(zip(FIELDS, values, strict=True)) | {"max_position_embeddings": 8192})
PARTS = ("prefill", "decode", "cache", "calls", "training")
STAGES = ("align", "distill")
BYTES_AT = (30, 300, 3000)  # tokens whose cache is counted
CPU = torch.device("cpu")


# --- the pair ------------------------------------------------------------------------------------------------------


def load(role, args, dtype):
    """A model for inference; importable, so that another process can load it, too."""
    if args.student:
        return load_checkpoint(str(getattr(args, role)), dtype, args.device)
    return random_model(args.shape, role, dtype, args.device, args.layers, sliding_window=args.window)


def gate(args, student, teacher):
    """For `efficiency.checked`: a prompt and steps after it against one call without a cache."""
    for name, model in (("teacher", teacher), ("student", student)):
        for cache in args.caches:
            difference = decoding_difference(model, cache, length=args.check)
            allowed = bound_of(model)
            words = f"{name}: prompt and steps = one call, {cache} cache"
            yield Result(words, difference, allowed, str(model.dtype).removeprefix("torch."), 0.0)


def measured(runs, args, tokens):
    """Medians of each side and the gain, see `efficiency.medians_and_gain`."""
    costs, absent = take_turns(dict(runs), args.rounds, Meter(torch.device(args.device), wall=args.clock == "wall"))
    return medians_and_gain(costs, tokens, per_second=False) | ({"absent": absent} if absent else {})


# --- reading and writing -------------------------------------------------------------------------------------------


def prefill(models, args):
    """A prompt [B, L] in one call; the head reads its last position, as in `generate`."""
    for B, L in product(args.batches, args.contexts):
        ids = token_rows(Settings(), L, B, models["student"].config.vocab_size, models["student"].device)

        def read(model, ids=ids, L=L):
            first_token(model, ids, new_cache(model, "dynamic", L))

        runs = {side: partial(read, model) for side, model in models.items()}
        yield {"batch": B, "tokens": L} | measured(runs, args, B * L)


def decode(models, args):
    """`--steps` tokens after a context of L, with each cache."""
    for B, L, cache in product(args.batches, args.contexts, args.caches):
        settings = Settings(rounds=args.rounds, steps=args.steps, cache=cache)
        ids = token_rows(settings, L, B, models["student"].config.vocab_size, models["student"].device)
        runs = {side: decoder(model, ids, settings) for side, model in models.items()}
        yield {"batch": B, "tokens": L, "cache": cache} | measured(runs, args, B * args.steps)


def cache(models, args):
    """Bytes that a dynamic cache keeps alive after L tokens of one row."""
    for L in BYTES_AT:
        ids = token_rows(Settings(), L, 1, models["student"].config.vocab_size, models["student"].device)
        held = {side: allocated_bytes(filled(model, ids, "dynamic", 1)[0]) for side, model in models.items()}
        yield {"tokens": L, **held, "gain": held["teacher"] / held["student"]}


class Calls(TorchDispatchMode):
    """Counts the operations that torch dispatches, a custom one as one. A student goes on as if nobody counted: modes are
    shown torch's operations otherwise.
    """

    def __init__(self):
        super().__init__()
        self.count, self.unwatched = 0, mock.patch.object(linear, "watched", lambda: False)

    def __enter__(self):
        self.unwatched.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.unwatched.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def calls(models, args):
    """Per decoded token and layer, embeddings and head included; after a context that is longer than the window."""
    layers = models["student"].config.num_hidden_layers
    for name in args.caches:
        row = {"cache": name}
        for side, model in models.items():
            ids = token_rows(Settings(), args.check, 1, model.config.vocab_size, model.device)
            held, token = filled(model, ids, name, 2)
            token = next_tokens(model, token, held, 1)
            with Calls() as counted:
                next_tokens(model, token, held, 1)
            row[side] = counted.count / layers
        yield row | {"gain": row["teacher"] / row["student"]}


# --- training ------------------------------------------------------------------------------------------------------


def stepper(stage, student, teacher, L, folder, bf16):
    """A function that runs one step of a stage, as its trainer does: forward, backward and the optimiser's update."""
    from datasets import Dataset

    from xlstm_hybrid.data import collate
    from xlstm_hybrid.pipeline.speed import no_tokenizer
    from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer
    from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

    V, cpu = student.config.vocab_size, student.device.type == "cpu"
    ids = token_rows(Settings(), L, 1, V, CPU)[0].tolist()
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]], "position_ids": list(range(L))}])
    shared = {"data_collator": collate, "processing_class": no_tokenizer(V), "train_dataset": rows}
    fixed = {"output_dir": folder, "max_steps": 1, "report_to": "none", "use_cpu": cpu, "bf16": bf16, "max_length": L}
    fixed |= {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "disable_tqdm": True}
    if stage == "align":
        trainer = AlignmentTrainer(student, AlignmentConfig(**fixed), **shared)
    else:
        student.requires_grad_(True)
        trainer = SparseKDTrainer(student, teacher, args=SparseKDConfig(**fixed, top_k=min(256, V)), **shared)
    optimiser, (batch,) = trainer.create_optimizer(), trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = 1
    items = trainer._get_num_items_in_batch([batch], student.device)

    def step():
        trainer.training_step(trainer.model, dict(batch), items)
        optimiser.step()
        optimiser.zero_grad()

    return step


def train_peak(stage, args, dtype, L):
    """Bytes of a stage's second step beyond the weights and what its first step leaves; to be called in a fresh
    process.
    """
    transformers.utils.logging.set_verbosity_error()
    models = {role: load(role, args, dtype) for role in SIDES}
    peak = Peak(models["student"].device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        step = stepper(stage, models["student"], models["teacher"], L, folder, args.autocast)
        step()
        first = peak.read()
        peak.restart()
        step()
        return {"first": first, "step": peak.read()}


def training(models, args):
    """A step of each stage over one forward of the teacher, whose logits are made for every position."""
    dtype = str(models["student"].dtype).removeprefix("torch.")
    for stage, L in product(STAGES, args.training):
        if dtype != "float32":
            continue  # weights are float32 in training; `--autocast` is how bfloat16 comes in
        ids = token_rows(Settings(), L, 1, models["student"].config.vocab_size, models["student"].device)

        def forward(ids=ids):
            with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=args.autocast):
                models["teacher"](input_ids=ids, use_cache=False)

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"), torch.enable_grad():
            step = stepper(stage, models["student"], models["teacher"], L, folder, args.autocast)
            row = {"stage": stage, "tokens": L} | measured({"teacher": forward, "student": step}, args, L)
            del step
        models["student"].eval().requires_grad_(False)
        if all(side in row for side in SIDES):  # neither ran out of memory
            rounds = zip(*(row[side]["rounds"] for side in ("student", "teacher")), strict=True)
            row["multiple"] = statistics.median(s / t for s, t in rounds)
        if not args.no_memory:
            row["peak_bytes"] = apart(train_peak, stage, args, dtype, L)
        gc.collect()
        yield row


# --- results -------------------------------------------------------------------------------------------------------


def table(results):
    """[part, dtype, threads, batch, tokens, what, teacher, student, gain], header first."""
    rows = [["part", "dtype", "threads", "batch", "tokens", "of", "teacher", "student", "gain"]]
    for row in results["rows"]:
        part, what = row["part"], row.get("cache", row.get("stage", ""))
        if part in ("cache", "calls"):
            unit, factor = ("MiB", 2**-20) if part == "cache" else ("", 1)
            values = [f"{row[side] * factor:.3g} {unit}".strip() for side in SIDES]
        else:
            per = 1e3 / (results["settings"]["steps"] if part == "decode" else 1)
            values = [f"{row[side]['seconds'] * per:.4g} ms" if side in row else "–" for side in SIDES]
        gain = row["gain"]["seconds"] if isinstance(row.get("gain"), dict) else row.get("gain")
        last = f"{row['multiple']:.2f} forwards" if "multiple" in row else "–" if gain is None else f"{gain:.2f}"
        what += f", {row['peak_bytes']['step'] / 2**20:.0f} MiB" if (row.get("peak_bytes") or {}).get("step") else ""
        rows.append(
            [part, row["dtype"], row["threads"], row.get("batch", 1), row.get("tokens", ""), what, *values, last]
        )
    return rows


COLOURS = BLUE, ORANGE, GREEN, PURPLE, SKY


def gains(rows, part):
    """{dtype, threads, batch and cache: [(tokens, gain)]} of a part."""
    lines = {}
    for row in (row for row in rows if row["part"] == part and "gain" in row):
        name = f"{row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, batch {row['batch']}"
        name += f", {row['cache']}" if "cache" in row else ""
        lines.setdefault(name, []).append((row["tokens"], row["gain"]["seconds"]))
    return lines


def draw(results, before=None):
    """The student's gain against the context, prompts and decoding; one line per dtype, threads, batch and cache, and a
    dotted one for results of `before`.
    """
    kinds = {"prefill": "Reading a prompt", "decode": "Decoding"}
    kinds = {part: title for part, title in kinds.items() if any(row["part"] == part for row in results["rows"])}
    if not kinds:
        return None
    picture, panels = figure(columns=len(kinds), width=4.8 * len(kinds), height=3.6)
    for axes, (part, title) in zip(panels, kinds.items(), strict=True):
        lines, earlier = (gains(x["rows"] if x else [], part) for x in (results, before))
        colours = dict(zip([*lines, *(name for name in earlier if name not in lines)], COLOURS, strict=False))
        for points_of, style, when in ((lines, "-", ""), (earlier, ":", ", before")):
            for name in (name for name in points_of if name in colours):
                points = zip(*sorted(points_of[name]), strict=True)
                axes.plot(*points, marker="o", linestyle=style, color=colours[name], label=name + when)
        axes.axhline(1, color=INK, linestyle="--", linewidth=1)
        lengths = sorted({L for points in (*lines.values(), *earlier.values()) for L, _ in points})
        axes.set(xscale="log", xlabel="tokens of context", ylabel="teacher's time over the student's", title=title)
        axes.set_xticks(lengths, [f"{L:,}" for L in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    return picture


@torch.no_grad()
def run(args, say=print):
    """All parts; the results as they are written, after every row into `--out`."""
    results = machine_and_versions(torch.device(args.device)) | {"commit": commit_of(), "checks": [], "rows": []}
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results |= {"settings": chosen}
    for dtype, threads in product(args.dtypes, args.threads):
        torch.set_num_threads(threads)
        models = {role: load(role, args, dtype) for role in SIDES}
        results |= {side: about(model) for side, model in models.items()}
        results["checks"] += checked(models, lambda student, teacher: gate(args, student, teacher))
        for part in args.parts:
            if part in ("cache", "calls") and threads != args.threads[0]:
                continue
            for row in globals()[part](models, args):
                results["rows"].append({"part": part, "dtype": dtype, "threads": threads} | row)
                say("  ".join(map(str, table(results)[-1])))
                if args.out:
                    write_json(args.out, results)
        del models
        gc.collect()
    return results


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    numbers = lambda text: [int(part) for part in names(text)]  # noqa: E731
    add = parser.add_argument
    add("--shape", default="smollm2-135m", help=f"random weights: one of {', '.join(SHAPES)}")
    add("--layers", type=int, help="of a shape: fewer than it has")
    add("--window", type=int, default=256, help="of a shape's student")
    add("--student", help="checkpoint, instead of a shape; with --teacher")
    add("--teacher", help="its teacher's checkpoint")
    add("--parts", type=names, default=list(PARTS), help=f"some of {', '.join(PARTS)}")
    add("--contexts", type=numbers, default=[128, 512, 2048, 7000], help="tokens before prefill's end and decode")
    add("--batches", type=numbers, default=[1, 8])
    add("--caches", type=names, default=["dynamic", "static"])
    add("--dtypes", type=names, default=["float32", "bfloat16"])
    add("--threads", type=numbers, default=[1, 2])
    add("--training", type=numbers, default=[512, 2048], help="tokens of a training step")
    add("--autocast", action="store_true", help="bfloat16 autocast in training, teacher's forward included")
    add("--no-memory", action="store_true", help="leave out the peaks of training, for which models load anew")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=8, help="tokens decoded per round")
    add("--check", type=int, default=300, help="tokens of the check before any figure, and before `calls`")
    add("--clock", choices=("cpu", "wall"), default="cpu")
    add("--device", default="cpu")
    add("--out", type=Path, help="JSON file")
    add("--picture", type=Path, help="PNG file")
    add("--before", type=Path, help="JSON file of an earlier run, drawn beside this one")
    args = parser.parse_args(words)
    for name, known in (("parts", PARTS), ("caches", ("dynamic", "static")), ("dtypes", DTYPES)):
        if wrong := [part for part in getattr(args, name) if part not in known] or not getattr(args, name):
            parser.error(f"--{name}: {wrong}, expected some of {', '.join(known)}")
    if args.shape not in SHAPES:
        parser.error(f"--shape {args.shape}: expected one of {', '.join(SHAPES)}")
    if args.before and not args.before.is_file():
        parser.error(f"--before {args.before}: no such file; expected what --out wrote in an earlier run")
    if bool(args.student) != bool(args.teacher):
        parser.error("--student and --teacher: expected both checkpoints, or neither for a shape")
    positive = [*args.contexts, *args.batches, *args.threads, *args.training, args.rounds, args.steps, args.check]
    if min(positive) < 1:
        parser.error("contexts, batches, threads, training, rounds, steps and check: expected at least 1 of each")
    return args


def main(words=None):
    args = arguments(words)
    transformers.utils.logging.set_verbosity_error()
    before = torch.get_num_threads()
    try:
        results = run(args)
    except XLSTMHybridError as error:
        sys.exit(f"error: {error}")
    finally:
        torch.set_num_threads(before)
    print("\n" + markdown_table(table(results)))
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else None
    if args.picture and (image := as_png(partial(draw, before=before), results)):
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.picture, image)


if __name__ == "__main__":
    main()
