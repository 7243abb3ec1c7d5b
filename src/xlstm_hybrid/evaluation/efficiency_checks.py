"""Teacher and student as `efficiency.measure_pair` takes them: how they are loaded, and what has to be green before anything
is timed.
"""

import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.evaluation.efficiency import Side, measure_pair, new_cache
from xlstm_hybrid.evaluation.equivalence import Result, default_length, verify
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.configuration import PER_LAYER
from xlstm_hybrid.model.generation_checks import bound_of


def load_checkpoint(path, dtype, device):
    """A model for inference; importable, so that another process can load it, too.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    disable_progress_bar()  # every process that measures memory loads anew
    try:
        return load_model(path, dtype, device=device)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{Path(path).name}: cannot be loaded ({error}); expected a checkpoint directory or hub id"
        ) from error


def decoding_difference(model, cache="dynamic", *, length=64, steps=4, seed=0):
    """Largest difference between the logits of what is timed and those of one call without a cache, in standard
    deviations of the latter.

    What is timed: a prompt of `length` tokens, then `steps` tokens one by one, two rows.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (2, length + steps), generator=generator).to(model.device)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, length - 1 :].double()
        how = {**named(new_cache(model, cache, length + steps)), "use_cache": True}
        got = [model(ids[:, :length], **how, logits_to_keep=1).logits]
        got += [model(ids[:, t : t + 1], **how).logits for t in range(length, length + steps)]
    return ((torch.cat(got, 1).double() - want).abs().max() / want.std()).item()


def first_layers(model):
    """A copy of a student with as many of its layers, two at least, as bring one of each layout that it has."""
    config = model.config
    rotates = lambda j: config.rope_layers is None or config.rope_layers[j]  # noqa: E731
    parts = config.window_of, config.sinks_of, config.kept_of, rotates, config.has_experts
    kinds = zip(config.layer_types, config.teacher_layer_types, strict=True)
    layouts = [(*kind, *(part(j) for part in parts)) for j, kind in enumerate(kinds)]
    count, whole = max(2, 1 + max(map(layouts.index, layouts))), model.model.layers
    model.model.layers = whole[:count]
    try:
        short = copy.deepcopy(model)
    finally:
        model.model.layers = whole
    for name in PER_LAYER:
        if (entries := getattr(config, name)) is not None:
            setattr(short.config, name, entries[:count])
    if config.mlp_only_layers is not None:
        short.config.mlp_only_layers = [j for j in config.mlp_only_layers if j < count]
    short.config.num_hidden_layers = len(short.model.layers)
    return short


def checks(student, teacher, cache, proof=None):
    """What is timed against one call without a cache, on both models as they are timed; then `verify` on the student.

    Args:
        proof: what makes a smaller student for `verify`. It is some fifty prompts and a thousand single tokens, ten
            minutes of a CPU core for a hundred million parameters: without a proof a CPU runs it on the student's
            first layers. The names of the results say so.
    """
    length = default_length(student.config)
    for name, model in (("teacher", teacher), ("student", student)):
        begin, difference = time.perf_counter(), decoding_difference(model, cache, length=length)
        allowed, dtype = bound_of(model), str(model.dtype).removeprefix("torch.")
        yield Result(f"{name}: prompt and steps = one call", difference, allowed, dtype, time.perf_counter() - begin)
    subject = proof() if proof else first_layers(student) if student.device.type == "cpu" else student
    count, of = subject.config.num_hidden_layers, student.config.num_hidden_layers
    where = f", {count} of {of} layers" if count < of else ""
    for result in verify(subject):
        yield replace(result, name=result.name + where)


def measure_checkpoints(
    teacher, student, settings, device, *, names=("student", "teacher"), dtype="float32", report=lambda text: None
):
    """What `efficiency.measure_pair` returns for two checkpoints.

    Args:
        teacher, student: directories or hub ids.
        settings: `efficiency.Settings`.
        names: of student and teacher in the report.
    Raises:
        CheckpointError, EvaluationError: see `load_checkpoint` and `efficiency.measure_pair`.
    """
    paths = zip(names, (student, teacher), strict=True)
    sides = [Side(name, partial(load_checkpoint, str(path), dtype, device)) for name, path in paths]
    return measure_pair(*sides, settings, partial(checks, cache=settings.cache), report=report)
