"""The hybrid layer: o * mLSTM + (1 - o) * window attention, head by head, in the place of a Transformer's attention.

Dims: B batch, T tokens, D hidden size, H query heads, G key/value heads, K query/key dim, V value dim, F features.
Source: Hauzenberger et al. 2026 (arXiv 2603.15590), with an mLSTM as in Beck et al. 2024.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, repeat_kv

# this one rounds to the dtype of q and k
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm, apply_rotary_pos_emb
from xlstm_kernels import mix, window_attention

from xlstm_hybrid.model.cache import PlacedLayer, place_of
from xlstm_hybrid.model.experimental.cells import CELLS, normed
from xlstm_hybrid.model.experimental.variants import VARIANTS, mixer_of
from xlstm_hybrid.model.kept_groups import KeptKeys, Split, join_weights, log_scaled
from xlstm_hybrid.model.linear import Linear
from xlstm_hybrid.model.one_token import compiled_step
from xlstm_hybrid.model.rollback import RecordedCall, Step


def rms_norm(config, dim):
    """A norm over `dim` features: OLMo 2 and 3 multiply by the weight before they round, Llama and OLMoE afterwards."""
    usual = LlamaRMSNorm if config.norm_position == "pre" else Olmo2RMSNorm
    return (Gemma3RMSNorm if config.norm_plus_one else usual)(dim, config.rms_norm_eps)


class HybridAttention(nn.Module):
    """Attention layer of the student: "hybrid_sliding" mixes, any other type is the teacher's own attention."""

    # [H, 1] bool, heads with full attention in passes without a cache: `planning.layers` measures what each is worth
    restored = None

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.layer_type = config, layer_idx, config.layer_types[layer_idx]
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.attention_scaling, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window, self.num_sink_tokens = config.window_of(layer_idx), config.sinks_of(layer_idx)
        self.gated = config.attention_output_gate
        D, q_dim = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_dim = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(D, q_dim * (2 if self.gated else 1), bias=config.attention_bias)
        self.k_proj = Linear(D, kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(D, kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(q_dim, D, bias=config.attention_output_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm == "head":
            norm = Gemma3RMSNorm if config.norm_plus_one else LlamaRMSNorm
            self.q_norm, self.k_norm = (norm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        elif self.qk_norm == "full":
            self.q_norm, self.k_norm = (rms_norm(config, dim) for dim in (q_dim, kv_dim))
        if self.layer_type == "hybrid_sliding":
            self.mlstm = mixer_of(config)(config, layer_idx)
        kept = config.kept_of(layer_idx)
        self.split = Split(kept, config.num_key_value_heads, self.num_key_value_groups) if kept else None

    def forward(self, hidden_states, position_embeddings, tokens, mask, cache=None, **kwargs):
        """`(output [B, T, D], attention weights or None)`; `cache` is that of all layers."""
        heads, hybrid = self.heads(hidden_states), self.layer_type == "hybrid_sliding"
        layer = cache.layers[self.layer_idx] if hybrid and cache is not None else None
        if layer is not None and mask is None and tokens.compiled is not None:
            h = compiled_step(self, hidden_states, heads, position_embeddings, tokens, layer)
            if h is not None:
                return self.output(h, heads), None
        projected = self.rotated(heads, position_embeddings)
        if hybrid:
            h, weights = self.mix(hidden_states, projected, tokens, mask, layer)
        else:
            h, weights = self.teacher_attention(projected, tokens, mask, cache, **kwargs)
        return self.output(h, heads), weights

    def output(self, h, heads):
        """[B, T, D] of what the heads give, h [B, T, H, V]: times the teacher's gate where it has one, then W_o."""
        *_, gate = heads
        return self.o_proj((h if gate is None else h * torch.sigmoid(gate)).flatten(-2))

    def teacher_attention(self, projected, tokens, mask, cache=None, **kwargs):
        """The attention that a layer keeps: `(h [B, T, H, V], weights or None)`."""
        query, key, value, *_ = projected
        layer, window = None if cache is None else cache.layers[self.layer_idx], self.sliding_window
        counts = tokens.uneven and window is not None  # columns, by transformers' mask
        if isinstance(layer, PlacedLayer):
            seen = layer.update(key, value, tokens)
            key, value, mask = seen if counts else (key, value, mask)
        elif counts:
            mask = tokens.visible(window, 0)[:, None]
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if counts:
            return self.attend(query, key, value, mask, implementation=self.masked_implementation)
        return self.attend(query, key, value, mask, window, **kwargs)

    def heads(self, hidden_states):
        """`((q, k), (q, k, v), gate)` before RoPE, the second before QK-norm, too; each [B, T, H | G, K]. The gate is that of
        the teacher's attention output, before its sigmoid; None without `attention_output_gate`.
        """
        heads, gate = (*hidden_states.shape[:-1], -1, self.head_dim), None
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.gated:  # each head has its query and then its gate
            q, gate = q.view(*heads[:-1], 2 * self.head_dim).chunk(2, -1)
            q = q.flatten(-2)
        raw = q.view(heads), k.view(heads), v.view(heads)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
            q, k = q.view(heads), k.view(heads)
        else:
            q, k, _ = raw
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return (q, k), raw, gate

    @staticmethod
    def rotated(heads, position_embeddings):
        """`(query [B, H, T, K], key [B, G, T, K], value [B, G, T, V], raw, unrotated)` of `heads`; raw is (q, k, v) before
        QK-norm and RoPE, [B, T, H | G, K], unrotated is (query, key) before RoPE.

        Args:
            position_embeddings: cos and sin, [B, T, R] of the R first dims of each head, which alone rotate.
        """
        (q, k), raw, _ = heads
        unrotated, R = (q.transpose(1, 2), k.transpose(1, 2)), position_embeddings[0].shape[-1]
        if q.shape[-1] > R:
            turned = apply_rotary_pos_emb(*(x[..., :R] for x in unrotated), *position_embeddings)
            query, key = (torch.cat([y, x[..., R:]], -1) for y, x in zip(turned, unrotated, strict=True))
        else:
            query, key = apply_rotary_pos_emb(*unrotated, *position_embeddings)
        return query, key, raw[2].transpose(1, 2), raw, unrotated

    # --- the mix of both branches ----------------------------------------------------------------------------------

    def mix_heads(self, hidden_states, projected, tokens, mask, cache=None):
        """`(h [B, T, H, V], attention weights or None)`: o * mLSTM + (1 - o) * window attention. Takes the tokens into
        the cache layer.
        """
        query, key, value, *_ = projected
        config = vars(self.config)  # transformers' configs look every attribute up in Python
        variant = VARIANTS.get((config["mixer_combine"], config["mixer_branches"], config["sparse_memory"] > 0))
        if variant is not None:
            return variant.mix_heads(self, hidden_states, projected, tokens, mask, cache)
        cell, chunk_size = CELLS[config["memory_cell"]], config["mlstm_chunk_size"]
        mlstm, hybrid_step = cell.run, cell.step  # the paper's, unless `memory_cell` names another recurrence
        phi_q, phi_k, i, f, o = self.read(hidden_states, projected, tokens)

        # one token: nothing is allocated that depends on window or context
        if mask is None and cache is not None and cache.is_initialized:
            inputs = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), phi_q, phi_k, i, f, o
            if cache.depth:  # tokens that may be taken back
                cache.note(Step(hybrid_step, inputs, tokens, self.scaling))
            if (slots := cache.keys.shape[2]) < cache.slots:
                slots = cache.grow(1)
            known = not torch.compiler.is_compiling() and tokens.places.get((slots, cache.num_sink_tokens))
            index, place = known or place_of(tokens, cache)
            where = {"sinks": cache.num_sink_tokens, "scale": self.scaling, "place": place}
            h = hybrid_step(*inputs, cache.state, cache.keys, cache.values, index, **where)
            cache.advance(tokens)
            return h, None

        written = phi_k, repeat_kv(value, self.num_key_value_groups).transpose(1, 2), i, f
        memory, state = mlstm(phi_q, *written, state=None if cache is None else cache.state, chunk_size=chunk_size)
        if cache is not None:
            if cache.depth:
                cache.note(RecordedCall(mlstm, written, key, value, tokens, chunk_size))
            key, value = cache.update(key, value, tokens, state)
        if config["mixer_branches"] == "memory":  # a baseline: o = 1
            return memory, None
        window, weights = self.window(query, key, value, tokens, mask)
        return mix(memory, window, o), weights

    def read(self, hidden_states, projected, tokens):
        """`(phi_q, phi_k, i, f, o)`: features of queries and keys [B, T, H, F], and the gates [B, T, H]."""
        query, key, _, raw, unrotated = projected
        query, key = (query, key) if vars(self.config)["memory_rope"] else unrotated
        return self.mlstm(hidden_states, raw, query, key, tokens=tokens)

    def window(self, query, key, value, tokens, mask):
        """`([B, T, H, V], weights or None)`: softmax attention over the last W tokens and the first S of each document."""
        if mask is not None:
            return self.attend(query, key, value, mask, implementation=self.masked_implementation)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        where = {} if tokens.plain else {"index": tokens.index, "document": tokens.document}
        where |= {"window": self.sliding_window, "sinks": self.num_sink_tokens}
        return window_attention(q, k, v, scale=self.scaling, **where), None

    # --- kept groups -----------------------------------------------------------------------------------------------

    def mix(self, hidden_states, projected, tokens, mask, cache=None):
        """`(h [B, T, H, V] before W_o, attention weights or None)` of all heads of a hybrid layer, those that keep full
        attention included.
        """
        mixed = projected if self.split is None else self.split.projected(projected, kept=False)
        h, weights = self.mix_heads(hidden_states, mixed, tokens, mask, cache)
        h, dtype = normed(self.mlstm, h) if vars(self.config)["mixer_norm"] else h, projected[2].dtype
        h = h if h.dtype == dtype else h.to(dtype)
        if self.split is not None:
            full, full_weights = self.keep(self.split.projected(projected, kept=True), tokens, cache)
            h, weights = self.split.join(h, full, 2), join_weights(self.split, weights, full_weights)
        if self.restored is not None:
            h = torch.where(self.restored.to(h.device), self.keep(projected, tokens)[0], h)
        return h, weights

    def keep(self, projected, tokens, cache=None):
        """Full attention of the kept groups, `(h [B, T, E R, V], weights or None)`; the teacher's own window, where it
        had one.
        """
        query, key, value, _, unrotated = projected
        if self.config.kept_positions == "log":
            query, key = unrotated
            query = log_scaled(query, tokens.index, self.config.kept_log_base)
        keys = KeptKeys(self.config.kept_window_of(self.layer_idx)) if cache is None else cache.kept
        spare, masked = None if cache is None else cache.depth, self.masked_implementation == "eager"
        key, value, mask = keys.append(key, value, tokens, spare, masked)
        return self.attend(query, key, value, mask, implementation=self.masked_implementation)

    # --- softmax attention -----------------------------------------------------------------------------------------

    @property
    def masked_implementation(self):
        """Where masks are our own: flash and flex have none for window + sinks."""
        return "eager" if self.config._attn_implementation == "eager" else "sdpa"

    def attend(self, query, key, value, mask, sliding_window=None, implementation=None, **kwargs):
        """Softmax attention through transformers' attention interface: `([B, T, H, V], weights or None)`."""
        implementation = implementation or self.config._attn_implementation
        if implementation == "eager" and mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs |= {"dropout": self.config.attention_dropout if self.training else 0.0, "sliding_window": sliding_window}
        return interface(self, query, key, value, mask, scaling=self.scaling, **kwargs)
