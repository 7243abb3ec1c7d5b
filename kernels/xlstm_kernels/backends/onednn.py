"""Matrix products of float32 on an x86 CPU by oneDNN.

torch gives them to MKL, which leaves half of an AMD CPU's AVX-512 unused; half precision it gives to oneDNN itself.
"""

from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from xlstm_kernels.backends.arguments import in_memory
from xlstm_kernels.backends.numerics import seen_through
from xlstm_kernels.backends.once import once


@once
def right_operation():
    """oneDNN's x W^T + b as a function of (x, W, b=None), None where torch has none or gains nothing by it."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None

    def product(x, weight, bias=None):
        if not x.numel():  # which oneDNN refuses
            return torch.nn.functional.linear(x, weight, bias)
        y = operation(x, weight, bias, "none", [], "")
        # of more than two dims a view of the matrix, which autograd would let nobody write into
        return y if y.ndim == 2 else torch.ops.aten._unsafe_view(y, y.shape)

    def flops(x, weight, *_, **__):
        return 2 * prod(x) * weight[0]

    if operation not in flop_registry:  # another copy of this file may have been here
        register_flop_formula(operation)(flops)

    # torch does not document it: both layouts of a weight that are used have to come out right
    x, weight = (torch.arange(16 * n, dtype=torch.float32).view(n, 16) for n in (3, 2))
    try:
        right = [product(x, w, x[0, 1:3]).equal(x @ w.t() + x[0, 1:3]) for w in (weight, weight.t().contiguous().t())]
    except (RuntimeError, TypeError):
        return None
    return product if all(right) else None


def onednn_product(*tensors):
    """The product of `right_operation` for plain tensors and parameters, None where torch's own is to be used: another
    dtype, device or layout, a call that somebody sees through, or `torch.backends.mkldnn.flags(enabled=False)`.
    """
    plain = all(in_memory(x, torch.float32) for x in tensors)
    if not plain or seen_through() or not torch._C._get_mkldnn_enabled():
        return None
    return right_operation()
