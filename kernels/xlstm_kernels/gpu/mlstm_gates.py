"""The Triton kernels of the chunkwise mLSTM that see only gates. Dims and what the tensors hold: `mlstm_kernels`; BC chunks are scanned at a time."""

import triton
import triton.language as tl

from xlstm_kernels import reference

FORGET_ALL = tl.constexpr(reference.FORGET_ALL)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log_sigmoid(x):
    """log sigmoid(x) to the last digits also where it is nearly 0, as log(1 + y) is not: log1p(y) = 2 atanh(y / (2 + y))."""
    y = tl.exp(-tl.abs(x))
    z = y / (2 + y)  # at most 1/3
    u = z * z
    series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13 + u * (1 / 15)))))))
    return tl.minimum(x, 0.0) - 2 * z * series


@triton.jit
def finite(x):
    """x as it is subtracted: 0 where nothing has been written yet."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def place_of_chunk(i_c, T, per, p_cu, p_first, p_owner, BT: tl.constexpr):
    """(row of the batch, first token, end of the sequence) of chunk i_c; `per` chunks in a row if the sequences are not packed."""
    if p_cu is None:
        i_b, begin, end = i_c // per, (i_c % per) * BT, T
    else:
        i_n = tl.load(p_owner + i_c)
        i_b, begin, end = i_c * 0, tl.load(p_cu + i_n) + (i_c - tl.load(p_first + i_n)) * BT, tl.load(p_cu + i_n + 1)
    return i_b, begin, end


@triton.jit
def gate_kernel(p_i, p_f, p_a, p_low, p_own, p_start, p_total, p_weight, T, per, H, p_cu, p_first, p_owner, BT: tl.constexpr):
    """One chunk of one head: a, own, start, and for the scan over chunks the sum of log2 f and the sum of weights in the frame of the last row."""
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
def scan_kernel(p_own, p_start, p_total, p_weight, p_m, p_n, p_scales, p_m_last, p_ends, per, H, p_first, K: tl.constexpr, BT: tl.constexpr,
                BK: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One head of one sequence, BC chunks at a time: the frames of the states, m after the last token, and the scales [N, H, 2] that take the
    given state into the first frame and the last frame into that of m.

    The frame of a state is the log of the sum of all weights, which makes it a weighted mean of k v^T: no dtype is too small for that.
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
        start = tl.max(tl.where(before, tl.where(reset, o_c, -1)[None, :], -1), 1)  # the last chunk before which nothing is remembered
        x = tl.where(before & (o_c[None, :] >= start[:, None]), (peak + total - D)[None, :], float("-inf"))
        carried = tl.where(start >= 0, float("-inf"), m)
        top = tl.maximum(tl.max(x, 1), carried)
        zero = finite(top)
        sums = tl.sum(tl.exp2((x - zero[:, None]).to(tl.float32)) * added[None, :], 1) + tl.exp2((carried - zero).to(tl.float32)) * weight
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


@triton.jit
def gate_grad_kernel(p_sums, p_through, p_f, p_di, p_df, T, per, H, size, p_cu, p_first, p_owner, BT: tl.constexpr):
    """di and df of one chunk of one head, from sums inside the chunk only: sums over the sequence would lose the small differences that df is.

    di_s = <k_s, dk_s>. dlogf_t is the sum over all pairs of a token before t and a row not before it; as <q_t, dq_t> = 0, the pairs inside the
    chunk are minus those of a token from t on and any row.
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
