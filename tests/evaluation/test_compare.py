"""Results of lm-eval and our own are read, refused where they cannot be compared, and scored by the published measure."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, verify_files, write_manifest
from xlstm_hybrid.errors import CheckpointError, EvaluationError
from xlstm_hybrid.evaluation.comparison import (
    choose_metric,
    compare,
    mark_front,
    open_sides,
    read_costs,
    record_comparison,
)
from xlstm_hybrid.evaluation.results import Results, chance_of, read_results
from xlstm_hybrid.reports.card import write_card
from xlstm_hybrid.reports.comparison import (
    comparison_markdown,
    comparison_pictures,
    html_page,
    scaled_scores,
    write_comparison,
)
from xlstm_hybrid.reports.run import verdict_text

DATE = "2026-01-02T03-04-05.678901"
ANSWERS = {  # benchmark: answers of teacher and student, document by document
    "arc": ([1] * 8 + [0] * 12, [1] * 7 + [0] * 2 + [1] * 2 + [0] * 9),
    "gsm8k": ([1] * 10 + [0] * 10, [1] * 10 + [0] * 10),
    "code": ([1] * 16 + [0] * 4, [1] * 8 + [0] * 12),
}


def sample(j, values, kind="none", document=None, prompt="p"):
    return {
        "doc_id": j,
        "doc": {"q": j},
        "target": "t",
        "arguments": {},
        "resps": [["x"]],
        "filtered_resps": ["x"],
        "filter": kind,
        "metrics": list(values),
        "doc_hash": document or f"d{j}",
        "prompt_hash": f"{prompt}{j}",
        "target_hash": "t",
        **values,
    }


def harness(folder, model, answers, date=DATE, samples=True, **changes):
    """A folder as lm-eval 0.4.13 leaves it; `changes` replace parts of the results file."""
    folder.mkdir(parents=True, exist_ok=True)
    metric = {"arc": "acc_norm,none", "gsm8k": "exact_match,strict-match", "code": "pass@1,create_test"}
    content = {
        "results": {
            t: {
                "alias": t,
                "name": t,
                "sample_len": len(a),
                metric[t]: sum(a) / len(a),
                metric[t].replace(",", "_stderr,"): 0.1,
            }
            for t, a in answers.items()
        },
        "group_subtasks": {t: [] for t in answers},
        "versions": dict.fromkeys(answers, 1.0),
        "n-shot": dict.fromkeys(answers, 5),
        "configs": {t: {"task": t, "num_fewshot": 5, "generation_kwargs": {"max_gen_toks": 64}} for t in answers},
        "n-samples": {t: {"original": 20, "effective": 20} for t in answers},
        "higher_is_better": {t: {metric[t].split(",")[0]: True} for t in answers},
        "config": {"model": "hf", "limit": None, "gen_kwargs": None},
        "model_name": f"/home/someone/{model}",
        "lm_eval_version": "0.4.13",
        "chat_template_sha": None,
        "fewshot_as_multiturn": False,
    }
    (folder / f"results_{date}.json").write_text(json.dumps(content | changes))
    for task, values in answers.items() if samples else ():
        name, kind = metric[task].split(",")
        lines = [json.dumps(sample(j, {name: float(a)}, kind)) for j, a in enumerate(values)]
        (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def teacher_of(tmp_path, **changes):
    return harness(tmp_path / "t", "teacher", {t: a for t, (a, _) in ANSWERS.items()}, **changes)


def student_of(tmp_path, name="student", **changes):
    return harness(tmp_path / name, name, {t: a for t, (_, a) in ANSWERS.items()}, **changes)


def compared(teacher, *students, **settings):
    return compare(*open_sides(teacher, [str(s) for s in students]), resamples=500, **settings)


# --- reading ---------------------------------------------------------------------------------------------------


def test_a_folder_of_lm_eval_is_read_with_its_samples_and_without_paths_of_the_machine(tmp_path):
    (found,) = read_results(teacher_of(tmp_path))
    assert found.name == "teacher" and found.scores["arc"] == {"acc_norm,none": 0.4}
    assert (
        found.samples["gsm8k"]["exact_match,strict-match"][("gsm8k", "d3", 1)] == 1.0
        and len(found.prompts["code"]) == 20
    )
    assert found.settings["arc"] == {
        "shots": 5,
        "version": {"arc": 1.0},
        "documents": 20,
        "generation": {"arc": {"max_gen_toks": 64}},
        # recorded as not set; several turns mean nothing without a chat template
        "limit": None,
        "gen_kwargs": None,
        "chat_template": None,
    }


def test_tasks_that_were_run_one_by_one_are_put_together_and_the_later_result_counts(tmp_path):
    folder = harness(tmp_path / "t", "m", {"arc": [1, 0]}, date="2026-01-02T00-00-00.0")
    harness(folder, "m", {"gsm8k": [1, 1]}, date="2026-01-03T00-00-00.0")
    harness(folder, "m", {"arc": [1, 1, 1, 0]}, date="2026-01-04T00-00-00.0")
    (found,) = read_results(folder)
    assert {t: list(s.values()) for t, s in found.scores.items()} == {"arc": [0.75], "gsm8k": [1.0]}
    assert len(found.samples["arc"]["acc_norm,none"]) == 4 and found.notes == [
        "arc: the later of two results of m is used"
    ]


def test_a_group_with_a_score_is_one_benchmark_over_the_samples_of_its_parts(tmp_path):
    parts = {"arc": [1, 1, 0, 0, 0], "gsm8k": [1, 1, 1]}
    folder = harness(tmp_path / "t", "m", parts)
    file = next(folder.glob("results*"))
    content = json.loads(file.read_text())
    for task, entry in list(content["results"].items()):  # parts of a group share a metric
        content["results"][task] = {
            "alias": task,
            "acc,none": next(v for k, v in entry.items() if k.endswith(("none", "match")) and "std" not in k),
        }
        lines = [json.loads(line) for line in (folder / f"samples_{task}_{DATE}.jsonl").read_text().splitlines()]
        rows = [row | {"metrics": ["acc"], "acc": row[row["metrics"][0]], "filter": "none"} for row in lines]
        (folder / f"samples_{task}_{DATE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content["results"]["mmlu"] = {"alias": "mmlu", "acc,none": 5 / 8, "acc_stderr,none": 0.1}
    content["results"]["mmlu_stem"] = {"alias": " - stem", "acc,none": 0.4}
    content["groups"] = {k: content["results"][k] for k in ("mmlu", "mmlu_stem")}
    content["group_subtasks"] = {"mmlu": ["mmlu_stem", "gsm8k"], "mmlu_stem": ["arc"], "arc": [], "gsm8k": []}
    content["n-shot"]["mmlu"] = 5
    file.write_text(json.dumps(content))
    (found,) = read_results(folder)
    assert list(found.scores) == ["mmlu"] and found.settings["mmlu"]["documents"] == 40
    values = found.samples["mmlu"]["acc,none"]
    assert len(values) == 8 and sum(values.values()) / 8 == found.scores["mmlu"]["acc,none"]
    assert compared(folder, f"again={folder}")["students"]["again"]["paired"]["mmlu"]["documents"] == 8


def test_equal_documents_and_several_filters_are_kept_apart(tmp_path):
    folder = teacher_of(tmp_path)
    rows = [
        sample(j, {"exact_match": v}, kind, document="same")
        for kind, values in (("strict-match", (1, 0)), ("flexible-extract", (1, 1)))
        for j, v in enumerate(values)
    ]
    (folder / f"samples_gsm8k_{DATE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_results(folder)[0].samples["gsm8k"]
    assert list(found["exact_match,strict-match"].values()) == [1, 0] and list(
        found["exact_match,flexible-extract"].values()
    ) == [1, 1]


RUN = {
    "teacher_scores": {"exact_match": {"recall": 1.0, "code": 0.5}},
    "students": {
        "converted": {"exact_match": {"recall": 0.25, "code": 0.0}},
        "student": {"exact_match": {"recall": 1.0, "code": 0.5}},
    },
}


def own(score, correct):
    samples = [{"prompt": f"q{j}", "answer": "a", "output": "o", "correct": c} for j, c in enumerate(correct)]
    return {"exact_match": {"recall": score}, "perplexity": {"recall": 1.5}, "samples": {"recall": samples}}


def test_a_runs_results_stand_for_its_teacher_and_all_of_its_students(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RUN))
    found = compared(tmp_path / "results.json", tmp_path)
    assert list(found["students"]) == ["converted", "student"] and found["teacher"] == "teacher"
    assert [s["lossless"] for s in found["students"].values()] == [False, True]
    assert found["students"]["student"]["paired"] == {} and found["students"]["student"]["resampled"] is None
    assert "no paired statistics of recall, code: student and teacher came without samples" in found["notes"]


def test_the_samples_of_a_run_lie_beside_its_results(tmp_path):
    students = {name: {"exact_match": {"recall": 0.5}} for name in ("student", "older")}
    (tmp_path / "results.json").write_text(
        json.dumps({"teacher_scores": {"exact_match": {"recall": 0.75}}, "students": students})
    )
    (tmp_path / "evaluation").mkdir()
    for name, content in (
        ("teacher", own(0.75, [1, 1, 1, 0])),
        ("student", own(0.5, [1, 1, 0, 0])),
        ("older", own(0.25, [1, 0, 0, 0])),
    ):
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps({"result": content}))
    found = compared(tmp_path, tmp_path)
    assert found["students"]["student"]["paired"]["recall"]["lost"] == 1
    assert found["students"]["older"]["paired"] == {}  # its file is of another evaluation: other scores


def test_our_own_evaluations_are_paired_by_prompt_and_answer(tmp_path):
    (tmp_path / "teacher.json").write_text(json.dumps({"spec": {}, "result": own(0.75, [True, True, True, False])}))
    (tmp_path / "student.json").write_text(json.dumps(own(0.5, [True, False, True, False])))
    found = compared(tmp_path / "teacher.json", tmp_path / "student.json")["students"]["student"]
    assert (found["paired"]["recall"]["gained"], found["paired"]["recall"]["lost"]) == (0, 1) and found["recovery"] == {
        "recall": pytest.approx(2 / 3)
    }


BAD_FILES = {
    "missing": (None, "cannot be read .No such file"),
    "not JSON": ("{", "cannot be read .Expecting"),
    "a list": ("[]", "holds a list, expected an object"),
    "something else": ('{"results": 3}', "holds neither results of lm-eval nor of this package"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_of_another_form_are_named(case, tmp_path):
    content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(EvaluationError, match=f"x.json.*{message}"):
        read_results(tmp_path / "x.json")


def test_a_folder_of_two_models_and_a_damaged_sample_are_named(tmp_path):
    folder = harness(tmp_path / "t", "a", {"arc": [1, 0]}, date="1")
    harness(folder, "b", {"arc": [1, 0]}, date="2")
    with pytest.raises(EvaluationError, match=r"t: results of 2 models \(a, b\), expected one"):
        read_results(folder)
    folder = teacher_of(tmp_path / "again")
    (folder / f"samples_arc_{DATE}.jsonl").write_text('{"doc_id": 0}\nnot json\n')
    with pytest.raises(EvaluationError, match=rf"samples_arc_{DATE}.jsonl, line 2: expected a sample"):
        read_results(folder)


def test_names_come_from_the_files_or_from_the_caller_and_are_never_the_same(tmp_path):
    teacher, student = teacher_of(tmp_path), student_of(tmp_path)
    _, students = open_sides(teacher, [str(student), str(student), f"mine={student}", str(teacher)])
    assert [s.name for s in students] == ["student", "student #2", "mine", "teacher #2"]


# --- choosing --------------------------------------------------------------------------------------------------


def test_the_metric_is_one_that_all_sides_have_and_less_is_better_only_where_there_is_no_other():
    one = Results(
        "a",
        {"t": {"acc,none": 0.5, "acc_norm,none": 0.6, "word_perplexity,none": 9.0}},
        {"t": ["word_perplexity,none"]},
    )
    two = Results("b", {"t": {"acc,none": 0.5, "word_perplexity,none": 8.0}}, {"t": ["word_perplexity,none"]})
    assert (
        choose_metric("t", [one, one], None) == "acc_norm,none" and choose_metric("t", [one, two], None) == "acc,none"
    )
    assert choose_metric("t", [one, one], "acc") == choose_metric("t", [one, one], "acc,none") == "acc,none"
    assert choose_metric("t", [one, two], "acc_norm") is None
    assert choose_metric("t", [one, one], "word_perplexity") == "word_perplexity,none"
    bits = Results("c", {"t": {"bits_per_byte,none": 0.9}}, {"t": ["bits_per_byte,none"]})
    assert choose_metric("t", [bits, bits], None) == "bits_per_byte,none"
    filters = Results("a", {"t": {"exact_match,flexible-extract": 0.6, "exact_match,strict-match": 0.5}})
    assert choose_metric("t", [filters], None) == "exact_match,strict-match"
    assert choose_metric("t", [filters], "exact_match,flexible-extract") == "exact_match,flexible-extract"


def test_only_the_benchmarks_that_were_asked_for_are_compared(tmp_path):
    found = compared(teacher_of(tmp_path), student_of(tmp_path), tasks=["code", "arc"])
    assert list(found["metrics"]) == ["code", "arc"]
    with pytest.raises(EvaluationError, match="mmlu has no score of teacher and student"):
        compared(tmp_path / "t", tmp_path / "student", tasks=["mmlu"])


def changed(file_of, **changes):
    """Change parts of the results file of a folder."""
    file = next(file_of.glob("results_*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file_of


def test_every_reason_against_a_comparison_is_listed_at_once(tmp_path):
    teacher, student = teacher_of(tmp_path), student_of(tmp_path)
    content = json.loads(next(student.glob("results_*.json")).read_text())
    content["results"]["gsm8k"]["exact_match,strict-match"] = math.nan
    del content["results"]["code"]
    content["configs"]["gsm8k"]["generation_kwargs"] = {"max_gen_toks": 128}
    changed(
        student,
        **content
        | {"n-shot": {"arc": 0, "gsm8k": 5}, "versions": {"arc": 2.0, "gsm8k": 1.0}, "chat_template_sha": "abc"},
    )
    with pytest.raises(EvaluationError) as raised:
        compared(teacher, student)
    for reason in (
        "7 reasons why",
        "code has no score of student",
        "arc: shots 5 for teacher, 0 for student",
        "arc: version {'arc': 1.0} for teacher, {'arc': 2.0} for student",
        "arc: chat_template None for teacher, 'abc' for student",
        "gsm8k: chat_template",
        "gsm8k (exact_match,strict-match) is nan for student, expected a finite score of at least 0",
        "gsm8k: generation",
        "Evaluate student and teacher with the same tasks, shots and budget",
    ):
        assert reason in str(raised.value), reason


def test_what_differs_may_be_allowed_by_name_and_is_noted(tmp_path):
    teacher, student = teacher_of(tmp_path), changed(student_of(tmp_path), **{"versions": dict.fromkeys(ANSWERS, 2.0)})
    with pytest.raises(EvaluationError, match="3 reasons .*version"):
        compared(teacher, student)
    found = compared(teacher, student, allow=["version"])
    assert (
        sum("version {'arc': 1.0} for teacher" in note for note in found["notes"]) == 1
        and len(found["differences"]) == 3
    )
    with pytest.raises(EvaluationError, match=r"allow=\['weather'\]; expected"):
        compared(teacher, student, allow=["weather"])


def test_a_task_that_one_side_lacks_is_refused_or_left_out_by_choice(tmp_path):
    teacher = teacher_of(tmp_path)
    student = harness(tmp_path / "s", "s", {"arc": ANSWERS["arc"][1]})
    with pytest.raises(EvaluationError, match="2 reasons .* gsm8k has no score of s; code has no score of s"):
        compared(teacher, student)
    found = compared(teacher, student, common=True)
    assert list(found["metrics"]) == ["arc"] and "left out: code has no score of s" in found["notes"]
    other = harness(tmp_path / "o", "o", {"gsm8k": [1, 0]})
    with pytest.raises(EvaluationError, match="no benchmark that all sides have"):
        compared(student, other, common=True)


def test_a_task_that_only_the_student_has_is_refused_too(tmp_path):
    teacher = harness(tmp_path / "t", "teacher", {"arc": ANSWERS["arc"][0]})
    with pytest.raises(
        EvaluationError, match="2 reasons .* gsm8k has no score of teacher; code has no score of teacher"
    ):
        compared(teacher, student_of(tmp_path))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1])
def test_a_score_of_the_teacher_that_is_none_is_refused(tmp_path, wrong):
    content = json.loads(next(teacher_of(tmp_path).glob("results_*.json")).read_text())
    content["results"]["arc"]["acc_norm,none"] = wrong
    with pytest.raises(
        EvaluationError,
        match=rf"1 reasons .* arc \(acc_norm,none\) is {wrong} for teacher, expected a finite score of at least 0",
    ):
        compared(changed(tmp_path / "t", **content), student_of(tmp_path))


def test_results_without_samples_have_a_verdict_but_no_paired_statistics(tmp_path):
    teacher = teacher_of(tmp_path)
    full, bare = (compared(teacher, student_of(tmp_path, name, samples=name == "full")) for name in ("full", "bare"))
    mine, its = bare["students"]["bare"], full["students"]["full"]
    assert all(mine[key] == its[key] for key in ("scores", "c_0", "alpha_star", "lossless", "wins"))
    assert (
        mine["paired"] == {} and mine["resampled"] is None and set(its["paired"]) == set(ANSWERS) and its["resampled"]
    )
    assert "no paired statistics of arc, gsm8k, code: bare came without samples" in bare["notes"]
    (tmp_path / "full" / f"samples_arc_{DATE}.jsonl").unlink()
    part = compared(teacher, tmp_path / "full")["students"]["full"]
    # an interval of alpha* needs every benchmark
    assert set(part["paired"]) == {"gsm8k", "code"} and part["resampled"] is None


def test_other_documents_or_prompts_are_refused(tmp_path):
    teacher, student = teacher_of(tmp_path), student_of(tmp_path)
    rows = [
        sample(j, {"acc_norm": float(a)}, prompt="other" if j < 3 else "p") for j, a in enumerate(ANSWERS["arc"][1])
    ]
    (student / f"samples_arc_{DATE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        EvaluationError, match="1 reasons .* arc: the prompts of 3 of 20 documents differ between teacher and student"
    ):
        compared(teacher, student)
    rows = [sample(j + 5, {"acc_norm": float(a)}) for j, a in enumerate(ANSWERS["arc"][1])]
    (student / f"samples_arc_{DATE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EvaluationError, match="arc: 10 documents were evaluated for only one of teacher and student"):
        compared(teacher, student)
    found = compared(teacher, student, allow=["documents"])
    assert "arc" not in found["students"]["student"]["paired"]
    assert "no paired statistics of arc: student and teacher were evaluated on different documents" in found["notes"]


# --- comparing -------------------------------------------------------------------------------------------------


def test_scores_verdict_and_paired_statistics_of_a_student(tmp_path):
    found = compared(teacher_of(tmp_path), student_of(tmp_path))
    student = found["students"]["student"]
    assert found["teacher_scores"] == {"arc": 0.4, "gsm8k": 0.5, "code": 0.8} and student["scores"] == {
        "arc": 0.45,
        "gsm8k": 0.5,
        "code": 0.4,
    }
    assert (student["wins"], student["ties"], student["losses"]) == (1, 1, 1) and student["c_alpha"] == student[
        "c_0"
    ] == pytest.approx(2 / 3)
    assert student["lossless"] and student["alpha_star"] == 0 and student["recovery"]["code"] == pytest.approx(0.5)
    code = student["paired"]["code"]
    assert (code["gained"], code["lost"], code["documents"]) == (0, 8, 20) and code["p"] == pytest.approx(2 / 2**8)
    assert code["p_holm"] == pytest.approx(3 * 2 / 2**8) and code["difference"][0] < -0.4 < code["difference"][1]
    assert (
        student["mean_recovery"] == pytest.approx((1.125 + 1 + 0.5) / 3) and 0 <= student["resampled"]["lossless"] <= 1
    )
    assert found["shots"] == dict.fromkeys(ANSWERS, 5)


def test_the_verdict_is_at_the_tolerance_that_was_asked_for(tmp_path):
    names = [f"b{j}" for j in range(7)]
    # published; alpha* is .145
    teacher, olmo = [20.7, 19.0, 67.5, 32.9, 28.7, 50.6, 71.7], [17.7, 19.4, 56.6, 32.3, 27.4, 36.8, 52.4]
    sides = [
        Results(n, {b: {"acc,none": s} for b, s in zip(names, scores, strict=True)})
        for n, scores in (("t", teacher), ("s", olmo))
    ]
    for alpha, lossless in ((0.0, False), (0.144, False), (0.146, True), (1.0, True)):
        found = compare(sides[0], sides[1:], alpha=alpha)["students"]["s"]
        assert found["lossless"] is lossless and found["alpha_star"] == pytest.approx(0.145, abs=6e-4)


def test_a_score_that_is_no_mean_of_its_samples_has_no_paired_statistics(tmp_path):
    teacher, student = teacher_of(tmp_path), student_of(tmp_path)
    content = json.loads(next(student.glob("results_*.json")).read_text())
    content["results"]["arc"]["acc_norm,none"] = 0.44
    found = compared(teacher, changed(student, **content))
    assert set(found["students"]["student"]["paired"]) == {"gsm8k", "code"}
    assert "no paired statistics of arc: the score of student is not the mean of its samples" in found["notes"]


def test_a_benchmark_on_which_the_teacher_scores_nothing_is_shown_and_does_not_count():
    sides = [Results(n, {"a": {"acc,none": s}, "b": {"acc,none": 0.0}}) for n, s in (("t", 0.5), ("s", 0.25))]
    found = compare(sides[0], sides[1:])
    assert (
        found["students"]["s"]["recovery"] == {"a": 0.5, "b": None} and found["students"]["s"]["mean_recovery"] == 0.5
    )
    assert found["counts"] == {"a": True, "b": False} and found["students"]["s"]["alpha_star"] == 0.5
    assert found["students"]["s"]["ties"] == 0 and not found["students"]["s"]["lossless"]
    text = comparison_markdown(found)
    assert "| b (teacher at chance, 0: does not count) | acc,none | – | 0 | 0 | – |" in text
    assert "the bar is 0.5. 1 of 2 benchmarks count." in text


def test_the_front_holds_whom_nobody_beats_at_their_cost():
    students = {
        n: {"cost": c, "mean_recovery": r}
        for n, (c, r) in {
            "small": (1, 0.7),
            "big": (4, 0.9),
            "worse": (4, 0.8),
            "dear": (9, 0.9),
            "twin": (1, 0.7),
            "free": (None, 1.0),
        }.items()
    }
    mark_front(students)
    assert {n: s["pareto"] for n, s in students.items()} == {
        "small": True,
        "big": True,
        "worse": False,
        "dear": False,
        "twin": True,
        "free": None,
    }
    mark_front(students, teacher_cost=3)
    # the teacher itself is cheaper than the big student
    assert not students["big"]["pareto"] and students["small"]["pareto"]


def test_costs_come_from_a_file_or_from_the_results(tmp_path):
    teacher, students = open_sides(teacher_of(tmp_path), [str(student_of(tmp_path, n)) for n in ("a", "b")])
    (tmp_path / "c.json").write_text(json.dumps({"a": 3, "b": {"x": {"bytes": 5.0}}, "teacher": {"x": {"bytes": 9}}}))
    with pytest.raises(EvaluationError, match="a is None, expected a finite number of at least 0 per student"):
        read_costs(f"{tmp_path / 'c.json'}:x.bytes", teacher, students)
    (tmp_path / "c.json").write_text(
        json.dumps({"a": {"x": {"bytes": 3}}, "b": {"x": {"bytes": 5.0}}, "teacher": {"x": {"bytes": 9}}})
    )
    assert read_costs(f"{tmp_path / 'c.json'}:x.bytes", teacher, students) == (
        "bytes",
        {"teacher": 9, "a": 3, "b": 5.0},
    )
    (tmp_path / "latency.json").write_text(json.dumps({"a": 3, "b": 5}))
    assert read_costs(str(tmp_path / "latency.json"), teacher, students) == ("latency", {"a": 3, "b": 5})
    (
        changed(tmp_path / "a", config={"model_num_parameters": 7}),
        changed(tmp_path / "b", config={"model_num_parameters": 8}),
    )
    sides = open_sides(tmp_path / "t", [str(tmp_path / n) for n in "ab"])
    assert read_costs("field:config.model_num_parameters", *sides) == ("model_num_parameters", {"a": 7, "b": 8})
    with pytest.raises(EvaluationError, match="costs nowhere.json: expected a JSON file"):
        read_costs("nowhere.json", teacher, students)


# --- chance ----------------------------------------------------------------------------------------------------


def with_chance(folder, answers, chance, model="m"):
    """Results of a task of two choices as lm-eval 0.4.13 writes them, `chance` in the task's description."""
    about = {"version": 1.0} | ({} if chance is None else {"chance": chance})
    config = {"task": "code", "num_fewshot": 5, "generation_kwargs": {"max_gen_toks": 64}, "metadata": about}
    harness(folder, model, {"gsm8k": [1] * 20, "code": answers})
    content = json.loads(next(folder.glob("results_*.json")).read_text())
    return changed(folder, configs=content["configs"] | {"code": config})


