"""The small problem that decides whether the Triton kernels give right results here, see `backends.verified`."""

import torch

from xlstm_kernels.backends.verified import compare_forms, draw_numbers
from xlstm_kernels.window.reference import window_reference

T = 300  # several tiles of queries and keys, the last one not full


def check_kernel(device, dtype, K, V):
    """h and the gradients of q, k, v; query heads share keys; documents, padding, and sinks outside of the window."""
    from xlstm_kernels.window.triton import window_triton  # needs triton

    make = torch.Generator().manual_seed(K * 1000 + V)
    q, k, v = (draw_numbers(make, 2, T, heads, d, dtype=dtype, device=device) for heads, d in ((4, K), (2, K), (2, V)))
    index = torch.arange(T).repeat(2, 1)
    document = (index >= 140).long()
    index[1], document[1] = index[1] - 30, 0
    index[0] -= 140 * document[0]
    index[1, :30] = -1
    settings = {"window": 70, "sinks": 4, "scale": K**-0.5}
    upstream = [draw_numbers(make, 2, T, 4, V, dtype=torch.float64, device=device)]
    errors = {}
    for name, where in (("plain", (None, None)), ("packed", (index.to(device), document.to(device)))):
        rule = settings | dict(zip(("index", "document"), where, strict=True))
        kernel, plain = (lambda *x, f=f, rule=rule: [f(*x, **rule)] for f in (window_triton, window_reference))
        errors |= {f"{name} {what}": e for what, e in compare_forms(kernel, plain, (q, k, v), upstream).items()}
    return errors
