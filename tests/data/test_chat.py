"""Conversations as data sets hold them: what the template is given of a row, and what of its words is scored."""

import json
import warnings

import pytest
from data.test_data import CHATML, TALK, letters, lines, recipe, scored
from typer.testing import CliRunner

from xlstm_hybrid import cli, data
from xlstm_hybrid.data.documents import content_of
from xlstm_hybrid.data.streams import open_source
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.recipe.schema import Source

TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": {"type": "integer"}}}}]
HEAD = "{% if tools %}TOOLS {{ tools|tojson }}\n{% endif %}"
TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} ARGUMENTS{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_JSON = HEAD + TURN.replace("ARGUMENTS", "{{ c.function.arguments|tojson }}")
AS_TEXT = HEAD + TURN.replace("ARGUMENTS", "{{ c.function.arguments }}")
EITHER = HEAD + TURN.replace(
    "ARGUMENTS",
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments|tojson }}{% endif %}",
)
PAIRS = HEAD + TURN.replace("ARGUMENTS", "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}")


def call(arguments, content="", **more):
    asked = {"role": "user", "content": "add"}
    return [
        asked,
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"function": {"name": "sum", "arguments": arguments}}],
            **more,
        },
    ]


def written(template, row, score="assistant"):
    """`(all, scored)` words of a conversation."""
    tokenizer = letters(template)
    document = data.encode_chat(tokenizer, row, score)
    return tokenizer.decode(document[0]), scored(tokenizer, document)


def read(folder, rows, **fields):
    """The conversations of a parquet file, as the streams read them."""
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    source = Source(path="rows.parquet", **({"messages": "messages"} | fields))
    return [content_of(row, source)[0] for row in open_source(source, recipe(folder, {}))]


# --- what a row holds ----------------------------------------------------------------------------------------------


def test_keys_that_arrow_takes_from_other_rows_are_not_written(tmp_path):
    other = [{"type": "function", "function": {"name": "sum", "parameters": {"b": {"type": "string", "enum": ["x"]}}}}]
    rows = [{"messages": call({"a": 1}), "tools": TOOLS}, {"messages": call({"b": "x", "c": [1, 2]}), "tools": other}]
    first, second = read(tmp_path, rows)
    assert first == {"messages": call({"a": 1}), "tools": TOOLS}
    assert second == {"messages": call({"b": "x", "c": [1, 2]}), "tools": other}
    whole, answer = written(AS_JSON, first)
    assert whole.startswith(
        f"TOOLS {json.dumps(TOOLS)}\n<|im_start|>user"
    ) and answer == 'CALL sum{"a": 1}<|im_end|>\n'.replace("sum", "sum ")


def test_calls_that_are_none_are_no_key_and_calls_in_json_text_are_calls(tmp_path):
    """Templates ask whether there is a key: an empty list of calls would be one call too few for Llama's."""
    silent, calls = [TALK[0], TALK[1] | {"tool_calls": "[]"}], call({"a": 1})
    text = [calls[0], calls[1] | {"tool_calls": json.dumps(calls[1]["tool_calls"])}]
    assert read(tmp_path, [{"messages": silent}, {"messages": text}]) == [{"messages": TALK[:2]}, {"messages": calls}]
    rows = [{"messages": [TALK[0], TALK[1] | {"tool_calls": []}]}, {"messages": calls}]
    assert read(tmp_path, rows) == [{"messages": TALK[:2]}, {"messages": calls}]


@pytest.mark.parametrize("form", ["list", "text", "texts", "first message", "column"])
def test_tools_come_from_a_column_or_the_first_message_as_schemas_or_their_json(tmp_path, form):
    value = {"text": json.dumps(TOOLS), "texts": [json.dumps(t) for t in TOOLS]}.get(form, TOOLS)
    messages = [{"role": "system", "content": "be short"}, *TALK[:2]]
    row = {"messages": messages, {"column": "functions"}.get(form, "tools"): value}
    if form == "first message":
        row = {"messages": [messages[0] | {"tools": json.dumps(TOOLS)}, *messages[1:]]}
    [found] = read(tmp_path, [row], **({"tools": "functions"} if form == "column" else {}))
    assert found == {"messages": messages, "tools": TOOLS}


