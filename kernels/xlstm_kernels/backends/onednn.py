"""Matrix products of float32 on an x86 CPU by oneDNN.

torch gives them to MKL, which leaves half of an AMD CPU's AVX-512 unused; half precision it gives to oneDNN itself.
"""

from functools import cache
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


@cache
def right_operation():
    """oneDNN's x W^T + b as a function of (x, W, b=None), None where torch has none or gains nothing by it."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None

    def product(x, weight, bias=None):
        if not x.numel():  # which oneDNN refuses
            return torch.nn.functional.linear(x, weight, bias)
        return operation(x, weight, bias, "none", [], "")

    if operation not in flop_registry:  # another copy of this code, of an exported checkpoint, may have been here

        @register_flop_formula(operation)
        def flops(x, weight, *_, **__):
            return 2 * prod(x) * weight[0]

    # torch does not document it: both layouts of a weight that are used have to come out right
    x, weight = torch.arange(48.0).view(3, 16), torch.arange(32.0).view(2, 16)
    try:
        right = [product(x, w, torch.ones(2)).equal(x @ w.t() + 1) for w in (weight, weight.t().contiguous().t())]
    except (RuntimeError, TypeError):
        return None
    return product if all(right) else None


def onednn_product(*tensors):
    """The product of `right_operation` for plain tensors and parameters, None where torch's own is to be used: another
    dtype or device, a graph that is being compiled, a transform of `torch.func`, or
    `torch.backends.mkldnn.flags(enabled=False)`.
    """
    plain = all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"
        for x in tensors
    )
    transformed = torch._C._are_functorch_transforms_active()
    if not plain or transformed or torch.compiler.is_compiling() or not torch._C._get_mkldnn_enabled():
        return None
    return right_operation()
