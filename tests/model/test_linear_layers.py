"""Layers of linear attention that a student keeps: in every way that it runs they are what they are in a call without a
cache, on documents alone.
"""

import copy

import pytest
import torch
from tiny_students import CLOSE, W, ids_of, student
from tiny_teachers import WITH_LINEAR, in_float64, rewrite, stored, teacher, teacher_config, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from xlstm_hybrid import XLSTMHybridForCausalLM, convert
from xlstm_hybrid.conversion.convert import load_teaching
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.errors import CacheError, CheckpointError, CompatibilityError, ConfigError
from xlstm_hybrid.evaluation.equivalence import verify
from xlstm_hybrid.hub.graphs import refuse_config
from xlstm_hybrid.model import linear_attention
from xlstm_hybrid.model.adapters import coverage, target_names
from xlstm_hybrid.model.cache_names import cache_of, named
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.model.linear_attention import LinearCacheLayer, attend
from xlstm_hybrid.model.mixer import NotParallel
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.planning.cache_size import cache_bytes, filled_bytes
from xlstm_hybrid.planning.run import attention_flops, jobs_of, student_shape
from xlstm_hybrid.serving.rows import Rows
from xlstm_hybrid.state import fork, load_state, prefill, recorded, rollback, save_state, snapshot
from xlstm_hybrid.training.calibration import calibrate_model
from xlstm_hybrid.training.distillation import check_documents_stay_apart

LINEAR = "linear_attention"
SHORT = 11  # tokens of the shorter row
COLUMNS = {"left": range(8, 19), "right": range(11), "inside": [*range(3, 9), *range(12, 17)]}


@pytest.fixture
def exact(monkeypatch):
    """The student of OLMo-Hybrid, whose recurrence calculates in float64 here as everything else."""
    in_float64(monkeypatch, "olmo_hybrid")
    with torch.no_grad():
        yield student("olmo_hybrid")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, **CLOSE)


# --- padding and documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", COLUMNS)
def test_padding_anywhere_changes_nothing_now_or_in_what_follows(side, use_cache, exact):
    ids, columns = ids_of(19), list(COLUMNS[side])
    alone, batch, mask = ids[1:, :SHORT], torch.full((2, 19), 5), torch.zeros(2, 19, dtype=torch.long)
    batch[0], mask[0], batch[1, columns], mask[1, columns] = ids[0], 1, alone[0], 1
    out = exact(batch, attention_mask=mask, use_cache=use_cache)
    close(out.logits[1, columns], exact(alone, use_cache=False).logits[0])
    close(out.logits[:1], exact(ids[:1], use_cache=False).logits)
    if use_cache:  # then two tokens, padding for the second row, and one token more
        more, whole = ids_of(4, seed=1), torch.cat([alone, ids_of(4, seed=1)[1:, [0, 1, 3]]], 1)
        for begin, end in ((0, 2), (2, 3), (3, 4)):
            mask = torch.cat([mask, torch.ones(2, end - begin, dtype=torch.long)], 1)
            mask[1, -1] = begin != 2
            out = exact(more[:, begin:end], attention_mask=mask, use_cache=True, cache=cache_of(out))
        close(out.logits[1], exact(whole, use_cache=False).logits[0, -1:])
        close(out.logits[0], exact(torch.cat([ids[:1], more[:1]], 1), use_cache=False).logits[0, -1:])


def test_documents_of_a_row_know_nothing_of_each_other_and_the_last_goes_on(exact):
    ids = ids_of(15)
    first, second, more = ids[:1], ids[1:, :SHORT], ids_of(3, rows=1, seed=1)
    position_ids = torch.cat([torch.arange(15), torch.arange(SHORT)])[None]
    out = exact(torch.cat([first, second], 1), position_ids=position_ids, use_cache=True)
    close(out.logits, torch.cat([exact(x, use_cache=False).logits for x in (first, second)], 1))
    beginning = snapshot(cache_of(out))
    found = exact(more[:, :2], position_ids=torch.tensor([[SHORT, SHORT + 1]]), use_cache=True, cache=cache_of(out))
    close(found.logits, exact(torch.cat([second, more[:, :2]], 1), use_cache=False).logits[:, -2:])
    found = exact(more[:, 2:], position_ids=torch.tensor([[0]]), use_cache=True, cache=beginning)  # another document
    close(found.logits, exact(more[:, 2:], use_cache=False).logits)


