"""A hybrid layer's cache has the slots of its tokens and no more, up to S + W; what is done to it on the way changes no
token that follows. Truth is the model without a cache.
"""

import json
import struct

import pytest
import torch
from conftest import tiny_student, token_ids
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.planning.cache_size import allocated_bytes, filled_bytes
from xlstm_hybrid.state import fork, load_state, prefill, remember, rollback, save_state

S, W = 3, 8
FULL, LAYERS, HEADS, GROUPS, K = S + W, 2, 4, 2, 16
PAIR, STATE = 2 * K * 8, HEADS * (K * K + K + 1) * 8  # bytes in float64
COUNT = 8
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
KINDS = {
    "hybrid": {},
    "kept group": {"kept_groups": [[1], []]},
    "joint": {"memory_cell": "linear", "mixer_combine": "joint"},
    "sparse": {"sparse_memory": 4},
    "window": {"mixer_branches": "window"},
}


def made(**changes):
    return tiny_student(num_hidden_layers=LAYERS, sliding_window=W, num_sink_tokens=S, **changes)


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module", params=KINDS)
def any_model(request):
    return made(**KINDS[request.param])


@torch.no_grad()
def read(model, ids, sizes, cache, mask=None, position=None):
    """Logits of all tokens of `ids`, in calls of these sizes; `mask` and `position` cover what was read before, too."""
    before, done, logits = cache.get_seq_length(), 0, []
    for n in sizes:
        end = before + done + n
        inputs = {} if mask is None else {"attention_mask": mask[:, :end]}
        inputs |= {} if position is None else {"position_ids": position[:, end - n : end]}
        logits.append(model(ids[:, done : done + n], cache=cache, use_cache=True, **inputs).logits)
        done += n
    assert done == ids.shape[1]
    return torch.cat(logits, 1)


