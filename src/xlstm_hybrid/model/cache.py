"""The cache of a hybrid layer: mLSTM state, ring buffer of the window, sinks. Its size does not depend on the context.

Dims: B batch, T new tokens, H query heads, G key/value heads, K query/key dim, V value dim, W window, S sinks.
"""

import copy

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from xlstm_kernels import MLSTMState, delta_hybrid_step, fresh_state, hybrid_step, window_step

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.experimental.joint import absorb
from xlstm_hybrid.model.kept_groups import KeptKeys, SparseSlots
from xlstm_hybrid.model.tokens import Piece, Step

ROLLBACK_TOKENS = 256  # last tokens that can be taken back where nobody says how many: more than assisted decoding drafts at once


class StateLayer(CacheLayerMixin):
    """A layer whose size does not depend on the context. It counts columns in `seen_tokens`, padding included, and has `_tensors(change)`, which
    replaces every tensor x of it, rows first, by change(x)."""

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


class HybridCacheLayer(StateLayer):
    """mLSTM state and [sinks | ring] of one hybrid layer.

    keys, values: [B, G, S + W, K | V]; slot j < S holds the document's j-th token, slot S + j the latest token whose index is j mod W.
    count: [B] real tokens of the present document; it says which token each slot holds (`slot_index`).
    cell: the config's `memory_cell`.
    sparse, scores: `SparseSlots` and [B, G, S + W], what the tokens in the slots are worth, of a layer with `capacity`; or None.
    kept: `KeptKeys` of groups that keep full attention, or None; they grow with the context and are none of the G groups here.

    read_keys: the features of keys (`JointMixer.read_keys`) of a layer whose state is of the tokens that have left the window; or None.
    A recurrent state is not invertible. With `record_past` the layer keeps a copy of itself from before the last `depth` tokens and the
    inputs of the calls since; taking tokens back repeats the calls that stay. What whole calls leave behind is bitwise what they left the
    first time; a call that is cut gives what the shorter call gives, to rounding. Memory: the layer once more, and `depth` tokens' inputs.
    """

    is_compileable = False  # `static=True` sets it: what a decode step writes keeps its address, as CUDA graphs demand
    is_croppable = True  # once `record_past` is set, as for transformers' own sliding layers
    is_sliding = True  # full-attention masks are sized from other layers
    supports_early_init = False

    def __init__(self, sliding_window, num_sink_tokens=0, static=False, cell="mlstm", kept=None, capacity=0, **kwargs):
        super().__init__()
        self.cell = cell
        self.sliding_window, self.num_sink_tokens, self.is_compileable = sliding_window, num_sink_tokens, static
        self.state, self.room, self.count, self.seen_tokens = None, None, None, 0
        self.depth, self.base, self.calls, self.pending = 0, None, [], None
        self.kept, self.capacity, self.scores, self.sparse, self.read_keys = kept, capacity, None, None, None

    @property
    def remembers(self):
        """What kind of layer it is: window, sinks, cell, whether it keeps groups, capacity of the sparse memory."""
        return self.sliding_window, self.num_sink_tokens, self.cell, self.kept is not None, self.capacity

    @property
    def record_past(self):
        return self.depth > 0

    @record_past.setter
    def record_past(self, on):  # transformers assigns it
        self.depth = (self.depth or ROLLBACK_TOKENS) if on else 0
        self.forget()

    def activate_past_recording(self):
        if not self.record_past:
            self.record_past = True

    def forget(self):
        """Drop the record; a new one starts with the next call."""
        self.base, self.calls, self.pending = None, [], None

    @property
    def recorded(self):
        """Number of last tokens that can be taken back."""
        return sum(len(call) for call in self.calls)

    def record(self, memory, chunk_size):
        """Keep the mLSTM's (k, v, i, f) of a call until `update` brings the rest of it."""
        self.pending = tuple(x.detach() for x in memory), chunk_size

    @torch.compiler.disable  # the record is a list that grows: a compiled step calls it as it is
    def note(self, call):
        """Record a call before it changes the layer; what is older than `depth` tokens goes into the base."""
        if self.base is None:
            self.base = HybridCacheLayer(self.sliding_window, self.num_sink_tokens, cell=self.cell, capacity=self.capacity)
            self.base.take_over(self)
            self.base._tensors(lambda x: x.detach().clone())  # steps write in place
        self.calls.append(call)
        excess = max(self.recorded - self.depth, 0)
        while excess >= len(self.calls[0]):
            excess -= len(self.calls[0])
            self.calls.pop(0).repeat(self.base)
        if excess and len(oldest := self.calls[0]) > self.depth:
            cut = len(oldest) - self.depth
            oldest.slice(0, cut).repeat(self.base)
            self.calls[0] = oldest.slice(cut, len(oldest)).map(torch.clone)  # a slice would hold the whole call's memory

    def take_over(self, other):
        """Become what `other` is, its tensors included; the record stays."""
        for name in ("state", "keys", "values", "count", "seen_tokens", "is_initialized", "dtype", "device", "scores", "sparse", "read_keys"):
            setattr(self, name, getattr(other, name, None))

    def rollback(self, tokens, keep_record=True):
        """Take the last tokens (columns, padding included) back.

        Raises:
            CacheError: the record does not reach that far; nothing has changed.
        """
        if tokens > self.recorded:
            arm = "xlstm_hybrid.state.remember(cache, tokens) before they come, or keep a snapshot(cache)"
            why = f"the record holds {self.recorded} tokens" if self.record_past else "a recurrent state is not invertible"
            raise CacheError(f"cannot remove {tokens} tokens: {why}. Call {arm}, or compute the prefix again")
        if tokens:
            left = self.recorded - tokens
            base, calls = (copy.deepcopy(self.base) if keep_record else self.base), []
            for call in self.calls:
                if left:
                    calls.append(call if len(call) <= left else call.slice(0, left))
                    calls[-1].repeat(base)
                    left -= len(calls[-1])
            self.calls = calls
            self.take_over(base)
            if self.kept is not None:
                self.kept.crop(tokens)
        if not keep_record:
            self.forget()

    def crop(self, tokens_to_remove):
        """Take the last `-tokens_to_remove` tokens back, as transformers does after each round of assisted decoding; the record starts anew."""
        self.rollback(tokens_removed(tokens_to_remove), keep_record=False)

    def lazy_initialization(self, key_states, value_states):
        B, G = key_states.shape[:2]
        slots = self.num_sink_tokens + self.sliding_window
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self.room is not None and self.keys.shape == (B, G, slots, key_states.shape[-1]) and self.keys.dtype == self.dtype:
            self.count.zero_()  # a static layer that was reset
            return
        self.keys = key_states.new_zeros(B, G, slots, key_states.shape[-1])
        self.values = value_states.new_zeros(B, G, slots, value_states.shape[-1])
        self.count, self.room = torch.zeros(B, dtype=torch.long, device=self.device), None
        if self.capacity:
            self.sparse = SparseSlots.empty(key_states, value_states, self.capacity)
            self.scores = self.sparse.score.new_zeros(B, G, slots)
        self.pin(self.keys, self.values, self.count)

    def pin(self, *tensors):
        """Tell the compiler that a static layer's tensors stay where they are."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for x in tensors:
                torch._dynamo.mark_static_address(x)

    def hold(self, state):
        """Make `state` the layer's own, or None where it has no memory; a static layer copies it to where the last one was."""
        if state is not None and self.is_compileable and not torch.is_grad_enabled():
            if self.room is None:
                self.room = MLSTMState(*(x.clone() for x in state))
                self.pin(*self.room)
            for mine, new in zip(self.room, state, strict=True):
                mine.copy_(new)
            state = self.room
        self.state = state

    def put(self, **tensors):
        """Replace tensors of the layer; a static layer's in place."""
        for name, x in tensors.items():
            if self.is_compileable and not torch.is_grad_enabled():
                getattr(self, name).copy_(x)
            else:
                setattr(self, name, x)

    @property
    def slot_index(self):
        """[B, S + W] index of the token in each slot, -1 where empty."""
        return self.index_of_slots(self.count[:, None])

    def index_of_slots(self, count):
        """The same for a row that holds `count` [B, 1] tokens."""
        S, W, last = self.num_sink_tokens, self.sliding_window, count - 1
        slot = torch.arange(S + W, device=count.device)[None]
        held = torch.where(slot < S, slot, last - (last - (slot - S)) % W)
        return torch.where((held > last) | (held < 0), -1, held)

    def visible(self, tokens):
        """[B, T, S + W] bool: which slots each new token attends to, before they are updated. A sink is read from its ring slot while
        it is inside the window and from its sink slot afterwards, never from both."""
        slot_index = self.slot_index
        distance = tokens.index[:, :, None] - slot_index[:, None]
        inside = distance < self.sliding_window
        sink = torch.arange(slot_index.shape[1], device=distance.device) < self.num_sink_tokens
        held = (slot_index >= 0)[:, None] & (tokens.document == 0)[:, :, None]
        return (held & (inside != sink)) | ~tokens.real[:, :, None]

    def step(self, query, key, value, features, gates, tokens, scale):
        """One token, in place: nothing is allocated that depends on the window or the context.

        Args:
            query, key, value: [B, H | G, 1, K | V]; features: (q, k) of the mLSTM, [B, 1, H, K]; gates: (i, f, o), [B, 1, H]. Both are () where
                there is no memory.
        Returns:
            h [B, 1, H, V].
        """
        if self.record_past:
            self.note(Step(query, key, value, features, gates, tokens, scale))
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        index, slots = tokens.index[:, 0], {"sinks": self.num_sink_tokens, "scale": scale}
        if features:
            if self.state is None:
                self.hold(fresh_state(features[0], q, torch.promote_types(q.dtype, torch.float32)))
            run = delta_hybrid_step if self.cell == "delta" else hybrid_step
            h = run(q, k, v, *features, *gates, self.state, self.keys, self.values, index, **slots)
        else:
            self.state, h = None, window_step(q, k, v, self.keys, self.values, index, **slots)
        self.count.copy_(torch.where(index < 0, self.count, index + 1))
        self.seen_tokens += 1
        return h

    def update(self, key_states, value_states, tokens, scores=None, **kwargs):
        """Put T new tokens into the slots; padding writes nothing, a document start empties them.

        Args:
            key_states, value_states: [B, G, T, K | V].
            scores: [B, G, T] of a layer with a sparse memory.
        """
        if self.record_past:
            memory, chunk_size = self.pending
            self.note(Piece(memory, key_states.detach(), value_states.detach(), tokens, chunk_size, scores))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        T = key_states.shape[2]
        self.seen_tokens += T
        document, restarted = tokens.document[:, -1:], tokens.start.any(-1, keepdim=True)
        inside = tokens.real & (tokens.document == document)
        kept = torch.where(restarted, 0, self.count[:, None])  # tokens of the present document that came before this call
        count = torch.where(inside.any(-1, keepdim=True), tokens.index.masked_fill(~inside, -1).amax(-1, keepdim=True) + 1, kept)
        wanted = self.index_of_slots(count)  # index that each slot holds from now on
        new = wanted >= kept
        ordinal = tokens.real.long().cumsum(-1)  # 1 + number of real tokens before
        skipped = ordinal[:, -1:] - inside.sum(-1, keepdim=True)  # real tokens of earlier documents in this call
        source = torch.searchsorted(ordinal, (wanted - kept + skipped + 1).clamp_min(1)).clamp_max(T - 1)
        if self.read_keys is not None:
            absorb(self, key_states, value_states, tokens.index.masked_fill(~inside, -1), count, restarted)
        if self.capacity:
            S, ring = self.num_sink_tokens, self.slot_index.masked_fill(restarted, -1)
            old = self.keys[:, :, S:], self.values[:, :, S:], self.scores[..., S:], ring[:, None, S:]
            come = key_states, value_states, scores, tokens.index.masked_fill(~inside, -1)[:, None]
            self.sparse = self.sparse.forget(restarted).compete(old, come, S, count - self.sliding_window)
            self.scores = _pick(scores[..., None], source, new, self.scores[..., None])[..., 0]
        self.put(keys=_pick(key_states, source, new, self.keys), values=_pick(value_states, source, new, self.values), count=count[:, 0].clone())
        return self.keys, self.values

    def skip(self, tokens):
        """Count tokens that the layer has read in another process, as a pipeline's stage: `Cache.get_seq_length` asks layer 0 everywhere."""
        self.seen_tokens += tokens

    def _tensors(self, change):
        if self.state is not None:
            self.state = MLSTMState(*(change(x) for x in self.state))
            self.room = self.state if self.room is not None else None
        if self.is_initialized:
            self.keys, self.values, self.count = (change(x) for x in (self.keys, self.values, self.count))
        if self.kept is not None:
            self.kept.map(change)
        if self.is_initialized and self.capacity:
            self.scores, self.sparse = change(self.scores), SparseSlots(*(change(x) for x in self.sparse))
        if self.base is not None:
            self.base._tensors(change)
            self.calls = [call.map(change) for call in self.calls]

    def reset(self):
        """Empty the layer; the memory of a static one is used again."""
        if not self.is_compileable:
            self.keys = self.values = self.count = None
        self.scores = self.sparse = None
        self.state, self.is_initialized, self.seen_tokens = None, False, 0
        if self.kept is not None:
            self.kept.reset()
        self.forget()


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of a layer that keeps the teacher's sliding attention. With `record_past` it holds `depth` tokens more than the window
    needs; transformers' own holds every token since the last `crop`, and cuts keys that it no longer has without a word."""

    depth = ROLLBACK_TOKENS

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized and not self.record_past:
            self.trim(0)  # recording may have been switched off
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.trim(self.depth if self.record_past else 0)
        visible = self.sliding_window - 1 + key_states.shape[-2]  # as masks are sized; transformers before 5.18 returns the record too
        return keys[:, :, -visible:], values[:, :, -visible:]

    def trim(self, more):
        begin = max(self.keys.shape[-2] - (self.sliding_window - 1 + more), 0)
        self.keys, self.values = self.keys[:, :, begin:], self.values[:, :, begin:]

    @property
    def recorded(self):
        """Number of last tokens that can be taken back: all of them while the window has lost none."""
        held = self.keys.shape[-2] if self.is_initialized else 0
        return held if held == self.cumulative_length else held - (self.sliding_window - 1)

    def crop(self, tokens_to_remove):
        tokens = tokens_removed(tokens_to_remove)
        if tokens > self.recorded:
            raise CacheError(
                f"cannot remove {tokens} tokens: the window has kept {self.recorded} more than it needs. Call "
                "xlstm_hybrid.state.remember(cache, tokens) before they come, or compute the prefix again"
            )
        if tokens:
            self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
            self.cumulative_length -= tokens


