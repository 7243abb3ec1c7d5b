"""Packed rows of T tokens, of a mix of sources or of the tiny domains, and the data sets that the trainers read."""

import copy
import hashlib
import json
import random
from itertools import islice

from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.data.documents import IGNORE
from xlstm_hybrid.data.streams import SHUFFLE_BUFFER, Stream, open_source
from xlstm_hybrid.errors import ConfigError, DataError, XLSTMHybridError

HELD_OUT_SEED = 1_000_003  # added to the seed of the tiny domains for rows that nothing trains on
HELD_OUT = 0.01  # share of a source's documents that nothing trains on
ROW = ("input_ids", "labels", "position_ids")


class Rows:
    """Packed rows of `length` tokens from several streams, without end: a list of ints for each name of `ROW`.

    The source furthest below its share of tokens comes next. Positions restart with each document, and with each piece
    of one that goes on in the next row. Rows with nothing to score are left out. `state_dict()` is plain JSON data;
    `load_state_dict` goes on exactly after that row.
    """

    def __init__(self, streams, length):
        self.streams, self.length = {s.name: s for s in streams}, length
        self.spent, self.rest, self.count = dict.fromkeys(self.streams, 0), None, 0

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            row = {key: [] for key in ROW}
            while len(row["input_ids"]) < self.length:
                self.fill(row)
            if any(label != IGNORE for label in row["labels"]):
                self.count += 1
                return row

    def fill(self, row):
        """Put the next document, or as much of it as there is room for, into the row."""
        if self.rest is None:
            name = min(self.streams, key=lambda n: self.spent[n] / self.streams[n].source.weight)
            source, (ids, labels) = self.streams[name].source, next(self.streams[name])
            self.spent[name] += len(ids)
            self.rest = ids, labels, (source.overlong or ("cut" if source.is_chat else "split")) == "split"
        ids, labels, splits = self.rest
        room = self.length - len(row["input_ids"])
        row["input_ids"] += ids[:room]
        row["labels"] += [IGNORE, *labels[1:room]]  # nothing predicts a first token, that of a continued piece neither
        row["position_ids"] += range(min(room, len(ids)))
        self.rest = (ids[room:], labels[room:], splits) if splits and len(ids) > room else None

    def state_dict(self):
        state = {"spent": self.spent, "rest": self.rest, "count": self.count}
        return copy.deepcopy(state | {"streams": {name: stream.state for name, stream in self.streams.items()}})

    def load_state_dict(self, state):
        """Raises DataError for a state of other sources."""
        if set(state["streams"]) != set(self.streams):
            raise DataError(
                f"the state is of the sources {sorted(state['streams'])}, the recipe has {sorted(self.streams)}: start the data anew"
            )
        state = copy.deepcopy(state)
        self.spent, self.rest, self.count = state["spent"], state["rest"], state["count"]
        for name, stream in self.streams.items():
            stream.resume(state["streams"][name])


def open_streams(recipe, tokenizer, expert=None, test=False):
    """The streams of stage I, or of one expert, from the recipe's sources; `test`: of documents not trained on.

    Raises:
        DataError: see `open_source`.
    """
    data, name = recipe.data, "align" if expert is None else expert
    rest = data.get("shuffle_buffer", SHUFFLE_BUFFER), data.get("held_out", HELD_OUT), test
    return [
        Stream(n, source, open_source(source, recipe), tokenizer, f"{recipe.seed}-{name}", *rest)
        for n, source in recipe.mix(expert)["sources"].items()
    ]


def open_rows(recipe, tokenizer, expert=None, test=False):
    """Rows of stage I, or of one expert, from the recipe's sources."""
    return Rows(open_streams(recipe, tokenizer, expert, test), recipe.length)


def packed_rows(recipe, tokenizer, count, expert=None, test=False):
    """A list of `count` packed rows of a stage; `test`: rows that nothing trains on."""
    mix = recipe.mix(expert)
    if "sources" in mix:
        return list(islice(open_rows(recipe, tokenizer, expert, test), count))
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
        return islice(open_rows(recipe, tokenizer, expert), count)

    if any(not s.whole for s in open_streams(recipe, tokenizer, expert)):
        return IterableDataset.from_generator(rows, features=features)
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
            raise ConfigError("the mixture holds text only, which asks nothing; on-policy distillation needs prompts")
        seed = f"{recipe.seed}-{expert}-prompts"
        rng, streams = random.Random(seed), {name: tasks.examples(name, seed) for name in shares}
        names = [rng.choices(list(shares), list(shares.values()))[0] for _ in range(count)]
        asked = (next(streams[name]) for name in names)
        return Dataset.from_list([{"prompt": example.prompt, "completion": example.answer} for example in asked])
    if plain := sorted(n for n, s in mix["sources"].items() if not s.is_chat):
        raise ConfigError(
            f"expert {expert}: the sources {plain} are plain text, which asks nothing; on-policy distillation needs messages"
        )
    streams, spent, rows = open_streams(recipe, tokenizer, expert), {}, []
    for stream in streams:
        stream.encode = lambda messages: (question(messages), [0])  # in the place of token ids; nothing is scored here
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


def question(messages):
    """A conversation as {"prompt", "completion"}, cut before its last answer."""
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or not turns[-1]:
        raise DataError("no message before the assistant's last one: nothing is asked")
    return {"prompt": messages[: turns[-1]], "completion": messages[turns[-1] : turns[-1] + 1]}


def collate(rows):
    """Rows of equal length to a batch of tensors [B, T]."""
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in ROW if key in rows[0]}