@torch.no_grad()
def truth(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def slots(cache):
    found = {layer.keys.shape[2] for layer in cache.layers} | {layer.values.shape[2] for layer in cache.layers}
    assert len(found) == 1
    return found.pop()


# --- bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, S, FULL - 1, FULL, FULL + 1, 40])
def test_a_cache_has_the_slots_of_its_tokens_and_never_more_bytes_than_the_teachers_and_the_state(model, length):
    ids, teacher = token_ids(1, length), DynamicCache()
    for layer in range(LAYERS):
        teacher.update(*torch.zeros(2, 1, GROUPS, length, K, dtype=torch.float64), layer)
    for sizes in ([length], [1] * length, [length - length // 2, length // 2]):
        cache = DynamicCache(config=model.config)
        read(model, ids, [n for n in sizes if n], cache)
        assert slots(cache) == min(length, FULL)
        held = LAYERS * (min(length, FULL) * GROUPS * PAIR + STATE + COUNT)
        assert allocated_bytes(cache) == filled_bytes(cache) == held
        assert held - LAYERS * (STATE + COUNT) <= allocated_bytes(teacher) == LAYERS * length * GROUPS * PAIR


def test_a_row_of_a_batch_has_the_slots_of_the_longest(model):
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    cache = prefill(model, ids, mask)
    assert slots(cache) == 9 and cache.layers[0].slot_index[1].tolist() == [0, 1, 2] + [-1] * 6
    assert cache.layers[1].keys[1, :, 3:].abs().max() == 0  # empty slots are 0


@torch.no_grad()
def test_a_static_cache_has_all_slots_at_once_and_keeps_every_address(model):
    ids, cache, found = token_ids(1, 34), StaticCache(config=model.config, max_cache_len=48), []
    for start in range(2):
        if start:
            cache.reset()
        for sizes in ([5], [1] * 29):
            logits = read(model, ids[:, :5] if sizes == [5] else ids[:, 5:], sizes, cache)
            assert slots(cache) == FULL and all(layer.is_compileable for layer in cache.layers)
            tensors = [x for layer in cache.layers for x in (*layer.state, layer.keys, layer.values, layer.count)]
            found.append([x.data_ptr() for x in tensors])
        torch.testing.assert_close(logits, truth(model, ids)[:, 5:], **TOLERANCE)
    assert found[0] == found[1] == found[2] == found[3]
    # bytes of states and slots from the first token on, and that they are not those of a growing cache
    assert sum(x.numel() * 8 for x in tensors) == LAYERS * (FULL * GROUPS * PAIR + STATE + COUNT)


# --- what is done to it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "back", "crop"),
    [
        ([4, 14], 10, True),  # from beyond the ring to before it is full, within a call
        ([4, 1, 1, 12], 12, False),  # as a whole call
        ([4] + [1] * 10, 4, False),  # to one token before it is full
        ([4] + [1] * 5, 4, True),  # both before it is full
        ([4, 16], 20, False),  # everything
    ],
)
def test_tokens_taken_back_over_the_filling_of_the_ring_never_came(any_model, sizes, back, crop):
    """A row that is padded on the left stands beside one that is not: their rings fill at different tokens."""
    length = sum(sizes)
    ids, more, end = token_ids(2, length), token_ids(2, 14, seed=5), length - back
    mask = torch.ones(2, end + 14, dtype=torch.long)
    mask[1, : min(3, end)] = 0
    before = torch.nn.functional.pad(mask[:, :end], (0, back), value=1)
    cache = remember(DynamicCache(config=any_model.config), 40)
    read(any_model, ids, sizes, cache, before)
    cache.crop(-back) if crop else rollback(cache, back)
    if end:
        assert slots(cache) == min(end, FULL)
    whole = torch.cat([ids[:, :end], more], 1)
    found = read(any_model, more, [2] + [1] * 9 + [3], cache, mask)
    torch.testing.assert_close(found, truth(any_model, whole, attention_mask=mask)[:, end:], **TOLERANCE)
    assert slots(cache) == min(end + 14, FULL)


def test_rows_that_are_chosen_repeated_and_put_in_another_order_go_on_growing(any_model):
    ids, mask = token_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, :4] = 0
    cache = remember(DynamicCache(config=any_model.config), 12)
    read(any_model, ids, [4, 1, 3], cache, mask)
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache = rollback(fork(cache, 2), 2)  # the record has followed
    rows, more = torch.tensor([2, 2, 1, 1]), token_ids(4, 14, seed=2)
    ids, mask = ids[rows, :6], torch.nn.functional.pad(mask[rows, :6], (0, 14), value=1)
    whole = truth(any_model, torch.cat([ids, more], 1), attention_mask=mask)[:, 6:]
    torch.testing.assert_close(read(any_model, more, [1] * 10 + [4], cache, mask), whole, **TOLERANCE)


@pytest.mark.parametrize("kind", ["hybrid", "kept group", "joint"])
def test_documents_that_begin_inside_before_the_ring_is_full_and_after_it(kind):
    model, ids = made(**KINDS[kind]), token_ids(2, 36)
    lengths = [3, 2, 16, 15]  # the third and the fourth wrap around the ring
    position = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    want = truth(model, ids, position_ids=position)
    for sizes in ([4, 4] + [1] * 18 + [10], [1] * 36):
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(read(model, ids, sizes, cache, position=position), want, **TOLERANCE)
        assert slots(cache) == FULL and cache.layers[0].count.tolist() == [15, 15]
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :8], [4, 4], cache, position=position)
    assert slots(cache) == 8 and cache.layers[0].slot_index[0].tolist() == [0, 1, 2] + [-1] * 5


# --- files -----------------------------------------------------------------------------------------------------


def version_1(path, taken, real):
    """Rewrite a state as version 1 had it: S + W slots at any length, token t in slot S + t mod W, and the first S of
    them in slots of their own as well.

    Args:
        taken: for each layer the lists of keys, values and perhaps scores [B, G, T, ...] of the calls that filled it.
        real: [B, T] which of the tokens are no padding.
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    tensors = load_file(path)
    for j, named in enumerate(taken):
        for name, calls in named.items():
            x = torch.cat(calls, 2)
            old = x.new_zeros(*x.shape[:2], FULL, *x.shape[3:])
            for row, columns in enumerate(real):
                for t, column in enumerate(columns.nonzero()[:, 0].tolist()):
                    old[row, :, S + t % W] = x[row, :, column]
                    if t < S:
                        old[row, :, t] = x[row, :, column]
            tensors[f"layers.{j}.{name}"] = old
    save_file(tensors, path, header | {"format_version": "1"})


@pytest.mark.parametrize("length", [2, 9, FULL, 29])
def test_a_state_of_version_1_goes_on_as_if_it_had_never_been_in_a_file(any_model, length, tmp_path, monkeypatch):
    taken, update = [{"keys": [], "values": []} for _ in range(LAYERS)], HybridCacheLayer.update
    cache = DynamicCache(config=any_model.config)

    def watched(layer, key_states, value_states, *args, **kwargs):
        j = [id(x) for x in cache.layers].index(id(layer))
        taken[j]["keys"].append(key_states)
        taken[j]["values"].append(value_states)
        return update(layer, key_states, value_states, *args, **kwargs)

    ids, mask = token_ids(2, length), torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    with monkeypatch.context() as patched:
        patched.setattr(HybridCacheLayer, "update", watched)
        prefill(any_model, ids, mask, cache=cache)
    path = tmp_path / "old.safetensors"
    save_state(cache, path, any_model)
    held = load_file(path)
    if "layers.0.scores" in held:  # they go where the keys go: each token's is read from its slot
        for j, layer in enumerate(cache.layers):
            scores = torch.zeros(2, GROUPS, length, dtype=torch.float64)
            for row, columns in enumerate(mask.bool()):
                for slot, t in enumerate(layer.slot_index[row].tolist()):
                    if t >= 0:
                        scores[row, :, columns.nonzero()[t, 0]] = layer.scores[row, :, slot]
            taken[j]["scores"] = [scores]
    version_1(path, taken, mask.bool())
    old = load_file(path)
    assert old["layers.0.keys"].shape[2] == FULL and (length == 2) == (old["layers.0.keys"][0, :, 2].abs().max() == 0)
    loaded = load_state(path, any_model)
    for mine, theirs in zip(loaded.layers, cache.layers, strict=True):
        there = theirs.slot_index >= 0
        assert mine.slot_index.tolist() == theirs.slot_index.tolist()
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(a.transpose(1, 2)[there], b.transpose(1, 2)[there])
    more, longer = token_ids(2, 14, seed=3), torch.nn.functional.pad(mask, (0, 14), value=1)
    sizes = [1] * 3 + [5] + [1] * 6
    found, want = (read(any_model, more, sizes, c, longer) for c in (loaded, cache))
    assert torch.equal(found, want)
    whole = truth(any_model, torch.cat([ids, more], 1), attention_mask=longer)[:, length:]
    torch.testing.assert_close(found, whole, **TOLERANCE)


def test_a_state_of_version_1_in_other_slots_and_one_of_version_3_are_refused_by_name(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_state(prefill(model, token_ids(1, 9)), path, model)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]
    assert header["format_version"] == "2" and load_file(path)["layers.0.keys"].shape[2] == 9
    for version, message in (
        ("3", "expected xlstm-hybrid-state version 1 or 2, found xlstm-hybrid-state version 3"),
        ("1", r"layer 0 holds .*\(1, 2, 9, 16\).*expected .*\(1, 2, 11, 16\)"),  # it never had fewer slots than S + W
    ):
        save_file(load_file(path), path, header | {"format_version": version})
        with pytest.raises(CacheError, match=f"a.safetensors: {message}"):
            load_state(path, model)


def test_layers_that_are_alike_find_the_slots_of_a_call_once(monkeypatch):
    calls, placing = [], HybridCacheLayer.placing
    monkeypatch.setattr(HybridCacheLayer, "placing", lambda self, tokens: calls.append(self) or placing(self, tokens))
    model, ids = tiny_student(num_hidden_layers=4, layer_windows=[5, 7, 5, 7]), token_ids(2, 13)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :9], use_cache=True))
        assert calls == cache.layers[:2]
        logits = model(ids[:, 9:], use_cache=True, cache=cache).logits
        assert calls == [*cache.layers[:2], *cache.layers[:2]]
        torch.testing.assert_close(logits, model(ids).logits[:, 9:], atol=1e-9, rtol=1e-9)
