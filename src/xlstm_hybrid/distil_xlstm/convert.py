"""From a teacher to a Distil-xLSTM student: embeddings and LM head are the teacher's, the blocks are new. Dims: D
hidden size.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import initialization as init

from xlstm_hybrid.checkpoint.files import add_provenance, check_space, staged, write_manifest
from xlstm_hybrid.conversion.convert import TensorReport
from xlstm_hybrid.conversion.families import family_of
from xlstm_hybrid.conversion.load import dtype_named, parameter_dtype
from xlstm_hybrid.conversion.source import open_teacher
from xlstm_hybrid.distil_xlstm.configuration import DistilXLSTMConfig
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM
from xlstm_hybrid.errors import CheckpointError, ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FROM_TEACHER = (
    "vocab_size",
    "hidden_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# The student of Qwen2.5-1.5B whose parameters are counted as published: 83.92M of 550.67M trainable, 15.24 %, all
# published digits. Inferred: half of
# its 28 layers would be 14 with 2.1 times as many, so that the paper's stack must be shorter. A tied head is counted
# twice there: it is a copy.
PUBLISHED = {
    "num_hidden_layers": 6,
    "mlstm_num_heads": 4,
    "slstm_intermediate_size": 2624,
    "tie_word_embeddings": False,
}


@dataclass
class DistilReport(TensorReport):
    """What became of every tensor; `str` gives a table.

    teacher_tensors: name -> "copied", "left out", or whose duplicate it is.
    student_tensors: name -> "copied" with "frozen" or "trainable", or "new".
    parameters: numbers of elements of student, trainable, frozen; tied ones count once.
    """

    teacher: str
    family: str
    dtype: str
    block_types: list
    teacher_tensors: dict = field(default_factory=dict)
    student_tensors: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    files: list = field(default_factory=list)

    def __str__(self):
        blocks = ", ".join(f"{number} {kind}" for kind, number in Counter(self.block_types).items())
        lines = [
            f"Distil-xLSTM from {self.teacher} ({self.family}, {self.dtype}): {len(self.block_types)} blocks, {blocks}"
        ]
        lines += self.tensor_lines("what it is", "what it is")
        share = 100 * self.parameters["trainable"] / self.parameters["student"]
        return "\n".join(
            [
                *lines,
                "",
                f"parameters: student {self.parameters['student']:,}, of these trainable {self.parameters['trainable']:,} "
                f"({share:.2f} %), frozen {self.parameters['frozen']:,}",
            ]
        )


def heads_for(hidden_size, heads):
    """Heads of the student: the teacher's, up to the next multiple of 4 that divides D; where none does, the next
    divisor of D.
    """
    divisors = [n for n in range(heads, hidden_size + 1) if hidden_size % n == 0]
    return next((n for n in divisors if n % 4 == 0 and n < 2 * heads + 4), divisors[0])


def student_config(teacher_config, *, num_hidden_layers=None, tie_word_embeddings=None, **overrides):
    """The student's configuration for a teacher's.

    Args:
        teacher_config: a configuration of one of `families.FAMILIES`.
        num_hidden_layers: None: half the teacher's, rounded up.
        tie_word_embeddings: None: as in the teacher; False copies a tied embedding twice, which only the published
            count of parameters needs.
        overrides: other fields of `DistilXLSTMConfig`, such as block_pattern.
    Raises:
        UnsupportedTeacherError: see `family_of`.
        ConfigError: fields that the teacher decides, or that describe no student.
    """
    family_of(teacher_config)
    taken = {name: getattr(teacher_config, name) for name in FROM_TEACHER} | {
        "teacher_model_type": teacher_config.model_type
    }
    taken["use_cache"] = True  # in a teacher's, False is a leftover of its training
    allowed = sorted(set(DistilXLSTMConfig.__annotations__) - set(taken))
    if foreign := sorted(set(overrides) - set(allowed)):
        raise ConfigError(
            f"student of {teacher_config.model_type}: cannot set {foreign}, only {allowed}; the rest comes from the teacher, "
            "whose embeddings it keeps"
        )
    tied = teacher_config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings
    if tied and not teacher_config.tie_word_embeddings:
        raise ConfigError(
            f"tie_word_embeddings=True: embeddings and LM head of this {teacher_config.model_type} differ; leave it out"
        )
    layers = (teacher_config.num_hidden_layers + 1) // 2 if num_hidden_layers is None else num_hidden_layers
    chosen = {
        "num_attention_heads": heads_for(teacher_config.hidden_size, teacher_config.num_attention_heads)
    } | overrides
    if "mlstm_projection_block" not in chosen:
        inner = round(chosen.get("mlstm_expansion", 2.0) * teacher_config.hidden_size)
        chosen["mlstm_projection_block"] = next(n for n in (4, 2, 1) if inner % n == 0)
    try:
        return DistilXLSTMConfig(**taken, tie_word_embeddings=tied, num_hidden_layers=layers, **chosen)
    except StrictDataclassError as error:  # says which field has a wrong type
        raise ConfigError(
            f"student of {teacher_config.model_type}: {' '.join(str(error.__cause__ or error).split())}"
        ) from error


def empty_student(config):
    """The student on the meta device: names, shapes and ties without memory."""
    with torch.device("meta"), init.no_init_weights():
        return DistilXLSTMForCausalLM(config)


def parameters_of(student):
    """`{"student", "trainable", "frozen"}`: numbers of elements, tied ones once."""
    count = {flag: sum(p.numel() for p in student.parameters() if p.requires_grad is flag) for flag in (True, False)}
    return {"student": sum(count.values()), "trainable": count[True], "frozen": count[False]}


def check_embeddings(source, config):
    """Raise CheckpointError unless the teacher stores the embeddings that its configuration describes."""
    wanted = [EMBEDDING] if source.config.tie_word_embeddings else [EMBEDDING, HEAD]
    shape = [config.vocab_size, config.hidden_size]
    for name in wanted:
        found = source.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{source.name}: has no {name}, the student cannot take over its embeddings; download the checkpoint again, or "
                "choose a teacher that transformers loads as a causal language model"
            )
        if found[0] != shape or found[1] is None:
            raise CheckpointError(
                f"{source.name}: {name} is {found[0]} ({found[1] or 'no plain float type'}), expected floating {shape} by its "
                "config.json; compare the two, or start from the unquantised checkpoint"
            )


def build(cls, source, dtype, seed, config):
    """The student in memory; new parameters are drawn with `seed` and leave the global generator as it was."""
    stored = source.tensors[EMBEDDING][1]
    config.dtype, config.architectures = dtype_named(dtype, stored), [cls.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = cls(config)
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, config.dtype, cls))
    names = {EMBEDDING: student.model.embed_tokens} | ({} if config.tie_word_embeddings else {HEAD: student.lm_head})
    for name, module in names.items():
        value = source.load(name if name in source.tensors and not source.config.tie_word_embeddings else EMBEDDING)
        module.weight.data = value.detach().to("cpu", config.dtype, copy=True).contiguous()
        if not torch.isfinite(module.weight).all():
            raise CheckpointError(
                f"{source.name}: {name} ({stored}) holds values that are not finite in {config.dtype}; choose a dtype of a wider "
                "range, or another teacher"
            )
    student.generation_config = source.generation_config() or student.generation_config
    return student.eval()


def report_of(source, student):
    """`DistilReport` of a student that was just built."""
    placement = dict.fromkeys(source.tensors, "left out")
    placement |= {name: "copied" for name in (EMBEDDING, HEAD) if name in placement}
    if source.config.tie_word_embeddings and HEAD in placement:
        placement[HEAD] = f"duplicate of the tied {EMBEDDING}"
    kind = {name: "copied" if name in (EMBEDDING, HEAD) else "new" for name, _ in student.named_parameters()}
    made = {
        name: f"{kind[name]}, {'trainable' if p.requires_grad else 'frozen'}" for name, p in student.named_parameters()
    }
    dtype = str(student.config.dtype).removeprefix("torch.")
    return DistilReport(
        source.name,
        source.config.model_type,
        dtype,
        list(student.config.block_types),
        placement,
        made,
        parameters_of(student),
    )


def from_teacher(cls, teacher, *, dtype=None, revision=None, seed=0, **student):
    """The student of a teacher, in memory on the CPU and in eval mode, with its `transfer_report`. It shares no memory
    with the teacher.

    Args:
        teacher: a directory, a Hub id, or a transformers model; only its embedding and LM head are read.
        dtype: of the student's weights; None: the one in which the teacher's embedding is stored. Gates are float32 in
            any case.
        revision: branch, tag or commit on the Hub.
        seed: of the new parameters.
        student: arguments of `student_config`.
    Raises:
        UnsupportedTeacherError, ConfigError, CheckpointError: the teacher cannot become such a student.
    """
    with open_teacher(teacher, revision) as source:
        config = student_config(source.config, **student)
        check_embeddings(source, config)
        made = build(cls, source, dtype, seed, config)
        made.transfer_report = report_of(source, made)
    return made


def convert(teacher, out, *, dtype=None, revision=None, seed=0, overwrite=False, **student):
    """`from_teacher` into a directory that `AutoModelForCausalLM` loads, with tokenizer, chat template and generation
    config. Returns the report.

    Raises:
        UnsupportedTeacherError, ConfigError, CheckpointError: see `from_teacher`, or `out` exists; nothing is written.
        CheckpointWriteError: there is no room for `out`, or it holds the teacher; what was there is untouched.
    """
    started, out = time.monotonic(), Path(out)
    with open_teacher(teacher, revision) as source:
        source.refuse_target(out)
        config = student_config(source.config, **student)
        check_embeddings(source, config)
        made = build(DistilXLSTMForCausalLM, source, dtype, seed, config)
        report = report_of(source, made)
        check_space(out, sum(p.numel() * p.element_size() for p in made.parameters()))
        with staged(out, overwrite=overwrite) as directory:
            made.save_pretrained(directory)
            report.files = source.copy_files(directory)
            chosen = {
                "teacher": source.name,
                "revision": source.revision,
                "dtype": report.dtype,
                "seed": seed,
                **student,
            }
            add_provenance(
                directory,
                "distil-convert",
                parent=source.path,
                config=chosen,
                figures=report.summary(),
                seconds=round(time.monotonic() - started, 3),
            )
            write_manifest(directory)
    return report


def share_frozen(student, teacher):
    """Make the student's frozen embedding and LM head the teacher's own tensors: one copy in memory while both are
    there. Returns the student.

    An LM head that is a copy of its own, beside a tied teacher, stays one: two names of one tensor would be saved as a
    tied pair.

    Raises:
        ConfigError: the student's are trainable, or are not the teacher's (values, dtype or device).
    """
    pairs = [
        ("embedding", student.get_input_embeddings(), teacher.get_input_embeddings()),
        ("LM head", student.get_output_embeddings(), teacher.get_output_embeddings()),
    ]
    if teacher.config.tie_word_embeddings and not student.config.tie_word_embeddings:
        pairs = pairs[:1]
    for name, ours, theirs in pairs:
        a, b = ours.weight, theirs.weight
        if a.requires_grad:
            raise ConfigError(
                f"the student's {name} is trainable: the teacher would change with it; set freeze_embeddings, or keep two copies"
            )
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b):
            raise ConfigError(
                f"the student's {name} ({a.dtype}, {list(a.shape)}, {a.device}) is not the teacher's ({b.dtype}, {list(b.shape)}, "
                f"{b.device}); load both in one dtype on one device, or distil from the teacher that it was made from"
            )
    for _, ours, theirs in pairs:
        ours.weight = theirs.weight.requires_grad_(False)
    return student


# bound here: modeling stands before it and does not know it
DistilXLSTMForCausalLM.from_teacher = classmethod(from_teacher)
