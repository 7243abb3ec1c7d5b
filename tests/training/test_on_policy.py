"""On-policy distillation: who writes, what is scored, what a resumed run draws, and what is refused."""

from pathlib import Path

import pytest
import torch
from conftest import enlarge, tiny_student
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_hybrid.errors import CheckpointError, ConfigError, DataError
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

close = torch.testing.assert_close
VOCAB, EOS = 61, 2


def llama(seed=0, vocab=VOCAB, gain=1.5, **changes):
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
        eos_token_id=EOS,
        **changes,
    )
    return enlarge(LlamaForCausalLM(config), seed=seed, gain=gain)


def hybrid(gain=1.0, **changes):
    return tiny_student(torch.float32, gain=gain, num_hidden_layers=2, **changes)


def with_eos(model, bias):
    """The model with a head that has a bias: EOS comes first, or never."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[EOS] = bias
    model.lm_head = head
    return model


def word_tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def words(*ids):
    return " ".join(f"w{n}" for n in ids)


PROMPTS = [
    words(*((3 + 7 * j + t * (5 + j)) % (VOCAB - 3) + 3 for t in range(length)))
    for j, length in enumerate((2, 9, 1, 12, 5, 4, 7, 3))
]
COMPLETIONS = [words(*range(5 + j, 8 + 2 * j)) for j in range(8)]


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(
        student=None,
        teacher=None,
        dataset=None,
        where="run",
        teacher_tokenizer=None,
        tokenizer=tokenizer,
        eval_dataset=None,
        **arguments,
    ):
        shared = {
            "output_dir": str(tmp_path / where),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
            "num_completions_to_print": 0,
            "log_completions": False,
        }
        dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS}) if dataset is None else dataset
        return OnPolicyKDTrainer(
            student or hybrid(),
            teacher or llama(2),
            OnPolicyKDConfig(**shared | arguments),
            processing_class=tokenizer,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            teacher_tokenizer=teacher_tokenizer,
        )

    return build


def micro_batches(trainer):
    """The batches of the trainer's next step, one per micro-batch, as `compute_loss` gets them."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    batches = []
    for step in range(trainer.args.gradient_accumulation_steps):
        trainer._step = step
        batches.append(trainer._prepare_inputs(rows))
    trainer._step = 0
    return batches


def rows_of(batch):
    """`(prompt, completion, own)` of each row, without padding."""
    for ids, labels, mask, own in zip(
        *(batch[name] for name in ("input_ids", "labels", "attention_mask", "own")), strict=True
    ):
        real, scored = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
        assert real[len(real) - len(scored) :] == scored and mask.sum() == len(real)
        yield real[: len(real) - len(scored)], scored, bool(own)


def loss_by_hand(student, teacher, batches, divergence, ce_weight=0.0, size=VOCAB):
    """The definition, row by row and token by token, in float64."""
    total, count = 0.0, 0
    for prompt, completion, own in (row for batch in batches for row in rows_of(batch)):
        with torch.no_grad():
            q, p = (
                log_softmax(m(torch.tensor([prompt + completion])).logits[0, :, :size].double(), -1)
                for m in (student, teacher)
            )
        for t, token in enumerate(completion, len(prompt)):
            total += divergence(q[t - 1], p[t - 1]).item() - (0.0 if own else ce_weight * q[t - 1, token].item())
            count += 1
    return total / count


def samples_of(trainer):
    """What the trainer's student writes, step by step, from its tables."""
    import pandas as pd

    tables = [pd.read_parquet(path) for path in sorted(Path(trainer.args.output_dir, "completions").glob("*.parquet"))]
    return {int(table["step"][0]): list(zip(table["prompt"], table["completion"], strict=True)) for table in tables}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# --- what is scored ----------------------------------------------------------------------------------------------


DIVERGENCE = {
    "forward_kl": lambda q, p: (p.exp() * (p - q)).sum(),
    "reverse_kl": lambda q, p: (q.exp() * (q - p)).sum(),
    "jsd": lambda q, p: sum((x.exp() * (x - ((p.exp() + q.exp()) / 2).log())).sum() for x in (p, q)) / 2,
    "csd": lambda q, p: (q / 1.5).softmax(-1) @ ((q - p) - (q / 1.5).softmax(-1) @ (q - p)) ** 2 / 2,
}


