"""Every file operation of some work fails once, in turn: with an error of the system, interrupted, or killed there.

The operations are those that Python audits: open, rename, link, remove, make and remove directories, change times and
modes. What native code does by itself (safetensors writes its file) is not among them.
"""

import errno
import os
import signal
import sys
from collections import Counter
from pathlib import Path

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.chmod", "os.listdir"}
EVENTS |= {"os.scandir", "shutil.rmtree"}
FAULTS = ("ENOSPC", "EIO", "EACCES", "SIGINT", "SIGKILL")
state = {}


def hook(event, arguments):
    if not state or event not in EVENTS:
        return
    names = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
    if not any(str(name).startswith(state["folder"]) for name in names):
        return
    state["seen"] += 1
    if state["seen"] == state["at"]:
        if state["fault"] == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if state["fault"] == "SIGINT":
            raise KeyboardInterrupt
        raise OSError(getattr(errno, state["fault"]), os.strerror(getattr(errno, state["fault"])), names[0])


def failing(work, folder, fault, at):
    """Do `work` with the `at`-th operation below `folder` failing; returns `(whether there are that many, what came of
    it)`: "finished", "killed", or the exception.
    """
    if fault == "SIGKILL":
        pid = os.fork()
        if not pid:
            code = 1
            try:
                state.update(folder=str(folder), fault=fault, at=at, seen=0)
                work()
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, status
        return killed, "killed" if killed else "finished"
    state.update(folder=str(folder), fault=fault, at=at, seen=0)
    try:
        work()
        outcome = "finished"
    except (Exception, KeyboardInterrupt) as error:
        outcome = error
    finally:
        reached = state["seen"] >= at
        state.clear()
    return reached, outcome


def each_fails(work, folder, after, faults=FAULTS, fresh=lambda: None):
    """Let every operation of `work` fail once with each fault; `after(fault, outcome)` looks at what is left.

    Returns:
        `{fault: {kind of outcome: how many}}`.
    """
    found = {}
    for fault in faults:
        found[fault], at, reached = Counter(), 0, True
        while reached:
            at += 1
            fresh()
            reached, outcome = failing(work, Path(folder), fault, at)
            if reached:
                found[fault][outcome if isinstance(outcome, str) else type(outcome).__name__] += 1
                after(fault, outcome)
    return found


sys.addaudithook(hook)  # it can not be taken out again; without a state it does nothing
