"""Ways to merge one tensor of several experts, and the statistics that two of them need.

Every method is `f(experts, weights, base, **options)`: E tensors of one shape, E shares whose sum is 1, the common
start or None. It works in float32 (float64 for float64), in the order given, block by block, and returns the dtype of
the first expert.
Dims: E experts, N elements of a tensor, O and I outputs and inputs of a linear layer, V vocabulary.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xlstm_hybrid.checkpoint.files import MANIFEST, digest, read_versioned, staged_file, weight_files
from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.errors import CheckpointError, MergeError
from xlstm_hybrid.recipe.merge_settings import LABELS, option_faults

BLOCK = 2**20  # elements that are worked on at a time
NOT_SCORED = -100
RIDGE = 1e-6  # of the mean squared input: pulls what no input of a layer determines to the plain mean


def blockwise(function, tensors):
    """`function(*blocks)` over blocks of flat tensors of one shape: float32 at least inside, the dtype of the first
    outside, little memory.
    """
    wide, flat = torch.promote_types(tensors[0].dtype, torch.float32), [t.reshape(-1) for t in tensors]
    out = torch.empty_like(flat[0])
    for first in range(0, out.numel(), BLOCK):
        out[first : first + BLOCK] = function(*(x[first : first + BLOCK].to(wide) for x in flat))
    return out.view(tensors[0].shape)


def weighted_sum(tensors, weights):
    """sum_e w_e x_e; no fused multiply-add, whose bits would depend on where an element lies."""
    total = weights[0] * tensors[0]
    for w, x in zip(weights[1:], tensors[1:], strict=True):
        total += w * x
    return total


def linear(experts, weights, base=None):
    """sum_e w_e expert_e, model soups, Wortsman et al. 2022. `base` is not used."""
    return blockwise(lambda *xs: weighted_sum(xs, weights), experts)


def task_arithmetic(experts, weights, base, *, scale=1.0):
    """base + scale * sum_e w_e (expert_e - base), Ilharco et al. 2023."""
    return blockwise(
        lambda start, *xs: start + scale * weighted_sum([x - start for x in xs], weights), [base, *experts]
    )


def slerp(experts, weights, base=None):
    """The arc between two tensors as flat vectors, at the share of the second, Shoemake 1985.

    sin((1 - t) a) / sin(a) x + sin(t a) / sin(a) y with the angle a between x and y; the straight line where x and y
    are (anti)parallel or zero.
    """
    x, y = (expert.reshape(-1).split(BLOCK) for expert in experts)

    def norm(parts):
        return math.sqrt(sum(part.square().sum().item() for part in parts))

    norms = [norm(part.double() for part in parts) for parts in (x, y)]
    if not all(norms):
        return linear(experts, weights)
    apart, along = (
        norm(a.double() / norms[0] + sign * b.double() / norms[1] for a, b in zip(x, y, strict=True))
        for sign in (-1, 1)
    )
    angle = 2 * math.atan2(apart, along)  # exact for small angles, where acos is not
    if math.sin(angle) < 1e-4:  # arc and line differ by less than float32 can hold, or there is no one arc
        return linear(experts, weights)
    return linear(experts, [math.sin(w * angle) / math.sin(angle) for w in weights])


# --- sparse task vectors ---------------------------------------------------------------------------------------


def threshold(expert, base, density):
    """The magnitude of expert - base that a share `density` of the elements reaches; at least one does.

    Two passes over blocks: magnitudes are counted by their first 16 bits, and only those of the bin in question are
    compared.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    integer, shift = (torch.int32, 16) if wide == torch.float32 else (torch.int64, 48)
    pairs = list(zip(expert.reshape(-1).split(BLOCK), base.reshape(-1).split(BLOCK), strict=True))

    def magnitudes():
        return ((x.to(wide) - start.to(wide)).abs() for x, start in pairs)

    wanted = max(1, round(density * expert.numel()))
    counts = sum(torch.bincount(m.view(integer) >> shift, minlength=2**15) for m in magnitudes())
    above = counts.flip(0).cumsum(0).flip(0)  # elements in this bin and those over it
    place = int((above >= wanted).nonzero().max())
    inside = torch.cat([m[(m.view(integer) >> shift) == place] for m in magnitudes()])
    wanted -= int(above[place] - counts[place])
    return inside.kthvalue(inside.numel() - wanted + 1).values


