"""What arguments must be like, said in one way by every operation."""

import torch

KERNEL_DTYPES = torch.float32, torch.float16, torch.bfloat16
PLAIN = {torch.Tensor, torch.nn.Parameter}
STRIDED = torch.strided


def in_memory(x, dtype):
    """Whether C may read x where it lies: a tensor of `dtype` in a CPU's memory, not sparse, and of no kind of its own."""
    return type(x) in PLAIN and x.dtype == dtype and x.is_cpu and x.layout is STRIDED


def expect(name, x, kind="floating", **dims):
    """Raise ValueError unless x has the sizes `dims` and is "floating", "integer" or "bool"."""
    own = "floating" if x.is_floating_point() else "complex" if x.is_complex() else "integer"
    if tuple(x.shape) != tuple(dims.values()) or ("bool" if x.dtype == torch.bool else own) != kind:
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


def schema(tensors, others="", result="Tensor"):
    """The schema of an operator: its tensors, `C?` one that may be None, `C!` one that is written; others, result."""
    marks = {"?": "Tensor?", "!": "Tensor(a{}!)"}
    parts = [f"{marks.get(n[-1], 'Tensor').format(j)} {n.rstrip('?!')}" for j, n in enumerate(tensors.split())]
    return f"({', '.join(parts + [others] * bool(others))}) -> {result}"
