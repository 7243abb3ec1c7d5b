"""Ranking of key/value groups by measurement, and a layout of a student's memories for a budget of cache bytes.

Dims: B rows, T tokens, H query heads, G key/value heads of a layer.
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from xlstm_kernels.backends.launch import LARGEST_K

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.kept_groups import Split
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.planning.cache_size import cache_bytes

METHODS = ("ablate", "add", "greedy")
STEP = 8  # the sparse memory is a multiple of so many tokens
FEATURES_STEP = 16  # and a head's features of so many
LEAST_WINDOW = 16
WINDOWS = ("all", "first")


# --- giving groups back ------------------------------------------------------------------------------------------


def keep_groups(student, kept_groups):
    """A student whose `kept_groups` have the teacher's full attention back, without training. It shares all other
    tensors with `student`.

    Args:
        student: with hybrid layers; groups that it keeps already must be kept on.
        kept_groups: per layer a list of numbers of key/value groups, see `XLSTMHybridConfig`.
    Raises:
        ConfigError: groups that no such student has, or ones to mix again, for which there are no mixers.
    """
    changed = copy.deepcopy(student, {id(x): x for x in (*student.parameters(), *student.buffers())})
    config, before = changed.config, student.config
    config.kept_groups = [sorted(groups) for groups in kept_groups]
    config.check()
    for j in range(config.num_hidden_layers):
        if lost := sorted(set(before.kept_of(j)) - set(config.kept_of(j))):
            raise ConfigError(
                f"kept_groups of layer {j}: groups {lost} have no mixer to go back to; keep them, or convert the teacher again"
            )
    for j, layer in enumerate(changed.get_decoder().layers):
        if config.kept_of(j) == before.kept_of(j):
            continue
        attention = layer.self_attn
        attention.split = Split(config.kept_of(j), config.num_key_value_heads, attention.num_key_value_groups)
        rows = [row for row, head in enumerate(before.mixed_heads(j)) if head in config.mixed_heads(j)]
        for mixer in (m for m in attention.modules() if isinstance(m, MLSTMMixer)):
            for name, x in list(mixer.named_parameters(recurse=False)):
                setattr(mixer, name, nn.Parameter(x.detach()[rows].clone(), requires_grad=x.requires_grad))
    return changed


# --- measuring ---------------------------------------------------------------------------------------------------


@contextmanager
def restored(student, groups):
    """Meanwhile the `groups` {(layer, group)} of hybrid layers have full attention, in passes without a cache; nothing
    else changes.
    """
    config, G = student.config, student.config.num_key_value_heads
    kinds = zip(student.get_decoder().layers, config.layer_types, strict=True)
    layers = [layer.self_attn for layer, kind in kinds if kind == "hybrid_sliding"]
    try:
        for attention in layers:
            chosen = torch.tensor([(attention.layer_idx, g) in groups for g in range(G)])
            if chosen.any():
                attention.restored = chosen.repeat_interleave(attention.num_key_value_groups)[:, None]  # [H, 1]
        yield
    finally:
        for attention in layers:
            attention.restored = None


def retrieval_rows(tokenizer, documents):
    """`(rows [N, T], answer_mask [N, T])` for `rank_groups` of `data.long_context.documents`: prompt and answer, padded on
    the right.
    """
    ids, answers = [], []
    for doc in documents:
        texts = doc["prompt"], doc["prompt"] + doc["answer"]
        prompt, whole = (tokenizer(text, verbose=False)["input_ids"] for text in texts)
        if whole[: len(prompt)] != prompt:  # the tokenizer joins the answer to the prompt's end
            whole = prompt + tokenizer(doc["answer"], add_special_tokens=False)["input_ids"]
        ids.append(torch.tensor(whole))
        answers.append(torch.arange(len(whole)) >= len(prompt))
    return (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, answers))


@contextmanager
def passing(layers):
    """Meanwhile decoder layers hand on what they get."""
    try:
        for layer in layers:
            layer.forward = lambda hidden_states, **_: hidden_states
        yield
    finally:
        for layer in layers:
            del layer.forward


def through(student, inputs, j):
    """What layer j makes of its inputs, a list of batches [B, T, D]."""
    layers, found = student.get_decoder().layers, []
    handle = layers[j].register_forward_hook(lambda layer, given, made: found.append(made))
    try:
        with passing([layer for layer in layers if layer is not layers[j]]):
            for x in inputs:
                student(inputs_embeds=x, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def answers_of(model, rows, answer_mask, batch_size=8, start=None):
    """How a model does on the answers: {"nll": nats per answer token, "token_accuracy", "row_accuracy": share of rows
    with every token right}.

    Args:
        start: (j, batches [B, T, D]): what comes into layer j of a student, which then begins there.
    """
    nll, right, rows_right = [], [], []
    early, inputs = (model.get_decoder().layers[: start[0]], start[1]) if start else ((), None)
    for n, (ids, wanted) in enumerate(zip(rows.split(batch_size), answer_mask.split(batch_size), strict=True)):
        before = pad(wanted[:, 1:], (0, 1)).to(model.device)  # the position that predicts each answer token
        given = {"inputs_embeds": inputs[n]} if start else {"input_ids": ids.to(model.device)}
        with passing(early):
            logits = model(**given, use_cache=False, logits_to_keep=before).logits.float().cpu()
        target = ids[wanted]
        nll.append(cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
        rows_right += [bool(part.all()) for part in right[-1].split(wanted.sum(-1).tolist())]
    nll, right = torch.cat(nll).double(), torch.cat(right)
    return {
        "nll": nll.mean().item(),
        "token_accuracy": right.double().mean().item(),
        "row_accuracy": sum(rows_right) / len(rows_right),
    }


def rank_groups(
    student, rows, answer_mask, *, method="ablate", steps=None, batch_size=8, progress=lambda done, of: None
):
    """Measure what the full attention of each key/value group is worth on retrieval rows. Never by stage I's error,
    which does not say (arXiv 2512.20569: greedy addition .754, error of stage I .419 of RULER).

    Args:
        student: without kept groups; or a teacher's, fresh from `from_teacher`, whose windows then stand for what is
            lost.
        rows: [N, T] token ids, padded on the right; answer_mask: [N, T] bool, the tokens that are answers.
        method: "ablate": all groups full but one, what that one's loss costs (the head ablation of arXiv 2602.11374);
            "add": none but one, what that one brings; "greedy": one after the other, each the best beside those before
            it, `steps` of them (arXiv 2512.20569), the others behind.
        steps: of "greedy"; None: all.
    What comes into the layer of a group is the same for all groups of that layer, except in "greedy", and is calculated
    once: half of the work.

    Returns:
        {"method", "rows", "answer_tokens", "length", "layers", "key_value_heads", "none", "all": figures of
        `answers_of` with no and with every group
        restored, "groups": [{"layer", "group", "gain": nats per answer token, and the figures}], the best first}
    Raises:
        ConfigError: no such method, rows without answers, or a student that keeps groups already.
    """
    config, groups = student.config, groups_of(student.config)
    if method not in METHODS or (steps is not None and steps < 1):
        raise ConfigError(f"method={method!r}, steps={steps}: expected one of {list(METHODS)}, and at least 1 step")
    fits = rows.shape == answer_mask.shape and answer_mask.dtype == torch.bool
    if not fits or not answer_mask.any(-1).all() or answer_mask[:, 0].any():
        raise ConfigError(
            f"rows {list(rows.shape)}, answer_mask {list(answer_mask.shape)} ({answer_mask.dtype}): expected [N, T] ids and bools, "
            "with an answer in every row, after its first token"
        )
    if any(config.kept_groups or ()) or not groups:
        raise ConfigError(
            "rank_groups: expected a student with hybrid layers and without kept groups; convert the teacher without kept_groups"
        )
    training, done = student.training, 0
    student.eval()

    def measure(*chosen, start=None):
        nonlocal done
        with restored(student, chosen):
            found = answers_of(student, rows, answer_mask, batch_size, start)
        progress(done := done + 1, len(groups) + 2)
        return found

    try:
        none, every = measure(), measure(*groups)
        before, rest, found = none, list(groups), []
        while method == "greedy" and rest:  # each the best beside those before it; the last round ranks the rest
            chosen = [one for one, _, _ in found]
            tried = sorted(((one, measure(*chosen, one)) for one in rest), key=lambda entry: entry[1]["nll"])
            taken = tried if len(found) + 1 >= (steps or len(groups)) else tried[:1]
            found += [(one, before["nll"] - figures["nll"], figures) for one, figures in taken]
            before, rest = taken[0][1], [one for one in rest if one not in [entry[0] for entry in taken]]
        if method != "greedy":
            others = [] if method == "add" else groups  # what the layers before a group have
            embed = student.get_input_embeddings()
            with torch.no_grad():
                inputs = [embed(ids.to(student.device)) for ids in rows.split(batch_size)]
            for j in range(config.num_hidden_layers):
                for one in (group for group in groups if group[0] == j):
                    chosen = [one] if method == "add" else [group for group in groups if group != one]
                    figures = measure(*chosen, start=(j, inputs))
                    gain = none["nll"] - figures["nll"] if method == "add" else figures["nll"] - every["nll"]
                    found.append((one, gain, figures))
                with restored(student, others), torch.no_grad():
                    inputs = through(student, inputs, j)
            found.sort(key=lambda entry: -entry[1])
    finally:
        student.train(training)
    return {
        "method": method,
        "rows": len(rows),
        "answer_tokens": int(answer_mask.sum()),
        "length": rows.shape[1],
        "layers": config.num_hidden_layers,
        "key_value_heads": config.num_key_value_heads,
        "none": none,
        "all": every,
        "groups": [{"layer": j, "group": g, "gain": gain, **figures} for (j, g), gain, figures in found],
    }


def groups_of(config):
    """Every (layer, group) of the hybrid layers."""
    kinds = enumerate(config.layer_types)
    return [(j, g) for j, kind in kinds if kind == "hybrid_sliding" for g in range(config.num_key_value_heads)]


# --- choosing ----------------------------------------------------------------------------------------------------


def best_groups(ranking, count):
    """`kept_groups` of the `count` best groups of a ranking of `rank_groups`: per layer a list of their numbers.

    Raises:
        ConfigError: a count that the ranking has not.
    """
    if not 0 <= count <= len(ranking["groups"]):
        raise ConfigError(
            f"best_groups: count={count}, expected 0 to {len(ranking['groups'])}, the groups of the ranking"
        )
    kept = [[] for _ in range(ranking["layers"])]
    for entry in ranking["groups"][:count]:
        kept[entry["layer"]].append(entry["group"])
    return [sorted(groups) for groups in kept]


@dataclass
class Allocation:
    """Memories for a budget. student: arguments of `convert` and of a recipe's `student`.  bytes, teacher_bytes: of one
    sequence of `length` tokens, see `cache_bytes`.  measured: whether groups were chosen by a ranking.
    """

    student: dict
    budget: int
    length: int
    dtype: str
    bytes: dict
    teacher_bytes: dict
    measured: bool
    notes: list = field(default_factory=list)

    @property
    def total(self):
        return sum(self.bytes.values())

    def as_dict(self):
        return asdict(self) | {"total": self.total}


def allocate(config, budget, length, *, ranking=None, dtype="bfloat16", windows="all", widen=True, sparse_share=0.0):
    """Fill a budget in the order of what recalled more in docs/arena.md: windows, full attention of the best groups,
    wider features.

    Args:
        config: of a student without kept groups, whose window and sinks are wanted; a window that does not fit is
            halved until it does.
        budget: bytes per sequence at `length` tokens.
        ranking: of `rank_groups`; None: groups are spread evenly, which is not measured and said so.
        dtype: of keys and values.
        windows: "all": every hybrid layer has a window and sinks; "first": the first one alone, the others see the
            token itself and have to remember.
        widen: whether features may grow, to twice head_dim at most; those of a trained student cannot.
        sparse_share: share of what the windows leave that goes to a sparse memory, with the rest that nothing else can
            use; 0: none.
    Returns:
        Allocation
    Raises:
        ConfigError: a budget below the smallest student, a ranking of another model, a share off [0, 1], no such
            `windows`.
    """
    if not 0 <= sparse_share <= 1 or not budget > 0 or windows not in WINDOWS:
        raise ConfigError(
            f"sparse_share={sparse_share}, budget={budget}, windows={windows!r}: expected a share between 0 and 1, some bytes, and one "
            f"of {list(WINDOWS)}"
        )
    if config.layer_windows is not None or config.layer_sinks is not None:
        raise ConfigError(
            "allocate: layer_windows or layer_sinks are set, expected one window for all hybrid layers; leave them out"
        )
    trial, notes = copy.deepcopy(config), []
    trial.kept_groups, trial.sparse_memory = None, 0

    def size():
        return sum(cache_bytes(trial, length, dtype).values())

    fit_windows(trial, windows, budget, length, size, notes)
    order = ranked(config, ranking, notes) if ranking else None
    limit = size() + (1 - sparse_share) * (budget - size())
    fill_groups(trial, order, limit, size)
    if widen:
        add_features(trial, limit, size, notes)
    if sparse_share:
        add_sparse(trial, budget, length, size)
    groups = trial.kept_groups if any(trial.kept_groups or ()) else None
    if ranking is None and (groups or trial.layer_types != config.layer_types):
        notes.append(
            "no ranking was given: which groups are kept is not measured, they are spread evenly; measure with plan-layers --measure"
        )
    fields = ["sliding_window", "num_sink_tokens", "layer_windows", "layer_sinks", "layer_types", "memory_feature_dim"]
    fields += ["sparse_memory", "sparse_memory_score"] if trial.sparse_memory else []
    student = {name: getattr(trial, name) for name in fields} | {"kept_groups": groups}
    name, bytes_by_part = str(dtype).removeprefix("torch."), cache_bytes(trial, length, dtype)
    teacher = cache_bytes(config, length, dtype, teacher=True)
    return Allocation(student, int(budget), length, name, bytes_by_part, teacher, ranking is not None, notes)


def largest(most, fits):
    """The largest number from 0 to `most` that `fits`, by bisection; 0 fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fit_windows(config, windows, budget, length, size, notes):
    """The window halved until it fits, in the layers that are to have one."""
    wanted = config.sliding_window
    while True:
        if windows == "first" and "hybrid_sliding" in config.layer_types:
            first, n = config.layer_types.index("hybrid_sliding"), config.num_hidden_layers
            config.layer_windows = [config.sliding_window if j == first else 1 for j in range(n)]
            config.layer_sinks = [config.num_sink_tokens if j == first else 0 for j in range(n)]
            follow_kinds(config)
        if size() <= budget or (config.sliding_window or 0) < 2 * LEAST_WINDOW:
            break
        config.sliding_window //= 2
    if size() > budget:
        raise ConfigError(
            f"budget of {budget:,} bytes: a student with a window of {config.sliding_window} has {size():,} at {length} tokens; "
            "expected a budget of at least that. Take fewer layers that keep the teacher's attention, or memory_feature_dim"
        )
    if config.sliding_window != wanted:
        notes.append(f"the window was cut from {wanted} to {config.sliding_window} tokens to fit")


