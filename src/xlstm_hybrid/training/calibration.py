"""Stage 0: the new parameters of a layer in closed form, from what the teacher's attention does on some thousand tokens.

Without gradients, layer by layer and head by head, on the teacher's own hidden states:

1. Feature maps. Softmax attention weighs a key by exp(q k / sqrt(K)). Keys close to one of F centroids c_j are weighed
   about as that centroid is, so that exp(q k / sqrt(K)) ~ sum_j exp(q c_j / sqrt(K)) [k is in cluster j]: a product of
   features of q and of k. Both are softmaxes of linear maps: over j, softmax(q c_j / sqrt(K)) differs from the first
   factor by a number per query, which the mLSTM's ratio does not see, and the second is the soft assignment
   softmax(-b/2 |k - c_j|^2_M), whose term in k alone cancels; the term in c_j alone is linear in k along the direction
   u with u k ~ 1. Distances are in the metric M = E[q q^T] / K, in which they are the expected square of what a
   replaced key changes of the exponent. Centroids are k-means', each key weighed by the attention that it receives from
   beyond the window.
2. Time constants: the longest that a mixer begins with. Where heads could choose, none chose a shorter one.
3. Output gate: sigmoid of a linear map of [q; k; v] that brings o M + (1 - o) A closest to the teacher's attention, M
   the mLSTM and A the window: least squares with a ridge, repeated from the sigmoid's slope (Gauss-Newton).
4. A head whose memory does not help on text that nothing was fitted to has its gate closed.

Maps and gates are chosen by the squared error that stage I minimises. The idea of setting gates and time scales from a
teacher's statistics is that of Taylor-Calibrate (arXiv 2606.16429), closed-form fits per layer that of Neural Block
Linearization (2505.21077); the fit is ours.

Dims: B batch, T tokens, D hidden size, H mixed query heads, K query/key dim, V value dim, P columns of a feature map,
N tokens of all batches.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from xlstm_hybrid.checkpoint.digests import require_intact, weights_hash
from xlstm_hybrid.checkpoint.files import (
    FORMAT_VERSION,
    MANIFEST,
    add_provenance,
    check_space,
    digest,
    discard,
    read_versioned,
    staged,
    weight_files,
    write_file,
    write_json,
    write_manifest,
)
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.model.experimental.cells import CELLS
from xlstm_hybrid.model.layers import LinearDecoderLayer
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.model.trained import trained_values
from xlstm_hybrid.training.alignment import new_parameters
from xlstm_hybrid.training.layers_at_a_time import embedded, model_of, read_tensor, trained_files, write_trained
from xlstm_hybrid.training.run_spec import short_digest

SHARPNESS = (2.0, 8.0)  # b of the soft assignment
QUERY_SCALES = (0.5, 1.0)  # of the queries' exponents: below 1 where the centroids are far from their keys
START_SCALES = (0.25, 1.0, 4.0)  # of the maps that a mixer begins with, where a map has no centroids
CLOSED = -8.0  # bias of a closed output gate: three parts in ten thousand of the memory, and Adam can open it
KMEANS_STEPS, GATE_STEPS, GATE_RIDGE, GATE_BOUND = 8, 4, 0.05, 2.0
WANTED = {"mixer_combine": "gate", "mixer_branches": "both", "mixer_norm": False, "sparse_memory": 0}
PROGRESS = "calibration.json"


@dataclass
class Seen:
    """What a layer sees of one batch, and what its heads should give; all heads are those that mix.

    x: input of the attention, [B, T, D].  projected: of `HybridAttention.rotated`.  tokens: `Tokens`.
    window: what the window gives, [B, T, H, V].  missing: the teacher's attention minus that, 0 where nothing counts.
    target: sum of squares of the teacher's attention, kept groups included.  received: attention that each key receives from beyond the
    window, [B, H, T].
    """

    x: torch.Tensor
    projected: tuple
    tokens: object
    window: torch.Tensor
    missing: torch.Tensor
    target: torch.Tensor
    received: torch.Tensor


def per_head(x):
    """[H] sums of [B, T, H, V]."""
    return x.sum((0, 1, 3), dtype=torch.float64)


def observe(layer, x, position_embeddings, tokens, mask, teacher_mask, position_ids=None):
    """`(Seen, the teacher's hidden states after the layer)` of a decoder layer and what enters it; no `Seen` where nothing is
    calibrated.
    """
    if isinstance(layer, LinearDecoderLayer):
        return None, layer(x, tokens=tokens)
    attention = layer.self_attn
    states, x = x, layer.attention_input(x)
    heads = attention.heads(x)
    projected = attention.rotated(heads, position_embeddings)
    reach = attention.config.kept_window_of(attention.layer_idx)
    target, _ = attention.attend(*projected[:3], teacher_mask, reach, position_ids=position_ids)
    following = layer.finish(states, attention.output(target, heads))
    if not isinstance(getattr(attention, "mlstm", None), MLSTMMixer):
        return None, following
    real = tokens.real[..., None, None]
    target = torch.where(real, target.float(), 0.0)
    squares = target.square().sum(dtype=torch.float64)
    if attention.split is not None:
        target = attention.split.take(target, False, 2, attention.num_key_value_groups)
        projected = attention.split.projected(projected, kept=False)
    window, _ = attention.window(*projected[:3], tokens, mask)
    window = torch.where(real, window.float(), 0.0)
    received = beyond_window(attention, projected, tokens, reach)
    return Seen(x, projected, tokens, window, target - window, squares, received), following


def beyond_window(attention, projected, tokens, reach):
    """[B, H, T]: attention that each key receives from queries whose window and sinks do not show it, one head at a
    time in memory.
    """
    query, key, *_ = projected
    n, T = query.shape[1] // key.shape[1], query.shape[2]
    sees = tokens.visible(reach or T, 0)
    far = sees & ~tokens.visible(attention.sliding_window, attention.num_sink_tokens) & tokens.real[:, :, None]
    heads = []
    for h in range(query.shape[1]):
        scores = (query[:, h].float() @ key[:, h // n].float().transpose(-1, -2)) * attention.scaling
        weights = torch.softmax(scores.masked_fill(~sees, float("-inf")), -1)
        heads.append(torch.where(far, weights, 0.0).sum(1))
    return torch.stack(heads, 1)


class Calibration:
    """The closed form of one layer; see the module. Changes the parameters of its mixer in place.

    Args:
        layer: `HybridDecoderLayer` with float32 weights.
        fitted, held_out: lists of `Seen`; the second decides which gates are closed.
    """

    def __init__(self, layer, fitted, held_out):
        self.attention, self.mixer = layer.self_attn, layer.self_attn.mlstm
        self.config, self.fitted, self.held_out = self.attention.config, fitted, held_out
        self.alone = sum(per_head(seen.missing.square()) for seen in held_out)  # [H] squared error of the window alone
        self.run_cell, self.repeats = CELLS[self.config.memory_cell].run, self.attention.num_key_value_groups

    def memory(self, seen):
        """`(what the mLSTM gives [B, T, H, V], the output gate [B, T, H])` with the mixer's present parameters."""
        phi_q, phi_k, i, f, o = self.attention.read(seen.x, seen.projected, seen.tokens)
        value = seen.projected[2].repeat_interleave(self.repeats, 1).transpose(1, 2)
        h, _ = self.run_cell(phi_q, phi_k, value, i, f, chunk_size=self.config.mlstm_chunk_size)
        return h.float(), o

    def surplus(self, seen):
        """What the mLSTM gives minus what the window gives, [B, T, H, V], 0 where nothing counts."""
        return torch.where(seen.tokens.real[..., None, None], self.memory(seen)[0] - seen.window, 0.0)

    def error(self, batches):
        """[H] squared error of the layer's mix with the mixer's present parameters."""
        total = 0
        for seen in batches:
            memory, o = self.memory(seen)
            mixed = torch.where(seen.tokens.real[..., None, None], memory - seen.window, 0.0) * o[..., None]
            total = total + per_head((seen.missing - mixed).square())
        return total

    def constant_gate(self):
        """`([H] least squared error on the fitted batches that a constant output gate leaves, that gate [H])`."""
        product = square = missing = 0
        for seen in self.fitted:
            surplus = self.surplus(seen)
            product, square = product + per_head(surplus * seen.missing), square + per_head(surplus.square())
            missing = missing + per_head(seen.missing.square())
        o = (product / square.clamp_min(1e-30)).clamp(0, 1)
        return missing - 2 * o * product + o.square() * square, o

    def choose(self, candidates):
        """Give each head the best of some settings `{parameter: [H, ...]}`, by `constant_gate`; returns [H] numbers."""
        candidates, errors = list(candidates), []
        for candidate in candidates:
            for name, value in candidate.items():
                getattr(self.mixer, name).copy_(value)
            errors.append(self.constant_gate()[0])
        best = torch.stack(errors).argmin(0)
        for name in candidates[0]:
            parameter = getattr(self.mixer, name)
            for n, candidate in enumerate(candidates):
                parameter[best == n] = candidate[name].to(parameter)[best == n]
        return best

    # --- feature maps ------------------------------------------------------------------------------------------------

    def heads_of(self, x):
        """Queries or keys [B, H | G, T, K] of all fitted batches as [H, N, K] in float32, padding left out."""
        parts = []
        for seen in self.fitted:
            query, key = seen.projected[:2] if self.config.memory_rope else seen.projected[4]
            part = query if x == "query" else key.repeat_interleave(self.repeats, 1)
            parts.append(part.transpose(0, 1)[:, seen.tokens.real])
        return torch.cat(parts, 1).float()

    def feature_maps(self):
        """Candidates for `q_map` and `k_map`."""
        if self.config.memory_feature_map != "softmax":
            start = self.mixer.first_map().to(self.mixer.q_map).expand_as(self.mixer.q_map)
            for q in START_SCALES:
                for k in START_SCALES:
                    yield {"q_map": q * start, "k_map": k * start}
            return
        queries, keys = self.heads_of("query"), self.heads_of("key")
        received = torch.cat([s.received.transpose(0, 1)[:, s.tokens.real] for s in self.fitted], 1)
        features = self.mixer.q_map.shape[-1]
        parts = [
            centroids(*head, features, self.attention.scaling) for head in zip(queries, keys, received, strict=True)
        ]
        asked, assigned, constant = (torch.stack(part) for part in zip(*parts, strict=True))
        for scale in QUERY_SCALES:
            for sharpness in SHARPNESS:
                yield {"q_map": scale * asked, "k_map": sharpness * (assigned - constant)}

    # --- gates -------------------------------------------------------------------------------------------------------

    def gate_inputs(self, seen):
        """[n, H, C] what the output gate reads at the real tokens, and a 1 at the end."""
        if self.config.mixer_gate_input == "qkv":
            q, k, v = seen.projected[3]
            z = torch.cat([q, *(x.repeat_interleave(self.repeats, 2) for x in (k, v))], -1)
        else:
            z = seen.x[:, :, None].expand(-1, -1, len(self.mixer.q_map), -1)
        return nn.functional.pad(z[seen.tokens.real].float(), (0, 1), value=1.0)

    def fit_gate(self):
        """The output gate by Gauss-Newton steps with a ridge, from the best constant, which stays where they end worse.

        With e = memory - window and d = teacher - window, |d - o e|^2 is |e|^2 (o - o*)^2 and a constant, o* = d e /
        |e|^2: weighted least squares in o, linear in the parameters but for the sigmoid.
        """
        heads, sums = len(self.mixer.q_map), []
        for seen in self.fitted:
            surplus, real = self.surplus(seen), seen.tokens.real
            sums.append([x.sum(-1)[real].double() for x in (surplus.square(), surplus * seen.missing)])
        _, start = self.constant_gate()
        solution = None
        for step in range(GATE_STEPS + 1):
            gram = vector = error = 0
            for seen, (weight, product) in zip(self.fitted, sums, strict=True):
                z = self.gate_inputs(seen)
                if solution is None:
                    solution = weight.new_zeros(heads, z.shape[-1])
                    solution[:, -1] = torch.logit(start.clamp(0.02, 0.98))
                o = torch.sigmoid((z.double() * solution).sum(-1))
                error = error + (weight * o.square() - 2 * o * product).sum(0)
                if step < GATE_STEPS:
                    slope, rest = o * (1 - o), product - weight * o
                    parts = [gauss_newton(z[:, h], weight[:, h], slope[:, h], rest[:, h]) for h in range(heads)]
                    g, v = (torch.stack(part) for part in zip(*parts, strict=True))
                    gram, vector = gram + g, vector + v
            if step == 0:
                constant, before = solution, error
            if step < GATE_STEPS:
                solution = solution + self.bounded(ridge_step(gram, vector, solution))
        solution = torch.where((error <= before)[:, None], solution, constant)
        self.mixer.ogate_weight.copy_(solution[:, :-1])
        self.mixer.ogate_bias.copy_(solution[:, -1])

    def bounded(self, step):
        """A step [H, C] of the gates, shortened where it moves their logits by more than GATE_BOUND (root mean square):
        where no gate is open or closed enough, least squares would go on until its slope is 0, and nothing could train
        it.
        """
        moved = count = 0
        for seen in self.fitted:
            logits = (self.gate_inputs(seen).double() * step).sum(-1)
            moved, count = moved + logits.square().sum(0), count + len(logits)
        size = (moved / count).sqrt()
        return step * (GATE_BOUND / size.clamp_min(GATE_BOUND))[:, None]

    def close_gates(self):
        """Close the gates of the heads that the held-out batches do not speak for; returns [H] bool."""
        worse = ~(self.error(self.held_out) < self.alone)
        self.mixer.ogate_weight[worse] = 0.0
        self.mixer.ogate_bias[worse] = CLOSED
        return worse

    def run(self):
        """`{"window", "before", "after"}`: relative errors on the held-out batches of the window alone, of the mixer as
        it was and as it is now; and "closed", how many of its "heads" have a closed gate.
        """
        target = sum(seen.target for seen in self.held_out).clamp_min(1e-30)
        before = self.error(self.held_out).sum()
        if self.config.memory_cell != "linear":
            self.mixer.igate_weight.zero_()
            self.mixer.fgate_weight.zero_()
            self.mixer.fgate_bias.fill_(self.mixer.forget_bias().max())
        self.choose(self.feature_maps())
        self.fit_gate()
        closed = self.close_gates()
        after = self.error(self.held_out).sum()
        figures = {"window": self.alone.sum() / target, "before": before / target, "after": after / target}
        return {k: x.item() for k, x in figures.items()} | {"closed": int(closed.sum()), "heads": len(closed)}


