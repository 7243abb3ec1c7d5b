"""A stored teacher trains like the one in memory; another vocabulary, adapters and parts of a model; and the command that
makes the store.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from conftest import tiny_student
from datasets import Dataset
from peft import LoraConfig
from test_sparse_kd import VOCAB, documents, llama, loss_by_hand, loss_of, tokenizer  # noqa: F401, a fixture
from torch.nn.functional import log_softmax

from xlstm_hybrid.checkpoint.files import owner
from xlstm_hybrid.commands.cache_teacher import cache_teacher
from xlstm_hybrid.data.vocabulary import vocabulary_hash
from xlstm_hybrid.errors import ConfigError, DataError, StoreError, WaitError
from xlstm_hybrid.pipeline import targets
from xlstm_hybrid.teacher_store import TeacherStore, build_store, number_rows
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer, document_dataset
from xlstm_hybrid.training.lm_head import Selection, TeacherTargets

close = torch.testing.assert_close
TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
K = 20


@pytest.fixture
def build(tmp_path, tokenizer):  # noqa: F811
    def build(
        student=None,
        teacher=None,
        dataset=None,
        data_collator=None,
        peft_config=None,
        teacher_tokenizer=None,
        store="online",
        eval_dataset=None,
        **arguments,
    ):
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
            "top_k": K,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        args = SparseKDConfig(teacher=store, **shared | arguments)
        return SparseKDTrainer(
            student or llama(1),
            teacher,
            args,
            teacher_tokenizer=teacher_tokenizer,
            processing_class=tokenizer,
            train_dataset=dataset or document_dataset(documents()),
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            peft_config=peft_config,
        )

    return build


def packed():
    """The documents in two rows of 26 and 17 tokens that say where each begins."""
    rows = []
    for part in documents()[:2], documents()[2:]:
        row = {"input_ids": [], "labels": [], "position_ids": []}
        for ids, labels in part:
            row["input_ids"] += ids
            row["labels"] += [-100, *labels[1:]]
            row["position_ids"] += range(len(ids))
        rows.append(row)
    return rows


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def stored(path, rows, teacher=None, kind="topk", k=K, temperature=1.0, vocab_size=VOCAB, **spec):
    teacher = TeacherTargets(teacher or llama(2), Selection(kind, k, temperature, vocab_size))
    build_store(path, rows, teacher, kind=kind, k=k, temperature=temperature, vocab_size=vocab_size, spec=spec)
    return TeacherStore(path)


def step(trainer):
    """(loss, gradients) of all batches of the trainer as one step."""
    trainer.model.zero_grad()
    loss, _, _ = loss_of(trainer)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def moved(trainer):
    """Names of the parameters that one call of `train` changes."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


# --- store = online ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "jsd"}, {"outcomes": "renormalise"}, {"temperature": 1.7}], ids=str
)
def test_a_store_trains_like_the_teacher_that_made_it(build, tmp_path, settings):
    """Both padded to one batch and packed into rows; apart by what float16 leaves of the log-probabilities."""
    for name, rows, more in (
        ("padded", None, {}),
        (
            "packed",
            Dataset.from_list(packed()),
            {"data_collator": collate, "remove_unused_columns": False, "per_device_train_batch_size": 1},
        ),
    ):
        data = rows or document_dataset(documents())
        wanted, wanted_gradients = step(build(teacher=llama(2), dataset=data, kl_weight=5.0, **more, **settings))
        store = stored(tmp_path / name, data, temperature=settings.get("temperature", 1.0))
        trainer = build(teacher=store, dataset=data, kl_weight=5.0, **more, **settings)
        loss, gradients = step(trainer)
        close(loss, wanted, rtol=2e-4, atol=0)
        scale = max(g.abs().max() for g in wanted_gradients.values())
        close(gradients, wanted_gradients, rtol=0, atol=2e-3 * scale.item())
        other, _ = step(build(teacher=llama(3), dataset=data, kl_weight=5.0, **more, **settings))
        assert abs(other - wanted) > 20 * abs(loss - wanted)  # another teacher would show


