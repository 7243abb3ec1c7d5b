"""What cannot be converted is refused by one named error that says what, where and what to do, and OUT appears complete
or not at all.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_teachers import edit_config, model_class, rewrite, stored, teacher, teacher_config
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import xlstm_hybrid.conversion.convert
from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.conversion import families
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError, UnsupportedTeacherError


@pytest.fixture
def llama(tmp_path):
    """A Llama on disk in four or more shards."""
    teacher("llama").save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def without(*names):
    return lambda directory: rewrite(
        directory, lambda weights: {name: x for name, x in weights.items() if name not in names}
    )


def truncate(directory):
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])


def truncate_one(directory):
    rewrite(directory, dict)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def only_pickle(directory):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


def redirect(directory, target):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(42)}, directory / target)


def reshape(directory):
    wrong = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(37, 41) for n in range(3)} | {
        "model.norm.weight": torch.ones(41)
    }
    rewrite(directory, lambda weights: weights | wrong)


def several_mistakes(directory):
    without("model.norm.weight", "model.layers.0.mlp.up_proj.weight")(directory)
    added = {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3), "model.layers.1.extra.weight": torch.ones(2)}
    rewrite(directory, lambda weights: weights | added)


Q = "model.layers.{}.self_attn.q_proj.weight"
REFUSALS = {
    "another family": (
        lambda d: edit_config(d, model_type="gpt2"),
        UnsupportedTeacherError,
        r"model_type 'gpt2' is not one of the supported families; choose .* add it as docs/add-teacher-family.md shows; "
        "supported are llama, mistral, qwen2, qwen3, olmo2, olmo3",
    ),
    "pictures": (
        lambda d: edit_config(d, model_type="qwen3_5_moe"),
        UnsupportedTeacherError,
        r"'qwen3_5_moe' has pictures beside text, which no student has; convert its text model, which this writes: python -c "
        r".*; or choose a teacher of one of the supported families: llama.*olmoe[^/]*$",
    ),
    "names of a text model beside pictures, which transformers reads for other families only": (
        lambda d: rewrite(d, lambda w: {k.replace("model.", "model.language_model."): x for k, x in w.items()}),
        CheckpointError,
        "without a place in the student .model.language_model",
    ),
    "a cap": (
        lambda d: edit_config(d, model_type="gemma2"),
        UnsupportedTeacherError,
        r"'gemma2' has attention scores with a cap, which no student has; choose a teacher of one of the supported families: "
        r"llama[^/]*$",
    ),
    "no family": (
        lambda d: edit_config(d, model_type=None),
        UnsupportedTeacherError,
        "model_type None is not one of the supported families",
    ),
    "quantised": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        UnsupportedTeacherError,
        "quantization_config is set, expected unquantised weights; start from the original checkpoint",
    ),
    "eight bits": (
        lambda d: rewrite(d, lambda w: w | {Q.format(1): w[Q.format(1)].to(torch.int8)}),
        UnsupportedTeacherError,
        r"1 tensors are not of a plain float type, the first model.layers.1.self_attn.q_proj.weight: a quantised teacher",
    ),
    "partial rotary": (
        lambda d: edit_config(
            d, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        UnsupportedTeacherError,
        "partial rotary embeddings, expected the whole head to rotate",
    ),
    "a part of a head that is none": (
        lambda d: edit_config(
            d,
            model_type="qwen3_5_text",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0},
        ),
        UnsupportedTeacherError,
        "partial_rotary_factor=0.0, expected a part above 0 and at most 1",
    ),
    "unknown RoPE": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        UnsupportedTeacherError,
        "rope_type 'spiral' is not one of default, linear, dynamic, yarn, longrope, llama3",
    ),
    "missing tensors": (
        without(*map(Q.format, range(3)), "model.norm.weight"),
        CheckpointError,
        r"llama: .*4 missing \(model.layers.0.self_attn.q_proj.weight, .*, \.\.\.\); compare the two, or download",
    ),
    "mis-shaped tensors": (
        reshape,
        CheckpointError,
        r"4 mis-shaped \(model.layers.0.mlp.up_proj.weight is \[37, 41\], expected \[37, 42\], .*, \.\.\.\)",
    ),
    "unexpected tensor": (
        lambda d: rewrite(d, lambda w: w | {"model.layers.0.extra.weight": torch.ones(2)}),
        CheckpointError,
        r"1 without a place in the student \(model.layers.0.extra.weight\)",
    ),
    "biases that the configuration denies": (
        lambda d: edit_config(d, mlp_bias=False),
        CheckpointError,
        r"9 without a place in the student \(model.layers.0.mlp.down_proj.bias",
    ),
    "several mistakes": (
        several_mistakes,
        CheckpointError,
        r"2 missing \(.*\); 1 mis-shaped \(.*is \[3, 3\], expected \[37, 42\]\); 1 without a place .*extra",
    ),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        CheckpointError,
        "llama: no config.json, expected a checkpoint",
    ),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        CheckpointError,
        "llama/config.json: cannot be read",
    ),
    "config of another shape": (
        lambda d: edit_config(d, hidden_size="many"),
        CheckpointError,
        "llama/config.json: not a llama configuration.*hidden_size",
    ),
    "incomplete RoPE": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "yarn"}),
        CheckpointError,
        "config.json: not a llama configuration.*factor",
    ),
    "an index that leads elsewhere": (
        lambda d: redirect(d, "../llama/elsewhere.safetensors"),
        CheckpointError,
        "elsewhere.safetensors",
    ),
    "generation config is no JSON": (
        lambda d: (d / "generation_config.json").write_text("["),
        CheckpointError,
        "llama/generation_config.json: cannot",
    ),
    "only a pickle": (
        only_pickle,
        CheckpointError,
        "pytorch_model.bin.*only safetensors is read; convert them with transformers: python -c .*save_pretrained",
    ),
    "no weights": (
        lambda d: [path.unlink() for path in d.glob("model*")],
        CheckpointError,
        "found no weights; download the checkpoint again",
    ),
    "truncated shard": (truncate, CheckpointError, r"model-00002-of-\d+.safetensors"),
    "truncated file": (
        truncate_one,
        CheckpointError,
        "llama: model.safetensors or model.safetensors.index.json is damaged",
    ),
    "an index of another form": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        CheckpointError,
        "index.json is damaged",
    ),
    "missing shard": (
        lambda d: sorted(d.glob("*.safetensors"))[1].unlink(),
        CheckpointError,
        r"model-00002-of-\d+.safetensors",
    ),
    "values that are not finite": (
        lambda d: rewrite(d, lambda w: w | {Q.format(2): w[Q.format(2)] / 0}),
        CheckpointError,
        r"layers.2.self_attn.q_proj.weight \(torch.float32\) holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_teacher_that_cannot_be_converted_is_refused_and_nothing_is_left(case, llama, tmp_path):
    spoil, error, message = REFUSALS[case]
    spoil(llama)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message) as raised:
        convert(llama, tmp_path / "out")
    assert "\n" not in str(raised.value).strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == before == ["llama"]
    with pytest.raises(error, match=message):
        XLSTMHybridForCausalLM.from_teacher(llama)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_types": ["hybrid_sliding"] * 2}, "expected None, 'teacher' or a list of 3 layer types"),
        ({"layer_types": []}, "expected None, 'teacher' or a list of 3 layer types"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention': expected None, 'teacher' or a list"),
        ({"layer_types": ["hybrid_sliding", "mamba", "hybrid_sliding"]}, r"layer_types holds \['mamba'\]"),
        ({"layer_types": ["sliding_attention"] * 3}, "is sliding_attention with a window of None"),
        ({"sliding_window": 0}, "window of 0: expected at least 1 token"),
        ({"num_sink_tokens": -1}, "-1 sink tokens: expected 0 or more"),
        ({"sliding_window": "wide"}, "sliding_window"),
        (
            {"dtype": "int8"},
            "dtype='int8': expected None or 'auto' for the teacher's own, or one of float64, float32, bfloat16, float16",
        ),
        ({"hidden_size": 64}, r"cannot set \['hidden_size'\], only \[.*'mlstm_context'"),
        ({"mlstm_contxt": 64}, r"cannot set \['mlstm_contxt'\]"),
        ({"shard_bytes": 0}, "shard_bytes=0: expected a positive number of bytes"),
    ],
)
def test_arguments_that_describe_no_student_are_refused(arguments, message, llama, tmp_path):
    with pytest.raises(ConfigError, match=message):
        convert(llama, tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_configuration_that_its_own_class_divides_by_nothing_with_is_refused(llama, tmp_path):
    edit_config(llama, model_type="smollm3", no_rope_layer_interval=0)
    with pytest.raises(CheckpointError, match="not a smollm3 configuration .*modulo by zero"):
        convert(llama, tmp_path / "out")


def test_models_in_memory_are_refused_for_the_same_reasons():
    with pytest.raises(UnsupportedTeacherError, match="model_type 'gpt2'"):
        XLSTMHybridForCausalLM.from_teacher(
            AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5))
        )
    with torch.device("meta"):
        empty = model_class("llama")(teacher_config("llama"))
    with pytest.raises(
        CheckpointError,
        match="tensors are on the meta device, the first model.embed_tokens.weight; load it without offloading",
    ):
        XLSTMHybridForCausalLM.from_teacher(empty)


def test_weights_that_a_narrower_dtype_cannot_hold_are_refused(llama, tmp_path):
    rewrite(llama, lambda weights: weights | {"model.norm.weight": torch.full((42,), 1e6)})
    message = r"model.norm.weight \(torch.float32\) holds values that are not finite in torch.float16; choose a dtype of a wider range"
    with pytest.raises(CheckpointError, match=message):
        convert(llama, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_nothing(llama, tmp_path, monkeypatch):
    written = []

    def save(tensors, path, values):
        if len(written) == 2:
            raise OSError("disk full")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(xlstm_hybrid.conversion.convert, "save_weights", save)
    with pytest.raises(CheckpointWriteError, match="disk full"):
        convert(llama, tmp_path / "out", shard_bytes=30_000)
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_an_existing_directory_is_replaced_only_if_asked_and_the_teacher_never(llama, tmp_path):
    convert(llama, tmp_path / "out", layer_types="teacher")
    with pytest.raises(CheckpointError, match="out exists already"):
        convert(llama, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == ["full_attention"] * 3
    convert(llama, tmp_path / "out", overwrite=True)
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == ["hybrid_sliding"] * 3
    for place in (llama, tmp_path):
        with pytest.raises(CheckpointWriteError, match="holds the teacher llama; choose another directory"):
            convert(llama, place, overwrite=True)
    assert stored(llama).keys() == dict(teacher("llama").named_parameters()).keys()


def test_a_tokenizer_file_that_links_out_of_the_checkpoint_is_refused(llama, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (llama / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="llama/vocab.json: links to a file outside of the checkpoint"):
        convert(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offline_an_id_that_is_not_cached_is_one_named_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = r"teacher 'someone/nowhere' \(revision v2\): no such directory, and the Hub gave nothing.*HF_HUB_OFFLINE"
    with pytest.raises(CheckpointError, match=message):
        convert("someone/nowhere", tmp_path / "out", revision="v2")
    with pytest.raises(CheckpointError, match="'/no/such/place': no such directory, and not a Hub id"):
        convert("/no/such/place", tmp_path / "out")
    with pytest.raises(
        ConfigError, match="expected a directory, a Hub id, a GGUF file or a transformers model, got int"
    ):
        convert(7, tmp_path / "out")


def test_only_a_hub_id_has_revisions(llama, tmp_path):
    for source in (llama, teacher("llama")):
        with pytest.raises(ConfigError, match="revision='v1': only a Hub id has revisions"):
            convert(source, tmp_path / "out", revision="v1")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tensors": families.TRUNK},
            CheckpointError,
            r"27 without a place .* has no model.layers.\{n\}.input_layernorm.weight: docs/add-teacher-family.md",
        ),
        (
            {"mlp_bias": "mlp_bais"},
            ConfigError,
            "family 'llama', mlp_bias: LlamaConfig has no field 'mlp_bais'; correct",
        ),
        (
            {"traits": {"attention_multiplier": lambda config: config.scaling}},
            ConfigError,
            "family 'llama', attention_multiplier: LlamaConfig has no field 'scaling'",
        ),
    ],
    ids=["a table", "a field", "a function"],
)
def test_what_a_family_of_ones_own_lacks_is_named(changes, error, message, llama, tmp_path, monkeypatch):
    changed = families.replace(families.FAMILIES["llama"], **changes)
    monkeypatch.setitem(families.FAMILIES, "llama", changed)
    with pytest.raises(error, match=message):
        convert(llama, tmp_path / "out")
