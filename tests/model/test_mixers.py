"""Each choice of the recurrent branch is the function that its name says, and one function of its tokens however they
reach it.
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_model, tiny_config, tiny_student, token_ids
from test_modeling import in_pieces
from tiny_teachers import teacher, teacher_config
from transformers import AutoModelForCausalLM, CompileConfig

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.evaluation.equivalence import MEMORY, verify
from xlstm_hybrid.model.configuration import MIXER
from xlstm_hybrid.model.experimental.cells import DeltaMixer, normed
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.planning.run import student_shape
from xlstm_hybrid.state import behaviour, prefill
from xlstm_hybrid.training.window_dropout import WindowDropoutSchedule

TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
OPTIONS = {
    "memory": {"mixer_branches": "memory"},
    "window": {"mixer_branches": "window"},
    "linear": {"memory_cell": "linear"},
    "no rope": {"memory_rope": False},
    "delta": {"memory_cell": "delta"},
    "delta of positive features, no rope": {
        "memory_cell": "delta",
        "memory_feature_map": "softmax_signed",
        "memory_rope": False,
    },
    "delta alone": {"memory_cell": "delta", "memory_feature_dim": 40, "mixer_branches": "memory"},
    "normed": {"mixer_norm": True},
    "normed window": {"mixer_norm": True, "mixer_branches": "window"},
    "gate of the input": {"mixer_gate_input": "x"},
    "signed": {"memory_feature_map": "softmax_signed"},
    "wide": {"memory_feature_dim": 40},
    "narrow and signed": {"memory_feature_dim": 5, "memory_feature_map": "softmax_signed", "memory_cell": "linear"},
    "no rope, all at once": {
        "memory_rope": False,
        "memory_cell": "linear",
        "mixer_branches": "memory",
        "qk_norm": "head",
    },
}


@pytest.fixture(scope="module", params=OPTIONS)
def any_choice(request):
    return tiny_student(num_hidden_layers=2, **OPTIONS[request.param])


def gated(model, bias):
    """The model with all its output gates at sigmoid(bias)."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MLSTMMixer):
                module.ogate_weight.zero_()
                module.ogate_bias.fill_(bias)
    return model


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


# --- contracts ---------------------------------------------------------------------------------------------------


def test_every_check_holds_for_every_choice(any_choice):
    """Pieces, steps, padding, packing, beams, forks, rolling back, files: see `checks`."""
    results = verify(any_choice, length=26)
    assert not [(r.name, r.difference, r.note) for r in results if not r.passed]
    assert (MEMORY in [r.name for r in results]) == (any_choice.config.mixer_branches != "window")


