"""One layer of the student: norms, hybrid attention, the teacher's MLP or experts, and what stage I asks of it.

Dims: B batch, T tokens, D hidden size, F width of the MLP.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
    load_balancing_loss_func,
)

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.attention import HybridAttention, rms_norm
from xlstm_hybrid.model.configuration import LINEAR
from xlstm_hybrid.model.linear import Linear, hooked
from xlstm_hybrid.model.linear_attention import attend, gated_delta_net

ROUTERS = Qwen2MoeTopKRouter, Qwen3MoeTopKRouter
EXPERTS = *ROUTERS, Qwen2MoeExperts, Qwen3MoeExperts


class Align(NamedTuple):
    """What stage I asks of a decoder layer.

    counted: [B, T] bool, tokens whose error counts.  teacher_mask: of the attention that the layer replaces.
    output_terms: whether cosine and distance after W_o are wanted.  onward: whether hidden states after the layer are
    wanted; else those before it are returned, which cost nothing.
    """

    counted: torch.Tensor
    teacher_mask: torch.Tensor | None
    output_terms: bool = False
    onward: bool = True


ALIGNMENT_TERMS = ("error", "target", "cosine", "frobenius")  # what a layer sums over counted tokens in stage I


class XLSTMHybridRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE with the parameters of one teacher layer type, by default that of the first layer with attention."""

    def __init__(self, config, layer_type=None):
        first = next(kind for kind in config.teacher_layer_types if kind != LINEAR)
        rope = dict(config.rope_parameters_of(layer_type or first))
        # where a part of a head rotates, it is as a head of that size
        head_dim = int(config.head_dim * rope.pop("partial_rotary_factor", 1.0))
        # LlamaConfig wants hidden_size to be a multiple of them, other families do not
        heads = config.num_attention_heads
        super().__init__(
            LlamaConfig(
                hidden_size=heads * head_dim,
                num_attention_heads=heads,
                head_dim=head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=rope,
            )
        )
        self.in_float32 = config.norm_position == "post"  # OLMo 2 and 3 rotate in float32 and round afterwards

    def forward(self, x, position_ids):
        return super().forward(x.new_empty(0, dtype=torch.float32) if self.in_float32 else x, position_ids)


def scaled(x, factor):
    """x times a factor of the teacher's; x itself where it is 1, as in most."""
    return x if factor == 1 else x * factor


def scaled_embeddings(x, factor):
    """The same of embeddings, with the factor rounded to their dtype first, as Gemma 3 does; Granite's is a whole number."""
    return x if factor == 1 else x * x.new_full((), factor)


def scaled_logits(config, logits):
    """Logits as the teacher's family divides and caps them (Granite, Gemma)."""
    if config.logits_scaling != 1:
        logits = logits / config.logits_scaling
    if (cap := config.final_logit_softcapping) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def rope_of_layers(config, rope):
    """`(cos, sin)` of each layer, of those by `teacher_layer_types`; None for linear attention. Layers that `rope_layers`
    leaves out rotate by nothing, cos 1 and sin 0.
    """
    rope = [rope.get(kind) for kind in config.teacher_layer_types]
    if config.rope_layers is None:
        return rope
    cos, sin = next(x for x in rope if x is not None)
    still = torch.ones_like(cos), torch.zeros_like(sin)
    return [x if rotates else still for x, rotates in zip(rope, config.rope_layers, strict=True)]


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times `embedding_multiplier`: `inputs_embeds` that come from here have it, and get it once."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_scale = config.embedding_multiplier  # the name that PEFT looks for

    def forward(self, input_ids):
        return scaled_embeddings(super().forward(input_ids), self.embed_scale)


MLP_TOKENS = 512  # that a CPU takes at once without gradients: more of them leave its cache


