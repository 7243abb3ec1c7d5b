"""A checkpoint directory is there whole or not at all, damage is found, and its record gives nothing private away."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from xlstm_hybrid.checkpoint import files as artifacts
from xlstm_hybrid.checkpoint.files import (
    add_provenance,
    check_space,
    publishable,
    read_json,
    read_provenance,
    staged,
    verify_files,
    weight_files,
    write_json,
    write_manifest,
)
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def old(folder):
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A listed checkpoint of two shards and a subdirectory."""
    with staged(tmp_path / "student") as folder:
        save_file({"a": torch.arange(6.0)}, folder / "model-1.safetensors")
        save_file({"b": torch.arange(4.0)}, folder / "model-2.safetensors")
        write_json(
            folder / "model.safetensors.index.json",
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
        )
        (folder / "pictures").mkdir()
        (folder / "pictures" / "curve.png").write_bytes(b"png")
        write_manifest(folder)
    return tmp_path / "student"


# --- staged ----------------------------------------------------------------------------------------------------


def test_a_directory_appears_only_once_it_is_complete(tmp_path):
    with staged(tmp_path / "runs" / "out") as folder:
        (folder / "config.json").write_text("new")
        assert folder.parent == tmp_path / "runs" and not (tmp_path / "runs" / "out").exists()
    assert names(tmp_path / "runs") == ["out"] and (tmp_path / "runs" / "out" / "config.json").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there", [False, True])
