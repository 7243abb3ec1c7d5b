"""The arena's report: `arena.md`, pictures and `results.json` from one summary; its words: `report_template.md`."""

import json
import math
from pathlib import Path
from string import Template

from xlstm_arena.arms import TEACHER
from xlstm_arena.summary import MAIN, accuracy, pareto, rounded_json
from xlstm_hybrid.checkpoint.files import markdown_table, write_file
from xlstm_hybrid.reports.plots import FAINT, GREY, INK, MEANING, PALETTE, as_png, figure, label_ends, legible

FOLDER, PAGE, NUMBERS = "arena", "arena.md", "results.json"
NONE = "–"
KINDS = ("single", "multikey", "multiquery")


# --- words -------------------------------------------------------------------------------------------------------


def decimal(value, places=2):
    """0.5 as .50; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:.{places}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and not text.lstrip("-").startswith("1") else text


def with_interval(found, places=2):
    """A stat as `.52 ± .04`, or as `.52° [.48, .57]` where the interval is over rows."""
    if found is None:
        return NONE
    if found["low"] is None:
        return decimal(found["mean"], places)
    mean, low, high = (decimal(found[name], places) for name in ("mean", "low", "high"))
    if found["over"] == "seeds":
        return f"{mean} ± {decimal(found['high'] - found['mean'], places)}"
    return f"{mean}° [{low}, {high}]"


def kilobytes(count):
    """Bytes in kB of a thousand."""
    return NONE if count is None else f"{count / 1000:.1f} kB"


def in_windows(length, window):
    return f"{length / window:g} W"


def main_rows(summary, teacher):
    """The rows of a teacher's tables: the teacher, then the arms in their order."""
    return summary["teachers"][teacher]["rows"]


def first_teacher(summary):
    """The first teacher that has results, or None."""
    return next((name for name, content in summary["teachers"].items() if content["rows"]), None)


def show_main(summary, teacher):
    W, last, rows = summary["window"], summary["lengths"][-1], main_rows(summary, teacher)
    at = [n for n in (8, 16, 64) if n * W in summary["lengths"]]
    at = at[1:2] or at[:1]  # windows of the recall's columns
    recall = [f"{kind} {n} W (excess)" for kind in KINDS for n in at]
    costs = ["M tokens", "CPU min", "CPU / reference's"]
    head = ["arm", "seeds", "C_0", "α*", "short", *recall, f"cache at {in_windows(last, W)}", *costs, "perplexity"]
    usual = next((mean(row["cpu_seconds"]) for row in rows if row["name"] == summary["reference"]), None)
    units = (("tokens", 1e6), ("cpu_seconds", 60), ("cpu_seconds", usual or math.inf))
    table = [head]
    for row in rows:
        line = [row["name"], len(row["seeds"]), decimal(row.get("c_0")), decimal(row.get("alpha_star"), 3)]
        line += [with_interval(row["short"], 3)]
        line += [accuracy_and_excess(row, kind, n * W) for kind in KINDS for n in at]
        line += [kilobytes(row["cache_bytes"].get(str(last)))]
        trained = row["row"] == MAIN and row["name"] != TEACHER
        for key, unit in units:
            line.append(f"{row[key]['mean'] / unit:.2f}" if trained and row[key] is not None else NONE)
        table.append([*line, decimal(mean(row["perplexity"]), 3)])
    return markdown_table(table)


def mean(found):
    return None if found is None else found["mean"]


def accuracy_and_excess(row, kind, length):
    cell = row["recall"][kind][str(length)]
    return f"{with_interval(cell['accuracy'])} ({decimal(mean(cell['excess']))})"


def length_head(summary):
    """Head of a table with a column per length."""
    return ["arm", *(in_windows(length, summary["window"]) for length in summary["lengths"])]


