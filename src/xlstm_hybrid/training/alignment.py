"""Stage I: layer-wise alignment. Each hybrid mixer learns to give what the attention it replaces gives.

Teacher-forced: every layer sees the teacher's hidden states, so the layers are independent, and teacher and student
share one trunk: the student's own frozen weights are the teacher's. Only the new parameters (feature maps and gates)
are trained.

Dims: B batch, T tokens, D hidden size, H heads, V value dim, L layers, N counted tokens.
"""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.environment.precision import settle_bf16
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.layers import HybridDecoderLayer
from xlstm_hybrid.model.mixer import MLSTMMixer
from xlstm_hybrid.training import option
from xlstm_hybrid.training.resume import Resumable

TRUNK_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx", "hidden_states")


@dataclass
class AlignmentConfig(SFTConfig):
    """Arguments of `AlignmentTrainer`; as in the paper: AdamW, 1e-2 decaying by a cosine, no gradient clipping."""

    learning_rate: float = option(1e-2, "Peak learning rate of the new parameters.")
    lr_scheduler_type: str = option("cosine_with_min_lr", "Schedule after the warm-up.")
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr": 1e-5}, metadata={"help": "The floor of the cosine."}
    )
    weight_decay: float = option(0.1, "Of AdamW.")
    max_grad_norm: float = option(0.0, "Must stay 0: a global clip would couple the layers.")
    gradient_checkpointing: bool = option(False, "Of no use here: the trunk keeps no activations.")
    loss_form: str = option(
        "sum",
        "'sum': squared error per token, summed over layers; 'relative': each layer's error over the mean squared norm "
        "of its target, measured once on the first micro-batch.",
    )
    cosine_weight: float = option(
        0.0, "Weight of 1 - cosine of the attention outputs (after W_o), per token and layer."
    )
    frobenius_weight: float = option(
        0.0, "Weight of the norm of the attention outputs' difference over sqrt(D), per token and layer."
    )
    stop_error: float = option(0.0, "A layer stops when its relative error over a window is below this; 0: never.")
    stop_patience: int = option(0, "A layer stops after so many windows without a gain of stop_gain; 0: never.")
    stop_gain: float = option(0.01, "Share by which a window's relative error must beat the best one before.")
    stop_window: int = option(25, "Steps per window of early stopping.")
    layers_at_a_time: int = option(0, "Layers per group of `align_streamed`; 0: all at once, in memory.")
    max_skipped_steps: int = option(3, "Steps in a row that are not finite, after which the run ends.")
    allow_changes: list[str] | None = option(None, "Fields of the run spec that may differ at resume.")

    def __post_init__(self):
        settle_bf16(self)
        super().__post_init__()
        if self.max_grad_norm:
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm}: alignment needs 0, a global clip would couple layers that are independent: leave it out"
            )
        if self.loss_form not in ("sum", "relative"):
            raise ConfigError(f"loss_form={self.loss_form!r}: expected 'sum' or 'relative'")
        least_0 = "cosine_weight", "frobenius_weight", "stop_error", "stop_patience", "stop_gain", "layers_at_a_time"
        for name in least_0:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a finite number of at least 0")
        if self.stop_window < 1:
            raise ConfigError(f"stop_window={self.stop_window}: expected at least 1 step")
        unused = {"loss_type": "nll", "label_smoothing_factor": 0.0, "router_aux_loss_coef": None}
        unused |= {"assistant_only_loss": False, "completion_only_loss": None, "use_liger_kernel": False}
        for name, neutral in unused.items():
            if (value := getattr(self, name)) not in (neutral, False):
                raise ConfigError(
                    f"{name}={value!r} has no place in alignment, where every real token counts: leave it at {neutral!r}"
                )


def new_parameters(model):
    """`{name: parameter}` of everything that conversion added to the teacher."""
    mixers = {name for name, module in model.named_modules() if isinstance(module, MLSTMMixer)}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in mixers}


# --- the trainer -----------------------------------------------------------------------------------------------


