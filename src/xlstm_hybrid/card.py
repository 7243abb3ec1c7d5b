"""The model card of a checkpoint, printed from what its stages recorded: it has no other source of facts."""

import json
import re
from collections import Counter
from pathlib import Path
from string import Template

from xlstm_hybrid.artifacts import PROVENANCE, escaped, markdown_table, plain, read_provenance, write_file
from xlstm_hybrid.errors import CheckpointError

TEMPLATE = Path(__file__).with_name("card_template.md")
SHOWN = 8  # entries of a list that are written out
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NONE = "–"


def write_card(directory, results=None):
    """Write `README.md`, the model card of a checkpoint, from its provenance.json; returns its path.

    Args:
        directory: of the checkpoint.
        results: those of the run that judged it (`report.write_report` names the parts); they add the scores of every stage. Samples are left out.
    Raises:
        CheckpointError: no record of stages; results whose final student has other scores than the checkpoint's own last evaluation.
    """
    directory = Path(directory)
    stages = read_provenance(directory)
    if not stages:
        raise CheckpointError(f"{directory.name}: no {PROVENANCE}, expected a record of its stages: a card says only what stages recorded")
    judged = part(next((s for s in reversed(stages) if s["stage"] == "evaluate"), {}), "figures")
    if results is not None:
        check_results(directory, judged, results)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=metadata(stages),
        title=title(stages),
        summary=summary(stages),
        figures=figures(directory, judged, results),
        stages="\n\n".join(describe(n, s) for n, s in enumerate(stages, 1)),
        versions=versions(stages),
        limits=limits(stages, judged),
    )
    write_file(directory / "README.md", re.sub(r"\n{3,}", "\n\n", text).encode())
    return directory / "README.md"


def check_results(directory, judged, results):
    students = results.get("students") or {}
    name = next(reversed(students), None)
    found = plain(students[name].get("exact_match")) if name else None
    if found is None or found != judged.get("exact_match"):
        raise CheckpointError(
            f"{directory.name}: its last evaluation recorded exact match {judged.get('exact_match')}, the results have {found} for "
            f"their final student {name!r}: they are not of this checkpoint; leave them out, or name the results of its own run"
        )


# --- parts of the card -----------------------------------------------------------------------------------------


def part(stage, name):
    """One part of a stage's record; {} where there is none."""
    return stage[name] if isinstance(stage.get(name), dict) else {}


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


def metadata(stages):
    """The card's YAML block; strings are JSON strings, which YAML reads as they are."""
    names, teacher, named = {s["stage"].split(":")[0] for s in stages}, teacher_of(stages), licences(stages)
    entries = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xlstm-hybrid", "xlstm", *(["distillation"] if "distill" in names else []), *(["merge"] if "merge" in names else [])],
    }
    if teacher and HUB_ID.fullmatch(teacher):
        entries["base_model"] = teacher
    if len(named) == 1:
        entries["license"] = named[0]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in entries.items())


def title(stages):
    teacher = teacher_of(stages)
    return f"A hybrid xLSTM student of {escaped(teacher)}" if teacher else "A hybrid xLSTM student"


def summary(stages):
    """What it is, as far as conversion recorded it."""
    config, parameters = part(converted(stages), "config"), part(part(converted(stages), "figures"), "parameters")
    facts = [f"a student of the Transformer {escaped(teacher_of(stages))}"] if teacher_of(stages) else []
    if parameters.get("student"):
        facts.append(f"{parameters['student']:,} parameters, of these {parameters.get('new', 0):,} that its teacher does not have")
    if isinstance(config.get("layer_types"), list):
        facts.append("layers: " + ", ".join(f"{count} {escaped(kind)}" for kind, count in Counter(config["layer_types"]).items()))
    if config.get("sliding_window"):
        facts.append(f"a window of {config['sliding_window']} tokens and {config.get('num_sink_tokens', 0)} sink tokens in its hybrid layers")
    return "A causal language model of the xLSTM hybrid architecture" + (": " + "; ".join(facts) if facts else "") + "."


def figures(directory, judged, results):
    """Scores of the checkpoint's own evaluation, and of the stages before it where results are given."""
    if not judged:
        return ""
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
    parts = ["## Figures", markdown_table([["domain", *(c[0] for c in columns)], *rows])] if rows else ["## Figures"]
    if judged.get("c_0") is not None and judged.get("alpha_star") is not None:
        parts.append(
            f"Win-and-tie rate against the teacher at zero tolerance: C_0 = {judged['c_0']:.2f}. Smallest relative tolerance at which "
            f"half of the domains are won or tied: α\\* = {judged['alpha_star']:.3f}."
        )
    if results is not None:
        students = {name: scores["exact_match"] for name, scores in results["students"].items() if scores.get("exact_match")}
        rows = [[d, *(percent(scores.get(d)) for scores in students.values())] for d in domains if any(d in scores for scores in students.values())]
        parts += ["Exact match after each stage:", markdown_table([["domain", *students], *rows])]
        parts += [f"![{escaped(p.stem.replace('_', ' '))}]({p.name})" for p in sorted(directory.glob("*.png")) if re.fullmatch(r"[\w.-]+", p.name)]
    return "\n\n".join(parts)


def describe(position, stage):
    """One stage: where it started, its settings, its data, its figures."""
    parent, seconds = stage.get("parent"), stage.get("seconds")
    began = ([f"from {escaped(parent)}"] if parent else []) + ([f"{seconds:,.1f} s"] if seconds is not None else [])
    parts = [f"### {position}. {escaped(stage['stage'])}", ", ".join(began)]
    for name, label in (("config", "setting"), ("data", "data"), ("figures", "figure")):
        if stage.get(name) and not (name == "figures" and stage["stage"] == "evaluate"):  # those stand in a section of their own
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
        elif isinstance(value, list) and value and all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value):
            tables.append((name, [list(value[0]), *([number(v) for v in record.values()] for record in value)]))
        else:
            rows.append((name, listed(value) if isinstance(value, list) else number(value)))
    return rows, tables


def listed(values):
    """A list in few words: equal entries are counted, a long one is cut."""
    counts = Counter(map(number, values))
    entries = [entry if count == 1 else f"{count} × {entry}" for entry, count in counts.items()] if len(counts) < len(values) else list(counts)
    return ", ".join(entries[:SHOWN]) + (f", and {len(entries) - SHOWN} more" if len(entries) > SHOWN else "") if entries else NONE


def versions(stages):
    """Versions of what ran, one line per set of them."""
    made = {}
    for stage in stages:
        if text := ", ".join(f"{name} {v}" for name, v in part(stage, "versions").items()):
            made.setdefault(text, []).append(stage["stage"])
    return "\n".join(f"Made with {escaped(text)}: {escaped(', '.join(names))}." for text, names in made.items())


def limits(stages, judged):
    """What the record does not support."""
    config, below = part(converted(stages), "config"), [d for d, r in part(judged, "recovery").items() if r is not None and r < 1]
    lines = ["It loads only where the package xlstm-hybrid is imported: transformers alone does not know the architecture."]
    if config.get("sliding_window"):
        lines.append(
            f"What lies further back than {config['sliding_window']} tokens reaches its hybrid layers through a state of fixed size (and "
            f"{config.get('num_sink_tokens', 0)} sink tokens): it can be lost, and more easily the more there is to keep."
        )
    if judged.get("exact_match"):
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


def percent(score):
    return NONE if score is None else f"{100 * score:.1f} %"


def number(value):
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
