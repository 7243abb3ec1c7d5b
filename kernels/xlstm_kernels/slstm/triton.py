"""Triton kernels of the sLSTM, as in `reference`: one program runs all steps of some rows of one head.

Dims: B batch, T tokens, H heads, V units per head. Tiles: BB rows of the batch, BV >= V units, BK units that are
multiplied at a time.

h R is multiplied in R's dtype with float32 sums. In half precision h is split into two such numbers, so that their
product loses nothing that float32 would keep. A step stores its h (backward: da), and the product of the next reads it
back in parts behind a barrier: a program keeps its own rows, so that no other has to wait, and no tile of R has to fit
into registers whole.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from xlstm_kernels.backends.arguments import KERNEL_DTYPES
from xlstm_kernels.backends.launch import Tile, launch, look_up
from xlstm_kernels.backends.triton_math import finite, log_sigmoid
from xlstm_kernels.slstm.cpu import slstm_loop

# (V, kind) -> BK and warps, of every chip but for the exceptions: what the compilers for them fit into registers
PARTS = {
    (32, "half"): (16, 4),
    (64, "half"): (16, 8),
    (128, "half"): (32, 8),
    (32, "single"): (16, 4),
    (64, "single"): (16, 8),
    (128, "single"): (16, 8),
}
EXCEPTIONS = {(80, 32, "single"): (32, 4), (80, 64, "single"): (32, 8), (100, 32, "half"): (16, 2)}


def tile_of(chip, units, kind):
    parts, warps = EXCEPTIONS.get((chip, units, kind), PARTS[units, kind])
    return Tile({"BB": 16, "BV": units, "BK": parts}, warps, 1)


# (chip, V, kind) -> rows, units, parts and warps
TILES = {(chip, *key): tile_of(chip, *key) for chip in (80, 86, 90, 100) for key in PARTS}


@triton.jit
def tanh(x):
    """Also where e^x overflows, and to the last digits near 0: 1 - 2 / (e^2x + 1) cancels there, hence the series."""
    y = tl.exp(-2 * tl.abs(x))
    u = x * x
    series = x * (1 - u * (1 / 3 - u * (2 / 15 - u * (17 / 315 - u * (62 / 2835)))))
    return tl.where(u < 0.01, series, tl.where(x > 0, 1.0, -1.0) * (1 - y) / (1 + y))


@triton.jit
def sigmoid(x):
    y = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, y) / (1 + y)


@triton.jit
def product(x, w, y, HALF: tl.constexpr):
    """y [BB, BV] plus x [BB, BK] in float32 times w [BK, BV] in its own dtype, summed in float32."""
    if HALF:
        high = x.to(w.dtype)
        low = (x - high.to(tl.float32)).to(w.dtype)
        y = tl.dot(low, w, y, out_dtype=tl.float32)
        y = tl.dot(high, w, y, out_dtype=tl.float32)
    else:
        y = tl.dot(x, w, y, input_precision="ieee", out_dtype=tl.float32)
    return y


@triton.jit
def forward_kernel(
    p_a,
    p_r,
    p_h,
    p_c,
    p_n,
    p_m,
    p_real,
    p_start,
    T,
    B,
    H,
    V,
    EXP: tl.constexpr,
    HALF: tl.constexpr,
    BB: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):  # too many for a line each
    """a [T, H, B, 4, V]: the input's share comes, pre-activations go; h, c, n, m [T + 1, H, B, V], the first given."""
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_b, o_v = i_b * BB + tl.arange(0, BB), tl.arange(0, BV)
    inside = (o_b[:, None] < B) & (o_v[None, :] < V)  # [BB, BV]
    row = i_h * B + o_b  # [BB]
    step = (i_h * 0 + H) * B  # int64, rows from one token to the next
    at = row[:, None] * V + o_v[None, :]
    h = tl.load(p_h + at, mask=inside, other=0.0)
    c = tl.load(p_c + at, mask=inside, other=0.0)
    n = tl.load(p_n + at, mask=inside, other=0.0)
    m = tl.load(p_m + at, mask=inside, other=0.0)
    for t in range(0, T):
        if p_start is not None:
            begins = tl.load(p_start + t * B + o_b, mask=o_b < B, other=0)[:, None] != 0
            h, c, n = tl.where(begins, 0.0, h), tl.where(begins, 0.0, c), tl.where(begins, 0.0, n)
            m = tl.where(begins, float("-inf"), m)
        a_at = (t * step + row[:, None]) * (4 * V) + o_v[None, :]
        z = tl.load(p_a + a_at, mask=inside, other=0.0)
        i = tl.load(p_a + a_at + V, mask=inside, other=0.0)
        f = tl.load(p_a + a_at + 2 * V, mask=inside, other=0.0)
        o = tl.load(p_a + a_at + 3 * V, mask=inside, other=0.0)
        for k in range(0, V, BK):
            o_k = k + tl.arange(0, BK)
            there = (o_b[:, None] < B) & (o_k[None, :] < V)
            part = tl.load(p_h + (t * step + row[:, None]) * V + o_k[None, :], mask=there, other=0.0)  # [BB, BK]
            if p_start is not None:
                part = tl.where(begins, 0.0, part)
            w_at = p_r + i_h * V * V * 4 + o_k[:, None] * (4 * V) + o_v[None, :]  # r [H, V, 4, V]
            known = (o_k[:, None] < V) & (o_v[None, :] < V)  # [BK, BV]
            z = product(part, tl.load(w_at, mask=known, other=0.0), z, HALF)
            i = product(part, tl.load(w_at + V, mask=known, other=0.0), i, HALF)
            f = product(part, tl.load(w_at + 2 * V, mask=known, other=0.0), f, HALF)
            o = product(part, tl.load(w_at + 3 * V, mask=known, other=0.0), o, HALF)
        tl.store(p_a + a_at, z, mask=inside)
        tl.store(p_a + a_at + V, i, mask=inside)
        tl.store(p_a + a_at + 2 * V, f, mask=inside)
        tl.store(p_a + a_at + 3 * V, o, mask=inside)
        logf = f if EXP else log_sigmoid(f)
        new_m = tl.maximum(logf + m, i)
        keep = tl.exp(logf + (m - finite(new_m)))
        write = tl.exp(i - finite(new_m))
        new_c, new_n = keep * c + write * tanh(z), keep * n + write
        new_h = sigmoid(o) * new_c / tl.where(new_n == 0, 1.0, new_n)
        if p_real is not None:
            real = tl.load(p_real + t * B + o_b, mask=o_b < B, other=0)[:, None] != 0
            new_h, new_c = tl.where(real, new_h, h), tl.where(real, new_c, c)
            new_n, new_m = tl.where(real, new_n, n), tl.where(real, new_m, m)
        h, c, n, m = new_h, new_c, new_n, new_m
        out = ((t + 1) * step + row[:, None]) * V + o_v[None, :]
        tl.store(p_h + out, h, mask=inside)
        tl.store(p_c + out, c, mask=inside)
        tl.store(p_n + out, n, mask=inside)
        tl.store(p_m + out, m, mask=inside)
        tl.debug_barrier()  # the next step reads this h


