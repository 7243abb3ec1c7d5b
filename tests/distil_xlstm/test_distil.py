"""Distil-xLSTM is one function of its tokens, however they reach it, and keeps its teacher's embeddings. Weights are
large, so that a broken state shows; models are float64.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_same_model, enlarge, token_ids
from tiny_teachers import FAMILIES, teacher
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from xlstm_hybrid import DistilXLSTMConfig, DistilXLSTMForCausalLM
from xlstm_hybrid.conversion.convert import empty_student
from xlstm_hybrid.distil_xlstm import convert, share_frozen
from xlstm_hybrid.distil_xlstm.modeling import BlockDiagonal, CausalConv, HeadNorm, MLSTMCore
from xlstm_hybrid.distil_xlstm.transfer import EMBEDDING, distil_config, heads_for, parameters_of
from xlstm_hybrid.errors import CacheError, CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.tokens import Tokens

ROOT = Path(__file__).parents[2]
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
# The student of Qwen2.5-1.5B whose parameters are counted as published: 83.92M of 550.67M trainable, 15.24 %, all
# published digits. Inferred: half of its 28 layers would be 14 with 2.1 times as many, so that the paper's stack must be
# shorter. A tied head is counted twice there: it is a copy.
PUBLISHED = {"num_hidden_layers": 6, "mlstm_num_heads": 4, "slstm_intermediate_size": 2624}
PUBLISHED |= {"tie_word_embeddings": False}


def make_config(**changes):
    fields = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlstm_context": 64,
        "mlstm_chunk_size": 8,
        "slstm_intermediate_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return DistilXLSTMConfig(**(fields | changes))


def make(dtype=torch.float64, gain=2.0, **changes):
    return enlarge(DistilXLSTMForCausalLM(make_config(**changes)).to(dtype), gain=gain).eval()


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return token_ids(2, 23)


@pytest.fixture(scope="module")
def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# --- the blocks --------------------------------------------------------------------------------------------------


def test_the_convolution_is_the_causal_one_of_pytorch():
    conv = CausalConv(6, 4).double()
    torch.nn.init.normal_(conv.weight), torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, left = conv(x, Tokens.locate((2, 9), x.device), None)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    want = F.silu(F.conv1d(padded, conv.weight.flip(0).t()[:, None], conv.bias, groups=6)).transpose(1, 2)
    torch.testing.assert_close((y, left), (want, x[:, -3:]))


def test_head_norm_is_a_group_norm_of_every_token():
    norm = HeadNorm(3, 5, 1e-6).double()
    torch.nn.init.normal_(norm.weight)
    h = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    want = F.group_norm(h.reshape(8, 15), 3, norm.weight.flatten(), eps=1e-6).view(2, 4, 15)
    torch.testing.assert_close(norm(h), want)


def test_a_block_diagonal_map_is_a_matrix_with_blocks():
    blocks = BlockDiagonal(12, 4).double()
    torch.nn.init.normal_(blocks.weight)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(blocks(x), x @ torch.block_diag(*blocks.weight))


def test_the_mlstm_block_is_the_equations_of_the_method():
    """Token by token: features, gates, ratio, norm, skip, gate and down-projection, all written out."""
    config = make_config()
    mixer = enlarge(MLSTMCore(config).double())
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    got = mixer(x, Tokens.locate((1, 6), x.device))[0]
    H, K, E = mixer.heads, mixer.head_dim, config.inner_size
    inside, gate = (x @ mixer.up_proj.weight.t()).split(E, -1)
    seen = mixer.conv(inside, Tokens.locate((1, 6), x.device), None)[0]
    q, k, v = (
        y @ torch.block_diag(*m.weight) for y, m in ((seen, mixer.q_proj), (seen, mixer.k_proj), (inside, mixer.v_proj))
    )
    i, f = (
        torch.cat([q, k, v], -1) @ w.t() + b
        for w, b in ((mixer.igate_weight, mixer.igate_bias), (mixer.fgate_weight, mixer.fgate_bias))
    )
    q, k, v = (y.view(6, H, K) for y in (q, k, v))
    q, k = (torch.softmax(y * K**0.5, -1) for y in (q, k))
    S, z = torch.zeros(H, K, K, dtype=torch.float64), torch.zeros(H, K, dtype=torch.float64)
    for t in range(6):
        keep, write = torch.sigmoid(f[0, t]), (i[0, t]).exp()
        S = keep[:, None, None] * S + write[:, None, None] * k[t, :, :, None] * v[t, :, None]
        z = keep[:, None] * z + write[:, None] * k[t]
        h = torch.einsum("hk,hkv->hv", q[t], S) / (q[t] * z).sum(-1, keepdim=True)
        h = F.layer_norm(h, (K,), eps=config.rms_norm_eps) * mixer.head_norm.weight
        want = ((h.flatten() + mixer.skip * seen[0, t]) * F.silu(gate[0, t])) @ mixer.down_proj.weight.t()
        torch.testing.assert_close(got[0, t], want, **TIGHT)


def test_blocks_come_in_turn_and_by_pattern():
    assert make_config().block_types == ["slstm", "mlstm"] * 2
    assert make_config(block_pattern=["mlstm", "mlstm", "slstm"], num_hidden_layers=5).block_types == [
        "mlstm",
        "mlstm",
        "slstm",
        "mlstm",
        "mlstm",
    ]
    kinds = [layer.mlp is not None for layer in make(block_types=["mlstm", "slstm", "slstm", "mlstm"]).model.layers]
    assert kinds == [False, True, True, False]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_pattern": ["slstm", "lstm"]}, "block_pattern=.*expected a list of"),
        ({"block_pattern": []}, "block_pattern=.*expected a list of"),
        ({"block_pattern": ["mlstm"] * 7 + ["slstm"]}, "8 blocks for num_hidden_layers=4"),
        ({"block_types": ["slstm"]}, "block_types has 1 entries for num_hidden_layers=4"),
        ({"num_attention_heads": 5}, "hidden_size=24 is no multiple of num_attention_heads=5"),
        ({"mlstm_num_heads": 7}, "48 features .* are no multiple of mlstm_num_heads=7"),
        ({"mlstm_projection_block": 5}, "no multiple of mlstm_projection_block=5"),
        ({"conv_kernel_size": 1}, "conv_kernel_size=1: expected at least 2"),
        ({"slstm_forget_gate": "tanh"}, "slstm_forget_gate='tanh'"),
    ],
)
def test_sizes_that_describe_no_model_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


# --- one function of the tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuts", [(1,), (2, 9), (3, 4, 5, 22), tuple(range(1, 23))], ids=lambda c: f"{len(c) + 1} calls"
)
@torch.no_grad()
def test_any_cut_of_a_text_into_calls_gives_the_same_logits(model, ids, logits, cuts):
    cache, found = DynamicCache(config=model.config), []
    for a, b in zip((0, *cuts), (*cuts, 23), strict=True):
        found.append(model(ids[:, a:b], cache=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), logits, **TIGHT)
    assert cache.get_seq_length() == 23


@torch.no_grad()
def test_the_state_matters(model, ids, logits):
    """What makes the tests above tests: without any one part of the cache the logits are far off."""
    for part in ("memory", "conv"):
        for layer in range(4):
            cache = cache_of(model(ids[:, :12], use_cache=True))
            held = getattr(cache.layers[layer], part)
            setattr(cache.layers[layer], part, None if part == "memory" else torch.zeros_like(held))
            assert (model(ids[:, 12:], cache=cache).logits - logits[:, 12:]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["left", "right", "middle"])
@torch.no_grad()
def test_padding_anywhere_changes_nothing(model, ids, logits, where):
    real = torch.ones(2, 29, dtype=torch.bool)
    real[0, {"left": slice(0, 6), "right": slice(23, 29), "middle": slice(9, 15)}[where]] = False
    real[1, :6] = False
    padded = ids.new_full((2, 29), 7).masked_scatter(real, ids)
    found = model(padded, attention_mask=real.long(), use_cache=True)
    torch.testing.assert_close(found.logits[real].view_as(logits), logits, **TIGHT)
    more = model(
        ids[:, :5], cache=cache_of(found), attention_mask=torch.cat([real, real.new_ones(2, 5)], 1).long()
    ).logits
    torch.testing.assert_close(more, model(torch.cat([ids, ids[:, :5]], 1)).logits[:, 23:], **TIGHT)


@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, told_by):
    # the last one is shorter than what the convolution looks back
    lengths, row = (5, 1, 9, 2), token_ids(1, 17, seed=3)
    if told_by == "position_ids":
        where = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    elif told_by == "seq_idx":
        where = {"seq_idx": torch.repeat_interleave(torch.tensor(lengths))[None]}
    else:
        where = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)}
    want = torch.cat([model(document).logits for document in row.split(lengths, 1)], 1)
    torch.testing.assert_close(model(row, use_cache=False, **where).logits, want, **TIGHT)
    cached = cache_of(model(row, use_cache=True, **where))  # goes on with the last document
    want = model(torch.cat([row[:, 15:], row[:, :4]], 1)).logits[:, 2:]
    torch.testing.assert_close(model(row[:, :4], cache=cached).logits, want, **TIGHT)


@torch.no_grad()
def test_a_document_may_start_after_a_filled_cache(model, ids):
    """Also one shorter than the convolution: its successor call must not look back past its start."""
    cache = cache_of(model(ids[:, :8], use_cache=True))
    found = [model(ids[:, 8 + j : 9 + j], cache=cache, position_ids=torch.full((2, 1), j)).logits for j in range(6)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids[:, 8:14]).logits, **TIGHT)


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without(model, ids):
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        plain, cached = (
            model.generate(ids, max_new_tokens=8, eos_token_id=None, use_cache=u, **options) for u in (False, True)
        )
        assert torch.equal(plain, cached)


@torch.no_grad()
def test_a_left_padded_batch_generates_what_its_rows_do(model):
    rows = [token_ids(1, n, seed=n) for n in (4, 9, 7)]
    mask = torch.stack([torch.arange(9) >= 9 - r.shape[1] for r in rows]).long()
    batch = torch.cat([F.pad(r, (9 - r.shape[1], 0), value=5) for r in rows])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 9:]
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, -6:], got)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(model, ids, logits):
    cache = cache_of(model(ids[:, :12], use_cache=True))
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(ids[[1, 0], 12:], cache=copy.deepcopy(cache)).logits, logits[[1, 0], 12:], **TIGHT)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(model(ids[[1, 1, 0, 0], 12:], cache=cache).logits, logits[[1, 1, 0, 0], 12:], **TIGHT)


@torch.no_grad()
def test_a_prefix_is_read_once_and_answered_from_copies(model, ids, logits):
    """Prefill, fork and snapshot of `xlstm_hybrid.state`; taking tokens back is what it refuses."""
    from xlstm_hybrid import state

    cache = state.prefill(model, ids[:1, :12])
    kept, rows = state.snapshot(cache), state.fork(cache, 3)
    torch.testing.assert_close(
        model(ids[:1, 12:].expand(3, -1), cache=rows).logits, logits[:1, 12:].expand(3, -1, -1), **TIGHT
    )
    model(ids[:1], cache=cache)
    torch.testing.assert_close(model(ids[:1, 12:], cache=kept).logits, logits[:1, 12:], **TIGHT)
    with pytest.raises(CacheError, match="cannot take tokens back"):
        state.rollback(cache, 2)


@torch.no_grad()
def test_the_cache_does_not_grow_and_its_states_are_float32():
    model = make(torch.bfloat16)
    cache = cache_of(model(token_ids(2, 5), use_cache=True))

    def sizes():
        return [[x.shape for x in (*layer.memory, layer.conv)] for layer in cache.layers]

    before = sizes()
    model(token_ids(2, 40), cache=cache)
    assert sizes() == before
    assert {x.dtype for layer in cache.layers for x in layer.memory} == {torch.float32}
    gates = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert not gates  # .to() of a user rounds them ...
    loaded = DistilXLSTMForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16
    )
    assert {n.rsplit(".", 1)[-1] for n, p in loaded.named_parameters() if p.dtype == torch.float32} == set(
        model._keep_in_fp32_modules_strict
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_hands_over_as_well_as_it_calculates(dtype, ids):
    """Measured from float64: a text in two calls is no further from the truth than twice the text in one call."""
    model = make(dtype, gain=1.0)
    truth = copy.deepcopy(model).double()(ids).logits
    whole = model(ids).logits
    cache = cache_of(model(ids[:, :11], use_cache=True))
    parts = torch.cat([model(ids[:, :11]).logits, model(ids[:, 11:], cache=cache).logits], 1)
    errors = [(x.double() - truth).square().mean().sqrt() for x in (whole, parts)]
    assert errors[1] <= 2 * errors[0] and errors[0] < 0.1 * truth.std()


def test_bfloat16_autocast_trains_on_nearly_the_float32_loss_with_finite_gradients(ids):
    model = make(torch.float32, gain=1.0).train()
    want = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=0.02)
    assert {x.dtype for layer in cache_of(out).layers for x in layer.memory} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_no_gradient(ids):
    model = make(freeze_embeddings=False)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain.values())  # every parameter matters
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    for (name, a), b in zip(plain.items(), gradients().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert len(calls) == 2  # once forward, once again for the backward
    with pytest.raises(CacheError, match="under gradient checkpointing"):
        model(ids, cache=cache_of(make().model(ids, use_cache=True)))


@torch.no_grad()
def test_saving_and_loading_changes_nothing_and_keeps_the_embeddings_frozen(model, ids, logits, tmp_path):
    for tied in (False, True):
        ours = model if not tied else make(tie_word_embeddings=True)
        ours.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied), dtype=torch.float64)
        assert_same_model(loaded, ours, ids)
        frozen = {n for n, p in loaded.named_parameters() if not p.requires_grad}
        assert frozen == ({EMBEDDING} if tied else {EMBEDDING, "lm_head.weight"})
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "True"), DistilXLSTMConfig)


@torch.no_grad()
def test_what_a_recurrent_state_cannot_do_is_refused_by_name(model, ids):
    cache = cache_of(model(ids, use_cache=True))
    with pytest.raises(CacheError, match="a recurrent state is not invertible"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="cannot|quantized"):
        model.generate(ids, max_new_tokens=2, cache_implementation="quantized")
    with pytest.raises(CacheError, match="no place for a recurrent state"):
        model.init_continuous_batching()
    with pytest.raises(ConfigError, match=r"expected \[batch, tokens\]"):
        model(ids, attention_mask=torch.ones(2, 1, 23, 23))
    with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
        model()
    other = cache_of(teacher("llama")(token_ids(1, 4, vocab=90), use_cache=True))
    with pytest.raises(CacheError, match="a filled DynamicLayer in layer 0"):
        model(ids[:1], cache=other)


@torch.no_grad()
def test_hidden_states_and_kept_logits_are_those_of_the_whole(model, ids, logits):
    out = model(ids, output_hidden_states=True, logits_to_keep=3)
    assert len(out.hidden_states) == 5
    torch.testing.assert_close(out.logits, logits[:, -3:], **TIGHT)


# --- from a teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_every_family_has_its_embeddings_frozen_and_half_its_layers(family):
    mentor = teacher(family)
    student = DistilXLSTMForCausalLM.from_teacher(mentor)
    tied = mentor.config.tie_word_embeddings
    assert torch.equal(student.model.embed_tokens.weight, mentor.get_input_embeddings().weight)
    assert torch.equal(student.lm_head.weight, mentor.get_output_embeddings().weight)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert student.config.block_types == ["slstm", "mlstm"] and student.config.hidden_size == mentor.config.hidden_size
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == (
        {EMBEDDING} if tied else {EMBEDDING, "lm_head.weight"}
    )
    places = {p.data_ptr() for p in mentor.parameters()}
    assert not places & {p.data_ptr() for p in student.parameters()}
    report = student.transfer_report
    assert report.parameters == parameters_of(student) and report.student_tensors[EMBEDDING] == "copied, frozen"
    assert set(report.teacher_tensors) == set(
        mentor.state_dict()
    ) and f"trainable {report.parameters['trainable']:,}" in str(report)


@pytest.mark.parametrize("family", ["granite", "gemma3_text"])
def test_a_teacher_that_scales_its_embeddings_is_refused(family):
    with pytest.raises(UnsupportedTeacherError, match=rf"\({family}\): embedding_multiplier is .*, expected 1.0"):
        DistilXLSTMForCausalLM.from_teacher(teacher(family))


def test_new_parameters_follow_the_seed_and_leave_the_global_generator_alone():
    mentor = teacher("llama")  # made once: that draws numbers
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (
        DistilXLSTMForCausalLM.from_teacher(mentor, seed=seed).model.layers[0].mixer.input_weight for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.rand(3), want)


def test_a_fresh_student_is_of_the_scale_that_the_head_expects_and_trains():
    student = DistilXLSTMForCausalLM.from_teacher(teacher("qwen3")).train()
    hidden = student.model(token_ids(2, 30, vocab=97)).last_hidden_state
    assert 0.8 < hidden.square().mean().sqrt() < 1.2
    ids = token_ids(2, 30, vocab=97)
    student(ids, labels=ids).loss.backward()
    # reached by what the first step writes, but zero at the start itself: not their gradient
    still = {"recurrent_weight"}
    assert all(
        p.grad is not None and (p.grad.abs().max() > 0)
        for n, p in student.named_parameters()
        if p.requires_grad and n not in still
    )


def test_the_published_student_of_qwen_has_the_published_parameters():
    """84M of 551M, 15.24 % trainable; counted on the meta device."""
    counts = parameters_of(empty_student(distil_config(qwen(), **PUBLISHED), DistilXLSTMForCausalLM))
    assert (round(counts["trainable"] / 1e6), round(counts["student"] / 1e6)) == (84, 551)
    assert round(100 * counts["trainable"] / counts["student"], 2) == 15.24
    assert counts["frozen"] == 2 * 151936 * 1536
    assert distil_config(qwen()).block_types == ["slstm", "mlstm"] * 7  # half of 28 layers


def qwen():
    return transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def test_heads_are_the_next_multiple_of_four_that_divides_the_width():
    assert [heads_for(*x) for x in ((1536, 12), (896, 14), (960, 15), (576, 9), (50, 6), (42, 6))] == [
        12,
        16,
        16,
        12,
        10,
        6,
    ]


def test_conversion_writes_a_directory_that_loads_with_its_record(tmp_path, ids):
    teacher("qwen2").save_pretrained(tmp_path / "teacher")
    report = convert(tmp_path / "teacher", tmp_path / "student", num_hidden_layers=3)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert parameters_of(student) == report.parameters and student.config.block_types == ["slstm", "mlstm", "slstm"]
    assert_same_model(student, DistilXLSTMForCausalLM.from_teacher(tmp_path / "teacher", num_hidden_layers=3), ids)
    stage = json.loads((tmp_path / "student/provenance.json").read_text())["stages"][-1]
    assert stage["stage"] == "distil-convert" and stage["figures"]["parameters"] == report.parameters
    with pytest.raises(CheckpointError):
        convert(tmp_path / "teacher", tmp_path / "student")


def test_a_teacher_that_cannot_give_its_embeddings_is_refused_by_name(tmp_path):
    from tiny_teachers import rewrite

    teacher("mistral").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: {k: x for k, x in w.items() if "embed" not in k})
    with pytest.raises(CheckpointError, match="has no model.embed_tokens.weight"):
        DistilXLSTMForCausalLM.from_teacher(tmp_path)
    rewrite(tmp_path, lambda w: w | {EMBEDDING: torch.zeros(7, 50)})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[7, 50\].*expected floating \[101, 50\]"):
        DistilXLSTMForCausalLM.from_teacher(tmp_path)
    rewrite(tmp_path, lambda w: w | {EMBEDDING: torch.full((101, 50), float("nan"))})
    with pytest.raises(CheckpointError, match="not finite"):
        DistilXLSTMForCausalLM.from_teacher(tmp_path)


@pytest.mark.parametrize(
    "family, options, error, message",
    [
        ("llama", {"vocab_size": 50}, ConfigError, r"cannot set \['vocab_size'\]"),
        ("mistral", {"tie_word_embeddings": True}, ConfigError, "embeddings and LM head of this mistral differ"),
        ("llama", {"block_pattern": ["mlstm"] * 4}, ConfigError, "4 blocks for num_hidden_layers=2"),
        ("llama", {"dtype": "int8"}, ConfigError, "dtype='int8'"),
        ("llama", {"num_attention_heads": "four"}, ConfigError, "num_attention_heads"),
    ],
)
def test_students_that_a_teacher_cannot_have_are_refused_by_name(family, options, error, message):
    with pytest.raises(error, match=message):
        DistilXLSTMForCausalLM.from_teacher(teacher(family), **options)


def test_a_teacher_of_no_known_family_is_refused_by_name():
    with pytest.raises(UnsupportedTeacherError, match="model_type 'gpt2'"):
        distil_config(transformers.GPT2Config())


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    """Function of a student and a teacher: a `DeltaKDTrainer` on four documents, in float32, one batch of all of them
    per step.
    """
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer

    rows = [token_ids(1, n, vocab=97, seed=n)[0].tolist() for n in (5, 17, 12, 9)]
    rows = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in rows]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 101)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")

    def build(student, mentor, **arguments):
        shared = {
            "output_dir": str(tmp_path / "run"),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        }
        args = DeltaKDConfig(**shared | arguments)
        return DeltaKDTrainer(
            student, mentor, args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
        ), rows

    return build


def test_the_loss_of_a_step_is_that_of_the_method(trainer):
    """Written out per document from logits and hidden states; the batch of the trainer is padded, so that the mask
    matters.
    """
    mentor = copy.deepcopy(teacher("mistral"))
    student = enlarge(DistilXLSTMForCausalLM.from_teacher(mentor), gain=1.0)
    run, rows = trainer(student, mentor, max_steps=1, learning_rate=0.0)
    run.train()
    ce = kl = square = count = 0
    for row in rows:
        ids, scored = torch.tensor([row["input_ids"]]), slice(1, len(row["input_ids"]) - 1)
        with torch.no_grad():
            s, t = (m(ids, output_hidden_states=True) for m in (student, mentor))
        logq, logp = (x.logits[0, scored].double() for x in (s, t))
        ce += F.cross_entropy(logq, ids[0, 2:], reduction="sum")
        soft_q, soft_p = (x.div(2.0).log_softmax(-1) for x in (logq, logp))
        kl += (soft_p.exp() * (soft_p - soft_q)).sum()
        square += (torch.stack(t.hidden_states[1:]).mean(0) - s.hidden_states[-1])[0, scored].double().square().sum()
        count += len(row["input_ids"]) - 2
    want = (0.1 * ce + 0.8 * 2.0**2 * kl) / count + 0.1 * (square / (count * 50)).sqrt()
    entry = next(e for e in run.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert {"ce", "kl", "frobenius", "alpha", "temperature", "top1_agreement"} <= set(entry)


@pytest.mark.parametrize("shared", [False, True])
def test_training_moves_the_blocks_and_nothing_of_the_teacher(trainer, shared):
    mentor = copy.deepcopy(teacher("qwen2"))
    student = DistilXLSTMForCausalLM.from_teacher(mentor)
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (student, mentor)]
    run, _ = trainer(student, mentor, max_steps=12, learning_rate=1e-2)
    if shared:
        share_frozen(student, run.teacher)
        assert student.lm_head.weight is mentor.get_input_embeddings().weight
    run.train()
    assert all(torch.equal(p, before[1][n]) for n, p in mentor.named_parameters())
    still = {n for n, p in student.named_parameters() if torch.equal(p, before[0][n])}
    assert still == {EMBEDDING}
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@torch.no_grad()
def test_a_student_that_shares_embeddings_is_saved_whole(family, tmp_path, ids):
    """Also one whose LM head is a copy of its own although the teacher's is tied."""
    mentor = copy.deepcopy(teacher(family))
    student = DistilXLSTMForCausalLM.from_teacher(mentor, tie_word_embeddings=False)
    share_frozen(student, mentor).save_pretrained(tmp_path)
    assert student.get_input_embeddings().weight is mentor.get_input_embeddings().weight
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), student, ids)


