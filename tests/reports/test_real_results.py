"""The tables of a real model's results, of made-up figures, and those that are committed."""

import json
from pathlib import Path

import pytest
import real_results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/real/results.json"


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def made_up():
    error = {"nll_student": 0.1, "nll_teacher": 0.1, "kl": 0.01, "top1": 0.02}
    students = {}
    for n, name in enumerate(real_results.STAGES):
        of = {
            "nll_student": 3.0 - n / 8,
            "nll_teacher": 2.5,
            "kl": 0.5 - n / 8,
            "top1": 0.5 + n / 8,
            "standard_error": error,
        }
        far = {"needle": {"512": {"recall": n / 4, "coverage": 0.125}}}
        students[name] = {"tokens": {"align": 512 * n}, "agreement": {"peps": of}, "recall": far, "c_0": None}
    scores = {"real_piqa": {"teacher": 0.75, "converted": 0.625, "chance": 0.5, "counts": True}}
    teacher = {"recall": {"needle": {"512": {"recall": 1.0, "coverage": 1.0}}}}
    return {"teacher": teacher, "students": students, "scores": scores}


def test_the_short_table_has_a_line_for_each_measure_and_a_column_for_each_stage():
    lines = real_results.short_table(made_up()).splitlines()
    assert lines[0] == "|  | teacher | converted | stage 0 | stage I | stage II |"
    assert lines[2:] == [
        "| KL to the teacher, held-out text | 0 | 0.500 | 0.375 | 0.250 | 0.125 |",
        "| same most likely token | 1 | 0.500 | 0.625 | 0.750 | 0.875 |",
        "| nats per token | 2.500 | 3.000 | 2.875 | 2.750 | 2.625 |",
        "| PIQA | 0.750 | 0.625 |  |  |  |",
        "| needle, 512 tokens | 1.00 | 0.00 | 0.25 | 0.50 | 0.75 |",
        "| training tokens |  | 0 | 512 | 1,024 | 1,536 |",
    ]


def test_tokens_are_counted_from_the_record_of_a_checkpoint(tmp_path):
    stages = [
        {"stage": "convert", "config": {"sliding_window": 64}},
        {"stage": "calibrate", "config": {"tokens": 8192}},
        {"stage": "align", "config": {"max_steps": 400, "per_device_train_batch_size": 1}},
        {"stage": "distill:student", "config": {"max_steps": 100, "sequences_per_step": 4}},
    ]
    (tmp_path / "provenance.json").write_text(json.dumps({"format_version": 1, "stages": stages}))
    assert real_results.trained(tmp_path) == {"calibrate": 8192, "align": 204800, "distill": 204800}


def test_the_tables_of_readme_and_document_are_those_of_the_committed_results(results):
    assert real_results.short_table(results) in (ROOT / "README.md").read_text(encoding="utf-8")
    tables = real_results.markdown(results).replace(real_results.short_table(results), "")
    document = (ROOT / "docs/real.md").read_text(encoding="utf-8")
    missing = [block for block in tables.split("\n\n") if block.startswith("|") and block.strip() not in document]
    assert missing == [], "write the tables of benchmarks/real_results.py into docs/real.md"


def test_the_picture_shows_what_the_results_have(results):
    drawing = real_results.draw(results)
    left, right = drawing.axes
    assert [text.get_text() for text in left.get_yticklabels()] == list(results["students"])
    assert len(right.lines) == 2 + sum("needle" in s["recall"] for s in results["students"].values())
