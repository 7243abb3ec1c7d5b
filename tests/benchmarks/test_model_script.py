"""`benchmarks/model.py`: all of its parts at a tiny shape, and that a red check leaves no figure."""

import json

import model
import pytest
import torch

from xlstm_hybrid.evaluation.equivalence import Result

SMALL = ["--shape", "tiny", "--window", "16", "--contexts", "24", "--batches", "2", "--caches", "dynamic,static"]
SMALL += ["--dtypes", "float32", "--threads", "1", "--rounds", "1", "--steps", "2", "--check", "40"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "BYTES_AT", (8, 64))
        model.main(
            [*SMALL, "--training", "16", "--no-memory", "--out", f"{folder}/m.json", "--picture", f"{folder}/m.png"]
        )
    assert (folder / "m.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "m.json").read_text())


def rows(results, part):
    return [row for row in results["rows"] if row["part"] == part]


def test_every_part_has_its_rows_behind_green_checks(results):
    assert [row["name"] for row in results["checks"]] == [
        f"{side}: prompt and steps = one call, {cache} cache"
        for side in ("teacher", "student")
        for cache in ("dynamic", "static")
    ]
    assert [(row["batch"], row["tokens"]) for row in rows(results, "prefill")] == [(2, 24)]
    assert [row["cache"] for row in rows(results, "decode")] == ["dynamic", "static"]
    assert [row["stage"] for row in rows(results, "training")] == ["align", "distill"]
    (row,), step = rows(results, "prefill"), rows(results, "training")[0]
    assert row["gain"]["seconds"] == row["teacher"]["seconds"] / row["student"]["seconds"]
    assert step["multiple"] == step["student"]["seconds"] / step["teacher"]["seconds"]
    assert {"machine", "versions", "commit", "settings", "student", "teacher"} <= results.keys()


def test_bytes_are_those_of_the_teachers_keys_and_values(results):
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, groups, head dim, bytes
    assert [(row["tokens"], row["teacher"]) for row in rows(results, "cache")] == [
        (8, 8 * per_token),
        (64, 64 * per_token),
    ]


def test_calls_count_the_operations_of_a_step():
    with model.Calls() as counted:
        torch.ones(3).add_(1).sum()
    assert counted.count == 3


def test_a_red_check_leaves_no_figure(tmp_path, monkeypatch, capsys):
    red = Result("the student: wrong", 1.0, 0.1, "float32", 0.0)
    monkeypatch.setattr(model, "gate", lambda *_: iter([red]))
    with pytest.raises(SystemExit, match="no figures, because 1 of 1 checks failed: the student: wrong"):
        model.main([*SMALL, "--out", str(tmp_path / "m.json")])
    assert not (tmp_path / "m.json").exists() and "|" not in capsys.readouterr().out


def test_earlier_results_are_drawn_beside_these(results):
    earlier = {
        "rows": [{**row, "gain": {"seconds": 0.5}} for row in rows(results, "decode") if row["cache"] == "static"]
    }
    lines = model.draw(results, earlier).axes[1].get_lines()
    found = {line.get_label(): line.get_ydata().tolist() for line in lines if not line.get_label().startswith("_")}
    dynamic, static = rows(results, "decode")
    name = "float32, 1 thread, batch 2, "
    assert found == {
        name + "dynamic": [dynamic["gain"]["seconds"]],
        name + "static": [static["gain"]["seconds"]],
        name + "static, before": [0.5],
    }
    colours = {line.get_label(): line.get_color() for line in lines}
    assert colours[name + "static"] == colours[name + "static, before"] != colours[name + "dynamic"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "prefil"], "--parts: ['prefil'], expected some of prefill, decode, cache, calls, training"),
        (["--student", "somewhere"], "expected both checkpoints"),
        (["--contexts", "0"], "expected at least 1 of each"),
        (["--before", "nowhere.json"], "--before nowhere.json: no such file"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        model.main(words)
    assert said in capsys.readouterr().err
