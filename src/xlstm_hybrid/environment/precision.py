"""Whether a narrow dtype pays on the machine at hand: a timed matrix product in it against the same one in float32.

A CPU without bfloat16 instructions multiplies in it several times slower than in float32; a GPU, or a CPU that has
them, several times faster. It is measured once per process and device. What the user asks for is done in any case, and
only a narrow dtype is warned of: who asks for float32 asks for its digits.
"""

import logging
import os
import time
from functools import lru_cache, partial
from typing import NamedTuple

import torch

NARROW = ("bfloat16", "float16")
SLOWER = 0.9  # share of float32's rate below which a dtype is slow here; what lies nearer to 1 may be the clock's noise
WIDTH = {"cpu": 256}  # of the square matrices, so that a product takes about a millisecond
WIDTH_ELSEWHERE = 2048
ROUNDS = 6  # the first one loads kernels; the best counts, because other processes only ever add time
told = set()  # (device, subject) of what this process has said
log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """narrow: whether the narrow dtype is at least as quick as float32.  why: the measured rates, and what is used."""

    narrow: bool
    why: str


# --- measuring -----------------------------------------------------------------------------------------------------


def numbered(device):
    """A device with its number: that of this process where a launcher started several."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    return device if device.index is not None else torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))


@lru_cache
def rates(device, name):
    """`(in a dtype, in float32)`: FLOP/s of a matrix product on a device, on a CPU of one core; 0 if it is refused."""
    width, wait = WIDTH.get(device.type, WIDTH_ELSEWHERE), lambda: None
    if device.type != "cpu":
        wait = partial(torch.accelerator.synchronize, device)
    threads, best = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # threads that wait for each other would hide the difference in a small product
    try:
        for _ in range(ROUNDS):
            for dtype in (name, "float32"):
                x = torch.ones(width, width, device=device, dtype=getattr(torch, dtype))
                wait()
                begin = time.perf_counter()
                torch.nn.functional.linear(x, x)
                wait()
                best[dtype] = min(time.perf_counter() - begin, best.get(dtype, float("inf")))
    except RuntimeError:
        return 0.0, 1.0
    finally:
        torch.set_num_threads(threads)
    return 2 * width**3 / best[name], 2 * width**3 / best["float32"]


def rate(device, name):
    """FLOP/s of a matrix product in a dtype on a device, on a CPU of one core; float32's for one that is not narrow."""
    return rates(numbered(device), name)[0] if name in NARROW else rates(numbered(device), NARROW[0])[1]


def compared(device, name):
    """`(whether a dtype is slow on a device, the rates in words)`."""
    narrow, full = rates(numbered(device), name)
    if not narrow:
        return True, f"it has no {name} product"
    unit, scale = ("TFLOP/s", 1e12) if min(narrow, full) >= 1e12 else ("GFLOP/s", 1e9)
    return narrow < SLOWER * full, f"{name} product {narrow / scale:,.0f} {unit}, float32 {full / scale:,.0f}"


def prefers(device, name="bfloat16"):
    """`Choice` between a narrow dtype and float32 on a device: what it multiplies in more quickly."""
    slow, found = compared(device, name)
    return Choice(not slow, f"{found}: {'float32' if slow else name} is used")


# --- choosing, and saying so ---------------------------------------------------------------------------------------


def tell(device, subject, text, level=logging.INFO):
    """Log a line, once per process, device and subject; of several processes of a launch the first one does."""
    key = str(numbered(device)), subject
    if key not in told and os.environ.get("RANK", "0") == "0":
        told.add(key)
        log.log(level, text)


def chosen(device, name="bfloat16"):
    """`prefers(device, name).narrow`, and the user is told."""
    choice = prefers(device, name)
    tell(device, name, f"{torch.device(device).type}: {choice.why}")
    return choice.narrow


def warn_if_slow(device, name, setting):
    """One warning for a narrow dtype that the user asked for by `setting` where float32 is quicker."""
    if name not in NARROW or not compared(device, name)[0]:
        return
    where, found = torch.device(device).type, compared(device, name)[1]
    text = f"{setting}: {name} is slower than float32 on this {where} ({found}); it is used because it was asked for"
    tell(device, setting, f"{text}, float32 would be quicker", logging.WARNING)


def dtype_for(device, asked=None, stored="bfloat16", setting="--dtype"):
    """Name of the dtype to calculate in on a device.

    Args:
        asked: what the user named; it is taken, with one warning where float32 is quicker.
        stored: that of the checkpoint, which is taken otherwise; float32 for a narrow one that is slow here.
        setting: by which the user named it, for the warning.
    """
    if asked is not None:
        warn_if_slow(device, asked, setting)
        return asked
    return stored if stored not in NARROW or chosen(device, stored) else "float32"


def settle_bf16(args):
    """Set `bf16` of a trainer's arguments where neither they nor `accelerate launch` name a precision.

    To be called before TRL's `__post_init__`, which would set it on every machine. `args.bf16_by_machine` tells that it
    was set here: such a run may be resumed where the choice is another one.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = args.use_cpu or found is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    device, asked = "cpu" if on_cpu else found.type, args.bf16
    if asked is None and not args.fp16 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        asked = True
    args.bf16_by_machine = asked is None and not args.fp16
    if args.bf16_by_machine:
        args.bf16 = chosen(device)
        args.use_cpu = args.use_cpu or (args.bf16 and on_cpu)  # transformers asks for it where bf16 is without a GPU
    elif asked:
        warn_if_slow(device, "bfloat16", "bf16")
