"""bf16 where the machine has it: trainers, commands and reports follow a timed product; what a user names wins."""

import copy
import json
import logging
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import typer
from conftest import enlarge, tiny_config, tiny_student
from datasets import Dataset
from tiny_teachers import teacher
from transformers import AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import XLSTMHybridForCausalLM, cli
from xlstm_hybrid.checkpoint.files import read_provenance
from xlstm_hybrid.commands.cache_teacher import cache_teacher
from xlstm_hybrid.commands.plan_layers import measured_ranking as ranked
from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig
from xlstm_hybrid.environment import precision
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation import efficiency_checks, efficiency_pairs
from xlstm_hybrid.pipeline import Run, evaluation, settings, stages, targets
from xlstm_hybrid.pipeline.targets import choose_dtype
from xlstm_hybrid.planning import run as plan
from xlstm_hybrid.recipe.schema import load_recipe
from xlstm_hybrid.teacher_store import TeacherStore
from xlstm_hybrid.training.alignment import AlignmentConfig
from xlstm_hybrid.training.distillation import SparseKDConfig
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig
from xlstm_hybrid.training.run_spec import check_run_spec, run_spec

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "tiny_teacher/tiny-llama"  # stored in bfloat16
SLOW, QUICK = 11e9, 400e9  # FLOP/s in bfloat16, beside 51e9 in float32
CONFIGS = [AlignmentConfig, SparseKDConfig, OnPolicyKDConfig, DeltaKDConfig]
RATES = "bfloat16 product 11 GFLOP/s, float32 51"


@pytest.fixture
def machine(monkeypatch, caplog):
    """`machine(rate)`: from now on a machine of that rate in narrow dtypes, to which nothing has been said."""
    caplog.set_level(logging.INFO, "xlstm_hybrid.environment.precision")

    def become(rate):
        caplog.clear()
        monkeypatch.setattr(precision, "rates", lambda device, name: (rate, 51e9))
        monkeypatch.setattr(precision, "told", set())

    return become


@pytest.fixture
def said(caplog):
    """What the user was told, as `(level, line)`."""
    return lambda: [
        (r.levelname, r.getMessage()) for r in caplog.records if r.name == "xlstm_hybrid.environment.precision"
    ]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A teacher and its student on disk, in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    llama = copy.deepcopy(teacher("llama")).float()  # the teacher is one for all tests
    student = enlarge(
        XLSTMHybridForCausalLM.from_teacher(llama, sliding_window=7, num_sink_tokens=3, mlstm_chunk_size=8)
    )
    llama.to(torch.bfloat16).save_pretrained(folder / "teacher")
    student.to(torch.bfloat16).save_pretrained(folder / "student")
    assert all(
        json.loads((folder / side / "config.json").read_text())["dtype"] == "bfloat16"
        for side in ("teacher", "student")
    )
    return folder


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, used", [(11e9, "float32"), (45e9, "float32"), (46e9, "bfloat16"), (400e9, "bfloat16")])
def test_a_machine_prefers_what_it_multiplies_quickly_and_noise_makes_nothing_slow(machine, rate, used):
    machine(rate)
    choice = precision.prefers("cpu")
    assert choice.narrow == (used == "bfloat16")
    assert choice.why == f"bfloat16 product {rate / 1e9:.0f} GFLOP/s, float32 51: {used} is used"


def test_a_gpu_is_measured_by_its_number_and_its_rates_are_told_in_teraflops(monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "rates", lambda device, name: asked.append(device) or (700e12, 51e12))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert precision.prefers("cuda").why == "bfloat16 product 700 TFLOP/s, float32 51: bfloat16 is used"
    precision.prefers("cuda:1")
    assert asked == [torch.device("cuda:3"), torch.device("cuda:1")]


def test_the_product_is_timed_once_and_leaves_the_threads_as_they_were(monkeypatch):
    precision.rates.cache_clear()
    calls, linear, threads = [], torch.nn.functional.linear, torch.get_num_threads()
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: calls.append(x.dtype) or linear(x, w))
    first = precision.rates(torch.device("cpu"), "bfloat16")
    assert min(first) > 1e6 and calls == [torch.bfloat16, torch.float32] * precision.ROUNDS
    assert precision.rates(torch.device("cpu"), "bfloat16") == first and len(calls) == 2 * precision.ROUNDS
    assert torch.get_num_threads() == threads
    assert (
        precision.rate("cpu", "float64") == precision.rate("cpu", "float32") == first[1]
        and precision.rate("cpu", "bfloat16") == first[0]
    )


