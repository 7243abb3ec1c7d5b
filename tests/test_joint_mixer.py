"""One softmax over window and linear features: the baseline among the mixers that has no gate and no cache."""

import pytest
import torch
from conftest import tiny_config, tiny_student, token_ids

from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.evaluation import continuations
from xlstm_hybrid.mixers import JointMixer
from xlstm_hybrid.record import Tokens
from xlstm_hybrid.state import prefill
from xlstm_hybrid.verify import verify

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
    q, k, v, wq, wk = (torch.randn(2, 4, T, 16, dtype=torch.float64) for _ in range(5))
    h, share, _ = mixer(torch.zeros(2, T, 48), None, q, k, v, Tokens.locate((2, T), "cpu"), wq, wk, 0.25)
    for b, head, t in ((0, 0, 0), (0, 1, 6), (1, 2, 9), (1, 3, 13)):
        phi_q, phi_k = torch.softmax(q[b, head, t] @ mixer.q_map[head], -1), torch.softmax(k[b, head] @ mixer.k_map[head], -1)
        near = [t - s < 7 or s < 3 for s in range(t + 1)]
        far = mixer.joint_scale[head].exp() * (phi_k[: t + 1] @ phi_q)
        weight = torch.where(torch.tensor(near), (0.25 * wk[b, head, : t + 1] @ wq[b, head, t]).exp(), far)
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
    packed = logits_of(model, torch.cat([other, row], 1), position_ids=torch.cat([torch.arange(25), torch.arange(19)])[None])
    torch.testing.assert_close(packed, torch.cat([logits_of(model, other), alone], 1), **TOLERANCE)


def test_a_joint_softmax_without_a_rest_is_the_window_and_learns_its_maps_and_factors():
    joint, window, ids = tiny_student(**JOINT), tiny_student(mixer_branches="window", memory_cell="linear", sliding_window=30), token_ids(2, 30)
    window.load_state_dict({name: x for name, x in joint.state_dict().items() if "joint_scale" not in name}, strict=False)
    joint.config.sliding_window = 30
    torch.testing.assert_close(logits_of(joint, ids), logits_of(window, ids), **TOLERANCE)
    joint.config.sliding_window = 7
    joint(ids, teacher_forced=True).loss.backward()
    mixers = [p for module in joint.modules() if isinstance(module, JointMixer) for p in module.parameters()]
    assert len(mixers) == 3 * 3 and all(bool(p.grad.flatten(1).any(1).all() if p.ndim > 1 else p.grad.all()) for p in mixers)


def test_a_joint_softmax_works_without_a_cache_and_says_so():
    model, ids, options = tiny_student(**JOINT), token_ids(2, 9), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert model(ids).past_key_values is None
    for refused in (lambda: model.generate(ids, use_cache=True, **options), lambda: model(ids, use_cache=True), lambda: prefill(model, ids)):
        with pytest.raises(CacheError, match="pass use_cache=False"):
            refused()
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), want)
    assert continuations(model, ids.tolist(), [], 3) == want[:, 9:].tolist()  # evaluation knows
    assert [gate.shape for gate in model(ids, output_gates=True)["gates"]] == 3 * [(2, 9, 4)]
    with pytest.raises(ConfigError, match="nothing to verify"):
        verify(model)
