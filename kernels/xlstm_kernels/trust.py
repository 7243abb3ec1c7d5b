"""Whether a compiled kernel may be believed on this machine: checked once against a plain form, remembered on disk.

Compilers have produced kernels that are finite and wrong. So the first use of an operation with a dtype and head dims on a GPU runs a small
problem, forward and backward, by the kernel and by its plain form in float64. The verdict holds for the GPU, the versions and our sources.
"""

import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
KNOWN = {}  # (operation, device index, dtype, dims) -> bool, of this process
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9}  # largest error on the scale of the largest entry


def cache_folder():
    """`$XLSTM_KERNELS_CACHE`, or xlstm_kernels in the user's cache folder."""
    return Path(os.environ.get("XLSTM_KERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xlstm_kernels")


def digest_of(folder):
    """16 characters that change with any Python source in a folder."""
    sources = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


@cache
def surroundings(device):
    """What a verdict depends on besides the operation: GPU, versions, and our own sources."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"device": f"{gpu.name}, sm_{gpu.major}{gpu.minor}" if gpu else device.type, "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": triton, "sources": digest_of(SOURCES)}  # fmt: skip


def file_of(around, name="verdicts"):
    """One JSON file for each of the surroundings, a dict of text."""
    text = json.dumps(around, sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def verdict_file(device):
    return file_of(surroundings(device))


def remembered(path):
    """{question: verdict} of a file; nothing if it cannot be read, which costs a check and no more."""
    try:
        found = json.loads(path.read_text())["verdicts"]
        errors = [error for verdict in found.values() for error in verdict["errors"].values()]
        sound = all(isinstance(error, float | int) for error in errors)
        return found if sound and all(isinstance(verdict["right"], bool) for verdict in found.values()) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def remember(path, question, verdict, around):
    """Add a verdict to the file by replacing it; several processes may do so at once. A folder that cannot be written costs checks, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"surroundings": around, "verdicts": remembered(path) | {question: verdict}}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".tmp-", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass


def judge(check, device, dtype, dims):
    """{"right": bool, "errors": {name: error}}; a check that raises is a wrong kernel, with the reason."""
    try:
        errors = check(device, dtype, **dims)
    except Exception as reason:  # whatever the compiler or driver throws means that the kernel cannot be used here
        return {"right": False, "errors": {}, "reason": f"{type(reason).__name__}: {reason}"[:500]}
    return {"right": all(error <= ALLOWED[dtype] for error in errors.values()), "errors": errors}


def warn(question, verdict, path, dtype):
    wrong = {name: float(f"{error:.2g}") for name, error in verdict["errors"].items() if not error <= ALLOWED[dtype]}
    found = verdict.get("reason") or f"its results differ from the plain form by {wrong} where {ALLOWED[dtype]} is allowed"
    warnings.warn(f"the Triton kernel of {question} cannot be trusted on this machine: {found}. The torch form runs instead, which is slower. "
                  f"The verdict is kept in {path.name} in the cache folder (XLSTM_KERNELS_CACHE); delete it to check again, "
                  "or name backend=\"triton\" to use the kernel all the same", RuntimeWarning, stacklevel=2)  # fmt: skip


def trusted(operation, check, device, dtype, **dims):
    """True if the operation's kernel has given right results on a small problem on this device, now or earlier.

    Args:
        operation: its name.
        check: function (device, dtype, **dims) -> {name: error}, each the largest difference on the scale of the largest entry.
        dims: sizes that select another compiled kernel, such as K and V.
    """
    key = operation, device, dtype, tuple(sorted(dims.items()))
    if key not in KNOWN:
        sizes = "".join(f"{name} {size}, " for name, size in sorted(dims.items()))
        question, path = f"{operation} ({sizes}{str(dtype).removeprefix('torch.')})", verdict_file(device)
        verdict = remembered(path).get(question)
        if verdict is None:
            KNOWN[key] = False  # the check itself must not ask again
            verdict = judge(check, device, dtype, dims)
            remember(path, question, verdict, surroundings(device))
        KNOWN[key] = verdict["right"]
        if not verdict["right"]:
            warn(question, verdict, path, dtype)
    return KNOWN[key]