class AlignmentTrainer(Resumable, SFTTrainer):
    """Minimises the distance between each mixer and the teacher's attention, per counted token, summed over layers.

    A token counts unless it is padding. The divisor is the number of counted tokens of the whole step, over
    micro-batches and processes. Logs, per layer and over the steps between two logs, `layer_<n>/relative_error`:
    squared error as a share of the squared norm of the target. A layer that has stopped early (`stop_error`,
    `stop_patience`) keeps its last error in the log, and the others do not notice.

    Raises:
        ConfigError: the model has no hybrid layer, or is one of PEFT; `layers_at_a_time` asks for
            `alignment_by_groups.align_streamed`; or an argument that would need logits or labels.
    """

    _tag_names = ["xlstm-hybrid", "alignment"]
    _name = "Layer-wise alignment"
    loss_is_scaled_for_ga = True  # divided by the counted tokens of the whole step

    def __init__(self, model, args=None, **kwargs):
        if kwargs.get("peft_config") is not None or hasattr(model, "get_base_model"):
            raise ConfigError(
                "alignment trains what conversion added, and no adapter: pass the student itself, and adapters to stage II"
            )
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"{name}: alignment makes no logits and would not call it; leave it out")
        trained = new_parameters(model)
        if not trained:
            raise ConfigError(
                "nothing to align: no layer of the model is hybrid_sliding; convert the teacher with hybrid layers"
            )
        if model.config.mixer_branches == "window":
            raise ConfigError(
                "nothing to align: mixer_branches='window' leaves the new parameters out; go on with stage II"
            )
        if getattr(args, "layers_at_a_time", 0) and model.streamed_layers is None:
            raise ConfigError(
                f"layers_at_a_time={args.layers_at_a_time}: call alignment_by_groups.align_streamed(checkpoint, ...), which loads so many at a time"
            )
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        super().__init__(model=model, args=args, **kwargs)
        vars(model).pop("forward", None)  # TRL's fused LM head: stage I has no use for logits
        layers = enumerate(model.model.layers)
        self.layers = {n: x for n, x in layers if isinstance(x, HybridDecoderLayer) and hasattr(x.self_attn, "mlstm")}
        self.scales, self.sums, self.window, self.best, self.waited, self.stopped = None, {}, None, {}, {}, {}

    # --- loss --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counted tokens of the step, over micro-batches and processes: those that `teacher_forced` counts."""
        count = 0
        for batch in batch_samples:
            mask = batch.get("attention_mask")
            count = count + (batch["input_ids"].numel() if mask is None else mask.ne(0).sum())
        return self.over_processes(torch.as_tensor(count, device=device).to(torch.get_default_dtype(), copy=True))

    def over_processes(self, x):
        """The sum of a tensor over all processes."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(x)
        return x

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = bool(self.args.cosine_weight or self.args.frobenius_weight)
        seen = self.look(inputs)
        out = model(**seen.forwarded(inputs, TRUNK_INPUTS), teacher_forced=True, terms=terms, onward=False)
        self.record(out)
        error, cosine, frobenius = out.sums[:, 0], out.sums[:, 2], out.sums[:, 3]
        if self.args.loss_form == "relative":
            error = error / self.target_scales(out)
        total = error.sum() + self.args.cosine_weight * cosine.sum() + self.args.frobenius_weight * frobenius.sum()
        # gradients are averaged over processes
        count = out.num_items if num_items_in_batch is None else num_items_in_batch / self.args.world_size
        loss = total / torch.where(count > 0, count, 1)
        return (loss, out) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss only: there are no logits."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def predict(self, *args, **kwargs):
        output = super().predict(*args, **kwargs)
        self.sums.pop("eval", None)  # as in `Resumable`
        return output

    @torch.no_grad()
    def target_scales(self, out):
        """[L] mean squared norm of a target per token, of the run's first micro-batch; 1 where there is none."""
        if self.scales is None:
            target, count = self.over_processes(out.target.detach().clone()), self.over_processes(out.num_items.float())
            scales = target / count.clamp_min(1)
            self.scales = torch.where(scales > 0, scales, 1.0)
        return self.scales

    # --- curves and early stop ---------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, out):
        """Add the layers' sums to those of the mode and of the window; nothing waits for the device."""
        mode, sums = "train" if self.model.training else "eval", out.sums.detach().double()
        self.sums[mode] = self.sums[mode] + sums if mode in self.sums else sums
        if mode == "train":
            self.window = sums if self.window is None else self.window + sums

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        sums = self.sums.pop(mode, None)
        if sums is not None:
            self.readings.note(mode, self.over_processes(sums)[:, :2], self.errors)
            self._metrics[mode]["layers_stopped"].append(float(len(self.stopped)))
        super().log(logs, start_time)

    def errors(self, sums):
        """`{metric: value}` of the layers' (squared errors, squared norms of targets), one layer after the other."""
        errors = {n: sums[2 * n] / sums[2 * n + 1] for n in self.layers if sums[2 * n + 1] > 0} | self.stopped
        return {f"layer_{n}/relative_error": value for n, value in sorted(errors.items())}

    def _get_grad_norm(self, model, grad_norm=None):
        """Where every gradient is there and no parameter has moved yet: a stopped layer gets none."""
        for n in self.stopped:
            for parameter in self.layers[n].self_attn.mlstm.parameters():
                parameter.grad = None
        self.end_window()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def end_window(self):
        """After each `stop_window` steps, stop the layers that are good enough or no longer improve."""
        asked = self.args.stop_error or self.args.stop_patience
        if not asked or (self.state.global_step + 1) % self.args.stop_window:
            return
        sums, self.window = self.over_processes(self.window.clone()).tolist(), None
        for n in self.layers:
            if n in self.stopped or sums[n][1] <= 0:
                continue
            error = sums[n][0] / sums[n][1]
            gained = error < self.best.get(n, float("inf")) * (1 - self.args.stop_gain)
            self.best[n], self.waited[n] = (error, 0) if gained else (self.best[n], self.waited.get(n, 0) + 1)
            if error < self.args.stop_error or 0 < self.args.stop_patience <= self.waited[n]:
                self.stop(n, error)
        if len(self.stopped) == len(self.layers):
            self.control.should_training_stop = True  # nothing is left to learn

    def stop(self, n, error):
        self.stopped[n] = error
        if self.args.world_size == 1:  # DDP and FSDP2 wait for the gradients of every parameter
            self.layers[n].aligned = True

    def resume_state(self):
        """What the run has to remember beyond weights and optimiser; `window` is that of this process."""
        scales = None if self.scales is None else self.scales.tolist()
        window = None if self.window is None else self.over_processes(self.window.clone()).tolist()
        return {"scales": scales, "window": window, "best": self.best, "waited": self.waited, "stopped": self.stopped}

    def load_resume_state(self, saved):
        device, first = self.args.device, self.args.process_index == 0
        dtype = torch.promote_types(next(iter(new_parameters(self.model).values())).dtype, torch.float32)
        scales, window = saved["scales"], saved["window"]
        self.scales = None if scales is None else torch.tensor(scales, device=device, dtype=dtype)
        self.window = None if window is None else torch.tensor(window, device=device, dtype=torch.float64) * first
        by_layer = ({int(n): x for n, x in saved[name].items()} for name in ("best", "waited", "stopped"))
        self.best, self.waited, stopped = by_layer
        for n, error in stopped.items():
            self.stop(n, error)


@torch.no_grad()
def measure_alignment(model, batches):
    """Relative error per hybrid layer over `batches` of model inputs; `{layer: error}`, in the order of the layers."""
    error = target = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for batch in batches:
        out = model(**{k: v.to(model.device) for k, v in batch.items()}, teacher_forced=True)
        error, target = error + out.error.cpu().double(), target + out.target.cpu().double()
    return {n: (e / t).item() for n, (e, t) in enumerate(zip(error, target, strict=True)) if t > 0}
