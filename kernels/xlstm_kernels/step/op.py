"""One token at a time, in place: the mLSTM state and the ring buffer of the window keep their addresses and their size.

Dims: B batch, H query heads, G key/value heads, K query/key, V value, S sinks, W window. Forward only.
"""

import torch

from xlstm_kernels.backends.arguments import expect
from xlstm_kernels.backends.choose import Kernel, kernel_is_right, resolve_backend
from xlstm_kernels.backends.launch import LARGEST_F, LARGEST_K, LARGEST_V
from xlstm_kernels.backends.numerics import calculation_dtype, wants_gradients
from xlstm_kernels.mlstm.op import check_sequence
from xlstm_kernels.step.check import check_kernel
from xlstm_kernels.step.cpu import step_memory, step_torch, step_window, window_in_graphs

KERNEL = Kernel("hybrid_step", {"K": LARGEST_K, "V": LARGEST_V, "F": LARGEST_F}, check_kernel)


def check_token(q, k, v, i, f, state, whole):
    """Raise ValueError unless a step can take the inputs; `whole` is the function for more than one token."""
    check_sequence(q, k, v, i, f, state, chunk_size=1)
    if q.shape[1] != 1:
        raise ValueError(f"q: expected one token, got T={q.shape[1]}; use {whole} for more")
    refuse_gradients(q, k, v, i, f, *state)


def check_slots(q, k, v, keys, values, index, sinks):
    """Raise ValueError unless one token's q, k, v fit the slots."""
    (B, _, H, K), G, slots = q.shape, k.shape[2], keys.shape[2]
    expect("q", q, B=B, T=1, H=H, K=K)
    expect("k", k, B=B, T=1, G=G, K=K)
    expect("v", v, B=B, T=1, G=G, V=values.shape[3])
    expect("keys", keys, B=B, G=G, slots=slots, K=K)
    expect("values", values, B=B, G=G, slots=slots, V=values.shape[3])
    if H % G or sinks < 0 or not slots or tuple(index.shape) != (B,):
        raise ValueError(
            f"expected H a multiple of G, 0 sinks or more, slots and index [{B}]; got H={H}, G={G}, sinks={sinks}, "
            f"slots={slots}, index {list(index.shape)}"
        )


def fits(*tensors):
    """Whether all of a hybrid step's tensors have the shapes and kinds that go together, in one comparison: asked for
    each token and layer. What is wrong, `expect` says.
    """
    q, _, _, phi_q, _, i, _, _, C, keys, values, _ = tensors
    (B, _, H, K), (_, G, slots, _), F, V = q.shape, keys.shape, phi_q.shape[-1], values.shape[-1]
    gates, queries, phi = (B, 1, H), (B, 1, H, K), (B, 1, H, F)
    wanted = (
        queries,
        (B, 1, G, K),
        (B, 1, G, V),
        phi,
        phi,
        *[gates] * 3,
        (B, H, F, V),
        (B, G, slots, K),
        (B, G, slots, V),
    )
    floating = all(x.is_floating_point() for x in tensors[:-1])
    return floating and G and H % G == 0 and tuple(tuple(x.shape) for x in tensors) == (*wanted, (B,))


def refuse_gradients(*tensors):
    if wants_gradients(*tensors):
        raise ValueError(
            "a step works in place and has no gradients: call it under torch.no_grad(), or use the function for whole "
            "sequences"
        )


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


def window_step(q, k, v, keys, values, index, *, sinks, scale=None, place=None):
    """`window_attention` for one token without gradients; its key and value are written into the slots. Returns h [B,
    1, H, V].

    Slot j < S holds the j-th token of the row's document, slot S + j the latest of its tokens S + j, S + j + W, S + j +
    2 W ... A token that comes before the ring is full needs a slot of its own number and no more: with S + W slots or,
    while documents are shorter, with as many as they have tokens. Empty slots must be finite; they are not read.

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V].
        keys, values: the slots, [B, G, S + W or fewer, K | V], written in place; keys have been rotated before they come
            here.
        index: [B] int64, number of tokens of the row's document before this one; 0 starts a document, -1 is padding:
            nothing is written, h is 0.
        sinks: S, of the S + W slots.
        scale: of the scores, 1 / sqrt(K) if None.
        place: what `place_token(index, slots, sinks)` gives, if another layer has asked already.
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    check_slots(q, k, v, keys, values, index, sinks)
    refuse_gradients(q, k, v)
    if torch.compiler.is_compiling():
        return window_in_graphs(q, k, v, keys, values, index, sinks, scale)
    return step_window(q, k, v, keys, values, index, sinks, scale, place)


def step_triton(*args, place=None):  # it looks at the index itself
    from xlstm_kernels.step.triton import hybrid_step_triton  # needs triton

    return hybrid_step_triton(*args)


BACKENDS = {"torch": step_torch, "triton": step_triton}


def choose_backend(q, v, C, keys):
    """What "auto" runs: the fused kernel where it is right."""
    sizes = {"K": q.shape[-1], "V": v.shape[-1], "F": C.shape[2]}
    return "triton" if kernel_is_right(KERNEL, q, calculation_dtype(C, keys), keys.dtype, **sizes) else "torch"


def hybrid_step(
    q, k, v, phi_q, phi_k, i, f, o, state, keys, values, index, *, sinks, scale=None, backend="auto", place=None
):
    """One token of a hybrid layer, o * mLSTM + (1 - o) * window, without gradients; state and slots are overwritten.
    Returns h [B, 1, H, V].

    Args:
        q: [B, 1, H, K]; k: [B, 1, G, K]; v: [B, 1, G, V]: the window's, rotated, key/value heads not repeated.
        phi_q, phi_k: features for the mLSTM, [B, 1, H, F]; i, f: its gates before activation, [B, 1, H]; o: output gate
            in [0, 1], [B, 1, H].
        state, keys, values, index, sinks, scale, place: as in `mlstm_step` and `window_step`.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Raises:
        ValueError: a shape does not fit, more than one token, or an input that wants gradients.
    """
    C, n, m = state
    if not fits(q, k, v, phi_q, phi_k, i, f, o, C, keys, values, index) or sinks < 0:
        check_slots(q, k, v, keys, values, index, sinks)
        B, H = q.shape[0], q.shape[2]
        expect("phi_q", phi_q, B=B, T=1, H=H, K=C.shape[2])
        expect("phi_k", phi_k, B=B, T=1, H=H, K=C.shape[2])
        for name, gate in (("i", i), ("f", f), ("o", o)):
            expect(name, gate, B=B, T=1, H=H)
        expect("state.C", C, B=B, H=H, K=phi_q.shape[3], V=v.shape[3])
    refuse_gradients(q, k, v, phi_q, phi_k, i, f, o, *state)
    backend = resolve_backend(backend, BACKENDS, q.device, lambda: choose_backend(q, v, C, keys))
    return BACKENDS[backend](q, k, v, phi_q, phi_k, i, f, o, C, n, m, keys, values, index, sinks, scale, place=place)
