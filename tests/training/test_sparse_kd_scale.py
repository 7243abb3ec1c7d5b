"""Sparse distillation in two processes is that in one, under DDP and FSDP2, with a teacher that is sharded as well
(gloo, on CPUs).
"""

import pytest
import torch
from conftest import tiny_student
from datasets import Dataset
from test_scale import MAKERS, WAYS, collate, launch, near, padded_rows, steps, student, tokenizer

from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

OBJECTIVES = {
    "kernel": {"outcomes": "tail"},
    "chunks": {"outcomes": "tail", "divergence": "jsd"},
    "dense": {"outcomes": "dense"},
}


def rows():
    """Labels hide a part of every row, and the whole of two: a micro-batch of one process may have nothing to score."""
    found = []
    for n, row in enumerate(padded_rows()):
        real = [m and t % 4 != n % 3 for t, m in enumerate(row["attention_mask"])]
        labels = [i if r and n not in (2, 3) else -100 for i, r in zip(row["input_ids"], real, strict=True)]
        found.append(row | {"labels": labels})
    return Dataset.from_list(found)


def teacher():
    model = tiny_student(torch.float64, gain=1.3)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    return model


def sparse_trainer(folder, tied=False, **settings):
    shared = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "top_k": 9,
        "ce_weight": 0.4,
        "kl_weight": 0.6,
        "head_rows": 11,
    }
    model = student(torch.float64, tie_word_embeddings=tied)
    model.tie_weights()
    args = SparseKDConfig(**(shared | settings))
    return SparseKDTrainer(
        model, teacher(), args, train_dataset=rows(), data_collator=collate, processing_class=tokenizer()
    )


MAKERS = MAKERS | {"sparse": sparse_trainer}


def train_run(folder, **settings):
    import test_scale

    test_scale.MAKERS = MAKERS
    return steps("sparse", folder, count=2, **settings)


CASES = [("ddp", "kernel", {}), ("fsdp2", "kernel", {})]
HEAVY = [
    ("ddp", "chunks", {}),
    ("fsdp2", "chunks", {}),
    ("ddp", "dense", {}),
    ("fsdp2", "dense", {}),
    ("fsdp2", "kernel", {"tied": True}),
    ("fsdp2", "chunks", {"gradient_checkpointing": True}),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in HEAVY]


@pytest.mark.parametrize("way, objective, settings", CASES)
def test_two_processes_give_the_losses_gradients_and_weights_of_one(way, objective, settings, tmp_path):
    expected = train_run(tmp_path / "alone", **OBJECTIVES[objective], **settings)
    assert len(expected["log"]) == 2 and all(g.abs().sum() > 0 for g in expected["gradients"].values())
    for rank in launch(
        train_run, tmp_path / "run", folder=tmp_path / "group", **OBJECTIVES[objective], **settings, **WAYS[way]
    ):
        assert rank["gradients"].keys() == expected["gradients"].keys()
        assert rank["sharded"] == (len(expected["weights"]) if way == "fsdp2" else 0)
        near(rank, expected)
