"""`xlstm-hybrid push` and what else leaves the machine."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Checkpoint with manifest, provenance and card.")],
    repo: Annotated[str, typer.Argument(help="NAME/NAME on the Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only; opens no connection.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    code: Annotated[bool, typer.Option("--code", help="Allow Python files and the auto_map that names them.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
):
    """Check FOLDER for keys, paths, code and damage, then upload it to REPO in one commit."""
    from xlstm_hybrid.hub.push import push as pushed

    parcel = pushed(folder, repo, dry_run=dry_run, private=private, code=code, message=message)
    for name, (size, _) in parcel.files.items():
        print(f"{size:>15,} bytes  {name}")
    for text in parcel.warnings:
        print(f"note: {text}")
    done = "would be uploaded; nothing was sent" if dry_run else f"uploaded, commit {parcel.commit}"
    print(f"{len(parcel.files)} files, {parcel.size:,} bytes, to {repo}: {done}")


def mergekit_architecture(
    checkpoint: Annotated[Path, typer.Argument(help="A student.")],
    out: Annotated[Path, typer.Argument(help="JSON file; copy it to mergekit/_data/architectures to merge such students with mergekit.")],
):
    """Describe the architecture of CHECKPOINT for users of mergekit."""
    from xlstm_hybrid.checkpoint.files import write_json
    from xlstm_hybrid.merging.merge import mergekit_architecture as described

    write_json(out, described(checkpoint))
    print(f"wrote {out}")


VERBS = [push, mergekit_architecture]
