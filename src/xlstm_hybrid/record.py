"""What a hybrid layer's cache records of a call, so that rolling back can repeat it without the model.

Dims: B batch, T tokens, H query heads, G key/value heads, K query/key dim, V value dim.
"""

from dataclasses import dataclass, replace

import torch
from xlstm_kernels import mlstm


@dataclass
class Step:
    """One token that `HybridCacheLayer.step` took, with its arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    features: tuple
    gates: tuple
    tokens: object
    scale: float

    def __len__(self):
        return 1

    def repeat(self, layer):
        layer.step(self.query, self.key, self.value, self.features, self.gates, self.tokens, self.scale)

    def map(self, change):
        """The same with `change` applied to every tensor; all of them are [B, ...]."""
        query, key, value = change(self.query), change(self.key), change(self.value)
        features, gates = (tuple(change(x) for x in many) for many in (self.features, self.gates))
        return Step(query, key, value, features, gates, self.tokens.map(change), self.scale)


@dataclass
class Piece:
    """T tokens that came in one call.

    memory: the mLSTM's (k, v, i, f), [B, T, H, ...]; key, value: [B, G, T, K | V]; tokens: `Tokens`; chunk_size: of the mLSTM in that call.
    """

    memory: tuple
    key: torch.Tensor
    value: torch.Tensor
    tokens: object
    chunk_size: int

    def __len__(self):
        return self.key.shape[2]

    def repeat(self, layer):
        state = mlstm(self.memory[0], *self.memory, state=layer.state, chunk_size=self.chunk_size)[1]  # a state does not depend on queries
        layer.update(self.key, self.value, self.tokens)
        layer.state = state

    def slice(self, begin, end):
        """Tokens `begin` to `end`, as a call of their own."""
        memory = tuple(x[:, begin:end] for x in self.memory)
        return Piece(memory, self.key[:, :, begin:end], self.value[:, :, begin:end], self.tokens.slice(begin, end), self.chunk_size)

    def map(self, change):
        memory = tuple(change(x) for x in self.memory)
        return replace(self, memory=memory, key=change(self.key), value=change(self.value), tokens=self.tokens.map(change))
