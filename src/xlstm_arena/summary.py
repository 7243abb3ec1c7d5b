"""From the results of all jobs to the figures of the report: means over seeds with intervals, verdicts, orderings,
goals. One plain dict.

Dims: s seeds, n rows of a test, L tokens, W window.
"""

import math

import numpy as np

from xlstm_arena.arms import TEACHER
from xlstm_arena.runner import DONE, FAILED, MISSING, STALE, arm_of, choose_jobs, line_of, status_of
from xlstm_hybrid.checkpoint.files import FORMAT_VERSION
from xlstm_hybrid.conversion.source import open_teacher
from xlstm_hybrid.evaluation.scores import win_and_tie
from xlstm_hybrid.evaluation.significance import interval, resampled_means

# 97.5 % quantile of Student's t by degrees of freedom; above the last one its value stands, which is too wide rather
# than too narrow
STUDENT_T = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), start=1))
STUDENT_T |= {15: 2.131, 20: 2.086, 30: 2.042}
MAIN = "main"
HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold", "not decided", "not run"
LEVER = 0.05  # excess recall at 16 W below which a lever is not worth a GPU
SHARES = ("accuracy", "excess", "beyond")


# --- means and intervals -----------------------------------------------------------------------------------------


def stat(values, rows=None):
    """Mean of the values of s seeds with a 95 % interval: Student's t over seeds; with one seed, the bootstrap over its
    `rows` [n] if there are any.

    Returns:
        {"mean", "low", "high", "values", "over": "seeds", "rows" or None (no interval)}; None where no value is there.
    """
    values = [float(v) for v in values if v is not None]
    if not values:
        return None
    mean, low, high, over = sum(values) / len(values), None, None, None
    if len(values) > 1:
        freedom = max(d for d in STUDENT_T if d <= len(values) - 1)
        half = STUDENT_T[freedom] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        low, high, over = mean - half, mean + half, "seeds"
    elif rows:
        low, high, over = *interval(resampled_means(rows, rows)[0]), "rows"
    return {"mean": mean, "low": low, "high": high, "values": values, "over": over}


def outcome(difference):
    """What a paired difference, better minus worse, says."""
    if difference is None:
        return NOT_RUN
    if difference["over"] != "seeds":
        return OPEN
    return HOLDS if difference["low"] > 0 else FAILS if difference["high"] < 0 else OPEN


# --- one row of the tables ---------------------------------------------------------------------------------------


def recall_stats(scores):
    """{kind: {length: {"accuracy", "excess", "beyond": stats, "coverage", "n": answers per seed}}} of one row's results
    per seed.
    """
    stats_of = {}
    for kind, cells in scores[0]["recall"].items():
        stats_of[kind] = {}
        for length in cells:
            each = [s["recall"][kind][length] for s in scores]
            rows, c = each[0]["rows"] if len(each) == 1 else None, each[0]["coverage"]
            stats = {"coverage": c, "n": each[0]["n"]}
            for name in SHARES:
                exact = {"accuracy": rows, "excess": rows and c < 1 and [(r - c) / (1 - c) for r in rows]}.get(name)
                stats[name] = stat([e[name] for e in each], exact or None)
            stats_of[kind][length] = stats
    return stats_of


def distance_stats(scores):
    """{kind: [{"from", "to", "answers", "accuracy"}]}, pooled over lengths and seeds."""
    pooled = {}
    for kind in scores[0]["recall"]:
        sums = {}
        for part in (p for s in scores for cell in s["recall"][kind].values() for p in cell["by_distance"]):
            answers, hits = sums.get((part["from"], part["to"]), (0, 0.0))
            sums[part["from"], part["to"]] = answers + part["answers"], hits + part["answers"] * part["accuracy"]
        pooled[kind] = [
            {"from": a, "to": b, "answers": n, "accuracy": h / n} for (a, b), (n, h) in sorted(sums.items())
        ]
    return pooled


