"""Whether a compiled kernel gives right results on this machine: checked once against a plain form, saved on disk.

Compilers have produced kernels that are finite and wrong. So the first use of an operation with a dtype and head dims
on a GPU runs a small problem, forward and backward, by the kernel and by its plain form in float64. The verdict holds
for the GPU, the versions and our sources.
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

HERE = Path(__file__).parent
SOURCES = HERE.parent if HERE.name == "backends" else HERE  # an exported checkpoint has all files in one folder
VERDICTS = {}  # (operation, device, dtype, dims) -> bool, of this process
# largest error, on the scale of the largest entry
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9}


def verified(operation, check, device, dtype, **dims):
    """True if the operation's kernel has given right results on a small problem on this device, now or earlier.

    Args:
        operation: its name.
        check: function (device, dtype, **dims) -> {what: error}, made with `draw_numbers` and `compare_forms`.
        dims: sizes that select another compiled kernel, such as K and V.
    """
    key = operation, device, dtype, tuple(sorted(dims.items()))
    if key not in VERDICTS:
        sizes = "".join(f"{name} {size}, " for name, size in sorted(dims.items()))
        question, path = f"{operation} ({sizes}{str(dtype).removeprefix('torch.')})", verdict_file(device)
        verdict = read_verdicts(path).get(question)
        if verdict is None:
            VERDICTS[key] = False  # the check itself must not ask again
            verdict = verdict_of(check, device, dtype, dims)
            save_verdict(path, question, verdict, environment_of(device))
        VERDICTS[key] = verdict["right"]
        if not verdict["right"]:
            warn(question, verdict, path, dtype)
    return VERDICTS[key]


def verdict_of(check, device, dtype, dims):
    """{"right": bool, "errors": {what: error}}; a check that raises is a wrong kernel, with the reason."""
    try:
        errors = check(device, dtype, **dims)
    except Exception as reason:  # whatever the compiler or driver throws means that the kernel cannot be used here
        return {"right": False, "errors": {}, "reason": f"{type(reason).__name__}: {reason}"[:500]}
    return {"right": all(error <= ALLOWED[dtype] for error in errors.values()), "errors": errors}


def warn(question, verdict, path, dtype):
    wrong = {name: float(f"{error:.2g}") for name, error in verdict["errors"].items() if not error <= ALLOWED[dtype]}
    found = f"its results differ from the plain form by {wrong} where {ALLOWED[dtype]} is allowed"
    warnings.warn(
        f"the compiled kernel of {question} is wrong on this machine: {verdict.get('reason') or found}. The torch form "
        f"runs instead, slower. The verdict is saved in {path.name} in the cache folder (XLSTM_KERNELS_CACHE); "
        'delete it to check again, or name backend="triton" to use the kernel all the same',
        RuntimeWarning,
        stacklevel=2,
    )


# --- verdicts on disk --------------------------------------------------------------------------------------------


def cache_folder():
    """`$XLSTM_KERNELS_CACHE`, or xlstm_kernels in the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("XLSTM_KERNELS_CACHE") or caches / "xlstm_kernels")


def digest_of(folder):
    """16 characters that change with any Python source in a folder."""
    sources = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


@cache
def environment_of(device):
    """What a verdict depends on besides the operation: GPU, versions, and our own sources."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    name = f"{gpu.name}, sm_{gpu.major}{gpu.minor}" if gpu else device.type
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}
    return {"device": name, **versions, "sources": digest_of(SOURCES)}


def file_of(environment, name="verdicts"):
    """One JSON file for each environment, a dict of text."""
    text = json.dumps(environment, sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def verdict_file(device):
    return file_of(environment_of(device))


def read_verdicts(path):
    """{question: verdict} of a file; nothing if it cannot be read, which costs a check and no more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
        errors = [error for verdict in found.values() for error in verdict["errors"].values()]
        sound = all(isinstance(error, float | int) for error in errors)
        return found if sound and all(isinstance(verdict["right"], bool) for verdict in found.values()) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def save_verdict(path, question, verdict, environment):
    """Add a verdict by replacing the file, as several processes may at once; without a folder, checks repeat."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment, "verdicts": read_verdicts(path) | {question: verdict}}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".tmp-", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass


# --- what checks are made of -------------------------------------------------------------------------------------


def draw_numbers(generator, *shape, dtype, device):
    """Normal numbers that every machine draws alike, rounded to `dtype`."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def compare_forms(kernel, plain, inputs, upstream):
    """{what: `largest_error`} of outputs and gradients by all inputs of two forms, the plain one in float64."""
    results = []
    for form, double in ((kernel, False), (plain, True)):
        x = [(a.double() if double else a).detach().clone().requires_grad_() for a in inputs]
        with torch.enable_grad():
            outputs = form(*x)
            loss = sum((y.double() * u).sum() for y, u in zip(outputs, upstream, strict=True))
        results.append([y.detach() for y in outputs] + list(torch.autograd.grad(loss, x)))
    names = [f"output {j}" for j in range(len(upstream))] + [f"gradient {j}" for j in range(len(inputs))]
    return {name: largest_error(a, b) for name, a, b in zip(names, *results, strict=True)}


def largest_error(got, want):
    """Largest difference on the scale of the largest entry; inf if anything is not finite."""
    e = ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()
    return e if e == e else float("inf")
