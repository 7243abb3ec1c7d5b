"""Layers that keep the teacher's sliding attention see the last W tokens of their row, wherever padding stands: on either
side, between tokens, in one row of a batch, before and after what the cache holds.

Every expectation is the row alone, without padding, without a cache, in float64.
"""

import itertools

import pytest
import torch
from tiny_students import CLOSE, ids_of, student
from tiny_teachers import teacher
from transformers import DynamicCache, StaticCache

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import PlacedLayer, SlidingLayer
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.state import fork, load_state, prefill, recorded, remember, rollback, save_state, snapshot

FAMILIES = ("mistral", "qwen2", "olmo3")
FIRST = (13, 6, 9)  # tokens of each row before the padding
LENGTH = 24
SIZES = {"at once": [8], "one by one": [1] * 8, "in pieces": [3, 1, 4]}


def kept(family, window=5, implementation="sdpa"):
    """A student all of whose layers keep the teacher's attention."""
    model = XLSTMHybridForCausalLM.from_teacher(teacher(family, window=window), layer_types="teacher")
    model.set_attn_implementation(implementation)
    return model.double().eval()


@pytest.fixture(params=[f"{family}, {stack}" for family, stack in itertools.product(FAMILIES, ("mixed", "kept"))])
def model(request):
    family, stack = request.param.split(", ")
    found = kept(family) if stack == "kept" else student(family, "mixed")
    assert "sliding_attention" in found.config.layer_types and found.dtype == torch.float64
    return found


def padded_rows(lengths=FIRST, side="right", seed=0):
    """`(rows [B, LENGTH], first ids [B, longest], mask)`: each row's first tokens, padded."""
    rows, longest = ids_of(LENGTH, rows=len(lengths), seed=seed), max(lengths)
    ids, mask = torch.full((len(lengths), longest), 5), torch.zeros(len(lengths), longest, dtype=torch.long)
    for j, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(longest - n, longest)
        ids[j, at], mask[j, at] = rows[j, :n], 1
    return rows, ids, mask


def following(rows, lengths, count):
    return torch.cat([row[n : n + count][None] for row, n in zip(rows, lengths, strict=True)])


def alone(model, rows, lengths, count=0):
    """Logits of each row's tokens from its n-th on, `count` of them, without padding and cache."""
    return [model(row[None, : n + count], use_cache=False).logits[0, n:] for row, n in zip(rows, lengths, strict=True)]


def read(model, ids, mask, cache, sizes):
    """Logits of `ids`, which come in calls of these sizes after what `mask` has more columns for."""
    parts, done, before = [], 0, mask.shape[1] - ids.shape[1]
    for n in sizes:
        part = ids[:, done : done + n]
        out = model(part, attention_mask=mask[:, : before + done + n], use_cache=True, **named(cache))
        parts.append(out.logits)
        done += n
    return torch.cat(parts, 1)


