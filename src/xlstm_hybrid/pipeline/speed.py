"""How quick a recipe's stages are on the CPU at hand: steps of its own trainers on a student of the teacher's shape, with
random weights and random tokens.

A few layers are measured, with a vocabulary of a few tokens and with the real one. What the second adds is the LM head
and what goes with it; the first is scaled by the number of layers.
"""

import copy
import gc
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from xlstm_hybrid.data import collate
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline.settings import SEQUENCES, batch_of, trainer_config
from xlstm_hybrid.planning.run import Job, Machine, Setting, config_of, human, jobs_of, student_shape
from xlstm_hybrid.planning.training_memory import BF16, FP32, training_bytes

LAYERS, VOCABULARY, LENGTH = 4, 256, 2048  # at most so many are measured
STEPS = 3  # the first one allocates; the best of the others counts, because other processes only ever add time
FORWARD = "forward"


@dataclass(frozen=True)
class StageSpeed:
    """What was measured of a stage. tokens_per_second: with the rows per step that the recipe has.  tokens, seconds: of
    the whole stage, all experts; None of the forward, which is no stage.  peak: bytes that it will take, estimated.
    """

    tokens_per_second: float
    tokens: int | None = None
    seconds: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Measured:
    """stages: {"forward", of the student, "align", "distill": `StageSpeed`}.  room: bytes that are free."""

    stages: dict
    room: float
    layers: int
    of_layers: int
    length: int
    threads: int
    bf16: bool

    @property
    def fits(self):
        return all(stage.peak is None or stage.peak <= self.room for stage in self.stages.values())

    def as_dict(self):
        return asdict(self) | {"fits": self.fits}


def measure_speed(teacher_config, recipe=None):
    """`Measured` of a teacher's student in the stages of a recipe, or of the paper.

    Raises:
        ConfigError: the part that would be measured does not fit into the free memory; or see `student_shape` and the
            configs of the trainers.
    """
    import psutil

    room, jobs = float(psutil.virtual_memory().available), jobs_of(recipe)
    length, L = min(jobs["distill"].length, LENGTH), teacher_config.num_hidden_layers
    student = recipe.student if recipe else {}
    part, fields = part_of(teacher_config, min(LAYERS, L)), first_layers(student, L, min(LAYERS, L))
    machine, one = Machine(1, room, device="cpu"), Setting(1, 1, False, "one GPU")
    needed = sum(training_bytes(student_shape(part, **fields), Job("distill", 1, 1, length), one, machine).values())
    if needed > room:
        raise ConfigError(
            f"{part.num_hidden_layers} layers of this teacher and its LM head take {human(needed)} in stage II, {human(room)} are free: "
            "nothing was measured; leave out --measure, and plan for GPUs"
        )
    narrow = copy.deepcopy(part)
    narrow.vocab_size = min(VOCABULARY, part.vocab_size)
    few, bf16 = timings(narrow, fields, recipe, length, jobs)
    all_of_it = few if narrow.vocab_size == part.vocab_size else timings(part, fields, recipe, length, jobs)[0]
    seconds = {name: scaled(few[name], all_of_it[name], L / part.num_hidden_layers) for name in few}
    stages, shape = {FORWARD: StageSpeed(length / seconds[FORWARD])}, student_shape(teacher_config, **student)
    for name, job in jobs.items():
        rate = length / (seconds[name] + seconds[f"{name} update"] / job.sequences)
        micro, accumulation = batch_of(section_of(recipe, name), name, world=1) if recipe else (1, job.sequences)
        section = section_of(recipe, name)
        setting = Setting(micro, accumulation, bool(section.get("gradient_checkpointing")), "one GPU")
        job = Job(**asdict(job) | {"bf16": bf16})
        peak, tokens = sum(training_bytes(shape, job, setting, machine).values()), job.tokens * job.experts
        stages[name] = StageSpeed(rate, tokens, tokens / rate, peak)
    return Measured(stages, room, part.num_hidden_layers, L, length, torch.get_num_threads(), bf16)


