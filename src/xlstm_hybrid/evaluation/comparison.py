"""Students against their teacher on the same benchmarks: the verdict, how sure it is, and what it costs. One plain
dict, printed in three ways.
"""

import base64
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path

from xlstm_hybrid.checkpoint.files import append_stage, escaped, markdown_table, write_file, write_json
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.scores import read_results, win_and_tie
from xlstm_hybrid.evaluation.significance import LEVEL, RESAMPLES, compare_pairs, holm, resampled_verdict

# the first that a benchmark has is its score
METRICS = ("acc_norm", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc", "acc")
FILTERS = ("none", "strict-match", "create_test", "flexible-extract")
SETTINGS = (
    "shots",
    "version",
    "documents",
    "generation",
    "gen_kwargs",
    "chat_template",
    "system_instruction",
    "multiturn",
    "prompts",
)
SAMPLES = 1e-6  # how far the mean of the samples may be from the score that was reported
NONE = "–"
CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}
figure{margin:1.5rem 0}figcaption{color:#555}"""


# --- what is compared ------------------------------------------------------------------------------------------


def open_sides(teacher, students):
    """`(Results of the teacher, [Results of students])` of paths, each `PATH` or `NAME=PATH`; a run's results.json
    stands for all of its students.
    """

    def opened(text):
        name, _, path = str(text).rpartition("=")
        if not name or Path(str(text)).exists():
            return read_results(text), None
        return read_results(path), name

    (teacher, *_), name = opened(teacher)
    teacher.name, found = name or teacher.name, []
    seen = {teacher.name: 1}
    for text in students:
        results, name = opened(text)
        for each in results[1:] or results:
            each.name = name if name and len(results) == 1 else each.name
            seen[each.name] = seen.get(each.name, 0) + 1
            each.name += f" #{seen[each.name]}" if seen[each.name] > 1 else ""
            found.append(each)
    return teacher, found


def choose_metric(task, sides, asked):
    """The metric that all sides are judged by on a benchmark: the one that was asked for, else the first of `METRICS`;
    None where there is none.
    """
    shared = [
        m for m in sides[0].scores[task] if all(m in s.scores[task] and m not in s.smaller.get(task, ()) for s in sides)
    ]
    if asked is not None:
        return next((m for m in shared if asked in (m, m.split(",")[0])), None)

    def place(metric):
        name, _, kind = metric.partition(",")
        return (
            METRICS.index(name) if name in METRICS else len(METRICS),
            FILTERS.index(kind) if kind in FILTERS else len(FILTERS),
        )

    return min(shared, key=place, default=None)


def choose_tasks(sides, tasks, common):
    """`(benchmarks, mistakes, notes)`: those that were asked for, or all; each must be there on every side unless
    `common`.
    """
    known = list(dict.fromkeys(task for side in sides for task in side.scores))
    wanted = known if tasks is None else list(dict.fromkeys(tasks))
    missing = [(task, [s.name for s in sides if task not in s.scores]) for task in wanted]
    texts = [f"{task} has no score of {' and '.join(names)}" for task, names in missing if names]
    chosen = [task for task, names in missing if not names]
    if common:
        return chosen, [] if chosen else ["no benchmark that all sides have"], [f"left out: {text}" for text in texts]
    return chosen, texts or ([] if chosen else ["no benchmark, expected at least one"]), []


def different_settings(teacher, student, task):
    """`{setting: what differs, in words}` between two sides on one benchmark; settings that neither records are taken
    to agree.
    """
    mine, its, found = teacher.settings.get(task, {}), student.settings.get(task, {}), {}
    for key in SETTINGS:
        if mine.get(key) != its.get(key):
            found[key] = f"{task}: {key} {mine.get(key)!r} for {teacher.name}, {its.get(key)!r} for {student.name}"
    here, there = teacher.prompts.get(task) or {}, student.prompts.get(task) or {}
    if here and there and set(here) != set(there):
        found["documents"] = (
            f"{task}: {len(set(here) ^ set(there))} documents were judged for only one of {teacher.name} and {student.name}"
        )
    elif odd := sum(here[d] != there[d] for d in here if there):
        found["prompts"] = (
            f"{task}: the prompts of {odd} of {len(here)} documents differ between {teacher.name} and {student.name}"
        )
    return found


def pairs_of(teacher, student, task, metric):
    """`((student values, teacher values), None)`, document by document, or `(None, why there are none)`."""
    its, mine = (side.samples.get(task, {}).get(metric) or {} for side in (student, teacher))
    if not its or not mine:
        return (
            None,
            f"{' and '.join(s.name for s, v in ((student, its), (teacher, mine)) if not v)} came without samples",
        )
    if set(its) != set(mine):
        return None, f"{student.name} and {teacher.name} were judged on different documents"
    keys = sorted(mine)
    values = [its[k] for k in keys], [mine[k] for k in keys]
    for side, numbers in zip((student, teacher), values, strict=True):
        if not math.isclose(sum(numbers) / len(numbers), side.scores[task][metric], rel_tol=SAMPLES, abs_tol=SAMPLES):
            return None, f"the score of {side.name} is not the mean of its samples"
    return values, None


def paired_verdict(teacher, student, seed=0):
    """`WinAndTie` of a student on exact match as plain values, with "resampled": `resampled_verdict` at no tolerance,
    None without paired answers.
    """
    mine, its = ({task: scores["exact_match"] for task, scores in side.scores.items()} for side in (teacher, student))
    pairs = {task: pairs_of(teacher, student, task, "exact_match")[0] for task in mine}
    return asdict(win_and_tie(its, mine)) | {
        "resampled": resampled_verdict(pairs, 0.0, seed=seed) if all(pairs.values()) else None
    }


# --- comparing -------------------------------------------------------------------------------------------------


def compare(
    teacher,
    students,
    *,
    alpha=0.0,
    tasks=None,
    metrics=None,
    common=False,
    allow=(),
    costs=None,
    seed=0,
    resamples=RESAMPLES,
):
    """Compare students with their teacher by win-and-tie rates (docs/method.md) and say how sure the result is.

    A teacher's score of 0 is never lost. Without samples on both sides a benchmark has scores but no paired statistics,
    and a student for which this is so on any benchmark has no interval of alpha*. A student is lossless at alpha if
    C_alpha >= 1/2.

    Args:
        teacher, students: `evaluation.Results`, see `open_sides`.
        alpha: relative tolerance of the verdict.
        tasks: benchmarks; all by default.
        metrics: {benchmark: metric}, such as {"gsm8k": "exact_match,flexible-extract"}; see `METRICS` for the rest.
        common: judge on the benchmarks that all sides have, instead of refusing.
        allow: entries of `SETTINGS` that may differ; that they do is noted.
        costs: `(label, {name: cost})`, see `read_costs`; less is better.
    Returns:
        A dict of plain values: "alpha", "teacher", "metrics", "shots", "teacher_scores", "differences" (those allowed),
        "notes", "cost" (label or None), "teacher_cost" and
        "students": {name: fields of `WinAndTie`, "scores", "c_alpha", "lossless", "mean_recovery", "paired" {benchmark:
            `compare_pairs` with
        "p_holm"}, "resampled" (`resampled_verdict`) or None, "cost", "pareto"}.
    Raises:
        EvaluationError: everything that cannot be compared, listed at once.
    """
    sides = [teacher, *students]
    if not students or not 0 <= alpha <= 1 or set(allow) - set(SETTINGS):
        raise EvaluationError(
            f"compare: {len(students)} students, alpha={alpha}, allow={sorted(allow)}; expected a student, a share between 0 and "
            f"1, and some of {', '.join(SETTINGS)}"
        )
    (chosen, wrong, notes), differences = choose_tasks(sides, tasks, common), []
    notes += [note for side in sides for note in side.notes]
    used = {task: choose_metric(task, sides, (metrics or {}).get(task)) for task in chosen}
    wrong += [f"{task} is asked for by metric, but is not compared" for task in metrics or {} if task not in used]
    for task, metric in used.items():
        if metric is None:
            offered = "; ".join(f"{s.name}: {', '.join(s.scores[task])}" for s in sides)
            wrong.append(f"{task} has no metric that all sides have and of which more is better ({offered})")
            continue
        scores = [(s.name, s.scores[task][metric]) for s in sides]
        wrong += [
            f"{task} ({metric}) is {x} for {name}, expected a finite score of at least 0"
            for name, x in scores
            if not 0 <= x < math.inf
        ]
        for student in students:
            for key, text in different_settings(teacher, student, task).items():
                (differences if key in allow else wrong).append(text)
    if wrong:
        raise EvaluationError(
            f"{len(wrong)} reasons why these results cannot be compared: {'; '.join(wrong)}. Judge student and teacher with the "
            "same tasks, shots and budget; or name what may differ, or compare the common tasks only"
        )
    label, prices = costs or (None, {})
    made = {
        s.name: judge(teacher, s, used, alpha, seed, resamples, notes) | {"cost": prices.get(s.name)} for s in students
    }
    mark_front(made, prices.get(teacher.name))
    shots = {task: teacher.settings.get(task, {}).get("shots") for task in used}
    scores = {task: teacher.scores[task][metric] for task, metric in used.items()}
    return {
        "alpha": alpha,
        "seed": seed,
        "resamples": resamples,
        "level": LEVEL,
        "teacher": teacher.name,
        "metrics": used,
        "shots": shots,
        "teacher_scores": scores,
        "students": made,
        "cost": label,
        "teacher_cost": prices.get(teacher.name),
        "differences": differences,
        "notes": list(dict.fromkeys([*differences, *notes])),
    }


def judge(teacher, student, used, alpha, seed, resamples, notes):
    """One student's part of a comparison; what could not be paired is added to `notes`."""
    mine, its = ({task: side.scores[task][metric] for task, metric in used.items()} for side in (teacher, student))
    verdict, pairs, unpaired = asdict(win_and_tie(its, mine)), {}, {}
    for task, metric in used.items():
        values, why = pairs_of(teacher, student, task, metric)
        if values:
            pairs[task] = values
        else:
            unpaired.setdefault(why, []).append(task)
    notes += [f"no paired statistics of {', '.join(tasks)}: {why}" for why, tasks in unpaired.items()]
    paired = {task: compare_pairs(*values, resamples=resamples, seed=seed, name=task) for task, values in pairs.items()}
    corrected = holm({task: found["p"] for task, found in paired.items()})
    paired = {task: found | {"p_holm": corrected[task]} for task, found in paired.items()}
    at_alpha = win_and_tie(its, mine, [alpha]).curve[0]
    recovered = [r for r in verdict["recovery"].values() if r is not None]
    return {
        **verdict,
        "scores": its,
        "c_alpha": at_alpha,
        "lossless": at_alpha >= 0.5,
        "paired": paired,
        "mean_recovery": sum(recovered) / len(recovered) if recovered else None,
        "resampled": resampled_verdict(pairs, alpha, resamples=resamples, seed=seed)
        if len(pairs) == len(used)
        else None,
    }


def mark_front(students, teacher_cost=None):
    """Set "pareto" of every student: True where nobody, teacher included, recovers as much for less or more for as
    little.
    """
    points = {
        name: (s["cost"], s["mean_recovery"])
        for name, s in students.items()
        if s["cost"] is not None and s["mean_recovery"] is not None
    }
    rivals = [*points.values(), *([(teacher_cost, 1.0)] if teacher_cost is not None else [])]
    for name, student in students.items():
        point = points.get(name)
        beaten = point and any(c <= point[0] and r >= point[1] and (c, r) != point for c, r in rivals)
        student["pareto"] = not beaten if point else None


def read_costs(text, teacher, students):
    """`(label, {name: cost})` of every student, and of the teacher where it has one.

    Args:
        text: a JSON file {name: number}, or FILE:key.key for {name: {key: {key: number}}}, or field:key.key of each
            side's own results.
    Raises:
        EvaluationError: no such file, or a student without a finite cost of at least 0.
    """
    path, _, keys = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
    if path == "field":
        sources = {side.name: side.fields for side in [teacher, *students]}
    else:
        try:
            sources = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"costs {text}: expected a JSON file, FILE:key or field:key ({error})") from error
    found, wrong = {}, []
    for side in [teacher, *students]:
        value = sources.get(side.name) if isinstance(sources, dict) else None
        for key in keys.split(".") if keys else ():
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
            found[side.name] = value
        elif side is not teacher or value is not None:
            wrong.append(f"{side.name} is {value!r}")
    if wrong:
        raise EvaluationError(f"costs {text}: {'; '.join(wrong)}, expected a finite number of at least 0 per student")
    return keys.rpartition(".")[2] or Path(text).stem, found


