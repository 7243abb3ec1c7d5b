"""One table says which versions work; setup.py, the Makefile, the doctor and the records of the test runs follow it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compatibility
import pytest
import setuptools
from packaging.requirements import Requirement

from xlstm_hybrid.environment import versions
from xlstm_hybrid.environment.versions import (
    EXTRAS,
    PACKAGES,
    PYTHON,
    Package,
    extra_of,
    fault,
    installed,
    requirement,
    untested,
)

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
WITHOUT_BOUNDS = {
    "pytest",
    "pytest-xdist",
    "ruff",
    "mkdocs",
    "mkdocs-material",
    "mkdocstrings",
    "fastapi",
    "uvicorn",
}  # tools, and a server that asks little of its library


@pytest.fixture
def setup_arguments(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


@pytest.fixture
def table(monkeypatch):
    """A package of our own in the table: 1.5 to below 3, tested to 2.1, with two bad ones between."""
    package = Package("1.5", "2.1", below="3", wrong={"1.7": "it forgets", "2.0.*": "it lies"})
    monkeypatch.setattr(versions, "PACKAGES", {"ours": package})


# --- the table ---------------------------------------------------------------------------------------------------


def test_setup_asks_for_what_the_table_says(setup_arguments):
    texts = [
        *setup_arguments["install_requires"],
        *(text for extra in setup_arguments["extras_require"].values() for text in extra),
    ]
    seen = {}
    for wanted in map(Requirement, texts):
        seen.setdefault(wanted.name, set()).add(str(wanted.specifier))
    assert set(seen) == {
        *PACKAGES,
        *WITHOUT_BOUNDS,
    }  # a floor that no requirement has would count and never be asked for
    for name, package in PACKAGES.items():
        bounds = {
            f">={package.floor}",
            *([f"<{package.below}"] if package.below else []),
            *(f"!={version}" for version in package.wrong),
        }
        assert [set(found.split(",")) for found in seen[name]] == [bounds], name
    assert setup_arguments["python_requires"] == f">={PYTHON}"
    assert {extra: set(e.packages) for extra, e in EXTRAS.items()} == {
        extra: {Requirement(text).name for text in setup_arguments["extras_require"][extra]} for extra in EXTRAS
    }


def test_a_newer_torch_is_nobodys_reason_for_a_downgrade(setup_arguments):
    torch, transformers = (
        next(r for r in map(Requirement, setup_arguments["install_requires"]) if r.name == n)
        for n in ("torch", "transformers")
    )
    assert torch.specifier.contains("2.10") and torch.specifier.contains("2.15.0") and torch.specifier.contains("2.99")
    assert (
        transformers.specifier.contains("5.17")
        and transformers.specifier.contains("5.24.0")
        and not transformers.specifier.contains("6.0")
    )


def test_what_the_makefile_installs_first_is_a_torch_of_the_table():
    first = [Requirement(text) for text in re.findall(r"'(torch>=[^']*)'", (ROOT / "Makefile").read_text())]
    assert (
        len(first) == 1
        and first[0].specifier.contains(PACKAGES["torch"].floor)
        and first[0].specifier.contains("2.13.0")
    )


@pytest.mark.parametrize(
    "version, said",
    [
        ("1.4.9", "older than 1.5, the floor"),
        ("1.5.dev1", "older than 1.5"),
        ("1.5", None),
        ("1.6.post1", None),
        ("1.7", "known to be wrong: it forgets"),
        ("1.7+cpu", "known to be wrong: it forgets"),
        ("1.7.1", None),
        ("2.0.3", "known to be wrong: it lies"),
        ("2.1", None),
        ("2.9", None),
        ("3.0", "3 and later are not supported"),
    ],
)
def test_a_version_is_refused_for_a_reason(table, version, said):
    found = fault("ours", version)
    assert found is None if said is None else said in found


def test_newer_than_tested_is_newer_in_release_not_in_build(table):
    assert (
        untested("ours", "2.1.1")
        and untested("ours", "2.2.dev0")
        and not untested("ours", "2.1+cpu")
        and not untested("ours", "1.9")
    )


def test_a_requirement_names_the_bounds_and_what_is_wrong_between_them(table):
    assert requirement("ours") == "ours>=1.5,<3,!=1.7,!=2.0.*" and requirement("theirs") == "theirs"


def test_the_floors_are_printed_by_a_python_that_has_nothing_installed():
    command = [sys.executable, "-P", "-S", str(ROOT / "src/xlstm_hybrid/environment/versions.py"), "torch==2.13.0"]
    pins = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert pins[0] == "torch==2.13.0" and f"transformers=={PACKAGES['transformers'].floor}" in pins
    assert {Requirement(pin).name for pin in pins} == {name for name, package in PACKAGES.items() if package.newest}


def test_a_missing_module_names_the_extra_that_brings_it():
    assert (
        extra_of("lm_eval") == "eval"
        and extra_of("trl") == "train"
        and extra_of("pynvml") == "energy"
        and extra_of("json") is None
    )


def test_nothing_that_is_installed_here_is_known_to_be_wrong():
    assert {
        name: reason for name in PACKAGES if (version := installed(name)) and (reason := fault(name, version))
    } == {}


def test_the_newest_releases_are_those_of_the_table(request):
    if request.config.getoption("compatibility") != "newest":
        pytest.skip("make test-newest asks this")
    newer = {name: version for name in PACKAGES if (version := installed(name)) and untested(name, version)}
    assert not newer, (
        f"newer than src/xlstm_hybrid/environment/versions.py says: {newer}; "
        "once all other tests pass, write them there and run this again"
    )


# --- the records -------------------------------------------------------------------------------------------------


SUITE = """
import pytest
def test_passes(): pass
def test_also(): pass
@pytest.mark.parametrize("where", ["here", "there"])
def test_broken(where): assert where == "here"
def test_fails(): assert False
def test_mended(): pass
def test_skipped(): pytest.skip("no such machine")
@pytest.fixture
def gone(): raise OSError
def test_error(gone): pass
"""


def test_a_run_leaves_a_record_and_the_page_that_is_made_of_all_records(pytester, monkeypatch):
    """A suite with tests of every outcome, two of which are said to be impossible here; one passes all the same."""
    listed = [
        (("broken", "there"), "pytest>=1", "it cannot count"),
        (("mended",), "pytest>=1", "it was wrong"),
        (("passes",), "pytest<1", "gone"),
    ]
    for name, value in {
        "EXPECTED": listed,
        "RECORDS": pytester.path / "records",
        "PAGE": pytester.path / "page.md",
    }.items():
        monkeypatch.setattr(compatibility, name, value)
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makeini("[pytest]\ntestpaths = .\n")
    pytester.makepyfile(test_all=SUITE)
    assert pytester.runpytest_inprocess("-q", "-p", "no:xdist", "--compatibility", "newest").ret == 1
    (path,) = (pytester.path / "records").iterdir()
    found = json.loads(path.read_text())
    assert (
        found["results"] == {"passed": 3, "failed": 2, "error": 1, "skipped": 1, "xfailed": 1} and found["part"] == ""
    )
    assert found["failed"] == ["test_all.py::test_error", "test_all.py::test_fails", "test_all.py::test_mended"]
    assert found["differs"] == {"pytest>=1: it cannot count": 1} and found["skipped"] == {"no such machine": 1}
    torch, python = found["versions"]["torch"], found["python"]
    assert torch.partition("+")[0] == installed("torch").partition("+")[0] and found["versions"][
        "transformers"
    ] == installed("transformers")
    assert path.name == f"newest-torch{torch.partition('+')[0]}-python{python.rpartition('.')[0]}.json"
    assert str(pytester.path) not in path.read_text()
    page = (pytester.path / "page.md").read_text()
    assert (
        page == compatibility.page([found])
        and "pytest>=1: it cannot count (1); failed: `test_all.py::test_error`" in page
    )


def test_a_part_of_the_tests_leaves_the_page_as_it_is(pytester, monkeypatch):
    for name in ("RECORDS", "PARTIAL", "PAGE"):
        monkeypatch.setattr(compatibility, name, pytester.path / name)
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(test_all=SUITE)
    pytester.makeini("[pytest]\ntestpaths = .\n")
    pytester.runpytest_inprocess("-q", "-p", "no:xdist", "--compatibility", "oldest", "-k", "passes")
    (path,) = (pytester.path / "PARTIAL").iterdir()
    assert (
        json.loads(path.read_text())["part"] == "-k 'passes'" and json.loads(path.read_text())["results"]["passed"] == 1
    )
    assert not (pytester.path / "RECORDS").exists() and not (pytester.path / "PAGE").exists()
    before = {p.name for p in pytester.path.iterdir()}
    pytester.runpytest_inprocess("-q", "-p", "no:xdist")
    assert {p.name for p in pytester.path.iterdir()} == before  # nothing is written that nobody asked for


def test_what_an_older_release_cannot_pass_is_named_by_fragments_of_the_id_and_the_release(monkeypatch):
    releases = [
        (("cache", "teacher"), "transformers<5.18", "it keeps keys"),
        (("cache",), "nobodys-package<1", "never installed"),
    ]
    monkeypatch.setattr(compatibility, "installed", lambda name: {"transformers": "5.17.0"}.get(name))
    assert compatibility.expected("test_state.py::test_cache[teacher]", releases) == "transformers<5.18: it keeps keys"
    assert compatibility.expected("test_state.py::test_cache[student]", releases) is None
    monkeypatch.setattr(compatibility, "installed", lambda name: {"transformers": "5.18.0"}.get(name))
    assert compatibility.expected("test_state.py::test_cache[teacher]", releases) is None


@pytest.mark.parametrize(
    "changes, exitstatus, said",
    [
        ({}, 0, ""),
        ({}, 1, ""),
        ({"markexpr": ""}, 0, ""),
        ({}, 2, "ended early"),
        ({"maxfail": 1}, 0, "ended early"),
        ({"keyword": "errors"}, 0, "-k 'errors'"),
        ({"markexpr": "slow"}, 0, "-m 'slow'"),
        ({"args": ["tests/test_a.py"]}, 0, "test_a.py"),
    ],
)
def test_a_record_says_which_part_of_the_tests_ran(changes, exitstatus, said):
    args = changes.pop("args", None)
    sources = pytest.Config.ArgsSource
    config = SimpleNamespace(
        option=SimpleNamespace(**{"keyword": "", "markexpr": "not slow", "maxfail": 0} | changes),
        args=args or ["tests"],
        args_source=sources.ARGS if args else sources.TESTPATHS,
        ArgsSource=sources,
    )
    assert compatibility.part(config, exitstatus) == said


def test_the_page_shows_the_table_and_the_runs_side_by_side(monkeypatch):
    trl = Package("1.16", None, below="2", wrong={"1.17": "it lies"})
    monkeypatch.setattr(compatibility, "PACKAGES", {"torch": Package("2.10", "2.15.0"), "trl": trl})
    base = {
        "python": "3.11.7",
        "date": "2026-11-30",
        "platform": "Linux x86_64",
        "cpu": "a CPU, AVX2",
        "part": "",
        "skipped": {},
    }
    results = {"passed": 3_914, "failed": 0, "error": 0, "skipped": 20, "xfailed": 1}
    new = base | {
        "environment": "newest",
        "gpu": "a GPU",
        "versions": {"torch": "2.15.0+cu132"},
        "results": results,
        "differs": {},
        "failed": [],
    }
    old = base | {
        "environment": "oldest",
        "gpu": None,
        "versions": {"torch": "2.10.0", "trl": "1.16.0"},
        "results": results | {"failed": 1},
        "differs": {"trl<1.17: it keeps keys": 2},
        "failed": ["tests/test_a.py::test_b"],
    }
    lines = compatibility.page([new, old]).splitlines()
    for line in [
        "| torch | 2.10 | 2.15.0 |  |",
        "| trl | 1.16 | no run has it | 2 and later; 1.17: it lies |",
        "|  | newest | oldest |",
        "| torch | 2.15.0+cu132 | 2.10.0 |",
        "| trl |  | 1.16.0 |",
        "| machine | Linux x86_64; a GPU | Linux x86_64; a CPU, AVX2 |",
        "| passed | 3,914 | 3,914 |",
        "| failed | 0 | 1 |",
        "| expected to fail | 1 | 1 |",
        "* newest, torch 2.15.0+cu132: nothing",
        "* oldest, torch 2.10.0: trl<1.17: it keeps keys (2); failed: `tests/test_a.py::test_b`",
    ]:
        assert line in lines


def test_the_page_in_the_repository_is_that_of_its_records():
    found = compatibility.records(compatibility.RECORDS)
    page = compatibility.PAGE.read_text() if compatibility.PAGE.exists() else None
    assert page == (compatibility.page(found) if found else None), (
        "run make test-newest or make test-oldest, which write docs/compatibility.md"
    )
