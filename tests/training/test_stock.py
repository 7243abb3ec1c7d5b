"""What our trainers replace of transformers' they keep doing: beside TRL's own trainer, on a stock Llama, a run has the
same events, evaluations, directories, best step and final weights.
"""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import tiny_student, token_ids
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_alignment import collate, tokenizer
from test_sparse_kd import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer
from xlstm_hybrid.training.resume import Interrupted, Resumable

# what the Trainer and TRL log of a machine, or we add to it
OWN_LOGS = ("runtime", "per_second", "memory_gb", "skipped_steps", "grad_norm", "total_flos", "layer_", "step_time")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


class Ours(Resumable, SFTTrainer):
    """TRL's own trainer with our saving and loading in front."""


class Record(TrainerCallback):
    """Every event, with what it is given and what the run is told to do then."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(args, state, control, **kwargs):
            flags = [field for field, value in sorted(vars(control).items()) if value is True]
            said = {k: v for key in ("logs", "metrics") for k, v in (kwargs.get(key) or {}).items()}
            numbers = {k: v for k, v in said.items() if not any(part in k for part in OWN_LOGS)}
            given = sorted(key for key, value in kwargs.items() if value is not None)
            best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
            self.events.append(
                (
                    name,
                    state.global_step,
                    state.epoch,
                    flags,
                    given,
                    numbers,
                    state.best_metric,
                    state.best_global_step,
                    best,
                )
            )

        return event


def run(trainer, folder, peft=None, resume=None, callbacks=(), compute_metrics=None, **settings):
    """A trainer that has trained, and what its callback saw. It learns one text and is evaluated on another, so that
    evaluations get worse after a while.
    """
    text, other = ([row * 3 for row in token_ids(12, 4, seed=seed).tolist()] for seed in (0, 1))
    shared = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "max_length": None,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_train_batch_size": 2,
        "seed": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }
    shared |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    rows = [[{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in of] for of in (text, other)]
    record = Record()
    made = trainer(
        model=llama(1, attention_dropout=0.1),
        args=SFTConfig(**(shared | settings)),
        train_dataset=Dataset.from_list(rows[0]),
        eval_dataset=Dataset.from_list(rows[1][:4]),
        data_collator=collate,
        processing_class=tokenizer(),
        peft_config=None if peft is None else LoraConfig(**peft),
        callbacks=[record, *callbacks],
        compute_metrics=compute_metrics,
    )
    made.train(resume_from_checkpoint=resume)
    return made, record.events


def directories(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("checkpoint-"))


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(ours, stock):
    """Of two `(trainer, events)`."""
    (mine, events), (theirs, wanted) = ours, stock
    assert [event[:2] for event in events] == [event[:2] for event in wanted]
    assert events == wanted
    got, want = weights(mine), weights(theirs)
    assert got.keys() == want.keys() and not [name for name, x in want.items() if not torch.equal(x, got[name])]
    assert mine.state.best_metric == theirs.state.best_metric
    assert mine.state.best_global_step == theirs.state.best_global_step
    assert directories(mine.args.output_dir) == directories(theirs.args.output_dir)


BEST = {"load_best_model_at_end": True}
SETTINGS = {
    "plain": {},
    "best": BEST,
    "best, one kept": BEST | {"save_total_limit": 1},
    "best, two kept": BEST | {"save_total_limit": 2},
    "best, three kept": BEST | {"save_total_limit": 3},
    "only the best is saved": BEST | {"save_strategy": "best"},
    "only the best is saved, two kept": BEST | {"save_strategy": "best", "save_total_limit": 2},
    "best of epochs": BEST
    | {"save_strategy": "epoch", "eval_strategy": "epoch", "save_total_limit": 1, "max_steps": 12},
    "greater is better": BEST | {"metric_for_best_model": "entropy", "greater_is_better": True, "save_total_limit": 1},
    "best, saved less often": BEST | {"save_steps": 3, "save_total_limit": 1},
    "adapters": BEST
    | {"metric_for_best_model": "entropy", "greater_is_better": True}
    | {"save_total_limit": 1, "peft": LORA, "learning_rate": 0.1},
    "model only": BEST | {"save_only_model": True, "save_total_limit": 1},
    "evaluated at the start": {"eval_on_start": True, "save_strategy": "no"},
    "plateau": BEST | {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}},
    "no saving": {"save_strategy": "no", "eval_strategy": "no"},
    "epochs, a short last step": {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_that_of_the_stock_trainer(name, tmp_path):
    runs = [run(trainer, tmp_path / trainer.__name__, **SETTINGS[name]) for trainer in (Ours, SFTTrainer)]
    assert_same_run(*runs)
    trainer = runs[0][0]
    if "load_best_model_at_end" in SETTINGS[name]:
        assert trainer.state.best_global_step < trainer.state.global_step  # or the case says nothing


# --- going on --------------------------------------------------------------------------------------------------


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


RESUMED = {
    "best": BEST | {"save_total_limit": 2},
    "best of epochs": BEST | {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 12},
    "other data": BEST | {"ignore_data_skip": True},
    "callbacks and control": BEST | {"restore_callback_states_from_checkpoint": True},
    "evaluated at the start": BEST | {"eval_on_start": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_is_that_of_the_stock_trainer(name, tmp_path):
    runs = []
    for trainer in (Ours, SFTTrainer):
        stopping = [StopAfter(3), EarlyStoppingCallback(20)]
        run(trainer, tmp_path / trainer.__name__, callbacks=stopping, **RESUMED[name])
        assert "checkpoint-3" in directories(tmp_path / trainer.__name__)
        newest = str(tmp_path / trainer.__name__ / "checkpoint-3")
        runs.append(
            run(trainer, tmp_path / trainer.__name__, None, newest, [EarlyStoppingCallback(20)], **RESUMED[name])
        )
    assert_same_run(*runs)
    assert runs[0][1][1][1] == 3  # it began there


def test_patience_counts_on_over_a_resume(tmp_path):
    settings = BEST | {"restore_callback_states_from_checkpoint": True, "max_steps": 12}
    whole, events = run(Ours, tmp_path / "whole", callbacks=[EarlyStoppingCallback(4)], **settings)
    best, last = whole.state.best_global_step, whole.state.global_step
    assert last == best + 4 < 12
    run(Ours, tmp_path / "parts", callbacks=[StopAfter(best + 2), EarlyStoppingCallback(4)], **settings)
    again, later = run(Ours, tmp_path / "parts", callbacks=[EarlyStoppingCallback(4)], resume=True, **settings)
    assert (again.state.best_global_step, again.state.global_step) == (best, last)
    assert all(torch.equal(x, weights(again)[name]) for name, x in weights(whole).items())


class Terminate(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_stopped_run_keeps_its_newest_checkpoint_beside_the_best_and_goes_on_from_it(strategy, tmp_path):
    settings = BEST | {"save_total_limit": 1, "save_strategy": strategy, "max_steps": 8}
    whole, _ = run(Ours, tmp_path / "whole", **settings)
    best = whole.state.best_global_step
    with pytest.raises(Interrupted, match=f"checkpoint-{best + 2} is written"):
        run(Ours, tmp_path / "parts", callbacks=[Terminate(best + 2)], **settings)
    assert directories(tmp_path / "parts") == [f"checkpoint-{best}", f"checkpoint-{best + 2}"]
    again, _ = run(Ours, tmp_path / "parts", resume=True, **settings)
    assert again.guard.began == best + 2
    assert all(torch.equal(x, weights(again)[name]) for name, x in weights(whole).items())
    assert directories(tmp_path / "parts") == directories(tmp_path / "whole") == [f"checkpoint-{best}"]


def test_a_best_step_without_a_checkpoint_is_said(tmp_path, caplog):
    trainer, _ = run(Ours, tmp_path / "run", **SETTINGS["best, saved less often"])
    best = trainer.state.best_global_step
    assert best not in (3, 6) and trainer.state.best_model_checkpoint is None
    assert f"step {best} evaluated best and there is no checkpoint-{best}: the last weights stay" in caplog.text


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(tmp_path):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                file = Path(state.best_model_checkpoint) / "model.safetensors"
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)

    with pytest.raises(CheckpointError, match="model.safetensors has SHA-256"):
        run(Ours, tmp_path / "run", callbacks=[Damage()], **BEST)


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(tmp_path):
    run(Ours, tmp_path / "run", save_only_model=True, max_steps=2)
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "trainer_state.json"} <= names
    assert not names & {"optimizer.safetensors", "rng.json", "resume.json"}
    with pytest.raises(CheckpointError, match="checkpoint-2: no resume.json, it holds a model and no training state"):
        run(Ours, tmp_path / "run", save_only_model=True, max_steps=4, resume=True)


def test_skipping_no_data_is_another_run_until_it_is_allowed(tmp_path):
    run(Ours, tmp_path / "run", callbacks=[StopAfter(3)])
    with pytest.raises(ConfigError, match="ignore_data_skip was False, is True.*allow_changes=.'ignore_data_skip'."):
        run(Ours, tmp_path / "run", resume=True, ignore_data_skip=True)


# --- beside training -------------------------------------------------------------------------------------------


def spread(prediction):
    return {"spread": float(prediction.predictions.std()), "labels": int((prediction.label_ids != -100).sum())}


def test_evaluations_and_predictions_are_those_of_the_stock_trainer(tmp_path):
    settings = BEST | {"metric_for_best_model": "spread", "greater_is_better": True, "compute_metrics": spread}
    runs = [run(trainer, tmp_path / trainer.__name__, **settings) for trainer in (Ours, SFTTrainer)]
    assert_same_run(*runs)
    found = []
    for trainer, _ in runs:
        before = trainer.evaluate()
        predicted = trainer.predict(trainer.eval_dataset.select([2, 0]))
        metrics = {k: v for k, v in predicted.metrics.items() if not any(part in k for part in OWN_LOGS)}
        found.append((metrics, predicted.predictions.tolist(), predicted.label_ids.tolist(), before["eval_spread"]))
    assert found[0] == found[1] and set(found[0][0]) == {"test_loss", "test_spread", "test_labels"}
    ours = runs[0][0]  # what was predicted is no part of the next evaluation
    assert ours.evaluate()["eval_entropy"] == before["eval_entropy"]


def test_a_saved_model_is_that_of_the_stock_trainer_without_the_pickle(tmp_path):
    files = {}
    for trainer in (Ours, SFTTrainer):
        made, _ = run(trainer, tmp_path / trainer.__name__, max_steps=2, save_strategy="no", eval_strategy="no")
        made.save_model(str(tmp_path / "saved" / trainer.__name__))
        files[trainer] = {path.name: path for path in (tmp_path / "saved" / trainer.__name__).iterdir()}
    assert set(files[SFTTrainer]) - set(files[Ours]) == {"training_args.bin"} and set(files[Ours]) < set(
        files[SFTTrainer]
    )
    got, want = (load_file(names["model.safetensors"]) for names in files.values())
    assert got.keys() == want.keys() and all(torch.equal(x, got[name]) for name, x in want.items())


def test_the_scaler_of_float16_is_resumed_and_no_pickle(tmp_path):
    trainer, _ = run(Ours, tmp_path / "run", save_strategy="no", max_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # float16 itself needs a GPU
    trainer._save_checkpoint(trainer.model, None)
    folder = tmp_path / "run" / "checkpoint-2"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_optimizer_and_scheduler(str(folder))
    assert trainer.accelerator.scaler.get_scale() == 1024.0 != torch.amp.GradScaler("cpu").get_scale()


# --- each trainer of ours --------------------------------------------------------------------------------------

SCHEDULE = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_length": None,
    "gradient_checkpointing": False,
    "seed": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "learning_rate": 3e-2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}
WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 61)}}


def words_tokenizer():
    inner = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def ours(kind, folder, callbacks=(), student=None, teacher=None, more=None, **settings):
    """One of our trainers, and the rows that it predicts on."""
    text, other = ([row * 3 for row in token_ids(12, 4, seed=seed).tolist()] for seed in (0, 1))
    rows, held_out = (Dataset.from_list([{"input_ids": row, "labels": row} for row in of]) for of in (text, other[:4]))
    settings, given = {"output_dir": str(folder)} | SCHEDULE | settings, {}
    if kind == "on-policy":
        del settings["max_length"]
        settings |= {"max_completion_length": 4, "log_completions": False, "shuffle_dataset": False}
        rows, held_out = (
            Dataset.from_dict({"prompt": [" ".join(f"w{n}" for n in row[:4]) for row in of["input_ids"]]})
            for of in (rows, held_out)
        )
        kinds = OnPolicyKDTrainer, OnPolicyKDConfig
    elif kind == "alignment":
        kinds = AlignmentTrainer, AlignmentConfig
    else:
        kinds = {"sparse": (SparseKDTrainer, SparseKDConfig), "delta": (DeltaKDTrainer, DeltaKDConfig)}[kind]
    if kind == "alignment":
        student = student or tiny_student(torch.float32, gain=1.0, num_hidden_layers=2)
    else:
        given["teacher"] = teacher or llama(2)
    trainer, config = kinds
    return trainer(
        student or llama(1),
        args=config(**settings),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=words_tokenizer(),
        callbacks=list(callbacks),
        **given,
        **(more or {}),
    )


EVERY = "sparse", "delta", "on-policy", "alignment"


class Score(TrainerCallback):
    """Evaluations of a score that is best after step 3."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = -abs(state.global_step - 3)

    def on_save(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            self.best = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", EVERY)
def test_every_trainer_ends_with_its_best_model(kind, tmp_path):
    score, record = Score(), Record()
    best = BEST | {"metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 1}
    trainer = ours(kind, tmp_path / "run", [score, record], **best)
    trainer.train()
    assert trainer.state.best_global_step == 3 and directories(tmp_path / "run") == ["checkpoint-3"]
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "run" / "checkpoint-3"
    assert all(torch.equal(x, score.best[name]) for name, x in weights(trainer).items())
    stock = run(SFTTrainer, tmp_path / "stock", callbacks=[Score()], **best)[1]
    # what each event is, when, with which control and arguments; what is logged is each trainer's own
    assert [event[:5] + event[6:] for event in record.events] == [event[:5] + event[6:] for event in stock]


@pytest.mark.parametrize("kind", EVERY)
def test_every_trainer_predicts_and_what_it_predicted_is_no_part_of_an_evaluation(kind, tmp_path):
    trainer = ours(kind, tmp_path / "run", eval_on_start=True, max_steps=1, save_strategy="no")
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1]
    before = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset.select([3, 1]))
    after = trainer.evaluate()
    own = {key for key in before if "runtime" not in key and "second" not in key}
    assert {key: after[key] for key in own} == {key: before[key] for key in own} and len(own) > 3
    assert math.isfinite(predicted.metrics["test_loss"]) and predicted.metrics["test_loss"] != before["eval_loss"]
    shape = {"sparse": (2, 12, 61), "delta": (2, 12, 61)}.get(kind)
    assert (predicted.predictions is None) if shape is None else predicted.predictions.shape == shape


