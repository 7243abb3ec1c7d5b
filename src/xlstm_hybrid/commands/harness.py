"""`xlstm-hybrid harness`: lm-evaluation-harness on a student or its teacher, with our long-context tasks and the paper's suites."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Revision
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.harness import Options, expand, run_harness
from xlstm_hybrid.evaluation.results import last_part
from xlstm_hybrid.evaluation.scores import named_contradictions


def harness(
    model: Annotated[str, Argument(help="Student or teacher: checkpoint directory or hub id.")],
    tasks: Annotated[
        str,
        Option(
            help="Suites (long_context, domains, paper_understanding, paper_base, paper_instruct; real_understanding, "
            "real_suite, real_code, of the command benchmarks) and tasks "
            "(needle, multikey, recall, variables, or needle_4k; any of lm-eval), with commas."
        ),
    ],
    out: Annotated[Path, Option(help="Folder of the results, one folder per task; finished tasks are not run again.")],
    lengths: Annotated[str | None, Option(help="Of long-context tasks, tokens: 1k,4k; 1k to 128k by default.")] = None,
    samples: Annotated[int, Option(help="Documents per long-context task.")] = 40,
    depths: Annotated[int, Option(help="Parts of the context that a needle visits in turn.")] = 10,
    seed: Annotated[int, Option(help="Of the long-context documents.")] = 0,
    haystack: Annotated[
        Path | None, Option(help="Real text to hide answers in: plain, or .jsonl of {text}; also .xz.")
    ] = None,
    hops: Annotated[int | None, Option(help="Links of a chain of variables; 4 by default, as RULER has.")] = None,
    limit: Annotated[int | None, Option(help="First documents of each task only.")] = None,
    batch_size: Annotated[int, Option(help="Documents per batch.")] = 8,
    max_length: Annotated[
        int | None, Option(help="Longest input, tokens: more loses its beginning; by default the model's, or a task's.")
    ] = None,
    name: Annotated[str | None, Option(help="Of the model in the results; its last name by default.")] = None,
    include: Annotated[Path | None, Option(help="Folder with task files of your own.")] = None,
    chat: Annotated[bool, Option("--chat", help="Apply the chat template.")] = False,
    allow_code: Annotated[
        bool, Option("--allow-code", help="Run code that the model writes: only in a sandbox.")
    ] = False,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, Option(help="Where to run; a GPU if there is one.")] = None,
    revision: Revision = None,
    redo: Annotated[bool, Option("--redo", help="Replace results that were made with other settings.")] = False,
):
    """Evaluate a model with lm-evaluation-harness.

    Greedy, batched, through the cache. `xlstm-hybrid compare` reads OUT of a teacher and of students.

    Example: xlstm-hybrid harness runs/tiny/student --tasks domains,needle_4k --out results/student
    """
    check_output(out, "folder", [model])
    device = device_of(device)
    warn_if_slow(device, dtype, "--dtype")
    documents = {"samples": samples, "depths": depths, "seed": seed, "limit": limit}
    documents |= {"haystack": haystack, "hops": hops, "batch_size": batch_size}
    documents |= {"max_length": max_length, "include": include, "chat": chat, "allow_code": allow_code}
    options = Options(name, **documents, dtype=dtype, device=device, revision=revision, redo=redo)
    found = run_harness(model, expand(tasks, lengths), out, options, report=partial(print, flush=True))
    if wrong := {unit: result["contradictions"] for unit, result in found.items() if result.get("contradictions")}:
        raise EvaluationError(named_contradictions({name or last_part(model): wrong}))
