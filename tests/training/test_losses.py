"""The losses against hand-computed numbers and their definitions, and what masks, padding entries and infinities must
not do.
"""

import math

import pytest
import torch

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.training.losses import (
    IGNORE,
    counted_mean,
    cross_entropy,
    dense_kl,
    forward_kl,
    shift,
    sparse_kl,
    tail_outcomes,
    top_k_targets,
)

INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def pair(B=2, T=5, V=11):
    """Student and teacher logits, and a mask that leaves out a token of each row."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = mask[-1, -1] = False
    return 3 * waves(B, T, V, step=0.37), 4 * waves(B, T, V, step=1.13), mask


def logp(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def gradient(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


# --- values ------------------------------------------------------------------------------------------------------


def test_three_tokens_by_hand():
    """Token t predicts token t + 1: two of three positions count, and the wrong alignment would give other numbers."""
    student = logp([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8])[None]
    teacher = logp([0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1])[None]
    labels = torch.tensor([[0, 2, 1]])
    (s, targets), (t, _) = shift(student, labels), shift(teacher, labels)
    close(cross_entropy(s, targets).item(), (math.log(4) + math.log(2)) / 2)
    mask = targets != IGNORE
    # of 0.25, 0.5, 0.25 against 0.5, 0.25, 0.25, and its mirror image
    each = 0.25 * math.log(0.5) + 0.5 * math.log(2) + 0.25 * math.log(1)
    close(dense_kl(s, t, mask).item(), each)
    top_ids, top_logp, rest = top_k_targets(t, 1)
    assert top_ids.tolist() == [[[1], [0]]]
    close((top_logp.exp(), rest.exp()), (torch.full((1, 2, 1), 0.5).double(), torch.full((1, 2), 0.5).double()))
    close(sparse_kl(s, top_ids, top_logp, rest, mask).item(), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_the_rest_is_taken_by_logsumexp_where_one_minus_the_sum_is_zero():
    logits = torch.tensor([[[0.0, -60.0, -61.0]]])
    ids, top, rest = top_k_targets(logits, 1)
    close(rest.item(), math.log(math.exp(-60) + math.exp(-61)), rtol=1e-6, atol=0)
    student = torch.tensor([[[0.0, -100.0, -100.0]]])
    wanted = math.exp(rest.item()) * (rest.item() - (math.log(2) - 100))
    close(sparse_kl(student, ids, top, rest, torch.ones(1, 1, dtype=torch.bool)).item(), wanted, rtol=1e-5, atol=0)
    assert wanted > 0


def test_sparse_is_dense_when_every_token_is_kept():
    student, teacher, mask = pair()
    for k in (11, 256):
        ids, top, rest = top_k_targets(teacher, k)
        assert ids.shape[-1] == 11 and (rest == -INF).all()
        close(sparse_kl(student, ids, top, rest, mask), dense_kl(student, teacher, mask), rtol=0, atol=1e-12)
        wanted = gradient(lambda x: dense_kl(x, teacher, mask), student)
        close(gradient(lambda x, kept=(ids, top, rest): sparse_kl(x, *kept, mask), student), wanted, rtol=0, atol=1e-12)


def test_sparse_is_between_zero_and_dense_and_grows_with_k():
    student, teacher, mask = pair()
    values = [sparse_kl(student, *top_k_targets(teacher, k), mask).item() for k in range(1, 12)]
    assert values[0] > 0 and all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    close(values[-1], dense_kl(student, teacher, mask).item())


@pytest.mark.parametrize("k", [1, 4, 11])
def test_a_model_distilled_from_itself_has_no_loss_and_no_gradient(k):
    student, _, mask = pair()
    kept = top_k_targets(student, k)
    close(sparse_kl(student, *kept, mask).item(), 0.0, rtol=0, atol=1e-14)
    close(gradient(lambda x: sparse_kl(x, *kept, mask), student), torch.zeros_like(student), rtol=0, atol=1e-15)


def test_a_shift_of_all_logits_of_a_token_changes_nothing():
    student, teacher, mask = pair()
    moved = student + 50 * waves(2, 5, 1, step=2.0)
    kept, moved_kept = top_k_targets(teacher, 4), top_k_targets(teacher - 30, 4)
    close(sparse_kl(moved, *moved_kept, mask), sparse_kl(student, *kept, mask), rtol=1e-12, atol=0)
    close(dense_kl(moved, teacher - 30, mask), dense_kl(student, teacher, mask), rtol=1e-12, atol=0)


def test_outcomes_are_distributions():
    student, teacher, mask = pair()
    for k in (1, 4, 10, 11):
        q, p = tail_outcomes(student, *top_k_targets(teacher, k), mask)
        assert q.shape == p.shape == (2, 5, k + 1)
        close((q.logsumexp(-1), p.logsumexp(-1)), (torch.zeros(2, 5).double(),) * 2, rtol=0, atol=1e-12)


def test_num_items_is_the_divisor_and_parts_add_up():
    student, teacher, mask = pair()
    kept, labels = top_k_targets(teacher, 4), torch.where(mask, torch.arange(10).view(2, 5), IGNORE)
    n = int(mask.sum())
    losses = {
        "ce": lambda rows, **kw: cross_entropy(student[rows], labels[rows], **kw),
        "sparse": lambda rows, **kw: sparse_kl(student[rows], *(x[rows] for x in kept), mask[rows], **kw),
        "dense": lambda rows, **kw: dense_kl(student[rows], teacher[rows], mask[rows], **kw),
    }
    for loss in losses.values():
        whole = loss(slice(None))
        close(sum(loss(slice(j, j + 1), num_items=torch.tensor(n)) for j in (0, 1)), whole)
        close(loss(slice(None), num_items=1) / n, whole)


def test_a_mean_is_of_the_counted_values():
    values, mask = torch.tensor([[1.0, NAN], [INF, 5.0]]), torch.tensor([[True, False], [False, True]])
    assert counted_mean(values, mask, None) == 3 and counted_mean(values, mask, 12) == 0.5


# --- masks, padding, infinities ----------------------------------------------------------------------------------


def test_a_row_that_is_not_counted_may_hold_anything():
    student, teacher, mask = pair()
    ids, top, rest = top_k_targets(teacher, 4)
    labels = torch.where(mask, torch.arange(10).view(2, 5), IGNORE)
    wanted = sparse_kl(student, ids, top, rest, mask), dense_kl(student, teacher, mask), cross_entropy(student, labels)
    wanted_grad = gradient(lambda x: sparse_kl(x, ids, top, rest, mask), student)
    for poison in (NAN, INF, -INF):
        s, t, p, r, i = student.clone(), teacher.clone(), top.clone(), rest.clone(), ids.clone()
        s[~mask], t[~mask], p[~mask], r[~mask], i[~mask] = poison, poison, poison, poison, 99_999
        close((sparse_kl(s, i, p, r, mask), dense_kl(s, t, mask), cross_entropy(s, labels)), wanted)
        got = gradient(lambda x, kept=(i, p, r): sparse_kl(x, *kept, mask), s)
        close(got, wanted_grad)
        assert (got[~mask] == 0).all()
        for loss in (lambda x, t=t: dense_kl(x, t, mask), lambda x: cross_entropy(x, labels)):
            got = gradient(loss, s)
            assert got.isfinite().all() and (got[~mask] == 0).all() and (got[mask] != 0).any()


def test_nothing_counted_is_zero_with_a_zero_gradient():
    student, teacher, mask = pair()
    student[0, 0], none = NAN, torch.zeros_like(mask)
    kept, labels = top_k_targets(teacher, 4), torch.full((2, 5), IGNORE)
    for num_items in (None, 0, torch.tensor(0), 7):
        for loss in (
            lambda x, n=num_items: sparse_kl(x, *kept, none, n),
            lambda x, n=num_items: dense_kl(x, teacher, none, n),
            lambda x, n=num_items: cross_entropy(x, labels, n),
        ):
            assert loss(student) == 0 and (gradient(loss, student) == 0).all()


def test_padding_entries_leave_their_id_in_the_rest():
    """A support of 2 padded to 4 with id 0 at -inf is the support of 2, whether or not 0 is one of its ids."""
    student, teacher, mask = pair()
    ids, top, rest = top_k_targets(teacher, 2)
    assert (ids == 0).any() and (ids != 0).all(-1).any()  # the inputs have rows of both kinds
    padded = torch.cat([ids, torch.zeros_like(ids)], -1), torch.cat([top, torch.full_like(top, -INF)], -1), rest
    wanted = sparse_kl(student, ids, top, rest, mask)
    close(sparse_kl(student, *padded, mask), wanted, rtol=0, atol=1e-15)
    first = tuple(torch.cat([x[..., 2:], x[..., :2]], -1) for x in padded[:2])  # padding before the entries
    close(sparse_kl(student, *first, rest, mask), wanted, rtol=0, atol=1e-15)
    close(
        gradient(lambda x: sparse_kl(x, *padded, mask), student),
        gradient(lambda x: sparse_kl(x, ids, top, rest, mask), student),
    )


def test_a_support_that_covers_everything_but_is_padded_has_no_rest():
    """As many entries as tokens, one of them padding: the mass of the missing token is the rest."""
    student, teacher, mask = pair(V=3)
    ids, top, rest = top_k_targets(teacher, 2)
    padded = (
        torch.cat([ids, torch.zeros_like(ids[..., :1])], -1),
        torch.cat([top, torch.full_like(top[..., :1], -INF)], -1),
        rest,
    )
    close(sparse_kl(student, *padded, mask), dense_kl(student, teacher, mask))


@pytest.mark.parametrize("k", [2, 9, 11])
def test_tokens_that_the_teacher_or_both_exclude_contribute_nothing(k):
    """A padded vocabulary: 3 of 11 ids are -inf. The result is that of the 8 real ids, value and gradient."""
    student, teacher, mask = pair()
    real, excluded = torch.arange(11) < 8, teacher.clone()
    excluded[..., 8:] = -INF
    both = student.clone()
    both[..., 8:] = -INF
    kept = top_k_targets(excluded, k)
    wanted = sparse_kl(both[..., :8], *top_k_targets(excluded[..., :8], k), mask)
    close(sparse_kl(both, *kept, mask), wanted, rtol=0, atol=1e-14)
    close(dense_kl(both, excluded, mask), dense_kl(both[..., :8], excluded[..., :8], mask), rtol=0, atol=1e-14)
    for loss in (lambda x: sparse_kl(x, *kept, mask), lambda x: dense_kl(x, excluded, mask)):
        grad = gradient(loss, both)
        assert grad.isfinite().all() and (grad[..., ~real] == 0).all() and (grad[..., real] != 0).any()
        assert gradient(loss, student).isfinite().all()


def test_what_is_wrong_in_a_counted_place_is_not_hidden():
    student, teacher, mask = pair()
    ids, top, rest = top_k_targets(teacher, 4)
    for x in (student, top, rest):
        good = x[0, 0].clone()
        x[0, 0] = NAN
        assert sparse_kl(student, ids, top, rest, mask).isnan()
        x[0, 0] = good
    impossible = student.clone()
    impossible[0, 0, ids[0, 0, 0]] = -INF  # the student excludes what the teacher expects
    assert sparse_kl(impossible, ids, top, rest, mask) == INF == dense_kl(impossible, teacher, mask)


# --- gradients and precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradients_are_those_of_the_values(k):
    student, teacher, mask = pair(T=3, V=6)
    kept, labels = top_k_targets(teacher, k), torch.where(mask, 2, IGNORE)
    short = kept[1].clone()
    short[..., 1:] = -INF  # also with padding entries
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparse_kl(x, *kept, mask), student)
    assert torch.autograd.gradcheck(
        lambda x: sparse_kl(x, kept[0], short, kept[1][..., 1:].exp().sum(-1).add(kept[2].exp()).log(), mask), student
    )
    assert torch.autograd.gradcheck(lambda x: dense_kl(x, teacher, mask), student)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), student)


def test_the_gradient_of_the_tail_form_by_hand():
    """d KL / d logit_j = q_j (1 - p(bucket of j) / q(bucket of j)): a stored token is a bucket of its own, q_j - p_j;
    the rest shares one.
    """
    student, teacher = logp([0.2, 0.3, 0.5])[None], logp([0.6, 0.3, 0.1])[None]
    kept = top_k_targets(teacher, 1)
    grad = gradient(lambda x: sparse_kl(x, *kept, torch.ones(1, 1, dtype=torch.bool)), student[None, 0])
    close(grad[0, 0], torch.tensor([0.2 - 0.6, 0.3 * (1 - 0.4 / 0.8), 0.5 * (1 - 0.4 / 0.8)], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_everything_is_calculated_in_float32_at_least(dtype):
    """Low-precision logits give what their float32 copies give, bit for bit, also under autocast."""
    student, teacher, mask = (x.to(dtype) if x.is_floating_point() else x for x in pair(V=503))
    labels = torch.where(mask, 7, IGNORE)
    s, t = student.float(), teacher.float()
    wanted = (
        *top_k_targets(t, 16),
        sparse_kl(s, *top_k_targets(t, 16), mask),
        dense_kl(s, t, mask),
        cross_entropy(s, labels),
    )
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            kept = top_k_targets(teacher, 16)
            got = (
                *kept,
                sparse_kl(student, *kept, mask),
                dense_kl(student, teacher, mask),
                cross_entropy(student, labels),
            )
        assert all(x.dtype == torch.float32 for x in got[1:])
        close(got, wanted, rtol=0, atol=0)


def test_float32_is_right_near_convergence_where_a_bf16_softmax_is_not():
    """151,936 tokens with Zipf's frequencies, a student 0.1 away in its logits: about 1e-3 nats, right to one percent."""
    V, mask = 151_936, torch.ones(1, 2, dtype=torch.bool)
    # 7919 is prime to V: every rank once
    teacher = -(1 + (torch.arange(2 * V, dtype=torch.float64) * 7919) % V).log().view(1, 2, V)
    student = teacher + 0.1 * waves(1, 2, V, step=0.9)
    for loss in (lambda s, t: dense_kl(s, t, mask), lambda s, t: sparse_kl(s, *top_k_targets(t, 256), mask)):
        truth = loss(student, teacher).item()
        assert 5e-4 < truth < 5e-3
        close(loss(student.float(), teacher.float()).item(), truth, rtol=0.01, atol=0)
    q, p = student.bfloat16().log_softmax(-1), teacher.bfloat16().log_softmax(-1)
    coarse = (p.exp() * (p - q)).sum(-1).mean().item()
    assert abs(coarse / dense_kl(student, teacher, mask).item() - 1) > 0.25


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name():
    student, teacher, mask = pair()
    ids, top, rest = top_k_targets(teacher, 4)
    with pytest.raises(ConfigError, match="k=0: expected at least 1"):
        top_k_targets(teacher, 0)
    with pytest.raises(DataError, match=r"labels: expected shape \[2, 4\], got \[2, 5\].*shift"):
        cross_entropy(student[:, :-1], mask.long())
    for name, bad in {
        "top_ids": (ids[..., :3], top, rest, mask),
        "top_logp": (ids, top[:, 1:], rest, mask),
        "rest_logp": (ids, top, rest[..., None], mask),
        "mask": (ids, top, rest, mask[0]),
    }.items():
        with pytest.raises(DataError, match=f"{name}: expected shape"):
            sparse_kl(student, *bad)
    with pytest.raises(DataError, match="teacher_logits: expected shape"):
        dense_kl(student, teacher[..., :-1], mask)
    with pytest.raises(DataError, match="mask: expected shape"):
        dense_kl(student, teacher, mask[:, 1:])


def test_forward_kl_is_the_textbook_sum():
    q, p = logp([0.5, 0.25, 0.25]), logp([0.1, 0.2, 0.7])
    close(forward_kl(q, p).item(), sum(a * math.log(a / b) for a, b in ((0.1, 0.5), (0.2, 0.25), (0.7, 0.25))))
