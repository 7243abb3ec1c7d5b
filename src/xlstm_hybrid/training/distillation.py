"""Stage II: sparse knowledge distillation. gamma CE + beta KL to the teacher's k most likely tokens and a bucket for
the rest (Hauzenberger et al. 2026).
"""

import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from xlstm_hybrid.data.vocabulary import shared_size, vocabulary_hash
from xlstm_hybrid.environment.precision import settle_bf16
from xlstm_hybrid.errors import ConfigError, DataError, StoreError
from xlstm_hybrid.state import weights_digest
from xlstm_hybrid.teacher_store import StoreCollator, TeacherStore, number_rows
from xlstm_hybrid.teacher_store.reader import NUMBER
from xlstm_hybrid.training import option
from xlstm_hybrid.training.distributed import prepare_teacher
from xlstm_hybrid.training.lm_head import (
    Objective,
    Selection,
    attach,
    check_head,
    head_of,
    require_finite,
    virtual_tokens,
)
from xlstm_hybrid.training.losses import DIVERGENCES, IGNORE, OUTCOMES, choose_divergence
from xlstm_hybrid.training.resume import Resumable
from xlstm_hybrid.training.routers import ROUTER, balance_weight, balanced_forward
from xlstm_hybrid.training.window_dropout import WindowDropoutSchedule

# What a batch may bring for the forward of both models; BOUNDARIES: how padding-free batches mark documents.
BOUNDARIES = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"
INPUTS = "input_ids", "attention_mask", "position_ids", *BOUNDARIES
STORED = ("teacher_ids", "teacher_logp", "teacher_rest")  # what a batch brings of a teacher store
LOW_MASS = 0.9  # share of the teacher's probability below which the kept tokens are too few
# what a parameter's name contains if it is trained
TRAINED = {"all": "", "all_and_routers": "", "attention": ".self_attn.", "mixer": ".self_attn.mlstm."}
TARGETS = "topk", "sampled"
SAMPLED = ("forward_kl", "tail"), ("forward_kl", "gemma")  # divergence and outcomes that draws serve


