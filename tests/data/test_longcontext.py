"""Long-context tasks: prompts of an exact length whose answers follow from their text, and the figures that are printed
with their scores.
"""

import json
import lzma
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xlstm_hybrid.data.long_context import (
    KINDS,
    by_depth,
    coverage,
    dataset,
    documents,
    excess,
    hits_of,
    process_results,
    sentences,
)
from xlstm_hybrid.errors import DataError, EvaluationError

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"


@pytest.fixture(scope="module")
def pieces():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def words():
    """A token per word or mark, blanks dropped: unlike the pieces, some fillers add nothing."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_exactly_the_tokens_that_were_asked_for(kind, pieces, words):
    for tokenizer, lengths in ((pieces, (700, 1024, 2047)), (words, (200, 1001, 4096))):
        for length in lengths:
            for doc in documents(tokenizer, kind, length, samples=3):
                assert len(tokenizer(doc["prompt"])["input_ids"]) == length == doc["length"]


def test_an_exact_length_is_found_where_fillers_do_not_add_one_token_each():
    def triples(text, verbose=True):
        """A token per three characters: four fillers of four letters add about five."""
        return {"input_ids": [text[j : j + 3] for j in range(0, len(text), 3)]}

    for kind in KINDS:
        for length in range(300, 312):
            assert len(triples(documents(triples, kind, length, samples=1)[0]["prompt"])["input_ids"]) == length


def test_a_needle_stands_once_at_its_distance_and_the_question_names_its_city(words):
    for doc in [*documents(words, "needle", 500, samples=10), *documents(words, "multikey", 500, samples=10)]:
        city = re.search(r"what is the pass key of (\w+)\?", doc["prompt"])[1]
        hidden = re.findall(r"The pass key of (\w+) is (\d+)\.", doc["prompt"])
        assert dict(hidden)[city] == doc["answers"][0] == doc["answer"].strip()
        assert len(hidden) == len(dict(hidden)) == {"needle": 1, "multikey": 4}[doc["kind"]]
        before = doc["prompt"].index(f" The pass key of {city} is {doc['answers'][0]}")
        assert doc["distances"] == [len(words(doc["prompt"][before:])["input_ids"])]


def test_the_values_that_are_asked_for_come_from_every_quarter_of_the_pairs(words):
    for length in (60, 61, 300, 1000):
        for doc in documents(words, "recall", length, samples=8):
            pairs = re.findall(r"\n(\w+) = (\d+)", doc["prompt"])
            asked = re.search(r"values of (.*)\?", doc["prompt"])[1].split(", ")
            assert [dict(pairs)[key] for key in asked] == doc["answers"] and len(dict(pairs)) == len(pairs)
            keys = [key for key, _ in pairs]
            assert sorted(next(q for q in range(4) if keys.index(k) < len(keys) * (q + 1) // 4) for k in asked) == [
                0,
                1,
                2,
                3,
            ]


def test_the_variables_of_the_answer_are_those_that_hold_the_value(words):
    for hops in (None, 2):
        for doc in documents(words, "variables", 600, samples=10, hops=hops):
            held, (shown, own) = {}, doc["prompt"].rsplit("Text:", 1)  # an example stands before, as in RULER
            for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", own):
                held[name] = number or held[source]  # KeyError if a link stood before the one that it refers to
            value = re.search(r"hold the value (\d+)", own)[1]
            assert [name for name, v in held.items() if v == value] == doc["answers"]
            assert len(held) == (hops or 4) + 1 and value not in shown and not [n for n in held if n in shown]
            assert doc["prompt"].endswith("are VAR") and doc["answer"] == " " + ", VAR ".join(doc["answers"])
    for kind, hops in (("needle", 2), ("variables", 0)):
        with pytest.raises(DataError, match=f"{kind}, hops={hops}: expected at least 1"):
            documents(words, kind, 600, 1, hops=hops)


def test_depths_are_where_they_were_asked_for(words):
    depth = [1 - doc["distances"][0] / 2000 for doc in documents(words, "needle", 2000, samples=6, depths=(0, 0.5, 1))]
    assert depth == pytest.approx([0, 0.5, 1] * 2, abs=0.05)
    drawn = [1 - doc["distances"][0] / 4000 for doc in documents(words, "needle", 4000, samples=20, depths=20)]
    # one in every part, to a line
    assert all(j / 20 - 0.015 <= d <= (j + 1) / 20 + 0.015 for j, d in enumerate(sorted(drawn)))
    # the first few are not all at one end
    assert min(abs(a - b) for a, b in zip(drawn, drawn[1:], strict=False)) > 0.25


# --- a real text -------------------------------------------------------------------------------------------------

COUNTED = [f"Stone {n} of the wall has {n * n} marks, and nobody\n  counts   them twice." for n in range(900)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text whose sentences name their own place."""
    file = tmp_path_factory.mktemp("text") / "wall.txt"
    file.write_text("\n\n".join(COUNTED), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["needle", "multikey", "variables"])
