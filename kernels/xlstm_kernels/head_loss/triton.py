"""`cpu.rows_step` as one Triton kernel: terms and gradient of a chunk's rows, one program per row.

Dims: R rows, V vocabulary, M teacher entries.

Why like this. A row of 128k float32 logits (0.5 MB) fits no register file, so it must be read twice: once for the sum
of exponentials, once for the gradient. Everything else is M numbers in registers, for the stored ids are lifted out
first: they are read, -inf is written in their place, and the passes over the row know nothing of the teacher. The
gradient overwrites the logits, in half precision in the first half of their own memory, which saves a buffer half as
large as the workspace: larger chunks mean fewer sums into the head's gradient, each of which reads and writes V D
float32. With 4 + 4 + 2 bytes per logit the kernel should run at the memory's speed:
2.5 ms for 8192 rows of 128k on an H200, beside some 33 ms of matrix products. The sum takes one exponential per logit:
each lane keeps its own maximum, no lane waits for another.

Threads of a program meet at a barrier wherever one writes what another still has to read: global memory has no other
order.
"""

import torch
import triton
import triton.language as tl

from xlstm_kernels.backends.launch import Tile, launch, look_up, power_of_2
from xlstm_kernels.head_loss.reference import REST_FLOOR, Rule, Targets, Terms

NOTHING = tl.constexpr(-3.4e38)  # smaller than any logit that means something; finite, for inf - inf is NaN

# by width, the entries of the teacher
TILES = {
    (chip, width, kind): Tile({"BV": 4096}, 8 if width == 1024 else 16, 1)
    for chip in (80, 90, 100)
    for width in (1024, 4096)
    for kind in ("half", "single")
} | {(80, 1024, "single"): Tile({"BV": 2048}, 8, 1)}


@triton.jit
def slope_of(z, logit_scale, softcap, CAPPED: tl.constexpr):
    """dz/du where u became z; z = -inf stands for an id that was lifted out."""
    slope = logit_scale
    if CAPPED:
        t = z / softcap
        slope = tl.where(z == float("-inf"), 0.0, (1.0 - t * t) * logit_scale)
    return slope


@triton.jit
def cap_row(p_row, V, logit_scale, softcap, BV: tl.constexpr):
    """u becomes z = softcap tanh(logit_scale u / softcap) in place."""
    for begin in range(0, V, BV):
        o_v = begin + tl.arange(0, BV)
        x = tl.load(p_row + o_v, mask=o_v < V, other=0.0) * (logit_scale / softcap)
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        tl.store(p_row + o_v, softcap * tl.where(x < 0, -t, t), mask=o_v < V)


@triton.jit
def sum_row(p_row, V, scale, BV: tl.constexpr):
    """The largest z of a row (0 if there is none) and the sum of exp(z - largest); z = scale times what is there."""
    b_m = tl.full([BV], NOTHING, tl.float32)
    b_s = tl.zeros([BV], tl.float32)
    for begin in range(0, V, BV):
        o_v = begin + tl.arange(0, BV)
        b_z = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")) * scale  # [BV]
        more = b_z - b_m
        e = tl.exp(-tl.abs(more))
        b_s = tl.where(more > 0, b_s * e + 1.0, b_s + e)
        b_m = tl.maximum(b_m, b_z)
    frame = tl.max(b_m, 0)
    total = tl.sum(b_s * tl.exp(b_m - frame), 0)
    return tl.where(total == 0.0, 0.0, frame), total


