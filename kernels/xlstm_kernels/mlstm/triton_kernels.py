"""The Triton kernels of the chunkwise mLSTM; `mlstm` launches them and says why they are cut like this.

Dims: N sequences, T tokens of a row, H heads, K query/key, V value; NC chunks of BT tokens of all sequences, each in
blocks of BR rows. b_x is a tile, p_x a pointer, o_x offsets. Per token and head there are float32 tensors [NC, H, BT],
per chunk and head [NC, H].

Exponents are powers of two. With b the sum of log2 f since the beginning of the chunk:

    exponent  a_s = log2(e) i_s - b_s, -inf for rows beyond the end; as one float32, or as the sum of two (p_low is the
              second) if K is float32
    own       max of a_s over the tokens of the same document up to each one
    start     row in the chunk where the document of a token begins, -1 if before the chunk [int8]
    scales    [NC, H, 4]: enter, decay, exit and what float32 lost of exit: states lie in the frame 2^enter before the
              chunk and 2^exit after it, both counted from its beginning; decay is the weight of the one in the other
    R_t       max(own_t, enter): the frame of a row. The weight of token s is 2^(a_s - R_t), of the carried state
              2^(enter - R_t)

A frame is any float32 near the truth that numerator and denominator share: rounding it costs nothing. `scan_kernel`
takes BC chunks at a time.
"""

import triton
import triton.language as tl

from xlstm_kernels.backends import numerics
from xlstm_kernels.backends.triton_math import finite, log_sigmoid
from xlstm_kernels.mlstm import reference

FORGET_ALL = tl.constexpr(reference.FORGET_ALL)
LOG2E = tl.constexpr(numerics.LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


# --- the gates: exponents of rows, frames of states --------------------------------------------------------------


@triton.jit
def place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT: tl.constexpr):
    """(row of the batch, first token, end of the sequence) of chunk i_c; `per` chunks in a row if nothing is packed."""
    if p_cu is None:
        i_b, begin, end = i_c // per, (i_c % per) * BT, T
    else:
        i_n = tl.load(p_owner + i_c)
        i_b, begin, end = i_c * 0, tl.load(p_cu + i_n) + (i_c - tl.load(p_first + i_n)) * BT, tl.load(p_cu + i_n + 1)
    return i_b, begin, end