@dataclass
class SparseKDConfig(SFTConfig):
    """Arguments of `SparseKDTrainer`; the defaults are the paper's."""

    learning_rate: float = option(1e-5, "Learning rate after the warm-up.")
    lr_scheduler_type: str = option("constant_with_warmup", "Schedule: re-warmed, then constant.")
    ce_weight: float = option(0.9, "Weight of cross-entropy on the labels (gamma).")
    kl_weight: float = option(0.1, "Weight of the divergence from the teacher (beta).")
    teacher: str = option("online", "'online', a model in memory, or the directory of a teacher store.")
    top_k: int = option(256, "Teacher tokens kept per position; the rest is one bucket. Unused by dense outcomes.")
    targets: str = option("topk", "'topk', or 'sampled': top_k draws from the teacher, with replacement.")
    divergence: str = option("forward_kl", "forward_kl, reverse_kl, skewed_kl, jsd, tvd or csd.")
    outcomes: str = option("tail", "tail, renormalise, gemma, or dense: every token, online only.")
    temperature: float = option(1.0, "Of both sides of the divergence, which is multiplied by its square.")
    skew: float = option(0.1, "Share of the teacher in the mixture of skewed_kl.")
    jsd_beta: float = option(0.5, "Share of the teacher in the mixture of jsd.")
    csd_weights: str = option("us", "Weights of csd: ss, us, ts, tt or uu.")
    csd_temperature: float = option(1.5, "Of the student's weights in csd.")
    train: str = option(
        "all",
        "all but routers of experts; all_and_routers; attention: projections and mixers; mixer: what conversion added. PEFT: all.",
    )
    head_rows: int | None = option(None, "Tokens whose logits exist at once; by default what a fixed workspace holds.")
    window_dropout: float | None = option(None, "Share of rows that do without their window; None: the student's own.")
    window_dropout_end: float | None = option(None, "What it comes to, on a line, in the run's last step.")
    max_skipped_steps: int = option(3, "Steps in a row that are not finite, after which the run ends.")
    allow_changes: list[str] | None = option(None, "Fields of the run spec that may differ at resume.")

    def __post_init__(self):
        settle_bf16(self)
        super().__post_init__()
        if not (min(self.ce_weight, self.kl_weight) >= 0 and 0 < self.ce_weight + self.kl_weight < float("inf")):
            raise ConfigError(
                f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}: expected finite weights of at least 0 that are not both 0"
            )
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected at least 1 teacher token per position")
        tables = {"outcomes": OUTCOMES, "divergence": DIVERGENCES, "train": TRAINED, "targets": TARGETS}
        for name, choices in tables.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {list(choices)}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: expected a finite number above 0")
        if self.head_rows is not None and self.head_rows < 1:
            raise ConfigError(f"head_rows={self.head_rows}: expected at least 1, or None")
        choose_divergence(self.divergence, **self.divergence_options)
        self.check_combination()
        self.window_schedule  # noqa: B018 (raises for what is out of range)
        unused = {"loss_type": "nll", "label_smoothing_factor": 0.0, "use_liger_kernel": False}
        for name, neutral in unused.items():
            if getattr(self, name) != neutral:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} changes a loss that this trainer does not use: leave it at {neutral!r}"
                )
        if self.packing and self.packing_strategy == "wrapped":
            raise ConfigError(
                "packing_strategy='wrapped' joins documents without a boundary: choose 'bfd' or 'bfd_split'"
            )
        if self.eval_packing and not self.packing:
            raise ConfigError(
                "eval_packing=True without packing=True: the batches would join documents without a boundary; set both or neither"
            )
        if self.push_to_hub:
            raise ConfigError(
                "push_to_hub=True: the trainer publishes nothing; share the finished student's directory instead"
            )

    def check_combination(self):
        if self.outcomes == "gemma" and self.divergence == "reverse_kl":
            raise ConfigError(
                "divergence='reverse_kl' with outcomes='gemma', which exclude what was not kept: choose 'tail' or 'renormalise'"
            )
        if self.outcomes == "dense" and (self.targets == "sampled" or self.teacher != "online"):
            raise ConfigError(
                f"outcomes='dense' with targets={self.targets!r}, teacher={self.teacher!r}: every token's probability comes from an "
                "online teacher; choose other outcomes"
            )
        if self.targets == "sampled" and (self.divergence, self.outcomes) not in SAMPLED:
            raise ConfigError(
                f"targets='sampled' with divergence={self.divergence!r}, outcomes={self.outcomes!r}: draws stand for the teacher in an "
                "expectation under it, which is forward_kl on 'tail' or 'gemma' outcomes; choose those, or targets='topk'"
            )
        if self.teacher != "online" and self.packing:
            raise ConfigError(
                "packing=True with a teacher store: its rows are packed already, and would not be found again; set packing=False"
            )

    @property
    def window_schedule(self):
        """`WindowDropoutSchedule`, or None where none is asked for."""
        if self.window_dropout is None:
            if self.window_dropout_end is not None:
                raise ConfigError(
                    f"window_dropout_end={self.window_dropout_end} without window_dropout: set what it begins with"
                )
            return None
        return WindowDropoutSchedule(self.window_dropout, self.window_dropout_end)

    @property
    def divergence_options(self):
        return {name: getattr(self, name) for name in ("skew", "jsd_beta", "csd_weights", "csd_temperature")}


