"""`xlstm-hybrid compare`: students against their teacher, from files of results."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import PROVENANCE
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.comparison import compare as compare_results
from xlstm_hybrid.evaluation.comparison import open_sides, read_costs, record_comparison
from xlstm_hybrid.reports.comparison import comparison_pictures, sections, write_comparison
from xlstm_hybrid.reports.text import terminal_table


def compare(
    teacher: Annotated[str, Argument(help="Teacher's results: file or folder, lm-eval's or ours; NAME=PATH names it.")],
    students: Annotated[list[str], Argument(help="Students' results, the same way; a run's results.json: all of its.")],
    alpha: Annotated[float, Option(help="Relative tolerance of the verdict, from 0 to 1.")] = 0.0,
    out: Annotated[Path | None, Option(help="Folder for comparison.json, .md, .html and pictures.")] = None,
    tasks: Annotated[str | None, Option(help="Comma-separated benchmarks; all by default.")] = None,
    metric: Annotated[list[str] | None, Option(help="Such as gsm8k=exact_match,flexible-extract; repeatable.")] = None,
    common: Annotated[bool, Option("--common", help="Compare what all sides have, instead of refusing.")] = False,
    allow: Annotated[list[str] | None, Option(help="What may differ, such as version or prompts; repeatable.")] = None,
    cost: Annotated[str | None, Option(help="Pareto front costs: FILE.json[:key] or field:key of the results.")] = None,
    record: Annotated[
        list[str] | None, Option(help="STUDENT=CHECKPOINT: add what was found to its record, for its card; repeatable.")
    ] = None,
    seed: Annotated[int, Option(help="Of the resampling.")] = 0,
    pictures: Annotated[bool, Option(help="Draw pictures; they need matplotlib.")] = True,
):
    """Compare students with their teacher: win-and-tie, recovery, paired statistics.

    Exit code 0 if every student is lossless at alpha, 1 if not, 2 if nothing can be compared or no benchmark counts.

    Example: xlstm-hybrid compare results/teacher mine=results/student --alpha 0.02 --out comparison
    """
    asked = dict(entry.partition("=")[::2] for entry in metric or ())
    if not all(asked.values()):
        raise EvaluationError(
            f"--metric {' '.join(metric)}: expected BENCHMARK=METRIC, such as gsm8k=exact_match,flexible-extract"
        )
    if out is not None:
        check_output(out, "folder")
    for entry in record or ():
        check_output(Path(entry.partition("=")[2]) / PROVENANCE, "file")
    its, theirs = open_sides(teacher, students)
    costs = read_costs(cost, its, theirs) if cost else None
    chosen = [t for t in tasks.split(",") if t] if tasks else None
    compared = {"alpha": alpha, "tasks": chosen, "metrics": asked, "common": common, "allow": tuple(allow or ())}
    found = compare_results(its, theirs, costs=costs, seed=seed, **compared)
    console = Console(width=None if Console().is_terminal else 120, emoji=False, highlight=False)
    for kind, content in sections(found):
        print_section(console, kind, content)
    if out is not None:
        files = write_comparison(found, out, comparison_pictures(found) if pictures else {})
        console.print(f"wrote {', '.join(files)}", markup=False, soft_wrap=True)
    for entry in record or ():
        name, _, directory = entry.partition("=")
        record_comparison(found, name, directory)
        done = f"{name}: in the record of {directory}; write its card again with `xlstm-hybrid card {directory}`"
        console.print(done, markup=False, soft_wrap=True)
    if not any(found["counts"].values()):
        raise EvaluationError(
            f"{found['teacher']} is at chance on all {len(found['counts'])} benchmarks ({', '.join(found['counts'])}): C_α is not "
            "defined; compare on benchmarks that the teacher can do, or evaluate more documents of these"
        )
    if not all(s["lossless"] for s in found["students"].values()):
        raise typer.Exit(1)


def print_section(console, kind, content):
    """One section of a comparison on the terminal."""
    if kind == "table":
        console.print(terminal_table(content))
    elif kind in ("title", "text"):
        console.print(Text(content, style="bold" if kind == "title" else ""))
    elif kind == "list":
        for text in content:
            console.print(Text(f"- {text}"))