@triton.jit
def gate_kernel(
    p_i, p_f, p_a, p_low, p_own, p_start, p_total, p_weight, T, per, H, p_cu, p_first, p_owner, BT: tl.constexpr
):
    """a, own, start of one chunk and head, and for the scan the sums of log2 f and weights in the last row's frame."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // H, i_ch % H
    i_b, begin, end = place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT)
    o_t = tl.arange(0, BT)
    real = begin + o_t < end
    at = (i_b * T + begin + o_t) * H + i_h
    logf = log_sigmoid(tl.load(p_f + at, mask=real, other=float("inf")).to(tl.float32))
    starts = logf < FORGET_ALL
    logf = tl.where(starts, 0.0, logf).to(tl.float64) * LOG2E
    i = tl.load(p_i + at, mask=real, other=float("-inf")).to(tl.float64) * LOG2E
    exact = i - tl.cumsum(logf, 0)  # sums of log f cancel in differences
    a = exact.to(tl.float32)
    mark = tl.where(starts, o_t, -1)
    before = o_t[None, :] <= o_t[:, None]  # [t, s]
    start = tl.max(tl.where(before, mark[None, :], -1), 1)
    own = tl.max(tl.where(before & (o_t[None, :] >= start[:, None]), a[None, :], float("-inf")), 1)
    last = o_t >= tl.max(mark, 0)
    top = tl.max(tl.where(last, a, float("-inf")), 0)
    weight = tl.sum(tl.where(last, tl.exp2(a - finite(top)), 0.0), 0)
    tl.store(p_a + i_ch * BT + o_t, a)
    if p_low is not None:
        tl.store(p_low + i_ch * BT + o_t, (finite(exact) - finite(a)).to(tl.float32))
    tl.store(p_own + i_ch * BT + o_t, own)
    tl.store(p_start + i_ch * BT + o_t, start.to(tl.int8))
    tl.store(p_total + i_ch, tl.sum(logf, 0))
    tl.store(p_weight + i_ch, weight)


@triton.jit
def scan_kernel(
    p_own,
    p_start,
    p_total,
    p_weight,
    p_m,
    p_n,
    p_scales,
    p_m_last,
    p_ends,
    per,
    H,
    p_first,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):  # too many for a line each
    """One head of one sequence, BC chunks at a time: the frames of the states, m after the last token, and the scales
    [N, H, 2] that take the given state into the first frame and the last frame into that of m.

    The frame of a state is the log of the sum of all weights, which makes it a weighted mean of k v^T: no dtype is too
    small for that.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    first, count = i_n * per, per
    if p_first is not None:
        first = tl.load(p_first + i_n).to(tl.int64)
        count = tl.load(p_first + i_n + 1) - first
    o_c = tl.arange(0, BC)
    before = o_c[None, :] <= o_c[:, None]  # [c, j]
    m, weight, frame, enter = tl.full([], float("-inf"), tl.float64), 1.0, float("-inf"), 1.0
    if p_m is not None:
        given = tl.load(p_m + i_nh).to(tl.float64)
        o_k = tl.arange(0, BK)
        n = tl.load(p_n + i_nh * K + o_k, mask=o_k < K, other=0.0)
        weight = tl.maximum(tl.sum(tl.abs(n), 0), 1.0)
        m = given * LOG2E
        frame = (m + tl.log2(weight)).to(tl.float32)
        enter = tl.exp2((finite(m) - finite(frame)).to(tl.float32))
    tl.store(p_ends + i_nh * 2, enter)
    for j in range(0, count, BC):
        real = j + o_c < count
        i_ch = (first + j + o_c) * H + i_h
        total = tl.load(p_total + i_ch, mask=real, other=0.0)
        reset = tl.load(p_start + i_ch * BT + BT - 1, mask=real, other=-1) >= 0
        peak = tl.load(p_own + i_ch * BT + BT - 1, mask=real, other=float("-inf"))
        added = tl.load(p_weight + i_ch, mask=real, other=0.0)
        D = tl.cumsum(total, 0)
        # the last chunk before which nothing is remembered
        start = tl.max(tl.where(before, tl.where(reset, o_c, -1)[None, :], -1), 1)
        x = tl.where(before & (o_c[None, :] >= start[:, None]), (peak + total - D)[None, :], float("-inf"))
        carried = tl.where(start >= 0, float("-inf"), m)
        top = tl.maximum(tl.max(x, 1), carried)
        zero = finite(top)
        sums = (
            tl.sum(tl.exp2((x - zero[:, None]).to(tl.float32)) * added[None, :], 1)
            + tl.exp2((carried - zero).to(tl.float32)) * weight
        )
        after = (D + top + tl.log2(tl.maximum(sums, 1.0))).to(tl.float32)
        enters = tl.max(tl.where(o_c[None, :] == o_c[:, None] - 1, after[None, :], float("-inf")), 1)
        enters = tl.where(o_c == 0, frame, enters)
        exits = finite(after).to(tl.float64) - total
        nearest = exits.to(tl.float32)
        decay = tl.where(reset, 0.0, tl.exp2((enters - exits).to(tl.float32)))
        tl.store(p_scales + i_ch * 4, enters, mask=real)
        tl.store(p_scales + i_ch * 4 + 1, decay, mask=real)
        tl.store(p_scales + i_ch * 4 + 2, nearest, mask=real)
        tl.store(p_scales + i_ch * 4 + 3, (exits - nearest).to(tl.float32), mask=real)
        last = o_c == BC - 1  # beyond the end nothing changes any more
        m = tl.max(tl.where(last, D + top, float("-inf")), 0)
        frame = tl.max(tl.where(last, after, float("-inf")), 0)
        weight = tl.sum(tl.where(last, sums, 0.0), 0)
    m_last = (m * LN2).to(tl.float32)
    tl.store(p_m_last + i_nh, m_last)
    tl.store(p_ends + i_nh * 2 + 1, tl.exp2((finite(frame) - finite(m_last).to(tl.float64) * LOG2E).to(tl.float32)))


