"""What a directory is: the one place that says so, for every command that reads weights.

A checkpoint is read as transformers reads it: `model.safetensors`, or else the shards of its index; config.json beside
them; names of the whole model or of its trunk. Everything else is refused with what it is and what turns it into one.
In the commands of a message DIR is the directory in question, OUT a new one.
"""

import json
import re
from contextlib import suppress
from pathlib import Path

from xlstm_hybrid.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ and ModelOpt
MARKS = (ADAPTER, "params.json", "modules.json", "model_index.json", *QUANTISED)  # small files that tell kinds apart
RESAVE = (
    """python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained({}).save_pretrained('OUT')" """
)
RESAVE = RESAVE.strip() + ", and copy the tokenizer's files to OUT"
# names under which a wrapper of torch or accelerate keeps the model
WRAPPERS = re.compile(r"(?:^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
TRUNK = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")  # what is directly in a model without a head


def check_layout(directory, name=None, files=None, weights=True, config=True):
    """Raise CheckpointError unless a directory is a checkpoint that is read, by the names of its files.

    Args:
        name: what messages call it; its last component.
        files: names of its files, where they are not all in the directory: those of a Hub repository.
        weights, config: whether its weights and its config.json have to be there.
    """
    directory = Path(directory)
    name = name or directory.resolve().name
    if directory.is_file():
        raise CheckpointError(f"{name}: is a file, expected a checkpoint directory; name the directory that holds it")
    files = sorted(path.name for path in directory.iterdir()) if files is None else sorted(files)
    whole = SINGLE in files or INDEX in files
    if ADAPTER in files:
        raise CheckpointError(f"{name}: {adapter(directory, whole)}")
    if "model_index.json" in files:
        raise CheckpointError(
            f"{name}: a diffusers pipeline, expected a language model; if one is in it (its text encoder is not), name "
            "that folder"
        )
    if "modules.json" in files:
        raise CheckpointError(
            f"{name}: a sentence-transformers model, which embeds sentences and has lost its head over tokens; name the "
            "language model that it was made from"
        )
    bare = config and CONFIG not in files
    if bare or (weights and not whole):
        found = other_layout(directory, files)
        if found:
            raise CheckpointError(f"{name}: {found}")
    if bare:
        raise CheckpointError(
            f"{name}: no config.json, expected a checkpoint of transformers; check the path, or download it again"
        )
    if weights and not whole:
        shards = [file for file in files if re.fullmatch(r"model-.*\.safetensors", file)]
        if shards:
            raise CheckpointError(
                f"{name}: expected {SINGLE} or {INDEX}, found neither, but {', '.join(shards[:3])}; download the index as well"
            )
        odd = [file for file in files if file.endswith((".safetensors", ".h5", ".msgpack", ".onnx", ".ot", ".npz"))]
        found = f"{', '.join(odd[:3])}, which is not read; save the model as safetensors with transformers"
        raise CheckpointError(
            f"{name}: expected {SINGLE} or {INDEX}, found {found if odd else 'no weights; download the checkpoint again'}"
        )


def adapter(directory, whole):
    """What a directory with an adapter_config.json is, and the step."""
    base = None
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads((directory / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    nameless = base in (None, "", "None")  # peft writes "None" for a model that was not loaded from a path
    base = "its base model" if nameless else Path(base).name if Path(base).is_absolute() else base
    if whole:
        return (
            f"a model and a PEFT adapter of {base} in one directory, and transformers would load {base} with the adapter; "
            "move the files adapter_* to another directory, or the others"
        )
    if nameless:
        return (
            "a PEFT adapter, not a model of its own, and adapter_config.json does not say of which model: save that model, write its "
            "directory there as base_model_name_or_path, then merge the adapter into it with peft's merge_and_unload()"
        )
    return (
        f"a PEFT adapter of {base}, not a model of its own; merge it into {base} and name OUT instead: "
        'python -c "import xlstm_hybrid; from peft import AutoPeftModelForCausalLM as M; '
        "M.from_pretrained('DIR', dtype='auto').merge_and_unload().save_pretrained('OUT')\", "
        f"and copy the tokenizer's files of DIR or {base} to OUT"
    )


def other_layout(directory, files):
    """What a directory without config.json or without safetensors holds, and the step; None for nothing that we know."""

    def named(pattern):
        return [file for file in files if re.fullmatch(pattern, file)]

    if ggufs := named(r".*\.gguf"):
        return (
            f"holds weights as GGUF ({', '.join(ggufs[:3])}); convert that file: xlstm-hybrid convert DIR/{ggufs[0]} OUT, or "
            f"XLSTMHybridForCausalLM.from_teacher('DIR', gguf_file='{ggufs[0]}')"
        )
    if named(r"consolidated.*\.(pth|safetensors)") or ("params.json" in files and CONFIG not in files):
        return (
            "the original layout of its makers (consolidated weights, params.json), not that of transformers; download the "
            "model's repository in transformers' layout, the one with model.safetensors and config.json"
        )
    if variants := named(r"model\.(safetensors\.index\.)?(?!safetensors)[^.]+\.(safetensors|json)"):
        variant = re.sub(r"-\d+-of-\d+$", "", variants[0].split(".")[-2])
        return (
            f"holds only the variant {variant!r} ({variants[0]}), which transformers reads when asked for it; save it as the "
            "model: " + RESAVE.format(f"'DIR', variant='{variant}', dtype='auto'")
        )
    if named(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?") and CONFIG in files:
        return (
            "holds its weights as pickles (pytorch_model.bin), and only safetensors is read; convert them with "
            "transformers: " + RESAVE.format("'DIR', dtype='auto'")
        )
    if named("zero_to_fp32.py|global_step.*"):
        return "a checkpoint of DeepSpeed; gather it: python DIR/zero_to_fp32.py DIR OUT --safe_serialization"
    if folders := named(r"pytorch_model_fsdp.*|.*\.distcp"):
        inner = f"DIR/{folders[0]}" if not folders[0].endswith(".distcp") else "DIR"
        return f"a sharded checkpoint of FSDP; gather it: accelerate merge-weights {inner} OUT"
    if runs := [file for file in named(r"checkpoint-\d+") if (directory / file).is_dir()]:
        last = max(runs, key=lambda file: int(file.rpartition("-")[2]))
        return (
            f"a run with checkpoints in it ({', '.join(runs[:3])}), no checkpoint itself; name one, such as DIR/{last}"
        )
    if (directory / "snapshots").is_dir():
        return "a folder of the Hub's cache; name the model by its hub id, or a folder in DIR/snapshots"
    # but for what a trainer writes beside a model
    if pickles := named(r"(?!optimizer|scheduler|scaler|rng_state|training_args).*\.(bin|pt|pth|ckpt)"):
        return (
            f"holds {', '.join(pickles[:3])}, and only safetensors is read; if that is a state dict of the model, write it as "
            'safetensors: python -c "import torch; from safetensors.torch import save_file; '
            f"w = torch.load('DIR/{pickles[0]}', weights_only=True); "
            f"save_file({{k: x.clone() for k, x in w.items()}}, 'DIR/{SINGLE}', {{'format': 'pt'}})\", and name DIR again"
        )
    return None


def check_language_model(directory, name=None, files=None, weights=True):
    """Raise CheckpointError unless a directory is a checkpoint (see `check_layout`) of a model over tokens whose weights
    are plain or declared as quantised in config.json.
    """
    directory = Path(directory)
    name = name or directory.resolve().name
    check_layout(directory, name, files, weights)
    config = {}
    with suppress(OSError, ValueError):  # whoever reads it for its values says what is wrong with it
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    config = config if isinstance(config, dict) else {}
    if odd := next(
        (a for a in config.get("architectures") or () if re.search(r"For(?!Causal|Conditional)", str(a))), None
    ):
        raise CheckpointError(
            f"{name}: a {odd}, which has no head over tokens; name a causal language model, such as the one it was made from"
        )
    if "quantization_config" in config:
        return
    present = [file for file in QUANTISED if (directory / file).is_file()]
    if "quantization" in config:  # MLX
        present.append("quantization in config.json")
    if present:
        raise CheckpointError(
            f"{name}: quantised weights ({present[0]}) that transformers does not know from its config.json; start from the "
            "original checkpoint, which the model's card names"
        )


def model_names(stored, name, inner=None):
    """{name in the model: stored name}: those of a trunk get `model.` in front, as in transformers.

    Args:
        inner: what stands in the place of `model.` where the model was saved out of one with pictures.
    Raises:
        CheckpointError: names of a wrapped model or of an adapter, which transformers would ignore; one tensor under two
            names.
    """
    check_names(stored, name)
    found = {}
    for text in stored:
        full = f"model.{text}" if text.startswith(TRUNK) else text
        if inner and full.startswith(inner):
            full = f"model.{full.removeprefix(inner)}"
        if full in found:
            raise CheckpointError(f"{name}: holds both {text} and {found[full]}; remove one of the two")
        found[full] = text
    return found


def check_names(stored, name):
    """Raise CheckpointError for names that transformers would leave out, the weights then being random."""
    for text in stored:
        if "lora_" in text or text.startswith("base_model.model."):
            raise CheckpointError(
                f"{name}: holds tensors of a PEFT model ({text}); save the merged one: model.merge_and_unload()."
                "save_pretrained('OUT')"
            )
        if found := WRAPPERS.search(text):
            raise CheckpointError(
                f"{name}: its tensors are named by a wrapper ({text}), and transformers would leave them out; take the word "
                f'out of the names: python -c "from safetensors.torch import load_file as L, save_file as S; '
                f"S({{k.replace('{found[1]}.', ''): x for k, x in L('DIR/{SINGLE}').items()}}, 'OUT/{SINGLE}', "
                f"{{'format': 'pt'}})\", and copy the other files to OUT; or save the model inside: "
                f"accelerate.utils.extract_model_from_parallel(model, keep_torch_compile=False).save_pretrained('OUT')"
            )
