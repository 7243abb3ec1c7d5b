"""Packed rows of T tokens, of a mix of sources or of the tiny domains, and the data sets that the trainers read."""

import copy
import hashlib
import json
import random
import warnings
from itertools import islice

from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.data.documents import IGNORE
from xlstm_hybrid.data.streams import SHUFFLE_BUFFER, Stream, open_source
from xlstm_hybrid.errors import ConfigError, DataError, XLSTMHybridError

HELD_OUT_SEED = 1_000_003  # added to the seed of the tiny domains for rows that nothing trains on
HELD_OUT = 0.01  # share of a source's documents that nothing trains on
ROW = ("input_ids", "labels", "position_ids")
PACKING = 2  # of `Rows`, in its state; 1 cut a conversation where a row had no room left
DESCRIBED = "rows of packing"
STATE = ("spent", "rest", "filler", "waiting", "count", "padded", "counts")
WAITING = 16  # conversations that wait for a row with room at the same time
LEFT_OUT_FLOOR = 2000  # documents of a source of which one at least has to be scored
UNSCORED_ROWS = 1000  # in a row, after which a run ends
PADDED_SHARE = 0.1  # of the rows, above which padding is warned of


class Rows:
    """Packed rows of `length` tokens from several streams, without end: a list of ints for each name of `ROW`.

    The source furthest below its share of tokens comes next. Text fills a row and goes on in the next; a conversation
    stands in one row, whole, and waits for one where the room left is too small; what is longer than a row is cut, and
    left out if nothing of it is scored then. Where no conversation fits, a text fills the gap; without a source of text
    it is padding, a document of its own that is not scored. Positions restart with each document, and with each piece
    of one that goes on in the next row. Rows with nothing to score are left out. `counts` says how many documents were
    read, cut and left out; the first one that is cut warns. `state_dict()` is plain JSON data; `load_state_dict` goes
    on exactly after that row.
    """

    def __init__(self, streams, length):
        self.streams, self.length = {s.name: s for s in streams}, length
        self.spent, self.count, self.padded = dict.fromkeys(self.streams, 0), 0, 0
        # what is left of a text that goes on in the next row, of one that fills gaps, and conversations: [name, ids, labels]
        self.rest, self.filler, self.waiting = None, None, []
        self.counts = {name: {"read": 0, "cut": 0, "left_out": 0, "shortest": None} for name in self.streams}
        tokenizer = streams[0].tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = next(token for token in ids if token is not None)

    def __iter__(self):
        return self

    def __next__(self):
        """Raises DataError where a source has nothing that is scored within a row."""
        for _ in range(UNSCORED_ROWS):
            row = {key: [] for key in ROW}
            while room := self.length - len(row["input_ids"]):
                ids, labels = self.next_piece(room)
                row["input_ids"] += ids
                row["labels"] += [IGNORE, *labels[1:]]  # nothing predicts a first token, that of a later piece neither
                row["position_ids"] += range(len(ids))
            if any(label != IGNORE for label in row["labels"]):
                self.count += 1
                return row
        raise DataError(
            f"{UNSCORED_ROWS} rows of {self.length} tokens without a scored one: raise data.sequence_length"
        )

    def next_piece(self, room):
        """`(ids, labels)` of at most `room` tokens that stand next in the row."""
        while self.rest is None:
            if len(self.waiting) < WAITING:
                self.draw()
                continue
            if fitting := [n for n, (_, ids, _) in enumerate(self.waiting) if len(ids) <= room]:
                # a new row begins with what has waited longest, in a gap the longest one goes first
                n = 0 if room == self.length else max(fitting, key=lambda n: len(self.waiting[n][1]))
                name, ids, labels = self.waiting.pop(n)
                self.spent[name] += len(ids)
                return ids, labels
            texts = [name for name in self.streams if packing_mode(self.streams[name].source) == "text"]
            if not texts:
                self.padded += room
                return [self.padding] * room, [IGNORE] * room
            if self.filler is None:
                self.filler = [name := self.furthest_below(texts), *next(self.streams[name])]
                self.counts[name]["read"] += 1
            piece, self.filler = self.divide(self.filler, room)
            return piece
        piece, self.rest = self.divide(self.rest, room)
        return piece

    def divide(self, document, room):
        """The first `room` tokens of [name, ids, labels], and what is left of it or None."""
        name, ids, labels = document
        self.spent[name] += min(len(ids), room)
        return (ids[:room], labels[:room]), [name, ids[room:], labels[room:]] if len(ids) > room else None

    def furthest_below(self, names):
        """The one of these sources that is furthest below its share of tokens."""
        return min(names, key=lambda name: self.spent[name] / self.streams[name].source.weight)

    def draw(self):
        """The next document, of the source furthest below its share: among those that wait, or as `rest`."""
        name = self.furthest_below(self.streams)
        ids, labels = next(self.streams[name])
        counts, mode = self.counts[name], packing_mode(self.streams[name].source)
        counts["read"] += 1
        long = len(ids) > self.length
        if mode == "text" or (long and mode == "split"):
            self.rest = [name, ids, labels]
            return
        if long:
            counts["cut"] += 1
            first = next(n for n, label in enumerate(labels) if label != IGNORE)
            ids, labels = ids[: self.length], labels[: self.length]
            if first >= self.length:
                counts["left_out"] += 1
                counts["shortest"] = min(first + 1, counts["shortest"] or first + 1)
                self.check_left_out(name)
            if counts["cut"] == 1:
                self.warn()
            if first >= self.length:
                return
        self.waiting.append([name, ids, labels])

    def check_left_out(self, name):
        """Raise DataError where a whole pass, or LEFT_OUT_FLOOR documents, held nothing that is scored within a row."""
        counts, passes = self.counts[name], self.streams[name].state["pass"]
        if counts["left_out"] == counts["read"] and (passes or counts["read"] >= LEFT_OUT_FLOOR):
            raise DataError(
                f"{name}: none of {counts['read']} documents has a scored token within a row of {self.length} tokens "
                f"(data.sequence_length); the first of the shortest one is its token {counts['shortest']}: raise it, or set "
                "overlong: split"
            )

    def warn(self):
        """Warn of the documents that were longer than a row."""
        for name, counts in self.counts.items():
            if counts["cut"]:
                warnings.warn(
                    f"{name}: {counts['cut']} of {counts['read']} documents are longer than a row of {self.length} tokens "
                    f"(data.sequence_length); their ends are cut off, and {counts['left_out']} with nothing scored before it are "
                    "left out",
                    stacklevel=2,
                )

    def take(self, count):
        """Yields `count` rows, and warns at their end of documents that were cut and of much padding."""
        yield from islice(self, count)
        self.warn()
        if self.padded > PADDED_SHARE * (total := self.count * self.length):
            warnings.warn(
                f"{self.padded} of {total} tokens of the rows are padding, as conversations are not cut to fill them: choose a "
                "data.sequence_length that fits them better, or mix in text",
                stacklevel=2,
            )

    def state_dict(self):
        state = {name: getattr(self, name) for name in STATE} | {"packing": PACKING}
        return copy.deepcopy(state | {"streams": {name: stream.state for name, stream in self.streams.items()}})

    def load_state_dict(self, state):
        """Raises DataError for a state of other sources, or of a version that packs rows in another way."""
        if set(state["streams"]) != set(self.streams):
            raise DataError(
                f"the state is of the sources {sorted(state['streams'])}, the recipe has {sorted(self.streams)}: start the stage anew, in another OUT"
            )
        if state.get("packing") != PACKING:
            raise DataError(
                f"the state is of packing {state.get('packing', 1)}, this version has {PACKING} (conversations are no longer cut to "
                "fill a row): go on with the version that wrote it, or start the stage anew, in another OUT"
            )
        state = copy.deepcopy(state)
        for name in STATE:
            setattr(self, name, state[name])
        for name, stream in self.streams.items():
            stream.resume(state["streams"][name])


