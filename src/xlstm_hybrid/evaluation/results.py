"""Results in files: those of lm-eval 0.4.1 to 0.4.13 and our own. Which settings decide whether two of them can be
compared stands here, and what tells one model from another; docs/evaluate.md has the tables.
"""

import hashlib
import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from xlstm_hybrid.checkpoint.files import read_object
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.significance import document_keys, sample_values

MAX_BYTES = 2**28  # of a results file, samples inside included
DATE = re.compile(r"(?:^|_)(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)$")  # at the end of the names of lm-eval's files
LARGE = ("doc", "arguments", "resps", "filtered_resps", "target")  # parts of a sample that are not kept
OF_A_SAMPLE = (*LARGE, "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter", "metrics", "bytes")

# What two sides must share; the number says how deep a value is a table of tasks, of which the common ones count.
SETTINGS = {"shots": 1, "version": 1, "parts": 0, "documents": 0, "limit": 0, "task": 2, "filters": 2, "generation": 1}
SETTINGS |= dict.fromkeys(("gen_kwargs", "chat_template", "system_instruction", "multiturn", "fewshot_seed"), 0)
SETTINGS |= dict.fromkeys(("sampling_seed", "dtype", "max_length"), 0) | {"prompts": 2, "chance": 1}
TASK = ("output_type", "repeats", "doc_to_target", "doc_to_choice")
PROMPT = ("doc_to_text", "description", "target_delimiter", "fewshot_delimiter")
CODE_TEXT = re.compile(r"^\s*(def |@|lambda\b)|<(function|bound method|class) |functools\.partial")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one setting, four names
BUDGET = 256  # lm-eval's, where a task names none
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")  # without effect on greedy generation
DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}

# --- what guessing scores
CHANCE = {  # lm-eval's tasks with so many choices per question, where the task itself does not tell
    r"piqa|winogrande|boolq|copa": 1 / 2,
    r"arc_(easy|challenge)|hellaswag|openbookqa|sciq|mmlu(_stem|_humanities|_other|_social_sciences)?": 1 / 4,
    r"gpqa_(main|diamond|extended)_\w+": 1 / 4,  # letters, those that are generated as well
    r"social_iqa": 1 / 3,
    r"commonsense_qa": 1 / 5,
}
EXACT = ("exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc")  # nobody guesses what is generated
LESS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # is better, where a file does not tell

# --- what tells one model from another
MODEL = ("peft", "delta", "pretrained", "model", "path", "engine")  # lm-eval names a model after the first that it has
USUAL = {"revision": "main", "subfolder": "", "load_in_8bit": False, "load_in_4bit": False, "autogptq": False}
USUAL |= {"gptqmodel": False, "truncation": False, "use_fast_tokenizer": True}
# how a model is run, not which it is; dtype and longest input are settings of a score
INDIFFERENT = {"backend", "base_url", "batch_size", "cache_dir", "data_parallel_size", "device", "device_map", "dtype"}
INDIFFERENT |= {"download_dir", "gpu_memory_utilization", "logits_cache", "low_cpu_mem_usage", "max_batch_size"}
INDIFFERENT |= {"max_cpu_memory", "max_length", "max_memory_per_gpu", "max_model_len", "max_retries", "num_concurrent"}
INDIFFERENT |= {"offload_folder", "parallelize", "pipeline_parallel_size", "swap_space", "tensor_parallel_size"}
INDIFFERENT |= {"timeout", "token", "tokenized_requests", "tp_plan", "trust_remote_code", "use_cache"}