def test_answers_are_hidden_between_the_sentences_of_a_real_text(kind, text, pieces, words):
    whole = "".join(" " + " ".join(sentence.split()) for sentence in COUNTED * 2)
    for tokenizer, length in ((words, 700), (pieces, 1500)):
        for doc in documents(tokenizer, kind, length, samples=4, haystack=text):
            assert len(tokenizer(doc["prompt"])["input_ids"]) == length
            body = re.split(r"Text:|Remember them\.\n(?! *Text)", doc["prompt"])[-1].rpartition("\nQuestion")[0]
            left, count = re.subn(r" (?:The pass key of \w+ is \d+|VAR \w+ = (?:VAR )?\w+)\.", "", body)
            left = re.sub(r"(?: and| so| the| \.)*$", "", left)  # what fills the last few tokens
            assert count == {"needle": 1, "multikey": 4}.get(kind, 5) and len(left) > 1000
            assert left in whole and left.startswith(" Stone ")  # nothing is missing, and no word stands elsewhere
            # a fact stands between two sentences
            assert not re.search(r"[^.\n] (?:The pass key|VAR \w+ =)", body)


def test_a_needle_in_a_real_text_lies_at_its_depth_in_tokens_though_sentences_differ(words, tmp_path):
    file = tmp_path / "uneven.txt"
    file.write_text(" ".join("Short one. " * 40 + "A sentence of many words " * 5 + "ends here." for _ in range(40)))
    found = documents(words, "needle", 2000, samples=5, depths=(0, 0.25, 0.5, 0.75, 1), haystack=file)
    depth = [1 - doc["distances"][0] / 2000 for doc in found]
    assert depth == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)


def test_rows_of_json_and_compressed_files_hold_the_same_text(text, tmp_path):
    rows = "".join(json.dumps({"text": sentence, "number": n}) + "\n" for n, sentence in enumerate(COUNTED))
    (tmp_path / "wall.jsonl").write_text(rows, encoding="utf-8")
    for name, content in (("wall.jsonl.xz", rows), ("wall.txt.xz", text.read_text(encoding="utf-8"))):
        (tmp_path / name).write_bytes(lzma.compress(content.encode()))
    plain = [*sentences(str(text))]
    assert plain[3] == [
        " Stone",
        " 3",
        " of",
        " the",
        " wall",
        " has",
        " 9",
        " marks,",
        " and",
        " nobody",
        *plain[3][10:],
    ]
    assert plain[3][10:] == [" counts", " them", " twice."] and len(plain) == 900
    for name in ("wall.jsonl", "wall.jsonl.xz", "wall.txt.xz"):
        assert sentences(str(tmp_path / name)) == plain, name


def test_rules_of_tables_and_endless_sentences_are_cut(tmp_path):
    file = tmp_path / "table.txt"
    file.write_text(f"A title\n{'=' * 40}\n" + "cell " * 70 + "\nhttps://example.org/" + "long" * 20)
    assert [len(words) for words in sentences(str(file))] == [30, 30, 12]


