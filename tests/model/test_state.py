"""A state is a value: it can be copied, forked, taken back, written to a file, and refused where it does not belong."""

import copy
import json
import struct

import pytest
import torch
from conftest import enlarge, tiny_student, token_ids
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import cache_of, named
from xlstm_hybrid.state import fork, load_state, prefill, recorded, remember, restore, rollback, save_state, snapshot

W = 7
MIXED = {
    "layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"],
    "teacher_sliding_window": 5,
    "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
}
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def mixed():
    return tiny_student(**MIXED)


@pytest.fixture(params=["hybrid", "mixed"])
def any_student(request, student, mixed):
    return {"hybrid": student, "mixed": mixed}[request.param]


@torch.no_grad()
def calls(model, ids, sizes, cache, mask=None, **inputs):
    """Logits of the last call, after feeding `ids` in pieces."""
    done, logits = 0, None
    for n in sizes:
        part = {name: x[:, done : done + n] for name, x in inputs.items()}
        whole = None if mask is None else mask[:, : mask.shape[1] - ids.shape[1] + done + n]
        logits = model(ids[:, done : done + n], attention_mask=whole, cache=cache, use_cache=True, **part).logits
        done += n
    return logits


def content(cache):
    """Everything that later tokens can see."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, HybridCacheLayer):
            found += [*layer.state, layer.keys, layer.values, layer.count, torch.tensor(layer.seen_tokens)]
        else:
            kept = min(getattr(layer, "sliding_window", 10**6) - 1, layer.keys.shape[2])
            found += [x[:, :, x.shape[2] - kept :] for x in (layer.keys, layer.values)] + [
                torch.tensor(layer.get_seq_length())
            ]
    return found


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(content(a), content(b), strict=True))


# --- copies ----------------------------------------------------------------------------------------------------


def test_one_reading_answers_many_questions(any_student):
    document, questions = token_ids(1, 23), [token_ids(1, n, seed=n) for n in (1, 4, 9)]
    cache = prefill(any_student, document)
    for question in questions:
        ids = torch.cat([document, question], 1)
        answer = any_student.generate(ids, cache=snapshot(cache), max_new_tokens=12, do_sample=False)
        assert torch.equal(answer, any_student.generate(ids, max_new_tokens=12, do_sample=False))
    assert cache.get_seq_length() == 23


def test_a_fork_answers_a_batch_of_questions_of_several_lengths(student):
    document, questions = token_ids(1, 23), [token_ids(1, n, seed=n) for n in (1, 4, 9)]
    ids = torch.cat([torch.cat([document, torch.zeros(1, 9 - q.shape[1], dtype=torch.long), q], 1) for q in questions])
    mask = torch.ones_like(ids)
    for row, question in enumerate(questions):
        mask[row, 23 : 32 - question.shape[1]] = 0
    cache = fork(prefill(student, document), 3)
    answers = student.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
    for row, question in zip(answers, questions, strict=True):
        alone = student.generate(torch.cat([document, question], 1), **GREEDY)
        assert torch.equal(row[32:], alone[0, 23 + question.shape[1] :])


def test_a_fork_repeats_each_row_in_order_and_leaves_the_cache_alone(any_student):
    ids = token_ids(2, 11)
    cache = prefill(any_student, ids)
    before, forked = snapshot(cache), fork(cache, 3)
    for x, row in zip(content(forked), content(cache), strict=True):
        assert torch.equal(x, row.repeat_interleave(3, 0) if row.ndim else row)
    read = prefill(any_student, ids.repeat_interleave(3, 0))  # another batch shape: other last bits
    torch.testing.assert_close(content(forked), content(read), **TOLERANCE)
    assert identical(cache, before)
    with pytest.raises(CacheError, match="rows=0"):
        fork(cache, 0)


@torch.no_grad()
def test_a_cache_of_another_number_of_rows_is_refused_with_the_fork_that_fits(any_student):
    ids = token_ids(2, 11)
    cache = prefill(any_student, ids[:, :10])
    several = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 2}
    message = (
        r"the cache holds 2 rows, the batch has 6 \(num_return_sequences repeats each\); pass .*state.fork\(cache, 3\)"
    )
    with pytest.raises(CacheError, match=message):
        any_student.generate(ids, **named(cache), **several)
    assert any_student.generate(ids, **named(fork(prefill(any_student, ids[:, :10]), 3)), **several).shape == (6, 13)
    with pytest.raises(CacheError, match="holds 2 rows, the batch has 3.*pass a cache of as many rows"):
        any_student(token_ids(3, 4), **named(cache))
    static = StaticCache(config=any_student.config, max_cache_len=32)
    any_student(ids[:, :10], **named(static))
    with pytest.raises(CacheError, match="holds 2 rows, the batch has 4"):
        any_student(token_ids(4, 1), **named(static))


def test_a_snapshot_is_untouched_by_decoding_and_restores_it(any_student):
    ids = token_ids(2, 20)
    cache = prefill(any_student, ids[:, :11])
    saved = snapshot(cache)
    first = calls(any_student, ids[:, 11:], [1] * 9, cache)
    assert not identical(cache, saved)
    again = calls(any_student, ids[:, 11:], [1] * 9, restore(cache, saved))
    assert torch.equal(first, again) and saved.get_seq_length() == 11


def test_a_cache_with_gradients_is_not_copied(student):
    with pytest.raises(CacheError, match="no_grad"):
        snapshot(cache_of(student(token_ids(1, 5), use_cache=True)))


@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(any_student):
    ids, mask = token_ids(2, 25), torch.ones(2, 25, dtype=torch.long)
    mask[1, :6] = 0
    whole, pieces = prefill(any_student, ids, mask), prefill(any_student, ids, mask, piece=4)
    more, longer = token_ids(2, 5, seed=9), torch.nn.functional.pad(mask, (0, 5), value=1)
    torch.testing.assert_close(
        calls(any_student, more, [5], whole, longer), calls(any_student, more, [5], pieces, longer), **TOLERANCE
    )
    continued = prefill(any_student, ids[:, 9:], mask, cache=prefill(any_student, ids[:, :9], mask[:, :9]), piece=7)
    assert continued.get_seq_length() == 25


# --- taking back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[9], [9, 1, 1], [9, 4, 1, 6], [3, 1, 16, 1, 3]])
@pytest.mark.parametrize("gone", [[1], [1, 1, 1], [5], [2, 1, 9, 1]])
def test_whole_calls_taken_back_leave_bitwise_what_was_there(any_student, kept, gone):
    n, total = sum(gone), sum(kept) + sum(gone)
    ids = token_ids(2, total)
    expected, cache = DynamicCache(config=any_student.config), remember(DynamicCache(config=any_student.config), 16)
    calls(any_student, ids[:, :-n], kept, expected)
    calls(any_student, ids, kept + gone, cache)
    assert not identical(rollback(cache, 0), expected)
    assert identical(rollback(cache, n), expected)
    following = token_ids(2, 8, seed=4)
    assert torch.equal(calls(any_student, following, [1] * 8, cache), calls(any_student, following, [1] * 8, expected))


@pytest.mark.parametrize("taken", [1, 4, 9, 13])
@torch.no_grad()
def test_a_call_that_is_cut_gives_the_shorter_call(any_student, taken):
    ids, mask = token_ids(2, 41), torch.ones(2, 41, dtype=torch.long)
    mask[0, :5] = mask[1, 20:23] = mask[0, 36:] = 0  # padding left, inside and right
    cache = prefill(any_student, ids[:, :12], mask[:, :12], rollback=13)
    calls(any_student, ids[:, 12:], [14, 15], cache, mask)
    rollback(cache, taken)
    end = 41 - taken
    more, longer = token_ids(2, 6, seed=7), torch.nn.functional.pad(mask[:, :end], (0, 6), value=1)
    expected = prefill(any_student, ids[:, :end], mask[:, :end])
    torch.testing.assert_close(
        calls(any_student, more, [6], cache, longer), calls(any_student, more, [6], expected, longer), **TOLERANCE
    )


def test_documents_that_began_in_the_removed_tokens_never_began(student):
    ids, position = token_ids(1, 30), torch.cat([torch.arange(8), torch.arange(13), torch.arange(9)])[None]
    cache, expected = remember(DynamicCache(config=student.config), 24), DynamicCache(config=student.config)
    calls(student, ids, [5, 19, 6], cache, position_ids=position)
    more = token_ids(1, 9, seed=8)
    for taken, end in ((4, 26), (6, 20), (10, 10)):  # inside the last document, before it, inside the second
        rollback(cache, taken)
        expected = DynamicCache(config=student.config)
        calls(student, ids[:, :end], [end], expected, position_ids=position[:, :end])
        for a, b in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close((*a.state, a.slot_index), (*b.state, b.slot_index), **TOLERANCE)
        torch.testing.assert_close(
            calls(student, more, [9], snapshot(cache)), calls(student, more, [9], expected), **TOLERANCE
        )


def test_everything_can_be_taken_back_and_read_again(any_student):
    ids = token_ids(1, 9)
    cache = prefill(any_student, ids, rollback=9)
    rollback(cache, 9)
    assert cache.get_seq_length() == 0 and recorded(cache) == 0
    calls(any_student, ids, [9], cache)
    assert identical(cache, prefill(any_student, ids))


def test_the_record_is_bounded_and_says_how_far_it_reaches(any_student):
    cache = prefill(any_student, token_ids(1, 100), rollback=10)
    calls(any_student, token_ids(1, 30), [1] * 30, cache)
    assert recorded(cache) == 10
    before = snapshot(cache)
    with pytest.raises(CacheError, match=r"cannot take 11 tokens back: 10 are recorded"):
        rollback(cache, 11)
    assert identical(cache, before)
    for _ in range(5):
        rollback(cache, 2)
    assert cache.get_seq_length() == 120


def test_a_long_prompt_leaves_only_the_end_of_itself_in_the_record(student):
    (call,) = prefill(student, token_ids(1, 300), rollback=10).layers[0].calls
    held = [call.key, call.value, *call.written, call.tokens.index]
    # tokens x heads x dim x bytes
    assert len(call) == 10 and all(x.untyped_storage().nbytes() <= 10 * 4 * 16 * 8 for x in held)


def test_the_record_follows_beams_and_forks(student):
    ids, order = token_ids(3, 20), torch.tensor([2, 0, 0])
    cache = prefill(student, ids[:, :12], rollback=16)
    calls(student, ids[:, 12:], [1, 4, 3], cache)
    cache.reorder_cache(order)
    rollback(cache, 7)
    expected = prefill(student, ids[order][:, :12])
    calls(student, ids[order][:, 12:], [1], expected)
    torch.testing.assert_close(content(cache), content(expected), **TOLERANCE)
    cache = prefill(student, ids[:1], rollback=8)
    forked = fork(cache, 2)
    for c in (cache, forked):
        rollback(c, 5)
    assert identical(fork(cache, 2), forked)


@torch.no_grad()
def test_a_cache_without_a_record_refuses(mixed, student):
    cache = prefill(student, token_ids(1, 9))
    for take in (lambda: cache.crop(-2), lambda: rollback(cache, 2)):
        with pytest.raises(CacheError, match=r"remember\(cache"):
            take()
    cache.crop(0)
    with pytest.raises(CacheError, match=r"crop\(3\): expected minus"):
        cache.crop(3)
    cache = remember(prefill(mixed, token_ids(1, 9), rollback=4), 0)
    assert recorded(cache) == 0
    calls(mixed, token_ids(1, 1), [1], cache)
    with pytest.raises(CacheError, match="window has kept 0 more"):
        cache.layers[2].crop(-1)
    static = StaticCache(config=mixed.config, max_cache_len=20)
    calls(mixed, token_ids(1, 9), [9], static)
    with pytest.raises(CacheError, match="StaticLayer, which cannot"):
        rollback(static, 1)


# --- assisted decoding -----------------------------------------------------------------------------------------


def near(model):
    """A draft that is often right."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.002 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return draft


