"""Distillation losses: functions of tensors. Dims: B batch, T tokens, V vocabulary, M entries kept of the teacher's
distribution.

Everything is calculated in float32 at least, also under autocast: a bf16 softmax over a large vocabulary is noise near
convergence. A loss has two halves. The first says which outcomes are compared (`OUTCOMES`: for instance the M stored
ids and one bucket for the rest, so that every divergence is a true one) and gives log-probabilities of student and
teacher; the second is a divergence of those two (`DIVERGENCES`). `distillation_loss` joins them. All logarithms are
natural.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xlstm_hybrid.errors import ConfigError, DataError

IGNORE = -100
NEVER = float("-inf")  # log-probability of an outcome that cannot happen
REST_FLOOR = 1e-6  # least teacher mass of the rest, for the divergences that are infinite at 0


# --- what is counted ---------------------------------------------------------------------------------------------


def shift(logits, labels):
    """`(logits [B, T-1, V], labels [B, T-1])`: the logits at t belong to the label at t + 1. Said here only."""
    return logits[:, :-1], labels[:, 1:]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expect_shape(name, x, shape):
    if x.shape != shape:
        raise DataError(
            f"{name}: expected shape {list(shape)}, got {list(x.shape)}; logits, targets and mask are aligned by one `shift`"
        )


def counted_logp(logits, mask):
    """Log-probabilities [B, T, V]; uniform where `mask` is False, whatever stands there, and without a gradient."""
    return torch.where(mask[..., None], at_least_float32(logits), 0.0).log_softmax(-1)


def counted_mean(values, mask, num_items):
    """Sum of `values` [B, T] where `mask`, over the counted tokens or `num_items`; 0 if nothing is counted."""
    items = mask.sum() if num_items is None else torch.as_tensor(num_items)
    return torch.where(mask, values, 0.0).sum() / items.clamp_min(1)


# --- losses ------------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels, num_items=None):
    """Negative log-likelihood of the labels, in nats per counted token; 0 with a zero gradient if none is counted.

    Args:
        logits: [B, T, V], aligned with the labels (see `shift`).
        labels: [B, T]; -100 where a token does not count. Logits there may hold anything, NaN too.
        num_items: divisor; the trainer passes the count of the whole optimizer step, so that accumulating changes
            nothing.
    Raises:
        DataError: labels of another shape.
    """
    expect_shape("labels", labels, logits.shape[:-1])
    mask = labels != IGNORE
    logits = torch.where(mask[..., None], at_least_float32(logits), 0.0)
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return counted_mean(nll.view(labels.shape), mask, num_items)


def sparse_kl(logits, top_ids, top_logp, rest_logp, mask, num_items=None):
    """Forward KL(teacher || student) on the teacher's stored ids and one bucket for the rest.

    >= 0; zero only if the stored probabilities and the rest mass agree; the dense KL when M = V.

    Args:
        logits: student, [B, T, V], any float dtype.
        top_ids, top_logp: teacher, [B, T, M], ids distinct; a short support is padded with id 0 at -inf.
        rest_logp: log of the teacher's mass that was not stored, [B, T].
        mask: [B, T], True where a token counts. Elsewhere logits and targets may hold anything, NaN too.
        num_items: divisor, as in `cross_entropy`.
    Returns:
        Scalar, nats per counted token. NaN in a counted place stays NaN.
    Raises:
        DataError: shapes that do not fit.
    """
    return counted_mean(forward_kl(*tail_outcomes(logits, top_ids, top_logp, rest_logp, mask)), mask, num_items)


def dense_kl(student_logits, teacher_logits, mask, num_items=None):
    """Forward KL(teacher || student) of logits [B, T, V]: the definition that `sparse_kl` with M = V equals."""
    return counted_mean(forward_kl(*dense_outcomes(student_logits, teacher_logits, mask)), mask, num_items)


def distillation_loss(
    logits, targets, mask, num_items=None, *, outcomes="tail", divergence="forward_kl", temperature=1.0, **options
):
    """Any divergence on any outcomes, times temperature squared, a factor that stands here and nowhere else.

    The factor keeps KL's gradient on its scale when both sides are softened (Hinton et al. 2015, section 2.1).

    Args:
        logits: student, [B, T, V], any float dtype, not divided by the temperature.
        targets: of `OUTCOMES[outcomes]` between `logits` and `mask`: `(top_ids, top_logp, rest_logp)`, calculated by
            the teacher at this temperature (`top_k_targets(teacher_logits / temperature, k)`), or `(teacher_logits,)`
            for "dense", which are divided here.
        mask, num_items: as in `sparse_kl`.
        outcomes, divergence: keys of `OUTCOMES` and `DIVERGENCES`.
        options: of the divergence: `skew`, `jsd_beta`, `csd_weights`, `csd_temperature`; the others ignore what is not
            theirs.
    Returns:
        Scalar, nats per counted token (TVD: probability; CSD: squared nats).
    Raises:
        ConfigError: a name or an option that does not exist, a temperature that is not positive. DataError: shapes that
            do not fit.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={temperature}: expected a finite number above 0")
    measure = choose_divergence(divergence, **options)
    if outcomes not in OUTCOMES:
        raise ConfigError(f"outcomes={outcomes!r} is not one of {sorted(OUTCOMES)}")
    floor = {"rest_floor": REST_FLOOR} if outcomes in FLOORED and divergence in INFINITE_AT_ZERO else {}
    if temperature != 1:
        logits = at_least_float32(logits) / temperature
        targets = tuple(at_least_float32(x) / temperature for x in targets) if outcomes == "dense" else targets
    pair = OUTCOMES[outcomes](logits, *targets, mask, **floor)
    return temperature**2 * counted_mean(measure(*pair), mask, num_items)


