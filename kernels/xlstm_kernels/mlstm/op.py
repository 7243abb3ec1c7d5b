"""The public mLSTM. Dims: B batch, T tokens, H heads, K query/key, V value, N packed sequences."""

import torch

from xlstm_kernels.backends.arguments import expect
from xlstm_kernels.backends.choose import Kernel, kernel_is_right, resolve_backend
from xlstm_kernels.backends.launch import LARGEST_K, LARGEST_V
from xlstm_kernels.backends.numerics import calculation_dtype, widest, without_autocast
from xlstm_kernels.mlstm.check import check_kernel
from xlstm_kernels.mlstm.cpu import mlstm_streaming
from xlstm_kernels.mlstm.reference import MLSTMState, mlstm_chunkwise, mlstm_parallel, mlstm_recurrent

KERNEL = Kernel("mlstm", {"K": LARGEST_K, "V": LARGEST_V}, check_kernel)


def mlstm_triton(*args):
    from xlstm_kernels.mlstm.triton import mlstm_triton as run  # needs triton

    return run(*args)


BACKENDS = {
    "recurrent": mlstm_recurrent,
    "chunkwise": mlstm_chunkwise,
    "parallel": mlstm_parallel,
    "streaming": mlstm_streaming,
    "triton": mlstm_triton,
}


def check_sequence(q, k, v, i, f, state, chunk_size, cu_seqlens=None):
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
    cu = cu_seqlens
    if cu is not None and (B != 1 or cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 [N + 1] and one row, got {cu.dtype} {list(cu.shape)}, B={B}"
        )
    if state is not None:
        check_state(state, B=B if cu is None else len(cu) - 1, H=H, K=K, V=V)


def check_state(state, B, H, K, V):
    """Raise ValueError unless the state fits."""
    if len(state) != 3:
        raise ValueError(f"state: expected (C, n, m), got {len(state)} tensors")
    expect("state.C", state[0], B=B, H=H, K=K, V=V)
    expect("state.n", state[1], B=B, H=H, K=K)
    expect("state.m", state[2], B=B, H=H)
    for name, x in zip("Cnm", state, strict=True):
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"state.{name}: expected float32 or float64, got {x.dtype}; pass the state on in the dtype it was "
                "returned in"
            )


def choose_backend(q, k, v, i, f, state):
    """What "auto" runs: the form with the least work for this device and length, of those that are right here."""
    calculation, dtype = calculation_dtype(q, k, v, i, f, *(state or ())), widest(q, k, v)
    if kernel_is_right(KERNEL, q, calculation, dtype, K=q.shape[-1], V=v.shape[-1]):
        return "triton"
    if q.shape[1] == 1:
        return "recurrent"
    # a graph for other runtimes has torch's own operations alone, and one chunk: they know neither our operators nor loops
    return "parallel" if torch.compiler.is_exporting() else "streaming"


def one_by_one(form, q, k, v, i, f, state, chunk_size, cu_seqlens):
    """A form that knows rows only, on each of the packed sequences."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != q.shape[1] or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
        ends = ends if len(ends) < 9 else [*ends[:8], "..."]
        raise ValueError(f"cu_seqlens: expected 0, increasing, up to T={q.shape[1]}, got {ends}")
    results = []
    for j, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        own = None if state is None else MLSTMState(*(x[j : j + 1] for x in state))
        results.append(form(*(x[:, a:b] for x in (q, k, v, i, f)), own, chunk_size))
    h, states = zip(*results, strict=True)
    return torch.cat(h, 1), [torch.cat(x) for x in zip(*states, strict=True)]


def mlstm(q, k, v, i, f, *, state=None, chunk_size=64, cu_seqlens=None, backend="auto"):
    """Run T steps of the mLSTM, h_t = (q_t C_t) / (q_t n_t). Always returns `(h [B, T, H, V], MLSTMState)`.

    The caller applies the feature maps; q is not scaled. Calculates in float32, or in float64 if any input is, also
    under autocast.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        i, f: gates before activation, [B, T, H]: write exp(i), keep sigmoid(f). i = -inf with f = +inf masks a token:
            it writes nothing and forgets nothing, its own h is finite and means nothing. f = -inf starts a document:
            everything before is forgotten.
        state: MLSTMState to go on from, float32 or float64; None for a fresh one. Gradients flow through C and n, never
            through m.
        chunk_size: tokens per chunk in the chunkwise forms; changes time and memory, not the result. The Triton kernels
            have their own.
        cu_seqlens: [N + 1] integers 0, ..., T: N sequences packed into one row (B = 1), each with its own state, so
            that C, n and m have N rows. Reading them waits for the GPU once. None: one sequence per row; documents in
            it may start by f = -inf.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Returns:
        h in v's dtype, and the state after the last token in the dtype of the calculation.
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check_sequence(q, k, v, i, f, state, chunk_size, cu_seqlens)
    backend = resolve_backend(backend, BACKENDS, q.device, lambda: choose_backend(q, k, v, i, f, state))
    form, args = BACKENDS[backend], (q, k, v, i, f, state, chunk_size)
    with without_autocast(q.device):
        if cu_seqlens is None:
            h, state = form(*args)
        else:
            h, state = form(*args, cu_seqlens) if backend == "triton" else one_by_one(form, *args, cu_seqlens)
    return h, MLSTMState(*state)
