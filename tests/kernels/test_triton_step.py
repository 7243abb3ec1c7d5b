"""The fused step of the hybrid layer is the functions for whole sequences, token by token, measured from float64.

On a machine without a GPU the kernels run in Triton's interpreter, in small tiles so that a few slots are several of
them.
"""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported
pytest.importorskip("triton")

from true_bfloat16 import true_bfloat16  # noqa: F401, a fixture
from xlstm_kernels import mlstm, window_attention
from xlstm_kernels.backends.launch import Tile, recording, using
from xlstm_kernels.step.cpu import step_both
from xlstm_kernels.step.triton import decode_finish, decode_step, hybrid_step_triton, parts_of

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
S, W = 3, 6
TILE = Tile({"BS": 16, "BC": 16}, 4, 1)
NAMES = "q", "k", "v", "phi_q", "phi_k", "i", "f", "o"


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T, B=1, H=4, G=2, K=16, V=16, F=16):
    """What the layer hands to a step, for T tokens, in float64 but rounded so that half precision holds it."""
    x = [3 * waves(B, T, H, K, step=0.11), 3 * waves(B, T, G, K, step=0.23), waves(B, T, G, V, step=0.36)]
    x += [(3 * waves(B, T, H, F, step=step)).softmax(-1) for step in (0.13, 0.19)]
    x += [2 * waves(B, T, H, step=0.49), 2 * waves(B, T, H, step=0.62), waves(B, T, H, step=0.7).sigmoid()]
    return dict(zip(NAMES, (a.half().double() for a in x), strict=True))


def memory(x, window=W, sinks=S, dtype=torch.float32, held=99.0):
    """A fresh state, and slots that hold what no one must read: C, n, m, keys, values."""
    (B, _, H, F), (G, K), V = x["phi_q"].shape, x["k"].shape[2:], x["v"].shape[3]
    state = [torch.zeros(B, H, F, V), torch.zeros(B, H, F), torch.full((B, H), -INF)]
    slots = [torch.full((B, G, sinks + window, d), held, dtype=dtype) for d in (K, V)]
    return [a.to(DEVICE) for a in (*state, *slots)]


def step(x, t, held, index, dtype=torch.float32, sinks=S, tile=TILE, **changes):
    """h [B, H, V] of token t in float64 on the CPU; the memory `held` is written in place."""
    now = {
        name: a[:, t : t + 1].to(DEVICE, torch.float32 if name in ("phi_q", "phi_k", "i", "f", "o") else dtype)
        for name, a in x.items()
    }
    with using(tile):
        h = hybrid_step_triton(
            *(now | changes).values(), *held, torch.as_tensor(index, device=DEVICE), sinks=sinks, scale=0.3
        )
    assert h.dtype == dtype and h.shape == (len(x["q"]), 1, x["q"].shape[2], x["v"].shape[3])
    return h[:, 0].double().cpu()


def whole(x, window=W, sinks=S):
    """h [B, T, H, V] of the whole sequence, and the state after it."""
    repeats = x["q"].shape[2] // x["v"].shape[2]
    mem, state = mlstm(
        x["phi_q"], x["phi_k"], x["v"].repeat_interleave(repeats, 2), x["i"], x["f"], backend="recurrent"
    )
    near = window_attention(x["q"], x["k"], x["v"], window=window, sinks=sinks, scale=0.3, backend="reference")
    return x["o"][..., None] * mem + (1 - x["o"])[..., None] * near, state


def assert_same_state(held, state, tol=1e-5):
    """States agree if exp(m) C and exp(m) n do."""
    C, n, m = (a.double().cpu() for a in held[:3])
    torch.testing.assert_close(
        C * m.exp()[..., None, None], state.C * state.m.exp()[..., None, None], rtol=tol, atol=tol
    )
    torch.testing.assert_close(n * m.exp()[..., None], state.n * state.m.exp()[..., None], rtol=tol, atol=tol)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
