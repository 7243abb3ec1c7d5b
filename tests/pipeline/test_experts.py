"""Experts of one start, in one launch or in several; they are refused when their start is another, and waited for when
another launch makes them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint import locks
from xlstm_hybrid.checkpoint.files import MANIFEST, digest, owner, read_provenance, staged
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.pipeline import Run, experts, make_experts, run
from xlstm_hybrid.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "recipes/tiny_teacher/tiny-llama"
SHORT = {"max_steps": 1, "sequences_per_step": 2, "logging_steps": 1, "bf16": False}
ON_POLICY = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "bf16": False,
    "logging_steps": 1,
    "num_completions_to_print": 0,
}


def recipe_file(folder, **changes):
    """The smoke recipe with one step per stage and no evaluation."""
    content = yaml.safe_load((ROOT / "recipes/smoke.yaml").read_text()) | {
        "teacher": str(TEACHER),
        "align": SHORT,
        "distill": SHORT | {"top_k": 16},
    }
    content = {k: v for k, v in (content | {"evaluate": None} | changes).items() if v is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


def console(out):
    return Console(file=open(out.parent / "console.txt", "a"), width=200)  # noqa: SIM115


def made(recipe, out, *only, **options):
    return make_experts(recipe, out, only, console=console(out), **options)


def said(out):
    return " ".join((out.parent / "console.txt").read_text().split())


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def times(out):
    return {p.parent.name: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe(recipe_file(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def both(recipe, tmp_path_factory):
    """A run directory with both experts, made in two launches."""
    out = tmp_path_factory.mktemp("experts") / "run"
    made(recipe, out, "memory")
    return out, made(recipe, out, "symbols")


# --- one start -------------------------------------------------------------------------------------------------


def test_experts_of_several_launches_have_one_start_and_their_own_record(recipe, both):
    out, found = both
    assert list(found) == ["symbols", "memory"] and found["memory"] == out / "experts" / "memory"
    for name, directory in found.items():
        record = read_provenance(directory)[-1]
        assert [s["stage"] for s in read_provenance(directory)] == ["convert", "calibrate", "align", f"distill:{name}"]
        assert record["parent_manifest"] == digest(out / "aligned" / MANIFEST) and record["parent"] == "aligned"
        assert record["data"] == recipe.experts[name] and record["config"] == recipe.distill | {"seed": recipe.seed}
    assert any(not torch.equal(x, weights(found["memory"])[key]) for key, x in weights(found["symbols"]).items())


def test_one_launch_makes_the_experts_that_several_made(recipe, both, tmp_path):
    start = both[0] / "aligned"
    found = made(recipe, tmp_path / "run", start=start)
    assert not (tmp_path / "run" / "aligned").exists()  # it was given one
    for name, directory in found.items():
        one, several = weights(directory), weights(both[1][name])
        assert all(torch.equal(one[key], several[key]) for key in one | several)
    again = f"xlstm-hybrid experts {recipe.path} --out {tmp_path}/run --start {start} --merge"
    assert f"next, merge them as the recipe says: {again}" in said(tmp_path / "run")
    made(recipe, tmp_path / "run", start=start, merge=True)
    assert f"next, evaluate the student: xlstm-hybrid evaluate {tmp_path}/run/merged --recipe {recipe.path}" in said(
        tmp_path / "run"
    )
    assert [s["stage"] for s in read_provenance(tmp_path / "run" / "merged")][-3:] == [
        "distill:symbols",
        "distill:memory",
        "merge",
    ]


def test_the_run_goes_on_from_the_experts_and_a_second_call_keeps_them(recipe, both):
    out, found = both
    before = times(out)
    assert made(recipe, out) == found and times(out) == before
    Run(recipe, out, console=console(out)).run()
    after = times(out)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"merged", "student"}


def test_the_table_names_every_expert_and_the_next_step_follows_from_it(recipe, both, tmp_path):
    out, _ = both
    for name in ("symbols", "memory"):
        record = read_provenance(out / "experts" / name)[-1]
        assert f"{record['figures']['loss']:.4g}" in said(out) and f"experts/{name}" in said(out)
    assert digest(out / "aligned" / MANIFEST)[:8] in said(out) and "not made" in said(out)
    assert f"next, the other experts: xlstm-hybrid experts {recipe.path} --out {out} --only symbols" in said(out)
    assert f"next, merge them, evaluate and report: xlstm-hybrid run {recipe.path} --out {out}" in said(out)


def test_an_expert_of_another_start_is_refused_until_it_is_made_again(recipe, both, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(both[0], out)
    other = made(replace(recipe, seed=5), tmp_path / "other", "memory")["memory"].parents[1] / "aligned"
    before = times(out)
    with pytest.raises(
        ConfigError, match=r"symbols in run: made from another start than aligned \(manifest .*pass --redo"
    ):
        made(recipe, out, "memory", start=other)
    with pytest.raises(ConfigError, match="symbols was made with other .*parents was .*, is .* Pass --redo"):
        made(recipe, out, start=other)  # both are asked for
    assert times(out) == before
    found = made(recipe, out, "memory", start=other, redo=True)
    assert experts.from_another_start(Run(recipe, out), digest(other / MANIFEST), found) == [
        "symbols"
    ] and "another" in said(out)
    made(recipe, out, "symbols", start=other, redo=True)
    assert {experts.distilled(d)["parent_manifest"] for d in found.values()} == {digest(other / MANIFEST)}


def test_a_start_that_changes_under_the_experts_is_noticed(recipe, both, tmp_path, monkeypatch):
    start, distill = shutil.copytree(both[0] / "aligned", tmp_path / "start"), run.distill

    def disturbed(*args, **kwargs):
        distill(*args, **kwargs)
        shutil.copy(both[0] / "converted" / MANIFEST, start / MANIFEST)

    monkeypatch.setattr(run, "distill", disturbed)
    with pytest.raises(
        ConfigError, match="start has changed while experts were made from it: make memory again with --redo"
    ):
        made(recipe, tmp_path / "run", "memory", start=start)


def test_a_start_without_a_manifest_a_damaged_one_and_an_unknown_expert_are_refused(recipe, both, tmp_path):
    start = shutil.copytree(both[0] / "aligned", tmp_path / "start")
    with open(start / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\1")
    with pytest.raises(CheckpointError, match="model.safetensors has SHA-256"):
        made(recipe, tmp_path / "run", start=start)
    (start / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        made(recipe, tmp_path / "run", start=start)
    with pytest.raises(ConfigError, match=r"expert 'maths': recipe.yaml has \['memory', 'symbols'\]"):
        made(recipe, tmp_path / "run", "maths", start=start)
    assert not (tmp_path / "run").exists()


# --- launches at once, and interrupted ones --------------------------------------------------------------------


def test_a_launch_waits_for_another_that_makes_the_same_stage_and_keeps_its_result(recipe, both, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for part in ("converted", "calibrated", "aligned"):
        shutil.copytree(both[0] / part, out / part)
    (out / "stages").mkdir()
    for note in ("convert", "calibrate", "align"):
        shutil.copy(both[0] / "stages" / f"{note}.json", out / "stages")
    lock, waits = out / "stages" / ".claim-distill-memory", []
    lock.write_text(owner(os.getppid()))  # a process that lives

    def another_launch_finishes(seconds):
        waits.append(seconds)
        shutil.copytree(both[0] / "experts" / "memory", out / "experts" / "memory")
        shutil.copy(both[0] / "stages" / "distill-memory.json", out / "stages")
        lock.unlink()

    monkeypatch.setattr(locks.time, "sleep", another_launch_finishes)
    made(recipe, out, "memory")
    assert (
        len(waits) == 1
        and times(out)["memory"] > 0
        and digest(out / "experts/memory" / MANIFEST) == digest(both[0] / "experts/memory" / MANIFEST)
    )
    text = said(out)
    assert f"distill:memory: waiting for another launch: process {os.getppid()} of this machine, since 20" in text
    assert "24 h at most; if that process is not at work, end it, or delete stages/.claim-distill-memory" in text
    assert "distill:memory: kept" in text
    assert not list(out.rglob(".*"))


def test_signs_of_life_keep_a_lock(tmp_path, monkeypatch):
    path, beats = tmp_path / ".claim", []
    with locks.beating(
        lambda: beats.append(1) or (len(beats) == 1 and path.stat()), seconds=0.01
    ):  # the first finds no file: it goes on
        while len(beats) < 3:
            pass
    count = len(beats)
    assert count >= 3 and not path.exists()
    with locks.locked(path):
        assert json.loads(path.read_text())["owner"] == owner(os.getpid())
    assert not path.exists() and len(beats) == count


def test_a_directory_that_came_meanwhile_is_not_replaced_unasked(tmp_path):
    for overwrite in (False, True):
        path = tmp_path / f"{overwrite}"

        def write(content, path=path, overwrite=overwrite):
            with staged(path, overwrite=overwrite) as folder:
                (folder / "file").write_text(content)
                if content == "ours":
                    write("theirs")

        if overwrite:
            write("ours")
        else:
            with pytest.raises(
                CheckpointError, match="False was written by another process in the meantime, and is kept"
            ):
                write("ours")
        assert (path / "file").read_text() == ("ours" if overwrite else "theirs") and len(
            list(tmp_path.glob(".*"))
        ) == 0


def test_an_interrupted_launch_keeps_the_experts_that_are_done(recipe, both, tmp_path, monkeypatch):
    out, distill = tmp_path / "run", run.distill

    def stopping(student, teacher, directory, recipe, name, overwrite):
        if name == "memory":
            raise KeyboardInterrupt
        return distill(student, teacher, directory, recipe, name, overwrite)

    monkeypatch.setattr(run, "distill", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(recipe, out, start=both[0] / "aligned")
    before = times(out)
    monkeypatch.setattr(run, "distill", distill)
    found = made(recipe, out, start=both[0] / "aligned")
    assert (
        list(before) == ["symbols"]
        and times(out)["symbols"] == before["symbols"]
        and list(found) == ["symbols", "memory"]
    )
    assert not list(out.rglob(".*"))


def test_each_expert_may_learn_from_its_own_samples_before_it_is_merged(recipe, both, tmp_path):
    out = tmp_path / "run"
    found = made(replace(recipe, on_policy=ON_POLICY), out, "memory", start=both[0] / "aligned")
    record = read_provenance(found["memory"])
    assert found == {"memory": out / "on_policy" / "memory"} and [s["stage"] for s in record[-2:]] == [
        "distill:memory",
        "on-policy:memory",
    ]
    assert record[-1]["parent_manifest"] == digest(out / "experts" / "memory" / MANIFEST)
    assert f"{record[-1]['figures']['divergence']:.4g}" in said(out) and "on_policy/memory" in said(out)


def test_the_command_says_what_it_does_not_know(tmp_path):
    path = recipe_file(tmp_path)
    result = CliRunner().invoke(cli.app, ["experts", str(path), "--out", str(tmp_path / "run"), "--only", "math"])
    assert isinstance(result.exception, ConfigError) and "expert 'math'" in str(result.exception)


@pytest.mark.slow
def test_two_launches_at_once_make_one_start_and_an_expert_each(tmp_path):
    path, out = recipe_file(tmp_path), tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xlstm_hybrid", "experts", str(path), "--out", str(out), "--only"]
    running = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True)
        for name in ("symbols", "memory")
    ]
    printed = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert {experts.distilled(out / "experts" / n)["parent_manifest"] for n in ("symbols", "memory")} == {
        digest(out / "aligned" / MANIFEST)
    }
    assert sum("waiting for another launch" in text for text in printed) >= 1 and not list(out.rglob(".*"))
    assert json.loads((out / "stages" / "align.json").read_text())["spec"]["seed"] == 1
