"""lm-evaluation-harness on a student or its teacher, task by task, with our long-context tasks and the paper's suites.

A unit is a task or group that is evaluated by itself, in a folder with lm-eval's own files: what is finished is not
evaluated again.
"""

import inspect
import logging
import os
import re
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from xlstm_hybrid.checkpoint.digests import file_digest, weights_hash
from xlstm_hybrid.checkpoint.files import clean_abandoned, read_json, staged, write_json
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.data.long_context import HOPS, KINDS, LENGTHS, by_depth, coverage, excess, sentences
from xlstm_hybrid.data.toy_domains import DOMAINS
from xlstm_hybrid.errors import CheckpointWriteError, CompatibilityWarning, EvaluationError, XLSTMHybridError
from xlstm_hybrid.evaluation.benchmarks import TASKS as REAL
from xlstm_hybrid.evaluation.likelihoods import continuation_scores
from xlstm_hybrid.evaluation.results import last_part
from xlstm_hybrid.evaluation.scores import contradictions, evaluating
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.configuration import attention_reach
from xlstm_hybrid.planning.cache_size import filled_bytes

TASKS = Path(__file__).with_name("lm_eval_tasks")
SETTINGS = "harness.json"
SCORING = "_loglikelihood_tokens"  # of lm-eval's HFLM
CODE = ("HF_ALLOW_CODE_EVAL", "1")  # what lm-eval's metric wants beside its own flag


@dataclass(frozen=True)
class Unit:
    """A task that is evaluated by itself, with a folder of its own. shots, budget (max new tokens): None leaves the task's own. kind,
    length: of a long-context task.
    """

    name: str
    shots: int | None = None
    budget: int | None = None
    kind: str | None = None
    length: int | None = None


# shots and max new tokens of Hauzenberger et al. 2026; of MATH level 5 they name none, and lm-eval has no MT-Bench
SUITES = {
    "paper_understanding": [
        Unit("piqa", 0),
        Unit("arc_easy", 0),
        Unit("arc_challenge", 25),
        Unit("hellaswag", 10),
        Unit("winogrande", 5),
        Unit("mmlu", 5),
    ],
    "paper_base": [
        Unit("gpqa_diamond_cot_zeroshot", 0, 2048),
        Unit("gpqa_main_cot_zeroshot", 0, 2048),
        Unit("gsm8k", 8, 1024),
        Unit("humaneval", 0, 1024),
        Unit("humaneval_plus", 0, 1024),
        Unit("mbpp", 3, 256),
        Unit("mbpp_plus", 3, 1024),
    ],
    "paper_instruct": [
        Unit("gsm8k_cot", 5, 3072),
        Unit("minerva_math500", 0, 3072),
        Unit("leaderboard_math_hard", None, 3072),
        Unit("humaneval_instruct", 0, 3072),
        Unit("humaneval_plus", 0, 3072),
        Unit("mbpp_instruct", 3, 1024),
        Unit("mbpp_plus_instruct", 3, 1024),
        Unit("cruxeval_output", 0),
        Unit("cruxeval_input", 2),
        Unit("gpqa_diamond_cot_zeroshot", 0, 2048),
        Unit("gpqa_main_cot_zeroshot", 0, 2048),
        Unit("ifeval", 0),
    ],
    "domains": [Unit(f"domain_{d}") for d in DOMAINS],
    # what the command `benchmarks` writes, with the shots of their task files; real_code runs what the model writes
    "real_understanding": [
        Unit(f"real_{t}") for t in ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu")
    ],
    "real_suite": [Unit(name) for name, task in REAL.items() if not task.form.get("unsafe_code")],
    "real_code": [Unit(name) for name, task in REAL.items() if task.form.get("unsafe_code")],
}


