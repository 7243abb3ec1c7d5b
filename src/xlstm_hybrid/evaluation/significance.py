"""Paired statistics: two models evaluated on the same documents. Dims: N documents, U distinct pairs of values, R
resamples, B benchmarks.

Everything random is drawn from a seed and the name of the benchmark: results do not depend on the order of benchmarks.
"""

import hashlib
import math
from collections import Counter

import numpy as np

from xlstm_hybrid.errors import EvaluationError

RESAMPLES, LEVEL = 10_000, 0.95
ERRORS = 1.96  # standard errors by which a score must be above chance
ROUNDING = 1e-12  # relative: 0.1 + 0.2 ties with 0.3
BLOCK = 2**22  # numbers drawn at a time
FEW = 64  # distinct pairs of values that are counted instead of drawn one by one


# --- documents -------------------------------------------------------------------------------------------------


def document_keys(hashes):
    """Documents by the hash of their content; equal ones are told apart by their number."""
    seen = Counter()
    for value in hashes:
        seen[value] += 1
        yield value, seen[value]


def sample_values(rows):
    """Values and prompts of a task's samples; a metric whose values are not all numbers is left out."""
    values, prompts, odd = {}, {}, set()
    for kind in dict.fromkeys(row.get("filter", "none") for row in rows):
        chosen = sorted(
            (r for r in rows if r.get("filter", "none") == kind and r.get("doc_hash")), key=lambda r: r.get("doc_id", 0)
        )
        for key, row in zip(document_keys([r["doc_hash"] for r in chosen]), chosen, strict=True):
            prompts[key] = row.get("prompt_hash")
            for metric in row.get("metrics") or ():
                name, value = f"{metric},{kind}", row.get(metric)
                if not isinstance(value, bool | int | float) or not math.isfinite(value):
                    odd.add(name)
                else:
                    values.setdefault(name, {})[key] = float(value)
    return {name: found for name, found in values.items() if name not in odd}, prompts


# --- tests and intervals ---------------------------------------------------------------------------------------


def stream(seed, name):
    """A random generator that belongs to one benchmark."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]))


def paired_arrays(student, teacher):
    """Two sequences as float64 arrays [N]; EvaluationError unless they have one length of at least 1 and finite values."""
    student, teacher = (np.asarray(x, dtype=np.float64) for x in (student, teacher))
    fits = student.shape == teacher.shape and student.ndim == 1 and student.size
    if not fits or not np.isfinite([student, teacher]).all():
        raise EvaluationError(
            f"paired statistics: {list(student.shape)} values of the student and {list(teacher.shape)} of the teacher, expected "
            "as many finite ones of both, and at least one; pair the samples of one set of documents"
        )
    return student, teacher


def above_chance(score, chance, *, values=None, documents=None):
    """Whether a score tells of more than guessing: it is above `chance` by more than 1.96 standard errors; at a chance
    of 0, or of None for one that is not known, a single right answer does.

    Args:
        score, chance: shares; of a score on another scale (above 1) only 0 is known to be chance.
        values: of the documents, for the standard error; else that of so many right and wrong answers. With neither it
            is 0.
    """
    if not chance or score > 1:
        return score > 0
    spread = float(np.std(values)) if values else math.sqrt(score * (1 - score))
    n = len(values) if values else documents
    return score - (ERRORS * spread / math.sqrt(n) if n else 0) > chance


def is_binary(student, teacher):
    return bool(np.isin([student, teacher], (0.0, 1.0)).all())


def mcnemar(student, teacher):
    """Exact two-sided McNemar test of right and wrong answers (0 and 1), McNemar 1947: a fair coin over the documents
    on which the two differ.

    Returns:
        `(documents that only the student solves, that only the teacher solves, p)`; p is 1 where they never differ.
    """
    student, teacher = paired_arrays(student, teacher)
    if not is_binary(student, teacher):
        raise EvaluationError("mcnemar: expected values of 0 and 1 only; compare other scores with `sign_flip`")
    gained, lost = int((student > teacher).sum()), int((student < teacher).sum())
    n, tail, term = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # binomial coefficients, exact
    return gained, lost, min(1.0, 2 * tail / 2**n)


def sign_flip(student, teacher, *, resamples=RESAMPLES, seed=0, name=""):
    """Two-sided p of the mean difference if student and teacher could be exchanged on every document: random signs,
    Fisher 1935.
    """
    student, teacher = paired_arrays(student, teacher)
    difference = student - teacher
    difference, observed, random = difference[difference != 0], abs(difference.sum()), stream(seed, f"flip {name}")
    if not difference.size:
        return 1.0
    beyond, done, step = 0, 0, max(1, BLOCK // difference.size)
    while done < resamples:
        count = min(step, resamples - done)
        signs = 2.0 * random.integers(0, 2, (count, difference.size)) - 1
        beyond += int((np.abs(signs @ difference) >= observed * (1 - ROUNDING)).sum())
        done += count
    return (beyond + 1) / (resamples + 1)  # the observed signs are one of the draws


def resampled_means(student, teacher, *, resamples=RESAMPLES, seed=0, name=""):
    """Means of student and teacher over R draws of N documents with replacement, the two together: `([R], [R])`. Efron
    1979.
    """
    student, teacher = paired_arrays(student, teacher)
    values, counts = np.unique(np.stack([student, teacher]), axis=1, return_counts=True)  # [2, U]
    n, random = student.size, stream(seed, f"bootstrap {name}")
    if counts.size <= FEW:  # right and wrong have four pairs: how often each is drawn says all
        return tuple((random.multinomial(n, counts / n, resamples) @ values.T / n).T)
    step, means = max(1, BLOCK // n), []
    for first in range(0, resamples, step):
        drawn = random.integers(0, n, (min(step, resamples - first), n))
        means.append([student[drawn].mean(1), teacher[drawn].mean(1)])
    return tuple(np.concatenate(means, axis=1))


def interval(values, level=LEVEL):
    """Central percentile interval of resampled values, None where it is not finite."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return [float(low), float(high)] if math.isfinite(low) and math.isfinite(high) else None


