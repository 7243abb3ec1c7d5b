"""How Triton kernels are started: with a tile from a table, on a GPU, in the interpreter, or recorded for a compiler."""

import contextlib
import os
from contextvars import ContextVar
from typing import NamedTuple

import torch

# row of the tile tables -> compute capabilities that it serves
CHIPS = {80: (80,), 86: (86, 87, 89, 120, 121), 90: (90,), 100: (100, 101, 103)}
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}  # KiB of shared memory that one program may use there
# What the tables of kernels over heads go up to: head dims of keys (or features of the mLSTM) and values, and features
# of a step
LARGEST_K, LARGEST_V, LARGEST_F = 128, 256, 256

RECORDED = ContextVar("recorded", default=None)
CHIP = ContextVar("chip", default=None)
TILE = ContextVar("tile", default=None)


class Tile(NamedTuple):
    """Sizes of one table entry. sizes: constants of the kernel, such as {"BT": 64}."""

    sizes: dict
    num_warps: int = 4
    num_stages: int = 2


class Launch(NamedTuple):
    """A start that was recorded instead of made."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict
    tile: Tile


class Recording(list):
    """Launches, and which entries of which tables were looked up for them: {(id of the table, key)}."""

    def __init__(self):
        super().__init__()
        self.entries = set()


def interpreted():
    """True if triton runs in its interpreter, where CPU tensors are welcome."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device):
    """Why the kernels cannot run on a device, or None."""
    if RECORDED.get() is not None:
        return None
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed: pip install 'xlstm-hybrid[gpu]'"
    if device.type == "cuda" or (interpreted() and device.type == "cpu"):
        return None
    return f"the tensors are on {device}: the kernels need a GPU, or TRITON_INTERPRET=1 for their interpreter"


def chip(device):
    """Row of the tile tables for a device; the interpreter reads the row of sm_90."""
    if CHIP.get() is not None:
        return CHIP.get()
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    served = [row for row, capabilities in CHIPS.items() if capability in capabilities]
    return served[0] if served else (86 if capability < 130 else 100)  # unknown: the smallest shared memory of its time


def look_up(table, device, width, dtype):
    """Entry of `table` for a device, a head dim (or other width, the next larger entry serves) and a dtype.

    table: {(chip, width, "half" | "single"): Tile}; a chip without an entry takes that of sm_80 (86 if it is small).
    Raises ValueError if the width is larger than every entry's.
    """
    if TILE.get() is not None:
        return TILE.get()
    kind = "half" if dtype in (torch.bfloat16, torch.float16) else "single"
    row = chip(device)
    row = row if any(c == row for c, _, _ in table) else 80
    widths = sorted(w for c, w, d in table if c == row and d == kind and w >= width)
    if not widths:
        raise ValueError(
            f"width {width}: the largest in the tile table for sm_{row}, {kind} precision, is "
            f"{max(w for _, w, _ in table)}"
        )
    key = row, widths[0], kind
    if RECORDED.get() is not None:
        RECORDED.get().entries.add((id(table), key))
    return table[key]


def launch(kernel, grid, *args, tile, **constants):
    """Start `kernel` on `grid`: args in the kernel's order, then its constants; the tile's sizes are constants too."""
    if any(n == 0 for n in grid):
        return
    recorded = RECORDED.get()
    if recorded is not None:
        recorded.append(Launch(kernel, tuple(grid), args, {**constants, **tile.sizes}, tile))
        return
    options = {} if interpreted() else {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    device = next((x.device for x in args if isinstance(x, torch.Tensor)), None)
    with torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*args, **constants, **tile.sizes, **options)


def power_of_2(n, least=16):
    """The tile that holds n columns: tl.dot wants at least 16."""
    return max(least, 1 << (n - 1).bit_length())


def strides_of(*tensors):
    """Strides in batch, token and head of tensors [B, T, H, d], whose last dim has no gaps."""
    return [n for x in tensors for n in x.stride()[:3]]


@contextlib.contextmanager
def setting(variable, value):
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


@contextlib.contextmanager
def recording(capability):
    """`with recording(90) as launches:` collects what would be started on that chip; tensors may be "meta"."""
    with setting(CHIP, capability), setting(RECORDED, Recording()) as launches:
        yield launches


def using(tile):
    """`with using(Tile({"BT": 16})):` every kernel takes this tile instead of its table's; for tests and searches."""
    return setting(TILE, tile)
