"""Cross-entropy and sparse distillation straight from hidden states: the logits of all tokens never exist at once.

Dims: B batch, T tokens, D hidden size, V vocabulary, M teacher entries kept per token; N tokens that count, R of them in a chunk.

    u = h W^T + b      z = softcap tanh(logit_scale u / softcap)      q = softmax(z)      loss = sum of weight * term

The terms and what they are compared on stand in `head_rows`. Gradients are calculated in the forward, chunk by chunk over the logits themselves;
the head's gradient is one float32 buffer that every chunk adds to. The backward only scales them.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_kernels.dispatch import kernel_is_right, resolve
from xlstm_kernels.head_rows import NEVER, Rule, Targets, Terms, rows_dense, rows_step
from xlstm_kernels.reference import calculation_dtype, finite

IGNORE = -100
LARGEST_M = 4096  # entries that the Triton kernel holds at once
OUTCOMES = ("tail", "renormalise", "gemma")
WORKSPACE = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}  # bytes of logits that are alive at once: 160 rows of 128k on a CPU, 1040 on a GPU
SLICE = 512  # ids per product that sums over the vocabulary on a CPU: MKL is a quarter faster than on the whole, measured for 128 to 176 rows


class HeadLoss(NamedTuple):
    """The loss and what it is made of. Terms are not weighted, carry no gradient and are None where there is no such term."""

    loss: Tensor  # weighted sum, differentiable
    ce: Tensor  # nats per counted token
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    agreement: Tensor | None  # share of the tokens whose KL counts where the teacher's most likely stored id is the student's, no other id as likely
    items: int  # tokens that count in any term


# --- what counts, and what it is held to -------------------------------------------------------------------------


class Task:
    """The tokens that count, as flat positions, and their targets. Whatever stands at other tokens is never read.

    place: [N] positions in [B T]; ce, kl: [N], True where the term counts; weights: of ce, forward KL and reverse KL, [3], over their counts
    """

    def __init__(self, labels, teacher, mask, shift, weights, outcomes, num_items, dtype):
        label = following(labels, IGNORE) if shift else labels
        kl = label != IGNORE if mask is None else mask.clone()
        if shift:
            kl[:, -1:] = False
        if teacher is None:
            kl = torch.zeros_like(kl)
        label, kl = label.flatten(), kl.flatten()
        self.place = ((label != IGNORE) | kl).nonzero()[:, 0]
        self.label, self.kl = label[self.place], kl[self.place]
        self.ce = self.label != IGNORE
        self.outcomes, self.dtype = outcomes, dtype
        self.teacher = None if teacher is None else [x if x is None else x.flatten(0, 1) for x in teacher]
        self.counts = [x.sum().clamp_min(1) for x in (self.ce, self.kl)]
        ce_items, kl_items = self.counts if num_items is None else [torch.as_tensor(num_items, device=labels.device)] * 2
        self.items = ce_items, kl_items, kl_items
        self.given = weights
        self.weights = [w / n.to(dtype) for w, n in zip(weights, self.items, strict=True)]

    def targets(self, begin, end, V, lift=1.0):
        """Targets of the counted rows begin..end, their weights times `lift`."""
        place, ce, kl = (x[begin:end] for x in (self.place, self.ce, self.kl))
        ids, logp, rest = self.kept(place, kl, V)
        weights = [torch.where(counts, lift * w, 0.0) for w, counts in zip(self.weights, (ce, kl, kl), strict=True)]
        return Targets(torch.where(ce, self.label[begin:end], 0), ids, logp, rest, *weights)

    def kept(self, place, kl, V):
        """The teacher's entries (ids, logp [R, M], rest [R]) at the flat positions `place`, all padding where KL does not count."""
        none = torch.full_like(place, NEVER, dtype=self.dtype)
        if self.teacher is None:
            return torch.zeros_like(place)[:, None], none[:, None], none
        ids, logp = (x[place] for x in self.teacher[:2])
        logp = torch.where(kl[:, None], logp.to(self.dtype), NEVER)
        ids = torch.where(logp == NEVER, 0, ids.long())
        if self.outcomes != "tail":
            return ids, logp - finite(logp.logsumexp(1, keepdim=True)), none
        everything = (logp != NEVER).sum(1) == V  # is stored: the rest is empty on both sides
        return ids, logp, torch.where(kl & ~everything, self.teacher[2][place].to(self.dtype), NEVER)

    def result(self, terms):
        """HeadLoss of the terms of all N rows."""
        values = [torch.where(counts, x, 0.0).sum() / n for x, counts, n in zip(terms, (self.ce, self.kl, self.kl), self.items, strict=False)]
        loss = sum((w * x for w, x in zip(self.given, values, strict=True) if w), torch.zeros_like(values[0]))
        ce, forward_kl, reverse_kl = (x.detach() for x in values)
        if self.teacher is None:
            return HeadLoss(loss, ce, None, None, None, len(self.place))
        agreement = (terms.hit & self.kl).sum() / self.counts[1]
        return HeadLoss(loss, ce, forward_kl, None if self.outcomes == "gemma" else reverse_kl, agreement, len(self.place))


