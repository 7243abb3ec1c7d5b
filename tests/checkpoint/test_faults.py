"""Every operation on files that a command does may fail or be its last: what it was to change is then as it was or as
it was to be, the error has a name, and the same command finishes.

A command runs in a child process in which the operation numbered k goes wrong, for every k, or for some of them in the
quick tests.
"""

import builtins
import contextlib
import errno
import functools
import io
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.checkpoint import files
from xlstm_hybrid.checkpoint.files import (
    add_provenance,
    append_stage,
    checkpoints_by_step,
    clean_abandoned,
    read_provenance,
    staged,
    verify_files,
    write_manifest,
)
from xlstm_hybrid.checkpoint.repair import repair
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.data import collate
from xlstm_hybrid.errors import XLSTMHybridError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.pipeline import runner
from xlstm_hybrid.reports.card import write_card
from xlstm_hybrid.state import load_state, prefill, save_state
from xlstm_hybrid.training.resume import Resumable

RAISED = {"full": errno.ENOSPC, "broken": errno.EIO, "refused": errno.EACCES}
KINDS = (*RAISED, "interrupted", "killed", "mended")  # the last: killed, and the doctor comes before the repetition
TAKES_ROOM = {"open", "write", "sendfile", "mkdir", "fsync", "save_file", "tokenizer", "posix_fallocate", "link"}
QUICK = 10  # operations of a command that go wrong in the quick tests
TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
LEFT = (".tmp", ".old", ".claim", ".run")


# --- a disk on which one operation goes wrong ------------------------------------------------------------------


