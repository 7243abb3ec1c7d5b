"""Where a command will write, looked at before it works for hours."""

import errno
import os
import tempfile
from pathlib import Path

from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError

KINDS = ("directory", "folder", "file")
STEPS = {  # by what the system says: what is wrong with a directory, and what to do
    errno.EROFS: ("is on a file system that is read-only", "choose another place, or mount it for writing"),
    errno.EACCES: ("does not let this user write", "choose another place, or change its permissions"),
    errno.EPERM: ("does not let this user write", "choose another place, or change its permissions"),
    errno.ENOSPC: ("is on a disk that is full", "make room or choose another place"),
    errno.EDQUOT: ("is on a disk where this user has no room left", "make room or choose another place"),
}


def check_output(path, kind="directory", inputs=(), overwrite=True, parents=False):
    """Raise a named error unless `path` can be written to; nothing is left there. Call it before the work.

    Args:
        kind: "directory", which is made new or replaced as a whole; "folder", into which files are written, beside those
            that are there; "file".
        inputs: what is read, paths or hub ids, so that it is not replaced.
        overwrite: whether what is there may be replaced; a folder never is.
        parents: whether the directory of a file is made where it is missing; those of the others are.
    Raises:
        CheckpointWriteError: the path leads through a file or nowhere, is of another kind, is what is read, is a file
            that is not to be replaced, or its file system or permissions refuse.
        CheckpointError: `path` is a directory that is not to be replaced.
    """
    assert kind in KINDS, kind
    path = Path(path)
    if "\0" in str(path):
        raise CheckpointWriteError(f"{str(path)!r}: is no name of a file; choose another")
    try:
        refuse(path, kind, inputs, overwrite, parents)
    except OSError as error:  # such as a name that is too long
        reason = error.strerror or error
        raise CheckpointWriteError(f"{path}: cannot be written to ({reason}); choose another place") from error


def refuse(path, kind, inputs, overwrite, parents):
    """`check_output`, where the system may refuse to look."""
    expected = "a file" if kind == "file" else "a directory"
    if path.is_symlink() and not path.exists():
        raise CheckpointWriteError(f"{path}: is a link to {os.readlink(path)}, which is not there; remove the link")
    if path.exists() and kind == "file" and not path.is_dir() and not path.is_file():
        return  # a device or a pipe
    if path.exists() and path.is_dir() is (kind == "file"):
        step = "name a file in it" if kind == "file" else "choose another place"
        raise CheckpointWriteError(
            f"{path}: is a {'directory' if kind == 'file' else 'file'}, expected {expected}; {step}"
        )
    if kind == "directory" and path.exists():
        if path.is_symlink() or os.path.ismount(path):
            what = "a link" if path.is_symlink() else "where a file system is mounted"
            raise CheckpointWriteError(f"{path}: is {what}, which cannot be replaced; choose a directory in it")
        if not overwrite and any(path.iterdir()):
            raise CheckpointError(
                f"{path.name} exists already and is not empty: choose another directory, or allow overwriting (--overwrite)"
            )
    if kind == "file" and path.exists() and not overwrite:
        raise CheckpointWriteError(f"{path.name} exists already: choose another file, or pass --overwrite")
    for source in [Path(source) for source in inputs if Path(source).exists()]:
        target, read = path.resolve(), source.resolve()
        if read == target or (kind == "directory" and read.is_relative_to(target)):
            raise CheckpointWriteError(f"{path}: is or holds {source.name}, which is read; choose another place")
    wanted = folder = path.absolute() if kind == "folder" else path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "no directory"
        raise CheckpointWriteError(f"{path}: {folder.name} is {found}, expected a directory; choose another place")
    if kind == "file" and folder != wanted and not parents:
        raise CheckpointWriteError(f"{path}: there is no directory {wanted.name}; make it, or correct the path")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions do not tell: of root, of other file systems
    except OSError as error:
        wrong, step = STEPS.get(error.errno, (f"takes no file ({error.strerror or error})", "choose another place"))
        raise CheckpointWriteError(f"{path}: {folder} {wrong}; {step}") from error
