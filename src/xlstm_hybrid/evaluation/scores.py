"""A student's scores: exact match, perplexity, the tolerance-corrected win-and-tie rate against its teacher. Those that
others measured: `results`.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from xlstm_hybrid.checkpoint.tokenizer import check_rows
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.results import last_part
from xlstm_hybrid.evaluation.significance import ROUNDING
from xlstm_hybrid.model.generation_checks import bound_of, stock_settings

ALPHAS = tuple(j / 200 for j in range(201))
NOT_SCORED = -100


# --- win-and-tie -----------------------------------------------------------------------------------------------


@dataclass
class WinAndTie:
    """C_alpha over `alphas`, the smallest tolerance at which half of the benchmarks are won or tied, and what it rests
    on.

    recovery: student score / teacher score per benchmark, the other way round where less is better; None where it would
        be divided by 0.
    wins, ties, losses: numbers of benchmarks at tolerance 0.
    """

    alphas: list
    curve: list
    alpha_star: float
    c_0: float
    recovery: dict
    wins: int
    ties: int
    losses: int


def win_and_tie(student, teacher, alphas=None, smaller=()):
    """Win-and-tie rate of a student (Hauzenberger et al. 2026).

    1_alpha(b) = 1 if A_S(b) >= (1 - alpha) A_T(b): a relative tolerance. C_alpha is its mean over the benchmarks and
    alpha* = inf{alpha : C_alpha >= 1/2}, in closed form the ceil(|B| / 2)-th smallest max(0, 1 - A_S / A_T).
    The student cannot lose where its teacher scores 0: any score counts at every tolerance, 0 as a tie, more as a win.
    Where less is better (perplexity, bits per byte) A_T / A_S takes the place of A_S / A_T, the tolerance still relative
    to the teacher: A_S(b) <= A_T(b) / (1 - alpha). The paper has no such benchmark. Every benchmark counts here;
    `comparison.compare` leaves out those at which the teacher is at chance.

    Args:
        student, teacher: {benchmark: score}, scores >= 0 of the same benchmarks; larger is better.
        alphas: tolerances of the curve, from 0 to 1; steps of half a percent if None.
        smaller: benchmarks of which less is better.
    Raises:
        EvaluationError: no benchmark, one that only one side has, a score that is negative or not finite, a tolerance
            off [0, 1]; all are named.
    """
    alphas = list(ALPHAS if alphas is None else alphas)
    sides = (("student", student), ("teacher", teacher))
    wrong = [
        f"{b} has no score of the {side}" for side, scores in sides for b in sorted({*student, *teacher} - {*scores})
    ]
    wrong += [
        f"{b} is {s} for the {side}, expected a finite score of at least 0"
        for side, scores in sides
        for b, s in scores.items()
        if not 0 <= s < math.inf
    ]
    wrong += [f"alpha is {a}, expected a share between 0 and 1" for a in alphas if not 0 <= a <= 1]
    if not student and not teacher:
        wrong.append("no benchmark, expected at least one")
    if wrong:
        raise EvaluationError(f"win_and_tie: {'; '.join(wrong)}. Evaluate student and teacher on the same tasks")
    pairs = {b: (teacher[b], student[b]) if b in smaller else (student[b], teacher[b]) for b in teacher}
    ratio = {b: above / below if below else math.inf if above else 1.0 for b, (above, below) in pairs.items()}
    shortfall = {b: 0.0 if r >= 1 - ROUNDING else 1 - r for b, r in ratio.items()}

    def rate(alpha):
        return sum(s <= alpha + ROUNDING for s in shortfall.values()) / len(shortfall)

    losses, wins = sum(s > 0 for s in shortfall.values()), sum(r > 1 + ROUNDING for r in ratio.values())
    return WinAndTie(
        alphas=alphas,
        curve=[rate(a) for a in alphas],
        alpha_star=sorted(shortfall.values())[math.ceil(len(shortfall) / 2) - 1],
        c_0=rate(0),
        recovery={b: ratio[b] if below else None for b, (_, below) in pairs.items()},
        wins=wins,
        ties=len(ratio) - wins - losses,
        losses=losses,
    )


# --- a model's own scores --------------------------------------------------------------------------------------


@dataclass
class ExactMatch:
    """Share of examples whose whole output is the answer, and each output: [{"prompt", "answer", "output", "correct"}]."""

    score: float
    samples: list


@contextmanager
def evaluating(model, tokenizer=None):
    """The model with stock generation settings, and with a look at each call's ids: one without a row in the embedding
    is a ConfigError, see `check_rows`. It has the tokens' names where there is a tokenizer, whose pad, begin and end
    tokens are looked at first.
    """
    if not hasattr(model, "get_input_embeddings"):  # anything that `generate`s
        with stock_settings(model):
            yield
        return
    embedding, name = model.get_input_embeddings(), last_part(model.config.name_or_path) or "the model"
    rows = len(embedding.weight)
    if tokenizer is not None:
        check_rows(tokenizer, rows, name)

    def look(module, given):
        if given and given[0].numel() and int(given[0].max()) >= rows:
            check_rows(tokenizer, rows, name, given[0].flatten().tolist())

    hook = embedding.register_forward_pre_hook(look)
    try:
        with stock_settings(model):
            yield
    finally:
        hook.remove()


@torch.inference_mode()
def exact_match(model, tokenizer, examples, *, batch_size=64, max_new_tokens=None, progress=None):
    """Greedy generation in left-padded batches through the cache, up to an end token, compared with the answers,
    surrounding blanks aside.

    Args:
        model: anything that `generate`s.
        tokenizer: its own special tokens (a begin token) are added to the prompts.
        examples: objects with `prompt` and `answer`, both text.
        batch_size: prompts per batch; prompts of like length share one.
        max_new_tokens: budget; by default the longest answer in tokens and two more.
        progress: called with (examples done, their number) after each batch.
    Returns:
        ExactMatch, samples in the order of the examples.
    Raises:
        ConfigError: see `evaluating`.
        EvaluationError: no examples, an empty prompt, a batch size or budget below 1.
    """
    if max_new_tokens is None and examples:
        max_new_tokens = 2 + max(len(tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples)
    prompts = [tokenizer(e.prompt)["input_ids"] for e in examples]
    if not prompts or not all(prompts) or batch_size < 1 or max_new_tokens < 1:
        raise EvaluationError(
            f"exact_match: {len(prompts)} examples, {sum(not p for p in prompts)} of them with no token, batch_size={batch_size}, "
            f"max_new_tokens={max_new_tokens}; expected prompts with tokens and numbers of at least 1"
        )
    order, samples = sorted(range(len(prompts)), key=lambda j: len(prompts[j])), [None] * len(prompts)
    with evaluating(model, tokenizer):
        ends = end_tokens(model, tokenizer)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            outputs = continuations(model, [prompts[j] for j in chosen], ends, max_new_tokens)
            for j, text in zip(chosen, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
                e, right = examples[j], text.strip() == examples[j].answer.strip()
                samples[j] = {"prompt": e.prompt, "answer": e.answer, "output": text, "correct": right}
            if progress:
                progress(first + len(chosen), len(order))
    return ExactMatch(sum(s["correct"] for s in samples) / len(samples), samples)


def end_tokens(model, tokenizer):
    """Ids at which an output ends: the tokenizer's and those of the generation config."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
    rows = model.config.get_text_config().vocab_size  # what has none is never generated
    return sorted({int(t) for t in [*of_model, tokenizer.eos_token_id] if t is not None and t < rows})


