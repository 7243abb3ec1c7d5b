"""One token per row on a CPU in one compiled call a layer, `xlstm_kernels.layer_step`: for the paper's layer as it is.

Whatever else is asked for (other cells, hooks on the mixer, adapters, tokens that may be taken back, gradients, a graph)
runs through the operations that a longer call runs through. Dims: B batch, D hidden size, H query heads, G key/value
heads, K head dim.
"""

import torch
from transformers.utils import output_capturing
from xlstm_kernels import layer_step, layer_step_runs
from xlstm_kernels.backends.arguments import PLAIN
from xlstm_kernels.step.layer import DTYPES

from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.linear import hooked, one_token_on_cpu
from xlstm_hybrid.model.mixer import MLSTMMixer

# the fields of a config under which a layer is the paper's, and what they have to be
PAPER = {
    "memory_cell": "mlstm",
    "mixer_combine": "gate",
    "mixer_branches": "both",
    "mixer_norm": False,
    "sparse_memory": 0,
}
MAPS = "q_map", "k_map"
GATES = "igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias"


def compiled_index(config, hidden_states, tokens):
    """[B] index of each row's token if the layers of this call may run compiled, else None; asked once per call.

    Args:
        hidden_states: the call's input, [B, T, D]; tokens: `Tokens`.
    """
    if not one_token_on_cpu(hidden_states) or tokens.blind is not None or hooked():
        return None
    fields, K = vars(config), config.head_dim
    if any(fields[name] != value for name, value in PAPER.items()):
        return None
    right = layer_step_runs(hidden_states.dtype, K, config.memory_feature_dim or K)
    return tokens.index[:, 0].contiguous() if right else None


def looked_into(mixer):
    """Whether a mixer has hooks. transformers' recorder stays once `output_gates` was asked for, and looks where it is."""
    hooks = mixer._forward_hooks
    if hooks and "gates" not in (output_capturing._active_collector.get() or ()):
        hooks = [hook for hook in hooks.values() if getattr(hook, "__module__", None) != output_capturing.__name__]
    return bool(hooks or mixer._forward_pre_hooks)


def readable(token, maps, gates, state, slots, count):
    """Whether C may read and write the tensors of a layer where they lie, each kind of them in one dtype that it knows."""
    for a in (*maps, *gates, *state, *slots, count):
        if type(a) not in PLAIN or not a.is_cpu or not a.is_contiguous():
            return False
    dtype, kept = token[0].dtype, slots[0].dtype
    for a in token:
        if type(a) is not torch.Tensor or a.dtype != dtype or not a.is_cpu:
            return False
    if dtype not in DTYPES or kept not in (torch.float32, dtype) or state[0].dtype != torch.float32:
        return False
    for tensors in (maps, gates, state, slots):
        dtypes = [a.dtype for a in tensors]
        if dtypes[0] not in DTYPES or dtypes.count(dtypes[0]) != len(dtypes):
            return False
    return True


def compiled_step(attention, hidden_states, heads, position_embeddings, tokens, layer):
    """h [B, 1, H, K] before W_o, taken into the cache layer, or None where this layer has to run operation by operation.

    Args:
        heads: `HybridAttention.heads` of the layer's input.
        layer: its `HybridCacheLayer`.
    """
    mixer, index = attention.mlstm, tokens.compiled
    if (
        type(layer) is not HybridCacheLayer
        or not layer.is_initialized
        or layer.depth
        or type(mixer) is not MLSTMMixer  # adapters and parametrizations derive from it, or wrap it
        or looked_into(mixer)
        or "forward" in vars(mixer)  # offloaded
        or attention.split is not None
    ):
        return None
    (q, k), (raw_q, raw_k, raw_v), _ = heads
    token = hidden_states, raw_q, raw_k, raw_v, q, k
    maps, gates = ([mixer._parameters.get(name) for name in names] for names in (MAPS, GATES))
    if not readable(token, maps, gates, layer.state, (layer.keys, layer.values), layer.count):
        return None
    layer.grow(1)
    where = {"index": index, "count": layer.count, "sinks": layer.num_sink_tokens}
    h = paper_step(
        attention, hidden_states, heads, position_embeddings, *layer.state, layer.keys, layer.values, **where
    )
    layer.seen_tokens += 1
    return h


def paper_step(attention, hidden_states, heads, position_embeddings, C, n, m, keys, values, **where):
    """`layer_step` with the parameters of a layer, whose last tensors and keywords these are."""
    (q, k), (raw_q, raw_k, raw_v), _ = heads
    own, config = attention.mlstm._parameters, vars(attention.config)
    return layer_step(
        *(hidden_states, raw_q, raw_k, raw_v, q, k, *position_embeddings),
        *(own[name] for name in MAPS + GATES),
        *(C, n, m, keys, values),
        scale=attention.scaling,
        signed=config["memory_feature_map"] == "softmax_signed",
        rotated_memory=config["memory_rope"],
        gate_of_x=not attention.mlstm.reads_qkv,
        **where,
    )
