"""The section `merge` of a recipe in a run: methods with their base, options and statistics, module groups, weights
that are searched for.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint.files import read_provenance
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import packed_rows
from xlstm_hybrid.errors import CheckpointWriteError, ConfigError
from xlstm_hybrid.evaluation.scores import perplexity
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.pipeline import Run, make_experts, merging
from xlstm_hybrid.pipeline.run import check_settings
from xlstm_hybrid.recipe.schema import load_recipe

ROOT = Path(__file__).parents[1]
SHORT = {"max_steps": 1, "sequences_per_step": 2, "logging_steps": 1, "bf16": False}
HALVES = {"symbols": 0.5, "memory": 0.5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe and a run directory with its two experts, trained hard enough to differ."""
    folder = tmp_path_factory.mktemp("merge")
    content = yaml.safe_load((ROOT / "recipes/smoke.yaml").read_text())
    content |= {"teacher": str(ROOT / "recipes/tiny_teacher/tiny-llama"), "align": SHORT}
    content["distill"] = SHORT | {"top_k": 32, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    del content["evaluate"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = load_recipe(folder / "recipe.yaml")
    make_experts(recipe, folder / "run", console=Console(file=open(folder / "console.txt", "w")))  # noqa: SIM115
    return recipe, folder / "run"


@pytest.fixture
def run_of(made, tmp_path):
    """`run_of(section)`: a run in a copy of the run directory; `merged`: its student's weights and last record."""

    def run_of(**section):
        if not (tmp_path / "run").exists():
            shutil.copytree(made[1], tmp_path / "run")
        console = Console(file=open(tmp_path / "console.txt", "a"), width=200)  # noqa: SIM115
        section = section or {"method": "linear", "weights": HALVES}
        return Run(replace(made[0], merge=section), tmp_path / "run", console=console)

    return run_of


def merged(run):
    run.make(*run.named("merge"))
    out = run.path(run.models["student"])
    return load_file(out / "model.safetensors"), read_provenance(out)[-1]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def by_hand(run, folder, **settings):
    merge([run.path(run.experts[name]) for name in ("symbols", "memory")], folder, **settings)
    return load_file(folder / "model.safetensors")


# --- methods ---------------------------------------------------------------------------------------------------


def test_a_method_has_the_recipes_options_and_the_aligned_start_as_its_base(run_of, tmp_path):
    section = {
        "method": "ties",
        "weights": {"memory": 0.75, "symbols": 0.25},
        "options": {"density": 0.4, "scale": 1.5},
    }
    found, record = merged(run_of(**section))
    wanted = by_hand(
        run_of(),
        tmp_path / "hand",
        weights=[0.25, 0.75],
        method="ties",
        base=tmp_path / "run/aligned",
        options=section["options"],
    )
    assert (
        same(found, wanted)
        and record["config"]["base"] == "aligned"
        and record["config"]["options"] == section["options"]
    )
    assert not same(
        found, by_hand(run_of(), tmp_path / "other", weights=[0.75, 0.25], method="ties", base=tmp_path / "run/aligned")
    )


def test_a_base_is_named_relative_to_the_recipe_or_refused_before_anything_runs(made, run_of, tmp_path):
    weights = {"method": "task_arithmetic", "weights": HALVES}
    found, record = merged(run_of(**weights, base="run/aligned"))
    assert record["config"]["base"] == "aligned"
    assert same(found, by_hand(run_of(), tmp_path / "hand", method="task_arithmetic", base=made[1] / "aligned"))
    with pytest.raises(ConfigError, match="merge.base='run/nowhere' is not there"):
        check_settings(replace(made[0], merge=weights | {"base": "run/nowhere"}))


def test_module_groups_have_weights_of_their_own(run_of, tmp_path):
    groups = {"gates": {"memory": 1.0, "symbols": 0.0}, "mlp": {"memory": 0.2, "symbols": 0.8}}
    found, record = merged(run_of(method="linear", weights=HALVES, group_weights=groups))
    assert same(
        found,
        by_hand(
            run_of(), tmp_path / "hand", weights=[0.5, 0.5], group_weights={"gates": [0.0, 1.0], "mlp": [0.8, 0.2]}
        ),
    )
    assert not same(found, by_hand(run_of(), tmp_path / "plain")) and record["config"]["group_weights"]["mlp"] == [
        0.8,
        0.2,
    ]


@pytest.mark.parametrize(
    ("method", "options", "settings"),
    [("regmean", {"alpha": 0.8}, {"rows": 3, "batch_size": 2}), ("fisher", {}, {"rows": 2, "labels": "data"})],
)
def test_statistics_are_measured_on_each_experts_own_rows_and_kept(
    made, run_of, tmp_path, monkeypatch, method, options, settings
):
    measured, measure = [], merging.measure_statistics
    monkeypatch.setattr(
        merging, "measure_statistics", lambda *args, **kwargs: measured.append(args[0]) or measure(*args, **kwargs)
    )
    started = run_of(method=method, weights=HALVES, options=options, statistics=settings)
    found, record = merged(started)
    assert len(measured) == 2 and record["config"]["tensors"][method] > 10
    files = []
    for name in ("symbols", "memory"):
        expert = started.path(started.experts[name])
        rows = packed_rows(made[0], AutoTokenizer.from_pretrained(expert), settings["rows"], name)
        files.append(tmp_path / f"{name}.safetensors")
        merging.write_statistics(expert, rows, files[-1], method, {k: v for k, v in settings.items() if k != "rows"})
    assert same(found, by_hand(started, tmp_path / "hand", method=method, statistics=files, options=options))
    shutil.rmtree(started.out / "merged")
    assert (
        same(merged(run_of(method=method, weights=HALVES, options=options, statistics=settings))[0], found)
        and len(measured) == 4
    )
    other = replace(started.recipe, merge=started.recipe.merge | {"statistics": {"rows": 1}})
    merged(Run(other, started.out, redo=True, console=started.console))
    assert len(measured) == 6  # other settings, other statistics


# --- search ----------------------------------------------------------------------------------------------------


def test_weights_are_searched_for_and_the_candidates_kept(run_of, tmp_path, monkeypatch):
    calls, score_of = [], merging.domain_scorer(1)[0]

    def pointed(count, size):
        """Scores that one expert alone reaches: the best point of the grid is its corner."""

        def scored(model, tokenizer):
            calls.append(model)
            return score_of(model, tokenizer) | {
                "distance": 1 / (1 + (model.model.layers[0].mlp.up_proj.weight - target).square().sum().item())
            }

        return scored, f"{count} of {size}"

    started = run_of(method="linear", search={"examples": 3, "budget": 4, "parts": 2, "batch_size": 5})
    target = load(started.path(started.experts["memory"]))[0].model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(merging, "domain_scorer", pointed)
    memory = started.path(started.experts["memory"])
    monkeypatch.setattr(
        merging, "load", lambda folder, revision=None: load(memory if folder == started.teacher else folder)
    )
    found, record = merged(started)
    assert same(found, load_file(started.path(started.experts["memory"]) / "model.safetensors")) and len(calls) == 5
    assert (
        record["figures"]["search"]["calibration"] == "3 of 5" and len(record["figures"]["search"]["candidates"]) == 4
    )
    assert "weights of symbols, memory: 0.000, 1.000" in (tmp_path / "console.txt").read_text() and not list(
        started.out.glob(".*")
    )
    (table,) = (started.out / "stages").glob("search-*.json")
    shutil.rmtree(started.out / "merged")
    content = json.loads(table.read_text())
    # as if interrupted before the fourth candidate
    table.write_text(json.dumps(content | {"points": content["points"][:3]}))
    merged(run_of(method="linear", search={"examples": 3, "budget": 4, "parts": 2, "batch_size": 5}))
    assert len(calls) == 5 + 2


def test_a_search_by_documents_reads_those_that_nothing_else_reads(made, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n}+{n}={2 * n} and so on"}) + "\n" for n in range(80))
    )
    source = {"sources": {"sums": {"path": "a.jsonl", "text": "text"}}}
    recipe = replace(
        made[0],
        path=tmp_path / "r.yaml",
        experts={"one": source, "two": source},
        evaluate={"documents": 4, "batch_size": 4},
        data={"sequence_length": 32, "held_out": 0.4, **source},
    )
    score_of, words = merging.scorer_of(recipe, {"documents": 5, "batch_size": 2})
    model, tokenizer = load(made[1] / "aligned")
    from xlstm_hybrid.data import open_streams

    (stream,) = open_streams(recipe, tokenizer, "one", test=True)
    documents = [next(stream) for _ in range(9)][4:]
    scores = score_of(model, tokenizer)
    assert set(scores) == {"one/sums", "two/sums"} and scores["one/sums"] == pytest.approx(
        1 / perplexity(model, documents), rel=1e-5
    )
    assert words == "inverse perplexity of 5 held-out documents per source, behind the first 4"


# --- the command --------------------------------------------------------------------------------------------------


def test_merge_statistics_reads_recipes_and_rows(made, run_of, tmp_path):
    started, recipe = run_of(), str(made[0].path)
    expert, files = str(started.path(started.experts["memory"])), [tmp_path / f"{n}.safetensors" for n in "ab"]

    def run(*arguments):
        return CliRunner().invoke(cli.app, list(map(str, arguments)))

    assert (
        run("prepare", expert, tmp_path / "rows", "--recipe", recipe, "--expert", "memory", "--count", 3).exit_code == 0
    )
    told = run(
        "merge-statistics", expert, recipe, "--expert", "memory", "--rows", 2, "--method", "regmean", "--out", files[0]
    )
    assert told.exit_code == 0 and "regmean statistics of memory over 192 tokens" in told.output
    assert (
        run(
            "merge-statistics", expert, tmp_path / "rows", "--rows", 2, "--method", "regmean", "--out", files[1]
        ).exit_code
        == 0
    )
    assert same(*(load_file(file) for file in files))
    assert isinstance(
        run("merge-statistics", expert, recipe, "--expert", "memory", "--out", files[0]).exception, CheckpointWriteError
    )
    wrong = run(
        "merge-statistics",
        expert,
        recipe,
        "--expert",
        "memory",
        "--out",
        tmp_path / "c.safetensors",
        "--method",
        "ties",
    ).exception
    assert isinstance(
        wrong, ConfigError
    ) and "method='ties' needs no statistics, expected one of fisher, regmean" in str(wrong)
    named = run(
        "merge-statistics", expert, tmp_path / "rows", "--expert", "memory", "--out", tmp_path / "c.safetensors"
    ).exception
    assert isinstance(named, ConfigError) and "rows holds rows already" in str(named)
