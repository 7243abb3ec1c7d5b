"""A student of a GGUF file is the student of the same teacher in safetensors, tokenizer included; what transformers would
leave out of the file is put in or refused.
"""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import enlarge
from tiny_gguf import byte_level_tokenizer, write_gguf
from tiny_teachers import SHARED, stored, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

from xlstm_hybrid import XLSTMHybridForCausalLM, cli
from xlstm_hybrid.checkpoint.digests import weights_hash
from xlstm_hybrid.checkpoint.files import digest, read_provenance, verify_files
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.load import load, load_model
from xlstm_hybrid.errors import CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.planning.run import read_config

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}  # Q8_0: by 32
WIDE |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
LAYOUTS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),  # not hidden / heads, and not the class's default
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def model(layout, **changes):
    config_class, cls, fields = LAYOUTS[layout]
    shared = {key: value for key, value in SHARED.items() if key != "head_dim"}
    return enlarge(cls(config_class(**(shared | WIDE | fields | changes)))).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Directory of a tokenizer of byte-level BPE with the rules of Qwen2, a chat template and 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer(folder)
    return folder


TEXTS = ["the 12 in", " the", "  a\n\n b", "1234567", "naïve ☃", "<|endoftext|>the<|endoftext|>", ""]


@every_layout
def test_a_student_of_float32_equals_that_of_the_checkpoint_to_the_bit(layout, tmp_path):
    original = model(layout)
    write_gguf(tmp_path / "tiny.gguf", original)
    original.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "tiny.gguf", tmp_path / "a", sliding_window=8)
    convert(tmp_path / "plain", tmp_path / "b", sliding_window=8)
    verify_files(tmp_path / "a")
    found, want = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert found.keys() == want.keys() and all(torch.equal(found[name], x) for name, x in want.items())
    assert {x.dtype for x in found.values()} == {torch.float32}
    mine, its = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in "ab")
    assert {key for key in its if mine[key] != its[key]} == {"_name_or_path"}
    assert read_provenance(tmp_path / "a")[-1]["config"]["teacher"] == "tiny.gguf"
    assert str(tmp_path) not in (tmp_path / "a/provenance.json").read_text()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("layout", ["llama", "qwen2"])
def test_a_student_of_a_smaller_file_is_as_near_as_the_file(layout, kind, tmp_path):
    original = model(layout)
    write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    student = XLSTMHybridForCausalLM.from_teacher(tmp_path, gguf_file="tiny.gguf", layer_types="teacher")
    assert student.config.dtype == student.dtype == (torch.float16 if kind == "F16" else torch.float32)
    for name, x in original.state_dict().items():
        y, share = (
            student.state_dict()[name].float(),
            2**-11 if kind == "F16" else 0.57 / 127,
        )  # half a step, and its scale is a float16
        # of each number in float16, of the largest of 32 in Q8_0
        largest = (
            x.abs() if kind == "F16" else x.abs().view(-1, 32).amax(1, keepdim=True).expand(-1, 32).reshape(x.shape)
        )
        assert ((x - y).abs() <= share * largest + 1e-6).all(), name
    with torch.no_grad():
        found, want = student.float()(tokens()).logits, original(tokens()).logits
    assert (found - want).std() < (0.01 if kind == "F16" else 0.1) * want.std()


