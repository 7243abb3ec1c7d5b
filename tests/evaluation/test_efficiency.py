"""The efficiency report: no figure without a check, figures that can be calculated by hand, and reasons where there is
none.
"""

import json
import os
import sys
import time
import types

import pytest
import torch
from conftest import enlarge
from tiny_teachers import teacher
from typer.testing import CliRunner

from xlstm_hybrid import XLSTMHybridForCausalLM, cli
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance
from xlstm_hybrid.errors import ConfigError, EvaluationError
from xlstm_hybrid.evaluation import efficiency, efficiency_checks, efficiency_pairs
from xlstm_hybrid.evaluation.efficiency import (
    Meter,
    Peak,
    Settings,
    Side,
    filled,
    measure_pair,
    medians_and_gain,
    new_cache,
    take_turns,
)
from xlstm_hybrid.evaluation.equivalence import Result
from xlstm_hybrid.model import attention
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.generation_checks import bound
from xlstm_hybrid.planning.cache_size import allocated_bytes
from xlstm_hybrid.reports import efficiency as efficiency_report
from xlstm_hybrid.reports.card import write_card

WINDOW, SINKS = 7, 3
GREEN = Result("a check", 0.0, 1.0, "float32", 0.1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama():
    return teacher("llama")


@pytest.fixture(scope="module")
def student(llama):
    """The teacher's student, whose mLSTM and gates have large weights, too."""
    return enlarge(
        XLSTMHybridForCausalLM.from_teacher(llama, sliding_window=WINDOW, num_sink_tokens=SINKS, mlstm_chunk_size=8)
    ).eval()


@pytest.fixture(scope="module")
def saved(llama, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    llama.save_pretrained(folder / "big")
    student.save_pretrained(folder / "small")
    return folder


@pytest.fixture
def here(monkeypatch):
    """What is measured apart runs in this process: quick, and good enough where peaks are not what is tested."""
    monkeypatch.setattr(efficiency, "apart", lambda function, *arguments: function(*arguments))


def ids(rows, length):
    return torch.arange(rows * length).view(rows, length) % 89


# --- correctness first -----------------------------------------------------------------------------------------------


def test_a_red_check_leaves_no_figure(llama, student, monkeypatch):
    red = Result("token by token = parallel", 0.5, 1e-4, "float64", 0.1)
    monkeypatch.setattr(efficiency, "with_memory", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(
        EvaluationError,
        match=r"no figures, because 1 of 2 checks failed: token by token = parallel \(5.00e-01, allowed 1.00e-04\)",
    ):
        measure_pair(Side("s", lambda: student), Side("t", lambda: llama), Settings(), lambda *_: [GREEN, red])
    with pytest.raises(EvaluationError, match="expected at least one result"):
        measure_pair(Side("s", lambda: student), Side("t", lambda: llama), Settings(), lambda *_: [])


@pytest.mark.parametrize("cache", efficiency.CACHES)
def test_what_is_timed_is_one_call_for_both_and_is_not_when_steps_lose_the_state(llama, student, cache, monkeypatch):
    for model in (llama, student):
        assert efficiency_checks.decoding_difference(model, cache, length=40) < bound(torch.float32, 3)
    advance, step = HybridCacheLayer.advance, attention.compiled_step

    def forgetful(self, tokens):
        self.state.C.zero_()
        return advance(self, tokens)

    def forgetful_step(module, *args):
        args[-1].state.C.zero_()
        return step(module, *args)

    monkeypatch.setattr(HybridCacheLayer, "advance", forgetful)
    monkeypatch.setattr(attention, "compiled_step", forgetful_step)
    assert efficiency_checks.decoding_difference(student, cache, length=40) > 100 * bound(torch.float32, 3)


def test_models_of_two_dtypes_are_not_compared(llama, student):
    with pytest.raises(EvaluationError, match="dtype: the student's is torch.float32, the teacher's torch.float64"):
        measure_pair(
            Side("s", lambda: student),
            Side("t", lambda: teacher("llama", tied=False).double()),
            Settings(),
            lambda *_: [GREEN],
        )


def test_without_memory_apart_each_model_is_loaded_once_and_every_row_is_told(llama, student):
    loaded, told = [], []
    sides = [Side("s", lambda: loaded.append("s") or student), Side("t", lambda: loaded.append("t") or llama)]
    settings = Settings(lengths=(12,), contexts=(20,), rounds=1, steps=2)
    keep = lambda pair: told.append([sorted(row.keys() & {"prefill", "decode"}) for row in pair["rows"]])  # noqa: E731
    pair = measure_pair(*sides, settings, lambda *_: [GREEN], memory=False, keep=keep)
    assert sorted(loaded) == ["s", "t"] and told == [[["decode", "prefill"], []], [["decode", "prefill"], ["decode"]]]
    assert all("memory" not in row and row["decode"]["gain"]["tokens_per_second"] > 0 for row in pair["rows"])
    assert "Peak memory and cache: not measured." in list(efficiency_report.efficiency_notes(pair))


# --- figures by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, L", [(1, 20), (3, 33)])
def test_the_teachers_cache_grows_with_every_token_and_the_students_does_not(llama, student, B, L):
    layers, H, G, K, item = 3, 6, 2, 10, 4
    with torch.no_grad():
        grown, _ = filled(llama, ids(B, L), "dynamic", 4)
        fixed, _ = filled(student, ids(B, L), "dynamic", 4)
    assert allocated_bytes(grown) == layers * B * 2 * L * G * K * item
    assert allocated_bytes(fixed) == layers * B * (2 * (SINKS + WINDOW) * G * K * item + H * (K * K + K + 1) * 4 + 8)


def test_a_static_cache_counts_whole_however_little_is_in_it(llama):
    with torch.no_grad():
        cache, _ = filled(llama, ids(2, 9), "static", 21)
    assert allocated_bytes(cache) == pytest.approx(3 * 2 * 2 * 30 * 2 * 10 * 4, rel=0.01)


@pytest.mark.parametrize("cache", efficiency.CACHES)
def test_a_context_read_in_pieces_goes_on_like_the_whole_in_every_row(llama, student, cache, monkeypatch):
    monkeypatch.setattr(efficiency, "PIECE", 8)
    rows = ids(1, 29).expand(3, -1)
    for model in (llama, student):
        with torch.no_grad():
            held, token = filled(model, rows, cache, 4)
            want = model(torch.cat([rows, token], 1), use_cache=False).logits
            got = model(token, **named(held), use_cache=True).logits
        assert token.tolist() == want[:, -2:-1].argmax(-1).tolist()
        torch.testing.assert_close(got[:, 0], want[:, -1], rtol=1e-4, atol=1e-4 * want.std().item())


def test_the_gain_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    costs = {"teacher": [(4.0, 8.0), (9.0, 8.0), (10.0, 8.0)], "student": [(2.0, 2.0), (3.0, 2.0), (1.0, 2.0)]}
    part = medians_and_gain(costs, 18, per_second=True)
    assert part["gain"] == {"tokens_per_second": 3.0, "joules_per_token": 4.0}
    assert part["teacher"]["tokens_per_second"] == 2.0 and part["student"]["tokens_per_second"] == 9.0
    assert part["teacher"]["joules_per_token"] == pytest.approx(8 / 18)
    assert medians_and_gain(costs, 18, per_second=False)["gain"]["seconds"] == 3.0
    assert "gain" not in medians_and_gain({"student": costs["student"]}, 18, per_second=True)


def test_teacher_and_student_take_turns_and_who_begins_alternates():
    told, meter = [], Meter(CPU)
    costs, absent = take_turns({"teacher": lambda: told.append("t"), "student": lambda: told.append("s")}, 3, meter)
    assert "".join(told) == "st" + "tsstts" and absent == {}
    assert [len(pairs) for pairs in costs.values()] == [3, 3]


def test_a_side_that_runs_out_of_memory_leaves_the_other_its_figures():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 137 GiB")

    def broken():
        raise RuntimeError("sizes differ")

    costs, absent = take_turns({"teacher": full, "student": lambda: None}, 2, Meter(CPU))
    assert absent == {"teacher": "out of memory"} and list(costs) == ["student"] and len(costs["student"]) == 2
    with pytest.raises(RuntimeError, match="sizes differ"):
        take_turns({"teacher": broken}, 2, Meter(CPU))


def test_a_side_that_had_no_memory_apart_is_not_timed(llama, student, monkeypatch):
    def apart(function, side, *arguments):
        if side.name == "t":
            raise MemoryError
        return function(side, *arguments)

    monkeypatch.setattr(efficiency, "apart", apart)
    settings = Settings(lengths=(12,), rounds=1, steps=1)
    row = measure_pair(Side("s", lambda: student), Side("t", lambda: llama), settings, lambda *_: [GREEN])["rows"][0]
    assert row["absent"] == {"teacher": "out of memory"}
    assert all(set(row[part]) == {"student"} for part in ("memory", "prefill", "decode"))


# --- memory and energy -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not efficiency.CLEAR_REFS.exists(), reason="peaks of a CPU process are Linux's")
def test_the_peak_is_what_was_held_at_once_and_starts_anew():
    peak, MiB = Peak(CPU), 2**20
    held = torch.ones(96 * MiB // 4)
    del held
    assert 95 * MiB < peak.read() < 112 * MiB
    peak.restart()
    assert peak.read() < 16 * MiB


@pytest.mark.skipif(not efficiency.CLEAR_REFS.exists(), reason="peaks of a CPU process are Linux's")
def test_what_the_prompt_needed_for_a_moment_is_not_counted_for_decoding(llama):
    MiB = 2**20

    def greedy(module, arguments):
        if arguments[0].shape[1] > 8:
            torch.ones(96 * MiB // 4)

    hook = llama.register_forward_pre_hook(greedy)
    try:
        found = efficiency.memory_of(Side("t", lambda: llama), Settings(lengths=(20,)), 20, 2, 97)
    finally:
        hook.remove()
    assert 95 * MiB < found["prefill_peak_bytes"] < 120 * MiB and found["decode_peak_bytes"] < 24 * MiB


def test_a_process_that_is_killed_is_a_reason_and_not_the_end():
    result, reason = efficiency.attempt(lambda: efficiency.apart(os._exit, 9))
    assert result is None and reason.startswith("its process was ended from outside")


def test_energy_counts_packages_once_and_survives_a_counter_that_wraps(tmp_path, monkeypatch):
    zones = {
        "intel-rapl:0": ("package-0", 900),
        "intel-rapl:1": ("package-1", 100),
        "intel-rapl:0:0": ("core", 5),
        "intel-rapl:2": ("psys", 7),
    }
    for zone, (name, energy) in zones.items():
        (tmp_path / zone).mkdir()
        for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", 1000)):
            (tmp_path / zone / file).write_text(f"{value}\n")
    monkeypatch.setattr(efficiency, "POWERCAP", tmp_path)
    meter = Meter(CPU)

    def work(seconds):
        time.sleep(seconds)
        for zone, energy in (
            ("intel-rapl:0", 50),
            ("intel-rapl:1", 130),
            ("intel-rapl:0:0", 900),
            ("intel-rapl:2", 900),
        ):
            (tmp_path / zone / "energy_uj").write_text(str(energy))

    assert meter.source == "RAPL" and meter.absent is None
    assert meter.cost(lambda: work(efficiency.MIN_ENERGY_SECONDS))[1] == pytest.approx((150 + 30) * 1e-6)
    assert meter.cost(lambda: work(0))[1] is None


def test_without_counters_the_absence_of_energy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "POWERCAP", tmp_path)
    meter = Meter(CPU)
    assert meter.source is None and "no counters" in meter.absent and meter.cost(lambda: None)[1] is None


def fake_nvml(read):
    """The three functions of pynvml that are called, for a GPU whose counter is `read()` millijoules."""
    fake = types.ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.nvmlInit, fake.nvmlDeviceGetHandleByUUID = lambda: None, lambda uuid: uuid

    def consumption(handle):
        assert handle == "GPU-1234"
        if (value := read()) is None:
            raise fake.NVMLError("Not Supported")
        return value

    fake.nvmlDeviceGetTotalEnergyConsumption = consumption
    return fake


def test_energy_of_a_gpu_is_read_by_its_uuid_and_old_gpus_that_have_none_say_so(monkeypatch):
    counter = {"mJ": 5000}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(lambda: counter["mJ"]))
    meter = Meter(torch.device("cuda"))
    seconds, joules = meter.cost(lambda: (time.sleep(efficiency.MIN_ENERGY_SECONDS), counter.update(mJ=7500)))
    assert meter.source == "NVML" and joules == pytest.approx(2.5) and seconds >= efficiency.MIN_ENERGY_SECONDS
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(lambda: None))
    assert "no energy of this GPU (Not Supported)" in Meter(torch.device("cuda")).absent
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in Meter(torch.device("cuda")).absent


# --- settings, shapes, command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": (0,)}, {"lengths": (8,), "contexts": (8,)}, {"batches": ()}, {"rounds": 0}, {"cache": "paged"}],
)
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(EvaluationError, match="expected"):
        Settings(**wrong)


@pytest.mark.parametrize("shape, parameters", [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512)])
def test_shapes_are_those_of_the_published_models(shape, parameters):
    made = {role: efficiency_pairs.random_model(shape, role, "bfloat16", "meta") for role in efficiency.SIDES}
    assert (
        sum(x.numel() for x in made["teacher"].parameters()) == parameters and made["teacher"].dtype == torch.bfloat16
    )
    gates = {x.dtype for name, x in made["student"].named_parameters() if "gate_weight" in name and "mlstm" in name}
    assert gates == {torch.float32} and made["student"].dtype == torch.bfloat16


