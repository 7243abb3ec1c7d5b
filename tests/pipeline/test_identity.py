"""What a stage reads is known by its content: other weights of the same names and sizes are another checkpoint, a flipped
bit is damage, and a hash is read once.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint import digests
from xlstm_hybrid.checkpoint.digests import TRUSTED, file_digest, require_intact, weights_hash
from xlstm_hybrid.checkpoint.files import digest, read_provenance, write_manifest
from xlstm_hybrid.cli import app
from xlstm_hybrid.commands.plan_layers import plan_layers
from xlstm_hybrid.commands.serve import serve
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.errors import CheckpointError, ConfigError, StoreError
from xlstm_hybrid.evaluation.equivalence import verify_checkpoint
from xlstm_hybrid.pipeline.runner import Runner, Stage, checkpoint_fingerprint, earlier_fingerprint

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def fresh_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trusted():
    token = TRUSTED.set(True)
    yield
    TRUSTED.reset(token)


def teacher_at(folder, seed=0):
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def flip(file, place=-3):
    """One bit of a file, its size and its time of the last change as they were."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def copying(calls, name, source, folder="made"):
    """A stage that copies the weights of what it reads into a checkpoint of its own."""

    def build(out, again, path):
        calls.append(name)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        shutil.copy(Path(path) / "model.safetensors", out)
        write_manifest(out)

    return Stage(
        name,
        (source,),
        build,
        {"steps": 3},
        folder,
        f"stages/{name}.json",
        lambda f, note: require_intact(f, listed=True),
    )


def test_a_teacher_with_other_weights_of_the_same_sizes_is_another_teacher(tmp_path):
    calls, teacher, out = [], teacher_at(tmp_path / "teacher"), tmp_path / "run"
    Runner(out).make(copying(calls, "convert", teacher))
    Runner(out).make(copying(calls, "convert", teacher))
    assert calls == ["convert"]
    sizes = [p.stat().st_size for p in sorted(teacher.iterdir())]
    teacher_at(teacher, seed=1)
    assert [p.stat().st_size for p in sorted(teacher.iterdir())] == sizes
    with pytest.raises(
        ConfigError, match=r"made was made with other settings.*parents was \['.{16}'\], is \['.{16}'\].*--redo"
    ):
        Runner(out).make(copying(calls, "convert", teacher))
    Runner(out, redo=True).make(copying(calls, "convert", teacher))
    assert calls == ["convert", "convert"]


def test_a_refused_stage_names_each_setting_with_both_values(tmp_path):
    teacher, out = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    Runner(out).make(copying([], "convert", teacher))
    stage = copying([], "convert", teacher)
    object.__setattr__(stage, "settings", {"steps": 4, "rate": {"peak": 0.1}})
    with pytest.raises(
        ConfigError, match=r"settings.steps was 3, is 4; settings.rate was None, is \{'peak': 0.1\}; seed was 0, is 7"
    ):
        Runner(out, seed=7).make(stage)


def test_a_flipped_bit_in_a_stage_is_found_before_the_next_one_reads_it(tmp_path, capsys):
    calls, teacher, out = [], teacher_at(tmp_path / "teacher"), tmp_path / "run"
    first = copying(calls, "align", teacher, "aligned")
    second = copying(calls, "distill", first, "expert")
    Runner(out).make(first, second)
    flip(out / "aligned/model.safetensors")
    Runner(out).make(first, second)
    assert calls == ["align", "distill", "align"]  # mended to the same content: the expert stays
    assert "it is damaged" in " ".join(capsys.readouterr().out.split())


def test_a_teacher_that_its_manifest_does_not_describe_is_refused_before_any_stage(tmp_path):
    teacher = teacher_at(tmp_path / "teacher")
    write_manifest(teacher)
    flip(teacher / "model.safetensors")
    with pytest.raises(CheckpointError, match="teacher: model.safetensors has SHA-256 .* it is damaged"):
        Runner(tmp_path / "run").make(copying([], "convert", teacher))


def test_notes_of_before_knew_a_directory_by_names_and_sizes_and_are_taken(tmp_path):
    calls, teacher, out = [], teacher_at(tmp_path / "teacher"), tmp_path / "run"
    Runner(out).make(copying(calls, "convert", teacher))
    note = out / "stages/convert.json"
    content = json.loads(note.read_text())
    assert content["spec"]["parents"] == [checkpoint_fingerprint(teacher)]
    content["spec"]["parents"] = [earlier_fingerprint(teacher)]
    note.write_text(json.dumps(content))
    Runner(out).make(copying(calls, "convert", teacher))
    assert calls == ["convert"]


# --- every command looks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "student"
    convert(TINY, folder, sliding_window=16, dtype="float32")
    return folder


READERS = {
    "load": load_model,
    "align": lambda student: pipeline.align(student, student.parent / "out", pipeline_recipe()),
    "distill": lambda student: pipeline.distill(student, TINY, student.parent / "out", pipeline_recipe(), "symbols"),
    "evaluate": lambda student: pipeline.evaluate(student, pipeline_recipe()),
    "verify": verify_checkpoint,
    "serve": lambda student: serve(str(student)),
    "plan-layers": lambda student: plan_layers(str(student), "64MB", 64, measure=True, rows=1, tokens=64),
}


