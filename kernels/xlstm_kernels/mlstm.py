"""The public mLSTM. Dims: B batch, T tokens, H heads, K query/key, V value."""

import torch

from xlstm_kernels.cpu import mlstm_streaming
from xlstm_kernels.reference import MLSTMState, mlstm_chunkwise, mlstm_parallel, mlstm_recurrent

BACKENDS = {"recurrent": mlstm_recurrent, "chunkwise": mlstm_chunkwise, "parallel": mlstm_parallel, "streaming": mlstm_streaming}


def expect(name, x, **dims):
    """Raise ValueError unless x has the sizes `dims` and a floating dtype."""
    if tuple(x.shape) != tuple(dims.values()):
        raise ValueError(f"{name}: expected {dims}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def check(q, k, v, i, f, state, chunk_size):
    """Raise ValueError for anything `mlstm` cannot run on; values are not looked at."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, v: expected [B, T, H, K] and [B, T, H, V], got {list(q.shape)} and {list(v.shape)}")
    (B, T, H, K), V = q.shape, v.shape[-1]
    if not T:
        raise ValueError("q: expected at least one token, got T=0")
    expect("q", q, B=B, T=T, H=H, K=K)
    expect("k", k, B=B, T=T, H=H, K=K)
    expect("v", v, B=B, T=T, H=H, V=V)
    expect("i", i, B=B, T=T, H=H)
    expect("f", f, B=B, T=T, H=H)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}: expected an integer of at least 1")
    if state is None:
        return
    if len(state) != 3:
        raise ValueError(f"state: expected (C, n, m), got {len(state)} tensors")
    expect("state.C", state[0], B=B, H=H, K=K, V=V)
    expect("state.n", state[1], B=B, H=H, K=K)
    expect("state.m", state[2], B=B, H=H)
    for name, x in zip("Cnm", state, strict=True):
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"state.{name}: expected float32 or float64, got {x.dtype}; pass the state on in the dtype it was returned in")


def choose_backend(q):
    """What "auto" runs: the form with the least work for this device and length."""
    if q.is_cuda and "triton" in BACKENDS:
        return "triton"
    return "recurrent" if q.shape[1] == 1 else "streaming"


def mlstm(q, k, v, i, f, *, state=None, chunk_size=64, backend="auto"):
    """Run T steps of the mLSTM, h_t = (q_t C_t) / (q_t n_t). Always returns `(h [B, T, H, V], MLSTMState)`.

    The caller applies the feature maps; q is not scaled. Calculates in float32, or in float64 if any input is, also under autocast.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        i, f: gates before activation, [B, T, H]: write exp(i), keep sigmoid(f). i = -inf with f = +inf masks a token: it writes nothing
            and forgets nothing, its own h is finite and means nothing. f = -inf starts a document: everything before is forgotten.
        state: MLSTMState to go on from, float32 or float64; None for a fresh one. Gradients flow through C and n, never through m.
        chunk_size: tokens per chunk in the chunkwise forms; changes time and memory, not the result.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Returns:
        h in v's dtype, and the state after the last token in the dtype of the calculation.
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check(q, k, v, i, f, state, chunk_size)
    if backend == "auto":
        backend = choose_backend(q)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {sorted(BACKENDS)}")
    with torch.autocast(q.device.type, enabled=False):  # autocast would run the matrix products in half precision
        h, state = BACKENDS[backend](q, k, v, i, f, state, chunk_size)
    return h, MLSTMState(*state)
