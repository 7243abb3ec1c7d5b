"""A teacher's targets for rows of data: what the rows are, and a store that one process or several fill."""

import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console

from xlstm_hybrid.checkpoint.digests import weights_hash
from xlstm_hybrid.checkpoint.tokenizer import template_hash, tokenizer_hash
from xlstm_hybrid.conversion.load import load_model, load_tokenizer
from xlstm_hybrid.data import train_dataset
from xlstm_hybrid.data.vocabulary import vocabulary_hash
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError, DataError, StoreError, XLSTMHybridError
from xlstm_hybrid.pipeline.settings import row_count
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.teacher_store import build_store
from xlstm_hybrid.teacher_store.writer import INDEX, read_index
from xlstm_hybrid.training.distillation import check_documents_stay_apart
from xlstm_hybrid.training.lm_head import Selection, TeacherTargets

RECIPE = (".yaml", ".yml")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_rows(path, source, expert):
    """A sequence of rows with `input_ids` and, where they are, `labels`, `position_ids`, `seq_lengths`.

    Raises:
        DataError: nothing that can be read as rows, or rows that stream.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    if path.suffix in RECIPE:  # the rows that `distill` with this recipe reads, in their order
        recipe = load_recipe(path)
        tokenizer, count = load_tokenizer(source), row_count(recipe.distill, "distill")
        data = train_dataset(recipe, tokenizer, count, recipe.expert(expert))
    elif path.is_dir():
        try:
            data = load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f"{path.name}: no data set of save_to_disk ({error}); pass such a folder, a .jsonl file or a recipe"
            ) from error
    elif path.is_file() and path.suffix in (".jsonl", ".json"):
        data = load_dataset("json", data_files=str(path), split="train")
    else:
        expected = "a folder of save_to_disk, a .jsonl file of rows, or a recipe"
        raise DataError(f"{path}: expected {expected}; found none of them")
    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        found = f"a {type(data).__name__}" + (f" with columns {data.column_names}" if isinstance(data, Dataset) else "")
        expected = "packed rows on disk with a column input_ids"
        raise DataError(f"{path.name}: expected {expected}, found {found}; save them with save_to_disk, one split")
    return data.with_format("numpy")


def choose_dtype(asked, rows, config, device, out):
    """The dtype that the teacher calculates in; that of a store that is gone on with, where the machine chose it.

    Raises:
        ConfigError: a dtype that we do not know.
    """
    setting = "--dtype"
    if asked == "auto" and rows.suffix in RECIPE:
        asked, setting = load_recipe(rows).teacher_dtype, "teacher_dtype"
    if asked not in DTYPES:
        raise ConfigError(f"{setting} {asked}: expected one of {', '.join(DTYPES)}")
    if asked != "auto":
        return dtype_for(device, asked, setting=setting)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    begun = read_index(out)["spec"].get("dtype") if (out / INDEX).is_file() else None
    return begun if begun in (stored, "float32") else dtype_for(device, stored=stored)


def store_spec(source, teacher, revision, tokenizer, dtype):
    """What the targets depend on beside the rows: the fields of the spec that a change is named by."""
    hub = not Path(teacher).is_dir()
    return {
        "teacher": teacher if hub else Path(teacher).resolve().name,
        "revision": source.name if hub else None,
        "weights": weights_hash(source),
        "dtype": dtype,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocabulary": vocabulary_hash(tokenizer),
        "template": template_hash(tokenizer),
    }


def fill_store(rank, world, device, source, data, out, settings, spec, seed):
    """Load the teacher in the dtype of `spec` and write what is missing of the store."""
    model = load_model(source, spec["dtype"], device=device)
    if settings["plan"][0]["documents"] > settings["plan"][0]["rows"]:
        check_documents_stay_apart(model, "teacher", ["input_ids", "position_ids"])
    select = Selection(settings["kind"], settings["k"], settings["temperature"], settings["vocab_size"], seed)
    with Console(stderr=True).status("reading") as status:
        place = {"spec": spec, "rank": rank, "world": world}
        place["report"] = lambda done, shards: status.update(f"{done} of {shards} shards")
        build_store(out, data, TeacherTargets(model, select), **place, **settings)


def share_out(processes, device, *job):
    """`fill_store` in several processes, each on a GPU of its own where there are GPUs."""
    context, workers = mp.get_context("spawn"), []
    for rank in range(processes):
        mine = f"cuda:{rank % torch.cuda.device_count()}" if device.startswith("cuda") else device
        workers.append(context.Process(target=fill_in_process, args=(rank, processes, mine, *job)))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [rank for rank, worker in enumerate(workers) if worker.exitcode]:
        raise StoreError(
            f"processes {failed} of {processes} failed, see above: run the same command again, finished shards are kept"
        )


def fill_in_process(rank, *arguments):
    """`fill_store`, whose named errors are one line and an exit code."""
    try:
        fill_store(rank, *arguments)
    except XLSTMHybridError as error:
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
