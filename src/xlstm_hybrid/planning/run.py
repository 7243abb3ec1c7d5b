"""What a run will need before it starts: memory per process, time, disk, and the settings that fit. From the teacher's
config.json alone.

Parameters are counted on the meta device, memory is that of `training_bytes`. What is said of a GPU is an estimate:
tokens per second are FLOPs times a utilisation that is assumed.

Dims: B rows per process, T tokens of a row, N = B T, D hidden size, F width of the MLP, H and G query and key/value
heads, K head dim, L layers,
V vocabulary, M teacher entries kept per token. Bytes unless a name says otherwise.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

from xlstm_kernels.backends.launch import LARGEST_F, LARGEST_K

from xlstm_hybrid.checkpoint.kinds import check_language_model
from xlstm_hybrid.conversion.convert import empty_student
from xlstm_hybrid.conversion.families import family_of, student_config
from xlstm_hybrid.conversion.gguf import gguf_config, is_gguf
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.model.configuration import LINEAR
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.planning.cache_size import cache_bytes
from xlstm_hybrid.planning.training_memory import BF16, ERROR, FP32, training_bytes
from xlstm_hybrid.teacher_store import store_bytes

# peak dense bfloat16 FLOP/s, from the vendor's data sheets
GPUS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
STORE = "distill from a store"
MICRO = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Shape:
    """Sizes of a student and its teacher.

    hybrid: layers that are hybrid_sliding.  teacher, student, new: numbers of parameters; layer: of one decoder layer;
    head: of the LM head; matmul: of all matrices that every token is multiplied with, the LM head left out.  columns: of
    a head's feature map.  features: of a head, which the memory's state has rows for.  idle: parameters of experts that a
    token does not go through, which are in no count of FLOPs.  routed: how many experts it goes through, beside a shared
    one; F is their width together.  linear: layers of linear attention; recurrence: FLOPs per token of each one's memory.
    """

    name: str
    L: int
    hybrid: int
    D: int
    F: int
    H: int
    G: int
    K: int
    V: int
    window: int
    chunk: int
    teacher: int
    student: int
    new: int
    layer: int
    head: int
    matmul: int
    tied: bool
    columns: int
    features: int
    idle: int = 0
    routed: int = 0
    linear: int = 0
    recurrence: int = 0


@dataclass(frozen=True)
class Machine:
    """gpus: processes, one each.  memory: of each, of which `reserve` stays free (context, fragmentation).  flops: peak
    of each, FLOP/s.
    utilisation: share of the peak that training reaches, an assumption: measure it, and say so.
    """

    gpus: int
    memory: float
    flops: float = GPUS["h100"]
    utilisation: float = 0.35
    reserve: float = 0.08
    device: str = "cuda"

    @property
    def room(self):
        return self.memory * (1 - self.reserve)


@dataclass(frozen=True)
class Job:
    """What a stage does. kind: "align" or "distill".  sequences: rows per step over all processes.  top_k: entries
    kept, M.
    """

    kind: str
    steps: int
    sequences: int
    length: int
    top_k: int = 256
    experts: int = 1
    bf16: bool = True
    teacher_bytes: int = FP32  # per parameter of the teacher while it teaches
    stored: bool = False  # the teacher's targets come from a store
    train: str = "all"

    @property
    def tokens(self):
        """Of one expert."""
        return self.steps * self.sequences * self.length


@dataclass(frozen=True)
class Setting:
    """One way to run a stage: rows per process and micro-step, micro-steps per step, checkpointing, and how processes
    share the work.
    """

    micro: int
    accumulation: int
    checkpointing: bool
    strategy: str


@dataclass
class Estimate:
    """What one setting costs. memory: {part: bytes} of a process; seconds: of all experts; fits: below the machine's
    room.
    """

    setting: Setting
    memory: dict
    tokens_per_second: float
    seconds: float
    fits: bool

    @property
    def peak(self):
        return sum(self.memory.values())


def machine_of(gpus, memory, gpu="h100", flops=None, utilisation=0.35):
    """`Machine` from its parts.

    Raises:
        ConfigError: a kind of GPU whose peak we do not know, or numbers that describe no machine.
    """
    if flops is None and gpu.lower() not in GPUS:
        raise ConfigError(
            f"gpu={gpu!r}: we know the peak of {', '.join(GPUS)}; give its bfloat16 TFLOP/s with --tflops"
        )
    if gpus < 1 or not memory > 0 or not 0 < utilisation <= 1 or (flops is not None and not flops > 0):
        raise ConfigError(
            f"{gpus} GPUs of {human(memory)}, utilisation {utilisation}: expected at least one, some memory, and a share above 0"
        )
    return Machine(gpus, memory, flops or GPUS[gpu.lower()], utilisation)


# --- sizes -----------------------------------------------------------------------------------------------------


def read_config(teacher, revision=None):
    """The configuration of a teacher, of a directory or of the Hub; its weights need not be there.

    Raises:
        CheckpointError: none there, or the Hub gave none.  UnsupportedTeacherError: a family that we cannot convert.
    """
    from transformers import AutoConfig

    if is_gguf(teacher):
        config = gguf_config(teacher)
        family_of(config)
        return config
    if Path(teacher).exists():
        check_language_model(teacher, weights=False)
    where = {"revision": revision} if revision and not Path(teacher).exists() else {}
    try:
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"teacher {Path(teacher).name}: no configuration ({reason}); expected a directory with config.json, or a Hub id "
            "and a network"
        ) from error
    family_of(config)
    return config


def config_of(teacher_config, student):
    """The student's config from the arguments of `convert`."""
    return student_config(teacher_config, **{k: v for k, v in student.items() if k not in ("dtype", "shard_bytes")})


