"""What a hybrid layer remembers exactly beside its state: the full attention of some key/value groups, and of the others the few tokens that score
best among those that have left the window.

Dims: B batch, T tokens of a call, N columns held or tokens that compete, H query heads, G key/value heads, E of them kept, K query/key dim, V value
dim, W window, S sinks, L = `sparse_memory` chosen tokens per key/value head.
"""

from itertools import groupby
from typing import NamedTuple

import torch

NEVER = 2**62  # a time after all tokens
DOCUMENT = 2**40  # places of two documents of a row are so far apart; a document has fewer tokens


class Split:
    """Which key/value groups of a layer keep full attention. All selections are slices: query heads of a group lie side by side.

    kept: numbers of the groups that do, of `groups`; `repeats` query heads share one.
    """

    def __init__(self, kept, groups, repeats):
        self.repeats = repeats
        self.runs = [(chosen, len(list(run))) for chosen, run in groupby(range(groups), set(kept).__contains__)]  # [(is kept, groups)]

    def take(self, x, kept, dim, per_group=1):
        """The part of x that belongs to the groups that are kept, or that are not; a group has `per_group` entries along `dim`."""
        parts = x.split([n * per_group for _, n in self.runs], dim)
        return torch.cat([part for part, (chosen, _) in zip(parts, self.runs, strict=True) if chosen == kept], dim)

    def projected(self, projected, kept):
        """The same of what `HybridAttention.project` returns."""
        query, key, value, raw, unrotated = projected
        heads, groups = {"kept": kept, "per_group": self.repeats}, {"kept": kept}
        raw = self.take(raw[0], dim=2, **heads), *(self.take(x, dim=2, **groups) for x in raw[1:])
        unrotated = self.take(unrotated[0], dim=1, **heads), self.take(unrotated[1], dim=1, **groups)
        return self.take(query, dim=1, **heads), self.take(key, dim=1, **groups), self.take(value, dim=1, **groups), raw, unrotated

    def join(self, mixed, kept, dim):
        """Put the two parts of `take(..., per_group=repeats)` together again."""
        parts = {}
        for chosen, x in ((False, mixed), (True, kept)):
            parts[chosen] = iter(x.split([n * self.repeats for mine, n in self.runs if mine == chosen], dim))
        return torch.cat([next(parts[chosen]) for chosen, _ in self.runs], dim)


def join_weights(split, mixed, kept):
    """Attention weights of all heads [B, H, T, columns]; the call's own tokens are the last columns of both, the rest is filled with 0."""
    if mixed is None or kept is None:
        return None
    columns = max(mixed.shape[-1], kept.shape[-1])
    mixed, kept = (torch.nn.functional.pad(x, (columns - x.shape[-1], 0)) for x in (mixed, kept))
    return split.join(mixed, kept, 1)


