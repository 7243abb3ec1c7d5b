"""Several teachers of one student: each row is scored, and answered, by its own; held at once or one at a time; as a
stage of a run.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from test_on_policy import (
    COMPLETIONS,
    DIVERGENCE,
    EOS,
    PROMPTS,
    VOCAB,
    hybrid,
    llama,
    loss_by_hand,
    micro_batches,
    rows_of,
    weights,
    word_tokenizer,
)
from transformers import AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import cli, pipeline
from xlstm_hybrid.checkpoint.files import MANIFEST, digest, read_provenance
from xlstm_hybrid.data import joint_prompts, prompts
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.pipeline import Run, make_experts
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

ROOT = Path(__file__).parents[2]
close = torch.testing.assert_close
NAMES = ["math", "code", "math", "math", "code", "math", "code", "code"]  # whose the prompts are
ROWS = {"prompt": PROMPTS, "completion": COMPLETIONS, "teacher": NAMES}
OWNER = dict(zip(PROMPTS, NAMES, strict=True))


@pytest.fixture
def build(tmp_path):
    def build(student=None, teachers=None, rows=ROWS, where="run", tokenizers=None, **arguments):
        shared = {
            "output_dir": str(tmp_path / where),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "max_completion_length": 5,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
            "num_completions_to_print": 0,
            "log_completions": False,
        }
        teachers = teachers or {"math": llama(2), "code": llama(3)}
        return OnPolicyKDTrainer(
            student or hybrid(),
            teachers,
            OnPolicyKDConfig(**shared | arguments),
            processing_class=word_tokenizer(),
            train_dataset=Dataset.from_dict(rows),
            teacher_tokenizer=tokenizers,
        )

    return build


def named(trainer, batch):
    """Names of the teachers of a batch's rows, by their prompts."""
    ids = {tuple(trainer.processing_class(prompt)["input_ids"]): name for prompt, name in OWNER.items()}
    return [ids[tuple(prompt)] for prompt, _, _ in rows_of(batch)]


def part(batch, rows):
    return {name: x[rows] if x.dim() else x for name, x in batch.items()}


def by_hand(trainer, batches):
    """Per token of all rows the reverse KL to the row's own teacher, in float64."""
    total = count = 0
    for batch in batches:
        for name, teacher in zip(trainer.names, trainer.teachers, strict=True):
            mine = part(batch, torch.tensor([n == name for n in named(trainer, batch)]))
            tokens = int((mine["labels"] != -100).sum())
            total += loss_by_hand(trainer.model, teacher, [mine], DIVERGENCE["reverse_kl"]) * tokens if tokens else 0.0
            count += tokens
    return total / count


# --- who scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 4])
def test_the_loss_is_the_divergence_from_each_rows_own_teacher_however_a_step_is_split(build, split):
    trainer = build(per_device_train_batch_size=8 // split, gradient_accumulation_steps=split)
    batches = micro_batches(trainer)
    loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches).item()
    close(loss, by_hand(trainer, batches), rtol=1e-5, atol=0)
    trainer.teachers = trainer.teachers[::-1]
    assert abs(loss - by_hand(trainer, batches)) > 0.05  # the other way round it is another loss


