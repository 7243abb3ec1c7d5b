"""`verify` says yes to a sound model and no, in the right row, to each defect that has been seen in models of this
kind.
"""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import enlarge, tiny_config, tiny_student, token_ids
from safetensors.torch import load_file, save_file
from tiny_students import student
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.checkpoint.files import write_manifest
from xlstm_hybrid.cli import app
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.evaluation.equivalence import (
    LOW,
    MEMORY,
    TRAINED,
    Result,
    checks_as_json,
    default_length,
    rounded_copy,
    verify,
    verify_checkpoint,
    wrapping_length,
)
from xlstm_hybrid.evaluation.equivalence_checks import CHECKS, FILES
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.experimental.cells import CELLS
from xlstm_hybrid.model.generation_checks import (
    EVERY_MODEL,
    GENERATION,
    against_loop,
    bound,
    difference,
    generate,
    token_of,
    uncached,
)
from xlstm_hybrid.model.layers import ROUTERS
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.model.tokens import Tokens

MIXED = {
    "layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"],
    "teacher_sliding_window": 5,
    "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
}
STACKS = {
    "hybrid": {},
    "mixed": MIXED,
    "post-norm": {"norm_position": "post", "qk_norm": "full"},
    "no sinks": {"num_sink_tokens": 0},
    "windows differ": {"layer_windows": [3, 7, 12], "layer_sinks": [0, 2, 4]},
}
SMALL = {"num_hidden_layers": 2, "sliding_window": 5, "num_sink_tokens": 2}
PADDING = {name for name in CHECKS if "padding" in name}
CACHED = {
    "token by token = parallel",
    "chunked prefill = full",
    "cached decoding = uncached",
    "reordered rows = recomputed",
    "forked state = recomputed",
    "rolled back = never seen",
}


def failures(results):
    return {r.name for r in results if not r.passed}


@pytest.fixture(scope="module")
def small():
    return tiny_student(torch.float32, gain=1.5, **SMALL)


