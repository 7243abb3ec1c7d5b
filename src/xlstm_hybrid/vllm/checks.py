"""What vLLM's settings have to be for a student; asked before anything is loaded."""

import warnings

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from xlstm_hybrid.errors import CompatibilityError, CompatibilityWarning, ConfigError
from xlstm_hybrid.model.configuration import TRAITS
from xlstm_hybrid.model.experimental.variants import VARIANTS
from xlstm_hybrid.vllm.tensor_parallel import wrong_shares

DEPENDENT = "dynamic", "longrope"  # RoPE that asks for the longest text of the batch


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
    if kind in VARIANTS or config.memory_cell == "delta" or config.mixer_branches != "both":
        fields = "memory_cell", "mixer_combine", "mixer_branches", "sparse_memory"
        wrong.append(
            f"its mixer is {', '.join(f'{name}={getattr(config, name)!r}' for name in fields)}: expected the paper's, an mLSTM and a window "
            "that a gate mixes"
        )
    traits = {name: getattr(config, name) for name, usual in TRAITS.items() if getattr(config, name) != usual}
    if config.norm_position == "both":
        traits["norm_position"] = "both"
    if traits:
        found = ", ".join(f"{name}={value!r}" for name, value in traits.items())
        wrong.append(f"its teacher has traits that the plugin does not calculate: {found}")
    for kind in config.attention_types:
        if (name := config.rope_parameters_of(kind).get("rope_type")) in DEPENDENT:
            wrong.append(
                f"rope_type={name!r} of {kind} depends on the longest text of the batch: expected one that does not"
            )
    return wrong


def wrong_settings(vllm_config):
    """Settings of vLLM that a student's state does not allow, a list of messages with what to do."""
    parallel, cache, quantization = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.quant_config
    found = {
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,)),
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
