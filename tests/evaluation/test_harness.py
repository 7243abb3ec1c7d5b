"""lm-eval as the engine: our task files, suites, resumption, and results that `compare` reads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from xlstm_hybrid import convert
from xlstm_hybrid.checkpoint.files import read_json
from xlstm_hybrid.cli import app
from xlstm_hybrid.commands.harness import harness
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.errors import DataError, EvaluationError
from xlstm_hybrid.evaluation.comparison import compare, open_sides
from xlstm_hybrid.evaluation.harness import SUITES, Unit, expand
from xlstm_hybrid.evaluation.results import read_results
from xlstm_hybrid.evaluation.scores import exact_match
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.configuration import attention_reach
from xlstm_hybrid.planning.cache_size import filled_bytes

pytest.importorskip("lm_eval")
TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
ASKED = {"tasks": "domain_arithmetic,needle_400,recall_500", "limit": 6, "samples": 6, "device": "cpu"}
DEFAULTS = {
    "lengths": None,
    "depths": 10,
    "seed": 0,
    "haystack": None,
    "hops": None,
    "batch_size": 4,
    "max_length": None,
    "name": None,
    "include": None,
    "chat": False,
    "allow_code": False,
    "dtype": "float32",
    "revision": None,
    "redo": False,
}


def run(model, out, **options):
    harness(str(model), out=out, **{**DEFAULTS, **ASKED, **options})


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    out = tmp_path_factory.mktemp("harness") / "student"
    convert(TINY, out, sliding_window=32, num_sink_tokens=4)
    return out


@pytest.fixture(scope="module")
def evaluated(student, tmp_path_factory):
    """Folders of results of the tiny teacher and of its student."""
    folder = tmp_path_factory.mktemp("results")
    run(TINY, folder / "teacher")
    run(student, folder / "student", max_length=64)
    return folder


def test_the_score_of_a_domain_is_that_of_the_command_evaluate(evaluated):
    model, tokenizer = load(TINY, device="cpu")
    wanted = exact_match(model, tokenizer, tasks.test_examples("arithmetic", 200)[:6])
    found = read_results(evaluated / "teacher")[0]
    assert found.scores["domain_arithmetic"]["exact_match,none"] == pytest.approx(wanted.score) and wanted.score > 0.5
    assert sorted(found.samples["domain_arithmetic"]["exact_match,none"].values()) == sorted(
        float(s["correct"]) for s in wanted.samples
    )


def test_compare_reads_what_the_harness_wrote(evaluated):
    sides, every = (str(evaluated / "teacher"), [str(evaluated / "student")]), ASKED["tasks"].split(",")
    assert list(compare(*open_sides(*sides))["metrics"]) == ["domain_arithmetic"]  # the others are long-context tasks
    found = compare(*open_sides(*sides), tasks=every)
    assert found["metrics"] == dict.fromkeys(("domain_arithmetic", "needle_400", "recall_500"), "exact_match,none")
    assert (found["teacher"], list(found["students"])) == ("tiny-llama", ["student"]) and not found["differences"]
    # the samples of both sides belong together
    assert set(found["students"]["student"]["paired"]) == set(found["metrics"])


def test_nothing_of_a_long_prompt_is_cut_off(evaluated):
    """The student ran with a longest input of 64 tokens; a needle's context is read whole all the same."""
    rows = [json.loads(line) for line in next(evaluated.glob("student/needle_400/*/samples_*.jsonl")).open()]
    results = read_json(next(evaluated.glob("student/needle_400/*/results_*.json")), "")
    assert len(rows) == 6 and results["max_length"] == 400 + 16
    assert {row["doc"]["length"] for row in rows} == {400}


