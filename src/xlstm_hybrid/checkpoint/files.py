"""Checkpoint directories: written whole or not at all, listed with their hashes, with a record of their stages."""

import contextlib
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
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError

FORMAT_VERSION = 1
MANIFEST, PROVENANCE = "manifest.json", "provenance.json"
JSON_BYTES = 2**24  # larger than any index of 20,000 tensors
SECRETS = re.compile(r"(hub|hf|access|auth)_?token|secret|password|api_?key", re.IGNORECASE)


# --- files -----------------------------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes to a temporary file, then rename: a reader sees the old content or the new one. A device or a pipe,
    such as /dev/stdout, is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    temporary = path.with_name(f".tmp-{path.name}-{owner(os.getpid())}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path, error):
    return CheckpointWriteError(
        f"could not write {path.name} ({error.strerror or error}): make room or choose another directory; "
        "what was there before is untouched"
    )


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise CheckpointWriteError(
            f"{Path(path).name} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: "
            "make room or choose another directory; nothing was written"
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


def dead(text):
    """Whether `text`, made by `owner`, names a process of this machine that is no more."""
    pid = text.rpartition("-")[2]
    if not pid.isdigit() or text != owner(pid):
        return False  # not written yet, or of another machine
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # of another kind: alive, and somebody else's
        return isinstance(error, ProcessLookupError)
    return False


def remove_abandoned(path, kind=".tmp"):
    """Remove temporary files and directories of `path` whose process on this machine was killed; those of other
    machines stay.
    """
    for folder in path.parent.glob(f"{kind}-{path.name}-*"):
        tail = folder.name.removeprefix(f"{kind}-{path.name}-").split("-")
        if len(tail) == 3 and dead("-".join(tail[:2])):
            shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)


def clean_abandoned(directory):
    """Remove what killed processes of this machine left half-written in `directory`, and what a directory that is there
    was about to replace.
    """
    for folder in [*Path(directory).glob(".tmp-*-*-*-*"), *Path(directory).glob(".old-*-*-*-*")]:
        path = folder.absolute().parent / folder.name[5:].rsplit("-", 3)[0]
        remove_abandoned(path)
        if path.exists():
            remove_abandoned(path, ".old")


@contextlib.contextmanager
def staged(path, overwrite=False):
    """A temporary sibling directory that becomes `path` when the block succeeds and disappears when it fails.

    Everything reaches the disk before the rename. Replacing takes two renames: after a power cut between them the old
    and the new directory are both complete, beside `path` under names with a dot.

    Args:
        overwrite: replace what is there, once the new one is complete; otherwise a non-empty `path` is refused.
    Raises:
        CheckpointError: `path` is a file, or a non-empty directory and `overwrite` is False, before the block or after
            it.
        CheckpointWriteError: the disk refused; what was at `path` is untouched.
    """
    path = Path(path).absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"{path.name} exists and is no directory: choose another place")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{path.name} exists already and is not empty: choose another directory, or allow overwriting"
        )
    mark = f"{path.name}-{owner(os.getpid())}-{uuid.uuid4().hex[:8]}"
    temporary, retired = path.parent / f".tmp-{mark}", path.parent / f".old-{mark}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary.mkdir()
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            sync(file)
        there = path.exists()
        if there and not overwrite and any(path.iterdir()):
            raise CheckpointError(
                f"{path.name} was written by another process in the meantime, and is kept: start again to go on from it"
            )
        if there:
            os.rename(path, retired)
        try:
            os.rename(temporary, path)
        except OSError:
            if there:
                os.rename(retired, path)
            raise
        sync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


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


def verify_files(directory, level="full", hash_of=None):
    """Compare a checkpoint with its manifest.

    Args:
        level: "full" hashes every file, "size" looks at sizes only.
        hash_of: what hashes a file; None reads it, `digests.file_digest` remembers.
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
        file, fault = directory / name, None
        if not inside(directory, file):
            fault = f"{MANIFEST} lists {name!r}, expected names inside of the directory"
        elif not file.is_file():
            fault = f"{name} is missing, expected {entry['size']} bytes"
        elif file.stat().st_size != entry["size"]:
            fault = f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
        elif level == "full" and (found := (hash_of or digest)(file)) != entry["sha256"]:
            fault = f"{name} has SHA-256 {found[:12]}..., expected {str(entry['sha256'])[:12]}..., it is damaged"
        if fault:
            raise CheckpointError(f"{directory.name}: {fault}; {step}")
    # a stale index or shard would be loaded in the place of the listed ones
    for file in sorted(directory.glob("*.safetensors*")):
        if file.name not in listed:
            raise CheckpointError(
                f"{directory.name}: {file.name} is not listed in {MANIFEST}, expected no other weights; remove it, or make the "
                "checkpoint again"
            )


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
    write_json(Path(directory) / PROVENANCE, {"format_version": FORMAT_VERSION, "stages": [*stages, entry]})


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
    relist(directory, PROVENANCE)


def relist(directory, name):
    """Bring one file's entry in the manifest up to date, and no other: what else changed must show. Without a manifest
    nothing is done.
    """
    file, path = Path(directory) / name, Path(directory) / MANIFEST
    if path.is_file():
        manifest = read_versioned(path, Path(directory).name)
        files = (manifest.get("files") or {}) | {name: {"size": file.stat().st_size, "sha256": digest(file)}}
        write_json(path, manifest | {"files": dict(sorted(files.items()))})


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
