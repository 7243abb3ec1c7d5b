"""An RMS norm of each head's mix before W_o, as in Beck et al. 2024 (`mixer_norm`); Hauzenberger et al. 2026 leave it
out.
"""

import torch


def normed(mixer, h):
    """h [B, T, H, V] on the scale of the mixer's `norm_weight` [H, V]."""
    while hasattr(mixer, "base_layer"):  # PEFT may have wrapped the module that holds the weights
        mixer = mixer.base_layer
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    x = x * (x.square().mean(-1, keepdim=True) + mixer.config.rms_norm_eps).rsqrt()
    return (x * mixer.norm_weight.to(x.dtype)).to(h.dtype)
