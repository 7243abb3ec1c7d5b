"""Stage 0 sets feature maps and gates in closed form, and leaves a memory shut that does not help."""

import copy

import pytest
import torch
from conftest import tiny_student, token_ids
from safetensors.torch import load_file
from tiny_students import MIXED, every_family, ids_of, left_padded, mixed_checkpoint
from tiny_students import student as student_of
from tiny_teachers import rewrite
from transformers import AutoModelForCausalLM

from xlstm_hybrid.checkpoint.files import read_provenance, verify_files
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.training import calibration
from xlstm_hybrid.training.alignment import measure_alignment, new_parameters
from xlstm_hybrid.training.calibration import (
    Calibration,
    calibrate_layer,
    calibrate_model,
    calibrate_streamed,
    centroids,
    observe,
)

LENGTH = 40


def text(rows=6, seed=0, length=LENGTH):
    return [{"input_ids": token_ids(rows, length, seed=seed)}]


def no_layer_is_worse_than_its_window(model, fitted, held_out):
    """Calibrate; a shut gate leaks three parts in ten thousand of the memory. Returns the figures."""
    figures = calibrate_model(model, fitted, held_out)
    assert figures and all(p.isfinite().all() for p in new_parameters(model).values())
    for layer in figures.values():
        assert layer["after"] <= layer["window"] * 1.01 + 1e-9
    return figures


@torch.no_grad()
def seen_of(model, batches, layer=0):
    """`(layer, [Seen])` of a student's first layer."""
    trunk, found = model.model, []
    for batch in batches:
        states = trunk.embed_tokens(batch["input_ids"])
        _, where, masks = trunk.prepare(states, None, None, None, teacher=True)
        mask = masks[trunk.config.teacher_layer_types[layer]]
        found.append(observe(trunk.layers[layer], states, teacher_mask=mask, **where[layer])[0])
    return trunk.layers[layer], found


