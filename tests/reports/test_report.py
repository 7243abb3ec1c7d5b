"""A report shows the numbers of a run and no others; a part that the run lacks is left out."""

import copy
import io
import math
import struct
import sys

import pytest

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.reports import comparison
from xlstm_hybrid.reports import run as report
from xlstm_hybrid.reports.run import report_markdown as markdown
from xlstm_hybrid.reports.run import score_table, write_report
from xlstm_hybrid.reports.sections import time_rows
from xlstm_hybrid.reports.text import terminal_table

DOMAINS = ("arithmetic", "recall", "code", "strings")


def scores(*values):
    return {
        "exact_match": dict(zip(DOMAINS, values, strict=True)),
        "perplexity": {"recall": 1 + values[1], "text": 9.25},
    }


def verdict(curve, alpha_star, recovery, wins, ties, losses, resampled=None):
    recovery = dict(zip(DOMAINS, recovery, strict=True))
    return {
        "alphas": [0.0, 0.25, 0.5, 1.0],
        "curve": curve,
        "alpha_star": alpha_star,
        "c_0": curve[0],
        "recovery": recovery,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        **({"resampled": resampled} if resampled else {}),
    }


SURE = {"c_0": [0.25, 0.75], "c_alpha": [0.25, 0.75], "alpha_star": [0.0, 0.0625], "lossless": 0.8}
RESULTS = {
    "title": "tiny | a *run*",
    "teacher": "tiny_teacher",
    "teacher_scores": scores(0.8, 0.9, 0.0, 1.0),
    "students": {
        "converted": scores(0.4, 0.0, 0.0, 0.5),
        "expert [a]": scores(0.8, 0.45, 0.0, 1.0),
        "student": scores(0.9, 0.88, 0.0, 1.0),
    },
    "win_and_tie": {
        "converted": verdict([0.25, 0.25, 0.75, 1], 0.5, [0.5, 0, None, 0.5], 0, 1, 3),
        "expert [a]": verdict([0.75, 0.75, 1, 1], 0.0, [1, 0.5, None, 1], 0, 3, 1),
        "student": verdict([0.75, 1, 1, 1], 0.0, [1.125, 0.88 / 0.9, None, 1], 1, 2, 1, SURE),
    },
    "alignment": {
        "layers": [{"layer": 1, "before": 0.5, "after": 0.05}, {"layer": 3, "before": 0.4, "after": 0.02}],
        "curve": [{"step": s, "error": [0.5 / s, 0.4 / s]} for s in range(1, 21)],
    },
    "distillation": {
        "a": [{"step": s, "loss": 1 / s, "ce": 2 / s, "kl": 0.5 / s} for s in range(1, 5)],
        "b": [{"step": 1, "loss": 2.0}],
    },
    "gates": [[0.1, 0.9, 0.5], [0.2, 0.8, 0.4]],
    "sample": {"prompt": "a ```b\nc", "output": " d"},
    "seconds": {"convert": 1.94, "distill:a": 150.0},
    "peak_memory_mib": 1234.4,
}


