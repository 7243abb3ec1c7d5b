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
    write_listed,
)
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.evaluation.significance import LEVEL
from xlstm_hybrid.reports.sections import LONG_CONTEXT, long_context_parts
from xlstm_hybrid.reports.text import NONE, at_chance, c_0_and_alpha, counted, duration, number, percent

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
TAGS = {"distill": "distillation", "merge": "merge"}  # stage: its tag on the Hub
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
        results: those of the run that evaluated it (`run.write_report` names the parts); they add the scores of every
            stage. Samples are left out.
    Raises:
        CheckpointError: no record of stages; results whose final student has other scores than the checkpoint's own
            last evaluation.
    """
    directory = Path(directory)
    stages = read_provenance(directory)
    if not stages:
        raise CheckpointError(
            f"{directory.name}: no {PROVENANCE}, expected a record of its stages: a card says only what stages "
            "recorded; for another trainer's student see docs/finetune.md, Card and upload"
        )
    scored, compared = part(last(stages, "evaluate"), "figures"), last(stages, "compare")
    if results is not None:
        check_results(directory, scored, results)
    scored, teacher = without_repeats(scored, compared), teacher_of(stages)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=metadata(stages, scored, compared),
        title=f"A hybrid xLSTM student of {escaped(teacher)}" if teacher else "A hybrid xLSTM student",
        summary=summary(stages),
        figures=figures(directory, scored, compared, results),
        costs=recorded_costs(last(stages, "efficiency")),
        environment=time_and_energy(stages, results),
        stages="\n\n".join(stage_section(n, s) for n, s in enumerate(stages, 1)),
        versions=version_lines(stages),
        limits=limits(stages, scored, compared),
    )
    write_listed(directory, "README.md", re.sub(r"\n{3,}", "\n\n", text).encode())
    return directory / "README.md"


def check_results(directory, scored, results):
    """Raise CheckpointError where the final student of `results` has other scores than the checkpoint."""
    students = results.get("students") or {}
    name = next(reversed(students), None)
    exact, perplexity = (publishable(students.get(name, {}).get(key)) for key in ("exact_match", "perplexity"))
    same = exact == scored.get("exact_match") if exact else scored and perplexity == scored.get("perplexity")
    if not same:
        raise CheckpointError(
            f"{directory.name}: its last evaluation recorded exact match {scored.get('exact_match')}, the results have {exact} for "
            f"their final student {name!r}: they are not of this checkpoint; leave them out, or name the results of its own run"
        )


def without_repeats(scored, compared):
    """The figures of an evaluation without the exact match that the comparison shows again, as tasks of lm-eval:
    `domain_` and the domain's name.
    """
    scores = part(part(compared, "figures"), "scores")
    if not all(scores.get(f"domain_{domain}") == score for domain, score in part(scored, "exact_match").items()):
        return scored
    repeated = ("exact_match", "teacher_exact_match", "recovery", "c_0", "alpha_star", "resampled")
    return {key: value for key, value in scored.items() if key not in repeated}


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


def model_index(stages, scored, compared):
    """The scores of the checkpoint's own evaluations as the Hub reads them."""
    scores_of = {}
    for kind in ("exact_match", "perplexity"):
        for domain, score in part(scored, kind).items():
            scores_of.setdefault(domain, []).append((kind, kind.replace("_", " "), score))
    for task, score in part(part(compared, "figures"), "scores").items():
        metric = part(part(compared, "config"), "metrics").get(task, "score")
        scores_of.setdefault(task, []).append((metric.split(",")[0], metric, score))
    results, task = [], {"type": "text-generation"}
    for domain, scores in scores_of.items():
        metrics = [{"type": kind, "name": name, "value": score} for kind, name, score in scores if score is not None]
        if metrics:
            results.append({"task": task, "dataset": {"name": domain, "type": domain}, "metrics": metrics})
    name = f"xlstm-hybrid student of {teacher_of(stages) or 'a Transformer'}"
    return [{"name": name, "results": results}] if results else []


