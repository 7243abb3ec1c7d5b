"""Judging a student: exact match, perplexity, and the tolerance-corrected win-and-tie rate against its teacher (METHOD 1.5)."""
import math
from dataclasses import dataclass

import torch

from xlstm_hybrid.errors import EvaluationError

ALPHAS = tuple(j / 200 for j in range(201))


@dataclass
class WinAndTie:
    """C_alpha over `alphas`, the smallest tolerance at which half of the benchmarks are won or tied, and what it rests on.

    recovery: student score / teacher score per benchmark; infinite where only the teacher scored 0, and 1 where both did.
    """

    alphas: list
    curve: list
    alpha_star: float
    c_0: float
    recovery: dict
    wins: int
    ties: int
    losses: int


def win_and_tie(student, teacher, alphas=ALPHAS):
    """Win-and-tie rate of a student (Hauzenberger et al. 2026).

    1_alpha(b) = 1 if A_S(b) >= (1 - alpha) A_T(b): a relative tolerance. C_alpha is its mean over the benchmarks and
    alpha* = inf{alpha : C_alpha >= 1/2}, in closed form the ceil(|B| / 2)-th smallest max(0, 1 - A_S / A_T).
    A benchmark on which the teacher scores 0 is won or tied at every tolerance.

    Args:
        student, teacher: {benchmark: score}, scores >= 0 of the same benchmarks; larger is better.
    Raises:
        EvaluationError: no benchmark, one that only one side has, or a score that is negative or not finite; all are named.
    """
    one_sided = sorted(set(student) ^ set(teacher))
    wrong = sorted(f"{side} {b}={s}" for side, scores in (("student", student), ("teacher", teacher)) for b, s in scores.items() if not 0 <= s < math.inf)
    if not student or one_sided or wrong:
        problem = f"benchmarks on one side only: {one_sided}" if one_sided else f"scores that are negative or not finite: {wrong}" if wrong else "no benchmark"
        raise EvaluationError(f"win_and_tie: {problem}; judge student and teacher on the same tasks")
    shortfall = {b: max(0.0, 1 - student[b] / teacher[b]) if teacher[b] else 0.0 for b in teacher}
    rate = [sum(student[b] >= (1 - a) * teacher[b] for b in teacher) / len(teacher) for a in alphas]
    recovery = {b: student[b] / teacher[b] if teacher[b] else (math.inf if student[b] else 1.0) for b in teacher}
    return WinAndTie(
        alphas=list(alphas), curve=rate, alpha_star=sorted(shortfall.values())[math.ceil(len(shortfall) / 2) - 1],
        c_0=sum(student[b] >= teacher[b] for b in teacher) / len(teacher), recovery=recovery, wins=sum(student[b] > teacher[b] for b in teacher),
        ties=sum(student[b] == teacher[b] for b in teacher), losses=sum(student[b] < teacher[b] for b in teacher))


@dataclass
class ExactMatch:
    """Share of examples whose whole output is the answer, and each output: [{"prompt", "answer", "output", "correct"}]."""

    score: float
    samples: list


@torch.inference_mode()
def exact_match(model, tokenizer, examples, *, batch_size=64, max_new_tokens=None):
    """Greedy generation in left-padded batches through the cache, compared with the answers, surrounding blanks aside.

    Args:
        examples: objects with `prompt` and `answer`.
        max_new_tokens: budget; by default the longest answer in tokens and two more.
    Raises:
        EvaluationError: no examples, or a tokenizer that cannot pad.
    """
    if not examples:
        raise EvaluationError("exact_match: no examples")
    if tokenizer.pad_token_id is None:
        raise EvaluationError("exact_match: the tokenizer has no pad token; set tokenizer.pad_token, for example to its end token")
    if max_new_tokens is None:
        max_new_tokens = 2 + max(len(tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples)
    order = sorted(range(len(examples)), key=lambda j: len(examples[j].prompt))  # rows of like length share a batch
    training, samples = model.training, [None] * len(examples)
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            inputs = tokenizer([examples[j].prompt for j in chosen], return_tensors="pt", padding=True, padding_side="left").to(model.device)
            output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False,
                                    pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for j, text in zip(chosen, texts, strict=True):
                e = examples[j]
                samples[j] = {"prompt": e.prompt, "answer": e.answer, "output": text, "correct": text.strip() == e.answer.strip()}
    finally:
        model.train(training)
    return ExactMatch(sum(s["correct"] for s in samples) / len(samples), samples)


@torch.inference_mode()
def perplexity(model, rows, *, batch_size=32):
    """exp of the mean negative log-likelihood over scored tokens.

    Args:
        rows: [(input_ids, labels)] lists; -100 marks a label that is not scored.
    Raises:
        EvaluationError: nothing is scored.
    """
    training, total, count = model.training, 0.0, 0
    rows = sorted(rows, key=lambda row: len(row[0]))
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            length = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([list(i) + [0] * (length - len(i)) for i, _ in batch], device=model.device)
            labels = torch.tensor([list(l) + [-100] * (length - len(l)) for _, l in batch], device=model.device)
            mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in batch], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
            count += int((labels[:, 1:] != -100).sum())
    finally:
        model.train(training)
    if not count:
        raise EvaluationError("perplexity: no token is scored; every label is -100 or the rows are empty")
    return math.exp(total / count)