@pytest.mark.parametrize("family", ["olmo_hybrid", "qwen3_5_text"])
@torch.no_grad()
def test_documents_stay_apart_under_autocast(family):
    """As bf16 trains: the module's output is narrower than its input."""
    model, positions = student(family, dtype=torch.float32), torch.arange(9).repeat(2)[None]
    x, run = torch.randn(1, 18, 50, generator=torch.Generator().manual_seed(0)), model.model.layers[0].run
    tokens = Tokens.locate((1, 18), "cpu", position_ids=positions)
    tokens.find_runs(torch.zeros(1, dtype=torch.long), cached=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, cache = attend(run, x, tokens), LinearCacheLayer()
        want = torch.cat([run(part, None, None) for part in x.split(9, 1)], 1)
        kept = attend(run, x, tokens, cache)
    assert found.dtype == want.dtype == torch.bfloat16 and torch.equal(found, want) and torch.equal(kept, want)


def test_the_gradients_of_packed_documents_are_those_of_each_alone(monkeypatch):
    in_float64(monkeypatch, "olmo_hybrid")
    model, ids = copy.deepcopy(student("olmo_hybrid")), ids_of(9)
    position_ids = torch.arange(9).repeat(2)[None]

    def gradients(*calls):
        model.zero_grad()
        for x, where in calls:
            model(x, position_ids=where, use_cache=False).logits.square().mean(-1).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if ".linear_attn." in name}

    packed = gradients((ids.view(1, -1), position_ids))
    apart = gradients(*((row[None], None) for row in ids))
    assert len(packed) == 2 * 11 and all(float(x.abs().max()) > 1e-3 for x in apart.values())
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-8)


def test_gradients_go_through_a_cache_from_call_to_call(monkeypatch):
    in_float64(monkeypatch, "olmo_hybrid")
    model, ids = copy.deepcopy(student("olmo_hybrid")), ids_of(12)

    def gradients(*sizes):
        cache = DynamicCache(config=model.config)
        model.zero_grad()
        parts = [model(x, use_cache=True, cache=cache).logits for x in ids.split(sizes, 1)]
        torch.cat(parts, 1).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if ".linear_attn." in name}

    torch.testing.assert_close(gradients(6, 4, 1, 1), gradients(12), rtol=1e-6, atol=1e-6)


# --- states ------------------------------------------------------------------------------------------------------


def test_states_are_taken_back_copied_and_repeated(exact):
    ids = ids_of(3 * W)
    want = exact(ids, use_cache=False).logits
    cache = prefill(exact, ids[:, : 2 * W], rollback=9, piece=5)
    assert [type(layer) for layer in cache.layers[::2]] == [LinearCacheLayer] * 2 and cache.get_seq_length() == 2 * W
    other = snapshot(cache)
    rollback(cache, 7)  # a whole call and a part of one
    assert (recorded(cache), cache.get_seq_length(), other.get_seq_length()) == (2, W, 2 * W)
    for begin, end in ((W, W + 1), (W + 1, 2 * W)):
        close(exact(ids[:, begin:end], use_cache=True, cache=cache).logits, want[:, begin:end])
    for state in (cache, other, fork(cache, 2)):
        rows = state.layers[0].tensors()[0].shape[0] // 2
        found = exact(ids[:, 2 * W :].repeat_interleave(rows, 0), use_cache=True, cache=state).logits
        close(found[::rows], want[:, 2 * W :])
    with pytest.raises(CacheError, match="are recorded; call remember"):
        rollback(cache, recorded(cache) + 1)
    cache.reset()
    close(exact(ids, use_cache=True, cache=cache).logits, want)


@torch.no_grad()
def test_a_file_of_a_state_is_the_state_and_a_damaged_one_is_refused(tmp_path):
    model, ids = student("olmo_hybrid", "mixed", torch.float32), ids_of(2 * W)
    cache, path = prefill(model, ids[:, :W]), tmp_path / "state.safetensors"
    save_state(cache, path, model)
    loaded = load_state(path, model)
    assert torch.equal(*(model(ids[:, W:], use_cache=True, cache=state).logits for state in (cache, loaded)))
    conv, recurrent = loaded.layers[0].tensors()
    assert (tuple(conv.shape), tuple(recurrent.shape)) == ((2, 2 * 2 * 6 + 4 * 8, 4), (2, 4, 6, 8))
    loaded.layers[0].lazy_initialization(conv[:, :-1], recurrent)
    save_state(loaded, path, model)
    with pytest.raises(CacheError, match=r"layer 0 holds \{'conv': \(2, 55, 4\), .*expected \{'conv': \(2, 56, 4\)"):
        load_state(path, model)


