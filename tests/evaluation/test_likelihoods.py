"""Log-likelihoods where a common beginning is read once: those of whole inputs, and of lm-eval's own HFLM."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import enlarge
from tiny_students import student
from tiny_teachers import teacher

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.errors import CompatibilityWarning, EvaluationError
from xlstm_hybrid.evaluation import likelihoods
from xlstm_hybrid.evaluation.likelihoods import continuation_scores

TINY = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
CLOSE = {"atol": 1e-8, "rtol": 1e-8}  # float64 models
SHOTS, QUESTION = 70, 30


def ids(count, seed):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def few_shot(documents=3, options=4):
    """Requests of one task: the shots of all documents, a question each, and answers of three tokens."""
    shots = ids(SHOTS, 0)
    return [
        ([*shots, *ids(QUESTION, 1 + d)], [d + 3, *ids(2, 100 * d + option)])
        for d in range(documents)
        for option in range(options)
    ]


def read_whole(model, requests, max_length=10**6):
    """The definition: each input by itself, without a cache."""
    found = []
    for context, continuation in requests:
        row = torch.tensor([[*context, *continuation][-(max_length + 1) :]])
        with torch.no_grad():
            logp = model(row[:, :-1], use_cache=False).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = torch.tensor(continuation)
        found.append((logp.gather(-1, wanted[:, None]).sum().item(), torch.equal(logp.argmax(-1), wanted)))
    return found


def same(found, wanted):
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in wanted], **CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def counted(model):
    """The shapes [B, T] of what is given to a model, as it is called."""
    shapes = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    return shapes, hook


def greedy_continuation(model, context, count):
    for _ in range(count):
        with torch.no_grad():
            best = model(torch.tensor([context]), use_cache=False).logits[0, -1].argmax().item()
        context = [*context, best]
    return context[-count:]


def double(model):
    return copy.deepcopy(model).double()


def recurrent_student():
    from xlstm_hybrid import DistilXLSTMConfig, DistilXLSTMForCausalLM

    torch.manual_seed(0)
    fields = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    return DistilXLSTMForCausalLM(DistilXLSTMConfig(**fields)).double().eval()


MODELS = {
    "a Llama": lambda: double(teacher("llama")),
    "a teacher with windows": lambda: double(teacher("qwen3", window=5)),
    "a student": lambda: student("llama"),
    "a student with all kinds of layers": lambda: student("qwen3", "mixed"),
    "a recurrent student": recurrent_student,
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_whole_inputs(name):
    """A common beginning, beginnings within it, none, answers of one token after one question, an answer that is the
    start of another, and what greedy decoding gives; then inputs that lose their beginning.
    """
    model, requests = MODELS[name](), few_shot()
    requests += [(requests[0][0], greedy_continuation(model, requests[0][0], n)) for n in (1, 2)]
    requests += [(requests[0][0], [token]) for token in (5, 6, 7)]
    requests += [(requests[4][0], requests[4][1] + tail) for tail in ([9], [9, 10, 11, 12, 13, 14])]
    requests += [(ids(n, 50 + n), ids(k, 60 + n)) for n, k in ((1, 1), (3, 20), (7, 2), (120, 1))]
    for longest in (200, 60):
        wanted = read_whole(model, requests, longest)
        for batch_size in (1, 8):
            same(continuation_scores(model, requests, batch_size=batch_size, max_length=longest), wanted)
        greedy = [flag for _, flag in wanted]
        assert longest == 60 or (greedy[12:14] == [True, True] and not all(greedy))


def test_what_inputs_begin_with_is_read_once():
    model, requests = student("llama"), few_shot()
    shapes, hook = counted(model)
    continuation_scores(model, requests, batch_size=8, max_length=10**6)
    hook.remove()
    # the shots; of each document the question and its answers' common first token, then the rest of the four answers
    length = QUESTION - 1  # the last token of a question gives the first scored position
    assert shapes == [(1, SHOTS), *[(1, length), (4, 3)] * 3]
    assert sum(b * t for b, t in shapes) == 193 and len(requests) * (SHOTS + QUESTION + 2) == 1224


def test_answers_of_one_token_are_one_row_and_short_beginnings_are_read_with_their_rows():
    model = student("llama")
    requests = [([*ids(9, 0), *ids(6, question)], [token]) for question in range(1, 5) for token in (3, 4, 5, 6)]
    shapes, hook = counted(model)
    continuation_scores(model, requests, batch_size=8, max_length=10**6)
    hook.remove()
    assert shapes == [(4, 15)]  # a beginning of 9 tokens saves 27: less than a call costs


def test_logits_are_calculated_where_a_continuation_is_scored():
    model, widths = student("llama"), []
    hook = model.lm_head.register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    continuation_scores(model, [(ids(40, 0), ids(3, 1)), (ids(38, 2), ids(2, 3))], batch_size=2, max_length=100)
    hook.remove()
    assert widths == [5]  # positions 39 to 41 of the one, 37 and 38 of the other


def test_inputs_are_read_whole_where_angles_depend_on_their_length_or_a_cache_is_unknown(monkeypatch):
    model, requests = double(teacher("llama", rope="dynamic")), few_shot(2)
    shapes, hook = counted(model)
    same(continuation_scores(model, requests, batch_size=1, max_length=200), read_whole(model, requests))
    assert set(shapes) == {(1, SHOTS + QUESTION + 2)}
    hook.remove()
    monkeypatch.setattr(likelihoods, "KNOWN", ())
    model = double(teacher("llama"))
    same(continuation_scores(model, requests, batch_size=8, max_length=200), read_whole(model, requests))


def test_a_continuation_beyond_the_longest_input_is_refused():
    with pytest.raises(EvaluationError, match="continuation of 9, expected at least one of each.*longest input, 8"):
        continuation_scores(student("llama"), [([3], ids(9, 0))], batch_size=1, max_length=8)


# --- beside lm-eval's own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["teacher", "student"])
def loaded(request):
    model, tokenizer = load(TINY, "float64", device="cpu")
    if request.param == "student":
        made = XLSTMHybridForCausalLM.from_teacher(TINY, sliding_window=16, num_sink_tokens=2, dtype=torch.float32)
        model = enlarge(made.double(), gain=1.5).eval()
    return model, tokenizer


def instances():
    """As tasks make them: choices after shots, one-letter answers, a blank before a question, no context at all, a
    continuation that joins the last word of its context."""
    from lm_eval.api.instance import Instance

    shots = "".join(f"Question: what is {a} plus {a + 1}?\nAnswer: {2 * a + 1}\n\n" for a in range(5))
    asked = [f"{shots}Question: what is {a} plus {b} minus one?\nAnswer:" for a, b in ((3, 4), (15, 2))]
    pairs = [(text, f" {n} apples") for text in asked for n in (6, 16)]
    pairs += [(text, f" {letter}") for text in asked for letter in "ABC"]
    pairs += [(f"{text} ", "seven") for text in asked] + [(asked[0][:-4], "swer: no"), ("", "seven apples")]
    pairs += [(f"{shots[40:]}The {thing} is heavy because the", " box is full") for thing in ("box", "lid")]
    return [Instance("loglikelihood", {}, pair, j) for j, pair in enumerate(pairs)]


@pytest.mark.parametrize(("batch_size", "max_length"), [(1, 60), (8, 2048)])
def test_scores_are_those_of_lm_eval(loaded, batch_size, max_length):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from xlstm_hybrid.evaluation.harness import language_model

    model, tokenizer = loaded
    arguments = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompatibilityWarning)
        ours = language_model(**arguments)
    plain = HFLM(**arguments)
    same(ours.loglikelihood(instances(), disable_tqdm=True), plain.loglikelihood(instances(), disable_tqdm=True))
    text = [Instance("loglikelihood_rolling", {}, (instances()[0].args[0],), 0)]
    found, wanted = (lm.loglikelihood_rolling(text, disable_tqdm=True) for lm in (ours, plain))
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_an_lm_eval_of_another_inside_reads_every_input_whole_and_says_so(monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from xlstm_hybrid.evaluation.harness import language_model

    model, tokenizer = load(TINY, device="cpu")
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda self, requests, quietly=False: None)
    with pytest.warns(CompatibilityWarning, match=r"_loglikelihood_tokens\(self, requests, quietly=False\)"):
        lm = language_model(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert type(lm) is HFLM
