"""The student is one function of its tokens, however they reach it: at once, in pieces, padded, packed, beside other
rows.
"""

import itertools

import pytest
import torch
from conftest import assert_same_model, tiny_config, tiny_student, token_ids
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from xlstm_hybrid import XLSTMHybridConfig, XLSTMHybridForCausalLM, XLSTMHybridModel
from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.mixer import MLSTMMixer

W, TOLERANCE = 7, {"atol": 1e-9, "rtol": 1e-9}  # float64: any real difference shows
MIXED = {
    "layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"],
    "teacher_sliding_window": 5,
    "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
}
STACKS = {
    "hybrid": {},
    "mixed": MIXED,
    "post-norm": {"norm_position": "post", "qk_norm": "full"},
    "head-norm": {"qk_norm": "head"},
    "no sinks": {"num_sink_tokens": 0},
    "windows differ": {"layer_windows": [3, 7, 12], "layer_sinks": [0, 2, 4]},
}


@pytest.fixture(scope="module", params=STACKS)
def any_student(request):
    return tiny_student(**STACKS[request.param])


def in_pieces(model, ids, sizes, cache=None, **kwargs):
    cache, done, logits = cache or DynamicCache(config=model.config), 0, []
    for n in sizes:
        part = {k: v[:, : done + n] if k == "attention_mask" else v[:, done : done + n] for k, v in kwargs.items()}
        logits.append(model(ids[:, done : done + n], cache=cache, use_cache=True, **part).logits)
        done += n
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("T", [1, W - 1, W, W + 1, 2 * W - 1, 2 * W, 2 * W + 1, 5 * W + 2])
@torch.no_grad()
def test_decoding_and_chunked_prefill_give_the_logits_of_one_full_forward(any_student, T):
    ids = token_ids(2, T)
    full = any_student(ids, use_cache=False).logits
    assert full.std() > 1  # else a broken state would hide below the tolerance
    for n in {1, W - 1, W, W + 1, T}:
        sizes = [n] * (T // n) + ([T % n] if T % n else [])
        logits, cache = in_pieces(any_student, ids, sizes)
        torch.testing.assert_close(logits, full, **TOLERANCE)
        assert cache.get_seq_length() == T


@pytest.mark.parametrize("T", [W - 1, W + 1, 4 * W + 2])
@torch.no_grad()
def test_single_precision_keeps_cached_and_full_logits_within_2e_5(T):
    model, ids = tiny_student(torch.float32, gain=1.5), token_ids(2, T)
    full = model(ids, use_cache=False).logits
    assert full.std() > 1
    for sizes in ([1] * T, [T // 2, T - T // 2]):
        torch.testing.assert_close(in_pieces(model, ids, sizes)[0], full, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_stock_static_cache_serves_as_well(student):
    ids = token_ids(2, 30)
    logits, _ = in_pieces(student, ids, [11, 1, 1, 17], StaticCache(config=student.config, max_cache_len=40))
    torch.testing.assert_close(logits, student(ids, use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
def test_the_cache_does_not_grow_with_the_context_once_its_ring_is_full(student):
    def size(T):
        cache = in_pieces(student, token_ids(1, T), [T])[1]
        assert all(isinstance(layer, HybridCacheLayer) for layer in cache.layers)
        return [t.numel() for layer in cache.layers for t in (layer.keys, layer.values, layer.slot_index, *layer.state)]

    slots, state = [2 * 16, 2 * 16, 1], [4 * 16 * 16, 4 * 16, 4]
    assert size(3) == ([3 * n for n in slots] + state) * 3
    assert size(10) == size(100) == ([10 * n for n in slots] + state) * 3


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@torch.no_grad()
def test_padding_changes_nothing_whether_alone_in_the_batch_or_not(any_student, side):
    row, pad = token_ids(1, 19), 6
    cut = {"left": 0, "right": 19, "inside": 8}[side]
    ids = torch.cat([row[:, :cut], torch.full((1, pad), 5), row[:, cut:]], 1)
    mask = torch.ones_like(ids)
    mask[:, cut : cut + pad] = 0
    real = mask[0].bool()
    expected = any_student(row, use_cache=False).logits
    neighbour = token_ids(1, 25, seed=3)
    for batch, m in ((ids, mask), (torch.cat([neighbour, ids]), torch.cat([torch.ones_like(mask), mask]))):
        torch.testing.assert_close(
            any_student(batch, attention_mask=m, use_cache=False).logits[-1:, real], expected, **TOLERANCE
        )
        for sizes in ([25], [1] * 25, [4, 9, 12]):
            logits, _ = in_pieces(any_student, batch, sizes, attention_mask=m)
            torch.testing.assert_close(logits[-1:, real], expected, **TOLERANCE)


LENGTHS = [1, 1, 9, 14, 1, 10]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
PACKINGS = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)},
    "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))[None]},
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_packed_documents_are_the_documents_alone(any_student, packing, use_cache):
    ids = token_ids(1, 36)
    alone = torch.cat([any_student(d, use_cache=False).logits for d in ids.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(any_student(ids, use_cache=use_cache, **PACKINGS[packing]).logits, alone, **TOLERANCE)


@torch.no_grad()
def test_a_packed_row_can_arrive_in_pieces_and_its_last_document_goes_on(student):
    ids = token_ids(1, 36)
    alone = torch.cat([student(d, use_cache=False).logits for d in ids.split(LENGTHS, 1)], 1)
    for sizes in ([36], [1] * 36, [2, 20, 14], [11, 25]):
        torch.testing.assert_close(in_pieces(student, ids, sizes, position_ids=POSITIONS)[0], alone, **TOLERANCE)


@torch.no_grad()
def test_packing_with_full_attention_refuses_to_go_on_from_a_filled_cache():
    model, ids = tiny_student(**MIXED), token_ids(1, 36)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], cache=cache, use_cache=True)
    with pytest.raises(CacheError, match="packed documents after a filled cache"):
        model(ids, position_ids=POSITIONS, cache=cache, use_cache=True)


@torch.no_grad()
def test_greedy_and_beam_generation_equal_generation_without_a_cache(any_student):
    ids = token_ids(2, 9)
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
        torch.testing.assert_close(
            any_student.generate(ids, **options), any_student.generate(ids, use_cache=False, **options)
        )


@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_row_generates_alone(student):
    rows = [token_ids(1, n, seed=n) for n in (3, 12, 8)]
    ids = torch.cat([torch.nn.functional.pad(r, (12 - r.shape[1], 0)) for r in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (12 - r.shape[1], 0)) for r in rows])
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    together = student.generate(ids, attention_mask=mask, **options)
    for row, output in zip(rows, together, strict=True):
        torch.testing.assert_close(output[12:], student.generate(row, **options)[0, row.shape[1] :])


@torch.no_grad()
def test_the_closed_gate_is_window_attention_and_the_open_gate_is_the_mlstm():
    """Each branch alone: with the gate closed nothing outside window and sinks matters, with it open everything does."""
    model = tiny_student(num_hidden_layers=1)
    mixer, ids = model.model.layers[0].self_attn.mlstm, token_ids(1, 30)
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 7) % 58 + 3  # not a sink, outside the last token's window
    for gate, remembers in ((-1e4, False), (1e4, True)):
        for weight in (mixer.ogate_weight, mixer.igate_weight, mixer.fgate_weight):
            weight.zero_()
        mixer.ogate_bias.fill_(gate)
        mixer.fgate_bias.fill_(5.0)
        difference = (model(ids).logits - model(other).logits)[0, -1].abs().max()
        assert (difference > 1e-3) == remembers


@torch.no_grad()
def test_attention_implementations_agree(student):
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    outputs = {}
    for name in ("sdpa", "eager"):
        student.set_attn_implementation(name)
        outputs[name] = student(ids, attention_mask=mask).logits
    student.set_attn_implementation("sdpa")
    # eager rounds its softmax to float32
    torch.testing.assert_close(outputs["sdpa"][:, 4:], outputs["eager"][:, 4:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_kernels_without_masks_get_the_positions_that_tell_documents_apart():
    """Flash attention reads document starts from position_ids; a stand-in shows that the layers that would call it hand
    them on.
    """
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs["position_ids"])
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("stand_in", flash)
    AttentionMaskInterface.register("stand_in", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model = tiny_student(**MIXED)
    model.config._attn_implementation = "stand_in"
    model(token_ids(1, 36), use_cache=False, **PACKINGS["seq_idx"])
    assert len(seen) == 2 and all(torch.equal(p, POSITIONS) for p in seen)


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = tiny_student().train(), token_ids(2, 20)
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": False}) if on else model.gradient_checkpointing_disable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_auto_classes_load_what_was_saved_and_gates_stay_in_float32(tmp_path):
    student = tiny_student(torch.float32)
    student.save_pretrained(tmp_path)
    ids = token_ids(1, 20)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), XLSTMHybridConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), XLSTMHybridModel)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), student, ids)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in half.model.layers[0].self_attn.mlstm.named_parameters()}
    assert dtypes == {"q_map": torch.bfloat16, "k_map": torch.bfloat16} | dict.fromkeys(
        ["igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias"], torch.float32
    )
    cache = cache_of(half(ids, use_cache=True))
    assert {t.dtype for t in cache.layers[0].state} == {torch.float32} and cache.layers[0].keys.dtype == torch.bfloat16


