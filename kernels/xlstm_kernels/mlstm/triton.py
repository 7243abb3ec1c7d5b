"""The chunkwise mLSTM in Triton, forward and backward. Dims as in `triton_kernels`, where the scheme stands; the
contract is that of `reference`.

The work is bound by memory: a chunk of 128 tokens costs as much traffic in states as in one of q, k, v, h, and only its
64 x 64 blocks cost products.

    gates    i, f -> exponents inside each chunk; every row's maximum is known before the first product, so the rest has
             no online softmax
    scan     the frames of the states from one chunk to the next: a few numbers per chunk
    states   tiles of all states before each chunk, in the dtype of the inputs, one chunk after the other in float32
    output   h, for blocks of rows in parallel
    backward states again (they are not stored), the gradients of the states in the other direction, then one kernel for
             dq, dk, dv, whose phases share what they read through the cache, and a last small one for di, df

Where sequences and heads are too few to fill the GPU, `states` runs in segments: what each adds, a scan over those,
then each from its own start. Half precision multiplies half-precision tiles and sums in float32; what goes from step to
step is float32, gates are summed in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.backends.arguments import expect_for_kernel, schema
from xlstm_kernels.backends.launch import (
    LARGEST_K,
    LARGEST_V,
    Tile,
    launch,
    look_up,
    power_of_2,
    strides_of,
    unavailable,
)
from xlstm_kernels.backends.numerics import widest
from xlstm_kernels.mlstm.reference import MLSTMState
from xlstm_kernels.mlstm.triton_kernels import (
    delta_kernel,
    gate_grad_kernel,
    gate_kernel,
    grad_kernel,
    join_kernel,
    output_kernel,
    scan_kernel,
    state_kernel,
)

WIDTHS = (32, 64, 128, 256)  # the larger of K and V


def table(half, single):
    """{(chip, width, kind): Tile} from a function of chip and width for half precision and the one tile of float32."""
    chips = [(c, w) for c in (80, 86, 90, 100) for w in WIDTHS]
    return {(c, w, "half"): half(c, w) for c, w in chips} | {(c, w, "single"): single for c, w in chips}


# BT tokens of a chunk, the same in all stages; BR rows at a time; BK x BV tile of a state (BK only where a program does
# not need all of K). Registers decide: on sm_90 two programs of 4 warps fit on a multiprocessor. float32 splits its
# tiles in three, in registers too.
TILES = {
    "state": table(
        lambda c, w: Tile({"BT": 128, "BR": 64, "BK": 64, "BV": 128 if c == 90 else 64}, 4, 3),
        Tile({"BT": 64, "BR": 16, "BK": 32, "BV": 64}, 4, 3),
    ),
    "output": table(
        lambda c, w: Tile({"BT": 128, "BR": 64, "BK": 128, "BV": 128 if c >= 90 else 64}, 4, 2 if c >= 90 else 1),
        Tile({"BT": 64, "BR": 16, "BK": 128, "BV": 32}, 4, 1),
    ),
    "grad": table(
        lambda c, w: Tile(
            {"BT": 128, "BR": 64 if c >= 90 else 32, "BK": 128, "BV": 128 if c >= 90 or w > 128 else 64},
            4,
            2 if c >= 90 and w <= 128 else 1,
        ),
        Tile({"BT": 64, "BR": 16, "BK": 128, "BV": 32}, 4, 1),
    ),
}


class Chunks(NamedTuple):
    """How sequences are cut.

    per: chunks of each row if they are not packed, longest: of the longest sequence, total: of all
    cu [N + 1] first token, first [N + 1] first chunk of each sequence, owner [total] sequence of each chunk: int64,
    None if not packed.
    """

    BT: int
    sequences: int
    per: int
    longest: int
    total: int
    cu: Tensor | None
    first: Tensor | None
    owner: Tensor | None

    @property
    def places(self):
        return self.per, self.cu, self.first, self.owner


def chunk_tokens(q, v):
    """Tokens of a chunk: the table's BT, which all stages share."""
    return look_up(TILES["state"], q.device, max(q.shape[3], v.shape[3]), q.dtype).sizes["BT"]


