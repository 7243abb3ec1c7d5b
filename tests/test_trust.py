"""A kernel is believed after it has been checked: once per machine, with a verdict on disk and one clear warning if it is wrong."""

import importlib.util
import json
import warnings

import pytest
import torch
from xlstm_kernels import trust
from xlstm_kernels.selfcheck import CHECKS
from xlstm_kernels.trust import trusted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "KNOWN", {})
    return tmp_path / "cache"


def verdicts(folder):
    (path,) = folder.glob("verdicts-*.json")
    return json.loads(path.read_text())["verdicts"]


def test_a_right_kernel_is_checked_once_and_remembered_on_disk(fresh, monkeypatch):
    calls = []

    def check(device, dtype, K, V):
        calls.append((device, dtype, K, V))
        return {"output 0": 1e-6, "gradient 3": 9e-5}

    for _ in range(2):
        assert trusted("mlstm", check, CPU, torch.float32, K=64, V=128)
    assert calls == [(CPU, torch.float32, 64, 128)]
    assert verdicts(fresh) == {"mlstm (K 64, V 128, float32)": {"right": True, "errors": {"output 0": 1e-6, "gradient 3": 9e-5}}}
    monkeypatch.setattr(trust, "KNOWN", {})  # as another process would begin
    assert trusted("mlstm", check, CPU, torch.float32, K=64, V=128) and len(calls) == 1
    assert trusted("mlstm", check, CPU, torch.bfloat16, K=64, V=128) and len(calls) == 2  # another dtype is another kernel


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_wrong_gradient_means_one_warning_and_the_plain_form(fresh, error):
    def check(device, dtype, K):
        return {"output 0": 1e-6, "gradient 1": error}

    said = r"mlstm \(K 64, float32\).*'gradient 1'.*0.0001 is allowed.*torch form runs instead.*verdicts-.*backend=\"triton\""
    with pytest.warns(RuntimeWarning, match=said):
        assert not trusted("mlstm", check, CPU, torch.float32, K=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trusted("mlstm", check, CPU, torch.float32, K=64)
    assert verdicts(fresh)["mlstm (K 64, float32)"]["right"] is False


def test_a_kernel_that_does_not_run_is_a_wrong_kernel():
    def check(device, dtype, K):
        raise RuntimeError("ptxas died")

    with pytest.warns(RuntimeWarning, match="RuntimeError: ptxas died"):
        assert not trusted("mlstm", check, CPU, torch.float32, K=64)


@pytest.mark.parametrize("content", ["", "[]", '{"verdicts": {"mlstm (K 64, float32)": true}}', '{"verdicts": 3}'])
def test_a_damaged_file_costs_a_check_and_is_replaced(fresh, content):
    path = trust.verdict_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert trusted("mlstm", lambda *_, **__: {"output 0": 0.0}, CPU, torch.float32, K=64)
    assert verdicts(fresh)["mlstm (K 64, float32)"]["right"] is True
    assert [p.name for p in fresh.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_costs_checks_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "file"))
    assert trusted("mlstm", lambda *_, **__: {"output 0": 0.0}, CPU, torch.float32, K=64)


def test_the_check_itself_does_not_ask_again():
    def check(device, dtype, K):
        assert not trusted("mlstm", check, device, dtype, K=K)
        return {"output 0": 0.0}

    assert trusted("mlstm", check, CPU, torch.float32, K=64)


def test_other_sources_are_other_surroundings(monkeypatch):
    before = trust.verdict_file(CPU)
    changed = {**trust.surroundings(CPU), "sources": "another"}
    monkeypatch.setattr(trust, "surroundings", lambda device: changed)
    assert trust.verdict_file(CPU) != before


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("operation", "dims"), [
    ("mlstm", {"K": 16, "V": 32}), ("hybrid_step", {"K": 16, "V": 32, "F": 24}), ("head_loss", {"M": 16}),
    pytest.param("window_attention", {"K": 16, "V": 32}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_checks_find_our_kernels_right(operation, dims):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU: in the interpreter
    assert trusted(operation, CHECKS[operation], device, torch.float32, **dims)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_checks_find_a_wrong_gradient(monkeypatch):
    from xlstm_kernels.gpu import mlstm as kernels

    right = kernels.mlstm_triton

    def wrong(q, k, v, i, f, state):
        h, last = right(q, k, v, i, f, state)
        return h + (f - f.detach()).mean() * 1e-2, last  # the values are right, the gradient of f is not

    monkeypatch.setattr(kernels, "mlstm_triton", wrong)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.warns(RuntimeWarning, match="gradient 4"):
        assert not trusted("mlstm", CHECKS["mlstm"], device, torch.float32, K=16, V=16)
