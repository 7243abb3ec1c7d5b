"""Merging experts into one student: streamed, refused when they do not belong together, bitwise the same whatever their order."""
import math
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from xlstm_hybrid.artifacts import (
    MANIFEST,
    add_provenance,
    check_space,
    contained,
    read_json,
    read_provenance,
    staged,
    verify,
    weight_files,
    write_json,
    write_manifest,
)
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, MergeError
from xlstm_hybrid.weights import GENERATION, SHARD_BYTES, TOKENIZER_FILES, write_weights

NOT_CARRIED = {"auto_map", "_name_or_path", "name_or_path"}  # keys that name code, or a path of another machine
INDIFFERENT = NOT_CARRIED | {"transformers_version", "dtype", "torch_dtype", "use_cache"}  # config keys in which experts may differ
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # per element, by safetensors' names


def linear(experts, weights, base=None):
    """sum_e w_e expert_e, model soups, Wortsman et al. 2022. All tensors share one shape; `base` is not used.

    The sum is in float32 (float64 for float64) and in the order given; the result has the dtype of the first.
    """
    wide = torch.promote_types(experts[0].dtype, torch.float32)
    total = torch.zeros_like(experts[0], dtype=wide)
    for w, expert in zip(weights, experts, strict=True):
        total += w * expert.to(wide)
    return total.to(experts[0].dtype)


def task_arithmetic(experts, weights, base):
    """base + sum_e w_e (expert_e - base), Ilharco et al. 2023. All tensors share one shape; summed like `linear`."""
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide, copy=True)
    for w, expert in zip(weights, experts, strict=True):
        total += w * (expert.to(wide) - base.to(wide))
    return total.to(base.dtype)


MERGES = {"linear": linear, "task_arithmetic": task_arithmetic}
NEED_BASE = {"task_arithmetic"}


class Checkpoint:
    """A checkpoint directory that is merged: its config, the record of its stages and the headers of its tensors, all read at once.

    headers: name -> (dtype by safetensors' name, shape).

    Raises:
        MergeError: a quantised tensor.
        CheckpointError: a file that is missing or damaged; where the directory has a manifest, every file is compared with it.
    """

    def __init__(self, directory, stack, weight=None):
        self.directory, self.name, self.weight, self.stack, self.files = Path(directory), Path(directory).resolve().name, weight, stack, {}
        if (self.directory / MANIFEST).is_file():
            verify(self.directory)
        self.config, self.stages = read_json(self.directory / "config.json", self.name), read_provenance(self.directory)
        self.file_of = weight_files(self.directory)
        self.headers = {name: self.header(name) for name in sorted(self.file_of)}

    def header(self, name):
        file = self.file_of[name]
        try:
            if file not in self.files:
                self.files[file] = self.stack.enter_context(safe_open(file, framework="pt"))  # mapped, not in memory
            part = self.files[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.name}: {file.name} is damaged or lacks {name} ({error}); copy or download it again") from error
        if part.get_dtype() not in BYTES:
            raise MergeError(f"{self.name}: tensor {name} is {part.get_dtype()}, expected one of {', '.join(BYTES)}; merge before quantising")
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name):
        """One tensor, on the CPU; MergeError if a value is not finite."""
        value = self.files[self.file_of[name]].get_tensor(name)
        if not torch.isfinite(value).all():
            raise MergeError(f"{self.name}: tensor {name} holds values that are not finite; train that checkpoint again")
        return value


def check_weights(weights, count):
    """`weights` as floats on the simplex, uniform if None; MergeError otherwise."""
    weights = [1 / count] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count or any(not w >= 0 for w in weights) or not math.isclose(sum(weights), 1, rel_tol=0, abs_tol=1e-6):
        raise MergeError(f"weights {weights}: expected {count} shares of at least 0 whose sum is 1, one per expert")
    return weights


def mismatches(experts, base=None):
    """Every reason why checkpoints cannot be merged, one text each; all are compared with the first."""
    first, wrong = experts[0], []
    start = first.stages[:-1]
    for other in [*experts[1:], *([base] if base else [])]:
        pair = f"{first.name} and {other.name}"
        for key in sorted((set(first.config) | set(other.config)) - INDIFFERENT):
            mine, its = first.config.get(key), other.config.get(key)
            if mine != its:
                wrong.append(f"config {key}: {mine!r} in {first.name}, {its!r} in {other.name}")
        if bool(first.stages) != bool(other.stages):
            wrong.append(f"start: only {(first if first.stages else other).name} of {pair} has a provenance.json")
        elif start != (other.stages if other is base else other.stages[:-1]):
            wrong.append(f"start: {pair} do not come from the same checkpoint (their stages before the last one differ)")
        for name in sorted(set(first.headers) | set(other.headers)):
            mine, its = first.headers.get(name), other.headers.get(name)
            if mine is None or its is None:
                wrong.append(f"tensor {name}: missing in {first.name if mine is None else other.name}")
            elif mine != its:
                wrong.append(f"tensor {name}: {mine[0]} {list(mine[1])} in {first.name}, {its[0]} {list(its[1])} in {other.name}")
    return wrong


