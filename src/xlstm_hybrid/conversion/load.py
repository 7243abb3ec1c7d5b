"""A checkpoint in memory, with its tokenizer, ready to be asked."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlstm_hybrid.conversion.convert import DTYPES
from xlstm_hybrid.errors import ConfigError


def load(checkpoint, dtype="float32", revision=None, device=None):
    """`(model, tokenizer)` in eval mode on `device`, by default the GPU where there is one; safetensors only, and no
    code from the checkpoint.

    Raises:
        ConfigError: a dtype that we do not know.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"teacher_dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    where = {"revision": revision} if revision and not Path(checkpoint).is_dir() else {}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **where
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **where)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer
