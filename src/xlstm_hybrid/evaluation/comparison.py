"""Students against their teacher on the same benchmarks: the verdict, how sure it is, and what it costs, as one plain
dict.
"""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from xlstm_hybrid.checkpoint.files import append_stage
from xlstm_hybrid.data.long_context import TASK_NAME
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.results import BUDGET, SETTINGS, chance_of, different, read_results
from xlstm_hybrid.evaluation.scores import ALPHAS, WinAndTie, win_and_tie
from xlstm_hybrid.evaluation.significance import LEVEL, RESAMPLES, above_chance, compare_pairs, holm, resampled_verdict

# the first that a benchmark has is its score
METRICS = ("acc_norm", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc", "acc")
FILTERS = ("none", "strict-match", "create_test", "flexible-extract")
SAMPLES = 1e-6  # how far the mean of the samples may be from the score that was reported


# --- what is compared ------------------------------------------------------------------------------------------


def open_sides(teacher, students):
    """`(Results of the teacher, [Results of students])` of paths, each `PATH` or `NAME=PATH`; a run's results.json
    stands for all of its students.
    """

    def opened(text):
        name, _, path = str(text).rpartition("=")
        if not name or Path(str(text)).exists():
            return read_results(text), None
        return read_results(path), name

    (teacher, *_), name = opened(teacher)
    teacher.name, sides = name or teacher.name, []
    seen = Counter([teacher.name])
    for text in students:
        results, name = opened(text)
        for each in results[1:] or results:
            each.name = name if name and len(results) == 1 else each.name
            seen[each.name] += 1
            each.name += f" #{seen[each.name]}" if seen[each.name] > 1 else ""
            sides.append(each)
    return teacher, sides


def choose_metric(task, sides, asked):
    """The metric by which all sides are compared on a benchmark: the one that was asked for, else the first of
    `METRICS`, and one of which less is better only where there is no other; None where there is none.
    """
    shared = [m for m in sides[0].scores[task] if all(m in s.scores[task] for s in sides)]
    if asked is not None:
        return next((m for m in shared if asked in (m, m.split(",")[0])), None)

    # lm-eval writes the metrics of a group in any order: filters that are not in our list come in that of the task
    known = list(FILTERS)
    for side in sides:
        known += [kind for named in side.settings.get(task, {}).get("filters", {}).values() for kind in named]

    def place(metric):
        name, _, kind = metric.partition(",")
        less = less_is_better(sides, task, metric)
        return less, (*METRICS, name).index(name), (*known, kind).index(kind), metric

    return min(shared, key=place, default=None)


def less_is_better(sides, task, metric):
    return any(metric in side.smaller.get(task, ()) for side in sides)


def choose_tasks(sides, tasks, common):
    """`(benchmarks, mistakes, notes)`: those that were asked for, or all; each must be there on every side unless
    `common`.
    """
    wanted = dict.fromkeys((task for side in sides for task in side.scores) if tasks is None else tasks)
    missing = {task: [s.name for s in sides if task not in s.scores] for task in wanted}
    texts = [f"{task} has no score of {' and '.join(names)}" for task, names in missing.items() if names]
    chosen = [task for task, names in missing.items() if not names]
    if common:
        return chosen, [] if chosen else ["no benchmark that all sides have"], [f"left out: {text}" for text in texts]
    return chosen, texts or ([] if chosen else ["no benchmark, expected at least one"]), []


def different_settings(teacher, student, task, metric):
    """`({setting: what differs, in words}, [settings that only one side records])` of two sides on one benchmark.

    What is not recorded is no difference. What cannot have had an effect is none either: a longest input that no
    document reaches, a seed of examples where the prompts are known.
    """
    mine, its = teacher.settings.get(task, {}), student.settings.get(task, {})
    here, there = teacher.prompts.get(task) or {}, student.prompts.get(task) or {}
    found = different(mine, its, metric.partition(",")[2] or None)
    if here and there:  # the prompts themselves are compared below
        found = {key: pair for key, pair in found.items() if key not in ("fewshot_seed", "prompts")}
    longest = [side.longest.get(task) for side in (teacher, student)]
    if "max_length" in found and None not in longest:
        kinds = [kind for side in (mine, its) for kind in side.get("generation", {}).values()]
        room = min(found["max_length"]) - max((kind.get("max_gen_toks", BUDGET) for kind in kinds), default=0)
        if max(longest) + 2 <= room:  # a token has at least one byte; two may be added around the text
            del found["max_length"]
    differences = {
        key: f"{task}: {key} {pair[0]!r} for {teacher.name}, {pair[1]!r} for {student.name}"
        for key, pair in found.items()
    }
    both = f"{teacher.name} and {student.name}"
    if here and there and (odd := len(set(here) ^ set(there))):
        differences["documents"] = f"{task}: {odd} documents were evaluated for only one of {both}"
    elif here and there and (odd := sum(here[d] != there[d] for d in here)):
        differences["prompts"] = f"{task}: the prompts of {odd} of {len(here)} documents differ between {both}"
    answered = {"limit": "documents", "gen_kwargs": "generation"}
    alone = [
        key
        for key in SETTINGS
        if (key in mine) != (key in its)
        and (mine | its)[key] is not None
        and not (answered.get(key) in mine and answered.get(key) in its)
        and not (key in ("fewshot_seed", "documents", "limit", "prompts") and here and there)
    ]
    return differences, alone


def paired_values(teacher, student, task, metric):
    """`((student values, teacher values), None)`, document by document, or `(None, why there are none)`."""
    its, mine = (side.samples.get(task, {}).get(metric) or {} for side in (student, teacher))
    if missing := [s for s, values in ((student, its), (teacher, mine)) if not values]:
        for side in missing:
            if why := side.unread.get(task):
                return None, f"the samples of {side.name} cannot be used: {why}"
            if side.samples.get(task) or side.prompts.get(task):
                return None, f"the samples of {side.name} hold no number per document for {metric}"
        return None, f"{' and '.join(s.name for s in missing)} came without samples"
    if set(its) != set(mine):
        return None, f"{student.name} and {teacher.name} were evaluated on different documents"
    keys = sorted(mine)
    values = [its[k] for k in keys], [mine[k] for k in keys]
    for side, numbers in zip((student, teacher), values, strict=True):
        if not math.isclose(sum(numbers) / len(numbers), side.scores[task][metric], rel_tol=SAMPLES, abs_tol=SAMPLES):
            return None, f"the score of {side.name} is not the mean of its samples"
    return values, None


def paired_verdict(teacher, student, seed=0):
    """`WinAndTie` of a student on exact match as plain values, with "resampled": `resampled_verdict` at no tolerance,
    None without paired answers. Tasks on which the teacher has no right answer do not count; where none does, what
    would be a share is None.
    """
    mine, its = ({task: scores["exact_match"] for task, scores in side.scores.items()} for side in (teacher, student))
    pairs = {task: paired_values(teacher, student, task, "exact_match")[0] for task in mine if mine[task]}
    resampled = resampled_verdict(pairs, 0.0, seed=seed) if pairs and all(pairs.values()) else None
    return counted_verdict(its, mine, dict.fromkeys(pairs, True)) | {"resampled": resampled}


def counted_verdict(student, teacher, counts, smaller=(), alphas=None):
    """`win_and_tie` over the benchmarks that count, as plain values. The others have no recovery; where none counts,
    "curve" is empty, and "alpha_star" and "c_0" are None: there is no rate of nothing.

    Args:
        counts: {benchmark: whether it counts}, see `above_chance`.
    """
    mine, its = ({task: s for task, s in side.items() if counts.get(task)} for side in (teacher, student))
    if not mine:
        found = WinAndTie(list(ALPHAS if alphas is None else alphas), [], None, None, {}, 0, 0, 0)
    else:
        found = win_and_tie(its, mine, alphas, smaller)
    return asdict(found) | {"recovery": {task: found.recovery.get(task) for task in teacher}}


# --- comparing -------------------------------------------------------------------------------------------------


def compare(
    teacher,
    students,
    *,
    alpha=0.0,
    tasks=None,
    metrics=None,
    common=False,
    allow=(),
    costs=None,
    seed=0,
    resamples=RESAMPLES,
):
    """Compare students with their teacher by win-and-tie rates (docs/method.md) and say how sure the result is.

    A benchmark counts if the teacher's score is above chance (`above_chance`, `results.chance_of`); the others are
    shown, and are neither won, tied nor lost. Without samples on both sides a benchmark has scores but no paired
    statistics, and a student for which this is so on any that counts has no interval of alpha*. A student is lossless
    at alpha if C_alpha >= 1/2.

    Args:
        teacher, students: `scores.Results`, see `open_sides`.
        alpha: relative tolerance of the verdict.
        tasks: benchmarks; all by default.
        metrics: {benchmark: metric}, such as {"gsm8k": "exact_match,flexible-extract"}; see `METRICS` for the rest.
        common: compare the benchmarks that all sides have, instead of refusing.
        allow: entries of `SETTINGS` that may differ; that they do is noted.
        costs: `(label, {name: cost})`, see `read_costs`; less is better.
    Returns:
        A dict of plain values: "alpha", "teacher", "metrics", "shots", "teacher_scores", "chance" {benchmark: share or
        None}, "counts" {benchmark: bool}, "smaller" [benchmarks of which less is better], "differences" (those allowed),
        "notes", "cost" (label or None), "teacher_cost" and
        "students": {name: fields of `WinAndTie`, "scores", "c_alpha", "lossless", "mean_recovery", "paired" {benchmark:
            `compare_pairs` with
        "p_holm"}, "resampled" (`resampled_verdict`) or None, "cost", "pareto"}. Where no benchmark counts, shares and
        "lossless" are None.
    Raises:
        EvaluationError: everything that cannot be compared, listed at once.
    """
    if not students or not 0 <= alpha <= 1 or set(allow) - set(SETTINGS):
        raise EvaluationError(
            f"compare: {len(students)} students, alpha={alpha}, allow={sorted(allow)}; expected a student, a share between 0 and "
            f"1, and some of {', '.join(SETTINGS)}"
        )
    named = dict.fromkeys(task for side in (teacher, *students) for task in side.scores) if tasks is None else tasks
    teacher, *students = sides = [side.with_parts(named) for side in (teacher, *students)]
    (chosen, wrong, notes), differences, unrecorded = choose_tasks(sides, tasks, common), [], {}
    notes += [note for side in sides for note in side.notes]
    far = [task for task in chosen if TASK_NAME.fullmatch(task) and tasks is None]
    if far and len(far) < len(chosen):  # another question than the benchmarks
        chosen = [task for task in chosen if task not in far]
        notes.append(
            f"long-context tasks stay out of the win-and-tie rate: {', '.join(far)}; compare them by name, with --tasks"
        )
    small = [
        t for t in chosen if tasks is None and all(not set(s.scores[t]) - set(s.smaller.get(t, ())) for s in sides)
    ]
    if small and len(small) < len(chosen):
        chosen = [task for task in chosen if task not in small]
        notes.append(f"less is better, so that they have no part in the win-and-tie rate: {', '.join(small)}")
    used = {task: choose_metric(task, sides, (metrics or {}).get(task)) for task in chosen}
    chance, smaller = {}, []
    wrong += [f"{task} is asked for by metric, but is not compared" for task in metrics or {} if task not in used]
    for task, metric in used.items():
        if metric is None:
            offered = "; ".join(f"{s.name}: {', '.join(s.scores[task])}" for s in sides)
            wrong.append(f"{task} has no metric that all sides have ({offered})")
            continue
        less = less_is_better(sides, task, metric)
        if less:
            smaller.append(task)
        told = next((s for s in sides if s.settings.get(task, {}).get("chance")), teacher).settings.get(task, {})
        chance[task] = None if less else chance_of(told, task, metric)
        if not 0 <= (chance[task] or 0) < 1:
            wrong.append(f"{task} has a chance of {chance[task]}, expected a share of at least 0 and below 1")
        for side in sides:
            if not 0 <= (score := side.scores[task][metric]) < math.inf:
                wrong.append(f"{task} ({metric}) is {score} for {side.name}, expected a finite score of at least 0")
        for student in students:
            differ, alone = different_settings(teacher, student, task, metric)
            for key, text in differ.items():
                (differences if key in allow else wrong).append(text)
            for key in alone:
                lacking = next(s for s in (teacher, student) if key not in s.settings.get(task, {}))
                other = student if lacking is teacher else teacher
                unrecorded.setdefault((lacking.name, other.name), {})[key] = None
    if wrong:
        raise EvaluationError(
            f"{len(wrong)} reasons why these results cannot be compared: {'; '.join(wrong)}. Evaluate student and teacher with the "
            "same tasks, shots and budget; or name what may differ, or compare the common tasks only"
        )
    notes += [
        f"not recorded for {name} and taken to be as for {other}: {', '.join(keys)}"
        for (name, other), keys in unrecorded.items()
    ]
    counts = {}
    for task, metric in used.items():
        values = list((teacher.samples.get(task, {}).get(metric) or {}).values())
        documents = teacher.settings.get(task, {}).get("documents")
        score = teacher.scores[task][metric]
        counts[task] = task in smaller or above_chance(score, chance[task], values=values, documents=documents)
    if guessed := [
        f"{t} ({teacher.scores[t][used[t]]:.4g}, by chance {chance[t] or 0:.4g})" for t in used if not counts[t]
    ]:
        notes.append(f"{teacher.name} is at chance, so that these do not count: {', '.join(guessed)}")
    label, prices = costs or (None, {})
    compared = {}
    for student in students:
        compared[student.name] = compare_student(teacher, student, used, counts, smaller, alpha, seed, resamples, notes)
        compared[student.name]["cost"] = prices.get(student.name)
    mark_front(compared, prices.get(teacher.name))
    return {
        "alpha": alpha,
        "seed": seed,
        "resamples": resamples,
        "level": LEVEL,
        "teacher": teacher.name,
        "metrics": used,
        # parts of a group that have numbers of their own have none in common
        "shots": {
            task: None if isinstance(n := teacher.settings.get(task, {}).get("shots"), dict) else n for task in used
        },
        "teacher_scores": {task: teacher.scores[task][metric] for task, metric in used.items()},
        "chance": chance,
        "counts": counts,
        "smaller": smaller,
        "students": compared,
        "cost": label,
        "teacher_cost": prices.get(teacher.name),
        "differences": differences,
        "notes": list(dict.fromkeys([*differences, *notes])),
    }


def compare_student(teacher, student, used, counts, smaller, alpha, seed, resamples, notes):
    """One student's part of a comparison; what could not be paired is added to `notes`."""
    mine, its = ({task: side.scores[task][metric] for task, metric in used.items()} for side in (teacher, student))
    pairs, unpaired = {}, {}
    for task, metric in used.items():
        values, why = paired_values(teacher, student, task, metric)
        if values:
            pairs[task] = values
        else:
            unpaired.setdefault(why, []).append(task)
    notes += [f"no paired statistics of {', '.join(tasks)}: {why}" for why, tasks in unpaired.items()]
    how = {"resamples": resamples, "seed": seed}
    paired = {task: compare_pairs(*values, smaller=task in smaller, name=task, **how) for task, values in pairs.items()}
    for task, corrected in holm({task: found["p"] for task, found in paired.items()}).items():
        paired[task]["p_holm"] = corrected
    verdict = counted_verdict(its, mine, counts, smaller)
    (at_alpha,) = counted_verdict(its, mine, counts, smaller, [alpha])["curve"] or [None]
    recovered = [r for r in verdict["recovery"].values() if r is not None]
    drawn = {t: pairs[t][::-1] if t in smaller else pairs[t] for t in used if counts[t] and t in pairs}
    sure = drawn and len(drawn) == sum(counts.values())
    return {
        **verdict,
        "scores": its,
        "c_alpha": at_alpha,
        "lossless": None if at_alpha is None else at_alpha >= 0.5,
        "paired": paired,
        "mean_recovery": sum(recovered) / len(recovered) if recovered else None,
        "resampled": resampled_verdict(drawn, alpha, **how) if sure else None,
    }


def mark_front(students, teacher_cost=None):
    """Set "pareto" of every student: True where nobody, teacher included, recovers as much for less or more for as
    little.
    """
    points = {name: (s["cost"], s["mean_recovery"]) for name, s in students.items()}
    rivals = [point for point in [*points.values(), (teacher_cost, 1.0)] if None not in point]
    for name, (cost, recovery) in points.items():
        known = cost is not None and recovery is not None
        beaten = known and any(c <= cost and r >= recovery and (c, r) != (cost, recovery) for c, r in rivals)
        students[name]["pareto"] = not beaten if known else None


def read_costs(text, teacher, students):
    """`(label, {name: cost})` of every student, and of the teacher where it has one.

    Args:
        text: a JSON file {name: number}, or FILE:key.key for {name: {key: {key: number}}}, or field:key.key of each
            side's own results.
    Raises:
        EvaluationError: no such file, or a student without a finite cost of at least 0.
    """
    path, _, keys = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
    if path == "field":
        sources = {side.name: side.fields for side in [teacher, *students]}
    else:
        try:
            sources = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"costs {text}: expected a JSON file, FILE:key or field:key ({error})") from error
    costs, wrong = {}, []
    for side in [teacher, *students]:
        value = sources.get(side.name) if isinstance(sources, dict) else None
        for key in keys.split(".") if keys else ():
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
            costs[side.name] = value
        elif side is not teacher or value is not None:
            wrong.append(f"{side.name} is {value!r}")
    if wrong:
        raise EvaluationError(f"costs {text}: {'; '.join(wrong)}, expected a finite number of at least 0 per student")
    return keys.rpartition(".")[2] or Path(text).stem, costs