def test_recall_comes_with_coverage_excess_and_bytes(evaluated):
    student, teacher = (
        read_json(evaluated / side / "needle_400" / "harness.json", side) for side in ("student", "teacher")
    )
    found, score = student["long_context"], student["scores"]["needle_400"]["recall,none"]
    assert (found["window"], found["sinks"], found["coverage"]) == (32, 4, 36 / 400)
    assert (
        found["excess"] == pytest.approx((score - 0.09) / 0.91)
        and sum(part["answers"] for part in found["by_depth"]) == 6
    )
    full = teacher["long_context"]
    assert full["coverage"] == 1 and full["excess"] is None
    assert full["cache_bytes"] == 4 * 2 * 2 * 64 * 400 * 4  # layers, K and V, heads, width, tokens, float32
    longer = read_json(evaluated / "student" / "recall_500" / "harness.json", "")["long_context"]
    assert longer["cache_bytes"] == found["cache_bytes"]


def test_a_cache_of_a_student_counts_ring_sinks_and_state(student):
    model, _ = load(student, device="cpu")
    layers, heads, groups, width, slots = 4, 4, 2, 64, 32 + 4
    ring, state, count = 2 * groups * slots * width * 4, heads * (width * width + width + 1) * 4, 8
    cache = cache_of(model(torch.arange(3, 90)[None], use_cache=True))
    assert filled_bytes(cache) == layers * (ring + state + count)
    assert attention_reach(model.config) == (32, 4) and isinstance(
        cache_of(model(torch.ones(1, 1, dtype=torch.long))), DynamicCache
    )


def test_the_files_name_no_folder_of_this_machine(evaluated, student):
    for file in evaluated.rglob("*.json*"):
        text = file.read_text()
        assert str(TINY.parent) not in text and str(student.parent) not in text and str(evaluated) not in text, (
            file.name
        )
        assert "pretty_env_info" not in text


def test_finished_tasks_are_not_run_again_and_other_settings_are_refused(evaluated, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(evaluated / "teacher", tmp_path / "teacher")
    monkeypatch.setattr("xlstm_hybrid.evaluation.harness.load", lambda *a, **k: pytest.fail("the model was loaded"))
    run(TINY, out)
    printed = capsys.readouterr().out
    assert (
        "domain_arithmetic" in printed
        and "coverage 1.000  no excess: attention sees all  cache 1.638 MB at 400 tokens" in printed
    )
    with pytest.raises(EvaluationError, match="limit 6, now 5.*--redo"):
        run(TINY, out, limit=5)
    monkeypatch.undo()
    shutil.rmtree(out / "needle_400")
    before = next(out.glob("recall_500/*/results_*.json")).name
    run(TINY, out)
    kept = [read_json(folder / "needle_400/harness.json", "")["scores"] for folder in (evaluated / "teacher", out)]
    assert kept[0] == kept[1] and next(out.glob("recall_500/*/results_*.json")).name == before


def test_a_kill_before_the_end_leaves_no_results(evaluated, tmp_path, monkeypatch):
    from lm_eval.loggers import EvaluationTracker

    # lm-eval goes on when a disk is full
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *a: None)
    with pytest.raises(ValueError, match="0 of samples, expected 1 and|files of results and 0"):
        run(TINY, tmp_path / "out", tasks="domain_arithmetic", limit=1)
    assert not list((tmp_path / "out").iterdir())


def test_sampling_settings_and_penalties_of_a_checkpoint_have_no_part_in_a_score(evaluated, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "eos_token_id": 2})
    )
    run(model, tmp_path / "out", tasks="domain_arithmetic")
    files = (
        next((evaluated / "teacher").rglob("samples_domain_*.jsonl")),
        next((tmp_path / "out").rglob("samples_domain_*.jsonl")),
    )
    plain, other = ([json.loads(line)["resps"] for line in file.open()] for file in files)
    assert plain == other


def test_names_stand_for_suites_kinds_and_lengths():
    assert expand("needle,gsm8k", "1k,1500") == [
        Unit("needle_1k", kind="needle", length=1024),
        Unit("needle_1500", kind="needle", length=1500),
        Unit("gsm8k"),
    ]
    names = [u.name for u in expand("long_context")]
    assert len(names) == 32 and names[0] == "needle_1k" and names[-1] == "variables_128k"
    assert (
        expand("paper_base,paper_base") == SUITES["paper_base"]
        and {u.name: u.shots for u in SUITES["paper_base"]}["gsm8k"] == 8
    )
    for wrong, text in (("", "no task"), ("needle_x", "no length"), ("paper_base,paper_instruct", "humaneval_plus")):
        with pytest.raises(EvaluationError, match=text):
            expand(wrong)


