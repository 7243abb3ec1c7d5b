"""Merging experts into one student: streamed, refused when they do not belong together, bitwise the same whatever their order."""
import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xlstm_hybrid.artifacts import add_provenance, check_space, read_json, read_provenance, staged, weight_files, write_json, write_manifest
from xlstm_hybrid.errors import CheckpointError, MergeError

CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "merges.txt", "tokenizer.model", "chat_template.jinja")
IGNORED_CONFIG = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


def linear(experts, weights, base=None):
    """sum_e w_e expert_e (model soups, Wortsman et al. 2022), summed in float32 in an order that the caller has fixed."""
    return sum(w * expert.float() for w, expert in zip(weights, experts, strict=True)).to(experts[0].dtype)


def task_arithmetic(experts, weights, base):
    """base + sum_e w_e (expert_e - base), Ilharco et al. 2023, in float32."""
    start = base.float()
    return (start + sum(w * (expert.float() - start) for w, expert in zip(weights, experts, strict=True))).to(base.dtype)


MERGES = {"linear": linear, "task_arithmetic": task_arithmetic}
NEED_BASE = {"task_arithmetic"}


def check_weights(weights, count):
    """`weights` as floats on the simplex, uniform if None; MergeError otherwise."""
    weights = [1 / count] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count or any(not 0 <= w <= 1 for w in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise MergeError(f"weights {weights}: expected {count} shares between 0 and 1 whose sum is 1, one per expert")
    return weights


def shape_of(file, name):
    with safe_open(file, framework="pt") as tensors:
        part = tensors.get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())


def mismatches(directories, files):
    """Every reason why checkpoints cannot be merged, as lines; the first one is what the others are compared with."""
    first, wrong = directories[0], []
    configs = [read_json(d / "config.json", d.name) for d in directories]
    starts = [read_provenance(d) for d in directories]
    shapes = {name: shape_of(file, name) for name, file in files[0].items()}
    for d, config, start, weights in zip(directories[1:], configs[1:], starts[1:], files[1:], strict=True):
        for key in sorted((set(config) | set(configs[0])) - IGNORED_CONFIG):
            if config.get(key) != configs[0].get(key):
                wrong.append(f"config {key}: {first.name} has {configs[0].get(key)!r}, {d.name} has {config.get(key)!r}")
        if start and starts[0] and start[:-1] != starts[0][:-1]:
            wrong.append(f"start: {first.name} and {d.name} do not come from the same checkpoint (their provenance differs before the last stage)")
        wrong += [f"tensor {name}: missing in {d.name}" for name in sorted(set(files[0]) - set(weights))]
        wrong += [f"tensor {name}: missing in {first.name}" for name in sorted(set(weights) - set(files[0]))]
        for name in sorted(set(files[0]) & set(weights)):
            if (found := shape_of(weights[name], name)) != shapes[name]:
                wrong.append(f"tensor {name}: {first.name} has {shapes[name]}, {d.name} has {found}")
    return wrong


def merge(experts, out, *, weights=None, method="linear", base=None, overwrite=False, shard_bytes=4 << 30):
    """Merge expert checkpoints that share one start into a student at `out`.

    Peak memory is one tensor per expert and one shard of the output. Experts are put into the order of their weights and names, so that the
    result does not depend on the order of the arguments, to the bit.

    Args:
        experts: checkpoint directories; config, tokenizer and chat template are taken from the first.
        weights: shares on the simplex, in the order of `experts`; uniform if None.
        method: a key of `MERGES`.  base: the common start, for methods that need it.
    Raises:
        MergeError: everything that does not fit, all at once; a tensor that is not finite; an unknown method.
        CheckpointError, CheckpointWriteError: see `artifacts.staged`.
    """
    if method not in MERGES:
        raise MergeError(f"method={method!r} is not one of {sorted(MERGES)}")
    if method in NEED_BASE and base is None:
        raise MergeError(f"method={method!r} needs base: the checkpoint that all experts started from")
    if not experts:
        raise MergeError("no experts to merge")
    weights = check_weights(weights, len(experts))
    ordered = sorted(zip(weights, map(Path, experts), strict=True), key=lambda pair: (pair[0], pair[1].name))
    shares, directories = [w for w, _ in ordered], [d for _, d in ordered] + ([Path(base)] if base else [])
    files = [weight_files(d) for d in directories]
    if wrong := mismatches(directories, files):
        raise MergeError(f"{len(wrong)} mismatches between the checkpoints:\n  " + "\n  ".join(wrong))
    check_space(out, sum(f.stat().st_size for f in set(files[0].values())))
    with staged(out, overwrite=overwrite) as folder:
        write_shards(folder, merged_tensors(files, shares, method, base is not None), shard_bytes)
        for name in CARRIED:
            if (Path(experts[0]) / name).is_file():
                shutil.copyfile(Path(experts[0]) / name, folder / name)
        add_provenance(folder, "merge", parent=experts[0], figures=None,
                       config={"method": method, "experts": {Path(e).name: w for e, w in zip(experts, weights, strict=True)}},
                       stages=shared_stages(experts))
        write_manifest(folder)


def shared_stages(experts):
    """Provenance of a merge: the stages that all experts share, then the last stage of each."""
    records = [read_provenance(e) for e in experts]
    return [*(records[0][:-1]), *(r[-1] for r in records if r)] if any(records) else []


def merged_tensors(files, shares, method, has_base):
    """Yield (name, merged tensor), one tensor of every checkpoint in memory at a time."""
    for name in sorted(files[0]):
        tensors = []
        for weights in files:
            with safe_open(weights[name], framework="pt") as source:
                tensors.append(source.get_tensor(name))
            if tensors[-1].is_floating_point() and not torch.isfinite(tensors[-1]).all():
                raise MergeError(f"{weights[name].parent.name}: tensor {name} holds values that are not finite; train that expert again")
        base = tensors.pop() if has_base else None
        yield name, (MERGES[method](tensors, shares, base) if tensors[0].is_floating_point() else tensors[0]).contiguous()


def write_shards(folder, tensors, shard_bytes):
    """Save a stream of (name, tensor) as safetensors, with an index where there are several shards."""
    shards, current, size = [], {}, 0
    for name, tensor in tensors:
        if current and size + tensor.nbytes > shard_bytes:
            shards.append(list(current))
            save_file(current, folder / f"part-{len(shards)}", metadata={"format": "pt"})
            current, size = {}, 0
        current[name] = tensor
        size += tensor.nbytes
    shards.append(list(current))
    save_file(current, folder / f"part-{len(shards)}", metadata={"format": "pt"})
    if len(shards) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    if not index:
        raise CheckpointError(f"{folder.name}: no tensors to write")
    total = sum((folder / f).stat().st_size for f in set(index.values()))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
