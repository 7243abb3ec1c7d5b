"""A student over several processes of vLLM's tensor parallelism: heads are cut with their memory, window and gates, MLPs by
their width, the vocabulary by its rows.

Each process builds the layers of a narrower student (`share_of`) and loads its parts of the tensors (`part_of`); what
`o_proj` and `down_proj` give is summed. Products stay ours: vLLM's own linear layers know no other than torch's here.
Dims: N tokens, D hidden size, H query heads, G key/value heads, K head dim, V rows of the vocabulary.
"""

import copy

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from xlstm_hybrid.model.attention import rms_norm
from xlstm_hybrid.model.linear import Linear

# by the last module in a tensor's name; whatever is not listed is whole in each process
BY_OUTPUTS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "mlstm", "embed_tokens", "lm_head"}  # dim 0
BY_INPUTS = {"o_proj", "down_proj"}  # dim 1 of the weight; the bias is the first process's


def wrong_shares(config, size):
    """Why a student cannot be cut for `size` processes, a list of messages."""
    wrong, sizes = [], {name: getattr(config, name) for name in ("num_attention_heads", "intermediate_size")}
    wrong += [f"{name}={n}, expected a multiple" for name, n in sizes.items() if n % size]
    if config.num_experts:
        wrong.append(f"num_experts={config.num_experts}, expected none")
    G = config.num_key_value_heads
    if G % size and size % G:
        wrong.append(f"num_key_value_heads={G}, expected a multiple or a divisor")
    for j, kept in enumerate(() if wrong else config.kept_groups or ()):
        counts = [sum(g in kept for g in groups_of(config, size, rank)) for rank in range(size)]
        if len(set(counts)) > 1:
            wrong.append(
                f"kept_groups of layer {j} are {sorted(kept)} of {G}: the processes would have {counts} of them, expected as many each"
            )
    return wrong


def groups_of(config, size, rank):
    """Numbers of the key/value groups of one process; where there are fewer than processes, several have the same."""
    G = config.num_key_value_heads
    first, own = rank * G // size, max(G // size, 1)
    return range(first, first + own)


def share_of(config, size, rank=0):
    """Configuration of the student that one process of `size` calculates. But for which of its groups are kept it is the
    same in all of them.
    """
    if size == 1:
        return config
    share, groups = copy.copy(config), groups_of(config, size, rank)
    share.num_attention_heads, share.num_key_value_heads = config.num_attention_heads // size, len(groups)
    share.intermediate_size, share.vocab_size = config.intermediate_size // size, -(-config.vocab_size // size)
    if config.kept_groups:
        share.kept_groups = [[g - groups.start for g in kept if g in groups] for kept in config.kept_groups]
    return share


def part_of(config, name, x, shape, size, rank):
    """The part of a checkpoint's tensor x that belongs to one process of `size`, or None if parts of this `shape` do not
    make it up. Rows that a vocabulary lacks to be a multiple are 0.

    Args:
        config: that of the whole student.
        name: the tensor's, "model.layers.0.self_attn.q_proj.weight".
    """
    module, kind = name.split(".")[-2:]
    if module in BY_INPUTS and kind == "bias" and rank > 0:
        x = torch.zeros_like(x)
    dim = 0 if module in BY_OUTPUTS else 1 if module in BY_INPUTS and kind == "weight" else None
    if dim is None:
        return x if x.shape == shape else None
    pieces = min(size, config.num_key_value_heads) if module in ("k_proj", "v_proj") else size
    if module in ("embed_tokens", "lm_head") and len(x) == config.vocab_size:
        x = torch.cat([x, x.new_zeros(-len(x) % size, *x.shape[1:])])
    whole = [n * pieces if d == dim else n for d, n in enumerate(shape)]
    return x.chunk(pieces, dim)[rank * pieces // size] if [*x.shape] == whole else None


class Summed(Linear):
    """A product with inputs that are cut: each process has a summand, and gets the sum."""

    def forward(self, x):
        return tensor_model_parallel_all_reduce(super().forward(x))


class Vocabulary(nn.Embedding):
    """Embeddings [N, D] of which each process has V rows."""

    def forward(self, input_ids):
        if get_tensor_model_parallel_world_size() == 1:
            return super().forward(input_ids)
        rows = input_ids - get_tensor_model_parallel_rank() * self.num_embeddings
        own = (rows >= 0) & (rows < self.num_embeddings)
        x = super().forward(torch.where(own, rows, 0))
        return tensor_model_parallel_all_reduce(torch.where(own[..., None], x, 0.0))


def share_layer(layer, config, size, rank):
    """Connect a decoder layer of a process's share with those of the others.

    Args:
        config: that of the whole student.
    """
    if size == 1:
        return
    attention, mlp = layer.self_attn, layer.mlp
    for module, name in ((attention, "o_proj"), (mlp, "down_proj")):
        own = getattr(module, name)
        setattr(module, name, Summed(own.in_features, own.out_features, bias=own.bias is not None))
    if config.qk_norm == "full":
        for name, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
            setattr(
                attention, name, norm_of_all(rms_norm(config, heads * config.head_dim), min(size, heads), size, rank)
            )


def norm_of_all(norm, pieces, size, rank):
    """Let a norm over all heads take in those of one process [..., width] and give them back. The heads are in so many
    `pieces`; with fewer than processes, neighbours have the same.
    """

    def gather(module, args):
        whole = tensor_model_parallel_all_gather(args[0].contiguous())
        return whole.unflatten(-1, (size, -1))[..., :: size // pieces, :].flatten(-2)

    def cut(module, args, normed):
        return normed.chunk(pieces, -1)[rank * pieces // size].contiguous()

    norm.register_forward_pre_hook(gather)
    norm.register_forward_hook(cut)
    return norm
