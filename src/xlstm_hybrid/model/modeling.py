"""The hybrid xLSTM student: a Transformer decoder whose attention layers mix an mLSTM with window + sink attention.

Dims: B batch, T tokens, D hidden size, H query heads, G key/value heads, K query/key dim, V value dim, W window, S
sinks.
Source: Hauzenberger et al. 2026 (arXiv 2603.15590), with an mLSTM as in Beck et al. 2024.
"""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ModelOutput
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.adopt import adopt_cache, place_tokens
from xlstm_hybrid.model.attention import HybridAttention, rms_norm
from xlstm_hybrid.model.cache import PlacedLayer
from xlstm_hybrid.model.cache_names import ACCEPTED, CACHE, NAMES, cache_of, named, refuse_unknown, renamed, takes_cache
from xlstm_hybrid.model.compatibility import ensure_compatible
from xlstm_hybrid.model.configuration import LINEAR, XLSTMHybridConfig
from xlstm_hybrid.model.layers import (
    ALIGNMENT_TERMS,
    EXPERTS,
    ROUTERS,
    Align,
    DecoderLayer,
    HybridDecoderLayer,
    LinearDecoderLayer,
    ScaledEmbedding,
    XLSTMHybridRotaryEmbedding,
    balance_loss,
    rope_of_layers,
    scaled_logits,
)
from xlstm_hybrid.model.linear import Linear
from xlstm_hybrid.model.mixer import GATE_PARAMETERS, MLSTMMixer
from xlstm_hybrid.model.one_token import compiled_index
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.model.trained import RemembersTraining

KEYWORDS = ACCEPTED | {"output_gates", "output_router_logits"}  # what a forward accepts beside its own parameters


@dataclass
class AlignmentOutput(ModelOutput):
    """What a teacher-forced pass returns: squared distances between student mixers and teacher attention, before W_o.

    loss: sum of `error` over the layers.  error, target: [layers] sums over counted tokens, heads and features of
    |softmax attention - h|^2 and of |softmax attention|^2.  num_items: counted tokens.
    sums: [layers, 4], see ALIGNMENT_TERMS.  hidden_states: what leaves the last layer, [B, T, D].
    """

    loss: torch.Tensor | None = None
    error: torch.Tensor | None = None
    target: torch.Tensor | None = None
    num_items: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


def drop_absent_names(model):
    """Of the names that stay in float32, and of the layers that are not split, keep those that the model has: which gates
    and layers there are is for the configuration to say, and accelerate's FSDP looks for each of them.
    """
    have = {part for name, _ in model.named_parameters() for part in name.split(".")}
    if getattr(model.config, "linear_attention", None) != "olmo_hybrid":  # the others round it to the model's dtype
        have.discard("A_log")
    model._keep_in_fp32_modules &= have
    model._keep_in_fp32_modules_strict &= have
    model._no_split_modules = set(model._no_split_modules) & {type(module).__name__ for module in model.modules()}


