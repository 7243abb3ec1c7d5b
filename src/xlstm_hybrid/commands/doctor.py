"""`xlstm-hybrid doctor`: what to look at first, and what to paste into an issue; and what a directory needs."""

from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.checkpoint.repair import repair
from xlstm_hybrid.doctor import diagnose, wrong

WIDTHS = (20, 28, 7, 42)  # of the columns: 100 characters are what an issue shows without scrolling
COLOURS = {"WRONG": "red", "note": "yellow"}


def doctor(
    directory: Annotated[Path | None, Argument(help="Checkpoint or run to repair, in the place of the report.")] = None,
    out: Annotated[Path | None, Option("--json", help="File for what was found, JSON.")] = None,
):
    """Say what is installed and what this machine has, against what was tested.

    To be pasted into an issue. Exit code 1 if something is wrong; what is optional may be missing. With a directory:
    finish or undo in it what an interrupted command had begun, say which, and check its checkpoints.

    Example: xlstm-hybrid doctor --json doctor.json
    """
    if out is not None:
        check_output(out, "file")
    if directory is not None:
        lines, faults = repair(directory)
        for line in [*lines, *(f"damaged: {fault}" for fault in faults)]:
            print(line)
        print(f"{len(faults)} damaged" if faults else "nothing is wrong" if lines else "nothing was interrupted")
        if out is not None:
            write_json(out, {"wrong": faults, "done": lines})
        if faults:
            raise typer.Exit(1)
        return
    found = diagnose()
    for section, rows in found.items():
        typer.secho(f"# {section}", bold=True)
        for row in rows:
            typer.secho(row_lines(row), fg=COLOURS.get(row.verdict))
    faults = wrong(found)
    print(f"wrong: {', '.join(faults)}" if faults else "nothing is wrong")
    if out is not None:
        sections = {section: [row._asdict() for row in rows] for section, rows in found.items()}
        write_json(out, {"wrong": faults, "sections": sections})
    if faults:
        raise typer.Exit(1)


def row_lines(row):
    """A row's cells in columns, and the command below them, in one piece so that it can be copied."""
    cells = zip((row.name, row.found, row.verdict, row.note), WIDTHS, strict=True)
    wrapped = [wrap(cell, width) or [""] for cell, width in cells]
    lines = [" ".join(map(str.ljust, line, WIDTHS)).rstrip() for line in zip_longest(*wrapped, fillvalue="")]
    return "\n".join([*lines, *[" " * (WIDTHS[0] + 1) + row.mend] * bool(row.mend)])
