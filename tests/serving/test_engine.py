"""Requests share decode steps and none sees the others: the engine's answers are those of `generate` alone."""

import queue
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_student, token_ids
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.serving.engine import Engine, EngineFull, EngineStops
from xlstm_hybrid.serving.request import Text

TEACHER = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
MIXED = {"teacher_sliding_window": 5, "teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"]}
STACKS = {
    "hybrid": {},
    "kept groups": {"kept_groups": [[0], [], [1]]},
    "mixed": {"layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"], **MIXED},
    "sliding attention with kept groups": {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "sliding_attention"],
        "kept_groups": [[], [1], []],
        **MIXED,
    },
    "no hybrid layer": {"layer_types": ["full_attention"] * 3},
    "memory alone": {"mixer_branches": "memory"},
    "delta rule": {"memory_cell": "delta"},
}
LENGTHS, NEW = (1, 30, 4, 12, 2, 9), (9, 3, 7, 1, 5, 8)  # of prompts and answers
NEVER = 61  # beyond the vocabulary: ends no answer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def model():
    return tiny_student(torch.float32, gain=1.5)


@pytest.fixture
def engines(tokenizer):
    """Makes engines that run; they are stopped after the test."""
    made = []

    def make(model, started=True, **options):
        made.append(Engine(model, tokenizer, **options))
        if started:
            made[-1].start()
        return made[-1]

    yield make
    for engine in made:
        if engine.thread is not None and engine.thread.is_alive():
            engine.stop()


def settings(new=8, **options):
    return GenerationConfig(**({"max_new_tokens": new, "do_sample": False, "eos_token_id": NEVER} | options))


def prompt(length, seed=0):
    return token_ids(1, length, seed=seed)[0].tolist()


class Client:
    """A request and what was delivered of it."""

    def __init__(self, engine, ids, chosen, **options):
        self.pieces = queue.Queue()
        self.request = engine.submit(ids, chosen, lambda *piece: self.pieces.put(piece), **options)

    def answer(self):
        """`(text, reason)` once it has ended."""
        text, reason = "", None
        while reason is None:
            piece, reason = self.pieces.get(timeout=60)
            text += piece
        return text, reason

    @property
    def new(self):
        return self.request.tokens[self.request.prompt :]


def alone(model, ids, chosen):
    return model.generate(torch.tensor([ids]), generation_config=chosen)[0, len(ids) :].tolist()


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", STACKS)
def test_rows_that_join_and_leave_get_the_tokens_that_they_get_alone(stack, engines):
    """Prompts of one token, within the window and beyond it; three rows for six requests, so that each step may have
    other neighbours.
    """
    model = tiny_student(torch.float32, gain=1.5, **STACKS[stack])
    engine = engines(model, max_rows=3, piece=8)
    asked = [(prompt(length, seed=length), settings(new)) for length, new in zip(LENGTHS, NEW, strict=True)]
    clients = [Client(engine, *one) for one in asked]
    assert [client.answer()[1] for client in clients] == ["length"] * len(clients)
    assert [client.new for client in clients] == [alone(model, *one) for one in asked]
    assert engine.rows.cache is None and engine.metrics()["steps"] < sum(NEW) - len(NEW)


def test_rows_hold_no_column_that_none_of_them_has(engines, tokenizer):
    """A long prompt's keys and slots go with it, else a server that is never idle would grow."""
    model = tiny_student(torch.float32, gain=1.5, kept_groups=[[0], [], [1]])
    engine = engines(model, started=False, max_rows=2)
    _, short = (engine.submit(prompt(n), settings(new), lambda *piece: None) for n, new in ((40, 3), (5, 30)))
    with torch.no_grad():
        engine.read()
        assert engine.rows.cache.layers[0].kept.place.shape == (2, 40)
        engine.step()
        engine.step()
    assert engine.running == [short] and engine.rows.lengths == [7]
    layer = engine.rows.cache.layers[0]
    assert layer.kept.place.tolist() == [list(range(7))] and layer.seen_tokens == 7 and layer.count.tolist() == [7]


