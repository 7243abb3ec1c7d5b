"""Experts into one student as a recipe's section `merge` says, its weights given or searched for."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import open_streams, packed_rows
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.scores import exact_match, perplexity
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.merging.methods import measure_statistics
from xlstm_hybrid.merging.search import search_merge
from xlstm_hybrid.pipeline.evaluation import held_out_rows
from xlstm_hybrid.pipeline.stages import batches_of, workspace
from xlstm_hybrid.recipe.merge_settings import NEED_BASE, NEED_STATISTICS
from xlstm_hybrid.recipe.schema import resolve_path

ALIGNED = "aligned"  # name of the common start in a recipe
CALIBRATION_SEED = 1  # of the prompts that a search scores by: others than those that the results are measured on
STATISTICS = {"rows": 64, "batch_size": 8}
SEARCH = {"batch_size": 64}


def merge_base(recipe, aligned):
    """Directory of the common start that the recipe's method needs; None for one that needs none.

    Raises:
        ConfigError: a path that is not there.
    """
    if recipe.merge is None or recipe.merge["method"] not in NEED_BASE:
        return None
    name = recipe.merge.get("base", ALIGNED)
    base = aligned if name == ALIGNED else resolve_path(recipe, name)
    if base is None:
        raise ConfigError(
            f"{recipe.path.name}: merge.base={name!r} is not there: name a checkpoint, relative to the recipe, or 'aligned'"
        )
    return base


def merge_experts(recipe, experts, out, aligned, teacher, statistics=None, table=None, overwrite=False, progress=None):
    """Merge experts into `out` by the recipe's method, options and weights.

    Args:
        experts: {name: directory}.
        aligned: their common start.
        teacher: which a search compares its candidates with.
        statistics: files of `measure_statistics` in the order of `experts`, for methods that need them.
        table: file of a search's candidates, so that an interrupted one goes on.
        progress: called with every new candidate.
    Returns:
        Search, None where the recipe gives the weights.
    """
    section, directories = recipe.merge, list(experts.values())
    settings = {"method": section["method"], "options": section.get("options"), "overwrite": overwrite}
    settings |= {"base": merge_base(recipe, aligned), "statistics": statistics}
    if "search" not in section:
        shares = section.get("group_weights", {}).items()
        groups = {group: [of_group[name] for name in experts] for group, of_group in shares}
        weights = [section["weights"][name] for name in experts]
        merge(directories, out, weights=weights, group_weights=groups or None, **settings)
        return None
    asked = SEARCH | section["search"]
    settings |= {name: asked[name] for name in ("parts", "budget") if name in asked}
    return search_experts(
        directories, out, teacher, *scorer_of(recipe, asked), table, recipe.revision, progress, **settings
    )


# --- search ----------------------------------------------------------------------------------------------------


def scorer_of(recipe, settings):
    """`(function of model and tokenizer -> {benchmark: score}, words for the calibration set)` of the settings of a
    search.
    """
    if "documents" not in settings:
        return domain_scorer(settings["examples"], settings["batch_size"])
    count, before = settings["documents"], (recipe.evaluate or {}).get("documents", 0)

    def score(model, tokenizer):
        scores = {}
        for expert in recipe.experts:
            for stream in open_streams(recipe, tokenizer, expert, test=True):
                rows = held_out_rows(stream, recipe.length, count, before)
                scores[f"{expert}/{stream.name}"] = 1 / perplexity(model, rows, batch_size=settings["batch_size"])
        return scores

    return score, f"inverse perplexity of {count} held-out documents per source, behind the first {before}"


def domain_scorer(count, batch_size=64):
    """`scorer_of` for exact match on `count` prompts per tiny domain."""
    examples = {domain: tasks.test_examples(domain, count, seed=CALIBRATION_SEED) for domain in tasks.DOMAINS}

    def score(model, tokenizer):
        matches = {
            domain: exact_match(model, tokenizer, rows, batch_size=batch_size) for domain, rows in examples.items()
        }
        return {domain: match.score for domain, match in matches.items()}

    return score, f"{count} prompts per domain, seed {CALIBRATION_SEED}"


def search_experts(experts, out, teacher, score, calibration, table, revision=None, progress=None, **settings):
    """Weights under the win-and-tie objective against `teacher`; candidates are kept in `table`, a second call goes on.

    Args:
        score, calibration: of `scorer_of`.
        settings: of `search.search_merge`.
    """
    goal = score(*load(teacher, revision=revision))
    with workspace(out) as work:
        how = {"calibration": calibration, "table": table, "work": work, "progress": progress}
        return search_merge(experts, out, lambda folder: score(*load(folder)), goal, **how, **settings)


# --- statistics ------------------------------------------------------------------------------------------------


def write_statistics(expert, rows, out, method, settings=None):
    """Write what `method` needs of one expert to the file `out`; returns the number of rows or tokens that were read.

    Args:
        rows: packed rows of what the expert is good at.
        settings: {"batch_size", "labels", "seed"}; the last two are of "fisher" alone.
    Raises:
        ConfigError: a method that needs no statistics.
    """
    if method not in NEED_STATISTICS:
        raise ConfigError(f"method={method!r} needs no statistics, expected one of {', '.join(NEED_STATISTICS)}")
    settings = STATISTICS | (settings or {})
    options = {name: settings[name] for name in ("labels", "seed") if name in settings and method == "fisher"}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = device_of()
    batches = batches_of(rows, settings["batch_size"])
    return measure_statistics(expert, batches, out, NEED_STATISTICS[method], device, **options)


def expert_statistics(recipe, name, expert, file, spec):
    """The recipe's statistics of one expert in `file`, measured unless those of `spec` are there, as a note beside it
    says.

    The rows are the first that its distillation reads.
    """
    note = file.with_suffix(".json")
    if file.is_file() and note.is_file() and json.loads(note.read_text(encoding="utf-8")) == spec:
        return file
    settings = STATISTICS | recipe.merge.get("statistics", {})
    tokenizer = AutoTokenizer.from_pretrained(expert, trust_remote_code=False)
    note.unlink(missing_ok=True)
    rows = packed_rows(recipe, tokenizer, settings["rows"], name)
    write_statistics(expert, rows, file, recipe.merge["method"], settings)
    write_json(note, spec)
    return file
