"""Checkpoint directories: written whole or not at all, listed with their hashes, with a record of their stages."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from xlstm_hybrid.checkpoint.kinds import INDEX, SINGLE, check_layout, check_names
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, XLSTMHybridError

FORMAT_VERSION = 1
MANIFEST, PROVENANCE = "manifest.json", "provenance.json"
NEXT = "next"  # in an entry of the manifest: what its file is about to become
JSON_BYTES = 2**24  # larger than any index of 20,000 tensors
SECRETS = re.compile(r"(hub|hf|access|auth)_?token|secret|password|api_?key", re.IGNORECASE)


# --- files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_file(path, needed=0, tidy=True):
    """A temporary name that becomes file `path` when the block succeeds: a reader sees the old content or the new one.

    It lies in a directory of its own, so that our name is on what a serialiser leaves beside it as well.

    Args:
        needed: bytes that the file will have, for the message of a full disk.
        tidy: remove what killed processes of this machine left of `path`; it costs a look through the directory.
    Raises:
        CheckpointWriteError: the disk refused; what was at `path` is untouched.
    """
    path = Path(path)
    folder = path.with_name(f".tmp-{mark(path)}")
    try:
        if tidy:
            remove_abandoned(path)
        folder.mkdir()
        yield folder / path.name
        sync(folder / path.name)
        os.chmod(folder / path.name, folder.stat().st_mode & 0o666)  # safetensors gives a file to its owner alone
        os.replace(folder / path.name, path)
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        needed = max(needed, size_of(folder))
        remove(folder)
        raise not_written(path, found, needed) from error
    finally:
        remove(folder)


def write_file(path, content, tidy=True):
    """Write bytes as `staged_file` does. A device or a pipe, such as /dev/stdout, is written to as it is."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    with staged_file(path, len(content), tidy) as temporary:
        temporary.write_bytes(content)


def disk_error(error):
    """The OSError that an exception is, or that a serialiser in Rust tells of in its text; None for anything else."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None or isinstance(error, XLSTMHybridError):
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


def not_written(path, error, needed=0):
    """The CheckpointWriteError for what the disk refused while `path`, of `needed` bytes, was written."""
    step, folder = "allow writing there, or choose another directory", existing(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free
        missing = f"{needed - free:,} bytes are missing" if needed > free else "a quota or another process filled it"
        step = f"make room or choose another directory ({needed:,} bytes needed, {free:,} free in {folder}: {missing})"
    elif error.errno == errno.EIO:
        step = f"look at the disk that holds {folder}, or choose another directory"
    return CheckpointWriteError(
        f"could not write {Path(path).name} ({error.strerror or error}): {step}; what was there before is untouched"
    )


def size_of(directory):
    """Bytes of all files in a directory and below."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def existing(path):
    """The directory that holds `path`, or will hold it once those between are made."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def json_bytes(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path, value):
    write_file(path, json_bytes(value))


def read_object(path, limit, refuse):
    """The object in a JSON file of at most `limit` bytes. Where it is missing, damaged, too large or no object,
    `refuse(reason)` is raised.
    """
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size} bytes, expected at most {limit}")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(error.strerror if isinstance(error, OSError) else error) from error
    return value


def read_json(path, what):
    """The object in a JSON file of checkpoint `what`; CheckpointError where it is missing, damaged, too large or no
    object.
    """
    path, step = Path(path), "restore it or make the checkpoint again"
    return read_object(
        path, JSON_BYTES, lambda reason: CheckpointError(f"{what}: {path.name} cannot be read ({reason}); {step}")
    )


def read_versioned(path, what):
    value = read_json(path, what)
    if (found := value.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{what}: {path.name} has format_version {found}, expected {FORMAT_VERSION}; upgrade xlstm-hybrid"
        )
    return value


# --- writing a directory ---------------------------------------------------------------------------------------


def check_space(path, bytes_needed):
    """Raise CheckpointWriteError unless the disk that will hold `path` has `bytes_needed` free."""
    folder = existing(path)
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise CheckpointWriteError(
            f"{Path(path).name} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or choose "
            f"another directory, {math.ceil(bytes_needed - free):,} bytes are missing in {folder}; nothing was written"
        )


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def owner(pid):
    """Part of a temporary name: a process of this machine, the machine as a digest."""
    return f"{hashlib.sha256(platform.node().encode()).hexdigest()[:6]}-{pid}"


def mark(path):
    """What follows `.tmp-` and `.old-` in the names of what this process is about to put at `path`."""
    return f"{Path(path).name}-{owner(os.getpid())}-{uuid.uuid4().hex[:8]}"


def dead(text, own=False):
    """Whether `text`, made by `owner`, names a process of this machine that is no more; or, with `own`, this one."""
    pid = text.rpartition("-")[2]
    if own and text == owner(os.getpid()):
        return True
    if not pid.isdigit() or text != owner(pid):
        return False  # not written yet, or of another machine
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # of another kind: alive, and somebody else's
        return isinstance(error, ProcessLookupError)
    return False


def remove(path):
    """Remove a file or a directory, as far as the system lets us."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard(directory):
    """Remove a directory that is no longer needed: at once it has a temporary name, so that no half of it is taken for
    the whole.
    """
    directory = Path(directory).absolute()
    temporary = directory.with_name(f".tmp-{mark(directory)}")
    with contextlib.suppress(OSError):
        os.rename(directory, temporary)
        remove(temporary)


