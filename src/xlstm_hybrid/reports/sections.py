"""Sections of a run's report that come from comparison, long context, costs and times, as lists of Markdown parts or
rows; [] where it has none.
"""

from xlstm_hybrid.checkpoint.files import escaped, markdown_table
from xlstm_hybrid.reports.efficiency import efficiency_notes, tables
from xlstm_hybrid.reports.text import NONE, at_chance, between, counted, duration, number, percent

LONG_CONTEXT = "long_context"
HEAD = {  # column of a long-context row: what it is called, how it is shown
    "tokens": ("tokens", "{:,}".format),
    "documents": ("documents", "{:,}".format),
    "teacher_recall": ("recall, teacher", percent),
    "student_recall": ("recall, student", percent),
    "coverage": ("coverage", percent),
    "excess": ("excess", lambda x: NONE if x is None else f"{x:+.3f}"),
    "teacher_cache_bytes": ("cache, teacher, MB", lambda x: number(x / 1e6)),
    "student_cache_bytes": ("cache, student, MB", lambda x: number(x / 1e6)),
}
EXPLAINED = "Coverage: the share of the context that window and sinks see; excess: recall beyond it, (recall - coverage) / (1 - coverage)."


def comparison_parts(results):
    """The comparison of the final student with its teacher, benchmark by benchmark."""
    if not (comparison := results.get("comparison")):
        return []
    name, student = next(reversed(comparison["students"].items()))
    count = counted(comparison.get("counts"))
    if student["lossless"] is None:
        text = f"C_α and α\\* are not defined, {count}: the teacher is at chance on all."
    else:
        alpha = f"{student['alpha_star']:.3f}"
        if sure := student["resampled"]:
            alpha += f" ({between(sure['alpha_star'])} in {percent(comparison['level'])} of resamples of the documents)"
        no = "Lossless" if student["lossless"] else "Not lossless"
        text = (
            f"{no} at α = {comparison['alpha']:g}: C_α = {student['c_alpha']:.3f}, the bar is 0.5; α\\* = {alpha}; "
            f"{student['wins']} won, {student['ties']} tied, {student['losses']} lost{'; ' if count else ''}{count}."
        )
    more = "More in [comparison/comparison.html](comparison/comparison.html) and [comparison/comparison.md](comparison/comparison.md)."
    title = f"## {escaped(name)} against {escaped(comparison['teacher'])}"
    return [title, text, markdown_table(task_rows(comparison, student)), *map(escaped, comparison["notes"]), more]


def task_rows(comparison, student):
    """Header, and one row per benchmark: scores, recovery and what the pairs of documents say."""
    head = ["benchmark", "metric", "shots", "teacher", "student", "recovery"]
    rows = [[*head, "difference, interval", "documents", "gained", "lost", "p", "p (Holm)"]]
    for task, metric in comparison["metrics"].items():
        paired, shots = student["paired"].get(task), comparison["shots"][task]
        told = [NONE] * 6
        if paired:
            counts = [paired[key] for key in ("documents", "gained", "lost")]
            told = [between(paired["difference"], "{:+.3f}"), *counts, f"{paired['p']:.3g}", f"{paired['p_holm']:.3g}"]
        scores = [f"{side[task]:.4g}" for side in (comparison["teacher_scores"], student["scores"])]
        shots = NONE if shots is None else shots
        name = at_chance(task, comparison.get("chance"), comparison.get("counts"))
        metric += " (less is better)" if task in comparison.get("smaller", ()) else ""
        rows.append([name, metric, shots, *scores, percent(student["recovery"][task]), *told])
    return rows


def long_context_parts(rows):
    """Recall of what lies far back, beside the coverage of window and sinks. What neither side can do is left out of the
    table and named: nothing can be lost there.
    """
    rows = rows or []
    shown = [row for row in rows if row["teacher_recall"] or row["student_recall"]]
    parts = []
    if shown:
        cells = [[row["task"], *(show(row[key]) for key, (_, show) in HEAD.items())] for row in shown]
        parts += [markdown_table([["task", *(label for label, _ in HEAD.values())], *cells]), EXPLAINED]
    if left_out := [row for row in rows if row not in shown]:
        longest = max(left_out, key=lambda row: row["tokens"])
        teacher, student = (number(longest[f"{side}_cache_bytes"] / 1e6) for side in ("teacher", "student"))
        parts.append(
            f"The teacher recalls nothing on {', '.join(escaped(row['task']) for row in left_out)}, nor does the student: left out. "
            f"After {longest['tokens']:,} tokens the teacher's cache takes {teacher} MB, the student's {student} MB."
        )
    return parts


def cost_parts(results):
    """What the student costs beside its teacher."""
    if not (report := results.get("efficiency")):
        return []
    pair, machine = report["pairs"][0], report["machine"]
    return [
        "## Cost beside the teacher",
        f"{escaped(machine.get('gpu') or machine['cpu'])}; times are {machine['clock']}.",
        *(f"### {title}\n\n{markdown_table(rows)}" for title, rows in tables(pair)),
        "\n".join(f"* {escaped(note)}" for note in efficiency_notes(pair)),
    ]


def time_rows(results):
    """Header and one row per stage: its time and its share of the whole; [] where nothing was timed."""
    seconds = results.get("seconds") or {}
    whole = seconds.get("whole run") or sum(seconds.values())
    rows = [[stage, duration(s), percent(s / whole) if whole else NONE] for stage, s in seconds.items()]
    return [["stage", "time", "share"], *rows] if rows else []
