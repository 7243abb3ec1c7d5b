"""The arena's language: 512 words in which facts are stated, asked for again, and short tasks are solved inside a
window.

A document is a run of segments, one token per word:

    text    words of a first-order chain: each has four successors with probabilities .7, .15, .1, .05
    fact    FACT key value            a key has one value per document
    ask     ASK key value             of an earlier fact, near or far: what a memory is for
    short   COPY a b c d = a b c d    REVERSE a b c d = d c b a    MAX a b c = m    ADD a b = a + b, both below 10

Answers are one token each: a score is a share of argmax hits in one forward pass. All words are random numbers of a
seeded generator, the chain of `text` is the same for every seed.  Dims: n rows, L tokens of a row, q answers of a row.
"""

import numpy as np
import torch

from xlstm_hybrid.errors import DataError

VOCAB = 512
PAD, BOS, EOS, FACT, ASK, COPY, REVERSE, ADD, MAX, EQUALS = range(10)
KEYS, VALUES, NUMBERS, WORDS = range(32, 160), range(160, 224), range(224, 256), range(256, 512)
# [256, 4]
SUCCESSORS = np.random.default_rng(20_26).permuted(np.tile(np.arange(256), (256, 1)), axis=1)[:, :4] + WORDS[0]
CHANCES = np.array([0.7, 0.15, 0.1, 0.05])
LONG, SHORT = ("single", "multikey", "multiquery"), ("copy", "reverse", "add", "max", "lookup", "text")
SHORT_LENGTH = 28  # tokens of a short test: inside every window of the arena
TEXT_SPAN = (4, 16)  # words of one segment of text in a training row


def text(rng, count):
    """`count` words of the chain."""
    word, words = rng.integers(256), []
    for pick in np.searchsorted(CHANCES.cumsum()[:-1], rng.random(count), side="right"):
        word = SUCCESSORS[word, pick] - WORDS[0]
        words.append(int(word) + WORDS[0])
    return words


def short_task(rng, kind):
    """`(question, answer)` of one short task; the question ends with the word before the first answer."""
    a = [int(x) + NUMBERS[0] for x in rng.integers(len(NUMBERS), size=4)]
    if kind == "copy":
        return [COPY, *a, EQUALS], a
    if kind == "reverse":
        return [REVERSE, *a, EQUALS], a[::-1]
    if kind == "max":
        return [MAX, *a[:3], EQUALS], [max(a[:3])]
    a, b = (int(x) for x in rng.integers(10, size=2))
    return [ADD, a + NUMBERS[0], b + NUMBERS[0], EQUALS], [a + b + NUMBERS[0]]


# --- training rows ---------------------------------------------------------------------------------------------


def training_document(rng, length, recall_share, most_facts=96):
    """`(ids, labels)` of one document: lists of `length`; labels are -100 for words that nothing before them tells."""
    facts, ids, labels = {}, [BOS], [-100]
    keys, kinds = rng.permutation(len(KEYS))[:most_facts] + KEYS[0], ("copy", "reverse", "add", "max")
    spent = 0  # tokens of facts and questions
    while len(ids) < length:
        if spent < recall_share * len(ids):
            new = not facts or (len(facts) < len(keys) and rng.random() < 0.35)
            key = int(keys[len(facts)]) if new else list(facts)[rng.integers(len(facts))]
            value = facts.setdefault(key, int(rng.integers(len(VALUES))) + VALUES[0])
            segment, scored = [FACT if new else ASK, key, value], [-100, -100, -100 if new else value]
            spent += 3
        elif rng.random() < 0.5:
            segment = scored = text(rng, int(rng.integers(*TEXT_SPAN)))
            scored = [-100, *segment[1:]]
        else:
            question, answer = short_task(rng, kinds[rng.integers(4)])
            segment, scored = question + answer, [-100] * len(question) + answer
        ids += segment
        labels += scored
    return ids[:length], labels[:length]


