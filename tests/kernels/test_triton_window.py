"""The Triton form of window attention is the definition: output and gradients of q, k, v, measured from float64.

On a machine without a GPU the kernels run in Triton's interpreter, in small tiles so that a few tokens are several of
them.
"""

import os
from functools import cache

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported
pytest.importorskip("triton")

from true_bfloat16 import true_bfloat16  # noqa: F401, a fixture
from xlstm_kernels import window_attention
from xlstm_kernels.backends.launch import Tile, using
from xlstm_kernels.window.triton import layout, window_triton

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, TALL, WIDE = (Tile({"BT": t, "BS": s}, 4, 1) for t, s in ((16, 16), (32, 16), (16, 32)))
PLAIN = {"index": None, "document": None}


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T, B=1, H=2, G=1, K=16, V=16):
    """q, k, v in float64, rounded so that half precision holds them."""
    return [
        a.half().double()
        for a in (3 * waves(B, T, H, K, step=0.11), 3 * waves(B, T, G, K, step=0.23), waves(B, T, G, V, step=0.36))
    ]


def reference(*x, **settings):
    return window_attention(*x, **settings, backend="reference")


def everything(fn, x, dtype=torch.float64, tile=None, **settings):
    """h and the gradients of q, k, v, in float64 on the CPU, for a loss that reads h."""
    device = "cpu" if fn is reference and dtype == torch.float64 else DEVICE
    x = [a.to(device, dtype, copy=True).requires_grad_() for a in x]
    settings = {"scale": x[0].shape[3] ** -0.5} | {
        name: a.to(device) if torch.is_tensor(a) else a for name, a in settings.items()
    }
    with using(tile):
        h = fn(*x, **settings)
        (h * waves(*h.shape, step=0.3).to(h)).sum().backward()
    assert h.dtype == x[2].dtype and [a.grad.dtype for a in x] == [dtype] * 3
    return [a.detach().double().cpu() for a in (h, *(a.grad for a in x))]


def triton(x, tile=SMALL, dtype=torch.float32, **settings):
    return everything(window_triton, x, dtype, tile, **PLAIN | settings)


def error(got, want):
    """Largest error on the scale of the largest entry."""
    return ((got - want).abs().max() / want.abs().max()).item()


