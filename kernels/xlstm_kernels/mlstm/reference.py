"""The mLSTM in plain PyTorch: recurrent (the truth), chunkwise, parallel. Dims: B batch, T tokens, H heads, K
query/key, V value.

    C_t = f_t C_{t-1} + i_t k_t v_t^T      n_t = f_t n_{t-1} + i_t k_t      h_t = (q_t C_t) / (q_t n_t)
    i_t = exp(i), f_t = sigmoid(f)         Beck et al. 2024, with the pure-ratio normaliser of Hauzenberger et al. 2026

C and n are stored divided by exp(m), m_t = max(log f_t + m_{t-1}, i_t), so that nothing overflows. h does not depend on
m, hence m carries no gradient, the carried one included. A fresh state is C = 0, n = 0, m = -inf. 0 stands for an
infinite m wherever m is subtracted.

The forms share one contract: q, k [B, T, H, K], v [B, T, H, V], i, f [B, T, H] (gates before activation), state an
MLSTMState or None for a fresh one; they return (h [B, T, H, V] in v's dtype, MLSTMState). i = -inf writes nothing, f =
+inf forgets nothing, f = -inf starts a document. Shapes are checked in `op`, not here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from xlstm_kernels.backends.numerics import calculation_dtype, finite, ratio

# A log forget gate below this starts a document, as -inf does: nothing survives it in any dtype, and larger numbers
# would
# drown the neighbours they are summed with.
FORGET_ALL = -1e4


class MLSTMState(NamedTuple):
    """Memory C [B, H, K, V], normaliser n [B, H, K], their log-scale m [B, H]: the true ones are exp(m) C, exp(m) n."""

    C: torch.Tensor
    n: torch.Tensor
    m: torch.Tensor


def fresh_state(q, v, dtype):
    """The state in which nothing has been written, for q [B, T, H, K] and v [B, T, H, V]."""
    B, _, H, K = q.shape
    options = {"dtype": dtype, "device": q.device}
    return MLSTMState(
        torch.zeros(B, H, K, v.shape[-1], **options),
        torch.zeros(B, H, K, **options),
        torch.full((B, H), float("-inf"), **options),
    )


def for_calculation(q, k, v, i, f, state):
    """Cast everything to the dtype of the calculation; a missing state is a fresh one."""
    dtype = calculation_dtype(q, k, v, i, f, *(state or ()))
    q, k, v, i, f = (x.to(dtype) for x in (q, k, v, i, f))
    state = fresh_state(q, v, dtype) if state is None else MLSTMState(*(x.to(dtype) for x in state))
    return q, k, v, i, f, state._replace(m=state.m.detach())


def forget_gate(f):
    """log sigmoid(f), and where a document starts; log f is 0 there: the mask alone carries the start."""
    starts = F.logsigmoid(f.detach()) < FORGET_ALL
    return F.logsigmoid(f.masked_fill(starts, float("inf"))), starts


def mlstm_recurrent(q, k, v, i, f, state=None, chunk_size=None):
    """One token after the other: O(T) time, T steps in a row. The definition every other form is held to."""
    out_dtype = v.dtype
    q, k, v, i, f, (C, n, m) = for_calculation(q, k, v, i, f, state)
    logf, starts = forget_gate(f)
    logf = logf.masked_fill(starts, float("-inf"))
    h = []
    for t in range(q.shape[1]):
        m_old, m = m, torch.maximum(logf[:, t].detach() + m, i[:, t].detach())
        # m_old - m first: it is exact where they are close, so that what rounding m loses goes into C and n, not away
        decay = (logf[:, t] + (m_old - finite(m))).exp()  # [B, H]
        write = (i[:, t] - finite(m)).exp()  # [B, H]
        write_k = write[..., None] * k[:, t]  # [B, H, K]
        C = decay[..., None, None] * C + write_k[..., None] * v[:, t, :, None]
        n = decay[..., None] * n + write_k
        num = torch.einsum("bhk,bhkv->bhv", q[:, t], C)
        den = (q[:, t] * n).sum(-1, keepdim=True)
        h.append(ratio(num, den))
    return torch.stack(h, 1).to(out_dtype), MLSTMState(C, n, m)


def one_chunk(q, k, v, i, logf, starts, state):
    """h [B, H, L, V] and the next state of L tokens at once: q, k, v [B, H, L, K|V], i, logf, starts [B, H, L]."""
    C, n, m = state
    # Sums of log f cancel in differences: in float64, also for float32 inputs. A difference across a document start
    # means nothing.
    b, document = logf.double().cumsum(-1), starts.cumsum(-1)
    causal = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    visible = causal & (document[..., :, None] == document[..., None, :])  # [B, H, L, L]
    log_intra = b[..., :, None] - b[..., None, :] + i.double()[..., None, :]
    log_intra = log_intra.masked_fill(~visible, float("-inf"))  # token s as token t sees it
    # [B, H, L] the carried state as token t sees it
    log_inter = (b + m.double()[..., None]).masked_fill(document > 0, float("-inf"))

    m = torch.maximum(log_intra.amax(-1), log_inter).detach().to(q.dtype)  # [B, H, L] rounded before it is subtracted
    intra = (log_intra - finite(m).double()[..., None]).to(q.dtype).exp()
    inter = (log_inter - finite(m).double()).to(q.dtype).exp()[..., None]  # [B, H, L, 1]

    scores = (q @ k.transpose(-1, -2)) * intra
    num = scores @ v + inter * (q @ C)
    den = scores.sum(-1, keepdim=True) + inter * (q @ n[..., None])
    write_k = intra[..., -1, :, None] * k  # the last row says what is left of each token at the end
    C = inter[..., -1, :, None] * C + write_k.transpose(-1, -2) @ v
    n = inter[..., -1, :] * n + write_k.sum(-2)
    return ratio(num, den), MLSTMState(C, n, m[..., -1])


def mlstm_chunkwise(q, k, v, i, f, state=None, chunk_size=64):
    """Chunks of `chunk_size` tokens one after the other, the last may be shorter: O(T chunk_size) time and memory."""
    out_dtype = v.dtype
    q, k, v, i, f, state = for_calculation(q, k, v, i, f, state)
    logf, starts = forget_gate(f)
    chunks = zip(*(x.transpose(1, 2).split(chunk_size, 2) for x in (q, k, v, i, logf, starts)), strict=True)
    h = []
    for chunk in chunks:
        h_chunk, state = one_chunk(*chunk, state)
        h.append(h_chunk)
    return torch.cat(h, 2).transpose(1, 2).to(out_dtype), state


def mlstm_parallel(q, k, v, i, f, state=None, chunk_size=None):
    """All tokens at once: O(T^2) time and memory. The form that compares to softmax attention line by line."""
    out_dtype = v.dtype
    q, k, v, i, f, state = for_calculation(q, k, v, i, f, state)
    h, state = one_chunk(*(x.transpose(1, 2) for x in (q, k, v, i, *forget_gate(f))), state)
    return h.transpose(1, 2).to(out_dtype), state
