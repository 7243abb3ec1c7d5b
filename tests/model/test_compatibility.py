"""A transformers that is newer than the tested ones is checked once, by a tiny model, before a model of ours runs."""

import functools
import json
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from conftest import tiny_student, token_ids
from tiny_students import student as tiny_linear
from tiny_teachers import teacher
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

from xlstm_hybrid import DistilXLSTMForCausalLM, XLSTMHybridForCausalLM
from xlstm_hybrid.errors import CompatibilityError, CompatibilityWarning, ConfigError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.model import compatibility
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import CACHE
from xlstm_hybrid.model.compatibility import (
    ALLOWED,
    NEWEST_TRANSFORMERS,
    SWITCH,
    TINY,
    WITH_LINEAR,
    check_tiny_model,
    ensure_compatible,
)
from xlstm_hybrid.model.generation_checks import EVERY_MODEL
from xlstm_hybrid.model.tokens import Tokens

CLASSES = {"xlstm_hybrid": XLSTMHybridForCausalLM, "distil_xlstm": DistilXLSTMForCausalLM}
kinds = pytest.mark.parametrize("kind", CLASSES)
RIGHT = {"right": True, "errors": {"generate = argmax loop": 1e-7}}
WRONG = {"right": False, "errors": {"generate = argmax loop": 2.5, "generate, left padding = none": 1e-7}}
NEWER = "99.1.0"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has asked nothing yet, on a transformers that is newer than the newest tested one."""
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(compatibility, "ANSWERS", {})
    monkeypatch.setattr(compatibility.transformers, "__version__", NEWER)  # its module may run twice: this is ours
    return tmp_path / "cache"


def checks(monkeypatch, verdict=RIGHT):
    """The types that are checked from now on; each check has this verdict."""
    asked = []

    def check(cls, kind):
        assert cls is CLASSES[kind.partition(" with ")[0]]
        asked.append(kind)
        return verdict

    monkeypatch.setattr(compatibility, "check_tiny_model", check)
    return asked


def verdicts(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["verdicts"]


def test_the_newest_tested_version_is_not_older_than_the_installed_one():
    """Where this fails, and all other tests pass on the installed transformers, it is the newest tested one."""
    assert TorchVersion(transformers.__version__) <= NEWEST_TRANSFORMERS


# --- what is checked ---------------------------------------------------------------------------------------------


@kinds
def test_the_installed_transformers_runs_our_models_right(kind):
    verdict = check_tiny_model(CLASSES[kind], kind)
    assert verdict["right"] and set(verdict["errors"]) == set(EVERY_MODEL)
    assert all(0 < error < ALLOWED[kind] / 5 for error in verdict["errors"].values())  # ways that differ were compared


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("olmo_hybrid", "qwen3_next")]


@pytest.mark.parametrize("name", [*SLOW, "qwen3_5"])
def test_the_installed_transformers_runs_linear_attention_right(name):
    verdict = check_tiny_model(XLSTMHybridForCausalLM, WITH_LINEAR[name])
    assert verdict["right"] and len(WITH_LINEAR) == 3
    assert all(0 < error < ALLOWED[WITH_LINEAR[name]] / 5 for error in verdict["errors"].values())


def test_linear_attention_that_forgets_stops_the_students_that_have_it_and_no_others(fresh, monkeypatch):
    original = modeling_qwen3_next.torch_recurrent_gated_delta_rule

    def forgetful(*args, initial_state=None, **kwargs):
        return original(*args, initial_state=torch.zeros_like(initial_state), **kwargs)

    monkeypatch.setattr(modeling_qwen3_next, "torch_recurrent_gated_delta_rule", forgetful)
    with pytest.raises(
        CompatibilityError, match="xlstm_hybrid with qwen3_next models otherwise.*argmax loop.*0.0003 is"
    ):
        ensure_compatible(XLSTMHybridForCausalLM, "qwen3_next")
    assert set(verdicts(fresh)) == {"xlstm_hybrid with qwen3_next"}
    asked = checks(monkeypatch)
    ensure_compatible(XLSTMHybridForCausalLM)
    assert asked == ["xlstm_hybrid"]


def test_loading_and_generating_ask_for_a_models_linear_attention(fresh, monkeypatch, tmp_path):
    asked = checks(monkeypatch)
    model = tiny_linear("olmo_hybrid", dtype=torch.float32)
    asked.clear()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(compatibility, "read_verdicts", lambda path: {})
    for act in (
        lambda: model.generate(token_ids(1, 3), max_new_tokens=1),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        monkeypatch.setattr(compatibility, "ANSWERS", {"xlstm_hybrid": None})
        act()
    assert asked == ["xlstm_hybrid with olmo_hybrid"] * 2


def test_the_tiny_models_have_every_kind_of_layer():
    config = XLSTMHybridForCausalLM.config_class(**TINY["xlstm_hybrid"])
    assert set(config.layer_types) == {"hybrid_sliding", "full_attention", "sliding_attention"}
    assert max(config.window_of(j) or 0 for j in range(3)) + config.num_sink_tokens < compatibility.TOKENS  # all wrap
    assert set(DistilXLSTMForCausalLM.config_class(**TINY["distil_xlstm"]).block_types) == {"mlstm", "slstm"}


@kinds
def test_a_cache_under_a_name_that_is_swallowed_makes_every_way_of_generating_wrong(kind, rename_cache):
    rename_cache(swallowed=True)
    verdict = check_tiny_model(CLASSES[kind], kind)
    assert not verdict["right"] and min(verdict["errors"].values()) > 0.05


@kinds
def test_a_cache_under_a_name_that_is_refused_is_named_before_anything_is_loaded(kind, rename_cache, fresh):
    rename_cache(swallowed=False)
    with pytest.raises(CompatibilityError, match=rf"transformers {NEWER} cannot run {kind} models.*as `kv_store`"):
        CLASSES[kind].from_pretrained("nowhere")
    assert not fresh.exists()  # a check that did not end is no verdict


def padding_read(monkeypatch):
    original = Tokens.locate.__func__

    def locate(cls, shape, device, *, attention_mask=None, position_ids=None, **kwargs):
        return original(cls, shape, device, **kwargs)

    monkeypatch.setattr(Tokens, "locate", classmethod(locate))


def rows_not_reordered(monkeypatch):
    monkeypatch.setattr(HybridCacheLayer, "reorder_cache", lambda self, beam_idx: None)


def only_the_last_token_read(monkeypatch):
    """A prompt after a filled cache is cut to its last token."""
    original = XLSTMHybridForCausalLM.prepare_inputs_for_generation

    def prepare(self, input_ids, next_sequence_length=None, **kwargs):
        held = kwargs[CACHE].get_seq_length() if kwargs.get(CACHE) is not None else 0
        return original(self, input_ids, 1 if held else next_sequence_length, **kwargs)

    monkeypatch.setattr(XLSTMHybridForCausalLM, "prepare_inputs_for_generation", prepare)


@pytest.mark.parametrize(
    ("defect", "red"),
    [
        (padding_read, "generate, left padding = none"),
        (rows_not_reordered, "generate, beams with cache = without"),
        (only_the_last_token_read, "generate, continued = read again"),
    ],
)
def test_what_goes_wrong_in_one_way_of_generating_is_told_by_its_name(defect, red, monkeypatch):
    defect(monkeypatch)
    errors = check_tiny_model(XLSTMHybridForCausalLM, "xlstm_hybrid")["errors"]
    assert {name for name, error in errors.items() if not error <= ALLOWED["xlstm_hybrid"]} == {red} and errors[
        red
    ] > 0.05


# --- when it is checked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["5.17.0", NEWEST_TRANSFORMERS, f"{NEWEST_TRANSFORMERS}.dev0"])
def test_a_tested_version_is_not_checked(version, fresh, monkeypatch):
    asked = checks(monkeypatch)
    monkeypatch.setattr(compatibility.transformers, "__version__", version)
    ensure_compatible(XLSTMHybridForCausalLM)
    assert asked == [] and not fresh.exists()


def ways(tmp_path):
    model = tiny_student(torch.float32)
    model.save_pretrained(tmp_path / "model")
    return {
        "from_pretrained": lambda: XLSTMHybridForCausalLM.from_pretrained(tmp_path / "model"),
        "the Auto class": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        "from_teacher": lambda: XLSTMHybridForCausalLM.from_teacher(teacher("llama"), sliding_window=7),
        "generate": lambda: model.generate(token_ids(1, 5), max_new_tokens=1),
    }


@pytest.mark.parametrize("way", ["from_pretrained", "the Auto class", "from_teacher", "generate"])
def test_the_first_load_or_generation_of_a_process_is_what_asks(way, fresh, monkeypatch, tmp_path):
    act, asked = ways(tmp_path)[way], checks(monkeypatch)
    for _ in range(2):
        act()
    assert asked == ["xlstm_hybrid"]


def test_a_distil_student_asks_for_its_own_kind(fresh, monkeypatch, tmp_path):
    asked = checks(monkeypatch)
    model = DistilXLSTMForCausalLM(DistilXLSTMForCausalLM.config_class(**TINY["distil_xlstm"]))
    model.generate(token_ids(1, 5), max_new_tokens=1, eos_token_id=None)
    model.save_pretrained(tmp_path)
    DistilXLSTMForCausalLM.from_pretrained(tmp_path)
    assert asked == ["distil_xlstm"] and verdicts(fresh) == {"distil_xlstm": RIGHT}


def test_a_right_verdict_is_remembered_on_disk_for_the_versions(fresh, monkeypatch):
    asked = checks(monkeypatch)
    for _ in range(2):  # as two processes
        monkeypatch.setattr(compatibility, "ANSWERS", {})
        ensure_compatible(XLSTMHybridForCausalLM)
    assert asked == ["xlstm_hybrid"] and verdicts(fresh) == {"xlstm_hybrid": RIGHT}
    (path,) = fresh.iterdir()
    assert path.name.startswith(f"transformers-{NEWER}-")
    about = json.loads(path.read_text())["environment"]
    assert (about["transformers"], about["torch"]) == (NEWER, torch.__version__)
    # another version of either is another question
    for name, value in ((compatibility.transformers, "99.2.0"), (torch, "99.0")):
        monkeypatch.setattr(compatibility, "ANSWERS", {})
        monkeypatch.setattr(name, "__version__", value)
        ensure_compatible(XLSTMHybridForCausalLM)
    assert len(asked) == 3 and len(list(fresh.iterdir())) == 3


def test_other_sources_are_another_question(monkeypatch, tmp_path):
    before = compatibility.dependencies()["sources"]
    (tmp_path / "another.py").write_text("")
    monkeypatch.setattr(compatibility, "SOURCES", tmp_path)
    assert compatibility.dependencies()["sources"] != before


def test_a_wrong_verdict_stops_every_load_and_says_what_differs_and_what_to_install(fresh, monkeypatch, tmp_path):
    act, asked = ways(tmp_path), checks(monkeypatch, WRONG)
    said = (
        rf"transformers {NEWER} with torch {torch.__version__.replace('+', '.')} runs xlstm_hybrid models otherwise.*"
        rf"\{{'generate = argmax loop': 2.5\}} differ where 5e-06 is allowed.*pip install "
        rf"'transformers<={NEWEST_TRANSFORMERS}'.*transformers-{NEWER}-\w+.json.*{SWITCH}=1 checks again, {SWITCH}=0"
    )
    for way in act.values():
        with pytest.raises(CompatibilityError, match=said):
            way()
    monkeypatch.setattr(compatibility, "ANSWERS", {})
    with pytest.raises(CompatibilityError, match=said):
        ensure_compatible(XLSTMHybridForCausalLM)
    assert asked == ["xlstm_hybrid"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"verdicts": {"xlstm_hybrid": true}}',
        '{"verdicts": {"xlstm_hybrid": {"right": false, "errors": {"a": "much"}}}}',
    ],
)
def test_a_damaged_file_costs_a_check_and_is_replaced(fresh, monkeypatch, content):
    asked = checks(monkeypatch)
    ensure_compatible(XLSTMHybridForCausalLM)
    (path,) = fresh.iterdir()
    path.write_text(content)
    monkeypatch.setattr(compatibility, "ANSWERS", {})
    ensure_compatible(XLSTMHybridForCausalLM)
    assert len(asked) == 2 and verdicts(fresh) == {"xlstm_hybrid": RIGHT}


def test_a_folder_that_cannot_be_written_costs_checks_only(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "file"))
    asked = checks(monkeypatch)
    for _ in range(2):
        monkeypatch.setattr(compatibility, "ANSWERS", {})
        ensure_compatible(XLSTMHybridForCausalLM)
    assert len(asked) == 2


def test_a_second_thread_waits_for_the_verdict(fresh, monkeypatch):
    started, release, found = threading.Event(), threading.Event(), []

    def check(cls, kind):
        started.set()
        assert release.wait(60)
        return WRONG

    def ask():
        try:
            ensure_compatible(XLSTMHybridForCausalLM)
            found.append("let through")
        except CompatibilityError:
            found.append("stopped")

    monkeypatch.setattr(compatibility, "check_tiny_model", check)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and found == []
    release.set()
    for thread in threads:
        thread.join(60)
    assert found == ["stopped", "stopped"]


def test_the_switch_leaves_the_check_out_with_a_warning(fresh, monkeypatch):
    asked = checks(monkeypatch, WRONG)
    monkeypatch.setenv(SWITCH, "0")
    with pytest.warns(CompatibilityWarning, match=rf"{NEWER} is newer than {NEWEST_TRANSFORMERS}.*is not checked") as w:
        XLSTMHybridForCausalLM(XLSTMHybridForCausalLM.config_class(**TINY["xlstm_hybrid"])).generate(
            token_ids(1, 3), max_new_tokens=1
        )
    assert [found.filename for found in w if found.category is CompatibilityWarning] == [__file__]  # the user's line
    monkeypatch.setattr(compatibility, "ANSWERS", {})
    monkeypatch.setattr(compatibility.transformers, "__version__", NEWEST_TRANSFORMERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure_compatible(XLSTMHybridForCausalLM)  # there was nothing to leave out
    assert asked == [] and not fresh.exists()


@pytest.mark.parametrize("version", [NEWEST_TRANSFORMERS, NEWER])
def test_the_switch_makes_the_check_on_every_version_and_whatever_is_remembered(version, fresh, monkeypatch):
    asked = checks(monkeypatch)
    monkeypatch.setattr(compatibility.transformers, "__version__", version)
    monkeypatch.setenv(SWITCH, "1")
    for _ in range(2):
        monkeypatch.setattr(compatibility, "ANSWERS", {})
        ensure_compatible(XLSTMHybridForCausalLM)
    assert len(asked) == 2 and verdicts(fresh) == {"xlstm_hybrid": RIGHT}


def test_a_switch_without_a_meaning_is_refused(fresh, monkeypatch):
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ConfigError, match=f"{SWITCH}='yes': expected 0"):
        ensure_compatible(XLSTMHybridForCausalLM)


# --- what it leaves alone ----------------------------------------------------------------------------------------


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "another default device": lambda: default_device("meta"),
    "another default dtype": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "a device of the caller": lambda: torch.device("meta"),
}


@functools.cache
def alone(kind):
    return check_tiny_model(CLASSES[kind], kind)


@kinds
@pytest.mark.parametrize("where", SURROUNDINGS)
def test_the_check_runs_anywhere_in_silence_and_disturbs_nothing(kind, where, fresh, capfd):
    want = alone(kind)
    with SURROUNDINGS[where](), warnings.catch_warnings():
        warnings.simplefilter("error")
        state, verbosity = torch.get_rng_state(), transformers.utils.logging.get_verbosity()
        before = torch.empty(0).device, torch.get_default_dtype(), torch.is_grad_enabled(), list(warnings.filters)
        ensure_compatible(CLASSES[kind])
        assert torch.equal(torch.get_rng_state(), state) and transformers.utils.logging.get_verbosity() == verbosity
        assert before == (
            torch.empty(0).device,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            list(warnings.filters),
        )
    assert verdicts(fresh) == {kind: want}
    assert capfd.readouterr() == ("", "")


# --- an exported checkpoint --------------------------------------------------------------------------------------

STRANGER = """
import sys