def llama():
    shape = {
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return enlarge(
        LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)).double()
    ).eval()


@pytest.mark.parametrize("candidates", [3, 10])
def test_prompt_lookup_is_greedy_decoding(any_student, candidates):
    ids = token_ids(1, 8).repeat(1, 4)  # a prompt with something to look up
    assert torch.equal(
        any_student.generate(ids, prompt_lookup_num_tokens=candidates, **GREEDY), any_student.generate(ids, **GREEDY)
    )


@pytest.mark.parametrize("name", ["another", "near", "itself", "llama"])
def test_decoding_with_a_draft_model_is_greedy_decoding(any_student, name):
    drafts = {
        "another": lambda: tiny_student(num_hidden_layers=1),
        "near": lambda: near(any_student),
        "itself": lambda: any_student,
        "llama": llama,
    }
    draft, ids, rounds = drafts[name](), token_ids(1, 12), []
    greedy = any_student.generate(ids, **GREEDY)
    hook = any_student.register_forward_pre_hook(lambda *_: rounds.append(1))
    assisted = any_student.generate(ids, assistant_model=draft, **GREEDY)
    hook.remove()
    assert torch.equal(assisted, greedy)
    assert name != "near" or len(rounds) < 18  # drafts are accepted at all


@pytest.mark.parametrize("length", [2, W, W + 1, 40])  # of the prompt: inside the window, as long, beyond it
def test_drafts_are_greedy_decoding_whatever_the_prompt_is_long(any_student, length):
    ids, draft = token_ids(1, length), near(any_student)
    want = any_student.generate(ids, **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft}):
        assert torch.equal(any_student.generate(ids, **options, **GREEDY), want), options


