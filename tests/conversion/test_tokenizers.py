"""A student's tokenizer is its teacher's: the same ids for any text, the same templates, whatever files it is made of,
after conversion and everything that is made of a student.
"""

import base64
import json
import subprocess
import sys

import pytest
from tiny_teachers import model_class, teacher_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from xlstm_hybrid.checkpoint import tokenizer as of_checkpoints
from xlstm_hybrid.checkpoint.files import verify_files
from xlstm_hybrid.checkpoint.tokenizer import difference, tokenizer_hash
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.distil_xlstm.convert import convert as convert_to_distil
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.hub.push import VOCABULARIES, unlisted
from xlstm_hybrid.merging.merge import merge

CORPUS = [
    "a small boat on the wide sea",
    "7 + 8 = 15",
    "two  words   apart",
    "if x:\n    return 2\n",
    "isn't it 98765?",
]
CORPUS = CORPUS * 20 + [str(n * 6007 % 99991) for n in range(200)]
GROUPS_OF_THREE = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
TEXTS = ["the sea", " the sea", "x\n   y", "</s>the sea", "98765 boats in 2026", "isn't 7 + 8", "tab\tand  blanks", ""]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def with_marks():
    """As sentencepiece cuts text: blanks are marks, and one stands before the text."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def with_bytes(pattern=GROUPS_OF_THREE):
    """As GPT-2 and those after it cut text: into bytes, after a pattern."""
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 400, "special_tokens": ["<s>", "</s>", "<unk>"], "initial_alphabet": alphabet}
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(**how, show_progress=False))
    return made


def save_teacher(folder, family="llama", made=None, **settings):
    """A teacher's directory with a tokenizer and what its tokenizer_config.json says."""
    model_class(family)(teacher_config(family, vocab_size=512)).save_pretrained(folder)
    if made is not None:
        made.save(str(folder / "tokenizer.json"))
        settings = {key: value for key, value in (SPECIAL | settings).items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids(directory, texts=TEXTS):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in texts]


FAMILY_RULES = [  # where transformers goes by the family, as by the name in the files
    ("mistral", with_marks, "LlamaTokenizer"),
    ("mistral", with_marks, "LlamaTokenizerFast"),
    ("llama", with_marks, "LlamaTokenizer"),
    ("qwen2", with_bytes, "LlamaTokenizerFast"),
    ("qwen2", with_bytes, "PreTrainedTokenizerFast"),
    ("qwen2", with_bytes, None),
    ("qwen3", with_bytes, "Qwen2Tokenizer"),
    ("llama", with_bytes, "LlamaTokenizerFast"),
    ("olmo2", with_bytes, "GPT2Tokenizer"),
    ("olmo3", with_bytes, "GPT2Tokenizer"),
]


@pytest.mark.parametrize(("family", "made", "name"), FAMILY_RULES)
def test_a_student_cuts_text_as_its_teacher_whatever_class_the_files_name(family, made, name, tmp_path):
    source = save_teacher(tmp_path / "teacher", family, made(), tokenizer_class=name, add_bos_token=True)
    convert(source, tmp_path / "student", sliding_window=7)
    convert_to_distil(source, tmp_path / "distil")
    wanted = AutoTokenizer.from_pretrained(source)
    for student in ("student", "distil"):
        found = AutoTokenizer.from_pretrained(tmp_path / student)
        assert ids(tmp_path / student) == ids(source)
        assert (type(found), tokenizer_hash(found)) == (type(wanted), tokenizer_hash(wanted))
    found.save_pretrained(tmp_path / "distil")  # as a trainer does
    assert ids(tmp_path / "distil") == ids(source)


