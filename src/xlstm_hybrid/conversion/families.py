"""Teacher families: for each, which tensor becomes which, and which field of its configuration sets which of ours.

Proof-read a family beside its `modeling_*.py` and `configuration_*.py` in transformers. `{n}` stands for a layer's
number.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OlmoHybridConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

from xlstm_hybrid.checkpoint.kinds import RESAVE
from xlstm_hybrid.errors import ConfigError, UnsupportedTeacherError
from xlstm_hybrid.model.configuration import LAYER_TYPES, LINEAR_SIZES, TEACHER_LAYER_TYPES, XLSTMHybridConfig

STUDENTS = ("xlstm_hybrid", "distil_xlstm")  # model_type of what conversion makes
FP8 = "FineGrainedFP8Config(dequantize=True)"
DEQUANTISE = {  # quant_method -> what undoes it, where transformers can
    "bitsandbytes": "M.from_pretrained('DIR').dequantize().save_pretrained('OUT')",
    "fp8": f"M.from_pretrained('DIR', quantization_config=transformers.{FP8}, dtype='bfloat16').save_pretrained('OUT')",
    "gguf": "XLSTMHybridForCausalLM.from_teacher('DIR', gguf_file='NAME.gguf'), or xlstm-hybrid convert DIR/NAME.gguf OUT",
}
# of RoPE: which dims follow a picture's rows and columns; in text all of them count tokens
OF_PICTURES = ("mrope_section", "mrope_interleaved")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def all_full(config):
    return ["full_attention"] * config.num_hidden_layers


def one_kind(config):
    """Mistral: a sliding window, where set, is that of every layer."""
    return ["full_attention" if config.sliding_window is None else "sliding_attention"] * config.num_hidden_layers


def per_layer(config):
    return list(config.layer_types)


def per_layer_if_used(config):
    """SmolLM3: `layer_types` count only with `use_sliding_window`."""
    return per_layer(config) if config.use_sliding_window else all_full(config)


def rotating(config):
    """SmolLM3: 1 for each layer with RoPE, and maybe more entries than layers."""
    return [bool(rotates) for rotates in config.no_rope_layers[: config.num_hidden_layers]]


def root_of_width(config):
    """Gemma 3: the square root of the hidden size, which its model holds in float32."""
    return torch.tensor(config.hidden_size**0.5, dtype=torch.float32).item()


def layers_without_experts(config):
    """Qwen's two ways to say it, and both count."""
    layers, step = range(config.num_hidden_layers), config.decoder_sparse_step
    return [j for j in layers if j in config.mlp_only_layers or (j + 1) % step]


def rotating_if_theta(config):
    """OLMo-Hybrid: without a theta no layer rotates."""
    return None if config.rope_parameters.get("rope_theta") is not None else [False] * config.num_hidden_layers


