"""The Triton form of the mLSTM is the recurrent one: outputs, carried state and all gradients, measured from float64.

On a machine without a GPU the kernels run in Triton's interpreter, in tiles of 16 so that a few tokens are several
chunks.
"""

import os
from functools import cache
from itertools import product

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from true_bfloat16 import true_bfloat16  # noqa: E402, F401, a fixture
from xlstm_kernels import MLSTMState, mlstm  # noqa: E402
from xlstm_kernels.backends.launch import Tile, using  # noqa: E402
from xlstm_kernels.mlstm import triton as gpu  # noqa: E402
from xlstm_kernels.mlstm.triton import mlstm_triton  # noqa: E402

torch.set_num_threads(1)
INF = float("inf")
NEUTRAL = (0.5, 0.5, 0.5, -INF, INF)  # q, k, v, i, f of a masked token: it writes nothing and forgets nothing
SMALL = Tile({"BT": 16, "BR": 16, "BK": 16, "BV": 16}, 4, 1)
BLOCKS = Tile({"BT": 32, "BR": 16, "BK": 16, "BV": 16}, 4, 1)


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T=37, B=1, H=1, K=8, V=16, gate=2.0, signed=False):
    """q, k, v, i, f in float64, rounded to float32: waves with q and k in the domain of the feature maps, softmaxed,
    unless `signed`.
    """
    q, k, v = waves(B, T, H, K, step=0.11), waves(B, T, H, K, step=0.23), waves(B, T, H, V, step=0.36)
    i, f = gate * waves(B, T, H, step=0.49), gate * waves(B, T, H, step=0.62)
    x = *((q, k) if signed else ((3 * q).softmax(-1), (3 * k).softmax(-1))), v, i, f
    return [a.float().double() for a in x]


def carried(B=1, H=1, K=8, V=16):
    """A state as a sequence before would have left it: n is what v = 1 would have written into C."""
    n = 2 + waves(B, H, K, step=0.71)
    return MLSTMState(
        *(a.float().double() for a in (n[..., None] * waves(B, H, K, V, step=0.83), n, waves(B, H, step=0.97)))
    )


def recurrent(*x):
    return mlstm(*x[:5], state=x[5], backend="recurrent")


def everything(fn, x, state=None, upstream=1.0, dtype=None, **options):
    """h, C, n, m and the gradients of q, k, v, i, f, C, n for a loss that reads h and the final state, all in float64
    on the CPU.

    The loss reads C and n as they are: their scale is m, which every form rounds to the same float32 but for its last
        digit.
    """
    device = "cpu" if dtype is None else DEVICE
    x = [a.to(device, dtype).clone().requires_grad_() for a in x]
    state = state and MLSTMState(*(a.to(device, dtype and torch.float32).clone().requires_grad_() for a in state))
    h, last = fn(*x, state, **options)
    parts = [a.cpu().double() for a in (h, last.C, last.n)]
    parts[0] = parts[0] * upstream
    loss = sum((a * waves(*a.shape, step=0.3 + 0.1 * j)).sum() for j, a in enumerate(parts))
    loss.backward()
    wanted = {f"d{name}": a.grad for name, a in zip("qkvifCn", [*x, *(state[:2] if state else ())], strict=False)}
    got = {"h": h.detach(), **{name: a.detach() for name, a in zip("Cnm", last, strict=True)}, **wanted}
    return {name: a.cpu().double() for name, a in got.items()}


def triton(x, state=None, upstream=1.0, dtype=torch.float32, tile=SMALL, **options):
    """The Triton form's `everything`."""
    with using(tile):
        return everything(mlstm_triton, x, state, upstream, dtype, **options)


def error(got, want, scale=0.0):
    """Largest error on the scale of the largest entry, at least `scale`.

    an infinite log-scale has to be hit exactly.
    """
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    return (
        ((got - want)[finite].abs().max() / max(want[finite].abs().max().item(), scale, 1e-30)).item()
        if finite.any()
        else 0.0
    )


def assert_close(got, want, tol=3e-5, grad_tol=1e-4):
    """Gradients of which nothing is left but the rounding of larger ones are measured by those."""
    assert got.keys() == want.keys()
    largest = max((a.abs().max().item() for name, a in want.items() if name[0] == "d"), default=0.0)
    errors = {name: error(got[name], a, 0.01 * largest if name[0] == "d" else 0.0) for name, a in want.items()}
    assert not {name: e for name, e in errors.items() if e > (grad_tol if name[0] == "d" else tol)}


