"""Without a GPU: the public paths on a device that only looks like one, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent


def test_every_public_path_keeps_to_one_device_and_waits_no_more_than_it_says():
    folders = [str(folder) for folder in (TESTS, HERE, TESTS / "training", *map(Path, sys.path)) if str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / "on_the_device.py"),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