def in_row_chunks(loss, rows, chunk):
    """Sum of `loss(*part)` over parts of at most `chunk` of the `rows` [N, ...], made again in the backward.

    What a part makes on its way, [chunk, V] for instance, exists once and not N / chunk times. `loss` returns a scalar,
    or a tensor of sums.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}: expected at least 1 row")
    parts = zip(*(x.split(chunk) for x in rows), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)


# --- outcomes: what is kept of a teacher, and the student's view of it -------------------------------------------


@torch.no_grad()
def top_k_targets(teacher_logits, k):
    """The teacher's M = min(k, V) most likely ids.

    Returns:
        top_ids, top_logp: [..., M], most likely first; float32 at least.
        rest_logp: [...], log of the mass outside, by logsumexp over the ids outside (1 - sum would cancel); -inf if M =
            V.
    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"k={k}: expected at least 1 teacher token per position")
    logp = at_least_float32(teacher_logits).log_softmax(-1)
    top_logp, top_ids = logp.topk(min(k, logp.shape[-1]), -1)
    return top_ids, top_logp, logp.scatter(-1, top_ids, NEVER).logsumexp(-1)


@torch.no_grad()
def sampled_targets(teacher_logits, k, generator=None):
    """k draws with replacement from the teacher, as counts / k, whose mean is the teacher's distribution.

    Returns:
        top_ids, top_logp: [..., k], most frequent first; fewer than k distinct ids are padded with id 0 at -inf.
        rest_logp: [...], -inf: the draws stand for the whole distribution, so that the cross-entropy with them is
            unbiased.
    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"k={k}: expected at least 1 draw per position")
    p = at_least_float32(teacher_logits).softmax(-1)
    draws = torch.multinomial(p.flatten(0, -2), k, replacement=True, generator=generator).sort(-1).values  # [N, k]
    new = torch.ones_like(draws, dtype=torch.bool)
    new[:, 1:] = draws[:, 1:] != draws[:, :-1]
    slot = new.cumsum(-1) - 1  # equal draws share a slot
    ids = torch.zeros_like(draws).scatter(-1, slot, draws)
    counts = torch.zeros_like(draws).scatter_add(-1, slot, torch.ones_like(draws))
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    shape = (*teacher_logits.shape[:-1], k)
    top_logp = (counts.to(p.dtype) / k).log().view(shape)
    return ids.gather(-1, order).view(shape), top_logp, torch.full_like(top_logp[..., 0], NEVER)


def expect_targets(logits, top_ids, top_logp, rest_logp, mask):
    expect_shape("top_logp", top_logp, (*logits.shape[:-1], top_logp.shape[-1]))
    expect_shape("top_ids", top_ids, top_logp.shape)
    expect_shape("rest_logp", rest_logp, logits.shape[:-1])
    expect_shape("mask", mask, logits.shape[:-1])


def tail_outcomes(logits, top_ids, top_logp, rest_logp, mask, *, rest_floor=0.0):
    """Log-probabilities `(student, teacher)` of M + 1 outcomes, [B, T, M+1] each: the stored ids, and last all that
    were not stored.

    Each sums to one. A padding entry is -inf on both sides and its id 0 belongs to the rest, unless it is stored as
    well. Where the student has a rest, the teacher's is at least `rest_floor`, and its other outcomes make room for
    that.
    """
    expect_targets(logits, top_ids, top_logp, rest_logp, mask)
    logq, V = counted_logp(logits, mask), logits.shape[-1]
    stored = mask[..., None] & (top_logp != NEVER)
    q = torch.where(stored, logq.gather(-1, torch.where(stored, top_ids, 0)), NEVER)
    # column V takes the padding entries
    taken = torch.zeros(*mask.shape, V + 1, dtype=torch.bool, device=logits.device)
    outside = logq.masked_fill(taken.scatter(-1, torch.where(stored, top_ids, V), True)[..., :V], NEVER)
    empty = (outside == NEVER).all(-1, keepdim=True)  # logsumexp of nothing has a NaN gradient
    q_rest = torch.where(empty, NEVER, torch.where(empty, 0.0, outside).logsumexp(-1, keepdim=True))
    p = torch.where(stored, top_logp.to(logq.dtype), NEVER)
    # a row that is not counted: all mass in the rest
    p_rest = torch.where(mask, rest_logp.to(logq.dtype), 0.0)[..., None]
    p = torch.cat([p, p_rest], -1)
    if rest_floor > 0:
        raised = torch.cat([p[..., :-1], torch.full_like(p_rest, math.log(rest_floor))], -1).log_softmax(-1)
        p = torch.where(~empty & (p_rest < math.log(rest_floor)), raised, p)
    return torch.cat([q, q_rest], -1), p


def gemma_outcomes(logits, top_ids, top_logp, rest_logp, mask, *, rest_floor=0.0):
    """`tail_outcomes` with the teacher renormalised on its support, the student not (Gemma 3 report, 2025).

    The teacher's rest is 0, whatever `rest_logp` says, so that the student learns to leave the rest empty.
    """
    expect_targets(logits, top_ids, top_logp, rest_logp, mask)
    top_logp = torch.where(mask[..., None], at_least_float32(top_logp), 0.0).log_softmax(-1)
    return tail_outcomes(logits, top_ids, top_logp, torch.full_like(rest_logp, NEVER), mask, rest_floor=rest_floor)


def renormalised_outcomes(logits, top_ids, top_logp, rest_logp, mask):
    """Log-probabilities `(student, teacher)` [B, T, M], renormalised on the stored ids; -inf for padding entries.

    Says nothing about the student's mass outside the support. A counted row without a stored id is NaN.
    """
    expect_targets(logits, top_ids, top_logp, rest_logp, mask)
    logits, counted = torch.where(mask[..., None], at_least_float32(logits), 0.0), mask[..., None]
    stored = ~counted | (top_logp != NEVER)  # a row that is not counted: uniform on both sides
    q = torch.where(stored, logits.gather(-1, torch.where(stored & counted, top_ids, 0)), NEVER)
    p = torch.where(stored, torch.where(counted, top_logp.to(q.dtype), 0.0), NEVER)
    return q.log_softmax(-1), p.log_softmax(-1)


def dense_outcomes(logits, teacher_logits, mask):
    """Log-probabilities `(student, teacher)` of every token, [B, T, V]: the outcomes of a teacher that is at hand."""
    expect_shape("teacher_logits", teacher_logits, logits.shape)
    expect_shape("mask", mask, logits.shape[:-1])
    return counted_logp(logits, mask), counted_logp(teacher_logits, mask)


# name: function(logits, *targets, mask) -> log-probabilities (student, teacher)
OUTCOMES = {
    "tail": tail_outcomes,
    "renormalise": renormalised_outcomes,
    "gemma": gemma_outcomes,
    "dense": dense_outcomes,
}
FLOORED = {"tail", "gemma"}  # those with a rest bucket, which may be empty


# --- divergences of log-probabilities [B, T, outcomes], per position ---------------------------------------------
#
# An outcome that both sides exclude (-inf) contributes 0, to the value and to the gradient: 0 * inf and inf - inf,
# which are NaN, are masked where no gradient passes them.


class TimesLogRatio(torch.autograd.Function):
    """Sum over outcomes of p (log p - log q), 0 for p = 0. Stores its two inputs, a third of autograd's memory."""

    @staticmethod
    def forward(ctx, logp, logq):
        ctx.save_for_backward(logp, logq)
        return (logp - logq).mul_(logp.exp()).masked_fill_(logp == NEVER, 0.0).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logp, logq = ctx.saved_tensors
        p = logp.exp().mul_(grad[..., None])
        if not ctx.needs_input_grad[0]:
            return None, p.neg_()
        to_p = (logp - logq).add_(1).mul_(p).masked_fill_(logp == NEVER, 0.0)
        return to_p, p.neg_() if ctx.needs_input_grad[1] else None


