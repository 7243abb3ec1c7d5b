"""The report of a run: Markdown, pictures and a table for the terminal, all from one plain dict. What the dict lacks is
left out.
"""

import io
import math
from pathlib import Path

from xlstm_hybrid.checkpoint.files import escaped, markdown_table, write_file
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.comparison import NONE, between, c_0_and_alpha, number, percent, scaled_scores
from xlstm_hybrid.evaluation.scores import named_contradictions
from xlstm_hybrid.evaluation.significance import LEVEL
from xlstm_hybrid.reports.efficiency import draw_efficiency
from xlstm_hybrid.reports.sections import benchmarks, costs, fenced, long_context, time_rows

# Okabe and Ito's palette, told apart with every kind of colour vision; the teacher is grey, the final student blue.
TEACHER, FINAL, OTHERS = "#555555", "#0072B2", ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 130,
}


def final(results):
    """Name of the last student, the one that the run is about; None where there is none."""
    return next(reversed(results.get("students") or {}), None)


def score_rows(results, kind, show):
    """Header and one row per domain: teacher, each student, and for exact match the final student's recovery."""
    teacher, students = (results.get("teacher_scores") or {}).get(kind) or {}, results.get("students") or {}
    columns = ({"teacher": teacher} if teacher else {}) | {
        name: scores.get(kind) or {} for name, scores in students.items()
    }
    columns = {name: scores for name, scores in columns.items() if scores}
    recovery = (
        ((results.get("win_and_tie") or {}).get(final(results)) or {}).get("recovery")
        if kind == "exact_match"
        else None
    )
    domains = list(dict.fromkeys(domain for scores in columns.values() for domain in scores))
    head = ["domain", *columns, *(["recovery"] if recovery else [])]
    return [
        head,
        *(
            [d, *(show(scores.get(d)) for scores in columns.values()), *([show(recovery.get(d))] if recovery else [])]
            for d in domains
        ),
    ]


def verdict_rows(results):
    """Rows of C_0 and alpha* under the columns of the exact match, each with its interval where that is known."""
    verdicts, columns = results.get("win_and_tie") or {}, score_rows(results, "exact_match", percent)[0][1:]
    rows = []
    for label, key, form in (("C_0", "c_0", "{:.2f}"), ("alpha*", "alpha_star", "{:.3f}")) if verdicts else ():
        rows.append([label, *(form.format(verdicts[c][key]) if c in verdicts else "" for c in columns)])
        sure = {name: (v.get("resampled") or {}).get(key) for name, v in verdicts.items()}
        if any(sure.values()):
            rows.append(
                [f"in {LEVEL:.0%}".replace("%", " %"), *(between(sure[c], form) if c in sure else "" for c in columns)]
            )
    return rows


def table(results):
    """A `rich` table for the terminal, 80 columns wide: domains down, teacher, student stages and recovery across; then
    C_0 and alpha*.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head, *rows = score_rows(results, "exact_match", lambda share: percent(share).removesuffix(" %"))
    title = Text(f"Exact match in %: {results.get('title', '')}")
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for first, column in zip([True, *[False] * len(head)], head, strict=False):
        made.add_column(
            Text(column),
            justify="left" if first else "right",
            no_wrap=first,
            style="bold" if column == final(results) else None,
        )
    for row in rows:
        made.add_row(*map(Text, row))
    made.add_section()
    for row in verdict_rows(results):
        made.add_row(*map(Text, row))
    return made


# --- pictures --------------------------------------------------------------------------------------------------


def figure(columns=1, width=7.2, height=3.8, rows=1):
    """A figure without global state, and its axes in one list."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def colours(results):
    names = list(results["students"])
    return {name: FINAL if name == names[-1] else OTHERS[j % len(OTHERS)] for j, name in enumerate(names)}