def assert_same(got, want, tol=1e-5):
    for name, a, b in zip(("h", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tol, atol=tol * max(1.0, b.abs().max().item()), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("T", "tile"), [(1, SMALL), (5, SMALL), (37, SMALL), (64, TALL), (129, Tile({"BT": 32, "BS": 32}))], ids=str
)
def test_the_triton_form_is_the_definition(T, tile):
    x, settings = inputs(T), {"window": 24, "sinks": 4}
    assert_same(triton(x, tile, **settings), everything(reference, x, **settings))


SETTINGS = [
    (1, 0, 37),
    (1, 4, 37),
    (3, 7, 37),
    (16, 0, 50),
    (17, 1, 50),
    (33, 20, 50),
    (50, 4, 50),
    (49, 4, 50),
    (1000, 4, 20),
]


@pytest.mark.parametrize(("window", "sinks", "T"), SETTINGS)
def test_the_triton_form_is_the_definition_for_any_window(window, sinks, T):
    """Windows of one token, more sinks than the window is long, sequences shorter than the window or just as long."""
    x, settings = inputs(T, H=1), {"window": window, "sinks": sinks}
    assert_same(triton(x, TALL, **settings), everything(reference, x, **settings))


@pytest.mark.parametrize("tile", [TALL, WIDE], ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=str)
def test_query_heads_share_keys_and_tiles_may_have_any_shape(heads, tile):
    x, settings = inputs(45, H=heads[0], G=heads[1], V=32), {"window": 9, "sinks": 3, "scale": 0.7}
    assert_same(triton(x, tile, **settings), everything(reference, x, **settings))


@pytest.mark.parametrize(("K", "V"), [(8, 6), (24, 40), (64, 128), (128, 256)])
def test_any_head_dimension_up_to_the_largest(K, V):
    x, settings = inputs(33, H=1, K=K, V=V), {"window": 12, "sinks": 2}
    assert_same(triton(x, **settings), everything(reference, x, **settings))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_the_scale_may_turn_the_scores_around(scale):
    x, settings = inputs(33, H=1), {"window": 12, "sinks": 2, "scale": scale}
    assert_same(triton(x, **settings), everything(reference, x, **settings))


def packing(*rows):
    """index and document from rows written as [(document length, padding behind it), ...].

    a first length of 0 pads on the left.
    """
    index, document = [], []
    for row in rows:
        index.append([p for n, pad in row for p in (*range(n), *[-1] * pad)])
        document.append([d for d, (n, pad) in enumerate(row) for _ in range(n + pad)])
    return torch.tensor(index), torch.tensor(document)


PACKED = {
    "left and right padding": packing([(0, 19), (53, 0)], [(40, 32)]),
    "documents": packing([(25, 0), (3, 0), (44, 0)], [(32, 0), (32, 0), (8, 0)]),
    "documents of length 1": packing([(1, 0)] * 72, [(1, 0)] * 20 + [(52, 0)]),
    "padding inside and between": packing([(0, 7), (20, 9), (1, 1), (1, 0), (33, 0)], [(0, 72)]),
}


@cache
def packed_truth(case):
    index, document = PACKED[case]
    return everything(reference, inputs(72, B=2, H=1), window=9, sinks=3, index=index, document=document)


@pytest.mark.parametrize("case", PACKED)
def test_documents_and_padding_are_sequences_on_their_own(case):
    index, document = PACKED[case]
    x = [
        a.masked_fill((index < 0)[..., None, None], float("nan")) for a in inputs(72, B=2, H=1)
    ]  # what padding holds does not matter
    got = triton(x, Tile({"BT": 32, "BS": 32}), window=9, sinks=3, index=index, document=document)
    for a in got:
        assert (a[index < 0] == 0).all()
    assert_same(got, packed_truth(case))


def test_an_index_or_a_document_alone_will_do():
    index, document = PACKED["left and right padding"]
    x, settings = inputs(72, B=2, H=1), {"window": 9, "sinks": 3}
    assert_same(triton(x, TALL, **settings, index=index), everything(reference, x, **settings, index=index))
    _, document = PACKED["documents"]
    assert_same(triton(x, TALL, **settings, document=document), packed_truth("documents"))


def test_the_layout_counts_real_tokens():
    index, document = packing([(0, 2), (3, 1), (1, 0), (2, 1)])
    found = layout(index, document, 1, 10)
    assert found.count.tolist() == [6]
    assert found.place[0, :6].tolist() == [2, 3, 4, 6, 7, 8]
    assert found.start[0, :6].tolist() == [0, 0, 0, 3, 4, 4]
    assert found.end[0, :6].tolist() == [3, 3, 3, 4, 6, 6]
    assert {a.dtype for a in found} == {torch.int32}


def test_many_sinks_of_several_long_documents_get_their_gradients():
    """More sinks than one tile of them holds, in documents of several chunks, from all heads of the group.

    Tiles in the middle of the window.
    """
    index, document = packing([(60, 3), (50, 0)])
    x, settings = inputs(113), {"window": 40, "sinks": 35, "index": index, "document": document}
    assert_same(triton(x, SMALL, **settings), everything(reference, x, **settings))


def test_tensors_may_lie_in_memory_in_any_order():
    x, settings = inputs(37, B=2, G=2), {"window": 9, "sinks": 3}
    spread = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in x]
    spread[1] = (
        x[1].transpose(2, 3).contiguous().transpose(2, 3)
    )  # neighbours in the last dim are not neighbours in memory
    assert not any(a.is_contiguous() for a in spread[:2])
    move = {"dtype": torch.float32, "device": DEVICE}
    with using(TALL):
        h, again = (window_triton(*(a.to(**move) for a in y), **settings, **PLAIN, scale=0.25) for y in (spread, x))
    assert torch.equal(h, again)


