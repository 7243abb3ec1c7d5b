"""The fused head loss as a part of training: what autograd is given, memory, precision, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from test_head_loss import ALL, NAN, assert_same, every_backend, everything, gap, inputs, plain, settings
from torch.utils._python_dispatch import TorchDispatchMode
from xlstm_kernels import head_loss
from xlstm_kernels.head_loss.chunks import WORKSPACE, chunk_rows

torch.set_num_threads(1)
close = torch.testing.assert_close


# --- gradients as autograd wants them ----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "bias"), ("hidden", "weight")], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen):
    x = inputs()
    want = everything(x, **ALL, backend="dense", scale=1.0)
    x = {
        n: a.clone().requires_grad_() if n in ("hidden", "weight", "bias") and n not in frozen else a
        for n, a in x.items()
    }
    head_loss(**x, **ALL).loss.backward()
    for name in ("hidden", "weight", "bias"):
        assert (
            x[name].grad is None
            if name in frozen
            else torch.allclose(x[name].grad, want[f"d{name}"], rtol=0, atol=1e-12)
        )


def test_without_gradients_the_values_are_the_same():
    x = inputs()
    want = head_loss(**x, **ALL, backend="dense")
    leaf = x | {"weight": x["weight"].clone().requires_grad_()}
    with torch.no_grad():
        outs = [head_loss(**leaf, **ALL), head_loss(**x, **ALL)]
    with torch.inference_mode():
        outs.append(head_loss(**x, **ALL))
    for out in [*outs, head_loss(**x, **ALL)]:
        assert not out.loss.requires_grad
        assert_same(out._asdict(), want._asdict())


def test_a_second_backward_is_refused_by_name():
    x = inputs()
    loss = head_loss(**x | {"weight": x["weight"].requires_grad_()}, **ALL).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="head_loss: its gradients were handed out"):
        loss.backward()


@every_backend
def test_a_head_tied_to_the_embedding_gets_both_gradients(backend):
    x, ids = inputs(), torch.arange(18).view(2, 9)

    def gradient(backend):
        weight = x["weight"].clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, weight) + x["hidden"])
        head_loss(**x | {"hidden": hidden, "weight": weight}, **ALL, backend=backend).loss.backward()
        return weight.grad

    close(gradient(backend), gradient("dense"), rtol=0, atol=1e-10)
    untied = everything(
        x | {"hidden": torch.tanh(F.embedding(ids, x["weight"]) + x["hidden"])}, **ALL, backend=backend, scale=1.0
    )["dweight"]
    assert (gradient(backend) - untied).abs().max() > 1e-3


def test_gradients_accumulate_over_micro_batches_to_those_of_the_whole():
    x = inputs(B=4)
    count = (x["labels"][:, 1:] != -100).sum()
    whole = everything(x, **ALL, num_items=count, scale=1.0)
    weight, losses = x["weight"].clone().requires_grad_(), []
    for b in range(4):
        part = {name: a[b : b + 1] if a.dim() > 1 and name != "weight" else a for name, a in x.items()} | {
            "weight": weight
        }
        losses.append(head_loss(**part, **ALL, num_items=count.item()).loss)
        losses[-1].backward()
    close(sum(losses).detach(), whole["loss"].detach())
    close(weight.grad, whole["dweight"], rtol=0, atol=1e-12)


class Sizes(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        for a in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(a) and a.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, a.numel())
        return out


def test_the_logits_of_all_tokens_never_exist():
    x = inputs(B=2, T=65, D=3, V=320)
    for frozen in (False, True):
        leaf = x | {
            "hidden": x["hidden"].clone().requires_grad_(),
            "weight": x["weight"].clone().requires_grad_(not frozen),
        }
        with Sizes() as sizes:
            loss = head_loss(**leaf, **ALL, rows=16).loss
        assert sizes.largest <= 16 * 320  # of 128 rows that count
        with Sizes() as sizes:
            loss.backward()
        assert sizes.largest <= x["hidden"].numel(), "the backward copies the head's gradient"


def test_chunks_fit_the_workspace_and_are_of_one_size():
    cpu = torch.device("cpu")
    for V in (32000, 128256, 151936, 262144):
        assert 0.8 * WORKSPACE["cpu"] < chunk_rows(10**6, 4 * V, cpu) * 4 * V <= WORKSPACE["cpu"]
    assert chunk_rows(170, 4 * 128256, cpu) == 85  # not 160 and 10
    assert chunk_rows(10, 4 * 128256, cpu) == 10 and chunk_rows(0, 20, cpu, 7) == 1 and chunk_rows(10, 200, cpu, 3) == 3


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_errors_are_at_most_twice_those_of_eager_code(dtype):
    x = inputs(T=40, D=64, V=700, M=32)
    x["weight"] = 0.3 * x["weight"]
    low = {
        n: a.to(dtype) if n in ("hidden", "weight", "bias") else a.float() if a.is_floating_point() else a
        for n, a in x.items()
    }
    exact = {n: a.double() if a.is_floating_point() else a for n, a in low.items()}
    more = settings("tail", reverse_kl_weight=0.0)
    want, got = (
        everything(exact, **more, backend="dense", scale=1.0),
        everything(low, **more, backend="torch", scale=1.0),
    )
    eager = gap(plain(low, dtype), want)
    ours = {n: e for n, e in gap(got, want).items() if n in eager}
    assert {got[f"d{n}"].dtype for n in ("hidden", "weight", "bias")} == {dtype} and got["loss"].dtype == torch.float32
    assert all(e <= 2 * eager[n] + 1e-7 for n, e in ours.items()), (ours, eager)


def test_gradients_survive_in_half_precision_when_many_tokens_share_the_loss():
    """1 / 10^6 times a probability is no float16; times a loss scale of 2^16 it is one again."""
    x = inputs(T=40, D=64, V=700, M=32)
    half = {n: a.half() if n in ("hidden", "weight", "bias") else a for n, a in x.items()}
    exact = {n: a.double() if a.is_floating_point() else a for n, a in half.items()}
    more = settings("tail", num_items=10**6, scale=2.0**16)
    got, want = everything(half, **more), everything(exact, **more, backend="dense")
    assert max(gap({n: got[n] for n in ("dhidden", "dweight", "dbias")}, want).values()) < 2e-3


def test_mixed_dtypes_keep_their_own_and_float64_wins():
    x = inputs()
    got = everything(
        x | {"hidden": x["hidden"].bfloat16(), "weight": x["weight"].float(), "bias": x["bias"].float()}, **ALL
    )
    assert [got[n].dtype for n in ("loss", "dhidden", "dweight", "dbias")] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    got = everything(
        x | {"hidden": x["hidden"].float(), "top_logp": x["top_logp"].half(), "top_ids": x["top_ids"].int()}, **ALL
    )
    assert [got[n].dtype for n in ("loss", "dhidden", "dweight")] == [torch.float64, torch.float32, torch.float64]


@every_backend
def test_autocast_changes_nothing(backend):
    x = {n: a.float() if a.is_floating_point() else a for n, a in inputs().items()}
    want = everything(x, **ALL, backend=backend, scale=1.0)
    x = {n: a.requires_grad_() if n in ("hidden", "weight", "bias") else a for n, a in x.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head_loss(**x, **ALL, backend=backend)
    out.loss.backward()
    assert_same({**out._asdict(), **{f"d{n}": x[n].grad for n in ("hidden", "weight", "bias")}}, want, tolerance=0)


@pytest.mark.slow
def test_a_compiled_caller_gets_the_same():
    x = inputs()

    def loss(hidden, weight):
        return head_loss(**x | {"hidden": hidden * 2, "weight": weight}, **ALL, num_items=torch.tensor(20)).loss * 3

    def gradients(function):
        leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight")]
        value = function(*leaves)
        value.backward()
        return [value.detach(), *(a.grad for a in leaves)]

    close(gradients(torch.compile(loss)), gradients(loss))


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 9)}, r"hidden, weight: expected \[B, T, D\] and \[V, D\]"),
        ({"weight": torch.zeros(23, 8)}, r"weight: expected floating .*'V': 23, 'D': 7.*got torch.float32 \[23, 8\]"),
        ({"weight": torch.zeros(23, 7, dtype=torch.long)}, "weight: expected floating"),
        (
            {"labels": torch.zeros(2, 8, dtype=torch.long)},
            r"labels: expected integer .*'B': 2, 'T': 9.*got torch.int64 \[2, 8\]",
        ),
        ({"labels": torch.zeros(2, 9)}, "labels: expected integer"),
        ({"labels": torch.full((2, 9), 23)}, "labels: expected -100 or 0..22, got 23"),
        ({"labels": torch.full((2, 9), -1)}, "labels: expected -100 or 0..22, got -1"),
        ({"top_ids": torch.full((2, 9, 5), 23)}, "top_ids: expected 0..22 at counted tokens"),
        ({"top_ids": torch.zeros(2, 9, 4, dtype=torch.long)}, r"top_logp: expected floating .*'B': 2, 'T': 9, 'M': 4"),
        (
            {"top_ids": torch.zeros(2, 9, 0, dtype=torch.long), "top_logp": torch.zeros(2, 9, 0)},
            "M=0: expected a vocabulary, and at least one entry",
        ),
        ({"rest_logp": torch.zeros(2, 9, 1)}, r"rest_logp: expected floating .*'B': 2, 'T': 9.*\[2, 9, 1\]"),
        ({"mask": torch.ones(2, 9)}, r"mask: expected bool .*'B': 2, 'T': 9"),
        ({"bias": torch.zeros(22)}, r"bias: expected floating .*'V': 23"),
        ({"top_logp": None}, r"\['top_logp'\] missing"),
        ({"rest_logp": None}, r"\['rest_logp'\] missing"),
        ({"top_ids": None, "top_logp": None, "rest_logp": None}, "missing"),
        ({"outcomes": "sampled"}, "outcomes='sampled' is not one of"),
        ({"outcomes": "gemma"}, "reverse_kl_weight=0.2: outcomes='gemma' has no reverse KL"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0: expected a finite weight"),
        ({"reverse_kl_weight": NAN}, "reverse_kl_weight=nan"),
        ({"logit_scale": -1.0}, "logit_scale=-1.0: expected a finite factor"),
        ({"softcap": 0.0}, "softcap=0.0: expected more than 0"),
        ({"num_items": 0}, "num_items=0: expected more than 0"),
        ({"num_items": torch.tensor(0)}, "num_items=0: expected more than 0"),
        ({"num_items": torch.ones(2)}, "num_items: expected one number"),
        ({"rows": 0}, "rows=0: expected an integer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        head_loss(**inputs() | ALL | change)
