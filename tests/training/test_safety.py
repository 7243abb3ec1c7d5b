"""A run that is killed, stopped or fed with nonsense goes on from its newest good checkpoint as if nothing had
happened.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from test_alignment import collate, tokenizer
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.checkpoint import files as artifacts
from xlstm_hybrid.checkpoint.files import checkpoints_by_step, newest_verified, verify_files
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError, DataError
from xlstm_hybrid.training import checkpoints
from xlstm_hybrid.training import resume as safety
from xlstm_hybrid.training.resume import Interrupted, Resumable, reproduce

STEPS = 6


class Plain(Resumable, SFTTrainer):
    """TRL's own trainer, with dropout in the student: every kind of randomness is in it."""


def make(folder, rows=24, peft=None, trainer=Plain, **settings):
    ids = token_ids(rows, 12).tolist()
    shared = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "max_length": None,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_train_batch_size": 2,
        "seed": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "warmup_steps": 2,
        "remove_unused_columns": False,
    }
    return trainer(
        model=tiny_student(
            torch.float32,
            gain=1.0,
            attention_dropout=0.2,
            num_hidden_layers=2,
            layer_types=["hybrid_sliding", "full_attention"],
        ),
        args=SFTConfig(**(shared | settings)),
        train_dataset=Dataset.from_list(
            [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
        ),
        data_collator=collate,
        processing_class=tokenizer(),
        peft_config=peft,
    )


def trained(trainer):
    """Weights and optimiser after the run, in one dict."""
    state = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    tensors, settings = checkpoints.collect_optimizer(trainer, checkpoints.named_parameters(trainer))
    return state | tensors | {"settings": json.dumps(settings)}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, b[name]) if torch.is_tensor(x) else x == b[name] for name, x in a.items()
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """`(folder, result)` of a run that nothing interrupted, over two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, rows=16)
    trainer.train()
    return folder, trained(trainer)


def resumed(folder, **settings):
    trainer = make(folder, rows=16, **settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def in_child(function, *args, after=None):
    """Run `function` in a forked process; kill -9 it `after` seconds if it still runs. Returns its exit status."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    if after is not None:
        child.join(after)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert not child.is_alive()
    return child.exitcode


# --- checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_listed_verified_and_holds_no_pickle(whole_run):
    folder, _ = whole_run
    assert [path.name for path in checkpoints_by_step(folder)] == [f"checkpoint-{n}" for n in range(1, STEPS + 1)]
    newest = folder / f"checkpoint-{STEPS}"
    verify_files(newest, "full")
    names = {path.name for path in newest.iterdir()}
    assert {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.json",
        "resume.json",
        "trainer_state.json",
        "manifest.json",
    } <= names
    assert all(name.endswith((".json", ".safetensors", ".jinja")) for name in names)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    text = (newest / "resume.json").read_text()
    assert "hub_token" not in text and str(folder) not in text