def test_a_teacher_sees_its_own_rows_and_no_others(build):
    trainer, seen = build(), {"math": [], "code": []}
    for name, teacher in zip(trainer.names, trainer.teachers, strict=True):
        teacher.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].extend(kwargs["input_ids"].tolist()), with_kwargs=True
        )
    (batch,) = micro_batches(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert {name: len(rows) for name, rows in seen.items()} == {"math": 4, "code": 4}
    for ids, name in zip(batch["input_ids"].tolist(), named(trainer, batch), strict=True):
        assert ids in seen[name]


@pytest.mark.parametrize("split", [1, 2])
def test_one_teacher_at_a_time_gives_the_same_gradients(build, split, monkeypatch):
    gradients, moved, at_work = [], [], OnPolicyKDTrainer.at_work
    monkeypatch.setattr(
        OnPolicyKDTrainer,
        "at_work",
        lambda self, teacher: moved.append(self.teachers.index(teacher)) or at_work(self, teacher),
    )
    for offload in (False, True):
        trainer = build(
            teacher_offload=offload, per_device_train_batch_size=8 // split, gradient_accumulation_steps=split
        )
        for batch in micro_batches(trainer):
            assert ("targets" in batch) == offload
            trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    close(*gradients, rtol=1e-4, atol=1e-6)
    assert moved == [0, 1]  # each came once for the whole step


def test_a_teacher_answers_the_prompts_of_its_domain_that_the_student_does_not(build):
    trainer, wrote = build(lmbda=0.0, seq_kd=True), {}
    write = trainer.write
    trainer.write = lambda model, prompts, n, seed: wrote.setdefault(
        id(model), (prompts, write(model, prompts, n, seed))
    )[1]
    (batch,) = micro_batches(trainer)
    ids = {tuple(trainer.processing_class(prompt)["input_ids"]): name for prompt, name in OWNER.items()}
    for name, teacher in zip(trainer.names, trainer.teachers, strict=True):
        asked, answered = wrote[id(teacher)]
        assert [ids[tuple(prompt)] for prompt in asked] == [name] * 4
        for prompt, completion in zip(asked, answered, strict=True):
            assert (list(prompt), completion, False) in list(rows_of(batch))


def test_a_replayed_completion_keeps_its_teacher(build):
    trainer = build(replay_size=16, replay_share=0.7, max_steps=5, per_device_train_batch_size=4)
    sources, batches, complete, generate = [], [], trainer.complete, trainer._generate_and_score_completions
    trainer.complete = lambda rows: [sources.extend(found[2]) or found for found in [complete(rows)]][0]
    trainer._generate_and_score_completions = lambda rows: batches.append(generate(rows)) or batches[-1]
    trainer.train()
    assert len(batches) == 5 and sources.count("replay") >= 3
    for batch in batches:
        assert [trainer.names[number] for number in batch["teacher"].tolist()] == named(trainer, batch)


# --- training --------------------------------------------------------------------------------------------------


def test_the_student_comes_nearer_to_each_teacher_on_its_own_prompts(build):
    trainer = build(max_steps=15, optim="adamw_torch", learning_rate=2e-2)
    trainer.train()
    first, last = ([entry for entry in trainer.state.log_history if "loss" in entry][j] for j in (0, -1))
    for name in ("math", "code"):
        assert (
            last[f"{name}/divergence"] < 0.8 * first[f"{name}/divergence"] and 0 <= first[f"{name}/top1_agreement"] <= 1
        )
    mean = (first["math/divergence"] + first["code/divergence"]) / 2
    assert min(first["math/divergence"], first["code/divergence"]) < first["divergence"] < 2 * mean


def test_a_resumed_run_ends_with_the_same_weights_and_other_teachers_make_another_run(build):
    arguments = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "replay_size": 8,
        "replay_share": 0.4,
    }
    whole, first = build(where="whole", **arguments), build(where="parts", **arguments)
    whole.train()
    step = first.training_step

    def until_step_two(*args, **kwargs):
        if first.state.global_step == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    first.training_step = until_step_two
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build(where="parts", **arguments)
    second.train(resume_from_checkpoint=True)
    close(weights(second), weights(whole), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="belongs to another run: teacher was"):
        build(teachers={"math": llama(2), "code": llama(4)}, where="parts", **arguments).train(
            resume_from_checkpoint=True
        )


# --- refusals --------------------------------------------------------------------------------------------------


