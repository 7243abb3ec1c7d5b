"""What interrupted commands have left in a directory: finished or undone, and named."""

import os
from pathlib import Path

from xlstm_hybrid.checkpoint.files import (
    MANIFEST,
    PROVENANCE,
    checkpoints_by_step,
    clean_abandoned,
    misfit,
    read_provenance,
    read_versioned,
    remove_abandoned,
    settle_manifest,
    verify_files,
    write_listed,
)
from xlstm_hybrid.checkpoint.locks import clean_locks
from xlstm_hybrid.errors import CheckpointError

RECORDS = (PROVENANCE, "README.md")  # what an earlier version changed before their entries


def repair(directory):
    """Finish or undo what processes of this machine that are no more had begun: `directory` itself, and all below it.

    Returns:
        `(lines, damaged)`: what was done or is left alone, and the checkpoints that differ from their manifests, each in
        words.
    Raises:
        CheckpointError: no such directory. CheckpointWriteError: the disk refused.
    """
    directory = Path(directory).absolute()
    lines, damaged = remove_abandoned(directory), []
    if not directory.is_dir():
        raise CheckpointError(f"{directory.name}: no such directory, expected one that a command has written to")
    for place, names, _ in os.walk(directory):
        folder = Path(place)
        lines += clean_locks(folder) + clean_abandoned(folder)
        if (folder / MANIFEST).is_file():
            try:
                lines += settle_manifest(folder) + relist_records(folder)
                verify_files(folder)
            except CheckpointError as error:
                damaged.append(str(error))
        names[:] = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        for name in [path.name for path in folder.iterdir() if path.name.startswith((".tmp-", ".old-"))]:
            lines.append(
                f"left alone: {name}, of a process that runs or of another machine; remove it if neither is so"
            )
            names[:] = [other for other in names if other != name]
    for run in sorted(path for path in (directory, *directory.rglob(".run-*")) if path.name.startswith(".run-")):
        if found := checkpoints_by_step(run):
            lines.append(
                f"to be continued: {run.name} holds {found[-1].name}, the command that wrote it goes on from there"
            )
    return lines, damaged


def relist_records(directory):
    """Bring entries of the record and the card up to date where nothing else of a checkpoint has changed: so an earlier
    version left what it was interrupted in, and so does an editor; what was done, in words.
    """
    listed = read_versioned(directory / MANIFEST, directory.name).get("files") or {}
    changed = [name for name in listed if (directory / name).is_file() and misfit(directory, name, listed[name])]
    if not changed or not set(changed) <= set(RECORDS):
        return []
    read_provenance(directory)
    for name in changed:
        write_listed(directory, name, (directory / name).read_bytes())
    return [f"finished: {name}, changed without its entry in {MANIFEST}" for name in changed]
