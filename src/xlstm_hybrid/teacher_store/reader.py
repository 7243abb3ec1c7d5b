"""Reading a store: rows by number, each checked as it is read; a collator that adds their targets to a batch. Dims: B T
M as everywhere, P stored.
"""

import os
from bisect import bisect_right
from pathlib import Path

import numpy as np

from xlstm_hybrid.checkpoint.files import digest
from xlstm_hybrid.errors import ConfigError, StoreError
from xlstm_hybrid.teacher_store.layout import CODES, COMMON, IGNORE, KINDS, NEVER, decode, describe_place, position_ids
from xlstm_hybrid.teacher_store.writer import read_index, require_same, shard_name

HEADER_BYTES = 2**16  # ours has some 700
OPEN_SHARDS = 1024  # a mapping each, of which a process may have 65,530
NUMBER = "store_row"  # column with the number of a row of data in the store
AGAIN = "delete it and run cache-teacher again"


class TeacherStore:
    """The targets of a teacher, row by row, memory-mapped.

    Args:
        directory: of `build_store`.
        partial: accept a store that is not finished; a row of a missing shard is an error when it is read.
        verify: "rows" checks what is read; "full" hashes each shard as well, once, before the first of its rows is
            read.
        expected: fields of the spec and the values that they must have.
    Raises:
        StoreError: no store, an unfinished or damaged one, or one made for something else.
    """

    def __init__(self, directory, partial=False, verify="rows", **expected):
        if verify not in ("rows", "full"):
            raise ConfigError(f"verify={verify!r}: expected 'rows' or 'full'")
        self.directory, self.level, self.opened = Path(directory), verify, {}
        index = read_index(self.directory)
        self.spec, self.spec_hash = index["spec"], index["spec_hash"]
        self.first, self.shards = index["first_rows"], index["shards"]
        self.kind, self.k, self.vocab_size = (self.spec[key] for key in ("kind", "k", "vocab_size"))
        require_same(self.spec, expected, f"the store {self.directory.name}")
        if not partial and len(self.shards) < len(self.first) - 1:
            raise StoreError(
                f"{self.directory.name}: {len(self.shards)} of {len(self.first) - 1} shards are finished; run cache-teacher again, it "
                "goes on from there"
            )

    def __len__(self):
        return self.first[-1]

    def __getstate__(self):
        return self.__dict__ | {"opened": {}}  # a worker process opens its own

    def row(self, n):
        """`StoredRow` n: tokens, document starts and targets.

        Raises:
            StoreError: no such row, a shard that is missing or damaged, or values that cannot be; it names row,
                document and position.
        """
        if not 0 <= n < len(self):
            raise StoreError(
                f"{self.directory.name}: row {n}, the store has {len(self)}; read it with the data that it was made from"
            )
        j = bisect_right(self.first, n) - 1
        shard, name = self.shard(j), f"{self.directory.name}/{shard_name(j)}"
        per_entry, per_place = KINDS[self.kind]
        starts = {"tokens": "row_start", per_place: "place_start", "ids": "entry_start", per_entry: "entry_start"}
        i, arrays = n - self.first[j], {}
        for part, start in starts.items():
            begin, end = (int(x) for x in shard.get_slice(start)[i : i + 2])
            if not 0 <= begin <= end <= shard.get_slice(part).get_shape()[0]:
                raise StoreError(
                    f"{name}, row {n}, document 0: {part} {begin}..{end} lie outside of the shard, it is damaged: {AGAIN}"
                )
            arrays[part] = np.asarray(shard.get_slice(part)[begin:end])
        return decode(arrays, self.kind, self.k, self.vocab_size, f"{name}, row {n}")

    def shard(self, j):
        """The opened shard j; the last `OPEN_SHARDS` of them stay open."""
        if j not in self.opened:
            while len(self.opened) >= OPEN_SHARDS:
                self.opened.pop(next(iter(self.opened)))
            self.opened[j] = self.open(j)
        return self.opened[j]

    def open(self, j):
        from safetensors import SafetensorError, safe_open

        name = shard_name(j)
        path, entry, where = self.directory / name, self.shards.get(name), f"{self.directory.name}/{name}"
        if entry is None:
            raise StoreError(
                f"{where}: rows {self.first[j]}..{self.first[j + 1] - 1} are not finished; run cache-teacher again"
            )
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise StoreError(
                f"{where} is missing or cannot be read ({error.strerror}); run cache-teacher again"
            ) from error
        with os.fdopen(handle, "rb") as file:
            size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if size != entry["size"] or header > HEADER_BYTES:
                raise StoreError(
                    f"{where} has {size} bytes and a header of {header}, expected {entry['size']} and at most {HEADER_BYTES}: {AGAIN}"
                )
            # what is hashed is what is mapped, whatever happens to the name meanwhile
            source = same if Path(same := f"/dev/fd/{file.fileno()}").exists() else path
            if self.level == "full" and (found := digest(source)) != entry["sha256"]:
                raise StoreError(
                    f"{where} has SHA-256 {found[:12]}..., expected {entry['sha256'][:12]}...; {self.locate(j, source)}"
                )
            try:
                shard = safe_open(source, framework="np")
            except (SafetensorError, OSError) as error:
                raise StoreError(f"{where} is damaged ({error}): {AGAIN}") from error
        title = (shard.metadata() or {}).get("shard")
        if title != f"{name} {self.spec_hash}":
            raise StoreError(
                f"{where} was written as {title!r}, expected {name} of this store: put each shard back where it belongs, or {AGAIN}"
            )
        wanted = COMMON | {part: CODES[part] for part in KINDS[self.kind]}
        found = {part: str(shard.get_slice(part).get_dtype()) for part in shard.keys()}  # noqa: SIM118, a handle and no dict
        if found != wanted:
            raise StoreError(f"{where} holds {found}, expected {sorted(wanted)}: {AGAIN}")
        return shard

    def locate(self, j, source):
        """Words for where a shard is damaged, as far as its rows tell."""
        reader = TeacherStore(self.directory, partial=True)
        try:
            for n in range(self.first[j], self.first[j + 1]):
                reader.row(n)
        except StoreError as error:
            return str(error)
        return f"no row of it shows where: {AGAIN}"

    def verify(self):
        """Hash every shard and check every row; raises StoreError at the first that is not as it was written."""
        whole = TeacherStore(self.directory, verify="full")
        for j in range(len(self.first) - 1):
            for n in range(self.first[j], self.first[j + 1]):
                whole.row(n)
            whole.opened.pop(j)

    def example(self, n):
        """Row n with an entry per token: `input_ids, position_ids, teacher_rest [T], teacher_ids, teacher_logp [T, M]`;
        -inf where none is stored.
        """
        row = self.row(n)
        T, M = len(row.input_ids), row.ids.shape[1]
        ids, logp = np.zeros((T, M), dtype=np.int64), np.full((T, M), NEVER, dtype=np.float32)
        rest = np.full(T, NEVER, dtype=np.float32)
        ids[row.stored], logp[row.stored], rest[row.stored] = row.ids, row.logp, row.rest
        positions = position_ids(row.starts)
        targets = {"teacher_ids": ids, "teacher_logp": logp, "teacher_rest": rest}
        return {NUMBER: n, "input_ids": row.input_ids, "position_ids": positions, **targets}

    def to_dataset(self, streaming=True):
        """The store as a `datasets` data set of `example`s.

        Args:
            streaming: an `IterableDataset` that reads the store, its shards shared out among workers; else a `Dataset`,
                which is a copy.
        """
        from datasets import Dataset, IterableDataset

        arguments = {"store": [self] * (len(self.first) - 1), "shard": list(range(len(self.first) - 1))}
        if streaming:
            return IterableDataset.from_generator(read_shards, gen_kwargs=arguments)
        return Dataset.from_generator(
            read_shards, gen_kwargs=arguments, keep_in_memory=True, fingerprint=self.spec_hash
        )