def student_shape(teacher_config, name="teacher", **student):
    """`Shape` of a teacher's student; arguments of `student_config`.

    Raises:
        ConfigError: a mixer whose memory was not measured. Choices that need less are planned as the default; the
            tensors of a `mixer_norm`, two in float32 of the size of its input, are not counted.
    """
    config = config_of(teacher_config, student)
    if config.sparse_memory:
        raise ConfigError(
            f"sparse_memory={config.sparse_memory}: bytes of training were measured without one; plan with 0, and measure one step"
        )
    if config.memory_cell == "delta" or config.mixer_combine == "joint":
        raise ConfigError(
            f"memory_cell={config.memory_cell!r}, mixer_combine={config.mixer_combine!r}: bytes were measured for the mLSTM and linear "
            "attention beside a gate; plan without these choices, and measure one step of the run"
        )
    model, c = empty_student(config), config
    count = {n: p.numel() for n, p in model.named_parameters() if n not in model.all_tied_weights_keys}
    new = sum(p.numel() for m in model.modules() if isinstance(m, MLSTMMixer) for p in m.parameters(recurse=False))
    layers = range(c.num_hidden_layers)
    layer = max(sum(n for key, n in count.items() if key.startswith(f"model.layers.{j}.")) for j in layers)
    inside = [(n, p) for n, p in model.named_parameters() if n.startswith("model.layers.")]
    experts = sum(p.numel() for n, p in inside if ".mlp.experts." in n)
    idle = experts - experts * c.num_experts_per_tok // c.num_experts if experts else 0
    matmul = sum(p.numel() for n, p in inside if p.ndim == 2 and ".mlstm." not in n) + experts - idle
    routed = c.num_experts_per_tok if experts else 0
    widths = [c.intermediate_size] * any(not c.has_experts(j) for j in layers)
    if experts:
        widths.append(routed * c.moe_intermediate_size + (c.shared_expert_intermediate_size or 0))
    total, window = sum(count.values()), (c.sliding_window or 0) + c.num_sink_tokens
    layers = c.num_hidden_layers, c.layer_types.count("hybrid_sliding"), c.hidden_size, max(widths)
    heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size, window, c.mlstm_chunk_size
    sizes = total - new, total, new, layer, c.vocab_size * c.hidden_size, matmul
    features = c.memory_feature_dim or c.head_dim, c.memory_features
    linear, recurrence = c.layer_types.count(LINEAR), 0
    if linear:  # the memory is read, corrected and read again
        recurrence = 3 * 2 * math.prod(c.linear_shapes["recurrent"])
    return Shape(name, *layers, *heads, *sizes, c.tie_word_embeddings, *features, idle, routed, linear, recurrence)


# --- FLOPs -----------------------------------------------------------------------------------------------------


def mixer_flops(shape, length):
    """Forward FLOPs per token of one hybrid layer's mixers: feature maps, mLSTM (chunkwise), window attention."""
    F = shape.features
    maps, inside, state = 4 * shape.K * shape.columns, 2 * (F + shape.K) * shape.chunk / 2, 4 * F * shape.K
    return shape.H * (maps + inside + state + 4 * shape.K * mean_visible(shape.window, length))


def mean_visible(window, length):
    """Mean number of keys that a token of a row sees through a window."""
    w = min(window, length)
    return w - w * (w - 1) / (2 * length)


