"""Merging experts into one student: streamed, refused when they do not belong together, bitwise the same whatever their
order.
"""

import json
import math
import re
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from xlstm_hybrid.checkpoint.files import (
    INDEX,
    MANIFEST,
    SINGLE,
    add_provenance,
    contained,
    digest,
    read_json,
    read_provenance,
    staged,
    verify_files,
    weight_files,
    write_json,
    write_manifest,
)
from xlstm_hybrid.checkpoint.weights import NOT_CARRIED, SHARD_BYTES, copy_settings, plan_shards, using_cache
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, MergeError
from xlstm_hybrid.merging.methods import MERGES, Statistics, check_options, linear
from xlstm_hybrid.model.trained import header_of, recorded_values
from xlstm_hybrid.recipe.merge_settings import (
    GROUPS,
    NEED_BASE,
    NEED_KEYS,
    NEED_STATISTICS,
    NEED_TWO,
    group_of,
    on_simplex,
)

# config keys in which experts may differ: they change nothing of what a model computes, outside of its training
INDIFFERENT = NOT_CARRIED | {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "window_dropout",
    "pad_token_id",
}
INDIFFERENT |= {
    "attention_dropout",
    "initializer_range",
    "mlstm_chunk_size",
    "output_attentions",
    "output_hidden_states",
}
INDIFFERENT |= {"return_dict", "problem_type", "architectures"}
# a trainer fills these in from the tokenizer: one that is not there is none that differs
FROM_TOKENIZER = {"bos_token_id", "eos_token_id"}
# by safetensors' names
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "BOOL": torch.bool}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
SHOWN = 3  # tokens of a vocabulary that are named


class Checkpoint:
    """A checkpoint directory that is merged: its config, the record of its stages and the headers of its tensors, all
    read at once.

    headers: name -> (dtype by safetensors' name, shape).
    trained: fields that the weights were trained with, as far as their headers say.

    Raises:
        MergeError: a quantised tensor.
        CheckpointError: a file that is missing or damaged; where the directory has a manifest, every file is compared
            with it.
    """

    def __init__(self, directory, stack, weight=None, shares=None):
        self.directory, self.name = Path(directory), Path(directory).resolve().name
        self.weight, self.shares, self.stack, self.files = weight, shares or {}, stack, {}
        self.key, self.statistics = self.name, None
        if (self.directory / MANIFEST).is_file():
            verify_files(self.directory)
        self.file_of = weight_files(self.directory)
        self.config, self.stages = read_json(self.directory / "config.json", self.name), read_provenance(self.directory)
        self.headers = {name: self.header(name) for name in sorted(self.file_of)}
        self.trained = recorded_values(self.files)

    def header(self, name):
        file = self.file_of[name]
        try:
            if file not in self.files:
                self.files[file] = self.stack.enter_context(safe_open(file, framework="pt"))  # mapped, not in memory
            part = self.files[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.name}: {file.name} is damaged or lacks {name} ({error}); copy or download it again"
            ) from error
        if part.get_dtype() not in DTYPES:
            raise MergeError(
                f"{self.name}: tensor {name} is {part.get_dtype()}, expected one of {', '.join(DTYPES)}; merge before quantising"
            )
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name):
        """One tensor, on the CPU."""
        return self.files[self.file_of[name]].get_tensor(name)

    def share(self, name):
        """The expert's weight in the merge of one tensor: that of its module group, where the group has its own."""
        return self.shares.get(group_of(name), self.weight)

    def own_stages(self):
        """Number of stages since the common start: the last ones that are named after an expert (`distill:math`), at
        least one.
        """
        count = 0
        while count < len(self.stages) and ":" in self.stages[-1 - count]["stage"]:
            count += 1
        return max(count, 1)

    def start(self):
        """The stages of the checkpoint that this expert was made of, and the hash of its manifest where that was
        recorded.
        """
        first = self.stages[-self.own_stages()] if self.stages else {}
        return self.stages[: -self.own_stages()], first.get("parent_manifest")

    def vocabulary(self):
        """{token: id} of the checkpoint's tokenizer.json, added tokens too; None where it has none."""
        file = contained(self.directory, "tokenizer.json")
        if not file.is_file():
            return None
        try:
            return Tokenizer.from_file(str(file)).get_vocab()
        except Exception as error:  # the library has no class of its own for it
            raise CheckpointError(
                f"{self.name}: tokenizer.json is not one ({error}); copy it from an intact checkpoint of the same student"
            ) from error


# --- what is refused -------------------------------------------------------------------------------------------


