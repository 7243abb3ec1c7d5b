"""The road end to end on the shipped teacher, with two steps per stage: it arrives, it resumes, it refuses to mix settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.artifacts import read_provenance, verify
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation import win_and_tie
from xlstm_hybrid.pipeline import Road
from xlstm_hybrid.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def road(out, **changes):
    console = Console(file=open(out.parent / "console.txt", "a"), width=120)  # noqa: SIM115
    return Road(replace(load_recipe(RECIPES / "smoke.yaml"), **changes), out, console=console)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    out = tmp_path_factory.mktemp("road") / "run"
    return out, road(out).walk()


def test_the_road_arrives_with_a_student_that_loads_and_generates(walked):
    out, _ = walked
    verify(out / "student")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "student"), AutoTokenizer.from_pretrained(out / "student")
    inputs = tokenizer(["1+1=", "recall aB; cD; = a"], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, inputs["input_ids"].shape[1] + 3)


def test_every_stage_leaves_its_record(walked):
    out, results = walked
    stages = [s["stage"] for s in read_provenance(out / "student")]
    assert stages == ["convert", "align", "distill:symbols", "distill:memory", "merge", "evaluate"]
    recorded = read_provenance(out / "student")[-1]["figures"]
    assert recorded["exact_match"] == results["students"]["student"]["exact_match"]
    assert str(out) not in (out / "student" / "provenance.json").read_text()


def test_the_report_shows_what_was_measured(walked):
    out, results = walked
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["students"]) == {"converted", "aligned", "expert symbols", "expert memory", "student"}
    for name, scores in results["students"].items():
        verdict = win_and_tie(scores["exact_match"], results["teacher_scores"]["exact_match"])
        assert results["win_and_tie"][name]["alpha_star"] == verdict.alpha_star
    assert len(results["gates"]) == 4 and all(0 < g < 1 for layer in results["gates"] for g in layer)
    report = (out / "report.md").read_text()
    pictures = {p.name for p in out.glob("*.png")}
    assert len(pictures) >= 5 and all(p in report for p in pictures)
    assert f"{results['teacher_scores']['exact_match']['recall']:.1%}".rstrip("%")[:4] in report


def test_a_second_walk_keeps_every_stage_and_an_interrupted_one_is_made_again(walked, monkeypatch):
    out, results = walked
    before = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors") if "student" not in p.parts}
    (out / "merged" / "model.safetensors").write_bytes(b"cut off")
    again = road(out).walk()
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"merged"}
    assert again["students"] == results["students"]


def test_changed_settings_are_refused_by_name(walked):
    out, _ = walked
    with pytest.raises(ConfigError, match=r"aligned was made with other settings: pass --redo"):
        road(out, align={**load_recipe(RECIPES / "smoke.yaml").align, "max_steps": 3}).walk()


def test_the_command_line_reports_named_errors_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xlstm-hybrid", "convert", str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_each_stage_is_a_verb(tmp_path):
    run = CliRunner().invoke
    recipe = ["--recipe", str(RECIPES / "smoke.yaml")]
    teacher = str(RECIPES / "tiny_teacher/tiny-llama")
    for arguments in (
        ["convert", teacher, str(tmp_path / "c"), "--sliding-window", "16", "--dtype", "float32"],
        ["align", str(tmp_path / "c"), str(tmp_path / "a"), *recipe],
        ["distill", str(tmp_path / "a"), teacher, str(tmp_path / "e"), "--expert", "symbols", *recipe],
        ["merge", str(tmp_path / "m"), str(tmp_path / "e"), str(tmp_path / "e")],
        ["evaluate", str(tmp_path / "m"), "--out", str(tmp_path / "r.json"), *recipe],
        ["card", str(tmp_path / "m")],
    ):
        result = run(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert set(json.loads((tmp_path / "r.json").read_text())["exact_match"]) == {"arithmetic", "recall", "code", "strings"}
    assert (tmp_path / "m" / "README.md").is_file()