def test_a_long_prompt_holds_up_nobody(engines, model):
    """It is read in pieces, a decode step after each."""
    engine = engines(model, started=False, max_rows=2, piece=8)
    delivered = []
    short = engine.submit(prompt(4), settings(20), lambda *piece: delivered.append(piece))
    long = engine.submit(prompt(40), settings(2), lambda *piece: None)
    with torch.no_grad():
        for turn in range(1, 5):
            engine.read()
            engine.step()
            assert long.read == 8 * turn and len(short.tokens) == short.prompt + 1 + turn
    assert engine.running == [short]


def test_a_long_prompt_and_many_short_ones_do_not_keep_each_other_waiting(engines, model):
    """Prompts that come while a long one is read get their first token before it, and it is read on meanwhile."""
    engine = engines(model, started=False, max_rows=4, piece=8)
    long = engine.submit(prompt(60), settings(2), lambda *piece: None)
    with torch.no_grad():
        engine.read()
        for turn in range(1, 4):
            short = engine.submit(prompt(8), settings(1), lambda *piece: None)
            engine.read()
            engine.read()
            assert len(short.tokens) == short.prompt + 1 and long.read == 8 + 8 * turn


def test_a_cancelled_request_frees_its_row_or_its_place_in_the_queue(engines, model):
    engine = engines(model, started=False, max_rows=1, queue=2)
    first, second, third = (Client(engine, prompt(4), settings(500)) for _ in range(3))
    with torch.no_grad():
        engine.read()
    assert engine.metrics()["rows"] == 1 and engine.metrics()["queue"] == 2
    engine.cancel(second.request)
    assert second.answer() == ("", "cancelled") and engine.metrics()["queue"] == 1
    engine.start()
    first.pieces.get(timeout=60)
    engine.cancel(first.request)
    assert first.answer()[1] == "cancelled"
    third.pieces.get(timeout=60)  # it has the row
    engine.cancel(third.request)
    assert third.answer()[1] == "cancelled" and engine.active == 0 and engine.rows.cache is None
    assert len(third.new) < 500 and engine.finished["cancelled"] == 3


def test_a_request_that_is_cancelled_while_its_prompt_is_read_leaves_nothing_behind(engines, model):
    engine = engines(model, started=False, max_rows=1, queue=1, piece=8)
    long, next_one = Client(engine, prompt(40), settings()), Client(engine, prompt(4), settings(3))
    with torch.no_grad():
        engine.read()
    assert (engine.reading, long.request.read, engine.metrics()["rows"]) == ([long.request], 8, 1)
    engine.cancel(long.request)
    engine.start()
    assert long.answer() == ("", "cancelled") and next_one.answer()[1] == "length"
    assert next_one.new == alone(model, prompt(4), settings(3)) and engine.active == 0


def test_an_engine_that_stops_tells_those_who_wait(engines, model):
    engine = engines(model, max_rows=1, queue=2)
    clients = [Client(engine, prompt(4), settings(10**6)) for _ in range(3)]
    clients[0].pieces.get(timeout=60)
    engine.stop()
    assert [client.answer()[1] for client in clients] == ["error"] * 3 and engine.active == 0
    engine.cancel(clients[2].request)  # whose client hangs up only now
    assert engine.active == 0 and engine.finished["cancelled"] == 0 and clients[2].pieces.empty()
    with pytest.raises(EngineStops, match="about to stop"):
        Client(engine, prompt(4), settings())


def test_one_request_too_many_is_refused_with_the_limits(engines, model):
    engine = engines(model, started=False, max_rows=1, queue=1)
    for _ in range(2):
        Client(engine, prompt(4), settings())
    with pytest.raises(EngineFull, match=r"2 requests .* 1 rows \(--max-rows\) and a queue of 1 \(--queue\)"):
        Client(engine, prompt(4), settings())
    assert engine.finished["refused"] == 1 and engine.counts["requests"] == 2


def test_a_failed_step_ends_its_requests_and_the_next_ones_are_answered(engines, model, monkeypatch):
    engine = engines(model, max_rows=2)
    monkeypatch.setattr(engine.rows, "step", lambda tokens: 1 / 0)
    assert Client(engine, prompt(4), settings()).answer()[1] == "error"
    monkeypatch.undo()
    client = Client(engine, prompt(4), settings())
    assert client.answer()[1] == "length" and client.new == alone(model, prompt(4), settings())