def gauss_newton(z, weight, slope, rest):
    """A batch's part of the normal equations of one head's gate, `([C, C], [C])` in float64."""
    z = z.double()
    return z.T @ (z * (weight * slope.square())[:, None]), z.T @ (slope * rest)


def ridge_step(gram, vector, solution):
    """[H, C] steps of heads' gates from their normal equations [H, C, C] and [H, C]; the last entry, the bias, is free."""
    ridge = GATE_RIDGE * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1, keepdim=True).expand_as(solution)
    ridge = torch.cat([ridge[:, :-1], 1e-9 * ridge[:, -1:]], 1).clamp_min(1e-12)
    return torch.linalg.solve(gram + torch.diag_embed(ridge), vector - ridge * solution)


def centroids(queries, keys, received, count, scaling):
    """A head's feature maps by k-means over its keys: `(map of queries, linear and constant part of the map of keys)`,
    each [K, P]; sharpness multiplies the last two.

    Args:
        queries, keys: [N, K].  received: [N] weights of the keys.  count: P.  scaling: of the attention's exponents.
    """
    moment = (queries.T @ queries).double() / len(queries) * scaling**2
    values, vectors = torch.linalg.eigh(moment)
    metric = (vectors * values.clamp_min(0).sqrt()).to(keys)  # |(k - c) metric|^2 = E (q (k - c) scaling)^2
    placed, weight = keys @ metric, received + 1e-3 * received.mean() + 1e-12
    generator = torch.Generator(placed.device).manual_seed(0)
    many = count <= len(placed)
    centers = placed[torch.multinomial(weight, count, replacement=not many, generator=generator)]
    for step in range(KMEANS_STEPS + 1):
        members = nn.functional.one_hot(torch.cdist(placed, centers).argmin(1), count).to(keys) * weight[:, None]
        mass = members.sum(0)
        found = members.T @ torch.cat([placed, keys], 1) / mass.clamp_min(1e-30)[:, None]
        if step == KMEANS_STEPS:
            break
        again = placed[torch.multinomial(weight, count, replacement=True, generator=generator)]
        centers = torch.where(mass[:, None] > 0, found[:, : keys.shape[1]], again)
    original = torch.where(mass[:, None] > 0, found[:, keys.shape[1] :], keys.mean(0))
    gram = (keys.T @ keys).double()
    ridge = 1e-2 * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ones = torch.linalg.solve(gram + ridge, keys.sum(0, dtype=torch.float64)).to(keys)  # ones k ~ 1
    constant = ones[:, None] * (centers.square().sum(1) / 2)[None]
    return original.T * scaling, metric @ centers.T, constant