# --- states, outputs, gradients ------------------------------------------------------------------------------------


@triton.jit
def load_rows(p, o_t, stride, left, o_d, D: tl.constexpr):
    """Rows o_t, columns o_d of a matrix with D columns and `left` rows as a tile, 0 beyond the edges."""
    return tl.load(p + o_t[:, None] * stride + o_d[None, :], mask=(o_t[:, None] < left) & (o_d[None, :] < D), other=0.0)


@triton.jit
def row_frames(b_own, b_start, enter):
    """The frames R of rows, and the weight of the carried state in them."""
    seen = tl.where(b_start >= 0, float("-inf"), enter)
    R = finite(tl.maximum(b_own, seen))
    return R, tl.exp2(seen - R)


@triton.jit
def exponents(p_a, p_low, at, o, R):
    """a_s - R for the rows `o` of the chunk whose first row is `at`; R broadcasts."""
    x = tl.load(p_a + at + o) - R
    if p_low is not None:
        x += tl.load(p_low + at + o)
    return x


@triton.jit
def write_weights(p_a, p_low, p_start, p_scales, i_ch, o, BT: tl.constexpr):
    """Weights of the rows `o` of chunk-and-head i_ch in the state after the chunk."""
    exit = tl.load(p_scales + i_ch * 4 + 2)
    lost = tl.load(p_scales + i_ch * 4 + 3)
    # the state after the chunk belongs to the last row's document
    begin = tl.load(p_start + i_ch * BT + BT - 1).to(tl.int32)
    return tl.where(o >= begin, tl.exp2(exponents(p_a, p_low, i_ch * BT, o, exit) - lost), 0.0)


