"""Stages in a run directory: each is made once, and again only where something that it was made from has changed."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from rich.console import Console

from xlstm_hybrid.checkpoint.digests import file_digest, require_intact
from xlstm_hybrid.checkpoint.files import clean_abandoned, not_written, write_json
from xlstm_hybrid.checkpoint.locks import locked
from xlstm_hybrid.errors import ConfigError, XLSTMHybridError

# How a checkpoint was made, with times that no run repeats, like the pictures
RECORDS = ("provenance.json", "training_log.json", "README.md")


@dataclass(frozen=True)
class Stage:
    """A part of a run that is made once.

    name: as the run's report calls it, for example "distill:math".
    inputs: stages before it, directories, and hub ids that it reads.
    build: makes it: called with its folder and whether that is there already, if it has one, and with the paths of its
        inputs. A dict that it returns becomes part of its note.
    settings: what it depends on beside its inputs and the run's seed; a function without arguments where they follow
    from stages before.
    folder: what it writes, relative to the run directory. Made with other settings it is replaced only with `redo`; a
    mere note always is.
    note: file, relative to the run directory, of what it was made from and how long it took; without one it is made in
    every run.
    check: called with its folder and note; raises one of our errors where they are not what they should be.
    """

    name: str
    inputs: tuple
    build: Callable
    settings: dict | Callable = field(default_factory=dict)
    folder: str | None = None
    note: str | None = None
    check: Callable = lambda folder, note: None


class Runner:
    """Makes stages in the run directory `out`, or takes what an earlier run made.

    Attributes:
        seconds: {stage: how long it took}; reused: the same of the stages of an earlier run.
        outcomes: {stage: its note; of a stage without one, what its `build` returned}.
    """

    def __init__(self, out, seed=0, redo=False, console=None):
        self.out, self.seed, self.redo = Path(out), seed, redo
        self.console, self.seconds, self.reused, self.outcomes = console or Console(emoji=False), {}, {}, {}

    def path(self, source):
        """Where an input is: the folder of a stage, or what is from elsewhere as it is."""
        return self.out / source.folder if isinstance(source, Stage) else source

    def spec(self, settings, inputs):
        """What a stage was made from, as its note keeps it. What comes from elsewhere is compared with its manifest."""
        parents = []
        for path in inputs:
            if Path(path).is_dir():
                require_intact(path)
            file = file_digest(path)[:16] if Path(path).is_file() else str(path)
            parents.append(checkpoint_fingerprint(path) if Path(path).is_dir() else file)
        return json.loads(json.dumps({"settings": settings, "seed": self.seed, "parents": parents}, default=str))

    def make(self, *stages):
        """Make stages, in this order, or take what an earlier run made of them.

        Of several processes with one run directory one makes a stage; the others say that they wait for it, and take it.

        Raises:
            ConfigError: a folder was made from something else, and `redo` is not set.
            WaitError: another process has been at a stage for longer than a day.
        """
        for stage in stages:
            inputs = [self.path(source) for source in stage.inputs]
            if stage.note is None:
                self.outcomes[stage.name] = stage.build(*self.folder_of(stage), *inputs)
                continue
            note = self.out / stage.note
            try:
                note.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise not_written(note, error) from error
            clean_abandoned(note.parent)
            with locked(note.with_name(f".claim-{note.stem}"), partial(self.say_waiting, stage.name)):
                spec = self.spec(stage.settings() if callable(stage.settings) else stage.settings, inputs)
                self.outcomes[stage.name] = self.reuse(stage, note, spec, inputs) or self.build(
                    stage, note, spec, inputs
                )

    def folder_of(self, stage):
        """`(folder, whether it is there)`, or nothing."""
        return (self.path(stage), self.path(stage).exists()) if stage.folder else ()

    def build(self, stage, note, spec, inputs):
        """Build a stage and write its note."""
        self.console.rule(stage.name)
        start = time.time()
        result = stage.build(*self.folder_of(stage), *inputs) or {}
        seconds = self.seconds[stage.name] = round(time.time() - start, 1)
        write_json(note, {"spec": spec, "seconds": seconds} | result)
        written = json.loads(note.read_text(encoding="utf-8"))
        stage.check(stage.folder and self.path(stage), written)
        self.console.print(f"{stage.name}: {seconds:.0f} s")
        return written

    def reuse(self, stage, note, spec, inputs):
        """The note of a stage that is there as it should be; None where it has to be made."""
        folder = stage.folder and self.path(stage)
        if not note.is_file() or (folder and not folder.exists()):
            return None
        before = json.loads(note.read_text(encoding="utf-8"))
        known = [earlier_fingerprint(path) if Path(path).is_dir() else str(path) for path in inputs]
        old = before["spec"] | {
            "parents": [
                new if was in (new, by_size) else was
                for was, new, by_size in zip_longest(before["spec"]["parents"], spec["parents"], known)
            ]
        }
        if changed := differences(old, spec):
            if folder and not self.redo:
                raise ConfigError(
                    f"{folder.name} was made with other settings or from other checkpoints: {'; '.join(changed)}. Pass --redo to make it "
                    "again, or another --out to keep it"
                )
            return None
        try:
            stage.check(folder, before)
        except XLSTMHybridError as error:
            self.console.print(f"{stage.name}: made again, {error}", style="yellow", markup=False)
            return None
        self.seconds[stage.name] = self.reused[stage.name] = before["seconds"]
        self.console.print(f"[dim]{stage.name}: kept from an earlier run ({before['seconds']:.0f} s)[/dim]")
        return before

    def say_waiting(self, name, who):
        self.console.print(f"{name}: waiting for another launch: {who}", markup=False, soft_wrap=True)

    def say(self, who, what):
        self.console.print(f"  {who:>12}  {what}", markup=False, highlight=False, soft_wrap=True)


def checkpoint_fingerprint(directory):
    """SHA-256 over the files of a checkpoint as its manifest lists them, or as they are where it has none.

    Records are left out: a stage that is made again with the same outcome has the same fingerprint, and what follows
    from it stays.
    """
    directory = Path(directory)
    manifest = directory / "manifest.json"
    if manifest.is_file():
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        names = [name for name in sorted(files) if name not in RECORDS and not name.endswith(".png")]
        content = {name: files[name]["sha256"] for name in names}
    else:
        files = sorted(p for p in directory.glob("*") if p.is_file() and p.name not in RECORDS)
        content = {p.name: file_digest(p) for p in files}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def earlier_fingerprint(directory):
    """What notes of before hold of a directory without a manifest: names and sizes."""
    content = sorted((p.name, p.stat().st_size) for p in Path(directory).glob("*") if p.is_file())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def differences(before, now, where=""):
    """A text for each value that differs between two trees of dicts, with the old and the new one."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*now, *before])
        return [
            text for key in keys for text in differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]