def ordered_colours(count):
    """Colours for things that have an order, dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * j / max(1, count - 1)) for j in range(count)]


def draw_win_and_tie(results):
    """C_alpha of every student, with a dot at alpha*."""
    verdicts = {
        name: v for name, v in (results.get("win_and_tie") or {}).items() if name in (results.get("students") or {})
    }
    if not verdicts:
        return None
    made, (axes,) = figure()
    done = max(
        next((a for a, c in zip(v["alphas"], v["curve"], strict=True) if c >= max(v["curve"])), 1)
        for v in verdicts.values()
    )
    for j, (name, v) in enumerate(verdicts.items()):
        colour, dashes = colours(results)[name], "-" if name == final(results) else DASHES[j % len(DASHES)]
        look = {
            "color": colour,
            "linestyle": dashes,
            "linewidth": 3.2 if dashes == "-" else 1.8,
            "zorder": 2 if dashes == "-" else 3,
        }
        axes.plot(v["alphas"], v["curve"], drawstyle="steps-post", label=f"{name}: α* = {v['alpha_star']:.3f}", **look)
        height = next((c for a, c in zip(v["alphas"], v["curve"], strict=True) if a >= v["alpha_star"]), v["curve"][-1])
        axes.plot(
            [v["alpha_star"]],
            [height],
            "o",
            color=colour,
            markeredgecolor="white",
            markersize=8,
            zorder=4 + j,
            clip_on=False,
        )
    axes.axhline(0.5, color="#999999", linewidth=1, zorder=1)
    axes.set(
        xlabel="relative tolerance α",
        ylabel="share of domains won or tied, $C_α$",
        title="Win-and-tie rate against the teacher (dots: α*)",
    )
    axes.set(ylim=(-0.03, 1.05), xlim=(-0.01, min(1, done * 1.1 + 0.02)))
    made.legend(loc="outside right center")
    return made


def draw_domains(results, title="Exact match per domain", label="exact match, %"):
    """Scores per domain: one bar for the teacher and one per student."""
    teacher, students = (results.get("teacher_scores") or {}).get("exact_match") or {}, results.get("students") or {}
    bars = ({"teacher": teacher} if teacher else {}) | {
        n: s["exact_match"] for n, s in students.items() if s.get("exact_match")
    }
    if not bars:
        return None
    domains = list(dict.fromkeys(d for scores in bars.values() for d in scores))
    made, (axes,) = figure(width=min(24, max(7.2, 1.5 + 0.32 * len(domains) * (len(bars) + 1))))
    colour, width = {"teacher": TEACHER, **(colours(results) if students else {})}, 0.84 / len(bars)
    for j, (name, scores) in enumerate(bars.items()):
        places = [n + (j - (len(bars) - 1) / 2) * width for n, d in enumerate(domains) if d in scores]
        heights = [100 * scores[d] for d in domains if d in scores]
        drawn = axes.bar(places, heights, width * 0.92, color=colour[name], label=name)
        if name in ("teacher", final(results)):
            axes.bar_label(drawn, [f"{h:.0f}" for h in heights], padding=2, fontsize=8, color=colour[name])
    axes.set(ylabel=label, ylim=(0, 108), title=title)
    axes.set_xticks(range(len(domains)), domains, **({"rotation": 30, "ha": "right"} if len(domains) > 6 else {}))
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_yticks(range(0, 101, 20))
    made.legend(loc="outside lower center", ncols=min(6, len(bars)))
    return made


def draw_alignment(results):
    """Relative alignment error of each layer before and after, and over the steps."""
    layers, curve = ((results.get("alignment") or {}).get(key) or [] for key in ("layers", "curve"))
    if not layers and not curve:
        return None
    made, axes = figure(
        columns=bool(layers) + bool(curve), width=9 if layers and curve else 6, height=max(3.8, 0.24 * len(layers))
    )
    names = [str(entry.get("layer", n)) for n, entry in enumerate(layers)]
    if layers:
        draw_before_and_after(axes[0], names, [e["before"] for e in layers], [e["after"] for e in layers])
    if curve:
        draw_curves(axes[-1], names, curve)
    return made


def draw_before_and_after(axes, names, before, after):
    """A line per layer from the error before to that after."""
    for n, ends in enumerate(zip(before, after, strict=True)):
        axes.plot(ends, [n, n], color="#bbbbbb", linewidth=2, zorder=1)
    axes.scatter(before, range(len(names)), s=48, color=OTHERS[0], label="before", zorder=2)
    axes.scatter(after, range(len(names)), s=48, color=FINAL, marker="D", label="after", zorder=3)
    axes.set(xlabel="squared error / squared target", ylabel="layer", title="Alignment error per layer")
    axes.set(xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.legend()


def draw_curves(axes, names, curve):
    """One line per layer."""
    count, values = max(len(entry["error"]) for entry in curve), [v for entry in curve for v in entry["error"]]
    for n, colour in enumerate(ordered_colours(count)):
        points = [(entry["step"], entry["error"][n]) for entry in curve if n < len(entry["error"])]
        axes.plot(*zip(*points, strict=True), color=colour, label=names[n] if n < len(names) else str(n))
    axes.set_title("Alignment error in training")
    scale_steps(axes, values)
    axes.legend(title="layer", ncols=1 + (count - 1) // 8, fontsize=8)


def scale_steps(axes, values):
    """Whole steps across; up from zero, or logarithmic with plain numbers where positive values span more than a factor
    of five.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if 0 < 5 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, None)


