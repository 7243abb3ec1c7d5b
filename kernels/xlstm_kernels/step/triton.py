"""One token of the hybrid layer on a GPU: the mLSTM state, the slots of the window and the mixed output, in place, in
two launches.

Dims: B batch, H query heads, G key/value heads (H = G R), K query/key, V value, F features, S sinks, W window.

    step    per row and key/value head, a few programs share the slots: the attention of all R query heads to their part
            of them; the first also writes the new token into its slot. Beside them, per row, head and BV columns: the
            update of C and phi_q C.
    finish  per row and head: m and n, the ratio, the parts of the softmax put together, and the gate that mixes.

Why like this. All that counts is memory: 33.5 MB of state and 17 MB of slots for B 8, H 32, G 8, K = V = 128, W 512.
Both are cut into more programs than the GPU has processors, also for one row, and one launch keeps all of it in flight
at once. Slots are read once for all R heads. No two programs write to one place and none reads what another one writes
in the same launch: the new token is taken from k and v instead of its slot, m and n are only read by `step` and only
written by `finish`. Addresses and grids depend on shapes alone: safe in a CUDA graph.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from xlstm_kernels.backends.arguments import expect_for_kernel, schema
from xlstm_kernels.backends.launch import LARGEST_F, Tile, launch, look_up, power_of_2
from xlstm_kernels.backends.numerics import LOG2E
from xlstm_kernels.mlstm.reference import FORGET_ALL
from xlstm_kernels.step.cpu import TENSORS

PROGRAMS = 264  # that share the slots, if there are enough of them: two per processor of an H200

STEP = {  # BS slots of a tile, BC columns of C of one program
    (80, 128, "half"): Tile({"BS": 32, "BC": 32}, 4, 3),
    (80, 256, "half"): Tile({"BS": 32, "BC": 16}, 4, 2),
    (80, 128, "single"): Tile({"BS": 32, "BC": 32}, 4, 1),
    (80, 256, "single"): Tile({"BS": 16, "BC": 16}, 4, 1),
    (90, 128, "half"): Tile({"BS": 32, "BC": 64}, 4, 3),
    (90, 256, "half"): Tile({"BS": 32, "BC": 32}, 4, 2),
    (90, 128, "single"): Tile({"BS": 32, "BC": 64}, 4, 1),
    (90, 256, "single"): Tile({"BS": 16, "BC": 32}, 4, 1),
}
FINISH = Tile({}, 4, 1)


@triton.jit
def gate_weights(i, f, m, FORGET: tl.constexpr):
    """(m after the token, weights of the state before and of the token), as in `cpu.step_memory`."""
    x = tl.exp(-tl.abs(f))
    z = x / (2.0 + x)  # log(1 + x) = 2 artanh(z), z <= 1/3: also right where 1 + x rounds to 1
    y = z * z
    series = 1.0 + y * (
        1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15 + y / 17))))))
    )
    logf = tl.minimum(f, 0.0) - 2.0 * z * series
    logf = tl.where(logf > FORGET, logf, float("-inf"))
    m_new = tl.maximum(logf + m, i)
    scale = tl.maximum(m_new, -3.4028234663852886e38)  # finite, also where nothing has been written
    return m_new, tl.exp((m - scale) + logf), tl.exp(i - scale)


@triton.jit
def attend_slots(tensors, strides, H, R, W, P, rate, i, S, K, V, BR, BK, BV, EXACT, BS):
    """Part i_p of the slots, of R heads: sum of weighted values [BR, BV], sum of weights and largest exponent [BR]."""
    p_q, p_k, p_v, p_keys, p_values, p_index, p_part, p_weight = tensors
    q_b, q_h, k_b, k_g, v_b, v_g = strides
    i_p, i_bg, G = i % P, (i // P).to(tl.int64), H // R
    i_b, i_g = i_bg // G, i_bg % G
    index = tl.load(p_index + i_b)
    o_r, o_k, o_v, o_s = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS)
    p_keys, p_values = p_keys + i_bg * (S + W) * K, p_values + i_bg * (S + W) * V
    slots = S + W
    new = tl.where(index < slots, index, S + (index - S) % tl.maximum(W, 1))  # the slot of this token
    inside = (o_r < R)[:, None] & (o_k < K)[None, :]
    b_q = tl.load(p_q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h + o_k[None, :], mask=inside, other=0.0)
    b_h = tl.zeros([BR, BV], tl.float32)
    b_l = tl.zeros([BR], tl.float32)
    b_m = tl.full([BR], float("-inf"), tl.float32)
    if (i_p == 0) & (index >= 0):
        b_k = tl.load(p_k + i_b * k_b + i_g * k_g + o_k, mask=o_k < K, other=0.0).to(p_keys.dtype.element_ty)
        b_v = tl.load(p_v + i_b * v_b + i_g * v_g + o_v, mask=o_v < V, other=0.0).to(p_values.dtype.element_ty)
        tl.store(p_keys + new * K + o_k, b_k, mask=o_k < K)
        tl.store(p_values + new * V + o_v, b_v, mask=o_v < V)
        b_m = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32)[None, :], 1) * rate
        b_l += 1.0
        b_h += b_v.to(tl.float32)[None, :]
    n_tiles = tl.cdiv(slots, BS)
    filled = tl.where(index < 0, 0, tl.minimum(index, slots)).to(tl.int32)  # slots from here on are empty
    for j in range(i_p * n_tiles // P, tl.minimum((i_p + 1) * n_tiles // P, tl.cdiv(filled, BS))):
        s = j * BS + o_s
        valid = (s < filled) & (s != new)
        b_k = tl.load(p_keys + s[:, None] * K + o_k[None, :], mask=valid[:, None] & (o_k < K)[None, :], other=0.0)
        b_v = tl.load(p_values + s[:, None] * V + o_v[None, :], mask=valid[:, None] & (o_v < V)[None, :], other=0.0)
        if EXACT:
            b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32)), input_precision="tf32x3") * rate  # [BR, BS]
        else:
            b_s = tl.dot(b_q, tl.trans(b_k)) * rate
        b_s = tl.where(valid[None, :], b_s, float("-inf"))
        m = tl.maximum(b_m, tl.max(b_s, 1))
        finite = tl.where(m == float("-inf"), 0.0, m)
        b_p, b_w = tl.exp2(b_s - finite[:, None]), tl.exp2(b_m - finite)
        b_l, b_m = b_l * b_w + tl.sum(b_p, 1), m
        if EXACT:
            b_h = tl.dot(b_p, b_v.to(tl.float32), b_h * b_w[:, None], input_precision="tf32x3")
        else:
            b_h = tl.dot(b_p.to(b_v.dtype), b_v, b_h * b_w[:, None])
    i_part = (i_b * H + i_g * R + o_r) * P + i_p
    tl.store(p_part + i_part[:, None] * V + o_v[None, :], b_h, mask=(o_r < R)[:, None] & (o_v < V)[None, :])
    tl.store(p_weight + i_part * 2, b_m, mask=o_r < R)
    tl.store(p_weight + i_part * 2 + 1, b_l, mask=o_r < R)


@triton.jit
def update_state(tensors, strides, H, R, i, F, V, BF, FORGET, BC):
    """C of one head, columns i_c BC and on, after the token, and phi_q C of it."""
    p_phi_q, p_phi_k, p_v, p_i, p_f, p_C, p_m, p_num = tensors
    phi_q_b, phi_q_h, phi_k_b, phi_k_h, v_b, v_g, i_b_, i_h_, f_b, f_h = strides
    n_c = tl.cdiv(V, BC)
    i_c, i_bh = i % n_c, (i // n_c).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_f, o_v = tl.arange(0, BF), i_c * BC + tl.arange(0, BC)
    in_f, in_v = o_f < F, o_v < V
    p_C += i_bh * F * V + o_f[:, None] * V + o_v[None, :]
    b_C = tl.load(p_C, mask=in_f[:, None] & in_v[None, :], other=0.0)  # [BF, BC]
    gate_i = tl.load(p_i + i_b * i_b_ + i_h * i_h_).to(tl.float32)
    gate_f = tl.load(p_f + i_b * f_b + i_h * f_h).to(tl.float32)
    _, decay, write = gate_weights(gate_i, gate_f, tl.load(p_m + i_bh), FORGET)
    b_q = tl.load(p_phi_q + i_b * phi_q_b + i_h * phi_q_h + o_f, mask=in_f, other=0.0).to(tl.float32)
    b_k = tl.load(p_phi_k + i_b * phi_k_b + i_h * phi_k_h + o_f, mask=in_f, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * v_b + i_h // R * v_g + o_v, mask=in_v, other=0.0).to(tl.float32)
    b_C = b_C * decay + (b_k * write)[:, None] * b_v[None, :]
    tl.store(p_C, b_C, mask=in_f[:, None] & in_v[None, :])
    tl.store(p_num + i_bh * V + o_v, tl.sum(b_q[:, None] * b_C, 0), mask=in_v)


@triton.jit
def decode_step(
    p_q,
    p_k,
    p_v,
    p_phi_q,
    p_phi_k,
    p_i,
    p_f,
    p_C,
    p_m,
    p_keys,
    p_values,
    p_index,
    p_part,
    p_weight,
    p_num,
    q_b,
    q_h,
    k_b,
    k_g,
    v_b,
    v_g,
    phi_q_b,
    phi_q_h,
    phi_k_b,
    phi_k_h,
    i_b,
    i_h,
    f_b,
    f_h,
    H,
    R,
    W,
    P,
    n_attend,
    rate,
    S: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    EXACT: tl.constexpr,
    FORGET: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):  # too many for a line each
    """The first n_attend programs read the slots, which takes longest; the others update the state."""
    i = tl.program_id(0)
    if i < n_attend:
        slots, steps = (p_q, p_k, p_v, p_keys, p_values, p_index, p_part, p_weight), (q_b, q_h, k_b, k_g, v_b, v_g)
        attend_slots(slots, steps, H, R, W, P, rate, i, S, K, V, BR, BK, BV, EXACT, BS)
    else:  # other names than above: the compiler wants one type for each name of both branches
        memory = p_phi_q, p_phi_k, p_v, p_i, p_f, p_C, p_m, p_num
        strides = phi_q_b, phi_q_h, phi_k_b, phi_k_h, v_b, v_g, i_b, i_h, f_b, f_h
        update_state(memory, strides, H, R, i - n_attend, F, V, BF, FORGET, BC)


@triton.jit
def decode_finish(
    p_phi_q,
    p_phi_k,
    p_i,
    p_f,
    p_o,
    p_n,
    p_m,
    p_index,
    p_part,
    p_weight,
    p_num,
    p_h,
    phi_q_b,
    phi_q_h,
    phi_k_b,
    phi_k_h,
    i_b,
    i_h,
    f_b,
    f_h,
    o_b,
    o_h,
    H,
    P,
    V: tl.constexpr,
    F: tl.constexpr,
    BP: tl.constexpr,
    BV: tl.constexpr,
    BF: tl.constexpr,
    FORGET: tl.constexpr,
):  # too many for a line each
    """n, m and h of one row and head."""
    lane = tl.program_id(0).to(tl.int64)
    row, head = lane // H, lane % H
    o_f, o_v, o_p = tl.arange(0, BF), tl.arange(0, BV), tl.arange(0, BP)
    # largest exponent of each part
    b_weight = tl.load(p_weight + (lane * P + o_p) * 2, mask=o_p < P, other=float("-inf"))
    b_l = tl.load(p_weight + (lane * P + o_p) * 2 + 1, mask=o_p < P, other=0.0)
    b_part = tl.load(
        p_part + (lane * P + o_p)[:, None] * V + o_v[None, :], mask=(o_p < P)[:, None] & (o_v < V)[None, :], other=0.0
    )
    m, gate_i = tl.load(p_m + lane), tl.load(p_i + row * i_b + head * i_h).to(tl.float32)
    m_new, decay, write = gate_weights(gate_i, tl.load(p_f + row * f_b + head * f_h).to(tl.float32), m, FORGET)
    b_q = tl.load(p_phi_q + row * phi_q_b + head * phi_q_h + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    b_k = tl.load(p_phi_k + row * phi_k_b + head * phi_k_h + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    b_n = tl.load(p_n + lane * F + o_f, mask=o_f < F, other=0.0) * decay + b_k * write
    den, b_num = tl.sum(b_q * b_n, 0), tl.load(p_num + lane * V + o_v, mask=o_v < V, other=0.0)
    empty = tl.abs(den) < 1.1754943508222875e-38  # nothing has been written
    b_mem = tl.where(empty, 0.0, b_num / tl.where(empty, 1.0, den))
    top = tl.max(b_weight, 0)
    b_weight = tl.exp2(b_weight - tl.where(top == float("-inf"), 0.0, top))
    seen = tl.sum(b_weight * b_l, 0)
    b_win = tl.sum(b_weight[:, None] * b_part, 0) / tl.where(seen > 0, seen, 1.0)
    o = tl.load(p_o + row * o_b + head * o_h).to(tl.float32)
    real = tl.load(p_index + row) >= 0
    b_h = tl.where(real, o * b_mem + (1.0 - o) * b_win, 0.0)
    tl.store(p_h + lane * V + o_v, b_h.to(p_h.dtype.element_ty), mask=o_v < V)
    tl.store(p_n + lane * F + o_f, b_n, mask=o_f < F)
    tl.store(p_m + lane, m_new)


def parts_of(B, G, slots, size):
    """Programs that share the slots of one row and head: enough to fill the GPU, at most one per tile."""
    return max(1, min(-(-slots // size), PROGRAMS // (B * G)))


def step_fused(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    """h [B, 1, H, V]; C, n, m, keys and values are written in place."""
    (B, _, H, K), G, F, V, slots = q.shape, k.shape[2], phi_q.shape[3], v.shape[3], keys.shape[2]
    tensors = q, k, v, phi_q, phi_k
    q, k, v, phi_q, phi_k = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)
    exact = not q.dtype == keys.dtype == values.dtype != torch.float32
    tile = look_up(STEP, q.device, max(K, V, F), torch.float32 if exact else q.dtype)
    parts, columns = parts_of(B, G, slots, tile.sizes["BS"]), -(-V // tile.sizes["BC"])
    h, num = v.new_empty(B, 1, H, V), C.new_empty(B, H, V)
    part, weight = C.new_empty(B, H, parts, V), C.new_empty(B, H, parts, 2)
    strides = [n for x in (q, k, v, phi_q, phi_k, i, f, o) for n in (x.stride(0), x.stride(2))]
    widths = {"V": V, "F": F, "BV": power_of_2(V), "BF": power_of_2(F), "FORGET": FORGET_ALL}
    tensors = q, k, v, phi_q, phi_k, i, f, C, m, keys, values, index, part, weight, num
    sizes = H, H // G, slots - sinks, parts, B * G * parts, scale * LOG2E
    constants = {"S": sinks, "K": K, "BR": power_of_2(H // G), "BK": power_of_2(K), "EXACT": exact, **widths}
    grid = (B * G * parts + B * H * columns,)
    launch(decode_step, grid, *tensors, *strides[:14], *sizes, **constants, tile=tile)
    tensors = phi_q, phi_k, i, f, o, n, m, index, part, weight, num, h
    constants = {"BP": power_of_2(parts, 1), **widths}
    launch(decode_finish, (B * H,), *tensors, *strides[6:], H, parts, **constants, tile=FINISH)
    return h


hybrid_step_fused = torch.library.custom_op(
    "xlstm_kernels::hybrid_step_fused",
    step_fused,
    mutates_args=("C", "n", "m", "keys", "values"),
    schema=schema(TENSORS, "SymInt sinks, float scale"),
)


@hybrid_step_fused.register_fake
def _(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    return v.new_empty(q.shape[0], 1, q.shape[2], v.shape[3])


def check_tensors(tensors):
    """Raise ValueError for dtypes and widths that kernels do not have, and memory that cannot be written in place."""
    for name, x in tensors.items():
        if name in ("C", "n", "m") and x.dtype != torch.float32:
            raise ValueError(
                f"{name}: the triton backend keeps the state in float32, got {x.dtype}; use another backend"
            )
        # the tiles are those of the widest of K, V and F
        expect_for_kernel(name, x, LARGEST_F if x.dim() == 4 else None)
        if name in ("C", "n", "m", "keys", "values") and not x.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous memory to write in place, got strides {x.stride()} for {list(x.shape)}"
            )


def hybrid_step_triton(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    """`mlstm_step` and `window_step` of one token and their mix o h_mlstm + (1 - o) h_window: h [B, 1, H, V] in v's
    dtype. No gradients.

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V], as the window takes them.
        phi_q, phi_k: features, [B, 1, H, F]; i, f: gates before activation, o: the output gate itself, [B, 1, H].
        C, n, m: the state, float32, [B, H, F, V], [B, H, F], [B, H]; keys, values: the slots, [B, G, S + W, K | V].
            Contiguous; in place.
        index: [B] int64, number of tokens of the row's document before this one; 0 makes the old slots invisible (f =
            -inf, which the caller sets, clears the state); -1 is padding: nothing goes into the slots and h is 0 (i =
            -inf, f = +inf keep the state).
        sinks: S, of the S + W slots; scale: of the scores, 1 / sqrt(K) if None.
    Raises:
        ValueError: a dtype, a head dim or a memory layout that the kernels do not calculate with.
    """
    names = "q", "k", "v", "phi_q", "phi_k", "i", "f", "o", "C", "n", "m", "keys", "values"
    check_tensors(dict(zip(names, (q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values), strict=True)))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return hybrid_step_fused(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale)


def aot_cases():
    """A step for every width and precision of the table, on meta tensors; twice the features of a head as well."""

    def case(K, V, F, dtype):
        B, H, G, S, W = 8, 32, 8, 4, 512

        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, dtype=dtype, device="meta")

        q, k, v = (empty(B, 1, heads, d, dtype=dtype) for heads, d in ((H, K), (G, K), (G, V)))
        keys, values = (empty(B, G, S + W, d, dtype=dtype) for d in (K, V))
        features, gates = (empty(B, 1, H, F), empty(B, 1, H, F)), (empty(B, 1, H) for _ in range(3))
        state, index = (empty(B, H, F, V), empty(B, H, F), empty(B, H)), empty(B, dtype=torch.int64)
        step_fused(q, k, v, *features, *gates, *state, keys, values, index, S, K**-0.5)

    widths = (128, 128, 128), (64, 64, 64), (128, 256, 128), (64, 64, 128), (128, 128, 256)
    settings = [(*width, dtype) for dtype in (torch.bfloat16, torch.float32) for width in widths]
    return [(f"K{K} V{V} F{F} {str(dtype)[6:]}", partial(case, K, V, F, dtype)) for K, V, F, dtype in settings]