def test_a_haystack_that_cannot_serve_is_refused_with_its_reason(words, text, tmp_path):
    for name, content in (
        ("rows.jsonl", b'{"words": "no text"}\n'),
        ("torn.jsonl.xz", lzma.compress(b'{"text": "a"}' * 50)[:40]),
        ("latin.txt", "Müller".encode("latin-1")),
        ("blank.txt", b" \n"),
        ("number.jsonl", b'{"text": 7}\n'),
        ("short.txt", b"Nothing but one sentence."),
    ):
        (tmp_path / name).write_bytes(content)
    for name, said in (
        ("gone.txt", "gone.txt: no such file"),
        ("rows.jsonl", "rows.jsonl: cannot be read"),
        ("torn.jsonl.xz", "torn.jsonl.xz: cannot be read"),
        ("latin.txt", "latin.txt: cannot be read"),
        ("number.jsonl", "number.jsonl: cannot be read"),
        ("blank.txt", "blank.txt: found no text"),
        ("short.txt", "haystack of 4 words: 400 tokens take about"),
    ):
        with pytest.raises(DataError, match=said):
            documents(words, "needle", 400, 1, haystack=tmp_path / name)
    with pytest.raises(DataError, match="recall: .*haystack would be ignored"):
        documents(words, "recall", 400, 1, haystack=text)


def test_documents_depend_on_the_seed_and_on_nothing_else(words):
    first, again, other = (documents(words, "multikey", 300, samples=4, seed=s) for s in (0, 0, 1))
    assert first == again and not {d["prompt"] for d in first} & {d["prompt"] for d in other}
    assert first[:2] == documents(words, "multikey", 300, samples=2)  # more samples keep the ones before


def test_a_model_that_sees_the_window_only_scores_the_coverage_and_no_excess(words):
    window, length = 600, 2000
    docs = documents(words, "needle", length, samples=200, depths=200)
    seen = [d["distances"][0] <= window for d in docs]
    score, covered = sum(seen) / len(seen), coverage(length, window)
    assert score == pytest.approx(covered, abs=0.03)  # the question itself lies in the window
    assert excess(score, covered) == pytest.approx(0, abs=0.04) and excess(1, covered) == 1


def test_excess_of_the_published_scores_is_what_the_arithmetic_says():
    scores = {1024: 0.686, 4096: 0.148, 8192: 0.078, 16384: 0.024}  # Hauzenberger et al. 2026, window 512 and 4 sinks
    found = [round(excess(s, coverage(n, 512, 4)), 3) for n, s in scores.items()]
    assert found == [0.367, 0.025, 0.016, -0.008]
    assert coverage(100, 512, 4) == coverage(10**6, None) == 1 and excess(0.4, 1.0) is None


def test_only_as_many_answers_count_as_were_asked_for():
    assert hits_of(" 1111, 2222.", ["2222", "3333"]) == [True, False]
    assert hits_of(" 4444, 5555, 2222, 3333", ["2222", "3333"]) == [False, False]  # listing everything earns nothing
    assert hits_of(" 11112222", ["1111"]) == [False] == hits_of("", ["1111"])
    assert hits_of(" VAR ABCDE, and FGHIJ", ["FGHIJ", "ABCDE"]) == [True, True]
    assert process_results({"answers": ["12", "34"]}, [" 34, 56"]) == {"recall": 0.5, "exact_match": 0.0}
    assert process_results({"answers": ["12", "34"]}, [" 34, 12"]) == {"recall": 1.0, "exact_match": 1.0}


def test_recall_is_told_apart_by_depth():
    samples = [
        {"doc": {"answers": ["12"], "distances": [d], "length": 100}, "filtered_resps": [out]}
        for d, out in ((95, "12"), (5, "12"), (8, "1"))
    ]
    assert by_depth(samples, parts=2) == [
        {"from": 0.0, "to": 0.5, "answers": 1, "recall": 1.0},
        {"from": 0.5, "to": 1.0, "answers": 2, "recall": 0.5},
    ]


def test_what_cannot_be_made_is_refused_with_its_reason(words):
    for arguments, text in (
        (("haystack", 100), "needle, multikey"),
        (("needle", 100, 0), "samples=0"),
        (("needle", 100, 1, (1.5,)), "between 0 and 1"),
        (("needle", 100, 1, 0), "depths=0"),
        (("needle", 20), r"at least \d+ tokens"),
    ):
        with pytest.raises(DataError, match=text):
            documents(words, *arguments)
    with pytest.raises(DataError, match="tokenizer"):
        dataset("needle", 100)
    with pytest.raises(EvaluationError, match="score=1.2"):
        excess(1.2, 0.5)
