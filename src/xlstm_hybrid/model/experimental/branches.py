"""A hybrid layer without one of its branches: the mLSTM alone or the window alone, in all rows or, in training, in
those that are drawn.

`mixer_branches` makes baselines of the arena, and set on a loaded model it shows what each branch remembers. Window
dropout is scheduled sliding-window dropout (Benfeghoul et al. 2025, arXiv 2510.05901). Dims: B batch, T tokens, H query
heads.
"""

import torch
from xlstm_kernels import window_step

from xlstm_hybrid.model.cache import place_of
from xlstm_hybrid.model.rollback import RecordedCall, Step


def clamped(o, tokens, branches):
    """The output gate [B, T, H] where branches are left out: 1 is the memory alone, 0 the window alone."""
    if branches != "both":
        return torch.full_like(o, branches == "memory")
    return torch.where(tokens.blind[:, None, None] & tokens.real[..., None], 1.0, o)


def window_alone(attention, hidden_states, projected, tokens, mask, cache):
    """In the place of `HybridAttention.mix_heads`: o = 0, and no state."""
    query, key, value, *_ = projected
    attention.read(hidden_states, projected, tokens)  # for those who record its gate
    if mask is None and cache is not None and cache.is_initialized:
        inputs, where = tuple(x.transpose(1, 2) for x in (query, key, value)), {"sinks": attention.num_sink_tokens}
        if cache.depth:
            cache.note(Step(window_step, inputs, tokens, attention.scaling))
        cache.grow(1)
        (index, where["place"]), where["scale"] = place_of(tokens, cache), attention.scaling
        cache.state, h = None, window_step(*inputs, cache.keys, cache.values, index, **where)
        cache.advance(tokens)
        return h, None
    if cache is not None:
        if cache.depth:
            cache.note(RecordedCall(None, (), key, value, tokens))
        key, value = cache.update(key, value, tokens)
    return attention.window(query, key, value, tokens, mask)
