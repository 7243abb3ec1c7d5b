"""A step as torch operations, in place. Dims as in `op`."""

import torch
import torch.nn.functional as F

from xlstm_kernels.backends.arguments import schema
from xlstm_kernels.backends.numerics import calculation_dtype, without_autocast
from xlstm_kernels.mlstm.reference import FORGET_ALL


def step_memory(q, k, v, i, f, C, n, m):
    """h [B, 1, H, V] of the mLSTM; C, n and m are overwritten."""
    out_dtype, dtype = v.dtype, C.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, 1, K | V]
    i, f = i[:, 0].to(dtype), f[:, 0].to(dtype)
    with torch.no_grad(), without_autocast(q.device):
        logf = F.threshold(F.logsigmoid(f), FORGET_ALL, float("-inf"))
        new_m = torch.maximum(logf + m, i)
        scale = new_m.clamp_min(torch.finfo(dtype).min)  # finite, also where nothing has been written
        decay = (m - scale).add_(logf).exp_()[..., None]  # m - scale first, see `mlstm_recurrent`
        write_k = k.transpose(2, 3) * i.sub(scale).exp_()[..., None, None]  # [B, H, K, 1]
        m.copy_(new_m)
        n.mul_(decay).add_(write_k[..., 0])
        C.mul_(decay[..., None]).addcmul_(write_k, v)
        den = q @ n[..., None]
        h = (q @ C).div_(den).masked_fill_(den.abs() < torch.finfo(dtype).tiny, 0.0)  # [B, H, 1, V]
    return h.transpose(1, 2).to(out_dtype)


def step_window(q, k, v, keys, values, index, sinks, scale):
    """h [B, 1, H, V] of the window; the new key and value are written into the slots."""
    (B, _, H, K), G, slots = q.shape, k.shape[2], keys.shape[2]
    window, row = slots - sinks, torch.arange(B, device=q.device)
    # elsewhere looking would wait for the device, in every layer of every token
    oldest = int(index.min()) if index.device.type == "cpu" else -1
    ring, dtype, mask, padding = index.clamp_min(0) % window + sinks, calculation_dtype(q, keys, values), None, None
    with torch.no_grad(), without_autocast(q.device):
        if oldest < 0:
            padding = (index < 0)[:, None, None, None]
            k, v = (torch.where(padding, old[row, :, ring][:, None], x) for old, x in ((keys, k), (values, v)))
        for slot in (ring,) if oldest >= sinks else (ring, torch.where((index >= 0) & (index < sinks), index, ring)):
            keys[row, :, slot] = k[:, 0]
            values[row, :, slot] = v[:, 0]
        if oldest < window + sinks - 1:
            slot = torch.arange(slots, device=q.device)
            filled = torch.where(slot < sinks, slot <= index[:, None] - window, slot - sinks <= index[:, None])
            mask = filled[:, None, None] if padding is None else filled[:, None, None] | padding
        q = q.reshape(B, G, H // G, K).to(dtype)  # the query heads of a group are its queries: nothing is repeated
        h = F.scaled_dot_product_attention(q, keys.to(dtype), values.to(dtype), attn_mask=mask, scale=scale)
        h = h.reshape(B, 1, H, -1)
    return (h if padding is None else h.masked_fill(padding, 0.0)).to(v.dtype)


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


def step_both(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    """o * mLSTM + (1 - o) * window. One operation in compiled graphs, as branches depend on the values of `index`."""
    repeats = q.shape[2] // v.shape[2]
    memory = step_memory(phi_q, phi_k, v if repeats == 1 else v.repeat_interleave(repeats, 2), i, f, C, n, m)
    window = step_window(q, k, v, keys, values, index, sinks, scale)
    return torch.lerp(window.to(o.dtype), memory.to(o.dtype), o[..., None]).to(v.dtype)


step_in_graphs = torch.library.custom_op(
    "xlstm_kernels::hybrid_step",
    step_both,
    mutates_args=("C", "n", "m", "keys", "values"),
    schema=schema(TENSORS, NUMBERS),
)


@step_in_graphs.register_fake
def _(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_torch(*args):
    # eager calls are spared the dispatcher's 20 us
    return (step_in_graphs if torch.compiler.is_compiling() else step_both)(*args)