def test_a_store_named_by_the_config_trains_and_logs_the_metrics_of_its_teacher(build, tmp_path):
    data = document_dataset(documents())
    stored(tmp_path / "store", data)
    online, cached = build(llama(1), llama(2)), build(llama(1), store=str(tmp_path / "store"))
    for trainer in online, cached:
        trainer.train()
    a, b = (trainer.state.log_history[0] for trainer in (online, cached))
    for name in "loss", "ce", "kl", "top1_agreement", "kept_mass":
        close(b[name], a[name], rtol=1e-3, atol=1e-6)
    close(dict(cached.model.named_parameters()), dict(online.model.named_parameters()), rtol=0, atol=1e-4)


def test_outputs_that_are_asked_for_are_the_students(build):
    trainer = build(llama(1), llama(2))
    batch = next(iter(trainer.get_train_dataloader()))
    loss, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    close(out.logits, llama(1)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert loss == trainer.compute_loss(trainer.model, batch) and not out.logits.requires_grad


@pytest.mark.parametrize("settings", [{"divergence": "jsd"}, {"outcomes": "dense"}], ids=str)
def test_micro_batches_of_other_objectives_are_one_batch_too(build, settings):
    """Chunks of rows, micro-batches of 1 to 8 scored tokens and one batch take the same step."""
    ways = {}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"head_rows": 3}
    whole, *others = (build(llama(1), llama(2), **settings, **way) for way in ways)
    for trainer in whole, *others:
        trainer.train()
    for other in others:
        close(dict(other.model.named_parameters()), dict(whole.model.named_parameters()), rtol=1e-6, atol=1e-6)


def test_a_shuffled_epoch_finds_every_row(build, tmp_path):
    rows = [(ids[j:], labels[j:]) for ids, labels in documents() for j in range(3)]
    data = document_dataset(rows)
    store = stored(tmp_path / "store", data)
    trainer = build(
        teacher=store, dataset=data, per_device_train_batch_size=1, max_steps=len(data), shuffle_dataset=True
    )
    trainer.train()
    assert len(trainer.state.log_history) == len(data) + 1
    streamed = build(teacher=store, dataset=data.to_iterable_dataset(), per_device_train_batch_size=2)
    streamed.train()


def test_fewer_entries_of_a_store_are_those_of_a_smaller_one(build, tmp_path):
    data = document_dataset(documents())
    store = stored(tmp_path / "store", data)
    close(
        step(build(teacher=store, top_k=5, kl_weight=5.0))[0],
        step(build(teacher=llama(2), top_k=5, kl_weight=5.0))[0],
        rtol=5e-4,
        atol=0,
    )


def test_draws_from_a_store_are_trained_on(build, tmp_path):
    """The loss is cross-entropy with the draws less their entropy, by hand in float64."""
    data = document_dataset(documents())
    store = stored(tmp_path / "store", data, kind="sampled", k=7)
    loss, _ = step(build(llama(1), store, targets="sampled", top_k=7, ce_weight=0.0, kl_weight=1.0))
    wanted, count = 0.0, 0
    for n, (ids, _) in enumerate((row["input_ids"], row["labels"]) for row in data):
        row = store.row(n)
        with torch.no_grad():
            logq = log_softmax(llama(1).eval()(torch.tensor([ids])).logits[0].double(), -1).numpy()
        for t, some, logp in zip(row.stored.nonzero()[0], row.ids, row.logp, strict=True):
            drawn = logp > -float("inf")
            wanted += (2.718281828459045 ** logp[drawn] * (logp[drawn] - logq[t, some[drawn]])).sum()
            count += 1
    close(loss.item(), wanted / count, rtol=1e-5, atol=0)
    online = build(llama(1), llama(2), targets="sampled", top_k=7)
    first = step(online)[0]
    close(step(online)[0], first, rtol=0, atol=0)  # the same rows, the same draws: a resumed run repeats them
    online.train()
    assert "kept_mass" not in online.state.log_history[0] and online.state.log_history[0]["kl"] > 0


@pytest.mark.parametrize(
    "made, asked, message",
    [
        ({}, {"temperature": 2.0}, "holds 'topk' targets at temperature 1.0, expected 'topk' at 2.0"),
        ({}, {"targets": "sampled"}, "holds 'topk' targets .* expected 'sampled'"),
        ({"kind": "sampled"}, {"targets": "sampled", "top_k": 3}, f"keeps {K} entries per token, top_k=3"),
        ({}, {"top_k": K + 1}, f"keeps {K} entries per token, top_k={K + 1}: set top_k to that"),
        ({"vocabulary": vocabulary_hash({"a": 0})}, {}, "was made with the vocabulary [0-9a-f]{12}"),
    ],
    ids=str,
)
def test_a_store_of_something_else_is_refused(build, tmp_path, made, asked, message):
    store = stored(tmp_path / "store", document_dataset(documents()), **made)
    with pytest.raises(StoreError, match=message):
        build(teacher=store, **asked)