def test_tasks_that_run_code_or_lack_their_data_are_refused(tmp_path):
    for name, line in (
        ("runs", "unsafe_code: true\ncustom_dataset: !function xlstm_hybrid.data.toy_domains.dataset"),
        ("lacks", "dataset_path: json\ndataset_kwargs: {data_files: nowhere.json}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\noutput_type: generate_until\ntest_split: test\ndoc_to_text: prompt\ndoc_to_target: answer\n{line}\n"
            "metadata: {version: 1.0, domain: code}\nmetric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
    with pytest.raises(EvaluationError, match="--allow-code"):
        run(TINY, tmp_path / "out", tasks="runs", include=tmp_path)
    with pytest.raises(EvaluationError, match="lacks: the task or its data cannot be read"):
        run(TINY, tmp_path / "out", tasks="lacks", include=tmp_path)


def test_the_command_is_on_the_command_line():
    result = CliRunner().invoke(app, ["harness", "--help"])
    assert result.exit_code == 0 and "--lengths" in result.output


def oracle(tokenizer, window):
    """A `generate` that reads the last `window` tokens of its prompt without error, and nothing else."""

    def answer(text):
        if city := re.search(r"what is the pass key of (\w+)\?", text):
            return re.findall(rf"The pass key of {city[1]} is (\d+)", text)
        if asked := re.search(r"what are the values of (.*)\?", text):
            held = dict(re.findall(r"(\w+) = (\d+)", text))
            return [held.get(key, "0") for key in asked[1].split(", ")]
        held, value = {}, re.findall(r"hold the value (\d+)", text)[-1]  # the example's is the first
        for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", text):
            held[name] = number or held.get(source)
        return [name for name, v in held.items() if v == value]

    def generate(input_ids, max_length, **_):
        texts = [
            " " + ", ".join(answer(tokenizer.decode(row[-window:], skip_special_tokens=True))) for row in input_ids
        ]
        said = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        assert max(map(len, said)) <= max_length - input_ids.shape[1]  # the budget holds the answer
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([s + [tokenizer.eos_token_id] * (width - len(s)) for s in said])], 1)

    return generate


@pytest.fixture
def with_oracle(monkeypatch):
    def patch(window):
        model, tokenizer = load(TINY, device="cpu")
        model.generate = oracle(tokenizer, window)
        monkeypatch.setattr("xlstm_hybrid.evaluation.harness.load", lambda *a, **k: (model, tokenizer))

    return patch


def test_a_model_that_remembers_all_scores_one_on_every_kind(with_oracle, tmp_path):
    with_oracle(10**6)
    run(TINY, tmp_path, tasks="long_context", lengths="900", limit=None, samples=4)
    for kind in ("needle", "multikey", "recall", "variables"):
        found = read_json(tmp_path / f"{kind}_900" / "harness.json", kind)
        assert (
            found["scores"][f"{kind}_900"]["exact_match,none"] == found["scores"][f"{kind}_900"]["recall,none"] == 1.0
        ), kind


def test_a_model_that_reads_a_window_only_scores_its_coverage(with_oracle, tmp_path, monkeypatch):
    with_oracle(800)
    monkeypatch.setattr("xlstm_hybrid.evaluation.harness.attention_reach", lambda config: (800, 0))
    run(TINY, tmp_path, tasks="needle_1600", limit=None, samples=20)
    found = read_json(tmp_path / "needle_1600" / "harness.json", "")["long_context"]
    assert found["coverage"] == 0.5 and abs(found["excess"]) < 0.2
    assert [part["recall"] for part in found["by_depth"] if part["to"] <= 0.5] == [0.0] * 5
    assert [part["recall"] for part in found["by_depth"] if part["from"] >= 0.6] == [1.0] * 4