def elected_mean(deltas, weights):
    """Per element, the weighted mean of the values whose sign is that of the weighted sum; 0 where the sum is 0."""
    sign = weighted_sum(deltas, weights).sign()
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, delta in zip(weights, deltas, strict=True):
        agrees = (delta.sign() == sign) & (sign != 0)
        total += torch.where(agrees, w * delta, 0.0)
        share += w * agrees.to(share.dtype)
    return torch.where(share > 0, total / share, 0.0)


def ties(experts, weights, base, *, density=0.2, scale=1.0):
    """base + scale * the elected, disjoint mean of trimmed task vectors, Yadav et al. 2023.

    Trimming keeps the `density` of elements of largest magnitude, and those as large as the smallest of them. The paper
    trims over all parameters at once; here each tensor keeps its own share, so that a model need not be in memory.
    """
    limits = [threshold(expert, base, density) for expert in experts]

    def block(start, *xs):
        deltas = [torch.where((x - start).abs() >= limit, x - start, 0.0) for x, limit in zip(xs, limits, strict=True)]
        return start + scale * elected_mean(deltas, weights)

    return blockwise(block, [base, *experts])


def drop_and_join(experts, weights, base, keys, drop, seed, scale, join):
    """base + scale * join of task vectors without a random share `drop` of their elements, the rest divided by
    1 - drop. The random bits of a tensor of an expert follow from its key, the same on every machine: numpy keeps the
    streams of its bit generators. A stream goes on from block to block.
    """
    from numpy.random import Philox

    digests = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in keys]
    streams = [Philox(int.from_bytes(digest[:16])) for digest in digests]

    def dropped(delta, stream):
        stays = torch.from_numpy(stream.random_raw(delta.numel()) >= round(drop * 2**64))
        return torch.where(stays.view(delta.shape), delta / (1 - drop), 0.0)

    def block(start, *xs):
        deltas = [dropped(x - start, stream) for x, stream in zip(xs, streams, strict=True)]
        return start + scale * join(deltas, weights)

    return blockwise(block, [base, *experts])


def dare(experts, weights, base, *, keys, drop=0.9, seed=0, scale=1.0):
    """base + scale * sum_e w_e (dropped and rescaled task vector of e), Yu et al. 2024.

    Args:
        keys: one text per expert, of the expert and the tensor: they and `seed` decide what is dropped.
    """
    return drop_and_join(experts, weights, base, keys, drop, seed, scale, weighted_sum)


def dare_ties(experts, weights, base, *, keys, drop=0.9, seed=0, scale=1.0):
    """DARE in the place of trimming, then sign election and disjoint mean as in TIES, Yu et al. 2024."""
    return drop_and_join(experts, weights, base, keys, drop, seed, scale, elected_mean)


# --- methods with statistics -----------------------------------------------------------------------------------


def fisher(experts, weights, base=None, *, statistics, floor=1e-6):
    """sum_e w_e F_e expert_e / sum_e w_e F_e per element, Matena and Raffel 2022.

    Args:
        statistics: diagonals F_e >= 0 in the shape of the tensor, see `fisher_diagonals`.
        floor: added to F_e, as a share of the mean of all F_e: an element that no expert's data touched gets the plain
            mean.
    """
    low = floor * sum(f.double().mean().item() for f in statistics) / len(statistics)
    if not low > 0:
        return linear(experts, weights)

    def block(*parts):
        xs, shares = parts[: len(experts)], [w * (f + low) for w, f in zip(weights, parts[len(experts) :], strict=True)]
        return weighted_sum(xs, [share / sum(shares) for share in shares])

    return blockwise(block, [*experts, *statistics])


