"""Locks: one process has one, whoever is gone has none, and nobody waits without an end and without saying for whom."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from xlstm_hybrid.checkpoint import locks
from xlstm_hybrid.checkpoint.files import owner
from xlstm_hybrid.checkpoint.locks import holder_of, locked, take, try_lock, who_holds
from xlstm_hybrid.errors import CheckpointWriteError, WaitError


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".claim-work"


def aged(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def lock_of(pid, **changes):
    namespace, started, _ = locks.process_of(pid)
    holder = {"owner": owner(pid), "host": "here", "pid": pid, "namespace": namespace, "started": started}
    return json.dumps(holder | {"since": time.time()} | changes)


def test_a_lock_is_there_with_its_content_or_not_at_all(path, monkeypatch):
    """Between any two calls that touch the disk the lock is absent or says whose it is."""
    seen, link, unlink = [], os.link, type(path).unlink

    def watched(call):
        def watch(*args, **kwargs):
            seen.append(path.read_text() if path.exists() else None)
            call(*args, **kwargs)
            seen.append(path.read_text() if path.exists() else None)

        return watch

    monkeypatch.setattr(os, "link", watched(link))
    monkeypatch.setattr(type(path), "unlink", watched(unlink))
    text = take(path)
    assert seen == [None, text, text, text] and holder_of(text)["pid"] == os.getpid()
    assert [p.name for p in path.parent.iterdir()] == [".claim-work"]


def test_a_file_system_without_hard_links_has_locks_as_well(path, monkeypatch):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert take(path) == path.read_text()
    path.write_text(owner(os.getppid()))
    assert take(path) is None
    assert [p.name for p in path.parent.iterdir()] == [".claim-work"]


def test_a_disk_that_is_full_leaves_no_lock_and_a_named_error(path, monkeypatch):
    def full(self, text, encoding):
        with open(self, "w"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(CheckpointWriteError, match=r"could not write .claim-work \(No space left on device\)"):
        take(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("torn", ["", "{", '{"owner"', "[1, 2]", "{}", '{"owner": 7}', "\0\0\0\0", "half of a"])
def test_an_empty_or_torn_lock_counts_for_nothing(path, torn):
    path.write_text(torn)
    assert who_holds(path) is None and take(path) == path.read_text()


def test_a_lock_of_the_living_is_respected_and_one_of_the_dead_is_not(path):
    assert take(path)
    assert take(path)  # our own, left behind
    for living in owner(os.getppid()), lock_of(os.getppid()):  # of version 0.1, and of this one
        path.write_text(living)
        assert take(path) is None and path.read_text() == living
        aged(path, 700)
        assert take(path)  # no sign of life for long
    parent = locks.process_of(os.getppid())[1]
    path.write_text(lock_of(os.getppid(), started=parent - 1))  # its number is another process's now
    assert take(path)
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    text = lock_of(process.pid)
    process.join()
    for dead in text, owner(process.pid):
        path.write_text(dead)
        assert take(path)


def test_a_process_that_ended_and_that_nobody_looked_at_has_no_lock(path):
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        while locks.process_of(pid)[2] is not True:
            pass
        path.write_text(lock_of(pid))
        os.kill(pid, 0)  # there is a process of this number
        assert take(path)
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "elsewhere",
    [
        "another-machine-17",
        json.dumps(
            {"owner": "abcdef-17", "host": "node-b", "pid": 17, "namespace": "pid:[1]", "started": 1, "since": 0}
        ),
        lock_of(2**22 + 1, namespace="pid:[1]"),  # another container
    ],
)
def test_a_lock_from_elsewhere_counts_while_it_gives_signs_of_life(path, elsewhere):
    path.write_text(elsewhere)
    assert take(path) is None
    aged(path, 700)
    assert take(path)


def test_a_lock_that_another_took_over_is_neither_beaten_nor_removed_by_the_first(path):
    with try_lock(path) as (mine, alive):
        assert mine
        path.write_text(lock_of(os.getppid()))
        aged(path, 300)
        before = path.stat().st_mtime
        alive()
        assert path.stat().st_mtime == before
    assert holder_of(path.read_text())["pid"] == os.getppid()


def test_of_two_that_find_a_lapsed_lock_the_second_does_not_remove_the_firsts(path, monkeypatch):
    path.write_text("")
    read = []

    def holds(text, age):
        if not read:  # the other was quicker, between our look and our removal
            read.append(text)
            path.unlink()
            path.write_text(lock_of(os.getppid()))
        return bool(text)

    fcntl_flock = locks.fcntl.flock

    def late(file, how):
        holds("", 0)
        fcntl_flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    assert take(path) is None and holder_of(path.read_text())["pid"] == os.getppid()


def test_waiting_says_for_whom_since_when_how_long_and_what_to_do_and_ends(path, monkeypatch):
    clock, said = [0.0], []
    path.write_text(lock_of(os.getppid(), since=1_700_000_000))
    monkeypatch.setattr(locks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + max(seconds, 600)))
    with pytest.raises(WaitError) as stop, locked(path, said.append, limit=3 * 3600):
        pytest.fail("had")
    who = f"process {os.getppid()} of this machine, since 2023-11-1"
    assert len(said) == 3 and all(text.startswith(who) for text in said)
    assert [text.partition("10 minutes, ")[2].partition(" at most")[0] for text in said] == ["3 h", "2 h", "1 h"]
    assert f"waited 3 h for {who}" in str(stop.value) and "start the same command again to wait on" in str(stop.value)
    assert f"end it, or delete {path.parent.name}/.claim-work" in str(stop.value)
    assert path.exists()


def test_whoever_waits_has_the_lock_when_its_process_is_killed(path, monkeypatch):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    path.write_text(lock_of(process.pid))
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with locked(path):
        assert holder_of(path.read_text())["pid"] == os.getpid()
    assert len(waits) == 1 and not path.exists()
