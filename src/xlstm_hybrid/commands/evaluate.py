"""`xlstm-hybrid evaluate`: scores as a recipe's section `evaluate` asks for them."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid import pipeline
from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import TINY, Recipe
from xlstm_hybrid.errors import ConfigError, EvaluationError
from xlstm_hybrid.evaluation.scores import named_contradictions
from xlstm_hybrid.recipe.schema import load_recipe


def evaluate(
    model: Annotated[Path, Argument(help="Student or teacher: checkpoint directory.")],
    out: Annotated[Path | None, Option(help="File for the scores and samples, JSON.")] = None,
    recipe: Recipe = TINY,
):
    """Score a model on the recipe's domains or held-out documents.

    Example: xlstm-hybrid evaluate runs/tiny/student --recipe recipes/tiny.yaml --out scores.json
    """
    if out is not None:
        check_output(out, "file")
    loaded = load_recipe(recipe)
    if loaded.evaluate is None:
        raise ConfigError(
            f"{recipe.name}: no section evaluate, expected examples, text_chunks and batch_size, or documents and batch_size"
        )
    result = pipeline.evaluate(model, loaded)
    for name, value in result["perplexity"].items():
        score = result["exact_match"].get(name)
        print(f"{name:<12} {'' if score is None else f'exact match {score:6.1%}':<19} perplexity {value:.3f}")
    if out is not None:
        write_json(out, result)
    if result["contradictions"]:
        raise EvaluationError(named_contradictions({model.name: result["contradictions"]}))
