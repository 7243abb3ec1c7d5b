"""A run that can be killed, stopped and resumed: a trainer inherits it from `Resumable`.

    class SomeTrainer(Resumable, SFTTrainer): ...

It puts `checkpoints` in the place of the Trainer's saving and loading, resumes from the newest verified checkpoint,
refuses to resume as another run, saves on SIGTERM, skips a step whose loss or gradient is not finite, adds the
`metrics`, and leaves what `KEPT` names in the model's config as it was. The trainer's `compute_loss` need not look for
NaN.

What the Trainer does otherwise stays: the best model, early stopping, every event of a callback with its arguments,
`eval_on_start`, `save_only_model`, `ignore_data_skip`, `restore_callback_states_from_checkpoint`, `evaluate`,
`predict`, `save_model`. Of its settings it refuses those of `REFUSED`, when it is made, and a search over
hyper-parameters and `push_to_hub()` when they are asked for. The
arguments may have two fields, `max_skipped_steps` (3) and `allow_changes` (none); a trainer may have `run_facts() ->
dict` for the run spec, and `resume_state() -> dict` and `load_resume_state(dict)` for what it has to remember.
"""

import contextlib
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from xlstm_hybrid.checkpoint.files import (
    checkpoints_by_step,
    clean_abandoned,
    newest_verified,
    verify_files,
    write_json,
)
from xlstm_hybrid.checkpoint.tokenizer import check_rows
from xlstm_hybrid.errors import CheckpointError, ConfigError, DataError
from xlstm_hybrid.training import checkpoints, save_weights
from xlstm_hybrid.training import distributed as scale
from xlstm_hybrid.training.losses import IGNORE
from xlstm_hybrid.training.metrics import Insight, Readings
from xlstm_hybrid.training.run_spec import allowed_changes, check_run_spec, run_spec

DUMPS = "non_finite"
SKIPS = 3  # steps in a row
KEPT = "use_cache", "output_router_logits", "router_aux_loss_coef"  # fields of a model's config
SEEN = "seen"  # the collator's note in a batch
REFUSED = {  # settings that a trainer of ours cannot have, and why
    "push_to_hub": "the trainer publishes nothing; share the finished student's directory instead",
    "auto_find_batch_size": "the Trainer would start again with weights that are partly trained, and with other batches than "
    "it notes; ask `xlstm-hybrid plan`, or lower per_device_train_batch_size and raise gradient_accumulation_steps",
    "enable_jit_checkpoint": "the trainer saves on SIGTERM by itself, at the end of a step; leave it out",
}
log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """The run was asked to stop, has saved, and can be resumed. Exit status 143, as of a process that SIGTERM ended."""

    def __init__(self, message):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self):
        return self.message