@dataclass(frozen=True)
class Options:
    """How units are evaluated.

    name: of the model in the results; its last name if None.  limit: first documents of each task only.
    samples, depths, seed, haystack, hops: of long-context documents, see `data.long_context.documents`.
    max_length: longest input, tokens; what is longer loses its beginning; the model's own, and what a long-context task
    needs, if None.
    include: folder with further task files, such as those of `benchmarks`.  chat: apply the chat template.
    allow_code: run the code that the model writes.
    revision: of a hub id.  redo: replace results that were made with other settings.
    """

    name: str | None = None
    samples: int = 40
    depths: int = 10
    seed: int = 0
    haystack: Path | None = None
    hops: int | None = None
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    include: Path | None = None
    chat: bool = False
    allow_code: bool = False
    dtype: str = "float32"
    device: str | None = None
    revision: str | None = None
    redo: bool = False


def run_harness(model, units, out, options=None, report=print):
    """Evaluate a model by lm-eval: greedy, batched, through the cache.

    Args:
        model: checkpoint directory or hub id.  units: see `expand`.  out: directory of the results, a folder per unit.
        report: called with each line about a finished unit.
    Returns:
        {unit's name: {"settings", "scores" {task: {metric: score}}, "long_context" (see there) or None, "seconds",
        "contradictions" (of a procedural domain, see `scores.contradictions`)}}
    Raises:
        EvaluationError: unknown tasks, data that cannot be read, code that may not run, results that other settings
            made, a haystack that no task reads.
        DataError: a haystack that cannot be read.
    """
    import lm_eval

    options, out = options or Options(), Path(out)
    check_long_context(units, options)
    source = local_source(model, options.revision)
    shared = {"model": weights_hash(source), "name": options.name or last_part(model)}
    shared |= {key: getattr(options, key) for key in ("dtype", "limit", "chat", "max_length")}
    shared["lm_eval"] = lm_eval.__version__
    wanted = {
        u: {**shared, "shots": u.shots, "budget": u.budget, **(document_settings(u, options) if u.kind else {})}
        for u in units
    }
    out.mkdir(parents=True, exist_ok=True)
    clean_abandoned(out)
    open_units = [u for u in units if not finished(out / u.name, wanted[u], options.redo)]
    if open_units:
        manager = task_manager(open_units, source, options)
        loaded = load(source, options.dtype, device=options.device)
    for unit in units:
        if unit in open_units:
            start = time.time()
            with lm_eval_errors_only():
                results = evaluate_unit(unit, loaded, manager(unit), options, wanted[unit])
            write(out / unit.name, results, wanted[unit], time.time() - start)
        for line in lines(out / unit.name):
            report(line)
    return {unit.name: read_json(out / unit.name / SETTINGS, unit.name) for unit in units}


