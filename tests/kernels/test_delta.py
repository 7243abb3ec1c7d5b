"""The gated delta rule: its chunkwise form is the equation, in outputs, carried state and all gradients, in float64."""

import pytest
import torch
from xlstm_kernels import MLSTMState, delta, delta_step
from xlstm_kernels.delta_rule.reference import state_of

torch.set_num_threads(1)
INF = float("inf")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NEUTRAL = (0.5, 0.5, 0.5, -INF, INF)  # q, k, v, i, f of a masked token
FORMS = [("recurrent", 64), ("chunkwise", 1), ("chunkwise", 5), ("chunkwise", 16), ("chunkwise", 64)]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T=37, B=2, H=3, K=8, V=5, gate=2.0):
    """q, k, v, i, f: waves; keys and queries of length 1, of either sign."""
    q, k, v = waves(B, T, H, K, step=0.11), waves(B, T, H, K, step=0.23), waves(B, T, H, V, step=0.36)
    i, f = gate * waves(B, T, H, step=0.49), gate * waves(B, T, H, step=0.62) + 1
    return [q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, i, f]


def carried(B=2, H=3, K=8, V=5):
    return state_of(waves(B, H, K, V, step=0.83))


def run(form, x, state=None):
    return delta(*x, state=state, backend=form[0], chunk_size=form[1])


def everything(form, x, state=None):
    """h, C and the gradients of q, k, v, i, f, C for a loss that reads h and the final state."""
    x = [a.clone().requires_grad_() for a in x]
    state = state and MLSTMState(*(a.clone().requires_grad_() for a in state))
    h, last = run(form, x, state)
    (h * waves(*h.shape, step=0.3)).sum().add((last.C * waves(*last.C.shape, step=0.4)).sum()).backward()
    found = {"h": h.detach(), "C": last.C.detach()} | {f"d{name}": a.grad for name, a in zip("qkvif", x, strict=True)}
    return found | ({"dC": state.C.grad} if state else {})


@every_form
def test_every_form_is_the_equation_with_its_matrix_written_out(form):
    q, k, v, i, f = inputs(T=23)
    h, last = run(form, (q, k, v, i, f), carried())
    for b, head in ((0, 0), (1, 2)):
        C = carried().C[b, head]
        for t in range(23):
            key, write = k[b, t, head], torch.sigmoid(i[b, t, head])
            erase = torch.eye(8, dtype=torch.float64) - write * torch.outer(key, key)
            C = torch.sigmoid(f[b, t, head]) * erase @ C + write * torch.outer(key, v[b, t, head])
            torch.testing.assert_close(h[b, t, head], q[b, t, head] @ C, **CLOSE)
        torch.testing.assert_close(last.C[b, head], C, **CLOSE)
    assert not last.n.any() and not last.m.any()


