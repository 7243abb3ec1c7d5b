"""A plan counts what a model is, predicts the memory that training takes, and says what does not fit. Peaks are those
of torch's CPU allocator.
"""

import gc
import json
from dataclasses import replace

import pytest
import torch
from tiny_teachers import EVERY, teacher, teacher_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, Qwen2Config, Qwen2MoeConfig, Qwen3MoeConfig
from typer.testing import CliRunner
from xlstm_kernels.backends import choose
from xlstm_kernels.backends.scratch import LOCAL
from xlstm_kernels.mlstm import op as mlstm
from xlstm_kernels.step import op as step

from xlstm_hybrid import XLSTMHybridForCausalLM, cli
from xlstm_hybrid.commands.plan import plan_lines
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.data import collate
from xlstm_hybrid.errors import CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.pipeline.settings import trainer_config
from xlstm_hybrid.planning import run as plan
from xlstm_hybrid.planning.training_memory import layer_activations

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
H100S = plan.machine_of(8, 80e9)


def llama_8b(**changes):
    return plan.student_shape(LlamaConfig(**LLAMA_8B | changes))


# --- counts ----------------------------------------------------------------------------------------------------


def test_parameters_are_those_that_the_papers_models_have():
    assert llama_8b().teacher == 8_030_261_248
    qwen = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    shape = plan.student_shape(qwen)
    assert shape.teacher == 7_615_616_512 and (shape.L, shape.H, shape.K) == (28, 28, 128)


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_counted_as_its_model_has_it(family):
    config = teacher_config(family)
    shape, student = plan.student_shape(config), XLSTMHybridForCausalLM(student_config(config))
    parameters = dict(student.named_parameters())
    assert shape.student == sum(p.numel() for p in parameters.values())
    assert shape.new == sum(p.numel() for n, p in parameters.items() if ".mlstm." in n) == shape.student - shape.teacher
    with FlopCounterMode(display=False) as counter:
        teacher(family)(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert 2 * (shape.matmul + shape.head) == counted.get("aten.mm", 0) + counted.get("aten.addmm", 0)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (
            Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
            30_532_122_624,
            30_532_122_624 - 48 * 120 * 3 * 768 * 2048,
        ),
        (Qwen2MoeConfig(), 14_315_784_192, 14_315_784_192 - 24 * 56 * 3 * 1408 * 2048),
        (OlmoeConfig(intermediate_size=1024), 6_919_161_856, 6_919_161_856 - 16 * 56 * 3 * 1024 * 2048),
    ],
    ids=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B", "OLMoE-1B-7B"],
)
def test_parameters_of_experts_are_active_as_far_as_a_token_goes_through_them(config, total, active):
    made = plan.plan(config, H100S)
    assert (made.shape.teacher, made.shape.teacher - made.shape.idle) == (total, active)
    text = " ".join(line for line in plan_lines(made) if isinstance(line, str))
    assert f"{active:,} parameters of the teacher" in text and "not measured" in " ".join(made.assumptions)


def test_a_layer_that_keeps_attention_costs_no_mixer():
    kinds = ["full_attention"] * 31 + ["hybrid_sliding"]
    mixed, job = plan.student_shape(LlamaConfig(**LLAMA_8B), layer_types=kinds), plan.jobs_of()["align"]
    assert mixed.hybrid == 1 and mixed.new * 32 == llama_8b().new
    setting = plan.Setting(1, 8, False, "DDP")
    whole = plan.training_bytes(llama_8b(), job, setting, H100S)["activations"]
    assert plan.training_bytes(mixed, job, setting, H100S)["activations"] * 32 == pytest.approx(whole)


@pytest.mark.parametrize(("window", "length"), [(5, 12), (12, 12), (40, 12), (1, 12)])
def test_the_mean_number_of_visible_keys_is_counted_by_hand(window, length):
    assert plan.mean_visible(window, length) == pytest.approx(sum(min(t + 1, window) for t in range(length)) / length)


