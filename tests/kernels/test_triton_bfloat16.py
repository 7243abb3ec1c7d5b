"""The bfloat16 that the kernels' tests run in is torch's: on a GPU, and in the interpreter, where `true_bfloat16` mends it."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported
pytest.importorskip("triton")

import triton
import triton.language as tl
from true_bfloat16 import true_bfloat16  # noqa: F401, a fixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16


@triton.jit
def arithmetic(p_x, p_y, p_rounded, p_sum, p_product, p_larger, p_dot, N: tl.constexpr):
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    x, y = tl.load(p_x + at), tl.load(p_y + at)  # float32, bfloat16
    low = x.to(tl.bfloat16)
    tl.store(p_rounded + at, low)
    tl.store(p_sum + at, low + y)
    tl.store(p_product + at, low * y)
    tl.store(p_dot + at, tl.dot(low, y))
    tl.store(p_larger + at, tl.where(low > y, low, tl.abs(y)))


@pytest.mark.usefixtures("true_bfloat16")
def test_the_interpreter_s_bfloat16_is_torch_s():
    # float32 numbers around every 16th bfloat16 in order, and bfloat16 numbers of another order
    bits = torch.arange(0, 2**32, 2**20) + torch.arange(4096) * 40503 % 65536
    some = bits.to(torch.int32).view(torch.float32).nan_to_num(1.5, 1.5, -1.5).view(16, 16, 16).to(DEVICE)
    others = some.flatten().flip(0).view(16, 16, 16).to(HALF)
    for x, y in zip(some, others, strict=True):
        found = [torch.empty_like(y) for _ in range(4)]
        dot = torch.empty_like(x)
        arithmetic[(1,)](x, y, *found, dot, N=16)
        low = x.to(HALF)
        want = low, low + y, low * y, torch.where(low > y, low, y.abs())
        torch.testing.assert_close(found, list(want), rtol=0, atol=0)
        exact, scale = low.double() @ y.double(), low.double().abs() @ y.double().abs()
        inside = scale < 1e38
        assert inside.sum() > 64 and ((dot - exact).abs() <= 1e-5 * scale + 1e-37)[inside].all()
