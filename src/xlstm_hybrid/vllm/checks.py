"""What vLLM's settings have to be for a student; asked before anything is loaded."""

import warnings

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from xlstm_hybrid.errors import CompatibilityError, CompatibilityWarning, ConfigError
from xlstm_hybrid.model.configuration import STEADY_ROPES, TRAITS
from xlstm_hybrid.model.experimental.variants import VARIANTS
from xlstm_hybrid.vllm.tensor_parallel import wrong_shares

# what the plugin calculates; anything else is refused
KINDS = {"hybrid_sliding", "full_attention", "sliding_attention"}
MIXERS, NORMS = {"mlstm", "linear"}, {"pre", "post", "both"}
CALCULATED = {
    *("rope_layers", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    *("logits_scaling", "final_logit_softcapping", "norm_plus_one"),
    *("num_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
}


class StudentSettings(VerifyAndUpdateConfig):
    """vLLM's hook for an architecture's settings."""

    @staticmethod
    def verify_and_update_config(vllm_config):
        """Refuse what would be wrong, and switch prefix caching off: vLLM has it on for every hybrid model, and does not
        tell whether somebody asked for it.

        Raises:
            ConfigError: a student that vLLM's caches cannot hold.
            CompatibilityError: a setting under which a student's state would be wrong.
        """
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        if wrong := wrong_student(config):
            raise ConfigError("vLLM cannot serve this student: " + "; ".join(wrong) + ". Use `xlstm-hybrid serve`")
        wrong, size = wrong_settings(vllm_config), vllm_config.parallel_config.tensor_parallel_size
        if size > 1 and (uncut := wrong_shares(config, size)):
            wrong.append(f"tensor_parallel_size={size}, by which the student is not cut evenly: {', '.join(uncut)}")
        if wrong:
            raise CompatibilityError("vLLM with a hybrid xLSTM student: " + "; ".join(wrong))
        if "hybrid_sliding" in config.layer_types and cache.enable_prefix_caching:
            cache.enable_prefix_caching = False
            warnings.warn(
                "vLLM's prefix caching is switched off: a student's state at the end of a prefix is not kept, and another state in "
                "its place would change answers without an error. enable_prefix_caching=False silences this",
                CompatibilityWarning,
                stacklevel=2,
            )


def wrong_student(config):
    """Fields of the student that stand in the way, a list of messages."""
    wrong, kind = [], (config.mixer_combine, config.mixer_branches, config.sparse_memory > 0)
    if kind in VARIANTS or config.memory_cell not in MIXERS or config.mixer_branches != "both":
        fields = "memory_cell", "mixer_combine", "mixer_branches", "sparse_memory"
        wrong.append(
            f"its mixer is {', '.join(f'{name}={getattr(config, name)!r}' for name in fields)}: expected the paper's, an mLSTM and a window "
            "that a gate mixes"
        )
    unknown = sorted((set(config.layer_types) | set(config.teacher_layer_types)) - KINDS)
    if unknown:
        wrong.append(f"it has layers of {', '.join(unknown)}: expected {', '.join(sorted(KINDS))}")
    traits = {
        name: getattr(config, name) for name in TRAITS.keys() - CALCULATED if getattr(config, name) != TRAITS[name]
    }
    if config.norm_position not in NORMS:
        traits["norm_position"] = config.norm_position
    for kind in config.attention_types:
        if (part := config.rope_parameters_of(kind).get("partial_rotary_factor", 1.0)) != 1.0:
            traits["partial_rotary_factor"] = part
    for kind, rope in config.uneven_ropes.items():
        wrong.append(
            f"rope_type={rope!r} of {kind} depends on the longest text of the batch; expected one of {STEADY_ROPES}"
        )
    if traits:
        found = ", ".join(f"{name}={value!r}" for name, value in sorted(traits.items()))
        wrong.append(f"its teacher has traits that the plugin does not calculate: {found}")
    return wrong


def wrong_settings(vllm_config):
    """Settings of vLLM that a student's state does not allow, a list of messages with what to do."""
    parallel, cache, quantization = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.quant_config
    found = {
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,)),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, (1,)),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, (1,)),
        "speculative_config": (vllm_config.speculative_config, (None,)),
        "quantization": (quantization and quantization.get_name(), (None,)),
        "lora_config": (vllm_config.lora_config, (None,)),
        "kv_cache_dtype": (cache.cache_dtype, ("auto",)),
        "mamba_ssm_cache_dtype": (cache.mamba_ssm_cache_dtype, ("auto", "float32")),
    }
    return [
        f"{name}={value!r}, expected {' or '.join(repr(x) for x in right)}"
        for name, (value, right) in found.items()
        if value not in right
    ]
