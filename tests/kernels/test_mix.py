"""The gated sum of the branches is o memory + (1 - o) window, block by block."""

import sys

import pytest
import torch
from xlstm_kernels import mix
from xlstm_kernels.mix.op import Mix, blocks


def inputs(T=37, dtype=torch.float64):
    make = torch.Generator().manual_seed(T)
    a, b = (torch.randn(2, T, 3, 5, generator=make, dtype=torch.float64).to(dtype) for _ in range(2))
    return a, b, torch.rand(2, T, 3, generator=make, dtype=torch.float64)


@pytest.mark.parametrize("entries", [1, 100, 2**17])
def test_values_and_gradients_are_those_of_the_formula(entries, monkeypatch):
    monkeypatch.setattr(sys.modules["xlstm_kernels.mix.op"], "ENTRIES", entries)
    x, y = ([a.requires_grad_() for a in inputs()] for _ in range(2))
    upstream = torch.sin(torch.arange(2 * 37 * 15.0, dtype=torch.float64)).view(2, 37, 3, 5)
    got, want = mix(*x), y[2][..., None] * y[0] + (1 - y[2][..., None]) * y[1]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, upstream), torch.autograd.grad(want, y, upstream))


def test_the_gradients_are_the_derivatives():
    assert torch.autograd.gradcheck(Mix.apply, [a.requires_grad_() for a in inputs(T=3)])


def test_half_precision_is_mixed_in_float32():
    a, b, o = inputs(dtype=torch.bfloat16)
    got = mix(a, b, o.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got, (o[..., None] * a.double() + (1 - o[..., None]) * b.double()).bfloat16(), rtol=2**-8, atol=1e-3
    )


def test_blocks_cover_every_token_once():
    a, b, o = inputs(T=50)
    assert torch.equal(torch.cat([part for part, _ in blocks(a, o)], 1), a)


def test_shapes_that_do_not_fit_are_refused():
    a, b, o = inputs()
    with pytest.raises(ValueError, match=r"\[2, 37, 3, 5\], \[2, 36, 3, 5\]"):
        mix(a, b[:, 1:], o)