def test_a_task_on_which_the_teacher_guesses_is_in_no_rate_mean_or_interval(tmp_path):
    guessing = [1] * 12 + [0] * 8  # .6 of 20: within 1.96 standard errors of a half
    teacher, student = (with_chance(tmp_path / n, guessing, 0.5, n) for n in ("teacher", "student"))
    found = compared(teacher, student)
    mine = found["students"]["student"]
    assert found["chance"] == {"gsm8k": 0.0, "code": 0.5} and found["counts"] == {"gsm8k": True, "code": False}
    assert (mine["wins"], mine["ties"], mine["losses"]) == (0, 1, 0) and mine["recovery"] == {
        "gsm8k": 1.0,
        "code": None,
    }
    assert mine["scores"]["code"] == 0.6 and mine["mean_recovery"] == 1 and mine["resampled"]["c_0"] == [1, 1]
    assert "teacher is at chance, so that these do not count: code (0.6, by chance 0.5)" in found["notes"]
    text = comparison_markdown(found)
    assert "| code (teacher at chance, 0.5: does not count) | pass@1,create_test | 5 | 0.6 | 0.6 | – |" in text
    worse = with_chance(tmp_path / "worse", [0] * 20, 0.5, "worse")
    assert compared(teacher, worse)["students"]["worse"]["alpha_star"] == 0