def following(x, last):
    """x [B, T] one token earlier, `last` at the end."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], 1)


# --- the head, chunk by chunk ------------------------------------------------------------------------------------


@cache
def mixed_products(device, half):
    """True if torch multiplies half-precision matrices there into float32 results that exist; not every version and GPU does."""
    x, y = (torch.full((16, 16), value, dtype=half, device=device) for value in (1.0, 2.0))
    z = torch.ones(16, 16, device=device)
    try:
        torch.mm(x, y.t(), out_dtype=torch.float32, out=z)
        torch.addmm(z, x.t(), y, beta=1.0, out_dtype=torch.float32, out=z)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((z == 64).all())


class Head:
    """The three products of a chunk with the LM head [V, D], accumulated in float32 at least.

    On a GPU half-precision matrices are multiplied as they are; on a CPU they are converted, the head a slice at a time.
    """

    def __init__(self, weight, bias, dtype, half):
        self.weight = weight.to(half) if half else weight
        self.bias = None if bias is None else bias.to(dtype)
        self.dtype, self.half = dtype, half

    def slices(self):
        """(slice of the vocabulary, its part of the head)"""
        V = len(self.weight)
        step = SLICE if self.weight.device.type == "cpu" else V
        for begin in range(0, V, step):
            ids = slice(begin, begin + step)
            yield ids, self.weight[ids].to(self.half or self.dtype)

    def logits(self, x, out):
        """x W^T + b, [R, V]."""
        if self.half:
            torch.mm(x, self.weight.t(), out_dtype=self.dtype, out=out)
        elif self.weight.dtype == self.dtype:
            torch.mm(x, self.weight.t(), out=out)
        else:
            for ids, weight in self.slices():
                torch.mm(x, weight.t(), out=out[:, ids])
        return out if self.bias is None else out.add_(self.bias)

    def dhidden(self, dlogits):
        """[R, D]"""
        if self.half:
            return torch.mm(dlogits, self.weight)
        dx = dlogits.new_zeros(len(dlogits), self.weight.shape[1])
        for ids, weight in self.slices():
            dx.addmm_(dlogits[:, ids], weight)
        return dx

    def add_dweight(self, dweight, dlogits, x, first):
        """dweight += dlogits^T x; what `first` finds there is not read."""
        if self.half:
            torch.addmm(dweight, dlogits.t(), x, beta=float(not first), out_dtype=self.dtype, out=dweight)
        else:
            dweight.addmm_(dlogits.t(), x, beta=float(not first))


def chunk_rows(N, bytes_per_row, device, rows=None):
    """Rows per chunk: `rows`, or what the workspace holds; chunks of nearly the same size, for a small one costs as much as a large one."""
    if rows is None:
        rows = WORKSPACE.get(device.type, WORKSPACE["cuda"]) // bytes_per_row
        rows = max(16, rows - rows % 16)
    chunks = max(1, -(-N // rows))
    return max(1, -(-N // chunks))


def walk(step, hidden, weight, bias, task, rule, rows, wanted):
    """Terms of all N rows, and the gradients of hidden, weight, bias as far as they are wanted; one chunk's logits are alive at a time."""
    (N, V), dtype, device = (len(task.place), len(weight)), task.dtype, hidden.device
    half = hidden.dtype if device.type != "cpu" and hidden.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32 else None
    half = half if half and mixed_products(device, half) else None
    lift = float(max(N, 1)) if half == torch.float16 else 1.0  # 1 / N is no number that float16 should multiply with
    width = -(-V // 64) * 64  # rows of the workspace begin where wide loads and stores may
    head, R = Head(weight, bias, dtype, half), chunk_rows(N, width * bytes_per_logit(step, dtype, half, rule), device, rows)
    dhidden = torch.zeros_like(hidden, dtype=torch.float32 if hidden.dtype == torch.float16 else hidden.dtype) if wanted[0] else None
    dweight = torch.empty(weight.shape, dtype=dtype, device=device) if wanted[1] else None
    dbias = torch.zeros(V, dtype=dtype, device=device) if wanted[2] else None
    workspace, terms = torch.empty(min(R, N), width, dtype=dtype, device=device)[:, :V], []
    for begin in range(0, max(N, 1), R):
        place = task.place[begin : begin + R]
        x = hidden[place].to(half or dtype)
        logits = head.logits(x, workspace[: len(place)])  # first: a GPU multiplies while the host goes on
        found, d = step(logits, task.targets(begin, begin + R, V, lift), rule, (half or dtype) if any(wanted) else None)
        terms.append(found)
        if wanted[0]:
            dhidden[place] = head.dhidden(d).to(dhidden.dtype)
        if wanted[1]:
            head.add_dweight(dweight, d, x, first=not begin)
        if wanted[2]:
            dbias += d.sum(0, dtype=dtype)
    return Terms(*map(torch.cat, zip(*terms, strict=True))), [x if x is None or lift == 1 else x.div_(lift) for x in (dhidden, dweight, dbias)]


def bytes_per_logit(step, dtype, half, rule):
    """Of the logits themselves, and of what `head_rows.rows_step` keeps beside them: the slope of a cap, a copy in half precision."""
    beside = 0 if step is not rows_step else dtype.itemsize * (rule.softcap is not None) + (half.itemsize if half else 0)
    return dtype.itemsize + beside


class Fused(torch.autograd.Function):
    """`walk` with gradients: calculated in the forward, scaled and handed out in the backward, once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, step, task, rule, rows):
        terms, ctx.grads = walk(step, hidden, weight, bias, task, rule, rows, ctx.needs_input_grad[:3])
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        loss, *metrics = task.result(terms)[:-1]
        ctx.mark_non_differentiable(*(x for x in metrics if x is not None))
        return loss, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "head_loss: its gradients were handed out by the first backward, no copy is kept (retain_graph=True or not); "
                'call head_loss again, or take backend="dense"'
            )
        grads, ctx.grads = ctx.grads, None  # no reference stays behind, so that a parameter can take its gradient as it is
        return *(x if x is None else scaled(x, dloss, dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None, None


def scaled(x, factor, dtype):
    """x times factor in a dtype: in the memory of x where the dtype is its own."""
    if x.device.type == "cpu":
        return (x if factor == 1 else x.mul_(factor)).to(dtype)
    if x.dtype == dtype:
        return x.mul_(factor)  # looking whether it is 1 would wait for the GPU
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))  # cast while it is written


def chunked(step):
    """The backend that gives each chunk's logits to `step`."""

    def run(hidden, weight, bias, task, rule, rows):
        inputs = hidden, weight, bias
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return HeadLoss(*Fused.apply(*inputs, step, task, rule, rows), len(task.place))
        with torch.no_grad():
            return task.result(walk(step, *inputs, task, rule, rows, (False, False, False))[0])

    return run


def dense(hidden, weight, bias, task, rule, rows):
    """The definition, by autograd: the logits of all counted tokens at once."""
    hidden, weight, bias = (x if x is None else x.to(task.dtype) for x in (hidden[task.place], weight, bias))
    return task.result(rows_dense(F.linear(hidden, weight, bias), task.targets(0, len(task.place), len(weight)), rule))


def triton_rows(*args):
    from xlstm_kernels.gpu.head_loss import rows_step as step

    return step(*args)


BACKENDS = {"dense": dense, "torch": chunked(rows_step), "triton": chunked(triton_rows)}


def choose_backend(hidden, weight, top_ids):
    """What "auto" runs: the kernel where it can run and be believed."""
    M = 1 if top_ids is None else top_ids.shape[2]
    size = max(16, 1 << (M - 1).bit_length())
    right = M <= LARGEST_M and kernel_is_right("head_loss", hidden, calculation_dtype(hidden, weight), hidden.dtype, size)
    return "triton" if right else "torch"


# --- the public function -----------------------------------------------------------------------------------------


def expect(name, x, shape, kind):
    """Raise ValueError unless x has the shape and is of the kind "floating", "integer" or "bool"."""
    fits = {"floating": x.is_floating_point(), "bool": x.dtype == torch.bool}.get(kind)
    fits = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool) if fits is None else fits
    if tuple(x.shape) != tuple(shape) or not fits:
        raise ValueError(f"{name}: expected {kind} {list(shape)}, got {x.dtype} {list(x.shape)}")


