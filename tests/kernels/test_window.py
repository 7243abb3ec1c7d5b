"""Window attention with sinks: the banded form is the masked one, and the masked one is the set of keys that its name
promises.
"""

from functools import cache

import pytest
import torch
from xlstm_kernels import window_attention, window_step
from xlstm_kernels.window.cpu import ROWS as BLOCKS

torch.set_num_threads(1)
W = 24
ROWS, WIDE = BLOCKS["backward"], BLOCKS["forward"]
LENGTHS = [
    WIDE - 1,
    WIDE,
    WIDE + 1,
    2 * WIDE + 1,
    1,
    W - 1,
    W,
    W + 1,
    2 * W - 1,
    2 * W,
    2 * W + 1,
    ROWS - 1,
    ROWS,
    ROWS + 1,
    2 * ROWS + 37,
]
every_backend = pytest.mark.parametrize("backend", ["reference", "banded"])  # the kernel has a file of its own


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T, B=2, H=4, G=2, K=8, V=6):
    return 3 * waves(B, T, H, K, step=0.11), 3 * waves(B, T, G, K, step=0.23), waves(B, T, G, V, step=0.36)


def everything(backend, x, **settings):
    """h and the gradients of q, k, v for a loss that reads h."""
    x = [a.clone().requires_grad_() for a in x]
    h = window_attention(*x, **settings, backend=backend)
    (h * waves(*h.shape, step=0.3)).sum().backward()
    return [h.detach(), *(a.grad for a in x)]


