"""What an on-policy trainer refuses before it begins: models that are no pair, vocabularies that differ, data that does
not fit.
"""

import torch
from datasets import IterableDataset

from xlstm_hybrid.data.vocabulary import shared_size
from xlstm_hybrid.errors import ConfigError


def check_models(student, *teachers):
    """Refuse what is no model in memory, or a teacher that would move with the student."""
    for name, model in ("model", student), *(("teacher", t) for t in teachers):
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"{name}: expected a model in memory, got {type(model).__name__}; load it with from_pretrained"
            )
    places = {p.data_ptr() for p in student.parameters()} - {0}  # 0: a parameter without storage, on the meta device
    shared = next(
        (name for teacher in teachers for name, p in teacher.named_parameters() if p.data_ptr() in places), None
    )
    if shared:
        raise ConfigError(
            f"student and teacher share the weight {shared!r}: the teacher would change with the student; load it a second time"
        )


def size_with(name, student_size, teacher_size, *tokenizers):
    """`shared_size`, whose refusal names the teacher where there are several."""
    try:
        return shared_size(student_size, teacher_size, *tokenizers)
    except ConfigError as error:
        raise ConfigError(f"teacher {name}: {error}") from error if name is not None else error


def check_prompts(dataset, args, names=(None,)):
    """Refuse data that lacks a column which the run needs, names no teacher of it, or is too small for one step."""
    columns, several = getattr(dataset, "column_names", None), names[0] is not None
    for name in (
        "prompt",
        *(("completion",) if args.lmbda < 1 and not args.seq_kd else ()),
        *(("teacher",) if several else ()),
    ):
        if columns is not None and name not in columns:
            needed = f"lmbda={args.lmbda}, seq_kd={args.seq_kd}" + (f", teachers {names}" if several else "")
            raise ConfigError(f"train_dataset has no column {name!r}, only {columns}; {needed} need it")
    if isinstance(dataset, IterableDataset):
        if args.num_generations > 1:
            raise ConfigError(
                f"num_generations={args.num_generations} with a streamed dataset: load the prompts, or set it to 1"
            )
        return
    if several and dataset is not None and (strange := sorted(map(str, {*dataset["teacher"]} - {*names}))):
        raise ConfigError(
            f"train_dataset names the teachers {strange}, expected some of {names}: pass those as well, or leave their rows out"
        )
    prompts = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size // args.num_generations
    )
    if dataset is not None and len(dataset) < prompts:
        raise ConfigError(
            f"train_dataset has {len(dataset)} prompts, one step takes {prompts}: lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
