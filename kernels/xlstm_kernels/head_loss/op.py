"""Cross-entropy and sparse distillation straight from hidden states. Dims as in `reference`; D hidden size."""

import torch
from torch import Tensor

from xlstm_kernels.backends.arguments import expect
from xlstm_kernels.backends.choose import Kernel, kernel_is_right, resolve_backend
from xlstm_kernels.backends.launch import power_of_2
from xlstm_kernels.backends.numerics import calculation_dtype
from xlstm_kernels.head_loss.check import check_kernel
from xlstm_kernels.head_loss.chunks import chunked
from xlstm_kernels.head_loss.cpu import rows_step
from xlstm_kernels.head_loss.reference import IGNORE, OUTCOMES, Rule, Task, dense

# M: teacher entries that the kernel has in its registers at once
KERNEL = Kernel("head_loss", {"M": 4096}, check_kernel)


def triton_rows(*args):
    from xlstm_kernels.head_loss.triton import rows_step as step

    return step(*args)


BACKENDS = {"dense": dense, "torch": chunked(rows_step), "triton": chunked(triton_rows)}


def choose_backend(hidden, weight, top_ids):
    """What "auto" runs: the kernel where it is right."""
    M = power_of_2(1 if top_ids is None else top_ids.shape[2])
    right = kernel_is_right(KERNEL, hidden, calculation_dtype(hidden, weight), hidden.dtype, M=M)
    return "triton" if right else "torch"


def check_tensors(hidden, weight, labels, top_ids, top_logp, rest_logp, bias, mask):
    """Raise ValueError for tensors whose shapes, dtypes or devices do not belong together."""
    if hidden.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"hidden, weight: expected [B, T, D] and [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    (B, T, D), V, M = hidden.shape, len(weight), 0 if top_ids is None or top_ids.dim() != 3 else top_ids.shape[2]
    rows, entries = {"B": B, "T": T}, {"B": B, "T": T, "M": M}
    wanted = {
        "hidden": (hidden, "floating", rows | {"D": D}),
        "weight": (weight, "floating", {"V": V, "D": D}),
        "labels": (labels, "integer", rows),
        "bias": (bias, "floating", {"V": V}),
        "mask": (mask, "bool", rows),
        "top_ids": (top_ids, "integer", entries),
        "top_logp": (top_logp, "floating", entries),
        "rest_logp": (rest_logp, "floating", rows),
    }
    for name, (x, kind, dims) in wanted.items():
        if x is not None:
            expect(name, x, kind, **dims)
            if x.device != hidden.device:
                raise ValueError(f"{name}: expected on {hidden.device}, where hidden is, got {x.device}")
    if not V or (top_ids is not None and not M):
        raise ValueError(f"V={V}, M={M}: expected a vocabulary, and at least one entry of the teacher")


def check_settings(top_ids, top_logp, rest_logp, weights, outcomes, num_items, logit_scale, softcap, rows):
    """Raise ValueError for settings that mean nothing, or not together."""
    names = ("ce_weight", "forward_kl_weight", "reverse_kl_weight")
    for name, w in zip(names, weights, strict=True):
        if not 0 <= w < float("inf"):
            raise ValueError(f"{name}={w}: expected a finite weight of at least 0")
    if outcomes not in OUTCOMES:
        raise ValueError(f"outcomes={outcomes!r} is not one of {list(OUTCOMES)}")
    given = {"top_ids": top_ids, "top_logp": top_logp} | ({"rest_logp": rest_logp} if outcomes == "tail" else {})
    missing = [name for name, x in given.items() if x is None]
    if missing and (len(missing) < len(given) or rest_logp is not None or any(weights[1:])):
        raise ValueError(
            f"outcomes={outcomes!r} with {names[1]}={weights[1]}, {names[2]}={weights[2]} needs {list(given)}: "
            f"{missing} missing"
        )
    if outcomes == "gemma" and weights[2]:
        raise ValueError(
            f"reverse_kl_weight={weights[2]}: outcomes='gemma' has no reverse KL, for the teacher excludes what it did "
            "not store; choose 'tail' or 'renormalise'"
        )
    if not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale={logit_scale}: expected a finite factor of more than 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected more than 0, or None")
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows={rows!r}: expected an integer of at least 1, or None")
    known = num_items is not None and not (isinstance(num_items, Tensor) and num_items.device.type != "cpu")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items: expected one number, got {list(num_items.shape)}")
    if known and not num_items > 0:
        raise ValueError(f"num_items={num_items}: expected more than 0; a step without a counted token has no loss")


