"""Sparse distillation through the trainer: what is scored, what a batch split, padding or packing must not change, and
what is refused.
"""

import copy
import math
from itertools import islice

import pytest
import torch
from conftest import enlarge, tiny_student
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from xlstm_hybrid.errors import CheckpointError, ConfigError, DataError
from xlstm_hybrid.training.distillation import (
    SparseKDConfig,
    SparseKDTrainer,
    check_documents_stay_apart,
    document_dataset,
)
from xlstm_hybrid.training.lm_head import attach, check_head

close = torch.testing.assert_close
VOCAB = 61


def llama(seed=0, vocab=VOCAB, kind=LlamaForCausalLM, gain=1.5, **changes):
    """A one-layer Llama with weights large enough for every token of the context to show in the logits."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return enlarge(kind(config), seed=seed, gain=gain)


class ForgetsPositions(LlamaForCausalLM):
    """Reads a packed row as one document. Padded rows are fine, though transformers does not see from the name that its
    loss is shifted.
    """

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


def documents():
    """Four documents of 5 to 17 tokens, prompts not scored; the third has none and a hole in the middle. Nothing
    predicts a first token.
    """
    rows = []
    for j, (length, prompt) in enumerate(((9, 3), (17, 9), (12, 0), (5, 4))):
        ids = [(3 + 7 * j + t * (5 + j)) % (VOCAB - 3) + 3 for t in range(length)]
        rows.append((ids, [-100 if t < prompt or (j == 2 and 4 <= t < 7) else i for t, i in enumerate(ids)]))
    return rows


SCORED = 6 + 8 + 8 + 1


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(student=None, teacher=None, rows=None, data_collator=None, dataset=None, **arguments):
        shared = {
            "output_dir": str(tmp_path / "run"),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_length": 32,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "top_k": 40,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return SparseKDTrainer(
            student or llama(1),
            teacher or llama(2),
            SparseKDConfig(**shared | arguments),
            processing_class=tokenizer,
            train_dataset=dataset or document_dataset(rows or documents()),
            data_collator=data_collator,
        )

    return build


def loss_by_hand(student, teacher, rows, ce_weight=0.9, kl_weight=0.1):
    """The definition, document by document and token by token, with the dense KL in float64."""
    total, count = 0.0, 0
    for ids, labels in rows:
        with torch.no_grad():
            q, p = (log_softmax(m.eval()(torch.tensor([ids])).logits[0].double(), -1) for m in (student, teacher))
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total += (
                    -ce_weight * q[t - 1, labels[t]].item()
                    + kl_weight * (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
                )
                count += 1
    return total / count


def loss_of(trainer):
    """Loss of the trainer's first batches, together one step."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 99, trainer.args.device)
    assert items == sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    return sum(trainer.compute_loss(trainer.model, b, num_items_in_batch=items) for b in batches), items, batches


def full_distribution(trainer, batch, place):
    """[N, V] log-probabilities of the trainer's teacher, which keeps everything."""
    ids, logp, _ = trainer.teacher_targets(batch, place)
    return torch.zeros_like(logp).scatter(-1, ids, logp)


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# --- what is scored ----------------------------------------------------------------------------------------------


def pad_left(rows):
    width = max(len(row["input_ids"]) for row in rows)
    # 5 is a token like any other: only the mask says that it is none
    fills = {"input_ids": 5, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([[fill] * (width - len(row[name])) + row[name] for row in rows])
        for name, fill in fills.items()
    }