class StudentModel(RemembersTraining, PreTrainedModel):
    """What the models of our students share."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but of safetensors alone: a pickle can run code."""
        return super().from_pretrained(*args, **({"use_safetensors": True} | kwargs))

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As in transformers, which refuses to save generation settings that it loads with a warning, such as a
        teacher's `temperature` beside `do_sample: false`: a student has learnt something by then, and keeps them as they
        are.
        """
        settings, kept = getattr(self, "generation_config", None), None
        try:
            if settings is not None:
                settings.validate(strict=True)
        except ValueError:
            kept = settings
        if kept is None or kwargs.get("push_to_hub"):  # that uploads what is written in there
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        try:
            self.generation_config = GenerationConfig()  # in the place of the one that is written below
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.generation_config = kept
        if is_main_process:
            kept.to_json_file(os.path.join(save_directory, "generation_config.json"))


class StudentGenerationMixin(GenerationMixin):
    """How the language models of our students generate, beside what their caches ask for."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return True  # transformers says no to every class with "xlstm" in its name

    def generate(self, *args, **kwargs):
        """As in transformers; the cache may have either of its names, whatever the installed version calls it.

        Raises:
            CacheError: a cache that holds as many tokens as the input, or more: nothing would be left to read.
            CompatibilityError: see `ensure_compatible`.
        """
        # our own class, whatever is derived from it
        own = next(cls for cls in type(self).__mro__ if StudentGenerationMixin in cls.__bases__)
        ensure_compatible(own, getattr(self.config, "linear_attention", None))
        kwargs = renamed(kwargs, CACHE, "generate")
        cache, given = cache_of(kwargs), (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((x for x in given if x is not None), None)
        seen = int(cache.get_seq_length()) if isinstance(cache, Cache) and ids is not None else 0
        if seen and seen >= ids.shape[1]:
            raise CacheError(
                f"generate: the cache holds {seen} tokens, the input {ids.shape[1]}: pass the whole text, that which was read into the cache and "
                "at least one token more"
            )
        return super().generate(*args, **kwargs)


class XLSTMHybridPreTrainedModel(StudentModel):
    """What transformers has to know of the student: names of the parts that it saves, splits, records and keeps in
    float32.
    """

    config: XLSTMHybridConfig
    config_class = XLSTMHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer", "LinearDecoderLayer"]
    _skip_keys_device_placement = NAMES
    _keep_in_fp32_modules_strict = [*GATE_PARAMETERS, "A_log"]  # the last is a decay of OLMo-Hybrid's
    _keep_in_fp32_modules = ["mlstm"]  # in float16; and what quantisers leave alone
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # rolling back works: cache layers record what assisted decoding may take back, and refuse what they cannot
    _is_stateful = False
    _can_record_outputs = {
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(HybridAttention, index=1),
        "gates": OutputRecorder(MLSTMMixer, index=-1),
        "router_logits": [OutputRecorder(router, index=0) for router in ROUTERS],
    }

    def post_init(self):
        super().post_init()
        drop_absent_names(self)

    @classmethod
    def _can_set_experts_implementation(cls):
        return True  # transformers looks for its decorator in our source; the experts are its own

    def get_correct_experts_implementation(self, requested_experts):
        """As in transformers, but one expert after the other unless asked: its grouped product takes no float64, and no
        row that is not a multiple of 16 bytes.
        """
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EXPERTS):  # parameters of their own, and not of linear maps
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)
        if hasattr(module, "A_log"):  # as transformers begins its linear attention
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())
            init.ones_(module.dt_bias)
        if isinstance(module, Gemma3RMSNorm):  # to which 1 is added
            init.zeros_(module.weight)
        if isinstance(module, MLSTMMixer):
            for feature_map in (module.q_map, module.k_map):
                init.copy_(feature_map, module.first_map().expand_as(feature_map))
            first = {"fgate_bias": module.forget_bias(), "ogate_bias": self.config.mlstm_output_gate_bias}
            first["norm_weight"] = 1.0
            for name, parameter in module.named_parameters(recurse=False):  # which there are is for the config to say
                if not name.endswith("_map"):
                    value = torch.as_tensor(first.get(name, 0.0), dtype=torch.float64)
                    init.copy_(parameter, value.expand_as(parameter))


def attention_mask_of(config, kind, window, layer_idx, tokens, packed, **kwargs):
    """Mask of a layer that keeps the teacher's attention: transformers' own, or ours where one row holds several
    documents.
    """
    if packed and config._attn_implementation in ("eager", "sdpa"):
        return tokens.visible(window or tokens.real.shape[1], 0)[:, None]
    if not packed:
        kwargs["position_ids"] = None  # transformers would look for documents in them, which waits for the GPU
    if kind == "full_attention":
        return create_causal_mask(config=config, layer_idx=layer_idx, **kwargs)
    config = copy.copy(config)
    config.sliding_window = window
    return create_sliding_window_causal_mask(config=config, layer_idx=layer_idx, **kwargs)