def holm(p_values):
    """p-values of one family after Holm's correction (1979), in their own order."""
    adjusted, largest = {}, 0.0
    for j, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - j) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def compare_pairs(student, teacher, *, smaller=False, resamples=RESAMPLES, seed=0, name=""):
    """What the documents of one benchmark say about two models; `smaller`: less is better.

    Returns:
        "documents": N.  "test": "McNemar" for values of 0 and 1, else "sign flip".  "p": two-sided, not corrected.
        "gained", "lost": documents on which the student is better and worse than its teacher.
        "difference", "recovery": paired bootstrap intervals of A_S - A_T and of A_S / A_T (A_T / A_S where less is
            better); None where a resampled divisor is 0.
    """
    student, teacher = paired_arrays(student, teacher)
    settings = {"resamples": resamples, "seed": seed, "name": name}
    s, t = resampled_means(student, teacher, **settings)
    above, below = (t, s) if smaller else (s, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        recovery = np.where(below > 0, above / below, np.inf)
    gained, lost = int((student > teacher).sum()), int((student < teacher).sum())
    binary = is_binary(student, teacher)
    return {
        "documents": int(student.size),
        "test": "McNemar" if binary else "sign flip",
        "p": mcnemar(student, teacher)[2] if binary else sign_flip(student, teacher, **settings),
        "gained": lost if smaller else gained,
        "lost": gained if smaller else lost,
        "difference": interval(s - t),
        "recovery": interval(recovery),
    }


def resampled_verdict(pairs, alpha, *, resamples=RESAMPLES, seed=0):
    """How sure a win-and-tie verdict is, given that other documents could have been drawn: every benchmark is resampled
    by itself.

    Args:
        pairs: {benchmark: (student [N], teacher [N])}; the other way round where less is better.
        alpha: tolerance of the verdict.
    Returns:
        "alpha_star", "c_0", "c_alpha": intervals.  "lossless": share of the resamples in which C_alpha >= 1/2.
    """
    shortfall = []
    for name, (student, teacher) in pairs.items():
        s, t = resampled_means(student, teacher, resamples=resamples, seed=seed, name=name)
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = np.where(t > 0, 1 - s / t, 0.0)  # a teacher that scores 0 is never lost to
        shortfall.append(np.where(lost <= ROUNDING, 0.0, lost))
    shortfall = np.sort(np.stack(shortfall), axis=0)  # [B, R]
    rates = (shortfall <= alpha + ROUNDING).mean(0)
    return {
        "alpha_star": interval(shortfall[math.ceil(len(shortfall) / 2) - 1]),
        "c_0": interval((shortfall <= ROUNDING).mean(0)),
        "c_alpha": interval(rates),
        "lossless": float((rates >= 0.5).mean()),
    }
