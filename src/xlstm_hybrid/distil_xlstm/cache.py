"""The cache of a recurrent block: its state and the last inputs of its convolution. Its size does not depend on the
context.

Dims: B batch, F features of the convolution, c tokens that it looks back (its kernel size less one).
"""

import torch
from transformers.cache_utils import Cache

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.cache import StateLayer


class RecurrentLayer(StateLayer):
    """What one block remembers.

    memory: MLSTMState or SLSTMState, at least float32.  conv: [B, c, F], the last inputs of the present document, 0
    where it has fewer.
    count: [B] real tokens of the present document.  seen_tokens: columns so far, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.memory, self.conv, self.count, self.seen_tokens = None, None, None, 0

    def hold(self, memory, conv, count, columns):
        """Take over what a call of `columns` tokens leaves behind."""
        self.memory, self.conv, self.count = memory, conv, count
        self.seen_tokens += columns
        self.dtype, self.device, self.is_initialized = conv.dtype, conv.device, True

    def lazy_initialization(self, key_states, value_states):
        raise CacheError("a recurrent block has no keys and values: the cache belongs to another model")

    def update(self, key_states, value_states, *args, **kwargs):
        raise CacheError("a recurrent block has no keys and values: the cache belongs to another model")

    def get_max_cache_shape(self):
        return -1

    def crop(self, tokens_to_remove):
        """Refused unless there is nothing to remove: no recurrent state can be run backwards."""
        if tokens_to_remove:
            raise CacheError(
                f"cannot remove {abs(tokens_to_remove)} tokens: a recurrent state is not invertible; keep a copy of the cache "
                "(copy.deepcopy) from before, or compute the prefix again"
            )

    def _tensors(self, change):
        if self.is_initialized:
            self.memory = type(self.memory)(*(change(x) for x in self.memory))
            self.conv, self.count = change(self.conv), change(self.count)

    def reset(self):
        self.memory, self.conv, self.count, self.seen_tokens, self.is_initialized = None, None, None, 0, False


def adopt_cache(cache, layers):
    """Make a fresh stock cache ours: `layers` RecurrentLayers. A cache in use is checked.

    Raises:
        CacheError: no cache of transformers, or one that another model has filled.
    """
    if not isinstance(cache, Cache):
        raise CacheError(
            f"cache: expected a transformers Cache, got {type(cache).__name__}; pass DynamicCache(config=model.config)"
        )
    foreign = next(
        (j for j, x in enumerate(cache.layers) if not isinstance(x, RecurrentLayer) and x.get_seq_length() > 0), None
    )
    if foreign is not None or len(cache.layers) > layers:
        what = (
            f"{len(cache.layers)} layers"
            if foreign is None
            else f"a filled {type(cache.layers[foreign]).__name__} in layer {foreign}"
        )
        raise CacheError(
            f"cache holds {what}, expected at most {layers} recurrent layers; another model made it: start from "
            "DynamicCache(config=model.config)"
        )
    cache.layers = [x if isinstance(x, RecurrentLayer) else RecurrentLayer() for x in cache.layers]
    cache.layers += [RecurrentLayer() for _ in range(layers - len(cache.layers))]
    return cache


def count_after(tokens, count):
    """[B] real tokens of the present document after a call: `count` [B] or None is what it had before."""
    place = torch.arange(tokens.real.shape[1], device=tokens.real.device)
    last = torch.where(tokens.real, place, -1).amax(-1, keepdim=True)  # [B, 1]
    index = tokens.index.gather(1, last.clamp_min(0))[:, 0] + 1
    return torch.where(last[:, 0] >= 0, index, 0 if count is None else count)
