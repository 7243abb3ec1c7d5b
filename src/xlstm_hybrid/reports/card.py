"""The model card of a checkpoint, printed from what its stages recorded: it has no other source of facts."""

import json
import re
from collections import Counter
from pathlib import Path
from string import Template

from xlstm_hybrid.checkpoint.files import (
    PROVENANCE,
    escaped,
    markdown_table,
    publishable,
    read_provenance,
    relist,
    write_file,
)
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.evaluation.comparison import NONE, c_0_and_alpha, duration, percent
from xlstm_hybrid.evaluation.significance import LEVEL
from xlstm_hybrid.reports.sections import EXPLAINED, LONG_CONTEXT, long_context_table

TEMPLATE = Path(__file__).with_name("card_template.md")
SECTIONS = ("evaluate", "compare", "efficiency")  # stages whose figures stand in a section of their own
RESAMPLED = f" (in brackets: {percent(LEVEL)} of resamples of the answers)"
SHOWN = 8  # entries of a list that are written out
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zst)$")
COSTS = (
    ("cache, MB", "cache_bytes", 1e-6),
    ("decoding, tokens/s", "tokens_per_second", 1),
    ("first token, ms", "first_token_s", 1e3),
)
ENERGY = {
    "energy_kwh": "energy, kWh",
    "co2_kg": "CO2 equivalent, kg",
    "peak_memory_mib": "peak memory, MiB",
    "device": "device",
    "gpus": "GPUs",
    "tokens": "tokens",
}


def write_card(directory, results=None):
    """Write `README.md`, the model card of a checkpoint, from its provenance.json; returns its path.

    Args:
        directory: of the checkpoint.
        results: those of the run that judged it (`report.write_report` names the parts); they add the scores of every
            stage. Samples are left out.
    Raises:
        CheckpointError: no record of stages; results whose final student has other scores than the checkpoint's own
            last evaluation.
    """
    directory = Path(directory)
    stages = read_provenance(directory)
    if not stages:
        raise CheckpointError(
            f"{directory.name}: no {PROVENANCE}, expected a record of its stages: a card says only what stages recorded"
        )
    judged, compared = part(last(stages, "evaluate"), "figures"), last(stages, "compare")
    if results is not None:
        check_results(directory, judged, results)
    judged = without_repeats(judged, compared)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=metadata(stages, judged, compared),
        title=title(stages),
        summary=summary(stages),
        figures=figures(directory, judged, compared, results),
        costs=costs(last(stages, "efficiency")),
        environment=environment(stages, results),
        stages="\n\n".join(describe(n, s) for n, s in enumerate(stages, 1)),
        versions=versions(stages),
        limits=limits(stages, judged, compared),
    )
    write_file(directory / "README.md", re.sub(r"\n{3,}", "\n\n", text).encode())
    relist(directory, "README.md")
    return directory / "README.md"


def check_results(directory, judged, results):
    students = results.get("students") or {}
    name = next(reversed(students), None)
    found = publishable(students[name].get("exact_match")) if name else None
    same = (
        found == judged.get("exact_match")
        if found
        else judged and publishable(students.get(name, {}).get("perplexity")) == judged.get("perplexity")
    )
    if not same:
        raise CheckpointError(
            f"{directory.name}: its last evaluation recorded exact match {judged.get('exact_match')}, the results have {found} for "
            f"their final student {name!r}: they are not of this checkpoint; leave them out, or name the results of its own run"
        )


def without_repeats(judged, compared):
    """The figures of an evaluation without the exact match that the comparison shows again, as tasks of lm-eval:
    `domain_` and the domain's name.
    """
    scores = part(part(compared, "figures"), "scores")
    if not all(scores.get(f"domain_{domain}") == score for domain, score in part(judged, "exact_match").items()):
        return judged
    repeated = ("exact_match", "teacher_exact_match", "recovery", "c_0", "alpha_star", "resampled")
    return {key: value for key, value in judged.items() if key not in repeated}


# --- parts of the card -----------------------------------------------------------------------------------------


def part(stage, name):
    """One part of a stage's record; {} where there is none."""
    return stage[name] if isinstance(stage.get(name), dict) else {}


def last(stages, name):
    """The last stage of a name, {} where there is none."""
    return next((s for s in reversed(stages) if s["stage"] == name), {})


def converted(stages):
    """The stage that made a student of a teacher, {} where there is no record of it."""
    return next((s for s in stages if s["stage"] == "convert"), {})


def teacher_of(stages):
    stage = converted(stages)
    return part(stage, "config").get("teacher") or stage.get("parent")