def check_tensors(hidden, weight, labels, top_ids, top_logp, rest_logp, bias, mask):
    """Raise ValueError for tensors whose shapes, dtypes or devices do not belong together."""
    if hidden.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"hidden, weight: expected [B, T, D] and [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    (B, T, D), V, M = hidden.shape, len(weight), 0 if top_ids is None or top_ids.dim() != 3 else top_ids.shape[2]
    wanted = {"hidden": (hidden, (B, T, D), "floating"), "weight": (weight, (V, D), "floating"), "labels": (labels, (B, T), "integer"),
              "bias": (bias, (V,), "floating"), "mask": (mask, (B, T), "bool"), "top_ids": (top_ids, (B, T, M), "integer"),
              "top_logp": (top_logp, (B, T, M), "floating"), "rest_logp": (rest_logp, (B, T), "floating")}  # fmt: skip
    for name, (x, shape, kind) in wanted.items():
        if x is not None:
            expect(name, x, shape, kind)
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
        raise ValueError(f"outcomes={outcomes!r} with {names[1]}={weights[1]}, {names[2]}={weights[2]} needs {list(given)}: {missing} missing")
    if outcomes == "gemma" and weights[2]:
        raise ValueError(
            f"reverse_kl_weight={weights[2]}: outcomes='gemma' has no reverse KL, for the teacher excludes what it did not store; "
            "choose 'tail' or 'renormalise'"
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
    """Raise ValueError for ids outside of the vocabulary where they count. CPU tensors only: on a GPU looking would wait for the GPU."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= V))
    if wrong.any():
        raise ValueError(f"labels: expected {IGNORE} or 0..{V - 1}, got {labels[wrong][0].item()}")
    ids, _, _ = task.kept(task.place, task.kl, V)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < V:
        raise ValueError(f"top_ids: expected 0..{V - 1} at counted tokens, got {ids.min().item()}..{ids.max().item()}")


def head_loss(hidden, weight, labels, top_ids=None, top_logp=None, rest_logp=None, *, bias=None, mask=None, ce_weight=1.0, forward_kl_weight=0.0,
              reverse_kl_weight=0.0, outcomes="tail", num_items=None, shift=True, logit_scale=1.0, softcap=None, rows=None,
              backend="auto"):  # fmt: skip
    """Cross-entropy, forward KL(teacher || student) and reverse KL of an LM head's predictions, without a [B, T, V]. Returns a `HeadLoss`.

    Calculates in float32, or in float64 if hidden or weight is, also under autocast. The loss can be differentiated once, by hidden, weight and bias.

    Args:
        hidden: [B, T, D], what the LM head is given; weight: [V, D]; bias: [V] or None.
        labels: [B, T] integers, -100 where cross-entropy does not count.
        top_ids, top_logp: the teacher's entries, [B, T, M], ids distinct; a short support is padded with id 0 at -inf. None: no teacher.
        rest_logp: [B, T], log of the teacher's mass that is not stored; only "tail" reads it.
        mask: [B, T], True where the KL of a position counts; None: where its label counts. What does not count may hold anything, NaN too.
        ce_weight, forward_kl_weight, reverse_kl_weight: of the terms in the loss.
        outcomes: "tail" compares the stored ids and the rest as one outcome; "renormalise" both sides on the stored ids; "gemma" the teacher
            renormalised on the stored ids with the student over the whole vocabulary, forward KL only.
        num_items: divisor of every term, such as the count of a whole optimizer step; None: each term's own count.
        shift: the label of position t is labels[:, t + 1] and the last position does not count; the teacher's entries and the mask at t
            belong to the prediction at t in any case. False: labels are aligned with the predictions.
        logit_scale, softcap: z = softcap tanh(logit_scale u / softcap); no tanh if softcap is None.
        rows: tokens whose logits are alive at once, None for what fits the workspace; changes time and memory, not the result.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Raises:
        ValueError: an argument does not fit, with what was expected and what came. Ids are looked at on a CPU only.
    """
    check_tensors(hidden, weight, labels, top_ids, top_logp, rest_logp, bias, mask)
    weights = ce_weight, forward_kl_weight, reverse_kl_weight
    check_settings(top_ids, top_logp, rest_logp, weights, outcomes, num_items, logit_scale, softcap, rows)
    backend = resolve(backend, BACKENDS, hidden.device, lambda: choose_backend(hidden, weight, top_ids))
    teacher = None if top_ids is None else (top_ids, top_logp, rest_logp)
    run = evaluate
    if torch.compiler.is_compiling():  # which rows there are is read from the data: there is nothing to trace
        run = torch.compiler.disable(evaluate)
    return run(hidden, weight, bias, labels, teacher, mask, shift, weights, outcomes, num_items, logit_scale, softcap, rows, backend)


def evaluate(hidden, weight, bias, labels, teacher, mask, shift, weights, outcomes, num_items, logit_scale, softcap, rows, backend):
    """`head_loss` of arguments whose shapes and settings fit."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would run the matrix products in half precision
        task = Task(labels, teacher, mask, shift, weights, outcomes, num_items, calculation_dtype(hidden, weight))
        check_ids(labels, task, len(weight))
        rule = Rule(outcomes == "renormalise", float(logit_scale), softcap)
        return BACKENDS[backend](hidden.flatten(0, 1), weight, bias, task, rule, rows)
