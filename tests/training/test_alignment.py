"""Stage I moves the new parameters towards the teacher's attention and nothing else."""

import shutil

import pytest
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.model.layers import output_terms
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment, new_parameters

LENGTH = 24


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def tokenizer():
    inner = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>")


def documents(count=16):
    """Rows of two documents each."""
    positions = [t % 15 for t in range(LENGTH)]
    return Dataset.from_list(
        [{"input_ids": ids, "labels": ids, "position_ids": positions} for ids in token_ids(count, LENGTH).tolist()]
    )


def arguments(folder, **settings):
    shared = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_train_batch_size": 8,
    }
    return AlignmentConfig(**(shared | settings))


def trainer_of(model, folder, data=None, **settings):
    data = documents() if data is None else data
    return AlignmentTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer(),
    )


def aligned(model, folder, data=None, **settings):
    trainer = trainer_of(model, folder, data, **settings)
    trainer.train()
    return trainer


def align(model, folder, rows=16, **settings):
    return aligned(model, folder, documents(rows), **settings)


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


def test_a_step_does_not_calculate_what_follows_the_last_attention(tmp_path):
    model, seen = student(), []
    for n, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=n: seen.append(n))
        layer.self_attn.o_proj.register_forward_hook(lambda *_, n=n: seen.append(n))
    align(model, tmp_path, max_steps=1)
    assert seen == [0, 0, 1, 1]
    before, ids = len(seen), token_ids(2, LENGTH)
    whole = model(input_ids=ids, teacher_forced=True)
    assert seen[before:] == [0, 0, 1, 1, 2, 2] and whole.hidden_states.shape == (2, LENGTH, model.config.hidden_size)
    part = model(input_ids=ids, teacher_forced=True, onward=False)
    assert part.hidden_states is None and torch.equal(part.sums, whole.sums)


def test_layers_are_independent(tmp_path):
    """A layer learns the same whether or not another one is there to learn: nothing couples their gradients or their
    clip.
    """
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
        model,
        [
            {
                "input_ids": token_ids(16, LENGTH)[:8],
                "position_ids": torch.tensor([t % 15 for t in range(LENGTH)])[None].expand(8, -1),
            }
        ],
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
    with pytest.raises(DataError, match="none of the 1 steps was finite, nothing was learnt"):
        align(model, tmp_path, max_steps=1)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for field, value in {
        "loss_form": "mse",
        "cosine_weight": -1.0,
        "stop_gain": float("inf"),
        "stop_window": 0,
    }.items():
        with pytest.raises(ConfigError, match=f"{field}="):
            AlignmentConfig(**settings, **{field: value})
    with pytest.raises(ConfigError, match="layers_at_a_time=2: call alignment_by_groups.align_streamed"):
        align(student(), tmp_path, max_steps=1, layers_at_a_time=2)


def test_nothing_pickled_is_saved(tmp_path):
    trainer = align(student(), tmp_path / "work", max_steps=1, per_device_train_batch_size=8)
    trainer.save_model(str(tmp_path / "saved"))
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "config.json"} <= names and not {
        n for n in names if n.endswith((".bin", ".pt", ".pkl"))
    }


# --- the pass --------------------------------------------------------------------------------------------------


RECORDED = {  # by the code that had stage I twice: sums of the first and the last layer, norms of their gradients
    "plain": (
        [6760.291656872796, 16081.136884370491, 7.8184200531398504, 145.20527814560307],
        [9109.574172149416, 19575.71947827745, 9.288775779661066, 150.52645591385541],
        [5849.934472817139, 7174.510957791124],
    ),
    "left": (
        [5685.791993675997, 15316.146754800522, 6.5661083027251825, 122.21147196684652],
        [5990.620114519572, 15976.438518662964, 6.478463961022808, 115.34118239779083],
        [5024.66997028592, 5178.6412438073785],
    ),
    "packed": (
        [4024.654692568671, 17450.629450716442, 4.870858649165323, 100.99650432802628],
        [5680.680823586351, 20076.87257613882, 5.6420203849587764, 112.53655867254854],
        [5748.03758513179, 6181.981057795607],
    ),
}


