"""What was written before the package's modules moved still loads: a run, its checkpoints, a state, a store.
`fixtures/` says how they were made.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from xlstm_hybrid.checkpoint.files import read_provenance, verify_files
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.pipeline import Run
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.state import load_state
from xlstm_hybrid.teacher_store import TeacherStore

BEFORE = Path(__file__).parents[1] / "fixtures/before_the_move"


@pytest.fixture
def before(tmp_path):
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def test_a_checkpoint_gives_the_logits_that_it_gave(before):
    expected = json.loads((before / "expected.json").read_text())
    verify_files(before / "run/student")
    stages = [entry["stage"] for entry in read_provenance(before / "run/student")]
    assert stages[0] == "convert" and {"align", "distill", "merge", "evaluate"} <= {
        stage.partition(":")[0] for stage in stages
    }
    model = AutoModelForCausalLM.from_pretrained(before / "run/student")
    with torch.no_grad():
        logits = model(torch.tensor([expected["ids"]])).logits[0, -4:]
    torch.testing.assert_close(logits, torch.tensor(expected["last_logits"]), atol=1e-4, rtol=1e-4)


def test_a_state_goes_on_as_it_did(before):
    expected = json.loads((before / "expected.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(before / "run/student")
    cache = load_state(before / "state.safetensors", model)
    with torch.no_grad():
        logits = model(torch.tensor([expected["ids"][-4:]]), use_cache=True, **named(cache)).logits[0]
    torch.testing.assert_close(logits, torch.tensor(expected["last_logits"]), atol=1e-4, rtol=1e-4)


def test_a_store_is_whole_and_read(before):
    store = TeacherStore(before / "store", verify="full")
    rows = [store.row(n) for n in range(len(store))]
    assert len(rows) == 4 and sum(len(row.logp) for row in rows) == 73 and {row.logp.shape[-1] for row in rows} == {8}


def test_a_run_keeps_every_stage(before):
    console = Console(file=io.StringIO(), width=200, emoji=False)
    Run(load_recipe(before / "recipe.yaml"), before / "run", console=console).run()
    said = console.file.getvalue()
    for stage in ("convert", "align", "distill:one", "distill:two", "merge"):
        assert f"{stage}: kept from an earlier run" in said, said
