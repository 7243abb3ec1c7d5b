"""The sLSTM is the equations of Beck et al. 2024: forms agree in float64 on outputs, states and every gradient.

Masks, documents, hand-over.
"""

import math

import pytest
import torch
from xlstm_kernels import SLSTMState, slstm
from xlstm_kernels.slstm import cpu
from xlstm_kernels.slstm.op import BACKENDS
from xlstm_kernels.slstm.reference import fresh_slstm_state

torch.set_num_threads(1)
FORMS = [b for b in BACKENDS if b != "triton"]  # that one: test_triton_slstm.py
INF = float("inf")


def waves(*shape, step, dtype=torch.float64):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape).to(dtype)


def inputs(B=2, T=13, H=3, V=5, gain=3.0):
    """x [B, T, 4, H, V] and r [4, H, V, V], large enough for the recurrence to matter."""
    return gain * waves(B, T, 4, H, V, step=0.37), 1.5 * waves(4, H, V, V, step=0.71)


def masks(B=2, T=13):
    real, start = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    real[0, :2] = real[1, 5] = real[1, -1] = False
    start[0, 7] = start[1, 0] = start[1, 6] = True
    return {"real": real, "start": start}


def unstabilised(x, r, forget):
    """h [B, T, H, V] from the equations as they are printed, without the stabiliser: small gates only."""
    B, T, _, H, V = x.shape
    h = c = n = torch.zeros(B, H, V, dtype=x.dtype)
    found = []
    for t in range(T):
        a = [x[:, t, g] + torch.stack([h[:, j] @ r[g, j] for j in range(H)], 1) for g in range(4)]
        f = torch.sigmoid(a[2]) if forget == "sigmoid" else a[2].exp()
        c, n = f * c + a[1].exp() * torch.tanh(a[0]), f * n + a[1].exp()
        h = torch.sigmoid(a[3]) * c / n
        found.append(h)
    return torch.stack(found, 1)


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_printed_equations(form, forget):
    x, r = inputs(gain=1.0)
    h, _ = slstm(x, r, forget=forget, backend=form)
    torch.testing.assert_close(h, unstabilised(x, r, forget), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_forms_agree_on_outputs_states_and_every_gradient(forget, masked):
    """The state comes in and goes on: its gradients are compared through the h of a continuation."""
    x, r = inputs()
    rows = masks() if masked else {}
    _, given = slstm(x[:, :4] / 2, r, backend="recurrent")
    found = []
    for form in FORMS:
        leaves = [a.clone().requires_grad_() for a in (x, r, *given[:3])]
        h, state = slstm(*leaves[:2], state=SLSTMState(*leaves[2:], given.m), forget=forget, backend=form, **rows)
        after, _ = slstm(leaves[0], leaves[1], state=state, forget=forget, backend=form)
        loss = (h * waves(*h.shape, step=0.53)).sum() + (after * waves(*h.shape, step=0.29)).sum()
        found.append([h, *state, after, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    x, r = (a.requires_grad_() for a in inputs(B=1, T=4, H=2, V=2, gain=1.0))
    assert torch.autograd.gradcheck(lambda x, r: slstm(x, r, backend=form)[0], (x, r), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_cutting_a_sequence_anywhere_changes_nothing(form):
    x, r = inputs()
    rows = masks()
    h, state = slstm(x, r, backend=form, **rows)
    for cut in (1, 6, 7, 12):
        first, middle = slstm(x[:, :cut], r, backend=form, **{k: m[:, :cut] for k, m in rows.items()})
        second, last = slstm(x[:, cut:], r, state=middle, backend=form, **{k: m[:, cut:] for k, m in rows.items()})
        torch.testing.assert_close((torch.cat([first, second], 1), *last), (h, *state), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_token_is_a_no_op_whatever_it_holds(form):
    x, r = inputs()
    want, state = slstm(x, r, backend=form)
    for fill in (0.0, 1e30, float("nan")):
        padded = torch.cat(
            [
                torch.full_like(x[:, :3], fill),
                x[:, :6],
                torch.full_like(x[:, :2], fill),
                x[:, 6:],
                torch.full_like(x[:, :1], fill),
            ],
            1,
        )
        real = torch.tensor([False] * 3 + [True] * 6 + [False] * 2 + [True] * 7 + [False]).expand(2, -1)
        h, last = slstm(padded, r, real=real, backend=form)
        torch.testing.assert_close((h[real].view_as(want), *last), (want, *state), rtol=1e-12, atol=1e-12)
        assert torch.isfinite(h).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_document_start_forgets_everything_h_included(form):
    x, r = inputs()
    start = torch.zeros(2, 13, dtype=torch.bool)
    start[:, 6] = True
    h, state = slstm(x, r, start=start, backend=form)
    alone, last = slstm(x[:, 6:], r, backend=form)
    torch.testing.assert_close((h[:, 6:], *state), (alone, *last), rtol=1e-12, atol=1e-12)
    assert (h[:, 6:] - slstm(x, r, backend=form)[0][:, 6:]).abs().max() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_stay_finite_forward_and_backward(form):
    x, r = inputs()
    for size in (1e2, 1e4):
        big = (x * size).float().requires_grad_()
        weight = r.float().requires_grad_()
        h, state = slstm(big, weight, backend=form)
        gradients = torch.autograd.grad(h.sum(), (big, weight))
        assert all(torch.isfinite(a).all() for a in (h, *state, *gradients))
        assert h.abs().max() <= 1  # sigmoid(o) times a mean of tanh


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_added_to_every_input_gate_changes_nothing(form):
    """The stabiliser's promise: only ratios of exp(i) matter, up to the state's scale."""
    x, r = inputs()
    shifted = x.clone()
    shifted[:, :, 1] += 40.0
    torch.testing.assert_close(slstm(shifted, r, backend=form)[0], slstm(x, r, backend=form)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_normaliser_is_at_least_one_after_a_write(form):
    x, r = inputs()
    assert slstm(x, r, backend=form)[1].n.min() >= 1


def test_heads_do_not_see_each_other():
    x, r = inputs()
    moved = x.clone()
    moved[:, :, :, 1] += 1.0
    a, b = slstm(x, r)[0], slstm(moved, r)[0]
    assert torch.equal(a[:, :, [0, 2]], b[:, :, [0, 2]]) and not torch.equal(a[:, :, 1], b[:, :, 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_calculated_in_float32(form, dtype):
    """The only error left is that of rounding h: half a unit in the last place, and no more."""
    x, r = (a.to(dtype) for a in inputs())
    h, state = slstm(x, r, backend=form)
    truth, _ = slstm(x.double(), r.double(), backend="recurrent")
    assert h.dtype == dtype and all(s.dtype == torch.float32 for s in state)
    assert (h.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_loop(form):
    x, r = (a.float() for a in inputs())
    want = slstm(x, r, backend=form)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(slstm(x, r, backend=form)[0], want)


def test_a_long_memory_is_kept_in_float32():
    """2,000 tokens with forget gates near one: the sum of many small writes does not drift from float64."""
    x = torch.zeros(1, 2000, 4, 1, 4, dtype=torch.float64)
    x[:, :, 0], x[:, :, 2] = waves(1, 2000, 1, 4, step=0.11), 9.0
    r = torch.zeros(4, 1, 4, 4, dtype=torch.float64)
    h, truth = slstm(x.float(), r.float())[0], slstm(x, r)[0]
    assert (h.double() - truth).abs().max() < 2e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 13, 3, 3, 5)}, r"x: expected floating \[B, T, 4, H, V\]"),
        ({"x": torch.zeros(2, 0, 4, 3, 5)}, "at least one token"),
        (
            {"r": torch.zeros(4, 3, 5, 4)},
            r"r: expected floating .*4, 'H': 3, 'V': 5, 'W': 5.*got torch.float32 \[4, 3, 5, 4\]",
        ),
        ({"real": torch.ones(2, 12, dtype=torch.bool)}, r"real: expected bool .*'B': 2, 'T': 13"),
        ({"start": torch.ones(2, 13)}, "start: expected bool"),
        (
            {"state": tuple(torch.zeros(2, 3, 5, dtype=torch.bfloat16) for _ in range(4))},
            "pass the state on as it was returned",
        ),
        ({"forget": "tanh"}, "forget='tanh' is not one of"),
        ({"backend": "parallel"}, "backend='parallel' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    x, r = inputs()
    arguments = {"x": x, "r": r} | change
    with pytest.raises(ValueError, match=message):
        slstm(arguments.pop("x"), arguments.pop("r"), **arguments)


def test_a_backward_without_its_forget_term_would_be_found_out(monkeypatch):
    """The agreement test can fail: a backward that treats the forget gate as constant is off by far more than rounding."""
    backward = cpu.run_loop_backward

    def broken(a, weight, real, start, forget, states, gradients):
        da, first = backward(a, weight, real, start, forget, states, gradients)
        da = da.view(*a.shape[:3], 4, -1).clone()
        da[:, :, :, 2] = 0
        return da.view_as(a), first

    monkeypatch.setattr(cpu, "run_loop_backward", broken)
    with pytest.raises(AssertionError):
        test_forms_agree_on_outputs_states_and_every_gradient("sigmoid", False)


def test_a_fresh_state_is_what_none_means():
    x, r = inputs()
    fresh = fresh_slstm_state(x, torch.float64)
    assert torch.equal(slstm(x, r, state=fresh)[0], slstm(x, r)[0]) and math.isinf(fresh.m.max())
