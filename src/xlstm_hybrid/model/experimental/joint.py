"""The cache of a joint softmax (LoLCATs, Zhang et al. 2024): a token goes into the state when it leaves the window.

Functions of a `HybridCacheLayer` with `read_keys`. Dims: B batch, T new tokens, H query heads, G key/value heads, K key dim, V value dim, F features,
W window, S sinks.
"""

import torch
from xlstm_kernels import MLSTMState


def left(layer, tokens):
    """[B, T, S + W] bool: tokens in the ring that are no longer in the window of each new token, sinks aside."""
    slot_index, S = layer.slot_index[:, None], layer.num_sink_tokens
    ring = torch.arange(slot_index.shape[-1], device=slot_index.device) >= S
    return ring & (slot_index >= S) & (tokens.index[:, :, None] - slot_index >= layer.sliding_window) & (tokens.document == 0)[:, :, None]


def absorb(layer, key, value, index, count, restarted):
    """Write into the state what has left the window by the time that the row holds `count` [B, 1] tokens, sinks aside; before the ring changes.

    Args:
        key, value: of the new tokens, [B, G, T, K | V]; index: [B, T], -1 for tokens of earlier documents.
        restarted: [B, 1] bool, whether a document has started among them.
    """
    S, W = layer.num_sink_tokens, layer.sliding_window
    index = torch.cat([layer.slot_index[:, S:].masked_fill(restarted, -1), index], -1)
    gone = ((index >= S) & (index < count - W))[..., None, None]
    key, value = torch.cat([layer.keys[:, :, S:], key], 2), torch.cat([layer.values[:, :, S:], value], 2)
    dtype = torch.promote_types(value.dtype, torch.float32)
    k = layer.read_keys(key).to(dtype).masked_fill(~gone, 0.0).transpose(1, 2)  # [B, H, W + T, F]
    v = value.to(dtype).repeat_interleave(k.shape[1] // value.shape[1], 1)
    C, n = k.transpose(-1, -2) @ v, k.sum(-2)
    if layer.state is not None:
        C = C + layer.state.C.masked_fill(restarted[..., None, None], 0.0)
        n = n + layer.state.n.masked_fill(restarted[..., None], 0.0)
    layer.hold(MLSTMState(C, n, n.new_zeros(n.shape[:2])))
