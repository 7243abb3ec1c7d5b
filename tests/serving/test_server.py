"""The server on the loopback: OpenAI's interface, many clients at once, limits, cancellation, metrics."""

import http.client
import json
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from xlstm_hybrid import XLSTMHybridForCausalLM, cli
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.serving.engine import Engine
from xlstm_hybrid.serving.rows import Rows

uvicorn = pytest.importorskip("uvicorn", reason="pip install 'xlstm-hybrid[serve]'")
pytest.importorskip("fastapi", reason="pip install 'xlstm-hybrid[serve]'")
from xlstm_hybrid.serving.server import CompletionBody, build_app  # noqa: E402 (after what it needs)

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
CHAT = [{"role": "user", "content": "Reverse the letters.\nInput: a b c"}]
PROMPTS = ("12+30=", "Reverse the letters.\nInput: a b c\nOutput:", "def add(a, b):\n", "7+5=12;" * 9, "k", "99-1=")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "student"
    convert(TEACHER, folder, sliding_window=16, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def student(checkpoint):
    return XLSTMHybridForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def alone(student):
    """What `generate` alone answers to a prompt, greedily."""
    model, tokenizer = student

    def answer(prompt, new):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        row = model.generate(**ids, max_new_tokens=new, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(row, skip_special_tokens=True)

    return answer


class Site:
    """A server that listens, and requests to it."""

    def __init__(self, engine, port):
        self.engine, self.port = engine, port

    def send(self, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, str) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
        return connection

    def open(self, path, body=None):
        connection = self.send(path, body)
        return connection, connection.getresponse()

    def ask(self, path, body=None):
        """`(status, text, headers)`"""
        connection, response = self.open(path, body)
        text = response.read().decode()
        connection.close()
        return response.status, text, dict(response.headers)

    def metrics(self):
        lines = self.ask("/metrics")[1].splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}

    def until(self, metric, value):
        end = time.monotonic() + 30
        while self.metrics()[f"xlstm_hybrid_{metric}"] != value:
            assert time.monotonic() < end, f"{metric}: {self.metrics()}"
            time.sleep(0.02)


@contextmanager
def listening(student, **options):
    engine = Engine(*student, **options)
    config = uvicorn.Config(build_app(engine, "student"), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Site(engine, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def site(student):
    with listening(student, max_rows=8, queue=64) as found:
        yield found


def events(text):
    *found, end = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert end == "[DONE]"
    return [json.loads(line) for line in found]


# --- the interface -----------------------------------------------------------------------------------------------


def test_chat_completions_whole_and_as_a_stream(site, student):
    model, tokenizer = student
    body = {"model": "student", "messages": CHAT, "temperature": 0.0, "max_tokens": 8}
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    want = tokenizer.decode(new, skip_special_tokens=True)
    status, text, _ = site.ask("/v1/chat/completions", body)
    answer = json.loads(text)
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "student"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": want}, "finish_reason": "stop"}
    ]
    total = {"prompt_tokens": ids["input_ids"].shape[1], "completion_tokens": len(new)}
    assert answer["usage"] == total | {"total_tokens": sum(total.values())}
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    more = {"messages": parts, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(site.ask("/v1/chat/completions", body | more)[1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and "".join(d.get("content", "") for d in deltas) == want
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 2 and usage["choices"] == [] and usage["usage"] == answer["usage"]


def test_completions_whole_and_as_a_stream(site, alone):
    body, want = {"prompt": PROMPTS[2], "max_tokens": 12, "temperature": 0}, alone(PROMPTS[2], 12)
    choice = json.loads(site.ask("/v1/completions", body)[1])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "length")
    chunks = events(site.ask("/v1/completions", body | {"stream": True})[1])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want
    stopped = json.loads(site.ask("/v1/completions", body | {"stop": want[4:7]})[1])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (want[: want.index(want[4:7])], "stop")


def test_what_is_sampled_follows_seed_and_settings(site, student):
    model, tokenizer = student
    body = {"prompt": PROMPTS[2], "max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 3}
    text = json.loads(site.ask("/v1/completions", body)[1])["choices"][0]["text"]
    torch.manual_seed(3)
    ids = tokenizer(PROMPTS[2], return_tensors="pt", return_token_type_ids=False)
    chosen = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 20, "max_new_tokens": 12}
    want = model.generate(**ids, **chosen)[0, ids["input_ids"].shape[1] :]
    assert text == tokenizer.decode(want, skip_special_tokens=True)
    sent = {"generation_config": json.dumps(chosen), "prompt": PROMPTS[2], "seed": 3}  # as `transformers chat` does
    assert json.loads(site.ask("/v1/completions", sent)[1])["choices"][0]["text"] == text


def test_models_health_and_what_the_chat_program_asks_first(site):
    assert [m["id"] for m in json.loads(site.ask("/v1/models")[1])["data"]] == ["student"]
    assert json.loads(site.ask("/health")[1]) == {"status": "ok"}
    line = site.ask("/load_model", {"model": "student"})[1]
    assert json.loads(line.removeprefix("data: "))["status"] == "ready"


BAD = {
    "a field that would be ignored": ({"prompt": "k", "tools": []}, 400, "tools: .*accepted are model, stream"),
    "a value that is none": ({"prompt": "k", "top_p": 3}, 400, "top_p: .*less than or equal to 1"),
    "several answers": ({"prompt": "k", "n": 2}, 400, "n: .*1"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "^messages.0.content: expected text.*images",
    ),
    "token ids": ({"prompt": [1, 2]}, 400, "^prompt: expected one text: lists and token ids"),
    "no prompt": ({"max_tokens": 1}, 400, "^prompt: Field required"),
    "a penalty": (
        {"prompt": "k", "frequency_penalty": 0.5},
        400,
        "^frequency_penalty: expected 0: .*repetition_penalty",
    ),
    "beams": ({"prompt": "k", "generation_config": '{"num_beams": 2}'}, 400, "beam_search"),
    "settings that are no JSON": ({"prompt": "k", "generation_config": "beams"}, 400, "generation_config"),
    "settings that do not exist": ({"prompt": "k", "generation_config": '{"tempratur": 2}'}, 400, "tempratur"),
    "another model": ({"prompt": "k", "model": "gpt-4"}, 404, "'gpt-4': this server has 'student'"),
    "an id beyond the vocabulary": ({"prompt": "k", "logit_bias": {"4711": 2}}, 400, "4711"),
    "a bias without measure": ('{"prompt": "k", "logit_bias": {"7": NaN}}', 400, "logit_bias.7: .*finite"),
    "half a character": ({"prompt": "a\ud800"}, 400, "prompt: expected text, without halves"),
    "no JSON": ('{"prompt": ', 400, "expected a JSON object.*Expecting value"),
    "a list": ([1], 400, "expected a JSON object"),
    "a template of its own": (
        {"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}", "truncation": True}},
        400,
        "chat_template_kwargs: .*found chat_template, truncation",
    ),
    "two limits": ({"messages": CHAT, "max_tokens": 2, "max_completion_tokens": 3}, 400, "expected one of them"),
    "options of no stream": ({"prompt": "k", "stream_options": {"include_usage": True}}, 400, "beside stream=true"),
    "messages that the template breaks at": (
        {"messages": CHAT, "chat_template_kwargs": {"messages": 3}},
        400,
        "chat template takes",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_told_what_is_wrong(what, site):
    body, status, message = BAD[what]
    got, text, _ = site.ask("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
    error = json.loads(text)["error"]
    assert got == status and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"])


def test_what_is_null_was_not_sent(site):
    """Clients send back messages as they came, and fields that they leave alone."""
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 4}
    nulls = {"tools": None, "seed": None, "messages": [CHAT[0] | {"refusal": None, "tool_calls": None}]}
    one, other = (json.loads(site.ask("/v1/chat/completions", body | more)[1]) for more in ({}, nulls))
    assert one["choices"] == other["choices"]


def test_what_the_server_does_not_have_is_an_error_as_clients_read_it(site):
    for path, status in (("/v1/embeddings", 404), ("/v1/completions", 405)):
        got, text, _ = site.ask(path)
        assert got == status and json.loads(text)["error"]["code"] == status


def test_a_prompt_that_takes_long_to_be_tokenised_keeps_nobody_waiting(site, monkeypatch):
    read, ids = threading.Event(), CompletionBody.prompt_ids
    monkeypatch.setattr(CompletionBody, "prompt_ids", lambda *given: read.wait(30) and ids(*given))
    statuses = []
    asking = threading.Thread(
        target=lambda: statuses.append(site.ask("/v1/completions", {"prompt": "k", "max_tokens": 1})[0])
    )
    asking.start()
    gone = site.send("/v1/completions", {"prompt": "k", "max_tokens": 10**6, "logit_bias": {2: -100}, "stream": True})
    gone.close()
    before = site.engine.counts["requests"]
    assert site.ask("/health")[0] == 200 and not statuses
    read.set()
    asking.join()
    assert statuses == [200] and site.ask("/v1/completions", {"prompt": "k", "max_tokens": 1})[0] == 200
    assert site.engine.counts["requests"] == before + 2 and site.engine.active == 0  # one had gone by then


# --- many clients ------------------------------------------------------------------------------------------------


def test_sixty_four_clients_each_get_their_own_answer(site, alone):
    """Half of them as a stream; eight more go away in the midst of theirs. Nothing is lost, and no row stays behind."""
    before, answers = site.metrics(), [None] * 64
    want = {(prompt, new): alone(prompt, new) for prompt in PROMPTS for new in (5, 12)}
    asked = [list(want)[n % len(want)] for n in range(64)]

    def ask(n):
        body = {"prompt": asked[n][0], "max_tokens": asked[n][1], "temperature": 0, "stream": n % 2 == 0}
        status, text, _ = site.ask("/v1/completions", body)
        chunks = events(text) if n % 2 == 0 else [json.loads(text)]
        answers[n] = status, "".join(chunk["choices"][0]["text"] for chunk in chunks)

    def leave(n):
        body = {"prompt": PROMPTS[3], "max_tokens": 5000, "temperature": 0, "stream": n % 2 == 0}
        body["logit_bias"] = {2: -100}  # never ends by itself
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        if n % 2 == 0:
            assert connection.getresponse().read(1)
        else:
            time.sleep(0.2)
        connection.close()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
    threads += [threading.Thread(target=leave, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [(200, want[one]) for one in asked]
    site.until("rows", 0)
    gained = {name: value - before[name] for name, value in site.metrics().items()}
    stop, length, cancelled, error, _ = (value for name, value in gained.items() if "finished" in name)
    taken = gained["xlstm_hybrid_requests_total"]  # who went away before the prompt was tokenised was not taken in
    assert (stop + length, cancelled, error) == (64, taken - 64, 0) and 68 <= taken <= 72
    assert site.metrics()["xlstm_hybrid_queue"] == 0
    assert gained["xlstm_hybrid_steps_total"] < gained["xlstm_hybrid_generated_tokens_total"]


def test_a_full_queue_gives_429_with_the_limits_and_when_to_come_again(student):
    with listening(student, max_rows=1, queue=1) as site:
        endless = {"prompt": "k", "max_tokens": 5000, "temperature": 0, "logit_bias": {2: -100}, "stream": True}
        first, response = site.open("/v1/completions", endless)
        assert response.status == 200
        second, _ = site.open("/v1/completions", endless)
        for body in (endless, {"prompt": "k"}):
            status, text, headers = site.ask("/v1/completions", body)
            error = json.loads(text)["error"]
            assert status == 429 and int(headers["retry-after"]) >= 1 and error["type"] == "rate_limit_error"
            assert (error["limit"], error["queue"]) == (1, 1) and "--max-rows" in error["message"]
        site.until("rows", 1)  # it may still be on its way from the queue
        found = site.metrics()
        assert found["xlstm_hybrid_queue"] == 1
        assert (found["xlstm_hybrid_rows_limit"], found["xlstm_hybrid_queue_limit"]) == (1, 1)
        assert found['xlstm_hybrid_finished_total{reason="refused"}'] == 2
        response.close()
        first.close()
        site.until('finished_total{reason="cancelled"}', 1)
        second.close()
        site.until('finished_total{reason="cancelled"}', 2)
        assert site.metrics()["xlstm_hybrid_rows"] == 0
        assert site.ask("/v1/completions", {"prompt": "k", "max_tokens": 2})[0] == 200


def test_a_failed_answer_is_an_error_of_the_server(student, monkeypatch):
    with listening(student) as site:
        monkeypatch.setattr(Rows, "step", lambda rows, tokens: 1 / 0)
        body = {"prompt": PROMPTS[2], "max_tokens": 9}
        status, text, _ = site.ask("/v1/completions", body)
        assert status == 500 and json.loads(text)["error"]["type"] == "server_error"
        assert '"server_error"' in site.ask("/v1/completions", body | {"stream": True})[1].splitlines()[-2]
        assert site.ask("/health")[0] == 200


def test_an_answer_that_the_servers_end_cuts_short_is_an_error(student):
    answers = []
    with listening(student) as site:
        endless = {"prompt": "k", "max_tokens": 10**6, "temperature": 0, "logit_bias": {2: -100}}
        asking = threading.Thread(target=lambda: answers.append(site.ask("/v1/completions", endless)))
        asking.start()
        site.until("rows", 1)
    asking.join()
    assert answers[0][0] == 503 and json.loads(answers[0][1])["error"]["type"] == "server_error"
    assert site.engine.active == 0


def test_a_request_that_comes_while_the_server_stops_is_told_so(student):
    with listening(student) as site:
        site.engine.stop()
        status, text, _ = site.ask("/v1/completions", {"prompt": "k"})
    assert status == 503 and "about to stop" in json.loads(text)["error"]["message"]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_serves_an_exported_checkpoint_with_its_options(checkpoint, monkeypatch, tmp_path):
    export(checkpoint, tmp_path / "exported")
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: calls.append(options))
    monkeypatch.setattr("xlstm_hybrid.serving.server.build_app", lambda engine, name: calls.append((engine, name)))
    chosen = {"port": 8123, "device": "cpu", "dtype": "float64", "max-rows": 3, "queue": 5, "seed": 7}
    chosen["served-model-name"] = "mine"
    options = [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
    ran = CliRunner().invoke(cli.app, ["serve", f"{tmp_path}/exported", *options, "--log-level", "error"])
    assert ran.exit_code == 0 and f"{tmp_path}/exported: http://localhost:8123/v1" in ran.output, ran.output
    (engine, name), given = calls
    assert name == "mine" and type(engine.model) is XLSTMHybridForCausalLM
    assert (given["host"], given["port"], given["log_level"]) == ("localhost", 8123, "error")
    assert (engine.max_rows, engine.queue, engine.seed, engine.model.dtype) == (3, 5, 7, torch.float64)


WRONG = {
    "a teacher": (str(TEACHER), (), "is a model of type llama, expected a student"),
    "a level": ("student", ("--log-level", "loud"), "--log-level loud, expected one of debug, info, warning, error"),
    "a dtype": ("student", ("--dtype", "banana"), "--dtype banana, expected one of auto, float64, float32"),
    "no rows": ("student", ("--max-rows", "0"), "max_rows=0, expected at least 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_command_refuses_what_it_cannot_serve(what, checkpoint):
    folder, options, message = WRONG[what]
    folder = checkpoint if folder == "student" else folder
    ran = CliRunner().invoke(cli.app, ["serve", str(folder), "--device", "cpu", *options])
    assert isinstance(ran.exception, ConfigError) and message in str(ran.exception)


def test_a_port_that_is_none_is_refused_before_anything_is_loaded():
    assert CliRunner().invoke(cli.app, ["serve", "nowhere", "--port", "70000"]).exit_code == 2
