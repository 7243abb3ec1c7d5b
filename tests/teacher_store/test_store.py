"""The teacher store: what is written is what is read, damage is found and named, and any number of writers make the
same bytes.
"""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from xlstm_hybrid.errors import CheckpointWriteError, ConfigError, DataError, StoreError
from xlstm_hybrid.teacher_store import (
    StoreCollator,
    TeacherStore,
    build_store,
    number_rows,
    plan_store,
    planned_bytes,
    row_input,
    store_bytes,
)
from xlstm_hybrid.teacher_store.layout import round_down_mass
from xlstm_hybrid.teacher_store.writer import entry_of, refresh_index, shard_name, write_shard

V, K, ROWS, T = 97, 12, 10, 24
SPEC = {"teacher": "waves", "weights": "0", "tokenizer": "words", "template": None}


def data(count=ROWS):
    """Packed rows of three documents each; the first tokens of a document are a prompt that is not scored."""
    rows = []
    for n in range(count):
        ids = [(7 * n + 5 * t + t * t) % V for t in range(T)]
        positions = [t % (5 + n % 4) for t in range(T)]
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100 if p < 2 else i for i, p in zip(ids, positions, strict=True)],
                "position_ids": positions,
            }
        )
    return rows


def logits_of(row):
    """[T, V] that depend on the row, the token and the position."""
    t, v = np.arange(len(row.input_ids))[:, None], np.arange(V)[None]
    return 4 * np.sin(0.37 * (t + 1) * (v + 1) + row.input_ids[:, None] + row.number) + 3 * np.cos(
        0.11 * v * row.input_ids[:, None]
    )


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def targets(rows, k=K):
    """The definition of top-k targets, in float64 and without torch."""
    found = []
    for row in rows:
        logp = log_softmax(logits_of(row))[row.stored]
        ids = np.argsort(-logp, -1)[:, :k]
        outside = np.ones_like(logp, dtype=bool)
        np.put_along_axis(outside, ids, False, -1)
        with np.errstate(divide="ignore"):
            rest = np.log(np.where(outside, np.exp(logp), 0.0).sum(-1))
        found.append((ids, np.take_along_axis(logp, ids, -1), rest))
    return found


def draws(rows, k=K):
    """k draws as counts / k, most frequent first, from a generator of the row's own."""
    found = []
    for row in rows:
        p = np.exp(log_softmax(logits_of(row))[row.stored])
        counts = np.stack([np.random.default_rng([row.number, j]).multinomial(k, q / q.sum()) for j, q in enumerate(p)])
        ids = np.argsort(-counts, -1, kind="stable")[:, :k]
        counts = np.take_along_axis(counts, ids, -1)
        with np.errstate(divide="ignore"):
            found.append((np.where(counts > 0, ids, 0), np.log(counts / k), np.full(len(p), -np.inf)))
    return found


