"""The terms of a chunk's rows and the gradient of its logits, as torch operations in place. Dims: R rows, V vocabulary,
M teacher entries.

With the outcomes of `reference`, the derivative by an outcome's logit and by the logit of an id:

    d_o = ce_weight Q_o + forward_weight (Q_o sum P - P_o) + reverse_weight Q_o (g_o - reverse_kl)
    dz_y = d_y for a stored id y,  d_rest softmax(z over the rest)_y for any other,  and -ce_weight at the label

so a row needs one exponential per logit, taken over the rest alone: the stored ids are lifted out first and put back as
M numbers, and the student's rest mass is a sum over the rest, never a difference, however small it is.
"""

import torch

from xlstm_kernels.backends.numerics import finite
from xlstm_kernels.head_loss.reference import NEVER, REST_FLOOR, Terms

BLOCK = 2**19  # logits that the passes over a row take at once on a CPU: they stay in the cache


def rows_step(logits, targets, rule, gradient):
    """Terms of R rows, and the loss's gradient of u in the memory of the logits: what stood there is lost in any case.

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
    # a padding entry stands for the first stored one: no id is hit by chance
    first = stored.int().argmax(1, keepdim=True)
    entry = torch.where(stored, torch.arange(stored.shape[1], device=stored.device), first)
    ids, label = targets.ids.gather(1, entry), targets.label[:, None]
    z, z_label = logits.gather(1, ids), logits.gather(1, label)[:, 0]
    logits.scatter_(1, ids, torch.where(some, NEVER, z))
    frame, total = exponentials(logits)
    z = torch.where(stored, z, NEVER)
    best = torch.maximum(z.amax(1), frame)  # subtracted first: what is left are small numbers, rounded as such
    outcomes = torch.cat([z - best[:, None], (frame - best + total.log())[:, None]], 1)  # [R, M + 1]
    norm = outcomes.logsumexp(1)
    terms, d = divergences(outcomes, norm, targets, rule)
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
    """exp(logits - frame) in place; frame [R], the largest of a row (0 if it is empty), and the sum [R] of the row."""
    frame, total = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for part, top, s in zip(*(x.split(rows) for x in (logits, frame, total)), strict=True):
        torch.amax(part, 1, out=top)
        top.masked_fill_(top == NEVER, 0.0)
        torch.sum(part.sub_(top[:, None]).exp_(), 1, out=s)
    return frame, total


def divergences(outcomes, norm, targets, rule):
    """Forward and reverse KL [R], and the loss's derivative d [R, M + 1] by each outcome's logit, the label left out.

    outcomes: logits of the stored ids, -inf for padding, and of the rest as one, [R, M + 1]; norm: their logsumexp [R].
    """
    share = (outcomes - norm[:, None]).exp()
    teacher = torch.cat([targets.logp, targets.rest[:, None]], 1)
    student = outcomes - norm[:, None]
    if rule.support:
        z = outcomes[:, :-1]
        student = torch.cat([z - finite(z.logsumexp(1, keepdim=True)), torch.full_like(norm, NEVER)[:, None]], 1)
    P, Q = teacher.exp(), student.exp()
    forward_kl = torch.where(P != 0, P * (teacher - student), 0.0).sum(1)
    teacher[:, -1].clamp_min_(REST_FLOOR)
    g = torch.where(Q != 0, student - teacher, 0.0)
    reverse_kl = (Q * g).sum(1)
    d = targets.ce[:, None] * share
    d += targets.forward_kl[:, None] * (Q * P.sum(1, keepdim=True) - P)
    d += targets.reverse_kl[:, None] * (Q * (g - reverse_kl[:, None]))
    return (forward_kl, reverse_kl), d
