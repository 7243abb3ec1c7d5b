"""What transformers calls the cache: `cache` since 5.24, `past_key_values` before. No other module of ours knows both
names.

Our own code says `cache` everywhere. A public method is decorated with `takes_cache` and accepts either name; what is
handed to transformers goes through `named`, what comes back from any model of it through `cache_of`.
"""

import functools
import inspect
import warnings
from dataclasses import fields

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from xlstm_hybrid.errors import CacheError, CompatibilityError, ConfigError

OLD = "past_key_values"
NAMES = ["cache", OLD]
# the name in the installed transformers
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD

# What a forward of ours accepts beside its own parameters. A keyword that is missing here would be ignored in silence,
# and is refused.
OUTPUTS = ("output_hidden_states", "output_attentions", "return_dict")
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
WITHOUT_EFFECT = (  # a teacher of ours takes them as well, and does nothing with them there
    "token_type_ids",  # some tokenizers write them
    "logits_to_keep",  # the head's, which TRL hands to the backbone too
    "tokenizer",  # of `generate`, for stop strings
    "assistant_tokenizer",
)
ACCEPTED = frozenset((*OUTPUTS, *PACKING, *LOSS, *WITHOUT_EFFECT))


def named(cache):
    """`{name: cache}` for a call into transformers, or of a model that need not be ours."""
    return {CACHE: cache}


def cache_of(outputs):
    """The cache in the outputs of a model, or in a dict of its arguments; None where there is none."""
    return outputs.get(CACHE)


def renamed(kwargs, name, where):
    """Keyword arguments with the cache under `name`, whichever of its names they have it under.

    Raises:
        CacheError: two different caches, one under each name.
    """
    given = {key: kwargs[key] for key in ("cache", OLD) if key in kwargs}
    if not given or set(given) == {name}:
        return kwargs
    old, new = given.get(OLD), given.get("cache")
    if old is not None and new is not None and old is not new:
        raise CacheError(f"{where}: two different caches, as `cache` and as `{OLD}`; pass one, as `{CACHE}`")
    if CACHE != OLD and OLD in given and not torch.compiler.is_compiling():
        message = f"`{OLD}` is deprecated for `{where}`, where it is the old name of `cache`. Use `cache` instead."
        warnings.warn(message, FutureWarning, stacklevel=3)
    rest = {key: value for key, value in kwargs.items() if key not in given}
    return rest | {name: old if new is None else new}


def takes_cache(method):
    """Let a function with a parameter `cache` be called with `past_key_values` as well.

    The old name warns where transformers' own models warn. The signature shows the name that the installed transformers
    uses: `generate` reads it.
    """
    signature = inspect.signature(method)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        return method(*args, **renamed(kwargs, "cache", method.__qualname__))

    wrapped.__signature__ = signature.replace(parameters=parameters)
    return wrapped


def refuse_unknown(kwargs, accepted, where):
    """Raise for a keyword that a forward would ignore.

    Args:
        kwargs: what is left after the parameters of its own. None, False and nothing at all count as not given:
            pipeline parallelism hands a causal LM's defaults, bound by name, to its backbone.
        accepted: names, for example `ACCEPTED`.
        where: the class, for the message.
    Raises:
        CompatibilityError: a cache under a name that is not known here: every step would see its own token alone.
        ConfigError: anything else.
    """
    for name, value in kwargs.items():
        if name in accepted or value is None or value is False:
            continue
        if isinstance(value, Cache) or hasattr(value, "layers") or hasattr(value, "get_seq_length"):
            raise CompatibilityError(
                f"{where}.forward got a cache ({type(value).__name__}) as `{name}`, a name that this version of xlstm-hybrid does not know "
                f"(it knows `cache` and `{OLD}`); transformers {transformers.__version__} may have renamed it: update xlstm-hybrid, or install "
                "the newest transformers that `xlstm-hybrid doctor` calls tested"
            )
        raise ConfigError(
            f"{where}.forward got `{name}`, which it would ignore; expected, beside its own parameters, {', '.join(sorted(accepted))}: leave it out"
        )
