"""The verb `harness`: lm-evaluation-harness on a student or its teacher, task by task, with our long-context tasks and the paper's suites."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

TASKS = Path(__file__).parents[1] / "lm_eval_tasks"
DOMAINS = ("arithmetic", "recall", "code", "strings")
SETTINGS = "harness.json"
CODE = ("HF_ALLOW_CODE_EVAL", "1")  # what lm-eval's metric wants beside its own flag


@dataclass(frozen=True)
class Unit:
    """A task that is judged and kept by itself. shots, budget (max new tokens): None leaves the task's own. kind, length: of a long-context task."""

    name: str
    shots: int | None = None
    budget: int | None = None
    kind: str | None = None
    length: int | None = None


SUITES = {  # shots and max new tokens of Hauzenberger et al. 2026
    "paper_understanding": [Unit("piqa", 0), Unit("arc_easy", 0), Unit("arc_challenge", 25), Unit("hellaswag", 10), Unit("winogrande", 5),
                            Unit("mmlu", 5)],
    "paper_base": [Unit("gpqa_diamond_cot_zeroshot", 0, 2048), Unit("gpqa_main_cot_zeroshot", 0, 2048), Unit("gsm8k", 8, 1024),
                   Unit("humaneval", 0, 1024), Unit("humaneval_plus", 0, 1024), Unit("mbpp", 3, 256), Unit("mbpp_plus", 3, 1024)],
    "paper_instruct": [Unit("gsm8k_cot", 5, 3072), Unit("minerva_math500", 0, 3072), Unit("humaneval_instruct", 0, 3072),
                       Unit("humaneval_plus", 0, 3072), Unit("mbpp_instruct", 3, 1024), Unit("mbpp_plus_instruct", 3, 1024),
                       Unit("cruxeval_output", 0), Unit("cruxeval_input", 2), Unit("gpqa_diamond_cot_zeroshot", 0, 2048),
                       Unit("gpqa_main_cot_zeroshot", 0, 2048), Unit("ifeval", 0)],
    "domains": [Unit(f"domain_{d}") for d in DOMAINS],
}  # fmt: skip


def harness(
    model: Annotated[str, typer.Argument(help="Student or teacher: checkpoint directory or hub id.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated: long_context, domains, paper_understanding, paper_base, paper_instruct, or tasks: "
                                            "needle, multikey, recall, variables (or needle_4k), or any of lm-eval.")],
    out: Annotated[Path, typer.Option(help="Directory of the results, one folder per task; finished tasks are not run again.")],
    lengths: Annotated[str | None, typer.Option(help="Of long-context tasks, tokens: 1k,4k; 1k to 128k by default.")] = None,
    samples: Annotated[int, typer.Option(help="Documents per long-context task.")] = 40,
    depths: Annotated[int, typer.Option(help="Parts of the context that a needle visits in turn.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the long-context documents.")] = 0,
    limit: Annotated[int | None, typer.Option(help="First documents of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents per batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Longest input, tokens; what is longer loses its beginning. The model's own by default, "
                                                        "and what a long-context task needs.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model in the results; its last name by default.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code that the model writes: in a sandbox only.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Replace results that were made with other settings.")] = False,
):  # fmt: skip
    """Judge MODEL by lm-evaluation-harness: greedy, batched, through the cache. `xlstm-hybrid compare` reads OUT of a teacher and of students."""
    import lm_eval

    from xlstm_hybrid.artifacts import clean_abandoned
    from xlstm_hybrid.evaluation import last_part
    from xlstm_hybrid.pipeline.stages import load
    from xlstm_hybrid.store import weights_hash
    from xlstm_hybrid.verbs.cache_teacher import open_source

    units = expand(tasks, lengths)
    source = open_source(model, revision)
    shared = {"model": weights_hash(source), "name": name or last_part(model), "dtype": dtype, "limit": limit, "chat": chat,
              "max_length": max_length, "lm_eval": lm_eval.__version__}  # fmt: skip
    wanted = {u: settings_of(u, shared, samples, depths, seed) for u in units}
    out.mkdir(parents=True, exist_ok=True)
    clean_abandoned(out)
    open_units = [u for u in units if not finished(out / u.name, wanted[u], redo)]
    if open_units:
        manager = task_manager(open_units, source, include, (samples, depths, seed))
        loaded = load(source, dtype, device=device)
    for unit in units:
        if unit in open_units:
            results = judge(unit, loaded, manager(unit), batch_size, wanted[unit], allow_code)
            write(out / unit.name, results, wanted[unit])
        show(out / unit.name)


