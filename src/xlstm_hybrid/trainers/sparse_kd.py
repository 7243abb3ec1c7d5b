"""Stage II: sparse knowledge distillation. gamma CE + beta KL to the teacher's k most likely tokens and a bucket for the rest (METHOD 1.3)."""
import warnings
from dataclasses import dataclass, field
from itertools import islice

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.losses import IGNORE, cross_entropy, shift, sparse_kl, top_k_targets
from xlstm_hybrid.trainers import save_weights

# What a batch may bring for the forward of both models; the rest of the names is how padding-free batches mark documents.
INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
LOW_MASS = 0.9  # share of the teacher's probability below which the kept tokens are too few


@dataclass
class SparseKDConfig(SFTConfig):
    """Arguments of `SparseKDTrainer`; the defaults are the paper's."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate after the warm-up."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Schedule: re-warmed, then constant."})
    ce_weight: float = field(default=0.9, metadata={"help": "Weight of cross-entropy on the labels (gamma)."})
    kl_weight: float = field(default=0.1, metadata={"help": "Weight of the divergence from the teacher (beta)."})
    top_k: int = field(default=256, metadata={"help": "Teacher tokens kept per position; the rest is one bucket."})

    def __post_init__(self):
        super().__post_init__()
        if not (min(self.ce_weight, self.kl_weight) >= 0 and 0 < self.ce_weight + self.kl_weight < float("inf")):
            raise ConfigError(f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}: expected finite weights of at least 0 that are not both 0")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected at least 1 teacher token per position")
        unused = {"loss_type": "nll", "label_smoothing_factor": 0.0, "router_aux_loss_coef": None}
        for name, neutral in unused.items():
            if getattr(self, name) != neutral:
                raise ConfigError(f"{name}={getattr(self, name)!r} changes a loss that this trainer does not use: leave it at {neutral!r}")
        if self.packing and self.packing_strategy == "wrapped":
            raise ConfigError("packing_strategy='wrapped' joins documents without a boundary: choose 'bfd' or 'bfd_split'")
        if self.eval_packing and not self.packing:
            raise ConfigError("eval_packing=True without packing=True: the batches would join documents without a boundary; set both or neither")
        if self.push_to_hub:
            raise ConfigError("push_to_hub=True: the trainer publishes nothing; share the finished student's directory instead")


class SparseKDTrainer(SFTTrainer):
    """Distils an online teacher into `model`.

    Rows need `input_ids` and `labels` (-100 where a token is not scored, see `document_dataset`); CE and KL run over the same positions.
    The teacher gets what the student gets. Logs `ce`, `kl` (nats), `top1_agreement` and `kept_mass` (of the teacher), each a mean per
    scored token of a micro-batch, averaged over the micro-batches between two logs.

    Args:
        model: student, a causal LM in memory, or its PEFT model.
        teacher: causal LM in memory with the student's vocabulary and tensors of its own; it is frozen and put into eval mode.
        args: `SparseKDConfig`.
        kwargs: of `SFTTrainer`.
    Raises:
        ConfigError: the vocabularies differ, the two share weights, or one of them does not keep packed documents apart.
        DataError: a step without a scored token, a scored first token behind padding or another document, or a loss that is not finite.
    """

    _tag_names = ["xlstm-hybrid", "sparse-kd"]
    _name = "Sparse knowledge distillation"
    loss_is_scaled_for_ga = True  # divided by the scored tokens of the whole step: the Trainer must not average over micro-batches again

    def __init__(self, model, teacher, args=None, **kwargs):
        check_pair(model, teacher)
        if not isinstance(args, SparseKDConfig) or kwargs.get("compute_loss_func"):
            raise ConfigError(f"args={type(args).__name__}: expected a SparseKDConfig, and no compute_loss_func, which this trainer would not call")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_forward = vars(base).get("forward")
        super().__init__(model=model, args=args, **kwargs)
        # TRL has put a fused LM head in place of `forward`. We want the logits, and a student whose copies do not call the original.
        vars(base).pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        self.teacher = teacher.requires_grad_(False).eval().to(self.accelerator.device)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # count the scored tokens of a step, shifted, for any model class
        batch = self.data_collator(list(islice(self.train_dataset, 1)))
        if "position_ids" in batch and ("attention_mask" not in batch or bool((batch["position_ids"].diff() < 0).any())):
            for name, network in ("student", self.model), ("teacher", self.teacher):
                check_documents_stay_apart(network, name, [key for key in INPUTS if key in batch])

    @torch.no_grad()
    def teacher_logits(self, inputs):
        """[B, T, V], in the precision that the student runs in, so that equal models have a divergence of zero."""
        with self.accelerator.autocast():
            return self.teacher.eval()(**inputs, use_cache=False).logits  # with a cache stock models let packed documents see each other

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forward = {key: inputs[key] for key in INPUTS if key in inputs}
        out = model(**forward, use_cache=False)
        logits, targets = shift(out.logits, inputs["labels"])
        teacher_logits, _ = shift(self.teacher_logits(forward), inputs["labels"])
        self.check_targets(targets, forward, num_items_in_batch)
        mask, kept = targets != IGNORE, top_k_targets(teacher_logits, self.args.top_k)
        ce, kl = cross_entropy(logits, targets, num_items=1), sparse_kl(logits, *kept, mask, num_items=1)  # sums over the micro-batch
        total = self.args.ce_weight * ce + self.args.kl_weight * kl
        if not torch.isfinite(total):
            raise DataError(f"loss is {total.item()} at step {self.state.global_step} (ce {ce.item()}, kl {kl.item()}, summed over the batch): "
                            "lower learning_rate, or look at this batch")
        self.record(ce, kl, logits.detach(), kept, mask)
        loss = total / (mask.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # the count is of all ranks, gradients are averaged over them
        return (loss, out) if return_outputs else loss

    def check_targets(self, targets, inputs, num_items):
        if num_items is not None and num_items == 0:
            raise DataError(f"step {self.state.global_step} has no scored token, every label is {IGNORE}: drop such rows (`document_dataset` does)")
        first = torch.zeros_like(targets, dtype=torch.bool)
        if "position_ids" in inputs:
            first |= inputs["position_ids"][:, 1:] == 0
        if "attention_mask" in inputs:
            first |= inputs["attention_mask"][:, :-1] == 0
        if ((targets != IGNORE) & first).any():
            raise DataError(f"step {self.state.global_step} scores the first token of a document, which padding or another document predicts: "
                            f"label it {IGNORE}")

    @torch.no_grad()
    def record(self, ce, kl, logits, kept, mask):
        """Metrics of this micro-batch over all ranks; `ce` and `kl` are sums."""
        top_ids, top_logp, _ = kept
        agreement = ((logits.argmax(-1) == top_ids[..., 0]) & mask).sum()
        mass = torch.where(mask, top_logp.exp().sum(-1), 0.0).sum()
        sums = torch.stack([x.float() for x in (ce, kl, agreement, mass, mask.sum())])
        *sums, count = self.accelerator.gather(sums).view(-1, 5).sum(0).tolist()
        values = dict(zip(("ce", "kl", "top1_agreement", "kept_mass"), (x / max(count, 1) for x in sums), strict=True))
        if count and values["kept_mass"] < LOW_MASS:
            warnings.warn(f"top_k={self.args.top_k} keeps less than {LOW_MASS:.0%} of the teacher's probability: raise it", stacklevel=2)
        for name, value in values.items() if count else ():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _save(self, output_dir=None, state_dict=None):
        save_weights(self, output_dir, state_dict)

    def create_model_card(self, *args, **kwargs):
        """None here: the card is printed from the provenance of a finished student."""

    def _send_telemetry(self):
        """None: training calls nobody."""


# --- checks ------------------------------------------------------------------------------------------------------


def check_pair(student, teacher):
    """Refuse a pair that cannot be compared, or whose teacher would move with the student."""
    for name, model in ("model", student), ("teacher", teacher):
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"{name}: expected a model in memory, got {type(model).__name__}; load it with from_pretrained")
    ours, theirs = (m.config.get_text_config().vocab_size for m in (student, teacher))
    if ours != theirs:
        raise ConfigError(f"the student's vocabulary has {ours} tokens, the teacher's {theirs}: distil from the teacher that was converted")
    places = {p.data_ptr() for p in student.parameters()} - {0}  # 0: a parameter without storage, on the meta device
    shared = next((name for name, p in teacher.named_parameters() if p.data_ptr() in places), None)
    if shared:
        raise ConfigError(f"student and teacher share the weight {shared!r}: the teacher would change with the student; load it a second time")


@torch.no_grad()
def check_documents_stay_apart(model, name, keys, length=8):
    """Refuse a model whose second packed document feels another first document.

    The probe has the format of the run's batches (`keys` of INPUTS). It sees a leak above sqrt(eps) of the logits' scale, eps of the model's dtype.
    """
    V, device, training = model.config.get_text_config().vocab_size, next(model.parameters()).device, model.training
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    logits = []
    for start in (0, 1):
        first, second = ([(j + s) * 7 % V for j in range(length)] for s in (start, 3))
        batch = collate([{"input_ids": first}, {"input_ids": second}])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch = {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items() if key in keys}
        logits.append(model.eval()(**batch, use_cache=False).logits[:, length:])
    model.train(training)
    leak, scale = (logits[0] - logits[1]).abs().max().item(), logits[0].abs().max().item()
    if not leak <= torch.finfo(logits[0].dtype).eps ** 0.5 * scale:
        raise ConfigError(f"the {name} ({type(model).__name__}) lets packed documents see each other: logits on a scale of {scale:.3g} move by "
                          f"{leak:.3g} with the document before; train it unpacked (packing=False, padding_free=False)")


# --- data --------------------------------------------------------------------------------------------------------


def document_dataset(rows, max_length=None):
    """Rows for the trainer, padded or packed (`packing=True`): exactly the tokens with a label other than -100 are scored.

    Documents without a scored token train nothing; they are left out, with a warning that counts them. (TRL itself reads a `labels` column as
    it is, cuts it like `input_ids` at `max_length`, and drops the label of each document's first token, which nothing predicts.)

    Args:
        rows: iterable of `(input_ids, labels)`; a label is the token itself or -100, not shifted.
        max_length: of the trainer's config; a longer document is an error here, where the trainer would cut its end off.
    Returns:
        `datasets.Dataset` with the columns `input_ids` and `labels`.
    Raises:
        DataError: lengths that differ, a label that is neither the token nor -100, a document that is too long, or nothing to score.
    """
    kept, empty = {"input_ids": [], "labels": []}, 0
    for n, (ids, labels) in enumerate(rows):
        ids, labels = list(ids), list(labels)
        if len(ids) != len(labels):
            raise DataError(f"document {n}: {len(ids)} input_ids and {len(labels)} labels; each token needs its label")
        if max_length is not None and len(ids) > max_length:
            raise DataError(f"document {n} has {len(ids)} tokens, max_length is {max_length}: raise it, or split the document")
        wrong = next((t for t, (i, label) in enumerate(zip(ids, labels, strict=True)) if label not in (IGNORE, i)), None)
        if wrong is not None:
            raise DataError(f"document {n}, token {wrong}: label {labels[wrong]} is neither {IGNORE} nor {ids[wrong]}, the token; labels are not "
                            "shifted here")
        if all(label == IGNORE for label in labels[1:]):
            empty += 1
            continue
        kept["input_ids"].append(ids)
        kept["labels"].append(labels)
    if not kept["labels"]:
        raise DataError(f"none of {empty} documents has a scored token: every label is {IGNORE}")
    if empty:
        warnings.warn(f"{empty} of {empty + len(kept['labels'])} documents have no scored token and are left out", stacklevel=2)
    return Dataset.from_dict(kept)
