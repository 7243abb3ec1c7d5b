"""How far a student is from its teacher on text, token by token: likelihoods, exact KL, the same most likely token.

n scored tokens of a row, V vocabulary.
"""

import torch
from torch.nn import functional as F

from xlstm_hybrid.data.vocabulary import shared_size
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.scores import NOT_SCORED, evaluating, right_padded, scored_rows

FIGURES = ("nll_student", "nll_teacher", "kl", "top1")


@torch.inference_mode()
def agreement(student, teacher, rows, *, tokenizer=None, teacher_tokenizer=None, batch_size=8):
    """Means over the scored tokens of `rows`, in float32 over the whole vocabulary.

    Args:
        student, teacher: causal language models, each on a device of its own if need be.
        rows: [(input_ids, labels)], see `scores.perplexity`.
        tokenizer, teacher_tokenizer: needed where one model's LM head has more rows than the other's.
        batch_size: rows per right-padded batch.
    Returns:
        {"nll_student", "nll_teacher": negative log-likelihood, nats per token; "kl": KL(teacher || student), nats per
        token; "top1": share of tokens at which both have the same most likely one; "tokens", "rows": what was counted;
        "standard_error": {figure: that of a mean whose draws are rows; None for a single row}}
    Raises:
        ConfigError: vocabularies that do not fit each other, see `vocabulary.shared_size`; a token without a row in the
            embedding.
        EvaluationError: nothing is scored, a row whose labels do not fit, or figures that are not numbers.
    """
    scored, count = scored_rows(rows, batch_size, "agreement")
    sizes = (model.config.get_text_config().vocab_size for model in (student, teacher))
    size = shared_size(*sizes, tokenizer, teacher_tokenizer)
    sums, tokens = [], []
    with evaluating(student, tokenizer), evaluating(teacher, teacher_tokenizer):
        for first in range(0, len(scored), batch_size):
            batch = scored[first : first + batch_size]
            logits = [logits_of(model, [ids for ids, _ in batch]) for model in (student, teacher)]
            for (_, labels), of_student, of_teacher in zip(batch, *logits, strict=True):
                sums.append(row_sums(labels, of_student[..., :size], of_teacher[..., :size]))
                tokens.append(sum(label != NOT_SCORED for label in labels[1:]))
    sums, tokens = (
        torch.tensor(sums, dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.float64),
    )  # [rows, 4] [rows]
    means = sums.sum(0) / count
    if means.isnan().any():
        raise EvaluationError(
            "agreement: the log-likelihoods of student or teacher are not numbers; one has diverged, take an earlier checkpoint"
        )
    # of a ratio of two sums over rows: longer rows weigh more
    spread = ((sums - tokens[:, None] * means) ** 2).sum(0) * len(sums) / max(1, len(sums) - 1)
    errors = (spread.sqrt() / count).tolist() if len(sums) > 1 else [None] * len(FIGURES)
    found = dict(zip(FIGURES, means.tolist(), strict=True)) | {"tokens": count, "rows": len(sums)}
    return found | {"standard_error": dict(zip(FIGURES, errors, strict=True))}


def logits_of(model, rows):
    """[B, T, V] of lists of ids, right-padded."""
    ids, mask = (right_padded(part, 0, model.device) for part in (rows, [[1] * len(row) for row in rows]))
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def row_sums(labels, of_student, of_teacher):
    """The sums of `FIGURES` over the scored tokens of one row; logits [T, V], T at least the number of labels."""
    labels = torch.tensor(labels[1:], device=of_student.device)
    counted = (labels != NOT_SCORED).nonzero()[:, 0]
    labels = labels[counted]  # [n]
    student, teacher = (
        x[counted.to(x.device)].to(labels.device).float().log_softmax(-1) for x in (of_student, of_teacher)
    )
    nll = [-side.gather(-1, labels[:, None]) for side in (student, teacher)]
    kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    same = student.argmax(-1) == teacher.argmax(-1)
    return [x.double().sum().item() for x in (*nll, kl, same)]
