"""Two processes calculate what one does, under DDP and FSDP2, and take over each other's checkpoints (gloo, on CPUs)."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from conftest import tiny_student, token_ids
from datasets import Dataset
from test_alignment import collate, tokenizer, trainer_of
from transformers import AutoModelForCausalLM, IntervalStrategy, TrainerCallback
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.checkpoint.files import checkpoints_by_step, verify_files
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.training import checkpoints
from xlstm_hybrid.training import distributed as scale
from xlstm_hybrid.training.resume import Interrupted, Resumable

ROOT = Path(__file__).parents[2]
LENGTH = 24
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
WAYS = {"ddp": {}, "fsdp2": FSDP}


# --- processes -------------------------------------------------------------------------------------------------


def worker(function, rank, world, port, folder, args, kwargs):
    """One process of a group: a fork of this one that takes itself for a fresh one."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    AcceleratorState._reset_state(True), PartialState._reset_state(), GradientState._reset_state()
    if kwargs.get("fsdp"):
        allow_fsdp_on_cpus()
    status = 1
    with open(folder / f"log-{rank}.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            torch.save(function(*args, **kwargs), folder / f"result-{rank}.pt")
            status = 0
        except Interrupted as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
    os._exit(status)


def launch(function, *args, folder, world=2, status=0, **kwargs):
    """Run `function(*args, **kwargs)` in each of `world` processes; their results. `folder` is a new directory for
    them.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=worker, args=(function, rank, world, port, folder, args, kwargs))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [status] * world, (codes, (folder / "log-0.txt").read_text()[-3000:])
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(world)] if status == 0 else None


def allow_fsdp_on_cpus():
    """accelerate switches FSDP on for GPUs only; this does on CPUs what it does there, and all the rest is accelerate's
    own.
    """
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


# --- what they do ----------------------------------------------------------------------------------------------


def padded_rows(count=16):
    """Rows with padding of different lengths, so that micro-batches and processes do not have the same number of
    tokens.
    """
    ids = token_ids(count, LENGTH).tolist()
    return Dataset.from_list(
        [{"input_ids": row, "attention_mask": [1] * (LENGTH - n % 7) + [0] * (n % 7)} for n, row in enumerate(ids)]
    )


class Plain(Resumable, SFTTrainer):
    """TRL's own trainer: all parameters train."""


def student(dtype=torch.float64, **changes):
    return tiny_student(dtype, gain=1.0, layer_types=["hybrid_sliding", "full_attention", "hybrid_sliding"], **changes)


SHARED = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_length": None,
    "disable_tqdm": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "remove_unused_columns": False,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
}


def plain_trainer(folder, tied=False, dtype=torch.float64, **settings):
    model = student(dtype, tie_word_embeddings=tied)
    model.tie_weights()
    args = SFTConfig(**(SHARED | {"output_dir": str(folder)} | settings))
    return Plain(
        model=model, args=args, train_dataset=labelled_rows(), data_collator=collate, processing_class=tokenizer()
    )


def alignment_trainer(folder, dtype=torch.float64, **settings):
    return trainer_of(student(dtype), folder, padded_rows(), learning_rate=1e-2, **settings)


def adopted(trainer):
    """A trainer's class with what `Resumable` gives, once."""
    return trainer if issubclass(trainer, Resumable) else type(trainer.__name__, (Resumable, trainer), {})


def labelled_rows():
    rows = [
        row | {"labels": [i if m else -100 for i, m in zip(row["input_ids"], row["attention_mask"], strict=True)]}
        for row in padded_rows()
    ]
    return Dataset.from_list(rows)


def sparse_kd_trainer(folder, dtype=torch.float64, **settings):
    from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

    args = SparseKDConfig(
        **(SHARED | {"output_dir": str(folder), "top_k": 8, "kl_weight": 0.5, "ce_weight": 0.5} | settings)
    )
    models = {"model": student(dtype), "teacher": tiny_student(dtype, gain=0.7)}
    return adopted(SparseKDTrainer)(
        **models, args=args, train_dataset=labelled_rows(), data_collator=collate, processing_class=tokenizer()
    )


