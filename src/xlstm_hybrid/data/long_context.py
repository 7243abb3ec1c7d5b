"""Long-context tasks made on the spot, and what to print with their scores.

In the style of RULER (Hsieh et al. 2024) and of multi-query associative recall (Arora et al. 2024). Dims: L tokens of a
prompt, n lines of its haystack, W window, S sinks.

A prompt has exactly L tokens of the tokenizer at hand, the special tokens that it adds included; the answer comes on
top. Every document is a function of tokenizer, kind, length, number, seed, and the real text of its haystack, if any.
"""

import json
import lzma
import math
import random
import re
import string
from bisect import bisect
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

from xlstm_hybrid.errors import DataError, EvaluationError

LENGTHS = tuple(1024 * 2**j for j in range(8))  # 1k to 128k
# what fills the last few tokens: the first that adds them one by one
PADS = (" and", " so", " the", " .", ".", "\n", " a", "a")
HOPS = 4  # links of a chain of variables, as in RULER
# before the text of variable tracking, as in RULER: without it a model of 135M parameters names none
EXAMPLE = (
    "Text: VAR BQXTA = 81265. The plan was changed twice. VAR MWKDZ = VAR BQXTA. Nobody objected. VAR CYRHU = VAR MWKDZ. "
    "It was late.\nQuestion: which variables hold the value 81265?\n"
    "Answer: The 3 variables that hold 81265 are VAR BQXTA, VAR MWKDZ, VAR CYRHU.\n\nText:"
)
LONGEST, WIDEST = 30, 30  # words of a sentence of real text, letters of a word
WIDE = rf"\S{{{WIDEST + 1},}}"
CITIES, SUBJECTS, VERBS, OBJECTS, PLACES = (
    line.split(", ")
    for line in (
        "Accra, Athens, Bergen, Bogota, Cairo, Dakar, Delhi, Dublin, Geneva, Hanoi, Havana, Jakarta, Kyiv, Lagos, Lima, "
        "Lisbon, London, Madrid, Manila, Nairobi, Oslo, Paris, Prague, Quito, Riga, Rome, Seoul, Sofia, Tokyo, Tunis, "
        "Vienna, Warsaw",
        "the baker, a farmer, the old sailor, her neighbour, the young clerk, a quiet child, the gardener, his teacher",
        "looks for, forgets, carries, paints, remembers, finds, sells, borrows, washes, waits for",
        "the green door, a wooden box, the last train, some warm bread, the empty garden, a paper boat, the broken clock, two birds",
        "near the river, after the rain, before noon, in the market, behind the house, on the hill, at the bridge, every morning",
    )
)


# --- kinds: each gives `layout(n)` -> (lines, number of the line of each answer, question, answers) --------------


def haystack(rng, facts, of_answers, question, answers, text=None):
    """`facts` [(depth from 0 to 1, text)] between sentences: plain ones that are made up, or those of a real `text`, one
    after the other from a place that is drawn.
    """
    lines, starts, first = [], [0], rng.randrange(len(text)) if text else None
    order = sorted(range(len(facts)), key=lambda j: facts[j][0])

    def layout(n):  # of a real text a line is a word, so that a prompt is filled to the last token
        while len(lines) < n:
            if text:
                lines.extend(text[(first + len(starts) - 1) % len(text)])
            else:  # no number, no capital but the first: nothing in them looks like an answer
                subject, action, thing, place = (rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, PLACES))
                lines.append(f" {subject.capitalize()} {action} {thing} {place}.")
            starts.append(len(lines))
        mixed, where, last = [], {}, 0
        ends = list(accumulate(map(len, lines[:n]), initial=0))  # sentences differ in length: depth is by letters
        places = [start for start in starts if start < n] + [n]
        middles = [(ends[p] + ends[q]) / 2 for p, q in pairwise(places)]
        for j in order:
            place = places[bisect(middles, facts[j][0] * ends[-1])]
            mixed += lines[last:place]
            where[j], last = len(mixed), place
            mixed.append(facts[j][1])
        return mixed + lines[last:n], [where[j] for j in of_answers], question, answers

    return layout


