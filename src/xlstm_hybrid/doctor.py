"""What `xlstm-hybrid doctor` finds out: versions, this machine, folders and surroundings.

Each check yields findings; `CHECKS` lists them. A check imports what it needs itself and works without any of the
optional packages. One that raises is a finding that says so.
"""

import getpass
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from xlstm_hybrid.environment.versions import EXTRAS, PACKAGES, PYTHON, fault, installed, requirement, untested

OK, NOTE, MISSING, WRONG = "ok", "note", "missing", "WRONG"  # MISSING: optional
NEEDED = {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
VARIABLES = (*OFFLINE, "HF_HUB_DISABLE_TELEMETRY", "CUDA_VISIBLE_DEVICES")
LITTLE = 2e9  # bytes of free space, below which a folder is worth a note


class Finding(NamedTuple):
    """What was found of one thing, what is to be said of it, and the command or setting that mends it."""

    name: str
    found: str
    verdict: str = OK
    note: str = ""
    mend: str = ""


def shown(path):
    """A path without the home folder and the user's name, which have no place in an issue."""
    text = without_home(str(path))
    try:
        user = re.escape(getpass.getuser())
    except (KeyError, OSError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<![A-Za-z0-9]){user}(?![A-Za-z0-9])", "USER", text)


def without_home(text):
    for home in {str(Path.home()), os.path.realpath(Path.home())} - {"/"}:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return text


# --- versions ----------------------------------------------------------------------------------------------------


def package_versions():
    """Python, this package, and those packages of the table that are installed."""
    here, (major, minor) = platform.python_version(), map(int, PYTHON.split("."))
    old = sys.version_info[:2] < (major, minor)
    yield Finding("Python", here, WRONG if old else OK, f"{PYTHON} or newer; {platform.system()} {platform.machine()}")
    yield Finding(
        "xlstm-hybrid", installed("xlstm-hybrid") or "not installed", OK if installed("xlstm-hybrid") else NOTE
    )
    for name, package in PACKAGES.items():
        version = installed(name)
        tested = f"{package.floor} or newer" + (f", tested to {package.newest}" if package.newest else "")
        mend = f"pip install '{requirement(name)}'"
        if version is None:
            if name in NEEDED:
                yield Finding(name, "not installed", WRONG, tested, mend)
        elif reason := fault(name, version):
            yield Finding(name, version, WRONG, reason, mend)
        elif untested(name, version):
            yield Finding(name, version, NOTE, f"newer than {package.newest}, the newest that was tested")
        else:
            yield Finding(name, version, OK, tested)


def model_check():
    """Whether the installed transformers runs our models right: known for what was tested, else by a tiny model."""
    from xlstm_hybrid.distil_xlstm import DistilXLSTMForCausalLM
    from xlstm_hybrid.errors import CompatibilityError
    from xlstm_hybrid.model.compatibility import WITH_LINEAR, ensure_compatible
    from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM

    newer = untested("transformers", installed("transformers"))
    asked = [(cls.config_class.model_type, cls, None) for cls in (XLSTMHybridForCausalLM, DistilXLSTMForCausalLM)]
    if newer:
        asked += [(kind, XLSTMHybridForCausalLM, linear) for linear, kind in WITH_LINEAR.items()]
    mend = f"pip install '{requirement('transformers')}'"
    for name, cls, linear in asked:
        try:
            ensure_compatible(cls, linear)
        except CompatibilityError as error:
            yield Finding(name, "generation is wrong", WRONG, without_home(str(error)), mend)
        else:
            said = "checked with a tiny model" if newer else "with a transformers that is tested"
            yield Finding(name, "right", OK, said)


def extras():
    """What the optional packages would add, one finding for each of the package's extras."""
    for extra, (packages, adds) in EXTRAS.items():
        missing = ", ".join(name for name in packages if installed(name) is None)
        absent = (f"without {missing}", MISSING, adds, f"pip install 'xlstm-hybrid[{extra}]'")
        yield Finding(f"[{extra}]", *(absent if missing else ("installed", OK, adds)))


# --- CPU ---------------------------------------------------------------------------------------------------------


def cpu_name():
    try:
        return re.search(r"model name\s*: *(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    except (OSError, TypeError):  # no such file, or no such line: ARM has none
        return platform.processor() or platform.machine()


def instructions():
    """{name: whether the CPU has it}: vector instructions that torch uses, and those that multiply bf16."""
    import torch

    best = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64"):
        return {best: best != "DEFAULT"}
    found = {"AVX2": best in ("AVX2", "AVX512"), "AVX512": best == "AVX512"}
    for name, question in {"AVX512-bf16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}.items():
        found[name] = bool(getattr(torch.cpu, question, bool)())  # private: where torch has lost it, the answer is no
    return found


def cores():
    """Cores that this process may use: those it is bound to, and no more than a container's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, quota())))


def quota(root=Path("/sys/fs/cgroup")):
    """Cores' worth of time that a container's control group grants; infinity without a limit."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        try:
            granted, *period = (root / name).read_text(encoding="utf-8").split()
            period = period or (root / "cpu/cpu.cfs_period_us").read_text(encoding="utf-8").split()
            return float("inf") if granted in ("max", "-1") else int(granted) / int(period[0])
        except (OSError, ValueError, IndexError):
            continue
    return float("inf")


def cpu():
    """Its instructions, what it multiplies quickly, and the threads that torch uses."""
    import torch

    from xlstm_hybrid.environment.precision import prefers

    has = instructions()
    yield Finding("CPU", cpu_name())
    yield Finding("instructions", ", ".join(name for name, there in has.items() if there) or "none that torch knows")
    choice = prefers("cpu")
    yield Finding("bf16", "quick" if choice.narrow else "slow", OK, choice.why)
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        yield Finding(
            "ATEN_CPU_CAPABILITY", capability, NOTE, "torch is told to use these instructions and no better ones"
        )
    yield compiled_steps()
    yield threads(torch.get_num_threads(), cores())
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        slow = "waiting threads spin: beside other work each step becomes several times slower"
        yield Finding("OMP_WAIT_POLICY", "active", NOTE, slow, "export OMP_WAIT_POLICY=passive")


def compiled_steps():
    """Whether a decoded token on this CPU runs through C functions, which are built for it, and right."""
    import torch
    from xlstm_kernels.backends.compiled import library
    from xlstm_kernels.backends.verified import verdict_of
    from xlstm_kernels.step.layer import SOURCE, check_layer
    from xlstm_kernels.step.linear import check_linear

    name, built, slower = (
        "compiled steps",
        library(SOURCE),
        "a decoded token runs as torch operations, right and slower",
    )
    if built.functions is None:
        mend = "apt install gcc" if "no C compiler" in built.reason else ""
        return Finding(name, "none", NOTE, f"{without_home(built.reason)}: {slower}", mend)
    checks = (check_layer, {"K": 64, "P": 64}), (check_linear, {})
    if not all(verdict_of(check, torch.device("cpu"), torch.float32, dims)["right"] for check, dims in checks):
        return Finding(name, "wrong", NOTE, f"their check failed: {slower}")
    return Finding(
        name, "right", OK, "several threads" if built.threads else "one thread: torch's OpenMP was not found"
    )


def threads(used, available):
    """The threads of torch and of the variables that set them, against the cores."""
    told = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    cores_here = f"{used} on {available} core{'s' * (available > 1)}"
    found = ", ".join([cores_here, *(f"{name}={value}" for name, value in told.items())])
    most = max([used, *(int(value) for value in told.values() if value.isdecimal())])
    if most > available:
        slow = "more threads than cores: they wait for each other"
        return Finding("threads", found, NOTE, slow, f"export OMP_NUM_THREADS={available}")
    if used == 1 and available > 1:
        return Finding("threads", found, OK, "one core is used")
    return Finding("threads", found)


# --- GPU ---------------------------------------------------------------------------------------------------------


def driver():
    """True if an NVIDIA driver is loaded."""
    return Path("/proc/driver/nvidia/version").exists()


def gpus():
    """torch's devices with a GPU, and what torch warned of while it looked for them."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [torch.device("cuda", j) for j in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found, "; ".join(str(warning.message).split("\n")[0] for warning in said)


def gpu():
    """Names, memory and compute capability, or why there is none."""
    import torch

    devices, warned = gpus()
    kinds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    build = "torch's build is for " + next((f"{kind} {version}" for kind, version in kinds.items() if version), "CPUs")
    for device in devices:
        p = torch.cuda.get_device_properties(device)
        is_this = f"{p.name}, {p.total_memory / 2**30:.1f} GiB, sm_{p.major}{p.minor}"
        if not kinds["ROCm"] and p.major < 8:
            yield Finding(
                f"GPU {device.index}", is_this, NOTE, "older than sm_80: bf16 is slow, no kernel was tried there"
            )
        else:
            yield Finding(f"GPU {device.index}", is_this, OK, build)
    if devices:
        return
    if torch.backends.mps.is_available():
        yield Finding("GPU", "Apple's (mps)", NOTE, "no test runs there")
    elif driver() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        yield Finding("GPU", "none that torch can use", NOTE, f"an NVIDIA driver is loaded, but {warned or build}")
    else:
        yield Finding("GPU", "none", OK, build)


def kernels():
    """The remembered verdicts on our Triton kernels, for each kind of GPU."""
    from xlstm_kernels.backends.choose import why_not
    from xlstm_kernels.backends.launch import interpreted
    from xlstm_kernels.backends.verified import read_verdicts, verdict_file

    devices, _ = gpus()
    if interpreted():
        slow = "kernels run in Triton's interpreter: for tests, far too slow for models"
        yield Finding("TRITON_INTERPRET", "1", NOTE, slow)
    if not devices:
        yield Finding("kernels", "not used", OK, "no GPU: the torch forms run")
    for file, device in {verdict_file(device): device for device in devices}.items():
        verdicts = read_verdicts(file)
        if reason := why_not(str(device)):
            yield Finding("kernels", "not used", MISSING, f"the torch forms run, slower: {reason}")
        elif not verdicts:
            yield Finding("kernels", "not yet used here", OK, f"each is checked when it is first used on {device}")
        for question, verdict in verdicts.items():
            worst = max(verdict["errors"].values(), default=float("nan"))
            if verdict["right"]:
                yield Finding(question, "right", OK, f"largest error {worst:.1e}")
            else:
                reason = verdict.get("reason") or f"largest error {worst:.1e}"
                note = f"the torch form runs, slower: {without_home(reason)}"
                yield Finding(question, "wrong", WRONG, note, f"rm {shown(file)}  # to check again")


# --- folders and surroundings ------------------------------------------------------------------------------------


def folders():
    """Where we and the libraries write: {what lies there: (folder, the variable that moves it)}."""
    from huggingface_hub import constants
    from xlstm_kernels.backends.verified import cache_folder

    found = {"kernel verdicts": (cache_folder(), "XLSTM_KERNELS_CACHE")}
    found["Hugging Face"] = Path(constants.HF_HOME), "HF_HOME"
    hub = Path(constants.HF_HUB_CACHE)
    if Path(constants.HF_HOME) not in hub.parents:
        found["hub downloads"] = hub, "HF_HUB_CACHE"
    if datasets := os.environ.get("HF_DATASETS_CACHE"):
        found["datasets"] = Path(datasets), "HF_DATASETS_CACHE"
    if installed("triton"):
        home = Path(os.environ.get("TRITON_HOME") or Path.home())
        found["Triton"] = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton/cache"), "TRITON_CACHE_DIR"
    return found | {"temporary files": (Path(tempfile.gettempdir()), "TMPDIR")}


def unwritable(folder):
    """Why nothing can be written into a folder, or into the nearest folder above it that is there; None if it can."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def caches():
    """Each folder, with the space that is free there."""
    for name, (folder, variable) in folders().items():
        if reason := unwritable(folder):
            yield Finding(name, shown(folder), WRONG, f"cannot be written: {reason}", f"export {variable}=FOLDER")
            continue
        there = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if free < LITTLE:
            yield Finding(name, shown(folder), NOTE, f"only {free / 1e9:.1f} GB free")
        else:
            yield Finding(name, shown(folder), OK, f"{free / 1e9:.0f} GB free")


def hub_settings():
    """Whether anything is fetched from the Hub, and what else the variables change."""
    from huggingface_hub import constants

    told = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    fetching = "online: hub ids are fetched"
    if constants.HF_HUB_OFFLINE:
        fetching = "offline: models and data sets come from the cache and from folders"
    yield Finding("Hugging Face Hub", told or "no variable set", OK, fetching)


CHECKS = {
    "versions": package_versions,
    "self-check": model_check,
    "optional packages": extras,
    "CPU": cpu,
    "GPU": gpu,
    "Triton kernels": kernels,
    "folders": caches,
    "environment": hub_settings,
}


def diagnose(checks=None):
    """{section: findings} of all checks."""
    found = {}
    for section, check in (CHECKS if checks is None else checks).items():
        found[section] = []
        try:
            found[section].extend(check())  # what came before an error stays
        except Exception as error:  # the worse an installation, the more a report is wanted
            reason = without_home(f"{type(error).__name__}: {error}"[:300])
            found[section].append(Finding(section, "this check failed", WRONG, reason))
    return found


def wrong(found):
    """Names of what is wrong."""
    return [row.name for rows in found.values() for row in rows if row.verdict == WRONG]
