"""The command line, `xlstm-hybrid COMMAND`: one table of commands, each a module of `commands` that is imported when it
is called.
"""

import _thread
import inspect
import logging
import os
import shutil
import sys
import textwrap
import threading
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from xlstm_hybrid.environment.versions import extra_of
from xlstm_hybrid.errors import ConfigError, XLSTMHybridError

# {group: {command: first line of its help}}; `plan-layers` is the function `plan_layers` of `commands/plan_layers.py`.
# The lines stand here as well, so that this help imports no command; a test compares them.
COMMANDS = {
    "Run a recipe": {"run": "Run a whole recipe: convert, align, distil experts, merge, evaluate, report."},
    "Build a student": {
        "convert": "Make a student of a teacher: weights copied, new parameters initialised.",
        "prepare": "Write the packed rows that a stage of the recipe will read.",
        "cache-teacher": "Store what a teacher says about every scored token of some rows.",
        "calibrate": "Stage 0: set the new parameters in closed form, from the teacher's attention.",
        "align": "Stage I: train the new parameters against the attention that they replace.",
        "distill": "Stage II: distil one domain expert of the recipe from its teacher.",
        "on-policy": "Distil a teacher into a student on the student's own samples.",
        "experts": "Distil the domain experts of a recipe from one aligned start.",
        "merge": "Stage III: merge experts into one student.",
        "merge-statistics": "Measure what the merge methods fisher and regmean need to know of an expert.",
        "multi-teacher": "Distil several experts into one student on its own samples.",
        "distil-xlstm": "Distil a recipe's teacher into a fully recurrent student (Distil-xLSTM).",
    },
    "Evaluate": {
        "verify": "Check that cache, padding, packing, beams, rollback and files change nothing.",
        "evaluate": "Score a model on the recipe's domains or held-out documents.",
        "agreement": "Compare a student with its teacher on text: KL, top 1, likelihoods.",
        "harness": "Evaluate a model with lm-evaluation-harness.",
        "benchmarks": "Write benchmarks as task files for lm-evaluation-harness.",
        "compare": "Compare students with their teacher: win-and-tie, recovery, paired statistics.",
        "efficiency": "Measure a student beside its teacher: latency, speed, memory, cache, energy.",
    },
    "Use and share": {
        "serve": "Serve a student to many clients at once, with OpenAI's interface.",
        "export": "Write a student for places where this package is not installed.",
        "card": "Write the model card of a checkpoint from what its stages recorded.",
        "push": "Check a folder for keys, paths, code and damage, then upload it in one commit.",
        "mergekit-architecture": "Describe a student's architecture for users of mergekit.",
    },
    "Look ahead": {
        "doctor": "Say what is installed and what this machine has, against what was tested.",
        "plan": "Say whether a run fits, how long it takes and which settings to use.",
        "plan-layers": "Choose a student's layer types, windows and memories for a cache budget.",
    },
}
WIDTH = 100  # of help, at most
OLD_NAMES = {"delta": "distil-xlstm", "statistics": "merge-statistics"}


class Commands(TyperGroup):
    """The table as a group of commands."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.commands = {name: None for commands in COMMANDS.values() for name in commands}  # None: not loaded yet

    def get_command(self, context, name):
        if name == "arena":
            raise ConfigError(
                "the arena is a package of its own: python -m xlstm_arena, with the same options, in a working copy"
            )
        if name in OLD_NAMES:
            print(f"`xlstm-hybrid {name}` is now `xlstm-hybrid {OLD_NAMES[name]}`", file=sys.stderr)
            name = OLD_NAMES[name]
        if name in self.commands and self.commands[name] is None:
            self.commands[name] = load_command(name)
        return self.commands.get(name)

    def format_commands(self, context, formatter):
        width = max(map(len, self.commands))  # one width for all groups, so that their lines stand below each other
        for group, commands in COMMANDS.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), line) for name, line in commands.items()])


class Command(TyperCommand):
    """A command that, interrupted, says what was finished and how to go on; exit code 130."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            from xlstm_hybrid.pipeline.interrupted import after_interrupt

            if int(os.environ.get("RANK", 0)) == 0:
                print(f"\n{after_interrupt(self.name, context.params)}", file=sys.stderr)  # below a bar, or ^C
            raise typer.Exit(130) from None
        except SystemExit as stop:  # a trainer's that SIGTERM stopped says how to go on; Python prints the status only
            if (message := getattr(stop, "message", None)) and int(os.environ.get("RANK", 0)) == 0:
                print(message, file=sys.stderr)
            raise


def load_command(name):
    """The command of a name, its module imported. One that takes a `typer.Context` hands further options to a trainer's
    config. The example in its help is folded as a shell allows it, so that it can be copied from a narrow terminal.
    """
    name_in_python = name.replace("-", "_")
    function = getattr(import_module(f"xlstm_hybrid.commands.{name_in_python}"), name_in_python)
    passes_on = typer.Context in [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    settings = {"allow_extra_args": True, "ignore_unknown_options": True} if passes_on else None
    text, _, example = inspect.getdoc(function).rpartition("Example: ")
    width = max(20, min(shutil.get_terminal_size().columns, WIDTH) - 10)
    lines = textwrap.wrap(example, width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")
    folded = " \\\n  ".join(lines)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Command, help=f"{text}\b\nExample:\n  {folded}", context_settings=settings)(function)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
    help="Turn a pretrained Transformer into a hybrid xLSTM student, distil, merge and evaluate it.",
)


@app.callback(invoke_without_command=True)
def options(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Use checkpoints and stores without comparing their content; say so.")
    ] = False,
):
    if trust:
        from xlstm_hybrid.checkpoint.digests import TRUSTED

        TRUSTED.set(True)
    if show:
        from xlstm_hybrid import __version__

        print(__version__)
        raise typer.Exit


class Terminal(logging.Handler):
    """What our modules log is for the user: a line each on the terminal."""

    def emit(self, record):
        print(self.format(record), file=sys.stderr)


def main():
    """Entry point of `xlstm-hybrid`."""
    run_app(app)


def run_app(app):
    """Run a command line: errors that name their cause are one line, not a traceback."""
    log = logging.getLogger("xlstm_hybrid")
    log.handlers = [Terminal()]
    log.setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    console = Console(stderr=True, soft_wrap=True)
    sys.unraisablehook = interrupted_again(sys.unraisablehook)
    try:
        app()
    except XLSTMHybridError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        needs = f"this command needs {error.name}: pip install 'xlstm-hybrid[{extra}]'"
        console.print(needs, style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:  # of typer's; `Command` says more
        sys.exit(130)


def interrupted_again(usual):
    """A `sys.unraisablehook`: Python drops what is raised while it deletes an object, and with it a Ctrl-C that comes just
    then. It is sent once more.
    """

    def hook(dropped):
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            usual(dropped)

    return hook


if __name__ == "__main__":
    main()
