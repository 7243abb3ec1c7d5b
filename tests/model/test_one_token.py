"""One generated token goes through a layer from top to bottom: read from a trace of every call, in our files only."""

import sys
from pathlib import Path

import pytest
import torch
import xlstm_kernels
from conftest import tiny_student, token_ids
from xlstm_kernels import layer_step_runs

import xlstm_hybrid
from xlstm_hybrid.model import linear
from xlstm_hybrid.model import one_token as compiled
from xlstm_hybrid.state import prefill

PACKAGE, KERNELS = (str(Path(module.__file__).parent) for module in (xlstm_hybrid, xlstm_kernels))
# the last two are W_o and the MLP after the attention; below, where a CPU runs a layer compiled
PATH = ["layers", "attention", "mixer", "kernels", "cache", "attention", "layers"]
COMPILED = ["layers", "attention", "one_token", "cache", "one_token", "kernels", "attention", "layers"]
FULL = 10  # tokens that fill the window's ring and the sinks


def place(file):
    """Name of a file of ours, "kernels" for what is behind a public function of the kernels; None for others'."""
    return "kernels" if file.startswith(KERNELS) else Path(file).stem if file.startswith(PACKAGE) else None


def trace(model, cache):
    """`[(caller, callee)]`, each `(place, function)`, of one token in the last layer, in the order of the calls; of the
    callers the nearest that is ours. What a linear map calls is its own affair.
    """
    calls, stack, layer = [], [], model.model.layers[-1]

    def watch(frame, event, argument):
        here = place(frame.f_code.co_filename)
        if here and event == "call":
            call = stack[-1] if stack else None, (here, frame.f_code.co_qualname)
            if "linear" not in [file for file, _ in stack]:
                calls.append(call)
            stack.append(call[1])
        elif here and event == "return" and stack:
            stack.pop()

    hooks = (
        layer.register_forward_pre_hook(lambda *_: sys.setprofile(watch)),
        layer.register_forward_hook(lambda *_: sys.setprofile(None)),
    )
    try:
        with torch.no_grad():
            model(token_ids(1, 1), use_cache=True, cache=cache)
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    return calls


def moves(calls):
    """Files in the order in which functions of them are called, one after the other only where it changes."""
    files = [file for _, (file, _) in calls]
    return [file for n, file in enumerate(files) if n == 0 or file != files[n - 1]]


def traced(length=FULL, run_compiled=False, **options):
    model = tiny_student(torch.float32, num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        if not run_compiled:
            patch.setattr(compiled, "layer_step_runs", lambda *_: False)
            patch.setattr(linear, "linear_step_runs", lambda *_: False)
        cache = prefill(model, token_ids(1, length), **options)
        trace(model, cache)  # what is looked up once
        return trace(model, cache)


@pytest.fixture(scope="module")
def one_token():
    return traced()


def test_the_flow_moves_between_files_six_times_and_climbs_back_twice(one_token):
    found = [file for file in moves(one_token) if file != "linear"]
    found = [file for n, file in enumerate(found) if n == 0 or file != found[n - 1]]
    assert found == PATH
    assert len(found) - 1 <= 6 and sum(file in found[:n] for n, file in enumerate(found)) <= 2


@pytest.mark.skipif(not layer_step_runs(torch.float32, 16, 16), reason="nothing compiles here")
def test_a_compiled_layer_is_one_call_of_the_kernels_between_its_linear_maps():
    calls = [(caller, callee) for caller, callee in traced(run_compiled=True) if callee[0] != "linear"]
    inner = [n for n, (caller, _) in enumerate(calls) if caller and caller[0] == "kernels"]
    found = moves([call for n, call in enumerate(calls) if n not in inner])
    assert found == COMPILED


def test_the_layer_calls_mixer_kernel_and_cache_itself_and_none_of_them_calls_back(one_token):
    """Whoever calls into another file is the decoder layer or the attention; what they call stays in its own file."""
    calls = [(caller, callee) for caller, callee in one_token if caller and "linear" not in (caller[0], callee[0])]
    between = [(caller, callee) for caller, callee in calls if caller[0] != callee[0]]
    assert [caller[0] for caller, _ in between] == ["layers", "attention", "attention", "attention"]
    assert [callee[1] for _, callee in between] == [
        "HybridAttention.forward",
        "MLSTMMixer.forward",
        "hybrid_step",
        "HybridCacheLayer.advance",
    ]


def test_a_cache_that_records_is_told_of_the_token_before_the_kernel_and_of_nothing_else(one_token):
    recording = traced(rollback=40)
    plain, noted = (
        [callee[1] for caller, callee in calls if caller and caller[1] == "HybridAttention.mix_heads"]
        for calls in (one_token, recording)
    )
    assert plain == ["HybridAttention.read", "hybrid_step", "HybridCacheLayer.advance"]
    assert [name for name in noted if "Rollback.note" not in name and "Step" not in name] == plain and noted.index(
        "Rollback.note"
    ) < noted.index(plain[1])


def test_a_ring_that_is_not_full_grows_before_the_kernel_and_nothing_else_differs(one_token):
    grown = [
        callee[1]
        for caller, callee in traced(FULL - 2)  # one token, and the one that is traced
        if caller and caller[1] == "HybridAttention.mix_heads"
    ]
    assert grown == ["HybridAttention.read", "HybridCacheLayer.grow", "hybrid_step", "HybridCacheLayer.advance"]