@dataclass
class Results:
    """Scores of one model, read from files.

    scores: {benchmark: {metric: score}}, a metric as lm-eval names it, "acc_norm,none": the metric and the filter of
    the answers.
    smaller: {benchmark: [metrics of which less is better]}.
    settings: {benchmark: {key of `SETTINGS`: value}}; None is recorded as not set, what is not there is not recorded.
    samples: {benchmark: {metric: {document: value}}}, a document as the hash of its content and its number among equal
    ones.
    prompts: {benchmark: {document: hash of the prompt}}.
    longest: {benchmark: bytes of its longest input}, an upper bound of its tokens.
    unread: {benchmark: why its samples are not there, in words}.
    fields: the content of the file, for costs.  notes: rules that were applied in reading, in words.
    parts: the same of the tasks of which a group's score consists; None where there is no group.
    """

    name: str
    scores: dict = field(default_factory=dict)
    smaller: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=dict)
    longest: dict = field(default_factory=dict)
    unread: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    parts: "Results | None" = None

    def with_parts(self, tasks):
        """The same with those of `tasks` as benchmarks of their own that only a group holds."""
        extra = [task for task in tasks if self.parts and task not in self.scores and task in self.parts.scores]
        names = ("scores", "smaller", "settings", "samples", "prompts", "longest", "unread") if extra else ()
        chosen = {n: {t: v for t, v in getattr(self.parts, n).items() if t in extra} for n in names}
        return replace(self, **{name: getattr(self, name) | values for name, values in chosen.items()})


# --- files -----------------------------------------------------------------------------------------------------


def read_results(path):
    """Results of lm-eval (0.4.1 to 0.4.13, with their samples) or of this package: a file, or a folder of them.

    A folder may hold several files of one model: what a later one repeats under the same settings replaces the earlier.
    Of groups with a score of their own (mmlu) only that score is a benchmark, those of their parts are kept aside. A
    run's results.json holds its teacher, first, and every student.

    Returns:
        `[Results]`: one model, or a run's teacher and its students in their order.
    Raises:
        EvaluationError: no such file, one of another form, several models, or one benchmark under two settings.
    """
    path = Path(path)
    files = {file: load_object(file) for file in (result_files(path) if path.is_dir() else [path])}
    if path / "results.json" in files and "students" in files[path / "results.json"]:
        files = {path / "results.json": files[path / "results.json"]}  # a run, with the harness's files below it
    elif len(files) > 1:  # others may have such a name
        files = {f: c for f, c in files.items() if f.name.startswith("results_") or of_lm_eval(c)} or files
    file, content = next(iter(files.items()))
    if len(files) == 1 and "students" in content:
        return run_results(content, file)
    if len(files) == 1 and not of_lm_eval(content):
        return [own_results(content, file)]
    if other := [f.name for f, c in files.items() if not of_lm_eval(c)]:
        raise EvaluationError(
            f"{path.name}: {', '.join(other)} holds neither results of lm-eval nor of this package; name files that do"
        )
    if len(models := different_models(files.values())) > 1:
        raise EvaluationError(
            f"{path.name}: results of {len(models)} models ({', '.join(models)}), expected one; name the folder or the file of one"
        )
    ordered = sorted(files.items(), key=lambda item: stamp(*item))
    merged = Results(model_name(ordered[-1][1]) or (path.name if path.is_dir() else path.stem), fields=ordered[-1][1])
    for file, content in ordered:
        read_harness(merged, content, *harness_samples(file, content))
    return [merged]


def result_files(folder):
    """The files in a folder and those below it that may be results: results_DATE.json, NAME_DATE.json (`--output_path
    NAME.json`) and results.json (lm-eval up to 0.4.2, and a run's).
    """
    found = sorted(folder.rglob("*.json"))
    named = [f for f in found if f.name == "results.json" or f.name.startswith("results_") or DATE.search(f.stem)]
    if not named:
        there = f"; there are {', '.join(f.name for f in found[:5])}: name one of them" if found else ""
        raise EvaluationError(
            f"{folder.name}: no results_*.json of lm-eval and no results.json in this folder or below it{there}"
        )
    return named


def stamp(file, content):
    """The date by which a results file is ordered: that in its name, else that inside."""
    date = content.get("date")
    if DATE.search(file.stem) or not isinstance(date, int | float):
        return file.stem.rpartition("_")[2]
    return datetime.fromtimestamp(date).isoformat().replace(":", "-")


def last_part(name):
    """A model's name without the folders before it: no path of a machine reaches a report."""
    return re.split(r"[\\/]", str(name).rstrip("\\/"))[-1]


