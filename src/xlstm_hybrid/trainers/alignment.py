"""Stage I: layer-wise alignment. Each hybrid mixer learns to give what the attention it replaces gives (METHOD 1.2).

Teacher-forced: every layer sees the teacher's hidden states, so the layers are independent, and teacher and student share one trunk:
the student's own frozen weights are the teacher's. Only the new parameters (feature maps and gates) are trained.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.modeling import MLSTMMixer
from xlstm_hybrid.trainers import save_weights


@dataclass
class AlignmentConfig(SFTConfig):
    """Arguments of `AlignmentTrainer`. Defaults follow the paper: AdamW with weight decay, 1e-2 decaying by a cosine, no gradient clipping."""

    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of the new parameters."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule after the warm-up."})
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr": 1e-5}, metadata={"help": "The floor of the cosine."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: a global clip would couple the layers."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Of no use here: the trunk keeps no activations."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_grad_norm:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm}: alignment needs 0, a global clip would couple layers that are independent")


def new_parameters(model):
    """`{name: parameter}` of everything that conversion added to the teacher."""
    mixers = {name for name, module in model.named_modules() if isinstance(module, MLSTMMixer)}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in mixers}


class AlignmentTrainer(SFTTrainer):
    """Minimises the squared distance between each mixer and the teacher's attention, per counted token, summed over layers.

    Logs `layer_<n>/relative_error`: squared error as a share of the squared norm of the target.

    Raises:
        ConfigError: the model has no hybrid layer.
        DataError: a step's loss is not finite.
    """

    _tag_names = ["xlstm-hybrid", "alignment"]
    _name = "Layer-wise alignment"

    def __init__(self, model, args=None, **kwargs):
        if not new_parameters(model):
            raise ConfigError("nothing to align: no layer of the model is hybrid_sliding; convert the teacher with hybrid layers")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in new_parameters(model).values():
            parameter.requires_grad_(True)
        super().__init__(model=model, args=args, **kwargs)
        vars(model).pop("forward", None)  # TRL's fused LM head: stage I has no use for logits
        self.model_accepts_loss_kwargs = False  # the loss is a mean per token of the micro-batch; the Trainer averages over accumulation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx")
        out = model(**{k: v for k, v in inputs.items() if k in known}, teacher_forced=True)
        loss = out.loss / out.num_items.clamp_min(1)
        if not torch.isfinite(loss):
            raise DataError(f"alignment loss is {loss.item()} at step {self.state.global_step}: lower learning_rate or check the data for empty rows")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in relative_errors(out).items():
            metrics[name].append(value)
        return (loss, out) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        save_weights(self, output_dir, state_dict)

    def create_model_card(self, *args, **kwargs):
        """None here: the card is printed from the provenance of a finished student."""

    def _send_telemetry(self):
        """None: training calls nobody."""


def relative_errors(out):
    """`{"layer_<n>/relative_error": squared error / squared target}` of an `AlignmentOutput`, hybrid layers only."""
    return {f"layer_{n}/relative_error": (e / t).item() for n, (e, t) in enumerate(zip(out.error, out.target, strict=True)) if t > 0}


@torch.no_grad()
def measure_alignment(model, batches):
    """Relative error per hybrid layer over `batches` of model inputs; `{layer: error}`, in the order of the layers."""
    error, target = defaultdict(float), defaultdict(float)
    for batch in batches:
        out = model(**{k: v.to(model.device) for k, v in batch.items()}, teacher_forced=True)
        for n, (e, t) in enumerate(zip(out.error.tolist(), out.target.tolist(), strict=True)):
            error[n] += e
            target[n] += t
    return {n: error[n] / target[n] for n in error if target[n] > 0}
