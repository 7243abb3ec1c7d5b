"""The verb `cache-teacher`: a teacher's targets for rows of data, calculated once and stored."""

import os
from pathlib import Path
from typing import Annotated

import typer

RECIPE = (".yaml", ".yml")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def cache_teacher(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    rows: Annotated[Path, typer.Argument(help="What the student will read: a folder of `save_to_disk`, a .jsonl file of rows, or a recipe.")],
    out: Annotated[Path, typer.Argument(help="Directory of the store; an unfinished one is gone on with.")],
    top_k: Annotated[int, typer.Option(help="Entries per token.")] = 256,
    kind: Annotated[str, typer.Option(help="topk: the most likely ids and the rest; sampled: top_k draws.")] = "topk",
    temperature: Annotated[float, typer.Option(help="That the teacher's logits are divided by.")] = 1.0,
    shard_tokens: Annotated[int, typer.Option(help="Tokens per shard; an interrupted one is made again.")] = 2**18,
    batch_size: Annotated[int, typer.Option(help="Rows per forward of the teacher.")] = 8,
    vocabulary: Annotated[int | None, typer.Option(help="Ids that count, from 0 on; the teacher's LM head by default.")] = None,
    expert: Annotated[str | None, typer.Option(help="Of a recipe: whose rows; its only one by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the recipe's, or as stored unless that is slow.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes to start on this machine.")] = 1,
    rank: Annotated[int, typer.Option(help="Of this process, where several are started by hand or by a launcher.")] = int(os.environ.get("RANK", 0)),
    world: Annotated[int, typer.Option(help="Of how many.")] = int(os.environ.get("WORLD_SIZE", 1)),
    estimate: Annotated[bool, typer.Option("--estimate", help="Say how large it will be, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash and check the finished store.")] = False,
):
    """Store what TEACHER says about every scored token of ROWS, for `distill --teacher OUT`. Any number of these may run at once."""
    import torch

    from xlstm_hybrid.store import TeacherStore, plan_store, planned_bytes
    from xlstm_hybrid.teachers import local_source

    source = local_source(teacher, revision)
    data, tokenizer, config = read_rows(rows, source, expert), load_tokenizer(source), load_config(source)
    size = vocabulary or config.get_text_config().vocab_size
    plan = plan_store(data, size, shard_tokens)
    needed = planned_bytes(plan[0], min(top_k, size))
    count, tokens, places = (f"{plan[0][name]:,}" for name in ("rows", "tokens", "places"))
    print(f"{count} rows, {tokens} tokens, targets for {places} of them: {needed / 1e9:,.3f} GB in {len(plan[1]) - 1} shards")
    if estimate:
        return
    if device is None:
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(dtype, rows, config, device, out)
    settings = {"kind": kind, "k": top_k, "temperature": temperature, "vocab_size": size, "shard_tokens": shard_tokens, "batch_size": batch_size,
                "plan": plan}  # fmt: skip
    spec = describe(source, teacher, revision, tokenizer, dtype) | ({"seed": seed} if kind == "sampled" else {})
    if processes > 1:
        share_out(processes, source, data, out, settings, spec, dtype, device, seed)
    else:
        build(rank, world, source, data, out, settings, spec, dtype, device, seed)
    store = TeacherStore(out, partial=world > 1)
    if verify:
        store.verify()
    finished, all_ = len(store.shards), len(store.first) - 1
    print(
        f"{finished} of {all_} shards, {sum(entry['size'] for entry in store.shards.values()) / 1e9:,.3f} GB at {out}{', verified' if verify else ''}"
    )


VERBS = [cache_teacher]


# --- what is read -------------------------------------------------------------------------------------------------


def load_tokenizer(source):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def load_config(source):
    import transformers

    import xlstm_hybrid  # noqa: F401, a student can teach as well

    return transformers.AutoConfig.from_pretrained(source)