def check_weights(weights, count):
    """`weights` as floats on the simplex, uniform if None; MergeError otherwise."""
    weights = [1 / count] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count or not on_simplex(weights):
        raise MergeError(f"weights {weights}: expected {count} shares of at least 0 whose sum is 1, one per expert")
    return weights


def check_request(experts, out, method, base, options, statistics):
    """Raise MergeError for arguments that describe no merge, CheckpointWriteError where the result would replace what
    it is made of.
    """
    if method not in MERGES:
        raise MergeError(f"method={method!r}: expected one of {sorted(MERGES)}")
    if (base is None) == (method in NEED_BASE):
        step = (
            "takes no base: leave it out"
            if base is not None
            else "needs base: name the checkpoint that all experts started from"
        )
        raise MergeError(f"method={method!r} {step}")
    check_options(method, options)
    if not experts:
        raise MergeError("experts: expected at least one checkpoint directory, got none")
    if method in NEED_TWO and len(experts) != 2:
        raise MergeError(
            f"method={method!r}: expected two experts, got {len(experts)}; merge more of them with another method, or pair by pair"
        )
    expected = len(experts) if method in NEED_STATISTICS else 0
    if len(statistics) != expected:
        step = "one file of `measure_statistics` per expert" if expected else "none: leave them out"
        raise MergeError(f"method={method!r}: {len(statistics)} files of statistics, expected {step}")
    if inside := [Path(d).name for d in experts if Path(d).resolve().is_relative_to(Path(out).resolve())]:
        raise CheckpointWriteError(
            f"{Path(out).name} holds what is to be merged ({', '.join(inside)}): choose another directory for the result"
        )


def mismatches(experts, base=None, unrecorded=False):
    """Every reason why checkpoints cannot be merged, one text each; all are compared with the first."""
    first, wrong = experts[0], []
    for other in [*experts[1:], *([base] if base else [])]:
        wrong += different_configs(first, other)
        wrong += different_starts(first, other, other is base)
        mine, its = first.vocabulary(), other.vocabulary()
        if mine is not None and its is not None and mine != its:
            odd = sorted(t for t in {*mine, *its} if mine.get(t) != its.get(t))
            some = ", ".join(map(repr, odd[:SHOWN]))
            wrong.append(f"vocabulary: {len(odd)} tokens differ between {first.name} and {other.name}, such as {some}")
        for name in sorted(set(first.headers) | set(other.headers)):
            mine, its = first.headers.get(name), other.headers.get(name)
            if mine is None or its is None:
                wrong.append(f"tensor {name}: missing in {first.name if mine is None else other.name}")
            elif mine != its:
                wrong.append(
                    f"tensor {name}: {mine[0]} {list(mine[1])} in {first.name}, {its[0]} {list(its[1])} in {other.name}"
                )
    if not unrecorded and len(experts) > 1 and not any(e.stages for e in experts):
        wrong.append(
            "start: no expert has a provenance.json, so nothing says that heads and neurons stand in the same order; if you know that "
            "they have one start, pass unrecorded=True"
        )
    return wrong + [text for e in experts if e.statistics for text in e.statistics.wrong]


def different_configs(first, other):
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = first.config.get("model_type")
    # a field that a version did not know has this value in it
    default = AutoConfig.for_model(kind).to_dict() if kind in CONFIG_MAPPING else {}
    for key in sorted((set(first.config) | set(other.config)) - INDIFFERENT):
        mine, its = (c.config.get(key, default.get(key)) for c in (first, other))
        if mine != its and not (key in FROM_TOKENIZER and None in (mine, its)):
            yield f"config {key}: {mine!r} in {first.name}, {its!r} in {other.name}"
    for key in sorted(first.trained.keys() & other.trained):
        if (mine := first.trained[key]) != (its := other.trained[key]):
            yield f"config {key}: trained with {mine!r} in {first.name}, with {its!r} in {other.name}"


def different_starts(first, other, is_base):
    """Experts of different starts: their heads, gates and neurons need not stand in the same order, and a mean of them
    means nothing.
    """
    (start, parent), pair = first.start(), f"{first.name} and {other.name}"
    its_start, its_parent = (other.stages, None) if is_base else other.start()
    if is_base and parent and (other.directory / MANIFEST).is_file():
        its_parent = digest(other.directory / MANIFEST)
    if bool(first.stages) != bool(other.stages):
        yield f"start: only {(first if first.stages else other).name} of {pair} has a provenance.json"
    elif start != its_start:
        yield f"start: {pair} do not come from the same checkpoint (their stages before the last one differ)"
    elif parent and its_parent and parent != its_parent:
        yield f"start: {pair} do not come from the same checkpoint (manifest {parent[:12]}... and {its_parent[:12]}...)"


