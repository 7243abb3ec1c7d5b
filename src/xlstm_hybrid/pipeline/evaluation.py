"""What a run measures: scores of each model, lm-evaluation-harness on teacher and student, comparison and costs."""

import json
import os
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch

from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.data import collate, open_streams, packed_rows
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.data.long_context import KINDS
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.agreement import agreement
from xlstm_hybrid.evaluation.comparison import compare, plain_floats
from xlstm_hybrid.evaluation.efficiency import Settings
from xlstm_hybrid.evaluation.efficiency_checks import measure_checkpoints
from xlstm_hybrid.evaluation.harness import (
    CODE,
    Options,
    check_long_context,
    domains,
    expand,
    run_harness,
    sample_of,
    task_manager,
)
from xlstm_hybrid.evaluation.results import last_part, read_results
from xlstm_hybrid.evaluation.scores import ExactMatch, contradictions, exact_match, perplexity
from xlstm_hybrid.recipe.schema import resolve_path
from xlstm_hybrid.reports.comparison import comparison_pictures, write_comparison
from xlstm_hybrid.reports.efficiency import machine_and_versions

MISSING = (
    "lm-eval is not installed (pip install 'xlstm-hybrid[eval]'): this package's own exact match stands for it, its other "
    "tasks are left out."
)
NOTHING = {"exact_match": {}, "perplexity": {}, "samples": {}, "contradictions": {}, "agreement": {}}
WHOLE_DOMAIN = 200  # prompts of a domain's task file


def evaluate(model_dir, recipe, progress=None, known=None, teacher=None):
    """Scores of one checkpoint as the recipe's section `evaluate` asks for them.

    With "examples": exact match (greedy, batched, through the cache) and perplexity on every domain of `tasks`, and
    perplexity of real text. What is `known` already, {"exact_match": {domain: share}, "samples": ..., "contradictions":
    ...}, is not measured again. With "documents": perplexity of so many held-out documents of every source of the
    recipe, each cut to a row's length, and beside a `teacher` (a student's: directory or hub id) how far the model is
    from it.

    Returns:
        {"exact_match": {domain: share}, "perplexity": {domain or source: value}, "samples": {domain: [...]},
        "contradictions": {domain: those of the samples that cannot be, see `scores.contradictions`}, "agreement":
        {source: see `agreement`}}
    """
    model, tokenizer = load(model_dir)
    if "documents" in recipe.evaluate:
        return evaluate_sources(model, tokenizer, recipe, progress, teacher)
    return evaluate_domains(model, tokenizer, recipe.evaluate, progress, known or {"exact_match": {}})


