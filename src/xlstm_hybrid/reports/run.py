"""The report of a run: Markdown, pictures and a table for the terminal, all from one plain dict. What the dict lacks is
left out.
"""

import math
from pathlib import Path

from xlstm_hybrid.checkpoint.files import escaped, markdown_table, write_file
from xlstm_hybrid.evaluation.scores import named_contradictions
from xlstm_hybrid.evaluation.significance import LEVEL
from xlstm_hybrid.reports.efficiency import draw_efficiency
from xlstm_hybrid.reports.plots import BLUE, GREY, INK, PALETTE, as_png, figure
from xlstm_hybrid.reports.sections import LONG_CONTEXT, comparison_parts, cost_parts, long_context_parts, time_rows
from xlstm_hybrid.reports.text import NONE, between, c_0_and_alpha, fenced, number, percent, terminal_table

TEACHER, FINAL, OTHERS = INK, BLUE, PALETTE[1:]  # the final student has a colour of its own
# title, key of the scores, form; on held-out documents
AGREEMENT = (
    ("KL from the teacher to the student, nats per token", "kl", number),
    ("Tokens at which teacher and student have the same most likely one", "top1", percent),
)
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


def final(results):
    """Name of the last student, the one that the run is about; None where there is none."""
    return next(reversed(results.get("students") or {}), None)


def score_rows(results, kind, show):
    """Header and one row per domain: teacher, each student, and for exact match the final student's recovery."""
    sides = {"teacher": results.get("teacher_scores") or {}} | (results.get("students") or {})
    columns = [(name, scores[kind]) for name, scores in sides.items() if scores.get(kind)]
    domains = list(dict.fromkeys(domain for _, scores in columns for domain in scores))
    verdict = (results.get("win_and_tie") or {}).get(final(results)) or {}
    if kind == "exact_match" and verdict.get("recovery"):
        columns.append(("recovery", verdict["recovery"]))
    return [
        ["domain", *(name for name, _ in columns)],
        *([d, *(show(scores.get(d)) for _, scores in columns)] for d in domains),
    ]


def verdict_rows(results):
    """Rows of C_0 and alpha* under the columns of the exact match, each with its interval where that is known."""
    verdicts, columns = results.get("win_and_tie") or {}, score_rows(results, "exact_match", percent)[0][1:]
    rows = []
    for label, key, form in (("C_0", "c_0", "{:.2f}"), ("alpha*", "alpha_star", "{:.3f}")) if verdicts else ():
        known = {name: NONE if v[key] is None else form.format(v[key]) for name, v in verdicts.items()}
        rows.append([label, *(known.get(c, "") for c in columns)])
        sure = {name: (v.get("resampled") or {}).get(key) for name, v in verdicts.items()}
        if any(sure.values()):
            cells = (between(sure[c], form) if c in sure else "" for c in columns)
            rows.append([f"in {LEVEL:.0%}".replace("%", " %"), *cells])
    return rows


def score_table(results):
    """A `rich` table for the terminal, 80 columns wide: domains down, teacher, student stages and recovery across; then
    C_0 and alpha*.
    """
    rows = score_rows(results, "exact_match", lambda share: percent(share).removesuffix(" %"))
    table = terminal_table(rows, f"Exact match in %: {results.get('title', '')}")
    table.columns[0].no_wrap = True
    for name, column in zip(rows[0], table.columns, strict=True):
        column.style = "bold" if name == final(results) else column.style
    table.add_section()
    for row in verdict_rows(results):
        table.add_row(*row)
    return table


# --- pictures --------------------------------------------------------------------------------------------------


def colours(results):
    names = list(results["students"])
    return {name: FINAL if name == names[-1] else OTHERS[j % len(OTHERS)] for j, name in enumerate(names)}


def draw_win_and_tie(results):
    """C_alpha of every student, with a dot at alpha*."""
    students, last = results.get("students") or {}, final(results)
    verdicts = {
        n: v for n, v in (results.get("win_and_tie") or {}).items() if n in students and v["alpha_star"] is not None
    }
    if not verdicts:
        return None
    picture, (axes,) = figure()
    done = 0
    for j, (name, v) in enumerate(verdicts.items()):
        colour, line, steps = colours(results)[name], name == last, list(zip(v["alphas"], v["curve"], strict=True))
        dashes = "-" if line else DASHES[j % len(DASHES)]
        look = {"linestyle": dashes, "linewidth": 3.2 if line else 1.8, "zorder": 2 if line else 3}
        label = f"{name}: α* = {v['alpha_star']:.3f}"
        axes.plot(v["alphas"], v["curve"], drawstyle="steps-post", label=label, color=colour, **look)
        height = next((c for a, c in steps if a >= v["alpha_star"]), v["curve"][-1])
        dot = {"color": colour, "markeredgecolor": "white", "markersize": 8, "zorder": 4 + j, "clip_on": False}
        axes.plot([v["alpha_star"]], [height], "o", **dot)
        done = max(done, next((a for a, c in steps if c >= max(v["curve"])), 1))
    axes.axhline(0.5, color=GREY, linewidth=1, zorder=1)
    axes.set(xlabel="relative tolerance α", ylabel="share of domains won or tied, $C_α$")
    axes.set(title="Win-and-tie rate against the teacher (dots: α*)")
    axes.set(ylim=(-0.03, 1.05), xlim=(-0.01, min(1, done * 1.1 + 0.02)))
    picture.legend(loc="outside right center")
    return picture


