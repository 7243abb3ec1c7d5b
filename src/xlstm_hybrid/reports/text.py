"""Numbers as text, and tables for the terminal."""

import re

NONE = "–"


def terminal_table(rows, title=None):
    """A `rich` table of rows of values, the first one the header: the first column on the left, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = title and Text(title)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for j, column in enumerate(rows[0]):
        table.add_column(Text(str(column)), justify="right" if j else "left")
    for row in rows[1:]:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def fenced(text):
    """A code block that its text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def percent(share):
    return NONE if share is None else f"{100 * share:.1f} %"


def number(value):
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def duration(seconds):
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return f"{seconds / size:.1f} {unit}"


def between(values, show="{:.3f}"):
    """An interval in words."""
    return NONE if values is None else f"{show.format(values[0])} to {show.format(values[1])}"


def counted(counts):
    """How many benchmarks count, in words; empty where a comparison of before does not tell."""
    return f"{sum(counts.values())} of {len(counts)} benchmarks count" if counts else ""


def at_chance(benchmark, chance, counts):
    """A benchmark's name for a table, marked where the teacher is at chance on it."""
    counts, chance = (counts or {}).get(benchmark, True), (chance or {}).get(benchmark) or 0
    return benchmark if counts else f"{benchmark} (teacher at chance, {chance:.3g}: does not count)"


def c_0_and_alpha(verdict):
    """C_0 and alpha* of a verdict in Markdown, with the intervals that its "resampled" has."""
    if verdict["c_0"] is None:
        return "C and α\\* are not defined: the teacher is at chance on all of them"
    sure = verdict.get("resampled") or {}
    c_0, alpha = (
        between(sure[k], show) if sure.get(k) else "" for k, show in (("c_0", "{:.2f}"), ("alpha_star", "{:.3f}"))
    )
    told = f"{c_0 + '; ' if c_0 else ''}{'' if verdict['c_0'] >= 0.5 else 'not '}lossless: the bar is 0.5"
    return f"C_0 = {verdict['c_0']:.2f} ({told}), α\\* = {verdict['alpha_star']:.3f}{f' ({alpha})' if alpha else ''}"