def evaluate_domains(model, tokenizer, settings, progress, known):
    result = deepcopy(NOTHING)
    for domain in tasks.DOMAINS:
        examples = tasks.test_examples(domain, settings["examples"])
        if domain in known["exact_match"]:
            match = ExactMatch(known["exact_match"][domain], known["samples"][domain])
            wrong = known["contradictions"].get(domain)
        else:
            match = exact_match(model, tokenizer, examples, batch_size=settings["batch_size"])
            wrong = contradictions(model, tokenizer, match.samples)
        result["contradictions"] |= {domain: wrong} if wrong else {}
        result["exact_match"][domain], result["samples"][domain] = match.score, match.samples
        result["perplexity"][domain] = perplexity(
            model, [tasks.encode_example(tokenizer, e) for e in examples], tokenizer=tokenizer
        )
        if progress:
            progress(domain, f"{match.score:6.1%}")
    chunks, count = tasks.text_chunks("test", size=300), settings["text_chunks"]
    rows = [tasks.encode_chunk(tokenizer, chunk) for chunk in chunks[:: max(1, len(chunks) // count)][:count]]
    result["perplexity"]["text"] = perplexity(model, rows, tokenizer=tokenizer)
    return result


def evaluate_sources(model, tokenizer, recipe, progress=None, teacher=None):
    """The teacher is held as it taught, in the recipe's `teacher_dtype`."""
    result, settings = deepcopy(NOTHING), recipe.evaluate
    how = {"tokenizer": tokenizer, "batch_size": settings["batch_size"]}
    if teacher is not None:
        its, its_tokenizer = load(teacher, recipe.teacher_dtype, None if Path(teacher).exists() else recipe.revision)
    for expert in (None, *recipe.experts):
        if "sources" not in recipe.mix(expert):
            continue
        for stream in open_streams(recipe, tokenizer, expert, test=True):
            name = stream.name if expert is None else f"{expert}/{stream.name}"
            rows = held_out_rows(stream, recipe.length, settings["documents"])
            if teacher is None:
                result["perplexity"][name] = perplexity(model, rows, **how)
            else:  # one forward is enough for both
                found = agreement(model, its, rows, teacher_tokenizer=its_tokenizer, **how)
                result["agreement"][name] = found
                result["perplexity"][name] = torch.tensor(found["nll_student"]).double().exp().item()
            if progress:
                beside = f", KL {found['kl']:.4g}, top 1 {found['top1']:.1%}" if teacher is not None else ""
                progress(name, f"perplexity {result['perplexity'][name]:.4g}{beside}")
    return result


def held_out_rows(stream, length, count, first=0):
    """`count` documents of a stream from `first` on, as (ids, labels), each cut to `length` tokens."""
    return [(ids[:length], labels[:length]) for ids, labels in islice(stream, first, first + count)]


@torch.no_grad()
def mean_gates(model_dir, recipe, rows=8):
    """Mean output gate per layer and head (1: mLSTM, 0: window) over held-out rows: [hybrid layers, heads]."""
    model, tokenizer = load(model_dir)
    batch = collate(packed_rows(recipe, tokenizer, rows, test=True))
    batch = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
    gates = model(**batch, use_cache=False, logits_to_keep=1, output_gates=True)["gates"]
    return [gate.mean((0, 1)).tolist() for gate in gates]


def sample_text(model_dir, prompt):
    """A greedy continuation, as a user would ask for it."""
    model, tokenizer = load(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    how = {"max_new_tokens": 24, "do_sample": False, "tokenizer": tokenizer}  # for a checkpoint's own `stop_strings`
    output = model.generate(input_ids=ids, attention_mask=mask, **how)
    return {"prompt": prompt, "output": tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}


# --- what a recipe asks of lm-eval -----------------------------------------------------------------------------


def harness_installed():
    return find_spec("lm_eval") is not None


def units_of(section):
    """What the section `evaluate` wants of lm-eval: `harness` as it is, `long_context` as kinds at lengths."""
    asked = section.get("long_context")
    names = expand(section["harness"]) if "harness" in section else []
    more = expand(asked.get("kinds", list(KINDS)), asked["lengths"]) if asked else []
    return [*names, *(unit for unit in more if unit not in names)]


def harness_options(recipe, **more):
    """`harness.Options` of a recipe: code that a model writes runs only where the environment says so, whatever the
    recipe.
    """
    section, asked = recipe.evaluate, recipe.evaluate.get("long_context") or {}
    more |= {key: asked[key] for key in ("samples", "depths", "hops") if key in asked}
    if "haystack" in asked:  # relative to the recipe, as its other paths
        more["haystack"] = resolve_path(recipe, asked["haystack"]) or Path(asked["haystack"])
    if folder := section.get("include_path"):
        more["include"] = resolve_path(recipe, folder) or recipe.path.parent / folder
    more |= {key: section[key] for key in ("limit", "chat", "batch_size") if key in section}
    allowed = os.environ.get(CODE[0]) == CODE[1]
    return Options(seed=recipe.seed, allow_code=allowed, dtype=recipe.teacher_dtype, **more)


def efficiency_settings(section):
    """`efficiency.Settings` of the section `evaluate`."""
    asked = section["efficiency"].items()
    return Settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in asked})


def check_evaluation(recipe):
    """Raise, before anything runs, for tasks that nobody knows, settings of `efficiency` that make no sense, and
    domains that two sets of prompts are asked for.

    Raises:
        ConfigError, EvaluationError.
    """
    section = recipe.evaluate or {}
    if "efficiency" in section:
        efficiency_settings(section)
    units = units_of(section)
    if units:
        check_long_context(units, harness_options(recipe))
    asked, limit = [u.name for u in units if u.name in domains()], min(section.get("limit", WHOLE_DOMAIN), WHOLE_DOMAIN)
    if asked and section.get("examples", limit) != limit:
        raise ConfigError(
            f"{recipe.path.name}: evaluate.limit={section.get('limit')} gives {', '.join(asked)} {limit} prompts, the other stages "
            f"have examples={section['examples']}; expected the same number, so that their scores can stand in one table"
        )
    if units and harness_installed():
        task_manager(units, "", harness_options(recipe))


def source_of(recipe, teacher):
    """The teacher's directory; of a hub id the snapshot at the recipe's revision."""
    return local_source(teacher, None if Path(teacher).is_dir() else recipe.revision)


# --- lm-eval on both sides -------------------------------------------------------------------------------------


def run_lm_eval(recipe, side, model, out, redo=False, report=lambda line: None):
    """Teacher or student by lm-eval, with the same tasks, shots and budgets.

    Args:
        side: "teacher" or "student".
        model: directory, or hub id of the teacher.
        out: folder of the results, one folder per task; finished tasks are not run again.
        report: called with a line about a finished task.
    Returns:
        {unit: what `run_harness` returns}
    """
    warn_if_slow(device_of(), recipe.teacher_dtype, "teacher_dtype")
    name, source = (last_part(model), source_of(recipe, model)) if side == "teacher" else (side, model)
    options = replace(harness_options(recipe, redo=redo), name=name)
    return run_harness(source, units_of(recipe.evaluate), out, options, report)


def domain_scores(folder, units):
    """What lm-eval found on the procedural domains, in the form of `evaluate`, without perplexities."""
    exact, samples, wrong = {}, {}, {}
    for unit, domain in domains().items():
        if unit in units:
            exact[domain] = units[unit]["scores"][unit]["exact_match,none"]
            (file,) = (folder / unit).rglob(f"samples_{unit}_*.jsonl")
            samples[domain] = [sample_of(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
            wrong |= {domain: found} if (found := units[unit].get("contradictions")) else {}
    return {"exact_match": exact, "samples": samples, "contradictions": wrong}


def long_context_rows(of_teacher, of_student):
    """The long-context tasks of both sides, a flat row each: see `reports.sections.HEAD`."""
    rows = []
    for unit, result in of_student.items():
        if student := result["long_context"]:
            teacher, settings = of_teacher[unit]["long_context"], result["settings"]
            documents = min(settings["samples"], settings["limit"] or settings["samples"])
            row = {"task": unit, "tokens": student["length"], "documents": documents}
            row |= {key: student[key] for key in ("coverage", "excess")}
            for key in ("recall", "cache_bytes"):
                row |= {f"teacher_{key}": teacher[key], f"student_{key}": student[key]}
            rows.append(row)
    return rows


# --- the comparison --------------------------------------------------------------------------------------------


def compare_with_teacher(recipe, teacher, folder, out, units=None):
    """The verdict on the student, written into the folder `out`; None where there is nothing to compare.

    Long-context tasks have no part in it: what student and teacher both fail would count as tied. Nor have those of which
    only less is better, bits per byte.

    Args:
        folder: `evaluation` of the run.  units: of the teacher, what `run_lm_eval` returned; None compares the run's
            own exact match.
    """
    tasks_of = None
    if units:
        tasks_of = {task for found in units.values() if not found["long_context"] for task in found["scores"]}
        paths = [folder / "harness" / side for side in ("teacher", "student")]
    else:
        paths = [folder / f"{side}.json" for side in ("teacher", "student")]
    if tasks_of == set():
        return None
    (its,), (mine,) = (read_results(path) for path in paths)
    its.name, mine.name = last_part(teacher), "student"
    chosen = [task for task in its.scores if tasks_of is None or task in tasks_of]
    chosen = [task for task in chosen if set(its.scores[task]) - set(its.smaller.get(task, ()))]
    if not chosen:
        return None
    found = compare(its, [mine], alpha=recipe.evaluate.get("alpha", 0.0), tasks=chosen)
    write_comparison(found, out, comparison_pictures(found))
    return plain_floats(found)


# --- efficiency ------------------------------------------------------------------------------------------------


def measure_efficiency(recipe, teacher, student, report=lambda text: None):
    """The efficiency report of teacher and student on this machine, in the dtype that the recipe teaches in."""
    device = torch.device(device_of())
    warn_if_slow(device.type, recipe.teacher_dtype, "teacher_dtype")
    sides, names = (source_of(recipe, teacher), student), ("student", last_part(teacher))
    how = {"names": names, "dtype": recipe.teacher_dtype, "report": report}
    pair = measure_checkpoints(*sides, efficiency_settings(recipe.evaluate), device.type, **how)
    return machine_and_versions(device) | {"pairs": [pair]}
