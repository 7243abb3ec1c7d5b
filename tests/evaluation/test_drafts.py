"""What `benchmarks/draft.py` measures: the student with one branch or with its first layers drafts for itself, and there are
no figures where the text is not that of greedy decoding.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_student, token_ids

from xlstm_hybrid import XLSTMHybridForCausalLM

ROOT = Path(__file__).parents[2]
N = 12
spec = importlib.util.spec_from_file_location("draft", ROOT / "benchmarks/draft.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    teacher, path = ROOT / "recipes/tiny_teacher/tiny-llama", tmp_path_factory.mktemp("draft") / "student"
    XLSTMHybridForCausalLM.from_teacher(str(teacher), sliding_window=16, dtype=torch.float32).save_pretrained(path)
    for file in teacher.glob("token*"):
        shutil.copy(file, path)
    return path


def run(monkeypatch, *words):
    grad, verbosity = torch.is_grad_enabled(), bench.transformers.utils.logging.get_verbosity()
    monkeypatch.setattr(sys, "argv", ["draft.py", *map(str, words)])
    try:
        bench.main()
    finally:
        torch.set_grad_enabled(grad)
        bench.transformers.utils.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("way", ["window", "window:2", "early:1", "lookup"])
@pytest.mark.parametrize("length", [3, 40])  # of the prompt; the window is 7
def test_every_way_of_drafting_gives_greedy_decoding_and_counts_its_tokens(way, length):
    model, ids = tiny_student(), token_ids(1, length)
    want, _, plain = bench.decode(model, ids, N, {})
    got, _, drafted = bench.decode(model, ids, N, bench.settings_of(model, way, 3))
    assert got == want and plain == [0] * N
    assert len(drafted) <= N <= len(drafted) + sum(drafted) and max(drafted) <= 3
    assert way == "lookup" or drafted[0] == 3


def test_the_draft_has_the_students_own_weights_and_no_memory():
    model, ids = tiny_student(), token_ids(1, 20)
    draft = bench.view(model, 2)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in draft.parameters()} < ours and len(draft.model.layers) == 2
    model.config.mixer_branches = "window"
    want = model(ids, use_cache=False).logits
    assert torch.equal(bench.view(model, 3)(ids, use_cache=False).logits, want)
    assert not torch.equal(draft(ids, use_cache=False).logits, want)


def test_a_perfect_draft_is_accepted_whole_and_a_hopeless_one_never():
    model, ids = tiny_student(), token_ids(1, 12)
    right = bench.settings_of(model, "window", 3)
    right["assistant_model"].config.mixer_branches = "both"
    assert bench.decode(model, ids, N, right)[2] == [3] * 3
    wrong = bench.settings_of(model, "window", 3)
    wrong["assistant_model"].lm_head = torch.nn.Linear(48, 61, bias=False, dtype=torch.float64)
    wrong["assistant_model"].lm_head.weight.data.copy_(-model.lm_head.weight)
    assert bench.decode(model, ids, N, wrong)[2][:9] == [3] * 9


def test_the_script_prints_a_table_and_writes_the_same_figures(checkpoint, monkeypatch, capsys, tmp_path):
    out = tmp_path / "draft.json"
    small = ["--tokens", 8, "--rounds", 1, "--drafts", "2", "--prompt", 20, "--chat", "1+1="]
    run(monkeypatch, checkpoint, *small, "--ways", "window,early:2,lookup", "--out", out)
    written = json.loads(out.read_text())["prompts"]
    rows = {row["way"]: row for row in written["method.md"]["rows"]}
    assert list(rows) == ["plain", "window", "early:2", "lookup"] and rows["plain"]["ratio"] == 1
    for way in ("window", "early:2"):
        row = rows[way]
        assert row["acceptance"] == row["accepted"] / row["drafted"] and 1 <= row["tokens per pass"] <= 3
        assert 0.4 < row["weights read"] < 1
    row = rows["window"]  # what 8 tokens cost in steps: passes, each with 2 drafted, but where fewer were wanted
    cost = (8 - row["accepted"]) + row["drafted"] * ((row["pass"] - 1) / 2 + row["draft step"])
    assert row["expected"] == pytest.approx(8 / cost) and "expected" not in rows["early:2"]
    shown = capsys.readouterr().out
    assert f"| window | 2 | {rows['window']['acceptance']:.2f} | {rows['window']['tokens per pass']:.2f} |" in shown


def test_there_are_no_figures_where_the_text_is_another_one(checkpoint, monkeypatch, capsys, tmp_path):
    settings_of, out = bench.settings_of, tmp_path / "draft.json"

    def broken(model, way, n):
        return settings_of(model, way, n) | (
            {"suppress_tokens": [*range(5, model.config.vocab_size)]} if way == "lookup" else {}
        )

    monkeypatch.setattr(bench, "settings_of", broken)
    with pytest.raises(SystemExit, match="the tokens are not those of greedy decoding: no figures"):
        run(monkeypatch, checkpoint, "--tokens", 8, "--rounds", 1, "--drafts", "2", "--prompt", 20, "--out", out)
    shown = capsys.readouterr()
    assert "lookup, 2 drafted: new token" in shown.err and "|" not in shown.out and not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ways", "memory"], "'memory', expected window, window:K, early:K or lookup"),
        (["--ways", "early"], "'early', expected"),
        (["--ways", "window:9"], "'window:9', expected 1 to 4 layers, as many as the student has"),
        (["--drafts", "0"], "expected at least 1"),
    ],
)
def test_nonsense_is_refused_by_name(checkpoint, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, checkpoint, *words)
    assert message in capsys.readouterr().err