def show_accuracy(summary, teacher, kind):
    """Accuracy ± interval (excess) at every length, under the coverage."""
    lengths = summary["lengths"]
    covered = [decimal(min(1.0, (summary["window"] + summary["sinks"]) / length)) for length in lengths]
    table = [length_head(summary), ["(coverage c of W + sinks)", *covered]]
    for row in main_rows(summary, teacher):
        table.append([row["name"], *(accuracy_and_excess(row, kind, n) for n in lengths)])
    return f"**{kind}: accuracy ± interval (excess)**\n\n{markdown_table(table)}"


def show_cache(summary, teacher):
    table = [length_head(summary)]
    for row in main_rows(summary, teacher):
        table.append([row["name"], *(kilobytes(row["cache_bytes"].get(str(n))) for n in summary["lengths"])])
    return f"**Cache of one sequence**\n\n{markdown_table(table)}"


def show_recall(summary, teacher):
    """Two tables per kind, accuracy and `beyond`, then the caches and the short tasks."""
    parts, rows = [], main_rows(summary, teacher)
    for kind in KINDS:
        table = [length_head(summary)]
        for row in rows:
            cells = row["recall"][kind]
            table.append([row["name"], *(decimal(mean(cells[str(n)]["beyond"])) for n in summary["lengths"])])
        beyond = f"**{kind}: accuracy on facts beyond the window**\n\n{markdown_table(table)}"
        parts += [show_accuracy(summary, teacher, kind), beyond]
    parts.append(show_cache(summary, teacher))
    tasks = list(rows[0]["tasks"])
    table = [["arm", *tasks], *([row["name"], *(with_interval(row["tasks"][t], 3) for t in tasks)] for row in rows)]
    return "\n\n".join([*parts, f"**Short tasks**\n\n{markdown_table(table)}"])


def show_branches(summary, teacher):
    """Accuracy by distance of the reference and its rows, all lengths together."""
    rows = [row for row in main_rows(summary, teacher) if row["arm"] == summary["reference"]]
    if not rows:
        return f"The reference arm {summary['reference']} has no results yet."
    parts = []
    for kind in KINDS:
        spans = [(p["from"], p["to"]) for p in rows[0]["by_distance"][kind]]
        table = [["row", *(f"{a}–{b - 1}" for a, b in spans)]]
        for row in rows:
            found = {(p["from"], p["to"]): p["accuracy"] for p in row["by_distance"][kind]}
            table.append([row["name"], *(decimal(found.get(span)) for span in spans)])
        title = f"**{kind}: accuracy by distance from fact to question, tokens, all lengths and seeds together**"
        parts.append(f"{title}\n\n{markdown_table(table)}")
    return "\n\n".join(parts)


def show_levers(summary, teacher):
    table = [["arm", "single, excess gained", "multikey, excess gained", "worth a GPU"]]
    for lever in (e for e in summary["levers"] if e["teacher"] == teacher):
        gains, worth = [with_interval(lever[kind]) for kind in KINDS[:2]], "yes" if lever["worth_a_gpu"] else "no"
        table.append([lever["name"], *gains, worth])
    return markdown_table(table) if len(table) > 1 else "Nothing to compare yet."


def show_goals(summary, teacher):
    """Both goals; of the arms that miss one, only the nearest are named."""
    texts = {
        "constant": "Constant memory: single ≥ .95 at 32 W within 2x the bytes of the reference, and C_0 ≥ .5.",
        "growing": "Growing memory: single ≥ .95 and multikey ≥ .60 of the teacher's at 64 W with ≤ 5 % of its bytes, "
        "C_0 ≥ .5.",
    }
    parts = []
    for goal, text in texts.items():
        found = [g for g in summary["goals"] if g["goal"] == goal and g["teacher"] == teacher]
        met = [g["name"] for g in found if g["met"]]
        growing = goal == "growing"
        heads = ["multikey / teacher's", "bytes / teacher's"] if growing else ["bytes / reference's"]
        table = [["arm", "single", *heads, "C_0", "met"]]
        for g in sorted(found, key=lambda g: (-g["met"], -g["single"]))[:8]:
            more = [decimal(g["multikey"])] if growing else []
            cells = [decimal(g["single"]), *more, f"{g['bytes']:.3f}", decimal(g["c_0"])]
            table.append([g["name"], *cells, "yes" if g["met"] else "no"])
        outcome = f"Met by {', '.join(met)}." if met else "Met by no arm." if found else "No figures yet."
        shape = summary["teachers"][teacher]["shape"]
        one = 1 / (shape["layers"] * shape["groups"])
        if growing and one > 0.05:
            outcome += f" One key/value group of one layer is already {one:.1%} of this teacher's cache: no kept group "
            outcome += "can meet it here."
        nearest = f" The arms that come nearest, by single:\n\n{markdown_table(table)}" if found else ""
        parts.append(f"{text} **{outcome}**{nearest}")
    return "\n\n".join(parts)


