"""A sparse exact memory beside the window (`sparse_memory`): the few tokens that score best among those that have left
it stay visible.

A few pairs per key/value head, chosen by what the state cannot give back (LoLA, arXiv 2505.23666; HOLA, arXiv
2607.02303), join the window's softmax. Dims: B batch, T tokens, N tokens that compete, H query heads, G key/value
heads, R = H / G, K query/key dim, V value dim, W window, S sinks, L chosen tokens per key/value head.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import repeat_kv
from xlstm_kernels import mix

from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.experimental.cells import CELLS
from xlstm_hybrid.model.rollback import RecordedCall

BLOCK = 64  # least number of queries at a time
NEVER = 2**62  # a time after all tokens


# --- the layer -----------------------------------------------------------------------------------------------------


def sparse_memory(attention, hidden_states, projected, tokens, mask, cache):
    """In the place of `HybridAttention.mix_heads`: o * mLSTM + (1 - o) * attention over window, sinks and chosen
    tokens.
    """
    config, (query, key, value, *_), layer = attention.config, projected, cache
    if cache is None:
        place = attention.sliding_window, attention.num_sink_tokens
        layer = SparseCacheLayer(*place, capacity=config.sparse_memory)
    cell, chunk_size = CELLS[config.memory_cell], config.mlstm_chunk_size
    phi_q, phi_k, i, f, o = attention.read(hidden_states, projected, tokens)
    written = phi_k, repeat_kv(value, attention.num_key_value_groups).transpose(1, 2), i, f
    memory, state = cell.run(phi_q, *written, state=layer.state, chunk_size=chunk_size)
    recurrence = cell.run, written, layer.state, chunk_size
    scores = token_scores(config.sparse_memory_score, tokens, key, attention.layer_idx, *recurrence)
    attend = None
    if config._attn_implementation == "eager" or (attention.training and config.attention_dropout):
        attend = partial(attention.attend, implementation=attention.masked_implementation)
    window, weights = sparse_attention(query, key, value, tokens, scores, layer, attend, attention.scaling)
    if cache is not None:
        if cache.depth:
            cache.note(SparseCall(cell.run, written, key, value, tokens, chunk_size, scores))
        cache.update(key, value, tokens, state, scores=scores)
    return mix(memory, window, o), weights


# --- attention -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_scores(kind, tokens, key, layer_idx, run, written, state, chunk_size):
    """[B, G, T], float32 at least: how much a token is worth keeping, fixed when it is read.

    "residual": |v - h|^2, h the mLSTM's answer to the token's own key just after it was written, mean over the query
    heads of the group.
    "weighted": the same times exp(i) / (exp(i) + sigmoid(f)), the share of the input gate in what is written and what
    is kept.
    "recency": the index.  "random": a hash of it. The last two are controls.

    Args:
        key: of the window, [B, G, T, K].
        run, written, state, chunk_size: the recurrence, its (k, v, i, f) [B, T, H, ...], padding masked, and its state
            before these tokens.
    """
    groups, dtype = key.shape[1], torch.promote_types(key.dtype, torch.float32)
    if kind in ("recency", "random"):
        index = tokens.index if kind == "recency" else index_hash(tokens.index, layer_idx)
        return index[:, None].expand(-1, groups, -1).to(dtype)
    k, v, i, f = written
    v = v.to(dtype)
    answer, _ = run(k, k, v, i, f, state=state, chunk_size=chunk_size)
    residual = (v - answer).square().sum(-1)  # [B, T, H]
    if kind == "weighted":
        residual = residual * torch.sigmoid(i.to(dtype) - logsigmoid(f.to(dtype)))
    return residual.unflatten(-1, (groups, -1)).mean(-1).transpose(1, 2)


def sparse_attention(query, key, value, tokens, scores, layer, attend=None, scale=None):
    """`(h [B, T, H, V], weights or None)` of window, sinks and chosen tokens; `layer` is left as it is.

    Every block of max(W, 64) queries reads slots that the blocks before it have filled, as pieces of a prompt do: time
    is linear in T, and a block sees S + W + L + block keys.

    Args:
        query, key, value: [B, H | G, T, K | V]; scores: [B, G, T].
        layer: a `SparseCacheLayer` of the tokens before.
        attend: (query, key, value, mask [B, H, T, keys]) -> (h, weights), for all queries at once; None: torch's, in
            float32 at least.
    """
    T, before = query.shape[2], SparseCacheLayer(layer.sliding_window, layer.num_sink_tokens, capacity=layer.capacity)
    before.take_over(layer)
    block = T if attend is not None else max(layer.sliding_window, BLOCK)
    parts, h = zip(*(x.split(block, 2) for x in (query, key, value, scores)), strict=True), []
    for begin, (q, k, v, s) in zip(range(0, T, block), parts, strict=True):
        here = tokens.slice(begin, min(begin + block, T))
        keys, values, mask = visible_pairs(before, k, v, s, here)
        if attend is not None:
            return attend(q, keys, values, mask.repeat_interleave(q.shape[1] // k.shape[1], 1))
        h.append(grouped_attention(q, keys, values, mask, scale))
        if begin + block < T:
            before.update(k, v, here, scores=s)
    return torch.cat(h, 1), None


def visible_pairs(layer, key, value, scores, tokens):
    """`(keys, values [B, G, N, K | V], mask [B, G, T, N])` of one block, N = [slots | L chosen | T new], of an
    empty layer T new.
    """
    W, S, L, T = layer.sliding_window, layer.num_sink_tokens, layer.capacity, key.shape[2]
    mask, index, document = tokens.visible(W, S), tokens.index, tokens.document
    if layer.is_initialized:
        slot = layer.slot_index
        mask = torch.cat([layer.visible(tokens), mask.new_zeros(*mask.shape[:2], L), mask], -1)
        ring = torch.where(torch.arange(slot.shape[1], device=slot.device) < S, -1, slot)[:, None]
        ring = ring.expand(-1, key.shape[1], -1)
        old = torch.cat([ring, layer.sparse.index], -1)
        index = torch.cat([old, index[:, None].expand(-1, key.shape[1], -1)], -1)
        document = torch.cat([torch.zeros_like(old[:, 0]), document], -1)[:, None]
        scores = torch.cat([layer.scores, layer.sparse.score, scores], -1)
        key = torch.cat([layer.keys, layer.sparse.keys, key], 2)
        value = torch.cat([layer.values, layer.sparse.values, value], 2)
    else:
        index, document = index[:, None], document[:, None]
    mask = mask[:, None].expand(-1, key.shape[1], -1, -1)
    N = key.shape[2] - (T if T <= W else 0)  # of a short block no token leaves the window before its end
    if N:
        chosen = sparse_visible(scores[..., :N], index[..., :N], document[..., :N], tokens, W, S, L)
        mask = torch.cat([mask[..., :N] | chosen, mask[..., N:]], -1)
    return key, value, mask


def grouped_attention(query, key, value, mask, scale):
    """Softmax attention [B, T, H, V] with one mask per key/value head, calculated in float32 at least."""
    B, G, T, N = mask.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(dtype).reshape(B * G, -1, T, query.shape[-1])
        k, v = (x.to(dtype).reshape(B * G, 1, N, -1).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        h = scaled_dot_product_attention(q, k, v, attn_mask=mask.reshape(B * G, 1, T, N), scale=scale)
    return h.reshape(B, -1, T, value.shape[-1]).transpose(1, 2)


# --- the chosen tokens ---------------------------------------------------------------------------------------------


class SparseSlots(NamedTuple):
    """The chosen tokens of a row's present document, by index; empty slots come last, with index -1, score -inf, and 0
    elsewhere.

    keys, values: [B, G, L, K | V].  score: [B, G, L], float32 at least.  index: [B, G, L].
    """

    keys: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    index: torch.Tensor

    @classmethod
    def empty(cls, key, value, capacity):
        """As many slots for every row and head of key, value [B, G, T, K | V]."""
        shape, dtype = (*key.shape[:2], capacity), torch.promote_types(key.dtype, torch.float32)
        score = torch.full(shape, float("-inf"), dtype=dtype, device=key.device)
        index = torch.full(shape, -1, device=key.device)
        return cls(key.new_zeros(*shape, key.shape[-1]), value.new_zeros(*shape, value.shape[-1]), score, index)

    def compete(self, old, new, sinks, gone):
        """The slots once more tokens have left the window: the best of what they hold, of `old` and of `new`.

        Args:
            old, new: (keys, values [B, G, n, K | V], score [B, G, n], index [B, 1, n], -1 for nothing).
            sinks: S, tokens that never compete.  gone: [B, 1], those below this index have left.
        """
        index = torch.cat([self.index, *(x[3].expand(-1, self.index.shape[1], -1) for x in (old, new))], -1)
        index = torch.where((index >= sinks) & (index < gone[..., None]), index, -1)
        keys, values = (torch.cat(x, 2) for x in zip(self[:2], old[:2], new[:2], strict=True))
        score = torch.cat([self.score, old[2], new[2]], -1).masked_fill(index < 0, float("-inf"))
        return best_slots(keys, values, score, index, self.index.shape[-1])


def best_slots(keys, values, score, index, capacity):
    """`SparseSlots` of the best of N tokens: highest score, of equal ones the earlier.

    Args:
        keys, values: [B, G, N, K | V]; score, index: [B, G, N], -inf and -1 for what does not compete.
    """
    earlier = index.argsort(dim=-1, stable=True)
    best = earlier.gather(-1, score.gather(-1, earlier).argsort(dim=-1, descending=True, stable=True)[..., :capacity])
    place = torch.where(index.gather(-1, best) < 0, NEVER, index.gather(-1, best))
    best = best.gather(-1, place.argsort(dim=-1, stable=True))
    index, score = index.gather(-1, best), score.gather(-1, best)
    keys, values = (
        torch.where(index[..., None] < 0, 0.0, x.gather(2, best[..., None].expand(-1, -1, -1, x.shape[-1])))
        for x in (keys, values)
    )
    return SparseSlots(keys, values, score, index)


def leaves(score, index, document, enters, capacity):
    """[B, G, N] time at which each token is pushed out: when the L-th better one of its document comes to compete.
    `NEVER` where that never is.

    A token competes from `enters` on and never comes back, so what a query sees is an interval of time, whatever the
    calls were.

    Args:
        score: [B, G, N], -inf for what does not compete; index, document, enters: [B, G, N] integers.
    """
    N = score.shape[-1]
    if capacity >= N:
        return torch.full_like(index, NEVER)
    order = index.argsort(dim=-1, stable=True)  # within a document, tokens come to compete in this order
    score, index, document, enters = (x.gather(-1, order) for x in (score, index, document, enters))
    s, j, d = (x[..., :, None] for x in (score, index, document))
    s_, j_, d_ = (x[..., None, :] for x in (score, index, document))
    better = ((s_ > s) | ((s_ == s) & (j_ < j))) & (d_ == d) & (s_ > float("-inf"))  # [B, G, N, N]
    # position of the L-th better one, N if there are fewer
    last = (better.cumsum(-1, dtype=torch.int32) < capacity).sum(-1)
    left = torch.where(last < N, enters.gather(-1, last.clamp_max(N - 1)), NEVER)
    return left.gather(-1, order.argsort(-1))


def sparse_visible(score, index, document, tokens, window, sinks, capacity):
    """[B, G, T, N] bool: which of N tokens each query sees as chosen ones: those that have left its window, are no
    sinks, and score best.

    Args:
        score: [B, G, N]; index, document: [B or 1, G or 1, N], index -1 for nothing, document as in `Tokens`: 0 is the
            one of the cache.
    """
    index, document = (x.expand(score.shape) for x in (index, document))
    competes = index >= sinks if sinks else index >= 0
    score = torch.where(competes, score, float("-inf"))
    enters = torch.where(competes, index + window, NEVER)
    left = leaves(score, index, document, enters, capacity)
    t, mine = tokens.index[:, None, :, None], tokens.document[:, None, :, None] == document[:, :, None]
    return (enters[:, :, None] <= t) & (t < left[:, :, None]) & mine


def index_hash(index, layer_idx):
    """[B, T] integers below 2^24 that look random: a hash of the tokens' index and the layer's number, with the
    constants of splitmix64 (Steele et al. 2014).
    """
    x = (index + 1 + layer_idx * 2**33) * -7046029254386353131  # integers wrap
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) & 0xFFFFFF


# --- the cache -----------------------------------------------------------------------------------------------------


@dataclass
class SparseCall(RecordedCall):
    """A call, with the `scores` [B, G, T] of its tokens."""

    scores: torch.Tensor | None = None

    def more(self):
        return {"scores": self.scores}

    def slice(self, begin, end):
        return replace(super().slice(begin, end), scores=self.scores[:, :, begin:end])

    def map(self, change):
        return replace(super().map(change), scores=change(self.scores))


class SparseCacheLayer(HybridCacheLayer):
    """Besides: sparse, `SparseSlots` of `capacity` chosen tokens, and scores [B, G, slots], what the tokens in the
    slots are worth.
    """

    fields = (*HybridCacheLayer.fields, "scores", "sparse")

    def __init__(self, *args, capacity, **kwargs):
        self.capacity, self.scores, self.sparse = capacity, None, None
        super().__init__(*args, **kwargs)

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.sparse = SparseSlots.empty(key_states, value_states, self.capacity)
        self.scores = self.sparse.score.new_zeros(*self.keys.shape[:3])

    def update(self, key_states, value_states, tokens, state=None, scores=None):
        """As in `HybridCacheLayer`; tokens that have left the window by now compete by their scores [B, G, T]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        S, place = self.num_sink_tokens, self.placing(tokens)
        ring = self.slot_index.masked_fill(place.restarted, -1)
        old = self.keys[:, :, S:], self.values[:, :, S:], self.scores[..., S:], ring[:, None, S:]
        come = key_states, value_states, scores, tokens.index.masked_fill(~place.inside, -1)[:, None]
        chosen = self.sparse._replace(index=self.sparse.index.masked_fill(place.restarted[..., None], -1))
        self.sparse = chosen.compete(old, come, S, place.count - self.sliding_window)
        self.scores = place.take(scores, self.scores)
        return super().update(key_states, value_states, tokens, state)

    def _tensors(self, change):
        super()._tensors(change)
        if self.is_initialized:
            self.scores, self.sparse = change(self.scores), SparseSlots(*(change(x) for x in self.sparse))

    def reset(self):
        super().reset()
        self.scores = self.sparse = None

    def named_tensors(self):
        tensors = super().named_tensors() | {"scores": self.scores}
        return tensors | {f"sparse_{name}": x for name, x in self.sparse._asdict().items()}

    def fill(self, tensors, seen):
        super().fill(tensors, seen)
        self.scores = tensors["scores"]
        self.sparse = SparseSlots(*(tensors[f"sparse_{name}"] for name in SparseSlots._fields))
