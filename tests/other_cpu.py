"""A pytest plugin that makes this CPU as unreliable in last bits as any: a test that passes with it relies on none.

    PYTHONPATH=tests .venv/bin/python -m pytest -q -p other_cpu

Last bits of matrix products are changed, by shapes, strides and alignment of the operands: the same call twice gives
the same bits, a row in a batch of another size does not. Tensors read from a safetensors file lie eight bytes off,
where fresh memory is aligned. Processes that a test starts are not changed: `test_export` compares bits with one, and
fails.
"""

import warnings

import safetensors
import torch

UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
NARROW = (torch.bfloat16, torch.float16)


def shaken(out, operands):
    """`out` with each element moved by up to one unit in its last place."""
    seed = hash(tuple((*x.shape, *x.stride(), x.data_ptr() % 64) for x in operands)) % 2**31
    steps = ((torch.arange(out.numel()) * 2654435761 + seed) >> 7) % 3 - 1  # -1, 0 or 1
    return out.mul_(1 + steps.view(out.shape).to(out.dtype) * UNIT[out.dtype]) if out.dtype in UNIT else out


def product(name):
    """The operator `aten::name` for CPUs, by its variant with `out=`, which stays what it is."""
    plain = getattr(torch.ops.aten, name).out

    def operator(*operands, **scales):
        *_, a, b = operands  # before them stands what is added to the product
        given = [x.float() for x in operands] if a.dtype in NARROW else operands
        out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=given[-1].dtype)
        return shaken(plain(*given, **scales, out=out), operands).to(a.dtype)

    return operator


LIBRARY = torch.library.Library("aten", "IMPL")  # has to live as long as its operators
with warnings.catch_warnings(action="ignore"):  # that they are overridden
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        LIBRARY.impl(name, product(name), "CPU", allow_override=True)


def moved(x):
    """A copy of a tensor that begins eight bytes behind an aligned address."""
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        return x
    room = torch.empty(x.numel() * x.element_size() + 8, dtype=torch.uint8)
    return room[8:].view(x.dtype).view(x.shape).copy_(x)


class Around:
    """Something of safetensors that hands out tensors, which are moved."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, part):
        return moved(self.inner[part])

    def __enter__(self):
        return type(self)(self.inner.__enter__())

    def __exit__(self, *error):
        return self.inner.__exit__(*error)

    def get_tensor(self, name):
        return moved(self.inner.get_tensor(name))

    def get_slice(self, name):
        return Around(self.inner.get_slice(name))


plain_open = safetensors.safe_open
safetensors.safe_open = lambda *args, **options: Around(plain_open(*args, **options))  # before it is imported by name
