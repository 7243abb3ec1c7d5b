"""`xlstm-hybrid push`: what leaves this machine."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.hub.push import push as push_folder


def push(
    folder: Annotated[Path, Argument(help="Checkpoint with manifest, provenance and card.")],
    repo: Annotated[str, Argument(help="NAME/NAME on the Hub.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Check only; opens no connection.")] = False,
    private: Annotated[bool, Option("--private", help="Make the repository private, if it is made.")] = False,
    code: Annotated[bool, Option("--code", help="Allow Python files and the auto_map that names them.")] = False,
    message: Annotated[str | None, Option(help="Of the commit.")] = None,
):
    """Check a folder for keys, paths, code and damage, then upload it in one commit.

    Example: xlstm-hybrid push runs/tiny/student somebody/tiny-xlstm --dry-run
    """
    parcel = push_folder(folder, repo, dry_run=dry_run, private=private, code=code, message=message)
    for name, (size, _) in parcel.files.items():
        print(f"{size:>15,} bytes  {name}")
    for text in parcel.warnings:
        print(f"note: {text}")
    done = "would be uploaded; nothing was sent" if dry_run else f"uploaded, commit {parcel.commit}"
    print(f"{len(parcel.files)} files, {parcel.size:,} bytes, to {repo}: {done}")