def chunks_of(q, BT, longest, cu, first, owner):
    B, T = q.shape[:2]
    if cu is not None:
        return Chunks(BT, cu.shape[0] - 1, 0, longest, owner.shape[0], cu, first, owner)
    per = -(-T // BT)
    return Chunks(BT, B, per, per, B * per, None, None, None)


def packing(cu_seqlens, T, BT):
    """longest, cu, first and owner of `Chunks` for sequences packed into one row of T tokens, which the host reads."""
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != T or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens: expected 0, ..., {T} with at least one token in each sequence, "
            f"got {ends[:8]} of {len(ends)} entries"
        )
    counts = torch.tensor([-(-n // BT) for n in lengths])
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner = torch.arange(len(lengths)).repeat_interleave(counts)
    device = cu_seqlens.device
    return int(counts.max()), cu_seqlens.to(torch.int64), first.to(device), owner.to(device)


def tile_of(stage, q, v, BT):
    """The table's tile of a stage, cut down to what these tensors fill."""
    K, V = q.shape[3], v.shape[3]
    tile = look_up(TILES[stage], q.device, max(K, V), q.dtype)
    sizes = {"BT": BT, "BR": min(tile.sizes["BR"], BT), "BV": min(tile.sizes["BV"], power_of_2(V))}
    sizes["BK"] = min(tile.sizes["BK"], power_of_2(K)) if stage == "state" else power_of_2(K)
    return tile._replace(sizes=sizes)


def segments_for(programs, chunks, device):
    """Segments of the scan over the chunks that fill the GPU; more than one cost a second reading of the inputs."""
    room = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return 1 if programs >= room else max(1, min(-(-2 * room // programs), chunks // 8))


class Gates(NamedTuple):
    """a, low, own, start [NC, H, BT] and scales [NC, H, 4] of `triton_kernels`; low is None for half precision."""

    a: Tensor
    low: Tensor | None
    own: Tensor
    start: Tensor
    scales: Tensor


def gate_pass(i, f, n, m, K, chunks, exact):
    """(Gates, m after the last token [N, H], scales of the first and the last frame [N, H, 2])."""
    T, H = i.shape[1:]
    rows = i.new_empty(chunks.total, H, chunks.BT, dtype=torch.float32)
    a, low, own = rows, torch.empty_like(rows) if exact else None, torch.empty_like(rows)
    start = torch.empty_like(rows, dtype=torch.int8)
    total, weight = rows.new_empty(chunks.total, H, dtype=torch.float64), rows.new_empty(chunks.total, H)
    per, *packed = chunks.places
    tile = Tile({"BT": chunks.BT}, 8 if chunks.BT > 64 else 4, 1)
    written = a, low, own, start, total, weight
    launch(gate_kernel, (chunks.total * H,), i, f, *written, T, per, H, *packed, tile=tile)
    scales = rows.new_empty(chunks.total, H, 4)
    m_last, ends = rows.new_empty(chunks.sequences, H), rows.new_empty(chunks.sequences, H, 2)
    tile = Tile({"BT": chunks.BT, "BK": power_of_2(K), "BC": min(64, power_of_2(chunks.longest))}, 8, 1)
    tensors = own, start, total, weight, m, n, scales, m_last, ends
    launch(scan_kernel, (chunks.sequences * H,), *tensors, per, H, chunks.first, tile=tile, K=K)
    return Gates(a, low, own, start, scales), m_last, ends


def scan_states(x, y, gates, ends, C, n, chunks, weight=None, delta=None, wanted=True):
    """(states [NC, H, K, V], normalisers [NC, H, K], the last C and n) from x [B, T, H, K], y [B, T, H, V] and C, n or
    None to begin with.

    Forward without the `weight` and `delta` of rows, else the gradients backwards. C and n at the end are None unless
    they are `wanted`.
    """
    (_, T, H, K), V, lanes = x.shape, y.shape[3], chunks.sequences * x.shape[2]
    tile = tile_of("state", x, y, chunks.BT)
    programs = lanes * -(-K // tile.sizes["BK"]) * -(-V // tile.sizes["BV"])
    segments = segments_for(programs, chunks.longest, x.device)
    S = -(-chunks.longest // segments)
    segments = -(-chunks.longest // S)
    states, norms = x.new_empty(chunks.total, H, K, V), x.new_empty(chunks.total, H, K, dtype=torch.float32)
    last_C = norms.new_empty(chunks.sequences, H, K, V) if wanted else None
    last_n = norms.new_empty(chunks.sequences, H, K) if wanted else None
    reverse = weight is not None

    def start(C, n, *written, **mode):
        per, cu, first, _ = chunks.places
        read = x, y, gates.a, gates.low, gates.start, gates.scales, weight, delta, C, n, ends
        sizes = *strides_of(x, y), T, per, lanes, H, S, cu, first
        constants = {"K": K, "V": V, "REVERSE": reverse, **mode}
        launch(state_kernel, (segments * programs,), *read, *written, *sizes, tile=tile, **constants)

    if segments > 1:
        parts = [norms.new_empty(segments, lanes, *rest) for rest in ((K, V), (K,), ())]
        start(None, None, None, None, *parts, LOCAL=True, INNER=False)
        for part, given in zip(parts, (C, n), strict=False):
            M, join = part[0, 0].numel(), Tile({"BM": 1024}, 4, 1)
            grid, tensors = (lanes * -(-M // 1024),), (part, parts[2], given, ends)
            launch(join_kernel, grid, *tensors, lanes, segments, M, tile=join, END=int(reverse))
        C, n = parts[:2]
    start(C, n, states, norms, last_C, last_n, None, LOCAL=False, INNER=segments > 1)
    return states, norms, last_C, last_n


def forward(q, k, v, i, f, C, n, m, chunks):
    """h, C, n, m, and for the backward: the tensors of `Gates`, the scales at the ends, 1 / den [NC, H, BT]."""
    (_, T, H, K), V = q.shape, v.shape[3]
    gates, m_last, ends = gate_pass(i, f, n, m, K, chunks, exact=q.dtype == torch.float32)
    states, norms, C, n = scan_states(k, v, gates, ends, C, n, chunks)
    h, inverse = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(gates.a)
    tile = tile_of("output", q, v, chunks.BT)
    per, *packed = chunks.places
    programs = chunks.total * H * -(-V // tile.sizes["BV"]) * (chunks.BT // tile.sizes["BR"])
    tensors = q, k, v, states, norms, *gates, h, inverse
    launch(output_kernel, (programs,), *tensors, *strides_of(q, k, v), T, per, H, *packed, tile=tile, K=K, V=V)
    return h, C, n, m_last, *gates, ends, inverse


def backward(q, k, v, i, f, C, n, h, gates, ends, inverse, dh, dC, dn, chunks):
    """dq, dk, dv, di, df, and dC, dn of the state that was given, None without one."""
    (_, T, H, K), V, dh = q.shape, v.shape[3], dh.contiguous()
    per, *packed = chunks.places
    BR = min(chunks.BT, max(16, 2048 // power_of_2(V)))
    delta, weight = torch.empty_like(inverse), torch.empty_like(inverse)
    tile = Tile({"BT": chunks.BT, "BR": BR, "BV": power_of_2(V)}, 4, 1)
    tensors, grid = (h, dh, *gates[2:], inverse, delta, weight), (chunks.total * H * (chunks.BT // BR),)
    launch(delta_kernel, grid, *tensors, T, per, H, *packed, tile=tile, V=V)
    states, norms, _, _ = scan_states(k, v, gates, ends, C, n, chunks, wanted=False)
    dstates, dnorms, dC, dn = scan_states(q, dh, gates, ends, dC, dn, chunks, weight, delta, wanted=C is not None)
    dq, dk, dv, di, df = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, i, f))
    sums, through = inverse.new_empty(2, *inverse.shape), inverse.new_empty(chunks.total, H)
    tile = tile_of("grad", q, v, chunks.BT)
    if chunks.cu is not None:
        # the addresses of packed sequences take the registers that loads ahead would need
        tile = tile._replace(num_stages=1)
    programs = chunks.total * H * (chunks.BT // tile.sizes["BR"]) * (2 + -(-V // tile.sizes["BV"]))
    read = q, k, v, dh, states, norms, dstates, dnorms, *gates, inverse, delta, weight
    sizes = *strides_of(q, k, v), T, per, H, *packed, inverse.numel()
    launch(grad_kernel, (programs,), *read, dq, dk, dv, sums, through, *sizes, tile=tile, K=K, V=V)
    tensors, tile = (sums, through, f, di, df), Tile({"BT": chunks.BT}, 4, 1)
    launch(gate_grad_kernel, (chunks.total * H,), *tensors, T, per, H, inverse.numel(), *packed, tile=tile)
    return dq, dk, dv, di, df, dC, dn


CHUNKS_SCHEMA = schema("q k v i f C? n? m? cu? first? owner?", "SymInt longest", "Tensor[]")
GRADIENTS = "q k v i f C? n? cu? first? owner? h a low own start scales ends inverse dh dC? dn?"
GRADIENTS_SCHEMA = schema(GRADIENTS, "SymInt longest", "Tensor[]")


@torch.library.custom_op("xlstm_kernels::mlstm_chunks", mutates_args=(), schema=CHUNKS_SCHEMA)
def mlstm_chunks(q, k, v, i, f, C, n, m, cu, first, owner, longest):
    """What `forward` returns; an empty tensor stands for None."""
    if reason := unavailable(q.device):
        raise ValueError(f"backend='triton': {reason}")
    out = forward(q, k, v, i, f, C, n, m, chunks_of(q, chunk_tokens(q, v), longest, cu, first, owner))
    return [q.new_empty(0, dtype=torch.float32) if x is None else x for x in out]


@mlstm_chunks.register_fake
def _(q, k, v, i, f, C, n, m, cu, first, owner, longest):
    BT, (H, K), V = chunk_tokens(q, v), q.shape[2:], v.shape[3]
    chunks = chunks_of(q, BT, longest, cu, first, owner)
    N, NC = chunks.sequences, chunks.total
    like = lambda *shape, dtype=torch.float32: q.new_empty(shape, dtype=dtype)  # noqa: E731
    rows, low = (NC, H, BT), (NC, H, BT) if q.dtype == torch.float32 else (0,)
    state = like(N, H, K, V), like(N, H, K), like(N, H)
    gates = like(*rows), like(*low), like(*rows), like(*rows, dtype=torch.int8), like(NC, H, 4)
    return [v.new_empty(v.shape), *state, *gates, like(N, H, 2), like(*rows)]


@torch.library.custom_op("xlstm_kernels::mlstm_chunks_backward", mutates_args=(), schema=GRADIENTS_SCHEMA)
def mlstm_chunks_backward(
    q, k, v, i, f, C, n, cu, first, owner, h, a, low, own, start, scales, ends, inverse, dh, dC, dn, longest
):
    """What `backward` returns; an empty tensor stands for None."""
    gates = Gates(a, low if low.numel() else None, own, start, scales)
    chunks = chunks_of(q, a.shape[2], longest, cu, first, owner)
    out = backward(q, k, v, i, f, C, n, h, gates, ends, inverse, dh, dC, dn, chunks)
    return [q.new_empty(0, dtype=torch.float32) if x is None else x for x in out]


@mlstm_chunks_backward.register_fake
def _(q, k, v, i, f, C, n, cu, first, owner, h, a, low, own, start, scales, ends, inverse, dh, dC, dn, longest):
    return [q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (q, k, v, i, f, C, n)]


def save(ctx, inputs, output):
    q, k, v, i, f, C, n, _, cu, first, owner, ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, C, n, cu, first, owner, output[0], *output[4:])


def differentiate(ctx, grads):
    dh, dC, dn = grads[:3]  # the others are not handed out
    h, C = ctx.saved_tensors[10], ctx.saved_tensors[5]
    dh = torch.zeros_like(h) if dh is None else dh
    dC, dn = (x if x is None else x.contiguous() for x in (dC, dn))
    with torch.autocast(dh.device.type, enabled=False):
        *wanted, dC, dn = mlstm_chunks_backward(*ctx.saved_tensors, dh, dC, dn, ctx.longest)
    state = (None, None) if C is None else (dC, dn)
    return *wanted, *state, None, None, None, None, None


mlstm_chunks.register_autograd(differentiate, setup_context=save)


def mlstm_triton(q, k, v, i, f, state=None, chunk_size=64, cu_seqlens=None):
    """The chunkwise form for a GPU, with its own backward: O(T) time and memory. Arguments and results as in
    `reference`, state in float32.

    q, k, v are calculated with in the widest of their dtypes. In float16 gradients overflow where a normaliser is below
    1e-5 or so.

    Args:
        chunk_size: a wish; the chunk is the tile table's, which changes no result.
        cu_seqlens: [N + 1] int32 or int64, the first token of each of N sequences packed back to back into one row
            (B = 1), and T at the end. Each has its own state: C [N, H, K, V], n [N, H, K], m [N, H]. None: one sequence
            per row.
    Raises:
        ValueError: float64, a head dim that no tile holds, cu_seqlens that do not cover the row, or no GPU. Shapes are
            checked in `op`.
    """
    for name, x, largest in (("q", q, LARGEST_K), ("k", k, LARGEST_K), ("v", v, LARGEST_V)):
        expect_for_kernel(name, x, largest)
    for name, x in zip("ifCnm", (i, f, *(state or ())), strict=False):
        expect_for_kernel(name, x)
    out_dtype, dtype = v.dtype, widest(q, k, v)
    # as the kernels read them: the last dim without gaps, the rows of a chunk within 32-bit offsets of each other
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 and x.stride(1) < 2**23 else x.contiguous() for x in (q, k, v))
    C, n, m = (None, None, None) if state is None else (x.to(torch.float32).contiguous() for x in state)
    i, f, m = i.contiguous(), f.contiguous(), None if m is None else m.detach()
    longest, *packed = 0, None, None, None
    if cu_seqlens is not None:
        longest, *packed = packing(cu_seqlens, q.shape[1], chunk_tokens(q, v))
    h, C, n, m = mlstm_chunks(q, k, v, i, f, C, n, m, *packed, longest)[:4]
    return h.to(out_dtype), MLSTMState(C, n, m.detach())


def aot_cases():
    """[(name, function)] for `aot.py`: every table entry, and 64 dims with twice the features, forward and backward;
    several segments and packed rows for head dim 128 only."""

    def case(K, V, dtype, packed=False):
        def run(B=1, T=8192 if (K, V) == (128, 128) else 512, H=4):
            meta = {"device": "meta"}
            q, k, v = (torch.empty(B, T, H, D, dtype=dtype, **meta) for D in (K, K, V))
            i, f = (torch.empty(B, T, H, dtype=dtype, **meta) for _ in range(2))
            N = 3 if packed else 1
            C, n, m = (torch.empty(N, H, *rest, **meta) for rest in ((K, V), (K,), ()))
            BT = chunk_tokens(q, v)
            sizes = (N + 1, N + 1, T // BT + 2)
            tables = [torch.empty(size, dtype=torch.int64, **meta) if packed else None for size in sizes]
            chunks = chunks_of(q, BT, T // BT, *tables)
            h, *last, a, low, own, start, scales, ends, inverse = forward(q, k, v, i, f, C, n, m, chunks)
            backward(q, k, v, i, f, C, n, h, Gates(a, low, own, start, scales), ends, inverse, h, *last[:2], chunks)
            if T > 512:
                run(B, 512, H)  # too short for segments

        return run

    cases = [
        (f"K{K} V{V} {str(dtype)[6:]}", case(K, V, dtype))
        for dtype in (torch.bfloat16, torch.float32)
        for K, V in ((128, 128), (32, 32), (64, 64), (128, 64), (128, 256))
    ]
    return [
        *cases,
        ("K128 V128 float16", case(128, 128, torch.float16)),
        ("K128 V128 bfloat16 packed", case(128, 128, torch.bfloat16, True)),
    ]
