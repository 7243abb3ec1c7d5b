"""One token of a whole hybrid layer on a CPU in one compiled call: what lies between the projections and W_o.

Dims: B batch, D hidden size, H query heads, G key/value heads, K head dim, P columns of a feature map, F features, S
sinks. Forward only, in place as `hybrid_step`, which is the same from the features on.
"""

import ctypes
from functools import partial
from pathlib import Path

import torch

from xlstm_kernels.backends.compiled import library
from xlstm_kernels.backends.numerics import calculation_dtype
from xlstm_kernels.backends.once import once
from xlstm_kernels.backends.verified import draw_numbers, largest_error, verified
from xlstm_kernels.mlstm.reference import FORGET_ALL
from xlstm_kernels.step.cpu import step_both

SOURCE = Path(__file__).with_name("compiled.c")
DTYPES = torch.float32, torch.bfloat16
POINTERS = [
    *("x", "raw_q", "raw_k", "v", "q", "k", "cos", "sin", "q_map", "k_map"),
    *("i_weight", "f_weight", "f_bias", "o_weight", "o_bias", "C", "n", "m", "keys", "values", "out", "index"),
    *("count", "where"),
]
NUMBERS = ["B", "D", "H", "G", "K", "P", "slots", "sinks", "rope_rows", "rope_dim", "flags"]
NUMBERS += ["C_row", "n_row", "m_row", "slots_row"]
# as in compiled.c
BF16_TOKEN, BF16_ROPE, BF16_MAPS, BF16_SLOTS, SIGNED_MAP, ROTATED_MEMORY, GATE_OF_X, BF16_GATES = (
    1 << j for j in range(8)
)
NO_MEMORY, NO_SLOT = 1, 2  # what it returns, 0 where all is well
WORTH_THREADS = 1 << 18  # multiplications of a call, from which on other threads are woken


