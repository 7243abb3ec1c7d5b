"""C functions of ours, built on first use by the system's compiler: for what torch can say in many small calls only.

No compiler, one that fails, or a CPU without its instructions: a reason, and the torch form runs. A library stands in
the cache folder under what it depends on, the source, the compiler and the CPU, and under the digest of its own bytes:
loading a file that was cut short would end the process. It has no dependency of its own: its threads are those of the
OpenMP runtime that torch has loaded, and where there is none it runs in one.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  (its OpenMP runtime is what the libraries are bound to)

from xlstm_kernels.backends.verified import cache_folder

# errno and floating point exceptions are not looked at, and loops over functions that set them stay scalar
COMMON = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# the first that builds and loads; without a runtime, OpenMP's annotations of loops still tell what is a vector
KINDS = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",))


class Library(NamedTuple):
    """functions: the loaded library, None if there is none.  reason: why.  threads: whether it can use several.  name:
    changes with all that it depends on.
    """

    functions: ctypes.CDLL | None
    reason: str = ""
    threads: bool = False
    name: str = ""


def compiler():
    """The command `$CC`, or the system's C compiler; None if there is neither."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation without an end: a name that is not found says so
        named = [os.environ["CC"]]
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return named or ([found] if found else None)


def cpu():
    """What "-march=native" stands for."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return platform.machine() + "".join(re.findall(r"^(?:flags|Features|model name)\s*:.*", text, re.M)[:2])
    except OSError:
        return platform.machine() + platform.processor()


@cache
def library(source):
    """The `Library` of a C file, built where it has not been built before. `XLSTM_KERNELS_COMPILED=0` builds nothing."""
    source = Path(source)
    if os.environ.get("XLSTM_KERNELS_COMPILED") == "0":
        return Library(None, "XLSTM_KERNELS_COMPILED=0")
    if not source.exists():
        return Library(None, f"{source.name} is not there")
    command = compiler()
    if command is None:
        return Library(None, "no C compiler was found: install gcc or clang, or name one in CC")
    try:
        version = run(*command, "--version")
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"the C compiler does not run: {said(error)}")
    reasons = []
    for kind in KINDS:
        flags, content = (*COMMON, *kind), source.read_bytes()
        facts = "\n".join((*command, version, *flags, cpu())).encode()
        name = f"{source.stem}-{digest(facts + content)}"
        try:
            return Library(load(command, source, name, flags), threads="-fopenmp" in kind, name=name)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(said(error))
    return Library(None, f"{source.name} did not build: {reasons[-1]}")


def load(command, source, name, flags):
    """The library, from the cache folder if it is there whole; what was damaged there is built again."""
    kept = cache_folder()
    for path in kept.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{digest(path.read_bytes())}":
                return bind(path)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=kept, prefix=".tmp-")
    except OSError:  # no place to keep it: for this process alone
        kept, folder = None, tempfile.mkdtemp()
    try:
        part, whole = Path(folder, "part.o"), Path(folder, "whole.so")
        run(*command, *flags, "-c", str(source), "-o", str(part))
        # linked without OpenMP's flag: a runtime of the system's would stand beside torch's, with threads of its own
        run(*command, "-shared", str(part), "-o", str(whole), "-lm")
        functions = bind(whole)
        if kept is not None:
            with contextlib.suppress(OSError):  # a folder stands in its place
                os.replace(whole, kept / f"{name}-{digest(whole.read_bytes())}.so")
        return functions
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def bind(path):
    """Load a library with all that it refers to, now: a missing runtime is an OSError here and no crash later."""
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)


def run(*command):
    """What a command says, whatever encoding it says it in."""
    return subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=120
    ).stdout


def said(error):
    text = getattr(error, "stderr", None) or str(error)
    return text.strip().splitlines()[0][:300]