def log_scaled(query, index, base):
    """Queries [B, E R, T, K] times log_a(t + a), a = `base`, t the tokens before: attention without positions stays sharp as its context grows
    (HyPE, arXiv 2601.22156)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = torch.log(index.clamp_min(0).to(dtype) + base) / torch.log(torch.tensor(float(base), dtype=dtype, device=index.device))
    return (query.to(dtype) * scale[:, None, :, None]).to(query.dtype)


class KeptKeys:
    """Keys and values of the groups that keep full attention; with `window` only those that the teacher's own window still reaches.

    keys, values: [B, E, N, K | V], every column of the calls, padding included.
    place: [B, N] DOCUMENT * (number of the document) + index within it, -1 at padding.
    """

    def __init__(self, window=None):
        self.window, self.keys, self.values, self.place = window, None, None, None

    def append(self, key, value, tokens, spare=0, masked=False):
        """Take T tokens in; returns what they attend to, `(keys, values, mask [B, 1, T, N] or None)`. None: everything up to oneself.

        Args:
            key, value: [B, E, T, K | V].
            spare: tokens that may be taken back, whose past must stay.
            masked: whether a mask is wanted in any case.
        """
        T, before = tokens.real.shape[1], 0
        if self.place is not None:
            before = (self.place.amax(-1, keepdim=True) if self.place.shape[1] else tokens.index.new_zeros(len(key), 1)).clamp_min(0) // DOCUMENT
        place = torch.where(tokens.real, (before + tokens.document) * DOCUMENT + tokens.index, -1)
        if not masked and self.place is None and tokens.plain and (self.window is None or self.window >= T):
            mask = None
        else:
            masked = True
        if self.place is None:
            self.keys, self.values, self.place = key, value, place
        else:
            parts = (self.keys, key), (self.values, value), (self.place, place)
            self.keys, self.values, self.place = (torch.cat(x, -2 if x[0].ndim == 4 else -1) for x in parts)
        if masked:
            mask = self.visible(place, tokens)
        seen = self.keys, self.values, mask
        if self.window is not None or (T > 1 and not tokens.plain):
            self.trim(spare)
        return seen

    def visible(self, place, tokens):
        """[B, 1, T, N] bool: columns that each new token attends to; padding sees everything, nobody sees padding."""
        reach = tokens.index if self.window is None else tokens.index.clamp_max(self.window - 1)
        low, high, column = (place - reach)[..., None], place[..., None], self.place[:, None]
        return ((column >= low) & (column <= high) | ~tokens.real[..., None])[:, None]

    def trim(self, spare):
        """Drop leading columns that no later token attends to, neither now nor after `spare` tokens have been taken back."""
        place = self.place[:, : self.place.shape[1] - spare]
        if not place.shape[1]:
            return
        last = place.amax(-1, keepdim=True)
        low = last // DOCUMENT * DOCUMENT
        if self.window is not None:
            low = torch.maximum(low, last + min(2 - self.window, 0))  # the last token stays in any case: it tells the document
        alive = (place >= low.clamp_min(0)).any(0)
        begin = int(torch.where(alive.any(), alive.int().argmax(), place.shape[1]))
        if begin:
            self.keys, self.values, self.place = (x[..., begin:, :].clone() for x in (self.keys, self.values, self.place[..., None]))
            self.place = self.place[..., 0]

    def crop(self, tokens):
        """Take the last columns back."""
        if tokens:
            self.keys, self.values, self.place = self.keys[:, :, :-tokens], self.values[:, :, :-tokens], self.place[:, :-tokens]

    def map(self, change):
        if self.place is not None:
            self.keys, self.values, self.place = (change(x) for x in (self.keys, self.values, self.place))

    def reset(self):
        self.keys = self.values = self.place = None


class SparseSlots(NamedTuple):
    """The chosen tokens of a row's present document, by index; empty slots come last, with index -1, score -inf, and 0 elsewhere.

    keys, values: [B, G, L, K | V].  score: [B, G, L], float32 at least.  index: [B, G, L].
    """

    keys: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor
    index: torch.Tensor

    @classmethod
    def empty(cls, key, value, capacity):
        """As many slots for every row and head of key, value [B, G, T, K | V]."""
        B, G, dtype = *key.shape[:2], torch.promote_types(key.dtype, torch.float32)
        score = torch.full((B, G, capacity), float("-inf"), dtype=dtype, device=key.device)
        index = torch.full((B, G, capacity), -1, device=key.device)
        return cls(key.new_zeros(B, G, capacity, key.shape[-1]), value.new_zeros(B, G, capacity, value.shape[-1]), score, index)

    def forget(self, rows):
        """The same without the tokens of `rows` [B, 1] bool, whose document is over."""
        return self._replace(index=self.index.masked_fill(rows[..., None], -1))

    def compete(self, old, new, sinks, gone):
        """The slots once more tokens have left the window: the best of those held, of `old` and of `new`.

        Args:
            old, new: (keys, values [B, G, n, K | V], score [B, G, n], index [B, 1, n], -1 for nothing).
            sinks: S, tokens that never compete.  gone: [B, 1], those below this index have left.
        """
        index = torch.cat([self.index, *(x[3].expand(-1, self.index.shape[1], -1) for x in (old, new))], -1)
        index = torch.where((index >= sinks) & (index < gone[..., None]), index, -1)
        keys, values = (torch.cat(x, 2) for x in zip(self[:2], old[:2], new[:2], strict=True))
        score = torch.cat([self.score, old[2], new[2]], -1).masked_fill(index < 0, float("-inf"))
        return choose(keys, values, score, index, self.index.shape[-1])


def choose(keys, values, score, index, capacity):
    """`SparseSlots` of the best of N tokens: highest score, of equal ones the earlier.

    Args:
        keys, values: [B, G, N, K | V]; score, index: [B, G, N], -inf and -1 for what does not compete.
    """
    earlier = index.argsort(dim=-1, stable=True)
    best = earlier.gather(-1, score.gather(-1, earlier).argsort(dim=-1, descending=True, stable=True)[..., :capacity])
    place = torch.where(index.gather(-1, best) < 0, NEVER, index.gather(-1, best))
    best = best.gather(-1, place.argsort(dim=-1, stable=True))
    index, score = index.gather(-1, best), score.gather(-1, best)
    keys, values = (torch.where(index[..., None] < 0, 0.0, x.gather(2, best[..., None].expand(-1, -1, -1, x.shape[-1]))) for x in (keys, values))
    return SparseSlots(keys, values, score, index)


def leaves(score, index, document, enters, capacity):
    """[B, G, N] time at which each token is pushed out: when the L-th better one of its document comes to compete. `NEVER` where that never is.

    A token competes from `enters` on and never comes back, so what a query sees is an interval of time, whatever the calls were.

    Args:
        score: [B, G, N], -inf for what does not compete; index, document, enters: [B, G, N] integers.
    """
    N = score.shape[-1]
    if capacity >= N:
        return torch.full_like(index, NEVER)
    order = index.argsort(dim=-1, stable=True)  # within a document, tokens come to compete in this order
    score, index, document, enters = (x.gather(-1, order) for x in (score, index, document, enters))
    mine, other = (x[..., :, None] for x in (score, index, document)), (x[..., None, :] for x in (score, index, document))
    (s, j, d), (s_, j_, d_) = mine, other
    better = ((s_ > s) | ((s_ == s) & (j_ < j))) & (d_ == d) & (s_ > float("-inf"))  # [B, G, N, N]
    last = (better.cumsum(-1, dtype=torch.int32) < capacity).sum(-1)  # position of the L-th better one, N if there are fewer
    left = torch.where(last < N, enters.gather(-1, last.clamp_max(N - 1)), NEVER)
    return left.gather(-1, order.argsort(-1))


def sparse_visible(score, index, document, tokens, window, sinks, capacity):
    """[B, G, T, N] bool: which of N tokens each query sees as chosen ones: those that have left its window, are no sinks, and score best.

    Args:
        score: [B, G, N]; index, document: [B or 1, G or 1, N], index -1 for nothing, document as in `Tokens`: 0 is the one of the cache.
    """
    index, document = (x.expand(score.shape) for x in (index, document))
    competes = index >= sinks if sinks else index >= 0
    score = torch.where(competes, score, float("-inf"))
    enters = torch.where(competes, index + window, NEVER)
    left = leaves(score, index, document, enters, capacity)
    t, mine = tokens.index[:, None, :, None], tokens.document[:, None, :, None] == document[:, :, None]
    return (enters[:, :, None] <= t) & (t < left[:, :, None]) & mine


def spread(index, layer_idx):
    """[B, T] integers below 2^24 that look random: a hash of the tokens' index and the layer's number, with the constants of splitmix64
    (Steele et al. 2014)."""
    x = (index + 1 + layer_idx * 2**33) * -7046029254386353131  # integers wrap
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) & 0xFFFFFF
