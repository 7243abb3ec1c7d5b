"""The recurrent branch of a hybrid layer: feature maps, gates and the mLSTM, and how it is shared out to several processes.

Dims: B batch, T tokens, D hidden size, H query heads, K query/key dim, P columns of a feature map, F features, V value dim.
Source: Hauzenberger et al. 2026 (arXiv 2603.15590), with an mLSTM as in Beck et al. 2024.
"""

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.models.llama.modeling_llama import repeat_kv
from xlstm_kernels import delta, mlstm

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.experimental.joint import left


class HeadsParallel(TensorParallelLayer):
    """Tensor-parallel style of `MLSTMMixer`: every parameter is cut along its heads, dim 0, and each rank works on its own.

    Queries, keys and values come from projections that are cut alike; the layer's input, which the gates read, is whole on every rank, so that
    its gradient has to be summed over them.
    """

    def should_use_local_tensors(self, module):
        return True

    def validate_param(self, module, param, mesh, parameter_name=None):
        heads, groups = module.config.num_attention_heads, module.config.num_key_value_heads
        if any(module.config.kept_groups or ()):
            raise ConfigError(f"{parameter_name}: kept_groups with tp_size={mesh.size()}: processes would have unlike parts; use one process")
        for field, needed in (("mixer_norm", False), ("mixer_combine", "gate")):
            if (found := getattr(module.config, field)) != needed:
                raise ConfigError(
                    f"{parameter_name}: {field}={found!r} works in one process only, expected {needed!r} with tp_size={mesh.size()}; "
                    "load it without tp_plan"
                )
        if module.config.window_dropout:
            raise ConfigError(
                f"{parameter_name}: window_dropout={module.config.window_dropout} with tp_size={mesh.size()}: each process would draw its own rows; "
                "set it to 0"
            )
        if heads % mesh.size() or groups % mesh.size():
            raise ConfigError(
                f"{parameter_name}: {heads} query and {groups} key/value heads cannot be shared out to tp_size={mesh.size()} processes; "
                "choose a tp_size that divides both"
            )

    def shard_param(self, module, param, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = module._parameters[param]
        module._parameters[param] = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), requires_grad=whole.requires_grad)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        return (whole.to_local(grad_placements=[Partial()]), *args[1:]), kwargs


ALL_PARALLEL_STYLES.register("mlstm_heads", HeadsParallel())


def wide(*shape):
    """A parameter that is float32 at least, whatever dtype a model is made in."""
    return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


