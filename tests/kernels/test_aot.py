"""Every Triton kernel compiles for GPUs that are not here: nothing spills, shared memory suffices, half precision meets
tensor cores.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = ("mlstm", "window", "step", "head_loss", "slstm")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(*options):
    """Rows of `kernels/aot.py`, run where triton is not the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": f"{ROOT}/src:{ROOT}/kernels"
    }
    run = [sys.executable, str(ROOT / "kernels/aot.py"), "--jobs", "1", "--json", "-", *options]
    result = subprocess.run(run, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def assert_sound(rows):
    assert rows
    assert not {
        f"{r['kernel']}, {r['case']}, sm_{r['chip']}" if "kernel" in r else f"{r['operation']} {r['entry']}": r["red"]
        for r in rows
        if r["red"]
    }


@needs_triton
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_table_entry_compiles_for_sm_90(operation):
    assert_sound(compiled("--operations", operation, "--chips", "90"))


@needs_triton
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_entry_of_every_kernel_compiles_for_sm_80_and_sm_100(operation):
    rows = compiled("--operations", operation, "--chips", "80,100", "--one")
    assert {r["chip"] for r in rows} == {80, 100}
    assert_sound(rows)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["80", "86", "100"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_table_entry_compiles_for_the_other_chips(operation, chip):
    assert_sound(compiled("--operations", operation, "--chips", chip))


@needs_triton
def test_a_tile_that_is_too_large_is_found_out():
    program = """
import torch, aot
from xlstm_kernels.backends import launch
real = launch.look_up
def greedy(table, device, width, dtype):
    return real(table, device, width, dtype)._replace(num_stages=40, num_warps=4)
from xlstm_kernels.window import triton
triton.look_up = greedy
name, launches = next(iter(aot.launches_of("window", 90, True).items()))
aot.launches_of = lambda *job: {name: launches[:1]}
(row,) = aot.examine(("window", name, 90, True))
assert any("shared" in reason or "STACK" in reason for reason in row["red"]), row
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": f"{ROOT}/src:{ROOT}/kernels"
    }
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
