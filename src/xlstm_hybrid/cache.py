"""The cache of a hybrid layer: mLSTM state, ring buffer of the window, sinks. Its size does not depend on the context.

Dims: B batch, T new tokens, H query heads, G key/value heads, K query/key dim, V value dim, W window, S sinks.
"""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from xlstm_kernels import MLSTMState, fresh_state, hybrid_step

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.record import Piece, Step

ROLLBACK_TOKENS = 256  # last tokens that can be taken back where nobody says how many: more than assisted decoding drafts at once


@dataclass
class Tokens:
    """Where the T tokens of a forward call stand in their documents.

    real: [B, T] bool, False where padding.  start: [B, T] bool, first real token of a document that begins in this call.
    index: [B, T] position among the real tokens of its document, -1 at padding.
    document: [B, T]; 0 continues what the cache holds, each start in the call adds one.
    plain: True if every row is known to be one document without padding.
    """

    real: torch.Tensor
    start: torch.Tensor
    index: torch.Tensor
    document: torch.Tensor
    plain: bool = False

    @classmethod
    def locate(cls, shape, device, *, attention_mask=None, position_ids=None, cu_seq_lens=None, seq_idx=None, seen=None):
        """Find padding and document starts.

        A document starts where `position_ids` of consecutive real tokens do not increase, where `seq_idx` changes, or at an inner
        entry of `cu_seq_lens`; the first real token of a call starts one if its position is 0 although the row has seen tokens.

        Args:
            shape: (B, T).
            attention_mask: [B, T or more], 0 at padding; its last T columns belong to this call.
            position_ids: [B or 1, T] as the caller gave them, or None: then nothing restarts.
            cu_seq_lens: [documents + 1] cumulative lengths, for a batch of one row.
            seq_idx: [B, T] number of each token's document.
            seen: [B] real tokens that the row's present document has in the cache.
        """
        B, T = shape
        real = torch.ones(B, T, dtype=torch.bool, device=device) if attention_mask is None else attention_mask[:, -T:].to(device, torch.bool)
        seen = torch.zeros(B, dtype=torch.long, device=device) if seen is None else seen
        order = torch.arange(T, device=device)
        latest = torch.where(real, order, -1).cummax(-1).values  # last real token up to here
        previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], -1)
        first, previous = previous < 0, previous.clamp_min(0)
        start = torch.zeros_like(real)
        if position_ids is not None:
            position = position_ids.to(device).expand(B, T)
            start = torch.where(first, (position == 0) & (seen > 0)[:, None], position <= position.gather(1, previous))
        if seq_idx is not None:
            number = seq_idx.to(device).expand(B, T)
            start = start | (~first & (number != number.gather(1, previous)))
        if cu_seq_lens is not None:
            start = start | (torch.isin(order, cu_seq_lens[1:-1].to(device)) & ~first)
        start = start & real
        document, ordinal = start.long().cumsum(-1), real.long().cumsum(-1) - 1
        base = torch.where(start, ordinal, 0).cummax(-1).values
        index = ordinal - base + torch.where(document == 0, seen[:, None], 0)
        given = [x for x in (attention_mask, position_ids, cu_seq_lens, seq_idx) if x is not None]
        looked_at = T > 1 and not torch.compiler.is_compiling()  # looking waits for the GPU: once per call, and never for one token
        plain = not given or (looked_at and not bool((start | ~real).any()))
        return cls(real, start, torch.where(real, index, -1), document, plain)

    def slice(self, begin, end):
        """The same of the tokens `begin` to `end`, as a call of its own would have it."""
        documents = self.document[:, begin - 1 : begin] if begin else 0
        parts = (x[:, begin:end] for x in (self.real, self.start, self.index, self.document - documents))
        return Tokens(*parts, plain=self.plain)

    def map(self, change):
        return Tokens(*(change(x) for x in (self.real, self.start, self.index, self.document)), plain=self.plain)

    def visible(self, window, sinks):
        """[B, T, T] bool: which of the call's tokens (last dim) each of them attends to; padding sees everything, nobody sees padding."""
        q, k = self.index[:, :, None], self.index[:, None, :]
        near = (q >= k) & ((q - k < window) | (k < sinks))
        return (near & self.real[:, None] & (self.document[:, :, None] == self.document[:, None])) | ~self.real[:, :, None]


