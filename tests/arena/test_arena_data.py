"""The arena's language says what it is said to, and a fresh teacher holds the lookup that is laid into it."""

import numpy as np
import pytest
import torch

from xlstm_arena import data, teacher
from xlstm_hybrid.errors import ConfigError, DataError


def facts_of(ids):
    """{key: (value, place of the value)} of the facts in a row."""
    return {ids[t + 1]: (ids[t + 2], t + 2) for t in range(len(ids) - 2) if ids[t] == data.FACT}


@pytest.mark.parametrize("kind", data.LONG)
@pytest.mark.parametrize("length", [64, 300])
def test_every_answer_is_the_value_of_a_fact_at_the_stated_distance(kind, length):
    test = data.tests(kind, length, 20, seed=3)
    assert test["input_ids"].shape == (20, length)
    for ids, places, answers, depths in zip(
        *(test[k].tolist() for k in ("input_ids", "answer_at", "answers", "depth")), strict=True
    ):
        facts = facts_of(ids)
        for at, answer, depth in zip(places, answers, depths, strict=True):
            assert ids[at - 1] == data.ASK and facts[ids[at]] == (answer, at - depth)
            assert at + 1 == length or ids[at + 1] == answer


def test_needles_lie_at_uniform_depths():
    """So that the share of them inside a window is what coverage says."""
    depth = data.tests("single", 512, 2000, seed=1)["depth"].double() / 512
    counts = np.histogram(depth.numpy(), bins=5, range=(0, 1))[0] / 2000
    assert np.abs(counts - 0.2).max() < 0.04


@pytest.mark.parametrize("kind", data.SHORT)
def test_short_tests_fit_a_window_and_have_right_answers(kind):
    test = data.tests(kind, 9999, 50, seed=2)
    assert test["input_ids"].shape == (50, data.SHORT_LENGTH)
    for ids, places, answers in zip(*(test[k].tolist() for k in ("input_ids", "answer_at", "answers")), strict=True):
        numbers = [x - data.NUMBERS[0] for x in ids[places[0] - 4 : places[0]]]
        wanted = {
            "copy": numbers,
            "reverse": numbers[::-1],
            "max": [max(numbers[1:])],
            "add": [numbers[2] + numbers[3]],
        }
        if kind in wanted:
            assert [a - data.NUMBERS[0] for a in answers] == wanted[kind]
        elif kind == "lookup":
            assert facts_of(ids)[ids[places[0]]][0] == answers[0]
        else:
            assert answers == [int(data.SUCCESSORS[ids[p] - data.WORDS[0], 0]) for p in places]


def test_training_rows_score_what_can_be_known_and_nothing_else():
    for row in data.rows(5, 400, 10, recall_share=0.5):
        facts = {}
        for t, (word, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            before = row["input_ids"][max(0, t - 2) : t]
            if word in data.VALUES and before[0] == data.FACT:
                facts[before[1]] = word
                assert label == -100
            elif word in data.VALUES:
                assert label == word == facts[before[1]]
            elif word in data.KEYS or word < 10:
                assert label == -100
            else:
                assert label in (-100, word)


def test_rows_are_a_function_of_their_seed_and_the_recall_share_is_kept():
    assert data.rows(1, 100, 3) == data.rows(1, 100, 5)[:3] and data.rows(1, 100, 3) != data.rows(2, 100, 3)
    for share in (0.0, 0.2, 0.6):
        ids = np.array([row["input_ids"] for row in data.rows(0, 512, 20, recall_share=share)])
        assert abs(3 * np.isin(ids, (data.FACT, data.ASK)).mean() - share) < 0.03


def test_bad_requests_are_refused():
    for call in (
        lambda: data.rows(0, 1, 1),
        lambda: data.rows(0, 9, 1, recall_share=2),
        lambda: data.tests("poem", 64, 1),
        lambda: data.tests("single", 9, 1),
    ):
        with pytest.raises(DataError, match="expected"):
            call()
    with pytest.raises(ConfigError, match="expected one of llama"):
        teacher.untrained_teacher("gpt")


@pytest.mark.parametrize("family", list(teacher.FAMILIES))
def test_a_fresh_teacher_attends_to_the_word_before_and_to_the_fact_that_is_asked_for(family):
    model = teacher.untrained_teacher(family)
    model.config._attn_implementation = "eager"
    test = data.tests("single", 64, 8, seed=1)
    with torch.no_grad():
        first, second = model(input_ids=test["input_ids"], output_attentions=True, use_cache=False).attentions[:2]
    assert first[:, 0].diagonal(offset=-1, dim1=1, dim2=2).mean() > 0.8
    at, depth, rows = test["answer_at"][:, 0], test["depth"][:, 0], torch.arange(8)
    assert second[rows, 0, at, at - depth].mean() > 10 / 64  # far above the mean weight


def test_positions_jump_forwards_only_and_reach_the_longest_test():
    positions = teacher.jumping_positions(np.random.default_rng(0), 128, 200)
    steps = positions.diff(dim=1)
    assert (
        positions[:, 0].min() >= 0
        and bool((steps >= 1).all())
        and positions.max() < teacher.REACH + 128
        and positions.max() > 2000
    )


def test_training_a_teacher_writes_a_checkpoint_with_its_accuracies(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xlstm_hybrid.checkpoint.files import read_provenance, verify_files

    monkeypatch.setattr(teacher, "accuracies", lambda model: {"single": {64: 0.5}})
    stages = ({"length": 32, "rows": 2, "steps": 3, "recall_share": 0.5},)
    assert teacher.train_teacher("llama", tmp_path / "t", stages, progress=lambda text: None) == {"single": {64: 0.5}}
    verify_files(tmp_path / "t")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.vocab_size == data.VOCAB
    assert AutoTokenizer.from_pretrained(tmp_path / "t")("<5> <200>")["input_ids"] == [5, 200]
    assert read_provenance(tmp_path / "t")[0]["figures"]["accuracy"]["single"]["64"] == 0.5


def test_accuracies_are_right_about_a_model_that_knows_and_one_that_does_not():
    """A stand-in whose likeliest word is the answer itself."""
    tests = {k: data.tests(k, 64 if k in data.LONG else data.SHORT_LENGTH, 8, 100) for k in (*data.LONG, *data.SHORT)}
    known = {}
    for test in tests.values():
        for ids, at, answers in zip(*(test[k].tolist() for k in ("input_ids", "answer_at", "answers")), strict=True):
            known[tuple(ids)] = dict(zip(at, answers, strict=True))

    class Knows:
        device = "cpu"

        def __call__(self, input_ids, use_cache):
            words = torch.tensor(
                [[known.get(tuple(row), {}).get(t, 0) for t in range(len(row))] for row in input_ids.tolist()]
            )
            logits = torch.nn.functional.one_hot(words, data.VOCAB).float()
            return type("Out", (), {"logits": logits if self.right else logits.roll(1, -1)})

    for right in (True, False):
        model = Knows()
        model.right = right
        found = teacher.accuracies(model, lengths=(64,), count=8)
        assert {score for scores in found.values() for score in scores.values()} == {float(right)}