@pytest.mark.parametrize("kind", EVERY)
def test_every_trainer_goes_on_with_evaluations_and_callback_states(kind, tmp_path):
    """As if it had not been stopped. Gone on with once more it evaluates, and stops again, as with transformers."""
    settings = BEST | {"metric_for_best_model": "score", "greater_is_better": True}
    settings |= {"restore_callback_states_from_checkpoint": True}
    if kind == "on-policy":
        settings |= {"replay_size": 5, "replay_share": 0.5}
    states = []
    for resume in (False, True, True):
        trainer = ours(
            kind, tmp_path / "run", [Score(), EarlyStoppingCallback(2), *([] if states else [StopAfter(4)])], **settings
        )
        trainer.train(resume_from_checkpoint=resume)
        states.append((trainer.state.global_step, trainer.state.best_global_step, weights(trainer)))
    whole = ours(kind, tmp_path / "whole", [Score(), EarlyStoppingCallback(2)], **settings)
    whole.train()
    assert [state[0] for state in states] == [4, 5, 6] and whole.state.global_step == 5
    best = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    for step, best_step, values in [*states, (5, whole.state.best_global_step, weights(whole))]:
        assert best_step == 3 and all(torch.equal(x, values[name]) for name, x in best.items()), step


def test_the_best_model_of_a_moved_run_is_its_own(tmp_path):
    run(Ours, tmp_path / "first", **BEST)
    (tmp_path / "first").rename(tmp_path / "second")
    again, _ = run(Ours, tmp_path / "second", resume=True, **BEST)
    best = load_file(tmp_path / "second" / f"checkpoint-{again.state.best_global_step}" / "model.safetensors")
    assert Path(again.state.best_model_checkpoint).parent == tmp_path / "second"
    assert again.state.best_global_step < 6 and all(torch.equal(x, weights(again)[name]) for name, x in best.items())


