"""The dtype that an operation calculates in, and the few functions that keep infinities and zeros in order."""

import contextlib

import torch
from torch.autograd import forward_ad

LOG2E = 1.4426950408889634  # a GPU's fast exponential is that of 2


def calculation_dtype(*tensors):
    """float32, or float64 if any tensor is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def widest(first, *others):
    """The dtype that holds the numbers of all tensors."""
    dtype = first.dtype
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def wants_gradients(*tensors):
    """True if autograd watches and any of the tensors (None where there is none) is to be differentiated by."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def seen_through():
    """True if somebody follows every operation: a transform of `torch.func`, dual numbers, a trace or a compiled graph."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def without_autocast(device):
    """A context in which autocast runs no matrix product in half precision; costs nothing without autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def finite(m):
    """m as it is subtracted inside an exp: 0 where nothing has been written yet."""
    return m.masked_fill(m == float("-inf"), 0.0)


def ratio(num, den):
    """num / den, 0 where den is 0: nothing has been written. Subnormal numbers are 0, dividing by them overflows."""
    empty = den.abs() < torch.finfo(den.dtype).tiny
    return torch.where(empty, 0.0, num / torch.where(empty, 1.0, den))
