"""The Distil-xLSTM student: sLSTM and mLSTM blocks in turn between a teacher's embeddings and LM head; no attention, no
window.

Dims: B batch, T tokens, D hidden size, H heads, K = V features per head, F features of a convolution, c tokens that it
looks back.
Source: Thiombiano et al. 2025 (arXiv 2503.18565) with the blocks of Beck et al. 2024.

The mLSTM is the pure ratio (q C) / (q n) of `xlstm_kernels`, q and k being softmaxes over the features of a head, in
the place of the signed q and k of Beck et al. with their clamp max(|q n|, exp(-m)). Why: the clamp makes h depend on
the stabiliser m, and exp(-m) overflows for strongly negative gates; signed features can cancel in q n, and then h has
no bound. With features >= 0 h is a mean of past v, one kernel serves both students, and the head-wise norm behind it
takes out the scale that the clamp would have kept. The softmax is that of sqrt(K) times the projection, so that at the
start the features are neither flat nor one-hot.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from xlstm_kernels import mlstm, slstm

from xlstm_hybrid.conversion.source import open_teacher
from xlstm_hybrid.distil_xlstm.cache import adopt_recurrent
from xlstm_hybrid.distil_xlstm.configuration import DistilXLSTMConfig
from xlstm_hybrid.distil_xlstm.transfer import new_student
from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.cache_names import ACCEPTED, NAMES, cache_of, named, refuse_unknown, takes_cache
from xlstm_hybrid.model.compatibility import ensure_compatible
from xlstm_hybrid.model.layers import CheckpointedLayer
from xlstm_hybrid.model.linear import Linear
from xlstm_hybrid.model.mixer import wide
from xlstm_hybrid.model.modeling import StudentGenerationMixin, StudentModel, drop_absent_names, keep_positions
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.training.losses import at_least_float32

KEYWORDS = ACCEPTED - {"output_attentions"}  # what a forward accepts beside its own parameters; there is no attention


def time_constants(low, high, steps):
    """Forget-gate logits, [steps], whose time constants 1 / (1 - sigmoid) are spaced logarithmically from `low` to
    `high` tokens.
    """
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (low * (high / low) ** share - 1).log().float()


class CausalConv(nn.Module):
    """Depthwise convolution over the last real tokens of a document, then SiLU: padding is not there, documents do not
    see each other.
    """

    def __init__(self, features, kernel_size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(kernel_size, features)), nn.Parameter(torch.empty(features))

    def forward(self, x, tokens, past):
        """`(y [B, T, F], what the next call looks back to [B, c, F])`; weight[j] belongs to the token j before."""
        (B, T, _), c = x.shape, self.weight.shape[0] - 1
        past = x.new_zeros(B, c, x.shape[2]) if past is None else past.to(x.dtype)
        if tokens.plain:
            line = torch.cat([past, x], 1)
            lagged = [line[:, c - j : c - j + T] for j in range(c + 1)]
            left = line[:, T:]
        else:
            ordinal = tokens.real.long().cumsum(-1)  # [B, T], 1 + number of real tokens before
            real_first = pick(x, (~tokens.real).long().argsort(dim=-1, stable=True))
            line = torch.cat([past, real_first], 1)
            at = [(ordinal - 1 + c - j).clamp_min(0) for j in range(c + 1)]
            lagged = [torch.where((tokens.index >= j)[..., None], pick(line, place), 0.0) for j, place in enumerate(at)]
            left = pick(line, ordinal[:, -1:] + torch.arange(c, device=x.device))
        weight = at_least_float32(self.weight)
        y = sum(at_least_float32(part) * weight[j] for j, part in enumerate(lagged)) + at_least_float32(self.bias)
        return F.silu(y).to(x.dtype), left


def pick(x, place):
    """x [B, N, F] at `place` [B, M]: [B, M, F]."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))


class HeadNorm(nn.Module):
    """Layer norm of every head on its own, with a weight per feature (the group norm of Beck et al. 2024)."""

    def __init__(self, heads, features, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads, features)), eps

    def forward(self, h):
        """[B, T, H, V] -> [B, T, H V], calculated in float32 at least."""
        x = at_least_float32(h)
        x = x - x.mean(-1, keepdim=True)
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return x.to(h.dtype).flatten(-2)