def test_random_weights_pass_the_checks_that_figures_need(monkeypatch):
    kind, fields = efficiency_pairs.SHAPES["qwen2.5-7b"]
    small = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.02 * (3584 / 64) ** 0.5,
    }
    monkeypatch.setitem(efficiency_pairs.SHAPES, "qwen2.5-7b", (kind, fields | small))
    student, reference = (
        efficiency_pairs.random_model("qwen2.5-7b", role, "float32", "cpu") for role in ("student", "teacher")
    )
    smaller = lambda: efficiency_pairs.random_model("qwen2.5-7b", "student", "float32", "cpu", layers=2)  # noqa: E731
    results = list(efficiency_checks.checks(student, reference, "dynamic", smaller))
    assert len(results) > 15 and [r.name for r in results if not r.passed] == []


def test_the_command_writes_tables_a_picture_and_every_figure(saved, tmp_path):
    """The one test whose memory is measured in processes of its own."""
    pytest.importorskip("matplotlib")
    add_provenance(saved / "small", "convert")
    arguments = ["efficiency", str(saved / "big"), str(saved / "small"), "--out", str(tmp_path / "out")]
    arguments += ["--lengths", "40", "--batches", "2", "--dtype", "float32"]
    run = CliRunner().invoke(
        cli.app, [*arguments, "--rounds", "2", "--steps", "2", "--device", "cpu", "--shapes", "none", "--record"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "out/efficiency.json").read_text())
    pair = found["pairs"][0]
    assert all(check["passed"] for check in pair["checks"]) and len(pair["checks"]) > 15
    (row,) = pair["rows"]
    assert row["absent"] == {} and (row["length"], row["batch"]) == (40, 2)
    for side in efficiency.SIDES:
        assert row["prefill"][side]["seconds"] > 0 and len(row["prefill"][side]["rounds"]) == 2
        assert row["decode"][side]["tokens_per_second"] == pytest.approx(4 / row["decode"][side]["seconds"])
        assert row["memory"][side]["prefill_peak_bytes"] >= 0
    assert row["memory"]["teacher"]["cache_bytes"] == 3 * 2 * 2 * 42 * 2 * 10 * 4
    report = (tmp_path / "out/efficiency.md").read_text()
    assert "small beside big" in report and "| 40 | 2 |" in report and str(saved) not in report
    assert (tmp_path / "out/efficiency.png").read_bytes().startswith(b"\x89PNG")
    assert "Decoding, tokens per second" in run.output
    stage = read_provenance(saved / "small")[-1]
    assert (
        stage["stage"] == "efficiency"
        and stage["config"]["checks_passed"] == len(pair["checks"])
        and stage["config"]["teacher"] == "big"
    )
    assert stage["figures"]["rows"][0]["student_tokens_per_second"] == row["decode"]["student"]["tokens_per_second"]
    assert "| cache, MB | 40 | 2 |" in write_card(saved / "small").read_text()