@pytest.mark.parametrize("drafts", ["prompt", "model"])
@torch.no_grad()
def test_sampling_with_drafts_chooses_by_the_probabilities_of_a_model_without_a_cache(any_student, drafts):
    # which drafted tokens are then accepted is transformers' rejection sampling
    ids, sampling = token_ids(1, 6).repeat(1, 3), {"do_sample": True, "temperature": 0.5, "top_k": 0}
    options = {"prompt": {"prompt_lookup_num_tokens": 4}, "model": {"assistant_model": near(any_student)}}[drafts]
    torch.manual_seed(3)
    out = any_student.generate(ids, **(GREEDY | sampling), **options, output_logits=True, return_dict_in_generate=True)
    want = any_student(out.sequences, use_cache=False).logits[:, 17:-1]
    assert not torch.equal(want.argmax(-1), out.sequences[:, 18:])  # it was sampled
    torch.testing.assert_close(torch.stack(out.logits, 1), want.float(), atol=1e-5, rtol=1e-5)


def test_a_student_drafts_for_a_transformer(any_student):
    main, ids = llama(), token_ids(1, 12)
    assert torch.equal(main.generate(ids, assistant_model=any_student, **GREEDY), main.generate(ids, **GREEDY))


def test_assisted_decoding_goes_on_from_a_state_and_hands_back_one(any_student):
    ids, more = token_ids(1, 23), token_ids(1, 6, seed=5)
    options = {"return_dict_in_generate": True, **GREEDY}
    first = any_student.generate(ids, cache=prefill(any_student, ids[:, :15]), prompt_lookup_num_tokens=4, **options)
    plain = any_student.generate(ids, **options)
    assert torch.equal(first.sequences, plain.sequences)
    assert cache_of(first).get_seq_length() == cache_of(plain).get_seq_length() == 46
    # more new tokens than old ones
    new_only = {"attention_mask": torch.ones_like(ids), **named(prefill(any_student, ids[:, :9]))}
    assert torch.equal(
        any_student.generate(ids[:, 9:], prompt_lookup_num_tokens=4, **new_only, **GREEDY)[:, 14:],
        plain.sequences[:, 23:],
    )
    whole = torch.cat([first.sequences, more], 1)
    second = any_student.generate(whole, cache=cache_of(first), **GREEDY)
    assert torch.equal(second, any_student.generate(whole, **GREEDY))


