"""Checkpoints in memory for inference: every one that the package loads as it is, is loaded here."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.files import weight_files
from xlstm_hybrid.checkpoint.kinds import check_language_model, model_names
from xlstm_hybrid.conversion.gguf import gguf_tokenizer, is_gguf, read_gguf
from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.errors import CheckpointError, ConfigError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(dtype, own):
    """The torch dtype that a name or a torch dtype stands for; `own`, the teacher's, for None and "auto"."""
    chosen = own if dtype is None or str(dtype) == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ConfigError(
            f"dtype={dtype!r}: expected None or 'auto' for the teacher's own, or one of {', '.join(DTYPES)}"
        )
    return chosen


def parameter_dtype(name, dtype, cls):
    """What parameter `name` of a model of class `cls` is stored in, where the model's dtype is `dtype`: gates are float32
    at least.
    """
    gate = name.rsplit(".", 1)[-1] in cls._keep_in_fp32_modules_strict
    return torch.promote_types(dtype, torch.float32) if gate else dtype


def load_model(checkpoint, dtype="float32", revision=None, device=None):
    """A causal language model in eval mode on `device`, by default the GPU where there is one; of a directory, a hub id
    or a GGUF file; safetensors only, and no code from the checkpoint.

    Raises:
        ConfigError: a dtype that we do not know.
        CheckpointError: no checkpoint of a language model (see `checkpoint.kinds`), or weights that are not those of its
            config.json: what transformers would make up or leave out; or files that are not those of the manifest.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"teacher_dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_gguf(checkpoint):
        return read_gguf(checkpoint, DTYPES[dtype])[0].to(device)
    local = Path(checkpoint).exists()
    directory, name = local_source(checkpoint, None if local else revision), Path(checkpoint).name
    check_language_model(directory, name)
    require_intact(directory)
    model_names(weight_files(directory), name)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    kinds = {"missing": sorted(info["missing_keys"]), "without a place in the model": sorted(info["unexpected_keys"])}
    if any(kinds.values()):
        listed = "; ".join(f"{len(names)} {kind} (the first {names[0]})" for kind, names in kinds.items() if names)
        raise CheckpointError(
            f"{name}: the weights are not those of its config.json ({model.config.model_type}): {listed}; compare the two, or "
            "save the model again"
        )
    return model.eval().to(device)


def load_tokenizer(checkpoint, revision=None):
    """The tokenizer of a directory, a hub id or a GGUF file."""
    if is_gguf(checkpoint):
        return gguf_tokenizer(checkpoint)
    where = {"revision": revision} if revision and not Path(checkpoint).is_dir() else {}
    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **where)


def load(checkpoint, dtype="float32", revision=None, device=None):
    """`(model, tokenizer)`, see `load_model`."""
    return load_model(checkpoint, dtype, revision, device), load_tokenizer(checkpoint, revision)