# --- memory ----------------------------------------------------------------------------------------------------


def peak(run):
    """Bytes that torch's CPU allocator held at most while `run()` ran, beyond what it held before; the kernels' kept
    buffers count.
    """
    LOCAL.__dict__.clear()
    gc.collect()  # what is freed meanwhile would count as less
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    return most


def trained(kind, work, rows, length, bf16, checkpointing, mixer, **fields):
    """`(measured, predicted)` bytes of two steps of two micro-batches with the trainer of a stage; `mixer`: fields of
    the student.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), eos_token="a", pad_token="b"
    )
    kind_of_teacher = Qwen3MoeConfig if "num_experts" in fields else LlamaConfig
    config = kind_of_teacher(bos_token_id=None, eos_token_id=None, max_position_embeddings=length, **fields)
    student = XLSTMHybridForCausalLM(student_config(config, sliding_window=64, num_sink_tokens=4, **mixer))
    ids = torch.randint(0, config.vocab_size, (4 * rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list(
        [{"input_ids": i, "labels": [-100, *i[1:]], "position_ids": list(range(length))} for i in ids]
    )
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 2,
        "bf16": bf16,
        "disable_tqdm": True,
    }
    settings |= {"gradient_checkpointing": checkpointing} | ({"top_k": 32} if kind == "distill" else {})
    shared = {"data_collator": collate, "processing_class": tokenizer, "train_dataset": data}
    if kind == "align":
        from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer

        held = [student]
        trainer = AlignmentTrainer(student, args=trainer_config(AlignmentConfig, settings, kind, work, 0), **shared)
    else:
        from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

        held = [student, AutoModelForCausalLM.from_config(config, experts_implementation="eager")]
        trainer = SparseKDTrainer(
            student, held[1], args=trainer_config(SparseKDConfig, settings, kind, work, 0), **shared
        )
    before = sum(p.nbytes for model in held for p in model.parameters())
    measured = before + peak(trainer.train)
    job = plan.Job(kind, 2, 2 * rows, length, top_k=32, bf16=bf16)
    setting, machine = plan.Setting(rows, 2, checkpointing, "one GPU"), plan.Machine(1, 1e12, device="cpu")
    return measured, sum(
        plan.training_bytes(plan.student_shape(config, sliding_window=64, **mixer), job, setting, machine).values()
    )


def shape(D, F, H, G, L, V, **more):
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    return dict(zip(names, (D, F, H, G, L, V), strict=True)) | more


SMALL, WIDE = shape(128, 320, 4, 2, 4, 512), shape(256, 1024, 8, 2, 4, 8192)
DEEP, HEAVY = shape(256, 768, 4, 2, 8, 1024, tie_word_embeddings=True), shape(384, 1024, 6, 2, 6, 2048)
SIGNED = {"memory_feature_map": "softmax_signed"}
EXPERTS = SMALL | {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
CASES = {  # stage, rows, length, bfloat16, checkpointing, model, mixer
    "align": ("align", 4, 512, True, False, SMALL, {}),
    "distil": ("distill", 2, 256, False, False, SMALL, {}),
    "align, four times the features": ("align", 2, 512, True, False, SMALL, SIGNED | {"memory_feature_dim": 64}),
}
MORE = {
    "distil, checkpointing": ("distill", 2, 512, True, True, WIDE, {}),
    "distil, experts": ("distill", 2, 512, False, False, EXPERTS, {}),
    "distil, experts, bfloat16": ("distill", 4, 512, True, False, EXPERTS, {}),
    "distil, experts, checkpointing": ("distill", 4, 512, False, True, EXPERTS, {}),
    "align, experts": ("align", 2, 512, True, False, EXPERTS, {}),
    "align in float32": ("align", 2, 512, False, False, DEEP, {}),
    "align a wide model": ("align", 2, 512, True, False, WIDE, {}),
    "distil, tied": ("distill", 4, 256, True, False, DEEP, {}),
    "distil, wide": ("distill", 2, 512, False, False, WIDE, {}),
    "distil, few tokens": ("distill", 1, 128, False, False, HEAVY, {}),
    "distil, checkpointing, float32": ("distill", 4, 512, False, True, SMALL, {}),
    "distil, signed": ("distill", 2, 256, False, False, SMALL, SIGNED),
    "distil, linear, twice the features": (
        "distill",
        2,
        256,
        True,
        False,
        SMALL,
        {"memory_cell": "linear", "memory_feature_dim": 64},
    ),
    "align, twice the features, float32": ("align", 2, 256, False, False, DEEP, {"memory_feature_dim": 128}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_memory_model_agrees_with_what_torch_allocates(tmp_path, case):
    *how, fields, mixer = (CASES | MORE)[case]
    measured, predicted = trained(how[0], tmp_path, *how[1:], mixer, **fields)
    print(
        f"{case}: measured {measured / 1e6:.1f} MB, predicted {predicted / 1e6:.1f} MB, {predicted / measured - 1:+.1%}"
    )
    assert predicted == pytest.approx(measured, rel=plan.ERROR)


def kept_for_the_backward(config, bf16, mixer):
    """Bytes that autograd keeps of one pass over 512 tokens, parameters left out."""
    model, held = XLSTMHybridForCausalLM(student_config(config, **mixer)).train(), {}

    def keep(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = model.model(torch.arange(512)[None] % config.vocab_size, use_cache=False)
    for p in model.parameters():
        held.pop(p.untyped_storage().data_ptr(), None)
    del out  # until here what is kept has addresses of its own
    return sum(held.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_what_more_features_keep_for_the_backward_is_counted_to_two_percent(bf16):
    config, job = LlamaConfig(**shape(512, 512, 8, 8, 1, 64)), plan.Job("distill", 1, 1, 512, bf16=bf16)
    # as many features as the head dim, 64, and three times as many
    mixers = [SIGNED | {"memory_feature_dim": columns} for columns in (32, 96)]
    plain, wide = (kept_for_the_backward(config, bf16, mixer) for mixer in mixers)
    predicted = [512 * layer_activations(plan.student_shape(config, **mixer), job) for mixer in mixers]
    assert predicted[1] - predicted[0] == pytest.approx(wide - plain, rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_token_keeps_for_each_of_its_experts_is_counted_to_ten_percent(bf16):
    sizes = shape(256, 512, 4, 4, 1, 64) | {"head_dim": 64, "num_experts": 8}
    job, kept, predicted = plan.Job("distill", 1, 1, 512, bf16=bf16), [], []
    for k in (1, 5):
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=k, moe_intermediate_size=128)
        kept.append(kept_for_the_backward(config, bf16, {}))
        predicted.append(512 * layer_activations(plan.student_shape(config), job))
    assert predicted[1] - predicted[0] == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_sharding_divides_what_is_sharded_and_nothing_else():
    shape_, job = llama_8b(), plan.jobs_of()["distill"]
    one = plan.training_bytes(shape_, job, plan.Setting(1, 64, True, "one GPU"), plan.machine_of(1, 80e9))
    eight = plan.training_bytes(shape_, job, plan.Setting(1, 8, True, "FSDP2"), H100S)
    for name in ("weights", "gradients", "Adam", "teacher"):
        assert eight[name] * 8 == one[name]
    assert (
        eight["layer inputs"] == one["layer inputs"] and eight["gathered layers"] > 0 and "gathered layers" not in one
    )


# --- choosing --------------------------------------------------------------------------------------------------


def test_the_papers_run_fits_on_its_eight_gpus_and_not_on_one_of_24_gigabytes():
    found = plan.plan(LlamaConfig(**LLAMA_8B), H100S)
    assert found.fits and found.stages["distill"].setting.strategy == "FSDP2"
    assert found.jobs["align"].tokens == 655_360_000 and found.jobs["distill"].tokens == pytest.approx(5e9, rel=1e-3)
    small = plan.plan(LlamaConfig(**LLAMA_8B), plan.machine_of(1, 24e9))
    assert not small.fits and small.stages["distill"].peak > 24e9


def test_the_choice_fits_gives_the_rows_per_step_and_nothing_that_fits_is_quicker():
    shape_, job = llama_8b(), plan.jobs_of()["distill"]
    best = plan.choose(shape_, job, H100S)
    assert best.fits and best.setting.micro * best.setting.accumulation * 8 == job.sequences
    others = [plan.estimate(shape_, job, s, H100S) for s in plan.settings_for(job, H100S)]
    assert not any(o.fits and o.tokens_per_second > best.tokens_per_second for o in others)
    assert any(not o.fits for o in others)


def test_gpus_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ConfigError, match="64 rows per step cannot be shared by 7 GPUs"):
        plan.choose(llama_8b(), plan.jobs_of()["align"], plan.machine_of(7, 80e9))


def test_a_store_of_256_entries_over_5_billion_tokens_is_terabytes():
    found = plan.plan(LlamaConfig(**LLAMA_8B), H100S)
    assert (
        found.store["stores"][256] == found.jobs["distill"].tokens * (6 * 256 + 8)
        and 7e12 < found.store["stores"][256] < 8e12
    )
    assert found.stages[plan.STORE].tokens_per_second > found.stages["distill"].tokens_per_second
    assert "teacher" not in found.stages[plan.STORE].memory


def test_time_is_flops_over_what_the_gpus_give():
    shape_, job = llama_8b(), plan.jobs_of()["distill"]
    found = plan.estimate(shape_, job, plan.Setting(1, 8, False, "FSDP2"), H100S)
    dense = 2 * (shape_.matmul + shape_.head) * 4  # three forwards of the student, one of the teacher
    assert dense < 8 * 989e12 * 0.35 / found.tokens_per_second < 1.25 * dense
    assert found.seconds == pytest.approx(job.tokens / found.tokens_per_second)


def test_more_features_cost_their_products_by_hand():
    config, length, L = LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 1}), 4096, 64
    plain, wide, signed = (
        plan.student_shape(config, **m) for m in ({}, {"memory_feature_dim": 256}, {"memory_feature_dim": 128} | SIGNED)
    )

    def products(P, F):  # maps; scores and values of half a chunk; state, two
        return 2 * (2 * 128 * P) + 2 * (F + 128) * L / 2 + 2 * (2 * F * 128)

    for shape_, P, F in ((wide, 256, 256), (signed, 128, 256)):
        assert plan.mixer_flops(shape_, length) - plan.mixer_flops(plain, length) == 32 * (
            products(P, F) - products(128, 128)
        )
    assert wide.student - plain.student == 32 * 2 * 128 * 128 and signed.student == plain.student


def test_a_plan_warns_of_what_has_no_kernel_for_so_many_features():
    small, large = (LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 1, "head_dim": K}) for K in (64, 128))
    assert not plan.slow_paths(plan.student_shape(small, memory_feature_dim=128)) and not plan.slow_paths(
        plan.student_shape(large)
    )
    (long,) = plan.slow_paths(plan.student_shape(large, **SIGNED))
    assert "training and prompts" in long and "up to 128 features per head, this student has 256" in long
    long, step = plan.slow_paths(plan.student_shape(large, memory_feature_dim=384))
    assert "fused step" in step and "up to 256 features per head, this student has 384" in step
    assert not plan.slow_paths(plan.student_shape(large, layer_types=["full_attention"], **SIGNED))


@pytest.mark.parametrize(
    ("K", "F", "kernels"), [(64, 128, {"mlstm", "hybrid_step"}), (128, 256, {"hybrid_step"}), (128, 288, set())]
)
def test_the_kernels_are_chosen_as_the_warnings_say(monkeypatch, K, F, kernels):
    monkeypatch.setattr(choose, "runs_right", lambda *question: True)  # a GPU whose kernels have proven right
    phi, q, v, gate = (torch.zeros(1, 8, 2, *d) for d in ((F,), (K,), (K,), ()))
    found = {"mlstm": mlstm.choose_backend(phi, phi, v, gate, gate, None)}
    found["hybrid_step"] = step.choose_backend(q, v, torch.zeros(1, 2, F, K), torch.zeros(1, 2, 5, K))
    assert {name for name, backend in found.items() if backend == "triton"} == kernels
    config = LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 1, "head_dim": K})
    assert len(plan.slow_paths(plan.student_shape(config, memory_feature_dim=F))) == 2 - len(kernels)


def test_checkpointing_costs_one_more_forward_of_the_student():
    shape_, job = llama_8b(), replace(plan.jobs_of()["distill"], stored=True)
    plain, checkpointed = (plan.flops_per_token(shape_, job, on) for on in (False, True))
    assert checkpointed / plain == pytest.approx(4 / 3)
    online = replace(job, stored=False)  # the teacher's forward costs the same in both
    assert plan.flops_per_token(shape_, online, True) - plan.flops_per_token(shape_, online) == pytest.approx(
        checkpointed - plain
    )


def test_what_fits_leaves_the_reserve_free():
    shape_, job, setting = llama_8b(), plan.jobs_of()["align"], plan.Setting(1, 64, False, "one GPU")
    peak = plan.estimate(shape_, job, setting, plan.machine_of(1, 1e12)).peak
    assert not plan.estimate(shape_, job, setting, plan.machine_of(1, 1.05 * peak)).fits  # 8 % stay free
    assert plan.estimate(shape_, job, setting, plan.machine_of(1, 1.1 * peak)).fits


def test_every_expert_takes_time_and_disk():
    shape_, one = llama_8b(), plan.jobs_of()["distill"]
    three, setting = replace(one, experts=3), plan.Setting(1, 8, True, "FSDP2")
    found = [plan.estimate(shape_, job, setting, H100S) for job in (one, three)]
    assert (
        found[1].seconds == pytest.approx(3 * found[0].seconds)
        and found[1].tokens_per_second == found[0].tokens_per_second
    )
    assert plan.disk_of(shape_, three)["experts"] == 3 * plan.disk_of(shape_, one)["experts"] == 12 * shape_.student
    assert plan.store_costs(shape_, three, H100S)["online_seconds"] == pytest.approx(
        3 * plan.store_costs(shape_, one, H100S)["online_seconds"]
    )


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_every_stage_and_every_assumption_and_fails_when_something_does_not_fit(tmp_path):
    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path)
    result = CliRunner().invoke(
        cli.app, ["plan", str(tmp_path), "--gpus", "8", "--memory", "80", "--json", str(tmp_path / "plan.json")]
    )
    assert result.exit_code == 0, result.output
    for words in (
        "8,030,261,248 parameters",
        "align",
        "distill",
        "FSDP2",
        "TB",
        "none of them measured on a GPU",
        "35%",
    ):
        assert words in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] and written["stages"]["distill"]["memory"]["teacher"] > 0
    result = CliRunner().invoke(cli.app, ["plan", str(tmp_path), "--gpus", "1", "--memory", "24"])
    assert result.exit_code == 1 and "short" in result.output and "What does not fit" in result.output


def test_what_cannot_be_planned_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        plan.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedTeacherError, match="'gpt2'"):
        plan.read_config(tmp_path)
    with pytest.raises(ConfigError, match="we know the peak of a100"):
        plan.machine_of(1, 1e9, "tpu")
    with pytest.raises(ConfigError, match="0 GPUs"):
        plan.machine_of(0, 1e9)