class SparseKDTrainer(Resumable, SFTTrainer):
    """Distils a teacher, online or from a store, into `model`.

    Rows need `input_ids` and `labels` (-100 where a token is not scored, see `document_dataset`); CE and KL run over
    the same positions. An online teacher gets what the student gets. Neither model's logits exist for all tokens at
    once, see `lm_head.Objective`, unless the caller asks for outputs. Logs `ce`, `kl` (nats; the divergence that was
    chosen), `top1_agreement` and `kept_mass` (of the teacher, but for dense outcomes and draws), each a mean per scored
    token of a micro-batch, averaged over the micro-batches between two logs. Where routers learn,
    `router_aux_loss_coef` times the loss that balances experts is added, which is logged as `aux_loss`.

    Args:
        model: student, a causal LM in memory, or its PEFT model; or pass `peft_config`.
        teacher: causal LM in memory, or its PEFT model, with tensors of its own; it is frozen and put into eval mode.
            Or a `TeacherStore`, or None for the one that `args.teacher` names.
        args: `SparseKDConfig`. Its `train` says which parameters learn, whatever was frozen before; PEFT says so
            itself.
        teacher_tokenizer: for a teacher whose LM head has another size: the loss is on the ids that both tokenizers
            share.
        kwargs: of `SFTTrainer`.
    Raises:
        ConfigError: vocabularies that differ, shared weights, a model that does not keep packed documents apart or
            makes logits its own way, a teacher with virtual tokens (prompt tuning), or a student with them and packed
            documents.
        StoreError: a store that was made for something else.
        DataError: a step without a scored token, a scored first token behind padding or another document, or a loss
            that is not finite.
    """

    _tag_names = ["xlstm-hybrid", "sparse-kd"]
    _name = "Sparse knowledge distillation"
    # divided by the scored tokens of the whole step: the Trainer must not average over micro-batches again
    loss_is_scaled_for_ga = True

    def __init__(self, model, teacher=None, args=None, teacher_tokenizer=None, **kwargs):
        if teacher is None and isinstance(args, SparseKDConfig) and args.teacher != "online":
            teacher = TeacherStore(args.teacher)
        check_pair(model, *([] if isinstance(teacher, TeacherStore) else [teacher]))
        if isinstance(args, SparseKDConfig) and args.teacher != "online" and not isinstance(teacher, TeacherStore):
            raise ConfigError(
                f"args.teacher={args.teacher!r} names a store and a model was passed as well: pass teacher=None, or set it to 'online'"
            )
        if not isinstance(args, SparseKDConfig) or kwargs.get("compute_loss_func"):
            raise ConfigError(
                f"args={type(args).__name__}: expected a SparseKDConfig, and no compute_loss_func, which this trainer would not call"
            )
        self.store = teacher if isinstance(teacher, TeacherStore) else None
        tokenizer = kwargs.get("processing_class")
        if self.store is not None:
            self.size = check_store(self.store, model, args, tokenizer)
            kwargs["train_dataset"] = number_rows(kwargs.get("train_dataset"), self.store)
            held_out = kwargs.get("eval_dataset")
            for rows in held_out.values() if isinstance(held_out, dict) else [held_out]:
                if NUMBER not in (getattr(rows, "column_names", None) or [NUMBER]):
                    raise StoreError(
                        f"eval_dataset has no column {NUMBER}: {self.store.directory.name} has no targets for its rows; "
                        "evaluate with a teacher in memory, or with rows of the store after number_rows"
                    )
        else:
            ours = tokenizer if teacher_tokenizer is not None else None
            self.size = shared_size(vocabulary(model), vocabulary(teacher), ours, teacher_tokenizer)
        choose_trained(model, args.train, kwargs.get("peft_config"))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_forward, given = vars(base).get("forward"), kwargs.get("train_dataset")
        super().__init__(model=model, args=args, **kwargs)
        check_rows_left(given, self.train_dataset, self.args)
        # TRL has put a fused LM head in place of `forward`; ours takes what is calculated with the head from the
        # caller.
        vars(base).pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        attach(base)
        check_head(self.model, "student")
        self.balance = balance_weight(self.model, args.router_aux_loss_coef)
        # count the scored tokens of a step, shifted, for any model class
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.objective = Objective(
            args.ce_weight, args.kl_weight, args.divergence, args.outcomes, args.temperature, args.divergence_options
        )
        if args.window_schedule is not None:
            self.add_callback(args.window_schedule)
        if self.store is not None:
            self.teacher, self.teacher_facts = None, self.store.spec
            self.data_collator = StoreCollator(self.store, self.data_collator)
        else:
            self.teacher_facts = weights_digest(teacher)
            attach(teacher)
            self.teacher = prepare_teacher(self, teacher)
            check_head(self.teacher, "teacher")
            kind = "dense" if args.outcomes == "dense" else args.targets
            self.select = Selection(kind, args.top_k, args.temperature, self.size, args.seed, args.head_rows)
        batch = self.data_collator(list(islice(self.train_dataset, 1)))
        positions = batch.get("position_ids")
        if positions is not None and ("attention_mask" not in batch or bool((positions.diff() < 0).any())):  # packed
            if virtual_tokens(self.model):
                raise ConfigError(
                    "packed documents with a PEFT model that puts virtual tokens in front of a row: only the first "
                    "document would see them; train it unpacked (packing=False, padding_free=False)"
                )
            for name, network in ("student", self.model), ("teacher", self.teacher):
                if network is not None:
                    check_documents_stay_apart(network, name, [key for key in INPUTS if key in batch])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.store is not None and NUMBER not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, NUMBER]

    def run_facts(self):
        """For `Resumable`: a run with another teacher is another run."""
        return {"teacher_model": self.teacher_facts}

    @torch.no_grad()
    def teacher_targets(self, inputs, place):
        """Targets of the flat positions `place` [N], see `lm_head.Selection`; online in the precision that the student
        runs in, so that equal models have a divergence of zero.
        """
        if self.store is not None:
            ids, logp, rest = (inputs[name].flatten(0, 1)[place] for name in STORED)
            k = self.args.top_k
            if self.store.kind == "topk" and k < ids.shape[-1]:  # most likely first; the others join the rest
                ids, logp, rest = ids[:, :k], logp[:, :k], torch.logaddexp(rest, logp[:, k:].logsumexp(-1))
            return ids, logp, rest
        # With a cache stock models let packed documents see each other. A seed by content: a resumed run draws what the
        # first one drew.
        seed = zlib.crc32(inputs["input_ids"].cpu().numpy().tobytes()) if self.select.kind == "sampled" else 0
        forward = {key: inputs[key] for key in INPUTS if key in inputs}
        select = partial(self.select, place=place, seed=seed)
        with self.accelerator.autocast():
            return self.teacher.eval()(**forward, use_cache=False, with_head=select)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The student's forward makes hidden states and hands them, with its LM head, to the objective."""
        seen = self.look(inputs)
        self.check_targets(seen, num_items_in_batch)
        forward, labels, T = seen.forwarded(inputs, INPUTS), inputs["labels"], inputs["labels"].shape[1]
        place = seen.place.to(labels.device, non_blocking=True)
        targets, labels = self.teacher_targets(inputs, place), labels.flatten()[place + 1]
        teacher_head = head_of(self.teacher, self.size) if self.args.outcomes == "dense" else None
        items = labels.new_tensor(max(len(place), 1)) if num_items_in_batch is None else num_items_in_batch
        rest = targets, torch.as_tensor(items), self.size, teacher_head, self.args.head_rows

        def objective(hidden, student):
            hidden = hidden[:, -T:]  # prompt tuning puts virtual tokens in front
            return self.objective(hidden, student, place, labels, *rest)

        asked = {"use_cache": False, "with_head": objective}
        terms, balance = balanced_forward(self, model, self.balance, **forward, **asked)
        self.record(terms, targets, len(place))
        loss = terms.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the count is of all ranks, gradients are averaged over them
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = loss if balance is None else loss + balance
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**forward, use_cache=False)

    def check_targets(self, seen, num_items):
        if not len(seen.place) and num_items is not None and num_items == 0:
            raise DataError(
                f"step {self.state.global_step} has no scored token, every label is {IGNORE}: drop such rows (`document_dataset` does)"
            )
        if seen.first:
            raise DataError(
                f"step {self.state.global_step} scores the first token of a document, which padding or another document predicts: "
                f"label it {IGNORE}"
            )

    @torch.no_grad()
    def record(self, terms, targets, count):
        """Metrics of this micro-batch over all ranks; `terms` are sums over its `count` scored tokens."""
        sums = {"ce": terms.ce, "kl": terms.kl, "top1_agreement": terms.agreement}
        if self.args.outcomes != "dense" and self.args.targets == "topk":
            sums["kept_mass"] = targets[1].exp().sum()
        stacked = torch.stack([*(x.detach().float() for x in sums.values()), terms.ce.new_full((), count).float()])
        totals = self.accelerator.gather(stacked).view(-1, len(stacked)).sum(0)
        self.readings.note("train" if self.model.training else "eval", totals, partial(self.means, tuple(sums)))

    def means(self, names, totals):
        """`{metric: value}` of a micro-batch's sums and their count; none where nothing is scored."""
        *totals, count = totals
        values = {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}
        if values.get("kept_mass", 1) < LOW_MASS:
            warnings.warn(
                f"top_k={self.args.top_k} keeps less than {LOW_MASS:.0%} of the teacher's probability: raise it",
                stacklevel=2,
            )
        return values


