"""Checkpoints of a running trainer: whole, verified, without pickles, and the same whatever number of processes wrote
them.

A checkpoint directory holds the model (or adapter) as safetensors, `optimizer.safetensors` by parameter name,
`rng.json` with one entry per process, `resume.json` (schedule, optimiser and scaler settings, run spec, what a trainer
adds) and `trainer_state.json`; `manifest.json` lists all of them. Every process takes part in gathering, only the first
one writes.
"""

import base64
import logging
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import set_seed
from transformers.trainer_callback import ExportableState

from xlstm_hybrid.checkpoint.files import (
    FORMAT_VERSION,
    checkpoints_by_step,
    discard,
    read_versioned,
    staged,
    verify_files,
    weight_files,
    write_json,
)
from xlstm_hybrid.checkpoint.files import write_manifest as finish_manifest
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError
from xlstm_hybrid.training.distributed import plain_name
from xlstm_hybrid.training.run_spec import allowed_changes, run_spec

RESUME, RNG, STATE = "resume.json", "rng.json", "trainer_state.json"
OPTIMIZER, TRAINABLE = "optimizer.safetensors", "trainable.safetensors"
ATTEMPTS = 2  # a full disk may be emptied by the removal of our own half-written directory
log = logging.getLogger(__name__)


# --- tensors of all processes ----------------------------------------------------------------------------------


def unsharded(x):
    """The full tensor of a sharded one; every process has to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed(value, like):
    """A full tensor laid out as `like` is: on its device, sharded where it is."""
    value = value.to(like.device)
    if isinstance(like, DTensor) and value.shape == like.shape:
        # every process has read the file
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def named_parameters(trainer):
    """`{name: parameter}` of the trained model, in the form that the optimiser holds."""
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {plain_name(name): p for name, p in trainer.model.named_parameters()}


def is_adapter(model):
    return hasattr(model, "peft_config")


# --- collecting ------------------------------------------------------------------------------------------------


def collect_weights(trainer):
    """`(state dict or None, bytes)`: what `_save` needs beyond the model; a state dict only where the model is sharded."""
    saved = [p for p in trainer.model.parameters() if p.requires_grad or not is_adapter(trainer.model)]
    size = sum(p.numel() * p.element_size() for p in saved)
    if not any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        return None, size
    state, tied = {}, getattr(trainer.model, "all_tied_weights_keys", None) or {}
    for name, value in trainer.model.state_dict().items():
        full = unsharded(value)
        if trainer.args.should_save and plain_name(name) not in tied:
            state[plain_name(name)] = full.cpu()
        del full
    return state, size


def collect_optimizer(trainer, parameters):
    """`(tensors, settings)`: the optimiser's state as `{"<state>/<parameter>": tensor}`, the rest as JSON."""
    optimizer, names = trainer.optimizer, {id(p): name for name, p in parameters.items()}
    tensors, scalars, groups = {}, {}, []
    for group in optimizer.param_groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append(rest | {"params": [names[id(p)] for p in group["params"]]})
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                name = f"{key}/{names[id(p)]}"
                if torch.is_tensor(value):
                    tensors[name] = unsharded(value).detach().cpu().contiguous()
                else:
                    scalars[name] = value
    return tensors, {"groups": groups, "scalars": scalars}


def rng_state(trainer):
    """The generators of this process, as JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "cpu": encoded(torch.get_rng_state())}
    if trainer.args.device.type == "cuda":
        state["cuda"] = encoded(torch.cuda.get_rng_state(trainer.args.device))
    return state


def encoded(x):
    return base64.b64encode(x.numpy().tobytes()).decode()


def decoded(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def scaler_of(trainer):
    """The gradient scaler of float16, or None."""
    return getattr(trainer.accelerator, "scaler", None)


def gather_objects(trainer, value):
    """One entry per process, on every process."""
    if trainer.args.world_size == 1:
        return [value]
    entries = [None] * trainer.args.world_size
    torch.distributed.all_gather_object(entries, value)
    return entries


def shared(trainer, value):
    """The first process's value, on every process."""
    return gather_objects(trainer, value)[0]


def not_finite_parameters(trainer, parameters):
    """Names of trained tensors, on any process, that hold NaN or infinity."""
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters.items() if p.requires_grad}
    if not local:
        return []
    fine = torch.stack([torch.isfinite(p.detach()).all() for p in local.values()]).tolist()
    bad = [name for name, ok in zip(local, fine, strict=True) if not ok]
    return sorted({name for names in gather_objects(trainer, bad) for name in names})


# --- saving ----------------------------------------------------------------------------------------------------


