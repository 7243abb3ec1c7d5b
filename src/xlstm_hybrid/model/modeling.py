"""The hybrid xLSTM student: a Transformer decoder whose attention layers mix an mLSTM with window + sink attention.

Dims: B batch, T tokens, D hidden size, H query heads, G key/value heads, K query/key dim, V value dim, W window, S sinks.
Source: Hauzenberger et al. 2026 (arXiv 2603.15590), with an mLSTM as in Beck et al. 2024.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, eager_attention_forward, repeat_kv
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm, apply_rotary_pos_emb  # this one rounds to the dtype of q and k
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from xlstm_kernels import mix, window_attention

from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.cache import HybridCacheLayer, adopt_cache
from xlstm_hybrid.model.cache_names import ACCEPTED, CACHE, NAMES, cache_of, named, refuse_unknown, renamed, takes_cache
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.model.experimental.sparse import scores_of, sparse_attention
from xlstm_hybrid.model.kept_groups import KeptKeys, Split, join_weights, log_scaled
from xlstm_hybrid.model.mixer import JointMixer, MLSTMMixer
from xlstm_hybrid.model.tokens import Tokens

KEYWORDS = ACCEPTED | {"output_gates"}  # what a forward accepts beside its own parameters


@dataclass
class AlignmentOutput(ModelOutput):
    """What a teacher-forced pass returns: squared distances between student mixers and teacher attention, before W_o.

    loss: sum of `error` over the layers.  error, target: [layers] sums over counted tokens, heads and features of
    |softmax attention - h|^2 and of |softmax attention|^2.  num_items: counted tokens.
    """

    loss: torch.Tensor | None = None
    error: torch.Tensor | None = None
    target: torch.Tensor | None = None
    num_items: torch.Tensor | None = None


class XLSTMHybridRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE with the parameters of one teacher layer type, by default that of the first layer."""

    def __init__(self, config, layer_type=None):
        heads = config.num_attention_heads  # LlamaConfig wants hidden_size to be a multiple of them, other families do not
        super().__init__(
            LlamaConfig(
                hidden_size=heads * config.head_dim,
                num_attention_heads=heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=dict(config.rope_parameters_of(layer_type or config.teacher_layer_types[0])),
            )
        )
        self.in_float32 = config.norm_position == "post"  # OLMo 2 and 3 rotate in float32 and round afterwards

    def forward(self, x, position_ids):
        return super().forward(x.new_empty(0, dtype=torch.float32) if self.in_float32 else x, position_ids)