# --- checks ------------------------------------------------------------------------------------------------------


def vocabulary(model):
    return model.config.get_text_config().vocab_size


def check_pair(student, *teachers):
    """Refuse what is no model in memory, or a teacher whose weights would move with the student."""
    for name, model in ("model", student), *(("teacher", t) for t in teachers):
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"{name}: expected a model in memory, got {type(model).__name__}; load it with from_pretrained"
            )
    places = {p.data_ptr() for p in student.parameters()} - {0}  # 0: a parameter without storage, on the meta device
    for name, parameter in (pair for teacher in teachers for pair in teacher.named_parameters()):
        if parameter.data_ptr() in places:
            raise ConfigError(
                f"student and teacher share the weight {name!r}: the teacher would change with the student; load it a second time"
            )


def check_store(store, student, args, tokenizer):
    """V of the loss on a store's targets; refuse a store that was made for something else."""
    if store.kind != args.targets or store.spec["temperature"] != args.temperature:
        raise StoreError(
            f"{store.directory.name} holds {store.kind!r} targets at temperature {store.spec['temperature']}, expected "
            f"{args.targets!r} at {args.temperature}; set targets and temperature to those, or build another store"
        )
    if args.top_k > store.k or (store.kind == "sampled" and args.top_k != store.k):
        raise StoreError(
            f"{store.directory.name} keeps {store.k} entries per token, top_k={args.top_k}: set top_k to that, or build another store"
        )
    ours = None if tokenizer is None else vocabulary_hash(tokenizer)
    theirs = store.spec.get("vocabulary")
    if ours and theirs and ours != theirs:
        raise StoreError(
            f"{store.directory.name} was made with the vocabulary {theirs[:12]}..., the student's is {ours[:12]}...: build it with "
            "the student's tokenizer"
        )
    if store.vocab_size > vocabulary(student):
        raise StoreError(
            f"{store.directory.name} has ids below {store.vocab_size}, the student's vocabulary {vocabulary(student)}: build it with "
            f"--vocabulary {vocabulary(student)} or the number of the tokenizer's ids"
        )
    return store.vocab_size


