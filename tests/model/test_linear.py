"""The student's linear layers: oneDNN's products on a CPU and their gradients, and where torch's own run instead."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode
from xlstm_kernels.backends.onednn import right_operation

from xlstm_hybrid.model.layers import MLP_TOKENS, HybridMLP
from xlstm_hybrid.model.linear import ROWS, Linear

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


@torch.no_grad()
@pytest.mark.parametrize("part", ["gate_proj", "act_fn", "up_proj", "down_proj"])
def test_whoever_looks_into_an_mlp_sees_all_tokens_at_once_and_what_was_there(part):
    mlp, seen = HybridMLP(tiny_config()).double(), []
    x = waves(1, MLP_TOKENS + 9, tiny_config().hidden_size, step=0.3)
    want = mlp(x)
    hook = getattr(mlp, part).register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(mlp(x), want)
    hook.remove()
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    there = {"gate_proj": gate, "act_fn": mlp.act_fn(gate), "up_proj": up, "down_proj": want}
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], there[part])


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


def spread(x, n=2):
    """The same numbers with others between them."""
    return torch.stack([x] + [x + 1] * (n - 1), -1)[..., 0]


def parameter(x):
    return torch.nn.Parameter(x, requires_grad=False)


UNUSUAL = {
    "a weight spread out": lambda made: {"weight": spread(made.weight)},
    "a sparse weight": lambda made: {"weight": made.weight.to_sparse_csr()},
    "a bias spread out": lambda made: {"bias": spread(made.bias)},
    "a bias of one number": lambda made: {"bias": torch.tensor([0.5])},
    "a bias with a dim more": lambda made: {"bias": made.bias[None]},
}
WRONG = {
    "a weight of another dtype": lambda made: {"weight": made.weight.bfloat16()},
    "a bias of another dtype": lambda made: {"bias": made.bias.double()},
    "a bias too long": lambda made: {"bias": torch.ones(41)},
    "weights that are not there": lambda made: {"weight": made.weight.to("meta"), "bias": made.bias.to("meta")},
    "a bias that is not there": lambda made: {"bias": made.bias.to("meta")},
    "a weight of another size": lambda made: {"weight": torch.ones(40, 23)},
}


def changed(change):
    made = layer().requires_grad_(False)
    for name, x in change(made).items():
        setattr(made, name, parameter(x))
    return made


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", UNUSUAL)
@torch.no_grad()
def test_parameters_that_neither_c_nor_onednn_reads_are_torchs(name, rows):
    """oneDNN reads a bias as if it were contiguous, and C a weight that is on another device."""
    made, x = changed(UNUSUAL[name]), waves(1, rows, 24, step=0.1).float()
    torch.testing.assert_close(made(x), linear(x, made.weight, made.bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_parameters_that_do_not_fit_have_torchs_error(name, rows):
    made, x, found = changed(WRONG[name]), waves(1, rows, 24, step=0.1).float(), []
    for product in (made, lambda x: linear(x, made.weight, made.bias)):
        with pytest.raises(RuntimeError) as error:
            product(x)
        found.append(str(error.value))
    assert found[0] == found[1]


@needs_onednn
def test_a_product_may_be_changed_in_place():
    made, x = layer(), waves(2, ROWS, 24, step=0.1).float()
    made(x).mul_(2).sum().backward()
    torch.testing.assert_close(made.bias.grad, torch.full((40,), 4.0 * ROWS))
    with torch.no_grad():
        frozen = made(x)
    scale = torch.ones((), requires_grad=True)
    frozen.mul_(scale).sum().backward()
    torch.testing.assert_close(scale.grad, linear(x, made.weight, made.bias).sum().detach(), rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians_are_torchs(strategy):
    made, x = layer(), waves(ROWS, 24, step=0.1).float()
    find = torch.autograd.functional.jacobian
    ours, torchs = (
        find(lambda x, f=f: f(x).tanh().sum(0), x, vectorize=True, strategy=strategy)
        for f in (made, lambda x: linear(x, made.weight, made.bias))
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, ROWS])
@torch.no_grad()
def test_dual_numbers_and_traces_go_through_a_product(rows):
    made, x = layer(), waves(1, rows, 24, step=0.1).float()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x + 1)
        torch.testing.assert_close(forward_ad.unpack_dual(made(dual)).tangent, linear(x + 1, made.weight))
    graph = make_fx(made)(x)
    torch.testing.assert_close(graph(x + 1), linear(x + 1, made.weight, made.bias), rtol=1e-5, atol=1e-4)


@needs_onednn
def test_the_first_products_may_come_from_several_threads_in_any_state():
    """In a process of its own: what is asked once is asked there."""
    code = """
import threading, torch
from xlstm_kernels.backends.onednn import onednn_product, right_operation
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
threads = [threading.Thread(target=lambda: found.append(right_operation())) for _ in range(4)]
found = []
[thread.start() for thread in threads]
[thread.join() for thread in threads]
x = torch.ones(16, 24, dtype=torch.float32, device="cpu")
assert found[0] is not None and found == 4 * [found[0]], found
with torch.inference_mode():
    assert onednn_product(x)(x, x)[0, 0] == 24
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