@triton.jit
def backward_kernel(
    p_a,
    p_r,
    p_c,
    p_n,
    p_m,
    p_real,
    p_start,
    p_dh,
    p_da,
    p_dh0,
    p_dc0,
    p_dn0,
    T,
    B,
    H,
    V,
    EXP: tl.constexpr,
    HALF: tl.constexpr,
    BB: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
):  # too many for a line each
    """dh [T, H, B, V] and the last state's in dh0, dc0, dn0 [H, B, V] come; da [T, H, B, 4, V] and the first's go."""
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_b, o_v = i_b * BB + tl.arange(0, BB), tl.arange(0, BV)
    inside = (o_b[:, None] < B) & (o_v[None, :] < V)
    row = i_h * B + o_b
    step = (i_h * 0 + H) * B
    at = row[:, None] * V + o_v[None, :]
    dh = tl.load(p_dh0 + at, mask=inside, other=0.0)
    dc = tl.load(p_dc0 + at, mask=inside, other=0.0)
    dn = tl.load(p_dn0 + at, mask=inside, other=0.0)
    for s in range(0, T):
        t = T - 1 - s
        a_at = (t * step + row[:, None]) * (4 * V) + o_v[None, :]
        now = ((t + 1) * step + row[:, None]) * V + o_v[None, :]
        before = (t * step + row[:, None]) * V + o_v[None, :]
        total = dh + tl.load(p_dh + before, mask=inside, other=0.0)
        z = tanh(tl.load(p_a + a_at, mask=inside, other=0.0))
        i = tl.load(p_a + a_at + V, mask=inside, other=0.0)
        f = tl.load(p_a + a_at + 2 * V, mask=inside, other=0.0)
        o = sigmoid(tl.load(p_a + a_at + 3 * V, mask=inside, other=0.0))
        n = tl.load(p_n + now, mask=inside, other=1.0)
        n = tl.where(n == 0, 1.0, n)
        mean = tl.load(p_c + now, mask=inside, other=0.0) / n
        base = finite(tl.load(p_m + now, mask=inside, other=0.0))
        old_c = tl.load(p_c + before, mask=inside, other=0.0)
        old_n = tl.load(p_n + before, mask=inside, other=0.0)
        old_m = tl.load(p_m + before, mask=inside, other=0.0)
        if p_start is not None:
            begins = tl.load(p_start + t * B + o_b, mask=o_b < B, other=0)[:, None] != 0
            old_c, old_n = tl.where(begins, 0.0, old_c), tl.where(begins, 0.0, old_n)
            old_m = tl.where(begins, float("-inf"), old_m)
        keep = tl.exp((f if EXP else log_sigmoid(f)) + (old_m - base))
        write = tl.exp(i - base)
        slope = tl.full([BB, BV], 1.0, tl.float32) if EXP else sigmoid(-f)
        read = total * o / n
        here_c, here_n = dc + read, dn - read * mean
        dz = here_c * write * (1 - z * z)
        di = (here_c * z + here_n) * write
        df = (here_c * old_c + here_n * old_n) * keep * slope
        do = total * mean * o * (1 - o)
        if p_real is not None:
            real = tl.load(p_real + t * B + o_b, mask=o_b < B, other=0)[:, None] != 0
            dz, di = tl.where(real, dz, 0.0), tl.where(real, di, 0.0)
            df, do = tl.where(real, df, 0.0), tl.where(real, do, 0.0)
        tl.store(p_da + a_at, dz, mask=inside)
        tl.store(p_da + a_at + V, di, mask=inside)
        tl.store(p_da + a_at + 2 * V, df, mask=inside)
        tl.store(p_da + a_at + 3 * V, do, mask=inside)
        tl.debug_barrier()
        new_h = tl.zeros([BB, BV], tl.float32)
        for k in range(0, 4 * V, BK):
            o_k = k + tl.arange(0, BK)
            there = (o_b[:, None] < B) & (o_k[None, :] < 4 * V)
            part = tl.load(p_da + (t * step + row[:, None]) * (4 * V) + o_k[None, :], mask=there, other=0.0)
            w_at = p_r + i_h * V * V * 4 + o_v[None, :] * (4 * V) + o_k[:, None]  # [unit of a, unit of h]
            known = (o_k[:, None] < 4 * V) & (o_v[None, :] < V)
            new_h = product(part, tl.load(w_at, mask=known, other=0.0), new_h, HALF)
        here_c, here_n = here_c * keep, here_n * keep
        if p_real is not None:
            new_h, here_c, here_n = tl.where(real, new_h, total), tl.where(real, here_c, dc), tl.where(real, here_n, dn)
        if p_start is not None:
            new_h, here_c = tl.where(begins, 0.0, new_h), tl.where(begins, 0.0, here_c)
            here_n = tl.where(begins, 0.0, here_n)
        dh, dc, dn = new_h, here_c, here_n
    tl.store(p_dh0 + at, dh, mask=inside)
    tl.store(p_dc0 + at, dc, mask=inside)
    tl.store(p_dn0 + at, dn, mask=inside)


