"""Causal attention over the first `sinks` and the last `window` tokens of a document, under one softmax.

Dims: B batch, T tokens, H query heads, G key/value heads (H = G R), K query/key, V value, S sinks, W window, N real
tokens of a row.

    A(t) = {s <= t in t's document: t - s < W or s is one of its first S tokens}
    h_t  = softmax(scale q_t K_A^T) V_A             Hauzenberger et al. 2026; sink tokens after Xiao et al. 2023

Distances count real tokens: padding is taken out first, so that a row becomes documents back to back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.backends.numerics import calculation_dtype


def visible(t, s, start, window, sinks):
    """True where the query at t sees the key at s; start is that of t's document. Broadcasts."""
    return (s <= t) & (s >= start) & ((t - s < window) | (s - start < sinks))


class UnpaddedRow(NamedTuple):
    """One row without its padding.

    place [N]: where the real tokens lie, None if all T are real
    start [N]: where the document of each begins, counted in real tokens, None if the row is one document
    """

    place: Tensor | None
    start: Tensor | None


def unpadded_rows(index, document, q):
    """Take the padding out of every row of q [B, T, ...].

    Raises ValueError where `index` does not number documents that lie back to back.
    """
    B, T = q.shape[:2]
    if index is None and document is None:
        return [UnpaddedRow(None, None)] * B
    position = torch.arange(T, device=q.device)
    rows = []
    for b in range(B):
        place = position if index is None else (index[b] >= 0).nonzero()[:, 0]
        ids = position.new_zeros(len(place)) if document is None else document[b, place]
        count = position[: len(place)]
        new = torch.ones_like(ids, dtype=torch.bool)
        new[1:] = ids[1:] != ids[:-1]
        start = torch.where(new, count, 0).cummax(0).values
        if index is not None:
            check_index(index[b], place, count - start, b)
        rows.append(UnpaddedRow(None if len(place) == T else place, start if len(start) and start[-1] > 0 else None))
    return rows


def check_index(index, place, expected, b):
    """Raise ValueError unless the real tokens of row b are numbered as `expected` [N] within their documents."""
    wrong = (index[place] != expected).nonzero()
    if len(wrong):
        r = wrong[0, 0]
        t = place[r].item()
        raise ValueError(
            f"index[{b}, {t}]={index[t].item()}: expected {expected[r].item()}, the number of real tokens before it in "
            "its document; number the tokens of each document 0, 1, 2, ... and padding -1"
        )


def window_reference(q, k, v, *, window, sinks, index, document, scale):
    """The definition, with a T x T mask: O(T^2) time and memory."""
    dtype, R = calculation_dtype(q, k, v), q.shape[2] // k.shape[2]
    h = []
    for b, row in enumerate(unpadded_rows(index, document, q)):
        qb, kb, vb = (x[b].to(dtype).transpose(0, 1) for x in (q, k, v))  # [H|G, T, K|V]
        if row.place is not None:
            qb, kb, vb = (x[:, row.place] for x in (qb, kb, vb))
        t = torch.arange(qb.shape[1], device=q.device)
        seen = visible(t[:, None], t, 0 if row.start is None else row.start[:, None], window, sinks)
        scores = scale * qb @ kb.repeat_interleave(R, 0).transpose(-1, -2)
        hb = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vb.repeat_interleave(R, 0)
        hb = hb.transpose(0, 1).to(v.dtype)  # [N, H, V]
        h.append(hb if row.place is None else hb.new_zeros(q.shape[1], *hb.shape[1:]).index_copy(0, row.place, hb))
    return torch.stack(h)
