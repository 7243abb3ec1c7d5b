"""The texts that `recipes/smollm2-135m*.yaml` train and evaluate on, as .jsonl.xz files in one folder.

    python benchmarks/real_text.py runs/real/text
    python benchmarks/real_text.py runs/real/text --peps peps.jsonl.xz
    python benchmarks/real_text.py runs/real/text --questions questions.jsonl.xz --teacher recipes/smollm2-135m.yaml

peps-train, peps-test: Python Enhancement Proposals that are in the public domain, {"id", "text"}, the last tenth of them
by number to be evaluated on: from a file, or from their repository over the network. help-test: Python's help topics,
{"id", "text"}, of the Python that runs this. answers-train, answers-test: questions and what the teacher answers, {"prompt",
"completion"}, only where questions are given. The same inputs give the same files; a folder that was made of the same
inputs is kept.
"""

import argparse
import io
import json
import lzma
import platform
import re
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from xlstm_hybrid.checkpoint.files import digest, read_json, staged, write_json
from xlstm_hybrid.errors import DataError, XLSTMHybridError

COMMIT = "ba4deeb7"
ARCHIVE = f"https://github.com/python/peps/archive/{COMMIT}.tar.gz"
FREE = re.compile(r"public\s+domain|CC0", re.IGNORECASE)
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?<=<)[\w.+-]+ at [\w-]+(?:\.[\w-]+)+(?=>)")
NOBODY = "user@example.org"
TEST_SHARE = 0.1
MADE_OF = "made_of.json"
MAX_NEW_TOKENS = 256  # of an answer
BATCH = 32


def read_rows(path, columns):
    """Rows of a .jsonl or .jsonl.xz file; each has text in `columns`.

    Raises:
        DataError: no such file, not JSON lines, a row without them, or no row.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected JSON lines with {', '.join(columns)}; check the path")
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for n, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or any(not isinstance(row.get(c), str) or not row[c] for c in columns):
                    raise DataError(f"{path.name}, line {n}: expected text in {', '.join(columns)}; correct the file")
                rows.append(row)
    except DataError:
        raise
    except (lzma.LZMAError, EOFError, ValueError, OSError) as error:
        raise DataError(f"{path.name}: not complete JSON lines ({error}); make or download it again") from error
    if not rows:
        raise DataError(f"{path.name}: holds no row, expected at least one with {', '.join(columns)}")
    return rows


def fetch_archive(url=ARCHIVE):
    """The archive of the proposals' repository, bytes.

    Raises:
        DataError: the network gave none.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{url}: cannot be fetched ({error}); check the network, or give a file of the texts: --peps FILE, make real TEXT=FILE"
        ) from error


def proposals(archive):
    """`[{"id", "text"}]` of the proposals in an archive that say that they are in the public domain: title and body,
    without the block of headers, e-mail addresses replaced.

    Raises:
        DataError: no archive, or none of them in it.
    """
    rows = []
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            for member in files:
                name = Path(member.name)
                if not member.isfile() or not re.fullmatch(r"pep-\d{4}\.(rst|txt)", name.name):
                    continue
                head, _, body = files.extractfile(member).read().decode("utf-8").partition("\n\n")
                title = re.search(r"^Title: *(.+(?:\n[ \t].+)*)", head, re.MULTILINE)
                if title and FREE.search(body):
                    text = f"{' '.join(title[1].split())}\n\n{body.strip()}\n"
                    rows.append({"id": name.stem, "text": ADDRESS.sub(NOBODY, text)})
    except (tarfile.TarError, EOFError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"the archive of the proposals cannot be read ({error}); fetch it again") from error
    if not rows:
        raise DataError("the archive holds no proposal in the public domain, expected files pep-0001.rst and so on")
    return rows


def divided(rows, key):
    """`(rows to train on, rows to evaluate on)`: the last tenth by `key`, at least one.

    Raises:
        DataError: fewer than two rows.
    """
    rows = sorted(rows, key=key)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row, expected at least 2: one to train on, one to evaluate on; give more text")
    count = max(1, round(len(rows) * TEST_SHARE))
    return rows[:-count], rows[-count:]