def check_tensors(a, weight):
    """Raise ValueError for what the kernels do not calculate with."""
    V, largest = weight.shape[1], max(width for _, width, _ in TILES)
    if largest < V:
        raise ValueError(f"x: the triton backend takes up to {largest} units per head, got {V}; use another backend")
    if a.dtype != torch.float32 or weight.dtype not in KERNEL_DTYPES:
        raise ValueError(
            "the triton backend calculates in float32 with r in float32, bfloat16 or float16, got "
            f"x {a.dtype}, r {weight.dtype}; use another backend"
        )


def start_of(a, weight, forget):
    """(tile, grid, constants) of a call; a [T, H, B, 4 V], weight [H, V, 4 V]."""
    H, B, V = a.shape[1], a.shape[2], weight.shape[1]
    tile = look_up(TILES, a.device, V, weight.dtype)
    return tile, (triton.cdiv(B, tile.sizes["BB"]), H), {"EXP": forget == "exp", "HALF": weight.dtype != torch.float32}


def bytes_of(mask):
    """[T, 1, B, 1] bool as [T, B] bytes, or None."""
    return None if mask is None else mask[:, 0, :, 0].to(torch.int8).contiguous()


def run_loop_triton(a, weight, real, start, state, forget):
    """`cpu.run_loop` on the GPU."""
    check_tensors(a, weight)
    T, H, B, V = *a.shape[:3], weight.shape[1]
    tile, grid, constants = start_of(a, weight, forget)
    states = [a.new_empty(T + 1, H, B, V) for _ in range(4)]
    for mine, given in zip(states, state, strict=True):
        mine[0] = given.transpose(0, 1)
    tensors = a, weight.contiguous(), *states, bytes_of(real), bytes_of(start)
    launch(forward_kernel, grid, *tensors, T, B, H, V, tile=tile, **constants)
    return tuple(states)