class HybridMLP(nn.Module):
    """The teacher's gated MLP."""

    def __init__(self, config):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(D, F, bias=config.mlp_bias), Linear(D, F, bias=config.mlp_bias)
        self.down_proj = Linear(F, D, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu"
        if whole or hooked(*self.children()):  # a hook sees all tokens, and what it keeps is not written over
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        parts = [
            self.down_proj(self.act_fn(self.gate_proj(part)).mul_(self.up_proj(part)))
            for part in x.split(MLP_TOKENS, -2)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def mlp_of(config, layer_idx):
    """The MLP of a layer; with experts it is transformers' own."""
    if not config.has_experts(layer_idx):
        return HybridMLP(config)
    shared = config.shared_expert_intermediate_size
    return (Qwen2MoeSparseMoeBlock if shared else Qwen3MoeSparseMoeBlock)(config)


def balance_loss(config, router_logits, attention_mask=None):
    """transformers' loss that is least where all experts have the same load, over all layers together.

    Args:
        router_logits: of each layer with experts, [B T, experts].
        attention_mask: [B, tokens], of which the last T are the call's; padding does not count.
    Raises:
        ConfigError: no layer's were recorded.
    """
    if not router_logits:  # torch does not look for hooks that come after it has compiled
        raise ConfigError(
            "output_router_logits=True: the routers of this model were compiled before their logits were first asked for; call it "
            "once with output_router_logits=True before torch.compile, or torch._dynamo.reset()"
        )
    if attention_mask is not None:
        T = len(router_logits[0]) // len(attention_mask)
        attention_mask = attention_mask[:, -T:]
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)


class CheckpointedLayer(GradientCheckpointingLayer):
    """A layer that is checkpointed only where gradients are wanted."""

    checkpointing = False

    @property
    def gradient_checkpointing(self):
        """Without gradients there is nothing to save, and a checkpointed layer works without its cache: `generate`
        would lose the context.
        """
        return self.checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.checkpointing = on


NORMS = {  # of a layer, by `norm_position`
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class DecoderLayer(CheckpointedLayer):
    """Attention and MLP with residuals; norms before them (Llama, Mistral, Qwen), after (OLMo 2 and 3) or both (Gemma 3)."""

    def __init__(self, config, layer_idx, norm_position, **attention):
        super().__init__()
        self.norm_position, self.residual_multiplier = norm_position, config.residual_multiplier
        for name, module in (attention | {"mlp": mlp_of(config, layer_idx)}).items():
            self.add_module(name, module)
        for name in NORMS[norm_position]:
            self.add_module(name, rms_norm(config, config.hidden_size))

    def attention_input(self, hidden_states):
        return hidden_states if self.norm_position == "post" else self.input_layernorm(hidden_states)

    def finish(self, hidden_states, attention):
        """Residual stream after attention output and MLP."""
        factor = self.residual_multiplier
        if self.norm_position == "pre":
            hidden_states = hidden_states + scaled(attention, factor)
            return hidden_states + scaled(self.mlp(self.post_attention_layernorm(hidden_states)), factor)
        hidden_states = hidden_states + scaled(self.post_attention_layernorm(attention), factor)
        x = self.pre_feedforward_layernorm(hidden_states) if self.norm_position == "both" else hidden_states
        return hidden_states + scaled(self.post_feedforward_layernorm(self.mlp(x)), factor)


class LinearDecoderLayer(DecoderLayer):
    """A layer of linear attention, the teacher's own; its norms stand before, in all families that have one."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx, "pre")
        self.layer_idx = layer_idx
        # last: transformers' pipelines send hidden states in the dtype of a stage's first parameter, and A_log, the first
        # of the module, may stay in float32
        self.linear_attn, self.cache_name = gated_delta_net(config)

    def forward(self, hidden_states, align=None, tokens=None, cache=None, **kwargs):
        """Hidden states after the layer [B, T, D]; with `align` also what it adds to the terms of stage I, which is 0."""
        if align is None:
            return self.onward(hidden_states, tokens, None if cache is None else cache.layers[self.layer_idx])
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.no_grad():
            following = self.onward(hidden_states, tokens) if align.onward else hidden_states
        return following, hidden_states.new_zeros(len(ALIGNMENT_TERMS), dtype=dtype)

    def onward(self, hidden_states, tokens, layer=None):
        attention = attend(self.run, self.attention_input(hidden_states), tokens, layer)
        return self.finish(hidden_states, attention)

    @property
    def run(self):
        """The module as a function of (hidden states, mask, cache). A record of calls keeps it, and a copy of the record
        is to have the same module: functions are not copied, methods are.
        """
        return lambda x, mask, cache: self.linear_attn(x, attention_mask=mask, **{self.cache_name: cache})


class HybridDecoderLayer(DecoderLayer):
    """A layer whose attention is mixed with an mLSTM, or the teacher's own."""

    aligned = False  # a layer whose mixer stage I leaves alone: the teacher's attention is all that is calculated

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx, config.norm_position, self_attn=HybridAttention(config, layer_idx))

    def forward(self, hidden_states, align=None, **kwargs):
        """Hidden states after the layer [B, T, D]; with `align` what `align` returns."""
        if align is not None:
            return self.align(hidden_states, align, **kwargs)
        attention, _ = self.self_attn(self.attention_input(hidden_states), **kwargs)
        return self.finish(hidden_states, attention)

    def align(self, hidden_states, align, position_embeddings, tokens, mask, position_ids=None, **kwargs):
        """Stage I of one layer: how far the student's mixer is from the teacher's attention on the teacher's hidden
        states, before the gate that some teachers have on the output of both.

        Only the mixer's own parameters receive gradients: layers stay independent.

        Returns:
            `(the teacher's hidden states after the layer [B, T, D], sums [4] of ALIGNMENT_TERMS over the counted
            tokens)`.
        """
        attention, config = self.self_attn, self.self_attn.config
        with torch.no_grad():
            x = self.attention_input(hidden_states)
            heads = attention.heads(x)
            projected = attention.rotated(heads, position_embeddings)
            window = config.kept_window_of(attention.layer_idx)  # the teacher's own
            target, _ = attention.attend(*projected[:3], align.teacher_mask, window, position_ids=position_ids)
            output = attention.output(target, heads) if align.onward or align.output_terms else None
            following = self.finish(hidden_states, output) if align.onward else hidden_states
        dtype = torch.promote_types(target.dtype, torch.float32)
        if attention.layer_type != "hybrid_sliding" or self.aligned:
            return following, target.new_zeros(len(ALIGNMENT_TERMS), dtype=dtype)
        h, _ = attention.mix(x, projected, tokens, mask)
        counted = align.counted[..., None, None]
        error = torch.where(counted, h.to(dtype) - target.to(dtype), 0.0).square().sum()
        sums = [error, torch.where(counted, target.to(dtype), 0.0).square().sum(), *target.new_zeros(2, dtype=dtype)]
        if align.output_terms:
            sums[2:] = output_terms(attention.output(h, heads).to(dtype), output.to(dtype), align.counted)
        return following, torch.stack(sums)


def output_terms(student, teacher, counted):
    """`(sum of 1 - cosine, sum of |difference| / sqrt(D))` over the `counted` [B, T] tokens of two [B, T, D] attention
    outputs.
    """
    student, teacher = (torch.where(counted[..., None], x, 0.0) for x in (student, teacher))
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)  # 0 where one of them is
    norm = torch.linalg.vector_norm(student - teacher, dim=-1) / student.shape[-1] ** 0.5  # its gradient at 0 is 0
    return torch.where(counted, 1 - cosine, 0.0).sum(), norm.sum()
