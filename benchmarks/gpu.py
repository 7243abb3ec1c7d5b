"""What a GPU shows in eight minutes: kernels, speed beside a teacher, and a small real model through every stage.

    python benchmarks/gpu.py --out OUT --teacher SmolLM2.gguf --text peps.jsonl.xz --questions questions.jsonl.xz
    python benchmarks/gpu.py --out OUT --join part.aa part.ab --digest SHA256 ...    a teacher that came in pieces
    python benchmarks/gpu.py --out OUT --tiny --teacher recipes/tiny_teacher/tiny-llama ...   the same on a CPU, tiny

Parts run one after the other, each within its own seconds. What no longer fits into --minutes is left out and said so, and
so is what a failed part was needed for: no speed is measured where a kernel gave wrong results. Every part is written when
it ends (OUT/parts, OUT/gpu.json); the same command goes on with those that are missing. Parts run in a process beside
this one, which is ended when a part overruns, and replaced after a failure. OUT/students are the students in bfloat16; what
is large lies in --work.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels")]  # of this working copy, whatever else is installed
LENGTHS = (512, 1024, 2048, 4096, 8192)  # of the needles, tokens
PROBE = 6  # steps from which the speed of a stage is measured
SPENT = 0.8  # share of a stage's seconds that its training is planned for
GRACE = 10  # seconds that a part may overrun before its process is ended
EXPERT = "text"
DONE, FAILED, SKIPPED, OVERRUN = "done", "failed", "left out", "out of time"


class Part(NamedTuple):
    """run: function of a `Job`, returning what is to be kept, with a line for the table under "summary".
    most, least: seconds that it is given, and below which it is not begun.
    needs: parts that have to be done before.  wants: arguments without which it is left out.
    """

    name: str
    run: Callable
    most: float
    least: float
    needs: tuple = ()
    wants: tuple = ()


@dataclass
class Job:
    """What a part is told. file: of its results.  seconds: that it is given, from `begin` on."""

    args: argparse.Namespace
    file: Path
    seconds: float
    begin: float = 0.0

    @property
    def left(self):
        return self.seconds - (time.monotonic() - self.begin)

    @property
    def device(self):
        import torch

        return torch.device("cuda" if torch.cuda.is_available() and not self.args.tiny else "cpu")

    @property
    def dtype(self):
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def keep(self, result):
        """Write what there is so far: it stays if the part is ended."""
        written(self.file, {"state": OVERRUN, "result": result})

    def say(self, line):
        print(f"    {line}", flush=True)


def written(file, value):
    from xlstm_hybrid.checkpoint.files import write_json

    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def read(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# --- machine and kernels -------------------------------------------------------------------------------------------


def machine(job):
    """Machine, versions, commit, and what `xlstm-hybrid doctor` finds."""
    from xlstm_hybrid.doctor import diagnose
    from xlstm_hybrid.reports.efficiency import machine_and_versions

    found = machine_and_versions(job.device)
    found["versions"] |= {name: installed(name) for name in ("triton", "trl", "lm_eval", "flash-linear-attention")}
    if job.device.type == "cuda":
        ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError):
            found["machine"]["driver"] = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    found["doctor"] = {section: [row._asdict() for row in rows] for section, rows in diagnose().items()}
    name = found["machine"].get("gpu") or f"no GPU: {found['machine']['cpu']}"
    return found | {"summary": f"{name}, torch {found['versions']['torch']}"}


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def kernel_cases():
    """`(Kernel, dims)` of every Triton kernel at the head dims of real models."""
    from xlstm_kernels.head_loss.op import KERNEL as LOSS
    from xlstm_kernels.mlstm.op import KERNEL as MLSTM
    from xlstm_kernels.slstm.op import KERNEL as SLSTM
    from xlstm_kernels.step.op import KERNEL as STEP
    from xlstm_kernels.window.op import KERNEL as WINDOW

    heads = [(kernel, {"K": d, "V": d}) for kernel in (MLSTM, WINDOW) for d in (64, 128)]
    steps = [(STEP, {"K": d, "V": d, "F": d}) for d in (64, 128)]
    return [*heads, *steps, (LOSS, {"M": 256}), (SLSTM, {"V": 64})]


def kernel_checks(job):
    """Every Triton kernel against its plain form in float64, on the small problem that decides whether it is used."""
    import torch
    from xlstm_kernels.backends.verified import verdict_of

    if job.device.type != "cuda":
        return {"summary": "no GPU: the torch forms run, there is no kernel to check"}
    found = {}
    for kernel, dims in kernel_cases():
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{kernel.name}, {', '.join(f'{k} {v}' for k, v in dims.items())}, {str(dtype)[len('torch.') :]}"
            found[name] = verdict_of(kernel.check, job.device, dtype, dims)
            job.keep(found)
    if wrong := [name for name, verdict in found.items() if not verdict["right"]]:
        raise RuntimeError(f"{len(wrong)} of {len(found)} kernels are wrong on this machine: {'; '.join(wrong)}")
    return found | {"summary": f"{len(found)} kernels right"}


def bench_settings(job):
    """`kernels/bench.py`, set to this machine, and `(head dims, T of the parity, lengths, contexts)`."""
    import bench

    bench.HERE = bench.SETTINGS[job.device.type]
    if job.args.tiny:
        bench.HERE = bench.HERE._replace(B=1, H=2)
        return bench, ((16,), 96, (64,), (64,))
    return bench, ((64, 128), 2048, (8192, 2048), (8192, 32768))


def kernel_parity(job):
    """Outputs, gradients and single steps at the shapes of the benchmark against the plain definitions in float64."""
    import torch

    bench, (dims, T, _, _) = bench_settings(job)
    dtypes = {torch.bfloat16: 3e-2, torch.float32: 1e-4} if job.device.type == "cuda" else {torch.float32: 3e-5}
    found, here = {}, bench.HERE
    for dtype, tolerance in dtypes.items():
        bench.HERE = here._replace(dtype=dtype, tolerance=tolerance)
        for d in dims:
            found[f"d {d}, {str(dtype)[len('torch.') :]}"] = bench.check(d, T)
            job.keep(found)
    worst = max(error for errors in found.values() for error in errors.values())
    return found | {"summary": f"largest error against float64 {worst:.1e}"}


def kernel_bench(job):
    """The kernels beside SDPA and what else is installed, the longest and widest first; see `kernels/bench.py`."""
    bench, (dims, _, lengths, contexts) = bench_settings(job)
    result, skip = bench.surroundings() | {"rows": [], "absent": {}}, ["sdpa math", "flex"]
    seconds, absent, calls, least = 0.1 if job.args.tiny else 2, result["absent"], [], 0.0
    for d in reversed(dims):
        calls += [(bench.bench_sequence, (T, d, seconds, skip, absent)) for T in lengths]
        calls += [(bench.bench_decode, (N, d, seconds, skip)) for N in contexts]
    if job.device.type == "cuda":  # last, since FlexAttention compiles for half a minute
        others = [name for name in bench.SEQUENCE if name not in ("sdpa", "window", "flex")]
        calls.append((bench.bench_sequence, (lengths[0], dims[-1], seconds, others, absent)))
    for run, settings in calls:
        if job.left < least:
            absent[f"{run.__name__}, T {settings[0]}, d {settings[1]}"] = "no time was left"
            continue
        begin = time.monotonic()
        for row in run(*settings):
            result["rows"].append(row)
            bench.show(row)
        least = max(least, time.monotonic() - begin)
        result["targets"] = bench.verdicts(result["rows"])
        job.keep(result)
    met = sum(t["met"] for t in result["targets"])
    return result | {"summary": f"{len(result['rows'])} rows, {met} of {len(result['targets'])} targets met"}


# --- random weights in published shapes ----------------------------------------------------------------------------


def shape(name, job):
    """Prompts and decoding of a student with random weights beside its teacher, checks first."""
    from xlstm_hybrid.evaluation import efficiency_pairs
    from xlstm_hybrid.evaluation.efficiency import Settings, measure_pair

    if job.args.tiny:
        name, settings = "tiny", Settings(lengths=(64,), contexts=(96,), rounds=1, steps=2)
        small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
        efficiency_pairs.SHAPES["tiny"] = ("llama", small)
    else:
        settings = Settings(lengths=(16384, 65536), contexts=(131072,), rounds=2)
    plan = efficiency_pairs.shape_pair(name, job.dtype, job.device.type, settings)
    pair = measure_pair(*plan, report=job.say, memory=False, keep=lambda pair: job.keep(pair))
    told = [
        f"{row['length'] // 1024 or row['length']}{'k' * (row['length'] >= 1024)} {what} {row[part]['gain'][key]:.2f}x"
        for row in pair["rows"]
        for what, part, key in (("read", "prefill", "seconds"), ("decode", "decode", "tokens_per_second"))
        if "gain" in row.get(part, {})
    ]
    return pair | {"summary": f"{len(pair['checks'])} checks; {', '.join(told)}"}


# --- a real model through the stages -------------------------------------------------------------------------------


def join(parts, digest, out):
    """Put the pieces of a file together in `out`, if its SHA-256 is the one that was named.

    Raises:
        CheckpointError: another digest; nothing is left of the file.
    """
    from xlstm_hybrid.checkpoint.files import staged_file
    from xlstm_hybrid.errors import CheckpointError

    out.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(out) as place:
        found = hashlib.sha256()
        with open(place, "wb") as whole:
            for part in parts:
                content = Path(part).read_bytes()
                found.update(content)
                whole.write(content)
        if found.hexdigest() != digest.lower():
            names = ", ".join(Path(part).name for part in parts)
            raise CheckpointError(
                f"{names}: joined, their SHA-256 is {found.hexdigest()}, expected {digest}; name all parts, in order, or copy them again"
            )
    return out


def teacher_of(job):
    """The directory of the teacher, made of what --teacher or --join name."""
    return job.args.work / "teacher"


def teacher(job):
    """A directory of the teacher, which every stage reads."""
    from xlstm_hybrid.checkpoint.files import staged
    from xlstm_hybrid.conversion.load import load

    source = job.args.teacher
    if job.args.join:
        source = join(job.args.join, job.args.digest, job.args.work / "teacher.gguf")
    model, tokenizer = load(source)
    with staged(teacher_of(job), overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    return {"name": Path(source).name, "parameters": count, "summary": f"{Path(source).name}, {count:,} parameters"}


def answers(job):
    """The teacher's greedy answers to the questions, batch by batch, as far as the time goes. Those without an end are
    left out.
    """
    import torch

    from xlstm_hybrid.checkpoint.files import write_file
    from xlstm_hybrid.conversion.load import load
    from xlstm_hybrid.data.documents import render
    from xlstm_hybrid.evaluation.scores import continuations, end_tokens, evaluating

    model, tokenizer = load(teacher_of(job), job.dtype, device=job.device)
    questions, file = questions_of(job), job.args.work / "answers.jsonl"
    size, room = (4, 24) if job.args.tiny else (512, 320)
    known, slowest = read(job.file).get("result", {}), 0.0  # of a call that was ended
    asked = known.get("questions", 0)
    lines = file.read_text(encoding="utf-8").splitlines() if asked else []
    rows = [json.loads(line) for line in lines]
    for first in range(asked, len(questions), size):
        if job.left < 1.2 * slowest + 5 * (not job.args.tiny):
            break
        begin, batch = time.monotonic(), questions[first : first + size]
        messages = [[{"role": "user", "content": question}] for question in batch]
        prompts = [render(tokenizer, message, add_generation_prompt=True) for message in messages]
        with torch.inference_mode(), evaluating(model, tokenizer):
            found = continuations(model, prompts, end_tokens(model, tokenizer), room)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        for question, ids, text in zip(batch, found, texts, strict=True):
            if 0 < len(ids) < room and text.strip():
                rows.append({"prompt": question, "completion": text.strip()})
        asked, slowest = asked + len(batch), max(slowest, time.monotonic() - begin)
        write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        job.keep({"questions": asked})
    found = {"questions": asked, "of": len(questions), "answers": len(rows)}
    return found | {"summary": f"{len(rows)} answers to {asked} of {len(questions)} questions"}


def questions_of(job):
    """The column `prompt` of the file of questions, in an order of a fixed seed."""
    from xlstm_hybrid.data.streams import open_source
    from xlstm_hybrid.recipe.schema import Source

    source = Source(path=str(Path(job.args.questions).resolve()), text="prompt")
    rows = open_source(source, argparse.Namespace(path=Path(job.args.questions)))["prompt"]
    return [row for row in rows if row.strip()][: 8 if job.args.tiny else None]


def recipe_of(job, **sections):
    """The recipe of this run, OUT/recipe.yaml: the student and stages of --recipe, the text and answers at hand. Its steps
    are those that were chosen, and `sections` go before them.
    """
    import yaml

    from xlstm_hybrid.checkpoint.files import write_file
    from xlstm_hybrid.recipe.schema import load_recipe

    args, file = job.args, job.args.out / "recipe.yaml"
    base, chosen = load_recipe(args.recipe), read(args.work / "steps.json")
    sources = {"text": {"path": str(Path(args.text).resolve()), "text": "text"}}
    own = (args.work / "answers.jsonl").resolve()
    if own.is_file() and own.stat().st_size:
        sources |= {"answers": {"path": str(own), "prompt": "prompt", "completion": "completion"}}
    sources = {name: source | {"weight": 0.75 if name == "text" else 0.25} for name, source in sources.items()}
    content = {
        "name": "gpu",
        "teacher": str(teacher_of(job).resolve()),
        "teacher_dtype": base.teacher_dtype,
        "out": str((args.work / "run").resolve()),
        "seed": base.seed,
        "student": base.student,
        "data": {"sequence_length": base.length, "held_out": 0.3 if args.tiny else 0.02, "sources": sources},
        "align": base.align | chosen.get("align", {}),
        "distill": base.distill | chosen.get("distill", {}),
        "experts": {EXPERT: {"sources": sources}},
        "evaluate": {"documents": 2 if args.tiny else 64, "batch_size": 8},
    }
    if base.calibrate is not None:
        content["calibrate"] = base.calibrate
    write_file(file, yaml.safe_dump(content | sections, sort_keys=False).encode())
    return load_recipe(file)


def run_of(job):
    from rich.console import Console

    from xlstm_hybrid.pipeline import Run

    recipe = recipe_of(job)
    return Run(recipe, out=recipe.out, redo=True, console=Console(emoji=False, width=120))


def stage(name, job):
    """A stage of the recipe up to the student, and those before it that are not there."""
    run = run_of(job)
    if not run.named(name):
        return {"summary": f"the recipes of this version have no stage {name}"}
    order = [s.name for s in run.training]
    run.make(*run.named(*order[: order.index(name) + 1]))
    return {"seconds": run.seconds[name], "summary": f"{run.seconds[name]:.0f} s"}


def training(name, section, job):
    """A training stage of as many steps as the time allows at the speed that a few of them were measured at."""
    from xlstm_hybrid.checkpoint.files import read_provenance

    run = run_of(job)
    order = [s.name for s in run.training]
    before = run.named(*order[: order.index(name)])
    run.make(*before)
    plan = read(job.args.work / "steps.json")
    if section not in plan:
        plan |= {section: chosen_steps(job, run, section, run.path(before[-1]))}
        written(job.args.work / "steps.json", plan)
    measured = read(job.args.work / f"speed-{section}.json")
    job.keep(measured)
    found = stage(name, job)
    folder = run.path(run.named(name)[0])
    figures = next(s for s in reversed(read_provenance(folder)) if s["stage"] == name)["figures"]
    tokens = plan[section]["max_steps"] * measured["tokens_per_step"]
    text = f"{tokens:,} tokens, {measured['tokens_per_second']:,.0f} tokens/s"
    if errors := figures.get("relative_error"):
        sides = [statistics.mean(layer[side] for layer in errors) for side in ("before", "after")]
        text += f"; mean relative error {sides[0]:.3f} -> {sides[1]:.3f}"
    text += f"; KL {figures['kl']:.3f}" if "kl" in figures else ""
    return found | measured | {"tokens": tokens, "figures": figures, "summary": text}


def chosen_steps(job, run, section, start):
    """`{"max_steps", "warmup_steps", "save_steps", ...}` of a stage, from the speed of `PROBE` steps and of packing rows.

    Raises:
        EvaluationError: the time does not suffice for a single step.
    """
    from xlstm_hybrid.conversion.load import load_tokenizer
    from xlstm_hybrid.data import packed_rows
    from xlstm_hybrid.errors import EvaluationError
    from xlstm_hybrid.pipeline import align, distill
    from xlstm_hybrid.pipeline.settings import batch_of

    recipe, scratch = run.recipe, job.args.work / "probe"
    settings = getattr(recipe, section)
    probe = {"max_steps": 2 if job.args.tiny else PROBE, "logging_steps": 1, "save_strategy": "no"}
    micro, accumulation = batch_of(settings, section)
    tokens = micro * accumulation * recipe.length
    begin = time.monotonic()
    if section == "align":
        align(start, scratch, recipe, overwrite=True, overrides=probe)
    else:
        distill(start, run.teacher, scratch, recipe, EXPERT, overwrite=True, overrides=probe)
    whole = time.monotonic() - begin
    log = json.loads((scratch / "training_log.json").read_text(encoding="utf-8"))
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    speed = statistics.median(speeds[1:] or speeds)  # the first step loads kernels
    begin, tokenizer = time.monotonic(), load_tokenizer(start)
    packed = 2 if job.args.tiny else 64
    packed_rows(recipe, tokenizer, packed, None if section == "align" else EXPERT)
    rows = packed * recipe.length / (time.monotonic() - begin)
    around = max(0.0, whole - probe["max_steps"] * tokens / speed)  # loading, measuring, writing
    seconds = SPENT * job.left - around
    steps = int(seconds / (tokens / speed + tokens / rows))
    if job.args.tiny:
        steps = min(max(1, steps), settings["max_steps"])
    if steps < 1:
        raise EvaluationError(
            f"{section}: {job.left:.0f} s are left, {around:.0f} s of them for what is around the training, and {tokens:,} tokens of a step take "
            f"{tokens / speed:.1f} s; raise --minutes, or take a smaller step in --recipe"
        )
    measured = {"tokens_per_second": speed, "rows_tokens_per_second": rows, "tokens_per_step": tokens}
    written(job.args.work / f"speed-{section}.json", measured | {"around_s": around, "steps": steps})
    job.say(f"{section}: {speed:,.0f} tokens/s, {steps} steps of {tokens:,} tokens")
    often = {"warmup_steps": max(1, steps // 20), "save_strategy": "steps", "save_steps": max(1, steps // 3)}
    return {"max_steps": steps, **often, "save_total_limit": 1}


def evaluation(job):
    """Perplexity of held-out documents, KL and top 1 beside the teacher, of every stage's student; checks first."""
    from xlstm_hybrid.pipeline.run import report_scores

    run, found = run_of(job), {}
    run.make(*run.training)
    for stage in run.evaluation_stages():
        if stage.name.partition(":")[0] in ("verify", "evaluate"):
            run.make(stage)
            found = report_scores(run.evaluations()) if "evaluate:teacher" in run.outcomes else {}
            job.keep(found)
    mean = lambda scores, kind: statistics.mean(scores[kind].values())  # noqa: E731
    told = [f"{n} KL {mean(s, 'kl'):.3f} top 1 {mean(s, 'top1'):.1%}" for n, s in found["students"].items()]
    return found | {"summary": "; ".join(told)}