def number(row):
    """Of a proposal: that in its id."""
    found = re.search(r"\d+", row["id"])
    if not found:
        raise DataError(f"id {row['id']!r}: expected a number in it, as in pep-0008; correct the file")
    return int(found[0]), row["id"]


def answered(questions, recipe):
    """`[{"prompt", "completion"}]`: what a recipe's teacher answers to each question, greedily, in at most
    MAX_NEW_TOKENS; answers that do not end are left out.
    """
    import torch

    from xlstm_hybrid.conversion.load import load
    from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher

    recipe = load_recipe(recipe)
    model, tokenizer = load(resolve_teacher(recipe), recipe.teacher_dtype, recipe.revision)
    tokenizer.padding_side, rows = "left", []
    order = sorted(range(len(questions)), key=lambda n: len(questions[n]))  # batches of like lengths
    for start in range(0, len(order), BATCH):
        asked = [questions[n] for n in order[start : start + BATCH]]
        talks = [[{"role": "user", "content": text}] for text in asked]
        how = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(talks, **how).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        ends = model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        for question, ids in zip(asked, found[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text and ends & set(ids):
                rows.append({"prompt": question, "completion": text})
        print(f"answers: {min(start + BATCH, len(order))} of {len(order)} questions", flush=True)
    if len(rows) < 2:
        raise DataError(
            f"the teacher ended {len(rows)} of {len(questions)} answers, expected at least 2; give more questions"
        )
    return rows


def write_rows(path, rows):
    content = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    path.write_bytes(lzma.compress(content.encode()))
    print(f"{path.name}: {len(rows)} documents, {len(content) / 1e6:.2f} MB")


def make(out, peps=None, questions=None, teacher=None, fetch=fetch_archive):
    """Write the texts into the folder `out`, complete or not at all; False where it was there, made of the same inputs.

    Args:
        peps: file of proposals; None: from their repository, by `fetch`.
        questions: file of {"prompt"}; teacher: recipe whose teacher answers them; both or none.
    Raises:
        DataError: bad input, see the functions above.  CheckpointError: `out` is something else, or cannot be written.
    """
    from pydoc_data.topics import topics

    out = Path(out)
    if (questions is None) != (teacher is None):
        raise DataError(
            "--questions and --teacher belong together: name the recipe whose teacher answers the questions"
        )
    made_of = {"peps": COMMIT if peps is None else None, "python": platform.python_version()}
    for name, path, columns in (("peps", peps, ("id", "text")), ("questions", questions, ("prompt",))):
        if path is not None:
            read_rows(path, columns)
            made_of[name] = digest(path)
    if teacher is not None:
        made_of["teacher"] = digest(teacher)
    before = read_json(out / MADE_OF, out.name) if (out / MADE_OF).is_file() else {}
    if made_of.items() <= before.items():  # it may hold answers beside
        print(f"{out}: made before of the same inputs, kept")
        return False
    rows = proposals(fetch()) if peps is None else read_rows(peps, ("id", "text"))
    with staged(out, overwrite=bool(before)) as folder:
        for split, of in zip(("train", "test"), divided(rows, number), strict=True):
            write_rows(folder / f"peps-{split}.jsonl.xz", of)
        write_rows(folder / "help-test.jsonl.xz", [{"id": name, "text": topics[name]} for name in sorted(topics)])
        if questions is not None:
            given = list(dict.fromkeys(row["prompt"] for row in read_rows(questions, ("prompt",))))
            answers, place = answered(given, teacher), {text: n for n, text in enumerate(given)}
            for split, of in zip(("train", "test"), divided(answers, lambda r: place[r["prompt"]]), strict=True):
                write_rows(folder / f"answers-{split}.jsonl.xz", of)
        write_json(folder / MADE_OF, made_of)
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(description="The texts of recipes/smollm2-135m*.yaml.")
    parser.add_argument("out", help="folder, for example runs/real/text")
    parser.add_argument("--peps", help="JSON lines with id and text; by default fetched from their repository")
    parser.add_argument("--questions", help="JSON lines with prompt, for the teacher to answer")
    parser.add_argument("--teacher", help="recipe whose teacher answers the questions")
    given = parser.parse_args(arguments)
    try:
        make(given.out, given.peps, given.questions, given.teacher)
    except XLSTMHybridError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
