"""Delta-distillation: cross-entropy, softened KL and the teacher's mean hidden state, with weights that fall
(Thiombiano et al. 2025).

Dims: B batch, T tokens, D hidden size of both models; N scored tokens.
"""

import warnings
from dataclasses import dataclass, field
from functools import partial

import torch
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid.data.vocabulary import shared_size
from xlstm_hybrid.distil_xlstm import schedules
from xlstm_hybrid.distil_xlstm.schedules import DeltaSchedule, set_objective
from xlstm_hybrid.environment.precision import settle_bf16
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.state import weights_digest
from xlstm_hybrid.training.distillation import INPUTS, check_pair
from xlstm_hybrid.training.distributed import prepare_teacher
from xlstm_hybrid.training.lm_head import Objective, attach, check_head, head_of
from xlstm_hybrid.training.losses import IGNORE
from xlstm_hybrid.training.resume import Resumable


@dataclass
class DeltaKDConfig(SFTConfig):
    """Arguments of `DeltaKDTrainer`; the defaults are the paper's. Fields without help here are those of
    `schedules.DeltaSchedule`.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1: a share of all steps."})
    alpha_start: float = field(default=0.8, metadata={"help": "Weight of KL at the start of the first epoch."})
    alpha_end: float = field(default=0.5, metadata={"help": "Weight that KL falls to."})
    temperature_start: float = field(default=2.0, metadata={"help": "Temperature of KL as the first epoch starts."})
    temperature_end: float = field(default=1.0, metadata={"help": "Temperature that it falls to."})
    frobenius_weight: float = field(default=0.1, metadata={"help": "Weight of the hidden states' distance (beta)."})
    delta: float = field(default=0.05, metadata={"help": "What both starts lose with each epoch."})

    def __post_init__(self):
        settle_bf16(self)
        super().__post_init__()
        self.schedule  # noqa: B018 (raises for what is out of range)
        unused = {"loss_type": "nll", "label_smoothing_factor": 0.0, "router_aux_loss_coef": None}
        unused |= dict.fromkeys(("packing", "padding_free", "push_to_hub", "use_liger_kernel"), False)
        for name, neutral in unused.items():
            if (value := getattr(self, name)) != neutral:
                raise ConfigError(f"{name}={value!r} has no place in this trainer: leave it at {neutral!r}")

    @property
    def schedule(self):
        return DeltaSchedule(**{name: getattr(self, name) for name in DeltaSchedule.__dataclass_fields__})


class DeltaKDTrainer(Resumable, SFTTrainer):
    """Distils `teacher` into a student of the same hidden size, usually one with fewer layers.

    Rows are those of `SparseKDTrainer`; all three terms run over its scored tokens. CE and KL add up over micro-batches
    to those of the step; the Frobenius term is a root of a mean, and a step has the mean of its micro-batches' terms,
    weighted by tokens. Logs `ce`, `kl`, `frobenius`, `top1_agreement`, and the schedule: `alpha`, `temperature`.

    Args:
        model, teacher, args (`DeltaKDConfig`), teacher_tokenizer, kwargs: as in `SparseKDTrainer`; the teacher is a
            model in memory.
    Raises:
        ConfigError: vocabularies or hidden sizes that differ, or shared weights (a frozen embedding has to be a copy).
        DataError: a step without a scored token. What `resume.Resumable` says of checkpoints and losses holds as well.
    """

    _tag_names = ["xlstm-hybrid", "delta-kd"]
    _name = "Delta-distillation"
    loss_is_scaled_for_ga = True  # divided by the scored tokens of the whole step

    def __init__(self, model, teacher, args=None, teacher_tokenizer=None, **kwargs):
        if not isinstance(args, DeltaKDConfig) or kwargs.get("compute_loss_func"):
            raise ConfigError(
                f"args={type(args).__name__}: expected a DeltaKDConfig, and no compute_loss_func, which this trainer would not call"
            )
        check_pair(model, teacher)
        ours, theirs = (m.config.get_text_config() for m in (model, teacher))
        if ours.hidden_size != theirs.hidden_size:
            raise ConfigError(
                f"the student's hidden size is {ours.hidden_size}, the teacher's {theirs.hidden_size}: they are compared, "
                "build a student of the teacher's width"
            )
        tokenizers = () if teacher_tokenizer is None else (kwargs.get("processing_class"), teacher_tokenizer)
        self.size = shared_size(ours.vocab_size, theirs.vocab_size, *tokenizers)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_forward = vars(base).get("forward")
        super().__init__(model=model, args=args, **kwargs)
        vars(base).pop("forward", None)  # TRL's fused LM head
        if own_forward is not None:
            base.forward = own_forward
        for name, network in ("student", base), ("teacher", teacher.to(self.accelerator.device)):
            attach(network)
            check_head(network, name)
        self.teacher_digest = weights_digest(teacher)
        self.teacher = prepare_teacher(self, teacher)
        # count the scored tokens of a step, shifted, for any model class
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.objective, self.frobenius_weight = Objective(1.0, 0.0, "forward_kl", "dense"), 0.0
        set_objective(self, schedules.delta_schedule(args.schedule, 0))
        self.add_callback(schedules.DeltaCallback(args.schedule, partial(set_objective, self)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        seen = self.look(inputs)
        if not len(seen.place) and num_items_in_batch is not None and num_items_in_batch == 0:
            raise DataError(
                f"step {self.state.global_step} has no scored token, every label is {IGNORE}: drop such rows (`document_dataset` does)"
            )
        forward, labels = seen.forwarded(inputs, INPUTS), inputs["labels"]
        scored = torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))
        place = seen.place.to(labels.device, non_blocking=True)
        labels, count = labels.flatten()[place + 1], len(place)
        items = labels.new_tensor(max(count, 1)) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            out = self.teacher.eval()(**forward, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        with torch.no_grad():
            mean, last = schedules.mean_hidden(out.hidden_states), out.hidden_states[-1]  # [B, T, D] each

        def score(hidden, student):
            hidden = hidden[:, -scored.shape[1] :]  # prompt tuning puts virtual tokens in front
            targets, head = (last.flatten(0, 1)[place],), head_of(self.teacher, self.size)
            terms = self.objective(hidden, student, place, labels, targets, items, size=self.size, teacher_head=head)
            return terms, schedules.frobenius(hidden, mean, scored)

        terms, distance = model(**forward, use_cache=False, with_head=score)
        loss = terms.loss + self.frobenius_weight * distance * count / items
        self.record(terms, distance, count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the count is of all ranks, gradients are averaged over them
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**forward, use_cache=False)

    @torch.no_grad()
    def record(self, terms, distance, count):
        sums = [x.detach().float() for x in (terms.ce, terms.kl, terms.agreement, distance * count)]
        everywhere = self.accelerator.gather(torch.stack([*sums, torch.full_like(sums[0], count)]))
        schedule = {"alpha": self.objective.kl_weight, "temperature": self.objective.temperature}
        name = partial(self.means, schedule, self.state.global_step)
        self.readings.note("train" if self.model.training else "eval", everywhere.view(-1, 5).sum(0), name)

    def means(self, schedule, step, sums):
        """`{metric: value}` of a micro-batch's sums and their count, with what the schedule said in its step."""
        *sums, total = sums
        if not total:
            warnings.warn(f"step {step}: a micro-batch without a scored token", stacklevel=2)
            return {}
        names = "ce", "kl", "top1_agreement", "frobenius"
        return {name: value / total for name, value in zip(names, sums, strict=True)} | schedule

    def run_facts(self):
        """For `Resumable`: a run with another teacher is another run."""
        return {"teacher": self.teacher_digest}
