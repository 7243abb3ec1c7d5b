"""A fresh cache of transformers becomes ours: each layer gets what the model's layer of that number needs."""

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer, SlidingLayer
from xlstm_hybrid.model.experimental.variants import cache_layer_of
from xlstm_hybrid.model.kept_groups import KeptKeys
from xlstm_hybrid.model.rollback import ROLLBACK_TOKENS


def adopt_cache(cache, config):
    """Make a fresh stock cache ours: its `hybrid_sliding` layers become `HybridCacheLayer`, its sliding layers get
    their own window.

    `DynamicCache(config=...)` and `StaticCache(config=...)` know one window per model; ours is per layer. A cache in
    use is checked.

    Raises:
        CacheError: the cache has been filled by another model, or with other `mixer_branches`.
    """
    if not isinstance(cache, Cache):
        raise CacheError(
            f"cache: expected a transformers Cache, got {type(cache).__name__}; pass DynamicCache(config=model.config)"
        )
    # Layers without fixed addresses: the masks beside a static one would be wrong
    moving = any(config.kept_groups or ()) or config.sparse_memory > 0 or config.mixer_combine == "joint"
    # less than there are while early layers draft: what nothing will fill cannot be cropped either
    depth = config.num_hidden_layers
    if not any(layer.is_initialized for layer in cache.layers[depth:]):
        del cache.layers[depth:]
    for j, kind in enumerate(config.layer_types[:depth]):
        if j == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[j]
        if (
            moving
            and isinstance(layer, StaticLayer)
            and not isinstance(layer, StaticSlidingWindowLayer)
            and layer.get_seq_length() == 0
        ):
            layer = cache.layers[j] = DynamicLayer()
        if kind == "hybrid_sliding":
            cache.layers[j] = hybrid_layer(layer, config, j, moving)
        elif kind == "sliding_attention" and layer.get_seq_length() == 0 and not isinstance(layer, SlidingLayer):
            window, static = config.window_of(j), isinstance(layer, StaticSlidingWindowLayer) and not moving
            cache.layers[j] = (
                StaticSlidingWindowLayer(max_cache_len=window, sliding_window=window)
                if static
                else SlidingLayer(window)
            )
        if cache.layers[j] is not layer and getattr(layer, "record_past", False):
            cache.layers[j].record_past, cache.layers[j].depth = True, getattr(layer, "depth", ROLLBACK_TOKENS)
    return cache


def hybrid_layer(layer, config, j, moving):
    """`layer` itself if it is layer j's own, or a new one in the place of an empty one."""
    make, capacity, kept = cache_layer_of(config), config.sparse_memory, bool(config.kept_of(j))
    # a memory alone reads no window
    window, sinks = (1, 0) if config.mixer_branches == "memory" else (config.window_of(j), config.sinks_of(j))
    wanted = window, sinks, config.memory_cell, kept, capacity
    if isinstance(layer, HybridCacheLayer):
        if type(layer) is not make or layer.kind != wanted:
            raise CacheError(
                f"cache: layer {j} has window, sinks, memory, kept groups and sparse memory {layer.kind}, expected {wanted}: another model made "
                "it, or mixer_branches or the like have changed since; start from DynamicCache(config=model.config)"
            )
        if layer.is_initialized and layer.state is None and config.mixer_branches != "window":
            raise CacheError(
                f"cache: layer {j} has no state, it was filled with mixer_branches='window', now {config.mixer_branches!r}; "
                "start from DynamicCache(config=model.config)"
            )
        return layer
    if layer.get_seq_length() > 0:
        raise CacheError(
            f"cache: layer {j} is a filled {type(layer).__name__}, expected HybridCacheLayer; "
            "another model made it: start from DynamicCache(config=model.config)"
        )
    more = {"capacity": capacity} if capacity else {}
    kept = KeptKeys(config.kept_window_of(j)) if kept else None
    return make(window, sinks, static=layer.is_compileable and not moving, cell=config.memory_cell, kept=kept, **more)
