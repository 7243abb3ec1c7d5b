"""Which memories a student has: exact ones are given to a student that is there already.

Dims: B rows, T tokens, G key/value heads of a layer.
"""

import copy

from torch import nn

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.exact import Split
from xlstm_hybrid.mixers import MLSTMMixer


def keep_groups(student, kept_groups):
    """A student whose `kept_groups` have the teacher's full attention back, without training. It shares all other tensors with `student`.

    Args:
        student: with hybrid layers; groups that it keeps already must be kept on.
        kept_groups: per layer a list of numbers of key/value groups, see `XLSTMHybridConfig`.
    Raises:
        ConfigError: groups that no such student has, or ones to mix again, for which there are no mixers.
    """
    made = copy.deepcopy(student, {id(x): x for x in (*student.parameters(), *student.buffers())})
    config, before = made.config, student.config
    config.kept_groups = [sorted(kept) for kept in kept_groups]
    config.check()
    for j in range(config.num_hidden_layers):
        if lost := sorted(set(before.kept_of(j)) - set(config.kept_of(j))):
            raise ConfigError(f"kept_groups of layer {j}: groups {lost} have no mixer to go back to; keep them, or convert the teacher again")
    for layer in made.get_decoder().layers:
        attention, j = layer.self_attn, layer.self_attn.layer_idx
        if config.kept_of(j) == before.kept_of(j):
            continue
        attention.split = Split(config.kept_of(j), config.num_key_value_heads, attention.num_key_value_groups)
        rows = [row for row, head in enumerate(before.mixed_heads(j)) if head in config.mixed_heads(j)]
        for mixer in (m for m in attention.modules() if isinstance(m, MLSTMMixer)):
            for name, x in list(mixer.named_parameters(recurse=False)):
                setattr(mixer, name, nn.Parameter(x.detach()[rows].clone(), requires_grad=x.requires_grad))
    return made
