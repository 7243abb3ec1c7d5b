"""Building a store with any number of processes, interrupted and resumed. Dims: R rows, N tokens.

Shards are cut by the data alone, so every process knows them. A shard is written under a name of its own and renamed:
it is there whole or not at all, and whoever writes it writes the same bytes. Locks only keep two processes from the
same work; nothing depends on them.
"""

import contextlib
import hashlib
import logging
from pathlib import Path

import numpy as np

from xlstm_hybrid.checkpoint.files import check_space, clean_abandoned, digest, read_json, staged_file, write_json
from xlstm_hybrid.checkpoint.locks import clean_locks, try_lock, who_holds
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError, StoreError
from xlstm_hybrid.teacher_store.layout import (
    FORMAT_VERSION,
    KINDS,
    LARGEST_K,
    LARGEST_VOCABULARY,
    pack,
    row_input,
    store_bytes,
)

INDEX = "index.json"
SHARD_TOKENS = 2**18  # 400 MB with 256 entries
MOST_SHARDS = 40_000  # whose entries an index of 16 MB holds
SPARE = 1.05  # of the estimated size that must be free
STEP = "use another directory, or delete this one to build it again"


def shard_name(j):
    return f"shard-{j:05}.safetensors"


# --- what the store is of -----------------------------------------------------------------------------------------


def plan_store(rows, vocab_size, shard_tokens=SHARD_TOKENS):
    """One pass over the data, which says what a store of it will be.

    Returns:
        `(fields, first)`: hash of the data, numbers of rows, documents, tokens and places (tokens with targets); the
        first row of each shard, and at last the number of rows.
    Raises:
        DataError: see `row_input`. StoreError: nothing is scored. ConfigError: shards so small that there are too many.
    """
    seen, first, tokens, documents, places, filled = hashlib.sha256(), [], 0, 0, 0, shard_tokens
    for number in range(len(rows)):
        row = row_input(rows[number], number, vocab_size)
        T = len(row.input_ids)
        if filled + T > shard_tokens:
            first.append(number)
            filled = 0
        filled, tokens = filled + T, tokens + T
        documents, places = documents + int(row.starts.sum()), places + int(row.stored.sum())
        for part in (np.int64([T]), row.input_ids, row.starts, row.stored):
            seen.update(np.ascontiguousarray(part).tobytes())
    if not tokens or not places:
        raise StoreError(
            f"{len(rows)} rows with {places} scored tokens: nothing to store; check the data and its labels"
        )
    if len(first) > MOST_SHARDS:
        raise ConfigError(
            f"shard_tokens={shard_tokens}: {len(first)} shards, {MOST_SHARDS} at most; take {2 * tokens // MOST_SHARDS} or more"
        )
    fields = {"data": seen.hexdigest(), "rows": len(rows), "documents": documents, "tokens": tokens, "places": places}
    return fields | {"shard_tokens": shard_tokens}, [*first, len(rows)]


def planned_bytes(fields, k):
    """Bytes of a store by the fields of its plan: targets of its places, and the ids of all other tokens."""
    return store_bytes(fields["places"], k) + 4 * (fields["tokens"] - fields["places"])


def spec_hash(spec):
    return hashlib.sha256(repr(sorted(spec.items())).encode()).hexdigest()


def require_same(found, wanted, name):
    """Raise StoreError that lists the fields in which a store's spec is not the wanted one."""
    wrong = [key for key, value in sorted(wanted.items()) if found.get(key) != value]
    if wrong:
        texts = (f"{key} is {found.get(key)!r}, expected {wanted[key]!r}" for key in wrong)
        raise StoreError(f"{name} was made for something else: {'; '.join(texts)}; {STEP}")


def read_index(directory):
    """The checked contents of index.json.

    Raises:
        StoreError: missing, damaged, or of another format.
    """
    directory = Path(directory)
    try:
        index = read_json(directory / INDEX, directory.name)
    except CheckpointError as error:
        raise StoreError(
            str(error).replace("restore it or make the checkpoint again", "delete it and run cache-teacher again")
        ) from error
    if index.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{directory.name}: {INDEX} has format_version {index.get('format_version')}, expected {FORMAT_VERSION}; upgrade "
            "xlstm-hybrid, or build the store again"
        )
    spec, first, shards = (index.get(key) for key in ("spec", "first_rows", "shards"))
    whole = isinstance(spec, dict) and isinstance(shards, dict) and index.get("spec_hash") == spec_hash(spec)
    numbers = isinstance(first, list) and len(first) > 1 and all(isinstance(n, int) for n in first)
    if not (whole and numbers and first == sorted(set(first))):
        raise StoreError(
            f"{directory.name}: {INDEX} is damaged (spec, spec_hash, first_rows or shards); delete it and run cache-teacher again, it "
            "keeps finished shards"
        )
    return index


# --- building -----------------------------------------------------------------------------------------------------