def show_orderings(summary):
    """Every ordering on the first teacher, on the others those that were run."""
    table = [["published", "source", "teacher", "measure", "better", "worse", "difference", "here"]]
    columns = ("claim", "source", "teacher", "measure", "better", "worse", "difference", "verdict")
    for e in summary["orderings"]:
        if e["difference"] is not None or e["teacher"] == first_teacher(summary):
            e = e | {"difference": with_interval(e["difference"], 3)}
            table.append([e[name] for name in columns])
    return markdown_table(table) if len(table) > 1 else "No results yet."


def show_missing(summary):
    """Arms without results: failed, stale, or runnable and not run; where few were run, those are named instead."""
    lines = []
    for teacher, content in summary["teachers"].items():
        ran, missing = [row["name"] for row in content["rows"] if row["row"] == MAIN], content["missing"]
        if len(missing) > 2 * len(ran):
            missing = [f"all {len(missing)} but {', '.join(ran) or 'none'}"]
        lines += [f"- {teacher}: runnable, not run: {', '.join(missing)}"] if missing else []
        if content["stale"]:
            stale = ", ".join(content["stale"])
            lines.append(f"- {teacher}: made from other settings than the present ones, left out: {stale}")
        lines += [f"- {job}: failed: {error}" for job, error in content["failed"].items()]
    return "\n".join(lines) or "Nothing: every arm has results on every teacher."


def show_cached(summary, teacher):
    """One sentence about the cache's checks."""
    checks = [(row["name"], check) for row in main_rows(summary, teacher) for check in row["cached"]]
    wrong = sorted({name for name, c in checks if "passed" in c and not c["passed"]})
    refused = sorted({name for name, c in checks if "refused" in c})
    worst = max((c["error"] for _, c in checks if "error" in c), default=0.0)
    text = f"Cache against one pass, over {len(checks)} checks: logits differ by at most {worst:.1e} of their scale"
    text += f"; **not exact: {', '.join(wrong)}**" if wrong else ""
    return text + (f"; no cache: {', '.join(refused)}" if refused else "") + "."


def others_of(summary, teacher):
    """Names of the other teachers that have results."""
    return [name for name, content in summary["teachers"].items() if name != teacher and content["rows"]]


def show_others(summary, teacher, shown):
    """For every other teacher that has results what the first one's sections show at length: main table, recall,
    caches, goals.

    Args:
        shown: gives the pictures of some names.
    """
    parts = []
    for name in others_of(summary, teacher):
        drawn = shown([f"{name}_{what}.png" for what in (*KINDS[:2], "front")])
        parts += [f"### {name}", shown_shape(summary["teachers"][name]["shape"]), show_main(summary, name), drawn]
        parts += [show_accuracy(summary, name, kind) for kind in KINDS]
        parts += [show_cache(summary, name), show_goals(summary, name)]
    return "\n\n".join(parts) or "No arm has been run on another teacher yet."


def shown_shape(shape):
    heads = f"{shape['heads']} heads of {shape['head_dim']} dims in {shape['groups']} key/value groups"
    return f"{shape['parameters'] / 1e6:.2f} M parameters: {shape['layers']} layers of {heads}."