class Token(ctypes.Structure):
    """`struct token` of compiled.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_float),
        ("forget_all", ctypes.c_float),
    ]


def layer_step_torch(*tensors, sinks, scale, signed=False, rotated_memory=True, gate_of_x=False):
    """What `layer_step` calculates of the same tensors, as torch operations; float64 throughout if x is."""
    x, raw_q, raw_k, v, q, k, cos, sin, q_map, k_map, i_weight, f_weight, f_bias, o_weight, o_bias, *written = tensors
    C, n, m, keys, values, index, count = written
    (B, G, _, K), H, dtype = keys.shape, len(q_map), calculation_dtype(x)
    R, out_dtype = H // G, x.dtype
    x, raw_q, raw_k, v, q, k = (
        a.reshape(B, 1, -1, K) if a is not x else a.reshape(B, 1, -1) for a in (x, raw_q, raw_k, v, q, k)
    )

    def rotated(y):
        y, rest = y.to(dtype).tensor_split([cos.shape[-1]], -1)
        one, other = y.chunk(2, -1)
        y = y * cos[:, :, None] + torch.cat([-other, one], -1) * sin[:, :, None]
        return torch.cat([y, rest], -1).to(out_dtype)

    def features(y, feature_map):
        exponents = torch.einsum("bthk,hkp->bthp", y.to(dtype), feature_map.to(dtype))
        return torch.softmax(torch.cat([exponents, -exponents], -1) if signed else exponents, -1).to(out_dtype)

    turned = rotated(q), rotated(k)
    memory_q, memory_k = turned if rotated_memory else (q, k)
    phi = features(memory_q, q_map), features(memory_k.repeat_interleave(R, 2), k_map)
    wide = x.to(dtype)
    i, f = (torch.nn.functional.linear(wide, w.to(dtype)) for w in (i_weight, f_weight))
    i, f = torch.where(index[:, None, None] < 0, float("-inf"), i), f + f_bias
    f = torch.where(index[:, None, None] < 0, float("inf"), torch.where(index[:, None, None] == 0, float("-inf"), f))
    seen = x if gate_of_x else torch.cat([raw_q, *(a.repeat_interleave(R, 2) for a in (raw_k, v))], -1)
    seen = seen[:, :, None].expand(B, 1, H, -1) if gate_of_x else seen
    o = torch.sigmoid((seen.to(dtype) * o_weight.to(dtype)).sum(-1) + o_bias)
    h = step_both(*turned, v, *phi, i, f, o, C, n, m, keys, values, index, sinks, scale)
    count.copy_(torch.where(index < 0, count, index + 1))
    return h


def layer_step(
    x,
    raw_q,
    raw_k,
    v,
    q,
    k,
    cos,
    sin,
    q_map,
    k_map,
    i_weight,
    f_weight,
    f_bias,
    o_weight,
    o_bias,
    C,
    n,
    m,
    keys,
    values,
    index,
    count,
    *,
    sinks,
    scale,
    signed=False,
    rotated_memory=True,
    gate_of_x=False,
    where=None,
):
    """One token of a hybrid layer, o * mLSTM + (1 - o) * window, without gradients: RoPE, features and gates as well.
    State, slots and count are overwritten. Returns h [B, 1, H, K] before W_o. Only where `layer_step_runs`.

    Args:
        x: the layer's input, [B, 1, D]; raw_q, raw_k: queries and keys as they are projected; q, k: the same after QK-norm,
            before RoPE; v: values; B H K or B G K numbers each, all of one dtype, float32 or bfloat16.
        cos, sin: of RoPE, [B or 1, 1, K], or narrower: then only the first dims of each head rotate.
        q_map, k_map: feature maps, [H, K, P].
        i_weight, f_weight: [H, D], f_bias: [H]; o_weight: [H, 3 K], or [H, D] with `gate_of_x`; o_bias: [H]; of one dtype.
        C, n, m: state, [B, H, F, K], [B, H, F], [B, H], float32.
        keys, values: slots, [B, G, slots, K]; index: [B] int64 as in `window_step`; count: [B] int64, becomes index + 1.
        sinks, scale: as in `window_step`.
        signed: whether the features are softmax([x P, -x P]); rotated_memory: whether they are of rotated q and k;
        gate_of_x: whether the output gate reads x, and not q, k and v.
        where: [B] int64, each token's own row of C, n, m, keys and values, which then have as many rows as they like, any
            distance apart, of which no two tokens have the same; None: one row each, side by side.
    Raises:
        ValueError: sizes, dtypes or the layout of a tensor that is written do not fit together.
        MemoryError: nothing has been written.
    """
    (N, G, slots, K), (H, _, P), D = keys.shape, q_map.shape, x.shape[-1]
    B = N if where is None else len(where)
    F = 2 * P if signed else P
    x, raw_q, raw_k, v, q, k, cos, sin = (
        a if a.is_contiguous() else a.contiguous() for a in (x, raw_q, raw_k, v, q, k, cos, sin)
    )
    token, gates = (x, raw_q, raw_k, v, q, k), (i_weight, f_weight, f_bias, o_weight, o_bias)
    rope_rows, rope_dim = len(cos), cos.shape[-1]
    queries, pairs, rope = B * H * K, B * G * K, [rope_rows * rope_dim] * 2
    sizes = (
        *(B * D, queries, pairs, pairs, queries, pairs, *rope, H * K * P, H * K * P),
        *(H * D, H * D, H, H * (D if gate_of_x else 3 * K), H),
        *(N * H * K * F, N * H * F, N * H, N * G * K * slots, N * G * K * slots, B, B),
    )
    kept, others = (C, n, m, keys, values), (q_map, k_map, *gates, index, count)
    given = (*token, cos, sin, *others[:-2], *kept, index, count)
    rows = kept if where is None else [a[:1] for a in kept]  # each by itself
    if (
        tuple([a.numel() for a in given]) != sizes
        or not all(a.is_contiguous() for a in (*others, *rows))
        or (N > 1 and keys.stride(0) != values.stride(0))
        or not {a.dtype for a in token} <= {x.dtype}
        or not {a.dtype for a in (C, n, m)} <= {torch.float32}
        or not {a.dtype for a in gates} <= {o_bias.dtype}
        or not {x.dtype, cos.dtype, q_map.dtype, keys.dtype, o_bias.dtype} <= {*DTYPES}
        or (sin.dtype, k_map.dtype, values.dtype) != (cos.dtype, q_map.dtype, keys.dtype)
        or not index.dtype == count.dtype == torch.int64
        or rope_rows not in (1, B)
        or rope_dim % 2
        or rope_dim > K
        or H % G
        or sinks < 0
        or not (where is None or (where.dtype == torch.int64 and where.min() >= 0 and where.max() < N))
    ):
        refuse(given, sizes, sinks, slots)
    out = x.new_empty(B, 1, H, K)
    flags = (
        BF16_TOKEN * (x.dtype == torch.bfloat16)
        | BF16_ROPE * (cos.dtype == torch.bfloat16)
        | BF16_MAPS * (q_map.dtype == torch.bfloat16)
        | BF16_SLOTS * (keys.dtype == torch.bfloat16)
        | SIGNED_MAP * signed
        | ROTATED_MEMORY * rotated_memory
        | GATE_OF_X * gate_of_x
        | BF16_GATES * (o_bias.dtype == torch.bfloat16)
    )
    built = library(SOURCE)
    work = B * H * K * (F + 2 * P + 2 * slots)
    threads = min(torch.get_num_threads(), B * G) if built.threads and work >= WORTH_THREADS else 1
    pointers = [a.data_ptr() for a in given]
    pointers.insert(POINTERS.index("out"), out.data_ptr())
    pointers.append(None if where is None else where.data_ptr())
    numbers = B, D, H, G, K, P, slots, sinks, rope_rows, rope_dim, flags, *(a.stride(0) for a in kept[:-1])
    wrong = built.functions.layer_step(ctypes.byref(Token(*pointers, *numbers, scale, FORGET_ALL)), threads)
    if wrong == NO_SLOT:
        raise ValueError(
            f"keys: {slots} slots, of them {sinks} sinks, have none for token {index.max().item()} of its document"
        )
    if wrong == NO_MEMORY:
        raise MemoryError("layer_step: no memory for the work space of one token")
    return out


def refuse(given, sizes, sinks, slots):
    """Raise the ValueError of arguments that do not fit, each with its place."""
    names = [name for name in POINTERS if name not in ("out", "where")]
    described = [
        f"{name} {str(a.dtype).removeprefix('torch.')} {list(a.shape)}" for name, a in zip(names, given, strict=True)
    ]
    wrong = [
        f"{name} of {size} numbers" for name, a, size in zip(names, given, sizes, strict=True) if a.numel() != size
    ]
    raise ValueError(
        f"layer_step: expected {', '.join(wrong) or 'dtypes and layouts as documented'}, heads a multiple of key/value heads and sinks >= 0, "
        f"got {', '.join(described)}, sinks={sinks}"
    )


def layer_step_runs(dtype, K, P):
    """Whether there is a compiled `layer_step`, right on this machine, for tokens of a dtype, K and P."""
    return dtype in DTYPES and K % 2 == 0 and is_right(dtype, K, P)


@once
def is_right(dtype, K, P):
    built = library(SOURCE)
    return built.functions is not None and verified(built.name, check_layer, torch.device("cpu"), dtype, K=K, P=P)


def check_layer(device, dtype, K, P):
    """h, state and slots after each of a few tokens, before and after the ring is full, of each kind of map, gate and
    dtype of what is kept.
    """
    errors = {}
    part = max(K // 4 * 2, 2)  # of a head that rotates
    kinds = ((False, True, False, dtype, K), (True, False, True, dtype, K), (False, True, False, torch.float32, part))
    for number, (signed, rotated_memory, gate_of_x, kept, rope_dim) in enumerate(kinds):
        make, (B, D, H, G, S, W) = torch.Generator().manual_seed(K * 1000 + P + number), (3, 24, 4, 2, 2, 5)
        numbers = partial(draw_numbers, make, dtype=torch.float32, device=device)
        maps = [(numbers(H, K, P) * K**-0.5).to(kept) for _ in range(2)]
        gates = [
            numbers(H, D) * 0.2,
            numbers(H, D) * 0.2,
            numbers(H),
            numbers(H, D if gate_of_x else 3 * K) * 0.2,
            numbers(H),
        ]
        gates = [a.to(kept) for a in gates]
        F = 2 * P if signed else P
        state = [torch.zeros(size, dtype=torch.float32) for size in ((B, H, F, K), (B, H, F), (B, H))]
        state[2].fill_(float("-inf"))
        state += [torch.zeros(B, G, S + W, K, dtype=kept) for _ in range(2)]
        truth, counts = [a.double() for a in state], [torch.zeros(B, dtype=torch.long) for _ in range(2)]
        for t in range(2 * W + S):
            # the second row comes late, the third begins a new document
            index = torch.tensor([t, max(t - 4, -1), t if t < 8 else t - 8])
            x, rope = numbers(B, 1, D).to(dtype), numbers(B, 1, rope_dim)
            heads = [numbers(B, 1, n, K).to(dtype) for n in (H, G, G, H, G)]
            rope = [rope.cos().to(dtype), rope.sin().to(dtype)]
            names = {
                "sinks": S,
                "scale": K**-0.5,
                "signed": signed,
                "rotated_memory": rotated_memory,
                "gate_of_x": gate_of_x,
            }
            got = layer_step(x, *heads, *rope, *maps, *gates, *state, index, counts[0], **names)
            doubles = [a.double() for a in (x, *heads, *rope, *maps, *gates)]
            want = layer_step_torch(*doubles, *truth, index, counts[1], **names)
            if not torch.equal(*counts):
                errors["count"] = float("inf")
            real = index >= 0
            pairs = {"h": (got[real], want[real])}
            pairs |= {
                name: (state[j], truth[j]) for j, name in enumerate(("C", "n", "m", "keys", "values")) if name != "m"
            }
            for name, pair in pairs.items():
                errors[name] = max(errors.get(name, 0.0), largest_error(*pair))
    return errors