def on_policy_trainer(folder, dtype=torch.float64, **settings):
    """On the data's completions only: what a process samples depends on its rank, so that two cannot give what one
    does.
    """
    from test_on_policy import COMPLETIONS, PROMPTS, word_tokenizer

    from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

    shared = SHARED | {
        "output_dir": str(folder),
        "lmbda": 0.0,
        "max_completion_length": 6,
        "log_completions": False,
        "num_completions_to_print": 0,
    }
    for name in ("max_length", "dataset_kwargs", "remove_unused_columns"):
        shared.pop(name)
    data = Dataset.from_dict({"prompt": PROMPTS * 2, "completion": COMPLETIONS * 2})
    models, args = (student(dtype), tiny_student(dtype, gain=0.7)), OnPolicyKDConfig(**(shared | settings))
    return adopted(OnPolicyKDTrainer)(*models, args=args, train_dataset=data, processing_class=word_tokenizer())


MAKERS = {
    "align": alignment_trainer,
    "plain": plain_trainer,
    "sparse_kd": sparse_kd_trainer,
    "on_policy": on_policy_trainer,
}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sparse_kd", "on_policy")]


def steps(kind, folder, count=3, resume=False, poison=None, stop=None, **settings):
    """Train on steps of 8 rows; losses, the gradients of the first step, and the weights and optimiser at the end."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "max_steps": count,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // world,
    } | settings
    allowed = settings.pop("allow_changes", [])
    trainer = MAKERS[kind](folder, **settings)
    trainer.args.allow_changes = allowed
    gradients, norm = {}, trainer._get_grad_norm

    def watched(model, grad_norm=None):
        if not gradients:
            gradients.update(
                {
                    n: checkpoints.unsharded(p.grad).clone()
                    for n, p in checkpoints.named_parameters(trainer).items()
                    if p.grad is not None
                }
            )
        return norm(model, grad_norm=grad_norm)

    compute_loss = trainer.compute_loss

    def compute(*args, **kwargs):
        if trainer.state.global_step == stop and trainer.args.process_index == 1 and not trainer.guard.requested:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == poison and trainer.args.process_index == 1 else loss

    trainer._get_grad_norm, trainer.compute_loss = watched, compute
    trainer.train(resume_from_checkpoint=resume)
    parameters = checkpoints.named_parameters(trainer)
    tensors, _ = checkpoints.collect_optimizer(trainer, parameters)
    log = [
        {k: v for k, v in entry.items() if k == "loss" or "relative" in k}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if hasattr(trainer, "resume_state"):
        trainer.resume_state()  # every process has to ask
    weights = {name: checkpoints.unsharded(p.detach()).clone() for name, p in parameters.items()}
    return {
        "log": log,
        "gradients": gradients,
        "weights": weights,
        "optimizer": tensors,
        "skipped": trainer.guard.skipped,
        "sharded": sum(hasattr(p, "to_local") for p in parameters.values()),
    }


def near(found, expected, what=("log", "gradients", "weights", "optimizer"), rtol=1e-6, atol=1e-9):
    for name in what:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process, by trainer."""
    found = {}

    def result(kind, **settings):
        key = kind, json.dumps(settings, sort_keys=True)
        if key not in found:
            found[key] = steps(kind, tmp_path_factory.mktemp("alone"), **settings)
        return found[key]

    return result


