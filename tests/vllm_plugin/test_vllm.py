"""vLLM writes what `generate` writes: prompts in pieces, rows that come and go, preemption; no slot is lost or mixed up."""

import pytest

pytest.importorskip("vllm", reason="make test-vllm installs it")

import sys
from types import SimpleNamespace

import torch
from conftest import tiny_config, tiny_student
from engines import NEW, Engine, ours, prompts, student

from xlstm_hybrid.errors import CacheError, CheckpointError, CompatibilityError, CompatibilityWarning, ConfigError
from xlstm_hybrid.model.configuration import TRAITS
from xlstm_hybrid.vllm import state
from xlstm_hybrid.vllm.checks import StudentSettings
from xlstm_hybrid.vllm.model import XLSTMHybridForCausalLM
from xlstm_hybrid.vllm.tensor_parallel import part_of, share_of

FAMILIES = "llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3"
STUDENTS = {
    **{f"{family}, hybrid": {"family": family} for family in FAMILIES},
    **{f"{family}, mixed": {"family": family, "kinds": "mixed"} for family in ("llama", "qwen2", "olmo3")},
    "smollm3, mixed": {"family": "smollm3", "kinds": "mixed"},  # layers without RoPE
    "granite, mixed": {"family": "granite", "kinds": "mixed"},  # multipliers
    "gemma3, mixed": {"family": "gemma3_text", "kinds": "mixed"},  # norms on both sides, capped logits
    "qwen3-moe, mixed": {"family": "qwen3_moe", "kinds": "mixed"},
    "qwen2-moe, mixed": {"family": "qwen2_moe", "kinds": "mixed"},  # with an expert for all tokens
    "olmoe, hybrid": {"family": "olmoe", "teacher": {"hidden_size": 192}},
    "kept groups": {"family": "qwen3", "kept_groups": [[0], [], [1]]},
    "unlike layers": {
        "family": "olmo3",
        "kept_groups": [[0], [1], []],
        "kept_positions": "log",
        "layer_windows": [5, 7, 9],
        "layer_sinks": [0, 3, 1],
    },
    "other mixers": {
        "mixer_norm": True,
        "memory_feature_map": "softmax_signed",
        "memory_feature_dim": 24,
        "memory_rope": False,
        "mixer_gate_input": "x",
    },
    "linear memory": {"memory_cell": "linear"},
    "the teacher's layers": {"family": "mistral", "kinds": ["sliding_attention"] * 3},
}
CUT = {  # students whose parts two processes calculate
    "kept groups, as many in each": {
        "family": "qwen3",
        "teacher": {"intermediate_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4},
        "kept_groups": [[0, 2], [], [1, 3]],
    },
    "mixed; a norm over all heads, one group in both": {
        "family": "olmo3",
        "kinds": "mixed",
        "teacher": {"intermediate_size": 40, "num_key_value_heads": 1},
    },
    "biases, a norm of the mix": {
        "teacher": {"intermediate_size": 40},
        "mixer_norm": True,
        "memory_feature_dim": 24,
        "mixer_gate_input": "x",
    },
}
LENGTHS = 5, 20, 1, 40, 33, 2, 7, 9, 12, 31, 17, 8


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A function that makes an `Engine` and takes the one before away."""
    made = []

    def make(model, **settings):
        while made:
            made.pop().close()
        made.append(Engine(model, tmp_path_factory.mktemp("student"), **settings))
        return made[0]

    yield make
    while made:
        made.pop().close()


@pytest.mark.parametrize("fields", STUDENTS.values(), ids=STUDENTS)
def test_greedy_tokens_are_those_of_generate(engine, fields):
    """12 prompts, some in pieces of at most 32 tokens beside rows that are written, 8 at a time."""
    model, texts = student(**fields), prompts(LENGTHS)
    served = engine(model)
    free = served.free
    assert served.write(texts) == [ours(model, text) for text in texts]
    assert served.free == free


@pytest.mark.skipif("runner_v2" in sys.modules, reason="processes that vLLM starts have no interpreter of Triton's")
@pytest.mark.parametrize("fields", CUT.values(), ids=CUT)
def test_two_processes_write_what_one_writes(engine, fields):
    """Each has half of the heads, of every state and of the vocabulary's 97 or 101 rows; prompts in pieces, as above."""
    model, texts = student(**fields), prompts(LENGTHS)
    served = engine(model, tensor_parallel_size=2)
    free = served.free
    assert served.write(texts) == [ours(model, text) for text in texts]
    assert served.free == free


class TestManyRequests:
    """One student, one engine: every test leaves it empty."""

    @pytest.fixture(scope="class")
    def model(self):
        return student("qwen3")

    @pytest.fixture(scope="class")
    def served(self, engine, model):
        return engine(model, max_num_seqs=16, max_num_batched_tokens=48)

    def test_64_prompts_of_different_lengths(self, served, model):
        texts = prompts(range(1, 129, 2))
        assert len({len(text) for text in texts}) == 64
        assert served.write(texts, 24) == [ours(model, text, 24) for text in texts]

    def test_rows_join_and_leave(self, served, model):
        """One request more in each step, every third is aborted two steps after it came."""
        texts, free = prompts([(7 * j) % 61 + 1 for j in range(30)], seed=1), served.free
        for j, text in enumerate(texts):
            served.add(f"row {j}", text, 5 + j % 11)
            served.step()
            if j >= 2 and j % 3 == 2:
                served.engine.abort_request([f"row {j - 2}"])
        written = served.finish()
        whole = [j for j in range(30) if j % 3 or j >= 28]
        assert {j: written[f"row {j}"] for j in whole} == {j: ours(model, texts[j], 5 + j % 11) for j in whole}
        assert served.free == free

    def test_a_step_of_rows_and_prompts_at_every_stage_is_each_of_them_alone(self, served, model, monkeypatch):
        """One flat batch of what several requests want: one token each, a prompt's first piece, a piece of another."""
        parts_of, steps, texts = state.parts_of, [], prompts((3, 9, 90, 20, 60), seed=6)

        def noted(*args):
            parts = parts_of(*args)
            steps.append({("row", "piece", "prompt")[p.fresh + (p.fresh or p.tokens.real.shape[1] > 1)] for p in parts})
            return parts

        monkeypatch.setattr(state, "parts_of", noted)
        assert served.write(texts) == [ours(model, text) for text in texts]
        assert {"row", "piece", "prompt"} in steps

    def test_preempted_requests_go_on_as_if_nothing_had_been(self, served, model):
        texts = prompts((3, 50, 29, 11, 64, 1), seed=2)
        for j, text in enumerate(texts):
            served.add(f"again {j}", text)
        for _ in range(3):
            for _ in range(4):
                served.step()
            assert served.llm.reset_prefix_cache(reset_running_requests=True)
        written = served.finish()
        assert [written[f"again {j}"] for j in range(6)] == [ours(model, text) for text in texts]

    def test_1000_requests_lose_no_slot(self, served, model):
        lengths, free = [(5 * j) % 23 + 1 for j in range(1000)], served.free
        texts = prompts(lengths, seed=3)
        written = served.write(texts, 3)
        assert served.free == free and len(served.running) <= 16  # the last step's leave with the next
        assert [written[j] for j in range(0, 1000, 50)] == [ours(model, texts[j], 3) for j in range(0, 1000, 50)]

    def test_a_slot_that_is_another_texts_is_an_error(self, served, monkeypatch):
        parts_of = state.parts_of
        for j, text in enumerate(prompts((5, 9))):
            served.add(f"mixed up {j}", text)
        served.step()
        monkeypatch.setattr(state, "parts_of", lambda starts, lengths, slots: parts_of(starts, lengths, slots.flip(0)))
        with pytest.raises(
            CacheError, match="after 5 tokens, expected 9.*another text|after 9 tokens, expected 5.*another"
        ):
            served.step()
        monkeypatch.undo()
        served.engine.abort_request(["mixed up 0", "mixed up 1"])
        served.finish()

    def test_tokens_show_a_slot_that_is_another_texts_of_the_same_length(self, served, model, monkeypatch):
        """What the comparison with `generate` would see if slots were mixed up in a way that no count tells."""
        texts, parts_of = prompts((9, 9), seed=4), state.parts_of
        for j, text in enumerate(texts):
            served.add(f"swapped {j}", text)
        served.step()
        monkeypatch.setattr(state, "parts_of", lambda starts, lengths, slots: parts_of(starts, lengths, slots.flip(0)))
        served.step()
        monkeypatch.undo()
        written = served.finish()
        assert [written[f"swapped {j}"] for j in (0, 1)] != [ours(model, text) for text in texts]


def test_pages_that_run_out_preempt_and_resume(engine):
    """A mixed student whose pages do not suffice for the rows that run: vLLM takes some back and reads them anew."""
    model, texts = student("llama", "mixed"), prompts((40, 33, 50, 21), seed=5)
    served = engine(model, block_size=32, num_gpu_blocks_override=11)
    free, taken = served.free, []
    take = served.scheduler._preempt_request
    served.scheduler._preempt_request = lambda *args, **kwargs: (taken.append(1), take(*args, **kwargs))[1]
    assert served.write(texts, 60) == [ours(model, text, 60) for text in texts]
    assert taken and served.free == free


def test_prefix_caching_is_off_and_a_warning_says_so(engine):
    model, text = student(), prompts((60,))[0]
    with pytest.warns(CompatibilityWarning, match="prefix caching is switched off"):
        served = engine(model, enable_prefix_caching=True)
    assert not served.engine.vllm_config.cache_config.enable_prefix_caching
    assert served.write([text, text[:40] + [5], text]) == [ours(model, x) for x in (text, text[:40] + [5], text)]


def test_states_are_float32_in_a_bfloat16_model(engine):
    served = engine(student("qwen3").bfloat16(), dtype="bfloat16")
    own = served.runner.model
    C, n, m, count, keys, values = own.states[0].kv_cache
    assert [x.dtype for x in (C, n, m, count, keys, values)] == [torch.float32] * 3 + [torch.int32] + [
        torch.bfloat16
    ] * 2
    assert own.model.layers[0].self_attn.mlstm.igate_weight.dtype == torch.float32
    assert [len(tokens) for tokens in served.write(prompts((40, 3)))] == [NEW, NEW]


# --- what is refused ---------------------------------------------------------------------------------------------


def settings(config, **changes):
    """As much of vLLM's settings as the checks read."""
    found = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "speculative_config": None, "quant_config": None}
    found |= {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    found |= {"lora_config": None, "cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto"} | changes
    everything = SimpleNamespace(**found, enable_prefix_caching=False)
    everything.parallel_config = everything.cache_config = everything
    everything.model_config = SimpleNamespace(hf_config=config)
    return everything


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2, expected 1"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2, expected 1"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2, expected 1"),
        ({"speculative_config": "ngram"}, "speculative_config='ngram', expected None"),
        ({"quant_config": SimpleNamespace(get_name=lambda: "fp8")}, "quantization='fp8', expected None"),
        ({"lora_config": "any"}, "lora_config='any', expected None"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype='fp8', expected 'auto'"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "mamba_ssm_cache_dtype='bfloat16', expected 'auto' or 'float32'"),
    ],
)
def test_settings_under_which_a_state_would_be_wrong_are_refused(changes, said):
    with pytest.raises(CompatibilityError, match=said):
        StudentSettings.verify_and_update_config(settings(tiny_config(), **changes))