def rows(seed, length, count, recall_share=0.35):
    """Training rows, one document each and no padding: `[{"input_ids": [L], "labels": [L]}]`; a label stands at its own
    token's place.

    Args:
        seed: of the generator; the same seed gives the same rows, more of them at the end.
        length: L tokens.
        recall_share: share of tokens in facts and questions; the rest is half text, half short tasks, by segments.
    Raises:
        DataError: a length below 2, no rows, or a share off [0, 1].
    """
    if length < 2 or count < 1 or not 0 <= recall_share <= 1:
        expected = "expected at least 2 tokens, 1 row, and a share from 0 to 1"
        raise DataError(f"length={length}, count={count}, recall_share={recall_share}: {expected}")
    rng = np.random.default_rng([seed, length, 1])
    documents = (training_document(rng, length, recall_share) for _ in range(count))
    return [{"input_ids": ids, "labels": labels} for ids, labels in documents]


# --- tests -----------------------------------------------------------------------------------------------------


def tests(kind, length, count, seed=0):
    """Test rows of one kind; none of them can be in a training row but by the chance of equal random words.

    Args:
        kind: of LONG: `single` (one fact in text), `multikey` (eight facts), `multiquery` (a fact per 16 tokens, at
            most 96), the last two with four questions; or of SHORT, whose rows have SHORT_LENGTH tokens whatever the
            length.
        length: L tokens of a row, questions and answers included.
    Returns:
        {"input_ids": [n, L] long, "answer_at": [n, q] places whose next token is the answer, "answers": [n, q],
        "depth": [n, q] tokens from the fact's value to its question, 0 for short kinds}
    Raises:
        DataError: no such kind, or a length that the kind does not fit in.
    """
    if kind not in (*LONG, *SHORT) or (kind in LONG and length < 48):
        expected = f"one of {', '.join((*LONG, *SHORT))}, and at least 48 tokens for {', '.join(LONG)}"
        raise DataError(f"kind={kind!r}, length={length}: expected {expected}")
    rng = np.random.default_rng([seed, length, 2, (*LONG, *SHORT).index(kind)])
    made = [long_test(rng, kind, length) if kind in LONG else short_test(rng, kind) for _ in range(count)]
    names = ("input_ids", "answer_at", "answers", "depth")
    return {name: torch.tensor([row[j] for row in made]) for j, name in enumerate(names)}


def long_test(rng, kind, length):
    many = length // 16
    facts, asked = {"single": (1, 1), "multikey": (8, 4), "multiquery": (min(96, many), min(4, many))}[kind]
    body = length - 1 - 3 * asked  # tokens between BOS and the first question
    keys = (rng.permutation(len(KEYS))[:facts] + KEYS[0]).tolist()
    values = (rng.integers(len(VALUES), size=facts) + VALUES[0]).tolist()
    gaps = np.sort(rng.integers(body - 3 * facts + 1, size=facts))  # words of text before each fact: uniform depths
    words, ids, places = text(rng, body - 3 * facts), [BOS], []
    for j, (key, value) in enumerate(zip(keys, values, strict=True)):
        ids += [*words[gaps[j - 1] if j else 0 : gaps[j]], FACT, key, value]
        places.append(len(ids) - 1)
    ids += words[gaps[-1] :]
    chosen = rng.permutation(facts)[:asked]
    at = []
    for j in chosen:
        ids += [ASK, keys[j], values[j]]
        at.append(len(ids) - 2)
    return ids, at, [values[j] for j in chosen], [a - places[j] for a, j in zip(at, chosen, strict=True)]


def short_test(rng, kind):
    if kind == "text":  # the likeliest next word
        words = text(rng, SHORT_LENGTH - 1)
        at, ids = list(range(SHORT_LENGTH - 8, SHORT_LENGTH)), [BOS, *words]
        return ids, at, [int(SUCCESSORS[ids[a] - WORDS[0], 0]) for a in at], [0] * len(at)
    if kind == "lookup":
        keys = (rng.permutation(len(KEYS))[:4] + KEYS[0]).tolist()
        values = (rng.integers(len(VALUES), size=4) + VALUES[0]).tolist()
        j = int(rng.integers(4))
        question = [x for pair in zip([FACT] * 4, keys, values, strict=True) for x in pair] + [ASK, keys[j]]
        answer = [values[j]]
    else:
        question, answer = short_task(rng, kind)
    ids = [BOS, *text(rng, SHORT_LENGTH - 1 - len(question) - len(answer)), *question, *answer]
    first = len(ids) - len(answer) - 1
    return ids, list(range(first, first + len(answer))), answer, [0] * len(answer)
