"""The cache of a hybrid layer: mLSTM state, sinks, ring buffer of the window. It grows with the first S + W tokens and
then stays as large as it is, whatever the context.

It stores: kernels write into its tensors, and it says which token stands where. Dims: B batch, T new tokens, H query
heads, G key/value heads, K query/key dim, V value dim, W window, S sinks.
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer
from xlstm_kernels import MLSTMState, place_token

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.kept_groups import KeptKeys
from xlstm_hybrid.model.rollback import ROLLBACK_TOKENS, Rollback, tokens_removed


class StateLayer(CacheLayerMixin):
    """A layer whose size does not depend on the context. It counts columns in `seen_tokens`, padding included, and has
    `_tensors(change)`, which replaces every tensor x of it, rows first, by change(x)."""

    def get_mask_sizes(self, query_length):
        return self.seen_tokens + query_length, 0

    def get_seq_length(self):
        return self.seen_tokens

    def get_max_length(self):
        return -1

    def offload(self):
        self._tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        self._tensors(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx):
        self._tensors(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._tensors(lambda x: x[indices])


class Placing(NamedTuple):
    """Where the tokens of a call go.

    count: [B, 1] tokens of the row's document after the call.  restarted: [B, 1] bool, whether a document begins in it.
    inside: [B, T] bool, tokens of the document that the row ends with.
    written: [B, slots] bool, slots that hold another token afterwards; source: [B, slots], the column of the call that
    they take.
    """

    count: torch.Tensor
    restarted: torch.Tensor
    inside: torch.Tensor
    written: torch.Tensor
    source: torch.Tensor

    def take(self, new, old):
        """`old` [B, G, slots or fewer, ...] with what comes from `new` [B, G, T, ...]."""
        old = with_slots(old, self.source.shape[1])
        at, written = self.source[:, None], self.written[:, None]
        if new.ndim == 4:
            at, written = at[..., None].expand(-1, new.shape[1], -1, new.shape[-1]), written[..., None]
        return torch.where(written, new.gather(2, at.expand(-1, new.shape[1], *at.shape[2:])), old)


def with_slots(x, slots):
    """x [B, G, slots or fewer, ...] with empty slots, which are 0, at the end."""
    more = slots - x.shape[2]
    return x if more <= 0 else torch.cat([x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])], 2)


def place_of(tokens, layer):
    """`(index [B] of one token per row, its `place_token` in the slots of `layer`)`, for all layers of the call that have
    as many slots. No place where finding it is the kernel's matter: on a GPU, and in a graph.
    """
    index, slots, sinks = tokens.index[:, 0], layer.keys.shape[2], layer.num_sink_tokens
    if torch.compiler.is_compiling():  # as a key, a number of slots would be a constant of the graph
        return index, None
    tokens.places[slots, sinks] = index, place_token(index, slots, sinks) if index.device.type == "cpu" else None
    return tokens.places[slots, sinks]


class HybridCacheLayer(Rollback, StateLayer):
    """mLSTM state and [sinks | ring] of one hybrid layer.

    state: `MLSTMState`, None where the layer has no memory.
    keys, values: [B, G, slots, K | V]; slot j < S holds the document's j-th token, slot S + j the latest of the tokens
    S + j, S + j + W, S + j + 2 W ... There are as many slots as columns have come, at most S + W; in a static layer S +
    W from the beginning.
    count: [B] real tokens of the present document; it says which token each slot holds (`slot_index`).
    kept: `KeptKeys` of groups that keep full attention, or None; they grow with the context and are none of the G
    groups here.
    cell: the config's `memory_cell`, whose state it is.
    room: where a static layer's state stays; what a decode step writes keeps its address, as CUDA graphs demand.
    kind: window, sinks, cell, whether it keeps groups, tokens of a sparse memory: what a model compares with its own.
    """

    is_compileable = False  # `static=True` sets it
    is_croppable = True  # once `record_past` is set, as for transformers' own sliding layers
    is_sliding = True  # full-attention masks are sized from other layers
    supports_early_init = False
    capacity = 0  # of a sparse memory, see `experimental.sparse`
    fields = ("state", "keys", "values", "count", "seen_tokens", "is_initialized", "dtype", "device")

    def __init__(self, sliding_window, num_sink_tokens=0, static=False, cell="mlstm", kept=None):
        super().__init__()
        self.sliding_window, self.num_sink_tokens, self.is_compileable = sliding_window, num_sink_tokens, static
        self.cell, self.kept, self.state, self.room, self.count, self.seen_tokens = cell, kept, None, None, None, 0
        self.slots = num_sink_tokens + sliding_window  # once the ring is full
        self.kind = sliding_window, num_sink_tokens, cell, kept is not None, self.capacity

    def lazy_initialization(self, key_states, value_states):
        B, G = key_states.shape[:2]
        slots = self.slots if self.is_compileable else self.slots_after(key_states.shape[2])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        shape = B, G, slots, key_states.shape[-1]
        if self.room is not None and self.keys.shape == shape and self.keys.dtype == self.dtype:
            self.count.zero_()  # a static layer that was reset
            return
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(B, G, slots, value_states.shape[-1])
        self.count, self.room = torch.zeros(B, dtype=torch.long, device=self.device), None
        self.pin(self.keys, self.values, self.count)

    def pin(self, *tensors):
        """Tell the compiler that a static layer's tensors stay where they are."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for x in tensors:
                torch._dynamo.mark_static_address(x)

    # --- which token stands where ----------------------------------------------------------------------------------

    @property
    def slot_index(self):
        """[B, slots] index of the token in each slot, -1 where empty."""
        return self.index_of_slots(self.count[:, None], self.keys.shape[2])

    def index_of_slots(self, count, slots):
        """The same for a row that holds `count` [B, 1] tokens."""
        S, W, last = self.num_sink_tokens, self.sliding_window, count - 1
        slot = torch.arange(slots, device=count.device)[None]
        index = torch.where(slot < S, slot, last - (last - slot) % W)
        return torch.where((index > last) | (index < slot), -1, index)

    def slots_after(self, columns):
        """How many slots there are once so many columns have come."""
        return min(columns, self.slots)

    def grow(self, columns):
        """Make room for `columns` more, as far as the ring is not full; returns the number of slots."""
        slots = self.slots_after(self.seen_tokens + columns)
        self.keys, self.values = with_slots(self.keys, slots), with_slots(self.values, slots)
        return self.keys.shape[2]

    def visible(self, tokens):
        """[B, T, slots] bool: which slots each new token attends to, before they are updated."""
        slot_index = self.slot_index
        inside = tokens.index[:, :, None] - slot_index[:, None] < self.sliding_window
        sink = torch.arange(slot_index.shape[1], device=inside.device) < self.num_sink_tokens
        there = (slot_index >= 0)[:, None] & (tokens.document == 0)[:, :, None]
        return (there & (inside | sink)) | ~tokens.real[:, :, None]

    def placing(self, tokens):
        """`Placing` of new tokens: padding writes nothing, a document start empties the slots."""
        document, restarted = tokens.document[:, -1:], tokens.start.any(-1, keepdim=True)
        inside = tokens.real & (tokens.document == document)
        before = torch.where(restarted, 0, self.count[:, None])
        last = tokens.index.masked_fill(~inside, -1).amax(-1, keepdim=True)
        count = torch.where(inside.any(-1, keepdim=True), last + 1, before)
        slots = max(self.slots_after(self.seen_tokens + tokens.real.shape[1]), self.keys.shape[2])
        wanted = self.index_of_slots(count, slots)  # index that each slot holds from now on
        if tokens.plain:  # each column is a token
            source = (wanted - before).clamp(0, tokens.index.shape[1] - 1)
            return Placing(count, restarted, inside, wanted >= before, source)
        ordinal = tokens.real.long().cumsum(-1)  # 1 + number of real tokens before
        skipped = ordinal[:, -1:] - inside.sum(-1, keepdim=True)  # real tokens of earlier documents in this call
        source = torch.searchsorted(ordinal, (wanted - before + skipped + 1).clamp_min(1))
        source = source.clamp_max(tokens.index.shape[1] - 1)
        return Placing(count, restarted, inside, wanted >= before, source)

    def shared_placing(self, tokens):
        """`placing`, once for all layers of a call that hold as many tokens in as many slots."""
        # a compiler's graph would hold their number as a constant; a graph for other runtimes takes full rings alone
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self.placing(tokens)
        alike = self.seen_tokens, self.keys.shape[2], self.sliding_window, self.num_sink_tokens
        if alike not in tokens.places:
            tokens.places[alike] = self.placing(tokens)
        return tokens.places[alike]

    # --- taking tokens in ------------------------------------------------------------------------------------------

    def advance(self, tokens):
        """Count one token that a kernel has written into state, keys and values."""
        self.count.copy_(tokens.count)
        self.seen_tokens += 1

    def update(self, key_states, value_states, tokens, state=None):
        """Put T new tokens into the slots, and the state after them in the place of the old one.

        Args:
            key_states, value_states: [B, G, T, K | V].
        Returns:
            `(keys, values)` that the new tokens may attend to, [B, G, slots + T, K | V]: the slots as they were,
            unless the layer was empty, then the tokens themselves (see `visible`).
        """
        seen = key_states, value_states
        if self.is_initialized:
            seen = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        else:
            self.lazy_initialization(key_states, value_states)
        place = self.shared_placing(tokens)
        self.seen_tokens += key_states.shape[2]
        keys, values = place.take(key_states, self.keys), place.take(value_states, self.values)
        self.put(keys, values, place.count[:, 0].clone(), state)
        return seen

    def put(self, keys, values, count, state):
        """Replace the layer's tensors; a static layer's stay where they are. state: None where there is no memory."""
        if not self.is_compileable or torch.is_grad_enabled():
            self.keys, self.values, self.count, self.state = keys, values, count, state
            return
        if state is not None and self.room is None:
            self.room = MLSTMState(*(x.clone() for x in state))
            self.pin(*self.room)
        own, new = (self.keys, self.values, self.count), (keys, values, count)
        self.state = None if state is None else self.room
        for x, y in zip((*own, *(self.state or ())), (*new, *(state or ())), strict=True):
            x.copy_(y)

    # --- all tensors together --------------------------------------------------------------------------------------

    def _tensors(self, change):
        if self.state is not None:
            self.state = MLSTMState(*(change(x) for x in self.state))
            self.room = self.state if self.room is not None else None
        if self.is_initialized:
            self.keys, self.values, self.count = (change(x) for x in (self.keys, self.values, self.count))
        if self.kept is not None:
            self.kept.map(change)
        self.map_record(change)

    def reset(self):
        """Empty the layer; the memory of a static one is used again."""
        if not self.is_compileable:
            self.keys = self.values = self.count = None
        self.state, self.is_initialized, self.seen_tokens = None, False, 0
        if self.kept is not None:
            self.kept.reset()
        self.forget()

    def named_tensors(self):
        """`{name: tensor}` of a filled layer, as files hold them."""
        tensors = {"keys": self.keys, "values": self.values, "count": self.count}
        tensors |= {} if self.state is None else self.state._asdict()
        if self.kept is not None:
            tensors |= {f"kept_{name}": getattr(self.kept, name) for name in ("keys", "values", "place")}
        return tensors

    def fill(self, tensors, seen):
        """Take `named_tensors` of a layer that had `seen` tokens."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values, self.count = (tensors[name] for name in ("keys", "values", "count"))
        self.seen_tokens = seen
        self.state = MLSTMState(*(tensors[name] for name in MLSTMState._fields)) if "C" in tensors else None
        if self.kept is not None:
            self.kept.keys, self.kept.values, self.kept.place = (
                tensors[f"kept_{name}"] for name in ("keys", "values", "place")
            )


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of a layer that keeps the teacher's sliding attention. With `record_past` it holds `depth` tokens
    more than the window needs; transformers' own holds every token since the last `crop`, and cuts keys that it no
    longer has without a word.
    """

    depth = ROLLBACK_TOKENS

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized and not self.record_past:
            self.trim(0)  # recording may have been switched off
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.trim(self.depth if self.record_past else 0)
        # as masks are sized; transformers before 5.18 returns the record too
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]

    def trim(self, more):
        begin = max(self.keys.shape[-2] - (self.sliding_window - 1 + more), 0)
        self.keys, self.values = self.keys[:, :, begin:], self.values[:, :, begin:]

    @property
    def recorded(self):
        """Number of last tokens that can be taken back: all of them while the window has lost none."""
        columns = self.keys.shape[-2] if self.is_initialized else 0
        return columns if columns == self.cumulative_length else columns - (self.sliding_window - 1)

    def crop(self, tokens_to_remove):
        tokens = tokens_removed(tokens_to_remove)
        if tokens > self.recorded:
            raise lost(tokens, self.recorded)
        if tokens:
            self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
            self.cumulative_length -= tokens


