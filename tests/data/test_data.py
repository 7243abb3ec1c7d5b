"""What a recipe's sources become: documents with the right labels, rows that keep them apart, shares of tokens, and the
same rows after a stop.
"""

import json
import lzma
from dataclasses import replace
from itertools import islice

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from xlstm_hybrid import data
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.recipe.schema import Recipe, Source
from xlstm_hybrid.training.run_spec import data_digest

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
THOUGHTS = "{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}"
FORGETFUL = CHATML.replace("{{ m['content'] }}", THOUGHTS)  # only the last turn shows its thoughts


def letters(template=CHATML, **special):
    """One token per character: 101 tokens, ASCII and five special ones."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    extra = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **{k: v for k, v in names.items() if v}, **extra
    )


def recipe(folder, sources, length=32, **data_options):
    sections = {"student": {}, "align": {"max_steps": 1}, "distill": {"max_steps": 1}}
    chosen = {"sequence_length": length, "sources": sources, "held_out": 0.0} | data_options
    return Recipe(
        name="r",
        teacher="t",
        out="o",
        data=chosen,
        experts={"e": {"sources": sources}},
        seed=3,
        path=folder / "r.yaml",
        **sections,
    )


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def scored(tokenizer, document):
    return tokenizer.decode([l for l in document[1] if l != -100])


TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
]


# --- documents -------------------------------------------------------------------------------------------------


def test_text_is_scored_from_its_second_token_to_its_end():
    tokenizer = letters()
    ids, labels = data.encode_text(tokenizer, "abc")
    assert tokenizer.decode(ids) == "<s>abc</s>" and labels == [-100, *ids[1:]]
    ids, labels = data.encode_text(letters(bos_token=None), "abc")
    assert letters().decode(ids) == "abc</s>" and labels == [-100, *ids[1:]]  # nothing predicts the first token


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_of_a_conversation_only_the_assistants_words_are_scored(template):
    tokenizer = letters(template)
    ids, labels = data.encode_chat(tokenizer, TALK)
    assert tokenizer.decode(ids).startswith("<s><|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>")
    assert all(l in (-100, i) for i, l in zip(ids, labels, strict=True))
    assert scored(tokenizer, (ids, labels)).replace("\n", "") == "two<|im_end|>four<|im_end|>"
    assert scored(tokenizer, data.encode_chat(tokenizer, TALK, score="last")).replace("\n", "") == "four<|im_end|>"
    # a question without an answer
    assert data.encode_chat(tokenizer, [*TALK, {"role": "user", "content": "and 3+3?"}]) == (ids, labels)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_scored():
    tokenizer = letters(FORGETFUL)
    with pytest.raises(DataError, match=r"does not write turn 1 as it wrote it.*set score: last"):
        data.encode_chat(tokenizer, TALK)
    assert scored(tokenizer, data.encode_chat(tokenizer, TALK, score="last")).startswith("<think>four")


def test_what_no_chat_template_can_write_is_named():
    with pytest.raises(DataError, match="no chat template"):
        data.encode_chat(letters(None), TALK)
    with pytest.raises(DataError, match="no message has the role 'assistant'"):
        data.encode_chat(letters(), TALK[:1])
    with pytest.raises(DataError, match=r"refuses these messages \(roles must alternate"):
        data.encode_chat(letters("{{ raise_exception('roles must alternate') }}"), TALK)
    with pytest.raises(DataError, match="no end token"):
        data.encode_text(letters(eos_token=None), "abc")


# --- sources ---------------------------------------------------------------------------------------------------


def texts(count, length=20, start="t"):
    return [{"text": f"{start}{n:03d}" + "x" * (length - 4), "kind": n % 3} for n in range(count)]


def contents(stream, count, tokenizer):
    return [tokenizer.decode(ids, skip_special_tokens=True)[:4] for ids, _ in islice(stream, count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pass_gives_every_document_once_in_an_order_that_only_the_seed_decides(tmp_path, streaming):
    tokenizer = letters()
    r = recipe(
        tmp_path,
        {"a": {"path": lines(tmp_path / "a.jsonl", texts(23)), "text": "text", "streaming": streaming}},
        shuffle_buffer=5,
    )
    [stream] = data.open_streams(r, tokenizer)
    assert stream.whole != streaming
    first, second = contents(stream, 23, tokenizer), contents(stream, 23, tokenizer)
    everything = [f"t{n:03d}" for n in range(23)]
    assert sorted(first) == sorted(second) == everything and first != second and first != everything
    assert contents(data.open_streams(r, tokenizer)[0], 23, tokenizer) == first
    assert contents(data.open_streams(replace(r, seed=4), tokenizer)[0], 23, tokenizer) != first


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "saved", "folder"])
def test_every_local_format_gives_the_same_documents(tmp_path, suffix):
    from datasets import Dataset

    rows, path = Dataset.from_list(texts(6)), tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        rows.to_json(path)
    elif suffix == "saved":
        rows.save_to_disk(path)
    elif suffix == "folder":
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    else:
        getattr(rows, f"to_{suffix}")(path)
    [stream] = data.open_streams(recipe(tmp_path, {"a": {"path": path.name, "text": "text"}}), letters())
    assert sorted(contents(stream, 6, letters())) == [f"t{n:03d}" for n in range(6)]


def test_where_leaves_out_other_rows_and_prompts_with_answers_become_conversations(tmp_path):
    tokenizer = letters()
    path = lines(tmp_path / "a.jsonl", texts(9))
    [stream] = data.open_streams(
        recipe(tmp_path, {"a": {"path": path, "text": "text", "where": {"kind": [0, 2]}}}), tokenizer
    )
    assert sorted(contents(stream, 6, tokenizer)) == ["t000", "t002", "t003", "t005", "t006", "t008"]
    rows = [{"input": [{"role": "user", "content": "1+1?"}], "output": "two"}]
    path = lines(tmp_path / "b.jsonl", rows)
    [stream] = data.open_streams(
        recipe(tmp_path, {"b": {"path": path, "prompt": "input", "completion": "output"}}), tokenizer
    )
    document = next(stream)
    path = lines(tmp_path / "d.jsonl", [{"prompt": TALK[:1], "completion": TALK[1:2]}])
    [stream] = data.open_streams(
        recipe(tmp_path, {"b": {"path": path, "prompt": "prompt", "completion": "completion"}}), tokenizer
    )
    assert next(stream) == document
    path = lines(tmp_path / "c.jsonl", [{"q": "1+1?", "a": "two"}])
    [stream] = data.open_streams(recipe(tmp_path, {"c": {"path": path, "prompt": "q", "completion": "a"}}), tokenizer)
    assert document == next(stream) == data.encode_chat(tokenizer, TALK[:2])


def test_held_out_documents_are_a_property_of_the_text_and_never_trained_on(tmp_path):
    tokenizer, path = letters(), lines(tmp_path / "a.jsonl", texts(60))
    r = recipe(tmp_path, {"a": {"path": path, "text": "text"}}, held_out=0.3)
    [train], [test] = data.open_streams(r, tokenizer), data.open_streams(r, tokenizer, test=True)
    kept, apart = set(contents(train, 200, tokenizer)), set(contents(test, 200, tokenizer))
    assert not kept & apart and len(kept | apart) == 60 and 8 <= len(apart) <= 30
    [other] = data.open_streams(replace(r, seed=9), tokenizer, test=True)
    assert set(contents(other, 200, tokenizer)) == apart


def compressed(path, rows):
    with lzma.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.mark.parametrize("streaming", [False, True])
def test_a_held_out_split_is_all_that_is_evaluated_on_and_nothing_else_is_held_out(tmp_path, streaming):
    tokenizer = letters()
    compressed(tmp_path / "a.jsonl.xz", texts(40))
    compressed(tmp_path / "b.jsonl.xz", texts(9, start="u"))
    files = {"data_files": {"train": "a.jsonl.xz", "test": "b.jsonl.xz"}, "held_out_split": "test"}
    split = {"path": str(tmp_path), "text": "text", "streaming": streaming, **files}
    share = {"path": lines(tmp_path / "c.jsonl", texts(40, start="v")), "text": "text"}
    r = recipe(tmp_path, {"split": split, "share": share}, held_out=0.3)
    train, test = data.open_streams(r, tokenizer), data.open_streams(r, tokenizer, test=True)
    assert sorted(contents(train[0], 40, tokenizer)) == [f"t{n:03d}" for n in range(40)]
    assert sorted(contents(test[0], 9, tokenizer)) == [f"u{n:03d}" for n in range(9)]
    apart = set(contents(test[1], 100, tokenizer))
    assert 5 <= len(apart) <= 20 and not apart & set(contents(train[1], 100, tokenizer))


def test_conversations_have_a_held_out_split_too(tmp_path):
    tokenizer, rows = letters(), {"a": [{"q": "1+1?", "a": "two"}], "b": [{"q": "2+2?", "a": "four"}]}
    files = {split: lines(tmp_path / f"{split}.jsonl", of) for split, of in rows.items()}
    source = {"path": str(tmp_path), "data_files": files, "split": "a", "held_out_split": "b"}
    r = recipe(tmp_path, {"s": source | {"prompt": "q", "completion": "a"}}, length=64)
    [row], [held_out] = (data.packed_rows(r, tokenizer, 1, test=test) for test in (False, True))
    found = [scored(tokenizer, (of["input_ids"], of["labels"])).split("<|im_end|>")[0] for of in (row, held_out)]
    assert found == ["two", "four"]


def test_a_source_of_weight_0_is_evaluated_on_and_never_read_in_training(tmp_path):
    tokenizer = letters()
    both = {"path": lines(tmp_path / "a.jsonl", texts(20)), "text": "text"}
    only = {"path": lines(tmp_path / "b.jsonl", texts(5, start="u")), "text": "text"}
    only |= {"weight": 0, "held_out_split": "train"}
    r = recipe(tmp_path, {"a": both, "b": only}, held_out=0.3)
    assert [s.name for s in data.open_streams(r, tokenizer, test=True)] == ["a", "b"]
    assert sorted(contents(data.open_streams(r, tokenizer, test=True)[1], 5, tokenizer)) == [
        f"u{n:03d}" for n in range(5)
    ]
    for test in (False, True):
        rows = data.packed_rows(r, tokenizer, 20, test=test)
        assert "u" not in tokenizer.decode([token for row in rows for token in row["input_ids"]])
    assert len(data.train_dataset(r, tokenizer, 4, "e", cache=str(tmp_path))) == 4


BAD = {
    r"cannot be opened .*split \('dev'\)": {"path": "a.jsonl", "text": "text", "held_out_split": "dev"},
    r"no columns \['body'\], it has \['kind', 'text'\]": {"path": "a.jsonl", "text": "body"},
    r"nowhere.jsonl: no such file or folder": {"path": "nowhere.jsonl", "text": "text"},
    r"a.zip: expected a file of one of": {"path": "a.zip", "text": "text"},
    r"cannot be opened .*split \('test'\)": {"path": "a.jsonl", "text": "text", "split": "test"},
    r"somebody/something: cannot be opened": {"path": "somebody/something", "text": "text"},
    r"a, row \d+ of block 0: expected a list of messages": {"path": "a.jsonl", "messages": "text"},
    r"a, row \d+ of block 0: column 'kind' holds a int, expected text": {"path": "a.jsonl", "text": "kind"},
    r"none of 0 rows in a whole pass is with a scored token": {"path": "a.jsonl", "text": "text", "where": {"kind": 7}},
}


@pytest.mark.parametrize("message", BAD)
def test_a_source_that_cannot_be_read_is_named_with_its_place(tmp_path, message):
    lines(tmp_path / "a.jsonl", [{"text": f"text {n}", "kind": 1} for n in range(4)])
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match=message):
        r = recipe(tmp_path, {"a": BAD[message]})
        next(data.open_streams(r, letters(), test="held_out_split" in BAD[message])[0])


def test_empty_documents_are_left_out_with_a_warning_and_too_many_are_an_error(tmp_path):
    rows = [{"text": t} for t in ("one", "", "two", "  ", None)]
    [stream] = data.open_streams(
        recipe(tmp_path, {"a": {"path": lines(tmp_path / "a.jsonl", rows), "text": "text"}}), letters()
    )
    with pytest.warns(UserWarning, match="a: 3 of 5 rows are empty"):
        found = contents(stream, 3, letters())
    assert sorted(found[:2]) == ["one", "two"]
    rows = [{"text": "one" if n % 3 == 0 else ""} for n in range(400)]
    [stream] = data.open_streams(
        recipe(tmp_path, {"b": {"path": lines(tmp_path / "b.jsonl", rows), "text": "text"}}), letters()
    )
    with pytest.raises(DataError, match=r"b: \d+ of \d+ rows are empty or have nothing to score"):
        contents(stream, 400, letters())


# --- rows ------------------------------------------------------------------------------------------------------


def two_sources(folder, streaming=False, **options):
    a = {"path": lines(folder / "a.jsonl", texts(40, 50, "a")), "text": "text", "weight": 3, "streaming": streaming}
    b = {
        "path": lines(folder / "b.jsonl", [{"messages": TALK}] * 7),
        "messages": "messages",
        "weight": 1,
        "streaming": streaming,
    }
    return recipe(folder, {"a": a, "b": b}, **options)


def test_rows_are_full_and_hold_their_documents_apart(tmp_path):
    tokenizer = letters()
    for row in islice(data.open_rows(two_sources(tmp_path), tokenizer), 30):
        assert {key: len(value) for key, value in row.items()} == dict.fromkeys(data.rows.ROW, 32)
        assert row["position_ids"][0] == 0
        for ids, labels in data.pieces(row):
            assert labels[0] == -100 and all(l in (-100, i) for i, l in zip(ids, labels, strict=True))
            assert tokenizer.bos_token_id not in ids[1:] and tokenizer.eos_token_id not in ids[:-1]
        assert any(l != -100 for l in row["labels"])


def test_long_text_goes_on_in_the_next_row_and_a_long_conversation_is_cut(tmp_path):
    tokenizer = letters()
    text = {"path": lines(tmp_path / "a.jsonl", [{"text": "".join(map(chr, range(33, 103)))}]), "text": "text"}
    rows = list(islice(data.open_rows(recipe(tmp_path, {"a": text}), tokenizer), 9))
    ids = [i for row in rows for i in row["input_ids"]]
    whole, _ = data.encode_text(tokenizer, "".join(map(chr, range(33, 103))))
    assert ids == (whole * 5)[: len(ids)]  # not a token is lost
    unscored = [t for t, label in enumerate(l for row in rows for l in row["labels"]) if label == -100]
    # but where nothing predicts one
    assert unscored == sorted({*range(0, len(ids), 32), *range(0, len(ids), len(whole))})
    cut = data.open_rows(recipe(tmp_path, {"a": text | {"overlong": "cut"}}), tokenizer)
    assert all(row["input_ids"] == whole[:32] for row in islice(cut, 4))
    chat = {"path": lines(tmp_path / "b.jsonl", [{"messages": TALK}]), "messages": "messages"}
    for row in islice(data.open_rows(recipe(tmp_path, {"b": chat}, length=48), tokenizer), 4):
        assert all(ids[0] == tokenizer.bos_token_id for ids, _ in data.pieces(row))  # no answer without its question


def test_sources_are_mixed_by_their_shares_of_tokens(tmp_path):
    rows = data.open_rows(two_sources(tmp_path), letters())
    list(islice(rows, 200))
    assert rows.spent["a"] / sum(rows.spent.values()) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop", [1, 13, 40])
def test_rows_go_on_exactly_where_their_state_was_taken(tmp_path, streaming, stop):
    r = two_sources(tmp_path, streaming, shuffle_buffer=7)
    whole = list(islice(data.open_rows(r, letters()), stop + 90))
    rows = data.open_rows(r, letters())
    list(islice(rows, stop))
    state = json.loads(json.dumps(rows.state_dict()))
    list(islice(rows, 5))  # what happens after the state was taken does not matter
    resumed = data.open_rows(r, letters())
    resumed.load_state_dict(state)
    assert list(islice(resumed, 90)) == whole[stop:] and resumed.count == stop + 90


def test_a_state_of_other_sources_is_refused(tmp_path):
    rows = data.open_rows(two_sources(tmp_path), letters())
    with pytest.raises(DataError, match=r"of the sources \['x'\], the recipe has \['a', 'b'\]"):
        rows.load_state_dict({"streams": {"x": {}}})


def test_a_conversation_that_fits_a_row_is_never_cut(tmp_path):
    """Of conversations of .6 and .3 rows each row holds whole ones; a gap is padding, or text where there is some."""
    tokenizer = letters()
    [long, short] = [[TALK[0], {"role": "assistant", "content": words}] for words in ("four" * 6, "two")]
    chat = {"path": lines(tmp_path / "b.jsonl", [{"messages": long}, {"messages": short}] * 9), "messages": "messages"}
    whole = [data.encode_chat(tokenizer, messages)[0] for messages in (long, short)]
    assert [len(ids) for ids in whole] == [50, 29]
    rows = list(islice(data.open_rows(recipe(tmp_path, {"b": chat}, length=84), tokenizer), 20))
    found = [ids for row in rows for ids, labels in data.pieces(row) if any(l != -100 for l in labels)]
    assert all(ids in whole for ids in found) and found.count(whole[0]) == found.count(whole[1]) == 20
    gaps = [ids for row in rows for ids, labels in data.pieces(row) if all(l == -100 for l in labels)]
    assert gaps == [[tokenizer.pad_token_id] * 5] * 20
    text = {"path": lines(tmp_path / "a.jsonl", [{"text": "x" * 300}]), "text": "text"}
    chat |= {"path": lines(tmp_path / "c.jsonl", [{"messages": long}])}
    rows = data.open_rows(recipe(tmp_path, {"b": chat, "a": text}, length=84), tokenizer)
    taken = list(islice(rows, 120))
    assert all(tokenizer.pad_token_id not in row["input_ids"] for row in taken)
    chats = [ids for row in taken for ids, _ in data.pieces(row) if len(ids) > 1 and ids[1] == whole[0][1]]
    assert all(ids == whole[0] for ids in chats) and 50 * len(chats) / (120 * 84) == pytest.approx(0.5, abs=0.02)


def test_what_is_longer_than_a_row_is_counted_and_left_out_without_an_answer_in_it(tmp_path):
    tokenizer = letters()
    [answer, question] = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        for ask, say in (("1", "x" * 60), ("1" * 60, "x"))
    ]
    rows = [{"messages": TALK[:2]}] * 2 + [{"messages": answer}] * 3 + [{"messages": question}] * 5
    chat = {"path": lines(tmp_path / "b.jsonl", rows), "messages": "messages"}
    packed = data.open_rows(recipe(tmp_path, {"b": chat}, length=40), tokenizer)
    with pytest.warns(UserWarning) as seen:
        found = [tokenizer.decode(ids) for row in packed.take(10) for ids, _ in data.pieces(row)]
    counts = packed.counts["b"]
    assert counts["left_out"] >= 5 and counts["cut"] >= 8 > 0 and counts["read"] > counts["cut"]
    message = f"{counts['cut']} of {counts['read']} documents are longer than a row of 40 tokens"
    assert message in str(seen[-1].message) or message in str(seen[-2].message)
    assert "longer than a row of 40 tokens" in str(seen[0].message)  # at once, and not only at the end
    assert not any("111" in text for text in found) and any(text.endswith("xxx") for text in found)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_whose_questions_fill_every_row_end_in_an_error_that_counts_them(tmp_path, streaming):
    rows = [{"messages": [{"role": "user", "content": "1" * n}, TALK[1]]} for n in (50, 60, 70)]
    chat = {"path": lines(tmp_path / "b.jsonl", rows), "messages": "messages", "streaming": streaming}
    shortest = 2 + 5 + 50 + 2 + 11 + 1  # <s>, headers, the question, and the first token of its answer
    message = (
        rf"b: none of \d+ documents has a scored token within a row of 32 tokens .* is its token {shortest}: raise it"
    )
    with pytest.raises(DataError, match=message), pytest.warns(UserWarning, match="1 with nothing scored"):
        next(data.open_rows(recipe(tmp_path, {"b": chat}), letters()))
    split = recipe(tmp_path, {"b": chat | {"overlong": "split"}})
    row = next(data.open_rows(split, letters()))
    assert any(label != -100 for label in row["labels"])


def test_what_is_cut_off_does_not_count_in_the_share_of_its_source(tmp_path):
    chat = [{"messages": [TALK[0], {"role": "assistant", "content": "y" * 200}]}]
    sources = {
        "chat": {"path": lines(tmp_path / "b.jsonl", chat), "messages": "messages"},
        "text": {"path": lines(tmp_path / "a.jsonl", texts(9, 70)), "text": "text"},
    }
    rows = list(islice(data.open_rows(recipe(tmp_path, sources), letters()), 400))
    y, x = (letters().convert_tokens_to_ids(letter) for letter in "yx")
    chats = sum(row["input_ids"][1] == letters().convert_tokens_to_ids("<|im_start|>") for row in rows)
    assert chats / 400 == pytest.approx(0.5, abs=0.02) and any(x in row["input_ids"] for row in rows)
    assert any(y in row["input_ids"] for row in rows)


def test_a_state_of_a_version_that_packs_in_another_way_is_refused(tmp_path):
    rows = data.open_rows(two_sources(tmp_path), letters())
    list(islice(rows, 3))
    state = rows.state_dict()
    del state["packing"]
    with pytest.raises(DataError, match="the state is of packing 1, this version has 2"):
        rows.load_state_dict(state)
    # a trainer that goes on with a stream knows its data by this
    streamed = data.train_dataset(two_sources(tmp_path, streaming=True), letters(), 12)
    assert data_digest(streamed) == "stream, rows of packing 2"
    text = {"a": {"path": "a.jsonl", "text": "text", "streaming": True}}  # packed as ever
    assert data_digest(data.train_dataset(recipe(tmp_path, text), letters(), 12)) == "stream"


# --- data sets -------------------------------------------------------------------------------------------------


def test_a_data_set_on_disk_and_a_streaming_one_hold_the_same_kind_of_rows(tmp_path):
    from datasets import Dataset, IterableDataset

    r, tokenizer = two_sources(tmp_path), letters()
    stored = data.train_dataset(r, tokenizer, 12, cache=str(tmp_path / "cache"))
    assert isinstance(stored, Dataset) and len(stored) == 12 and list(stored) == data.packed_rows(r, tokenizer, 12)
    assert (
        list(data.train_dataset(r, tokenizer, 12, "e", cache=str(tmp_path / "cache")))
        == data.packed_rows(r, tokenizer, 12, "e")
        != list(stored)
    )
    streamed = data.train_dataset(two_sources(tmp_path, streaming=True), tokenizer, 12)
    assert isinstance(streamed, IterableDataset) and len(list(streamed)) == 12 == len(list(streamed))
    batch = data.collate(list(streamed)[:3])
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(data.rows.ROW, (3, 32))


def test_an_error_inside_the_data_keeps_its_name(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataError, match="a, row 0 of block 0: no message has the role 'assistant'"):
        data.train_dataset(
            recipe(tmp_path, {"a": {"path": path, "messages": "messages"}}), letters(), 2, cache=str(tmp_path / "cache")
        )


def test_prompts_are_conversations_up_to_their_last_answer(tmp_path):
    chat = {"path": lines(tmp_path / "b.jsonl", [{"messages": TALK}] * 3), "messages": "messages"}
    found = data.prompts(recipe(tmp_path, {"b": chat}), letters(), 4, "e")
    assert found.to_list() == [{"prompt": TALK[:3], "completion": TALK[3:]}] * 4
    text = {"path": lines(tmp_path / "a.jsonl", texts(3)), "text": "text"}
    with pytest.raises(ConfigError, match=r"the sources \['a'\] are plain text, which asks nothing"):
        data.prompts(recipe(tmp_path, {"a": text}), letters(), 4, "e")
    answer = {"path": lines(tmp_path / "c.jsonl", [{"messages": TALK[1:2]}]), "messages": "messages"}
    with pytest.raises(DataError, match="c, row 0 of block 0: no message before the assistant's last one"):
        data.prompts(recipe(tmp_path, {"c": answer}), letters(), 4, "e")


def test_the_tiny_domains_ask_in_the_shares_of_their_mixture(tmp_path):
    r = replace(recipe(tmp_path, {}), experts={"e": {"arithmetic": 0.75, "recall": 0.25, "text": 5.0}})
    found = data.prompts(r, letters(), 400, "e").to_list()
    assert len(found) == 400 and 0.15 < sum(q["prompt"].startswith("recall") for q in found) / 400 < 0.35
    assert all(
        str(eval(q["prompt"].rstrip("="))) == q["completion"]
        for q in found
        if q["prompt"].endswith("=") and "recall" not in q["prompt"]
    )


def test_a_sources_faults_are_listed():
    assert Source("x", text="t").faults() == []
    assert len(Source("", weight=-1, score="all").faults()) == 4
