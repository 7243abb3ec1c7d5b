"""The small problem that decides whether the Triton kernel gives right results here, see `backends.verified`."""

from functools import partial

import torch

from xlstm_kernels.backends.verified import compare_forms, draw_numbers
from xlstm_kernels.mlstm.reference import mlstm_chunkwise

T = 300  # several chunks of any tile, the last one not full


def check_kernel(device, dtype, K, V):
    """h, the state after the last token, and the gradients of all inputs; a document starts in the middle."""
    from xlstm_kernels.mlstm.triton import mlstm_triton  # needs triton

    draw = partial(draw_numbers, torch.Generator().manual_seed(K * 1000 + V), device=device)
    single, double = torch.float32, torch.float64
    q, k = (draw(1, T, 2, K, dtype=double).softmax(-1).to(dtype) for _ in range(2))
    v = draw(1, T, 2, V, dtype=dtype)
    i, f = (draw(1, T, 2, dtype=single) for _ in range(2))
    f = 4 + f
    f[:, 170, 1] = float("-inf")
    n = 1 + draw(1, 2, K, dtype=single).abs()
    C, m = n[..., None] * draw(1, 2, K, V, dtype=single), torch.zeros(1, 2, device=device)

    def run(form):
        def results(q, k, v, i, f, C, n):
            h, state = form(q, k, v, i, f, (C, n, m.to(C.dtype)))
            scale = state.m.double().exp()[..., None]  # the true state, whatever its log-scale
            return h, state.C * scale[..., None], state.n * scale

        return results

    upstream = [draw(1, T, 2, V, dtype=double), *(1e-2 * torch.ones_like(x, dtype=double) for x in (C, n))]
    return compare_forms(run(mlstm_triton), run(mlstm_chunkwise), (q, k, v, i, f, C, n), upstream)
