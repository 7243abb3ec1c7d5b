"""Every recipe: it loads, its teacher can be planned for, and all of its stages run on a tiny teacher of its family and
local data.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import enlarge
from rich.console import Console
from test_data import TALK, letters, lines
from tiny_teachers import model_class, teacher_config
from transformers import LlamaConfig, Olmo3Config, Qwen2Config, Qwen3Config

from xlstm_hybrid.checkpoint.files import read_provenance, verify_files
from xlstm_hybrid.commands.plan import plan_lines
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.pipeline import Run
from xlstm_hybrid.planning import run as plan
from xlstm_hybrid.planning.cache_size import cache_bytes
from xlstm_hybrid.planning.layers import allocate
from xlstm_hybrid.recipe.schema import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
TEACHERS = {  # recipe -> family, configuration of the real teacher, its parameters
    "llama-3.1-8b": (
        "llama",
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **LLAMA),
        8_030_261_248,
    ),
    "llama-3.1-8b-instruct": (
        "llama",
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **LLAMA),
        8_030_261_248,
    ),
    "llama-3.2-1b": (
        "llama",
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            head_dim=64,
            tie_word_embeddings=True,
            **LLAMA,
        ),
        1_235_814_400,
    ),
    "qwen2.5-7b-instruct": (
        "qwen2",
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        7_615_616_512,
    ),
    "qwen3-1.7b": (
        "qwen3",
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        1_720_574_976,
    ),
    "olmo-3-7b": (
        "olmo3",
        Olmo3Config(
            vocab_size=100278,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        7_298_011_136,
    ),
}
TEACHERS["llama-3.2-1b-long-recall"] = TEACHERS["llama-3.2-1b"]
OTHERS = {"tiny", "smoke"} | {
    f"smollm2-135m{name}" for name in ("", "-cpu", "-cpu-w256", "-cpu-control", "-cpu-uncalibrated")
}  # tests/pipeline/test_real_recipes.py
PUBLISHED = {  # the paper's learning rate of stage II, tokens of an expert, merge weights
    "llama-3.1-8b": (1e-5, 5e9, None),
    "llama-3.1-8b-instruct": (1e-5, 5e9, {"math": 0.35, "code": 0.35, "stem": 0.20, "chat": 0.10}),
    "olmo-3-7b": (1e-5, 20e9, None),
    "qwen2.5-7b-instruct": (7e-7, 5e9, {"math": 0.20, "code": 0.40, "stem": 0.15, "chat": 0.25}),
}


def test_every_recipe_is_tested_here():
    found = {
        p.stem for p in RECIPES.glob("*.yaml") if not p.name.startswith("distil_")
    }  # those are of the command `distil-xlstm`
    assert found == {*TEACHERS, *OTHERS}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_recipe_of_a_real_teacher_can_be_planned(name):
    family, config, parameters = TEACHERS[name]
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    found = plan.plan(config, plan.machine_of(8, 80e9), recipe)
    assert config.model_type == family and found.shape.teacher == parameters
    assert found.fits and found.jobs["align"].tokens == 655_360_000
    assert found.jobs["distill"].teacher_bytes == 2 and found.jobs["distill"].experts == len(recipe.experts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_the_recipes(name):
    recipe, (rate, tokens, weights) = load_recipe(RECIPES / f"{name}.yaml"), PUBLISHED[name]
    a, d = recipe.align, recipe.distill
    assert (recipe.student["sliding_window"], recipe.student["num_sink_tokens"], recipe.length) == (512, 4, 4096)
    assert (
        a["max_steps"],
        a["sequences_per_step"],
        a["learning_rate"],
        a["lr_scheduler_kwargs"],
        a["weight_decay"],
    ) == (2500, 64, 1e-2, {"min_lr": 1e-5}, 0.1)
    assert (d["learning_rate"], d["ce_weight"], d["kl_weight"], d["top_k"], d["max_grad_norm"]) == (
        rate,
        0.9,
        0.1,
        256,
        1.0,
    )
    assert d["max_steps"] * d["sequences_per_step"] * recipe.length == pytest.approx(tokens, rel=1e-4)
    assert (recipe.merge and recipe.merge["weights"]) == weights


def test_the_recipe_for_long_recall_is_the_other_one_with_twice_the_features():
    plain, wide = (load_recipe(RECIPES / f"llama-3.2-1b{name}.yaml") for name in ("", "-long-recall"))
    features = wide.student.pop("memory_feature_dim")
    assert features == 2 * TEACHERS["llama-3.2-1b"][1].head_dim
    assert replace(wide, name=plain.name, out=plain.out, path=plain.path) == plain


def test_the_recipe_for_long_recall_has_kernels_for_all_it_does_and_wider_features_would_not():
    config, machine = TEACHERS["llama-3.2-1b"][1], plan.machine_of(1, 80e9)
    recipe = load_recipe(RECIPES / "llama-3.2-1b-long-recall.yaml")
    for features, expected in (
        (128, []),
        (256, ["training and prompts"]),
        (512, ["training and prompts", "generation"]),
    ):
        lines = plan_lines(
            plan.plan(config, machine, replace(recipe, student=recipe.student | {"memory_feature_dim": features}))
        )
        assert [line.split(":")[1].strip() for line in lines if str(line).startswith("warning")] == expected


def test_the_groups_that_plan_layers_finds_go_into_a_recipe_and_cost_what_it_says():
    config, recipe = TEACHERS["llama-3.2-1b"][1], load_recipe(RECIPES / "llama-3.2-1b-long-recall.yaml")
    groups = [{"layer": j, "group": g, "gain": 1.0 + ((j, g) == (5, 3))} for j in range(16) for g in range(8)]
    groups.sort(key=lambda entry: -entry["gain"])
    found = allocate(
        student_config(config), 40_000_000, 32768, ranking={"layers": 16, "key_value_heads": 8, "groups": groups}
    )
    kept = found.student["kept_groups"]
    assert kept == [[3] if j == 5 else [] for j in range(16)]
    before, after = (
        sum(plan.plan(config, plan.machine_of(8, 80e9), r).cache["student"].values())
        for r in (recipe, replace(recipe, student=recipe.student | {"kept_groups": kept}))
    )
    head, slots = (
        (128 * 64 + 128 + 1) * 4,
        516 * 2 * 64 * 2,
    )  # state of one of the four heads that now keep full attention; window of the group
    assert after - before == 4096 * (2 * 64 * 2 + 8) - 4 * head - slots
    students = {"plain": {}, "group": {"kept_groups": kept}, "both": {"kept_groups": kept, "memory_feature_dim": 128}}
    size = {
        name: round(sum(cache_bytes(student_config(config, **student), 32768).values()) / 1e6, 1)
        for name, student in students.items()
    }
    assert size == {"plain": 25.4, "group": 33.9, "both": 42.3}  # as the recipe says


# --- a run on stand-in data ---------------------------------------------------------------------------------


def stand_in(source, folder, n):
    """A local file with the columns that a source names, read as a stream as the real one is."""
    rows = []
    for j in range(24):
        talk = [TALK[0] | {"content": f"{n}+{j}?"}, TALK[1] | {"content": str(n + j)}]
        texts = {source.get("text"): f"text {n} {j} " + "abc " * (j % 7), source.get("messages"): talk}
        texts |= {
            source.get("prompt"): talk[:1] if j % 2 else talk[0]["content"],
            source.get("completion"): talk[1]["content"],
        }
        rows.append(
            {column: value for column, value in texts.items() if column} | dict.fromkeys(source.get("where", ()), 1)
        )
    same_kind = [
        row for row in rows if not source.get("prompt") or isinstance(row[source["prompt"]], str) == (n % 2 == 0)
    ]
    kept = {k: v for k, v in source.items() if k not in ("name", "revision", "data_files", "split")}
    return kept | {"path": lines(folder / f"{n}.jsonl", same_kind), "streaming": True}


def tiny_version(recipe, family, folder):
    """The recipe with a tiny teacher, local data and two steps per stage; everything else as it is."""
    model = enlarge(
        model_class(family)(teacher_config(family, tie_word_embeddings=True, max_position_embeddings=128))
    ).eval()
    model.save_pretrained(folder / "teacher")
    letters(pad_token="<pad>").save_pretrained(folder / "teacher")
    count = iter(range(1000))
    here = lambda sources: {name: stand_in(s, folder, next(count)) for name, s in sources.items()}  # noqa: E731
    short = {"max_steps": 2, "sequences_per_step": 2, "warmup_steps": 1, "logging_steps": 1, "save_steps": 1}
    return replace(
        recipe,
        teacher="teacher",
        path=folder / "recipe.yaml",
        student=recipe.student | {"sliding_window": 8},
        data=recipe.data | {"sequence_length": 40, "sources": here(recipe.data["sources"]), "held_out": 0.3},
        align=recipe.align | short,
        distill=recipe.distill | short | {"top_k": 16},
        experts={name: {"sources": here(e["sources"])} for name, e in recipe.experts.items()},
        evaluate=recipe.evaluate | {"documents": 2},
    )


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", *(pytest.param(n, marks=pytest.mark.slow) for n in TEACHERS if n != "llama-3.2-1b")]
)
def test_all_stages_of_a_recipe_run_on_a_tiny_teacher_of_its_family(tmp_path, name):
    recipe = tiny_version(load_recipe(RECIPES / f"{name}.yaml"), TEACHERS[name][0], tmp_path)
    out = tmp_path / "run"
    results = Run(recipe, out, console=Console(file=open(tmp_path / "console.txt", "w"), width=120)).run()  # noqa: SIM115
    verify_files(out / "student")
    stages = [s["stage"] for s in read_provenance(out / "student")]
    merged = ["merge"] if recipe.merge else []
    assert stages == ["convert", "align", *(f"distill:{e}" for e in recipe.experts), *merged, "evaluate"]
    perplexities = results["students"]["student"]["perplexity"]
    assert len(perplexities) == len(recipe.data["sources"]) + sum(len(e["sources"]) for e in recipe.experts.values())
    assert all(1 < p < 1e6 for p in perplexities.values())
    for name in ("converted", "aligned", "student"):
        scores = results["students"][name]
        assert scores["kl"].keys() == scores["top1"].keys() == perplexities.keys(), "beside the teacher, every source"
        assert all(kl > 0 for kl in scores["kl"].values()) and all(0 <= t <= 1 for t in scores["top1"].values())
    assert "kl" not in results["teacher_scores"]
    assert "## KL from the teacher" in (out / "report.md").read_text(encoding="utf-8")
    assert "KL to the teacher | same most likely token" in (out / "student/README.md").read_text(encoding="utf-8")
    log = json.loads((out / "experts" / next(iter(recipe.experts)) / "training_log.json").read_text())
    assert [e["learning_rate"] for e in log if "loss" in e][-1] == pytest.approx(recipe.distill["learning_rate"])
    assert not [p.name for p in out.rglob(".*")], "nothing hidden is left behind"
