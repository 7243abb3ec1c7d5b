"""A kernel is used after it has been checked: once per machine, with a verdict on disk and one clear warning if it is
wrong.
"""

import importlib.util
import json
import sys
import warnings

import pytest
import torch
from xlstm_kernels.backends import choose
from xlstm_kernels.backends.verified import verdict_file, verified
from xlstm_kernels.head_loss import op as head_loss
from xlstm_kernels.mlstm import op as mlstm
from xlstm_kernels.slstm import op as slstm
from xlstm_kernels.step import op as step
from xlstm_kernels.window import op as window

MODULE = sys.modules[verified.__module__]
KERNELS = {operation.KERNEL.name: operation.KERNEL for operation in (mlstm, window, step, head_loss, slstm)}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MODULE, "VERDICTS", {})
    return tmp_path / "cache"


def answer_of(errors):
    return lambda device, dtype, **dims: errors


def verdicts(folder):
    (path,) = folder.glob("verdicts-*.json")
    return json.loads(path.read_text())["verdicts"]


def test_a_right_kernel_is_checked_once_and_remembered_on_disk(fresh, monkeypatch):
    calls = []

    def check(device, dtype, K, V):
        calls.append((device, dtype, K, V))
        return {"output 0": 1e-6, "gradient 3": 9e-5}

    for _ in range(2):
        assert verified("mlstm", check, CPU, torch.float32, K=64, V=128)
    assert calls == [(CPU, torch.float32, 64, 128)]
    assert verdicts(fresh) == {
        "mlstm (K 64, V 128, float32)": {"right": True, "errors": {"output 0": 1e-6, "gradient 3": 9e-5}}
    }
    monkeypatch.setattr(MODULE, "VERDICTS", {})  # as another process would begin
    assert verified("mlstm", check, CPU, torch.float32, K=64, V=128) and len(calls) == 1
    assert (
        verified("mlstm", check, CPU, torch.bfloat16, K=64, V=128) and len(calls) == 2
    )  # another dtype is another kernel


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_wrong_gradient_means_one_warning_and_the_plain_form(fresh, error):
    def check(device, dtype, K):
        return {"output 0": 1e-6, "gradient 1": error}

    said = r"mlstm \(K 64, float32\).*'gradient 1'.*0.0001 is allowed"
    said += r".*torch form runs instead.*verdicts-.*backend=\"triton\""
    with pytest.warns(RuntimeWarning, match=said):
        assert not verified("mlstm", check, CPU, torch.float32, K=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not verified("mlstm", check, CPU, torch.float32, K=64)
    assert verdicts(fresh)["mlstm (K 64, float32)"]["right"] is False


def test_a_kernel_that_does_not_run_is_a_wrong_kernel():
    def check(device, dtype, K):
        raise RuntimeError("ptxas died")

    with pytest.warns(RuntimeWarning, match="RuntimeError: ptxas died"):
        assert not verified("mlstm", check, CPU, torch.float32, K=64)


@pytest.mark.parametrize("content", ["", "[]", '{"verdicts": {"mlstm (K 64, float32)": true}}', '{"verdicts": 3}'])
def test_a_damaged_file_costs_a_check_and_is_replaced(fresh, content):
    path = verdict_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert verified("mlstm", lambda *_, **__: {"output 0": 0.0}, CPU, torch.float32, K=64)
    assert verdicts(fresh)["mlstm (K 64, float32)"]["right"] is True
    assert [p.name for p in fresh.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_costs_checks_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "file"))
    assert verified("mlstm", lambda *_, **__: {"output 0": 0.0}, CPU, torch.float32, K=64)


def test_the_check_itself_does_not_ask_again():
    def check(device, dtype, K):
        assert not verified("mlstm", check, device, dtype, K=K)
        return {"output 0": 0.0}

    assert verified("mlstm", check, CPU, torch.float32, K=64)


def test_other_sources_are_another_environment(monkeypatch):
    before = verdict_file(CPU)
    changed = {**MODULE.environment_of(CPU), "sources": "another"}
    monkeypatch.setattr(MODULE, "environment_of", lambda device: changed)
    assert verdict_file(CPU) != before


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("operation", "dims"),
    [
        ("mlstm", {"K": 16, "V": 32}),
        ("hybrid_step", {"K": 16, "V": 32, "F": 24}),
        ("head_loss", {"M": 16}),
        ("slstm", {"V": 16}),
        pytest.param("window_attention", {"K": 16, "V": 32}, marks=pytest.mark.slow),
    ],
)
def test_the_checks_find_our_kernels_right(operation, dims):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU: in the interpreter
    assert verified(operation, KERNELS[operation].check, device, torch.float32, **dims)


def test_auto_takes_a_kernel_only_where_it_is_right_and_has_tiles(fresh, monkeypatch):
    """The question is asked with a CPU in the place of a GPU that is not here, in eager mode and while a graph is
    compiled.
    """
    asked = []

    def check(device, dtype, K, V):
        asked.append((device, dtype, K, V))
        return {"output 0": 0.0 if V == 32 else 1.0}

    class OnGPU:
        is_cuda, device = True, CPU

    kernel = choose.Kernel("mlstm", {"K": 128, "V": 256}, check)
    monkeypatch.setattr(choose, "unavailable", lambda device: None)
    right = lambda **dims: choose.kernel_is_right(kernel, OnGPU(), torch.float32, torch.bfloat16, **dims)  # noqa: E731
    assert right(K=64, V=32) and not right(K=200, V=32) and not right(K=64, V=512)
    with pytest.warns(RuntimeWarning, match="mlstm .K 64, V 64, bfloat16. is wrong on this machine"):
        assert not right(K=64, V=64)
    assert asked == [(CPU, torch.bfloat16, 64, 32), (CPU, torch.bfloat16, 64, 64)]
    assert not choose.kernel_is_right(kernel, OnGPU(), torch.float64, torch.float64, K=64, V=32)
    assert not choose.kernel_is_right(kernel, torch.zeros(1), torch.float32, torch.float32, K=64, V=32)


def test_a_compiled_graph_asks_while_it_is_traced(monkeypatch):
    """The answer is a constant of the graph, also in `fullgraph`, which refuses whatever cannot be traced."""
    right = {"output 0": 0.0}
    monkeypatch.setattr(choose, "unavailable", lambda device: None)
    monkeypatch.setattr(
        choose,
        "runs_right",
        lambda kernel, x, calculation, dtype, dims: choose.is_verified(
            kernel.name, kernel.check, str(x.device), dtype, tuple(dims.items())
        ),
    )
    kernel = choose.Kernel("traced", {"K": 8}, answer_of(right))

    def double_if_right(x):
        return 2 * x if choose.kernel_is_right(kernel, x, torch.float32, x.dtype, K=x.shape[-1]) else x

    fn = torch.compile(double_if_right, backend="eager", fullgraph=True)
    assert torch.equal(fn(torch.ones(3, 8)), torch.full((3, 8), 2.0)) and torch.equal(
        fn(torch.ones(3, 9)), torch.ones(3, 9)
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_checks_find_a_wrong_gradient(monkeypatch):
    from xlstm_kernels.mlstm import triton as kernels

    right = kernels.mlstm_triton

    def wrong(q, k, v, i, f, state):
        h, last = right(q, k, v, i, f, state)
        return h + (f - f.detach()).mean() * 1e-2, last  # the values are right, the gradient of f is not

    monkeypatch.setattr(kernels, "mlstm_triton", wrong)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.warns(RuntimeWarning, match="gradient 4"):
        assert not verified("mlstm", KERNELS["mlstm"].check, device, torch.float32, K=16, V=16)
