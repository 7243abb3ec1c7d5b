"""What teachers have beyond a Llama, each on its own: the student is the teacher with it and another model without it, in
every way that a student runs.
"""

import copy

import pytest
import torch
from conftest import tiny_config
from tiny_students import CLOSE, W, ids_of, left_padded, student
from tiny_teachers import WITH_TRAITS, in_float64, model_class, teacher, teacher_config, tokens
from torch import nn

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model import one_token
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.configuration import LINEAR_SIZES, TRAITS
from xlstm_hybrid.model.layers import XLSTMHybridRotaryEmbedding
from xlstm_hybrid.state import behaviour, load_state, prefill, save_state
from xlstm_hybrid.training.lm_head import attach, check_head

slow = pytest.mark.slow
OWN = [family for family in WITH_TRAITS if family != "ministral"]  # which has no trait
REPEATED = "olmoe", "qwen3_next", "qwen3_5_moe_text"
# one family per trait and for experts with and without a shared one; the others repeat them
families = pytest.mark.parametrize("family", [pytest.param(f, marks=slow if f in REPEATED else ()) for f in OWN])


# traits without which the weights have other shapes: a student that lacks one loads none of them
SHAPES = {"num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers"}
SHAPES |= {"attention_output_gate", "linear_attention", *LINEAR_SIZES}
PART = {"rope_type": "default", "rope_theta": 100.0}
OTHER = TRAITS | {"num_experts_per_tok": 1}


def traits(family):
    """Those that the family's tiny teacher has."""
    config = student_config(teacher_config(family))
    return [name for name, usual in TRAITS.items() if getattr(config, name) != usual]


@pytest.mark.parametrize(
    ("family", "trait"), [(family, trait) for family in WITH_TRAITS for trait in traits(family) if trait not in SHAPES]
)
@torch.no_grad()
def test_a_student_without_the_trait_is_another_model(family, trait):
    same = XLSTMHybridForCausalLM.from_teacher(teacher(family), layer_types="teacher")
    config = copy.deepcopy(same.config)
    setattr(config, trait, OTHER[trait])
    other = XLSTMHybridForCausalLM(config)
    other.load_state_dict(same.state_dict())
    assert float((same(tokens()).logits - other.eval()(tokens()).logits).std()) > 0.1


@pytest.mark.parametrize(
    ("family", "stack"),
    [
        pytest.param(
            family, stack, marks=slow if (family == "smollm3") == (stack == "hybrid") or family in REPEATED[1:] else ()
        )
        for family in OWN
        for stack in ("hybrid", "mixed")
    ],
)
@torch.no_grad()
def test_pieces_steps_padding_and_packing_give_one_full_forward(family, stack, monkeypatch):
    in_float64(monkeypatch, family)
    model, ids = student(family, stack), ids_of(3 * W + 2)
    whole = model(ids).logits
    out = model(ids[:, :W], use_cache=True)
    pieces = [out.logits]
    for part in (ids[:, W : 2 * W + 3], *ids[:, 2 * W + 3 :].split(1, 1)):
        out = model(part, use_cache=True, cache=cache_of(out))
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    rows = [ids[:1], ids[1:, : W + 2]]
    padded, mask = left_padded(rows)
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[1, -W - 2 :], model(rows[1]).logits[0], **CLOSE
    )
    packed = torch.cat(rows, 1)
    position_ids = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    alone = torch.cat([model(row).logits for row in rows], 1)
    torch.testing.assert_close(model(packed, position_ids=position_ids).logits, alone, **CLOSE)


