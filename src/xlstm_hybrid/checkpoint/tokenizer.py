"""The tokenizer of a checkpoint: whether two of them cut text into the same ids, a student's that is its teacher's, and
tokens that have no row in an embedding.

transformers chooses the class of a tokenizer, and with it rules for cutting text, by `model_type` in config.json as
well. A student has a model type of its own, so that a copy of the files alone may be another tokenizer.
"""

import hashlib
import json
import warnings

from transformers import AutoTokenizer

from xlstm_hybrid.checkpoint.files import read_json, write_json
from xlstm_hybrid.checkpoint.weights import TOKENIZER, carried, settings_files
from xlstm_hybrid.errors import CheckpointError, ConfigError

AS_IT_IS = "TokenizersBackend"  # transformers' class that takes a tokenizer.json without rules of its own
ROLES = ("pad_token", "bos_token", "eos_token")  # tokens that trainers, `generate` and lm-eval put in by themselves
PROBES = (
    "",
    "the quick brown fox",
    " one leading blank",
    "   three of them, and  two   three inside ",
    "lines\n\n  indented\tby a tab\r\n and carriage returns\n",
    "1 12 123 1234 12345 in 2023 and 650841823, 3.14159, 1,000,000",
    "it's, don't, we'll, I'VE, she'd; can`t \u2019s",
    'def f(x):\n    return x["a"] + 0x1F  # comment\n',
    "Größe, naïve, ﬁne, e\u0301 and é, ＡＢＣ",
    "Привет, мир; γειά σου; مرحبا بالعالم; नमस्ते; สวัสดี",
    "你好，世界。こんにちは 안녕하세요",
    "👍🏽 👩‍👩‍👧 \u00a0\u200b\u2581\ufeff<s> </s> <unk> <|endoftext|> [INST]",
    "https://example.org/a_b-c?d=e&f=%20 !!! ... --- ***",
)


def token_ids(tokenizer):
    """`{token: id}` of a tokenizer, special and added tokens included, or of such a dict itself."""
    vocabulary = tokenizer if isinstance(tokenizer, dict) else tokenizer.get_vocab()
    if not vocabulary:
        raise ConfigError("the tokenizer has no tokens: load the one that belongs to the model")
    return vocabulary