class LogMixture(torch.autograd.Function):
    """log(share * p + (1 - share) * q), 0 < share < 1; -inf where both are. Stores its inputs and its result."""

    @staticmethod
    def forward(ctx, logp, logq, share):
        mixture = torch.logaddexp(logp + math.log(share), logq + math.log1p(-share))
        ctx.save_for_backward(logp, logq, mixture)
        ctx.shares = math.log(share), math.log1p(-share)
        return mixture

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *sides, mixture = ctx.saved_tensors
        gradients = [None, None, None]
        for n, (side, share) in enumerate(zip(sides, ctx.shares, strict=True)):
            if ctx.needs_input_grad[n]:
                gradients[n] = (side - mixture).add_(share).exp_().mul_(grad).masked_fill_(side == NEVER, 0.0)
        return tuple(gradients)


times_log_ratio, log_mixture = TimesLogRatio.apply, LogMixture.apply


def forward_kl(student_logp, teacher_logp):
    """KL(teacher || student), [B, T]; an outcome that the teacher excludes contributes 0, to the gradient too."""
    return times_log_ratio(teacher_logp, student_logp)


def reverse_kl(student_logp, teacher_logp):
    """KL(student || teacher), [B, T]; infinite where the teacher excludes what the student does not: see `rest_floor`."""
    return times_log_ratio(student_logp, teacher_logp)


