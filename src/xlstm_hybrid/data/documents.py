"""One row of a data set as a document, `(input_ids, labels)`.

A label is the token itself, or -100 where it is not scored; the first token of a document never is: nothing predicts
it.
"""

import copy
import json
import re
import warnings
from itertools import groupby

from xlstm_hybrid.errors import DataError
from xlstm_hybrid.recipe.schema import RESERVED

IGNORE = -100
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WRITTEN = (
    *THOUGHTS,
    "tool_calls",
    "function_call",
    "function_calls",
    "functions",
)  # keys of messages that no template may pass over


def encode_text(tokenizer, text):
    """Plain text between the begin token (where there is one) and the end token; all but the first token are scored.

    Raises:
        DataError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token (eos_token), so that documents would have no end: set it in tokenizer_config.json"
        )
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return ids, [IGNORE, *ids[1:]]


def encode_chat(tokenizer, conversation, score="assistant"):
    """A conversation in the tokenizer's chat template; what it writes for the assistant's turns is scored, their ends
    as well.

    A template that marks the assistant's words ({% generation %}) decides; where the marks leave out the token that
    ends a turn, it is scored all the same. Otherwise a turn is what the template adds to the conversation before it,
    and one that writes earlier turns in another way when later ones follow is refused.

    Args:
        conversation: [{"role", "content"}, ...], or a row as TRL's data sets have it: {"messages": such a list,
            "tools": JSON schemas, "chat_template_kwargs": {name: value}}; what follows the last turn of the assistant
            is left out. Content is text, or parts of which all are text; arguments of a tool call are a dict or JSON
            text, whichever the template writes well.
        score: "assistant" for every turn of the assistant, "last" for its last one.
    Raises:
        DataError: no chat template, one that refuses the conversation, leaves out its tools, calls or thoughts, or
            rewrites its turns; no turn of the assistant; an image, a sound or a film.
    """
    row = conversation if isinstance(conversation, dict) else {"messages": conversation}
    messages, options = row["messages"], dict(row.get("chat_template_kwargs") or {})
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise DataError(
            "no message has the role 'assistant': nothing could be scored; correct the rows, or name the right column"
        )
    messages, turns = messages[: turns[-1] + 1], turns[-1:] if score == "last" else turns
    template = chosen_template(tokenizer, row.get("tools"))
    if unread := sorted(name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)):
        raise DataError(f"chat_template_kwargs {unread}: the chat template reads no such names; correct or remove them")
    options["tools"] = row.get("tools") or None
    messages = fitting_form(tokenizer, messages, options)
    check_written(tokenizer, messages, options)
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        ids, labels = marked_chat(tokenizer, messages, score, options)
    else:
        ids = render(tokenizer, messages, **options)
        labels = [IGNORE] * len(ids)
        for n in turns:
            before = render(tokenizer, messages[:n], **options, add_generation_prompt=True)
            after = render(tokenizer, messages[: n + 1], **options)
            if ids[: len(after)] != after or after[: len(before)] != before:
                marks = "take a template that marks the assistant's words with {% generation %}"
                step = "set score: last" if score != "last" else marks
                raise DataError(
                    f"the chat template does not write turn {n} as it wrote it without the turns that follow it, or without its answer: {step}"
                )
            labels[len(before) : len(after)] = after[len(before) :]
    if not ids:
        raise DataError("the chat template writes nothing of these messages: take the instruct model's own template")
    labels[0] = IGNORE
    last = next((l for l in reversed(labels) if l != IGNORE and tokenizer.decode([l]).strip()), None)
    if last is not None and last not in special_ids(tokenizer):
        warnings.warn(
            f"the chat template ends the assistant's turn with {tokenizer.decode([last])!r} and no special token: a student of it does "
            "not learn to stop; write eos_token behind the content in the template",
            stacklevel=2,
        )
    return ids, labels


def chosen_template(tokenizer, tools=None):
    """The text of the chat template that the tokenizer takes; DataError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template: take the instruct model's tokenizer, or a text column instead of messages"
        )
    try:
        return tokenizer.get_chat_template(None, tools or None)
    except ValueError as error:  # several templates, none of them the default
        raise DataError(f"the tokenizer's chat templates: {' '.join(str(error).split())}") from error


def special_ids(tokenizer):
    """Ids of the special tokens, whether they have a role (eos_token) or only stand in the vocabulary (<|eot_id|>)."""
    return {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}