def test_the_dtype_is_the_file_s_unless_another_is_named(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", model("llama"), kind="Q8_0")
    student = XLSTMHybridForCausalLM.from_teacher(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert student.dtype == torch.bfloat16 and student.model.layers[0].self_attn.mlstm.fgate_bias.dtype == torch.float32


def test_the_tokenizer_is_that_of_the_file_and_reads_as_the_teacher_s(tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(tokenizer)
    original = model("qwen2", vocab_size=len(own), eos_token_id=own.eos_token_id)
    write_gguf(tmp_path / "tiny.gguf", original, tokenizer)
    report = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(
        report.files
    )
    saved, given = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"),
    )
    for text in TEXTS:
        assert saved(text).input_ids == given(text).input_ids == own(text).input_ids, text
        assert saved.decode(saved(text).input_ids) == own.decode(own(text).input_ids)
    talk = [{"role": "user", "content": "the 12"}]
    assert saved.apply_chat_template(talk, tokenize=False) == own.apply_chat_template(talk, tokenize=False)
    assert saved.eos_token_id == own.eos_token_id and len(saved) == len(own)
    config = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == own.eos_token_id


def test_a_llama_s_byte_level_tokenizer_has_no_token_more_than_the_file_and_begins_as_it_does(tmp_path):
    own = AutoTokenizer.from_pretrained(TINY)
    write_gguf(tmp_path / "tiny.gguf", model("llama", vocab_size=len(own)), TINY)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_vocab() == own.get_vocab()
    assert max(saved("<|endoftext|>").input_ids) < len(own) == 512
    assert saved("one two").input_ids == own("one two").input_ids and own("one two").input_ids[0] == own.bos_token_id


def test_the_file_is_a_teacher_to_every_command(tokenizer, tmp_path):
    original = model("llama", vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)))
    write_gguf(tmp_path / "tiny.gguf", original, tokenizer)
    loaded, words = load(tmp_path / "tiny.gguf", device="cpu")
    assert torch.equal(loaded(tokens()).logits, original(tokens()).logits) and words("the 12").input_ids
    loaded.save_pretrained(tmp_path / "plain")  # as a checkpoint that carries no note of its file
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens()).logits, loaded(tokens()).logits
    )
    assert read_config(tmp_path / "tiny.gguf").num_hidden_layers == 3
    assert weights_hash(tmp_path / "tiny.gguf") == digest(tmp_path / "tiny.gguf")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}) + "\n")
    stores = [str(tmp_path / name) for name in ("of_file", "of_checkpoint")]
    for source, store in zip((tmp_path / "tiny.gguf", tmp_path / "plain"), stores, strict=True):
        if source.is_dir():
            words.save_pretrained(source)
        command = [
            "cache-teacher",
            str(source),
            str(rows),
            store,
            "--top-k",
            "8",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
    first, second = (stored(Path(store)) for store in stores)
    assert first.keys() == second.keys() and all(torch.equal(first[name], x) for name, x in second.items()) and first
    command = ["convert", str(tmp_path), str(tmp_path / "out"), "--gguf-file", "tiny.gguf", "--sliding-window", "8"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0 and "Transfer from tiny.gguf (llama, float32)" in result.output
    assert re.search(
        r"out: a student of \d+ layers; next: xlstm-hybrid verify .*out$", result.output.replace("\n", " ").strip()
    )


# --- what transformers leaves out ------------------------------------------------------------------------------


def test_llama_3_1_keeps_its_rope(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    original = model("llama", rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](original.config, "cpu")
    factors = (5e5 ** -(np.arange(0, 16, 2) / 16) / scaled.numpy()).astype(np.float32)
    assert 0.99 < factors.min() < 1.01 and 7.9 < factors.max() < 8.1
    write_gguf(tmp_path / "tiny.gguf", original, tensors={"rope_freqs.weight": factors})
    student = XLSTMHybridForCausalLM.from_teacher(tmp_path / "tiny.gguf", layer_types="teacher")
    found = student.config.rope_parameters
    assert found["rope_type"] == "llama3" and found["factor"] == pytest.approx(8, rel=1e-5)
    with torch.no_grad():
        assert torch.allclose(student(tokens()).logits, original(tokens()).logits, atol=1e-4)
        assert torch.allclose(student.model.rotary_emb["full_attention"].inv_freq, scaled, rtol=1e-5)
    write_gguf(tmp_path / "other.gguf", original, tensors={"rope_freqs.weight": factors**2})
    with pytest.raises(UnsupportedTeacherError, match="rope_freqs.weight does not hold the factors of Llama 3.1"):
        read_config(tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaled_rope_is_read(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    original = model("qwen2", rope_parameters=rope)
    extra = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    extra |= {"rope.scaling.original_context_length": 16} if kind == "yarn" else {}
    write_gguf(tmp_path / "tiny.gguf", original, extra=extra)
    student = XLSTMHybridForCausalLM.from_teacher(tmp_path / "tiny.gguf", layer_types="teacher")
    with torch.no_grad():
        assert torch.allclose(student(tokens()).logits, original(tokens()).logits, atol=1e-4)


def damaged(path):
    path.write_bytes(path.read_bytes()[:3000])


REFUSALS = {
    "a key that nobody reads": (
        {"extra": {"attention.scale": 0.3}},
        UnsupportedTeacherError,
        "tiny.gguf: attention.scale of llama would be left out",
    ),
    "another rotary width": (
        {"extra": {"attention.value_length": 8}},
        UnsupportedTeacherError,
        "attention.value_length is 8, expected the head's 16",
    ),
    "another scaling": (
        {"extra": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}},
        UnsupportedTeacherError,
        "rope.scaling.type 'longrope'.*expected none, linear or yarn",
    ),
    "a tensor that nobody reads": (
        {"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
        CheckpointError,
        r"tiny.gguf: holds \d+ tensors, and a llama of this header has \d+; take the model's checkpoint in safetensors",
    ),
    "too many layers in the header": ({"layers": 4}, CheckpointError, "the first missing is model.layers.3."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_make_another_model_is_refused(case, tmp_path):
    arguments, error, message = REFUSALS[case]
    original = model("llama")
    original.config.num_hidden_layers = arguments.pop("layers", 3) if "layers" in arguments else 3
    write_gguf(tmp_path / "tiny.gguf", original, **arguments)
    for read in (lambda: convert(tmp_path / "tiny.gguf", tmp_path / "out"), lambda: load_model(tmp_path / "tiny.gguf")):
        with pytest.raises(error, match=message):
            read()
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_are_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", model("llama"))
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for content in (b"", b"GGUF", b"x" * 2000, whole[:3000]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="bad.gguf: not a complete GGUF file"):
            read_config(tmp_path / "bad.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma2")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedTeacherError, match="other.gguf: architecture 'gemma2' is none that can be converted"
    ):
        convert(tmp_path / "other.gguf", tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match="part.gguf: one of 3 parts; join them with llama.cpp: llama-gguf-split --merge"
    ):
        read_config(tmp_path / "part.gguf")
    with pytest.raises(CheckpointError, match="tiny: no file none.gguf"):
        (tmp_path / "tiny").mkdir()
        convert(tmp_path / "tiny", tmp_path / "out", gguf_file="none.gguf")
    with pytest.raises(ConfigError, match="gguf_file='tiny.gguf': names a file in a directory or of a Hub id"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", gguf_file="tiny.gguf")
    with pytest.raises(ConfigError, match="revision='v1': only a Hub id has revisions"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out", revision="v1")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError, match=r"tiny.gguf: reading GGUF needs the package gguf: pip install 'xlstm-hybrid\[gguf\]'"
    ):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")


def test_the_file_is_never_overwritten_by_its_student(tmp_path):
    (tmp_path / "here").mkdir()
    write_gguf(tmp_path / "here/tiny.gguf", model("llama"))
    with pytest.raises(ValueError, match="here: holds the teacher tiny.gguf; choose another directory"):
        convert(tmp_path / "here/tiny.gguf", tmp_path / "here", overwrite=True)
    assert Path(tmp_path / "here/tiny.gguf").is_file()
