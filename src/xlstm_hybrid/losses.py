"""Distillation losses: functions of tensors. Dims: B batch, T tokens, V vocabulary, M entries kept of the teacher's distribution.

Everything is calculated in float32 at least, also under autocast: a bf16 softmax over a large vocabulary is noise near convergence.
A loss has two halves. The first says which outcomes are compared (`tail_outcomes`: the M stored ids and one bucket for the rest, so that
every divergence is a true one, METHOD 1.3) and gives log-probabilities of student and teacher; the second is a divergence of those two.
"""
import torch
import torch.nn.functional as F

from xlstm_hybrid.errors import ConfigError, DataError

IGNORE = -100
NEVER = float("-inf")  # log-probability of an outcome that cannot happen


# --- what is counted ---------------------------------------------------------------------------------------------


def shift(logits, labels):
    """`(logits [B, T-1, V], labels [B, T-1])`: the logits at t belong to the label at t + 1. The one place where that is said."""
    return logits[:, :-1], labels[:, 1:]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expect(name, x, shape):
    if x.shape != shape:
        raise DataError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}; logits, targets and mask are aligned by one `shift`")


def counted_logp(logits, mask):
    """Log-probabilities [B, T, V]; uniform where `mask` is False, whatever stands there, and without a gradient."""
    return torch.where(mask[..., None], at_least_float32(logits), 0.0).log_softmax(-1)


def counted_mean(values, mask, num_items):
    """Sum of `values` [B, T] where `mask`, over the number of counted tokens or over `num_items`; 0 if nothing is counted."""
    items = mask.sum() if num_items is None else torch.as_tensor(num_items)
    return torch.where(mask, values, 0.0).sum() / items.clamp_min(1)


# --- losses ------------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels, num_items=None):
    """Negative log-likelihood of the labels, in nats per counted token; 0 with a zero gradient if none is counted.

    Args:
        logits: [B, T, V], aligned with the labels (see `shift`).
        labels: [B, T]; -100 where a token does not count. Logits there may hold anything, NaN too.
        num_items: divisor; the trainer passes the count of the whole optimizer step, so that accumulating changes nothing.
    Raises:
        DataError: labels of another shape.
    """
    expect("labels", labels, logits.shape[:-1])
    mask = labels != IGNORE
    logits = torch.where(mask[..., None], at_least_float32(logits), 0.0)
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none").view(labels.shape)
    return counted_mean(nll, mask, num_items)


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
    """Forward KL(teacher || student) over the whole vocabulary: the definition that `sparse_kl` with M = V equals. Logits are [B, T, V]."""
    expect("teacher_logits", teacher_logits, student_logits.shape)
    expect("mask", mask, student_logits.shape[:-1])
    return counted_mean(forward_kl(counted_logp(student_logits, mask), counted_logp(teacher_logits, mask)), mask, num_items)


# --- outcomes: what is kept of a teacher, and the student's view of it -------------------------------------------


@torch.no_grad()
def top_k_targets(teacher_logits, k):
    """The teacher's M = min(k, V) most likely ids.

    Returns:
        top_ids, top_logp: [..., M], most likely first; float32 at least.
        rest_logp: [...], log of the mass outside, by logsumexp over the ids outside (1 - sum would cancel); -inf if M = V.
    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"k={k}: expected at least 1 teacher token per position")
    logp = at_least_float32(teacher_logits).log_softmax(-1)
    top_logp, top_ids = logp.topk(min(k, logp.shape[-1]), -1)
    return top_ids, top_logp, logp.scatter(-1, top_ids, NEVER).logsumexp(-1)


def tail_outcomes(logits, top_ids, top_logp, rest_logp, mask):
    """Log-probabilities `(student, teacher)` of M + 1 outcomes, [B, T, M+1] each: the stored ids, and last all that were not stored.

    Each sums to one. A padding entry is -inf on both sides and its id 0 belongs to the rest, unless it is stored as well.
    """
    expect("top_logp", top_logp, (*logits.shape[:-1], top_logp.shape[-1]))
    for name, x, shape in ("top_ids", top_ids, top_logp.shape), ("rest_logp", rest_logp, logits.shape[:-1]), ("mask", mask, logits.shape[:-1]):
        expect(name, x, shape)
    logq, V = counted_logp(logits, mask), logits.shape[-1]
    stored = mask[..., None] & (top_logp != NEVER)
    q = torch.where(stored, logq.gather(-1, torch.where(stored, top_ids, 0)), NEVER)
    taken = torch.zeros(*mask.shape, V + 1, dtype=torch.bool, device=logits.device)  # column V takes the padding entries
    outside = logq.masked_fill(taken.scatter(-1, torch.where(stored, top_ids, V), True)[..., :V], NEVER)
    empty = (outside == NEVER).all(-1, keepdim=True)  # logsumexp of nothing has a NaN gradient
    q_rest = torch.where(empty, NEVER, torch.where(empty, 0.0, outside).logsumexp(-1, keepdim=True))
    p = torch.where(stored, top_logp.to(logq.dtype), NEVER)
    p_rest = torch.where(mask, rest_logp.to(logq.dtype), 0.0)[..., None]  # a row that is not counted: all mass in the rest
    return torch.cat([q, q_rest], -1), torch.cat([p, p_rest], -1)


# --- divergences of log-probabilities [B, T, outcomes], per position ---------------------------------------------


def forward_kl(student_logp, teacher_logp):
    """KL(teacher || student), [B, T]; an outcome that the teacher excludes contributes 0, to the gradient too."""
    possible = teacher_logp != NEVER
    p, q = torch.where(possible, teacher_logp, 0.0), torch.where(possible, student_logp, 0.0)  # before the product: 0 * inf is NaN
    return (p.exp() * (p - q)).sum(-1)