def planted(count=8, copies=40, noise=0.01, seed=0):
    """`(centres [count, 6], keys [count * copies, 6], queries)`; the first coordinate of a key is about 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.cat([torch.ones(count, 1), torch.randn(count, 5, generator=generator)], 1)
    keys = centres.repeat(copies, 1) + noise * torch.randn(count * copies, 6, generator=generator)
    return centres, keys, torch.randn(200, 6, generator=generator) * 2


# --- feature maps ------------------------------------------------------------------------------------------------


def test_planted_clusters_of_keys_are_found():
    centres, keys, queries = planted()
    asked, _, constant = centroids(queries, keys, torch.ones(len(keys)), 32, 0.4)
    distances = torch.cdist(centres, asked.T / 0.4)
    assert asked.shape == (6, 32) and distances.min(1).values.max() < 0.02  # every cluster has a centroid
    assert (keys @ constant - (keys @ constant).mean(0)).abs().max() < 0.2 * (keys @ constant).abs().max()


def test_features_of_clustered_keys_give_softmax_attention():
    """exp(q k) is a product of features where keys are close to a centroid: the weights of the linear attention are those
    of softmax.
    """
    _, keys, queries = planted(noise=0.003)
    asked, assigned, constant = centroids(queries, keys, torch.ones(len(keys)), 32, 0.4)
    phi_q = MLSTMMixer.features(queries[None, None], asked[None])[0, :, 0]
    phi_k = MLSTMMixer.features(keys[None, None], 100 * (assigned - constant)[None])[0, :, 0]
    weights = phi_q @ phi_k.T
    expected = torch.softmax(queries @ keys.T * 0.4, -1)
    found = weights / weights.sum(-1, keepdim=True)
    assert (found - expected).abs().sum(-1).mean() < 0.05  # of 2 at most; uniform weights are 0.9 away
    assert (torch.full_like(expected, 1 / len(keys)) - expected).abs().sum(-1).mean() > 0.5


def test_keys_that_nobody_asks_for_move_no_centroid():
    centres, keys, queries = planted(count=4)
    outliers = torch.full((100, 6), 30.0)
    weight = torch.cat([torch.ones(len(keys)), torch.zeros(100)])
    asked, *_ = centroids(queries, torch.cat([keys, outliers]), weight, 8, 1.0)
    assert torch.cdist(centres, asked.T).min(1).values.max() < 0.05


@pytest.mark.parametrize("case", ["equal keys", "keys of 0", "queries of 0", "one key", "nothing received"])
def test_degenerate_heads_give_finite_maps(case):
    _, keys, queries = planted()
    received = torch.ones(len(keys))
    if case == "equal keys":
        keys = keys[:1].expand_as(keys)
    elif case == "keys of 0":
        keys = keys * 0
    elif case == "queries of 0":
        queries = queries * 0
    elif case == "one key":
        keys, received = keys[:1], received[:1]
    else:
        received = received * 0
    for part in centroids(queries, keys, received, 8, 0.4):
        assert part.shape == (6, 8) and part.isfinite().all()


def test_what_a_key_receives_comes_from_beyond_the_window():
    """By hand, token by token: the window shows 7 tokens and the first 3."""
    model = tiny_student(torch.float64)
    layer, (seen,) = seen_of(model, text(2))
    query, key = seen.projected[0], seen.projected[1].repeat_interleave(2, 1)
    expected = torch.zeros(2, 4, LENGTH, dtype=torch.float64)
    for t in range(LENGTH):
        scores = torch.einsum("bhk,bhsk->bhs", query[:, :, t], key[:, :, : t + 1]) * 16**-0.5
        far = [s for s in range(t + 1) if t - s >= 7 and s >= 3]
        expected[:, :, far] += torch.softmax(scores, -1)[:, :, far]
    torch.testing.assert_close(seen.received.double(), expected, atol=1e-5, rtol=1e-4)
    assert expected[:, :, -7:].sum() == 0 and expected.sum() > 1


# --- gates -------------------------------------------------------------------------------------------------------


def planted_gate(weight, bias, excess=1.0, gain=1.0):
    """A `Calibration` whose teacher is the mix with the output gate sigmoid(z weight + bias), times `excess`."""
    layer, seen = seen_of(tiny_student(torch.float32, gain=gain), text(24) + text(24, seed=5))
    found = Calibration(layer, seen[:1], seen[1:])
    for batch in seen:
        z = found.gate_inputs(batch)[..., :-1]
        gate = torch.zeros(batch.tokens.real.shape + (4,))
        gate[batch.tokens.real] = torch.sigmoid((z * weight).sum(-1) + bias)
        batch.missing = excess * gate[..., None] * found.surplus(batch)
    return found


@torch.no_grad()
def test_a_gate_that_the_teacher_follows_is_recovered(monkeypatch):
    monkeypatch.setattr(calibration, "GATE_RIDGE", 1e-9)
    monkeypatch.setattr(calibration, "GATE_STEPS", 12)
    weight = 0.2 * torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
    bias = torch.tensor([-1.0, 0.0, 0.5, -2.0])
    found = planted_gate(weight, bias)
    found.fit_gate()
    torch.testing.assert_close(found.mixer.ogate_weight, weight, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.mixer.ogate_bias, bias, atol=5e-3, rtol=0)
    assert found.error(found.held_out).sum() < 1e-4 * sum(x.missing.square().sum() for x in found.held_out)
    assert not found.close_gates().any()


@torch.no_grad()
def test_the_best_constant_gate_is_the_least_squares_one():
    found = planted_gate(torch.zeros(4, 48), torch.tensor([-1.0, 0.0, 0.5, -2.0]))
    error, gate = found.constant_gate()
    torch.testing.assert_close(gate.float(), torch.tensor([0.2689, 0.5, 0.6225, 0.1192]), atol=1e-4, rtol=0)
    assert (error < 1e-6 * sum(x.missing.square().sum() for x in found.fitted)).all()


@torch.no_grad()
def test_with_a_ridge_the_gate_is_where_a_minimiser_ends(monkeypatch):
    """The normal equations' stationary point: sum w (o - o*) o (1 - o) z + ridge x = 0, ridge from the last step."""
    monkeypatch.setattr(calibration, "GATE_STEPS", 20)
    weight = 0.2 * torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
    found = planted_gate(weight, torch.tensor([-1.0, 0.0, 0.5, -2.0]))
    found.fit_gate()
    (seen,) = found.fitted
    z, real = found.gate_inputs(seen).double(), seen.tokens.real
    surplus = found.surplus(seen)
    w, product = surplus.square().sum(-1)[real].double(), (surplus * seen.missing).sum(-1)[real].double()
    for h in range(4):
        start = torch.cat([found.mixer.ogate_weight[h], found.mixer.ogate_bias[h, None]]).double()
        o = torch.sigmoid(z[:, h] @ start)
        gram = z[:, h].T @ (z[:, h] * (w[:, h] * (o * (1 - o)).square())[:, None])
        ridge = calibration.GATE_RIDGE * gram.diagonal()[:-1].mean()

        def loss(x, h=h, ridge=ridge):
            o = torch.sigmoid(z[:, h] @ x)
            return 0.5 * (w[:, h] * o.square() - 2 * o * product[:, h]).sum() + 0.5 * ridge * x[:-1].square().sum()

        x = torch.zeros(49, dtype=torch.float64, requires_grad=True)
        minimiser = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure(x=x, minimiser=minimiser, loss=loss):
            minimiser.zero_grad()
            value = loss(x)
            value.backward()
            return value

        with torch.enable_grad():
            minimiser.step(closure)
        assert (start - x.detach()).norm() < 0.05 * x.detach().norm()


