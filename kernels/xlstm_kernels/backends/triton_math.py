"""Functions that the Triton kernels of several operations call."""

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):
    """log sigmoid(x), also to the last digits near 0, as log(1 + y) is not: log1p(y) = 2 atanh(y / (2 + y))."""
    y = tl.exp(-tl.abs(x))
    z = y / (2 + y)  # at most 1/3
    u = z * z
    series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13 + u * (1 / 15)))))))
    return tl.minimum(x, 0.0) - 2 * z * series


@triton.jit
def finite(x):
    """x as it is subtracted: 0 where nothing has been written yet."""
    return tl.where(x == float("-inf"), 0.0, x)