# --- a model, a checkpoint ---------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate_layer(trunk, j, states, batches, fitted):
    """Calibrate layer j of a trunk (`XLSTMHybridModel` in eval mode) in place.

    Args:
        states: list of what enters the layer, [B, T, D] for each batch; it is changed to what leaves it.
        batches: list of {"input_ids", and "attention_mask", "position_ids" where they matter}.
        fitted: how many of them, from the first on, the layer is fitted to; the others are held out.
    Returns:
        what `Calibration.run` does; None for a layer that does not mix.
    """
    seen, layer = [], trunk.layers[j]
    kind = trunk.config.teacher_layer_types[j]
    for n, batch in enumerate(batches):
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        tokens, where, masks = trunk.prepare(states[n], mask, positions, None, teacher=True)
        found, states[n] = observe(layer, states[n], teacher_mask=masks.get(kind), **where[j])
        if not torch.isfinite(states[n][tokens.real]).all():
            raise CheckpointError(
                f"layer {j}: its hidden states are not finite on the text that stage 0 reads; its weights are damaged: convert the "
                "teacher again"
            )
        seen.append(found)
    return None if seen[0] is None else Calibration(layer, seen[:fitted], seen[fitted:]).run()


def check(config, fitted, held_out):
    """Raise ConfigError for a student that cannot be calibrated, or too little text."""
    wrong = [
        f"{field}={getattr(config, field)!r}, expected {value!r}"
        for field, value in WANTED.items()
        if getattr(config, field) != value
    ]
    if config.memory_cell == "delta":
        wrong.append("memory_cell='delta', expected 'mlstm' or 'linear'")
    if wrong:
        raise ConfigError(f"calibration: {wrong[0]}; leave stage 0 out (no section calibrate) and begin with alignment")
    if "hybrid_sliding" not in config.layer_types:
        raise ConfigError("nothing to calibrate: no layer is hybrid_sliding; convert the teacher with hybrid layers")
    if not fitted or not held_out:
        raise ConfigError(
            f"calibration: {len(fitted)} batches to fit and {len(held_out)} held out, expected one of each at least: give more tokens"
        )


