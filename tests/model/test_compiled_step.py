"""A decoded token on a CPU goes through compiled layers: the same logits as operation by operation, and only where nothing
else was asked for.
"""

import contextlib

import pytest
import torch
from conftest import tiny_config, tiny_student, token_ids
from model import Calls
from tiny_students import S, W, every_family, ids_of, left_padded, student
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from xlstm_kernels import layer_step_runs

from xlstm_hybrid.model import linear as linear_module
from xlstm_hybrid.model import one_token
from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.model.linear import Linear
from xlstm_hybrid.model.one_token import compiled_step
from xlstm_hybrid.state import prefill, remember

pytestmark = pytest.mark.skipif(not layer_step_runs(torch.float32, 16, 16), reason="nothing compiles here")


@pytest.fixture
def counted(monkeypatch):
    """Numbers of the compiled calls that were made: {"layers": n, "maps": n}."""
    calls = {"layers": 0, "maps": 0}
    for module, name, kind in ((one_token, "layer_step", "layers"), (linear_module, "linear_step", "maps")):
        run = getattr(module, name)

        def step(*args, run=run, kind=kind, **kwargs):
            calls[kind] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, step)
    return calls


@contextlib.contextmanager
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_token, "layer_step_runs", lambda *_: False)
        patch.setattr(linear_module, "linear_step_runs", lambda *_: False)
        yield


@torch.no_grad()
def decoded(model, ids, steps, cache=None, **masks):
    """Logits [B, steps, V] of the last `steps` columns, one by one after the rest, and the cache."""
    T = ids.shape[1] - steps
    mask = masks.get("attention_mask")
    part = lambda n: {} if mask is None else {"attention_mask": mask[:, :n]}  # noqa: E731
    out = model(ids[:, :T], use_cache=True, cache=cache, **part(T))
    logits = []
    for t in range(T, ids.shape[1]):
        out = model(ids[:, t : t + 1], use_cache=True, cache=cache_of(out), **part(t + 1))
        logits.append(out.logits)
    return torch.cat(logits, 1), cache_of(out)


def close(found, want, dtype=torch.float32):
    scale = {torch.float32: 2e-4, torch.bfloat16: 0.15}[dtype]
    assert (found.float() - want.float()).abs().max() < scale * want.float().abs().max(), (found - want).abs().max()


@pytest.mark.parametrize("family", every_family)
@pytest.mark.parametrize("stack", ["hybrid", "mixed"])
def test_tokens_of_a_batch_with_padding_are_those_of_the_operations(family, stack, counted):
    """From an empty ring over its end, rows of unlike lengths beside each other."""
    model = student(family, stack, torch.float32)
    ids, mask = left_padded([ids_of(n, 1, n) for n in (2 * (W + S) + 3, W + 9, 12)])
    found, cache = decoded(model, ids, 10, attention_mask=mask)
    hybrid = sum(layer.self_attn.layer_type == "hybrid_sliding" for layer in model.model.layers)
    assert counted == {"layers": 10 * hybrid, "maps": 10 * (3 * 7 + 1)}
    with uncompiled():
        want, plain = decoded(model, ids, 10, attention_mask=mask)
    close(found, want)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for name in ("keys", "values", "count"):
            if (x := getattr(theirs, name, None)) is not None:
                torch.testing.assert_close(getattr(ours, name), x, atol=1e-4, rtol=1e-3)
        if getattr(theirs, "state", None) is not None:
            for x, y in zip(ours.state, theirs.state, strict=True):
                torch.testing.assert_close(x, y, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_cache_and_dtype(kind, dtype, counted):
    model = tiny_student(dtype, gain=1.0)
    caches = [StaticCache(model.config, max_cache_len=40) if kind == "static" else None for _ in range(2)]
    ids = token_ids(2, 30)
    found, cache = decoded(model, ids, 26, caches[0])
    assert counted["layers"] == 26 * 3
    with uncompiled():
        want, _ = decoded(model, ids, 26, caches[1])
    close(found, want, dtype)
    if kind == "static":  # tensors stay where they are
        layer = cache.layers[0]
        before = [x.data_ptr() for x in (*layer.state, layer.keys, layer.values, layer.count)]
        with torch.no_grad():
            model(ids[:, :1], use_cache=True, cache=cache)
        assert before == [x.data_ptr() for x in (*layer.state, layer.keys, layer.values, layer.count)]


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_feature_map": "softmax_signed"},
        {"memory_feature_dim": 10},
        {"memory_rope": False},
        {"mixer_gate_input": "x"},
        {"num_sink_tokens": 0},
        {"attention_bias": False, "layer_windows": [3, 7, 30], "layer_sinks": [0, 3, 1]},
    ],
    ids=str,
)
def test_choices_that_a_compiled_layer_has(changes, counted):
    model, ids = tiny_student(torch.float32, **changes), token_ids(2, 24)
    found, _ = decoded(model, ids, 20)
    assert counted["layers"] == 20 * 3
    with uncompiled():
        want, _ = decoded(model, ids, 20)
    close(found, want)


