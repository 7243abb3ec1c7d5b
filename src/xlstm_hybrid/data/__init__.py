"""What the trainers read: data sets, or the tiny domains of `toy_domains`, as packed rows of one length.

source -> documents (token ids and labels) -> mix by shares of tokens -> rows. Everything is seeded, and a stream goes
on from its state.
"""

from xlstm_hybrid.data.documents import IGNORE, encode_chat, encode_text, scored_runs
from xlstm_hybrid.data.rows import (
    collate,
    joint_prompts,
    open_rows,
    open_streams,
    packed_rows,
    pieces,
    prompts,
    train_dataset,
)

__all__ = [
    "IGNORE",
    "collate",
    "encode_chat",
    "encode_text",
    "joint_prompts",
    "open_rows",
    "open_streams",
    "packed_rows",
    "pieces",
    "prompts",
    "scored_runs",
    "train_dataset",
]
