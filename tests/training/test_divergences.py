"""Every divergence on every kind of outcomes: against its definition, written out in probabilities, and what must not
change it.
"""

import itertools
import math

import pytest
import torch
from test_losses import pair, waves

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.training import losses
from xlstm_hybrid.training.losses import (
    CSD_WEIGHTS,
    DIVERGENCES,
    OUTCOMES,
    csd,
    dense_outcomes,
    distillation_loss,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_targets,
    tail_outcomes,
    top_k_targets,
)

INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close
VARIANTS = {  # every divergence, those with options at several of them
    "forward_kl": ("forward_kl", {}),
    "reverse_kl": ("reverse_kl", {}),
    "tvd": ("tvd", {}),
    "skewed": ("skewed_kl", {"skew": 0.3}),
    "jsd": ("jsd", {}),
    "jsd .9": ("jsd", {"jsd_beta": 0.9}),
    "jsd 0": ("jsd", {"jsd_beta": 0}),
    "jsd 1": ("jsd", {"jsd_beta": 1}),
    **{f"csd {w}": ("csd", {"csd_weights": w, "csd_temperature": 1.5}) for w in CSD_WEIGHTS},
}


def softmax(scores):
    """Of a list, by exp and division."""
    weights = [math.exp(x) for x in scores]
    return [w / sum(weights) for w in weights]