def needle(rng, depth, others=0, text=None):
    """One pass key at a depth; `others` of other cities anywhere."""
    cities = rng.sample(CITIES, 1 + others)
    keys = [str(k) for k in rng.sample(range(10**6, 10**7), 1 + others)]
    facts = [
        (depth if not j else rng.random(), f" The pass key of {c} is {k}.")
        for j, (c, k) in enumerate(zip(cities, keys, strict=True))
    ]
    question = f"\nQuestion: what is the pass key of {cities[0]}?\nAnswer: The pass key of {cities[0]} is"
    return haystack(rng, facts, [0], question, keys[:1], text)


def multikey(rng, depth, text=None):
    """The pass key of one of four cities."""
    return needle(rng, depth, 3, text)


def recall(rng, depth, queries=4):
    """Multi-query associative recall: nothing but keys and values, and values from every part are asked for."""
    del depth  # queries come from all depths
    lines, within = {}, [rng.random() for _ in range(queries)]  # keys of three syllables, numbers of four digits
    order = rng.sample(range(queries), queries)  # not the order of the context

    def layout(n):
        while len(lines) < n:
            key = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
            if key not in lines:
                lines[key] = str(rng.randrange(1000, 10000))
        pairs = list(lines.items())[:n]
        edges = [n * j // queries for j in range(queries + 1)]  # one key of each quarter
        places = [edges[j] + int(within[j] * (edges[j + 1] - edges[j])) for j in order]
        keys = ", ".join(pairs[p][0] for p in places)
        question = f"\nQuestion: what are the values of {keys}?\nAnswer: In this order, they are"
        return [f"\n{key} = {value}" for key, value in pairs], places, question, [pairs[p][1] for p in places]

    return layout


def variables(rng, depth, hops=HOPS, text=None):
    """Variable tracking: a chain of assignments through the context; a link counts only with those before it."""
    del depth  # the chain runs through all depths
    drawn = ("".join(rng.sample(string.ascii_uppercase, 5)) for _ in range(8 * (hops + 1)))
    names = [name for name in dict.fromkeys(drawn) if name not in EXAMPLE][: hops + 1]
    value = rng.choice([v for v in rng.sample(range(10**4, 10**5), 2) if str(v) not in EXAMPLE])
    assigned, facts = [str(value), *(f"VAR {name}" for name in names)], []
    for j, name in enumerate(names):  # a depth from each of as many equal parts: together they are uniform
        facts.append(((j + rng.random()) / (hops + 1), f" VAR {name} = {assigned[j]}."))
    question = f"\nQuestion: which variables hold the value {value}?\nAnswer: The {hops + 1} variables that hold {value} are VAR"
    return haystack(rng, facts, range(hops + 1), question, names, text)


KINDS = {"needle": needle, "multikey": multikey, "recall": recall, "variables": variables}
TASK_NAME = re.compile(rf"({'|'.join(KINDS)})_[1-9]\d*k?")  # as the harness names them: needle_4k
OPENINGS = {
    **dict.fromkeys(("needle", "multikey"), "Pass keys are hidden in the text. Remember them.\n"),
    "recall": "Remember the value of every key.\n",
    "variables": f"Assignments of variables are hidden in the text. Remember them.\n{EXAMPLE}",
}


# --- haystacks of real text ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sentences(file):
    """The sentences of a real text, lists of words, each after a blank. White space is one blank, as in RULER; what is
    longer than `LONGEST` words is cut; words of more than `WIDEST` letters, addresses and rules of tables, are left out.

    Args:
        file: plain text, or .jsonl with a text {"text"} in each row; either may be compressed, .xz.
    Raises:
        DataError: no such file, or one that holds no such text.
    """
    file, expected = Path(file), 'expected plain text, or .jsonl with {"text": ...} in each row; both may end in .xz'
    if not file.is_file():
        raise DataError(f"haystack {file.name}: no such file; check its path. {expected.capitalize()}")
    try:
        with (lzma.open if file.suffix == ".xz" else open)(file, "rt", encoding="utf-8") as lines:
            rows = ".jsonl" in file.suffixes[-2:]
            texts = [json.loads(line)["text"] for line in lines if line.strip()] if rows else [lines.read()]
        found = [s.split() for text in texts for s in re.split(r"(?<=[.!?])\s+", re.sub(WIDE, " ", text))]
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"haystack {file.name}: cannot be read ({type(error).__name__}: {error}); {expected}"
        ) from error
    cut = [[f" {w}" for w in words[j : j + LONGEST]] for words in found for j in range(0, len(words), LONGEST)]
    if not cut:
        raise DataError(f"haystack {file.name}: found no text; {expected}")
    return cut


