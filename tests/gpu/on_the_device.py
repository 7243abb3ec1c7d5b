"""What `test_second_device.py` runs in a process of its own: on the device of `second_device.py` every public path gives
the CPU's numbers, mixes no devices, and waits no more often than it is said here.
"""

import copy

import pytest
import test_alignment
import test_on_policy
import test_sparse_kd
import torch
from accelerate import Accelerator
from conftest import tiny_student, token_ids
from datasets import Dataset
from second_device import GPU, Disguised, Watch
from transformers import DynamicCache, StaticCache, TrainingArguments

from xlstm_hybrid import state
from xlstm_hybrid.training.calibration import calibrate_model

MIXED = ["hybrid_sliding", "full_attention"]
LOOK = "xlstm_hybrid/model/tokens.py:locate"


def small(**changes):
    return tiny_student(torch.float32, gain=1.0, num_hidden_layers=2, **changes)


def moved(model):
    model = copy.deepcopy(model).to(GPU)
    model.tie_weights()
    return model


def places(watch):
    """{"file:function": waits} in files of ours."""
    found = {}
    for (_, place), count in watch.ours().items():
        found[place] = found.get(place, 0) + count
    return found


def padding(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :4] = 0
    return mask


def test_the_device_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for():
    with Watch() as watch:
        x = torch.arange(6.0, device=GPU).view(2, 3)
        assert isinstance(x, Disguised) and x.device == GPU
        with pytest.raises(RuntimeError, match="aten::add: expected all tensors on one device"):
            x + torch.arange(3)
        assert x.sum().item() == 15 and bool((x > 4).any()) and x[x > 3].tolist() == [4.0, 5.0]
    assert sum(watch.waits.values()) == 4 and {name for name, _ in watch.waits} == {
        "_local_scalar_dense",
        "index by a mask",
        "_to_copy to the CPU",
    }


@pytest.mark.parametrize("kinds", [None, MIXED], ids=["hybrid", "mixed"])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_forward_and_backward_look_once_where_there_may_be_padding_and_never_else(kinds, case):
    model, ids = small(layer_types=kinds).train(), token_ids(2, 20)
    more = {"padded": {"attention_mask": padding(20)}}.get(case, {})
    if case == "packed":
        more = {"position_ids": torch.cat([torch.arange(9), torch.arange(11)]).expand(2, -1)}
    want = model(ids, labels=ids, use_cache=False, **more)
    want.loss.backward()
    with Watch():
        other, x, y = moved(model), ids.to(GPU), {name: t.to(GPU) for name, t in more.items()}
        other.zero_grad()
    with Watch() as watch:
        got = other(x, labels=x, use_cache=False, **y)
        got.loss.backward()
    looks = {} if case == "plain" else {LOOK: 1}
    if looks and kinds:  # documents that full attention has to keep apart
        looks["xlstm_hybrid/model/modeling.py:prepare"] = 1
    assert places(watch) == looks and not watch.ours("uploads")
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad.here, model.get_parameter(name).grad)


