"""`nn.Linear` as a CPU runs it fastest: compiled for one token per row, oneDNN's products for many.

Dims: R rows (all but the last dim of the input), D inputs, N outputs.
"""

import torch
from torch import nn
from xlstm_kernels import linear_step, linear_step_runs
from xlstm_kernels.backends.numerics import wants_gradients
from xlstm_kernels.backends.onednn import onednn_product

ROWS = 16  # fewer are read as fast as the weights can be, by whatever library


def counts_flops():
    """Whether torch's counter of FLOPs watches: it sees what torch dispatches, and no C function of ours."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(type(mode).__name__ == "_FlopCounterMode" for mode in _get_current_dispatch_mode_stack())


def one_token_on_cpu(x):
    """Whether x [B, T, D] is one token per row on a CPU, of a call that nobody differentiates, traces, casts or counts."""
    return (
        type(x) is torch.Tensor
        and x.ndim == 3
        and x.shape[1] == 1
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not counts_flops()
    )


class Product(torch.autograd.Function):
    """x W^T + b with gradients, all three products by `product`."""

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), (wants_x, wants_weight, wants_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        product = nn.functional.linear if torch.is_grad_enabled() else ctx.product  # gradients of gradients are torch's
        dy = dy.contiguous()
        rows = dy.flatten(0, -2)  # [R, N]
        dx = product(dy, weight.t()) if wants_x else None
        dweight = product(rows.t(), x.contiguous().flatten(0, -2).t()) if wants_weight else None
        return dx, dweight, rows.sum(0) if wants_bias else None, None


class Linear(nn.Linear):
    """`nn.Linear` whose products on a CPU are compiled for one token per row, and in float32 oneDNN's from `ROWS` rows on,
    where that is quicker. A weight that is quantised or spread out, and whoever wants to see through a product, has
    torch's.
    """

    def forward(self, x):
        weight, bias, product = self.weight, self.bias, None
        if one_token_on_cpu(x) and type(weight) is nn.Parameter and linear_step_runs(x.dtype, len(x)):
            return linear_step(x, weight, bias)
        plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        if plain and x.numel() >= ROWS * self.in_features:
            product = onednn_product(x, weight)
        if product is None:
            return nn.functional.linear(x, weight, bias)
        if wants_gradients(x, weight, bias):
            return Product.apply(x, weight, bias, product)
        return product(x, weight, bias)
