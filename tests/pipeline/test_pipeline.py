"""A run from end to end on the shipped teacher, with two steps per stage: it arrives, it resumes, it refuses to mix
settings.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import cli, pipeline
from xlstm_hybrid.checkpoint import files as artifacts
from xlstm_hybrid.checkpoint.files import read_provenance, verify_files, write_manifest
from xlstm_hybrid.data import packed_rows
from xlstm_hybrid.errors import CheckpointWriteError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation import efficiency, efficiency_checks
from xlstm_hybrid.evaluation.scores import win_and_tie
from xlstm_hybrid.pipeline import Run, parse_overrides, settings, stages
from xlstm_hybrid.pipeline.run import CHECKS
from xlstm_hybrid.pipeline.runner import Runner, Stage, checkpoint_fingerprint
from xlstm_hybrid.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TEACHER = str(RECIPES / "tiny_teacher/tiny-llama")
SCORES = {"examples": 6, "text_chunks": 2, "batch_size": 6}  # the smoke recipe's, without lm-eval and efficiency


def smoke_run(out, **changes):
    console = Console(file=open(out.parent / "console.txt", "a"), width=120)  # noqa: SIM115
    return Run(replace(load_recipe(RECIPES / "smoke.yaml"), **changes), out, console=console)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run; memory is measured in this process and the student's forms are not proven again, which other tests
    do.
    """
    out = tmp_path_factory.mktemp("smoke") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "apart", lambda function, *arguments: function(*arguments))
        patch.setattr(efficiency_checks, "verify", lambda student: [])
        return out, smoke_run(out).run()


def smoke(folder, **changes):
    """The smoke recipe with other sections, as a file."""
    content = yaml.safe_load((RECIPES / "smoke.yaml").read_text()) | {"teacher": TEACHER} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def numbers(folder):
    """A section `data` that streams a file of short texts."""
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n}+{n}={2 * n} and so on"}) + "\n" for n in range(60))
    )
    return {
        "sequence_length": 32,
        "sources": {"a": {"path": "a.jsonl", "text": "text", "streaming": True}},
        "held_out": 0.2,
        "shuffle_buffer": 8,
    }


def run(*arguments, fails=None):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if fails is not None:
        assert isinstance(result.exception, fails), result.output
        return str(result.exception)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result.output


# --- a run ---------------------------------------------------------------------------------------------------


