"""What arguments must be like, said in one way by every operation."""

import torch

KERNEL_DTYPES = torch.float32, torch.float16, torch.bfloat16


def kind_of(x):
    if x.dtype == torch.bool:
        return "bool"
    return "floating" if x.is_floating_point() else "complex" if x.is_complex() else "integer"


def expect(name, x, kind="floating", **dims):
    """Raise ValueError unless x has the sizes `dims` and is "floating", "integer" or "bool"."""
    if tuple(x.shape) != tuple(dims.values()) or kind_of(x) != kind:
        raise ValueError(f"{name}: expected {kind} {dims}, got {x.dtype} {list(x.shape)}")


def expect_for_kernel(name, x, largest=None):
    """Raise ValueError unless Triton kernels calculate in the dtype of x, with a last dim up to `largest`."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"{name}: the triton backend calculates in float32, float16 and bfloat16, got {x.dtype}; use another one"
        )
    if largest is not None and x.shape[-1] > largest:
        raise ValueError(
            f"{name}: the triton backend has tiles for {largest} at most in the last dim, got {x.shape[-1]}; "
            "use another one"
        )
