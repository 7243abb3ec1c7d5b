"""One token at a time, in place: the mLSTM state and the ring buffer of the window keep their addresses and their size.

Dims: B batch, H query heads, G key/value heads, K query/key, V value, S sinks, W window. Forward only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.dispatch import heads_kernel_is_right, resolve
from xlstm_kernels.mlstm import check, expect
from xlstm_kernels.reference import FORGET_ALL, calculation_dtype, without_autocast


def check_token(q, k, v, i, f, state, whole):
    """Raise ValueError unless a step can take the inputs; `whole` is the function for more than one token."""
    check(q, k, v, i, f, state, chunk_size=1)
    if q.shape[1] != 1:
        raise ValueError(f"q: expected one token, got T={q.shape[1]}; use {whole} for more")
    refuse_gradients(q, k, v, i, f, *state)


def mlstm_step(q, k, v, i, f, state):
    """`mlstm` for one token without gradients; the state's tensors are overwritten. Returns `(h [B, 1, H, V], state)`.

    Args:
        q, k: [B, 1, H, K]; v: [B, 1, H, V]; i, f: [B, 1, H], before activation, any float dtype.
        state: MLSTMState, float32 or float64, the dtype of the calculation.
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check_token(q, k, v, i, f, state, "mlstm")
    return step_memory(q, k, v, i, f, *state), state


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