def test_a_run_arrives_with_a_student_that_loads_and_generates(finished):
    out, _ = finished
    verify_files(out / "student")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "student"),
        AutoTokenizer.from_pretrained(out / "student"),
    )
    inputs = tokenizer(
        ["1+1=", "recall aB; cD; = a"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (
        2,
        inputs["input_ids"].shape[1] + 3,
    )


def test_every_stage_leaves_its_record(finished):
    out, results = finished
    found = [s["stage"] for s in read_provenance(out / "student")]
    assert found == [
        "convert",
        "calibrate",
        "align",
        "distill:symbols",
        "distill:memory",
        "merge",
        "evaluate",
        "compare",
        "efficiency",
    ]
    recorded = read_provenance(out / "student")[-3]["figures"]
    assert recorded["exact_match"] == results["students"]["student"]["exact_match"]
    assert str(out) not in (out / "student" / "provenance.json").read_text()
    assert not [p.name for p in out.rglob(".*")], "nothing hidden is left behind"


def test_the_report_shows_what_was_measured(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["students"]) == {
        "converted",
        "calibrated",
        "aligned",
        "expert symbols",
        "expert memory",
        "student",
    }
    for name, scores in results["students"].items():
        verdict = win_and_tie(scores["exact_match"], results["teacher_scores"]["exact_match"])
        assert results["win_and_tie"][name]["alpha_star"] == verdict.alpha_star
    assert len(results["gates"]) == 4 and all(0 < g < 1 for layer in results["gates"] for g in layer)
    report = (out / "report.md").read_text()
    assert "## Cost beside the teacher" in report and ("## Long context" in report) == (
        find_spec("lm_eval") is not None
    )
    pictures = {p.name for p in out.glob("*.png")}
    assert len(pictures) >= 5 and all(p in report for p in pictures)
    assert f"{results['teacher_scores']['exact_match']['recall']:.1%}".rstrip("%")[:4] in report


def test_a_second_run_keeps_every_stage_and_an_interrupted_one_is_made_again(finished):
    out, results = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors") if "student" not in p.parts}
    (out / "merged" / "model.safetensors").write_bytes(b"cut off")
    again = smoke_run(out).run()
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"merged"}
    assert again["students"] == results["students"]


# --- a student that does not generate what it is -----------------------------------------------------------------


@pytest.fixture
def unscored(finished, tmp_path):
    """A copy of the run up to its student: nothing has been verified or scored."""
    out = shutil.copytree(finished[0], tmp_path / "run")
    for folder in ("evaluation", "comparison", "student", "efficiency"):
        shutil.rmtree(out / folder)
    for file in ("stages/verify.json", "stages/efficiency.json", "results.json", "report.md"):
        (out / file).unlink()
    return out


def test_the_final_student_is_verified_once_and_before_anything_is_scored(unscored, monkeypatch):
    monkeypatch.setattr(Run, "evaluate", lambda *_: pytest.fail("scored before it was verified"))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "harness", lambda *_: 1 / 0)  # what scores first
        patched.setattr("xlstm_hybrid.pipeline.run.harness_installed", lambda: True)
        patched.setattr("xlstm_hybrid.pipeline.run.check_evaluation", lambda recipe: None)
        with pytest.raises(ZeroDivisionError):
            smoke_run(unscored).run()
    note = json.loads((unscored / "stages" / "verify.json").read_text())
    assert note["passed"] and {c["name"] for c in note["checks"]} == {
        "every tensor loaded",
        "configuration = trained",
        *CHECKS,
    }
    monkeypatch.setattr("xlstm_hybrid.pipeline.run.verify_checkpoint", lambda *_, **__: pytest.fail("verified again"))
    with pytest.raises(pytest.fail.Exception, match="scored before"):  # the note holds
        smoke_run(unscored, evaluate=SCORES).run()
    path = unscored / "stages" / "verify.json"
    path.write_text(
        json.dumps(note | {"spec": note["spec"] | {"settings": note["spec"]["settings"] | {"torch": "1.0"}}})
    )
    with pytest.raises(pytest.fail.Exception, match="verified again"):  # of another torch it is not
        smoke_run(unscored).run()


