"""The gated sum of a hybrid layer's two branches, block by block. Dims: B batch, T tokens, H heads, V value."""

import torch

from xlstm_kernels.backends.numerics import wants_gradients

ENTRIES = 2**17  # of one tensor that is worked on at once: they stay in the cache


def blocks(*tensors):
    """The tensors [B, T, ...] cut along T."""
    B, T = tensors[0].shape[:2]
    return zip(*(x.split(max(1, ENTRIES // max(1, tensors[0].numel() // T)), 1) for x in tensors), strict=True)


def mixed(memory, window, o):
    h = torch.empty_like(window, memory_format=torch.contiguous_format)
    if memory.dtype == window.dtype == o.dtype:
        return torch.lerp(window, memory, o[..., None], out=h)
    for out, a, b, gate in blocks(h, memory, window, o):
        out.copy_(torch.lerp(b.to(gate.dtype), a.to(gate.dtype), gate[..., None]))
    return h


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory, window, o):
        ctx.save_for_backward(memory, window, o)
        return mixed(memory, window, o)

    @staticmethod
    def backward(ctx, dh):
        memory, window, o = ctx.saved_tensors
        da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (memory, window))
        do = torch.empty_like(o, memory_format=torch.contiguous_format)
        for d, a, b, gate, out_a, out_b, out_gate in blocks(dh, memory, window, o, da, db, do):
            d = d.to(gate.dtype)
            share = d * gate[..., None]
            out_a.copy_(share)
            out_b.copy_(d - share)
            torch.sum((a.to(gate.dtype) - b).mul_(d), -1, out=out_gate)
        return da, db, do


def mix(memory, window, o):
    """o memory + (1 - o) window, [B, T, H, V] in the dtype of `window`, calculated in that of o (Hauzenberger et al.
    2026).

    Args:
        memory, window: [B, T, H, V]; o: gate in [0, 1], [B, T, H], float32 at least.
    Raises:
        ValueError: shapes that do not fit.
    """
    if memory.shape != window.shape or o.shape != window.shape[:-1]:
        found = ", ".join(str(list(x.shape)) for x in (memory, window, o))
        raise ValueError(f"memory, window, o: expected [B, T, H, V] twice and [B, T, H], got {found}")
    # a compiler fuses it, a GPU has no cache to keep to
    if torch.compiler.is_compiling() or window.device.type != "cpu":
        return torch.lerp(window.to(o.dtype), memory.to(o.dtype), o[..., None]).to(window.dtype)
    return (Mix.apply if wants_gradients(memory, window, o) else mixed)(memory, window, o)
