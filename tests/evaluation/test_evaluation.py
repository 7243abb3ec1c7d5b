"""The measure reproduces the published tolerances; scores of a model are what the model says."""

import copy
import math

import pytest
import torch
from conftest import tiny_student, token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_hybrid.data.toy_domains import Example
from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.evaluation.scores import contradictions, exact_match, named_contradictions, perplexity, win_and_tie

LLAMA = [10.6, 13.8, 48.4, 35.4, 29.9, 48.4, 61.9]
LLAMA_IT = [0.85, 0.51, 0.50, 0.19, 0.63, 0.57, 0.59, 0.69, 0.26, 0.28, 0.30, 0.32, 0.78, 5.08]
QWEN_IT = [0.90, 0.74, 0.74, 0.49, 0.81, 0.74, 0.61, 0.79, 0.41, 0.41, 0.34, 0.36, 0.74, 5.20]
PUBLISHED = {  # student, teacher, alpha*, C_0: Hauzenberger et al. 2026, recomputed from its tables
    "xLSTM-Llama": ([17.7, 15.8, 57.8, 39.0, 23.8, 42.8, 56.9], LLAMA, 0.0, 4 / 7),
    "LoLCATs": ([1.77, 2.23, 3.87, 2.13, 3.35, 0, 0], LLAMA, 0.920, 0),
    "xLSTM-Olmo3": (
        [17.7, 19.4, 56.6, 32.3, 27.4, 36.8, 52.4],
        [20.7, 19.0, 67.5, 32.9, 28.7, 50.6, 71.7],
        0.145,
        1 / 7,
    ),
    "QRWKV6": ([9.6, 13.2, 23.8, 20.7, 33.5, 0, 27.0], [32.3, 30.8, 80.8, 65.9, 47.6, 62.6, 80.4], 0.686, 0),
    "xLSTM-Llama-IT": (
        [0.83, 0.54, 0.55, 0.22, 0.63, 0.56, 0.54, 0.66, 0.34, 0.27, 0.21, 0.20, 0.69, 6.05],
        LLAMA_IT,
        0.018,
        6 / 14,
    ),
    "xLSTM-Qwen-IT": (
        [0.90, 0.65, 0.66, 0.42, 0.78, 0.71, 0.63, 0.79, 0.42, 0.42, 0.26, 0.22, 0.67, 5.96],
        QWEN_IT,
        0.037,
        6 / 14,
    ),
}


def named(scores):
    return {f"task{j}": s for j, s in enumerate(scores)}


# --- win-and-tie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_measure_reproduces_the_published_tables(name):
    student, teacher, alpha_star, c_0 = PUBLISHED[name]
    result = win_and_tie(named(student), named(teacher))
    assert result.alpha_star == pytest.approx(alpha_star, abs=6e-4) and result.c_0 == result.curve[0] == pytest.approx(
        c_0
    )
    assert result.wins + result.ties + result.losses == len(teacher)
    crossing = next(a for a, c in zip(result.alphas, result.curve, strict=True) if c >= 0.5)
    assert crossing - 0.005 <= result.alpha_star <= crossing  # the closed form is where the curve crosses one half
    assert result.curve == sorted(result.curve) and result.curve[-1] == 1
    assert result.recovery["task0"] == student[0] / teacher[0]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name][2] > 0])
def test_alpha_star_is_the_smallest_tolerance_that_suffices(name):
    student, teacher = map(named, PUBLISHED[name][:2])
    star = win_and_tie(student, teacher).alpha_star
    at, below = win_and_tie(student, teacher, [star, star - 1e-9]).curve
    assert below < 0.5 <= at


def test_the_tolerance_is_relative_and_inclusive():
    # 1 - .72 / .8 is .1 and a rounding error
    result = win_and_tie({"a": 0.72, "b": 40.0}, {"a": 0.8, "b": 44.0}, [0.0999, 0.1])
    assert result.curve == [0.5, 1] and (result.wins, result.ties, result.losses) == (0, 0, 2)
    assert win_and_tie({"a": 0.1 + 0.2}, {"a": 0.3}).ties == win_and_tie({"a": 0.3}, {"a": 0.1 + 0.2}).ties == 1