def test_a_document_begins_in_one_row_of_a_batch(counted):
    model, ids = tiny_student(torch.float32), token_ids(2, 14)
    positions = torch.arange(14).repeat(2, 1)
    positions[1, 10:] -= 10

    @torch.no_grad()
    def run():
        cache, logits = prefill(model, ids[:, :9]), []
        for t in range(9, 14):
            step = {"position_ids": positions[:, t : t + 1], "use_cache": True, "cache": cache}
            logits.append(model(ids[:, t : t + 1], **step).logits)
        return torch.cat(logits, 1)

    found = run()
    assert counted["layers"] == 5 * 3
    alone = torch.no_grad()(model)(ids[1:, 10:]).logits
    close(found[1:, 1:], alone)
    with uncompiled():
        close(found, run())


class Twice(torch.Tensor):
    """A weight of a kind of its own, as quantised ones are."""


# --- what goes the long way ----------------------------------------------------------------------------------------


def hooked(model, cache):
    model.model.layers[1].self_attn.mlstm.register_forward_hook(lambda *_: None)
    return 2  # the other layers


def wrapped(model, cache):
    layer = model.model.layers[1].self_attn
    layer.mlstm.forward = layer.mlstm.forward  # as accelerate does where weights are fetched
    return 2


def parametrized(model, cache):
    mixer = model.model.layers[1].self_attn.mlstm
    torch.nn.utils.parametrize.register_parametrization(mixer, "q_map", torch.nn.Identity())
    return 2


def recording(model, cache):
    remember(cache, 5)
    return 0


def wide(model, cache):
    cache.layers[1].keys, cache.layers[1].values = cache.layers[1].keys.double(), cache.layers[1].values.double()
    return 2


def spread(model, cache):
    mixer = model.model.layers[1].self_attn.mlstm
    mixer.q_map.data = torch.stack([mixer.q_map.data, mixer.k_map.data], -1)[..., 0]
    return 2


def of_two_dtypes(model, cache):
    model.model.layers[1].self_attn.mlstm.fgate_bias.data = model.model.layers[
        1
    ].self_attn.mlstm.fgate_bias.data.bfloat16()
    return 2


def half_precision_alone(model, cache):
    model.model.layers[1].self_attn.mlstm.half()
    return 2


def of_a_kind_of_its_own(model, cache):
    mixer = model.model.layers[1].self_attn.mlstm
    mixer.k_map = torch.nn.Parameter(mixer.k_map.detach().as_subclass(Twice), requires_grad=False)
    return 2


def every_other_row(model, cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(slice(0, 4, 2))  # which leaves views
    return 0


@pytest.mark.parametrize(
    "change",
    [
        *(hooked, wrapped, parametrized, recording, wide),
        *(spread, of_two_dtypes, half_precision_alone, of_a_kind_of_its_own, every_other_row),
    ],
)
def test_a_layer_that_somebody_looks_into_or_changes_runs_operation_by_operation(change, counted):
    model, ids = tiny_student(torch.float32), token_ids(2, 12)
    cache, other = prefill(model, ids), prefill(model, ids)
    compiled = change(model, cache)
    with torch.no_grad():
        found = model(ids[:, :1], use_cache=True, cache=cache).logits
        assert counted["layers"] == compiled
        with uncompiled():
            close(found, model(ids[:, :1], use_cache=True, cache=other).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_cell": "linear"},
        {"memory_cell": "delta"},
        {"mixer_norm": True},
        {"mixer_branches": "memory"},
        {"mixer_branches": "window"},
        {"mixer_combine": "joint", "memory_cell": "linear"},
        {"sparse_memory": 4},
        {"kept_groups": [[0], [], []]},
    ],
    ids=str,
)
def test_another_layer_than_the_papers_runs_operation_by_operation(changes, counted):
    model = tiny_student(torch.float32, **changes)
    decoded(model, token_ids(1, 12), 3)
    assert counted["layers"] == (3 * 2 if "kept_groups" in changes else 0) and counted["maps"]


def test_gradients_autocast_float64_and_longer_calls_run_operation_by_operation(counted):
    model, ids = tiny_student(torch.float32), token_ids(2, 12)
    cache = prefill(model, ids)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(ids[:, :1], use_cache=True, cache=cache)
    with torch.no_grad():
        model(ids[:, :2], use_cache=True, cache=cache)
        model(ids[:, :1], use_cache=False)
    assert counted["layers"] == 0
    maps = counted["maps"]
    assert maps == 1 + 3 * 7 + 1  # the head of a prompt's last token, and a token without a cache
    model(ids[:, :1], use_cache=True, cache=prefill(model, ids)).logits.sum().backward()
    assert model.model.layers[0].self_attn.mlstm.q_map.grad.abs().sum() > 0
    double = tiny_student(torch.float64)
    with torch.no_grad():
        double(ids[:, :1], use_cache=True, cache=prefill(double, ids))
    assert counted == {"layers": 0, "maps": maps + 1}  # a prompt's head again