def test_the_loss_is_the_definition_whether_padded_packed_or_one_by_one(build):
    student, teacher, rows = llama(1), llama(2), documents()
    rows[2][1][0] = -100  # nothing predicts a first token; a collator of one's own has to say so
    wanted = loss_by_hand(student, teacher, rows)
    layouts = {
        "padded": {},
        "padded left": {"rows": rows, "data_collator": pad_left},
        "one by one": {"per_device_train_batch_size": 1},
        "packed": {"packing": True, "per_device_train_batch_size": 2},
        "packed, some split off": {"packing": True, "max_length": 17, "per_device_train_batch_size": 1},
    }
    shapes = {}
    for name, arguments in layouts.items():
        loss, items, batches = loss_of(build(student, teacher, top_k=VOCAB, **arguments))
        close(loss.item(), wanted, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert items == SCORED
        shapes[name] = sorted(tuple(b["input_ids"].shape) for b in batches)
        assert ("attention_mask" in batches[0]) != ("packed" in name)
    assert shapes["padded"] == [(4, 17)] and shapes["one by one"] == [(1, 5), (1, 9), (1, 12), (1, 17)]
    assert shapes["packed"] == [(1, 43)] and len(shapes["packed, some split off"]) > 1
    other = llama(1, kind=ForgetsPositions)
    close(loss_of(build(other, teacher, top_k=VOCAB))[0].item(), wanted, rtol=1e-5, atol=0)
    # a shift would show
    assert (
        abs(wanted - loss_by_hand(student, teacher, [(ids, [labels[-1], *labels[:-1]]) for ids, labels in rows])) > 0.1
    )


def test_a_hybrid_student_has_one_loss_padded_and_packed(build):
    student, teacher = tiny_student(torch.float32, gain=1.5), llama(2)
    wanted = loss_by_hand(student, teacher, documents())
    for arguments in {}, {"packing": True}:
        close(loss_of(build(student, teacher, top_k=VOCAB, **arguments))[0].item(), wanted, rtol=1e-4, atol=0)


def test_the_teacher_sees_each_packed_document_alone(build):
    teacher = llama(2)
    trainer = build(llama(1), teacher, packing=True, top_k=VOCAB)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 4 and (labels[0, starts] == -100).all()
    T = batch["input_ids"].shape[1]
    packed = full_distribution(trainer, batch, torch.arange(T))
    for a, b in zip(starts, [*starts[1:], T], strict=True):
        with torch.no_grad():
            alone = teacher(batch["input_ids"][:, a:b]).logits[0].log_softmax(-1)
        close(packed[a:b], alone, rtol=1e-4, atol=1e-5)


def test_a_first_token_scored_by_padding_is_refused(build):
    with pytest.raises(DataError, match="step 0 scores the first token of a document"):
        build(data_collator=pad_left).train()


def test_a_batch_that_scores_across_documents_is_refused(build):
    """A collator of the user's own, packing two documents, with a label on the first token of the second."""

    def collate(rows):
        ids, second = torch.tensor([rows[0]["input_ids"] * 2]), len(rows[0]["input_ids"])
        labels = ids.clone()
        labels[0, second] = ids[0, second] if collate.scored else -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(second).repeat(2)[None]}

    for collate.scored in (False, True):
        trainer = build(data_collator=collate, remove_unused_columns=False, per_device_train_batch_size=1)
        if collate.scored:
            with pytest.raises(DataError, match="step 0 scores the first token of a document"):
                trainer.train()
        else:
            trainer.train()


# --- batch splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [(1, 4), (2, 2), (3, 2)], ids=["4 x 1", "2 x 2", "3 + 1"])
def test_micro_batches_are_one_batch(build, split):
    """Micro-batches score 1 to 8 tokens each: a mean of their means would be another step."""
    size, accumulation = split
    initial = {name: p.detach().clone() for name, p in llama(1).named_parameters()}
    whole = trained(build())
    parts = trained(build(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation))
    close(parts, whole, rtol=1e-6, atol=1e-6)
    assert max((whole[name] - initial[name]).abs().max() for name in whole) > 1e-2


