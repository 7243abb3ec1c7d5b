"""Teacher and student as `efficiency.measure` takes them: how they are loaded, and what has to be green before anything is timed."""

import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.evaluation.efficiency import Side, measure, new_cache
from xlstm_hybrid.evaluation.equivalence import DTYPES, Result, bound, default_length, verify
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.reports.efficiency import surroundings


def load_checkpoint(path, dtype, device):
    """A model for inference; importable, so that another process can load it, too.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    disable_progress_bar()  # every process that measures memory loads anew
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(path).name}: cannot be loaded ({error}); expected a checkpoint directory or hub id") from error


def decoding_difference(model, cache="dynamic", *, length=64, steps=4, seed=0):
    """Largest difference between the logits of what is timed and those of one call without a cache, in standard deviations of the latter.

    What is timed: a prompt of `length` tokens, then `steps` tokens one by one, two rows.
    """
    ids = torch.randint(model.config.vocab_size, (2, length + steps), generator=torch.Generator().manual_seed(seed)).to(model.device)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, length - 1 :].double()
        held = new_cache(model, cache, length + steps)
        got = [model(ids[:, :length], **named(held), use_cache=True, logits_to_keep=1).logits]
        got += [model(ids[:, t : t + 1], **named(held), use_cache=True).logits for t in range(length, length + steps)]
    return ((torch.cat(got, 1).double() - want).abs().max() / want.std()).item()


def checks(student, teacher, cache, proof=None):
    """What is timed against one call without a cache, on both models as they are timed; then `verify` on the student, or on `proof()` for it."""
    length = default_length(student.config)
    for name, model in (("teacher", teacher), ("student", student)):
        begin, difference = time.perf_counter(), decoding_difference(model, cache, length=length)
        allowed, dtype = bound(model.dtype, model.config.num_hidden_layers), str(model.dtype).removeprefix("torch.")
        yield Result(f"{name}: prompt and steps = one call", difference, allowed, dtype, time.perf_counter() - begin)
    yield from verify(proof() if proof else student)


def measure_checkpoints(teacher, student, settings, *, names=("student", "teacher"), dtype="float32", report=lambda text: None):
    """The efficiency report of two checkpoints on the machine at hand, as `efficiency_report` writes it.

    Args:
        teacher, student: directories or hub ids.  settings: `efficiency.Settings`.  names: of student and teacher in the report.
    Raises:
        CheckpointError, EvaluationError: see `load_checkpoint` and `efficiency.measure`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides = [Side(name, partial(load_checkpoint, str(path), dtype, device.type)) for name, path in zip(names, (student, teacher), strict=True)]
    return surroundings(device) | {"pairs": [measure(*sides, settings, partial(checks, cache=settings.cache), report=report)]}