def remove_abandoned(path, own=False):
    """Finish or undo what killed processes of this machine had begun at `path`; what was done, in words. What belongs to
    other machines stays.
    """
    path, done = Path(path), []
    size = len(path.name) + 6
    found = [p for p in path.parent.glob(f".*-{glob.escape(path.name)}-*") if p.name[:5] in (".old-", ".tmp-")]
    found = [p for p in found if p.name[size:].count("-") == 2 and dead(p.name[size:].rpartition("-")[0], own)]
    for there in sorted(found):  # `.old-x`, that makes place for `.tmp-x`, comes first
        begun = path.with_name(there.name.replace(".old-", ".tmp-", 1))
        if there.name.startswith(".tmp-"):
            text = f"undone: {path.name}, of which a part was written" if there.exists() else None
            remove(there)
        elif path.exists():
            text = f"finished: {path.name} is the new one, the one before is removed"
            remove(there)
        elif begun.exists():
            os.rename(begun, path)
            text = f"finished: {path.name} was complete and is in its place, the one before is removed"
            remove(there)
        else:
            os.rename(there, path)
            text = f"undone: {path.name} is the one from before"
        done += [text] if text else []
    return done


def clean_abandoned(directory, own=False):
    """`remove_abandoned` for all that killed processes of this machine had begun in `directory`; with `own` also for what
    this process did not get removed, where nothing else of it writes there.
    """
    left = [*Path(directory).glob(".old-*-*-*-*"), *Path(directory).glob(".tmp-*-*-*-*")]
    paths = {folder.absolute().parent / folder.name[5:].rsplit("-", 3)[0]: None for folder in left}
    return [text for path in paths for text in remove_abandoned(path, own)]