def read(trainer):
    """{metric: values} of training since the last log."""
    trainer.readings.read("train", trainer._metrics["train"])
    return trainer._metrics["train"]


@pytest.mark.parametrize("divergence", DIVERGENCE)
def test_the_loss_is_the_definition_however_a_step_is_split(build, divergence):
    student, teacher = hybrid(), llama(2)
    for split in (1, 2, 4):
        trainer = build(
            student,
            teacher,
            divergence=divergence,
            csd_weights="ss",
            num_generations=2,
            per_device_train_batch_size=8 // split,
            gradient_accumulation_steps=split,
        )
        batches = micro_batches(trainer)
        assert len(batches) == split and len({len(prompt) for batch in batches for prompt, _, _ in rows_of(batch)}) > 1
        loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches)
        close(loss.item(), loss_by_hand(student, teacher, batches, DIVERGENCE[divergence]), rtol=1e-5, atol=0)
        assert batches[0]["num_items_in_batch"] == sum((batch["labels"] != -100).sum() for batch in batches)


def test_cross_entropy_is_of_the_data_and_never_of_the_students_own_words(build):
    student, teacher = hybrid(), llama(2)
    trainer = build(student, teacher, lmbda=0.5, ce_weight=0.7, per_device_train_batch_size=8, seed=1)
    (batch,) = micro_batches(trainer)
    rows = list(rows_of(batch))
    assert {own for _, _, own in rows} == {True, False}
    data = {
        tuple(trainer.processing_class(p)["input_ids"]): [*trainer.processing_class(c)["input_ids"], EOS]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    }
    for prompt, completion, own in rows:
        assert own or completion == data[tuple(prompt)][:6]
    loss = trainer.compute_loss(trainer.model, batch).item()
    close(loss, loss_by_hand(student, teacher, [batch], DIVERGENCE["reverse_kl"], ce_weight=0.7), rtol=1e-5, atol=0)
    assert abs(loss - loss_by_hand(student, teacher, [batch], DIVERGENCE["reverse_kl"])) > 0.1
    logged = read(trainer)
    assert logged["ce"] and "nll" not in logged


def test_a_student_that_is_its_teacher_has_no_loss_and_all_agreement(build):
    trainer = build(llama(1), llama(1))
    (batch,) = micro_batches(trainer)
    close(trainer.compute_loss(trainer.model, batch).item(), 0.0, rtol=0, atol=1e-6)
    assert read(trainer)["top1_agreement"] == [1.0]


def test_completions_that_end_at_once_are_scored_counted_and_warned_of(build):
    student, teacher = with_eos(hybrid(), 50.0), llama(2)
    trainer = build(student, teacher)
    with pytest.warns(UserWarning, match="100% of the student's completions end with their first token"):
        (batch,) = micro_batches(trainer)
    assert [completion for _, completion, _ in rows_of(batch)] == [[EOS]] * 4
    loss = trainer.compute_loss(trainer.model, batch)
    close(loss.item(), loss_by_hand(student, teacher, [batch], DIVERGENCE["reverse_kl"]), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert trainer._metrics["train"]["completions/empty_ratio"] == [1.0] and trainer._metrics["train"][
        "completions/clipped_ratio"
    ] == [0.0]


@pytest.mark.filterwarnings("ignore:100% of the student")
def test_training_stops_when_nothing_but_empty_completions_comes(build):
    with pytest.raises(DataError, match="for 10 steps more than 90% of the student's completions were empty"):
        build(with_eos(hybrid(), 50.0), with_eos(llama(2), 50.0), max_steps=20, learning_rate=1e-9).train()


def test_an_empty_completion_of_the_data_is_an_end(build):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:4], "completion": ["", words(5), words(*range(3, 20)), words(4)]})
    (batch,) = micro_batches(build(dataset=dataset, lmbda=0.0))
    assert sorted(completion for _, completion, _ in rows_of(batch)) == [[EOS], [3, 4, 5, 6, 7, 8], [4, EOS], [5, EOS]]