def licences(stages):
    """Licences that stages name in their settings or data, each once."""
    named = [part(s, name).get(key) for s in stages for name in ("config", "data") for key in ("license", "licence")]
    return list(dict.fromkeys(str(n) for n in named if n))


def data_sets(stages):
    """Hub ids of the data that stages read: the paths of their sources."""

    def sources(value):
        for key, inner in value.items() if isinstance(value, dict) else ():
            if key == "sources" and isinstance(inner, dict):
                yield from (s["path"] for s in inner.values() if isinstance(s, dict) and isinstance(s.get("path"), str))
            else:
                yield from sources(inner)

    named = [path for stage in stages for name in ("config", "data") for path in sources(part(stage, name))]
    return list(dict.fromkeys(path for path in named if HUB_ID.fullmatch(path) and not DATA_FILE.search(path)))


def model_index(stages, judged, compared):
    """The scores of the checkpoint's own evaluations as the Hub reads them."""
    found, results = {}, []
    for kind in ("exact_match", "perplexity"):
        for domain, score in part(judged, kind).items():
            found.setdefault(domain, []).append((kind, kind.replace("_", " "), score))
    for task, score in part(part(compared, "figures"), "scores").items():
        metric = part(part(compared, "config"), "metrics").get(task, "score")
        found.setdefault(task, []).append((metric.split(",")[0], metric, score))
    for domain, scores in found.items():
        metrics = [{"type": kind, "name": name, "value": score} for kind, name, score in scores if score is not None]
        if metrics:
            results.append(
                {"task": {"type": "text-generation"}, "dataset": {"name": domain, "type": domain}, "metrics": metrics}
            )
    return (
        [{"name": f"xlstm-hybrid student of {teacher_of(stages) or 'a Transformer'}", "results": results}]
        if results
        else []
    )


def metadata(stages, judged, compared):
    """The card's YAML block; values are JSON, which YAML reads as it is."""
    names, teacher, named = {s["stage"].split(":")[0] for s in stages}, teacher_of(stages), licences(stages)
    entries = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "xlstm-hybrid",
            "xlstm",
            *(["distillation"] if "distill" in names else []),
            *(["merge"] if "merge" in names else []),
        ],
    }
    if teacher and HUB_ID.fullmatch(teacher):
        entries |= {"base_model": teacher, "base_model_relation": "finetune"}
    if len(named) == 1:
        entries["license"] = named[0]
    entries |= {"datasets": found} if (found := data_sets(stages)) else {}
    entries |= {"model-index": found} if (found := model_index(stages, judged, compared)) else {}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in entries.items())


def title(stages):
    teacher = teacher_of(stages)
    return f"A hybrid xLSTM student of {escaped(teacher)}" if teacher else "A hybrid xLSTM student"


def summary(stages):
    """What it is, as far as conversion recorded it."""
    config, parameters = part(converted(stages), "config"), part(part(converted(stages), "figures"), "parameters")
    facts = [f"a student of the Transformer {escaped(teacher_of(stages))}"] if teacher_of(stages) else []
    if parameters.get("student"):
        facts.append(
            f"{parameters['student']:,} parameters, of these {parameters.get('new', 0):,} that its teacher does not have"
        )
    if isinstance(config.get("layer_types"), list):
        facts.append(
            "layers: " + ", ".join(f"{count} {escaped(kind)}" for kind, count in Counter(config["layer_types"]).items())
        )
    if isinstance(config.get("layer_windows"), list):
        sinks = config.get("layer_sinks") if isinstance(config.get("layer_sinks"), list) else []
        facts.append(
            f"windows per layer: {escaped(', '.join(map(str, config['layer_windows'])))} tokens"
            + (f", sink tokens per layer: {escaped(', '.join(map(str, sinks)))}" if sinks else "")
        )
    elif config.get("sliding_window"):
        facts.append(
            f"a window of {config['sliding_window']} tokens and {config.get('num_sink_tokens', 0)} sink tokens in its hybrid layers"
        )
    if config.get("memory_feature_dim"):
        facts.append(f"{config['memory_feature_dim']} features per head of its memory")
    if isinstance(config.get("kept_groups"), list):
        facts.append(
            f"{sum(len(mine) for mine in config['kept_groups'] if isinstance(mine, list))} key/value groups of them keep full attention"
        )
    if config.get("sparse_memory"):
        facts.append(f"an exact memory of {config['sparse_memory']} tokens per key/value group")
    return "A causal language model of the xLSTM hybrid architecture" + (": " + "; ".join(facts) if facts else "") + "."