def test_a_teacher_above_chance_counts_and_a_chance_that_differs_is_refused(tmp_path):
    teacher = with_chance(tmp_path / "teacher", [1] * 16 + [0] * 4, 0.5, "teacher")
    student = with_chance(tmp_path / "student", [1] * 8 + [0] * 12, 0.5, "student")
    assert (
        compared(teacher, student)["counts"]["code"]
        and compared(teacher, student)["students"]["student"]["losses"] == 1
    )
    other = with_chance(tmp_path / "other", [1] * 8 + [0] * 12, 0.25, "other")
    with pytest.raises(EvaluationError, match=r"code: chance {'code': 0.5} for teacher, {'code': 0.25} for other"):
        compared(teacher, other)
    silent = with_chance(tmp_path / "silent", [1] * 8 + [0] * 12, None, "silent")
    assert compared(silent, student)["chance"]["code"] == 0.5  # the one that is recorded
    with pytest.raises(EvaluationError, match="code has a chance of 1.5, expected a share of at least 0 and below 1"):
        compared(*(with_chance(tmp_path / n, [1, 0], 1.5, n) for n in "ab"))


def test_chance_of_lm_evals_own_tasks_is_known():
    for task, metric, wanted in (
        ("piqa", "acc_norm,none", 0.5),
        ("arc_challenge", "acc,none", 0.25),
        ("mmlu", "acc,none", 0.25),
        ("gpqa_main_cot_zeroshot", "exact_match,flexible-extract", 0.25),
        ("gsm8k", "exact_match,strict-match", 0.0),
        ("humaneval", "pass@1,create_test", 0.0),
        ("mmlu_pro", "acc,none", None),
        ("piqa", "bits_per_byte,none", None),
        ("my_task", "acc,none", None),
    ):
        assert chance_of({}, task, metric) == wanted, (task, metric)
    choices = {"task": {leaf: {"doc_to_choice": ["A", "B", "C", "D"]} for leaf in ("mmlu_anatomy", "mmlu_law")}}
    assert chance_of(choices, "mmlu_stem_of_mine", "acc,none") == 0.25
    assert chance_of({"chance": {"a": 0.5, "b": 0.25}}, "mine", "acc,none") == 0.375  # a group has the mean