def metadata(stages, scored, compared):
    """The card's YAML block; values are JSON, which YAML reads as it is."""
    names, teacher, named = {s["stage"].split(":")[0] for s in stages}, teacher_of(stages), licences(stages)
    tags = ["xlstm-hybrid", "xlstm", *(tag for stage, tag in TAGS.items() if stage in names)]
    entries = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if teacher and HUB_ID.fullmatch(teacher):
        entries |= {"base_model": teacher, "base_model_relation": "finetune"}
    if len(named) == 1:
        entries["license"] = named[0]
    entries |= {"datasets": found} if (found := data_sets(stages)) else {}
    entries |= {"model-index": found} if (found := model_index(stages, scored, compared)) else {}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in entries.items())


def summary(stages):
    """What it is, as far as conversion recorded it."""
    stage, teacher = converted(stages), teacher_of(stages)
    config, parameters = part(stage, "config"), part(part(stage, "figures"), "parameters")
    lists = {key: config.get(key) for key in ("layer_types", "layer_windows", "layer_sinks", "kept_groups")}
    kinds, windows, sinks, groups = (value if isinstance(value, list) else None for value in lists.values())
    facts = [f"a student of the Transformer {escaped(teacher)}"] if teacher else []
    if count := parameters.get("student"):
        facts.append(f"{count:,} parameters, of these {parameters.get('new', 0):,} that its teacher does not have")
    if kinds is not None:
        facts.append("layers: " + ", ".join(f"{count} {escaped(kind)}" for kind, count in Counter(kinds).items()))
    if windows is not None:
        of_sinks = f", sink tokens per layer: {escaped(', '.join(map(str, sinks)))}" if sinks else ""
        facts.append(f"windows per layer: {escaped(', '.join(map(str, windows)))} tokens{of_sinks}")
    elif config.get("sliding_window"):
        facts.append(
            f"a window of {config['sliding_window']} tokens and {config.get('num_sink_tokens', 0)} sink tokens in its hybrid layers"
        )
    if config.get("memory_feature_dim"):
        facts.append(f"{config['memory_feature_dim']} features per head of its memory")
    if groups is not None:
        count = sum(len(mine) for mine in groups if isinstance(mine, list))
        facts.append(f"{count} key/value groups of them keep full attention")
    if config.get("sparse_memory"):
        facts.append(f"an exact memory of {config['sparse_memory']} tokens per key/value group")
    return "A causal language model of the xLSTM hybrid architecture" + (": " + "; ".join(facts) if facts else "") + "."


def recorded_comparison(compared):
    """Scores of the last recorded comparison with the teacher; [] where there is none."""
    config, figures = part(compared, "config"), part(compared, "figures")
    metrics, shots, teacher, recovery = (
        part(of, key)
        for of, key in ((config, "metrics"), (config, "shots"), (figures, "teacher_scores"), (figures, "recovery"))
    )
    rows = [
        [
            at_chance(t, config.get("chance"), config.get("counts")),
            f"{metrics.get(t) or NONE}{' (less is better)' if t in config.get('smaller', ()) else ''}",
            *map(number, (shots.get(t), score, teacher.get(t))),
            percent(recovery.get(t)),
        ]
        for t, score in part(figures, "scores").items()
    ]
    if not rows:
        return []
    verdict = c_0_and_alpha(figures) + (RESAMPLED if figures.get("resampled") else "")
    text = f"{figures['wins']} won, {figures['ties']} tied, {figures['losses']} lost; {verdict}"
    if figures["lossless"] is not None:
        count = f"; {how_many}" if (how_many := counted(config.get("counts"))) else ""
        no, c_alpha = "" if figures["lossless"] else "not ", f"{figures['c_alpha']:.3f}"
        text += f"; at α = {config['alpha']:g} it is {no}lossless (C_α = {c_alpha}, the bar is 0.5{count})"
    text += "."
    head = ["benchmark", "metric", "shots", "score", config.get("teacher", "teacher"), "recovery"]
    title = "Benchmarks, teacher and student alike:"
    if differed := [escaped(d) for d in config.get("differences") or ()]:
        title = f"Benchmarks, against the teacher; what differed: {'; '.join(differed)}."
    return [title, markdown_table([head, *rows]), text]