@triton.jit
def state_kernel(
    p_x,
    p_y,
    p_a,
    p_low,
    p_start,
    p_scales,
    p_weight,
    p_delta,
    p_C,
    p_n,
    p_ends,
    p_states,
    p_norms,
    p_last_C,
    p_last_n,
    p_spans,
    x_b,
    x_t,
    x_h,
    y_b,
    y_t,
    y_h,
    T,
    per,
    lanes,
    H,
    S,
    p_cu,
    p_first,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
    INNER: tl.constexpr,
):  # too many for a line each
    """A tile of one head's state through S chunks: state <- decay state + (weight x)^T y, kept as it stands before each
    chunk's update.

    Forward x, y are k, v and the states those before each chunk. REVERSE runs from the last chunk to the first with q,
    dh: the gradients of the states after each chunk. LOCAL begins with nothing, keeps nothing on the way and returns
        the state and the product of the decays.
    INNER: the state to begin with is one of `join_kernel`'s, in the right frame already.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_v = (pid % tl.cdiv(V, BV)).to(tl.int32)
    pid //= tl.cdiv(V, BV)
    i_k = (pid % tl.cdiv(K, BK)).to(tl.int32)
    pid //= tl.cdiv(K, BK)
    i_nh, i_s = pid % lanes, pid // lanes
    i_n, i_h = i_nh // H, i_nh % H
    i_b, origin, first, count, length = i_n, i_n * 0, i_n * per, per, T
    if p_cu is not None:
        i_b, origin = i_n * 0, tl.load(p_cu + i_n)
        first = tl.load(p_first + i_n).to(tl.int64)
        count = tl.load(p_first + i_n + 1) - first
        length = tl.load(p_cu + i_n + 1) - origin
    o_t, o_k, o_v = tl.arange(0, BR), i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    inside = (o_k[:, None] < K) & (o_v[None, :] < V)
    o_C = o_k[:, None] * V + o_v[None, :]
    b_C = tl.zeros([BK, BV], tl.float32)
    b_n = tl.zeros([BK], tl.float32)
    scale = 1.0
    if not INNER and not LOCAL:
        scale = tl.load(p_ends + i_nh * 2 + (1 if REVERSE else 0))
    if p_C is not None:
        b_C = tl.load(p_C + pid * K * V + o_C, mask=inside, other=0.0) * scale
    if p_n is not None:
        b_n = tl.load(p_n + pid * K + o_k, mask=o_k < K, other=0.0) * scale
    p_x += i_b * x_b + i_h * x_h + origin * x_t
    p_y += i_b * y_b + i_h * y_h + origin * y_t
    span = 1.0
    steps: tl.constexpr = BT // BR
    # one loop, so that loads run ahead of it across chunks
    for step in range(i_s * S * steps, tl.minimum(i_s * S + S, count) * steps):
        j, r = step // steps, step % steps
        if REVERSE:
            j = count - 1 - j
        i_ch = (first + j) * H + i_h
        decay = 1.0
        if r == 0:
            decay = tl.load(p_scales + i_ch * 4 + 1)
            if not LOCAL:
                tl.store(p_states + i_ch * K * V + o_C, b_C.to(p_states.dtype.element_ty), mask=inside)
                if i_v == 0:
                    tl.store(p_norms + i_ch * K + o_k, b_n, mask=o_k < K)
        span *= decay
        t = j * BT + r * BR
        left = (length - t).to(tl.int32)
        p_xt = p_x + t * x_t + o_t[None, :] * x_t + o_k[:, None]
        b_x = tl.load(p_xt, mask=(o_t[None, :] < left) & (o_k[:, None] < K), other=0.0)  # [BK, BR]
        b_y = load_rows(p_y + t * y_t, o_t, y_t, left, o_v, V)  # [BR, BV]
        o_r = r * BR + o_t
        weight = (
            tl.load(p_weight + i_ch * BT + o_r)
            if REVERSE
            else write_weights(p_a, p_low, p_start, p_scales, i_ch, o_r, BT)
        )
        b_x = (b_x * weight[None, :]).to(b_y.dtype)
        b_C = tl.dot(b_x, b_y, b_C * decay, input_precision="tf32x3")
        if i_v == 0:
            b_w = b_x.to(tl.float32)  # rounded as in C, so that the ratio stays a mean of the values
            if REVERSE:
                b_w *= -tl.load(p_delta + i_ch * BT + o_r)[None, :]
            b_n = b_n * decay + tl.sum(b_w, 1)
    if LOCAL:
        tl.store(p_last_C + pid * K * V + o_C, b_C, mask=inside)
        if i_v == 0:
            tl.store(p_last_n + pid * K + o_k, b_n, mask=o_k < K)
        tl.store(p_spans + pid, span, mask=(i_v == 0) & (i_k == 0))
    elif p_last_C is not None:  # noqa: SIM102, this is known to the compiler, the rest is not
        if (i_s * S < count) & (i_s * S + S >= count):
            scale = tl.load(p_ends + i_nh * 2 + (0 if REVERSE else 1))
            tl.store(p_last_C + i_nh * K * V + o_C, b_C * scale, mask=inside)
            if i_v == 0:
                tl.store(p_last_n + i_nh * K + o_k, b_n * scale, mask=o_k < K)


@triton.jit
def join_kernel(p_x, p_spans, p_given, p_ends, lanes, segments, M, END: tl.constexpr, BM: tl.constexpr):
    """From what each segment adds to a state to the state before it, x [segments, N H, M], between the long scans."""
    i_m, i_nh = tl.program_id(0).to(tl.int64) % tl.cdiv(M, BM), tl.program_id(0).to(tl.int64) // tl.cdiv(M, BM)
    o_m = i_m * BM + tl.arange(0, BM)
    b_x = tl.zeros([BM], tl.float32)
    if p_given is not None:
        b_x = tl.load(p_given + i_nh * M + o_m, mask=o_m < M, other=0.0) * tl.load(p_ends + i_nh * 2 + END)
    for i_s in range(0, segments):
        at = (i_s * lanes + i_nh) * M + o_m
        b_new = tl.load(p_x + at, mask=o_m < M, other=0.0)
        tl.store(p_x + at, b_x, mask=o_m < M)
        b_x = b_x * tl.load(p_spans + i_s * lanes + i_nh) + b_new


@triton.jit
def output_kernel(
    p_q,
    p_k,
    p_v,
    p_states,
    p_norms,
    p_a,
    p_low,
    p_own,
    p_start,
    p_scales,
    p_h,
    p_inverse,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    per,
    H,
    p_cu,
    p_first,
    p_owner,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # too many for a line each
    """h and 1 / den of BR rows, from the state before their chunk and the tokens of their chunk in blocks of BR."""
    pid = tl.program_id(0).to(tl.int64)
    i_r = (pid % (BT // BR)).to(tl.int32)
    pid //= BT // BR
    i_v = (pid % tl.cdiv(V, BV)).to(tl.int32)
    i_ch = pid // tl.cdiv(V, BV)
    i_c, i_h = i_ch // H, i_ch % H
    i_b, begin, end = place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT)
    left = (end - begin).to(tl.int32)
    at = i_ch * BT
    o_r, o_k, o_v = tl.arange(0, BR), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_t = i_r * BR + o_r
    p_k += i_b * k_b + begin * k_t + i_h * k_h
    p_v += i_b * v_b + begin * v_t + i_h * v_h
    b_q = load_rows(p_q + i_b * q_b + begin * q_t + i_h * q_h, o_t, q_t, left, o_k, K)  # [BR, BK]
    b_start = tl.load(p_start + at + o_t).to(tl.int32)
    R, carry = row_frames(tl.load(p_own + at + o_t), b_start, tl.load(p_scales + i_ch * 4))
    b_C = load_rows(p_states + i_ch * K * V, o_k, V, K, o_v, V)  # [BK, BV]
    b_n = tl.load(p_norms + i_ch * K + o_k, mask=o_k < K, other=0.0)
    num = tl.dot(b_q, b_C, input_precision="tf32x3") * carry[:, None]  # [BR, BV]
    den = tl.sum(b_q.to(tl.float32) * b_n[None, :], 1) * carry
    for i_s in range(0, i_r + 1):
        o_s = i_s * BR + o_r
        b_k = load_rows(p_k, o_s, k_t, left, o_k, K)
        b_v = load_rows(p_v, o_s, v_t, left, o_v, V)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")  # [BR, BR]
        visible = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None])
        x = exponents(p_a, p_low, at, o_s[None, :], R[:, None])
        scores = (scores * tl.exp2(tl.where(visible, x, float("-inf")))).to(b_v.dtype)
        den += tl.sum(scores.to(tl.float32), 1)  # rounded as in num, so that the ratio stays a mean of the values
        num = tl.dot(scores, b_v, num, input_precision="tf32x3")
    empty = tl.abs(den) < TINY
    inverse = tl.where(empty, 0.0, 1 / tl.where(empty, 1.0, den))
    p_h += ((i_b * T + begin) * H + i_h) * V + o_t[:, None].to(tl.int64) * H * V + o_v[None, :]
    tl.store(p_h, (num * inverse[:, None]).to(p_h.dtype.element_ty), mask=(o_t[:, None] < left) & (o_v[None, :] < V))
    if i_v == 0:
        tl.store(p_inverse + at + o_t, inverse)


@triton.jit
def delta_kernel(
    p_h,
    p_dh,
    p_own,
    p_start,
    p_scales,
    p_inverse,
    p_delta,
    p_weight,
    T,
    per,
    H,
    p_cu,
    p_first,
    p_owner,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):  # too many for a line each
    """Of BR rows [NC, H, BT]: delta = <h, dh> = -den dden, and the weight of the carried state over den."""
    pid = tl.program_id(0).to(tl.int64)
    i_ch = pid // (BT // BR)
    i_c, i_h = i_ch // H, i_ch % H
    i_b, begin, end = place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT)
    o_t, o_v = (pid % (BT // BR)).to(tl.int32) * BR + tl.arange(0, BR), tl.arange(0, BV)
    left = (end - begin).to(tl.int32)
    at = ((i_b * T + begin) * H + i_h) * V
    b_h, b_dh = load_rows(p_h + at, o_t, H * V, left, o_v, V), load_rows(p_dh + at, o_t, H * V, left, o_v, V)
    o_t += i_ch * BT
    tl.store(p_delta + o_t, tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1))
    _, carry = row_frames(tl.load(p_own + o_t), tl.load(p_start + o_t), tl.load(p_scales + i_ch * 4))
    tl.store(p_weight + o_t, carry * tl.load(p_inverse + o_t))


@triton.jit
def weights_of_keys(gates, at, o_s, o_t, enter):
    """Weight of the keys o_s in the rows o_t, over the rows' denominators [keys, rows]."""
    p_a, p_low, p_own, p_start, p_inverse = gates
    b_start = tl.load(p_start + at + o_t).to(tl.int32)
    R, _ = row_frames(tl.load(p_own + at + o_t), b_start, enter)
    visible = (o_s[:, None] <= o_t[None, :]) & (o_s[:, None] >= b_start[None, :])
    x = exponents(p_a, p_low, at, o_s[:, None], R[None, :])
    return tl.exp2(tl.where(visible, x, float("-inf"))) * tl.load(p_inverse + at + o_t)[None, :]