def test_a_writer_that_fails_leaves_what_was_there(error, there, tmp_path):
    if there:
        old(tmp_path / "out")
    with pytest.raises(error), staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise error
    assert names(tmp_path) == ["out"] * there
    assert not there or (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_disk_that_refuses_is_a_named_error_and_leaves_what_was_there(exchange, tmp_path, monkeypatch):
    old(tmp_path / "out")
    rename = os.rename

    def refuse(source, target):
        if str(target) == str(tmp_path / "out") and ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(artifacts, "exchange", lambda new, path: refuse(new, path) if exchange else False)
    with pytest.raises(
        CheckpointWriteError,
        match=rf"could not write out \(No space left on device\): .*3 bytes needed, [\d,]+ free in {tmp_path}: "
        ".*what was there before is untouched",
    ):
        with staged(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_full_disk_says_how_many_bytes_are_missing_and_where_whoever_found_it_full(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(
        CheckpointWriteError, match=rf"out needs 0.00 GB, 0.00 GB are free: .*4,000 bytes are missing in {tmp_path}"
    ):
        with staged(tmp_path / "deep" / "out", needed=5000):
            raise AssertionError("the block must not run")
    for error in (
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of a tokenizer
    ):
        with pytest.raises(
            CheckpointWriteError,
            match=rf"could not write out \(No space left on device\): .*5,000 bytes needed, 1,000 free in {tmp_path}: 4,000 bytes are missing",
        ):
            with staged(tmp_path / "out") as folder:
                (folder / "weights").write_bytes(b"w" * 5000)
                raise error
    assert names(tmp_path) == []
    with pytest.raises(
        CheckpointWriteError, match=r"x.json \(Permission denied\): allow writing there, or choose another"
    ):
        with artifacts.staged_file(tmp_path / "x.json"):
            raise PermissionError(13, "Permission denied")
    with pytest.raises(SafetensorError, match="HeaderTooLarge"), staged(tmp_path / "out"):  # nothing of the disk
        raise SafetensorError("Error while deserializing header: HeaderTooLarge")


def test_what_the_disk_did_not_remove_does_not_become_a_part_of_a_checkpoint(tmp_path, monkeypatch):
    rmdir, refused = os.rmdir, []

    def once(path, *args, **kwargs):
        if not refused:
            refused.append(str(path))
            raise OSError(5, "Input/output error")
        rmdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "rmdir", once)
    with staged(tmp_path / "out") as folder:
        write_json(folder / "model.safetensors.index.json", {"weight_map": {}})
        assert any(name.startswith(".tmp-model") for name in names(folder))
        write_manifest(folder)
    verify_files(tmp_path / "out")
    assert refused and names(tmp_path / "out") == ["manifest.json", "model.safetensors.index.json"]


def test_two_renames_take_the_place_of_an_exchange_and_what_ends_between_them_is_finished_by_the_next(
    tmp_path, monkeypatch
):
    gone = f"{artifacts.owner(next(n for n in range(2**22, 2**22 + 99) if not os.path.exists(f'/proc/{n}')))}-12345678"
    old(tmp_path / f".old-out-{gone}")
    (tmp_path / f".tmp-out-{gone}").mkdir()
    (tmp_path / f".tmp-out-{gone}" / "config.json").write_text("new")
    old(tmp_path / f".old-other-{gone}")
    assert artifacts.clean_abandoned(tmp_path) == [
        "undone: other is the one from before",
        "finished: out was complete and is in its place, the one before is removed",
    ]
    assert names(tmp_path) == ["other", "out"] and (tmp_path / "out" / "config.json").read_text() == "new"
    assert (tmp_path / "other" / "config.json").read_text() == "old"
    monkeypatch.setattr(artifacts, "exchange", lambda *_: False)
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("newer")
    assert names(tmp_path) == ["other", "out"] and (tmp_path / "out" / "config.json").read_text() == "newer"


def test_every_file_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, rename, sync = [], os.rename, artifacts.sync
    monkeypatch.setattr(artifacts, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with staged(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("1")
    assert sorted(events[:3]) == sorted(["deep", "weights", folder.name]) and events[3:] == ["rename", tmp_path.name]


def test_an_existing_directory_is_replaced_only_if_asked(tmp_path):
    old(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="out exists already and is not empty: choose another directory, or allow overwriting"
    ):
        with staged(tmp_path / "out"):
            raise AssertionError("the block must not run")
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "weights").write_text("new")
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["weights"]


def test_an_empty_directory_may_be_filled_and_a_file_never(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "weights").write_text("new")
    assert names(tmp_path / "out") == ["weights"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in (tmp_path / "out" / "weights", tmp_path / "link"):
        with (
            pytest.raises(CheckpointError, match=f"{place.name} exists and is no directory"),
            staged(place, overwrite=True),
        ):
            raise AssertionError("the block must not run")


def test_a_killed_writer_leaves_what_was_there_and_the_next_one_cleans_up(tmp_path):
    old(tmp_path / "out")
    child = os.fork()
    if not child:
        with staged(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left, there = names(tmp_path)
    assert left.startswith(".tmp-out-") and there == "out" and (tmp_path / "out" / "config.json").read_text() == "old"
    foreign = tmp_path / f".tmp-out-ffffff-{2**22 + 1}-00000000"  # of another machine
    foreign.mkdir()
    # neither removes the other
    with staged(tmp_path / "out", overwrite=True) as first, staged(tmp_path / "out", overwrite=True) as second:
        (first / "config.json").write_text("first")
        (second / "config.json").write_text("second")
    assert (
        names(tmp_path) == sorted([foreign.name, "out"]) and (tmp_path / "out" / "config.json").read_text() == "first"
    )


def test_too_little_room_is_known_before_anything_is_written(tmp_path):
    check_space(tmp_path / "deep" / "out", 1)
    with pytest.raises(CheckpointWriteError, match=r"out needs 1000000000.00 GB, [\d.]+ GB are free: make room"):
        check_space(tmp_path / "deep" / "out", 10**18)
    assert names(tmp_path) == []


# --- JSON ------------------------------------------------------------------------------------------------------


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointWriteError, match=r"could not write x.json \(No space left on device\)"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert names(tmp_path) == ["x.json"] and read_json(tmp_path / "x.json", "it") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "holds a list, expected an object"),
        ("[" * 100_000, "recursion"),
        (None, "No such file"),
        ('{"a": "' + "x" * 2**24 + '"}', "expected at most 16777216"),
    ],
)
def test_json_that_is_no_checkpoint_file_is_refused(text, reason, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"student: config.json cannot be read .*{reason}"):
        read_json(tmp_path / "config.json", "student")


# --- manifest --------------------------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_but_itself(checkpoint):
    listed = json.loads((checkpoint / "manifest.json").read_text())
    assert listed["format_version"] == 1
    assert list(listed["files"]) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "pictures/curve.png",
    ]
    assert listed["files"]["pictures/curve.png"] == {"size": 3, "sha256": hashlib.sha256(b"png").hexdigest()}
    verify_files(checkpoint)
    verify_files(checkpoint, level="size")


def test_every_flipped_bit_of_a_weight_is_found(checkpoint):
    file = checkpoint / "model-1.safetensors"
    content = file.read_bytes()
    for position in range(0, len(content), 7):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        verify_files(checkpoint, level="size")
        with pytest.raises(
            CheckpointError,
            match=r"model-1.safetensors has SHA-256 [0-9a-f]{12}..., expected [0-9a-f]{12}..., it is damaged",
        ):
            verify_files(checkpoint)


def list_file(folder, **entries):
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] |= entries.pop("files", {})
    (folder / "manifest.json").write_text(json.dumps(content | entries))


