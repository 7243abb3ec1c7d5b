"""The public window attention. Dims: B batch, T tokens, H query heads, G key/value heads, K query/key, V value."""

import torch

from xlstm_kernels.backends.arguments import expect
from xlstm_kernels.backends.choose import Kernel, kernel_is_right, resolve_backend
from xlstm_kernels.backends.launch import LARGEST_K, LARGEST_V
from xlstm_kernels.backends.numerics import calculation_dtype, without_autocast
from xlstm_kernels.window.check import check_kernel
from xlstm_kernels.window.cpu import window_banded
from xlstm_kernels.window.reference import window_reference

KERNEL = Kernel("window_attention", {"K": LARGEST_K, "V": LARGEST_V}, check_kernel)


def window_triton(*args, **kwargs):
    from xlstm_kernels.window.triton import window_triton as run  # needs triton

    return run(*args, **kwargs)


BACKENDS = {"reference": window_reference, "banded": window_banded, "triton": window_triton}


def choose_backend(q, k, v):
    """What "auto" runs: the kernel where it is right."""
    right = kernel_is_right(KERNEL, q, calculation_dtype(q, k, v), v.dtype, K=q.shape[-1], V=v.shape[-1])
    return "triton" if right else "banded"


def one_document(index, document, T):
    """True if every row is known to be one document without padding; where looking is expensive, nothing is known."""
    given = [x for x in (index, document) if x is not None]
    if not given or torch.compiler.is_compiling() or given[0].device.type != "cpu":
        return False
    numbered = index is None or torch.equal(index, torch.arange(T, device=index.device).expand_as(index))
    return numbered and (document is None or torch.equal(document, document[:, :1].expand_as(document)))


def check_arguments(q, k, v, window, sinks, index, document):
    """Raise ValueError for shapes and settings that `window_attention` cannot run on."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v: expected [B, T, H, K], [B, T, G, K], [B, T, G, V], got {[list(x.shape) for x in (q, k, v)]}"
        )
    (B, T, H, K), G = q.shape, k.shape[2]
    if tuple(k.shape) != (B, T, G, K) or tuple(v.shape[:3]) != (B, T, G):
        raise ValueError(
            f"k, v: expected [{B}, {T}, G, {K}] and [{B}, {T}, G, V] as q is {list(q.shape)}, got {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    if not G or H % G:
        raise ValueError(f"q has {H} heads, k and v have {G}: expected a multiple")
    if window < 1 or sinks < 0:
        raise ValueError(
            f"window={window}, sinks={sinks}: expected a window of at least 1 token, which is the query's own, and no "
            "negative sinks"
        )
    for name, x in (("index", index), ("document", document)):
        if x is not None:
            expect(name, x, "integer", B=B, T=T)


def window_attention(q, k, v, *, window, sinks, index=None, document=None, scale=None, backend="auto"):
    """Causal attention over the first `sinks` and the last `window` tokens of each document. Returns h [B, T, H, V] in
    v's dtype.

    Calculates in float32, or in float64 if any input is, also under autocast.

    Args:
        q: [B, T, H, K]; k: [B, T, G, K]; v: [B, T, G, V], H a multiple of G, key/value heads not repeated.
        window: tokens a query sees, itself included; sinks: first tokens of its document that it sees besides.
        index: [B, T] integers, the number of real tokens before each in its document; -1 for padding, which neither
            attends nor is attended to and whose h is 0. None: no padding.
        document: [B, T] integers, the document of each token (read at real tokens only); documents lie one after the
            other. None: one.
        scale: of the scores, 1 / sqrt(K) if None.
        backend: a key of `BACKENDS`, which runs or raises, or "auto".
    Raises:
        ValueError: an argument does not fit, with what was expected and what came.
    """
    check_arguments(q, k, v, window, sinks, index, document)
    if one_document(index, document, q.shape[1]):
        index = document = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve_backend(backend, BACKENDS, q.device, lambda: choose_backend(q, k, v))
    with without_autocast(q.device):
        return BACKENDS[backend](q, k, v, window=window, sinks=sinks, index=index, document=document, scale=scale)