def packing_mode(source):
    """ "text" for a source whose documents go on in the next row wherever one ends, else what it does with those that
    are longer than a row, "split" or "cut".
    """
    if source.is_chat or source.overlong == "cut":
        return source.overlong or "cut"
    return "text"


def open_streams(recipe, tokenizer, expert=None, test=False):
    """The streams of stage I, or of one expert, from the recipe's sources; `test`: of documents not trained on, those of
    the sources of weight 0 among them.

    Raises:
        DataError: see `open_source`.
    """
    data, name = recipe.data, "align" if expert is None else expert
    rest = data.get("shuffle_buffer", SHUFFLE_BUFFER), data.get("held_out", HELD_OUT), test
    return [
        Stream(n, source, open_source(source, recipe, test), tokenizer, f"{recipe.seed}-{name}", *rest)
        for n, source in recipe.mix(expert)["sources"].items()
        if test or source.weight
    ]


def open_rows(recipe, tokenizer, expert=None, test=False):
    """Rows of stage I, or of one expert, from the recipe's sources."""
    return Rows([s for s in open_streams(recipe, tokenizer, expert, test) if s.source.weight], recipe.length)


def packed_rows(recipe, tokenizer, count, expert=None, test=False):
    """A list of `count` packed rows of a stage; `test`: rows that nothing trains on."""
    mix = recipe.mix(expert)
    if "sources" in mix:
        return list(open_rows(recipe, tokenizer, expert, test).take(count))
    seed = recipe.seed + HELD_OUT_SEED if test else recipe.seed if expert is None else f"{recipe.seed}-{expert}"
    stream = tasks.training_documents(random.Random(seed), tokenizer, mix["mixture"])
    return [tasks.packed_row(stream, recipe.length) for _ in range(count)]


