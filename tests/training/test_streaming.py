"""Aligning some layers at a time gives what aligning all of them together gives, from any interruption on."""

import json
import shutil

import pytest
import torch
from conftest import token_ids
from datasets import Dataset
from safetensors.torch import load_file
from test_alignment import LENGTH, aligned, arguments, collate, tokenizer
from tiny_students import mixed_checkpoint
from tiny_students import student as tiny
from tiny_teachers import edit_config
from transformers import AutoModelForCausalLM

from xlstm_hybrid.checkpoint.files import read_provenance, verify_files, weight_files
from xlstm_hybrid.errors import CheckpointError, ConfigError, ConfigWarning
from xlstm_hybrid.model.trained import recorded_values
from xlstm_hybrid.training import alignment_by_groups as streaming
from xlstm_hybrid.training.alignment import measure_alignment, new_parameters
from xlstm_hybrid.training.alignment_by_groups import Progress, Spool, align_streamed
from xlstm_hybrid.training.layers_at_a_time import model_of

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-2,
    "warmup_steps": 2,
}
HELD_OUT = {"input_ids": token_ids(4, LENGTH, seed=9)}


def rows(count=24):
    """Rows of two documents each, some of them padded on the right: over two epochs, for the six steps that are taken."""
    ids = token_ids(count, LENGTH).tolist()
    real = [[1] * (LENGTH - n % 3) + [0] * (n % 3) for n in range(count)]
    positions = [t % 15 for t in range(LENGTH)]
    return Dataset.from_list(
        [{"input_ids": i, "attention_mask": m, "position_ids": positions} for i, m in zip(ids, real, strict=True)]
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mixed_checkpoint(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="module")
def joint(checkpoint, tmp_path_factory):
    """`(model, trainer)` of the joint run."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, aligned(model, tmp_path_factory.mktemp("joint"), data=rows(), **SETTINGS)


def streamed(checkpoint, folder, layers=1, **settings):
    args = arguments(folder / "unused", **(SETTINGS | {"layers_at_a_time": layers} | settings))
    return align_streamed(checkpoint, folder / "out", args, rows(), collate, tokenizer(), held_out=[HELD_OUT])


@pytest.mark.parametrize("layers", [1, 3])
def test_streamed_alignment_is_the_joint_one_bit_by_bit(layers, checkpoint, joint, tmp_path):
    model, trainer = joint
    figures = streamed(checkpoint, tmp_path, layers)
    found, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert found.keys() == before.keys()
    expected = {name: p.detach() for name, p in new_parameters(model).items()}
    for name in found:
        assert torch.equal(found[name], expected.get(name, before[name])), name
    assert all(not torch.equal(found[name], before[name]) for name in expected)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for mine, theirs in zip(figures["log"], logged, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["step"] == theirs["step"]
        for n in (0, 2, 3):
            assert mine[f"layer_{n}/relative_error"] == pytest.approx(theirs[f"layer_{n}/relative_error"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_streamed_alignment_is_the_joint_one_too(dtype, checkpoint, tmp_path):
    """Calculated in bfloat16 over float32 weights, and with weights and hidden states that are bfloat16 themselves."""
    settings = {"bf16": True, "loss_form": "relative", "cosine_weight": 0.5, "stop_window": 2, "stop_error": 0.012}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    trainer = aligned(model, tmp_path / "joint", data=rows(), **SETTINGS, **settings)
    args = arguments(tmp_path / "unused", **SETTINGS, **settings, layers_at_a_time=2)
    align_streamed(checkpoint, tmp_path / "out", args, rows(), collate, tokenizer(), dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert trainer.stopped and len(trainer.stopped) < 3
    for name, p in new_parameters(model).items():
        assert torch.equal(found[name].to(p.dtype), p), name


@pytest.mark.parametrize("family", ["olmo_hybrid", "qwen3_5_text"])
def test_layers_are_in_memory_in_the_dtypes_of_the_whole_model(family, tmp_path):
    """A teacher in bfloat16 rounds the decays of its linear attention, or keeps them."""
    tiny(family, dtype=torch.float32).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    part = model_of(whole.config, weight_files(tmp_path), [0, 1], torch.bfloat16)
    for name, x in part.state_dict().items():
        torch.testing.assert_close(x, whole.state_dict()[name], rtol=0, atol=0)
    assert len(part.state_dict()) > 20


def test_the_result_is_a_checkpoint_with_record_and_measures(checkpoint, tmp_path):
    figures = streamed(checkpoint, tmp_path, 2)
    verify_files(tmp_path / "out")
    assert not (tmp_path / "out.streaming").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = measure_alignment(model, [HELD_OUT])
    before = measure_alignment(AutoModelForCausalLM.from_pretrained(checkpoint), [HELD_OUT])
    assert [entry["layer"] for entry in figures["relative_error"]] == [0, 2, 3] == list(after)
    for entry in figures["relative_error"]:
        assert entry["before"] == pytest.approx(before[entry["layer"]], rel=1e-5)
        assert entry["after"] == pytest.approx(after[entry["layer"]], rel=1e-5) and entry["after"] < entry["before"]
    stage = read_provenance(tmp_path / "out")[-1]
    assert stage["stage"] == "align" and stage["figures"]["relative_error"] == figures["relative_error"]
    assert len(json.loads((tmp_path / "out" / "training_log.json").read_text())) == SETTINGS["max_steps"]


def test_settings_edited_before_the_alignment_are_told_and_then_those_of_the_training(checkpoint, tmp_path):
    edited = shutil.copytree(checkpoint, tmp_path / "edited")
    window = recorded_values(edited.glob("*.safetensors"))["sliding_window"]
    edit_config(edited, sliding_window=window + 1)
    with pytest.warns(ConfigWarning, match=f"edited: sliding_window was {window} in training, is {window + 1}"):
        streamed(edited, tmp_path, 2)
    assert recorded_values((tmp_path / "out").glob("*.safetensors"))["sliding_window"] == window + 1


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.mark.parametrize(
    "where", ["train", *(pytest.param(where, marks=pytest.mark.slow) for where in ("embed", "spool", "progress"))]
)
def test_a_killed_run_goes_on_at_the_layer_it_was_at(where, checkpoint, joint, tmp_path, monkeypatch):
    done = []
    with monkeypatch.context() as patch:
        if where == "train":
            step = streaming.AlignmentTrainer.training_step

            def training_step(self, *args, **kwargs):
                if self.model.streamed_layers == [2] and self.state.global_step == 4:
                    raise Killed
                return step(self, *args, **kwargs)

            patch.setattr(streaming.AlignmentTrainer, "training_step", training_step)
        elif where == "progress":
            finished = Progress.finished

            def finish(self, entry):
                if entry["layers"] == [2]:
                    raise Killed
                finished(self, entry)

            patch.setattr(Progress, "finished", finish)
        else:
            layer, write = {"embed": 0, "spool": 3}[where], Spool.write

            def broken(self, at, states):
                def some():
                    for n, x in enumerate(states):
                        if at == layer and n == 3:
                            raise Killed
                        yield x

                write(self, at, some())

            patch.setattr(Spool, "write", broken)
        with pytest.raises(Killed):
            streamed(checkpoint, tmp_path, save_strategy="steps", save_steps=2)
    train = streaming.AlignmentTrainer.train

    def counted(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        done.append((self.model.streamed_layers, self.guard.began))
        return result

    monkeypatch.setattr(streaming.AlignmentTrainer, "train", counted)
    streamed(checkpoint, tmp_path, save_strategy="steps", save_steps=2)
    from_step = {"embed": None, "train": 4, "spool": 6, "progress": 6}[where]
    assert done == ([([0], 0), ([2], 0), ([3], 0)] if where == "embed" else [([2], from_step), ([3], 0)])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in new_parameters(joint[0]).items())


def test_a_work_directory_of_another_run_is_refused(checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_trained", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            streamed(checkpoint, tmp_path, 4)
    with pytest.raises(ConfigError, match="belongs to another run: learning_rate was 0.03, is 0.02"):
        streamed(checkpoint, tmp_path, 4, learning_rate=2e-2)
    group = next((tmp_path / "out.streaming").glob("group-*.safetensors"))
    group.write_bytes(group.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="differs from what was written"):
        streamed(checkpoint, tmp_path, 4)


def test_bad_input_is_named(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="layers_at_a_time=0"):
        streamed(checkpoint, tmp_path, 0)
    with pytest.raises(ConfigError, match="are no multiple of gradient_accumulation_steps=3"):
        streamed(checkpoint, tmp_path, 2, gradient_accumulation_steps=3, num_train_epochs=2, max_steps=-1)
    spool = Spool(tmp_path / "spool")
    spool.write(0, iter([torch.ones(1, 2, 3), torch.ones(2, 2, 3)]))
    assert torch.equal(spool.read(0, 1), torch.ones(2, 2, 3)) and spool.shapes == [[1, 2, 3], [2, 2, 3]]
    spool.path(0).write_bytes(spool.path(0).read_bytes()[:-4])
    spool.mapped = {}
    with pytest.raises(CheckpointError, match="expected 72 bytes of hidden states"):
        spool.read(0, 0)


def test_bfloat16_is_stored_as_it_is(tmp_path):
    spool, x = Spool(tmp_path), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    spool.write(5, iter([x]))
    assert torch.equal(spool.read(5, 0), x) and spool.read(5, 0).dtype == torch.bfloat16
    assert spool.path(5).stat().st_size == 48