VERBS = [harness]


# --- what is asked for --------------------------------------------------------------------------------------------


def expand(tasks, lengths=None):
    """The units behind names of suites, kinds and tasks, each once, in order.

    Raises:
        EvaluationError: no task, a length that is no number, or one task twice with other shots or budgets.
    """
    from xlstm_hybrid.errors import EvaluationError
    from xlstm_hybrid.longcontext import KINDS, LENGTHS

    sizes = [tokens_of(x) for x in lengths.split(",") if x] if lengths else LENGTHS
    found = {}
    for name in [t for t in tasks.split(",") if t]:
        kind, _, size = name.rpartition("_")
        if name in SUITES:
            units = SUITES[name]
        elif name in ("long_context", *KINDS):
            units = [long_unit(k, size) for k in (KINDS if name == "long_context" else [name]) for size in sizes]
        else:
            units = [long_unit(kind, tokens_of(size))] if kind in KINDS else [Unit(name)]
        for unit in units:
            if (other := found.setdefault(unit.name, unit)) != unit:
                raise EvaluationError(
                    f"--tasks {tasks}: {unit.name} with {other.shots} shots and {other.budget} new tokens, and with {unit.shots} and {unit.budget}; "
                    "expected one setting per OUT, run them into two"
                )
    if not found:
        raise EvaluationError(f"--tasks {tasks!r}: no task, expected names such as needle_4k,gsm8k or suites: {', '.join(SUITES)}, long_context")
    return list(found.values())


