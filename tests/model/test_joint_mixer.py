"""One softmax over window and linear features: the baseline among the mixers that has no gate."""

import pytest
import torch
from conftest import tiny_config, tiny_student, token_ids
from test_modeling import in_pieces
from transformers.models.llama.modeling_llama import repeat_kv

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.equivalence import verify
from xlstm_hybrid.model.experimental.joint import JointMixer
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.state import prefill

TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
JOINT = {"mixer_combine": "joint", "memory_cell": "linear"}


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def test_a_joint_softmax_has_one_normaliser_over_the_window_and_the_features_of_the_rest():
    """Token by token, with a window of 7 and 3 sinks."""
    config, T = tiny_config(**JOINT), 14
    mixer = JointMixer(config, 0).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = (torch.randn(2, 4, T, 16, dtype=torch.float64) for _ in range(3))
    h, _, share = mixer(q, k, v, Tokens.locate((2, T), "cpu"), 0.25)
    for b, head, t in ((0, 0, 0), (0, 1, 6), (1, 2, 9), (1, 3, 13)):
        phi_q, phi_k = (
            torch.softmax(q[b, head, t] @ mixer.q_map[head], -1),
            torch.softmax(k[b, head] @ mixer.k_map[head], -1),
        )
        near = [t - s < 7 or s < 3 for s in range(t + 1)]
        far = mixer.joint_scale[head].exp() * (phi_k[: t + 1] @ phi_q)
        weight = torch.where(torch.tensor(near), (0.25 * k[b, head, : t + 1] @ q[b, head, t]).exp(), far)
        torch.testing.assert_close(h[b, t, head], (weight / weight.sum()) @ v[b, head, : t + 1], **TOLERANCE)
        torch.testing.assert_close(share[b, t, head], weight[~torch.tensor(near)].sum() / weight.sum(), **TOLERANCE)
    assert not share[:, :7].any() and bool((share[:, 10:] > 0).all())


def test_padding_and_packing_change_nothing_about_a_joint_softmax():
    model, row, other = tiny_student(**JOINT), token_ids(1, 19), token_ids(1, 25, seed=3)
    alone = logits_of(model, row)
    for cut in (0, 8, 19):
        ids = torch.cat([row[:, :cut], torch.full((1, 6), 5), row[:, cut:]], 1)
        mask = torch.ones_like(ids)
        mask[:, cut : cut + 6] = 0
        found = logits_of(model, torch.cat([other, ids]), attention_mask=torch.cat([torch.ones_like(mask), mask]))
        torch.testing.assert_close(found[1:, mask[0].bool()], alone, **TOLERANCE)
    packed = logits_of(
        model, torch.cat([other, row], 1), position_ids=torch.cat([torch.arange(25), torch.arange(19)])[None]
    )
    torch.testing.assert_close(packed, torch.cat([logits_of(model, other), alone], 1), **TOLERANCE)


def test_a_joint_softmax_without_a_rest_is_the_window_and_learns_its_maps_and_factors():
    joint, window, ids = (
        tiny_student(**JOINT),
        tiny_student(mixer_branches="window", memory_cell="linear", sliding_window=30),
        token_ids(2, 30),
    )
    window.load_state_dict(
        {name: x for name, x in joint.state_dict().items() if "joint_scale" not in name}, strict=False
    )
    joint.config.sliding_window = 30
    torch.testing.assert_close(logits_of(joint, ids), logits_of(window, ids), **TOLERANCE)
    joint.config.sliding_window = 7
    joint(ids, teacher_forced=True).loss.backward()
    mixers = [p for module in joint.modules() if isinstance(module, JointMixer) for p in module.parameters()]
    assert len(mixers) == 3 * 3 and all(
        bool(p.grad.flatten(1).any(1).all() if p.ndim > 1 else p.grad.all()) for p in mixers
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_sink_tokens": 0, "memory_feature_map": "softmax_signed", "qk_norm": "head"}],
    ids=["plain", "signed"],
)
def test_every_check_holds_for_a_joint_softmax(changes):
    results = verify(tiny_student(num_hidden_layers=2, **JOINT, **changes), length=29)
    assert not [(r.name, r.difference, r.note) for r in results if not r.passed] and len(results) > 16


@torch.no_grad()
def test_a_packed_row_can_arrive_in_pieces_and_its_last_document_goes_on():
    model = tiny_student(num_hidden_layers=2, **JOINT)
    ids, lengths = token_ids(1, 45), [9, 1, 1, 20, 14]
    alone = torch.cat([logits_of(model, part) for part in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for sizes in ([45], [1] * 45, [4, 25, 16], [15, 5, 5, 5, 5, 5, 5]):
        torch.testing.assert_close(in_pieces(model, ids, sizes, position_ids=positions)[0], alone, **TOLERANCE)


@pytest.mark.parametrize("T", [1, 6, 7, 10, 11, 40])
@torch.no_grad()
def test_the_state_is_the_sum_over_the_tokens_that_have_left_the_window(T):
    """And over no sink: 3 sinks, a window of 7. Pieces of any size leave the same."""
    model, ids = tiny_student(num_hidden_layers=1, **JOINT), token_ids(2, T)
    mixer, seen = model.model.layers[0].self_attn.mlstm, []
    read = mixer.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids, use_cache=False)
    read.remove()
    key, v = (repeat_kv(x, 2)[:, :, 3 : max(T - 7, 3)] for x in seen[0][1:])
    k = mixer.read(key, mixer.k_map)
    for piece in (1, 4, 13, T):
        layer = prefill(model, ids, piece=piece).layers[0]
        torch.testing.assert_close(layer.state.C, k.transpose(1, 2).transpose(-1, -2) @ v, **TOLERANCE)
        torch.testing.assert_close(layer.state.n, k.sum(1), **TOLERANCE)
        assert not layer.state.m.any()


def test_a_joint_softmax_generates_with_and_without_a_cache_what_evaluation_reads():
    model, ids, options = (
        tiny_student(**JOINT),
        token_ids(2, 9),
        {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False},
    )
    want = model.generate(ids, use_cache=False, **options)
    for more in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3, "num_beams": 1}):
        rows = ids[:1] if "prompt_lookup_num_tokens" in more else ids
        assert torch.equal(model.generate(rows, **options, **more), want[: len(rows)]), more
    assert [gate.shape for gate in model(ids, output_gates=True)["gates"]] == 3 * [(2, 9, 4)]


def test_a_joint_softmax_stands_beside_kept_groups_and_not_beside_a_sparse_memory():
    model, ids = tiny_student(kept_groups=[[1], [], [0]], **JOINT), token_ids(2, 25)
    want, cache = logits_of(model, ids), prefill(model, ids[:, :11])
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 11:], cache=cache, use_cache=True).logits, want[:, 11:], **TOLERANCE)
    with pytest.raises(ConfigError, match="sparse_memory=4: expected 0"):
        tiny_config(sparse_memory=4, **JOINT)
