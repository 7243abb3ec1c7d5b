"""Processes that wait for the first one: until it is done, and with a named error where it never will be."""

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch

from xlstm_hybrid.errors import CheckpointWriteError, WaitError
from xlstm_hybrid.training.distributed import first_process_works


def process(rank, folder, first):
    """One of two processes; what became of it stands in a file."""
    where = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", **where)
    end = "done"
    try:
        with first_process_works("writing student", seconds=30 if first != "hangs" else 1):
            if rank == 0:
                if first == "fails":
                    raise CheckpointWriteError("the disk is full")
                if first == "dies":
                    os._exit(9)
                if first == "hangs":
                    while not (folder / "1").exists():
                        pass
                (folder / "student").write_text("whole")
            # the second comes to the end of the block at once
        if rank == 1:
            assert (folder / "student").read_text() == "whole"
    except (CheckpointWriteError, WaitError) as error:
        end = f"{type(error).__name__}: {error}"
    (folder / f"{rank}").write_text(end)
    os._exit(0)  # without the farewell of the group, whose other half may be gone


@pytest.mark.parametrize(
    "first, ends",
    [
        ("writes", ["done", "done"]),
        (
            "fails",
            ["CheckpointWriteError: the disk is full", "first one, for writing student: it failed, and says why"],
        ),
        ("dies", [None, "WaitError: process 1 waited up to 0:00:30 for the first one, for writing student: "]),
        ("hangs", ["WaitError: process 0", "WaitError: process 1 waited up to 0:00:01 for the first one, for writing"]),
    ],
)
def test_the_others_wait_for_the_first_process_and_are_told_where_it_never_comes(tmp_path, first, ends):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=process, args=(rank, tmp_path, first)) for rank in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [9 if first == "dies" else 0, 0]
    found = [(tmp_path / f"{rank}").read_text() if (tmp_path / f"{rank}").exists() else None for rank in range(2)]
    assert found[0] == ends[0] or ends[0] in found[0]
    assert ends[1] in found[1], found[1]


def test_in_one_process_nothing_is_waited_for():
    with first_process_works("writing student"):
        done = True
    assert done
