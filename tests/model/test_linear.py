"""The student's linear layers: oneDNN's products on a CPU and their gradients, and where torch's own run instead."""

import pytest
import torch
from conftest import tiny_config
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode
from xlstm_kernels.backends.onednn import right_operation

from xlstm_hybrid.model.linear import ROWS, Linear
from xlstm_hybrid.model.modeling import MLP_TOKENS, HybridMLP

needs_onednn = pytest.mark.skipif(
    right_operation() is None, reason="this torch or CPU has no product that would be quicker"
)


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def layer(bias=True):
    made = Linear(24, 40, bias=bias)
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(waves(*p.shape, step=0.37 + n))
    return made


def results(product, x, made, dy):
    """Outputs and all gradients, in float64."""
    x, parameters = x.detach().requires_grad_(), [p.detach().requires_grad_() for p in made.parameters()]
    y = product(x, *parameters)
    return [z.double() for z in (y, *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype)))]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ["contiguous", "transposed", "one gradient for all"])
def test_products_and_gradients_are_as_exact_as_torchs(bias, rows):
    made, x, dy = layer(bias).double(), waves(3, 29, 24, step=0.11), waves(3, 29, 40, step=0.23)
    if rows == "transposed":
        x, dy = (z.transpose(0, 1) for z in (x, dy))
    elif rows == "one gradient for all":
        dy = dy[:1, :1].expand_as(dy)
    truth = results(linear, x, made, dy)
    made, x, dy = made.float(), x.float(), dy.float()
    ours = results(
        lambda x, *p: torch.func.functional_call(made, dict(zip(["weight", "bias"], p, strict=False)), x), x, made, dy
    )
    for exact, torchs, own in zip(truth, results(linear, x, made, dy), ours, strict=True):
        assert own.shape == exact.shape
        assert (own - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6 * exact.abs().max()


@needs_onednn
@pytest.mark.parametrize("trained", ["weight", "bias", "x"])
def test_only_the_gradients_that_are_wanted_are_calculated(trained):
    made, x = layer().requires_grad_(False), waves(ROWS, 24, step=0.1).float()
    inputs = {"x": x, **dict(made.named_parameters())}
    inputs[trained].requires_grad_()
    made(x).sum().backward()
    assert [name for name, z in inputs.items() if z.grad is not None] == [trained]
    expected = {"x": made.weight.sum(0), "weight": x.sum(0), "bias": torch.tensor(float(ROWS))}[trained].detach()
    torch.testing.assert_close(inputs[trained].grad, expected.expand_as(inputs[trained]), rtol=1e-5, atol=1e-4)


@needs_onednn
def test_no_rows_give_no_rows():
    assert right_operation()(torch.ones(0, 24), torch.ones(40, 24)).shape == (0, 40)


def test_torchs_own_products_where_they_are_wanted():
    made = layer()
    few, many = waves(ROWS - 1, 24, step=0.1).float(), waves(64, 24, step=0.1).float()
    assert made(few).equal(linear(few, made.weight, made.bias))
    with torch.backends.mkldnn.flags(enabled=False):
        assert made(many).equal(linear(many, made.weight, made.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(many).dtype == torch.bfloat16
    assert made.double()(many.double()).equal(linear(many.double(), made.weight, made.bias))


@torch.no_grad()
def test_an_mlp_in_parts_without_gradients_is_the_whole_one():
    mlp, x = HybridMLP(tiny_config()).double(), waves(2, MLP_TOKENS + 9, tiny_config().hidden_size, step=0.3)
    kept, (parts, whole) = x.clone(), (mlp(x), None)
    with torch.enable_grad():
        whole = mlp(x)
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-12, atol=1e-12)
    assert x.equal(kept) and not parts.requires_grad


@needs_onednn
def test_gradients_of_gradients_and_transforms_are_torchs():
    made, x = layer(), waves(ROWS, 24, step=0.1).float().requires_grad_()
    found, want = [], []
    for product, gradients in ((made, found), (lambda x: linear(x, made.weight, made.bias), want)):
        (dx,) = torch.autograd.grad(product(x).tanh().sum(), x, create_graph=True)
        gradients += torch.autograd.grad(dx.square().sum(), [x, made.weight])
    for ours, torchs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    rows = torch.func.vmap(torch.func.grad(lambda row: made(row.expand(ROWS, -1)).tanh().sum()))(x.detach())
    want = torch.autograd.grad(linear(x, made.weight, made.bias).tanh().sum() * ROWS, x)[0]
    torch.testing.assert_close(rows, want, rtol=1e-4, atol=1e-4)


@needs_onednn
@torch.no_grad()
def test_a_counter_of_flops_sees_every_product():
    made = layer()
    for rows in (1, ROWS):
        with FlopCounterMode(display=False) as counter:
            made(torch.ones(1, rows, 24))
        assert counter.get_total_flops() == 2 * rows * 24 * 40