# --- printing --------------------------------------------------------------------------------------------------


def percent(score):
    return NONE if score is None else f"{100 * score:.1f} %"


def number(value):
    return NONE if value is None else f"{value:.4g}"


def duration(seconds):
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def between(values, show="{:.3f}"):
    return NONE if values is None else f"{show.format(values[0])} to {show.format(values[1])}"


def c_0_and_alpha(verdict):
    """C_0 and alpha* of a verdict in Markdown, with the intervals that its "resampled" has."""
    sure = verdict.get("resampled") or {}
    c_0, alpha = (
        between(sure[key], form) if sure.get(key) else "" for key, form in (("c_0", "{:.2f}"), ("alpha_star", "{:.3f}"))
    )
    told = f"{c_0 + '; ' if c_0 else ''}{'' if verdict['c_0'] >= 0.5 else 'not '}lossless: the bar is 0.5"
    return f"C_0 = {verdict['c_0']:.2f} ({told}), α\\* = {verdict['alpha_star']:.3f}{f' ({alpha})' if alpha else ''}"


def scaled_scores(comparison):
    """`{side: {benchmark: score as a share}}`, the teacher first; a benchmark on a scale of its own (MT-Bench) is
    divided by its best score, and its label says so.
    """
    sides = {
        comparison["teacher"]: comparison["teacher_scores"],
        **{name: s["scores"] for name, s in comparison["students"].items()},
    }
    best = {task: max(scores[task] for scores in sides.values()) for task in comparison["teacher_scores"]}
    # 100: all scores were given in percent
    whole = 100 if all(b > 1 for b in best.values()) and max(best.values()) <= 100 else 1
    labels = {task: task if b <= whole else f"{task} / {b:g}" for task, b in best.items()}
    return {
        name: {labels[t]: s / (whole if best[t] <= whole else best[t]) for t, s in scores.items()}
        for name, scores in sides.items()
    }


