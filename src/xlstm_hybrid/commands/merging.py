"""`xlstm-hybrid merge`: experts into one student, with weights given or searched for."""

from pathlib import Path
from typing import Annotated

import typer


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
    from xlstm_hybrid.merging.merge import merge

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

    from xlstm_hybrid.pipeline import merging

    with Console(stderr=True).status("judging the teacher") as status:
        judge, calibration = merging.domain_judge(count)
        return merging.searched(experts, out, teacher, judge, calibration, out.with_name(f"{out.name}.search.json"), budget=budget,
                                progress=lambda c: status.update(f"last candidate: {c.scores}"), **settings)  # fmt: skip


def statistics(
    expert: Annotated[Path, typer.Argument(help="Checkpoint of an expert.")],
    data: Annotated[Path, typer.Argument(help="What it is good at: a recipe, or rows as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="File of the statistics, .safetensors; `merge --statistics` reads it.")],
    method: Annotated[str, typer.Option(help="fisher or regmean.")] = "fisher",
    name: Annotated[str | None, typer.Option("--expert", help="Whose rows of the recipe; those of its only expert by default.")] = None,
    rows: Annotated[int, typer.Option(help="Rows that are read.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows per forward of regmean; fisher takes them one by one.")] = 8,
    labels: Annotated[str, typer.Option(help="Of fisher: 'model' draws the tokens from the expert, 'data' takes those of the rows.")] = "model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is at OUT.")] = False,
):
    """Measure what the merge methods fisher and regmean need to know of EXPERT."""
    from itertools import islice

    from xlstm_hybrid.errors import CheckpointWriteError
    from xlstm_hybrid.pipeline.merging import write_statistics

    if out.exists() and not overwrite:
        raise CheckpointWriteError(f"{out.name} exists already: choose another file, or pass --overwrite")
    found = list(islice(read_rows(expert, data, name, rows), rows))
    count = write_statistics(expert, found, out, method, {"batch_size": batch_size, "labels": labels})
    print(f"{method} statistics of {expert.name} over {count} {'rows' if method == 'fisher' else 'tokens'} in {out}")


def read_rows(expert, data, name, count):
    """Packed rows of a folder of `prepare`, or of a recipe's expert."""
    from transformers import AutoTokenizer

    from xlstm_hybrid.commands.stages import read
    from xlstm_hybrid.data import packed_rows
    from xlstm_hybrid.errors import ConfigError

    if data.is_dir():
        from datasets import load_from_disk

        if name is not None:
            raise ConfigError(f"--expert {name}: {data.name} holds rows already; leave it out, or name a recipe")
        return iter(load_from_disk(data))
    recipe, name = read(data, name)
    return iter(packed_rows(recipe, AutoTokenizer.from_pretrained(expert, trust_remote_code=False), count, name))


VERBS = [merge, statistics]
