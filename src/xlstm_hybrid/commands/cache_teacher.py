"""`xlstm-hybrid cache-teacher`: a teacher's targets for rows of data, calculated once and stored."""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoTokenizer

from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.pipeline.targets import build, choose_dtype, describe, read_rows, share_out
from xlstm_hybrid.teacher_store import TeacherStore, plan_store, planned_bytes


def cache_teacher(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    rows: Annotated[
        Path,
        typer.Argument(
            help="What the student will read: a folder of `save_to_disk`, a .jsonl file of rows, or a recipe."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the store; an unfinished one is gone on with.")],
    top_k: Annotated[int, typer.Option(help="Entries per token.")] = 256,
    kind: Annotated[str, typer.Option(help="topk: the most likely ids and the rest; sampled: top_k draws.")] = "topk",
    temperature: Annotated[float, typer.Option(help="That the teacher's logits are divided by.")] = 1.0,
    shard_tokens: Annotated[int, typer.Option(help="Tokens per shard; an interrupted one is made again.")] = 2**18,
    batch_size: Annotated[int, typer.Option(help="Rows per forward of the teacher.")] = 8,
    vocabulary: Annotated[
        int | None, typer.Option(help="Ids that count, from 0 on; the teacher's LM head by default.")
    ] = None,
    expert: Annotated[str | None, typer.Option(help="Of a recipe: whose rows; its only one by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the recipe's, or as stored unless that is slow.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes to start on this machine.")] = 1,
    rank: Annotated[
        int, typer.Option(help="Of this process, where several are started by hand or by a launcher.")
    ] = int(os.environ.get("RANK", 0)),
    world: Annotated[int, typer.Option(help="Of how many.")] = int(os.environ.get("WORLD_SIZE", 1)),
    estimate: Annotated[bool, typer.Option("--estimate", help="Say how large it will be, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash and check the finished store.")] = False,
):
    """Store what a teacher says about every scored token of some rows.

    For `distill --teacher OUT`. Any number of these may run at once; an interrupted one is gone on with.

    Example: xlstm-hybrid cache-teacher recipes/tiny_teacher/tiny-llama runs/rows runs/store --top-k 64
    """
    source = local_source(teacher, revision)
    tokenizer, config = AutoTokenizer.from_pretrained(source), AutoConfig.from_pretrained(source)
    data = read_rows(rows, source, expert)
    size = vocabulary or config.get_text_config().vocab_size
    plan = plan_store(data, size, shard_tokens)
    needed = planned_bytes(plan[0], min(top_k, size))
    count, tokens, places = (f"{plan[0][name]:,}" for name in ("rows", "tokens", "places"))
    print(
        f"{count} rows, {tokens} tokens, targets for {places} of them: {needed / 1e9:,.3f} GB in {len(plan[1]) - 1} shards"
    )
    if estimate:
        return
    if device is None:
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(dtype, rows, config, device, out)
    settings = {"kind": kind, "k": top_k, "temperature": temperature, "vocab_size": size}
    settings |= {"shard_tokens": shard_tokens, "batch_size": batch_size, "plan": plan}
    spec = describe(source, teacher, revision, tokenizer, dtype) | ({"seed": seed} if kind == "sampled" else {})
    if processes > 1:
        share_out(processes, source, data, out, settings, spec, dtype, device, seed)
    else:
        build(rank, world, source, data, out, settings, spec, dtype, device, seed)
    store = TeacherStore(out, partial=world > 1)
    if verify:
        store.verify()
    size = sum(entry["size"] for entry in store.shards.values())
    print(
        f"{len(store.shards)} of {len(store.first) - 1} shards, {size / 1e9:,.3f} GB at {out}{', verified' if verify else ''}"
    )