def draw_domains(results, title="Exact match per domain", label="exact match, %"):
    """Scores per domain: one bar for the teacher and one per student."""
    students = results.get("students") or {}
    sides = {"teacher": results.get("teacher_scores") or {}} | students
    bars = {name: side["exact_match"] for name, side in sides.items() if side.get("exact_match")}
    if not bars:
        return None
    domains = list(dict.fromkeys(d for scores in bars.values() for d in scores))
    picture, (axes,) = figure(width=min(24, max(7.2, 1.5 + 0.32 * len(domains) * (len(bars) + 1))))
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
    picture.legend(loc="outside lower center", ncols=min(6, len(bars)))
    return picture


def draw_alignment(results):
    """Relative alignment error of each layer: a line from the error before to that after, and curves over the steps."""
    from matplotlib import colormaps

    layers, curve = ((results.get("alignment") or {}).get(key) or [] for key in ("layers", "curve"))
    if not layers and not curve:
        return None
    both, height = bool(layers) + bool(curve), max(3.8, 0.24 * len(layers))
    picture, panels = figure(columns=both, width=9 if both == 2 else 6, height=height)
    names = [str(entry.get("layer", n)) for n, entry in enumerate(layers)]
    if layers:
        axes, before, after = panels[0], [e["before"] for e in layers], [e["after"] for e in layers]
        for n, ends in enumerate(zip(before, after, strict=True)):
            axes.plot(ends, [n, n], color="#bbbbbb", linewidth=2, zorder=1)
        axes.scatter(before, range(len(names)), s=48, color=OTHERS[0], label="before", zorder=2)
        axes.scatter(after, range(len(names)), s=48, color=FINAL, marker="D", label="after", zorder=3)
        axes.set(xlabel="squared error / squared target", ylabel="layer", title="Alignment error per layer")
        axes.set(xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.legend()
    if curve:
        axes, count = panels[-1], max(len(entry["error"]) for entry in curve)
        for n in range(count):
            points = [(entry["step"], entry["error"][n]) for entry in curve if n < len(entry["error"])]
            colour = colormaps["viridis"](0.9 * n / max(1, count - 1))  # layers have an order: dark to light
            axes.plot(*zip(*points, strict=True), color=colour, label=names[n] if n < len(names) else str(n))
        axes.set_title("Alignment error in training")
        scale_steps(axes, [v for entry in curve for v in entry["error"]])
        axes.legend(title="layer", ncols=1 + (count - 1) // 8, fontsize=8)
    return picture


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
    picture, panels = figure(columns=len(terms), width=max(5, 3.3 * len(terms)), height=3.4)
    for axes, term in zip(panels, terms, strict=True):
        for j, (name, log) in enumerate(logs.items()):
            points = [(e["step"], e[term]) for e in log if term in e]
            look = {"color": OTHERS[(j + 2) % len(OTHERS)], "linestyle": DASHES[(j - 1) % len(DASHES)] if j else "-"}
            axes.plot(*zip(*points, strict=True), label=name if axes is panels[0] else None, **look)
        axes.set_title(titles[term])
        scale_steps(axes, [e[term] for log in logs.values() for e in log if term in e])
    panels[0].set_ylabel("nats per token" if terms != ["loss"] else "loss")
    picture.legend(loc="outside lower center", ncols=len(logs), title="expert")
    return picture


def draw_gates(results):
    """Mean output gate of each head, layers down."""
    if not (gates := results.get("gates")):
        return None
    heads, layers = max(map(len, gates)), len(gates)
    picture, (axes,) = figure(width=min(12, 3.2 + 0.5 * heads), height=min(10, 1.6 + 0.42 * layers))
    filled = [row + [math.nan] * (heads - len(row)) for row in gates]
    image = axes.imshow(filled, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for n, row in enumerate(gates if heads * layers <= 128 else ()):
        for h, gate in enumerate(row):
            look = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if gate < 0.55 else "black"}
            axes.text(h, n, f"{gate:.2f}", **look)
    axes.set(xlabel="head", ylabel="hybrid layer", title="Mean output gate")
    axes.set_xticks(range(0, heads, 1 + heads // 24))
    axes.set_yticks(range(0, layers, 1 + layers // 24))
    axes.grid(visible=False)
    picture.colorbar(image, ax=axes, label="0: window    1: mLSTM", ticks=[0, 0.25, 0.5, 0.75, 1])
    return picture


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


# --- Markdown --------------------------------------------------------------------------------------------------


def write_report(results, run_dir):
    """Write `report.md` and its pictures into `run_dir`; returns the names of the files.

    Args:
        results: any of these parts; what is missing is left out of the report. "title": text.  "teacher": its name.
            "contradictions": {model: {domain: samples}}, see `scores.contradictions`: the scores are none.
            "teacher_scores": {"exact_match": {domain: share}, "perplexity": {domain: value}}. "students": {name: the
            same form, and "kl" and "top1" {source: value}}, in the order of the stages, the final student last. "win_and_tie": {student:
            `dataclasses.asdict` of a `WinAndTie`}. "alignment": {"layers": [{"layer", "before", "after"}], "curve":
            [{"step", "error": [per layer]}]}, relative squared errors. "distillation": {expert: [{"step", "loss", "ce",
            "kl"}]}, nats per token. "gates": [[mean output gate per head] per hybrid layer]. "comparison":
            `plain_floats` of `evaluation.comparison.compare`.  "efficiency": what `write_efficiency` takes.
            "long_context": rows of `sections.HEAD`, with "task".  "notes": sentences on how it was evaluated.
            "sample": {"prompt", "output"}.  "seconds": {stage: seconds}.  "peak_memory_mib": number.
    Raises:
        ConfigError: matplotlib is not installed.
        CheckpointWriteError: the disk refused.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, (draw, caption) in PICTURES.items():
        if (image := as_png(draw, results)) is None:
            (folder / name).unlink(missing_ok=True)  # an earlier report's
        else:
            write_file(folder / name, image)
            pictures[name] = caption
    write_file(folder / "report.md", (report_markdown(results, pictures) + "\n").encode())
    return ["report.md", *pictures]


def report_markdown(results, pictures=()):
    """The report's text; `pictures` is {file name: caption}."""

    def shown(*names):
        return [f"![{pictures[n]}]({n})\n\n*{pictures[n]}*" for n in names if n in pictures]

    parts = [f"# {escaped(results.get('title', 'Report'))}"]
    if wrong := results.get("contradictions"):
        parts += ["## A contradiction, not a score", escaped(named_contradictions(wrong)) + "."]
    parts += [*verdict_text(results), *map(escaped, results.get("notes") or [])]
    scores, perplexities = score_rows(results, "exact_match", percent), score_rows(results, "perplexity", number)
    if len(scores) > 1:
        parts += ["## Exact match", markdown_table([*scores, *verdict_rows(results)])]
        parts += shown("domains.png", "win_and_tie.png")
    if len(perplexities) > 1:
        parts += ["## Perplexity", markdown_table(perplexities)]
    for title, kind, show in AGREEMENT:
        rows = score_rows(results, kind, show)
        parts += [f"## {title}", markdown_table(rows)] if len(rows) > 1 else []
    far = long_context_parts(results.get(LONG_CONTEXT))
    parts += [*comparison_parts(results), *(["## Long context", *far] if far else [])]
    for title, name in (("Alignment", "alignment.png"), ("Distillation", "losses.png"), ("Output gates", "gates.png")):
        parts += [f"## {title}", *shown(name)] if name in pictures else []
    if sample := results.get("sample"):
        parts += ["## A sample", "Prompt:", fenced(sample["prompt"]), "Greedy continuation:", fenced(sample["output"])]
    parts += [*cost_parts(results), *shown("efficiency.png")]
    if rows := time_rows(results):
        parts += ["## Time and memory", markdown_table(rows)]
    if "peak_memory_mib" in results:
        parts += ["## Time and memory"] * (not rows) + [f"Peak memory: {results['peak_memory_mib']:,.0f} MiB."]
    return "\n\n".join(parts)


def verdict_text(results):
    """What came out, as [one paragraph]; [] where nothing was compared."""
    name = final(results)
    if not (v := (results.get("win_and_tie") or {}).get(name)):
        return []
    against = f" {escaped(results['teacher'])}" if results.get("teacher") else ""
    count = v["wins"] + v["ties"] + v["losses"]
    if more := len(v["recovery"]) - count:
        left_out = f" ({more} more do{'es' * (more == 1)} not count, as the teacher has no right answer)"
    text = (
        f"The student **{escaped(name)}** against its teacher{against} on {count} domains{left_out if more else ''}: "
        f"{v['wins']} won, {v['ties']} tied, {v['losses']} lost; {c_0_and_alpha(v)}."
    )
    recovered = {domain: r for domain, r in v["recovery"].items() if r is not None}
    worst = min(recovered, key=recovered.get, default=None)
    text += f" Lowest recovery: {percent(recovered[worst])} ({escaped(worst)})." if worst else ""
    return [text + (f" In brackets: {percent(LEVEL)} of resamples of the answers." if v.get("resampled") else "")]