def test_messages_are_prompts_too(build, tokenizer):
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    chat.chat_template = (
        "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }}{{ ' </s> w5 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
    )
    rows = {
        "prompt": [[{"role": "user", "content": words(9, 10)}]] * 4,
        "completion": [[{"role": "assistant", "content": words(20 + j)}] for j in range(4)],
    }
    for lmbda in (0.0, 1.0):
        (batch,) = micro_batches(build(dataset=Dataset.from_dict(rows), tokenizer=chat, lmbda=lmbda))
        prompts, completions = zip(*[row[:2] for row in rows_of(batch)], strict=True)
        assert list(prompts) == [[3, 9, 10, 2, 5, 4]] * 4
        assert lmbda or sorted(completions) == [[20 + j, EOS] for j in range(4)]
    chat.chat_template = chat.chat_template.replace("'w3 '", "'w' ~ (messages|length + 10) ~ ' '")
    with pytest.raises(DataError, match="is not the beginning of prompt and completion"):
        micro_batches(build(dataset=Dataset.from_dict(rows), tokenizer=chat, lmbda=0.0))


# --- who writes --------------------------------------------------------------------------------------------------


def test_the_teacher_answers_what_the_student_does_not(build):
    trainer = build(
        lmbda=0.5, seq_kd=True, num_generations=2, per_device_train_batch_size=16, max_completion_length=12, seed=3
    )
    wrote, write = {}, trainer.write
    trainer.write = lambda model, prompts, n, seed: wrote.setdefault(id(model), write(model, prompts, n, seed))
    (batch,) = micro_batches(trainer)
    by = {True: wrote[id(trainer.model_wrapped)], False: wrote[id(trainer.teacher_model)]}
    for mine in (True, False):
        assert sorted(completion for _, completion, own in rows_of(batch) if own == mine) == sorted(by[mine])
    assert sum(map(len, by.values())) == 16 and all(len(ids) % 2 == 0 for ids in by.values())


def test_the_share_of_the_student_is_lmbda(build):
    trainer = build(lmbda=0.3)
    trainer.model.train()
    trainer.write = lambda model, prompts, n, seed: [[7, EOS] for _ in range(len(prompts) * n)]
    rows = [{"prompt": PROMPTS[j % 8], "completion": words(9)} for j in range(3000)]
    sources = trainer.complete(rows)[2]
    assert abs(sources.count("student") / 3000 - 0.3) < 0.04 and set(sources) == {"student", "data"}


def test_replayed_rows_are_earlier_completions_with_their_own_prompts(build):
    trainer = build(replay_size=6, replay_share=0.6, max_steps=6, seed=2)
    seen, complete = [], trainer.complete
    trainer.complete = lambda rows: seen.append(complete(rows)) or seen[-1]
    trainer.train()
    written, kept = [], 0
    for prompts, completions, sources, _ in seen:
        for prompt, completion, source in zip(prompts, completions, sources, strict=True):
            assert source == "student" or (prompt, completion) in written[-6:]
            kept += source == "replay"
        written += [(p, c) for p, c, source in zip(prompts, completions, sources, strict=True) if source == "student"]
    assert (
        set(seen[0][2]) == {"student"}
        and kept >= 5
        and "replay" in seen[-1][2]
        and trainer._buffered_inputs[0]["own"].all()
    )


def test_evaluation_lets_the_student_answer_each_prompt_once_and_leaves_training_alone(build):
    held_out = Dataset.from_dict({"prompt": PROMPTS[2:7]})
    plain = build(hybrid(), where="plain", max_steps=3, num_generations=2, lmbda=0.5)
    offloaded = build(
        hybrid(),
        where="offloaded",
        max_steps=3,
        num_generations=2,
        lmbda=0.5,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
    )
    plain.train()
    offloaded.train()
    close(weights(offloaded), weights(plain), rtol=0, atol=0)
    first, second = (offloaded.evaluate() for _ in range(2))
    assert first["eval_divergence"] == second["eval_divergence"] > 0 and first["eval_source/student"] == 1
    close(first["eval_loss"], second["eval_loss"])


# --- training ----------------------------------------------------------------------------------------------------


