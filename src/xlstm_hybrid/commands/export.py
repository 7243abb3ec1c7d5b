"""The verb `export`: a checkpoint that carries its code."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a student.")],
    out: Annotated[Path, typer.Argument(help="Directory of the export, made new.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")] = False,
):
    """Copy CHECKPOINT with the code of its architecture: OUT loads with trust_remote_code=True where this package is not installed."""
    from xlstm_hybrid.hub.export import export

    print(export(checkpoint, out, overwrite=overwrite))


VERBS = [export]