def continuations(model, prompts, ends, max_new_tokens):
    """Greedy continuations of prompts (lists of ids) without the end token and what follows it."""
    length, pad = max(map(len, prompts)), ends[0] if ends else 0  # padding is masked, whatever token it is
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    output = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=ends or None, pad_token_id=pad, **how)
    rows = output[:, length:].tolist()
    return [row[: next((j for j, t in enumerate(row) if t in ends), len(row))] for row in rows]


@torch.inference_mode()
def contradictions(model, tokenizer, samples, *, encode=None, batch_size=32):
    """Samples whose answer was not generated, although it is the model's most likely tokens, one after the other.

    Without a cache, that is. Greedy generation cannot miss such an answer: where it did, what generates is not what was
    trained and measured, and no score tells of the model. A token counts as the most likely one if it is ahead of all
    others by more than rounding explains, see `generation_checks.bound`.

    Args:
        samples: those of `exact_match`, generated with room for the answer and its end.
        encode: function from a prompt to the ids that the model read; by default what the tokenizer makes of it.
    Returns:
        The samples, in their order.
    """
    missed, ends, wrong = [s for s in samples if not s["correct"]], end_tokens(model, tokenizer), []
    encode = encode or (lambda prompt: tokenizer(prompt)["input_ids"])
    rows = [(encode(s["prompt"]), tokenizer(s["answer"], add_special_tokens=False)["input_ids"]) for s in missed]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in rows]
    spelt = [j for j, text in enumerate(texts) if text.strip() == missed[j]["answer"].strip()]  # others are not it
    allowed = bound_of(model)
    with evaluating(model, tokenizer):
        for first in range(0, len(spelt) if ends else 0, batch_size):
            chosen = spelt[first : first + batch_size]
            ahead = leads(model, [rows[j] for j in chosen], ends)
            wrong += [missed[j] for j, lead in zip(chosen, ahead, strict=True) if lead > allowed]
    return wrong