def test_tools_that_contradict_or_are_none_are_named_and_none_of_them_is_no_tools(tmp_path):
    assert read(tmp_path, [{"messages": TALK, "tools": "[]"}]) == [{"messages": TALK}]
    with pytest.raises(DataError, match="tools are 'add them', expected a list of JSON schemas"):
        read(tmp_path, [{"messages": TALK, "tools": "add them"}])
    inside = [TALK[0] | {"tools": json.dumps(TOOLS)}, *TALK[1:]]
    with pytest.raises(DataError, match="tools in a column and others in its first message"):
        read(tmp_path, [{"messages": inside, "tools": [{"name": "other"}]}])
    assert read(tmp_path, [{"messages": inside, "tools": [{"name": "other"}]}], leave_out=["tools"]) == [
        {"messages": TALK}
    ]
    with pytest.raises(DataError, match="message 2 has tools: move them into the first message"):
        read(tmp_path, [{"messages": [*TALK[:2], inside[0], TALK[1]]}])
    with pytest.raises(DataError, match=r"no columns \['tols'\]"):
        read(tmp_path, [{"messages": TALK}], tools="tols")


def test_settings_of_the_template_come_from_the_source_and_the_row_goes_before(tmp_path):
    rows = [{"messages": TALK[:2], "chat_template_kwargs": own} for own in ({"mood": "gay"}, {"style": "dry"}, None)]
    found = read(tmp_path, rows, chat_template_kwargs={"mood": "sad"})
    assert [c.get("chat_template_kwargs") for c in found] == [
        {"mood": "gay"},
        {"mood": "sad", "style": "dry"},
        {"mood": "sad"},
    ]
    [plain] = read(tmp_path, rows[:1], leave_out=["chat_template_kwargs"])
    assert plain == {"messages": TALK[:2]}
    assert written("{{ mood }}:" + CHATML, found[0])[0].startswith("gay:<s>")
    with pytest.raises(DataError, match=r"chat_template_kwargs \['mood'\]: the chat template reads no such names"):
        written(CHATML, found[0])
    with pytest.raises(DataError, match="expected names that the template reads"):
        read(tmp_path, [{"messages": TALK, "chat_template_kwargs": {"tokenize": False}}])


def test_a_sources_fields_for_chat_are_checked():
    assert Source("x", messages="m", tools="t", chat_template_kwargs={"a": 1}, leave_out=["name"]).faults() == []
    wrong = [
        {"tools": ""},
        {"chat_template_kwargs": {"tools": []}},
        {"chat_template_kwargs": [1]},
        {"leave_out": "name"},
    ]
    for fields in (*wrong, {"leave_out": ["content"]}):
        [fault] = Source("x", messages="m", **fields).faults()
        assert fault.startswith(next(iter(fields)))
    assert "are of chat" in Source("x", text="t", tools="t").faults()[0]


# --- what the template writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT, EITHER], ids=["as json", "as text", "either"])
@pytest.mark.parametrize("arguments", [{"a": 1, "b": "x's"}, '{"a": 1, "b": "x\'s"}'], ids=["dict", "text"])
def test_arguments_of_a_call_are_written_once_whichever_form_the_template_reads(template, arguments):
    """A dict that is not made JSON would be Python's, JSON text that is made JSON once more would have backslashes."""
    assert written(template, call(arguments))[1] == 'CALL sum {"a": 1, "b": "x\'s"}<|im_end|>\n'


def test_a_template_that_reads_arguments_one_by_one_gets_a_dict():
    assert written(PAIRS, call('{"a": 1, "b": 2}'))[1] == "CALL sum a=1;b=2;<|im_end|>\n"
    assert written(PAIRS, call({}))[1] == "CALL sum <|im_end|>\n"
    quoted = call({"a": 1}, content="as Python: {'a': 1} ")  # words of the conversation are no mistake of the template
    assert written(AS_JSON, quoted)[1] == "as Python: {'a': 1} CALL sum {\"a\": 1}<|im_end|>\n"
    with pytest.raises(DataError, match="neither from a dict nor from JSON text"):
        written(
            HEAD
            + TURN.replace(
                "ARGUMENTS",
                "{{ c.function.arguments|tojson if c.function.arguments is string else c.function.arguments }}",
            ),
            call({"a": "b"}),
        )


