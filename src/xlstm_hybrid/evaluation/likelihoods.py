"""Log-likelihoods of continuations, where what several inputs begin with is read once: the shots of a few-shot task, the
question before its answers.

Inputs in lexicographic order are a tree of common beginnings. Where reading a beginning by itself saves more than it
costs, its cache is kept and copied for what goes on from it; logits are calculated where a continuation is scored.
Dims: B rows, T tokens, P scored positions, V vocabulary.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.model.cache import SlidingLayer, StateLayer
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.configuration import STEADY_ROPES
from xlstm_hybrid.state import fork, prefill, snapshot

# Tokens that a beginning must save to be read by itself: two calls more, each of which costs as much as so many tokens
WORTH = {"cpu": 64}
WORTH_ELSEWHERE = 4096  # accelerators: a call costs its launches, whatever its size
KNOWN = DynamicLayer, DynamicSlidingWindowLayer, SlidingLayer  # beside ours: caches that are copied and gone on from

# ids: a tuple.  keep: number of last positions that are scored.  asked: [(number of the request, continuation)]
Input = namedtuple("Input", "ids keep asked")


@torch.no_grad()
def continuation_scores(model, requests, *, batch_size, max_length, softmax_dtype=None, scored=None):
    """Log-likelihood of each continuation after its context, and whether it is what greedy decoding gives.

    Args:
        requests: [(ids of the context, ids of the continuation)], lists of at least one token; too long ones lose their
            beginning. Those with one input (answers of one token after a question) share a row.
        batch_size: rows per forward, padded on the right.
        max_length: longest input, tokens.
        softmax_dtype: of log-softmax; the model's if None.
        scored: called as `scored(number of the request, (score, greedy))` as soon as one is known.
    Returns:
        [(sum of log p, nats; greedy)], in the order of the requests.
    Raises:
        EvaluationError: a continuation that is longer than the longest input.
    """
    found = [None] * len(requests)
    pending = [(inputs_of(requests, max_length), 0, 0, None)]
    whole = not reads_in_pieces(model)
    while pending:
        inputs, before, depth, cache = pending.pop()  # inputs share `depth` tokens, the cache has read `before`
        if depth > before and not whole:
            ids = torch.tensor([inputs[0].ids[before:depth]], device=model.device)
            cache = prefill(model, ids, cache=None if cache is None else snapshot(cache))
            whole = not all(isinstance(layer, StateLayer) or type(layer) in KNOWN for layer in cache.layers)
        if whole:
            depth, cache = 0, None
        groups, rest = (
            ([], inputs) if whole else beginnings(inputs, depth, WORTH.get(model.device.type, WORTH_ELSEWHERE))
        )
        rest.sort(key=lambda row: (-len(row.ids), row.ids))
        for first in range(0, len(rest), batch_size):
            rows = rest[first : first + batch_size]
            for row, logp in zip(rows, scored_positions(model, rows, depth, cache, softmax_dtype), strict=True):
                best = logp.argmax(-1)
                for number, continuation in row.asked:
                    ids = torch.tensor(continuation, device=logp.device)
                    last = logp[len(logp) - len(ids) :]
                    score = (
                        float(last.gather(-1, ids[:, None]).sum()),
                        bool((best[len(best) - len(ids) :] == ids).all()),
                    )
                    found[number] = score
                    if scored is not None:
                        scored(number, score)
        pending += [(group, depth, length, cache) for group, length in groups]
    return found


def reads_in_pieces(model):
    """Whether an input read in pieces through the cache is the whole input, by the model's configuration."""
    ropes = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    return all(rope.get("rope_type", "default") in STEADY_ROPES for rope in each)


def inputs_of(requests, max_length):
    """The distinct inputs of requests in lexicographic order: all tokens but the last, of which the end is scored."""
    asked = {}
    for number, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length or not context:
            raise EvaluationError(
                f"request {number}: a context of {len(context)} tokens and a continuation of {len(continuation)}, expected at least "
                f"one of each and no more than the longest input, {max_length}; allow longer inputs with --max-length"
            )
        ids = tuple([*context, *continuation][-(max_length + 1) :][:-1])
        asked.setdefault(ids, []).append((number, continuation))
    return [Input(ids, max(len(c) for _, c in asked[ids]), asked[ids]) for ids in sorted(asked)]


def beginnings(inputs, depth, worth):
    """Which inputs go on together beyond their first `depth` tokens, and how far.

    Args:
        inputs: in lexicographic order, alike in `depth` tokens.
        worth: tokens that reading a beginning once must save.
    Returns:
        `([(inputs, length of their beginning)], inputs that are read by themselves)`. A beginning ends before the first
        scored position of all its inputs.
    """
    groups, rest, open_ = [], [], [inputs]
    while open_:
        part = open_.pop()
        first, last = part[0].ids, part[-1].ids
        alike = next(
            (j for j, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        length = min(alike, *(len(row.ids) - row.keep for row in part))
        if len(part) == 1:
            rest += part
        elif (length - depth) * (len(part) - 1) >= worth:
            groups.append((part, length))
        else:
            branches = {}
            for row in part:
                branches.setdefault(row.ids[alike : alike + 1], []).append(row)
            open_ += branches.values()
    return groups, rest


def scored_positions(model, rows, depth, cache, dtype):
    """Log-probabilities [P, V] at the scored positions of each of the rows, which are alike in the `depth` tokens that the
    cache has read; the cache stays as it is.
    """
    longest = max(len(row.ids) for row in rows)
    ids, mask = (
        torch.tensor([[*part, *[0] * (longest - depth - len(part))] for part in parts], device=model.device)
        for parts in ([row.ids[depth:] for row in rows], [[1] * (len(row.ids) - depth) for row in rows])
    )  # [B, T]
    places = [range(len(row.ids) - row.keep - depth, len(row.ids) - depth) for row in rows]
    kept = sorted({place for of_row in places for place in of_row})
    more = {"use_cache": False}  # then what pads stands behind all that is scored, and nothing is left of it
    if cache is not None:
        more = {"use_cache": True, **named(fork(cache, len(rows)))}
        more["attention_mask"] = torch.cat([mask.new_ones(len(rows), depth), mask], dim=1)
    logits = model(ids, logits_to_keep=torch.tensor(kept, device=model.device), **more).logits  # [B, P of all, V]
    column = {place: j for j, place in enumerate(kept)}
    for of_row, row_places in zip(logits, places, strict=True):
        yield F.log_softmax(of_row[[column[place] for place in row_places]], dim=-1, dtype=dtype)
