"""Checkpoint directories: written whole or not at all, listed with their hashes, and with a record of where they came from."""
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from pathlib import Path

from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError

FORMAT_VERSION = 1
MANIFEST, PROVENANCE = "manifest.json", "provenance.json"


def check_space(path, needed):
    """Raise CheckpointWriteError unless the disk under `path` has `needed` bytes free."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(f"{Path(path).name} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or choose another directory; nothing was written")


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged(path, overwrite=False):
    """A temporary sibling directory that becomes `path` when the block succeeds and disappears when it fails.

    Args:
        overwrite: replace what is there, once the new one is complete; otherwise a non-empty `path` is refused.
    Raises:
        CheckpointError: `path` is a file, or a non-empty directory and `overwrite` is False.
        CheckpointWriteError: the disk refused; what was at `path` is untouched.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise CheckpointError(f"{path} exists already: choose another directory, or allow overwriting")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            sync(file)
        retired = path.parent / f".old-{temporary.name}"
        if path.exists():
            os.rename(path, retired)
        os.rename(temporary, path)
        sync(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointWriteError(f"could not write {path.name}: {error.strerror or error}; what was there before is untouched") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path, value):
    """Write JSON to a temporary file, then rename: a reader sees the old text or the new one."""
    temporary = Path(path).with_name(f".tmp-{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path, what):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{what}: {Path(path).name} cannot be read ({error}); restore it or make the checkpoint again") from error


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory):
    """List every file of a checkpoint with its size and SHA-256 in manifest.json; written last."""
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": digest(p)} for p in files}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})


def verify(directory, level="full"):
    """Compare a checkpoint with its manifest.

    Args:
        level: "full" hashes every file, "size" looks at sizes only.
    Raises:
        CheckpointError: no manifest, a newer format, or a file that is missing or differs; it names the file, expected and found.
    """
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST, directory.name)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{directory.name}: manifest format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}; upgrade xlstm-hybrid")
    for name, entry in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory.name}: {name} is listed in the manifest and missing; make or download the checkpoint again")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{directory.name}: {name} has {file.stat().st_size} bytes, expected {entry['size']}; make or download the checkpoint again")
        if level == "full" and (found := digest(file)) != entry["sha256"]:
            raise CheckpointError(f"{directory.name}: {name} has SHA-256 {found[:12]}..., expected {entry['sha256'][:12]}...; its bytes were damaged")


def versions():
    """Versions of what made a checkpoint."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "xlstm-hybrid"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_provenance(directory):
    """Stages that a checkpoint went through, oldest first; [] where there is no record."""
    path = Path(directory) / PROVENANCE
    return read_json(path, Path(directory).name)["stages"] if path.is_file() else []


def add_provenance(directory, stage, parent=None, stages=None, config=None, data=None, figures=None, seconds=None):
    """Write provenance.json: the parent's stages (or `stages`) and this one. Paths are kept by their last component only."""
    stages = (read_provenance(parent) if parent is not None and Path(parent).is_dir() else []) if stages is None else list(stages)
    entry = {"stage": stage, "parent": Path(str(parent)).name if parent is not None else None, "config": config, "data": data, "figures": figures,
             "seconds": seconds, "versions": versions()}
    write_json(Path(directory) / PROVENANCE, {"format_version": FORMAT_VERSION, "stages": [*stages, {k: v for k, v in entry.items() if v is not None}]})


def weight_files(directory):
    """`{tensor name: file}` of a safetensors checkpoint, single or sharded.

    Raises:
        CheckpointError: no weights, an index entry that is no plain file name, or a shard that is missing.
    """
    from safetensors import safe_open

    directory = Path(directory)
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        names = read_json(index, directory.name)["weight_map"]
        for name in sorted(set(names.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{directory.name}: the index points to {name!r}, expected a plain file name")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory.name}: shard {name} is missing; copy or download it again")
        return {tensor: directory / name for tensor, name in names.items()}
    if not single.is_file():
        raise CheckpointError(f"{directory.name}: expected model.safetensors or model.safetensors.index.json, found neither; save the model as safetensors")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
