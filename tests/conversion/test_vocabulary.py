"""Two tokenizers mean the same, or the first id that says otherwise is named."""

import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xlstm_hybrid.checkpoint.tokenizer import template_hash, tokenizer_hash
from xlstm_hybrid.data.vocabulary import first_difference, real_ids, shared_size, vocabulary_hash
from xlstm_hybrid.errors import ConfigError

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
WORDS = {f"w{n}": n for n in range(50)}


def tokenizer(words=WORDS, **special):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(dict(words), unk_token="w0")), **{"pad_token": "w0"} | special
    )


def test_ids_are_real_up_to_the_last_token():
    assert real_ids(WORDS) == real_ids(tokenizer()) == 50
    added = tokenizer()
    added.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert real_ids(added) == 51 and real_ids({"a": 0, "b": 7}) == 8


@pytest.mark.parametrize(
    "sizes, wanted", [((64, 50), 50), ((50, 64), 50), ((64, 128), 50), ((64, 64), 64), ((50, 50), 50)]
)
def test_heads_of_different_size_are_compared_on_the_real_ids_and_equal_ones_as_they_are(sizes, wanted):
    """As Qwen2.5's 151,936 and 152,064 rows over 151,665 tokens."""
    assert shared_size(*sizes, tokenizer(), WORDS) == wanted


def test_without_tokenizers_only_equal_sizes_are_accepted():
    assert shared_size(64, 64) == 64
    with pytest.raises(
        ConfigError, match="the student's vocabulary has 50 tokens, the teacher's 64: pass teacher_tokenizer"
    ):
        shared_size(50, 64, student_tokenizer=WORDS)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w | {"x": 7, "w7": 8, "w8": 9, "w9": 50},
            r"first at id 7: 'w7' for the student, 'x' for the teacher",
        ),
        (lambda w: w | {"<think>": 50}, r"first at id 50: no token for the student, '<think>' for the teacher"),
        (
            lambda w: {t: i for t, i in w.items() if i != 3},
            r"first at id 3: 'w3' for the student, no token for the teacher",
        ),
        (lambda w: w | {"w20": 21, "w21": 20}, "first at id 20: 'w20' for the student, 'w21' for the teacher"),
    ],
)
def test_the_first_id_with_two_meanings_is_named_whatever_the_sizes(change, message):
    for sizes in (64, 64), (64, 128):
        with pytest.raises(ConfigError, match=message):
            shared_size(*sizes, WORDS, change(WORDS))
    assert first_difference(WORDS, dict(reversed(WORDS.items()))) is None


def test_tokens_without_a_row_are_refused():
    for sizes, name in ((40, 64), "student"), ((64, 40), "teacher"):
        with pytest.raises(ConfigError, match=f"the tokenizer has 50 ids, the {name}'s LM head 40 rows"):
            shared_size(*sizes, WORDS, WORDS)
    with pytest.raises(ConfigError, match="the tokenizer has no tokens"):
        real_ids({})


def test_hashes_change_with_what_they_are_of_and_with_nothing_else():
    tiny = AutoTokenizer.from_pretrained(TINY)
    before = vocabulary_hash(tiny), tokenizer_hash(tiny), template_hash(tiny)
    tiny("some text", padding="max_length", max_length=16, truncation=True)  # leaves its settings in the tokenizer
    assert (vocabulary_hash(tiny), tokenizer_hash(tiny), template_hash(tiny)) == before
    other = copy.deepcopy(tiny)
    other.chat_template = tiny.chat_template + " "
    assert (
        template_hash(other) != before[2] and tokenizer_hash(other) == before[1] and template_hash(tokenizer()) is None
    )
    other.backend_tokenizer.normalizer = (
        None if tiny.backend_tokenizer.normalizer else __import__("tokenizers").normalizers.Lowercase()
    )
    assert tokenizer_hash(other) != before[1] and vocabulary_hash(other) == before[0]
    assert tokenizer_hash(tokenizer(eos_token="w1")) != tokenizer_hash(tokenizer(eos_token="w2"))
    assert vocabulary_hash(tokenizer(eos_token="w1")) == vocabulary_hash(WORDS) != vocabulary_hash(WORDS | {"w50": 50})