@pytest.mark.parametrize("family", ["smollm3", "granite", "gemma3_text", "qwen3_5_text"])
@torch.no_grad()
def test_a_compiled_token_is_that_of_the_operations(family, monkeypatch):
    model, ids, calls = student(family, "hybrid", torch.float32), ids_of(W + 3), []

    def last():
        out = model(ids[:, :-1], use_cache=True)
        return model(ids[:, -1:], use_cache=True, cache=cache_of(out)).logits

    run = one_token.layer_step
    monkeypatch.setattr(one_token, "layer_step", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    found = last()
    assert len(calls) == model.config.layer_types.count("hybrid_sliding")
    monkeypatch.setattr(one_token, "layer_step_runs", lambda *_: False)
    want = last()
    assert (found - want).abs().max() < 2e-4 * want.abs().max()


@torch.no_grad()
def test_the_teachers_gate_multiplies_the_mix_and_only_the_first_dims_of_a_head_rotate():
    model, ids = copy.deepcopy(student("qwen3_5_text")), ids_of(W)
    attention, hidden = model.model.layers[1].self_attn, torch.sin(torch.arange(2.0 * W * 50)).view(2, W, 50).double()
    tokens, where, _ = model.model.prepare(hidden, None, None, None)
    heads = attention.heads(hidden)
    (q, _), (raw, *_), gate = heads
    rows = nn.functional.linear(hidden, attention.q_proj.weight, attention.q_proj.bias).view(2, W, 6, 2, 10)
    torch.testing.assert_close(torch.stack([raw, gate], 3), rows, **CLOSE)
    query, *_ = projected = attention.rotated(heads, where[1]["position_embeddings"])
    assert torch.equal(query[..., 6:], q.transpose(1, 2)[..., 6:])
    assert ((query - q.transpose(1, 2)).abs().amax((0, 1))[1:, :6] > 1e-3).all()
    h, _ = attention.mix(hidden, projected, tokens, None)
    weighted = (h * torch.sigmoid(rows[..., 1, :])).flatten(-2)
    torch.testing.assert_close(attention(hidden, **where[1])[0], attention.o_proj(weighted), **CLOSE)
    whole = copy.deepcopy(model.config)
    whole.rope_parameters["partial_rotary_factor"] = 1.0
    other = XLSTMHybridForCausalLM(whole).double().eval()
    other.load_state_dict(model.state_dict())
    assert float((other(ids).logits - model(ids).logits).std()) > 0.1


@families
@torch.no_grad()
def test_the_trunk_of_the_alignment_is_the_teacher_and_its_target_the_teachers_attention(family):
    original, ids = copy.deepcopy(teacher(family)).double(), tokens()
    model = XLSTMHybridForCausalLM.from_teacher(original, sliding_window=45, mlstm_output_gate_bias=-1e4)
    out = model(ids, teacher_forced=True)
    states = model.model.norm(out.hidden_states)
    torch.testing.assert_close(states, original.model(ids).last_hidden_state, **CLOSE)
    if "sliding_attention" not in model.config.teacher_layer_types:
        assert float(out.loss) < 1e-12 * float(out.target.sum())
    else:
        assert float(out.loss) > 0.01 * float(out.target.sum())


@families
@torch.no_grad()
def test_the_loss_over_the_head_in_chunks_has_the_logits_of_the_model(family):
    original = copy.deepcopy(teacher(family))
    attach(original)
    for model, name in ((student(family), "student"), (original, "teacher")):
        check_head(model, name)


@pytest.mark.parametrize("family", ["granite", "gemma3_text", "qwen2_moe", "qwen3_5_text"])
def test_saved_models_and_states_are_read_again(family, tmp_path):
    model, ids = student(family, "mixed", torch.float32), ids_of(W + 3)
    model.save_pretrained(tmp_path / "model")
    again = XLSTMHybridForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(ids).logits, copy.deepcopy(model)(ids).logits)
    save_state(prefill(model, ids), tmp_path / "state.safetensors", model)
    load_state(tmp_path / "state.safetensors", again)
    assert set(traits(family)) <= behaviour(model.config).keys()
    assert not behaviour(student("llama").config).keys() & TRAITS.keys()  # states of older versions are read as before


def test_embeddings_that_are_given_have_their_factor_already_and_a_new_vocabulary_keeps_it():
    model, ids = copy.deepcopy(student("granite")), ids_of(W)
    given = model.get_input_embeddings()(ids)
    torch.testing.assert_close(given, 2.5 * nn.functional.embedding(ids, model.get_input_embeddings().weight))
    torch.testing.assert_close(model(inputs_embeds=given).logits, model(ids).logits)
    before = model(ids).logits
    model.resize_token_embeddings(120)
    torch.testing.assert_close(model(ids).logits[..., :101], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_layers": [True]}, "rope_layers has 1 entries for num_hidden_layers=3"),
        ({"logits_scaling": 0}, "logits_scaling=0: expected a number above 0"),
        ({"num_experts": 4, "moe_intermediate_size": 8}, "num_experts_per_tok=None: expected 1 to num_experts=4"),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size=None: expected the width"),
        ({"attention_multiplier": -0.5}, "attention_multiplier=-0.5: expected a number above 0"),
        ({"residual_multiplier": float("inf")}, "residual_multiplier=inf: expected a number above 0"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": -8},
            "moe_intermediate_size=-8: expected the width",
        ),
        ({"shared_expert_intermediate_size": -3}, "shared_expert_intermediate_size=-3: expected the width"),
        ({"mlp_only_layers": [1, 7, -1]}, r"mlp_only_layers holds \[-1, 7\]: expected numbers of layers from 0 to"),
        (
            {"rope_parameters": PART | {"partial_rotary_factor": 1.5}},
            "partial_rotary_factor=1.5: expected a part above 0",
        ),
        ({"hidden_act": "foo"}, "hidden_act='foo': expected a name that transformers has in ACT2FN"),
    ],
)
def test_traits_that_no_teacher_has_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_a_part_of_a_head_rotates_as_a_head_of_that_size():
    original = teacher_config("qwen3_5_text")
    original.rope_parameters |= {"mrope_section": [1, 1, 1], "mrope_interleaved": True}  # of pictures: no text reads it
    config = student_config(original)
    assert config.rope_parameters.keys() == {"rope_type", "rope_theta", "partial_rotary_factor"}
    cos, sin = XLSTMHybridRotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
    angles = torch.arange(9.0)[:, None] / 5000.0 ** (torch.arange(3.0) / 3)
    torch.testing.assert_close(torch.stack([cos, sin])[:, 0], torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2))


@pytest.mark.parametrize("family", ["granite", "gemma3_text"])
@torch.no_grad()
def test_in_bfloat16_factors_are_rounded_where_the_teacher_rounds_them(family, tmp_path):
    """Granite's .22 stays as it is where it multiplies what a layer adds; Gemma rounds the root of its width first."""
    changes = {"residual_multiplier": 0.22} if family == "granite" else {}
    model_class(family)(teacher_config(family, **changes)).save_pretrained(tmp_path)
    original = model_class(family).from_pretrained(tmp_path, dtype=torch.bfloat16)
    same = XLSTMHybridForCausalLM.from_teacher(tmp_path, layer_types="teacher", dtype=torch.bfloat16)
    torch.testing.assert_close(same(tokens()).logits, original(tokens()).logits, rtol=0, atol=0)