def attention_flops(shape, length):
    """Forward FLOPs per token of all of the teacher's attention: causal attention, an upper bound, as documents are
    shorter, and linear attention; `(the first, the second)`.
    """
    full = 4 * shape.H * shape.K * (length + 1) / 2 * (shape.L - shape.linear)
    return full, shape.linear * shape.recurrence


def flops_per_token(shape, job, checkpointing=False):
    """Training FLOPs per token: a backward costs two forwards, checkpointing one more; one multiplication and addition
    are 2.
    """
    products, head = 2 * shape.matmul, 2 * shape.head
    full, linear = attention_flops(shape, job.length)
    trunk, mixers = products + linear, shape.hybrid * mixer_flops(shape, job.length)
    if job.kind == "align":
        return trunk + full + 3 * mixers
    kept = full * (shape.L - shape.linear - shape.hybrid) / max(shape.L - shape.linear, 1)
    student = (trunk + head + mixers + kept) * (4 if checkpointing else 3)
    return student + (0 if job.stored else trunk + head + full)


# --- choosing --------------------------------------------------------------------------------------------------


def estimate(shape, job, setting, machine):
    """`Estimate` of a stage with one setting."""
    memory = training_bytes(shape, job, setting, machine)
    rate = machine.gpus * machine.flops * machine.utilisation / flops_per_token(shape, job, setting.checkpointing)
    return Estimate(setting, memory, rate, job.experts * job.tokens / rate, sum(memory.values()) <= machine.room)