def of_lm_eval(content):
    return isinstance(content.get("results"), dict) and bool({"configs", "versions", "n-shot"} & set(content))


def load_object(file):
    advice = "name a results file of lm-eval or of this package, or its folder"
    return read_object(
        file, MAX_BYTES, lambda reason: EvaluationError(f"{file.name} cannot be read ({reason}); {advice}")
    )


# --- our own ---------------------------------------------------------------------------------------------------


def run_results(content, file):
    """Teacher and students of a run's results.json; their samples lie beside it, one file each in the folder
    `evaluation`.
    """
    sides = []
    for name, side in {"teacher": content.get("teacher_scores") or {}, **content["students"]}.items():
        results = Results(name, scores=exact_scores(side.get("exact_match") or {}), fields=side)
        file_of = file.parent / "evaluation" / f"{name}.json"
        if last_part(name) == name and file_of.is_file():
            own = own_results(load_object(file_of), file_of)
            results.samples = own.samples if own.scores == results.scores else {}
        sides.append(results)
    return sides


def exact_scores(shares):
    return {task: {"exact_match": share} for task, share in shares.items()}


def own_results(content, file):
    """One model's results of the command `evaluate`, or of the folder `evaluation` of a run."""
    content = content["result"] if isinstance(content.get("result"), dict) else content
    if not isinstance(content.get("exact_match"), dict):
        raise EvaluationError(
            f"{file.name} holds neither results of lm-eval nor of this package: expected results, exact_match or students"
        )
    results = Results(file.stem, scores=exact_scores(content["exact_match"]), fields=content)
    for task, samples in (content.get("samples") or {}).items():
        keys = document_keys([digest(f"{s['prompt']}\0{s['answer']}") for s in samples])
        results.samples[task] = {
            "exact_match": {key: float(s["correct"]) for key, s in zip(keys, samples, strict=True)}
        }
    return results


# --- which model -----------------------------------------------------------------------------------------------


def arguments(given):
    """lm-eval's arguments of a model or of generation as {name: value}: a table, JSON, or "name=value,name=value".
    Those that are not set ("", None, "None", {}) are left out.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            pairs = (pair.partition("=") for pair in given.split(","))
            given = {key.strip(): value for key, sign, value in pairs if sign}
    given = given if isinstance(given, dict) else {}
    given = {key: value if key == "until" else plain(value) for key, value in given.items()}
    return {key: value for key, value in given.items() if value not in (None, "", {}, [])}


def plain(value):
    """A value that was written as text as what it says: "True", "none", "1.0"."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    with suppress(ValueError):
        return float(text)
    return text


def same_place(value):
    """One spelling of a directory, however it was named; other values as they are."""
    if not isinstance(value, str):
        return value
    with suppress(OSError, RuntimeError, ValueError):
        if (place := Path(value).expanduser()).exists():
            return str(place.resolve())
    trimmed = value.rstrip("/")
    return trimmed.removeprefix("./") if trimmed else value


def model_name(content):
    """A model's name as lm-eval makes it of its arguments, without folders; None where nothing names it."""
    told = arguments((content.get("config") or {}).get("model_args"))
    name = content.get("model_name") or next((told[key] for key in MODEL if key in told), None)
    return last_part(name) if name else None


def identity(content):
    """What tells a model from others: {"arguments": as they were given, "name", and the commits that the hub had}."""
    run = content.get("config") or {}
    told = {k: same_place(v) for k, v in arguments(run.get("model_args")).items() if k not in INDIFFERENT}
    found = {"arguments": {k: v for k, v in told.items() if v != USUAL.get(k)} or None}
    found["name"] = None if found["arguments"] else same_place(content.get("model_name"))
    return found | {key: run.get(key) or None for key in ("model_sha", "peft_sha", "delta_sha")}