def test_a_forward_that_drops_the_cache_fails_the_run_before_anything_is_scored(unscored, rename_cache, monkeypatch):
    rename_cache(swallowed=True)
    monkeypatch.setattr(Run, "evaluate", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(Run, "harness", lambda *_: pytest.fail("scored"))
    for _ in range(2):  # what has failed is not kept
        with pytest.raises(
            EvaluationError, match=r"merged: no scores, because 7 of 11 checks failed: generate = argmax"
        ):
            smoke_run(unscored).run()
    assert not (unscored / "report.md").exists() and not (unscored / "student").exists()


@pytest.mark.parametrize("by", [pytest.param("lm-eval", marks=pytest.mark.slow), "itself"])
def test_scores_that_contradict_the_student_are_called_so_and_fail_the_run(
    by, finished, unscored, rename_cache, monkeypatch
):
    """The last alarm, on its own: nothing verifies the student. Its perplexities are those of a sound one."""
    if by == "lm-eval":
        pytest.importorskip("lm_eval")
    more = {} if by == "lm-eval" else {"evaluate": SCORES}
    rename_cache(swallowed=True)
    monkeypatch.setattr(Run, "verify", lambda *_: {"passed": True, "checks": []})
    said = r"converted, arithmetic: \d answers are its most likely tokens.*Then remove run/evaluation"
    for _ in range(1 if by == "lm-eval" else 2):  # results that are kept contradict it as well
        with pytest.raises(EvaluationError, match=said):
            smoke_run(unscored, **more).run()
    results, sound = json.loads((unscored / "results.json").read_text()), finished[1]
    assert "teacher" not in results["contradictions"] and "student" in results["contradictions"]
    for name, domains in results["contradictions"].items():
        given = {d: 6 * score for d, score in sound["students"][name]["exact_match"].items()}
        unseen = {d: round(count) - len(domains.get(d, ())) for d, count in given.items()}
        # each answer that a sound student gives, and no other; one may be ahead by no more than rounding explains
        assert min(unseen.values()) == 0 and sum(unseen.values()) <= 1, unseen
        assert results["students"][name]["perplexity"] == pytest.approx(sound["students"][name]["perplexity"])
    report = (unscored / "report.md").read_text()
    assert "## A contradiction, not a score" in report and "no score here tells of a model" in report
    assert "win_and_tie" not in results and "lossless" not in report
    assert not (unscored / "student").exists() and not (unscored / "comparison").exists()


def test_the_command_evaluate_fails_on_a_contradiction_after_it_has_written_the_scores(
    finished, rename_cache, tmp_path
):
    rename_cache(swallowed=True)
    arguments = ["evaluate", finished[0] / "converted", "--out", tmp_path / "r.json", "--recipe", smoke(tmp_path)]
    assert "converted, arithmetic: " in run(*arguments, fails=EvaluationError)
    assert json.loads((tmp_path / "r.json").read_text())["contradictions"]["arithmetic"]


def test_a_checkpoint_is_known_by_what_it_holds_and_not_by_how_long_it_took(tmp_path):
    def made(name, weight=b"w", seconds=1.0):
        (tmp_path / name).mkdir()
        for file, content in {
            "model.safetensors": weight,
            "provenance.json": str(seconds).encode(),
            "curve.png": str(seconds).encode(),
        }.items():
            (tmp_path / name / file).write_bytes(content)
        write_manifest(tmp_path / name)
        return checkpoint_fingerprint(tmp_path / name)

    assert made("a") == made("b", seconds=2.5) != made("c", weight=b"v")


def names_of(recipe, **changes):
    return [stage.name for stage in Run(replace(recipe, **changes)).stages()]


def test_a_run_is_a_list_of_stages_from_the_teacher_to_the_card():
    recipe = load_recipe(RECIPES / "smoke.yaml")
    trained = ["convert", "calibrate", "align", "distill:symbols", "distill:memory"]
    models = ["teacher", "converted", "calibrated", "aligned", "expert symbols", "expert memory", "student"]
    evaluated = [f"evaluate:{name}" for name in models]
    assert names_of(recipe, evaluate=None) == [*trained, "merge", "verify", "report", "card"]
    assert names_of(recipe, evaluate=SCORES) == [
        *trained,
        "merge",
        "verify",
        *evaluated,
        "contradictions",
        "report",
        "card",
    ]
    scored = SCORES | {"efficiency": {"rounds": 1}}
    assert names_of(recipe, evaluate=scored)[-4:] == ["contradictions", "efficiency", "report", "card"]
    if find_spec("lm_eval") is not None:
        after = names_of(recipe, evaluate=scored | {"harness": ["domains"]})[len(trained) + 1 :]
        assert after == [
            "verify",
            "harness:teacher",
            "harness:student",
            *evaluated,
            "contradictions",
            "compare",
            "efficiency",
            "report",
            "card",
        ]
    one = {"experts": {"all": {"code": 1.0}}, "merge": None, "on_policy": {"max_steps": 1}, "evaluate": SCORES}
    models = ["teacher", "converted", "calibrated", "aligned", "student"]
    evaluated = [f"evaluate:{name}" for name in models]
    assert names_of(recipe, **one) == [
        "convert",
        "calibrate",
        "align",
        "distill:all",
        "on-policy:all",
        "verify",
        *evaluated,
        "contradictions",
        "report",
        "card",
    ]
    taught = recipe.merge | {"method": "on_policy", "on_policy": {"max_steps": 1}}
    assert names_of(recipe, merge=taught, evaluate=None)[5:] == ["multi-teacher", "verify", "report", "card"]


def test_a_stage_is_made_again_where_its_inputs_or_settings_change_and_not_otherwise(tmp_path):
    """A folder is replaced with `redo` alone, a mere note without being asked; what a note promises is looked at."""
    (tmp_path / "from").mkdir()
    (tmp_path / "from/file").write_text("a")
    made = []

    def check(folder, note):
        if note["said"] == "wrong":
            raise EvaluationError("it says so")

    def make(redo=False, says="right", **settings):
        def build(folder, again, source):
            folder.mkdir(exist_ok=True)
            made.append((again, (source / "file").read_text()))
            return {"said": says}

        stages = [
            Stage("folder", (tmp_path / "from",), build, settings, "folder", "stages/folder.json", check),
            Stage(
                "note",
                (tmp_path / "from",),
                lambda source: made.append("note"),
                lambda: settings,
                note="stages/note.json",
            ),
        ]
        runner = Runner(tmp_path, redo=redo, console=Console(file=open(os.devnull, "w")))  # noqa: SIM115
        runner.make(*stages)
        return runner

    runner = make()
    assert made == [(False, "a"), "note"] and not runner.reused
    again = make()
    assert (
        made == [(False, "a"), "note"]
        and again.reused == runner.seconds
        and again.outcomes["folder"]["said"] == "right"
    )
    with pytest.raises(ConfigError, match="folder was made with other .*settings.step was None, is 1. Pass --redo"):
        make(step=1)
    (tmp_path / "from/file").write_text("ab")
    with pytest.raises(
        ConfigError, match="folder was made with other .*settings.step was None, is 1; parents was .*. Pass --redo"
    ):
        make(step=1)
    with pytest.raises(EvaluationError, match="it says so"):
        make(redo=True, says="wrong", step=1)
    made.clear()
    make(step=1)  # what was found wrong is made again; the note follows without being asked
    assert made == [(True, "ab"), "note"]


def test_changed_settings_are_refused_by_name(finished):
    out, _ = finished
    with pytest.raises(ConfigError, match="aligned was made with other .*settings.max_steps was 2, is 3. Pass --redo"):
        smoke_run(out, align={**load_recipe(RECIPES / "smoke.yaml").align, "max_steps": 3}).run()


def test_a_setting_that_no_trainer_has_is_refused_before_anything_runs(tmp_path):
    align = load_recipe(RECIPES / "smoke.yaml").align
    with pytest.raises(
        ConfigError, match=r"align: AlignmentConfig has no setting 'lerning_rate'; did you mean learning_rate"
    ):
        smoke_run(tmp_path / "run", align=align | {"lerning_rate": 1.0}).run()
    assert not (tmp_path / "run").exists()


def test_a_whole_recipe_is_not_run_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="launch its training stages"):
        smoke_run(tmp_path / "run")


