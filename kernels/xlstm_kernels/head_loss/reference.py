"""What the head loss is: the tokens that count, what they are compared with, and the terms by their definition.

Dims: B batch, T tokens, V vocabulary, M teacher entries stored per token; N tokens that count, R of them in a chunk.
With h the hidden states:

    u = h W^T + b      z = softcap tanh(logit_scale u / softcap)      q = softmax(z)      loss = sum of weight * term

Outcomes o are the M stored ids and the rest, every id that is not stored: one bucket, Hauzenberger et al. 2026. With P
the teacher's and Q the student's probability of an outcome:

    ce = -log q_label      forward_kl = sum_o P_o (log P_o - log Q_o)      reverse_kl = sum_o Q_o g_o,  g_o = log Q_o -
                           log P_o
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.backends.numerics import finite

IGNORE = -100  # label of a token whose cross-entropy does not count
OUTCOMES = ("tail", "renormalise", "gemma")
NEVER = float("-inf")  # log-probability of an outcome that cannot happen
# Reverse KL is infinite where the teacher's rest mass is 0, which is what rounding makes of a small one. exp(-30) is
# far below what a float32 softmax resolves (6e-8), so a mass that was measured stays as it is, and what the student has
# there costs 30 nats at most.
REST_FLOOR = -30.0


class HeadLoss(NamedTuple):
    """The loss and its terms, which are not weighted, carry no gradient and are None where there is no such term."""

    loss: Tensor  # weighted sum, differentiable
    ce: Tensor  # nats per counted token
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    # share of the tokens whose KL counts where the teacher's most likely stored id is the student's, and no other
    agreement: Tensor | None
    items: int  # tokens that count in any term


class Rule(NamedTuple):
    """How logits become outcomes. support: both sides are renormalised on the stored ids (outcomes="renormalise")."""

    support: bool
    logit_scale: float
    softcap: float | None


class Targets(NamedTuple):
    """What R rows are compared with.

    label: [R], 0 where cross-entropy does not count
    ids, logp: [R, M], logp -inf where an entry is padding; rest: [R], -inf where there is none
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


class Task:
    """The tokens that count, as flat positions, and their targets. Whatever stands at other tokens is never read.

    place: [N] positions in [B T]; ce, kl: [N], True where the term counts
    weights: of ce, forward KL and reverse KL, [3], over their counts
    """

    def __init__(self, labels, teacher, mask, shift, weights, outcomes, num_items, dtype, every=False):
        label = following(labels, IGNORE) if shift else labels
        kl = label != IGNORE if mask is None else mask.clone()
        if shift:
            kl[:, -1:] = False
        if teacher is None:
            kl = torch.zeros_like(kl)
        label, kl = label.flatten(), kl.flatten()
        # `nonzero` waits for a GPU
        self.place = (
            torch.arange(len(label), device=label.device) if every else ((label != IGNORE) | kl).nonzero()[:, 0]
        )
        self.label, self.kl = label[self.place], kl[self.place]
        self.ce = self.label != IGNORE
        self.outcomes, self.dtype = outcomes, dtype
        self.teacher = None if teacher is None else [x if x is None else x.flatten(0, 1) for x in teacher]
        self.counts = [x.sum().clamp_min(1) for x in (self.ce, self.kl)]
        ce, kl = self.counts if num_items is None else [torch.as_tensor(num_items, device=labels.device)] * 2
        self.items = ce, kl, kl
        self.given = weights
        self.weights = [w / n.to(dtype) for w, n in zip(weights, self.items, strict=True)]

    def targets(self, begin, end, V, lift=1.0):
        """Targets of the counted rows begin..end, their weights times `lift`."""
        place, ce, kl = (x[begin:end] for x in (self.place, self.ce, self.kl))
        ids, logp, rest = self.entries(place, kl, V)
        weights = [torch.where(counts, lift * w, 0.0) for w, counts in zip(self.weights, (ce, kl, kl), strict=True)]
        return Targets(torch.where(ce, self.label[begin:end], 0), ids, logp, rest, *weights)

    def entries(self, place, kl, V):
        """The teacher's (ids, logp [R, M], rest [R]) at the positions `place`, all padding where KL does not count."""
        none = torch.full_like(place, NEVER, dtype=self.dtype)
        if self.teacher is None:
            return torch.zeros_like(place)[:, None], none[:, None], none
        ids, logp = (x[place] for x in self.teacher[:2])
        logp = torch.where(kl[:, None], logp.to(self.dtype), NEVER)
        ids = torch.where(logp == NEVER, 0, ids.long())
        if self.outcomes != "tail":
            return ids, logp - finite(logp.logsumexp(1, keepdim=True)), none
        everything = (logp != NEVER).sum(1) == V  # is stored: the rest is empty on both sides
        return ids, logp, torch.where(kl & ~everything, self.teacher[2][place].to(self.dtype), NEVER)

    def result(self, terms):
        """HeadLoss of the terms of all N rows."""
        values = [
            torch.where(counts, x, 0.0).sum() / n
            for x, counts, n in zip(terms, (self.ce, self.kl, self.kl), self.items, strict=False)
        ]
        loss = sum((w * x for w, x in zip(self.given, values, strict=True) if w), torch.zeros_like(values[0]))
        ce, forward_kl, reverse_kl = (x.detach() for x in values)
        if self.teacher is None:
            return HeadLoss(loss, ce, None, None, None, len(self.place))
        agreement = (terms.hit & self.kl).sum() / self.counts[1]
        reverse_kl = None if self.outcomes == "gemma" else reverse_kl
        return HeadLoss(loss, ce, forward_kl, reverse_kl, agreement, len(self.place))


def following(x, last):
    """x [B, T] one token earlier, `last` at the end."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], 1)


def dense(hidden, weight, bias, task, rule, rows):
    """The definition, by autograd: the logits of all counted tokens at once."""
    hidden, weight, bias = (x if x is None else x.to(task.dtype) for x in (hidden[task.place], weight, bias))
    return task.result(rows_dense(F.linear(hidden, weight, bias), task.targets(0, len(task.place), len(weight)), rule))


def rows_dense(logits, t, rule):
    """`Terms` of R rows by their definition, for autograd; logits u [R, V] are left as they are."""
    logits = logits * rule.logit_scale
    logits = logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)
    logq, stored, V = logits.log_softmax(1), t.logp != NEVER, logits.shape[1]
    # column V takes the padding entries
    outside = torch.ones(len(logits), V + 1, dtype=torch.bool, device=logits.device)
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