@pytest.mark.usefixtures("true_bfloat16")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_twice_the_error_of_eager_code(half):
    x, settings = [a.to(half).double() for a in inputs(100, K=32, V=32)], {"window": 24, "sinks": 4}
    want = everything(reference, x, **settings)
    got = triton(x, Tile({"BT": 32, "BS": 32}), half, **settings)
    for name, a, b, c in zip(("h", "dq", "dk", "dv"), got, eager(x, half, 24, 4), want, strict=True):
        assert error(a, c) <= 2 * error(b, c), name


def eager(x, dtype, window, sinks):
    """What a user writes: a masked softmax in the dtype of the inputs."""
    x = [a.to(dtype, copy=True).requires_grad_() for a in x]
    q, k, v = (a.transpose(1, 2) for a in x)
    t = torch.arange(q.shape[2])
    seen = (t <= t[:, None]) & ((t[:, None] - t < window) | (t < sinks))
    scores = (q @ k.repeat_interleave(q.shape[1], 1).transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(
        ~seen, float("-inf")
    )
    h = (scores.softmax(-1) @ v.repeat_interleave(q.shape[1], 1)).transpose(1, 2)
    (h * waves(*h.shape, step=0.3).to(dtype)).sum().backward()
    return [a.detach().double() for a in (h, *(a.grad for a in x))]


def test_large_scores_do_not_overflow():
    x = [100 * a for a in inputs(40, H=1)]
    got, want = (fn(x, window=9, sinks=3) for fn in (triton, lambda x, **s: everything(reference, x, **s)))
    assert all(a.isfinite().all() for a in got)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-2)


def test_the_same_inputs_give_the_same_bits():
    x, settings = inputs(60), {"window": 9, "sinks": 3}
    for a, b in zip(triton(x, TALL, **settings), triton(x, TALL, **settings), strict=True):
        assert torch.equal(a, b)


def test_mixed_dtypes_are_calculated_in_the_wider_one():
    q, k, v = (a.to(DEVICE) for a in inputs(20, H=1))
    with using(SMALL):
        h = window_triton(q.half(), k.float(), v.half(), window=9, sinks=3, scale=0.25, **PLAIN)
    assert h.dtype == torch.float16
    torch.testing.assert_close(h.cpu().double(), reference(*inputs(20, H=1), window=9, sinks=3), rtol=2**-10, atol=1e-4)


def test_what_the_kernels_do_not_calculate_is_refused_by_name():
    q, k, v = (a.float() for a in inputs(5))
    for wrong, said in [
        ((q.double(), k, v), "q: .*float64"),
        ((q.new_zeros(1, 5, 2, 160), k.new_zeros(1, 5, 1, 160), v), "q: .*128 at most.*got 160"),
        ((q, k, v.new_zeros(1, 5, 1, 257)), "v: .*256 at most.*got 257"),
    ]:
        with pytest.raises(ValueError, match=said):
            window_triton(*wrong, window=3, sinks=1, scale=1.0, **PLAIN)


def test_the_operators_tell_the_compiler_the_truth():
    index, document = packing([(0, 3), (9, 2), (6, 0)])
    x = [a.to(DEVICE, torch.float32).requires_grad_() for a in inputs(20, H=1)]
    where = layout(index.to(DEVICE), document.to(DEVICE), 1, 20)
    with using(SMALL):
        torch.library.opcheck(torch.ops.xlstm_kernels.window_flash.default, (*x, *where, 0.25, 5, 2))
        torch.library.opcheck(torch.ops.xlstm_kernels.window_flash.default, (*x, None, None, None, None, 0.25, 5, 2))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_long_sequence(packed):
    index, document = packing([(0, 90), (610, 0), (1, 0), (299, 0)])
    settings = {"window": 200, "sinks": 4} | ({"index": index, "document": document} if packed else {})
    x = inputs(1000)
    assert_same(triton(x, Tile({"BT": 64, "BS": 32}), **settings), everything(reference, x, **settings))


@pytest.mark.slow
def test_the_tiles_of_the_tables_are_right_too():
    for dtype, tol in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        x, settings = inputs(150, K=64, V=64), {"window": 40, "sinks": 4}
        assert_same(triton(x, None, dtype, **settings), everything(reference, x, **settings), tol)