def window_step(q, k, v, keys, values, index, *, sinks, scale=None):
    """`window_attention` for one token without gradients; its key and value are written into the slots. Returns h [B, 1, H, V].

    Slot j < S holds the j-th token of the row's document, slot S + j the latest token whose index is j mod W. A sink is read from the ring
    while it is inside the window and from its own slot afterwards. Empty slots must be finite; they are not read.

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V].
        keys, values: the slots, [B, G, S + W, K | V], written in place; keys have been rotated before they come here.
        index: [B] int64, number of tokens of the row's document before this one; 0 starts a document, -1 is padding: nothing is written, h is 0.
        sinks: S, of the S + W slots.
        scale: of the scores, 1 / sqrt(K) if None.
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check_slots(q, k, v, keys, values, index, sinks)
    refuse_gradients(q, k, v)
    return (window_in_graphs if torch.compiler.is_compiling() else step_window)(q, k, v, keys, values, index, sinks, scale)


def step_window(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, index: Tensor, sinks: int, scale: float | None) -> Tensor:
    """h [B, 1, H, V] of the window; the new key and value are written into the slots."""
    (B, _, H, K), G, slots = q.shape, k.shape[2], keys.shape[2]
    window, row, oldest = slots - sinks, torch.arange(B, device=q.device), int(index.min())
    ring, dtype, mask, padding = index.clamp_min(0) % window + sinks, calculation_dtype(q, keys, values), None, None
    with torch.no_grad(), without_autocast(q.device):
        if oldest < 0:
            padding = (index < 0)[:, None, None, None]
            k, v = (torch.where(padding, held[row, :, ring][:, None], x) for held, x in ((keys, k), (values, v)))
        for slot in (ring,) if oldest >= sinks else (ring, torch.where((index >= 0) & (index < sinks), index, ring)):
            keys[row, :, slot] = k[:, 0]
            values[row, :, slot] = v[:, 0]
        if oldest < window + sinks - 1:
            slot = torch.arange(slots, device=q.device)
            held = torch.where(slot < sinks, slot <= index[:, None] - window, slot - sinks <= index[:, None])
            mask = held[:, None, None] if padding is None else held[:, None, None] | padding
        q = q.reshape(B, G, H // G, K).to(dtype)  # the query heads of a group are its queries: nothing is repeated
        h = F.scaled_dot_product_attention(q, keys.to(dtype), values.to(dtype), attn_mask=mask, scale=scale).reshape(B, 1, H, -1)
    return (h if padding is None else h.masked_fill(padding, 0.0)).to(v.dtype)


window_in_graphs = torch.library.custom_op("xlstm_kernels::window_step", step_window, mutates_args=("keys", "values"))


@window_in_graphs.register_fake
def _(q, k, v, keys, values, index, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_both(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, i: Tensor, f: Tensor, o: Tensor, C: Tensor, n: Tensor, m: Tensor,
              keys: Tensor, values: Tensor, index: Tensor, sinks: int, scale: float | None) -> Tensor:  # fmt: skip
    """o * mLSTM + (1 - o) * window. An operation of its own in compiled graphs, because its way depends on the values of `index`."""
    repeats = q.shape[2] // v.shape[2]
    memory = step_memory(phi_q, phi_k, v if repeats == 1 else v.repeat_interleave(repeats, 2), i, f, C, n, m)
    window = step_window(q, k, v, keys, values, index, sinks, scale)
    return torch.lerp(window.to(o.dtype), memory.to(o.dtype), o[..., None]).to(v.dtype)


step_in_graphs = torch.library.custom_op("xlstm_kernels::hybrid_step", step_both, mutates_args=("C", "n", "m", "keys", "values"))


@step_in_graphs.register_fake
def _(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_torch(*args):
    return (step_in_graphs if torch.compiler.is_compiling() else step_both)(*args)  # eager calls are spared the dispatcher's 20 us


def step_triton(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale):
    from xlstm_kernels.gpu.decode import hybrid_step_triton  # needs triton

    return hybrid_step_triton(q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks=sinks, scale=scale)


STEPS = {"torch": step_torch, "triton": step_triton}


def choose_step(q, v, C, keys):
    """What "auto" runs: the fused kernel where there is one that can be believed."""
    return "triton" if heads_kernel_is_right("hybrid_step", q, v, calculation_dtype(C, keys), keys.dtype, C.shape[2]) else "torch"


def hybrid_step(q, k, v, phi_q, phi_k, i, f, o, state, keys, values, index, *, sinks, scale=None, backend="auto"):
    """One token of a hybrid layer, o * mLSTM + (1 - o) * window, without gradients; state and slots are overwritten. Returns h [B, 1, H, V].

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V]: the window's, rotated, key/value heads not repeated.
        phi_q, phi_k: features for the mLSTM, [B, 1, H, F]; i, f: its gates before activation, [B, 1, H]; o: output gate in [0, 1], [B, 1, H].
        state, keys, values, index, sinks, scale: as in `mlstm_step` and `window_step`.
        backend: a key of `STEPS`, which runs or raises, or "auto".
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check_slots(q, k, v, keys, values, index, sinks)
    (B, _, H, _), (C, n, m) = q.shape, state
    expect("phi_q", phi_q, B=B, T=1, H=H, K=C.shape[2])
    expect("phi_k", phi_k, B=B, T=1, H=H, K=C.shape[2])
    for name, gate in (("i", i), ("f", f), ("o", o)):
        expect(name, gate, B=B, T=1, H=H)
    expect("state.C", C, B=B, H=H, K=phi_q.shape[3], V=v.shape[3])
    refuse_gradients(q, k, v, phi_q, phi_k, i, f, o, *state)
    backend = resolve(backend, STEPS, q.device, lambda: choose_step(q, v, C, keys))
    return STEPS[backend](q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale)


def check_slots(q, k, v, keys, values, index, sinks):
    """Raise ValueError unless one token's q, k, v fit the slots."""
    (B, _, H, K), G, slots = q.shape, k.shape[2], keys.shape[2]
    expect("q", q, B=B, T=1, H=H, K=K)
    expect("k", k, B=B, T=1, G=G, K=K)
    expect("v", v, B=B, T=1, G=G, V=values.shape[3])
    expect("keys", keys, B=B, G=G, slots=slots, K=K)
    expect("values", values, B=B, G=G, slots=slots, V=values.shape[3])
    if H % G or not 0 <= sinks < slots or tuple(index.shape) != (B,):
        raise ValueError(f"expected H a multiple of G, fewer sinks than slots and index [{B}]; got H={H}, G={G}, sinks={sinks}, slots={slots}, "
                         f"index {list(index.shape)}")


def refuse_gradients(*tensors):
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("a step works in place and has no gradients: call it under torch.no_grad(), or use the function for whole sequences")
