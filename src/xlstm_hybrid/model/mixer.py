"""The new parameters of a hybrid layer, feature maps and gates, and how they are shared out to several processes.

Dims: B batch, T tokens, D hidden size, H query heads, K query/key/value dim, P columns of a feature map, F features.
Source: Hauzenberger et al. 2026 (arXiv 2603.15590), with an mLSTM as in Beck et al. 2024.
"""

import contextlib

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.models.llama.modeling_llama import repeat_kv

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.experimental.branches import clamped


class HeadsParallel(TensorParallelLayer):
    """Tensor-parallel style of `MLSTMMixer`: every parameter is cut along its heads, dim 0, and each rank works on its
    own.

    Queries, keys and values come from projections that are cut alike; the layer's input, which the gates read, is whole
    on every rank, so that its gradient has to be summed over them.
    """

    def should_use_local_tensors(self, module):
        return True

    def validate_param(self, module, param, mesh, parameter_name=None):
        config, size = module.config, f"tp_size={mesh.size()}"
        heads, groups, p = config.num_attention_heads, config.num_key_value_heads, config.window_dropout
        wrong = None
        if any(config.kept_groups or ()):
            wrong = f"kept_groups with {size}: processes would have unlike parts; use one process"
        for field, needed in (("mixer_norm", False), ("mixer_combine", "gate")):
            if not wrong and (value := getattr(config, field)) != needed:
                wrong = f"{field}={value!r} works in one process only, expected {needed!r} with {size}; load it without tp_plan"
        if not wrong and p:
            wrong = f"window_dropout={p} with {size}: each process would draw its own rows; set it to 0"
        if not wrong and (heads % mesh.size() or groups % mesh.size()):
            wrong = f"{heads} query and {groups} key/value heads cannot be shared out to {size} processes; choose a tp_size that divides both"
        if wrong:
            raise ConfigError(f"{parameter_name}: {wrong}")

    def shard_param(self, module, param, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = module._parameters[param]
        module._parameters[param] = nn.Parameter(
            distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), requires_grad=whole.requires_grad
        )

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        return (whole.to_local(grad_placements=[Partial()]), *args[1:]), kwargs


class NotParallel(TensorParallelLayer):
    """Tensor-parallel style of modules that are not shared out, and that refuse it."""

    def validate_param(self, module, param, mesh, parameter_name=None):
        raise ConfigError(
            f"{parameter_name}: layers of linear attention with tp_size={mesh.size()}: they are not shared out; load the model without "
            "tp_plan"
        )


ALL_PARALLEL_STYLES.register("mlstm_heads", HeadsParallel())
ALL_PARALLEL_STYLES.register("linear_attention", NotParallel())
# Of the mixer's parameters those that stay in float32, as far as a configuration has them
GATE_PARAMETERS = ["igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias", "joint_scale"]


def wide(*shape):
    """A parameter that is float32 at least, whatever dtype a model is made in."""
    return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def cast(x, dtype):
    """x in `dtype`; nothing is called where it is already: each token asks this of each tensor of each layer."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(x):
    """A context in which autocast rounds nothing where x is; free without autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