class MLSTMMixer(nn.Module):
    """The mLSTM of one layer and the gate that mixes it with window attention (METHOD 1.1), or what the config's `memory_*` and `mixer_*` say.

    Only new parameters live here: feature maps, input, forget and output gates. Gate parameters stay in float32; in a float16 model maps do, too.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        H, K, D = len(config.mixed_heads(layer_idx)), config.head_dim, config.hidden_size
        P = config.memory_feature_dim or K
        self.q_map, self.k_map = nn.Parameter(torch.empty(H, K, P)), nn.Parameter(torch.empty(H, K, P))
        if config.memory_cell != "linear":
            self.igate_weight, self.fgate_weight, self.fgate_bias = wide(H, D), wide(H, D), wide(H)
        if config.mixer_combine == "gate":
            self.ogate_weight, self.ogate_bias = wide(H, 3 * K if config.mixer_gate_input == "qkv" else D), wide(H)
        if config.mixer_norm:
            self.norm_weight = nn.Parameter(torch.empty(H, K))

    def first_map(self):
        """[K, P] a feature map to begin with: the identity, cut or repeated to the right width, with a sign and a scale of its own for each copy,
        so that no two features are the same and gradients tell them apart."""
        K, P = self.q_map.shape[1:]
        signs = (1,) if self.config.memory_feature_map == "softmax_signed" else (1, -1)  # the signed map brings the other sign itself
        scales = [sign * 0.5**n for n in range(-(-P // K)) for sign in signs]
        return torch.cat([scale * torch.eye(K, dtype=self.q_map.dtype) for scale in scales], 1)[:, :P]

    def forget_bias(self):
        """[H] logits whose time constants 1 / (1 - f) are spaced logarithmically from W / 4 to 4 x the training context."""
        window = self.config.window_of(self.layer_idx)
        low, high = max(window / 4, 2.0), max(4.0 * self.config.mlstm_context, window)
        steps = torch.linspace(0, 1, self.config.num_attention_heads, dtype=torch.float64)
        return (low * (high / low) ** steps - 1).log().float()[self.config.mixed_heads(self.layer_idx)]

    def gates(self, hidden_states, qkv):
        """`(i, f, o)`, each [B, T, H] in float32 at least: gate pre-activations, and the output gate itself.

        Args:
            hidden_states: input of the layer, [B, T, D].
            qkv: projections before QK-norm and RoPE, heads repeated, [B, T, H, 3 K].
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            x = hidden_states.to(dtype)
            if self.config.memory_cell == "linear":  # everything is written, nothing forgotten
                i = x.new_zeros(qkv.shape[:-1])
                f = i + float("inf")
            else:
                i = nn.functional.linear(x, self.igate_weight.to(dtype))
                f = nn.functional.linear(x, self.fgate_weight.to(dtype), self.fgate_bias.to(dtype))
            weight, bias = self.ogate_weight.to(dtype), self.ogate_bias.to(dtype)
            read_qkv = self.config.mixer_gate_input == "qkv"
            o = torch.sigmoid((qkv.to(dtype) * weight).sum(-1) + bias if read_qkv else nn.functional.linear(x, weight, bias))
        return i, f, o

    def clamped(self, o, tokens):
        """The output gate [B, T, H] where branches are left out: 1 is the memory alone, 0 the window alone."""
        if self.config.mixer_branches != "both":
            return torch.full_like(o, self.config.mixer_branches == "memory")
        if tokens.blind is None:
            return o
        return torch.where(tokens.blind[:, None, None] & tokens.real[..., None], 1.0, o)

    def normed(self, h):
        """h [B, T, H, V] of the layer's heads before W_o, with a `mixer_norm` each on the scale of its weight."""
        if not self.config.mixer_norm:
            return h
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        x = x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return (x * self.norm_weight.to(x.dtype)).to(h.dtype)

    def read(self, x, feature_map):
        """Features [B, T, H, F] of queries or keys x [B, H, T, K] as the cell takes them."""
        kind, cell = self.config.memory_feature_map, self.config.memory_cell
        if cell != "delta":
            return self.features(x, feature_map, kind == "softmax_signed")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if kind == "silu":
                features = nn.functional.silu(x.to(dtype) @ feature_map.to(dtype)).transpose(1, 2)
            else:
                features = self.features(x.to(dtype), feature_map, kind == "softmax_signed")
            features = features * (features.square().sum(-1, keepdim=True) + 1e-6).rsqrt()  # of length 1, also close to 0 with a finite slope
        return features if x.dtype == torch.float16 else features.to(x.dtype)

    @staticmethod
    def features(x, feature_map, signed=False):
        """softmax(x P_h) or, if `signed`, softmax([x P_h, -x P_h]) over the features: [B, H, T, K] -> [B, T, H, F], product and softmax in float32
        at least (Hedgehog, Zhang et al. 2024; here after RoPE).

        Rounded to the dtype of x, but never to float16: it has no numbers below 6e-8, and with the features the normaliser would be lost.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            exponents = x.to(dtype) @ feature_map.to(dtype)  # a rounded exponent is a relative error of the feature
            features = torch.softmax(torch.cat([exponents, -exponents], -1) if signed else exponents, -1)
        return (features if x.dtype == torch.float16 else features.to(x.dtype)).transpose(1, 2)

    def forward(self, hidden_states, qkv, query, key, value, tokens, state=None, step=None, record=None):
        """Mix-ready output of the mLSTM.

        Args:
            query, key, value: after QK-norm and, unless `memory_rope` is False, RoPE, heads repeated, [B, H, T, K | V].
            tokens: `Tokens`; padding neither writes nor forgets, a document start forgets everything.
            state: MLSTMState of the tokens before, or None.
            step: `HybridCacheLayer.step` for one token, which mixes the branches and keeps the state.
            record: `HybridCacheLayer.record`, called with what rolling back will have to repeat.
        Returns:
            `(h [B, T, H, V], o [B, T, H], MLSTMState)`; with `step` h is mixed already and the state is None. Without a memory branch h and the
            state are None.
        """
        i, f, o = self.gates(hidden_states, qkv)
        o = self.clamped(o, tokens)
        if self.config.mixer_branches == "window":
            if record is not None:
                record((), self.config.mlstm_chunk_size)
            return None if step is None else step(features=(), gates=()), o, None
        real, start = tokens.real[..., None], tokens.start[..., None]
        i = torch.where(real, i, float("-inf"))
        f = torch.where(start, float("-inf"), torch.where(real, f, float("inf")))
        q, k = self.read(query, self.q_map), self.read(key, self.k_map)
        if step is not None:
            return step(features=(q, k), gates=(i, f, o)), o, None
        inputs, chunk_size = (k, value.transpose(1, 2), i, f), self.config.mlstm_chunk_size
        if record is not None:
            record(inputs, chunk_size)
        run = delta if self.config.memory_cell == "delta" else mlstm
        h, state = run(q, *inputs, state=state, chunk_size=chunk_size)
        return h, o, state


class JointMixer(MLSTMMixer):
    """One softmax over both branches (LoLCATs, Zhang et al. 2024): tokens in the window or the sinks weigh exp(q k / sqrt K), all others of the
    document before them exp(s_h) phi(q) phi(k), with one factor exp(s_h) per head. Every pair of tokens of a call is calculated: a baseline.
    """

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.joint_scale = wide(len(config.mixed_heads(layer_idx)))

    def read_keys(self, key):
        """Features [B, n, H, F] of the keys [B, G, n, K] of a cache."""
        return self.read(repeat_kv(key, len(self.k_map) // key.shape[1]), self.k_map)

    def forward(self, hidden_states, qkv, query, key, value, tokens, scale, layer=None):
        """`(h [B, T, H, V], share [B, T, H] of the features in the weights, weights [B, H, T, columns])`; arguments as in `MLSTMMixer.forward`.

        Args:
            scale: of the products of queries and keys, which are those of the window, too.
            layer: `HybridCacheLayer` of the tokens before, whose state is of those that have left its ring; it is left as it is.
        """
        window, sinks, T = self.config.window_of(self.layer_idx), self.config.sinks_of(self.layer_idx), query.shape[2]
        near = tokens.visible(window, sinks)
        far, state = tokens.visible(T, 0) & ~near, None
        if layer is not None and layer.is_initialized:
            repeats, state = len(self.k_map) // layer.keys.shape[1], layer.state
            key, value = (torch.cat([repeat_kv(old, repeats), x], 2) for old, x in ((layer.keys, key), (layer.values, value)))
            near, far = torch.cat([layer.visible(tokens), near], -1), torch.cat([left(layer, tokens), far], -1)
        near, far = near[:, None], far[:, None]  # [B, 1, T, columns]
        q, k = (self.read(*pair).transpose(1, 2) for pair in ((query, self.q_map), (key, self.k_map)))
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, value, least, factor = q.to(dtype), k.to(dtype), value.to(dtype), torch.finfo(dtype).tiny, self.joint_scale.to(dtype)[:, None, None]
        with torch.autocast(query.device.type, enabled=False):
            close = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
            rest = (q @ k.transpose(-1, -2)).clamp_min(least).log() + factor
            exponents = torch.where(near, close, rest).masked_fill(~(near | far), float("-inf"))
            if state is None:
                weights = torch.softmax(exponents, -1)
                return (weights @ value).transpose(1, 2), weights.masked_fill(near, 0.0).sum(-1).transpose(1, 2), weights
            den = q @ state.n[..., None].to(dtype)  # [B, H, T, 1]; the state is one more column, of all that it has read
            empty = (den < least) | (tokens.document > 0)[:, None, :, None]
            log_den = (den.clamp_min(least).log() + factor).masked_fill(empty, float("-inf"))
            old, weights = torch.softmax(torch.cat([log_den, exponents], -1), -1).split([1, exponents.shape[-1]], -1)
            h = weights @ value + old * (q @ state.C.to(dtype)) / den.clamp_min(least)
            share = old[..., 0] + weights.masked_fill(near, 0.0).sum(-1)
        return h.transpose(1, 2), share.transpose(1, 2), weights