# --- settings --------------------------------------------------------------------------------------------------


def configs():
    from xlstm_hybrid.training.alignment import AlignmentConfig
    from xlstm_hybrid.training.distillation import SparseKDConfig

    return AlignmentConfig, SparseKDConfig


def test_options_of_the_command_line_are_the_trainers_own_fields():
    align, distill = configs()
    found = parse_overrides(
        align, ["--learning_rate", "5e-3", "--max_steps=7", "--bf16", "false", "--sequences_per_step", "4"]
    )
    assert found == {"learning_rate": 5e-3, "max_steps": 7, "bf16": False, "sequences_per_step": 4}
    assert parse_overrides(distill, ["--top_k", "64"]) == {"top_k": 64} and parse_overrides(align, []) == {}
    for arguments, message in (
        (
            ["--lerning_rate", "1"],
            r"the command line: AlignmentConfig has no setting 'lerning_rate'; did you mean learning_rate",
        ),
        (["--max_steps", "many"], r"AlignmentConfig: argument --max_steps.*invalid int value: 'many'"),
        (["--top_k", "5"], r"AlignmentConfig has no setting 'top_k'"),
        (["7"], r"AlignmentConfig.* '7'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_overrides(align, arguments)


def test_the_accumulation_follows_from_the_rows_per_step_and_the_processes(monkeypatch):
    stage = {"sequences_per_step": 64, "per_device_train_batch_size": 2, "max_steps": 10}
    assert settings.batch_of(stage, "align") == (2, 32) and settings.row_count(stage, "align") == 640
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert settings.batch_of(stage, "align") == (2, 4) and settings.row_count(stage, "align") == 640
    with pytest.raises(ConfigError, match="sequences_per_step=12 is no multiple of 2 rows .* x 8 processes"):
        settings.batch_of(stage | {"sequences_per_step": 12}, "align")
    with pytest.raises(ConfigError, match="give one of them"):
        settings.batch_of(stage | {"gradient_accumulation_steps": 2}, "align")


def test_a_trainers_config_gets_numbers_for_text_and_refuses_by_name(tmp_path):
    align, distill = configs()
    made = settings.trainer_config(
        align, {"learning_rate": "1e-3", "max_steps": 4, "sequences_per_step": 6, "bf16": False}, "align", tmp_path, 5
    )
    assert (made.learning_rate, made.gradient_accumulation_steps, made.seed, made.output_dir) == (
        1e-3,
        6,
        5,
        str(tmp_path),
    )
    for wrong, message in (
        ({"learning_rate": "fast"}, r"align.learning_rate='fast': expected a number of type float"),
        ({"lr_scheduler_type": "steep"}, r"align: AlignmentConfig refuses its settings \(.*steep"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.trainer_config(align, {"max_steps": 1, "bf16": False} | wrong, "align", tmp_path, 0)


# --- commands ---------------------------------------------------------------------------------------------------


def test_the_command_line_reports_named_errors_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xlstm-hybrid", "convert", str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (
        stop.value.code == 2
        and len(capsys.readouterr().err.strip().splitlines()) == 1
        and not (tmp_path / "out").exists()
    )


def test_each_stage_is_a_command_and_takes_its_trainers_options(tmp_path):
    recipe = ["--recipe", smoke(tmp_path)]
    c, a, e, m = (tmp_path / name for name in "caem")
    run("convert", TEACHER, c, "--sliding-window", "16", "--dtype", "float32")
    run("align", c, a, *recipe, "--learning_rate", "3e-3", "--max_steps", "1")
    recorded = read_provenance(a)[-1]
    assert (
        recorded["config"]["learning_rate"] == 3e-3
        and recorded["config"]["max_steps"] == 1
        and recorded["data"]["sequence_length"] == 96
    )
    assert len([x for x in json.loads((a / "training_log.json").read_text()) if "loss" in x]) == 1
    run("distill", a, TEACHER, e, *recipe, "--max_steps", "1", "--expert", "symbols", "--top_k=16")
    assert read_provenance(e)[-1]["config"]["top_k"] == 16 and read_provenance(e)[-1]["data"] == {
        "arithmetic": 0.5,
        "code": 0.5,
    }
    run("merge", m, e, e)
    run("evaluate", m, "--out", tmp_path / "r.json", *recipe)
    run("card", m)
    assert set(json.loads((tmp_path / "r.json").read_text())["exact_match"]) == {
        "arithmetic",
        "recall",
        "code",
        "strings",
    }
    assert (m / "README.md").is_file()
    assert "name one with --expert" in run("distill", a, TEACHER, tmp_path / "x", *recipe, fails=ConfigError)
    assert "come behind the positional arguments" in run("align", "--max_steps", "1", a, *recipe, fails=ConfigError)
    assert "no section on_policy" in run(
        "on-policy", a, TEACHER, tmp_path / "x", *recipe, "--expert", "symbols", fails=ConfigError
    )


def test_rows_that_are_prepared_are_those_that_the_stage_reads(tmp_path):
    from datasets import load_from_disk

    recipe, tokenizer = smoke(tmp_path), AutoTokenizer.from_pretrained(TEACHER)
    assert "4 rows of 96 tokens" in run("prepare", TEACHER, tmp_path / "rows", "--recipe", recipe, "--expert", "memory")
    assert list(load_from_disk(tmp_path / "rows")) == packed_rows(load_recipe(recipe), tokenizer, 4, "memory")
    assert list(load_from_disk(tmp_path / "rows")) != packed_rows(load_recipe(recipe), tokenizer, 4)
    recipe = smoke(tmp_path, data=numbers(tmp_path))
    assert "3 rows of 32 tokens" in run("prepare", TEACHER, tmp_path / "streamed", "--recipe", recipe, "--count", "3")
    assert list(load_from_disk(tmp_path / "streamed")) == packed_rows(load_recipe(recipe), tokenizer, 3)


@pytest.fixture(scope="module")
def converted(finished):
    return finished[0] / "converted"


def test_an_interrupted_stage_goes_on_from_its_last_checkpoint_with_the_rows_that_come_next(
    tmp_path, converted, monkeypatch
):
    from xlstm_hybrid.training.alignment import AlignmentTrainer

    base = load_recipe(smoke(tmp_path, data=numbers(tmp_path)))
    recipe = replace(base, align=base.align | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    straight, step, taken = pipeline.align(converted, tmp_path / "straight", recipe), AlignmentTrainer.training_step, []

    def stopping(*args, **kwargs):
        taken.append(len(taken))
        if len(taken) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        pipeline.align(converted, tmp_path / "stopped", recipe)
    assert not (tmp_path / "stopped").exists() and (tmp_path / ".run-stopped" / "checkpoint-1").is_dir()
    assert pipeline.align(converted, tmp_path / "stopped", recipe) == straight
    assert (
        len(taken) == 3 and not (tmp_path / ".run-stopped").exists()
    )  # the second step was taken again, the first one was not
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_last_write_that_fails_keeps_the_training_and_the_same_command_finishes_from_there(
    tmp_path, converted, monkeypatch
):
    from xlstm_hybrid.training.alignment import AlignmentTrainer

    base = load_recipe(smoke(tmp_path, data=numbers(tmp_path)))
    recipe = replace(base, align=base.align | {"max_steps": 2})
    straight = pipeline.align(converted, tmp_path / "straight", recipe)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["straight"]

    def full(folder):
        if folder.name.startswith(".tmp-late"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        artifacts.write_manifest(folder)

    monkeypatch.setattr(stages, "write_manifest", full)
    message = (
        rf"could not write late \(No space left on device\): .* bytes needed, [\d,]+ free in {tmp_path}: .*; the "
        "training is finished and kept in .run-late: make room .* it goes on from step 2 of 2"
    )
    with pytest.raises(CheckpointWriteError, match=message):
        pipeline.align(converted, tmp_path / "late", recipe)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob(".run-*/*") if "rows" not in p.name)
    assert left == [".run-late/checkpoint-2"] and not list(tmp_path.glob(".tmp-*"))
    verify_files(tmp_path / ".run-late" / "checkpoint-2")
    monkeypatch.undo()
    monkeypatch.setattr(AlignmentTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
    again = pipeline.align(converted, tmp_path / "late", recipe)
    assert [layer["after"] for layer in again["relative_error"]] == [
        layer["after"] for layer in straight["relative_error"]
    ]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "late"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["late", "straight"]


def test_room_for_a_student_is_reserved_while_it_is_trained_and_its_lack_is_found_before(
    tmp_path, converted, monkeypatch
):
    from xlstm_hybrid.training.alignment import AlignmentTrainer

    base = load_recipe(smoke(tmp_path, data=numbers(tmp_path)))
    recipe = replace(base, align=base.align | {"max_steps": 1})
    step, write, seen = AlignmentTrainer.training_step, artifacts.write_manifest, {}

    def reserved():
        return [p.stat().st_blocks * 512 for p in tmp_path.glob(".tmp-*/reserved")]

    def watched(*args, **kwargs):
        seen["training"] = reserved()
        return step(*args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", watched)
    monkeypatch.setattr(stages, "write_manifest", lambda folder: (seen.update(writing=reserved()), write(folder)))
    pipeline.align(converted, tmp_path / "aligned", recipe)
    student = sum(p.stat().st_size for p in (tmp_path / "aligned").iterdir())
    assert len(seen["training"]) == 1 and seen["training"][0] >= student and seen["writing"] == []
    weights = (tmp_path / "aligned" / "model.safetensors").stat().st_size
    monkeypatch.setattr(AlignmentTrainer, "training_step", lambda *_, **__: pytest.fail("trained"))
    for free in (weights + 4000, 4000):  # before it trains, and before it loads
        usage = shutil._ntuple_diskusage(10**9, 10**9, free)
        monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path, usage=usage: usage)
        message = rf"second needs 0.0\d GB, 0.0\d GB are free: .* bytes are missing in {tmp_path}"
        with pytest.raises(CheckpointWriteError, match=message):
            pipeline.align(converted, tmp_path / "second", recipe)
        assert not list(tmp_path.glob(".tmp-*"))
        monkeypatch.setattr(stages, "load", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.slow
def test_a_student_learns_from_its_own_samples_as_a_stage_of_a_run(tmp_path):
    base = load_recipe(RECIPES / "smoke.yaml")
    section = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "bf16": False,
        "logging_steps": 1,
        "learning_rate": 1e-5,
    }
    path = smoke(tmp_path, on_policy=section, experts={"memory": base.experts["memory"]}, merge=None, evaluate=SCORES)
    out = tmp_path / "run"
    Run(load_recipe(path), out, console=Console(file=open(tmp_path / "console.txt", "w"))).run()  # noqa: SIM115
    assert [s["stage"] for s in read_provenance(out / "student")] == [
        "convert",
        "calibrate",
        "align",
        "distill:memory",
        "on-policy:memory",
        "evaluate",
    ]
    one, two = (load_file(out / name / "memory" / "model.safetensors") for name in ("experts", "on_policy"))
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_a_store_of_the_teachers_targets_stands_in_for_the_teacher(tmp_path, converted):
    recipe = smoke(tmp_path)
    run("prepare", TEACHER, tmp_path / "rows", "--recipe", recipe, "--expert", "memory")
    run("cache-teacher", TEACHER, tmp_path / "rows", tmp_path / "store", "--top-k", "32")
    shared = ["--recipe", recipe, "--expert", "memory"]
    run("distill", converted, TEACHER, tmp_path / "online", *shared)
    run("distill", converted, TEACHER, tmp_path / "stored", *shared, "--teacher", tmp_path / "store")
    logs = [json.loads((tmp_path / name / "training_log.json").read_text())[0] for name in ("online", "stored")]
    assert logs[1]["kl"] == pytest.approx(logs[0]["kl"], rel=5e-3) and logs[1]["ce"] == pytest.approx(
        logs[0]["ce"], rel=1e-5
    )
    assert str(tmp_path) not in (tmp_path / "stored" / "provenance.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "streaming"])
def test_two_processes_under_accelerate_make_the_student_that_one_makes(tmp_path, converted, kind):
    recipe = smoke(tmp_path, **({"data": numbers(tmp_path)} if kind == "streaming" else {}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    options = [
        str(converted),
        "OUT",
        "--recipe",
        str(recipe),
        "--sequences_per_step",
        "4",
        "--per_device_train_batch_size",
        "1",
    ]
    launch = [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    for name, command in (("one", ["xlstm_hybrid"]), ("two", [*launch, "-m", "xlstm_hybrid"])):
        arguments = ["align", *(str(tmp_path / name) if o == "OUT" else o for o in options)]
        result = subprocess.run(
            [sys.executable, "-m", *command, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        verify_files(tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    moved = [key for key in one if not torch.equal(one[key], load_file(converted / "model.safetensors")[key])]
    assert moved and all(".mlstm." in key for key in moved)
    for key in moved:
        torch.testing.assert_close(two[key], one[key], atol=2e-4, rtol=2e-3)
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_run_is_gone_on_with_in_a_locale_that_is_not_utf_8(tmp_path):
    code = """
import locale, pathlib, sys
from xlstm_hybrid.pipeline.runner import Runner, Stage
made = lambda *_: (pathlib.Path(sys.argv[1], "f").mkdir(exist_ok=True), print("made"), {"x": 1})[-1]
stage = Stage("s", (), made, settings={"path": "gespr\\xe4che.jsonl", "text": "\\u0442"}, folder="f", note="s.json")
for _ in range(2):
    Runner(sys.argv[1]).make(stage)
print(locale.getpreferredencoding())
"""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split().count("made") == 1 and done.stdout.split()[-1] != "UTF-8"