class MLSTMMixer(nn.Module):
    """What conversion adds to an attention layer: feature maps for the mLSTM, its input and forget gates, and the gate
    that mixes it with the window.

    Gate parameters stay in float32; in a float16 model maps do, too. `memory_feature_map`, `memory_feature_dim` and
    `mixer_gate_input` of the config say what the maps and the output gate read; other cells and one softmax over both
    branches are in `experimental`.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        H, K, D = len(config.mixed_heads(layer_idx)), config.head_dim, config.hidden_size
        P, self.reads_qkv = config.memory_feature_dim or K, config.mixer_gate_input == "qkv"
        self.q_map, self.k_map = nn.Parameter(torch.empty(H, K, P)), nn.Parameter(torch.empty(H, K, P))
        if config.memory_cell != "linear":
            self.igate_weight, self.fgate_weight, self.fgate_bias = wide(H, D), wide(H, D), wide(H)
        if config.mixer_combine == "gate":
            self.ogate_weight, self.ogate_bias = wide(H, 3 * K if config.mixer_gate_input == "qkv" else D), wide(H)
        if config.mixer_norm:
            self.norm_weight = nn.Parameter(torch.empty(H, K))

    def forward(self, hidden_states, raw, query, key, tokens):
        """What the mLSTM reads of T tokens, and the output gate.

        Args:
            hidden_states: input of the layer, [B, T, D].
            raw: q, k and v before QK-norm and RoPE, [B, T, H | G, K].
            query, key: after QK-norm and, unless `memory_rope` is False, RoPE, [B, H | G, T, K].
            tokens: `Tokens`; padding neither writes nor forgets, a document start forgets everything.
        Returns:
            `(phi_q [B, T, H, F], phi_k [B, T, H, F], i [B, T, H], f [B, T, H], o [B, T, H])`: features, gates before
            activation, and the output gate itself, always last. The features are None if there is no memory branch to
            read them.
        """
        branches = vars(self.config)["mixer_branches"]  # transformers' configs look every attribute up in Python
        i, f, o = self.gates(hidden_states, raw)
        if tokens.blind is not None or branches != "both":
            o = clamped(o, tokens, branches)
        if branches == "window":
            return None, None, i, f, o
        if not tokens.plain:
            real, start = tokens.real[..., None], tokens.start[..., None]
            i = torch.where(real, i, float("-inf"))
            f = torch.where(start, float("-inf"), torch.where(real, f, float("inf")))
        key = repeat_kv(key, query.shape[1] // key.shape[1])
        return self.read(query, self.q_map), self.read(key, self.k_map), i, f, o

    def gates(self, hidden_states, raw):
        """`(i, f, o)`, each [B, T, H] in float32 at least: gate pre-activations, and the output gate itself.

        Args:
            hidden_states: input of the layer, [B, T, D].
            raw: q, k and v before QK-norm and RoPE, [B, T, H | G, K].
        """
        with without_autocast(hidden_states):
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            x = cast(hidden_states, dtype)
            i, f = self.input_and_forget_gates(x, dtype)
            weight, bias = cast(self.ogate_weight, dtype), cast(self.ogate_bias, dtype)
            if self.reads_qkv:
                (q, *kv), K = raw, weight.shape[-1] // 3
                # [B, G, T, 2 K] by [G, 2 K, R]: keys and values are not repeated for the R heads that share them
                shared = weight[:, K:].unflatten(0, (kv[0].shape[2], -1)).transpose(1, 2)
                shared = (cast(torch.cat(kv, -1), dtype).transpose(1, 2) @ shared).transpose(1, 2).flatten(2)
                o = (cast(q, dtype) * weight[:, :K]).sum(-1) + shared + bias
            else:
                o = nn.functional.linear(x, weight, bias)
        return i, f, torch.sigmoid(o)

    def input_and_forget_gates(self, x, dtype):
        i = nn.functional.linear(x, cast(self.igate_weight, dtype))
        return i, nn.functional.linear(x, cast(self.fgate_weight, dtype), cast(self.fgate_bias, dtype))

    def read(self, x, feature_map):
        """Features [B, T, H, F] of queries or keys x [B, H, T, K] as the cell takes them."""
        return self.features(x, feature_map, vars(self.config)["memory_feature_map"] == "softmax_signed")

    @staticmethod
    def features(x, feature_map, signed=False):
        """softmax(x P_h) or, if `signed`, softmax([x P_h, -x P_h]) over the features: [B, H, T, K] -> [B, T, H, F],
        product and softmax in float32 at least (Hedgehog, Zhang et al. 2024; here after RoPE).

        Rounded to the dtype of x, but never to float16: it has no numbers below 6e-8, and with the features the
        normaliser would be lost.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            # a rounded exponent is a relative error of the feature
            exponents = cast(x, dtype) @ cast(feature_map, dtype)
            features = torch.softmax(torch.cat([exponents, -exponents], -1) if signed else exponents, -1)
        return (features if x.dtype == torch.float16 else cast(features, x.dtype)).transpose(1, 2)

    def first_map(self):
        """[K, P] a feature map to begin with: the identity, cut or repeated to the right width, with a sign and a scale
        of its own for each copy, so that no two features are the same and gradients tell them apart.
        """
        K, P = self.q_map.shape[1:]
        # the signed map brings the other sign itself
        signs = (1,) if self.config.memory_feature_map == "softmax_signed" else (1, -1)
        scales = [sign * 0.5**n for n in range(-(-P // K)) for sign in signs]
        return torch.cat([scale * torch.eye(K, dtype=self.q_map.dtype) for scale in scales], 1)[:, :P]

    def forget_bias(self):
        """[H] logits whose time constants 1 / (1 - f) are spaced logarithmically from W / 4 to 4 x the training
        context.
        """
        window = self.config.window_of(self.layer_idx)
        low, high = max(window / 4, 2.0), max(4.0 * self.config.mlstm_context, window)
        steps = torch.linspace(0, 1, self.config.num_attention_heads, dtype=torch.float64)
        return (low * (high / low) ** steps - 1).log().float()[self.config.mixed_heads(self.layer_idx)]
