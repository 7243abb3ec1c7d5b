"""What `xlstm_kernels` calls by a name is the function, whatever was imported before: some folders of operations have
the same names.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import xlstm_kernels

ROOT = Path(__file__).parents[2]
HIDING = ("mlstm", "slstm", "mix", "head_loss")  # functions whose folder has their name


@pytest.mark.parametrize(
    "before",
    [
        "import xlstm_kernels.mlstm",
        "import xlstm_kernels.mlstm.op, xlstm_kernels.slstm.check, xlstm_kernels.mix.op, xlstm_kernels.head_loss.op",
        "from xlstm_kernels.mlstm import reference; from xlstm_kernels.slstm import cpu",
        "from xlstm_kernels.delta_rule.op import delta; from xlstm_kernels.mix.op import mix",
        "import importlib; [importlib.import_module(f'xlstm_kernels.{n}.op') for n in ('head_loss', 'mlstm', 'mix')]",
    ],
)
def test_the_function_has_the_name_whatever_was_imported_before(before):
    names = ", ".join(HIDING)
    program = f"{before}\nfrom xlstm_kernels import {names}\nimport xlstm_kernels\n"
    program += f"print(*(x.__name__ for x in ({names})), *(callable(getattr(xlstm_kernels, n)) for n in {HIDING}))"
    env = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.stdout.split() == [*HIDING, *["True"] * len(HIDING)], result.stderr


def test_every_public_name_is_there():
    assert all(hasattr(xlstm_kernels, name) for name in xlstm_kernels.__all__)
    functions = "delta delta_hybrid_step delta_step fresh_state head_loss hybrid_step mix mlstm mlstm_step slstm"
    assert {
        *functions.split(),
        "window_attention",
        "window_step",
        "MLSTMState",
        "SLSTMState",
        "HeadLoss",
        "BACKENDS",
    } <= set(xlstm_kernels.__all__)
