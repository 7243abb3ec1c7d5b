"""The pictures of the README and the documents' front page: `python docs/pictures/draw.py`, from docs/arena/results.json and nothing else.

Each is drawn twice, for light and for dark pages. The layer is an SVG that is written here; the results are drawn by matplotlib.
"""

import json
import runpy
from pathlib import Path

from xlstm_hybrid.reports.plots import BLUE, GREEN, MEANING, VERMILION, label_ends, legible

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
THEMES = {  # name of the theme: colours of letters, of lines beside them, of what is there but plays no part, and of the page
    "light": {"ink": "#1f2328", "line": "#59636e", "faint": "#d1d9e0", "page": "#ffffff", "panel": "#f6f8fa"},
    "dark": {"ink": "#f0f6fc", "line": "#9198a1", "faint": "#3d444d", "page": "#0d1117", "panel": "#151b23"},
}
FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""
LINES = {
    "teacher": "the teacher",
    "kept-1": "one kept group",
    "hybrid": "hybrid",
    "no-align": "no stage I",
}  # arms of the arena: words for them


# --- the layer -----------------------------------------------------------------------------------------------------


def text(x, y, words, colour, size=13, weight=400, anchor="middle"):
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{words}</text>'


def box(x, y, width, height, fill, stroke, dashes=""):
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}" stroke-width="1.5"{dashed}/>'


def arrow(points, colour):
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#tip)"/>'


def tokens(x, y, colours, stroke):
    """A row of tokens, one square each; None is a token that is not seen."""
    return "".join(
        f'<rect x="{x + 12 * j}" y="{y}" width="9" height="9" rx="2" fill="{colour or "none"}" fill-opacity="{opacity}" stroke="{stroke}"/>'
        for j, (colour, opacity) in enumerate(colours)
    )