def leads(model, rows, ends):
    """By how much the tokens of an answer, and one of `ends` after the last, are ahead where they are least so.

    Args:
        rows: [(ids of the prompt, ids of the answer)].
    Returns:
        [standard deviations of the logits]; negative where another token is ahead.
    """
    whole, margins = [[*prompt, *answer] for prompt, answer in rows], []
    ids, mask = (right_padded(part, 0, model.device) for part in (whole, [[1] * len(row) for row in whole]))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for (prompt, answer), of_row in zip(rows, logits, strict=True):
        scores = of_row[len(prompt) - 1 : len(prompt) + len(answer)].double()  # [tokens of the answer + 1, V]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[range(len(answer)), answer] = True
        right[-1, ends] = True
        best, other = (scores.masked_fill(~which, float("-inf")).amax(-1) for which in (right, ~right))
        margins.append(((best - other).min() / scores.std()).item())
    return margins


def named_contradictions(found):
    """What is wrong with scores, in words; `found` is {model: {domain: samples}}, see `contradictions`."""
    said = [
        f"{name}, {domain}: {len(samples)} answers are its most likely tokens one after the other, without a cache, "
        f"and were not generated, for example {samples[0]['answer']!r} after {samples[0]['prompt'][-40:]!r}: the output "
        f"is {samples[0]['output']!r}"
        for name, domains in found.items()
        for domain, samples in domains.items()
    ]
    return (
        f"{'; '.join(said)}. What generates is not what was trained and measured, so that no score here tells of a "
        "model; `xlstm-hybrid verify` names the way that goes wrong, `xlstm-hybrid doctor` the versions that were tested"
    )


@torch.inference_mode()
def perplexity(model, rows, *, tokenizer=None, batch_size=32):
    """exp of the mean negative log-likelihood (nats, float32 log-softmax) over scored tokens; infinite beyond the range
    of a float.

    Args:
        rows: [(input_ids, labels)] lists of one length each; labels stand at the token that they name, -100 marks one
            that is not scored. The first token of a row is never scored: nothing precedes it.
        tokenizer: the model's, for the name of a token that has no row in its embedding.
        batch_size: rows per right-padded batch.
    Raises:
        ConfigError: see `evaluating`.
        EvaluationError: nothing is scored, a row whose labels do not fit, or a model whose log-likelihoods are not
            numbers.
    """
    scored, count = scored_rows(rows, batch_size, "perplexity")
    with evaluating(model, tokenizer):
        total = sum(
            negative_log_likelihood(model, scored[first : first + batch_size])
            for first in range(0, len(scored), batch_size)
        )
    if math.isnan(total):
        raise EvaluationError(
            "perplexity: the model's log-likelihoods are not numbers; it has diverged, take an earlier checkpoint"
        )
    return math.exp(total / count) if total / count < 709 else math.inf


def scored_rows(rows, batch_size, caller):
    """`(rows with a scored token, the shortest first; number of scored tokens)`; rows as in `perplexity`.

    Raises:
        EvaluationError: a row whose labels do not fit, nothing scored, a batch size below 1.
    """
    if wrong := [j for j, (ids, labels) in enumerate(rows) if len(ids) != len(labels)]:
        raise EvaluationError(
            f"{caller}: row {wrong[0]} has {len(rows[wrong[0]][0])} tokens and {len(rows[wrong[0]][1])} labels, expected as many"
        )
    scored = [row for row in rows if any(label != NOT_SCORED for label in row[1][1:])]
    count = sum(label != NOT_SCORED for _, labels in scored for label in labels[1:])
    if not count or batch_size < 1:
        raise EvaluationError(
            f"{caller}: {count} tokens of {len(rows)} rows are scored, batch_size={batch_size}; expected at least 1 of each"
        )
    return sorted(scored, key=lambda row: len(row[0])), count


def right_padded(rows, value, device):
    """[B, T] of lists of numbers, filled up on the right."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], device=device)


def negative_log_likelihood(model, batch):
    """Sum over the scored tokens of a batch of (input_ids, labels), nats."""
    rows, labels = zip(*batch, strict=True)
    ids, mask = (right_padded(part, 0, model.device) for part in (rows, [[1] * len(row) for row in rows]))
    labels = right_padded(labels, NOT_SCORED, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    counted = labels[:, 1:] != NOT_SCORED
    logp = logits[counted].float().log_softmax(-1)  # [scored tokens, V]
    return -logp.gather(-1, labels[:, 1:][counted][:, None]).double().sum().item()