def marked_chat(tokenizer, messages, score, options):
    """`encode_chat` where the template marks the assistant's words.

    The end of a turn is what the template writes behind the last mark, up to and with the first special token: nothing
    follows the last turn that could be anything else. Where that is blank, the marks hold the end already. Behind an
    earlier mark the same text is scored, or blanks and another special token (Llama's <|eom_id|> after a call).
    """
    encoded = render(tokenizer, messages, **options, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]]
    runs = [list(group) for marked, group in groupby(range(len(ids)), key=mask.__getitem__) if marked]
    spans, special = [(run[0], run[-1] + 1) for run in runs], special_ids(tokenizer)

    def up_to_special(start):
        end = next((n for n in range(start, len(ids)) if ids[n] in special), len(ids) - 1)
        return ids[start : end + 1]

    tail = up_to_special(spans[-1][1]) if spans else []
    for start, end in spans[-1:] if score == "last" else spans:
        follows = up_to_special(end)
        if not tokenizer.decode(tail).strip():
            follows = []
        elif ids[end : end + len(tail)] == tail:
            follows = tail
        elif not follows or tokenizer.decode(follows[:-1]).strip() or follows[-1] not in special:
            follows = []
        mask[start : end + len(follows)] = [True] * (end + len(follows) - start)
        if score == "last":
            mask[:start] = [False] * start
    return ids, [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]


def render(tokenizer, messages, tokenize=True, **options):
    """Token ids of messages; with `return_assistant_tokens_mask` a dict that also holds the mask; or their text."""
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **options)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the chat template refuses these messages ({' '.join(str(error).split())}): correct the rows, or leave them out"
        ) from error
    return encoded if not tokenize or "return_assistant_tokens_mask" in options else list(encoded["input_ids"])


# --- what templates read -----------------------------------------------------------------------------------------


def fitting_form(tokenizer, messages, options):
    """The messages in the form that the template writes well.

    Templates read content as text or as parts, and the arguments of a call as a dict or as JSON text; few refuse the
    other form, most write it as the source of a list, a dict or a quoted string. Parts are joined to a text, and
    arguments taken as they are given, unless their words come out of the other form only.

    Raises:
        DataError: the template refuses every form, writes no form of the arguments well, or a part is not text.
    """
    forms = [messages]
    if any(isinstance(m.get("content"), list) for m in messages):
        forms = [[m | {"content": joined(m["content"])} if isinstance(m.get("content"), list) else m for m in messages]]
        forms.append(messages)
    if any(m.get("tool_calls") for m in messages):
        forms += [[with_other_arguments(m) for m in form] for form in forms]
    if len(forms) == 1:
        return messages
    faults, refusal = [], None
    for form in forms:
        try:
            text = render(tokenizer, form, tokenize=False, **options)
        except DataError as error:
            refusal = refusal or error
            continue
        said = "\n".join(str(m.get("content")) for m in form)  # which may quote the same source
        sources = [source_of(f["arguments"]) for m in form for f in functions(m) if f["arguments"]]
        badly = sum(text.count(source) > said.count(source) for source in sources)
        badly += sum(str(m["content"]) in text for m in form if isinstance(m.get("content"), list))
        kept = [m["content"] for m, given in zip(form, messages, strict=True) if isinstance(given.get("content"), list)]
        words = [part["text"] for c in kept for part in (c if isinstance(c, list) else [{"text": c}])]
        lost = sum(word.strip() not in text for word in words)
        faults.append((badly, lost, len(faults), form))
        if not badly + lost:
            return form
    if not faults:
        raise refusal
    badly, _, _, form = min(faults)
    if badly:
        raise DataError(
            "the chat template writes the arguments of tool calls neither from a dict nor from JSON text: take one that knows tool calls"
        )
    return form


def joined(content):
    """Content of text parts as one text, without anything between them, as templates write them."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"content has a part of type {kind!r}, expected text only: leave such rows out")
    return "".join(part["text"] for part in content)


def functions(message):
    """The called functions of a message, {"name", "arguments"}, whose arguments are a dict or JSON text of one."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [f for f in calls if isinstance(f, dict) and isinstance(from_json(f.get("arguments")), dict)]


def from_json(value):
    """What JSON text holds; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def source_of(arguments):
    """What a template writes of arguments in the form that it does not expect."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, str) else str(arguments)


def with_other_arguments(message):
    """A message with JSON text in the place of dicts as arguments, and dicts in the place of JSON text."""
    message = copy.deepcopy(message)
    for f in functions(message):
        given = f["arguments"]
        f["arguments"] = json.loads(given) if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return message


