"""`xlstm-hybrid doctor DIR` finishes or undoes what was interrupted, says which, and leaves alone what is not its own."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint.files import (
    add_provenance,
    append_stage,
    owner,
    read_provenance,
    staged,
    verify_files,
    write_json,
    write_manifest,
)
from xlstm_hybrid.errors import CheckpointError

GONE = next(n for n in range(2**22, 2**22 + 99) if not os.path.exists(f"/proc/{n}"))
MARK = f"{owner(GONE)}-12345678"


def doctor(*arguments):
    """`(exit code, lines)`."""
    result = CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout.splitlines()


@pytest.fixture
def student(tmp_path):
    with staged(tmp_path / "run" / "student") as folder:
        save_file({"a": torch.arange(6.0)}, folder / "model.safetensors")
        add_provenance(folder, "convert", config={"sliding_window": 8})
        write_manifest(folder)
    return tmp_path / "run" / "student"


def test_a_directory_in_order_is_left_as_it_is(student):
    before = {path: path.read_bytes() for path in student.iterdir()}
    assert doctor(student) == doctor(student.parent) == (0, ["nothing was interrupted"])
    assert {path: path.read_bytes() for path in student.iterdir()} == before


def test_what_was_interrupted_is_finished_or_undone_and_said(student):
    run = student.parent
    (run / f".old-merged-{MARK}").mkdir()
    (run / f".tmp-merged-{MARK}").mkdir()
    (run / f".tmp-student-{MARK}").mkdir()
    (student / f".tmp-README.md-{MARK}").mkdir()
    (run / ".claim-align").write_text(owner(GONE))
    manifest = json.loads((student / "manifest.json").read_text())
    manifest["files"]["provenance.json"]["next"] = {"size": 3, "sha256": "0"}
    write_json(student / "manifest.json", manifest)
    verify_files(student)  # whole already, as every reader sees it
    (run / ".run-expert" / "checkpoint-4").mkdir(parents=True)
    code, lines = doctor(run, "--json", run.parent / "found.json")
    assert code == 0 and sorted(lines) == sorted(
        [
            "undone: the lock .claim-align, its process is no more",
            "finished: merged was complete and is in its place, the one before is removed",
            "undone: student, of which a part was written",
            "undone: README.md, of which a part was written",
            "undone: provenance.json, as before",
            "to be continued: .run-expert holds checkpoint-4, the command that wrote it goes on from there",
            "nothing is wrong",
        ]
    )
    assert json.loads((run.parent / "found.json").read_text()) == {"wrong": [], "done": lines[:-1]}
    assert sorted(path.name for path in run.iterdir()) == [".run-expert", "merged", "student"]
    assert doctor(student) == (0, ["nothing was interrupted"])


def test_a_record_whose_entry_an_earlier_version_did_not_come_to_write_is_mended_and_damage_is_not(student):
    entry = json.loads((student / "manifest.json").read_text())
    append_stage(student, "compare", figures={"wins": 3})
    write_json(student / "manifest.json", entry)
    with pytest.raises(CheckpointError, match="provenance.json has"):
        verify_files(student)
    assert doctor(student) == (
        0,
        ["finished: provenance.json, changed without its entry in manifest.json", "nothing is wrong"],
    )
    verify_files(student)
    assert [stage["stage"] for stage in read_provenance(student)] == ["convert", "compare"]
    weights = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(weights[:-1] + b"x")
    write_json(student / "provenance.json", {"format_version": 1, "stages": [{"stage": "invented"}]})
    before = (student / "manifest.json").read_bytes()
    code, lines = doctor(student.parent)
    assert code == 1 and lines[0].startswith("damaged: student: model.safetensors has SHA-256")
    assert lines[1] == "1 damaged" and (student / "manifest.json").read_bytes() == before


def test_what_belongs_to_a_process_that_runs_or_to_another_machine_is_named_and_stays(student):
    for name in (f".tmp-student-{owner(os.getpid())}-12345678", f".tmp-student-ffffff-{GONE}-12345678"):
        (student.parent / name).mkdir()
    code, lines = doctor(student.parent)
    assert code == 0 and len(list(student.parent.iterdir())) == 3
    assert [line.startswith("left alone: .tmp-student-") for line in lines] == [True, True, False]
    with pytest.raises(CheckpointError, match="elsewhere: no such directory"):
        doctor(student.parent / "elsewhere")
