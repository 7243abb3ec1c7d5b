"""Window attention with sinks on a GPU: the kernels of `triton_kernels`, their tiles, and the operators around them.

Dims: B batch, T tokens, H query heads, G key/value heads (H = G R), K query/key, V value, S sinks, W window, N real
tokens of a row.

    forward    a tile of queries reads its sinks, then the band of W keys before it, under one softmax (Dao 2023). h and
               the log of the sum of weights are stored. Tiles of keys that every query of the tile sees as a whole need
               no mask: a loop of their own.
    prepare    <dh, h>, and what the queries further than W from their sinks add to dk and dv of these: a partial sum
               per chunk of queries and head
    keys       dk, dv of a tile of keys, over the W queries after it and the R heads of the group
    sinks      adds the partial sums to dk and dv of the sinks, in a fixed order
    queries    dq of a tile of queries; the keys are read as in the forward

Why like this. Weights are calculated twice in the backward, so that no two programs write to one place: no atomics, the
same bits every time. One sink is read by all T queries; the programs of `keys` would be as long as the sequence if
these were theirs, so the far ones are cut into chunks, in the pass that must read dh anyway. A chunk is no longer than
the window: the document that has far queries in it is that of its first token. A tile of 128 queries against 64 keys of
128 dims asks the L2 cache for half of what it can give, one of 64 queries for all. Up to W tokens nothing is far and no
sink is outside the band: what runs is plain causal attention.

Padding and documents become `Layout`, four small tensors, with no word to the host: so the values of `index` are not
checked here.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.backends.arguments import expect_for_kernel, schema
from xlstm_kernels.backends.launch import LARGEST_K, LARGEST_V, Tile, launch, look_up, power_of_2, strides_of
from xlstm_kernels.backends.numerics import LOG2E, widest
from xlstm_kernels.window.triton_kernels import forward_kernel, key_kernel, prepare_kernel, query_kernel, sink_kernel

LARGEST_SINGLE = 128  # V that float32 has tiles for
CHUNK = 256  # queries whose share in the sinks' gradients is summed by one program

FORWARD = {
    (80, 32, "half"): Tile({"BT": 64, "BS": 32}, 4, 3),
    (80, 64, "half"): Tile({"BT": 64, "BS": 64}, 4, 3),
    (80, 128, "half"): Tile({"BT": 128, "BS": 32}, 8, 2),
    (80, 256, "half"): Tile({"BT": 64, "BS": 32}, 8, 2),
    (80, 64, "single"): Tile({"BT": 32, "BS": 32}, 4, 2),
    (80, 128, "single"): Tile({"BT": 16, "BS": 32}, 8, 1),
    (90, 64, "half"): Tile({"BT": 128, "BS": 64}, 4, 3),
    (90, 128, "half"): Tile({"BT": 128, "BS": 64}, 8, 3),
    (90, 256, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (90, 64, "single"): Tile({"BT": 64, "BS": 32}, 4, 2),
    (90, 128, "single"): Tile({"BT": 16, "BS": 32}, 8, 1),
    (100, 64, "half"): Tile({"BT": 128, "BS": 64}, 8, 3),
    (100, 128, "half"): Tile({"BT": 128, "BS": 64}, 8, 3),
    (100, 256, "half"): Tile({"BT": 64, "BS": 32}, 8, 2),
    (100, 64, "single"): Tile({"BT": 32, "BS": 32}, 4, 1),
    (100, 128, "single"): Tile({"BT": 16, "BS": 32}, 8, 1),
}
KEYS = {
    (80, 64, "half"): Tile({"BT": 32, "BS": 64}, 4, 2),
    (80, 128, "half"): Tile({"BT": 64, "BS": 64}, 8, 1),
    (80, 256, "half"): Tile({"BT": 32, "BS": 64}, 8, 1),
    (80, 32, "single"): Tile({"BT": 16, "BS": 32}, 4, 1),
    (80, 64, "single"): Tile({"BT": 32, "BS": 32}, 8, 1),
    (80, 128, "single"): Tile({"BT": 16, "BS": 16}, 4, 1),
    (90, 64, "half"): Tile({"BT": 64, "BS": 128}, 8, 2),
    (90, 128, "half"): Tile({"BT": 32, "BS": 128}, 8, 3),
    (90, 256, "half"): Tile({"BT": 64, "BS": 32}, 8, 2),
    (90, 32, "single"): Tile({"BT": 16, "BS": 32}, 4, 1),
    (90, 64, "single"): Tile({"BT": 32, "BS": 32}, 8, 1),
    (90, 128, "single"): Tile({"BT": 16, "BS": 16}, 4, 1),
}
QUERIES = {
    (80, 64, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (80, 128, "half"): Tile({"BT": 128, "BS": 32}, 8, 2),
    (80, 256, "half"): Tile({"BT": 64, "BS": 32}, 4, 1),
    (80, 32, "single"): Tile({"BT": 32, "BS": 16}, 4, 1),
    (80, 64, "single"): Tile({"BT": 32, "BS": 32}, 8, 1),
    (80, 128, "single"): Tile({"BT": 16, "BS": 16}, 4, 1),
    (90, 64, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (90, 128, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (90, 256, "half"): Tile({"BT": 128, "BS": 32}, 8, 2),
    (90, 64, "single"): Tile({"BT": 64, "BS": 32}, 4, 1),
    (90, 128, "single"): Tile({"BT": 16, "BS": 32}, 4, 1),
    (100, 64, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (100, 128, "half"): Tile({"BT": 128, "BS": 64}, 8, 2),
    (100, 256, "half"): Tile({"BT": 64, "BS": 32}, 4, 1),
    (100, 32, "single"): Tile({"BT": 32, "BS": 16}, 4, 1),
    (100, 64, "single"): Tile({"BT": 32, "BS": 32}, 8, 1),
    (100, 128, "single"): Tile({"BT": 16, "BS": 16}, 4, 1),
}
PREPARE = {
    (80, 128, "half"): Tile({"BT": 64}, 4, 2),
    (80, 256, "half"): Tile({"BT": 32}, 4, 1),
    (80, 64, "single"): Tile({"BT": 32}, 4, 1),
    (80, 128, "single"): Tile({"BT": 16}, 4, 1),
}
SINKS = Tile({"BC": 32, "BD": 128})  # partial sums that are added at once, columns


class Layout(NamedTuple):
    """The rows without their padding, token t = 0 .. N - 1; what stands behind N means nothing.

    place: where token t lies; start, end: first token of its document, and one behind the last. int32 [B, T]
    count: N, int32 [B]. All None: no padding, one document
    """

    place: Tensor | None
    start: Tensor | None
    end: Tensor | None
    count: Tensor | None


def layout(index, document, B, T):
    """The Layout of a batch from what `window_attention` takes, without waiting for the GPU."""
    if index is None and document is None:
        return Layout(None, None, None, None)
    position = torch.arange(T, dtype=torch.int32, device=(document if index is None else index).device)
    place, count = position.expand(B, T), position.new_full((B,), T)
    if index is not None:
        real = index >= 0
        place, count = torch.argsort(~real, dim=1, stable=True), real.sum(1, dtype=torch.int32)
    start, end = torch.zeros_like(place), count[:, None].expand(B, T)
    if document is not None:
        ids = document.gather(1, place.long())
        new = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
        start = torch.where(new, position, 0).cummax(1).values
        later = torch.where(new, position, T)[:, 1:].flip(1).cummin(1).values.flip(1)  # where the next document begins
        end = torch.cat([later, torch.full_like(later[:, :1] if T > 1 else place, T)], 1).minimum(end)
    return Layout(*(x.to(torch.int32).contiguous() for x in (place, start, end)), count)


class Call(NamedTuple):
    """What the kernels are told about one call.

    tensors: q, k, v; strides: theirs in batch, token and head; numbers: T, H, R, W, rate
    constants: for the compiler; lanes: B H and B G; sinks: S, 0 if no query is further than W from anything
    """

    tensors: tuple
    strides: tuple
    numbers: tuple
    constants: dict
    lanes: tuple
    sinks: int

    def tile(self, table):
        q, _, v = self.tensors
        return look_up(table, q.device, max(q.shape[3], v.shape[3]), q.dtype)

    @property
    def sink_tile(self):
        return min(power_of_2(max(self.sinks, 1)), 32)


def call(q, k, v, scale, window, sinks, packed):
    q, k, v = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q, k, v))
    (B, T, H, K), G, V = q.shape, k.shape[2], v.shape[3]
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"  # of float32 products only
    constants = {"K": K, "V": V, "BK": power_of_2(K), "BV": power_of_2(V), "PACKED": packed, "PRECISION": precision}
    numbers = T, H, H // G, min(window, T), scale * LOG2E
    lanes, sinks = (B * H, B * G), min(sinks, T) if window < T else 0
    return Call((q, k, v), strides_of(q, k, v), numbers, constants, lanes, sinks)


def tiles(T, size):
    return -(-T // size)


def forward(q, k, v, place, start, end, count, scale, window, sinks):
    """h [B, T, H, V] and lse [B, H, T], tokens as `Layout` counts them: a weight is exp2(rate (q k - lse))."""
    (B, T, H, _), x = q.shape, call(q, k, v, scale, window, sinks, place is not None)
    fresh = torch.empty if place is None else torch.zeros  # what stands behind the real tokens is told to autograd, too
    h, tile = fresh(B, T, H, v.shape[3], dtype=v.dtype, device=v.device), x.tile(FORWARD)
    lse = fresh(B, H, T, dtype=torch.float32, device=q.device)
    grid, sizes = (tiles(T, tile.sizes["BT"]) * x.lanes[0],), (*x.strides, *x.numbers)
    constants = x.constants | {"S": x.sinks, "BN": x.sink_tile}
    launch(forward_kernel, grid, *x.tensors, h, lse, place, start, count, *sizes, **constants, tile=tile)
    return h, lse


def backward(q, k, v, h, lse, dh, place, start, end, count, scale, window, sinks):
    """The gradients of q, k, v."""
    T, x = q.shape[1], call(q, k, v, scale, window, sinks, place is not None)
    where, dh = (place, start, end, count), dh.contiguous()
    fresh = torch.empty if place is None else torch.zeros
    dq, dk, dv = (fresh(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))
    delta, far, chunk = prepare_backward(x, h, lse, dh, where)
    tile, sizes = x.tile(KEYS), (*x.strides, *x.numbers, scale)
    grid, tensors = (tiles(T, tile.sizes["BS"]) * x.lanes[1],), (*x.tensors, dh, lse, delta)
    launch(key_kernel, grid, *tensors, dk, dv, *where, *sizes, **x.constants, tile=tile)
    if x.sinks:
        leaders, columns = 1 if place is None else tiles(T, chunk), tiles(far.shape[4], SINKS.sizes["BD"])
        constants = {"S": x.sinks, "K": q.shape[3], "V": v.shape[3], "PACKED": place is not None}
        grid, numbers = (x.lanes[1] * leaders * x.sinks * columns,), (*x.numbers[:4], scale, chunk)
        launch(sink_kernel, grid, far, dk, dv, *where, *numbers, **constants, tile=SINKS)
    tile, constants = x.tile(QUERIES), x.constants | {"S": x.sinks, "BN": x.sink_tile}
    grid = (tiles(T, tile.sizes["BT"]) * x.lanes[0],)
    launch(query_kernel, grid, *tensors, dq, place, start, count, *sizes, **constants, tile=tile)
    return dq, dk, dv


def prepare_backward(x, h, lse, dh, where):
    """delta [B, H, T] = <dh, h>, far [B, H, chunks, S, K + V] or None, and the tokens of a chunk."""
    (B, H, T), S, tile = lse.shape, x.sinks, x.tile(PREPARE)
    tile = tile._replace(sizes={"BT": tile.sizes["BT"]})  # one that `using` has set has more sizes
    chunk = min(CHUNK, x.numbers[3]) if S else CHUNK
    far = lse.new_empty(B, H, tiles(T, chunk), S, x.constants["K"] + x.constants["V"]) if S else None
    delta = torch.empty_like(lse)
    grid, constants = (tiles(T, chunk) * B * H * max(1, tiles(S, x.sink_tile)),), {"S": S, "BN": x.sink_tile}
    tensors, sizes = (*x.tensors, h, dh, lse, delta, far, *where), (*x.strides, *x.numbers, chunk)
    launch(prepare_kernel, grid, *tensors, *sizes, **x.constants, **constants, tile=tile)
    return delta, far, chunk


RULE = "float scale, SymInt window, SymInt sinks"
window_flash = torch.library.custom_op(
    "xlstm_kernels::window_flash",
    forward,
    mutates_args=(),
    schema=schema("q k v place? start? end? count?", RULE, "(Tensor, Tensor)"),
)
window_flash_backward = torch.library.custom_op(
    "xlstm_kernels::window_flash_backward",
    backward,
    mutates_args=(),
    schema=schema("q k v h lse dh place? start? end? count?", RULE, "(Tensor, Tensor, Tensor)"),
)


@window_flash.register_fake
def _(q, k, v, place, start, end, count, scale, window, sinks):
    (B, T, H, _), V = q.shape, v.shape[3]
    return v.new_empty(B, T, H, V), q.new_empty(B, H, T, dtype=torch.float32)


@window_flash_backward.register_fake
def _(q, k, v, h, lse, dh, place, start, end, count, scale, window, sinks):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save(ctx, inputs, output):
    q, k, v, place, start, end, count, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, *output, place, start, end, count)


def differentiate(ctx, dh, dlse):
    q, k, v, h, lse, *where = ctx.saved_tensors
    return *window_flash_backward(q, k, v, h, lse, dh, *where, *ctx.rule), *[None] * 7


window_flash.register_autograd(differentiate, setup_context=save)


def window_triton(q, k, v, *, window, sinks, index, document, scale):
    """`window_attention` in Triton, with its own backward.

    Half-precision inputs are multiplied as they are and summed in float32. The values of `index` are not looked at, but
    for their sign: that would wait for the GPU.

    Raises:
        ValueError: a dtype or a head dim that the kernels do not calculate.
    """
    for name, x, largest in (("q", q, LARGEST_K), ("k", k, LARGEST_K), ("v", v, LARGEST_V)):
        expect_for_kernel(name, x, largest)
    dtype = widest(q, k, v)
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    if scale <= 0:
        queries, scale = queries * scale, 1.0  # the kernels take the largest product for the largest score
    where = layout(index, document, *q.shape[:2])
    # Columns of v are attended to independently: halves of wide ones fit the registers in float32.
    parts = values.split(LARGEST_SINGLE, 3) if dtype == torch.float32 else [values]
    h = [window_flash(queries, keys, part, *where, float(scale), window, sinks)[0] for part in parts]
    return (h[0] if len(h) == 1 else torch.cat(h, 3)).to(v.dtype)


def aot_cases():
    """Forward and backward for every width and precision of the tables, without and with documents, on meta tensors."""

    def case(K, V, dtype, packed):
        shapes = (16, K), (4, K), (4, V), (16, V)
        q, k, v, h = (torch.empty(2, 4096, *shape, dtype=dtype, device="meta") for shape in shapes)
        index = torch.zeros(2, 4096, dtype=torch.int64, device="meta") if packed else None
        where = layout(index, index, 2, 4096)
        lse = torch.empty(2, 16, 4096, device="meta")
        forward(q, k, v, *where, K**-0.5, 512, 4)
        backward(q, k, v, h, lse, h, *where, K**-0.5, 512, 4)

    return [
        (f"K{K} V{V} {str(dtype)[6:]}{' packed' * packed}", partial(case, K, V, dtype, packed))
        for dtype in (torch.bfloat16, torch.float32)
        for K, V in ((128, 128), (64, 64), (128, 256), (32, 32))
        if V <= LARGEST_SINGLE or dtype != torch.float32
        for packed in (False, True)
    ]
