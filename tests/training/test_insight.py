"""What is logged of a run is what happened in it, and the pictures show it."""

import math
import struct

import pytest
import torch
from conftest import tiny_student, token_ids
from test_alignment import LENGTH, aligned, student, trainer_of

from xlstm_hybrid.training import metrics as insight
from xlstm_hybrid.training.metrics import curves, evaluations, layer_grids, write_plots

LOG = [
    {
        "step": 1,
        "loss": 2.0,
        "kl": 0.5,
        "layer_0/relative_error": 0.5,
        "layer_10/relative_error": 0.9,
        "layer_0/output_gate": 0.2,
    },
    {"step": 2, "loss": "1.5", "kl": math.nan, "layer_0/relative_error": 0.25, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 1.75, "eval_runtime": 3.0},
    {"step": 2, "train_runtime": 12.0, "total_flos": 1e9, "train_loss": 1.7},
]


def size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_a_log_becomes_curves_and_grids():
    assert curves(LOG) == {"loss": ([1, 2], [2.0, 1.5]), "kl": ([1], [0.5]), "learning_rate": ([2], [1e-3])}
    assert evaluations(LOG) == {"loss": ([2], [1.75])}
    grids = layer_grids(LOG)
    assert grids["output_gate"] == ([1], [0], [[0.2]])
    steps, layers, rows = grids["relative_error"]
    assert (
        (steps, layers) == ([1, 2], [0, 10]) and rows[0] == [0.5, 0.25] and rows[1][0] == 0.9 and math.isnan(rows[1][1])
    )


def test_there_is_a_picture_of_the_curves_and_one_per_metric_of_layers(tmp_path):
    names = write_plots(tmp_path / "plots", LOG)
    assert names == ["curves.png", "layers_output_gate.png", "layers_relative_error.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    assert all(min(size(tmp_path / "plots" / name)) >= 280 for name in names)
    assert write_plots(tmp_path / "empty", []) == [] and not (tmp_path / "empty").exists()


def test_a_picture_depends_on_what_was_logged_and_on_nothing_else(tmp_path):
    for folder, log in (
        ("a", LOG),
        ("b", LOG),
        ("c", [LOG[0] | {"loss": 3.0, "layer_0/relative_error": 0.1}, *LOG[1:]]),
    ):
        write_plots(tmp_path / folder, log)
    for name in ("curves.png", "layers_relative_error.png"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b and a != c


def test_a_run_logs_gates_gradient_norms_speed_and_memory_and_draws_them(tmp_path):
    trainer = aligned(student(), tmp_path, max_steps=10, per_device_train_batch_size=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 11))
    for entry in logged:
        norms = [entry[f"layer_{n}/grad_norm"] for n in range(3)]
        assert sum(x**2 for x in norms) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)
        assert entry["tokens_per_second"] > 0 and 0.05 < entry["memory_gb"] < 50 and entry["skipped_steps"] == 0
    expected = {"curves.png", *(f"layers_{metric}.png" for metric in ("relative_error", "output_gate", "grad_norm"))}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == expected


def test_gate_means_are_those_of_the_real_tokens_of_the_logged_step(tmp_path):
    """All rows are the same, so that it does not matter which of them a step has; the second half of each is padding."""
    from datasets import Dataset

    model, ids = tiny_student(torch.float32, gain=1.0), token_ids(1, LENGTH)[0].tolist()
    real = [1] * (LENGTH // 2) + [0] * (LENGTH // 2)
    with torch.no_grad():
        expected = [
            g[:, : LENGTH // 2].mean().item() for g in model(input_ids=torch.tensor([ids]), output_gates=True)["gates"]
        ]
        padded = [g.mean().item() for g in model(input_ids=torch.tensor([ids]), output_gates=True)["gates"]]
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": real}] * 8)
    trainer = aligned(
        model, tmp_path, data=data, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    entry = trainer.state.log_history[0]
    # the first layer sees the same in the student and in the teacher's trunk
    assert entry["layer_0/output_gate"] == pytest.approx(expected[0], rel=1e-4) and abs(expected[0] - padded[0]) > 1e-3
    assert all(0 < entry[f"layer_{n}/output_gate"] < 1 for n in range(3))


def test_tokens_are_counted_in_training_only_and_hooks_are_gone_afterwards(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(insight.time, "monotonic", lambda: next(clock))
    model = student()
    trainer = trainer_of(model, tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer.add_callback(OneMore(model))
    trainer.train()
    assert [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry] == [
        pytest.approx(2 * 3 * LENGTH / 10)
    ] * 2
    assert not model._forward_pre_hooks and not any(
        layer.self_attn.mlstm._forward_hooks for layer in model.model.layers
    )


class OneMore(insight.TrainerCallback):
    """A forward beside training, as an evaluation does it."""

    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        self.model.eval()(input_ids=token_ids(1, 5))
        self.model.train()
