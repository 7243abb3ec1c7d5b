"""`xlstm-hybrid merge-statistics`: what Fisher and RegMean merges need to know of an expert, in a file."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from xlstm_hybrid.commands.options import recipe_and_expert
from xlstm_hybrid.data import packed_rows
from xlstm_hybrid.errors import CheckpointWriteError, ConfigError
from xlstm_hybrid.pipeline.merging import write_statistics


def merge_statistics(
    expert: Annotated[Path, typer.Argument(help="Checkpoint of an expert.")],
    data: Annotated[Path, typer.Argument(help="What it is good at: a recipe, or rows as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="File of the statistics, .safetensors; `merge --statistics` reads it.")],
    method: Annotated[str, typer.Option(help="fisher or regmean.")] = "fisher",
    name: Annotated[
        str | None, typer.Option("--expert", help="Whose rows of the recipe; those of its only expert by default.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows that are read.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows per forward of regmean; fisher takes them one by one.")] = 8,
    labels: Annotated[
        str, typer.Option(help="Of fisher: 'model' draws the tokens from the expert, 'data' takes those of the rows.")
    ] = "model",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is at OUT.")] = False,
):
    """Measure what the merge methods fisher and regmean need to know of an expert.

    Example: xlstm-hybrid merge-statistics runs/tiny/experts/memory tiny --expert memory --out memory.safetensors
    """
    if out.exists() and not overwrite:
        raise CheckpointWriteError(f"{out.name} exists already: choose another file, or pass --overwrite")
    found = list(islice(read_rows(expert, data, name, rows), rows))
    count = write_statistics(expert, found, out, method, {"batch_size": batch_size, "labels": labels})
    print(f"{method} statistics of {expert.name} over {count} {'rows' if method == 'fisher' else 'tokens'} in {out}")


def read_rows(expert, data, name, count):
    """Packed rows of a folder of `prepare`, or of a recipe's expert."""
    if data.is_dir():
        from datasets import load_from_disk

        if name is not None:
            raise ConfigError(f"--expert {name}: {data.name} holds rows already; leave it out, or name a recipe")
        return iter(load_from_disk(data))
    recipe, name = recipe_and_expert(data, name)
    return iter(packed_rows(recipe, AutoTokenizer.from_pretrained(expert, trust_remote_code=False), count, name))
