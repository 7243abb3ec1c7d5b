"""The Triton row kernel of the head loss is the definition: on a GPU where there is one, elsewhere in Triton's
interpreter.
"""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported
pytest.importorskip("triton")

from test_head_loss import ALL, INF, NAN, OUTCOMES, assert_same, everything, gap, inputs, plain, settings
from true_bfloat16 import true_bfloat16  # noqa: F401, a fixture
from xlstm_kernels import head_loss
from xlstm_kernels.backends import launch
from xlstm_kernels.backends.launch import Tile, recording, using
from xlstm_kernels.head_loss.cpu import rows_step
from xlstm_kernels.head_loss.op import KERNEL
from xlstm_kernels.head_loss.reference import NEVER, REST_FLOOR, Rule, Task
from xlstm_kernels.head_loss.triton import TILES, aot_cases
from xlstm_kernels.head_loss.triton import rows_step as kernel_step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that are selected away
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
close = torch.testing.assert_close
TILE = Tile({"BV": 16})  # a row of the tests is several of these
PLAIN = Rule(support=False, logit_scale=1.0, softcap=None)


def in_dtype(x, dtype):
    return {n: a.to(DEVICE, dtype if a.is_floating_point() else None) for n, a in x.items()}


def on_cpu(values):
    return {n: a.cpu() if torch.is_tensor(a) else a for n, a in values.items()}


def assert_as_exact_as_torch(x, **more):
    """Terms and gradients in float32, within twice the error of the torch backend's and of one rounding.

    The items and the agreement are the same.
    """
    low = in_dtype(x, torch.float32)
    want = on_cpu(everything(in_dtype(low, torch.float64), **more, backend="dense"))
    with using(TILE):
        got = on_cpu(everything(low, **more, backend="triton"))
    ours, theirs = gap(got, want), gap(on_cpu(everything(low, **more, backend="torch")), want)
    assert ours.keys() == theirs.keys() and all(e <= 2 * theirs[n] + 2e-7 for n, e in ours.items()), (ours, theirs)
    assert got["items"] == want["items"] and got["agreement"] == want["agreement"]


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize(
    "more", [{}, {"softcap": 4.0, "logit_scale": 0.7}, {"logit_scale": 1.3, "num_items": 50}], ids=str
)
def test_the_kernel_is_the_definition(outcomes, more):
    x = inputs(T=6, V=53)
    x["labels"][0, :3] = x["top_ids"][0, :3, 0]  # labels among the stored ids and elsewhere
    x["mask"] = torch.arange(12).view(2, 6) % 3 > 0  # labels and mask count at different tokens
    assert_as_exact_as_torch(x, **settings(outcomes, **more), rows=5)


@pytest.mark.parametrize("V", [16, 23, 64])
def test_rows_of_whole_and_of_broken_tiles(V):
    assert_as_exact_as_torch(inputs(T=4, V=V, M=3), **ALL)


def test_the_whole_vocabulary_stored_leaves_no_rest():
    assert_as_exact_as_torch(inputs(T=4, V=11, M=11), **ALL)


def test_padding_anywhere_an_empty_support_and_no_rest_mass():
    x = inputs(T=5)
    x["top_ids"], x["top_logp"] = x["top_ids"].flip(-1), x["top_logp"].flip(-1)  # padding first
    x["top_ids"][0, 1], x["top_logp"][0, 1], x["rest_logp"][0, 1] = 0, -INF, 0.0
    x["rest_logp"][0, 0] = -INF
    for outcomes in OUTCOMES:
        assert_as_exact_as_torch(x, **settings(outcomes))


def test_without_a_teacher_it_is_cross_entropy():
    x = in_dtype({name: a for name, a in inputs(T=4).items() if name in ("hidden", "weight", "labels")}, torch.float32)
    got, want = everything(x, backend="triton"), everything(in_dtype(x, torch.float64), backend="dense")
    assert max(gap(on_cpu(got), on_cpu(want)).values()) < 1e-6 and got["forward_kl"] is None