def test_new_parameters_start_as_documented():
    config = tiny_config(sliding_window=16, mlstm_context=256)
    mixer = XLSTMHybridForCausalLM(config).model.layers[1].self_attn.mlstm
    torch.testing.assert_close(mixer.q_map, torch.eye(16).expand(4, 16, 16))
    assert not mixer.igate_weight.any() and not mixer.fgate_weight.any() and not mixer.ogate_weight.any()
    torch.testing.assert_close(
        1 / (1 - mixer.fgate_bias.double().sigmoid()),
        torch.tensor([4.0, 25.398, 161.27, 1024.0]).double(),
        rtol=2e-4,
        atol=0,
    )
    torch.testing.assert_close(mixer.ogate_bias, torch.full((4,), -2.0))


@torch.no_grad()
def test_only_the_wanted_logits_are_computed(student):
    ids = token_ids(2, 9)
    full = student(ids).logits
    index, mask = torch.tensor([2, 5]), torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3] = mask[1, 7] = True
    for keep, want in ((1, full[:, -1:]), (4, full[:, -4:]), (0, full), (index, full[:, index]), (mask, full[mask])):
        torch.testing.assert_close(student(ids, logits_to_keep=keep).logits, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 1e-4), (torch.bfloat16, 2**-8), (torch.float32, 1e-4)])