def row_of(name, arm, row, results, teachers, facts):
    """One line of the tables: an arm, or one of its rows with another config.

    Args:
        results: {seed: result} of the arm.
        facts: per seed, those of the arm's training and of the arms that it starts from.
        teachers: {seed: result} of the teacher, for the win-and-tie rate; without that of a seed, the rate leaves the
            seed out.
    """
    scores = {seed: r["rows"][row] for seed, r in sorted(results.items()) if row in r["rows"]}
    each, first = list(scores.values()), next(iter(results.values()))
    hits, means = each[0]["short_rows"] if len(each) == 1 else {}, [sum(s["short"].values()) for s in each]
    line = {
        "arm": name,
        "row": row,
        "name": name if row == MAIN else f"{name}/{row}",
        "about": arm.about,
        "tier": arm.tier,
        "seeds": list(scores),
        "tasks": {task: stat([s["short"][task] for s in each], hits.get(task)) for task in each[0]["short"]},
        # with one seed over the mean hits of the first, the second, ... row of each task
        "short": stat(
            [total / len(s["short"]) for total, s in zip(means, each, strict=True)],
            [sum(row) / len(row) for row in zip(*hits.values(), strict=True)],
        ),
        "perplexity": stat([s["perplexity"] for s in each]),
        "recall": recall_stats(each),
        "by_distance": distance_stats(each),
        "cache_bytes": {n: max(s["cache_bytes"][n] for s in each) for n in each[0]["cache_bytes"]},
        "cached": [s["cached"] for s in each],
    }
    for key in ("tokens", "cpu_seconds", "seconds"):
        line[key] = stat([sum(sum(f.get(key, {}).values()) for f in of_seed) for of_seed in facts])
    line["parameters"] = first["facts"].get("parameters")
    if name != TEACHER and (both := [seed for seed in scores if seed in teachers]):
        line |= against_teacher([scores[s]["short"] for s in both], [teachers[s]["rows"][MAIN]["short"] for s in both])
    return line


def against_teacher(student, teacher):
    """C_0, alpha* and recovery on the short tasks: of the mean scores over seeds, and C_0 of every seed."""
    mean = lambda scores: {task: sum(s[task] for s in scores) / len(scores) for task in scores[0]}  # noqa: E731
    whole = win_and_tie(mean(student), mean(teacher))
    each = [win_and_tie(a, b).c_0 for a, b in zip(student, teacher, strict=True)]
    return {"c_0": whole.c_0, "alpha_star": whole.alpha_star, "recovery": whole.recovery, "c_0_seeds": each}


# --- everything --------------------------------------------------------------------------------------------------


def summarise(arena, out):
    """The summary of a run directory; only results of the present settings count, and what is missing, stale or failed
    is named.

    Returns:
        {"name", "setting", "window", "sinks", "lengths", "seeds", "teachers": {name: {"rows", "failed", "stale",
        "missing"}}, "orderings", "levers", "goals"}; the last three are of the first teacher that has results, as each
        says.
    """
    teachers = {}
    for teacher in arena.teachers:
        states = {job: status_of(arena, job) for job in choose_jobs(arena, out, teachers=[teacher])}
        done = {}
        for job, (state, result) in states.items():
            if state == DONE:
                done.setdefault(job.arm, {})[job.seed] = result
        rows = []
        for name, results in done.items():
            arm, line = arm_of(arena, name), list(line_of(arena, name))
            facts = [[done[a][seed]["facts"] for a in line if seed in done.get(a, {})] for seed in results]
            rows += [row_of(name, arm, row, results, done.get(TEACHER, {}), facts) for row in (MAIN, *arm.evaluate)]
        without = {}
        for what in (STALE, MISSING):
            without[what] = sorted({job.arm for job, (state, _) in states.items() if state == what} - {*done})
        failed = {str(job): result["error"] for job, (state, result) in states.items() if state == FAILED}
        content = {"rows": rows, "shape": teacher_shape(arena, teacher) if rows else None, "results": done}
        teachers[teacher] = content | {"failed": failed, "stale": without[STALE], "missing": without[MISSING]}
    sections = ("student", "data", "align", "distill", "on_policy", "delta", "evaluate")
    summary = {
        "format_version": FORMAT_VERSION,
        "name": arena.name,
        "setting": {name: getattr(arena, name) for name in sections},
        "window": arena.window,
        "sinks": arena.sinks,
        "lengths": arena.evaluate["lengths"],
        "seeds": arena.seeds,
        "reference": next(iter(arena.arms)),
        **{name: [] for name in ("orderings", "levers", "goals")},
    }
    for teacher, content in teachers.items():
        results = content.pop("results")
        if not content["rows"]:
            continue
        for entry in arena.orderings:
            shown = {key: entry[key] for key in ("claim", "better", "worse", "source")} | {"teacher": teacher}
            for measure in entry["measures"]:
                difference = paired(results, entry["better"], entry["worse"], measure)
                verdict = {"measure": measure, "difference": difference, "verdict": outcome(difference)}
                summary["orderings"].append(shown | verdict)
        summary["levers"] += levers(arena, teacher, results)
        summary["goals"] += goals(arena, teacher, content["rows"])
    return summary | {"teachers": teachers}