def benchmarks(compared):
    """Scores of the last recorded comparison with the teacher; [] where there is none."""
    config, found = part(compared, "config"), part(compared, "figures")
    rows = [
        [
            task,
            part(config, "metrics").get(task),
            part(config, "shots").get(task),
            score,
            part(found, "teacher_scores").get(task),
        ]
        for task, score in part(found, "scores").items()
    ]
    if not rows:
        return []
    shown = [
        [t, m or NONE, number(n), number(s), number(x), percent(part(found, "recovery").get(t))]
        for t, m, n, s, x in rows
    ]
    text = (
        f"{found['wins']} won, {found['ties']} tied, {found['losses']} lost; {c_0_and_alpha(found)}{RESAMPLED if found.get('resampled') else ''}; "
        f"at α = {config['alpha']:g} it is {'' if found['lossless'] else 'not '}lossless (C_α = {found['c_alpha']:.3f}, the bar is 0.5)."
    )
    head = ["benchmark", "metric", "shots", "score", config.get("teacher", "teacher"), "recovery"]
    differed = [escaped(d) for d in config.get("differences") or ()]
    title = (
        f"Benchmarks, against the teacher; what differed: {'; '.join(differed)}."
        if differed
        else "Benchmarks, teacher and student alike:"
    )
    return [title, markdown_table([head, *shown]), text]


def figures(directory, judged, compared, results):
    """Scores of the checkpoint's own evaluations, and of the stages before them where results are given."""
    if not judged:
        return "\n\n".join(["## Figures", *found]) if (found := benchmarks(compared)) else ""
    far = judged.get(LONG_CONTEXT)
    far = ["Long context:", long_context_table(far), EXPLAINED] if far else []
    columns = (
        ("exact match", "exact_match", percent),
        ("of the teacher", "teacher_exact_match", percent),
        ("recovery", "recovery", percent),
        ("perplexity", "perplexity", number),
        ("teacher's perplexity", "teacher_perplexity", number),
    )
    columns = [(label, part(judged, key), show) for label, key, show in columns if part(judged, key)]
    domains = list(dict.fromkeys(d for _, scores, _ in columns for d in scores))
    rows = [[d, *(show(scores.get(d)) for _, scores, show in columns)] for d in domains]
    parts = ["## Figures", *benchmarks(compared), *far]
    parts += [markdown_table([["domain", *(c[0] for c in columns)], *rows])] if rows else []
    if judged.get("c_0") is not None and judged.get("alpha_star") is not None:
        parts.append(
            f"Win-and-tie rate against the teacher at zero tolerance, and the smallest relative tolerance at which half of the domains are won or "
            f"tied: {c_0_and_alpha(judged)}{RESAMPLED if judged.get('resampled') else ''}."
        )
    if results is not None:
        students = {
            name: scores["exact_match"] for name, scores in results["students"].items() if scores.get("exact_match")
        }
        rows = [
            [d, *(percent(scores.get(d)) for scores in students.values())]
            for d in domains
            if any(d in scores for scores in students.values())
        ]
        parts += ["Exact match after each stage:", markdown_table([["domain", *students], *rows])] if rows else []
        parts += [
            f"![{escaped(p.stem.replace('_', ' '))}]({p.name})"
            for p in sorted(directory.glob("*.png"))
            if re.fullmatch(r"[\w.-]+", p.name)
        ]
    return "\n\n".join(parts)


def costs(stage):
    """What the last efficiency report recorded; "" where there is none."""
    rows, config = part(stage, "figures").get("rows"), part(stage, "config")
    if not rows:
        return ""
    where = escaped(config.get("gpu") or config.get("cpu") or "machine unknown")
    text = (
        f"{where}, {escaped(config.get('dtype', NONE))}; times are {escaped(config.get('clock', NONE))}; {config.get('checks_passed', 0)} checks "
        "passed before anything was measured. Gain: how much less, or faster, than the teacher; above 1 the student is ahead."
    )
    shown = [
        [
            what,
            number(row["tokens"]),
            row["batch"],
            *(
                NONE if (x := row.get(f"{side}_{key}")) is None else number(float(x * scale))
                for side, scale in (("teacher", factor), ("student", factor), ("gain", 1))
            ),
        ]
        for what, key, factor in COSTS
        for row in rows
    ]
    return "\n\n".join(
        [
            "## Cost beside the teacher",
            text,
            markdown_table([["figure", "tokens", "batch", "teacher", "student", "gain"], *shown]),
        ]
    )


def describe(position, stage):
    """One stage: where it started, its settings, its data, its figures."""
    parent, seconds = stage.get("parent"), stage.get("seconds")
    began = ([f"from {escaped(parent)}"] if parent else []) + ([f"{seconds:,.1f} s"] if seconds is not None else [])
    parts = [f"### {position}. {escaped(stage['stage'])}", ", ".join(began)]
    for name, label in (("config", "setting"), ("data", "data"), ("figures", "figure")):
        if stage.get(name) and not (name == "figures" and stage["stage"] in SECTIONS):
            rows, tables = flat(stage[name] if isinstance(stage[name], dict) else {name: stage[name]})
            parts += [markdown_table([[label, "value"], *rows])] if rows else []
            parts += [f"{escaped(key)}:\n\n{markdown_table(table)}" for key, table in tables]
    return "\n\n".join(p for p in parts if p)