def test_where_no_benchmark_counts_there_is_no_rate(tmp_path, checkpoint):
    sides = [Results(n, {"piqa": {"acc,none": s}, "arc_easy": {"acc,none": 0.2}}) for n, s in (("t", 0.5), ("s", 0.6))]
    found = compare(sides[0], sides[1:])
    mine = found["students"]["s"]
    assert [mine[key] for key in ("c_0", "c_alpha", "alpha_star", "lossless", "resampled", "mean_recovery")] == [
        None
    ] * 6
    text = comparison_markdown(found)
    assert "s: C_α and α\\* are not defined, 0 of 2 benchmarks count: t is at chance on all." in text
    pictures = comparison_pictures(found)
    assert set(write_comparison(found, tmp_path / "out", pictures)) >= {"comparison.json", "tasks.png"}
    assert "curve.png" not in pictures
    record_comparison(found, "s", checkpoint)
    card = write_card(checkpoint).read_text()
    assert "0 won, 0 tied, 0 lost; C and α\\* are not defined: the teacher is at chance on all of them." in card
    assert "| piqa (teacher at chance, 0.5: does not count) | acc,none | – | 0.6 | 0.5 | – |" in card
    folders = [with_chance(tmp_path / n, [1] * 9 + [0] * 11, 0.5, n) for n in ("a", "b")]
    refused = run(*folders, "--tasks", "code")
    assert isinstance(refused.exception, EvaluationError) and "a is at chance on all 1 benchmarks (code)" in str(
        refused.exception
    )


