"""The head loss in chunks of rows: the logits of all tokens never exist at once. Dims as in `reference`; D hidden size.

A chunk of hidden states is multiplied with the head, its logits become their own gradient in place (`cpu`, `triton`),
and that is multiplied twice more; the head's gradient is one float32 buffer that every chunk adds to. The backward only
scales what the forward has calculated.
"""

from functools import cache

import torch
from torch.autograd.function import once_differentiable

from xlstm_kernels.backends.numerics import wants_gradients
from xlstm_kernels.backends.onednn import onednn_product
from xlstm_kernels.head_loss.cpu import rows_step
from xlstm_kernels.head_loss.reference import HeadLoss, Terms

# bytes of logits that are alive at once: 160 rows of 128k on a CPU, 1040 on a GPU
WORKSPACE = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}
# ids per product on a CPU: faster than on the whole by a quarter, with MKL where it sums over the vocabulary
SLICE = 512


@cache
def mixed_products(device, half):
    """True if torch multiplies half-precision matrices into given float32 memory; not every version and GPU does."""
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

    On a GPU half-precision matrices are multiplied as they are; on a CPU they are converted, the head a slice at a
    time.
    """

    def __init__(self, weight, bias, dtype, half):
        self.weight = weight.to(half) if half else weight
        self.bias = None if bias is None else bias.to(dtype)
        self.dtype, self.half = dtype, half
        self.onednn = onednn_product(weight) if dtype == torch.float32 else None

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
        elif self.onednn is not None:
            for ids, weight in self.slices():
                out[:, ids] = self.onednn(x, weight)
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
            if self.onednn is None:
                dx.addmm_(dlogits[:, ids], weight)
            else:
                dx += self.onednn(dlogits[:, ids], weight.t())
        return dx

    def add_dweight(self, dweight, dlogits, x, first):
        """dweight += dlogits^T x; what `first` finds there is not read."""
        if self.half:
            torch.addmm(dweight, dlogits.t(), x, beta=float(not first), out_dtype=self.dtype, out=dweight)
        elif self.onednn is not None:
            for ids, _ in self.slices():
                part = self.onednn(dlogits[:, ids].t(), x.t())
                dweight[ids] = part if first else part.add_(dweight[ids])
        else:
            dweight.addmm_(dlogits.t(), x, beta=float(not first))


def chunk_rows(N, bytes_per_row, device, rows=None):
    """Rows per chunk: `rows`, or what the workspace holds, nearly the same in all: a small chunk costs as much."""
    if rows is None:
        rows = WORKSPACE.get(device.type, WORKSPACE["cuda"]) // bytes_per_row
        rows = max(16, rows - rows % 16)
    chunks = max(1, -(-N // rows))
    return max(1, -(-N // chunks))


def run_chunks(step, hidden, weight, bias, task, rule, rows, wanted):
    """Terms of all N rows, and the `wanted` gradients of hidden, weight, bias; one chunk's logits live at a time."""
    (N, V), dtype, device = (len(task.place), len(weight)), task.dtype, hidden.device
    half = hidden.dtype if hidden.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32 else None
    half = half if half and device.type != "cpu" and mixed_products(device, half) else None
    lift = float(max(N, 1)) if half == torch.float16 else 1.0  # 1 / N is no number that float16 should multiply with
    width = -(-V // 64) * 64  # rows of the workspace begin where wide loads and stores may
    head = Head(weight, bias, dtype, half)
    R = chunk_rows(N, width * bytes_per_logit(step, dtype, half, rule), device, rows)
    precise = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    dhidden = torch.zeros_like(hidden, dtype=precise) if wanted[0] else None
    dweight = torch.empty(weight.shape, dtype=dtype, device=device) if wanted[1] else None
    dbias = torch.zeros(V, dtype=dtype, device=device) if wanted[2] else None
    workspace, terms = torch.empty(min(R, N), width, dtype=dtype, device=device)[:, :V], []
    for begin in range(0, max(N, 1), R):
        place = task.place[begin : begin + R]
        x = hidden[place].to(half or dtype)
        logits = head.logits(x, workspace[: len(place)])  # first: a GPU multiplies while the host goes on
        targets = task.targets(begin, begin + R, V, lift)
        of_rows, d = step(logits, targets, rule, (half or dtype) if any(wanted) else None)
        terms.append(of_rows)
        if wanted[0]:
            dhidden[place] = head.dhidden(d).to(dhidden.dtype)
        if wanted[1]:
            head.add_dweight(dweight, d, x, first=not begin)
        if wanted[2]:
            dbias += d.sum(0, dtype=dtype)
    grads = [x if x is None or lift == 1 else x.div_(lift) for x in (dhidden, dweight, dbias)]
    return Terms(*map(torch.cat, zip(*terms, strict=True))), grads


def bytes_per_logit(step, dtype, half, rule):
    """Of the logits, and of what `cpu.rows_step` has beside them: the slope of a cap, a copy in half precision."""
    if step is not rows_step:
        return dtype.itemsize
    return dtype.itemsize * (1 + (rule.softcap is not None)) + (half.itemsize if half else 0)


class Fused(torch.autograd.Function):
    """`run_chunks` with gradients: calculated in the forward, scaled and handed out in the backward, once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, step, task, rule, rows):
        terms, ctx.grads = run_chunks(step, hidden, weight, bias, task, rule, rows, ctx.needs_input_grad[:3])
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        loss, *metrics = task.result(terms)[:-1]
        ctx.mark_non_differentiable(*(x for x in metrics if x is not None))
        return loss, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "head_loss: its gradients were handed out by the first backward, and there is no copy (retain_graph="
                'True or not); call head_loss again, or take backend="dense"'
            )
        # no reference stays behind, so that a parameter can take its gradient as it is
        grads, ctx.grads = ctx.grads, None
        grads = [x if x is None else scaled(x, dloss, dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None


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
        if wants_gradients(*inputs):
            return HeadLoss(*Fused.apply(*inputs, step, task, rule, rows), len(task.place))
        with torch.no_grad():
            return task.result(run_chunks(step, *inputs, task, rule, rows, (False, False, False))[0])

    return run
