"""Key/value groups of a hybrid layer that keep the teacher's full attention: no window and no memory for them, and all
of their keys in the cache.

Dims: B batch, T tokens of a call, N columns in the cache, H query heads, G key/value heads, E of them kept, R query
heads per group, K query/key dim, V value dim.
"""

from itertools import groupby

import torch

DOCUMENT = 2**40  # places of two documents of a row are so far apart; a document has fewer tokens


class Split:
    """Which key/value groups of a layer keep full attention. All selections are slices: query heads of a group lie side
    by side.

    kept: numbers of the groups that do, of `groups`; `repeats` query heads share one.
    """

    def __init__(self, kept, groups, repeats):
        self.repeats = repeats
        # [(is kept, groups)]
        self.runs = [(chosen, len(list(run))) for chosen, run in groupby(range(groups), set(kept).__contains__)]

    def take(self, x, kept, dim, per_group=1):
        """The part of x that belongs to the groups that are kept, or that are not; a group has `per_group` entries
        along `dim`.
        """
        parts = x.split([n * per_group for _, n in self.runs], dim)
        return torch.cat([part for part, (chosen, _) in zip(parts, self.runs, strict=True) if chosen == kept], dim)

    def projected(self, projected, kept):
        """The same of what `HybridAttention.rotated` returns."""

        def part(tensors, dim):  # the first has the query heads
            return [self.take(x, kept, dim, 1 if n else self.repeats) for n, x in enumerate(tensors)]

        *rotated, raw, unrotated = projected
        return *part(rotated, 1), part(raw, 2), part(unrotated, 1)

    def join(self, mixed, kept, dim):
        """Put the two parts of `take(..., per_group=repeats)` together again."""
        parts = {}
        for chosen, x in ((False, mixed), (True, kept)):
            parts[chosen] = iter(x.split([n * self.repeats for mine, n in self.runs if mine == chosen], dim))
        return torch.cat([next(parts[chosen]) for chosen, _ in self.runs], dim)


def join_weights(split, mixed, kept):
    """Attention weights of all heads [B, H, T, columns]; the call's own tokens are the last columns of both, the rest
    is filled with 0.
    """
    if mixed is None or kept is None:
        return None
    columns = max(mixed.shape[-1], kept.shape[-1])
    mixed, kept = (torch.nn.functional.pad(x, (columns - x.shape[-1], 0)) for x in (mixed, kept))
    return split.join(mixed, kept, 1)


def log_scaled(query, index, base):
    """Queries [B, E R, T, K] times log_a(t + a), a = `base`, t the tokens before: attention without positions stays
    sharp as its context grows (HyPE, arXiv 2601.22156).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    base = torch.tensor(float(base), dtype=dtype, device=index.device)
    scale = torch.log(index.clamp_min(0).to(dtype) + base) / torch.log(base)
    return (query.to(dtype) * scale[:, None, :, None]).to(query.dtype)


class KeptKeys:
    """Keys and values of the groups that keep full attention; with `window` only those that the teacher's own window
    still reaches.

    keys, values: [B, E, N, K | V], every column of the calls, padding included.
    place: [B, N] DOCUMENT * (number of the document) + index within it, -1 at padding.
    """

    def __init__(self, window=None):
        self.window, self.keys, self.values, self.place, self.room = window, None, None, None, 0

    def append(self, key, value, tokens, spare=0, masked=False):
        """Take T tokens in; returns what they attend to, `(keys, values, mask [B, 1, T, N] or None)`. None: everything
        up to oneself.

        Args:
            key, value: [B, E, T, K | V].
            spare: tokens that may be taken back, whose past must stay; None: nothing follows, and nothing is dropped.
            masked: whether a mask is wanted in any case.
        """
        T, before = tokens.real.shape[1], 0
        if self.place is not None and self.place.shape[1]:
            before = self.place.amax(-1, keepdim=True).clamp_min(0) // DOCUMENT
        place = torch.where(tokens.real, (before + tokens.document) * DOCUMENT + tokens.index, -1)
        if self.place is None:
            masked = masked or not tokens.plain or (self.window is not None and self.window < T)
            self.keys, self.values, self.place = key, value, place
        else:
            masked = True
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
            self.place = torch.cat([self.place, place], -1)
        seen = self.keys, self.values, self.visible(place, tokens) if masked else None
        if spare is not None and (self.window is not None or (T > 1 and not tokens.plain)):
            self.trim(spare)
        return seen

    def visible(self, place, tokens):
        """[B, 1, T, N] bool: columns that each new token attends to; padding sees everything, nobody sees padding."""
        reach = tokens.index if self.window is None else tokens.index.clamp_max(self.window - 1)
        low, high, column = (place - reach)[..., None], place[..., None], self.place[:, None]
        return ((column >= low) & (column <= high) | ~tokens.real[..., None])[:, None]

    def trim(self, spare):
        """Drop leading columns that no later token attends to, neither now nor after `spare` tokens have been taken
        back. A GPU, which looking waits for, is asked when the columns have doubled since it was last asked.
        """
        place = self.place[:, : self.place.shape[1] - spare]
        if not place.shape[1] or (place.device.type != "cpu" and place.shape[1] < self.room):
            return
        last = place.amax(-1, keepdim=True)
        low = last // DOCUMENT * DOCUMENT
        if self.window is not None:
            # the last token stays in any case: it tells the document
            low = torch.maximum(low, last + min(2 - self.window, 0))
        alive = (place >= low.clamp_min(0)).any(0)
        begin = int(torch.where(alive.any(), alive.int().argmax(), place.shape[1]))
        if begin:
            self.keys, self.values = self.keys[:, :, begin:].clone(), self.values[:, :, begin:].clone()
            self.place = self.place[:, begin:].clone()
        self.room = 2 * (place.shape[1] - begin)

    def crop(self, tokens):
        """Take the last columns back."""
        if tokens:
            self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
            self.place = self.place[:, :-tokens]

    def map(self, change):
        if self.place is not None:
            self.keys, self.values, self.place = (change(x) for x in (self.keys, self.values, self.place))

    def reset(self):
        self.keys = self.values = self.place = None
        self.room = 0