@pytest.mark.parametrize("inputs", RECORDED)
def test_losses_and_gradients_are_those_that_were_recorded_before_stage_one_moved_into_the_layer(inputs):
    """A kept group, a layer that keeps the teacher's attention, one whose teacher had a window; the weights of the
    terms are 1, 0, 3 and 5.
    """
    kinds = ["hybrid_sliding", "full_attention", "hybrid_sliding"]
    teacher = {
        "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "teacher_sliding_window": 9,
    }
    model, ids, real = (
        tiny_student(layer_types=kinds, kept_groups=[[1], [], []], **teacher),
        token_ids(2, 20),
        torch.ones(2, 20, dtype=torch.long),
    )
    real[0, :5] = 0
    given = {
        "plain": {},
        "left": {"attention_mask": real},
        "packed": {"position_ids": torch.tensor([t % 8 for t in range(20)])[None].expand(2, -1)},
    }
    out = model(input_ids=ids, teacher_forced=True, terms=True, **given[inputs])
    (out.sums * torch.tensor([1.0, 0.0, 3.0, 5.0])).sum().backward()
    norms = [
        torch.cat([p.grad.flatten() for p in model.model.layers[n].self_attn.mlstm.parameters()]).norm().item()
        for n in (0, 2)
    ]
    first, last, gradients = RECORDED[inputs]
    assert out.sums[0].tolist() == pytest.approx(first, rel=1e-10) and out.sums[2].tolist() == pytest.approx(
        last, rel=1e-10
    )
    assert norms == pytest.approx(gradients, rel=1e-10) and not out.sums[1].any()
    assert out.loss.item() == pytest.approx(first[0] + last[0], rel=1e-12) and out.num_items == (
        35 if inputs == "left" else 40
    )


def test_what_leaves_the_last_layer_is_the_teacher_s_and_dropout_has_no_part_in_it():
    model, ids = tiny_student(), token_ids(2, 20)
    teacher = tiny_student(layer_types=["full_attention"] * 3)
    teacher.load_state_dict({name: x for name, x in model.state_dict().items() if ".mlstm." not in name})
    want = model(ids, teacher_forced=True)
    model.config.attention_dropout = 0.5
    found = model.train()(ids, teacher_forced=True)
    assert torch.equal(found.error, want.error) and model.training
    torch.testing.assert_close(
        teacher.lm_head(teacher.model.norm(found.hidden_states)), teacher(ids).logits, rtol=1e-9, atol=1e-9
    )


def test_the_extra_terms_are_what_they_are_called():
    student, teacher = (
        token_ids(2, 5 * 6).view(2, 5, 6).double().sin(),
        token_ids(2, 30, seed=1).view(2, 5, 6).double().cos(),
    )
    counted = torch.tensor([[True] * 5, [False, True, True, False, False]])
    student[1, 0], teacher[1, 3] = float("nan"), float("inf")  # rows that do not count may hold anything
    cosine, frobenius = output_terms(student, teacher, counted)
    pairs = [
        (s, t) for s, t, kept in zip(student.view(-1, 6), teacher.view(-1, 6), counted.flatten(), strict=True) if kept
    ]
    assert cosine.item() == pytest.approx(
        sum(1 - (s @ t / (s @ s * (t @ t)) ** 0.5).item() for s, t in pairs), rel=1e-12
    )
    assert frobenius.item() == pytest.approx(sum(((s - t) @ (s - t) / 6).item() ** 0.5 for s, t in pairs), rel=1e-12)
    same = teacher[:1].clone().requires_grad_(True)
    sum(output_terms(same, teacher[:1], counted[:1])).backward()
    assert torch.isfinite(same.grad).all() and same.grad.abs().max() < 1e-9  # nothing to learn, and no 0 / 0


def gradients(folder, rows, **settings):
    """Loss and gradients of the first step over `rows`; its learning rate is zero."""
    trainer, found = (
        trainer_of(tiny_student(gain=1.0), folder, Dataset.from_list(rows), max_steps=1, warmup_steps=1, **settings),
        {},
    )
    norm = trainer._get_grad_norm

    def watch(model, grad_norm=None):
        found.update({n: p.grad.clone() for n, p in new_parameters(model).items()})
        return norm(model, grad_norm=grad_norm)

    trainer._get_grad_norm = watch
    trainer.train()
    return {"loss": torch.tensor(trainer.state.log_history[0]["loss"]), **found}


TERMS = {"cosine_weight": 0.5, "frobenius_weight": 2.0}
LENGTHS = (24, 17, 9, 21)


def padded(side, width=LENGTH):
    for n, ids in zip(LENGTHS, token_ids(4, LENGTH).tolist(), strict=True):
        pad = [0] * (width - n)
        yield {
            "input_ids": pad + ids[:n] if side == "left" else ids[:n] + pad,
            "attention_mask": pad + [1] * n if side == "left" else [1] * n + pad,
        }


