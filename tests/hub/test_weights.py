"""Weights that leave the machine, or go into an export, are all there, finite, and nobody else's file."""

import json
import os
import shutil

import pytest
import torch
from conftest import tiny_student
from safetensors.torch import load_file, save_file

from xlstm_hybrid.checkpoint.files import INDEX, SINGLE, add_provenance, write_manifest
from xlstm_hybrid.checkpoint.weights import weight_faults
from xlstm_hybrid.errors import CheckpointError, ShareError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.hub.push import inspect_folder
from xlstm_hybrid.reports.card import write_card


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "student"
    tiny_student(torch.float32, num_hidden_layers=2).save_pretrained(folder, max_shard_size="60KB")
    add_provenance(folder, "convert", config={"teacher": "t"})
    write_card(folder)
    write_manifest(folder)
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "student")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def not_finite(folder, value):
    file = shards(folder)[0]
    tensors = load_file(file)
    name = min(name for name, x in tensors.items() if x.ndim == 2)
    tensors[name][1, 1] = value
    save_file(tensors, file, {"format": "pt"})


def to_another_place(folder):
    change_index(folder, lambda placed: placed.update({"lm_head.weight": "../teacher/model.safetensors"}))


def to_another_shard(folder):
    first, last = shards(folder)[0].name, shards(folder)[-1].name
    change_index(folder, lambda placed: placed.update({next(n for n, f in placed.items() if f == first): last}))


FAULTS = {
    "holds NaN or infinity": lambda folder: not_finite(folder, torch.nan),
    "[a-z_.]+ holds NaN": lambda folder: not_finite(folder, torch.inf),
    "'../teacher/model.safetensors', expected a (file beside it|plain name)": to_another_place,
    "lacks 1 tensors, such as": to_another_shard,
    "holds beside its index 1 tensors": lambda folder: change_index(folder, lambda placed: placed.popitem()),
    "has 2 names on this machine": lambda folder: os.link(shards(folder)[0], folder.parent / "other"),
    "cannot be read": lambda folder: shards(folder)[1].write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
}


def test_weights_of_a_student_have_no_faults(folder):
    assert len(shards(folder)) > 2 and list(weight_faults(folder)) == []
    inspect_folder(folder, "me/student")
    export(folder, folder.parent / "out")


@pytest.mark.parametrize("says", FAULTS)
def test_a_fault_is_named_before_anything_is_shared_or_exported(says, folder):
    """With a manifest that describes the files as they are: the fault is older than it."""
    FAULTS[says](folder)
    write_manifest(folder)
    with pytest.raises(ShareError, match=says):
        inspect_folder(folder, "me/student")
    with pytest.raises(CheckpointError, match=says):
        export(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_eight_bit_floats_are_looked_at_too(tmp_path):
    x = torch.ones(4).to(torch.float8_e4m3fn)
    save_file({"a": x}, tmp_path / SINGLE, {"format": "pt"})
    assert list(weight_faults(tmp_path)) == []
    save_file({"a": torch.full((4,), torch.nan).to(torch.float8_e4m3fn)}, tmp_path / SINGLE, {"format": "pt"})
    assert list(weight_faults(tmp_path)) == [f"{SINGLE}: a holds NaN or infinity"]