# --- the record ------------------------------------------------------------------------------------------------


def record_comparison(comparison, student, directory):
    """Add a student's part of a comparison to the record of its checkpoint, as the stage "compare", from which its card
    is printed.

    Raises:
        EvaluationError: no such student in the comparison.
        CheckpointError: the directory has no record of stages, or files that are not those of its manifest.
    """
    verdict = comparison["students"].get(student)
    if verdict is None:
        raise EvaluationError(
            f"record: {student!r} is not compared, expected one of {', '.join(comparison['students'])}"
        )
    settings = "teacher", "alpha", "metrics", "shots", "chance", "counts", "smaller", "differences", "seed", "resamples"
    fields = "scores", "recovery", "c_alpha", "c_0", "alpha_star", "lossless", "wins", "ties", "losses"
    figures = {key: verdict[key] for key in fields}
    figures |= {"teacher_scores": comparison["teacher_scores"], "resampled": verdict["resampled"]}
    config = {key: comparison[key] for key in settings}
    append_stage(directory, "compare", config=config, figures=plain_floats(figures))


def plain_floats(value):
    """The same with None in the place of numbers that JSON does not have: a recovery is infinite where a teacher's
    score is 0.
    """
    if isinstance(value, dict):
        return {key: plain_floats(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_floats(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
