"""Which backend of an operation runs: the one that is named, or the fastest that gives right results here."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from xlstm_kernels.backends.launch import unavailable
from xlstm_kernels.backends.verified import verified


class Kernel(NamedTuple):
    """A Triton kernel that "auto" may choose.

    name: of the operation. largest: {dim: the largest size it has tiles for}.
    check: function (device, dtype, **dims) -> {what: error} that runs a small problem by the kernel and in float64, see
        `verified`.
    """

    name: str
    largest: dict
    check: Callable


def resolve_backend(backend, backends, device, choose):
    """Name of the backend to run; `choose` is asked for "auto" only.

    Raises:
        ValueError: a name that `backends` does not have, or "triton" where no kernel can run.
    """
    if backend == "auto":
        return choose()
    if backend not in backends:
        raise ValueError(f"backend={backend!r} is not one of {sorted(backends)}")
    if backend == "triton" and (reason := why_not(str(device))):
        raise ValueError(f"backend='triton': {reason}")
    return backend


def kernel_is_right(kernel, x, calculation, dtype, **dims):
    """True if a `Kernel` has tiles for these dims, and gives right results where x is, calculating in float32."""
    if any(size > kernel.largest[name] for name, size in dims.items()):
        return False
    return runs_right(kernel, x, calculation, dtype, dims)


def runs_right(kernel, x, calculation, dtype, dims):
    if not x.is_cuda or calculation != torch.float32:
        return False
    return is_verified(kernel.name, kernel.check, str(x.device), dtype, tuple(dims.items()))


# A compiler that traces a model asks both while it traces: the answer is a constant of the graph.


@torch.compiler.assume_constant_result
def why_not(device):
    """Why no Triton kernel can run on a device, given by its name, or None."""
    return unavailable(torch.device(device))


@torch.compiler.assume_constant_result
def is_verified(operation, check, device, dtype, dims):
    device = torch.device(device)
    return not unavailable(device) and verified(operation, check, device, dtype, **dict(dims))
