"""From rows and their targets to the arrays of a shard and back. Dims: R rows, N tokens, P tokens with targets, E
entries, M entries per token.

A token is one uint32: id in the low 22 bits, then a check byte over everything that is stored for it, then two flags.
One changed bit anywhere is found, and found where it is, without a byte of its own.
"""

from typing import NamedTuple

import numpy as np

from xlstm_hybrid.errors import DataError, StoreError

FORMAT_VERSION = 1
ID_BITS = 22
LARGEST_VOCABULARY = 2**ID_BITS
ID, CHECK, STORED, START = np.uint32(2**ID_BITS - 1), np.uint32(0xFF << ID_BITS), np.uint32(1 << 30), np.uint32(1 << 31)
# what is stored per entry, and per token with targets
KINDS = {"topk": ("logp", "rest"), "sampled": ("counts", "support")}
# dtypes as safetensors calls them: of what every shard holds, and of what `KINDS` names
COMMON = {"tokens": "U32", "row_start": "I64", "place_start": "I64", "entry_start": "I64", "ids": "U32"}
CODES = {"logp": "F16", "rest": "F32", "counts": "U16", "support": "U16"}
LARGEST_K = 2**16 - 1
NEVER = -np.inf
MOST_MASS = 1.001  # sum of probabilities above which the stored numbers are no log-probabilities
# how far the stored mass and the rest may be from 1 together; rounding to float16 makes 0.003 at 6 nats
MASS_GAP = 0.01
IGNORE = -100


def store_bytes(tokens, k):
    """Bytes of the targets of `tokens` tokens with k entries each; what a row or a file costs beside that is not
    counted.
    """
    return tokens * (6 * k + 8)


# --- rows ---------------------------------------------------------------------------------------------------------


class RowInput(NamedTuple):
    """A row that the teacher will read. number: its place in the data; input_ids: [T]; starts: [T], True at the first
    token of a document;
    stored: [T], True where the next token is scored, so that targets are kept.
    """

    number: int
    input_ids: np.ndarray
    starts: np.ndarray
    stored: np.ndarray

    def position_ids(self):
        return position_ids(self.starts)