# --- files -----------------------------------------------------------------------------------------------------


def test_a_state_survives_a_file_bit_for_bit(any_student, tmp_path):
    ids = token_ids(2, 19)
    for length in (3, 19):
        cache = prefill(any_student, ids[:, :length], rollback=2)
        save_state(cache, tmp_path / "a.safetensors", any_student)
        loaded = load_state(tmp_path / "a.safetensors", any_student)
        assert identical(cache, loaded)
        # not in the mapped file, on whose layout bits would depend
        assert not any(x.data_ptr() % 64 for x in content(loaded))
        more = token_ids(2, 9, seed=3)
        assert torch.equal(
            calls(any_student, more, [4] + [1] * 5, loaded), calls(any_student, more, [4] + [1] * 5, cache)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_dtypes_of_a_bfloat16_model_survive(tmp_path):
    model = tiny_student(torch.bfloat16)
    save_state(prefill(model, token_ids(1, 9)), tmp_path / "a.safetensors", model)
    layer = load_state(tmp_path / "a.safetensors", model).layers[0]
    assert layer.keys.dtype == torch.bfloat16 and layer.state.C.dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sliding_window": 8}, "its sliding_window is 7, this model's 8"),
        ({"layer_types": MIXED["layer_types"], "teacher_sliding_window": 5}, "its layer_types is"),
        ({"gain": 2.4}, "with other weights"),
        ({"dtype": torch.float32}, "with other weights"),
    ],
)
def test_the_state_of_another_model_is_refused_by_name(student, tmp_path, other, message):
    save_state(prefill(student, token_ids(1, 9)), tmp_path / "a.safetensors", student)
    with pytest.raises(CacheError, match=f"a.safetensors: .*{message}"):
        load_state(tmp_path / "a.safetensors", tiny_student(**other))


