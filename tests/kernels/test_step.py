"""A step in place is the whole sequence, one token at a time: outputs, state, slots, padding and restarts."""

import pytest
import torch
from conftest import tiny_student, token_ids
from transformers import DynamicCache
from xlstm_kernels import MLSTMState, hybrid_step, mlstm, window_attention
from xlstm_kernels.step.cpu import step_in_graphs

from xlstm_hybrid.model.cache_names import cache_of

INF = float("inf")
W, S = 7, 3


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def inputs(T, B=2, H=4, G=2, K=8, V=6):
    q, k, v = waves(B, T, H, K, step=0.9), waves(B, T, G, K, step=0.7), waves(B, T, G, V, step=0.36)
    phi = [(3 * waves(B, T, H, K, step=s)).softmax(-1) for s in (0.11, 0.23)]
    return [
        q,
        k,
        v,
        *phi,
        waves(B, T, H, step=0.49),
        1 + waves(B, T, H, step=0.62),
        waves(B, T, H, step=0.77).sigmoid(),
    ]


def memory_of(B=2, H=4, G=2, K=8, V=6):
    state = MLSTMState(
        torch.zeros(B, H, K, V).double(), torch.zeros(B, H, K).double(), torch.full((B, H), -INF).double()
    )
    return state, torch.zeros(B, G, S + W, K).double(), torch.zeros(B, G, S + W, V).double()


def whole(x, index=None, document=None):
    """The same by the functions for sequences."""
    q, k, v, phi_q, phi_k, i, f, o = x
    memory, state = mlstm(phi_q, phi_k, v.repeat_interleave(2, 2), i, f, backend="recurrent")
    window = window_attention(q, k, v, window=W, sinks=S, index=index, document=document, backend="reference")
    return o[..., None] * memory + (1 - o[..., None]) * window, state


def steps(x, index):
    memory, h = memory_of(), []
    for t in range(x[0].shape[1]):
        h.append(hybrid_step(*(a[:, t : t + 1] for a in x), *memory, index[:, t], sinks=S))
    return torch.cat(h, 1), *memory


def test_steps_are_the_sequence_past_every_wrap_of_the_ring():
    T = 2 * W + S + 4
    x, want = inputs(T), whole(inputs(T))
    h, state, _, _ = steps(x, torch.arange(T).expand(2, T))
    torch.testing.assert_close(h, want[0])
    torch.testing.assert_close(state, want[1])


def test_slots_that_come_with_their_tokens_are_as_good_as_all_slots_at_once():
    """Row 1 begins with padding, so that its tokens leave slots behind them empty."""
    T, x = 2 * W + S + 4, inputs(2 * W + S + 4)
    index = torch.stack([torch.arange(T), torch.arange(T) - 4]).clamp_min(-1)
    x[5][1, :4], x[6][1, :4] = -INF, INF
    want, (state, *whole_slots) = steps(x, index)[0], memory_of()
    grown = [a[:, :, :0] for a in whole_slots]
    for t in range(T):
        if t < S + W:  # 9: nobody reads what is empty
            grown = [torch.cat([a, a.new_full((*a.shape[:2], 1, a.shape[3]), 9.0)], 2) for a in grown]
        h = hybrid_step(*(a[:, t : t + 1] for a in x), state, *grown, index[:, t], sinks=S)
        torch.testing.assert_close(h[:, 0], want[:, t])
    assert [a.shape[2] for a in grown] == [S + W] * 2


def test_padding_writes_nothing_and_a_restart_forgets_everything():
    T = 24
    x, index = inputs(T), torch.arange(T).expand(2, T).clone()
    index[0, 9:12] = -1  # padding inside row 0 only
    index[0, 12:] = torch.arange(9, T - 3)
    index[1, 11:] = torch.arange(T - 11)  # row 1 starts a second document
    x[5][0, 9:12], x[6][0, 9:12] = -INF, INF
    x[6][1, 11] = -INF
    document = torch.zeros(2, T, dtype=torch.long)
    document[1, 11:] = 1
    want, want_state = whole(x, index, document)
    h, state, _, _ = steps(x, index)
    real = index >= 0
    torch.testing.assert_close(h[real], want[real])
    assert torch.isfinite(h).all()
    torch.testing.assert_close(state, want_state)


def test_a_step_keeps_every_address():
    x, memory = inputs(1), memory_of()
    before = [a.data_ptr() for a in (*memory[0], *memory[1:])]
    hybrid_step(*x, *memory, torch.tensor([0, 0]), sinks=S)
    assert before == [a.data_ptr() for a in (*memory[0], *memory[1:])]
    assert memory[1][:, :, 0].abs().sum() > 0 and memory[1][:, :, 1:].abs().sum() == 0


def test_the_step_tells_the_compiler_the_truth():
    state, keys, values = memory_of()
    torch.library.opcheck(step_in_graphs, (*inputs(1), *state, keys, values, torch.tensor([0, 5]), S, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, m: (x[:1] + [x[1][:, :, :1].repeat(1, 1, 3, 1)] + x[2:], m), r"v: expected .*'G': 3"),
        (lambda x, m: (x[:3] + [x[3][..., :5]] + x[4:], m), r"phi_q: expected .*'K': 8"),
        (lambda x, m: (x[:7] + [x[7][:, :, :1]], m), r"o: expected .*'H': 4"),
        (lambda x, m: ([a.repeat(1, 2, *[1] * (a.dim() - 2)) for a in x], m), r"q: expected .*'T': 1"),
        (lambda x, m: ([a.requires_grad_() for a in x], m), "no gradients"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    x, memory = change(inputs(1), memory_of())
    with pytest.raises(ValueError, match=message):
        hybrid_step(*x, *memory, torch.tensor([0, 0]), sinks=S)


def test_a_backend_that_is_named_runs_or_raises():
    with pytest.raises(ValueError, match="backend='nonsense' is not one of"):
        hybrid_step(*inputs(1), *memory_of(), torch.tensor([0, 0]), sinks=S, backend="nonsense")


@torch.no_grad()
def test_the_model_decodes_in_place_and_as_with_gradients_enabled():
    student, ids = tiny_student(), token_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding in one row
    mask[0, 17] = 0  # and a token in the middle that is not there
    begin = {"input_ids": ids[:, :11], "attention_mask": mask[:, :11]}
    caches = [cache_of(student(**begin, cache=DynamicCache(config=student.config))) for _ in range(2)]
    addresses = [caches[0].layers[0].keys.data_ptr(), caches[0].layers[0].state.C.data_ptr()]
    for t in range(11, 30):
        now = {"attention_mask": mask[:, : t + 1]}
        step = student(ids[:, t : t + 1], cache=caches[0], **now).logits
        with torch.enable_grad():
            functional = student(ids[:, t : t + 1], cache=caches[1], **now).logits
        assert functional.requires_grad and not step.requires_grad
        real = mask[:, t].bool()
        torch.testing.assert_close(step[real], functional[real].detach(), rtol=1e-9, atol=1e-9)
    assert addresses == [caches[0].layers[0].keys.data_ptr(), caches[0].layers[0].state.C.data_ptr()]
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close((*a.state, a.count, a.slot_index), (*b.state, b.count, b.slot_index))
        held = a.slot_index >= 0
        torch.testing.assert_close(a.keys.transpose(1, 2)[held], b.keys.transpose(1, 2)[held])