def calibrate_model(model, fitted, held_out, report=lambda layer, figures: None):
    """Calibrate a student in memory, in place.

    Args:
        model: `XLSTMHybridForCausalLM`; float32 gives the fit its full precision.
        fitted, held_out: lists of batches of model inputs.
        report: called with each layer's number and figures.
    Returns:
        {layer: {"window", "before", "after", "closed", "heads"}}: relative errors on the held-out batches, and how many
        of the heads have a closed gate.
    Raises:
        ConfigError: a student that cannot be calibrated, or no batches.
    """
    check(model.config, fitted, held_out)
    trunk, training, found = model.model, model.training, {}
    model.eval()
    batches = [{k: x.to(model.device) for k, x in batch.items()} for batch in [*fitted, *held_out]]
    states = [trunk.embed_tokens(batch["input_ids"]).detach() for batch in batches]
    for j in range(len(trunk.layers)):
        if figures := calibrate_layer(trunk, j, states, batches, len(fitted)):
            found[j] = figures
            report(j, figures)
    model.train(training)
    return found


@torch.no_grad()
def calibrate_streamed(
    checkpoint, out, fitted, held_out, device="cpu", work=None, overwrite=False, report=lambda layer, figures: None
):
    """Calibrate a student directory with one layer in memory, in float32; write another one.

    Started again after an interruption, it takes the layers that were finished and goes on. The hidden states of all
    tokens are in memory.

    Args:
        checkpoint: a converted student.  out: directory of the calibrated one; it appears complete or not at all.
        fitted, held_out: lists of batches of model inputs, {"input_ids", ...}.
        device: where the layers are calculated.
        work: directory for finished layers, removed at the end; beside `out` by default.
        report: called with each layer's number and figures.
    Returns:
        as `calibrate_model`.
    Raises:
        ConfigError: a student that cannot be calibrated, no batches, or a work directory of another run.
        CheckpointError, CheckpointWriteError: a damaged checkpoint, or no room for `out`.
    """
    started, checkpoint, out = time.time(), Path(checkpoint), Path(out)
    work = Path(work or out.with_name(f".calibrating-{out.name}"))
    require_intact(checkpoint)
    config, files = XLSTMHybridConfig.from_json_file(checkpoint / "config.json"), weight_files(checkpoint)
    check(config, fitted, held_out)
    needed = sum(path.stat().st_size for path in set(files.values()))
    check_space(out, needed)
    manifest = checkpoint / MANIFEST
    inputs = [{name: x.tolist() for name, x in batch.items()} for batch in [*fitted, *held_out]]
    spec = {"checkpoint": digest(manifest) if manifest.is_file() else weights_hash(checkpoint)}
    spec |= {"text": short_digest(inputs), "fitted": len(fitted)}
    progress = {"format_version": FORMAT_VERSION, "spec": spec, "layers": {}}
    if (work / PROGRESS).is_file():
        progress = read_versioned(work / PROGRESS, work.name)
        if progress["spec"] != spec:
            raise ConfigError(
                f"{work.name} is of a calibration of another student or text: remove it, or write to another directory"
            )
    work.mkdir(parents=True, exist_ok=True)
    batches = [{k: x.to(device) for k, x in batch.items()} for batch in [*fitted, *held_out]]
    table = read_tensor(files, "model.embed_tokens.weight", torch.float32)
    states = [embedded(config, table, batch["input_ids"]).to(device) for batch in batches]
    del table
    trained = {}
    for j in range(config.num_hidden_layers):
        model, file = model_of(config, files, [j], torch.float32).to(device), work / f"layer-{j:04}.safetensors"
        done = progress["layers"].get(str(j))
        if done is None:
            done = {"figures": calibrate_layer(model.model, j, states, batches, len(fitted)), "file": None}
            if done["figures"] is not None:
                write_file(file, save({name: p.cpu().contiguous() for name, p in new_parameters(model).items()}))
                done |= {"file": file.name, "sha256": digest(file)}
            progress["layers"][str(j)] = done
            write_json(work / PROGRESS, progress)
        else:
            model.model.layers[j].aligned = True  # the trunk alone
            for n, batch in enumerate(batches):
                given = {k: x for k, x in batch.items() if k in ("attention_mask", "position_ids")}
                states[n] = model.model.teacher_forced(None, hidden_states=states[n], **given).hidden_states
        if done["figures"] is not None:
            trained |= trained_files(work, [done])
            report(j, done["figures"])
    found = {int(j): done["figures"] for j, done in progress["layers"].items() if done["figures"] is not None}
    with staged(out, overwrite, needed) as folder:
        write_trained(checkpoint, folder, trained, trained_values(config))
        settings = {"tokens": sum(batch["input_ids"].numel() for batch in fitted)}
        settings["held_out_tokens"] = sum(batch["input_ids"].numel() for batch in held_out)
        figures = {"relative_error": [{"layer": j, **values} for j, values in found.items()]}
        seconds = round(time.time() - started, 1)
        add_provenance(folder, "calibrate", parent=checkpoint, config=settings, figures=figures, seconds=seconds)
        write_manifest(folder)
    discard(work)
    return found
