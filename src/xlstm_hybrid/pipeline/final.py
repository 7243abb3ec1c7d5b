"""The last judgement of a road: lm-evaluation-harness on teacher and student, their comparison, and what they cost. All of it is kept in files."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.data.long_context import KINDS
from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.comparison import compare, plain_floats, write_comparison
from xlstm_hybrid.evaluation.efficiency import Settings
from xlstm_hybrid.evaluation.harness import CODE, Options, domains, expand, run_harness, sample_of, task_manager
from xlstm_hybrid.evaluation.scores import last_part, read_results
from xlstm_hybrid.pipeline.costs import measure_checkpoints
from xlstm_hybrid.reports.run import comparison_pictures

MISSING = "lm-eval is not installed (pip install 'xlstm-hybrid[eval]'): this package's own exact match stands for it, its other tasks are left out."
WHOLE_DOMAIN = 200  # prompts of a domain's task file


def harness_installed():
    return find_spec("lm_eval") is not None


def units_of(section):
    """What the section `evaluate` wants of lm-eval: `harness` as it is, `long_context` as kinds at lengths."""
    asked = section.get("long_context")
    names = expand(section["harness"]) if "harness" in section else []
    more = expand(asked.get("kinds", list(KINDS)), asked["lengths"]) if asked else []
    return [*names, *(unit for unit in more if unit not in names)]


def options_of(recipe, **more):
    """`harness.Options` of a recipe: code that a model writes runs only where the environment says so, whatever the recipe."""
    section, asked = recipe.evaluate, recipe.evaluate.get("long_context") or {}
    known = {key: asked[key] for key in ("samples", "depths") if key in asked}
    allowed = os.environ.get(CODE[0]) == CODE[1]
    return Options(seed=recipe.seed, allow_code=allowed, limit=section.get("limit"), batch_size=section["batch_size"], dtype=recipe.teacher_dtype,
                   chat=section.get("chat", False), **known, **more)  # fmt: skip


def settings_of(section):
    """`efficiency.Settings` of the section `evaluate`."""
    return Settings(**{key: tuple(value) if isinstance(value, list) else value for key, value in section["efficiency"].items()})


def check_evaluation(recipe):
    """Raise, before anything runs, for tasks that nobody knows, settings of costs that make no sense, and domains judged on two sets of prompts.

    Raises:
        ConfigError, EvaluationError.
    """
    section = recipe.evaluate or {}
    if "efficiency" in section:
        settings_of(section)
    units = units_of(section)
    judged, limit = [u.name for u in units if u.name in domains()], min(section.get("limit", WHOLE_DOMAIN), WHOLE_DOMAIN)
    if judged and section.get("examples", limit) != limit:
        raise ConfigError(f"{recipe.path.name}: evaluate.limit={section.get('limit')} gives {', '.join(judged)} {limit} prompts, the other stages "
                          f"have examples={section['examples']}; expected the same number, so that their scores can stand in one table")  # fmt: skip
    if units and harness_installed():
        task_manager(units, "", options_of(recipe))


def source_of(recipe, teacher):
    """The teacher's directory; of a hub id the snapshot at the recipe's revision."""
    return local_source(teacher, None if Path(teacher).is_dir() else recipe.revision)


# --- lm-eval on both sides -------------------------------------------------------------------------------------


def judge_sides(recipe, sides, out, redo=False, report=lambda side, line: None):
    """Teacher and student by lm-eval, with the same tasks, shots and budgets.

    Args:
        sides: {"teacher": directory or hub id, "student": directory}.  out: folder of the results, a folder per side and task.
        report: called with a side and a line about a finished task.
    Returns:
        {side: {unit: what `run_harness` returns}}
    """
    units, found = units_of(recipe.evaluate), {}
    warn_if_slow("cuda" if torch.cuda.is_available() else "cpu", recipe.teacher_dtype, "teacher_dtype")
    for side, model in sides.items():
        name, source = (last_part(model), source_of(recipe, model)) if side == "teacher" else (side, model)
        options = replace(options_of(recipe, redo=redo), name=name)
        found[side] = run_harness(source, units, out / side, options, lambda line, side=side: report(side, line))
    return found


def domain_scores(folder, judged):
    """What lm-eval found on the procedural domains, in the form of `pipeline.evaluate`, without perplexities."""
    exact, samples, wrong = {}, {}, {}
    for unit, domain in domains().items():
        if unit in judged:
            exact[domain] = judged[unit]["scores"][unit]["exact_match,none"]
            (file,) = (folder / unit).rglob(f"samples_{unit}_*.jsonl")
            samples[domain] = [sample_of(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
            wrong |= {domain: found} if (found := judged[unit].get("contradictions")) else {}
    return {"exact_match": exact, "samples": samples, "contradictions": wrong}


def long_context_rows(judged):
    """The long-context tasks of both sides, a flat row each: see `report_sections.HEAD`."""
    rows = []
    for unit, of_student in judged["student"].items():
        if student := of_student["long_context"]:
            teacher = judged["teacher"][unit]["long_context"]
            both = {f"{side}_{key}": found[key] for key in ("recall", "cache_bytes") for side, found in (("teacher", teacher), ("student", student))}
            documents = of_student["settings"]["samples"]
            rows.append({"task": unit, "tokens": student["length"], "documents": min(documents, of_student["settings"]["limit"] or documents),
                         "coverage": student["coverage"], "excess": student["excess"], **both})  # fmt: skip
    return rows


# --- the comparison --------------------------------------------------------------------------------------------


def compare_sides(recipe, teacher, folder, judged=None):
    """The verdict on the student, written into `out/comparison`; None where there is nothing to compare.

    Long-context tasks have no part in it: what student and teacher both fail would count as tied.

    Args:
        folder: `evaluation` of the run.  judged: what `judge_sides` returned; None compares the run's own exact match.
    """
    tasks_of = None
    if judged:
        tasks_of = {task for found in judged["teacher"].values() if not found["long_context"] for task in found["scores"]}
        paths = [folder / "harness" / side for side in ("teacher", "student")]
    else:
        paths = [folder / f"{side}.json" for side in ("teacher", "student")]
    if tasks_of == set():
        return None
    (mine,), (its,) = (read_results(path) for path in paths)
    mine.name, its.name = last_part(teacher), "student"
    chosen = [task for task in mine.scores if tasks_of is None or task in tasks_of]
    if not chosen:
        return None
    found = compare(mine, [its], alpha=recipe.evaluate.get("alpha", 0.0), tasks=chosen)
    write_comparison(found, folder.parent / "comparison", comparison_pictures(found))
    return plain_floats(found)


# --- costs -----------------------------------------------------------------------------------------------------


def measure_sides(recipe, teacher, student, report=lambda text: None):
    """The efficiency report of teacher and student, in the dtype that the recipe teaches in."""
    warn_if_slow("cuda" if torch.cuda.is_available() else "cpu", recipe.teacher_dtype, "teacher_dtype")
    return measure_checkpoints(source_of(recipe, teacher), student, settings_of(recipe.evaluate), names=("student", last_part(teacher)),
                               dtype=recipe.teacher_dtype, report=report)  # fmt: skip