@cache
def truth(T, gate=2.0, state=True):
    return everything(recurrent, inputs(T, gate=gate), carried() if state else None)


@pytest.mark.parametrize("T", [1, 5, 37, 64, 129])
def test_it_agrees_in_output_state_and_gradients(T):
    assert_close(triton(inputs(T), carried()), truth(T))


@pytest.mark.parametrize("T", [5, 37])
def test_it_agrees_from_a_fresh_state(T):
    assert_close(triton(inputs(T)), truth(T, state=False))


def test_it_agrees_on_a_long_sequence_in_blocks_of_rows():
    x = inputs(1000)
    assert_close(triton(x, tile=Tile({"BT": 128, "BR": 64, "BK": 16, "BV": 16}, 4, 1)), everything(recurrent, x))


@pytest.mark.parametrize("K, V", [(24, 40), (5, 3)])
def test_keys_and_values_may_differ_in_size_and_need_not_fill_a_tile(K, V):
    x, state = inputs(20, K=K, V=V), carried(K=K, V=V)
    assert_close(triton(x, state, tile=BLOCKS), everything(recurrent, x, state))


def test_a_value_may_have_256_entries_and_a_batch_several_rows_and_heads():
    x, state = inputs(17, B=2, H=2, K=16, V=256), carried(B=2, H=2, K=16, V=256)
    assert_close(
        triton(x, state, tile=SMALL._replace(sizes={"BT": 32, "BR": 32, "BK": 16, "BV": 128})),
        everything(recurrent, x, state),
    )


def test_the_tiles_of_the_table_agree_too():
    with torch.no_grad():
        x, state = inputs(150, K=64, V=64), carried(K=64, V=64)
        want, last = recurrent(*x, state)
        h, got = mlstm_triton(*(a.float().to(DEVICE) for a in x), MLSTMState(*(a.float().to(DEVICE) for a in state)))
    assert error(h.cpu().double(), want) < 3e-5
    assert all(error(a.cpu().double(), b) < 3e-5 for a, b in zip(got, last, strict=True))


@pytest.mark.parametrize("gate", [50.0, 100.0])
def test_strong_gates_change_nothing_about_agreement(gate):
    assert_close(triton(inputs(129, gate=gate), carried(), tile=BLOCKS), truth(129, gate))


@pytest.mark.usefixtures("true_bfloat16")
def test_every_corner_of_the_gates_has_finite_gradients():
    q, k, v, _, _ = inputs(T=20, H=4)
    i, f = torch.tensor(list(product([-100.0, 100.0], repeat=2))).double().T[:, None, None].expand(2, 1, 20, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = triton((q, k, v, i, f), dtype=dtype)
        assert all(a.isfinite().all() for a in got.values())
        assert got["h"].abs().max() <= 1.01  # a convex combination of v


def cancellation(q, k, i, f):
    """How many digits a signed normaliser loses: sum |w| / |sum w| over the T x T weights, [B, T, H]."""
    b = torch.nn.functional.logsigmoid(f).cumsum(1).transpose(1, 2)
    log_w = b[..., :, None] - b[..., None, :] + i.transpose(1, 2)[..., None, :]
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    w = (log_w - log_w.masked_fill(~causal, -INF).amax(-1, keepdim=True)).exp().masked_fill(~causal, 0.0)
    w = w * torch.einsum("bthk,bshk->bhts", q, k)
    return (w.abs().sum(-1) / w.sum(-1).abs()).transpose(1, 2)


def test_signed_queries_and_keys_agree_as_far_as_the_normaliser_allows():
    q, k, v, i, f = x = inputs(129, signed=True)
    lost = cancellation(q, k, i, f)
    assert lost.max() > 100 and (lost < 100).double().mean() > 0.9  # both kinds of token are in the sample
    upstream = (lost < 100).double()[..., None] / lost[..., None] ** 2
    got, want = triton(x, upstream=upstream), everything(recurrent, x, upstream=upstream)
    assert ((got.pop("h") - want.pop("h")).abs().amax(-1) / lost**2).max() < 1e-6
    assert_close(got, want)


MASKED = {
    "left": [0, 1, 2],
    "right": [34, 35, 36],
    "inside": [3, 4, 17, 20, 21],
    "a whole chunk": [*range(14, 35)],
    "all but one": [*range(36)],
}


@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED.keys())
def test_a_masked_token_is_a_no_op(masked):
    x = inputs()
    real = [t for t in range(37) if t not in masked]
    padded = [a.index_fill(1, torch.tensor(masked), e) for a, e in zip(x, NEUTRAL, strict=True)]
    upstream = torch.ones(1, 37, 1, 1).double().index_fill(1, torch.tensor(masked), 0.0)
    got = triton(padded, carried(), upstream)
    assert got["h"].isfinite().all()
    for name in ("di", "df", "dk", "dv"):
        assert (got[name][:, masked] == 0).all()
    h, state = recurrent(*(a[:, real] for a in x), carried())
    assert error(got["h"][:, real], h) < 3e-5
    assert all(error(got[name], a) < 3e-5 for name, a in state._asdict().items())
    del got["h"]  # that of the masked tokens means nothing
    assert_close(
        got, {name: a for name, a in everything(recurrent, padded, carried(), upstream).items() if name != "h"}
    )