def read_shards(store, shard):
    for one, j in zip(store, shard, strict=True):
        for n in range(one.first[j], one.first[j + 1]):
            yield one.example(n)


# --- into a batch -------------------------------------------------------------------------------------------------


def number_rows(data, store):
    """`data` with the column `store_row`: row n of the data is row n of the store, before anything is shuffled.

    Raises:
        StoreError: another number of rows than the store has.
    """
    if hasattr(data, "__len__") and len(data) != len(store):
        raise StoreError(
            f"{store.directory.name} has {len(store)} rows, the data {len(data)}: read it with the data that it was made from"
        )
    if not hasattr(data, "map"):
        return [{**row, NUMBER: n} for n, row in enumerate(data)]
    if hasattr(data, "__len__"):
        return data.add_column(NUMBER, list(range(len(data))))
    return data.map(with_number, with_indices=True)


def with_number(row, n):
    return {NUMBER: n}


class StoreCollator:
    """A collator that adds `teacher_ids, teacher_logp [B, T, M], teacher_rest [B, T]` to the batch of another.

    Rows may be padded on either side (`attention_mask` says where), or joined to one (padding-free). Tokens and
    document starts of the batch are compared with those that the teacher saw.

    Args:
        store: `TeacherStore`.
        collate: function of a list of rows without the column `store_row`; it returns tensors, `input_ids` [B, T] among
            them.
    Raises (when called):
        StoreError: a row without number, tokens or documents that differ from the store's, or a scored token without
            targets; it names row, document and position.
    """

    def __init__(self, store, collate):
        self.store, self.collate = store, collate

    def __call__(self, rows):
        if any(NUMBER not in row for row in rows):
            raise StoreError(
                f"a row has no column {NUMBER}: number the data with number_rows before it is shuffled, and keep the column"
            )
        import torch

        batch = self.collate([{key: value for key, value in row.items() if key != NUMBER} for row in rows])
        numbers = [int(row[NUMBER]) for row in rows]
        stored = [self.store.row(n) for n in numbers]
        (B, T), M = batch["input_ids"].shape, stored[0].ids.shape[1]
        ids, logp = torch.zeros(B, T, M, dtype=torch.int64), torch.full((B, T, M), NEVER)
        rest = torch.full((B, T), NEVER)
        columns = [key for key in ("input_ids", "position_ids", "labels") if key in batch]
        for n, row, (b, place) in zip(numbers, stored, places(batch, numbers, stored), strict=True):
            require_same_row({key: batch[key][b, place].numpy() for key in columns}, row, n)
            where = place[torch.from_numpy(row.stored)]
            ids[b, where], logp[b, where], rest[b, where] = (
                torch.from_numpy(np.ascontiguousarray(x)) for x in (row.ids, row.logp, row.rest)
            )
        return {**batch, "teacher_ids": ids, "teacher_logp": logp, "teacher_rest": rest}


