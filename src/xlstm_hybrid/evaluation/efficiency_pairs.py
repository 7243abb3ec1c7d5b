"""Which pairs of models the command `efficiency` measures, at which lengths: two checkpoints, and random weights in
published shapes.
"""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.environment.precision import rate
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation.efficiency import Settings, Side
from xlstm_hybrid.evaluation.efficiency_checks import checks, load_checkpoint
from xlstm_hybrid.evaluation.equivalence import DTYPES

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "rms_norm_eps", "rope_parameters")
BOTH = {"max_position_embeddings": 131072, "tie_word_embeddings": False}
ROWS = {  # model type, values of FIELDS
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 1e-5, LLAMA3),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 1e-6, {"rope_type": "default", "rope_theta": 1e6}),
}
SHAPES = {  # published configurations: (model type, fields)
    name: (kind, dict(zip(FIELDS, values, strict=True)) | BOTH) for name, (kind, *values) in ROWS.items()
}
SHAPES["llama-3.1-8b"][1]["head_dim"] = 128
# of the checkpoints, where nothing is asked for; and of the shapes, as the paper has them
SMALL = {"lengths": (1024, 4096, 16384), "contexts": (), "batches": (1,)}
LONG = {"lengths": (16384, 32768, 65536), "contexts": (131072,), "batches": (1, 8)}
ON_CPU = (512, 1024, 2048, 4096, 8192, 16384)  # lengths from which a CPU measures as many as `BUDGET` allows
BUDGET = 300  # seconds of a CPU core for all prompts, where no length is asked for
REACHED = 0.5  # share of a product's rate at which a CPU reads prompts: 0.9 in float32 and 0.5 in bfloat16, measured


# --- random weights in published shapes ------------------------------------------------------------------------------


def random_model(shape, role, dtype, device, layers=None, **student):
    """A teacher or student with random weights in one of `SHAPES`; `layers`: fewer than it has; `student`: options of
    `student_config`.
    """
    kind, fields = SHAPES[shape]
    config = AutoConfig.for_model(kind, **fields | ({"num_hidden_layers": layers} if layers else {}))
    config = student_config(config, **student) if role == "student" else config
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in (model._keep_in_fp32_modules_strict or ()):
            parameter.data = parameter.data.float()  # as loading a checkpoint does
    return model.eval()


# --- lengths that a machine affords, and the pairs -------------------------------------------------------------------


def prompt_flops(config, L):
    """FLOPs of a prompt of L tokens for a student's teacher, linear layers and attention; about the student's, too."""
    heads, groups, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    linear = 2 * config.hidden_size * (2 * (heads + groups) * K + 3 * config.intermediate_size)
    return config.num_hidden_layers * L * (linear + 4 * heads * K * (L + 1) / 2)


def affordable(config, rounds, batches, rate):
    """`(lengths, a line on them)`: those of `ON_CPU` that a core of `rate` FLOP/s measures within `BUDGET`."""
    passes = 2 * (rounds + 3) * sum(batches)  # both sides; one to warm up, one for the memory, one before decoding
    seconds = {L: passes * prompt_flops(config, L) / (REACHED * rate) for L in ON_CPU}
    chosen = [L for j, L in enumerate(ON_CPU) if not j or sum(seconds[L] for L in ON_CPU[: j + 1]) <= BUDGET]
    minutes = sum(seconds[L] for L in chosen) / 60
    line = f"prompts of {', '.join(map(str, chosen))} tokens: up to {minutes:.0f} minutes of a core"
    if more := ON_CPU[len(chosen) :]:
        line += f"; {more[0]} would take {seconds[more[0]] / 60:.0f} more, --lengths asks for what you want"
    return tuple(chosen), line


def shape_pair(shape, dtype, device, settings):
    """`(student Side, teacher Side, Settings, checks)` of random weights in a shape; checked on two of its layers."""
    load = partial(random_model, shape, dtype=dtype, device=device)
    sides = [Side(f"{shape} {role}, random weights", partial(load, role)) for role in ("student", "teacher")]
    return *sides, settings, partial(checks, cache=settings.cache, proof=partial(load, "student", layers=2))


def planned_pairs(teacher, student, shapes, dtype, device, cache, asked, say):
    """`(student Side, teacher Side, Settings, checks)` of each pair: the checkpoints, then random weights in each
    shape.

    say: called with a line on what was chosen.
    Raises:
        ConfigError: a STUDENT that is none. EvaluationError: settings or a shape that cannot be used.
    """
    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise EvaluationError(f"--shapes {','.join(unknown)}: expected some of {', '.join(SHAPES)}, or none")
    try:
        config = AutoConfig.from_pretrained(student)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{Path(student).name}: no configuration ({error}); expected a checkpoint directory or hub id"
        ) from error
    if config.model_type != "xlstm_hybrid":
        raise ConfigError(
            f"{Path(student).name}: a {config.model_type} model, expected xlstm_hybrid as STUDENT; TEACHER comes first"
        )

    def settings(default):
        chosen = {name: default.get(name) if value is None else value for name, value in asked.items()}
        return Settings(**chosen, cache=cache)

    small = SMALL
    if torch.device(device).type == "cpu" and asked["lengths"] is None:
        lengths, line = affordable(config, asked["rounds"], asked["batches"] or SMALL["batches"], rate(device, dtype))
        small = SMALL | {"lengths": tuple(L for L in lengths if L not in (asked["contexts"] or ()))}
        say(line)
    load = partial(load_checkpoint, dtype=dtype, device=device)
    sides = [Side(Path(path).resolve().name, partial(load, path)) for path in (student, teacher)]
    plans = [(*sides, settings(small), partial(checks, cache=cache))]
    plans += [shape_pair(shape, dtype, device, settings(LONG)) for shape in shapes]
    return plans
