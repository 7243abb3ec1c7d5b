"""Checkpoints in memory for inference: every one that the package loads as it is, is loaded here."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.errors import ConfigError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(dtype, own):
    """The torch dtype that a name or a torch dtype stands for; `own`, the teacher's, for None."""
    chosen = own if dtype is None else DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ConfigError(f"dtype={dtype!r}: expected None for the teacher's own, or one of {', '.join(DTYPES)}")
    return chosen


def parameter_dtype(name, dtype, cls):
    """What parameter `name` of a model of class `cls` is stored in, where the model's dtype is `dtype`: gates are float32
    at least.
    """
    gate = name.rsplit(".", 1)[-1] in cls._keep_in_fp32_modules_strict
    return torch.promote_types(dtype, torch.float32) if gate else dtype


def load_model(checkpoint, dtype="float32", revision=None, device=None):
    """A causal language model in eval mode on `device`, by default the GPU where there is one; safetensors only, and no
    code from the checkpoint.

    Raises:
        ConfigError: a dtype that we do not know.
        CheckpointError: files that are not those of the checkpoint's manifest.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"teacher_dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    require_intact(checkpoint)
    where = {"revision": revision} if revision and not Path(checkpoint).is_dir() else {}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **where
    )
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load(checkpoint, dtype="float32", revision=None, device=None):
    """`(model, tokenizer)`, see `load_model`."""
    where = {"revision": revision} if revision and not Path(checkpoint).is_dir() else {}
    model = load_model(checkpoint, dtype, revision, device)
    return model, AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **where)
