"""`xlstm-hybrid export`: a student for places where this package is not installed."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Overwrite
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.hub.export import export as export_checkpoint
from xlstm_hybrid.hub.graphs import SAVED, UNABLE, export_graphs

FORMATS = {"code": export_checkpoint} | {kind: partial(export_graphs, kind=kind) for kind in SAVED}


def export(
    checkpoint: Annotated[Path, Argument(help="Directory of a student.")],
    out: Annotated[Path, Argument(help="Directory of the export, made new.")],
    kind: Annotated[str, Option("--format", help="code, onnx or torch-export; gguf and mlx say why not.")] = "code",
    overwrite: Overwrite = False,
):
    """Write a student for places where this package is not installed.

    As a checkpoint with the code of its architecture (trust_remote_code), or as graphs with the state as input and output.

    Example: xlstm-hybrid export runs/tiny/student exported
    """
    if kind not in FORMATS:
        reason = UNABLE.get(kind, "there is no such format")
        raise ConfigError(f"--format {kind}: {reason}; expected one of {', '.join(FORMATS)}")
    check_output(out, inputs=[checkpoint], overwrite=overwrite)
    print(FORMATS[kind](checkpoint, out, overwrite=overwrite))