def exchange(one, other):
    """Let two directories change places in one step; False where the system, or the file system, has no such step."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def put_in_place(temporary, path):
    """Put a complete directory where another one is, which then has the temporary name.

    Without an exchange it takes two renames. A process that ends between them leaves `.old-x` and `.tmp-x` and no
    `path`: these names say enough for `remove_abandoned` to finish.
    """
    if exchange(temporary, path):
        return
    retired = temporary.with_name(temporary.name.replace(".tmp-", ".old-", 1))
    try:
        os.rename(path, retired)
        os.rename(temporary, path)
    except BaseException:
        if retired.exists() and not path.exists():
            os.rename(retired, path)
        raise
    os.rename(retired, temporary)


@contextlib.contextmanager
def staged(path, overwrite=False, needed=0):
    """A temporary sibling directory that becomes `path` when the block succeeds and disappears when it fails.

    Everything reaches the disk before the directory gets its name. At every moment there is the old one or the new one
    at `path`; where the file system cannot exchange two directories there is a moment without either, which the next
    command for `path`, or `xlstm-hybrid doctor`, ends if the process did not.

    Args:
        overwrite: replace what is there, once the new one is complete; otherwise a non-empty `path` is refused.
        needed: bytes that the directory will have, about: so much has to be free.
    Raises:
        CheckpointError: `path` is a file, or a non-empty directory and `overwrite` is False, before the block or after
            it.
        CheckpointWriteError: too little room, or the disk refused; what was at `path` is untouched.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".tmp-{mark(path)}")
    retired = path.with_name(temporary.name.replace(".tmp-", ".old-", 1))
    try:
        remove_abandoned(path)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path.name} exists and is no directory: choose another place")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise CheckpointError(
                f"{path.name} exists already and is not empty: choose another directory, or allow overwriting"
            )
        check_space(path, needed)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for left in temporary.rglob(".tmp-*"):  # of a file in it, whose removal the disk refused
            remove(left)
        for file in [*temporary.rglob("*"), temporary]:
            sync(file)
        there = path.exists()
        if there and not overwrite and any(path.iterdir()):
            raise CheckpointError(
                f"{path.name} was written by another process in the meantime, and is kept: start again to go on from it"
            )
        put_in_place(temporary, path) if there else os.rename(temporary, path)
    except Exception as error:
        if (found := disk_error(error)) is None:
            raise
        needed = max(needed, size_of(temporary))
        if not retired.exists():
            remove(temporary)
        raise not_written(path, found, needed) from error
    finally:
        if not retired.exists():  # else it may be the only whole one
            remove(temporary)
    try:
        sync(path.parent)
    except OSError as error:
        raise CheckpointWriteError(
            f"{path.name} is complete, but the disk may not keep it ({error.strerror}): look at the disk that holds {path.parent}"
        ) from error


