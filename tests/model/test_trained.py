"""A checkpoint says what its weights were trained with: whoever loads it with other settings is told, by whatever way it
came.
"""

import inspect
import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_student, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_teachers import edit_config, stored
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from xlstm_hybrid import DistilXLSTMConfig, DistilXLSTMForCausalLM, XLSTMHybridConfig, convert
from xlstm_hybrid.checkpoint.weights import write_weights
from xlstm_hybrid.errors import CheckpointError, ConfigWarning, MergeError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.model.configuration import INDIFFERENT
from xlstm_hybrid.model.trained import KEY, recorded_values, trained_values

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
KINDS = {
    "layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"],
    "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "teacher_sliding_window": 5,
}
KEPT = {"kept_groups": [[0], [], []]}
LOG = KEPT | {"kept_positions": "log"}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "layer_types": ["linear_attention", "hybrid_sliding", "hybrid_sliding"],
    "teacher_layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_attention": "olmo_hybrid",
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
EDITS = {  # field: (what the student was trained with, another value)
    "vocab_size": ({}, 62),
    "hidden_size": ({}, 64),
    "intermediate_size": ({}, 64),
    "num_hidden_layers": ({}, 2),
    "num_attention_heads": ({}, 2),
    "num_key_value_heads": ({}, 4),
    "head_dim": ({}, 24),
    "hidden_act": ({}, "gelu"),
    "max_position_embeddings": (DYNAMIC | {"max_position_embeddings": 16}, 24),
    "initializer_range": ({}, 0.5),
    "rms_norm_eps": ({}, 0.1),
    "use_cache": ({}, False),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, False),
    "rope_parameters": ({}, {"rope_type": "default", "rope_theta": 1000.0}),
    "attention_bias": ({}, False),
    "attention_output_bias": ({}, True),
    "mlp_bias": ({}, True),
    "attention_dropout": ({}, 0.5),
    "pad_token_id": ({}, 7),
    "bos_token_id": ({}, 7),
    "eos_token_id": ({}, 7),
    "qk_norm": ({}, "head"),
    "norm_position": ({}, "post"),
    "rope_layers": ({}, [True, False, True]),
    "embedding_multiplier": ({}, 2.5),
    "residual_multiplier": ({}, 0.5),
    "attention_multiplier": ({}, 0.75),
    "logits_scaling": ({}, 2.0),
    "final_logit_softcapping": ({}, 2.0),
    "norm_plus_one": ({}, True),
    "attention_output_gate": ({}, True),
    "num_experts": (MOE, 3),
    "num_experts_per_tok": (MOE, 1),
    "norm_topk_prob": (MOE, True),
    "moe_intermediate_size": (MOE, 32),
    "shared_expert_intermediate_size": (MOE, 16),
    "mlp_only_layers": (MOE, [1]),
    "output_router_logits": (MOE, True),
    "router_aux_loss_coef": (MOE, 0.5),
    "linear_attention": (LINEAR, "qwen3_next"),
    "linear_num_key_heads": (LINEAR, 4),
    "linear_num_value_heads": (LINEAR, 2),
    "linear_key_head_dim": (LINEAR, 8),
    "linear_value_head_dim": (LINEAR, 6),
    "linear_conv_kernel_dim": (LINEAR, 3),
    "linear_allow_neg_eigval": (LINEAR, True),
    "layer_types": (KINDS, ["hybrid_sliding", "sliding_attention", "sliding_attention"]),
    "teacher_layer_types": (KINDS | KEPT, ["sliding_attention", "full_attention", "sliding_attention"]),
    "teacher_sliding_window": (KINDS, 8),
    "sliding_window": ({}, 8),
    "num_sink_tokens": ({}, 2),
    "layer_windows": ({}, [7, 9, 7]),
    "layer_sinks": ({}, [3, 0, 3]),
    "kept_groups": (KEPT, [[1], [], []]),
    "kept_positions": (KEPT, "log"),
    "kept_log_base": (LOG, 20),
    "sparse_memory": ({}, 2),
    "sparse_memory_score": ({"sparse_memory": 3}, "recency"),
    "teacher_model_type": ({}, "llama"),
    "mlstm_context": ({}, 999),
    "mlstm_output_gate_bias": ({}, 1.0),
    "mlstm_chunk_size": ({}, 5),
    "mixer_branches": ({}, "window"),
    "window_dropout": ({}, 0.5),
    "memory_cell": ({}, "delta"),
    "memory_rope": ({}, False),
    "memory_feature_map": ({"memory_cell": "delta", "memory_feature_map": "softmax"}, "silu"),
    "memory_feature_dim": ({}, 8),
    "mixer_norm": ({}, True),
    "mixer_combine": ({"memory_cell": "linear"}, "joint"),
    "mixer_gate_input": ({}, "x"),
}
IDS = token_ids(2, 40)