class HybridAttention(nn.Module):
    """Attention layer of the student. `hybrid_sliding`: o * mLSTM + (1 - o) * window attention; else the teacher's own attention."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.layer_type = config, layer_idx, config.layer_types[layer_idx]
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window, self.num_sink_tokens = config.window_of(layer_idx), config.sinks_of(layer_idx)
        D, q_dim, kv_dim = config.hidden_size, config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, D, bias=config.attention_output_bias)
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = (LlamaRMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        elif config.qk_norm == "full":
            self.q_norm, self.k_norm = Olmo2RMSNorm(q_dim, config.rms_norm_eps), Olmo2RMSNorm(kv_dim, config.rms_norm_eps)
        if self.layer_type == "hybrid_sliding":
            self.mlstm = (JointMixer if config.mixer_combine == "joint" else MLSTMMixer)(config, layer_idx)
        kept = config.kept_of(layer_idx)
        self.split = Split(kept, config.num_key_value_heads, self.num_key_value_groups) if kept else None

    def project(self, hidden_states, position_embeddings):
        """`(query [B, H, T, K], key [B, G, T, K], value [B, G, T, V], raw, unrotated)`; raw is (q, k, v) before QK-norm and RoPE, [B, T, H | G, K],
        unrotated is (query, key) before RoPE."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        raw = q.view(heads), k.view(heads), v.view(heads)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(heads), k.view(heads)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        unrotated = q.transpose(1, 2), k.transpose(1, 2)
        query, key = apply_rotary_pos_emb(*unrotated, *position_embeddings)
        return query, key, raw[2].transpose(1, 2), raw, unrotated

    def attend(self, query, key, value, mask, sliding_window=None, implementation=None, **kwargs):
        """Softmax attention through transformers' attention interface: `([B, T, H, V], weights or None)`."""
        implementation = implementation or self.config._attn_implementation
        if implementation == "eager" and mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, sliding_window=sliding_window, **kwargs)

    def mix(self, hidden_states, projected, tokens, mask, cache=None):
        """`h [B, T, H, V]` of a hybrid layer, before W_o, and the attention weights of window and kept groups; updates the cache layer."""
        if self.split is None:
            return self.mix_heads(hidden_states, projected, tokens, mask, cache)
        h, weights = self.mix_heads(hidden_states, self.split.projected(projected, kept=False), tokens, mask, cache)
        full, full_weights = self.keep(self.split.projected(projected, kept=True), tokens, cache)
        return self.split.join(h, full, 2), join_weights(self.split, weights, full_weights)

    def keep(self, projected, tokens, cache=None):
        """Full attention of the kept groups, `(h [B, T, E R, V], weights or None)`; the teacher's own window, where it had one."""
        query, key, value, _, unrotated = projected
        if self.config.kept_positions == "log":
            query, key = unrotated
            query = log_scaled(query, tokens.index, self.config.kept_log_base)
        held, spare = (KeptKeys(self.config.kept_window_of(self.layer_idx)), 0) if cache is None else (cache.kept, cache.depth)
        dense = "eager" if self.config._attn_implementation == "eager" else "sdpa"
        key, value, mask = held.append(key, value, tokens, spare, masked=dense == "eager")
        return self.attend(query, key, value, mask, implementation=dense)

    def mix_heads(self, hidden_states, projected, tokens, mask, cache=None):
        """`mix` for the heads that do not keep full attention."""
        query, key, value, (q, k, v), unrotated = projected
        n, branches = self.num_key_value_groups, self.config.mixer_branches
        qkv = torch.cat([q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2)], -1)
        memory_q, memory_k = (query, key) if self.config.memory_rope else unrotated
        inputs = hidden_states, qkv, memory_q, repeat_kv(memory_k, n), repeat_kv(value, n), tokens
        if self.config.sparse_memory:
            return self.mix_sparse(inputs, query, key, value, tokens, cache)
        if self.config.mixer_combine == "joint":
            h, _, weights = self.mlstm(*inputs, self.scaling, cache)
            if cache is not None:
                cache.read_keys = lambda key: self.mlstm.read_keys(key)  # a copy of the cache must not copy the module
                cache.record((), self.config.mlstm_chunk_size)
                cache.update(key, value, tokens)
            return self.normed(h).to(value.dtype), weights
        held = cache is not None and cache.is_initialized
        if held and cache.state is None and branches != "window":
            raise CacheError(
                f"cache: layer {self.layer_idx} has no state, it was filled with mixer_branches='window', now {branches!r}; "
                "start from DynamicCache(config=model.config)"
            )
        if held and mask is None:  # one token after a filled cache, see `prepare`
            h, _, _ = self.mlstm(*inputs, step=partial(cache.step, query, key, value, tokens=tokens, scale=self.scaling))
            return self.normed(h).to(value.dtype), None
        remembered = {} if cache is None else {"state": cache.state, "record": cache.record if cache.record_past else None}
        memory, o, state = self.mlstm(*inputs, **remembered)
        if cache is not None:
            seen = (torch.cat([cache.keys, key], 2), torch.cat([cache.values, value], 2)) if held else (key, value)
            cache.update(key, value, tokens)
            cache.hold(state)
            key, value = seen
        if branches == "memory":
            return self.normed(memory).to(value.dtype), None
        if mask is None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            where = {} if tokens.plain else {"index": tokens.index, "document": tokens.document}
            window = window_attention(q, k, v, window=self.sliding_window, sinks=self.num_sink_tokens, scale=self.scaling, **where)
            weights = None
        else:
            dense = "eager" if self.config._attn_implementation == "eager" else "sdpa"  # flash and flex have no mask for window + sinks
            window, weights = self.attend(query, key, value, mask, implementation=dense)
        h = window if branches == "window" else mix(memory, window, o)
        return self.normed(h).to(value.dtype), weights

    def normed(self, h):
        """h [B, T, H, V] on the scale of `mixer_norm`'s weights where there are some; PEFT may have wrapped the module that holds them."""
        mixer = self.mlstm
        while hasattr(mixer, "base_layer"):
            mixer = mixer.base_layer
        return mixer.normed(h)

    def mix_sparse(self, inputs, query, key, value, tokens, cache=None):
        """`mix_heads` where the tokens that score best join the window's softmax; `inputs` are those of the mixer."""
        config, read = self.config, []
        layer = HybridCacheLayer(self.sliding_window, self.num_sink_tokens, capacity=config.sparse_memory) if cache is None else cache
        memory, o, state = self.mlstm(*inputs, state=layer.state, record=lambda *call: read.append(call))
        scores = scores_of(config.sparse_memory_score, tokens, key, read[0], layer.state, self.layer_idx, config.memory_cell)
        attend = None
        if config._attn_implementation == "eager" or (self.training and config.attention_dropout):
            attend = partial(self.attend, implementation="eager" if config._attn_implementation == "eager" else "sdpa")
        window, weights = sparse_attention(query, key, value, tokens, scores, layer, attend, self.scaling)
        if cache is not None:
            if cache.record_past:
                cache.record(*read[0])
            cache.update(key, value, tokens, scores)
            cache.hold(state)
        return self.normed(mix(memory, window, o)).to(value.dtype), weights

    def forward(self, hidden_states, position_embeddings, tokens, masks, cache=None, **kwargs):
        """`(output [B, T, D], attention weights or None)`; `masks` holds one mask per (layer type, window, sinks)."""
        projected, mask = self.project(hidden_states, position_embeddings), masks[mask_key(self.config, self.layer_idx)]
        if self.layer_type == "hybrid_sliding":
            layer = None if cache is None else cache.layers[self.layer_idx]
            h, weights = self.mix(hidden_states, projected, tokens, mask, layer)
        else:
            query, key, value, *_ = projected
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            h, weights = self.attend(query, key, value, mask, self.sliding_window, **kwargs)
        return self.o_proj(h.flatten(-2)), weights

    def teacher_forced(self, hidden_states, position_embeddings, tokens, masks, counted, position_ids=None):
        """The teacher's attention on these inputs, and how far the student's mixer is from it (METHOD 1.2).

        Only the mixer's own parameters receive gradients: layers stay independent.

        Returns:
            `(output [B, T, D], error, target)`: squared error and squared target, summed over the `counted` [B, T] tokens.
        """
        with torch.no_grad():
            projected = self.project(hidden_states, position_embeddings)
            teacher_type, window = self.config.teacher_layer_types[self.layer_idx], self.config.teacher_sliding_window
            teacher_window = window if teacher_type == "sliding_attention" else None
            target, _ = self.attend(*projected[:3], masks["teacher", teacher_type], teacher_window, position_ids=position_ids)
            output = self.o_proj(target.flatten(-2))
        dtype = torch.promote_types(target.dtype, torch.float32)
        if self.layer_type != "hybrid_sliding":
            return output, *target.new_zeros(2, dtype=dtype)
        h, _ = self.mix(hidden_states, projected, tokens, masks[mask_key(self.config, self.layer_idx)])
        h, target, counted = h.to(dtype), target.to(dtype), counted[..., None, None]
        return output, torch.where(counted, h - target, 0.0).square().sum(), torch.where(counted, target, 0.0).square().sum()