# --- merging ---------------------------------------------------------------------------------------------------


def merge(
    experts,
    out,
    *,
    weights=None,
    method="linear",
    base=None,
    overwrite=False,
    shard_bytes=SHARD_BYTES,
    group_weights=None,
    options=None,
    statistics=None,
    unrecorded=False,
    figures=None,
):
    """Merge expert checkpoints that share one start into a student at `out`; it appears complete or not at all.

    In memory are one tensor per expert, with its statistics, and the result of it. Experts are summed in the order of
    their weights, names and paths, so that the weights of the result do not depend, to the bit, on the order of the
    arguments.

    Args:
        experts: checkpoint directories; config, tokenizer and chat template are taken from the first.
        weights: shares on the simplex, in the order of `experts`; uniform if None.
        method: a key of `methods.MERGES`.
        base: directory of the common start, for methods that need it.
        overwrite: replace what is at `out`.
        shard_bytes: largest file of weights, unless one tensor is larger.
        group_weights: {key of `GROUPS`: shares as in `weights`} for module groups that are weighted otherwise.
        options: of the method, see `methods`.
        statistics: files of `measure_statistics`, in the order of `experts`, for "fisher" (every parameter) and
            "regmean" (weights of linear layers); tensors that they do not cover are merged linearly.
        unrecorded: merge experts of which none has a record of its stages.
        figures: what a search for the weights measured, kept in the record.
    Raises:
        MergeError: everything that does not fit, listed at once; an unknown method or option; weights off the simplex;
            tensors that are not finite.
        CheckpointError, CheckpointWriteError: an expert's files are missing or damaged; see `checkpoint.files.staged`.
    """
    options, statistics, began = dict(options or {}), list(statistics or []), time.monotonic()
    check_request(experts, out, method, base, options, statistics)
    weights, groups = check_weights(weights, len(experts)), group_weights or {}
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise MergeError(f"group_weights: {unknown} are no module groups, expected some of {list(GROUPS)}")
    groups = {group: check_weights(shares, len(experts)) for group, shares in groups.items()}
    with ExitStack() as stack:
        given = [
            Checkpoint(d, stack, w, {g: s[j] for g, s in groups.items()})
            for j, (d, w) in enumerate(zip(experts, weights, strict=True))
        ]
        start = Checkpoint(base, stack) if base is not None else None
        for expert, path in zip(given if statistics else [], statistics, strict=True):
            kind = NEED_STATISTICS[method]
            expert.statistics = Statistics(path, kind, expert.name, expert.directory, expert.headers, stack)
        if wrong := mismatches(given, start, unrecorded):
            raise MergeError(
                f"{len(wrong)} mismatches: {'; '.join(wrong)}. Merge checkpoints of one start and one shape only"
            )
        with staged(out, overwrite, sum(file.stat().st_size for file in given[0].files)) as folder:
            ordered, counts = in_order(given), Counter()
            make = partial(merged, ordered, start, method, options, counts)
            stream_weights(folder, given[0].headers, make, header_of(given[0].trained), shard_bytes)
            carry(given[0], folder)
            record = merge_settings(given, start, method, options, groups, counts)
            # the stages that all experts share, then those of each
            stages = [*given[0].start()[0], *(s for e in given if e.stages for s in e.stages[-e.own_stages() :])]
            seconds = round(time.monotonic() - began, 1)
            add_provenance(folder, "merge", stages=stages, config=record, figures=figures, seconds=seconds)
            write_manifest(folder)


def in_order(experts):
    """Experts in an order that their arguments do not decide; those of one name get distinct keys."""
    ordered = sorted(experts, key=lambda c: (c.weight, sorted(c.shares.items()), c.name, str(c.directory)))
    seen = Counter()
    for expert in ordered:
        seen[expert.name] += 1
        expert.key = expert.name if seen[expert.name] == 1 else f"{expert.name}#{seen[expert.name]}"
    return ordered