def test_sharing_is_refused_where_the_teacher_would_change_or_is_another():
    mentor = teacher("mistral")
    with pytest.raises(ConfigError, match="embedding is trainable"):
        share_frozen(DistilXLSTMForCausalLM.from_teacher(mentor, freeze_embeddings=False), mentor)
    with pytest.raises(ConfigError, match="is not the teacher's"):
        share_frozen(DistilXLSTMForCausalLM.from_teacher(teacher("olmo2")), mentor)
    with pytest.raises(ConfigError, match="is not the teacher's"):
        share_frozen(DistilXLSTMForCausalLM.from_teacher(mentor, dtype="bfloat16"), mentor)


def test_vocabularies_that_differ_are_refused_by_name(trainer):
    mentor = copy.deepcopy(teacher("mistral"))
    student = DistilXLSTMForCausalLM(
        DistilXLSTMConfig(vocab_size=90, hidden_size=50, num_attention_heads=5, num_hidden_layers=2)
    )
    with pytest.raises(ConfigError, match="vocabulary has 90 tokens, the teacher's 101"):
        trainer(student, mentor, max_steps=1)


# --- recipes -----------------------------------------------------------------------------------------------------


def test_the_published_recipe_is_planned_from_the_config_alone(tmp_path):
    from xlstm_hybrid.distil_xlstm.run import planned, read_delta_recipe

    qwen().save_pretrained(tmp_path)
    recipe, rows = read_delta_recipe(ROOT / "recipes/distil_qwen2.5-1.5b.yaml")
    found = planned(recipe, tmp_path, rows)
    assert (found["sequences_per_step"], found["steps"], found["tokens_per_epoch"]) == (32, 312_500, 512_000_000)
    assert round(100 * found["trainable_share"], 2) == 15.24 and found["blocks"] == ["slstm", "mlstm"] * 3