def follow_kinds(config):
    """Where windows are given per layer, those of layers that are not hybrid are the teacher's, and they have no sinks."""
    for j, kind in enumerate(config.layer_types if config.layer_windows is not None else ()):
        if kind != "hybrid_sliding":
            config.layer_windows[j] = config.teacher_sliding_window if kind == "sliding_attention" else None
            config.layer_sinks[j] = 0


def ranked(config, ranking, notes):
    """Groups of a ranking that help, best first; ConfigError where it is none, or another model's."""
    try:
        entries = [(int(entry["layer"]), int(entry["group"]), float(entry["gain"])) for entry in ranking["groups"]]
        shape = ranking["layers"], ranking["key_value_heads"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"ranking: not a file of plan-layers --measure ({error!r}); make one for this model"
        ) from error
    hybrid, expected = set(groups_of(config)), (config.num_hidden_layers, config.num_key_value_heads)
    if shape != expected or {(j, g) for j, g, _ in entries} != hybrid or len(entries) != len(hybrid):
        raise ConfigError(
            f"ranking of {len(entries)} groups, {shape[0]} layers with {shape[1]} key/value heads; expected one of the {len(hybrid)} "
            f"groups of {config.num_hidden_layers} layers with {config.num_key_value_heads}; measure this model"
        )
    helpful = [(j, g) for j, g, gain in entries if gain > 0 and math.isfinite(gain)]
    if len(helpful) < len(entries):
        notes.append(
            f"{len(entries) - len(helpful)} of {len(entries)} groups brought nothing in the measurement and are not kept"
        )
    return helpful