def regmean(experts, weights, base=None, *, statistics, alpha=0.9):
    """(sum_e w_e W_e G_e) (sum_e w_e G_e)^-1: the linear layer that is nearest to every expert's on that expert's
    inputs, Jin et al. 2023.

    Args:
        experts: weights of a linear layer, [O, I].
        statistics: mean outer products G_e of its inputs, [I, I], see `gram_matrices`.
        alpha: what is kept of the off-diagonal elements of G_e; 1 is the exact least-squares solution.
    """
    mean = weighted_sum([expert.double() for expert in experts], weights)
    left, right = torch.zeros_like(mean), torch.zeros(mean.shape[1], mean.shape[1], dtype=torch.float64)
    for w, weight, gram in zip(weights, experts, statistics, strict=True):
        gram = w * (alpha * gram.double() + (1 - alpha) * gram.double().diag().diag())
        left += weight.double() @ gram
        right += gram
    ridge = RIDGE * right.diagonal().mean().item()
    if not ridge > 0:
        return linear(experts, weights)
    right.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(right)
    return torch.cholesky_solve((left + ridge * mean).T, factor).T.contiguous().to(experts[0].dtype)


MERGES = {f.__name__: f for f in (linear, task_arithmetic, ties, dare, dare_ties, slerp, fisher, regmean)}


def check_options(method, options):
    """Raise MergeError for options that `method` does not have or that are out of range, all of them named."""
    if wrong := option_faults(method, options):
        raise MergeError(f"method={method!r} with options {sorted(options)}: {'; '.join(wrong)}")


# --- statistics of a model -------------------------------------------------------------------------------------


def single_rows(batches):
    """`(row, counted)`: single rows [1, T] of batches of tensors [B, T], and which of the T - 1 last tokens count:
    those that the mask keeps and, where there are labels, that they score. A packed document's first token is not
    scored: nothing in the row predicts it.
    """
    for batch in batches:
        for j in range(len(batch["input_ids"])):
            row = {key: value[j : j + 1] for key, value in batch.items()}
            counted = row.get("attention_mask", torch.ones_like(row["input_ids"]))[0, 1:].bool()
            if (labels := row.pop("labels", None)) is not None:
                counted &= labels[0, 1:] != NOT_SCORED
            yield row, counted


