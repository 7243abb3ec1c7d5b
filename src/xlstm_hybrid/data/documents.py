"""One row of a data set as a document, `(input_ids, labels)`.

A label is the token itself, or -100 where it is not scored; the first token of a document never is: nothing predicts
it.
"""

import json

from xlstm_hybrid.errors import DataError

IGNORE = -100


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


def encode_chat(tokenizer, messages, score="assistant"):
    """A conversation in the tokenizer's chat template; the assistant's words and end-of-turn tokens are scored.

    A template that marks the assistant's words ({% generation %}) decides. Otherwise a turn is what it adds to the
    conversation before it, and a template that writes earlier turns in another way when later ones follow is refused.

    Args:
        messages: [{"role", "content"}, ...]; what follows the last turn of the assistant is left out.
        score: "assistant" for every turn of the assistant, "last" for its last one.
    Raises:
        DataError: no chat template, one that refuses the conversation or rewrites its turns, or no turn of the
            assistant.
    """
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise DataError("no message has the role 'assistant': nothing could be scored")
    messages, turns = messages[: turns[-1] + 1], turns[-1:] if score == "last" else turns
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            "the tokenizer has no chat template: take the instruct model's tokenizer, or a text column instead of messages"
        )
    template = template if isinstance(template, str) else "".join(template.values())
    if "{% generation" in template.replace("{%-", "{%"):
        return marked_chat(tokenizer, messages, score)
    ids = render(tokenizer, messages)
    labels = [IGNORE] * len(ids)
    for n in turns:
        before = render(tokenizer, messages[:n], add_generation_prompt=True)
        after = render(tokenizer, messages[: n + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            marks = "take a template that marks the assistant's words with {% generation %}"
            step = "set score: last" if score != "last" else marks
            raise DataError(
                f"the chat template does not write turn {n} as it wrote it without the turns that follow it, or without its answer: {step}"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return ids, [IGNORE, *labels[1:]]


def marked_chat(tokenizer, messages, score):
    """`encode_chat` where the template marks the assistant's words."""
    encoded = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], list(encoded["assistant_masks"])
    if score == "last":
        end = max((n for n, m in enumerate(mask) if m), default=-1)
        begin = max((n for n in range(end) if not mask[n]), default=-1)
        mask = [m and n > begin for n, m in enumerate(mask)]
    return ids, [IGNORE, *(i if m else IGNORE for i, m in zip(ids[1:], mask[1:], strict=True))]


def render(tokenizer, messages, **options):
    """Token ids of messages; with `return_assistant_tokens_mask` a dict that also holds the mask."""
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"the chat template refuses these messages ({' '.join(str(error).split())}): correct the rows, or leave them out"
        ) from error
    return encoded if "return_assistant_tokens_mask" in options else list(encoded["input_ids"])


def conversation(row, source):
    """The messages of one row of a chat source; None where the question or the answer is empty."""
    if source.messages:
        messages = row[source.messages]
    else:
        question, answer = row[source.prompt], row[source.completion]
        if isinstance(question, str) and question.strip():
            question = [{"role": "user", "content": question}]
        messages = [*question, {"role": "assistant", "content": answer}] if question and answer else None
    if not messages:
        return None
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else [None]
    if not all(isinstance(role, str) for role in roles):
        raise DataError(f"expected a list of messages with role and content, got {str(messages)[:80]!r}")
    return [{k: v for k, v in m.items() if v is not None} for m in messages]


def content_of(row, source):
    """`(what is to be encoded, its bytes)` of one row, None where it is empty."""
    if source.is_chat:
        content = conversation(row, source)
        return content and (content, json.dumps(content, sort_keys=True, ensure_ascii=False))
    text = row[source.text]
    if text is not None and not isinstance(text, str):
        raise DataError(f"column {source.text!r} holds a {type(text).__name__}, expected text")
    return (text, text) if text and text.strip() else None