def tokens_of(text):
    from xlstm_hybrid.errors import EvaluationError

    if not (match := re.fullmatch(r"([1-9]\d*)(k?)", text.strip())):
        raise EvaluationError(f"{text!r} is no length, expected tokens such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def long_unit(kind, length):
    return Unit(f"{kind}_{f'{length // 1024}k' if length % 1024 == 0 else length}", kind=kind, length=length)


def settings_of(unit, shared, samples, depths, seed):
    """What the results of a unit depend on."""
    own = {"samples": samples, "depths": depths, "seed": seed, "length": unit.length} if unit.kind else {}
    return {**shared, "shots": unit.shots, "budget": unit.budget, **own}


def finished(folder, wanted, redo):
    """Whether a unit's results are there, made with the same settings; EvaluationError where others made them, unless `redo`."""
    from xlstm_hybrid.artifacts import read_json
    from xlstm_hybrid.errors import EvaluationError

    if redo or not folder.is_dir():
        return False
    made = read_json(folder / SETTINGS, folder.name)["settings"]
    if changed := [f"{key} {made.get(key)!r}, now {wanted.get(key)!r}" for key in sorted({*made, *wanted}) if made.get(key) != wanted.get(key)]:
        raise EvaluationError(f"{folder.name}: there are results with {'; '.join(changed)}. Choose another OUT, or replace them with --redo")
    return True


def task_manager(units, source, include, long_settings):
    """A function from a unit to lm-eval's task manager that knows it. lm-eval's own thousands of tasks are indexed only if one is asked for.

    Raises:
        EvaluationError: tasks that nobody knows, all of them.
    """
    from lm_eval.tasks import TaskManager

    from xlstm_hybrid.errors import EvaluationError

    paths, (samples, depths, seed) = [str(TASKS), *([str(include)] if include else [])], long_settings
    ours = TaskManager(include_path=paths, include_defaults=False)
    builtin = [u for u in units if not u.kind and u.name not in ours.all_tasks]
    every = TaskManager(include_path=paths, metadata={"tokenizer": str(source)}) if builtin else ours
    if unknown := [u.name for u in builtin if u.name not in every.all_tasks]:
        raise EvaluationError(
            f"{', '.join(unknown)}: lm-eval knows no such task; `lm-eval ls tasks` prints those that it knows, --include adds a folder of your own"
        )

    def manager(unit):
        if not unit.kind:
            return every
        asked = {"length": unit.length, "samples": samples, "depths": depths, "seed": seed}
        return TaskManager(include_path=paths, include_defaults=False, metadata={**asked, "tokenizer": str(source)})

    return manager


# --- judging ------------------------------------------------------------------------------------------------------


def judge(unit, loaded, manager, batch_size, settings, allow_code):
    """lm-eval's results of one unit, samples inside, and for a long-context task what `long_context` adds."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from xlstm_hybrid.evaluation import judged

    (model, tokenizer), specs = loaded, load_tasks(unit, manager, allow_code)
    room = settings["max_length"] or own_length(model)
    if unit.kind:
        around = template_tokens(tokenizer) if settings["chat"] else 0  # nothing of a needle's context may be cut off
        room = max(room, unit.length + around + specs[0].config.generation_kwargs["max_gen_toks"])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=room)
    with judged(model):  # a checkpoint's own sampling settings and penalties have no part in a score
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=specs,
            task_manager=manager,
            batch_size=batch_size,
            limit=settings["limit"],
            gen_kwargs={"max_gen_toks": unit.budget} if unit.budget else None,
            apply_chat_template=settings["chat"],
            log_samples=True,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=allow_code,
        )
        results["chat_template_text"] = lm.chat_template(True) if settings["chat"] else None
        if unit.kind:
            results["long_context"] = {unit.name: long_context(results, unit, model, tokenizer)}
    return results


def load_tasks(unit, manager, allow_code):
    """The tasks and groups of a unit as lm-eval's objects, with the unit's shots.

    Raises:
        EvaluationError: its data cannot be read, or it runs code and that is not allowed.
    """
    import os

    from xlstm_hybrid.errors import EvaluationError, XLSTMHybridError

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
            raise EvaluationError(f"{name} runs code that the model writes: start the verb in a sandbox with --allow-code, or leave the task out")
        if unit.shots is not None:
            task.set_config(key="num_fewshot", value=unit.shots)
        if unit.kind:
            task.config.task = unit.name
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def template_tokens(tokenizer):
    """Tokens that the chat template puts around a text, and a few that may be split in another way."""
    return (
        len(tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False))["input_ids"]) + 8
    )


def own_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


def long_context(results, unit, model, tokenizer):
    """{"length", "window", "sinks", "coverage", "score", "recall", "excess" of recall, "cache_bytes" of one sequence of that length, "by_depth"}"""
    from xlstm_hybrid.longcontext import by_depth, coverage, excess

    scores, samples = results["results"][unit.name], results["samples"][unit.name]
    window, sinks = reach(model.config)
    covered, recall = coverage(unit.length, window, sinks), scores["recall,none"]
    ids = tokenizer(samples[0]["doc"]["prompt"], return_tensors="pt", verbose=False)["input_ids"]
    return {
        "length": unit.length,
        "window": window,
        "sinks": sinks,
        "coverage": covered,
        "score": scores["exact_match,none"],
        "recall": recall,
        "excess": excess(recall, covered),
        "cache_bytes": cache_bytes(model, ids),
        "by_depth": by_depth(samples),
    }


def reach(config):
    """`(window, sinks)` of the layer that sees furthest back by attention; window None if one sees everything."""
    config = config.get_text_config()
    layers = range(config.num_hidden_layers)
    if hasattr(config, "window_of"):
        pairs = [(config.window_of(j), config.sinks_of(j)) for j in layers]
    else:
        types = getattr(config, "layer_types", None) or ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
        pairs = [(config.sliding_window if kind == "sliding_attention" else None, 0) for kind in types]
    return (None, 0) if any(window is None for window, _ in pairs) else max(pairs, key=sum)


def cache_bytes(model, ids):
    """Bytes of the cache after a prompt [1, L], measured."""
    import torch

    with torch.inference_mode():
        cache = model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
    seen = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            seen[id(value)] = value
        elif isinstance(value, list | tuple | dict):
            for part in value.values() if isinstance(value, dict) else value:
                visit(part)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(x.numel() * x.element_size() for x in seen.values())


# --- files and lines ----------------------------------------------------------------------------------------------


def write(folder, results, settings):
    """A folder with lm-eval's own files, results_*.json and samples_*.jsonl, and the settings; whole or not at all."""
    from lm_eval.loggers import EvaluationTracker

    from xlstm_hybrid.artifacts import staged, write_json
    from xlstm_hybrid.errors import CheckpointWriteError

    samples, template = results.pop("samples"), results.pop("chat_template_text")
    without_places(results, settings["name"])
    with staged(folder, overwrite=True) as temporary:
        tracker = EvaluationTracker(output_path=str(temporary))
        arguments = {"pretrained": settings["name"]}
        tracker.general_config_tracker.log_experiment_args("hf", arguments, None, template, True)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
        written = len(list(temporary.rglob("results_*.json"))), len(list(temporary.rglob("samples_*.jsonl")))
        if written != (1, len(samples)):  # lm-eval logs what goes wrong and goes on
            raise CheckpointWriteError(f"{folder.name}: lm-eval wrote {written[0]} files of results and {written[1]} of samples, expected 1 and "
                                       f"{len(samples)}; make room or choose another directory")  # fmt: skip
        summary = results.get("long_context", {}).get(folder.name)
        scores = {t: {k: v for k, v in entry.items() if "," in k and isinstance(v, int | float)} for t, entry in results["results"].items()}
        write_json(temporary / SETTINGS, {"settings": settings, "scores": scores, "long_context": summary})


def without_places(results, name):
    """Take out what tells of this machine: lm-eval writes its whole environment and the places of task files."""
    from xlstm_hybrid.evaluation import last_part

    results.pop("pretty_env_info", None)
    results["config"]["model"] = name
    for config in results["configs"].values():
        metadata = config.get("metadata") or {}
        metadata.update({key: last_part(metadata[key]) for key in ("tokenizer", "config_source") if key in metadata})


def show(folder):
    """The lines of a finished unit."""
    from xlstm_hybrid.artifacts import read_json

    kept = read_json(folder / SETTINGS, folder.name)
    for task, scores in kept["scores"].items():
        print(f"{task:<28} " + "  ".join(f"{k.removesuffix(',none')} {v:.4f}" for k, v in scores.items() if "_stderr," not in k), flush=True)
    if found := kept["long_context"]:
        beyond = "no excess: attention sees all" if found["excess"] is None else f"excess {found['excess']:+.3f}"
        print(
            f"{'':<28} coverage {found['coverage']:.3f}  {beyond}  cache {found['cache_bytes'] / 1e6:.3f} MB at {found['length']} tokens", flush=True
        )


# --- data of our own task files -----------------------------------------------------------------------------------


def domain_dataset(domain, examples=200, **_):
    """Held-out examples of a procedural domain, those that `evaluate` takes: `{"test": Dataset}`."""
    from datasets import Dataset

    from xlstm_hybrid.tasks import test_examples

    return {"test": Dataset.from_list([{"prompt": e.prompt, "answer": e.answer} for e in test_examples(domain, examples)])}


def domain_results(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"].strip())}
