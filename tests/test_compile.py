"""torch.compile takes the model as one graph and changes no value: forward, backward, decoding."""

import pytest
import torch
from conftest import tiny_student, token_ids
from transformers import DynamicCache


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
    torch.testing.assert_close(loss_and_gradients(compiled, student, **inputs), loss_and_gradients(student, student, **inputs))


@torch.no_grad()
def test_decoding_compiles_once_and_gives_the_same_tokens():
    student, ids = tiny_student(num_hidden_layers=2), token_ids(2, 30)
    caches = [student(ids[:, :9], past_key_values=DynamicCache(config=student.config)).past_key_values for _ in range(2)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(student, backend=count)
    for t in range(9, 30):
        want = student(ids[:, t : t + 1], past_key_values=caches[0]).logits
        torch.testing.assert_close(compiled(ids[:, t : t + 1], past_key_values=caches[1]).logits, want)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close((*a.state, a.keys, a.values, a.count), (*b.state, b.keys, b.values, b.count))
    assert len(graphs) <= 2  # the second one takes the number of tokens that have been seen as a variable