def settings_for(job, machine):
    """Every setting that gives the job's rows per step, the best ones first: no checkpointing, DDP, larger
    micro-batches.
    """
    strategies = ["one GPU"] if machine.gpus == 1 else ["DDP", "FSDP2"]
    for checkpointing, strategy, micro in product([False] if job.kind == "align" else [False, True], strategies, MICRO):
        if job.sequences % (micro * machine.gpus) == 0:
            yield Setting(micro, job.sequences // (micro * machine.gpus), checkpointing, strategy)


def choose(shape, job, machine):
    """The quickest setting that fits, or the smallest one if none does.

    Raises:
        ConfigError: no setting gives this number of rows per step on so many GPUs.
    """
    estimates = [estimate(shape, job, s, machine) for s in settings_for(job, machine)]
    if not estimates:
        raise ConfigError(
            f"{job.kind}: {job.sequences} rows per step cannot be shared by {machine.gpus} GPUs; choose a number of GPUs that divides it"
        )
    fitting = [e for e in estimates if e.fits]
    return max(fitting, key=lambda e: e.tokens_per_second) if fitting else min(estimates, key=lambda e: e.peak)


def jobs_of(recipe=None):
    """`{stage: Job}` of a recipe; without one those of the paper."""
    if recipe is None:
        align = Job("align", steps=2500, sequences=64, length=4096)
        return {"align": align, "distill": replace(align, kind="distill", steps=19073, teacher_bytes=BF16)}
    teacher = FP32 if recipe.teacher_dtype == "float32" else BF16
    jobs = {}
    stages = {"align": recipe.align, "distill": recipe.distill}
    for kind, section in stages.items() if recipe.align["max_steps"] else [("distill", recipe.distill)]:
        batch, steps = section.get("per_device_train_batch_size", 8), section.get("gradient_accumulation_steps", 1)
        sequences = section.get("sequences_per_step") or batch * steps
        jobs[kind] = Job(
            kind,
            section["max_steps"],
            sequences,
            recipe.length,
            top_k=section.get("top_k", 256),
            bf16=section.get("bf16") is not False,
            experts=1 if kind == "align" else len(recipe.experts),
            teacher_bytes=teacher,
            stored=section.get("teacher", "online") != "online",
        )
    return jobs


@dataclass
class Plan:
    """What `plan` found: a shape, a machine, an `Estimate` and its `Job` per stage, and bytes on disk; `STORE` is stage
    II as it would be with the teacher's targets from a store. cache: {"length", "student", "teacher"}, parts of one
    sequence's cache in bfloat16, see `cache_bytes`.
    warnings: of `slow_paths`.
    """

    shape: Shape
    machine: Machine
    jobs: dict
    stages: dict
    disk: dict
    store: dict
    cache: dict
    assumptions: list = field(default_factory=list)
    warnings: list = field(default_factory=list)

    @property
    def fits(self):
        """Whether every stage of the run fits as it is."""
        return all(e.fits for name, e in self.stages.items() if name != STORE)

    def as_dict(self):
        return asdict(self) | {"fits": self.fits}


def plan(teacher_config, machine, recipe=None, name="teacher"):
    """Plan the stages of a recipe, or of the paper, for a teacher and a machine.

    Raises:
        ConfigError: see `choose` and `student_config`.  UnsupportedTeacherError: see `family_of`.
    """
    student = recipe.student if recipe else {}
    shape, jobs = student_shape(teacher_config, name, **student), jobs_of(recipe)
    job = jobs["distill"]
    if not job.stored:
        jobs[STORE] = replace(job, stored=True)
    stages = {kind: choose(shape, job, machine) for kind, job in jobs.items()}
    config = config_of(teacher_config, student)
    cache = {side: cache_bytes(config, job.length, teacher=side == "teacher") for side in ("student", "teacher")}
    cache = {"length": job.length, **cache}
    disk, store = disk_of(shape, job), store_costs(shape, job, machine)
    return Plan(shape, machine, jobs, stages, disk, store, cache, assumptions(machine, shape), slow_paths(shape))


def slow_paths(shape):
    """What a GPU runs as torch operations because no Triton kernel takes so many features (the choice of its
    operations).
    """
    lines = []
    if shape.hybrid and shape.features > LARGEST_K:
        lines.append(
            f"training and prompts: the Triton kernel of the mLSTM takes up to {LARGEST_K} features per head, this student has "
            f"{shape.features}: a GPU runs the torch form, chunk after chunk, and takes longer than the times above"
        )
    if shape.hybrid and shape.features > LARGEST_F:
        lines.append(
            f"generation: the fused step takes up to {LARGEST_F} features per head, this student has {shape.features}: a step runs as "
            "separate torch operations"
        )
    return lines


def disk_of(shape, job):
    """Bytes of what a run leaves: checkpoints in float32, and a training checkpoint with the state of Adam."""
    student = FP32 * shape.student
    return {
        "converted, aligned": 2 * student,
        "experts": job.experts * student,
        "merged and final": 2 * student,
        "to resume a stage": 3 * student,
    }


def store_costs(shape, job, machine):
    """What an online teacher costs in a run of all experts, and stores of several sizes: seconds, and {entries kept:
    bytes}.
    """
    tokens, rate = job.experts * job.tokens, machine.gpus * machine.flops * machine.utilisation
    forward = 2 * shape.matmul + 2 * shape.head + sum(attention_flops(shape, job.length))  # of the teacher
    seconds = tokens * forward / rate
    entries = sorted({16, 64, min(job.top_k, shape.V)})
    return {"online_seconds": seconds, "stores": {k: store_bytes(tokens, k) for k in entries}, "fill_seconds": seconds}


def assumptions(machine, shape):
    experts = (
        "experts: memory of activations measured on a CPU, one expert after the other; all of them together, as grouped products on a "
        "GPU run them: not measured"
    )
    linear = "layers of linear attention: memory of activations as of a hybrid layer, FLOPs of a token after the other: not measured"
    beside = [experts] * bool(shape.idle) + [linear] * bool(shape.linear)
    return beside + [
        f"peak {machine.flops / 1e12:,.0f} TFLOP/s (bfloat16, dense) per GPU, of which {machine.utilisation:.0%} are reached: not measured",
        "documents fill their rows: shorter ones make the teacher's attention cheaper",
        f"{machine.reserve:.0%} of the memory stay free for the driver, communication and fragmentation",
        "float32 weights, gradients and Adam; bfloat16 compute under autocast, unless the recipe says bf16: false; "
        "one that does not say trains in what its machine does quicker, bfloat16 on these GPUs; logits in chunks; "
        f"memory of the GPU kernels as on a CPU, where the model was measured to within {ERROR:.0%}",
        "time is that of training steps: loading, reading data, evaluation and communication that is not hidden come on top",
        "a store holds 6 bytes per entry and 8 per token; filling it costs one forward of the teacher, as an online teacher does in every run",
    ]


def human(size):
    """Bytes in words."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"


def hours(seconds):
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.0f} s"


def settings_text(job, setting):
    """A setting as the fields of a trainer's config and of accelerate that give it."""
    words = [f"per_device_train_batch_size {setting.micro}", f"gradient_accumulation_steps {setting.accumulation}"]
    words.append(setting.strategy)
    words += ["gradient_checkpointing"] * setting.checkpointing
    words += [f"teacher {'from a store' if job.stored else 'online'}"] * (job.kind == "distill")
    return ", ".join(words)