def test_the_loss_goes_down_and_what_is_written_changes(build):
    teacher = llama(2)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
    trainer = build(
        hybrid(),
        teacher,
        dataset,
        max_steps=20,
        optim="adamw_torch",
        learning_rate=2e-2,
        num_generations=2,
        per_device_train_batch_size=8,
        log_completions=True,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (
        logs[-1]["divergence"] < 0.7 * logs[0]["divergence"]
        and logs[-1]["top1_agreement"] > logs[0]["top1_agreement"] + 0.2
    )
    tables = samples_of(trainer)
    assert len(tables) == 20 and all(len(table) == 8 for table in tables.values())
    assert {prompt for prompt, _ in tables[1]} == {prompt for prompt, _ in tables[20]} == set(PROMPTS[:4])
    assert set(tables[1]) != set(tables[20])
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items()) and not teacher.training


def test_each_step_draws_anew_also_from_a_student_that_stands_still(build):
    trainer = build(
        hybrid(),
        dataset=Dataset.from_dict({"prompt": PROMPTS[3:4]}),
        max_steps=4,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        log_completions=True,
    )
    trainer.train()
    assert len({completion for table in samples_of(trainer).values() for _, completion in table}) > 1


def test_a_resumed_run_writes_the_same_and_ends_with_the_same_weights(build):
    """Across an epoch's end, with accumulation, data, replay and two completions per prompt: bitwise."""
    arguments = {
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "lmbda": 0.8,
        "replay_size": 9,
        "replay_share": 0.3,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "log_completions": True,
    }
    whole = build(hybrid(), where="whole", **arguments)
    whole.train()
    first = build(hybrid(), where="parts", **arguments)
    stop = first.training_step

    def until_step_three(*args, **kwargs):
        if first.state.global_step == 4:
            raise KeyboardInterrupt
        return stop(*args, **kwargs)

    first.training_step = until_step_three
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build(hybrid(), where="parts", **arguments)
    second.train(resume_from_checkpoint=True)
    close(weights(second), weights(whole), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="belongs to another run: teacher was .* allow_changes=\\['teacher'\\]"):
        build(hybrid(), llama(3), where="parts", **arguments).train(resume_from_checkpoint=True)
    assert samples_of(second) == samples_of(whole) and len(samples_of(whole)) == 6
    # epochs differ in their order
    assert len({tuple(sorted({p for p, _ in table})) for table in samples_of(whole).values()}) > 2


