"""The results of a real model in one place: docs/real/results.json and its picture; the tables are printed.

Reads a JSON that names folders, relative to it: {"teacher": {"harness": FOLDER, "far": FOLDER}, "students": {NAME:
{"checkpoint": FOLDER, "harness": FOLDER, "far": FOLDER, "agreement": {TEXT: FILE}}}, "rates": {STAGE: tokens per second}},
with results of the commands harness and agreement. python benchmarks/real_results.py runs/real/results.json --out docs/real
"""

import argparse
from pathlib import Path

from xlstm_hybrid.checkpoint.files import read_json, read_provenance, write_file, write_json
from xlstm_hybrid.evaluation.comparison import compare, open_sides
from xlstm_hybrid.reports.plots import BLUE, GREY, INK, SKY, VERMILION, as_png, figure, label_ends
from xlstm_hybrid.reports.recall_bytes import long_context_of

KINDS = ("needle", "multikey", "variables")
LENGTH = 512  # of a row in both recipes for CPUs


def trained(checkpoint):
    """{stage: tokens} of the stages that a checkpoint went through: rows, their length and steps as its provenance has them."""
    tokens = {}
    for stage in read_provenance(checkpoint):
        config, name = stage.get("config") or {}, stage["stage"].split(":")[0]
        if name == "calibrate":
            tokens[name] = config["tokens"]
        elif name in ("align", "distill"):
            rows = config.get("sequences_per_step") or config.get("per_device_train_batch_size", 8)
            tokens[name] = config["max_steps"] * rows * LENGTH
    return tokens


def recall(folder):
    """{kind: {length: {"recall", "coverage", "excess", "cache_bytes", "documents"}}} from a folder of the command harness."""
    found = {}
    for kind in KINDS if folder else ():
        if lengths := long_context_of(folder, kind):
            keys = ("recall", "coverage", "excess", "cache_bytes", "documents")
            found[kind] = {str(n): {key: of[key] for key in keys if key in of} for n, of in sorted(lengths.items())}
    return found


def collect(spec, folder):
    """Everything that the files of the specification say, as plain values."""
    sides = {name: of for name, of in {"teacher": spec["teacher"], **spec["students"]}.items() if "harness" in of}
    groups = {}  # students with the same tasks are compared together
    for name in list(sides)[1:]:
        tasks = frozenset(path.parent.name for path in (folder / sides[name]["harness"]).glob("*/harness.json"))
        groups.setdefault(tasks, []).append(name)
    result = {"teacher": {"recall": recall(folder / spec["teacher"]["far"])}, "students": {}, "scores": {}}
    for tasks, names in groups.items():
        teacher, students = open_sides(
            f"teacher={folder / spec['teacher']['harness']}", [f"{n}={folder / sides[n]['harness']}" for n in names]
        )
        alone = [task for task in teacher.scores if task in tasks]
        rated = [task for task in alone if not task.endswith("_bpb")]
        found = compare(teacher, students, tasks=rated)
        small = [task for task in alone if task.endswith("_bpb")]
        bits = [compare(teacher, students, tasks=small)] if small else []
        for part in (found, *bits):
            for task, metric in part["metrics"].items():
                of = result["scores"].setdefault(
                    task, {"metric": metric, "documents": teacher.settings.get(task, {}).get("documents")}
                )
                of |= {"chance": part["chance"][task], "counts": part["counts"][task]}
                of.setdefault("teacher", part["teacher_scores"][task])
                of |= {name: part["students"][name]["scores"][task] for name in names}
        for name in names:
            mine = found["students"][name]
            keys = ("c_0", "alpha_star", "recovery", "mean_recovery", "resampled", "paired")
            result["students"][name] = {"tasks": len(rated), **{key: mine[key] for key in keys}}
    for name, of in spec["students"].items():
        student = result["students"].setdefault(name, {})
        student["tokens"] = trained(folder / of["checkpoint"])
        student["agreement"] = {text: read_json(folder / file, text) for text, file in of.get("agreement", {}).items()}
        student["recall"] = recall(folder / of["far"]) if "far" in of else {}
    result["students"] = {name: result["students"][name] for name in spec["students"]}
    return result | {"rates": spec.get("rates", {}), "about": spec.get("about", {})}


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value, digits=3):
    return "" if value is None else f"{value:.{digits}f}"