def different_models(contents):
    """A name for each model among results files; names that would be the same tell what differs."""
    models = []  # (identity, name)
    for content in contents:
        mine, name = identity(content), model_name(content) or "no name"
        for its, other in models:
            if any(mine[key] and its[key] and mine[key] != its[key] for key in mine):
                continue
            named = mine["arguments"] and its["arguments"]
            if named or (mine["name"] == its["name"] if mine["name"] and its["name"] else name == other):
                break
        else:
            models.append((mine, name))
    counts = Counter(name for _, name in models)
    common = set.intersection(*({str(p) for p in (m["arguments"] or {}).items()} for m, _ in models))
    texts = []
    for mine, name in models:
        own = {k: v for k, v in (mine["arguments"] or {}).items() if str((k, v)) not in common}
        own = own or {key: mine[key] for key in ("model_sha", "peft_sha", "delta_sha", "name") if mine[key]}
        told = " ".join(f"{key}={value}" for key, value in own.items())
        texts.append(f"{name} ({told})" if counts[name] > 1 and told else name)
    return texts


# --- a results file of lm-eval ---------------------------------------------------------------------------------


def read_harness(results, content, samples, unread):
    """Add what one results file of lm-eval holds; `samples` and `unread` as `harness_samples` returns them."""
    groups, parts = set(content.get("groups") or {}), content.get("group_subtasks") or {}
    entries = content["results"] | {
        g: v for g, v in (content.get("groups") or {}).items() if g not in content["results"]
    }

    def leaves(task):
        return [leaf for part in parts[task] for leaf in leaves(part)] if parts.get(task) else [task]

    hidden = {name for group in groups for name in descendants(group, parts)}
    for task in [t for t in entries if t in groups or not parts.get(t)]:
        scores = {
            k: v
            for k, v in entries[task].items()
            if "," in k and "_stderr," not in k and isinstance(v, int | float) and not isinstance(v, bool)
        }
        if not scores:
            continue
        if task in hidden:
            results.parts = results.parts or Results(results.name)
        add_benchmark(results.parts if task in hidden else results, content, task, leaves(task), scores, samples)
        if why := [unread[leaf] for leaf in leaves(task) if leaf in unread]:
            (results.parts if task in hidden else results).unread[task] = why[0]


def add_benchmark(results, content, task, leaves, scores, samples):
    """Add one benchmark; EvaluationError where the same was read before under other settings."""
    settings = shared_settings(content, task, leaves)
    if task in results.scores:
        differ = different(results.settings[task], settings)
        if others := sorted(set(differ) - {"documents", "limit"}):
            told = "; ".join(f"{key} {differ[key][0]!r} and {differ[key][1]!r}" for key in others)
            raise EvaluationError(
                f"{task}: two results of {results.name} in one folder, with different settings ({told}); "
                "name the file of the one that is meant, or move the other away"
            )
        results.notes.append(f"{task}: the later of two results of {results.name} is used")
    better = (content.get("higher_is_better") or {}).get(task) or {}
    results.scores[task], results.settings[task] = scores, settings
    told = {k: better.get(k.split(",")[0]) for k in scores}
    results.smaller[task] = [
        k for k, more in told.items() if more is False or (more is None and k.split(",")[0] in LESS)
    ]
    results.samples[task], results.prompts[task] = {}, {}
    results.unread.pop(task, None)
    lengths = [samples[leaf][2] if leaf in samples else None for leaf in leaves]
    results.longest[task] = None if None in lengths else max(lengths)
    for leaf in leaves:
        metrics, prompts, _ = samples.get(leaf, ({}, {}, None))
        for metric, values in metrics.items():
            here = results.samples[task].setdefault(metric, {})
            here.update({(leaf, *key): value for key, value in values.items()})
        results.prompts[task].update({(leaf, *key): value for key, value in prompts.items() if value})


def descendants(group, parts):
    return {name for part in parts.get(group) or () for name in (part, *descendants(part, parts))}


# --- settings --------------------------------------------------------------------------------------------------