def test_answers_are_hidden_in_a_text_of_ones_own_and_results_say_which(with_oracle, tmp_path):
    with_oracle(10**6)
    (tmp_path / "text").mkdir()
    file = tmp_path / "text/wall.jsonl"
    file.write_text(json.dumps({"text": " ".join(f"The wall has a stone of {n} marks." for n in range(400))}) + "\n")
    asked = {"tasks": "needle_600,variables_600", "limit": None, "samples": 2, "haystack": file, "hops": 2}
    run(TINY, tmp_path / "out", **asked)
    for kind in ("needle", "variables"):
        found = read_json(tmp_path / f"out/{kind}_600/harness.json", kind)
        assert found["settings"]["haystack"].startswith("wall.jsonl ") and found["scores"][f"{kind}_600"]
        assert found["long_context"]["recall"] == 1.0 and found["settings"].get("hops") == {"variables": 2}.get(kind)
        (samples,) = (tmp_path / f"out/{kind}_600").rglob("samples_*.jsonl")
        assert all("The wall has a stone of" in json.loads(line)["doc"]["prompt"] for line in samples.open())
    assert not [f.name for f in (tmp_path / "out").rglob("*.json*") if str(tmp_path) in f.read_text()]
    run(TINY, tmp_path / "out", **asked)  # the same text again is the same setting
    file.write_text(file.read_text() * 2)
    with pytest.raises(EvaluationError, match=r"needle_600: there are results with haystack 'wall.jsonl .*--redo"):
        run(TINY, tmp_path / "out", **asked)


def test_a_haystack_that_a_task_would_ignore_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_hybrid.evaluation.harness.load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "a.txt").write_text("A text.")
    for names, said in (
        ("needle_400,recall_500", "a.txt: recall_500; expected tasks that hide answers"),
        ("domain_code", "a.txt: no long-context task is asked for"),
    ):
        with pytest.raises(EvaluationError, match=said):
            run(TINY, tmp_path / "out", tasks=names, haystack=tmp_path / "a.txt")
    with pytest.raises(EvaluationError, match="hops=2: the links of a chain of the task variables"):
        run(TINY, tmp_path / "out", tasks="needle_400", hops=2)
    with pytest.raises(DataError, match="gone.txt: no such file"):
        run(TINY, tmp_path / "out", tasks="needle_400", haystack=tmp_path / "gone.txt")


def test_a_chat_template_is_added_around_a_whole_prompt_and_a_group_is_one_task(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/both.yaml").write_text(
        "group: both\ntask: [domain_code, domain_strings]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    )
    run(
        TINY,
        tmp_path / "out",
        tasks="both,needle_400",
        include=tmp_path / "tasks",
        chat=True,
        limit=2,
        name="mine",
        max_length=64,
    )
    found = read_results(tmp_path / "out")[0]
    assert (
        found.name == "mine"
        and set(found.scores) == {"both", "needle_400"}
        and len(found.samples["both"]["exact_match,none"]) == 4
    )
    row = json.loads(next((tmp_path / "out").glob("needle_400/mine/samples_*.jsonl")).read_text().splitlines()[0])
    prompt, tokenizer = row["arguments"]["gen_args_0"]["arg_0"], load(TINY, device="cpu")[1]
    results = read_json(next((tmp_path / "out").glob("needle_400/mine/results_*.json")), "")
    assert row["doc"]["prompt"] in prompt and results["chat_template_sha"]
    assert (
        len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) > 400
        and results["max_length"] >= len(tokenizer(prompt)["input_ids"]) + 16
    )


@pytest.mark.slow
def test_lm_eval_knows_every_task_of_the_suites():
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    units = [u for suite in ("paper_understanding", "paper_base", "paper_instruct") for u in SUITES[suite]]
    assert not [u.name for u in units if u.name not in index]
    parts = {u.name: index[u.name].cfg.get("task") for u in units if u.budget}
    leaves = [leaf for name, tasks in parts.items() for leaf in (tasks if isinstance(tasks, list) else [name])]
    assert {index[leaf].cfg["output_type"] for leaf in leaves} == {"generate_until"}  # others would take no budget


@pytest.mark.slow
def test_a_task_that_lm_eval_does_not_know_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no_such_task: lm-eval knows no such task"):
        run(TINY, tmp_path, tasks="no_such_task")
