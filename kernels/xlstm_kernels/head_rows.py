"""From a chunk's logits to the terms of `head_loss` and the logits' gradient. Dims: R rows, V vocabulary, M teacher entries kept.

Outcomes o are the M stored ids and the rest, every id that is not stored. With P the teacher's and Q the student's probability of an outcome,
q the student's of an id, z the logits (Hauzenberger et al. 2026, and METHOD 1.3 for the bucket):

    ce = -log q_label      forward_kl = sum_o P_o (log P_o - log Q_o)      reverse_kl = sum_o Q_o g_o,  g_o = log Q_o - log P_o
    d_o = ce_weight Q_o + forward_weight (Q_o sum P - P_o) + reverse_weight Q_o (g_o - reverse_kl)
    dz_y = d_y for a stored id y,  d_rest softmax(z over the rest)_y for any other,  and -ce_weight at the label

so a row needs one exponential per logit, taken over the rest alone: the stored ids are lifted out first and put back as M numbers, and the
student's rest mass is a sum over the rest, never a difference, however small it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.reference import finite

NEVER = float("-inf")  # log-probability of an outcome that cannot happen
# Reverse KL is infinite where the teacher's rest mass is 0, which is what rounding makes of a small one. exp(-30) = 1e-13 is far below what a
# float32 softmax resolves (6e-8), so a mass that was measured stays as it is, and what the student has there costs 30 nats at most.
REST_FLOOR = -30.0
BLOCK = 2**19  # logits that the passes over a row take at once on a CPU: they stay in the cache


class Rule(NamedTuple):
    """How logits become outcomes. support: both sides are renormalised on the stored ids (outcomes="renormalise")."""

    support: bool
    logit_scale: float
    softcap: float | None


class Targets(NamedTuple):
    """What R rows are held to.

    label: [R], 0 where cross-entropy does not count; ids, logp: [R, M], logp -inf where an entry is padding; rest: [R], -inf where there is none
    ce, forward_kl, reverse_kl: [R], weight of the row's term in the loss, 0 where it does not count
    """

    label: Tensor
    ids: Tensor
    logp: Tensor
    rest: Tensor
    ce: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor


class Terms(NamedTuple):
    """Values per row [R], for rows that do not count too. hit: the teacher's most likely stored id is the student's."""

    ce: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    hit: Tensor


def rows_step(logits, targets, rule, gradient):
    """Terms of R rows, and the loss's gradient of u, which the logits' memory is used for: what stood there is lost in any case.

    Args:
        logits: u, [R, V], float32 or float64, overwritten.
        targets: `Targets`; the ids of a row that are no padding differ.
        gradient: dtype of the gradient, None if there is to be none.
    Returns:
        `Terms`, and the gradient [R, V] or None.
    """
    slope = bend(logits, rule, gradient is not None)
    stored = targets.logp != NEVER
    some = stored.any(1, keepdim=True)
    entry = torch.where(stored, torch.arange(stored.shape[1], device=stored.device), stored.int().argmax(1, keepdim=True))
    ids, label = targets.ids.gather(1, entry), targets.label[:, None]  # a padding entry stands for the first stored one: no id is hit by chance
    z, z_label = logits.gather(1, ids), logits.gather(1, label)[:, 0]
    logits.scatter_(1, ids, torch.where(some, NEVER, z))
    frame, total = exponentials(logits)
    z = torch.where(stored, z, NEVER)
    best = torch.maximum(z.amax(1), frame)  # subtracted first: what is left are small numbers, rounded as such
    outcomes = torch.cat([z - best[:, None], (frame - best + total.log())[:, None]], 1)  # [R, M + 1]
    norm = outcomes.logsumexp(1)
    terms, d = compare(outcomes, norm, targets, rule)
    top = z.gather(1, targets.logp.argmax(1, keepdim=True))[:, 0]
    rivals = (z >= top[:, None]).sum(1) + ((total != 0) & (frame >= top))  # the id itself is one
    terms = Terms(norm - (z_label - best), *terms, (rivals == 1) & some[:, 0])
    if gradient is None:
        return terms, None
    logits.mul_(torch.where(total != 0, d[:, -1] / total, 0.0)[:, None])
    logits.scatter_(1, ids, torch.where(some, d.gather(1, entry), logits.gather(1, ids)))
    logits.scatter_add_(1, label, -targets.ce[:, None])
    return terms, (logits if slope is None else logits.mul_(slope)).to(gradient)


def bend(logits, rule, differentiate):
    """From u to z in place; dz/du where it is needed and not 1."""
    if rule.softcap is None:
        return None if rule.logit_scale == 1 else (logits.mul_(rule.logit_scale), rule.logit_scale)[1]
    logits.mul_(rule.logit_scale / rule.softcap).tanh_()
    slope = logits.square().neg_().add_(1).mul_(rule.logit_scale) if differentiate else None
    logits.mul_(rule.softcap)
    return slope


def exponentials(logits):
    """exp(logits - frame) in place; frame [R], the largest of a row (0 if a row is empty), and the sum [R] of what is written."""
    frame, total = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for part, top, s in zip(*(x.split(rows) for x in (logits, frame, total)), strict=True):
        torch.amax(part, 1, out=top)
        top.masked_fill_(top == NEVER, 0.0)
        torch.sum(part.sub_(top[:, None]).exp_(), 1, out=s)
    return frame, total


def compare(outcomes, norm, targets, rule):
    """Forward and reverse KL [R], and the loss's derivative d [R, M + 1] by each outcome's logit, without the label's share.

    outcomes: logits of the stored ids, -inf for padding, and of the rest as one, [R, M + 1]; norm: their logsumexp [R].
    """
    share = (outcomes - norm[:, None]).exp()
    teacher = torch.cat([targets.logp, targets.rest[:, None]], 1)
    student = outcomes - norm[:, None]
    if rule.support:
        student = torch.cat([outcomes[:, :-1] - finite(outcomes[:, :-1].logsumexp(1, keepdim=True)), torch.full_like(norm, NEVER)[:, None]], 1)
    P, Q = teacher.exp(), student.exp()
    forward_kl = torch.where(P != 0, P * (teacher - student), 0.0).sum(1)
    teacher[:, -1].clamp_min_(REST_FLOOR)
    g = torch.where(Q != 0, student - teacher, 0.0)
    reverse_kl = (Q * g).sum(1)
    d = targets.ce[:, None] * share
    d += targets.forward_kl[:, None] * (Q * P.sum(1, keepdim=True) - P)
    d += targets.reverse_kl[:, None] * (Q * (g - reverse_kl[:, None]))
    return (forward_kl, reverse_kl), d


def rows_dense(logits, t, rule):
    """`Terms` of R rows by their definition, for autograd; logits u [R, V] are left as they are."""
    logits = logits * rule.logit_scale
    logits = logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)
    logq, stored, V = logits.log_softmax(1), t.logp != NEVER, logits.shape[1]
    outside = torch.ones(len(logits), V + 1, dtype=torch.bool, device=logits.device)  # column V takes the padding entries
    outside = outside.scatter(1, torch.where(stored, t.ids, V), False)[:, :V]
    q = torch.where(stored, logq.gather(1, t.ids), NEVER)
    some, empty = stored.any(1, keepdim=True), ~outside.any(1, keepdim=True)  # logsumexp of nothing has a NaN gradient
    if rule.support:
        q = torch.where(stored, q - torch.where(some, q, 0.0).logsumexp(1, keepdim=True), NEVER)
        empty = torch.ones_like(empty)
    q_rest = torch.where(empty, NEVER, logq.masked_fill(~outside & ~empty, NEVER).logsumexp(1, keepdim=True))
    q, p = torch.cat([q, q_rest], 1), torch.cat([t.logp, t.rest[:, None]], 1)
    floored = torch.cat([t.logp, t.rest[:, None].clamp_min(REST_FLOOR)], 1)
    forward_kl = divergence(p, q)
    reverse_kl = divergence(q, floored)
    best = logits.topk(min(2, V), 1)
    hit = (best.indices[:, 0] == t.ids.gather(1, t.logp.argmax(1, keepdim=True))[:, 0]) & some[:, 0]
    hit &= (best.values[:, 0] > best.values[:, -1]) | (V == 1)
    return Terms(-logq.gather(1, t.label[:, None])[:, 0], forward_kl, reverse_kl, hit)


def divergence(logp, logq):
    """KL(p || q) over the last dim; an outcome that p excludes contributes 0, to the gradient too."""
    possible = logp != NEVER
    p, q = torch.where(possible, logp, 0.0), torch.where(possible, logq, 0.0)  # before the product: 0 * inf is NaN
    return torch.where(possible, p.exp() * (p - q), 0.0).sum(-1)
