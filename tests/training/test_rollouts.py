"""Sampling for on-policy training: a prompt is read once, a seed decides, and each completion ends where it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import enlarge, tiny_student
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from xlstm_hybrid.training.rollouts import PromptSampler, sample_completions, seed_from, until_eos

VOCAB, EOS = 61, 2


def llama(seed=0):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return enlarge(LlamaForCausalLM(config), seed=seed, gain=1.5)


def hybrid(gain=1.0):
    return tiny_student(torch.float32, gain=gain, num_hidden_layers=2)


def config(**changes):
    return GenerationConfig(
        **{"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "eos_token_id": [EOS], "top_k": 0} | changes
    )


# one shorter than the sinks, one far beyond the window
IDS = [[5, 9], list(range(7, 27)), [11], [40, 3, 8, 51, 22, 9, 17]]


@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_greedy_completions_are_those_of_each_prompt_alone(kind):
    """Prompts of different length, read once in pieces, forked three ways."""
    model = hybrid(gain=2.5) if kind == "hybrid" else llama(1)
    got = sample_completions(model, IDS, 3, config(do_sample=False), seed=0, piece=4)
    wanted = [
        model.generate(torch.tensor([ids]), generation_config=config(do_sample=False), use_cache=False)[
            0, len(ids) :
        ].tolist()
        for ids in IDS
    ]
    assert got == [until_eos(ids, EOS) for ids in wanted for _ in range(3)]
    assert len({tuple(ids) for ids in got}) == 4


def test_each_prompt_is_read_once_however_many_completions_it_gets():
    student, read = hybrid(), []
    student.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    completions = sample_completions(student, IDS, 5, config(eos_token_id=None), seed=1)
    assert [len(ids) for ids in completions] == [12] * 20
    assert read == [4 * 19] + [20] * 12  # the prompts but for their last tokens, then one token per completion and step


def test_a_seed_decides_the_completions_and_nothing_else_is_touched():
    student = tiny_student(torch.float32, gain=1.0, num_hidden_layers=2, attention_dropout=0.5)
    wanted = sample_completions(student, IDS, 4, config(), seed=1)
    student.gradient_checkpointing_enable()
    student.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample_completions(student, IDS, 4, config(), seed=1)
    assert first == wanted  # no dropout while it writes
    torch.rand(3)
    assert (
        sample_completions(student, IDS, 4, config(), seed=1)
        == first
        != sample_completions(student, IDS, 4, config(), seed=2)
    )
    assert len({tuple(ids) for ids in first[4:8]}) > 1  # the copies of a state go ways of their own
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), before) and student.training and student.is_gradient_checkpointing
    sample_completions(student, IDS, 4, config(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_students_distribution():
    """4,000 first tokens of one prompt, temperature 0.7: counts within five standard deviations of the softmax."""
    student, n = hybrid(), 4000
    got = torch.tensor(
        [ids[0] for ids in sample_completions(student, IDS[3:], n, config(max_new_tokens=1, temperature=0.7), seed=3)]
    ).bincount(minlength=VOCAB)
    p = (student(torch.tensor(IDS[3:])).logits[0, -1] / 0.7).softmax(-1)
    assert ((got - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_a_completion_ends_with_its_first_end_also_where_padding_is_an_end():
    assert until_eos([5, 2, 2, 2], 2) == [5, 2] and until_eos([2, 0, 0], [7, 2]) == [2]
    assert until_eos([5, 6], [2]) == [5, 6] and until_eos([5, 2], None) == [5, 2]


def test_the_order_of_prompts_depends_on_the_epoch_and_not_on_what_was_read_before():
    def order(sampler, epoch):
        sampler.set_epoch(epoch)
        return list(sampler)

    first, late = (PromptSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5) for _ in range(2))
    epochs = [order(first, epoch) for epoch in range(4)]
    assert order(late, 3) == epochs[3] and len({tuple(e) for e in epochs}) == 4
    for indices in epochs:
        # twice the same step, each prompt twice in it
        assert len(indices) == 24 and indices[:6] == indices[6:12] and indices[0] == indices[1]
    assert seed_from(5, 1) != seed_from(51) and 0 <= seed_from("a") < 2**63


# --- many processes ----------------------------------------------------------------------------------------------


RUN = """
import os, sys, torch
import test_on_policy as t
from datasets import Dataset
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

out, size, lmbda = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
args = OnPolicyKDConfig(out, bf16=False, use_cpu=True, report_to="none", save_strategy="no", per_device_train_batch_size=size, max_steps=3,
                        max_completion_length=8, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant", lmbda=lmbda,
                        log_completions=False, gradient_checkpointing=False, seq_kd=0 < lmbda < 1)
data = Dataset.from_dict({"prompt": t.PROMPTS, "completion": t.COMPLETIONS})
trainer = OnPolicyKDTrainer(t.with_eos(t.hybrid(), 3.0), t.llama(2), args, processing_class=t.word_tokenizer(), train_dataset=data)
seen, complete = [], trainer.complete
trainer.complete = lambda rows: seen.append(complete(rows)) or seen[-1]
trainer.train()
full = {n.replace("module.", ""): p.detach() for n, p in trainer.model.named_parameters()}
torch.save((full, [step[1] for step in seen]), f"{out}-{os.environ.get('RANK', 0)}.pt")
"""


def trained(folder, name, processes, lmbda):
    """`[(weights, completions per step)]` of each process of a run that trains on four completions per step."""
    (folder / "run.py").write_text(RUN)
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    paths = [str(here), str(root / "tests"), str(root / "src"), str(root / "kernels")]
    launch = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    command = [sys.executable, *launch, str(folder / "run.py"), str(folder / name), str(4 // processes), str(lmbda)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": ":".join(paths)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder / name}-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """On the data's completions, where both see the same rows."""
    (wanted, _), *_ = trained(tmp_path, "one", 1, 0.0)
    for weights, _ in trained(tmp_path, "ddp", 2, 0.0):
        torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_each_process_writes_its_own_and_all_learn_from_both(tmp_path):
    """Student and teacher write, and completions end at different steps."""
    (first, written), (second, others) = trained(tmp_path, "ddp", 2, 0.5)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert written != others and len({len(ids) for step in [*written, *others] for ids in step}) > 2


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapters"])
@pytest.mark.parametrize(
    "own",
    [
        {"min_new_tokens": 12},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [EOS, *range(3, 40)]},
        {"repetition_penalty": 3.0},
        {"sequence_bias": [[[30], 100.0]]},
        {"forced_eos_token_id": 7},
        {"bad_words_ids": [[n] for n in range(3, 40)]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_checkpoint_s_generation_settings_have_no_part_in_samples(own, wrapped):
    model = hybrid(gain=2.5)
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    often = [EOS, 33]  # ends that come early
    plain = sample_completions(model, IDS, 4, config(eos_token_id=often), seed=1)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert sample_completions(model, IDS, 4, config(eos_token_id=often), seed=1) == plain
    # what is asked for has its part, and the model keeps what it had
    asked = config(eos_token_id=often, **{name: value for name, value in own.items() if name != "forced_eos_token_id"})
    assert sample_completions(model, IDS, 4, asked, seed=1) != plain or "forced_eos_token_id" in own
    base = model.get_base_model() if wrapped else model
    assert all(getattr(m.generation_config, name) == value for m in (model, base) for name, value in own.items())