def test_a_sequence_of_masked_tokens_returns_the_state_it_was_given():
    x = [torch.full_like(a, e).float().to(DEVICE) for a, e in zip(inputs(), NEUTRAL, strict=True)]
    with using(SMALL):
        h, state = mlstm_triton(*x)
        assert (h == 0).all() and (state.C == 0).all() and (state.n == 0).all() and (state.m == -INF).all()
        given = MLSTMState(*(a.float().to(DEVICE) for a in carried()))
        got = mlstm_triton(*x, given)[1]
    assert torch.equal(got.m, given.m)
    torch.testing.assert_close(got, given, rtol=3e-7, atol=3e-7)


PACKED = [[37], [1] * 37, [5, 1, 1, 20, 10], [16, 16, 5]]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_documents_inside_a_sequence_are_separate(lengths):
    x = inputs()
    starts = [sum(lengths[:j]) for j in range(len(lengths))]
    packed = [*x[:4], x[4].index_fill(1, torch.tensor(starts), -INF)]
    got = triton(packed, carried(), tile=BLOCKS)
    assert (got["dC"] == 0).all() and (got["dn"] == 0).all() and (got["df"][:, starts] == 0).all()
    assert_close(got, everything(recurrent, packed, carried()))


def test_documents_with_padding_between_start_afresh():
    x = inputs(B=2, gate=100.0)
    for a, e in zip(x, NEUTRAL, strict=True):
        a[:, 9:12], a[0, 20], a[1, 20:30] = e, e, e
    x[4][:, [0, 12, 13, 30]] = -INF
    x[3][0, 30], x[4][1, 20] = -INF, torch.finfo(torch.float32).min  # a masked token may start a document too
    got = triton(x, carried(B=2))
    assert (got["h"][0, 30] == 0).all() and (got["h"][1, 20:30] == 0).all()  # nothing has been written since the start
    assert_close(got, everything(recurrent, x, carried(B=2)))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_are_separate_runs_each_with_its_own_state(index):
    lengths, x, state = [5, 1, 17, 14], inputs(H=2), carried(B=4, H=2)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=index)
    got = triton(x, state, cu_seqlens=cu.to(DEVICE))

    def apart(*x):
        *x, state = x
        pieces = zip(*(a.split(lengths, 1) for a in x), *(a.split(1) for a in state), strict=True)
        h, last = zip(*(recurrent(*piece[:5], MLSTMState(*piece[5:])) for piece in pieces), strict=True)
        return torch.cat(h, 1), MLSTMState(*map(torch.cat, zip(*last, strict=True)))

    assert_close(got, everything(apart, x, state))


@pytest.mark.parametrize("packed", [False, True])
def test_two_levels_of_scan_are_one(packed, monkeypatch):
    x, cu = inputs(75, V=8), torch.tensor([0, 20, 75], device=DEVICE) if packed else None
    state = carried(B=2 if packed else 1, V=8)
    one = triton(x, state, cu_seqlens=cu)
    monkeypatch.setattr(gpu, "segments_for", lambda *_: 3)
    two = triton(x, state, cu_seqlens=cu)
    assert_close(two, one, tol=1e-6, grad_tol=1e-6)
    fresh = triton(x, cu_seqlens=cu)
    monkeypatch.undo()
    assert_close(fresh, triton(x, cu_seqlens=cu), tol=1e-6, grad_tol=1e-6)


def test_a_small_batch_of_long_sequences_is_scanned_in_segments():
    assert [gpu.segments_for(*sizes, torch.device("cpu")) for sizes in ((256, 64), (16, 7), (16, 64))] == [1, 1, 8]


