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
STUDENT_T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    15: 2.131,
    20: 2.086,
    30: 2.042,
}
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


def verdict(difference):
    """Of a paired difference, better minus worse."""
    if difference is None or difference["over"] != "seeds":
        return OPEN
    return HOLDS if difference["low"] > 0 else FAILS if difference["high"] < 0 else OPEN


# --- one row of the tables ---------------------------------------------------------------------------------------


def recall_stats(judged):
    """{kind: {length: {"accuracy", "excess", "beyond": stats, "coverage", "n": answers per seed}}} of one row's results
    per seed.
    """
    found = {}
    for kind, cells in judged[0]["recall"].items():
        found[kind] = {}
        for length in cells:
            each = [j["recall"][kind][length] for j in judged]
            rows = each[0]["rows"] if len(each) == 1 else None
            c, stats = each[0]["coverage"], {"coverage": each[0]["coverage"], "n": each[0]["n"]}
            for name in SHARES:
                exact = {"accuracy": rows, "excess": rows and c < 1 and [(r - c) / (1 - c) for r in rows]}.get(name)
                stats[name] = stat([e[name] for e in each], exact or None)
            found[kind][length] = stats
    return found


def distance_stats(judged):
    """{kind: [{"from", "to", "answers", "accuracy"}]}, pooled over lengths and seeds."""
    found = {}
    for kind in judged[0]["recall"]:
        sums = {}
        for part in (p for j in judged for cell in j["recall"][kind].values() for p in cell["by_distance"]):
            answers, hits = sums.get((part["from"], part["to"]), (0, 0.0))
            sums[part["from"], part["to"]] = answers + part["answers"], hits + part["answers"] * part["accuracy"]
        found[kind] = [{"from": a, "to": b, "answers": n, "accuracy": h / n} for (a, b), (n, h) in sorted(sums.items())]
    return found


def row_of(name, arm, row, results, teachers, facts):
    """One line of the tables: an arm, or one of its rows with another config.

    Args:
        results: {seed: result} of the arm.
        facts: per seed, those of the arm's training and of the arms that it starts from.
        teachers: {seed: result} of the teacher, for the win-and-tie rate; without that of a seed, the rate leaves the
            seed out.
    """
    judged = {seed: r["rows"][row] for seed, r in sorted(results.items()) if row in r["rows"]}
    each, first = list(judged.values()), next(iter(results.values()))
    short = {
        task: stat([j["short"][task] for j in each], each[0]["short_rows"][task] if len(each) == 1 else None)
        for task in each[0]["short"]
    }
    found = {
        "arm": name,
        "row": row,
        "name": name if row == MAIN else f"{name}/{row}",
        "about": arm.about,
        "tier": arm.tier,
        "seeds": list(judged),
        "tasks": short,
        "short": stat(
            [sum(j["short"].values()) / len(j["short"]) for j in each], together(each[0]) if len(each) == 1 else None
        ),
        "perplexity": stat([j["perplexity"] for j in each]),
        "recall": recall_stats(each),
        "by_distance": distance_stats(each),
        "cache_bytes": {n: max(j["cache_bytes"][n] for j in each) for n in each[0]["cache_bytes"]},
        "cached": [j["cached"] for j in each],
    }
    for key in ("tokens", "cpu_seconds", "seconds"):
        found[key] = stat([sum(sum(f.get(key, {}).values()) for f in line) for line in facts])
    found["parameters"] = first["facts"].get("parameters")
    if name != TEACHER and (both := [seed for seed in judged if seed in teachers]):
        found |= against_teacher([judged[s]["short"] for s in both], [teachers[s]["rows"][MAIN]["short"] for s in both])
    return found


def together(judged):
    """Mean over the short tasks of the first, the second, ... row of each: rows whose mean is that of the tasks."""
    return [sum(hits) / len(hits) for hits in zip(*judged["short_rows"].values(), strict=True)]


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
            arm = arm_of(arena, name)
            facts = [
                [done[each][seed]["facts"] for each in line_of(arena, name) if seed in done.get(each, {})]
                for seed in results
            ]
            rows += [row_of(name, arm, row, results, done.get(TEACHER, {}), facts) for row in (MAIN, *arm.evaluate)]
        gone = {
            name: sorted({job.arm for job, (s, _) in states.items() if s == name} - {*done})
            for name in (STALE, MISSING)
        }
        failed = {str(job): result["error"] for job, (state, result) in states.items() if state == FAILED}
        shape = shape_of(arena, teacher) if rows else None
        teachers[teacher] = {
            "rows": rows,
            "shape": shape,
            "results": done,
            "failed": failed,
            "stale": gone[STALE],
            "missing": gone[MISSING],
        }
    setting = {
        name: getattr(arena, name) for name in ("student", "data", "align", "distill", "on_policy", "delta", "evaluate")
    }
    found = {
        "format_version": FORMAT_VERSION,
        "name": arena.name,
        "setting": setting,
        "window": arena.window,
        "sinks": arena.sinks,
        "lengths": arena.evaluate["lengths"],
        "seeds": arena.seeds,
        "reference": next(iter(arena.arms)),
        "orderings": [],
        "levers": [],
        "goals": [],
    }
    for teacher, content in teachers.items():
        results = content.pop("results")
        if content["rows"]:
            found["orderings"] += [
                ordering(teacher, entry, measure, results) for entry in arena.orderings for measure in entry["measures"]
            ]
            found["levers"] += levers(arena, teacher, results)
            found["goals"] += goals(arena, teacher, content["rows"])
    found["teachers"] = teachers
    return found


def shape_of(arena, teacher):
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


