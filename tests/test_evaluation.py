"""The measure reproduces the published tolerances; scores of a model are what the model says."""
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation import exact_match, perplexity, win_and_tie
from xlstm_hybrid.tasks import Example

LLAMA = [10.6, 13.8, 48.4, 35.4, 29.9, 48.4, 61.9]
LLAMA_IT = [0.85, 0.51, 0.50, 0.19, 0.63, 0.57, 0.59, 0.69, 0.26, 0.28, 0.30, 0.32, 0.78, 5.08]
QWEN_IT = [0.90, 0.74, 0.74, 0.49, 0.81, 0.74, 0.61, 0.79, 0.41, 0.41, 0.34, 0.36, 0.74, 5.20]
PUBLISHED = {  # student, teacher, alpha*, C_0: Hauzenberger et al. 2026, recomputed from its tables
    "xLSTM-Llama": ([17.7, 15.8, 57.8, 39.0, 23.8, 42.8, 56.9], LLAMA, 0.0, 4 / 7),
    "LoLCATs": ([1.77, 2.23, 3.87, 2.13, 3.35, 0, 0], LLAMA, 0.920, 0),
    "xLSTM-Olmo3": ([17.7, 19.4, 56.6, 32.3, 27.4, 36.8, 52.4], [20.7, 19.0, 67.5, 32.9, 28.7, 50.6, 71.7], 0.145, 1 / 7),
    "QRWKV6": ([9.6, 13.2, 23.8, 20.7, 33.5, 0, 27.0], [32.3, 30.8, 80.8, 65.9, 47.6, 62.6, 80.4], 0.686, 0),
    "xLSTM-Llama-IT": ([0.83, 0.54, 0.55, 0.22, 0.63, 0.56, 0.54, 0.66, 0.34, 0.27, 0.21, 0.20, 0.69, 6.05], LLAMA_IT, 0.018, 6 / 14),
    "xLSTM-Qwen-IT": ([0.90, 0.65, 0.66, 0.42, 0.78, 0.71, 0.63, 0.79, 0.42, 0.42, 0.26, 0.22, 0.67, 5.96], QWEN_IT, 0.037, 6 / 14),
}


def named(scores):
    return {f"task{j}": s for j, s in enumerate(scores)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_measure_reproduces_the_published_tables(name):
    student, teacher, alpha_star, c_0 = PUBLISHED[name]
    result = win_and_tie(named(student), named(teacher))
    assert result.alpha_star == pytest.approx(alpha_star, abs=6e-4) and result.c_0 == pytest.approx(c_0)
    assert result.wins + result.ties + result.losses == len(teacher)
    crossing = next(a for a, c in zip(result.alphas, result.curve, strict=True) if c >= 0.5)
    assert crossing - 0.005 <= result.alpha_star <= crossing  # the closed form is where the curve crosses one half
    assert result.curve == sorted(result.curve) and result.curve[-1] == 1


def test_a_teacher_score_of_zero_is_never_lost():
    result = win_and_tie({"a": 0.0, "b": 0.5, "c": 0.1}, {"a": 0.0, "b": 0.0, "c": 1.0})
    assert result.alpha_star == 0 and result.c_0 == pytest.approx(2 / 3) and (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert result.recovery == {"a": 1.0, "b": math.inf, "c": pytest.approx(0.1)}


@pytest.mark.parametrize(("student", "teacher", "message"), [
    ({"a": 1.0}, {"a": 1.0, "b": 1.0}, r"on one side only: \['b'\]"),
    ({"a": math.nan}, {"a": 1.0}, "student a=nan"),
    ({"a": 1.0}, {"a": -1.0}, "teacher a=-1.0"),
    ({}, {}, "no benchmark"),
])
def test_scores_that_cannot_be_compared_are_named(student, teacher, message):
    with pytest.raises(EvaluationError, match=message):
        win_and_tie(student, teacher)


@pytest.fixture(scope="module")
def counter():
    """A Llama taught to count, and its tokenizer of one digit per token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {d: 3 + int(d) for d in "0123456789"}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                         bos_token_id=1, eos_token_id=2, pad_token_id=0))
    rows = torch.tensor([[(s + j) % 10 + 3 for j in range(6)] + [2] for s in range(10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model, tokenizer


def test_exact_match_counts_whole_answers_in_the_order_of_the_examples(counter):
    model, tokenizer = counter
    model.train()
    examples = [Example((("12", "3456"),)), Example((("3456", "78"),)), Example((("7890", "99"),)), Example((("5", "67890"),))]
    results = [exact_match(model, tokenizer, examples, batch_size=b) for b in (1, 2, 4)]
    assert [s["correct"] for s in results[0].samples] == [True, True, False, True] and results[0].score == 0.75
    assert results[0] == results[1] == results[2] and results[0].samples[2]["output"] == "12"
    assert model.training  # as it was


def test_perplexity_is_the_exponential_of_the_mean_loss_over_scored_tokens(counter):
    model = counter[0].eval()
    rows = [([3, 4, 5, 9], [-100, 4, 5, 9]), ([7, 7, 8, 9, 10, 3], [-100, -100, 8, 9, 10, 3]), ([5, 5], [-100, 5])]
    nll = []
    for ids, labels in rows:
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll += [-logp[t - 1, label].item() for t, label in enumerate(labels) if label != -100]
    expected = math.exp(sum(nll) / len(nll))
    for batch_size in (1, 2, 8):
        assert perplexity(model, rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_score_is_an_error(counter):
    model, tokenizer = counter
    with pytest.raises(EvaluationError, match="no token is scored"):
        perplexity(model, [([3, 4], [-100, -100])])
    with pytest.raises(EvaluationError, match="no examples"):
        exact_match(model, tokenizer, [])
