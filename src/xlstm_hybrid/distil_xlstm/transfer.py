"""From a teacher to a Distil-xLSTM student: embeddings and LM head are the teacher's, the blocks are new. Dims: D
hidden size.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError

from xlstm_hybrid.conversion.convert import TensorReport
from xlstm_hybrid.conversion.families import family_of, refuse_loading
from xlstm_hybrid.conversion.load import dtype_named, parameter_dtype
from xlstm_hybrid.distil_xlstm.configuration import DistilXLSTMConfig
from xlstm_hybrid.errors import CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.model.configuration import TRAITS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FROM_TEACHER = ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps")
FROM_TEACHER += ("bos_token_id", "eos_token_id", "pad_token_id")


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
        kinds = [f"{number} {kind}" for kind, number in Counter(self.block_types).items()]
        blocks = ", ".join([f"{len(self.block_types)} blocks", *kinds])
        title = f"Distil-xLSTM from {self.teacher} ({self.family}, {self.dtype}): {blocks}"
        whole, trainable, frozen = (self.parameters[name] for name in ("student", "trainable", "frozen"))
        share = f"trainable {trainable:,} ({100 * trainable / whole:.2f} %), frozen {frozen:,}"
        counts = f"parameters: student {whole:,}, of these {share}"
        return "\n".join([title, *self.tensor_lines("what it is", "what it is"), "", counts])


def heads_for(hidden_size, heads):
    """Heads of the student: the teacher's, up to the next multiple of 4 that divides D; where none does, the next
    divisor of D.
    """
    divisors = [n for n in range(heads, hidden_size + 1) if hidden_size % n == 0]
    return next((n for n in divisors if n % 4 == 0 and n < 2 * heads + 4), divisors[0])


def distil_config(teacher_config, *, num_hidden_layers=None, tie_word_embeddings=None, **overrides):
    """The student's configuration for a teacher's.

    Args:
        teacher_config: a configuration of one of `families.FAMILIES`.
        num_hidden_layers: None: half the teacher's, rounded up.
        tie_word_embeddings: None: as in the teacher; False copies a tied embedding twice, which only the published
            count of parameters needs.
        overrides: other fields of `DistilXLSTMConfig`, such as block_pattern.
    Raises:
        UnsupportedTeacherError: see `family_of`; or embeddings or logits that are scaled.
        ConfigError: fields that the teacher decides, or that describe no student.
    """
    family, kind = family_of(teacher_config), teacher_config.model_type
    values = family.fields(teacher_config)
    for name in ("embedding_multiplier", "logits_scaling", "final_logit_softcapping"):
        if values.get(name, TRAITS[name]) != TRAITS[name]:
            raise UnsupportedTeacherError(
                f"teacher configuration ({kind}): {name} is {values[name]}, expected {TRAITS[name]}: this student has the "
                "teacher's embeddings and head as they are; choose another teacher, or the hybrid student"
            )
    taken = {name: getattr(teacher_config, name) for name in FROM_TEACHER}
    taken |= {"teacher_model_type": kind, "use_cache": True}  # False is a leftover of the teacher's training
    allowed = sorted(set(DistilXLSTMConfig.__annotations__) - set(taken))
    refuse_loading(overrides)
    if foreign := sorted(set(overrides) - set(allowed)):
        raise ConfigError(
            f"student of {kind}: cannot set {foreign}, only {allowed}; the rest comes from the teacher, whose embeddings it keeps: leave these out"
        )
    tied = teacher_config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings
    if tied and not teacher_config.tie_word_embeddings:
        raise ConfigError(f"tie_word_embeddings=True: embeddings and LM head of this {kind} differ; leave it out")
    layers = (teacher_config.num_hidden_layers + 1) // 2 if num_hidden_layers is None else num_hidden_layers
    heads = heads_for(teacher_config.hidden_size, teacher_config.num_attention_heads)
    chosen = {"num_attention_heads": heads} | overrides
    if "mlstm_projection_block" not in chosen:
        inner = round(chosen.get("mlstm_expansion", 2.0) * teacher_config.hidden_size)
        chosen["mlstm_projection_block"] = next(n for n in (4, 2, 1) if inner % n == 0)
    try:
        return DistilXLSTMConfig(**taken, tie_word_embeddings=tied, num_hidden_layers=layers, **chosen)
    except StrictDataclassError as error:  # says which field has a wrong type
        raise ConfigError(f"student of {kind}: {' '.join(str(error.__cause__ or error).split())}") from error


def parameters_of(student):
    """`{"student", "trainable", "frozen"}`: numbers of elements, tied ones once."""
    count = {flag: sum(p.numel() for p in student.parameters() if p.requires_grad is flag) for flag in (True, False)}
    return {"student": sum(count.values()), "trainable": count[True], "frozen": count[False]}


def check_embeddings(source, config):
    """Raise CheckpointError unless the teacher stores the embeddings that its configuration describes."""
    wanted = [config.vocab_size, config.hidden_size]
    for name in [EMBEDDING] if source.config.tie_word_embeddings else [EMBEDDING, HEAD]:
        shape, dtype = source.tensors.get(name, (None, None))
        if shape is None:
            raise CheckpointError(
                f"{source.name}: has no {name}, the student cannot take over its embeddings; download the checkpoint again, or "
                "choose a teacher that transformers loads as a causal language model"
            )
        if shape != wanted or dtype is None:
            raise CheckpointError(
                f"{source.name}: {name} is {shape} ({dtype or 'no plain float type'}), expected floating {wanted} by its "
                "config.json; compare the two, or start from the unquantised checkpoint"
            )


def new_student(cls, source, dtype, seed, **options):
    """The student of an opened teacher in memory, with its `transfer_report`; new parameters are drawn with `seed` and
    leave the global generator as it was. Arguments and errors as in `DistilXLSTMForCausalLM.from_teacher`.
    """
    config = distil_config(source.config, **options)
    check_embeddings(source, config)
    stored, tied = source.tensors[EMBEDDING][1], source.config.tie_word_embeddings
    config.dtype, config.architectures = dtype_named(dtype, stored), [cls.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = cls(config)
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, config.dtype, cls))
    modules = {EMBEDDING: student.model.embed_tokens} | ({} if config.tie_word_embeddings else {HEAD: student.lm_head})
    for name, module in modules.items():
        value = source.load(name if name in source.tensors and not tied else EMBEDDING)
        module.weight.data = value.detach().to("cpu", config.dtype, copy=True).contiguous()
        if not torch.isfinite(module.weight).all():
            raise CheckpointError(
                f"{source.name}: {name} ({stored}) holds values that are not finite in {config.dtype}; choose a dtype of a wider "
                "range, or another teacher"
            )
    student.generation_config = source.generation_config() or student.generation_config
    of_teacher = {name: "copied" if name in (EMBEDDING, HEAD) else "left out" for name in source.tensors}
    if tied and HEAD in of_teacher:
        of_teacher[HEAD] = f"duplicate of the tied {EMBEDDING}"
    of_student = {name: "trainable" if p.requires_grad else "frozen" for name, p in student.named_parameters()}
    of_student = {n: f"{'copied' if n in (EMBEDDING, HEAD) else 'new'}, {state}" for n, state in of_student.items()}
    facts = source.name, source.config.model_type, str(config.dtype).removeprefix("torch."), list(config.block_types)
    student.transfer_report = DistilReport(*facts, of_teacher, of_student, parameters_of(student))
    return student.eval()
