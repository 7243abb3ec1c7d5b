"""A store of teacher targets: what a teacher says about every token, calculated once, on disk in the order and packing
the student reads.

    index.json               spec, first row of every shard, and of each finished shard its sizes and SHA-256
    shard-00000.safetensors  see `layout.pack`; memory-mapped by the reader
    shard-00000.json         the shard's entry in the index, written once the shard is complete

Six bytes per stored entry, eight per token, and three 8-byte offsets per row. Built by any number of processes at once
(`build_store`), read row by row (`TeacherStore`). A row that is read is checked against its own check bytes,
against what log-probabilities are, and, by `StoreCollator`, against the batch that it is used for.
"""

from xlstm_hybrid.teacher_store.layout import KINDS, RowInput, row_input, store_bytes
from xlstm_hybrid.teacher_store.reader import StoreCollator, TeacherStore, number_rows
from xlstm_hybrid.teacher_store.writer import build_store, plan_store, planned_bytes

__all__ = [
    "KINDS",
    "RowInput",
    "StoreCollator",
    "TeacherStore",
    "build_store",
    "number_rows",
    "plan_store",
    "planned_bytes",
    "row_input",
    "store_bytes",
]