class BlockDiagonal(nn.Module):
    """A linear map without bias in which blocks of features stay among themselves."""

    def __init__(self, features, block):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features // block, block, block))

    def forward(self, x):
        parts = x.unflatten(-1, self.weight.shape[:2])  # [B, T, blocks, block]
        return torch.einsum("btnv,nvw->btnw", parts, self.weight.to(x.dtype)).flatten(-2)


class DownProjection(Linear):
    """Writes into the residual stream; starts smaller the more layers do so."""


class MLSTMCore(nn.Module):
    """The inside of an mLSTM block: up, convolution, q, k and v, cell, head-wise norm, learnable skip, gate, down (Beck
    et al. 2024).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E, H = config.hidden_size, config.inner_size, config.mlstm_num_heads
        self.heads, self.head_dim = H, E // H
        self.up_proj = Linear(D, 2 * E, bias=False)
        self.conv = CausalConv(E, config.conv_kernel_size)
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(E, config.mlstm_projection_block) for _ in range(3))
        self.igate_weight, self.fgate_weight = wide(H, 3 * E), wide(H, 3 * E)
        self.igate_bias, self.fgate_bias = wide(H), wide(H)
        self.head_norm = HeadNorm(H, self.head_dim, config.rms_norm_eps)
        self.skip = nn.Parameter(torch.empty(E))
        self.down_proj = DownProjection(E, D, bias=False)

    def features(self, x):
        """softmax(sqrt(K) x) per head, [B, T, H, K]; in float32 where x is float16, whose smallest number is too large
        for it.
        """
        heads = at_least_float32(x).unflatten(-1, (self.heads, self.head_dim))
        features = torch.softmax(heads * math.sqrt(self.head_dim), -1)
        return features if x.dtype == torch.float16 else features.to(x.dtype)

    def gates(self, q, k, v, tokens):
        """Input and forget gate before activation, [B, T, H], float32: padding writes and forgets nothing, a document
        start forgets all.
        """
        with torch.autocast(q.device.type, enabled=False):
            x = at_least_float32(torch.cat([q, k, v], -1))
            i = F.linear(x, self.igate_weight.to(x.dtype), self.igate_bias.to(x.dtype))
            f = F.linear(x, self.fgate_weight.to(x.dtype), self.fgate_bias.to(x.dtype))
        if tokens.plain:
            return i, f
        real, start = tokens.real[..., None], tokens.start[..., None]
        f = torch.where(start, float("-inf"), torch.where(real, f, float("inf")))
        return torch.where(real, i, float("-inf")), f

    def forward(self, x, tokens, memory=None, past=None):
        """`(output [B, T, D], MLSTMState, what the convolution looks back to)`."""
        inside, gate = self.up_proj(x).chunk(2, -1)  # [B, T, E] each
        seen, left = self.conv(inside, tokens, past)
        q, k, v = self.q_proj(seen), self.k_proj(seen), self.v_proj(inside)
        i, f = self.gates(q, k, v, tokens)
        v, chunk = v.unflatten(-1, (self.heads, self.head_dim)), self.config.mlstm_chunk_size
        h, memory = mlstm(self.features(q), self.features(k), v, i, f, state=memory, chunk_size=chunk)
        h = self.head_norm(h).to(seen.dtype) + self.skip.to(seen.dtype) * seen
        return self.down_proj(h * F.silu(gate)), memory, left


class SLSTMCore(nn.Module):
    """The inside of an sLSTM block: a convolution for the input and forget gates, the cell, head-wise norm (Beck et al.
    2024).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, V = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.heads = H
        self.conv = CausalConv(config.hidden_size, config.conv_kernel_size)
        self.input_weight, self.recurrent_weight = (nn.Parameter(torch.empty(4, H, V, V)) for _ in range(2))
        self.gate_bias = wide(4, H, V)  # z, i, f, o, as in the weights
        self.head_norm = HeadNorm(H, V, config.rms_norm_eps)

    def forward(self, x, tokens, memory=None, past=None):
        """`(output [B, T, D], SLSTMState, what the convolution looks back to)`."""
        seen, left = self.conv(x, tokens, past)
        plain, seen = (y.unflatten(-1, (self.heads, -1)) for y in (x, seen))  # [B, T, H, V]
        weight = self.input_weight.to(x.dtype)
        parts = [torch.einsum("bthv,hvw->bthw", y, weight[g]) for g, y in enumerate((plain, seen, seen, plain))]
        pre = at_least_float32(torch.stack(parts, 2))
        pre = pre + self.gate_bias.to(pre.dtype)
        rows = {} if tokens.plain else {"real": tokens.real, "start": tokens.start}
        h, memory = slstm(pre, self.recurrent_weight, state=memory, forget=self.config.slstm_forget_gate, **rows)
        return self.head_norm(h.to(x.dtype)), memory, left