def test_checkpointing_accumulation_and_adapters_do_not_change_what_is_written(build):
    wanted = micro_batches(build(hybrid(), gradient_checkpointing=False))[0]
    # B is zero: the same model
    adapted = get_peft_model(hybrid(), LoraConfig(target_modules=["q_proj", "o_proj"], r=2))
    for other in (build(hybrid(), gradient_checkpointing=True), build(adapted, gradient_checkpointing=True)):
        torch.manual_seed(0)
        batch = micro_batches(other)[0]
        assert sorted(map(repr, rows_of(batch))) == sorted(map(repr, rows_of(wanted)))
    before = weights(other)
    other.train()
    moved = {name for name, p in weights(other).items() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_a_checkpoint_holds_the_student_alone_and_no_pickled_arguments(build):
    trainer = build(hybrid(), save_strategy="steps", save_steps=1)
    trainer.train()
    names = {path.name for path in Path(trainer.args.output_dir, "checkpoint-1").iterdir()}
    assert "model.safetensors" in names and not {"training_args.bin", "README.md"} & names
    with safe_open(Path(trainer.args.output_dir, "checkpoint-1", "model.safetensors"), "pt") as file:
        assert set(file.keys()) <= set(trainer.model.state_dict())


# --- vocabularies ------------------------------------------------------------------------------------------------


def test_padding_of_a_vocabulary_is_neither_written_nor_compared(build, tokenizer):
    """125 rows in the student, 140 in the teacher, 61 tokens: the loss is that of the real ids, and no padded id is
    ever sampled.
    """
    student, teacher = hybrid(vocab_size=125), llama(2, vocab=140)
    with pytest.raises(ConfigError, match="125 tokens, the teacher's 140"):
        build(student, teacher)
    trainer = build(
        student, teacher, teacher_tokenizer=tokenizer, per_device_train_batch_size=8, max_completion_length=30
    )
    (batch,) = micro_batches(trainer)
    assert batch["input_ids"].max() < VOCAB
    loss = trainer.compute_loss(trainer.model, batch)
    close(loss.item(), loss_by_hand(student, teacher, [batch], DIVERGENCE["reverse_kl"]), rtol=1e-5, atol=0)
    loss.backward()
    assert (student.lm_head.weight.grad[VOCAB:] == 0).all()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, arguments",
    {
        "skew=1.0": {"divergence": "skewed_kl", "skew": 1.0},
        "divergence='kl'": {"divergence": "kl"},
        "lmbda=1.5": {"lmbda": 1.5},
        "num_generations=3 does not divide the 4": {"num_generations": 3},
        "num_generations=0": {"num_generations": 0},
        "replay_size=5, replay_share=0.0": {"replay_size": 5},
        "seq_kd=True, lmbda=1": {"seq_kd": True},
        "ce_weight=0.5, lmbda=1": {"ce_weight": 0.5},
        "loss_temperature=0": {"loss_temperature": 0},
        "beta=0.5 has no effect": {"beta": 0.5},
        "use_vllm=True": {"use_vllm": True},
        "train_dataset has 8 prompts, one step takes 12": {"gradient_accumulation_steps": 3},
        "max_empty_share=2": {"max_empty_share": 2},
        "push_to_hub=True": {"push_to_hub": True},
    }.items(),
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(build, message, arguments):
    with pytest.raises(ConfigError, match=message):
        build(**arguments)


def test_data_and_models_that_do_not_fit_are_refused(build):
    with pytest.raises(ConfigError, match="no column 'completion', only \\['prompt'\\]"):
        build(dataset=Dataset.from_dict({"prompt": PROMPTS}), lmbda=0.5)
    with pytest.raises(ConfigError, match="no column 'prompt'"):
        build(dataset=Dataset.from_dict({"text": PROMPTS}))
    with pytest.raises(DataError, match="prompt '' has no token"):
        micro_batches(build(dataset=Dataset.from_dict({"prompt": ["", *PROMPTS[:3]]})))
    with pytest.raises(DataError, match="completion: expected text or messages beside the prompt"):
        micro_batches(
            build(dataset=Dataset.from_dict({"prompt": PROMPTS[:4], "completion": [None, "w3", "w4", "w5"]}), lmbda=0.0)
        )
    with pytest.raises(ConfigError, match="teacher: expected a model in memory, got str"):
        build(teacher="a/path")
    student = llama(1)
    twin = llama(1)
    twin.lm_head.weight = student.lm_head.weight
    with pytest.raises(ConfigError, match="share the weight"):
        build(student, twin)
    trainer = build()
    trainer.teacher_model.train()
    with pytest.raises(ConfigError, match="the teacher is in training mode"):
        micro_batches(trainer)
    broken = hybrid()
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CheckpointError, match="the student .* not finite; its lm_head.weight holds NaN or infinity"):
        build(broken)


def test_virtual_tokens_are_refused_in_student_and_teacher(build):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for pair in ({"student": get_peft_model(hybrid(), config)}, {"teacher": get_peft_model(llama(2), config)}):
        with pytest.raises(ConfigError, match="PROMPT_TUNING.*pass a model without virtual tokens"):
            build(**pair)


def test_student_and_teacher_write_by_the_trainer_s_settings_alone(build):
    """A checkpoint that never lets a text end, and forbids half of the vocabulary, writes as one that says nothing."""
    seen = []
    for own in ({}, {"min_new_tokens": 6, "suppress_tokens": list(range(3, 30))}):
        student, teacher = hybrid(), llama(2)
        for model in (student, teacher):
            for name, value in own.items():
                setattr(model.generation_config, name, value)
        trainer = build(student, teacher, lmbda=0.5, seq_kd=True, max_steps=3, learning_rate=0.0)
        inner, rows = trainer.complete, []
        trainer.complete = lambda given, inner=inner, rows=rows: rows.append(inner(given)) or rows[-1]
        trainer.train()
        seen.append(rows)
    assert seen[0] == seen[1] and {source for _, _, sources, _ in seen[0] for source in sources} == {
        "student",
        "teacher",
    }
