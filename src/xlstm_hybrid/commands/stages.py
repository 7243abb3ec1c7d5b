"""The training stages as verbs, in one process or under `accelerate launch -m xlstm_hybrid VERB`, and what belongs to their data and scores."""

import json
from pathlib import Path
from typing import Annotated

import typer

RecipeOption = Annotated[Path, typer.Option("--recipe", help="Recipe with the settings and the data of the stage.")]
Expert = Annotated[str | None, typer.Option("--expert", help="Name of the expert in the recipe; its only one by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")]
TINY = Path("recipes/tiny.yaml")


def settings_of(context, config, *arguments):
    """The options of a trainer's config that stand behind a verb's own, as `{name: value}`."""
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.pipeline import parse_overrides

    if misplaced := next((str(a) for a in arguments if str(a).startswith("-")), None):
        raise ConfigError(f"{misplaced}: options of {config.__name__} come behind the positional arguments")
    return parse_overrides(config, context.args)


def read(recipe, expert=None, required=True):
    """`(recipe, name of the expert)`; the recipe's only expert where none is named."""
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.recipe.schema import load_recipe

    loaded = load_recipe(recipe)
    if expert is None and required:
        if len(loaded.experts) > 1:
            raise ConfigError(f"{recipe.name} has the experts {sorted(loaded.experts)}: name one with --expert")
        expert = next(iter(loaded.experts))
    if expert is not None:
        loaded.mix(expert)
    return loaded, expert


def align(context: typer.Context, student: Path, out: Path, recipe: RecipeOption = TINY, overwrite: Overwrite = False):
    """Stage I: train the new parameters of STUDENT against the attention that they replace.

    Fields of AlignmentConfig may follow and go before the recipe's: --learning_rate 5e-3 --max_steps 100.
    """
    from xlstm_hybrid import pipeline
    from xlstm_hybrid.training.alignment import AlignmentConfig

    overrides = settings_of(context, AlignmentConfig, student, out)
    figures = pipeline.align(student, out, read(recipe, required=False)[0], overwrite, overrides)
    for layer in figures["relative_error"]:
        print(f"layer {layer['layer']}: relative error {layer['before']:.3f} -> {layer['after']:.3f}")


def distill(
    context: typer.Context, student: Path, teacher: str, out: Path, recipe: RecipeOption = TINY, expert: Expert = None, overwrite: Overwrite = False
):
    """Stage II: distil one domain expert of the recipe from TEACHER into STUDENT.

    Fields of SparseKDConfig may follow and go before the recipe's: --learning_rate 1e-5 --top_k 64.
    """
    from xlstm_hybrid import pipeline
    from xlstm_hybrid.training.distillation import SparseKDConfig

    overrides = settings_of(context, SparseKDConfig, student, teacher, out)
    loaded, name = read(recipe, expert)
    print(json.dumps(pipeline.distill(student, teacher, out, loaded, name, overwrite, overrides)))


def on_policy(
    context: typer.Context, student: Path, teacher: str, out: Path, recipe: RecipeOption = TINY, expert: Expert = None, overwrite: Overwrite = False
):
    """Distil TEACHER into STUDENT on the student's own samples; the prompts are those of one expert of the recipe.

    Fields of OnPolicyKDConfig may follow and go before the recipe's: --max_steps 100.
    """
    from xlstm_hybrid import pipeline
    from xlstm_hybrid.training.on_policy import OnPolicyKDConfig

    overrides = settings_of(context, OnPolicyKDConfig, student, teacher, out)
    loaded, name = read(recipe, expert)
    print(json.dumps(pipeline.on_policy(student, teacher, out, loaded, name, overwrite, overrides)))


def multi_teacher(
    context: typer.Context,
    student: Annotated[Path, typer.Argument(help="The aligned start of the experts, or what they were merged into.")],
    out: Annotated[Path, typer.Argument(help="Directory of the taught student, made new.")],
    expert: Annotated[list[str], typer.Option(help="NAME=DIRECTORY of an expert of the recipe; repeatable.")],
    recipe: RecipeOption = TINY,
    overwrite: Overwrite = False,
):
    """Distil experts into STUDENT on its own samples: each judges what the student answers to the prompts of its domain.

    The settings are the recipe's merge.on_policy; fields of OnPolicyKDConfig may follow and go before them: --max_steps 100.
    """
    from xlstm_hybrid import pipeline
    from xlstm_hybrid.errors import ConfigError
    from xlstm_hybrid.training.on_policy import OnPolicyKDConfig

    overrides, named = settings_of(context, OnPolicyKDConfig, student, out), [entry.partition("=")[::2] for entry in expert]
    if wrong := [entry for entry, (name, directory) in zip(expert, named, strict=True) if not (name and directory)]:
        raise ConfigError(f"--expert {wrong[0]}: expected NAME=DIRECTORY")
    if len(dict(named)) < len(named):
        raise ConfigError(f"--expert: {[name for name, _ in named]} names an expert twice")
    print(json.dumps(pipeline.multi_teacher(student, dict(named), out, read(recipe, required=False)[0], overwrite, overrides)))


def prepare(
    tokenizer: Annotated[str, typer.Argument(help="Checkpoint directory or hub id whose tokenizer writes the rows.")],
    out: Annotated[Path, typer.Argument(help="Directory of the rows, made new; `datasets.load_from_disk` and cache-teacher read it.")],
    recipe: RecipeOption = TINY,
    expert: Annotated[str | None, typer.Option("--expert", help="Rows of this expert; of stage I by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of rows; as many as the recipe's steps read by default.")] = None,
    overwrite: Overwrite = False,
):
    """Write the packed rows that a stage of the recipe will read."""
    from xlstm_hybrid import pipeline

    loaded, name = read(recipe, expert, required=False)
    rows = pipeline.prepare(tokenizer, out, loaded, name, count, overwrite)
    print(f"{rows} rows of {loaded.length} tokens in {out}")


def evaluate(
    model: Path, out: Annotated[Path | None, typer.Option(help="File for the scores and samples, JSON.")] = None, recipe: RecipeOption = TINY
):
    """Scores of MODEL on the recipe's domains, or its perplexity on their held-out documents."""
    from xlstm_hybrid import pipeline
    from xlstm_hybrid.errors import ConfigError, EvaluationError
    from xlstm_hybrid.evaluation.scores import named_contradictions

    loaded = read(recipe, required=False)[0]
    if loaded.evaluate is None:
        raise ConfigError(f"{recipe.name}: no section evaluate, expected examples, text_chunks and batch_size, or documents and batch_size")
    result = pipeline.evaluate(model, loaded)
    for name, value in result["perplexity"].items():
        score = result["exact_match"].get(name)
        print(f"{name:<12} {'' if score is None else f'exact match {score:6.1%}':<19} perplexity {value:.3f}")
    if out is not None:
        out.write_text(json.dumps(result, indent=1))
    if result["contradictions"]:
        raise EvaluationError(named_contradictions({model.name: result["contradictions"]}))


for verb in (align, distill, on_policy, multi_teacher):
    verb.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}
VERBS = [align, distill, on_policy, multi_teacher, prepare, evaluate]
