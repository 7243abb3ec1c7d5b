"""What a person steers a run by: metrics that go wherever `report_to` says (TensorBoard, W&B, trackio), and pictures in
the run directory.

`Insight(trainer)` is a callback that adds to what a `Resumable` trainer logs: `tokens_per_second` (of all processes), `memory_gb`
(peak of this process), `layer_<n>/output_gate` (mean over real tokens and heads: 1 is the mLSTM, 0 the window),
`layer_<n>/grad_norm` and `skipped_steps`. At the end of training, and when it saves, the first process draws everything
that was logged into `plots/`.

Dims: B batch, T tokens, H heads.
"""

import io
import math
import re
import resource
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from xlstm_hybrid.checkpoint.files import write_file
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.training.checkpoints import unsharded
from xlstm_hybrid.training.distributed import plain_name

PLOTS = "plots"
FEW, BETWEEN = 10, 60.0  # entries below which there is no curve to look at; seconds between two drawings while training
LAYER = re.compile(r"(?:eval_)?layer_(\d+)/(\w+)")
COSTS = "runtime", "samples_per_second", "steps_per_second"  # of training and of an evaluation
NOT_CURVES = ("step", "epoch", "total_flos", "train_loss", *(f"train_{cost}" for cost in COSTS))
BLUE, ORANGE = "#0072B2", "#E69F00"  # Okabe and Ito's, told apart with every kind of colour vision
HEAT = {  # metric of layers -> title, colours, logarithmic, limits
    "relative_error": ("Relative squared error", "viridis", True, None),
    "output_gate": ("Mean output gate: 1 mLSTM, 0 window attention", "cividis", False, (0, 1)),
    "grad_norm": ("Norm of the gradient", "magma", True, None),
}


# --- metrics ---------------------------------------------------------------------------------------------------


class Readings:
    """Numbers on the device that the host has to see when something is logged, and no sooner: reading them all at once is
    the one time that a log waits.
    """

    def __init__(self):
        self.noted = {"train": [], "eval": []}

    def note(self, mode, values, name):
        """Remember a tensor of any shape; once it is read, `name(its numbers, flat)` gives `{metric: value}`."""
        self.noted[mode].append((values.detach().flatten().double(), name))

    def read(self, mode, metrics):
        """Append what was noted to `metrics`, lists by name."""
        noted, self.noted[mode] = self.noted[mode], []
        numbers = iter(torch.cat([values for values, _ in noted]).tolist() if noted else ())
        for values, name in noted:
            for metric, value in name([next(numbers) for _ in range(len(values))]).items():
                metrics[metric].append(value)


