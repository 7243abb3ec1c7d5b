"""Causal attention over the first `sinks` and the last `window` tokens of a document, under one softmax.

Dims: B batch, T tokens, H query heads, G key/value heads (H = G R), K query/key, V value, S sinks, W window, N real tokens of a row.

    A(t) = {s <= t in t's document: t - s < W or s is one of its first S tokens}
    h_t  = softmax(scale q_t K_A^T) V_A             Hauzenberger et al. 2026; sink tokens after Xiao et al. 2023

Distances count real tokens: padding is taken out first, so that a row becomes documents back to back. Then the keys of a block of queries
are one band and, before it, the sinks of the block's first document; both are slices, wherever the padding was.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xlstm_kernels.dispatch import heads_kernel_is_right, resolve
from xlstm_kernels.reference import calculation_dtype, without_autocast
from xlstm_kernels.scratch import space_of

ROWS = {"forward": 128, "backward": 64}  # queries per block: a block reads W + rows keys where W are needed, but narrow matrices multiply slowly
SHORT = 256  # tokens up to which one call of causal attention is cheaper than blocks
KEPT = 2**22  # entries of keys up to which their copy is scratch memory that is kept
SCORES = 2**20  # entries of the scores that are alive at once: more of them leave the cache between the product and the softmax


class Row(NamedTuple):
    """One row without its padding. place [N]: where the real tokens lie, None if all T are real; start [N]: where the document of
    each begins, counted in real tokens, None if the row is one document."""

    place: Tensor | None
    start: Tensor | None


class Block(NamedTuple):
    """Queries [begin, end), keys [sink, sink_end) and [low, end); bias [queries, keys] is 0 where visible, -inf elsewhere, which happens
    in the columns `spans` only."""

    begin: int
    end: int
    sink: int
    sink_end: int
    low: int
    bias: Tensor
    spans: list


def visible(t, s, start, window, sinks):
    """True where the query at t sees the key at s; start is that of t's document. Broadcasts."""
    return (s <= t) & (s >= start) & ((t - s < window) | (s - start < sinks))


def blocks(row, N, rows, window, sinks, dtype, device):
    """Cut the queries of a row into blocks. The oldest key in reach moves forward with the query: the first one's bounds the block."""
    start = None if row.start is None else row.start.tolist()
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        first = start[begin] if start else 0
        low = max(first, begin - window + 1)
        sink_end = min(first + sinks, low)
        bias, spans = usual_bias(begin - low, end - low, sink_end - first, window, sinks, dtype, device)
        if start and start[end - 1] != first:  # documents begin inside
            begins, t, s = row.start[begin:end, None], torch.arange(begin, end, device=device)[:, None], torch.arange(low, end, device=device)
            unseen = torch.cat([(begins > first).expand(-1, sink_end - first), ~visible(t, s, begins, window, sinks)], 1)
            bias, spans = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, float("-inf")), [slice(None)]
        yield Block(begin, end, first, sink_end, low, bias, spans)


@lru_cache(maxsize=64)
def usual_bias(begin, end, lead, window, sinks, dtype, device):
    """Bias of a block within one document, and its spans: queries [begin, end) and keys [0, end) counted from the band's first key, after
    `lead` sinks. A band that begins less than S tokens into the document begins with its last S - lead sinks."""
    t, s = torch.arange(begin, end, device=device)[:, None], torch.arange(-lead, end, device=device)
    unseen = ~visible(t, s, -lead, window, sinks) & (s >= 0)
    bias = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))
    return bias, hidden_spans(bias)


def hidden_spans(bias):
    """Slices of the columns that hold an -inf: between the two edges of the band lies a wide middle that everyone sees."""
    spans, start = [], 0
    for hidden, columns in groupby(bias.isinf().any(0).tolist()):
        stop = start + len(list(columns))
        spans += [slice(start, stop)] if hidden else []
        start = stop
    return spans


