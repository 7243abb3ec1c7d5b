"""The documents of one source, pass after pass, in an order that depends on the seed alone and can be gone on with."""

import copy
import hashlib
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy

from xlstm_hybrid.data.documents import IGNORE, content_of, encode_chat, encode_text
from xlstm_hybrid.errors import DataError
from xlstm_hybrid.recipe.schema import HUB_ID, Source, resolve_path

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
PACKED = (".gz", ".xz")  # which `datasets` opens by itself
SHUFFLE_BUFFER = 10_000  # rows of a stream that are shuffled together
EMPTY_SHARE, EMPTY_FLOOR = 0.5, 200  # of rows that may be empty, checked after so many
START = {"pass": 0, "block": 0, "position": 0, "dataset": None, "seen": 0, "empty": 0, "given": 0}


def open_source(source, recipe, test=False):
    """The `datasets` object of a source: a `Dataset`, or an `IterableDataset` if it streams.

    Args:
        test: of its `held_out_split`, where it has one.
    Raises:
        DataError: nothing at its path, a data set that cannot be opened, or columns that are missing.
    """
    from datasets import load_dataset, load_from_disk

    local, split = resolve_path(recipe, source.path), (test and source.held_out_split) or source.split
    if local is None and not HUB_ID.fullmatch(source.path):
        raise DataError(
            f"{source.path}: no such file or folder beside {recipe.path.name}, and not a Hub id; check the path"
        )
    streaming = source.streaming if source.streaming is not None else local is None
    where, files = local if local is not None and local.is_dir() else source.path, source.data_files
    if local is not None and local.is_file():
        suffix = Path(local.stem).suffix if local.suffix in PACKED else local.suffix
        if suffix not in FORMATS:
            raise DataError(f"{local.name}: expected a file of one of {sorted(FORMATS)}, as it is or as {PACKED}")
        where, files = FORMATS[suffix], str(local)
    try:
        if local is not None and any((local / name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = load_from_disk(local)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        else:
            options = {"data_files": files} | ({"revision": source.revision} if local is None else {})
            dataset = load_dataset(str(where), source.name, split=split, streaming=streaming, **options)
    except Exception as error:  # datasets, its readers and the Hub raise a dozen kinds of errors
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.path}: cannot be opened ({type(error).__name__}: {reason}); check its name, split ({split!r}), your access "
            "to it, and HF_HUB_OFFLINE"
        ) from error
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if missing := [c for c in source.columns if c not in columns]:
        raise DataError(
            f"{source.path}, split {split!r}: no columns {missing}, it has {sorted(columns)}; name the right ones in the recipe"
        )
    return dataset


class Stream:
    """Documents of one source, pass after pass, each in another order; `state` and `resume` go on where it stood.

    A pass is read in blocks: the whole data set, or `buffer` rows of a stream, whose files are shuffled as well. Each
    block has an order of its own, from the seed, the pass and the block's number, so that a stream goes on exactly:
    from the start of its block, at a position in it.

    Args:
        held_out: share of documents that is kept apart; `test` yields these, and nothing else. Of a source with a
            `held_out_split` nothing is: `dataset` is the split that is asked for.
    Raises:
        DataError: a row that cannot be encoded, too many empty rows, a whole pass without a document.
    """

    def __init__(self, name, source, dataset, tokenizer, seed=0, buffer=SHUFFLE_BUFFER, held_out=0.0, test=False):
        self.name, self.source, self.dataset, self.tokenizer = name, source, dataset, tokenizer
        self.seed, self.buffer, self.test = seed, buffer, test
        self.held_out = held_out if source.held_out_split is None else float(test)  # all of that split, or none
        self.whole = hasattr(dataset, "__len__")
        self.resume(START)

    def resume(self, state):
        """Go on where a stream of the same source, seed and buffer had this `state`."""
        self.state, self.rows, self.block = dict(state), None, None

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            if self.block is None:
                self.load_block()
            while self.state["position"] < len(self.order):
                n = int(self.order[self.state["position"]])
                self.state["position"] += 1
                document = self.document(self.block[n], n)
                if document is not None:
                    self.state["given"] += 1
                    return document
            ended = self.whole or len(self.block) < self.buffer
            self.block, self.state = None, self.state | {"block": self.state["block"] + 1, "position": 0}
            if ended:
                self.end_pass()

    def load_block(self):
        """The block that the state names, and its order."""
        if self.whole:
            self.block = self.dataset
        else:
            if self.rows is None:
                # an epoch above 0 shuffles the files
                self.dataset.set_epoch(whole_number(f"{self.seed}-{self.name}-{self.state['pass']}", 2**31) + 1)
                if self.state["dataset"] is not None:
                    self.dataset.load_state_dict(self.state["dataset"])
                self.rows = iter(self.dataset)
            elif self.state["block"]:
                self.state["dataset"] = copy.deepcopy(self.dataset.state_dict())
            self.block = list(islice(self.rows, self.buffer))
        seed = whole_number(f"{self.seed}-{self.name}-{self.state['pass']}-{self.state['block']}", 2**63)
        self.order = numpy.random.default_rng(seed).permutation(len(self.block))

    def end_pass(self):
        s = self.state
        if not s["given"]:
            kind, step = "with a scored token", "check its columns and where"
            if self.test and self.source.held_out_split is None:
                kind, step = f"held out (data.held_out is {self.held_out})", "raise data.held_out, or bring more rows"
            raise DataError(f"{self.name}: none of {s['seen']} rows in a whole pass is {kind}; {step}")
        if s["empty"]:
            warnings.warn(
                f"{self.name}: {s['empty']} of {s['seen']} rows are empty or have nothing to score, and were left out",
                stacklevel=2,
            )
        self.resume(START | {"pass": s["pass"] + 1})

    def document(self, row, n):
        """One row as a document; None where it is empty, filtered out, of the other split, or has nothing to score."""
        for column, wanted in (self.source.where or {}).items():
            if row[column] not in (wanted if isinstance(wanted, list) else [wanted]):
                return None
        self.state["seen"] += 1
        try:
            content = content_of(row, self.source)  # the split follows from the content alone
            if content is not None and (whole_number(content[1], 2**64) < self.held_out * 2**64) != self.test:
                return None
            document = content and self.encode(content[0])
        except DataError as error:
            raise DataError(f"{self.name}, row {n} of block {self.state['block']}: {error}") from error
        if document is None or all(label == IGNORE for label in document[1]):
            self.state["empty"] += 1
            if self.state["seen"] >= EMPTY_FLOOR and self.state["empty"] > EMPTY_SHARE * self.state["seen"]:
                raise DataError(
                    f"{self.name}: {self.state['empty']} of {self.state['seen']} rows are empty or have nothing to score; check the recipe's columns"
                )
            return None
        return document

    def encode(self, content):
        if self.source.is_chat:
            return encode_chat(self.tokenizer, content, self.source.score)
        return encode_text(self.tokenizer, content)


def whole_number(text, below):
    """A whole number from a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % below


def text_rows(path, column, tokenizer, length, count):
    """`count` documents of a file, drawn by a fixed seed, as (ids, labels), each cut to `length` tokens.

    Raises:
        DataError: see `open_source`; fewer documents than that.
    """
    source, rows = Source(path=str(path), text=column), []
    stream = Stream("text", source, open_source(source, SimpleNamespace(path=Path(path))), tokenizer)
    for ids, labels in islice(stream, count):
        if stream.state["pass"]:
            raise DataError(f"{path}: {len(rows)} documents with text, expected at least {count}; ask for fewer")
        rows.append((ids[:length], labels[:length]))
    return rows
