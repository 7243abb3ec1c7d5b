"""The sLSTM: scalar memories with exponential gates that see the step before. Dims: B batch, T tokens, H heads, V units per head.

    a_t = x_t + h_{t-1} R                       four pre-activations z, i, f, o per unit; R is block-diagonal: a head sees its own h only
    c_t = f_t c_{t-1} + i_t tanh(z)             n_t = f_t n_{t-1} + i_t             h_t = sigmoid(o) c_t / n_t
    i_t = exp(i)                                f_t = sigmoid(f), or exp(f)         Beck et al. 2024, METHOD 3

c and n are stored divided by exp(m), m_t = max(log f_t + m_{t-1}, i_t). h does not depend on m, hence m carries no gradient. A fresh state is
h = c = n = 0, m = -inf; after the first write n >= 1, so that c / n, a mean of past tanh(z), never cancels.

A step needs the h of the step before: there is no chunkwise form. `recurrent` is the definition; `fused` is the same loop with its own backward
(elementwise work of all tokens at once, the gradient of R in one product); `triton` keeps the loop on the GPU.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from xlstm_kernels.dispatch import resolve
from xlstm_kernels.reference import calculation_dtype, finite, ratio, without_autocast

LARGEST_UNITS = 128  # units per head that the Triton kernels have tiles for
FORGETS = ("sigmoid", "exp")


class SLSTMState(NamedTuple):
    """Output h, memory c, normaliser n and their log-scale m, each [B, H, V]: the true memory is exp(m) c."""

    h: torch.Tensor
    c: torch.Tensor
    n: torch.Tensor
    m: torch.Tensor


def fresh_slstm_state(x, dtype):
    """The state in which nothing has been written, for x [B, T, 4, H, V]."""
    shape = x.shape[0], *x.shape[3:]
    zeros = (torch.zeros(shape, dtype=dtype, device=x.device) for _ in range(3))
    return SLSTMState(*zeros, torch.full(shape, float("-inf"), dtype=dtype, device=x.device))


def log_forget(f, forget):
    return F.logsigmoid(f) if forget == "sigmoid" else f


def slstm_recurrent(x, r, real, start, state, forget):
    """One token after the other, for autograd: the definition that every other form is held to."""
    outputs = []
    h, c, n, m = state
    for t in range(x.shape[1]):
        if start is not None:
            begins = start[:, t, None, None]
            h, c, n, m = (torch.where(begins, fresh, old) for old, fresh in ((h, 0.0), (c, 0.0), (n, 0.0), (m, float("-inf"))))
        z, i, f, o = (x[:, t] + torch.einsum("bhv,ghvw->bghw", h, r)).unbind(1)  # [B, H, V] each
        logf = log_forget(f, forget)
        new_m = torch.maximum(logf.detach() + m, i.detach())
        keep = (logf + (m - finite(new_m))).exp()
        write = (i - finite(new_m)).exp()
        new_c = keep * c + write * torch.tanh(z)
        new_n = keep * n + write
        new = torch.sigmoid(o) * ratio(new_c, new_n), new_c, new_n, new_m
        if real is not None:
            new = (torch.where(real[:, t, None, None], fresh, old) for fresh, old in zip(new, (h, c, n, m), strict=True))
        h, c, n, m = new
        outputs.append(h)
    return torch.stack(outputs, 1), SLSTMState(h, c, n, m)


def time_major(x, r, real, start):
    """x as [T, H, B, 4 V], a copy; r as [H, V, 4 V]; the masks as [T, 1, B, 1]."""
    B, T, _, H, V = x.shape
    masks = (None if mask is None else mask.t()[:, None, :, None] for mask in (real, start))
    mine = x.permute(1, 3, 0, 2, 4).reshape(T, H, B, 4 * V).clone(memory_format=torch.contiguous_format)  # a view where a size is 1
    return mine, r.permute(1, 2, 0, 3).reshape(H, V, 4 * V), *masks


def run_loop(a, weight, real, start, state, forget):
    """All steps without gradients; a [T, H, B, 4 V] becomes the pre-activations. Returns h, c, n, m, [T + 1, H, B, V] each, the given state first."""
    T, H, B, V = *a.shape[:3], a.shape[3] // 4
    h, m = (a.new_empty(T + 1, H, B, V) for _ in range(2))
    cn = a.new_empty(T + 1, H, B, 2, V)
    h[0], m[0] = state.h.transpose(0, 1), state.m.transpose(0, 1)
    cn[0, :, :, 0], cn[0, :, :, 1] = state.c.transpose(0, 1), state.n.transpose(0, 1)
    scale, written = a.new_empty(H, B, 2, V), a.new_ones(H, B, 2, V)  # exponents of keep and write; (tanh(z), 1)
    for t in range(T):
        past_h, past_cn, past_m, new_m = h[t], cn[t], m[t], m[t + 1]
        if start is not None:
            past_h, past_m = past_h.masked_fill(start[t], 0.0), past_m.masked_fill(start[t], float("-inf"))
            past_cn = past_cn.masked_fill(start[t][..., None], 0.0)
        z, i, f, o = a[t].baddbmm_(past_h, weight).view(H, B, 4, V).unbind(2)
        torch.add(log_forget(f, forget), past_m, out=scale[:, :, 0])
        scale[:, :, 1].copy_(i)
        torch.amax(scale, 2, out=new_m)
        scale.sub_(new_m[:, :, None]).exp_()
        torch.tanh(z, out=written[:, :, 0])
        new = torch.mul(past_cn, scale[:, :, :1], out=cn[t + 1]).addcmul_(scale[:, :, 1:], written)
        torch.div(new[:, :, 0], new[:, :, 1], out=h[t + 1]).mul_(torch.sigmoid(o))
        if real is not None:  # a masked token leaves everything as it was; its own numbers may be anything
            for mine, old in ((h, past_h), (m, past_m), (cn, past_cn)):
                mine[t + 1] = torch.where(real[t] if mine is not cn else real[t][..., None], mine[t + 1], old)
    return h, *cn.unbind(3), m


def before(values, start, fresh):
    """What each step saw of h, c, n or m, [T, H, B, V]."""
    return values[:-1] if start is None else values[:-1].masked_fill(start, fresh)


def run_loop_backward(a, weight, real, start, forget, states, gradients):
    """Backpropagation through time. gradients: of h [T, H, B, V] and of the last c and n [H, B, V].

    Returns da [T, H, B, 4 V] and the gradients of the first h, c, n.
    """
    h, c, n, m = states
    T, H, B, V = *a.shape[:3], a.shape[3] // 4
    z, i, f, o = a.view(T, H, B, 4, V).unbind(3)
    old_c, old_n, old_m = before(c, start, 0.0), before(n, start, 0.0), before(m, start, float("-inf"))
    z, o, base = torch.tanh(z), torch.sigmoid(o), finite(m[1:])
    keep, write = (log_forget(f, forget) + (old_m - base)).exp(), (i - base).exp()
    slope = torch.sigmoid(-f) if forget == "sigmoid" else torch.ones_like(f)  # of log f
    mean = ratio(c[1:], n[1:])
    to_c = ratio(o, n[1:])
    # da = dc * by_c + dn * by_n for z, i, f; what o receives follows from dh alone
    by_c = torch.stack([write * (1 - z * z), write * z, keep * old_c * slope], 3)
    by_n = torch.stack([torch.zeros_like(z), write, keep * old_n * slope], 3)
    by_h = mean * o * (1 - o)
    dh_out, dc, dn = gradients
    dh, da, back = torch.zeros_like(dc), a.new_empty(T, H, B, 4, V), weight.transpose(1, 2)
    for t in reversed(range(T)):
        total = dh_out[t] + dh
        read = total * to_c[t]
        here_c, here_n = dc + read, dn - read * mean[t]
        torch.mul(by_c[t], here_c[:, :, None], out=da[t, :, :, :3]).addcmul_(by_n[t], here_n[:, :, None])
        torch.mul(total, by_h[t], out=da[t, :, :, 3])
        here_c, here_n = here_c * keep[t], here_n * keep[t]
        if real is not None:
            da[t] = torch.where(real[t][..., None], da[t], 0.0)
        here_h = torch.bmm(da[t].view(H, B, 4 * V), back)
        if real is not None:
            here_h, here_c, here_n = (torch.where(real[t], new, old) for new, old in ((here_h, total), (here_c, dc), (here_n, dn)))
        if start is not None:
            here_h, here_c, here_n = (x.masked_fill(start[t], 0.0) for x in (here_h, here_c, here_n))
        dh, dc, dn = here_h, here_c, here_n
    return da.view(T, H, B, 4 * V), (dh, dc, dn)


LOOPS = {"fused": (run_loop, run_loop_backward)}  # backend -> (forward, backward) over the same tensors


class Loop(torch.autograd.Function):
    """h [B, T, H, V] and the last c, n, m of a backend's loop; the arguments are those of `slstm_recurrent`."""

    @staticmethod
    def forward(ctx, x, r, real, start, h, c, n, m, forget, backend):
        a, weight, *masks = time_major(x, r, real, start)
        states = loops(backend)[0](a, weight, *masks, SLSTMState(h, c, n, m), forget)
        ctx.save_for_backward(a, weight, *masks, *states)
        ctx.forget, ctx.backend = forget, backend
        outputs = states[0][1:].permute(2, 0, 1, 3), *(x[-1].transpose(0, 1) for x in states[1:])
        ctx.mark_non_differentiable(outputs[-1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dc, dn, _):
        a, weight, real, start, *states = ctx.saved_tensors
        (T, H, B, _), V = a.shape, weight.shape[1]
        gradients = dh.permute(1, 2, 0, 3).contiguous(), dc.transpose(0, 1).contiguous(), dn.transpose(0, 1).contiguous()
        da, first = loops(ctx.backend)[1](a, weight, real, start, ctx.forget, states, gradients)
        dx = da.view(T, H, B, 4, V).permute(2, 0, 3, 1, 4)
        past = before(states[0], start, 0.0).transpose(0, 1).reshape(H, T * B, V)
        dr = torch.bmm(past.transpose(1, 2), da.transpose(0, 1).reshape(H, T * B, 4 * V)).view(H, V, 4, V).permute(2, 0, 1, 3)
        return dx, dr, None, None, *(x.transpose(0, 1) for x in first), None, None, None


def loops(backend):
    if backend == "triton":
        from xlstm_kernels.gpu.slstm import run_loop_backward_triton, run_loop_triton  # needs triton

        return run_loop_triton, run_loop_backward_triton
    return LOOPS[backend]


@torch.compiler.disable  # a compiler would write every step of the loop out
def slstm_loop(x, r, real, start, state, forget, backend):
    h, c, n, m = Loop.apply(x, r, real, start, *state, forget, backend)
    return h, SLSTMState(h[:, -1], c, n, m)


BACKENDS = ("recurrent", "fused", "triton")


def check_slstm(x, r, real, start, state, forget):
    """Raise ValueError for anything `slstm` cannot run on; values are not looked at."""
    if x.dim() != 5 or x.shape[2] != 4 or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"x: expected floating [B, T, 4, H, V] with at least one token, got {x.dtype} {list(x.shape)}")
    B, T, _, H, V = x.shape
    if tuple(r.shape) != (4, H, V, V) or not r.is_floating_point():
        raise ValueError(f"r: expected floating {[4, H, V, V]}, got {r.dtype} {list(r.shape)}")
    for name, mask in (("real", real), ("start", start)):
        if mask is not None and (tuple(mask.shape) != (B, T) or mask.dtype != torch.bool):
            raise ValueError(f"{name}: expected bool {[B, T]}, got {mask.dtype} {list(mask.shape)}")
    if state is not None and (len(state) != 4 or any(tuple(s.shape) != (B, H, V) or s.dtype not in (torch.float32, torch.float64) for s in state)):
        found = [f"{s.dtype} {list(s.shape)}" for s in state]
        raise ValueError(f"state: expected four float32 or float64 {[B, H, V]}, got {found}; pass the state on as it was returned")
    if forget not in FORGETS:
        raise ValueError(f"forget={forget!r} is not one of {list(FORGETS)}")


