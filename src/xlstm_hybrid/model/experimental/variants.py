"""The options of the hybrid layer that replace its way of mixing, one table: they won nothing in docs/arena.md and
stand here for comparison.

Cells, which replace the recurrence alone, and a norm of the mix are in `cells`.
"""

from collections.abc import Callable
from typing import NamedTuple

from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.experimental.branches import window_alone
from xlstm_hybrid.model.experimental.cells import CELLS
from xlstm_hybrid.model.experimental.joint import JointCacheLayer, JointMixer, joint_softmax
from xlstm_hybrid.model.experimental.sparse import SparseCacheLayer, sparse_memory


class Variant(NamedTuple):
    """mix_heads: what runs in the place of `HybridAttention.mix_heads`, with the layer as its first argument.  cache:
    class of the cache layer.
    """

    mix_heads: Callable
    cache: type = HybridCacheLayer


# by `mixer_combine`, `mixer_branches` and whether there is a `sparse_memory`; no two go together, see
# `XLSTMHybridConfig.check`
VARIANTS = {
    ("joint", "both", False): Variant(joint_softmax, JointCacheLayer),
    ("gate", "both", True): Variant(sparse_memory, SparseCacheLayer),
    ("gate", "window", False): Variant(window_alone),
}


def mixer_of(config):
    """The class of a layer's new parameters."""
    return JointMixer if config.mixer_combine == "joint" else CELLS[config.memory_cell].mixer


def cache_layer_of(config):
    """The class of a layer's cache."""
    variant = VARIANTS.get((config.mixer_combine, config.mixer_branches, config.sparse_memory > 0))
    return HybridCacheLayer if variant is None else variant.cache