def teacher_shape(arena, teacher):
    """Parameters, layers, heads, key/value groups per layer and head dim of a teacher."""
    with open_teacher(arena.teacher_dir(teacher)) as source:
        config, parameters = source.config, sum(math.prod(shape) for shape, _ in source.tensors.values())
    return {
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def figure_of(scores, measure):
    """One number of one row of a result, larger is better: "short" (mean of the tasks), "perplexity" (negated) or
    KIND@LENGTH (accuracy).
    """
    if measure == "short":
        return sum(scores["short"].values()) / len(scores["short"])
    if measure == "perplexity":
        return None if scores["perplexity"] is None else -scores["perplexity"]
    kind, _, length = measure.partition("@")
    return scores["recall"][kind][length]["accuracy"]


def paired(results, better, worse, measure):
    """Differences of `better` and `worse` (ARM or ARM/ROW) on the seeds that both have: a stat, or None."""
    sides = []
    for side in (better, worse):
        arm, _, row = side.partition("/")
        scores = {s: r["rows"].get(row or MAIN) for s, r in results.get(arm, {}).items()}
        sides.append({s: figure_of(found, measure) for s, found in scores.items() if found is not None})
    pairs = [(sides[0][s], sides[1][s]) for s in sorted(sides[0]) if s in sides[1]]
    return stat([a - b for a, b in pairs if None not in (a, b)])


def levers(arena, teacher, results):
    """Each arm's gain over the reference (the first arm) at 16 W, paired by seed: excess recall in units of what the
    reference's window leaves.
    """
    length, reference = 16 * arena.window, next(iter(arena.arms))
    if length not in arena.evaluate["lengths"] or reference not in results:
        return []
    rest = 1 - min(1.0, (arena.window + arena.sinks) / length)  # both sides are measured by the reference's window
    found = []
    for name, arm in arena.arms.items():
        for row in (MAIN, *arm.evaluate) if name in results else ():
            shown = name if row == MAIN else f"{name}/{row}"
            if shown == reference:
                continue
            gain = {}
            for kind in ("single", "multikey"):
                difference = paired(results, shown, reference, f"{kind}@{length}")
                gain[kind] = None if difference is None or not rest else scaled_stat(difference, rest)
            best = max((g["mean"] for g in gain.values() if g is not None), default=None)
            worth = best is not None and best >= LEVER
            found.append({"teacher": teacher, "name": shown, "length": length, **gain, "worth_a_gpu": worth})
    return found


def scaled_stat(found, by):
    """A stat divided by a number."""
    ends = {k: None if found[k] is None else found[k] / by for k in ("mean", "low", "high")}
    return {**found, **ends, "values": [v / by for v in found["values"]]}


def goals(arena, teacher, rows):
    """The two goals of the arena for every row that has the figures.

    constant: single >= .95 at 32 W within twice the bytes of the reference, C_0 >= .5, among those whose cache does not
    grow from there on.
    growing: single >= .95 and multi-key >= .60 of the teacher's at 64 W with at most 5 % of its bytes, C_0 >= .5.
    """
    by_name = {row["name"]: row for row in rows}
    reference, theirs = by_name.get(next(iter(arena.arms))), by_name.get(TEACHER)
    far, further, last = (str(n) for n in (32 * arena.window, 64 * arena.window, arena.evaluate["lengths"][-1]))
    found = []
    for name, row in by_name.items():
        if name == TEACHER or "c_0" not in row:
            continue
        sizes, c_0, head = row["cache_bytes"], row["c_0"], {"teacher": teacher, "goal": None, "name": name}
        constant = far in sizes and sizes[far] == sizes.get(last)
        if reference and far in reference["cache_bytes"] and constant:
            single, share = accuracy(row, "single", far), sizes[far] / reference["cache_bytes"][far]
            met = single >= 0.95 and share <= 2 and c_0 >= 0.5
            found.append(head | {"goal": "constant", "single": single, "bytes": share, "c_0": c_0, "met": met})
        if theirs and further in sizes and further in theirs["cache_bytes"]:
            single, share = accuracy(row, "single", further), sizes[further] / theirs["cache_bytes"][further]
            multikey, bound = accuracy(row, "multikey", further), accuracy(theirs, "multikey", further)
            met = single >= 0.95 and multikey >= 0.6 * bound and share <= 0.05 and c_0 >= 0.5
            figures = {"single": single, "multikey": multikey / bound if bound else None, "bytes": share}
            found.append(head | {"goal": "growing", **figures, "c_0": c_0, "met": met})
    return found


def accuracy(row, kind, length):
    return row["recall"][kind][length]["accuracy"]["mean"]


def rounded_json(value, places=6):
    """The same JSON value with shorter numbers."""
    if isinstance(value, dict):
        return {key: rounded_json(v, places) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded_json(v, places) for v in value]
    return round(value, places) if isinstance(value, float) and abs(value) > 10**-places else value


def pareto(points):
    """Names of those (name, bytes, score) that no other beats: none with at most their bytes and a higher score, or
    fewer bytes and as high a one.
    """
    beaten = lambda p: any(q[1] <= p[1] and q[2] >= p[2] and (q[1] < p[1] or q[2] > p[2]) for q in points)  # noqa: E731
    return [p[0] for p in points if not beaten(p)]
