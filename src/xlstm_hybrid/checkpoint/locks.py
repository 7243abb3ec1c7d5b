"""Locks: one of several processes does a piece of work, the others wait or do another. An optimisation, nothing's
correctness depends on them.

A lock is a file that names its process. A process of this machine that is gone has no lock; one of another machine must
give a sign of life.
"""

import contextlib
import os
import threading
import time

from xlstm_hybrid.checkpoint.files import dead, owner

LOCK_SECONDS = 600  # without a sign of life after which a lock of another machine counts for nothing
BEAT_SECONDS = 60  # between signs of life of `locked`
POLL_SECONDS = 5  # between two looks at the lock of another


@contextlib.contextmanager
def try_lock(path):
    """`(True if this process has the lock, function that gives a sign of life)`; it is let go after the block."""
    mine = take(path)
    try:
        yield mine, lambda: os.utime(path) if path.exists() else None
    finally:
        if mine:
            path.unlink(missing_ok=True)


def take(path):
    """Whether this process now has the lock: nobody had it, or whoever had is gone or gave no sign of life for long."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < LOCK_SECONDS and not gone(path.read_text(encoding="utf-8")):
                return False
        path.unlink(missing_ok=True)
        return take(path)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(owner(os.getpid()))
    return True


def gone(text):
    """Whether `text`, made by `owner`, names a process of this machine that is no more, or this one itself."""
    return dead(text) or text == owner(os.getpid())


@contextlib.contextmanager
def locked(path, waiting=None):
    """Have a lock as soon as whoever has it lets go or is gone, and give signs of life while the block runs.

    Args:
        waiting: called once with the text of the lock, before this process begins to wait for it.
    """
    while True:
        with try_lock(path) as (mine, alive):
            if mine:
                with beating(alive):
                    yield
                return
        if waiting is not None:
            with contextlib.suppress(FileNotFoundError):
                waiting(path.read_text(encoding="utf-8"))
                waiting = None
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def beating(alive, seconds=BEAT_SECONDS):
    """Call `alive` every so many seconds, from a thread, while the block runs."""
    stop = threading.Event()

    def beat():
        while not stop.wait(seconds):
            with contextlib.suppress(OSError):
                alive()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