@pytest.mark.parametrize(
    "size, fields, said",
    [
        (3, {}, "num_attention_heads=4, expected a multiple, intermediate_size=56, expected a multiple"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            "tensor_parallel_size=4, .*num_key_value_heads=6, expected a multiple or a divisor",
        ),
        (2, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, "num_experts=4, expected none"),
        (2, {"kept_groups": [[], [1], []]}, r"kept_groups of layer 1 are \[1\] of 2: .* have \[0, 1\] of them"),
        (4, {"kept_groups": [[0], [], []]}, r"kept_groups of layer 0 are \[0\] of 2: .* have \[1, 1, 0, 0\] of them"),
    ],
)
def test_students_that_cannot_be_cut_evenly_are_refused(size, fields, said):
    with pytest.raises(CompatibilityError, match=said):
        StudentSettings.verify_and_update_config(settings(tiny_config(**fields), tensor_parallel_size=size))


def test_parts_make_up_a_tensor():
    """Of four processes and two key/value groups: neighbours have the same one."""
    config, x = tiny_config(), torch.arange(61 * 48.0).view(61, 48)
    share = share_of(config, 4)
    assert (share.num_attention_heads, share.num_key_value_heads, share.vocab_size) == (1, 1, 16)

    def parts(name, x, *shape):
        return [part_of(config, f"model.layers.0.{name}", x, torch.Size(shape), 4, rank) for rank in range(4)]

    assert torch.equal(torch.cat(parts("embed_tokens.weight", x, 16, 48))[:61], x)
    assert torch.equal(torch.cat(parts("o_proj.weight", x, 61, 12), 1), x)
    first, same, second, _ = parts("k_proj.weight", x[:32], 16, 48)
    assert torch.equal(first, same) and torch.equal(torch.cat([first, second]), x[:32])
    assert torch.equal(sum(parts("down_proj.bias", x[0], 48)), x[0])
    assert all(torch.equal(part, x[0]) for part in parts("input_layernorm.weight", x[0], 48))
    assert parts("q_proj.weight", x[:32], 16, 48) == parts("k_proj.weight", x[:48], 16, 48) == [None] * 4


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"memory_cell": "delta"}, "memory_cell='delta'"),
        ({"mixer_combine": "joint", "memory_cell": "linear"}, "mixer_combine='joint'"),
        ({"mixer_branches": "window"}, "mixer_branches='window'"),
        ({"mixer_branches": "memory"}, "mixer_branches='memory'"),
        ({"sparse_memory": 4}, "sparse_memory=4"),
        ({"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_students_that_vllm_cannot_hold_are_refused(fields, said):
    with pytest.raises(ConfigError, match=f"vLLM cannot serve this student.*{said}.*xlstm-hybrid serve"):
        StudentSettings.verify_and_update_config(settings(tiny_config(**fields)))


def test_a_trait_that_is_new_is_refused(monkeypatch):
    config = tiny_config()
    config.another_trait = 3
    monkeypatch.setitem(TRAITS, "another_trait", None)
    with pytest.raises(ConfigError, match="traits that the plugin does not calculate: another_trait=3"):
        StudentSettings.verify_and_update_config(settings(config))


def test_a_kind_of_layer_that_is_new_is_refused():
    config = tiny_config()
    config.layer_types[1] = "another"
    with pytest.raises(ConfigError, match="layers of another: expected full_attention, hybrid_sliding, sliding_att"):
        StudentSettings.verify_and_update_config(settings(config))


def test_a_refusal_reaches_who_starts_vllm(engine):
    with pytest.raises(Exception, match="memory_cell='delta'"):
        engine(tiny_student(torch.float32, memory_cell="delta"))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weights: weights.pop("model.norm.weight"), "lacks 1 tensors, first model.norm.weight"),
        (lambda weights: weights.update(more=torch.ones(2)), "more: the checkpoint has .2., expected no such tensor"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(2)}),
            "model.norm.weight: the checkpoint has .2., expected .48.",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, said):
    model = tiny_student(torch.float32)
    weights = dict(model.state_dict())
    model.whole, model.size, model.rank = model.config, 1, 0
    change(weights)
    with pytest.raises(CheckpointError, match=said):
        XLSTMHybridForCausalLM.load_weights(model, weights.items())
