"""A step as torch operations, in place. Dims as in `op`; R = H / G query heads share a key/value head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from xlstm_kernels.backends.arguments import schema
from xlstm_kernels.backends.numerics import calculation_dtype, without_autocast
from xlstm_kernels.mlstm.reference import FORGET_ALL


class Place(NamedTuple):
    """Where a token of each row goes and what it reads: the same in all layers that have as many slots and sinks.

    slot: of the new token, one number for all rows, or [B].
    visible: [B, 1, 1, slots] bool, filled slots; None: all of them.
    padding: [B] bool, rows whose token is padding; None: no row.
    """

    slot: int | torch.Tensor
    visible: torch.Tensor | None = None
    padding: torch.Tensor | None = None


def place_token(index, slots, sinks):
    """`Place` of tokens index [B], -1 at padding. The index is looked at where that waits for nothing, on a CPU."""
    ring, usual, padding, full = max(slots - sinks, 1), None, True, False
    if index.device.type == "cpu":
        looked = index.tolist()
        padding, full = min(looked) < 0, min(looked) >= slots - 1
        usual = looked[0] if min(looked) == max(looked) else None
    if usual is None or padding:
        slot = torch.where(index < slots, index, (index - sinks) % ring + sinks).clamp_min(0)
    else:
        slot = usual if usual < slots else (usual - sinks) % ring + sinks
    padding = index < 0 if padding else None
    visible = None if full else torch.arange(slots, device=index.device) <= index[:, None]
    if padding is not None:
        visible = visible | padding[:, None]  # an attention to nothing is no number
    return Place(slot, None if visible is None else visible[:, None, None], padding)


def step_memory(q, k, v, i, f, C, n, m):
    """h [B, 1, H, V] of the mLSTM, v [B, 1, G, V]; C, n and m are overwritten."""
    out_dtype, dtype = v.dtype, C.dtype
    B, H, F_, V = C.shape
    with torch.no_grad(), without_autocast(q.device):
        q, k, v, i, f = (x[:, 0] if x.dtype == dtype else x[:, 0].to(dtype) for x in (q, k, v, i, f))  # [B, H | G, ...]
        logf = F.threshold(F.logsigmoid(f), FORGET_ALL, float("-inf"))
        new_m = torch.maximum(logf + m, i)
        scale = new_m.clamp_min(torch.finfo(dtype).min)  # finite, also where nothing has been written
        decay = (m - scale).add_(logf).exp_()[..., None]  # m - scale first, see `mlstm_recurrent`
        write_k = k * i.sub(scale).exp_()[..., None]  # [B, H, F]
        m.copy_(new_m)
        n.mul_(decay).add_(write_k)
        if v.shape[1] != H:  # all query heads of a group write its value
            v = v[:, :, None].expand(B, -1, H // v.shape[1], V).reshape(B, H, V)
        C.mul_(decay[..., None]).addcmul_(write_k[..., None], v[:, :, None])
        den = (q * n).sum(-1, keepdim=True)
        h = (q[:, :, None] @ C)[:, :, 0].div_(den).masked_fill_(den.abs() < torch.finfo(dtype).tiny, 0.0)  # [B, H, V]
    return h[:, None] if out_dtype == dtype else h[:, None].to(out_dtype)


def step_window(q, k, v, keys, values, index, sinks, scale, place=None):
    """h [B, 1, H, V] of the window; the new key and value are written into the slots. place: `place_token`'s, if it is
    known.
    """
    (B, _, H, K), G, dtype = q.shape, k.shape[2], calculation_dtype(q, keys, values)
    slot, visible, padding = place_token(index, keys.shape[2], sinks) if place is None else place
    with torch.no_grad(), without_autocast(q.device):
        for old, x in ((keys, k[:, 0]), (values, v[:, 0])):
            if isinstance(slot, int):
                old.select(2, slot).copy_(x)
                continue
            row = torch.arange(B, device=q.device)
            old[row, :, slot] = x if padding is None else torch.where(padding[:, None, None], old[row, :, slot], x)
        q = q.view(B, G, H // G, K) if q.is_contiguous() else q.reshape(B, G, H // G, K)
        # the query heads of a group are its queries: nothing is repeated
        q, keys, values = (x if x.dtype == dtype else x.to(dtype) for x in (q, keys, values))
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale)
        h = h.reshape(B, 1, H, -1)
        h = h if padding is None else h.masked_fill(padding[:, None, None, None], 0.0)
    return h if h.dtype == v.dtype else h.to(v.dtype)


NUMBERS = "SymInt sinks, float? scale"
TENSORS = "q k v phi_q phi_k i f o C! n! m! keys! values! index"
window_in_graphs = torch.library.custom_op(
    "xlstm_kernels::window_step",
    step_window,
    mutates_args=("keys", "values"),
    schema=schema("q k v keys! values! index", NUMBERS),
)


@window_in_graphs.register_fake
def _(q, k, v, keys, values, index, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_both(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale, place=None):
    """o * mLSTM + (1 - o) * window. One operation in compiled graphs, as branches depend on the values of `index`."""
    memory = step_memory(phi_q, phi_k, v, i, f, C, n, m)
    window = step_window(q, k, v, keys, values, index, sinks, scale, place)
    if not v.dtype == o.dtype == memory.dtype:
        return torch.lerp(window.to(o.dtype), memory.to(o.dtype), o[..., None]).to(v.dtype)
    return torch.lerp(window, memory, o[..., None])


step_in_graphs = torch.library.custom_op(
    "xlstm_kernels::hybrid_step",
    step_both,
    mutates_args=("C", "n", "m", "keys", "values"),
    schema=schema(TENSORS, NUMBERS),
)


@step_in_graphs.register_fake
def _(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_torch(*args, place=None):
    # eager calls are spared the dispatcher's 20 us
    return step_in_graphs(*args) if torch.compiler.is_compiling() else step_both(*args, place)