@torch.no_grad()
@pytest.mark.parametrize("excess", [3.0, -3.0])
def test_where_no_gate_is_open_or_shut_enough_training_can_still_move_it(excess):
    found = planted_gate(torch.zeros(4, 48), torch.zeros(4), excess)
    constant, _ = found.constant_gate()
    found.fit_gate()
    z = torch.cat([found.gate_inputs(seen)[..., :-1] for seen in found.fitted])
    logits = (z * found.mixer.ogate_weight).sum(-1) + found.mixer.ogate_bias
    assert (logits.sign() == torch.tensor(excess).sign()).all() and logits.abs().mean() < 15
    if excess > 0:
        assert (found.error(found.fitted) <= constant * 1.001 + 1e-3 * found.fitted[0].target).all()


@torch.no_grad()
def test_a_head_that_held_out_text_does_not_speak_for_is_shut():
    """Fitted to what the memory gives, held out against its opposite: the first head keeps its gate."""
    found = planted_gate(torch.zeros(4, 48), torch.zeros(4))
    for seen in found.held_out:
        seen.missing[:, :, 1:] *= -1
    found.fit_gate()
    assert found.close_gates().tolist() == [False, True, True, True]
    assert found.mixer.ogate_bias[1:].tolist() == [calibration.CLOSED] * 3
    assert found.mixer.ogate_weight[1:].abs().sum() == 0 and found.mixer.ogate_bias[0].abs() < 0.1


@torch.no_grad()
def test_each_head_gets_the_setting_that_is_best_for_it():
    """Two settings, one of which is the teacher's for each head."""
    layer, seen = seen_of(tiny_student(torch.float32, gain=1.0), text(8))
    found = Calibration(layer, seen, seen)
    first = {"fgate_bias": torch.tensor([0.0, 3.0, 0.0, 3.0])}
    second = {"fgate_bias": torch.tensor([3.0, 0.0, 3.0, 0.0])}
    found.mixer.fgate_bias.copy_(torch.tensor([3.0, 3.0, 0.0, 0.0]))
    for batch in seen:
        batch.missing = 0.5 * found.surplus(batch)
    assert found.choose([first, second]).tolist() == [1, 0, 0, 1]
    assert found.mixer.fgate_bias.tolist() == [3.0, 3.0, 0.0, 0.0]


# --- layers and models -------------------------------------------------------------------------------------------


def test_only_what_conversion_added_changes_and_the_figures_are_those_of_stage_i():
    model = tiny_student(torch.float32, gain=1.0, num_hidden_layers=4, layer_types=MIXED)
    before, held_out = copy.deepcopy(model), text(seed=7)
    figures = no_layer_is_worse_than_its_window(model.train(), text(16), held_out)
    assert list(figures) == [0, 2, 3] and model.training
    new, old = new_parameters(model), dict(before.named_parameters())
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters() if name not in new)
    assert not any(torch.equal(p, old[name]) for name, p in new.items())
    for measured, key in (
        (measure_alignment(before, held_out), "before"),
        (measure_alignment(model, held_out), "after"),
    ):
        assert measured == pytest.approx({j: layer[key] for j, layer in figures.items()}, rel=1e-4)


