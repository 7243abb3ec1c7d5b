"""What files hold, by content: hashes that are read once and remembered, and checkpoints compared with their manifests.

A hash is remembered by device, inode, size and time of the last change, in `digests.json` of the cache folder, so that a
check of a large checkpoint costs one read and then none.
"""

import hashlib
import json
import logging
import os
import time
from contextvars import ContextVar
from pathlib import Path

from xlstm_kernels.backends.verified import cache_folder

from xlstm_hybrid.checkpoint.files import MANIFEST, contained, digest, verify_files, weight_files, write_json
from xlstm_hybrid.errors import CheckpointError

SMALL = 1 << 20  # bytes up to which a file is read each time
SETTLED = 2.0  # seconds: a younger file may change once more without another time of its last change
REMEMBERED = 4096  # files
# `--trust`: checkpoints are not compared with their manifests
TRUSTED = ContextVar("trusted", default=False)
log = logging.getLogger(__name__)


def remembered():
    return cache_folder() / "digests.json"


def known_digests():
    try:
        found = json.loads(remembered().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def file_digest(path):
    """SHA-256 of a file; of one that has not changed since it was read, from memory."""
    status = os.stat(path)
    if status.st_size <= SMALL:
        return digest(path)
    key = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if found := known_digests().get(key):
        return found
    found = digest(path)
    if (
        time.time() - max(status.st_mtime, status.st_ctime) > SETTLED
        and os.stat(path).st_mtime_ns == status.st_mtime_ns
    ):
        try:
            remembered().parent.mkdir(parents=True, exist_ok=True)
            entries = list((known_digests() | {key: found}).items())[-REMEMBERED:]
            write_json(remembered(), dict(entries))
        except (OSError, CheckpointError) as error:
            log.debug("hashes are not remembered: %s", error)
    return found


def weights_hash(directory):
    """SHA-256 over config and weights of a checkpoint directory, whatever its files are called elsewhere; of a GGUF file
    that of the file.
    """
    directory = Path(directory)
    if directory.is_file():
        return file_digest(directory)
    names = sorted({"config.json", *(file.name for file in weight_files(directory).values())})
    lines = "".join(f"{name} {file_digest(contained(directory, name))}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def require_intact(checkpoint, listed=False, but=()):
    """Raise CheckpointError where a directory is not what its manifest says. One without a manifest passes unless it has
    to be `listed`; so does a hub id; files named in `but` may have changed. Under `--trust` nothing is read, and a line
    says so.
    """
    if not listed and not (Path(checkpoint) / MANIFEST).is_file():
        return
    if TRUSTED.get():
        log.warning("%s: not compared with its manifest (--trust)", Path(checkpoint).name)
    else:
        verify_files(checkpoint, hash_of=file_digest, but=but)
