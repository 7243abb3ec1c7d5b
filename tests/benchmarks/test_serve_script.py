"""`benchmarks/serve.py` at a tiny shape: a line for each number of clients, and none for answers that are not `generate`'s."""

import pytest
import serve

SMALL = ["--shape", "tiny", "--window", "16", "--clients", "1,3", "--prompt", "5", "--new", "4", "--rounds", "1"]


def test_a_line_for_each_number_of_clients(capsys):
    serve.main([*SMALL, "--near"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "clients:"], ["3", "clients:"]]
    assert all("tokens/s" in line and line.endswith("%") for line in lines)


def test_other_answers_than_those_of_generate_leave_no_figure(capsys, monkeypatch):
    monkeypatch.setattr(serve, "one_by_one", lambda model, prompts, new: [[0] * new for _ in prompts])
    with pytest.raises(SystemExit, match="1 clients: .*% of the tokens are those of generate, expected all"):
        serve.main(SMALL)
    assert not capsys.readouterr().out
