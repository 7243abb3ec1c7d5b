"""Four procedural task domains and real text: the data of the tiny teacher and of the quickstart.

Everything is made on the spot. Task examples come from a seeded generator; text is read from the standard
library of the running Python. A prompt belongs to the test split if a hash of its text says so, whatever
the seed: no training stream ever holds a test prompt.
"""

import hashlib
import importlib.util
import itertools
import random
import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from xlstm_hybrid.errors import DataError

TEST_SHARE = 10  # one prompt in ten is held out


@dataclass(frozen=True)
class Example:
    """One task: `turns` is [(question, answer), ...]; only answers are scored. A test example has one turn."""

    turns: tuple[tuple[str, str], ...]

    @property
    def prompt(self):
        return self.turns[0][0]

    @property
    def answer(self):
        return self.turns[0][1]


def single(question, answer):
    return Example(((question, str(answer)),))


def held_out(text):
    """Whether a prompt or text chunk belongs to the test split: a property of its bytes alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % TEST_SHARE == 0


# --- the four domains: each draws one example ------------------------------------------------------------------


def arithmetic(rng):
    """Sums and differences below 100, and three-term sums of digits."""
    kind, a, b = rng.choice("+-s"), rng.randrange(100), rng.randrange(100)
    if kind == "+":
        return single(f"{a}+{b}=", a + b)
    if kind == "-":
        a, b = max(a, b), min(a, b)
        return single(f"{a}-{b}=", a - b)
    a, b, c = (rng.randrange(10) for _ in range(3))
    return single(f"{a}+{b}+{c}=", a + b + c)


def recall(rng, pairs=(8, 32), queries=1):
    """Key-value pairs, then a key whose value is wanted: ` aQ; kZ; ... = k` -> `Z`."""
    n = rng.randint(*pairs)
    keys = rng.sample(string.ascii_letters, n)
    values = [rng.choice(string.ascii_uppercase) for _ in keys]
    asked = rng.sample(range(n), min(queries, n))
    body = "recall" + "".join(f" {k}{v};" for k, v in zip(keys, values, strict=True)) + " ="
    turns = [(f" {keys[j]}", values[j]) for j in asked]
    return Example(((body + turns[0][0], turns[0][1]), *turns[1:]))


def code(rng):
    """Python expressions at a prompt and three-line programs, with what Python prints (lists without blanks)."""
    xs = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
    a, b, kind, listing = rng.randrange(10), rng.randrange(10), rng.randrange(8), str(xs).replace(" ", "")
    if kind == 0:
        op = rng.choice("+-")
        return single(f"x={a}\ny=x{op}{b}\nprint(y)\n# ", a + b if op == "+" else a - b)
    if kind == 1:
        name = rng.choice(["max", "min"])
        return single(f">>> {name}({listing})\n", max(xs) if name == "max" else min(xs))
    if kind == 2:
        return single(f">>> sorted({listing})\n", str(sorted(xs)).replace(" ", ""))
    if kind == 3:
        j = rng.randrange(len(xs))
        return single(f">>> {listing}[{j}]\n", xs[j])
    if kind == 4:
        return single(f">>> {a} in {listing}\n", a in xs)
    if kind == 5:
        return single(f">>> [x+1 for x in {listing}]\n", str([x + 1 for x in xs]).replace(" ", ""))
    if kind == 6:
        return single(f">>> {listing}[::-1]\n", str(xs[::-1]).replace(" ", ""))
    program = f"def f(x):\n    if x>{a}:\n        return {b}\n    return x\nprint(f({xs[0]}))\n# "
    return single(program, b if xs[0] > a else xs[0])


STRING_OPERATIONS = {
    "Reverse the letters.": lambda xs: xs[::-1],
    "Repeat the letters twice.": lambda xs: xs + xs,
    "Write the letters in upper case.": lambda xs: [x.upper() for x in xs],
    "Give the first letter.": lambda xs: xs[:1],
    "Give the last letter.": lambda xs: xs[-1:],
    "Remove the first letter.": lambda xs: xs[1:],
    "Sort the letters.": sorted,
    "Swap the first and the last letter.": lambda xs: [xs[-1], *xs[1:-1], xs[0]],
}


def strings(rng):
    """An instruction about a handful of letters."""
    instruction = rng.choice(list(STRING_OPERATIONS))
    xs = rng.sample(string.ascii_lowercase, rng.randint(3, 6))
    result = STRING_OPERATIONS[instruction](xs)
    return single(f"Instruction: {instruction}\nInput: {' '.join(xs)}\nOutput:", "".join(f" {x}" for x in result))


DOMAINS = {"arithmetic": arithmetic, "recall": recall, "code": code, "strings": strings}


def examples(domain, seed, split="train", **options):
    """Endless stream of examples of one domain.

    Args:
        domain: a key of `DOMAINS`.
        seed: of the generator.
        split: "train" never yields a held-out prompt, "test" yields nothing else.
        options: of the generator (`pairs` and `queries` of recall).
    Raises:
        DataError: no such domain or split.
    """
    if domain not in DOMAINS or split not in ("train", "test"):
        raise DataError(f"domain={domain!r}, split={split!r}: expected one of {sorted(DOMAINS)} and 'train' or 'test'")
    rng = random.Random(f"{domain}-{split}-{seed}")
    while True:
        example = DOMAINS[domain](rng, **options)
        if held_out(example.prompt) == (split == "test"):
            yield example


def test_examples(domain, count, seed=0):
    """`count` distinct held-out examples, always the same ones for a seed."""
    by_prompt = {}
    for example in itertools.islice(examples(domain, seed, "test"), 20 * count):
        by_prompt.setdefault(example.prompt, example)
        if len(by_prompt) == count:
            return list(by_prompt.values())
    raise DataError(
        f"{domain}: only {len(by_prompt)} distinct held-out prompts exist, {count} were asked for: lower examples"
    )


def dataset(domain, examples=200, **_):
    """Held-out examples of a domain for a task file of lm-eval: `{"test": Dataset}`; those that `evaluate` takes."""
    from datasets import Dataset

    rows = [{"prompt": e.prompt, "answer": e.answer} for e in test_examples(domain, examples)]
    return {"test": Dataset.from_list(rows)}


def process_results(doc, results):
    """Score of one document, as lm-eval asks for it: 1 if the whole output is the answer, surrounding blanks aside."""
    return {"exact_match": float(results[0].strip() == doc["answer"].strip())}


# --- real text -------------------------------------------------------------------------------------------------


def text_chunks(split="train", size=600):
    """Prose (`pydoc_data`) and code (the standard library's sources), in pieces of `size` characters.

    Raises:
        DataError: the running Python was installed without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for folder in (".", "json", "asyncio") for path in sorted((root / folder).glob("*.py"))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if not texts:
        raise DataError(
            f"no Python sources under {root}: text is read from the standard library; use a Python installed with its sources"
        )
    if importlib.util.find_spec("pydoc_data.topics"):
        topics = importlib.import_module("pydoc_data.topics").topics
        texts = 2 * [text for _, text in sorted(topics.items())] + texts  # twice: prose is rarer than code
    chunks = (text[i : i + size] for text in texts for i in range(0, len(text), size))
    return [c for c in chunks if len(c) > size // 4 and held_out(c) == (split == "test")]


# --- tokens ----------------------------------------------------------------------------------------------------


def encode_example(tokenizer, example):
    """`(input_ids, labels)` of one example: begin token, turns, end token; questions are labelled -100."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    for question, answer in example.turns:
        q = tokenizer(question, add_special_tokens=False)["input_ids"]
        a = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids += q + a
        labels += [-100] * len(q) + a
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def encode_chunk(tokenizer, chunk):
    """`(input_ids, labels)` of a piece of text, every token scored."""
    ids = [tokenizer.bos_token_id, *tokenizer(chunk, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids, [-100, *ids[1:]]


def training_documents(rng, tokenizer, mixture, pairs=(8, 32), queries=12, text_tokens=(32, 160)):
    """Endless stream of training documents `(input_ids, labels)`.

    Args:
        rng: random.Random.
        mixture: {domain or "text": share of tokens}; the domain furthest below its share tends to come next.
        pairs, queries: of recall.
        text_tokens: range of lengths that pieces of text are cut to.
    Raises:
        DataError: a name in `mixture` is no domain, or a share is not positive.
    """
    wrong = {name: share for name, share in mixture.items() if name not in {*DOMAINS, "text"} or not share > 0}
    if wrong or not mixture:
        raise DataError(f"mixture: {wrong or 'it is empty'}; expected positive shares of {sorted(DOMAINS)} and 'text'")
    seed, text, spent = rng.random(), text_chunks(), dict.fromkeys(mixture, 0.0)
    streams = {d: examples(d, seed, **({"pairs": pairs, "queries": queries} if d == "recall" else {})) for d in DOMAINS}
    while True:
        name = min(spent, key=lambda n: spent[n] / mixture[n] + rng.random() * 500)
        if name == "text":
            n = rng.randint(*text_tokens)
            ids, labels = (x[:n] for x in encode_chunk(tokenizer, rng.choice(text)))
        else:
            ids, labels = encode_example(tokenizer, next(streams[name]))
        spent[name] += len(ids)
        yield ids, labels


def packed_row(documents, length):
    """A row of `length` tokens of whole documents, the last one cut; positions restart with each document."""
    ids, labels, positions = [], [], []
    while len(ids) < length:
        i, l = next(documents)
        ids, labels, positions = ids + i, labels + l, positions + list(range(len(i)))
    return {"input_ids": ids[:length], "labels": labels[:length], "position_ids": positions[:length]}