def rope_or_unused(config):
    """OLMo-Hybrid: without a theta, parameters of a RoPE with which no layer rotates."""
    rope = config.rope_parameters
    return rope if rope.get("rope_theta") is not None else {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """One teacher family.

    layer_types: from the teacher's configuration to each layer's attention type.
    tensors: teacher -> students, as far as the configuration asks for them; a word: what becomes of it, not loaded.
    partial_rotary: whether the teacher's model reads `partial_rotary_factor`: only the first dims of a head rotate.
    The three biases are values, or the name of the teacher's field that holds the value.
    traits: what a Llama does not have, {field of the student: name of the teacher's field, or a function of its
        configuration}; `configuration.TRAITS` lists the fields, each of which is tested on its own.
    """

    config_class: type
    layer_types: Callable
    tensors: dict
    norm_position: str = "pre"
    qk_norm: str | None = None
    attention_bias: bool | str = False
    attention_output_bias: bool | str = False
    mlp_bias: bool | str = False
    partial_rotary: bool = False
    traits: dict = field(default_factory=dict)

    def fields(self, config):
        """The student's fields that differ between families, from the teacher's configuration."""
        fields = {"norm_position": self.norm_position, "qk_norm": self.qk_norm}
        kinds = self.read(config, "layer_types", self.layer_types)
        for name in ("attention_bias", "attention_output_bias", "mlp_bias"):
            value = getattr(self, name)
            fields[name] = self.read(config, name, value) if isinstance(value, str) else value
        for name, source in self.traits.items():
            fields[name] = self.read(config, name, source)
        window = config.sliding_window if "sliding_attention" in kinds else None
        return fields | {"teacher_layer_types": kinds, "teacher_sliding_window": window}

    def read(self, config, name, source):
        """The student's field `name` from the teacher's configuration, by a function of it or the name of its field.

        Raises:
            ConfigError: the configuration has no such field.
        """
        try:
            return source(config) if callable(source) else getattr(config, source)
        except AttributeError as error:
            raise ConfigError(
                f"family {config.model_type!r}, {name}: {type(config).__name__} has no field {error.name!r}; correct the "
                "family's entry, as docs/add-teacher-family.md shows"
            ) from error


def same(*names):
    """Tensors that the student has under the teacher's name."""
    return {name: [name] for name in names}


def in_layers(*names):
    """The same of every layer."""
    return same(*(f"model.layers.{{n}}.{name}" for name in names))


def with_drafts(tensors):
    """The same table for checkpoints with layers that predict several tokens, which transformers leaves out, too."""
    layers = [name.replace("model.layers", "mtp.layers") for name in tensors if "{n}" in name]
    own = [f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")]
    return tensors | dict.fromkeys([*layers, *own], "left out")


def copied(*names):
    """Traits that are fields of the teacher under the same names."""
    return {name: name for name in names}


def linear_of(kind):
    """Traits of a family whose linear attention is that of `configuration.LINEAR_ATTENTION[kind]`."""
    return copied(*LINEAR_SIZES) | {"linear_attention": lambda config: kind}


WITHOUT_MLP = {
    **same("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    # window attention and mLSTM share the four projections
    **in_layers(*(f"self_attn.{name}_proj.weight" for name in "qkvo")),
    "model.rotary_emb.inv_freq": "recomputed",  # buffers of RoPE, stored by old versions of transformers
    "model.layers.{n}.self_attn.rotary_emb.inv_freq": "recomputed",
}
TRUNK = WITHOUT_MLP | in_layers("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
PRE_NORMS = in_layers("input_layernorm.weight", "post_attention_layernorm.weight")
POST_NORMS = in_layers("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
BOTH_NORMS = PRE_NORMS | POST_NORMS | in_layers("pre_feedforward_layernorm.weight")
QK_NORMS = in_layers("self_attn.q_norm.weight", "self_attn.k_norm.weight")
QKV_BIASES = in_layers("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
O_BIAS = in_layers("self_attn.o_proj.bias")
MLP_BIASES = in_layers("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
# as in transformers' models; in checkpoints each expert has tensors of its own, which `source.DirectoryTeacher` joins
EXPERTS = in_layers("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SHARED_EXPERT = in_layers(
    *(f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")), "mlp.shared_expert_gate.weight"
)
# in OLMo-Hybrid's checkpoints the norms of linear layers have other names; transformers writes the second for every layer
OLMO_HYBRID_NORMS = {
    f"model.layers.{{n}}.{stored}.weight": [f"model.layers.{{n}}.{name}.weight"]
    for stored, name in (
        ("attention_layer_norm", "input_layernorm"),
        ("feedforward_layer_norm", "post_attention_layernorm"),
    )
}
# three convolutions of a checkpoint, which `source.DirectoryTeacher` joins, are one here
GATED_DELTA = in_layers("linear_attn.conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias")
OLMO_LINEAR = GATED_DELTA | in_layers(
    *(f"linear_attn.{name}_proj.weight" for name in "qkvabgo"), "linear_attn.o_norm.weight"
)
QWEN_LINEAR = GATED_DELTA | in_layers("linear_attn.norm.weight", "linear_attn.out_proj.weight")
QWEN3_5_LINEAR = QWEN_LINEAR | in_layers(*(f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")))
QWEN3_NEXT_LINEAR = QWEN_LINEAR | in_layers(*(f"linear_attn.in_proj_{name}.weight" for name in ("qkvz", "ba")))

# traits
CHOICE_OF_EXPERTS = copied("num_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")
QWEN_EXPERTS = CHOICE_OF_EXPERTS | copied("moe_intermediate_size") | {"mlp_only_layers": layers_without_experts}
# what Qwen3-Next and Qwen3.5 share: attention with a gate on its output, norms with 1 + weight
GATED = {"norm_plus_one": lambda config: True, "attention_output_gate": lambda config: True}

FAMILIES = {
    "llama": Family(
        LlamaConfig,
        attention_bias="attention_bias",
        attention_output_bias="attention_bias",
        mlp_bias="mlp_bias",
        layer_types=all_full,
        tensors=TRUNK | PRE_NORMS | QKV_BIASES | O_BIAS | MLP_BIASES,
    ),
    "mistral": Family(MistralConfig, layer_types=one_kind, tensors=TRUNK | PRE_NORMS),
    "qwen2": Family(Qwen2Config, attention_bias=True, layer_types=per_layer, tensors=TRUNK | PRE_NORMS | QKV_BIASES),
    "qwen3": Family(
        Qwen3Config,
        qk_norm="head",
        attention_bias="attention_bias",
        attention_output_bias="attention_bias",
        layer_types=per_layer,
        tensors=TRUNK | PRE_NORMS | QK_NORMS | QKV_BIASES | O_BIAS,
    ),
    "olmo2": Family(
        Olmo2Config,
        norm_position="post",
        qk_norm="full",
        attention_bias="attention_bias",
        attention_output_bias="attention_bias",
        layer_types=all_full,
        tensors=TRUNK | POST_NORMS | QK_NORMS | QKV_BIASES | O_BIAS,
    ),
}
FAMILIES["olmo3"] = replace(FAMILIES["olmo2"], config_class=Olmo3Config, layer_types=per_layer)
FAMILIES["ministral"] = replace(FAMILIES["mistral"], config_class=MinistralConfig, layer_types=per_layer)
FAMILIES["smollm3"] = replace(
    FAMILIES["llama"], config_class=SmolLM3Config, layer_types=per_layer_if_used, traits={"rope_layers": rotating}
)
FAMILIES["granite"] = replace(
    FAMILIES["llama"],
    config_class=GraniteConfig,
    traits=copied("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)
FAMILIES["qwen3_moe"] = replace(
    FAMILIES["qwen3"],
    config_class=Qwen3MoeConfig,
    layer_types=one_kind,
    tensors=FAMILIES["qwen3"].tensors | EXPERTS,
    traits=QWEN_EXPERTS,
)
FAMILIES["qwen2_moe"] = replace(
    FAMILIES["qwen2"],
    config_class=Qwen2MoeConfig,
    attention_bias="qkv_bias",
    tensors=FAMILIES["qwen2"].tensors | EXPERTS | SHARED_EXPERT,
    traits=QWEN_EXPERTS | copied("shared_expert_intermediate_size"),
)
FAMILIES["olmoe"] = Family(
    OlmoeConfig,
    qk_norm="full",
    attention_bias="attention_bias",
    attention_output_bias="attention_bias",
    layer_types=all_full,
    tensors=WITHOUT_MLP | EXPERTS | PRE_NORMS | QK_NORMS | QKV_BIASES | O_BIAS,
    traits=CHOICE_OF_EXPERTS | {"moe_intermediate_size": "intermediate_size"},
)
FAMILIES["gemma3_text"] = Family(
    Gemma3TextConfig,
    norm_position="both",
    qk_norm="head",
    attention_bias="attention_bias",
    attention_output_bias="attention_bias",
    layer_types=per_layer,
    tensors=TRUNK | BOTH_NORMS | QK_NORMS | QKV_BIASES | O_BIAS,
    traits={
        **copied("final_logit_softcapping"),
        "hidden_act": "hidden_activation",
        "norm_plus_one": lambda config: True,
        "embedding_multiplier": root_of_width,
        "attention_multiplier": lambda config: config.query_pre_attn_scalar**-0.5,
    },
)
FAMILIES["olmo_hybrid"] = replace(
    FAMILIES["olmo3"],
    config_class=OlmoHybridConfig,
    tensors=FAMILIES["olmo3"].tensors | PRE_NORMS | OLMO_HYBRID_NORMS | OLMO_LINEAR,
    traits={
        **linear_of("olmo_hybrid"),
        **copied("linear_allow_neg_eigval"),
        "rope_layers": rotating_if_theta,
        "rope_parameters": rope_or_unused,
    },
)
FAMILIES["qwen3_5_text"] = replace(
    FAMILIES["qwen3"],
    config_class=Qwen3_5TextConfig,
    partial_rotary=True,
    tensors=with_drafts(FAMILIES["qwen3"].tensors | QWEN3_5_LINEAR),
    traits=GATED | linear_of("qwen3_5"),
)
FAMILIES["qwen3_5_moe_text"] = replace(
    FAMILIES["qwen3_5_text"],
    config_class=Qwen3_5MoeTextConfig,
    tensors=with_drafts(
        WITHOUT_MLP | EXPERTS | SHARED_EXPERT | PRE_NORMS | QK_NORMS | QKV_BIASES | O_BIAS | QWEN3_5_LINEAR
    ),
    traits={
        **FAMILIES["qwen3_5_text"].traits,
        **CHOICE_OF_EXPERTS,
        **copied("moe_intermediate_size", "shared_expert_intermediate_size"),
        "norm_topk_prob": lambda config: True,
        "intermediate_size": "moe_intermediate_size",  # no layer is without experts
    },
)
FAMILIES["qwen3_next"] = replace(
    FAMILIES["qwen3_5_text"],
    config_class=Qwen3NextConfig,
    tensors=with_drafts(FAMILIES["qwen3"].tensors | EXPERTS | SHARED_EXPERT | QWEN3_NEXT_LINEAR),
    traits=GATED | linear_of("qwen3_next") | FAMILIES["qwen2_moe"].traits,
)
# Fields that change what a teacher calculates and that the student has nothing for, {family: {field: what it may be}}
WITHOUT = {
    "olmoe": {"clip_qkv": (None,)},
    "gemma3_text": {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
}
# fields that a trait divides by, or takes a root of
ABOVE_ZERO = {
    "gemma3_text": "query_pre_attn_scalar",
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "qwen3_next"), "decoder_sparse_step"),
}
PICTURES = "pictures beside text"
# families whose text model transformers writes under `model.language_model.`, and reads there
BESIDE_PICTURES = ("qwen3_5_text", "qwen3_5_moe_text")
# of some families with pictures: what writes the text model
TEXT_MODEL = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), RESAVE.format("'DIR', dtype='auto'")),
    # AutoModelForCausalLM is the whole model here, and with the text's configuration its weights are random
    "gemma3": 'python -c "import transformers as t; '
    "m = t.AutoModelForImageTextToText.from_pretrained('DIR', dtype='auto'); "
    "x = t.AutoModelForCausalLM.from_config(m.config.text_config); "
    "x.model, x.lm_head, x.generation_config = m.model.language_model, m.lm_head, m.generation_config; "
    "x.save_pretrained('OUT')\", and copy the tokenizer's files to OUT",
}
REFUSED = {  # families that one may well ask for, and what they have that no student has
    **dict.fromkeys(("gemma3", "mistral3", "qwen3_5", "qwen3_5_moe"), PICTURES),
    "gemma2": "attention scores with a cap",
    "ministral3": "queries that are scaled by their position",
}
# Fields that have one name and one meaning in all families and in the student
EVERY_FAMILY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def family_of(config):
    """The `Family` of a teacher's configuration.

    Raises:
        UnsupportedTeacherError: no table for its model_type, quantised weights, a RoPE, a layer type or a field of
            `WITHOUT` that we do not have, or a field of `ABOVE_ZERO` that is not.
    """
    kind = getattr(config, "model_type", None)
    if kind in STUDENTS:
        raise UnsupportedTeacherError(
            f"teacher configuration: model_type {kind!r} is a student, made by a conversion already; go on with it (align, "
            "distill), or convert the Transformer that its provenance.json names"
        )
    if kind in REFUSED and kind not in FAMILIES:
        text = f"convert its text model, which this writes: {TEXT_MODEL[kind]}; or " if kind in TEXT_MODEL else ""
        raise UnsupportedTeacherError(
            f"teacher configuration: model_type {kind!r} has {REFUSED[kind]}, which no student has; {text}choose a teacher of "
            f"one of the supported families: {', '.join(FAMILIES)}"
        )
    if kind not in FAMILIES:
        raise UnsupportedTeacherError(
            f"teacher configuration: model_type {kind!r} is not one of the supported families; choose a teacher of one of them, "
            f"or add it as docs/add-teacher-family.md shows; supported are {', '.join(FAMILIES)}"
        )
    if quantised := getattr(config, "quantization_config", None):
        values = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
        undo = DEQUANTISE.get(method)
        raise UnsupportedTeacherError(
            f"teacher configuration ({kind}): {method}, quantization_config is set, expected unquantised weights; start from "
            f"the original checkpoint{f', or dequantise it (M: AutoModelForCausalLM): {undo}' if undo else ''}"
        )
    for name, allowed in WITHOUT.get(kind, {}).items():
        if (value := getattr(config, name)) not in allowed:
            raise UnsupportedTeacherError(
                f"teacher configuration ({kind}): {name} is {value}, expected {allowed[0]}: the student has no such thing; "
                "choose another teacher"
            )
    if (name := ABOVE_ZERO.get(kind)) and (value := getattr(config, name)) <= 0:
        raise UnsupportedTeacherError(
            f"teacher configuration ({kind}): {name} is {value}, expected a number above 0; correct the teacher's config.json"
        )
    check_rope(config)
    check_layer_types(config)
    return FAMILIES[kind]


def check_rope(config):
    """Raise UnsupportedTeacherError unless every RoPE of this teacher is one that the student computes in the same way."""
    nested = [key for key in TEACHER_LAYER_TYPES if key in config.rope_parameters]
    for rope in [config.rope_parameters[key] for key in nested] or [config.rope_parameters]:
        where = f"teacher configuration ({config.model_type}): rope_parameters {rope}"
        kind = rope.get("rope_type") if rope else None
        if kind not in ROPE_TYPES:
            raise UnsupportedTeacherError(
                f"{where}: rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}; choose another teacher"
            )
        part = rope.get("partial_rotary_factor", 1.0)
        if part != 1.0 and not FAMILIES[config.model_type].partial_rotary:
            raise UnsupportedTeacherError(
                f"{where}: partial rotary embeddings, expected the whole head to rotate; choose another teacher"
            )
        if not 0 < part <= 1:
            raise UnsupportedTeacherError(
                f"{where}: partial_rotary_factor={part}, expected a part above 0 and at most 1; correct the teacher's config.json"
            )
        if nested and rope.get("truncate") is False:  # transformers looks for it one level too high, and rounds
            raise UnsupportedTeacherError(
                f"{where}: truncate=False has no effect in nested parameters; remove it to get what transformers computes"
            )


def check_layer_types(config):
    """Raise UnsupportedTeacherError unless each layer is full or sliding attention in a way that the teacher's own
    model follows.
    """
    fields = FAMILIES[config.model_type].fields(config)
    kinds, window = fields["teacher_layer_types"], fields["teacher_sliding_window"]
    where = f"teacher configuration ({config.model_type})"
    if unknown := sorted(set(kinds) - set(TEACHER_LAYER_TYPES)):
        raise UnsupportedTeacherError(
            f"{where}: layer_types holds {unknown}, expected only {list(TEACHER_LAYER_TYPES)}; choose another teacher"
        )
    if "sliding_attention" in kinds and not window:
        raise UnsupportedTeacherError(
            f"{where}: has sliding_attention layers and sliding_window={window}, expected a number of tokens; "
            "correct the teacher's config.json"
        )
    if list(getattr(config, "layer_types", None) or kinds) != kinds:
        raise UnsupportedTeacherError(
            f"{where}: layer_types {config.layer_types} are ignored by this family, whose layers are all {kinds[0]}; "
            "correct the teacher's config.json"
        )


# arguments of transformers' `from_pretrained` that a conversion has no use for, and what to do instead
PLACED = "a student is made on the CPU: move it with .to(device), or save it and load it with from_pretrained"
LOADED = "a teacher is read from its files; load it in transformers with this argument and pass the model"
LOADING = {
    "attn_implementation": "call set_attn_implementation on the student, or save it and load it with from_pretrained",
    "quantization_config": "a student is made in full: save it and load it with from_pretrained and this argument",
    "use_safetensors": "leave it out, nothing else is read",
    "low_cpu_mem_usage": "leave it out, tensors are read one by one",
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "tp_plan"), PLACED),
    **dict.fromkeys(("trust_remote_code", "token", "cache_dir", "subfolder", "variant", "local_files_only"), LOADED),
}


def refuse_loading(options):
    """Raise ConfigError for arguments of transformers' `from_pretrained`, with the way to what they are meant for."""
    if names := [name for name in options if name in LOADING]:
        raise ConfigError("; ".join(f"{name}: {LOADING[name]}" for name in names))


def student_config(teacher_config, *, sliding_window=512, num_sink_tokens=4, layer_types=None, **overrides):
    """The student's configuration for a teacher's.

    Args:
        teacher_config: a configuration of one of `FAMILIES`.
        sliding_window, num_sink_tokens: W and S of the hybrid layers, in tokens.
        layer_types: None: every layer "hybrid_sliding"; "teacher": every layer keeps the teacher's own attention; or a
            list, one entry per layer.
        overrides: other fields of `XLSTMHybridConfig` that do not come from the teacher, such as mlstm_context.
    Raises:
        UnsupportedTeacherError: see `family_of`.
        ConfigError: layer types, window, sinks or overrides that describe no student of this teacher.
    """
    family = family_of(teacher_config)
    fields = {name: family.read(teacher_config, name, name) for name in EVERY_FAMILY if name not in family.traits}
    fields |= family.fields(teacher_config)
    fields["head_dim"] = (
        getattr(teacher_config, "head_dim", None) or teacher_config.hidden_size // teacher_config.num_attention_heads
    )
    rope = fields.get("rope_parameters", teacher_config.rope_parameters)
    fields["rope_parameters"] = {name: copy.deepcopy(value) for name, value in rope.items() if name not in OF_PICTURES}
    fields["attention_dropout"] = teacher_config.attention_dropout or 0.0
    # in a teacher's, False is a leftover of its training
    fields["teacher_model_type"], fields["use_cache"] = teacher_config.model_type, True
    allowed = sorted(set(XLSTMHybridConfig.__annotations__) - set(fields))
    refuse_loading(overrides)
    if foreign := sorted(set(overrides) - set(allowed)):
        raise ConfigError(
            f"student of {teacher_config.model_type}: cannot set {foreign}, only {allowed}; the rest comes from the teacher: leave these out"
        )
    if layer_types == "teacher":
        layer_types = fields["teacher_layer_types"]
    layers = fields["num_hidden_layers"]
    if layer_types is not None and (not isinstance(layer_types, (list, tuple)) or len(layer_types) != layers):
        raise ConfigError(
            f"layer_types={layer_types!r}: expected None, 'teacher' or a list of {layers} layer types, each of {list(LAYER_TYPES)}"
        )
    fields |= {"sliding_window": sliding_window, "num_sink_tokens": num_sink_tokens, **overrides}
    try:
        return XLSTMHybridConfig(**fields, layer_types=layer_types and list(layer_types))
    # wraps a ConfigError, or says which field has a wrong type
    except StrictDataclassError as error:
        raise ConfigError(
            f"student of {teacher_config.model_type}: {' '.join(str(error.__cause__ or error).split())}"
        ) from error
