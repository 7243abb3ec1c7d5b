"""A fresh cache of transformers becomes ours: each layer gets what the model's layer of that number needs."""

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import HybridCacheLayer, PlacedLayer, SlidingLayer
from xlstm_hybrid.model.configuration import LINEAR
from xlstm_hybrid.model.experimental.variants import cache_layer_of
from xlstm_hybrid.model.kept_groups import KeptKeys
from xlstm_hybrid.model.linear_attention import LinearCacheLayer
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
    # each generated token comes here, and transformers' configs look every attribute up in Python
    fields, make, spans = vars(config), cache_layer_of(config), config.spans()
    branches, cell, capacity = fields["mixer_branches"], fields["memory_cell"], fields["sparse_memory"]
    kept_groups, depth = fields["kept_groups"], fields["num_hidden_layers"]
    # Layers without fixed addresses: the masks beside a static one would be wrong
    moving = any(kept_groups or ()) or capacity > 0 or fields["mixer_combine"] == "joint"
    moving |= LINEAR in fields["layer_types"]
    # less than there are while early layers draft: what nothing will fill cannot be cropped either
    if not any(in_use(layer) for layer in cache.layers[depth:]):
        del cache.layers[depth:]
    for j, (kind, window, sinks) in enumerate(spans[:depth]):
        if j == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[j]
        if kind == LINEAR:
            if isinstance(layer, LinearCacheLayer):
                continue
            if in_use(layer):
                raise CacheError(
                    f"cache: layer {j} is a filled {type(layer).__name__}, expected LinearCacheLayer; "
                    "another model made it: start from DynamicCache(config=model.config)"
                )
            cache.layers[j] = LinearCacheLayer()
        elif kind == "hybrid_sliding":
            kept = bool(kept_groups and kept_groups[j])
            if branches == "memory":  # alone it reads no window
                window, sinks = 1, 0
            wanted = window, sinks, cell, kept, capacity
            if isinstance(layer, HybridCacheLayer):
                check_layer(layer, j, make, wanted, branches)
                continue
            if layer.get_seq_length() > 0:
                raise CacheError(
                    f"cache: layer {j} is a filled {type(layer).__name__}, expected HybridCacheLayer; "
                    "another model made it, or PEFT's prefix tuning, which has no state for the mLSTM (use lora_config): "
                    "start from DynamicCache(config=model.config)"
                )
            static = layer.is_compileable and not moving
            more = {"capacity": capacity} if capacity else {}
            kept = KeptKeys(config.kept_window_of(j)) if kept else None
            cache.layers[j] = make(window, sinks, static=static, cell=cell, kept=kept, **more)
        elif isinstance(layer, SlidingLayer | PlacedLayer):
            continue
        elif kind == "full_attention" and not (moving and isinstance(layer, StaticLayer)):
            continue  # transformers' own serves; a static one's length is on the GPU, and looking would wait
        elif layer.get_seq_length() > 0:
            continue
        elif kind == "sliding_attention":
            if isinstance(layer, StaticSlidingWindowLayer) and not moving:
                cache.layers[j] = StaticSlidingWindowLayer(max_cache_len=window, sliding_window=window)
            else:
                cache.layers[j] = SlidingLayer(window)
        elif moving and isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer):
            cache.layers[j] = DynamicLayer()
        if cache.layers[j] is not layer and getattr(layer, "record_past", False):
            cache.layers[j].record_past, cache.layers[j].depth = True, getattr(layer, "depth", ROLLBACK_TOKENS)
    return cache


def in_use(layer):
    """Whether a cache layer of any kind holds something; transformers' own for linear attention says so per state."""
    return any(getattr(layer, "has_previous_state", {}).values()) or getattr(layer, "is_initialized", False)


def place_tokens(cache, layers, real):
    """Make the sliding layers of these numbers know their tokens' places, `real` [B, columns] tells padding from tokens
    so far.

    Raises:
        CacheError: layers that cannot, as those of a static cache.
    """
    for j in layers:
        if isinstance(layer := cache.layers[j], SlidingLayer):
            cache.layers[j] = PlacedLayer.of(layer, real)
        elif not isinstance(layer, PlacedLayer):
            raise CacheError(
                f"cache: layer {j} is a {type(layer).__name__}, whose window counts the padding that stands after tokens as if it "
                "were text; pad on the left, or start from DynamicCache(config=model.config)"
            )


def check_layer(layer, j, make, wanted, branches):
    """Raise CacheError unless `layer` is layer j's own: of class `make` and kind `wanted`, with what `branches` need."""
    if type(layer) is not make or layer.kind != wanted:
        raise CacheError(
            f"cache: layer {j} has window, sinks, memory, kept groups and sparse memory {layer.kind}, expected {wanted}: another model made "
            "it, or mixer_branches or the like have changed since; start from DynamicCache(config=model.config)"
        )
    if layer.is_initialized and layer.state is None and branches != "window":
        raise CacheError(
            f"cache: layer {j} has no state, it was filled with mixer_branches='window', now {branches!r}; "
            "start from DynamicCache(config=model.config)"
        )
