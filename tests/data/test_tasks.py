"""The tasks are right, their answers are what Python says, and no training stream holds a test prompt."""

import itertools
import random
import re

import pytest

from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.errors import DataError


def some(domain, count=400, split="train", **options):
    return list(itertools.islice(tasks.examples(domain, 3, split, **options), count))


def test_arithmetic_answers_are_what_python_computes():
    for example in some("arithmetic"):
        assert str(eval(example.prompt.rstrip("="))) == example.answer


def test_code_answers_are_what_python_prints():
    for example in some("code"):
        if example.prompt.startswith(">>> "):
            assert str(eval(example.prompt[4:])).replace(" ", "") == example.answer
        else:
            printed = []
            exec(example.prompt, {"print": lambda value, printed=printed: printed.append(str(value))})
            assert printed == [example.answer]


def test_recall_asks_for_the_value_that_stands_behind_the_key():
    for example in some("recall", queries=3):
        pairs = dict(re.findall(r" (\w)(\w);", example.prompt))
        assert 8 <= len(pairs) <= 32 and len(example.turns) == 3
        for question, answer in example.turns:
            assert pairs[question[-1]] == answer


def test_string_operations_do_what_they_say():
    seen = set()
    for example in some("strings"):
        instruction, letters = re.fullmatch(r"Instruction: (.*)\nInput: (.*)\nOutput:", example.prompt).groups()
        xs = letters.split()
        expected = {
            "Reverse the letters.": xs[::-1],
            "Repeat the letters twice.": xs * 2,
            "Write the letters in upper case.": letters.upper().split(),
            "Give the first letter.": xs[:1],
            "Give the last letter.": xs[-1:],
            "Remove the first letter.": xs[1:],
            "Sort the letters.": sorted(xs),
            "Swap the first and the last letter.": [xs[-1], *xs[1:-1], xs[0]],
        }[instruction]
        assert example.answer.split() == expected
        seen.add(instruction)
    assert len(seen) == 8


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_training_never_shows_a_held_out_prompt(domain):
    held_out = {e.prompt for e in tasks.test_examples(domain, 128)}
    assert len(held_out) == 128 and held_out == {e.prompt for e in tasks.test_examples(domain, 128)}
    assert not held_out & {e.prompt for e in some(domain, 5000 if domain != "recall" else 500)}


def test_text_is_split_by_content():
    train, test = tasks.text_chunks(), tasks.text_chunks("test")
    assert not set(train) & set(test) and 0.05 < len(test) / len(train) < 0.2 and sum(map(len, train)) > 1_000_000


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) + 3 for c in text]}


def test_only_answers_and_the_end_are_scored():
    ids, labels = tasks.encode_example(Letters(), tasks.Example((("1+1=", "2"), (" 3", "4"))))
    assert len(ids) == len(labels) == 10
    assert [l for l in labels if l != -100] == [ord("2") + 3, ord("4") + 3, 2]
    assert all(l in (-100, i) for i, l in zip(ids, labels, strict=True))


def test_packed_rows_restart_their_positions_and_follow_the_mixture():
    stream = tasks.training_documents(random.Random(0), Letters(), {"arithmetic": 0.5, "text": 0.5})
    rows = [tasks.packed_row(stream, 256) for _ in range(40)]
    text = 0
    for row in rows:
        assert {len(v) for v in row.values()} == {256}
        starts = [t for t, p in enumerate(row["position_ids"]) if p == 0]
        assert starts[0] == 0 and all(row["input_ids"][t] == 1 for t in starts)
        ends = [*starts[1:], 256]
        assert row["position_ids"] == [p for s, e in zip(starts, ends, strict=True) for p in range(e - s)]
        text += sum(e - s for s, e in zip(starts, ends, strict=True) if e - s > 24)
    assert 0.35 < text / (40 * 256) < 0.65


def test_bad_requests_are_named():
    with pytest.raises(DataError, match="domain='poetry'"):
        next(tasks.examples("poetry", 0))
    with pytest.raises(DataError, match="mixture"):
        next(tasks.training_documents(random.Random(0), Letters(), {"poetry": 1.0}))
    with pytest.raises(DataError, match="only .* distinct held-out prompts exist"):
        tasks.test_examples("arithmetic", 1900)
