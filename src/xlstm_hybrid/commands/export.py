"""`xlstm-hybrid export`: a checkpoint that carries its code."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Overwrite
from xlstm_hybrid.hub.export import export as export_checkpoint


def export(
    checkpoint: Annotated[Path, Argument(help="Directory of a student.")],
    out: Annotated[Path, Argument(help="Directory of the export, made new.")],
    overwrite: Overwrite = False,
):
    """Copy a checkpoint together with the code of its architecture.

    The copy loads with trust_remote_code=True where this package is not installed.

    Example: xlstm-hybrid export runs/tiny/student exported
    """
    check_output(out, inputs=[checkpoint], overwrite=overwrite)
    print(export_checkpoint(checkpoint, out, overwrite=overwrite))
