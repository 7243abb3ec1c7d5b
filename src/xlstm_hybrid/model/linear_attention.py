"""Layers of linear attention that a teacher has beside its attention, and that a student keeps: transformers' own module,
the gated delta rule (Yang et al. 2024, arXiv 2412.06464), with a cache layer that our functions of states take as they
take the others.

The module knows neither documents nor padding behind a token: where a call has those, each row's documents go through it
one by one. Its recurrence calculates in float32, whatever the model's dtype. Dims: B batch, T tokens, D hidden size.
"""

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import transformers
from transformers.cache_utils import Cache, LinearAttentionLayer

from xlstm_hybrid.errors import CompatibilityError
from xlstm_hybrid.model.cache import StateLayer
from xlstm_hybrid.model.configuration import LINEAR, LINEAR_ATTENTION, LINEAR_SIZES
from xlstm_hybrid.model.rollback import Rollback
from xlstm_hybrid.model.tokens import Tokens

# what the modules read of a configuration, and what only their initialisation reads
READ = (*LINEAR_SIZES, "linear_allow_neg_eigval", "hidden_size", "hidden_act", "rms_norm_eps")
FIRST = {"linear_a_log_min": 0.01, "linear_a_log_max": 16.0}
FIRST |= {"linear_dt_min": 1e-3, "linear_dt_max": 0.1, "linear_dt_init_floor": 1e-4}
CACHE_NAMES = "cache", "cache_params"  # since transformers 5.24, and before


def gated_delta_net(config):
    """`(module, name of its argument that is the cache)` of the linear attention that a configuration names.

    Raises:
        CompatibilityError: the installed transformers has no such module, or one that takes no cache.
    """
    kind, name = config.linear_attention, LINEAR_ATTENTION[config.linear_attention]
    found = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name, None)
    parameters = inspect.signature(found.forward).parameters if found is not None else ()
    keyword = next((keyword for keyword in CACHE_NAMES if keyword in parameters), None)
    if keyword is None or "attention_mask" not in parameters:
        raise CompatibilityError(
            f"linear_attention={kind!r}: expected {name} with attention_mask and one of {', '.join(CACHE_NAMES)}, transformers "
            f"{transformers.__version__} {'has no such module' if found is None else f'has {list(parameters)}'}; install "
            "the newest transformers that `xlstm-hybrid doctor` calls tested"
        )
    # alone in a cache of its own, see `LinearCacheLayer`: hence layer 0
    return found(
        SimpleNamespace(**{field: getattr(config, field) for field in READ}, layer_types=[LINEAR], **FIRST), 0
    ), keyword


@dataclass
class LinearCall:
    """T tokens that came in one call: `run` is the module's, hidden_states [B, T, D] its input."""

    run: Callable
    hidden_states: torch.Tensor
    tokens: Tokens

    def __len__(self):
        return self.hidden_states.shape[1]

    def repeat(self, layer):
        layer.update(self.run, self.hidden_states, self.tokens)

    def slice(self, begin, end):
        """Tokens `begin` to `end`, as a call of their own."""
        return replace(self, hidden_states=self.hidden_states[:, begin:end], tokens=self.tokens.slice(begin, end))

    def map(self, change):
        """The same with `change` applied to every tensor; all of them are [B, ...]."""
        return replace(self, hidden_states=change(self.hidden_states), tokens=self.tokens.map(change))


class StockLayer(LinearAttentionLayer):
    """transformers' layer, which writes a memory over the one that the module has read: with gradients into a copy."""

    def update_recurrent_state(self, *args, **kwargs):
        if torch.is_grad_enabled() and self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0].clone()
        return super().update_recurrent_state(*args, **kwargs)


