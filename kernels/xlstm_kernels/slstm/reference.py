"""The sLSTM in plain PyTorch: scalar memories with exponential gates that see the step before. Dims: B batch, T tokens,
H heads, V units per head.

    a_t = x_t + h_{t-1} R                       pre-activations z, i, f, o; a head sees its own h only
    c_t = f_t c_{t-1} + i_t tanh(z)             n_t = f_t n_{t-1} + i_t             h_t = sigmoid(o) c_t / n_t
    i_t = exp(i)                                f_t = sigmoid(f), or exp(f)         Beck et al. 2024

c and n are stored divided by exp(m), m_t = max(log f_t + m_{t-1}, i_t). h does not depend on m, hence m carries no
gradient. A fresh state is h = c = n = 0, m = -inf; after the first write n >= 1, so that c / n, a mean of past tanh(z),
never cancels.

A step needs the h of the step before: there is no chunkwise form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from xlstm_kernels.backends.numerics import finite, ratio

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
            h, c, n = (torch.where(begins, 0.0, old) for old in (h, c, n))
            m = torch.where(begins, float("-inf"), m)
        z, i, f, o = (x[:, t] + torch.einsum("bhv,ghvw->bghw", h, r)).unbind(1)  # [B, H, V] each
        logf = log_forget(f, forget)
        new_m = torch.maximum(logf.detach() + m, i.detach())
        keep = (logf + (m - finite(new_m))).exp()
        write = (i - finite(new_m)).exp()
        new_c = keep * c + write * torch.tanh(z)
        new_n = keep * n + write
        new = torch.sigmoid(o) * ratio(new_c, new_n), new_c, new_n, new_m
        if real is not None:
            pairs = zip(new, (h, c, n, m), strict=True)
            new = (torch.where(real[:, t, None, None], fresh, old) for fresh, old in pairs)
        h, c, n, m = new
        outputs.append(h)
    return torch.stack(outputs, 1), SLSTMState(h, c, n, m)
