"""Pictures say one thing each: at most six coloured lines, each with its name, in colours that mean the same
everywhere.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from xlstm_hybrid.reports import plots

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
SUMMARY = ROOT / "docs/arena/results.json"


def luminance(colour):
    parts = [int(colour[j : j + 2], 16) / 255 for j in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", plots.PALETTE)
def test_names_of_lines_are_legible_on_white(colour):
    assert contrast(plots.legible(colour), "#ffffff") >= 4.5  # WCAG's bound for letters of any size


def test_a_dark_colour_is_its_own_letters_colour():
    assert plots.legible("#0072b2") == "#0072b2"


def test_names_that_would_overlap_move_apart_and_keep_their_order():
    placed = plots.moved_apart([1.0, 0.99, 0.2, 0.98], 0.1, 0.0, 1.0)
    assert placed[0] > placed[1] > placed[3] > placed[2] == 0.2
    assert placed[0] - placed[1] >= 0.099 and placed[1] - placed[3] >= 0.099 and max(placed) <= 1.0


def test_a_colour_stands_for_one_thing():
    assert len(set(plots.MEANING.values())) == len(plots.MEANING) and len(set(plots.PALETTE)) == 6


@pytest.mark.parametrize("teacher", json.loads(SUMMARY.read_text())["teachers"])
@pytest.mark.parametrize("kind", ["single", "multikey", "multiquery"])
def test_curves_of_the_arena_have_at_most_six_coloured_lines_each_with_its_name(teacher, kind):
    from xlstm_arena.report import COLOURS, draw_recall

    (axes,) = draw_recall(json.loads(SUMMARY.read_text()), teacher, kind).axes
    lines = {line.get_color() for line in axes.lines}
    names = {note.get_text() for note in axes.texts} & set(COLOURS)
    assert plots.FAINT in lines and 4 <= len(lines - {plots.FAINT}) <= 6
    assert {COLOURS[name] for name in names} == lines - {plots.FAINT} and {"teacher", "hybrid"} <= names


def draw_module():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/pictures/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_of_the_layer_and_the_badges_are_what_their_program_draws():
    """The pictures of results are left out: their bytes are matplotlib's and differ between its versions."""
    draw = draw_module()
    drawn = {f"layer-{theme}.svg": draw.layer(theme) for theme in draw.THEMES} | draw.badges()
    for name, svg in drawn.items():
        assert (ROOT / "docs/pictures" / name).read_text() == svg, f"{name}: run python docs/pictures/draw.py"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_of_results_shows_the_arenas_figures(theme):
    recall, cache = draw_module().results(theme).axes
    rows = {row["name"]: row for row in json.loads(SUMMARY.read_text())["teachers"]["llama"]["rows"]}
    ends = [line.get_ydata()[-1] for line in recall.lines]
    assert ends == [
        rows[n]["recall"]["single"]["2048"]["accuracy"]["mean"] for n in ("teacher", "kept-1", "hybrid", "no-align")
    ]
    assert [line.get_ydata()[-1] for line in cache.lines] == [
        rows[n]["cache_bytes"]["2048"] / 1e6 for n in ("teacher", "kept-1", "hybrid")
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_of_the_layers_drawing_are_legible_on_their_page(theme):
    colours = draw_module().THEMES[theme]
    for letters in ("ink", "line"):
        for ground in ("page", "panel"):
            assert contrast(colours[letters], colours[ground]) >= 4.5, (letters, ground)