def save_checkpoint(trainer, model, trial=None):
    """`Trainer._save_checkpoint`: the state after an optimiser step, as a directory that is complete or not there. The
    best one so far is noted, for `load_best_model_at_end` and the rotation.

    Raises:
        CheckpointWriteError: a trained tensor is not finite, or the disk refused twice; earlier checkpoints are
            untouched.
    """
    assert trainer.accelerator.sync_gradients, "in the middle of an accumulation half of a gradient would be lost"
    run = Path(trainer._get_output_dir(trial=trial))
    target = run / f"checkpoint-{trainer.state.global_step}"
    trainer.store_flos()
    parameters = named_parameters(trainer)
    if bad := not_finite_parameters(trainer, parameters):
        raise CheckpointWriteError(
            f"{target.name}: {len(bad)} trained tensors are not finite, the first is {bad[0]}; it is not written, "
            f"{remaining(run)}: lower learning_rate, or look at the data of the last steps"
        )
    best_before = trainer.state.best_model_checkpoint
    if trainer.state.best_global_step:
        best = run / f"checkpoint-{trainer.state.best_global_step}"
        if best == target or shared(trainer, best.is_dir()):
            trainer.state.best_model_checkpoint = str(best)
    contents = gather_contents(trainer, parameters)
    error = write_checkpoint(trainer, target, contents) if trainer.args.should_save else None
    # with save_on_each_node several processes write
    if error := next((text for text in gather_objects(trainer, error) if text), None):
        trainer.state.best_model_checkpoint = best_before
        raise CheckpointWriteError(error)


def gather_contents(trainer, parameters):
    """Everything that goes into a checkpoint; all processes take part."""
    weights, size = collect_weights(trainer)
    trained = {name: p for name, p in parameters.items() if p.requires_grad} if is_adapter(trainer.model) else {}
    contents = {"weights": weights}
    contents["trainable"] = {name: unsharded(p.detach()).cpu().contiguous() for name, p in trained.items()}
    if not trainer.args.save_only_model:
        tensors, settings = collect_optimizer(trainer, parameters)
        contents |= {"optimizer": tensors, "rng": gather_objects(trainer, rng_state(trainer))}
        contents["resume"] = {
            "format_version": FORMAT_VERSION,
            "step": trainer.state.global_step,
            "spec": run_spec(trainer),
            "optimizer": settings,
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if (scaler := scaler_of(trainer)) else None,
            "skipped_steps": trainer.guard.skipped if hasattr(trainer, "guard") else 0,
            "extra": trainer.resume_state() if hasattr(trainer, "resume_state") else {},
        }
        size += sum(x.numel() * x.element_size() for x in tensors.values())
    return contents | {"bytes": size}