def test_with_all_of_a_write_a_key_reads_back_the_value_that_it_was_given_last():
    """b = 1 and unit keys: exact recall, where a sum would return a mixture."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 3]].view(1, 5, 1, 4)
    v, gates = waves(1, 5, 1, 3, step=0.7), torch.full((1, 5, 1), INF, dtype=torch.float64)
    _, state = delta(k, k, v, gates, gates)
    torch.testing.assert_close(state.C[0, 0], v[0, [0, 3, 2, 4], 0], **CLOSE)


@pytest.mark.parametrize("T", [1, 4, 16, 17, 64, 70])
@every_form
def test_every_form_agrees_in_output_state_and_gradients(form, T):
    want = everything(FORMS[0], inputs(T), carried())
    for name, found in everything(form, inputs(T), carried()).items():
        torch.testing.assert_close(found, want[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gate", [10.0, 100.0, 1000.0])
@every_form
def test_strong_gates_change_nothing_about_agreement(form, gate):
    want = everything(FORMS[0], inputs(gate=gate))
    for name, found in everything(form, inputs(gate=gate)).items():
        torch.testing.assert_close(
            found, want[name], rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("masked", [(0,), (36,), (5, 6, 7), (0, 1, 15, 16, 17, 35, 36)])
@every_form
def test_a_masked_token_is_a_no_op(form, masked):
    x, kept = inputs(), [t for t in range(37) if t not in masked]
    want, state = run(FORMS[0], [a[:, kept] for a in x], carried())
    full = [a.clone() for a in x]
    for a, neutral in zip(full, NEUTRAL, strict=True):
        a[:, masked] = neutral
    full = [a.requires_grad_() for a in full]
    h, last = run(form, full, carried())
    torch.testing.assert_close((h[:, kept], last.C), (want, state.C), **CLOSE)
    h[:, kept].sum().backward()
    assert all(a.grad.isfinite().all() and (n == 0 or not a.grad[:, masked].any()) for n, a in enumerate(full))


@pytest.mark.parametrize("lengths", [(37,), (1, 36), (12, 1, 1, 23), (16, 16, 5)])
@every_form
def test_packed_documents_are_separate_documents(form, lengths):
    """f = -inf at a start; several starts stand in one chunk. The state carried in belongs to the document before."""
    x = inputs()
    want = [
        run(FORMS[0], [a[:, begin : begin + n] for a in x])
        for begin, n in zip(torch.tensor((0, *lengths)).cumsum(0), lengths, strict=False)
    ]
    x[4] = x[4].clone()
    x[4][:, torch.tensor((0, *lengths)).cumsum(0)[:-1]] = -INF
    for start in (-INF, -1e9):  # the lowest numbers of a dtype forget as -inf does
        x[4] = x[4].clamp_min(start)
        h, last = run(form, x, carried())
        torch.testing.assert_close(h, torch.cat([part for part, _ in want], 1), **CLOSE)
        torch.testing.assert_close(last.C, want[-1][1].C, **CLOSE)
    assert all(grad.isfinite().all() for grad in everything(form, x, carried()).values())


@every_form
def test_any_form_goes_on_where_any_other_stopped(form):
    x = inputs()
    want, state = run(FORMS[0], x, carried())
    for other in FORMS:
        first, middle = run(other, [a[:, :14] for a in x], carried())
        rest, last = run(form, [a[:, 14:] for a in x], middle)
        torch.testing.assert_close((torch.cat([first, rest], 1), last.C), (want, state.C), **CLOSE)


def test_steps_in_place_are_the_recurrence():
    x, state = inputs(), carried()
    place, (want, last) = state.C.data_ptr(), run(FORMS[0], x, carried())
    found = [delta_step(*(a[:, t : t + 1] for a in x), state) for t in range(37)]
    torch.testing.assert_close((torch.cat(found, 1), state.C), (want, last.C), **CLOSE)
    assert state.C.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_a_float32_state_also_under_autocast(dtype):
    x = [a.to(dtype) if n < 3 else a.float() for n, a in enumerate(inputs(T=300))]
    truth, _ = run(FORMS[0], [a.double() for a in x])
    with torch.autocast("cpu", torch.bfloat16):
        h, state = delta(*x)
    assert h.dtype == dtype and state.C.dtype == torch.float32
    assert (h.double() - truth).abs().max() < (1e-5 if dtype == torch.float32 else 2**-8) * truth.abs().max()


def test_what_does_not_fit_is_refused_by_name():
    q, k, v, i, f = inputs()
    for wrong, name in (((q, k[..., :4], v, i, f), "k: expected"), ((q, k, v, i[:, :3], f), "i: expected")):
        with pytest.raises(ValueError, match=name):
            delta(*wrong)
    with pytest.raises(ValueError, match="backend='triton' is not one of"):
        delta(q, k, v, i, f, backend="triton")
    with pytest.raises(ValueError, match="expected one token"):
        delta_step(q, k, v, i, f, carried())
    with pytest.raises(ValueError, match="no gradients"):
        delta_step(*(a[:, :1].requires_grad_() for a in (q, k, v, i, f)), carried())