def assert_same(got, want):
    for name, a, b in zip(("h", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def attend(q, k, v, seen, scale):
    """Softmax attention of one query of one head to the keys at the positions `seen`."""
    return (scale * (k[seen] * q).sum(-1)).softmax(0) @ v[seen]


@every_backend
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_query_sees_itself_the_tokens_just_before_and_the_first_ones(backend, sinks):
    q, k, v = inputs(T=70, B=1, H=4, G=2)
    h = window_attention(q, k, v, window=5, sinks=sinks, scale=0.7, backend=backend)
    for t in (0, 3, 4, 5, 8, 9, 64, 69):
        seen = sorted({*range(min(sinks, t + 1)), *range(max(0, t - 4), t + 1)})
        for head in range(4):
            torch.testing.assert_close(
                h[0, t, head], attend(q[0, t, head], k[0, :, head // 2], v[0, :, head // 2], seen, 0.7)
            )


@every_backend
def test_the_default_scale_is_one_over_the_root_of_the_head_dimension(backend):
    x = inputs(T=40)
    torch.testing.assert_close(
        window_attention(*x, window=W, sinks=4, backend=backend),
        window_attention(*x, window=W, sinks=4, scale=8**-0.5, backend=backend),
    )


@every_backend
def test_a_window_as_long_as_the_sequence_is_causal_attention(backend):
    for T, window in ((ROWS + 9, ROWS + 9), (ROWS + 9, 1000), (20, 20)):
        q, k, v = inputs(T)
        h = window_attention(q, k, v, window=window, sinks=4, backend=backend)
        heads = (a.transpose(1, 2) for a in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        torch.testing.assert_close(
            h, torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        )


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("T", LENGTHS)
def test_the_banded_form_is_the_definition(T, sinks):
    settings = {"window": W, "sinks": sinks}
    assert_same(everything("banded", inputs(T), **settings), everything("reference", inputs(T), **settings))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 4), (3, 7), (ROWS, 4), (ROWS + 1, 1)])
def test_the_banded_form_is_the_definition_for_any_heads_and_windows(heads, window, sinks):
    x, settings = inputs(2 * ROWS + 5, B=1, H=heads[0], G=heads[1]), {"window": window, "sinks": sinks}
    assert_same(everything("banded", x, **settings), everything("reference", x, **settings))


def test_many_heads_are_cut_into_pieces_that_fit_the_cache(monkeypatch):
    x, settings = inputs(T=ROWS + 5, H=6, G=3), {"window": W, "sinks": 4}
    want = everything("banded", x, **settings)
    monkeypatch.setattr("xlstm_kernels.window.cpu.SCORES", 1)
    assert_same(everything("banded", x, **settings), want)


def layout(*rows):
    """index and document from rows written as [(document length, padding behind it), ...].

    a first length of 0 pads on the left.
    """
    index, document = [], []
    for row in rows:
        index.append([p for n, pad in row for p in (*range(n), *[-1] * pad)])
        document.append([d for d, (n, pad) in enumerate(row) for _ in range(n + pad)])
    return torch.tensor(index), torch.tensor(document)


T_PACKED = 2 * ROWS + 8
PACKED = {
    "left padding": layout([(0, 30), (T_PACKED - 30, 0)], [(T_PACKED, 0)]),
    "right padding": layout([(T_PACKED - 70, 70)], [(T_PACKED - 1, 1)]),
    "documents": layout([(50, 0), (3, 0), (T_PACKED - 53, 0)], [(ROWS, 0), (ROWS, 0), (8, 0)]),
    "documents of length 1": layout([(1, 0)] * T_PACKED, [(1, 0)] * 70 + [(T_PACKED - 70, 0)]),
    "padding between documents": layout(
        [(0, 7), (20, ROWS), (1, 1), (1, 0), (T_PACKED - 30 - ROWS, 0)], [(90, 40), (T_PACKED - 130, 0)]
    ),
    "a row of padding": layout([(0, T_PACKED)], [(T_PACKED, 0)]),
}


@cache
def packed_truth(case, sinks):
    index, document = PACKED[case]
    return everything("reference", inputs(T_PACKED), window=W, sinks=sinks, index=index, document=document)


def documents_of(index, document):
    """(row, positions) of every document."""
    for b in range(len(index)):
        for d in document[b].unique():
            yield b, ((document[b] == d) & (index[b] >= 0)).nonzero()[:, 0]


@every_backend
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("case", PACKED)
def test_documents_and_padding_are_sequences_on_their_own(backend, case, sinks):
    x, (index, document) = inputs(T_PACKED), PACKED[case]
    got = everything(backend, x, window=W, sinks=sinks, index=index, document=document)
    for b, places in documents_of(index, document):
        if len(places):
            alone = window_attention(*(a[b : b + 1, places] for a in x), window=W, sinks=sinks, backend="reference")
            torch.testing.assert_close(got[0][b, places], alone[0])
    for a in got:
        assert (a[index < 0] == 0).all()
    assert_same(got, packed_truth(case, sinks))


@pytest.mark.parametrize("sinks", [0, 4])
def test_padding_between_tokens_does_not_narrow_the_window(sinks):
    """The window counts real tokens: the array distance to its far end grows with the padding inside."""
    real = torch.ones(2, 3 * ROWS, dtype=torch.bool)
    real[0, 10 : 10 + ROWS], real[0, 200:220], real[1, 1::2], real[1, 0] = False, False, False, False
    index = torch.where(real, real.cumsum(1) - 1, -1)
    x, settings = inputs(3 * ROWS), {"window": W, "sinks": sinks}
    want = everything("reference", x, index=index, **settings)
    assert_same(everything("banded", x, index=index, **settings), want)
    for b in range(2):
        compact = window_attention(*(a[b : b + 1, real[b]] for a in x), **settings)
        torch.testing.assert_close(want[0][b, real[b]], compact[0])


@every_backend
def test_what_padding_holds_does_not_matter(backend):
    index, document = PACKED["padding between documents"]
    x, settings = inputs(T_PACKED), {"window": W, "sinks": 4, "index": index, "document": document}
    spoiled = [a.masked_fill((index < 0)[..., None, None], float("nan")) for a in x]
    torch.testing.assert_close(
        window_attention(*spoiled, **settings, backend=backend), packed_truth("padding between documents", 4)[0]
    )


@every_backend
def test_documents_without_an_index_have_no_padding(backend):
    index, document = PACKED["documents"]
    torch.testing.assert_close(
        window_attention(*inputs(T_PACKED), window=W, sinks=4, document=document, backend=backend),
        packed_truth("documents", 4)[0],
    )


@every_backend
def test_one_document_without_padding_needs_no_index(backend):
    x, index = inputs(100), torch.arange(100).expand(2, 100)
    settings = {"window": W, "sinks": 4, "backend": backend}
    assert torch.equal(
        window_attention(*x, **settings),
        window_attention(*x, index=index, document=torch.full_like(index, 7), **settings),
    )


@every_backend
@pytest.mark.parametrize("T", [W, 2 * ROWS + 5])
def test_half_precision_is_as_good_as_the_rounding_of_its_inputs_and_output(backend, T):
    x = [a.to(torch.bfloat16) for a in inputs(T)]
    h, *grads = everything(backend, x, window=W, sinks=4)
    want, *dwant = everything("reference", [a.double() for a in x], window=W, sinks=4)
    assert h.dtype == grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(h.double(), want, rtol=2**-8, atol=1e-5)
    for a, b in zip(grads, dwant, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=1e-2)


@every_backend
@pytest.mark.parametrize("T", [W, 2 * ROWS + 5])
def test_autocast_leaves_the_calculation_in_float32(backend, T):
    x = inputs(T)
    with torch.autocast("cpu", torch.bfloat16):
        h = window_attention(*(a.float() for a in x), window=W, sinks=4, backend=backend)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), window_attention(*x, window=W, sinks=4), rtol=1e-5, atol=1e-5)


@every_backend
def test_only_the_gradients_that_are_asked_for_are_needed(backend):
    q, k, v = inputs(2 * ROWS)
    h = window_attention(q, k.requires_grad_(), v, window=W, sinks=4, backend=backend)
    (h * waves(*h.shape, step=0.3)).sum().backward()
    torch.testing.assert_close(k.grad, everything("reference", inputs(2 * ROWS), window=W, sinks=4)[2])


def test_large_scores_do_not_overflow():
    q, k, v = (100 * a for a in inputs(2 * ROWS))
    got = everything("banded", [q.float(), k.float(), v.float()], window=W, sinks=4)
    assert all(a.isfinite().all() for a in got)
    assert got[0].abs().max() <= 100