def test_cross_entropy_alone_is_the_run_of_the_stock_trainer(tmp_path):
    """Stage II without its divergence, on a stock Llama, beside TRL: one loss, one best step, the same weights."""
    best = BEST | {"save_total_limit": 1}
    trainer = ours("sparse", tmp_path / "run", ce_weight=1.0, kl_weight=0.0, top_k=8, **best)
    trainer.train()
    rows = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    settings = {"output_dir": str(tmp_path / "stock"), "dataset_kwargs": {"skip_prepare_dataset": True}}
    stock = SFTTrainer(llama(1), SFTConfig(**SCHEDULE, **best, **settings), processing_class=words_tokenizer(), **rows)
    stock.train()
    for key in ("loss", "eval_loss"):
        got, want = ([e[key] for e in t.state.log_history if key in e] for t in (trainer, stock))
        assert len(got) == 6 and got == pytest.approx(want, rel=1e-5)
    assert trainer.state.best_global_step == stock.state.best_global_step < 6
    assert directories(tmp_path / "run") == directories(tmp_path / "stock")
    for (name, got), want in zip(weights(trainer).items(), weights(stock).values(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3, msg=name)


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"push_to_hub": True}, "push_to_hub=True: the trainer publishes nothing"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: .*lower per_device_train_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True: the trainer saves on SIGTERM by itself"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_before_anything_happens(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(Ours, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_search_and_an_upload_are_refused_by_name(tmp_path):
    trainer, _ = run(Ours, tmp_path / "run", max_steps=1)
    for call in (trainer.hyperparameter_search, lambda: trainer.train(trial={"learning_rate": 1e-3})):
        with pytest.raises(ConfigError, match="hyperparameter_search: .*write the search as a loop"):
            call()
    with pytest.raises(ConfigError, match="push_to_hub.*publishes nothing.*xlstm-hybrid push"):
        trainer.push_to_hub()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", EVERY)