class HybridMLP(nn.Module):
    """The teacher's gated MLP."""

    def __init__(self, config):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias=config.mlp_bias), nn.Linear(D, F, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class CheckpointedLayer(GradientCheckpointingLayer):
    """A layer that is checkpointed only where gradients are wanted."""

    checkpointing = False

    @property
    def gradient_checkpointing(self):
        """Without gradients there is nothing to save, and a checkpointed layer works without its cache: `generate` would lose the context."""
        return self.checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.checkpointing = on


class HybridDecoderLayer(CheckpointedLayer):
    """Attention and MLP with residuals; norms before them (Llama, Mistral, Qwen) or after (OLMo 2 and 3)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.self_attn, self.mlp = HybridAttention(config, layer_idx), HybridMLP(config)
        norm = LlamaRMSNorm if self.pre_norm else Olmo2RMSNorm
        if self.pre_norm:
            self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        if not self.pre_norm:
            self.post_feedforward_layernorm = norm(config.hidden_size, config.rms_norm_eps)

    def attention_input(self, hidden_states):
        return self.input_layernorm(hidden_states) if self.pre_norm else hidden_states

    def finish(self, hidden_states, attention):
        """Residual stream after attention output and MLP."""
        if self.pre_norm:
            hidden_states = hidden_states + attention
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_attention_layernorm(attention)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))

    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(self.attention_input(hidden_states), **kwargs)
        return self.finish(hidden_states, attention)


def drop_absent_names(model):
    """Of the names that stay in float32 keep those that the model has: which gates there are is for the configuration to say."""
    have = {part for name, _ in model.named_parameters() for part in name.split(".")}
    model._keep_in_fp32_modules &= have
    model._keep_in_fp32_modules_strict &= have


class XLSTMHybridPreTrainedModel(PreTrainedModel):
    config: XLSTMHybridConfig
    config_class = XLSTMHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer"]
    _skip_keys_device_placement = NAMES
    _keep_in_fp32_modules_strict = ["igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias", "joint_scale"]
    _keep_in_fp32_modules = ["mlstm"]  # in float16; and what quantisers leave alone
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _is_stateful = False  # rolling back works: cache layers record what assisted decoding may take back, and refuse what they cannot
    _can_record_outputs = {
        "hidden_states": HybridDecoderLayer,
        "attentions": OutputRecorder(HybridAttention, index=1),
        "gates": OutputRecorder(MLSTMMixer, index=1),
    }

    def post_init(self):
        super().post_init()
        drop_absent_names(self)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MLSTMMixer):
            for feature_map in (module.q_map, module.k_map):
                init.copy_(feature_map, module.first_map().expand_as(feature_map))
            first = {"fgate_bias": module.forget_bias(), "ogate_bias": self.config.mlstm_output_gate_bias, "norm_weight": 1.0}
            for name, parameter in module.named_parameters(recurse=False):  # which there are is for the config to say
                if not name.endswith("_map"):
                    init.copy_(parameter, torch.as_tensor(first.get(name, 0.0), dtype=torch.float64).expand_as(parameter))


def mask_key(config, layer_idx):
    return config.layer_types[layer_idx], config.window_of(layer_idx), config.sinks_of(layer_idx)


def attention_mask_of(config, kind, window, layer_idx, tokens, packed, **kwargs):
    """Mask of a layer that keeps the teacher's attention: transformers' own, or ours where one row holds several documents."""
    if packed and config._attn_implementation in ("eager", "sdpa"):
        return tokens.visible(window or tokens.real.shape[1], 0)[:, None]
    if kind == "full_attention":
        return create_causal_mask(config=config, layer_idx=layer_idx, **kwargs)
    config = copy.copy(config)
    config.sliding_window = window
    return create_sliding_window_causal_mask(config=config, layer_idx=layer_idx, **kwargs)


class XLSTMHybridModel(XLSTMHybridPreTrainedModel):
    """Embeddings, decoder layers and final norm. Set `window_dropout` to have another probability than the config's, as a schedule does."""

    window_dropout = None

    def __init__(self, config):
        config.check()  # its fields may have been changed since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridDecoderLayer(config, j) for j in range(config.num_hidden_layers)])
        self.norm = (LlamaRMSNorm if config.norm_position == "pre" else Olmo2RMSNorm)(config.hidden_size, config.rms_norm_eps)
        kinds = config.teacher_layer_types
        self.rotary_emb = nn.ModuleDict({kind: XLSTMHybridRotaryEmbedding(config, layer_type=kind) for kind in sorted(set(kinds))})
        self.gradient_checkpointing = False
        self.post_init()

    def prepare(self, inputs_embeds, attention_mask, position_ids, cache, teacher=False, **kwargs):
        """`(tokens, masks, position_embeddings, position_ids)` that the layers share; masks and embeddings are dicts over layer kinds."""
        config, (B, T) = self.config, inputs_embeds.shape[:2]
        present = [j for j, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)]  # a pipeline's stage has some of the layers
        layers = [cache.layers[j] for j in present if config.layer_types[j] == "hybrid_sliding"] if cache is not None else []
        filled = layers if layers and layers[0].is_initialized else []
        seen = cache.layers[present[0]].get_seq_length() if cache is not None and present else 0
        self.check_inputs(B, attention_mask, kwargs.get("cu_seq_lens_q"), seen)
        tokens = Tokens.locate(
            (B, T),
            inputs_embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            seq_idx=kwargs.get("seq_idx"),
            seen=filled[0].count.to(inputs_embeds.device) if filled else None,
        )
        kinds = [(j, mask_key(config, j)) for j in present]
        if teacher:
            kinds = kinds + [(None, ("teacher", kind)) for kind in config.teacher_layer_types]
        masks, needs_packing = {}, any(kind[0] != "hybrid_sliding" for _, kind in kinds)
        packed = needs_packing and T > 1 and not tokens.plain and bool(tokens.start.any())
        if packed and seen > 0:
            raise CacheError(
                "packed documents after a filled cache: layers with full attention keep the keys of earlier documents; "
                "start each packed row with an empty cache, or pass use_cache=False"
            )
        if position_ids is None:  # positions count real tokens: feature maps follow RoPE, so padding must not shift them
            position_ids = tokens.index.clamp_min(0)
            if not layers:
                position_ids = position_ids + seen
        shared = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids, **named(cache)}
        for j, kind in kinds:
            if kind in masks:
                continue
            if kind[0] == "hybrid_sliding":
                masks[kind] = self.hybrid_mask(tokens, *kind[1:], cache.layers[j] if filled else None)
            elif kind[0] == "teacher":
                masks[kind] = attention_mask_of(config, kind[1], config.teacher_sliding_window, None, tokens, packed, **shared)
            else:
                masks[kind] = attention_mask_of(config, *kind[:2], j, tokens, packed, **shared)
        return tokens, masks, {kind: rope(inputs_embeds, position_ids) for kind, rope in self.rotary_emb.items()}, position_ids

    def check_inputs(self, rows, attention_mask, cu_seq_lens, seen):
        """Raise a named error for inputs that the layers would misread; `seen` is the number of tokens in the cache."""
        if wrong := self.config.wrong_mixer() or self.config.wrong_memories():  # its fields may be changed between two calls
            raise ConfigError("; ".join(wrong))
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(
                f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}; window and state are derived from the padding"
            )
        if cu_seq_lens is not None and rows != 1:
            raise ConfigError(f"cu_seq_lens_q describes one flattened row, the batch has {rows}; flatten it or pass position_ids that restart")
        if self.checkpointed and seen > 0:
            raise CacheError(
                f"the cache holds {seen} tokens, but layers work without a cache under gradient checkpointing; "
                "call gradient_checkpointing_disable(), or pass the whole sequence"
            )

    @property
    def checkpointed(self):
        """Whether a call's layers are run again in the backward."""
        return self.training and self.gradient_checkpointing and torch.is_grad_enabled()

    def hybrid_mask(self, tokens, window, sinks, filled=None):
        """[B, 1, T, (S + W) + T] of a hybrid layer; None where none is needed: banded attention from an empty cache, a step from a filled one.

        Args:
            filled: a `HybridCacheLayer` of that kind, if it holds tokens.
        """
        if self.config.sparse_memory:
            return None  # what is visible depends on the layer, see `sparse_attention`
        dense = self.config._attn_implementation == "eager" or (self.training and self.config.attention_dropout)
        step = tokens.real.shape[1] == 1 and not torch.is_grad_enabled()
        if not dense and (filled is None or step):
            return None
        new = tokens.visible(window, sinks)[:, None]
        return new if filled is None else torch.cat([filled.visible(tokens.to(filled.device))[:, None].to(new.device), new], -1)

    def blind_rows(self, real):
        """[B] bool: one draw per row for window dropout, the same in all layers; None outside of training, `real` is [B, T]."""
        p = self.config.window_dropout if self.window_dropout is None else self.window_dropout
        if not p or not self.training or not torch.is_grad_enabled():
            return None
        return torch.rand(len(real), device=real.device) < p

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None, **kwargs):
        """Residual stream after the last norm; arguments as in `LlamaModel.forward`.

        Packed documents are told apart by restarting `position_ids`, by `cu_seq_lens_q` (one row) or by `seq_idx`.

        Raises:
            ConfigError: both or neither of `input_ids` and `inputs_embeds`, or a mask that is not [batch, tokens].
            CacheError: a cache of another model, or packed documents that a cache cannot keep apart.
            CompatibilityError: a cache under a name that is not known here.
        """
        refuse_unknown(kwargs, KEYWORDS, type(self).__name__)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            cache = adopt_cache(cache, self.config)
        tokens, masks, rope, position_ids = self.prepare(hidden_states, attention_mask, position_ids, cache, **kwargs)
        tokens.blind = self.blind_rows(tokens.real)
        held = None if self.checkpointed else cache  # a layer that is run again in the backward would fill it twice
        for layer, kind in zip(self.layers, self.config.teacher_layer_types, strict=True):
            where = {"tokens": tokens, "masks": masks, "position_embeddings": rope[kind], "position_ids": position_ids}
            hidden_states = layer(hidden_states, **where, cache=held, **kwargs)
        for j, layer in enumerate(self.layers if cache is not None else ()):
            if isinstance(layer, nn.Identity) and hasattr(cache.layers[j], "skip"):
                cache.layers[j].skip(hidden_states.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named(cache))

    def teacher_forced(self, input_ids, attention_mask=None, position_ids=None, counted=None, **kwargs):
        """Stage I: the teacher's trunk, and each hybrid layer's distance from the attention it replaces (METHOD 1.2).

        The trunk is the teacher as long as only the mixers' new parameters have been trained.

        Args:
            counted: [B, T] bool, tokens whose error counts; all real ones by default.
        Returns:
            AlignmentOutput
        """
        with torch.no_grad():
            hidden_states = self.embed_tokens(input_ids)
            tokens, masks, rope, position_ids = self.prepare(hidden_states, attention_mask, position_ids, None, teacher=True, **kwargs)
        counted = tokens.real if counted is None else counted & tokens.real
        errors, targets = [], []
        for layer, kind in zip(self.layers, self.config.teacher_layer_types, strict=True):
            with torch.no_grad():
                x = layer.attention_input(hidden_states)
            attention, error, target = layer.self_attn.teacher_forced(x, rope[kind], tokens, masks, counted, position_ids)
            errors.append(error)
            targets.append(target)
            with torch.no_grad():
                hidden_states = layer.finish(hidden_states, attention)
        errors = torch.stack(errors)
        return AlignmentOutput(loss=errors.sum(), error=errors, target=torch.stack(targets), num_items=counted.sum())