@triton.jit
def head_loss_rows(
    p_u,
    p_d,
    p_label,
    p_ids,
    p_logp,
    p_rest,
    p_w_ce,
    p_w_forward,
    p_w_reverse,
    p_ce,
    p_forward,
    p_reverse,
    p_hit,
    V,
    M,
    u_stride,
    d_stride,
    logit_scale,
    softcap,
    floor,
    SUPPORT: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
):  # too many for a line each
    """Terms of row i_r, and its gradient in p_d: the memory of p_u, in its dtype or (NARROW) in one half as wide."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row, p_out, o_m = p_u + i_r * u_stride, p_d + i_r * d_stride, tl.arange(0, BM)
    scale = logit_scale
    if CAPPED:
        cap_row(p_row, V, logit_scale, softcap, BV)
        scale = 1.0
        tl.debug_barrier()

    # Lift the stored ids out of the row.
    b_logp = tl.load(p_logp + i_r * M + o_m, mask=o_m < M, other=float("-inf"))  # [BM]
    b_ids = tl.load(p_ids + i_r * M + o_m, mask=o_m < M, other=0)
    stored = b_logp != float("-inf")
    label = tl.load(p_label + i_r)
    b_z = tl.where(stored, tl.load(p_row + b_ids, mask=stored, other=0.0) * scale, float("-inf"))
    z_label = tl.load(p_row + label) * scale
    tl.debug_barrier()
    tl.store(p_row + b_ids, tl.full([BM], float("-inf"), tl.float32), mask=stored)
    tl.debug_barrier()
    frame, total = sum_row(p_row, V, scale, BV)

    # Outcomes: M stored ids and the rest, relative to the largest logit.
    rest = total != 0.0  # NaN is something, and must be seen
    best = tl.maximum(tl.max(b_z, 0), tl.where(rest, frame, NOTHING))
    b_x = b_z - best
    x_rest = tl.where(rest, frame - best + tl.log(total), float("-inf"))
    norm = tl.log(tl.sum(tl.exp(b_x), 0) + tl.exp(x_rest))
    b_share, share_rest = tl.exp(b_x - norm), tl.exp(x_rest - norm)
    b_student, student_rest = b_x - norm, x_rest - norm
    if SUPPORT:
        largest = tl.maximum(tl.max(b_x, 0), NOTHING)
        b_student = b_x - largest - tl.log(tl.sum(tl.exp(b_x - largest), 0))
        b_student = tl.where(stored, b_student, float("-inf"))
        student_rest = x_rest * 0.0 + float("-inf")
    rest_logp = tl.load(p_rest + i_r)
    b_P, P_rest, b_Q, Q_rest = tl.exp(b_logp), tl.exp(rest_logp), tl.exp(b_student), tl.exp(student_rest)
    floored = tl.where(rest_logp < floor, floor, rest_logp)
    b_g = tl.where(b_Q != 0.0, b_student - b_logp, 0.0)
    g_rest = tl.where(Q_rest != 0.0, student_rest - floored, 0.0)
    forward = tl.sum(tl.where(b_P != 0.0, b_P * (b_logp - b_student), 0.0), 0) + tl.where(
        P_rest != 0.0, P_rest * (rest_logp - student_rest), 0.0
    )
    reverse = tl.sum(b_Q * b_g, 0) + Q_rest * g_rest
    top = tl.max(tl.where(o_m == tl.argmax(b_logp, 0), b_z, float("-inf")), 0)
    # the id itself is one
    rivals = tl.sum((stored & (b_z >= top)).to(tl.int32), 0) + (rest & (frame >= top)).to(tl.int32)
    tl.store(p_ce + i_r, norm - (z_label - best))
    tl.store(p_forward + i_r, forward)
    tl.store(p_reverse + i_r, reverse)
    tl.store(p_hit + i_r, ((rivals == 1) & (top > float("-inf"))).to(tl.int8))

    if GRADIENT:
        w_ce, w_forward, w_reverse = tl.load(p_w_ce + i_r), tl.load(p_w_forward + i_r), tl.load(p_w_reverse + i_r)
        mass = tl.sum(b_P, 0) + P_rest
        b_d = w_ce * b_share + w_forward * (b_Q * mass - b_P) + w_reverse * (b_Q * (b_g - reverse))  # [BM]
        d_rest = w_ce * share_rest + w_forward * (Q_rest * mass - P_rest) + w_reverse * (Q_rest * (g_rest - reverse))
        each = tl.where(rest, d_rest / total, 0.0)
        for begin in range(0, V, BV):
            o_v = begin + tl.arange(0, BV)
            b_v = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")) * scale  # [BV]
            b_dv = tl.exp(b_v - frame) * each * slope_of(b_v, logit_scale, softcap, CAPPED)
            if NARROW:
                tl.debug_barrier()  # what is written lies over logits further left, which all have read by now
            tl.store(p_out + o_v, b_dv.to(p_d.dtype.element_ty), mask=o_v < V)
        b_d = tl.where(b_ids == label, b_d - w_ce, b_d) * slope_of(b_z, logit_scale, softcap, CAPPED)
        d_label = (tl.exp(z_label - frame) * each - w_ce) * slope_of(z_label, logit_scale, softcap, CAPPED)
        lifted = tl.sum((stored & (b_ids == label)).to(tl.int32), 0) > 0
        tl.debug_barrier()
        tl.store(p_out + b_ids, b_d.to(p_d.dtype.element_ty), mask=stored)
        tl.store(p_out + label, d_label.to(p_d.dtype.element_ty), mask=lifted == 0)


def rows_step(logits, targets, rule, gradient):
    """`cpu.rows_step` on a GPU or in the interpreter.

    Raises:
        ValueError: logits that are not float32 with the ids of a row side by side, or more entries than `TILES` has.
    """
    (R, V), M = logits.shape, targets.ids.shape[1]
    if logits.dtype != torch.float32:
        raise ValueError(f"backend='triton' calculates in float32, got {logits.dtype} inputs: use backend='torch'")
    if logits.stride(1) != 1:
        raise ValueError(f"logits: expected the ids of a row side by side, got strides {logits.stride()}")
    d = logits if gradient in (None, torch.float32) else logits.view(gradient)[:, :V]
    out = [logits.new_empty(R) for _ in range(3)] + [torch.empty(R, dtype=torch.int8, device=logits.device)]
    numbers = V, M, logits.stride(0), d.stride(0), float(rule.logit_scale), float(rule.softcap or 1.0), REST_FLOOR
    constants = {"SUPPORT": rule.support, "CAPPED": rule.softcap is not None, "GRADIENT": gradient is not None}
    constants |= {"NARROW": d.dtype != logits.dtype, "BM": power_of_2(M)}
    tile = look_up(TILES, logits.device, M, d.dtype)
    tensors = logits, d, *(x.contiguous() for x in targets), *out
    launch(head_loss_rows, (R,), *tensors, *numbers, **constants, tile=tile)
    return Terms(*out[:3], out[3].bool()), None if gradient is None else d


def aot_cases():
    """(name, function): what a compiler without a GPU must get through, see kernels/aot.py."""

    def case(M, gradient, V=128256, support=False, softcap=None):
        def run():
            row = {"dtype": torch.float32, "device": "meta"}
            ids, numbers = (
                torch.empty(64, M, dtype=torch.int64, device="meta"),
                [torch.empty(64, **row) for _ in range(4)],
            )
            targets = Targets(ids[:, 0].contiguous(), ids, torch.empty(64, M, **row), *numbers)
            rows_step(torch.empty(64, V, **row), targets, Rule(support, 1.0, softcap), gradient)

        return run

    return [
        ("bf16, M 256", case(256, torch.bfloat16)),
        ("fp32, M 256", case(256, torch.float32)),
        ("fp16, M 64", case(64, torch.float16)),
        ("values, M 256", case(256, None)),
        ("bf16, M 4096", case(4096, torch.bfloat16)),
        ("fp32, M 4096", case(4096, torch.float32)),
        ("bf16, support, capped", case(256, torch.bfloat16, support=True, softcap=30.0)),
        ("fp32, capped, odd V", case(64, torch.float32, V=50257, softcap=30.0)),
    ]
