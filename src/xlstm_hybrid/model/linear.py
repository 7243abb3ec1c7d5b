"""`nn.Linear` as a CPU runs it fastest: compiled for one token per row, oneDNN's products for many.

Dims: R rows (all but the last dim of the input), D inputs, N outputs.
"""

import torch
from torch import nn
from torch.nn.modules import module as hooks
from xlstm_kernels import linear_step, linear_step_runs
from xlstm_kernels.backends.arguments import PLAIN, in_memory
from xlstm_kernels.backends.numerics import seen_through, wants_gradients
from xlstm_kernels.backends.onednn import onednn_product

GLOBAL_HOOKS = hooks._global_forward_hooks, hooks._global_forward_pre_hooks
ROWS = 16  # fewer are read as fast as the weights can be, by whatever library


def fit(x, weight, bias):
    """Whether x W^T + b is one of plain tensors on a CPU whose sizes and dtypes go together; anything else is torch's, and
    so is the error.
    """
    dtype = x.dtype
    if type(x) not in PLAIN or not in_memory(weight, dtype) or weight.ndim != 2:
        return False
    N, D = weight.shape
    return x.shape[-1] == D and (
        bias is None or (in_memory(bias, dtype) and bias.shape == (N,) and bias.is_contiguous())
    )


def hooked(*modules):
    """Whether somebody looks at what goes into the modules or comes out of them."""
    return any(GLOBAL_HOOKS) or any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def watched():
    """Whether a mode of torch is on, a counter of FLOPs or a tracer: it sees what torch dispatches, no C function of ours."""
    return torch._C._len_torch_dispatch_stack() > 0


def one_token_on_cpu(x):
    """Whether x [B, T, D] is one token per row on a CPU, of a call that nobody differentiates, casts or looks into."""
    return (
        type(x) is torch.Tensor
        and x.ndim == 3
        and x.shape[1] == 1
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not seen_through()  # a compiler cannot trace what comes after it
        and not watched()
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
        if torch._C._functorch.is_legacy_batchedtensor(dy):  # `is_grads_batched`, a vectorised Jacobian
            product = nn.functional.linear
        dy, x = dy.contiguous(), x.contiguous()
        rows, inputs = (z.reshape(z.shape[:-1].numel(), z.shape[-1]) for z in (dy, x))  # [R, N], [R, D]
        dx = product(dy, weight.t()) if wants_x else None
        dweight = product(rows.t(), inputs.t()) if wants_weight else None
        return dx, dweight, rows.sum(0) if wants_bias else None, None


class Linear(nn.Linear):
    """`nn.Linear` whose products on a CPU are compiled for one token per row, and in float32 oneDNN's from `ROWS` rows on,
    where that is quicker. Tensors that do not `fit`, such as a weight that is quantised, sparse or spread out, and
    whoever wants to see through a product, have torch's.
    """

    def forward(self, x):
        weight, bias, product = self.weight, self.bias, None
        if not torch.compiler.is_compiling() and fit(x, weight, bias):
            if one_token_on_cpu(x) and weight.is_contiguous() and linear_step_runs(x.dtype, len(x)):
                return linear_step(x, weight, bias)
            if x.numel() >= ROWS * self.in_features and not torch.is_autocast_enabled("cpu"):
                product = onednn_product(x, weight)
        if product is None:
            return nn.functional.linear(x, weight, bias)
        if wants_gradients(x, weight, bias):
            return Product.apply(x, weight, bias, product)
        return product(x, weight, bias)
