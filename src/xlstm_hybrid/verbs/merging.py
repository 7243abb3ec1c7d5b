"""`xlstm-hybrid merge`: experts into one student, with weights given or searched for."""

from pathlib import Path
from typing import Annotated

import typer

CALIBRATION_SEED = 1  # of the prompts that a search judges by: others than those that the results are measured on


def merge(
    out: Annotated[Path, typer.Argument(help="Directory of the merged student, made new.")],
    experts: Annotated[list[Path], typer.Argument(help="Checkpoints of experts that share one start.")],
    weights: Annotated[str | None, typer.Option(help="Comma-separated shares in the order of the experts; uniform by default.")] = None,
    group_weights: Annotated[list[str] | None, typer.Option(help="GROUP=SHARES for gates, feature_maps, ... ; repeatable.")] = None,
    method: Annotated[str, typer.Option(help="linear, task_arithmetic, ties, dare, dare_ties, slerp, fisher or regmean.")] = "linear",
    option: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER of the method, such as density=0.3; repeatable.")] = None,
    statistics: Annotated[list[Path] | None, typer.Option(help="One file per expert, for fisher and regmean; repeatable.")] = None,
    base: Annotated[Path | None, typer.Option(help="Common start, for methods that need it.")] = None,
    search: Annotated[str | None, typer.Option(help="Find the weights: the teacher, directory or Hub id, to judge candidates against.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts per domain that a search judges by.")] = 64,
    budget: Annotated[int, typer.Option(help="Candidates of a search.")] = 40,
    unrecorded: Annotated[bool, typer.Option("--unrecorded", help="Merge experts without a record of their stages.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")] = False,
):
    """Stage III: merge EXPERTS into one student at OUT."""
    from xlstm_hybrid.errors import MergeError
    from xlstm_hybrid.merging import merge

    settings = {"method": method, "base": base, "overwrite": overwrite, "unrecorded": unrecorded, "statistics": statistics or None}
    settings["options"] = {name: number(value, name) for name, value in pairs("--option", option)}
    shares = None if weights is None else numbers(weights, "--weights")
    groups = {name: numbers(value, name) for name, value in pairs("--group-weights", group_weights)}
    if search is None:
        merge(experts, out, weights=shares, group_weights=groups or None, **settings)
        print(f"merged {len(experts)} experts into {out}")
    elif shares or groups:
        raise MergeError("--search finds the weights: leave --weights and --group-weights out")
    else:
        print(searched(experts, out, search, prompts, budget, settings).markdown())


def pairs(option, entries):
    """[(name, value)] of entries NAME=VALUE."""
    from xlstm_hybrid.errors import MergeError

    split = [entry.partition("=")[::2] for entry in entries or ()]
    if wrong := [name for name, value in split if not (name and value)]:
        raise MergeError(f"{option} {wrong[0]}: expected NAME=VALUE")
    return split


def number(text, name):
    from xlstm_hybrid.errors import MergeError

    try:
        return float(text)
    except ValueError as error:
        raise MergeError(f"{name}={text}: expected a number") from error


def numbers(text, name):
    return [number(part, name) for part in text.split(",")]


def searched(experts, out, teacher, count, budget, settings):
    """Weights under the win-and-tie objective on held-out prompts of the tiny domains; candidates are kept beside `out`, a second call goes on."""
    from rich.console import Console

    from xlstm_hybrid import tasks
    from xlstm_hybrid.evaluation import exact_match
    from xlstm_hybrid.pipeline import load
    from xlstm_hybrid.search import search_merge

    examples = {domain: tasks.test_examples(domain, count, seed=CALIBRATION_SEED) for domain in tasks.DOMAINS}

    def judge(directory):
        model, tokenizer = load(directory)
        return {domain: exact_match(model, tokenizer, rows).score for domain, rows in examples.items()}

    with Console(stderr=True).status("judging the teacher") as status:
        table, calibration = out.with_name(f"{out.name}.search.json"), f"{count} prompts per domain, seed {CALIBRATION_SEED}"
        return search_merge(experts, out, judge, judge(teacher), calibration=calibration, table=table, budget=budget,
                            progress=lambda c: status.update(f"last candidate: {c.scores}"), **settings)  # fmt: skip


VERBS = [merge]
