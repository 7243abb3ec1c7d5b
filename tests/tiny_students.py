"""Tiny students of every teacher family, with weights so large in every branch that a broken one shows. Tests read them
only, or copy them.
"""

import functools

import torch
from conftest import enlarge, tiny_student
from tiny_teachers import FAMILIES, WINDOWED, WITH_LINEAR, teacher

from xlstm_hybrid import XLSTMHybridForCausalLM

W, S = 7, 2
STACKS = ("hybrid", "mixed")
every_family = tuple(FAMILIES)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float64 models; the families' norms calculate in float32


@functools.cache
def student(family, stack="hybrid", dtype=torch.float64, gain=2.5, **teacher_changes):
    """Three layers: all hybrid, or one of each kind that the family has; four with linear attention before each other one."""
    last = "sliding_attention" if family in WINDOWED else "hybrid_sliding"
    mixed = ["hybrid_sliding", "full_attention", last]
    if family in WITH_LINEAR:
        mixed = ["linear_attention", "hybrid_sliding", "linear_attention", "full_attention"]
    kinds = {"hybrid": None, "mixed": mixed}[stack]
    chosen = {
        "sliding_window": W,
        "num_sink_tokens": S,
        "layer_types": kinds,
        "mlstm_context": 64,
        "mlstm_chunk_size": 8,
    }
    made = XLSTMHybridForCausalLM.from_teacher(teacher(family, window=5, **teacher_changes), **chosen)
    return enlarge(made.to(dtype), gain=gain).eval()


def ids_of(length, rows=2, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Rows [1, T_j] as one batch: `(ids, attention_mask)`, [B, longest]."""
    longest = max(r.shape[1] for r in rows)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(r, (longest - r.shape[1], 0), value=5) for r in rows])
    return ids, torch.cat([pad(torch.ones_like(r), (longest - r.shape[1], 0)) for r in rows])


MIXED = ["hybrid_sliding", "full_attention", "hybrid_sliding", "hybrid_sliding"]


def mixed_checkpoint(folder):
    """`folder` with a student of four layers, one of which keeps the teacher's attention, with tied embeddings and traits."""
    traits = {"embedding_multiplier": 1.5, "residual_multiplier": 0.75, "rope_layers": [True, True, False, True]}
    traits |= {"attention_output_gate": True}
    traits["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    options = traits | {"num_hidden_layers": 4, "layer_types": MIXED, "tie_word_embeddings": True}
    model = tiny_student(torch.float32, gain=1.0, **options)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder
