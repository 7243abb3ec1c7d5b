"""`benchmarks/gpu.py`: all of it at tiny sizes on a CPU; its time, its failures and how it goes on; and with stand-ins what
only a GPU would run.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import gpu
import pytest
import torch
from gpu import Job, Part, run_parts
from light_parts import ends, process, sleeps

from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation.equivalence import Result

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes/tiny_teacher/tiny-llama"
GREEN = Result("a check", 0.0, 1.0, "float32", 0.0)


@pytest.fixture(autouse=True)
def same_bench(monkeypatch):
    monkeypatch.setattr(bench, "HERE", bench.HERE)


# --- all of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text, questions that the tiny teacher knows, and a task of one line."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("trl")
    from xlstm_hybrid.data import toy_domains

    folder = tmp_path_factory.mktemp("gpu")
    texts = [
        {"text": f"the cat number {n} sat on the mat and looked at {n + 1} birds for a while. " * 4} for n in range(9)
    ]
    asked = [{"prompt": example.prompt} for example in toy_domains.test_examples("arithmetic", 8)]
    task = {"question": "1 + 1 =", "answer": "2"}
    for name, rows in (("text.jsonl", texts), ("questions.jsonl", asked), ("sums.jsonl", [task, task])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks/sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(folder / "sums.jsonl") + "}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def whole(files):
    """What the script leaves: without the checks that `verify` and `efficiency` make, which have tests of their own."""
    out = files / "out"
    words = ["--tiny", "--out", str(out), "--teacher", str(TINY), "--text", str(files / "text.jsonl")]
    words += ["--questions", str(files / "questions.jsonl"), "--tasks", str(files / "tasks"), "--minutes", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xlstm_hybrid.pipeline.run.verify_checkpoint", lambda *_, **__: [GREEN])
        patch.setattr("xlstm_hybrid.evaluation.efficiency_pairs.checks", lambda *_, **__: [GREEN])
        patch.setattr("xlstm_hybrid.doctor.diagnose", lambda: {})
        patch.setattr(bench, "SEQUENCE", {k: bench.SEQUENCE[k] for k in ("sdpa", "window", "mlstm", "hybrid", "layer")})
        patch.setattr(bench, "HERE", bench.HERE)
        found = gpu.main(words, launch=gpu.outcome)
    return SimpleNamespace(out=out, found=found, words=words)


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes(whole):
    wrong = {name: part for name, part in whole.found.items() if part["state"] != "done"}
    assert not wrong and list(whole.found) == [part.name for part in gpu.PARTS]
    results = {name: part["result"] for name, part in whole.found.items()}
    assert results["answers"]["questions"] == 8 and results["teacher"]["parameters"] == 2885888
    assert results["align"]["tokens"] == results["distill"]["tokens"] == 2 * 2 * 96
    for name in ("converted", "aligned", "student"):
        assert results["evaluation"]["students"][name]["kl"].keys() >= {"text", "text/text"}
    assert set(results["needles"]) >= {"student", "teacher"} and "needle_256" in results["needles"]["summary"]
    assert "C_0" in results["tasks"]["summary"]
    assert {row["operation"] for row in results["kernel bench"]["rows"]} == {"sequence", "decode"}
    assert [row["length"] for row in results["llama-3.1-8b"]["rows"]] == [64, 96]
    assert "prefill" not in results["llama-3.1-8b"]["rows"][1] and "decode" in results["llama-3.1-8b"]["rows"][1]


@pytest.mark.slow
def test_one_file_has_everything_and_the_students_are_small(whole):
    from xlstm_hybrid.conversion.load import load_model

    content = json.loads((whole.out / "gpu.json").read_text())
    assert content["parts"].keys() == whole.found.keys() and content["commit"] and content["settings"]["tiny"]
    assert {"machine", "versions"} <= content["parts"]["machine"]["result"].keys()
    for name in ("aligned", "student"):
        assert (whole.out / "students" / name / "manifest.json").is_file()
        config = json.loads((whole.out / "students" / name / "config.json").read_text())
        assert config["dtype"] == "bfloat16" and load_model(whole.out / "students" / name, "bfloat16") is not None


@pytest.mark.slow
def test_the_same_command_runs_nothing_twice_and_goes_on_with_what_failed(whole, capsys):
    def never(run, job):
        pytest.fail(f"{job.file.stem} ran again")

    assert gpu.main(whole.words, launch=never) == whole.found
    file = whole.out / "parts/checkpoints.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | {"state": "failed"}))
    ran = []
    again = gpu.main(whole.words, launch=lambda run, job: ran.append(job.file.stem) or gpu.outcome(run, job))
    assert ran == ["checkpoints"] and again["checkpoints"]["state"] == "done"
    assert "evaluation: kept from an earlier run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_another_teacher_is_refused(whole):
    words = [word.replace("tiny-llama", "other") for word in whole.words]
    with pytest.raises(
        ConfigError, match="out was begun otherwise: teacher was 'tiny-llama', is 'other'; name another"
    ):
        gpu.main(words, launch=gpu.outcome)


# --- time, failures ------------------------------------------------------------------------------------------------


def settings(out, minutes=8.0):
    named = {"teacher": None, "join": None, "digest": None, "text": None, "questions": None, "tasks": None}
    return SimpleNamespace(out=out, minutes=minutes, tiny=True, recipe="smoke", limit=1, source=None, **named)


class Clock:
    """Time that only passes while a part runs."""

    def __init__(self, **takes):
        self.now, self.takes, self.given = 0.0, takes, {}

    def __call__(self):
        return self.now

    def launch(self, run, job):
        name = job.file.stem
        self.given[name] = job.seconds
        self.now += self.takes.get(name, 0.0)
        return gpu.outcome(run, job)


def works(job):
    return {"summary": "it works"}


def breaks(job):
    job.keep({"half": 1})
    raise EvaluationError("no figures")


def test_a_part_gets_what_later_parts_do_not_need_and_none_begins_that_no_longer_fits(tmp_path):
    parts = [Part("a", works, 100, 10), Part("b", works, 30, 10), Part("c", works, 30, 20), Part("d", works, 5, 1)]
    clock = Clock(a=50, b=5, c=1)
    found = run_parts(parts, settings(tmp_path, 70 / 60), clock.launch, clock)
    assert clock.given == {"a": 70 - 31, "b": 10, "d": 5}, (
        "a leaves what b, c and d need; then c has 15 s, and needs 20"
    )
    assert found["c"]["state"] == "left out"
    assert found["c"]["error"] == "15 s are left, it needs 20; the same command goes on with it"
    clock = Clock()
    again = run_parts(parts, settings(tmp_path, 1), clock.launch, clock)
    assert clock.given == {"c": 30} and [part["state"] for part in again.values()] == ["done"] * 4


def test_a_failure_is_kept_by_name_and_stops_only_what_needs_it(tmp_path):
    parts = [Part("a", breaks, 9, 1), Part("b", works, 9, 1, needs=("a",)), Part("c", works, 9, 1)]
    parts.append(Part("d", works, 9, 1, wants=("source", "tasks")))
    clock = Clock()
    found = run_parts(parts, settings(tmp_path), clock.launch, clock)
    assert found["a"]["state"] == "failed" and found["a"]["error"] == "EvaluationError: no figures"
    assert found["a"]["result"] == {"half": 1} and "in breaks" in found["a"]["trace"]
    assert found["b"]["error"] == "it needs a (failed)" and found["c"]["result"] == {"summary": "it works"}
    assert found["d"]["error"] == "without --teacher or --join, --tasks"
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"] == found


def test_what_is_written_before_a_kill_is_there(tmp_path):
    def killed(run, job):
        raise KeyboardInterrupt

    parts = [Part("a", works, 9, 1), Part("b", works, 9, 1)]
    clock = Clock()
    launch = iter([clock.launch, killed])
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, settings(tmp_path), lambda run, job: next(launch)(run, job), clock)
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["a"]["result"] == {"summary": "it works"}


def test_a_part_that_overruns_or_dies_ends_its_own_process_only(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    beside, job = gpu.Beside(), lambda name, seconds=60: Job(settings(tmp_path), tmp_path / f"{name}.json", seconds)
    try:
        first = beside(process, job("first"))["result"]["pid"]
        assert beside(process, job("second"))["result"]["pid"] == first != os.getpid()
        late = beside(sleeps, job("late", 1))
        assert late["state"] == "out of time" and late["result"] == {"half": 1}
        gone = beside(ends, job("gone"))
        assert gone["state"] == "failed" and gone["error"] == "its process ended by itself, exit code 7"
        assert beside(process, job("third"))["result"]["pid"] not in (first, os.getpid())
    finally:
        beside.close(wait=3)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


# --- what only a GPU runs, with stand-ins --------------------------------------------------------------------------


class OnGPU(Job):
    device = torch.device("cuda")


def test_kernels_are_checked_in_both_dtypes_and_a_wrong_one_is_named(tmp_path, monkeypatch):
    asked = []

    def check(device, dtype, **dims):
        asked.append((device.type, dtype, dims))
        return {"h": 1e-2}  # right in bfloat16, wrong in float32

    job = OnGPU(settings(tmp_path), tmp_path / "checks.json", 60)
    kernel = SimpleNamespace(name="mlstm", check=check)
    monkeypatch.setattr(gpu, "kernel_cases", lambda: [(kernel, {"K": 64, "V": 64})])
    found = gpu.outcome(gpu.kernel_checks, job)
    assert found["state"] == "failed" and "1 of 2 kernels are wrong" in found["error"]
    assert "mlstm, K 64, V 64, float32" in found["error"]
    assert found["result"]["mlstm, K 64, V 64, bfloat16"]["right"]
    assert asked == [("cuda", dtype, {"K": 64, "V": 64}) for dtype in (torch.bfloat16, torch.float32)]


def test_the_cases_are_all_kernels_that_auto_may_choose():
    names = {kernel.name for kernel, dims in gpu.kernel_cases() if all(dims[d] <= kernel.largest[d] for d in dims)}
    assert names == {"mlstm", "window_attention", "hybrid_step", "head_loss", "slstm"}


def test_on_a_gpu_parity_and_bench_take_the_real_shapes_and_a_red_check_leaves_no_figure(tmp_path, monkeypatch):
    args, calls = settings(tmp_path), []
    args.tiny = False
    job = OnGPU(args, tmp_path / "p.json", 60)
    monkeypatch.setattr(bench, "check", lambda d, T: calls.append((bench.HERE.dtype, d, T)) or {"mlstm": 1e-3})
    found = gpu.kernel_parity(job)
    assert calls == [(dtype, d, 2048) for dtype in (torch.bfloat16, torch.float32) for d in (64, 128)]
    assert found["summary"] == "largest error against float64 1.0e-03" and bench.HERE.H == 16

    def row(what, T, d):
        calls.append((what, T, d))
        return {"operation": what, "pass": "step", "T": T, "d": d, "ms": {"sdpa": 1.0}, "ratio": {"sdpa": 1.0}}

    calls.clear()
    monkeypatch.setattr(bench, "surroundings", dict)
    monkeypatch.setattr(bench, "bench_sequence", lambda T, d, seconds, skip, absent: [row(f"skips {len(skip)}", T, d)])
    monkeypatch.setattr(bench, "bench_decode", lambda N, d, *_: [row("decode", N, d)])
    job.begin = time.monotonic()
    assert gpu.kernel_bench(job)["summary"] == "9 rows, 0 of 0 targets met"
    assert calls[0] == ("skips 2", 8192, 128) and calls[-1] == (f"skips {len(bench.SEQUENCE) - 3}", 8192, 128)

    def red(d, T):
        raise SystemExit("d=64: no numbers, because these are wrong")

    monkeypatch.setattr(bench, "check", red)
    parts = [part for part in gpu.PARTS if part.name.startswith("kernel") and "checks" not in part.name]
    parts.insert(0, Part("kernel checks", works, 9, 1))
    found = run_parts(parts, args, lambda run, job: gpu.outcome(run, OnGPU(job.args, job.file, job.seconds)))
    assert found["kernel parity"]["error"] == "SystemExit: d=64: no numbers, because these are wrong"
    assert found["kernel bench"] == found["kernel bench"] | {
        "state": "left out",
        "error": "it needs kernel parity (failed)",
    }


def test_on_a_gpu_the_published_shapes_are_measured_in_bfloat16_without_memory_apart(tmp_path, monkeypatch):
    args, asked = settings(tmp_path), {}
    args.tiny = False
    monkeypatch.setattr(
        "xlstm_hybrid.evaluation.efficiency.measure_pair",
        lambda student, teacher, settings, checks, **how: (
            asked.update(load=student.load.keywords, settings=settings, how=how)
            or {"checks": [1], "rows": [{"length": 16384, "prefill": {"gain": {"seconds": 2.0}}}]}
        ),
    )
    found = gpu.shape("qwen2.5-7b", OnGPU(args, tmp_path / "s.json", 60))
    assert found["summary"] == "1 checks; 16k read 2.00x" and asked["load"] == {"dtype": "bfloat16", "device": "cuda"}
    assert asked["settings"].lengths == (16384, 65536) and asked["settings"].contexts == (131072,)
    assert asked["how"]["memory"] is False


# --- a teacher in pieces, and the number of steps ------------------------------------------------------------------


def test_pieces_become_the_file_that_the_digest_names(tmp_path):
    (tmp_path / "a").write_bytes(b"GGUF and ")
    (tmp_path / "b").write_bytes(b"the rest")
    digest, out = hashlib.sha256(b"GGUF and the rest").hexdigest(), tmp_path / "w/teacher.gguf"
    assert gpu.join([tmp_path / "a", tmp_path / "b"], digest, out).read_bytes() == b"GGUF and the rest"
    with pytest.raises(CheckpointError, match="b, a: joined, their SHA-256 is .*name all parts, in order"):
        gpu.join([tmp_path / "b", tmp_path / "a"], digest, tmp_path / "w/other.gguf")
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["teacher.gguf"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--join", "a", "b"], "needs --digest"),
        (["--join", "a", "--digest", "0", "--teacher", "t"], "in the place of --teacher"),
        (["--only", "bench"], "--only bench: expected some of machine, kernel checks"),
    ],
)
def test_what_makes_no_sense_is_named(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.arguments(["--out", str(tmp_path), *words])
    assert said in capsys.readouterr().err
