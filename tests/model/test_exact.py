"""What a hybrid layer remembers exactly: kept groups are the teacher's attention, however the tokens reach the layer."""

import itertools

import pytest
import torch
from conftest import assert_same_model, tiny_student, token_ids
from test_modeling import LENGTHS, PACKINGS, in_pieces
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache
from xlstm_kernels import mlstm

from xlstm_hybrid.errors import CacheError, ConfigError
from xlstm_hybrid.evaluation.equivalence_checks import CHECKS, Subject
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.experimental import sparse
from xlstm_hybrid.model.kept_groups import DOCUMENT, KeptKeys
from xlstm_hybrid.model.tokens import Tokens
from xlstm_hybrid.planning.layers import keep_groups
from xlstm_hybrid.state import load_state, prefill, remember, rollback, save_state, snapshot

GOLDEN = [13656260, 12150260, 3947708]  # of `index_hash`: states on disk hold such scores
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}  # float64: any real difference shows
# mixed heads on both sides of kept ones, and none
KEPT = {"kept_groups": [[1], [], [0]], "num_attention_heads": 6, "num_key_value_heads": 3}
MIXED = {
    "layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"],
    "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "teacher_sliding_window": 5,
    "kept_groups": [[1], [], [0]],
}
STACKS = {
    "kept": KEPT,
    "kept without positions": KEPT | {"kept_positions": "log", "kept_log_base": 3, "qk_norm": "head"},
    "kept beside the teacher's layers": MIXED,
    "sparse, weighted, no sinks": {
        "sparse_memory": 5,
        "sparse_memory_score": "weighted",
        "num_sink_tokens": 0,
        "qk_norm": "head",
    },
    "sparse beside a delta rule": {"sparse_memory": 4, "memory_cell": "delta", "mixer_norm": True},
    "kept beside a wider linear memory before RoPE": KEPT
    | {"memory_cell": "linear", "memory_feature_dim": 24, "memory_rope": False},
    "sparse and kept": KEPT | {"sparse_memory": 4, "sparse_memory_score": "random"},
}


@pytest.fixture(scope="module", params=STACKS)
def any_student(request):
    return tiny_student(**STACKS[request.param])


# --- contracts of the model, with exact memories -----------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
@torch.no_grad()
def test_every_way_of_reading_gives_the_same_hidden_states(any_student, name):
    for got, want in CHECKS[name](Subject(any_student, 29)):
        assert want.std() > 0.1
        torch.testing.assert_close(got, want, **TOLERANCE)