def test_rows_without_a_teacher_and_teachers_of_other_vocabularies_are_refused(build):
    unnamed = {"prompt": PROMPTS}
    with pytest.raises(
        ConfigError, match="no column 'teacher', only \\['prompt'\\]; .*teachers \\['math', 'code'\\] need it"
    ):
        build(rows=unnamed)
    with pytest.raises(ConfigError, match="names the teachers \\['chat'\\], expected some of \\['math', 'code'\\]"):
        build(rows=unnamed | {"teacher": ["chat"] * 8})
    with pytest.raises(DataError, match="teacher='chat' beside the prompt"):
        trainer = build()
        trainer.teacher_of({"prompt": "w3", "teacher": "chat"})
    with pytest.raises(ConfigError, match="teacher code: the student's vocabulary has 61 tokens, the teacher's 70"):
        build(teachers={"math": llama(2), "code": llama(3, vocab=70)})
    words = word_tokenizer().get_vocab()
    words["w7"], words["w8"] = words["w8"], words["w7"]
    with pytest.raises(ConfigError, match="teacher code: the tokenizers differ first at id 7"):
        build(tokenizers={"math": word_tokenizer(), "code": words})
    student = llama(1)
    twin = llama(1)
    twin.lm_head.weight = student.lm_head.weight
    with pytest.raises(ConfigError, match="share the weight"):
        build(student, {"math": llama(2), "code": twin})