def skewed_kl(student_logp, teacher_logp, *, skew=0.1):
    """KL(teacher || skew teacher + (1 - skew) student), [B, T]; Ko et al. 2024 (DistiLLM), equation 3."""
    if not 0 <= skew < 1:
        raise ConfigError(f"skew={skew}: expected a share of at least 0 and below 1")
    mixture = log_mixture(teacher_logp, student_logp, skew) if skew else student_logp
    return times_log_ratio(teacher_logp, mixture)


def jsd(student_logp, teacher_logp, *, jsd_beta=0.5):
    """GKD's generalised Jensen-Shannon divergence, [B, T]; Agarwal et al. 2024, equation 1. With M = jsd_beta T + (1 -
    jsd_beta) S it is

        jsd_beta KL(T || M) + (1 - jsd_beta) KL(S || M).

    At the ends this is 0 for any pair. As in GKD, they stand for the limits of JSD / jsd_beta and of JSD / (1 -
    jsd_beta): 0 is `forward_kl`, 1 is `reverse_kl`. So the scale jumps there: a jsd_beta near an end is about jsd_beta,
    or 1 - jsd_beta, times that KL.
    """
    if not 0 <= jsd_beta <= 1:
        raise ConfigError(f"jsd_beta={jsd_beta}: expected a share between 0 and 1")
    if jsd_beta in (0, 1):
        return reverse_kl(student_logp, teacher_logp) if jsd_beta else forward_kl(student_logp, teacher_logp)
    mixture = log_mixture(teacher_logp, student_logp, jsd_beta)
    return jsd_beta * times_log_ratio(teacher_logp, mixture) + (1 - jsd_beta) * times_log_ratio(student_logp, mixture)