def figures(directory, scored, compared, results):
    """Scores of the checkpoint's own evaluations, and of the stages before them where results are given."""
    benchmarks, far = recorded_comparison(compared), scored.get(LONG_CONTEXT)
    if not scored:
        return "\n\n".join(["## Figures", *benchmarks]) if benchmarks else ""
    columns = (
        ("exact match", "exact_match", percent),
        ("of the teacher", "teacher_exact_match", percent),
        ("recovery", "recovery", percent),
        ("perplexity", "perplexity", number),
        ("teacher's perplexity", "teacher_perplexity", number),
        ("KL to the teacher", "kl", number),
        ("same most likely token", "top1", percent),
    )
    columns = [(label, part(scored, key), show) for label, key, show in columns if part(scored, key)]
    domains = list(dict.fromkeys(d for _, scores, _ in columns for d in scores))
    rows = [[d, *(show(scores.get(d)) for _, scores, show in columns)] for d in domains]
    parts = ["## Figures", *benchmarks]
    parts += ["Long context:", *long_context_parts(far)] if far else []
    parts += [markdown_table([["domain", *(c[0] for c in columns)], *rows])] if rows else []
    if scored.get("c_0") is not None and scored.get("alpha_star") is not None:
        parts.append(
            f"Win-and-tie rate against the teacher at zero tolerance, and the smallest relative tolerance at which half of the domains are won or "
            f"tied: {c_0_and_alpha(scored)}{RESAMPLED if scored.get('resampled') else ''}."
        )
    if results is not None:
        students = {name: s["exact_match"] for name, s in results["students"].items() if s.get("exact_match")}
        known = [d for d in domains if any(d in scores for scores in students.values())]
        rows = [[d, *(percent(scores.get(d)) for scores in students.values())] for d in known]
        parts += ["Exact match after each stage:", markdown_table([["domain", *students], *rows])] if rows else []
        pictures = [path for path in sorted(directory.glob("*.png")) if re.fullmatch(r"[\w.-]+", path.name)]
        parts += [f"![{escaped(path.stem.replace('_', ' '))}]({path.name})" for path in pictures]
    return "\n\n".join(parts)


def recorded_costs(stage):
    """What the last efficiency report recorded; "" where there is none."""
    rows, config = part(stage, "figures").get("rows"), part(stage, "config")
    if not rows:
        return ""
    where = escaped(config.get("gpu") or config.get("cpu") or "machine unknown")
    text = (
        f"{where}, {escaped(config.get('dtype', NONE))}; times are {escaped(config.get('clock', NONE))}; {config.get('checks_passed', 0)} checks "
        "passed before anything was measured. Gain: how much less, or faster, than the teacher; above 1 the student is ahead."
    )
    table = [["figure", "tokens", "batch", "teacher", "student", "gain"]]
    for what, key, factor in COSTS:
        for row in rows:
            values = [
                (row.get(f"{side}_{key}"), k) for side, k in (("teacher", factor), ("student", factor), ("gain", 1))
            ]
            cells = (NONE if x is None else number(float(x * scale)) for x, scale in values)
            table.append([what, number(row["tokens"]), row["batch"], *cells])
    return f"## Cost beside the teacher\n\n{text}\n\n{markdown_table(table)}"