def checkpoints(job):
    """OUT/students: those of both stages in bfloat16, half as large."""
    from xlstm_hybrid.checkpoint.files import staged, write_manifest
    from xlstm_hybrid.conversion.load import load

    run = run_of(job)
    for name in ("aligned", "student"):
        model, tokenizer = load(run.path(run.models[name]), "bfloat16", device="cpu")
        (job.args.out / "students").mkdir(exist_ok=True)
        with staged(job.args.out / "students" / name, overwrite=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_manifest(folder)
    return {"summary": "aligned and distilled, in bfloat16"}


def both_sides(job, units, name, **options):
    """`{side: {unit: results}}` of lm-eval on student and teacher, unit by unit, the student first."""
    from xlstm_hybrid.evaluation.harness import Options, run_harness

    run, found, slowest = run_of(job), {"student": {}, "teacher": {}}, 0.0
    models = {"student": run.path(run.models["student"]), "teacher": teacher_of(job)}
    for unit in units:
        if job.left < 2 * slowest:
            job.say(f"{unit.name}: no time was left")
            continue
        for side, model in models.items():
            begin, how = time.monotonic(), Options(name=side, dtype=job.dtype, device=str(job.device), **options)
            found[side] |= run_harness(model, [unit], job.args.out / name / side, how, job.say)
            slowest = max(slowest, time.monotonic() - begin)
        job.keep(found)
    return found


def needles(job):
    """A single needle at 512 to 8k tokens, student and teacher; window coverage beside it."""
    from xlstm_hybrid.evaluation.harness import expand

    lengths, samples = ((256,), 2) if job.args.tiny else (LENGTHS, 20)
    found = both_sides(job, expand(["needle"], lengths), "needles", samples=samples, depths=min(10, samples))
    told = [
        f"{unit} {result['long_context']['recall']:.2f} (teacher {found['teacher'][unit]['long_context']['recall']:.2f})"
        for unit, result in found["student"].items()
    ]
    return found | {"summary": ", ".join(told)}


def tasks(job):
    """The task files of --tasks, student and teacher, and C_0."""
    from xlstm_hybrid.evaluation.comparison import compare, plain_floats
    from xlstm_hybrid.evaluation.harness import expand
    from xlstm_hybrid.evaluation.results import read_results

    names = sorted(file.stem for file in Path(job.args.tasks).glob("*.yaml") if not file.stem.startswith("_"))
    limit = 2 if job.args.tiny else job.args.limit
    both_sides(job, expand(names), "tasks", include=Path(job.args.tasks).resolve(), limit=limit, batch_size=32)
    (its,), (mine,) = (read_results(job.args.out / "tasks" / side) for side in ("teacher", "student"))
    verdict = plain_floats(compare(its, [mine], alpha=0.0, tasks=[t for t in its.scores if t in mine.scores]))
    c_0 = verdict["students"]["student"]["c_0"]
    return verdict | {
        "summary": f"C_0 {'of none, no task counts' if c_0 is None else format(c_0, '.2f')} on {len(its.scores)} tasks"
    }


MODEL = ("text", "source")  # `source`: --teacher, or the pieces of --join
PARTS = [
    Part("machine", machine, 20, 2),
    Part("kernel checks", kernel_checks, 40, 5),
    Part("kernel parity", kernel_parity, 40, 10),
    Part("kernel bench", kernel_bench, 80, 15, needs=("kernel checks", "kernel parity")),
    Part("teacher", teacher, 20, 5, wants=("source",)),
    Part("answers", answers, 50, 15, needs=("teacher",), wants=("questions",)),
    Part("convert", partial(stage, "convert"), 15, 5, needs=("teacher",), wants=MODEL),
    Part("calibrate", partial(stage, "calibrate"), 20, 5, needs=("convert",), wants=MODEL),
    Part("align", partial(training, "align", "align"), 70, 25, needs=("convert",), wants=MODEL),
    Part("distill", partial(training, f"distill:{EXPERT}", "distill"), 110, 35, needs=("align",), wants=MODEL),
    Part("checkpoints", checkpoints, 20, 5, needs=("distill",), wants=MODEL),
    Part("evaluation", evaluation, 60, 15, needs=("distill",), wants=MODEL),
    Part("needles", needles, 45, 10, needs=("distill",), wants=MODEL),
    Part("tasks", tasks, 60, 15, needs=("distill",), wants=(*MODEL, "tasks")),
    Part("llama-3.1-8b", partial(shape, "llama-3.1-8b"), 80, 30, needs=("kernel checks", "kernel parity")),
    Part("qwen2.5-7b", partial(shape, "qwen2.5-7b"), 80, 30, needs=("kernel checks", "kernel parity")),
]

NAMES = [part.name for part in PARTS]


# --- parts, one after the other, until the time is up ----------------------------------------------------------------


def outcome(run, job):
    """What a part came to: its state, its result or the error by name, and its seconds."""
    job.begin = time.monotonic()
    try:
        found = {"state": DONE, "result": run(job)}
    except (Exception, SystemExit) as error:  # the other parts go on, whatever it was
        partly = read(job.file).get("result")
        where = traceback.format_exception(error)[-8:]
        found = {"state": FAILED, "error": f"{type(error).__name__}: {error}"[:2000], "trace": "".join(where)}
        found |= {"result": partly} if partly is not None else {}
    return found | {"seconds": round(time.monotonic() - job.begin, 1)}


def serve(pipe):
    """The process beside: parts come in, outcomes go out."""
    os.setsid()  # what a part starts is ended with it
    os.environ["TQDM_DISABLE"] = "1"
    while True:
        try:
            run, job = pipe.recv()
        except EOFError:
            return
        pipe.send(outcome(run, job))
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()


class Beside:
    """Parts in a process of their own, ended when one overruns. After a failure the next part has a new one: an error of
    the GPU spoils all that follows in the same process.
    """

    def __init__(self):
        self.process = None

    def __call__(self, run, job):
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,))
            self.process.start()
            theirs.close()
        begin = time.monotonic()
        self.pipe.send((run, job))
        found = {"state": OVERRUN, "error": f"ended after {job.seconds:.0f} s and {GRACE} more"}
        if self.pipe.poll(job.seconds + GRACE):
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join(5)
                found = {"state": FAILED, "error": f"its process ended by itself, exit code {self.process.exitcode}"}
        if found["state"] != DONE:
            self.close()
            partly = read(job.file).get("result")
            found = ({"result": partly} if partly is not None else {}) | found
        return {"seconds": round(time.monotonic() - begin, 1)} | found

    def close(self, wait=0):
        """End the process; one that has nothing to do may end by itself within `wait` seconds."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(wait)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.process = None


def run_parts(parts, args, launch, clock=time.monotonic):
    """Run what is missing of the parts within `args.minutes`; `{part: outcome}`, each written when it is there.

    A part is given what it may take at most, less where later parts could not begin otherwise.
    """
    folder, begin, commit = args.out / "parts", clock(), commit_of()
    files = {part.name: folder / f"{part.name.replace(' ', '-')}.json" for part in parts}
    earlier = [read(file) for file in sorted(folder.glob("*.json"))]
    found = {kept["part"]: kept for kept in earlier if kept["state"] == DONE}
    for j, part in enumerate(parts):
        if part.name in found:
            print(f"{part.name}: kept from an earlier run", flush=True)
            continue
        left = 60 * args.minutes - (clock() - begin)
        later = sum(p.least for p in parts[j + 1 :] if p.name not in found and all(getattr(args, w) for w in p.wants))
        seconds = max(min(part.most, left - later), min(part.least, left))
        absent = [f"--{w}".replace("--source", "--teacher or --join") for w in part.wants if not getattr(args, w)]
        wrong = [f"{n} ({found[n]['state']})" for n in part.needs if found.get(n, {}).get("state") != DONE]
        if absent:
            found[part.name] = {"state": SKIPPED, "error": f"without {', '.join(absent)}"}
        elif wrong:
            found[part.name] = {"state": SKIPPED, "error": f"it needs {', '.join(wrong)}"}
        elif left < part.least:
            reason = f"{max(0, left):.0f} s are left, it needs {part.least:.0f}; the same command goes on with it"
            found[part.name] = {"state": SKIPPED, "error": reason}
        else:
            print(f"{part.name}: up to {seconds:.0f} s", flush=True)
            found[part.name] = launch(part.run, Job(args, files[part.name], seconds))
        found[part.name] |= {"part": part.name, "commit": commit}
        written(files[part.name], found[part.name])
        found[part.name] = read(files[part.name])
        written(args.out / "gpu.json", {"settings": settings_of(args), "commit": commit, "parts": found})
        print(f"{part.name}: {told(found[part.name])}", flush=True)
    return found


def told(found):
    """An outcome in one line."""
    text = found.get("error") or (found.get("result") or {}).get("summary", "")
    return f"{found['state']}{': ' * bool(text)}{' '.join(text.split())}"


def commit_of():
    def git(*command):
        try:
            return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", "src", "kernels") else "")


def settings_of(args):
    """What results depend on, names of files without their folders."""
    files = {key: Path(value).name if (value := getattr(args, key)) else None for key in ("text", "questions", "tasks")}
    teacher = args.digest if args.join else Path(args.teacher).name if args.teacher else None
    return {"teacher": teacher} | files | {"tiny": args.tiny, "recipe": Path(args.recipe).name, "limit": args.limit}


def begin_in(args):
    """Raise ConfigError where OUT was begun with other settings, but for what was not named then."""
    from xlstm_hybrid.errors import ConfigError

    old, new = read(args.out / "gpu.json").get("settings", {}), settings_of(args)
    changed = [f"{key} was {old[key]!r}, is {new[key]!r}" for key in old if old[key] not in (None, new[key])]
    if changed:
        raise ConfigError(f"{args.out.name} was begun otherwise: {'; '.join(changed)}; name another --out")


def table(found):
    from xlstm_hybrid.reports.text import terminal_table

    rows = [["part", "state", "seconds", "what came out"]]
    for name, part in sorted(found.items(), key=lambda item: NAMES.index(item[0])):
        rows.append([name, part["state"], part.get("seconds", ""), told(part).partition(": ")[2]])
    return terminal_table(rows, "Parts")


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all results")
    add("--work", type=Path, help="folder for what is large: teacher, texts, students in float32; OUT/work by default")
    add("--minutes", type=float, default=8, help="of this call; the same command goes on where it ended")
    add("--teacher", help="directory or GGUF file of the small teacher; without it its parts are left out")
    add("--join", nargs="+", help="pieces of the teacher's GGUF file, in order, in the place of --teacher")
    add("--digest", help="SHA-256 of the joined file, as sha256sum prints it")
    add("--text", help="documents: JSON lines with a column `text`, .xz or .gz too")
    add("--questions", help="questions that the teacher answers: JSON lines with a column `prompt`")
    add("--tasks", help="folder of lm-eval task files to compare student and teacher on")
    add("--limit", type=int, default=200, help="documents per task")
    add("--recipe", help="student and stages; smollm2-135m by default, smoke with --tiny")
    add("--only", help="names of parts, separated by commas; all by default")
    add("--tiny", action="store_true", help="tiny sizes on the CPU: whether all of it runs, no figure worth keeping")
    args = parser.parse_args(words)
    if args.join and (not args.digest or args.teacher):
        parser.error("--join stands in the place of --teacher, and needs --digest: `sha256sum` of the whole file")
    args.only = args.only.split(",") if args.only else NAMES
    if unknown := sorted({*args.only} - {*NAMES}):
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(NAMES)}")
    args.recipe = args.recipe or ("smoke" if args.tiny else "smollm2-135m")
    args.work = args.work or args.out / "work"
    args.source = args.join or args.teacher
    return args


def main(words=None, launch=None):
    from rich.console import Console

    args = arguments(words)
    begin_in(args)
    beside = launch or Beside()
    try:
        found = run_parts([part for part in PARTS if part.name in args.only], args, beside)
    finally:
        if launch is None:
            beside.close(wait=3)
    Console(width=160, emoji=False).print(table(found))
    print(f"all of it: {args.out / 'gpu.json'}")
    return found


if __name__ == "__main__":
    main()
