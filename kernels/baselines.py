"""What other people's code does with the same tensors, for the benchmark. Nothing here is a dependency: what is missing
is left out, with the reason.

Tensors come by name: q, k, v, phi_q, phi_k [B, T, H, d], i, f [B, T, H]. Every function returns [B, T, H, d]. Those of
other operations (another normaliser, no window) are timed and not compared.
"""

import importlib
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def heads_first(x, names):
    return (x[name].transpose(1, 2) for name in names)


def sdpa(x):
    """Causal softmax attention over the whole sequence, by the kernel that torch chooses, as in a teacher's layer."""
    return F.scaled_dot_product_attention(*heads_first(x, "qkv"), is_causal=True).transpose(1, 2)


def pinned(x, kernel):
    with sdpa_kernel(kernel):
        return sdpa(x)


def band(b, h, t, s, window, sinks):
    return (t >= s) & ((t - s < window) | (s < sinks))


@cache
def flex_of(T, window, sinks, device):
    """Compiled FlexAttention with window and sink tokens for sequences of T tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(partial(band, window=window, sinks=sinks), None, None, T, T, device=device)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def flex(x, window, sinks):
    q, k, v = (a.contiguous() for a in heads_first(x, "qkv"))
    return flex_of(q.shape[2], window, sinks, str(q.device))(q, k, v).transpose(1, 2)


def masked(x, window, sinks):
    """Window and sinks as a T x T mask."""
    t = torch.arange(x["q"].shape[1], device=x["q"].device)
    mask = band(None, None, t[:, None], t, window, sinks)
    return F.scaled_dot_product_attention(*heads_first(x, "qkv"), attn_mask=mask).transpose(1, 2)


def native(x):
    """transformers' own chunkwise mLSTM in plain torch. It scales q and clamps the normaliser."""
    run = importlib.import_module("transformers.models.xlstm.modeling_xlstm").mlstm_chunkwise_native_autograd
    return run(*(a.contiguous() for a in heads_first(x, ("phi_q", "phi_k", "v", "i", "f")))).transpose(1, 2)


def simple_gla(x):
    """flash-linear-attention's gated linear attention with a scalar gate: no input gate, no normaliser."""
    run = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return run(x["phi_q"], x["phi_k"], x["v"], F.logsigmoid(x["f"].float()), scale=1.0)[0]


def mlstm_kernels(x):
    """NXAI's TFLA kernel. It scales q and clamps the normaliser."""
    run = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel("chunkwise--triton_xl_chunk")
    inputs = (a.contiguous() for a in heads_first(x, ("phi_q", "phi_k", "v", "i", "f")))
    return run(*inputs, chunk_size=128).transpose(1, 2)


def all_of(window, sinks):
    """{name: function}"""
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    return {
        "sdpa": sdpa,
        **{f"sdpa {name}": partial(pinned, kernel=kernel) for name, kernel in kernels.items()},
        "flex": partial(flex, window=window, sinks=sinks),
        "masked": partial(masked, window=window, sinks=sinks),
        "native": native,
        "simple_gla": simple_gla,
        "mlstm_kernels": mlstm_kernels,
    }


def reason_against(run, x, backward):
    """Why a baseline cannot be timed here, found by trying, or None."""
    try:
        y = run(x)
        if backward:
            y.sum().backward()
    except ImportError as reason:
        return f"not installed ({reason.name})"
    except Exception as reason:  # another library's way to say no
        return f"{type(reason).__name__}: {str(reason).strip().splitlines()[0][:100] if str(reason).strip() else ''}"
    return None
