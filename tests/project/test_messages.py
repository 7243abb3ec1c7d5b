"""What a user is told when something is wrong: every error of ours says what it expected, or what to do next."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/xlstm_hybrid"
ERRORS = {node.name for node in ast.parse((SOURCE / "errors.py").read_text()).body if isinstance(node, ast.ClassDef)}
DO = """add allow ask build call change check choose compare compress convert copy correct delete derive distil divide do download drop evaluate
    fill flatten give go install keep label launch lay leave let list load log look lower make measure mend merge move name number pass pip plan
    point prepare push put raise read remove rename repeat replace report resize restore resume run save see set shorten show split start switch
    take tell tokenise train tie untie update upgrade use verify wait write xlstm-hybrid"""
# a sentence, or a part of one, that begins with what to do
STEP = re.compile(
    rf"expected|[;:.,] ((a|an|or|the|perhaps) )?({'|'.join(DO.split())})\b|^pass |`xlstm-hybrid |--\w|python -m |docs/|did you mean|"
    "is not one of|does not divide|refuses its settings|instead",
    re.IGNORECASE,
)
# the step stands in what is put into them, or there is nobody but our own code to read them
ELSEWHERE = {
    ("checkpoint/kinds.py", "{}: {}"),
    ("commands/evaluate.py", "{}"),
    ("evaluation/results.py", "{}"),
    ("model/compatibility.py", "{}"),
    ("training/checkpoints.py", "{}"),
}


def words(node):
    """The text of an expression, `{}` for what is put in; the parts of a conditional one after another."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "{}"


def messages():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and getattr(node.exc.func, "id", "") in ERRORS
            ):
                yield path.relative_to(SOURCE).as_posix(), node.lineno, words(node.exc.args[0])


def test_every_error_says_what_it_expected_or_what_to_do_next():
    found = list(messages())
    assert len(found) > 400
    silent = [
        f"{path}:{line}: {text}"
        for path, line, text in found
        if not STEP.search(text) and not text.endswith("{}") and (path, text) not in ELSEWHERE
    ]
    assert not silent, "\n".join(silent)


def test_a_message_without_a_step_is_noticed():
    assert not STEP.search("the cache is wrong") and not STEP.search("3 tensors do not fit the model")
    assert STEP.search("3 tensors do not fit the model; resume with the same model")
    assert words(ast.parse('f"a {x} " "b" + str(y)').body[0].value) == "a {} b{}"


def test_no_message_sends_the_reader_to_a_document_that_is_not_here():
    root = SOURCE.parents[1]
    named = {name for _, _, text in messages() for name in re.findall(r"docs/[\w.-]+\.md", text)}
    assert "docs/recipes.md" not in named or (root / "docs/recipes.md").is_file()
    assert all((root / name).is_file() for name in named)