def json_digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def tokenizer_hash(tokenizer):
    """SHA-256 of how text becomes ids: tokens, special tokens and a fast tokenizer's rules for cutting text."""
    rules = None
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # set by whoever called it last
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    special = {role: str(token) for role, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return json_digest([sorted(token_ids(tokenizer).items()), special, rules])


def template_hash(tokenizer):
    """SHA-256 of the chat template, None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else json_digest(template)


# --- a student's tokenizer is its teacher's --------------------------------------------------------------------


def difference(student, teacher):
    """What a student's tokenizer does otherwise than its teacher's, in words; None where they are the same."""
    special = [token for token in getattr(teacher, "all_special_tokens", []) if isinstance(token, str)]
    for text in [*PROBES, *(f"a {token}the fox{token} b" for token in special[:8])]:
        for add in (True, False):
            ours, theirs = (t(text, add_special_tokens=add)["input_ids"] for t in (student, teacher))
            if list(ours) != list(theirs):
                return f"{text!r} is {list(ours)[:12]} for the student and {list(theirs)[:12]} for the teacher"
    for name, what in (
        ("vocabulary, special tokens or rules", tokenizer_hash),
        ("chat template", template_hash),
        ("padding side", lambda t: t.padding_side),
        ("longest input", lambda t: t.model_max_length),
    ):
        if what(student) != what(teacher):
            return f"its {name} differ" if name.startswith("vocabulary") else f"its {name} differs"
    return None


def same_class(directory, name):
    """Name the tokenizer's class in a checkpoint, so that `model_type` has no say in it."""
    path = directory / TOKENIZER
    settings = read_json(path, directory.name) if path.is_file() else {}
    write_json(path, carried(settings) | {"tokenizer_class": name})


def keep_tokenizer(teacher, directory, what, config=None):
    """Make the tokenizer that was copied into `directory`, beside a student's config.json, cut text as the teacher's.

    Written is the class that transformers chose for the teacher; where that is not enough, the tokenizer as it was
    loaded, in transformers' own form. A teacher whose tokenizer cannot be loaded here keeps its files, with a warning.

    Args:
        teacher: the teacher's directory.  what: its name.
        config: its configuration, where its name on the hub has a say in the class.
    Returns:
        The teacher's tokenizer, None without one.
    Raises:
        CheckpointError: the student's tokenizer cannot be made equal; it names the first text that differs.
    """
    if not settings_files(teacher, tokenizer=True):
        return None
    try:
        told = {} if config is None else {"config": config}
        wanted = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False, **told)
    except Exception as error:  # of any library that reads a tokenizer; transformers cannot load the teacher's either
        reason = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"{what}: its tokenizer cannot be loaded here ({type(error).__name__}: {reason}); its files are copied as they "
            "are, and nothing says that the student's is the same: install what the message names, then convert again",
            stacklevel=2,
        )
        return None
    for attempt in ("files", "saved"):
        name = type(wanted).__name__
        if attempt == "saved":
            for file in settings_files(directory, tokenizer=True):
                (directory / file).unlink()
            wanted.save_pretrained(directory)
            name = AS_IT_IS if hasattr(wanted, "backend_tokenizer") else name
        same_class(directory, name)
        try:
            odd = difference(AutoTokenizer.from_pretrained(directory, trust_remote_code=False), wanted)
        except Exception as error:  # as above: then it is not the same
            odd = f"it cannot be loaded ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        if odd is None:
            return wanted
    raise CheckpointError(
        f"{what}: a student's tokenizer cannot be made the same as this one ({type(wanted).__name__}): {odd}; load the "
        f"teacher's tokenizer, save it as a {AS_IT_IS} beside the teacher, check its ids, then convert again"
    )


# --- tokens without a row --------------------------------------------------------------------------------------


def check_rows(tokenizer, rows, what, ids=None):
    """Raise ConfigError where a token has no row in an embedding: an IndexError on a CPU, and on a GPU an assertion that
    ends the process.

    Without `ids` the tokens that others put in by themselves are checked: padding, begin and end. Other tokens without a
    row do no harm until they occur in data.

    Args:
        tokenizer: a tokenizer or processor; None where nobody knows the tokens.
        rows: of the embedding.  what: the model's name.
        ids: the ids of data, any iterable.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if ids is None:
        roles = {role: getattr(tokenizer, f"{role}_id", None) for role in ROLES}
        wrong = {role: id for role, id in roles.items() if isinstance(id, int) and id >= rows}
        role, id = next(iter(wrong.items()), (None, None))
    else:
        role, id = "token of the data", next((id for id in ids if id >= rows), None)
    if id is None:
        return
    token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(id)
    other = "leave it out of the data, or encode them with the tokenizer of this model"
    if ids is None:
        other = (
            f"set another one, such as tokenizer.{role} = {'tokenizer.eos_token' if role == 'pad_token' else 'TOKEN'}"
        )
    raise ConfigError(
        f"{what}: the {role} {'' if token is None else repr(token) + ' '}has id {id}, but the embedding has {rows} rows "
        f"(ids 0 to {rows - 1}): call model.resize_token_embeddings(len(tokenizer)), of the teacher before it is converted "
        f"or of both models, and save it; or {other}"
    )


def note_rows(tokenizer, rows, what):
    """Refuse what `check_rows` refuses, and warn of other tokens of a tokenizer that have no row."""
    check_rows(tokenizer, rows, what)
    extra = {id: token for token, id in token_ids(tokenizer).items() if id >= rows}
    if extra:
        first = min(extra)
        warnings.warn(
            f"{what}: {len(extra)} tokens of its tokenizer have no embedding row, the first {extra[first]!r} with id {first} of "
            f"{rows} rows; no harm as long as no text has them, and an error where one does. "
            "teacher.resize_token_embeddings(len(tokenizer)) gives them rows",
            stacklevel=2,
        )