@pytest.mark.parametrize("first", ["triton", "recurrent"])
def test_it_goes_on_where_another_stopped_and_the_other_way_round(first):
    def two(q, k, v, i, f, state):
        forms = (on_device, recurrent) if first == "triton" else (recurrent, on_device)
        h1, middle = forms[0](*(a[:, :21] for a in (q, k, v, i, f)), state)
        h2, last = forms[1](*(a[:, 21:] for a in (q, k, v, i, f)), middle)
        return torch.cat([h1, h2], 1), last

    def on_device(*x):
        *x, state = x
        with using(SMALL):
            h, last = mlstm_triton(
                *(a.float().to(DEVICE) for a in x), MLSTMState(*(a.float().to(DEVICE) for a in state))
            )
        return h.cpu().double(), MLSTMState(*(a.cpu().double() for a in last))

    assert_close(everything(two, inputs(), carried()), truth(37))


SPREAD = {
    "transposed": lambda a: a.transpose(1, 2).contiguous().transpose(1, 2),
    "every second entry": lambda a: torch.stack([a, a], -1).flatten(-2)[..., ::2],
    "heads repeated": lambda a: a[:, :, :1].expand_as(a),
}


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD.keys())
def test_inputs_need_not_be_contiguous(spread):
    assert not spread(inputs(H=2)[0]).is_contiguous()
    with using(SMALL):
        got = everything(lambda *x: mlstm_triton(*map(spread, x[:5])), inputs(H=2), dtype=torch.float32)
    assert_close(got, everything(lambda *x: recurrent(*map(spread, x[:5]), None), inputs(H=2)))


def test_the_scale_of_a_state_carries_no_gradient_and_unused_outputs_cost_none():
    x, (C, n, m) = [a.float().to(DEVICE) for a in inputs()], (a.float().to(DEVICE) for a in carried())
    with using(SMALL):
        h, last = mlstm_triton(*x, MLSTMState(C, n, m.requires_grad_()))
        assert not (h.requires_grad or last.C.requires_grad or last.m.requires_grad)
        x[3].requires_grad_()
        mlstm_triton(*x, MLSTMState(C, n, m))[1].n.sum().backward()  # neither h nor C is used
    same = [a.detach().cpu().double() for a in x]
    recurrent(*same[:3], same[3].requires_grad_(), same[4], carried())[1].n.sum().backward()
    assert error(x[3].grad.cpu().double(), same[3].grad) < 1e-4


def test_a_large_scale_does_not_swallow_slow_forgetting():
    """float32 cannot tell m = 2^14 from m + log f here: what it rounds off must be lost from the memory all the same."""
    x, state = inputs(T=300), carried()._replace(m=torch.full((1, 1), 2.0**14).double())
    x[3], x[4] = (2.0**14 - 6 + x[3]).float().double(), torch.full_like(x[4], 8.0)
    want, _ = recurrent(*x, state)
    last, h = MLSTMState(*(a.float().to(DEVICE) for a in state)), []
    with using(Tile({"BT": 64, "BR": 32, "BK": 16, "BV": 16}, 4, 1)):
        for piece in zip(*(a.float().to(DEVICE).split(100, 1) for a in x), strict=True):  # nor may a hand-over lose it
            y, last = mlstm_triton(*piece, last)
            h.append(y.cpu().double())
    assert error(torch.cat(h, 1), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-5), (torch.float16, 5e-3)], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["slow forgetting", "wild gates"])
def test_it_is_accurate_over_131072_tokens(kind, dtype, tol):
    x = inputs(131072, K=4, V=4, gate=50.0 if kind == "wild gates" else 1.0)
    if kind == "slow forgetting":
        x[3], x[4] = (40 + x[3]).float().double(), (10 + x[4]).float().double()
    x = [*(a.to(dtype).double() for a in x[:3]), *x[3:]]
    want, state = mlstm(*x, backend="chunkwise", chunk_size=256)
    with using(Tile({"BT": 128, "BR": 128, "BK": 16, "BV": 16}, 4, 1)):
        h, last = mlstm_triton(*(a.to(DEVICE, dtype) for a in x[:3]), *(a.float().to(DEVICE) for a in x[3:]))
    assert error(h.cpu().double(), want) < tol
    n = last.n.cpu().double() * (last.m.cpu().double() - state.m).exp()[..., None]
    assert error(n, state.n) < tol


