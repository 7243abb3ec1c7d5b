"""Recall over the bytes of the cache, of the arena's small models and of a real one, in one picture."""

import importlib.util
import json
from pathlib import Path

import pytest

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.reports.plots import MEANING, as_png
from xlstm_hybrid.reports.recall_bytes import curve_of_harness, curves_of_arena, draw_recall_bytes

ROOT = Path(__file__).parents[2]
ARENA = json.loads((ROOT / "docs/arena/results.json").read_text())


def results(folder, window, figures):
    """A folder as `harness` writes it; figures: {length: (recall, bytes)}."""
    for length, (recall, size) in figures.items():
        covered = 1.0 if window is None else (window + 4) / length
        found = {"length": length, "window": window, "coverage": covered, "recall": recall, "cache_bytes": size}
        (folder / f"needle_{length}").mkdir(parents=True)
        write_json(folder / f"needle_{length}/harness.json", {"long_context": found})
    return folder


@pytest.fixture
def real(tmp_path):
    """Two students of window 64 and their teacher, made up."""
    teacher = results(tmp_path / "teacher", None, {512: (1.0, 4000), 1024: (0.9, 8000)})
    plain = results(tmp_path / "plain", 64, {512: (0.25, 1000), 1024: (0.125, 1000), 2048: (0.0, 1000)})
    kept = results(tmp_path / "kept", 64, {512: (0.75, 1040), 1024: (0.5, 1080)})
    return teacher, {"plain": plain, "1 group": kept}


def test_bytes_are_a_share_of_the_teachers_at_the_same_length(real):
    points = {(p["name"], p["windows"]): p for p in curve_of_harness(*real)}
    assert {key: (p["share"], p["recall"]) for key, p in points.items()} == {
        ("plain", 8): (0.25, 0.25),
        ("plain", 16): (0.125, 0.125),
        ("1 group", 8): (0.26, 0.75),
        ("1 group", 16): (0.135, 0.5),
        ("teacher", 8): (1.0, 1.0),
        ("teacher", 16): (1.0, 0.9),
    }  # the teacher has no 2,048
    assert points["plain", 16]["coverage"] == 68 / 1024 and points["teacher", 8]["coverage"] is None


def test_curves_of_the_arena_are_its_figures():
    curves, rows = curves_of_arena(ARENA), {row["name"]: row for row in ARENA["teachers"]["llama"]["rows"]}
    assert list(curves) == ["llama (2M parameters)", "qwen3 (2M parameters)", "olmo2 (3M parameters)"]
    (kept,) = (p for p in curves["llama (2M parameters)"] if p["name"] == "kept-1" and p["windows"] == 16)
    assert kept["recall"] == rows["kept-1"]["recall"]["single"]["512"]["accuracy"]["mean"] and not kept["real"]
    assert kept["share"] == rows["kept-1"]["cache_bytes"]["512"] / rows["teacher"]["cache_bytes"]["512"] < 1


def test_the_real_model_is_blue_and_small_ones_are_not(real):
    curves = {"a real model": curve_of_harness(*real), **curves_of_arena(ARENA)}
    drawn = draw_recall_bytes(curves)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in drawn.axes] == [
        "8 windows",
        "16 windows",
        "32 windows",
    ]
    lines = {line.get_label(): line for line in drawn.axes[1].lines if not line.get_label().startswith("_")}
    assert list(lines) == list(curves) and drawn.axes[1].get_xscale() == "log"
    assert lines["a real model"].get_color() == MEANING["student"]
    assert len({line.get_color() for line in lines.values()}) == len(lines)
    assert list(lines["a real model"].get_xdata()) == [0.125, 0.135, 1.0]
    assert list(lines["a real model"].get_ydata()) == [0.125, 0.5, 0.9]
    (covered,) = (line for line in drawn.axes[1].lines if line.get_linestyle() == ":")
    assert covered.get_ydata()[0] == 68 / 1024
    assert "a real model" not in [line.get_label() for line in drawn.axes[2].lines]  # nothing of it at 2,048
    assert as_png(draw_recall_bytes, curves).startswith(b"\x89PNG")
    assert draw_recall_bytes(curves, windows=(3,)) is None


def test_what_cannot_be_compared_is_refused(real, tmp_path):
    teacher, students = real
    other = results(tmp_path / "other", 64, {4096: (0.1, 1000)})
    with pytest.raises(EvaluationError, match="needle: teacher and other have no length in common"):
        curve_of_harness(teacher, {"other": other})
    with pytest.raises(EvaluationError, match="teacher: a model without a window"):
        curve_of_harness(teacher, {"itself": teacher})


def test_groups_are_given_back_to_a_student_and_measured_beside_its_teacher(tmp_path):
    pytest.importorskip("lm_eval")
    from xlstm_hybrid import convert

    tiny = ROOT / "recipes/tiny_teacher/tiny-llama"
    convert(tiny, tmp_path / "student", sliding_window=32, num_sink_tokens=4)
    groups = [{"layer": j, "group": g, "gain": 1.0 - j} for g in range(2) for j in (1, 0, 3)]
    write_json(tmp_path / "ranking.json", {"layers": 4, "key_value_heads": 2, "groups": groups})
    spec = importlib.util.spec_from_file_location("kept_groups", ROOT / "benchmarks/kept_groups.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    where = {"--ranking": tmp_path / "ranking.json", "--work": tmp_path / "work", "--out": tmp_path / "kept.json"}
    asked = where | {"--groups": "0,3", "--lengths": "512", "--samples": "2", "--picture": tmp_path / "kept.png"}
    module.main([str(tmp_path / "student"), str(tiny), *(str(x) for pair in asked.items() for x in pair)])
    found = json.loads((tmp_path / "kept.json").read_text())
    assert [row["kept_groups"] for row in found["rows"]] == [[[], [], [], []], [[0], [0], [], [0]]]
    none, three = (row["cache_bytes"] for row in found["rows"])
    assert three > none and [p["name"] for p in found["points"]] == ["0 groups", "teacher", "3 groups"]
    assert found["points"][0]["share"] == none / (4 * 2 * 2 * 64 * 512 * 4)
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