def stage_section(position, stage):
    """One stage: where it started, its settings, its data, its figures."""
    parent, seconds = stage.get("parent"), stage.get("seconds")
    began = ([f"from {escaped(parent)}"] if parent else []) + ([f"{seconds:,.1f} s"] if seconds is not None else [])
    parts = [f"### {position}. {escaped(stage['stage'])}", ", ".join(began)]
    for name, label in (("config", "setting"), ("data", "data"), ("figures", "figure")):
        if stage.get(name) and not (name == "figures" and stage["stage"] in SECTIONS):
            rows, tables = flattened(stage[name] if isinstance(stage[name], dict) else {name: stage[name]})
            parts += [markdown_table([[label, "value"], *rows])] if rows else []
            parts += [f"{escaped(key)}:\n\n{markdown_table(table)}" for key, table in tables]
    return "\n\n".join(p for p in parts if p)


def flattened(values, prefix=""):
    """Nested settings as rows (dotted name, text), and lists of records as tables (dotted name, rows)."""
    rows, tables = [], []
    for key, value in values.items():
        name = f"{prefix}.{key}".strip(".")
        if isinstance(value, dict):
            inner = flattened(value, name)
            rows += inner[0]
            tables += inner[1]
        elif not isinstance(value, list):
            rows.append((name, number(value)))
        elif value and all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value):
            tables.append((name, [list(value[0]), *([number(v) for v in record.values()] for record in value)]))
        else:
            rows.append((name, listed(value)))
    return rows, tables


def listed(values):
    """A list in few words: equal entries are counted, a long one is cut."""
    counts = Counter(map(number, values))
    entries = [entry if count == 1 else f"{count} × {entry}" for entry, count in counts.items()]
    more = f", and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(entries[:SHOWN]) + more if entries else NONE


def time_and_energy(stages, results):
    """What making it took, as far as it was recorded."""
    rows = [[s["stage"], duration(s["seconds"])] for s in stages if s.get("seconds") is not None]
    rows = [row for row in rows if row[0] != "evaluate"]
    parts = [
        "## Time and energy",
        markdown_table([["stage", "time"], *rows]) if rows else "No stage recorded its time.",
    ]
    noted = [
        [f"{s['stage']}: {label}", number(value)]
        for s in stages
        for key, label in ENERGY.items()
        if (value := recorded_value(s, key)) is not None
    ]
    if results is not None and results.get("peak_memory_mib") is not None:
        noted.append(["run: peak memory, MiB", number(results["peak_memory_mib"])])
    parts += [markdown_table([["recorded", "value"], *noted])] if noted else []
    if not any(recorded_value(s, key) is not None for s in stages for key in ("energy_kwh", "co2_kg")):
        parts.append("No stage recorded its energy or emissions.")
    return "\n\n".join(parts)


def recorded_value(stage, key):
    """An entry of a stage's figures or settings; None where there is none."""
    values = [part(stage, name).get(key) for name in ("figures", "config")]
    return next((x for x in values if isinstance(x, int | float | str) and not isinstance(x, bool)), None)


def version_lines(stages):
    """Versions of what ran, one line per set of them."""
    stages_of = {}
    for stage in stages:
        if text := ", ".join(f"{name} {v}" for name, v in part(stage, "versions").items()):
            stages_of.setdefault(text, []).append(stage["stage"])
    return "\n".join(f"Made with {escaped(text)}: {escaped(', '.join(names))}." for text, names in stages_of.items())


def limits(stages, scored, compared):
    """What the record does not support."""
    config, named = part(converted(stages), "config"), licences(stages)
    recovery = part(scored, "recovery") | part(part(compared, "figures"), "recovery")
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
    if scored or compared:
        lines.append("It was evaluated on the tasks above and on nothing else.")
    else:
        lines.append("No stage recorded an evaluation: nothing is known about its quality.")
    if below:
        lines.append(f"It scores below its teacher on: {', '.join(map(escaped, below))}.")
    if len(named) > 1:
        lines.append(f"Its stages name several licences ({', '.join(map(escaped, named))}): all of them apply.")
    elif not named:
        lines.append("No stage recorded a licence: that of its teacher and of the data apply.")
    lines.append("No stage recorded any training for safety: expect of it what you expect of its teacher.")
    return "\n".join(f"- {text}" for text in lines)