def test_features_of_sharp_maps_are_exact_to_their_own_rounding(dtype, rounding, autocast):
    """Exponents of up to 60, so that a product in the narrow dtype would be off by whole per cents; features down to
    1e-30 stay.
    """
    x, sharp = (torch.sin(torch.arange(1.0, 1 + 4 * 9 * 16) * step).view(4, 9, 16).to(dtype) for step in (0.7, 1.9))
    x, sharp = x[None], 12 * torch.cat([sharp, sharp], 1)[:, :16]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = MLSTMMixer.features(x, sharp)
    want = torch.softmax(x.double() @ sharp.double(), -1).transpose(1, 2)
    assert float(want.min()) < 1e-20 and found.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    torch.testing.assert_close(found.double(), want, atol=1e-37, rtol=rounding)


@torch.no_grad()
def test_teacher_forcing_measures_the_distance_to_the_attention_that_was_replaced():
    """An independent computation of stage I's error: full attention of the same layer against its hybrid, on the
    teacher's trunk.
    """
    model, ids = tiny_student(), token_ids(2, 20)
    teacher = tiny_student(layer_types=["full_attention"] * 3)
    teacher.load_state_dict({k: v for k, v in model.state_dict().items() if ".mlstm." not in k})
    out = model(ids, teacher_forced=True)
    before_o = {}
    for kind, m in (("hybrid", model), ("teacher", teacher)):
        for n, layer in enumerate(m.model.layers):
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, x, key=(kind, n): before_o.__setitem__(key, x[0])
            )
    hidden = teacher(ids, use_cache=False, output_hidden_states=True).hidden_states
    for n, layer in enumerate(model.model.layers):
        _, where, _ = model.model.prepare(hidden[n], None, None, None)
        layer.self_attn(layer.attention_input(hidden[n]), **where[n])
        target = before_o["teacher", n]
        torch.testing.assert_close(out.error[n], ((before_o["hybrid", n] - target) ** 2).sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(out.target[n], (target**2).sum(), rtol=1e-5, atol=0)
    assert out.num_items == 40 and torch.isclose(out.loss, out.error.sum())


def test_teacher_forcing_moves_only_new_parameters_and_ignores_padding():
    model, ids = tiny_student(), token_ids(1, 20)
    model(ids, teacher_forced=True).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".mlstm." in n}
    padded = torch.nn.functional.pad(ids, (4, 0), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    plain, other = model(ids, teacher_forced=True), model(padded, attention_mask=mask, teacher_forced=True)
    torch.testing.assert_close(plain.error, other.error, rtol=1e-5, atol=0)
    assert plain.num_items == other.num_items


BAD_CONFIGS = {
    "layer_types has 0 entries": {"layer_types": []},
    "layer_types has 2 entries": {"layer_types": ["full_attention"] * 2},
    "no multiple of num_key_value_heads": {"num_key_value_heads": 3},
    "expected at least 1 token": {"sliding_window": 0},
    "layer 1 is sliding_attention with a window of None": {
        "layer_types": ["hybrid_sliding", "sliding_attention", "hybrid_sliding"]
    },
    "qk_norm='both'": {"qk_norm": "both"},
    "norm_position='middle'": {"norm_position": "middle"},
    "layer_types holds": {"layer_types": ["chunked_attention"] * 3},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_config_that_contradicts_itself_is_refused(message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**BAD_CONFIGS[message])


def test_bad_inputs_are_named(student):
    ids = token_ids(2, 8)
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        student.model()
    with pytest.raises(ConfigError, match=r"attention_mask: expected \[batch, tokens\]"):
        student(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="cu_seq_lens_q describes one flattened row"):
        student(ids, cu_seq_lens_q=torch.tensor([0, 4, 8]))
    foreign = DynamicCache()
    for layer in range(3):
        foreign.update(torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 4, 16), layer)
    with pytest.raises(CacheError, match="another model made it"):
        student(ids, cache=foreign)
    cache = cache_of(student(ids, use_cache=True))
    with pytest.raises(CacheError, match="a recurrent state is not invertible"):
        cache.crop(-1)