@pytest.mark.parametrize(
    "cache", [pytest.param(kind, marks=pytest.mark.slow if kind == "static" else ()) for kind in efficiency.CACHES]
)
def test_the_report_says_what_is_missing_and_why(llama, student, here, cache):
    settings = Settings(lengths=(12,), contexts=(80,), rounds=1, steps=1, cache=cache)
    pair = measure_pair(Side("small", lambda: student), Side("big", lambda: llama), settings, lambda *_: [GREEN])
    prompt, context = pair["rows"]
    assert (
        "prefill" not in context and context["memory"]["student"]["prefill_peak_bytes"] is None and "prefill" in prompt
    )
    assert context["memory"]["gain"]["cache_bytes"] > prompt["memory"]["gain"]["cache_bytes"]
    prompt["absent"]["teacher, decoding"] = "out of memory"
    pair["energy"] = {"source": None, "absent": "NVML reports no energy"}
    text = "\n".join(efficiency_report.efficiency_notes(pair))
    assert (
        "12 tokens, batch 1, teacher, decoding: out of memory." in text
        and "Energy: no figure. NVML reports no energy." in text
    )
    assert "Contexts beyond 64 tokens" in text
    rows = dict(efficiency_report.tables(pair))["Time to first token, ms"]
    assert rows[0] == ["tokens", "batch", "teacher", "student", "gain"] and rows[2] == [80, 1, "–", "–", "–"]
    assert float(rows[1][2]) == pytest.approx(1e3 * prompt["prefill"]["teacher"]["seconds"], rel=1e-3)