def choose_trained(model, train, peft_config):
    """Freeze all parameters but those that `train` names, a key of `TRAINED`; PEFT chooses by itself."""
    if peft_config is not None or hasattr(model, "get_base_model"):
        if train != "all":
            raise ConfigError(f"train={train!r} with PEFT: the adapter's config says what learns; leave train at 'all'")
        return
    chosen = {name for name, p in model.named_parameters() if TRAINED[train] in f".{name}" and p.is_floating_point()}
    if train != "all_and_routers":
        chosen = {name for name in chosen if ROUTER not in name}
    if not chosen:
        raise ConfigError(
            f"train={train!r}: no parameter of {type(model).__name__} has {TRAINED[train]!r} in its name; choose of {list(TRAINED)}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


@torch.no_grad()
def check_documents_stay_apart(model, name, keys, length=8):
    """Refuse a model whose second packed document feels another first document.

    The probe has the format of the run's batches (`keys` of INPUTS). It sees a leak above sqrt(eps) of the logits'
    scale, eps of the model's dtype.
    """
    V, device, training = vocabulary(model), next(model.parameters()).device, model.training
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    logits = []
    for start in (0, 1):
        first, second = ([(j + s) * 7 % V for j in range(length)] for s in (start, 3))
        batch = collate([{"input_ids": first}, {"input_ids": second}])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch = {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items() if key in keys}
        logits.append(model.eval()(**batch, use_cache=False).logits[:, length:])
    model.train(training)
    require_finite(logits[0], model, name)
    leak, scale = (logits[0] - logits[1]).abs().max().item(), logits[0].abs().max().item()
    if not leak <= torch.finfo(logits[0].dtype).eps ** 0.5 * scale:
        raise ConfigError(
            f"the {name} ({type(model).__name__}) lets packed documents see each other: logits on a scale of {scale:.3g} move by "
            f"{leak:.3g} with the document before; train it unpacked (packing=False, padding_free=False)"
        )


def check_rows_left(given, rows, args):
    """Refuse rows of which TRL has left none, as `max_length` cut the scored tokens off, and warn where some are gone."""
    limit = f"within max_length={args.max_length}: raise it, or shorten the prompts"
    if next(iter(rows), None) is None:
        count = f"{len(given)} " if hasattr(given, "__len__") else ""
        raise DataError(f"none of the {count}rows has a scored token {limit}")
    if not args.packing and hasattr(given, "__len__") and len(rows) < len(given):
        warnings.warn(
            f"{len(given) - len(rows)} of {len(given)} rows have no scored token {limit}; they are left out",
            stacklevel=3,
        )


# --- data --------------------------------------------------------------------------------------------------------


def document_dataset(rows, max_length=None):
    """Rows for the trainer, padded or packed: exactly the tokens with a label other than -100 are scored.

    Documents without a scored token train nothing; they are left out, with a warning that counts them. (TRL itself
    reads a `labels` column as it is, cuts it like `input_ids` at `max_length`, and drops the label of each document's
    first token, which nothing predicts.)

    Args:
        rows: iterable of `(input_ids, labels)`; a label is the token itself or -100, not shifted.
        max_length: of the trainer's config; a longer document is an error here, where the trainer would cut its end
            off.
    Returns:
        `datasets.Dataset` with the columns `input_ids` and `labels`.
    Raises:
        DataError: lengths that differ, a label that is neither the token nor -100, a document that is too long, or
            nothing to score.
    """
    columns, empty = {"input_ids": [], "labels": []}, 0
    for n, (ids, labels) in enumerate(rows):
        ids, labels = list(ids), list(labels)
        if len(ids) != len(labels):
            raise DataError(
                f"document {n}: {len(ids)} input_ids and {len(labels)} labels; expected a label for each token"
            )
        if max_length is not None and len(ids) > max_length:
            raise DataError(
                f"document {n} has {len(ids)} tokens, max_length is {max_length}: raise it, or split the document"
            )
        for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (IGNORE, token):
                raise DataError(
                    f"document {n}, token {t}: label {label} is neither {IGNORE} nor {token}, the token; labels are not shifted here"
                )
        if all(label == IGNORE for label in labels[1:]):
            empty += 1
            continue
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    if not columns["labels"]:
        raise DataError(f"none of {empty} documents has a scored token: every label is {IGNORE}")
    if empty:
        count = empty + len(columns["labels"])
        warnings.warn(f"{empty} of {count} documents have no scored token and are left out", stacklevel=2)
    return Dataset.from_dict(columns)
