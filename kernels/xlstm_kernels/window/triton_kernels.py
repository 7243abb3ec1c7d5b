"""Triton kernels of window attention with sinks. What they are for and how they fit together stands in `triton`.

Tokens are counted as if the padding had been taken out: the real token t of a row, 0 <= t < N, lies at place[t], its
document is [start[t], end[t]). Without padding and documents (PACKED false) these are t, 0 and T, and the four tensors
are None.

    t s   queries and keys                               n   tokens of a tile, where it may be either
    BT    queries of a tile      BS    keys of a tile    BN  sinks of a tile
    BK BV head dims K, V, rounded up to a power of 2     rate = scale log2(e): weights are exp2(rate (q k - lse))
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(p_x, p_place, n0, end, stride, D, BN, BD, PACKED, MASKED):
    """Tokens [n0, n0 + BN) of one head [BN, BD]. Columns from D on are 0, and tokens from `end` on if MASKED."""
    n, o_d = n0 + tl.arange(0, BN), tl.arange(0, BD)
    inside = n < end
    row = n
    if PACKED:
        row = tl.load(p_place + n, mask=inside, other=0)
    pointers = p_x + (row.to(tl.int64)[:, None] * stride + o_d[None, :])
    if MASKED:
        if D < BD:
            return tl.load(pointers, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if D < BD:
        return tl.load(pointers, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tokens(p_x, p_place, n0, end, stride, b_x, D, BN, BD, PACKED):
    """The inverse of `load_tokens`: writes [BN, BD] in p_x's dtype, tokens before `end` and columns before D only."""
    n, o_d = n0 + tl.arange(0, BN), tl.arange(0, BD)
    inside = n < end
    row = n
    if PACKED:
        row = tl.load(p_place + n, mask=inside, other=0)
    pointers = p_x + (row.to(tl.int64)[:, None] * stride + o_d[None, :])
    tl.store(pointers, b_x.to(p_x.dtype.element_ty), mask=inside[:, None] & (o_d < D)[None, :])


@triton.jit
def load_starts(p_start, n, N, PACKED: tl.constexpr):
    """Where the documents of the tokens n begin."""
    if PACKED:
        return tl.load(p_start + n, mask=n < N, other=0)
    return n * 0