def train_dataset(recipe, tokenizer, count, expert=None, cache=None):
    """The `count` rows that a training stage reads.

    Returns:
        `datasets.Dataset`; on disk below `cache` if the rows come from sources; or a `datasets.IterableDataset`, if one
        of the sources streams.
    Raises:
        DataError: see `open_source` and `Stream`.
    """
    from datasets import Dataset, Features, IterableDataset, Sequence, Value
    from datasets.exceptions import DatasetGenerationError

    mix = recipe.mix(expert)
    if "mixture" in mix:
        return Dataset.from_list(packed_rows(recipe, tokenizer, count, expert))
    features = Features({key: Sequence(Value("int32")) for key in ROW})

    def rows():
        return open_rows(recipe, tokenizer, expert).take(count)

    streams = open_streams(recipe, tokenizer, expert)
    if any(not s.whole for s in streams):
        dataset = IterableDataset.from_generator(rows, features=features)
        if any(packing_mode(s.source) != "text" for s in streams):
            dataset.info.description = f"{DESCRIBED} {PACKING}"  # by which a run of another packing is told
        return dataset
    # everything in the recipe that the rows depend on
    what = [recipe.data, recipe.experts.get(expert), recipe.seed, str(expert), count, recipe.teacher]
    name = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
    try:
        return Dataset.from_generator(rows, features, cache_dir=cache, fingerprint=name)
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, XLSTMHybridError) else error from None