def test_steps_are_the_whole_sequence_past_the_wrap_of_the_ring(heads):
    """W - 1, W, W + 1 and 2 W + 1 tokens and all between them; nothing moves in memory."""
    x = inputs(2 * W + 2, H=heads[0], G=heads[1])
    want, state = whole(x)
    held = memory(x)
    addresses = [a.data_ptr() for a in held]
    for t in range(2 * W + 2):
        torch.testing.assert_close(
            step(x, t, held, [t]), want[:, t], rtol=1e-5, atol=1e-5, msg=lambda text, t=t: f"token {t}: {text}"
        )
    assert_same_state(held, state)
    assert [a.data_ptr() for a in held] == addresses


def test_slots_that_come_with_their_tokens_are_as_good_as_all_slots_at_once():
    """Row 1 begins with two columns of padding; with fewer slots than sinks, too."""
    T, x = S + W + 4, inputs(S + W + 4, B=2, H=2, G=1)
    held, grown = memory(x), memory(x, window=1 - S)
    for t in range(T):
        index = [t, max(t - 2, -1)]
        if grown[3].shape[2] <= t < S + W:
            grown[3:] = [torch.cat([a, torch.full_like(a[:, :, :1], 99.0)], 2) for a in grown[3:]]
        torch.testing.assert_close(step(x, t, grown, index), step(x, t, held, index), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(grown[3:], held[3:], strict=True))


