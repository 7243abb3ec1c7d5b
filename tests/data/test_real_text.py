"""`benchmarks/real_text.py`: which texts it takes, how it divides them, and what it says about bad input."""

import io
import json
import lzma
import runpy
import tarfile
from pathlib import Path

import pytest

from xlstm_hybrid.errors import CheckpointError, DataError

REAL_TEXT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/real_text.py"))
make, proposals = REAL_TEXT["make"], REAL_TEXT["proposals"]


def peps(path, count=20):
    """A file of stand-ins for proposals, in no order."""
    rows = [
        {"id": f"pep-{7 * n % 23:04d}", "text": f"Proposal {n}\n\nIt says {'much ' * (n + 9)}."} for n in range(count)
    ]
    with lzma.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in lzma.open(path, "rt")]


def archive(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as out:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"peps-ba4deeb7/peps/{name}")
            entry.size = len(text.encode())
            out.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


FREE = "\n\nCopyright\n=========\n\nThis document is placed in the\npublic domain.\n"
HEAD = "PEP: 7\nTitle: A style\n  of two lines\nAuthor: A <a@python.org>\n\n"


def test_a_proposal_is_its_title_and_body_without_headers_and_addresses_if_it_is_in_the_public_domain():
    found = proposals(
        archive(
            {
                "pep-0007.rst": HEAD + "Write to b.c@python.org or <d at python.org>, at once." + FREE,
                "pep-0009.rst": HEAD + "Licensed under the Open Publication License.\n",
                "pep-0010.txt": HEAD + "Short. Under CC0-1.0-Universal.",
                "conf.py": "public domain",
            }
        )
    )
    assert [row["id"] for row in found] == ["pep-0007", "pep-0010"]
    expected = "A style of two lines\n\nWrite to user@example.org or <user@example.org>, at once." + FREE
    assert found[0]["text"] == expected
    for content, message in (
        (b"no archive", "the archive of the proposals cannot be read"),
        (archive({"pep-0009.rst": HEAD + "All rights reserved."}), "holds no proposal in the public domain"),
    ):
        with pytest.raises(DataError, match=message):
            proposals(content)


def test_the_last_tenth_by_number_is_held_out_and_the_same_inputs_give_the_same_files(tmp_path):
    file = peps(tmp_path / "peps.jsonl.xz")
    assert make(tmp_path / "a", peps=file) and make(tmp_path / "b", peps=file)
    train, test = (read(tmp_path / "a" / f"peps-{split}.jsonl.xz") for split in ("train", "test"))
    ids = sorted(f"pep-{7 * n % 23:04d}" for n in range(20))
    assert [row["id"] for row in train] == ids[:18] and [row["id"] for row in test] == ids[18:]
    topics = {row["id"]: row["text"] for row in read(tmp_path / "a" / "help-test.jsonl.xz")}
    assert "while" in topics and "loop" in topics["while"]
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").iterdir())
    before = (tmp_path / "a/peps-train.jsonl.xz").stat().st_mtime_ns
    assert not make(tmp_path / "a", peps=file) and (tmp_path / "a/peps-train.jsonl.xz").stat().st_mtime_ns == before
    assert make(tmp_path / "a", peps=peps(tmp_path / "more.jsonl.xz", 22))  # another input: made again
    assert len(read(tmp_path / "a/peps-train.jsonl.xz")) == 20


def test_without_a_file_the_archive_is_fetched(tmp_path):
    files = {f"pep-{n:04d}.rst": HEAD + f"Text {n}." + FREE for n in range(3)}
    assert make(tmp_path / "a", fetch=lambda: archive(files))
    assert [row["id"] for row in read(tmp_path / "a/peps-test.jsonl.xz")] == ["pep-0002"]
    with pytest.raises(DataError, match=r"file:///nowhere: cannot be fetched .*--peps FILE, make real TEXT=FILE"):
        REAL_TEXT["fetch_archive"]("file:///nowhere")


BAD = {
    "expected text in id, text; correct the file": '{"id": "pep-0001"}\n',
    "line 2: expected text in id, text": '{"id": "pep-0001", "text": "a"}\n[1]\n',
    "not complete JSON lines": '{"id": "pep-0001", "te',
    "holds no row": "",
    "1 row, expected at least 2": '{"id": "pep-0001", "text": "a"}\n',
    "id 'pep': expected a number in it": '{"id": "pep", "text": "a"}\n{"id": "pep-0002", "text": "a"}\n',
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_holds_no_proposals_is_named_and_nothing_is_written(tmp_path, message):
    (tmp_path / "a.jsonl").write_text(BAD[message])
    with pytest.raises(DataError, match=message):
        make(tmp_path / "out", peps=tmp_path / "a.jsonl")
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_named(tmp_path):
    file = peps(tmp_path / "peps.jsonl.xz")
    with pytest.raises(DataError, match=r"gone.jsonl: no such file, expected JSON lines with id, text"):
        make(tmp_path / "out", peps=tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="--questions and --teacher belong together"):
        make(tmp_path / "out", peps=file, questions=file)
    (tmp_path / "cut.jsonl.xz").write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut.jsonl.xz: not complete JSON lines"):
        make(tmp_path / "out", peps=tmp_path / "cut.jsonl.xz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    with pytest.raises(CheckpointError, match="mine exists already and is not empty"):
        make(tmp_path / "mine", peps=file)
