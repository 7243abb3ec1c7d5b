"""A teacher's targets for rows of data: what the rows are, and a store that one process or several fill."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from xlstm_hybrid.checkpoint.digests import weights_hash
from xlstm_hybrid.checkpoint.files import clean_abandoned, not_written, owner, write_json
from xlstm_hybrid.checkpoint.locks import clean_locks
from xlstm_hybrid.checkpoint.tokenizer import template_hash, tokenizer_hash
from xlstm_hybrid.conversion.convert import load_teaching
from xlstm_hybrid.conversion.load import load_tokenizer
from xlstm_hybrid.data import train_dataset
from xlstm_hybrid.data.vocabulary import vocabulary_hash
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError, DataError, WaitError, XLSTMHybridError
from xlstm_hybrid.pipeline.settings import row_count
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.teacher_store import build_store
from xlstm_hybrid.teacher_store.writer import INDEX, read_index
from xlstm_hybrid.training.distillation import check_documents_stay_apart
from xlstm_hybrid.training.lm_head import Selection, TeacherTargets

RECIPE = (".yaml", ".yml")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WORKER = "from xlstm_hybrid.pipeline.targets import work; work()"
LOOK_SECONDS = 0.5  # between two looks at the workers
LOOKS = 20  # after which the parent looks for signs of life
SILENT_SECONDS = 3600  # without a sign of life, loading the teacher included, after which workers are ended
END_SECONDS = 10  # that a worker has to end in


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


def fill_store(rank, world, device, source, data, out, settings, spec, seed, report=None):
    """Load the teacher in the dtype of `spec` and write what is missing of the store; `report` as in `build_store`, by
    default a line on the terminal.
    """
    model = load_teaching(source, spec["dtype"], device=device)
    if settings["plan"][0]["documents"] > settings["plan"][0]["rows"]:
        check_documents_stay_apart(model, "teacher", ["input_ids", "position_ids"])
    select = Selection(settings["kind"], settings["k"], settings["temperature"], settings["vocab_size"], seed)
    with Console(stderr=True).status("reading") as status:
        place = {"spec": spec, "rank": rank, "world": world}
        place["report"] = report or (lambda done, shards: status.update(f"{done} of {shards} shards"))
        build_store(out, data, TeacherTargets(model, select), **place, **settings)


def share_out(processes, device, source, data, rows, out, settings, spec, seed):
    """`fill_store` in several processes, each on a GPU of its own where there are GPUs.

    They are watched: when one of them fails, or none gives a sign of life for an hour, the others are ended as well.

    Args:
        data: what `read_rows` found in `rows`; the processes read them from there, or from a copy beside the store.
    Raises:
        WaitError: a process failed, or all are silent; it holds the end of that one's output. Finished shards stay.
        CheckpointWriteError: the rows cannot be written beside the store.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder, workers = Path(tempfile.mkdtemp(prefix=f".tmp-work-{owner(os.getpid())}-", dir=out)), []
    try:
        if not rows.is_dir():
            rows = folder / "rows"
            data.save_to_disk(rows)
        job = {"source": str(source), "rows": str(rows), "out": str(out), "settings": settings, "spec": spec}
        write_json(folder / "job.json", job | {"seed": seed, "processes": processes})
        # no bars in a file, and the modules of this process wherever they are from
        quiet = {
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        for rank in range(processes):
            mine = f"cuda:{rank % torch.cuda.device_count()}" if device.startswith("cuda") else device
            command = [sys.executable, "-c", WORKER, str(folder), str(rank), mine, str(os.getpid())]
            with open(folder / f"{rank}.log", "wb") as log:
                workers.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | quiet)
                )
        watch(workers, folder, out, len(settings["plan"][1]) - 1)
        for line in dict.fromkeys(line for rank in range(processes) for line in output(folder, rank)):
            print(line, file=sys.stderr)
    except OSError as error:
        raise not_written(out, error) from error
    finally:
        end(workers)
        shutil.rmtree(folder, ignore_errors=True)
        clean_abandoned(out)
        clean_locks(out)


def watch(workers, folder, out, shards):
    """Return when all workers have ended well; WaitError as soon as one has not, or none gives a sign of life."""

    def stopped(rank, what):
        end(workers)
        count = len(list(out.glob("shard-*.safetensors")))
        kept = f"{count} of {shards} shards are finished and kept: run the same command again to go on"
        return WaitError(f"process {rank} of {len(workers)} {what}; {kept}. {last_words(folder, rank)}")

    with Console(stderr=True).status("starting") as status:
        for look in itertools.count():
            codes = [worker.poll() for worker in workers]
            for rank, code in enumerate(codes):
                if code:
                    raise stopped(rank, f"{ending(code)}, the others were ended")
            if None not in codes:
                return
            if look % LOOKS == 0:
                status.update(f"{len(list(out.glob('shard-*.safetensors')))} of {shards} shards")
                silent = time.time() - newest([out, *out.glob(".claim-*"), *folder.glob("*.log")])
                if silent > SILENT_SECONDS:
                    what = f"and the others gave no sign of life for {silent / 60:.0f} minutes and were ended"
                    raise stopped(codes.index(None), f"{what} (a smaller --batch-size has more of them)")
            time.sleep(LOOK_SECONDS)


def newest(paths):
    """When the last of some files was written, those that are gone by now left out."""
    times = [0.0]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def ending(code):
    """Words for the exit code of a process; a negative one is a signal's."""
    if code > 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = " (the system does that where memory is short: take fewer --processes, or a smaller --batch-size)"
    return f"was ended by {name}{memory if name == 'SIGKILL' else ''}"


def output(folder, rank):
    """The lines that a worker wrote."""
    text = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def last_words(folder, rank, count=12):
    lines = output(folder, rank)[-count:]
    return "It wrote nothing" if not lines else "\n  ".join(["The end of its output:", *lines])


def end(workers):
    """End what is still running: asked first, and killed where it does not listen."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(END_SECONDS)


def work():
    """A worker of `share_out`: its named errors are one line and an exit code; it stops after a shard if its parent is
    gone.
    """
    from datasets import load_from_disk
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # what is written goes to a file
    folder, rank, device, parent = sys.argv[1:]
    log = logging.getLogger("xlstm_hybrid")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    data, out = load_from_disk(job["rows"]).with_format("numpy"), Path(job["out"])

    def report(done, shards):
        if os.getppid() != int(parent):
            sys.exit("the process that started this one is gone")

    arguments = (Path(job["source"]), data, out, job["settings"], job["spec"], job["seed"], report)
    try:
        fill_store(int(rank), job["processes"], device, *arguments)
    except XLSTMHybridError as error:
        sys.exit(f"{type(error).__name__}: {error}")