def sections(comparison):
    """The text of a comparison: pairs of ("title", text), ("text", text), ("list", texts), ("table", rows) and
    ("picture", file name).
    """
    alpha, students, cost = comparison["alpha"], comparison["students"], comparison["cost"]
    yield "title", f"Students against {comparison['teacher']}"
    for name, s in students.items():
        sure = f"; in {percent(s['resampled']['lossless'])} of resamples of the documents" if s["resampled"] else ""
        yield (
            "text",
            f"{name} is {'' if s['lossless'] else 'not '}lossless at α = {alpha:g}: C_α = {s['c_alpha']:.3f}, the bar is 0.5{sure}.",
        )
    head = [
        "student",
        "C_α",
        "α*",
        "α* interval",
        "C_0",
        "won",
        "tied",
        "lost",
        "mean recovery",
        *([cost, "on the front"] if cost else []),
    ]
    rows = [
        [
            name,
            f"{s['c_alpha']:.3f}",
            f"{s['alpha_star']:.3f}",
            between((s["resampled"] or {}).get("alpha_star")),
            f"{s['c_0']:.3f}",
            s["wins"],
            s["ties"],
            s["losses"],
            percent(s["mean_recovery"]),
            *(
                [NONE if s["cost"] is None else f"{s['cost']:g}", {True: "yes", False: "no", None: NONE}[s["pareto"]]]
                if cost
                else []
            ),
        ]
        for name, s in students.items()
    ]
    yield "table", [head, *rows]
    for picture in ("curve.png", "tasks.png", "recovery.png", "front.png"):
        yield "picture", picture
    for name, s in students.items():
        yield "title", name
        yield "table", task_rows(comparison, s)
    level = percent(comparison["level"])
    yield "title", "How to read this"
    rules = [
        "C_α is the share of benchmarks on which a student scores at least (1 - α) times its teacher's score; α* is the smallest α with C_α of at "
        "least 0.5; C_0 is C_α at α = 0 (Hauzenberger et al. 2026). A teacher's score of 0 is never lost.",
        f"Intervals hold {level} of {comparison['resamples']:,} draws of the documents with replacement, student and teacher together (seed "
        f"{comparison['seed']}). p is the exact McNemar test where every document is right or wrong, else random signs of the differences; p (Holm) "
        "is corrected for the number of benchmarks.",
    ]
    yield "list", [*rules, *comparison["notes"]]


