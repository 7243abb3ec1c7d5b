"""The command line: `xlstm-hybrid VERB`. One verb per stage, and `run` for a whole recipe."""

import json
import logging
import os
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xlstm_hybrid import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a pretrained Transformer into a hybrid xLSTM student, distil, merge and judge it.",
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/tiny.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; the recipe's own by default.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Make stages again whose settings have changed.")] = False,
):
    """Walk a whole recipe: convert, align, distil experts, merge, evaluate, report. Started again, it resumes."""
    from xlstm_hybrid.pipeline import Road
    from xlstm_hybrid.recipe.schema import load_recipe

    Road(load_recipe(recipe), out, redo).walk()


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help="Teacher: checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory of the student, made new.")],
    sliding_window: Annotated[int, typer.Option(help="Window of the hybrid layers, tokens.")] = 512,
    num_sink_tokens: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 4,
    layer_types: Annotated[
        str | None, typer.Option(help="'teacher', or comma-separated types, one per layer; all hybrid_sliding by default.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the teacher's by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    options: Annotated[
        Path | None, typer.Option(exists=True, help="YAML or JSON with fields of the student's config, as plan-layers writes it; they win.")
    ] = None,
    overwrite: Overwrite = False,
):
    """Make a student of a teacher: weights copied, new parameters initialised, every tensor accounted for."""
    from xlstm_hybrid.conversion.convert import convert

    types = layer_types.split(",") if layer_types and layer_types != "teacher" else layer_types
    fields = {"sliding_window": sliding_window, "num_sink_tokens": num_sink_tokens, "layer_types": types, "dtype": dtype}
    print(convert(teacher, out, **(fields | read_student(options)), revision=revision, overwrite=overwrite))


def read_student(path):
    """Arguments of `convert` in a file, {} without one: a mapping of YAML or JSON; in a recipe it is the section `student`."""
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.recipe.schema import read_yaml

    content = {} if path is None else read_yaml(path)
    if not isinstance(content, dict) or {"revision", "overwrite", "teacher", "out"} & set(content):
        raise ConfigError(f"{path.name}: expected fields of the student's config, such as sliding_window; teacher, out and revision are arguments")
    return content


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Student: checkpoint directory or hub id.")],
    length: Annotated[int | None, typer.Option(help="Tokens of the random rows; by default enough for the window to wrap.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the copy that is checked; float64 where it fits, else float32, by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", help="File for the results, JSON.")] = None,
):
    """Prove on MODEL that cache, padding, packing, beams, rollback and files change nothing. Exit code 1 if a check fails."""
    from rich.table import Table

    from xlstm_hybrid.evaluation.equivalence import as_json, verify_checkpoint

    table = Table("check", "dtype", "largest difference", "allowed", "verdict", caption="in standard deviations of the logits")
    with Console(stderr=True).status("checking") as status:
        results = verify_checkpoint(model, length=length, dtype=dtype, device=device, report=lambda r: status.update(f"after: {r.name}"))
    for r in results:
        allowed = f"{'>= ' if r.at_least else ''}{r.allowed:.1e}"
        table.add_row(r.name, r.dtype, f"{r.difference:.2e}", allowed, "passed" if r.passed else "FAILED", style=None if r.passed else "red")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for r in results:
        if r.note:
            console.print(f"{r.name}: {r.note}", markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out.write_text(json.dumps(as_json(results, model=Path(model).name, device=device), indent=1))
    if not all(r.passed for r in results):
        raise typer.Exit(1)


@app.command()
def card(
    directory: Annotated[Path, typer.Argument(help="Checkpoint with a provenance.json.")],
    results: Annotated[Path | None, typer.Option(help="results.json of a run.")] = None,
):
    """Write the model card of a checkpoint from what its stages recorded."""
    from xlstm_hybrid.reports.card import write_card

    write_card(directory, json.loads(results.read_text()) if results else None)
    print(f"wrote {directory / 'README.md'}")


for found in pkgutil.iter_modules(commands.__path__):
    for verb in import_module(f"{commands.__name__}.{found.name}").VERBS:
        app.command(context_settings=getattr(verb, "context_settings", None))(verb)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False):
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
    guarded(app)


def guarded(app):
    """Run a command line: errors that name their cause are one line, not a traceback."""
    log = logging.getLogger("xlstm_hybrid")
    log.handlers = [Terminal()]
    log.setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from xlstm_hybrid.environment.versions import extra_of
    from xlstm_hybrid.errors import XLSTMHybridError

    try:
        app()
    except XLSTMHybridError as error:
        Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        Console(stderr=True).print(f"this verb needs {error.name}: pip install 'xlstm-hybrid[{extra}]'", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: finished stages are kept, start the same command again to go on")
        sys.exit(130)


if __name__ == "__main__":
    main()