class Heads:
    """Queries of one row without its padding, x [T, H, K|V], seen as [G, R, N, K|V]; blocks of it are copied into scratch memory."""

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

    A block's sinks are laid over the tokens just before its band: no later block reads those, and sinks and band become one slice.
    """

    def __init__(self, x, place, space, name):
        self.x = x if place is None else x[place]
        N, G, K = self.x.shape
        self.band = (space(name, G, N, K) if self.x.numel() <= KEPT else torch.empty(G, N, K, **space.options)).copy_(self.x.transpose(0, 1))

    def load(self, lanes, block):
        """[g, S' + band, K|V]"""
        S = block.sink_end - block.sink
        if S:
            self.band[lanes, block.low - S : block.low] = self.x[block.sink : block.sink_end, lanes].transpose(0, 1)
        return self.band[lanes, block.low - S : block.end]


class KeyGradients:
    """Sums of what the blocks say about keys or values, [G, N, K|V]. The sinks' share waits in `shared` while it is not added to."""

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


def banded_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int, index: Tensor | None, document: Tensor | None) -> Tensor:
    """Blocks of queries against the band of keys that they reach: O(T (S + W)) time, no T x T tensor."""
    dtype, G, every = calculation_dtype(q, k, v), k.shape[2], slice(None)
    h = v.new_empty(*q.shape[:3], v.shape[3])
    space = space_of("window", dtype, q.device)
    for b, row in enumerate(rows_of(index, document, q)):
        queries, keys, values = Heads(q[b], G, row.place), Keys(k[b], row.place, space, "k"), Keys(v[b], row.place, space, "v")
        out = h[b] if row.place is None else h.new_empty(len(row.place), *h.shape[2:])
        hs = Heads(out, G)
        for block in blocks(row, len(out), ROWS["forward"], window, sinks, dtype, q.device):
            x = queries.load(every, block, space, "q").unflatten(1, (-1, block.end - block.begin))  # [G, R, rows, K]
            heads = (x.shape[0], x.shape[1], -1, -1)
            sides = (y.load(every, block)[:, None].expand(heads) for y in (keys, values))
            hs.store(every, block, scaled_dot_product_attention(x, *sides, attn_mask=block.bias, scale=scale).flatten(1, 2))
        if row.place is not None:
            h[b] = 0
            h[b, row.place] = out
    return h


banded_op = torch.library.custom_op("xlstm_kernels::window_banded", banded_forward, mutates_args=())


@banded_op.register_fake
def _(q, k, v, scale, window, sinks, index, document):
    return v.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("xlstm_kernels::window_banded_backward", mutates_args=())