class Insight(TrainerCallback):
    """See the module; `Resumable` adds it.

    Everything but the token count is measured in the steps that are logged, so that the others cost nothing.
    """

    def __init__(self, trainer):
        self.trainer, self.handles, self.tokens, self.since = trainer, [], 0, None
        self.gates, self.watching, self.drawn = defaultdict(lambda: [0.0, 0.0]), False, -math.inf

    def on_train_begin(self, args, state, control, **kwargs):
        self.remove()
        model = self.trainer.model
        self.handles.append(model.register_forward_pre_hook(self.count, with_kwargs=True))
        for module in model.modules():
            if isinstance(module, MLSTMMixer):
                self.handles.append(module.register_forward_hook(self.watch, with_kwargs=True))
        self.tokens, self.since = 0, time.monotonic()

    def remove(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def count(self, model, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if model.training and torch.is_tensor(ids):
            self.tokens += ids.numel()

    @torch.no_grad()
    def watch(self, mixer, args, kwargs, output):
        """Sum of a mixer's output gates [B, T, H] over real tokens."""
        if self.watching:
            gate, real = output[-1].detach(), kwargs["tokens"].real[..., None]
            total = self.gates[mixer.layer_idx]
            total[0] = total[0] + torch.where(real, gate, 0.0).double().sum()
            total[1] = total[1] + real.sum() * gate.shape[-1]

    def will_log(self, args, state):
        """Whether the step that is being made will be logged."""
        following = state.global_step + 1
        return following % max(int(state.logging_steps or 0), 1) == 0 or (following == 1 and args.logging_first_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.watching = self.will_log(args, state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.watching = False
        if not self.will_log(args, state):
            return
        values = {f"layer_{layer}/grad_norm": norm.double() for layer, norm in self.gradient_norms().items()}
        for layer, (total, count) in sorted(self.gates.items()):
            both = torch.stack([torch.as_tensor(total).double(), torch.as_tensor(count).double()]).to(args.device)
            if args.world_size > 1:
                torch.distributed.all_reduce(both)
            values[f"layer_{layer}/output_gate"] = both[0] / both[1].clamp_min(1)
        self.gates.clear()
        if values:
            both = torch.stack([x.to(args.device) for x in values.values()])
            self.trainer.readings.note("train", both, lambda numbers: dict(zip(values, numbers, strict=True)))

    @torch.no_grad()
    def gradient_norms(self):
        """`{layer: norm}` of the gradients of a layer's trained parameters, as tensors."""
        squares = defaultdict(list)
        for name, parameter in self.trainer.model.named_parameters():
            match = re.search(r"\blayers\.(\d+)\.", plain_name(name))
            if match and parameter.grad is not None:
                squares[int(match[1])].append(unsharded(parameter.grad.norm()).double().square())
        return {layer: torch.stack(parts).sum().sqrt() for layer, parts in sorted(squares.items())}

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_log:
            return
        metrics, now = self.trainer._metrics["train"], time.monotonic()
        metrics["tokens_per_second"].append(self.tokens * args.world_size / max(now - self.since, 1e-9))
        if args.device.type == "cuda":  # the allocator's peak, otherwise the process's
            peak = torch.cuda.max_memory_allocated(args.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        metrics["memory_gb"].append(peak / 1e9)
        metrics["skipped_steps"].append(float(self.trainer.guard.skipped if hasattr(self.trainer, "guard") else 0))
        self.tokens, self.since = 0, now

    def on_save(self, args, state, control, **kwargs):
        if time.monotonic() - self.drawn > BETWEEN:
            self.draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()
        self.draw(args, state)

    def draw(self, args, state):
        if state.is_world_process_zero and sum("loss" in entry for entry in state.log_history) >= FEW:
            write_plots(Path(args.output_dir) / PLOTS, state.log_history)
        self.drawn = time.monotonic()


# --- pictures --------------------------------------------------------------------------------------------------


def as_float(value):
    """A logged value as a float; nan where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def curves(log):
    """`{metric: ([steps], [values])}` of everything logged but what belongs to one layer."""
    series = defaultdict(lambda: ([], []))
    for entry in log:
        for name, value in entry.items():
            left_out = name in NOT_CURVES or LAYER.fullmatch(name) or name.startswith("eval_")
            if not left_out and not math.isnan(as_float(value)):
                series[name][0].append(entry["step"])
                series[name][1].append(as_float(value))
    return dict(series)


def evaluations(log):
    """`{metric: ([steps], [values])}` of `eval_<metric>`, without what it cost."""
    own = [{n.removeprefix("eval_"): x for n, x in entry.items() if n[:5] == "eval_" or n == "step"} for entry in log]
    return {name: series for name, series in curves(own).items() if name not in COSTS}


def layer_grids(log):
    """`{metric: ([steps], [layers], rows)}`: rows[layer, step] of what is logged per layer, nan where it is missing."""
    values = defaultdict(dict)
    for entry in log:
        for name, value in entry.items():
            if (match := LAYER.fullmatch(name)) and not name.startswith("eval_"):
                values[match[2]].setdefault(int(match[1]), {})[entry["step"]] = as_float(value)
    grids = {}
    for metric, by_layer in values.items():
        layers, steps = sorted(by_layer), sorted({step for logged in by_layer.values() for step in logged})
        grids[metric] = steps, layers, [[by_layer[n].get(step, math.nan) for step in steps] for n in layers]
    return grids


def write_plots(directory, log):
    """Draw a trainer's `log_history`: `curves.png`, and `layers_<metric>.png` with a heat map and a curve per layer.

    Returns:
        Names of the files; none for an empty log.
    Raises:
        CheckpointWriteError: the disk refused.
    """
    series, measured, pictures = curves(log), evaluations(log), {}
    if names := sorted({*series, *measured}):
        draws = [partial(draw_curve, name=n, series=series.get(n), measured=measured.get(n)) for n in names]
        pictures["curves"] = png_of(draws, columns=3)
    for metric, (steps, layers, rows) in layer_grids(log).items():
        grid = {"metric": metric, "steps": steps, "layers": layers, "rows": rows}
        draws = [partial(draw_heat, **grid), partial(draw_layers, **grid)]
        pictures[f"layers_{metric}"] = png_of(draws, columns=2, width=6)
    if pictures:
        Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_file(Path(directory) / f"{name}.png", content)
    return sorted(f"{name}.png" for name in pictures)


def png_of(draws, columns, width=4.2, height=2.8):
    """PNG bytes of a figure with one pair of axes per function; without a display, and without touching pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(draws))
    rows = -(-len(draws) // columns)
    x, y = columns * width, rows * height  # inches
    figure = Figure(figsize=(x, y), dpi=100)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.6 / x, 0.5 / y, 1 - 0.2 / x, 1 - 0.35 / y, 0.22, 0.42)
    for n, draw in enumerate(draws):
        draw(figure.add_subplot(rows, columns, n + 1))
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def over_steps(axes, title):
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)


def draw_curve(axes, name, series, measured):
    for points, label, colour, marker in ((series, "training", BLUE, None), (measured, "evaluation", ORANGE, "o")):
        if points:
            marker = marker or ("o" if len(points[0]) < 3 else None)
            axes.plot(*points, label=label, color=colour, marker=marker, linewidth=1.6)
    over_steps(axes, name.replace("_", " "))
    if series and measured:
        axes.legend(frameon=False)


def look_of(metric):
    return HEAT.get(metric, (metric.replace("_", " "), "viridis", False, None))


def positive(rows):
    return [value for row in rows for value in row if value > 0 and math.isfinite(value)]


def draw_heat(axes, metric, steps, layers, rows):
    """Layers over steps; a colour bar says what the colours mean, missing values are grey."""
    from matplotlib.colors import LogNorm, Normalize

    title, colours, logarithmic, limits = look_of(metric)
    norm, values = Normalize(*(limits or (None, None))), positive(rows)
    if logarithmic and values and min(values) < max(values):
        norm = LogNorm(min(values), max(values))
    masked = [[x if math.isfinite(x) and (not logarithmic or x > 0) else math.nan for x in row] for row in rows]
    edges = [n - 0.5 for n in range(len(steps) + 1)]
    mesh = axes.pcolormesh(edges, [n - 0.5 for n in range(len(layers) + 1)], masked, cmap=colours, norm=norm)
    axes.set_facecolor("#cccccc")
    for ticks, names, most in (axes.set_xticks, steps, 8), (axes.set_yticks, layers, 12):
        shown = range(0, len(names), max(1, len(names) // most))
        ticks(list(shown), [str(names[n]) for n in shown])
    axes.set(xlabel="step", ylabel="layer")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.figure.colorbar(mesh, ax=axes)


def draw_layers(axes, metric, steps, layers, rows):
    """One curve per layer, from dark (the first) to light."""
    from matplotlib import colormaps

    title, colours, logarithmic, limits = look_of(metric)
    for n, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        colour, marker = colormaps[colours](0.05 + 0.8 * n / max(len(layers) - 1, 1)), "o" if len(steps) < 3 else None
        axes.plot(steps, row, color=colour, label=f"layer {layer}", linewidth=1.4, marker=marker)
    if logarithmic and positive(rows):
        axes.set_yscale("log")
    if limits:
        axes.set_ylim(*limits)
    over_steps(axes, title)
    if len(layers) <= 8:
        axes.legend(frameon=False, fontsize=8)