def eager(q, k, v, i, f):
    """Plain code in the dtype of the inputs, gates in float32: the parallel form."""
    b = torch.nn.functional.logsigmoid(f.float()).cumsum(1).transpose(1, 2)
    log_w = b[..., :, None] - b[..., None, :] + i.float().transpose(1, 2)[..., None, :]
    log_w = log_w.masked_fill(~torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(), -INF)
    w = (log_w - log_w.amax(-1, keepdim=True).detach()).exp().to(q.dtype)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * w
    return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v)


@pytest.mark.usefixtures("true_bfloat16")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [2.0, 20.0])
def test_half_precision_is_within_twice_the_error_of_plain_code(gate, half):
    x = [a.to(half) for a in inputs(100, gate=gate)]
    C = [a.double().clone().requires_grad_() for a in x]
    truth = recurrent(*C, None)[0]
    weight = waves(*truth.shape, step=0.3)
    plain, ours = ([a.detach().clone().requires_grad_() for a in x] for _ in range(2))
    h_plain = eager(*plain)
    with using(BLOCKS):
        moved = [a.to(DEVICE) for a in ours]
        h = mlstm_triton(*moved)[0].cpu()
        assert h.dtype == half
        for y in (truth, h_plain, h):
            (y.double() * weight).sum().backward()
    pairs = [(h, h_plain, truth), *((a.grad, b.grad, c.grad) for a, b, c in zip(ours, plain, C, strict=True))]
    for name, (a, b, c) in zip(("h", "dq", "dk", "dv", "di", "df"), pairs, strict=True):
        assert error(a.double(), c) <= 2 * error(b.double(), c), name


def test_half_precision_survives_many_tokens_of_equal_weight():
    """The memory of 70000 equal tokens is beyond float16; the states between chunks are means, which are not."""
    x = [a.half().to(DEVICE) for a in (torch.ones(1, 20, 1, 4), torch.ones(1, 20, 1, 4), 3 * torch.ones(1, 20, 1, 4))]
    i, f = torch.zeros(1, 20, 1, device=DEVICE), torch.full((1, 20, 1), 30.0, device=DEVICE)
    n = torch.full((1, 1, 4), 7e4, device=DEVICE)
    with using(SMALL):
        h, last = mlstm_triton(
            *x, i, f, MLSTMState(n[..., None].expand(1, 1, 4, 4) * 3, n, torch.zeros(1, 1, device=DEVICE))
        )
    assert (h == 3).all()
    torch.testing.assert_close(last.n, n + 20)
    torch.testing.assert_close(last.C, 3 * (n + 20)[..., None].expand(1, 1, 4, 4), rtol=1e-4, atol=0)


def test_it_repeats_itself_bit_by_bit():
    a, b = triton(inputs(), carried()), triton(inputs(), carried())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_operators_tell_the_compiler_the_truth():
    x, state = [a.float().to(DEVICE).requires_grad_() for a in inputs(20)], [a.float().to(DEVICE) for a in carried()]
    none = (None, None, None)
    with using(SMALL):
        torch.library.opcheck(
            torch.ops.xlstm_kernels.mlstm_chunks.default, (*x, state[0].requires_grad_(), *state[1:], *none, 0)
        )
        torch.library.opcheck(torch.ops.xlstm_kernels.mlstm_chunks.default, (*x, *none, *none, 0))


def test_it_compiles_into_one_graph():
    fn = torch.compile(lambda *x: mlstm_triton(*x)[0].sin(), backend="aot_eager", fullgraph=True)
    x, same = ([a.float().to(DEVICE).requires_grad_() for a in inputs(20)] for _ in range(2))
    with using(SMALL):
        fn(*x).sum().backward()
        mlstm_triton(*same)[0].sin().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(x, same, strict=True))


def test_what_no_tile_holds_is_refused_by_name():
    x = [a.float().to(DEVICE) for a in inputs()]
    for wrong, said in [
        (lambda: mlstm_triton(*(a.double() for a in x)), "float64"),
        (
            lambda: mlstm_triton(*(a.new_zeros(1, 5, 1, 200) for a in x[:3]), *(a[:, :5] for a in x[3:])),
            "q: .*128 at most.*got 200",
        ),
        (
            lambda: mlstm_triton(*x, cu_seqlens=torch.tensor([0, 5, 5, 37])),
            "cu_seqlens: expected 0, ..., 37 with at least one token",
        ),
        (
            lambda: mlstm(*x, cu_seqlens=torch.tensor([0.0, 37.0]), backend="triton"),
            "cu_seqlens: expected int32 or int64",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()