def test_padding_packing_and_accumulation_change_neither_loss_nor_gradients(tmp_path):
    """Four documents as rows padded on the right, on the left, by more than needed, in micro-batches, and all in one
    row.
    """
    documents = [ids[:n] for n, ids in zip(LENGTHS, token_ids(4, LENGTH).tolist(), strict=True)]
    packed = [{"input_ids": sum(documents, []), "position_ids": [t for ids in documents for t in range(len(ids))]}]
    ways = {
        "right": (list(padded("right")), {}),
        "left": (list(padded("left")), {}),
        "wider": (list(padded("right", 31)), {}),
        "packed": (packed, {}),
        "accumulated": (list(padded("right")), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    }
    runs = {name: gradients(tmp_path / name, rows, **TERMS, **settings) for name, (rows, settings) in ways.items()}
    assert len(runs["right"]) == 1 + 3 * 7 and all(g.abs().max() > 0 for g in runs["right"].values())
    for found in runs.values():
        torch.testing.assert_close(found, runs["right"], rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_mean_error_per_counted_token_and_its_relative_form_that_over_the_target_s(tmp_path):
    rows = list(padded("right"))
    out = tiny_student(gain=1.0)(**collate(rows), teacher_forced=True)
    found = gradients(tmp_path / "sum", rows)
    assert found["loss"].item() == pytest.approx(out.loss.item() / sum(LENGTHS), rel=1e-7)
    relative = gradients(tmp_path / "relative", rows, loss_form="relative")
    # the Trainer adds up in float32
    assert relative["loss"].item() == pytest.approx((out.error / out.target).sum().item(), rel=1e-7)
    for name, gradient in relative.items():
        if name != "loss":
            scale = out.target[int(name.split(".")[2])] / sum(LENGTHS)
            torch.testing.assert_close(gradient * scale, found[name], rtol=1e-9, atol=1e-12)


def test_the_teacher_has_no_dropout(tmp_path):
    """With it no two passes would agree; the student's own copy of the setting is not touched."""
    model = tiny_student(torch.float32, gain=1.0, attention_dropout=0.5)
    trainer = align(model, tmp_path, max_steps=1, per_device_train_batch_size=16)
    expected = measure_alignment(
        tiny_student(torch.float32, gain=1.0), [{k: v for k, v in collate(documents()).items() if k != "labels"}]
    )
    for n, error in expected.items():
        assert trainer.state.log_history[0][f"layer_{n}/relative_error"] == pytest.approx(error, rel=1e-4)
    assert model.config.attention_dropout == 0.5 and model.training


def test_there_is_one_copy_of_the_trunk_and_the_optimiser_holds_new_parameters_only(tmp_path):
    model = student()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    trainer = align(model, tmp_path, max_steps=1)
    assert trainer.model is model and {name: p.data_ptr() for name, p in model.named_parameters()} == places
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in new_parameters(model).values()}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new_parameters(model))


# --- early stop ------------------------------------------------------------------------------------------------


STOPPING = {
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "stop_window": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


def test_a_layer_that_stops_early_leaves_the_others_as_in_a_run_without_it(tmp_path):
    free, model = student(), student()
    align(free, tmp_path / "free", **(STOPPING | {"save_strategy": "no"}))
    at_stop = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                at_stop.update({n: p.clone() for n, p in new_parameters(model).items()})

    trainer = trainer_of(model, tmp_path / "run", **STOPPING, stop_error=0.0125)
    trainer.add_callback(Watch())
    trainer.train()
    assert set(trainer.stopped) == {2}
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    stopped = next(step for step, entry in logged.items() if entry["layers_stopped"])
    assert stopped == 6 and logged[9]["layer_2/relative_error"] == trainer.stopped[2] < 0.0125
    found, free = new_parameters(model), new_parameters(free)
    for name in found:
        if ".layers.2." in name:
            # not even decayed
            assert torch.equal(found[name], at_stop[name]) and not torch.equal(found[name], free[name])
        else:
            assert torch.equal(found[name], free[name]), name
    again = student()
    for step in (3, 7):  # before the layer stopped, inside a window, and after it
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
        resumed = trainer_of(again, tmp_path / "again", **STOPPING, stop_error=0.0125)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.stopped == trainer.stopped and resumed.guard.began == step
        assert all(torch.equal(p, found[name]) for name, p in new_parameters(again).items())
        shutil.rmtree(tmp_path / "again")
        again = student()


def test_a_layer_without_progress_stops_after_its_patience(tmp_path):
    settings = {
        "max_steps": 7,
        "stop_window": 1,
        "stop_patience": 2,
        "stop_gain": 0.5,
        "learning_rate": 1e-9,
        "lr_scheduler_kwargs": {"min_lr": 0.0},
    }
    trainer = align(student(), tmp_path, **settings)
    assert set(trainer.stopped) == {0, 1, 2}
    # then nothing is left to learn
    assert [entry["layers_stopped"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0, 3]


def test_the_relative_form_is_resumed_with_the_scales_it_began_with(tmp_path):
    settings = STOPPING | {"max_steps": 4, "loss_form": "relative", "warmup_steps": 1, **TERMS}
    model, again = student(), student()
    first = trainer_of(model, tmp_path / "run", **settings)
    first.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    second = trainer_of(again, tmp_path / "again", **settings)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(first.scales, second.scales)
    assert all(torch.equal(p, new_parameters(model)[name]) for name, p in new_parameters(again).items())


def test_evaluation_measures_the_layers_of_held_out_rows(tmp_path):
    model = student()
    trainer = trainer_of(model, tmp_path, max_steps=1)
    found = trainer.evaluate(documents(8))
    expected = measure_alignment(model, [{k: v for k, v in collate(documents(8)).items() if k != "labels"}])
    logged = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    for n, error in expected.items():
        assert logged[f"eval_layer_{n}/relative_error"] == pytest.approx(error, rel=1e-4)
    assert found["eval_loss"] > 0
