"""Where vLLM keeps the states of a student's hybrid layers, and which of them a step of its scheduler goes on from.

A request has one slot in each hybrid layer for as long as it runs: C, n and m in float32, the number of its tokens, and
[sinks | ring] of keys and values. Dims: B rows, T tokens of each, H query heads, G key/value heads, F features, K
query/key dim, V value dim, W window, S sinks.
"""

from dataclasses import dataclass, field
from itertools import groupby

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from xlstm_kernels import MLSTMState

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer, with_slots
from xlstm_hybrid.model.one_token import paper_step
from xlstm_hybrid.model.tokens import Tokens


def layer_shapes(config, layer_idx):
    """Shapes of C, n, m, count, keys and values of one request in a hybrid layer."""
    H, K, F = len(config.mixed_heads(layer_idx)), config.head_dim, config.memory_features
    G = config.num_key_value_heads - len(config.kept_of(layer_idx))
    slots = config.window_of(layer_idx) + config.sinks_of(layer_idx)
    return (H, F, K), (H, F), (H,), (1,), (G, slots, K), (G, slots, K)


def state_shapes(config):
    """The same with room for every layer, as vLLM wants all of them alike."""
    hybrid = [layer_shapes(config, j) for j, kind in enumerate(config.layer_types) if kind == "hybrid_sliding"]
    return tuple(tuple(max(sizes) for sizes in zip(*shapes, strict=True)) for shapes in zip(*hybrid, strict=True))


def state_dtypes(dtype):
    """Their dtypes in a model of `dtype`."""
    return torch.float32, torch.float32, torch.float32, torch.int32, dtype, dtype


@dataclass
class Part:
    """Requests that stand side by side in a step and have as many new tokens.

    begin, end: their tokens in the flat batch, row after row.  slots: [B] int64, where their states lie.
    fresh: whether they begin in this step; then their slots hold what somebody else has left there.
    tokens: `Tokens` [B, T].  masks: [B, 1, T, slots + T] by window and sinks, made when a layer first asks.
    """

    begin: int
    end: int
    slots: torch.Tensor
    fresh: bool
    tokens: Tokens
    masks: dict = field(default_factory=dict)

    def rows(self, x):
        """[B, T, ...] of x, whose first two dims are those of the flat batch."""
        return x.flatten(0, 1)[self.begin : self.end].unflatten(0, self.tokens.real.shape)

    def mask(self, layer):
        """What the tokens attend to in the slots of a filled layer and among themselves; None where nobody asks."""
        if self.fresh or self.tokens.real.shape[1] == 1:
            return None
        key = layer.sliding_window, layer.num_sink_tokens
        if key not in self.masks:
            self.masks[key] = torch.cat([layer.visible(self.tokens), self.tokens.visible(*key)], -1)[:, None]
        return self.masks[key]


