"""What a run of the tests in a clean environment leaves: a record, and docs/compatibility.md, written from all records.

`make test-newest` and `make test-oldest` pass `--compatibility NAME`. A record of all tests goes to
docs/compatibility/, one of a selection to build/compatibility/, and then the page stays as it is.
"""

import json
import platform
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from xlstm_hybrid.environment.versions import PACKAGES, installed

ROOT = Path(__file__).parents[1]
RECORDS, PAGE, PARTIAL = ROOT / "docs/compatibility", ROOT / "docs/compatibility.md", ROOT / "build/compatibility"
COUNTED = ("passed", "failed", "error", "skipped", "xfailed")

# Tests that cannot pass beside some release, here and nowhere else: fragments that all stand in the test's id, the
# release, the reason. They run all the same, and one that passes is a failure: no entry outlives its reason.
EXPECTED = [
    (
        ("longrope-olmo3",),
        "transformers<5.21",
        "longrope of a model whose layer types have RoPE of their own raises UnboundLocalError",
    ),
    (
        ("reset_cache", "teacher"),
        "transformers<5.18",
        "the sliding layers of a dynamic cache keep their keys, zeroed, over a reset",
    ),
    (
        ("hands_back_one", "mixed"),
        "transformers<5.18",
        "sliding layers that can take tokens back give more keys than their mask has",
    ),
    (
        ("adapters_are_saved_alone", "whole_mixer"),
        "transformers<5.18",
        "load_adapter loses modules_to_save, PeftModel.from_pretrained does not",
    ),
    (
        ("test_gguf", "byte_level_tokenizer"),
        "transformers<5.18",
        "a byte-level tokenizer of a GGUF file loses its begin token: refused",
    ),
    (
        ("test_gguf", "teacher_to_every_command"),
        "transformers<5.18",
        "a tokenizer of a Llama's GGUF file without a begin token cannot be read: refused",
    ),
    (
        ("automatic_device_map_splits_no_layer",),
        "accelerate<1.11",
        "infer_auto_device_map takes no set of names: it splits the layers of a Llama as well",
    ),
]
HEAD = """# Compatibility

Written by `make test-newest` and `make test-oldest`, from the records in `docs/compatibility/` and the table in
`src/xlstm_hybrid/environment/versions.py`. Each run installs a clean environment: *newest* takes what pip finds, *oldest* the floor
of every package.

On a transformers that is newer than the newest tested one, the first load or generation of a process generates with a
tiny model and compares with calls without a cache, in half a second; the verdict is kept on disk. If it is wrong, a
`CompatibilityError` says what differs and what to install. `XLSTM_HYBRID_SELF_CHECK=1` checks on every version, `=0`
never. `xlstm-hybrid verify MODEL` checks a model in the same ways, `xlstm-hybrid run` its student before anything is
scored, and an answer that the student gives token by token and did not generate is a contradiction, not a score.
"""


def expected(item_id, releases=None):
    """Why a test cannot pass beside what is installed, or None."""
    for fragments, release, reason in EXPECTED if releases is None else releases:
        wanted = Requirement(release)
        version = installed(wanted.name)
        if (
            version
            and wanted.specifier.contains(version, prereleases=True)
            and all(part in item_id for part in fragments)
        ):
            return f"{release}: {reason}"
    return None


def mark(items):
    for item in items:
        if reason := expected(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def part(config, exitstatus):
    """Which part of the tests a run had: what was asked for, or "" if it had them all."""
    selected = [] if config.args_source == config.ArgsSource.TESTPATHS else [Path(name).name for name in config.args]
    if config.option.keyword:
        selected.append(f"-k {config.option.keyword!r}")
    if config.option.markexpr not in ("", "not slow"):
        selected.append(f"-m {config.option.markexpr!r}")
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or config.option.maxfail:
        selected.append("ended early")
    return " ".join(selected)


def surroundings():
    """Versions and machine, as they are now."""
    import torch

    from xlstm_hybrid.doctor import cpu_name, instructions

    found = {name: version for name in PACKAGES if (version := installed(name))} | {"torch": str(torch.__version__)}
    has = [name for name, there in instructions().items() if there]
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": ", ".join([cpu_name(), *has]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": found,
    }


def outcome(stats):
    """Counts of a run's reports by outcome, which tests failed, and why others were skipped or expected to fail."""
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ()))
    differs = Counter(report.wasxfail.removeprefix("reason: ") for report in stats.get("xfailed", ()))
    failed = sorted({report.nodeid for kind in ("failed", "error") for report in stats.get(kind, ())})
    return {
        "results": {kind: len(stats.get(kind, ())) for kind in COUNTED},
        "failed": failed,
        "differs": dict(sorted(differs.items())),
        "skipped": dict(sorted(skipped.items())),
    }


def record(reporter, exitstatus, config):
    """Write the record of a run that was asked for one, and the page if all tests ran."""
    environment, folder = config.option.compatibility, config.option.compatibility_folder
    if environment is None:
        return
    selection = part(config, exitstatus)
    content = {"environment": environment, "part": selection} | surroundings() | outcome(reporter.stats)
    folder = Path(folder) if folder else PARTIAL if selection else RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    release, python = content["versions"]["torch"].partition("+")[0], ".".join(content["python"].split(".")[:2])
    path = folder / f"{environment}-torch{release}-python{python}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    reporter.write_line(
        f"compatibility: {path.name} written" + (f"; it had a part of the tests ({selection})" if selection else "")
    )
    if folder == RECORDS:
        PAGE.write_text(page(records(folder)))


def records(folder):
    """Records of a folder by the name of their file."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def page(found):
    """The page: what is supported, and the runs side by side."""
    lines = [HEAD, "| package | oldest | newest tested | not supported |", "| --- | --- | --- | --- |"]
    for name, package in PACKAGES.items():
        refused = [f"{package.below} and later"] * bool(package.below) + [
            f"{version}: {reason}" for version, reason in package.wrong.items()
        ]
        lines.append(f"| {name} | {package.floor} | {package.newest or 'no run has it'} | {'; '.join(refused)} |")
    names = [name for name in PACKAGES if any(name in r["versions"] for r in found)]
    rows = {"date": [r["date"] for r in found], "Python": [r["python"] for r in found]}
    rows |= {name: [r["versions"].get(name, "") for r in found] for name in names}
    rows |= {"machine": [f"{r['platform']}; {r['gpu'] or r['cpu']}" for r in found]}
    rows |= {
        name: [f"{r['results'][kind]:,}" for r in found]
        for name, kind in {
            "passed": "passed",
            "failed": "failed",
            "errors": "error",
            "expected to fail": "xfailed",
            "skipped": "skipped",
        }.items()
    }
    lines += ["", "## Runs", "", row("", (r["environment"] for r in found)), row("---", ("---" for _ in found))]
    lines += [row(name, cells) for name, cells in rows.items()]
    lines += ["", "## What differs", ""]
    for r in found:
        differs = [f"{reason} ({count})" for reason, count in r["differs"].items()] + [
            f"failed: `{test}`" for test in r["failed"]
        ]
        lines.append(f"* {r['environment']}, torch {r['versions']['torch']}: " + ("; ".join(differs) or "nothing"))
    return "\n".join(lines) + "\n"


def row(name, cells):
    return f"| {' | '.join([name, *cells])} |"
