"""The fused head loss is the loss on full logits: by hand, against the project's own definitions, and in what it must
not do.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from xlstm_kernels import head_loss
from xlstm_kernels.head_loss.reference import OUTCOMES, REST_FLOOR

from xlstm_hybrid.training.losses import cross_entropy, forward_kl, shift, sparse_kl, tail_outcomes, top_k_targets

torch.set_num_threads(1)
INF, NAN = float("inf"), float("nan")
every_backend = pytest.mark.parametrize("backend", ["dense", "torch"])  # the kernel has a file of its own
close = torch.testing.assert_close


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(B=2, T=9, D=7, V=23, M=5):
    """Hidden states, head, bias, labels (some -100) and a teacher whose supports differ in length: arguments of
    `head_loss` by name.
    """
    ids, logp, rest = top_k_targets(4 * waves(B, T, V, step=1.13), M)
    short = torch.arange(ids.shape[2]) >= 1 + torch.arange(B * T).view(B, T, 1) % M
    rest = torch.logaddexp(rest, torch.where(short, logp, -INF).logsumexp(-1))
    labels = (torch.arange(B * T).view(B, T) * 7) % V
    labels[0, 2 % T] = labels[-1, -1] = labels[-1, 0] = -100
    return {
        "hidden": 2 * waves(B, T, D, step=0.37),
        "weight": 1.5 * waves(V, D, step=0.71),
        "bias": waves(V, step=0.9),
        "labels": labels,
        "top_ids": torch.where(short, 0, ids),
        "top_logp": torch.where(short, -INF, logp),
        "rest_logp": rest,
    }


ALL = {"ce_weight": 0.9, "forward_kl_weight": 0.3, "reverse_kl_weight": 0.2}


def settings(outcomes, **more):
    return ALL | {"outcomes": outcomes} | ({"reverse_kl_weight": 0.0} if outcomes == "gemma" else {}) | more


def everything(x, *, scale=1.7, **more):
    """Terms, and the gradients of hidden, weight and bias for `scale` times the loss."""
    x = {
        name: a.clone().requires_grad_() if name in ("hidden", "weight", "bias") else a
        for name, a in x.items()
        if a is not None
    }
    out = head_loss(**x, **more)
    (scale * out.loss).backward()
    return {**out._asdict(), **{f"d{name}": x[name].grad for name in ("hidden", "weight", "bias") if name in x}}


def assert_same(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name, a in got.items():
        close(
            a, want[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def gap(got, want):
    """Largest difference over the largest entry, by name."""
    return {
        n: ((a.double() - want[n]).abs().max() / want[n].abs().max()).item()
        for n, a in got.items()
        if torch.is_tensor(a) and n != "agreement"
    }


def plain(x, dtype):
    """What eager code does: logits in the dtype of the inputs, softmax in float32."""
    leaf = {n: x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    logits = F.linear(leaf["hidden"], leaf["weight"], leaf["bias"])
    logits, labels = shift(logits, x["labels"])
    kept, mask = [x[name][:, :-1] for name in ("top_ids", "top_logp", "rest_logp")], labels != -100
    loss = 0.9 * cross_entropy(logits, labels) + 0.3 * sparse_kl(logits, *kept, mask)
    loss.backward()
    return {"loss": loss.detach(), **{f"d{n}": a.grad for n, a in leaf.items()}}


# --- values ------------------------------------------------------------------------------------------------------


def by_hand(z, ids, logp, rest, outcomes):
    """Forward and reverse KL of one token in plain numbers: z [V] a list, the support as {id: log-probability}."""
    norm = math.log(sum(map(math.exp, z)))
    stored = {y: p for y, p in zip(ids, logp, strict=True) if p > -INF}
    teacher, student = dict(stored), {y: z[y] - norm for y in stored}
    if outcomes != "tail":
        total = math.log(sum(map(math.exp, stored.values())))
        teacher = {y: p - total for y, p in stored.items()}
    if outcomes == "renormalise":
        total = math.log(sum(map(math.exp, student.values())))
        student = {y: q - total for y, q in student.items()}
    if outcomes == "tail" and len(stored) < len(z):
        teacher["rest"], student["rest"] = (
            rest,
            math.log(sum(math.exp(a - norm) for y, a in enumerate(z) if y not in stored)),
        )
    forward = sum(math.exp(p) * (p - student[o]) for o, p in teacher.items() if p > -INF)
    reverse = sum(math.exp(q) * (q - max(teacher[o], REST_FLOOR if o == "rest" else -INF)) for o, q in student.items())
    return (
        forward,
        reverse,
        math.nan if not stored else float(max(stored, key=stored.get) == max(range(len(z)), key=z.__getitem__)),
    )


@every_backend
@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("shifted", [True, False])
def test_each_term_is_its_sum_over_outcomes(backend, outcomes, shifted):
    x = inputs()
    out = head_loss(**x, **settings(outcomes), shift=shifted, logit_scale=0.8, softcap=5.0, backend=backend)
    ce, forward, reverse, agreement = [], [], [], []
    for b, t in product(range(2), range(9 - shifted)):
        label = x["labels"][b, t + shifted].item()
        if label == -100:
            continue
        z = (5 * torch.tanh(0.8 * (x["weight"] @ x["hidden"][b, t] + x["bias"]) / 5)).tolist()
        ce.append(math.log(sum(map(math.exp, z))) - z[label])
        f, r, same = by_hand(z, *(x[name][b, t].tolist() for name in ("top_ids", "top_logp", "rest_logp")), outcomes)
        forward, reverse, agreement = [*forward, f], [*reverse, r], [*agreement, same]
    mean = [sum(values) / len(values) for values in (ce, forward, reverse, agreement)]
    assert out.items == len(ce)
    close(
        torch.stack([out.ce, out.forward_kl, out.agreement.double()]),
        torch.tensor([mean[0], mean[1], mean[3]], dtype=torch.float64),
    )
    weight = settings(outcomes)["reverse_kl_weight"]
    close(out.loss.item(), 0.9 * mean[0] + 0.3 * mean[1] + weight * mean[2])
    assert out.reverse_kl is None if outcomes == "gemma" else abs(out.reverse_kl.item() - mean[2]) < 1e-12


@every_backend
@pytest.mark.parametrize("num_items", [None, 40])
def test_it_is_the_projects_own_cross_entropy_and_forward_kl(backend, num_items):
    x = inputs()
    got = everything(x, **settings("tail", reverse_kl_weight=0.0), num_items=num_items, backend=backend, scale=1.0)
    hidden, weight, bias = (x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    logits, labels = shift(F.linear(hidden, weight, bias), x["labels"])
    kept, mask = [x[name][:, :-1] for name in ("top_ids", "top_logp", "rest_logp")], labels != -100
    ce, kl = cross_entropy(logits, labels, num_items), sparse_kl(logits, *kept, mask, num_items)
    loss = 0.9 * ce + 0.3 * kl
    loss.backward()
    close(kl, forward_kl(*tail_outcomes(logits, *kept, mask))[mask].sum() / (num_items or mask.sum()))
    want = {
        "loss": loss,
        "ce": ce,
        "forward_kl": kl,
        "dhidden": hidden.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
    }
    assert_same({name: got[name] for name in want}, want)


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 4.0, "logit_scale": 0.7}, {"logit_scale": 1.3}, {"shift": False}, {"num_items": 50}],
    ids=str,
)
def test_chunks_are_the_definition(outcomes, rows, more):
    x = inputs()
    x["mask"] = (
        torch.arange(18).view(2, 9) % 3 > 0
    )  # labels and mask count at different tokens, some at one, some at both, some nowhere
    assert_same(
        everything(x, **settings(outcomes, **more), rows=rows, backend="torch"),
        everything(x, **settings(outcomes, **more), backend="dense"),
    )


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=["ce", "forward", "reverse"]
)
def test_each_term_alone_has_its_own_gradient(weights):
    more = dict(zip(ALL, weights, strict=True))
    assert_same(everything(inputs(), **more, backend="torch"), everything(inputs(), **more, backend="dense"))


def test_a_vocabulary_of_several_slices_gives_the_same():
    x = inputs(V=1300, M=40)
    assert_same(everything(x, **ALL, backend="torch"), everything(x, **ALL, backend="dense"))


@every_backend
def test_without_a_teacher_it_is_cross_entropy(backend):
    x = {name: a for name, a in inputs().items() if name in ("hidden", "weight", "labels")}
    out = head_loss(**x, backend=backend)
    logits, labels = shift(x["hidden"] @ x["weight"].T, x["labels"])
    close(out.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert out[2:5] == (None, None, None) and out.items == (labels != -100).sum()
    assert_same(everything(x, backend="torch"), everything(x, backend="dense"))


@every_backend
def test_agreement_is_the_share_of_tokens_whose_most_likely_id_is_the_teachers(backend):
    x = inputs(M=6)
    x["top_logp"] = x["top_logp"].flip(-1)  # the most likely need not come first
    x["top_ids"] = x["top_ids"].flip(-1)
    logits = F.linear(x["hidden"], x["weight"], x["bias"])
    for b, t in ((0, 0), (0, 4), (1, 3)):
        best = x["top_ids"][b, t, x["top_logp"][b, t].argmax()]
        swap = logits[b, t].argmax()
        x["top_ids"][b, t] = torch.where(x["top_ids"][b, t] == swap, best, x["top_ids"][b, t])
        x["top_ids"][b, t, x["top_logp"][b, t].argmax()] = swap
    best = x["top_ids"].gather(-1, x["top_logp"].argmax(-1, keepdim=True))[..., 0]
    same = (logits.argmax(-1) == best)[:, :-1][x["labels"][:, 1:] != -100].double().mean()
    assert 0 < same < 1
    close(head_loss(**x, forward_kl_weight=1.0, backend=backend).agreement.double(), same)
    dead = x | {"hidden": torch.zeros_like(x["hidden"]), "bias": torch.zeros_like(x["bias"])}
    assert (
        head_loss(**dead, forward_kl_weight=1.0, backend=backend).agreement == 0
    )  # all ids are as likely: none is the student's choice


# --- supports, infinities and what does not count ----------------------------------------------------------------


@every_backend
def test_equal_distributions_have_no_divergence_and_no_gradient(backend):
    x = inputs(M=6)
    logits = F.linear(x["hidden"], x["weight"], x["bias"])
    x["top_ids"], x["top_logp"], x["rest_logp"] = top_k_targets(logits, 6)
    got = everything(x, ce_weight=0.0, forward_kl_weight=1.0, reverse_kl_weight=1.0, backend=backend)
    assert got["agreement"] == 1
    for name in ("loss", "forward_kl", "reverse_kl", "dhidden", "dweight", "dbias"):
        close(got[name], torch.zeros_like(got[name]), atol=1e-12, rtol=0)


@every_backend
def test_with_the_whole_vocabulary_stored_it_is_the_dense_divergence(backend):
    x = inputs(V=11)
    teacher = 4 * waves(2, 9, 11, step=1.13)
    x["top_ids"], x["top_logp"], _ = top_k_targets(teacher, 11)
    x["rest_logp"] = torch.full(
        (2, 9), -17.0
    ).double()  # what 1 - sum in float32 might have left: there is nothing it could stand for
    out = head_loss(**x, **ALL, shift=False, mask=torch.ones(2, 9, dtype=torch.bool), backend=backend)
    q, p = F.linear(x["hidden"], x["weight"], x["bias"]).log_softmax(-1), teacher.log_softmax(-1)
    close(out.forward_kl, (p.exp() * (p - q)).sum(-1).mean())
    close(out.reverse_kl, (q.exp() * (q - p)).sum(-1).mean())
    assert_same(everything(x, **ALL, backend="torch"), everything(x, **ALL, backend="dense"))


@every_backend
@pytest.mark.parametrize("outcomes", OUTCOMES)
def test_padding_changes_nothing(backend, outcomes):
    """Id 0 at -inf, however often, whether or not id 0 is stored as well."""
    x = inputs()
    assert (x["top_ids"][x["top_logp"] > -INF] == 0).any() and (x["top_logp"] == -INF).any()
    more = torch.zeros(2, 9, 3, dtype=torch.long), torch.full((2, 9, 3), -INF, dtype=torch.float64)
    padded = x | {
        "top_ids": torch.cat([more[0], x["top_ids"]], -1),
        "top_logp": torch.cat([more[1], x["top_logp"]], -1),
    }
    assert_same(
        everything(padded, **settings(outcomes), backend=backend), everything(x, **settings(outcomes), backend=backend)
    )


@pytest.mark.parametrize("outcomes", OUTCOMES)
def test_a_token_without_a_stored_id_has_all_mass_in_the_rest(outcomes):
    x = inputs()
    x["top_ids"][0, 1], x["top_logp"][0, 1], x["rest_logp"][0, 1] = 0, -INF, 0.0
    got = everything(x, **settings(outcomes), backend="torch")
    assert all(torch.isfinite(a).all() for a in got.values() if torch.is_tensor(a))
    assert_same(got, everything(x, **settings(outcomes), backend="dense"))


@every_backend
def test_reverse_kl_is_finite_where_the_teacher_has_no_rest_mass(backend):
    x = inputs()
    x["rest_logp"] = torch.full_like(x["rest_logp"], -INF)
    floored = x | {"rest_logp": torch.full_like(x["rest_logp"], REST_FLOOR)}
    more = {"ce_weight": 0.0, "reverse_kl_weight": 1.0, "backend": backend}
    got, want = everything(x, **more), everything(floored, **more)
    assert got["reverse_kl"].isfinite() and got["dhidden"].isfinite().all()
    assert_same(
        {n: got[n] for n in ("loss", "dhidden", "dweight")}, {n: want[n] for n in ("loss", "dhidden", "dweight")}
    )
    assert everything(x, ce_weight=0.0, forward_kl_weight=1.0, backend=backend)["forward_kl"].isfinite()


def test_a_rest_mass_below_the_smallest_float_keeps_its_value_and_gradient():
    """The student's rest is exp(-200): in float32 neither 1 - sum nor the probabilities show it, and logits of 100 are
    rounded to 1e-5.
    """
    x = {
        "hidden": torch.ones(1, 1, 1),
        "weight": torch.tensor([101.0, 100, -99, -99.5, -98, -100])[:, None],
        "labels": torch.zeros(1, 1).long(),
        "top_ids": torch.tensor([[[0, 1]]]),
        "top_logp": torch.tensor([[[0.6, 0.3]]]).log(),
        "rest_logp": torch.tensor([[0.1]]).log(),
    }
    more = {"ce_weight": 0.5, "forward_kl_weight": 1.0, "reverse_kl_weight": 1.0, "shift": False, "backend": "torch"}
    want = everything(
        {n: a.double() if a.is_floating_point() else a for n, a in x.items()}, **more | {"backend": "dense"}
    )
    assert want["forward_kl"] > 15 and want["dweight"][2:].abs().sum() > 0.1
    got = everything(x, **more)
    for name in ("loss", "ce", "forward_kl", "reverse_kl", "dhidden", "dweight"):
        close(got[name].double(), want[name], rtol=2e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@every_backend
@pytest.mark.parametrize("outcomes", OUTCOMES)
def test_what_does_not_count_may_hold_anything(backend, outcomes):
    x = inputs()
    want = everything(x, **settings(outcomes), backend=backend)
    idle = torch.cat([x["labels"][:, 1:] == -100, torch.ones(2, 1, dtype=torch.bool)], 1)
    for name, garbage in {"hidden": NAN, "top_logp": NAN, "rest_logp": INF, "top_ids": 10**6}.items():
        x[name] = x[name].clone()
        x[name][idle] = garbage
    got = everything(x, **settings(outcomes), backend=backend)
    assert_same(got, want)
    assert (got["dhidden"][idle] == 0).all() and idle.any()


@every_backend
def test_targets_may_hold_anything_where_only_cross_entropy_counts(backend):
    x = inputs()
    x["mask"] = torch.arange(18).view(2, 9) % 2 == 0
    want = everything(x, **ALL, backend=backend)
    for name, garbage in {"top_logp": NAN, "rest_logp": INF, "top_ids": -5}.items():
        x[name] = x[name].clone()
        x[name][~x["mask"]] = garbage
    assert_same(everything(x, **ALL, backend=backend), want)
    assert want["items"] > x["mask"][:, :-1].sum()


@every_backend
@pytest.mark.parametrize("T", [1, 9])
def test_no_counted_token_is_a_loss_of_zero_with_gradients_of_zero(backend, T):
    x = inputs(T=T)
    x["labels"] = torch.full_like(x["labels"], -100)
    got = everything(x, **ALL, backend=backend)
    assert got["items"] == 0 and got["loss"] == got["ce"] == got["forward_kl"] == got["agreement"] == 0
    assert all(
        (got[f"d{name}"] == 0).all() and got[f"d{name}"].shape == x[name].shape for name in ("hidden", "weight", "bias")
    )


def test_nan_where_it_counts_is_seen():
    x = inputs()
    x["hidden"][0, 0] = NAN
    assert head_loss(**x, **ALL).loss.isnan()
    x = inputs()
    x["top_logp"][0, 0, 0] = NAN
    out = head_loss(**x, **ALL)
    assert out.forward_kl.isnan() and out.ce.isfinite()


def test_a_term_without_weight_may_be_infinite():
    """Ids that a mask in the bias excludes are where this happens."""
    x = inputs()
    x["bias"][x["top_ids"][0, 0, 0]] = -INF
    out = head_loss(**x | {"labels": torch.full_like(x["labels"], 3)}, ce_weight=1.0)
    assert out.forward_kl == INF and out.loss.isfinite()


def test_float32_over_several_slices_of_a_large_vocabulary_is_exact():
    """Three slices of the head, several chunks of rows: what oneDNN multiplies on a CPU where it is quicker."""
    x, more = inputs(T=20, D=24, V=1100), settings("tail", rows=16)
    exact = everything(x, **more)
    single = everything({name: a.float() if a.is_floating_point() else a for name, a in x.items()}, **more)
    for name, error in gap(single, exact).items():
        assert error <= 1e-5, name
