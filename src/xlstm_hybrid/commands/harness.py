"""`xlstm-hybrid harness`: lm-evaluation-harness on a student or its teacher, with our long-context tasks and the paper's suites."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.harness import Options, expand, run_harness
from xlstm_hybrid.evaluation.scores import last_part, named_contradictions


def harness(
    model: Annotated[str, typer.Argument(help="Student or teacher: checkpoint directory or hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: long_context, domains, paper_understanding, paper_base, paper_instruct, or tasks: "
            "needle, multikey, recall, variables (or needle_4k), or any of lm-eval."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the results, one folder per task; finished tasks are not run again.")
    ],
    lengths: Annotated[
        str | None, typer.Option(help="Of long-context tasks, tokens: 1k,4k; 1k to 128k by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents per long-context task.")] = 40,
    depths: Annotated[int, typer.Option(help="Parts of the context that a needle visits in turn.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the long-context documents.")] = 0,
    limit: Annotated[int | None, typer.Option(help="First documents of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents per batch.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Longest input, tokens; what is longer loses its beginning. The model's own by default, "
            "and what a long-context task needs."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model in the results; its last name by default.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the code that the model writes: in a sandbox only.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Replace results that were made with other settings.")] = False,
):
    """Evaluate a model with lm-evaluation-harness.

    Greedy, batched, through the cache. `xlstm-hybrid compare` reads OUT of a teacher and of students.

    Example: xlstm-hybrid harness runs/tiny/student --tasks domains,needle_4k --out results/student
    """
    warn_if_slow(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype, "--dtype")
    options = Options(
        name,
        samples,
        depths,
        seed,
        limit,
        batch_size,
        max_length,
        include,
        chat,
        allow_code,
        dtype,
        device,
        revision,
        redo,
    )
    found = run_harness(model, expand(tasks, lengths), out, options, report=partial(print, flush=True))
    if wrong := {unit: result["contradictions"] for unit, result in found.items() if result.get("contradictions")}:
        raise EvaluationError(named_contradictions({name or last_part(model): wrong}))
