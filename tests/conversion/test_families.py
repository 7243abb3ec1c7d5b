"""The table of each family, proof-read against transformers' own classes."""

import re

import pytest
import torch
from tiny_teachers import EVERY, FAMILIES, MIXED, WITH_LINEAR, model_class, teacher_config

from xlstm_hybrid.conversion.convert import empty_student
from xlstm_hybrid.conversion.families import FAMILIES as TABLES
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.errors import UnsupportedTeacherError
from xlstm_hybrid.model.configuration import TRAITS

FULL = ["full_attention"] * 3
GATED = {"norm_plus_one": True, "attention_output_gate": True}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
LINEAR |= {"linear_key_head_dim": 6, "linear_value_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
every_family = pytest.mark.parametrize("family", EVERY)


@every_family
def test_a_table_names_the_tensors_of_the_teachers_class_and_no_others(family):
    every_option = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    config = teacher_config(
        family, **{name: value for name, value in every_option.items() if hasattr(teacher_config(family), name)}
    )
    with torch.device("meta"):
        names = {re.sub(r"\.\d+\.", ".{n}.", name, count=1) for name in model_class(family)(config).state_dict()}
    table = TABLES[family].tensors
    words = {name: word for name, word in table.items() if isinstance(word, str) and not name.startswith("mtp.")}
    stored = {name for name in table if "_layer_norm." in name}  # what OLMo-Hybrid's checkpoints say for a norm
    assert names == {name for name, targets in table.items() if not isinstance(targets, str)} - stored
    assert set(words.values()) == {"recomputed"} and words.keys() == {
        "model.rotary_emb.inv_freq",
        "model.layers.{n}.self_attn.rotary_emb.inv_freq",
    }


@every_family
def test_fields_that_all_families_share_are_copied(family):
    config, original = student_config(teacher_config(family)), teacher_config(family)
    assert config.hidden_act == getattr(original, "hidden_activation", getattr(original, "hidden_act", None))
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    ):
        if name not in TABLES[family].traits:
            assert getattr(config, name) == getattr(original, name), name
    assert config.teacher_model_type == family
    linear = ["linear_attention", "hybrid_sliding"] * 2
    assert config.layer_types == (linear if family in WITH_LINEAR else ["hybrid_sliding"] * 3)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),  # norm position, QK-norm, biases of q/k/v, o and MLP, layer types, window
    [
        ("llama", {"attention_bias": True, "mlp_bias": False}, ("pre", None, True, True, False, FULL, None)),
        ("llama", {"attention_bias": False, "mlp_bias": True}, ("pre", None, False, False, True, FULL, None)),
        ("mistral", {"sliding_window": None}, ("pre", None, False, False, False, FULL, None)),
        ("mistral", {"sliding_window": 9}, ("pre", None, False, False, False, ["sliding_attention"] * 3, 9)),
        ("qwen2", {}, ("pre", None, True, False, False, MIXED, 7)),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}, ("pre", None, True, False, False, FULL, None)),
        (
            "qwen2",
            {"max_window_layers": 2, "layer_types": None},
            ("pre", None, True, False, False, [*FULL[:2], "sliding_attention"], 7),
        ),
        ("qwen3", {"attention_bias": False}, ("pre", "head", False, False, False, MIXED, 7)),
        ("qwen3", {"attention_bias": True}, ("pre", "head", True, True, False, MIXED, 7)),
        ("olmo2", {"attention_bias": True}, ("post", "full", True, True, False, FULL, None)),
        ("olmo3", {"attention_bias": False}, ("post", "full", False, False, False, MIXED, 7)),
        ("ministral", {}, ("pre", None, False, False, False, MIXED, 7)),
        ("ministral", {"layer_types": None}, ("pre", None, False, False, False, ["sliding_attention"] * 3, 7)),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}, ("pre", None, True, True, True, FULL, None)),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 1]},
            ("pre", None, False, False, False, [FULL[0], "sliding_attention", FULL[0]], 9),
        ),
        ("qwen3_moe", {"attention_bias": False}, ("pre", "head", False, False, False, ["sliding_attention"] * 3, 7)),
        ("qwen3_moe", {"use_sliding_window": False}, ("pre", "head", True, True, False, FULL, None)),
        ("qwen2_moe", {"qkv_bias": False}, ("pre", None, False, False, False, FULL, None)),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            ("pre", None, True, False, False, ["sliding_attention", *FULL[1:]], 9),
        ),
        ("olmoe", {}, ("pre", "full", True, True, False, FULL, None)),
        ("gemma3_text", {"attention_bias": False}, ("both", "head", False, False, False, MIXED, 7)),
        (
            "gemma3_text",
            {"layer_types": None, "sliding_window_pattern": 2},
            ("both", "head", True, True, False, MIXED, 7),
        ),
        ("granite", {"attention_bias": True, "mlp_bias": False}, ("pre", None, True, True, False, FULL, None)),
    ],
)
def test_fields_that_differ_between_families(family, changes, expected):
    config = student_config(teacher_config(family, **changes))
    assert (
        config.norm_position,
        config.qk_norm,
        config.attention_bias,
        config.attention_output_bias,
        config.mlp_bias,
        config.teacher_layer_types,
        config.teacher_sliding_window,
    ) == expected
    assert student_config(teacher_config(family, **changes), layer_types="teacher").layer_types == expected[5]


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("smollm3", {}, {"rope_layers": [True, False, True]}),  # one entry more than layers
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}, {"rope_layers": [True, True, False]}),
        (
            "granite",
            {},
            {
                "embedding_multiplier": 2.5,
                "residual_multiplier": 0.75,
                "attention_multiplier": 0.5,
                "logits_scaling": 1.5,
            },
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [0], "decoder_sparse_step": 2},
            EXPERTS | {"num_experts": 5, "norm_topk_prob": True, "mlp_only_layers": [0, 2]},
        ),
        (
            "qwen2_moe",
            {"num_experts_per_tok": 2},
            EXPERTS | {"num_experts": 5, "shared_expert_intermediate_size": 31, "mlp_only_layers": [0]},
        ),
        ("olmoe", {}, EXPERTS | {"num_experts": 4}),
        ("olmo_hybrid", {}, LINEAR | {"linear_attention": "olmo_hybrid", "linear_allow_neg_eigval": True}),
        (
            "olmo_hybrid",  # as published: no layer rotates
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False},
            LINEAR | {"linear_attention": "olmo_hybrid", "rope_layers": [False] * 4},
        ),
        ("qwen3_5_text", {}, GATED | LINEAR | {"linear_attention": "qwen3_5"}),
        (
            "qwen3_5_moe_text",
            {},
            GATED
            | LINEAR
            | EXPERTS
            | {"linear_attention": "qwen3_5", "num_experts": 5, "shared_expert_intermediate_size": 31}
            | {"norm_topk_prob": True},
        ),
        (
            "qwen3_next",
            {"mlp_only_layers": [], "decoder_sparse_step": 2},
            GATED
            | LINEAR
            | EXPERTS
            | {"linear_attention": "qwen3_next", "num_experts": 5, "shared_expert_intermediate_size": 31}
            | {"norm_topk_prob": True, "mlp_only_layers": [0, 2]},
        ),
        (
            "gemma3_text",
            {"hidden_size": 36, "query_pre_attn_scalar": 4},
            {
                "norm_plus_one": True,
                "embedding_multiplier": 6.0,
                "attention_multiplier": 0.5,
                "final_logit_softcapping": 6.0,
            },
        ),
        *((family, {}, {}) for family in FAMILIES),
    ],
)
def test_traits_are_the_teachers_and_those_of_a_llama_where_it_has_none(family, changes, expected):
    config = student_config(teacher_config(family, **changes))
    assert {name: getattr(config, name) for name in TRAITS} == TRAITS | expected


