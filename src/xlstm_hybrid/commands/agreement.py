"""`xlstm-hybrid agreement`: how far a student is from its teacher, token by token."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from xlstm_hybrid.checkpoint.files import write_json
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.commands.options import Teacher
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data.streams import text_rows
from xlstm_hybrid.evaluation import agreement as measured
from xlstm_hybrid.reports.text import number, terminal_table

LABELS = {
    "nll_student": "student's negative log-likelihood, nats per token",
    "nll_teacher": "teacher's negative log-likelihood, nats per token",
    "kl": "KL(teacher || student), nats per token",
    "top1": "share of tokens with the same most likely one",
}


def agreement(
    student: Annotated[str, Argument(help="Student: checkpoint directory or hub id.")],
    teacher: Teacher,
    text: Annotated[Path, Option(help="File of documents: JSON lines, parquet, CSV; .gz and .xz too.")],
    column: Annotated[str, Option(help="Column of the text.")] = "text",
    length: Annotated[int, Option(min=2, help="Tokens of a document, at most; the rest is left out.")] = 512,
    documents: Annotated[int, Option(min=1, help="How many are drawn.")] = 64,
    batch_size: Annotated[int, Option(min=1, help="Documents at once.")] = 8,
    dtype: Annotated[str, Option(help="Of both models; figures are computed in float32.")] = "float32",
    out: Annotated[Path | None, Option("--json", help="File for the figures, JSON.")] = None,
):
    """Compare a student with its teacher on text: KL, top 1, likelihoods.

    Example: xlstm-hybrid agreement runs/mine/student TEACHER --text peps.jsonl.xz --length 512 --documents 64
    """
    if out is not None:
        check_output(out, "file")
    (mine, tokenizer), (its, its_tokenizer) = load(student, dtype), load(teacher, dtype)
    rows = text_rows(text, column, tokenizer, length, documents)
    how = {"tokenizer": tokenizer, "teacher_tokenizer": its_tokenizer, "batch_size": batch_size}
    found = measured.agreement(mine, its, rows, **how)
    table = [["figure", "mean", "standard error"]]
    table += [[label, number(found[key]), number(found["standard_error"][key])] for key, label in LABELS.items()]
    console = Console(width=None if Console().is_terminal else 120)
    console.print(terminal_table(table, f"{found['tokens']:,} tokens of {found['rows']} documents"))
    if out is not None:
        names = {"student": Path(student).name, "teacher": Path(teacher).name, "text": text.name, "length": length}
        write_json(out, names | {"dtype": dtype} | found)