def choose_slstm(x, r, state):
    """What "auto" runs."""
    V, wanted = x.shape[-1], (x, r, *(state or ()))
    if x.is_cuda and V <= LARGEST_UNITS and calculation_dtype(*wanted) == torch.float32:
        from xlstm_kernels.gpu.slstm import believed_slstm  # imports the compiler

        if believed_slstm(str(x.device), r.dtype, V):
            return "triton"
    return "recurrent" if x.shape[1] == 1 and not (torch.is_grad_enabled() and any(t.requires_grad for t in wanted)) else "fused"


def slstm(x, r, *, real=None, start=None, state=None, forget="sigmoid", backend="auto"):
    """Run T steps of the sLSTM. Always returns `(h [B, T, H, V], SLSTMState)`. Calculates in float32, or float64 if any input is.

    Args:
        x: what the input gives to the pre-activations z, i, f, o, biases included, [B, T, 4, H, V]; finite where a token is real.
        r: recurrent weights, [4, H, V, V]: unit v of a head's h_{t-1} adds h[v] r[g, head, v, w] to pre-activation g of unit w.
        real: [B, T] bool; a token where it is False changes nothing, its h is that of the token before and means nothing. None: all are.
        start: [B, T] bool; True starts a document: everything before is forgotten, h included. None: nowhere.
        state: SLSTMState to go on from, float32 or float64; None for a fresh one. Gradients flow through h, c and n, never through m.
        forget: "sigmoid" or "exp".
        backend: one of `BACKENDS`, which runs or raises, or "auto".
    Returns:
        h in x's dtype, and the state after the last token in the dtype of the calculation.
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check_slstm(x, r, real, start, state, forget)
    backend = resolve(backend, BACKENDS, x.device, lambda: choose_slstm(x, r, state))
    dtype = calculation_dtype(x, r, *(state or ()))
    state = fresh_slstm_state(x, dtype) if state is None else SLSTMState(*(s.to(dtype) for s in state))
    state = state._replace(m=state.m.detach())
    with without_autocast(x.device):
        weight = r if backend == "triton" else r.to(dtype)
        if backend == "recurrent":
            h, state = slstm_recurrent(x.to(dtype), weight, real, start, state, forget)
        else:
            h, state = slstm_loop(x.to(dtype), weight, real, start, state, forget, backend)
    return h.to(x.dtype), state