# --- documents ---------------------------------------------------------------------------------------------------


def documents(tokenizer, kind, length, samples=40, depths=10, seed=0, haystack=None, hops=None):
    """Documents of one kind and length.

    Args:
        tokenizer: its own special tokens are added to a prompt and counted.
        kind: a key of `KINDS`.
        length: L, tokens of every prompt.
        samples: number of documents.
        depths: of the needle: a number of equal parts of the context, all visited in turn, far from the one before,
            with a depth drawn from each, so that the depths of any first documents are about uniform, as coverage
            supposes; or a sequence of depths from 0 (first) to 1 (last).
        seed: of the generator.
        haystack: file of a real text to hide the answers in, see `sentences`; None: made-up sentences.
        hops: links of a chain of `variables`, which has one variable more; None: `HOPS`.
    Returns:
        [{"prompt", "answers": [text], "answer": all of them as the model is to write them, "distances": tokens from the
        line of each answer to the end of the prompt, "kind", "length", "number"}]
    Raises:
        DataError: no such kind, numbers below 1, a depth off [0, 1], a length below what the question needs or that the
            tokenizer cannot hit; a haystack that cannot be read, is shorter than a prompt, or that the kind has no use for; hops of
            another kind than variables.
    """
    if isinstance(depths, int):  # in steps of about the golden section: the first few of them lie far apart
        steps = (s for s in range(1, depths + 1) if math.gcd(s, depths) == 1)
        step = min(steps, key=lambda s: abs(s - 0.618 * depths), default=1)
        grid = [j * step % depths for j in range(depths)]
    else:
        grid = list(depths) if all(0 <= d <= 1 for d in depths) else []
    if kind not in KINDS or samples < 1 or length < 1 or not grid:
        raise DataError(
            f"kind={kind!r}, length={length}, samples={samples}, depths={depths!r}: expected one of {', '.join(KINDS)}, numbers of at "
            "least 1, and a number of depths or depths between 0 and 1"
        )
    if haystack is not None and kind == "recall":
        raise DataError(
            "recall: its context is nothing but keys and values, a haystack would be ignored; ask for needle, multikey or variables, "
            "or leave the haystack out"
        )
    if hops is not None and (kind != "variables" or hops < 1):
        raise DataError(
            f"{kind}, hops={hops}: expected at least 1, of the kind variables alone; leave hops out for others"
        )
    text = None if haystack is None else sentences(str(haystack))
    told = ({"text": text} if text else {}) | ({"hops": hops} if hops else {})
    make, words = partial(KINDS[kind], **told), sum(map(len, text)) if text else math.inf
    rows = []
    for number in range(samples):
        rng = random.Random(f"{kind}-{length}-{seed}-{number}")
        depth = grid[number % len(grid)]
        depth = (depth + rng.random()) / len(grid) if isinstance(depths, int) else depth
        rows.append({**document(tokenizer, kind, length, make(rng, depth), words), "number": number})
    return rows


def document(tokenizer, kind, length, layout, most=math.inf):
    def count(text):
        return len(tokenizer(text, verbose=False)["input_ids"])

    def text(n, pad=""):
        lines, _, question, _ = layout(n)
        return OPENINGS[kind] + "".join(lines) + pad + question

    n, pad = fit(count, length, text, kind)
    if n > most:  # a text that begins again would be another task
        raise DataError(
            f"haystack of {most} words: {length} tokens take about {n}; take a longer text, or a smaller length"
        )
    lines, places, _, answers = layout(n)
    before = [OPENINGS[kind] + "".join(lines[:p]) for p in places]
    distances = [length - count(part) for part in before]
    joint = ", VAR " if kind == "variables" else ", "
    row = {"prompt": text(n, pad), "answers": answers, "answer": f" {joint.join(answers)}"}
    return row | {"distances": distances, "kind": kind, "length": length}


