"""Experts are copied untouched: joined from checkpoints that hold each on its own, one shard in memory at a time."""

import pytest
import torch
from test_conversion import Meter
from tiny_teachers import rewrite, stored, teacher, teacher_config, tokens
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from xlstm_hybrid import XLSTMHybridForCausalLM, convert
from xlstm_hybrid.conversion.convert import Transfer
from xlstm_hybrid.conversion.source import DirectoryTeacher
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.training.distillation import choose_trained

PART = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def olmoe(tmp_path):
    teacher("olmoe").save_pretrained(tmp_path / "olmoe", max_shard_size="20KB")
    assert PART in stored(tmp_path / "olmoe")  # as published ones have it
    return tmp_path / "olmoe"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])  # some layers without experts, and a shared one
def test_experts_of_their_own_files_are_those_of_the_model_bit_by_bit(family, tmp_path):
    original = teacher(family)
    original.save_pretrained(tmp_path / "teacher")
    report = convert(tmp_path / "teacher", tmp_path / "out", shard_bytes=30_000)
    found, expected = stored(tmp_path / "out"), original.state_dict()
    assert {name for name in found if ".mlstm." not in name} == expected.keys()
    assert not [name for name, x in expected.items() if not torch.equal(found[name], x)]
    assert set(report.teacher_tensors) == expected.keys() and report.parameters["teacher"] == original.num_parameters()
    with torch.no_grad():
        same = XLSTMHybridForCausalLM.from_teacher(tmp_path / "teacher", layer_types="teacher")
        torch.testing.assert_close(same(tokens()).logits, original(tokens()).logits, rtol=0, atol=0)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded.model.layers[2].mlp.gate.weight, original.model.layers[2].mlp.gate.weight)


def test_layers_that_predict_several_tokens_are_left_out_and_told(tmp_path):
    """Published checkpoints of Qwen3-Next and Qwen3.5 have them; transformers reads past them."""
    original = teacher("qwen3_next")
    original.save_pretrained(tmp_path / "teacher")
    weights = stored(tmp_path / "teacher")
    drafts = {n.replace("model.layers.0", "mtp.layers.0"): x for n, x in weights.items() if "model.layers.0." in n}
    drafts |= {"mtp.fc.weight": torch.ones(50, 100)}
    drafts |= {f"mtp.{n}.weight": torch.ones(50) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    rewrite(tmp_path / "teacher", lambda weights: weights | {n: x.clone() for n, x in drafts.items()})
    report = convert(tmp_path / "teacher", tmp_path / "out")
    left = {name for name, what in report.teacher_tensors.items() if what == "left out"}
    joined = {f"mtp.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert left == {name for name in drafts if ".experts." not in name} | joined
    assert {n for n in stored(tmp_path / "out") if ".mlstm." not in n} == original.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: x for k, x in w.items() if k != PART}, r"missing \(model.layers.1.mlp.experts.gate_up_proj\)"),
        (lambda w: w | {PART: w[PART][:5].clone()}, r"missing \(model.layers.1.mlp.experts.gate_up_proj\)"),
        (
            lambda w: {k: x for k, x in w.items() if "experts.3." not in k},
            r"gate_up_proj is \[3, 48, 60\], expected \[4, 48, 60\]",
        ),
    ],
    ids=["one tensor less", "one of another shape", "one expert less"],
)
def test_experts_that_are_not_those_of_the_configuration_are_named(change, message, olmoe, tmp_path):
    rewrite(olmoe, change)
    with pytest.raises(CheckpointError, match=message):
        convert(olmoe, tmp_path / "out")


def test_hundreds_of_experts_are_converted_in_the_memory_of_one_shard(tmp_path, monkeypatch):
    OlmoeForCausalLM(teacher_config("olmoe", num_experts=128)).save_pretrained(tmp_path / "teacher")
    meter, make, load = Meter(), Transfer.tensor, DirectoryTeacher.load
    monkeypatch.setattr(Transfer, "tensor", lambda self, name: meter.watch(make(self, name)))
    monkeypatch.setattr(DirectoryTeacher, "load", lambda self, name: meter.watch(load(self, name)))
    convert(tmp_path / "teacher", tmp_path / "out", shard_bytes=1_600_000)
    sizes = [x.nbytes for x in stored(tmp_path / "out").values()]
    part = 24 * 60 * 4
    assert max(sizes) == 2 * 128 * part and sum(sizes) > 2 * meter.peak
    assert meter.peak <= 1_600_000 + max(sizes) + part  # one shard, one teacher tensor on its way into it, one expert
    assert meter.live == 0


@pytest.mark.parametrize("train", ["all", "all_and_routers", "attention"])
def test_routers_learn_in_stage_two_only_if_asked(train):
    model = XLSTMHybridForCausalLM.from_teacher(teacher("qwen2_moe"))
    choose_trained(model, train, None)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    assert learns["model.layers.1.mlp.gate.weight"] == (train == "all_and_routers")
    assert learns["model.layers.1.mlp.experts.down_proj"] == (train != "attention")
    assert learns["model.layers.1.mlp.shared_expert_gate.weight"] == (train != "attention")
