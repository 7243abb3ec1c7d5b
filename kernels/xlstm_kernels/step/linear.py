"""A linear map of one token per row on a CPU: it costs what reading the weight costs, and a compiled loop reads it at the
speed of memory, which the general matrix products behind torch do not reach on every CPU.

Dims: B batch, D input size, N output size. Forward only.
"""

import ctypes

import torch

from xlstm_kernels.backends.compiled import library
from xlstm_kernels.backends.once import once
from xlstm_kernels.backends.verified import draw_numbers, largest_error, verified
from xlstm_kernels.step.layer import NO_MEMORY, SOURCE, WORTH_THREADS

MOST_ROWS = {torch.float32: 8, torch.bfloat16: 4}  # with more, a product in blocks is quicker


def linear_step(x, weight, bias=None):
    """x W^T + bias of one token per row, without gradients: [B, 1, N]. Only where `linear_step_runs`.

    Args:
        x: [B, 1, D]; weight: [N, D], contiguous; bias: [N] or None; all of one dtype, float32 or bfloat16.
    Raises:
        ValueError: sizes, dtypes or the weight's layout do not fit.
        MemoryError: no work space.
    """
    (B, T, D), N = x.shape, weight.shape[0]
    if (
        T != 1
        or weight.shape != (N, D)
        or not weight.is_contiguous()
        or weight.dtype != x.dtype
        or x.dtype not in MOST_ROWS
        or (bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype))
    ):
        raise ValueError(
            f"linear_step: expected x [B, 1, D], a contiguous weight [N, D] and a bias [N] or None, all float32 or all "
            f"bfloat16; got {[None if a is None else (list(a.shape), a.dtype) for a in (x, weight, bias)]}"
        )
    x, built, out = x.contiguous(), library(SOURCE), x.new_empty(B, 1, N)
    bias = 0 if bias is None else bias.contiguous().data_ptr()
    threads = min(torch.get_num_threads(), N) if built.threads and B * N * D >= WORTH_THREADS else 1
    pointers = map(ctypes.c_void_p, (x.data_ptr(), weight.data_ptr(), bias, out.data_ptr()))
    sizes = map(ctypes.c_int64, (B, N, D))
    if built.functions.linear_step(*pointers, *sizes, x.dtype == torch.bfloat16, threads) == NO_MEMORY:
        raise MemoryError("linear_step: no memory for the work space of one token")
    return out


def linear_step_runs(dtype, rows):
    """Whether there is a compiled `linear_step`, right on this machine, and no slower than torch's for so many rows."""
    return rows <= MOST_ROWS.get(dtype, 0) and is_right(dtype)


@once
def is_right(dtype):
    built = library(SOURCE)
    name = f"linear {built.name}"
    return built.functions is not None and verified(name, check_linear, torch.device("cpu"), dtype)


def check_linear(device, dtype):
    """y for sizes with and without a rest, of one to five rows, with and without a bias."""
    errors, make = {}, torch.Generator().manual_seed(0)
    for rows, N, D in ((1, 7, 64), (3, 16, 100), (4, 5, 33), (5, 1, 257)):
        x, weight, bias = (
            draw_numbers(make, *size, dtype=dtype, device=device) for size in ((rows, 1, D), (N, D), (N,))
        )
        for b in (None, bias):
            want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            errors[f"y [{rows}, {N}], D {D}, {b is not None}"] = largest_error(linear_step(x, weight, b), want)
    return errors
