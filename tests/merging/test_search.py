"""A search finds the weights that the measure likes best, keeps every candidate, goes on where it stopped, and does not
see the order of experts.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, verify_files
from xlstm_hybrid.errors import EvaluationError, MergeError
from xlstm_hybrid.evaluation.scores import win_and_tie
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.merging.search import (
    PARTS,
    Candidate,
    first_points,
    neighbours,
    search_merge,
    search_weights,
    simplex,
)
from xlstm_hybrid.reports.card import write_card

TEACHER = {"math": 0.8, "code": 0.6, "chat": 0.5}


def bowl(target):
    """Scores that fall off with the distance from `target`, the same for all benchmarks but for their teacher."""

    def score(weights):
        distance = sum((w - t) ** 2 for w, t in zip(weights, target, strict=True))
        return {task: score * (1 - distance / 2) for task, score in TEACHER.items()}

    return score


# --- points ----------------------------------------------------------------------------------------------------


def test_the_simplex_is_complete_and_without_repeats():
    points = list(simplex(3, 4))
    expected = {p for p in itertools.product(range(5), repeat=3) if sum(p) == 4}
    assert len(points) == len(expected) == 15 and set(points) == expected


def test_uniform_weights_and_single_experts_come_first_and_every_point_is_whole():
    points = first_points(4, 5, 1000)
    assert points[0] == (15, 15, 15, 15) and set(points[1:5]) == {
        tuple(60 * (j == k) for j in range(4)) for k in range(4)
    }
    assert (
        len(points) == len(set(points)) == 1 + 56
        and all(sum(p) == PARTS for p in points)
        and len(first_points(4, 5, 7)) == 7
    )
    assert sum(first_points(7, 5, 1)[0]) == PARTS


def test_neighbours_stay_on_the_simplex():
    found = list(neighbours((60, 0, 0), 12))
    assert found == [(48, 12, 0), (48, 0, 12)] and all(
        sum(p) == 60 and min(p) >= 0 for p in neighbours((5, 25, 30), 12)
    )
    assert (0, 30, 30) in neighbours((5, 25, 30), 12)  # all that there is


# --- searching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(0.35, 0.4, 0.25), (1.0, 0.0, 0.0), (0.0, 0.65, 0.35)])
def test_the_best_weights_of_a_bowl_are_found_to_a_sixtieth(target):
    found = search_weights(bowl(target), 3, TEACHER, budget=200)
    assert found.weights == pytest.approx(target, abs=1 / PARTS + 1e-9)
    best = min(found.candidates, key=Candidate.objective)
    assert best.weights == found.weights and len(found.candidates) < 120


def test_a_search_goes_on_while_a_step_helps():
    """From (15, 15, 15, 15) sixtieths two moves of three are wanted, which halving steps alone do not make."""
    target = (0.3, 0.3, 0.2, 0.2)
    assert search_weights(bowl(target), 4, TEACHER, parts=1, budget=400).weights == pytest.approx(target, abs=1e-9)


def test_the_verdict_of_each_candidate_is_the_measures_and_equal_ones_prefer_even_weights():
    seen = []

    def score(weights):
        seen.append(tuple(weights))
        return {"math": 0.9, "code": 0.3, "chat": 0.4 if weights[0] else 0.1}

    found = search_weights(score, 2, TEACHER, parts=2, budget=50)
    assert len(seen) == len(set(seen)) and found.weights == [0.5, 0.5]
    verdict = win_and_tie({"math": 0.9, "code": 0.3, "chat": 0.4}, TEACHER)
    assert (found.candidates[0].alpha_star, found.candidates[0].c_0) == (verdict.alpha_star, verdict.c_0)
    assert found.candidates[0].recovery == pytest.approx((1 + 0.5 + 0.8) / 3)  # a win counts as a tie does


def test_a_budget_is_kept_and_rounding_does_not_choose():
    calls = []
    search_weights(lambda w: calls.append(w) or bowl((0.3, 0.7))(w), 2, TEACHER, budget=4)
    assert len(calls) == 4
    jitter = iter(itertools.cycle((1e-13, -1e-13, 3e-13)))
    found = search_weights(lambda w: {t: s * (1 + next(jitter)) for t, s in TEACHER.items()}, 2, TEACHER, parts=2)
    assert found.weights == [0.5, 0.5]


@pytest.mark.parametrize(("count", "settings"), [(1, {}), (2, {"budget": 0}), (3, {"parts": 7})])
def test_settings_that_describe_no_search_are_refused(count, settings):
    with pytest.raises(MergeError, match=f"search: {count} experts"):
        search_weights(bowl((1,) * count), count, TEACHER, **settings)


def test_scores_on_other_benchmarks_than_the_teachers_are_refused():
    with pytest.raises(EvaluationError, match="chat has no score of the student"):
        search_weights(lambda w: {"math": 1, "code": 1}, 2, TEACHER)


# --- merging ---------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    folders = []
    for j, name in enumerate(("math", "code", "chat")):
        folder = tmp_path / "experts" / name
        folder.mkdir(parents=True)
        save_file({"w": torch.eye(3)[j].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "xlstm_hybrid"}))
        add_provenance(folder, f"distill:{name}", stages=[{"stage": "convert"}])
        folders.append(folder)
    return folders


def score(folder):
    """The merged tensor holds the weights themselves: math, code, chat."""
    return bowl((0.5, 0.3, 0.2))(load_file(folder / "model.safetensors")["w"].tolist())


def test_the_best_merge_is_written_with_every_candidate_in_its_record(experts, tmp_path):
    found = search_merge(experts, tmp_path / "out", score, TEACHER, calibration="12 prompts", budget=32)
    assert found.experts == ["math", "code", "chat"] and found.weights == pytest.approx((0.5, 0.3, 0.2), abs=0.02)
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.tensor(found.weights))
    verify_files(tmp_path / "out")
    kept = read_provenance(tmp_path / "out")[-1]["figures"]["search"]
    assert (
        len(kept["candidates"]) == len(found.candidates)
        and kept["calibration"] == "12 prompts"
        and kept["teacher_scores"] == TEACHER
    )
    assert kept["candidates"][0]["weight of math"] == pytest.approx(1 / 3) and set(TEACHER) < set(kept["candidates"][0])
    text = write_card(tmp_path / "out").read_text()
    assert "search.candidates:" in text and text.count("| weight of chat |") == 1
    rows = found.rows()
    assert rows[0][:6] == ["math", "code", "chat", "alpha*", "C_0", "recovery"] and len(rows) == 1 + len(
        found.candidates
    )
    assert [float(r[3]) for r in rows[1:]] == sorted(float(r[3]) for r in rows[1:])
    assert found.markdown().count("\n|") == len(rows) + 1  # and the line under the head


def test_the_order_of_the_experts_changes_neither_candidates_nor_result(experts, tmp_path):
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        found = search_merge([experts[j] for j in order], tmp_path / "out", score, TEACHER, budget=8, overwrite=True)
        results.append(
            (
                dict(zip(found.experts, found.weights, strict=True)),
                (tmp_path / "out" / "model.safetensors").read_bytes(),
            )
        )
        assert found.experts == [experts[j].name for j in order] and len(found.candidates) == 8
    assert results[0] == results[1]


def test_an_interrupted_search_goes_on_and_another_one_does_not(experts, tmp_path):
    table, calls = tmp_path / "search.json", []

    def failing(folder):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return score(folder)

    with pytest.raises(KeyboardInterrupt):
        search_merge(experts, tmp_path / "out", failing, TEACHER, budget=7, table=table)
    assert not (tmp_path / "out").exists() and len(json.loads(table.read_text())["points"]) == 4
    rest = []
    found = search_merge(
        experts, tmp_path / "out", lambda f: rest.append(1) or score(f), TEACHER, budget=7, table=str(table)
    )
    assert len(rest) == 3 and len(found.candidates) == 7
    whole = search_merge(experts, tmp_path / "again", score, TEACHER, budget=7)
    assert whole.weights == found.weights and [c.weights for c in whole.candidates] == [
        c.weights for c in found.candidates
    ]
    with pytest.raises(MergeError, match="search.json holds candidates of other experts, settings or scores"):
        search_merge(experts[:2], tmp_path / "more", score, TEACHER, table=table)
    with pytest.raises(MergeError, match="search.json holds candidates of other experts"):
        search_merge(experts, tmp_path / "more", score, TEACHER, table=table, calibration="other prompts")
    with pytest.raises(MergeError, match="search.json holds candidates of other experts, settings or scores"):
        search_merge(experts, tmp_path / "more", score, TEACHER | {"math": 0.9}, table=table)


def test_statistics_stay_with_their_experts(experts, tmp_path, monkeypatch):
    files, seen = [], []
    for expert in experts:
        files.append(tmp_path / f"{expert.name}.safetensors")
        files[-1].write_text(expert.name)

    def spy(ordered, out, *, statistics, **settings):
        seen.append([(Path(e).name, Path(s).stem) for e, s in zip(ordered, statistics, strict=True)])
        return merge(ordered, out, **settings)

    monkeypatch.setattr("xlstm_hybrid.merging.search.merge", spy)
    search_merge(experts, tmp_path / "out", score, TEACHER, budget=2, statistics=files)
    # two candidates and the result
    assert len(seen) == 3 and all(expert == measured for pairs in seen for expert, measured in pairs)


@pytest.mark.parametrize("content", ["{", '{"spec": 1}', "[]"])
def test_a_damaged_table_is_named(content, experts, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(MergeError, match="t.json"):
        search_merge(experts, tmp_path / "out", score, TEACHER, table=tmp_path / "t.json")


def test_weights_are_found_not_given_and_candidates_leave_nothing_behind(experts, tmp_path):
    with pytest.raises(MergeError, match="it finds the weights"):
        search_merge(experts, tmp_path / "out", score, TEACHER, weights=[1, 0, 0])
    (tmp_path / "work").mkdir()
    seen = []
    search_merge(
        experts[:2],
        tmp_path / "out",
        lambda f: seen.append(Path(f)) or dict.fromkeys(TEACHER, 0.5),
        TEACHER,
        budget=3,
        work=tmp_path / "work",
    )
    assert (
        len(seen) == 3
        and all((tmp_path / "work") in f.parents for f in seen)
        and list((tmp_path / "work").iterdir()) == []
    )