def banded_backward(q: Tensor, k: Tensor, v: Tensor, h: Tensor, dh: Tensor, scale: float, window: int, sinks: int, index: Tensor | None,
                    document: Tensor | None) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v; the weights are calculated again."""
    dtype, G = calculation_dtype(q, k, v), k.shape[2]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    space = space_of("window", dtype, q.device)
    for b, row in enumerate(rows_of(index, document, q)):
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
    q, h, dh = (x.load(lanes, block, space, name, c) for x, name, c in ((queries, "q", scale), (outputs, "h", 1.0), (upstream, "dh", 1.0)))
    k, v = keys.load(lanes, block), values.load(lanes, block)
    p = weights(q, k, block, space)
    dv.add(lanes, block, p, dh)
    dp = space.matmul("scores", dh, v.transpose(1, 2))
    ds = dp.sub_(space.dot(h, dh)).mul_(p)  # <h, dh> = sum of p dp
    dq.store(lanes, block, space.matmul("h", ds, k).mul_(scale))
    dk.add(lanes, block, ds, q)


def window_banded(q, k, v, *, window, sinks, index, document, scale):
    """The streaming form, with its own backward: O(T (S + W)) time and O(T) memory. Up to W tokens it is causal attention."""
    if index is None and document is None and q.shape[1] <= min(window, SHORT):
        dtype = calculation_dtype(q, k, v)
        queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        h = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return h.transpose(1, 2).to(v.dtype)
    watched = torch.compiler.is_compiling() or type(q) is not Tensor or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    return (banded_op if watched else banded_forward)(q, k, v, scale, window, sinks, index, document)


def window_reference(q, k, v, *, window, sinks, index, document, scale):
    """The definition, with a T x T mask: O(T^2) time and memory."""
    dtype, R = calculation_dtype(q, k, v), q.shape[2] // k.shape[2]
    h = []
    for b, row in enumerate(rows_of(index, document, q)):
        qb, kb, vb = (x[b].to(dtype).transpose(0, 1) for x in (q, k, v))  # [H|G, T, K|V]
        if row.place is not None:
            qb, kb, vb = (x[:, row.place] for x in (qb, kb, vb))
        t = torch.arange(qb.shape[1], device=q.device)
        seen = visible(t[:, None], t, 0 if row.start is None else row.start[:, None], window, sinks)
        scores = scale * qb @ kb.repeat_interleave(R, 0).transpose(-1, -2)
        hb = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vb.repeat_interleave(R, 0)
        hb = hb.transpose(0, 1).to(v.dtype)  # [N, H, V]
        h.append(hb if row.place is None else hb.new_zeros(q.shape[1], *hb.shape[1:]).index_copy(0, row.place, hb))
    return torch.stack(h)


def window_triton(*args, **kwargs):
    from xlstm_kernels.gpu.window import window_triton as run  # needs triton

    return run(*args, **kwargs)


BACKENDS = {"reference": window_reference, "banded": window_banded, "triton": window_triton}


def choose_backend(q, k, v):
    """What "auto" runs: the kernel where there is one that can be believed."""
    return "triton" if heads_kernel_is_right("window_attention", q, v, calculation_dtype(q, k, v), v.dtype) else "banded"


def rows_of(index, document, q):
    """Take the padding out of every row of q [B, T, ...]. Raises ValueError where `index` does not number documents that lie back to back."""
    B, T = q.shape[:2]
    if index is None and document is None:
        return [Row(None, None)] * B
    position = torch.arange(T, device=q.device)
    rows = []
    for b in range(B):
        place = position if index is None else (index[b] >= 0).nonzero()[:, 0]
        ids = position.new_zeros(len(place)) if document is None else document[b, place]
        count = position[: len(place)]
        new = torch.ones_like(ids, dtype=torch.bool)
        new[1:] = ids[1:] != ids[:-1]
        start = torch.where(new, count, 0).cummax(0).values
        if index is not None:
            check_index(index[b], place, count - start, b)
        rows.append(Row(None if len(place) == T else place, start if len(start) and start[-1] > 0 else None))
    return rows


def check_index(index, place, expected, b):
    """Raise ValueError unless the real tokens of row b are numbered as `expected` [N] within their documents."""
    wrong = (index[place] != expected).nonzero()
    if len(wrong):
        r = wrong[0, 0]
        t = place[r].item()
        raise ValueError(f"index[{b}, {t}]={index[t].item()}: expected {expected[r].item()}, the number of real tokens before it in its document; "
                         "number the tokens of each document 0, 1, 2, ... and padding -1")


def whole(index, document, T):
    """True if every row is known to be one document without padding; where looking is expensive, nothing is known."""
    given = [x for x in (index, document) if x is not None]
    if not given or torch.compiler.is_compiling() or given[0].device.type != "cpu":
        return False
    numbered = index is None or torch.equal(index, torch.arange(T, device=index.device).expand_as(index))
    return numbered and (document is None or torch.equal(document, document[:, :1].expand_as(document)))


def check(q, k, v, window, sinks, index, document):
    """Raise ValueError for shapes and settings that `window_attention` cannot run on."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v: expected [B, T, H, K], [B, T, G, K], [B, T, G, V], got {[list(x.shape) for x in (q, k, v)]}")
    (B, T, H, K), G = q.shape, k.shape[2]
    if tuple(k.shape) != (B, T, G, K) or tuple(v.shape[:3]) != (B, T, G):
        raise ValueError(f"k, v: expected [{B}, {T}, G, {K}] and [{B}, {T}, G, V] as q is {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}")
    if not G or H % G:
        raise ValueError(f"q has {H} heads, k and v have {G}: expected a multiple")
    if window < 1 or sinks < 0:
        raise ValueError(f"window={window}, sinks={sinks}: expected a window of at least 1 token, which is the query's own, and no negative sinks")
    for name, x in (("index", index), ("document", document)):
        if x is not None and (tuple(x.shape) != (B, T) or x.is_floating_point()):
            raise ValueError(f"{name}: expected integers [{B}, {T}], got {x.dtype} {list(x.shape)}")


def window_attention(q, k, v, *, window, sinks, index=None, document=None, scale=None, backend="auto"):
    """Causal attention over the first `sinks` and the last `window` tokens of each document. Returns h [B, T, H, V] in v's dtype.

    Calculates in float32, or in float64 if any input is, also under autocast.

    Args:
        q: [B, T, H, K]; k: [B, T, G, K]; v: [B, T, G, V], H a multiple of G, key/value heads not repeated.
        window: tokens a query sees, itself included; sinks: first tokens of its document that it sees besides.
        index: [B, T] integers, the number of real tokens before each in its document; -1 for padding, which neither attends nor is
            attended to and whose h is 0. None: no padding.
        document: [B, T] integers, the document of each token (read at real tokens only); documents lie one after the other. None: one.
        scale: of the scores, 1 / sqrt(K) if None.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check(q, k, v, window, sinks, index, document)
    if whole(index, document, q.shape[1]):
        index = document = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve(backend, BACKENDS, q.device, lambda: choose_backend(q, k, v))
    with without_autocast(q.device):
        return BACKENDS[backend](q, k, v, window=window, sinks=sinks, index=index, document=document, scale=scale)