def test_packed_training_takes_the_same_step(build):
    close(
        trained(build(packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2)),
        trained(build()),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_micro_batch_without_scored_tokens_adds_nothing_and_a_step_without_any_is_refused(build):
    rows = documents()
    silent = [([5, 6, 7], [-100] * 3)]
    with pytest.warns(UserWarning, match="1 of 5 documents have no scored token"):
        assert len(document_dataset(rows + silent)) == 4
    dataset = document_dataset(rows).add_item({"input_ids": silent[0][0], "labels": silent[0][1]})
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 1}
    with_silent, without = (
        build(dataset=dataset, gradient_accumulation_steps=5, **prepared),
        build(gradient_accumulation_steps=4, **prepared),
    )
    close(trained(with_silent), trained(without), rtol=1e-6, atol=1e-6)
    for name in ("loss", "ce", "kl", "top1_agreement", "kept_mass"):
        close(with_silent.state.log_history[0][name], without.state.log_history[0][name], rtol=1e-5, atol=1e-6)
    trainer = build(dataset=dataset.select([4]), **prepared)
    with pytest.raises(DataError, match="step 0 has no scored token"):
        trainer.train()


def test_evaluation_gives_the_training_loss_of_the_same_batch(build):
    trainer = build()
    wanted = loss_of(trainer)[0].item()
    metrics = trainer.evaluate(document_dataset(documents()))
    close(metrics["eval_loss"], wanted, rtol=1e-6, atol=0)
    logged = trainer.state.log_history[-1]
    close(0.9 * logged["eval_ce"] + 0.1 * logged["eval_kl"], wanted, rtol=1e-5, atol=0)


# --- learning ----------------------------------------------------------------------------------------------------


def test_a_student_learns_and_the_teacher_stays_bitwise(build):
    student, teacher = llama(1), llama(2)
    before = copy.deepcopy(teacher.state_dict())
    trainer = build(
        student, teacher, max_steps=20, optim="adamw_torch", learning_rate=1e-2, ce_weight=0.1, kl_weight=0.9
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 20 and log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["kl"] < 0.5 * log[0]["kl"]
    for entry in log:
        close(0.1 * entry["ce"] + 0.9 * entry["kl"], entry["loss"], rtol=1e-3, atol=1e-4)
    after = teacher.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_teacher_put_back_into_training_mode_still_answers_without_dropout(build):
    teacher = llama(2, attention_dropout=0.5)
    trainer = build(teacher=teacher, top_k=VOCAB)
    batch = {"input_ids": torch.tensor([documents()[1][0]])}
    first = full_distribution(trainer, batch, torch.arange(17))
    teacher.train()
    close(full_distribution(trainer, batch, torch.arange(17)), first, rtol=0, atol=0)


def test_a_student_that_is_its_teacher_does_not_move(build):
    trainer = build(llama(1), llama(1), ce_weight=0.0, kl_weight=1.0)
    parameters = trained(trainer)
    log = trainer.state.log_history[0]
    assert abs(log["kl"]) < 1e-6 and log["top1_agreement"] == 1.0
    close(parameters, dict(llama(1).named_parameters()), rtol=0, atol=1e-6)


def test_metrics_are_those_of_the_scored_tokens_and_too_few_kept_ones_are_warned_about(build):
    student, teacher, rows = llama(1), llama(2), documents()
    trainer = build(student, teacher, rows=rows[1:2], top_k=8)
    with pytest.warns(UserWarning, match="top_k=8 keeps less than 90% of the teacher's probability"):
        trainer.train()
    log, (ids, labels) = trainer.state.log_history[0], rows[1]
    q, p = (log_softmax(m.eval()(torch.tensor([ids])).logits[0, :-1].double(), -1) for m in (llama(1), teacher))
    scored = torch.tensor(labels[1:]) != -100
    top = p.topk(8, -1)
    rest_p, rest_q = (1 - x.gather(-1, top.indices).exp().sum(-1) for x in (p, q))
    kl = (top.values.exp() * (top.values - q.gather(-1, top.indices))).sum(-1) + rest_p * (rest_p / rest_q).log()
    wanted = {
        "ce": -q.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0],
        "kl": kl,
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double(),
        "kept_mass": top.values.exp().sum(-1),
    }
    close(
        {name: log[name] for name in wanted},
        {name: x[scored].mean().item() for name, x in wanted.items()},
        rtol=1e-4,
        atol=1e-6,
    )