def test_a_record_from_before_chance_was_looked_at_still_has_its_card(comparison, checkpoint):
    old = {key: value for key, value in comparison.items() if key not in ("chance", "counts", "smaller")}
    record_comparison(old | {"chance": {}, "counts": {}, "smaller": []}, "s<1>", checkpoint)
    stages = json.loads((checkpoint / "provenance.json").read_text())
    entries = stages if isinstance(stages, list) else stages["stages"]
    for key in ("chance", "counts", "smaller"):
        del entries[-1]["config"][key]
    (checkpoint / "provenance.json").write_text(json.dumps(stages))
    write_manifest(checkpoint)
    assert "it is lossless (C_α = 0.667, the bar is 0.5)." in write_card(checkpoint).read_text()
    assert "| code | pass@1,create_test | 5 | 0.8 | 0.4 | 50.0 % |" in comparison_markdown(old)


# --- less is better ----------------------------------------------------------------------------------------------


def test_where_less_is_better_the_teachers_score_over_the_students_is_the_recovery(tmp_path):
    bits = {"t": 0.8, "s": 1.0, "better": 0.5}
    sides = [Results(n, {"text": {"bits_per_byte,none": b}}, {"text": ["bits_per_byte,none"]}) for n, b in bits.items()]
    for alpha, lossless in ((0.199, False), (0.2, True)):
        found = compare(sides[0], sides[1:], alpha=alpha)
        mine, better = found["students"].values()
        assert mine["lossless"] is lossless and mine["alpha_star"] == pytest.approx(0.2)
    assert (mine["recovery"]["text"], better["recovery"]["text"]) == (0.8, 1.6) and better["wins"] == 1
    assert found["smaller"] == ["text"] and found["chance"] == {"text": None} and found["counts"] == {"text": True}
    assert "| text | bits_per_byte,none (less is better) | – | 0.8 | 1 | 80.0 % |" in comparison_markdown(found)