def test_a_teacher_score_of_zero_is_never_lost():
    result = win_and_tie({"a": 0.0, "b": 0.5, "c": 0.1}, {"a": 0.0, "b": 0.0, "c": 1.0})
    assert (
        result.alpha_star == 0
        and result.c_0 == pytest.approx(2 / 3)
        and (result.wins, result.ties, result.losses) == (1, 1, 1)
    )
    assert result.recovery == {"a": None, "b": None, "c": pytest.approx(0.1)}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"a": 1.0, "c": 2.0}, {"a": 1.0, "b": 1.0}, "b has no score of the student; c has no score of the teacher"),
        (
            {"a": math.nan, "b": math.inf},
            {"a": 1.0, "b": -1.0},
            "a is nan for the student.*b is inf for the student.*b is -1.0 for the teacher",
        ),
        ({}, {}, "no benchmark, expected at least one"),
    ],
)
def test_scores_that_cannot_be_compared_are_all_named(student, teacher, message):
    with pytest.raises(EvaluationError, match=message):
        win_and_tie(student, teacher)


def test_a_tolerance_is_a_share():
    with pytest.raises(EvaluationError, match="alpha is 2, expected a share between 0 and 1"):
        win_and_tie({"a": 1.0}, {"a": 1.0}, [0, 2])


# --- models ----------------------------------------------------------------------------------------------------