def test_parts_of_text_are_joined_unless_the_template_reads_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}, TALK[1]]
    assert written(CHATML, parts) == written(CHATML, TALK[:2])
    by_part = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% else %}{{ m.content }}{% endif %}",
    )
    assert "user\n1+|1?|<|im_end|>" in written(by_part, parts)[0]


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "video"])
def test_a_part_that_is_no_text_is_refused_by_name(tmp_path, kind):
    parts = [{"type": kind, "text": None}, {"type": "text", "text": "what is it?"}]
    with pytest.raises(DataError, match=f"content has a part of type '{kind}', expected text only"):
        read(
            tmp_path, [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]}]
        )


def test_what_a_template_would_pass_over_is_refused_unless_it_is_left_out_on_purpose(tmp_path):
    rows = {
        "tools": {"messages": TALK[:2], "tools": TOOLS},
        "tool_calls": {"messages": call({"a": 1}, "words")},
        "reasoning_content": {"messages": [TALK[0], TALK[1] | {"reasoning_content": "hm"}]},
    }
    for key, row in rows.items():
        with pytest.raises(DataError, match=rf"writes nothing of '{key}', which would be lost.*leave_out: \[{key}\]"):
            written(CHATML, row)
        [left] = read(tmp_path, [row], leave_out=[key])
        assert written(CHATML, left)[1] in ("two<|im_end|>\n", "words<|im_end|>\n")
    assert written(AS_JSON, rows["reasoning_content"])[1] == "<think>hm</think>two<|im_end|>\n"
    earlier = [TALK[0], TALK[1] | {"reasoning_content": "hm"}, *TALK[2:]]  # thoughts of earlier turns may be left out
    assert written(CHATML, earlier, "last")[1] == "four<|im_end|>\n"


def test_a_tokenizer_with_several_templates_takes_that_for_tools():
    tokenizer = letters({"default": CHATML, "tool_use": AS_JSON})
    assert tokenizer.decode(data.encode_chat(tokenizer, {"messages": TALK[:2], "tools": TOOLS})[0]).startswith("TOOLS")
    assert data.encode_chat(tokenizer, TALK) == data.encode_chat(letters(), TALK)


def test_questions_for_on_policy_distillation_have_no_tools_and_the_sections_settings(tmp_path):
    rows = lines(tmp_path / "a.jsonl", [{"messages": TALK[:2], "tools": TOOLS}])
    with pytest.raises(DataError, match="the conversation has tools, which on-policy distillation does not show"):
        data.prompts(recipe(tmp_path, {"a": {"path": rows, "messages": "messages"}}), letters(), 1, "e")
    source = {"path": rows, "messages": "messages", "chat_template_kwargs": {"mood": "sad"}, "leave_out": ["tools"]}
    with pytest.raises(ConfigError, match="set on_policy.chat_template_kwargs to the same"):
        data.prompts(recipe(tmp_path, {"a": source}), letters(), 1, "e")


# --- the end of a turn ---------------------------------------------------------------------------------------------

WORDS = "{% generation %}{{ m.content }}{% endgeneration %}"
HEADER = "<|im_start|>{{ m.role }}\n"
OUTSIDE = {  # {template: what is scored of two turns}
    "ChatML": (HEADER + "WORDS<|im_end|>\n", "two<|im_end|>four<|im_end|>"),
    "Llama 3": (HEADER + "\nWORDS{{ '</s>' if loop.last else '<|im_end|>' }}", "two<|im_end|>four</s>"),
    "Mistral": ("{% if m.role == 'user' %}[A]{{ m.content }}[B]{% else %} WORDS</s>{% endif %}", "two</s>four</s>"),
    "thoughts": (
        HEADER + "{% generation %}<think>\n\n</think>\n\n{{ m.content }}{% endgeneration %}{{ '\\n' }}<|im_end|>\n",
        "<think>\n\n</think>\n\ntwo\n<|im_end|><think>\n\n</think>\n\nfour\n<|im_end|>",
    ),
    "text": (HEADER + "WORDS### END\n", "two### END\nfour### END\n"),
}
INSIDE = HEADER + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"