def merge(experts, out, *, weights=None, method="linear", base=None, overwrite=False, shard_bytes=SHARD_BYTES):
    """Merge expert checkpoints that share one start into a student at `out`; it appears complete or not at all.

    In memory are one tensor per expert and one shard of the output. Experts are summed in the order of their weights, names and paths, so that
    the weights of the result do not depend, to the bit, on the order of the arguments.

    Args:
        experts: checkpoint directories; config, tokenizer and chat template are taken from the first.
        weights: shares on the simplex, in the order of `experts`; uniform if None.
        method: a key of `MERGES`.
        base: directory of the common start, for methods that need it.
        overwrite: replace what is at `out`.
        shard_bytes: largest file of weights, unless one tensor is larger.
    Raises:
        MergeError: everything that does not fit, listed at once; an unknown method; weights off the simplex; a tensor that is not finite.
        CheckpointError, CheckpointWriteError: an expert's files are missing or damaged; see `artifacts.staged`.
    """
    if method not in MERGES:
        raise MergeError(f"method={method!r}: expected one of {sorted(MERGES)}")
    if (base is None) == (method in NEED_BASE):
        step = "needs base: name the checkpoint that all experts started from" if base is None else "takes no base: leave it out"
        raise MergeError(f"method={method!r} {step}")
    if not experts:
        raise MergeError("experts: expected at least one checkpoint directory, got none")
    if inside := [Path(d).name for d in experts if Path(d).resolve().is_relative_to(Path(out).resolve())]:
        raise CheckpointWriteError(f"{Path(out).name} holds what is to be merged ({', '.join(inside)}): choose another directory for the result")
    weights, began = check_weights(weights, len(experts)), time.monotonic()
    with ExitStack() as stack:
        given = [Checkpoint(d, stack, w) for d, w in zip(experts, weights, strict=True)]
        start = Checkpoint(base, stack) if base is not None else None
        if wrong := mismatches(given, start):
            raise MergeError(f"{len(wrong)} mismatches: {'; '.join(wrong)}. Merge checkpoints of one start and one shape only")
        check_space(out, sum(file.stat().st_size for file in given[0].files))
        with staged(out, overwrite=overwrite) as folder:
            ordered = sorted(given, key=lambda c: (c.weight, c.name, str(c.directory)))
            headers = given[0].headers
            shapes = {name: shape for name, (_, shape) in headers.items()}
            write_weights(folder, shapes, lambda name: BYTES[headers[name][0]], lambda name: merged(name, ordered, start, method), shard_bytes)
            carry(given[0], folder)
            record = {"method": method, "experts": [{"name": c.name, "weight": c.weight} for c in given]}
            record |= {"base": start.name} if start else {}
            add_provenance(folder, "merge", stages=shared_stages(given), config=record, seconds=round(time.monotonic() - began, 1))
            write_manifest(folder)


def merged(name, experts, base, method):
    """One tensor of the result."""
    tensors = [expert.tensor(name) for expert in experts]
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensors[0], t) for t in tensors[1:]):
            raise MergeError(f"tensor {name}: {tensors[0].dtype} values differ between experts, and there is no mean of them; make them equal")
        return tensors[0]
    result = MERGES[method](tensors, [e.weight for e in experts], base and base.tensor(name))
    if not torch.isfinite(result).all():
        raise MergeError(f"tensor {name}: the result leaves the range of {result.dtype}; merge in a wider dtype")
    return result


def shared_stages(experts):
    """Provenance of a merge: the stages that all experts share, then the last one of each."""
    return [*experts[0].stages[:-1], *(e.stages[-1] for e in experts if e.stages)]


def carry(expert, folder):
    """Copy configuration and tokenizer files, without keys that name code or a path."""
    config = {key: value for key, value in expert.config.items() if key not in NOT_CARRIED}
    write_json(folder / "config.json", config)
    for name in (GENERATION, *TOKENIZER_FILES):
        file = contained(expert.directory, name)
        if name == "tokenizer_config.json" and file.is_file():
            kept = {k: v for k, v in read_json(file, expert.name).items() if k not in NOT_CARRIED and not k.endswith("_file")}
            write_json(folder / name, kept)
        elif file.is_file():
            shutil.copyfile(file, folder / name)