@triton.jit
def query_grad(p_k, p_v, p_dh, p_states, p_norms, p_delta, p_weight, gates, where, k_t, v_t, h_t, K, V, BR, BK, BV):
    """dq [BR, BK] of rows that look back: at the state before the chunk and at the tokens of the chunk."""
    p_a, p_low, p_own, p_start, p_inverse = gates
    at, enter, i_r, left = where
    o_r, o_k, o_v = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV)
    o_t = i_r * BR + o_r
    delta = tl.load(p_delta + at + o_t)
    b_n = tl.load(p_norms + o_k, mask=o_k < K, other=0.0)
    b_dq = -delta[:, None] * b_n[None, :]
    if V <= BV:
        b_dh = load_rows(p_dh, o_t, h_t, left, o_v, V)
    for j in range(0, V, BV):
        if V > BV:
            b_dh = load_rows(p_dh, o_t, h_t, left, j + o_v, V)
        b_C = load_rows(p_states, o_k, V, K, j + o_v, V)
        b_dq = tl.dot(b_dh, tl.trans(b_C), b_dq, input_precision="tf32x3")
    b_dq *= tl.load(p_weight + at + o_t)[:, None]
    b_start = tl.load(p_start + at + o_t).to(tl.int32)
    R, _ = row_frames(tl.load(p_own + at + o_t), b_start, enter)
    inverse = tl.load(p_inverse + at + o_t)
    for i_s in range(0, i_r + 1):
        o_s = i_s * BR + o_r
        dscores = tl.zeros([BR, BR], tl.float32) - delta[:, None]
        for j in range(0, V, BV):
            if V > BV:
                b_dh = load_rows(p_dh, o_t, h_t, left, j + o_v, V)
            b_v = load_rows(p_v, o_s, v_t, left, j + o_v, V)
            dscores = tl.dot(b_dh, tl.trans(b_v), dscores, input_precision="tf32x3")
        visible = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None])
        x = exponents(p_a, p_low, at, o_s[None, :], R[:, None])
        dscores *= tl.exp2(tl.where(visible, x, float("-inf"))) * inverse[:, None]
        b_k = load_rows(p_k, o_s, k_t, left, o_k, K)
        b_dq = tl.dot(dscores.to(b_k.dtype), b_k, b_dq, input_precision="tf32x3")
    return b_dq