def test_documents_of_which_less_is_better_are_gained_where_the_student_has_less():
    values = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 4.0]  # student, teacher
    name, keys = "bits_per_byte,none", [f"d{j}" for j in range(5)]
    sides = [
        Results(
            n, {"text": {name: sum(v) / 5}}, {"text": [name]}, samples={"text": {name: dict(zip(keys, v, strict=True))}}
        )
        for n, v in zip("st", values, strict=True)
    ]
    found = compare(sides[1], sides[:1], resamples=500)["students"]["s"]
    paired = found["paired"]["text"]
    assert (paired["gained"], paired["lost"]) == (4, 1) and paired["recovery"][1] > 18 / 15 > paired["recovery"][0]
    assert found["alpha_star"] == 0 and found["wins"] == 1 and 0.5 < found["resampled"]["lossless"] < 1


# --- printing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    students = [student_of(folder, "s<1>"), harness(folder / "x", "x", {t: a for t, (a, _) in ANSWERS.items()})]
    sides = open_sides(teacher_of(folder), [str(s) for s in students])
    return compare(*sides, resamples=500, costs=("cache bytes", {"teacher": 100, "s<1>": 1, "x": 50}))


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.open, self.tables, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.tables.append([])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1].append(data)


def test_the_page_needs_no_other_file_and_holds_every_number_of_the_tables(comparison, tmp_path):
    pictures = comparison_pictures(comparison)
    assert set(pictures) == {"curve.png", "tasks.png", "recovery.png", "front.png"}
    page = Page()
    text = html_page(comparison, pictures)
    page.feed(text)
    assert (
        not page.open and len(page.links) == 4 and all(link.startswith("data:image/png;base64,") for link in page.links)
    )
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text and "s<1>" in "".join(page.text)
    rows = [row for row in page.tables if row[0] == "code"]
    assert rows[0][:6] == ["code", "pass@1,create_test", "5", "0.8", "0.4", "50.0 %"] and rows[1][5] == "100.0 %"


