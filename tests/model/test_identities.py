"""A student that keeps the teacher's attention, or whose windows see everything and whose gates are closed, is the
teacher.
"""

import copy
import itertools

import pytest
import torch
from tiny_teachers import FAMILIES, ROPES, WINDOWED, WITH_TRAITS, teacher, tokens
from transformers import AutoModelForCausalLM

from xlstm_hybrid import XLSTMHybridForCausalLM, convert

torch.set_num_threads(1)
CLOSED = {"mlstm_output_gate_bias": -1e4}  # the output gate's weight starts at zero, so this closes it for every token
with_traits_if_slow = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in WITH_TRAITS)]
every_family = pytest.mark.parametrize("family", with_traits_if_slow)
families_and_ropes = pytest.mark.parametrize(
    ("family", "rope"), [*itertools.product(FAMILIES, ROPES), *((family, "yarn") for family in WITH_TRAITS)]
)


@torch.no_grad()
def logits(model, length=45):
    return model(tokens(length)).logits


def greedy(model, new=24, prompt=9):
    return model.generate(
        tokens(prompt), attention_mask=torch.ones(2, prompt, dtype=torch.long), max_new_tokens=new, do_sample=False
    )


def assert_same_function(student, original, length=45, first=None):
    """Logits (of the `first` tokens) equal to 1e-6 of their scale, in float64: in float32, sums in another order differ
    by 2e-5.
    """
    found, expected = (logits(copy.deepcopy(model).double(), length)[:, :first] for model in (student, original))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.std()))


@every_family
def test_the_teachers_are_ones_that_a_wrong_layer_would_show(family):
    original = teacher(family)
    assert 1 < float(logits(original).std()) < 10
    narrow = XLSTMHybridForCausalLM.from_teacher(original, sliding_window=5, num_sink_tokens=0, **CLOSED)
    assert float((logits(narrow) - logits(original)).std()) > 0.3


@families_and_ropes
def test_a_student_with_the_teachers_layer_types_is_the_teacher(family, rope):
    original = teacher(family, rope)
    student = XLSTMHybridForCausalLM.from_teacher(original, layer_types="teacher")
    assert_same_function(student, original)  # 45 tokens: several windows of 7
    assert torch.equal(greedy(student), greedy(original))


@families_and_ropes
def test_a_student_with_wide_windows_and_closed_gates_is_the_teacher(family, rope):
    original = teacher(family, rope, window=45)  # a teacher's own window ends the identity
    student = XLSTMHybridForCausalLM.from_teacher(original, sliding_window=45, num_sink_tokens=2, **CLOSED)
    assert set(student.config.layer_types) - {"linear_attention"} == {"hybrid_sliding"}
    assert_same_function(student, original)
    assert torch.equal(greedy(student), greedy(original))


@pytest.mark.parametrize("family", [family for family in WINDOWED if family in FAMILIES])
def test_past_the_teachers_own_window_the_wide_student_sees_more(family):
    original = teacher(family, window=7)
    student = XLSTMHybridForCausalLM.from_teacher(original, sliding_window=45, **CLOSED)
    assert_same_function(student, original, first=7)
    assert float((logits(student) - logits(original))[:, 7:].std()) > 0.3


@every_family
def test_a_mixed_stack_keeps_each_layers_own_window_and_rope(family):
    original = copy.deepcopy(teacher(family, "linear")).double()  # the two ways to attend to a window round differently
    kinds = XLSTMHybridForCausalLM.from_teacher(original, layer_types="teacher").config.layer_types
    first = next(j for j, kind in enumerate(kinds) if kind != "linear_attention")
    mixed = [*kinds[:first], "hybrid_sliding", *kinds[first + 1 :]]
    student = XLSTMHybridForCausalLM.from_teacher(
        original, layer_types=mixed, sliding_window=7, num_sink_tokens=0, **CLOSED
    ).double()
    if kinds[first] == "sliding_attention":  # ours of the same width takes its place
        assert_same_function(student, original)
    else:
        assert_same_function(student, original, length=7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_identities_hold_from_disk(family, tied, tmp_path):
    original = teacher(family, "yarn", tied=tied)
    original.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 3
    convert(tmp_path / "teacher", tmp_path / "same", layer_types="teacher", shard_bytes=30_000)
    convert(tmp_path / "teacher", tmp_path / "closed", sliding_window=45, **CLOSED)
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert_same_function(same, original)
    assert torch.equal(greedy(same), greedy(original))
    assert_same_function(AutoModelForCausalLM.from_pretrained(tmp_path / "closed"), original, length=7)
    assert_same_function(XLSTMHybridForCausalLM.from_teacher(tmp_path / "teacher", layer_types="teacher"), original)