class LinearCacheLayer(Rollback, StateLayer):
    """The states of one layer: inputs of its convolution, and the recurrence's memory.

    states: a cache of transformers with one layer, for the module; whatever else asks for a layer's states asks here.
    """

    is_compileable, is_croppable, is_sliding, supports_early_init = False, True, True, False
    kept = None
    fields = ("states", "seen_tokens", "is_initialized", "dtype", "device")

    def __init__(self):
        super().__init__()
        self.states, self.seen_tokens = Cache(layers=[StockLayer()]), 0

    def __copy__(self):
        """A layer with the same tensors and the same record, of which neither sees what the other is given."""
        other, stock = object.__new__(type(self)), copy.copy(self.states.layers[0])
        vars(stock).update({name: dict(value) for name, value in vars(stock).items() if isinstance(value, dict)})
        vars(other).update(vars(self), states=Cache(layers=[stock]))
        return other

    def lazy_initialization(self, conv, recurrent):
        """Begin with these states: conv [B, channels, columns], recurrent [B, heads, K, V]."""
        self.states.layers[0].lazy_initialization(conv_states=conv, recurrent_states=recurrent)
        self.put(conv, recurrent)
        self.dtype, self.device, self.is_initialized = conv.dtype, conv.device, True

    def put(self, conv, recurrent):
        """Replace the states of a filled layer."""
        stock = self.states.layers[0]
        stock.conv_states[0], stock.recurrent_states[0], stock.has_previous_state[0] = conv, recurrent, True

    def tensors(self):
        """`(conv, recurrent)` of a filled layer."""
        stock = self.states.layers[0]
        return stock.conv_states[0], stock.recurrent_states[0]

    def update(self, run, hidden_states, tokens):
        """Take T tokens in; returns the module's output [B, T, D].

        Args:
            run: a function of (hidden states, attention mask or None, cache or None).
        """
        if self.depth:
            self.note(LinearCall(run, hidden_states, tokens))
        if self.is_initialized and torch.is_grad_enabled():
            self.put(*(x.clone() for x in self.tensors()))  # the module writes in place
        self.seen_tokens += hidden_states.shape[1]
        if tokens.runs is not None:
            rows = [self.row(j) for j in range(len(hidden_states))]
            out = one_by_one(run, hidden_states, tokens.runs, rows)
            self.join(rows)
            return out
        if hidden_states.shape[1] > 1 or tokens.plain:
            return self.advance(run, hidden_states, None if tokens.plain else tokens.real)
        before = None  # one token: padding leaves a row as it is, which is found out without waiting for a GPU
        if self.is_initialized:
            before = [torch.where(across(tokens.start, x), 0, x) for x in self.tensors()]
            self.put(*(x.clone() for x in before))
        out = self.advance(run, hidden_states, None)
        after = self.tensors()
        before = [torch.zeros_like(x) for x in after] if before is None else before
        pairs = zip(after, before, strict=True)
        self.put(*(torch.where(across(tokens.real, x), x, y) for x, y in pairs))
        return out

    def advance(self, run, hidden_states, mask):
        """The module's output; the states are those after it.

        Raises:
            CompatibilityError: the installed transformers' module has left the cache alone.
        """
        out = run(hidden_states, mask, self.states)
        if not self.is_initialized:
            conv, recurrent = self.tensors()
            if conv is None or recurrent is None:
                raise CompatibilityError(
                    f"linear attention of transformers {transformers.__version__} keeps no states in a cache of one LinearAttentionLayer; "
                    "install the newest transformers that `xlstm-hybrid doctor` calls tested"
                )
            self.dtype, self.device, self.is_initialized = conv.dtype, conv.device, True
        return out

    def row(self, j):
        """A layer with the states of row j alone, and no record."""
        other = type(self)()
        if self.is_initialized:
            other.lazy_initialization(*(x[j : j + 1].clone() for x in self.tensors()))
        return other

    def join(self, layers):
        """Hold the rows of several layers, one after the other; one that is empty has a row of zeros."""
        filled = next(layer.tensors() for layer in layers if layer.is_initialized)
        empty = [torch.zeros_like(x[:1]) for x in filled]
        rows = [layer.tensors() if layer.is_initialized else empty for layer in layers]
        self.lazy_initialization(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _tensors(self, change):
        if self.is_initialized:
            self.put(*(change(x) for x in self.tensors()))
        self.map_record(change)

    def reset(self):
        self.states, self.is_initialized, self.seen_tokens = Cache(layers=[StockLayer()]), False, 0
        self.forget()

    def named_tensors(self):
        """`{name: tensor}` of a filled layer, as files hold them."""
        conv, recurrent = self.tensors()
        return {"conv": conv, "recurrent": recurrent}

    def fill(self, tensors, seen):
        """Take `named_tensors` of a layer that had `seen` tokens."""
        self.lazy_initialization(tensors["conv"], tensors["recurrent"])
        self.seen_tokens = seen


def across(rows, x):
    """[B, 1] with as many dims as x, [B, ...]."""
    return rows.view(-1, *[1] * (x.ndim - 1))


def one_by_one(run, hidden_states, runs, rows=None):
    """The module's output [B, T, D], 0 at padding, with each run of tokens in a call of its own.

    Args:
        runs: `Tokens.runs`.
        rows: a `LinearCacheLayer` per row, which is replaced where a document begins; None: nothing is kept.
    """
    parts = []
    for row, columns, fresh in runs:
        x = hidden_states[row, columns][None]
        if rows is not None and fresh:
            rows[row] = LinearCacheLayer()
        y = run(x, None, None) if rows is None else rows[row].advance(run, x, None)
        parts.append((row, columns, y[0]))
    # under autocast the module's output is narrower than its input
    out = torch.zeros_like(hidden_states, dtype=parts[0][2].dtype if parts else None)
    for row, columns, y in parts:
        out[row, columns] = y
    return out


def attend(run, hidden_states, tokens, layer=None):
    """The module's output [B, T, D]; the tokens go into the cache layer, if there is one."""
    if layer is not None:
        return layer.update(run, hidden_states, tokens)
    if tokens.runs is not None:
        return one_by_one(run, hidden_states, tokens.runs)
    return run(hidden_states, None if tokens.plain else tokens.real, None)
