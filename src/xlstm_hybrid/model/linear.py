"""`nn.Linear` as an x86 CPU runs it fastest. Dims: R rows (all but the last dim of the input), D inputs, N outputs."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from xlstm_kernels.backends.numerics import wants_gradients
from xlstm_kernels.backends.onednn import onednn_product

ROWS = 16  # fewer are read as fast as the weights can be, by whatever library


class Product(torch.autograd.Function):
    """x W^T + b with gradients, all three products by `product`."""

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), (wants_x, wants_weight, wants_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        dy = dy.contiguous()
        rows = dy.flatten(0, -2)  # [R, N]
        dx = ctx.product(dy, weight.t()) if wants_x else None
        dweight = ctx.product(rows.t(), x.contiguous().flatten(0, -2).t()) if wants_weight else None
        return dx, dweight, rows.sum(0) if wants_bias else None, None


class Linear(nn.Linear):
    """`nn.Linear` whose float32 products on a CPU are oneDNN's where that is quicker, from `ROWS` rows on."""

    def forward(self, x):
        weight, bias, product = self.weight, self.bias, None
        if x.numel() >= ROWS * self.in_features and not torch.is_autocast_enabled("cpu"):
            product = onednn_product(x, weight)
        if product is None:
            return nn.functional.linear(x, weight, bias)
        if wants_gradients(x, weight, bias):
            return Product.apply(x, weight, bias, product)
        return product(x, weight, bias)