def test_what_does_not_fit_is_refused_by_name():
    q, k, v = inputs(10)
    index, document = torch.arange(10).expand(2, 10), torch.zeros(2, 10, dtype=torch.int64)
    twice = index.clone()
    twice[1, 6] = 5
    for wrong, said in [
        (lambda: window_attention(q[0], k, v, window=W, sinks=4), r"expected \[B, T, H, K\]"),
        (
            lambda: window_attention(q, k[..., :4], v, window=W, sinks=4),
            r"k, v: expected \[2, 10, G, 8\].*got \[2, 10, 2, 4\]",
        ),
        (lambda: window_attention(q[:, :, :3], k, v, window=W, sinks=4), "q has 3 heads, k and v have 2"),
        (lambda: window_attention(q, k, v, window=0, sinks=4), "window=0"),
        (lambda: window_attention(q, k, v, window=W, sinks=-1), "sinks=-1"),
        (
            lambda: window_attention(q, k, v, window=W, sinks=4, index=index[:, :9]),
            r"index: expected integer .*'B': 2, 'T': 10.*\[2, 9\]",
        ),
        (
            lambda: window_attention(q, k, v, window=W, sinks=4, document=document.float()),
            r"document: expected integer .*float32",
        ),
        (lambda: window_attention(q, k, v, window=W, sinks=4, index=twice), r"index\[1, 6\]=5: expected 6"),
        (
            lambda: window_attention(q, k, v, window=W, sinks=4, index=index, document=index // 5),
            r"index\[0, 5\]=5: expected 0",
        ),
        (lambda: window_attention(q, k, v, window=W, sinks=4, backend="fast"), "backend='fast' is not one of .*banded"),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_steps_in_place_are_the_window(heads, sinks):
    """Rows that are at different places of their documents, past several turns of the ring."""
    window, T, late = 7, 40, 3
    q, k, v = inputs(T, H=heads[0], G=heads[1])
    want = window_attention(q, k, v, window=window, sinks=sinks)
    shorter = window_attention(*(a[1:, late:] for a in (q, k, v)), window=window, sinks=sinks)
    keys, values = (a.new_full((2, heads[1], sinks + window, a.shape[-1]), 99.0) for a in (k, v))
    addresses = keys.data_ptr(), values.data_ptr()
    for t in range(T):
        index = torch.tensor([t, t - late if t >= late else t])  # the second row starts a document at token `late`
        h = window_step(*(a[:, t : t + 1] for a in (q, k, v)), keys, values, index, sinks=sinks)
        torch.testing.assert_close(h[0, 0], want[0, t])
        torch.testing.assert_close(h[1, 0], shorter[0, t - late] if t >= late else want[1, t])
    assert (keys.data_ptr(), values.data_ptr()) == addresses


def test_steps_refuse_what_does_not_fit():
    q, k, v = (a[:, :1] for a in inputs(3))
    keys, values, index = torch.zeros(2, 2, 11, 8).double(), torch.zeros(2, 2, 11, 6).double(), torch.tensor([0, 0])
    for wrong, said in [
        (
            lambda: window_step(*inputs(3), keys, values, index, sinks=4),
            r"q: expected .*'T': 1.*got torch.float64 \[2, 3, 4, 8\]",
        ),
        (
            lambda: window_step(q, k, v, keys[:, :1], values, index, sinks=4),
            r"keys: expected .*'G': 2.*got torch.float64 \[2, 1, 11, 8\]",
        ),
        (lambda: window_step(q, k, v, keys, values, index[:1], sinks=4), r"index \[1\]"),
        (lambda: window_step(q, k, v, keys, values, index, sinks=-1), "sinks=-1, slots=11"),
        (lambda: window_step(q.clone().requires_grad_(), k, v, keys, values, index, sinks=4), "no gradients"),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()


def test_the_banded_form_compiles_into_one_graph():
    index, document = PACKED["padding between documents"]
    settings = {"window": W, "sinks": 4, "index": index, "document": document}
    fn = torch.compile(lambda *x: window_attention(*x, **settings), backend="aot_eager", fullgraph=True)
    x = [a.requires_grad_() for a in inputs(T_PACKED)]
    h = fn(*x)
    (h * waves(*h.shape, step=0.3)).sum().backward()
    assert_same([h.detach(), *(a.grad for a in x)], packed_truth("padding between documents", 4))


def test_the_banded_operator_tells_the_compiler_the_truth():
    args = *(a.requires_grad_() for a in inputs(100)), 0.5, W, 4, None, None
    torch.library.opcheck(torch.ops.xlstm_kernels.window_banded.default, args)


def test_training_goes_on_after_inference():
    """Scratch memory outlives a call; what inference_mode made must not be in the way of a gradient."""
    settings = {"window": W, "sinks": 4}
    with torch.inference_mode():
        window_attention(*inputs(ROWS + 1), **settings, backend="banded")
    assert_same(
        everything("banded", inputs(ROWS + 1), **settings), everything("reference", inputs(ROWS + 1), **settings)
    )