def test_the_best_of_several_rounds_counts(monkeypatch):
    precision.rates.cache_clear()
    clock = iter([t for seconds in (9, 5, 4, 5, 2, 1, 3, 7, 8, 2, 4, 4) for t in (0.0, float(seconds))])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    assert precision.rates(torch.device("cpu"), "bfloat16") == (2 * 256**3 / 2, 2 * 256**3 / 1)
    precision.rates.cache_clear()


def test_a_dtype_that_the_machine_cannot_multiply_is_slow(monkeypatch):
    def refuse(x, w):
        raise RuntimeError("not implemented")

    precision.rates.cache_clear()
    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    assert precision.prefers("cpu") == (False, "it has no bfloat16 product: float32 is used")
    precision.rates.cache_clear()


def test_a_choice_is_told_once_per_process_and_device_and_by_the_first_process_alone(machine, said, monkeypatch):
    machine(SLOW)
    assert [precision.chosen("cpu") for _ in range(3)] == [False] * 3
    assert said() == [("INFO", f"cpu: {RATES}: float32 is used")]
    precision.chosen("cuda:0")
    assert said()[1:] == [("INFO", f"cuda: {RATES}: float32 is used")]
    machine(SLOW)
    monkeypatch.setenv("RANK", "1")
    assert not precision.chosen("cpu") and said() == []


def test_a_checkpoints_narrow_dtype_is_kept_where_it_is_quick_and_widened_where_it_is_slow(machine):
    for rate, wanted in ((SLOW, "float32"), (QUICK, "bfloat16")):
        machine(rate)
        assert precision.dtype_for("cpu", stored="bfloat16") == wanted
        assert precision.dtype_for("cpu", stored="float16") == wanted.replace("bfloat16", "float16")
        assert (
            precision.dtype_for("cpu", stored="float32") == "float32"
            and precision.dtype_for("cpu", stored=None) is None
        )


def test_what_the_user_names_wins_with_one_warning_and_only_if_it_is_narrow_and_slow(machine, said):
    machine(SLOW)
    assert [precision.dtype_for("cpu", "bfloat16") for _ in range(2)] == ["bfloat16"] * 2
    wanted = f"--dtype: bfloat16 is slower than float32 on this cpu ({RATES}); it is used because it was asked for"
    assert said() == [("WARNING", f"{wanted}, float32 would be quicker")]
    machine(SLOW)
    assert precision.dtype_for("cpu", "float32", stored="bfloat16") == "float32" and said() == []
    machine(QUICK)
    assert (
        precision.dtype_for("cpu", "bfloat16") == "bfloat16"
        and precision.dtype_for("cpu", "float32") == "float32"
        and said() == []
    )


