"""Every command looks at where it will write before it loads a model; interrupted, it says what was finished and how to
go on.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.conversion import source
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError

pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]
TEACHER, SMOKE = ROOT / "recipes/tiny_teacher/tiny-llama", ROOT / "recipes/smoke.yaml"
NAMES = [name for commands in cli.COMMANDS.values() for name in commands]
SHORT = {"max_steps": 3, "sequences_per_step": 2, "logging_steps": 1, "bf16": False}


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# --- where it will write -------------------------------------------------------------------------------------------

T, R = str(TEACHER), ["--recipe", str(SMOKE)]
UNWRITABLE = {  # command: its arguments, OUT where it writes
    "run": [[SMOKE, "--out", "OUT"]],
    "convert": [[T, "OUT"]],
    "prepare": [[T, "OUT", *R]],
    "cache-teacher": [[T, SMOKE, "OUT"], [T, SMOKE, "OUT", "--processes", "2"]],
    "calibrate": [[T, "OUT", *R]],
    "align": [[T, "OUT", *R]],
    "distill": [[T, T, "OUT", *R, "--expert", "memory"]],
    "on-policy": [[T, T, "OUT", *R, "--expert", "memory"]],
    "experts": [[SMOKE, "--out", "OUT"]],
    "merge": [["OUT", T, T], ["OUT", T, T, "--search", T]],
    "merge-statistics": [[T, SMOKE, "--expert", "memory", "--out", "OUT"]],
    "multi-teacher": [[T, "OUT", *R, "--expert", f"memory={T}"]],
    "distil-xlstm": [[ROOT / "recipes/distil_tiny.yaml", "--out", "OUT"]],
    "verify": [[T, "--json", "OUT"]],
    "evaluate": [[T, *R, "--out", "OUT"]],
    "harness": [[T, "--tasks", "needle_1k", "--out", "OUT"]],
    "agreement": [[T, T, "--text", SMOKE, "--json", "OUT"]],
    "benchmarks": [["OUT"]],
    "compare": [["a", "b", "--out", "OUT"], ["a", "b", "--record", "b=OUT"]],
    "efficiency": [[T, T, "--out", "OUT"], [T, "OUT", "--out", "new", "--record"]],
    "export": [[T, "OUT"]],
    "card": [["OUT"]],
    "mergekit-architecture": [[T, "OUT"]],
    "doctor": [["--json", "OUT"]],
    "plan": [[T, "--json", "OUT"]],
    "plan-layers": [
        [T, "--budget", "1MB", "--length", "512", "--measure", option, "OUT"]
        for option in ("--out", "--json", "--save-ranking")
    ],
}
WRITES_NOTHING = {"serve", "push"}


def test_every_command_is_said_to_write_or_not():
    assert {*UNWRITABLE, *WRITES_NOTHING} == set(NAMES) and not WRITES_NOTHING & set(UNWRITABLE)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model, or reading a tensor, is an error of its own."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    auto = transformers.models.auto.auto_factory._BaseAutoModelClass
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setattr(auto, "from_pretrained", loaded)
    monkeypatch.setattr(source, "safe_open", loaded)


CALLS = [(name, arguments) for name, calls in UNWRITABLE.items() for arguments in calls]


@pytest.mark.parametrize("name, arguments", CALLS, ids=[f"{n}-{' '.join(map(str, a))[-40:]}" for n, a in CALLS])
def test_an_output_below_a_file_is_refused_before_a_model_is_loaded(name, arguments, tmp_path, no_model, monkeypatch):
    """A path that nobody can write to, root neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    result = call(name, *[str(a).replace("OUT", str(tmp_path / "file" / "out")) for a in arguments])
    assert isinstance(result.exception, CheckpointWriteError), (result.exception, result.output)
    assert str(tmp_path / "file" / "out") in str(result.exception)
    assert "is a file, expected a directory; choose another place" in str(result.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["convert", "prepare", "align", "distill", "on-policy", "merge", "multi-teacher", "export"]
)
def test_what_is_there_is_refused_before_a_model_is_loaded_and_not_after_the_work(name, tmp_path, no_model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    result = call(name, *[tmp_path / "out" if a == "OUT" else a for a in UNWRITABLE[name][0]])
    assert isinstance(result.exception, CheckpointError)
    assert "out exists already and is not empty: choose another directory, or allow overwriting" in str(
        result.exception
    )
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["align", "distill", "on-policy", "multi-teacher", "merge", "convert", "prepare", "export"]
)
def test_no_command_replaces_what_it_reads(name, tmp_path, no_model):
    copy = shutil.copytree(TEACHER, tmp_path / "runs" / "model")
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    for out in (copy, tmp_path / "runs"):
        arguments = [out if a == "OUT" else str(a).replace(T, str(copy)) for a in UNWRITABLE[name][0]]
        result = call(name, *arguments, "--overwrite")
        assert isinstance(result.exception, CheckpointWriteError), (result.exception, result.output)
        assert "is or holds model, which is read; choose another place" in str(result.exception)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_results_go_to_a_device_as_they_are(tmp_path):
    """`/dev/stdout` is not replaced by a file."""
    result = call("plan-layers", T, "--budget", "1MB", "--length", "512", "--json", "/dev/null")
    assert result.exit_code == 0, result.output
    assert not Path("/dev/null").is_file()