def places(batch, numbers, stored):
    """Where each row lies in the batch: `(b, positions [T of the row])`."""
    import torch

    B, T = batch["input_ids"].shape
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(B, T, dtype=torch.bool)
    lengths = [len(row.input_ids) for row in stored]
    if len(numbers) == B:
        parts = [(b, real[b].nonzero()[:, 0]) for b in range(B)]
    elif B == 1 and int(real.sum()) == sum(lengths):
        parts = [(0, part) for part in real[0].nonzero()[:, 0].split(lengths)]
    else:
        raise StoreError(
            f"rows {numbers} of {lengths} tokens became a batch of {[B, T]}: expected one row each, or all of them joined to one"
        )
    for n, length, (_, place) in zip(numbers, lengths, parts, strict=True):
        if len(place) != length:
            raise StoreError(
                f"row {n}, document 0: {len(place)} tokens in the batch, {length} in the store; read it with the data that it was made "
                "from, neither cut nor packed again"
            )
    return parts


def require_same_row(batch, row, n):
    """Raise StoreError unless a row of the batch is the store's row n, and has targets wherever it is scored."""
    step = "read the store with the data that it was made from"
    starts = batch["position_ids"] == 0 if "position_ids" in batch else np.arange(len(row.starts)) == 0
    starts[:1] = True
    labels = batch.get("labels", np.full(len(row.starts), IGNORE))
    scored = np.append((labels[1:] != IGNORE) & ~starts[1:], False)
    ids = batch["input_ids"]
    checks = [
        (ids != row.input_ids, lambda p: f"token {ids[p]} in the batch, {row.input_ids[p]} in the store"),
        (starts != row.starts, lambda p: f"a document starts in {'the batch' if starts[p] else 'the store'} alone"),
        (scored & ~row.stored, lambda p: "the next token is scored, the store has no targets for it"),
    ]
    for wrong, text in checks:
        if wrong.any():
            p = int(np.flatnonzero(wrong)[0])
            raise StoreError(f"row {n}, {describe_place(row.starts, p)}: {text(p)}; {step}")
