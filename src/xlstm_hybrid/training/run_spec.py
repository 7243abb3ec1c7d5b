"""What a run is: the settings, the data and the model that must be the same when it is resumed."""

import hashlib
import json
import re
from pathlib import Path

from xlstm_hybrid.data.rows import DESCRIBED
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.configuration import MIXER
from xlstm_hybrid.training.distributed import plain_name

# Settings that change what is seen of a run, or where it runs, and nothing of what it learns.
NEUTRAL = re.compile(
    r"(.*_dir|output.*|overwrite.*|do_.*|eval_.*|logging_.*|log_.*|save_.*|report_to|run_name|project|trackio.*|disable_tqdm|hub_.*|push_to_hub.*|.*token"
    r"|load_best.*|metric_for.*|greater_is_better|resume_from.*|restore_callback.*|dataloader_(num_workers|pin.*|persistent.*|prefetch.*|multi.*|in_order)"
    r"|include_.*|remove_unused.*|label_names|debug|ddp_.*|fsdp.*|deepspeed|accelerator_config|parallelism_config|local_rank|use_cpu|no_cuda|device"
    r"|torch_empty_cache.*|skip_memory.*|batch_eval_.*|prediction_loss_only|per_device_eval.*|auto_find.*|gradient_checkpointing.*|activation_.*"
    r"|torch_compile.*|jit_.*|enable_jit.*|allow_changes|max_skipped_steps|plots|insight_.*|.*_kwargs_for_.*|model_init_kwargs|dataset_num_proc)$"
)
SAMPLED_ROWS = 64  # rows whose content is part of the fingerprint


def allowed_changes(args):
    """Names of fields of the run spec that may differ at resume."""
    return tuple(getattr(args, "allow_changes", None) or ())


def short_digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_spec(trainer):
    """`{field: value}`: what the run learns from, how, and what. Plain JSON.

    The data are known by their number of rows and the content of 64 of them, evenly spread. A trainer adds fields of
    its own in `run_facts()`.
    """
    args = trainer.args
    fields = json.loads(json.dumps(args.to_dict(), default=str))
    spec = {name: value for name, value in fields.items() if not NEUTRAL.fullmatch(name)}
    if getattr(args, "bf16_by_machine", False):
        del spec["bf16"]  # nobody asked for it: the run may go on where another precision is quicker
    spec |= {"world_size": args.world_size, "trainer": type(trainer).__name__}
    spec |= {"data": data_digest(trainer.train_dataset), "model": short_digest(model_facts(trainer.model))}
    if hasattr(trainer, "run_facts"):
        spec |= json.loads(json.dumps(trainer.run_facts(), default=str))
    return spec


def model_facts(model):
    """Architecture of a model and the tensors of it that are trained; no weights."""
    config = getattr(model, "config", None)
    fields = {} if config is None else config.to_dict()
    neutral = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "_attn_implementation")
    trained = sorted(plain_name(name) for name, p in model.named_parameters() if p.requires_grad)
    # the Trainer aligns these with the tokenizer's
    fields = {k: v for k, v in fields.items() if k not in neutral and not k.endswith("token_id")}
    fields = {k: v for k, v in fields.items() if not (k in MIXER and v == MIXER[k])}  # older runs know nothing of them
    return {"config": fields, "trained": trained}


def data_digest(dataset):
    """Number of rows and a hash of some; "stream" for what has no length, with the packing of a recipe's chat."""
    try:
        count = len(dataset)
    except TypeError:
        description = getattr(getattr(dataset, "info", None), "description", None) or ""
        return f"stream, {description}" if description.startswith(DESCRIBED) else "stream"
    places = (
        [n * (count - 1) // (SAMPLED_ROWS - 1) for n in range(SAMPLED_ROWS)] if count > SAMPLED_ROWS else range(count)
    )
    rows = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in dataset[n].items()} for n in places]
    return f"{count} rows, {short_digest(rows)}"


def check_run_spec(before, now, allowed, checkpoint):
    """Refuse to resume a run as another one.

    Args:
        before, now: run specs, of the checkpoint and of this run. A field that only one of them has belongs to another
            version of a library.
        allowed: fields that may differ.
    Raises:
        ConfigError: it lists every field that changed, with both values.
    """
    both = sorted(before.keys() & now.keys())
    changed = {name: (before[name], now[name]) for name in both if before[name] != now[name]}
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            f"{Path(checkpoint).name} belongs to another run: {listed}. Resume with the same settings, start in another output_dir, "
            f"or allow it: allow_changes={sorted(refused)}"
        )
    return changed