SPOILT = {
    "truncated": (
        lambda d: os.truncate(d / "model-2.safetensors", 50),
        r"model-2.safetensors has 50 bytes, expected \d+",
    ),
    "missing": (lambda d: (d / "pictures" / "curve.png").unlink(), "pictures/curve.png is missing, expected 3 bytes"),
    "unlisted weights": (
        lambda d: (d / "model.safetensors").write_text("x"),
        "model.safetensors is not listed in manifest.json",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read .No such file"),
    "a newer format": (
        lambda d: list_file(d, format_version=2),
        "manifest.json has format_version 2, expected 1; upgrade",
    ),
    "another form": (
        lambda d: (d / "manifest.json").write_text('{"format_version": 1, "files": {"a": 3}}'),
        "manifest.json lists no files",
    ),
    "a way out": (
        lambda d: list_file(d, files={"../secret": {"size": 0, "sha256": ""}}),
        "manifest.json lists '../secret', expected names inside",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("level", ["full", "size"])
def test_a_spoilt_checkpoint_is_refused_by_name(case, level, checkpoint):
    spoil, message = SPOILT[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=f"student: {message}"):
        verify_files(checkpoint, level)


def test_a_misspelt_level_does_not_pass_for_a_check(checkpoint):
    with pytest.raises(CheckpointError, match="level='sizes', expected 'full' or 'size'"):
        verify_files(checkpoint, level="sizes")


# --- provenance ------------------------------------------------------------------------------------------------


def test_stages_accumulate_from_parent_to_child(tmp_path):
    folders = [tmp_path / n for n in ("converted", "aligned")]
    for folder in folders:
        folder.mkdir()
    add_provenance(folders[0], "convert", parent="meta-llama/Llama-3.2-1B", config={"sliding_window": 16})
    add_provenance(folders[1], "align", parent=folders[0], data={"tokens": 5}, figures={"error": 0.25}, seconds=1.5)
    first, second = read_provenance(folders[1])
    assert first == read_provenance(folders[0])[0] and (first["stage"], first["parent"]) == ("convert", "Llama-3.2-1B")
    assert {k: second[k] for k in ("stage", "parent", "data", "figures", "seconds")} == {
        "stage": "align",
        "parent": "converted",
        "data": {"tokens": 5},
        "figures": {"error": 0.25},
        "seconds": 1.5,
    }
    assert (
        "config" not in second
        and second["versions"]["torch"] == importlib.metadata.version("torch")
        and "transformers" in second["versions"]
    )
    assert read_provenance(tmp_path) == []


def test_stages_may_be_given(tmp_path):
    add_provenance(tmp_path, "merge", stages=[{"stage": "convert"}, {"stage": "distill:math"}])
    assert [s["stage"] for s in read_provenance(tmp_path)] == ["convert", "distill:math", "merge"]


def test_a_record_holds_no_path_no_host_and_no_secret(tmp_path):
    (tmp_path / "teacher").mkdir()
    config = {
        "teacher": tmp_path / "teacher",
        "out": str(tmp_path / "out"),
        "home": "~/models/x",
        "up": "../x/y",
        "hub_token": "hf_abc",
        "nested": [{"api_key": "k", "num_key_value_heads": 2, "pad_token_id": 0}],
        "recipe": "recipes/tiny.yaml",
        "dtype": torch.bfloat16,
        "rate": float("nan"),
    }
    add_provenance(tmp_path, "convert", parent=tmp_path / "teacher", config=config)
    text = (tmp_path / "provenance.json").read_text()
    assert read_provenance(tmp_path)[0]["config"] == {
        "teacher": "teacher",
        "out": "out",
        "home": "x",
        "up": "y",
        "nested": [{"num_key_value_heads": 2, "pad_token_id": 0}],
        "recipe": "recipes/tiny.yaml",
        "dtype": "torch.bfloat16",
        "rate": None,
    }
    for private in (str(tmp_path), os.uname().nodename, "hf_abc", "NaN"):
        assert private not in text


def test_numbers_keep_their_type():
    assert publishable({"n": 3, "x": 0.5, "yes": True, "none": None, "t": (1, 2)}) == {
        "n": 3,
        "x": 0.5,
        "yes": True,
        "none": None,
        "t": [1, 2],
    }
    assert publishable(True) is True and publishable(float("inf")) is None


def test_a_damaged_record_is_refused(tmp_path):
    for text, message in (
        ("{}", "has format_version None, expected 1"),
        ('{"format_version": 1, "stages": [3]}', "holds no list of stages"),
    ):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_provenance(tmp_path)


# --- weights ---------------------------------------------------------------------------------------------------


def test_tensors_are_found_in_one_file_or_in_shards(checkpoint, tmp_path):
    assert weight_files(checkpoint) == {
        "a": checkpoint / "model-1.safetensors",
        "b": checkpoint / "model-2.safetensors",
    }
    save_file({"c": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == {"c": tmp_path / "model.safetensors"}


def index(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


WEIGHTS = {
    "missing shard": (lambda d: (d / "model-2.safetensors").unlink(), "shard model-2.safetensors is missing"),
    "a way out": (
        lambda d: index(d, {"weight_map": {"a": "../a.safetensors"}}),
        "names the file '../a.safetensors', expected a plain name",
    ),
    "a link out": (
        lambda d: ((d / "m").symlink_to("/etc/hostname"), index(d, {"weight_map": {"a": "m"}})),
        "student/m: links to a file outside",
    ),
    "no map": (lambda d: index(d, {}), "index.json is damaged .no weight_map."),
    "no weights": (
        lambda d: (d / "model.safetensors.index.json").unlink(),
        "expected model.safetensors or .*, found neither",
    ),
    "truncated": (
        lambda d: (
            (d / "model.safetensors.index.json").unlink(),
            (d / "model-1.safetensors").rename(d / "model.safetensors"),
            os.truncate(d / "model.safetensors", 70),
        ),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_all_there_are_refused_by_name(case, checkpoint):
    spoil, message = WEIGHTS[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        weight_files(checkpoint)


def test_a_hub_snapshot_may_link_to_its_blobs(checkpoint, tmp_path):
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(p for p in checkpoint.iterdir() if p.is_file()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert set(weight_files(snapshot)) == {"a", "b"}
    (snapshot / "pictures").mkdir()
    (snapshot / "pictures" / "curve.png").write_bytes(b"png")
    verify_files(snapshot)
