"""`xlstm-hybrid doctor`: what to look at first, and what to paste into an issue."""

import json
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer

from xlstm_hybrid.doctor import as_json, diagnose, wrong

WIDTHS = (20, 28, 7, 42)  # of the columns: 100 characters are what an issue shows without scrolling
COLOURS = {"WRONG": "red", "note": "yellow"}


def doctor(out: Annotated[Path | None, typer.Option("--json", help="File for what was found, JSON.")] = None):
    """Say what is installed and what this machine has, against what was tested.

    To be pasted into an issue. Exit code 1 if something is wrong; what is optional may be missing.

    Example: xlstm-hybrid doctor --json doctor.json
    """
    found = diagnose()
    for section, rows in found.items():
        typer.secho(f"# {section}", bold=True)
        for row in rows:
            typer.secho(shown(row), fg=COLOURS.get(row.verdict))
    faults = wrong(found)
    print(f"wrong: {', '.join(faults)}" if faults else "nothing is wrong")
    if out is not None:
        out.write_text(json.dumps(as_json(found), indent=1))
    if faults:
        raise typer.Exit(1)


def shown(row):
    """Lines of a row: its cells in columns, and the command below them, in one piece so that it can be copied."""
    cells = [
        wrap(cell, width) or [""]
        for cell, width in zip((row.name, row.found, row.verdict, row.note), WIDTHS, strict=True)
    ]
    lines = [
        " ".join(cell.ljust(width) for cell, width in zip(line, WIDTHS, strict=True))
        for line in zip_longest(*cells, fillvalue="")
    ]
    if row.mend:
        lines.append(" " * (WIDTHS[0] + 1) + row.mend)
    return "\n".join(line.rstrip() for line in lines)
