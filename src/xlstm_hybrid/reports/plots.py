"""One look for pictures: the palette, what each colour stands for, and labels beside the lines that they name.

The colours are Okabe and Ito's, told apart with every kind of colour vision. At most six lines of a picture have one of
them; the rest is grey.
"""

import io

from xlstm_hybrid.errors import ConfigError

INK, GREY, FAINT = "#555555", "#999999", "#cfcfcf"
BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)  # in the order in which a picture takes them
MEANING = {  # the same colour for the same thing in every picture
    "teacher": INK,
    "student": BLUE,  # the hybrid of the paper
    "wide": ORANGE,  # more features per head
    "window": GREEN,  # window and sinks alone
    "kept": PURPLE,  # key/value groups that keep the teacher's attention
    "memory": VERMILION,  # the mLSTM alone
    "unaligned": SKY,  # without stage I
}
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


def figure(columns=1, width=7.2, height=3.8, rows=1):
    """A figure without global state, and its axes in one list."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    return picture, list(picture.subplots(rows, columns, squeeze=False).flat)


def as_png(draw, results):
    """The bytes of the figure that `draw(results)` returns, in our style; None where there is nothing to draw.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ConfigError(
            "the report's pictures need matplotlib, found none; pip install 'xlstm-hybrid[train]'"
        ) from error
    with rc_context(STYLE):
        drawn, buffer = draw(results), io.BytesIO()
        if drawn is None:
            return None
        drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def legible(colour):
    """A colour for letters on white: the line's own, darkened where its contrast is below 4.5 : 1."""
    parts = [int(colour[j : j + 2], 16) / 255 for j in (1, 3, 5)]
    luminance = sum(share * part**2.2 for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    darker = min(1.0, 0.17 / luminance) ** (1 / 2.2)
    return "#" + "".join(f"{round(255 * darker * part):02x}" for part in parts)


def moved_apart(heights, gap, low, high):
    """Heights in the range from low to high that are moved apart to about `gap`, in the same order, each as near to
    where it was as that allows.
    """
    order = sorted(range(len(heights)), key=lambda j: heights[j])
    placed = [min(max(heights[j], low), high) for j in order]
    for _ in range(200):
        for n in range(1, len(placed)):
            missing = gap - (placed[n] - placed[n - 1])
            if missing > 0:
                placed[n - 1], placed[n] = max(placed[n - 1] - missing / 2, low), min(placed[n] + missing / 2, high)
    return [placed[order.index(j)] for j in range(len(heights))]


def label_ends(axes, ends, gap=0.06, letters=legible):
    """Names of lines at the right edge of `axes`, where they end, in the lines' colours.

    Args:
        ends: [(height of the line's end, name, colour)].
        gap: least distance of two names, as a share of the height of the axes.
        letters: from a line's colour to that of its name; None: the same.
    """
    low, high = axes.get_ylim()
    apart = gap * (high - low)
    for (height, name, colour), place in zip(
        ends, moved_apart([end[0] for end in ends], apart, low, high), strict=True
    ):
        look = {
            "color": letters(colour) if letters else colour,
            "fontsize": 9,
            "va": "center",
            "annotation_clip": False,
        }
        if abs(place - height) > apart / 4:
            look["arrowprops"] = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        where = ("axes fraction", "data")
        axes.annotate(name, (1, height), xytext=(1.03, place), xycoords=where, textcoords=where, **look)