def prompts(recipe, tokenizer, count, expert):
    """`count` questions of one expert for on-policy distillation: a `datasets.Dataset` with the columns "prompt" and
    "completion".

    Of a conversation the prompt is all but its last answer; both columns hold messages. Of the tiny domains, in the
    shares of their mixture, they hold text; `text` itself asks nothing and is left out.

    Raises:
        ConfigError: the expert reads plain text, which asks nothing.
        DataError: see `open_source` and `Stream`.
    """
    from datasets import Dataset

    mix = recipe.mix(expert)
    if "mixture" in mix:
        shares = {name: share for name, share in mix["mixture"].items() if name != "text"}
        if not shares:
            raise ConfigError(
                "the mixture holds text only, which asks nothing; on-policy distillation needs prompts: add a domain or a source of messages"
            )
        seed = f"{recipe.seed}-{expert}-prompts"
        rng, streams = random.Random(seed), {name: tasks.examples(name, seed) for name in shares}
        names = [rng.choices(list(shares), list(shares.values()))[0] for _ in range(count)]
        asked = (next(streams[name]) for name in names)
        return Dataset.from_list([{"prompt": example.prompt, "completion": example.answer} for example in asked])
    if plain := sorted(n for n, s in mix["sources"].items() if not s.is_chat):
        raise ConfigError(
            f"expert {expert}: the sources {plain} are plain text, which asks nothing; on-policy distillation needs messages: add a source of them"
        )
    streams, spent, rows = open_streams(recipe, tokenizer, expert), {}, []
    sections = recipe.on_policy or {}, (recipe.merge or {}).get("on_policy") or {}
    known = [section.get("chat_template_kwargs") for section in sections]
    for stream in streams:
        if stream.source.chat_template_kwargs and stream.source.chat_template_kwargs not in known:
            raise ConfigError(
                f"{stream.name}: chat_template_kwargs={stream.source.chat_template_kwargs} are of the source, on-policy distillation "
                "writes prompts with those of its own section: set on_policy.chat_template_kwargs to the same"
            )
        stream.encode = lambda conversation: (
            question(conversation),
            [0],
        )  # in the place of token ids; nothing is scored here
        spent[stream.name] = 0
    while len(rows) < count:
        stream = min(streams, key=lambda s: spent[s.name] / s.source.weight)
        spent[stream.name] += 1
        rows.append(next(stream)[0])
    return Dataset.from_list(rows)


def joint_prompts(recipe, tokenizer, count, shares):
    """`count` questions of several experts in their shares: `prompts`, with a column "teacher" for the expert.

    Args:
        shares: {name of an expert: share}; counts are those nearest to them whose sum is `count`.
    Raises:
        ConfigError: experts of which some ask in messages and some in text.
    """
    from datasets import concatenate_datasets

    exact = {name: share * count / sum(shares.values()) for name, share in shares.items()}
    rest = sorted(exact, key=lambda name: int(exact[name]) - exact[name])[: count - sum(map(int, exact.values()))]
    counts = {name: int(exact[name]) + (name in rest) for name in exact}
    parts = {
        name: prompts(recipe, tokenizer, n, name).add_column("teacher", [name] * n) for name, n in counts.items() if n
    }
    kinds = {name: part.features for name, part in parts.items()}
    if len({str(kind) for kind in kinds.values()}) > 1:
        raise ConfigError(
            f"experts {sorted(kinds)}: some ask in messages and some in text; give all of them sources, or all a mixture"
        )
    return concatenate_datasets(list(parts.values()))


def question(conversation):
    """A conversation as {"prompt", "completion"}, cut before its last answer."""
    messages = conversation["messages"]
    if "tools" in conversation or any(m.get("tool_calls") for m in messages):
        raise DataError(
            "the conversation has tools, which on-policy distillation does not show the student: take another source, or set where"
        )
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or not turns[-1]:
        raise DataError(
            "no message before the assistant's last one: nothing is asked; correct the rows, or leave them out"
        )
    return {"prompt": messages[: turns[-1]], "completion": messages[turns[-1] : turns[-1] + 1]}


def pieces(row):
    """The documents of a row, and pieces of longer ones, as [(input_ids, labels)]."""
    starts = [n for n, position in enumerate(row["position_ids"]) if position == 0]
    ends = [*starts[1:], len(row["input_ids"])]
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in zip(starts, ends, strict=True)]


def collate(rows):
    """Rows of equal length to a batch of tensors [B, T]."""
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in ROW if key in rows[0]}