# --- equal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["align", "plain", *SLOW])
def test_two_processes_give_the_losses_gradients_and_weights_of_one(kind, way, alone, tmp_path):
    """Micro-batches and processes have different numbers of tokens; float64, so that nothing hides in rounding."""
    expected = alone(kind)
    assert len(expected["log"]) == 3 and all(g.abs().sum() > 0 for g in expected["gradients"].values())
    for rank in launch(steps, kind, tmp_path / "run", folder=tmp_path / "group", **WAYS[way]):
        assert rank["gradients"].keys() == expected["gradients"].keys()
        assert rank["sharded"] == (len(expected["weights"]) if way == "fsdp2" else 0)
        near(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"tied": True}], ids=["checkpointing", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_layers_and_tied_embeddings_change_nothing(way, settings, alone, tmp_path):
    expected = alone("plain", **{k: v for k, v in settings.items() if k == "tied"})
    for rank in launch(steps, "plain", tmp_path / "run", folder=tmp_path / "group", **settings, **WAYS[way]):
        near(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms", [{"loss_form": "relative"}, {"cosine_weight": 0.5, "frobenius_weight": 2.0}], ids=["relative", "terms"]
)
@pytest.mark.parametrize("way", WAYS)
def test_other_forms_of_the_alignment_loss_scale_too(way, terms, alone, tmp_path):
    expected, found = (
        alone("align", **terms),
        launch(steps, "align", tmp_path / "run", folder=tmp_path / "group", **terms, **WAYS[way]),
    )
    # the first micro-batch of a process is half of that of two: scales differ a little, and nothing else
    if "loss_form" in terms:
        assert found[0]["log"][0]["layer_0/relative_error"] == pytest.approx(
            expected["log"][0]["layer_0/relative_error"], rel=1e-9
        )
        near(found[0], found[1])
    else:
        near(found[0], expected)


def stops(folder, **settings):
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // world,
        "stop_window": 2,
        "stop_error": 0.02,
    }
    trainer = alignment_trainer(folder, max_steps=6, **settings)
    trainer.train()
    return {
        "stopped": trainer.stopped,
        "weights": {n: checkpoints.unsharded(p.detach()).clone() for n, p in trainer.model.named_parameters()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_layers_stop_early_at_the_same_step_everywhere(way, tmp_path):
    alone, found = stops(tmp_path / "alone"), launch(stops, tmp_path / "run", folder=tmp_path / "group", **WAYS[way])
    assert alone["stopped"] and len(alone["stopped"]) < 2
    for rank in found:
        torch.testing.assert_close(rank["stopped"], alone["stopped"], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            {k.replace("module.", ""): v for k, v in rank["weights"].items()}, alone["weights"], rtol=1e-6, atol=1e-9
        )


def low_precision(folder, **way):
    """One step in bfloat16; `(loss, gradients, dtypes of parameters, gradients and gates)`."""
    result = steps("plain", folder, count=1, dtype=torch.float32, bf16=True, **way)
    dtypes = {
        str(x.dtype)
        for x in (*result["gradients"].values(), *result["weights"].values(), *result["optimizer"].values())
    }
    return result["log"][0]["loss"], result["gradients"], sorted(dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_for_calculating_and_float32_for_weights_gradients_and_their_sums(way, alone, tmp_path):
    truth, (loss, gradients, dtypes) = alone("plain", count=1), low_precision(tmp_path / "one")
    found = launch(low_precision, tmp_path / "run", folder=tmp_path / "group", **WAYS[way])
    for loss2, gradients2, dtypes2 in found:
        assert dtypes == dtypes2 == ["torch.float32"]
        assert loss2 == pytest.approx(truth["log"][0]["loss"], rel=1e-2) and loss != truth["log"][0]["loss"]
        errors = [
            sum((g[n].double() - x).square().sum() for n, x in truth["gradients"].items()) ** 0.5
            for g in (gradients, gradients2)
        ]
        # no worse than one process: sums over processes are not rounded to bfloat16
        assert errors[1] <= 1.1 * errors[0]


# --- checkpoints -----------------------------------------------------------------------------------------------


SAVING = {"save_strategy": "steps", "save_steps": 1}
CHANGES = ["world_size", "gradient_accumulation_steps"]


def differing(folder):
    """Processes on machines of which one is quicker in bfloat16."""
    with pytest.raises(ConfigError) as caught:
        plain_trainer(folder, dtype=torch.float32, bf16=os.environ["RANK"] == "1").train()
    return str(caught.value)


def test_processes_that_would_calculate_in_different_precisions_are_refused_by_all(tmp_path):
    for text in launch(differing, tmp_path / "run", folder=tmp_path / "group"):
        assert (
            text.startswith("bf16: 1 of 2 processes calculate in bfloat16 and the others in float32")
            and "--bf16" in text
        )


def keep_first(folder):
    for path in checkpoints_by_step(folder)[1:]:
        path.rename(path.with_name(f"later-{path.name}"))
    verify_files(folder / "checkpoint-1")


class BestIsTheFirst(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = state.global_step


def best_model(folder, **way):
    """The weights that a run of three steps ends with, and those of each evaluation."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"metric_for_best_model": "score", "greater_is_better": False}
    trainer = plain_trainer(folder, save_total_limit=1, **(settings | way))
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    trainer.args.load_best_model_at_end = True
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
    trainer.add_callback(BestIsTheFirst())
    kept, save = [], trainer._save_checkpoint

    def full():
        parameters = checkpoints.named_parameters(trainer)
        return {name: checkpoints.unsharded(p.detach()).clone() for name, p in parameters.items()}

    trainer._save_checkpoint = lambda *args: kept.append(full()) or save(*args)
    trainer.train()
    return {"end": full(), "kept": kept, "best": Path(trainer.state.best_model_checkpoint).name}


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_end_with_the_best_model(way, tmp_path):
    for rank in launch(best_model, tmp_path / "run", folder=tmp_path / "two", **WAYS[way]):
        assert rank["best"] == "checkpoint-1" and len(rank["kept"]) == 3
        assert all(torch.equal(x, rank["end"][name]) for name, x in rank["kept"][0].items())
        assert not all(torch.equal(x, rank["end"][name]) for name, x in rank["kept"][2].items())
    assert [path.name for path in checkpoints_by_step(tmp_path / "run")] == ["checkpoint-1"]


@pytest.mark.parametrize("way", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", pytest.param("align", marks=pytest.mark.slow), *SLOW])
def test_saved_on_two_resumed_on_one_and_back(kind, way, alone, tmp_path):
    run, expected = tmp_path / "run", alone(kind)
    launch(steps, kind, run, folder=tmp_path / "two", **SAVING, **WAYS[way])
    keep_first(run)
    assert len(json.loads((run / "checkpoint-1" / "rng.json").read_text())["processes"]) == 2
    loaded = AutoModelForCausalLM.from_pretrained(run / "checkpoint-1")  # a checkpoint is a model as well
    assert type(loaded).__name__ == "XLSTMHybridForCausalLM" and loaded.config.architectures == [
        "XLSTMHybridForCausalLM"
    ]
    found = steps(kind, run, resume=True, allow_changes=CHANGES, **SAVING)
    assert len(found["log"]) == 3
    near(found, expected, ("weights", "optimizer"))
    keep_first_of_one(run)
    for rank in launch(
        steps, kind, run, folder=tmp_path / "back", resume=True, allow_changes=CHANGES, **SAVING, **WAYS[way]
    ):
        near(rank, expected, ("weights", "optimizer"))


def keep_first_of_one(run):
    """Leave checkpoint-2, which one process has written."""
    (run / "checkpoint-3").rename(run / "last-checkpoint-3")
    assert len(json.loads((run / "checkpoint-2" / "rng.json").read_text())["processes"]) == 1


def refused(folder, error, **settings):
    """The text of the error that training ends with."""
    try:
        steps("align", folder, **settings)
    except error as found:
        return str(found)


def test_another_number_of_processes_is_a_change_that_has_to_be_named(tmp_path):
    run = tmp_path / "run"
    steps("align", run, count=3, **SAVING)
    keep_first(run)
    for text in launch(refused, run, ConfigError, resume=True, folder=tmp_path / "two", **SAVING):
        assert "gradient_accumulation_steps was 4, is 2; world_size was 1, is 2" in text
    with pytest.raises(CheckpointError, match="generators of 1 processes, this run has 2"):
        args = type("Args", (), {"world_size": 2, "process_index": 0, "allow_changes": None})
        checkpoints.load_rng(type("Trainer", (), {"args": args}), run / "checkpoint-1")


# --- one of them is in trouble ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(way, tmp_path):
    found = launch(steps, "plain", tmp_path / "run", poison=1, folder=tmp_path / "group", **WAYS[way])
    assert [rank["skipped"] for rank in found] == [1, 1]
    assert all(torch.isfinite(x).all() for x in found[0]["weights"].values())
    near(found[0], found[1], ("weights", "optimizer"))
    note = json.loads((tmp_path / "run" / "non_finite" / "step-1" / "process-1.json").read_text())
    assert [batch["loss"] for batch in note["batches"]] == ["nan", "nan"]


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_sigterm_to_one_process_makes_all_of_them_save_and_stop(way, alone, tmp_path):
    run = tmp_path / "run"
    launch(steps, "plain", run, stop=1, folder=tmp_path / "stopped", status=143, **WAYS[way])
    assert [path.name for path in checkpoints_by_step(run)] == ["checkpoint-2"]
    for rank in launch(steps, "plain", run, resume=True, folder=tmp_path / "again", **WAYS[way]):
        near(rank, alone("plain"), ("weights", "optimizer"))


def full_disk(folder):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints.save_file = refuse
    return refused(folder, Exception, **SAVING)


@pytest.mark.slow
def test_a_disk_that_refuses_the_first_process_ends_all_of_them_with_its_reason(tmp_path):
    found = launch(full_disk, tmp_path / "run", folder=tmp_path / "group")
    assert found[0] == found[1] and "could not write checkpoint-1 (No space left on device)" in found[0]


# --- teacher and settings --------------------------------------------------------------------------------------


def teacher_logits(folder, **way):
    """Logits of a prepared teacher on rows that differ between processes, and what it is made of."""
    trainer, rank = plain_trainer(folder, **way), int(os.environ.get("RANK", 0))
    teacher = scale.prepare_teacher(trainer, tiny_student(gain=1.0))
    with torch.no_grad():
        logits = teacher(input_ids=token_ids(2, LENGTH, seed=rank)).logits
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in teacher.parameters())
    return {
        "logits": logits,
        "local": local,
        "frozen": not any(p.requires_grad for p in teacher.parameters()),
        "training": teacher.training,
    }


@pytest.mark.parametrize("way", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_teacher_is_sharded_with_the_student_and_says_the_same(way, tmp_path):
    found, whole = (
        launch(teacher_logits, tmp_path / "run", folder=tmp_path / "group", **WAYS[way]),
        tiny_student(gain=1.0),
    )
    size = sum(p.numel() for p in whole.parameters())
    for rank, result in enumerate(found):
        with torch.no_grad():
            torch.testing.assert_close(
                result["logits"], whole(input_ids=token_ids(2, LENGTH, seed=rank)).logits, rtol=1e-9, atol=1e-9
            )
        assert result["frozen"] and not result["training"] and result["local"] < (0.6 if way == "fsdp2" else 1.1) * size


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("eight_gpus", 8), ("sixty_four_gpus", 64)])
def test_the_accelerate_configs_are_ones_that_accelerate_reads_and_we_accept(name, processes):
    from accelerate.commands.config.config_args import ClusterConfig

    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.num_processes == processes and config.mixed_precision == "bf16"
    fsdp = yaml.safe_load(path.read_text()).get("fsdp_config", {})
    assert (processes == 1) == (not fsdp)
    if fsdp:
        plugin = type(
            "Plugin", (), {"fsdp_version": fsdp["fsdp_version"], "state_dict_type": fsdp["fsdp_state_dict_type"]}
        )
        state = type("State", (), {"fsdp_plugin": plugin})
        trainer = type(
            "Trainer", (), {"is_deepspeed_enabled": False, "accelerator": type("Accelerator", (), {"state": state})}
        )
        scale.prepare_fsdp(trainer)
        assert plugin.mixed_precision_policy.param_dtype is None and plugin.mixed_precision_policy.reduce_dtype is None
        for field, value, said in [
            ("fsdp_version", 1, "expected 2"),
            ("state_dict_type", "SHARDED_STATE_DICT", "FULL_STATE_DICT"),
        ]:
            setattr(plugin, field, value)
            with pytest.raises(ConfigError, match=said):
                scale.prepare_fsdp(trainer)
            setattr(plugin, field, 2 if field == "fsdp_version" else "FULL_STATE_DICT")
