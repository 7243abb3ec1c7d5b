"""One softmax over both branches, without a gate (LoLCATs, Zhang et al. 2024, arXiv 2410.10254):
`mixer_combine="joint"`.

Tokens in the window or the sinks weigh exp(q k / sqrt K), all others of the document before them exp(s_h) phi(q)
phi(k), with one factor exp(s_h) per head. A baseline: every pair of tokens of a call is calculated. In the cache a
token goes into the state when it leaves the window.

Dims: B batch, T new tokens, H query heads, G key/value heads, K key dim, V value dim, F features, W window, S sinks.
"""

from dataclasses import dataclass

import torch
from transformers.models.llama.modeling_llama import repeat_kv
from xlstm_kernels import MLSTMState

from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.experimental.cells import LinearMixer
from xlstm_hybrid.model.mixer import wide
from xlstm_hybrid.model.rollback import RecordedCall


class JointMixer(LinearMixer):
    """Feature maps, a factor for each head, and the softmax itself."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.joint_scale = wide(len(config.mixed_heads(layer_idx)))

    def forward(self, query, key, value, tokens, scale, layer=None):
        """`(h [B, T, H, V], weights [B, H, T, columns], share [B, T, H] of the features in the weights)`; updates the
        cache layer.

        Args:
            query, key, value: of the window and of the maps, [B, H | G, T, K | V].
            scale: of the products of queries and keys.
            layer: `JointCacheLayer` of the tokens before, whose state is of those that have left its ring.
        """
        window, sinks, T = self.config.window_of(self.layer_idx), self.config.sinks_of(self.layer_idx), query.shape[2]
        new, n, state, near = (key, value), query.shape[1] // key.shape[1], None, tokens.visible(window, sinks)
        far, key, value = tokens.visible(T, 0) & ~near, repeat_kv(key, n), repeat_kv(value, n)
        if layer is not None and layer.is_initialized:
            key, state = torch.cat([repeat_kv(layer.keys, n), key], 2), layer.state
            value = torch.cat([repeat_kv(layer.values, n), value], 2)
            near, far = torch.cat([layer.visible(tokens), near], -1), torch.cat([layer.left(tokens), far], -1)
        h, weights, share = self.softmax(query, key, value, near[:, None], far[:, None], state, tokens, scale)
        if layer is not None:
            signed = self.config.memory_feature_map == "softmax_signed"
            if layer.depth:
                layer.note(JointCall(None, (), *new, tokens, None, self.k_map, signed))
            layer.update(*new, tokens, feature_map=self.k_map, signed=signed)
        return h, weights, share

    def softmax(self, query, key, value, near, far, state, tokens, scale):
        """`forward`'s result; near, far: [B, 1, T, columns], what a token sees exactly and by its features."""
        q, k = (self.read(*pair).transpose(1, 2) for pair in ((query, self.q_map), (key, self.k_map)))
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, value, factor = (x.to(dtype) for x in (q, k, value, self.joint_scale[:, None, None]))
        least = torch.finfo(dtype).tiny
        with torch.autocast(query.device.type, enabled=False):
            close = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
            rest = (q @ k.transpose(-1, -2)).clamp_min(least).log() + factor
            exponents = torch.where(near, close, rest).masked_fill(~(near | far), float("-inf"))
            if state is None:
                weights = torch.softmax(exponents, -1)
                share = weights.masked_fill(near, 0.0).sum(-1)
                return (weights @ value).transpose(1, 2), weights, share.transpose(1, 2)
            # [B, H, T, 1]; the state is one more column, of all that it has read
            den = q @ state.n[..., None].to(dtype)
            empty = (den < least) | (tokens.document > 0)[:, None, :, None]
            log_den = (den.clamp_min(least).log() + factor).masked_fill(empty, float("-inf"))
            old, weights = torch.softmax(torch.cat([log_den, exponents], -1), -1).split([1, exponents.shape[-1]], -1)
            h = weights @ value + old * (q @ state.C.to(dtype)) / den.clamp_min(least)
            share = old[..., 0] + weights.masked_fill(near, 0.0).sum(-1)
        return h.transpose(1, 2), weights, share.transpose(1, 2)


def joint_softmax(attention, hidden_states, projected, tokens, mask, cache):
    """In the place of `HybridAttention.mix_heads`."""
    h, weights, _ = attention.mlstm(*projected[:3], tokens=tokens, scale=attention.scaling, layer=cache)
    return h, weights


@dataclass
class JointCall(RecordedCall):
    """A call, with the map [H, K, P] that its keys were read with."""

    feature_map: torch.Tensor | None = None
    signed: bool = False

    def more(self):
        return {"feature_map": self.feature_map, "signed": self.signed}


class JointCacheLayer(HybridCacheLayer):
    """A layer whose state is of the tokens that have left the window."""

    def left(self, tokens):
        """[B, T, slots] bool: tokens in the ring that are no longer in the window of each new token, sinks aside."""
        slot_index, S = self.slot_index[:, None], self.num_sink_tokens
        ring = torch.arange(slot_index.shape[-1], device=slot_index.device) >= S
        far = tokens.index[:, :, None] - slot_index >= self.sliding_window
        return ring & (slot_index >= S) & far & (tokens.document == 0)[:, :, None]

    def update(self, key_states, value_states, tokens, state=None, feature_map=None, signed=False):
        """As in `HybridCacheLayer`; the state is that of before and of what has left the window by now, sinks aside."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        S, W, place = self.num_sink_tokens, self.sliding_window, self.placing(tokens)
        new = tokens.index.masked_fill(~place.inside, -1)
        index = torch.cat([self.slot_index[:, S:].masked_fill(place.restarted, -1), new], -1)
        gone = ((index >= S) & (index < place.count - W))[..., None, None]
        key = torch.cat([self.keys[:, :, S:], key_states], 2)
        value = torch.cat([self.values[:, :, S:], value_states], 2)
        dtype, repeats = torch.promote_types(value.dtype, torch.float32), len(feature_map) // key.shape[1]
        features = LinearMixer.features(repeat_kv(key, repeats), feature_map, signed)
        k = features.to(dtype).masked_fill(~gone, 0.0).transpose(1, 2)  # [B, H, W + T, F]
        v = value.to(dtype).repeat_interleave(repeats, 1)
        C, n = k.transpose(-1, -2) @ v, k.sum(-2)
        if self.state is not None:
            C = C + self.state.C.masked_fill(place.restarted[..., None, None], 0.0)
            n = n + self.state.n.masked_fill(place.restarted[..., None], 0.0)
        return super().update(key_states, value_states, tokens, MLSTMState(C, n, n.new_zeros(n.shape[:2])))
