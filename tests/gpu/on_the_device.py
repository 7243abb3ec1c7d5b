"""What `test_second_device.py` runs in a process of its own: on the device of `second_device.py` every public path gives
the CPU's numbers, mixes no devices, and waits no more often than it is said here.

A compiled static cache (`generate` without `disable_compile`) is not among them: Dynamo leaves code as it is while
operations are watched, and cannot trace a device that is written in Python. `tests/model/test_compile.py` compiles it on
a CPU. What transformers' own files wait for (its Trainer's look for NaN, `generate`'s for the end) is not counted.
"""

import copy

import pytest
import test_alignment
import test_on_policy
import test_schedules
import test_sparse_kd
import test_streaming
import torch
from accelerate import Accelerator
from conftest import tiny_student, token_ids
from datasets import Dataset
from second_device import GPU, Disguised, Watch
from tiny_students import mixed_checkpoint
from transformers import DynamicCache, StaticCache, TrainingArguments

from xlstm_hybrid import state
from xlstm_hybrid.teacher_store import TeacherStore, build_store
from xlstm_hybrid.training.calibration import calibrate_model, calibrate_streamed
from xlstm_hybrid.training.lm_head import Selection, TeacherTargets

MIXED = ["hybrid_sliding", "full_attention"]
LAYERS = {
    "hybrid": {},
    "mixed": {"layer_types": MIXED},
    "kept": {"kept_groups": [[0], [1]]},
    "kept windows": {
        "kept_groups": [[0], [1]],
        "teacher_layer_types": ["sliding_attention"] * 2,
        "teacher_sliding_window": 9,
    },
}
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


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_a_forward_and_a_backward_wait_for_nothing(layers, case):
    model, ids = small(**LAYERS[layers]).train(), token_ids(2, 20)
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
    assert not places(watch) and not watch.ours("uploads")
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad.here, model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "plain"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_no_decoded_token_waits(layers, cache, masked):
    model, ids = small(**LAYERS[layers]).eval(), token_ids(2, 24)
    mask = padding(24) if masked else torch.ones(2, 24, dtype=torch.long)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    with Watch():
        other, x, y = moved(model), ids.to(GPU), mask.to(GPU)
        past = cache(config=other.config, **({"max_cache_len": 40} if cache is StaticCache else {}))
    until = lambda t: {"attention_mask": y[:, :t]} if masked else {}  # noqa: E731
    with Watch() as watch:
        other(x[:, :20], past_key_values=past, **until(20))
    looks = {LOOK: 1} if masked else {}
    if layers == "kept windows" or (layers == "kept" and masked):  # each layer drops columns that no token will reach
        looks["xlstm_hybrid/model/kept_groups.py:trim"] = 2
    assert places(watch) == looks
    with Watch() as watch:
        for t in range(20, 24):
            got = other(x[:, t : t + 1], past_key_values=past, **until(t + 1)).logits
    assert not places(watch) and not watch.ours("uploads")
    torch.testing.assert_close(got.here[:, 0], want[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_a_kept_window_no_longer_reaches_is_dropped_when_the_columns_have_doubled():
    model, ids = small(**LAYERS["kept windows"]).eval(), token_ids(1, 40)
    with Watch():
        other, x = moved(model), ids.to(GPU)
        cache = state.prefill(other, x[:, :8])  # a window of 9: eight columns and the token's own
    columns, waits = [], 0
    for t in range(8, 40):
        with Watch() as watch:
            got = other(x[:, t : t + 1], past_key_values=cache).logits
        columns.append(cache.layers[0].kept.keys.shape[2])
        waits += sum(places(watch).values())
    assert (min(columns), max(columns)) == (8, 15) and waits == 2 * 32 / 8  # both layers, once in eight tokens
    torch.testing.assert_close(got.here[:, 0], model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_writes_the_same_tokens_and_looks_once_at_its_prompt(more):
    model, ids = small(layer_types=MIXED).eval(), token_ids(2, 12)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | more
    want = model.generate(ids, **settings)
    with Watch():
        other = moved(model)
    with Watch() as watch:
        got = other.generate(ids.to(GPU), **settings)
    assert torch.equal(got.here, want) and places(watch) == {LOOK: 1}


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
# a step asks whether it is finite before parameters move, a log reads all its numbers at once
EACH_STEP = {TRAINERS + "resume.py:on_pre_optimizer_step": 4, TRAINERS + "metrics.py:read": 2}


def test_alignment_waits_once_a_step_and_once_a_log(on_device, tmp_path):
    found = trained(lambda: test_alignment.trainer_of(moved(small()), tmp_path, **SETTINGS))  # two documents in a row
    assert found == EACH_STEP


def distillation(folder, teacher, data=None):
    args = test_sparse_kd.SparseKDConfig(
        output_dir=str(folder), max_length=32, top_k=20, gradient_checkpointing=False, **SETTINGS
    )
    rows = test_sparse_kd.document_dataset(test_sparse_kd.documents()) if data is None else data
    words = test_on_policy.word_tokenizer()
    student = moved(small(layer_types=MIXED))
    return test_sparse_kd.SparseKDTrainer(student, teacher, args, processing_class=words, train_dataset=rows)


def test_distillation_waits_once_a_step_and_once_a_log(on_device, tmp_path):
    assert trained(lambda: distillation(tmp_path, moved(test_sparse_kd.llama(2)))) == EACH_STEP


def test_a_teacher_store_is_written_from_the_device_and_trains_on_it(on_device, tmp_path):
    data = test_sparse_kd.document_dataset(test_sparse_kd.documents())
    stores = []
    for place, teacher in {"cpu": test_sparse_kd.llama(2), "gpu": test_sparse_kd.llama(2)}.items():
        with Watch():
            teacher = moved(teacher) if place == "gpu" else teacher
            targets = TeacherTargets(teacher, Selection(k=20, size=61))
            build_store(tmp_path / place, list(data), targets, k=20, vocab_size=61)
        stores.append(TeacherStore(tmp_path / place))
    for n in range(len(data)):
        mine, theirs = (store.row(n) for store in stores)
        assert (mine.ids == theirs.ids).all() and mine.logp == pytest.approx(theirs.logp, abs=4e-3)  # float16
    assert trained(lambda: distillation(tmp_path, stores[1], data)) == EACH_STEP


def test_delta_distillation_waits_once_a_step_and_once_a_log(on_device, tmp_path):
    args = test_schedules.DeltaKDConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **SETTINGS)
    shared = {"processing_class": test_on_policy.word_tokenizer(), "train_dataset": test_schedules.rows()}
    student, teacher = test_schedules.llama(1), test_schedules.llama(2, layers=3)
    found = trained(lambda: test_schedules.DeltaKDTrainer(moved(student), moved(teacher), args, **shared))
    assert found == EACH_STEP


def test_on_policy_distillation_waits_for_what_the_student_writes_and_once_a_step_and_a_log(on_device, tmp_path):
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
    assert found == EACH_STEP | {LOOK: 4, TRAINERS + "rollouts.py:sample_completions": 4}


# --- a student directory, some layers at a time ----------------------------------------------------------------------


def test_streamed_alignment_on_the_device_gives_the_cpu_s_figures(request, tmp_path):
    checkpoint = mixed_checkpoint(tmp_path / "student")
    settings = {"max_steps": 2, "layers_at_a_time": 2}
    want = test_streaming.streamed(checkpoint, tmp_path / "cpu", **settings)
    request.getfixturevalue("on_device")
    with Watch():
        got = test_streaming.streamed(checkpoint, tmp_path / "gpu", **settings)
    for mine, theirs in zip(got["relative_error"], want["relative_error"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_streamed_calibration_on_the_device_gives_the_cpu_s_figures(tmp_path):
    checkpoint = mixed_checkpoint(tmp_path / "student")
    batches = [{"input_ids": token_ids(2, 24, seed=seed)} for seed in range(2)]
    found = []
    for device in ("cpu", GPU):
        with Watch():
            out = tmp_path / str(device).replace(":", "")
            found.append(calibrate_streamed(checkpoint, out, batches[:1], batches[1:], device=device))
    want, got = ([x["after"] for x in figures.values()] for figures in found)
    assert got == pytest.approx(want, rel=1e-3)
