"""Tests and intervals are those of the textbooks: exact where they can be, of the promised coverage where they are
drawn.
"""

import math

import numpy as np
import pytest

from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.scores import win_and_tie
from xlstm_hybrid.evaluation.significance import (
    above_chance,
    compare_pairs,
    document_keys,
    holm,
    interval,
    mcnemar,
    resampled_means,
    resampled_verdict,
    sample_values,
    sign_flip,
)


def outcomes(both, gained, lost, neither):
    """Answers of student and teacher with these numbers of documents."""
    return [1] * both + [1] * gained + [0] * lost + [0] * neither, [1] * both + [0] * gained + [1] * lost + [
        0
    ] * neither


# --- tests -----------------------------------------------------------------------------------------------------


def test_mcnemar_is_a_fair_coin_over_the_documents_that_differ():
    assert mcnemar(*outcomes(50, 0, 0, 10)) == (0, 0, 1.0)
    assert mcnemar(*outcomes(50, 1, 1, 10)) == (1, 1, 1.0)
    gained, lost, p = mcnemar(*outcomes(7, 1, 9, 3))
    assert (gained, lost) == (1, 9) and p == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(*outcomes(0, 9, 1, 0))[2] == p  # two-sided


@pytest.mark.parametrize(("gained", "lost"), [(3, 5), (40, 61), (1000, 1100), (0, 3000)])
def test_mcnemar_agrees_with_scipy_at_any_size(gained, lost):
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(*outcomes(5, gained, lost, 5))[2] == pytest.approx(
        stats.binomtest(gained, gained + lost).pvalue, rel=1e-9, abs=1e-300
    )


def test_random_signs_agree_with_all_signs():
    student, teacher = [0.9, 0.4, 0.8, 0.7, 0.55, 0.61, 0.3], [0.5, 0.45, 0.35, 0.5, 0.5, 0.2, 0.32]
    difference = np.subtract(student, teacher)
    signs = np.array([[1 - 2 * (j >> n & 1) for n in range(7)] for j in range(2**7)])
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12)
    assert sign_flip(student, teacher, resamples=40_000) == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))
    assert sign_flip([1, 0.5], [1, 0.5]) == 1.0


def test_random_signs_of_right_and_wrong_answers_give_mcnemars_p():
    pairs = outcomes(30, 6, 15, 20)
    assert sign_flip(*pairs, resamples=40_000) == pytest.approx(mcnemar(*pairs)[2], abs=0.01)


def test_holm_corrects_a_family_in_its_own_order():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


# --- resampling ------------------------------------------------------------------------------------------------


def test_resampled_means_have_the_mean_and_variance_of_the_bootstrap_and_keep_pairs_together():
    for student, teacher in (outcomes(40, 10, 20, 30), (np.linspace(0, 1, 100) ** 2, np.linspace(1, 0.2, 100))):
        s, t = resampled_means(student, teacher, resamples=20_000)
        for drawn, given in ((s, student), (t, teacher)):
            assert drawn.mean() == pytest.approx(np.mean(given), abs=4 * np.std(given) / 10 / math.sqrt(20_000))
            assert drawn.std() == pytest.approx(np.std(given) / 10, rel=0.03)
        assert np.cov(s, t)[0, 1] == pytest.approx(np.cov(student, teacher, bias=True)[0, 1] / 100, rel=0.1)


def test_draws_belong_to_seed_and_benchmark_and_to_nothing_else():
    pairs = outcomes(40, 10, 20, 30)
    one, again = (resampled_means(*pairs, name="gsm8k")[0] for _ in range(2))
    assert np.array_equal(one, again)
    for other in ({"name": "mmlu"}, {"name": "gsm8k", "seed": 1}):
        assert not np.array_equal(one, resampled_means(*pairs, **other)[0])


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        teacher = random.random(200) < 0.6
        student = np.where(random.random(200) < 0.8, teacher, random.random(200) < 0.5)
        low, high = compare_pairs(student, teacher, resamples=1000, name=str(trial))["difference"]
        covered += low <= 0.8 * 0.6 + 0.2 * 0.5 - 0.6 <= high
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_what_a_benchmark_says():
    found = compare_pairs(*outcomes(60, 5, 15, 20), name="t")
    assert found["documents"] == 100 and (found["gained"], found["lost"]) == (5, 15) and found["test"] == "McNemar"
    assert found["p"] == mcnemar(*outcomes(60, 5, 15, 20))[2]
    assert (
        found["difference"][0] < -0.1 < found["difference"][1] < 0.02
        and found["recovery"][0] < 65 / 75 < found["recovery"][1]
    )
    assert compare_pairs([0.5, 0.2], [0.4, 0.3])["test"] == "sign flip"
    assert compare_pairs([1, 0], [0, 0])["recovery"] is None  # a teacher that scores nothing


