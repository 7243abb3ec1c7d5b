"""A place that cannot be written to is named with what is wrong and what to do, and nothing is left where it can."""

import errno
import os
import re

import pytest

from xlstm_hybrid.checkpoint import outputs
from xlstm_hybrid.checkpoint.outputs import KINDS, check_output
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError


@pytest.fixture
def place(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "link").symlink_to("full")
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


WRONG = [
    ("file/student", KINDS, "file is a file, expected a directory; choose another place"),
    ("file/a/b/student", KINDS, "file is a file, expected a directory; choose another place"),
    ("file", ("directory", "folder"), "is a file, expected a directory; choose another place"),
    ("full", ("file",), "is a directory, expected a file; name a file in it"),
    ("nowhere", KINDS, "is a link to gone, which is not there; remove the link"),
    ("nowhere/student", KINDS, "nowhere is no directory, expected a directory; choose another place"),
    ("gone/deep/scores.json", ("file",), "there is no directory deep; make it, or correct the path"),
    ("link", ("directory",), "is a link, which cannot be replaced; choose a directory in it"),
    ("x" * 300, KINDS, r"cannot be written to \(File name too long\)|takes no file"),
    ("a\0b", KINDS, "is no name of a file"),
]


@pytest.mark.parametrize("name, kinds, message", WRONG, ids=[name[:20] for name, *_ in WRONG])
def test_a_place_that_cannot_be_written_to_is_named(place, name, kinds, message):
    before = contents(place)
    for kind in kinds:
        with pytest.raises(CheckpointWriteError, match=message) as stop:
            check_output(place / name, kind)
        assert repr(str(place / name))[1:-1] in str(stop.value)
    assert contents(place) == before


@pytest.mark.parametrize("name", ["new", "deep/new", "empty", "full"])
@pytest.mark.parametrize("kind", ["directory", "folder"])
def test_a_directory_that_can_be_written_to_is_accepted_and_untouched(place, name, kind):
    before = contents(place)
    check_output(place / name, kind)
    assert contents(place) == before


def test_a_file_is_accepted_new_there_and_as_a_device(place, monkeypatch):
    before = contents(place)
    monkeypatch.chdir(place)
    for name in ("new.json", "file", "full/new.json", place / "new.json", "/dev/null", "link/new.json"):
        check_output(name, "file")
    check_output("gone/deep/new.json", "file", parents=True)
    assert contents(place) == before


def test_what_is_there_is_replaced_only_if_asked(place):
    with pytest.raises(CheckpointError, match=r"full exists already and is not empty: choose .* allow overwriting"):
        check_output(place / "full", overwrite=False)
    with pytest.raises(CheckpointWriteError, match=r"file exists already: choose another file, or pass --overwrite"):
        check_output(place / "file", "file", overwrite=False)
    check_output(place / "empty", overwrite=False)


@pytest.mark.parametrize(
    "out, kind, refused",
    [
        ("full", "directory", True),
        (".", "directory", True),  # it holds what is read
        ("link/../full", "folder", True),
        ("full/student", "directory", False),
        (".", "folder", False),
        ("full/mine", "file", False),
    ],
)
def test_the_output_is_not_the_input(place, out, kind, refused):
    inputs = [place / "full", "somebody/on-the-hub"]
    if refused:
        with pytest.raises(CheckpointWriteError, match="is or holds full, which is read; choose another place"):
            check_output(place / out, kind, inputs)
    else:
        check_output(place / out, kind, inputs)
    with pytest.raises(CheckpointWriteError, match="is or holds file, which is read"):
        check_output(place / "file", "file", [place / "file"])


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.EROFS, "is on a file system that is read-only; choose another place, or mount it for writing"),
        (errno.EACCES, "does not let this user write; choose another place, or change its permissions"),
        (errno.ENOSPC, "is on a disk that is full; make room or choose another place"),
        (errno.EIO, r"takes no file \(Input/output error\); choose another place"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(place, monkeypatch, number, message):
    def refused(dir):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refused)
    for kind in KINDS:
        with pytest.raises(CheckpointWriteError, match=f"{re.escape(str(place))} {message}"):
            check_output(place / "new", kind)


def test_where_a_file_system_is_mounted_no_directory_can_be_replaced(place, monkeypatch):
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: path == place / "empty")
    with pytest.raises(CheckpointWriteError, match="is where a file system is mounted, which cannot be replaced"):
        check_output(place / "empty")
    check_output(place / "empty", "folder")