def test_everything_that_is_made_of_a_student_keeps_its_tokenizer_without_this_package_too(tmp_path):
    source = save_teacher(tmp_path / "teacher", "mistral", with_marks(), tokenizer_class="LlamaTokenizer")
    for student in ("a", "b"):
        convert(source, tmp_path / student, sliding_window=7)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "exported")
    assert ids(tmp_path / "merged") == ids(tmp_path / "exported") == ids(source)
    alone = "import sys, json; from transformers import AutoTokenizer as A; t = A.from_pretrained(sys.argv[1], trust_remote_code=True)"
    alone += "; print(json.dumps([t(x)['input_ids'] for x in json.loads(sys.argv[2])])); assert 'xlstm_hybrid' not in sys.modules"
    command = [sys.executable, "-c", alone, str(tmp_path / "exported"), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == ids(source)


def test_a_tokenizer_that_cannot_be_made_the_same_is_refused_with_the_text_that_differs(tmp_path, monkeypatch):
    source = save_teacher(tmp_path / "teacher", "qwen2", with_bytes())
    load = AutoTokenizer.from_pretrained

    def one_digit_at_a_time_for_students(path, **kwargs):
        made = load(path, **kwargs)
        if path != source:
            made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
        return made

    monkeypatch.setattr(of_checkpoints.AutoTokenizer, "from_pretrained", one_digit_at_a_time_for_students)
    with pytest.raises(
        CheckpointError,
        match=r"teacher: a student's tokenizer cannot be made the same .* is \[.*for the student and \[",
    ):
        convert(source, tmp_path / "student", sliding_window=7)
    assert not (tmp_path / "student").exists()


def test_a_teacher_whose_tokenizer_does_not_load_keeps_its_files_and_says_so(tmp_path):
    source = save_teacher(tmp_path / "teacher")
    (source / "tokenizer.json").write_text('{"model": "none that anybody knows"}')
    with pytest.warns(
        UserWarning, match="teacher: its tokenizer cannot be loaded here .* nothing says that the student's"
    ):
        report = convert(source, tmp_path / "student", sliding_window=7)
    assert "tokenizer.json" in report.files


# --- files -----------------------------------------------------------------------------------------------------


def tekken():
    vocabulary = [
        {"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)
    ]
    special = [{"rank": n, "token_str": text, "is_control": True} for n, text in enumerate(["<unk>", "<s>", "</s>"])]
    config = {"pattern": r"\s+|\S+", "num_vocab_tokens": 256, "default_vocab_size": 300, "version": "v3"}
    return {"config": config | {"default_num_special_tokens": 20}, "vocab": vocabulary, "special_tokens": special}


def test_a_student_of_a_teacher_that_has_nothing_but_tekken_json_has_its_tokenizer(tmp_path):
    source = save_teacher(tmp_path / "teacher", "mistral")
    (source / "tekken.json").write_text(json.dumps(tekken()))
    try:
        wanted = ids(source)
    except ValueError:
        pytest.skip("this transformers does not read tekken.json")
    convert(source, tmp_path / "student", sliding_window=7)
    assert ids(tmp_path / "student") == wanted


def as_text(tokenizer, tools=None):
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tools=tools, tokenize=False)


TEMPLATES = {"default": "PLAIN {{ messages[0].content }}", "tool_use": "TOOLS {{ messages[0].content }}"}
LAYOUTS = {  # files, and what a conversation with tools begins with
    "one in the settings": ({"tokenizer_config.json": {"chat_template": TEMPLATES["default"]}}, "PLAIN hi"),
    "several in the settings": (
        {"tokenizer_config.json": {"chat_template": [{"name": n, "template": t} for n, t in TEMPLATES.items()]}},
        "TOOLS hi",
    ),
    "a file": ({"chat_template.jinja": TEMPLATES["default"]}, "PLAIN hi"),
    "files": (
        {
            "chat_template.jinja": TEMPLATES["default"],
            "additional_chat_templates/tool_use.jinja": TEMPLATES["tool_use"],
        },
        "TOOLS hi",
    ),
}


@pytest.mark.parametrize(("files", "wanted"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_chat_is_written_as_the_teacher_writes_it_in_any_layout_of_templates(files, wanted, tmp_path):
    source, tool = (
        save_teacher(tmp_path / "teacher", made=with_bytes()),
        [{"type": "function", "function": {"name": "f"}}],
    )
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(exist_ok=True)
        more = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(content if isinstance(content, str) else json.dumps(more | content))
    convert(source, tmp_path / "a", sliding_window=7)
    convert(source, tmp_path / "b", sliding_window=7)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    report = export(tmp_path / "merged", tmp_path / "exported")
    verify_files(tmp_path / "exported")
    assert report.left_out == [] and not list(unlisted(tmp_path / "exported", code=True))
    for made in ("a", "merged", "exported"):
        ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / made, source))
        assert as_text(ours) == as_text(theirs) == "PLAIN hi"
        assert as_text(ours, tool) == as_text(theirs, tool) == wanted


EXTRAS = {
    "added_tokens.json": '{"<tool>": 400}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "spiece.model": "\n\x0b",
    "qwen.tiktoken": "IQ== 0\n",
    "tokenizer.model.v3": "\n\x0b",
    "vocab.json": "{}",
    "vocab-of-another-name.txt": "a\nb\n",
    "merges.txt": "#version: 0.2\n",
    "preprocessor_config.json": '{"size": 4, "auto_map": {"AutoProcessor": "code.Processor"}}',
    "processor_config.json": '{"processor_class": "SomeProcessor"}',
    "chat_template.json": '{"chat_template": "X"}',
}


def test_every_file_of_tokenizer_and_processor_comes_along_and_nothing_that_runs(tmp_path):
    source = save_teacher(tmp_path / "teacher", made=with_bytes())
    for name, content in EXTRAS.items():
        (source / name).write_text(content)
    for name in ("tokenization_mine.py", "pytorch_model.bin", "training_args.bin"):
        (source / name).write_text("import os")
    report = convert(source, tmp_path / "student", sliding_window=7)
    export(tmp_path / "student", tmp_path / "exported")
    assert {*EXTRAS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"} == set(report.files)
    for folder in (tmp_path / "student", tmp_path / "exported"):
        assert EXTRAS.keys() <= {path.name for path in folder.iterdir()}
        assert json.loads((folder / "preprocessor_config.json").read_text()) == {"size": 4}
        assert not {"tokenization_mine.py", "pytorch_model.bin", "training_args.bin"} & {
            p.name for p in folder.iterdir()
        }
    assert not [text for text in unlisted(tmp_path / "exported", code=True) if "not a file" in text]
    assert VOCABULARIES.fullmatch("qwen.tiktoken") and not VOCABULARIES.fullmatch("tokenizer_config.json")


@pytest.mark.parametrize(
    "special",
    [
        {"extra_special_tokens": ["<tool>", "</tool>"]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"additional_special_tokens": ["<tool>"]},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 77},
    ],
    ids=["a list", "a dict", "additional", "sides"],
)
def test_special_tokens_and_sides_are_the_teachers_in_any_form(special, tmp_path):
    source = save_teacher(tmp_path / "teacher", made=with_bytes(), **special)
    convert(source, tmp_path / "student", sliding_window=7)
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "student", source))
    assert difference(ours, theirs) is None and ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.padding_side, ours.model_max_length) == (theirs.padding_side, theirs.model_max_length)
    assert getattr(ours, "tool_token", None) == getattr(theirs, "tool_token", None)