def test_the_command_line_shows_what_is_logged(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xlstm-hybrid", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    capsys.readouterr()
    logging.getLogger("xlstm_hybrid.environment.precision").info("cpu: float32 is used")
    assert capsys.readouterr().err == "cpu: float32 is used\n"


# --- trainers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_trainers_default_follows_the_machine(config, machine, said, tmp_path):
    machine(SLOW)
    made = config(str(tmp_path), use_cpu=True)
    assert not made.bf16 and made.mixed_precision == "no" and said() == [("INFO", f"cpu: {RATES}: float32 is used")]
    machine(QUICK)
    made = config(str(tmp_path), use_cpu=True)
    assert made.bf16 and made.mixed_precision == "bf16" and said()[0][1].endswith("bfloat16 is used")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_trainers_explicit_setting_wins_with_one_warning(config, machine, said, tmp_path):
    machine(SLOW)
    assert all(config(str(tmp_path), use_cpu=True, bf16=True).mixed_precision == "bf16" for _ in range(2))
    ((level, line),) = said()
    assert level == "WARNING" and line.startswith(
        "bf16: bfloat16 is slower than float32 on this cpu (bfloat16 product 11 GFLOP/s"
    )
    machine(QUICK)
    assert (
        config(str(tmp_path), use_cpu=True, bf16=True).bf16
        and not config(str(tmp_path), use_cpu=True, bf16=False).bf16
        and said() == []
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_bfloat16_that_the_machine_chose_is_not_refused_for_want_of_a_gpu(machine, tmp_path):
    """transformers takes bf16 on a CPU only with use_cpu, which nobody has set where nobody has set bf16."""
    machine(QUICK)
    made = SparseKDConfig(str(tmp_path))
    assert made.bf16 and made.use_cpu and made.device == torch.device("cpu")


def test_a_precision_that_accelerate_was_launched_with_or_fp16_is_the_users(machine, said, monkeypatch, tmp_path):
    machine(SLOW)
    made = SparseKDConfig(str(tmp_path), use_cpu=True, fp16=True)
    assert made.fp16 and not made.bf16 and said() == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = SparseKDConfig(str(tmp_path), use_cpu=True)
    assert made.bf16 and not made.bf16_by_machine and [level for level, _ in said()] == ["WARNING"]


def test_a_recipes_section_without_bf16_follows_the_machine_and_one_with_it_wins(machine, said, tmp_path):
    section = {"max_steps": 1, "sequences_per_step": 2}
    for rate, wanted in ((SLOW, False), (QUICK, True)):
        machine(rate)
        made = [settings.trainer_config(config, section, "a section", tmp_path, 0) for config in CONFIGS]
        assert [args.bf16 for args in made] == [wanted] * len(CONFIGS) and [level for level, _ in said()] == ["INFO"]
    machine(SLOW)
    made = [settings.trainer_config(config, section | {"bf16": True}, "a section", tmp_path, 0) for config in CONFIGS]
    assert all(args.bf16 for args in made) and [level for level, _ in said()] == ["WARNING"]


def facts_of(config, folder, **more):
    """The run spec of a trainer with such arguments, as another process reads it from a checkpoint."""
    args = config(str(folder), use_cpu=True, **more)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    return json.loads(json.dumps(run_spec(types.SimpleNamespace(args=args, train_dataset=rows, model=tiny_student()))))


def test_a_run_whose_precision_the_machine_chose_goes_on_on_another_machine_and_one_that_names_it_does_not_change_it(
    machine, tmp_path
):
    machine(QUICK)
    before, explicit = facts_of(AlignmentConfig, tmp_path), facts_of(AlignmentConfig, tmp_path, bf16=True)
    machine(SLOW)
    assert check_run_spec(before, facts_of(AlignmentConfig, tmp_path), (), "checkpoint-1") == {}
    with pytest.raises(ConfigError, match="bf16 was True, is False"):
        check_run_spec(explicit, facts_of(AlignmentConfig, tmp_path, bf16=False), (), "checkpoint-1")


def test_a_stage_records_the_precision_that_it_was_trained_in_and_compares_only_what_the_recipe_says(machine, tmp_path):
    machine(SLOW)
    recipe = load_recipe(RECIPES / "smoke.yaml")
    recipe = replace(recipe, align={k: v for k, v in recipe.align.items() if k != "bf16"} | {"max_steps": 1})
    run = Run(recipe, tmp_path / "run")
    run.make(*run.named("convert", "calibrate", "align"))
    aligned = run.path(run.aligned)
    assert read_provenance(aligned)[-1]["config"]["bf16"] is False
    note = json.loads((tmp_path / "run/stages/align.json").read_text())
    assert "bf16" not in note["spec"]["settings"]
    machine(QUICK)
    again = Run(recipe, tmp_path / "run")
    again.make(*again.named("convert", "calibrate", "align"))
    assert again.reused == run.seconds  # nothing that the recipe says has changed


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """What the efficiency report would measure: `[(student, teacher, settings)]`, nothing is timed."""
    calls = []

    def measure(student, teacher, settings, checks, report=None):
        calls.append((student, teacher, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr("xlstm_hybrid.commands.efficiency.measure_pair", measure)
    return calls


def efficiency(narrow, *more):
    arguments = [
        "efficiency",
        str(narrow / "teacher"),
        str(narrow / "student"),
        "--out",
        str(narrow / "out"),
        "--device",
        "cpu",
    ]
    return CliRunner().invoke(cli.app, [*arguments, *more]).output


@pytest.mark.parametrize("rate, wanted", [(SLOW, torch.float32), (QUICK, torch.bfloat16)])
def test_the_efficiency_report_loads_both_sides_in_what_the_machine_does_well(
    narrow, machine, measured, said, rate, wanted
):
    machine(rate)
    efficiency(narrow)
    ((*sides, _),) = measured
    assert [side.load().dtype for side in sides] == [wanted] * 2 and [level for level, _ in said()] == ["INFO"]


def test_the_efficiency_report_takes_the_dtype_that_it_is_asked_for(narrow, machine, measured, said):
    machine(SLOW)
    efficiency(narrow, "--dtype", "bfloat16")
    ((*sides, _),) = measured
    assert [side.load().dtype for side in sides] == [torch.bfloat16] * 2 and [level for level, _ in said()] == [
        "WARNING"
    ]


def test_on_a_cpu_the_efficiency_report_measures_the_lengths_that_take_minutes_and_says_so(
    narrow, machine, measured, monkeypatch
):
    config = tiny_config()  # 3 layers of 4 heads of 16, 2 groups, width 48, MLP 56
    linear = 2 * (48 * 4 * 16 + 2 * 48 * 2 * 16 + 4 * 16 * 48 + 3 * 48 * 56)
    assert efficiency_pairs.prompt_flops(config, 100) == 3 * sum(
        linear + 2 * 2 * 4 * 16 * seen for seen in range(1, 101)
    )
    needed = [
        2 * 8 * efficiency_pairs.prompt_flops(config, L) / efficiency_pairs.REACHED for L in efficiency_pairs.ON_CPU
    ]  # 5 rounds and 3 passes beside them, two sides
    lengths, line = efficiency_pairs.affordable(config, 5, (1,), (needed[0] + needed[1]) / efficiency_pairs.BUDGET)
    assert lengths == (512, 1024)
    assert line.startswith("prompts of 512, 1024 tokens: up to 5 minutes of a core; 2048 would take")
    assert efficiency_pairs.affordable(config, 5, (1,), needed[0] / efficiency_pairs.BUDGET / 100)[0] == (512,)
    every, line = efficiency_pairs.affordable(config, 5, (1,), sum(needed) / efficiency_pairs.BUDGET)
    assert every == efficiency_pairs.ON_CPU and line.endswith("8192, 16384 tokens: up to 5 minutes of a core")
    machine(SLOW)
    output = efficiency(narrow)
    assert measured[-1][
        -1
    ].lengths == efficiency_pairs.ON_CPU and "prompts of 512, 1024, 2048, 4096, 8192, 16384 tokens" in " ".join(
        output.split()
    )
    efficiency(narrow, "--lengths", "40,80")
    assert measured[-1][-1].lengths == (40, 80)
    efficiency(narrow, "--contexts", "16384,99")
    assert measured[-1][-1].lengths == efficiency_pairs.ON_CPU[:-1] and measured[-1][-1].contexts == (16384, 99)
    monkeypatch.setattr(efficiency_pairs, "BUDGET", 0)
    efficiency(narrow)
    assert measured[-1][-1].lengths == (512,)


def test_a_student_is_proven_on_one_layer_of_each_layout():
    kinds = {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "full_attention", "hybrid_sliding", "full_attention"],
        "num_hidden_layers": 5,
    }
    model = tiny_student(**kinds)
    short, ids = efficiency_checks.first_layers(model), torch.arange(1, 31)[None]
    assert (
        short.config.layer_types
        == kinds["layer_types"][:3]
        == [layer.self_attn.layer_type for layer in short.model.layers]
    )
    assert short.config.num_hidden_layers == 3 and model.config.num_hidden_layers == len(model.model.layers) == 5
    with torch.no_grad():
        seen = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(short.model(ids, use_cache=False).last_hidden_state, model.model.norm(seen[3]))
    still = tiny_student(rope_layers=[True, True, False])
    assert efficiency_checks.first_layers(still).config.rope_layers == [True, True, False]
    kept = tiny_student(kept_groups=[[], [], [1]], layer_windows=[7, 7, 5])
    assert efficiency_checks.first_layers(kept).config.kept_groups == [[], [], [1]]
    assert efficiency_checks.first_layers(
        tiny_student(layer_windows=[7, 7, 7], layer_sinks=[3, 3, 3])
    ).config.layer_sinks == [3, 3]
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "mlp_only_layers": [0, 2, 4]}
    short = efficiency_checks.first_layers(tiny_student(num_hidden_layers=5, **experts))
    assert short.config.mlp_only_layers == [0] and torch.isfinite(short(ids).logits).all()


def test_on_a_cpu_the_checks_of_a_report_name_the_layers_that_they_ran_on():
    model = tiny_student(num_hidden_layers=4)
    results = list(efficiency_checks.checks(model, model, "dynamic"))
    named = [result.name for result in results if result.name.endswith(", 2 of 4 layers")]
    assert len(named) == len(results) - 2 > 15 and [result.name for result in results[:2]] == [
        "teacher: prompt and steps = one call",
        "student: prompt and steps = one call",
    ]
    whole = list(efficiency_checks.checks(model, model, "dynamic", lambda: model))
    assert [result.name for result in whole[2:]] == [name.removesuffix(", 2 of 4 layers") for name in named]


@pytest.mark.parametrize("rate, wanted", [(SLOW, "float32"), (QUICK, "bfloat16")])
def test_a_stored_teacher_calculates_in_what_the_machine_does_well_and_its_store_is_gone_on_with_elsewhere(
    machine, monkeypatch, tmp_path, rate, wanted
):
    tokens = AutoTokenizer.from_pretrained(TINY)("a row of text", add_special_tokens=False)["input_ids"]
    Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * 4).save_to_disk(tmp_path / "rows")
    loaded, made = [], targets.TeacherTargets
    monkeypatch.setattr(
        targets, "TeacherTargets", lambda model, select: loaded.append(model.dtype) or made(model, select)
    )
    machine(rate)
    store(tmp_path, "--shard-tokens", 2 * len(tokens))
    assert loaded == [getattr(torch, wanted)] and TeacherStore(tmp_path / "store").spec["dtype"] == wanted
    (tmp_path / "store/shard-00001.safetensors").unlink()
    machine(QUICK if rate == SLOW else SLOW)
    store(tmp_path, "--shard-tokens", 2 * len(tokens))
    assert loaded == [getattr(torch, wanted)] * 2 and len(TeacherStore(tmp_path / "store")) == 4


def store(folder, *more):
    app = typer.Typer()
    app.command()(cache_teacher)
    arguments = [TINY, folder / "rows", folder / "store", "--top-k", 4, "--device", "cpu", *more]
    typer.main.get_command(app)([str(a) for a in arguments], standalone_mode=False)


def test_the_dtype_of_a_stored_teacher_is_the_users_then_the_recipes(machine, said, tmp_path):
    config, rows = transformers.AutoConfig.from_pretrained(TINY), tmp_path / "rows"
    machine(SLOW)
    assert choose_dtype("bfloat16", rows, config, "cpu", tmp_path) == "bfloat16" and [level for level, _ in said()] == [
        "WARNING"
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "smoke.yaml").read_text() + "\nteacher_dtype: bfloat16\n")
    machine(SLOW)
    assert choose_dtype("auto", recipe, config, "cpu", tmp_path) == "bfloat16"
    ((level, line),) = said()
    assert level == "WARNING" and line.startswith("teacher_dtype: bfloat16 is slower")
    assert choose_dtype("auto", RECIPES / "smoke.yaml", config, "cpu", tmp_path) == "float32"
    recipe.write_text(recipe.read_text().replace("teacher_dtype: bfloat16", "teacher_dtype: int8"))
    with pytest.raises(ConfigError, match="teacher_dtype int8: expected one of"):
        choose_dtype("auto", recipe, config, "cpu", tmp_path)
    with pytest.raises(ConfigError, match="--dtype int8: expected one of auto, float32, bfloat16, float16"):
        choose_dtype("int8", rows, config, "cpu", tmp_path)


