"""`python -m xlstm_arena`: the same teacher, the same budget, every method."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def arena(
    settings: Annotated[
        Path | None, typer.Argument(help="The arena's file; recipes/arena/arena.yaml by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/arena"),
    only: Annotated[
        list[str] | None, typer.Option(help="An arm; repeatable. Arms that it starts from are added.")
    ] = None,
    tier: Annotated[int | None, typer.Option(help="Arms of this tier and those before it.", min=1)] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated; those of the file by default.")] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="A teacher of the file; repeatable. The first one by default.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes of one thread each; 0: none, one job after the other.", min=0)
    ] = 2,
    budget_minutes: Annotated[float | None, typer.Option(help="Begin no job after so many minutes.")] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Make results again whose settings, data or teacher have changed.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Show arms and what became of them, run nothing.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what is there, run nothing.")
    ] = False,
    docs: Annotated[
        Path | None, typer.Option(help="Folder of the report, arena.md and arena/; OUT by default.")
    ] = None,
):
    """Run every arm of an arena on the same teacher with the same budget, and report. Started again, it goes on with
    what is missing.
    """
    from xlstm_arena.arms import load_arena
    from xlstm_arena.report import write_arena_report
    from xlstm_arena.runner import check_trainer_settings, choose_jobs, run_jobs
    from xlstm_arena.summary import summarise
    from xlstm_arena.teacher import provide

    chosen = load_arena(settings)
    provide(chosen, teacher or list(chosen.teachers)[:1], out, make=not (list_only or report_only))
    jobs = choose_jobs(chosen, out, only, seed_numbers(seeds), tier, teacher)
    if list_only:
        list_arms(chosen, jobs)
        return
    if not report_only:
        check_trainer_settings(chosen, dict.fromkeys(job.arm for job in jobs))
        states = run_jobs(chosen, jobs, workers=workers, minutes=budget_minutes, redo=redo)
        print(", ".join(f"{count} {state}" for state, count in Counter(states.values()).items()))
    files = write_arena_report(summarise(chosen, out), docs or out)
    print(f"wrote {', '.join(files)} in {docs or out}")


def seed_numbers(text):
    from xlstm_hybrid.errors import ConfigError

    if text is None:
        return None
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds {text}: expected numbers such as 0,1,2")
    return [int(part) for part in text.split(",")]


def list_arms(chosen, jobs):
    """A table of the arms: tier, tokens, and how many seeds are done."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from xlstm_arena.runner import arm_of, status_of

    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("teacher", "arm", "tier", "tokens", "seeds", "what it is"):
        made.add_column(name, justify="right" if name in ("tier", "tokens") else "left")
    groups = {}
    for job in jobs:
        groups.setdefault((job.teacher, job.arm), []).append(f"{job.seed} {status_of(chosen, job)[0]}")
    for (teacher, name), seeds in groups.items():
        arm = arm_of(chosen, name)
        row = (teacher, name, str(arm.tier), f"{chosen.tokens(arm) / 1e6:.2f}M", ", ".join(seeds), arm.about)
        made.add_row(*map(Text, row))
    Console(width=None if Console().is_terminal else 160, emoji=False, highlight=False).print(made)


def main():
    """Entry point: errors that name their cause are one line, not a traceback."""
    from xlstm_hybrid.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(arena)
    run_app(app)


if __name__ == "__main__":
    main()
