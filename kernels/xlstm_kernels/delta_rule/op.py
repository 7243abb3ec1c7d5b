"""The public gated delta rule, over a sequence and for one token. Dims as in `reference`."""

import torch

from xlstm_kernels.backends.numerics import without_autocast
from xlstm_kernels.delta_rule.reference import delta_chunkwise, delta_recurrent
from xlstm_kernels.mix.op import mix
from xlstm_kernels.mlstm.op import check_sequence
from xlstm_kernels.step.op import check_token, window_step

BACKENDS = {"recurrent": delta_recurrent, "chunkwise": delta_chunkwise}


def delta(q, k, v, i, f, *, state=None, chunk_size=64, backend="chunkwise"):
    """Run T steps of the gated delta rule. Always returns `(h [B, T, H, V], MLSTMState)`.

    Calculates in float32, or in float64 if any input is, also under autocast.

    Args:
        q, k: [B, T, H, K], k of length 1 at the most; v: [B, T, H, V].
        i, f: before activation, [B, T, H]: what is corrected is the share sigmoid(i), what is kept sigmoid(f). i = -inf
            with f = +inf masks a token. f = -inf starts a document: everything before is forgotten.
        state: MLSTMState to go on from, of which C alone is read; None for a fresh one. Gradients flow through it.
        chunk_size: tokens per chunk; changes time and memory, not the result.
        backend: a key of `BACKENDS`.
    Returns:
        h in v's dtype, and the state after the last token in the dtype of the calculation.
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check_sequence(q, k, v, i, f, state, chunk_size)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {sorted(BACKENDS)}")
    with without_autocast(q.device):
        return BACKENDS[backend](q, k, v, i, f, state, chunk_size)


def delta_step(q, k, v, i, f, state):
    """`delta` for one token without gradients; C is overwritten. Returns h [B, 1, H, V].

    Args:
        q, k: [B, 1, H, K]; v: [B, 1, H, V]; i, f: [B, 1, H], before activation, any float dtype.
        state: MLSTMState, float32 or float64, the dtype of the calculation.
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check_token(q, k, v, i, f, state, "delta")
    dtype, C = state.C.dtype, state.C
    with torch.no_grad(), without_autocast(q.device):
        h, new = delta_recurrent(*(x.to(dtype) for x in (q, k, v, i, f)), state)
        C.copy_(new.C)
    return h.to(v.dtype)


def delta_hybrid_step(q, k, v, phi_q, phi_k, i, f, o, state, keys, values, index, *, sinks, scale=None, place=None):
    """`hybrid_step`, h [B, 1, H, V], with the gated delta rule instead of the mLSTM; the same arguments and errors."""
    memory = delta_step(phi_q, phi_k, v.repeat_interleave(q.shape[2] // v.shape[2], 2), i, f, state)
    return mix(memory, window_step(q, k, v, keys, values, index, sinks=sinks, scale=scale, place=place), o).to(v.dtype)