@pytest.mark.parametrize("kinds", [None, MIXED], ids=["hybrid", "mixed"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_no_decoded_token_waits(kinds, cache):
    model, ids, mask = small(layer_types=kinds).eval(), token_ids(2, 24), padding(24)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    with Watch():
        other, x, y = moved(model), ids.to(GPU), mask.to(GPU)
        more = {"max_cache_len": 40} if cache is StaticCache else {}
        past = cache(config=other.config, **more)
    with Watch():
        other(x[:, :20], attention_mask=y[:, :20], past_key_values=past)
    with Watch() as watch:
        for t in range(20, 24):
            got = other(x[:, t : t + 1], attention_mask=y[:, : t + 1], past_key_values=past).logits
    assert not places(watch) and not watch.ours("uploads")
    torch.testing.assert_close(got.here[:, 0], want[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_writes_the_same_tokens(more):
    model, ids = small(layer_types=MIXED).eval(), token_ids(2, 12)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | more
    want = model.generate(ids, **settings)
    with Watch():
        other = moved(model)
    with Watch() as watch:
        got = other.generate(ids.to(GPU), **settings)
    assert torch.equal(got.here, want) and set(places(watch)) <= {LOOK}


@torch.no_grad()
def test_a_state_is_copied_forked_taken_back_and_written(tmp_path):
    model, ids = small().eval(), token_ids(1, 16)
    want = model(ids[:, :13], use_cache=False).logits[:, -1]
    with Watch() as watch:
        other, x = moved(model), ids.to(GPU)
    with Watch() as watch:
        cache = state.prefill(other, x[:, :12])
        state.remember(cache, 2)
        other(x[:, 12:14], past_key_values=cache)
        state.rollback(cache, 2)
        forked = state.fork(state.snapshot(cache), 2)
        assert len(forked.layers[0].keys) == 2
    assert not places(watch)
    with Watch():
        state.save_state(cache, tmp_path / "state", other)
        loaded = state.load_state(tmp_path / "state", other)
        got = other(x[:, 12:13], past_key_values=loaded).logits[:, -1]
    torch.testing.assert_close(got.here, want, rtol=1e-4, atol=1e-4)


def test_calibration_gives_the_cpu_s_figures():
    model, batches = small(), [{"input_ids": token_ids(2, 24, seed=seed)} for seed in range(2)]
    want = calibrate_model(copy.deepcopy(model), batches[:1], batches[1:])
    with Watch():
        got = calibrate_model(moved(model), batches[:1], batches[1:])
    assert {j: x["after"] for j, x in got.items()} == pytest.approx({j: x["after"] for j, x in want.items()}, rel=1e-3)


# --- trainers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch):
    setup = TrainingArguments.device.fget
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: (setup(self), GPU)[1]))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: GPU))


def trained(make):
    """Waits in our files of four steps with two logs, and the losses."""
    with Watch():
        trainer = make()
    with Watch() as watch:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    return places(watch)


SETTINGS = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
SETTINGS |= {"bf16": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.01}
TRAINERS = "xlstm_hybrid/training/"
EACH_STEP = {TRAINERS + "resume.py:on_pre_optimizer_step": 4, TRAINERS + "metrics.py:on_pre_optimizer_step": 2}


def test_alignment_waits_once_a_step_and_twice_a_log(on_device, tmp_path):
    found = trained(lambda: test_alignment.trainer_of(moved(small()), tmp_path, **SETTINGS))
    looks = {LOOK: 4, "xlstm_hybrid/model/modeling.py:prepare": 4}  # two documents in a row
    assert found == EACH_STEP | looks | {TRAINERS + "alignment.py:log": 2}


def test_distillation_waits_once_a_step_and_for_what_is_scored(on_device, tmp_path):
    words = test_on_policy.word_tokenizer()
    args = test_sparse_kd.SparseKDConfig(
        output_dir=str(tmp_path), max_length=32, top_k=40, gradient_checkpointing=False, **SETTINGS
    )
    found = trained(
        lambda: test_sparse_kd.SparseKDTrainer(
            moved(small()),
            moved(test_sparse_kd.llama(2)),
            args,
            processing_class=words,
            train_dataset=test_sparse_kd.document_dataset(test_sparse_kd.documents()),
        )
    )
    assert {place: found[place] for place in EACH_STEP} == EACH_STEP
    # each micro-batch: which places are scored, that none is a document's first token, its metrics
    others = {place: count for place, count in found.items() if place not in EACH_STEP and place != LOOK}
    assert set(others) == {TRAINERS + f"distillation.py:{name}" for name in ("compute_loss", "check_targets", "record")}
    assert set(others.values()) == {4}


def test_on_policy_distillation_runs(on_device, tmp_path):
    args = test_on_policy.OnPolicyKDConfig(
        output_dir=str(tmp_path), max_completion_length=3, log_completions=False, num_completions_to_print=0, **SETTINGS
    )
    rows = Dataset.from_dict({"prompt": test_on_policy.PROMPTS, "completion": test_on_policy.COMPLETIONS})
    found = trained(
        lambda: test_on_policy.OnPolicyKDTrainer(
            moved(small()),
            moved(test_on_policy.llama(2)),
            args,
            processing_class=test_on_policy.word_tokenizer(),
            train_dataset=rows,
        )
    )
    assert {place: found[place] for place in EACH_STEP} == EACH_STEP
    assert found[TRAINERS + "on_policy.py:record_completions"] == 4  # was eleven numbers each