def test_files_hold_the_comparison_and_no_number_that_json_lacks(comparison, tmp_path):
    written = write_comparison(comparison, tmp_path / "out", comparison_pictures(comparison))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(written)
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    assert stored["students"]["x"]["alpha_star"] == 0 and stored["format_version"] == 1
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert all(f"]({name})" in text for name in written if name.endswith("png"))
    assert "s\\<1> is lossless at α = 0: C_α = 0.667, the bar is 0.5; in" in text and "| x | 1.000 | 0.000 |" in text
    assert "| s\\<1> | 0.667 | 0.000 |" in text and re.search(r"\| 1 \| yes \|", text)


def test_scores_on_a_scale_of_their_own_are_told_apart():
    def scaled(**sides):
        teacher, *students = sides.values()
        return scaled_scores(
            {
                "teacher": "t",
                "teacher_scores": teacher,
                "students": {f"s{j}": {"scores": s} for j, s in enumerate(students)},
            }
        )

    assert scaled(t={"a": 0.5, "mt": 5.0}, s={"a": 0.25, "mt": 6.25}) == {
        "t": {"a": 0.5, "mt / 6.25": 0.8},
        "s0": {"a": 0.25, "mt / 6.25": 1.0},
    }
    assert scaled(t={"a": 50.0, "b": 8.0}, s={"a": 25.0, "b": 4.0})["s0"] == {"a": 0.25, "b": 0.04}  # percent
    assert scaled(t={"a": 0.5}, s={"a": 0.25})["s0"] == {"a": 0.25}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])


def test_the_exit_code_is_the_verdict(tmp_path):
    teacher, student = teacher_of(tmp_path), student_of(tmp_path)
    lossless = run(teacher, student, "--out", tmp_path / "out", "--no-pictures")
    assert lossless.exit_code == 0 and "student is lossless at α = 0" in lossless.output, lossless.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "comparison.html",
        "comparison.json",
        "comparison.md",
    ]
    assert run(teacher, student, "--tasks", "code").exit_code == 1
    assert run(teacher, student, "--tasks", "code", "--alpha", "0.5").exit_code == 0
    assert (
        run(teacher, student, f"again={student}", "--tasks", "code,gsm8k", "--metric", "gsm8k=exact_match").exit_code
        == 0
    )
    checkpoint = tmp_path / "c"
    checkpoint.mkdir()
    add_provenance(checkpoint, "convert")
    assert (
        run(teacher, student, "--record", f"student={checkpoint}").exit_code == 0
        and read_provenance(checkpoint)[-1]["stage"] == "compare"
    )
    refused = run(teacher, student, "--tasks", "mmlu")
    assert isinstance(refused.exception, EvaluationError)  # cli.main turns it into one line and exit code 2


# --- into the record -------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    add_provenance(folder, "convert", config={"teacher": "big/teacher"})
    write_manifest(folder)
    return folder


def test_a_comparison_becomes_a_stage_of_the_student_and_stands_on_its_card(comparison, checkpoint):
    record_comparison(comparison, "s<1>", checkpoint)
    verify_files(checkpoint)
    stage = read_provenance(checkpoint)[-1]
    assert stage["stage"] == "compare" and stage["figures"]["scores"] == {"arc": 0.45, "gsm8k": 0.5, "code": 0.4}
    assert (
        stage["config"]["shots"] == dict.fromkeys(ANSWERS, 5) and stage["config"]["metrics"]["arc"] == "acc_norm,none"
    )
    text = write_card(checkpoint).read_text()
    verify_files(checkpoint)
    assert "| benchmark | metric | shots | score | teacher | recovery |" in text
    assert (
        "| code | pass@1,create_test | 5 | 0.4 | 0.8 | 50.0 % |" in text
        and "1 won, 1 tied, 1 lost; C_0 = 0.67 (0.33 to 0.67; lossless" in text
    )
    assert (
        "at α = 0 it is lossless (C_α = 0.667" in text
        and "It scores below its teacher on: code." in text
        and "nothing is known" not in text
    )
    assert "Benchmarks, teacher and student alike:" in text
    record_comparison(comparison | {"differences": ["arc: version 1 for t, 2 for s"]}, "s<1>", checkpoint)
    assert "what differed: arc: version 1 for t, 2 for s." in write_card(checkpoint).read_text()
    index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    assert {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index} == {"arc": 0.45, "gsm8k": 0.5, "code": 0.4}


def test_only_a_known_student_is_recorded_and_only_in_an_undamaged_checkpoint(comparison, checkpoint, tmp_path):
    with pytest.raises(EvaluationError, match="record: 'y' is not compared, expected one of s<1>, x"):
        record_comparison(comparison, "y", checkpoint)
    with pytest.raises(CheckpointError, match="no record of stages"):
        record_comparison(comparison, "x", tmp_path)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json has SHA-256"):
        record_comparison(comparison, "x", checkpoint)
    assert len(read_provenance(checkpoint)) == 1