# --- interrupted ---------------------------------------------------------------------------------------------------


def interrupting(after=0):
    """A function that is interrupted when it is called for the n-th time, and calls the original before."""
    calls = []

    def wrap(original):
        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return interrupted

    return wrap


def patched(monkeypatch, owner, name, after=0):
    monkeypatch.setattr(owner, name, interrupting(after)(getattr(owner, name)))


def said(result):
    """What an interrupted command says: exit code 130, one line, no traceback."""
    assert result.exit_code == 130, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("interrupted; ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "converted"
    convert(TEACHER, path, sliding_window=16)
    return path


@pytest.fixture
def recipe(tmp_path):
    short = {"teacher": T, "align": SHORT, "distill": SHORT | {"top_k": 16}, "out": str(tmp_path / "run")}
    content = yaml.safe_load(SMOKE.read_text()) | short
    content["evaluate"] = {"examples": 2, "text_chunks": 1, "batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "recipe.yaml"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_run_names_its_finished_stages(recipe, tmp_path, monkeypatch):
    from xlstm_hybrid.pipeline import run

    patched(monkeypatch, run, "distill")
    again = "Start the same command again to go on"
    assert (
        said(call("run", recipe))
        == f"interrupted; finished and kept: convert, calibrate, align in {tmp_path / 'run'}. {again}"
    )
    assert not list(tmp_path.rglob(".*"))
    monkeypatch.undo()
    patched(monkeypatch, run, "multi_teacher")
    patched(monkeypatch, run, "merge_experts")
    text = said(call("experts", recipe, "--merge"))
    assert f"convert, calibrate, align, distill:symbols, distill:memory in {tmp_path / 'run'}. {again}" in text


@pytest.mark.parametrize("command", ["align", "distill"])
def test_training_names_its_newest_checkpoint_and_goes_on_from_it(command, student, recipe, tmp_path, monkeypatch):
    from xlstm_hybrid.training.alignment import AlignmentTrainer
    from xlstm_hybrid.training.distillation import SparseKDTrainer

    trainer = {"align": AlignmentTrainer, "distill": SparseKDTrainer}[command]
    teacher, expert = ([], []) if command == "align" else ([TEACHER], ["--expert", "memory"])
    arguments = [command, student, *teacher, tmp_path / "out", "--recipe", recipe, *expert]
    with monkeypatch.context() as patch:
        patched(patch, trainer, "training_step", after=2 if command == "align" else 4)
        text = said(call(*arguments))
    assert text.startswith("interrupted; nothing was finished yet") and "--save_strategy steps --save_steps 100" in text
    assert not (tmp_path / "out").exists() and names(tmp_path) == ["recipe.yaml"]
    with monkeypatch.context() as patch:
        steps = []
        original = trainer.training_step
        patch.setattr(
            trainer,
            "training_step",
            lambda self, *a, **k: (
                steps.append(self.state.global_step)
                or (original(self, *a, **k) if self.state.global_step < 2 else interrupting()(None)())
            ),
        )
        text = said(call(*arguments, "--save_strategy", "steps", "--save_steps", "1"))
    assert (
        text
        == f"interrupted; finished and kept: checkpoint-2 in {tmp_path / '.run-out'}. Start the same command again to go on"
    )
    done = call(*arguments, "--save_strategy", "steps", "--save_steps", "1")
    assert done.exit_code == 0, done.exception
    log = json.loads((tmp_path / "out/training_log.json").read_text())
    assert names(tmp_path) == ["out", "recipe.yaml"] and len([e for e in log if "loss" in e]) == 3


def test_a_run_that_sigterm_stopped_says_how_to_go_on(tmp_path, monkeypatch):
    from xlstm_hybrid.pipeline import Run
    from xlstm_hybrid.training.resume import Interrupted

    def stopped(self):
        raise Interrupted("stopped by SIGTERM after step 2: start the same command again to go on")

    monkeypatch.setattr(Run, "run", stopped)
    result = call("run", SMOKE, "--out", tmp_path / "out")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "stopped by SIGTERM after step 2: start the same command again to go on"


def test_cache_teacher_counts_its_shards_and_goes_on(tmp_path, monkeypatch):
    from xlstm_hybrid.pipeline import targets

    rows = [{"input_ids": [(5 * n + 3 * t) % 500 for t in range(40)]} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "cache-teacher",
        TEACHER,
        tmp_path / "rows.jsonl",
        tmp_path / "store",
        "--shard-tokens",
        80,
        "--top-k",
        4,
    ]
    with monkeypatch.context() as patch:
        patched(patch, targets.TeacherTargets, "__call__", after=2)
        text = said(call(*arguments))
    assert text.startswith(f"interrupted; finished and kept: 2 of 3 shards in {tmp_path / 'store'}. Start the same")
    assert not list((tmp_path / "store").glob(".*"))
    assert call(*arguments).exit_code == 0


def test_evaluate_has_nothing_to_keep_and_leaves_nothing(student, recipe, tmp_path, monkeypatch):
    from xlstm_hybrid import pipeline

    patched(monkeypatch, pipeline, "evaluate")
    text = said(call("evaluate", student, "--recipe", recipe, "--out", tmp_path / "scores.json"))
    assert text == "interrupted; nothing was finished yet, nothing half-written is left. Start the same command again"
    assert names(tmp_path) == ["recipe.yaml"]


def test_the_other_processes_of_a_launch_say_nothing(student, recipe, tmp_path, monkeypatch):
    from xlstm_hybrid import pipeline

    patched(monkeypatch, pipeline, "align")
    monkeypatch.setenv("RANK", "1")
    result = call("align", student, tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 130 and "interrupted" not in result.stderr


@pytest.mark.parametrize(
    "files, found",
    [
        ({"out/needle_1k/harness.json": {}, "out/recall_1k/harness.json": {}}, "the tasks needle_1k, recall_1k in"),
        ({"out/efficiency.json": {"pairs": [{}, {}]}}, "2 measured pairs in"),
        ({"out.search.json": {"points": [1, 2, 3]}}, "3 candidates of the search in"),
        ({"out.streaming/streaming.json": {"groups": [{}, {}]}}, "2 groups of layers in"),
        (
            {"out/stages/convert.json": {"spec": {}, "seconds": 1}, "out/evaluation/teacher.json": {"spec": {}}},
            "convert, evaluate:teacher in",
        ),
        ({"out/stages/convert.json": 7}, None),
        ({}, None),
    ],
)
def test_what_the_next_call_need_not_do_again_is_found_where_it_stands(tmp_path, files, found):
    from xlstm_hybrid.pipeline.interrupted import kept_at

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    kept = list(kept_at(tmp_path / "out"))
    assert len(kept) == (found is not None) and (not kept or kept[0].startswith(f"{found} {tmp_path}/out"))


FORGETFUL = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
from xlstm_hybrid import cli
from xlstm_hybrid.commands import card

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # Python raises the interruption here, and drops it

def work(*arguments, **options):
    Held()
    for _ in range(400):
        time.sleep(0.01)
    print("it went on")

card.write_card = card.check_output = card.require_intact = work
cli.main()
"""


def test_an_interruption_that_python_drops_while_it_deletes_something_comes_again(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, "card", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'kernels'}"},
    )
    assert done.returncode == 130 and "it went on" not in done.stdout, done.stderr[-2000:]
