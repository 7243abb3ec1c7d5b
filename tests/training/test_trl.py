"""TRL's trainers take a student as they take any causal LM: it learns what it is asked to, packed documents stay apart,
and adapters train alone.
"""

import copy
import math

import pytest
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from xlstm_hybrid.model.adapters import lora_config

VOCAB = 61
LENGTHS = (17, 1, 9, 23, 2)  # the window is 7; one document predicts nothing
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 1,
}


def words(ids):
    return " ".join(f"w{n}" for n in ids)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture
def fresh():
    """A student that starts near the uniform distribution, in float32."""
    return tiny_student(torch.float32, gain=0.7)


def counting(rows=8, length=12):
    """Documents that a student can learn by heart: counting in steps, each with its own start."""
    return [[3 + (5 * row + 2 * t) % (VOCAB - 3) for t in range(length)] for row in range(rows)]


def sft(model, tokenizer, path, rows=None, peft_config=None, **arguments):
    rows = rows or {"input_ids": counting()}
    shared = COMMON | {
        "max_length": 32,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "lr_scheduler_type": "constant",
    }
    return SFTTrainer(
        model,
        SFTConfig(str(path), **shared | arguments),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def snapshot(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def moved(model, before):
    return {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}


def log_probs(model, ids):
    """Of each token but the first, [T - 1], by a forward of its own."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


# --- SFT ---------------------------------------------------------------------------------------------------------


def test_a_packed_padding_free_batch_has_the_loss_and_gradients_of_its_documents(tokenizer, tmp_path):
    student = tiny_student(torch.float32, gain=1.5)
    documents = [token_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
    trainer = sft(
        student,
        tokenizer,
        tmp_path,
        {"input_ids": documents},
        packing=True,
        max_length=64,
        gradient_checkpointing=False,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (
        batch["input_ids"].shape == (1, sum(LENGTHS))
        and "attention_mask" not in batch
        and (batch["position_ids"] == 0).sum() == len(LENGTHS)
    )
    items = sum(LENGTHS) - len(LENGTHS)
    loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(items))
    loss.backward()
    packed = {name: x.grad.clone() for name, x in student.named_parameters()}
    student.zero_grad()
    truth = tiny_student(torch.float64, gain=1.5)
    truth.load_state_dict(student.state_dict())
    vars(student).pop("forward")  # TRL's fused head: the documents go through the model's own
    for model in student, truth:
        model.eval()
        total = -sum(log_probs(model, ids).sum() for ids in documents if len(ids) > 1) / items
        total.backward()
        torch.testing.assert_close(loss.to(total.dtype), total, rtol=1e-5, atol=0)
        for name, x in model.named_parameters():
            scale = x.grad.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(
                packed[name].to(x.dtype),
                x.grad,
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize(
    "layout",
    [
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    ],
    ids=["packed", "padding-free", "padded", "split"],
)
def test_supervised_tuning_lowers_the_loss_in_every_layout(fresh, tokenizer, tmp_path, layout):
    trainer = sft(fresh, tokenizer, tmp_path, **layout)
    trainer.train()
    losses = logged(trainer, "loss")
    assert math.log(VOCAB) - 0.7 < losses[0] < math.log(VOCAB) + 1.5 and losses[-1] < 0.6 * losses[0]


def test_completion_only_tuning_scores_completions_only(fresh, tokenizer, tmp_path):
    rows = {
        "prompt": [words(ids[:6]) for ids in counting()],
        "completion": [" " + words(ids[6:]) for ids in counting()],
    }
    for packing in (False, True):
        trainer = sft(fresh, tokenizer, tmp_path, rows, packing=packing)
        batch = next(iter(trainer.get_train_dataloader()))
        scored = batch["labels"] != -100
        assert scored.sum() == 8 * (6 + 1)  # six words and the end of each
        assert set(batch["input_ids"][scored].tolist()) == {2, *(n for ids in counting() for n in ids[6:])}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("targets", ["projections", "all", "whole_mixer"])
def test_supervised_tuning_with_a_preset_trains_its_adapters_alone(fresh, tokenizer, tmp_path, targets):
    trainer = sft(
        fresh, tokenizer, tmp_path, peft_config=lora_config(fresh, targets, r=8), packing=True, learning_rate=3e-2
    )
    assert trainer.args.gradient_checkpointing  # TRL's default, beside parameters that peft swaps in during the forward
    before = snapshot(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert changed == {name for name in before if "lora_" in name or ".modules_to_save." in name}
    losses = logged(trainer, "loss")
    assert losses[-1] < (0.97 if targets == "whole_mixer" else 0.75) * losses[0]  # mixers alone cannot learn by heart


# --- preferences -------------------------------------------------------------------------------------------------


def preferences():
    rows = counting()
    return {
        "prompt": [words(ids[:5]) for ids in rows],
        "chosen": [" " + words(ids[5:]) for ids in rows],
        "rejected": [" " + words(reversed(ids[3:])) for ids in rows],
    }


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_preferences_are_learned_from_a_start_where_student_and_reference_agree(fresh, tokenizer, tmp_path, adapters):
    """With adapters the reference is the student without them."""
    arguments = DPOConfig(
        str(tmp_path), **COMMON, max_steps=8, per_device_train_batch_size=8, learning_rate=3e-2 if adapters else 5e-3
    )
    reference = {} if adapters else {"ref_model": copy.deepcopy(fresh)}
    trainer = DPOTrainer(
        fresh,
        args=arguments,
        train_dataset=Dataset.from_dict(preferences()),
        processing_class=tokenizer,
        **reference,
        peft_config=lora_config(fresh, "all", r=4) if adapters else None,
    )
    before = snapshot(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert (
        losses[-1] < 0.3
        and logged(trainer, "rewards/margins")[-1] > 1
        and logged(trainer, "rewards/accuracies")[-1] == 1
    )
    assert all("lora_" in name for name in moved(trainer.model, before)) == adapters


def test_a_trainer_loads_students_and_references_from_their_directories(fresh, tokenizer, tmp_path):
    fresh.save_pretrained(tmp_path / "student")
    assert "auto_map" not in (tmp_path / "student/config.json").read_text()
    trainer = sft(str(tmp_path / "student"), tokenizer, tmp_path / "run")
    assert torch.equal(trainer.model.lm_head.weight, fresh.lm_head.weight)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    arguments = DPOConfig(str(tmp_path / "run"), **COMMON)
    trainer = DPOTrainer(
        student, args=arguments, train_dataset=Dataset.from_dict(preferences()), processing_class=tokenizer
    )
    assert trainer.ref_model is not student and torch.equal(trainer.ref_model.lm_head.weight, fresh.lm_head.weight)


# --- rewards -----------------------------------------------------------------------------------------------------

WANTED = 7


def reward_of(completion_ids, **kwargs):
    return [ids.count(WANTED) / max(len(ids), 1) for ids in completion_ids]


def grpo(student, tokenizer, path, trainer=GRPOTrainer, config=GRPOConfig, peft_config=None, **arguments):
    prompts = [words(ids[: 3 + row]) for row, ids in enumerate(counting(4))]  # of different lengths: padded on the left
    shared = COMMON | {
        "max_steps": 8,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
    }
    return trainer(
        student,
        reward_of,
        config(str(path), **shared | {"beta": 0.0, "lr_scheduler_type": "constant"} | arguments),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_the_probabilities_that_a_policy_is_trained_on_are_those_of_each_row_alone(tokenizer, tmp_path):
    student = tiny_student(torch.float32, gain=1.5)
    trainer = grpo(
        student, tokenizer, tmp_path, num_generations=4, per_device_train_batch_size=16, max_completion_length=11
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    assert (mask[:, 0] == 0).any() and ids.shape[1] > 14  # padded on the left, and longer than the window
    got = trainer._get_per_token_logps_and_entropies(student, ids, mask, batch["completion_ids"].shape[1])[0]
    vars(student).pop("forward")
    with torch.no_grad():
        for row, real, done, found in zip(ids, mask.bool(), batch["completion_mask"].sum(1), got, strict=True):
            want = log_probs(student, row[real].tolist())[-done:]
            torch.testing.assert_close(found[:done], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_policy_gradients_raise_the_reward_of_what_the_student_samples(fresh, tokenizer, tmp_path, adapters):
    changes = {"peft_config": lora_config(fresh, "all", r=4), "learning_rate": 3e-2} if adapters else {}
    trainer = grpo(fresh, tokenizer, tmp_path, **changes)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.5


# --- other trainers ----------------------------------------------------------------------------------------------


def test_leave_one_out_raises_the_reward_too(fresh, tokenizer, tmp_path):
    trainer = grpo(fresh, tokenizer, tmp_path, RLOOTrainer, RLOOConfig)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.5


def test_single_answers_are_learned_as_wanted_or_not(fresh, tokenizer, tmp_path):
    rows = preferences()
    rows = {
        "prompt": rows["prompt"] * 2,
        "completion": rows["chosen"] + rows["rejected"],
        "label": [True] * 8 + [False] * 8,
    }
    arguments = KTOConfig(str(tmp_path), **COMMON, max_steps=8, per_device_train_batch_size=16, learning_rate=5e-3)
    trainer = KTOTrainer(
        fresh,
        ref_model=copy.deepcopy(fresh),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(0.5, abs=1e-4) and losses[-1] < 0.35 and margins[-1] > 1


def test_on_policy_distillation_draws_the_student_to_its_teacher(fresh, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": [words(ids[: 3 + row % 4]) for row, ids in enumerate(counting())]})
    arguments = DistillationConfig(
        str(tmp_path),
        **COMMON,
        max_steps=12,
        per_device_train_batch_size=8,
        max_completion_length=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    teacher = tiny_student(torch.float32, gain=1.2)
    before = snapshot(teacher)
    trainer = DistillationTrainer(fresh, teacher, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = logged(trainer, "loss")
    assert (
        max(losses) == pytest.approx(losses[1], rel=0.5)
        and losses[-1] < 0.5 * max(losses)
        and not moved(teacher, before)
    )