def definition(name, s, t, **options):
    """A divergence of two lists of probabilities above 0, as its paper has it: plain sums, nothing in log space."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def mix(share):
        return [share * b + (1 - share) * a for a, b in zip(s, t, strict=True)]

    if name == "tvd":
        # the other definition: the largest difference on an event
        return max(sum(a - b for a, b in zip(s, t, strict=True) if a > b), 0.0)
    if name == "skewed_kl":
        return kl(t, mix(options["skew"]))
    if name == "jsd":
        beta = options.get("jsd_beta", 0.5)
        return {0: kl(t, s), 1: kl(s, t)}.get(beta, beta * kl(t, mix(beta)) + (1 - beta) * kl(s, mix(beta)))
    if name == "csd":
        tau = options["csd_temperature"]
        weights = {"s": softmax([math.log(a) / tau for a in s]), "t": t, "u": [1 / len(s)] * len(s)}
        w1, w2 = (weights[w] for w in options["csd_weights"])
        d = [math.log(a) - math.log(b) for a, b in zip(s, t, strict=True)]
        return sum(w1[y] * w2[x] * (d[x] - d[y]) ** 2 for x in range(len(d)) for y in range(len(d))) / 4  # O(V^2)
    return kl(t, s) if name == "forward_kl" else kl(s, t)


def probabilities(outcomes, student, teacher, k):
    """Student and teacher as lists of probabilities on the outcomes, from the logits of one position, by sums over sets
    of ids.
    """
    s, t = softmax(student.tolist()), softmax(teacher.tolist())
    kept = sorted(range(len(t)), key=lambda j: -t[j])[:k]
    rest = [j for j in range(len(t)) if j not in kept]
    if outcomes == "dense":
        return s, t
    stored = [s[j] for j in kept], [t[j] for j in kept]
    if outcomes == "renormalise":
        return tuple([a / sum(side) for a in side] for side in stored)
    return [*stored[0], sum(s[j] for j in rest)], [*stored[1], sum(t[j] for j in rest)]


def loss_of(student, targets, mask, outcomes, variant, **kw):
    name, options = VARIANTS[variant]
    return distillation_loss(student, targets, mask, outcomes=outcomes, divergence=name, **options, **kw)


def targets_of(outcomes, teacher, k=4):
    return (teacher,) if outcomes == "dense" else top_k_targets(teacher, k)


def gradient(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_divergence_is_its_definition_on_each_kind_of_outcomes(variant):
    student, teacher, mask = pair()
    name, options = VARIANTS[variant]
    for outcomes in ("tail", "renormalise", "dense"):
        wanted = [
            definition(name, *probabilities(outcomes, student[b, t], teacher[b, t], 4), **options)
            for b, t in mask.nonzero().tolist()
        ]
        got = loss_of(student, targets_of(outcomes, teacher), mask, outcomes, variant)
        close(
            got.item(),
            sum(wanted) / len(wanted),
            rtol=1e-11,
            atol=0,
            msg=lambda text, outcomes=outcomes: f"{outcomes}: {text}",
        )


def test_gemma_is_the_cross_entropy_with_the_renormalised_teacher_less_its_entropy():
    student, teacher, mask = pair()
    total = 0.0
    for b, t in mask.nonzero().tolist():
        s, p = softmax(student[b, t].tolist()), softmax(teacher[b, t].tolist())
        kept = sorted(range(11), key=lambda j: -p[j])[:4]
        total += sum(p[j] / sum(p[i] for i in kept) * math.log(p[j] / sum(p[i] for i in kept) / s[j]) for j in kept)
    close(
        loss_of(student, targets_of("gemma", teacher), mask, "gemma", "forward_kl").item(),
        total / 8,
        rtol=1e-12,
        atol=0,
    )


def test_all_kinds_of_outcomes_agree_when_every_token_is_kept():
    student, teacher, mask = pair()
    for variant in VARIANTS:
        wanted = loss_of(student, (teacher,), mask, "dense", variant)
        for outcomes in ("tail", "renormalise", "gemma"):
            close(loss_of(student, top_k_targets(teacher, 11), mask, outcomes, variant), wanted, rtol=1e-9, atol=1e-13)


def test_the_named_sparse_kl_is_the_default():
    student, teacher, mask = pair()
    kept = top_k_targets(teacher, 4)
    assert distillation_loss(student, kept, mask) == losses.sparse_kl(student, *kept, mask)
    assert distillation_loss(student, kept, mask, num_items=3) == losses.sparse_kl(student, *kept, mask, 3)


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_distilled_from_itself_has_no_loss_and_no_gradient(outcomes, variant):
    student, _, mask = pair()
    if outcomes == "gemma":  # its teacher has nothing outside the support: give the student nothing there as well
        student = student.scatter(-1, student.topk(7, largest=False).indices, -INF)
    targets = targets_of(outcomes, student)
    close(loss_of(student, targets, mask, outcomes, variant).item(), 0.0, rtol=0, atol=1e-13)
    if variant != "tvd":  # |x| has no gradient at 0: rounding decides its sign there
        close(
            gradient(lambda x: loss_of(x, targets, mask, outcomes, variant), student),
            torch.zeros_like(student),
            rtol=0,
            atol=1e-14,
        )


def test_the_ends_of_jsd_are_the_limits_of_its_scaled_values():
    student, teacher, mask = pair()
    q, p = dense_outcomes(student / 10, teacher / 10, mask)
    for end, near in ((0, 1e-6), (1, 1 - 1e-6)):
        close(jsd(q, p, jsd_beta=near) / (near if end == 0 else 1 - near), jsd(q, p, jsd_beta=end), rtol=1e-4, atol=0)
    assert torch.equal(jsd(q, p, jsd_beta=0), forward_kl(q, p)) and torch.equal(jsd(q, p, jsd_beta=1), reverse_kl(q, p))
    close(jsd(q, p, jsd_beta=0.3), jsd(p, q, jsd_beta=0.7))  # exchanging the two exchanges the shares
    assert (jsd(q, p) <= math.log(2)).all() and (losses.tvd(q, p) <= 1).all()


def test_skewed_kl_begins_at_forward_kl_and_is_finite_where_that_is_not():
    student, teacher, mask = pair()
    q, p = dense_outcomes(student, teacher, mask)
    assert torch.equal(losses.skewed_kl(q, p, skew=0), forward_kl(q, p))
    q = q.index_fill(-1, torch.tensor([3]), -INF)
    assert (
        (forward_kl(q, p) == INF).all()
        and losses.skewed_kl(q, p, skew=0.1).isfinite().all()
        and jsd(q, p).isfinite().all()
    )


# --- concrete scores ---------------------------------------------------------------------------------------------


def test_csd_with_the_students_weights_at_temperature_one_has_the_gradient_of_reverse_kl():
    student, teacher, mask = pair()

    def slope(outcomes, name, **options):
        targets = targets_of(outcomes, teacher)
        return gradient(
            lambda x: distillation_loss(x, targets, mask, outcomes=outcomes, divergence=name, **options), student
        )

    for outcomes in OUTCOMES:
        wanted = slope(outcomes, "reverse_kl")
        close(slope(outcomes, "csd", csd_weights="ss", csd_temperature=1.0), wanted, rtol=1e-9, atol=1e-12)
        # that one is another objective
        assert (slope(outcomes, "csd", csd_weights="ss", csd_temperature=1.5) - wanted).abs().max() > 0.01


def test_the_gradient_of_csd_is_half_the_formula_of_the_paper():
    """d L / d f_i = w2_i (d_i - E_w1 d) + w1_i (d_i - E_w2 d), halved; the weights carry no gradient."""
    f, g = 3 * waves(1, 9, step=0.37), 4 * waves(1, 9, step=1.13)
    weights = {"s": (f / 1.5).softmax(-1), "t": g.softmax(-1), "u": torch.full_like(f, 1 / 9)}
    for name in CSD_WEIGHTS:
        (w1, w2), d = (weights[w] for w in name), f - g
        wanted = (w2 * (d - (w1 * d).sum()) + w1 * (d - (w2 * d).sum())) / 2
        got = gradient(
            lambda x, name=name: csd(x.log_softmax(-1), g.log_softmax(-1), csd_weights=name, csd_temperature=1.5).sum(),
            f,
        )
        close(got, wanted, rtol=1e-10, atol=1e-13)
        assert torch.autograd.gradcheck(lambda x, w1=w1, w2=w2: losses.concrete_score(x, w1, w2), (d.requires_grad_(),))


def test_equal_weights_give_half_the_variance_and_nothing_cancels_far_from_zero():
    d, w = waves(1, 9, step=0.7), waves(1, 9, step=0.3).softmax(-1)
    variance = (w * (d - (w * d).sum()) ** 2).sum(-1)
    close(losses.concrete_score(d, w, w), variance / 2)
    far = losses.concrete_score((d + 4096).float(), w.float(), w.float()).double()
    # d itself is rounded to 2.4e-4; without centring first the squares, 1.7e7, lose everything
    close(far, variance / 2, rtol=2e-3, atol=0)


# --- what must not change a loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_shifts_padding_splits_and_uncounted_rows_change_nothing(outcomes, variant):
    student, teacher, mask = pair()
    targets = targets_of(outcomes, teacher)
    n, wanted = int(mask.sum()), loss_of(student, targets, mask, outcomes, variant)
    wanted_grad = gradient(lambda x: loss_of(x, targets, mask, outcomes, variant), student)
    moved = loss_of(
        student + 50 * waves(2, 5, 1, step=2.0), targets_of(outcomes, teacher - 30), mask, outcomes, variant
    )
    close(moved, wanted, rtol=1e-11, atol=0)
    parts = [
        loss_of(student[j], tuple(x[j] for x in targets), mask[j], outcomes, variant, num_items=n)
        for j in (slice(0, 1), slice(1, 2))
    ]
    close(sum(parts), wanted)
    for poison in (NAN, INF, -INF):
        s, bad = student.clone(), tuple(x.clone() for x in targets)
        for x in (s, *bad):
            x[~mask] = 99_999 if x.dtype == torch.long else poison
        close(loss_of(s, bad, mask, outcomes, variant), wanted)
        got = gradient(lambda x, bad=bad: loss_of(x, bad, mask, outcomes, variant), s)
        close(got, wanted_grad)
        assert (got[~mask] == 0).all() and (got[mask] != 0).any()
    none = torch.zeros_like(mask)
    assert loss_of(student, targets, none, outcomes, variant) == 0
    assert (gradient(lambda x: loss_of(x, targets, none, outcomes, variant), student) == 0).all()
    if outcomes != "dense":  # two more entries, which are no entries
        ids, top, rest = targets
        padded = (
            torch.cat([ids, torch.zeros_like(ids[..., :2])], -1),
            torch.cat([top, torch.full_like(top[..., :2], -INF)], -1),
            rest,
        )
        close(loss_of(student, padded, mask, outcomes, variant), wanted, rtol=1e-12, atol=1e-14)
        close(
            gradient(lambda x: loss_of(x, padded, mask, outcomes, variant), student),
            wanted_grad,
            rtol=1e-10,
            atol=1e-13,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_that_both_sides_exclude_contribute_nothing(variant):
    """A padded vocabulary at -inf on both sides: value and gradient are those of the real ids."""
    student, teacher, mask = pair()
    real = torch.arange(11) < 8
    s, t = student.masked_fill(~real, -INF), teacher.masked_fill(~real, -INF)
    for outcomes in OUTCOMES:
        wanted = loss_of(student[..., :8], targets_of(outcomes, teacher[..., :8]), mask, outcomes, variant)
        targets = targets_of(outcomes, t)
        close(loss_of(s, targets, mask, outcomes, variant), wanted, rtol=1e-12, atol=1e-14)
        got = gradient(lambda x, o=outcomes, t=targets: loss_of(x, t, mask, o, variant), s)
        assert got.isfinite().all() and (got[..., ~real] == 0).all() and (got[..., real] != 0).any()


@pytest.mark.parametrize("outcomes", OUTCOMES)
def test_gradients_are_those_of_the_values(outcomes):
    """CSD is not among these: its weights are held still, see the tests of its own."""
    student, teacher, mask = pair(B=1, T=3, V=6)
    targets = targets_of(outcomes, teacher, k=3)
    student.requires_grad_()
    for variant in VARIANTS:
        if not variant.startswith("csd"):
            assert torch.autograd.gradcheck(
                lambda x, v=variant: loss_of(x, targets, mask, outcomes, v, temperature=1.7), student
            ), variant
    # of both, and not behind a softmax
    sides = [x[0, 0].log_softmax(-1).detach().requires_grad_() for x in (student, teacher)]
    assert all(
        torch.autograd.gradcheck(DIVERGENCES[name], sides) for name in ("forward_kl", "reverse_kl", "skewed_kl", "jsd")
    )


def test_an_empty_rest_has_a_floor_where_a_divergence_would_be_infinite():
    student, teacher, mask = pair()
    ids, top, rest = top_k_targets(teacher, 4)
    empty = ids, top.log_softmax(-1), torch.full_like(rest, -INF)
    q, p = tail_outcomes(student, *empty, mask)
    assert (reverse_kl(q, p)[mask] == INF).all()
    q, p = tail_outcomes(student, *empty, mask, rest_floor=losses.REST_FLOOR)
    close(p[mask].exp()[:, -1], torch.full((8,), losses.REST_FLOOR).double(), rtol=2 * losses.REST_FLOOR, atol=0)
    close(p.logsumexp(-1), torch.zeros(2, 5).double(), rtol=0, atol=1e-12)
    for variant in VARIANTS:
        value = loss_of(student, empty, mask, "tail", variant)
        got = gradient(lambda x, v=variant: loss_of(x, empty, mask, "tail", v), student)
        assert value.isfinite() and value > 0 and got.isfinite().all(), variant
    full = top_k_targets(teacher, 11)  # nothing is outside: there is no rest to lift
    assert (tail_outcomes(student, *full, mask, rest_floor=losses.REST_FLOOR)[1][..., -1] == -INF)[mask].all()
    close(
        tail_outcomes(student, ids, top, rest, mask, rest_floor=losses.REST_FLOOR),
        tail_outcomes(student, ids, top, rest, mask),
        rtol=0,
        atol=0,
    )


def test_renormalised_outcomes_are_distributions_on_the_support():
    student, teacher, mask = pair()
    for build in (losses.renormalised_outcomes, losses.gemma_outcomes):
        for side in build(student, *top_k_targets(teacher, 4), mask):
            close(side.logsumexp(-1), torch.zeros(2, 5).double(), rtol=0, atol=1e-12)
    nothing = top_k_targets(teacher, 4)
    nothing[1][~mask] = -INF
    # rows that do not count are uniform
    assert all(side.isfinite().all() for side in losses.renormalised_outcomes(student, *nothing, mask))
    nothing[1][0, 0] = -INF
    # a counted row without a support is not hidden
    assert distillation_loss(student, nothing, mask, outcomes="renormalise").isnan()


def test_temperature_softens_both_sides_and_is_squared_once():
    student, teacher, mask = pair()
    for name in DIVERGENCES:
        dense = distillation_loss(student, (teacher,), mask, outcomes="dense", divergence=name, temperature=2.5)
        by_hand = DIVERGENCES[name](*dense_outcomes(student / 2.5, teacher / 2.5, mask))
        close(dense, 6.25 * losses.counted_mean(by_hand, mask, None))
        stored = top_k_targets(teacher / 2.5, 11)
        close(distillation_loss(student, stored, mask, divergence=name, temperature=2.5), dense)
    hot = gradient(lambda x: distillation_loss(x, (teacher,), mask, outcomes="dense", temperature=1e3), student)
    cold = gradient(lambda x: distillation_loss(x, (teacher,), mask, outcomes="dense", temperature=1e4), student)
    close(hot, cold, rtol=0.02, atol=1e-3)  # the gradient keeps its scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_logits_are_calculated_in_float32(variant):
    student, teacher, mask = pair(V=97)
    s, t = student.bfloat16(), teacher.bfloat16()
    for outcomes in OUTCOMES:
        wanted = loss_of(s.float(), targets_of(outcomes, t.float(), 16), mask, outcomes, variant)
        with torch.autocast("cpu", torch.bfloat16):
            got = loss_of(s, targets_of(outcomes, t, 16), mask, outcomes, variant)
        assert got.dtype == torch.float32
        close(got, wanted, rtol=0, atol=0)


# --- sampled targets -----------------------------------------------------------------------------------------------


def test_sampled_targets_are_counts_over_k():
    _, teacher, _ = pair()
    ids, logp, rest = sampled_targets(teacher, 50, torch.Generator().manual_seed(3))
    assert ids.shape == logp.shape == (2, 5, 50) and (rest == -INF).all()
    counts = (logp.exp() * 50).round()
    close(logp.exp() * 50, counts, rtol=0, atol=1e-9)
    close(counts.sum(-1), torch.full((2, 5), 50.0).double())
    assert (logp[..., :-1] >= logp[..., 1:]).all() and (ids[logp == -INF] == 0).all()
    for row_ids, row in zip(ids.view(-1, 50), logp.view(-1, 50), strict=True):
        drawn = row_ids[row != -INF].tolist()
        assert len(set(drawn)) == len(drawn) and 1 <= len(drawn) <= 11
    close(sampled_targets(teacher, 50, torch.Generator().manual_seed(3)), (ids, logp, rest), rtol=0, atol=0)
    excluded = teacher.index_fill(-1, torch.tensor([0, 4]), -INF)
    ids, logp, _ = sampled_targets(excluded, 200, torch.Generator().manual_seed(3))
    assert not torch.isin(ids[logp != -INF], torch.tensor([0, 4])).any()


def test_the_gradient_with_sampled_targets_is_on_average_that_of_the_dense_kl():
    """4,000 positions of one teacher: the mean over draws of k = 8. Renormalising the 8 most likely ids instead is far
    off.
    """
    student, teacher, N = 2 * waves(1, 1, 30, step=0.37), 1.5 * waves(1, 1, 30, step=1.13), 4000
    mask = torch.ones(1, N, dtype=torch.bool)
    drawn = sampled_targets(teacher.expand(1, N, 30), 8, torch.Generator().manual_seed(0))
    wanted = student.softmax(-1) - teacher.softmax(-1)
    for outcomes in ("tail", "gemma"):
        got = gradient(lambda x, o=outcomes: distillation_loss(x.expand(1, N, 30), drawn, mask, outcomes=o), student)
        # four standard deviations of the rarest-to-commonest bound
        close(got, wanted, rtol=0, atol=5 * (0.25 / 8 / N) ** 0.5 * 0.8)
    top = top_k_targets(teacher, 8)
    biased = gradient(lambda x: distillation_loss(x, top, mask[:, :1], outcomes="gemma"), student)
    assert (biased - wanted).abs().max() > 0.05


# --- chunks ------------------------------------------------------------------------------------------------------


def test_chunks_of_rows_add_up_in_value_and_gradient():
    student, teacher, _ = pair()
    s, t, head = student.flatten(0, 1), teacher.flatten(0, 1), waves(7, 11, step=0.9)

    def sums(hidden, logits):
        mask = torch.ones(len(hidden), dtype=torch.bool)
        return torch.stack(
            [
                distillation_loss(hidden @ weight.T, (logits,), mask, 1, outcomes="dense", divergence=name)
                for name in ("jsd", "csd")
            ]
        )

    got = {}
    for chunk in (1, 3, 10, 64):
        hidden, weight = s.clone().requires_grad_(), (head.T @ head).requires_grad_()
        total = losses.in_row_chunks(sums, (hidden, t), chunk)
        got[chunk] = total.detach(), *torch.autograd.grad(total.sum(), (hidden, weight))
        close(got[chunk], got[1])
    assert losses.in_row_chunks(lambda x: x.sum(), (s[:0],), 4) == 0
    with pytest.raises(ConfigError, match="chunk=0"):
        losses.in_row_chunks(sums, (s, t), 0)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_options_out_of_range_and_unknown_names_are_refused():
    student, teacher, mask = pair()
    kept = top_k_targets(teacher, 4)
    bad = {
        "skew=1": {"divergence": "skewed_kl", "skew": 1},
        "jsd_beta=1.5": {"divergence": "jsd", "jsd_beta": 1.5},
        "csd_weights='st'": {"divergence": "csd", "csd_weights": "st"},
        "csd_temperature=0": {"divergence": "csd", "csd_temperature": 0},
        "temperature=0": {"temperature": 0},
        "divergence='kl'": {"divergence": "kl"},
        "outcomes='topk'": {"outcomes": "topk"},
        "beta: no divergence": {"beta": 0.5},
    }
    for message, options in bad.items():
        with pytest.raises(ConfigError, match=message):
            distillation_loss(student, kept, mask, **options)
    with pytest.raises(ConfigError, match="k=0"):
        sampled_targets(teacher, 0)
    for build, name in itertools.product(
        (tail_outcomes, losses.renormalised_outcomes, losses.gemma_outcomes),
        ("top_ids", "top_logp", "rest_logp", "mask"),
    ):
        arguments = dict(zip(("top_ids", "top_logp", "rest_logp", "mask"), (*kept, mask), strict=True))
        with pytest.raises(DataError, match=f"{name}: expected shape"):
            build(student, **arguments | {name: arguments[name][:1, :, ..., None]})
    # the others' options are no error
    assert losses.choose_divergence("tvd", skew=0.1, jsd_beta=0.5)(*torch.zeros(2, 1)) == 0
