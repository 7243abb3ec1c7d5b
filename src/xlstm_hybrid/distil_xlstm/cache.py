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

    def store(self, memory, conv, tokens):
        """Take over what a call of `tokens` (`Tokens`, [B, T]) leaves behind; of `conv`, the last inputs of each row, only
        those of its present document.
        """
        T, c = tokens.real.shape[1], conv.shape[1]
        place = torch.arange(T, device=tokens.real.device)
        last = torch.where(tokens.real, place, -1).amax(-1, keepdim=True)  # [B, 1]
        index = tokens.index.gather(1, last.clamp_min(0))[:, 0] + 1
        self.count = torch.where(last[:, 0] >= 0, index, 0 if self.count is None else self.count)
        lag = torch.arange(c - 1, -1, -1, device=conv.device)
        self.conv = torch.where((lag < self.count[:, None])[..., None], conv, 0.0)
        self.memory, self.seen_tokens = memory, self.seen_tokens + T
        self.dtype, self.device, self.is_initialized = conv.dtype, conv.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        raise CacheError(
            "a recurrent block has no keys and values: the cache belongs to another model; start from DynamicCache(config=model.config)"
        )

    lazy_initialization = update

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


def adopt_recurrent(cache, layers):
    """Make a fresh stock cache ours: `layers` RecurrentLayers. A cache in use is checked.

    Raises:
        CacheError: no cache of transformers, or one that another model has filled.
    """
    if not isinstance(cache, Cache):
        raise CacheError(
            f"cache: expected a transformers Cache, got {type(cache).__name__}; pass DynamicCache(config=model.config)"
        )
    foreign = [j for j, x in enumerate(cache.layers) if not isinstance(x, RecurrentLayer) and x.get_seq_length() > 0]
    if foreign or len(cache.layers) > layers:
        what = f"{len(cache.layers)} layers"
        if foreign:
            what = f"a filled {type(cache.layers[foreign[0]]).__name__} in layer {foreign[0]}"
        raise CacheError(
            f"cache holds {what}, expected at most {layers} recurrent layers; another model made it: start from "
            "DynamicCache(config=model.config)"
        )
    cache.layers = [x if isinstance(x, RecurrentLayer) else RecurrentLayer() for x in cache.layers]
    cache.layers += [RecurrentLayer() for _ in range(layers - len(cache.layers))]
    return cache