class Disk:
    """Counts the operations on files below `root` and lets the one numbered `at` go wrong; a full disk stays full.

    It is put in place for good: it belongs into a child process.
    """

    def __init__(self, root, at=None, kind=None):
        self.root, self.at, self.kind, self.names = str(root), at, kind, []
        writes = functools.partial(self.opened, io.open)
        builtins.open = io.open = writes
        for name in ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "chmod", "fsync", "sendfile"):
            self.wrap(os, name)
        self.wrap(os, "posix_fallocate")
        self.wrap(os, "open", lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR))
        if hasattr(files, "exchange"):
            self.wrap(files, "exchange")
        self.wrap(TokenizersBackend, "_save_pretrained", where=1, error=self.of_rust, name="tokenizer")
        for module in (safetensors.torch, safetensors.numpy):
            self.wrap(module, "serialize_file", where=1, error=self.of_safetensors, name="save_file")

    def wrap(self, owner, attribute, counts=lambda *_, **__: True, where=0, error=None, name=None):
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def operation(*args, **kwargs):
            path = kwargs["save_directory"] if "save_directory" in kwargs else args[where]
            if counts(*args, **kwargs) and self.below(path, kwargs):
                beside = path if name == "save_file" else None
                self.step(name or attribute, lambda: self.half_beside(beside), error)
            return function(*args, **kwargs)

        setattr(owner, attribute, operation)

    def below(self, path, kwargs):
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return any(kwargs.get(k) is not None for k in ("dir_fd", "src_dir_fd")) or os.fspath(path).startswith(self.root)

    def opened(self, function, file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+") or not self.below(file, {}):
            return function(file, mode, *args, **kwargs)
        self.step("open")
        return Written(function(file, mode, *args, **kwargs), self)

    def step(self, name, half=lambda: None, error=None):
        """One operation; `half` does a part of it, before the process ends in it."""
        self.names.append(name)
        number = len(self.names) - 1
        if self.at is None or not (
            number == self.at or (self.kind == "full" and number > self.at and name in TAKES_ROOM)
        ):
            return
        if self.kind in RAISED:
            raise (error or OSError)(RAISED[self.kind], os.strerror(RAISED[self.kind]))
        half()
        if self.kind in ("killed", "mended"):
            os._exit(137)
        raise KeyboardInterrupt

    @staticmethod
    def of_rust(number, text):
        return Exception(f"{text} (os error {number})")

    @staticmethod
    def of_safetensors(number, text):
        return SafetensorError(f"Error while serializing: I/O error: {text} (os error {number})")

    @staticmethod
    def half_beside(path):
        if path is not None:  # as safetensors names what it has begun
            (Path(path).parent / ".tmpQ1w2E3").write_bytes(b"half")


class Written:
    """A file open for writing whose every write is an operation."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, data):
        self.disk.step("write", lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        return iter(self.file)


def in_child(action):
    """What became of `action` in a process of its own, in words; `(words, what it returned)`."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            said = ["finished", action()]
        except XLSTMHybridError as error:
            said = ["named error", f"{type(error).__name__}: {error}"]
        except KeyboardInterrupt:
            said = ["interrupted", None]
        except BaseException as error:
            said = ["raw error", f"{type(error).__name__}: {error}"]
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else ["killed", None]


# --- commands and what they change -----------------------------------------------------------------------------


def record(folder, *stages, text="x"):
    """A finished checkpoint with a record, as small as can be."""
    with staged(folder, overwrite=True) as partial:
        (partial / "config.json").write_text('{"sliding_window": 8}')
        (partial / "text").write_text(text)
        save_file({"a": torch.arange(4.0)}, partial / "model.safetensors")
        for stage in stages:
            add_provenance(partial, stage, stages=read_provenance(partial), config={"sliding_window": 8})
        write_manifest(partial)


def stages_of(folder):
    verify_files(folder)
    return [stage["stage"] for stage in read_provenance(folder)]


class Append:
    def make(self, root):
        record(root / "student", "convert")

    def run(self, root):
        append_stage(root / "student", "compare", figures={"wins": 3})

    def state(self, root):
        return {1: "old", 2: "new", 3: "new"}[len(stages_of(root / "student"))]  # once more where it was repeated


class Card:
    def make(self, root):
        record(root / "student", "convert")
        write_card(root / "student")
        append_stage(root / "student", "align", figures={"relative_error": 0.25})

    def run(self, root):
        write_card(root / "student")

    def state(self, root):
        assert stages_of(root / "student") == ["convert", "align"]
        return "new" if "align" in (root / "student" / "README.md").read_text() else "old"


class FirstCard(Card):
    def make(self, root):
        record(root / "student", "convert", "align")

    def state(self, root):
        assert stages_of(root / "student") == ["convert", "align"]
        return "new" if (root / "student" / "README.md").exists() else "old"


class Replace:
    def make(self, root):
        record(root / "out", "convert", text="old")

    def run(self, root):
        record(root / "out", "convert", text="new")

    def state(self, root):
        assert stages_of(root / "out") == ["convert"]
        return (root / "out" / "text").read_text()


class ReplaceInTwo(Replace):
    """Where the system has no exchange of two directories."""

    def run(self, root):
        files.exchange = lambda *_: False
        super().run(root)

    def state(self, root):
        # between the two renames: both are there, under names from which the next command and the doctor go on
        if not (root / "out").exists() and {p.name[:5] for p in root.iterdir()} == {".old-", ".tmp-"}:
            return "old"
        return super().state(root)


class Create(Replace):
    def make(self, root):
        root.mkdir()

    def state(self, root):
        return super().state(root) if (root / "out").exists() else "old"


class Convert:
    directory = "student"

    def make(self, root):
        self.run(root, window=5)

    def run(self, root, window=9):
        if not (root / "teacher").exists():
            root.mkdir()
            shutil.copytree(TEACHER, root / "teacher")
        convert(root / "teacher", root / "student", sliding_window=window, overwrite=True, shard_bytes=2**19)

    def state(self, root):
        stages_of(root / self.directory)
        window = json.loads((root / self.directory / "config.json").read_text())["sliding_window"]
        return {5: "old", 9: "new"}[window]


class Export(Convert):
    directory = "exported"

    def make(self, root):
        super().make(root)
        self.run(root)
        Convert().run(root)

    def run(self, root, window=9):
        if (root / "teacher").exists():
            export(root / "student", root / "exported", overwrite=True)
        else:
            super().run(root, window)


class Merge:
    def make(self, root):
        root.mkdir()
        for n in (1, 2):
            torch.manual_seed(n)
            convert(TEACHER, root / f"expert-{n}", sliding_window=9)
        self.run(root, weights=[0.75, 0.25])

    def run(self, root, weights=(0.5, 0.5)):
        experts = [root / "expert-1", root / "expert-2"]
        merge(experts, root / "merged", weights=list(weights), overwrite=True, unrecorded=True, shard_bytes=2**19)

    def state(self, root):
        stages_of(root / "merged")
        (record,) = [stage for stage in read_provenance(root / "merged") if stage["stage"] == "merge"]
        return {0.5: "new"}.get(record["config"]["experts"][0]["weight"], "old")


class SaveState:
    model = functools.cached_property(lambda self: tiny_student(torch.float32))

    def make(self, root):
        root.mkdir()
        self.run(root, 11)

    def run(self, root, tokens=5):
        save_state(prefill(self.model, token_ids(1, tokens)), root / "text.safetensors", self.model)

    def state(self, root):
        return {11: "old", 5: "new"}[load_state(root / "text.safetensors", self.model).get_seq_length()]


class Plain(Resumable, SFTTrainer):
    """TRL's own trainer."""


def trainer_of(folder, **settings):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})), pad_token="<pad>")
    rows = [{"input_ids": ids, "labels": ids, "position_ids": list(range(6))} for ids in token_ids(4, 6).tolist()]
    shared = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    shared |= {"save_strategy": "steps", "save_steps": 1, "dataset_kwargs": {"skip_prepare_dataset": True}}
    shared |= {"disable_tqdm": True, "gradient_checkpointing": False, "remove_unused_columns": False}
    return Plain(
        model=tiny_student(torch.float32, num_hidden_layers=1),
        args=SFTConfig(**shared | settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=words,
    )


class Checkpoint:
    """A trainer's third checkpoint, and the removal of the first."""

    def make(self, root):
        root.mkdir()
        self.trainer = trainer_of(root, max_steps=2, save_total_limit=2)
        self.trainer.train()
        self.trainer.state.global_step = 3

    def run(self, root):
        clean_abandoned(root)
        self.trainer.args.output_dir = str(root)
        self.trainer._save_checkpoint(self.trainer.model, None)

    def state(self, root):
        there = [path.name for path in checkpoints_by_step(root)]
        for name in there:
            verify_files(root / name)
        assert {"checkpoint-1", "checkpoint-2"} & set(there)
        return "new" if "checkpoint-3" in there else "old"


class Note:
    """A stage of a run and its note, by which the next run knows it."""

    def make(self, root):
        root.mkdir()

    def run(self, root):
        runner.locked = lambda *_: contextlib.nullcontext()  # locks are not part of what is written
        stage = runner.Stage("count", (), lambda: {"answer": 42}, note="notes/count.json")
        runner.Runner(root, console=Console(quiet=True)).make(stage)

    def state(self, root):
        note = root / "notes" / "count.json"
        return "new" if note.is_file() and json.loads(note.read_text())["answer"] == 42 else "old"


COMMANDS = {
    "append_stage": Append(),
    "write_card": Card(),
    "first write_card": FirstCard(),
    "a new directory": Create(),
    "a directory replaced": Replace(),
    "a directory replaced without exchange": ReplaceInTwo(),
    "convert": Convert(),
    "export": Export(),
    "merge": Merge(),
    "save_state": SaveState(),
    "a trainer's checkpoint and rotation": Checkpoint(),
    "a stage's note": Note(),
}


# --- the walk --------------------------------------------------------------------------------------------------


def left_in(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name.startswith(LEFT))


def condition(command, root):
    """`(old, new or damaged, why)`."""
    try:
        return command.state(root), None
    except Exception as error:
        return "damaged", f"{type(error).__name__}: {error}"


def walk(command, folder, quick):
    """Let operations of a command go wrong, one per run; a Counter of what became of them, and what was not as it must
    be, in words.
    """
    made = folder / "made"
    command.make(made)
    shutil.copytree(made, folder / "dry")

    def counted():
        disk = Disk(folder / "dry")
        command.run(folder / "dry")
        return disk.names

    end, names = in_child(counted)
    assert end == "finished", names
    assert condition(command, folder / "dry") == ("new", None) and not left_in(folder / "dry")
    points = [(kind, at) for at in range(len(names)) for kind in KINDS]
    outcomes, wrong = Counter({"operations": len(names), "points": 0}), []
    step = len(points) // QUICK if quick else 1
    while step > 1 and math.gcd(step, len(KINDS)) > 1:
        step += 1  # or else only some of the kinds would be seen
    for kind, at in points[::step]:
        root = folder / "try"
        shutil.copytree(made, root)

        def faulty(root=root, at=at, kind=kind):
            Disk(root, at, kind)
            command.run(root)

        end, said = in_child(faulty)
        after, why = condition(command, root)
        where = f"{kind} at {at} ({names[at]}): {end} {said or ''}; {after} {why or ''}"
        outcomes["points"] += 1
        outcomes[end] += 1
        right = (end, after) not in (("finished", "old"), ("raw error", after)) and after != "damaged"
        if kind == "mended":
            mended, (lines, _) = in_child(lambda root=root: repair(root))
            then = [mended, condition(command, root)[0], left_in(root)]
            right &= then in (["finished", "old", []], ["finished", "new", []])
            where += f"; doctor {then} {lines}"
        again, words = in_child(lambda root=root: command.run(root))
        then = [again, *condition(command, root), left_in(root)]
        if not right or then != ["finished", "new", None, []]:
            wrong.append(f"{where}; then {then} {words or ''}")
        shutil.rmtree(root)
    return outcomes, wrong


def walked(name, folder, quick):
    outcomes, wrong = walk(COMMANDS[name], folder, quick)
    print(f"{name}: {dict(outcomes)}, wrong {len(wrong)}", flush=True)
    assert not wrong, "\n".join(wrong)


# the longest sweeps
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("export", "merge") else ()) for name in COMMANDS]
)
def test_an_operation_that_goes_wrong_leaves_old_or_new_and_the_command_can_be_repeated(name, tmp_path):
    walked(name, tmp_path, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_operation_that_goes_wrong_leaves_old_or_new_and_the_command_can_be_repeated(name, tmp_path):
    walked(name, tmp_path, quick=False)
