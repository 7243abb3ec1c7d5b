"""The recurrence of a hybrid layer by the config's `memory_cell`: the paper's mLSTM, and two others for comparison.

"linear" gates nothing, i = 0 and f = inf: the linear attention of Katharopoulos et al. 2020. "delta" is the gated delta
rule of Yang et al. 2024 (arXiv 2412.06464). Dims: B batch, T tokens, H heads, F features, V value dim.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from xlstm_kernels import delta, delta_hybrid_step, hybrid_step, mlstm

from xlstm_hybrid.model.mixer import MLSTMMixer


class LinearMixer(MLSTMMixer):
    """Feature maps and the output gate alone: everything is written, nothing forgotten."""

    def input_and_forget_gates(self, x, dtype):
        i = x.new_zeros(*x.shape[:-1], len(self.q_map))
        return i, i + float("inf")


class DeltaMixer(MLSTMMixer):
    """Features of length 1: the delta rule has no normaliser. Its maps may be "silu", so that keys can be orthogonal."""

    def read(self, x, feature_map):
        kind, dtype = self.config.memory_feature_map, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if kind == "silu":
                features = nn.functional.silu(x.to(dtype) @ feature_map.to(dtype)).transpose(1, 2)
            else:
                features = self.features(x.to(dtype), feature_map, kind == "softmax_signed")
            # of length 1, also close to 0 with a finite slope
            features = features * (features.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return features if x.dtype == torch.float16 else features.to(x.dtype)


@dataclass
class Cell:
    """mixer: class of the parameters.  run: the recurrence over T tokens.  step: one token of it and of the window,
    mixed, in the cache's tensors.
    """

    mixer: type
    run: Callable
    step: Callable


CELLS = {
    "mlstm": Cell(MLSTMMixer, mlstm, hybrid_step),
    "linear": Cell(LinearMixer, mlstm, hybrid_step),
    "delta": Cell(DeltaMixer, delta, delta_hybrid_step),
}


def normed(mixer, h):
    """h [B, T, H, V] with an RMS norm of each head, on the scale of the mixer's `norm_weight` [H, V] (`mixer_norm`): as
    in Beck et al. 2024; Hauzenberger et al. 2026 leave it out.
    """
    while hasattr(mixer, "base_layer"):  # PEFT may have wrapped the module that holds the weights
        mixer = mixer.base_layer
    if (
        mixer.norm_weight.is_meta and not h.is_meta
    ):  # offloaded, and this is no call of the module, which would fetch it
        # accelerate is there, as it took the weight away; exported code may name no import but torch and transformers
        with importlib.import_module("accelerate.utils").align_module_device(mixer):
            return normed(mixer, h)
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    x = x * (x.square().mean(-1, keepdim=True) + mixer.config.rms_norm_eps).rsqrt()
    return (x * mixer.norm_weight.to(x.dtype)).to(h.dtype)
