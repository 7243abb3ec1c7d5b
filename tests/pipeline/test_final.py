"""What a run measures last: lm-evaluation-harness on both sides, the comparison, the efficiency; kept, resumed,
refused.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xlstm_hybrid import convert
from xlstm_hybrid.checkpoint.files import read_provenance
from xlstm_hybrid.errors import ConfigError, DataError, EvaluationError
from xlstm_hybrid.evaluation import efficiency, efficiency_checks
from xlstm_hybrid.evaluation import harness as engine
from xlstm_hybrid.evaluation.comparison import compare, open_sides
from xlstm_hybrid.hub.push import push
from xlstm_hybrid.pipeline import Run, evaluation
from xlstm_hybrid.pipeline.run import report_scores
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.reports.card import write_card

pytest.importorskip("lm_eval")
RECIPES = Path(__file__).parents[2] / "recipes"
TEACHER = RECIPES / "tiny_teacher/tiny-llama"
UNITS = ("domain_arithmetic", "domain_code")
SECTION = {
    "examples": 6,
    "text_chunks": 2,
    "batch_size": 6,
    "harness": list(UNITS),
    "limit": 6,
    "long_context": {"kinds": ["needle"], "lengths": [256], "samples": 2},
    "efficiency": {"lengths": [32], "rounds": 1, "steps": 2},
}


def recipe(**changes):
    section = {key: value for key, value in (SECTION | changes).items() if value is not None}
    return replace(load_recipe(RECIPES / "smoke.yaml"), evaluate=section, merge=None, experts={"all": {"code": 1.0}})


class ShortRun(Run):
    """A run that trains nothing: its student is the converted teacher, and nothing verifies it."""

    def training_stages(self, start=None):
        (converted, *_), models = super().training_stages(start)
        self.experts = {}
        return [converted], {"teacher": models["teacher"], "student": converted}

    def evaluation_stages(self):
        return [stage for stage in super().evaluation_stages() if stage.name != "verify"]

    def results(self, student):
        scores = report_scores(self.evaluations())
        return {
            "title": "a short run",
            "teacher": TEACHER.name,
            **scores,
            "seconds": dict(self.seconds),
        } | self.against_the_teacher()


def run(out, redo=False, **changes):
    return ShortRun(recipe(**changes), out, redo, Console(file=open(out.parent / "console.txt", "a"), width=150))  # noqa: SIM115


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "apart", lambda function, *arguments: function(*arguments))
        patch.setattr(efficiency_checks, "verify", lambda student: [])
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory, quick):
    out = tmp_path_factory.mktemp("final") / "run"
    return out, run(out).run()


@pytest.fixture
def finished(first, tmp_path):
    """A copy of a run, and its results."""
    return shutil.copytree(first[0], tmp_path / "run"), first[1]


def never(*_, **__):
    pytest.fail("a model was loaded to be evaluated again")


def test_lm_eval_scores_both_sides_and_its_scores_are_those_of_the_run(finished):
    out, results = finished
    for side in ("teacher", "student"):
        folder = out / "evaluation" / "harness" / side
        assert {p.name for p in folder.iterdir()} == {*UNITS, "needle_256"}
        for unit in UNITS:
            score = json.loads((folder / unit / "harness.json").read_text())["scores"][unit]["exact_match,none"]
            exact = (results["teacher_scores"] if side == "teacher" else results["students"]["student"])["exact_match"]
            assert exact[unit.removeprefix("domain_")] == score
    assert set(results["teacher_scores"]["exact_match"]) == {
        "arithmetic",
        "code",
        "recall",
        "strings",
    }  # lm-eval was not asked for the others


def test_the_comparison_leaves_out_what_the_teacher_cannot_lose(finished):
    """Both sides score 0 on the needle; as a tie it would lift C_0."""
    out, results = finished
    found = json.loads((out / "comparison" / "comparison.json").read_text())
    assert list(found["teacher_scores"]) == list(UNITS) and found["teacher"] == TEACHER.name
    student = found["students"]["student"]
    assert student["wins"] + student["ties"] + student["losses"] == 2 and set(student["paired"]) == set(UNITS)
    assert [row["task"] for row in results["long_context"]] == ["needle_256"] and results["long_context"][0][
        "documents"
    ] == 2
    assert {"comparison.md", "comparison.html", "curve.png", "tasks.png", "recovery.png"} <= {
        p.name for p in (out / "comparison").iterdir()
    }


def test_a_runs_own_file_gives_the_same_verdict_with_pairs_of_documents(finished):
    out, results = finished
    found = compare(*open_sides(str(out / "results.json"), [str(out / "results.json")]), tasks=["arithmetic", "code"])
    mine, its = (found["students"]["student"], results["comparison"]["students"]["student"])
    assert [mine[k] for k in ("wins", "ties", "losses", "alpha_star")] == [
        its[k] for k in ("wins", "ties", "losses", "alpha_star")
    ]
    assert {mine["paired"][t]["lost"] for t in mine["paired"]} == {its["paired"][t]["lost"] for t in its["paired"]}


def test_record_report_and_card_have_the_verdict_and_the_costs(finished):
    out, results = finished
    stages = {s["stage"]: s for s in read_provenance(out / "student")}
    assert list(stages) == ["convert", "evaluate", "compare", "efficiency"] and stages["evaluate"]["config"]["lm_eval"]
    compared, row = stages["compare"]["figures"], stages["efficiency"]["figures"]["rows"][0]
    student = results["comparison"]["students"]["student"]
    assert [compared[k] for k in ("c_0", "alpha_star", "wins")] == [student[k] for k in ("c_0", "alpha_star", "wins")]
    measured = results["efficiency"]["pairs"][0]["rows"][0]
    assert row["teacher_cache_bytes"] == measured["memory"]["teacher"]["cache_bytes"]
    assert row["teacher_cache_bytes"] == 4 * 2 * 2 * 64 * (32 + 2) * 4  # layers, K and V, heads, width, tokens, float32
    assert row["gain_tokens_per_second"] == measured["decode"]["gain"]["tokens_per_second"]
    card, report = (out / "student" / "README.md").read_text(), (out / "report.md").read_text()
    for text in (card, report):
        assert (
            "## Cost beside the teacher" in text
            and "recalls nothing on needle_256, nor does the student" in text
            and "domain_code" in text
        )
        assert f"{student['wins']} won, {student['ties']} tied, {student['losses']} lost" in text
    assert (out / "student" / "efficiency.png").is_file() and str(out) not in report


def test_what_lm_eval_and_the_run_both_call_exact_match_stands_once_on_a_card(finished):
    out, _ = finished
    path = out / "student" / "provenance.json"
    content = json.loads(path.read_text())
    evaluated = content["stages"][1]["figures"]
    assert (
        "| recall |" in (out / "student" / "README.md").read_text()
    )  # a domain that lm-eval did not evaluate keeps the table
    for key in ("exact_match", "teacher_exact_match", "recovery"):
        evaluated[key] = {k: v for k, v in evaluated[key].items() if f"domain_{k}" in UNITS}
    path.write_text(json.dumps(content))
    text = write_card(out / "student").read_text()
    assert (
        "exact match | of the teacher" not in text
        and "| domain_code | exact_match,none |" in text
        and text.count("C_0 =") == 1
    )
    evaluated["exact_match"]["code"] += 0.01  # of another evaluation: both stand
    path.write_text(json.dumps(content))
    assert "exact match | of the teacher" in write_card(out / "student").read_text()


def test_the_student_can_be_shared_as_it_is(finished):
    parcel = push(finished[0] / "student", "somebody/tiny", dry_run=True)
    assert {"README.md", "efficiency.png", "model.safetensors"} <= set(parcel.files) and parcel.commit is None


def test_a_second_run_evaluates_nothing_again_and_a_task_that_is_gone_alone(finished, quick, monkeypatch):
    out, results = finished
    monkeypatch.setattr(engine, "load", never)
    monkeypatch.setattr(efficiency, "with_memory", never)
    again = run(out).run()
    assert {k: again[k] for k in ("students", "comparison", "long_context", "efficiency")} == {
        k: json.loads(json.dumps(results[k])) for k in ("students", "comparison", "long_context", "efficiency")
    }
    stages = results["seconds"].keys() - {"everything else", "whole run"}
    assert {k: again["seconds"][k] for k in stages} == {k: results["seconds"][k] for k in stages}
    monkeypatch.undo()
    shutil.rmtree(out / "evaluation" / "harness" / "student" / "domain_code")
    evaluated, evaluate = [], engine.evaluate_unit
    monkeypatch.setattr(
        engine, "evaluate_unit", lambda unit, *rest: evaluated.append(unit.name) or evaluate(unit, *rest)
    )
    run(out).run()
    assert evaluated == ["domain_code"]


def test_other_settings_are_refused_without_redo_and_made_again_with_it(finished, quick, monkeypatch):
    out, _ = finished
    far = {"long_context": SECTION["long_context"] | {"samples": 1}}
    with pytest.raises(EvaluationError, match="needle_256: there are results with samples 2, now 1.*--redo"):
        run(out, **far).run()
    with pytest.raises(
        ConfigError, match=r"settings.lengths was \[32\], is \[16\]; settings.steps was 2, is 1. Pass --redo"
    ):
        run(out, efficiency={"lengths": [16], "rounds": 1, "steps": 1}).run()
    evaluated, evaluate = [], engine.evaluate_unit
    monkeypatch.setattr(
        engine, "evaluate_unit", lambda unit, *rest: evaluated.append(unit.name) or evaluate(unit, *rest)
    )
    found = run(out, redo=True, efficiency={"lengths": [16], "rounds": 1, "steps": 1}, **far).run()
    assert (
        evaluated == ["needle_256", "needle_256"] and found["long_context"][0]["documents"] == 1
    )  # both sides; what is unchanged stays
    assert [row["length"] for row in found["efficiency"]["pairs"][0]["rows"]] == [16]


def test_without_lm_eval_the_run_says_so_and_scores_by_itself(finished, quick, monkeypatch):
    out, results = finished
    shutil.rmtree(out / "evaluation")
    for module in ("run", "evaluation"):
        monkeypatch.setattr(f"xlstm_hybrid.pipeline.{module}.harness_installed", lambda: False)
    found = run(out, harness=["domains", "gsm8k"]).run()
    assert (
        found["notes"] == [evaluation.MISSING] and evaluation.MISSING.split(" (")[0] in (out / "report.md").read_text()
    )
    assert (
        "pip install 'xlstm-hybrid[eval]'" in (out.parent / "console.txt").read_text()
        and not (out / "evaluation" / "harness").exists()
    )
    assert found["students"]["student"]["exact_match"]["code"] == pytest.approx(
        results["students"]["student"]["exact_match"]["code"]
    )
    assert (
        list(found["comparison"]["teacher_scores"]) == ["arithmetic", "recall", "code", "strings"]
        and "long_context" not in found
    )
    assert "lm_eval" not in read_provenance(out / "student")[1]["config"]


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"harness": ["domain_codes"]}, EvaluationError, "domain_codes: lm-eval knows no such task"),
        ({"limit": 5}, ConfigError, r"evaluate.limit=5 gives domain_arithmetic, domain_code 5 prompts.*examples=6"),
        ({"long_context": {"lengths": ["4m"]}}, EvaluationError, "'4m' is no length"),
        ({"long_context": {"lengths": [256], "haystack": "smoke.yaml"}}, EvaluationError, "smoke.yaml: recall_256"),
        (
            {"long_context": {"lengths": [256], "kinds": ["needle"], "haystack": "gone.txt"}},
            DataError,
            "gone.txt: no such file",
        ),
        (
            {"harness": ["paper_base", "paper_instruct"], "long_context": None},
            EvaluationError,
            "humaneval_plus with 0 shots",
        ),
        ({"efficiency": {"lengths": [0]}}, EvaluationError, "expected different whole numbers of at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(tmp_path, monkeypatch, changes, error, match):
    from lm_eval.tasks import TaskManager

    start = TaskManager.__init__  # without lm-eval's own tasks, thousands that take seconds to index
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *rest, **named: start(self, *rest, **named | {"include_defaults": False})
    )
    with pytest.raises(error, match=match):
        Run(recipe(**changes), tmp_path / "run", console=Console(quiet=True)).run()
    assert not (tmp_path / "run").exists()


def test_the_haystack_of_a_recipe_lies_beside_it(tmp_path):
    (tmp_path / "wall.txt").write_text("A wall of stones.")
    far = {"lengths": [256], "kinds": ["needle"], "haystack": "wall.txt"}
    asked = replace(recipe(long_context=far), path=tmp_path / "mine.yaml")
    assert evaluation.harness_options(asked).haystack == tmp_path / "wall.txt"
    assert evaluation.harness_options(recipe(long_context=far | {"hops": 2})).hops == 2
    assert evaluation.harness_options(recipe()).haystack is None


def test_code_that_a_model_writes_runs_only_where_the_environment_says_so(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    assert not evaluation.harness_options(recipe()).allow_code
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert evaluation.harness_options(recipe()).allow_code


def test_costs_are_measured_on_the_checkpoints_and_only_after_their_checks(tmp_path, quick, monkeypatch):
    student = tmp_path / "student"
    convert(TEACHER, student, sliding_window=16, num_sink_tokens=4)
    monkeypatch.setattr(efficiency_checks, "decoding_difference", lambda model, cache, length: 1.0)
    with pytest.raises(
        EvaluationError, match="no figures, because 2 of 2 checks failed: teacher: prompt and steps = one call"
    ):
        efficiency_checks.measure_checkpoints(
            TEACHER, student, efficiency.Settings(lengths=(8,), rounds=1, steps=1), "cpu"
        )