@pytest.mark.parametrize("rate, wanted", [(SLOW, "float32"), (QUICK, "bfloat16")])
def test_a_server_holds_a_checkpoint_in_what_the_machine_does_well(narrow, machine, said, monkeypatch, rate, wanted):
    calls = []
    for module in ("uvicorn", "xlstm_hybrid.serving.server"):  # a package that need not be there, and what needs it
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(build_app=None))

    def loaded(model, dtype, device):
        calls.append(dtype)
        raise ConfigError("nothing is served here")

    monkeypatch.setattr("xlstm_hybrid.commands.serve.load", loaded)
    for more in ((), ("--dtype", "bfloat16")):
        machine(rate)
        CliRunner().invoke(cli.app, ["serve", str(narrow / "student"), "--device", "cpu", *more])
    assert calls == [wanted, "bfloat16"] and [level for level, _ in said()] == ["WARNING"] * (rate == SLOW)
    CliRunner().invoke(cli.app, ["serve", str(narrow / "nothing"), "--device", "cpu"])
    assert calls[2:] == ["float32"]  # loading says what is wrong with it


def test_scores_are_measured_in_float32_on_every_machine_unless_the_user_names_a_dtype(
    narrow, machine, said, monkeypatch, tmp_path
):
    seen = []
    monkeypatch.setattr(
        evaluation,
        "evaluate_domains",
        lambda model, *rest: seen.append(model.dtype) or {"exact_match": {}, "perplexity": {}, "contradictions": {}},
    )
    monkeypatch.setattr(
        "xlstm_hybrid.commands.harness.run_harness",
        lambda model, units, out, options, report: seen.append(options.dtype) or {},
    )
    common = ["harness", str(narrow / "student"), "--tasks", "domains", "--out", str(tmp_path), "--device", "cpu"]
    for rate in (SLOW, QUICK):
        machine(rate)
        CliRunner().invoke(
            cli.app, ["evaluate", str(TINY), "--recipe", str(RECIPES / "smoke.yaml")], catch_exceptions=False
        )
        CliRunner().invoke(cli.app, common, catch_exceptions=False)
    assert seen == [torch.float32, "float32"] * 2 and said() == []
    machine(SLOW)
    for _ in range(2):
        CliRunner().invoke(cli.app, [*common, "--dtype", "bfloat16"], catch_exceptions=False)
    assert seen[4:] == ["bfloat16"] * 2 and [level for level, _ in said()] == ["WARNING"]


