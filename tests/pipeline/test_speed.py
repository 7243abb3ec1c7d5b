"""`plan --measure`: what it makes of the seconds that it measured, and what it refuses. The seconds themselves are not
tested.
"""

import json
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline import speed
from xlstm_hybrid.recipe.schema import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TEACHER = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
TEACHER |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}
FEW = {"forward": 0.04, "align": 0.08, "align update": 0.01, "distill": 0.12, "distill update": 0.02}
WHOLE = {"forward": 0.2, "align": 0.07, "align update": 0.01, "distill": 0.6, "distill update": 0.17}


def memory(monkeypatch, size):
    free = namedtuple("Memory", "available")(size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


@pytest.fixture
def asked(monkeypatch):
    """What was measured: (layers, vocabulary, tokens, features of the student's first layers)."""
    found = []

    def timings(config, student, recipe, length, jobs):
        found.append((config.num_hidden_layers, config.vocab_size, length, sorted(jobs), student))
        return (FEW if config.vocab_size == speed.VOCABULARY else WHOLE), True

    monkeypatch.setattr(speed, "timings", timings)
    memory(monkeypatch, 8e9)
    return found


def test_layers_are_scaled_and_the_head_is_what_the_whole_vocabulary_adds(asked):
    recipe = load_recipe(RECIPES / "smollm2-135m-cpu.yaml")
    found = speed.measure_speed(LlamaConfig(**TEACHER), recipe)
    assert [call[:4] for call in asked] == [(4, v, 512, ["align", "distill"]) for v in (256, 49152)]
    assert found.stages["forward"].tokens_per_second == pytest.approx(512 / (0.04 * 7.5 + 0.16))
    align, distill = found.stages["align"], found.stages["distill"]
    assert align.tokens_per_second == pytest.approx(
        512 / (0.08 * 7.5 + 0.01 * 7.5)
    )  # a head that costs less than nothing
    row, update = 0.12 * 7.5 + 0.48, 0.02 * 7.5 + 0.15  # of which four rows share one
    assert distill.tokens_per_second == pytest.approx(512 / (row + update / 4))
    assert (align.tokens, distill.tokens) == (204_800, 204_800)
    assert distill.seconds == pytest.approx(400 * row + 100 * update)
    assert 3e9 < distill.peak < 6e9 and align.peak < distill.peak and found.fits


def test_a_recipe_without_stage_i_and_none_at_all_are_measured_as_they_run(asked):
    config = LlamaConfig(**TEACHER)
    control = speed.measure_speed(config, load_recipe(RECIPES / "smollm2-135m-cpu-control.yaml"))
    assert list(control.stages) == ["forward", "distill"] and control.stages["distill"].tokens == 409_600
    paper = speed.measure_speed(config)
    assert paper.stages["align"].tokens == 655_360_000 and paper.length == speed.LENGTH
    lists = {"sliding_window": 64, "layer_windows": [64] * 30, "dtype": "float32"}
    assert speed.first_layers(lists, 30, 4) == lists | {"layer_windows": [64] * 4}


def test_what_does_not_fit_the_free_memory_is_not_measured_or_said_to_be_too_large(asked, monkeypatch):
    config = LlamaConfig(**TEACHER)
    memory(monkeypatch, 1e9)
    with pytest.raises(
        ConfigError, match=r"4 layers of this teacher and its LM head take .* GB in stage II, 1.0 GB are free"
    ):
        speed.measure_speed(config)
    assert not asked
    memory(monkeypatch, 2.5e9)
    assert not speed.measure_speed(config, load_recipe(RECIPES / "smollm2-135m-cpu.yaml")).fits


def test_the_command_measures_the_trainers_of_a_recipe_and_takes_its_teacher(tmp_path):
    text = (RECIPES / "tiny.yaml").read_text().replace("tiny_teacher", str(RECIPES / "tiny_teacher"))
    (tmp_path / "r.yaml").write_text(text.replace("sequence_length: 256", "sequence_length: 32"))
    command = ["plan", str(tmp_path / "r.yaml")]
    done = CliRunner().invoke(cli.app, [*command, "--measure", "--json", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    assert "tiny-llama on this CPU" in done.output and "random weights, rows of 32 tokens" in done.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert list(written["stages"]) == ["forward", "align", "distill"] and written["fits"]
    for stage, tokens in (("align", 200 * 8 * 32), ("distill", 2 * 100 * 8 * 32)):
        found = written["stages"][stage]
        assert found["tokens"] == tokens == pytest.approx(found["tokens_per_second"] * found["seconds"])
    assert CliRunner().invoke(cli.app, [*command, "--gpus", "1"]).exit_code == 0
    for more, message in (
        (["--measure", "--gpu", "a100"], "--measure is for the CPU at hand, --gpu for GPUs"),
        (["--recipe", "tiny"], "a recipe names its teacher and revision; leave out --recipe"),
    ):
        refused = CliRunner().invoke(cli.app, [*command, *more])
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception)
