"""What is calculated from hidden states and an LM head where logits of all tokens must not exist: a teacher's targets,
a student's loss.

Dims: B batch, T tokens, D hidden size, V vocabulary, M teacher entries kept; N positions that are scored, R of them in
a chunk.
Either runs inside the model's own forward (`with_head`), where DDP and FSDP gather parameters and expect them to be
used.
"""

import functools
import inspect
import types
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from xlstm_kernels import head_loss
from xlstm_kernels.head_loss.chunks import Head, chunk_rows, mixed_products
from xlstm_kernels.head_loss.reference import OUTCOMES as FUSED_OUTCOMES

from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.model.layers import balance_loss
from xlstm_hybrid.training.losses import cross_entropy, distillation_loss, in_row_chunks, sampled_targets, top_k_targets

FUSED_DIVERGENCES = ("forward_kl", "reverse_kl")
# that autograd keeps of a chunk in the general path: logits, both sides' log-probabilities, and gradients of them
TENSORS_PER_LOGIT = 6


# --- the head inside the forward ---------------------------------------------------------------------------------


class LMHead(NamedTuple):
    """z = softcap tanh(scale u / softcap), u = h W^T + b; softcap None: no tanh. weight: [V, D]; bias: [V] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def bend(self, logits):
        """z of u."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden):
        """[N, D] -> [N, V] in float32 at least, for autograd; outside of autocast."""
        dtype = torch.promote_types(hidden.dtype, torch.promote_types(self.weight.dtype, torch.float32))
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.bend(F.linear(hidden.to(dtype), self.weight.to(dtype), bias))


def head_of(model, size=None):
    """`LMHead` of a model, its first `size` rows; the names of a scale or cap are those that TRL reads as well."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "full_tensor"):  # sharded by FSDP2 and not gathered by the forward around us
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    if size is not None and size < len(weight):
        weight, bias = weight[:size], None if bias is None else bias[:size]
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1 / config.logits_scaling
    return LMHead(weight, bias, 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))


def attach(model):
    """Let `model(..., with_head=f)` return `f(hidden_states [B, T, D], model)` in place of logits, for any family.

    Students declare the argument. A foreign teacher's forward is replaced, because FSDP gathers the head's weight only
    inside of `forward`, and no hook of a module can return something else than its own forward without having made the
    logits. Without the argument it is what it was. A bound method, so that a deep copy of the model gets one of its
    own. Of a PEFT model it is the base model's. With output_router_logits=True it is a pair of that and the loss that
    balances experts.

    Raises:
        ConfigError: a PEFT model with virtual tokens, whose hidden states have more positions than its ids.
    """
    if virtual_tokens(model):
        raise ConfigError(
            f"a {type(model).__name__} with {model.active_peft_config.peft_type.value}: what it says of a token stands "
            "at another position than the token; pass a model without virtual tokens, adapted by LoRA for instance"
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "with_head" in inspect.signature(type(model).forward).parameters:
        return
    before = vars(model).get("forward")
    if getattr(before, "takes_head", False):
        return

    @functools.wraps(type(model).forward)
    def forward(self, *args, with_head=None, **kwargs):
        if with_head is None:
            return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        found = with_head(outputs.last_hidden_state, self)
        if not kwargs.get("output_router_logits"):
            return found
        return found, balance_loss(self.config, outputs.router_logits, kwargs.get("attention_mask"))

    forward.takes_head = True
    model.forward = types.MethodType(forward, model)


def virtual_tokens(model):
    """Whether PEFT puts learnt tokens in front of a model's rows (prompt tuning, P-tuning) or its cache (prefix tuning)."""
    adapter = getattr(model, "active_peft_config", None)
    return adapter is not None and adapter.is_prompt_learning


