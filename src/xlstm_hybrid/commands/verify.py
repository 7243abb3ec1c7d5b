"""`xlstm-hybrid verify`: whether a student is the same model in all the ways that it can be run."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.evaluation.equivalence import checks_as_json, verify_checkpoint


def verify(
    model: Annotated[str, Argument(help="Student: checkpoint directory or hub id.")],
    length: Annotated[int | None, Option(help="Tokens of the random rows; by default, the window wraps.")] = None,
    dtype: Annotated[str | None, Option(help="Of the checked copy; by default float64, or float32 to fit.")] = None,
    device: Annotated[str, Option(help="Where to run, for example cuda.")] = "cpu",
    accept_config: Annotated[bool, Option(help="Let settings pass that differ from those of the training.")] = False,
    out: Annotated[Path | None, Option("--json", help="File for the results, JSON.")] = None,
):
    """Check that cache, padding, packing, beams, rollback and files change nothing.

    And that no setting of the configuration has changed since the weights were trained.

    Exit code 1 if a check fails.

    Example: xlstm-hybrid verify runs/tiny/student --json verify.json
    """
    if out is not None:
        check_output(out, "file")
    device = device_of(device)
    columns = ("check", "dtype", "largest difference", "allowed", "verdict")
    table = Table(*columns, caption="in standard deviations of the logits")
    with Console(stderr=True).status("checking") as status:
        how = {"length": length, "dtype": dtype, "device": device, "accept_config": accept_config}
        results = verify_checkpoint(model, **how, report=lambda r: status.update(f"after: {r.name}"))
    for r in results:
        allowed = f"{'>= ' if r.at_least else ''}{r.allowed:.1e}"
        verdict, style = ("passed", None) if r.passed else ("FAILED", "red")
        table.add_row(r.name, r.dtype, f"{r.difference:.2e}", allowed, verdict, style=style)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for r in results:
        if r.note:
            console.print(f"{r.name}: {r.note}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_json(out, checks_as_json(results, model=Path(model).name, device=device))
    if not all(r.passed for r in results):
        raise typer.Exit(1)