@pytest.mark.parametrize("step", [1, 4, STEPS])  # inside the first epoch, at its end, and when nothing is left to do
def test_resuming_is_bitwise_equal_to_never_stopping(step, whole_run, tmp_path):
    shutil.copytree(whole_run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    trainer = resumed(tmp_path)
    assert trainer.guard.began == step and same(trained(trainer), whole_run[1])


def test_adapters_are_resumed_bit_by_bit(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
    runs = []
    for name in ("whole", "again"):
        torch.manual_seed(0)
        trainer = make(tmp_path / name, peft=lora, max_steps=3)
        if name == "again":
            shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / name / "checkpoint-1")
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter.zero_()
        trainer.train(resume_from_checkpoint=name == "again")
        runs.append(trained(trainer))
    assert same(*runs)
    assert {"adapter_model.safetensors", "trainable.safetensors"} <= {
        p.name for p in (tmp_path / "whole" / "checkpoint-3").iterdir()
    }


def test_the_newest_verified_checkpoint_is_taken_and_the_others_are_named(whole_run, tmp_path, caplog):
    for step in (2, 3, 4):
        shutil.copytree(whole_run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged(tmp_path / "checkpoint-4", "model.safetensors")
    (tmp_path / "checkpoint-3" / "rng.json").unlink()
    path, skipped = newest_verified(tmp_path)
    assert path.name == "checkpoint-2" and set(skipped) == {"checkpoint-3", "checkpoint-4"}
    trainer = resumed(tmp_path)
    assert trainer.guard.began == 2 and same(trained(trainer), whole_run[1])
    assert (
        "passed over: checkpoint-4: model.safetensors has SHA-256" in caplog.text
        and "rng.json is missing" in caplog.text
    )
    with pytest.raises(CheckpointError, match="SHA-256"):
        make(tmp_path).train(resume_from_checkpoint=str(damaged(tmp_path / "checkpoint-4")))


def damaged(checkpoint, name="optimizer.safetensors"):
    """Flip one bit of one file."""
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    return checkpoint


def test_without_a_good_checkpoint_a_run_starts_anew_or_says_why_not(whole_run, tmp_path):
    trainer = make(tmp_path, rows=16, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    damaged(tmp_path / "checkpoint-1")
    with pytest.raises(
        CheckpointError, match="none of 1 checkpoints is whole, the newest: checkpoint-1: optimizer.safetensors"
    ):
        resumed(tmp_path, max_steps=1)


def test_rotation_keeps_the_newest_by_step_and_never_the_last_verified_goes(tmp_path):
    trainer = make(tmp_path, max_steps=4, save_total_limit=2)
    trainer.train()
    assert [path.name for path in checkpoints_by_step(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    os.utime(tmp_path / "checkpoint-3")  # a copy may have any time
    damaged(tmp_path / "checkpoint-4")
    checkpoints.rotate(tmp_path / "checkpoint-4", 1)
    assert [path.name for path in checkpoints_by_step(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    checkpoints.rotate(tmp_path / "checkpoint-3", 1, best=str(tmp_path / "checkpoint-4"))
    assert [path.name for path in checkpoints_by_step(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_a_full_disk_is_a_named_error_and_the_earlier_checkpoint_stays(whole_run, tmp_path, monkeypatch):
    shutil.copytree(whole_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer, calls = make(tmp_path, rows=16), []

    def full(*args, **kwargs):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        CheckpointWriteError, match="could not write checkpoint-3 .No space left on device.*checkpoint-2 is kept"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert len(calls) == checkpoints.ATTEMPTS and [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(
        CheckpointWriteError, match="checkpoint-3 needs 0.00 GB, 0.00 GB are free.*checkpoint-2 is kept"
    ):
        make(tmp_path, rows=16).train(resume_from_checkpoint=True)
    monkeypatch.undo()
    assert same(trained(resumed(tmp_path)), whole_run[1])


def test_weights_that_are_not_finite_are_never_committed(tmp_path):
    trainer = make(tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        CheckpointWriteError, match="1 trained tensors are not finite, the first is model.layers.1.mlp.up_proj.weight"
    ):
        trainer._save_checkpoint(trainer.model, None)
    assert not checkpoints_by_step(tmp_path)


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(tmp_path):
    dead = in_child(time.sleep, 0) == 0 and next(
        n for n in range(2**22, 2**22 + 99) if not os.path.exists(f"/proc/{n}")
    )
    left = tmp_path / f".tmp-checkpoint-7-{artifacts.owner(dead)}-12345678"
    mine = tmp_path / f".tmp-checkpoint-8-{artifacts.owner(os.getpid())}-12345678"
    replaced, lost = (tmp_path / f".old-checkpoint-{n}-{artifacts.owner(dead)}-12345678" for n in (5, 6))
    for folder in (left, mine, replaced, lost, tmp_path / "checkpoint-5"):
        folder.mkdir()
    artifacts.clean_abandoned(tmp_path)
    # one of them is the only good copy, and is put back
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, "checkpoint-5", "checkpoint-6"}


# --- kill -9 and SIGTERM ---------------------------------------------------------------------------------------


def killed_in_save(folder, call):
    """Train; kill -9 this very process at the `call`-th operation on files that saving does."""
    count = iter(range(10**6))

    def counted(function):
        def operation(*args, **kwargs):
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return operation

    artifacts.sync, artifacts.write_file, os.rename = (
        counted(artifacts.sync),
        counted(artifacts.write_file),
        counted(os.rename),
    )
    checkpoints.save_file, checkpoints.finish_manifest = (
        counted(checkpoints.save_file),
        counted(checkpoints.finish_manifest),
    )
    shutil.rmtree = counted(shutil.rmtree)
    make(folder, rows=16, save_total_limit=2).train(resume_from_checkpoint=True)


def train_on(folder):
    make(folder, rows=16, save_total_limit=2).train(resume_from_checkpoint=True)


def operations(folder):
    """How many operations on files a run does that nothing interrupts."""
    for call in range(10, 10**4, 10):
        if in_child(killed_in_save, folder / str(call), call) == 0:
            return call
    raise AssertionError


def check_killed(folder, whole_run):
    path, _ = newest_verified(folder)
    found = [p.name for p in checkpoints_by_step(folder)]
    assert path is None or path.name == found[-1]  # what has the name of a checkpoint is one
    return path


@pytest.mark.parametrize("calls", [[3, 30], pytest.param([17, 25, 41], marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_of_saving_leaves_a_run_that_resumes_bit_by_bit(calls, whole_run, tmp_path):
    for call in calls:
        assert in_child(killed_in_save, tmp_path, call) == -signal.SIGKILL
        check_killed(tmp_path, whole_run)
    trainer = resumed(tmp_path, save_total_limit=2)
    assert same(trained(trainer), whole_run[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]


@pytest.mark.slow
def test_kill_9_at_every_operation_on_files(whole_run, tmp_path):
    """Each run dies a little later than the one before, wherever it goes on from."""
    reached = 0
    for call in range(0, operations(tmp_path / "count"), 5):
        folder = tmp_path / str(call)
        status = in_child(killed_in_save, folder, call)
        path = check_killed(folder, whole_run) if folder.exists() else None
        step = 0 if path is None else int(path.name.split("-")[1])
        assert step >= reached and status in (0, -signal.SIGKILL)
        reached = max(reached, step)
        if call % 25 == 0 or step == STEPS:
            assert same(trained(resumed(folder, save_total_limit=2)), whole_run[1])
    assert reached == STEPS


@pytest.mark.slow
def test_kill_9_at_any_time_while_saving_every_step(whole_run, tmp_path):
    times, kills = random.Random(0), 0
    for n in range(4):
        folder = tmp_path / str(n)
        while in_child(train_on, folder, after=times.uniform(0.3, 3.0)) != 0:
            kills += 1
            check_killed(folder, whole_run)
        assert same(trained(resumed(folder, save_total_limit=2)), whole_run[1])
    assert kills >= 4


def terminated_at(folder, step, signals=1):
    """Train, and get SIGTERM in the middle of a step."""
    trainer = make(folder, rows=16, save_strategy="no")
    compute_loss = trainer.compute_loss

    def compute(*args, **kwargs):
        if trainer.state.global_step == step:
            for _ in range(signals if not trainer.guard.requested else 0):
                os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = compute
    trainer.train()


def test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on_later(whole_run, tmp_path):
    assert in_child(terminated_at, tmp_path, 3) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]
    assert same(trained(resumed(tmp_path)), whole_run[1])
    with pytest.raises(
        Interrupted, match="stopped by SIGTERM after step 2, checkpoint-2 is written: start the same command again"
    ):
        terminated_at(tmp_path / "here", 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_sigterm_ends_the_process_at_once(tmp_path):
    assert in_child(terminated_at, tmp_path, 1, 2) == -signal.SIGTERM
    assert not checkpoints_by_step(tmp_path)


# --- what is not finite ----------------------------------------------------------------------------------------


def poisoned(folder, bad, kind="loss", **settings):
    """A trainer whose loss, or gradient, is NaN in the second micro-batch of the steps `bad`."""
    trainer = make(folder, rows=16, **settings)
    compute_loss, seen = trainer.compute_loss, []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def compute(*args, **kwargs):
        loss, step = compute_loss(*args, **kwargs), trainer.state.global_step
        seen.append(step)
        if step in bad and seen.count(step) == 2:
            return loss * float("nan") if kind == "loss" else Poison.apply(loss)
        return loss

    trainer.compute_loss = compute
    return trainer


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_is_counted_and_dumped(kind, tmp_path):
    trainer, states = poisoned(tmp_path, {2}, kind), {}

    class Watch(safety.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states[state.global_step] = trained(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    weights = {n: {k: v for k, v in states[n].items() if k != "settings"} for n in states}  # the schedule goes on
    assert same(weights[2], weights[3]) and not same(weights[1], weights[2]) and not same(weights[3], weights[4])
    assert trainer.guard.skipped == 1 and trainer.state.global_step == STEPS
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert json.loads((tmp_path / "checkpoint-6" / "resume.json").read_text())["skipped_steps"] == 1
    folder = tmp_path / "non_finite" / "step-2"
    note, batches = json.loads((folder / "process-0.json").read_text()), reproduce(folder)
    assert note["step"] == 2 and note["micro_batches"] == [4, 6] and len(batches) == 2
    rows = {tuple(row) for row in token_ids(16, 12).tolist()}
    assert all({tuple(row) for row in batch["input_ids"].tolist()} <= rows for batch in batches)
    assert ("nan" in note["batches"][1]["loss"]) == (kind == "loss") and note["gradient_norm"] == "nan"


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(
        DataError,
        match="at step 4 .*as in the 3 steps up to it.*non_finite/, checkpoint-4 is kept: lower learning_rate",
    ):
        poisoned(tmp_path, {0, 2, 3, 4}).train()
    assert {p.name for p in (tmp_path / "non_finite").iterdir()} == {"step-0", "step-2", "step-3", "step-4"}


def test_a_run_of_which_no_step_was_finite_is_no_result(tmp_path):
    with pytest.raises(DataError, match="none of the 2 steps was finite"):
        poisoned(tmp_path, {0, 1}, max_steps=2).train()


# --- the same run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size was 2, is 1"),
        ({"max_steps": 7}, "max_steps was 6, is 7"),
        ({"rows": 12}, "data was '16 rows"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(change, said, whole_run, tmp_path):
    (tmp_path / "run").mkdir()
    os.symlink(whole_run[0] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    trainer = make(tmp_path / "run", **({"rows": 16} | change))
    with pytest.raises(ConfigError, match=f"checkpoint-2 belongs to another run: {said}"):
        trainer.train(resume_from_checkpoint=True)


def test_a_named_change_is_allowed_and_what_changes_nothing_is_not_asked_for(whole_run, tmp_path, caplog):
    shutil.copytree(whole_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = make(tmp_path, rows=16, max_steps=3, logging_steps=2, save_steps=3)
    trainer.args.allow_changes = ["max_steps"]
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and "max_steps was 6 and is 3: allowed" in caplog.text


def test_another_model_or_other_trained_tensors_are_refused(whole_run, tmp_path):
    shutil.copytree(whole_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = make(tmp_path, rows=16)
    trainer.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="belongs to another run: model was"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.allow_changes = ["model"]
    with pytest.raises(
        CheckpointError, match="its optimiser trains 34 tensors, this run 33, the first difference is model.norm.weight"
    ):
        trainer.train(resume_from_checkpoint=True)
    trainer.model.model.norm = torch.nn.Identity()
    with pytest.raises(
        CheckpointError, match="1 tensors do not fit the model, the first: model.norm.weight is unknown"
    ):
        checkpoints.load_weights(trainer, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "resume.json").unlink()
    with pytest.raises(CheckpointError, match="no resume.json, it holds a model and no training state"):
        checkpoints.read_resume(tmp_path / "checkpoint-2")
    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors")["model.norm.weight"].shape == (48,)