def test_a_static_cache_holds_what_a_dynamic_one_does(exact):
    model, ids = student("olmo_hybrid", "mixed"), ids_of(2 * W)
    cache = StaticCache(config=model.config, max_cache_len=3 * W)
    found = [model(part, use_cache=True, cache=cache).logits for part in (ids[:, :W], *ids[:, W:].split(1, 1))]
    close(torch.cat(found, 1), model(ids, use_cache=False).logits)


def test_rows_of_a_running_batch_join_and_leave(exact):
    ids, rows = ids_of(W + 4, rows=3), Rows(exact)
    rows.join([prefill(exact, ids[j : j + 1, : W + j]) for j in range(2)])
    rows.step([int(ids[0, W]), int(ids[1, W + 1])])
    rows.join([prefill(exact, ids[2:, :3])])
    rows.keep([1, 2])
    assert rows.lengths == [W + 2, 3] and rows.mask() is None
    found = rows.step([int(ids[1, W + 2]), int(ids[2, 3])])
    for row, (j, length) in enumerate(((1, W + 3), (2, 4))):
        close(found[row], exact(ids[j : j + 1, :length], use_cache=False).logits[0, -1])


def test_layers_that_are_not_split_are_those_that_there_are():
    """FSDP looks for each of them, and ends where one is missing."""
    assert student("llama")._no_split_modules == {"HybridDecoderLayer"}
    assert student("olmo_hybrid")._no_split_modules == {"HybridDecoderLayer", "LinearDecoderLayer"}


@torch.no_grad()
def test_a_plan_counts_the_bytes_that_a_cache_has():
    model, original, ids = student("qwen3_next", "mixed", torch.float32), teacher("qwen3_next"), ids_of(2 * W)
    assert filled_bytes(prefill(model, ids)) == 2 * sum(cache_bytes(model.config, 2 * W, torch.float32).values())
    read = cache_of(original(ids, use_cache=True, **named(DynamicCache(config=original.config))))
    assert filled_bytes(read) == 2 * sum(cache_bytes(model.config, 2 * W, torch.float32, teacher=True).values())


# --- training ----------------------------------------------------------------------------------------------------


def test_stages_0_and_1_pass_through_linear_layers_and_train_nothing_in_them():
    model, ids = copy.deepcopy(student("olmo_hybrid", dtype=torch.float32, gain=1.0)), ids_of(40)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = calibrate_model(model, [{"input_ids": ids}], [{"input_ids": ids_of(40, seed=1)}])
    assert list(found) == [1, 3] and all(x["after"] < x["before"] for x in found.values())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(".mlstm." in name for name in changed)
    out = model(ids, teacher_forced=True)
    assert (out.sums[::2] == 0).all() and (out.error[1::2] > 0).all()
    out.loss.backward()
    assert all((p.grad is not None) == (".mlstm." in name) for name, p in model.named_parameters())


def test_a_teacher_of_packed_rows_is_the_student_that_keeps_every_layer(tmp_path):
    original, inputs = teacher("olmo_hybrid"), ["input_ids", "position_ids"]
    original.save_pretrained(tmp_path)
    model = load_teaching(tmp_path, device="cpu")
    with torch.no_grad():
        close(model(tokens()).logits, original(tokens()).logits)
    check_documents_stay_apart(model, "teacher", inputs)
    with pytest.raises(ConfigError, match="the teacher .OlmoHybridForCausalLM. lets packed documents see each other"):
        check_documents_stay_apart(original, "teacher", inputs)


def test_adapters_reach_the_projections_of_linear_layers():
    olmo, qwen = (student(family) for family in ("olmo_hybrid", "qwen3_next"))
    assert target_names(olmo, "linear_attention") == ["a_proj", "b_proj", "g_proj"]
    assert target_names(qwen, "linear_attention") == ["in_proj_qkvz", "in_proj_ba", "out_proj"]
    assert set(target_names(qwen, "projections")) > set(target_names(qwen, "attention"))
    counted = sum(p.numel() for name, p in qwen.named_parameters() if ".linear_attn." in name)
    assert coverage(qwen).groups["linear attention"]["parameters"] == counted


def test_flops_of_a_linear_layer_are_no_ones_attention():
    shape, job = student_shape(teacher_config("qwen3_5_text")), jobs_of()["align"]
    assert (shape.linear, shape.hybrid, shape.recurrence) == (2, 2, 6 * 4 * 6 * 8)
    assert attention_flops(shape, job.length) == (2 * 4 * 60 * (job.length + 1) / 2, 2 * shape.recurrence)