@contextmanager
def lm_eval_errors_only():
    """Without lm-eval's remarks on how it is called."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- what is asked for --------------------------------------------------------------------------------------------


def expand(tasks, lengths=None):
    """The units behind names of suites, kinds and tasks, each once, in order.

    Args:
        tasks, lengths: names, and tokens of long-context tasks such as 4096 or "4k" (1k to 128k if None): lists, or
            text with commas.
    Raises:
        EvaluationError: no task, a length that is no number, or one task twice with other shots or budgets.
    """
    asked = lengths.split(",") if isinstance(lengths, str) else lengths or ()
    sizes = [tokens_of(size) for size in asked if size] if lengths else LENGTHS
    chosen = {}
    for name in [t for t in tasks.split(",") if t] if isinstance(tasks, str) else tasks:
        kind, _, size = name.rpartition("_")
        if name in SUITES:
            units = SUITES[name]
        elif name in ("long_context", *KINDS):
            units = [long_unit(k, size) for k in (KINDS if name == "long_context" else [name]) for size in sizes]
        else:
            units = [long_unit(kind, tokens_of(size))] if kind in KINDS else [Unit(name)]
        for unit in units:
            if (other := chosen.setdefault(unit.name, unit)) != unit:
                raise EvaluationError(
                    f"tasks {tasks}: {unit.name} with {other.shots} shots and {other.budget} new tokens, and with {unit.shots} and {unit.budget}; "
                    "expected one setting per OUT, run them into two"
                )
    if not chosen:
        raise EvaluationError(
            f"tasks {tasks!r}: no task, expected names such as needle_4k,gsm8k or suites: {', '.join(SUITES)}, long_context"
        )
    return list(chosen.values())


def tokens_of(text):
    if not (match := re.fullmatch(r"([1-9]\d*)(k?)", str(text).strip())):
        raise EvaluationError(f"{text!r} is no length, expected tokens such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def long_unit(kind, length):
    return Unit(f"{kind}_{f'{length // 1024}k' if length % 1024 == 0 else length}", kind=kind, length=length)


def document_settings(unit, options):
    settings = {"samples": options.samples, "depths": options.depths, "seed": options.seed, "length": unit.length}
    if unit.kind == "variables":
        settings["hops"] = HOPS if options.hops is None else options.hops
    if options.haystack is not None:  # by name and content, wherever it lies
        settings["haystack"] = f"{Path(options.haystack).name} {file_digest(options.haystack)[:16]}"
    return settings


def check_long_context(units, options):
    """Raise, before a model is loaded, for hops or a haystack that a task would ignore, and for a haystack that cannot be
    read.
    """
    kinds = {u.kind for u in units} - {None}
    if options.hops is not None and (options.hops < 1 or "variables" not in kinds):
        raise EvaluationError(
            f"hops={options.hops}: the links of a chain of the task variables, expected at least 1; ask for that task, or leave it out"
        )
    if options.haystack is None:
        return
    others = ", ".join(u.name for u in units if u.kind == "recall")
    if others or not kinds:
        raise EvaluationError(
            f"haystack {Path(options.haystack).name}: {others or 'no long-context task is asked for'}; expected tasks that hide answers in "
            "a text, needle, multikey or variables: name those, or leave the haystack out"
        )
    sentences(str(options.haystack))


def finished(folder, wanted, redo):
    """Whether a unit's results are there, made with the same settings; EvaluationError where others made them, unless
    `redo`.
    """
    if not folder.is_dir():
        return False
    before = read_json(folder / SETTINGS, folder.name)["settings"]
    keys = [key for key in sorted({*before, *wanted}) if before.get(key) != wanted.get(key)]
    changed = [f"{key} {before.get(key)!r}, now {wanted.get(key)!r}" for key in keys]
    if changed and not redo:
        raise EvaluationError(
            f"{folder.name}: there are results with {'; '.join(changed)}. Choose another OUT, or replace them with --redo"
        )
    return not changed


def task_manager(units, source, options):
    """A function from a unit to lm-eval's task manager that knows it. lm-eval's own thousands of tasks are indexed only
    if one is asked for.

    Raises:
        EvaluationError: tasks that nobody knows, all of them; no such folder of task files; documents that are not there.
    """
    from lm_eval.tasks import TaskManager

    if options.include and not Path(options.include).is_dir():
        raise EvaluationError(
            f"{options.include}: no such folder of task files; `xlstm-hybrid benchmarks FOLDER` writes one, or correct --include "
            "(include_path in a recipe)"
        )
    paths = [str(TASKS), *([str(options.include)] if options.include else [])]
    ours = TaskManager(include_path=paths, include_defaults=False)
    builtin = [u for u in units if not u.kind and u.name not in ours.all_tasks]
    every = TaskManager(include_path=paths, metadata={"tokenizer": str(source)}) if builtin else ours
    if unknown := [u.name for u in builtin if u.name not in every.all_tasks]:
        step = "`lm-eval ls tasks` prints those that it knows, --include adds a folder of your own"
        if set(unknown) & set(REAL):
            step = "`xlstm-hybrid benchmarks FOLDER` writes those of this package, --include FOLDER adds them (include_path in a recipe)"
        raise EvaluationError(f"{', '.join(unknown)}: lm-eval knows no such task; {step}")
    for name in [u.name for u in units if not u.kind]:
        files = ((every.task_index[name].cfg or {}).get("dataset_kwargs") or {}).get("data_files")
        for file in files.values() if isinstance(files, dict) else ():
            if isinstance(file, str) and Path(file).is_absolute() and "*" not in file and not Path(file).is_file():
                raise EvaluationError(
                    f"{name}: its documents are not at {file}; was the folder moved? Write it again with `xlstm-hybrid benchmarks`, "
                    f"or correct data_files in {name}.yaml"
                )

    def manager(unit):
        if not unit.kind:
            return every
        told = {**document_settings(unit, options), "tokenizer": str(source)}
        told |= {"haystack": str(options.haystack)} if options.haystack is not None else {}
        return TaskManager(include_path=paths, include_defaults=False, metadata=told)

    return manager


# --- evaluating ---------------------------------------------------------------------------------------------------


def evaluate_unit(unit, loaded, manager, options, settings):
    """lm-eval's results of one unit, samples inside, and for a long-context task what `long_context_result` adds."""
    import lm_eval

    (model, tokenizer), specs = loaded, load_tasks(unit, manager, options.allow_code)
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    room = settings["max_length"] or own
    if unit.kind:
        around = 0
        if settings["chat"]:  # nothing of a needle's context may be cut off
            message = [{"role": "user", "content": ""}]
            template = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            around = len(tokenizer(template)["input_ids"]) + 8  # a few tokens may be split in another way
        room = max(room, unit.length + around + specs[0].config.generation_kwargs["max_gen_toks"])
    lm = language_model(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=room)
    with evaluating(model, tokenizer):  # a checkpoint's own sampling settings and penalties have no part in a score
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=specs,
            task_manager=manager,
            batch_size=options.batch_size,
            limit=settings["limit"],
            gen_kwargs={"max_gen_toks": unit.budget} if unit.budget else None,
            apply_chat_template=settings["chat"],
            log_samples=True,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=options.allow_code,
        )
        results["chat_template_text"] = lm.chat_template(True) if settings["chat"] else None
        if unit.kind:
            results["long_context"] = {unit.name: long_context_result(results, unit, model, tokenizer)}
        if unit.name in domains():
            rows = results["samples"][unit.name]
            samples = [sample_of(row) | {"prompt": row["arguments"][0][0]} for row in rows]  # a chat template included
            results["contradictions"] = contradictions(model, tokenizer, samples, encode=lm.tok_encode)
    return results


