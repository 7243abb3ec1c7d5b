"""The small problem that decides whether the Triton kernel gives right results here, see `backends.verified`."""

import torch

from xlstm_kernels.backends.verified import draw_numbers, largest_error
from xlstm_kernels.step.cpu import step_both


def check_kernel(device, dtype, K, V, F):
    """h, state and slots after each of a few tokens, before and after the ring is full."""
    from xlstm_kernels.step.triton import hybrid_step_triton  # needs triton

    make, (B, H, G, S, W) = torch.Generator().manual_seed(F * 10**6 + K * 1000 + V), (2, 4, 2, 3, 5)
    shapes = {"q": (H, K), "k": (G, K), "v": (G, V), "phi_q": (H, F), "phi_k": (H, F), "i": (H,), "f": (H,), "o": (H,)}
    memory = [torch.zeros(B, H, F, V), torch.zeros(B, H, F), torch.full((B, H), float("-inf"))]
    memory += [torch.zeros(B, G, S + W, K), torch.zeros(B, G, S + W, V)]
    ours = [x.to(device, torch.float32 if j < 3 else dtype) for j, x in enumerate(memory)]
    truth, errors = [x.to(device, torch.float64) for x in memory], {}
    for t in range(2 * W + S):
        x = {name: draw_numbers(make, B, 1, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        x |= {name: x[name].double().softmax(-1).to(dtype) for name in ("phi_q", "phi_k")}
        x["o"] = x["o"].double().sigmoid().to(dtype)
        index = torch.tensor([t, t - 4 if t >= 4 else -1], device=device)
        if t < 4:
            x["i"][1], x["f"][1] = float("-inf"), float("inf")
        got = hybrid_step_triton(*x.values(), *ours, index, sinks=S, scale=K**-0.5)
        want = step_both(*(a.double() for a in x.values()), *truth, index, S, K**-0.5)
        real = (index >= 0).to(device)
        pairs = {"h": (got[real], want[real])} | {
            name: (ours[j], truth[j]) for j, name in ((0, "C"), (1, "n"), (3, "keys"))
        }
        for name, pair in pairs.items():
            errors[name] = max(errors.get(name, 0.0), largest_error(*pair))
    return errors
