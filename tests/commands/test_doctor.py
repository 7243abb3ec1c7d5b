"""The doctor says what is there against what was tested, exits with 1 only if something is wrong, and names nobody."""

import builtins
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner
from xlstm_kernels.backends import compiled, verified
from xlstm_kernels.step import layer, linear

from xlstm_hybrid import cli, doctor
from xlstm_hybrid.doctor import MISSING, NOTE, OK, WRONG, Finding, diagnose, quota, threads, unwritable
from xlstm_hybrid.environment import precision
from xlstm_hybrid.environment.versions import EXTRAS, PACKAGES
from xlstm_hybrid.errors import CompatibilityError
from xlstm_hybrid.model import compatibility

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Properties = namedtuple("Properties", "name total_memory major minor")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, everything installed at its newest tested version: {package: version}, to be changed."""
    home = tmp_path / "home/alice"
    home.mkdir(parents=True)
    for name, value in {
        "HOME": home,
        "LOGNAME": "alice",
        "OMP_NUM_THREADS": 1,
        "XLSTM_KERNELS_CACHE": home / "verdicts",
    }.items():
        monkeypatch.setenv(name, str(value))
    for name in (
        "MKL_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "ATEN_CPU_CAPABILITY",
        "TRITON_INTERPRET",
        "TRITON_CACHE_DIR",
        "TRITON_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(home / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = {name: package.newest or package.floor for name, package in PACKAGES.items()}
    found |= {name: "1.0" for extra in EXTRAS.values() for name in extra.packages if name not in found} | {
        "xlstm-hybrid": "0.1.0"
    }
    monkeypatch.setattr(doctor, "installed", found.get)
    monkeypatch.setattr(doctor, "gpus", lambda: ([], ""))
    monkeypatch.setattr(doctor, "driver", lambda: False)
    return found


def rows(check):
    return {row.name: row for row in check()}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])


# --- the command -------------------------------------------------------------------------------------------------


def test_a_right_installation_exits_with_0_and_the_file_holds_the_rows(machine, tmp_path):
    result = run("--json", tmp_path / "found.json")
    assert result.exit_code == 0 and result.output.endswith("nothing is wrong\n"), result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == [] and list(found["sections"]) == list(doctor.CHECKS)
    newest = PACKAGES["transformers"].newest
    row = {
        "name": "transformers",
        "found": newest,
        "verdict": OK,
        "note": f"5.17 or newer, tested to {newest}",
        "mend": "",
    }
    assert row in found["sections"]["versions"]


def test_what_is_wrong_is_named_at_the_end_and_the_exit_code_is_1(machine):
    machine |= {"transformers": "5.16.1", "peft": "0.20.0"}
    result = run()
    assert result.exit_code == 1 and result.output.endswith("wrong: transformers, peft\n")
    assert "pip install 'transformers>=5.17,<6'" in result.output


def test_optional_packages_may_all_be_missing(machine):
    for extra in EXTRAS.values():
        for name in extra.packages:
            machine.pop(name, None)
    result = run()
    assert result.exit_code == 0 and all(f"pip install 'xlstm-hybrid[{extra}]'" in result.output for extra in EXTRAS)


def test_the_text_fits_an_issue(machine, monkeypatch):
    machine.pop("trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    lines = run().output.splitlines()
    assert max(map(len, lines)) <= 100 and all(line == line.rstrip() and line.isprintable() for line in lines)
    assert (
        "                     pip install 'xlstm-hybrid[train]'" in lines
        and "                     export OMP_NUM_THREADS=2" in lines
    )


def test_neither_home_folder_nor_name_is_told(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/scratch/alice/hub")
    monkeypatch.setattr(
        doctor,
        "CHECKS",
        doctor.CHECKS | {"odd": lambda: iter([Path.home() / "a"][5:] or [].pop(str(Path.home() / "model")))},
    )
    result = run("--json", tmp_path / "found.json")
    for text in (result.output, (tmp_path / "found.json").read_text()):
        assert "alice" not in text and str(tmp_path) not in text
        assert "~/hf" in text and "~/verdicts" in text and "/scratch/USER/hub" in text


def test_a_home_that_is_the_root_folder_leaves_paths_alone(machine, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert doctor.shown("/var/cache") == "/var/cache"


def test_it_runs_where_no_extra_is_and_imports_none():
    """A finder that refuses them stands for an environment without them."""
    refused = {"trl", "peft", "datasets", "lm_eval", "matplotlib", "triton"}
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {refused!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from xlstm_hybrid.doctor import diagnose, wrong
found = diagnose()
assert not set(sys.modules) & {refused!r}
assert not [row for rows in found.values() for row in rows if row.found == 'this check failed'], found
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_a_check_that_fails_is_a_row_and_the_others_go_on():
    def broken():
        yield Finding("first", "there")
        raise RuntimeError("libcuda is of another version")

    found = diagnose({"a": broken, "b": lambda: [Finding("last", "there")]})
    assert found["a"] == [
        Finding("first", "there"),
        Finding("a", "this check failed", WRONG, "RuntimeError: libcuda is of another version"),
    ]
    assert found["b"] == [Finding("last", "there")] and doctor.wrong(found) == ["a"]


def test_the_first_question_of_an_issue_is_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    assert (
        "xlstm-hybrid doctor" in form["body"][0]["attributes"]["label"] and form["body"][0]["validations"]["required"]
    )
    assert [part["id"] for part in form["body"]] == ["doctor", "done", "expected", "found"]


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, version, verdict, said",
    [
        ("torch", "2.13.0+cpu", OK, "2.10 or newer"),
        ("torch", "2.9.1", WRONG, "older than 2.10, the floor"),
        ("transformers", "5.16.1", WRONG, "older than 5.17, the floor"),
        ("transformers", "5.99.0", NOTE, f"newer than {PACKAGES['transformers'].newest}, the newest that was tested"),
        ("transformers", "6.0.0", WRONG, "6 and later are not supported"),
        ("trl", "2.0", WRONG, "2 and later are not supported"),
        ("datasets", "4.0.0", WRONG, "older than 4.7"),
        ("nvidia-ml-py", "13.1", OK, "12 or newer"),
    ],
)
def test_a_version_is_compared_with_floor_and_newest_tested(machine, name, version, verdict, said):
    machine[name] = version
    row = rows(doctor.package_versions)[name]
    assert (row.found, row.verdict) == (version, verdict) and said in row.note
    assert row.mend.startswith(f"pip install '{name}>=") == (verdict == WRONG)


def test_what_is_needed_is_wrong_when_missing_and_what_is_optional_says_what_it_adds(machine):
    for name in ("safetensors", "trl", "lm-eval", "matplotlib"):
        machine.pop(name)
    found = rows(doctor.package_versions)
    assert found["safetensors"].verdict == WRONG and not {"trl", "lm-eval", "matplotlib"} & set(found)
    optional = rows(doctor.extras)
    assert optional["[train]"][1:3] == ("without trl, matplotlib", MISSING) and "LoRA" in optional["[train]"].note
    assert optional["[eval]"].mend == "pip install 'xlstm-hybrid[eval]'" and optional["[serve]"].verdict == OK


# --- CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "used, available, variables, verdict, said",
    [
        (2, 2, {}, OK, ""),
        (1, 8, {"OMP_NUM_THREADS": "1"}, OK, "one core is used"),
        (1, 1, {}, OK, ""),
        (32, 2, {}, NOTE, "more threads than cores"),
        (2, 2, {"OMP_NUM_THREADS": "9"}, NOTE, "more threads than cores"),
        (2, 2, {"OMP_NUM_THREADS": "4,2"}, OK, ""),
        (2, 4, {"MKL_NUM_THREADS": "16"}, NOTE, "more threads than cores"),
    ],
)
def test_more_threads_than_cores_are_noted(machine, monkeypatch, used, available, variables, verdict, said):
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    row = threads(used, available)
    assert row.verdict == verdict and row.note.startswith(said) and bool(said) == bool(row.note)
    assert row.found.startswith(f"{used} on {available} core") and all(
        f"{name}={value}" in row.found for name, value in variables.items()
    )
    assert row.mend == (f"export OMP_NUM_THREADS={available}" if verdict == NOTE else "")


@pytest.mark.parametrize(
    "files, granted",
    [
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu.max": ""}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_containers_share_of_the_cores_is_read_from_its_control_group(monkeypatch, tmp_path, files, granted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == granted
    monkeypatch.setattr(doctor, "quota", lambda: granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert doctor.cores() == {float("inf"): 8, 2.5: 2, 0.5: 1}[granted]


@pytest.mark.parametrize("best, bf16", [("AVX2", False), ("AVX512", True), ("AVX512", False)])
def test_a_cpus_instructions_and_what_it_multiplies_quickly_are_told(machine, monkeypatch, best, bf16):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: best)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(precision, "rates", lambda device, name: (200e9 if bf16 else 11e9, 51e9))
    found = rows(doctor.cpu)
    assert found["instructions"].found == ", ".join(["AVX2", *["AVX512"] * (best == "AVX512"), *["AVX512-bf16"] * bf16])
    assert found["bf16"].found == ("quick" if bf16 else "slow")
    assert found["bf16"].note.endswith(
        "bfloat16 is used" if bf16 else "product 11 GFLOP/s, float32 51: float32 is used"
    )


LINEAR = {"olmo_hybrid": OK, "qwen3_next": WRONG, "qwen3_5": OK}


def test_a_transformers_that_generates_otherwise_is_wrong(machine, monkeypatch):
    assert [row.verdict for row in doctor.model_check()] == [OK, OK]

    def refuse(cls, linear):
        if linear in (None, "qwen3_next"):
            raise CompatibilityError("of a tiny model, {'beams': 3.1} differ")

    monkeypatch.setattr(compatibility, "ensure_compatible", refuse)
    found = list(doctor.model_check())
    assert (
        [row.verdict for row in found] == [WRONG, WRONG]
        and "beams" in found[0].note
        and "transformers" in found[0].mend
    )
    monkeypatch.setattr(doctor, "untested", lambda name, version: True)  # then linear attention counts, too
    found = {row.name: row.verdict for row in list(doctor.model_check())[2:]}
    assert found == {f"xlstm_hybrid with {name}": verdict for name, verdict in LINEAR.items()}


@pytest.mark.parametrize(
    ("built", "found", "verdict", "note", "mend"),
    [
        ((None, "no C compiler was found: install gcc"), "none", NOTE, "no C compiler was found", "apt install gcc"),
        (
            (None, "XLSTM_KERNELS_COMPILED=0"),
            "none",
            NOTE,
            "XLSTM_KERNELS_COMPILED=0: a decoded token runs as torch",
            "",
        ),
        ((object(), ""), "right", OK, "one thread: torch's OpenMP was not found", ""),
        ((object(), "", True), "right", OK, "several threads", ""),
    ],
)
def test_whether_decoding_is_compiled_is_told(machine, monkeypatch, built, found, verdict, note, mend):
    monkeypatch.setattr(compiled, "library", lambda source: compiled.Library(*built))
    monkeypatch.setattr(layer, "check_layer", lambda device, dtype, K, P: {"h": 1e-6})
    monkeypatch.setattr(linear, "check_linear", lambda device, dtype: {"y": 1e-6})
    row = rows(doctor.cpu)["compiled steps"]
    assert (row.found, row.verdict, row.mend) == (found, verdict, mend) and note in row.note


def test_compiled_steps_that_are_wrong_here_are_noted(machine, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda source: compiled.Library(object()))
    monkeypatch.setattr(layer, "check_layer", lambda device, dtype, K, P: {"h": 0.1})
    row = rows(doctor.cpu)["compiled steps"]
    assert (row.found, row.verdict) == ("wrong", NOTE) and "their check failed" in row.note


def test_threads_that_spin_and_instructions_that_are_held_back_are_noted(machine, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    found = rows(doctor.cpu)
    assert found["OMP_WAIT_POLICY"].mend == "export OMP_WAIT_POLICY=passive" and found["ATEN_CPU_CAPABILITY"][1:3] == (
        "avx2",
        NOTE,
    )


# --- GPU and kernels ---------------------------------------------------------------------------------------------


def with_gpus(monkeypatch, *properties):
    monkeypatch.setattr(doctor, "gpus", lambda: ([torch.device("cuda", j) for j in range(len(properties))], ""))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    monkeypatch.setattr(torch.version, "cuda", "13.2")


def test_each_gpu_has_a_row_and_an_old_one_a_note(machine, monkeypatch):
    with_gpus(
        monkeypatch, Properties("NVIDIA H200", 150_110_011_392, 9, 0), Properties("Tesla T4", 15_828_320_256, 7, 5)
    )
    new, old = doctor.gpu()
    assert new == Finding("GPU 0", "NVIDIA H200, 139.8 GiB, sm_90", OK, "torch's build is for CUDA 13.2")
    assert old[:3] == ("GPU 1", "Tesla T4, 14.7 GiB, sm_75", NOTE) and "older than sm_80" in old.note


@pytest.mark.parametrize(
    "cuda, loaded, warned, variables, verdict, said",
    [
        (None, False, "", {}, OK, "torch's build is for CPUs"),
        ("13.2", False, "", {}, OK, "torch's build is for CUDA 13.2"),
        (None, True, "", {}, NOTE, "an NVIDIA driver is loaded, but torch's build is for CPUs"),
        ("13.2", True, "the driver is too old (found version 12020)", {}, NOTE, "loaded, but the driver is too old"),
        ("13.2", True, "", {"CUDA_VISIBLE_DEVICES": ""}, OK, "torch's build is for CUDA 13.2"),
    ],
)
def test_where_no_gpu_is_used_the_reason_is_told(machine, monkeypatch, cuda, loaded, warned, variables, verdict, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver", lambda: loaded)
    monkeypatch.setattr(doctor, "gpus", lambda: ([], warned))
    (row,) = doctor.gpu()
    assert row.verdict == verdict and said in row.note


@pytest.fixture
def verdicts(machine, monkeypatch):
    """The interpreter on the CPU stands for a GPU; returns a function that remembers a verdict there."""
    monkeypatch.setattr(doctor, "gpus", lambda: ([CPU, CPU], ""))  # two of one kind share their verdicts
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return lambda question, verdict: verified.save_verdict(
        verified.verdict_file(CPU), question, verdict, verified.environment_of(CPU)
    )


def test_remembered_verdicts_on_kernels_are_shown_and_a_wrong_one_is_wrong(verdicts):
    pytest.importorskip("triton")
    assert rows(doctor.kernels)["kernels"][1:3] == ("not yet used here", OK)
    verdicts("mlstm (K 64, V 64, bfloat16)", {"right": True, "errors": {"output 0": 1e-3, "gradient 3": 4e-3}})
    verdicts("window_attention (K 64, V 64, float32)", {"right": False, "errors": {"output 0": 0.25}})
    verdicts(
        "head_loss (M 8, float32)", {"right": False, "errors": {}, "reason": f"OSError: no ptxas in {Path.home()}/bin"}
    )
    found = rows(doctor.kernels)
    assert found["mlstm (K 64, V 64, bfloat16)"] == Finding(
        "mlstm (K 64, V 64, bfloat16)", "right", OK, "largest error 4.0e-03"
    )
    wrong = found["window_attention (K 64, V 64, float32)"]
    assert (
        wrong.verdict == WRONG
        and "largest error 2.5e-01" in wrong.note
        and wrong.mend.startswith("rm ~/verdicts/verdicts-")
    )
    assert "no ptxas in ~/bin" in found["head_loss (M 8, float32)"].note
    assert len(list(doctor.kernels())) == 4  # each once, and the interpreter


def test_a_gpu_without_triton_says_how_to_get_it(verdicts, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **more):
        if name == "triton":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    row = rows(doctor.kernels)["kernels"]
    assert row.verdict == MISSING and "pip install 'xlstm-hybrid[gpu]'" in row.note


def test_without_a_gpu_kernels_are_not_used(machine):
    assert list(doctor.kernels()) == [Finding("kernels", "not used", OK, "no GPU: the torch forms run")]


# --- folders and surroundings ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_wrong_and_its_variable_is_named(machine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "file/below"))
    row = rows(doctor.caches)["kernel verdicts"]
    assert row.verdict == WRONG and "Not a directory" in row.note and row.mend == "export XLSTM_KERNELS_CACHE=FOLDER"
    assert run().exit_code == 1


def test_looking_at_a_folder_leaves_nothing_there(tmp_path):
    assert unwritable(tmp_path / "not/yet/there") is None and list(tmp_path.iterdir()) == []


def test_little_space_is_noted(machine, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(10**12, 10**12, 7 * 10**8))
    row = rows(doctor.caches)["Hugging Face"]
    assert (row.verdict, row.note) == (NOTE, "only 0.7 GB free")


def test_the_folders_are_those_that_variables_name(machine, monkeypatch, tmp_path):
    for name in ("TRITON_CACHE_DIR", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {name: folder for name, (folder, _) in doctor.folders().items()}
    assert found["Triton"] == tmp_path / "TRITON_CACHE_DIR" and found["datasets"] == tmp_path / "HF_DATASETS_CACHE"
    assert found["hub downloads"] == tmp_path / "hub" and found["kernel verdicts"] == Path(
        os.environ["XLSTM_KERNELS_CACHE"]
    )
    machine.pop("triton")
    monkeypatch.delenv("HF_DATASETS_CACHE")
    assert set(doctor.folders()) == {"kernel verdicts", "Hugging Face", "hub downloads", "temporary files"}


@pytest.mark.parametrize(
    "offline, said", [(True, "offline: models and data sets come from the cache"), (False, "online")]
)
def test_whether_the_hub_is_asked_is_told_and_no_token_is(machine, monkeypatch, offline, said):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    row = rows(doctor.hub_settings)["Hugging Face Hub"]
    assert row.note.startswith(said) and f"HF_HUB_OFFLINE={int(offline)}" in row.found
    assert "hf_secret" not in run().output