def merged(experts, base, method, options, counts, name):
    """One tensor of the result; `counts` says by which method."""
    tensors, start = [expert.tensor(name) for expert in experts], base and base.tensor(name)
    parts = [*tensors, *([start] if base else [])]
    if not all(torch.isfinite(x).all() for x in parts):
        everything = [(c, n) for c in [*experts, *([base] if base else [])] for n in c.headers]
        odd = [f"{c.name}: tensor {n}" for c, n in everything if not torch.isfinite(c.tensor(n)).all()]
        texts = "; ".join(f"{tensor} holds values that are not finite" for tensor in odd)
        raise MergeError(f"{texts}; train these checkpoints again")
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensors[0], t) for t in tensors[1:]):
            raise MergeError(
                f"tensor {name}: {tensors[0].dtype} values differ between experts, and there is no mean of them; make them equal"
            )
        return tensors[0]
    extra = {"keys": [f"{expert.key}/{name}" for expert in experts]} if method in NEED_KEYS else {}
    function = MERGES[method]
    if method in NEED_STATISTICS:
        if all(expert.statistics.key(name) for expert in experts):
            extra = {"statistics": [expert.statistics.tensor(name) for expert in experts]}
        else:
            function, options = linear, {}
    counts[function.__name__] += 1
    result = function(tensors, [expert.share(name) for expert in experts], start, **options, **extra)
    if not torch.isfinite(result).all():
        raise MergeError(f"tensor {name}: the result leaves the range of {result.dtype}; merge in a wider dtype")
    return result


def stream_weights(folder, headers, make, header, shard_bytes=SHARD_BYTES):
    """Write the tensors `make(name)` as one safetensors file, or as shards with an index, with one tensor in memory at
    a time.

    Args:
        headers: name -> (dtype by safetensors' name, shape), in the order in which shards are filled.
        header: metadata of each file, see `model.trained`.
    """
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in headers.items()}
    shards = plan_shards(sizes, shard_bytes)
    files, count = [SINGLE], len(shards)
    if count > 1:
        files = [f"model-{j:05}-of-{count:05}.safetensors" for j in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        # as safetensors writes them: every tensor lies aligned
        names = sorted(names, key=lambda n: (-DTYPES[headers[n][0]].itemsize, n))
        ends = [sum(sizes[n] for n in names[: j + 1]) for j in range(len(names))]
        parts = {
            n: {"dtype": headers[n][0], "shape": list(headers[n][1]), "data_offsets": [end - sizes[n], end]}
            for n, end in zip(names, ends, strict=True)
        }
        content = {"__metadata__": header, **parts}
        head = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                value = make(name)
                assert value.dtype == DTYPES[headers[name][0]] and tuple(value.shape) == headers[name][1], name
                stream.write(value.contiguous().flatten().view(torch.uint8).numpy())
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        count = sum(math.prod(shape) for _, shape in headers.values())
        total = {"total_size": sum(sizes.values()), "total_parameters": count}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


# --- what comes along ------------------------------------------------------------------------------------------


def merge_settings(experts, base, method, options, groups, counts):
    """Settings of a merge for its record; what was left at its default is left out."""
    record = {"method": method, "experts": [{"name": e.name, "weight": e.weight} for e in experts]}
    if base:
        record["base"] = base.name
    if options:
        record["options"] = options
    if groups:
        record["group_weights"] = groups
    return record | ({"tensors": dict(counts)} if method in NEED_STATISTICS else {})


def carry(expert, folder):
    """Copy configuration and tokenizer files, without keys that name code or a path."""
    config = {key: value for key, value in expert.config.items() if key not in NOT_CARRIED}
    write_json(folder / "config.json", using_cache(config))
    copy_settings(expert.directory, folder, expert.name)


def mergekit_architecture(checkpoint):
    """The architecture of a checkpoint as mergekit describes one in JSON (its folder `_data/architectures`): names,
    ties, dtypes that must stay.

    Layers of several types share one template: what some of them lack is optional.
    """
    with ExitStack() as stack:
        given = Checkpoint(checkpoint, stack)
    layers, templates, other = given.config["num_hidden_layers"], Counter(), []
    for name in given.headers:
        template = re.sub(r"\.layers\.\d+\.", ".layers.${layer_index}.", name, count=1)
        if template == name:
            other.append(name)
        templates[template] += template != name

    def entry(name, optional=False):
        more = {"gates": {"force_dtype": "float32"}, "embeddings": {"vocabulary_axis": 0}}.get(group_of(name), {})
        return {"name": name, **({"optional": True} if optional else {}), **more}

    head = {**entry("lm_head.weight", optional=True), "tied_names": ["model.embed_tokens.weight"]}
    first = [entry(n) for n in other if n.startswith("model.embed_tokens")]
    last = [entry(n) for n in other if not n.startswith(("model.embed_tokens", "lm_head.weight"))]
    weights = [entry(n, optional=count < layers) for n, count in sorted(templates.items()) if count]
    return {
        "model_type": given.config["model_type"],
        "architectures": given.config["architectures"],
        "pre_weights": first,
        "num_layers_config_key": "num_hidden_layers",
        "layer_templates": {"weights": weights},
        "post_weights": [*last, head],
    }
