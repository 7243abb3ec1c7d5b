"""What the trainers read: data sets, or the tiny domains of `toy_domains`, as packed rows of one length.

source -> documents (token ids and labels) -> mix by shares of tokens -> rows. Everything is seeded, and a stream goes
on from its state.
"""

from xlstm_hybrid.data.documents import IGNORE, encode_chat, encode_text
from xlstm_hybrid.data.rows import collate, joint_prompts, open_rows, open_streams, packed_rows, prompts, train_dataset

__all__ = [
    "IGNORE",
    "collate",
    "encode_chat",
    "encode_text",
    "joint_prompts",
    "open_rows",
    "open_streams",
    "packed_rows",
    "prompts",
    "train_dataset",
]
