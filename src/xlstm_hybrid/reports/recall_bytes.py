"""Recall against the bytes of the cache, as a share of the teacher's: small teachers of the arena and a real model in one picture.

A point is {"name", "share": bytes over those of the teacher, "recall", "coverage", "windows": context over window, "real"};
a curve is a name and its points.
"""

from xlstm_hybrid.checkpoint.files import read_json
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.results import last_part
from xlstm_hybrid.reports.plots import GREY, MEANING, PALETTE, figure, label_ends

ARMS = ("hybrid", "kept-1", "kept-ranked", "teacher")  # of the arena: in the order of their bytes
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # that the axis of bytes names
DOTS = ("o", "s", "^", "D", "v", "P")


def curves_of_arena(summary, kind="single"):
    """{"llama (2M parameters)": points} from docs/arena/results.json."""
    curves = {}
    for teacher, found in summary["teachers"].items():
        rows = {row["name"]: row for row in found["rows"]}
        points = []
        for arm in ARMS if "teacher" in rows else ():
            for length, of in (rows[arm]["recall"].get(kind) or {}).items() if arm in rows else ():
                own, whole = (rows[name]["cache_bytes"][length] for name in (arm, "teacher"))
                point = {"name": arm, "share": own / whole, "recall": of["accuracy"]["mean"], "real": False}
                point |= {"coverage": None if arm == "teacher" else of["coverage"]}
                points.append(point | {"windows": int(length) / summary["window"]})
        if points:
            curves[f"{teacher} ({found['shape']['parameters'] / 1e6:.0f}M parameters)"] = points
    return curves


def curve_of_harness(teacher, students, kind="needle"):
    """Points of a real model from folders of the command `harness`.

    Args:
        teacher: folder of its results.
        students: {name: folder of the results}; of each all lengths of `kind` that the teacher has too.
    Raises:
        EvaluationError: nothing of that kind that both sides have, or a student without a window.
    """
    whole, points = long_context_of(teacher, kind), []
    for name, folder in students.items():
        for length, found in long_context_of(folder, kind).items():
            if length not in whole:
                continue
            if not found["window"]:
                raise EvaluationError(
                    f"{last_part(folder)}: a model without a window; expected students, and the teacher apart"
                )
            windows = length / found["window"]
            point = {"name": name, "share": found["cache_bytes"] / whole[length]["cache_bytes"], "windows": windows}
            points.append(point | {key: found[key] for key in ("recall", "coverage")} | {"real": True})
            above = {"name": "teacher", "share": 1.0, "windows": windows, "recall": whole[length]["recall"]}
            points += [p for p in [above | {"coverage": None, "real": True}] if p not in points]
    if not points:
        raise EvaluationError(
            f"{kind}: {last_part(teacher)} and {', '.join(map(last_part, students.values()))} have no length in common; expected results of "
            f"xlstm-hybrid harness --tasks {kind} of the same lengths"
        )
    return points


def long_context_of(folder, kind):
    """{length: what `harness` wrote} of one kind, from the folder of its results."""
    files = sorted(folder.glob(f"{kind}_*/harness.json"))
    found = [read_json(file, file.parent.name)["long_context"] for file in files]
    return {result["length"]: result for result in found if result}


def draw_recall_bytes(curves, windows=(8, 16, 32)):
    """A panel per context in windows, recall over the share of the teacher's cache; real models in blue, small ones in the
    palette's other colours, dotted the coverage of the real ones. None where no curve has such a context.

    Args:
        curves: {name: points}.
    """
    shown = [n for n in windows if any(p["windows"] == n for points in curves.values() for p in points)]
    if not shown:
        return None
    drawing, panels = figure(columns=len(shown), width=3.4 * len(shown) + 1.2, height=3.8)
    others = [colour for colour in PALETTE if colour != MEANING["student"]]
    small = [name for name, points in curves.items() if not any(p["real"] for p in points)]
    for n, axes in zip(shown, panels, strict=True):
        ends = []
        for name, points in curves.items():
            mine = sorted((p for p in points if p["windows"] == n), key=lambda p: p["share"])
            if not mine:
                continue
            real = name not in small
            colour = MEANING["student"] if real else others[small.index(name) % len(others)]
            dot = DOTS[list(curves).index(name) % len(DOTS)]
            look = {"color": colour, "marker": dot, "markersize": 5, "linewidth": 2.2 if real else 1.4}
            axes.plot([p["share"] for p in mine], [p["recall"] for p in mine], label=name, **look)
            ends.append((mine[-1]["recall"], name, colour))
            if real and (covered := [p["coverage"] for p in mine if p["coverage"] is not None]):
                axes.axhline(covered[0], color=GREY, linestyle=":", linewidth=1.2)
        axes.set(
            xscale="log", ylim=(-0.04, 1.06), title=f"{n} windows", xlabel="bytes of the cache, share of the teacher's"
        )
        axes.set_xticks(SHARES, [f"{100 * share:g} %" for share in SHARES])
        axes.minorticks_off()
        if n == shown[-1]:
            label_ends(axes, ends, gap=0.07)
    panels[0].set_ylabel("recall of one fact (dotted: the window's coverage)")
    return drawing