class XLSTMHybridModel(XLSTMHybridPreTrainedModel):
    """Embeddings, decoder layers and final norm. Set `window_dropout` to have another probability than the config's, as
    a schedule does.
    """

    window_dropout = None

    def __init__(self, config):
        config.check()  # its fields may have been changed since it was checked
        super().__init__(config)
        self.checked = copy.deepcopy(config.choices())
        self.embed_tokens = ScaledEmbedding(config)
        self.layers = nn.ModuleList(
            (LinearDecoderLayer if kind == LINEAR else HybridDecoderLayer)(config, j)
            for j, kind in enumerate(config.layer_types)
        )
        self.norm, kinds = rms_norm(config, config.hidden_size), config.attention_types
        self.rotary_emb = nn.ModuleDict({kind: XLSTMHybridRotaryEmbedding(config, kind) for kind in kinds})
        self.gradient_checkpointing = False
        self.post_init()

    def prepare(self, inputs_embeds, attention_mask, position_ids, cache, teacher=False, training=False, **kwargs):
        """What the layers are called with: `(tokens, [keyword arguments of each layer], {layer type: mask} of the
        teacher's attention, empty unless `teacher`)`.
        """
        config, (B, T) = self.config, inputs_embeds.shape[:2]
        keys = config.spans()[: config.num_hidden_layers]  # fewer while early layers draft, see `assistant_early_exit`
        # a pipeline's stage has some of the layers
        present = [j for j in range(len(keys)) if not isinstance(self.layers[j], nn.Identity)]
        linear = [j for j in present if keys[j][0] == LINEAR]
        if linear and torch.compiler.is_compiling():
            raise ConfigError(
                "torch.compile: layers of linear attention (linear_attention in layer_types) look at padding and documents; run the "
                "model as it is"
            )
        layers = [cache.layers[j] for j in present if keys[j][0] == "hybrid_sliding"] if cache is not None else []
        filled = layers if layers and layers[0].is_initialized else []
        attending = [j for j in present if j not in linear] or present
        first = cache.layers[attending[0]] if cache is not None and present else None
        seen = 0 if first is None else first.get_seq_length()
        held = getattr(first, "count", None) if first in layers else getattr(first, "keys", None)
        cached = held.shape[0] if held is not None and first.is_initialized and held.numel() else None
        self.check_inputs(B, attention_mask, kwargs.get("cu_seq_lens_q"), seen, cached)
        before = filled[0].count.to(inputs_embeds.device) if filled else None
        if cache is not None and present and not layers:  # no hybrid layer counts tokens
            before = torch.zeros(B, dtype=torch.long, device=inputs_embeds.device) + seen
            started = not isinstance(seen, int) or seen > 0  # a static cache has a tensor, which is not looked at
            if started and attention_mask is not None and attention_mask.shape[1] > T:
                before = attention_mask[:, :-T].to(before.device, torch.bool).sum(-1)
        # a training step does not wait for the GPU: what may hold several documents is taken for packed
        look = inputs_embeds.device.type == "cpu" or not (training or self.training or torch.is_grad_enabled())
        tokens = Tokens.locate(
            (B, T),
            inputs_embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            seq_idx=kwargs.get("seq_idx"),
            seen=before,
            look=look,
        )
        if linear and T > 1 and not tokens.plain:
            tokens.find_runs(before, cache is not None)
        needs_packing = teacher or any(keys[j][0] not in ("hybrid_sliding", LINEAR) for j in present)
        starts = any(x is not None for x in (position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")))
        packed = needs_packing and T > 1 and starts and not tokens.plain and (not look or bool(tokens.start.any()))
        if packed and seen > 0:
            raise CacheError(
                "packed documents after a filled cache: layers with full attention keep the keys of earlier documents; "
                "start each packed row with an empty cache, or pass use_cache=False"
            )
        windows = [j for j in present if keys[j][0] == "sliding_attention"]
        if windows or teacher:
            tokens.uneven = self.uneven(tokens, attention_mask, before, cache, windows)
        # positions count real tokens: feature maps follow RoPE, so padding must not shift them
        if position_ids is None:
            position_ids = tokens.index.clamp_min(0)
        shared = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        shared, masks, teacher_masks = shared | named(cache), {}, {}
        for j in present:
            if keys[j] not in masks:
                kind, window, sinks = keys[j]
                if kind == "hybrid_sliding":
                    masks[keys[j]] = self.hybrid_mask(tokens, window, sinks, cache.layers[j] if filled else None)
                # uneven ones have masks of their own layer, by places
                elif kind == "full_attention" or (kind == "sliding_attention" and not tokens.uneven):
                    masks[keys[j]] = attention_mask_of(config, kind, window, j, tokens, packed, **shared)
        for kind in config.attention_types if teacher else ():
            window = config.teacher_sliding_window
            teacher_masks[kind] = attention_mask_of(
                config, kind, window, None, tokens, packed or tokens.uneven, **shared
            )
        rope = {kind: rotary(inputs_embeds, position_ids) for kind, rotary in self.rotary_emb.items()}
        where = [
            {"position_embeddings": x, "tokens": tokens, "mask": masks.get(key), "position_ids": position_ids}
            for key, x in zip(keys, rope_of_layers(config, rope), strict=False)
        ]
        return tokens, where, teacher_masks

    def uneven(self, tokens, attention_mask, before, cache, windows):
        """Whether a window that counts columns would count padding in this call. From the first padding on that stands
        after a token, the `windows` (numbers of layers) of the cache know which column holds which token.

        Args:
            before: [B] tokens in the cache, or None.
        """
        layer = cache.layers[windows[0]] if cache is not None and windows else None
        if isinstance(layer, PlacedLayer) and layer.is_initialized:
            return True
        if attention_mask is None or tokens.plain or torch.compiler.is_compiling():
            return False
        after, between = tokens.gaps(before)
        if layer is None or not bool(after.any()):
            return layer is None and bool(between.any())
        seen, T = layer.get_seq_length(), tokens.real.shape[1]
        past = torch.cat([attention_mask.new_ones(len(attention_mask), seen), attention_mask[:, :-T]], 1)[:, -seen:]
        place_tokens(cache, windows, past.to(tokens.real.device, torch.bool))
        return bool(seen > 0 or between.any())

    def check_inputs(self, rows, attention_mask, cu_seq_lens, seen, cached):
        """Raise a named error for inputs that the layers would misread; `seen` and `cached` are the numbers of tokens and
        of rows in the cache, None where it is empty.
        """
        if (choices := self.config.choices()) != self.checked:  # fields may be changed between two calls
            self.config.check()
            self.checked = copy.deepcopy(choices)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(
                f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}; window and state are derived from the padding"
            )
        if cu_seq_lens is not None and rows != 1:
            raise ConfigError(
                f"cu_seq_lens_q describes one flattened row, the batch has {rows}; flatten it or pass position_ids that restart"
            )
        if cached is not None and cached != rows:
            other = "a cache of as many rows"
            if rows % cached == 0:
                other = f"xlstm_hybrid.state.fork(cache, {rows // cached}), in which each row stands as often"
            raise CacheError(
                f"the cache holds {cached} rows, the batch has {rows} (num_return_sequences repeats each); pass {other}"
            )
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
        """[B, 1, T, (S + W) + T] of a hybrid layer; None where none is needed: banded attention from an empty cache, a
        step from a filled one.

        Args:
            filled: a `HybridCacheLayer` of that kind, if it holds tokens.
        """
        if self.config.sparse_memory:
            return None  # what is visible depends on the layer, see `sparse_attention`
        dense = self.config._attn_implementation == "eager" or (self.training and self.config.attention_dropout)
        step = tokens.real.shape[1] == 1 and not torch.is_grad_enabled()
        if not dense and (filled is None or step):
            return None
        new = tokens.visible(window, sinks)
        if filled is not None:
            new = torch.cat([filled.visible(tokens.to(filled.device)).to(new.device), new], -1)
        return new[:, None]

    def blind_rows(self, real):
        """[B] bool: one draw per row for window dropout, the same in all layers; None outside of training, `real` is
        [B, T].
        """
        p = self.config.window_dropout if self.window_dropout is None else self.window_dropout
        if not p or not self.training or not torch.is_grad_enabled():
            return None
        return torch.rand(len(real), device=real.device) < p

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
        """Residual stream after the last norm; arguments as in `LlamaModel.forward`.

        Packed documents are told apart by restarting `position_ids`, by `cu_seq_lens_q` (one row) or by `seq_idx`.

        Raises:
            ConfigError: both or neither of `input_ids` and `inputs_embeds`, or a mask that is not [batch, tokens].
            CacheError: a cache of another model, or packed documents that a cache cannot keep apart.
            CompatibilityError: a cache under a name that is not known here.
        """
        kwargs |= kwargs.pop("kwargs", {})  # transformers' pipeline parallelism passes a bound **kwargs by its name
        refuse_unknown(kwargs, KEYWORDS, type(self).__name__)
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_router_logits", None) and not self.config.num_experts:
            raise ConfigError("output_router_logits=True: this student has no experts, and so no router; leave it out")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            cache = adopt_cache(cache, self.config)
        tokens, where, _ = self.prepare(hidden_states, attention_mask, position_ids, cache, **kwargs)
        tokens.blind = self.blind_rows(tokens.real)
        if cache is not None:
            tokens.compiled = compiled_index(self.config, hidden_states, tokens)
        # layers that run again in the backward would fill it twice
        kwargs["cache"] = None if self.checkpointed else cache
        for layer, arguments in zip(self.layers, where, strict=False):  # of fewer layers while the early ones draft
            hidden_states = layer(hidden_states, **arguments, **kwargs)
        for j, layer in enumerate(self.layers if cache is not None else ()):
            # what another process has read: `Cache.get_seq_length` asks layer 0 everywhere
            if isinstance(layer, nn.Identity) and hasattr(cache.layers[j], "seen_tokens"):
                cache.layers[j].seen_tokens += hidden_states.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named(cache))

    def teacher_forced(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        counted=None,
        hidden_states=None,
        terms=False,
        onward=True,
        **kwargs,
    ):
        """Stage I: the teacher's trunk, and each hybrid layer's distance from the attention it replaces.

        The trunk is the teacher as long as only the mixers' new parameters have been trained; the target is its
        attention as it is used, without dropout. Layers are called as modules: DDP and FSDP2 have their hooks there.

        Args:
            counted: [B, T] bool, tokens whose error counts; all real ones by default.
            hidden_states: input of the first layer that is there, [B, T, D]; None: the embeddings.
            terms: whether `sums` has cosine and distance after W_o.
            onward: whether what leaves the last layer is wanted: its output projection and MLP have no part in the
                loss.
        Returns:
            AlignmentOutput
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                hidden_states = self.embed_tokens(input_ids) if hidden_states is None else hidden_states
                tokens, where, masks = self.prepare(
                    hidden_states, attention_mask, position_ids, None, teacher=True, training=training, **kwargs
                )
            counted = tokens.real if counted is None else counted & tokens.real
            sums, last = [], [layer for layer in self.layers if not isinstance(layer, nn.Identity)][-1]
            for j, (layer, kind) in enumerate(zip(self.layers, self.config.teacher_layer_types, strict=True)):
                if isinstance(layer, nn.Identity):  # of another group of layers
                    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
                    sums.append(hidden_states.new_zeros(len(ALIGNMENT_TERMS), dtype=dtype))
                    continue
                align = Align(counted, masks.get(kind), terms, onward or layer is not last)
                hidden_states, summed = layer(hidden_states, align=align, **where[j])
                sums.append(summed)
        finally:
            self.train(training)
        sums = torch.stack(sums)
        totals = {"loss": sums[:, 0].sum(), "error": sums[:, 0], "target": sums[:, 1], "num_items": counted.sum()}
        return AlignmentOutput(**totals, sums=sums, hidden_states=hidden_states if onward else None)


def keep_positions(hidden_states, keep):
    """The positions whose logits are wanted: the last `keep` (0: all), indices [n] or [B, n], or a [B, T] bool mask
    (then flat).
    """
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.ndim == 2:
        return hidden_states[keep] if keep.dtype == torch.bool else hidden_states.take_along_dim(keep[..., None], 1)
    return hidden_states[:, keep]


class XLSTMHybridForCausalLM(XLSTMHybridPreTrainedModel, StudentGenerationMixin):
    """The student with its language-model head; loads with `AutoModelForCausalLM` once `xlstm_hybrid` is imported."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config):
        super().__init__(config)
        self.model = XLSTMHybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # Conversion imports the model, so the model cannot import it: the package's `__init__` registers the function here,
    # as it registers the Auto classes. Exported code has no conversion and says so.
    teacher_loader = None
    transfer_report = None  # what `from_teacher` made of each tensor
    streamed_layers = None  # numbers of the layers that are here, where stage I goes through them group by group

    @classmethod
    def from_teacher(cls, teacher, **options):
        """The student of a teacher, in memory: `xlstm_hybrid.conversion.convert.from_teacher`, whose arguments and
        errors these are.
        """
        if cls.teacher_loader is None:
            raise ConfigError(
                "from_teacher: this class was loaded from a checkpoint's own code, which converts nothing; pip install xlstm-hybrid"
            )
        return cls.teacher_loader(cls, teacher, **options)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; a version of it that is newer than the tested ones is checked first, its linear attention
        where the model has it.
        """
        ensure_compatible(XLSTMHybridForCausalLM)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        ensure_compatible(XLSTMHybridForCausalLM, model.config.linear_attention)
        return loaded

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers; then the cache becomes ours at once, so that `generate` compiles, chunks and refuses by
        what its layers are.
        """
        if generation_config.cache_implementation == "quantized" and "hybrid_sliding" in self.config.layer_types:
            raise CacheError(
                "cache_implementation='quantized': a hybrid layer's state needs float32 and its window does not grow, there is nothing to quantise; "
                "leave it out, or load the model in bfloat16, which halves the window"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if cache_of(model_kwargs) is not None:
            adopt_cache(cache_of(model_kwargs), self.config)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch` and `transformers serve --continuous-batching`: they keep keys and
        values in shared pages.
        """
        raise CacheError(
            "continuous batching (generate_batch, cache_implementation='paged'): its paged cache has no place for the state of an mLSTM; pass a "
            "left-padded batch to generate(), read a common prefix once with xlstm_hybrid.state.prefill and answer from fork(cache, rows), or let "
            "`xlstm-hybrid serve` batch requests by their states"
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The model derives its masks from the 2-D one and from the cache. Hybrid layers read no more than the call's
        own columns: without the others, a compiled step keeps its shapes.
        """
        if attention_mask is None or not set(config.layer_types) <= {"hybrid_sliding", LINEAR}:
            return attention_mask
        return attention_mask[:, -inputs_embeds.shape[1] :]

    @takes_cache
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, inputs_embeds=None, **kwargs
    ):
        """As in transformers, which looks for `inputs_embeds` in the signature; but assisted decoding, too, feeds a
        filled cache only what it has not seen (transformers feeds the whole prompt).
        """
        given = [kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None]
        # else the caller passes new tokens only; transformers before 5.18 cuts the mask alone
        whole = {x.shape[-1] for x in given} == {input_ids.shape[1]}
        if next_sequence_length is None and cache is not None and whole and inputs_embeds is None:
            next_sequence_length = max(input_ids.shape[1] - cache.get_seq_length(), 0) or None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **named(cache), **kwargs
        )

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
        with_head=None,
        output_router_logits=None,
        **kwargs,
    ):
        """Logits and, with `labels`, the loss; arguments as in `LlamaForCausalLM.forward`.

        Args:
            output_router_logits: as in transformers' models with experts: `router_logits` and `aux_loss`, the loss that
                balances experts, are in the outputs, and `router_aux_loss_coef` times the second is in the loss of
                `labels`. None: what the configuration says.
            teacher_forced: run stage I instead and return an `AlignmentOutput` (see `XLSTMHybridModel.teacher_forced`).
            with_head: a function of (hidden states [B, T, D], this model) whose result is returned in place of logits:
                losses that go over the head in chunks, and scale and cap its products themselves. It runs in here
                because FSDP gathers the head's weight only inside of `forward`. With output_router_logits=True a pair of
                that and `aux_loss` is returned; the configuration has no say here.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits and with_head is None and not teacher_forced
        if teacher_forced:
            if (self._tp_size or 1) > 1:
                raise ConfigError(
                    f"teacher_forced: tp_size={self._tp_size}, expected 1: errors are sums over all heads; align in one process"
                )
            if output_router_logits:
                raise ConfigError(
                    "output_router_logits=True with teacher_forced=True: stage I has no loss of routers; leave it out"
                )
            return self.model.teacher_forced(input_ids, attention_mask, position_ids, **kwargs)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        wanted = {"use_cache": use_cache, "output_router_logits": output_router_logits}
        outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **wanted, **kwargs)
        hidden_states, aux_loss = outputs.last_hidden_state, None
        if output_router_logits:
            aux_loss = balance_loss(self.config, outputs["router_logits"], attention_mask)
        if with_head is not None:
            found = with_head(hidden_states, self)
            return found if aux_loss is None else (found, aux_loss)
        logits = scaled_logits(self.config, self.lm_head(keep_positions(hidden_states, logits_to_keep)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **recorded, **named(cache_of(outputs)))
        if "gates" in outputs:  # output_gates=True
            result["gates"] = outputs["gates"]
        if aux_loss is not None:
            result["aux_loss"], result["router_logits"] = aux_loss, outputs["router_logits"]
        return result


class XLSTMHybridForSequenceClassification(GenericForSequenceClassification, XLSTMHybridPreTrainedModel):
    """One score or class per row, read from its last real token, as reward models are; arguments as in
    `LlamaForSequenceClassification`.
    """


class XLSTMHybridForTokenClassification(GenericForTokenClassification, XLSTMHybridPreTrainedModel):
    """A class per token; arguments as in `LlamaForTokenClassification`."""


class XLSTMHybridForQuestionAnswering(GenericForQuestionAnswering, XLSTMHybridPreTrainedModel):
    """Where an answer begins and ends; arguments as in `LlamaForQuestionAnswering`."""