# --- tokens and text ---------------------------------------------------------------------------------------------

CHOICES = {
    "sampled": {"do_sample": True, "temperature": 1.3},
    "the best of a few": {"do_sample": True, "top_k": 5, "top_p": 0.8},
    "without repetition": {"repetition_penalty": 1.8},
    "biased": {"sequence_bias": {(7,): 3.0}},
    "ended": {"eos_token_id": list(range(3, 40))},
    "not ended too early": {"eos_token_id": list(range(3, 40)), "min_new_tokens": 5, "min_length": 40},
    "as long as the whole may be": {"max_new_tokens": None, "max_length": 15},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_row_follows_its_own_settings_and_seed(choice, engines, model):
    """Beside greedy rows, and with the draws that torch's generator of that seed gives `generate` alone."""
    chosen, ids = settings(12, **CHOICES[choice]), prompt(9, seed=3)
    engine = engines(model, max_rows=3)
    before, client, after = (
        Client(engine, ids, settings(12)),
        Client(engine, ids, chosen, seed=11),
        Client(engine, prompt(5), settings(12)),
    )
    reasons = [x.answer()[1] for x in (before, client, after)]
    torch.manual_seed(11)
    want = alone(model, ids, chosen)
    assert client.new == want and reasons == [
        "length",
        "stop" if "eos_token_id" in CHOICES[choice] else "length",
        "length",
    ]
    assert before.new == alone(model, ids, settings(12)) != client.new


def test_without_a_seed_the_engines_own_decides(engines, model):
    chosen, ids = settings(12, do_sample=True), prompt(9)
    one, other = (engines(model, seed=5) for _ in range(2))
    draws = [[(c := Client(engine, ids, chosen)).answer() and c.new for _ in range(2)] for engine in (one, other)]
    assert draws[0] == draws[1] and draws[0][0] != draws[0][1]


def test_pieces_of_text_are_the_decoded_tokens_and_end_before_a_stop_string(tokenizer):
    said = "Größe 12+30=42; 👍🏽 done, Ende"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]

    def pieces(stop, ids=ids):
        text, out = Text(tokenizer, stop), []
        for token in ids:
            piece, stopped = text.push(token)
            out.append(piece)
            if stopped:
                return out
        return [*out, text.rest(ids)]

    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(())) == whole and len([p for p in pieces(()) if p]) > 5
    assert "".join(pieces(("=42;", "done"))) == whole[: whole.index("=42;")]
    assert "".join(pieces(("Endes", "nowhere"))) == whole  # what looked like the beginning of one comes at the end
    cut = next(n for n in range(len(ids), 0, -1) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
    assert "".join(pieces((), ids[:cut])) == tokenizer.decode(ids[:cut])


def test_settings_that_leave_no_probabilities_end_their_request_alone(engines, model):
    """torch would say so on a CPU, and end the process on a GPU."""
    engine, wild = engines(model), settings(do_sample=True, sequence_bias={(7,): float("inf")})
    beside, client = Client(engine, prompt(9), settings()), Client(engine, prompt(4), wild)
    assert client.answer() == ("", "error") and beside.answer()[1] == "length"
    with pytest.raises(ValueError, match="no probabilities"):
        client.request.choose(torch.zeros(61))


def test_bytes_that_make_no_character_end_no_answer():
    """Where a run of bytes is no text, tokenizers with byte fallback take back what they have shown of it."""
    letters = {name: n for n, name in enumerate(["<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "\u2581a"])}
    raw = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)

    def said(*ids):
        text = Text(tokenizer, ("never",))
        return [text.push(token)[0] for token in ids] + [text.rest(list(ids))]

    assert said(0, 1, 2, 3, 4) == ["\n", "", "", "\u20ac", " a", ""]
    assert said(0, 1, 2, 4, 4) == ["\n", "", "", "\ufffd\ufffd a", " a", ""]
    assert said(4, 0, 1) == [" a", "\n", "", "\ufffd"]


BAD = {
    "an empty prompt": ([], {}, "the prompt has no tokens"),
    "beams": ([5], {"num_beams": 2}, "beam_search.*expected greedy search or sampling"),
    "drafts": ([5], {"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    "several answers": ([5], {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
    "guidance": ([5], {"guidance_scale": 2.0}, "guidance_scale"),
    "another prompt": ([5], {"token_healing": True}, "token_healing"),
    "stop strings that are none": ([5], {"stop_strings": ["a", 5]}, "stop_strings=.*expected a string or a list"),
    "no room for an answer": ([5] * 9, {"max_new_tokens": None, "max_length": 9}, "max_length=9 with a prompt of 9"),
    "a token that the model does not have": ([5, 61], {}, "token 61, expected less than 61"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_rows_cannot_follow_is_refused_by_name(what, engines, model):
    ids, options, message = BAD[what]
    engine = engines(model, started=False)
    with pytest.raises(ConfigError, match=message):
        Client(engine, ids, settings(**options))
    assert engine.active == 0


def test_students_and_limits_that_the_engine_cannot_serve_are_refused_by_name(tokenizer, model):
    with pytest.raises(ConfigError, match=r"sparse_memory=4, expected 'gate' and 0.*generate\(\)"):
        Engine(tiny_student(sparse_memory=4), tokenizer)
    uneven = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(ConfigError, match=r"rope_type='dynamic', expected one whose angles.*generate\(\)"):
        Engine(tiny_student(rope_parameters=uneven), tokenizer)  # a long row would turn the others' keys
    with pytest.raises(ConfigError, match="max_rows=0, expected at least 1"):
        Engine(model, tokenizer, max_rows=0)
    with pytest.raises(ConfigError, match="object is written in Python, expected a fast tokenizer"):
        Engine(model, object())


def test_sixty_four_clients_at_once_lose_nothing_and_change_no_answer(engines, model):
    """From as many threads, every fourth of which goes away at once."""
    engine = engines(model, max_rows=16, queue=48, piece=32)
    kinds = [(prompt(1 + 7 * n, seed=n), settings(4 + n)) for n in range(6)]
    want = [alone(model, *kind) for kind in kinds]
    clients, reasons = [None] * 64, [None] * 64

    def ask(n):
        ids, chosen = kinds[n % 6]
        clients[n] = Client(engine, ids, chosen if n % 4 else settings(400))
        if n % 4 == 0:
            engine.cancel(clients[n].request)
        reasons[n] = clients[n].answer()[1]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == ["length" if n % 4 else "cancelled" for n in range(64)]
    for n in range(64):
        if n % 4:
            assert clients[n].new == want[n % 6]
    assert engine.active == 0 and engine.metrics() | {"rows": 0, "queue": 0} == engine.metrics()
    assert engine.finished == {"stop": 0, "length": 48, "cancelled": 16, "error": 0, "refused": 0}


@pytest.mark.slow
def test_a_thousand_requests_that_are_cancelled_at_any_moment_end_once_each(engines):
    """While they wait, are read, run, and after their end; nothing is delivered after an end."""
    engine = engines(tiny_student(torch.float32, kept_groups=[[0], [], [1]]), max_rows=8, queue=16, piece=8)
    heard = [[] for _ in range(1000)]

    def ask(numbers):
        for n in numbers:
            ended, draw = threading.Event(), random.Random(n)

            def deliver(_, reason, n=n, ended=ended):
                heard[n].append(reason)
                if reason:
                    ended.set()

            chosen = settings(draw.choice((1, 2, 8)), do_sample=n % 3 == 0, eos_token_id=2)
            request = engine.submit(prompt(draw.choice((1, 5, 20)), seed=n), chosen, deliver)
            for _ in range(draw.choice((0, 0, 1, 2))):
                time.sleep(draw.choice((0, 0.001, 0.01)))
                engine.cancel(request)
            assert ended.wait(60)

    threads = [threading.Thread(target=ask, args=(range(k, 1000, 20),)) for k in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(reasons[-1] and not any(reasons[:-1]) for reasons in heard)
    assert engine.active == 0 and engine.rows.cache is None and not engine.reading
    assert sum(engine.finished.values()) == engine.counts["requests"] == 1000 and engine.finished["error"] == 0