class Refuse:  # an environment without our package
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("xlstm_hybrid", "xlstm_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from functools import wraps
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

defect, folder = sys.argv[1:]
cls = get_class_from_dynamic_module("modeling_xlstm_hybrid.XLSTMHybridForCausalLM", folder)
module, forward = sys.modules[cls.__module__], cls.forward
checks = sys.modules[module.ensure_compatible.__module__]
checks.transformers.__version__ = "99.1.0"
if defect == "swallowed":

    @wraps(forward)
    def renamed(self, *args, **kwargs):
        return forward(self, *args, kv_store=kwargs.pop(module.CACHE, None), **kwargs)

    cls.forward, module.refuse_unknown = renamed, lambda *_: None
try:
    print(type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__module__)
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("defect", ["none", "swallowed"])
def test_the_code_in_an_exported_checkpoint_checks_itself(defect, tmp_path):
    tiny_student(torch.float32).save_pretrained(tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "exported")
    cache = tmp_path / "cache"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "XLSTM_KERNELS_CACHE": str(cache),
    }
    command = [sys.executable, "-c", STRANGER, defect, tmp_path / "exported"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said, found = ran.stdout.splitlines()[-1], verdicts(cache)["xlstm_hybrid"]
    assert set(found["errors"]) == set(EVERY_MODEL)
    if defect == "none":
        assert found["right"] and said.startswith("transformers_modules.")
    else:
        assert not found["right"] and min(found["errors"].values()) > 0.05
        assert said.startswith("CompatibilityError: transformers 99.1.0") and "generate = argmax loop" in said