def task_rows(comparison, student):
    """One row per benchmark: scores, recovery and what the pairs of documents say."""
    head = [
        "benchmark",
        "metric",
        "shots",
        "teacher",
        "student",
        "recovery",
        "difference, interval",
        "documents",
        "gained",
        "lost",
        "p",
        "p (Holm)",
    ]
    rows = [head]
    for task, metric in comparison["metrics"].items():
        paired, shots = student["paired"].get(task), comparison["shots"][task]
        told = [NONE] * 6
        if paired:
            counts = [paired[key] for key in ("documents", "gained", "lost")]
            told = [between(paired["difference"], "{:+.3f}"), *counts, f"{paired['p']:.3g}", f"{paired['p_holm']:.3g}"]
        score, mine = student["scores"][task], comparison["teacher_scores"][task]
        rows.append(
            [
                task,
                metric,
                NONE if shots is None else shots,
                f"{mine:.4g}",
                f"{score:.4g}",
                percent(student["recovery"][task]),
                *told,
            ]
        )
    return rows


def markdown(comparison, pictures=()):
    """The comparison as Markdown; `pictures` is {file name: caption}."""
    parts, depth = [], "#"
    for kind, content in sections(comparison):
        if kind == "title":
            parts.append(f"{depth} {escaped(content)}")
            depth = "##"
        elif kind == "picture":
            parts += [f"![{pictures[content]}]({content})"] if content in pictures else []
        else:
            parts.append(
                {"text": escaped, "table": markdown_table, "list": lambda x: "\n".join(f"- {escaped(t)}" for t in x)}[
                    kind
                ](content)
            )
    return "\n\n".join(parts) + "\n"