def build_store(
    out,
    rows,
    targets,
    *,
    kind="topk",
    k=256,
    temperature=1.0,
    vocab_size,
    spec=None,
    shard_tokens=SHARD_TOKENS,
    batch_size=8,
    rank=0,
    world=1,
    plan=None,
    report=None,
):
    """Write the shards of a store that are not there yet, and list them in its index. Any number of processes may do so
    at once.

    Args:
        out: directory of the store.
        rows: sequence of mappings, see `row_input`, in the order and packing that the student reads.
        targets: function of up to `batch_size` `RowInput` of one shard, which returns for each `(ids [P, M], logp [P,
            M], rest [P])` at its P stored positions; the same rows must give the same values.
        kind: "topk" stores log-probabilities and the rest, "sampled" counts of k draws.
        temperature: that the teacher's logits were divided by.
        vocab_size: V, ids are below it.
        spec: what else the targets depend on, such as hashes of teacher, tokenizer and template: a dict of numbers,
            strings and None.
        shard_tokens: tokens of a shard, unless one row has more.
        rank, world: of this process among those that build at once; they only say where it begins.
        plan: of `plan_store`, made here if None.
        report: function of (finished shards, all shards).
    Returns:
        The index; of a shard that another process has begun and not finished, the log says whose it is.
    Raises:
        ConfigError: a kind, k or V that cannot be stored. StoreError: the directory holds a store of something else.
        CheckpointWriteError: the disk has not 105 % of what is still to be written, or refused. DataError: rows or
            targets that are not valid.
    """
    sizes = 1 <= k <= LARGEST_K and 1 <= vocab_size <= LARGEST_VOCABULARY
    if kind not in KINDS or not sizes or not 0 < temperature < float("inf"):
        raise ConfigError(
            f"kind={kind!r}, k={k}, temperature={temperature}, vocab_size={vocab_size}: expected one of {list(KINDS)}, 1..{LARGEST_K}, "
            f"a positive number and 1..{LARGEST_VOCABULARY}"
        )
    out = Path(out)
    fields, first = plan or plan_store(rows, vocab_size, shard_tokens)
    spec = {**(spec or {}), **fields, "kind": kind, "k": k, "temperature": float(temperature), "vocab_size": vocab_size}
    with named(out):
        out.mkdir(parents=True, exist_ok=True)
        index = refresh_index(out, spec, first)
        count = len(first) - 1
        missing = [j for j in range(count) if shard_name(j) not in index["shards"]]
        share = sum(first[j + 1] - first[j] for j in missing) / len(rows)
        check_space(out / INDEX, SPARE * share * planned_bytes(spec, min(k, vocab_size)))
        clean_abandoned(out, own=True)
        clean_locks(out)
        order = [(j + rank * count // world) % count for j in range(count)]  # processes begin at different places
        for j in [*order, *order]:  # twice: what another process had locked may have been left behind
            if entry_of(out, j, spec) is None:
                with try_lock(out / f".claim-{shard_name(j)}") as (mine, alive):
                    if mine:
                        write_shard(out, j, rows, range(first[j], first[j + 1]), targets, spec, batch_size, alive)
            if report is not None:
                report(sum((out / shard_name(i)).exists() for i in range(count)), count)
        index = refresh_index(out, spec, first)
        for name in map(shard_name, range(count)):
            if name not in index["shards"] and (who := who_holds(out / f".claim-{name}")):
                logging.getLogger(__name__).warning("%s: made by another launch (%s), not waited for", name, who)
        return index


@contextlib.contextmanager
def named(out):
    """What the system refuses in the block, as an error that says where."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename).name if error.filename else out.name
        raise CheckpointWriteError(
            f"{out.name}: {where} cannot be written or read ({error.strerror or error}): mend that, make room or choose another "
            "directory, and run the same command again; finished shards are kept"
        ) from error


def write_shard(out, j, rows, numbers, targets, spec, batch_size, alive=lambda: None):
    """Calculate and write one shard, then its entry."""
    from safetensors.numpy import save_file

    inputs = [row_input(rows[n], n, spec["vocab_size"]) for n in numbers]
    answers = []
    for begin in range(0, len(inputs), batch_size):
        answers += targets(inputs[begin : begin + batch_size])
        alive()
    arrays = pack(inputs, answers, spec["kind"], spec["k"], spec["vocab_size"])
    name = shard_name(j)
    with staged_file(out / name, sum(x.nbytes for x in arrays.values())) as temporary:
        # inside the hash: a shard cannot stand for another
        save_file(arrays, temporary, metadata={"shard": f"{name} {spec_hash(spec)}"})
        entry = {"spec_hash": spec_hash(spec), "first_row": numbers[0], "rows": len(inputs)}
        entry |= {"tokens": len(arrays["tokens"]), "entries": len(arrays["ids"])}
        entry |= {"size": temporary.stat().st_size, "sha256": digest(temporary)}
    write_json(out / f"shard-{j:05}.json", entry)
    return entry


def entry_of(out, j, spec):
    """The entry of a finished shard, None where it is not finished, or its file is gone or of another size."""
    path, shard = out / f"shard-{j:05}.json", out / shard_name(j)
    if not path.is_file() or not shard.is_file():
        return None
    try:
        entry = read_json(path, out.name)
    except CheckpointError:
        return None  # damaged: the shard is written again
    if entry.get("spec_hash") != spec_hash(spec):
        raise StoreError(f"{out.name}/{path.name} belongs to a store of something else; {STEP}")
    return entry if entry.get("size") == shard.stat().st_size else None


def refresh_index(out, spec, first):
    """Write index.json from what is finished, until it lists all that is there when it is written; returns it.

    Whoever writes last has looked after writing: what others finished before that is listed.
    """
    if (out / INDEX).is_file():
        require_same(read_index(out)["spec"], spec, f"the store {out.name}")
    written = None
    while True:
        entries = {shard_name(j): entry for j in range(len(first) - 1) if (entry := entry_of(out, j, spec)) is not None}
        index = {"format_version": FORMAT_VERSION, "spec": spec, "spec_hash": spec_hash(spec)}
        index |= {"first_rows": first, "shards": entries}
        if index == written:
            return index
        write_json(out / INDEX, index)
        written = index
