"""The public sLSTM. Dims: B batch, T tokens, H heads, V units per head."""

import torch

from xlstm_kernels.backends.arguments import expect
from xlstm_kernels.backends.choose import Kernel, kernel_is_right, resolve_backend
from xlstm_kernels.backends.numerics import calculation_dtype, wants_gradients, without_autocast
from xlstm_kernels.slstm.check import check_kernel
from xlstm_kernels.slstm.cpu import slstm_fused
from xlstm_kernels.slstm.reference import FORGETS, SLSTMState, fresh_slstm_state, slstm_recurrent

KERNEL = Kernel("slstm", {"V": 128}, check_kernel)


def slstm_triton(*args):
    from xlstm_kernels.slstm.triton import slstm_triton as run  # needs triton

    return run(*args)


BACKENDS = {"recurrent": slstm_recurrent, "fused": slstm_fused, "triton": slstm_triton}


def choose_backend(x, r, state):
    """What "auto" runs."""
    tensors = x, r, *(state or ())
    if kernel_is_right(KERNEL, x, calculation_dtype(*tensors), r.dtype, V=x.shape[-1]):
        return "triton"
    return "recurrent" if x.shape[1] == 1 and not wants_gradients(*tensors) else "fused"


def check_arguments(x, r, real, start, state, forget):
    """Raise ValueError for anything `slstm` cannot run on; values are not looked at."""
    if x.dim() != 5 or x.shape[2] != 4 or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"x: expected floating [B, T, 4, H, V] with at least one token, got {x.dtype} {list(x.shape)}")
    B, T, _, H, V = x.shape
    expect("r", r, gates=4, H=H, V=V, W=V)
    for name, mask in (("real", real), ("start", start)):
        if mask is not None:
            expect(name, mask, "bool", B=B, T=T)
    if state is not None:
        fits = [tuple(s.shape) == (B, H, V) and s.dtype in (torch.float32, torch.float64) for s in state]
        if len(state) != 4 or not all(fits):
            got = [f"{s.dtype} {list(s.shape)}" for s in state]
            raise ValueError(
                f"state: expected four float32 or float64 {[B, H, V]}, got {got}; pass the state on as it was returned"
            )
    if forget not in FORGETS:
        raise ValueError(f"forget={forget!r} is not one of {list(FORGETS)}")


def slstm(x, r, *, real=None, start=None, state=None, forget="sigmoid", backend="auto"):
    """Run T steps of the sLSTM. Always returns `(h [B, T, H, V], SLSTMState)`.

    Calculates in float32, or in float64 if any input is.

    Args:
        x: what the input gives to the pre-activations z, i, f, o, biases included, [B, T, 4, H, V]; finite where a
            token is real.
        r: recurrent weights, [4, H, V, V]: unit v of a head's h_{t-1} adds h[v] r[g, head, v, w] to pre-activation g of
            unit w.
        real: [B, T] bool; a token where it is False changes nothing, its h is that of the token before and means
            nothing. None: all are.
        start: [B, T] bool; True starts a document: everything before is forgotten, h included. None: nowhere.
        state: SLSTMState to go on from, float32 or float64; None for a fresh one. Gradients flow through h, c and n,
            never through m.
        forget: "sigmoid" or "exp".
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Returns:
        h in x's dtype, and the state after the last token in the dtype of the calculation.
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check_arguments(x, r, real, start, state, forget)
    backend = resolve_backend(backend, BACKENDS, x.device, lambda: choose_backend(x, r, state))
    dtype = calculation_dtype(x, r, *(state or ()))
    state = fresh_slstm_state(x, dtype) if state is None else SLSTMState(*(s.to(dtype) for s in state))
    state = state._replace(m=state.m.detach())
    with without_autocast(x.device):
        weight = r if backend == "triton" else r.to(dtype)  # that one multiplies in the dtype of r
        h, state = BACKENDS[backend](x.to(dtype), weight, real, start, state, forget)
    return h.to(x.dtype), state