def marked(turn):
    """A template of such turns; the user's have no marks."""
    plain = turn.replace("WORDS", "{{ m.content }}").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + turn.replace("WORDS", WORDS)
        + "{% else %}"
        + plain
        + "{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.filterwarnings("ignore:the chat template ends")
def test_the_end_of_a_turn_is_scored_where_the_marks_leave_it_out(name):
    turn, expected = OUTSIDE[name]
    whole, answers = written(marked(turn), TALK)
    assert answers == expected
    last = written(marked(turn), TALK, "last")
    assert (
        last[0] == whole
        and last[1]
        == expected[expected.index("four") - (len("<think>\n\n</think>\n\n") if name == "thoughts" else 0) :]
    )


def test_marks_that_hold_the_end_are_taken_as_they_are():
    """What follows them is the header of the next turn, which the student does not write."""
    assert written(marked(INSIDE), TALK)[1] == "two<|im_end|>\nfour<|im_end|>\n"
    assert written(marked(INSIDE), TALK, "last")[1] == "four<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, marked("WORDS\n")], ids=["prefixes", "marked"])
def test_a_template_without_an_end_of_turn_is_warned_of(template):
    with pytest.warns(UserWarning, match="ends the assistant's turn with 'r' and no special token"):
        assert written(template.replace("<|im_end|>", ""), TALK, "last")[1].strip() == "four"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(CHATML, TALK)


# --- what is shown -------------------------------------------------------------------------------------------------


def test_the_scored_words_of_a_document_are_told_from_the_others():
    tokenizer = letters()
    runs = data.scored_runs(tokenizer, *data.encode_chat(tokenizer, TALK[:2]))
    assert runs == [("<s><|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", False), ("two<|im_end|>\n", True)]


def shown(folder, *arguments, environment=None):
    import yaml

    chat = {"path": lines(folder / "b.jsonl", [{"messages": TALK}]), "messages": "messages"}
    letters().save_pretrained(folder / "tokenizer")
    content = {
        "name": "r",
        "teacher": "tokenizer",
        "out": "o",
        "student": {},
        "align": {"max_steps": 1},
        "distill": {"max_steps": 1},
    }
    content |= {
        "data": {"sequence_length": 160, "sources": {"b": chat}, "held_out": 0.0},
        "experts": {"e": {"sources": {"b": chat}}},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return CliRunner(env=environment).invoke(cli.app, ["prepare", *map(str, arguments)])


def test_prepare_shows_what_is_scored_in_brackets_or_in_colours(tmp_path):
    result = shown(tmp_path, tmp_path / "r.yaml", "--show", 2)
    begin = "<s><|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>\n]]<|im_start|>user\n"
    assert result.exit_code == 0, result.exception
    assert result.stdout.startswith("--- document 1: 58 tokens, 11 scored\n" + begin), result.output
    assert result.output.count("[[four<|im_end|>\n]]") == 2 and "document 2:" in result.output
    assert "<pad>" not in result.output and not (tmp_path / "o").exists()
    colours = shown(
        tmp_path, tmp_path / "r.yaml", "--show", 1, environment={"FORCE_COLOR": "1", "TERM": "xterm"}
    ).output
    assert "\x1b[32mtwo<|im_end|>" in colours and "[[" not in colours


def test_prepare_names_what_it_misses_and_shows_what_it_writes(tmp_path):
    result = shown(tmp_path, tmp_path / "r.yaml")
    assert isinstance(result.exception, ConfigError) and "no OUT for the rows" in str(result.exception)
    result = shown(tmp_path, tmp_path / "r.yaml", "--recipe", tmp_path / "r.yaml", "--show", 1)
    assert "are two recipes: name one" in str(result.exception)
    result = shown(
        tmp_path, tmp_path / "tokenizer", tmp_path / "rows", "--recipe", tmp_path / "r.yaml", "--count", 2, "--show", 1
    )
    assert "[[four" in result.output and "2 rows of 160 tokens" in result.output