def test_a_rest_mass_below_the_smallest_float_keeps_its_value_and_gradient():
    x = {
        "hidden": torch.ones(1, 1, 1),
        "weight": torch.tensor([101.0, 100, -99, -99.5, -98, -100])[:, None],
        "labels": torch.zeros(1, 1).long(),
        "top_ids": torch.tensor([[[0, 1]]]),
        "top_logp": torch.tensor([[[0.6, 0.3]]]).log(),
        "rest_logp": torch.tensor([[0.1]]).log(),
    }
    more = {"ce_weight": 0.5, "forward_kl_weight": 1.0, "reverse_kl_weight": 1.0, "shift": False}
    x = in_dtype(x, torch.float32)
    got, want = everything(x, **more, backend="triton"), everything(in_dtype(x, torch.float64), **more, backend="dense")
    for name in ("loss", "ce", "forward_kl", "reverse_kl", "dhidden", "dweight"):
        close(got[name].double(), want[name], rtol=3e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_nan_where_it_counts_is_seen():
    for name, place in {"hidden": (0, 0), "top_logp": (0, 0, 0), "rest_logp": (0, 0)}.items():
        x = in_dtype(inputs(T=4), torch.float32)
        x[name][place] = NAN
        out = head_loss(**x, **ALL, backend="triton")
        assert (
            out.loss.isnan()
            and out.forward_kl.isnan()
            and out.reverse_kl.isnan()
            and out.ce.isnan() == (name == "hidden")
        )


def test_what_does_not_count_may_hold_anything():
    x = in_dtype(inputs(T=5), torch.float32)
    want = everything(x, **ALL, backend="triton")
    idle = torch.cat([x["labels"][:, 1:] == -100, torch.ones(2, 1, dtype=torch.bool, device=DEVICE)], 1)
    for name, garbage in {"hidden": NAN, "top_logp": NAN, "rest_logp": INF, "top_ids": 10**6}.items():
        x[name][idle] = garbage
    assert_same(everything(x, **ALL, backend="triton"), want, tolerance=0)


def test_no_counted_token_is_a_loss_of_zero_with_gradients_of_zero():
    x = in_dtype(inputs(T=4), torch.float32)
    got = everything(x | {"labels": torch.full_like(x["labels"], -100)}, **ALL, backend="triton")
    assert got["items"] == 0 and got["loss"] == got["ce"] == got["agreement"] == 0
    assert all((got[f"d{name}"] == 0).all() for name in ("hidden", "weight", "bias"))


def chunk(outcomes="tail", N=7, V=150, M=7):
    """Logits of the tokens that count, in a workspace with wider rows, and their targets."""
    x = in_dtype(inputs(B=1, T=N, D=8, V=V, M=M), torch.float32)
    x["labels"][0, :2] = x["top_ids"][0, :2, 0]
    task = Task(
        x["labels"],
        (x["top_ids"], x["top_logp"], x["rest_logp"]),
        None,
        False,
        (0.9, 0.3, 0.2),
        outcomes,
        1,
        torch.float32,
    )
    workspace = torch.full((len(task.place), V + 10), 7.0, device=DEVICE)
    logits = workspace[:, :V].copy_(x["hidden"][0, task.place] @ x["weight"].T)
    return workspace, logits, task.targets(0, N, V)


@pytest.mark.parametrize("rule", [PLAIN, Rule(True, 0.7, 5.0)], ids=str)
@pytest.mark.usefixtures("true_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_are_written_into_the_memory_of_the_logits(rule, dtype):
    workspace, logits, targets = chunk("renormalise" if rule.support else "tail")
    want_terms, want = rows_step(logits.clone(), targets, rule, torch.float32)
    with using(TILE):
        terms, got = kernel_step(logits, targets, rule, dtype)
    close(terms, want_terms, rtol=1e-5, atol=1e-6)
    assert got.dtype == dtype and got.shape == logits.shape and got.data_ptr() == workspace.data_ptr()
    close(got.float(), want, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6)
    assert (workspace[:, 150:] == 7).all()


def test_values_alone_are_the_same_and_float32_gradients_take_the_logits_place():
    _, logits, targets = chunk()
    with using(TILE):
        values, none = kernel_step(logits.clone(), targets, PLAIN, None)
        terms, d = kernel_step(logits, targets, PLAIN, torch.float32)
    assert none is None and d is logits
    close(values, terms, rtol=0, atol=0)


def test_ids_that_a_bias_excludes_have_no_probability_and_no_gradient():
    _, logits, targets = chunk()
    outside = next(y for y in range(150) if not (targets.ids == y).any() and not (targets.label == y).any())
    logits[:, outside] = NEVER
    want_terms, want = rows_step(logits.clone(), targets, PLAIN, torch.float32)
    terms, d = kernel_step(logits, targets, PLAIN, torch.float32)
    close((*terms, d), (*want_terms, want), rtol=1e-5, atol=1e-6)
    assert (d[:, outside] == 0).all() and torch.isfinite(d).all()


def test_the_floor_of_the_rest_is_the_definitions():
    x = in_dtype(inputs(T=4), torch.float32)
    x["rest_logp"] = torch.full_like(x["rest_logp"], -INF)
    floored = x | {"rest_logp": torch.full_like(x["rest_logp"], REST_FLOOR)}
    a, b = (head_loss(**y, reverse_kl_weight=1.0, backend="triton").reverse_kl for y in (x, floored))
    assert a.isfinite() and a == b


def test_what_the_kernel_cannot_do_is_refused_by_name(monkeypatch):
    x = inputs(T=3)
    with pytest.raises(ValueError, match="backend='triton' calculates in float32, got torch.float64"):
        head_loss(**in_dtype(x, torch.float64), **ALL, backend="triton")
    many = in_dtype(inputs(T=3, V=4200, M=4100), torch.float32)
    with pytest.raises(ValueError, match="width 4100: the largest in the tile table"):
        head_loss(**many, **ALL, backend="triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="backend='triton': the tensors are on cpu"):
            head_loss(**in_dtype(x, torch.float32), **ALL, backend="triton")


def test_the_largest_number_of_entries_is_the_tables():
    assert max(width for _, width, _ in TILES) == KERNEL.largest["M"]


def test_the_compilers_cases_reach_every_tile():
    seen = set()
    for _, run in aot_cases():
        with recording(80) as launches:
            run()
        seen |= {(x.tile.num_warps, x.constants["NARROW"]) for x in launches}
    assert seen == {(8, False), (8, True), (16, False), (16, True)}


@pytest.mark.skipif(DEVICE == "cpu", reason="half precision is multiplied by a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_errors_on_a_gpu_are_at_most_twice_those_of_eager_code(dtype, backend):
    x = inputs(T=200, D=64, V=700, M=32)
    x["weight"] = 0.3 * x["weight"]
    low = {n: a.to(dtype) if n in ("hidden", "weight", "bias") else a for n, a in in_dtype(x, torch.float32).items()}
    exact = in_dtype(low, torch.float64)
    more = settings("tail", reverse_kl_weight=0.0, rows=64, scale=1.0)
    want = everything(exact, **more, backend="dense")
    eager, ours = gap(plain(low, dtype), want), gap(everything(low, **more, backend=backend), want)
    assert all(ours[n] <= 2 * e + 1e-6 for n, e in eager.items()), (ours, eager)