class HybridCacheLayer(CacheLayerMixin):
    """mLSTM state and [sinks | ring] of one hybrid layer.

    keys, values: [B, G, S + W, K | V]; slot j < S holds the document's j-th token, slot S + j the latest token whose index is j mod W.
    count: [B] real tokens of the present document; it says which token each slot holds (`slot_index`).

    A recurrent state is not invertible. With `record_past` the layer keeps a copy of itself from before the last `depth` tokens and the
    inputs of the calls since; taking tokens back repeats the calls that stay. What whole calls leave behind is bitwise what they left the
    first time; a call that is cut gives what the shorter call gives, to rounding. Memory: the layer once more, and `depth` tokens' inputs.
    """

    is_compileable = False
    is_croppable = True  # once `record_past` is set, as for transformers' own sliding layers
    is_sliding = True  # full-attention masks are sized from other layers
    supports_early_init = False

    def __init__(self, sliding_window, num_sink_tokens=0, **kwargs):
        super().__init__()
        self.sliding_window, self.num_sink_tokens = sliding_window, num_sink_tokens
        self.state, self.count, self.seen_tokens = None, None, 0
        self.depth, self.base, self.calls, self.pending = 0, None, [], None

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

    def note(self, call):
        """Record a call before it changes the layer; what is older than `depth` tokens goes into the base."""
        if self.base is None:
            self.base = HybridCacheLayer(self.sliding_window, self.num_sink_tokens)
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
        for name in ("state", "keys", "values", "count", "seen_tokens", "is_initialized", "dtype", "device"):
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
        if not keep_record:
            self.forget()

    def crop(self, tokens_to_remove):
        """Take the last `-tokens_to_remove` tokens back, as transformers does after each round of assisted decoding; the record starts anew."""
        self.rollback(tokens_removed(tokens_to_remove), keep_record=False)

    def lazy_initialization(self, key_states, value_states):
        B, G = key_states.shape[:2]
        slots = self.num_sink_tokens + self.sliding_window
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(B, G, slots, key_states.shape[-1])
        self.values = value_states.new_zeros(B, G, slots, value_states.shape[-1])
        self.count = torch.zeros(B, dtype=torch.long, device=self.device)
        self.is_initialized = True

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
            query, key, value: [B, H | G, 1, K | V]; features: (q, k) of the mLSTM, [B, 1, H, K]; gates: (i, f, o), [B, 1, H].
        Returns:
            h [B, 1, H, V].
        """
        if self.record_past:
            self.note(Step(query, key, value, features, gates, tokens, scale))
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if self.state is None:
            self.state = fresh_state(features[0], q, torch.promote_types(q.dtype, torch.float32))
        index = tokens.index[:, 0]
        h = hybrid_step(q, k, v, *features, *gates, self.state, self.keys, self.values, index, sinks=self.num_sink_tokens, scale=scale)
        self.count = torch.where(index < 0, self.count, index + 1)
        self.seen_tokens += 1
        return h

    def update(self, key_states, value_states, tokens, **kwargs):
        """Put T new tokens into the slots; padding writes nothing, a document start empties them.

        Args:
            key_states, value_states: [B, G, T, K | V].
        """
        if self.record_past:
            memory, chunk_size = self.pending
            self.note(Piece(memory, key_states.detach(), value_states.detach(), tokens, chunk_size))
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
        self.keys = _pick(key_states, source, new, self.keys)
        self.values = _pick(value_states, source, new, self.values)
        self.count = count[:, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.seen_tokens + query_length, 0

    def get_seq_length(self):
        return self.seen_tokens

    def get_max_length(self):
        return -1

    def _tensors(self, change):
        if self.state is not None:
            self.state = MLSTMState(*(change(x) for x in self.state))
        if self.is_initialized:
            self.keys, self.values, self.count = (change(x) for x in (self.keys, self.values, self.count))
        if self.base is not None:
            self.base._tensors(change)
            self.calls = [call.map(change) for call in self.calls]

    def offload(self):
        self._tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        self._tensors(lambda x: x.to(self.device, non_blocking=True))

    def reset(self):
        self.keys = self.values = self.state = self.count = None
        self.is_initialized, self.seen_tokens = False, 0
        self.forget()

    def reorder_cache(self, beam_idx):
        self._tensors(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._tensors(lambda x: x[indices])


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of a layer that keeps the teacher's sliding attention. With `record_past` it holds `depth` tokens more than the window
    needs; transformers' own holds every token since the last `crop`, and cuts keys that it no longer has without a word."""

    depth = ROLLBACK_TOKENS

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized and not self.record_past:
            self.trim(0)  # recording may have been switched off
        attended = super().update(key_states, value_states, *args, **kwargs)
        self.trim(self.depth if self.record_past else 0)
        return attended

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
        CacheError: the cache has been filled by another model.
    """
    if not isinstance(cache, Cache):
        raise CacheError(f"past_key_values: expected a transformers Cache, got {type(cache).__name__}; pass DynamicCache(config=model.config)")
    for j, kind in enumerate(config.layer_types):
        window, sinks = config.window_of(j), config.sinks_of(j)
        if j == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[j]
        if kind == "hybrid_sliding" and not isinstance(layer, HybridCacheLayer):
            if layer.get_seq_length() > 0:
                raise CacheError(
                    f"past_key_values: layer {j} is a filled {type(layer).__name__}, expected HybridCacheLayer; "
                    "another model made it: start from DynamicCache(config=model.config)"
                )
            cache.layers[j] = HybridCacheLayer(window, sinks)
        if kind == "sliding_attention" and layer.get_seq_length() == 0 and not isinstance(layer, SlidingLayer):
            static = isinstance(layer, StaticSlidingWindowLayer)
            cache.layers[j] = StaticSlidingWindowLayer(max_cache_len=window, sliding_window=window) if static else SlidingLayer(window)
        if cache.layers[j] is not layer and getattr(layer, "record_past", False):
            cache.layers[j].record_past, cache.layers[j].depth = True, getattr(layer, "depth", ROLLBACK_TOKENS)
    return cache