def markdown(result):
    """The tables, as Markdown."""
    names = list(result["students"])
    agreement = []
    for text in dict.fromkeys(t for s in result["students"].values() for t in s["agreement"]):
        rows = []
        for name in names:
            if of := result["students"][name]["agreement"].get(text):
                error = of["standard_error"]
                rows.append(
                    [
                        name,
                        *(f"{number(of[key])} ± {number(error[key])}" for key in ("nll_student", "kl", "top1")),
                        f"{sum(result['students'][name]['tokens'].values()):,}",
                    ]
                )
        teacher = next(
            s["agreement"][text]["nll_teacher"] for s in result["students"].values() if text in s["agreement"]
        )
        rows.insert(0, ["teacher", number(teacher), "0", "1", ""])
        agreement.append(
            f"{text}\n\n{table(['', 'nats per token', 'KL to the teacher', 'same top token', 'tokens'], rows)}"
        )
    rows, scored = [], [name for name in names if "c_0" in result["students"][name]]
    for task, of in result["scores"].items():
        at_chance = "" if of["counts"] else " (teacher at chance)"
        rows.append([f"{task}{at_chance}", number(of["chance"], 2), *(number(of.get(n)) for n in ("teacher", *scored))])
    rated = [["C_0", "", "", *(number(result["students"][n].get("c_0"), 2) for n in scored)]]
    scores = table(["", "chance", "teacher", *scored], rows + rated)
    far = []
    for kind in KINDS:
        lengths = list(result["teacher"]["recall"].get(kind, {}))
        sides = {"teacher": result["teacher"], **result["students"]}
        rows = [
            [name, *(number(of["recall"][kind][n]["recall"], 2) if n in of["recall"][kind] else "" for n in lengths)]
            for name, of in sides.items()
            if kind in of["recall"]
        ]
        if rows:
            one = next(of for n, of in sides.items() if n != "teacher" and kind in of["recall"])["recall"][kind]
            rows.append(["window's coverage", *(number(one[n]["coverage"], 2) if n in one else "" for n in lengths)])
            far.append(f"{kind}\n\n{table(['tokens', *map(str, lengths)], rows)}")
    return "\n\n".join([short_table(result), *agreement, scores, *far]) + "\n"


STAGES = {  # columns of the README's table: what each student is called there
    "converted": "converted",
    "calibrated": "stage 0",
    "calibrated, aligned": "stage I",
    "calibrated, distilled": "stage II",
}
SHOWN = {"real_piqa": "PIQA", "real_arc_easy": "ARC-easy", "real_hellaswag": "HellaSwag", "real_lambada": "LAMBADA"}


def short_table(result):
    """The README's table: the stages of one student, as Markdown."""
    students = [result["students"][name] for name in STAGES]
    of = [student["agreement"]["peps"] for student in students]
    rows = [
        ["KL to the teacher, held-out text", "0", *(number(a["kl"]) for a in of)],
        ["same most likely token", "1", *(number(a["top1"]) for a in of)],
        ["nats per token", number(of[0]["nll_teacher"]), *(number(a["nll_student"]) for a in of)],
    ]
    for task, name in SHOWN.items():
        if scores := result["scores"].get(task):
            rows.append([name, number(scores["teacher"]), *(number(scores.get(student)) for student in STAGES)])
    needle = [side["recall"].get("needle", {}).get("512", {}) for side in (result["teacher"], *students)]
    rows.append(["needle, 512 tokens", *(number(found.get("recall"), 2) for found in needle)])
    rows.append(["training tokens", "", *(f"{sum(student['tokens'].values()):,}" for student in students)])
    return table(["", "teacher", *STAGES.values()], rows)


COLOURS = {"teacher": INK, "converted": SKY, "distilled": VERMILION, "calibrated, distilled": BLUE}


def draw(result):
    """KL to the teacher after each stage, with and without stage 0, and recall of a needle over the context."""
    drawing, (left, right) = figure(columns=2, width=9.6, height=3.8)
    texts = list(dict.fromkeys(t for s in result["students"].values() for t in s["agreement"]))
    shown = [name for name in result["students"] if texts[0] in result["students"][name]["agreement"]]
    for k, text in enumerate(texts):
        values = [result["students"][name]["agreement"][text] for name in shown]
        places = [n + 0.18 * (k - (len(texts) - 1) / 2) for n in range(len(shown))]
        errors = [1.96 * value["standard_error"]["kl"] for value in values]
        left.errorbar(
            [v["kl"] for v in values], places, xerr=errors, fmt="os"[k % 2], color=(BLUE, GREY)[k % 2], label=text
        )
    left.set_yticks(range(len(shown)), shown)
    left.invert_yaxis()
    left.set(title="how far from the teacher", xlabel="KL, nats per token (95 %)", xlim=(0, None))
    left.legend()
    ends = []
    for name, of in {"teacher": result["teacher"], **result["students"]}.items():
        if points := of["recall"].get("needle"):
            colour = COLOURS.get(name, GREY)
            right.plot([int(n) for n in points], [p["recall"] for p in points.values()], marker="o", color=colour)
            ends.append((list(points.values())[-1]["recall"], name, colour))
    covered = next(s["recall"]["needle"] for s in result["students"].values() if "needle" in s["recall"])
    right.plot([int(n) for n in covered], [p["coverage"] for p in covered.values()], linestyle=":", color=GREY)
    right.set_xscale("log", base=2)
    right.set_xticks([int(n) for n in covered], list(covered))
    right.set(
        title="a needle in real text", xlabel="context, tokens", ylabel="recall (dotted: coverage)", ylim=(-0.04, 1.06)
    )
    label_ends(right, ends, gap=0.08)
    return drawing


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specification", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/real"))
    asked = parser.parse_args(arguments)
    result = collect(read_json(asked.specification, "specification"), asked.specification.parent)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "results.json", result)
    write_file(asked.out / "results.png", as_png(draw, result))
    print(markdown(result))


if __name__ == "__main__":
    main()