def test_bf16_autocast_gives_nearly_the_float32_loss_and_zero_for_equal_models(build):
    precise, coarse = build(llama(1), llama(2)), build(llama(1), llama(2), bf16=True)
    coarse.train()
    log = coarse.state.log_history[0]
    close(log["loss"], loss_of(precise)[0].item(), rtol=0.03, atol=0)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in coarse.model.parameters())
    same = build(llama(1), llama(1), bf16=True)
    same.train()
    assert abs(same.state.log_history[0]["kl"]) < 1e-6


def test_window_dropout_falls_on_a_line_over_the_run_and_hides_rows_of_every_step(build, monkeypatch):
    student, seen = tiny_student(torch.float32, num_hidden_layers=1, gain=1.0), []
    draw = student.model.blind_rows
    monkeypatch.setattr(
        student.model,
        "blind_rows",
        lambda real: seen.append((student.model.window_dropout, rows := draw(real))) or rows,
    )
    build(student=student, max_steps=3, window_dropout=0.9, window_dropout_end=0.1).train()
    seen = [(p, rows) for p, rows in seen if rows is not None]  # the trainer also probes the model, in evaluation
    assert [p for p, _ in seen] == pytest.approx([0.9, 0.5, 0.1]) and all(len(rows) == 4 for _, rows in seen)
    assert student.model.window_dropout is None and student.config.window_dropout == 0


# --- refusals ----------------------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_stop_the_run_when_they_stay(build):
    def collate(rows):
        collate.calls += 1
        if collate.calls == 4:  # the first call is made by the constructor
            student.lm_head.weight.data[5] = math.nan
        return original(rows)

    student = llama(1)
    original, collate.calls = build(student).data_collator, 0
    trainer = build(student, data_collator=collate, max_steps=9, max_skipped_steps=2)
    with pytest.raises(DataError, match="as in the 2 steps up to it; their batches are in non_finite/"):
        trainer.train()
    # the third step is the first that is not finite; the fourth ends the run
    assert trainer.state.global_step == 3 and trainer.guard.skipped == 2


@pytest.mark.parametrize("guilty", ["student", "teacher"])
def test_a_model_that_lets_packed_documents_see_each_other_is_refused(build, guilty):
    models_ = {"student": llama(1), "teacher": llama(2)}
    models_[guilty] = llama(3, kind=ForgetsPositions)
    with pytest.raises(ConfigError, match=rf"the {guilty} \(ForgetsPositions\) lets packed documents see each other"):
        build(**models_, packing=True)
    build(**models_)  # padded rows need no such care
    student = llama(1).train()
    build(student, packing=True)
    assert student.training


