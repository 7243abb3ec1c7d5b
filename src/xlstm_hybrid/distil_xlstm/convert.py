"""A teacher's checkpoint to a Distil-xLSTM student's, and one copy of the embeddings while both are in memory."""

import time
from pathlib import Path

import torch

from xlstm_hybrid.checkpoint.files import add_provenance, staged, write_manifest
from xlstm_hybrid.conversion.source import open_teacher
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM
from xlstm_hybrid.distil_xlstm.transfer import new_student
from xlstm_hybrid.errors import ConfigError


def convert(teacher, out, *, dtype=None, revision=None, seed=0, overwrite=False, **options):
    """`DistilXLSTMForCausalLM.from_teacher` into a directory that `AutoModelForCausalLM` loads, with tokenizer, chat
    template and generation config. Returns the report.

    Raises:
        UnsupportedTeacherError, ConfigError, CheckpointError: see there, or `out` exists; nothing is written.
        CheckpointWriteError: there is no room for `out`, or it holds the teacher; what was there is untouched.
    """
    started, out = time.monotonic(), Path(out)
    with open_teacher(teacher, revision) as source:
        source.refuse_target(out)
        student = new_student(DistilXLSTMForCausalLM, source, dtype, seed, **options)
        report = student.transfer_report
        needed = sum(p.numel() * p.element_size() for p in student.parameters())
        with staged(out, overwrite, needed) as directory:
            student.save_pretrained(directory)
            report.files = source.copy_files(directory)
            config = {"teacher": source.name, "revision": source.revision, "dtype": report.dtype, "seed": seed}
            config |= options
            figures, seconds = report.summary(), round(time.monotonic() - started, 3)
            record = {"parent": source.path, "config": config, "figures": figures, "seconds": seconds}
            add_provenance(directory, "distil-convert", **record)
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
