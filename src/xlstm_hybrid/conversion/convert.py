"""From a teacher to a student with the same function as far as it is shared: tensors are placed by table, new ones
initialised.

Everything is checked from configuration and headers before the first byte is written. Tensors stream: one output shard
is in memory at a time.
"""

import copy
import math
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import initialization as init

from xlstm_hybrid.checkpoint.digests import require_intact, weights_hash
from xlstm_hybrid.checkpoint.files import add_provenance, read_json, staged, write_manifest
from xlstm_hybrid.checkpoint.weights import SHARD_BYTES, write_weights
from xlstm_hybrid.conversion.families import FAMILIES, family_of, student_config
from xlstm_hybrid.conversion.gguf import is_gguf, package_of
from xlstm_hybrid.conversion.load import dtype_named, load_model, parameter_dtype
from xlstm_hybrid.conversion.source import local_source, open_teacher
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.errors import CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
from xlstm_hybrid.model.trained import save_weights, trained_values

INITS = {  # in words, what `_init_weights` does with each new parameter
    "q_map": "identity",  # repeated or cut for other numbers of features
    "k_map": "identity",
    "igate_weight": "zeros",
    "fgate_weight": "zeros",
    "fgate_bias": "time constants spaced logarithmically from a quarter of the window to four training contexts",
    "ogate_weight": "zeros",
    "ogate_bias": "mlstm_output_gate_bias",
    "joint_scale": "zeros",
    "norm_weight": "ones",
}
SHOWN = 3  # names per kind of mistake in an error


class TensorReport:
    """What reports of a transfer share, whatever the student: fields `teacher_tensors`, `student_tensors` (name -> what
    became of it, or where it comes from) and `parameters`.
    """

    def as_dict(self):
        return asdict(self)

    def summary(self):
        """The report without one line per tensor, for `provenance.json`."""
        counts = {name: dict(Counter(getattr(self, name).values())) for name in ("teacher_tensors", "student_tensors")}
        return {"parameters": self.parameters, **counts}

    def tensor_lines(self, of_teacher, of_student):
        """Two tables, layers counted together; the arguments head their last columns."""
        lines = []
        teacher = "teacher tensor", of_teacher, self.teacher_tensors
        for title, heading, tensors in (teacher, ("student tensor", of_student, self.student_tensors)):
            rows = Counter((layerless(name), what) for name, what in tensors.items())
            width = max([len(title), *(len(name) for name, _ in rows)])
            lines += ["", f"{title:{width}}  number  {heading}"]
            lines += [f"{name:{width}}  {number:6}  {what}" for (name, what), number in rows.items()]
        return lines


@dataclass
class TransferReport(TensorReport):
    """What became of every tensor; `str` gives a table.

    teacher_tensors: name -> "copied", "recomputed", "left out", or whose duplicate it is.
    student_tensors: name -> "copied", "derived: from what" or "new: its initialisation".
    parameters: numbers of elements of teacher, student, new (those that stage I trains); tied ones count once.
    """

    teacher: str
    family: str
    dtype: str
    layer_types: list
    teacher_tensors: dict = field(default_factory=dict)
    student_tensors: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    files: list = field(default_factory=list)

    def __str__(self):
        layers = ", ".join(f"{number} {kind}" for kind, number in Counter(self.layer_types).items())
        head = f"Transfer from {self.teacher} ({self.family}, {self.dtype}): {len(self.layer_types)} layers, {layers}"
        teacher, student, new = (self.parameters[name] for name in ("teacher", "student", "new"))
        foot = (
            f"parameters: teacher {teacher:,}, student {student:,}, of these new {new:,} ({100 * new / student:.2f} %)"
        )
        lines = [head, *self.tensor_lines("what became of it", "where it comes from"), "", foot]
        return "\n".join(lines) + ", all of them and nothing else trainable in stage I"


def layerless(name):
    """The name with `{n}` in the place of its layer's number."""
    return re.sub(r"\.\d+\.", ".{n}.", name, count=1)


def empty_student(config, cls=XLSTMHybridForCausalLM):
    """The student on the meta device: names, shapes and ties without memory."""
    with torch.device("meta"), init.no_init_weights():
        return cls(config)