class Guard(TrainerCallback):
    """What a run looks out for: a loss or gradient that is not finite, and SIGTERM.

    skipped: steps without an update so far.  in_a_row: the last ones of them.  requested: this process got SIGTERM.
    stopping: all know of it.
    began: the step at which training began, or went on.
    """

    def __init__(self, trainer):
        self.trainer, self.skipped, self.in_a_row, self.requested, self.stopping = trainer, 0, 0, False, False
        self.window, self.bad_loss, self.norm, self.began = [], None, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = state.global_step

    def add(self, inputs, loss):
        """Remember one micro-batch of the step and whether its loss was finite, without waiting for the device."""
        bad = ~torch.isfinite(loss).all()
        self.bad_loss = bad if self.bad_loss is None else self.bad_loss | bad
        self.window.append((inputs, loss))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        flags = torch.zeros(2, device=args.device)
        if self.bad_loss is not None:
            flags[0] += self.bad_loss
        if self.norm is not None:
            flags[0] += ~torch.isfinite(torch.as_tensor(self.norm, device=args.device))
        flags[1] += float(self.requested)
        if args.world_size > 1:  # of any process: one small reduction per step
            torch.distributed.all_reduce(flags)
        bad, self.stopping = flags.gt(0).tolist()  # the one place where a step waits for the device
        if bad:
            self.skip(args, state)
        else:
            self.in_a_row = 0
        self.window, self.bad_loss, self.norm = [], None, None

    def skip(self, args, state):
        """Leave parameters and optimiser as they are: an optimiser passes over what has no gradient."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.norm = None if self.norm is None else float(self.norm)
        where = self.dump(args, state)
        # a scaler skips by itself, and insists on gradients
        if getattr(self.trainer.accelerator, "scaler", None) is None:
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        limit = getattr(args, "max_skipped_steps", SKIPS)
        losses = [round(float(loss), 6) for _, loss in self.window]
        what = (
            f"loss or gradient is not finite at step {state.global_step} (losses {losses}, gradient norm {self.norm})"
        )
        if self.in_a_row >= limit:
            last = checkpoints_by_step(args.output_dir)
            raise DataError(
                f"{what}, as in the {limit} steps up to it; their batches are in {DUMPS}/, {checkpoints.remaining(Path(args.output_dir))}: "
                f"lower learning_rate or look at these batches{', then resume' if last else ''}"
            )
        log.warning("%s: no update (%d skipped so far), the batches are in %s", what, self.skipped, where)

    def dump(self, args, state):
        """Write the step's micro-batches, to be looked at and run again; returns the folder's name."""
        folder = Path(args.output_dir) / DUMPS / f"step-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        rank, batches = args.process_index, []
        for n, (inputs, loss) in enumerate(self.window):
            tensors = {name: x.detach().cpu().contiguous().clone() for name, x in inputs.items() if torch.is_tensor(x)}
            if tensors:
                save_file(tensors, folder / f"process-{rank}-batch-{n}.safetensors")
            ids = tensors.get("input_ids", torch.zeros(0))
            digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            batches.append({"loss": repr(float(loss)), "shape": list(ids.shape), "sha256": digest})
        micro = state.global_step * args.gradient_accumulation_steps
        note = {"step": state.global_step, "epoch": state.epoch, "micro_batches": [micro, micro + len(batches)]}
        note |= {"process": rank, "gradient_norm": repr(self.norm), "batches": batches}
        write_json(folder / f"process-{rank}.json", note)
        return f"{DUMPS}/{folder.name}"

    def on_step_end(self, args, state, control, **kwargs):
        if self.stopping:
            control.should_save = control.should_training_stop = True
        return control


@contextlib.contextmanager
def listening(guard):
    """SIGTERM asks the guard to save and stop at the end of the step; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number, frame):
        if guard.requested:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        guard.requested = True

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def choose_checkpoint(trainer, wanted):
    """The verified checkpoint to resume from, or None; `wanted` as in `Trainer.train`: None, a bool or a path.

    Raises:
        CheckpointError: the named checkpoint is damaged, or every checkpoint of the run is.
        ConfigError: it belongs to another run.
    """
    if not wanted:
        return None
    chosen = None
    if trainer.args.should_save:
        try:
            chosen = str(find_checkpoint(trainer, wanted) or "")
        except (CheckpointError, ConfigError) as error:
            chosen = error
    chosen = checkpoints.shared(trainer, chosen)
    if isinstance(chosen, Exception):
        raise chosen
    if not chosen:
        log.warning("%s holds no checkpoint: the run starts from the beginning", Path(trainer.args.output_dir).name)
    return chosen or None


def find_checkpoint(trainer, wanted):
    if wanted is not True:
        verify_files(wanted, "full")
        path = Path(wanted)
    else:
        path, skipped = newest_verified(trainer.args.output_dir)
        for reason in skipped.values():
            log.warning("passed over: %s", reason)
        if path is None and skipped:
            raise CheckpointError(
                f"{Path(trainer.args.output_dir).name}: none of {len(skipped)} checkpoints is whole, the newest: "
                f"{next(iter(skipped.values()))}; remove them to start from the beginning"
            )
        if path is None:
            return None
    allowed = allowed_changes(trainer.args)
    changed = check_run_spec(checkpoints.read_resume(path)["spec"], run_spec(trainer), allowed, path)
    for name, (old, new) in changed.items():
        log.warning("resuming %s although %s was %s and is %s: allowed by allow_changes", path.name, name, old, new)
    return path


