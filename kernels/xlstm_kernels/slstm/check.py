"""The small problem that decides whether the Triton kernels give right results here, see `backends.verified`."""

import torch

from xlstm_kernels.backends.verified import compare_forms, draw_numbers
from xlstm_kernels.slstm.reference import SLSTMState, slstm_recurrent


def check_kernel(device, dtype, V):
    """h, the state after the last token, and the gradients of all inputs, with a document start and padding inside."""
    from xlstm_kernels.slstm.triton import slstm_triton  # needs triton

    make, (B, T, H) = torch.Generator().manual_seed(V), (3, 14, 2)
    x = draw_numbers(make, B, T, 4, H, V, dtype=torch.float32, device=device)
    r = draw_numbers(make, 4, H, V, V, dtype=dtype, device=device) / V**0.5
    h, c = (draw_numbers(make, B, H, V, dtype=torch.float32, device=device) / 2 for _ in range(2))
    n, m = 1 + c.abs(), torch.zeros_like(c)
    real, start = (torch.full((B, T), value, device=device) for value in (True, False))
    real[1, 6:9], start[0, 5], start[2, 0] = False, True, True

    def run(form):
        def results(x, r, h, c, n):
            h, state = form(x, r, real, start, SLSTMState(h, c, n, m.to(c.dtype)), "sigmoid")
            return h, state.c / state.n

        return results

    upstream = [draw_numbers(make, *shape, H, V, dtype=torch.float64, device=device) for shape in ((B, T), (B,))]
    return compare_forms(run(slstm_triton), run(slstm_recurrent), (x, r, h, c, n), upstream)