class Transfer:
    """The plan from one teacher to one student: what each tensor of the student is made of. Complete and checked once
    constructed.

    Args:
        teacher: a `DirectoryTeacher` or `ModelTeacher`.
        dtype: see `convert`.
        student: arguments of `student_config`.
    Raises:
        UnsupportedTeacherError, ConfigError: see `student_config`.
        CheckpointError: teacher tensors that are missing, mis-shaped or without a place in the student, all named at
            once.
    """

    def __init__(self, teacher, dtype=None, **student):
        self.teacher, self.family = teacher, family_of(teacher.config)
        self.config = student_config(teacher.config, **student)
        self.student = empty_student(self.config)
        self.ties = dict(self.student.all_tied_weights_keys)  # {name: name of the tensor it shares}
        self.expected = {name: list(x.shape) for name, x in self.student.state_dict().items() if name not in self.ties}
        mixers = tuple(f"{name}." for name, module in self.student.named_modules() if isinstance(module, MLSTMMixer))
        self.new = [name for name in self.expected if name.startswith(mixers)]
        self.sources, self.placement = {}, {}  # student tensor -> teacher tensor -> what became of it
        self.place()
        # by default that in which the teacher's embedding is stored
        self.dtype = dtype_named(dtype, self.teacher.tensors[self.sources["model.embed_tokens.weight"]][1])
        self.dtypes = {name: parameter_dtype(name, self.dtype, XLSTMHybridForCausalLM) for name in self.expected}
        self.config.dtype, self.config.architectures = self.dtype, [XLSTMHybridForCausalLM.__name__]

    def place(self):
        """Fill `sources` and `placement`, or raise an error that names all tensors that do not fit."""
        unplaced, misshaped, odd = [], [], []
        for name, (shape, dtype) in self.teacher.tensors.items():
            layer = re.search(r"\.(\d+)\.", name)
            targets = self.family.tensors.get(layerless(name), ())
            if isinstance(targets, str):
                self.placement[name] = targets
                continue
            if dtype is None:
                odd.append(name)
            targets = [target.format(n=layer and layer[1]) for target in targets]
            if targets and all(target in self.ties for target in targets):
                self.placement[name] = f"duplicate of the tied {self.ties[targets[0]]}"
                continue
            if not targets or any(target not in self.expected for target in targets):
                unplaced.append(name)
            for target in targets:
                if shape != self.expected.get(target, shape):
                    misshaped.append(f"{name} is {shape}, expected {self.expected[target]}")
                self.sources[target] = name
            self.placement[name] = "copied"
        if odd:
            raise UnsupportedTeacherError(
                f"{self.teacher.name}: {len(odd)} tensors are not of a plain float type, the first {odd[0]}: "
                "a quantised teacher; start from the original checkpoint, or save a dequantised one"
            )
        missing = [name for name in self.expected if name not in self.sources and name not in self.new]
        mistakes = {"missing": missing, "mis-shaped": misshaped, "without a place in the student": unplaced}
        if any(mistakes.values()):
            listed = "; ".join(
                f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
                for kind, names in mistakes.items()
                if names
            )
            untold = [name for name in unplaced if layerless(name) not in self.family.tensors]
            table = (
                f"; or complete the family's table of tensors, which has no {layerless(untold[0])}: docs/add-teacher-family.md"
                if untold
                else ""
            )
            raise CheckpointError(
                f"{self.teacher.name}: the weights are not those of its config.json ({self.teacher.config.model_type}): {listed}; "
                f"compare the two, or download the checkpoint again{table}"
            )

    def tensor(self, name):
        """One tensor of the student; the caller owns nothing that the teacher's memory or files hold.

        Raises:
            CheckpointError: values that are not finite, or not in the student's dtype.
        """
        if name in self.new:  # with the model's own initialisation
            parent, _, leaf = name.rpartition(".")
            module = copy.deepcopy(self.student.get_submodule(parent)).to_empty(device="cpu")
            self.student._init_weights(module)
            value = getattr(module, leaf)
        else:
            value = self.teacher.load(self.sources[name])
        value, stored = value.detach().to("cpu", self.dtypes[name], copy=True).contiguous(), value.dtype
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{self.teacher.name}: {self.sources[name]} ({stored}) holds values that are not finite in {self.dtype}; "
                "choose a dtype of a wider range, or another teacher"
            )
        return value

    def check_ties(self):
        """Raise CheckpointError where the teacher says that two tensors are tied but stores different values."""
        for name in self.placement:
            twin = self.ties.get(name)
            if twin and not torch.equal(self.teacher.load(name), self.teacher.load(self.sources[twin])):
                raise CheckpointError(
                    f"{self.teacher.name}: config.json says that {name} is tied to {twin}, but they differ; "
                    "set tie_word_embeddings to false in config.json"
                )

    def report(self):
        count = {name: math.prod(shape) for name, shape in self.expected.items()}
        student = {
            name: f"new: {INITS[name.rsplit('.', 1)[-1]]}" if name in self.new else "copied" for name in self.expected
        }
        student |= {name: f"derived: tied to {source}" for name, source in self.ties.items()}
        total, new = sum(count.values()), sum(count[name] for name in self.new)
        parameters = {"teacher": total - new, "student": total, "new": new, "trainable_in_stage_1": new}
        shape = str(self.dtype).removeprefix("torch."), list(self.config.layer_types)
        teacher = self.teacher.name, self.teacher.config.model_type
        return TransferReport(*teacher, *shape, self.placement, student, parameters)