def load(directory, cls=AutoModelForCausalLM, **changes):
    """`(model, messages of ConfigWarning)`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = cls.from_pretrained(directory, **changes)
    return model, [str(w.message) for w in caught if w.category.__name__ == "ConfigWarning"]


def metadata(directory):
    return {file.name: safe_open(file, "pt").metadata() for file in sorted(Path(directory).glob("*.safetensors"))}


@pytest.fixture
def student(tmp_path):
    tiny_student(torch.float32).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


# --- which fields ------------------------------------------------------------------------------------------------


def test_every_field_of_the_configuration_is_either_recorded_or_known_to_change_nothing():
    assert set(EDITS) == set(inspect.get_annotations(XLSTMHybridConfig))
    recorded = trained_values(tiny_config(**DYNAMIC))
    assert set(recorded) == set(EDITS) - INDIFFERENT and "sliding_window" in recorded
    assert set(trained_values(tiny_config())) == set(recorded) - {"max_position_embeddings"}


@pytest.mark.parametrize("field", EDITS)
@torch.no_grad()
def test_an_edit_that_changes_the_logits_is_told_and_no_other(tmp_path, field):
    trained, value = EDITS[field]
    model = tiny_student(torch.float32, **trained)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: value})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            edited, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        except (RuntimeError, ValueError):
            assert field not in INDIFFERENT  # its shapes are others: transformers says so
            return
    told = [str(w.message) for w in caught if w.category is ConfigWarning]
    if field in INDIFFERENT:
        assert not told
        torch.testing.assert_close(edited(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    else:
        assert len(told) == 1 and f"{field} was " in told[0] and told[0].count(" in training, is ") == 1
        if not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            assert (edited(IDS).logits - model(IDS).logits).abs().max() > 1e-2


def test_a_longer_context_is_an_edit_only_where_the_positions_depend_on_it(student):
    edit_config(student, max_position_embeddings=99999)
    assert not load(student)[1]


# --- who is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_every_class_says_both_values_once(student, cls):
    assert not load(student, cls)[1]
    edit_config(student, sliding_window=5, num_sink_tokens=0)
    (told,) = load(student, cls)[1]
    assert told.startswith("student: num_sink_tokens was 3 in training, is 0; sliding_window was 7 in training, is 5")


def test_an_argument_is_an_edit_too_until_the_model_is_saved_with_it(student, tmp_path):
    model, told = load(student, sliding_window=5)
    assert "sliding_window was 7 in training, is 5" in told[0]
    model.save_pretrained(tmp_path / "trained")
    again, told = load(tmp_path / "trained")
    assert again.config.sliding_window == 5 and not told
    assert "sliding_window was 5 in training, is 7" in load(tmp_path / "trained", sliding_window=7)[1][0]
    model.config.num_sink_tokens = 1
    model.save_pretrained(tmp_path / "trained")
    assert recorded_values((tmp_path / "trained").glob("*.safetensors"))["num_sink_tokens"] == 1


def test_a_configuration_that_is_saved_alone_hides_nothing(student):
    model = load(student)[0]
    model.config.sliding_window = 5
    model.config.save_pretrained(student)
    assert "sliding_window was 7 in training, is 5" in load(student)[1][0]


def test_where_nothing_is_known_nothing_is_said(student):
    weights = load_file(student / "model.safetensors")
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    edit_config(student, sliding_window=5)
    model, told = load(student)
    assert not told and model.trained_with == {}


def test_fields_of_another_version_are_passed_over_and_a_damaged_record_is_named(student):
    file = student / "model.safetensors"
    weights, values = load_file(file), recorded_values([file])
    notes = {"format": "pt", KEY: json.dumps(values | {"not_yet_known": 3})}
    save_file(weights, file, metadata=notes)
    assert not load(student)[1]
    for damaged in ("{", "3", "[" * 10**5):
        save_file(weights, file, metadata={"format": "pt", KEY: damaged})
        with pytest.raises(CheckpointError, match=r"model.safetensors: xlstm_hybrid.trained_with in its header"):
            load(student)


def test_the_recurrent_student_is_told_as_well(tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    DistilXLSTMForCausalLM(DistilXLSTMConfig(**shape, slstm_intermediate_size=32)).save_pretrained(tmp_path)
    assert not load(tmp_path)[1]
    edit_config(tmp_path, freeze_embeddings=False, mlstm_chunk_size=8)
    assert not load(tmp_path)[1]
    edit_config(tmp_path, slstm_forget_gate="exp")
    assert "slstm_forget_gate was 'sigmoid' in training, is 'exp'" in load(tmp_path)[1][0]


# --- what carries the record -------------------------------------------------------------------------------------


def test_every_shard_has_it_and_one_is_enough(tmp_path):
    model = tiny_student(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    notes = metadata(tmp_path)
    assert len(notes) > 2 and all(json.loads(note[KEY])["sliding_window"] == 7 for note in notes.values())
    edit_config(tmp_path, sliding_window=5)
    for file in sorted(tmp_path.glob("*.safetensors"))[1:]:  # others rewritten by a tool that drops it
        save_file(load_file(file), file, metadata={"format": "pt"})
    assert "sliding_window was 7 in training, is 5" in load(tmp_path)[1][0]


def test_equal_models_are_equal_files(tmp_path):
    model = tiny_student(torch.float32)
    for j in range(8):
        model.save_pretrained(tmp_path / str(j))
    contents = {(tmp_path / str(j) / "model.safetensors").read_bytes() for j in range(8)}
    assert len(contents) == 1


def test_the_weights_are_those_that_transformers_writes(student):
    expected = tiny_student(torch.float32).state_dict()
    found = stored(student)
    assert found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())
    assert (student / "model.safetensors").stat().st_size % 8 == 0


def test_a_stock_model_that_is_saved_meanwhile_has_no_such_record(tmp_path, monkeypatch):
    """Only the thread that saves a student writes it."""
    import transformers.modeling_utils as module

    model, original, other = tiny_student(torch.float32), module.safe_save_file, {}

    def slow(tensors, filename, metadata=None):
        thread = threading.Thread(
            target=lambda: module.safe_save_file({"x": torch.ones(2)}, tmp_path / "stock", metadata={"format": "pt"})
        )
        if not other:
            other["once"] = True
            thread.start()
            thread.join()
        original(tensors, filename, metadata=metadata)

    monkeypatch.setattr(module, "safe_save_file", slow)
    model.save_pretrained(tmp_path / "student")
    assert module.safe_save_file is slow
    assert safe_open(tmp_path / "stock", "pt").metadata() == {"format": "pt"}
    assert KEY in metadata(tmp_path / "student")["model.safetensors"]


def test_a_save_that_fails_leaves_transformers_as_it_was(tmp_path):
    import transformers.modeling_utils as module

    original = module.safe_save_file
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(Exception, match=r"irectory|model.safetensors"):
        tiny_student(torch.float32).save_pretrained(tmp_path)
    assert module.safe_save_file is original


def test_conversion_export_and_merge_carry_it(tmp_path):
    convert(TEACHER, tmp_path / "student", sliding_window=16, dtype="float32", shard_bytes=10**5)
    export(tmp_path / "student", tmp_path / "exported")
    AutoTokenizer.from_pretrained(tmp_path / "student").save_pretrained(tmp_path / "trained")
    load(tmp_path / "student")[0].save_pretrained(tmp_path / "trained")
    shutil.copytree(tmp_path / "trained", tmp_path / "twin")
    merge([tmp_path / "trained", tmp_path / "twin"], tmp_path / "merged", unrecorded=True)
    for name in ("student", "exported", "trained", "merged"):
        notes = metadata(tmp_path / name)
        assert all(json.loads(note[KEY])["sliding_window"] == 16 for note in notes.values()), name
        assert not load(tmp_path / name)[1]
        edit_config(tmp_path / name, sliding_window=8)
        assert "sliding_window was 16 in training, is 8" in load(tmp_path / name)[1][0]


def test_experts_of_different_windows_do_not_merge_because_one_was_edited(student, tmp_path):
    tiny_student(torch.float32, sliding_window=5).save_pretrained(tmp_path / "other")
    edit_config(tmp_path / "other", sliding_window=7)
    with pytest.raises(MergeError, match="config sliding_window: trained with 7 in student, with 5 in other"):
        merge([student, tmp_path / "other"], tmp_path / "merged", unrecorded=True)


def test_a_download_from_the_hub_brings_it(student, tmp_path):
    """The Hub's cache: links into a folder of blobs, without our manifest."""
    commit, root = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--me--student"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    snapshot = root / "snapshots" / commit
    edit_config(student, sliding_window=5)
    (root / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for file in student.iterdir():
        shutil.copyfile(file, root / "blobs" / file.name)
        os.symlink(f"../../blobs/{file.name}", snapshot / file.name)
    (told,) = load("me/student", cache_dir=tmp_path)[1]
    assert told.startswith("student: sliding_window was 7 in training, is 5")


def test_writing_of_ours_takes_what_it_is_given(tmp_path):
    write_weights(tmp_path, {"x": [2]}, lambda name: 4, lambda name: torch.ones(2), save_file)
    assert metadata(tmp_path) == {"model.safetensors": None}