def test_a_store_with_more_ids_than_the_student_is_refused_and_one_with_fewer_is_not(build, tmp_path, tokenizer):  # noqa: F811
    data = document_dataset(documents())
    with pytest.raises(
        StoreError, match="has ids below 67, the student's vocabulary 61: build it with --vocabulary 61"
    ):
        build(teacher=stored(tmp_path / "wide", data, teacher=llama(2, vocab=67), vocab_size=67))
    store = stored(tmp_path / "real", data, teacher=llama(2, vocab=67), vocabulary=vocabulary_hash(tokenizer))
    padded = llama(1, vocab=64)
    _, gradients = step(build(padded, store))
    assert (gradients["lm_head.weight"][VOCAB:] == 0).all() and gradients["lm_head.weight"][:VOCAB].abs().max() > 0


def test_data_that_is_not_the_stores_is_refused_by_document_and_position(build, tmp_path):
    store = stored(tmp_path / "store", document_dataset(documents()))
    rows = documents()
    rows[1][0][12] = rows[1][1][12] = 7
    with pytest.raises(
        StoreError, match=r"row 1, position 12 \(document 0 of the row, its token 12\): token 7 in the batch"
    ):
        build(teacher=store, dataset=document_dataset(rows)).train()
    with pytest.raises(StoreError, match="has 4 rows, the data 3"):
        build(teacher=store, dataset=document_dataset(rows[:3]))
    with pytest.raises(StoreError, match=r"row \d, document 0: 4 tokens in the batch"):
        build(teacher=store, max_length=4).train()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"store": "x", "packing": True}, "packing=True with a teacher store"),
        ({"store": "x", "outcomes": "dense"}, "outcomes='dense' with targets='topk', teacher='x'"),
        ({"targets": "sampled", "outcomes": "dense"}, "outcomes='dense' with targets='sampled'"),
        ({"targets": "sampled", "divergence": "reverse_kl"}, "targets='sampled' with divergence='reverse_kl'"),
        ({"divergence": "reverse_kl", "outcomes": "gemma"}, "divergence='reverse_kl' with outcomes='gemma'"),
        ({"divergence": "kl"}, "divergence='kl' is not one of"),
        ({"outcomes": "sum"}, "outcomes='sum' is not one of"),
        ({"train": "head"}, "train='head' is not one of"),
        ({"targets": "all"}, "targets='all' is not one of"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"head_rows": 0}, "head_rows=0"),
        ({"divergence": "jsd", "jsd_beta": 2.0}, "jsd_beta=2.0"),
        ({"divergence": "skewed_kl", "skew": -1.0}, "skew=-1.0"),
        ({"divergence": "csd", "csd_weights": "st"}, "csd_weights='st'"),
        ({"store": "nowhere"}, "index.json cannot be read"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_together_are_refused(build, arguments, message):
    with pytest.raises((ConfigError, StoreError), match=message):
        build(**arguments)
    with pytest.raises(ConfigError, match="names a store and a model was passed as well"):
        build(teacher=llama(2), store="x")


# --- vocabularies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours, theirs", [(64, VOCAB), (VOCAB, 64), (64, 128)])
@pytest.mark.parametrize("outcomes", ["tail", "dense"])
def test_a_gap_between_vocabularies_is_cut_to_the_real_ids(build, tokenizer, ours, theirs, outcomes):  # noqa: F811
    """Padding rows are large on purpose: they would show in any softmax over them."""
    small = llama(1), llama(2)
    padded = llama(1, vocab=ours), llama(2, vocab=theirs)
    for narrow, wide in zip(small, padded, strict=True):
        weights = wide.state_dict()
        for name, x in narrow.state_dict().items():
            weights[name][: len(x)] = x
        weights["lm_head.weight"][VOCAB:] = 3.0
    wanted = loss_by_hand(*small, documents())
    trainer = build(*padded, teacher_tokenizer=tokenizer, top_k=VOCAB, outcomes=outcomes)
    close(step(trainer)[0].item(), wanted, rtol=1e-5, atol=0)
    with pytest.raises(
        ConfigError, match=f"the student's vocabulary has {ours} tokens, the teacher's {theirs}: pass teacher_tokenizer"
    ):
        build(*padded)
    other = {token: {7: 8, 8: 7}.get(i, i) for token, i in tokenizer.get_vocab().items()}
    with pytest.raises(
        ConfigError, match="the tokenizers differ first at id 7: 'w7' for the student, 'w8' for the teacher"
    ):
        build(*padded, teacher_tokenizer=other)


# --- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, part", [("all", ""), ("attention", ".self_attn."), ("mixer", ".self_attn.mlstm.")])
def test_exactly_the_chosen_part_of_the_student_moves(build, train, part):
    student = tiny_student(torch.float32, gain=1.5)
    student.requires_grad_(False)  # as alignment leaves it
    assert moved(build(student, llama(2), train=train)) == {
        name for name, _ in student.named_parameters() if part in name
    }


def test_checkpointed_layers_of_a_partly_frozen_student_get_the_same_gradients(build):
    plain, kept = (
        step(build(tiny_student(torch.float32, gain=1.5).train(), llama(2), train="mixer", gradient_checkpointing=c))[1]
        for c in (0, 1)
    )
    assert plain.keys() == kept.keys() and any("mlstm" in name for name in plain)


def test_a_part_that_the_model_does_not_have_is_refused(build):
    with pytest.raises(ConfigError, match="train='mixer': no parameter of LlamaForCausalLM"):
        build(llama(1), llama(2), train="mixer")
    with pytest.raises(ConfigError, match="train='mixer' with PEFT"):
        build(tiny_student(torch.float32), llama(2), train="mixer", peft_config=LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_an_adapter_gets_the_gradients_of_whole_logits_and_nothing_else_moves(build, divergence):
    """With a copy of the head that trains as well: PEFT wraps it, the loss must read the copy."""

    def lora():
        return LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
        )

    torch.manual_seed(3)
    outcomes = "dense" if divergence == "jsd" else "tail"
    trainer = build(
        tiny_student(torch.float32, gain=1.5),
        llama(2),
        peft_config=lora(),
        divergence=divergence,
        outcomes=outcomes,
        top_k=VOCAB,
    )
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(0.9)
    loss, gradients = step(trainer)
    assert all("lora" in name or "modules_to_save" in name for name in gradients) and len(gradients) == 2 * 2 * 3 + 1
    if divergence == "forward_kl":
        close(loss.item(), loss_by_hand(trainer.model, llama(2), documents()), rtol=1e-4, atol=0)
    for name in next(n for n in gradients if "lora_B" in n), next(n for n in gradients if "lm_head" in n):
        parameter, h = dict(trainer.model.named_parameters())[name], 1e-2
        direction = gradients[name] / gradients[name].norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * h * direction)
                values.append(loss_of(trainer)[0].item())
                parameter.sub_(sign * h * direction)
        close((values[0] - values[1]) / (2 * h), gradients[name].norm().item(), rtol=0.02, atol=0)
    changed = moved(trainer)
    assert changed == set(gradients)


