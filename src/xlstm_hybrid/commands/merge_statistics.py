"""`xlstm-hybrid merge-statistics`: what Fisher and RegMean merges need to know of an expert, in a file."""

from itertools import islice
from pathlib import Path
from typing import Annotated

from transformers import AutoTokenizer
from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.data import packed_rows
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline.merging import write_statistics
from xlstm_hybrid.recipe.schema import load_recipe


def merge_statistics(
    expert: Annotated[Path, Argument(help="Checkpoint of an expert.")],
    data: Annotated[Path, Argument(help="What it is good at: a recipe, or rows as `prepare` writes them.")],
    out: Annotated[Path, Option(help="File of the statistics, .safetensors; `merge --statistics` reads it.")],
    method: Annotated[str, Option(help="fisher or regmean.")] = "fisher",
    name: Annotated[str | None, Option("--expert", help="Whose rows of the recipe; its only one by default.")] = None,
    rows: Annotated[int, Option(help="Rows that are read.")] = 64,
    batch_size: Annotated[int, Option(help="Rows per forward of regmean; fisher takes them one by one.")] = 8,
    labels: Annotated[str, Option(help="Of fisher: tokens of 'model', drawn from the expert, or 'data'.")] = "model",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file that is at OUT.")] = False,
):
    """Measure what the merge methods fisher and regmean need to know of an expert.

    Example: xlstm-hybrid merge-statistics runs/tiny/experts/memory tiny --expert memory --out memory.safetensors
    """
    check_output(out, "file", [data], overwrite, parents=True)
    if data.is_dir():  # of `prepare`
        from datasets import load_from_disk

        if name is not None:
            raise ConfigError(f"--expert {name}: {data.name} holds rows already; leave it out, or name a recipe")
        found = iter(load_from_disk(data))
    else:
        recipe, tokenizer = load_recipe(data), AutoTokenizer.from_pretrained(expert, trust_remote_code=False)
        found = iter(packed_rows(recipe, tokenizer, rows, recipe.expert(name)))
    settings = {"batch_size": batch_size, "labels": labels}
    count = write_statistics(expert, list(islice(found, rows)), out, method, settings)
    print(f"{method} statistics of {expert.name} over {count} {'rows' if method == 'fisher' else 'tokens'} in {out}")
