"""Whatever file operation of a store or of a lock fails, it is finished, goes on, or names its error; the next call has
the same bytes.
"""

import os
import shutil

import pytest
from file_faults import FAULTS, each_fails
from test_store import build, bytes_of, data

from xlstm_hybrid.checkpoint import locks
from xlstm_hybrid.checkpoint.files import owner
from xlstm_hybrid.checkpoint.locks import holder_of, locked
from xlstm_hybrid.errors import CheckpointWriteError, XLSTMHybridError
from xlstm_hybrid.teacher_store import TeacherStore

ALLOWED = {fault: {"finished", "CheckpointWriteError", "StoreError"} for fault in FAULTS}
ALLOWED["SIGINT"] = {"finished", "KeyboardInterrupt"}
ALLOWED["SIGKILL"] = {"killed"}


@pytest.mark.slow
def test_a_store_whose_files_fail_one_by_one_has_the_same_bytes_in_the_end(tmp_path):
    rows, wanted, out = data(4), tmp_path / "wanted", tmp_path / "store"
    build(wanted, rows)

    def after(fault, outcome):
        assert isinstance(outcome, str | KeyboardInterrupt | XLSTMHybridError), (fault, repr(outcome))
        build(out, rows)
        assert bytes_of(out) == bytes_of(wanted), (fault, outcome)
        assert not list(out.glob(".*"))
        TeacherStore(out).verify()

    found = each_fails(lambda: build(out, rows), out, after, fresh=lambda: shutil.rmtree(out, ignore_errors=True))
    for fault, counts in found.items():
        assert sum(counts.values()) > 20 and set(counts) <= ALLOWED[fault], (fault, counts)


def test_a_lock_whose_files_fail_one_by_one_is_free_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    path = tmp_path / ".claim-work"

    def work():
        with locked(path):
            pass

    def after(fault, outcome):
        assert isinstance(outcome, str | KeyboardInterrupt | CheckpointWriteError), (fault, repr(outcome))
        with locked(path):
            assert holder_of(path.read_text())["pid"] == os.getpid()
        assert not [
            p.name for p in tmp_path.iterdir() if not p.name.startswith(f".tmp-.claim-work-{owner(os.getpid())}")
        ]

    # what a power cut left
    found = each_fails(work, tmp_path, after, fresh=lambda: path.write_text(""))
    for fault, counts in found.items():
        assert sum(counts.values()) > 5 and set(counts) <= ALLOWED[fault], (fault, counts)
