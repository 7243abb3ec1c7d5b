"""Losses and targets straight from hidden states: equal to those of whole logits, inside the forward, and never [B, T,
V].
"""

import copy

import pytest
import torch
import transformers
from conftest import enlarge, tiny_student, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.training import lm_head as heads
from xlstm_hybrid.training.lm_head import LMHead, Objective, Selection, attach, check_head, head_of
from xlstm_hybrid.training.losses import DIVERGENCES, cross_entropy, distillation_loss, sampled_targets, top_k_targets

close = torch.testing.assert_close
V, B, T, D, K, ITEMS = 61, 2, 19, 48, 12, 31
OPTIONS = {"skew": 0.3, "jsd_beta": 0.4, "csd_weights": "ts", "csd_temperature": 1.2}
PAIRS = [
    (d, o) for d in DIVERGENCES for o in ("tail", "renormalise", "gemma", "dense") if (d, o) != ("reverse_kl", "gemma")
]


@pytest.fixture(scope="module")
def teacher():
    model = tiny_student(gain=1.5)
    for p in model.parameters():
        p.data.mul_(1.1)
    return model


def student(tied=False, gain=1.2):
    return tiny_student(gain=gain, tie_word_embeddings=tied, num_hidden_layers=2)


def batch():
    ids = token_ids(B, T)
    labels = torch.where(torch.arange(T) % 5 == 0, -100, ids)
    return ids, labels


def scored(labels):
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    place = mask.flatten().nonzero()[:, 0]
    return mask, place, labels.flatten()[place + 1]


def plain(model, teacher, divergence, outcomes, temperature, size=V, kind="topk"):
    """(loss, ce, kl) by the whole logits of both."""
    ids, labels = batch()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :size]
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1, :size]
    mask = labels[:, 1:] != -100
    targets = (theirs,) if outcomes == "dense" else top_k_targets(theirs / temperature, K)
    ce = cross_entropy(logits, labels[:, 1:], num_items=1)
    kl = distillation_loss(
        logits, targets, mask, 1, outcomes=outcomes, divergence=divergence, temperature=temperature, **OPTIONS
    )
    return (0.6 * ce + 0.4 * kl) / ITEMS, ce, kl


def ours(model, teacher, divergence, outcomes, temperature, rows=7, size=None):
    ids, labels = batch()
    _, place, labels = scored(labels)
    select = Selection("dense" if outcomes == "dense" else "topk", K, temperature, size, rows=rows)
    with torch.no_grad():
        targets = teacher(input_ids=ids, use_cache=False, with_head=lambda hidden, model: select(hidden, model, place))
    objective = Objective(0.6, 0.4, divergence, outcomes, temperature, OPTIONS)
    theirs = head_of(teacher, size) if outcomes == "dense" else None

    def scorer(hidden, model):
        return objective(
            hidden, model, place, labels, targets, torch.tensor(ITEMS), size=size, teacher_head=theirs, rows=rows
        )

    return model(input_ids=ids, use_cache=False, with_head=scorer), objective


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- equal to whole logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence, outcomes", PAIRS)
def test_every_objective_is_that_of_whole_logits_in_value_and_gradients(teacher, divergence, outcomes):
    model = student()
    wanted, ce, kl = plain(model, teacher, divergence, outcomes, 1.0)
    wanted_gradients = gradients(model, wanted)
    terms, objective = ours(model, teacher, divergence, outcomes, 1.0)
    assert objective.fused == (divergence in ("forward_kl", "reverse_kl") and outcomes != "dense")
    close((terms.loss, terms.ce, terms.kl), (wanted, ce, kl), rtol=1e-9, atol=1e-9)
    close(gradients(model, terms.loss), wanted_gradients, rtol=1e-7, atol=1e-9)
    assert kl.item() > 0.1 * (divergence != "tvd")  # the teacher differs on purpose