def test_divergences_train_and_fall(build):
    for divergence, outcomes in ("reverse_kl", "tail"), ("skewed_kl", "renormalise"), ("csd", "dense"):
        trainer = build(
            llama(1),
            llama(2),
            divergence=divergence,
            outcomes=outcomes,
            ce_weight=0.0,
            kl_weight=1.0,
            max_steps=5,
            optim="adamw_torch",
            learning_rate=1e-2,
            csd_weights="ss",
        )
        trainer.train()
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert kl[-1] < 0.9 * kl[0], (divergence, kl)


# --- the command ---------------------------------------------------------------------------------------------------


def rows_of_text(count=6, length=40):
    return [
        {
            "input_ids": [(5 * n + 3 * t) % 500 for t in range(length)],
            "position_ids": [t % (11 + n) for t in range(length)],
        }
        for n in range(count)
    ]


def run(*arguments):
    app = typer.Typer()
    app.command()(cache_teacher)
    return typer.main.get_command(app)([str(a) for a in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows_of_text())))
    Dataset.from_list(rows_of_text()).save_to_disk(path / "rows")
    return path


def test_the_command_stores_what_the_teacher_says(folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    options = ["--top-k", 8, "--dtype", "float32", "--shard-tokens", 80]
    run(TINY, folder / "rows.jsonl", tmp_path / "a", *options, "--estimate")
    assert (
        "6 rows, 240 tokens, targets for 219 of them: 0.000 GB in 3 shards" in capsys.readouterr().out
        and not (tmp_path / "a").exists()
    )
    run(TINY, folder / "rows.jsonl", tmp_path / "a", *options, "--verify")
    assert "3 of 3 shards" in capsys.readouterr().out
    run(TINY, folder / "rows", tmp_path / "b", *options)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    store, teacher = TeacherStore(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert store.spec["teacher"] == "tiny-llama" and store.spec["documents"] > store.spec["rows"]
    ids, positions = (torch.tensor([rows_of_text()[3][name]]) for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        logp = teacher(ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    row = store.row(3)
    assert (logp.topk(8).indices[torch.from_numpy(row.stored)].numpy() == row.ids).mean() > 0.99  # but for ties
    close(torch.from_numpy(row.logp), logp.topk(8).values[torch.from_numpy(row.stored)], rtol=2e-3, atol=2e-3)


def test_a_recipe_names_the_rows_and_the_precision(tmp_path):
    from transformers import AutoTokenizer

    from xlstm_hybrid.data import train_dataset
    from xlstm_hybrid.recipe.schema import load_recipe

    path = TINY.parents[1] / "smoke.yaml"
    run(TINY, path, tmp_path / "store", "--top-k", 8, "--expert", "symbols")
    store, rows = (
        TeacherStore(tmp_path / "store"),
        train_dataset(load_recipe(path), AutoTokenizer.from_pretrained(TINY), 4, "symbols"),
    )
    assert len(store) == 4 and store.spec["dtype"] == "float32"
    assert [store.row(n).input_ids.tolist() for n in range(4)] == rows["input_ids"][:]


@pytest.mark.parametrize(
    "change, field", [({"tokenizer.json": ("w", "")}, "tokenizer"), ({"chat_template.jinja": ("{", "{ ")}, "template")]
)
def test_another_tokenizer_or_template_is_named(folder, tmp_path, change, field):
    options = ["--top-k", 8, "--vocabulary", 512]
    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    run(teacher, folder / "rows", tmp_path / "store", *options)
    before = (tmp_path / "store/index.json").read_bytes()
    if field == "template":
        (teacher / "chat_template.jinja").write_text((teacher / "chat_template.jinja").read_text() + "{# other #}")
    else:
        content = json.loads((teacher / "tokenizer.json").read_text())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        (teacher / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match=f"the store store was made for something else: {field} is "):
        run(teacher, folder / "rows", tmp_path / "store", *options)
    assert (tmp_path / "store/index.json").read_bytes() == before


def test_weights_are_part_of_the_spec(folder, tmp_path):
    from test_store import flip

    teacher = shutil.copytree(TINY, tmp_path / "teacher")
    run(teacher, folder / "rows", tmp_path / "store", "--top-k", 8)
    flip(teacher / "model.safetensors", -100)
    with pytest.raises(StoreError, match="weights is '"):
        run(teacher, folder / "rows", tmp_path / "store", "--top-k", 8)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.jsonl", "expected a folder of save_to_disk"),
        ("text.jsonl", "with a column input_ids"),
        ("", "no data set of"),
    ],
)
def test_what_holds_no_rows_is_refused(tmp_path, name, message):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=message):
        run(TINY, tmp_path / name, tmp_path / "store")


# --- workers -------------------------------------------------------------------------------------------------------


OTHERS = "import sys, time; time.sleep(0 if sys.argv[2] == '1' else 600);"  # process 1 does what follows, others wait


@pytest.mark.parametrize(
    "program, found",
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL .the system does that where memory is short"),
        ("import os; os.kill(os.getpid(), 15)", "was ended by SIGTERM, the others"),
        ("sys.exit('no room on the card')", "failed with exit code 1, the others"),
        ("import no_such_module", "failed with exit code 1, the others"),
    ],
)
def test_a_worker_that_dies_while_it_starts_ends_the_others_and_is_named(folder, tmp_path, monkeypatch, program, found):
    """With more rows than any pipe between two processes holds."""
    started, popen = [], subprocess.Popen

    def watched(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(targets, "WORKER", f"print('loading', flush=True);{OTHERS}{program}")
    monkeypatch.setattr(targets.subprocess, "Popen", watched)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows_of_text(count=600))))
    (tmp_path / "store").mkdir()
    (tmp_path / "store/shard-00000.safetensors").write_bytes(b"finished")
    with pytest.raises(WaitError) as stop:
        run(TINY, tmp_path / "rows.jsonl", tmp_path / "store", "--processes", 3, "--shard-tokens", 8000)
    text = str(stop.value)
    assert re.match(f"process 1 of 3 {found}", text) and "loading" in text.partition("The end of its output:")[2]
    assert "1 of 3 shards are finished and kept: run the same command again to go on" in text
    if "import no_such" in program:
        assert text.endswith("ModuleNotFoundError: No module named 'no_such_module'")
    assert len(started) == 3 and [worker.poll() for worker in started][::2] == [-signal.SIGTERM] * 2
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["shard-00000.safetensors"]


