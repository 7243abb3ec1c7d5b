"""The Triton sLSTM is the plain recurrence: outputs, states, every gradient, measured from float64; and it compiles for
GPUs that are not here.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported
pytest.importorskip("triton")

from true_bfloat16 import true_bfloat16  # noqa: F401, a fixture
from xlstm_kernels import SLSTMState, slstm
from xlstm_kernels.backends.launch import Tile, using
from xlstm_kernels.slstm import triton as kernels
from xlstm_kernels.slstm.check import check_kernel

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile({"BB": 16, "BV": 16, "BK": 16}, 4, 1)
WIDE = Tile({"BB": 16, "BV": 64, "BK": 16}, 4, 1)  # several parts of a product


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def problem(B=3, T=7, H=2, V=12, dtype=torch.float32):
    """Leaves (x, r, h, c, n), rounded so that half precision holds r, and m and masks."""
    x, r = 3 * waves(B, T, 4, H, V, step=0.37), waves(4, H, V, V, step=0.71).to(dtype).double()
    h, c = waves(B, H, V, step=0.3) / 2, waves(B, H, V, step=0.5)
    real, start = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    real[0, :2] = real[1, 4] = real[2, -1] = False
    start[0, 3] = start[1, 0] = start[1, 5] = True
    return (x, r, h, c, 1 + c.abs()), torch.zeros(B, H, V, dtype=torch.float64), {"real": real, "start": start}


def results(leaves, m, rows, forget, backend, tile=TILE, r_dtype=None):
    """h, the state and the gradients of every leaf, in float64 on the CPU."""
    dtype = torch.float64 if backend == "recurrent" else torch.float32
    x, r, *state = (a.to(DEVICE, dtype).requires_grad_() for a in leaves)
    weight = r if r_dtype is None else r.to(r_dtype)
    rows = {k: mask.to(DEVICE) for k, mask in rows.items()}
    with using(tile):
        h, last = slstm(
            x, weight, state=SLSTMState(*state, m.to(DEVICE, dtype)), forget=forget, backend=backend, **rows
        )
        after, _ = slstm(x, weight, state=last, forget=forget, backend=backend)
        up = [waves(*h.shape, step=s).to(h) for s in (0.53, 0.29)]
        gradients = torch.autograd.grad((h * up[0]).sum() + (after * up[1]).sum(), (x, r, *state))
    return [a.detach().double().cpu() for a in (h, last.h, last.c / last.n, after, *gradients)]


@pytest.mark.parametrize("forget, masked", [("sigmoid", True), ("exp", True), ("sigmoid", False)])
def test_the_kernel_is_the_recurrence_on_outputs_states_and_every_gradient(forget, masked):
    leaves, m, rows = problem()
    rows = rows if masked else {}
    for got, want in zip(
        results(leaves, m, rows, forget, "triton"), results(leaves, m, rows, forget, "recurrent"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("B, T, H, V", [(1, 1, 1, 16), (17, 2, 1, 16), (2, 3, 3, 5)], ids=str)
def test_sizes_that_fill_no_tile_and_more_than_one(B, T, H, V):
    x, r = waves(B, T, 4, H, V, step=0.37).float().to(DEVICE), waves(4, H, V, V, step=0.71).float().to(DEVICE)
    with using(TILE):
        h, state = slstm(x, r, backend="triton")
    want, last = slstm(x.double(), r.double(), backend="recurrent")
    torch.testing.assert_close((h, *state), tuple(a.float() for a in (want, *last)), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_multiplied_in_parts():
    leaves, m, rows = problem(H=1, V=40)
    leaves, m, rows = (
        (leaves[0][:1, :3], leaves[1] / 4, *(a[:1] for a in leaves[2:])),
        m[:1],
        {k: mask[:1, :3] for k, mask in rows.items()},
    )
    for got, want in zip(
        results(leaves, m, rows, "sigmoid", "triton", WIDE),
        results(leaves, m, rows, "sigmoid", "recurrent"),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=5e-5, atol=5e-5)


@pytest.mark.usefixtures("true_bfloat16")
@pytest.mark.parametrize("r_dtype", [torch.bfloat16, torch.float16])
def test_recurrent_weights_in_half_precision_cost_no_precision(r_dtype):
    """h is multiplied in two parts: the error stays that of float32, far below the 2^-9 of rounding h to bfloat16."""
    leaves, m, rows = problem(dtype=r_dtype)
    got, want = (
        results(leaves, m, rows, "sigmoid", "triton", r_dtype=r_dtype),
        results(leaves, m, rows, "sigmoid", "recurrent"),
    )
    for name, a, b in zip(("h", "last h", "mean", "after"), got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_whose_padding_is_not_a_number_changes_nothing():
    (x, r, *state), m, rows = problem()
    x, r = x.float().to(DEVICE), r.float().to(DEVICE)
    rows = {k: mask.to(DEVICE) for k, mask in rows.items()}
    with using(TILE):
        want, last = slstm(x, r, backend="triton", **rows)
        h, state = slstm(
            x.masked_fill(~rows["real"][:, :, None, None, None], float("nan")), r, backend="triton", **rows
        )
    torch.testing.assert_close((h, *state), (want, *last), rtol=0, atol=0)


def test_what_the_kernel_cannot_calculate_is_refused_by_name():
    x, r = torch.zeros(1, 2, 4, 1, 8, device=DEVICE), torch.zeros(4, 1, 8, 8, device=DEVICE)
    with pytest.raises(ValueError, match="got x torch.float64"):
        slstm(x.double(), r, backend="triton")
    with pytest.raises(ValueError, match="up to 128 units per head, got 200"):
        slstm(torch.zeros(1, 2, 4, 1, 200, device=DEVICE), torch.zeros(4, 1, 200, 200, device=DEVICE), backend="triton")


def test_the_problem_that_decides_whether_the_kernel_is_right_passes_here():
    with using(TILE):
        errors = check_kernel(torch.device(DEVICE), torch.float32, 8)
    assert errors and max(errors.values()) < 1e-4


def test_that_problem_finds_a_kernel_out_that_forgets_its_padding(monkeypatch):
    monkeypatch.setattr(kernels, "bytes_of", lambda mask: None)
    with using(TILE):
        errors = check_kernel(torch.device(DEVICE), torch.float32, 8)
    assert max(errors.values()) > 1e-2