def test_an_interval_of_known_values():
    assert interval(np.arange(1, 101), level=0.9) == [5.0, 95.0] and interval([1.0, math.inf], level=0.9) is None


def test_a_verdict_is_resampled_benchmark_by_benchmark():
    pairs = {"a": outcomes(50, 0, 0, 50), "b": outcomes(40, 0, 40, 20), "c": outcomes(70, 5, 5, 20)}
    found = resampled_verdict(pairs, 0.0)
    # a ties, b is lost, c decides: the difference of two counts of 5 on average
    at_least_tied = 0.5 + 0.5 / math.sqrt(2 * math.pi * 10)
    assert found["lossless"] == pytest.approx(at_least_tied, abs=0.02)
    assert (
        found["alpha_star"][0] == 0
        and 0 < found["alpha_star"][1] < 0.15
        and found["c_alpha"] == found["c_0"] == [1 / 3, 2 / 3]
    )
    assert resampled_verdict(pairs, 0.2)["lossless"] > 0.999
    turned = resampled_verdict(dict(reversed(pairs.items())), 0.0)
    assert turned == found


def test_a_resampled_verdict_rests_on_the_same_definition():
    """With documents that are all alike nothing varies, and the interval is the value itself."""
    pairs = {
        "a": ([0.8] * 5, [1.0] * 5),
        "b": ([0.5] * 5, [0.5] * 5),
        "c": ([0.1] * 5, [0.4] * 5),
        "d": ([0.3] * 5, [0.0] * 5),
    }
    found, verdict = (
        resampled_verdict(pairs, 0.2),
        win_and_tie({k: v[0][0] for k, v in pairs.items()}, {k: v[1][0] for k, v in pairs.items()}, [0.2]),
    )
    assert found["alpha_star"] == [verdict.alpha_star] * 2 and found["c_alpha"] == [verdict.curve[0]] * 2 == [0.75] * 2
    assert found["c_0"] == [verdict.c_0] * 2 == [0.5] * 2  # whatever the tolerance


@pytest.mark.parametrize(("student", "teacher"), [([], []), ([1], [1, 0]), ([math.nan], [1]), ([[1]], [[1]])])
def test_what_is_no_pair_is_refused(student, teacher):
    with pytest.raises(EvaluationError, match="paired statistics: .* values of the student"):
        compare_pairs(student, teacher)


def test_scores_between_right_and_wrong_have_no_mcnemar_test():
    with pytest.raises(EvaluationError, match="mcnemar: expected values of 0 and 1 only"):
        mcnemar([0.5], [1])


# --- documents -------------------------------------------------------------------------------------------------


def test_equal_documents_are_told_apart_by_their_number():
    assert list(document_keys(["x", "y", "x"])) == [("x", 1), ("y", 1), ("x", 2)]


def test_samples_are_read_filter_by_filter_in_the_order_of_their_documents():
    rows = [
        {"doc_id": j, "doc_hash": h, "filter": f, "metrics": ["em", "odd"], "em": e, "odd": [1], "prompt_hash": f"p{j}"}
        for j, h, f, e in (
            (1, "x", "strict", True),
            (0, "x", "strict", 0),
            (1, "x", "loose", 1.0),
            (0, "x", "loose", 1.0),
        )
    ]
    values, prompts = sample_values(rows)
    # lists are no scores
    assert values == {"em,strict": {("x", 1): 0.0, ("x", 2): 1.0}, "em,loose": {("x", 1): 1.0, ("x", 2): 1.0}}
    assert prompts == {("x", 1): "p0", ("x", 2): "p1"}


# --- chance ----------------------------------------------------------------------------------------------------


def test_a_score_is_above_chance_by_1_96_standard_errors():
    bar = 0.25 + 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert 0.29 < bar < 0.3 and above_chance(0.3, 0.25, documents=400) and not above_chance(0.3, 0.25, documents=300)
    assert above_chance(0.3, 0.25) and not above_chance(0.25, 0.25)  # how many documents is not known
    values = [0.3] * 4  # scores that do not differ have no error
    assert above_chance(0.3, 0.25, values=values) and not above_chance(0.3, 0.25, values=[0.0, 0.0, 0.2, 1.0])


def test_where_chance_is_zero_one_right_answer_is_above_it():
    assert above_chance(0.001, 0.0, documents=1000) and not above_chance(0.0, 0.0, documents=1000)
    assert above_chance(48.4, 0.25, documents=9) and not above_chance(0.0, None)  # a score in percent; nothing known