@pytest.mark.parametrize("family", every_family)
def test_students_of_every_family_are_calibrated(family):
    """QK-norms, biases, norms behind the layer, teachers with a window of their own."""
    model = copy.deepcopy(student_of(family, dtype=torch.float32, gain=1.0))
    batches = [{"input_ids": ids_of(45, 4, seed=n)} for n in range(2)]
    figures = no_layer_is_worse_than_its_window(model, batches[:1], batches[1:])
    assert list(figures) == [0, 1, 2]


VARIANTS = {
    "features without positions": {"memory_rope": False},
    "more features": {"memory_feature_dim": 24},
    "fewer features": {"memory_feature_dim": 5},
    "signed maps": {"memory_feature_map": "softmax_signed", "memory_feature_dim": 8},
    "linear attention": {"memory_cell": "linear"},
    "a gate of x": {"mixer_gate_input": "x"},
    "a kept group": {"kept_groups": [[0], [], [1]]},
    "several windows": {"layer_windows": [7, 3, 1], "layer_sinks": [3, 1, 0]},
    "no sinks": {"num_sink_tokens": 0},
    "one group per head": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_students_of_other_kinds_are_calibrated(name):
    model, held_out = tiny_student(torch.float32, gain=1.0, **VARIANTS[name]), text(seed=7)
    figures = no_layer_is_worse_than_its_window(model, text(16), held_out)
    assert measure_alignment(model, held_out) == pytest.approx({j: x["after"] for j, x in figures.items()}, rel=1e-4)


def test_in_bfloat16_it_is_still_no_worse_than_the_window():
    model = tiny_student(torch.float32, gain=1.0).to(torch.bfloat16)
    figures = no_layer_is_worse_than_its_window(model, text(16), text(seed=7))
    assert sum(x["after"] for x in figures.values()) < 0.98 * sum(x["window"] for x in figures.values())


def test_padding_has_no_part_in_it():
    """Rows of unlike lengths, padded on the left, give what they give one by one."""
    rows = [token_ids(1, length, seed=length) for length in (40, 29, 23, 34)]
    ids, mask = left_padded(rows)
    padded, single = (tiny_student(torch.float64, gain=1.0) for _ in range(2))
    held_out = text(seed=7)
    first = calibrate_model(padded, [{"input_ids": ids, "attention_mask": mask}], held_out)
    second = calibrate_model(single, [{"input_ids": row} for row in rows], held_out)
    for j, layer in first.items():
        assert layer == pytest.approx(second[j], rel=1e-3)


def test_packed_documents_are_as_good_as_rows_of_their_own():
    documents = [token_ids(1, 24, seed=n) for n in range(8)]
    positions = torch.arange(24).repeat(1, 2)
    pairs = zip(documents[::2], documents[1::2], strict=True)
    packed = [{"input_ids": torch.cat(pair, 1), "position_ids": positions} for pair in pairs]
    first, second = (tiny_student(torch.float64, gain=1.0) for _ in range(2))
    together = calibrate_model(first, packed, text(seed=7))
    alone = calibrate_model(second, [{"input_ids": ids} for ids in documents], text(seed=7))
    for j, layer in together.items():
        assert layer == pytest.approx(alone[j], rel=1e-3)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_text_inside_of_the_window_shuts_every_gate(length):
    model = tiny_student(torch.float32, gain=1.0)
    figures = calibrate_model(model, text(2, length=length), text(1, seed=7, length=length))
    assert all(layer["closed"] == 4 and layer["window"] < 1e-9 for layer in figures.values())
    assert all(p.isfinite().all() for p in new_parameters(model).values())


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "q_proj"])
def test_a_head_that_a_teacher_has_pruned_is_no_obstacle(part):
    model = tiny_student(torch.float32, gain=1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in getattr(layer.self_attn, part).parameters():
                p[: len(p) // 2] = 0
    no_layer_is_worse_than_its_window(model, text(), text(seed=7))


def test_damaged_weights_are_named():
    model = tiny_student(torch.float32, gain=1.0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="layer 1: its hidden states are not finite"):
        calibrate_model(model, text(), text(seed=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_cell": "delta"}, "memory_cell='delta', expected 'mlstm' or 'linear'"),
        ({"mixer_combine": "joint", "memory_cell": "linear"}, "mixer_combine='joint', expected 'gate'"),
        ({"mixer_branches": "memory"}, "mixer_branches='memory', expected 'both'"),
        ({"mixer_norm": True}, "mixer_norm=True, expected False"),
        ({"sparse_memory": 4}, "sparse_memory=4, expected 0"),
        ({"layer_types": ["full_attention"] * 3}, "no layer is hybrid_sliding"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        calibrate_model(tiny_student(torch.float32, **changes), text(), text(seed=7))


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="1 batches to fit and 0 held out"):
        calibrate_model(tiny_student(torch.float32), text(), [])


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mixed_checkpoint(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="module")
def in_memory(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, calibrate_model(model, text(), text(seed=7))


def is_what_memory_gave(out, checkpoint, in_memory):
    found, before = load_file(out / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    expected = {name: p.detach() for name, p in new_parameters(in_memory[0]).items()}
    assert found.keys() == before.keys()
    assert all(torch.equal(x, expected.get(name, before[name])) for name, x in found.items())


def test_a_layer_at_a_time_gives_what_the_whole_model_gives(checkpoint, in_memory, tmp_path):
    figures = calibrate_streamed(checkpoint, tmp_path / "out", text(), text(seed=7))
    verify_files(tmp_path / "out")
    assert figures == in_memory[1] and not (tmp_path / ".calibrating-out").exists()
    is_what_memory_gave(tmp_path / "out", checkpoint, in_memory)
    record = read_provenance(tmp_path / "out")[-1]
    assert record["stage"] == "calibrate" and record["config"] == {"tokens": 240, "held_out_tokens": 240}
    assert [entry["layer"] for entry in record["figures"]["relative_error"]] == [0, 2, 3]


class Killed(BaseException):
    """What no handler of ours catches."""


def killed_at(layer, monkeypatch, checkpoint, folder, **inputs):
    def dies(trunk, j, *rest):
        if j == layer:
            raise Killed
        return calibrate_layer(trunk, j, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "calibrate_layer", dies)
        with pytest.raises(Killed):
            calibrate_streamed(checkpoint, folder / "out", text(), text(seed=7))


@pytest.mark.parametrize("layer", [1, 3])
def test_a_killed_run_goes_on_behind_the_last_layer(layer, checkpoint, in_memory, tmp_path, monkeypatch):
    killed_at(layer, monkeypatch, checkpoint, tmp_path)
    assert not (tmp_path / "out").exists()
    done = []
    monkeypatch.setattr(calibration, "calibrate_layer", lambda t, j, *a: (done.append(j), calibrate_layer(t, j, *a))[1])
    figures = calibrate_streamed(checkpoint, tmp_path / "out", text(), text(seed=7))
    assert done == list(range(layer, 4)) and figures == in_memory[1]
    is_what_memory_gave(tmp_path / "out", checkpoint, in_memory)


def test_what_another_run_left_is_refused(checkpoint, tmp_path, monkeypatch):
    """Other text, the same tokens with other positions, another student of the same shape, a file that was changed."""
    killed_at(3, monkeypatch, checkpoint, tmp_path)
    other = tmp_path / "other"
    tiny_student(torch.float32, gain=1.0, num_hidden_layers=4, layer_types=MIXED).save_pretrained(other)
    rewrite(other, lambda weights: {name: 1.1 * x for name, x in weights.items()})
    packed = [{**text()[0], "position_ids": torch.arange(LENGTH) % 20}]
    for student, fitted in ((checkpoint, text(seed=1)), (checkpoint, packed), (other, text())):
        with pytest.raises(ConfigError, match="of another student or text: remove it"):
            calibrate_streamed(student, tmp_path / "out", fitted, text(seed=7))
    file = tmp_path / ".calibrating-out" / "layer-0002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="differs from what was written"):
        calibrate_streamed(checkpoint, tmp_path / "out", text(), text(seed=7))