def lost(tokens, recorded):
    return CacheError(
        f"cannot remove {tokens} tokens: the window has kept {recorded} more than it needs. Call "
        "xlstm_hybrid.state.remember(cache, tokens) before they come, or compute the prefix again"
    )


class PlacedLayer(StateLayer):
    """What a `SlidingLayer` becomes once padding stands after a token of its row: transformers' windows count columns,
    and would count it. Here each column knows its token's place.

    kept: the `KeptKeys` of all groups; a row that has ended holds on to its columns as long as the others go on.
    """

    is_compileable, is_croppable, is_sliding, supports_early_init = False, True, True, False

    def __init__(self, sliding_window):
        super().__init__()
        self.kept, self.seen_tokens, self.since = KeptKeys(sliding_window), 0, 0
        self.record_past, self.depth = False, ROLLBACK_TOKENS

    @classmethod
    def of(cls, layer, real):
        """The same as `SlidingLayer` `layer`, whose columns so far are tokens where `real` [B, columns]."""
        self = cls(layer.sliding_window)
        self.record_past, self.depth = getattr(layer, "record_past", False), layer.depth
        if layer.is_initialized:
            place = torch.where(real, real.long().cumsum(-1) - 1, -1)[:, real.shape[1] - layer.keys.shape[2] :]
            self.fill({"keys": layer.keys, "values": layer.values, "place": place}, layer.cumulative_length)
            self.since = layer.recorded
        return self

    def lazy_initialization(self, key_states, value_states):
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states, value_states, tokens):
        """Take T tokens in; returns what they attend to, `(keys, values, mask [B, 1, T, columns])`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        spare = self.depth if self.record_past else 0
        self.seen_tokens += key_states.shape[2]
        self.since = min(self.since + key_states.shape[2], spare)
        return self.kept.append(key_states, value_states, tokens, spare, masked=True)

    @property
    def recorded(self):
        """Number of last tokens that can be taken back: all of them while no column has been dropped."""
        columns = self.kept.place.shape[1] if self.is_initialized else 0
        return columns if columns == self.seen_tokens else self.since

    def crop(self, tokens_to_remove):
        tokens = tokens_removed(tokens_to_remove)
        if tokens > self.recorded:
            raise lost(tokens, self.recorded)
        self.kept.crop(tokens)
        self.seen_tokens, self.since = self.seen_tokens - tokens, max(self.since - tokens, 0)

    def _tensors(self, change):
        self.kept.map(change)

    def reset(self):
        self.kept.reset()
        self.is_initialized, self.seen_tokens, self.since = False, 0, 0

    def named_tensors(self):
        return {name: getattr(self.kept, name) for name in ("keys", "values", "place")}

    def fill(self, tensors, seen):
        """Take `named_tensors` of a layer that had `seen` tokens."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.kept.keys, self.kept.values, self.kept.place = (tensors[name] for name in ("keys", "values", "place"))
        self.seen_tokens = seen
