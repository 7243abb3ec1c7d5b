"""How far a student is from its teacher, against sums by hand; as a command, and in the run of a recipe."""

import json
import lzma
import math

import pytest
import torch
from conftest import tiny_student, token_ids
from typer.testing import CliRunner

from xlstm_hybrid import cli
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import ConfigError, DataError, EvaluationError
from xlstm_hybrid.evaluation.agreement import agreement

TINY = "recipes/tiny_teacher/tiny-llama"
ROWS = [(ids, [-100, *ids[1:]]) for ids in (token_ids(1, n, seed=n)[0].tolist() for n in (5, 23, 11))]
ROWS[1][1][4:9] = [-100] * 5
FIGURES = ("nll_student", "nll_teacher", "kl", "top1")


@pytest.fixture(scope="module")
def pair():
    return tiny_student(torch.float32), tiny_student(torch.float32, gain=2.0, sliding_window=9)


@torch.no_grad()
def by_hand(student, teacher, rows):
    """Per row and figure the values of its scored tokens, one forward per row, in float64."""
    found = []
    for ids, labels in rows:
        p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (teacher, student))
        at = [t for t in range(1, len(ids)) if labels[t] != -100]
        values = {
            "nll_student": [-math.log(q[t - 1, labels[t]]) for t in at],
            "nll_teacher": [-math.log(p[t - 1, labels[t]]) for t in at],
            "kl": [(p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum().item() for t in at],
            "top1": [float(p[t - 1].argmax() == q[t - 1].argmax()) for t in at],
        }
        found.append(values)
    return found


def test_all_figures_are_means_over_the_scored_tokens(pair):
    expected = by_hand(*pair, ROWS)
    for batch_size in (1, 2, 8):
        found = agreement(*pair, ROWS, batch_size=batch_size)
        for figure in FIGURES:
            values = [value for row in expected for value in row[figure]]
            assert found[figure] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert (found["tokens"], found["rows"]) == (31, 3)
    assert found["kl"] > 0.1 and 0 < found["top1"] < 1


def test_a_standard_error_takes_a_row_as_one_draw(pair):
    """Of rows of one length it is that of the mean of their means; of one row there is none."""
    rows = [(ids, [-100, *ids[1:]]) for ids in (token_ids(1, 9, seed=n)[0].tolist() for n in range(6))]
    found, means = agreement(*pair, rows), [row["kl"] for row in by_hand(*pair, rows)]
    means = torch.tensor(means).double().mean(-1)
    assert found["standard_error"]["kl"] == pytest.approx((means.std() / 6**0.5).item(), rel=1e-4)
    assert agreement(*pair, rows[:1])["standard_error"] == dict.fromkeys(FIGURES)


def test_a_model_agrees_with_itself(pair):
    found = agreement(pair[0], pair[0], ROWS)
    assert found["kl"] == 0 and found["top1"] == 1 and found["nll_student"] == found["nll_teacher"]


def test_what_cannot_be_compared_is_named(pair):
    student = pair[0]
    with pytest.raises(EvaluationError, match="agreement: 0 tokens of 1 rows are scored"):
        agreement(*pair, [([3, 4], [-100, -100])])
    with pytest.raises(ConfigError, match="vocabulary has 61 tokens, the teacher's 60"):
        agreement(student, tiny_student(torch.float32, vocab_size=60), ROWS)
    broken = tiny_student(torch.float32)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(EvaluationError, match="log-likelihoods of student or teacher are not numbers"):
        agreement(broken, student, ROWS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("agreement")
    convert(TINY, folder / "student", sliding_window=16)
    texts = [f"the cat number {n} sat on the mat and looked at {n + 1} birds for a while" for n in range(5)]
    packed = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "text.jsonl.xz").write_bytes(lzma.compress(packed))
    return folder


def test_the_command_measures_packed_text_and_writes_what_it_prints(converted):
    out = converted / "agreement.json"
    words = ["agreement", str(converted / "student"), TINY, "--text", str(converted / "text.jsonl.xz")]
    words += ["--length", "12", "--documents", "4", "--json", str(out)]
    ran = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    found = json.loads(out.read_text())
    assert found["tokens"] == 4 * 11 and found["rows"] == 4 and found["student"] == "student"
    assert f"{found['kl']:.4g}" in ran.output and f"{found['top1']:.4g}" in ran.output
    assert 0 < found["kl"] < 0.05 and found["top1"] > 0.8  # the window covers these rows; the memory is not trained


def test_a_file_with_too_few_documents_is_named(converted):
    words = ["agreement", str(converted / "student"), TINY, "--text", str(converted / "text.jsonl.xz")]
    with pytest.raises(DataError, match="text.jsonl.xz: 5 documents with text, expected at least 6; ask for fewer"):
        CliRunner().invoke(cli.app, [*words, "--documents", "6"], catch_exceptions=False)