def flat(values, prefix=""):
    """Nested settings as rows (dotted name, text), and lists of records as tables (dotted name, rows)."""
    rows, tables = [], []
    for key, value in values.items():
        name = f"{prefix}.{key}".strip(".")
        if isinstance(value, dict):
            inner = flat(value, name)
            rows += inner[0]
            tables += inner[1]
        elif (
            isinstance(value, list)
            and value
            and all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value)
        ):
            tables.append((name, [list(value[0]), *([number(v) for v in record.values()] for record in value)]))
        else:
            rows.append((name, listed(value) if isinstance(value, list) else number(value)))
    return rows, tables


def listed(values):
    """A list in few words: equal entries are counted, a long one is cut."""
    counts = Counter(map(number, values))
    entries = (
        [entry if count == 1 else f"{count} × {entry}" for entry, count in counts.items()]
        if len(counts) < len(values)
        else list(counts)
    )
    return (
        ", ".join(entries[:SHOWN]) + (f", and {len(entries) - SHOWN} more" if len(entries) > SHOWN else "")
        if entries
        else NONE
    )


def environment(stages, results):
    """What making it took, as far as it was recorded."""
    rows = [
        [s["stage"], duration(s["seconds"])]
        for s in stages
        if s.get("seconds") is not None and s["stage"] != "evaluate"
    ]
    parts = (
        ["## Time and energy", markdown_table([["stage", "time"], *rows])]
        if rows
        else ["## Time and energy", "No stage recorded its time."]
    )
    noted = [
        [f"{s['stage']}: {label}", number(value)]
        for s in stages
        for key, label in ENERGY.items()
        if (value := recorded(s, key)) is not None
    ]
    if results is not None and results.get("peak_memory_mib") is not None:
        noted.append(["run: peak memory, MiB", number(results["peak_memory_mib"])])
    parts += [markdown_table([["recorded", "value"], *noted])] if noted else []
    if not any(recorded(s, key) is not None for s in stages for key in ("energy_kwh", "co2_kg")):
        parts.append("No stage recorded its energy or emissions.")
    return "\n\n".join(parts)


def recorded(stage, key):
    """An entry of a stage's figures or settings; None where there is none."""
    found = [part(stage, name).get(key) for name in ("figures", "config")]
    return next((x for x in found if isinstance(x, int | float | str) and not isinstance(x, bool)), None)


def versions(stages):
    """Versions of what ran, one line per set of them."""
    made = {}
    for stage in stages:
        if text := ", ".join(f"{name} {v}" for name, v in part(stage, "versions").items()):
            made.setdefault(text, []).append(stage["stage"])
    return "\n".join(f"Made with {escaped(text)}: {escaped(', '.join(names))}." for text, names in made.items())


def limits(stages, judged, compared):
    """What the record does not support."""
    config, recovery = (
        part(converted(stages), "config"),
        {**part(judged, "recovery"), **part(part(compared, "figures"), "recovery")},
    )
    below = [d for d, r in recovery.items() if r is not None and r < 1]
    lines = []
    if not any(stage["stage"] == "export" for stage in stages):  # an export carries its code
        lines.append(
            "It loads only where the package xlstm-hybrid is imported: transformers alone does not know the architecture."
        )
    if config.get("sliding_window"):
        lines.append(
            f"What lies further back than {config['sliding_window']} tokens reaches its hybrid layers through a state of fixed size (and "
            f"{config.get('num_sink_tokens', 0)} sink tokens): it can be lost, and more easily the more there is to keep."
        )
    if judged or compared:
        lines.append("It was judged on the tasks above and on nothing else.")
    else:
        lines.append("No stage recorded an evaluation: nothing is known about its quality.")
    if below:
        lines.append(f"It scores below its teacher on: {', '.join(map(escaped, below))}.")
    if len(licences(stages)) != 1:
        named = licences(stages)
        lines.append(
            f"Its stages name several licences ({', '.join(map(escaped, named))}): all of them apply."
            if named
            else "No stage recorded a licence: that of its teacher and of the data apply."
        )
    lines.append("No stage recorded any training for safety: expect of it what you expect of its teacher.")
    return "\n".join(f"- {text}" for text in lines)


# --- values as text --------------------------------------------------------------------------------------------


def number(value):
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