def fisher_diagonals(model, batches, *, labels="model", seed=0):
    """Diagonals of the Fisher information per sequence: the mean over rows of (d log p(y | x) / d theta)^2.

    Args:
        batches: dicts of tensors [B, T] with `input_ids`, `attention_mask` where rows are padded, `labels` where not
            all tokens count (-100).
        labels: "model" draws every y_t from the model's own distribution after x_<t, which gives the Fisher information
            (Matena and Raffel 2022); "data" takes y = x, the empirical one.
        seed: of the draws.
    Returns:
        `({parameter name: float32 tensor}, number of rows)`. Tied parameters stand under their first name.
    """
    if labels not in LABELS:
        raise MergeError(f"labels={labels!r}: expected 'model' or 'data'")
    generator, rows = torch.Generator().manual_seed(seed), 0
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p, dtype=torch.float32, device="cpu") for name, p in parameters.items()}
    for row, counted in single_rows(batches):
        inputs = {key: x.to(model.device) for key, x in row.items()}
        logp = model(**inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # [T - 1, V]
        drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator)[:, 0]
        target = (row["input_ids"][0, 1:] if labels == "data" else drawn).to(logp.device)
        likelihood = logp.gather(-1, target[:, None])[:, 0][counted.to(logp.device)].sum()
        gradients = torch.autograd.grad(likelihood, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                squares[name] += gradient.float().square().cpu()
        rows += 1
    return {name: total / max(1, rows) for name, total in squares.items()}, rows


@torch.no_grad()
def gram_matrices(model, batches):
    """Mean outer products of the inputs of every linear layer, over the tokens that the attention mask keeps.

    Returns:
        `({layer name: float32 [I, I]}, {layer name: name of the layer whose input it shares}, number of tokens)`.
    """
    grams, shared, last, state = {}, {}, [None, None], {}

    def collect(name):
        def hook(module, inputs):
            if inputs[0] is last[0]:  # q, k and v read the same tensor, so do the two halves of a gated MLP
                shared[name] = last[1]
                return
            last[:] = inputs[0], name
            x = inputs[0].flatten(0, -2)[state["counted"]].double()
            grams[name] = grams.get(name, 0) + (x.T @ x).cpu()

        return hook

    hooks = [
        m.register_forward_pre_hook(collect(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    tokens = 0
    try:
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask")
            state["counted"] = (torch.ones_like(ids) if mask is None else mask.to(model.device)).flatten().bool()
            model(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"}, use_cache=False)
            tokens += int(state["counted"].sum())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (gram / max(1, tokens)).float() for name, gram in grams.items()}, shared, tokens


def weight_files_digest(directory):
    """SHA-256 over names and hashes of a checkpoint's files of weights: to which weights statistics belong."""
    directory = Path(directory)
    listed = read_versioned(directory / MANIFEST, directory.name)["files"] if (directory / MANIFEST).is_file() else {}
    files = sorted({file.name for file in weight_files(directory).values()})
    hashes = [[name, listed[name]["sha256"] if name in listed else digest(directory / name)] for name in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def measure_statistics(checkpoint, batches, out, kind, device="cpu", **options):
    """Write what `fisher` or `regmean` needs of one expert to a safetensors file, which appears complete or not at all.

    Args:
        checkpoint: directory of the expert; loaded in float32.
        batches: what the expert is good at: dicts of tensors [B, T], see `fisher_diagonals`.
        out: the file; not inside of the checkpoint, whose manifest lists no such file.
        kind: "fisher" or "gram".
        device: where the model runs; the statistics are summed up in main memory.
        options: of `fisher_diagonals`.
    Returns:
        The number of rows ("fisher") or tokens ("gram") that were read.
    """
    out, measures = Path(out), {"fisher": fisher_diagonals, "gram": gram_matrices}
    if kind not in measures or out.resolve().is_relative_to(Path(checkpoint).resolve()):
        raise MergeError(
            f"kind={kind!r}, out={out.name}: expected one of {sorted(measures)}, and a file outside of {Path(checkpoint).name}"
        )
    tensors, *shared, items = measures[kind](load_model(checkpoint, device=device), batches, **options)
    if not items:
        raise MergeError(f"{out.name}: no tokens to measure {kind} statistics on; give at least one batch")
    notes = {"format": "pt", "kind": kind, "items": str(items), "weights": weight_files_digest(checkpoint)}
    notes["shared"] = json.dumps(shared[0] if shared else {})
    with staged_file(out, sum(x.numel() * x.element_size() for x in tensors.values())) as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata=notes)
    return items


class Statistics:
    """A file of `measure_statistics`, mapped; `wrong` lists in words why it does not belong to this expert and method."""

    def __init__(self, path, kind, name, directory, headers, stack):
        self.path, self.kind, self.wrong = Path(path), kind, []
        try:
            self.file = stack.enter_context(safe_open(self.path, framework="pt"))
            notes = self.file.metadata() or {}
            self.shared = json.loads(notes.get("shared", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"statistics {self.path.name} of {name} cannot be read ({error}); measure them again"
            ) from error
        self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}  # noqa: SIM118
        where = f"statistics {self.path.name} of {name}"
        if notes.get("kind") != kind:
            self.wrong.append(f"{where}: kind {notes.get('kind')!r}, expected {kind!r}")
        elif notes.get("weights") != weight_files_digest(directory):
            self.wrong.append(f"{where}: measured on other weights")
        else:
            for tensor, (_, shape) in headers.items():
                key = self.key(tensor)
                expected = shape if kind == "fisher" else (shape[-1],) * 2 if shape else ()
                if key is not None and self.shapes[key] != expected:
                    self.wrong.append(f"{where}: {key} is {list(self.shapes[key])}, expected {list(expected)}")

    def key(self, tensor):
        """The entry that belongs to a tensor of the model; None where there is none."""
        name = tensor
        if self.kind != "fisher":
            name = tensor.removesuffix(".weight") if tensor.endswith(".weight") else None
        name = self.shared.get(name, name)
        return name if name in self.shapes else None

    def tensor(self, tensor):
        """The entry itself; MergeError if it is not finite or has a negative diagonal."""
        value = self.file.get_tensor(self.key(tensor))
        diagonal = value if self.kind == "fisher" else value.diagonal()
        if not torch.isfinite(value).all() or (diagonal < 0).any():
            raise MergeError(
                f"statistics {self.path.name}: {self.key(tensor)} holds values that are negative or not finite; measure them again"
            )
        return value