@dataclass
class Seen:
    """What a collator saw of a batch on the host, which a trainer would have to wait for on a GPU.

    shape: of the ids.  full: whether no token is padding.
    place: [N] flat positions that predict a scored token, on the CPU; None without labels.
    first: whether one of those tokens is the first of its document.
    """

    shape: tuple
    full: bool
    place: torch.Tensor | None
    first: bool

    @classmethod
    def of(cls, batch):
        ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
        place, first = None, False
        if labels is not None:
            scored = labels[:, 1:] != IGNORE
            place = torch.nn.functional.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
            if "position_ids" in batch:
                first |= bool((scored & (batch["position_ids"][:, 1:] == 0)).any())
            if mask is not None:
                first |= bool((scored & (mask[:, :-1] == 0)).any())
        return cls(tuple(ids.shape), mask is None or bool(mask.all()), place, first)

    def forwarded(self, inputs, names):
        """Those of the batch's `inputs` that a forward takes, by `names`; a mask that masks nothing is none of them."""
        return {name: inputs[name] for name in names if name in inputs and not (self.full and name == "attention_mask")}


class CheckedRows:
    """A collator whose ids all have a row in the embedding; otherwise a ConfigError names the token, see `check_rows`. Its
    batches have a note of what they hold, see `Resumable.look`.
    """

    def __init__(self, collate, tokenizer, rows):
        self.collate, self.tokenizer, self.rows = collate, tokenizer, rows

    def __call__(self, rows):
        batch = self.collate(rows)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if torch.is_tensor(ids) and ids.numel() and int(ids.max()) >= self.rows:
            check_rows(self.tokenizer, self.rows, "student", ids.flatten().tolist())
        if torch.is_tensor(ids) and ids.dim() == 2:
            batch[SEEN] = Seen.of(batch)
        return batch


