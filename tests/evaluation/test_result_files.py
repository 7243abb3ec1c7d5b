"""What lm-eval 0.4.2 to 0.4.13 writes is read with its samples; settings that can change a score are compared, and
nothing else; one model is told from another.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.comparison import compare, open_sides
from xlstm_hybrid.evaluation.results import read_results

DATE = "2026-01-02T03-04-05.678901"
N = 12  # documents
# how a version writes: name of the file of results, of the samples of a task, and what is recorded
LAYOUTS = {
    "0.4.2": ("results.json", "pretrained__org__m{known},dtype__float32_{task}.jsonl", "oldest"),
    "0.4.2, a file": ("mine.json", "pretrained__org__m{known},dtype__float32_{task}.jsonl", "oldest"),
    "0.4.3": ("org__m{known}/results_{date}.json", "org__m{known}/samples_{task}_{date}.jsonl", "old"),
    "0.4.5, a file": ("x.json/org__m/results_{date}.json", "x.json/org__m/samples_{task}_{date}.jsonl", "old"),
    "0.4.8": ("org__m{known}/results_{date}.json", "org__m{known}/samples_{task}_{date}.jsonl", "text"),
    "0.4.9, a file": ("x_{date}.json", "samples_{task}_{date}.jsonl", "text"),
    "0.4.13": ("org__m{known}/results_{date}.json", "org__m{known}/samples_{task}_{date}.jsonl", "new"),
    "0.4.13, in Python": ("results.json", None, "python"),
}


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def written(folder, layout, known, date=DATE, **changes):
    """Results and samples of a model that knows the first `known` answers, strictly, and one more in looser form: a task
    of generation with two filters, and one of choices. `changes` replace parts of the results file.
    """
    results_name, samples_name, kind = LAYOUTS[layout]
    filters = [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "loose", "filter": [{"function": "regex"}]},
    ]
    generation = {"max_gen_toks": 4, "until": ["\n"], "do_sample": False}
    common = {"output_type": "multiple_choice", "repeats": 1, "num_fewshot": 0, "doc_to_text": "{{q}}"}
    configs = {"choice": common, "say": common | {"output_type": "generate_until", "filter_list": filters}}
    configs["say"]["generation_kwargs"] = generation
    right = {"say": {"strict": known, "loose": known + 1}, "choice": {"none": known}}
    metric = {"say": "exact_match", "choice": "acc"}
    scores = {t: {f"{metric[t]},{f}": n / N for f, n in kinds.items()} for t, kinds in right.items()}
    arguments = f"pretrained=org/m{known},dtype=float32"
    content = {
        "results": {t: {"alias": t, **s, **{k.replace(",", "_stderr,"): "N/A" for k in s}} for t, s in scores.items()},
        "configs": configs,
        "versions": {"say": 2.0, "choice": 1.0},
        "n-shot": {"say": 0, "choice": 0},
        "config": {"model": "hf", "model_args": arguments, "limit": None, "gen_kwargs": None, "batch_size": 1},
        "date": 1.7e9,
    }
    if kind != "oldest":
        content["higher_is_better"] = {"say": {"exact_match": True}, "choice": {"acc": True}}
        content["n-samples"] = {t: {"original": N, "effective": N} for t in right}
        content["config"] |= {"fewshot_seed": 1234, "torch_seed": 1234, "model_dtype": "torch.float32"}
        content |= {"model_name": f"org/m{known}", "chat_template_sha": None, "system_instruction_sha": None}
        content |= {"fewshot_as_multiturn": False, "task_hashes": {}}
    if kind == "new":
        content["config"] |= {"model_args": {"pretrained": f"org/m{known}", "dtype": "float32"}, "gen_kwargs": {}}
        content |= {"fewshot_as_multiturn": None, "max_length": 2048, "lm_eval_version": "0.4.13"}
    if kind == "python":
        content = {key: value for key, value in content.items() if "sha" not in key and "multiturn" not in key}
        content["versions"] = {"say": "2.0", "choice": 1}
    samples = {}
    for task, kinds in right.items():
        samples[task] = []
        for name, number in kinds.items():
            for j in range(N):
                document = {"n": j, "q": f"say ü{j}"}
                prompts = [[document["q"], " yes"], [document["q"], " no"]][: 1 if task == "say" else 2]
                row = {
                    "doc_id": j,
                    "doc": document,
                    "target": "t",
                    "arguments": prompts,
                    "resps": [],
                    "filtered_resps": [],
                }
                if kind not in ("oldest", "python"):
                    row["arguments"] = {f"gen_args_{n}": {"arg_0": a, "arg_1": b} for n, (a, b) in enumerate(prompts)}
                if kind not in ("oldest", "old"):
                    row |= {"filter": name, "metrics": [metric[task]]}
                if kind != "oldest":
                    row |= {"doc_hash": sha(json.dumps(document, indent=2, ensure_ascii=False))}
                    row |= {"prompt_hash": sha(document["q"]), "target_hash": sha("t")}
                samples[task].append(row | {metric[task]: float(j < number)})
    names = {"known": known, "date": date}
    file = folder / results_name.format(**names)
    file.parent.mkdir(parents=True, exist_ok=True)
    if samples_name is None:
        content["samples"] = samples
    for task, rows in samples.items() if samples_name else ():
        text = json.dumps(rows, indent=2) if kind == "oldest" else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / samples_name.format(task=task, **names)).write_text(text, encoding="utf-8")
    for task, config in changes.pop("configs", {}).items():
        configs[task] = {key: value for key, value in (configs[task] | config).items() if value is not None}
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and key in content else value
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def compared(teacher, student, **settings):
    found = compare(*open_sides(f"teacher={teacher}", [f"student={student}"]), resamples=50, **settings)
    return found["students"]["student"], found


# --- versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_of_every_version_are_paired_with_those_of_the_newest(layout, tmp_path):
    file = written(tmp_path / "t", layout, known=9)
    student = written(tmp_path / "s", "0.4.13", known=6)
    folder = file if layout == "0.4.2, a file" else tmp_path / "t"
    for path in {file, folder}:
        verdict, found = compared(path, student)
        assert found["metrics"] == {"say": "exact_match,strict", "choice": "acc,none"}
        assert {t: (p["documents"], p["gained"], p["lost"]) for t, p in verdict["paired"].items()} == {
            "say": (N, 0, 3),
            "choice": (N, 0, 3),
        }
        assert verdict["recovery"]["say"] == pytest.approx(6 / 9) and not found["differences"]
        verdict, _ = compared(path, student, metrics={"say": "exact_match,loose"})
        assert verdict["paired"]["say"]["lost"] == 3 and verdict["recovery"]["say"] == pytest.approx(7 / 10)
    assert read_results(folder)[0].name == "m9"


def test_samples_without_a_filter_that_fit_none_are_named_and_not_said_to_be_missing(tmp_path):
    teacher, student = (written(tmp_path / name, "0.4.3", known=known) for name, known in (("t", 9), ("s", 6)))
    file = next(teacher.parent.glob("samples_say_*"))
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:N]), encoding="utf-8")
    verdict, found = compared(teacher, student)
    assert set(verdict["paired"]) == {"choice"}
    assert (
        "no paired statistics of say: the samples of teacher cannot be used: they name no filter, and 1 of them per "
        "document do not fit the filters strict, loose" in found["notes"]
    )


def test_samples_of_another_date_and_samples_without_the_metric_are_said_to_be_there(tmp_path):
    teacher, student = (written(tmp_path / name, "0.4.13", known=known) for name, known in (("t", 9), ("s", 6)))
    file = next(teacher.parent.glob("samples_say_*"))
    file.rename(file.with_name("samples_say_2025-01-01T00-00-00.0.jsonl"))
    file = next(student.parent.glob("samples_choice_*"))
    file.write_text(file.read_text(encoding="utf-8").replace('"acc": 1.0', '"acc": [1]'), encoding="utf-8")
    notes = compared(teacher, student)[1]["notes"]
    assert any(
        "say: the samples of teacher cannot be used: samples_say_*.jsonl in its folder have another" in n for n in notes
    )
    assert "no paired statistics of choice: student came without samples" not in notes
    assert any("choice: the samples of student hold no number per document for acc,none" in n for n in notes)


def test_a_group_of_an_old_version_and_its_tasks_in_a_new_one_have_those_in_common(tmp_path):
    groups = {"pair": {"alias": "pair", "acc,none": 9 / N}}
    old = {"groups": groups, "results": groups, "group_subtasks": {"pair": ["choice"], "choice": []}}
    teacher, student = written(tmp_path / "t", "0.4.2", 9, **old), written(tmp_path / "s", "0.4.13", 6)
    assert set(read_results(teacher)[0].scores) == {"pair", "say"}
    with pytest.raises(EvaluationError, match="1 reasons .* pair has no score of student"):
        compared(teacher, student)
    verdict, found = compared(teacher, student, common=True)
    assert (
        verdict["scores"] == {"say": 0.5, "choice": 0.5} and "left out: pair has no score of student" in found["notes"]
    )
    assert compared(teacher, student, tasks=["choice"])[0]["paired"]["choice"]["lost"] == 3


def test_a_runs_folder_is_its_own_results_whatever_the_harness_wrote_below_it(tmp_path):
    for side, known in (("teacher", 9), ("student", 6)):
        written(tmp_path / "evaluation" / "harness" / side, "0.4.13", known)
    run = {"teacher_scores": {"exact_match": {"code": 0.5}}, "students": {"student": {"exact_match": {"code": 0.25}}}}
    (tmp_path / "results.json").write_text(json.dumps(run))
    assert [(side.name, side.scores) for side in read_results(tmp_path)] == [
        ("teacher", {"code": {"exact_match": 0.5}}),
        ("student", {"code": {"exact_match": 0.25}}),
    ]


def test_a_folder_without_results_says_what_is_there(tmp_path):
    written(tmp_path, "0.4.2, a file", 9)
    with pytest.raises(
        EvaluationError, match=r"no results_\*.json of lm-eval .* there are mine.json: name one of them"
    ):
        read_results(tmp_path)


def test_the_metric_of_a_group_does_not_depend_on_the_order_in_which_it_was_written(tmp_path):
    scores = {"exact_match,loose": 10 / N, "exact_match,strict": 9 / N}
    teacher = written(tmp_path / "t", "0.4.13", 9, results={"say": scores})
    assert compared(teacher, written(tmp_path / "s", "0.4.13", 6))[1]["metrics"]["say"] == "exact_match,strict"


# --- settings --------------------------------------------------------------------------------------------------

UNSET = {"absent": "absent", "null": None, "empty": {}, "text": "", "None": "None"}


@pytest.mark.parametrize("spelling", UNSET)
def test_not_set_is_one_setting_however_it_is_recorded(spelling, tmp_path):
    file = written(tmp_path / "t", "0.4.8", 9)
    content = json.loads(file.read_text())
    if (value := UNSET[spelling]) == "absent":
        del content["config"]["gen_kwargs"], content["configs"]["say"]["generation_kwargs"]
        del content["fewshot_as_multiturn"], content["chat_template_sha"], content["system_instruction_sha"]
    else:
        del content["configs"]["say"]["generation_kwargs"]
        content["config"]["gen_kwargs"] = value
        content |= {"fewshot_as_multiturn": True, "chat_template": value or None, "system_instruction": value or None}
    file.write_text(json.dumps(content))
    verdict, found = compared(file, written(tmp_path / "s", "0.4.13", 6, configs={"say": {"generation_kwargs": None}}))
    assert set(verdict["paired"]) == {"say", "choice"} and found["differences"] == []


SAME = {
    "generation as text": {"config": {"gen_kwargs": "max_gen_toks=4,do_sample=False"}},
    "other names and spellings": {
        "configs": {
            "say": {"generation_kwargs": {"max_new_tokens": "4", "until": "\n", "temperature": 0.0, "top_p": 0.9}}
        }
    },
    "batch size and device": {"config": {"batch_size": "auto", "device": "cuda:3"}},
    "turns without examples": {"chat_template_sha": None, "fewshot_as_multiturn": True},
    "version as text": {"versions": {"say": "2", "choice": "1.0"}},
    "another seed of examples, the same prompts": {"config": {"fewshot_seed": 7}, "n-shot": {"say": 5, "choice": 5}},
    "a limit beyond the documents": {"config": {"limit": 500.0}},
    "a seed of a greedy generation": {"config": {"torch_seed": 7}},
    "gen_kwargs that the task has": {"config": {"gen_kwargs": {"max_gen_toks": 4}}},
    "a longest input that no document reaches": {"max_length": 128},
    "a target that is a function": {"configs": {"choice": {"doc_to_target": "<function f at 0x7f01>"}}},
}


@pytest.mark.parametrize("case", SAME)
def test_what_cannot_change_a_score_is_no_difference(case, tmp_path):
    changes = SAME[case]
    shots = {"n-shot": {"say": 5, "choice": 5}} if "n-shot" in changes else {}
    teacher = written(tmp_path / "t", "0.4.13", 9, **changes)
    verdict, found = compared(teacher, written(tmp_path / "s", "0.4.13", 6, **shots))
    assert len(verdict["paired"]) == 2 and found["differences"] == found["notes"] == []


CHAT = {"chat_template_sha": "abc"}
OTHER = {  # what is changed on both sides, on the teacher's only, and what is said
    "shots": ({}, {"n-shot": {"say": 4}}, "say: shots 4 for teacher, 0 for student"),
    "documents": ({}, {"n-samples": {"say": {"effective": 6}}}, "say: documents 6 for teacher, 12 for student"),
    "version": ({}, {"versions": {"say": 3}}, "say: version {'say': 3} for teacher, {'say': 2.0} for student"),
    "chat_template": ({}, CHAT, "say: chat_template 'abc' for teacher, None for student"),
    "system_instruction": (
        {"system_instruction_sha": "x"},
        {"system_instruction_sha": "y"},
        "say: system_instruction 'y' for teacher, 'x' for student",
    ),
    "multiturn": (
        {**CHAT, "fewshot_as_multiturn": False, "n-shot": {"say": 5, "choice": 0}},
        {"fewshot_as_multiturn": True},
        "1 reasons .* say: multiturn True for teacher, False for student",  # without examples there are no turns
    ),
    "generation": (
        {},
        {"configs": {"say": {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 8}}}},
        "say: generation {'say': {'max_gen_toks': 8}} for teacher",
    ),
    "gen_kwargs": (
        {"configs": {"say": {"generation_kwargs": None}}},
        {"config": {"gen_kwargs": "temperature=0.7,do_sample=true"}},
        "1 reasons .* say: gen_kwargs {'temperature': 0.7, 'do_sample': True} for teacher, None for student",
    ),
    "sampling_seed": (
        {"configs": {"say": {"generation_kwargs": {"do_sample": True, "temperature": 0.7}}}},
        {"config": {"torch_seed": 5}},
        "1 reasons .* say: sampling_seed 5 for teacher, 1234 for student",
    ),
    "filters": (
        {"configs": {"say": {"filter_list": [{"name": "strict", "filter": [{"function": "a"}]}]}}},
        {"configs": {"say": {"filter_list": [{"name": "strict", "filter": [{"function": "b"}]}]}}},
        "say: filters {'say': {'strict': ",
    ),
    "task": (
        {"configs": {"say": {"repeats": 1}}},
        {"configs": {"say": {"repeats": 4}}},
        "1 reasons .* say: task {'say': {'repeats': 4}} for teacher, {'say': {'repeats': 1}} for student",
    ),
    "dtype": ({}, {"config": {"model_dtype": "torch.bfloat16"}}, "say: dtype 'bfloat16' for teacher, 'float32' for"),
    "max_length": ({}, {"max_length": 10}, "choice: max_length 10 for teacher, 2048 for student"),
}


@pytest.mark.parametrize("case", OTHER)
def test_settings_that_can_change_a_score_are_refused_and_may_be_allowed(case, tmp_path):
    both, changes, message = OTHER[case]
    teacher = written(tmp_path / "t", "0.4.13", 9, **both | changes)
    student = written(tmp_path / "s", "0.4.13", 6, **both)
    pattern = message.translate({ord(c): f"\\{c}" for c in "{}[]()"})
    with pytest.raises(EvaluationError, match=pattern):
        compared(teacher, student)
    assert all(f": {case} " in text for text in compared(teacher, student, allow=[case])[1]["differences"])


@pytest.mark.parametrize("case", ["limit", "fewshot_seed", "prompts"])
def test_without_samples_a_limit_a_seed_of_examples_and_the_text_of_a_task_count(case, tmp_path):
    changes = {
        "limit": {"config": {"limit": 5}},
        "fewshot_seed": {"config": {"fewshot_seed": 7}},
        "prompts": {"configs": {"say": {"doc_to_text": "{{q}} now"}}},
    }[case]
    shots = {"n-shot": {"say": 5, "choice": 5}}
    files = written(tmp_path / "t", "0.4.13", 9, **shots, **changes), written(tmp_path / "s", "0.4.13", 6, **shots)
    if case != "limit":
        compared(*files)  # the prompts are the same, whatever was to draw or to write them
    for file in files:
        content = json.loads(file.read_text())
        del content["n-samples"]
        file.write_text(json.dumps(content))
        for samples in file.parent.glob("samples_*"):
            samples.unlink()
    with pytest.raises(EvaluationError, match=f"say: {case} .* for teacher, .* for student"):
        compared(*files)


def test_only_the_filter_that_is_compared_counts_and_not_where_its_function_lies(tmp_path):
    def with_filters(name, known, place, loose):
        strict = {"name": "strict", "filter": [{"function": f"<function cut at {place}>"}]}
        filters = [strict, {"name": "loose", "filter": [{"function": loose}]}]
        return written(tmp_path / name, "0.4.13", known, configs={"say": {"filter_list": filters}})

    teacher, student = with_filters("t", 9, "0x7f01", "words"), with_filters("s", 6, "0x9a0b", "digits")
    assert compared(teacher, student)[1]["differences"] == []
    with pytest.raises(EvaluationError, match="1 reasons .* say: filters"):
        compared(teacher, student, metrics={"say": "exact_match,loose"})


def test_what_one_side_does_not_record_is_noted_and_no_difference(tmp_path):
    student = written(tmp_path / "s", "0.4.13", 6, chat_template_sha="abc")
    _, found = compared(written(tmp_path / "t", "0.4.2", 9), student)
    assert found["notes"] == ["not recorded for teacher and taken to be as for student: chat_template, max_length"]


# --- which model -----------------------------------------------------------------------------------------------


def two_runs(folder, first, second, **recorded):
    """A folder with the results of two runs, a benchmark each, with these arguments of the model."""
    for number, arguments in enumerate((first, second)):
        date = f"2026-01-0{number + 1}T00-00-00.000001"
        config = {"model_args": arguments, **recorded.get(f"run{number}", {})}
        file = written(folder, "0.4.13", 9, date=date, config=config, model_name="x/m9")
        content = json.loads(file.read_text())
        for key in ("results", "configs", "n-shot", "versions", "n-samples", "higher_is_better"):
            content[key] = {task: value for task, value in content[key].items() if (task == "say") == (number == 0)}
        file.write_text(json.dumps(content))
    return folder


ONE_MODEL = {
    "text and table": ("pretrained=x/m9,dtype=float32", {"pretrained": "x/m9", "dtype": "float32"}),
    "how it is run": ("pretrained=x/m9,device=cuda,parallelize=True", {"pretrained": "x/m9", "batch_size": 4}),
    "the usual revision": ("pretrained=x/m9,revision=main", {"pretrained": "x/m9", "load_in_4bit": False}),
    "order and blanks": ("pretrained=x/m9,peft=a/b", "peft=a/b, pretrained=x/m9"),
    "unset arguments": ("pretrained=x/m9,peft=None,delta=", {"pretrained": "x/m9", "peft": None}),
    "longest input and dtype": ("pretrained=x/m9,max_length=64", "pretrained=x/m9,dtype=bfloat16"),
}


@pytest.mark.parametrize("case", ONE_MODEL)
def test_runs_of_one_model_in_one_folder_are_put_together(case, tmp_path):
    (found,) = read_results(two_runs(tmp_path, *ONE_MODEL[case]))
    assert set(found.scores) == {"say", "choice"} and found.notes == []


TWO_MODELS = {
    "an adapter": ("pretrained=x/m9", "pretrained=x/m9,peft=me/lora", r"m9, m9 \(peft=me/lora\)"),
    "deltas": ("pretrained=x/m9,delta=a", "pretrained=x/m9,delta=b", r"m9 \(delta=a\), m9 \(delta=b\)"),
    "a revision": ("pretrained=x/m9", {"pretrained": "x/m9", "revision": "step1"}, r"m9, m9 \(revision=step1\)"),
    "quantisation": ("pretrained=x/m9", "pretrained=x/m9,load_in_4bit=True", "load_in_4bit=True"),
    "thinking": ("pretrained=x/m9,enable_thinking=False", "pretrained=x/m9", "enable_thinking=False"),
    "generation": ("pretrained=x/m9", "pretrained=x/m9,temperature=0.7", "temperature=0.7"),
    "folders of one name": ("pretrained=/a/m9", "pretrained=/b/m9", r"pretrained=/a/m9\), m9 \(pretrained=/b/m9"),
}


@pytest.mark.parametrize("case", TWO_MODELS)
def test_runs_of_models_that_differ_in_an_argument_are_not_put_together(case, tmp_path):
    first, second, names = TWO_MODELS[case]
    with pytest.raises(EvaluationError, match=f"results of 2 models .*{names}.*name the folder or the file of one"):
        read_results(two_runs(tmp_path, first, second))


def test_a_hub_id_whose_weights_were_replaced_between_two_runs_is_two_models(tmp_path):
    commits = {"run0": {"model_sha": "aaa"}, "run1": {"model_sha": "bbb"}}
    with pytest.raises(EvaluationError, match=r"2 models \(m9 \(model_sha=aaa\), m9 \(model_sha=bbb\)\)"):
        read_results(two_runs(tmp_path / "t", "pretrained=x/m9", "pretrained=x/m9", **commits))
    commits["run0"] = {"model_sha": ""}  # not recorded
    assert len(read_results(two_runs(tmp_path / "s", "pretrained=x/m9", "pretrained=x/m9", **commits))) == 1


def test_every_name_of_a_directory_names_one_model(tmp_path, monkeypatch):
    (tmp_path / "home" / "m9").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home" / "m9")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    whole = f"pretrained={tmp_path}/home/m9"
    for number, name in enumerate(("home/m9", "./home/m9/", "~/m9", "link", f"{tmp_path}/home/../home/m9/")):
        assert len(read_results(two_runs(tmp_path / str(number), whole, f"pretrained={name}"))) == 1, name
    assert len(read_results(two_runs(tmp_path / "gone", "pretrained=no/where", "pretrained=./no/where/"))) == 1


def test_one_benchmark_under_two_settings_in_a_folder_is_refused_and_under_one_the_later_counts(tmp_path):
    written(tmp_path / "a", "0.4.13", 9, date="2026-01-01T00-00-00.1", **{"n-samples": {"say": {"effective": 5}}})
    written(tmp_path / "a", "0.4.13", 9, date="2026-01-02T00-00-00.1")
    (found,) = read_results(tmp_path / "a")
    assert found.settings["say"]["documents"] == N and "say: the later of two results of m9 is used" in found.notes
    written(tmp_path / "a", "0.4.13", 9, date="2026-01-03T00-00-00.1", **{"n-shot": {"say": 5}})
    with pytest.raises(EvaluationError, match=r"say: two results of m9 .* different settings \(shots 0 and 5\); name"):
        read_results(tmp_path / "a")


# --- lm-eval itself --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_of_lm_eval_and_its_function_record_the_same_settings(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager

    @register_model("knows-some-answers")
    class Answerer(LM):
        def __init__(self, known=0, **arguments):
            super().__init__()
            self.known = int(known)

        def generate_until(self, requests, disable_tqdm=False):
            return [r.doc["a"] if r.doc["n"] < self.known else "no" for r in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [{"n": j, "q": f"say {j}", "a": str(j)} for j in range(N)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "echo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "echo.yaml").write_text(json.dumps(task))
    run = ["lm_eval", "run", "--model", "knows-some-answers", "--model_args", "pretrained=org/teacher,known=9"]
    run += ["--tasks", "echo", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", run)
    command = HarnessCLI()
    command.execute(command.parse_args())
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(Answerer(6), tasks=["echo"], task_manager=manager, bootstrap_iters=0)
    (tmp_path / "function.json").write_text(json.dumps(found, default=str))
    verdict, found = compared(tmp_path / "out", tmp_path / "function.json")
    assert verdict["paired"]["echo"]["lost"] == 3 and verdict["recovery"]["echo"] == pytest.approx(6 / 9)
    assert found["differences"] == [] and Path(tmp_path / "out" / "org__teacher").is_dir()
