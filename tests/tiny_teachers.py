"""Tiny random teachers of every family, made with transformers' own classes: large weights, so that attention is peaky,
and awkward shapes.
"""

import functools
import importlib
import json

import torch
import transformers
from conftest import enlarge
from safetensors.torch import load_file, save_file

SHARED = {
    "vocab_size": 101,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.02,
    "hidden_act": "gelu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {  # every hidden size but Llama's, which insists, is no multiple of the heads; none is heads * head_dim
    "llama": ("Llama", {"hidden_size": 42, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"hidden_size": 50}),
    "qwen2": (
        "Qwen2",
        {"hidden_size": 50, "use_sliding_window": True, "layer_types": MIXED, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"hidden_size": 50, "use_sliding_window": True, "layer_types": MIXED, "attention_bias": True}),
    "olmo2": ("Olmo2", {"hidden_size": 50, "attention_bias": True}),
    "olmo3": ("Olmo3", {"hidden_size": 50, "layer_types": MIXED, "tie_word_embeddings": True}),
}
WINDOWED = ("mistral", "qwen2", "qwen3", "olmo3", "ministral", "qwen3_moe", "gemma3_text")
LINEAR = {  # before each layer of attention one of linear attention
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 31,
}
# Families that repeat the path of one above, but for what `configuration.TRAITS` names: they are not in the tests that go
# over families, stacks and RoPE variants at once, see `model/test_traits.py`
WITH_TRAITS = {
    "ministral": ("Ministral", {"hidden_size": 50, "layer_types": MIXED}),
    "smollm3": ("SmolLM3", {"hidden_size": 50, "no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": False}),
    "granite": (
        "Granite",
        {
            "hidden_size": 50,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 2.5,
            "residual_multiplier": 0.75,
            "attention_multiplier": 0.5,
            "logits_scaling": 1.5,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "hidden_size": 42,
            "layer_types": MIXED,
            "hidden_activation": "gelu",
            "attention_bias": True,
            "query_pre_attn_scalar": 5,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "hidden_size": 50,
            "use_sliding_window": True,
            "attention_bias": True,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "hidden_size": 50,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 31,
            "mlp_only_layers": [0],
        },
    ),
    "olmo_hybrid": ("OlmoHybrid", {"hidden_size": 50, "attention_bias": True, **LINEAR}),
    "qwen3_5_text": ("Qwen3_5", {"hidden_size": 50, "attention_bias": True, **LINEAR}),
    "qwen3_next": ("Qwen3Next", {"hidden_size": 50, **LINEAR, **EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {"hidden_size": 50, **LINEAR, **EXPERTS}),
    "olmoe": (
        "Olmoe",
        {
            "hidden_size": 60,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "attention_bias": True,
            "clip_qkv": None,
        },
    ),
}
WITH_LINEAR = {  # and whose linear attention the student has
    "olmo_hybrid": "olmo_hybrid",
    "qwen3_5_text": "qwen3_5",
    "qwen3_next": "qwen3_next",
    "qwen3_5_moe_text": "qwen3_5",
}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}
PARTIAL = {"qwen3_5_text": 0.6, "qwen3_next": 0.4, "qwen3_5_moe_text": 0.6}  # of a head's 10 dims so many rotate
EVERY = FAMILIES | WITH_TRAITS
ROPES = {  # with 45 tokens all of them are past their original context
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def rope_parameters(family, rope):
    scaled = {**ROPES[rope], "rope_theta": 5000.0}
    if family in PARTIAL:
        scaled["partial_rotary_factor"] = PARTIAL[family]
    return (
        {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}
        if family in ("olmo3", "gemma3_text")
        else scaled
    )


def tokens(length=45, rows=2):
    return (torch.arange(rows * length) ** 2 % 97).view(rows, length)


def teacher_config(family, rope="default", window=7, **changes):
    name, fields = EVERY[family]
    fields = {**SHARED, **fields, "rope_parameters": rope_parameters(family, rope)}
    if family in WINDOWED:
        fields["sliding_window"] = window
    if rope == "dynamic":
        fields["max_position_embeddings"] = 32  # it scales past this
    return getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**{**fields, **changes})


def model_class(family):
    return getattr(transformers, f"{EVERY[family][0]}ForCausalLM")


def one_by_one(model):
    """The model with one expert after the other: in float64, and with our awkward widths, transformers' default fails."""
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model


@functools.cache
def teacher(family, rope="default", window=7, tied=None):
    """The same model for the same arguments: tests read it only."""
    changes = {} if tied is None else {"tie_word_embeddings": tied}
    return one_by_one(enlarge(model_class(family)(teacher_config(family, rope, window, **changes))).eval())


class Double:
    """torch, with a float32 that is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_float64(monkeypatch, family):
    """Let the linear attention of a family calculate in float64: then what differs is not rounding."""
    if family in WITH_LINEAR:
        kind = WITH_LINEAR[family]
        monkeypatch.setattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), "torch", Double())


def stored(directory):
    """All tensors of a checkpoint directory."""
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}


def edit_config(directory, **changes):
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def rewrite(directory, change):
    """Replace the weights of a directory by `change(weights)`, in one file."""
    weights = change(stored(directory))
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    save_file(
        {name: x.contiguous() for name, x in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