def layer(theme):
    """The hybrid layer from its input to its output, an SVG of 440 x 482."""
    c, n = THEMES[theme], 16
    grey = [(c["line"], 0.75)] * n
    memory = [(VERMILION, 0.15 + 0.75 * j / (n - 1)) for j in range(n)]
    window = [(GREEN, 0.9)] * 2 + [(None, 0)] * 9 + [(GREEN, 0.9)] * 5
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 482" width="440" height="482" role="img" {FONT}>',
        "<title>A layer of the student</title>",
        "<desc>Queries, keys and values of the teacher's projections go to an mLSTM, which reads the whole text into a "
        "state of constant size, and to softmax attention over a window and the first tokens. A learned gate mixes both "
        "before the teacher's output projection.</desc>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z" fill="{c["line"]}"/></marker></defs>',
        box(90, 6, 260, 62, "none", c["line"], "5 4"),
        text(220, 28, "teacher: softmax attention", c["ink"], 13, 600),
        tokens(125, 38, grey, c["line"]),
        arrow([(220, 70), (220, 98)], c["line"]),
        text(230, 89, "becomes", c["line"], 12, anchor="start"),
        box(110, 100, 220, 34, c["panel"], c["line"]),
        text(220, 122, "q, k, v: the teacher’s weights", c["ink"]),
        arrow([(165, 135), (108, 168)], c["line"]),
        arrow([(275, 135), (332, 168)], c["line"]),
        box(6, 170, 204, 138, c["panel"], VERMILION),
        text(108, 193, "mLSTM", c["ink"], 15, 700),
        text(108, 213, "reads the whole text", c["ink"]),
        tokens(13, 224, memory, c["line"]),
        text(108, 254, "into a state of constant size", c["ink"]),
        text(108, 277, "new: feature maps of q and k,", c["line"], 12),
        text(108, 293, "input and forget gates", c["line"], 12),
        box(230, 170, 204, 138, c["panel"], GREEN),
        text(332, 193, "window + sinks", c["ink"], 15, 700),
        text(332, 213, "one softmax over", c["ink"]),
        tokens(237, 224, window, c["line"]),
        text(332, 254, "the first 4 and last W tokens", c["ink"]),
        text(332, 285, "nothing new", c["line"], 12),
        arrow([(108, 309), (165, 345)], c["line"]),
        arrow([(332, 309), (275, 345)], c["line"]),
        box(75, 348, 290, 64, c["panel"], BLUE),
        text(220, 373, "o · mLSTM + (1 − o) · window", c["ink"], 15, 700),
        text(220, 397, "new: the gate o, per head and token", c["line"], 12),
        arrow([(220, 413), (220, 438)], c["line"]),
        box(110, 440, 220, 34, c["panel"], c["line"]),
        text(220, 462, "output projection: the teacher’s", c["ink"]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# --- the results ---------------------------------------------------------------------------------------------------


def results(theme):
    """Recall of one fact above bytes of the cache, both against the length of the context: the Llama teacher of the arena."""
    from matplotlib.figure import Figure

    c, found = THEMES[theme], json.loads((ROOT / "docs/arena/results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["teachers"]["llama"]["rows"] if row["name"] in LINES}
    lengths, names = [str(n) for n in found["lengths"]], [name for name in LINES if name in rows]
    colours = dict(zip(LINES, (c["line"], MEANING["kept"], MEANING["student"], MEANING["unaligned"]), strict=True))
    if theme == "dark":
        colours["hybrid"] = "#3d9be0"  # the blue of the palette is too dark for a dark page
    x = [n / found["window"] for n in found["lengths"]]
    made = Figure(figsize=(4.4, 5.0), dpi=200, layout="constrained", facecolor=c["page"])
    recall, cache = made.subplots(2, 1, sharex=True)
    covered = [min(1, (found["window"] + found["sinks"]) / n) for n in found["lengths"]]
    recall.fill_between(x, covered, color=c["faint"], alpha=0.6, zorder=0, linewidth=0)
    recall.annotate(
        "what window and\nsinks cover",
        (x[0], 0.04),
        xytext=(3, 0),
        textcoords="offset points",
        color=c["ink"],
        fontsize=8.5,
    )
    ends = {recall: [], cache: []}
    for name in names:
        row, colour = rows[name], colours[name]
        heights = {
            recall: [row["recall"]["single"][n]["accuracy"]["mean"] for n in lengths],
            cache: [row["cache_bytes"][n] / 1e6 for n in lengths],
        }
        for axes, values in heights.items():
            if axes is recall or name != "no-align":  # its cache is the hybrid's
                axes.plot(x, values, "o-", color=colour, linewidth=2, markersize=4, clip_on=False)
                ends[axes].append((values[-1], LINES[name], colour))
    recall.set(ylim=(-0.02, 1.05), title="One fact recalled, share of rows")
    cache.set(ylim=(-0.1, 4.4), title="Cache of one sequence, MB", xlabel="length of the context, windows")
    for axes in (recall, cache):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{n:g}" for n in x])
        axes.set_xlim(x[0] / 1.08, x[-1])
        axes.minorticks_off()
        axes.set_facecolor(c["page"])
        axes.grid(color=c["faint"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(c["line"])
        axes.tick_params(colors=c["ink"], labelsize=9)
        axes.title.set(color=c["ink"], fontsize=10.5, fontweight="bold")
        axes.xaxis.label.set(color=c["ink"], fontsize=9.5)
        label_ends(axes, ends[axes], gap=0.09, letters=legible if theme == "light" else None)
    return made


# --- badges --------------------------------------------------------------------------------------------------------


def badges():
    """{file: SVG} of the facts at the head of the README, as the table of versions has them."""
    table = runpy.run_path(str(ROOT / "src/xlstm_hybrid/environment/versions.py"))
    python, oldest = table["PYTHON"], table["PACKAGES"]["transformers"].floor
    facts = {"paper": ("arXiv", "2603.15590"), "python": ("python", f"{python}+"), "transformers": ("transformers", f"{oldest}+"),
             "licence": ("licence", "Apache-2.0")}  # fmt: skip
    return {f"badge-{name}.svg": badge(*fact) for name, fact in facts.items()}


def badge(left, right):
    first, second = (round(6.6 * len(words) + 14) for words in (left, right))
    width = first + second
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" {FONT} font-size="11">'
        f"<title>{left}: {right}</title>"
        f'<rect width="{width}" height="20" rx="4" fill="#424a53"/>'
        f'<path d="M{first} 0h{second - 4}a4 4 0 0 1 4 4v12a4 4 0 0 1-4 4h-{second - 4}z" fill="{BLUE}"/>'
        f'<g fill="#ffffff" text-anchor="middle"><text x="{first / 2}" y="14">{left}</text>'
        f'<text x="{first + second / 2}" y="14">{right}</text></g></svg>\n'
    )


def main():
    for theme in THEMES:
        (HERE / f"layer-{theme}.svg").write_text(layer(theme), encoding="utf-8")
        results(theme).savefig(HERE / f"results-{theme}.png", metadata={"Software": None}, transparent=True)
    for name, svg in badges().items():
        (HERE / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
