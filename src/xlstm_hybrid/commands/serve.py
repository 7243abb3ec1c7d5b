"""`xlstm-hybrid serve`: transformers' OpenAI-compatible server for a student."""

from typing import Annotated

import torch
import transformers
from typer import Argument, Option

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM


def serve(
    model: Annotated[str, Argument(help="Student: checkpoint directory or hub id. Requests name it in the same way.")],
    host: Annotated[str, Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, Option(help="Port to listen at.")] = 8000,
    device: Annotated[str, Option(help="Where to run: auto, cpu, cuda, cuda:0.")] = "auto",
    dtype: Annotated[str, Option(help="Of the weights; auto: as stored, unless that is slow here.")] = "auto",
    compile: Annotated[bool, Option("--compile", help="Static cache and torch.compile for decoding.")] = False,
    seed: Annotated[int | None, Option(help="Of sampling.")] = None,
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "warning",
):
    """Serve a model with `transformers serve`, an OpenAI-compatible server.

    Chat completions, completions and responses, streamed or not; `transformers chat` talks to it.

    Example: xlstm-hybrid serve runs/tiny/student --port 8000
    """
    require_intact(model)
    # its server finds classes in this namespace, and in no Auto class
    transformers.XLSTMHybridForCausalLM = XLSTMHybridForCausalLM
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype_for(where, None if dtype == "auto" else dtype, stored_dtype(model)) or "auto"
    settings = {"host": host, "port": port, "device": device, "dtype": dtype, "compile": compile}
    try:
        from transformers.cli.serve import Serve  # with packages that not everybody has

        Serve(model, **settings, default_seed=seed, log_level=log_level)
    except ImportError as error:  # transformers' own text names the extra
        raise ConfigError(f"serve: {error}; pip install 'xlstm-hybrid[serve]' brings all of it") from error


def stored_dtype(model):
    """Name of a checkpoint's dtype; None where its configuration does not say, or cannot be read."""
    try:
        found = transformers.AutoConfig.from_pretrained(model).dtype
    except (OSError, ValueError):
        return None
    return found and str(found).removeprefix("torch.")
