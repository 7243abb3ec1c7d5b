"""What leaves the machine is on the list, tells nothing of it, and is what the manifest says; a dry run opens no
connection.
"""

import json
import re
import socket
import struct
import sys
import types
import zlib
from pathlib import Path

import pytest
import torch
from conftest import tiny_student
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import xlstm_hybrid.hub.push
from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint.files import add_provenance, digest, write_manifest
from xlstm_hybrid.errors import CheckpointError, ShareError
from xlstm_hybrid.hub.push import findings, inspect_folder, push
from xlstm_hybrid.reports.card import write_card

REPO = "someone/a-student"
TOKEN = "hf_" + "aB3" * 12
CONVERT = {"teacher": "meta-llama/Llama-3.2-1B", "license": "llama3.2"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "student"
    tiny_student(torch.float32, num_hidden_layers=1).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/home/user": 0, "C:\\Users": 1}}}))
    add_provenance(folder, "convert", config=CONVERT)
    write_card(folder)
    write_manifest(folder)
    return folder


@pytest.fixture
def folder(clean, tmp_path):
    import shutil

    return Path(shutil.copytree(clean, tmp_path / "student"))


def png(*chunks):
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (*chunks, (b"IEND", b"")):
        data += struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def refused(folder, **settings):
    with pytest.raises(ShareError) as raised:
        inspect_folder(folder, REPO, **settings)
    return str(raised.value)


# --- what may leave --------------------------------------------------------------------------------------------


def test_a_clean_checkpoint_may_leave_with_every_file_of_its_manifest(folder, monkeypatch):
    def no_network(*_):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    parcel = push(folder, REPO, dry_run=True)
    assert set(parcel.files) == {p.name for p in folder.iterdir()} and parcel.commit is None and parcel.warnings == []
    assert parcel.files["config.json"] == ((folder / "config.json").stat().st_size, digest(folder / "config.json"))
    assert parcel.size == sum(p.stat().st_size for p in folder.iterdir())


def test_an_owner_is_told_what_the_card_lacks(folder):
    add_provenance(folder, "convert", config={"teacher": "local"}, stages=[])
    write_card(folder)
    write_manifest(folder)
    assert inspect_folder(folder, REPO).warnings == [
        "the card names no license: its stages recorded none",
        "the card names no base_model: its stages recorded none",
    ]


# --- what may not ----------------------------------------------------------------------------------------------


def test_everything_that_is_on_no_list_is_named_at_once(folder):
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", "modeling.py", ".netrc", "x.png.exe"):
        (folder / name).write_bytes(b"x")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("x")
    (folder / "vocab.json").symlink_to("/etc/hostname")
    (folder / "README.md").unlink()
    text = refused(folder)
    for name in (".netrc", "training_args.bin", "optimizer.pt", "notes.txt", "x.png.exe"):
        assert f"{name}: is not a file that a checkpoint needs" in text
    assert "modeling.py: is code; allow it" in text and "logs/: is a folder" in text and "vocab.json: is a link" in text
    assert "README.md: is missing (xlstm-hybrid card writes it)" in text and "9 findings" in text
    assert "see docs/finetune.md, Card and upload. Remove the other findings, then write" in text


def test_what_is_missing_need_not_be_removed(folder):
    for name in ("README.md", "manifest.json", "provenance.json"):
        (folder / name).unlink()
    text = refused(folder)
    assert "3 findings" in text and text.endswith("see docs/finetune.md, Card and upload") and "Remove" not in text


def test_much_code_is_one_finding_with_the_option(folder):
    for letter in "abcde":
        (folder / f"{letter}.py").write_text("x = 1\n")
    assert "1 findings: a.py, b.py, c.py and 2 more: are code; allow it with --code if" in refused(folder)


def test_code_leaves_only_on_demand_and_with_its_map(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "modeling_x.C"}}))
    write_manifest(folder)
    assert "auto_map names code" in refused(folder)
    (folder / "modeling_x.py").write_text("class C: ...\n")
    write_manifest(folder)
    assert "modeling_x.py: is code" in refused(folder)
    assert "modeling_x.py" in inspect_folder(folder, REPO, code=True).files


SECRETS = {
    "a token of the Hub": ("generation_config.json", json.dumps({"note": TOKEN}), "a key (hf_a...)"),
    "a named secret": (
        "generation_config.json",
        json.dumps({"a": [{"hub_token": "x1"}]}),
        "generation_config.json: a.0.hub_token holds a secret",
    ),
    "a cloud key": ("chat_template.jinja", "AKIA" + "ABCDEFGH12345678", "a key (AKIA...)"),
    "a private key": ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "a key (----...)"),
    "a token among tokens": ("tokenizer.json", json.dumps({"model": {"vocab": {TOKEN: 1}}}), "a key (hf_a...)"),
    "a home folder": ("training_log.json", json.dumps([{"path": "/home/ada/run"}]), "a path of a machine (/home/...)"),
    "a Windows path": ("training_log.json", json.dumps([{"path": "C:\\Users\\ada"}]), "a path of a machine (C:"),
    "a share": ("chat_template.jinja", r"\\fileserver\homes\ada", "a path of a machine"),
    "a path in a picture": (
        "loss.png",
        png((b"tEXt", b"Comment\0/data/ada/run")),
        "loss.png: holds a path of a machine (/data/...)",
    ),
    "text in a picture that is packed": (
        "loss.png",
        png((b"zTXt", b"Comment\0\0" + zlib.compress(b"/data/ada"))),
        "loss.png: holds compressed text",
    ),
    "a key twice": ("generation_config.json", '{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "deep JSON": ("generation_config.json", '{"a":' * 30 + "1" + "}" * 30, "nested 31 deep, expected at most 20"),
}


@pytest.mark.parametrize("case", SECRETS)
def test_keys_and_paths_do_not_leave_and_are_not_repeated_in_full(case, folder):
    name, content, message = SECRETS[case]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_manifest(folder)
    text = refused(folder)
    assert message in text and TOKEN not in text and "ada" not in text and "1 findings" in text


def test_notes_in_the_header_of_the_weights_are_searched_too(folder):
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"from": "/scratch/ada/x"}
    )
    write_manifest(folder)
    assert "model.safetensors: holds a path of a machine (/scratch/...)" in refused(folder)


def test_a_header_that_is_too_long_is_not_read(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + content[8:])
    write_manifest(folder)
    assert "a header of 1099511627776 bytes" in refused(folder)


@pytest.mark.parametrize(
    "name, least, text",
    [("tensors", 1, "tensors, expected at most 1"), ("config", 8, "config.json: .* bytes, expected at most 8")],
)
def test_headers_and_configurations_beyond_their_caps_do_not_leave(folder, monkeypatch, name, least, text):
    inspect_folder(folder, REPO)
    monkeypatch.setitem(xlstm_hybrid.hub.push.CAPS, name, least)
    assert re.search(text, refused(folder))


def test_names_of_this_machine_and_user_do_not_leave(folder, monkeypatch):
    monkeypatch.setattr(xlstm_hybrid.hub.push, "own_names", lambda: ["lovelace"])
    (folder / "LICENSE").write_text("made on lovelace.")
    write_manifest(folder)
    assert "LICENSE: holds the name of this machine or its user (love...)" in refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/data/x",
        "and/or",
        "a ratio of 1/2",
        "https://example.org/home/x",
        "~ 3",
        "model.layers.0",
        "/v1/x",
    ],
)
def test_ordinary_text_is_no_finding(text):
    assert list(findings(text)) == []


def test_damage_and_files_that_no_manifest_lists_are_refused(folder):
    (folder / "merges.txt").write_text("a b")
    assert "merges.txt: is not listed in manifest.json" in refused(folder)
    (folder / "merges.txt").unlink()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors has SHA-256"):
        push(folder, REPO, dry_run=True)