@pytest.mark.parametrize(
    "stack",
    [pytest.param(name, marks=pytest.mark.slow if name in ("post-norm", "windows differ") else ()) for name in STACKS],
)
def test_a_sound_model_passes_every_check(stack):
    results = verify(tiny_student(torch.float32, gain=1.5, **STACKS[stack]), length=32)
    assert not failures(results), results
    assert len(results) == len(CHECKS) + len(GENERATION) + 5 and not any(r.note for r in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checks_hold_in_lower_precision_too(small, dtype):
    results = verify(small, length=26, dtype=dtype, only={*CACHED, *GENERATION})
    assert not failures(results), results
    # two ways that round differently were compared, not one with itself
    assert any(r.difference > 0 for r in results if r.name in CACHED)


def test_a_bfloat16_checkpoint_is_checked_on_its_own_weights():
    model = rounded_copy(tiny_student(torch.float32, gain=1.5, **SMALL), torch.bfloat16)
    results = verify(model, length=26, only={*FILES, PACKED, LOW})
    assert not failures(results), results
    assert [r.dtype for r in results][-4:] == ["bfloat16"] * 4 and model.dtype == torch.bfloat16


@pytest.mark.parametrize("sharp", [3, 10])
def test_a_float16_checkpoint_with_sharp_feature_maps_is_as_exact_as_its_rounding(sharp):
    """Sharp maps leave most features below float16's least number, and a rounded product moves the others by whole per
    cents.

    Past 10, products of features leave float32, too, and a float32 model is no longer its float64 copy.
    """
    model = tiny_student(torch.float32, gain=1.5, **SMALL)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(("q_map", "k_map")):
                x.mul_(sharp)
    results = verify(rounded_copy(model, torch.float16), length=26, only={*FILES, PACKED, MEMORY, LOW})
    assert not failures(results), results
    assert [r.dtype for r in results][-2:] == ["float16"] * 2


def test_rounding_may_choose_another_expert_and_neither_fails_the_check_nor_widens_its_bound():
    model = student("olmoe", dtype=torch.float32)
    for seed in (0, 2):  # another expert in the rounded model; in that which the bound is measured on
        results = verify(model, only={LOW}, seed=seed)
        assert not failures(results), results
        assert [r.allowed < 1 for r in results] == [True, True], results
    assert not any(router._forward_hooks for router in model.modules() if isinstance(router, ROUTERS))


def test_the_model_is_left_as_it_was(small):
    before, training = {n: p.clone() for n, p in small.named_parameters()}, small.training
    verify(small, length=26)
    assert all(torch.equal(p, before[n]) for n, p in small.named_parameters()) and small.training == training
    assert small.config.mlstm_chunk_size == 8 and not small.model.layers[0]._forward_hooks


# --- seeded defects: (where, attribute, the wrong version, rows that must turn red and rows that must not) ---------


def state_dropped(original):
    return lambda *inputs, state, chunk_size: original(*inputs, state=None, chunk_size=chunk_size)


def mask_ignored(original):
    return classmethod(lambda cls, shape, device, *, attention_mask=None, **kwargs: original(shape, device, **kwargs))


def mask_ignored_for_one_row(original):
    def locate(cls, shape, device, *, attention_mask=None, **kwargs):
        return original(shape, device, attention_mask=None if shape[0] == 1 else attention_mask, **kwargs)

    return classmethod(locate)


def mask_ignored_once_cached(original):
    def locate(cls, shape, device, *, attention_mask=None, seen=None, **kwargs):
        return original(shape, device, attention_mask=attention_mask if seen is None else None, seen=seen, **kwargs)

    return classmethod(locate)


def documents_share_their_state(original):
    def locate(cls, shape, device, **kwargs):
        found = original(shape, device, **kwargs)
        return replace(found, start=torch.zeros_like(found.start))

    return classmethod(locate)


def sinks_forgotten(original):
    def visible(self, tokens):
        found = original(self, tokens)
        found[:, :, : self.num_sink_tokens] = False
        return found

    return visible


def window_off_by_one(original):
    return lambda self, count, slots: original(self, count + 1, slots)


def state_stays_when_beams_move(original):
    def reorder(self, beam_idx):
        self.keys, self.values, self.count = (x.index_select(0, beam_idx) for x in (self.keys, self.values, self.count))

    return reorder


def ring_stays_when_beams_move(original):
    def reorder(self, beam_idx):
        self.state = type(self.state)(*(x.index_select(0, beam_idx) for x in self.state))

    return reorder


def ring_stays_when_rolled_back(original):
    def take_over(self, other):
        keys, values = self.keys, self.values
        original(self, other)
        if keys is not None:
            self.keys, self.values = keys, values

    return take_over


def state_fades_when_forked(original):
    def repeat(self, repeats):
        original(self, repeats)
        self.state = self.state._replace(C=self.state.C * 0.99)

    return repeat


def chunks_disagree(original):
    def mlstm(q, k, v, i, f, *, chunk_size, **kwargs):
        return original(q, k, v, i, f + 0.01 * (chunk_size == 16), chunk_size=chunk_size, **kwargs)

    return mlstm


LOCATE, LAYER = (Tokens, "locate"), HybridCacheLayer
STEPS = {"token by token = parallel", "cached decoding = uncached"}
PREFILL, PACKED, BEAMS, FORKED, BACK = (
    "chunked prefill = full",
    "packed documents = separate",
    "reordered rows = recomputed",
    "forked state = recomputed",
    "rolled back = never seen",
)
ALONE, INSIDE = ({n for n in PADDING if word in n} for word in ("one row", "inside"))
DEFECTS = {
    "state dropped": (CELLS["mlstm"], "run", state_dropped, CACHED - STEPS, {PACKED}),
    "mask ignored": (*LOCATE, mask_ignored, PADDING, CACHED),
    "mask ignored for one row": (*LOCATE, mask_ignored_for_one_row, ALONE, CACHED | PADDING - ALONE),
    "mask ignored once cached": (*LOCATE, mask_ignored_once_cached, INSIDE, CACHED),
    "documents leak": (*LOCATE, documents_share_their_state, {PACKED}, CACHED | PADDING),
    "sinks forgotten": (LAYER, "visible", sinks_forgotten, {PREFILL}, {"token by token = parallel"}),
    "window off by one": (LAYER, "index_of_slots", window_off_by_one, {PREFILL}, {"chunkwise = parallel"}),
    "state not reordered": (LAYER, "reorder_cache", state_stays_when_beams_move, {BEAMS}, {FORKED}),
    "ring not reordered": (LAYER, "reorder_cache", ring_stays_when_beams_move, {BEAMS}, {FORKED}),
    "ring not rolled back": (LAYER, "take_over", ring_stays_when_rolled_back, {BACK}, {BEAMS}),
    "state not forked": (LAYER, "batch_repeat_interleave", state_fades_when_forked, {FORKED}, {BEAMS}),
    "chunks disagree": (CELLS["mlstm"], "run", chunks_disagree, {"chunkwise = parallel"}, CACHED),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_turns_its_row_red_and_no_unrelated_one(small, monkeypatch, defect):
    where, name, wrong, red, green = DEFECTS[defect]
    monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    assert failures(verify(small, length=26, only=red | green)) == red


# --- generation --------------------------------------------------------------------------------------------------


def test_a_forward_that_drops_the_cache_is_seen_by_every_way_of_generating_and_by_no_other_check(small, rename_cache):
    """As a renamed argument was swallowed: all other checks hand the cache to the backbone themselves."""
    rename_cache(swallowed=True)
    results = verify(small, length=26, only={*GENERATION, *CACHED, *PADDING})
    assert failures(results) == set(GENERATION)
    # found by what was generated, not by a crash
    assert min(r.difference for r in results if r.name in EVERY_MODEL) > 0.05


def test_a_name_that_is_refused_fails_with_its_reason(small, rename_cache):
    rename_cache(swallowed=False)
    (failed,) = verify(small, length=26, only={"generate = argmax loop"})
    assert not failed.passed and failed.note.startswith("CompatibilityError: XLSTMHybridModel.forward got a cache")


def static_slots_left_empty(original):
    def put(self, keys, values, count, state):
        slots = (self.keys, self.values, self.count) if self.is_compileable else (keys, values, count)
        original(self, *slots, state)

    return put


def lengths_forgotten(original):
    """Tokens that follow a filled cache are numbered as if it held one token less."""

    def locate(cls, *args, seen=None, **kwargs):
        return original(*args, **kwargs, seen=seen if seen is None or args[0][1] == 1 else seen - 1)

    return classmethod(locate)


DRAFTS = {"generate, drafts of early layers = greedy", "generate, prompt lookup = greedy"}
IN_GENERATION = {
    "state not reordered": (
        LAYER,
        "reorder_cache",
        state_stays_when_beams_move,
        {"generate, beams with cache = without"},
    ),
    "ring not reordered": (
        LAYER,
        "reorder_cache",
        ring_stays_when_beams_move,
        {"generate, beams with cache = without"},
    ),
    "ring not rolled back": (LAYER, "take_over", ring_stays_when_rolled_back, {"generate, prompt lookup = greedy"}),
    "static slots left empty": (LAYER, "put", static_slots_left_empty, {"generate, static cache = dynamic"}),
    "lengths forgotten": (*LOCATE, lengths_forgotten, {*DRAFTS, "generate, continued = read again"}),
}


@pytest.mark.parametrize("defect", IN_GENERATION)
def test_a_defect_in_one_way_of_generating_turns_its_row_red_and_no_other(small, monkeypatch, defect):
    where, name, wrong, red = IN_GENERATION[defect]
    monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    assert failures(verify(small, length=26, only=set(GENERATION))) == red


@torch.no_grad()
def test_two_equally_likely_tokens_are_no_defect_and_a_less_likely_one_is(small):
    """Rounding may take either of two tokens that are equally likely; from there on the texts have nothing in common."""
    twins = copy.deepcopy(small).double()
    ids = token_ids(2, 26)
    first = generate(twins, ids, max_new_tokens=1).sequences[0, -1]
    other = (first + 1) % 61 if first != 60 else first - 1
    twins.lm_head.weight[other] = twins.lm_head.weight[first]
    for token, clean in ((first, True), (other, True), ((first + 7) % 61, False)):
        text = torch.cat([ids[:1], token.view(1, 1)], 1)
        out = generate(twins, text, max_new_tokens=5)
        logits = [uncached(twins, text, 1)[:, 0], *out.logits]
        found = [difference(got, want) for got, want in against_loop(twins, out.sequences, logits)]
        assert found[0] < bound(torch.float64, 2) and (found[1] < bound(torch.float64, 2)) == clean


@torch.no_grad()
def test_one_call_without_a_cache_has_the_logits_of_a_loop_of_calls(small):
    out = generate(small, ids := token_ids(2, 11))
    want = []
    for _ in range(6):
        want.append(small(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, want[-1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, ids)
    found = uncached(small, ids)
    torch.testing.assert_close(found, torch.stack(want, 1).double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(token_of(found, ids), found.amax(-1))


def test_a_checkpoints_own_settings_have_no_part_in_it_and_stay(small):
    model = copy.deepcopy(small)
    bent = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "max_new_tokens": 1, "use_cache": False}
    model.generation_config = GenerationConfig(eos_token_id=list(range(61)), **bent)
    kept = copy.deepcopy(model.generation_config)
    assert not failures(verify(model, length=26, only=set(GENERATION)))
    assert model.generation_config == kept


def test_a_step_that_loses_the_state_is_seen(small, monkeypatch):
    original = CELLS["mlstm"].step

    def step(*args, **kwargs):
        h = original(*args, **kwargs)
        args[8].C.mul_(0.99)
        return h

    monkeypatch.setattr(CELLS["mlstm"], "step", step)
    assert failures(verify(small, length=26, only=STEPS | {PACKED})) == STEPS


def test_a_state_in_half_precision_is_seen(small, monkeypatch):
    original = CELLS["mlstm"].step

    def step(*args, **kwargs):
        h = original(*args, **kwargs)
        for x in args[8]:
            x.copy_(x.bfloat16())
        return h

    monkeypatch.setattr(CELLS["mlstm"], "step", step)
    assert failures(verify(small, length=26, only=STEPS | {PREFILL})) == STEPS


def test_a_bfloat16_model_that_calculates_badly_is_seen(small, monkeypatch):
    original = MLSTMMixer.gates

    def gates(self, hidden_states, qkv):
        i, f, o = original(self, hidden_states, qkv)
        return (i, f, o) if hidden_states.dtype != torch.bfloat16 else (i, f + 0.3, o)

    monkeypatch.setattr(MLSTMMixer, "gates", gates)
    assert failures(verify(small, length=26, only={LOW, PACKED, *FILES})) == {
        "bfloat16, one forward = exact",
        "bfloat16, cached decoding = exact",
    }


def test_weights_that_do_not_survive_the_disk_are_seen(small, monkeypatch):
    original = XLSTMHybridForCausalLM.save_pretrained

    def save(self, folder, **kwargs):
        kept = self.state_dict()
        kept["model.layers.1.self_attn.mlstm.k_map"] = kept["model.layers.1.self_attn.mlstm.k_map"].half().float()
        original(self, folder, state_dict=kept, **kwargs)

    monkeypatch.setattr(XLSTMHybridForCausalLM, "save_pretrained", save)
    assert failures(verify(small, length=26, only={LOW, PACKED, *FILES})) == {"saved and loaded model = same"}


def test_not_a_number_and_a_crash_are_failures(small, monkeypatch):
    sick = tiny_student(torch.float32, gain=1.5, **SMALL)
    with torch.no_grad():
        sick.model.layers[1].self_attn.mlstm.k_map[0, 0, 0] = float("nan")
    few = {"chunkwise = parallel", PACKED, BEAMS}
    assert failures(verify(sick, length=26, only=few)) == few

    def crash(self, beam_idx):
        raise NotImplementedError("no beams here")

    monkeypatch.setattr(HybridCacheLayer, "reorder_cache", crash)
    (failed,) = (r for r in verify(small, length=26, only=few) if not r.passed)
    assert failed.name == "reordered rows = recomputed" and failed.note == "NotImplementedError: no beams here"


def test_a_model_whose_memory_is_too_faint_to_prove_anything_does_not_pass(small):
    deaf = tiny_student(torch.float32, gain=1.5, **SMALL)
    with torch.no_grad():
        for layer in deaf.model.layers:
            layer.self_attn.mlstm.ogate_bias.fill_(-60.0)
    assert failures(verify(deaf, length=26, only={MEMORY, PACKED, BEAMS})) == {MEMORY}


def test_a_faint_memory_is_enough_where_the_checks_found_far_less_than_their_bound():
    """Beside layers that calculate in float32 the bound in float64 is that of float32."""
    model = copy.deepcopy(student("olmo_hybrid", "mixed", torch.float32))
    model.model.layers[1].self_attn.mlstm.ogate_weight.data.zero_()
    only, bias = {"reordered rows = recomputed", MEMORY}, model.model.layers[1].self_attn.mlstm.ogate_bias.data
    bias.fill_(-9.0)
    assert not failures(verify(model, length=26, only=only))
    assert failures(verify(model, length=26, only={MEMORY})) == {MEMORY}
    bias.fill_(-12.0)
    assert failures(verify(model, length=26, only=only)) == {MEMORY}


def test_a_student_fresh_from_its_initialisation_can_be_proven():
    torch.manual_seed(0)
    fresh = XLSTMHybridForCausalLM(tiny_config(initializer_range=0.2))
    assert not failures(verify(fresh, length=32))


# --- numbers, files, the command -------------------------------------------------------------------------------


def test_bounds_grow_with_the_dtype_and_with_the_square_root_of_the_depth():
    by_dtype = [bound(d, 4) for d in (torch.float64, torch.float32, torch.bfloat16)]
    assert by_dtype == sorted(by_dtype) and by_dtype[0] < 1e-5
    assert bound(torch.float32, 40) / bound(torch.float32, 4) == pytest.approx(3)


def test_the_default_length_wraps_every_window_and_fills_several_chunks():
    assert wrapping_length(tiny_config()) == 7 + 3 + 33
    assert default_length(tiny_config(layer_windows=[3, 90, 12])) == 90 + 3 + 33
    assert default_length(tiny_config()) == 7 + 3 + 33
    assert default_length(tiny_config(mlstm_chunk_size=64)) == 131


def test_results_become_json_whatever_they_hold():
    results = [
        Result("a", float("inf"), 0.1, "float32", 1.0, "it crashed"),
        Result("b", float("nan"), 0.1, "float32", 1.0),
    ]
    assert not any(r.passed for r in results)
    value = json.loads(json.dumps(checks_as_json(results, model="m"), allow_nan=False))
    assert (
        value["passed"] is False
        and value["model"] == "m"
        and [c["difference"] for c in value["checks"]] == [None, None]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 23}, "length=23: expected at least 24"),
        ({"dtype": torch.int8}, r"dtype=torch.int8: expected one of \['float64'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        verify(small, **changes)


def test_the_command_prints_a_table_and_its_exit_code_is_the_verdict(small, tmp_path):
    small.save_pretrained(tmp_path / "good")
    out = CliRunner().invoke(
        app,
        ["verify", str(tmp_path / "good"), "--length", "30", "--dtype", "float32", "--json", str(tmp_path / "a.json")],
    )
    assert out.exit_code == 0, out.output
    assert "packed documents = separate" in out.output and "FAILED" not in out.output
    assert json.loads((tmp_path / "a.json").read_text())["passed"] is True
    weights = small.state_dict()
    weights.pop("model.layers.1.self_attn.mlstm.q_map")
    small.save_pretrained(tmp_path / "bad", state_dict=weights)
    out = CliRunner().invoke(app, ["verify", str(tmp_path / "bad"), "--length", "30"])
    assert (
        out.exit_code == 1
        and "FAILED" in out.output
        and "missing_keys: model.layers.1.self_attn.mlstm.q_map" in out.output
    )


def test_settings_other_than_those_of_the_training_fail_in_a_row_of_their_own_until_they_are_accepted(small, tmp_path):
    small.save_pretrained(tmp_path / "student")
    write_manifest(tmp_path / "student")  # which a stage of ours leaves: the edit differs from it as well
    command = ["verify", str(tmp_path / "student"), "--length", "30", "--json", str(tmp_path / "a.json")]

    def row(*options):
        out = CliRunner().invoke(app, [*command, *options])
        checks = json.loads((tmp_path / "a.json").read_text())["checks"]
        (found,) = (check for check in checks if check["name"] == TRAINED)
        assert all(check["passed"] for check in checks if check is not found)
        return out, found["passed"], found["difference"], found["note"]

    out, *verdict = row()
    assert out.exit_code == 0 and verdict == [True, 0, ""]
    path = tmp_path / "student/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 6, "num_sink_tokens": 1}))
    note = "num_sink_tokens was 2 in training, is 1; sliding_window was 5 in training, is 6"
    out, *verdict = row()
    assert out.exit_code == 1 and verdict == [False, 2, note] and f"{TRAINED}: {note}" in out.output
    out, *verdict = row("--accept-config")
    assert out.exit_code == 0 and verdict == [True, 2, note] and f"{TRAINED}: {note}" in out.output
    assert json.loads((tmp_path / "a.json").read_text())["passed"] is True


def test_a_checkpoint_that_tells_no_settings_has_no_such_row(small, tmp_path):
    small.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    results = verify_checkpoint(tmp_path, length=26, only={PACKED})
    assert [r.name for r in results] == ["every tensor loaded", PACKED] and not failures(results)


def test_what_is_no_student_is_refused_by_name(tmp_path):
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    enlarge(LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape))).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="llama: a llama model, expected xlstm_hybrid"):
        verify_checkpoint(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="nowhere: the model cannot be loaded"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="dtype=float33"):
        verify_checkpoint(tmp_path / "llama", dtype="float33")


@pytest.mark.slow
def test_the_installed_command_says_no_in_one_line(tmp_path):
    command = [sys.executable, "-m", "xlstm_hybrid.cli", "verify", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (
        result.returncode == 2
        and result.stderr.startswith("CheckpointError: nowhere: the model cannot be loaded")
        and "Traceback" not in result.stderr
    )