@triton.jit
def band(t0, first, last_first, N, W, BT: tl.constexpr, BS: tl.constexpr):
    """Tiles of keys that the queries [t0, t0 + BT) read: (low, tiles before, clear, after). The clear ones are seen by
    every query as a whole.

    first, last_first: where the documents of the first and the last query begin. low is a multiple of BS: tiles of
        neighbouring queries
    are the same memory.
    """
    end = tl.minimum(t0 + BT, N)
    low = tl.maximum(first, t0 - W + 1) // BS * BS
    # the oldest key that the last query sees, rounded up
    clear = tl.maximum(tl.cdiv(tl.maximum(last_first, t0 + BT - W), BS) * BS, low)
    n_before = tl.cdiv(tl.minimum(clear, end) - low, BS)
    n_clear = tl.maximum((t0 + 1) // BS - clear // BS, 0)
    n_after = tl.maximum(tl.cdiv(end - clear - n_clear * BS, BS), 0)
    return low, n_before, n_clear, n_after


@triton.jit
def seen(t, s, first, W, S: tl.constexpr):
    """True where the query at t sees the key at s; first is where the document of t begins."""
    near = t - s < W
    if S > 0:
        near = near | (s - first < S)
    return (s <= t) & (s >= first) & near


@triton.jit
def absorb(b_h, b_l, b_m, b_s, b_v, rate, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the softmax over tiles of keys: sum of weighted values, sum of weights, largest exponent so far."""
    m = tl.maximum(b_m, tl.max(b_s, 1) * rate)
    finite = m
    if MASKED:
        finite = tl.where(m == float("-inf"), 0.0, m)  # this query has seen nothing yet
    b_p = tl.exp2(b_s * rate - finite[:, None])
    b_w = tl.exp2(b_m - finite)
    b_l = b_l * b_w + tl.sum(b_p, 1)
    b_h = tl.dot(b_p.to(b_v.dtype), b_v, b_h * b_w[:, None], input_precision=PRECISION)
    return b_h, b_l, m


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_h,
    p_lse,
    p_place,
    p_start,
    p_count,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_g,
    v_b,
    v_t,
    v_g,
    T,
    H,
    R,
    W,
    rate,
    S: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):  # too many for a line each
    """h [B, T, H, V] and lse [B, H, T] of one tile of queries of one head."""
    n_tiles = tl.cdiv(T, BT)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    t0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BT  # the tiles at the end have the most to do: they go first
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // R
    p_q, p_k, p_v = p_q + i_b * q_b + i_h * q_h, p_k + i_b * k_b + i_g * k_g, p_v + i_b * v_b + i_g * v_g
    p_h += (i_b * T * H + i_h) * V
    N, first, last_first = T, 0, 0
    if PACKED:
        p_place += i_b * T
        p_start += i_b * T
        N = tl.load(p_count + i_b)
        if t0 >= N:
            return
        first, last_first = tl.load(p_start + t0), tl.load(p_start + tl.minimum(t0 + BT, N) - 1)
    t = t0 + tl.arange(0, BT)
    low, n_before, n_clear, n_after = band(t0, first, last_first, N, W, BT, BS)

    b_q = load_tokens(p_q, p_place, t0, N, q_t, K, BT, BK, PACKED, True)  # [BT, BK]
    b_h = tl.zeros([BT, BV], tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_m = tl.full([BT], float("-inf"), tl.float32)
    starts = load_starts(p_start, t, N, PACKED)  # [BT]
    if S > 0:  # sinks that lie before the band; those of documents that begin later lie inside it
        sink_end = tl.minimum(first + S, low)
        for s0 in tl.range(first, sink_end, BN, num_stages=1):
            s = s0 + tl.arange(0, BN)
            b_k = load_tokens(p_k, p_place, s0, sink_end, k_t, K, BN, BK, PACKED, True)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BN]
            b_s = tl.where((s < sink_end)[None, :] & (starts == first)[:, None], b_s, float("-inf"))
            b_v = load_tokens(p_v, p_place, s0, sink_end, v_t, V, BN, BV, PACKED, True)
            b_h, b_l, b_m = absorb(b_h, b_l, b_m, b_s, b_v, rate, True, PRECISION)
    for j in range(0, n_before + n_after):
        s0 = low + (j + tl.where(j >= n_before, n_clear, 0)) * BS
        s = s0 + tl.arange(0, BS)
        b_k = load_tokens(p_k, p_place, s0, N, k_t, K, BS, BK, PACKED, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BS]
        b_s = tl.where(seen(t[:, None], s[None, :], starts[:, None], W, S), b_s, float("-inf"))
        b_v = load_tokens(p_v, p_place, s0, N, v_t, V, BS, BV, PACKED, True)
        b_h, b_l, b_m = absorb(b_h, b_l, b_m, b_s, b_v, rate, True, PRECISION)
    for j in range(n_before, n_before + n_clear):
        b_k = load_tokens(p_k, p_place, low + j * BS, N, k_t, K, BS, BK, PACKED, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_v = load_tokens(p_v, p_place, low + j * BS, N, v_t, V, BS, BV, PACKED, False)
        b_h, b_l, b_m = absorb(b_h, b_l, b_m, b_s, b_v, rate, False, PRECISION)
    b_l = tl.where(t < N, b_l, 1.0)
    store_tokens(p_h, p_place, t0, N, H * V, b_h / b_l[:, None], V, BT, BV, PACKED)
    tl.store(p_lse + i_bh * T + t, (b_m + tl.log2(b_l)) / rate, mask=t < N)


@triton.jit
def key_step(b_dk, b_dv, b_k, b_v, b_q, b_dh, b_lse, b_delta, rate, weigh, MASKED, PRECISION):
    """What a tile of queries adds to dk, without the scale, and dv of a tile of keys. Scores are [BS, BT]: no product
    is ever transposed.

    lse and delta are subtracted before the products are summed: there they need no registers of their own.
    """
    b_0 = tl.zeros([b_k.shape[0], b_q.shape[0]], tl.float32)
    b_s = tl.dot(b_k, tl.trans(b_q), b_0 - b_lse[None, :], input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(weigh, b_s, float("-inf"))
    b_p = tl.exp2(b_s * rate)
    b_dv = tl.dot(b_p.to(b_dh.dtype), b_dh, b_dv, input_precision=PRECISION)
    b_ds = b_p * tl.dot(b_v, tl.trans(b_dh), b_0 - b_delta[None, :], input_precision=PRECISION)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def prepare_kernel(
    p_q,
    p_k,
    p_v,
    p_h,
    p_dh,
    p_lse,
    p_delta,
    p_far,
    p_place,
    p_start,
    p_end,
    p_count,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_g,
    v_b,
    v_t,
    v_g,
    T,
    H,
    R,
    W,
    rate,
    CHUNK,
    S: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # too many for a line each
    """delta [B, H, T] = <dh, h>, and what the queries of a chunk add to dk and dv of sinks that have left their
    windows.

    A chunk is no longer than the window, so that these sinks belong to the document of its first token. far [B, H,
    chunks, S, K + V], dk without the scale.
    """
    n_chunks, n_sinks = tl.cdiv(T, CHUNK), tl.cdiv(S, BN) if S > 0 else 1
    i_j, i = tl.program_id(0) % n_sinks, tl.program_id(0) // n_sinks
    i_c, i_bh = i % n_chunks, (i // n_chunks).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // R
    p_q, p_k, p_v = p_q + i_b * q_b + i_h * q_h, p_k + i_b * k_b + i_g * k_g, p_v + i_b * v_b + i_g * v_g
    p_h, p_dh = p_h + (i_b * T * H + i_h) * V, p_dh + (i_b * T * H + i_h) * V
    c0 = i_c * CHUNK
    N, first, document_end = T, 0, T
    if PACKED:
        p_place += i_b * T
        N = tl.load(p_count + i_b)
        if c0 >= N:
            return
        first, document_end = tl.load(p_start + i_b * T + c0), tl.load(p_end + i_b * T + c0)
    end = tl.minimum(c0 + CHUNK, N)
    if S > 0:
        j = i_j * BN + tl.arange(0, BN)  # rank of the sink
        b_k = load_tokens(p_k, p_place, first + i_j * BN, document_end, k_t, K, BN, BK, PACKED, True)
        b_v = load_tokens(p_v, p_place, first + i_j * BN, document_end, v_t, V, BN, BV, PACKED, True)
        b_dk = tl.zeros([BN, BK], tl.float32)
        b_dv = tl.zeros([BN, BV], tl.float32)
    for t0 in range(c0, end, BT):
        t = t0 + tl.arange(0, BT)
        b_h = load_tokens(p_h, p_place, t0, end, H * V, V, BT, BV, PACKED, True)
        b_dh = load_tokens(p_dh, p_place, t0, end, H * V, V, BT, BV, PACKED, True)
        b_delta = tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        tl.store(p_delta + i_bh * T + t, b_delta, mask=t < tl.where(i_j == 0, end, 0))
        if S > 0:
            b_q = load_tokens(p_q, p_place, t0, end, q_t, K, BT, BK, PACKED, True)
            b_lse = tl.load(p_lse + i_bh * T + t, mask=t < end, other=float("inf"))
            far = (j < S)[:, None] & (t < document_end)[None, :] & (t[None, :] - (first + j)[:, None] >= W)
            b_dk, b_dv = key_step(b_dk, b_dv, b_k, b_v, b_q, b_dh, b_lse, b_delta, rate, far, True, PRECISION)
    if S > 0:
        p_j = p_far + (((i_bh * n_chunks + i_c) * S + j) * (K + V))[:, None]
        o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
        tl.store(p_j + o_k[None, :], b_dk, mask=(j < S)[:, None] & (o_k < K)[None, :])
        tl.store(p_j + K + o_v[None, :], b_dv, mask=(j < S)[:, None] & (o_v < V)[None, :])


@triton.jit
def key_kernel(
    p_q,
    p_k,
    p_v,
    p_dh,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_place,
    p_start,
    p_end,
    p_count,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_g,
    v_b,
    v_t,
    v_g,
    T,
    H,
    R,
    W,
    rate,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):  # too many for a line each
    """dk [B, T, G, K], dv [B, T, G, V] of one tile of keys, from queries less than W later, all heads of the group."""
    n_tiles = tl.cdiv(T, BS)
    i_bg = (tl.program_id(0) // n_tiles).to(tl.int64)
    s0 = tl.program_id(0) % n_tiles * BS
    G = H // R
    i_b, i_g = i_bg // G, i_bg % G
    p_k, p_v, p_q = p_k + i_b * k_b + i_g * k_g, p_v + i_b * v_b + i_g * v_g, p_q + i_b * q_b
    p_dk, p_dv, p_dh = p_dk + (i_b * T * G + i_g) * K, p_dv + (i_b * T * G + i_g) * V, p_dh + i_b * T * H * V
    N, first_end, last_end = T, T, T
    if PACKED:
        p_place += i_b * T
        p_start += i_b * T
        p_end += i_b * T
        N = tl.load(p_count + i_b)
        if s0 >= N:
            return
        first_end, last_end = tl.load(p_end + s0), tl.load(p_end + tl.minimum(s0 + BS, N) - 1)
    s = s0 + tl.arange(0, BS)
    end = tl.minimum(last_end, s0 + BS - 1 + W)  # queries from here on see none of these keys, unless as sinks
    n_tail = tl.cdiv(end - s0, BT)
    clear: tl.constexpr = (BS + BT - 1) // BT  # tiles of queries from here on are later than all keys
    # and up to here they are near all of them
    n_clear = tl.maximum(tl.minimum(s0 + W, first_end) - s0, clear * BT) // BT
    n_masked = tl.minimum(clear, n_tail)

    b_k = load_tokens(p_k, p_place, s0, N, k_t, K, BS, BK, PACKED, True)  # [BS, BK]
    b_v = load_tokens(p_v, p_place, s0, N, v_t, V, BS, BV, PACKED, True)  # [BS, BV]
    b_dk = tl.zeros([BS, BK], tl.float32)
    b_dv = tl.zeros([BS, BV], tl.float32)
    for r in range(0, R):
        i_h = i_g * R + r
        p_qh, p_dhh, row = p_q + i_h * q_h, p_dh + i_h * V, (i_b * H + i_h) * T
        for j in range(0, n_masked + tl.maximum(n_tail - n_clear, 0)):
            t0 = s0 + (j + tl.where(j >= clear, n_clear - clear, 0)) * BT
            t = t0 + tl.arange(0, BT)
            b_q = load_tokens(p_qh, p_place, t0, N, q_t, K, BT, BK, PACKED, True)
            b_dh = load_tokens(p_dhh, p_place, t0, N, H * V, V, BT, BV, PACKED, True)
            b_lse = tl.load(p_lse + row + t, mask=t < N, other=float("inf"))
            b_delta = tl.load(p_delta + row + t, mask=t < N, other=0.0)
            near = seen(t[None, :], s[:, None], load_starts(p_start, t, N, PACKED)[None, :], W, 0)
            b_dk, b_dv = key_step(b_dk, b_dv, b_k, b_v, b_q, b_dh, b_lse, b_delta, rate, near, True, PRECISION)
        for j in range(clear, n_clear):
            t0 = s0 + j * BT
            t = t0 + tl.arange(0, BT)
            b_q = load_tokens(p_qh, p_place, t0, N, q_t, K, BT, BK, PACKED, False)
            b_dh = load_tokens(p_dhh, p_place, t0, N, H * V, V, BT, BV, PACKED, False)
            b_lse, b_delta = tl.load(p_lse + row + t), tl.load(p_delta + row + t)
            b_dk, b_dv = key_step(b_dk, b_dv, b_k, b_v, b_q, b_dh, b_lse, b_delta, rate, True, False, PRECISION)
    store_tokens(p_dk, p_place, s0, N, G * K, b_dk * scale, K, BS, BK, PACKED)
    store_tokens(p_dv, p_place, s0, N, G * V, b_dv, V, BS, BV, PACKED)


@triton.jit
def query_step(b_dq, b_dh, b_lse, b_delta, b_s, b_k, b_v, rate, PRECISION: tl.constexpr):
    """What a tile of keys adds to dq, without the scale."""
    b_p = tl.exp2(b_s * rate - b_lse[:, None])
    b_dp = tl.dot(b_dh, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def query_kernel(
    p_q,
    p_k,
    p_v,
    p_dh,
    p_lse,
    p_delta,
    p_dq,
    p_place,
    p_start,
    p_count,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_g,
    v_b,
    v_t,
    v_g,
    T,
    H,
    R,
    W,
    rate,
    scale,
    S: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):  # too many for a line each
    """dq [B, T, H, K] of one tile of queries of one head; the keys are read as in `forward_kernel`."""
    n_tiles = tl.cdiv(T, BT)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    t0 = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BT
    i_b, i_h = i_bh // H, i_bh % H
    i_g = i_h // R
    p_q, p_k, p_v = p_q + i_b * q_b + i_h * q_h, p_k + i_b * k_b + i_g * k_g, p_v + i_b * v_b + i_g * v_g
    p_dh, p_dq = p_dh + (i_b * T * H + i_h) * V, p_dq + (i_b * T * H + i_h) * K
    N, first, last_first = T, 0, 0
    if PACKED:
        p_place += i_b * T
        p_start += i_b * T
        N = tl.load(p_count + i_b)
        if t0 >= N:
            return
        first, last_first = tl.load(p_start + t0), tl.load(p_start + tl.minimum(t0 + BT, N) - 1)
    t = t0 + tl.arange(0, BT)
    low, n_before, n_clear, n_after = band(t0, first, last_first, N, W, BT, BS)

    b_q = load_tokens(p_q, p_place, t0, N, q_t, K, BT, BK, PACKED, True)  # [BT, BK]
    b_dh = load_tokens(p_dh, p_place, t0, N, H * V, V, BT, BV, PACKED, True)  # [BT, BV]
    b_lse = tl.load(p_lse + i_bh * T + t, mask=t < N, other=float("inf")) * rate
    b_delta = tl.load(p_delta + i_bh * T + t, mask=t < N, other=0.0)
    b_dq = tl.zeros([BT, BK], tl.float32)
    starts = load_starts(p_start, t, N, PACKED)  # [BT]
    if S > 0:
        sink_end = tl.minimum(first + S, low)
        for s0 in tl.range(first, sink_end, BN, num_stages=1):
            s = s0 + tl.arange(0, BN)
            b_k = load_tokens(p_k, p_place, s0, sink_end, k_t, K, BN, BK, PACKED, True)
            b_v = load_tokens(p_v, p_place, s0, sink_end, v_t, V, BN, BV, PACKED, True)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BN]
            b_s = tl.where((s < sink_end)[None, :] & (starts == first)[:, None], b_s, float("-inf"))
            b_dq = query_step(b_dq, b_dh, b_lse, b_delta, b_s, b_k, b_v, rate, PRECISION)
    for j in range(0, n_before + n_after):
        s0 = low + (j + tl.where(j >= n_before, n_clear, 0)) * BS
        s = s0 + tl.arange(0, BS)
        b_k = load_tokens(p_k, p_place, s0, N, k_t, K, BS, BK, PACKED, True)
        b_v = load_tokens(p_v, p_place, s0, N, v_t, V, BS, BV, PACKED, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BT, BS]
        b_s = tl.where(seen(t[:, None], s[None, :], starts[:, None], W, S), b_s, float("-inf"))
        b_dq = query_step(b_dq, b_dh, b_lse, b_delta, b_s, b_k, b_v, rate, PRECISION)
    for j in range(n_before, n_before + n_clear):
        b_k = load_tokens(p_k, p_place, low + j * BS, N, k_t, K, BS, BK, PACKED, False)
        b_v = load_tokens(p_v, p_place, low + j * BS, N, v_t, V, BS, BV, PACKED, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dq = query_step(b_dq, b_dh, b_lse, b_delta, b_s, b_k, b_v, rate, PRECISION)
    store_tokens(p_dq, p_place, t0, N, H * K, b_dq * scale, K, BT, BK, PACKED)


@triton.jit
def sink_kernel(
    p_far,
    p_dk,
    p_dv,
    p_place,
    p_start,
    p_end,
    p_count,
    T,
    H,
    R,
    W,
    scale,
    CHUNK,
    S: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):  # too many for a line each
    """Add to dk and dv of one sink what all chunks of its document and all heads of the group have for it, in a fixed
    order.

    The program of the first chunk that begins in the document does it, BC partial sums at a time.
    """
    n_chunks, D = tl.cdiv(T, CHUNK), K + V
    n_leaders, n_d = n_chunks if PACKED else 1, tl.cdiv(D, BD)
    i_d, i = tl.program_id(0) % n_d, tl.program_id(0) // n_d
    j, i_c, i_bg = i % S, i // S % n_leaders, (i // S // n_leaders).to(tl.int64)
    G = H // R
    i_b, i_g = i_bg // G, i_bg % G
    c0 = i_c * CHUNK
    first, end = 0, T
    if PACKED:
        if c0 >= tl.load(p_count + i_b):
            return
        first, end = tl.load(p_start + i_b * T + c0), tl.load(p_end + i_b * T + c0)
    if (c0 - CHUNK >= first) | (first + j + W >= end):
        return
    o_d = i_d * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    entries = (tl.cdiv(end, CHUNK) - i_c) * R
    for n0 in range(0, entries, BC):
        n = n0 + tl.arange(0, BC)
        i_n = (i_b * H + i_g * R + n % R) * n_chunks + i_c + n // R
        b_far = tl.load(
            p_far + ((i_n * S + j) * D)[:, None] + o_d[None, :],
            mask=(n < entries)[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_far, 0)
    row = i_b * T + first + j
    if PACKED:
        row = i_b * T + tl.load(p_place + row)
    p_dk, p_dv = p_dk + (row * G + i_g) * K + o_d, p_dv + (row * G + i_g) * V + o_d - K
    in_k, in_v = o_d < K, (o_d >= K) & (o_d < D)
    tl.store(p_dk, (tl.load(p_dk, mask=in_k, other=0.0) + b_sum * scale).to(p_dk.dtype.element_ty), mask=in_k)
    tl.store(p_dv, (tl.load(p_dv, mask=in_v, other=0.0) + b_sum).to(p_dv.dtype.element_ty), mask=in_v)