@pytest.mark.parametrize(
    "teacher, message",
    [
        (lambda student: llama(2, vocab=64), "student's vocabulary has 61 tokens, the teacher's 64"),
        (lambda student: student, "share the weight 'model.embed_tokens.weight'"),
        (lambda student: "org/teacher", "teacher: expected a model in memory, got str"),
        (lambda student: SparseKDConfig("x", use_cpu=True), "teacher: expected a model in memory, got SparseKDConfig"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(build, teacher, message):
    student = llama(1)
    with pytest.raises(ConfigError, match=message):
        build(student, teacher(student))


def test_a_teacher_that_shares_one_weight_is_refused(build):
    student, teacher = llama(1), llama(2)
    teacher.lm_head.weight = student.lm_head.weight
    with pytest.raises(ConfigError, match="share the weight 'lm_head.weight'"):
        build(student, teacher)


@pytest.mark.parametrize(
    "bad",
    [
        {"ce_weight": -0.1},
        {"kl_weight": -1.0},
        {"ce_weight": 0.0, "kl_weight": 0.0},
        {"ce_weight": math.nan},
        {"kl_weight": math.inf},
        {"top_k": 0},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"packing": True, "packing_strategy": "wrapped"},
        {"eval_packing": True},
        {"push_to_hub": True},
    ],
    ids=str,
)
def test_a_config_that_means_nothing_is_refused(bad, tmp_path):
    name = list(bad)[-1]
    with pytest.raises(ConfigError, match=name):
        SparseKDConfig(str(tmp_path), use_cpu=True, bf16=False, **bad)


def test_arguments_of_another_trainer_are_refused(tmp_path, tokenizer):
    ours = SparseKDConfig(str(tmp_path), use_cpu=True)
    for args, more in (None, {}), (SFTConfig(str(tmp_path), use_cpu=True), {}), (ours, {"compute_loss_func": max}):
        with pytest.raises(ConfigError, match="expected a SparseKDConfig, and no compute_loss_func"):
            SparseKDTrainer(
                llama(1),
                llama(2),
                args,
                train_dataset=document_dataset(documents()),
                processing_class=tokenizer,
                **more,
            )


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "none of 0 documents"),
        ([([5, 6], [-100, -100]), ([7], [7])], "none of 2 documents has a scored token"),
        ([([5, 6], [5, 6]), ([5, 6, 7], [6, 7])], "document 1: 3 input_ids and 2 labels"),
        ([([5, 6, 7], [6, 7, -100])], "document 0, token 0: label 6 is neither -100 nor 5"),
        ([([5, 6, 7, 8, 9], [5, 6, 7, 8, 9])], "document 0 has 5 tokens, max_length is 4"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        document_dataset(rows, max_length=4)


# --- what is left behind -----------------------------------------------------------------------------------------


def test_rows_whose_answers_max_length_cuts_off_are_counted_and_none_left_is_an_error(build):
    """Of the documents the scored tokens begin at 3, 9, 0 and 4."""
    with pytest.warns(UserWarning, match="2 of 4 rows have no scored token within max_length=4: raise it"):
        assert len(build(max_length=4).train_dataset) == 2
    with pytest.raises(DataError, match="none of the 2 rows has a scored token within max_length=4: raise it"):
        build(rows=[documents()[1], documents()[3]], max_length=4)
    with pytest.raises(DataError, match="none of the rows has a scored token within max_length=4"):
        build(dataset=document_dataset([documents()[1]]).to_iterable_dataset(), max_length=4)


def test_a_checkpoint_holds_no_pickled_arguments_and_no_card_and_resumes_to_the_same_weights(build, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "hub_token": "secret"}
    whole = trained(build(**saving))
    names = {p.name for p in (tmp_path / "run").rglob("*")}
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "optimizer.safetensors"} <= names
    assert not {"training_args.bin", "README.md"} & names and not any(
        name.endswith((".pt", ".pth", ".bin")) for name in names
    )
    assert not any(b"secret" in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    resumed = build(**saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    close(dict(resumed.model.named_parameters()), whole, rtol=0, atol=0)


def test_nothing_is_sent(build, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    calls = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: calls.append(kwargs))
    build()
    assert calls == []


def test_the_student_keeps_its_own_forward_and_its_copies_are_independent(build):
    """TRL's fused head, left in place, would make a copy of the student answer with the weights of the original."""
    student, ids = llama(1), torch.tensor([documents()[0][0]])
    trainer = build(student)
    twin = copy.deepcopy(student).eval()
    before = twin(ids).logits
    trainer.train()
    close(twin(ids).logits, before, rtol=0, atol=0)
    assert (student.eval()(ids).logits - before).abs().max() > 1e-2

    student, calls = llama(1), []
    original = student.forward
    student.forward = lambda *args, **kwargs: (calls.append(kwargs), original(*args, **kwargs))[1]
    build(build(student).model)
    calls.clear()
    student(ids)
    assert len(calls) == 1  # a forward of the caller's own stays


def test_streamed_rows_are_accepted(build):
    trainer = build(dataset=document_dataset(documents()).to_iterable_dataset())
    close(trained(trainer), trained(build()), rtol=1e-6, atol=1e-6)
    assert len(list(islice(trainer.train_dataset, 9))) == 4


# --- PEFT --------------------------------------------------------------------------------------------------------


def adapted(model, config):
    torch.manual_seed(5)
    return get_peft_model(model, copy.deepcopy(config))


VIRTUAL = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.mark.parametrize(
    "student", [llama, lambda seed: tiny_student(torch.float32, gain=1.0)], ids=["llama", "hybrid"]
)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_leave_the_loss_at_its_tokens(kind, student, build):
    """Of rows of other lengths, beside the definition, document by document."""
    model, teacher = adapted(student(1), VIRTUAL[kind]), llama(2)
    trainer = build(model, teacher, learning_rate=1.0)
    total = count = 0
    for ids, labels in documents():
        with torch.no_grad():
            row, length = torch.tensor([ids]), len(ids)
            mine = model.eval()(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -length:].double()
            q, p = log_softmax(mine, -1), log_softmax(teacher.eval()(row).logits[0].double(), -1)
        for t in range(1, length):
            if labels[t] != -100:
                kept = p[t - 1].topk(40).indices
                rest = [(1 - x[t - 1, kept].exp().sum()).log() for x in (p, q)]
                kl = (p[t - 1, kept].exp() * (p - q)[t - 1, kept]).sum() + rest[0].exp() * (rest[0] - rest[1])
                total, count = total - 0.9 * q[t - 1, labels[t]] + 0.1 * kl, count + 1
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved and all("prompt" in name for name in moved)


def test_virtual_tokens_are_refused_where_they_would_stand_at_the_wrong_place(build):
    config = VIRTUAL["prompt tuning"]
    with pytest.raises(ConfigError, match="packed documents with a PEFT model that puts virtual tokens in front"):
        build(adapted(llama(1), config), packing=True, packing_strategy="bfd")
    with pytest.raises(
        ConfigError, match="a PeftModelForCausalLM with PROMPT_TUNING.*pass a model without virtual tokens"
    ):
        build(llama(1), adapted(llama(2), config))


@pytest.mark.parametrize("outcomes", ["tail", "dense"])
def test_a_teacher_with_an_adapter_teaches_what_it_says_with_it(outcomes, build):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    teacher = adapted(llama(2), lora)
    merged = copy.deepcopy(teacher).merge_and_unload()
    losses = []
    for network in (teacher, merged, llama(2)):
        trainer = build(llama(1), network, outcomes=outcomes, ce_weight=0.0, kl_weight=1.0, learning_rate=0.0)
        trainer.train()
        losses.append(trainer.state.log_history[0]["kl"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[2]) > 0.05
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("check", ["head", "documents"])
@pytest.mark.parametrize("fault", ["weight", "range"])
def test_a_teacher_that_is_not_finite_is_refused_with_its_cause(check, fault):
    """Not with what a comparison of NaNs would say: another head, or documents that see each other."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with torch.no_grad():
        if fault == "weight":
            model.model.layers[0].mlp.up_proj.weight[3, 2] = torch.nan
        else:
            model.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    cause = "its model.layers.0.mlp.up_proj.weight holds NaN or infinity: take an intact checkpoint"
    if fault == "range":
        cause = "its weights are finite, but float32 is too narrow for what it calculates: use a wider dtype"
    with pytest.raises(
        CheckpointError, match=rf"the teacher \(LlamaForCausalLM\) gives logits that are not finite; {cause}"
    ):
        if check == "head":
            attach(model)
            check_head(model, "teacher")
        else:
            check_documents_stay_apart(model, "teacher", ["input_ids", "position_ids"])
