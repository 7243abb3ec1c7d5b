"""Many processes: what a trainer and its teacher need under DDP and FSDP2, beyond what accelerate does.

Under FSDP2 parameters stay float32 and are gathered and reduced as such; bfloat16 is the compute type of autocast, as
it is under DDP, so that gates stay in float32 and one process, DDP and FSDP2 calculate the same.
"""

import contextlib
import os
import re
from datetime import timedelta

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from xlstm_hybrid.errors import ConfigError, WaitError

FIRST_SECONDS = 6 * 3600  # that the others wait for what the first process does alone, such as writing a student
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module)(?=\.)")


def plain_name(name):
    """A parameter's name without what DDP, compilation and checkpointing put into it."""
    return WRAPPERS.sub("", name).removeprefix(".")


def fsdp_plugin(trainer):
    return getattr(trainer.accelerator.state, "fsdp_plugin", None)


def prepare_fsdp(trainer):
    """Before training: refuse what would go wrong, and keep FSDP2's parameters and reductions in float32.

    Raises:
        ConfigError: FSDP1, FSDP that accelerate has not switched on, sharded state files (pickles), or DeepSpeed.
    """
    if trainer.is_deepspeed_enabled:
        raise ConfigError("DeepSpeed: checkpoints of ours know DDP and FSDP2; use recipes/accelerate/eight_gpus.yaml")
    plugin = fsdp_plugin(trainer)
    if plugin is None:
        asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and trainer.args.world_size > 1:
            raise ConfigError(
                "FSDP was asked for, and accelerate has not switched it on (it does so on GPUs only): leave it out for DDP"
            )
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version={plugin.fsdp_version}: expected 2; set fsdp_version: 2 in the accelerate config"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ConfigError(
            f"{plugin.state_dict_type}: sharded state files are pickles and belong to one number of processes; "
            "set fsdp_state_dict_type: FULL_STATE_DICT"
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def check_precision(trainer):
    """Before training: all processes calculate in one precision.

    Raises:
        ConfigError: each chose for its machine, and the machines differ.
    """
    if trainer.args.world_size == 1:
        return
    sides = torch.tensor([float(trainer.args.bf16), float(not trainer.args.bf16)], device=trainer.args.device)
    torch.distributed.all_reduce(sides)
    if sides.min() > 0:
        count = f"{int(sides[0])} of {trainer.args.world_size}"
        raise ConfigError(
            f"bf16: {count} processes calculate in bfloat16 and the others in float32, each as its machine is quicker; "
            "expected one precision: set bf16 in the recipe, or --bf16, for all of them"
        )


@contextlib.contextmanager
def first_process_works(what, seconds=None):
    """Around a block in which the first process does something alone; the others wait for it at its end.

    They wait in a group of their own, so that the timeout of training's collectives (10 minutes on GPUs) is not that of
    a large file. In one process it does nothing.

    Args:
        what: words for what is done, for the error.
        seconds: that they wait at most, `FIRST_SECONDS` by default.
    Raises:
        WaitError: in the others: it failed, is gone, or took longer.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    limit = timedelta(seconds=FIRST_SECONDS if seconds is None else seconds)
    group, rank, done = torch.distributed.new_group(backend="gloo", timeout=limit), torch.distributed.get_rank(), False
    try:
        yield
        done = True
    finally:
        try:
            torch.distributed.monitored_barrier(group, limit)
            good = torch.tensor([done], dtype=torch.uint8)
            torch.distributed.broadcast(good, 0, group)
            reason = None if good.item() else "it failed, and says why above"
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
        if reason is not None and done:  # else the block's own error goes on
            raise WaitError(
                f"process {rank} waited up to {limit} for the first one, for {what}: {reason}; nothing half-written is left, "
                "mend what stopped it and start all processes again"
            )


def prepare_teacher(trainer, teacher):
    """A frozen teacher in eval mode: on the trainer's device, and under FSDP2 sharded as the student is. Returns it.

    Call its `forward` only through the module (`teacher(...)`), never that of a part of it: sharded layers gather their
    weights when called.
    """
    teacher = teacher.requires_grad_(False).eval()
    if fsdp_plugin(trainer) is None:
        return teacher.to(trainer.accelerator.device)
    prepare_fsdp(trainer)
    if not isinstance(teacher, FSDPModule):
        mesh = getattr(trainer.accelerator, "torch_device_mesh", None)
        if mesh is not None:
            mesh = mesh[tuple(trainer.accelerator.parallelism_config.fsdp_dim_names)]
        layers = [module for module in teacher.modules() if type(module).__name__ in (teacher._no_split_modules or ())]
        for module in [*layers, teacher]:
            fully_shard(module, mesh=mesh)
    return teacher