def shared_settings(content, task, leaves):
    """What student and teacher must share to be compared on a task: entries of `SETTINGS`, in one spelling.

    None is recorded as not set; what the file does not record is left out. What has no effect here is left out as well:
    several turns without a chat template, seeds where nothing is drawn, generation where nothing is generated.
    """
    run, configs = (
        content.get("config") or {},
        {leaf: (content.get("configs") or {}).get(leaf) or {} for leaf in leaves},
    )
    told, counts = arguments(run.get("model_args")), content.get("n-samples") or {}
    settings = {"shots": shots_of(content, task, configs)}
    versions = {leaf: plain((content.get("versions") or {}).get(leaf)) for leaf in leaves}
    # "Yaml" and "N/A" stand where a task has no version
    settings["version"] = {leaf: v for leaf, v in versions.items() if v not in (None, "Yaml", "N/A")}
    settings["parts"] = sorted(leaves) if leaves != [task] else None
    if all((counts.get(leaf) or {}).get("effective") is not None for leaf in leaves):
        settings["documents"] = sum(counts[leaf]["effective"] for leaf in leaves)
    # up to 0.4.2 the same tasks were written in other words, and nothing told which metrics are to be high
    later = "higher_is_better" in content
    for key, names in (("task", TASK if later else TASK[:2]), ("prompts", PROMPT if later else ())):
        settings[key] = {leaf: texts for leaf, config in configs.items() if (texts := task_texts(config, names))}
    settings["filters"] = {
        leaf: {f["name"]: json.loads(ADDRESS.sub("", json.dumps(f.get("filter")))) for f in config["filter_list"]}
        for leaf, config in configs.items()
        if config.get("filter_list")
    }
    generates = [leaf for leaf, c in configs.items() if c.get("output_type", "generate_until") == "generate_until"]
    settings["generation"] = {
        leaf: generation(configs[leaf]["generation_kwargs"])
        for leaf in generates
        if "generation_kwargs" in configs[leaf]
    }
    told_chance = {leaf: (config.get("metadata") or {}).get("chance") for leaf, config in configs.items()}
    settings["chance"] = {leaf: c for leaf, c in told_chance.items() if isinstance(c, int | float)}
    settings["dtype"] = DTYPES.get(kind := dtype_of(run, told), kind)
    # our long-context tasks have room for the whole input whatever the model's longest is
    ours = all({"samples", "depths", "length"} <= set(config.get("metadata") or ()) for config in configs.values())
    longest = content.get("max_length") or told.get("max_length") or told.get("max_model_len")
    settings["max_length"] = longest if isinstance(longest, int | float) and not ours else None
    settings = {key: value for key, value in settings.items() if value not in (None, {})}
    # from here on None says that there is none
    if "limit" in run:
        settings["limit"] = run["limit"] or None
    if "gen_kwargs" in run and generates:
        settings["gen_kwargs"] = generation(run["gen_kwargs"]) or None
    for key in ("chat_template", "system_instruction"):
        if f"{key}_sha" in content or key in content:
            text, shortened = (v if v not in ("", "None", {}) else None for v in map(content.get, (key, f"{key}_sha")))
            settings[key] = shortened or (digest(text) if text else None)
    turns = content.get("fewshot_as_multiturn")
    if isinstance(turns, bool) and settings.get("chat_template") and settings.get("shots") != 0:
        settings["multiturn"] = turns
    ordered = all((c.get("fewshot_config") or {}).get("sampler") == "first_n" for c in configs.values())
    if settings.get("shots") and not ordered and run.get("fewshot_seed") is not None:
        settings["fewshot_seed"] = run["fewshot_seed"]
    kinds = [*settings.get("generation", {}).values(), settings.get("gen_kwargs") or {}]
    if run.get("torch_seed") is not None and any("do_sample" in kind or "temperature" in kind for kind in kinds):
        settings["sampling_seed"] = run["torch_seed"]
    return settings


