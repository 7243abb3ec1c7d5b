"""Every form of the mLSTM is the recurrent one: outputs, carried state and all gradients, in float64."""

from functools import cache
from itertools import product

import pytest
import torch
from xlstm_kernels import BACKENDS, MLSTMState, mlstm, mlstm_step

torch.set_num_threads(1)
INF = float("inf")
FORMS = [
    ("recurrent", 64),
    ("chunkwise", 1),
    ("chunkwise", 16),
    ("chunkwise", 64),
    ("chunkwise", 128),
    ("parallel", 64),
]
FORMS += [("streaming", 1), ("streaming", 16), ("streaming", 64), ("streaming", 128)]
TRUTH = ("recurrent", 64)
NEUTRAL = (0.5, 0.5, 0.5, -INF, INF)  # q, k, v, i, f of a masked token: it writes nothing and forgets nothing
LENGTHS = [1, 5, 37, 64, 129]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T=37, B=2, H=3, K=8, V=16, gate=2.0, signed=False):
    """q, k, v, i, f: waves with q and k in the domain of the feature maps, softmaxed, unless `signed`."""
    q, k, v = waves(B, T, H, K, step=0.11), waves(B, T, H, K, step=0.23), waves(B, T, H, V, step=0.36)
    i, f = gate * waves(B, T, H, step=0.49), gate * waves(B, T, H, step=0.62)
    return [*((q, k) if signed else ((3 * q).softmax(-1), (3 * k).softmax(-1))), v, i, f]


def carried(B=2, H=3, K=8, V=16):
    """A state as a sequence before would have left it: n is what v = 1 would have written into C."""
    n = 2 + waves(B, H, K, step=0.71)
    return MLSTMState(n[..., None] * waves(B, H, K, V, step=0.83), n, waves(B, H, step=0.97))


def run(form, x, state=None):
    backend, chunk_size = form
    return mlstm(*x, state=state, backend=backend, chunk_size=chunk_size)


def everything(form, x, state=None, upstream=1.0, autocast=False):
    """h, C, n, m and the gradients of q, k, v, i, f, C, n for a loss that reads h and the final state."""
    x = [a.clone().requires_grad_() for a in x]
    state = state and MLSTMState(*(a.clone().requires_grad_() for a in state))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h, last = run(form, x, state)
    loss = sum(
        (a.double() * waves(*a.shape, step=0.3 + 0.1 * j)).sum() for j, a in enumerate((h * upstream, last.C, last.n))
    )
    loss.backward()
    wanted = {f"d{name}": a.grad for name, a in zip("qkvifCn", [*x, *(state[:2] if state else ())], strict=False)}
    return {"h": h.detach(), **{name: a.detach() for name, a in zip("Cnm", last, strict=True)}, **wanted}


def assert_same(got, want, tol=1e-9):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=tol, atol=tol, msg=lambda text, name=name: f"{name}: {text}"
        )


@cache
def truth(T, gate=2.0):
    return everything(TRUTH, inputs(T, gate=gate), carried())


