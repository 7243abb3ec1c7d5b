"""`xlstm-hybrid mergekit-architecture`: a student as mergekit wants it described."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.merging.merge import mergekit_architecture as describe


def mergekit_architecture(
    checkpoint: Annotated[Path, Argument(help="A student.")],
    out: Annotated[Path, Argument(help="JSON file; mergekit wants it in mergekit/_data/architectures.")],
):
    """Describe a student's architecture for users of mergekit.

    Example: xlstm-hybrid mergekit-architecture runs/tiny/student xlstm_hybrid.json
    """
    check_output(out, "file")
    write_json(out, describe(checkpoint))
    print(f"wrote {out}")