def shots_of(content, task, configs):
    """The number of examples before a question: one number, {task: number} where the parts of a group differ, or None."""
    numbers = content.get("n-shot") or {}
    shots = {leaf: numbers.get(leaf, config.get("num_fewshot")) for leaf, config in configs.items()}
    # examples that a task has in its text: up to 0.4.11 n-shot counts them
    shots = {leaf: n or (configs[leaf].get("metadata") or {}).get("num_fewshot", n) for leaf, n in shots.items()}
    shots = {leaf: n for leaf, n in shots.items() if n is not None}
    if len(set(shots.values())) > 1:
        return shots
    return next(iter(shots.values()), numbers.get(task))


def chance_of(settings, task, metric):
    """What guessing scores on a benchmark of which more is better, as a share: what its tasks record (`metadata:
    {chance: 0.25}`), one of its choices, or what is known of lm-eval's own. A group has the mean of its parts; None
    where nothing tells.

    Args:
        settings: of `Results`, for this benchmark.  metric: such as "acc_norm,none".
    """
    name, texts, told = metric.partition(",")[0], settings.get("task") or {}, settings.get("chance")
    if not told and name.startswith("acc"):
        choices = {leaf: t["doc_to_choice"] for leaf, t in texts.items() if isinstance(t.get("doc_to_choice"), list)}
        told = {leaf: 1 / len(each) for leaf, each in choices.items() if each} if len(choices) == len(texts) else None
    if told:
        return sum(told.values()) / len(told)
    if known := [share for names, share in CHANCE.items() if re.fullmatch(names, task)]:
        return known[0] if name.startswith("acc") or name in EXACT else None
    return 0.0 if name in EXACT else None


def task_texts(config, names):
    """Settings of a task, as far as they are recorded as text or number; functions are written in many ways."""
    texts = {key: config[key] for key in names if isinstance(config.get(key), str | int | float | list)}
    return {key: value for key, value in texts.items() if not (isinstance(value, str) and CODE_TEXT.search(value))}


def generation(given):
    """Settings of generation in one spelling, those that have no effect left out."""
    kwargs = arguments(given)
    if budget := [kwargs.pop(name) for name in BUDGETS if name in kwargs]:
        kwargs["max_gen_toks"] = budget[0]
    if "until" in kwargs:
        stops = kwargs["until"]
        kwargs["until"] = sorted(map(str, stops)) if isinstance(stops, list) else [str(stops)]
    sampled = kwargs.get("do_sample")
    if sampled is False or (sampled is None and not kwargs.get("temperature")):
        kwargs = {key: value for key, value in kwargs.items() if key not in SAMPLING}
    return kwargs


def dtype_of(run, told):
    """The dtype of a model's numbers as lm-eval found it, or as it was asked for; None where neither is recorded."""
    for value in (run.get("model_dtype"), told.get("dtype")):
        if value and value != "auto":
            return str(value).removeprefix("torch.")
    return None


def different(mine, its, kind=None):
    """{setting: (mine, its)} of the settings that both record and that differ.

    Args:
        kind: name of the filter that counts; all that both have if None.
    """
    found = {}
    for key, depth in SETTINGS.items():
        if key not in mine or key not in its:
            continue
        # the number of documents says what a limit did, and the task's own settings hold what gen_kwargs changed
        better = {"limit": "documents", "gen_kwargs": "generation"}.get(key)
        if better and better in mine and better in its:
            continue
        pair = mine[key], its[key]
        if key == "filters" and kind is not None:
            pair = [{leaf: {n: d for n, d in named.items() if n == kind} for leaf, named in v.items()} for v in pair]
        if odd := unlike(*pair, depth):
            found[key] = odd
    return found


def unlike(a, b, depth):
    """`(a, b)` where they differ, reduced to what differs in tables of that depth; None where they agree."""
    if depth and isinstance(a, dict) and isinstance(b, dict):
        pairs = {key: unlike(a[key], b[key], depth - 1) for key in a if key in b}
        mine, its = ({key: pair[j] for key, pair in pairs.items() if pair} for j in (0, 1))
        return (mine, its) if mine else None
    return (a, b) if a != b else None