def test_the_same_tokens_are_read_by_both_and_a_new_cache_is_of_the_kind_asked_for(llama):
    a, b = (efficiency.token_rows(Settings(seed=3), 50, 2, 101, CPU) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (2, 50) and a.unique().numel() > 30
    assert [type(new_cache(llama, kind, 8)).__name__ for kind in efficiency.CACHES] == ["DynamicCache", "StaticCache"]


@pytest.mark.parametrize(
    "more, match",
    [
        (["--shapes", "gpt-2"], "--shapes gpt-2"),
        (["--lengths", "1k"], "--lengths 1k"),
        (["--lengths", "0"], "at least 1"),
        (["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_the_command_refuses_what_it_cannot_measure(saved, tmp_path, more, match):
    arguments = ["efficiency", str(saved / "big"), str(saved / "small"), "--out", str(tmp_path), "--device", "cpu"]
    assert match in str(CliRunner().invoke(cli.app, [*arguments, *more]).exception)


def test_a_student_in_the_place_of_the_teacher_is_refused(saved, tmp_path):
    run = CliRunner().invoke(
        cli.app, ["efficiency", str(saved / "small"), str(saved / "big"), "--out", str(tmp_path), "--device", "cpu"]
    )
    assert isinstance(run.exception, ConfigError) and "TEACHER comes first" in str(run.exception)
