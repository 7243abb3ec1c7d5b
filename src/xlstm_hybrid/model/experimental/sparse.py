"""Attention over window, sinks and the sparse exact memory of a hybrid layer, block by block of queries.

A few pairs per key/value head, chosen by what the state cannot give back (LoLA, arXiv 2505.23666; HOLA, arXiv 2607.02303), join the window's
softmax. Dims: B batch, T tokens, H query heads, G key/value heads, R = H / G, K query/key dim, V value dim, W window, S sinks, L chosen tokens.
"""

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from xlstm_kernels import delta, mlstm

from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.kept_groups import sparse_visible, spread

BLOCK = 64  # least number of queries at a time


@torch.no_grad()
def scores_of(kind, tokens, key, call, state=None, layer_idx=0, cell="mlstm"):
    """[B, G, T], float32 at least: how much a token is worth keeping, fixed when it is read.

    "residual": |v - h|^2, h the mLSTM's answer to the token's own key just after it was written, mean over the query heads of the group.
    "weighted": the same times exp(i) / (exp(i) + sigmoid(f)), the share of the input gate in what is written and what is kept.
    "recency": the index.  "random": a hash of it. The last two are controls.

    Args:
        key: of the window, [B, G, T, K].
        call: what the mixer records: (k, v, i, f) of the mLSTM, [B, T, H, ...], padding masked, and its chunk size.
        state: the mLSTM's before these tokens.
        cell: the config's `memory_cell`; the delta rule's answer is read from its own state.
    """
    groups, dtype = key.shape[1], torch.promote_types(key.dtype, torch.float32)
    if kind in ("recency", "random"):
        index = tokens.index if kind == "recency" else spread(tokens.index, layer_idx)
        return index[:, None].expand(-1, groups, -1).to(dtype)
    (k, v, i, f), chunk_size = call
    v = v.to(dtype)
    answer, _ = (delta if cell == "delta" else mlstm)(k, k, v, i, f, state=state, chunk_size=chunk_size)
    residual = (v - answer).square().sum(-1)  # [B, T, H]
    if kind == "weighted":
        residual = residual * torch.sigmoid(i.to(dtype) - logsigmoid(f.to(dtype)))
    return residual.unflatten(-1, (groups, -1)).mean(-1).transpose(1, 2)


def sparse_attention(query, key, value, tokens, scores, layer, attend=None, scale=None):
    """`(h [B, T, H, V], weights or None)` of window, sinks and chosen tokens; `layer` is left as it is.

    Every block of max(W, 64) queries reads slots that the blocks before it have filled, as pieces of a prompt do: time is linear in T, and a block
    sees S + W + L + block keys.

    Args:
        query, key, value: [B, H | G, T, K | V]; scores: [B, G, T].
        layer: a `HybridCacheLayer` of the tokens before.
        attend: (query, key, value, mask [B, H, T, keys]) -> (h, weights), for all queries at once; None: torch's, in float32 at least.
    """
    T, held = query.shape[2], HybridCacheLayer(layer.sliding_window, layer.num_sink_tokens, capacity=layer.capacity)
    held.take_over(layer)
    block = T if attend is not None else max(layer.sliding_window, BLOCK)
    parts, h = zip(*(x.split(block, 2) for x in (query, key, value, scores)), strict=True), []
    for begin, (q, k, v, s) in zip(range(0, T, block), parts, strict=True):
        here = tokens.slice(begin, min(begin + block, T))
        keys, values, mask = seen(held, k, v, s, here)
        if attend is not None:
            return attend(q, keys, values, mask.repeat_interleave(q.shape[1] // k.shape[1], 1))
        h.append(grouped_attention(q, keys, values, mask, scale))
        if begin + block < T:
            held.update(k, v, here, s)
    return torch.cat(h, 1), None


def seen(held, key, value, scores, tokens):
    """`(keys, values [B, G, N, K | V], mask [B, G, T, N])` of one block, N = [S + W slots | L chosen | T new], of an empty layer T new."""
    W, S, L, T = held.sliding_window, held.num_sink_tokens, held.capacity, key.shape[2]
    mask, index, document = tokens.visible(W, S), tokens.index, tokens.document
    if held.is_initialized:
        slot = held.slot_index
        mask = torch.cat([held.visible(tokens), mask.new_zeros(*mask.shape[:2], L), mask], -1)
        ring = torch.where(torch.arange(S + W, device=slot.device) < S, -1, slot)[:, None].expand(-1, key.shape[1], -1)
        old = torch.cat([ring, held.sparse.index], -1)
        index = torch.cat([old, index[:, None].expand(-1, key.shape[1], -1)], -1)
        document = torch.cat([torch.zeros_like(old[:, 0]), document], -1)[:, None]
        scores = torch.cat([held.scores, held.sparse.score, scores], -1)
        key, value = (torch.cat(x, 2) for x in ((held.keys, held.sparse.keys, key), (held.values, held.sparse.values, value)))
    else:
        index, document = index[:, None], document[:, None]
    mask = mask[:, None].expand(-1, key.shape[1], -1, -1)
    N = key.shape[2] - (T if T <= W else 0)  # of a short block no token leaves the window before its end
    if N:
        chosen = sparse_visible(scores[..., :N], index[..., :N], document[..., :N], tokens, W, S, L)
        mask = torch.cat([mask[..., :N] | chosen, mask[..., N:]], -1)
    return key, value, mask


def grouped_attention(query, key, value, mask, scale):
    """Softmax attention [B, T, H, V] with one mask per key/value head, calculated in float32 at least."""
    B, G, T, N = mask.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(dtype).reshape(B * G, -1, T, query.shape[-1])
        k, v = (x.to(dtype).reshape(B * G, 1, N, -1).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        h = scaled_dot_product_attention(q, k, v, attn_mask=mask.reshape(B * G, 1, T, N), scale=scale)
    return h.reshape(B, -1, T, value.shape[-1]).transpose(1, 2)
