"""What a model knows after reading, as an object: prefill once, answer many.

    cache = prefill(model, **tokenizer(document, return_tensors="pt"))
    for question in questions:
        model.generate(**tokenizer(document + question, return_tensors="pt"), cache=snapshot(cache))

A state is the transformers `Cache` that the model returns; nothing wraps it. Where all layers are hybrid, its size
does not depend on the document once S + W tokens have come. Dims: B rows, H query heads, G key/value heads, K key dim, V
value dim, W window, S sinks.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from xlstm_hybrid.checkpoint.files import write_file
from xlstm_hybrid.errors import CacheError
from xlstm_hybrid.model.adopt import adopt_cache
from xlstm_hybrid.model.cache import HybridCacheLayer, PlacedLayer, SlidingLayer
from xlstm_hybrid.model.cache_names import named, takes_cache
from xlstm_hybrid.model.configuration import INDIFFERENT, MIXER, TRAITS
from xlstm_hybrid.model.kept_groups import DOCUMENT
from xlstm_hybrid.model.linear_attention import LinearCacheLayer
from xlstm_hybrid.model.rollback import Rollback

FORMAT, FORMAT_VERSION = "xlstm-hybrid-state", "2"
OURS = HybridCacheLayer, LinearCacheLayer, SlidingLayer, PlacedLayer
SAMPLE = 64  # elements of each parameter that go into the digest of a model's weights


# --- making and handing round ------------------------------------------------------------------------------------


@takes_cache
@torch.no_grad()
def prefill(model, input_ids, attention_mask=None, *, cache=None, piece=None, rollback=0, **inputs):
    """Read tokens and return the cache; no logits are kept.

    Args:
        input_ids, attention_mask: [B, T]; 0 in the mask is padding. After a filled cache the mask covers its tokens
            too.
        cache: cache to go on from; it is changed.
        piece: tokens per forward call, which bounds the memory of a long prompt; None reads all at once.
        rollback: tokens that can be taken back later, see `remember`.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    if rollback:
        remember(cache, rollback)
    seen, T = cache.get_seq_length(), input_ids.shape[1]
    for begin in range(0, T, piece or T):
        end = min(begin + (piece or T), T)
        mask = None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - T + end]
        part = {name: x[:, begin:end] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        model(input_ids[:, begin:end], attention_mask=mask, use_cache=True, logits_to_keep=1, **named(cache), **part)
    assert cache.get_seq_length() == seen + T
    return cache


def snapshot(cache):
    """An independent copy: whatever happens to one, the other does not see it. Its record of past tokens is copied as
    well.
    """
    try:
        return copy.deepcopy(cache)
    except RuntimeError as error:  # torch copies leaves only
        raise CacheError("cannot copy a cache that carries gradients: fill it under torch.no_grad()") from error


def restore(cache, saved):
    """Make `cache` what `saved` was; `saved` stays independent. For code that holds on to the one object."""
    cache.layers = snapshot(saved).layers
    return cache


def fork(cache, rows):
    """A copy in which each row stands `rows` times, in order; the cache itself is unchanged."""
    if rows < 1:
        raise CacheError(f"fork: rows={rows}, expected at least 1")
    copied = snapshot(cache)
    copied.batch_repeat_interleave(rows)
    return copied


# --- taking back -------------------------------------------------------------------------------------------------


def remember(cache, tokens):
    """From now on keep what taking back the last `tokens` tokens needs; 0 stops it. Returns the cache.

    It costs the cache's memory once more, the mLSTM's inputs of `tokens` tokens, and, where a step falls out of the
    record, that step again.
    """
    if tokens < 0:
        raise CacheError(f"remember: tokens={tokens}, expected 0 or more")
    for j, layer in enumerate(cache.layers):
        if not hasattr(layer, "record_past") and type(layer) is not DynamicLayer:
            raise CacheError(
                f"remember: layer {j} is a {type(layer).__name__}, which takes nothing back; take a snapshot instead"
            )
        if hasattr(layer, "record_past"):
            if not (tokens and layer.record_past):  # a record in use only changes its length
                layer.record_past = tokens > 0
            layer.depth = tokens
    return cache


def recorded(cache):
    """Number of last tokens that `rollback` can take back now."""
    for j, layer in enumerate(cache.layers):
        if not isinstance(layer, OURS) and type(layer) is not DynamicLayer:
            raise CacheError(
                f"layer {j} is a {type(layer).__name__}, which cannot take tokens back; use a DynamicCache"
            )
    counts = [x.get_seq_length() if type(x) is DynamicLayer else x.recorded for x in cache.layers]
    return min(counts, default=0)


def rollback(cache, tokens):
    """Take the last `tokens` tokens (columns, padding included) back, in place. Returns the cache.

    Bitwise the state from before where whole calls go, and to rounding where a call is cut. The record stays: going
    back further is possible.

    Raises:
        CacheError: the record does not reach that far; nothing has changed.
    """
    if not 0 <= tokens <= (count := recorded(cache)):
        raise CacheError(
            f"cannot take {tokens} tokens back: {count} are recorded; call remember(cache, {max(tokens, 1)}) before they come, "
            "or keep a snapshot(cache)"
        )
    for layer in cache.layers:
        layer.rollback(tokens) if isinstance(layer, Rollback) else layer.crop(-tokens)
    return cache


# --- files -------------------------------------------------------------------------------------------------------


def behaviour(config):
    """The fields of a config that decide what a state means, as JSON has them."""
    usual = MIXER | TRAITS  # older states lack these fields, which then have these values
    fields = {k: v for k, v in config.to_dict().items() if k not in INDIFFERENT and not (k in usual and v == usual[k])}
    return json.loads(json.dumps(dict(sorted(fields.items()))))


@torch.no_grad()
def weights_digest(model):
    """SHA-256 over names, dtypes, shapes and evenly spaced elements of all parameters: tells checkpoints apart without
    reading them whole.
    """
    digest = hashlib.sha256()
    for name, x in sorted(model.named_parameters()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        if not x.is_meta:
            flat = x.detach().reshape(-1)
            chosen = flat[:: max(flat.numel() // SAMPLE, 1)][:SAMPLE].contiguous().cpu()
            digest.update(chosen.view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():  # an adapter switched on or off makes another model of the same tensors
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            digest.update(f"{name} {list(module.active_adapters)} {module.disable_adapters}".encode())
    return digest.hexdigest()


def refuse_parts(model, name):
    """Raise CacheError where this process has only a part of the model: some heads, or some layers."""
    if (getattr(model, "_tp_size", None) or 1) > 1 or getattr(model, "_pp_stage", None) is not None:
        raise CacheError(
            f"{name}: the model is shared out to several processes, each of which has a part of the state; "
            "load it in one process (without tp_plan and distributed_config) to save or load states"
        )


def layer_tensors(layer):
    """`{name: tensor}` of a filled layer."""
    return layer.named_tensors() if hasattr(layer, "named_tensors") else {"keys": layer.keys, "values": layer.values}


def save_state(cache, path, model):
    """Write a filled cache to one safetensors file, whole or not at all. Its record of past tokens is not part of it.

    The header holds the format's version, the config's fields, a digest of the weights, the number of tokens and each
    layer's kind: `load_state` refuses what another model wrote. The file holds what was read in compressed form: treat
    it as the text itself.

    Raises:
        CacheError: an empty cache, or one with layers that are not ours or plainly dynamic.
        CheckpointWriteError: the disk refused; what was at `path` is untouched.
    """
    from safetensors.torch import save

    refuse_parts(model, Path(path).name)
    tensors = {}
    for j, layer in enumerate(cache.layers):
        if not isinstance(layer, OURS) and type(layer) is not DynamicLayer:
            raise CacheError(
                f"layer {j} is a {type(layer).__name__}, expected HybridCacheLayer or a dynamic layer; use a DynamicCache"
            )
        if not layer.is_initialized:
            raise CacheError(
                f"layer {j} of the cache is empty: there is nothing to save; read something first (prefill)"
            )
        for name, x in layer_tensors(layer).items():
            if type(layer) is SlidingLayer and layer.cumulative_length >= layer.sliding_window:
                x = x[:, :, x.shape[2] - layer.sliding_window + 1 :]  # what a record holds beyond the window stays here
            tensors[f"layers.{j}.{name}"] = x.detach().cpu().contiguous().clone()
    if not tensors:
        raise CacheError("the cache has no layers: there is nothing to save; read something first (prefill)")
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(behaviour(model.config)),
        "weights": weights_digest(model),
        "seen_tokens": str(cache.get_seq_length()),
        "layer_types": json.dumps(model.config.layer_types),
    }
    write_file(path, save(tensors, header))


def load_state(path, model):
    """The cache in a file of `save_state`, on the model's devices.

    Raises:
        CacheError: no such file or a damaged one, another format, or one that another model wrote; it names the first
            difference.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    refuse_parts(model, name)
    try:
        with safe_open(path, framework="pt") as file:
            seen, version = check_header(file.metadata() or {}, model, name)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file is no dict)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{name}: cannot be read as a state ({error}); make it again with save_state") from error
    cache = adopt_cache(DynamicCache(config=model.config), model.config)
    layers, rows = model.get_decoder().layers, set()
    for j, layer in enumerate(cache.layers):
        parts = {key.rpartition(".")[2]: tensors.pop(key) for key in list(tensors) if key.startswith(f"layers.{j}.")}
        if "place" in parts and isinstance(layer, SlidingLayer):
            layer = cache.layers[j] = PlacedLayer(layer.sliding_window)
        check_layer_tensors(parts, layer, j, model.config, seen, name, version)
        if version == "1" and isinstance(layer, HybridCacheLayer):
            parts = of_version_1(parts, layer, seen)
        rows.add(next(iter(parts.values())).shape[0])
        device = next(layers[j].parameters()).device
        # In memory of its own: a mapped file lies anywhere, and on some CPUs the last bits of what follows depend on
        # that
        parts = {key: x.to(device, copy=True) for key, x in parts.items()}
        if isinstance(layer, HybridCacheLayer | LinearCacheLayer | PlacedLayer):
            layer.fill(parts, seen)
            continue
        layer.lazy_initialization(parts["keys"], parts["values"])
        layer.keys, layer.values = parts["keys"], parts["values"]
        if isinstance(layer, SlidingLayer):
            layer.cumulative_length = seen
    if tensors or len(rows) != 1:
        what = f"holds {sorted(tensors)[0]} that no layer has" if tensors else f"layers have {sorted(rows)} rows"
        raise CacheError(f"{name}: {what}, it is damaged; make it again with save_state")
    return cache


def check_header(header, model, name):
    """`(the number of tokens in the header, the format's version)`; CacheError unless it was written for this model."""
    if header.get("format") != FORMAT or header.get("format_version") not in ("1", FORMAT_VERSION):
        given = f"{header.get('format')} version {header.get('format_version')}"
        raise CacheError(
            f"{name}: expected {FORMAT} version 1 or {FORMAT_VERSION}, found {given}; make it again with this version's save_state"
        )
    try:
        theirs, ours = dict(json.loads(header["config"])), behaviour(model.config)
    except (KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{name}: the header has no config, it is damaged; make it again with save_state") from error
    for field in sorted((theirs.keys() | ours.keys()) - INDIFFERENT):
        if theirs.get(field) != ours.get(field):
            raise CacheError(
                f"{name}: another model wrote this state: its {field} is {theirs.get(field)!r}, this model's {ours.get(field)!r}; "
                "load the model that wrote it, or read the text again"
            )
    if header.get("weights") != weights_digest(model):
        raise CacheError(
            f"{name}: a model of this shape with other weights (or in another dtype) wrote this state; load the one that wrote it, "
            "or read the text again"
        )
    try:
        return int(header["seen_tokens"]), header["format_version"]
    except (KeyError, ValueError) as error:
        raise CacheError(
            f"{name}: the header has no number of tokens, it is damaged; make it again with save_state"
        ) from error


def of_version_1(tensors, layer, seen):
    """A hybrid layer's tensors in today's slots; version 1 wrote S + W of them at any length, and token t into the ring's
    slot S + t mod W, sinks into their own as well.
    """
    S, W = layer.num_sink_tokens, layer.sliding_window
    index = layer.index_of_slots(tensors["count"][:, None], layer.slots_after(seen)).clamp_min(0)
    slot = torch.where(index < S, index, S + index % W)  # [B, slots]
    held = {name: tensors[name] for name in ("keys", "values", "scores") if name in tensors}
    return tensors | {
        name: x.take_along_dim(slot[:, None, :, None] if x.dim() == 4 else slot[:, None], 2) for name, x in held.items()
    }


def check_layer_tensors(tensors, layer, j, config, seen, name, version):
    """Raise CacheError unless the tensors make up layer j after `seen` tokens, as this version of the format has them."""
    if isinstance(layer, LinearCacheLayer):
        check_linear_tensors(tensors, j, config, name)
        return
    B, slots = len(tensors["keys"]) if "keys" in tensors and tensors["keys"].dim() == 4 else 0, seen
    H, E, K, F = len(config.mixed_heads(j)), len(config.kept_of(j)), config.head_dim, config.memory_features
    G, hybrid = config.num_key_value_heads - E, isinstance(layer, HybridCacheLayer)
    if hybrid:
        slots = layer.slots if version == "1" else layer.slots_after(seen)
    elif isinstance(layer, PlacedLayer):
        slots = tensors["place"].shape[-1]
    elif isinstance(layer, SlidingLayer) and seen >= layer.sliding_window:
        slots = layer.sliding_window - 1
    expected = {"keys": (B, G, slots, K), "values": (B, G, slots, K)}
    expected |= {"place": (B, slots)} if isinstance(layer, PlacedLayer) else {}
    memory = {"C": (B, H, F, K), "n": (B, H, F), "m": (B, H)} if hybrid and config.mixer_branches != "window" else {}
    expected |= {**memory, "count": (B,)} if hybrid else {}
    if hybrid and (L := config.sparse_memory):
        expected |= {"scores": (B, G, slots), "sparse_keys": (B, G, L, K), "sparse_values": (B, G, L, K)}
        expected |= {"sparse_score": (B, G, L), "sparse_index": (B, G, L)}
    if E:
        columns = tensors["kept_place"].shape[-1] if "kept_place" in tensors else 0
        expected |= {"kept_keys": (B, E, columns, K), "kept_values": (B, E, columns, K), "kept_place": (B, columns)}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    if B < 1 or shapes != expected:
        raise CacheError(
            f"{name}: layer {j} holds {shapes}, expected {expected}, it is damaged; make it again with save_state"
        )
    if isinstance(layer, PlacedLayer):
        place = tensors["place"]
        known = (place == -1) | ((place >= 0) & (place % DOCUMENT < seen))
        if place.dtype != torch.long or slots > seen or not bool(known.all()):
            raise CacheError(
                f"{name}: layer {j} has places that are not those of its {seen} tokens; make it again with save_state"
            )
    if hybrid:
        states = all(tensors[key].dtype in (torch.float32, torch.float64) for key in memory)
        count, wrong = tensors["count"], None
        if not states or count.dtype != torch.long or not bool(((count >= 0) & (count <= seen)).all()):
            wrong = f"has a state below float32, or a count that is not in 0..{seen}"
        elif "sparse_index" in tensors and not bool((tensors["sparse_index"] < count[:, None, None]).all()):
            wrong = f"has chosen tokens beyond its {seen}, it is damaged"
        elif E and not fits(tensors["kept_place"], count, seen):
            wrong = f"keeps columns that are not those of its {seen} tokens, it is damaged"
        if wrong:
            raise CacheError(f"{name}: layer {j} {wrong}; make it again with save_state")


def check_linear_tensors(tensors, j, config, name):
    """The same of a layer of linear attention."""
    B = len(tensors["conv"]) if "conv" in tensors and tensors["conv"].dim() else 0
    expected = {key: (B, *shape) for key, shape in config.linear_shapes.items()}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    if B < 1 or shapes != expected or tensors["recurrent"].dtype != torch.float32:
        raise CacheError(
            f"{name}: layer {j} holds {shapes}, expected {expected} with recurrent states in float32, it is damaged; make it "
            "again with save_state"
        )


def fits(place, count, seen):
    """Whether the places [B, N] of kept columns belong to rows of `count` [B] tokens."""
    if place.dtype != torch.long or place.shape[1] > seen or not bool((place >= -1).all()):
        return False
    last = place.amax(-1) if place.shape[1] else torch.full_like(count, -1)
    return bool(torch.where(last < 0, count == 0, last % DOCUMENT == count - 1).all())