def fit(count, length, text, kind, least=4):
    """`(n, pad)` with which `text(n, pad)` has exactly `length` tokens: whole lines, then single tokens."""
    base, average = count(text(least)), max(1.0, (count(text(least + 64)) - count(text(least))) / 64)
    if base > length:
        raise DataError(
            f"{kind}: a prompt has at least {base} tokens with this tokenizer, {length} were asked for; ask for a greater length"
        )
    n, low, high = least + int((length - base) / average), least, math.inf
    for _ in range(64):
        gap = length - count(text(n))
        if 0 <= gap <= 2 * average or (high - low <= 1 and n == low):
            break
        low, high = (n, high) if gap >= 0 else (low, n)
        n += math.floor(gap / average)
        if not low < n < high:  # lines of very different lengths
            n = low if high - low <= 1 else (low + high) // 2 if high < math.inf else low + 1
    for pad in PADS if gap >= 0 else ():
        p = gap
        for _ in range(8):
            if (missing := length - count(text(n, pad * p))) == 0:
                return n, pad * p
            p = max(0, p + missing)
    raise DataError(
        f"{kind}: no prompt of exactly {length} tokens with this tokenizer was found, {gap} were left to fill; ask for another length"
    )


def dataset(
    kind, length, samples=40, depths=10, seed=0, haystack=None, hops=None, tokenizer=None, pretrained=None, **_
):
    """The documents for a task file of lm-eval: `{"test": Dataset}`; as for its RULER a tokenizer is a name.

    Raises:
        DataError: neither `tokenizer` nor `pretrained`; and see `documents`.
    """
    from datasets import Dataset

    from xlstm_hybrid.conversion.load import load_tokenizer

    if not (name := tokenizer or pretrained):
        raise DataError(
            f"{kind}: lengths are counted in tokens, expected the name of a tokenizer; pass --metadata '{{\"tokenizer\": NAME}}' to lm_eval"
        )
    rows = documents(load_tokenizer(name), kind, length, samples, depths, seed, haystack, hops)
    return {"test": Dataset.from_list(rows)}


# --- scores ------------------------------------------------------------------------------------------------------


def hits_of(output, answers):
    """Whether each answer is among the first numbers (or names) of the output, of as many as were asked for."""
    pattern = r"\d+" if answers[0].isdigit() else r"\b[A-Z]{5}\b"
    said = re.findall(pattern, output)[: len(answers)]
    return [answer in said for answer in answers]


def process_results(doc, results):
    """Scores of one document for lm-eval: recall, the share of the answers; exact_match, 1 if it is all of them."""
    hits = hits_of(results[0], doc["answers"])
    return {"recall": sum(hits) / len(hits), "exact_match": float(all(hits))}


def coverage(length, window, sinks=0):
    """c = (W + S) / L, at most 1: share of a needle's places that window and sinks see. `window` None: all."""
    return 1.0 if window is None else min(1.0, (window + sinks) / length)


def excess(score, covered):
    """(score - c) / (1 - c): recall of what window and sinks do not see, 0 if nothing else is seen; None for c = 1.

    Raises:
        EvaluationError: a score or coverage off [0, 1].
    """
    if not (0 <= score <= 1 and 0 <= covered <= 1):
        raise EvaluationError(f"excess: score={score}, coverage={covered}; expected shares between 0 and 1")
    return None if covered >= 1 else (score - covered) / (1 - covered)


def by_depth(samples, parts=10):
    """Recall over the depth of the answers' lines in tokens, from samples of lm-eval: [{"from", "to", "answers",
    "recall"}], parts without answers left out.
    """
    hits = [[] for _ in range(parts)]
    for sample in samples:
        doc = sample["doc"]
        for hit, distance in zip(hits_of(sample["filtered_resps"][0], doc["answers"]), doc["distances"], strict=True):
            depth = 1 - distance / doc["length"]
            hits[min(int(depth * parts), parts - 1)].append(hit)
    return [
        {"from": j / parts, "to": (j + 1) / parts, "answers": len(h), "recall": sum(h) / len(h)}
        for j, h in enumerate(hits)
        if h
    ]
