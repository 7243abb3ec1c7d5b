"""The command line: one table of commands in groups, imported when they are called; each has a line, an example, and
keeps its old name.
"""

import inspect
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.errors import ConfigError

pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]
NAMES = [name for commands in cli.COMMANDS.values() for name in commands]


def function_of(name):
    name = name.replace("-", "_")
    return getattr(import_module(f"xlstm_hybrid.commands.{name}"), name)


def loaded(name):
    group = typer.main.get_command(cli.app)
    return group.get_command(click.Context(group), name)


def test_the_table_lists_every_module_of_commands_once():
    modules = {path.stem.replace("_", "-") for path in (ROOT / "src/xlstm_hybrid/commands").glob("*.py")} - {
        "--init--",
        "options",
    }
    assert sorted(NAMES) == sorted(modules)


@pytest.mark.parametrize("name", NAMES)
def test_a_commands_line_is_its_docstrings_first_and_its_example_is_understood(name):
    line = next(commands[name] for commands in cli.COMMANDS.values() if name in commands)
    paragraphs = inspect.getdoc(function_of(name)).split("\n\n")
    assert paragraphs[0] == line and len(line) <= 80
    program, command, *arguments = shlex.split(" ".join(paragraphs[-1].removeprefix("Example: ").split()))
    assert paragraphs[-1].startswith("Example: ") and (program, command) == ("xlstm-hybrid", name)
    loaded(name).make_context(name, arguments)  # raises for what it does not understand


@pytest.mark.parametrize("columns", [60, 100])
def test_a_help_fits_the_terminal_and_its_example_can_be_copied_from_it(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in NAMES:
        typer.main.get_command(cli.app).main([name, "--help"], prog_name="xlstm-hybrid", standalone_mode=False)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= columns
        example = shown.partition("Example:\n")[2].partition("\n\n")[0]
        wanted = inspect.getdoc(function_of(name)).rpartition("Example: ")[2]
        assert shlex.split(example.replace("\\\n", " ")) == shlex.split(wanted)


def test_the_help_of_the_whole_shows_the_groups_and_imports_no_command():
    program = (
        "import sys; from typer.testing import CliRunner; from xlstm_hybrid import cli; result = CliRunner().invoke(cli.app, ['--help']);"
        "assert result.exit_code == 0, result.output; print(result.output);"
        "print('imported:', *[n for n in sys.modules if n.startswith(('xlstm_hybrid.commands', 'xlstm_hybrid.pipeline', 'trl'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    groups = [line.removesuffix(":") for line in done.stdout.splitlines() if line.removesuffix(":") in cli.COMMANDS]
    assert groups == list(cli.COMMANDS) and done.stdout.rstrip().endswith("imported:")
    lines = done.stdout.partition("Run a recipe:")[2].splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert shown == NAMES


@pytest.mark.parametrize(("old", "new"), cli.OLD_NAMES.items())
def test_an_old_name_works_and_says_the_new_one_on_stderr(old, new):
    results = [CliRunner().invoke(cli.app, [name, "--help"]) for name in (old, new)]
    assert [r.exit_code for r in results] == [0, 0]
    assert results[0].stdout.replace(f" {old} ", f" {new} ") == results[1].stdout
    assert results[0].stderr == f"`xlstm-hybrid {old}` is now `xlstm-hybrid {new}`\n" and not results[1].stderr
    assert old not in NAMES and new in NAMES


def test_the_arena_is_said_to_be_a_package_of_its_own():
    result = CliRunner().invoke(cli.app, ["arena", "--list"])
    assert isinstance(result.exception, ConfigError) and "python -m xlstm_arena" in str(result.exception)


def test_a_name_that_is_no_command_is_refused_with_one_that_is_near():
    result = CliRunner().invoke(cli.app, ["aling"])
    assert result.exit_code == 2 and "'align'" in result.stderr


def test_a_command_whose_extra_is_not_installed_names_it(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr(cli, "load_command", missing)
    monkeypatch.setattr("sys.argv", ["xlstm-hybrid", "align", "a", "b"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "this command needs trl: pip install 'xlstm-hybrid[train]'" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(
    "device, found", [("cuda", "torch finds no GPU; use --device cpu"), ("banana", "expected auto")]
)
@pytest.mark.parametrize(
    "arguments",
    [
        "serve S",
        "verify S",
        "harness S --tasks x --out o",
        "efficiency T S --out o",
        "plan-layers S --budget 1MB --length 9",
    ],
)
def test_a_device_that_is_not_there_is_one_named_error(arguments, device, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, [*arguments.split(), "--device", device])
    assert isinstance(result.exception, ConfigError) and f"--device {device}: {found}" in str(result.exception)