def test_a_mode_sees_every_operation(counted):
    model, ids = tiny_student(torch.float32), token_ids(1, 9)
    cache = prefill(model, ids)
    calls = dict(counted)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(ids[:, :1], use_cache=True, cache=cache)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    assert counted == calls and flops.get_total_flops() > 2 * products


def test_outputs_that_were_asked_for_once_leave_the_next_token_compiled(counted):
    model, ids = tiny_student(torch.float32), token_ids(2, 9)
    cache = prefill(model, ids)
    with torch.no_grad():
        asked = model(ids[:, :1], use_cache=True, cache=cache, output_gates=True)
        assert counted["layers"] == 0 and [gates.shape for gates in asked.gates] == 3 * [(2, 1, 4)]
        asked = model(ids[:, :1], use_cache=True, cache=cache, output_hidden_states=True)
        assert counted["layers"] == 3 and len(asked.hidden_states) == 4
        model.model.layers[0].self_attn.mlstm.register_forward_hook(lambda *_: None)
        model(ids[:, :1], use_cache=True, cache=cache)
    assert counted["layers"] == 3 + 2


def test_a_global_hook_sees_every_module(counted):
    model, ids = tiny_student(torch.float32), token_ids(1, 9)
    cache, seen = prefill(model, ids), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            model(ids[:, :1], use_cache=True, cache=cache)
    finally:
        hook.remove()
    assert counted["layers"] == 0 and seen.count("MLSTMMixer") == 3


def test_a_layer_says_no_before_it_touches_its_cache():
    model = tiny_student(torch.float32)
    layer = prefill(model, token_ids(1, 5)).layers[0]
    layer.record_past = True
    layer.depth = 3
    tokens = type("Tokens", (), {"compiled": torch.tensor([5])})
    assert compiled_step(model.model.layers[0].self_attn, torch.ones(1, 1, 48), None, None, tokens, layer) is None
    assert layer.seen_tokens == 5 and layer.keys.shape[2] == 5


# --- linear maps ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_linear_map_of_a_weight_of_another_kind_is_torchs(counted):
    linear, x = Linear(6, 4), torch.randn(2, 1, 6)
    want = torch.nn.functional.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x), want)
    assert counted["maps"] == 1
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Twice), requires_grad=False)
    torch.testing.assert_close(linear(x).as_subclass(torch.Tensor), want)
    linear = Linear(6, 4)
    for other in (torch.randn(2, 3, 6), torch.randn(2, 6), torch.randn(9, 1, 6)):  # tokens, no tokens, too many rows
        torch.testing.assert_close(linear(other), torch.nn.functional.linear(other, linear.weight, linear.bias))
    assert counted["maps"] == 1


# --- operations ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def operations(make=tiny_student, **changes):
    """Operations that torch dispatches for one token, per layer and for the rest."""
    counts = []
    for layers in (2, 4):
        model = make(torch.float32, num_hidden_layers=layers, attention_bias=False, **changes)
        held = model(token_ids(1, 12), use_cache=True)
        with Calls() as counting:
            model(token_ids(1, 1), use_cache=True, past_key_values=held.past_key_values)
        counts.append(counting.count)
    each = (counts[1] - counts[0]) // 2
    return each, counts[0] - 2 * each


def tiny_llama(dtype, **changes):
    fields = tiny_config(**changes).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "attention_bias")
    return LlamaForCausalLM(LlamaConfig(**{name: fields[name] for name in names})).to(dtype).eval()


def test_a_decoded_token_costs_no_more_operations_than_it_did():
    """A clock would say the same on a quiet machine only."""
    each, rest = operations()
    assert each <= 29 and rest <= 35, (each, rest)  # 26 with transformers 5.24, 35 with 5.17
    with uncompiled():
        plain, plain_rest = operations()
    assert plain <= 178 and plain_rest <= 38, (plain, plain_rest)  # 30 and 38
    assert each < operations(tiny_llama)[0]


def test_options_that_are_off_cost_a_token_nothing():
    assert operations() == operations(window_dropout=0.5, memory_rope=True, mixer_branches="both")


def test_every_field_that_makes_another_layer_is_looked_at():
    """A choice added to the config is either compiled or refused: none is ignored."""
    from xlstm_hybrid.model.configuration import CHOICES

    compiled = {"memory_feature_map", "memory_feature_dim", "memory_rope", "mixer_gate_input"}
    others = set(CHOICES) - compiled - set(one_token.PAPER)
    # of training; of shapes; of layers that are no hybrid ones; what other choices alone read
    assert others == {
        *("window_dropout", "num_key_value_heads", "layer_types", "teacher_layer_types"),
        *("kept_groups", "kept_positions", "kept_log_base", "sparse_memory_score"),
    }
    assert all(getattr(tiny_config(), name) == value for name, value in one_token.PAPER.items())