def test_a_teacher_that_a_recipe_holds_in_bfloat16_is_held_so_with_one_warning(machine, said, monkeypatch):
    machine(SLOW)
    recipe = replace(load_recipe(RECIPES / "smoke.yaml"), teacher_dtype="bfloat16")
    args = types.SimpleNamespace(device=torch.device("cpu"), fsdp=None)
    assert [stages.load_teacher(TINY, recipe, args).dtype for _ in range(2)] == [torch.bfloat16] * 2
    ((level, line),) = said()
    assert level == "WARNING" and line.startswith("teacher_dtype: bfloat16 is slower than float32 on this cpu")
    monkeypatch.setattr(evaluation, "measure_checkpoints", lambda *args, dtype, **rest: dtype)
    found = evaluation.measure_efficiency(recipe, str(TINY), str(TINY))
    assert found["pairs"] == ["bfloat16"] and len(said()) == 1


def test_groups_are_ranked_in_what_the_machine_does_well(narrow, machine, monkeypatch):
    seen, tokenizer = [], AutoTokenizer.from_pretrained(TINY)
    monkeypatch.setattr(
        "xlstm_hybrid.commands.plan_layers.rank_groups", lambda student, *rest, **how: seen.append(student.dtype) or {}
    )
    monkeypatch.setattr("xlstm_hybrid.commands.plan_layers.documents", lambda *what, **more: [])
    monkeypatch.setattr("xlstm_hybrid.commands.plan_layers.retrieval_rows", lambda *what, **more: (None, None))
    for rate in (SLOW, QUICK):
        machine(rate)
        for side in ("student", "teacher"):
            tokenizer.save_pretrained(narrow / side)
            config = XLSTMHybridForCausalLM.config_class.from_pretrained(narrow / "student")
            ranked(str(narrow / side), config, side == "student", "needle", 1, 64, "cpu")
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_a_plan_is_for_gpus_and_takes_a_recipe_that_says_nothing_for_bfloat16():
    recipe = load_recipe(RECIPES / "smoke.yaml")
    assert not plan.jobs_of(recipe)["align"].bf16  # it says so
    for silent in ({"max_steps": 2}, {"max_steps": 2, "bf16": None}):
        assert plan.jobs_of(replace(recipe, align=silent))["align"].bf16
    said = plan.assumptions(plan.machine_of(8, 80e9), types.SimpleNamespace(idle=0, linear=0))
    assert "bf16: false" in "\n".join(said)