def test_every_trainer_refuses_what_it_cannot_keep_before_anything_happens(kind, tmp_path):
    with pytest.raises(ConfigError, match="push_to_hub=True"):
        ours(kind, tmp_path / "run", push_to_hub=True)
    with pytest.raises(ConfigError, match="auto_find_batch_size=True"):
        ours(kind, tmp_path / "run", auto_find_batch_size=True)
    with pytest.raises(ConfigError, match="use_liger_kernel=True"):
        ours(kind, tmp_path / "run", use_liger_kernel=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"loss_type": "dft"}, "loss_type='dft' has no place in alignment"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no place in alignment"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True has no place in alignment"),
        ({"completion_only_loss": True}, "completion_only_loss=True has no place in alignment"),
        ({"more": {"compute_metrics": spread}}, "compute_metrics: alignment makes no logits"),
        ({"more": {"compute_loss_func": spread}}, "compute_loss_func: alignment makes no logits"),
        ({"more": {"peft_config": LoraConfig(**LORA)}}, "alignment trains what conversion added, and no adapter"),
    ],
)
def test_alignment_refuses_what_it_would_not_use(change, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        ours("alignment", tmp_path / "run", **change)


# --- Distil-xLSTM's trainer with PEFT ----------------------------------------------------------------------------


def test_three_terms_leave_virtual_tokens_out(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    student, teacher = (
        get_peft_model(llama(1), config),
        get_peft_model(llama(2), LoraConfig(task_type="CAUSAL_LM", **LORA)),
    )
    shared = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", "eval_strategy": "no"}
    trainer = ours("delta", tmp_path / "run", student=student, teacher=teacher, **shared)
    seen, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **more: (
        seen.append(inputs["input_ids"]) or compute(model, inputs, **more)
    )
    trainer.train()
    ce, distance = [], []
    for ids in seen:  # two micro-batches of as many tokens
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
            mine, theirs = student.eval()(**given), teacher.eval()(**given)
        T = ids.shape[1]
        logits, last = mine.logits[:, -T:], mine.hidden_states[-1][:, -T:]
        ce.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        distance.append((sum(theirs.hidden_states[1:]) - last)[:, :-1].square().mean().sqrt())  # one layer: its mean
    logged = trainer.state.log_history[0]
    assert logged["ce"] == pytest.approx(float(sum(ce) / 2), rel=1e-5)
    assert logged["frobenius"] == pytest.approx(float(sum(distance) / 2), rel=1e-5)
