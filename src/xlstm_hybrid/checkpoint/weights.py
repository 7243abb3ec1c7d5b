"""Writing checkpoints as transformers lays them out: weights in one safetensors file, or in shards with an index, and
the settings beside them.
"""

import math
import shutil

from xlstm_hybrid.checkpoint.files import INDEX, SINGLE, contained, read_json, write_json

SHARD_BYTES = 4 * 2**30
GENERATION = "generation_config.json"
TOKENIZER_FILES = (  # plain text and JSON: a student directory holds no pickles and no code
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
NOT_CARRIED = {"auto_map", "_name_or_path", "name_or_path"}  # keys that name code, or a path of another machine


def using_cache(settings):
    """Settings of config.json or generation_config.json without `use_cache: false`: what training left there, and slow
    in generation.
    """
    return {key: value for key, value in settings.items() if not (key == "use_cache" and value is False)}


def copy_settings(source, directory, what):
    """Copy generation config, tokenizer and chat template of checkpoint `what`, without keys that name code or a path
    of another machine; returns the names of the files.
    """
    names = [name for name in (GENERATION, *TOKENIZER_FILES) if contained(source, name).is_file()]
    for name in names:
        if name == GENERATION:
            write_json(directory / name, using_cache(read_json(source / name, what)))
        elif name == "tokenizer_config.json":
            settings = read_json(source / name, what).items()
            settings = {key: x for key, x in settings if key not in NOT_CARRIED and not key.endswith("_file")}
            write_json(directory / name, settings)
        else:
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
