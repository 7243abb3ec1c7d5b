"""A comparison, as `evaluation.comparison.compare` returns it, as files and pictures: one text, printed in three ways."""

import base64
import math
from html import escape
from pathlib import Path

from xlstm_hybrid.checkpoint.files import escaped, markdown_table, write_file, write_json
from xlstm_hybrid.evaluation.comparison import plain_floats
from xlstm_hybrid.reports.plots import as_png, figure
from xlstm_hybrid.reports.run import FINAL, TEACHER, draw_domains, draw_win_and_tie
from xlstm_hybrid.reports.sections import task_rows
from xlstm_hybrid.reports.text import NONE, between, counted, percent

CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}
figure{margin:1.5rem 0}figcaption{color:#555}"""


def sections(comparison):
    """The text of a comparison: pairs of ("title", text), ("text", text), ("list", texts), ("table", rows) and
    ("picture", file name).
    """
    alpha, students, cost = comparison["alpha"], comparison["students"], comparison["cost"]
    yield "title", f"Students against {comparison['teacher']}"
    how_many = counted(comparison.get("counts"))
    head = ["student", "C_α", "α*", "α* interval", "C_0", "won", "tied", "lost", "mean recovery"]
    rows = [[*head, cost, "on the front"] if cost else head]
    for name, s in students.items():
        no, sure = "" if s["lossless"] else "not ", s["resampled"] or {}
        c_alpha, alpha_star, c_0 = (
            NONE if s[key] is None else f"{s[key]:.3f}" for key in ("c_alpha", "alpha_star", "c_0")
        )
        told = f"; in {percent(sure['lossless'])} of resamples of the documents" if sure else ""
        if s["lossless"] is None:
            yield (
                "text",
                f"{name}: C_α and α* are not defined, {how_many}: {comparison['teacher']} is at chance on all.",
            )
        else:
            count = f" {how_many}." if how_many else ""
            yield "text", f"{name} is {no}lossless at α = {alpha:g}: C_α = {c_alpha}, the bar is 0.5{told}.{count}"
        counts = [s[key] for key in ("wins", "ties", "losses")]
        row = [name, c_alpha, alpha_star, between(sure.get("alpha_star")), c_0, *counts]
        row.append(percent(s["mean_recovery"]))
        if cost:
            row.append(NONE if s["cost"] is None else f"{s['cost']:g}")
            row.append({True: "yes", False: "no", None: NONE}[s["pareto"]])
        rows.append(row)
    yield "table", rows
    for picture in ("curve.png", "tasks.png", "recovery.png", "front.png"):
        yield "picture", picture
    for name, s in students.items():
        yield "title", name
        yield "table", task_rows(comparison, s)
    yield "title", "How to read this"
    rules = [
        "C_α is the share of benchmarks on which a student scores at least (1 - α) times its teacher's score; α* is the smallest α with C_α of at "
        "least 0.5; C_0 is C_α at α = 0 (Hauzenberger et al. 2026). Where less is better, teacher's over student's score is compared with 1 - α.",
        "A benchmark counts where the teacher's score is above chance by 1.96 standard errors (where chance is 0: above 0). The others are shown, "
        "and are in no rate, mean or interval of α*.",
        f"Intervals hold {percent(comparison['level'])} of {comparison['resamples']:,} draws of the documents with replacement, student and teacher "
        f"together (seed {comparison['seed']}). p is the exact McNemar test where every document is right or wrong, else random signs of the "
        "differences; p (Holm) is corrected for the number of benchmarks.",
    ]
    yield "list", [*rules, *comparison["notes"]]


def comparison_markdown(comparison, captions=()):
    """The comparison as Markdown; `captions` is {file name: caption} of the pictures that are there."""
    parts = []
    for kind, content in sections(comparison):
        if kind == "title":
            parts.append(f"{'##' if parts else '#'} {escaped(content)}")
        elif kind == "text":
            parts.append(escaped(content))
        elif kind == "table":
            parts.append(markdown_table(content))
        elif kind == "list":
            parts.append("\n".join(f"- {escaped(text)}" for text in content))
        elif content in captions:
            parts.append(f"![{captions[content]}]({content})")
    return "\n\n".join(parts) + "\n"


def html_page(comparison, pictures=()):
    """The comparison as one HTML page that needs no other file; `pictures` is {file name: (bytes of a PNG, caption)}."""
    parts = []
    for kind, content in sections(comparison):
        if kind == "title":
            level = 2 if parts else 1
            parts.append(f"<h{level}>{escape(content)}</h{level}>")
        elif kind == "text":
            parts.append(f"<p>{escape(content)}</p>")
        elif kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{escape(t)}</li>' for t in content)}</ul>")
        elif kind == "table":
            rows = []
            for j, row in enumerate(content):
                cell = "td" if j else "th"
                rows.append("<tr>" + "\n".join(f"<{cell}>{escape(str(v))}</{cell}>" for v in row) + "</tr>")
            parts.append(f"<table>{''.join(rows)}</table>")
        elif content in pictures:
            image, told = base64.b64encode(pictures[content][0]).decode(), escape(pictures[content][1])
            shown = f'<img alt="{told}" src="data:image/png;base64,{image}">'
            parts.append(f"<figure>{shown}<figcaption>{told}</figcaption></figure>")
    title = escape(f"Students against {comparison['teacher']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{CSS}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n'


def write_comparison(comparison, folder, pictures=None):
    """Write `comparison.json`, `comparison.md`, `comparison.html` and the pictures into `folder`; returns the names of
    the files.

    Args:
        pictures: {file name: (bytes of a PNG, caption)}, see `comparison_pictures`.
    """
    folder, pictures = Path(folder), pictures or {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, _) in pictures.items():
        write_file(folder / name, image)
    write_json(folder / "comparison.json", {"format_version": 1, **plain_floats(comparison)})
    captions = {name: caption for name, (_, caption) in pictures.items()}
    write_file(folder / "comparison.md", comparison_markdown(comparison, captions).encode())
    write_file(folder / "comparison.html", html_page(comparison, pictures).encode())
    return ["comparison.json", "comparison.md", "comparison.html", *pictures]


# --- pictures --------------------------------------------------------------------------------------------------


def scaled_scores(comparison):
    """`{side: {benchmark: score as a share}}`, the teacher first; a benchmark on a scale of its own (MT-Bench) is
    divided by its best score, and its label says so.
    """
    sides = {comparison["teacher"]: comparison["teacher_scores"]}
    sides |= {name: s["scores"] for name, s in comparison["students"].items()}
    best = {task: max(scores[task] for scores in sides.values()) for task in comparison["teacher_scores"]}
    # 100: all scores were given in percent
    whole = 100 if all(b > 1 for b in best.values()) and max(best.values()) <= 100 else 1
    scales = {task: (task, whole) if b <= whole else (f"{task} / {b:g}", b) for task, b in best.items()}
    return {name: {scales[t][0]: score / scales[t][1] for t, score in scores.items()} for name, scores in sides.items()}


def draw_tasks(comparison):
    """Scores per benchmark, teacher and students."""
    teacher, *students = ({"exact_match": scores} for scores in scaled_scores(comparison).values())
    sides = {"teacher_scores": teacher, "students": dict(zip(comparison["students"], students, strict=True))}
    return draw_domains(sides, title="Score per benchmark", label="score, %")


def draw_recovery(comparison):
    """Student score over teacher score, students down and benchmarks across; blank where a benchmark does not count."""
    rows = [[s["recovery"][task] for task in comparison["teacher_scores"]] for s in comparison["students"].values()]
    picture, (axes,) = figure(width=min(24, 4 + 0.7 * len(rows[0])), height=min(16, 2 + 0.5 * len(rows)))
    filled = [[math.nan if r is None else r for r in row] for row in rows]
    image = axes.imshow(filled, vmin=0.5, vmax=1.5, cmap="PuOr", aspect="auto")
    for j, row in enumerate(rows):
        for n, r in enumerate(row):
            colour = "black" if r and 0.6 < r < 1.4 else "#888888"
            axes.text(n, j, NONE if r is None else f"{100 * r:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(rows[0])), comparison["teacher_scores"], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), comparison["students"])
    axes.set(title=f"Recovery: score in % of that of {comparison['teacher']}")
    axes.grid(visible=False)
    picture.colorbar(image, ax=axes, label="recovery", extend="both")
    return picture


def draw_quality(comparison):
    """Mean recovery against cost; students on the Pareto front are filled and joined."""
    if not (students := {name: s for name, s in comparison["students"].items() if s["pareto"] is not None}):
        return None
    picture, (axes,) = figure()
    points = [
        (name, (s["cost"], s["mean_recovery"]), FINAL if s["pareto"] else "white", FINAL)
        for name, s in students.items()
    ]
    front = sorted(point for _, point, fill, _ in points if fill == FINAL)
    axes.plot([c for c, _ in front], [r for _, r in front], color=FINAL, drawstyle="steps-post", zorder=1)
    if comparison["teacher_cost"] is not None:
        points.append((comparison["teacher"], (comparison["teacher_cost"], 1.0), TEACHER, TEACHER))
    for name, point, fill, edge in points:
        axes.scatter(*point, s=64, facecolor=fill, edgecolor=edge, zorder=2)
        axes.annotate(name, point, xytext=(7, -11), textcoords="offset points")
    costs = [cost for _, (cost, _), _, _ in points]
    if 0 < 20 * min(costs) < max(costs):
        axes.set_xscale("log")
    axes.set(xlabel=comparison["cost"], ylabel="mean recovery")
    axes.set(title="Quality against cost (filled: on the Pareto front)")
    return picture


def comparison_pictures(comparison):
    """`{file name: (bytes of a PNG, caption)}` of what `compare` returns.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    curves = {"students": comparison["students"], "win_and_tie": comparison["students"]}
    curve = "Share of benchmarks won or tied against the relative tolerance α; the dots are at α*."
    drawn = {
        "curve.png": (as_png(draw_win_and_tie, curves), curve),
        "tasks.png": (as_png(draw_tasks, comparison), "Score per benchmark, teacher and students."),
        "recovery.png": (
            as_png(draw_recovery, comparison),
            "Recovery per benchmark: student score over teacher score.",
        ),
        "front.png": (as_png(draw_quality, comparison), "Mean recovery against cost."),
    }
    return {name: (image, caption) for name, (image, caption) in drawn.items() if image is not None}
