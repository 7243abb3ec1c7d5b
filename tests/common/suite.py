"""transformers' own common tests: fetched at the installed version, and importable. `make test-common` runs them.

They are in the source distribution, which pip downloads as it would for an install; its tests are unpacked into a
directory that git ignores. No code of transformers stands in our repository.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2] / ".common-suite"
SUITE = ROOT / f"transformers-{transformers.__version__}"
NEEDS = ["parameterized"]  # the suite imports it and we do not: it is not installed beside us
ABSENT = {  # what the distribution leaves out: module -> names that the tests import from it
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "num_labels": 7}
    },
    "distributed_testing_utils": {"run_distributed": None},  # the tests that need it skip themselves
}


def part(name):
    """A module of the suite."""
    if not SUITE.exists():
        sys.exit(f"{SUITE} is not there; `make test-common` fetches it")
    for place in (ROOT / "packages", SUITE):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    for absent, values in ABSENT.items():
        if not (SUITE / "tests" / f"{absent.replace('.', '/')}.py").exists():
            module = sys.modules.setdefault(f"tests.{absent}", types.ModuleType(f"tests.{absent}"))
            vars(module).update(values)
    return importlib.import_module(f"tests.{name}")


def pip(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )


def download(folder):
    """The archive of the installed version. pip prepares its metadata, too; if that fails the archive is there anyway."""
    name = f"transformers=={transformers.__version__}"
    done = pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", folder, name)
    archives = list(Path(folder).glob("transformers-*.tar.gz"))
    if not archives:
        sys.exit(f"{name}: expected a source distribution, found none; only released versions have one.\n{done.stderr}")
    return archives[0]


def unpack(archive, place):
    """The archive's tests/ at `place`, which appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder, tarfile.open(archive) as packed:
        tests = [member for member in packed.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        packed.extractall(folder, tests, filter="data")
        made = next(Path(folder).iterdir())
        (made / "tests/__init__.py").touch()  # left out as well; a test loads it by its path
        made.rename(place)


def fetch():
    """Whatever is missing of the suite and of what it needs."""
    ROOT.mkdir(exist_ok=True)
    if not SUITE.exists():
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(folder), SUITE)
    missing = [name for name in NEEDS if not (ROOT / "packages" / name).exists()]
    if missing and (done := pip("install", "--target", str(ROOT / "packages"), *missing)).returncode:
        sys.exit(f"{', '.join(missing)}: the suite imports it, and pip could not install it.\n{done.stderr}")


if __name__ == "__main__":
    fetch()