def check_ids(labels, task, V):
    """Raise ValueError for counted ids outside of the vocabulary; on a GPU, looking would wait for the GPU."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= V))
    if not (task.ce | task.kl).all():
        raise ValueError(f"every=True: expected a label at each position, got {IGNORE}")
    if wrong.any():
        raise ValueError(f"labels: expected {IGNORE} or 0..{V - 1}, got {labels[wrong][0].item()}")
    ids, _, _ = task.entries(task.place, task.kl, V)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < V:
        raise ValueError(f"top_ids: expected 0..{V - 1} at counted tokens, got {ids.min().item()}..{ids.max().item()}")


def head_loss(
    hidden,
    weight,
    labels,
    top_ids=None,
    top_logp=None,
    rest_logp=None,
    *,
    bias=None,
    mask=None,
    ce_weight=1.0,
    forward_kl_weight=0.0,
    reverse_kl_weight=0.0,
    outcomes="tail",
    num_items=None,
    shift=True,
    logit_scale=1.0,
    softcap=None,
    rows=None,
    every=False,
    backend="auto",
):  # too many for a line each
    """Cross-entropy, forward KL(teacher || student) and reverse KL of an LM head's predictions, without a [B, T, V].
    Returns a `HeadLoss`.

    Calculates in float32, or in float64 if hidden or weight is, also under autocast. The loss can be differentiated
    once, by hidden, weight and bias.

    Args:
        hidden: [B, T, D], what the LM head is given; weight: [V, D]; bias: [V] or None.
        labels: [B, T] integers, -100 where cross-entropy does not count.
        top_ids, top_logp: the teacher's entries, [B, T, M], ids distinct; a short support is padded with id 0 at -inf.
            None: no teacher.
        rest_logp: [B, T], log of the teacher's mass that is not stored; only "tail" reads it.
        mask: [B, T], True where the KL of a position counts; None: where its label counts. What does not count may hold
            anything, NaN too.
        ce_weight, forward_kl_weight, reverse_kl_weight: of the terms in the loss.
        outcomes: "tail" compares the stored ids and the rest as one outcome; "renormalise" both sides on the stored
            ids; "gemma" the teacher renormalised on the stored ids with the student over the whole vocabulary, forward
            KL only.
        num_items: divisor of every term, such as the count of a whole optimizer step; None: each term's own count.
        shift: the label of position t is labels[:, t + 1] and the last position does not count; the teacher's entries
            and the mask at t belong to the prediction at t in any case. False: labels are aligned with the predictions.
        logit_scale, softcap: z = softcap tanh(logit_scale u / softcap); no tanh if softcap is None.
        rows: tokens whose logits are alive at once, None for what fits the workspace; changes time and memory, not the
            result.
        every: the caller knows that each label counts (none is -100, no mask, no shift): a GPU is not asked.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Raises:
        ValueError: an argument does not fit, with what was expected and what came. Ids are looked at on a CPU only.
    """
    check_tensors(hidden, weight, labels, top_ids, top_logp, rest_logp, bias, mask)
    weights = ce_weight, forward_kl_weight, reverse_kl_weight
    check_settings(top_ids, top_logp, rest_logp, weights, outcomes, num_items, logit_scale, softcap, rows)
    backend = resolve_backend(backend, BACKENDS, hidden.device, lambda: choose_backend(hidden, weight, top_ids))
    teacher = None if top_ids is None else (top_ids, top_logp, rest_logp)
    run = run_backend
    if torch.compiler.is_compiling():  # which rows there are is read from the data: there is nothing to trace
        run = torch.compiler.disable(run_backend)
    if every and (shift or mask is not None):
        raise ValueError(f"every=True: expected shift=False and no mask, got shift={shift}, mask={mask is not None}")
    counted = labels, teacher, mask, shift, weights, outcomes, num_items
    return run(hidden, weight, bias, counted, every, logit_scale, softcap, rows, backend)


def run_backend(hidden, weight, bias, counted, every, logit_scale, softcap, rows, backend):
    """`head_loss` of arguments whose shapes and settings fit."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would run the matrix products in half precision
        task = Task(*counted, calculation_dtype(hidden, weight), every)
        check_ids(counted[0], task, len(weight))
        rule = Rule(task.outcomes == "renormalise", float(logit_scale), softcap)
        return BACKENDS[backend](hidden.flatten(0, 1), weight, bias, task, rule, rows)