# --- manifest --------------------------------------------------------------------------------------------------


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory):
    """List every file of a checkpoint with its size in bytes and SHA-256 in manifest.json, sorted by name; to be
    written last.
    """
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    entries = {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": digest(p)} for p in files}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})


def verify_files(directory, level="full", hash_of=None, but=()):
    """Compare a checkpoint with its manifest.

    Args:
        level: "full" hashes every file, "size" looks at sizes only.
        hash_of: what hashes a file; None reads it, `digests.file_digest` remembers.
        but: names of files that may have changed.
    Raises:
        CheckpointError: no manifest, another format, a file that is missing or differs, weights that the manifest does
            not list; it names the file, what was expected and what was found.
    """
    directory, step = Path(directory), "make or download the checkpoint again"
    if level not in ("full", "size"):
        raise CheckpointError(f"verify_files: level={level!r}, expected 'full' or 'size'")
    listed = read_versioned(directory / MANIFEST, directory.name).get("files")
    if not isinstance(listed, dict) or not all(
        isinstance(e, dict) and {"size", "sha256"} <= set(e) for e in listed.values()
    ):
        raise CheckpointError(f"{directory.name}: {MANIFEST} lists no files with size and sha256; {step}")
    for name, entry in listed.items():
        if name in but:
            continue
        fault = misfit(directory, name, entry, level, hash_of)
        if fault and not (NEXT in entry and misfit(directory, name, entry[NEXT], level, hash_of) is None):
            if name == "config.json":
                step = (
                    "if it was edited on purpose, load the model and save it again (save_pretrained), or go on with xlstm-hybrid --trust; else "
                    + step
                )
            raise CheckpointError(f"{directory.name}: {fault}; {step}")
    # a stale index or shard would be loaded in the place of the listed ones
    for file in sorted(directory.glob("*.safetensors*")):
        if file.name not in listed and file.is_file():
            raise CheckpointError(
                f"{directory.name}: {file.name} is not listed in {MANIFEST}, expected no other weights; remove it, or make the "
                "checkpoint again"
            )


def misfit(directory, name, entry, level="full", hash_of=None):
    """What is wrong with a file of a checkpoint beside its entry in the manifest, in words; None if nothing is."""
    file = directory / name
    if not inside(directory, file):
        return f"{MANIFEST} lists {name!r}, expected names inside of the directory"
    if not file.is_file():
        return f"{name} is missing, expected {entry['size']} bytes"
    if file.stat().st_size != entry["size"]:
        return f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
    if level == "full" and (found := (hash_of or digest)(file)) != entry["sha256"]:
        return f"{name} has SHA-256 {found[:12]}..., expected {str(entry['sha256'])[:12]}..., it is damaged"
    return None


def write_listed(directory, name, content):
    """Write a file of a directory, and its entry in the manifest where there is one; no other entry: what else changed
    must show.

    A file and its entry cannot change in one step. The manifest lists the file as it is and as it will be (`next`), then
    the file changes, then the manifest lists it as it is: whichever of these steps is the last one, the checkpoint is
    whole.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    clean_abandoned(directory)
    if not path.is_file():
        write_file(directory / name, content)
        return
    settle_manifest(directory)
    manifest = read_versioned(path, directory.name)
    files, entry = manifest.get("files") or {}, {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if name in files:
        write_json(path, manifest | {"files": files | {name: files[name] | {NEXT: entry}}})
    write_file(directory / name, content)
    write_json(path, manifest | {"files": dict(sorted((files | {name: entry}).items()))})


def settle_manifest(directory):
    """Finish what `write_listed` had begun: the manifest lists each file as it is; what was done, in words."""
    directory, done = Path(directory), []
    manifest = read_versioned(directory / MANIFEST, directory.name)
    files = dict(manifest.get("files") or {})
    for name, entry in files.items():
        if isinstance(entry, dict) and NEXT in entry:
            changed = misfit(directory, name, entry[NEXT]) is None
            files[name] = entry[NEXT] if changed else {key: value for key, value in entry.items() if key != NEXT}
            done.append(f"{'finished' if changed else 'undone'}: {name}, {'new' if changed else 'as before'}")
    if done:
        write_json(directory / MANIFEST, manifest | {"files": files})
    return done


def inside(directory, file):
    """Whether a file is in `directory` or links to the blobs of the Hub's repository that `directory` is a snapshot of."""
    folder, target = directory.resolve(), file.resolve()
    return target.is_relative_to(folder) or (
        file.is_symlink() and target.is_relative_to(folder.parent.parent / "blobs")
    )


def contained(directory, name):
    """The path of a file of a checkpoint by its plain name; CheckpointError for a path, or for a link out of the
    checkpoint.
    """
    directory, file = Path(directory), Path(directory) / name
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(
            f"{directory.name}: names the file {name!r}, expected a plain name; make or download the checkpoint again"
        )
    if not inside(directory, file):
        raise CheckpointError(
            f"{directory.name}/{name}: links to a file outside of the checkpoint; replace the link by the file"
        )
    return file


def checkpoints_by_step(directory):
    """Directories `checkpoint-<step>` of a run, the oldest step first."""
    steps = {path.name.removeprefix("checkpoint-"): path for path in Path(directory).glob("checkpoint-*")}
    return [steps[n] for n in sorted(filter(str.isdigit, steps), key=int) if steps[n].is_dir()]


def newest_verified(directory):
    """`(path, skipped)`: the newest checkpoint of a run that its manifest confirms, or None, and `{name: reason}` of
    newer ones that it does not.
    """
    skipped = {}
    for path in reversed(checkpoints_by_step(directory)):
        try:
            verify_files(path)
            return path, skipped
        except CheckpointError as error:
            skipped[path.name] = str(error)
    return None, skipped


# --- provenance ------------------------------------------------------------------------------------------------


def installed_versions():
    """Versions of what makes a checkpoint: Python, torch, transformers and this package."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "xlstm-hybrid"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def publishable(value):
    """A value as JSON that can be published: an absolute path becomes its last component, a secret goes, a number that
    is not finite is None.
    """
    if isinstance(value, Mapping):
        return {str(k): publishable(v) for k, v in value.items() if not SECRETS.search(str(k))}
    if isinstance(value, list | tuple | set):
        return [publishable(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    text = str(value)
    return Path(text).name if os.path.isabs(text) or text.startswith(("~", "..")) or isinstance(value, Path) else text


def read_provenance(directory):
    """Stages that a checkpoint went through, oldest first; [] where there is no record."""
    directory = Path(directory)
    if not (directory / PROVENANCE).is_file():
        return []
    stages = read_versioned(directory / PROVENANCE, directory.name).get("stages")
    if not isinstance(stages, list) or not all(isinstance(s, dict) and isinstance(s.get("stage"), str) for s in stages):
        raise CheckpointError(
            f"{directory.name}: {PROVENANCE} holds no list of stages; restore it or make the checkpoint again"
        )
    return stages


def add_provenance(directory, stage, parent=None, stages=None, config=None, data=None, figures=None, seconds=None):
    """Write provenance.json: the parent's stages (or `stages`), then this one. It holds no absolute path, no host, no
    secret.

    Args:
        parent: checkpoint directory that the stage started from, or a name; kept by its last component.
        stages: earlier stages, oldest first; read from `parent` if None.
        config, data, figures: what the stage was told, what it read, what it measured: values that JSON has.
        seconds: wall-clock time of the stage.
    """
    parent = parent if parent is None else Path(parent)
    read = parent is not None and parent.is_dir()
    if stages is None:
        stages = read_provenance(parent) if read else []
    name = parent and (parent.resolve() if read else parent).name
    entry = {"stage": stage, "parent": name, "config": config, "data": data, "figures": figures, "seconds": seconds}
    entry["versions"] = installed_versions()
    if read and (parent / MANIFEST).is_file():
        entry["parent_manifest"] = digest(parent / MANIFEST)  # tells starts of the same name apart
    entry = {key: publishable(value) for key, value in entry.items() if value is not None}
    write_listed(directory, PROVENANCE, json_bytes({"format_version": FORMAT_VERSION, "stages": [*stages, entry]}))


def append_stage(directory, stage, config=None, figures=None):
    """Add what was measured of a finished checkpoint to its record, and the record to its manifest.

    Raises:
        CheckpointError: no record of stages, or files that are not those of the manifest.
    """
    directory = Path(directory)
    stages = read_provenance(directory)
    if not stages:
        raise CheckpointError(
            f"{directory.name}: no record of stages, expected a checkpoint that this package made; name its directory"
        )
    if (directory / MANIFEST).is_file():
        verify_files(directory)
    add_provenance(directory, stage, stages=stages, config=config, figures=figures)


# --- weights ---------------------------------------------------------------------------------------------------


def weight_files(directory):
    """`{tensor name: file}` of a safetensors checkpoint, single or sharded; of both the single file, as in transformers.

    Raises:
        CheckpointError: no checkpoint (see `kinds.check_layout`), names that transformers does not read, a damaged file,
            an index entry that is no plain file name, or a shard that is missing.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    check_layout(directory, config=False)
    if (directory / SINGLE).is_file():
        try:
            with safe_open(contained(directory, SINGLE), framework="pt") as file:
                names = dict.fromkeys(file.keys(), directory / SINGLE)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{directory.name}: {SINGLE} or {INDEX} is damaged ({error}); copy or download it again"
            ) from error
    else:
        names = read_json(directory / INDEX, directory.name).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{directory.name}: {INDEX} is damaged (no weight_map); copy or download it again")
        for name in sorted(set(map(str, names.values()))):
            if not contained(directory, name).is_file():
                raise CheckpointError(f"{directory.name}: shard {name} is missing; copy or download it again")
        names = {tensor: directory / name for tensor, name in names.items()}
    check_names(names, directory.resolve().name)
    return names


# --- Markdown --------------------------------------------------------------------------------------------------


def escaped(text):
    """Text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def markdown_table(rows):
    """Rows of values, the first one the header, as a table; the first column is aligned left, the others right."""
    head, *cells = [[escaped(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, [":--", *["--:"] * (len(head) - 1)], *cells))