def read_rows(path, source, expert):
    """A sequence of rows with `input_ids` and, where they are, `labels`, `position_ids`, `seq_lengths`.

    Raises:
        DataError: nothing that can be read as rows, or rows that stream.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    from xlstm_hybrid.errors import DataError

    if path.suffix in RECIPE:
        data = rows_of_recipe(path, source, expert)
    elif path.is_dir():
        try:
            data = load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{path.name}: no data set of save_to_disk ({error}); pass such a folder, a .jsonl file or a recipe") from error
    elif path.is_file() and path.suffix in (".jsonl", ".json"):
        data = load_dataset("json", data_files=str(path), split="train")
    else:
        raise DataError(f"{path}: expected a folder of save_to_disk, a .jsonl file of rows, or a recipe; found none of them")
    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        found = f"a {type(data).__name__}" + (f" with columns {data.column_names}" if isinstance(data, Dataset) else "")
        raise DataError(f"{path.name}: expected packed rows on disk with a column input_ids, found {found}; save them with save_to_disk, one split")
    return data.with_format("numpy")


def recipe_of(path):
    from xlstm_hybrid.recipe import load_recipe

    return load_recipe(path)


def rows_of_recipe(path, source, expert):
    """The rows that `distill` with this recipe reads, in their order."""
    from xlstm_hybrid.data import train_dataset
    from xlstm_hybrid.pipeline.settings import rows_of
    from xlstm_hybrid.verbs.stages import read

    recipe, name = read(path, expert)
    return train_dataset(recipe, load_tokenizer(source), rows_of(recipe.distill, "distill"), name)


# --- building -----------------------------------------------------------------------------------------------------


def choose_dtype(asked, rows, config, device, out):
    """The dtype that the teacher calculates in; that of a store that is gone on with, where the machine chose it.

    Raises:
        ConfigError: a dtype that we do not know.
    """
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.precision import dtype_for
    from xlstm_hybrid.store.writer import INDEX, read_index

    setting = "--dtype"
    if asked == "auto" and rows.suffix in RECIPE:
        asked, setting = recipe_of(rows).teacher_dtype, "teacher_dtype"
    if asked not in DTYPES:
        raise ConfigError(f"{setting} {asked}: expected one of {', '.join(DTYPES)}")
    if asked != "auto":
        return dtype_for(device, asked, setting=setting)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    begun = read_index(out)["spec"].get("dtype") if (out / INDEX).is_file() else None
    return begun if begun in (stored, "float32") else dtype_for(device, stored=stored)


def describe(source, teacher, revision, tokenizer, dtype):
    """What the targets depend on beside the rows: the fields of the spec that a change is named by."""
    from xlstm_hybrid.store import weights_hash
    from xlstm_hybrid.vocabulary import template_hash, tokenizer_hash, vocabulary_hash

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


def build(rank, world, source, data, out, settings, spec, dtype, device, seed):
    """Load the teacher and write what is missing of the store."""
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    from xlstm_hybrid.store import build_store
    from xlstm_hybrid.trainers.heads import Selection, TeacherTargets
    from xlstm_hybrid.trainers.sparse_kd import check_documents_stay_apart

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True).to(device)
    if settings["plan"][0]["documents"] > settings["plan"][0]["rows"]:
        check_documents_stay_apart(model.eval(), "teacher", ["input_ids", "position_ids"])
    select = Selection(settings["kind"], settings["k"], settings["temperature"], settings["vocab_size"], seed)
    with Console(stderr=True).status("reading") as status:
        build_store(out, data, TeacherTargets(model, select), spec=spec, rank=rank, world=world, **settings,
                    report=lambda done, all_: status.update(f"{done} of {all_} shards"))  # fmt: skip


def share_out(processes, source, data, out, settings, spec, dtype, device, seed):
    """`build` in several processes, each on a GPU of its own where there are GPUs."""
    import torch
    import torch.multiprocessing as mp

    from xlstm_hybrid.errors import StoreError

    devices = [f"cuda:{r % torch.cuda.device_count()}" if device.startswith("cuda") else device for r in range(processes)]
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=guarded, args=(r, processes, source, data, out, settings, spec, dtype, devices[r], seed)) for r in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [r for r, worker in enumerate(workers) if worker.exitcode]
    if failed:
        raise StoreError(f"processes {failed} of {processes} failed, see above: run the same command again, finished shards are kept")


def guarded(rank, *arguments):
    """`build`, whose named errors are one line and an exit code."""
    import sys

    from xlstm_hybrid.errors import XLSTMHybridError

    try:
        build(rank, *arguments)
    except XLSTMHybridError as error:
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
