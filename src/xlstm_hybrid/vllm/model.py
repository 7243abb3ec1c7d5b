"""The student as a model of vLLM: the layers are ours, vLLM's are the batch, the slots of the states and, where a layer
keeps the teacher's attention, its pages.

Dims: N tokens of all requests in a step, B rows of a part, T tokens of each, D hidden size, H query heads, G key/value
heads, K query/key dim.
"""

import copy

import torch
from torch import nn
from transformers import initialization as init
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.model.experimental.cells import normed
from xlstm_hybrid.model.kept_groups import log_scaled
from xlstm_hybrid.model.layers import (
    HybridDecoderLayer,
    XLSTMHybridRotaryEmbedding,
    rms_norm,
    rope_of_layers,
    scaled_embeddings,
    scaled_logits,
)
from xlstm_hybrid.model.linear import Linear
from xlstm_hybrid.model.one_token import compiled_index
from xlstm_hybrid.vllm.state import LayerStates, state_dtypes, state_shapes
from xlstm_hybrid.vllm.tensor_parallel import Vocabulary, part_of, share_layer, share_of


class Trunk(nn.Module):
    """Embeddings, layers and last norm, under the names that they have in a checkpoint.

    config: of this process's `share_of` the student.
    """

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = Vocabulary(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HybridDecoderLayer(config, j) for j in range(config.num_hidden_layers)])
        self.norm = rms_norm(config, config.hidden_size)


class XLSTMHybridForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """What vLLM loads for a student's `architectures`.

    whole: the student's configuration.  config: that of the part which this process calculates, the same without tensor
    parallelism.
    states: {layer: `LayerStates`} of hybrid layers.  pages: {layer: vLLM's attention} of layers, or of groups of a hybrid
    one, that keep the teacher's.
    """

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.whole = vllm_config.model_config.hf_config
        self.size, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.config = config = share_of(self.whole, self.size, self.rank)
        config._experts_implementation = "eager"  # one expert after the other, as in a student's own model
        with init.no_init_weights():
            self.model = Trunk(config)
            for layer in self.model.layers:
                share_layer(layer, self.whole, self.size, self.rank)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        kinds = config.attention_types
        self.rotary_emb = nn.ModuleDict({kind: XLSTMHybridRotaryEmbedding(config, kind) for kind in kinds})
        self.states, self.pages = {}, nn.ModuleDict()
        for j, kind in enumerate(config.layer_types):
            name = f"{prefix}{'.' if prefix else ''}model.layers.{j}.self_attn"
            groups, window = config.num_key_value_heads, config.window_of(j)
            if kind == "hybrid_sliding":
                if vllm_config.model_config.dtype == torch.float16:
                    self.model.layers[j].self_attn.mlstm.float()  # as `from_pretrained` keeps it
                self.states[j] = LayerStates(vllm_config, config, j, f"{name}.state")
                groups, window = len(config.kept_of(j)), config.kept_window_of(j)
            if groups:
                self.pages[str(j)] = self.attention_of(vllm_config, groups, window, f"{name}.attn")

    def attention_of(self, vllm_config, groups, window, name):
        """vLLM's attention of so many key/value groups over `window` tokens, or all of them."""
        config, cache = self.config, copy.copy(vllm_config.cache_config)
        cache.sliding_window = None  # that of the hybrid layers, which it would take for everybody's
        heads, K = groups * (config.num_attention_heads // config.num_key_value_heads), config.head_dim
        return Attention(
            heads,
            K,
            config.attention_scaling,
            num_kv_heads=groups,
            cache_config=cache,
            per_layer_sliding_window=window,
            prefix=name,
        )

    # --- what vLLM asks of the class -------------------------------------------------------------------------------

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        return state_shapes(
            share_of(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)
        )

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return state_dtypes(vllm_config.model_config.dtype)

    # --- a step ----------------------------------------------------------------------------------------------------

    def embed_input_ids(self, input_ids):
        return scaled_embeddings(self.model.embed_tokens(input_ids), self.config.embedding_multiplier)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """Hidden states [N, D] after the last norm; input_ids, positions: [N]."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        step = get_forward_context().attn_metadata
        parts = {j: () if step is None else step[states.name] for j, states in self.states.items()}
        single = all(part.tokens.real.shape[1] == 1 for held in parts.values() for part in held)
        # one token per row: our products have a form for that
        x, positions = (x[:, None], positions[:, None]) if single else (x[None], positions[None])
        for part in {id(part): part for held in parts.values() for part in held}.values():
            part.tokens.compiled = compiled_index(self.config, part.rows(x), part.tokens)
        rope = rope_of_layers(self.config, {kind: rotary(x, positions) for kind, rotary in self.rotary_emb.items()})
        for j, (layer, where) in enumerate(zip(self.model.layers, rope, strict=True)):
            attention, inputs = layer.self_attn, layer.attention_input(x)
            heads = attention.heads(inputs)
            if str(j) in self.pages:
                h = kept = self.keep(j, attention, attention.rotated(heads, where), positions)
            if j in self.states:
                h = self.mix(attention, inputs, heads, where, self.states[j], parts[j])
            if attention.split is not None:
                h = attention.split.join(h, kept, 1)
            x = layer.finish(x, attention.output(h.view(*x.shape[:2], -1, attention.head_dim), heads))
        return self.model.norm(x).flatten(0, 1)

    def keep(self, layer_idx, attention, projected, positions):
        """h [N, heads, K] before W_o of what keeps the teacher's attention: a layer, or groups of a hybrid one."""
        query, key, value, *_ = projected
        if attention.split is not None:
            query, key, value, _, unrotated = attention.split.projected(projected, kept=True)
            if self.config.kept_positions == "log":
                query, key = unrotated
                query = log_scaled(query, positions, self.config.kept_log_base)
        flat = (x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (query, key, value))
        return self.pages[str(layer_idx)](*flat).unflatten(-1, (-1, attention.head_dim))

    @staticmethod
    def mix(attention, hidden_states, heads, rope, states, parts):
        """h [N, heads, K] before W_o of the heads that mix, part by part; the states are taken on. Without parts, as when
        vLLM measures its memory, and for padding, it is 0.
        """
        out = heads[1][0].new_zeros(hidden_states.shape[:2].numel(), len(attention.mlstm.q_map), attention.head_dim)
        for part in parts:
            rows, own = part.rows(hidden_states), [[part.rows(x) for x in kind] for kind in heads[:2]]
            own, where = (*own, None), [part.rows(x) for x in rope]
            h = states.step(part, attention, rows, own, where)
            if h is None:
                projected, layer = attention.rotated(own, where), states.read(part)
                if attention.split is not None:
                    projected = attention.split.projected(projected, kept=False)
                h, _ = attention.mix_heads(rows, projected, part.tokens, part.mask(layer), layer)
                states.write(part, layer)
            if attention.config.mixer_norm:
                h = normed(attention.mlstm, h)
            out[part.begin : part.end] = h.flatten(0, 1).view(-1, *out.shape[1:])
        return out

    def compute_logits(self, hidden_states):
        """[tokens, V] of hidden states [tokens, D]; one row each, as in `forward`."""
        logits = tensor_model_parallel_all_gather(self.lm_head(hidden_states[:, None])[:, 0])
        return scaled_logits(self.config, logits[:, : self.whole.vocab_size])

    def load_weights(self, weights):
        """Take the tensors of a checkpoint, which have the model's own names, or this process's parts of them; returns
        the names.

        Raises:
            CheckpointError: tensors that are missing, or have no place or another shape.
        """
        own, loaded, tied = dict(self.named_parameters()), set(), self.config.tie_word_embeddings
        for name, x in weights:
            if name == "lm_head.weight" and tied:
                continue
            part = None
            if name in own:
                part = part_of(self.whole, name, x, own[name].shape, self.size, self.rank)
            if part is None:
                expected = list(own[name].shape) if name in own else "no such tensor"
                among = f", a part for {self.size} processes," if self.size > 1 and name in own else ""
                raise CheckpointError(
                    f"{name}: the checkpoint has {list(x.shape)}, expected {expected}{among} from its config.json; is it another student's?"
                )
            with torch.no_grad():
                own[name].copy_(part)
            loaded.add(name)
        if missing := sorted(own.keys() - loaded):
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}; convert or save the student again"
            )
        return loaded