class StoredRow(NamedTuple):
    """A row as it is read. input_ids: [T]; starts, stored: [T] bool; ids: [P, M], logp: [P, M] float32, -inf pads;
    rest: [P] float32.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    stored: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    rest: np.ndarray


def position_ids(starts):
    """[T] positions that begin at 0 with every document."""
    first = np.flatnonzero(starts)
    return np.arange(len(starts)) - np.repeat(first, np.diff([*first, len(starts)]))


def row_input(row, number, vocab_size):
    """`RowInput` of a mapping with `input_ids` and, where they are, `labels`, `position_ids` (0 starts a document) or
    `seq_lengths`.

    Without labels every token but the first of a document is scored.

    Raises:
        DataError: no tokens, an id outside of the vocabulary, columns of different lengths.
    """
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    T = len(ids)
    if ids.ndim != 1 or not T:
        raise DataError(f"row {number}: expected a list of token ids, got shape {list(ids.shape)}; drop empty rows")
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        p = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise DataError(
            f"row {number}, position {p}: token {ids[p]}, expected 0..{vocab_size - 1}; tokenise with the teacher's tokenizer"
        )
    starts = np.arange(T) == 0
    if row.get("position_ids") is not None:
        starts = starts | (column(row, "position_ids", number, T) == 0)
    elif row.get("seq_lengths") is not None:
        ends = np.cumsum(np.asarray(row["seq_lengths"], dtype=np.int64))
        if not len(ends) or ends[-1] != T or (np.diff(ends) < 1).any():
            raise DataError(
                f"row {number}: seq_lengths {list(row['seq_lengths'])} do not add up to its {T} tokens: prepare the rows again"
            )
        starts[ends[:-1]] = True
    labels = column(row, "labels", number, T) if row.get("labels") is not None else ids
    stored = np.zeros(T, dtype=bool)
    stored[:-1] = (labels[1:] != IGNORE) & ~starts[1:]
    return RowInput(number, ids, starts, stored)


def column(row, name, number, T):
    values = np.asarray(row[name], dtype=np.int64)
    if values.shape != (T,):
        raise DataError(
            f"row {number}: {name} of shape {list(values.shape)}, input_ids has {T} tokens; expected one for each token"
        )
    return values


def describe_place(starts, position):
    """The words of an error for a position of a row: which document of the row, and which of its tokens."""
    first = np.flatnonzero(starts[: position + 1])
    return f"position {position} (document {max(len(first) - 1, 0)} of the row, its token {position - (first[-1] if len(first) else 0)})"


# --- writing ------------------------------------------------------------------------------------------------------


def pack(rows, targets, kind, k, vocab_size):
    """The arrays of a shard.

    Args:
        rows: R `RowInput`.
        targets: R times `(ids [P, M], logp [P, M], rest [P])`, natural logarithms, for the stored positions of each row
            in order; -inf pads.
        kind, k: "topk" or "sampled"; M = k, or V if that is smaller.
    Raises:
        DataError: targets of another shape, or that are not log-probabilities; it names row, document and position.
    """
    parts = [pack_row(row, *target, kind, k, vocab_size) for row, target in zip(rows, targets, strict=True)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "ids", *KINDS[kind])}
    lengths = {"row_start": "tokens", "place_start": KINDS[kind][1], "entry_start": "ids"}
    starts = {name: np.cumsum([0, *(len(part[of]) for part in parts)], dtype=np.int64) for name, of in lengths.items()}
    return arrays | starts


def pack_row(row, ids, logp, rest, kind, k, vocab_size):
    """Arrays of one row; entries and places flat."""
    P, M = int(row.stored.sum()), min(k, vocab_size)
    ids, logp, rest = np.asarray(ids), np.asarray(logp, dtype=np.float64), np.asarray(rest, dtype=np.float64)
    if ids.shape != (P, M if kind == "topk" else k) or logp.shape != ids.shape or rest.shape != (P,):
        raise DataError(
            f"row {row.number}: targets of shapes {list(ids.shape)}, {list(logp.shape)}, {list(rest.shape)}, expected [{P}, {M}] twice "
            f"and [{P}]; select them at the row's stored positions"
        )
    rest = np.minimum(rest, 0.0)  # a logsumexp may round to just above
    if fault := first_fault(ids, logp, rest if kind == "topk" else np.full(P, NEVER), vocab_size):
        p = int(np.flatnonzero(row.stored)[fault[0]])
        raise DataError(
            f"the teacher's targets for row {row.number}, {describe_place(row.starts, p)}: {fault[1]}; look at its logits there"
        )
    if kind == "topk":
        logp = round_down_mass(logp)
        ids = np.where(logp == NEVER, 0, ids).astype(np.uint32).ravel()
        arrays = {"ids": ids, "logp": logp.ravel(), "rest": rest.astype(np.float32)}
    else:
        counts = np.rint(np.exp(logp) * k)
        drawn = counts > 0
        arrays = {"ids": ids[drawn].astype(np.uint32), "counts": counts[drawn].astype(np.uint16)}
        arrays["support"] = drawn.sum(1).astype(np.uint16)
    tokens = row.input_ids.astype(np.uint32) | row.starts * START | row.stored * STORED
    return arrays | {"tokens": tokens | check_bytes(tokens, arrays, kind)}


def round_down_mass(logp):
    """float16 log-probabilities [P, M], off by at most 2^-10 of themselves (2^-24 near 0), whose probabilities sum to
    no more than 1.

    To the nearest, unless that lifts a position's sum over 1; then towards -inf.
    """
    with np.errstate(over="ignore"):
        near = logp.astype(np.float16)
    down = np.where(near > logp, np.nextafter(near, np.float16(NEVER)), near)
    heavy = np.exp(near.astype(np.float64)).sum(1, keepdims=True) > 1
    rounded = np.where(heavy, down, near)
    finite = np.isfinite(rounded)
    assert (np.abs(rounded[finite] - logp[finite]) <= 2**-10 * np.abs(logp[finite]) + 2**-24).all()
    return rounded


# --- what is stored, checked ---------------------------------------------------------------------------------------


def check_bytes(tokens, arrays, kind):
    """The check byte of each token, in its place in the uint32: all bits of token, flags, ids and values, folded by
    exclusive or.
    """
    words = tokens & ~CHECK
    per_entry, per_place = KINDS[kind]
    stored = np.flatnonzero(tokens & STORED)
    if len(stored):
        entries = arrays["ids"] ^ bits(arrays[per_entry])
        sampled = kind == "sampled"
        support = arrays["support"].astype(np.int64) if sampled else np.full(len(stored), len(entries) // len(stored))
        sums = np.bitwise_xor.reduceat(entries, np.cumsum(support) - support)
        words[stored] ^= sums ^ bits(arrays[per_place])
    words ^= words >> np.uint32(16)
    words ^= words >> np.uint32(8)
    return (words & np.uint32(0xFF)) << np.uint32(ID_BITS)


def bits(x):
    return x.view(np.uint32) if x.dtype.itemsize == 4 else x.view(np.uint16).astype(np.uint32)


def first_fault(ids, logp, rest, vocab_size):
    """`(index of the first of P places, what is wrong)`, None if all are distributions over the vocabulary."""
    if not len(ids):
        return None
    mass, rest_mass = np.exp(logp).sum(1, dtype=np.float64), np.exp(rest)
    gap = np.abs(mass + rest_mass - 1)
    # not so either where one is NaN
    extremes = 0 <= ids.min() <= ids.max() < vocab_size and logp.max() <= 0 and rest.max() <= 0
    if extremes and mass.max() <= MOST_MASS and gap.max() <= MASS_GAP and logp.min() > NEVER:
        return None  # most rows: what follows looks for the place
    never = logp == NEVER
    faults = [
        ((ids < 0) | (ids >= vocab_size), "id {} outside of the vocabulary", ids),
        (np.isnan(logp) | (logp > 0), "log-probability {}", logp),
        (never & (ids != 0), "id {} with no probability, where padding has id 0", ids),
        (np.isnan(rest) | (rest > 0), "log-mass of the rest {}", rest),
        (~(mass <= MOST_MASS), "probabilities sum to {}", mass),
        (~(gap <= MASS_GAP), "probabilities and the rest sum to {}", mass + rest_mass),
    ]
    at = [(np.argwhere(wrong)[0], text, values) for wrong, text, values in faults if wrong.any()]
    expected = f"expected log-probabilities of ids below {vocab_size}"
    found = [(int(place[0]), f"{text.format(values[tuple(place)])}, {expected}") for place, text, values in at]
    return min(found, default=None, key=lambda f: f[0])


# --- reading ------------------------------------------------------------------------------------------------------


def decode(arrays, kind, k, vocab_size, where):
    """`StoredRow` of the arrays of one row.

    Stored float16 values are relative: they are scaled to the mass that `rest` leaves, which was stored exactly.

    Args:
        where: words that name the row in an error.
    Raises:
        StoreError: a check byte that does not fit, or values that are no log-probabilities; it names document and
            position.
    """
    tokens = arrays["tokens"]
    starts, stored = (tokens & START) != 0, (tokens & STORED) != 0
    P, M = int(stored.sum()), min(k, vocab_size)
    per_entry, per_place = KINDS[kind]
    E = len(arrays["ids"])
    support = arrays["support"].astype(np.int64) if kind == "sampled" else np.full(P, M)
    if len(arrays[per_place]) != P or len(arrays[per_entry]) != E or support.sum() != E or (support < 1).any():
        raise StoreError(
            f"{where}: {P} tokens say that they have targets, {len(arrays[per_place])} targets and {E} entries are stored; the shard is "
            "damaged: delete it and run cache-teacher again"
        )
    if len(wrong := np.flatnonzero(check_bytes(tokens, arrays, kind) != (tokens & CHECK))):
        raise StoreError(
            f"{where}, {describe_place(starts, int(wrong[0]))}: a check byte does not fit what is stored there, the shard is damaged: delete "
            "it and run cache-teacher again"
        )
    if kind == "topk":
        ids, logp = arrays["ids"].reshape(P, M).astype(np.int64), arrays["logp"].reshape(P, M).astype(np.float32)
        rest = arrays["rest"]
    else:
        filled = np.arange(k) < support[:, None]
        ids, counts = np.zeros((P, k), dtype=np.int64), np.zeros((P, k), dtype=np.float32)
        ids[filled], counts[filled], rest = arrays["ids"], arrays["counts"], np.full(P, NEVER, dtype=np.float32)
        with np.errstate(divide="ignore"):
            logp = np.log(counts / k)
    if fault := first_fault(ids, logp, rest, vocab_size):
        p = int(np.flatnonzero(stored)[fault[0]])
        raise StoreError(
            f"{where}, {describe_place(starts, p)}: {fault[1]}; the store was not written by cache-teacher: build it again"
        )
    if kind == "topk" and P:
        mass, exact = np.exp(logp).sum(1, dtype=np.float64), -np.expm1(rest.astype(np.float64))
        scale = np.log(np.divide(exact, mass, out=np.ones(P), where=(mass > 0) & (exact > 0)))
        logp = np.minimum(logp + scale[:, None].astype(np.float32), 0.0)
    return StoredRow((tokens & ID).astype(np.int64), starts, stored, ids, logp, rest)