@torch.no_grad()
def test_a_packed_row_can_arrive_in_pieces_and_its_last_document_goes_on(any_choice):
    ids, lengths = token_ids(1, 45), [9, 1, 1, 20, 14]
    alone = torch.cat([logits_of(any_choice, part) for part in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for sizes in ([45], [1] * 45, [4, 25, 16], [15, 5, 5, 5, 5, 5, 5]):
        torch.testing.assert_close(in_pieces(any_choice, ids, sizes, position_ids=positions)[0], alone, **TOLERANCE)


def test_every_choice_is_another_function_and_survives_saving(any_choice, tmp_path):
    ids, changes = token_ids(2, 20), any_choice.config.to_diff_dict()
    default = tiny_student(num_hidden_layers=2, qk_norm=any_choice.config.qk_norm)
    same = {
        name: x for name, x in any_choice.state_dict().items() if x.shape == default.state_dict().get(name, x).shape
    }
    default.load_state_dict(same, strict=False)
    found = logits_of(any_choice, ids)
    assert (found - logits_of(default, ids)).abs().max() > 0.1
    any_choice.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (
        loaded.config.to_diff_dict().items()
        >= {k: v for k, v in changes.items() if k.startswith(("mixer", "memory"))}.items()
    )
    assert_same_model(loaded, any_choice, ids)


def test_a_static_cache_generates_what_a_model_without_a_cache_does(any_choice):
    ids, options = token_ids(2, 9), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    want = any_choice.generate(ids, use_cache=False, **options)
    assert torch.equal(any_choice.generate(ids, cache_implementation="static", **options), want)


@pytest.mark.slow
def test_compiled_steps_generate_what_eager_ones_do(any_choice):
    ids, options = (
        token_ids(1, 9),
        {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"},
    )
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    assert torch.equal(
        any_choice.generate(ids, compile_config=compiled, **options), any_choice.generate(ids, **options)
    )


def test_conversion_takes_the_choices_and_writes_them(tmp_path):
    chosen = {
        "mixer_branches": "memory",
        "memory_cell": "linear",
        "memory_rope": False,
        "memory_feature_map": "softmax_signed",
        "memory_feature_dim": 7,
    }
    report = convert(teacher("llama"), tmp_path / "student", sliding_window=7, num_sink_tokens=2, **chosen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {name: getattr(loaded.config, name) for name in chosen} == chosen
    # 3 layers, 6 heads of 10: two maps and the output gate
    assert report.parameters["new"] == 3 * 6 * (2 * 10 * 7 + 3 * 10 + 1)
    made = XLSTMHybridForCausalLM.from_teacher(teacher("llama"), sliding_window=7, num_sink_tokens=2, **chosen)
    assert_same_model(loaded, made, token_ids(1, 20))


def test_a_plan_counts_feature_maps_and_refuses_what_was_never_measured():
    config = teacher_config("llama")
    plain, wide = (
        student_shape(config),
        student_shape(config, memory_feature_map="softmax_signed", memory_feature_dim=25),
    )
    assert student_shape(config, memory_cell="linear").new < plain.new
    # layers, heads, maps, head dim
    assert (wide.columns, wide.features) == (25, 50) and wide.new - plain.new == 3 * 6 * 2 * 10 * (25 - 10)
    for choice, reason in (
        ({"memory_cell": "delta"}, "memory_cell='delta'"),
        ({"sparse_memory": 8}, "sparse_memory=8"),
        ({"memory_cell": "linear", "mixer_combine": "joint"}, "mixer_combine='joint'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            student_shape(config, **choice)


# --- branches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("branches", "bias"), [("memory", 1e3), ("window", -1e3)])
def test_a_branch_alone_is_the_student_with_a_saturated_gate(branches, bias):
    model, ids = gated(tiny_student(), bias), token_ids(2, 30)
    want = logits_of(model, ids)
    model.config.mixer_branches = branches  # as an attribute, to see what a branch remembers
    torch.testing.assert_close(logits_of(model, ids), want, **TOLERANCE)


def test_a_window_alone_remembers_the_window_and_the_sinks_and_a_memory_what_came_before():
    """With one layer: tokens that no window reaches matter to the memory alone."""
    ids = token_ids(1, 30)
    other = ids.clone()
    other[:, 5:15] = (ids[:, 5:15] + 7) % 58 + 3  # behind 3 sinks, before the window of the last 7
    changed = {}
    for branches in ("memory", "window"):
        model = tiny_student(num_hidden_layers=1, mixer_branches=branches, memory_cell="linear")
        changed[branches] = (logits_of(model, ids) - logits_of(model, other))[:, -1].abs().max()
    assert changed["window"] == 0 and changed["memory"] > 1e-3


def test_the_cache_holds_what_the_branch_needs():
    """3 layers, 2 rows, 4 heads of 16 features and values, 2 key/value heads, 3 sinks and a window of 7."""
    found = {}
    for branches in ("both", "memory", "window"):
        cache = prefill(tiny_student(mixer_branches=branches), token_ids(2, 20))
        found[branches] = (
            [sum(x.numel() for x in layer.state or ()) for layer in cache.layers],
            [layer.keys.numel() for layer in cache.layers],
        )
    state, slots = 2 * 4 * (16 * 16 + 16 + 1), 2 * 2 * 10 * 16
    assert found == {
        "both": ([state] * 3, [slots] * 3),
        "memory": ([state] * 3, [slots // 10] * 3),
        "window": ([0] * 3, [slots] * 3),
    }


@pytest.mark.parametrize("before", ["both", "memory", "window"])
@pytest.mark.parametrize("after", ["both", "memory", "window"])
def test_a_cache_that_another_branch_has_filled_is_refused(before, after):
    model = tiny_student(num_hidden_layers=1, mixer_branches=before)
    cache = prefill(model, token_ids(1, 9))
    model.config.mixer_branches = after
    refusal = pytest.raises(CacheError, match="mixer_branches")
    # that one loses its state
    with contextlib.nullcontext() if after == before or (before, after) == ("both", "window") else refusal:
        model(token_ids(1, 1), cache=cache, use_cache=True)


# --- window dropout ----------------------------------------------------------------------------------------------


def blinded(model, monkeypatch, rows):
    """Let the next draws hide the windows of `rows`; returns the list of the draws' sizes."""
    drawn = []
    monkeypatch.setattr(
        torch,
        "rand",
        lambda n, **kwargs: drawn.append(n) or torch.tensor([0.0 if j in rows else 0.999 for j in range(n)]),
    )
    return drawn


def test_a_row_that_is_drawn_does_without_its_window_in_all_layers_and_the_others_keep_it(monkeypatch):
    model, ids = tiny_student(window_dropout=0.5), token_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    want = logits_of(model, ids, attention_mask=mask)
    model.config.window_dropout, model.config.mixer_branches = 0, "memory"
    alone = logits_of(model, ids, attention_mask=mask)
    model.config.window_dropout, model.config.mixer_branches = 0.5, "both"
    drawn = blinded(model, monkeypatch, rows=(1,))
    found = model.train()(ids, attention_mask=mask, use_cache=False).logits
    assert drawn == [3]  # one draw per row and forward, whatever the number of layers
    torch.testing.assert_close(found[[0, 2]], want[[0, 2]], **TOLERANCE)
    torch.testing.assert_close(found[1, 4:], alone[1, 4:], **TOLERANCE)
    assert (want - alone)[1, 4:].abs().max() > 0.1


@pytest.mark.parametrize("mode", ["evaluation", "no gradients", "stage I"])
def test_nothing_is_hidden_outside_of_training_and_in_stage_one(monkeypatch, mode):
    model, ids = tiny_student(window_dropout=0.9), token_ids(2, 12)
    want, aligned = logits_of(model, ids), model(ids, teacher_forced=True).loss
    drawn = blinded(model, monkeypatch, rows=(0, 1))
    model.train(mode != "evaluation")
    if mode == "stage I":
        assert torch.equal(model(ids, teacher_forced=True).loss, aligned)
    else:
        with torch.set_grad_enabled(mode == "evaluation"):
            assert torch.equal(model(ids, use_cache=False).logits, want)
    assert not drawn


def test_the_share_of_hidden_rows_is_the_probability_and_the_attribute_goes_before_the_config():
    model = tiny_student(num_hidden_layers=1, window_dropout=0.25).train()
    real = torch.ones(4000, 1, dtype=torch.bool)
    torch.manual_seed(0)
    assert abs(model.model.blind_rows(real).double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    model.model.window_dropout = 0.75
    assert abs(model.model.blind_rows(real).double().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    model.model.window_dropout = 0
    assert model.model.blind_rows(real) is None


def test_checkpointed_layers_see_the_same_draw_in_both_of_their_passes():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_student(num_hidden_layers=2, window_dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(token_ids(4, 9), labels=token_ids(4, 9), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.parametrize(
    ("schedule", "steps", "want"),
    [
        ((0.9, 0.0), 5, [0.9, 0.675, 0.45, 0.225, 0.0]),
        ((0.5,), 3, [0.5] * 3),
        ((0.0, 0.8, 2), 4, [0.0, 0.4, 0.8, 0.8]),
        ((0.3, 0.1), 1, [0.3]),
    ],
)
def test_a_schedule_goes_on_a_line_from_its_start_to_its_end_and_leaves_no_trace(schedule, steps, want):
    model, callback, found = (
        XLSTMHybridForCausalLM(tiny_config(num_hidden_layers=1)),
        WindowDropoutSchedule(*schedule),
        [],
    )
    state = SimpleNamespace(global_step=0, max_steps=steps)
    callback.on_train_begin(None, state, None, model=model)
    for state.global_step in range(steps):
        callback.on_step_begin(None, state, None, model=model)
        found.append(model.model.window_dropout)
    assert found == pytest.approx(want) and model.config.window_dropout == 0
    callback.on_train_end(None, state, None, model=model)
    assert model.model.window_dropout is None


def test_a_schedule_refuses_what_is_no_probability_and_what_has_no_window():
    for wrong in ((1.0,), (0.5, -0.1), (0.5, 0.1, 0)):
        with pytest.raises(ConfigError, match="expected"):
            WindowDropoutSchedule(*wrong)
    for model in (
        torch.nn.Linear(1, 1),
        XLSTMHybridForCausalLM(tiny_config(num_hidden_layers=1, mixer_branches="memory")),
    ):
        with pytest.raises(ConfigError, match="hybrid student with both branches and a gate"):
            WindowDropoutSchedule(0.5).on_train_begin(
                None, SimpleNamespace(global_step=0, max_steps=3), None, model=model
            )


# --- cells and positions -----------------------------------------------------------------------------------------


def test_a_linear_memory_is_an_mlstm_that_writes_everything_and_forgets_nothing():
    linear, ids = tiny_student(memory_cell="linear"), token_ids(2, 30)
    gates = [name for name, _ in linear.named_parameters() if "igate" in name or "fgate" in name]
    mlstm = tiny_student()
    missing, unexpected = mlstm.load_state_dict(linear.state_dict(), strict=False)
    assert not gates and not unexpected and len(missing) == 3 * 3
    with torch.no_grad():
        for name, x in mlstm.named_parameters():
            if name in missing:
                x.fill_(1e9 if "bias" in name else 0)
    torch.testing.assert_close(logits_of(linear, ids), logits_of(mlstm, ids), **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "features"), [({}, 16), ({"memory_feature_dim": 40}, 40), ({"memory_feature_dim": 5}, 5)]
)
@pytest.mark.parametrize("signed", [False, True])
def test_features_are_a_softmax_over_all_columns_and_their_negatives(changes, features, signed):
    config = tiny_config(memory_feature_map="softmax_signed" if signed else "softmax", **changes)
    mixer = MLSTMMixer(config, 0)
    assert config.memory_features == features * (1 + signed)
    x, P = torch.randn(2, 4, 3, 16, dtype=torch.float64), torch.randn(4, 16, features, dtype=torch.float64)
    assert mixer.q_map.shape == P.shape
    found = mixer.features(x, P, signed)
    for b, h, t in ((0, 0, 0), (1, 3, 2)):
        seen = [
            math.exp(float(x[b, h, t] @ P[h, :, j]) * sign)
            for sign in ((1, -1) if signed else (1,))
            for j in range(features)
        ]
        torch.testing.assert_close(found[b, t, h], torch.tensor(seen, dtype=torch.float64) / sum(seen), **TOLERANCE)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("width", [5, 16, 40, 70])
def test_a_fresh_map_begins_with_the_identity_and_no_two_features_are_the_same(width, signed):
    kind = "softmax_signed" if signed else "softmax"
    model = XLSTMHybridForCausalLM(tiny_config(num_hidden_layers=1, memory_feature_dim=width, memory_feature_map=kind))
    first = model.model.layers[0].self_attn.mlstm.k_map[2]
    assert torch.equal(first[:, :16], torch.eye(16)[:, :width])
    every = torch.cat([first, -first], 1) if signed else first
    assert len(set(map(tuple, every.T.tolist()))) == every.shape[1]
    found = MLSTMMixer.features(torch.randn(1, 1, 9, 16), first, signed)[0, :, 0]
    assert len(set(map(tuple, found.T.tolist()))) == every.shape[1]


@pytest.mark.parametrize("kind", [None, "softmax", "softmax_signed"])
def test_the_delta_rule_reads_features_of_length_one_and_prefers_signed_ones(kind):
    config = tiny_config(memory_cell="delta", memory_feature_map=kind)
    assert config.memory_feature_map == (kind or "silu") and tiny_config().memory_feature_map == "softmax"
    mixer, x, P = (
        DeltaMixer(config, 0),
        torch.randn(2, 4, 3, 16, dtype=torch.float64),
        torch.randn(4, 16, 16, dtype=torch.float64),
    )
    found, y = mixer.read(x, P), (x @ P).transpose(1, 2)
    want = y * torch.sigmoid(y) if kind is None else mixer.features(x, P, kind == "softmax_signed")
    torch.testing.assert_close(found, want / want.norm(dim=-1, keepdim=True), atol=1e-4, rtol=1e-4)
    zero = torch.zeros_like(x).requires_grad_()
    mixer.read(zero, P).sum().backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() < 1e5


@pytest.mark.parametrize("rope", [True, False])
def test_without_rope_the_memory_does_not_know_how_far_apart_tokens_are(rope):
    """Positions that grow in steps of three are the same to it; it still knows their order."""
    model, ids = tiny_student(memory_rope=rope, mixer_branches="memory"), token_ids(1, 20)
    near, far = (logits_of(model, ids, position_ids=step * torch.arange(20)[None]) for step in (1, 3))
    if rope:
        assert (near - far).abs().max() > 0.1
    else:
        torch.testing.assert_close(near, far, **TOLERANCE)
    assert (logits_of(model, ids.flip(1)).flip(1) - near)[:, 1:-1].abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_branches": "windows"}, "expected one of"),
        ({"memory_cell": "gru"}, "expected one of"),
        ({"window_dropout": 1.0}, "below 1"),
        ({"window_dropout": -0.1}, "at least 0"),
        ({"window_dropout": 0.5, "mixer_branches": "memory"}, "one branch only"),
        ({"memory_feature_map": "silu"}, "positive features"),
        ({"memory_feature_map": "relu"}, "expected one of"),
        ({"memory_feature_dim": 0}, "at least 1 feature"),
        ({"mixer_combine": "joint"}, "memory_cell='mlstm': expected 'linear'"),
        ({"mixer_combine": "joint", "memory_cell": "linear", "window_dropout": 0.1}, "window_dropout=0.1: expected 0"),
        ({"mixer_combine": "sum"}, "expected one of"),
        ({"mixer_gate_input": "h"}, "expected one of"),
    ],
)
def test_choices_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_an_attribute_that_is_no_choice_is_refused_by_the_next_call(student):
    model = XLSTMHybridForCausalLM(tiny_config(num_hidden_layers=1))
    model.config.mixer_branches = "nothing"
    with pytest.raises(ConfigError, match="mixer_branches='nothing'"):
        model(token_ids(1, 3))


def test_a_config_without_choices_is_what_it_was_before_there_were_any():
    """States, merges and runs from before know none of these fields."""
    config = tiny_config()
    assert {name: getattr(config, name) for name in MIXER} == MIXER and not behaviour(config).keys() & MIXER.keys()
    assert {"memory_cell", "sparse_memory"} <= behaviour(tiny_config(memory_cell="delta", sparse_memory=3)).keys()
    assert "window_dropout" not in behaviour(tiny_config(window_dropout=0.5))  # of the training alone


# --- norm and gate input -------------------------------------------------------------------------------------------


def test_a_normed_mix_has_each_heads_root_mean_square_of_its_weight():
    mixer = MLSTMMixer(tiny_config(mixer_norm=True), 0)
    assert mixer.norm_weight.shape == (4, 16)
    torch.nn.init.constant_(mixer.norm_weight, 3.0)
    h = torch.randn(2, 5, 4, 16, dtype=torch.float64) * torch.tensor([0.1, 1, 10, 100], dtype=torch.float64)[:, None]
    found = normed(mixer, h)
    torch.testing.assert_close(
        found.square().mean(-1).sqrt(), torch.full((2, 5, 4), 3.0, dtype=torch.float64), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), h / h.norm(dim=-1, keepdim=True), **TOLERANCE)


def test_a_gate_of_the_input_is_a_linear_layer_with_a_sigmoid():
    mixer = MLSTMMixer(tiny_config(mixer_gate_input="x"), 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x, raw = torch.randn(2, 3, 48), [torch.randn(2, 3, heads, 16) for heads in (4, 2, 2)]
    o = mixer.gates(x, raw)[2]
    want = 1 / (1 + math.exp(-(x[1, 2] @ mixer.ogate_weight[3] + mixer.ogate_bias[3]).item()))
    assert o[1, 2, 3].item() == pytest.approx(want, rel=1e-5)
    assert torch.equal(mixer.gates(x, [part + 1 for part in raw])[2], o)


def test_a_gate_of_q_k_v_reads_the_heads_own_query_and_the_key_and_value_of_its_group():
    mixer = MLSTMMixer(tiny_config(), 0).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = (torch.randn(2, 3, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    o = mixer.gates(torch.randn(2, 3, 48, dtype=torch.float64), (q, k, v))[2]
    for head, group in enumerate((0, 0, 1, 1)):
        read = torch.cat([q[1, 2, head], k[1, 2, group], v[1, 2, group]])
        want = 1 / (1 + math.exp(-(read @ mixer.ogate_weight[head] + mixer.ogate_bias[head]).item()))
        assert o[1, 2, head].item() == pytest.approx(want, rel=1e-9)