def parts_of(starts, lengths, slots):
    """The `Part`s of a step.

    Args:
        starts: list, where each request's tokens begin in the flat batch, and their end.
        lengths: list, tokens of each request after the step.
        slots: [requests] integers.
    """
    new = [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
    kinds = [(T, length == T) for T, length in zip(new, lengths, strict=True)]
    parts, first = [], 0
    for (T, fresh), run in groupby(kinds):
        last = first + len(list(run))
        if T:  # a padded request has none
            seen = torch.tensor([n - T for n in lengths[first:last]], device=slots.device)
            tokens = Tokens.locate((last - first, T), slots.device, seen=seen)
            parts.append(Part(starts[first], starts[last], slots[first:last].long(), fresh, tokens))
        first = last
    return parts


class StateBackend(AttentionBackend):
    """What vLLM asks about layers that keep a state."""

    @staticmethod
    def get_name():
        return "XLSTM_HYBRID"

    @staticmethod
    def get_builder_cls():
        return PartsBuilder

    @classmethod
    def is_ssm(cls):
        return True


class PartsBuilder(AttentionMetadataBuilder):
    """Makes the list of `Part`s that the layers of a step read."""

    reorder_batch_threshold = 1  # requests with one new token come first, and are one part

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        step, n = common_attn_metadata, common_attn_metadata.num_reqs
        bound = step.seq_lens_cpu_upper_bound  # exact where nothing is drafted; reading it waits for no GPU
        lengths = (step.seq_lens if bound is None else bound)[:n].tolist()
        return parts_of(step.query_start_loc_cpu[: n + 1].tolist(), lengths, step.block_table_tensor[:n, 0])


class LayerStates(MambaBase):
    """The states of all requests in one hybrid layer, as a layer of vLLM's.

    config: of what this process calculates of the student.  name: by which vLLM knows the layer, and hands out what
    belongs to it in a step.
    """

    def __init__(self, vllm_config, config, layer_idx, name):
        self.config, self.dtype = config, vllm_config.model_config.dtype
        self.window, self.sinks = self.config.window_of(layer_idx), self.config.sinks_of(layer_idx)
        own = layer_shapes(self.config, layer_idx)
        self.own = [tuple(map(slice, shape)) for shape in own]  # of what all layers have
        self.whole = own == state_shapes(self.config)
        self.name, self.kv_cache = name, ()
        vllm_config.compilation_config.static_forward_context[name] = self

    @property
    def mamba_type(self):
        return MambaAttentionBackendEnum["XLSTM_HYBRID"]

    def get_state_shape(self):
        return state_shapes(self.config)

    def get_state_dtype(self):
        return state_dtypes(self.dtype)

    def read(self, part):
        """A `HybridCacheLayer` with the states of a part's rows; empty where they begin.

        Raises:
            CacheError: a slot holds the state of another text.
        """
        layer = HybridCacheLayer(self.window, self.sinks)
        if part.fresh:
            return layer
        C, n, m, count, keys, values = (x[part.slots, *own] for x, own in zip(self.kv_cache, self.own, strict=True))
        self.expect_own(part, count[:, 0])
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        layer.state, layer.keys, layer.values, layer.count = MLSTMState(C, n, m), keys, values, count[:, 0].long()
        return layer

    def write(self, part, layer):
        """Put the states after a part's tokens into their slots. Slots of the ring that no token has taken are 0: what
        another request has left there need not be finite.
        """
        keys, values = (with_slots(x, layer.slots) for x in (layer.keys, layer.values))
        new = *layer.state, layer.count[:, None], keys, values
        for x, own, y in zip(self.kv_cache, self.own, new, strict=True):
            x[part.slots, *own] = y.to(x.dtype)

    def step(self, part, attention, hidden_states, heads, rope):
        """h [B, 1, H, K] of one token per row, compiled and in the slots themselves; None where that does not work. The
        arguments are those of `paper_step`.
        """
        index = part.tokens.compiled
        if index is None or part.fresh or not self.whole or attention.split is not None:
            return None
        C, n, m, count, keys, values = self.kv_cache
        self.expect_own(part, count[part.slots, 0])
        where = {"index": index, "count": index.clone(), "sinks": self.sinks, "where": part.slots}
        h = paper_step(attention, hidden_states, heads, rope, C, n, m, keys, values, **where)
        count[part.slots, 0] = where["count"].to(count.dtype)
        return h

    def expect_own(self, part, count):
        """Raise CacheError unless the states are as long as the scheduler says; a GPU is not waited for, and asserts."""
        seen = part.tokens.index[:, 0]
        if count.device.type != "cpu":
            torch._assert_async((count == seen).all(), f"{self.name}: a state slot holds another text")
        elif not torch.equal(count.long(), seen):
            row = int((count != seen).nonzero()[0])
            raise CacheError(
                f"{self.name}: slot {int(part.slots[row])} holds the state after {int(count[row])} tokens, expected {int(seen[row])}: it belongs to "
                "another text. Report it with vLLM's version and settings; the answers of this process cannot be relied on"
            )