def measured(judged, measure):
    """One number of one row of a result, larger is better: "short" (mean of the tasks), "perplexity" (negated) or
    KIND@LENGTH (accuracy).
    """
    if measure == "short":
        return sum(judged["short"].values()) / len(judged["short"])
    if measure == "perplexity":
        return None if judged["perplexity"] is None else -judged["perplexity"]
    kind, _, length = measure.partition("@")
    return judged["recall"][kind][length]["accuracy"]


def paired(results, better, worse, measure):
    """Differences of `better` and `worse` (ARM or ARM/ROW) on the seeds that both have: a stat, or None."""
    sides = []
    for side in (better, worse):
        arm, _, row = side.partition("/")
        sides.append(
            {
                s: measured(r["rows"][row or MAIN], measure)
                for s, r in results.get(arm, {}).items()
                if (row or MAIN) in r["rows"]
            }
        )
    seeds = [s for s in sorted(sides[0]) if s in sides[1] and None not in (sides[0][s], sides[1][s])]
    return stat([sides[0][s] - sides[1][s] for s in seeds])


def ordering(teacher, entry, measure, results):
    """A published ordering and what it is here: {..., "teacher", "measure", "difference", "verdict"}."""
    difference = paired(results, entry["better"], entry["worse"], measure)
    shown = {key: entry[key] for key in ("claim", "better", "worse", "source")}
    return {
        **shown,
        "teacher": teacher,
        "measure": measure,
        "difference": difference,
        "verdict": NOT_RUN if difference is None else verdict(difference),
    }


def levers(arena, teacher, results):
    """Each arm's gain over the reference (the first arm) at 16 W, paired by seed: excess recall in units of what the
    reference's window leaves.
    """
    length, reference = 16 * arena.window, next(iter(arena.arms))
    if length not in arena.evaluate["lengths"] or reference not in results:
        return []
    found = []
    for name, arm in arena.arms.items():
        for row in (MAIN, *arm.evaluate) if name in results else ():
            shown = name if row == MAIN else f"{name}/{row}"
            if shown == reference:
                continue
            gain = {
                kind: excess_gain(paired(results, shown, reference, f"{kind}@{length}"), arena, length)
                for kind in ("single", "multikey")
            }
            best = max((g["mean"] for g in gain.values() if g is not None), default=None)
            found.append(
                {
                    "teacher": teacher,
                    "name": shown,
                    "length": length,
                    **gain,
                    "worth_a_gpu": best is not None and best >= LEVER,
                }
            )
    return found


def excess_gain(difference, arena, length):
    """A difference of accuracies as one of excess at the arena's coverage: both sides are judged by the reference's
    window.
    """
    if difference is None:
        return None
    rest = 1 - min(1.0, (arena.window + arena.sinks) / length)
    scaled = (
        {k: None if difference[k] is None else difference[k] / rest for k in ("mean", "low", "high")} if rest else None
    )
    return scaled and {**difference, **scaled, "values": [v / rest for v in difference["values"]]}


def goals(arena, teacher, rows):
    """The two goals of the arena for every row that has the figures.

    constant: single >= .95 at 32 W within twice the bytes of the reference, C_0 >= .5, among those whose cache does not
    grow from there on.
    growing: single >= .95 and multi-key >= .60 of the teacher's at 64 W with at most 5 % of its bytes, C_0 >= .5.
    """
    by_name = {row["name"]: row for row in rows}
    reference, judge = by_name.get(next(iter(arena.arms))), by_name.get(TEACHER)
    found = []
    for name, row in by_name.items():
        if name == TEACHER or "c_0" not in row:
            continue
        far, further, last = (str(n) for n in (32 * arena.window, 64 * arena.window, arena.evaluate["lengths"][-1]))
        constant = far in row["cache_bytes"] and row["cache_bytes"][far] == row["cache_bytes"].get(last)
        if reference and far in reference["cache_bytes"] and constant:
            single, share = accuracy(row, "single", far), row["cache_bytes"][far] / reference["cache_bytes"][far]
            met = single >= 0.95 and share <= 2 and row["c_0"] >= 0.5
            found.append(
                {
                    "teacher": teacher,
                    "goal": "constant",
                    "name": name,
                    "single": single,
                    "bytes": share,
                    "c_0": row["c_0"],
                    "met": met,
                }
            )
        if judge and further in row["cache_bytes"] and further in judge["cache_bytes"]:
            single, share = (
                accuracy(row, "single", further),
                row["cache_bytes"][further] / judge["cache_bytes"][further],
            )
            multikey, theirs = accuracy(row, "multikey", further), accuracy(judge, "multikey", further)
            met = single >= 0.95 and multikey >= 0.6 * theirs and share <= 0.05 and row["c_0"] >= 0.5
            found.append(
                {
                    "teacher": teacher,
                    "goal": "growing",
                    "name": name,
                    "single": single,
                    "multikey": multikey / theirs if theirs else None,
                    "bytes": share,
                    "c_0": row["c_0"],
                    "met": met,
                }
            )
    return found


def accuracy(row, kind, length):
    return row["recall"][kind][length]["accuracy"]["mean"]


def rounded(value, places=6):
    """The same JSON value with shorter numbers."""
    if isinstance(value, dict):
        return {key: rounded(v, places) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, places) for v in value]
    return round(value, places) if isinstance(value, float) and abs(value) > 10**-places else value


def pareto(points):
    """Names of those (name, bytes, score) that no other beats: none with at most their bytes and a higher score, or
    fewer bytes and as high a one.
    """
    beaten = lambda p: any(q[1] <= p[1] and q[2] >= p[2] and (q[1] < p[1] or q[2] > p[2]) for q in points)  # noqa: E731
    return [p[0] for p in points if not beaten(p)]