def check_written(tokenizer, messages, options):
    """Raise DataError for tools, calls, or thoughts of the last turn that the template passes over."""
    unwritten = [("tools", messages, options | {"tools": None})] if options["tools"] else []
    for key in WRITTEN:
        last = len(messages) - 1 if key in THOUGHTS else 0  # thoughts of earlier turns are left out by many templates
        if any(m.get(key) for m in messages[last:]):
            unwritten.append((key, [{k: v for k, v in m.items() if k != key} for m in messages], options))
    text = render(tokenizer, messages, tokenize=False, **options) if unwritten else None
    for key, others, more in unwritten:
        try:
            same = render(tokenizer, others, tokenize=False, **more) == text
        except DataError:
            same = False
        if same:
            raise DataError(
                f"the chat template writes nothing of {key!r}, which would be lost: take a template that does, or leave them out on "
                f"purpose with leave_out: [{key}] in the source"
            )


def scored_runs(tokenizer, ids, labels):
    """[(text, whether it is scored)]: a document cut where scoring begins and ends."""
    runs, text = [], ""
    for scored, group in groupby(range(len(ids)), key=lambda n: labels[n] != IGNORE):
        whole = tokenizer.decode(ids[: [*group][-1] + 1])  # from the start: alone, a token may lose its leading blank
        runs.append((whole[len(text) :], scored))
        text = whole
    return runs


# --- rows --------------------------------------------------------------------------------------------------------


def conversation(row, source):
    """One row of a chat source as {"messages"}, with "tools" and "chat_template_kwargs" where it has some; None where
    the question or the answer is empty.
    """
    if source.messages:
        messages = row[source.messages]
    else:
        question, answer = row[source.prompt], row[source.completion]
        if isinstance(question, str) and question.strip():
            question = [{"role": "user", "content": question}]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}] if answer else None
        messages = [*question, *answer] if question and answer else None
    if not messages:
        return None
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else [None]
    if not all(isinstance(role, str) for role in roles):
        raise DataError(
            f"expected a list of messages with role and content, got {str(messages)[:80]!r}: name the column of these, or rename its keys"
        )
    left_out = source.leave_out or []
    messages = [{k: v for k, v in without_nulls(m).items() if k not in left_out} for m in messages]
    for n, message in enumerate(messages):
        calls = message.pop("tool_calls", None)
        if calls := from_json(calls) or []:  # [] is no call, but templates ask whether the key is there
            message["tool_calls"] = calls
        if isinstance(message.get("content"), list):
            joined(message["content"])
        if n and message.get("tools"):
            raise DataError(f"message {n} has tools: move them into the first message, or into a column of their own")
    found = {"messages": messages}
    tools = [] if "tools" in left_out else tools_of(row.get(source.tools or "tools"))
    inside = tools_of(messages[0].pop("tools", None))
    if tools and inside and tools != inside:
        raise DataError(
            "the row has tools in a column and others in its first message: name one with leave_out or where"
        )
    if tools or inside:
        found["tools"] = tools or inside
    own = {} if "chat_template_kwargs" in left_out else row.get("chat_template_kwargs")
    own = without_nulls(from_json(own) if own else {})
    if not isinstance(own, dict) or RESERVED & set(own):
        raise DataError(
            f"column 'chat_template_kwargs' holds {str(own)[:80]!r}, expected names that the template reads"
        )
    if options := (source.chat_template_kwargs or {}) | own:
        found["chat_template_kwargs"] = options
    return found


def without_nulls(value):
    """A value of a row without keys that hold nothing: Arrow gives each dict of a column the keys of all others."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def tools_of(value):
    """JSON schemas of tools, from a list of dicts or of JSON texts, or the JSON text of a list; [] for none."""
    try:
        tools = json.loads(value or "[]") if isinstance(value, str) else without_nulls(value or [])
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []]
    except (ValueError, TypeError):
        tools = [None]
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools are {str(value)[:80]!r}, expected a list of JSON schemas, or its JSON text")
    return tools


def content_of(row, source):
    """`(what is to be encoded, its bytes)` of one row, None where it is empty."""
    if source.is_chat:
        content = conversation(row, source)
        return content and (content, json.dumps(content["messages"], sort_keys=True, ensure_ascii=False))
    text = row[source.text]
    if text is not None and not isinstance(text, str):
        raise DataError(f"column {source.text!r} holds a {type(text).__name__}, expected text")
    return (text, text) if text and text.strip() else None
