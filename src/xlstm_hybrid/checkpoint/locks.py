"""Locks: one of several processes does a piece of work, the others wait or do another. An optimisation, nothing's
correctness depends on them.

A lock is a file that names its process: one line of JSON, which is there with the file or not at all. A process of this
machine that is gone has no lock, whatever process has its number now; one of another machine must give a sign of life.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import threading
import time
import uuid
from pathlib import Path

from xlstm_hybrid.checkpoint.files import dead, not_written, owner, remove_abandoned
from xlstm_hybrid.errors import WaitError

LOCK_SECONDS = 600  # without a sign of life after which a lock of another machine counts for nothing
BEAT_SECONDS = 60  # between signs of life of `locked`
POLL_SECONDS = 5  # between two looks at the lock of another
WAIT_SECONDS = 24 * 3600  # that `locked` waits at most
SAY_SECONDS = 3600  # between two messages of one that waits
EARLIER = re.compile(r"\S+-\d+")  # all that a lock of version 0.1 holds: `files.owner`


@contextlib.contextmanager
def try_lock(path):
    """`(True if this process has the lock, function that gives a sign of life)`; it is let go after the block."""
    text = take(path)
    try:
        yield text is not None, lambda: os.utime(path) if written(path) == text else None
    finally:
        if text is not None and written(path) == text:  # else another has it: we were silent for long
            with contextlib.suppress(OSError):  # what it was for is done; it ends with this process
                path.unlink(missing_ok=True)


def take(path):
    """The text of the lock that this process now has, None where another process has it.

    It is had where nobody had it, or whoever had is gone, gave no sign of life for long, or left a torn file.

    Raises:
        CheckpointWriteError: the directory takes no file, or does not let one go.
    """
    pid = os.getpid()
    namespace, started, _ = process_of(pid)
    holder = {"owner": owner(pid), "host": platform.node(), "pid": pid, "namespace": namespace, "started": started}
    text = json.dumps(holder | {"since": time.time()})
    try:
        while not create(path, text):
            if not remove_lapsed(path):
                return None
    except OSError as error:
        raise not_written(path, error) from error
    return text


def create(path, text):
    """Whether a file `path` with this text is made now, content and name in one step."""
    beside = path.with_name(f".tmp-{path.name}-{owner(os.getpid())}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(text, encoding="utf-8")
        try:
            os.link(beside, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: a torn lock counts for nothing
            with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
                file.write(text)
                return True
            return False
    finally:
        beside.unlink(missing_ok=True)


def remove_lapsed(path):
    """Whether the lock `path` counts for nothing, and is removed or gone; False where its process has it."""
    try:
        with open(path, "rb") as file:
            try:  # of two that find it lapsed one removes it, and the other not what came after it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without flock
                pass
            with contextlib.suppress(FileNotFoundError):
                now = os.stat(path)
                if now.st_ino != os.fstat(file.fileno()).st_ino:
                    return True
                if holds(file.read().decode(errors="replace"), time.time() - now.st_mtime):
                    return False
                path.unlink()
            return True
    except FileNotFoundError:
        return True
    except PermissionError:  # somebody else's, not for us to read
        return time.time() - os.stat(path).st_mtime > LOCK_SECONDS and path.unlink() is None


def holds(text, age):
    """Whether a lock with this text and this many seconds since its last sign of life is somebody's."""
    holder = holder_of(text)
    return holder is not None and age < LOCK_SECONDS and not gone(text)


def holder_of(text):
    """What the text of a lock says, as a dict with `owner` at least; None of one that is empty or torn."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {"owner": text} if EARLIER.fullmatch(text) else None
    return holder if isinstance(holder, dict) and isinstance(holder.get("owner"), str) else None


def clean_locks(directory):
    """Remove the locks in `directory` whose processes are no more; what was done, in words."""
    done = []
    for lock in sorted(Path(directory).glob(".claim-*")):
        with contextlib.suppress(OSError):
            if gone(written(lock) or ""):
                lock.unlink()
                done.append(f"undone: the lock {lock.name}, its process is no more")
    return done


def gone(text):
    """Whether `text`, of a lock or made by `owner`, names a process of this machine that is no more, or this one
    itself.
    """
    holder, pid = holder_of(text), os.getpid()
    if holder is None:
        return False
    namespace, _, _ = process_of(pid)
    if holder.get("namespace") not in (None, namespace):  # a container with numbers of its own: its signs of life count
        return False
    if holder["owner"] == owner(pid) or dead(holder["owner"]):
        return True
    if holder["owner"] != owner(holder.get("pid")):
        return False
    _, started, zombie = process_of(holder["pid"])
    return zombie or None not in (started, holder.get("started")) and started != holder["started"]


def process_of(pid):
    """`(namespace of its number, when it started in ticks, whether it has ended and nobody has looked)` of a process of
    this machine; None for what the system does not say.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return os.readlink("/proc/self/ns/pid"), int(numbers[18]), state == "Z"
    except (OSError, ValueError, IndexError):
        return None, None, False


def written(path):
    """The text of a lock, None where it is gone or not for us to read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")


def who_holds(path):
    """Words for whoever has the lock `path`: its process and machine, since when, its last sign of life; None where
    nobody has it.
    """
    try:
        seen = os.stat(path).st_mtime
        text = written(path)
    except OSError:
        return None
    if text is not None and not holds(text, time.time() - seen):
        return None
    holder = {"owner": "unknown"} if text is None else holder_of(text)
    pid = holder.get("pid", holder["owner"].rpartition("-")[2])
    here = holder["owner"] == owner(pid)
    machine = "this machine" if here else holder.get("host", "another machine")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", seen)))
    return f"process {pid} of {machine}, since {since}, last sign of life {max(0, time.time() - seen):.0f} s ago"


@contextlib.contextmanager
def locked(path, say=lambda text: None, limit=None):
    """Have a lock as soon as whoever has it lets go or is gone, and give signs of life while the block runs.

    Args:
        say: called with words for whoever has it and for how long this process waits, before it begins to wait and
            every hour.
        limit: seconds to wait at most, `WAIT_SECONDS` by default.
    Raises:
        WaitError: somebody has it after `limit` seconds.
    """
    begin, said = time.monotonic(), -SAY_SECONDS
    limit = WAIT_SECONDS if limit is None else limit
    step = f"if that process is not at work, end it, or delete {path.parent.name}/{path.name}"
    with contextlib.suppress(OSError):
        remove_abandoned(path)
    while True:
        with try_lock(path) as (mine, alive):
            if mine:
                with beating(alive):
                    yield
                return
        waited = time.monotonic() - begin
        if (who := who_holds(path)) is not None:
            if waited >= limit:
                raise WaitError(
                    f"waited {limit / 3600:.3g} h for {who}: start the same command again to wait on; {step}"
                )
            if waited - said >= SAY_SECONDS:
                left = (limit - waited) / 3600
                say(
                    f"{who}; until it ends, is gone or is silent for {LOCK_SECONDS // 60} minutes, {left:.3g} h at most; {step}"
                )
                said = waited
        time.sleep(min(POLL_SECONDS, max(0.0, limit - waited)))


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
        thread.join(POLL_SECONDS)  # a file system that hangs does not hold up what is done