def require_finite(logits, model, name):
    """Raise CheckpointError, with the cause, where a model's logits are not finite: every comparison of them would be
    wrong in another way.
    """
    if torch.isfinite(logits).all():
        return
    damaged = next((key for key, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    cause = f"its {damaged} holds NaN or infinity: take an intact checkpoint"
    if damaged is None:
        cause = f"its weights are finite, but {str(logits.dtype).removeprefix('torch.')} is too narrow for what it calculates: use a wider dtype"
    raise CheckpointError(f"the {name} ({type(model).__name__}) gives logits that are not finite; {cause}")


@torch.no_grad()
def check_head(model, name, length=8):
    """Refuse a model whose logits are not those of its `LMHead`, within sqrt(eps): the loss would be another one."""
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    V, training = model.config.get_text_config().vocab_size, model.training
    ids = (torch.arange(length, device=parameter.device) * 7 % V)[None]
    model.eval()
    wanted = model(input_ids=ids, use_cache=False).logits
    got = model(input_ids=ids, use_cache=False, with_head=lambda hidden, model: head_of(model).logits(hidden))
    model.train(training)
    require_finite(wanted, model, name)
    gap, scale = (got - wanted).abs().max().item(), wanted.abs().max().item()
    if not gap <= torch.finfo(wanted.dtype).eps ** 0.5 * scale:
        raise ConfigError(
            f"the {name} ({type(model).__name__}) makes logits in a way of its own: on a scale of {scale:.3g} they are {gap:.3g} off "
            "LM head, logit_scale and final_logit_softcapping; choose a model that transformers has no extra rule for"
        )


# --- the teacher -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What is kept of a teacher. kind: "topk" or "sampled", k entries; "dense" keeps hidden states. size: ids that are
    compared, None for all;
    rows: of a chunk, None for what fits the workspace.
    """

    kind: str = "topk"
    k: int = 256
    temperature: float = 1.0
    size: int | None = None
    seed: int = 0
    rows: int | None = None

    def __call__(self, hidden, model, place, seed=0):
        """Targets of the flat positions `place` [N] of hidden states [B, T, D].

        Returns:
            `(top_ids [N, M], top_logp [N, M], rest_logp [N])` at this temperature; for "dense" `(hidden [N, D],)`.
        """
        x = hidden.flatten(0, 1)[place]
        if self.kind == "dense":
            return (x,)
        generator = None
        if self.kind == "sampled":
            generator = torch.Generator(x.device).manual_seed(zlib.crc32(f"{self.seed}-{seed}".encode()))
        choose = partial(sampled_targets, generator=generator) if self.kind == "sampled" else top_k_targets
        chunks = logit_chunks(x, head_of(model, self.size), self.rows)
        parts = [choose(u.div_(self.temperature) if self.temperature != 1 else u, self.k) for u in chunks]
        return tuple(map(torch.cat, zip(*parts, strict=True)))


def logit_chunks(x, head, rows=None):
    """Logits [R, V] of chunks of x [N, D], multiplied as in `head_loss`; a chunk is gone when the next one comes."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.promote_types(head.weight.dtype, torch.float32))
        half = x.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32 and x.device.type != "cpu"
        half = x.dtype if half and mixed_products(x.device, x.dtype) else None
        product, V = Head(head.weight, head.bias, dtype, half), len(head.weight)
        # logits, their log-softmax, and the copy without the kept ids
        R = rows or chunk_rows(len(x), 3 * V * dtype.itemsize, x.device)
        for part in x.split(R):
            yield head.bend(
                product.logits(part.to(half or dtype), torch.empty(len(part), V, dtype=dtype, device=x.device))
            )


class TeacherTargets:
    """The targets of rows for `build_store`, by a causal LM in memory, which is frozen; padded on the right.

    Raises:
        ConfigError: the model makes logits in a way of its own.
    """

    def __init__(self, model, selection):
        attach(model)
        self.model, self.selection = model.requires_grad_(False).eval(), selection
        check_head(model, "teacher")

    @torch.no_grad()
    def __call__(self, rows):
        """`(ids, logp [P, M], rest [P])` of each `RowInput`, NumPy arrays."""
        if self.selection.kind == "sampled":  # draws of a row depend on the row, not on its neighbours
            return [part for row in rows for part in self.together([row], seed=row.number)]
        return self.together(rows)

    def together(self, rows, seed=0):
        device, T = next(self.model.parameters()).device, max(len(row.input_ids) for row in rows)
        ids, positions = torch.zeros(2, len(rows), T, dtype=torch.int64)
        stored = torch.zeros(len(rows), T, dtype=torch.bool)
        for b, row in enumerate(rows):
            own, length = torch.from_numpy(row.position_ids()), len(row.input_ids)
            ids[b, :length], stored[b, : len(row.stored)] = map(torch.from_numpy, (row.input_ids, row.stored))
            # padding goes on as the document does
            positions[b, :length], positions[b, length:] = own, own[-1] + 1 + torch.arange(T - length)
        select = partial(self.selection, place=stored.flatten().nonzero()[:, 0].to(device), seed=seed)
        inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
        targets = self.model(**inputs, use_cache=False, with_head=select)
        parts = zip(*(x.cpu().split(stored.sum(1).tolist()) for x in targets), strict=True)
        return [tuple(x.numpy() for x in part) for part in parts]


# --- the student -------------------------------------------------------------------------------------------------


class ObjectiveTerms(NamedTuple):
    """loss: weighted sum; ce, kl: sums over scored tokens; agreement: how many have the teacher's first choice."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Objective:
    """ce_weight * cross-entropy + kl_weight * divergence, over the scored tokens; options: of the divergence.

    Forward and reverse KL at temperature 1 on "tail", "renormalise" and (forward) "gemma" outcomes run in
    `xlstm_kernels.head_loss`; everything else goes over rows in chunks whose logits are calculated a second time in the
    backward. Either holds one chunk's logits at a time.
    """

    ce_weight: float
    kl_weight: float
    divergence: str = "forward_kl"
    outcomes: str = "tail"
    temperature: float = 1.0
    options: dict = field(default_factory=dict)

    @property
    def fused(self):
        known = self.divergence in FUSED_DIVERGENCES and self.outcomes in FUSED_OUTCOMES
        return known and self.temperature == 1 and (self.divergence, self.outcomes) != ("reverse_kl", "gemma")

    def __call__(self, hidden, model, place, labels, targets, items, size=None, teacher_head=None, rows=None):
        """`ObjectiveTerms` of the flat positions `place` [N] of hidden states [B, T, D]; the form that `attach` calls.

        Args:
            labels: [N], the token that each position predicts.
            targets: of `Selection`, [N, ...].
            items: divisor of the loss, for instance the count of a whole optimizer step.
            size: ids that are compared, None for all.
            teacher_head: `LMHead`, for "dense" outcomes.
            rows: of a chunk, None for what fits the workspace.
        """
        x, head = hidden.flatten(0, 1)[place], head_of(model, size)
        if self.fused:
            return self.by_kernel(x, head, labels, targets, items, rows)
        with torch.autocast(x.device.type, enabled=False):
            return self.by_chunks(x, head, labels, targets, items, teacher_head, rows)

    def by_kernel(self, x, head, labels, targets, items, rows):
        ids, logp, rest = targets
        rest = rest[None] if self.outcomes == "tail" else None
        weights = {f"{name}_weight": self.kl_weight if name == self.divergence else 0.0 for name in FUSED_DIVERGENCES}
        weights |= {"ce_weight": self.ce_weight, "outcomes": self.outcomes, "num_items": items, "rows": rows}
        bend = {"bias": head.bias, "logit_scale": head.scale, "softcap": head.softcap}
        given = x[None], head.weight, labels[None], ids[None], logp[None], rest
        out = head_loss(*given, shift=False, every=True, **bend, **weights)
        kl = out.forward_kl if self.divergence == "forward_kl" else out.reverse_kl
        return ObjectiveTerms(out.loss, out.ce * items, kl * items, out.agreement * len(labels))

    def by_chunks(self, x, head, labels, targets, items, teacher_head, rows):
        V = len(head.weight)
        R = rows or chunk_rows(len(x), TENSORS_PER_LOGIT * V * 4, x.device)
        dtype = torch.promote_types(x.dtype, torch.promote_types(head.weight.dtype, torch.float32))
        head = head._replace(weight=head.weight.to(dtype))  # once, and not for each chunk
        how = {"outcomes": self.outcomes, "divergence": self.divergence, "temperature": self.temperature}

        def sums(x, labels, *targets):
            logits = head.logits(x)
            if teacher_head is not None:
                with torch.no_grad():
                    targets = (teacher_head.logits(*targets),)
                    first = targets[0].argmax(-1)
            else:
                ids, logp, rest = targets
                targets, first = (ids.long(), logp, rest), ids[:, 0]
            ce = cross_entropy(logits, labels, num_items=1)
            mask = torch.ones_like(labels, dtype=torch.bool)
            kl = distillation_loss(logits, targets, mask, 1, **how, **self.options)
            return torch.stack([ce, kl, (logits.detach().argmax(-1) == first).sum().to(ce.dtype)])

        ce, kl, agreement = in_row_chunks(sums, (x, labels, *targets), R)
        loss = (self.ce_weight * ce + self.kl_weight * kl) / items
        return ObjectiveTerms(loss, ce.detach(), kl.detach(), agreement.detach())