def test_the_settings_of_the_recipes_are_ones_that_the_trainer_has(tmp_path):
    pytest.importorskip("trl")
    from xlstm_hybrid.distil_xlstm.run import read_delta_recipe
    from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig
    from xlstm_hybrid.pipeline.settings import trainer_config

    for name in ("distil_tiny", "distil_qwen2.5-1.5b"):
        recipe, _ = read_delta_recipe(ROOT / f"recipes/{name}.yaml")
        config = trainer_config(DeltaKDConfig, recipe.distill, "delta", tmp_path, 0)
        assert (config.alpha_start, config.delta, config.frobenius_weight) == (0.8, 0.05, 0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": {"learning_rate": 1e-3}}, "delta: expected rows"),
        ({"delta": {"rows": 0}}, "delta.rows=0"),
        ({"align": {"max_steps": 3}}, "expected the sections"),
        ({"data": {"sequence_length": 1, "mixture": {"text": 1.0}}}, "data.sequence_length=1"),
    ],
)
def test_a_recipe_that_describes_no_run_is_refused_by_name(tmp_path, change, message):
    import yaml

    from xlstm_hybrid.distil_xlstm.run import read_delta_recipe

    content = yaml.safe_load((ROOT / "recipes/distil_tiny.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        read_delta_recipe(tmp_path / "bad.yaml")


@pytest.mark.slow
def test_the_tiny_recipe_goes_from_the_teacher_to_scores_and_curves(tmp_path):
    """Two steps per epoch, two epochs: the directories, the table beside another student, and the schedule that starts
    anew.
    """
    import yaml
    from typer.testing import CliRunner

    from xlstm_hybrid.cli import app

    content = yaml.safe_load((ROOT / "recipes/distil_tiny.yaml").read_text())
    content["delta"] |= {"rows": 4, "per_device_train_batch_size": 2, "bf16": False, "logging_steps": 1}
    content |= {
        "teacher": str(ROOT / "recipes/tiny_teacher/tiny-llama"),
        "evaluate": {"examples": 2, "text_chunks": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "hybrid.json").write_text(
        json.dumps({"students": {"student": {"exact_match": {"code": 0.5}, "perplexity": {"text": 9.0}}}})
    )
    arguments = [
        "distil-xlstm",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--beside",
        str(tmp_path / "hybrid.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code != 0 and "exists already" in f"{again.output}{again.exception}"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["scores"]) == {"teacher", "converted", "student", "hybrid"}
    alphas = [e["alpha"] for e in results["log"] if "loss" in e]
    assert alphas[0] == 0.8 and alphas[2] == pytest.approx(0.75) and alphas[1] < alphas[0] and alphas[3] < alphas[2]
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000 and "50.0%" in (tmp_path / "run/report.md").read_text()
    stages = [s["stage"] for s in json.loads((tmp_path / "run/student/provenance.json").read_text())["stages"]]
    assert stages == ["distil-convert", "delta-distil"]
