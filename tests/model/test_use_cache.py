"""`use_cache: false` in a teacher is training's leftover: no student inherits it, and no trainer of ours leaves it
behind.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_alignment import collate, tokenizer
from tiny_teachers import teacher
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.checkpoint.files import write_manifest
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.distil_xlstm.convert import convert as convert_to_distil
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer
from xlstm_hybrid.training.alignment_by_groups import align_streamed
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer, document_dataset
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer
from xlstm_hybrid.training.resume import Resumable

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "tiny_teacher" / "tiny-llama"
IDS = torch.tensor([[5, 6, 7, 8]])


def without_cache(directory):
    """Say in both files of a checkpoint what training says."""
    for name, more in (("config.json", {}), ("generation_config.json", {"max_new_tokens": 9})):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more | {"use_cache": False}))
    return directory


@pytest.fixture
def trained_teacher(tmp_path):
    teacher("llama").save_pretrained(tmp_path / "teacher")
    return without_cache(tmp_path / "teacher")


@pytest.fixture
def old_student(tmp_path):
    """A student as trainers once left it."""
    convert(teacher("llama"), tmp_path / "student", sliding_window=7, num_sink_tokens=2)
    without_cache(tmp_path / "student")
    write_manifest(tmp_path / "student")
    return tmp_path / "student"


def says(directory):
    """What both files say of the cache; a file that says nothing leaves it to the default, which is to use one."""
    files = [directory / name for name in ("config.json", "generation_config.json")]
    return [json.loads(path.read_text()).get("use_cache", True) is not False for path in files if path.is_file()]


def calls_of(model, monkeypatch):
    """`generate` six tokens; the number of tokens that each forward was given."""
    lengths, forward = [], type(model).forward

    def counted(self, input_ids=None, *args, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return lengths


def test_the_shipped_teacher_generates_with_its_cache(monkeypatch):
    assert says(SHIPPED) == [True, True]
    assert calls_of(AutoModelForCausalLM.from_pretrained(SHIPPED), monkeypatch) == [4, 1, 1, 1]


def test_a_converted_student_generates_with_its_cache_whatever_its_teacher_says(trained_teacher, tmp_path, monkeypatch):
    convert(trained_teacher, tmp_path / "student", sliding_window=7)
    assert says(tmp_path / "student") == [True, True]
    assert calls_of(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), monkeypatch) == [4, 1, 1, 1]


@pytest.mark.parametrize("loaded", [False, True], ids=["directory", "in memory"])
def test_a_student_in_memory_generates_with_its_cache_whatever_its_teacher_says(
    trained_teacher, loaded, tmp_path, monkeypatch
):
    source = AutoModelForCausalLM.from_pretrained(trained_teacher) if loaded else trained_teacher
    student = XLSTMHybridForCausalLM.from_teacher(source, sliding_window=7)
    assert student.config.use_cache and cache_of(student(IDS)) is not None
    assert calls_of(student, monkeypatch) == [4, 1, 1, 1]
    convert(source, tmp_path / "out", sliding_window=7)
    assert says(tmp_path / "out") == [True, True]
    if loaded:  # the teacher itself stays as it is
        assert (source.config.use_cache, source.generation_config.use_cache) == (False, False)


def test_a_distil_student_generates_with_its_cache_whatever_its_teacher_says(trained_teacher, tmp_path, monkeypatch):
    convert_to_distil(trained_teacher, tmp_path / "student")
    assert says(tmp_path / "student") == [True, True]
    student = DistilXLSTMForCausalLM.from_teacher(trained_teacher)
    assert student.config.use_cache
    assert calls_of(student, monkeypatch) == [4, 1, 1, 1]


def test_what_is_made_of_an_old_checkpoint_uses_the_cache(old_student, tmp_path):
    merge([old_student, old_student], tmp_path / "merged", unrecorded=True)
    export(old_student, tmp_path / "exported")
    args = AlignmentConfig(str(tmp_path / "run"), layers_at_a_time=2, **SHARED)
    align_streamed(old_student, tmp_path / "aligned", args, DATA, collate, tokenizer())
    for name in ("merged", "exported", "aligned"):  # what else they say is carried
        assert says(tmp_path / name) == [True, True]
        assert json.loads((tmp_path / name / "config.json").read_text())["sliding_window"] == 7
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["max_new_tokens"] == 9
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(old_student / "model.safetensors").keys()
    )


# --- trainers --------------------------------------------------------------------------------------------------


class Plain(Resumable, SFTTrainer):
    """TRL's own trainer."""


ROWS = [
    {"input_ids": row, "labels": row, "attention_mask": [1] * len(row)}
    for row in torch.arange(3, 51).view(4, 12).tolist()
]
DATA = Dataset.from_list(ROWS)
SHARED = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 1,
    "max_length": None,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


def student_of(use_cache):
    student = XLSTMHybridForCausalLM.from_teacher(teacher("llama"), sliding_window=7)
    student.config.use_cache = use_cache
    return student


def aligning(student, out, **more):
    return AlignmentTrainer(
        model=student,
        args=AlignmentConfig(out, **SHARED, **more),
        train_dataset=DATA,
        data_collator=collate,
        processing_class=tokenizer(),
    )


def distilling(student, out, **more):
    data = document_dataset([(row["input_ids"],) * 2 for row in ROWS])
    return SparseKDTrainer(
        student,
        teacher("llama"),
        SparseKDConfig(out, top_k=8, **SHARED, **more),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def sampling(student, out, **more):
    settings = {key: value for key, value in SHARED.items() if key not in ("dataset_kwargs", "max_length")}
    args, data = (
        OnPolicyKDConfig(out, max_completion_length=4, **settings, **more),
        Dataset.from_dict({"prompt": ["w5 w6 w7"] * 4}),
    )
    return OnPolicyKDTrainer(student, teacher("llama"), args=args, train_dataset=data, processing_class=tokenizer())


def tuning(student, out, **more):
    return Plain(
        model=student,
        args=SFTConfig(out, **SHARED, **more),
        train_dataset=DATA,
        data_collator=collate,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [aligning, distilling, sampling, tuning])
def test_a_trainer_leaves_the_cache_of_its_student_as_it_was(make, checkpointing, use_cache, tmp_path):
    student, out = student_of(use_cache), tmp_path / "run"
    trainer = make(student, str(out), gradient_checkpointing=checkpointing)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert student.config.use_cache is use_cache
    for folder in (out / "checkpoint-1", tmp_path / "saved"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is use_cache
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (cache_of(reloaded(IDS)) is not None) is use_cache
