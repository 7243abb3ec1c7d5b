"""Which backend of an operation runs: the one that is named, or the fastest that can be believed."""

import torch

LARGEST_K, LARGEST_V = 128, 256  # head dims that the Triton kernels have tiles for; K is the mLSTM's number of features as well
LARGEST_F = 256  # features of a step


def resolve(backend, backends, device, choose):
    """Name of the backend to run; `choose` is asked for "auto" only.

    Raises:
        ValueError: a name that `backends` does not have, or "triton" where no kernel can run.
    """
    if backend == "auto":
        return choose()
    if backend not in backends:
        raise ValueError(f"backend={backend!r} is not one of {sorted(backends)}")
    if backend == "triton":
        from xlstm_kernels.selfcheck import why_not  # imports the compiler

        if reason := why_not(str(device)):
            raise ValueError(f"backend='triton': {reason}")
    return backend


def kernel_is_right(operation, x, calculation, dtype, *dims):
    """True if the operation's Triton kernel can run on the device of x, calculates in this dtype, and has proven right there."""
    if not x.is_cuda or calculation != torch.float32:
        return False
    from xlstm_kernels.selfcheck import believed  # imports the compiler

    return believed(operation, str(x.device), dtype, *dims)


def heads_kernel_is_right(operation, q, v, calculation, dtype, *features):
    """The same for an operation on heads, q [..., K] and v [..., V]; a step has its number of features besides."""
    K, V = q.shape[-1], v.shape[-1]
    tiles = K <= LARGEST_K and V <= LARGEST_V and all(F <= LARGEST_F for F in features)
    return tiles and kernel_is_right(operation, q, calculation, dtype, K, V, *features)