# --- conversion --------------------------------------------------------------------------------------------------


def test_three_convolutions_of_a_checkpoint_are_joined_or_named(tmp_path):
    original = teacher("olmo_hybrid")
    original.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    report = convert(tmp_path / "teacher", tmp_path / "out", layer_types="teacher", shard_bytes=30_000)
    assert report.parameters == {"teacher": original.num_parameters(), "student": original.num_parameters()} | {
        "new": 0,
        "trainable_in_stage_1": 0,
    }
    for name, x in stored(tmp_path / "out").items():
        assert torch.equal(x, original.state_dict()[name])
    part = "model.layers.2.linear_attn.k_conv1d.weight"
    rewrite(tmp_path / "teacher", lambda weights: {name: x for name, x in weights.items() if name != part})
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.2.linear_attn.conv1d.weight\).*q_conv1d"):
        convert(tmp_path / "teacher", tmp_path / "other")


@torch.no_grad()
def test_without_a_theta_nothing_rotates():
    original = copy.deepcopy(teacher("olmo_hybrid")).double()
    original.config.rope_parameters["rope_theta"] = None
    original.model.rotary_emb = None
    for options in ({"layer_types": "teacher"}, {"sliding_window": 45, "mlstm_output_gate_bias": -1e4}):
        model = XLSTMHybridForCausalLM.from_teacher(original, **options)
        assert torch.equal(model(tokens()).logits, original(tokens()).logits)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["hybrid_sliding"] * 4}, "layer 0 is hybrid_sliding, and linear_attention in the teacher"),
        ({"layer_types": [LINEAR] * 4}, "layer 1 is linear_attention, and full_attention in the teacher"),
        ({"linear_attention": "mamba"}, r"linear_attention='mamba': expected one of \['olmo_hybrid', 'qwen3_next'"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim=None: expected at least 1"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads=4 is no multiple of linear_num_key_heads=3"),
    ],
)
def test_fields_that_describe_no_linear_layers_are_refused(changes, message):
    fields = student_config(teacher_config("olmo_hybrid")).to_dict()
    with pytest.raises(ConfigError, match=message):
        XLSTMHybridConfig(**fields | changes)


def test_what_such_a_student_cannot_is_refused_by_name(monkeypatch):
    model, ids = student("olmo_hybrid"), ids_of(W)
    with pytest.raises(ConfigError, match=r"layers \[0, 2\] are linear_attention, expected hybrid_sliding"):
        refuse_config(model.config, "onnx")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ConfigError, match="torch.compile: layers of linear attention"):
        model(ids)
    monkeypatch.undo()
    assert model.config.base_model_tp_plan["layers.*.linear_attn"] == LINEAR
    mesh = type("Mesh", (), {"size": lambda self: 2})()
    with pytest.raises(
        ConfigError, match="model.A_log: layers of linear attention with tp_size=2: they are not shared"
    ):
        NotParallel().validate_param(None, "A_log", mesh, parameter_name="model.A_log")
    cache = DynamicCache(config=model.config)
    assert type(cache.layers[0]) is LinearAttentionLayer
    cache.layers[0].update_conv_state(torch.ones(2, 56, 4))
    with pytest.raises(CacheError, match="layer 0 is a filled LinearAttentionLayer, expected LinearCacheLayer"):
        model(ids, use_cache=True, cache=cache)


def test_a_transformers_without_the_module_is_named(monkeypatch):
    config = student("olmo_hybrid").config
    monkeypatch.setitem(linear_attention.LINEAR_ATTENTION, "olmo_hybrid", "OlmoHybridMLP")
    with pytest.raises(CompatibilityError, match=r"'olmo_hybrid': expected OlmoHybridMLP with .* has \['self', 'x'\]"):
        XLSTMHybridForCausalLM(config)
    with pytest.raises(CompatibilityError, match="keeps no states in a cache of one LinearAttentionLayer"):
        LinearCacheLayer().update(lambda x, mask, cache: x, torch.ones(1, 2, 3), Tokens.locate((1, 2), "cpu"))
    monkeypatch.setitem(linear_attention.LINEAR_ATTENTION, "olmo_hybrid", "Nothing")
    with pytest.raises(CompatibilityError, match="has no such module; install"):
        XLSTMHybridForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_LINEAR)
def test_every_check_of_verify_passes(family):
    failed = [result for result in verify(student(family, "mixed", torch.float32, gain=1.5)) if not result.passed]
    assert not failed
