"""The command line: `xlstm-hybrid VERB`. One verb per stage, and `run` for a whole recipe."""

import json
import os
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xlstm_hybrid import verbs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a pretrained Transformer into a hybrid xLSTM student, distil, merge and judge it.",
)
EXTRAS = {"trl": "train", "datasets": "train", "peft": "train", "matplotlib": "train"}
RecipeOption = Annotated[Path, typer.Option("--recipe", help="Recipe with the settings of the stage.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/tiny.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; the recipe's own by default.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Make stages again whose settings have changed.")] = False,
):
    """Walk a whole recipe: convert, align, distil experts, merge, evaluate, report. Started again, it resumes."""
    from xlstm_hybrid.pipeline import Road
    from xlstm_hybrid.recipe import load_recipe

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
    overwrite: Overwrite = False,
):
    """Make a student of a teacher: weights copied, new parameters initialised, every tensor accounted for."""
    from xlstm_hybrid.conversion import convert

    types = layer_types.split(",") if layer_types and layer_types != "teacher" else layer_types
    print(
        convert(
            teacher,
            out,
            sliding_window=sliding_window,
            num_sink_tokens=num_sink_tokens,
            layer_types=types,
            dtype=dtype,
            revision=revision,
            overwrite=overwrite,
        )
    )


@app.command()
def align(student: Path, out: Path, recipe: RecipeOption = Path("recipes/tiny.yaml"), overwrite: Overwrite = False):
    """Stage I: train the new parameters of STUDENT against the attention that they replace."""
    from xlstm_hybrid.pipeline import align
    from xlstm_hybrid.recipe import load_recipe

    for layer in align(student, out, load_recipe(recipe), overwrite)["relative_error"]:
        print(f"layer {layer['layer']}: relative error {layer['before']:.3f} -> {layer['after']:.3f}")


@app.command()
def distill(
    student: Path,
    teacher: str,
    out: Path,
    expert: Annotated[str, typer.Option(help="Name of the expert in the recipe.")],
    recipe: RecipeOption = Path("recipes/tiny.yaml"),
    overwrite: Overwrite = False,
):
    """Stage II: distil one domain expert of the recipe from TEACHER into STUDENT."""
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.pipeline import distill
    from xlstm_hybrid.recipe import load_recipe

    loaded = load_recipe(recipe)
    if expert not in loaded.experts:
        raise ConfigError(f"--expert {expert}: {recipe.name} has {sorted(loaded.experts)}")
    print(json.dumps(distill(student, teacher, out, loaded, loaded.experts[expert], expert, overwrite)))


@app.command()
def merge(
    out: Path,
    experts: list[Path],
    weights: Annotated[str | None, typer.Option(help="Comma-separated shares in the order of the experts; uniform by default.")] = None,
    method: Annotated[str, typer.Option(help="Merge method.")] = "linear",
    base: Annotated[Path | None, typer.Option(help="Common start, for methods that need it.")] = None,
    overwrite: Overwrite = False,
):
    """Stage III: merge EXPERTS into one student at OUT."""
    from xlstm_hybrid.errors import MergeError
    from xlstm_hybrid.merging import merge

    try:
        shares = [float(w) for w in weights.split(",")] if weights else None
    except ValueError as error:
        raise MergeError(f"--weights {weights}: expected numbers such as 0.5,0.5") from error
    merge(experts, out, weights=shares, method=method, base=base, overwrite=overwrite)
    print(f"merged {len(experts)} experts into {out}")


@app.command()
def evaluate(
    model: Path,
    out: Annotated[Path | None, typer.Option(help="File for the scores and samples, JSON.")] = None,
    recipe: RecipeOption = Path("recipes/tiny.yaml"),
):
    """Exact match and perplexity of MODEL on the recipe's domains."""
    from xlstm_hybrid.pipeline import evaluate
    from xlstm_hybrid.recipe import load_recipe

    result = evaluate(model, load_recipe(recipe))
    for domain, score in result["exact_match"].items():
        print(f"{domain:<12} exact match {score:6.1%}   perplexity {result['perplexity'][domain]:.3f}")
    print(f"{'text':<12}                      perplexity {result['perplexity']['text']:.3f}")
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


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

    from xlstm_hybrid.verify import as_json, verify_checkpoint

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
    from xlstm_hybrid.card import write_card

    write_card(directory, json.loads(results.read_text()) if results else None)
    print(f"wrote {directory / 'README.md'}")


for found in pkgutil.iter_modules(verbs.__path__):
    for verb in import_module(f"{verbs.__name__}.{found.name}").VERBS:
        app.command()(verb)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False):
    if show:
        from xlstm_hybrid import __version__

        print(__version__)
        raise typer.Exit


def main():
    """Entry point: errors that name their cause are one line, not a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from xlstm_hybrid.errors import XLSTMHybridError

    try:
        app()
    except XLSTMHybridError as error:
        Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        Console(stderr=True).print(f"this verb needs {error.name}: pip install 'xlstm-hybrid[{EXTRAS[error.name]}]'", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: finished stages are kept, start the same command again to go on")
        sys.exit(130)


if __name__ == "__main__":
    main()
