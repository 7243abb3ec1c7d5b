"""The sLSTM as a loop with its own backward: elementwise work of all tokens at once, the gradient of R in one product.

Dims as in `reference`.
"""

import torch
from torch.autograd.function import once_differentiable

from xlstm_kernels.backends.numerics import finite, ratio
from xlstm_kernels.slstm.reference import SLSTMState, log_forget


def time_major(x, r, real, start):
    """x as [T, H, B, 4 V], a copy; r as [H, V, 4 V]; the masks as [T, 1, B, 1]."""
    B, T, _, H, V = x.shape
    masks = (None if mask is None else mask.t()[:, None, :, None] for mask in (real, start))
    # a view where a size is 1
    mine = x.permute(1, 3, 0, 2, 4).reshape(T, H, B, 4 * V).clone(memory_format=torch.contiguous_format)
    return mine, r.permute(1, 2, 0, 3).reshape(H, V, 4 * V), *masks


def run_loop(a, weight, real, start, state, forget):
    """All steps without gradients; a [T, H, B, 4 V] becomes the pre-activations.

    Returns h, c, n, m, [T + 1, H, B, V] each, the given state first.
    """
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
            pairs = (here_h, total), (here_c, dc), (here_n, dn)
            here_h, here_c, here_n = (torch.where(real[t], new, old) for new, old in pairs)
        if start is not None:
            here_h, here_c, here_n = (x.masked_fill(start[t], 0.0) for x in (here_h, here_c, here_n))
        dh, dc, dn = here_h, here_c, here_n
    return da.view(T, H, B, 4 * V), (dh, dc, dn)


class Loop(torch.autograd.Function):
    """h [B, T, H, V] and the last c, n, m; arguments as of `slstm_recurrent`, and (`run_loop`, `run_loop_backward`)."""

    @staticmethod
    def forward(ctx, x, r, real, start, h, c, n, m, forget, loops):
        a, weight, *masks = time_major(x, r, real, start)
        states = loops[0](a, weight, *masks, SLSTMState(h, c, n, m), forget)
        ctx.save_for_backward(a, weight, *masks, *states)
        ctx.forget, ctx.loops = forget, loops
        outputs = states[0][1:].permute(2, 0, 1, 3), *(x[-1].transpose(0, 1) for x in states[1:])
        ctx.mark_non_differentiable(outputs[-1])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dc, dn, _):
        a, weight, real, start, *states = ctx.saved_tensors
        (T, H, B, _), V = a.shape, weight.shape[1]
        gradients = [x.contiguous() for x in (dh.permute(1, 2, 0, 3), dc.transpose(0, 1), dn.transpose(0, 1))]
        da, first = ctx.loops[1](a, weight, real, start, ctx.forget, states, gradients)
        dx = da.view(T, H, B, 4, V).permute(2, 0, 3, 1, 4)
        past = before(states[0], start, 0.0).transpose(0, 1).reshape(H, T * B, V)
        dr = torch.bmm(past.transpose(1, 2), da.transpose(0, 1).reshape(H, T * B, 4 * V))
        dr = dr.view(H, V, 4, V).permute(2, 0, 1, 3)
        return dx, dr, None, None, *(x.transpose(0, 1) for x in first), None, None, None


@torch.compiler.disable  # a compiler would write every step of the loop out
def slstm_loop(x, r, real, start, state, forget, loops):
    h, c, n, m = Loop.apply(x, r, real, start, *state, forget, loops)
    return h, SLSTMState(h[:, -1], c, n, m)


def slstm_fused(x, r, real, start, state, forget):
    return slstm_loop(x, r, real, start, state, forget, (run_loop, run_loop_backward))
