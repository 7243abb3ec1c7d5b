"""The gated delta rule: a memory that corrects what a key reads instead of adding to it. Dims: B batch, T tokens, H
heads, K query/key, V value, L tokens per chunk, N chunks.

    C_t = a_t (I - b_t k_t k_t^T) C_{t-1} + b_t k_t v_t^T      h_t = q_t C_t      a_t = sigmoid(f), b_t = sigmoid(i)

Yang et al. 2024 (arXiv 2412.06464). With keys of length 1 the state cannot grow, so there is no normaliser and no
stabiliser; the caller normalises q and k. In a chunk, with g_t the product of its a up to t, C_t = g_t C_0 + sum_{s<=t}
(g_t / g_s) k_s u_s^T, where

    u_t = b_t (v_t - g_t k_t C_0 - sum_{s<t} (g_t / g_s) (k_t k_s) u_s)

is a triangular system whose solution is linear in C_0: U = Y - X C_0, X and Y of all chunks at once. Only C goes from
chunk to chunk.

The contract is that of `mlstm`: i = -inf writes nothing, f = +inf forgets nothing, f = -inf starts a document, states
go in and out. They are `MLSTMState`s whose n and m are 0.
"""

import torch

from xlstm_kernels.mlstm.reference import MLSTMState, for_calculation, forget_gate


def state_of(C):
    """`MLSTMState` of a memory [B, H, K, V] that needs nothing beside it."""
    return MLSTMState(C, C.new_zeros(C.shape[:3]), C.new_zeros(C.shape[:2]))


def delta_recurrent(q, k, v, i, f, state=None, chunk_size=None):
    """One token after the other: the definition."""
    out_dtype = v.dtype
    q, k, v, i, f, (C, *_) = for_calculation(q, k, v, i, f, state)
    logf, starts = forget_gate(f)
    a, b, h = logf.masked_fill(starts, float("-inf")).exp()[..., None, None], torch.sigmoid(i)[..., None, None], []
    for t in range(q.shape[1]):
        key, value, C = k[:, t, :, :, None], v[:, t, :, None, :], a[:, t] * C
        C = C + b[:, t] * key * (value - key.transpose(-1, -2) @ C)
        h.append((q[:, t, :, None] @ C)[..., 0, :])
    return torch.stack(h, 1).to(out_dtype), state_of(C)


def in_chunks(x, L, fill):
    """[B, T, H, ...] -> [B, H, N, L, ...], the last chunk filled up with `fill`."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % L
    if missing:
        x = torch.cat([x, x.new_full((*x.shape[:2], missing, *x.shape[3:]), fill)], 2)
    return x.unflatten(2, (-1, L))


def delta_chunkwise(q, k, v, i, f, state=None, chunk_size=64):
    """Chunks of `chunk_size` tokens: O(T chunk_size) time and memory, and one short step per chunk after the other."""
    out_dtype, T, L = v.dtype, q.shape[1], min(chunk_size, q.shape[1])
    q, k, v, i, f, (C, *_) = for_calculation(q, k, v, i, f, state)
    logf, starts = forget_gate(f)
    q, k, v, b = (in_chunks(x, L, 0.0) for x in (q, k, v, torch.sigmoid(i)))  # [B, H, N, L, ...]; b = 0 writes nothing
    # Sums of log f cancel in differences: in float64, also for float32 inputs. A difference across a document start
    # means nothing.
    g, document = in_chunks(logf.double(), L, 0.0).cumsum(-1), in_chunks(starts, L, False).cumsum(-1)
    visible = torch.ones(L, L, dtype=torch.bool, device=q.device).tril() & (
        document[..., :, None] == document[..., None, :]
    )
    # [B, H, N, L, L] g_t / g_s
    inside = (g[..., :, None] - g[..., None, :]).masked_fill(~visible, float("-inf")).to(q.dtype).exp()
    # [B, H, N, L, 1] g_t, of the state carried in
    before = g.masked_fill(document > 0, float("-inf")).to(q.dtype).exp()[..., None]

    b = b[..., None]
    system = (b * (k @ k.transpose(-1, -2)) * inside).tril(-1)  # its diagonal of ones is understood
    X, Y = torch.linalg.solve_triangular(
        system, torch.cat([b * before * k, b * v], -1), upper=False, unitriangular=True
    ).split([k.shape[-1], v.shape[-1]], -1)
    last_k = (inside[..., -1, :, None] * k).transpose(-1, -2)  # what is left of each key at the end of its chunk
    states, written = [], []
    for n in range(q.shape[2]):
        states.append(C)
        U = Y[:, :, n] - X[:, :, n] @ C
        C = before[:, :, n, -1:] * C + last_k[:, :, n] @ U
        written.append(U)
    h = before * (q @ torch.stack(states, 2)) + (q @ k.transpose(-1, -2) * inside) @ torch.stack(written, 2)
    return h.flatten(2, 3)[:, :, :T].transpose(1, 2).to(out_dtype), state_of(C)