class GatedMLP(nn.Module):
    """Gated up- and down-projection behind an sLSTM."""

    def __init__(self, config):
        super().__init__()
        D, N = config.hidden_size, config.slstm_intermediate_size
        self.gate_proj, self.up_proj = Linear(D, N, bias=False), Linear(D, N, bias=False)
        self.down_proj = DownProjection(N, D, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DistilXLSTMLayer(CheckpointedLayer):
    """A pre-norm residual block: an mLSTM, or an sLSTM followed by a gated MLP with a residual of its own."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, slstm_block = layer_idx, config.block_types[layer_idx] == "slstm"
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = (SLSTMCore if slstm_block else MLSTMCore)(config)
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if slstm_block else None
        self.mlp = GatedMLP(config) if slstm_block else None

    def forward(self, hidden_states, tokens, cache=None, **kwargs):
        layer = None if cache is None else cache.layers[self.layer_idx]
        before = {} if layer is None else {"memory": layer.memory, "past": layer.conv}
        x, memory, left = self.mixer(self.norm(hidden_states), tokens, **before)
        if layer is not None:
            layer.store(memory, left, tokens)
        hidden_states = hidden_states + x
        return hidden_states if self.mlp is None else hidden_states + self.mlp(self.mlp_norm(hidden_states))


class DistilXLSTMPreTrainedModel(StudentModel):
    config: DistilXLSTMConfig
    config_class = DistilXLSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DistilXLSTMLayer"]
    _skip_keys_device_placement = NAMES
    _keep_in_fp32_modules_strict = ["igate_weight", "igate_bias", "fgate_weight", "fgate_bias", "gate_bias"]
    _is_stateful = True  # assisted decoding takes tokens back, which no recurrent state can
    _can_record_outputs = {"hidden_states": DistilXLSTMLayer}

    def freeze(self):
        """Let embedding and LM head train or not, as the configuration says."""
        for module in (self.get_input_embeddings(), self.get_output_embeddings()):
            if module is not None:
                module.weight.requires_grad_(not self.config.freeze_embeddings)

    def post_init(self):
        super().post_init()
        drop_absent_names(self)
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which makes every loaded parameter trainable; then `freeze`."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()  # with output_loading_info there are two
        return loaded

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        config = self.config
        if isinstance(module, DownProjection):
            init.normal_(module.weight, std=2 / (config.num_hidden_layers * math.sqrt(config.hidden_size)))
        elif isinstance(module, CausalConv):
            init.uniform_(module.weight, -(len(module.weight) ** -0.5), len(module.weight) ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, BlockDiagonal):
            init.normal_(module.weight, std=math.sqrt(2 / (5 * module.weight.shape[-1])))
        elif isinstance(module, HeadNorm):
            init.ones_(module.weight)
        elif isinstance(module, MLSTMCore):
            for parameter in (module.igate_weight, module.fgate_weight, module.igate_bias):
                init.zeros_(parameter)
            init.copy_(module.fgate_bias, time_constants(4.0, 4.0 * max(config.mlstm_context, 2), module.heads))
            init.ones_(module.skip)
        elif isinstance(module, SLSTMCore):
            _, H, V = module.gate_bias.shape
            init.normal_(module.input_weight, std=math.sqrt(2 / (5 * V)))
            init.zeros_(module.recurrent_weight)
            bias = torch.zeros(4, H, V)
            bias[2] = time_constants(2.0, 1.0 * max(config.mlstm_context, 4), V)  # every head has fast and slow units
            init.copy_(module.gate_bias, bias)


class DistilXLSTMModel(DistilXLSTMPreTrainedModel):
    """Embeddings, blocks and final norm."""

    def __init__(self, config):
        config.check()  # its fields may have been changed since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DistilXLSTMLayer(config, j) for j in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """Residual stream after the last norm; arguments as in `LlamaModel.forward`. Positions only tell documents
        apart.

        Packed documents are told apart by restarting `position_ids`, by `cu_seq_lens_q` (one row) or by `seq_idx`, also
        after a filled cache.

        Raises:
            ConfigError: both or neither of `input_ids` and `inputs_embeds`, a mask that is not [batch, tokens], or
                `cu_seq_lens_q` beside several rows.
            CacheError: a cache of another model, or a filled one under gradient checkpointing.
            CompatibilityError: a cache under a name that is not known here.
        """
        refuse_unknown(kwargs, KEYWORDS, type(self).__name__)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            cache = adopt_recurrent(cache, len(self.layers))
        (B, T), packed = hidden_states.shape[:2], kwargs.get("cu_seq_lens_q")
        filled = cache is not None and cache.layers[0].is_initialized
        checkpointed = self.training and self.gradient_checkpointing and torch.is_grad_enabled()
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(
                f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}; there is no attention, only padding"
            )
        if packed is not None and B != 1:
            raise ConfigError(
                f"cu_seq_lens_q describes one flattened row, the batch has {B}; flatten it or pass position_ids that restart"
            )
        if checkpointed and filled and cache.layers[0].seen_tokens > 0:
            raise CacheError(
                f"the cache holds {cache.layers[0].seen_tokens} tokens, but layers work without a cache under gradient checkpointing; "
                "call gradient_checkpointing_disable(), or pass the whole sequence"
            )
        where = {"attention_mask": attention_mask, "position_ids": position_ids, "cu_seq_lens": packed}
        seen = cache.layers[0].count.to(hidden_states.device) if filled else None
        tokens = Tokens.locate((B, T), hidden_states.device, **where, seq_idx=kwargs.get("seq_idx"), seen=seen)
        for layer in self.layers:
            hidden_states = layer(hidden_states, tokens=tokens, cache=None if checkpointed else cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named(cache))


class DistilXLSTMForCausalLM(DistilXLSTMPreTrainedModel, StudentGenerationMixin):
    """The student with its language-model head; loads with `AutoModelForCausalLM` once `xlstm_hybrid` is imported."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = DistilXLSTMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_teacher(cls, teacher, *, dtype=None, torch_dtype=None, revision=None, seed=0, **options):
        """The student of a teacher, in memory on the CPU and in eval mode, with its `transfer_report`. It shares no
        memory with the teacher.

        Args:
            teacher: a directory, a Hub id, or a transformers model; only its embedding and LM head are read.
            dtype: of the student's weights; None or "auto": the one in which the teacher's embedding is stored. Gates are
                float32 in any case. torch_dtype is transformers' other name of it.
            revision: branch, tag or commit on the Hub.
            seed: of the new parameters.
            options: arguments of `transfer.distil_config`.
        Raises:
            UnsupportedTeacherError, ConfigError, CheckpointError: the teacher cannot become such a student.
        """
        with open_teacher(teacher, revision) as source:
            return new_student(cls, source, torch_dtype if dtype is None else dtype, seed, **options)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; a version of it that is newer than the tested ones is checked first."""
        ensure_compatible(DistilXLSTMForCausalLM)
        return super().from_pretrained(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers; then the cache becomes ours at once, so that `generate` refuses by what its layers are."""
        if generation_config.cache_implementation == "quantized":
            raise CacheError(
                "cache_implementation='quantized': a recurrent state needs float32 and does not grow; leave it out"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if cache_of(model_kwargs) is not None:
            adopt_recurrent(cache_of(model_kwargs), self.config.num_hidden_layers)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch`: it keeps keys and values in shared pages."""
        raise CacheError(
            "continuous batching (generate_batch, cache_implementation='paged'): its paged cache has no place for a recurrent state; "
            "pass a left-padded batch to generate()"
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The model reads no more of the 2-D mask than the call's own columns."""
        return attention_mask

    @takes_cache
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, inputs_embeds=None, **kwargs
    ):
        """As in transformers, which looks for `inputs_embeds` in the signature."""
        more = named(cache) | {"inputs_embeds": inputs_embeds} | kwargs
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **more)

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
        with_head=None,
        **kwargs,
    ):
        """Logits and, with `labels`, the loss; arguments as in `LlamaForCausalLM.forward`, `with_head` as in
        `XLSTMHybridForCausalLM.forward`.
        """
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.model(**rows, cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        if with_head is not None:
            return with_head(outputs.last_hidden_state, self)
        logits, loss = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep)), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named(cache_of(outputs))
        )