# --- lm-eval itself --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_lm_eval_writes_is_what_we_read(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    class Answerer(LM):
        """Knows the first `known` answers."""

        def __init__(self, known):
            super().__init__()
            self.known = known

        def generate_until(self, requests, disable_tqdm=False):
            return [f" {r.doc['a']}" if r.doc["n"] < self.known else "no" for r in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [{"n": j, "q": f"say {j}", "a": str(j)} for j in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for part in ("one", "two"):
        (tmp_path / f"{part}.yaml").write_text(
            json.dumps(
                {
                    "task": part,
                    "dataset_path": "json",
                    "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
                    "test_split": "test",
                    "output_type": "generate_until",
                    "doc_to_text": "{{q}}",
                    "doc_to_target": "{{a}}",
                    "num_fewshot": 0,
                    "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
                    "metadata": {"version": 2.0},
                    "metric_list": [
                        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
                    ],
                    "filter_list": [
                        {
                            "name": "strict-match",
                            "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                        }
                    ],
                }
            )
        )
    mean = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": True, "filter_list": "strict-match"}
    (tmp_path / "pair.yaml").write_text(
        json.dumps({"group": "pair", "task": ["one", "two"], "aggregate_metric_list": [mean]})
    )
    for name, known in (("teacher", 9), ("student", 6)):
        tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
        results = lm_eval.simple_evaluate(
            model=Answerer(known),
            tasks=["pair"],
            log_samples=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )
        tracker.general_config_tracker.log_experiment_args("hf", f"pretrained=/home/x/{name}", None, None, False)
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, found in samples.items():
            tracker.save_results_samples(task, found)
    folders = {
        json.loads(f.read_text())["model_name"].rpartition("/")[2]: f.parent
        for f in (tmp_path / "out").rglob("results_*.json")
    }
    found = compared(folders["teacher"], folders["student"], alpha=0.4)
    assert (
        found["metrics"] == {"pair": "exact_match,strict-match"}
        and found["shots"] == {"pair": 0}
        and found["teacher"] == "teacher"
    )
    student = found["students"]["student"]
    assert (
        student["recovery"] == {"pair": pytest.approx(6 / 9)}
        and student["lossless"]
        and student["alpha_star"] == pytest.approx(1 / 3)
    )
    assert (
        student["paired"]["pair"]["documents"] == 24
        and student["paired"]["pair"]["lost"] == 6
        and Path(folders["student"]).is_dir()
    )


def test_a_runs_verdicts_have_intervals_where_the_answers_are_paired():
    from xlstm_hybrid.pipeline.run import report_scores

    def compared(*answers):
        samples = [
            {"prompt": f"p{n}", "answer": "a", "output": "", "correct": bool(right)} for n, right in enumerate(answers)
        ]
        return {"exact_match": {"code": sum(answers) / len(answers)}, "perplexity": {}, "samples": {"code": samples}}

    found = report_scores(
        {"teacher": compared(1, 1, 1, 0), "same": compared(1, 1, 1, 0), "worse": compared(0, 0, 0, 0)}
    )["win_and_tie"]
    assert (
        found["same"]["c_0"] == 1
        and found["same"]["resampled"]["c_0"] == [1, 1]
        and found["same"]["resampled"]["alpha_star"] == [0, 0]
    )
    assert found["worse"]["alpha_star"] == 1 and found["worse"]["resampled"]["alpha_star"] == [1, 1]
    unpaired = {"teacher": compared(1, 0), "student": compared(1, 0) | {"samples": {}}}
    assert report_scores(unpaired)["win_and_tie"]["student"]["resampled"] is None
    nothing = report_scores({"teacher": compared(0, 0), "student": compared(0, 0)})
    assert nothing["win_and_tie"]["student"]["alpha_star"] is None and nothing["win_and_tie"]["student"]["curve"] == []
    assert "on 0 domains (1 more does not count, as the teacher has no right answer): 0 won" in verdict_text(nothing)[0]


def far_results(tmp_path, name, scores):
    file = tmp_path / f"results_{name}.json"
    found = {task: {"recall,none" if "_" in task else "acc,none": score} for task, score in scores.items()}
    file.write_text(
        json.dumps({"results": found, "configs": {}, "versions": {}, "n-shot": {}, "model_name": name, "config": {}})
    )
    return read_results(file)[0]


def test_long_context_tasks_are_no_part_of_the_rate_unless_they_are_named(tmp_path):
    teacher = far_results(tmp_path, "teacher", {"arc": 0.5, "needle_4k": 0.5, "multikey_16k": 0.0})
    student = far_results(tmp_path, "student", {"arc": 0.4, "needle_4k": 0.5, "multikey_16k": 0.0})
    found = compare(teacher, [student])
    assert list(found["teacher_scores"]) == ["arc"] and found["students"]["student"]["c_alpha"] == 0
    assert any("stay out of the win-and-tie rate: needle_4k, multikey_16k" in note for note in found["notes"])
    named = compare(teacher, [student], tasks=["arc", "needle_4k"])
    assert named["students"]["student"]["c_alpha"] == 0.5
    both_fail = compare(teacher, [student], tasks=["arc", "multikey_16k"])
    assert both_fail["students"]["student"]["c_alpha"] == 0 and both_fail["counts"]["multikey_16k"] is False
    others = [
        far_results(tmp_path, f"{name}-other", {"arc": 0.5, "recall_test": 0.5}) for name in ("teacher", "student")
    ]
    assert list(compare(others[0], others[1:])["teacher_scores"]) == ["arc", "recall_test"]  # of somebody else
    alone = [far_results(tmp_path, f"{name}-far", {"needle_4k": s}) for name, s in (("teacher", 1.0), ("student", 0.5))]
    assert list(compare(alone[0], alone[1:])["teacher_scores"]) == ["needle_4k"]
