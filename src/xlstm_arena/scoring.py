"""The scores of one student: recall by length and distance with coverage and bytes beside it, short tasks, perplexity, the
cache against one pass.

Dims: n rows, L tokens, q answers per row, W window, S sinks. Every answer is one token: a score is the share of argmax
hits in one forward pass.
"""

import math

import torch
from transformers import DynamicCache

from xlstm_arena import data
from xlstm_hybrid.data.long_context import coverage, excess
from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.evaluation.scores import perplexity
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.configuration import attention_reach
from xlstm_hybrid.planning.cache_size import allocated_bytes
from xlstm_hybrid.state import prefill

LEAST_ROWS = 8  # of a recall test, however long its rows are
TEXT_LENGTH = 128  # tokens of a row for the perplexity
CACHED_ROWS, CACHED_PIECE = 2, 13  # rows and tokens per piece of the check of the cache: no divisor of a window
SCALE = 1e-3  # how far cached logits may be from those of one pass, as a share of their scale, before the check fails


@torch.inference_mode()
def logits_at(model, input_ids, places, batch_tokens):
    """[n, q, V] logits at `places` [n, q] of one forward over `input_ids` [n, L], in batches of about `batch_tokens`."""
    rows, batches = max(1, batch_tokens // input_ids.shape[1]), []
    for first in range(0, len(input_ids), rows):
        ids, at = input_ids[first : first + rows].to(model.device), places[first : first + rows].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        batches.append(logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])).float().cpu())
    return torch.cat(batches)


def hits_of(model, test, batch_tokens):
    """[n, q] bool: whether the likeliest next token is the answer."""
    return logits_at(model, test["input_ids"], test["answer_at"], batch_tokens).argmax(-1) == test["answers"]


def seen_by(model, window, sinks):
    """`(window, sinks)` of the student's own hybrid layers, the largest; (0, 0) for one without attention; those given
    for a teacher.
    """
    config, branches = model.config, getattr(model.config, "mixer_branches", "both")
    if config.model_type == "distil_xlstm" or branches == "memory":
        return 0, 0
    if config.model_type != "xlstm_hybrid" or "hybrid_sliding" not in config.layer_types:
        return window, sinks
    return attention_reach(config, kinds=("hybrid_sliding",))


def distances(hits, depth, window):
    """Accuracy by distance from fact to question, in octaves of the window: [{"from", "to" (tokens), "answers",
    "accuracy"}].
    """
    edges, spans = [0, window], []
    while edges[-1] <= int(depth.max()):
        edges.append(2 * edges[-1])
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (depth >= low) & (depth < high)
        if inside.any():
            accuracy = hits[inside].double().mean().item()
            spans.append({"from": low, "to": high, "answers": int(inside.sum()), "accuracy": accuracy})
    return spans


def recall_cell(hits, depth, length, seen, window):
    """One test of recall.

    Args:
        hits, depth: [n, q].
        seen: `seen_by` of the student.
        window: W of the arena, the same for every arm.
    Returns:
        {"accuracy", "rows": mean hits of each row, "n": answers, "coverage": c = (W + S) / L, "excess": (accuracy - c)
        / (1 - c), "beyond": accuracy on the answers whose fact is at least W of the arena away from its question, None
        where there are none, "beyond_n", "by_distance"}
    """
    accuracy, c = hits.double().mean().item(), coverage(length, *seen)
    far = depth >= window
    return {
        "accuracy": accuracy,
        "n": hits.numel(),
        "coverage": c,
        "excess": excess(accuracy, c),
        "beyond": hits[far].double().mean().item() if far.any() else None,
        "beyond_n": int(far.sum()),
        "by_distance": distances(hits, depth, window),
        "rows": [round(x, 4) for x in hits.double().mean(1).tolist()],
    }


@torch.inference_mode()
def bytes_at(model, lengths):
    """{length: bytes that the cache of one sequence keeps alive after so many tokens}; {} for a model that refuses a
    cache.
    """
    counts = {}
    for length in lengths:
        try:
            ids = data.tests("single", length, 1)["input_ids"].to(model.device)
            cache = prefill(model, ids[:, :-1], piece=None)
            model(input_ids=ids[:, -1:], **named(cache), use_cache=True)
        except CacheError:
            return {}
        counts[str(length)] = allocated_bytes(cache)
    return counts


@torch.inference_mode()
def cached_check(model, length, batch_tokens, seed=0):
    """Whether reading in pieces and then one token at a time gives the logits of one pass.

    Returns:
        {"answers", "same": share of answers with the same argmax, "error": largest difference of logits as a share of
        their scale, "passed"}, or {"refused": why} for a model without a cache.
    """
    test = data.tests("multikey", length, CACHED_ROWS, seed)
    ids, at = test["input_ids"].to(model.device), test["answer_at"]
    whole, begin = logits_at(model, test["input_ids"], at, batch_tokens), int(at.min())
    try:
        cache = prefill(model, ids[:, :begin], cache=DynamicCache(config=model.config), piece=CACHED_PIECE)
        steps = [
            model(input_ids=ids[:, t : t + 1], **named(cache), use_cache=True).logits[:, -1].float().cpu()
            for t in range(begin, ids.shape[1])
        ]
    except CacheError as reason:
        return {"refused": str(reason)}
    logits = torch.stack(steps, 1)  # [n, L - begin, V]
    stepped = logits.gather(1, (at - begin)[..., None].expand(-1, -1, logits.shape[-1]))
    error = ((stepped - whole).abs().max() / whole.abs().max()).item()
    same = (stepped.argmax(-1) == whole.argmax(-1)).double().mean().item()
    return {"answers": at.numel(), "same": same, "error": error, "passed": error < SCALE}


def student_scores(model, evaluate, seed, window, sinks):
    """Everything that the arena says of one set of weights.

    Args:
        evaluate: see `arms.Arena`.
        seed: of the tests; the same tests for every arm.
        window, sinks: W and S of the arena.
    Returns:
        {"recall": {kind: {length: `recall_cell`}}, "short": {task: accuracy}, "short_rows": {task: [hits per row]},
        "perplexity", "cache_bytes", "cached"}
    """
    seen, tokens = seen_by(model, window, sinks), evaluate["batch_tokens"]
    result = {"recall": {}, "short": {}, "short_rows": {}}
    for kind in data.LONG:
        result["recall"][kind] = {}
        for length in evaluate["lengths"]:
            rows = min(evaluate["rows"], max(LEAST_ROWS, evaluate["tokens"] // length))
            test = data.tests(kind, length, rows, seed)
            hits = hits_of(model, test, tokens)
            result["recall"][kind][str(length)] = recall_cell(hits, test["depth"], length, seen, window)
    for kind in data.SHORT:
        hits = hits_of(model, data.tests(kind, data.SHORT_LENGTH, evaluate["short_rows"], seed), tokens).double()
        result["short"][kind] = hits.mean().item()
        result["short_rows"][kind] = [round(x, 4) for x in hits.mean(1).tolist()]
    rows = data.rows(seed, TEXT_LENGTH, evaluate["text_rows"], recall_share=0.0)
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    value = perplexity(model, pairs, batch_size=max(1, tokens // TEXT_LENGTH))
    result["perplexity"] = value if math.isfinite(value) else None
    result["cache_bytes"] = bytes_at(model, evaluate["lengths"])
    result["cached"] = cached_check(model, min(evaluate["lengths"][-1], 4 * window), tokens, seed)
    return result