def evenly(config, count):
    """`count` groups, spread over layers and over the groups of a layer as evenly as can be."""
    groups, G = groups_of(config), config.num_key_value_heads
    layers = sorted({j for j, _ in groups})
    taken, done = [], 0
    while done < count:  # rounds of at most one group per layer
        now = min(count - done, len(layers))
        places = [int((n + 0.5) * len(layers) / now) for n in range(now)]
        taken += [(layers[p], (p + done // len(layers)) % G) for p in places]
        done += now
    return taken


def set_kept_groups(config, groups):
    """Keep the full attention of `groups`; a layer whose groups are all kept becomes the teacher's own."""
    per_layer, kinds = [[] for _ in config.layer_types], list(config.layer_types)
    for j, g in groups:
        per_layer[j].append(g)
    for j, mine in enumerate(per_layer):
        if len(mine) == config.num_key_value_heads:
            kinds[j], per_layer[j] = config.teacher_layer_types[j], []
    config.layer_types, config.kept_groups = kinds, [sorted(mine) for mine in per_layer]
    follow_kinds(config)


def fill_groups(config, order, budget, size):
    """Keep as many groups as fit: those of `order`, the best first, or evenly spread ones."""
    names = ("layer_types", "layer_windows", "layer_sinks")
    before = {name: copy.copy(getattr(config, name)) for name in names}

    def take(count):
        config.kept_groups = None
        for name in names:
            setattr(config, name, copy.copy(before[name]))
        set_kept_groups(config, evenly(config, count) if order is None else order[:count])
        return size() <= budget

    # every group more costs something beyond a short context, so that bisection finds the last that fits
    take(largest(len(groups_of(config)) if order is None else len(order), take))


def add_features(config, budget, size, notes):
    """The widest features that fit, at most twice head_dim and no wider than there are kernels for."""
    without = "hybrid_sliding" not in config.layer_types or config.mixer_branches == "window"
    if without or config.mixer_combine == "joint":
        return
    before = config.memory_feature_dim
    start, most = before or config.head_dim, 2 * config.head_dim
    most = max(min(most, LARGEST_K // (2 if config.memory_feature_map == "softmax_signed" else 1)), start)
    for wider in range((start // FEATURES_STEP + 1) * FEATURES_STEP, most + 1, FEATURES_STEP):
        config.memory_feature_dim, last = wider, config.memory_feature_dim
        if size() > budget:
            config.memory_feature_dim = last
            break
    if config.memory_feature_dim != before:
        notes.append(
            f"features were widened from {start} to {config.memory_feature_dim} per head: the student needs its alignment (stage I) so"
        )


def add_sparse(config, budget, length, size):
    """The largest sparse memory that fits, at most what a context of `length` tokens can fill."""
    if "hybrid_sliding" not in config.layer_types or config.mixer_branches != "both":
        return
    most = max(length - (config.sliding_window or 0) - config.num_sink_tokens, 0) // STEP

    def take(count):
        config.sparse_memory = STEP * count
        return size() <= budget

    take(largest(most, take))