class Clock(TrainerCallback):
    """rows: seconds of each forward and backward.  updates: of each step of the optimiser."""

    def __init__(self):
        self.rows, self.updates, self.begin = [], [], None

    def on_step_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_pre_optimizer_step(self, *_, **__):
        self.rows.append(time.perf_counter() - self.begin)
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.updates.append(time.perf_counter() - self.begin)


def scaled(few, all_of_it, layers):
    """Seconds of all layers: `few` is a part of them alone, `all_of_it` the same part with the LM head."""
    return layers * few + max(0.0, all_of_it - few)


def section_of(recipe, name):
    return getattr(recipe, name) if recipe else {}


def part_of(teacher_config, layers):
    """The teacher's configuration with its first layers only, and no token that a small vocabulary may lack."""
    part = copy.deepcopy(teacher_config)
    part.num_hidden_layers = layers
    if getattr(part, "layer_types", None):
        part.layer_types = part.layer_types[:layers]
    part.bos_token_id, part.eos_token_id, part.pad_token_id = None, 0, 0  # as `no_tokenizer` has them
    return part


def first_layers(student, of, layers):
    """Fields of a student for its first layers: lists with an entry per layer are cut."""
    return {k: v[:layers] if isinstance(v, list) and len(v) == of else v for k, v in student.items()}


def timings(teacher_config, student, recipe, length, jobs):
    """`({name: seconds}, whether training chose bfloat16)`: of "forward", and of each stage a row and, as "... update",
    the optimiser's step.
    """
    from datasets import Dataset

    from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
    from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer
    from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

    V, generator = teacher_config.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(V, (STEPS, length), generator=generator).tolist()
    places = list(range(length))
    rows = Dataset.from_list([{"input_ids": x, "labels": [-100, *x[1:]], "position_ids": places} for x in ids])
    model, found = XLSTMHybridForCausalLM(config_of(teacher_config, student)), {}
    shared = {"data_collator": collate, "processing_class": no_tokenizer(V), "train_dataset": rows}
    fixed = {"max_steps": STEPS, SEQUENCES: 1, "per_device_train_batch_size": 1, "logging_strategy": "no"}
    fixed |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "eval_strategy": "no"}
    idle = {"gradient_accumulation_steps", "layers_at_a_time", "save_steps", "save_total_limit", "warmup_steps"}
    with tempfile.TemporaryDirectory() as work:
        for name in jobs:
            asked = {k: v for k, v in section_of(recipe, name).items() if k not in idle} | fixed
            kind = AlignmentConfig if name == "align" else SparseKDConfig
            if name == "distill":
                asked |= {"teacher": "online", "top_k": min(jobs[name].top_k, V)}
            args = trainer_config(kind, asked, name, Path(work), 0)
            if name == "align":
                trainer = AlignmentTrainer(model, args, **shared)
            else:
                model.requires_grad_(True)
                dtype = {FP32: torch.float32, BF16: torch.bfloat16}[jobs[name].teacher_bytes]
                trainer = SparseKDTrainer(
                    model, AutoModelForCausalLM.from_config(teacher_config, dtype=dtype).eval(), args=args, **shared
                )
            trainer.add_callback(clock := Clock())
            trainer.remove_callback(PrinterCallback)
            with warnings.catch_warnings(action="ignore"):  # of random weights, whose figures mean nothing
                trainer.train()
            found |= {name: min(clock.rows[1:]), f"{name} update": min(clock.updates[1:])}
            del trainer
    found[FORWARD] = forward_seconds(model.eval(), torch.tensor(ids[:1]), args.bf16)
    del model
    gc.collect()
    return found, bool(args.bf16)


@torch.no_grad()
def forward_seconds(model, ids, bf16):
    """Of one row, in the precision of training; the best of those after the first."""
    best = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(bf16)):
            model(input_ids=ids, use_cache=False)
        best.append(time.perf_counter() - begin)
    return min(best[1:])


def no_tokenizer(size):
    """A tokenizer for trainers that will not use it."""
    from tokenizers import Tokenizer, models

    words = {str(n): n for n in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="0", eos_token="0")