def rewritten(path, change_tensors=lambda t: None, change_header=lambda h: None):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    tensors = load_file(path)
    change_tensors(tensors)
    change_header(header)
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        (lambda t: t.pop("layers.1.m"), lambda h: None, "layer 1 holds"),
        (lambda t: t.update({"layers.7.C": torch.zeros(1)}), lambda h: None, "layers.7.C that no layer has"),
        (lambda t: t.update({"layers.0.C": t["layers.0.C"][:, :, :3].clone()}), lambda h: None, "layer 0 holds"),
        (lambda t: t.update({"layers.0.count": t["layers.0.count"] - 99}), lambda h: None, "count that is not in 0..9"),
        (lambda t: t.update({"layers.0.C": t["layers.0.C"].bfloat16()}), lambda h: None, "below float32"),
        (
            lambda t: None,
            lambda h: h.update(format_version="3"),
            "expected xlstm-hybrid-state version 1 or 2, found xlstm-hybrid-state version 3",
        ),
        (lambda t: None, lambda h: h.pop("seen_tokens"), "no number of tokens"),
        (lambda t: None, lambda h: h.update(config="[]"), "another model wrote|no config"),
        (lambda t: None, lambda h: h.update(config="{"), "no config"),
    ],
)
def test_a_damaged_file_is_refused_by_name(student, tmp_path, tensors, header, message):
    path = tmp_path / "a.safetensors"
    save_state(prefill(student, token_ids(1, 9)), path, student)
    rewritten(path, tensors, header)
    with pytest.raises(CacheError, match=f"a.safetensors: .*({message})"):
        load_state(path, student)


def test_what_is_no_state_is_neither_written_nor_read(student, tmp_path):
    for bad in (DynamicCache(), DynamicCache(config=student.config)):
        with pytest.raises(CacheError, match="a LinearAttention|nothing to save"):
            save_state(bad, tmp_path / "a.safetensors", student)
    (tmp_path / "b.safetensors").write_bytes(b"not a state")
    for name in ("b.safetensors", "missing.safetensors"):
        with pytest.raises(CacheError, match=f"{name}: cannot be read as a state"):
            load_state(tmp_path / name, student)
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CacheError, match="found None version None"):
        load_state(tmp_path / "c.safetensors", student)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_cache_that_takes_nothing_back_says_so_when_it_is_asked_to_remember():
    from xlstm_hybrid import DistilXLSTMConfig, DistilXLSTMForCausalLM

    config = DistilXLSTMConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    cache = prefill(DistilXLSTMForCausalLM(config).eval(), token_ids(1, 9))
    with pytest.raises(CacheError, match="remember: layer 0 is a RecurrentLayer, which takes nothing back"):
        remember(cache, 3)