def pipeline_recipe():
    from xlstm_hybrid.recipe.schema import load_recipe

    return load_recipe(TINY.parents[1] / "tiny.yaml")


@pytest.mark.parametrize("reader", READERS)
def test_a_student_with_a_flipped_bit_is_refused_by_whatever_reads_it(reader, student, tmp_path):
    damaged = shutil.copytree(student, tmp_path / "student")
    flip(damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match="student: model.safetensors has SHA-256 .* it is damaged"):
        READERS[reader](damaged)
    assert not (tmp_path / "out").exists()


def test_with_trust_it_is_used_and_a_line_says_so(student, tmp_path, trusted, caplog):
    damaged = shutil.copytree(student, tmp_path / "student")
    flip(damaged / "model.safetensors")
    with caplog.at_level(logging.WARNING, "xlstm_hybrid"):
        assert load_model(damaged).config.sliding_window == 16
    assert "student: not compared with its manifest (--trust)" in caplog.text


def test_the_option_holds_for_the_command_behind_it(monkeypatch):
    from typer.testing import CliRunner

    seen = []

    def card():
        """See what holds.

        Example: xlstm-hybrid --trust card
        """
        seen.append(TRUSTED.get())

    monkeypatch.setattr("xlstm_hybrid.commands.card.card", card)

    token = TRUSTED.set(False)
    try:
        CliRunner().invoke(app, ["--trust", "card"])
    finally:
        TRUSTED.reset(token)
    assert seen == [True]


def test_a_conversion_records_which_weights_it_copied(student):
    stage = read_provenance(student)[0]
    assert stage["config"]["teacher_weights"] == weights_hash(TINY)


@pytest.mark.parametrize("trust", [False, True])
def test_a_store_of_another_teacher_is_refused_beside_this_one(trust, tmp_path, monkeypatch, caplog):
    from xlstm_hybrid.pipeline import stages

    mine, other = teacher_at(tmp_path / "mine"), teacher_at(tmp_path / "other", seed=1)
    spec = {"teacher": "other", "revision": None, "weights": weights_hash(other)}
    monkeypatch.setattr(stages, "read_index", lambda store: {"spec": spec})
    stages.check_store_teacher(tmp_path / "store", other)
    token = TRUSTED.set(trust)
    try:
        if trust:
            stages.check_store_teacher(tmp_path / "store", mine)
            assert "store holds the targets of other" in caplog.text and "(--trust)" in caplog.text
        else:
            with pytest.raises(
                StoreError, match="store holds the targets of other .* the teacher beside it is mine .*cache-teacher"
            ):
                stages.check_store_teacher(tmp_path / "store", mine)
    finally:
        TRUSTED.reset(token)


@pytest.mark.parametrize("revision, name, refused", [("abc", "a/b", False), ("abc", "a/c", True), (None, "a/c", False)])
def test_a_store_and_a_hub_id_are_compared_by_name(revision, name, refused, tmp_path, monkeypatch):
    """Where the store's teacher was a directory, a hub id may be the same one."""
    from xlstm_hybrid.pipeline import stages

    monkeypatch.setattr(
        stages, "read_index", lambda store: {"spec": {"teacher": "a/b", "revision": revision, "weights": "0"}}
    )
    if refused:
        with pytest.raises(StoreError, match="the targets of a/b"):
            stages.check_store_teacher(tmp_path / "store", name)
    else:
        stages.check_store_teacher(tmp_path / "store", name)


# --- one read -----------------------------------------------------------------------------------------------------


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    reads, file = [], tmp_path / "model.safetensors"
    monkeypatch.setattr(digests, "digest", lambda path: reads.append(path) or digest(path))
    save_file({"x": torch.arange(400_000.0)}, file)
    first = file_digest(file)
    assert file_digest(file) == first and len(reads) == 2  # it may still be written to
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    assert file_digest(file) == first and len(reads) == 3
    assert [file_digest(file) for _ in range(3)] == [first] * 3 and len(reads) == 3
    flip(file)  # the time of the last change is put back; that of the inode cannot be
    assert file_digest(file) != first and len(reads) == 4


def test_a_memory_that_cannot_be_written_or_read_costs_reads_only(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    file = tmp_path / "x"
    file.write_bytes(bytes(2 << 20))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert file_digest(file) == digest(file) == file_digest(file)
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/digests.json").write_text("[1")
    assert file_digest(file) == digest(file)
    assert list(json.loads((tmp_path / "cache/digests.json").read_text()).values()) == [digest(file)]


def test_small_files_are_read_each_time(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    assert file_digest(file) == digest(file) and not (tmp_path / "cache").exists()


def test_weights_are_known_whatever_else_lies_beside_them(tmp_path):
    teacher = teacher_at(tmp_path / "teacher")
    before = weights_hash(teacher)
    (teacher / "README.md").write_text("a card")
    assert weights_hash(teacher) == before
    weights = load_file(teacher / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    assert weights_hash(teacher) != before