def tvd(student_logp, teacher_logp):
    """Total variation distance, half the sum of |teacher - student| in probability, [B, T], between 0 and 1."""
    return (teacher_logp.exp() - student_logp.exp()).abs().sum(-1) / 2


CSD_WEIGHTS = ("ss", "us", "ts", "tt", "uu")  # of the two sums: s student, t teacher, u uniform


def csd(student_logp, teacher_logp, *, csd_weights="us", csd_temperature=1.5):
    """Concrete score distillation, [B, T]; Kim et al. 2025. With d = log student - log teacher and weights w1, w2 that
    carry no gradient:

        1/4 sum_x sum_y w1(y) w2(x) (d_x - d_y)^2  =  1/4 (E_w2[d^2] - 2 E_w1[d] E_w2[d] + E_w1[d^2])

    in O(outcomes). Equal weights w give Var_w(d) / 2. A shift of the logits changes nothing, so log-probabilities do as
    well as logits.

    The scale is half of the paper's equation, that of its published code. With it, "ss" at csd_temperature 1 **is**
    reverse KL: not in value, but its gradient is s_i (d_i - E_s[d]), exactly that of KL(student || teacher). New
    objectives are only the other temperatures and weights.

    Args:
        csd_weights: of w1 and w2. "ss" seeks modes, "us" is balanced, "ts" covers modes; "tt", "uu".
        csd_temperature: of the student's weights alone, softmax(student / csd_temperature).
    Outcomes that the teacher excludes are left out; one that only the student excludes makes the result infinite or
    NaN.
    """
    if csd_weights not in CSD_WEIGHTS:
        raise ConfigError(f"csd_weights={csd_weights!r} is not one of {CSD_WEIGHTS}")
    if not 0 < csd_temperature < math.inf:
        raise ConfigError(f"csd_temperature={csd_temperature}: expected a finite number above 0")
    excluded = teacher_logp == NEVER
    d = (student_logp - teacher_logp).masked_fill(excluded, 0.0)
    scores = {
        "s": lambda: student_logp.detach() / csd_temperature,
        "t": lambda: teacher_logp.detach(),
        "u": lambda: torch.zeros_like(d),
    }
    weights = {name: scores[name]().masked_fill(excluded, NEVER).softmax(-1) for name in set(csd_weights)}
    return concrete_score(d, *(weights[name] for name in csd_weights))


class ConcreteScore(torch.autograd.Function):
    """1/4 sum_x sum_y w1(y) w2(x) (d_x - d_y)^2, [B, T]; weights sum to one, without gradient. Stores its gradient."""

    @staticmethod
    def forward(ctx, d, w1, w2):
        centred = d - (w2 * d).sum(-1, keepdim=True)  # or the squares cancel; then E_w2[d] is 0
        mean = (w1 * centred).sum(-1, keepdim=True)
        ctx.save_for_backward(((centred - mean).mul_(w2) + centred * w1).mul_(0.5))
        return centred.square_().mul_(w1 + w2).sum(-1) / 4

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[..., None], None, None


concrete_score = ConcreteScore.apply

# name: function(student_logp, teacher_logp, **options) -> [B, T]
DIVERGENCES = {function.__name__: function for function in (forward_kl, reverse_kl, skewed_kl, jsd, tvd, csd)}
# where the teacher excludes an outcome (jsd at its end, csd by leaving it out)
INFINITE_AT_ZERO = {"reverse_kl", "jsd", "csd"}


def choose_divergence(name, **options):
    """`function(student_logp, teacher_logp) -> [B, T]`, with those of `options` that belong to it.

    Raises:
        ConfigError: no such divergence, an option that none has, or a value out of range.
    """
    if name not in DIVERGENCES:
        raise ConfigError(f"divergence={name!r} is not one of {sorted(DIVERGENCES)}")
    accepts = {key: set(list(inspect.signature(function).parameters)[2:]) for key, function in DIVERGENCES.items()}
    known = set().union(*accepts.values())
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{unknown[0]}: no divergence has this option; expected some of {sorted(known)}")
    own = {key: value for key, value in options.items() if key in accepts[name]}
    DIVERGENCES[name](*torch.zeros(2, 1), **own)  # a value out of range is refused here and not at the first step
    return lambda student_logp, teacher_logp: DIVERGENCES[name](student_logp, teacher_logp, **own)