def show_setting(summary, teacher):
    listed = lambda fields: ", ".join(f"{k} {v}" for k, v in fields.items())  # noqa: E731
    setting, seeds = summary["setting"], ", ".join(map(str, summary["seeds"]))
    shape = shown_shape(summary["teachers"][teacher]["shape"])
    lines = [f"Teacher: {teacher}, {shape} Students: {listed(setting['student'])}. Seeds {seeds}.", ""]
    for stage, title in (("align", "Stage I"), ("distill", "Stage II")):
        lines.append(f"- {title}: {listed({**setting['data'], **setting[stage]})}")
    lines.append(f"- Tests: {listed(setting['evaluate'])}")
    if row := next((r for r in main_rows(summary, teacher) if r["name"] == TEACHER), None):
        worst = {kind: min((accuracy(row, kind, str(n)), n) for n in summary["lengths"]) for kind in KINDS}
        figures = ", ".join(f"{k} {decimal(a, 3)} (L = {n})" for k, (a, n) in worst.items())
        lines.append(f"- The teacher's own recall, at its worst length: {figures}")
    return "\n".join(lines)


# --- pictures ----------------------------------------------------------------------------------------------------


COLOURS = {  # of the arms that have one; all others are grey
    TEACHER: MEANING["teacher"],
    "hybrid": MEANING["student"],
    "mlstm": MEANING["memory"],
    "wide": MEANING["wide"],
    "kept-1": MEANING["kept"],
    "kept-ranked": MEANING["kept"],
    "no-align": MEANING["unaligned"],
    "hybrid/memory": MEANING["memory"],
    "hybrid/window": MEANING["window"],
}


def coloured(names):
    """{name: colour} of those of `names` that have one, no colour twice, the present ones of `COLOURS` in its order."""
    found = {}
    for name in sorted(names, key=list(COLOURS).index):
        if COLOURS[name] not in found.values():
            found[name] = COLOURS[name]
    return found


