"""`xlstm-hybrid merge`: experts into one student, with weights given or searched for."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Overwrite
from xlstm_hybrid.errors import MergeError
from xlstm_hybrid.merging.merge import merge as merge_checkpoints
from xlstm_hybrid.pipeline import merging


def merge(
    out: Annotated[Path, Argument(help="Directory of the merged student, made new.")],
    experts: Annotated[list[Path], Argument(help="Checkpoints of experts that share one start.")],
    weights: Annotated[str | None, Option(help="Shares in the experts' order: 0.5,0.5; uniform by default.")] = None,
    group_weights: Annotated[list[str] | None, Option(help="GROUP=SHARES of gates, mlp, ...; repeatable.")] = None,
    method: Annotated[
        str, Option(help="linear, task_arithmetic, ties, dare, dare_ties, slerp, fisher or regmean.")
    ] = "linear",
    option: Annotated[list[str] | None, Option(help="NAME=NUMBER of the method: density=0.3; repeatable.")] = None,
    statistics: Annotated[list[Path] | None, Option(help="One file per expert (fisher, regmean); repeatable.")] = None,
    base: Annotated[Path | None, Option(help="Common start, for methods that need it.")] = None,
    search: Annotated[str | None, Option(help="Find the weights, compared with this teacher (path or hub id).")] = None,
    prompts: Annotated[int, Option(help="Prompts per domain that a search scores candidates by.")] = 64,
    budget: Annotated[int, Option(help="Candidates of a search.")] = 40,
    unrecorded: Annotated[bool, Option("--unrecorded", help="Merge experts without a record of their stages.")] = False,
    overwrite: Overwrite = False,
):
    """Stage III: merge experts into one student.

    With weights that are given, or that a search finds by scores on held-out prompts.

    Example: xlstm-hybrid merge runs/merged runs/tiny/experts/symbols runs/tiny/experts/memory --weights 0.5,0.5
    """
    check_output(out, inputs=[*experts, *(statistics or ()), *([base] if base else ())], overwrite=overwrite)
    settings = {"method": method, "base": base, "overwrite": overwrite, "unrecorded": unrecorded}
    settings["options"] = {name: parse_number(value, name) for name, value in parse_pairs("--option", option)}
    settings["statistics"] = statistics or None
    shares = None if weights is None else parse_numbers(weights, "--weights")
    groups = {name: parse_numbers(value, name) for name, value in parse_pairs("--group-weights", group_weights)}
    if search is None:
        merge_checkpoints(experts, out, weights=shares, group_weights=groups or None, **settings)
        print(f"merged {len(experts)} experts into {out}")
        return
    if shares or groups:
        raise MergeError("--search finds the weights: leave --weights and --group-weights out")
    table = out.with_name(f"{out.name}.search.json")  # a second call goes on from it
    with Console(stderr=True).status("scoring the teacher") as status:
        settings |= {"budget": budget, "progress": lambda c: status.update(f"last candidate: {c.scores}")}
        found = merging.search_experts(experts, out, search, *merging.domain_scorer(prompts), table, **settings)
    print(found.markdown())


def parse_pairs(option, entries):
    """[(name, value)] of entries NAME=VALUE."""
    split = [entry.partition("=")[::2] for entry in entries or ()]
    if wrong := [name for name, value in split if not (name and value)]:
        raise MergeError(f"{option} {wrong[0]}: expected NAME=VALUE")
    return split


def parse_number(text, name):
    try:
        return float(text)
    except ValueError as error:
        raise MergeError(f"{name}={text}: expected a number") from error


def parse_numbers(text, name):
    return [parse_number(part, name) for part in text.split(",")]
