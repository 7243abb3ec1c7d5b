"""Rows of one running cache: requests of unlike length that share a model's steps, join and leave.

A hybrid layer counts tokens per row, so that rows of any length stand beside each other in it. Layers and groups that
keep full or sliding attention hold columns: a shorter row has empty ones on the left, and `mask` says so. Dims: B rows, G
key/value heads, K head dim.
"""

import torch
from torch.nn.functional import pad
from xlstm_kernels import MLSTMState

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.cache import HybridCacheLayer, SlidingLayer, with_slots
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.configuration import LINEAR
from xlstm_hybrid.model.experimental.variants import cache_layer_of
from xlstm_hybrid.model.linear_attention import LinearCacheLayer


def refuse_unshared(config):
    """Raise ConfigError for a student whose cache has parts that rows cannot share."""
    if cache_layer_of(config) is not HybridCacheLayer:
        raise ConfigError(
            f"serve: a student with mixer_combine={config.mixer_combine!r} and sparse_memory={config.sparse_memory}, expected 'gate' and 0: "
            "the rows of its cache cannot join; answer with generate()"
        )
    if uneven := sorted(config.uneven_ropes.values()):
        raise ConfigError(
            f"serve: a student with rope_type={uneven[0]!r}, expected one whose angles do not depend on the longest text of a step: a row would "
            "change its neighbours' answers; answer with generate()"
        )


def aligned(tensors, dim, value=0):
    """Tensors of several caches as one: rows one after the other, shorter ones filled with `value` at the beginning of
    `dim`, counted from the end.
    """
    longest, after = max(x.shape[dim] for x in tensors), [0, 0] * (-dim - 1)
    return torch.cat([pad(x, (*after, longest - x.shape[dim], 0), value=value) for x in tensors])


def join_hybrid(layers):
    """Make the first of several `HybridCacheLayer` hold the rows of all."""
    first = layers[0]
    slots = max(layer.keys.shape[2] for layer in layers)  # a ring that is not full yet has fewer
    first.keys = torch.cat([with_slots(layer.keys, slots) for layer in layers])
    first.values = torch.cat([with_slots(layer.values, slots) for layer in layers])
    first.count = torch.cat([layer.count for layer in layers])
    if first.state is not None:
        first.state = MLSTMState(*map(torch.cat, zip(*(layer.state for layer in layers), strict=True)))
    if first.kept is not None:
        kept = [layer.kept for layer in layers]
        first.kept.keys, first.kept.values = (aligned([getattr(x, n) for x in kept], -2) for n in ("keys", "values"))
        first.kept.place = aligned([x.place for x in kept], -1, value=-1)
    first.seen_tokens = max(layer.seen_tokens for layer in layers)


def join_linear(layers):
    """The same of layers of linear attention."""
    layers[0].join(layers)
    layers[0].seen_tokens = max(layer.seen_tokens for layer in layers)


def join_columns(layers):
    """The same of layers that keep the teacher's attention."""
    first = layers[0]
    first.keys, first.values = (aligned([getattr(x, n) for x in layers], -2) for n in ("keys", "values"))
    if isinstance(first, SlidingLayer):
        first.cumulative_length = max(layer.cumulative_length for layer in layers)


JOINS = {HybridCacheLayer: join_hybrid, LinearCacheLayer: join_linear}


def shorten(layer, longest):
    """Drop the columns of a layer that no row has, where the longest row has `longest`."""
    if isinstance(layer, HybridCacheLayer | LinearCacheLayer):
        layer.seen_tokens = longest
        if layer.kept is not None:
            kept = layer.kept
            kept.keys, kept.values = kept.keys[:, :, -longest:], kept.values[:, :, -longest:]
            kept.place = kept.place[:, -longest:]
        return
    layer.keys, layer.values = layer.keys[:, :, -longest:], layer.values[:, :, -longest:]
    if isinstance(layer, SlidingLayer):
        layer.cumulative_length = longest


class Rows:
    """The running batch of a model: `lengths` has the number of tokens that each row has read, in order."""

    def __init__(self, model):
        refuse_unshared(model.config)
        self.model, self.cache, self.lengths = model, None, []
        self.masked = not set(model.config.layer_types) <= {"hybrid_sliding", LINEAR}

    def join(self, caches):
        """Take in caches of one row each, which are used up. They become the last rows."""
        lengths = [cache.get_seq_length() for cache in caches]
        every = [self.cache, *caches] if self.lengths else caches
        self.cache = every[0]
        for layers in zip(*(cache.layers for cache in every), strict=True) if len(every) > 1 else ():
            JOINS.get(type(layers[0]), join_columns)(layers)
        self.lengths += lengths

    def keep(self, rows):
        """Let all rows go but those of these numbers."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self.cache = None
            return
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
        for layer in self.cache.layers:
            shorten(layer, max(self.lengths))

    def mask(self):
        """[B, columns + 1], 0 where a column is not the row's; None where no layer asks."""
        if not self.masked or len(set(self.lengths)) == 1:
            return None
        columns, lengths = max(self.lengths), torch.tensor(self.lengths, device=self.model.device)
        order = torch.arange(columns + 1, device=lengths.device)
        return (order >= columns - lengths[:, None]).long()

    def step(self, tokens):
        """Logits [B, vocabulary] after one more token of each row; `tokens` is a list of ids."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits = self.model(ids, attention_mask=self.mask(), use_cache=True, **named(self.cache)).logits[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return logits
