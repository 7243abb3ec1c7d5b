"""torch.compile and torch.export take the model as one graph and change no value: forward, backward, decoding."""

import pytest
import torch
from conftest import tiny_student, token_ids
from tiny_students import STACKS, every_family, ids_of, student
from transformers import CompileConfig, DynamicCache, StaticCache

from xlstm_hybrid.model.cache_names import cache_of
from xlstm_hybrid.state import prefill, remember, rollback, snapshot


def loss_and_gradients(forward, student, **inputs):
    student.zero_grad()
    loss = forward(**inputs, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in student.named_parameters()}}


def cases(ids):
    mask, restarts = torch.ones_like(ids), torch.cat([torch.arange(13), torch.arange(27)])
    mask[1, :7] = 0
    return {"plain": {}, "packed and padded": {"position_ids": restarts.expand(2, -1), "attention_mask": mask}}


@pytest.mark.parametrize("case", ["plain", "packed and padded"])
def test_training_compiles_into_one_graph_with_the_same_gradients(case):
    student, ids = tiny_student(num_hidden_layers=1).train(), token_ids(2, 40)
    inputs = {"input_ids": ids, "labels": ids, **cases(ids)[case]}
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        loss_and_gradients(compiled, student, **inputs), loss_and_gradients(student, student, **inputs)
    )


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_training_with_experts_compiles_with_padding(together, balanced):
    """One expert after the other asks which of them has tokens, which breaks the graph; all together are one."""
    torch._dynamo.reset()  # a compiled router does not see that another is asked for its logits
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.5}
    student, ids = tiny_student(torch.float32, num_hidden_layers=1, **experts).train(), token_ids(2, 40)
    student.set_experts_implementation("batched_mm" if together else "eager")
    inputs = {"input_ids": ids, "labels": ids, **cases(ids)["packed and padded"]} | {"output_router_logits": balanced}
    want = loss_and_gradients(student, student, **inputs)  # first: transformers' recorders are put on in no graph
    found = loss_and_gradients(torch.compile(student, backend="aot_eager", fullgraph=together), student, **inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "static", "most"),
    [
        (7, False, 2),  # the second graph takes the number of tokens that have been seen as a variable
        (20, False, 3),  # the first tokens' slots are one of them, and a full ring has a graph of its own
        (20, True, 2),
    ],
)
@torch.no_grad()
def test_decoding_compiles_once_and_gives_the_same_tokens(window, static, most):
    student, ids = tiny_student(num_hidden_layers=2, sliding_window=window), token_ids(2, 30)
    caches = [
        StaticCache(config=student.config, max_cache_len=40) if static else DynamicCache(config=student.config)
        for _ in range(2)
    ]
    caches, graphs = [cache_of(student(ids[:, :9], cache=cache)) for cache in caches], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(student, backend=count)
    for t in range(9, 30):
        want = student(ids[:, t : t + 1], cache=caches[0]).logits
        torch.testing.assert_close(compiled(ids[:, t : t + 1], cache=caches[1]).logits, want)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close((*a.state, a.keys, a.values, a.count), (*b.state, b.keys, b.values, b.count))
    assert len(graphs) <= most
    torch.compiler.reset()


@pytest.mark.parametrize("cache_class", [pytest.param(DynamicCache, marks=pytest.mark.slow), StaticCache])
@torch.no_grad()
def test_compiled_decoding_can_be_taken_back(cache_class):
    """With a record a compiled step calls it between graphs; what it leaves is what eager decoding leaves."""
    model, ids = tiny_student(num_hidden_layers=1), token_ids(2, 30)
    caches = []
    for _ in range(2):
        cache = (
            DynamicCache(config=model.config)
            if cache_class is DynamicCache
            else StaticCache(config=model.config, max_cache_len=40)
        )
        caches.append(remember(prefill(model, ids[:, :9], cache=cache), 8))
    graphs, early = [], 0

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count)
    for t in range(9, 17):
        want = model(ids[:, t : t + 1], cache=caches[0]).logits
        torch.testing.assert_close(compiled(ids[:, t : t + 1], cache=caches[1]).logits, want)
        early = early or (len(graphs) if t == 12 else 0)
    assert len(graphs) == early > 0  # a record that grows compiles nothing anew
    for cache in caches:
        rollback(cache, 5)
        assert cache.get_seq_length() == 12
    expected = prefill(model, ids[:, :12])
    for cache in caches:
        torch.testing.assert_close(
            model(ids[:, 12:], cache=cache).logits, model(ids[:, 12:], cache=snapshot(expected)).logits
        )
    torch.compiler.reset()


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.slow) for f in every_family]
)
@pytest.mark.parametrize(
    "stack", [pytest.param(name, marks=pytest.mark.slow if name == "mixed" else ()) for name in STACKS]
)
@torch.no_grad()
def test_an_exported_program_is_the_model(family, stack):
    model, ids = student(family, stack), ids_of(20)
    program = torch.export.export(model, args=(), kwargs={"input_ids": ids, "use_cache": False}, strict=False)
    other = ids_of(20, seed=3)
    torch.testing.assert_close(
        program.module()(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3"])  # no QK-norm, one per head, one for all
def test_generation_compiled_by_inductor_is_generation(family):
    model, ids = student(family), ids_of(9)
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
    want, compiling = model.generate(ids, **options), CompileConfig(mode="default", fullgraph=True)
    compiling._compile_all_devices = True
    torch.compiler.reset()
    vars(model).pop("_compiled_call", None)
    assert torch.equal(model.generate(ids, cache_implementation="static", compile_config=compiling, **options), want)
    torch.compiler.reset()