@torch.no_grad()
def test_a_packed_row_can_arrive_in_pieces_and_its_last_document_goes_on(any_student):
    """Documents start while the cache holds chosen tokens and kept keys of the one before."""
    if "full_attention" in any_student.config.layer_types:
        pytest.skip("refused, see test_modeling")
    ids, lengths = token_ids(1, 70), [25, 1, 24, 20]
    alone = torch.cat([any_student(d, use_cache=False).logits for d in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    # the last: a call in which a document starts and outgrows the window
    for sizes in ([1] * 70, [20, 31, 19], [48, 17, 5]):
        torch.testing.assert_close(in_pieces(any_student, ids, sizes, position_ids=positions)[0], alone, **TOLERANCE)


@torch.no_grad()
def test_a_state_file_holds_the_exact_memories(any_student, tmp_path):
    ids = token_ids(2, 30)
    cache = prefill(any_student, ids[:, :20], piece=6)
    save_state(cache, tmp_path / "s", any_student)
    found = load_state(tmp_path / "s", any_student)
    for model_cache in (cache, found):
        model_cache.logits = in_pieces(any_student, ids[:, 20:], [1, 9], model_cache)[0]
    assert torch.equal(cache.logits, found.logits)


def test_training_in_one_call_has_the_gradients_of_eager_attention_with_and_without_checkpointing(any_student):
    ids, gradients = token_ids(2, 30), []
    model = any_student.train()
    try:
        for implementation, checkpointing in (("sdpa", False), ("sdpa", True), ("eager", False)):
            model.set_attn_implementation(implementation)
            model.gradient_checkpointing_enable(
                {"use_reentrant": False}
            ) if checkpointing else model.gradient_checkpointing_disable()
            model.zero_grad()
            logits = model(ids, use_cache=False).logits
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    finally:
        model.set_attn_implementation("sdpa")
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()
    one_branch = model.config.mixer_branches != "both"  # leaves its parameters out
    assert all(g.abs().max() > 0 or one_branch for g in gradients[0].values())
    assert one_branch or len(gradients[0]) == len(list(model.parameters()))  # DDP would wait for one that is missing
    torch.testing.assert_close(gradients[0], gradients[1], **TOLERANCE)
    for name, g in gradients[2].items():  # eager attention rounds its softmax to float32
        torch.testing.assert_close(g, gradients[0][name], atol=2e-4 * float(g.abs().max()), rtol=0)


# --- kept groups -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kept_groups_are_the_teachers_attention_and_the_others_do_not_notice():
    """The same weights as a plain student and as a full layer: before W_o, heads of a kept group equal the one and the
    others equal the other.
    """
    plain, full = tiny_student(), tiny_student(layer_types=["full_attention"] * 3)
    full.load_state_dict({k: v for k, v in plain.state_dict().items() if ".mlstm." not in k})
    kept = keep_groups(plain, [[0], [1], [0]])
    seen = {}
    hidden = torch.sin(torch.arange(2 * 40 * 48.0, dtype=torch.float64)).view(2, 40, 48)
    for name, model in (("plain", plain), ("full", full), ("kept", kept)):
        _, where, _ = model.model.prepare(hidden, None, None, None)
        for j, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, x, key=(name, j): seen.__setitem__(key, x[0].unflatten(-1, (4, 16)))
            )
            layer.self_attn(hidden, **where[j])
    for j, group in enumerate((0, 1, 0)):
        heads, others = [2 * group, 2 * group + 1], [2 - 2 * group, 3 - 2 * group]
        torch.testing.assert_close(seen["kept", j][:, :, heads], seen["full", j][:, :, heads], **TOLERANCE)
        torch.testing.assert_close(seen["kept", j][:, :, others], seen["plain", j][:, :, others], **TOLERANCE)
        assert (seen["plain", j] - seen["full", j])[:, 20:].abs().min() > 1e-6


@torch.no_grad()
def test_stage_one_has_no_error_in_kept_heads():
    """Groups whose heads are all kept but one leave only that one's error, and a teacher's sliding layer keeps its own
    window.
    """
    plain = tiny_student(**{**MIXED, "kept_groups": None})
    ids = token_ids(2, 40)
    error = plain(ids, teacher_forced=True).error
    for group in (0, 1):
        kept = keep_groups(plain, [[group], [], [group]])(ids, teacher_forced=True).error
        other = keep_groups(plain, [[1 - group], [], [1 - group]])(ids, teacher_forced=True).error
        torch.testing.assert_close(kept + other, error, rtol=1e-9, atol=1e-9)
        assert (kept[[0, 2]] > 0.01 * error[[0, 2]]).all()


@torch.no_grad()
def test_without_positions_attention_follows_its_definition():
    """One layer, one kept group, no cache: softmax of log_a(t + a) q k / sqrt(K) over all tokens so far, before RoPE."""
    model = tiny_student(num_hidden_layers=1, kept_groups=[[1]], kept_positions="log", kept_log_base=7)
    attention, hidden = (
        model.model.layers[0].self_attn,
        torch.sin(torch.arange(30 * 48.0, dtype=torch.float64)).view(1, 30, 48),
    )
    tokens, (where,), _ = model.model.prepare(hidden, None, None, None)
    projected = attention.rotated(attention.heads(hidden), where["position_embeddings"])
    h, _ = attention.mix(hidden, projected, tokens, where["mask"])
    q, k, v = (
        m(hidden)[0].unflatten(-1, (-1, 16)).transpose(0, 1)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    t = torch.arange(30, dtype=torch.float64)
    for head in (2, 3):
        scores = (torch.log(t + 7) / torch.log(torch.tensor(7.0).double()))[:, None] * (q[head] @ k[1].T) / 4
        want = scores.masked_fill(t > t[:, None], -torch.inf).softmax(-1) @ v[1]
        torch.testing.assert_close(h[0, :, head], want, **TOLERANCE)


@torch.no_grad()
def test_kept_keys_grow_by_the_context_and_drop_what_nobody_sees_any_more():
    model = tiny_student(**MIXED)
    cache = prefill(model, token_ids(2, 50))
    assert cache.layers[0].kept.keys.shape == (2, 1, 50, 16) and cache.layers[0].keys.shape == (2, 1, 10, 16)
    assert cache.layers[2].kept.keys.shape == (2, 1, 4, 16)  # the teacher's window of 5 less the token that comes next
    packed = cache_of(tiny_student(kept_groups=[[0]] * 3)(token_ids(1, 36), use_cache=True, **PACKINGS["position_ids"]))
    assert packed.layers[0].kept.keys.shape[2] == LENGTHS[-1]


def test_a_kept_window_stays_wide_enough_for_what_may_be_taken_back():
    held, key = KeptKeys(window=3), torch.zeros(1, 1, 1, 2)
    for index in range(12):
        held.append(key + index, key, Tokens.locate((1, 1), "cpu", seen=torch.tensor([index])), spare=4)
    assert held.place[0].tolist() == [6, 7, 8, 9, 10, 11]  # 4 to take back, and 2 before them
    held.crop(4)
    seen, _, mask = held.append(key + 8, key, Tokens.locate((1, 1), "cpu", seen=torch.tensor([8])))
    assert seen[0, 0, mask[0, 0, 0], 0].tolist() == [6, 7, 8]


def test_a_row_of_padding_alone_keeps_its_document():
    held, key = KeptKeys(), torch.zeros(2, 1, 3, 2)
    real = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    held.append(key, key, Tokens.locate((2, 3), "cpu", attention_mask=real))
    held.append(key, key, Tokens.locate((2, 3), "cpu", attention_mask=~real, seen=torch.tensor([3, 0])))
    assert held.place.tolist() == [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]] and DOCUMENT > 10**9


@torch.no_grad()
def test_taking_back_gives_the_state_from_before_bitwise(any_student):
    ids = token_ids(2, 40)
    cache = remember(DynamicCache(config=any_student.config), 12)
    in_pieces(any_student, ids[:, :28], [13, 7, 1, 1, 6], cache)
    before = snapshot(cache)
    in_pieces(any_student, ids[:, 28:], [1, 4, 1], cache)
    rollback(cache, 6)
    want, got = (in_pieces(any_student, ids[:, 30:], [1, 2], c)[0] for c in (before, cache))
    assert torch.equal(want, got)


@torch.no_grad()
def test_generation_with_beams_drafts_and_a_static_cache_gives_what_no_cache_gives(any_student):
    ids = token_ids(2, 9)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    want = any_student.generate(ids, **options, use_cache=False)
    torch.testing.assert_close(any_student.generate(ids, **options, cache_implementation="static"), want)
    torch.testing.assert_close(
        any_student.generate(ids, **options, num_beams=3),
        any_student.generate(ids, **options, num_beams=3, use_cache=False),
    )
    torch.testing.assert_close(any_student.generate(ids[:1], **options, prompt_lookup_num_tokens=3), want[:1])
    logits, cache = in_pieces(any_student, ids, [5, 1, 3], StaticCache(config=any_student.config, max_cache_len=20))
    torch.testing.assert_close(logits, any_student(ids, use_cache=False).logits, **TOLERANCE)
    assert not cache.is_compileable  # generate then does not compile: what grows has no fixed address


@torch.no_grad()
def test_a_reset_cache_is_a_fresh_one(any_student):
    ids = token_ids(2, 24)
    cache = prefill(any_student, token_ids(2, 31, seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(in_pieces(any_student, ids, [20, 1, 3], cache)[0], in_pieces(any_student, ids, [20, 1, 3])[0])


@torch.no_grad()
def test_attention_weights_of_kept_heads_are_in_the_output():
    model, ids = tiny_student(kept_groups=[[0]] * 3), token_ids(1, 20)
    model.set_attn_implementation("eager")
    whole = model(ids, output_attentions=True, use_cache=False).attentions[0]
    cache = prefill(model, ids[:, :15])
    last = model(ids[:, 15:], cache=cache, use_cache=True, output_attentions=True).attentions[0]
    assert whole.shape == (1, 4, 20, 20) and (whole[0, :2, -1] > 0).all() and (whole[0, 2:, -1, 3:13] == 0).all()
    torch.testing.assert_close(last[0, :2], whole[0, :2, 15:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 4, 20).double(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_groups_are_given_back_step_by_step_and_the_first_student_stays_what_it_was(tmp_path):
    plain, ids = tiny_student(), token_ids(1, 30)
    before = plain(ids).logits
    once, twice = keep_groups(plain, [[0], [], [1]]), keep_groups(keep_groups(plain, [[0], [], []]), [[0], [], [1]])
    assert (
        torch.equal(once(ids).logits, twice(ids).logits)
        and torch.equal(plain(ids).logits, before)
        and plain.config.kept_groups is None
    )
    assert once.lm_head.weight is plain.lm_head.weight and once.model.layers[0].self_attn.mlstm.q_map.shape[0] == 2
    once.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_model(loaded, once, ids)
    assert loaded.config.kept_groups == [[0], [], [1]]
    with pytest.raises(ConfigError, match=r"layer 2: groups \[1\] have no mixer"):
        keep_groups(once, [[0], [0], []])


# --- sparse memory -----------------------------------------------------------------------------------------------


def layer_inputs(T, rows=2, H=4, G=2, K=8):
    """q, k, v [B, H | G, T, K], scores [B, G, T] with equal ones among them, and `Tokens` with padding and three
    documents in the last row.
    """
    waves = [
        torch.sin(torch.arange(1.0, 1 + rows * n * T * K, dtype=torch.float64) * step).view(rows, n, T, K)
        for n, step in ((H, 0.7), (G, 1.3), (G, 2.1))
    ]
    scores = (torch.sin(torch.arange(rows * G * T, dtype=torch.float64) * 3.7).view(rows, G, T) * 4).round()
    mask = torch.ones(rows, T).long()
    mask[-1, [0, 1, 9, T - 12]] = 0
    number = (torch.arange(T) >= 15).long() + (torch.arange(T) >= T - 14).long()
    return (
        *waves,
        scores,
        Tokens.locate(
            (rows, T), "cpu", attention_mask=mask, seq_idx=torch.stack([torch.zeros(T).long()] * (rows - 1) + [number])
        ),
    )


def by_definition(q, k, v, scores, tokens, window, sinks, capacity):
    """Token by token, row by row: who is visible is counted as the docstring of the config says it."""
    h = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype)
    for b, head, t in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        if not tokens.real[b, t]:
            continue
        g, index, s = (
            head // (q.shape[1] // k.shape[1]),
            tokens.index[b].tolist(),
            scores[b, head // (q.shape[1] // k.shape[1])].tolist(),
        )
        mine = [j for j in range(t + 1) if tokens.real[b, j] and tokens.document[b, j] == tokens.document[b, t]]
        left = [j for j in mine if index[t] - index[j] >= window and index[j] >= sinks]
        best = sorted(left, key=lambda j: (-s[j], index[j]))[:capacity]
        see = [j for j in mine if index[t] - index[j] < window or index[j] < sinks or j in best]
        weight = (q[b, head, t] @ k[b, g, see].T / q.shape[-1] ** 0.5).softmax(-1)
        h[b, t, head] = weight @ v[b, g, see]
    return h


@pytest.mark.parametrize(("window", "sinks", "capacity"), [(4, 2, 3), (7, 0, 1), (1, 1, 6), (3, 5, 40)])
def test_the_best_tokens_that_left_the_window_are_visible_and_nobody_comes_back(window, sinks, capacity, monkeypatch):
    q, k, v, scores, tokens = layer_inputs(41)
    want = by_definition(q, k, v, scores, tokens, window, sinks, capacity)
    for block in (1, 5, 64):
        monkeypatch.setattr(sparse, "BLOCK", block)
        h, _ = sparse.sparse_attention(
            q, k, v, tokens, scores, sparse.SparseCacheLayer(window, sinks, capacity=capacity)
        )
        torch.testing.assert_close(torch.where(tokens.real[..., None, None], h, 0.0), want, **TOLERANCE)


def test_blocks_of_queries_have_the_gradients_of_all_at_once_and_see_a_bounded_number_of_keys(monkeypatch):
    *inputs, scores, tokens = layer_inputs(90)
    gradients, keys, attention = [], [], sparse.grouped_attention
    monkeypatch.setattr(sparse, "grouped_attention", lambda *x: keys.append(x[1].shape[2]) or attention(*x))
    for block in (1000, 6):
        monkeypatch.setattr(sparse, "BLOCK", block)
        leaf = [x.clone().requires_grad_() for x in inputs]
        h, _ = sparse.sparse_attention(*leaf, tokens, scores, sparse.SparseCacheLayer(6, 2, capacity=5))
        (h * torch.cos(h.detach() * 9) * tokens.real[..., None, None]).sum().backward()
        gradients.append([x.grad for x in leaf])
    torch.testing.assert_close(gradients[0], gradients[1], **TOLERANCE)
    assert keys == [90] + [6] + [6 + 5 + 6] + [2 + 6 + 5 + 6] * 13 and all(g.abs().max() > 0.01 for g in gradients[0])


@torch.no_grad()
def test_a_residual_is_what_the_state_answers_to_a_tokens_own_key():
    """The mLSTM token by token, as its equations say, in float64."""
    B, T, H, K = 2, 23, 4, 8
    k, v, i, f = (
        torch.sin(torch.arange(1.0, 1 + B * T * H * n, dtype=torch.float64) * step).view(B, T, H, n)
        for n, step in ((K, 0.3), (K, 1.7), (1, 2.3), (1, 0.9))
    )
    k, i, f = k.softmax(-1), 2 * i[..., 0], 3 + f[..., 0]
    tokens = Tokens.locate((B, T), "cpu")
    C, n, residual = torch.zeros(B, H, K, K).double(), torch.zeros(B, H, K).double(), torch.zeros(B, T, H).double()
    for t in range(T):
        forget, write = f[:, t].sigmoid()[..., None], i[:, t].exp()[..., None] * k[:, t]
        C, n = forget[..., None] * C + write[..., None] * v[:, t, :, None], forget * n + write
        answer = (k[:, t, :, None] @ C)[:, :, 0] / (k[:, t] * n).sum(-1, keepdim=True)
        residual[:, t] = (v[:, t] - answer).square().sum(-1)
    key = torch.zeros(B, 2, T, K).double()
    whole = sparse.token_scores("residual", tokens, key, 0, mlstm, (k, v, i, f), None, 8)
    torch.testing.assert_close(whole, residual.view(B, T, 2, 2).mean(-1).transpose(1, 2), **TOLERANCE)
    share = i.exp() / (i.exp() + f.sigmoid())
    want = (residual * share).view(B, T, 2, 2).mean(-1).transpose(1, 2)
    torch.testing.assert_close(
        sparse.token_scores("weighted", tokens, key, 0, mlstm, (k, v, i, f), None, 8), want, **TOLERANCE
    )
    assert residual[:, 0].max() < 1e-25 and residual[:, 1:].min() > 0  # alone, a token is given back as it is


@torch.no_grad()
def test_the_most_recent_chosen_tokens_are_a_wider_window_and_room_for_all_is_full_attention():
    ids = token_ids(2, 40)
    plain = tiny_student()
    wide = tiny_student(sliding_window=11)
    recent = tiny_student(sparse_memory=4, sparse_memory_score="recency")
    every = tiny_student(sparse_memory=60)
    full = tiny_student(layer_types=["full_attention"] * 3)
    for model in (wide, recent, every):
        model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(recent(ids).logits, wide(ids).logits, **TOLERANCE)
    for layer in every.model.layers:
        layer.self_attn.mlstm.ogate_bias.fill_(-1e4)
    full.load_state_dict({k: v for k, v in plain.state_dict().items() if ".mlstm." not in k})
    torch.testing.assert_close(every(ids).logits, full(ids).logits, **TOLERANCE)
    assert (recent(ids).logits - plain(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_the_sparse_memory_is_as_large_at_any_context_and_empty_slots_are_empty():
    model = tiny_student(sparse_memory=6)
    short, long = (prefill(model, token_ids(1, T)).layers[0].sparse for T in (12, 200))
    assert [x.shape for x in short] == [x.shape for x in long] and (long.index[..., 1:] > long.index[..., :-1]).all()
    assert short.index[0].tolist() == [[3, 4, -1, -1, -1, -1]] * 2  # 12 tokens less 3 sinks and a window of 7
    assert not short.keys[:, :, 2:].any() and (short.score[:, :, 2:] == -torch.inf).all() and long.index.min() >= 3


def test_random_scores_differ_between_layers_and_tokens_and_never_change():
    index = torch.arange(4000)[None]
    a, b = (sparse.index_hash(index, j)[0] for j in (0, 100))
    assert len(a.unique()) > 3990 and int(a.min()) >= 0 and int(a.max()) < 2**24 and (a == b).sum() < 5
    assert (
        abs(float(a.double().mean()) / 2**23 - 1) < 0.03
        and abs(float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])) < 0.05
    )
    assert a[:3].tolist() == GOLDEN


# --- refusals ----------------------------------------------------------------------------------------------------

BAD = {
    "kept_groups has 2 entries": {"kept_groups": [[0], [1]]},
    r"kept_groups of layer 0 are \[2\]": {"kept_groups": [[2], [], []]},
    r"kept_groups of layer 1 are \[0, 0\]": {"kept_groups": [[], [0, 0], []]},
    "kept_groups of layer 2 are all 2 groups: make it full_attention": {"kept_groups": [[], [], [1, 0]]},
    r"layer 1 is full_attention with kept_groups \[0\]": {**MIXED, "kept_groups": [[], [0], []]},
    "kept_positions='none'": {"kept_positions": "none"},
    "kept_log_base=1": {"kept_log_base": 1},
    "sparse_memory=-1": {"sparse_memory": -1},
    "sparse_memory_score='best'": {"sparse_memory_score": "best"},
    "sparse_memory=2 with mixer_branches='window'": {"sparse_memory": 2, "mixer_branches": "window"},
    "mixer_combine='joint' with sparse_memory=2: expected 0": {
        "mixer_combine": "joint",
        "memory_cell": "linear",
        "sparse_memory": 2,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_memories_that_contradict_themselves_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        tiny_student(**BAD[message])


@torch.no_grad()
def test_a_cache_with_other_memories_is_refused():
    plain, kept = tiny_student(), tiny_student(kept_groups=[[0]] * 3)
    for reader, writer in ((plain, kept), (kept, plain)):
        with pytest.raises(CacheError, match="kept groups and sparse memory"):
            reader(token_ids(1, 4), cache=prefill(writer, token_ids(1, 9)))
    with pytest.raises(CacheError, match=r"False, 2\), expected .*False, 0\)"):
        plain(token_ids(1, 4), cache=prefill(tiny_student(sparse_memory=2), token_ids(1, 9)))