def run_loop_backward_triton(a, weight, real, start, forget, states, gradients):
    """`cpu.run_loop_backward` on the GPU."""
    T, H, B, V = *a.shape[:3], weight.shape[1]
    tile, grid, constants = start_of(a, weight, forget)
    dh, dc, dn = gradients
    da, first = torch.empty_like(a), [torch.zeros_like(dc), dc.clone(), dn.clone()]
    read = a, weight.contiguous(), *states[1:], bytes_of(real), bytes_of(start), dh
    launch(backward_kernel, grid, *read, da, *first, T, B, H, V, tile=tile, **constants)
    return da, tuple(first)


def slstm_triton(x, r, real, start, state, forget):
    return slstm_loop(x, r, real, start, state, forget, (run_loop_triton, run_loop_backward_triton))


def aot_cases():
    """Forward and backward for every width and precision of the table, on meta tensors."""

    def case(V, dtype, masked):
        B, T, H = 32, 512, 12

        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, dtype=dtype, device="meta")

        a, weight = empty(T, H, B, 4 * V), empty(H, V, 4 * V, dtype=dtype)
        real = start = empty(T, 1, B, 1, dtype=torch.bool) if masked else None
        states = run_loop_triton(a, weight, real, start, [empty(B, H, V) for _ in range(4)], "sigmoid")
        run_loop_backward_triton(
            a, weight, real, start, "sigmoid", states, (empty(T, H, B, V), empty(H, B, V), empty(H, B, V))
        )

    settings = [
        (V, dtype, masked)
        for dtype in (torch.bfloat16, torch.float32)
        for V in (128, 64, 32)
        for masked in (True, False)
    ]
    return [
        (f"V{V} {str(dtype)[6:]}{' masked' if masked else ''}", partial(case, V, dtype, masked))
        for V, dtype, masked in settings
    ]
