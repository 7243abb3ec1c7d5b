"""Checkpoints in memory for inference: every one that the package loads as it is, is loaded here."""

import contextlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import initialization as init

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.files import read_json, weight_files
from xlstm_hybrid.checkpoint.kinds import check_language_model, model_names
from xlstm_hybrid.checkpoint.weights import GENERATION
from xlstm_hybrid.conversion.gguf import gguf_tokenizer, is_gguf, read_gguf
from xlstm_hybrid.conversion.source import local_source
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.errors import CheckpointError, ConfigError, XLSTMHybridError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(dtype, own):
    """The torch dtype that a name or a torch dtype stands for; `own`, the teacher's, for None and "auto"."""
    chosen = own if dtype is None or str(dtype) == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ConfigError(
            f"dtype={dtype!r}: expected None or 'auto' for the teacher's own, or one of {', '.join(DTYPES)}"
        )
    return chosen


def parameter_dtype(name, dtype, model):
    """What parameter `name` of a model, or of any model of a class, is stored in, where the model's dtype is `dtype`: gates
    are float32 at least.
    """
    gate = name.rsplit(".", 1)[-1] in model._keep_in_fp32_modules_strict
    return torch.promote_types(dtype, torch.float32) if gate else dtype


@contextmanager
def named_faults(directory, what):
    """Whatever a library raises for files that are no intact checkpoint, as one CheckpointError; what is missing to the
    library itself (a package, memory) is raised as it is.
    """
    name = Path(directory).name
    try:
        yield
    except (XLSTMHybridError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = first_misfit(directory) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"{name}: {what} cannot be loaded ({reason}); compare the files with those of an intact copy, or make or download it again"
        ) from error


def first_misfit(directory):
    """The first tensor of a checkpoint directory that has another shape by its config.json, in words; None where all fit,
    or one of both cannot be read.
    """
    with contextlib.suppress(Exception):  # the reason that is at hand is told then
        with torch.device("meta"), init.no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        expected = {name: list(x.shape) for name, x in model.state_dict().items()}
        files = weight_files(directory)
        for name, stored in sorted(model_names(files, Path(directory).name).items()):
            with safe_open(files[stored], framework="pt") as handle:
                shape = list(handle.get_slice(stored).get_shape())
            if shape != expected.get(name, shape):
                return f"{name} is {shape} in {files[stored].name}, {expected[name]} by config.json"
    return None


def check_generation(directory, model):
    """Raise CheckpointError for a generation config that cannot be read, which transformers would pass over, and for token
    ids in it that are none.
    """
    directory = Path(directory)
    name, file = directory.name, directory / GENERATION
    if file.is_file():
        read_json(file, name)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model.generation_config, key, None)
        if ids is not None and not all(type(x) is int for x in (ids if isinstance(ids, list) else [ids])):
            raise CheckpointError(
                f"{name}: generation_config.json has {key}={ids!r}, expected an id or a list of ids; correct it"
            )


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
    device = device or device_of()
    if is_gguf(checkpoint):
        return read_gguf(checkpoint, DTYPES[dtype])[0].to(device)
    local = Path(checkpoint).exists()
    directory, name = local_source(checkpoint, None if local else revision), Path(checkpoint).name
    check_language_model(directory, name)
    require_intact(directory)
    model_names(weight_files(directory), name)
    with named_faults(directory, "the model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    check_generation(directory, model)
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
    with named_faults(checkpoint, "the tokenizer"):
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **where)


def load(checkpoint, dtype="float32", revision=None, device=None):
    """`(model, tokenizer)`, see `load_model`."""
    return load_model(checkpoint, dtype, revision, device), load_tokenizer(checkpoint, revision)