def build(out, rows=None, targets=targets, **changes):
    settings = {"k": K, "vocab_size": V, "spec": SPEC, "shard_tokens": 3 * T, "batch_size": 2}
    return build_store(out, rows or data(), targets, **settings | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store"
    build(path)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(made, tmp_path / "store")


def inputs(rows=None):
    return [row_input(row, n, V) for n, row in enumerate(rows or data())]


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def place_in(path, part, index):
    """Offset in a shard's file of entry `index` of one of its arrays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])[part]
    size = {"U32": 4, "F32": 4, "F16": 2, "U16": 2, "I64": 8}[described["dtype"]]
    return 8 + length + described["data_offsets"][0] + index * size


def bytes_of(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


# --- what is written is what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, K, V, 200])
def test_rows_come_back_with_the_teachers_values_within_the_bound_of_float16(tmp_path, k):
    build(tmp_path / "store", targets=lambda rows: targets(rows, min(k, V)), k=k)
    store = TeacherStore(tmp_path / "store", k=k, tokenizer="words")
    assert len(store) == ROWS
    for row, (ids, logp, rest) in zip(inputs(), targets(inputs(), k), strict=True):
        found = store.row(row.number)
        assert (
            (found.input_ids == row.input_ids).all()
            and (found.starts == row.starts).all()
            and (found.stored == row.stored).all()
        )
        assert (found.ids == ids).all()
        np.testing.assert_allclose(found.rest, rest, rtol=1e-6)
        error = np.abs(found.logp - logp)
        # of the common scale
        weighted = (np.exp(logp) * np.abs(logp)).sum(-1, keepdims=True) / np.exp(logp).sum(-1, keepdims=True)
        assert (error <= 2**-10 * (np.abs(logp) + weighted) + 1e-6).all() and (k == 1 or error.max() > 1e-5)
        np.testing.assert_allclose(np.exp(found.logp, dtype=np.float64).sum(-1) + np.exp(rest), 1, rtol=0, atol=2e-6)


def test_draws_come_back_as_they_were(tmp_path):
    build(tmp_path / "store", targets=draws, kind="sampled")
    store = TeacherStore(tmp_path / "store")
    for row, (ids, logp, _) in zip(inputs(), draws(inputs()), strict=True):
        found = store.row(row.number)
        np.testing.assert_allclose(found.logp, logp, rtol=1e-6)
        assert (found.ids == ids).all() and (found.rest == -np.inf).all()
        assert (found.logp == -np.inf).any()  # a short support


def test_rounding_never_lifts_the_mass_over_one_and_keeps_to_its_bound():
    """A uniform teacher rounds every entry to the same side: 61 entries of log 1/61 would sum to 1.0015 in float16."""
    for logp in (
        np.full((1, 61), -np.log(61)),
        np.log(np.random.default_rng(1).dirichlet(np.full(300, 0.05), 50) + 1e-30),
        np.array([[0.0, -1e9]]),
    ):
        rounded = round_down_mass(logp).astype(np.float64)
        assert (np.exp(rounded).sum(-1) <= 1).all()
        small = logp > -65504
        assert (np.abs(rounded - logp)[small] <= 2**-10 * np.abs(logp[small]) + 2**-24).all() and (
            rounded[~small] == -np.inf
        ).all()
    assert np.exp(np.float64(np.float16(-np.log(61)))) * 61 > 1.001  # what the nearest float16 would have made


def test_size_is_six_bytes_per_entry_and_eight_per_token(tmp_path):
    assert store_bytes(5_000_000_000, 256) == 5_000_000_000 * 1544
    rows = [{"input_ids": [(3 * t + n) % V for t in range(500)]} for n in range(8)]
    build(tmp_path / "store", rows, shard_tokens=2000)
    sizes = sum(entry["size"] for entry in TeacherStore(tmp_path / "store").shards.values())
    tokens, beside = 8 * 500, 2 * (1000 + 3 * 8 * 5)  # a header, and three offsets per row and one
    assert store_bytes(tokens, K) * 0.98 < sizes < store_bytes(tokens, K) + beside
    fields, first = plan_store(rows, V, 2000)
    assert first == [0, 4, 8] and abs(sizes - planned_bytes(fields, K)) < beside and fields["documents"] == 8


def test_tokens_that_are_not_scored_cost_four_bytes():
    scored, whole = data(), [{key: row[key] for key in ("input_ids", "position_ids")} for row in data()]
    (few, _), (all_, _) = plan_store(scored, V, 10**6), plan_store(whole, V, 10**6)
    assert (
        few["places"]
        == sum(i != -100 for row in scored for i in row["labels"][1:])
        < all_["places"]
        == ROWS * T - few["documents"]
    )
    assert planned_bytes(few, K) == few["places"] * (6 * K + 8) + 4 * (ROWS * T - few["places"])


def test_padding_free_rows_say_their_documents_by_lengths():
    row = row_input({"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}, 0, V)
    assert row.starts.tolist() == [True, False, True, False, False] and row.stored.tolist() == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert row.position_ids().tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": []}, "row 4: expected a list of token ids"),
        ({"input_ids": [1, V, 2]}, f"row 4, position 1: token {V}, expected 0..{V - 1}"),
        ({"labels": [1, 2]}, r"row 4: labels of shape \[2\], input_ids has 3 tokens"),
        ({"position_ids": [0]}, "row 4: position_ids of shape"),
        ({"seq_lengths": [1, 1]}, "row 4: seq_lengths .* do not add up to its 3 tokens"),
    ],
)
def test_rows_that_cannot_be_stored_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        row_input({"input_ids": [1, 2, 3]} | change, 4, V)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda ids, logp, rest: (ids, logits_of(inputs()[0])[inputs()[0].stored][:, :K], rest), "log-probability"),
        (lambda ids, logp, rest: (ids, logp + 1, rest), "(probabilities sum to|log-probability)"),
        (lambda ids, logp, rest: (ids, logp, rest - 3), "probabilities and the rest sum to"),
        (lambda ids, logp, rest: (ids + V, logp, rest), "id .* outside of the vocabulary"),
        (
            lambda ids, logp, rest: (ids, np.where(logp == logp[2, 3], np.nan, logp), rest),
            r"row 0, position 3 \(document 0 .*, its token 3\): .*nan",
        ),
        (lambda ids, logp, rest: (ids[:, :3], logp[:, :3], rest), r"targets of shapes .* expected \[\d+, 12\]"),
    ],
    ids=["logits", "no log-probabilities", "another rest", "ids", "nan", "shape"],
)
def test_targets_that_are_no_log_probabilities_are_refused(tmp_path, spoil, message):
    with pytest.raises(DataError, match=message):
        build(
            tmp_path / "store",
            targets=lambda rows: [spoil(*t) for t in targets(rows)] if rows[0].number == 0 else targets(rows),
        )


@pytest.mark.parametrize(
    "bad", [{"kind": "logits"}, {"k": 0}, {"k": 2**16}, {"vocab_size": 2**22 + 1}, {"temperature": 0.0}], ids=str
)
def test_settings_that_cannot_be_stored_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError, match=list(bad)[0]):
        build(tmp_path / "store", **bad)


def test_shards_so_small_that_their_index_could_not_be_read_are_refused(monkeypatch):
    monkeypatch.setattr("xlstm_hybrid.teacher_store.writer.MOST_SHARDS", 4)
    assert len(plan_store(data(), V, 3 * T)[1]) == 5
    with pytest.raises(ConfigError, match="shard_tokens=24: 10 shards, 4 at most; take 120 or more"):
        plan_store(data(), V, T)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["ids", "logp", "rest", "tokens"])
def test_any_changed_bit_is_found_with_its_document_and_position(store, part):
    """Position 9 of row 4 (the second of its shard): its documents are of 5 tokens, so it is token 4 of document 1. And
    bits that say where it is.
    """
    row, shard = inputs()[4], store / shard_name(1)
    positions = np.flatnonzero(row.stored)
    p = int(positions[3])
    first = sum(int(r.stored.sum()) for r in inputs()[3:4]) + 3
    index = {"ids": (first * K + 5), "logp": (first * K + 5), "rest": first, "tokens": T + p}[part]
    whole = shard.read_bytes()
    for bit in range({"logp": 16}.get(part, 32)):
        if part == "tokens" and bit >= 30:
            continue  # the flags, see below
        shard.write_bytes(whole)
        flip(shard, place_in(shard, part, index) + bit // 8, bit % 8)
        document = int(row.starts[: p + 1].sum()) - 1
        with pytest.raises(
            StoreError,
            match=rf"shard-00001.safetensors, row 4, position {p} \(document {document} of the row, its token \d+\)",
        ):
            TeacherStore(store).row(4)
    assert TeacherStore(store).row(3).ids.shape[1] == K  # its neighbours are untouched


@pytest.mark.parametrize("bit", [30, 31])
def test_a_changed_flag_is_found(store, bit):
    flip(store / shard_name(1), place_in(store / shard_name(1), "tokens", T + 3) + 3, bit - 24)
    with pytest.raises(StoreError, match="shard-00001.safetensors, row 4"):
        TeacherStore(store).row(4)


def test_every_byte_of_a_shard_matters(store):
    """Any byte, offsets and header included: reading all rows raises, or the hash does."""
    shard, wrong = store / shard_name(0), 0
    whole = shard.read_bytes()
    for offset in [*range(0, 8), *range(8, len(whole), 97)]:
        shard.write_bytes(whole)
        flip(shard, offset, offset % 8)
        with pytest.raises(StoreError, match="row 0|row 1|row 2|shard-00000"):
            TeacherStore(store).verify()
        try:
            for n in range(3):
                TeacherStore(store).row(n)
        except StoreError:
            wrong += 1
    assert wrong > 50  # reading finds nearly all of them without a hash


def test_a_full_check_names_where_the_damage_is(store):
    TeacherStore(store).verify()
    flip(store / shard_name(2), place_in(store / shard_name(2), "logp", 30))
    for read in (lambda: TeacherStore(store).verify(), lambda: TeacherStore(store, verify="full").row(7)):
        with pytest.raises(
            StoreError, match=r"shard-00002.safetensors has SHA-256 .* row 6, position \d+ \(document \d of the row"
        ):
            read()


def test_values_that_cannot_be_are_refused_though_hash_and_check_bytes_fit(tmp_path, monkeypatch):
    """A store by another hand, whose sums are all in order: ids outside of the vocabulary, then more mass than there
    is.
    """
    monkeypatch.setattr("xlstm_hybrid.teacher_store.layout.first_fault", lambda *args: None)
    build(tmp_path / "ids", targets=lambda rows: [(ids + 50, logp, rest) for ids, logp, rest in targets(rows)])
    build(
        tmp_path / "mass",
        targets=lambda rows: [(ids, np.minimum(logp + 0.3, 0), rest) for ids, logp, rest in targets(rows)],
    )
    monkeypatch.undo()
    for name, message in (
        ("ids", r"row 0, position 1 \(document 0 of the row, its token 1\): id \d+ outside"),
        ("mass", "sum to"),
    ):
        with pytest.raises(StoreError, match=message):
            TeacherStore(tmp_path / name).row(0)


def test_shards_that_were_swapped_cut_removed_or_linked_are_refused(store):
    one, two = store / shard_name(0), store / shard_name(1)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    shutil.copy(store / "index.json", store / "kept.json")
    index = json.loads((store / "index.json").read_text())
    index["shards"][one.name]["size"] = len(two.read_bytes())
    (store / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="shard-00000.safetensors was written as 'shard-00001.safetensors"):
        TeacherStore(store).row(0)
    os.replace(store / "kept.json", store / "index.json")
    one.write_bytes(content[:-1])
    with pytest.raises(
        StoreError, match=f"shard-00000.safetensors has {len(content) - 1} bytes .* expected {len(content)}"
    ):
        TeacherStore(store).row(0)
    one.unlink()
    with pytest.raises(StoreError, match="shard-00000.safetensors is missing"):
        TeacherStore(store).row(0)
    (store.parent / "elsewhere").write_bytes(content)
    one.symlink_to(store.parent / "elsewhere")
    with pytest.raises(StoreError, match="shard-00000.safetensors is missing or cannot be read"):
        TeacherStore(store).row(0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "format_version 2, expected 1"),
        ({"first_rows": [0]}, "is damaged"),
        ({"spec": {}}, "is damaged"),
        ({"shards": []}, "is damaged"),
    ],
)
def test_an_index_that_cannot_be_is_refused(store, change, message):
    index = json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(StoreError, match=message):
        TeacherStore(store)
    (store / "index.json").unlink()
    with pytest.raises(StoreError, match="index.json cannot be read"):
        TeacherStore(store)
    build(store)
    assert len(TeacherStore(store)) == ROWS  # made again from what is there


OTHER = [
    {"spec": SPEC | {"tokenizer": "other"}},
    {"spec": SPEC | {"template": "new"}},
    {"spec": SPEC | {"weights": "1"}},
    {"k": K + 1},
    {"temperature": 2.0},
    {"vocab_size": V + 1},
    {"kind": "sampled"},
    {"shard_tokens": T},
]


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_a_store_of_something_else_is_neither_used_nor_changed(store, change):
    before, name = bytes_of(store), list(change.get("spec", change))
    field = next(f for f in name if change.get(f) is not None or change["spec"].get(f) != SPEC.get(f))
    with pytest.raises(StoreError, match=f"the store store was made for something else: .*{field} is "):
        build(store, **change)
    assert bytes_of(store) == before
    with pytest.raises(StoreError, match="tokenizer is 'words', expected 'other'"):
        TeacherStore(store, tokenizer="other")


def test_other_data_is_named(store):
    rows = data()
    rows[3]["input_ids"][4] += 1
    with pytest.raises(StoreError, match="data is "):
        build(store, rows)
    with pytest.raises(StoreError, match="rows is 10, expected 9"):
        build(store, data()[:9])


# --- many writers, interrupted ones --------------------------------------------------------------------------------


def counting(calls):
    def counted(rows):
        calls.extend(row.number for row in rows)
        return targets(rows)

    return counted


def test_finished_shards_are_not_calculated_again(made, tmp_path):
    out, calls = tmp_path / "store", []

    def fails(rows):
        if rows[0].number >= 6:
            raise RuntimeError("power cut")
        return counting(calls)(rows)

    with pytest.raises(RuntimeError):
        build(out, targets=fails)
    with pytest.raises(StoreError, match="2 of 4 shards are finished|0 of 4 shards are finished"):
        TeacherStore(out)
    assert calls == list(range(6)) and not list(out.glob(".claim*"))
    calls.clear()
    build(out, targets=counting(calls))
    assert calls == [6, 7, 8, 9] and bytes_of(out) == bytes_of(made)
    calls.clear()
    build(out, targets=counting(calls))
    assert calls == []
    (out / shard_name(1)).write_bytes(b"short")
    build(out, targets=counting(calls))
    assert calls == [3, 4, 5] and bytes_of(out) == bytes_of(made)


def test_a_partial_store_reads_what_is_there(made, tmp_path):
    store = shutil.copytree(made, tmp_path / "store")
    (store / "shard-00001.json").unlink()
    spec = json.loads((store / "index.json").read_text())
    refresh_index(store, spec["spec"], spec["first_rows"])
    partial = TeacherStore(store, partial=True)
    assert (partial.row(0).ids == TeacherStore(made).row(0).ids).all()
    with pytest.raises(StoreError, match="rows 3..5 are not finished"):
        partial.row(4)


def slow(rows):
    time.sleep(0.05)
    return targets(rows)


def writer(out, rank, world):
    build(out, targets=slow, rank=rank, world=world)


@pytest.fixture
def spawn():
    context, started = multiprocessing.get_context("fork"), []

    def start(*args):
        process = context.Process(target=writer, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_a_killed_writer_leaves_a_store_that_goes_on(made, tmp_path, spawn):
    out = tmp_path / "store"
    process = spawn(out, 0, 1)
    while not (out / shard_name(0)).exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = [p.name for p in out.glob("shard-*.json")]
    assert len(finished) < 4
    calls = []
    build(out, targets=counting(calls))
    assert len(calls) == ROWS - sum(json.loads((made / name).read_text())["rows"] for name in finished)
    assert bytes_of(out) == bytes_of(made)  # no lock and no temporary file either


def test_writers_at_once_share_the_work_and_leave_the_same_bytes(made, tmp_path, spawn):
    out = tmp_path / "store"
    workers = [spawn(out, rank, 3) for rank in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert bytes_of(out) == bytes_of(made)


def test_two_writers_of_one_shard_are_harmless(made, tmp_path):
    """What locks prevent, and nothing depends on: the second writer replaces the shard by the same bytes."""
    out = shutil.copytree(made, tmp_path / "store")
    spec = TeacherStore(out).spec
    write_shard(out, 2, data(), range(6, 9), targets, spec, batch_size=3)
    assert bytes_of(out) == bytes_of(made)


def test_a_disk_without_room_is_refused_before_anything_is_calculated(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 9000})())
    with pytest.raises(CheckpointWriteError, match="needs 0.00 GB, 0.00 GB are free"):
        build(tmp_path / "store", targets=lambda rows: pytest.fail("calculated"))
    fields, _ = plan_store(data(), V)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("usage", (), {"free": 1.06 * planned_bytes(fields, K)})()
    )
    build(tmp_path / "store")


def test_a_disk_that_fills_up_leaves_what_was_finished(tmp_path, monkeypatch):
    from safetensors import numpy

    original, out = numpy.save_file, tmp_path / "store"

    def fills(arrays, path, metadata):
        if "shard-00002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(arrays, path, metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", fills)
    with pytest.raises(
        CheckpointWriteError, match=r"could not write shard-00002.safetensors \(No space left on device\)"
    ):
        build(out)
    assert not list(out.glob(".*")) and sorted(p.name for p in out.glob("*.safetensors")) == [
        shard_name(0),
        shard_name(1),
    ]
    assert entry_of(out, 1, json.loads((out / "index.json").read_text())["spec"]) is not None


# --- into a batch ----------------------------------------------------------------------------------------------------


def stack(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def padded(rows, left=3, right=2):
    """[B, left + T + right] with an attention mask; 9 is a token like any other."""
    fills = {"input_ids": 9, "labels": -100, "position_ids": 0}
    out = {
        key: torch.tensor([[fill] * left + list(row[key]) + [fill] * right for row in rows])
        for key, fill in fills.items()
    }
    return out | {"attention_mask": torch.tensor([[0] * left + [1] * T + [0] * right for _ in rows])}


def joined(rows):
    return {key: torch.tensor([[x for row in rows for x in row[key]]]) for key in rows[0]}


@pytest.mark.parametrize("collate", [stack, padded, joined])
def test_a_batch_gets_the_targets_of_its_rows_wherever_they_lie(made, collate):
    store = TeacherStore(made)
    rows = number_rows(data(), store)
    batch = StoreCollator(store, collate)([rows[5], rows[2]])
    assert "store_row" not in batch
    one = torch.stack([torch.from_numpy(store.example(n)["teacher_logp"]) for n in (5, 2)])
    wanted = {
        stack: one,
        padded: torch.nn.functional.pad(one, (0, 0, 3, 2), value=-torch.inf),
        joined: one.flatten(0, 1)[None],
    }[collate]
    torch.testing.assert_close(batch["teacher_logp"], wanted, rtol=0, atol=0)
    assert batch["teacher_ids"].shape == wanted.shape and batch["teacher_rest"].shape == wanted.shape[:2]
    stored = torch.from_numpy(store.row(5).stored)
    assert batch["teacher_rest"][0, padded.__defaults__[0] * (collate is padded) :][:T][stored].isfinite().all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda row: row["input_ids"].__setitem__(11, 3),
            r"row 2, position 11 \(document 1 .*, its token 4\): token 3 in the batch, \d+ in the store",
        ),
        (
            lambda row: row["position_ids"].__setitem__(9, 0),
            r"row 2, position 9 \(.*\): a document starts in the batch alone",
        ),
        (
            lambda row: row["position_ids"].__setitem__(7, 7),
            r"row 2, position 7 \(document 1 .*, its token 0\): a document starts in the store alone",
        ),
        (
            lambda row: row["labels"].__setitem__(1, 5),
            r"row 2, position 0 \(.*\): the next token is scored, the store has no targets",
        ),
        (
            lambda row: [row[key].pop() for key in ("input_ids", "labels", "position_ids")],
            "row 2, document 0: 23 tokens in the batch, 24 in the store",
        ),
        (lambda row: row.pop("store_row"), "a row has no column store_row"),
        (lambda row: row.__setitem__("store_row", 3), "row 3, position 0 .*: token 14 in the batch, 21 in the store"),
        (lambda row: row.__setitem__("store_row", 99), "row 99, the store has 10"),
    ],
    ids=["token", "start", "no start", "scored", "cut", "no number", "other number", "no such row"],
)
def test_a_batch_that_is_not_the_stores_is_refused(made, spoil, message):
    store = TeacherStore(made)
    rows = copy.deepcopy(number_rows(data(), store))
    spoil(rows[2])
    with pytest.raises(StoreError, match=message):
        StoreCollator(store, stack)([rows[2]])


def test_packed_rows_without_positions_are_refused_and_unpacked_ones_are_not(made, tmp_path):
    store = TeacherStore(made)
    bare = [{key: row[key] for key in ("input_ids", "labels", "store_row")} for row in number_rows(data(), store)]
    with pytest.raises(StoreError, match="position 5 .*: a document starts in the store alone"):
        StoreCollator(store, stack)(bare[:1])
    single = [{"input_ids": row["input_ids"]} for row in data()]
    build(tmp_path / "store", single)
    store = TeacherStore(tmp_path / "store")
    assert StoreCollator(store, stack)(number_rows(single, store)[:1])["teacher_ids"].shape == (1, T, K)


def test_rows_are_numbered_before_they_are_shuffled(made):
    from datasets import Dataset

    store = TeacherStore(made)
    numbered = number_rows(Dataset.from_list(data()), store)
    streamed = number_rows(Dataset.from_list(data()).to_iterable_dataset(), store)
    assert numbered["store_row"][:] == [row["store_row"] for row in streamed] == list(range(ROWS))
    assert StoreCollator(store, stack)(list(numbered.shuffle(seed=3)))["teacher_ids"].shape == (ROWS, T, K)
    with pytest.raises(StoreError, match="has 10 rows, the data 9"):
        number_rows(data()[:9], store)


def test_datasets_reads_the_store(made):
    store = TeacherStore(made)
    streamed, copied = store.to_dataset(), store.to_dataset(streaming=False)
    assert streamed.num_shards == 4 and len(copied) == ROWS
    for n, (a, b) in enumerate(zip(streamed, copied, strict=True)):
        wanted = store.example(n)
        assert a.keys() == b.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(np.asarray(a[key]), wanted[key])
            np.testing.assert_array_equal(
                np.asarray(b[key], dtype=np.float32), np.asarray(wanted[key], dtype=np.float32)
            )


def test_a_store_that_was_opened_can_be_sent_to_another_process(made):
    store = TeacherStore(made)
    rows = number_rows(data(), store)
    store.row(0)
    sent = pickle.loads(pickle.dumps(StoreCollator(store, stack)))
    torch.testing.assert_close(sent(rows[:4]), StoreCollator(store, stack)(rows[:4]), rtol=0, atol=0)