def error(got, want):
    """Largest error on the scale of the largest entry."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def test_the_recurrent_form_is_the_equations_without_a_stabiliser():
    q, k, v, i, f = inputs(T=12)
    C, n, h = torch.zeros(2, 3, 8, 16, dtype=torch.float64), torch.zeros(2, 3, 8, dtype=torch.float64), []
    for t in range(12):
        keep, write = f[:, t].sigmoid(), i[:, t].exp()
        C = keep[..., None, None] * C + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = keep[..., None] * n + write[..., None] * k[:, t]
        h.append((q[:, t, :, :, None] * C).sum(-2) / (q[:, t] * n).sum(-1, keepdim=True))
    got, state = mlstm(q, k, v, i, f, backend="recurrent")
    torch.testing.assert_close(got, torch.stack(h, 1))
    torch.testing.assert_close(state.C * state.m.exp()[..., None, None], C)
    torch.testing.assert_close(state.n * state.m.exp()[..., None], n)


def test_the_stabiliser_is_the_running_maximum_of_what_was_written():
    q, k, v, _, _ = inputs(T=3, B=1, H=1)
    i, f = torch.tensor([1.0, -2.0, 5.0]).double().view(1, 3, 1), torch.tensor([0.0, 0.0, 0.0]).double().view(1, 3, 1)
    m = [mlstm(*(x[:, :t] for x in (q, k, v, i, f)))[1].m.item() for t in (1, 2, 3)]
    assert m == pytest.approx([1.0, 1.0 - torch.tensor(2.0).log().item(), 5.0])


def test_the_recurrent_gradients_are_the_derivatives_of_h():
    x = [a.requires_grad_() for a in inputs(T=4, B=1, H=1, K=3, V=2)]
    C, n, m = carried(B=1, H=1, K=3, V=2)
    assert torch.autograd.gradcheck(
        lambda C, n, *x: run(TRUTH, x, MLSTMState(C, n, m))[0], (C.requires_grad_(), n.requires_grad_(), *x)
    )


@every_form
@pytest.mark.parametrize("T", LENGTHS)
def test_every_form_agrees_in_output_state_and_gradients(form, T):
    assert_same(everything(form, inputs(T), carried()), truth(T))


@every_form
def test_every_form_agrees_on_a_long_sequence_from_a_fresh_state(form):
    x = inputs(T=1000, B=1, H=1)
    assert_same(everything(form, x), long_truth())


@cache
def long_truth():
    return everything(TRUTH, inputs(T=1000, B=1, H=1))


@every_form
@pytest.mark.parametrize("gate", [50.0, 100.0])
def test_strong_gates_change_nothing_about_agreement(form, gate):
    assert_same(everything(form, inputs(129, gate=gate), carried()), truth(129, gate))


@every_form
def test_every_corner_of_the_gates_has_finite_gradients(form):
    q, k, v, _, _ = inputs(T=70, B=1, H=4)
    i, f = torch.tensor(list(product([-100.0, 100.0], repeat=2))).double().T[:, None, None].expand(2, 1, 70, 4)
    for dtype in (torch.float32, torch.bfloat16):
        got = everything(form, [x.to(dtype) for x in (q, k, v, i, f)])
        assert all(x.isfinite().all() for x in got.values())
        assert got["h"].abs().max() <= 1.01  # a convex combination of v


def cancellation(q, k, i, f):
    """How many digits a signed normaliser loses: sum |w| / |sum w| over the T x T weights, [B, T, H]."""
    b = torch.nn.functional.logsigmoid(f).cumsum(1).transpose(1, 2)
    log_w = b[..., :, None] - b[..., None, :] + i.transpose(1, 2)[..., None, :]
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    w = (log_w - log_w.masked_fill(~causal, -INF).amax(-1, keepdim=True)).exp().masked_fill(~causal, 0.0)
    w = w * torch.einsum("bthk,bshk->bhts", q, k)
    return (w.abs().sum(-1) / w.sum(-1).abs()).transpose(1, 2)


@cache
def signed_truth():
    q, k, v, i, f = x = inputs(129, signed=True)
    lost = cancellation(q, k, i, f)
    upstream = (lost < 100).double()[..., None] / lost[..., None] ** 2
    return x, lost, upstream, everything(TRUTH, x, upstream=upstream)


@every_form
def test_signed_queries_and_keys_agree_as_far_as_the_normaliser_allows(form):
    x, lost, upstream, want = signed_truth()
    assert lost.max() > 100 and (lost < 100).double().mean() > 0.9  # both kinds of token are in the sample
    got = everything(form, x, upstream=upstream)
    assert ((got.pop("h") - want["h"]).abs().amax(-1) / lost**2).max() < 1e-12
    assert_same(got, {name: a for name, a in want.items() if name != "h"})


MASKED = {
    "left": [0, 1, 2],
    "right": [34, 35, 36],
    "inside": [3, 4, 17, 20, 21],
    "ends": [0, 36],
    "all but one": list(range(36)),
}


@every_form
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED.keys())
def test_a_masked_token_is_a_no_op(form, masked):
    x = inputs()
    real = [t for t in range(37) if t not in masked]
    padded = [a.index_fill(1, torch.tensor(masked), e) for a, e in zip(x, NEUTRAL, strict=True)]
    upstream = torch.ones(1, 37, 1, 1).index_fill(1, torch.tensor(masked), 0.0)
    got = everything(form, padded, carried(), upstream)
    assert got["h"].isfinite().all()
    for name in ("di", "df", "dk", "dv"):
        assert (got[name][:, masked] == 0).all()
    h, state = run(TRUTH, [a[:, real] for a in x], carried())
    torch.testing.assert_close(got["h"][:, real], h)
    assert_same({name: got[name] for name in "Cnm"}, state._asdict())
    assert_same(got, everything(TRUTH, padded, carried(), upstream))


@every_form
def test_a_sequence_of_masked_tokens_returns_the_state_it_was_given(form):
    x = [torch.full_like(a, e) for a, e in zip(inputs(), NEUTRAL, strict=True)]
    h, state = run(form, x)
    assert (h == 0).all() and (state.C == 0).all() and (state.n == 0).all() and (state.m == -INF).all()
    assert_same(run(form, x, carried())[1]._asdict(), carried()._asdict(), tol=1e-14)


PACKED = [[37], [1] * 37, [5, 1, 1, 20, 10], [16, 16, 5], [1, 35, 1]]


@every_form
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed_documents_are_separate_documents(form, lengths):
    x = inputs()
    starts = [sum(lengths[:j]) for j in range(len(lengths))]
    packed = [*x[:4], x[4].index_fill(1, torch.tensor(starts), -INF)]
    got = everything(form, packed, carried())
    alone = [run(TRUTH, [a[:, s : s + n] for a in x]) for s, n in zip(starts, lengths, strict=True)]
    torch.testing.assert_close(got["h"], torch.cat([h for h, _ in alone], 1))
    assert_same({name: got[name] for name in "Cnm"}, alone[-1][1]._asdict())
    assert (got["dC"] == 0).all() and (got["dn"] == 0).all() and (got["df"][:, starts] == 0).all()
    assert_same(got, everything(TRUTH, packed, carried()))


@every_form
@pytest.mark.parametrize("gate", [2.0, 100.0])
def test_documents_with_padding_between_start_afresh(form, gate):
    x = inputs(gate=gate)
    for a, e in zip(x, NEUTRAL, strict=True):
        a[:, 9:12], a[0, 20], a[1, 20:30] = e, e, e
    x[4][:, [0, 12, 13, 30]] = -INF
    x[3][0, 30], x[4][1, 20] = -INF, -INF  # a masked token may start a document too
    got = everything(form, x, carried())
    torch.testing.assert_close(got["h"][:, 13:20], run(TRUTH, [a[:, 13:20] for a in x])[0])
    torch.testing.assert_close(got["h"][0, 31:], run(TRUTH, [a[:1, 31:] for a in x])[0][0])
    assert (got["h"][0, 30] == 0).all() and (got["h"][1, 20:30] == 0).all()  # nothing has been written since the start
    assert_same(got, everything(TRUTH, x, carried()))


@pytest.mark.parametrize("first", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
@pytest.mark.parametrize("second", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_any_form_goes_on_where_any_other_stopped(first, second):
    for cut in (1, 16, 29, 36):
        x, state = [a.requires_grad_() for a in inputs()], MLSTMState(*(a.requires_grad_() for a in carried()))
        h1, middle = run(first, [a[:, :cut] for a in x], state)
        h2, last = run(second, [a[:, cut:] for a in x], middle)
        h = torch.cat([h1, h2], 1)
        loss = sum((a * waves(*a.shape, step=0.3 + 0.1 * j)).sum() for j, a in enumerate((h, last.C, last.n)))
        grads = torch.autograd.grad(loss, [*x, state.C, state.n])
        got = {"h": h, **last._asdict(), **{f"d{name}": g for name, g in zip("qkvifCn", grads, strict=True)}}
        assert_same(got, truth(37))


@every_form
def test_the_scale_of_a_state_carries_no_gradient(form):
    C, n, m = carried()
    h, last = run(form, inputs(), MLSTMState(C, n, m.requires_grad_()))
    assert not (h.requires_grad or last.C.requires_grad or last.m.requires_grad)


@every_form
def test_only_the_gradients_that_are_asked_for_are_needed(form):
    q, k, v, i, f = inputs()
    i.requires_grad_()
    h, _ = run(form, (q, k, v, i, f), carried())
    (h * waves(*h.shape, step=0.3)).sum().backward()
    x = [a.clone().requires_grad_() for a in (q, k, v, i.detach(), f)]
    h, _ = run(TRUTH, x, carried())
    (h * waves(*h.shape, step=0.3)).sum().backward()
    torch.testing.assert_close(i.grad, x[3].grad)


@every_form
def test_inputs_need_not_be_contiguous(form):
    x = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in inputs()]
    assert not x[0].is_contiguous()
    assert_same(everything(form, x, carried()), truth(37))


@every_form
def test_the_lowest_number_of_a_dtype_forgets_as_minus_infinity_does(form):
    lowest, infinite = inputs(), inputs()
    lowest[4][:, 20], infinite[4][:, 20] = torch.finfo(torch.float32).min, -INF
    assert_same(everything(form, lowest, carried()), everything(TRUTH, infinite, carried()))


def steps(x, state):
    """The in-place form, as if it were one for sequences."""
    state = MLSTMState(*(a.clone() for a in state))
    return torch.cat([mlstm_step(*(a[:, t : t + 1] for a in x), state)[0] for t in range(x[0].shape[1])], 1), state


@pytest.mark.parametrize("form", [*FORMS, "steps"], ids=str)
def test_a_large_scale_does_not_swallow_slow_forgetting(form):
    """float32 cannot tell m = 2^14 from m + log f here: what it rounds off must be lost from the memory all the same."""
    x, state = [a.float() for a in inputs(T=500)], carried()._replace(m=torch.full((2, 3), 2.0**14).double())
    x[3], x[4] = 2.0**14 - 6 + x[3], torch.full_like(x[4], 8.0)
    want, _ = run(TRUTH, [a.double() for a in x], state)
    state, h = MLSTMState(*(a.float() for a in state)), []
    for piece in zip(*(a.split(50, 1) for a in x), strict=True):  # nor may a hand-over lose it
        y, state = steps(piece, state) if form == "steps" else run(form, piece, state)
        h.append(y)
    assert error(torch.cat(h, 1), want) < 1e-5


@every_form
@pytest.mark.parametrize("gate", [2.0, 50.0])
def test_float32_is_accurate_in_output_state_and_gradients(form, gate):
    want, got = float64(gate), everything(form, [x.float() for x in inputs(T=1000, B=1, H=2, gate=gate)])
    assert all(got[name].dtype == torch.float32 and error(got[name], want[name]) < 1e-5 for name in want)


@cache
def float64(gate):
    return everything(TRUTH, [x.float().double() for x in inputs(T=1000, B=1, H=2, gate=gate)])


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form[0] not in ("recurrent", "parallel") and form[1] >= 64], ids=str
)
def test_float32_forgets_nothing_slowly_over_131072_tokens(form):
    """Forget gates near 1 and a state on a large scale: what float32 rounds off m must not be lost from the memory."""
    x = [a.float() for a in inputs(T=131072, B=1, H=1, K=2, V=2)]
    x[3], x[4] = 40 + x[3], 10 + x[4]
    want, state = slow_forgetting()
    h, last = run(form, x)
    assert error(h, want) < 3e-5
    assert error(last.n * (last.m - 40).exp()[..., None], state.n * (state.m - 40).exp()[..., None]) < 3e-5


@cache
def slow_forgetting():
    x = [a.float().double() for a in inputs(T=131072, B=1, H=1, K=2, V=2)]
    return mlstm(
        *x[:3], (40 + x[3].float()).double(), (10 + x[4].float()).double(), backend="chunkwise", chunk_size=256
    )


@every_form
@pytest.mark.parametrize("context", ["inputs", "autocast"])
def test_half_precision_keeps_a_float32_state(form, context):
    x = [a.to(torch.bfloat16) for a in inputs()]
    want, state = run(TRUTH, [a.double() for a in x])
    if context == "autocast":  # the calculation stays in float32
        with torch.autocast("cpu", torch.bfloat16):
            h, last = run(form, [a.float() for a in x])
        assert h.dtype == torch.float32 and error(h, want) < 1e-5
    else:
        h, last = run(form, x)
        assert h.dtype == torch.bfloat16 and error(h, want) < 5e-3
    assert all(a.dtype == torch.float32 for a in last)
    assert all(error(a, b) < 1e-5 for a, b in zip(last, state, strict=True))


@every_form
def test_autocast_leaves_the_gradients_in_float32(form):
    got = everything(form, [a.float() for a in inputs()], MLSTMState(*(a.float() for a in carried())), autocast=True)
    assert all(error(got[name], truth(37)[name]) < 2e-5 for name in got)


def test_the_choice_of_a_backend_changes_nothing_but_the_time():
    for T in (1, 5, 200):
        torch.testing.assert_close(mlstm(*inputs(T), state=carried())[0], run(TRUTH, inputs(T), carried())[0])


def test_what_does_not_fit_is_refused_by_name():
    q, k, v, i, f = inputs()
    C, n, m = carried()
    for wrong, said in [
        (lambda: mlstm(q, k[..., :4], v, i, f), r"k: expected .*'K': 8.*got torch.float64 \[2, 37, 3, 4\]"),
        (lambda: mlstm(q, k, v[:, :5], i, f), r"v: expected .*'T': 37.*got torch.float64 \[2, 5, 3, 16\]"),
        (lambda: mlstm(q, k, v, i[..., None], f), r"i: expected .*got torch.float64 \[2, 37, 3, 1\]"),
        (lambda: mlstm(q, k, v, i, f.long()), "f: expected floating .*got torch.int64"),
        (lambda: mlstm(q[0], k, v, i, f), r"q, v: expected \[B, T, H, K\]"),
        (lambda: mlstm(q[:, :0], k[:, :0], v[:, :0], i[:, :0], f[:, :0]), "at least one token"),
        (lambda: mlstm(q, k, v, i, f, state=(C, n[:1], m)), r"state.n: expected .*got torch.float64 \[1, 3, 8\]"),
        (
            lambda: mlstm(q, k, v, i, f, state=(C.bfloat16(), n, m)),
            "state.C: expected float32 or float64, got torch.bfloat16",
        ),
        (lambda: mlstm(q, k, v, i, f, state=(C, n)), "got 2 tensors"),
        (lambda: mlstm(q, k, v, i, f, chunk_size=0), "chunk_size=0"),
        (lambda: mlstm(q, k, v, i, f, backend="fast"), f"backend='fast' is not one of .*{sorted(BACKENDS)[-1]}"),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_in_place_are_the_recurrence(dtype):
    x = [a.to(dtype) for a in inputs()]
    for a, e in zip(x, NEUTRAL, strict=True):
        a[0, 9:11] = e
    x[4][:, 20] = -INF
    x[3][1, 20] = -INF  # a masked token starts the second row's document: the state is empty once more
    want, last = run(TRUTH, x)
    state = MLSTMState(
        torch.zeros(2, 3, 8, 16).to(dtype), torch.zeros(2, 3, 8).to(dtype), torch.full((2, 3), -INF).to(dtype)
    )
    addresses, h = [a.data_ptr() for a in state], []
    for t in range(37):
        y, state = mlstm_step(*(a[:, t : t + 1] for a in x), state)
        h.append(y)
        assert t != 20 or (state.m[1] == -INF).all()
    torch.testing.assert_close(torch.cat(h, 1), want)
    assert_same(state._asdict(), last._asdict(), tol=1e-9 if dtype == torch.float64 else 1e-5)
    assert [a.data_ptr() for a in state] == addresses


def test_steps_refuse_gradients_and_more_than_one_token():
    x, state = inputs(), carried()
    with pytest.raises(ValueError, match="expected one token, got T=37"):
        mlstm_step(*x, state)
    with pytest.raises(ValueError, match="no gradients"):
        mlstm_step(*(a[:, :1].requires_grad_() for a in x), state)


def test_the_streaming_form_compiles_into_one_graph():
    fn = torch.compile(lambda *x: run(("streaming", 64), x)[0].sin(), backend="aot_eager", fullgraph=True)
    x, same = [a.requires_grad_() for a in inputs(200)], [a.requires_grad_() for a in inputs(200)]
    fn(*x).sum().backward()
    run(TRUTH, same)[0].sin().sum().backward()
    for a, b in zip(x, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_streaming_operator_tells_the_compiler_the_truth():
    x, state = inputs(100), carried()
    args = [a.requires_grad_() for a in (*x, state.C, state.n)]
    torch.library.opcheck(torch.ops.xlstm_kernels.mlstm_streaming.default, (*args, state.m, 64, True))


def test_training_goes_on_after_inference():
    """Scratch memory outlives a call; what inference_mode made must not be in the way of a gradient."""
    with torch.inference_mode():
        run(("streaming", 64), inputs(37))
    assert_same(everything(("streaming", 64), inputs(37), carried()), truth(37))


@every_form
def test_packed_sequences_have_states_of_their_own(form):
    ends, x, state = [0, 1, 6, 37], inputs(B=1), carried(B=3)
    cu_seqlens = torch.tensor(ends)

    def packed(upstream):
        y, own = [a.clone().requires_grad_() for a in x], MLSTMState(*(a.clone().requires_grad_() for a in state))
        h, last = mlstm(*y, state=own, cu_seqlens=cu_seqlens, backend=form[0], chunk_size=form[1])
        (h * upstream).sum().backward()
        found = {"h": h.detach(), **{n: a.detach() for n, a in zip("Cnm", last, strict=True)}}
        return found | {f"d{n}": a.grad for n, a in zip("qkvifCn", [*y, *own[:2]], strict=True)}

    upstream = waves(1, 37, 3, 16, step=0.4)
    got = packed(upstream)
    for j, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        y, own = (
            [z[:, a:b].clone().requires_grad_() for z in x],
            MLSTMState(*(z[j : j + 1].clone().requires_grad_() for z in state)),
        )
        h, last = mlstm(*y, state=own, backend=TRUTH[0])
        (h * upstream[:, a:b]).sum().backward()
        alone = {"h": h.detach(), **{f"d{n}": z.grad for n, z in zip("qkvif", y, strict=True)}}
        assert_same({n: got[n][:, a:b] for n in alone}, alone)
        states = {**{n: z.detach() for n, z in zip("Cnm", last, strict=True)}, "dC": own.C.grad, "dn": own.n.grad}
        assert_same({n: got[n][j : j + 1] for n in states}, states)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 5, 30]), r"expected 0, increasing, up to T=37, got \[0, 5, 30\]"),
        (torch.tensor([0, 5, 5, 37]), "increasing"),
        (torch.tensor([0.0, 37.0]), "expected int32 or int64"),
        (torch.tensor([[0, 37]]), r"\[N \+ 1\].*got torch.int64 \[1, 2\]"),
    ],
)
def test_packing_that_does_not_cover_the_row_is_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        mlstm(*inputs(B=1), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="one row"):
        mlstm(*inputs(B=2), cu_seqlens=torch.tensor([0, 37]))
