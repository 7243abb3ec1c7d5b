"""Routers of experts stay as they are unless asked; where they learn, transformers' loss keeps the experts balanced."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_student
from test_on_policy import build as on_policy  # noqa: F401 (a fixture)
from test_sparse_kd import build as sparse  # noqa: F401 (a fixture)
from test_sparse_kd import tokenizer  # noqa: F401 (a fixture)
from test_trl import sft
from tiny_students import CLOSE, ids_of, left_padded, student
from tiny_teachers import teacher
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.layers import balance_loss

close = torch.testing.assert_close
MOE = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
}
ROUTER = "model.layers.0.mlp.gate.weight"


def experts(coef=0.5, **changes):
    return tiny_student(torch.float32, gain=1.5, router_aux_loss_coef=coef, **(MOE | changes))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_the_loss_and_the_routers_logits_are_the_teachers_and_padding_does_not_count(family):
    original = copy.deepcopy(teacher(family)).double()
    model = XLSTMHybridForCausalLM.from_teacher(original, layer_types="teacher")
    assert model.config.router_aux_loss_coef == original.config.router_aux_loss_coef == 0.001
    ids, mask = left_padded([ids_of(11, 1), ids_of(6, 1)])
    asked = {"attention_mask": mask, "labels": ids, "output_router_logits": True}
    found, expected = (network(ids, **asked) for network in (model, original))
    for mine, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        close(mine[mask.flatten().bool()], theirs[mask.flatten().bool()], **CLOSE)
    close(found.aux_loss, expected.aux_loss, **CLOSE)
    close(found.loss - model(ids, attention_mask=mask, labels=ids).loss, 0.001 * found.aux_loss, **CLOSE)
    alone = [model(row, output_router_logits=True).router_logits for row in (ids[:1], ids[1:, -6:])]
    rows = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    close(balance_loss(model.config, rows), found.aux_loss, **CLOSE)
    assert "aux_loss" not in model(ids)


def test_a_configuration_that_asks_is_followed_in_generation_and_under_checkpointing():
    model, (ids, mask) = (
        copy.deepcopy(student("qwen3_moe", dtype=torch.float32)),
        left_padded([ids_of(9, 1), ids_of(4, 1)]),
    )
    greedy = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, **greedy)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(ids, **greedy), plain)
    gradients = []
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        model.train().zero_grad()
        model(ids, attention_mask=mask, use_cache=False).aux_loss.backward()
        gradients.append(model.get_parameter(ROUTER).grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 1e-3
    model.config.output_router_logits = False
    assert isinstance(model(ids, with_head=lambda hidden, model: hidden), torch.Tensor)


def balance_gradient(model, trainer):
    """Of the router, over the micro-batches of a step, and the mean of their losses."""
    model, losses = copy.deepcopy(model).train(), []
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        out = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True, use_cache=False
        )
        (out.aux_loss / len(batches)).backward()
        losses.append(out.aux_loss.item())
    return model.get_parameter(ROUTER).grad, sum(losses) / len(losses)


def test_a_router_that_learns_in_distillation_gets_the_gradient_of_the_balance(sparse):  # noqa: F811
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train": "all_and_routers"}
    found = {}
    for coef in (0.0, 0.5):
        model = experts(coef=0.25)
        trainer = sparse(model, experts(), router_aux_loss_coef=coef, **split)
        wanted, mean = balance_gradient(model, trainer)
        trainer.train()
        found[coef] = model.get_parameter(ROUTER).detach().clone()
        logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
        assert logged == ([pytest.approx(mean, rel=1e-5)] if coef else [])
        assert (model.config.router_aux_loss_coef, model.config.output_router_logits) == (0.25, False)
    close(found[0.0] - found[0.5], 0.1 * 0.5 * wanted, rtol=1e-3, atol=1e-6)  # SGD with a rate of 0.1
    assert float((found[0.0] - found[0.5]).abs().max()) > 1e-3


@pytest.mark.slow
def test_with_frozen_routers_the_coefficient_changes_no_bit(sparse):  # noqa: F811
    weights = []
    for coef in (0.0, 0.5):
        model = experts(coef)
        before = model.get_parameter(ROUTER).detach().clone()
        trainer = sparse(model, experts())
        trainer.train()
        assert torch.equal(model.get_parameter(ROUTER), before) and "aux_loss" not in trainer.state.log_history[0]
        weights.append(model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_routers_learn_on_policy_only_if_asked(on_policy):  # noqa: F811
    for asked in (False, True):
        model, trained = experts(), {"train_routers": asked}
        before = model.get_parameter(ROUTER).detach().clone()
        trainer = on_policy(model, experts(), **trained)
        trainer.train()
        assert torch.equal(model.get_parameter(ROUTER), before) != asked
        assert ("aux_loss" in trainer.state.log_history[0]) == asked


def test_trls_trainer_adds_the_loss_that_the_configuration_weighs(tokenizer, tmp_path):  # noqa: F811
    model = experts(coef=0.5)
    trainer = sft(model, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.aux_loss_enabled and trainer.state.log_history[0]["aux_loss"] >= 1
    dense = sft(tiny_student(torch.float32), tokenizer, tmp_path, max_steps=1)
    assert not dense.aux_loss_enabled


@pytest.mark.slow
def test_a_stock_model_with_experts_is_balanced_as_a_student_is(sparse):  # noqa: F811
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    model, original = (Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=8)) for _ in range(2))
    trainer = sparse(model, original, train="all_and_routers", router_aux_loss_coef=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] >= 0.9


def test_what_cannot_be_balanced_is_refused_by_name(sparse):  # noqa: F811
    ids = ids_of(5) % 61
    with pytest.raises(ConfigError, match="output_router_logits=True: this student has no experts"):
        tiny_student(torch.float32)(ids, output_router_logits=True)
    with pytest.raises(ConfigError, match="with teacher_forced=True: stage I has no loss of routers"):
        experts()(ids, teacher_forced=True, output_router_logits=True)
    with pytest.raises(ConfigError, match="compiled before their logits were first asked for"):
        balance_loss(experts().config, ())
    with pytest.raises(ConfigError, match="output_router_logits=True with num_experts=None: expected False"):
        tiny_config(output_router_logits=True)
    with pytest.raises(ConfigError, match="router_aux_loss_coef=-1: expected a weight of at least 0"):
        tiny_config(router_aux_loss_coef=-1)
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0.1: no router of this XLSTMHybrid.* learns"):
        sparse(experts(), experts(), router_aux_loss_coef=0.1)
    with pytest.warns(UserWarning, match="routers learn without a loss that balances"):
        sparse(experts(coef=0.0), experts(), train="all_and_routers")