def size(path):
    """Width and height in pixels of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- files -----------------------------------------------------------------------------------------------------


def test_a_full_report_has_all_pictures_and_shows_each_and_a_later_one_without_them_takes_them_away(tmp_path):
    import matplotlib

    settings, given = dict(matplotlib.rcParams), copy.deepcopy(RESULTS)
    written = write_report(given, tmp_path / "run")
    assert given == RESULTS and dict(matplotlib.rcParams) == settings
    pictures = ["alignment.png", "domains.png", "gates.png", "losses.png", "win_and_tie.png"]
    assert names(tmp_path / "run") == sorted(written) == sorted([*pictures, "report.md"])
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    for name in pictures:
        assert f"]({name})" in text and min(size(tmp_path / "run" / name)) > 300
    assert write_report({"title": "again"}, tmp_path / "run") == names(tmp_path / "run") == ["report.md"]


NEEDS = {
    "alignment.png": {"alignment"},
    "losses.png": {"distillation"},
    "gates.png": {"gates"},
    "win_and_tie.png": {"win_and_tie", "students"},
    "domains.png": set(),
}


@pytest.mark.parametrize("part", RESULTS)
def test_each_part_may_be_missing_or_empty(part):
    rest = {key: value for key, value in RESULTS.items() if key != part}
    for results in (rest, rest | ({part: type(RESULTS[part])()} if isinstance(RESULTS[part], dict | list) else {})):
        drawn = {name for name, (draw, _) in report.PICTURES.items() if draw(results) is not None}
        assert drawn == {name for name, needed in NEEDS.items() if part not in needed}
        full, partial = (
            markdown(r, {name: name for name in shown}) for r, shown in ((RESULTS, NEEDS), (results, drawn))
        )
        assert partial != full and score_table(results).columns


def test_an_empty_run_has_an_empty_report(tmp_path):
    assert write_report({}, tmp_path) == ["report.md"] and (tmp_path / "report.md").read_text() == "# Report\n"
    assert score_table({}).row_count == 0


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need matplotlib, found none; pip install 'xlstm-hybrid\[train\]'"):
        write_report(RESULTS, tmp_path)
    assert names(tmp_path) == []


# --- text ------------------------------------------------------------------------------------------------------


def lines_with(text, word):
    return [line for line in text.splitlines() if word in line]


def test_the_tables_hold_the_scores():
    text = markdown(RESULTS)
    assert "| domain | teacher | converted | expert \\[a\\] | student | recovery |" in text
    assert lines_with(text, "| arithmetic") == ["| arithmetic | 80.0 % | 40.0 % | 80.0 % | 90.0 % | 112.5 % |"]
    assert lines_with(text, "| code") == ["| code | 0.0 % | 0.0 % | 0.0 % | 0.0 % | – |"]
    assert lines_with(text, "| C_0") == ["| C_0 |  | 0.25 | 0.75 | 0.75 |  |"]
    assert lines_with(text, "| alpha") == ["| alpha\\* |  | 0.500 | 0.000 | 0.000 |  |"]
    assert (
        lines_with(text, "| recall")[1] == "| recall | 1.9 | 1 | 1.45 | 1.88 |"
        and "| text | 9.25 | 9.25 | 9.25 | 9.25 |" in text
    )


def test_the_verdict_is_about_the_last_student():
    text = markdown(RESULTS)
    assert (
        "The student **student** against its teacher tiny_teacher on 4 domains: 1 won, 2 tied, 1 lost; C_0 = 0.75 (0.25 to 0.75; lossless: the bar "
        "is 0.5), α\\* = 0.000 (0.000 to 0.062). Lowest recovery: 97.8 % (recall)."
    ) in text
    alone = RESULTS | {"students": {"converted": RESULTS["students"]["converted"]}}
    assert "C_0 = 0.25 (not lossless: the bar is 0.5), α\\* = 0.500. Lowest recovery: 0.0 % (recall)." in markdown(
        alone
    )


def test_names_and_samples_stay_where_they_are_put():
    text = markdown(RESULTS)
    assert text.startswith("# tiny \\| a \\*run\\*\n")
    assert "````text\na ```b\nc\n````" in text  # a longer fence than any in the sample


def test_times_and_memory_are_told_in_fit_units():
    text = markdown(RESULTS)
    assert "| convert | 1.9 s |" in text and "| distill:a | 2.5 min |" in text and "Peak memory: 1,234 MiB." in text
    assert markdown({"peak_memory_mib": 5}) == "# Report\n\n## Time and memory\n\nPeak memory: 5 MiB."


def test_a_domain_that_one_student_lacks_is_a_dash():
    results = {"students": {"a": {"exact_match": {"x": 1.0}}, "b": {"exact_match": {"y": 0.5}}}}
    assert "| x | 100.0 % | – |\n| y | – | 50.0 % |" in markdown(results)


def test_the_terminal_sees_the_same_table_within_80_columns():
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(RESULTS))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["domain", "teacher", "converted", "expert", "[a]", "student", "recovery"] in rows
    assert ["arithmetic", "80.0", "40.0", "80.0", "90.0", "112.5"] in rows and [
        "code",
        "0.0",
        "0.0",
        "0.0",
        "0.0",
        "–",
    ] in rows
    assert ["C_0", "0.25", "0.75", "0.75"] in rows and ["alpha*", "0.500", "0.000", "0.000"] in rows
    assert ["in", "95", "%", "–", "–", "0.25", "to", "0.75"] in rows and [
        "in",
        "95",
        "%",
        "–",
        "–",
        "0.000",
        "to",
        "0.062",
    ] in rows


def test_the_verdict_says_how_sure_it_is_where_that_is_known():
    text = markdown(RESULTS)
    assert "C_0 = 0.75 (0.25 to 0.75; lossless: the bar is 0.5), α\\* = 0.000 (0.000 to 0.062)." in text
    assert "In brackets: 95.0 % of resamples of the answers." in text
    unsure = copy.deepcopy(RESULTS)
    unsure["win_and_tie"]["student"].pop("resampled")
    assert "C_0 = 0.75 (lossless: the bar is 0.5), α\\* = 0.000." in markdown(unsure) and "resamples" not in markdown(
        unsure
    )
    assert "in 95 %" not in markdown(unsure)


def test_the_stages_are_shown_with_their_share_of_the_time():
    results = {
        "seconds": {"convert": 1.0, "align": 59.0, "distill:a": 120.0, "everything else": 20.0, "whole run": 200.0}
    }
    assert time_rows(results) == [
        ["stage", "time", "share"],
        ["convert", "1.0 s", "0.5 %"],
        ["align", "59.0 s", "29.5 %"],
        ["distill:a", "2.0 min", "60.0 %"],
        ["everything else", "20.0 s", "10.0 %"],
        ["whole run", "3.3 min", "100.0 %"],
    ]
    assert time_rows({}) == [] and terminal_table(time_rows(results), "Time").row_count == 5
    assert "| align | 59.0 s | 29.5 % |" in markdown(results)


# --- pictures --------------------------------------------------------------------------------------------------


def test_the_curve_is_a_stair_with_a_dot_at_alpha_star():
    axes = report.draw_win_and_tie(RESULTS).axes[0]
    stairs = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert [list(line.get_ydata()) for line in stairs] == [v["curve"] for v in RESULTS["win_and_tie"].values()]
    assert [line.get_label() for line in stairs] == [
        "converted: α* = 0.500",
        "expert [a]: α* = 0.000",
        "student: α* = 0.000",
    ]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [(0.5, 0.75), (0.0, 0.75), (0.0, 0.75)]


def test_bars_stand_side_by_side_and_show_each_score():
    axes = report.draw_domains(RESULTS).axes[0]
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    assert heights[0] == pytest.approx([80, 90, 0, 100]) and heights[3] == pytest.approx([90, 88, 0, 100])
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for group in axes.containers for bar in group)
    assert all(left[1] <= right[0] for left, right in zip(edges, edges[1:], strict=False))
    assert [t.get_text() for t in axes.get_xticklabels()] == list(DOMAINS)
    colours = [group[0].get_facecolor() for group in axes.containers]
    assert len(set(colours)) == 4


def test_alignment_is_shown_by_the_layers_own_numbers():
    before_after, curve = report.draw_alignment(RESULTS).axes
    assert [t.get_text() for t in before_after.get_yticklabels()] == ["1", "3"]
    assert [list(c.get_offsets()[:, 0]) for c in before_after.collections] == [[0.5, 0.4], [0.05, 0.02]]
    assert (
        [line.get_label() for line in curve.lines] == ["1", "3"]
        and curve.lines[1].get_ydata()[3] == 0.1
        and curve.get_yscale() == "log"
    )
    narrow = {"alignment": {"curve": [{"step": s, "error": [0.3, 0.0]} for s in (1, 2)]}}
    assert report.draw_alignment(narrow).axes[0].get_yscale() == "linear"  # zero has no logarithm


def test_losses_have_a_panel_per_term_that_was_logged():
    panels = report.draw_losses(RESULTS).axes
    assert [p.get_title(loc="left") or p.get_title() for p in panels] == ["Loss", "Cross-entropy", "KL to the teacher"]
    assert [[list(line.get_ydata()) for line in p.lines] for p in panels][1] == [[2 / s for s in range(1, 5)]]
    assert len(report.draw_losses({"distillation": {"b": [{"step": 1, "loss": 2.0}]}}).axes) == 1


COMPARISON = {
    "teacher": "t",
    "teacher_scores": {"a": 0.5, "b": 0.0, "mt": 5.0},
    "cost": "cache bytes",
    "teacher_cost": 900,
    "students": {
        "small": {
            "scores": {"a": 0.25, "b": 0.1, "mt": 4.0},
            "recovery": {"a": 0.5, "b": None, "mt": 0.8},
            "cost": 10,
            "mean_recovery": 0.65,
            "pareto": True,
            "alphas": [0.0, 0.5, 1.0],
            "curve": [1 / 3, 1.0, 1.0],
            "alpha_star": 0.2,
        },
        "big": {
            "scores": {"a": 0.5, "b": 0.0, "mt": 5.0},
            "recovery": {"a": 1.0, "b": None, "mt": 1.0},
            "cost": 300,
            "mean_recovery": 1.0,
            "pareto": True,
            "alphas": [0.0, 0.5, 1.0],
            "curve": [1.0, 1.0, 1.0],
            "alpha_star": 0.0,
        },
    },
}


def test_recovery_is_a_map_of_students_and_benchmarks_with_a_blank_where_the_teacher_scored_nothing():
    axes = comparison.draw_recovery(COMPARISON).axes[0]
    assert [t.get_text() for t in axes.texts] == ["50", "–", "80", "100", "–", "100"]
    assert math.isnan(axes.images[0].get_array().filled(math.nan)[0, 1]) and axes.images[0].get_clim() == (0.5, 1.5)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "mt"] and [
        t.get_text() for t in axes.get_yticklabels()
    ] == ["small", "big"]


def test_bars_of_benchmarks_share_an_axis_whatever_their_scale():
    axes = comparison.draw_tasks(COMPARISON).axes[0]
    assert [[round(bar.get_height()) for bar in group] for group in axes.containers] == [
        [50, 0, 100],
        [25, 10, 80],
        [50, 0, 100],
    ]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "mt / 5"]


def test_the_front_joins_the_students_that_nobody_beats():
    axes = comparison.draw_quality(COMPARISON).axes[0]
    assert (
        list(map(list, axes.lines[0].get_xydata())) == [[10, 0.65], [300, 1.0]]
        and axes.get_xlabel() == "cache bytes"
        and axes.get_xscale() == "log"
    )
    assert [t.get_text() for t in axes.texts] == ["small", "big", "t"]
    without = COMPARISON | {
        "students": {n: s | {"pareto": None, "cost": None} for n, s in COMPARISON["students"].items()},
        "cost": None,
    }
    assert comparison.draw_quality(without) is None and set(comparison.comparison_pictures(without)) == {
        "curve.png",
        "tasks.png",
        "recovery.png",
    }


def test_pictures_tell_nothing_of_the_program_that_drew_them():
    image = comparison.comparison_pictures(COMPARISON)["curve.png"][0]
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and b"tEXt" not in image


def test_gates_are_drawn_on_a_scale_from_window_to_mlstm():
    axes = report.draw_gates(RESULTS).axes[0]
    image = axes.images[0]
    assert image.get_array().tolist() == RESULTS["gates"] and image.get_clim() == (0, 1)
    assert [t.get_text() for t in axes.texts] == ["0.10", "0.90", "0.50", "0.20", "0.80", "0.40"]
    uneven = report.draw_gates({"gates": [[0.1], [0.2, 0.3]]}).axes[0].images[0].get_array()
    assert math.isnan(uneven.filled(math.nan)[0, 1])
