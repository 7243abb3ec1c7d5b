"""`xlstm-hybrid mergekit-architecture`: a student as mergekit wants it described."""

from pathlib import Path
from typing import Annotated

import typer

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.merging.merge import mergekit_architecture as describe


def mergekit_architecture(
    checkpoint: Annotated[Path, typer.Argument(help="A student.")],
    out: Annotated[
        Path,
        typer.Argument(help="JSON file; copy it to mergekit/_data/architectures to merge such students with mergekit."),
    ],
):
    """Describe a student's architecture for users of mergekit.

    Example: xlstm-hybrid mergekit-architecture runs/tiny/student xlstm_hybrid.json
    """
    write_json(out, describe(checkpoint))
    print(f"wrote {out}")