# --- samples ---------------------------------------------------------------------------------------------------


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def harness_samples(file, content):
    """The samples that belong to a results file.

    Returns:
        `({task: ({metric: {document: value}}, {document: hash of the prompt}, bytes of the longest input or None)},
        {task: why it has none})`.
    """
    tasks = {*(content.get("configs") or ()), *content["results"]}
    rows, unread = {}, {}
    if isinstance(content.get("samples"), dict):  # the object that `simple_evaluate` returns, written as it is
        rows = {task: [slim(row) for row in found] for task, found in content["samples"].items()}
    else:
        date, there = f"_{file.stem.rpartition('_')[2]}.jsonl", {f.name for f in file.parent.iterdir()}
        given = (content.get("config") or {}).get("model_args")
        for task in sorted(tasks):
            old = f"{re.sub('[/=]', '__', given if isinstance(given, str) else '')}_{task}.jsonl"  # up to 0.4.2
            if name := next((name for name in (f"samples_{task}{date}", old) if name in there), None):
                rows[task] = read_samples(file.parent / name)
            elif any(re.match(rf"samples_{re.escape(task)}_[^_]*\.jsonl$", name) for name in there):
                unread[task] = f"samples_{task}_*.jsonl in its folder have another date than {file.name}"
    samples = {}
    for task, found in rows.items():
        filters = [f["name"] for f in ((content.get("configs") or {}).get(task) or {}).get("filter_list") or ()]
        keys = (key.partition(",") for key in content["results"].get(task) or () if "," in key)
        filters = filters or list(dict.fromkeys(kind for name, _, kind in keys if not name.endswith("_stderr")))
        if why := name_filters(found, filters or ["none"]):
            unread[task] = why
        else:
            lengths = [row["bytes"] for row in found]
            samples[task] = *sample_values(found), max(lengths) if lengths and None not in lengths else None
    return samples, unread


def read_samples(path):
    """Samples from a file, without their large parts: a line each, or one list (lm-eval up to 0.4.2)."""
    rows, number = [], 1
    try:
        with path.open(encoding="utf-8") as lines:
            if (start := lines.read(1)) == "[":
                return [slim(row) for row in json.loads(start + lines.read())]
            lines.seek(0)
            for line in lines:
                rows += [slim(json.loads(line))] if line.strip() else []
                number += 1
    except (ValueError, AttributeError) as error:
        raise EvaluationError(
            f"{path.name}, line {number}: expected a sample of lm-eval as JSON; restore the file, or remove it"
        ) from error
    return rows


def slim(row):
    """A sample without its large parts, which are hashed as lm-eval does from 0.4.3 on."""
    inputs = [part for each in parts_of(row.get("arguments")) for part in [parts_of(each)]]
    texts = [[text for text in each if isinstance(text, str)] for each in inputs]
    told = {"bytes": max((sum(len(t.encode("utf-8", "replace")) for t in each) for each in texts), default=None)}
    if "doc_hash" not in row and "doc" in row:
        told["doc_hash"] = digest(json.dumps(row["doc"], indent=2, ensure_ascii=False))
    if "prompt_hash" not in row and texts and texts[0]:
        told["prompt_hash"] = digest(texts[0][0])
    return {key: value for key, value in row.items() if key not in LARGE} | told


def parts_of(value):
    """The elements of a list, or of {"arg_0": ...} as lm-eval writes a list."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def name_filters(rows, filters):
    """Say of each sample to which filter it belongs, and which of its numbers are metrics, where it does not (lm-eval up
    to 0.4.5 writes all documents filter by filter). Returns why that cannot be said, or None.
    """
    seen = Counter()
    for number, row in enumerate(rows):
        row.setdefault("metrics", [key for key in row if key not in OF_A_SAMPLE])
        if "filter" not in row:
            document = row.get("doc_id", f"row {number}")
            row["filter"] = filters[min(seen[document], len(filters) - 1)]
            seen[document] += 1
    if odd := [n for n in seen.values() if n != len(filters)]:
        return f"they name no filter, and {odd[0]} of them per document do not fit the filters {', '.join(filters)}"
    if rows and not any(row.get("doc_hash") for row in rows):
        return "they hold neither documents nor hashes of them"
    return None
