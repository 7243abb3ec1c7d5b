"""Delta-distillation: the schedule against numbers by hand, its third term, and a trainer that follows it."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import enlarge
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_hybrid.distil_xlstm.schedules import (
    DeltaCallback,
    DeltaSchedule,
    Weights,
    delta_schedule,
    fall,
    frobenius,
    mean_hidden,
    set_objective,
    steps_per_epoch,
)
from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.training.lm_head import Objective, Selection

NAN = float("nan")
close = torch.testing.assert_close
VOCAB = 61


def waves(*shape, step):
    return torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64) * step).view(shape)


def gradient(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


# --- the schedule ------------------------------------------------------------------------------------------------


def test_the_first_steps_by_hand():
    """alpha from .8 to .5 and T from 2 to 1, over 1 + ln(1 + k)."""
    schedule = DeltaSchedule()
    close(delta_schedule(schedule, 0), Weights(0.1, 0.8, 2.0, 0.1))
    for k, divisor in ((1, 1.6931471805599453), (9, 3.302585092994046), (999, 7.907755278982137)):
        alpha, temperature = 0.5 + 0.3 / divisor, 1 + 1 / divisor
        close(delta_schedule(schedule, k), Weights(0.9 - alpha, alpha, temperature, 0.1))
    close(delta_schedule(schedule, 0, epoch=3), Weights(0.25, 0.65, 1.85, 0.1))  # each epoch begins .05 lower
    close(delta_schedule(schedule, 0, epoch=9), Weights(0.4, 0.5, 1.55, 0.1))  # and not below the end
    close(delta_schedule(schedule, 7, epoch=40), Weights(0.4, 0.5, 1.0, 0.1))


def test_weights_fall_within_an_epoch_and_add_up_to_one():
    schedule = DeltaSchedule(
        alpha_start=0.9, alpha_end=0.2, temperature_start=5, temperature_end=2, frobenius_weight=0.05, delta=0.1
    )
    for epoch in (0, 2):
        rows = [delta_schedule(schedule, k, epoch) for k in range(50)]
        for row, after in zip(rows, rows[1:], strict=False):
            assert (
                after.kl_weight < row.kl_weight
                and after.temperature < row.temperature
                and after.ce_weight > row.ce_weight
            )
        assert all(math.isclose(row.ce_weight + row.kl_weight + row.frobenius_weight, 1) for row in rows)
        assert all(row.kl_weight >= 0.2 and row.temperature >= 2 for row in rows)
    assert fall(3.0, 3.0, 17) == 3 and fall(2.0, 1.0, 10**12) > 1


def test_schedules_out_of_range_are_refused():
    bad = {
        "alpha_start=0.4, alpha_end=0.5": {"alpha_start": 0.4},
        "alpha_start=1.2": {"alpha_start": 1.2, "frobenius_weight": 0},
        "temperature_start=1.0, temp": {"temperature_start": 1.0, "temperature_end": 2.0},
        "temperature_end=0": {"temperature_end": 0.0},
        "delta=-1": {"delta": -1},
        "frobenius_weight=nan": {"frobenius_weight": NAN},
        "add up to more than 1": {"alpha_start": 0.95},
    }
    for message, values in bad.items():
        with pytest.raises(ConfigError, match=message):
            DeltaSchedule(**values)
    with pytest.raises(ConfigError, match="step=-1, epoch=0"):
        delta_schedule(DeltaSchedule(), -1)


def test_the_callback_counts_steps_from_the_global_one_also_after_a_resume():
    """7 batches, accumulation 2: 4 steps per epoch. What is set depends on the global step alone."""
    seen, schedule = [], DeltaSchedule()
    callback = DeltaCallback(schedule, seen.append)
    args = SimpleNamespace(gradient_accumulation_steps=2)
    for step in (0, 3, 4, 9):
        callback.on_step_begin(args, SimpleNamespace(global_step=step, max_steps=99), None, train_dataloader=range(7))
    assert seen == [delta_schedule(schedule, *where) for where in ((0, 0), (3, 0), (0, 1), (1, 2))]
    assert steps_per_epoch(iter(()), 2, 99) == 99  # a stream is one epoch


def test_any_objective_and_its_online_targets_follow_the_weights():
    trainer = SimpleNamespace(objective=Objective(0.9, 0.1), select=Selection("topk", 16, 1.0), store=None)
    set_objective(trainer, Weights(0.3, 0.6, 1.7, 0.1))
    assert trainer.objective == Objective(0.3, 0.6, temperature=1.7) and trainer.select == Selection("topk", 16, 1.7)
    trainer.store = object()
    with pytest.raises(ConfigError, match="stored at one temperature"):
        set_objective(trainer, Weights(0.3, 0.6, 1.7, 0.1))


# --- the third term ----------------------------------------------------------------------------------------------


def test_the_frobenius_term_is_masked_and_flat_at_zero():
    a, b, mask = waves(2, 5, 3, step=0.4), waves(2, 5, 3, step=1.3), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False
    kept = torch.stack([(a - b)[j, t] for j, t in mask.nonzero().tolist()])
    close(frobenius(a, b, mask), torch.linalg.matrix_norm(kept) / kept.numel() ** 0.5)
    poisoned = a.clone()
    poisoned[~mask] = NAN
    close(frobenius(poisoned, b, mask), frobenius(a, b, mask))
    grad = gradient(lambda x: frobenius(x, b, mask), poisoned)
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and (grad[mask] != 0).all()
    assert torch.autograd.gradcheck(lambda x: frobenius(x, b, mask), a.clone().requires_grad_())
    for same, counted in ((b, mask), (a, torch.zeros_like(mask))):
        assert frobenius(same, b, counted) == 0 and (gradient(lambda x, m=counted: frobenius(x, b, m), same) == 0).all()
    with pytest.raises(DataError, match="teacher_hidden: expected shape"):
        frobenius(a, b[..., :-1], mask)


def test_the_mean_of_hidden_states_leaves_the_embedding_out():
    layers = [waves(1, 2, 3, step=s) for s in (0.1, 0.2, 0.3, 0.4)]
    close(mean_hidden(layers), (layers[1] + layers[2] + layers[3]) / 3)
    with pytest.raises(DataError, match="1 tensors"):
        mean_hidden(layers[:1])


# --- the trainer -------------------------------------------------------------------------------------------------


def llama(seed=0, layers=1, hidden=32, vocab=VOCAB):
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return enlarge(LlamaForCausalLM(config), seed=seed, gain=1.5)


def rows():
    """Four documents of 5 to 17 tokens with prompts that are not scored."""
    found = []
    for j, (length, prompt) in enumerate(((9, 3), (17, 9), (12, 1), (5, 4))):
        ids = [(3 + 7 * j + t * (5 + j)) % (VOCAB - 3) + 3 for t in range(length)]
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(found)


@pytest.fixture
def build(tmp_path):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )

    def build(student=None, teacher=None, **arguments):
        shared = {
            "output_dir": str(tmp_path / "run"),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        }
        return DeltaKDTrainer(
            student or llama(1),
            teacher or llama(2, layers=3),
            DeltaKDConfig(**shared | arguments),
            processing_class=tokenizer,
            train_dataset=rows(),
        )

    return build


def loss_by_hand(student, teacher, w, documents):
    """All scored tokens as one batch, in float64; the Frobenius term is that of the batch."""
    ce = kl = square = count = 0
    for row in documents:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            s, t = (m(ids, output_hidden_states=True) for m in (student, teacher))
        distance = torch.stack(t.hidden_states[1:]).double().mean(0) - s.hidden_states[-1].double()
        q, q_soft, p_soft = (
            log_softmax(x[0].double() / T, -1)
            for x, T in ((s.logits, 1), (s.logits, w.temperature), (t.logits, w.temperature))
        )
        for j in range(1, len(row["labels"])):
            if row["labels"][j] != -100:
                ce -= q[j - 1, row["labels"][j]].item()
                kl += (p_soft[j - 1].exp() * (p_soft[j - 1] - q_soft[j - 1])).sum().item()
                square += distance[0, j - 1].square().sum().item()
                count += 1
    width = student.config.hidden_size
    return (w.ce_weight * ce + w.kl_weight * w.temperature**2 * kl) / count + w.frobenius_weight * (
        square / (count * width)
    ) ** 0.5


def test_the_loss_of_each_step_is_the_definition_with_that_steps_weights(build):
    """One epoch of one step each: .05 less at the start of each. The optimiser stands still, so the same loss can be
    calculated outside.
    """
    student, teacher = llama(1), llama(2, layers=3)
    trainer = build(student, teacher, max_steps=3, learning_rate=0.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for epoch, entry in enumerate(logs):
        weights = delta_schedule(DeltaSchedule(), 0, epoch)
        close(entry["loss"], loss_by_hand(student, teacher, weights, rows()), rtol=1e-5, atol=0)
        assert (entry["alpha"], entry["temperature"]) == (weights.kl_weight, weights.temperature)
    assert len({entry["loss"] for entry in logs}) == 3


def test_a_step_in_parts_has_the_mean_of_their_terms_by_tokens(build):
    student, teacher = llama(1), llama(2, layers=3)
    trainer = build(student, teacher, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 99, trainer.args.device)
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches)
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows()]
    parts = [
        loss_by_hand(student, teacher, delta_schedule(DeltaSchedule(), 0), [row]) * n
        for row, n in zip(rows(), counts, strict=True)
    ]
    close(loss.item(), sum(parts) / sum(counts), rtol=1e-5, atol=0)


def test_micro_batches_have_the_gradient_of_the_batch_but_for_the_root(build):
    for weight, same in ((0.0, True), (0.1, False)):
        whole, split = (
            build(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, frobenius_weight=weight)
            for size in (4, 1)
        )
        whole.train()
        split.train()
        a, b = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (whole, split))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) == same
        close(a, b, rtol=0.05, atol=0.05)


def test_the_student_learns_all_three_terms_and_the_teacher_stays(build):
    teacher = llama(2, layers=3)
    before = copy.deepcopy(teacher.state_dict())
    last = {}
    # the teacher's residual stream is far from a normalised state: what counts is that the term pulls
    for weight in (0.0, 0.2):
        trainer = build(
            llama(1), teacher, max_steps=15, optim="adamw_torch", learning_rate=5e-3, frobenius_weight=weight
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logs[-1]["ce"] < 0.5 * logs[0]["ce"] and logs[-1]["kl"] < 0.8 * logs[0]["kl"]
        last[weight] = logs[-1]["frobenius"]
    assert last[0.2] < 0.99 * last[0.0]
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items()) and not teacher.training


def test_what_cannot_be_compared_is_refused(build):
    teacher = llama(2, layers=3)
    with pytest.raises(ConfigError, match="hidden size is 16, the teacher's 32"):
        build(llama(1, hidden=16))
    with pytest.raises(ConfigError, match="vocabulary has 61 tokens, the teacher's 70"):
        build(teacher=llama(2, vocab=70))
    with pytest.raises(ConfigError, match="share the weight"):
        student = llama(1)
        student.model.embed_tokens = teacher.model.embed_tokens
        build(student, teacher)
    for name, value in {"packing": True, "alpha_start": 0.3, "loss_type": "dft"}.items():
        with pytest.raises(ConfigError, match=name):
            build(**{name: value})


def test_a_callback_drives_an_objective_of_another_trainer(build):
    """The schedule hangs on a trainer that has an objective of its own, here with the Frobenius term taken away."""
    trainer = build(max_steps=2)
    trainer.remove_callback(DeltaCallback)
    schedule = DeltaSchedule(alpha_start=0.4, alpha_end=0.2, temperature_start=3.0, frobenius_weight=0.0)
    trainer.add_callback(DeltaCallback(schedule, partial(set_objective, trainer)))
    trainer.train()
    assert [entry["alpha"] for entry in trainer.state.log_history if "alpha" in entry] == [
        delta_schedule(schedule, 0, e).kl_weight for e in (0, 1)
    ]