def draw_losses(results):
    """Losses of the experts over the steps, one panel per term."""
    logs = {name: log for name, log in (results.get("distillation") or {}).items() if log}
    titles = {"loss": "Loss", "ce": "Cross-entropy", "kl": "KL to the teacher"}
    terms = [term for term in titles if any(term in entry for log in logs.values() for entry in log)]
    if not terms:
        return None
    made, panels = figure(columns=len(terms), width=max(5, 3.3 * len(terms)), height=3.4)
    for axes, term in zip(panels, terms, strict=True):
        for j, (name, log) in enumerate(logs.items()):
            points = [(e["step"], e[term]) for e in log if term in e]
            look = {
                "color": OTHERS[(j + 2) % len(OTHERS)],
                "linestyle": "-" if j == 0 else DASHES[(j - 1) % len(DASHES)],
            }
            axes.plot(*zip(*points, strict=True), label=name if axes is panels[0] else None, **look)
        axes.set_title(titles[term])
        scale_steps(axes, [e[term] for log in logs.values() for e in log if term in e])
    panels[0].set_ylabel("nats per token" if terms != ["loss"] else "loss")
    made.legend(loc="outside lower center", ncols=len(logs), title="expert")
    return made


def draw_gates(results):
    """Mean output gate of each head, layers down."""
    gates = results.get("gates")
    if not gates:
        return None
    heads, layers = max(map(len, gates)), len(gates)
    made, (axes,) = figure(width=min(12, 3.2 + 0.5 * heads), height=min(10, 1.6 + 0.42 * layers))
    image = axes.imshow(
        [row + [math.nan] * (heads - len(row)) for row in gates], vmin=0, vmax=1, cmap="cividis", aspect="auto"
    )
    if heads * layers <= 128:
        for n, row in enumerate(gates):
            for h, gate in enumerate(row):
                axes.text(
                    h, n, f"{gate:.2f}", ha="center", va="center", fontsize=8, color="white" if gate < 0.55 else "black"
                )
    axes.set(xlabel="head", ylabel="hybrid layer", title="Mean output gate")
    axes.set_xticks(range(0, heads, 1 + heads // 24))
    axes.set_yticks(range(0, layers, 1 + layers // 24))
    axes.grid(visible=False)
    made.colorbar(image, ax=axes, label="0: window    1: mLSTM", ticks=[0, 0.25, 0.5, 0.75, 1])
    return made


# --- comparisons -----------------------------------------------------------------------------------------------


def draw_tasks(comparison):
    """Scores per benchmark, teacher and students."""
    teacher, *students = ({"exact_match": scores} for scores in scaled_scores(comparison).values())
    students = dict(zip(comparison["students"], students, strict=True))
    return draw_domains(
        {"teacher_scores": teacher, "students": students}, title="Score per benchmark", label="score, %"
    )


def draw_recovery(comparison):
    """Student score over teacher score, students down and benchmarks across; blank where the teacher scored 0."""
    rows = [[s["recovery"][task] for task in comparison["teacher_scores"]] for s in comparison["students"].values()]
    made, (axes,) = figure(width=min(24, 4 + 0.7 * len(rows[0])), height=min(16, 2 + 0.5 * len(rows)))
    image = axes.imshow(
        [[math.nan if r is None else r for r in row] for row in rows], vmin=0.5, vmax=1.5, cmap="PuOr", aspect="auto"
    )
    for j, row in enumerate(rows):
        for n, r in enumerate(row):
            axes.text(
                n,
                j,
                NONE if r is None else f"{100 * r:.0f}",
                ha="center",
                va="center",
                color="black" if r and 0.6 < r < 1.4 else "#888888",
            )
    axes.set_xticks(range(len(rows[0])), comparison["teacher_scores"], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), comparison["students"])
    axes.set(title=f"Recovery: score in % of that of {comparison['teacher']}")
    axes.grid(visible=False)
    made.colorbar(image, ax=axes, label="recovery", extend="both")
    return made


def draw_front(comparison):
    """Mean recovery against cost; students on the Pareto front are filled and joined."""
    if not (students := {name: s for name, s in comparison["students"].items() if s["pareto"] is not None}):
        return None
    made, (axes,) = figure()
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
    axes.set(
        xlabel=comparison["cost"], ylabel="mean recovery", title="Quality against cost (filled: on the Pareto front)"
    )
    return made


def comparison_pictures(comparison):
    """`{file name: (bytes of a PNG, caption)}` of what `compare.compare` returns.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    curves = {"students": comparison["students"], "win_and_tie": comparison["students"]}
    drawings = {
        "curve.png": (
            draw_win_and_tie,
            curves,
            "Share of benchmarks won or tied against the relative tolerance α; the dots are at α*.",
        ),
        "tasks.png": (draw_tasks, comparison, "Score per benchmark, teacher and students."),
        "recovery.png": (draw_recovery, comparison, "Recovery per benchmark: student score over teacher score."),
        "front.png": (draw_front, comparison, "Mean recovery against cost."),
    }
    drawn = {name: (as_png(draw, content), caption) for name, (draw, content, caption) in drawings.items()}
    return {name: (image, caption) for name, (image, caption) in drawn.items() if image is not None}


PICTURES = {  # file: (drawing, caption)
    "win_and_tie.png": (
        draw_win_and_tie,
        "Share of domains that a student wins or ties, against the relative tolerance α; the dots are at α*.",
    ),
    "domains.png": (draw_domains, "Exact match per domain, teacher and every student."),
    "alignment.png": (
        draw_alignment,
        "Alignment error per layer: squared error of the mixer over the squared output of the attention it replaces.",
    ),
    "losses.png": (draw_losses, "Losses of the experts in distillation."),
    "efficiency.png": (draw_efficiency, "What teacher (dashed) and student (solid) cost against the context."),
    "gates.png": (
        draw_gates,
        "Mean output gate of every head on held-out rows: 1 reads the mLSTM only, 0 the window only.",
    ),
}


def write_pictures(results, folder):
    """Draw what the results have; returns `{file name: caption}`. A picture that an earlier report left and this one
    lacks is removed.
    """
    written = {}
    for name, (draw, caption) in PICTURES.items():
        image = as_png(draw, results)
        if image is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_file(folder / name, image)
            written[name] = caption
    return written


def as_png(draw, results):
    """The bytes of a picture, None where there is nothing to draw."""
    with styled():
        drawn, buffer = draw(results), io.BytesIO()
        if drawn is None:
            return None
        drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def styled():
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ConfigError(
            "the report's pictures need matplotlib, found none; pip install 'xlstm-hybrid[train]'"
        ) from error
    return rc_context(STYLE)


# --- Markdown --------------------------------------------------------------------------------------------------


def write_report(results, run_dir):
    """Write `report.md` and its pictures into `run_dir`; returns the names of the files.

    Args:
        results: any of these parts; what is missing is left out of the report. "title": text.  "teacher": its name.
            "contradictions": {model: {domain: samples}}, see `evaluation.contradictions`: the scores are none.
            "teacher_scores": {"exact_match": {domain: share}, "perplexity": {domain: value}}. "students": {name: the
            same form}, in the order of the stages, the final student last. "win_and_tie": {student:
            `dataclasses.asdict` of a `WinAndTie`}. "alignment": {"layers": [{"layer", "before", "after"}], "curve":
            [{"step", "error": [per layer]}]}, relative squared errors. "distillation": {expert: [{"step", "loss", "ce",
            "kl"}]}, nats per token. "gates": [[mean output gate per head] per hybrid layer]. "comparison":
            `compare.plain_floats` of `compare.compare`.  "efficiency": what `efficiency_report.write_efficiency` takes.
            "long_context": rows of `report_sections.HEAD`, with "task".  "notes": sentences on how it was judged.
            "sample": {"prompt", "output"}.  "seconds": {stage: seconds}.  "peak_memory_mib": number.
    Raises:
        ConfigError: matplotlib is not installed.
        CheckpointWriteError: the disk refused.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(results, folder)
    write_file(folder / "report.md", (markdown(results, pictures) + "\n").encode())
    return ["report.md", *pictures]


def markdown(results, pictures=()):
    """The report's text; `pictures` is {file name: caption}."""

    def shown(*names):
        return [f"![{pictures[n]}]({n})\n\n*{pictures[n]}*" for n in names if n in pictures]

    parts = [f"# {escaped(results.get('title', 'Report'))}", *contradiction(results), *verdict(results)]
    parts += map(escaped, results.get("notes") or [])
    scores, perplexities = score_rows(results, "exact_match", percent), score_rows(results, "perplexity", number)
    if len(scores) > 1:
        parts += [
            "## Exact match",
            markdown_table([*scores, *verdict_rows(results)]),
            *shown("domains.png", "win_and_tie.png"),
        ]
    if len(perplexities) > 1:
        parts += ["## Perplexity", markdown_table(perplexities)]
    parts += [*benchmarks(results), *long_context(results)]
    for title, name in (("Alignment", "alignment.png"), ("Distillation", "losses.png"), ("Output gates", "gates.png")):
        parts += [f"## {title}", *shown(name)] if name in pictures else []
    if sample := results.get("sample"):
        parts += ["## A sample", "Prompt:", fenced(sample["prompt"]), "Greedy continuation:", fenced(sample["output"])]
    parts += [*costs(results), *shown("efficiency.png")]
    if rows := time_rows(results):
        parts += ["## Time and memory", markdown_table(rows)]
    if "peak_memory_mib" in results:
        parts += ["## Time and memory"] * (not rows) + [f"Peak memory: {results['peak_memory_mib']:,.0f} MiB."]
    return "\n\n".join(parts)


def contradiction(results):
    """Why the scores are none, where what was generated contradicts the model."""
    found = results.get("contradictions")
    return ["## A contradiction, not a score", escaped(named_contradictions(found)) + "."] if found else []


def verdict(results):
    """What came out, in one paragraph."""
    name = final(results)
    v = (results.get("win_and_tie") or {}).get(name)
    if not v:
        return []
    against = f" {escaped(results['teacher'])}" if results.get("teacher") else ""
    text = (
        f"The student **{escaped(name)}** against its teacher{against} on {len(v['recovery'])} domains: "
        f"{v['wins']} won, {v['ties']} tied, {v['losses']} lost; {c_0_and_alpha(v)}."
    )
    recovered = {domain: r for domain, r in v["recovery"].items() if r is not None}
    worst = min(recovered, key=recovered.get, default=None)
    text += f" Lowest recovery: {percent(recovered[worst])} ({escaped(worst)})." if worst else ""
    return [text + (f" In brackets: {percent(LEVEL)} of resamples of the answers." if v.get("resampled") else "")]
