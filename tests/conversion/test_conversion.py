"""Conversion: every tensor is accounted for, new ones are the model's own, files are complete and plain, memory is that
of one shard.
"""

import copy
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_teachers import (
    EVERY,
    WITH_LINEAR,
    edit_config,
    model_class,
    one_by_one,
    rewrite,
    stored,
    teacher,
    teacher_config,
    tokens,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import xlstm_hybrid.conversion.source
from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.checkpoint.digests import weights_hash
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, verify_files
from xlstm_hybrid.checkpoint.weights import plan_shards
from xlstm_hybrid.conversion.convert import INITS, Transfer, convert, empty_student
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.errors import CheckpointError

GATES = ("igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias")
every_family = pytest.mark.parametrize("family", EVERY)


@pytest.fixture
def llama(tmp_path):
    """A Llama on disk in four or more shards."""
    teacher("llama").save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


@every_family
def test_the_report_accounts_for_every_tensor_of_both_models(family):
    original = teacher(family)
    kinds = ["hybrid_sliding", "full_attention", "hybrid_sliding"]
    if family in WITH_LINEAR:
        kinds = ["linear_attention", "full_attention", "linear_attention", "hybrid_sliding"]
    student = XLSTMHybridForCausalLM.from_teacher(original, sliding_window=16, layer_types=kinds)
    report = student.transfer_report
    assert set(report.teacher_tensors) == set(original.state_dict())
    assert set(report.student_tensors) == set(student.state_dict())
    new = {name for name, what in report.student_tensors.items() if what.startswith("new: ")}
    assert new == {name for name in student.state_dict() if ".mlstm." in name}
    assert {name for name in new if ".layers.1." in name} == set()
    assert report.parameters["student"] == sum(p.numel() for p in student.parameters())
    assert report.parameters["teacher"] == sum(p.numel() for p in original.parameters())
    assert (
        report.parameters["new"]
        == report.parameters["trainable_in_stage_1"]
        == sum(student.state_dict()[name].numel() for name in new)
    )


def test_the_report_prints_one_line_per_kind_of_tensor_and_becomes_json(llama, tmp_path):
    report = convert(llama, tmp_path / "out")
    lines = str(report).splitlines()
    assert lines[0] == "Transfer from llama (llama, float32): 3 layers, 3 hybrid_sliding"
    assert "model.layers.{n}.self_attn.q_proj.weight               3  copied" in lines
    assert "model.layers.{n}.self_attn.mlstm.q_map                 3  new: identity" in lines
    assert (
        "lm_head.weight                                         1  derived: tied to model.embed_tokens.weight" in lines
    )
    assert lines[-1].startswith(
        f"parameters: teacher {report.parameters['teacher']:,}, student {report.parameters['student']:,}"
    )
    assert json.loads(json.dumps(report.as_dict()))["teacher_tensors"] == report.teacher_tensors


def test_rotary_buffers_of_old_checkpoints_are_reported_as_recomputed(llama, tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(llama, lambda weights: weights | {name: torch.ones(5)})
    report = convert(llama, tmp_path / "out")
    assert report.teacher_tensors[name] == "recomputed"
    assert name not in stored(tmp_path / "out")


def test_a_stored_copy_of_a_tied_head_is_a_duplicate_if_it_is_one(llama, tmp_path):
    rewrite(llama, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert (
        convert(llama, tmp_path / "out").teacher_tensors["lm_head.weight"]
        == "duplicate of the tied model.embed_tokens.weight"
    )
    assert "lm_head.weight" not in stored(tmp_path / "out")
    rewrite(llama, lambda weights: weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    with pytest.raises(
        CheckpointError, match="is tied to model.embed_tokens.weight, but they differ; set tie_word_embeddings to false"
    ):
        convert(llama, tmp_path / "differs")


def test_new_parameters_are_those_of_the_models_own_initialisation(llama, tmp_path):
    convert(llama, tmp_path / "out", sliding_window=16, mlstm_context=128, mlstm_output_gate_bias=-1.5)
    made = XLSTMHybridForCausalLM(AutoConfig.from_pretrained(tmp_path / "out")).state_dict()
    new = {name: x for name, x in stored(tmp_path / "out").items() if ".mlstm." in name}
    # of choices that are not the default
    assert {name.rsplit(".", 1)[-1] for name in new} == set(INITS) - {"joint_scale", "norm_weight"}
    torch.testing.assert_close(new, {name: made[name] for name in new}, rtol=0, atol=0)
    assert new["model.layers.2.self_attn.mlstm.ogate_bias"].tolist() == [-1.5] * 6
    slowest = torch.sigmoid(new["model.layers.2.self_attn.mlstm.fgate_bias"].double())[[0, -1]]
    torch.testing.assert_close(1 / (1 - slowest), torch.tensor([4.0, 512.0], dtype=torch.float64), rtol=1e-4, atol=0)


def test_gates_stay_float32_in_a_bfloat16_student(llama, tmp_path):
    report = convert(llama, tmp_path / "out", dtype="bfloat16")
    expected = {name: torch.float32 if name.endswith(GATES) else torch.bfloat16 for name in stored(tmp_path / "out")}
    assert sum(dtype == torch.float32 for dtype in expected.values()) == 3 * len(GATES)
    assert {name: x.dtype for name, x in stored(tmp_path / "out").items()} == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = XLSTMHybridForCausalLM.from_teacher(llama, dtype=torch.bfloat16)
    for model in (loaded, made):
        assert {name: x.dtype for name, x in model.state_dict().items() if name in expected} == expected
    torch.testing.assert_close(loaded.state_dict(), made.state_dict(), rtol=0, atol=0)
    assert report.dtype == "bfloat16" and loaded.config.dtype == torch.bfloat16


def test_a_student_has_its_teachers_dtype_unless_told_otherwise(llama, tmp_path):
    rewrite(llama, lambda weights: {name: x.bfloat16() for name, x in weights.items()})
    assert convert(llama, tmp_path / "out").dtype == "bfloat16"
    assert XLSTMHybridForCausalLM.from_teacher(llama).dtype == torch.bfloat16
    assert XLSTMHybridForCausalLM.from_teacher(llama, dtype="float32").dtype == torch.float32


@every_family
def test_a_bfloat16_student_rounds_where_its_teacher_does(family, tmp_path):
    teacher(family, "yarn").save_pretrained(tmp_path)
    # in memory, as the student
    original = one_by_one(copy.deepcopy(model_class(family).from_pretrained(tmp_path, dtype=torch.bfloat16)))
    student = XLSTMHybridForCausalLM.from_teacher(tmp_path, layer_types="teacher", dtype="bfloat16")
    with torch.no_grad():
        torch.testing.assert_close(student(tokens()).logits, original(tokens()).logits, rtol=0, atol=0)


def test_a_student_in_memory_owns_its_weights():
    original = teacher("llama")
    before = {name: x.clone() for name, x in original.state_dict().items()}
    student = XLSTMHybridForCausalLM.from_teacher(original)
    assert not student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    torch.testing.assert_close(dict(original.state_dict()), before, rtol=0, atol=0)


def test_shards_are_cut_at_their_size_and_a_larger_tensor_has_its_own():
    assert plan_shards({"a": 4, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9}, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert plan_shards({"a": 4, "b": 4}, 8) == [["a", "b"]]


def test_large_students_are_sharded_with_an_index(llama, tmp_path):
    convert(llama, tmp_path / "out", shard_bytes=30_000)
    convert(llama, tmp_path / "whole")
    files, index = (
        sorted((tmp_path / "out").glob("*.safetensors")),
        json.loads((tmp_path / "out/model.safetensors.index.json").read_text()),
    )
    assert len(files) >= 4 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        weights = load_file(file)
        assert sum(x.nbytes for x in weights.values()) <= 30_000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(weights)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored(tmp_path / "out").values())
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()
    torch.testing.assert_close(stored(tmp_path / "out"), stored(tmp_path / "whole"), rtol=0, atol=0)


class Meter:
    """Bytes of the tensors that passed through `watch` and are still alive."""

    def __init__(self):
        self.live = self.peak = 0

    def watch(self, tensor):
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self.forget, tensor.nbytes)
        return tensor

    def forget(self, size):
        self.live -= size


def test_one_shard_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    meter = Meter()

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            return meter.watch(self.file.get_tensor(name))

    make = Transfer.tensor
    monkeypatch.setattr(xlstm_hybrid.conversion.source, "safe_open", Watched)
    monkeypatch.setattr(Transfer, "tensor", lambda self, name: meter.watch(make(self, name)))
    convert(llama, tmp_path / "out", shard_bytes=30_000)
    sizes = [x.nbytes for x in stored(tmp_path / "out").values()]
    assert 30_000 / 2 < meter.peak <= 30_000 + max(sizes)  # one shard, and one teacher tensor on its way into it
    assert meter.live == 0
    assert sum(sizes) > 3 * meter.peak


def test_a_student_knows_where_it_comes_from(llama, tmp_path):
    add_provenance(llama, "teacher", figures={"exact_match": 1.0})
    report = convert(llama, tmp_path / "out", sliding_window=16, num_sink_tokens=2, dtype="bfloat16", mlstm_context=128)
    verify_files(tmp_path / "out")
    made, converted = read_provenance(tmp_path / "out")
    assert (made["stage"], converted["stage"], converted["parent"]) == ("teacher", "convert", "llama")
    assert converted["config"] == {
        "sliding_window": 16,
        "num_sink_tokens": 2,
        "layer_types": ["hybrid_sliding"] * 3,
        "dtype": "bfloat16",
        "teacher": "llama",
        "revision": None,
        "mlstm_context": 128,
        "teacher_weights": weights_hash(llama),
    }
    assert converted["figures"]["parameters"] == report.parameters
    assert converted["figures"]["teacher_tensors"] == {"copied": len(stored(llama))}


def add_tokenizer(directory, **settings):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_tokenizer_chat_template_and_generation_config_come_along(llama, tmp_path):
    add_tokenizer(llama)
    (llama / "generation_config.json").write_text(
        json.dumps({"temperature": 0.3, "do_sample": True, "eos_token_id": [5, 6]})
    )
    report = convert(llama, tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(
        report.files
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("b a c")["input_ids"] == [1, 0, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<user>a"
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), XLSTMHybridForCausalLM.from_teacher(llama)):
        assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.3, [5, 6])


def test_no_pickle_code_or_foreign_path_comes_along(llama, tmp_path):
    add_tokenizer(
        llama,
        auto_map={"AutoTokenizer": ["tokenization.Evil", None]},
        name_or_path="/home/someone/llama",
        vocab_file="/etc/passwd",
    )
    edit_config(llama, auto_map={"AutoConfig": "configuration.Evil"}, _name_or_path="/home/someone/llama")
    for name in ("training_args.bin", "optimizer.pt", "modeling_evil.py", "notes.txt"):
        (llama / name).write_text("x")
    convert(llama, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "provenance.json",
        "manifest.json",
    }
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    for word in ("auto_map", "Evil", "/home", "/etc", str(tmp_path)):
        assert word not in text, word


def test_a_hub_snapshot_may_link_to_its_blobs(llama, tmp_path):
    snapshot = tmp_path / "models--x--llama/snapshots/abc"
    (tmp_path / "models--x--llama/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(llama.iterdir()):
        blob = tmp_path / f"models--x--llama/blobs/{number}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    report = convert(snapshot, tmp_path / "out")
    assert report.files == ["generation_config.json"]


def test_a_hub_id_is_fetched_at_its_revision_without_pickles_or_code(llama, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    report = convert("someone/llama", tmp_path / "out", revision="v1")
    assert (asked["repository"], asked["revision"], report.teacher) == ("someone/llama", "v1", "someone/llama")
    assert {"config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json"} <= set(
        asked["patterns"]
    )
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in asked["patterns"])


def test_planning_needs_no_memory_for_weights():
    assert {x.device.type for x in empty_student(student_config(teacher_config("olmo3"))).state_dict().values()} == {
        "meta"
    }