def write_checkpoint(trainer, target, contents):
    """Write, commit, verify, rotate; the text of an error, or None."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with staged(target, overwrite=True, needed=int(1.02 * contents["bytes"])) as folder:
                write_contents(trainer, folder, contents)
                finish_manifest(folder)
            break
        except (CheckpointWriteError, CheckpointError) as error:
            if attempt == ATTEMPTS:
                return f"{error}; {remaining(target.parent)}"
            log.warning("%s; trying once more", error)
    rotate(target, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
    return None


def write_contents(trainer, folder, contents):
    trainer._save(str(folder), state_dict=contents["weights"])
    if contents["trainable"]:
        save_file(contents["trainable"], folder / TRAINABLE)
    if "resume" in contents:
        save_file(contents["optimizer"], folder / OPTIMIZER)
        write_json(folder / RNG, {"format_version": FORMAT_VERSION, "processes": contents["rng"]})
        try:
            write_json(folder / RESUME, contents["resume"])
        except TypeError as error:
            raise ConfigError(
                f"the optimiser or its schedule keeps a state that JSON has not ({error}): choose another optim"
            ) from error
    states = {}  # of stateful callbacks, as the Trainer stores them
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    trainer.state.stateful_callbacks = {name: of if len(of) > 1 else of[0] for name, of in states.items()}
    trainer.state.save_to_json(str(folder / STATE))


def remaining(run):
    """Words for what an unhappy run still has."""
    names = [path.name for path in checkpoints_by_step(run)]
    return f"{names[-1]} is kept" if names else "there is no earlier checkpoint"


def rotate(newest, limit, best=None):
    """Delete the oldest checkpoints until `limit` are left, never the newest one, which is read back first, or the best."""
    spared = {newest.name, *([] if best is None else [Path(best).name])}
    found = checkpoints_by_step(newest.parent)
    others = [path for path in found if path.name not in spared]
    surplus = len(found) - max(limit or 0, len(found) - len(others))
    if not limit or limit < 1 or surplus < 1:
        return
    try:
        verify_files(newest, level="full")
    except CheckpointError as error:
        log.warning("no checkpoint is deleted: the newest one cannot be read back (%s)", error)
        return
    for path in others[:surplus]:
        discard(path)


# --- loading ---------------------------------------------------------------------------------------------------


def read_resume(checkpoint):
    """The `resume.json` of a checkpoint; CheckpointError where there is none."""
    if not (Path(checkpoint) / RESUME).is_file():
        raise CheckpointError(
            f"{Path(checkpoint).name}: no {RESUME}, it holds a model and no training state; resume from another checkpoint"
        )
    return read_versioned(Path(checkpoint) / RESUME, Path(checkpoint).name)


@torch.no_grad()
def load_weights(trainer, checkpoint, model=None):
    """`Trainer._load_from_checkpoint`: every tensor of the model, with adapters of its trained part.

    Raises:
        CheckpointError: a tensor that is missing, unexpected or of another shape.
    """
    checkpoint, model = Path(checkpoint), trainer.model if model is None else model
    adapter = is_adapter(model)
    state = {plain_name(name): x for name, x in (model.named_parameters() if adapter else model.state_dict().items())}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = {name for name, x in state.items() if (x.requires_grad if adapter else name not in tied)}
    if adapter:
        with safe_open(checkpoint / TRAINABLE, framework="pt") as file:
            files = dict.fromkeys(file.keys(), checkpoint / TRAINABLE)
    else:
        files = weight_files(checkpoint)
    wrong = [f"{name} is missing" for name in sorted(wanted - set(files))]
    wrong += [f"{name} is unknown" for name in sorted(set(files) - set(state))]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.name}: {len(wrong)} tensors do not fit the model, the first: {wrong[0]}; resume with the same model"
        )
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name in files if files[name] == path):
                value = file.get_tensor(name)
                if value.shape != state[name].shape:
                    raise CheckpointError(
                        f"{checkpoint.name}: {name} is {list(value.shape)}, expected {list(state[name].shape)}; "
                        "resume with the same model"
                    )
                state[name].copy_(placed(value, state[name]))


def load_best(trainer):
    """`Trainer._load_best_model`: the weights of the checkpoint that evaluated best, once it is verified."""
    verify_files(trainer.state.best_model_checkpoint, "full")
    load_weights(trainer, trainer.state.best_model_checkpoint)


def load_optimizer(trainer, checkpoint):
    """`Trainer._load_optimizer_and_scheduler`, by parameter name, so that the number of processes may differ.

    Raises:
        CheckpointError: the checkpoint's optimiser trains other parameters.
    """
    if checkpoint is None:
        return
    saved = read_resume(checkpoint)
    settings, names = saved["optimizer"], {id(p): name for name, p in named_parameters(trainer).items()}
    mine = [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]
    theirs = [group["params"] for group in settings["groups"]]
    if [sorted(group) for group in mine] != [sorted(group) for group in theirs]:
        ours, other = {n for g in mine for n in g}, {n for g in theirs for n in g}
        first = sorted(ours ^ other)[:1] or ["their grouping"]
        raise CheckpointError(
            f"{Path(checkpoint).name}: its optimiser trains {len(other)} tensors, this run {len(ours)}, the first difference is "
            f"{first[0]}; resume with the same trained parameters"
        )
    index = {name: n for n, name in enumerate(name for group in mine for name in group)}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state = {}
    with safe_open(Path(checkpoint) / OPTIMIZER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            value = file.get_tensor(key)
            value = value if kind == "step" else placed(value, parameters[index[name]])
            state.setdefault(index[name], {})[kind] = value
    for key, value in settings["scalars"].items():
        kind, _, name = key.partition("/")
        state.setdefault(index[name], {})[kind] = value
    groups = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in settings["groups"]]
    for group, members in zip(groups, mine, strict=True):
        group["params"] = [index[name] for name in members]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.lr_scheduler.load_state_dict(saved["scheduler"])
    # a scaler starts again where another precision wrote the checkpoint
    if (scaler := scaler_of(trainer)) and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    if hasattr(trainer, "guard"):
        trainer.guard.skipped = saved["skipped_steps"]
    if hasattr(trainer, "load_resume_state"):
        trainer.load_resume_state(saved["extra"])


def load_rng(trainer, checkpoint):
    """`Trainer._load_rng_state`. With another number of processes all generators start from a seed of the step.

    Raises:
        CheckpointError: no `rng.json`, or one of another number of processes without `allow_changes` naming world_size.
    """
    if checkpoint is None:
        return
    name, rank, count = Path(checkpoint).name, trainer.args.process_index, trainer.args.world_size
    states = read_versioned(Path(checkpoint) / RNG, name)["processes"]
    if len(states) != count:
        if "world_size" not in allowed_changes(trainer.args):
            raise CheckpointError(
                f"{name}: {RNG} has generators of {len(states)} processes, this run has {count}; "
                "start as many, or add world_size to allow_changes"
            )
        seed = trainer.args.seed + 1_000_003 * trainer.state.global_step + rank
        text = "%s was written by %d processes, now %d: generators start from seed %d"
        log.warning(text, name, len(states), count, seed)
        set_seed(seed)
        return
    state = states[rank]
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(decoded(state["cpu"]))
    if "cuda" in state and trainer.args.device.type == "cuda":
        torch.cuda.set_rng_state(decoded(state["cuda"]), trainer.args.device)