def test_padding_that_only_one_teacher_has_is_neither_written_nor_compared(build):
    real = word_tokenizer()
    trainer = build(
        hybrid(vocab_size=70),
        {"math": llama(2, vocab=70), "code": llama(3, vocab=90)},
        tokenizers={"math": real, "code": real},
    )
    assert trainer.size == VOCAB and trainer.generation_config.suppress_tokens == list(range(VOCAB, 90))
    (batch,) = micro_batches(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    assert batch["input_ids"].max() < VOCAB and (trainer.model.lm_head.weight.grad[VOCAB:] == 0).all() and EOS < VOCAB


def test_the_teachers_stay_what_they_were(build):
    trainer = build(max_steps=2)
    before = [{name: x.clone() for name, x in teacher.state_dict().items()} for teacher in trainer.teachers]
    trainer.train()
    assert all(
        torch.equal(x, old[name])
        for t, old in zip(trainer.teachers, before, strict=True)
        for name, x in t.state_dict().items()
    )
    trainer.teachers[1].train()
    with pytest.raises(ConfigError, match="the teacher is in training mode"):
        micro_batches(trainer)


# --- the stage -------------------------------------------------------------------------------------------------


SHORT = {"max_steps": 1, "sequences_per_step": 2, "logging_steps": 1, "bf16": False}
LEARNS = SHORT | {"top_k": 32, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
TAUGHT = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "bf16": False,
    "logging_steps": 1,
    "learning_rate": 1e-4,
    "num_completions_to_print": 0,
}
SECTION = {"method": "on_policy", "weights": {"symbols": 0.75, "memory": 0.25}, "on_policy": TAUGHT}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    content = yaml.safe_load((ROOT / "recipes/smoke.yaml").read_text())
    content |= {
        "teacher": str(ROOT / "recipes/tiny_teacher/tiny-llama"),
        "align": SHORT,
        "distill": LEARNS,
        "merge": SECTION,
    }
    del content["evaluate"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = load_recipe(folder / "recipe.yaml")
    console = Console(file=open(folder / "console.txt", "w"))  # noqa: SIM115
    return recipe, folder / "run", make_experts(recipe, folder / "run", merge=True, console=console)


def test_the_experts_teach_the_aligned_start_and_the_record_says_what_each_taught(made):
    recipe, out, found = made
    stages = read_provenance(out / "taught")
    assert [s["stage"] for s in stages] == [
        "convert",
        "calibrate",
        "align",
        "distill:symbols",
        "distill:memory",
        "multi-teacher",
    ]
    assert stages[-1]["parent_manifest"] == digest(out / "aligned" / MANIFEST) and stages[-1]["config"] == TAUGHT | {
        "seed": recipe.seed
    }
    assert stages[-1]["data"]["experts"] == {
        "symbols": {"share": 0.75, "reads": recipe.experts["symbols"]},
        "memory": {"share": 0.25, "reads": recipe.experts["memory"]},
    }
    (log,) = [entry for entry in json.loads((out / "taught" / "training_log.json").read_text()) if "loss" in entry]
    for name in found:
        assert stages[-1]["figures"][f"{name}/divergence"] == log[f"{name}/divergence"] > 0
    before, after = (load_file(out / name / "model.safetensors") for name in ("aligned", "taught"))
    assert any(not torch.equal(before[key], after[key]) for key in before) and not (out / "merged").exists()


def merged(run):
    """The student of a run whose experts are there."""
    run.make(*run.named("merge", "multi-teacher"))
    return run.path(run.models["student"])


def test_the_experts_can_teach_what_they_were_merged_into_and_the_stage_is_kept(made, monkeypatch):
    recipe, out, found = made
    recipe = replace(recipe, merge=SECTION | {"method": "linear"}, out=str(out))
    console = Console(file=open(out.parent / "merged.txt", "w"))  # noqa: SIM115
    last = merged(Run(recipe, out, redo=True, console=console))
    stages = read_provenance(last)
    assert [s["stage"] for s in stages[-4:]] == [
        "distill:symbols",
        "distill:memory",
        "merge",
        "multi-teacher",
    ] and last == out / "taught"
    assert (
        stages[-1]["parent_manifest"] == digest(out / "merged" / MANIFEST)
        and stages[-2]["config"]["method"] == "linear"
    )
    monkeypatch.setattr(pipeline.run, "multi_teacher", lambda *args, **kwargs: pytest.fail("made again"))
    assert merged(Run(recipe, out, console=console)) == last
    longer = replace(recipe, merge=recipe.merge | {"on_policy": TAUGHT | {"max_steps": 2}})
    with pytest.raises(ConfigError, match="taught was made with other settings"):
        merged(Run(longer, out, console=console))


def test_prompts_of_several_experts_come_in_their_shares(made):
    recipe, out, _ = made
    tokenizer = AutoTokenizer.from_pretrained(out / "aligned")
    found = joint_prompts(recipe, tokenizer, 10, {"symbols": 2, "memory": 1})
    assert found["teacher"] == ["symbols"] * 7 + ["memory"] * 3
    assert found["prompt"] == [
        *prompts(recipe, tokenizer, 7, "symbols")["prompt"],
        *prompts(recipe, tokenizer, 3, "memory")["prompt"],
    ]
    (out.parent / "chat.jsonl").write_text(json.dumps({"q": "1+1=", "a": "2"}) + "\n")
    source = {"sources": {"chat": {"path": "chat.jsonl", "prompt": "q", "completion": "a"}}}
    mixed = replace(recipe, experts={"symbols": recipe.experts["symbols"], "memory": source})
    with pytest.raises(ConfigError, match="some ask in messages and some in text"):
        joint_prompts(mixed, tokenizer, 4, {"symbols": 1, "memory": 1})


def test_the_command_takes_experts_by_name_and_its_trainers_options(made, tmp_path):
    recipe, out, found = made
    experts = [part for name, directory in found.items() for part in ("--expert", f"{name}={directory}")]

    def run(*arguments):
        return CliRunner().invoke(
            cli.app,
            ["multi-teacher", str(out / "aligned"), str(tmp_path / "x"), "--recipe", str(recipe.path), *arguments],
        )

    done = run(*experts, "--max_steps", "1", "--teacher_offload", "true")
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    assert read_provenance(tmp_path / "x")[-1]["config"]["teacher_offload"] is True
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "x", out / "taught"))
    assert one.keys() == two.keys()
    for arguments, message in (
        (["--expert", "symbols"], "--expert symbols: expected NAME=DIRECTORY"),
        (["--expert", "math=x"], "expert 'math': recipe.yaml has"),
        ([*experts, *experts], "names an expert twice"),
    ):
        assert message in str(run(*arguments, "--overwrite").exception)