@pytest.mark.parametrize("repo", ["student", "a/b/c", "../x", "a/b c", "https://huggingface.co/a/b"])
def test_a_repository_has_a_plain_name(repo, folder):
    with pytest.raises(ShareError, match="expected NAME/NAME"):
        push(folder, repo, dry_run=True)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ShareError, match="nothing: no such folder"):
        push(tmp_path / "nothing", REPO, dry_run=True)


# --- uploading -------------------------------------------------------------------------------------------------


class Hub:
    """Keeps what is committed; `damage` changes what it says that arrived."""

    def __init__(self, damage=lambda files: files):
        self.made, self.files, self.damage = [], {}, damage

    def create_repo(self, repo, private, exist_ok):
        self.made.append((repo, private, exist_ok))

    def create_commit(self, repo, operations, commit_message):
        assert len({o.path_in_repo for o in operations}) == len(operations)
        self.files = {o.path_in_repo: o.upload_info for o in operations}
        self.message = commit_message
        return types.SimpleNamespace(oid="c0ffee")

    def get_paths_info(self, repo, paths, revision):
        assert revision == "c0ffee"
        entries = [
            types.SimpleNamespace(path=n, size=i.size, lfs=types.SimpleNamespace(sha256=i.sha256.hex()))
            for n, i in self.files.items()
        ]
        return self.damage([e for e in entries if e.path in paths])


def test_an_upload_is_one_commit_of_what_was_checked(folder):
    hub = Hub()
    parcel = push(folder, REPO, private=True, api=hub)
    assert (
        hub.made == [(REPO, True, True)]
        and parcel.commit == "c0ffee"
        and set(hub.files) == {p.name for p in folder.iterdir()}
    )
    assert hub.message == "Upload student with xlstm-hybrid"


def test_a_file_that_changes_after_the_check_is_not_uploaded(folder, monkeypatch):
    check = xlstm_hybrid.hub.push.inspect_folder

    def check_then_change(*arguments, **settings):
        parcel = check(*arguments, **settings)
        (folder / "tokenizer.json").write_text("{}")
        return parcel

    monkeypatch.setattr(xlstm_hybrid.hub.push, "inspect_folder", check_then_change)
    hub = Hub()
    with pytest.raises(CheckpointError, match="tokenizer.json changed after it was checked"):
        push(folder, REPO, api=hub)
    assert not hub.made


def shorter(entries):
    entries[0].size -= 1
    return entries


def another(entries):
    next(e for e in entries if e.path.endswith(".safetensors")).lfs.sha256 = "0" * 64
    return entries


def missing(entries):
    return entries[1:]


@pytest.mark.parametrize(
    "damage, found", [(missing, "(missing, expected "), (shorter, " bytes, expected "), (another, "safetensors")]
)
def test_what_arrives_damaged_is_named(folder, damage, found):
    with pytest.raises(
        ShareError, match="someone/a-student at c0ffee: [^,]*, expected [0-9]+. arrived damaged; push again"
    ) as raised:
        push(folder, REPO, api=Hub(damage))
    assert found in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_one_named_error_without_the_token(folder):
    class Away(Hub):
        def create_repo(self, *_, **__):
            raise ConnectionError(f"no route, {TOKEN}")

    with pytest.raises(ShareError, match=r"the Hub refused or could not be reached \(ConnectionError\)") as raised:
        push(folder, REPO, api=Away())
    assert TOKEN not in str(raised.value)


def test_the_command_tells_what_would_leave(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = CliRunner().invoke(cli.app, ["push", str(folder), REPO, "--dry-run"], catch_exceptions=False)
    assert (
        result.exit_code == 0
        and "bytes  model.safetensors" in result.output
        and "would be uploaded; nothing was sent" in result.output
    )
    assert isinstance(CliRunner().invoke(cli.app, ["push", str(folder), "x", "--dry-run"]).exception, ShareError)


def test_the_command_writes_the_architecture_for_mergekit(folder, tmp_path):
    result = CliRunner().invoke(
        cli.app, ["mergekit-architecture", str(folder), str(tmp_path / "a.json")], catch_exceptions=False
    )
    assert result.exit_code == 0 and json.loads((tmp_path / "a.json").read_text())["model_type"] == "xlstm_hybrid"