@triton.jit
def key_grad(read, p_sums, size, gates, where, write, strides, K, V, BT, BR, BK, BV):
    """dk [BR, BK] of tokens, from rows after the chunk, its last state, and in it; <k, dk> goes to `sums`."""
    p_q, p_k, p_v, p_dh, p_dstates, p_dnorms, p_delta = read
    q_t, k_t, v_t, h_t = strides
    at, enter, i_r, left = where
    o_r, o_k, o_v = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV)
    o_s = i_r * BR + o_r
    b_dn = tl.load(p_dnorms + o_k, mask=o_k < K, other=0.0)
    b_dk = tl.zeros([BR, BK], tl.float32) + b_dn[None, :]
    if V <= BV:
        b_v = load_rows(p_v, o_s, v_t, left, o_v, V)
    for j in range(0, V, BV):
        if V > BV:
            b_v = load_rows(p_v, o_s, v_t, left, j + o_v, V)
        b_dC = load_rows(p_dstates, o_k, V, K, j + o_v, V)
        b_dk = tl.dot(b_v, tl.trans(b_dC), b_dk, input_precision="tf32x3")
    b_dk *= write[:, None]
    b_k = load_rows(p_k, o_s, k_t, left, o_k, K)
    later = tl.sum(b_k.to(tl.float32) * b_dk, 1)
    tl.store(p_sums + size + at + o_s, later)
    for i_t in range(i_r, BT // BR):
        o_t = i_t * BR + o_r
        delta = tl.load(p_delta + at + o_t)
        dscores = tl.zeros([BR, BR], tl.float32) - delta[None, :]
        for j in range(0, V, BV):
            if V > BV:
                b_v = load_rows(p_v, o_s, v_t, left, j + o_v, V)
            b_dh = load_rows(p_dh, o_t, h_t, left, j + o_v, V)
            dscores = tl.dot(b_v, tl.trans(b_dh), dscores, input_precision="tf32x3")
        dscores *= weights_of_keys(gates, at, o_s, o_t, enter)
        b_q = load_rows(p_q, o_t, q_t, left, o_k, K)
        b_dk = tl.dot(dscores.to(b_q.dtype), b_q, b_dk, input_precision="tf32x3")
    b_k = load_rows(p_k, o_s, k_t, left, o_k, K)
    tl.store(p_sums + at + o_s, tl.sum(b_k.to(tl.float32) * b_dk, 1) - later)
    return b_dk


@triton.jit
def value_grad(p_q, p_k, p_dh, p_dstates, gates, where, write, q_t, k_t, h_t, o_v, K, V, BT, BR, BK):
    """dv [BR, columns o_v] of tokens that later rows look at."""
    at, enter, i_r, left = where
    o_r, o_k = tl.arange(0, BR), tl.arange(0, BK)
    o_s = i_r * BR + o_r
    b_k = load_rows(p_k, o_s, k_t, left, o_k, K)
    b_dv = tl.dot(b_k, load_rows(p_dstates, o_k, V, K, o_v, V), input_precision="tf32x3") * write[:, None]
    for i_t in range(i_r, BT // BR):
        o_t = i_t * BR + o_r
        b_q = load_rows(p_q, o_t, q_t, left, o_k, K)
        scores = tl.dot(b_k, tl.trans(b_q), input_precision="tf32x3")
        scores *= weights_of_keys(gates, at, o_s, o_t, enter)
        b_dh = load_rows(p_dh, o_t, h_t, left, o_v, V)
        b_dv = tl.dot(scores.to(b_dh.dtype), b_dh, b_dv, input_precision="tf32x3")
    return b_dv


@triton.jit
def grad_kernel(
    p_q,
    p_k,
    p_v,
    p_dh,
    p_states,
    p_norms,
    p_dstates,
    p_dnorms,
    p_a,
    p_low,
    p_own,
    p_start,
    p_scales,
    p_inverse,
    p_delta,
    p_weight,
    p_dq,
    p_dk,
    p_dv,
    p_sums,
    p_through,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    per,
    H,
    p_cu,
    p_first,
    p_owner,
    size,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # too many for a line each
    """dq, dk, or a tile of dv of BR rows: programs with different parts in the same rows run next to each other and
    share what they read.

    sums [2, NC, H, BT]: <k, dk> by what happens in the chunk and after it. through [NC, H]: <state before, its gradient
    through the state after>.
    """
    parts: tl.constexpr = 2 + (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % parts).to(tl.int32)
    pid //= parts
    i_r = (pid % (BT // BR)).to(tl.int32)
    i_ch = pid // (BT // BR)
    i_c, i_h = i_ch // H, i_ch % H
    i_b, begin, end = place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT)
    left = (end - begin).to(tl.int32)
    at = i_ch * BT
    o_t, o_k = i_r * BR + tl.arange(0, BR), tl.arange(0, BK)
    p_q += i_b * q_b + begin * q_t + i_h * q_h
    p_k += i_b * k_b + begin * k_t + i_h * k_h
    p_v += i_b * v_b + begin * v_t + i_h * v_h
    place = (i_b * T + begin) * H + i_h
    p_dh += place * V
    p_states += i_ch * K * V
    p_norms += i_ch * K
    p_dstates += i_ch * K * V
    p_dnorms += i_ch * K
    gates, where = (p_a, p_low, p_own, p_start, p_inverse), (at, tl.load(p_scales + i_ch * 4), i_r, left)
    o_out = o_t[:, None] * H
    inside = (o_t[:, None] < left) & (o_k[None, :] < K)
    if part == 0:
        b_dq = query_grad(
            p_k, p_v, p_dh, p_states, p_norms, p_delta, p_weight, gates, where, k_t, v_t, H * V, K, V, BR, BK, BV
        )
        tl.store(p_dq + place * K + o_out * K + o_k[None, :], b_dq.to(p_dq.dtype.element_ty), mask=inside)
    elif part == 1:
        write = write_weights(p_a, p_low, p_start, p_scales, i_ch, o_t, BT)
        read, strides = (p_q, p_k, p_v, p_dh, p_dstates, p_dnorms, p_delta), (q_t, k_t, v_t, H * V)
        b_dk = key_grad(read, p_sums, size, gates, where, write, strides, K, V, BT, BR, BK, BV)
        tl.store(p_dk + place * K + o_out * K + o_k[None, :], b_dk.to(p_dk.dtype.element_ty), mask=inside)
    else:
        o_v = (part - 2) * BV + tl.arange(0, BV)
        write = write_weights(p_a, p_low, p_start, p_scales, i_ch, o_t, BT)
        b_dv = value_grad(p_q, p_k, p_dh, p_dstates, gates, where, write, q_t, k_t, H * V, o_v, K, V, BT, BR, BK)
        mask = (o_t[:, None] < left) & (o_v[None, :] < V)
        tl.store(p_dv + place * V + o_out * V + o_v[None, :], b_dv.to(p_dv.dtype.element_ty), mask=mask)
        if (part == 2) & (i_r == 0):
            through = tl.sum(
                tl.load(p_norms + o_k, mask=o_k < K, other=0.0) * tl.load(p_dnorms + o_k, mask=o_k < K, other=0.0), 0
            )
            for j in range(0, V, BV):
                o_j = j + tl.arange(0, BV)
                b_C = load_rows(p_states, o_k, V, K, o_j, V).to(tl.float32)
                through += tl.sum(b_C * load_rows(p_dstates, o_k, V, K, o_j, V).to(tl.float32))
            tl.store(p_through + i_ch, through * tl.load(p_scales + i_ch * 4 + 1))


@triton.jit
def gate_grad_kernel(p_sums, p_through, p_f, p_di, p_df, T, per, H, size, p_cu, p_first, p_owner, BT: tl.constexpr):
    """di and df of one chunk of one head, from sums inside the chunk only: sums over the sequence would lose the small
    differences that df is.

    di_s = <k_s, dk_s>. dlogf_t is the sum over all pairs of a token before t and a row not before it; as <q_t, dq_t> =
    0, the pairs inside the chunk are minus those of a token from t on and any row.
    """
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // H, i_ch % H
    i_b, begin, end = place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT)
    o_t = tl.arange(0, BT)
    real = begin + o_t < end
    at = (i_b * T + begin + o_t) * H + i_h
    own = tl.load(p_sums + i_ch * BT + o_t).to(tl.float64)
    later = tl.load(p_sums + size + i_ch * BT + o_t).to(tl.float64)
    after = tl.sum(own, 0) - tl.cumsum(own, 0) + own
    dlogf = tl.cumsum(later, 0) - later - after + tl.load(p_through + i_ch)
    f = tl.load(p_f + at, mask=real, other=0.0).to(tl.float32)
    y = tl.exp(-tl.abs(f))
    slope = tl.where(f > 0, y, 1.0) / (1 + y)  # sigmoid(-f)
    df = tl.where(log_sigmoid(f) < FORGET_ALL, 0.0, dlogf.to(tl.float32) * slope)
    tl.store(p_di + at, (own + later).to(tl.float32).to(p_di.dtype.element_ty), mask=real)
    tl.store(p_df + at, df.to(p_df.dtype.element_ty), mask=real)
