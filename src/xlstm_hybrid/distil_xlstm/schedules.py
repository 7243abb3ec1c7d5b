"""Weights of a loss that change while a model trains: the schedule of Delta-distillation (Thiombiano et al. 2025, arXiv
2503.18565).

    L_k = (1 - alpha_k - beta) CE + alpha_k T_k^2 KL(teacher || student at T_k) + beta |mean_l h_T - h_S|_F /
    sqrt(numel)
    v_k = v_end + (v_start - v_end) / (1 + ln(1 + k))          for v = alpha and v = T

k counts the steps of an epoch. After each epoch v_start falls by Delta, to v_end at the lowest.
`losses.distillation_loss` multiplies by T^2.
Dims: B batch, T tokens, D hidden size.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from transformers import TrainerCallback

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.training.losses import at_least_float32, expect_shape


@dataclass(frozen=True)
class DeltaSchedule:
    """Start and end of alpha and of the temperature, their fall per epoch (delta) and the weight beta. The defaults are
    the paper's.

    Raises:
        ConfigError: a value out of range, a start below its end, or weights that leave less than nothing for
            cross-entropy.
    """

    alpha_start: float = 0.8
    alpha_end: float = 0.5
    temperature_start: float = 2.0
    temperature_end: float = 1.0
    frobenius_weight: float = 0.1
    delta: float = 0.05

    def __post_init__(self):
        if not 0 <= self.alpha_end <= self.alpha_start <= 1:
            raise ConfigError(
                f"alpha_start={self.alpha_start}, alpha_end={self.alpha_end}: expected shares, the end not above the start"
            )
        if not 0 < self.temperature_end <= self.temperature_start < math.inf:
            raise ConfigError(
                f"temperature_start={self.temperature_start}, temperature_end={self.temperature_end}: expected finite numbers above 0, "
                "the end not above the start"
            )
        if not (self.delta >= 0 and self.frobenius_weight >= 0):
            raise ConfigError(f"delta={self.delta}, frobenius_weight={self.frobenius_weight}: expected at least 0")
        if self.alpha_start + self.frobenius_weight > 1 + 1e-9:
            raise ConfigError(
                f"alpha_start={self.alpha_start} and frobenius_weight={self.frobenius_weight} add up to more than 1, nothing is left "
                "for cross-entropy: lower one of them"
            )


class Weights(NamedTuple):
    """Of one step; named like the fields of `training.lm_head.Objective`."""

    ce_weight: float
    kl_weight: float
    temperature: float
    frobenius_weight: float


def fall(start, end, k):
    """v_k: `start` at step 0, towards `end` by the logarithm of the steps, which never gets there."""
    return end + (start - end) / (1 + math.log1p(k))


def delta_schedule(schedule, step, epoch=0):
    """`Weights` of a `DeltaSchedule` at a step of an epoch, both counted from 0; ConfigError for a negative one."""
    if step < 0 or epoch < 0:
        raise ConfigError(f"step={step}, epoch={epoch}: expected at least 0 of both")
    s = schedule
    alpha = fall(max(s.alpha_start - epoch * s.delta, s.alpha_end), s.alpha_end, step)
    temperature = fall(max(s.temperature_start - epoch * s.delta, s.temperature_end), s.temperature_end, step)
    return Weights(max(1 - alpha - s.frobenius_weight, 0.0), alpha, temperature, s.frobenius_weight)


def steps_per_epoch(dataloader, accumulation, max_steps):
    """Optimizer steps in an epoch of a Trainer; a stream without a length is one epoch of `max_steps`."""
    try:
        return max(math.ceil(len(dataloader) / accumulation), 1)
    except TypeError:
        return max_steps


class DeltaCallback(TrainerCallback):
    """Hands the weights of a `DeltaSchedule` to a trainer before each step begins.

    The step follows from `state.global_step`, so a resumed run goes on where the other stopped.

    Args:
        set_weights: function of `Weights` that makes the trainer's next losses use them, for instance
            `partial(set_objective, trainer)`.
    """

    def __init__(self, schedule, set_weights):
        self.schedule, self.set_weights = schedule, set_weights

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        length = steps_per_epoch(train_dataloader, args.gradient_accumulation_steps, state.max_steps)
        epoch, step = divmod(state.global_step, length)
        self.set_weights(delta_schedule(self.schedule, step, epoch))


def set_objective(trainer, weights):
    """`set_weights` of a trainer with an `objective` (`SparseKDTrainer`, `OnPolicyKDTrainer`, `DeltaKDTrainer`).

    Fields that a trainer's loss does not have are left out: only `DeltaKDTrainer` has a `frobenius_weight`. Where
    targets are made online (`select`), they follow the temperature.

    Raises:
        ConfigError: the targets come from a store, whose temperature cannot change.
    """
    if getattr(trainer, "store", None) is not None:
        raise ConfigError(
            "the teacher's targets are stored at one temperature, the schedule changes it: use an online teacher"
        )
    for part in ("objective", "select"):
        if (old := getattr(trainer, part, None)) is not None:
            names = {field.name for field in fields(old)} & set(weights._fields)
            setattr(trainer, part, replace(old, **{name: getattr(weights, name) for name in names}))
    if hasattr(trainer, "frobenius_weight"):
        trainer.frobenius_weight = weights.frobenius_weight


# --- the third term ----------------------------------------------------------------------------------------------


def frobenius(student_hidden, teacher_hidden, mask):
    """Root mean square of the difference over counted tokens: the masked form of |h_T - h_S|_F / sqrt(numel),
    Thiombiano et al. 2025.

    Args:
        student_hidden, teacher_hidden: [B, T, D]; of the teacher usually `mean_hidden`. Rows that do not count may hold
            anything.
        mask: [B, T], True where a token counts.
    Returns:
        Scalar; 0 with a zero gradient where the two are equal or nothing counts. It is a root of a mean, hence it does
        not add up over parts of a batch.
    """
    expect_shape("teacher_hidden", teacher_hidden, student_hidden.shape)
    expect_shape("mask", mask, student_hidden.shape[:-1])
    difference = at_least_float32(teacher_hidden) - at_least_float32(student_hidden)
    square = torch.where(mask[..., None], difference, 0.0).square().sum()
    square = square / (mask.sum().clamp_min(1) * student_hidden.shape[-1])
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())  # the root has no gradient at 0


def mean_hidden(hidden_states):
    """Mean over layers, [B, T, D], of a model's `hidden_states`, without the first, which is the embedding."""
    if len(hidden_states) < 2:
        raise DataError(
            f"hidden_states: {len(hidden_states)} tensors, expected the embedding's output and at least one layer's"
        )
    return sum(at_least_float32(h) for h in hidden_states[1:]) / (len(hidden_states) - 1)
