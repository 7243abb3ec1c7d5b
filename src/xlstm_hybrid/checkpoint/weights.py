"""Writing checkpoints as transformers lays them out: weights in one safetensors file, or in shards with an index, and
the settings beside them.
"""

import math
import shutil
from pathlib import Path

from xlstm_hybrid.checkpoint.files import INDEX, SINGLE, inside, read_json, write_json
from xlstm_hybrid.errors import CheckpointError

SHARD_BYTES = 4 * 2**30
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"
# patterns; text, JSON and vocabularies that no program runs: a student directory holds no pickles and no code
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",  # of one version of transformers, where tokenizer_config.json lists several
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    *(f"tokenizer.model.v{version}" for version in (1, 2, 3, 7)),
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "*.tiktoken",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SETTINGS_FILES = (GENERATION, *TOKENIZER_FILES, *PROCESSOR_FILES)
NOT_CARRIED = {"auto_map", "_name_or_path", "name_or_path"}  # keys that name code, or a path of another machine


def using_cache(settings):
    """Settings of config.json or generation_config.json without `use_cache: false`: what training left there, and slow
    in generation.
    """
    return {key: value for key, value in settings.items() if not (key == "use_cache" and value is False)}


def carried(settings):
    """Settings of a tokenizer or processor without keys that name code or a path of another machine."""
    return {key: x for key, x in settings.items() if key not in NOT_CARRIED and not key.endswith("_file")}


def settings_files(directory, tokenizer=False):
    """Names of the files of a checkpoint that say how it is used: generation config, tokenizer, chat templates and
    processor, or of the tokenizer alone; relative to `directory`, in order.

    Raises:
        CheckpointError: a link out of the checkpoint.
    """
    directory, names = Path(directory), []
    for pattern in TOKENIZER_FILES if tokenizer else SETTINGS_FILES:
        names += [path.relative_to(directory).as_posix() for path in sorted(directory.glob(pattern)) if path.is_file()]
    names = list(dict.fromkeys(names))
    if odd := [name for name in names if not inside(directory, directory / name)]:
        raise CheckpointError(
            f"{directory.name}/{odd[0]}: links to a file outside of the checkpoint; replace the link by the file"
        )
    return names


def copy_settings(source, directory, what):
    """Copy generation config, tokenizer, chat templates and processor of checkpoint `what`, without keys that name code
    or a path of another machine; returns the names of the files.
    """
    names = settings_files(source)
    for name in names:
        if name == GENERATION:
            write_json(directory / name, using_cache(read_json(source / name, what)))
        elif name in (TOKENIZER, *PROCESSOR_FILES):
            write_json(directory / name, carried(read_json(source / name, what)))
        else:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, directory / name)
    return names


def plan_shards(sizes, shard_bytes):
    """Names in order, cut into shards of at most `shard_bytes` bytes, or of one tensor that is larger."""
    shards, filled = [], shard_bytes
    for name, size in sizes.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def weight_faults(directory):
    """What is wrong with the weights of a checkpoint directory that is to be copied or shared, in words; reads all of them,
    one tensor at a time.

    An index that is not that of its files, a file that has another name on this machine as well, a damaged header, and
    values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    directory, placed = Path(directory), {}
    if (directory / INDEX).is_file():
        for tensor, name in (read_json(directory / INDEX, directory.name).get("weight_map") or {}).items():
            placed.setdefault(str(name), set()).add(tensor)
    found = {file.name: file for file in sorted(directory.glob("*.safetensors"))}
    for name in sorted(placed.keys() - found.keys()):
        yield f"{INDEX}: places {len(placed[name])} tensors in {name!r}, expected a file beside it"
    for name, file in found.items():
        if (links := file.stat().st_nlink) > 1:
            yield f"{name}: has {links} names on this machine (hard links), and changes with them; copy it"
        try:
            with safe_open(file, framework="pt") as handle:
                stored = set(handle.keys())
                for what, odd in (
                    ("lacks", placed.get(name, set()) - stored),
                    ("holds beside its index", stored - placed.get(name, set())),
                ):
                    if odd and placed:
                        yield f"{name}: {what} {len(odd)} tensors, such as {min(odd)}"
                for tensor in sorted(stored):
                    x = handle.get_tensor(tensor)
                    if x.dtype.is_floating_point and not (x.float() if x.itemsize == 1 else x).isfinite().all():
                        yield f"{name}: {tensor} holds NaN or infinity"
        except (SafetensorError, OSError) as error:
            yield f"{name}: cannot be read ({error})"


def write_weights(directory, shapes, itemsize, make, save, shard_bytes=SHARD_BYTES):
    """Write `model.safetensors`, or shards with an index; one shard is in memory at a time.

    Args:
        shapes: {name: shape}, in the order of writing.
        itemsize: name -> bytes per element.
        make: name -> tensor; called once per name.
        save: writes `{name: tensor}` to a file, see `model.trained.save_weights`.
        shard_bytes: largest file, unless one tensor is larger.
    """
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: n * itemsize(name) for name, n in count.items()}
    shards = plan_shards(sizes, shard_bytes)
    last = len(shards)
    files = [f"model-{j:05}-of-{last:05}.safetensors" for j in range(1, last + 1)] if last > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        save({name: make(name).contiguous() for name in names}, directory / file)
    if last > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values()), "total_parameters": sum(count.values())}
        write_json(directory / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