def longer(mask, count):
    return torch.nn.functional.pad(mask, (0, count), value=1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_a_padded_batch_goes_on_as_each_row_alone(model, side, sizes):
    rows, ids, mask = padded_rows(side=side)
    cache, more = DynamicCache(config=model.config), following(rows, FIRST, 8)
    first = model(ids, attention_mask=mask, use_cache=True, **named(cache)).logits
    for got, m, want in zip(first, mask, alone(model, rows, [0] * 3, LENGTH), strict=True):
        torch.testing.assert_close(got[m.bool()], want[: m.sum()], **CLOSE)
    got = read(model, more, longer(mask, 8), cache, SIZES[sizes])
    torch.testing.assert_close(got, torch.stack(alone(model, rows, FIRST, 8)), **CLOSE)
    kinds = {type(x) for x, kind in zip(cache.layers, model.config.layer_types, strict=True) if kind[:7] == "sliding"}
    assert kinds == {PlacedLayer if side == "right" else SlidingLayer}  # the usual side costs nothing


@pytest.mark.parametrize("piece", [None, 4, 1])
@torch.no_grad()
def test_a_padded_prefill_goes_on_as_each_row_alone(model, piece):
    rows, ids, mask = padded_rows()
    cache = prefill(model, ids, mask, piece=piece)
    got = read(model, following(rows, FIRST, 8), longer(mask, 8), cache, [2, 1, 5])
    torch.testing.assert_close(got, torch.stack(alone(model, rows, FIRST, 8)), **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_padding_between_the_tokens_of_one_call_is_no_distance(use_cache, implementation):
    model, row = kept("mistral", implementation=implementation), ids_of(18, rows=1)
    ids, mask = torch.full((2, 24), 5), torch.ones(2, 24, dtype=torch.long)
    ids[0, :7], ids[0, 13:], mask[0, 7:13] = row[0, :7], row[0, 7:], 0
    ids[1] = ids_of(24, rows=1, seed=3)
    got = model(ids, attention_mask=mask, use_cache=use_cache).logits
    torch.testing.assert_close(got[0, mask[0].bool()], model(row, use_cache=False).logits[0], **CLOSE)
    torch.testing.assert_close(got[1:], model(ids[1:], use_cache=False).logits, **CLOSE)


@torch.no_grad()
def test_rows_that_go_on_with_padding_of_their_own_are_each_alone(model):
    """Every call is as ragged as a batch of conversations: padding left, right and for a whole row, one token at a time."""
    rows = ids_of(LENGTH)
    masks = [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [[0, 1, 1, 1], [1, 1, 0, 0]], [[1], [0]], [[0], [1]]]
    masks += [[[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 1], [1, 1]]]
    cache, done, whole = DynamicCache(config=model.config), [0, 0], torch.zeros(2, 0, dtype=torch.long)
    want = alone(model, rows, [0, 0], LENGTH)
    for mask in map(torch.tensor, masks):
        ids, whole = torch.full(mask.shape, 5), torch.cat([whole, mask], 1)
        for j, m in enumerate(mask.bool()):
            ids[j, m] = rows[j, done[j] : done[j] + int(m.sum())]
        got = model(ids, attention_mask=whole, use_cache=True, **named(cache)).logits
        for j, m in enumerate(mask.bool()):
            expected = want[j][done[j] : done[j] + int(m.sum())]
            torch.testing.assert_close(got[j, m], expected, **CLOSE)
            done[j] += int(m.sum())
    assert done[0] > 5 + 7 and done[1] > 5 + 5  # past the window of 5 after each kind of padding


@torch.no_grad()
def test_what_is_done_with_a_cache_keeps_the_places(model, tmp_path):
    rows, ids, mask = padded_rows()
    cache, more, mask = prefill(model, ids, mask), following(rows, FIRST, 8), longer(mask, 8)
    want = torch.stack(alone(model, rows, FIRST, 8))
    save_state(cache, tmp_path / "state.safetensors", model)
    loaded = load_state(tmp_path / "state.safetensors", model)
    torch.testing.assert_close(read(model, more, mask, loaded, [1, 7]), want, **CLOSE)
    torch.testing.assert_close(read(model, more, mask, snapshot(cache), [8]), want, **CLOSE)
    twice = torch.arange(3).repeat_interleave(2)
    torch.testing.assert_close(read(model, more[twice], mask[twice], fork(cache, 2), [3, 5]), want[twice], **CLOSE)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    torch.testing.assert_close(read(model, more[order], mask[order], cache, [8]), want[order], **CLOSE)


@torch.no_grad()
def test_a_cache_that_was_emptied_reads_another_batch():
    model, (rows, ids, mask) = kept("mistral"), padded_rows(seed=1)
    cache = prefill(model, *padded_rows()[1:])
    cache.reset()
    assert cache.get_seq_length() == 0
    read(model, ids, mask, cache, [13])
    got = read(model, following(rows, FIRST, 8), longer(mask, 8), cache, [8])
    torch.testing.assert_close(got, torch.stack(alone(model, rows, FIRST, 8)), **CLOSE)


@pytest.mark.parametrize("taken", [1, 4, 7])
@torch.no_grad()
def test_tokens_after_the_padding_and_the_padding_itself_can_be_taken_back(model, taken):
    """Drafts of four tokens after right padding of up to seven columns; 7 tokens back reach into the padding."""
    rows, ids, mask = padded_rows()
    cache = prefill(model, ids, mask, rollback=8)
    read(model, ids_of(4, rows=3, seed=9), longer(mask, 4), cache, [1, 3])
    assert recorded(cache) >= 8
    rollback(cache, taken)
    columns = ids.shape[1] + 4 - taken
    seen = longer(mask, 4)[:, :columns]
    expected = prefill(model, torch.cat([ids, ids_of(4, rows=3, seed=9)], 1)[:, :columns], seen)
    more = ids_of(6, rows=3, seed=4)
    got, want = (read(model, more, longer(seen, 6), x, [2, 4]) for x in (cache, expected))
    torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(CacheError, match="cannot take 99 tokens back"):
        rollback(cache, 99)


@torch.no_grad()
def test_generation_goes_on_from_a_batch_padded_on_the_right(model):
    rows, ids, mask = padded_rows()
    cache, more, mask = prefill(model, ids, mask), following(rows, FIRST, 3), longer(mask, 3)
    out = model.generate(
        torch.cat([ids, more], 1), attention_mask=mask, max_new_tokens=6, do_sample=False, **named(cache)
    )[:, ids.shape[1] + 3 :]
    for row, n, new in zip(rows, FIRST, out, strict=True):
        text = torch.cat([row[: n + 3], new])[None]
        logits = model(text, use_cache=False).logits[0, n + 2 : -1]
        assert torch.equal(logits.argmax(-1), new)


@torch.no_grad()
def test_the_window_keeps_no_more_columns_than_its_rows_need(model):
    rows, ids, mask = padded_rows()
    cache = prefill(model, ids, mask)
    read(model, following(rows, FIRST, 8), longer(mask, 8), cache, [8])
    layers = [layer for layer in cache.layers if isinstance(layer, PlacedLayer)]
    assert layers and all(layer.kept.keys.shape[2] == 4 and layer.get_seq_length() == 21 for layer in layers)


@torch.no_grad()
def test_a_static_cache_refuses_what_its_windows_would_count(model):
    rows, ids, mask = padded_rows()
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(
        CacheError, match=r"StaticSlidingWindowLayer, whose window counts the padding .* pad on the left"
    ):
        model(ids, attention_mask=mask, use_cache=True, **named(cache))
    rows, ids, mask = padded_rows(side="left")
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids, attention_mask=mask, use_cache=True, **named(cache))


@torch.no_grad()
def test_a_record_can_be_switched_on_after_the_padding(model):
    rows, ids, mask = padded_rows()
    cache = remember(prefill(model, ids, mask), 3)
    read(model, following(rows, FIRST, 2), longer(mask, 2), cache, [2])
    more, want = following(rows, FIRST, 8), torch.stack(alone(model, rows, FIRST, 8))
    got = read(model, more, longer(mask, 8), rollback(cache, 2), [1, 7])
    torch.testing.assert_close(got, want, **CLOSE)