def keep_positions(hidden_states, keep):
    """The positions whose logits are wanted: the last `keep` (0: all), indices [n] or [B, n], or a [B, T] bool mask (then flat)."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.ndim == 2:
        return hidden_states[keep] if keep.dtype == torch.bool else hidden_states.take_along_dim(keep[..., None], 1)
    return hidden_states[:, keep]


class XLSTMHybridForCausalLM(XLSTMHybridPreTrainedModel, GenerationMixin):
    """The student with its language-model head; loads with `AutoModelForCausalLM` once `xlstm_hybrid` is imported."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config):
        super().__init__(config)
        self.model = XLSTMHybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return True  # transformers says no to every class with "xlstm" in its name

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers; then the cache becomes ours at once, so that `generate` compiles, chunks and refuses by what its layers are."""
        if generation_config.cache_implementation == "quantized" and "hybrid_sliding" in self.config.layer_types:
            raise CacheError(
                "cache_implementation='quantized': a hybrid layer's state needs float32 and its window does not grow, there is nothing to quantise; "
                "leave it out, or load the model in bfloat16, which halves the window"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if cache_of(model_kwargs) is not None:
            adopt_cache(cache_of(model_kwargs), self.config)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch` and `transformers serve --continuous-batching`: they keep keys and values in shared pages."""
        raise CacheError(
            "continuous batching (generate_batch, cache_implementation='paged'): its paged cache has no place for the state of an mLSTM; pass a "
            "left-padded batch to generate(), or read a common prefix once with xlstm_hybrid.state.prefill and answer from fork(cache, rows)"
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The model derives its masks from the 2-D one and from the cache. Hybrid layers read no more than the call's own columns: without the
        others, a compiled step keeps its shapes."""
        if attention_mask is None or set(config.layer_types) != {"hybrid_sliding"}:
            return attention_mask
        return attention_mask[:, -inputs_embeds.shape[1] :]

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, cache=None, inputs_embeds=None, **kwargs):
        """As in transformers, which looks for `inputs_embeds` in the signature; but assisted decoding, too, feeds a filled cache only what it has
        not seen (transformers feeds the whole prompt)."""
        lengths = {kwargs[name].shape[-1] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
        whole = lengths == {input_ids.shape[1]}  # else the caller passes new tokens only; transformers before 5.18 cuts the mask alone
        if next_sequence_length is None and cache is not None and whole and inputs_embeds is None:
            next_sequence_length = max(input_ids.shape[1] - cache.get_seq_length(), 0) or None
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **named(cache), **kwargs)

    def generate(self, *args, **kwargs):
        """As in transformers; the cache may have either of its names, whatever the installed version calls it."""
        return super().generate(*args, **renamed(kwargs, CACHE, "generate"))

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        teacher_forced=False,
        **kwargs,
    ):
        """Logits and, with `labels`, the loss; arguments as in `LlamaForCausalLM.forward`.

        Args:
            teacher_forced: run stage I instead and return an `AlignmentOutput` (see `XLSTMHybridModel.teacher_forced`).
        """
        if teacher_forced:
            if (self._tp_size or 1) > 1:
                raise ConfigError(f"teacher_forced: tp_size={self._tp_size}, expected 1: errors are sums over all heads; align in one process")
            return self.model.teacher_forced(input_ids, attention_mask, position_ids, **kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **named(cache_of(outputs))
        )
        if "gates" in outputs:  # output_gates=True
            result["gates"] = outputs["gates"]
        return result


class XLSTMHybridForSequenceClassification(GenericForSequenceClassification, XLSTMHybridPreTrainedModel):
    """One score or class per row, read from its last real token, as reward models are; arguments as in `LlamaForSequenceClassification`."""


class XLSTMHybridForTokenClassification(GenericForTokenClassification, XLSTMHybridPreTrainedModel):
    """A class per token; arguments as in `LlamaForTokenClassification`."""


class XLSTMHybridForQuestionAnswering(GenericForQuestionAnswering, XLSTMHybridPreTrainedModel):
    """Where an answer begins and ends; arguments as in `LlamaForQuestionAnswering`."""
