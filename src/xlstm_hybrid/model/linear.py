"""`nn.Linear` as a CPU runs it fastest: compiled for one token per row, oneDNN's products for many.

Dims: R rows (all but the last dim of the input), D inputs, N outputs.
"""

from functools import cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from xlstm_kernels import linear_step, linear_step_runs

ROWS = 16  # fewer are read as fast as the weights can be, by whatever library


@cache
def onednn():
    """oneDNN's x W^T + b in float32 as a function of (x, W, b), None where torch has none or gains nothing by it.

    torch gives such products to MKL, which leaves half of an AMD CPU's AVX-512 unused.
    """
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None

    def product(x, weight, bias=None):
        return operation(x, weight, bias, "none", [], "")

    # an operation without a promise: both layouts of a weight that are used here have to come out right
    x, weight = torch.arange(48.0).view(3, 16), torch.arange(32.0).view(2, 16)
    try:
        right = [product(x, w, torch.ones(2)).equal(x @ w.t() + 1) for w in (weight, weight.t().contiguous().t())]
    except (RuntimeError, TypeError):
        return None
    return product if all(right) else None


def one_token_on_cpu(x):
    """Whether x [B, T, D] is one token per row on a CPU, of a call that nobody differentiates, traces or casts."""
    return (
        type(x) is torch.Tensor
        and x.ndim == 3
        and x.shape[1] == 1
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


class Product(torch.autograd.Function):
    """x W^T + b with gradients, all three products by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn()(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), (wants_x, wants_weight, wants_bias) = ctx.saved_tensors, ctx.needs_input_grad
        dy = dy.contiguous()
        rows = dy.flatten(0, -2)  # [R, N]
        dx = onednn()(dy, weight.t()) if wants_x else None
        dweight = onednn()(rows.t(), x.contiguous().flatten(0, -2).t()) if wants_weight else None
        return dx, dweight, rows.sum(0) if wants_bias else None


def suits_onednn(x, weight):
    """Whether a product is to be oneDNN's: plain float32 tensors on a CPU, and nobody who wants to see through it."""
    return (
        type(x) is torch.Tensor
        and type(weight) in (nn.Parameter, torch.Tensor)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags(enabled=False) is the user's way out
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn() is not None
    )


class Linear(nn.Linear):
    """`nn.Linear` whose products on a CPU are compiled for one token per row, and in float32 oneDNN's from `ROWS` rows on.
    A weight that is quantised or spread out, and whoever wants to see through a product, has torch's.
    """

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if one_token_on_cpu(x) and type(weight) is nn.Parameter and linear_step_runs(x.dtype, len(x)):
            return linear_step(x, weight, bias)
        if x.numel() < ROWS * self.in_features or not suits_onednn(x, weight):
            return nn.functional.linear(x, weight, bias)
        watched = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return (Product.apply if watched else onednn())(x, weight, bias)
