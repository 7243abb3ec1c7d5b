"""Bytes of a cache: from the configuration alone, and counted in one that is there.

Dims: H query heads that mix, G key/value heads of them, E kept ones, K head dim, F features of the state, W window, S
sinks, L chosen tokens.
"""

import math

import torch

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.configuration import LINEAR

INDEX = 8  # bytes of an index: of a chosen token, of a kept column, of a row's present document


def cache_bytes(config, length, dtype=torch.bfloat16, teacher=False):
    """Bytes of one sequence's cache after `length` tokens, by what holds them: the tensors of a filled `DynamicCache`.

    Args:
        config: an `XLSTMHybridConfig`.
        dtype: of keys and values, a torch dtype or its name; states and scores are float32, or float64 in a float64
            model.
        teacher: of the teacher instead, whose layers are `teacher_layer_types`.
    Returns:
        {"state": mLSTM, counters and linear attention, "window": ring and sinks, "sparse": chosen tokens and scores,
        "kept": kept groups, "full": layers that keep the teacher's attention}
    Raises:
        ConfigError: a length below 1, or no such dtype.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if length < 1 or not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"cache_bytes: length={length}, dtype={dtype}; expected at least 1 token, and a dtype as bfloat16"
        )
    parts = dict.fromkeys(("state", "window", "sparse", "kept", "full"), 0)
    for j in range(config.num_hidden_layers):
        kind = config.teacher_layer_types[j] if teacher else config.layer_types[j]
        if kind == "hybrid_sliding":
            layer = hybrid_layer_bytes(config, j, length, dtype)
        elif kind == LINEAR:
            layer = {"state": linear_layer_bytes(config, dtype)}
        else:
            window = config.kept_window_of(j) if teacher else config.window_of(j)
            tokens = columns(length, window if kind == "sliding_attention" else None)
            layer = {"full": tokens * pair_bytes(config, dtype) * config.num_key_value_heads}
        for name, size in layer.items():
            parts[name] += size
    return parts


def linear_layer_bytes(config, dtype):
    """States of one layer of linear attention: inputs of its convolution, and a memory in float32."""
    sizes = {name: math.prod(shape) for name, shape in config.linear_shapes.items()}
    return sizes["conv"] * dtype.itemsize + sizes["recurrent"] * torch.float32.itemsize


def pair_bytes(config, dtype):
    """Bytes of a key and its value."""
    return 2 * config.head_dim * dtype.itemsize


def columns(length, window=None):
    """Tokens whose keys are held: a sliding layer needs no more than the next token's window."""
    return length if window is None else min(length, max(window - 1, 0))


def hybrid_layer_bytes(config, j, length, dtype):
    """Parts of one hybrid layer."""
    exact = torch.promote_types(dtype, torch.float32).itemsize
    H, E, K, F = len(config.mixed_heads(j)), len(config.kept_of(j)), config.head_dim, config.memory_features
    G, L, branches = config.num_key_value_heads - E, config.sparse_memory, config.mixer_branches
    slots = min(length, 1 if branches == "memory" else config.window_of(j) + config.sinks_of(j))
    state = 0 if branches == "window" else H * (F * K + F + 1) * exact
    sparse = G * L * (pair_bytes(config, dtype) + exact + INDEX) + G * slots * exact if L else 0
    window = config.kept_window_of(j)
    tokens = columns(length, window and max(window, 2))  # the last column stays in any case, see `KeptKeys.trim`
    full = tokens * (E * pair_bytes(config, dtype) + INDEX) if E else 0
    return {"state": state + INDEX, "window": G * slots * pair_bytes(config, dtype), "sparse": sparse, "kept": full}


# --- a cache that is there -------------------------------------------------------------------------------------


def tensors_in(value, seen=None):
    """Every tensor that an object holds, in tuples, lists, dicts and attributes at any depth, once each."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = value if isinstance(value, list | tuple) else (value if isinstance(value, dict) else vars(value)).values()
    for part in parts:
        if isinstance(part, torch.Tensor | list | tuple | dict) or (hasattr(part, "__dict__") and not callable(part)):
            yield from tensors_in(part, seen)


def filled_bytes(cache):
    """Bytes of a cache's tensors by their shapes."""
    return sum(x.numel() * x.element_size() for x in tensors_in(cache.layers))


def storage_bytes(tensors):
    """Bytes of the memory that tensors keep alive; memory that two of them share counts once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def allocated_bytes(cache):
    """Bytes of the memory that a cache keeps alive: more than its tensors have where they are views."""
    return storage_bytes(tensors_in(cache.layers))