class Resumable:
    """Saving, loading and watching, in front of TRL's class. It leaves no pickle, writes no card and calls nobody."""

    _save_checkpoint, _load_from_checkpoint = checkpoints.save_checkpoint, checkpoints.load_weights
    _load_optimizer_and_scheduler, _load_rng_state = checkpoints.load_optimizer, checkpoints.load_rng
    _load_best_model, _save = checkpoints.load_best, save_weights

    def __init__(self, model=None, *args, **kwargs):
        settings = [x for x in (*args, *kwargs.values()) if isinstance(x, TrainingArguments)]
        for name, why in REFUSED.items() if settings else ():
            if getattr(settings[0], name, False):
                raise ConfigError(f"{name}=True: {why}")
        config = getattr(model, "config", None)
        wanted = {name: getattr(config, name) for name in KEPT if hasattr(config, name)}
        self.readings, self.seen = Readings(), (None, None)
        super().__init__(model, *args, **kwargs)
        rows = self.model.config.get_text_config().vocab_size
        check_rows(self.processing_class, rows, "student")
        self.data_collator = CheckedRows(self.data_collator, self.processing_class, rows)
        # trainers change them for good, and a checkpoint would say so; a training step asks for what it needs
        for name, value in wanted.items():
            setattr(self.model.config, name, value)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in transformers; goes on from the newest verified checkpoint of the same run where it is asked to resume.

        Raises:
            ConfigError: a trial of a search, or a checkpoint of another run.
            CheckpointError: a checkpoint to resume from, or the best one at the end, that is damaged or has no training
                state.
            DataError: no step was finite.
            Interrupted: SIGTERM came; a checkpoint is written.
        """
        if trial is not None:
            self.hyperparameter_search()  # says no
        scale.prepare_fsdp(self)
        scale.check_precision(self)
        if self.args.should_save:
            clean_abandoned(self.args.output_dir)
        if hasattr(self, "guard"):
            self.remove_callback(self.guard)
        self.guard = Guard(self)
        self.add_callback(self.guard)
        if not any(isinstance(callback, Insight) for callback in self.callback_handler.callbacks):
            self.add_callback(Insight(self))
        checkpoint = choose_checkpoint(self, resume_from_checkpoint)
        with listening(self.guard):
            result = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
        if 0 < self.state.global_step - self.guard.began <= self.guard.in_a_row:
            raise DataError(
                f"none of the {self.guard.in_a_row} steps was finite, nothing was learnt: lower learning_rate, or look at {DUMPS}/"
            )
        if self.guard.stopping and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"stopped by SIGTERM after step {self.state.global_step}, checkpoint-{self.state.global_step} is written: "
                "start the same command again to go on"
            )
        return result

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if isinstance(inputs, Mapping) and SEEN in inputs:  # no input of a model
            self.seen = inputs["input_ids"], inputs.pop(SEEN)
        return inputs

    def look(self, inputs):
        """`Seen` of a batch: what its collator saw; or what can be seen now, where accelerate has cut it for several
        processes, or no collator of ours made it.
        """
        ids, seen = self.seen
        same = ids is inputs["input_ids"] and seen.shape == tuple(ids.shape)
        return seen if same else Seen.of(inputs)

    def training_step(self, model, inputs, *args, **kwargs):
        seen = dict(inputs) if hasattr(inputs, "keys") else {}
        loss = super().training_step(model, inputs, *args, **kwargs)
        seen = getattr(self, "scored_inputs", seen)  # of a trainer whose batches are prompts
        if hasattr(self, "guard"):
            self.guard.add(seen, loss.detach())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if hasattr(self, "guard"):
            self.guard.norm = None if norm is None else checkpoints.unsharded(norm)
        return norm

    def _run_epoch(self, *args, **kwargs):
        # resumed where it ended: the Trainer would make one more step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        # the answer decides whether save_strategy="best" saves; a run that was asked to stop does in any case
        return super()._determine_best_metric(metrics, trial) or self.guard.stopping

    def _finalize_training(self, *args, **kwargs):
        if self.guard.stopping and self.state.global_step < self.state.max_steps:
            # the run will go on: from its newest checkpoint, which must not make room for the best one
            self.state.best_model_checkpoint = None
        elif self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            loaded = self.state.best_model_checkpoint
            if checkpoints.shared(self, best.is_dir()):
                self.state.best_model_checkpoint = str(best)  # a resumed run may have been moved
            else:
                what = "the last weights stay" if loaded is None else f"{Path(loaded).name} is loaded"
                text = "step %d evaluated best and there is no %s: %s; let it save whenever it evaluates"
                log.warning(text, self.state.best_global_step, best.name, what)
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        self.readings.read(mode, self._metrics[mode])
        super().log(logs, start_time)

    def predict(self, *args, **kwargs):
        output = super().predict(*args, **kwargs)
        self._metrics["eval"].clear()  # nothing logs them; the next evaluation would
        self.readings.noted["eval"].clear()
        return output

    def hyperparameter_search(self, *args, **kwargs):
        """Refused: a trial begins with a model of its own, and what this trainer does to a model it does once.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "hyperparameter_search: a trainer of ours holds the one model that it was made for; write the search as a loop "
            "that makes a model and a trainer for each trial, in an output_dir of its own"
        )

    def push_to_hub(self, *args, **kwargs):
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"push_to_hub(): {REFUSED['push_to_hub']}, by `xlstm-hybrid push`")

    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        if self.is_fsdp_enabled:
            stack.enter_context(self.accelerator.autocast())  # parameters stay float32, see `distributed.prepare_fsdp`
        return stack

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card is printed from the provenance of a finished student."""

    def _send_telemetry(self):
        """Nothing."""


def reproduce(folder):
    """The micro-batches of a skipped step, `[{name: tensor}]`, from its folder in `non_finite/`."""
    return [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