def draw_recall(summary, teacher, kind):
    """Accuracy against length: a line per arm of the first tier, those of `COLOURS` with their names, over the
    coverage.
    """
    W, lengths = summary["window"], summary["lengths"]
    rows = [r for r in main_rows(summary, teacher) if r["row"] == MAIN and r["tier"] == 1]
    colours = coloured(row["name"] for row in rows if row["name"] in COLOURS)
    drawing, (axes,) = figure(width=7, height=4.2)
    x, ends = [n / W for n in lengths], []
    axes.fill_between(x, [min(1, (W + summary["sinks"]) / n) for n in lengths], color="#ebebeb", zorder=0)
    axes.annotate("coverage", (x[0], 0.03), xytext=(4, 0), textcoords="offset points", color=INK, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length of the context, windows", ylabel="accuracy", ylim=(-0.03, 1.04))
    axes.set(title=f"Recall against length: {kind}")
    axes.set_xticks(x, [f"{n:g}" for n in x])
    axes.set_xlim(x[0] / 1.1, x[-1])
    for row in rows:
        cells, colour = [row["recall"][kind][str(n)]["accuracy"] for n in lengths], colours.get(row["name"])
        heights = [c["mean"] for c in cells]
        axes.plot(x, heights, color=colour or FAINT, linewidth=2 if colour else 1, zorder=3 if colour else 1)
        if colour:
            ends.append((heights[-1], row["name"], colour))
            axes.plot(x, heights, "o", color=colour, markersize=3.5, zorder=3, clip_on=False)
        if colour and cells[0]["over"] == "seeds":
            low, high = ([min(max(c[side], 0), 1) for c in cells] for side in ("low", "high"))
            places = [a * 1.012 ** (len(ends) - 1 - len(colours) / 2) for a in x]
            axes.vlines(places, low, high, color=colour, alpha=0.4, linewidth=1.2, zorder=2)
    if others := [accuracy(row, kind, str(lengths[-1])) for row in rows if row["name"] not in colours]:
        ends.append((sum(others) / len(others), f"{len(others)} more arms", GREY))
    label_ends(axes, ends)
    return drawing


def dot(axes, x, y, name, colour, beside=True):
    """A point of a scatter plot: with its name and colour, or a faint one without a name."""
    axes.scatter(x, y, s=36 if colour else 18, color=colour or FAINT, zorder=3 if colour else 1)
    if colour and beside:
        axes.annotate(name, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=9, color=legible(colour))


def draw_pareto(summary, teacher, length):
    """Recall against bytes with the Pareto front, single above multikey; what is on the front or in `COLOURS` has a
    name.
    """
    drawing, panels = figure(rows=2, width=7, height=7.4)
    at, rows = str(length), [row for row in main_rows(summary, teacher) if str(length) in row["cache_bytes"]]
    for axes, kind in zip(panels, ("single", "multikey"), strict=True):
        points = [(row["name"], row["cache_bytes"][at], accuracy(row, kind, at)) for row in rows]
        front, colours = pareto(points), coloured(name for name, *_ in points if name in COLOURS)
        line = zip(*sorted((b, a) for name, b, a in points if name in front), strict=True)
        axes.plot(*line, drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=2)
        c, named = min(1, (summary["window"] + summary["sinks"]) / length), set()
        for name, b, a in points:
            colour = colours.get(name) or (INK if name in front and (b, a) not in named else None)
            named |= {(b, a)} if name in front else set()
            # what lies on the floor is in the tables
            dot(axes, b, a, name, colour, beside=name in front or a > c + 0.1)
        axes.axhline(c, color=GREY, linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set(ylabel="accuracy", ylim=(-0.03, 1.08), title=f"{kind} at {in_windows(length, summary['window'])}")
    panels[-1].set_xlabel("bytes of one sequence's cache (line: the front; dotted: the coverage)")
    return drawing


def draw_cost(summary, teacher):
    """The second view: what training cost against what came of it, short tasks above multikey at 16 W."""
    length, rows = 16 * summary["window"], [r for r in main_rows(summary, teacher) if r["row"] == MAIN]
    rows = [r for r in rows if r["name"] != TEACHER and r["cpu_seconds"] is not None]
    if length not in summary["lengths"] or not rows:
        return None
    drawing, panels = figure(rows=2, width=7, height=6.4)
    colours = coloured(row["name"] for row in rows if row["name"] in COLOURS)
    multikey = f"multikey at {in_windows(length, summary['window'])}"
    for axes, title in zip(panels, ("short", multikey), strict=True):
        for row in rows:
            height = row["short"]["mean"] if title == "short" else accuracy(row, "multikey", str(length))
            place = row["cpu_seconds"]["mean"] / 60, height
            dot(axes, *place, row["name"], colours.get(row["name"]), beside=title != "short")
        axes.margins(x=0.12)
        axes.set(ylabel="accuracy", title=title)
    panels[-1].set_xlabel("CPU minutes of training")
    return drawing


def draw_distances(summary, teacher):
    """What the branches of the reference remember, by distance."""
    rows = [row for row in main_rows(summary, teacher) if row["arm"] == summary["reference"]]
    if len(rows) < 2:
        return None
    drawing, panels = figure(rows=len(KINDS), width=7, height=8)
    colours = {row["name"]: COLOURS.get(row["name"]) or PALETTE[j % len(PALETTE)] for j, row in enumerate(rows)}
    for axes, kind in zip(panels, KINDS, strict=True):
        ends = []
        for row in rows:
            parts, colour = row["by_distance"][kind], colours[row["name"]]
            middles = [math.sqrt(max(p["from"], 8) * p["to"]) for p in parts]
            axes.plot(middles, [p["accuracy"] for p in parts], "o-", color=colour)
            ends.append((parts[-1]["accuracy"], row["name"], colour))
        axes.axvline(summary["window"], color=GREY, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        right = max(max(line.get_xdata()) for line in axes.lines)
        axes.set(ylabel="accuracy", ylim=(-0.03, 1.04), title=kind, xlim=(axes.get_xlim()[0], right))
        label_ends(axes, ends, gap=0.11)
    panels[-1].set_xlabel("distance from fact to question, tokens (line: the window)")
    return drawing


def pictures(summary, teacher):
    """{file: (function of the summary that draws, caption)} of what there is to draw."""
    W, last, found = summary["window"], summary["lengths"][-1], {}

    def add(file, caption, draw, *args):
        found[f"{file}.png"] = (lambda s: draw(s, *args), caption)

    for kind in KINDS:
        add(kind, f"Recall against length, {kind}; grey area: the coverage.", draw_recall, teacher, kind)
    branches = "Accuracy by distance with one branch at a time; the line is the window."
    add("branches", branches, draw_distances, teacher)
    add("cost", "Short tasks and multikey against CPU minutes of training.", draw_cost, teacher)
    for n in (16, 32, 64):
        if n * W in summary["lengths"]:
            caption = f"Recall against bytes at {n} W, and the Pareto front."
            add(f"front_{n}w", caption, draw_pareto, teacher, n * W)
    for name in others_of(summary, teacher):
        for kind in KINDS[:2]:
            caption = f"Recall against length, {kind}, {name}; grey area: the coverage."
            add(f"{name}_{kind}", caption, draw_recall, name, kind)
        add(f"{name}_front", f"Recall against bytes at {in_windows(last, W)}, {name}.", draw_pareto, name, last)
    return found


# --- writing -----------------------------------------------------------------------------------------------------


def page(summary, drawn):
    """The text of `arena.md`.

    Args:
        drawn: {file: caption} of the pictures that are there.
    """
    teacher = first_teacher(summary)
    template = Template((Path(__file__).parent / "report_template.md").read_text(encoding="utf-8"))
    shown = lambda names: "\n\n".join(f"![{drawn[n]}]({FOLDER}/{n})" for n in names if n in drawn)  # noqa: E731
    again = f"Written by `python -m xlstm_arena`; every number is in [{FOLDER}/{NUMBERS}]({FOLDER}/{NUMBERS})."
    if teacher is None:
        return f"# The arena\n\n{again}\n\nNo results yet.\n\n{show_missing(summary)}\n"
    fronts = [name for name in drawn if name.startswith("front_")]
    parts = {
        "generated": again,
        "setting": show_setting(summary, teacher),
        "window": summary["window"],
        "main_table": show_main(summary, teacher),
        "cached": show_cached(summary, teacher),
        "cost": shown(["cost.png"]),
        "curves": shown([f"{k}.png" for k in KINDS]),
        "recall_tables": show_recall(summary, teacher),
        "branches": "\n\n".join(p for p in (shown(["branches.png"]), show_branches(summary, teacher)) if p),
        "front": shown(fronts),
        "levers": show_levers(summary, teacher),
        "goals": show_goals(summary, teacher),
        "orderings": show_orderings(summary),
        "others": show_others(summary, teacher, shown),
        "missing": show_missing(summary),
    }
    return template.substitute(parts)


def write_arena_report(summary, folder):
    """Write `arena.md` and `arena/` (results.json, pictures) into a folder; returns the names of the files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    folder = Path(folder)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    teacher, drawn = first_teacher(summary), {}
    for name, (draw, caption) in pictures(summary, teacher).items() if teacher else ():
        image = as_png(draw, summary)
        if image is None:
            (folder / FOLDER / name).unlink(missing_ok=True)
        else:
            write_file(folder / FOLDER / name, image)
            drawn[name] = caption
    write_file(folder / FOLDER / NUMBERS, (json.dumps(rounded_json(summary), ensure_ascii=False) + "\n").encode())
    write_file(folder / PAGE, page(summary, drawn).encode())
    return [PAGE, f"{FOLDER}/{NUMBERS}", *(f"{FOLDER}/{name}" for name in drawn)]