def test_rope_in_the_old_format_of_config_json_is_read():
    old = TABLES["llama"].config_class.from_dict(
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    rope = student_config(old).rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 5e5, 2.0)


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED = {  # what config.json of a published checkpoint says, in the old format, and how many parameters it has
    "llama": (
        8_030_261_248,
        {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "rope_scaling": LLAMA3,
            "rope_theta": 5e5,
            "max_position_embeddings": 131072,
        },
    ),
    "mistral": (
        7_248_023_552,
        {"vocab_size": 32768, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": None},
    ),
    "qwen2": (
        7_615_616_512,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_key_value_heads": 4,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    "qwen3": (
        8_190_735_360,
        {
            "vocab_size": 151936,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "ministral": (
        8_019_808_256,
        {
            "vocab_size": 131072,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": 32768,
        },
    ),
    "smollm3": (
        3_075_098_624,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
    ),
    "granite": (
        8_170_848_256,
        {
            "vocab_size": 49155,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "residual_multiplier": 0.22,
        },
    ),
    "qwen3_moe": (  # A3B
        30_532_122_624,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "qwen2_moe": (  # A2.7B
        14_315_784_192,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
    ),
    "olmoe": (  # 1B-7B
        6_919_161_856,
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
        },
    ),
    "gemma3_text": (  # 1B
        999_885_952,
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "olmo2": (7_298_617_344, {"vocab_size": 100352, "intermediate_size": 11008}),
    "olmo3": (
        7_298_011_136,
        {
            "vocab_size": 100278,
            "intermediate_size": 11008,
            "max_position_embeddings": 65536,
            "rope_theta": 5e5,
            "rope_scaling": YARN,
        },
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_student_of_a_published_teacher_has_its_parameters_and_a_little_more(family):
    published, fields = PUBLISHED[family]
    shared = {"model_type": family, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = student_config(TABLES[family].config_class.from_dict(shared | fields))
    model = empty_student(config)
    sizes = {name: x.numel() for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}
    new = sum(size for name, size in sizes.items() if ".mlstm." in name)
    assert sum(sizes.values()) - new == published
    assert (0.0005 if config.num_experts else 0.004) < new / published < 0.015
    if family == "olmo3":
        assert [config.rope_parameters_of(kind)["rope_type"] for kind in config.teacher_layer_types[:5]] == [
            "default"
        ] * 3 + ["yarn", "default"]


def test_head_dim_is_hidden_size_over_heads_where_the_teacher_has_no_such_field():
    config = teacher_config("qwen2")
    del config.head_dim
    assert student_config(config).head_dim == 50 // 6


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "smollm3",
            {"layer_types": MIXED, "sliding_window": 7},
            "are ignored by this family, whose layers are all full",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, expected None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, expected None"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a number above 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a number above 0"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a number above 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, expected None: the student has no such thing"),
        ("mistral", {"layer_types": MIXED}, "are ignored by this family, whose layers are all sliding_attention"),
        ("qwen2", {"use_sliding_window": False}, "has sliding_attention layers and sliding_window=None"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            r"layer_types holds \['chunked_attention'\]",
        ),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}
                }
            },
            "truncate=False has no effect in nested parameters",
        ),
    ],
)
def test_a_teacher_whose_configuration_says_what_its_model_does_not_do_is_refused(family, changes, message):
    with pytest.raises(UnsupportedTeacherError, match=message):
        student_config(teacher_config(family, **changes))
