"""Students in vLLM: a model, a state backend and what vLLM has to be told, through its entry point
`vllm.general_plugins`. Nothing of ours imports this package.
"""

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from xlstm_hybrid.vllm.checks import StudentSettings

ARCHITECTURE, BACKEND = "XLSTMHybridForCausalLM", "XLSTM_HYBRID"


def register():
    """Make students known to vLLM, in each of its processes and as often as it asks. Importing `xlstm_hybrid` has made
    their configuration known to transformers.
    """
    ModelRegistry.register_model(ARCHITECTURE, f"xlstm_hybrid.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = StudentSettings
    if BACKEND not in MambaAttentionBackendEnum.__members__:
        MambaAttentionBackendEnum.register(BACKEND, "xlstm_hybrid.vllm.state.StateBackend")
