"""Window attention for a CPU: blocks of queries, with a backward of their own. Dims as in `reference`; G key/value
heads, H = G R.

Without its padding a row is documents back to back, so the keys of a block of queries are one band and, before it, the
sinks of the block's first document; both are slices, wherever the padding was.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xlstm_kernels.backends.arguments import schema
from xlstm_kernels.backends.numerics import calculation_dtype, wants_gradients
from xlstm_kernels.backends.scratch import space_of
from xlstm_kernels.window.reference import unpadded_rows, visible

# queries per block: a block reads W + rows keys where W are needed, but narrow matrices multiply slowly
ROWS = {"forward": 128, "backward": 64}
SHORT = 256  # tokens up to which one call of causal attention is cheaper than blocks
REUSED = 2**22  # entries of keys up to which their copy is scratch memory that the next call uses again
# entries of the scores that are alive at once: more of them leave the cache between the product and the softmax
SCORES = 2**20


class Block(NamedTuple):
    """Queries [begin, end), keys [sink, sink_end) and [low, end).

    bias [queries, keys] is 0 where visible, -inf elsewhere, which happens in the columns `spans` only.
    """

    begin: int
    end: int
    sink: int
    sink_end: int
    low: int
    bias: Tensor
    spans: list


def blocks(row, N, rows, window, sinks, dtype, device):
    """Cut the queries of a row into blocks; the first query of a block has the oldest key in reach."""
    start = None if row.start is None else row.start.tolist()
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        first = start[begin] if start else 0
        low = max(first, begin - window + 1)
        sink_end = min(first + sinks, low)
        bias, spans = usual_bias(begin - low, end - low, sink_end - first, window, sinks, dtype, device)
        if start and start[end - 1] != first:  # documents begin inside
            begins, t = row.start[begin:end, None], torch.arange(begin, end, device=device)[:, None]
            s = torch.arange(low, end, device=device)
            far = (begins > first).expand(-1, sink_end - first)  # the sinks are those of another document
            unseen = torch.cat([far, ~visible(t, s, begins, window, sinks)], 1)
            bias, spans = bias_of(unseen, dtype), [slice(None)]
        yield Block(begin, end, first, sink_end, low, bias, spans)


def bias_of(unseen, dtype):
    return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, float("-inf"))


@lru_cache(maxsize=64)
def usual_bias(begin, end, lead, window, sinks, dtype, device):
    """Bias of a block within one document, and its spans.

    Queries [begin, end) and keys [0, end) are counted from the band's first key, after `lead` sinks. A band that begins
    less than S tokens into the document begins with its last S - lead sinks.
    """
    t, s = torch.arange(begin, end, device=device)[:, None], torch.arange(-lead, end, device=device)
    unseen = ~visible(t, s, -lead, window, sinks) & (s >= 0)
    bias = bias_of(unseen, dtype)
    return bias, hidden_spans(bias)


def hidden_spans(bias):
    """Slices of the columns with an -inf: between the two edges of the band lies a wide middle that everyone sees."""
    spans, start = [], 0
    for hidden, columns in groupby(bias.isinf().any(0).tolist()):
        stop = start + len(list(columns))
        spans += [slice(start, stop)] if hidden else []
        start = stop
    return spans


class Heads:
    """Queries of one row without its padding, x [T, H, K|V], as [G, R, N, K|V]; blocks are copied to scratch memory."""

    def __init__(self, x, groups, place=None):
        x = x if place is None else x[place]
        self.x = x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)

    def load(self, lanes, block, space, name, scale=1.0):
        """[g, R rows, K|V] in the dtype of the calculation"""
        x = self.x[lanes, :, block.begin : block.end]
        y = space(name, *x.shape)
        return (torch.mul(x, scale, out=y) if x.dtype == y.dtype else y.copy_(x).mul_(scale)).flatten(1, 2)

    def store(self, lanes, block, y):
        self.x[lanes, :, block.begin : block.end] = y.unflatten(1, (self.x.shape[1], -1))


class Keys:
    """Keys or values of one row without its padding, x [T, G, K|V], copied to [G, N, K|V].

    A block's sinks are laid over the tokens just before its band: no later block reads those, and sinks and band become
    one slice.
    """

    def __init__(self, x, place, space, name):
        self.x = x if place is None else x[place]
        N, G, K = self.x.shape
        band = space(name, G, N, K) if self.x.numel() <= REUSED else torch.empty(G, N, K, **space.options)
        self.band = band.copy_(self.x.transpose(0, 1))

    def load(self, lanes, block):
        """[g, S' + band, K|V]"""
        S = block.sink_end - block.sink
        if S:
            self.band[lanes, block.low - S : block.low] = self.x[block.sink : block.sink_end, lanes].transpose(0, 1)
        return self.band[lanes, block.low - S : block.end]


class KeyGradients:
    """Sums of the blocks' gradients of keys or values, [G, N, K|V]; the sinks' share waits in `shared`."""

    def __init__(self, keys, sinks):
        self.total, self.sink = torch.zeros_like(keys.band), 0
        self.shared = keys.band.new_zeros(len(keys.band), sinks, keys.band.shape[2])

    def add(self, lanes, block, x, y):
        """Add x^T y [g, S' + band, K|V]."""
        if block.sink != self.sink:
            self.settle(block.sink)
        S = block.sink_end - block.sink
        if S:
            laid, shared = self.total[lanes, block.low - S : block.low], self.shared[lanes, :S]
            finished = laid.clone()
            laid.copy_(shared)
        self.total[lanes, block.low - S : block.end].baddbmm_(x.transpose(1, 2), y)
        if S:
            shared.copy_(laid)
            laid.copy_(finished)

    def settle(self, sink=None):
        """Add the sinks' share to their tokens, and go on to the document that begins at `sink`."""
        here = self.total[:, self.sink : self.sink + self.shared.shape[1]]
        here += self.shared[:, : here.shape[1]]  # of what lies beyond a short document nothing was added
        self.shared.zero_()
        self.sink = sink
        return self.total.transpose(0, 1)


def weights(q, k, block, space):
    """Attention weights of a block [g, R rows, S' + band]; q is scaled."""
    scores = space.matmul("scores", q, k.transpose(1, 2))
    for span in block.spans:
        scores.unflatten(1, (-1, block.end - block.begin))[..., span].add_(block.bias[:, span])
    return torch.softmax(scores, -1, out=space("weights", *scores.shape))


def lanes_of(block, groups, repeats):
    """Slices of the key/value heads small enough for the cache."""
    step = max(1, SCORES // (repeats * block.bias.numel()))
    return [slice(g, min(g + step, groups)) for g in range(0, groups, step)]


def banded_forward(q, k, v, scale, window, sinks, index, document):
    """Blocks of queries against the band of keys that they reach: O(T (S + W)) time, no T x T tensor."""
    dtype, G, every = calculation_dtype(q, k, v), k.shape[2], slice(None)
    h = v.new_empty(*q.shape[:3], v.shape[3])
    space = space_of("window", dtype, q.device)
    for b, row in enumerate(unpadded_rows(index, document, q)):
        queries = Heads(q[b], G, row.place)
        keys, values = Keys(k[b], row.place, space, "k"), Keys(v[b], row.place, space, "v")
        out = h[b] if row.place is None else h.new_empty(len(row.place), *h.shape[2:])
        hs = Heads(out, G)
        for block in blocks(row, len(out), ROWS["forward"], window, sinks, dtype, q.device):
            x = queries.load(every, block, space, "q").unflatten(1, (-1, block.end - block.begin))  # [G, R, rows, K]
            heads = (x.shape[0], x.shape[1], -1, -1)
            sides = (y.load(every, block)[:, None].expand(heads) for y in (keys, values))
            x = scaled_dot_product_attention(x, *sides, attn_mask=block.bias, scale=scale)
            hs.store(every, block, x.flatten(1, 2))
        if row.place is not None:
            h[b] = 0
            h[b, row.place] = out
    return h


RULE = "float scale, SymInt window, SymInt sinks, Tensor? index, Tensor? document"
banded_op = torch.library.custom_op(
    "xlstm_kernels::window_banded", banded_forward, mutates_args=(), schema=schema("q k v", RULE)
)


@banded_op.register_fake
def _(q, k, v, scale, window, sinks, index, document):
    return v.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op(
    "xlstm_kernels::window_banded_backward", mutates_args=(), schema=schema("q k v h dh", RULE, "Tensor[]")
)
def banded_backward(q, k, v, h, dh, scale, window, sinks, index, document):
    """The gradients of q, k, v; the weights are calculated again."""
    dtype, G = calculation_dtype(q, k, v), k.shape[2]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    space = space_of("window", dtype, q.device)
    for b, row in enumerate(unpadded_rows(index, document, q)):
        sides = [Heads(x[b], G, row.place) for x in (q, h, dh)]
        keys = [Keys(x[b], row.place, space, name) for x, name in ((k, "k"), (v, "v"))]
        totals = [KeyGradients(x, sinks) for x in keys]
        dq = grads[0][b] if row.place is None else torch.empty_like(grads[0][b, : len(row.place)])
        dqs = Heads(dq, G)
        for block in blocks(row, len(dq), ROWS["backward"], window, sinks, dtype, q.device):
            for lanes in lanes_of(block, G, q.shape[2] // G):
                block_backward(*sides, *keys, dqs, *totals, lanes, block, scale, space)
        for x, y in zip(grads, (dq, *(x.settle() for x in totals)), strict=True):
            if row.place is not None:
                x[b] = 0
                x[b, row.place] = y.to(x.dtype)
            elif x is not grads[0]:  # dq is there already
                x[b] = y
    return grads


@banded_backward.register_fake
def _(q, k, v, h, dh, scale, window, sinks, index, document):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def save(ctx, inputs, output):
    q, k, v, *ctx.rule, index, document = inputs
    ctx.save_for_backward(q, k, v, output, index, document)


def differentiate(ctx, dh):
    *tensors, index, document = ctx.saved_tensors
    with torch.autocast(dh.device.type, enabled=False):
        return *banded_backward(*tensors, dh, *ctx.rule, index, document), None, None, None, None, None


banded_op.register_autograd(differentiate, setup_context=save)


def block_backward(queries, outputs, upstream, keys, values, dq, dk, dv, lanes, block, scale, space):
    """Set the block's dq, add its share to dk and dv."""
    q = queries.load(lanes, block, space, "q", scale)
    h, dh = outputs.load(lanes, block, space, "h"), upstream.load(lanes, block, space, "dh")
    k, v = keys.load(lanes, block), values.load(lanes, block)
    p = weights(q, k, block, space)
    dv.add(lanes, block, p, dh)
    dp = space.matmul("scores", dh, v.transpose(1, 2))
    ds = dp.sub_(space.dot(h, dh)).mul_(p)  # <h, dh> = sum of p dp
    dq.store(lanes, block, space.matmul("h", ds, k).mul_(scale))
    dk.add(lanes, block, ds, q)


def window_banded(q, k, v, *, window, sinks, index, document, scale):
    """The streaming form, with its own backward: O(T (S + W)) time, O(T) memory; up to W tokens, causal attention."""
    if index is None and document is None and q.shape[1] <= min(window, SHORT):
        dtype = calculation_dtype(q, k, v)
        queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        h = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return h.transpose(1, 2).to(v.dtype)
    watched = torch.compiler.is_compiling() or type(q) is not Tensor or wants_gradients(q, k, v)
    return (banded_op if watched else banded_forward)(q, k, v, scale, window, sinks, index, document)