@pytest.mark.parametrize("outcomes", ["tail", "dense"])
def test_a_tied_head_gets_the_gradients_of_both_its_uses(teacher, outcomes):
    model = student(tied=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    wanted = gradients(model, plain(model, teacher, "forward_kl", outcomes, 1.0)[0])
    terms, _ = ours(model, teacher, "forward_kl", outcomes, 1.0)
    close(gradients(model, terms.loss), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("outcomes", ["tail", "dense"])
def test_a_temperature_softens_both_sides(teacher, outcomes):
    model = student()
    wanted = plain(model, teacher, "forward_kl", outcomes, 2.0)
    terms, objective = ours(model, teacher, "forward_kl", outcomes, 2.0)
    assert not objective.fused
    close((terms.loss, terms.ce, terms.kl), wanted, rtol=1e-9, atol=1e-9)
    assert abs(wanted[2] - plain(model, teacher, "forward_kl", outcomes, 1.0)[2]) > 0.1


@pytest.mark.parametrize("divergence, outcomes", [("forward_kl", "tail"), ("jsd", "tail"), ("forward_kl", "dense")])
def test_only_the_first_ids_count_where_the_heads_differ_in_size(teacher, divergence, outcomes):
    ids, labels = batch()
    model = student()
    wanted = plain(model, teacher, divergence, outcomes, 1.0)[0]
    wanted_gradients = gradients(model, wanted)
    wide, wider = copy.deepcopy(model), copy.deepcopy(teacher)
    for m, size in (wide, V + 3), (wider, V + 67):
        old = m.lm_head.weight.data
        m.lm_head = torch.nn.Linear(old.shape[1], size, bias=False, dtype=old.dtype)
        m.lm_head.weight.data = torch.cat([old, torch.full((size - V, old.shape[1]), 3.0, dtype=old.dtype)])
    terms, _ = ours(wide, wider, divergence, outcomes, 1.0, size=V)
    close(terms.loss, wanted, rtol=1e-9, atol=1e-9)
    found = gradients(wide, terms.loss)
    assert (found["lm_head.weight"][V:] == 0).all()
    found["lm_head.weight"] = found["lm_head.weight"][:V]
    close(found, wanted_gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "divergence, outcomes",
    [("forward_kl", "tail"), ("reverse_kl", "tail"), ("jsd", "renormalise"), ("csd", "tail"), ("tvd", "dense")],
)
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient_from_it(teacher, divergence, outcomes):
    model = copy.deepcopy(teacher)
    ids, labels = batch()
    _, place, labels = scored(labels)
    select = Selection("dense" if outcomes == "dense" else "topk", K)
    with torch.no_grad():
        targets = teacher(input_ids=ids, use_cache=False, with_head=lambda hidden, model: select(hidden, model, place))
    objective = Objective(0.0, 1.0, divergence, outcomes, options=OPTIONS)
    theirs = head_of(teacher) if outcomes == "dense" else None
    terms = model(
        input_ids=ids,
        use_cache=False,
        with_head=lambda hidden, model: objective(hidden, model, place, labels, targets, ITEMS, teacher_head=theirs),
    )
    assert abs(terms.kl) < 1e-12 and terms.agreement == len(place)
    if divergence != "tvd":  # which has a corner there
        assert max(g.abs().max() for g in gradients(model, terms.loss).values()) < 1e-12


def test_nothing_scored_gives_a_loss_of_zero_with_zero_gradients(teacher):
    none = torch.zeros(0, dtype=torch.long)
    for outcomes, divergence in ("tail", "forward_kl"), ("tail", "jsd"):
        model = student()
        objective = Objective(0.6, 0.4, divergence, outcomes)
        targets = none.new_zeros(0, K), torch.zeros(0, K, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        terms = model(
            input_ids=batch()[0],
            use_cache=False,
            with_head=lambda h, m, o=objective, t=targets: o(h, m, none, none, t, ITEMS),
        )
        assert terms.loss == 0 and all((g == 0).all() for g in gradients(model, terms.loss).values())


# --- what exists in memory ------------------------------------------------------------------------------------------


class Widest(TorchDispatchMode):
    """Rows of the largest tensor over the vocabulary that an operation makes."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            # the head itself, turned
            if torch.is_tensor(x) and x.ndim > 1 and x.shape[-1] in (V, V + 1) and x.shape[0] != D:
                self.rows = max(self.rows, x.numel() // x.shape[-1])
        return out


@pytest.mark.parametrize("divergence, outcomes", [("forward_kl", "tail"), ("jsd", "tail"), ("csd", "dense")])
def test_logits_of_all_tokens_never_exist_of_student_or_teacher(teacher, divergence, outcomes):
    model = student()
    with Widest() as widest:
        terms, _ = ours(model, teacher, divergence, outcomes, 1.0, rows=5)
        terms.loss.backward()
    assert widest.rows == 5
    with Widest() as widest:
        plain(model, teacher, divergence, outcomes, 1.0)[0].backward()
    assert widest.rows == B * T  # what is looked for would be seen


# --- inside the forward ----------------------------------------------------------------------------------------------


def test_the_head_is_used_while_the_model_is_called(teacher, monkeypatch):
    """DDP and FSDP gather parameters for the call of a module: a head that is read after it may not be there."""
    model, inside = student(), []
    original = heads.head_of
    monkeypatch.setattr(
        heads, "head_of", lambda m, size=None: (seen.append((m is model, bool(inside))), original(m, size))[1]
    )
    model.register_forward_pre_hook(lambda *args: inside.append(1))
    model.register_forward_hook(lambda *args: inside.pop())
    for divergence in "forward_kl", "jsd":
        seen = []
        ours(model, teacher, divergence, "tail", 1.0)
        assert (True, True) in seen and (True, False) not in seen


def foreign():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return enlarge(LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)), gain=1.5).double().eval()


def test_without_a_scorer_the_forward_of_a_foreign_model_is_what_it_was_and_a_copy_has_its_own():
    model, ids = foreign(), batch()[0]
    before = model(input_ids=ids, labels=ids, use_cache=False)
    attach(model)
    attach(model)  # twice is once
    after = model(input_ids=ids, labels=ids, use_cache=False)
    close((after.loss, after.logits), (before.loss, before.logits), rtol=0, atol=0)
    close(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        foreign().generate(ids, max_new_tokens=4, do_sample=False),
    )
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    close(twin(input_ids=ids, with_head=lambda hidden, model: head_of(model).logits(hidden)), before.logits)


def test_a_student_declares_the_argument_and_nothing_is_put_in_its_place():
    model, ids = tiny_student(num_hidden_layers=1), batch()[0]
    attach(model)
    assert "forward" not in vars(model)
    close(
        model(input_ids=ids, with_head=lambda hidden, model: head_of(model).logits(hidden)), model(input_ids=ids).logits
    )


MAKES_LOGITS = {
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("family", MAKES_LOGITS)
def test_scales_and_caps_of_other_families_are_theirs(family):
    fields = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**fields | MAKES_LOGITS[family])
    )
    enlarge(model, gain=1.5)
    attach(model)
    check_head(model, "student")
    assert head_of(model).scale != 1 or head_of(model).softcap is not None


def test_a_model_with_a_rule_of_its_own_is_refused():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = enlarge(Louder(LlamaConfig(vocab_size=V, **sizes)), gain=1.5)
    attach(model)
    with pytest.raises(ConfigError, match=r"the teacher \(Louder\) makes logits in a way of its own"):
        check_head(model, "teacher")


def test_a_head_with_bias_scale_and_cap_is_the_formula():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    weight, bias = (
        torch.linspace(-2, 3, 20, dtype=torch.float64).view(5, 4),
        torch.linspace(0, 1, 5, dtype=torch.float64),
    )
    wanted = 2.0 * torch.tanh(0.7 * (x @ weight.T + bias) / 2.0)
    close(LMHead(weight, bias, 0.7, 2.0).logits(x), wanted)
    close(torch.cat(list(heads.logit_chunks(x, LMHead(weight, bias, 0.7, 2.0), rows=2))), wanted)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_the_teachers_and_the_same_for_the_same_seed(teacher):
    ids, labels = batch()
    _, place, _ = scored(labels)

    def draw(seed, k=K):
        select = Selection("sampled", k, seed=3)
        with torch.no_grad():
            return teacher(
                input_ids=ids, use_cache=False, with_head=lambda hidden, model: select(hidden, model, place, seed=seed)
            )

    first, again, other = draw(1), draw(1), draw(2)
    close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0]) and (first[2] == -torch.inf).all()
    many_ids, many_logp, _ = draw(1, k=60_000)
    logp = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)[place].log_softmax(-1)
    found = torch.zeros_like(logp).scatter_add(-1, many_ids, many_logp.exp())
    assert (found - logp.exp()).abs().max() < 0.01
    close(sampled_targets(logp, 5)[1].exp().sum(-1), torch.ones(len(place), dtype=torch.float64))
