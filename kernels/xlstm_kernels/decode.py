"""One token at a time, in place: the mLSTM state and the ring buffer of the window keep their addresses and their size.

Dims: B batch, H query heads, G key/value heads, K query/key, V value, S sinks, W window. Forward only.
"""

import torch
import torch.nn.functional as F

from xlstm_kernels.mlstm import check
from xlstm_kernels.reference import FORGET_ALL, finite, ratio


def mlstm_step(q, k, v, i, f, state):
    """`mlstm` for one token without gradients; the state's tensors are overwritten. Returns `(h [B, 1, H, V], state)`.

    Args:
        q, k: [B, 1, H, K]; v: [B, 1, H, V]; i, f: [B, 1, H], before activation, any float dtype.
        state: MLSTMState, float32 or float64, the dtype of the calculation.
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check(q, k, v, i, f, state, chunk_size=1)
    if q.shape[1] != 1:
        raise ValueError(f"q: expected one token, got T={q.shape[1]}; use mlstm for more")
    refuse_gradients(q, k, v, i, f, *state)
    C, n, m = state
    out_dtype, (q, k, v, i, f) = v.dtype, (x[:, 0].to(C.dtype) for x in (q, k, v, i, f))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logf = F.threshold(F.logsigmoid(f), FORGET_ALL, float("-inf"))
        new_m = torch.maximum(logf + m, i)
        scale = finite(new_m)
        decay = (logf + (m - scale)).exp_()[..., None]  # m - scale first, see `mlstm_recurrent`
        k = k * (i - scale).exp_()[..., None]
        C.mul_(decay[..., None]).addcmul_(k[..., None], v[..., None, :])
        n.mul_(decay).add_(k)
        m.copy_(new_m)
        h = ratio((q[..., None, :] @ C)[..., 0, :], (q * n).sum(-1, keepdim=True))
    return h[:, None].to(out_dtype), state


def window_step(q, k, v, keys, values, index, *, scale=None):
    """`window_attention` for one token without gradients; its key and value are written into the slots. Returns h [B, 1, H, V].

    Slot j < S holds the j-th token of the row's document, slot S + j the latest token whose index is j mod W. A sink is read from the ring
    while it is inside the window, from its own slot afterwards.

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V].
        keys, values: `RingSlots` as made by `ring_slots`, written in place.
        index: [B] int64, number of tokens of the document before this one.
    """
    refuse_gradients(q, k, v)
    raise NotImplementedError
