"""Taking the last tokens of a hybrid layer's cache back: a recurrent state is not invertible, so what came last is kept
and repeated.

A layer that records holds a copy of itself from before its last `depth` tokens, and the calls since. Taking tokens back
repeats the calls that stay. What whole calls leave behind is bitwise what they left the first time; a call that is cut
gives what the shorter call gives, to rounding.
Memory: the layer once more, and the inputs of `depth` tokens.

Dims: B batch, T tokens, H query heads, G key/value heads, K query/key dim, V value dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.tokens import Tokens

# last tokens that can be taken back where nobody says how many: more than assisted decoding drafts at once
ROLLBACK_TOKENS = 256


def tokens_removed(tokens_to_remove):
    """The count behind transformers' argument of `crop`, which is negative."""
    if tokens_to_remove > 0:
        raise CacheError(f"crop({tokens_to_remove}): expected minus the number of tokens to remove")
    return -tokens_to_remove


@dataclass
class Step:
    """One token that a kernel has taken in place.

    inputs: the kernel's arguments before the layer's tensors, all [B, 1, ...]: q, k, v and, where there is a memory,
    its features and gates.
    """

    kernel: Callable
    inputs: tuple
    tokens: Tokens
    scale: float

    def __len__(self):
        return 1

    def repeat(self, layer):
        layer.grow(1)
        tensors = [layer.keys, layer.values] if len(self.inputs) == 3 else [layer.state, layer.keys, layer.values]
        index, sinks = self.tokens.index[:, 0], layer.num_sink_tokens
        self.kernel(*self.inputs, *tensors, index, sinks=sinks, scale=self.scale)
        layer.advance(self.tokens)

    def map(self, change):
        """The same with `change` applied to every tensor; all of them are [B, ...]."""
        return replace(self, inputs=tuple(change(x) for x in self.inputs), tokens=self.tokens.map(change))


@dataclass
class RecordedCall:
    """T tokens that came in one call.

    kernel, written: of the recurrence and its (k, v, i, f), [B, T, H, ...]; None and () where the layer has none, or
    calculates its state itself.
    key, value: [B, G, T, K | V].  chunk_size: of the recurrence in that call.
    """

    kernel: Callable | None
    written: tuple
    key: torch.Tensor
    value: torch.Tensor
    tokens: Tokens
    chunk_size: int | None = None

    def __len__(self):
        return self.key.shape[2]

    def repeat(self, layer):
        state = None
        if self.written:  # a state does not depend on queries
            _, state = self.kernel(self.written[0], *self.written, state=layer.state, chunk_size=self.chunk_size)
        layer.update(self.key, self.value, self.tokens, state, **self.more())

    def more(self):
        """Further arguments that `update` had."""
        return {}

    def slice(self, begin, end):
        """Tokens `begin` to `end`, as a call of their own."""
        written = tuple(x[:, begin:end] for x in self.written)
        key, value = self.key[:, :, begin:end], self.value[:, :, begin:end]
        return replace(self, written=written, key=key, value=value, tokens=self.tokens.slice(begin, end))

    def map(self, change):
        """The same with `change` applied to every tensor; all of them are [B, ...]."""
        written, key, value = tuple(change(x) for x in self.written), change(self.key), change(self.value)
        return replace(self, written=written, key=key, value=value, tokens=self.tokens.map(change))


class Rollback:
    """The record of a cache layer: base, a copy of the layer from before `calls`; depth, tokens that it reaches back; 0
    records nothing.

    The layer itself has `fields`, the names of what it holds, `_tensors(change)`, and `kept`, which takes its own columns
    back.
    """

    def __init__(self):
        super().__init__()
        self.depth, self.base, self.calls = 0, None, []

    @property
    def record_past(self):
        return self.depth > 0

    @record_past.setter
    def record_past(self, on):  # transformers assigns it
        self.depth = (self.depth or ROLLBACK_TOKENS) if on else 0
        self.forget()

    def activate_past_recording(self):
        if not self.record_past:
            self.record_past = True

    def forget(self):
        """Drop the record; a new one starts with the next call."""
        self.base, self.calls = None, []

    def map_record(self, change):
        """Replace every tensor x of the record by change(x), as `_tensors` does with the layer's."""
        if self.base is not None:
            self.base._tensors(change)
            self.calls = [call.map(change) for call in self.calls]

    @property
    def recorded(self):
        """Number of last tokens that can be taken back."""
        return sum(len(call) for call in self.calls)

    def take_over(self, other):
        """Become what `other` is, its tensors included; the record stays."""
        for name in self.fields:
            setattr(self, name, getattr(other, name, None))

    @torch.compiler.disable  # the record is a list that grows: a compiled step calls it as it is
    def note(self, call):
        """Record a `Step` or `RecordedCall` before it changes the layer; what is older than `depth` goes into the base."""
        if torch.is_grad_enabled():
            call = call.map(torch.Tensor.detach)
        if self.base is None:
            self.base = copy.copy(self)
            self.base.depth, self.base.calls, self.base.is_compileable = 0, [], False
            self.base.kept = self.base.room = None
            self.base._tensors(lambda x: x.detach().clone())  # steps write in place
        self.calls.append(call)
        excess = max(self.recorded - self.depth, 0)
        while excess >= len(self.calls[0]):
            excess -= len(self.calls[0])
            self.calls.pop(0).repeat(self.base)
        if excess and len(oldest := self.calls[0]) > self.depth:
            cut = len(oldest) - self.depth
            oldest.slice(0, cut).repeat(self.base)
            # a slice would hold the whole call's memory
            self.calls[0] = oldest.slice(cut, len(oldest)).map(torch.clone)

    def rollback(self, tokens, keep_record=True):
        """Take the last tokens (columns, padding included) back.

        Raises:
            CacheError: the record does not reach that far; nothing has changed.
        """
        if tokens > self.recorded:
            why = f"the record holds {self.recorded} tokens" if self.depth else "a recurrent state is not invertible"
            raise CacheError(
                f"cannot remove {tokens} tokens: {why}. Call xlstm_hybrid.state.remember(cache, tokens) before they "
                "come, or keep a snapshot(cache), or compute the prefix again"
            )
        if tokens:
            left = self.recorded - tokens
            base, calls = (copy.deepcopy(self.base) if keep_record else self.base), []
            for call in self.calls:
                if left:
                    calls.append(call if len(call) <= left else call.slice(0, left))
                    calls[-1].repeat(base)
                    left -= len(calls[-1])
            self.calls = calls
            self.take_over(base)
            if self.kept is not None:
                self.kept.crop(tokens)
        if not keep_record:
            self.forget()

    def crop(self, tokens_to_remove):
        """Take the last `-tokens_to_remove` tokens back, as transformers does after each round of assisted decoding;
        the record starts anew.
        """
        self.rollback(tokens_removed(tokens_to_remove), keep_record=False)
