"""Sections of a run's report that come from comparison, long context, costs and times, as lists of Markdown parts or
rows; [] where it has none.
"""

import re

from xlstm_hybrid.checkpoint.files import escaped, markdown_table
from xlstm_hybrid.evaluation.comparison import NONE, between, duration, number, percent, task_rows
from xlstm_hybrid.reports.efficiency import notes, tables

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


def benchmarks(results):
    """The comparison of the final student with its teacher, benchmark by benchmark."""
    if not (found := results.get("comparison")):
        return []
    name = next(reversed(found["students"]))
    student = found["students"][name]
    sure = student["resampled"]
    text = (
        f"{'Lossless' if student['lossless'] else 'Not lossless'} at α = {found['alpha']:g}: C_α = {student['c_alpha']:.3f}, the bar is 0.5; "
        f"α\\* = {student['alpha_star']:.3f}"
        + (
            f" ({between(sure['alpha_star'])} in {percent(found['level'])} of resamples of the documents)"
            if sure
            else ""
        )
        + f"; {student['wins']} won, {student['ties']} tied, {student['losses']} lost."
    )
    rules = [escaped(note) for note in found["notes"]]
    more = "More in [comparison/comparison.html](comparison/comparison.html) and [comparison/comparison.md](comparison/comparison.md)."
    return [
        f"## {escaped(name)} against {escaped(found['teacher'])}",
        text,
        markdown_table(task_rows(found, student)),
        *rules,
        more,
    ]


def long_context_table(rows):
    """Rows of a run's "long_context" as a Markdown table."""
    shown = [[row["task"], *(show(row[key]) for key, (_, show) in HEAD.items())] for row in rows]
    return markdown_table([["task", *(label for label, _ in HEAD.values())], *shown])


def long_context(results):
    """Recall of what lies far back, beside the coverage of window and sinks."""
    rows = results.get(LONG_CONTEXT)
    if not rows:
        return []
    zero = [row["task"] for row in rows if not row["teacher_recall"]]
    said = (
        [f"The teacher recalls nothing on {', '.join(map(escaped, zero))}: nothing can be lost there."] if zero else []
    )
    return ["## Long context", long_context_table(rows), EXPLAINED, *said]


def costs(results):
    """What the student costs beside its teacher."""
    if not (found := results.get("efficiency")):
        return []
    pair, machine = found["pairs"][0], found["machine"]
    parts = [
        "## Cost beside the teacher",
        f"{escaped(machine.get('gpu') or machine['cpu'])}; times are {machine['clock']}.",
    ]
    parts += [f"### {title}\n\n{markdown_table(rows)}" for title, rows in tables(pair)]
    return [*parts, "\n".join(f"* {escaped(note)}" for note in notes(pair))]


def time_rows(results):
    """Header and one row per stage: its time and its share of the whole; [] where nothing was timed."""
    seconds = results.get("seconds") or {}
    whole = seconds.get("whole run") or sum(seconds.values())
    rows = [[stage, duration(s), percent(s / whole) if whole else NONE] for stage, s in seconds.items()]
    return [["stage", "time", "share"], *rows] if rows else []


def time_table(results):
    """A `rich` table for the terminal: where the time went."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text("Where the time went"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    head, *rows = time_rows(results) or [["stage", "time", "share"]]
    for column in head:
        made.add_column(Text(column), justify="left" if column == "stage" else "right")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def fenced(text):
    """A code block that its text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
