"""Questions to this machine that a process asks once."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from threading import Lock


def once(check):
    """`functools.cache` for what tries something out: one thread does, and the others wait for its answer. It runs in a
    thread of its own, where none of the caller's modes are on: autocast, a trace, a default device, a counter of FLOPs.
    """
    lock, answers = Lock(), {}

    @cache
    @wraps(check)
    def asked(*args):
        with lock:
            if args not in answers:
                with ThreadPoolExecutor(1) as thread:
                    answers[args] = thread.submit(check, *args).result()
            return answers[args]

    return asked
