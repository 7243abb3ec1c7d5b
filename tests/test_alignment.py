"""Stage I moves the new parameters towards the teacher's attention and nothing else."""

import pytest
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.trainers.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment, new_parameters

LENGTH = 24


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def align(model, folder, rows=16, **settings):
    positions = [t % 15 for t in range(LENGTH)]  # two documents in a row
    data = Dataset.from_list([{"input_ids": ids, "labels": ids, "position_ids": positions} for ids in token_ids(rows, LENGTH).tolist()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    args = AlignmentConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    trainer = AlignmentTrainer(model=model, args=args, train_dataset=data, data_collator=collate, processing_class=tokenizer)
    trainer.train()
    return trainer


def student():
    return tiny_student(torch.float32, gain=1.0)


def test_the_error_of_every_layer_goes_down_and_only_new_parameters_move(tmp_path):
    model = student()
    before = {n: p.clone() for n, p in model.named_parameters()}
    held_out = [{"input_ids": token_ids(4, LENGTH, seed=9)}]
    start = measure_alignment(model, held_out)
    trainer = align(model, tmp_path, max_steps=25, per_device_train_batch_size=8, learning_rate=3e-2)
    end = measure_alignment(model, held_out)
    assert start.keys() == {0, 1, 2} and all(end[n] < 0.95 * start[n] for n in start)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(new_parameters(model)) and len(moved) == 3 * 7
    logged = [e for e in trainer.state.log_history if "layer_0/relative_error" in e]
    assert len(logged) == 25 and logged[-1]["layer_2/relative_error"] < logged[0]["layer_2/relative_error"]


def test_layers_are_independent(tmp_path):
    """A layer learns the same whether or not another one is there to learn: nothing couples their gradients or their clip."""
    runs = []
    for kinds in (["hybrid_sliding"] * 3, ["full_attention", "hybrid_sliding", "full_attention"]):
        model = tiny_student(torch.float32, gain=1.0, layer_types=kinds)
        model.load_state_dict(student().state_dict(), strict=False)
        align(model, tmp_path, max_steps=3, per_device_train_batch_size=8)
        runs.append({n: p for n, p in new_parameters(model).items() if ".layers.1." in n})
    torch.testing.assert_close(runs[0], runs[1])


def test_the_logged_error_is_that_of_an_independent_measurement(tmp_path):
    model = student()
    expected = measure_alignment(
        model, [{"input_ids": token_ids(16, LENGTH)[:8], "position_ids": torch.tensor([t % 15 for t in range(LENGTH)])[None].expand(8, -1)}]
    )
    torch.manual_seed(0)
    trainer = align(model, tmp_path, rows=8, max_steps=1, per_device_train_batch_size=8)
    for n, error in expected.items():
        assert trainer.state.log_history[0][f"layer_{n}/relative_error"] == pytest.approx(error, rel=1e-3)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match="max_grad_norm=1.0: alignment needs 0"):
        AlignmentConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match="no layer of the model is hybrid_sliding"):
        align(tiny_student(torch.float32, layer_types=["full_attention"] * 3), tmp_path, max_steps=1)
    model = student()
    with torch.no_grad():
        model.model.layers[1].self_attn.mlstm.fgate_bias.fill_(float("nan"))
    with pytest.raises(DataError, match="alignment loss is nan at step 0"):
        align(model, tmp_path, max_steps=1)


def test_nothing_pickled_is_saved(tmp_path):
    trainer = align(student(), tmp_path / "work", max_steps=1, per_device_train_batch_size=8)
    trainer.save_model(str(tmp_path / "saved"))
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "config.json"} <= names and not {n for n in names if n.endswith((".bin", ".pt", ".pkl"))}