def test_workers_that_give_no_sign_of_life_are_ended(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "WORKER", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)")
    monkeypatch.setattr(targets, "SILENT_SECONDS", -1)
    monkeypatch.setattr(targets, "END_SECONDS", 0.1)
    with pytest.raises(WaitError, match=r"process 0 of 2 and the others gave no sign of life for .* It wrote nothing"):
        run(TINY, folder / "rows", tmp_path / "store", "--processes", 2)
    assert not list((tmp_path / "store").iterdir())


def test_interrupting_the_parent_ends_the_workers(folder, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def second_fails(*args, **kwargs):
        if started:
            raise KeyboardInterrupt
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(targets, "WORKER", "import time; time.sleep(600)")
    monkeypatch.setattr(targets.subprocess, "Popen", second_fails)
    with pytest.raises(KeyboardInterrupt):
        targets.share_out(2, "cpu", TINY, None, folder / "rows", tmp_path / "store", {"plan": [{}, [0, 1]]}, {}, 0)
    assert started[0].poll() == -signal.SIGTERM and not list((tmp_path / "store").iterdir())


def test_a_store_that_another_launch_is_at_names_it(folder, tmp_path, caplog):
    options = ["--top-k", 8, "--shard-tokens", 80]
    run(TINY, folder / "rows", tmp_path / "store", *options)
    (tmp_path / "store/shard-00001.json").unlink()
    (tmp_path / "store/.claim-shard-00001.safetensors").write_text(owner(os.getppid()))
    with pytest.raises(StoreError, match="2 of 3 shards are finished"):
        run(TINY, folder / "rows", tmp_path / "store", *options)
    who = f"process {os.getppid()} of this machine, since "
    assert any("shard-00001.safetensors: made by another launch" in m and who in m for m in caplog.messages)
    (tmp_path / "store/.claim-shard-00001.safetensors").write_text("")  # a lock that a power cut left empty
    run(TINY, folder / "rows", tmp_path / "store", *options)
    assert len(TeacherStore(tmp_path / "store").shards) == 3


@pytest.mark.slow
def test_processes_at_once_and_a_killed_one_make_the_same_store(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "xlstm_hybrid",
        "cache-teacher",
        str(TINY),
        str(folder / "rows"),
        "--top-k",
        "8",
        "--shard-tokens",
        "40",
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'kernels'}"}

    def call(out, *options):
        return subprocess.Popen(
            [*command[:6], str(out), *command[6:], *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    assert call(tmp_path / "one").wait() == 0
    assert call(tmp_path / "two", "--processes", "2").wait() == 0
    both = [call(tmp_path / "by hand", "--rank", str(r), "--world", "2") for r in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    killed = call(tmp_path / "killed")
    while not (tmp_path / "killed" / "shard-00000.safetensors").exists():
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert call(tmp_path / "killed").wait() == 0
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    for name in "two", "by hand", "killed":
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == wanted


def test_evaluation_rows_need_targets_in_the_store(build, tmp_path):
    """Said when the trainer is made; rows of the store itself are evaluated as a teacher in memory would."""
    data = document_dataset(documents())
    store = stored(tmp_path / "store", data)
    for rows in (data, {"held out": data}):
        with pytest.raises(StoreError, match="eval_dataset has no column store_row: store has no targets for its rows"):
            build(teacher=store, dataset=data, eval_dataset=rows)
    part = number_rows(data, store).select([2, 0])
    losses = [build(teacher=t, dataset=data, eval_dataset=part).evaluate()["eval_loss"] for t in (store, llama(2))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