def digits(**special):
    """A tokenizer of one digit per token that begins with <s>."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {d: 3 + int(d) for d in "0123456789"}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", **special)


@pytest.fixture(scope="module")
def counter():
    """A Llama taught to count up to nine and stop there, and its tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    rows = torch.tensor([[1, *range(3 + s, 13), *[2] * (s + 1)] for s in range(10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model, digits(pad_token="<pad>", eos_token="</s>")


EXAMPLES = [
    Example(((prompt, answer),))
    for prompt, answer in (("12", "3456789"), ("3456", " 789 "), ("78", "99"), ("5", "6789"), ("6", "78"))
]


def test_exact_match_counts_whole_answers_in_the_order_of_the_examples(counter):
    model, tokenizer = counter
    results = [exact_match(model, tokenizer, EXAMPLES, batch_size=b) for b in (1, 2, 8)]
    assert [s["output"] for s in results[0].samples] == ["3456789", "789", "9", "6789", "789"]
    assert [s["correct"] for s in results[0].samples] == [True, True, False, True, False] and results[0].score == 0.6
    assert results[0].samples[1] == {"prompt": "3456", "answer": " 789 ", "output": "789", "correct": True}
    assert results[0] == results[1] == results[2]


def test_an_output_is_cut_at_the_budget(counter):
    assert [s["output"] for s in exact_match(*counter, EXAMPLES, max_new_tokens=2).samples] == [
        "34",
        "78",
        "9",
        "67",
        "78",
    ]
    # two tokens of the answer and two more would be possible
    longest = exact_match(*counter, EXAMPLES[2:3]).samples[0]["output"]
    assert longest == "9"


def test_padding_and_end_tokens_need_no_declaration_in_the_tokenizer(counter):
    assert exact_match(counter[0], digits(), EXAMPLES) == exact_match(*counter, EXAMPLES)


def test_settings_of_the_checkpoint_do_not_bend_a_greedy_score_and_the_model_comes_back_as_it_was(counter):
    model, tokenizer = counter
    before = model.generation_config
    expected = exact_match(model, tokenizer, EXAMPLES)
    bent = GenerationConfig(
        do_sample=True, temperature=5.0, suppress_tokens=[12], max_length=3, eos_token_id=[2], pad_token_id=0
    )
    model.generation_config = bent
    model.train()
    try:
        assert exact_match(model, tokenizer, EXAMPLES) == expected
        assert model.generation_config is bent and model.training
        with pytest.raises(TypeError):
            exact_match(model, tokenizer, EXAMPLES, progress=1)
        assert model.generation_config is bent and model.training
    finally:
        model.generation_config = before
        model.eval()


def test_progress_is_told_after_each_batch(counter):
    told = []
    exact_match(*counter, EXAMPLES, batch_size=2, progress=lambda done, of: told.append((done, of)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_an_answer_that_the_model_gives_token_by_token_and_did_not_generate_is_a_contradiction(counter):
    model, tokenizer = counter
    sound = exact_match(model, tokenizer, EXAMPLES).samples
    assert contradictions(model, tokenizer, sound) == []
    broken = [{**s, "output": "33333", "correct": False} for s in sound]
    found = contradictions(model, tokenizer, broken)
    assert [s["prompt"] for s in found] == ["12", "5"] and found == [broken[0], broken[3]]  # " 789 " is other tokens
    assert found == contradictions(model, tokenizer, broken, batch_size=1)
    said = named_contradictions({"it": {"counting": found}})
    assert (
        "it, counting: 2 answers are its most likely tokens" in said
        and "'3456789' after '12': the output is '33333'" in said
    )


def test_what_the_model_read_decides_and_not_the_prompts_text(counter):
    """A chat template or a begin token that the evaluation left out."""
    model, tokenizer = counter
    sample = {"prompt": "something else", "answer": "89", "output": "", "correct": False}
    assert contradictions(model, tokenizer, [sample], encode=lambda prompt: [1, *range(3, 11)]) == [sample]
    assert contradictions(model, tokenizer, [sample], encode=lambda prompt: [1, *range(3, 10)]) == []


def test_an_answer_that_rounding_could_have_gone_past_is_no_contradiction(counter):
    """The answer's second token is as likely as another one."""
    model, tokenizer = copy.deepcopy(counter)
    sample = {"prompt": "12", "answer": "3456789", "output": "", "correct": False}
    assert contradictions(model, tokenizer, [sample]) == [sample]
    with torch.no_grad():
        model.lm_head.weight[5] = model.lm_head.weight[7] * (1 - 1e-6)
    assert contradictions(model, tokenizer, [sample]) == []


def test_an_answer_that_its_tokens_do_not_spell_or_that_has_no_end_contradicts_nothing(counter):
    model, tokenizer = counter
    sample = {"prompt": "12", "answer": "3456789", "output": "", "correct": False}
    assert contradictions(model, tokenizer, [{**sample, "answer": "345678x9"}]) == []
    endless = copy.deepcopy(model)
    endless.generation_config.eos_token_id = None
    assert contradictions(endless, digits(pad_token="<pad>"), [sample]) == []


ROWS = [
    ([3, 4, 5, 9], [-100, 4, 5, 9]),
    ([7, 7, 8, 9, 10, 3], [-100, -100, 8, 9, 10, 3]),
    ([5, 5], [-100, 5]),
    ([6, 6, 7], [-100, -100, -100]),
    ([4, 12], [4, 12]),
]  # the label of a first token is never scored


def by_hand(model, rows):
    nll = []
    for ids, labels in rows:
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll += [-logp[t - 1, label].item() for t, label in enumerate(labels) if t and label != -100]
    return math.exp(sum(nll) / len(nll))


def test_perplexity_is_the_exponential_of_the_mean_loss_over_scored_tokens(counter):
    expected = by_hand(counter[0].eval(), ROWS)
    for batch_size in (1, 2, 8):
        assert perplexity(counter[0], ROWS, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_hybrid_student_is_scored_like_any_model():
    student = tiny_student(torch.float32)
    rows = [(ids, [-100, *ids[1:]]) for ids in (token_ids(1, n, seed=n)[0].tolist() for n in (5, 23, 11, 2))]
    expected = by_hand(student, rows)
    assert perplexity(student, rows, batch_size=3) == pytest.approx(expected, rel=1e-4) and expected > 2
    words = Tokenizer(models.WordLevel({f"w{j}": j for j in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    examples = [Example(((" ".join(f"w{i}" for i in token_ids(1, n, seed=n)[0].tolist()), "w3"),)) for n in (19, 3, 30)]
    alone, together = (exact_match(student, tokenizer, examples, batch_size=b, max_new_tokens=12) for b in (1, 3))
    assert alone == together and len({s["output"] for s in alone.samples}) == 3


class Constant(torch.nn.Module):
    """The same logits [13] everywhere."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, 13)})


def test_a_model_that_diverged_has_no_perplexity():
    assert perplexity(Constant([0.0] * 13), ROWS) == pytest.approx(13)
    assert perplexity(Constant([5000.0] + [0.0] * 12), ROWS) == math.inf
    with pytest.raises(EvaluationError, match="log-likelihoods are not numbers"):
        perplexity(Constant([math.nan] * 13), ROWS)


def test_nothing_to_score_is_an_error(counter):
    model, tokenizer = counter
    with pytest.raises(EvaluationError, match="0 tokens of 1 rows are scored"):
        perplexity(model, [([3, 4], [-100, -100])])
    with pytest.raises(EvaluationError, match="0 tokens of 0 rows are scored"):
        perplexity(model, [])
    with pytest.raises(EvaluationError, match="row 1 has 2 tokens and 1 labels"):
        perplexity(model, [([3, 4], [3, 4]), ([3, 4], [3])])
    with pytest.raises(EvaluationError, match="0 examples"):
        exact_match(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="batch_size=0"):
        exact_match(model, tokenizer, EXAMPLES, batch_size=0)
