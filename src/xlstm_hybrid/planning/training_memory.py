"""Bytes that one process needs to train, as a sum of named parts whose coefficients were fitted to allocator peaks on a
CPU, see tests/planning/test_plan.py.

Dims: N tokens of a micro-batch, D hidden size, F width of the MLP, H query heads, K head dim, E features of a head
beyond K, L layers, V vocabulary.
"""

import torch
from xlstm_kernels.head_loss.chunks import WORKSPACE
from xlstm_kernels.mlstm.cpu import rows_at_once, segments

ERROR = 0.10  # largest relative error of a predicted peak that the tests allow, measured on a CPU
FP32, BF16 = 4, 2
ADAM = 8  # bytes per trained parameter: two moments in float32
# Bytes per token and layer that autograd keeps, by the width of what they belong to; fitted, see tests/planning/test_plan.py.
ACTIVATIONS = {  # (stage, bfloat16): least squares over eight shapes each, residuals of at most 3 %
    ("align", False): {"D": 3.4, "HK": 42.8},
    ("align", True): {"D": 3.4, "HK": 39.6},
    ("distill", False): {"D": 20.7, "F": 16.9, "HK": 55.1},
    ("distill", True): {"D": 24.9, "F": 9.5, "HK": 47.4},
}
# Per token, head and feature beyond K: phi(q) and phi(k) as the softmax gave them, in float32, and under autocast as
# the memory reads them, too.
FEATURES = {False: 2 * FP32, True: 2 * (FP32 + BF16)}
# Per token, expert that it goes through and width D, what autograd keeps beside F: a copy of the token, and what the expert
# gives before and after its weight. Fitted over sixteen shapes with one expert after the other, residuals of at most 4 % of
# a layer in float32 and 9 % under autocast.
ROUTED = {False: 3 * FP32, True: 2 * FP32}
# Of one layer in its backward, beside them: per token, and per token in the buffers of the mLSTM (`backends.scratch`);
# fitted, E measured.
WORK, BUFFERS = {"HK": 10, "HE": 14}, {"HK": 70, "HE": 30}


def layer_activations(shape, job):
    """Bytes per token that one layer keeps for its backward. Fewer features than K are counted as K.

    The memory keeps a state [E, K] in float32 per chunk: that of the forms for a CPU; the Triton kernel calculates it
    again.
    """
    widths = {"D": shape.D, "F": shape.F, "HK": shape.H * shape.K}
    features = FEATURES[job.bf16] + FP32 * shape.K / shape.chunk
    stored = sum(c * widths[name] for name, c in ACTIVATIONS[job.kind, job.bf16].items())
    routed = ROUTED[job.bf16] * shape.routed * shape.D if job.kind == "distill" else 0  # stage I's trunk keeps nothing
    return stored + features * more_features(shape) + routed


def more_features(shape):
    """H E, the width of the features that a student has beyond those of the paper."""
    return shape.H * max(0, shape.features - shape.K)


def in_buffers(shape, job, setting):
    """Tokens that the mLSTM's form for a CPU works on at once, and has in its buffers."""
    widths = max(shape.features, shape.K), shape.K
    q, v = (torch.empty(setting.micro, job.length, shape.H, width, device="meta") for width in widths)
    L = min(shape.chunk, job.length)
    rows = min(setting.micro, rows_at_once(q, v, L))
    return rows * max(piece.n * piece.L for piece in segments(q[:rows], v[:rows], L))


def training_bytes(shape, job, setting, machine):
    """`{part: bytes}` of one process at its peak.

    Args:
        shape, job, setting, machine: as in `plan`.
    """
    shard = machine.gpus if setting.strategy == "FSDP2" else 1
    tokens, trained = setting.micro * job.length, shape.new if job.kind == "align" else shape.student
    widths = {"HK": shape.H * shape.K, "HE": more_features(shape)}
    in_use = in_buffers(shape, job, setting) if machine.device == "cpu" else tokens
    buffers = in_use * sum(BUFFERS[name] * width for name, width in widths.items())
    parts = {"weights": FP32 * shape.student, "gradients": FP32 * trained, "Adam": ADAM * trained}
    parts = {name: size / shard for name, size in parts.items()}
    if setting.strategy == "DDP":
        parts["DDP buckets"] = FP32 * trained
    if setting.strategy == "FSDP2":  # two layers gathered at a time, and the root (embedding and head) throughout
        parts["gathered layers"] = FP32 * (2 * shape.layer + shape.head * (1 if shape.tied else 2))
    if job.kind == "distill" and job.bf16:
        parts["bfloat16 copies"] = BF16 * (shape.matmul + shape.idle)  # autocast keeps them from the forward to its end
    if job.kind == "align":
        parts["activations"] = tokens * shape.hybrid * layer_activations(shape, job)
        # targets, and the mixer's backward
        work = 14 * shape.D + sum(WORK[name] * width for name, width in widths.items())
        return parts | {"a layer at work": tokens * work + buffers}
    if not job.stored:
        parts["teacher"] = job.teacher_bytes * shape.teacher / shard
    if machine.device == "cpu":  # the window's buffers, too
        parts["kept buffers"] = tokens * WORK["HK"] * widths["HK"] + buffers
    # of the LM head's loss in chunks of rows (`xlstm_kernels.head_loss`): workspace, gradients of weight and hidden
    # states, kept targets
    workspace = min(WORKSPACE[machine.device], (FP32 + BF16) * tokens * shape.V)
    head = workspace + FP32 * shape.head + 2 * FP32 * tokens * shape.D + tokens * job.top_k * (8 + FP32)
    one = tokens * layer_activations(shape, job)
    if not setting.checkpointing:
        return parts | {"activations": one * shape.L, "LM head and targets": head}
    parts["layer inputs"] = tokens * FP32 * shape.D * shape.L
    return parts | {"one layer, or LM head and targets": max(one, head)}