@pytest.mark.parametrize(("window", "sinks", "tokens"), [(1, 0, 4), (1, 3, 6), (2, 5, 9), (30, 4, 38)])
def test_any_window_and_number_of_sinks(window, sinks, tokens):
    """A window of the token alone, more sinks than window, no sinks, and slots for more than one program."""
    x = inputs(tokens, H=2, G=1)
    want, _ = whole(x, window, sinks)
    held = memory(x, window, sinks)
    got = torch.stack([step(x, t, held, [t], sinks=sinks) for t in range(tokens)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("K", "V", "F"), [(8, 6, 10), (24, 40, 24), (128, 256, 128), (64, 64, 128), (128, 128, 256)])
def test_any_head_dimension_up_to_the_largest(K, V, F):
    x = inputs(8, H=2, G=1, K=K, V=V, F=F)
    want, state = whole(x)
    held = memory(x)
    got = torch.stack([step(x, t, held, [t], tile=Tile({"BS": 16, "BC": 64})) for t in range(8)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_same_state(held, state)


def test_rows_start_documents_of_their_own():
    """The second row starts one at token 5, with f = -inf: its old slots are not read again, its state is cleared."""
    x, late = inputs(14, B=2, H=2, G=1), 5
    want, _ = whole(x)
    again, _ = whole({name: a[1:, late:] for name, a in x.items()})
    x["f"][1, late] = -INF
    held = memory(x)
    for t in range(14):
        h = step(x, t, held, [t, t - late if t >= late else t])
        torch.testing.assert_close(h[0], want[0, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(h[1], again[0, t - late] if t >= late else want[1, t], rtol=1e-5, atol=1e-5)


def test_a_padding_row_changes_nothing_and_its_output_is_zero():
    x = inputs(12, B=2, H=2, G=1)
    x["i"][1, 8:], x["f"][1, 8:] = -INF, INF
    for name in ("q", "k", "v"):
        x[name][1, 8:] = 7.0
    held = memory(x)
    for t in range(8):
        step(x, t, held, [t, t])
    before = [a.clone() for a in held]
    for t in range(8, 12):
        h = step(x, t, held, [t, -1])
        assert (h[1] == 0).all()
    for a, b in zip(held, before, strict=True):
        assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0])


def test_before_anything_was_written_the_memory_is_zero():
    """The first token writes nothing, i = -inf: h is the window's share, which is its own value."""
    x = inputs(1, H=2, G=1)
    x["i"][:] = -INF
    torch.testing.assert_close(
        step(x, 0, memory(x), [0])[0], (1 - x["o"][0, 0, :, None]) * x["v"][0, 0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.usefixtures("true_bfloat16")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("single", [True, False], ids=["float32 inputs", "half inputs"])
def test_half_precision_slots_are_within_twice_the_error_of_eager_code(single, half):
    T, x = W + S + 3, {name: a.to(half).double() for name, a in inputs(W + S + 3).items()}
    dtype = torch.float32 if single else half
    held, eager, want = memory(x, dtype=half), memory(x, dtype=half), whole(x)[0]
    ours, theirs = torch.zeros_like(want), torch.zeros_like(want)
    for t in range(T):
        ours[:, t] = step(x, t, held, [t], dtype)
        now = {name: a[:, t : t + 1].to(DEVICE, half if name in ("k", "v") else dtype) for name, a in x.items()}
        theirs[:, t] = step_both(*now.values(), *eager, torch.tensor([t], device=DEVICE), S, 0.3)[:, 0].double().cpu()
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-6
    assert torch.equal(held[3], eager[3]) and torch.equal(held[4], eager[4])


def test_a_batch_of_heads_in_any_memory_order_is_read_where_it_lies():
    x = inputs(1, B=2)
    swapped = {name: a.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE, torch.float32) for name, a in x.items()}
    spread = {name: torch.stack([a, a + 1], 3)[:, :, :, 0] for name, a in swapped.items()}  # rows and heads lie apart
    assert not spread["q"].is_contiguous()
    assert torch.equal(step(x, 0, memory(x), [0, 0]), step(x, 0, memory(x), [0, 0], **spread))


def test_weak_forgetting_is_not_lost_in_rounding():
    """1 - sigmoid(f) is 1e-8 at f = 18.4: log(1 + exp(-f)) in float32 must not be log(1)."""
    f = torch.tensor([-120.0, -30.0, -3.0, 0.0, 3.0, 18.4, 40.0], dtype=torch.float64)
    x = inputs(1, B=len(f), H=1, G=1)
    x["f"], x["i"] = f.view(-1, 1, 1), torch.full((len(f), 1, 1), -INF, dtype=torch.float64)
    held = memory(x)
    held[2].zero_()
    step(x, 0, held, [0] * len(f))
    torch.testing.assert_close(held[2][:, 0].double().cpu(), torch.nn.functional.logsigmoid(f), rtol=1e-6, atol=0.0)


def test_the_operator_tells_the_compiler_the_truth():
    x = inputs(1, H=2, G=1)
    args = *(a.to(DEVICE, torch.float32) for a in x.values()), *memory(x), torch.tensor([0], device=DEVICE), S, 0.3
    with using(TILE):
        torch.library.opcheck(torch.ops.xlstm_kernels.hybrid_step_fused.default, args)


def test_what_starts_depends_on_shapes_alone():
    """Grids and addresses do not depend on the index: a step can be recorded once and replayed."""
    x = inputs(1, B=2)
    now, held = [a.float() for a in x.values()], [a.cpu() for a in memory(x)]
    grids = []
    for index in ([0, 0], [5, 900], [-1, 3]):
        with recording(90) as launches:
            hybrid_step_triton(*now, *held, torch.tensor(index), sinks=S, scale=0.3)
        grids.append([(a.kernel, a.grid, a.constants) for a in launches])
    assert [kernel for kernel, _, _ in grids[0]] == [decode_step, decode_finish]
    assert grids[0] == grids[1] == grids[2]


def test_the_slots_are_shared_by_as_many_programs_as_fill_the_gpu():
    assert [parts_of(B, 8, 516, 32) for B in (1, 8, 64)] == [17, 4, 1]


def test_what_the_kernels_cannot_do_is_refused_by_name():
    x = inputs(1, H=2, G=1)
    now, (C, n, m, keys, values) = {name: a.float() for name, a in x.items()}, [a.cpu() for a in memory(x)]
    spread = torch.zeros(1, 1, 2 * (S + W), 16)[:, :, ::2]
    for change, held, said in [
        ({"q": x["q"]}, (C, n, m, keys, values), "q: .*float64"),
        ({}, (C.double(), n, m, keys, values), "C: .*float32, got .*64"),
        ({}, (C, n, m, spread, values), "keys: expected contiguous"),
    ]:
        with pytest.raises(ValueError, match=said):
            hybrid_step_triton(*(now | change).values(), *held, torch.tensor([0]), sinks=S, scale=0.3)