def tokens_removed(tokens_to_remove):
    """The count behind transformers' argument of `crop`, which is negative."""
    if tokens_to_remove > 0:
        raise CacheError(f"crop({tokens_to_remove}): expected minus the number of tokens to remove")
    return -tokens_to_remove


def _pick(new, source, chosen, old):
    """[B, G, slots, K]: `new` [B, G, T, K] at `source` [B, slots] where chosen, else `old`."""
    at = source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[-1])
    return torch.where(chosen[:, None, :, None], new.gather(2, at), old)


def adopt_cache(cache, config):
    """Make a fresh stock cache ours: its `hybrid_sliding` layers become `HybridCacheLayer`, its sliding layers get their own window.

    `DynamicCache(config=...)` and `StaticCache(config=...)` know one window per model; ours is per layer. A cache in use is checked.

    Raises:
        CacheError: the cache has been filled by another model, or with other `mixer_branches`.
    """
    if not isinstance(cache, Cache):
        raise CacheError(f"cache: expected a transformers Cache, got {type(cache).__name__}; pass DynamicCache(config=model.config)")
    # Layers without fixed addresses: the masks beside a static one would be wrong
    moving = any(config.kept_groups or ()) or config.sparse_memory > 0 or config.mixer_combine == "joint"
    for j, kind in enumerate(config.layer_types):
        window, sinks = config.window_of(j), config.sinks_of(j)
        if kind == "hybrid_sliding" and config.mixer_branches == "memory":
            window, sinks = 1, 0  # nothing reads them
        if j == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[j]
        kept = bool(config.kept_of(j))
        wanted = window, sinks, config.memory_cell, kept, config.sparse_memory
        if isinstance(layer, HybridCacheLayer) and (held := layer.remembers) != wanted:
            raise CacheError(
                f"cache: layer {j} has window, sinks, memory, kept groups and sparse memory {held}, expected {wanted}: another model made "
                "it, or mixer_branches or the like have changed since; start from DynamicCache(config=model.config)"
            )
        if moving and isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer) and layer.get_seq_length() == 0:
            layer = cache.layers[j] = DynamicLayer()
        if kind == "hybrid_sliding" and not isinstance(layer, HybridCacheLayer):
            if layer.get_seq_length() > 0:
                raise CacheError(
                    f"cache: layer {j} is a filled {type(layer).__name__}, expected HybridCacheLayer; "
                    "another model made it: start from DynamicCache(config=model.config)"
                )
            more = {"cell": config.memory_cell, "kept": KeptKeys(config.kept_window_of(j)) if kept else None, "capacity": config.sparse_memory}
            cache.layers[j] = HybridCacheLayer(window, sinks, static=layer.is_compileable and not moving, **more)
        if kind == "sliding_attention" and layer.get_seq_length() == 0 and not isinstance(layer, SlidingLayer):
            static = isinstance(layer, StaticSlidingWindowLayer) and not moving
            cache.layers[j] = StaticSlidingWindowLayer(max_cache_len=window, sliding_window=window) if static else SlidingLayer(window)
        if cache.layers[j] is not layer and getattr(layer, "record_past", False):
            cache.layers[j].record_past, cache.layers[j].depth = True, getattr(layer, "depth", ROLLBACK_TOKENS)
    return cache