def language_model(**arguments):
    """lm-eval's `HFLM` of a model, which reads what several inputs begin with once (`continuation_scores`); HFLM itself,
    with a CompatibilityWarning, where its inside is not that of lm-eval 0.4.13.
    """
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm

    class SharedBeginnings(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            def scored(number, answer):
                if requests[number][0] is not None:  # parts of a rolling window have no text of their own
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(1)

            with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
                return continuation_scores(
                    self.model,
                    [(context, continuation) for _, context, continuation in requests],
                    batch_size=self.batch_size,
                    max_length=self.max_length,
                    softmax_dtype=self.softmax_dtype,
                    scored=scored,
                )

    own, ours = (inspect.signature(getattr(c, SCORING, lambda: None)) for c in (HFLM, SharedBeginnings))
    lm = SharedBeginnings(**arguments)
    wanted = ("cache_hook", "model", "batch_size", "max_length", "softmax_dtype")
    lacking = [name for name in wanted if not hasattr(lm, name)]
    if lacking or list(own.parameters) != list(ours.parameters):
        what = f"no {', '.join(lacking)}" if lacking else f"{SCORING}{own}"
        warnings.warn(
            f"lm-eval's HFLM has {what}: every input is read as a whole, which takes longer where they begin alike",
            CompatibilityWarning,
            stacklevel=2,
        )
        return HFLM(**arguments)
    return lm


def domains():
    return {f"domain_{name}": name for name in DOMAINS}


def sample_of(row):
    """lm-eval's sample of a procedural domain as `exact_match` has it."""
    document, output, right = row["doc"], row["filtered_resps"][0], bool(row["exact_match"])
    return {"prompt": document["prompt"], "answer": document["answer"], "output": output, "correct": right}


def load_tasks(unit, manager, allow_code):
    """The tasks and groups of a unit as lm-eval's objects, with the unit's shots.

    Raises:
        EvaluationError: its data cannot be read, or it runs code and that is not allowed.
    """
    if allow_code:
        os.environ.setdefault(*CODE)
    name = unit.kind or unit.name
    try:
        loaded = manager.load([name])
    except XLSTMHybridError:
        raise
    except (OSError, ImportError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EvaluationError(
            f"{name}: the task or its data cannot be read ({reason}); run it where the hub can be reached, or download the data first"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise EvaluationError(
                f"{name} runs code that the model writes: start the command in a sandbox with --allow-code, or leave the task out"
            )
        if unit.shots is not None:
            task.set_config(key="num_fewshot", value=unit.shots)
        if unit.kind:
            task.config.task = unit.name
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def long_context_result(results, unit, model, tokenizer):
    """{"length", "window", "sinks", "coverage", "score", "recall", "excess" of recall, "cache_bytes" of one sequence of
    that length, "by_depth"}
    """
    scores, samples = results["results"][unit.name], results["samples"][unit.name]
    window, sinks = attention_reach(model.config)
    covered, recall = coverage(unit.length, window, sinks), scores["recall,none"]
    ids = tokenizer(samples[0]["doc"]["prompt"], return_tensors="pt", verbose=False)["input_ids"]
    with torch.inference_mode():
        cache = cache_of(model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1))
    return {
        "length": unit.length,
        "window": window,
        "sinks": sinks,
        "coverage": covered,
        "score": scores["exact_match,none"],
        "recall": recall,
        "excess": excess(recall, covered),
        "cache_bytes": filled_bytes(cache),
        "by_depth": by_depth(samples),
    }


# --- files and lines ----------------------------------------------------------------------------------------------


def write(folder, results, settings, seconds):
    """A folder with lm-eval's own files, results_*.json and samples_*.jsonl, and the settings; whole or not at all."""
    from lm_eval.loggers import EvaluationTracker

    samples, template = results.pop("samples"), results.pop("chat_template_text")
    wrong = results.pop("contradictions", [])
    # lm-eval writes its whole environment and the places of task files: what tells of this machine is taken out
    results.pop("pretty_env_info", None)
    results["config"]["model"] = settings["name"]
    for config in results["configs"].values():
        metadata = config.get("metadata") or {}
        if isinstance(files := (config.get("dataset_kwargs") or {}).get("data_files"), dict):
            files.update({part: last_part(file) for part, file in files.items() if isinstance(file, str)})
        places = ("tokenizer", "config_source", "haystack")
        metadata.update({key: last_part(metadata[key]) for key in places if key in metadata})
    with staged(folder, overwrite=True) as temporary:
        tracker = EvaluationTracker(output_path=str(temporary))
        arguments = {"pretrained": settings["name"]}
        tracker.general_config_tracker.log_experiment_args("hf", arguments, None, template, True)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
        written = len(list(temporary.rglob("results_*.json"))), len(list(temporary.rglob("samples_*.jsonl")))
        if written != (1, len(samples)):  # lm-eval logs what goes wrong and goes on
            raise CheckpointWriteError(
                f"{folder.name}: lm-eval wrote {written[0]} files of results and {written[1]} of samples, expected 1 and "
                f"{len(samples)}; make room or choose another directory"
            )
        scores = {
            t: {k: v for k, v in entry.items() if "," in k and isinstance(v, int | float)}
            for t, entry in results["results"].items()
        }
        parts = {"long_context": results.get("long_context", {}).get(folder.name), "contradictions": wrong}
        content = {"settings": settings, "scores": scores, **parts, "seconds": round(seconds, 1)}
        write_json(temporary / SETTINGS, content)


def lines(folder):
    """What is printed of a finished unit."""
    result = read_json(folder / SETTINGS, folder.name)
    for task, scores in result["scores"].items():
        shown = (f"{k.removesuffix(',none')} {v:.4f}" for k, v in scores.items() if "_stderr," not in k)
        yield f"{task:<28} " + "  ".join(shown)
    if far := result["long_context"]:
        beyond = "no excess: attention sees all" if far["excess"] is None else f"excess {far['excess']:+.3f}"
        yield f"{'':<28} coverage {far['coverage']:.3f}  {beyond}  cache {far['cache_bytes'] / 1e6:.3f} MB at {far['length']} tokens"
