"""`xlstm-hybrid cache-teacher`: a teacher's targets for rows of data, calculated once and stored."""

import os
from pathlib import Path
from typing import Annotated

import torch
from transformers import AutoConfig
from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Revision, Teacher
from xlstm_hybrid.conversion.gguf import gguf_config, is_gguf
from xlstm_hybrid.conversion.load import load_tokenizer
from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.pipeline.targets import RECIPE, choose_dtype, fill_store, read_rows, share_out, store_spec
from xlstm_hybrid.recipe.schema import load_recipe, teacher_of
from xlstm_hybrid.teacher_store import TeacherStore, plan_store, planned_bytes


def cache_teacher(
    teacher: Teacher,
    rows: Annotated[
        Path, Argument(help="What the student reads: a folder of `save_to_disk`, a .jsonl file, or a recipe.")
    ],
    out: Annotated[Path, Argument(help="Directory of the store; an unfinished one is gone on with.")],
    top_k: Annotated[int, Option(help="Entries per token.")] = 256,
    kind: Annotated[str, Option(help="topk: the most likely ids and the rest; sampled: top_k draws.")] = "topk",
    temperature: Annotated[float, Option(help="That the teacher's logits are divided by.")] = 1.0,
    shard_tokens: Annotated[int, Option(help="Tokens per shard; an interrupted one is made again.")] = 2**18,
    batch_size: Annotated[int, Option(help="Rows per forward of the teacher.")] = 8,
    vocabulary: Annotated[int | None, Option(help="Ids that count, from 0 on; by default the LM head's.")] = None,
    expert: Annotated[str | None, Option(help="Of a recipe: whose rows; its only one by default.")] = None,
    revision: Revision = None,
    dtype: Annotated[
        str, Option(help="float32, bfloat16, float16; auto: the recipe's, or as stored if quick.")
    ] = "auto",
    device: Annotated[str | None, Option(help="Where to run; a GPU if there is one.")] = None,
    seed: Annotated[int, Option(help="Of the draws.")] = 0,
    processes: Annotated[int, Option(help="Processes to start on this machine.")] = 1,
    rank: Annotated[int, Option(help="Of this process, where several are started.")] = int(os.environ.get("RANK", 0)),
    world: Annotated[int, Option(help="Of how many.")] = int(os.environ.get("WORLD_SIZE", 1)),
    estimate: Annotated[bool, Option("--estimate", help="Say how large it will be, and stop.")] = False,
    verify: Annotated[bool, Option("--verify", help="Hash and check the finished store.")] = False,
):
    """Store what a teacher says about every scored token of some rows.

    For `distill --teacher OUT`. Any number of these may run at once; an interrupted one is gone on with.

    Example: xlstm-hybrid cache-teacher recipes/tiny_teacher/tiny-llama runs/rows runs/store --top-k 64
    """
    if rows.suffix in RECIPE:
        teacher = str(teacher_of(load_recipe(rows), teacher))
    if not estimate:
        check_output(out, "folder", [teacher, rows])
    source = local_source(teacher, revision)
    tokenizer = load_tokenizer(source)
    config = gguf_config(source) if is_gguf(source) else AutoConfig.from_pretrained(source)
    data = read_rows(rows, source, expert)
    size = vocabulary or config.get_text_config().vocab_size
    plan = plan_store(data, size, shard_tokens)
    needed, shards = planned_bytes(plan[0], min(top_k, size)), len(plan[1]) - 1
    count, tokens, places = (f"{plan[0][name]:,}" for name in ("rows", "tokens", "places"))
    print(f"{count} rows, {tokens} tokens, targets for {places} of them: {needed / 1e9:,.3f} GB in {shards} shards")
    if estimate:
        return
    if device in (None, "auto") and torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
    device = device_of(device)
    dtype = choose_dtype(dtype, rows, config, device, out)
    settings = {"kind": kind, "k": top_k, "temperature": temperature, "vocab_size": size}
    settings |= {"shard_tokens": shard_tokens, "batch_size": batch_size, "plan": plan}
    spec = store_spec(source, teacher, revision, tokenizer, dtype) | ({"seed": seed} if kind == "sampled" else {})
    if processes > 1:
        share_out(processes, device, source, data, rows, out, settings, spec, seed)
    else:
        fill_store(rank, world, device, source, data, out, settings, spec, seed)
    store = TeacherStore(out, partial=world > 1)
    if verify:
        store.verify()
    size = sum(entry["size"] for entry in store.shards.values()) / 1e9
    verified = ", verified" if verify else ""
    print(f"{len(store.shards)} of {len(store.first) - 1} shards, {size:,.3f} GB at {out}{verified}")
