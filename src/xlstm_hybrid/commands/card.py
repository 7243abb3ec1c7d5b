"""`xlstm-hybrid card`: a model card from a checkpoint's record."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.reports.card import write_card


def card(
    directory: Annotated[Path, Argument(help="Checkpoint with a provenance.json.")],
    results: Annotated[Path | None, Option(help="results.json of a run.")] = None,
):
    """Write the model card of a checkpoint from what its stages recorded.

    Example: xlstm-hybrid card runs/tiny/student --results runs/tiny/results.json
    """
    check_output(directory / "README.md", "file")
    require_intact(directory, but=("README.md",))
    write_card(directory, json.loads(results.read_text(encoding="utf-8")) if results else None)
    print(f"wrote {directory / 'README.md'}")