def convert(
    teacher,
    out,
    *,
    sliding_window=512,
    num_sink_tokens=4,
    layer_types=None,
    dtype=None,
    revision=None,
    gguf_file=None,
    overwrite=False,
    shard_bytes=SHARD_BYTES,
    **overrides,
):
    """Convert a teacher into a student directory that `AutoModelForCausalLM` loads, with tokenizer, chat template and
    generation config.

    Args:
        teacher: a directory, a Hub id, a GGUF file, or a transformers model (which brings no tokenizer).
        out: the directory to write; it appears complete or not at all.
        sliding_window, num_sink_tokens, layer_types, overrides: see `student_config`.
        dtype: of the student's weights; None or "auto": the one the teacher is stored in. Gates are float32 in any case.
        revision: branch, tag or commit on the Hub.
        gguf_file: of the directory or the Hub id, read in the place of other weights; it is in memory as a whole.
        overwrite: replace an existing `out`.
        shard_bytes: largest file of weights, and about what is in memory at a time.
    Returns:
        TransferReport
    Raises:
        UnsupportedTeacherError, ConfigError, CheckpointError: the teacher cannot become such a student, or `out`
            exists; nothing is written.
        CheckpointWriteError: there is no room for `out`, or it holds the teacher; what was there is untouched.
    """
    started = time.monotonic()
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes!r}: expected a positive number of bytes")
    out = Path(out)
    with open_teacher(teacher, revision, gguf_file) as source:
        source.refuse_target(out)
        chosen = {"sliding_window": sliding_window, "num_sink_tokens": num_sink_tokens, "layer_types": layer_types}
        transfer = Transfer(source, dtype, **chosen, **overrides)
        transfer.check_ties()
        report, shapes = transfer.report(), transfer.expected
        bytes_per_element = {name: dtype.itemsize for name, dtype in transfer.dtypes.items()}
        needed = sum(math.prod(shape) * bytes_per_element[name] for name, shape in shapes.items())
        chosen |= {"layer_types": report.layer_types, "dtype": report.dtype, "teacher": source.name}
        chosen |= {"revision": source.revision, **overrides}
        if source.path is not None:
            chosen["teacher_weights"] = weights_hash(source.path)
            package = package_of(source.path) if is_gguf(source.path) else None
            chosen |= {"teacher_package": package} if package else {}
        with staged(out, overwrite, needed) as directory:
            save = partial(save_weights, values=trained_values(transfer.config))
            write_weights(directory, shapes, bytes_per_element.__getitem__, transfer.tensor, save, shard_bytes)
            transfer.config.save_pretrained(directory)
            report.files = source.copy_files(directory)
            seconds, figures = round(time.monotonic() - started, 3), report.summary()
            add_provenance(directory, "convert", parent=source.path, config=chosen, figures=figures, seconds=seconds)
            write_manifest(directory)
    return report


def from_teacher(cls, teacher, *, dtype=None, torch_dtype=None, revision=None, gguf_file=None, **student):
    """The student of a teacher, in memory on the CPU and in eval mode, with its `transfer_report`. It shares no memory
    with the teacher.

    Called as `XLSTMHybridForCausalLM.from_teacher(teacher, ...)`; arguments and errors are those of `convert`, `student`
    those of `student_config`; `torch_dtype` is transformers' other name of `dtype`.
    """
    dtype = torch_dtype if dtype is None else dtype
    with open_teacher(teacher, revision, gguf_file) as source:
        transfer = Transfer(source, dtype, **student)
        transfer.check_ties()
        state = {name: transfer.tensor(name) for name in transfer.expected}
        model = cls.from_pretrained(None, config=transfer.config, state_dict=state, dtype=transfer.dtype)
        model.config.name_or_path = ""  # transformers has put "None" there
        model.generation_config = source.generation_config() or model.generation_config
    model.transfer_report = transfer.report()
    return model


def load_teaching(checkpoint, dtype="float32", revision=None, device=None):
    """A model for targets, on `device`: `load_model`, but a teacher with linear attention as the student that keeps every
    layer of it. That is the same function, and keeps packed documents apart, which transformers' own does not.

    Raises:
        ConfigError, CheckpointError, UnsupportedTeacherError: see `load_model` and `convert`.
    """
    source = local_source(checkpoint, None if Path(checkpoint).exists() else revision)
    kind = None if is_gguf(source) else read_json(source / "config.json", source.name).get("model_type")
    if kind not in FAMILIES or "linear_attention" not in FAMILIES[kind].traits:
        return load_model(checkpoint, dtype, revision, device)
    require_intact(source)
    model = from_teacher(XLSTMHybridForCausalLM, source, layer_types="teacher", dtype=dtype)
    return model.to(device or device_of())