def html_page(comparison, pictures=()):
    """The comparison as one HTML page that needs no other file; `pictures` is {file name: (bytes of a PNG, caption)}."""
    parts, level = [], 1
    for kind, content in sections(comparison):
        if kind == "title":
            parts.append(f"<h{level}>{escape(content)}</h{level}>")
            level = 2
        elif kind == "text":
            parts.append(f"<p>{escape(content)}</p>")
        elif kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{escape(t)}</li>' for t in content)}</ul>")
        elif kind == "table":
            lines = [
                [f"<{cell}>{escape(str(v))}</{cell}>" for v in row]
                for row, cell in zip(content, ["th", *["td"] * len(content)], strict=False)
            ]
            parts.append(f"<table>{''.join(f'<tr>{chr(10).join(line)}</tr>' for line in lines)}</table>")
        elif content in pictures:
            image, caption = pictures[content]
            data, told = base64.b64encode(image).decode(), escape(caption)
            parts.append(
                f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'
            )
    title = escape(f"Students against {comparison['teacher']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n'


def write_comparison(comparison, folder, pictures=None):
    """Write `comparison.json`, `comparison.md`, `comparison.html` and the pictures into `folder`; returns the names of
    the files.

    Args:
        pictures: {file name: (bytes of a PNG, caption)}, see `report.comparison_pictures`.
    """
    folder, pictures = Path(folder), pictures or {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, _) in pictures.items():
        write_file(folder / name, image)
    write_json(folder / "comparison.json", {"format_version": 1, **plain_floats(comparison)})
    write_file(
        folder / "comparison.md",
        markdown(comparison, {name: caption for name, (_, caption) in pictures.items()}).encode(),
    )
    write_file(folder / "comparison.html", html_page(comparison, pictures).encode())
    return ["comparison.json", "comparison.md", "comparison.html", *pictures]


def record(comparison, student, directory):
    """Add a student's part of a comparison to the record of its checkpoint, as the stage "compare", from which its card
    is printed.

    Raises:
        EvaluationError: no such student in the comparison.
        CheckpointError: the directory has no record of stages, or files that are not those of its manifest.
    """
    found = comparison["students"].get(student)
    if found is None:
        raise EvaluationError(
            f"record: {student!r} is not compared, expected one of {', '.join(comparison['students'])}"
        )
    config = {
        key: comparison[key] for key in ("teacher", "alpha", "metrics", "shots", "differences", "seed", "resamples")
    }
    figures = {
        key: found[key]
        for key in ("scores", "recovery", "c_alpha", "c_0", "alpha_star", "lossless", "wins", "ties", "losses")
    }
    figures |= {"teacher_scores": comparison["teacher_scores"], "resampled": found["resampled"]}
    append_stage(directory, "compare", config=config, figures=plain_floats(figures))


def plain_floats(value):
    """The same with None in the place of numbers that JSON does not have: a recovery is infinite where a teacher's
    score is 0.
    """
    if isinstance(value, dict):
        return {key: plain_floats(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_floats(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
