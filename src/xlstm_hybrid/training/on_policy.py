"""On-policy distillation: the student writes, a teacher scores each of its tokens (Agarwal et al. 2024, GKD).

Dims: B rows, T tokens, n completions per prompt, D hidden size, V vocabulary. No gradient goes through sampling.
"""

import contextlib
import random
import warnings
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from trl import DistillationConfig, DistillationTrainer
from trl.models.utils import unwrap_model_for_generation

from xlstm_hybrid.checkpoint.tokenizer import check_rows
from xlstm_hybrid.data.vocabulary import shared_size
from xlstm_hybrid.environment.precision import settle_bf16
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.state import weights_digest
from xlstm_hybrid.training import option
from xlstm_hybrid.training.distillation import SparseKDConfig, check_pair
from xlstm_hybrid.training.distributed import prepare_teacher
from xlstm_hybrid.training.lm_head import Objective, Selection, attach, check_head, head_of
from xlstm_hybrid.training.losses import IGNORE, choose_divergence
from xlstm_hybrid.training.resume import Resumable
from xlstm_hybrid.training.rollouts import (
    PromptSampler,
    ReplayBuffer,
    pad,
    sample_completions,
    seed_from,
    seeded,
    until_eos,
)
from xlstm_hybrid.training.routers import balance_weight, balanced_forward, freeze_routers

SOURCES = ("student", "replay", "teacher", "data")  # who wrote a completion
OWN = SOURCES[:2]  # the student itself, now or before
FORWARD = "input_ids", "attention_mask"
PATIENCE = 10  # generation batches in a row with too many empty completions, after which training stops


@dataclass
class OnPolicyKDConfig(DistillationConfig):
    """Arguments of `OnPolicyKDTrainer`; lengths, temperature, `top_p`, `top_k`, `min_p` are those of sampling."""

    divergence: str = option("reverse_kl", "Key of losses.DIVERGENCES, over the whole vocabulary.")
    jsd_beta: float = option(0.5, "Of jsd: 0 is forward KL, 1 reverse KL, as in GKD.")
    skew: float = option(0.1, "Of skewed_kl.")
    csd_weights: str = option("us", "Of csd, see losses.CSD_WEIGHTS.")
    csd_temperature: float = option(1.5, "Of csd: softens the student's weights.")
    loss_temperature: float = option(1.0, "Softens both sides of the divergence; `temperature` is that of sampling.")
    num_generations: int = option(1, "Completions per prompt (n). The prompt is read once for all of them.")
    lmbda: float = option(1.0, "Share of prompts that the student answers; the rest has the data's completions.")
    seq_kd: bool = option(False, "The rest is answered by the teacher instead of the data.")
    train_routers: bool = option(False, "Whether routers of experts learn, balanced by router_aux_loss_coef.")
    router_aux_loss_coef: float | None = option(
        None, "Weight of the loss that balances experts; None: the model's own."
    )
    ce_weight: float = option(0.0, "Weight of cross-entropy beside the divergence, never on the student's own words.")
    replay_size: int = option(0, "Completions of earlier steps that are kept; 0 keeps none.")
    replay_share: float = option(
        0.0, "Share of the student's prompts that is taken from those instead of written anew."
    )
    prefill_piece: int | None = option(None, "Tokens per forward while a prompt is read, None for all at once.")
    teacher_offload: bool = option(False, "Teachers wait in main memory, and one at a time scores a step's rows.")
    max_empty_share: float = option(0.9, "Above this share of empty completions, again and again, training stops.")
    log_completions: bool = option(True, "Tables of prompts and completions at each log, in completions/ of the run.")
    num_completions_to_print: int | None = option(2, "Of those, how many go to the screen; None for all.")

    def __post_init__(self):
        settle_bf16(self)
        super().__post_init__()
        choose_divergence(self.divergence, **self.divergence_options)  # raises for what is out of range
        for name in ("lmbda", "replay_share", "max_empty_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share between 0 and 1")
        for name, least in {"num_generations": 1, "replay_size": 0, "ce_weight": 0, "max_completion_length": 1}.items():
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not 0 < self.loss_temperature < float("inf"):
            raise ConfigError(f"loss_temperature={self.loss_temperature}: expected a finite number above 0")
        if bool(self.replay_size) != bool(self.replay_share):
            raise ConfigError(f"replay_size={self.replay_size}, replay_share={self.replay_share}: set both, or neither")
        if self.seq_kd and self.lmbda == 1:
            raise ConfigError(
                "seq_kd=True, lmbda=1: the teacher answers the prompts that the student does not, and there are none; lower lmbda"
            )
        if self.ce_weight and self.lmbda == 1:
            raise ConfigError(
                f"ce_weight={self.ce_weight}, lmbda=1: every completion is the student's own, which has no cross-entropy; lower lmbda"
            )
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % self.num_generations:
            raise ConfigError(
                f"num_generations={self.num_generations} does not divide the {local} completions that a device trains on per step "
                "(per_device_train_batch_size * gradient_accumulation_steps)"
            )
        unused = {"beta": 1.0, "use_vllm": False, "push_to_hub": False, "use_liger_kernel": False}
        unused |= dict.fromkeys(("cache_implementation", "pad_to_multiple_of", "teacher_model_name_or_path"))
        for name, neutral in unused.items():
            if getattr(self, name) != neutral:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no effect here: leave it at {neutral!r} (beta: see divergence, jsd_beta)"
                )

    divergence_options = SparseKDConfig.divergence_options


def check_prompts(dataset, args, names=(None,)):
    """Refuse data that lacks a column which the run needs, names no teacher of it, or is too small for one step."""
    columns, several = getattr(dataset, "column_names", None), names[0] is not None
    needed = {"prompt": True, "completion": args.lmbda < 1 and not args.seq_kd, "teacher": several}
    for name in (name for name, is_needed in needed.items() if is_needed):
        if columns is not None and name not in columns:
            options = f"lmbda={args.lmbda}, seq_kd={args.seq_kd}" + (f", teachers {names}" if several else "")
            raise ConfigError(
                f"train_dataset has no column {name!r}, only {columns}; {options} need it: add the column, or leave these options out"
            )
    if isinstance(dataset, IterableDataset):
        if args.num_generations > 1:
            raise ConfigError(
                f"num_generations={args.num_generations} with a streamed dataset: load the prompts, or set it to 1"
            )
        return
    if several and dataset is not None and (unknown := sorted(map(str, {*dataset["teacher"]} - {*names}))):
        raise ConfigError(
            f"train_dataset names the teachers {unknown}, expected some of {names}: pass those as well, or leave their rows out"
        )
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompts = local * args.world_size // args.num_generations
    if dataset is not None and len(dataset) < prompts:
        raise ConfigError(
            f"train_dataset has {len(dataset)} prompts, one step takes {prompts}: lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )


# --- trainer -----------------------------------------------------------------------------------------------------


class OnPolicyKDTrainer(Resumable, DistillationTrainer):
    """Distils `teacher` into `model` on completions that the student samples itself.

    A row needs `prompt`, text or messages; with lmbda < 1 (and not seq_kd) `completion` as well, of the same kind.
    Every token of a completion, its EOS included, weighs the same; prompts are not scored. Once per step each prompt is
    read once and answered n times; what is drawn depends on seed, step and rank only, and on the settings of `args`,
    never on those in a checkpoint's generation_config.json. Evaluation lets the student answer each prompt once.

    Several teachers: the column `teacher` of a row names the one that scores it (and, with seq_kd, answers it); no
    other sees it. All of them stay on the device, or with `teacher_offload` in main memory, from where one at a
    time comes to score its rows of a whole step. Logs `divergence` and `top1_agreement` of each as well, under its
    name. Logs `divergence` (nats, times loss_temperature squared), `top1_agreement`, `nll` of the completions under the
    student (with ce_weight: `ce`, of those that are not its own), `completions/*` and `source/*`.

    Args:
        model: student, a causal LM in memory, or its PEFT model.
        teacher: causal LM in memory with tensors of its own, or {name: causal LM}; they are frozen and put into eval
            mode.
        args: `OnPolicyKDConfig`.
        teacher_tokenizer: needed where the vocabularies have other sizes (padding); ids that are not real are neither
            written nor compared. For several teachers {name: tokenizer}.
        kwargs: of `DistillationTrainer`.
    Raises:
        ConfigError: models that cannot be compared or that share weights, or have virtual tokens (prompt tuning), data
            that is missing, too few prompts, teachers that no one has or that FSDP would have to gather by turns.
        DataError: an empty prompt, or empty completions again and again. What `resume.Resumable` says of checkpoints
            and losses holds as well.
    """

    _tag_names = ["xlstm-hybrid", "on-policy-kd"]
    _name = "On-policy distillation"

    def __init__(self, model, teacher, args=None, teacher_tokenizer=None, processing_class=None, **kwargs):
        if not isinstance(args, OnPolicyKDConfig):
            raise ConfigError(f"args={type(args).__name__}: expected an OnPolicyKDConfig")
        teachers = teacher if isinstance(teacher, dict) else {None: teacher}  # None: one teacher, of all rows
        self.names = list(teachers)
        if not isinstance(teacher_tokenizer, dict):
            teacher_tokenizer = dict.fromkeys(teachers, teacher_tokenizer)
        check_pair(model, *teachers.values())
        sizes = [len(m.get_output_embeddings().weight) for m in (model, *teachers.values())]
        self.size = min(sizes)
        for name, size in zip(teachers, sizes[1:], strict=True):
            try:
                shared = shared_size(sizes[0], size, processing_class, teacher_tokenizer.get(name))
            except ConfigError as error:
                raise ConfigError(str(error) if name is None else f"teacher {name}: {error}") from error
            self.size = min(self.size, shared)
        check_prompts(kwargs.get("train_dataset"), args, self.names)
        networks = {"student": model} | {f"teacher {n or ''}".rstrip(): t for n, t in teachers.items()}
        for name, network in networks.items():
            attach(network)
            check_head(network, name)
        if not (args.train_routers or hasattr(model, "get_base_model")):  # PEFT chooses by itself
            freeze_routers(model)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        self.balance = balance_weight(self.model, args.router_aux_loss_coef)
        if self.is_fsdp_enabled and (args.teacher_offload or len(teachers) > 1):
            raise ConfigError(
                "several teachers, or teacher_offload, under FSDP: processes would gather other teachers at other times; use DDP"
            )
        digests = {n: weights_digest(t) for n, t in teachers.items()}
        self.teacher_digest = digests[None] if self.names == [None] else digests
        self.teachers = [
            t.requires_grad_(False).eval().to("cpu") if args.teacher_offload else prepare_teacher(self, t)
            for t in teachers.values()
        ]
        self.teacher_model = self.teachers[0]
        if self.size < max(sizes):
            self.generation_config.suppress_tokens = list(range(self.size, max(sizes)))
        self.objective = Objective(
            args.ce_weight, 1.0, args.divergence, "dense", args.loss_temperature, args.divergence_options
        )
        self.empty_batches = 0
        if args.replay_size:
            self.add_callback(ReplayBuffer(args.replay_size))

    # --- prompts -------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        args, n, steps = self.args, self.args.num_generations, self.args.gradient_accumulation_steps
        prompts = args.per_device_train_batch_size * steps * self.accelerator.num_processes // n
        order = {"shuffle": self.shuffle_dataset, "seed": args.seed}
        dataset = self.train_dataset if dataset is None else dataset
        return PromptSampler(dataset, mini_repeat_count=n, batch_size=prompts, repeat_count=steps, **order)

    def check_ids(self, ids):
        check_rows(self._tokenizer, self.model.config.get_text_config().vocab_size, "student", ids)

    def completion_ids(self, row, prompt_ids):
        """Ids of the data's completion, cut at `max_completion_length`; an EOS ends it where the data does not."""
        completion = row.get("completion")
        if isinstance(completion, list):
            whole = self.processing_class.apply_chat_template(
                [*row["prompt"], *completion], tokenize=True, return_dict=False, **self.chat_template_kwargs
            )
            if whole[: len(prompt_ids)] != prompt_ids:
                raise DataError(
                    f"chat template: the prompt of {str(row['prompt'])[:60]!r} is not the beginning of prompt and completion; use a "
                    "template that only appends, or text rows"
                )
            ids = until_eos(whole[len(prompt_ids) :], self.eos_token_ids)
        elif isinstance(completion, str):
            ids = self.processing_class(text=completion, add_special_tokens=False)["input_ids"]
        else:
            raise DataError(
                f"completion: expected text or messages beside the prompt {str(row['prompt'])[:60]!r}, got {type(completion).__name__}; "
                "fill the column, or set lmbda=1 or seq_kd=True"
            )
        self.check_ids(ids)
        if not ids or ids[-1] not in self.eos_token_ids:
            ids = [*ids, self.eos_token_ids[0]]
        return ids[: self.max_completion_length]

    # --- completions ---------------------------------------------------------------------------------------------

    def write(self, model, prompts, n, seed):
        """`sample_completions` from a model that may be wrapped for training, on all ranks together."""
        together, kwargs = {}, self.args.gradient_checkpointing_kwargs
        if self.is_fsdp_enabled:
            longest = torch.tensor([max(map(len, prompts))], device=self.accelerator.device)
            together = {"width": self.accelerator.gather(longest).max().item(), "synced": True}
        with unwrap_model_for_generation(model, self.accelerator, gradient_checkpointing_kwargs=kwargs) as writer:
            how = self.generation_config, seed, self.args.prefill_piece
            return sample_completions(writer, prompts, n, *how, **together)

    def teacher_of(self, row):
        """Number of the teacher that scores a row."""
        if self.names == [None]:
            return 0
        if row.get("teacher") not in self.names:
            raise DataError(
                f"teacher={row.get('teacher')!r} beside the prompt {str(row['prompt'])[:60]!r}: expected one of {self.names}"
            )
        return self.names.index(row["teacher"])

    @contextlib.contextmanager
    def at_work(self, teacher):
        """A teacher on the device; with `teacher_offload` for as long as the block runs."""
        try:
            yield teacher.to(self.accelerator.device) if self.args.teacher_offload else teacher
        finally:
            if self.args.teacher_offload:
                teacher.to("cpu")

    def complete(self, rows):
        """`(prompts, completions, sources, numbers)`, lists of B, for rows in which each prompt stands n times."""
        training, args = self.model.training, self.args
        n = args.num_generations if training else 1
        heads = rows[::n]
        prompts = [list(ids) for ids in self._tokenize_prompts([row["prompt"] for row in heads])[0]]
        empty = next((row["prompt"] for row, ids in zip(heads, prompts, strict=True) if not ids), None)
        if empty is not None:
            raise DataError(f"prompt {empty!r} has no token: a completion needs something to follow; drop such rows")
        for ids in prompts:
            self.check_ids(ids)
        buffer = next((c for c in self.callback_handler.callbacks if isinstance(c, ReplayBuffer)), None)
        when = (args.seed, self.state.global_step) if training else (args.seed, prompts)
        draw = random.Random(seed_from(*when))  # not by rank: all ranks generate together
        sources = [self.choose(draw, buffer) if training else "student" for _ in heads]
        rank, groups, numbers = self.accelerator.process_index, {}, [self.teacher_of(row) for row in heads]
        for number, model in [(None, self.model_wrapped), *enumerate(self.teachers)]:
            source, drawn = "student", ()
            if number is not None:
                source, drawn = "teacher", [self.names[number]] * (self.names[number] is not None)
            places = [j for j, chosen in enumerate(sources) if chosen == source and number in (None, numbers[j])]
            if not places:
                continue
            with contextlib.nullcontext(model) if number is None else self.at_work(model) as writer:
                written = self.write(writer, [prompts[j] for j in places], n, seed_from(*when, source, rank, *drawn))
            for k, j in enumerate(places):
                groups[j] = [(prompts[j], ids, numbers[j]) for ids in written[k * n : k * n + n]]
        own = random.Random(seed_from(*when, "replay", rank))
        for j, source in enumerate(sources):
            if source == "replay":
                groups[j] = buffer.draw(own, n)
            elif source == "data":
                groups[j] = [(prompts[j], self.completion_ids(heads[j], prompts[j]), numbers[j])] * n
        if buffer is not None and training:
            buffer.add([row for j, source in enumerate(sources) if source == "student" for row in groups[j]])
        written = [row for j in range(len(heads)) for row in groups[j]]
        prompts, completions, numbers = zip(*written, strict=True)
        sources = [source for source in sources for _ in range(n)]
        return [list(p) for p in prompts], [list(c) for c in completions], sources, list(numbers)

    def choose(self, draw, buffer):
        """One of SOURCES. Both numbers are always drawn, so that a source does not depend on those before it."""
        share, replay = draw.random(), draw.random()
        if share >= self.args.lmbda:
            return "teacher" if self.args.seq_kd else "data"
        return "replay" if buffer is not None and buffer.rows and replay < self.args.replay_share else "student"

    def _prepare_inputs(self, rows):
        """TRL's shuffles the rows of a step: here by a seed of the step, whatever evaluations draw in between."""
        with seeded(seed_from(self.args.seed, self.state.global_step, "order"), self.accelerator.device):
            return super()._prepare_inputs(rows)

    def _generate_and_score_completions(self, inputs):
        """TRL's hook, once per optimizer step: the rows of all its micro-batches, padded on the right."""
        if any(t.training or any(p.requires_grad for p in t.parameters()) for t in self.teachers):
            raise ConfigError(
                "the teacher is in training mode or requires gradients: leave it frozen, it is not part of the run"
            )
        prompts, completions, sources, numbers = self.complete(inputs)
        self.record_completions(prompts, completions, sources)
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        labels = pad([[IGNORE] * len(p) + c for p, c in zip(prompts, completions, strict=True)], IGNORE)
        scored = (labels != IGNORE).sum().to(self.accelerator.device)
        batch = {
            "input_ids": pad(rows, self._tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
            "labels": labels,
            "own": torch.tensor([source in OWN for source in sources]),
            "teacher": torch.tensor(numbers),
        }
        if self.args.teacher_offload:
            batch["targets"] = self.states_ahead(batch)
        # still on the host, where looking at it waits for nothing
        return {**batch, "num_items_in_batch": self.accelerator.gather(scored).sum()}

    @torch.no_grad()
    def states_ahead(self, batch):
        """Hidden states of each row's teacher [B, T, D], in main memory; one teacher at a time is on the device."""
        targets, size = None, self.args.per_device_train_batch_size
        for number, teacher in enumerate(self.teachers):
            places = (batch["teacher"] == number).nonzero()[:, 0]
            if not len(places):
                continue
            with self.at_work(teacher) as network, self.accelerator.autocast():
                for rows in places.split(size):
                    forward = self.on_device({name: batch[name][rows] for name in FORWARD})
                    hidden = network(**forward, use_cache=False, with_head=lambda hidden, teacher: hidden).cpu()
                    if targets is None:
                        targets = hidden.new_zeros(len(batch["teacher"]), *hidden.shape[1:])
                    if hidden.shape[2] != targets.shape[2]:
                        raise ConfigError(
                            f"teacher_offload: teachers of hidden sizes {targets.shape[2]} and {hidden.shape[2]}; expected one size"
                        )
                    targets[rows] = hidden
        return targets

    def on_device(self, tensors):
        return {name: x.to(self.accelerator.device, non_blocking=True) for name, x in tensors.items()}

    def record_completions(self, prompts, completions, sources):
        """Metrics and tables of a generation batch, over all ranks; what is odd about it is said here."""
        mode = "train" if self.model.training else "eval"
        metrics, ends, facts = self._metrics[mode], set(self.eos_token_ids), []
        for p, c, s in zip(prompts, completions, sources, strict=True):
            empty = len(c) == 1 and c[0] in ends and s in OWN
            facts.append([len(p), len(c), c[-1] in ends, empty, s in OWN, *(s == name for name in SOURCES)])
        # of one process they stay on the host
        device = self.accelerator.device if self.accelerator.num_processes > 1 else None
        facts = self.accelerator.gather(torch.tensor(facts, dtype=torch.float32, device=device))
        before, length, ended, empty, own, *written = facts.T
        values = {"mean_length": length.mean(), "min_length": length.min(), "max_length": length.max()}
        values |= {"clipped_ratio": 1 - ended.mean(), "empty_ratio": empty.sum() / own.sum().clamp_min(1)}
        values = {f"completions/{name}": value for name, value in values.items()}
        values |= {f"source/{name}": chosen.mean() for name, chosen in zip(SOURCES, written, strict=True)}
        tokens, *numbers = torch.stack([(before + length).sum(), *values.values()]).tolist()
        if mode == "train":
            self.state.num_input_tokens_seen += int(tokens)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in zip(values, numbers, strict=True):
            metrics[name].append(value)
        if mode == "train":
            self.check_empty(metrics["completions/empty_ratio"][-1])
        if self.log_completions:
            for name, ids in ("prompt", prompts), ("completion", completions):
                texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
                self._logs[name].extend(gather_object(texts))

    def check_empty(self, share):
        """Warn of completions that end at once, and stop when next to nothing else comes, batch after batch."""
        self.empty_batches = self.empty_batches + 1 if share > self.args.max_empty_share else 0
        if share > 0.5:
            warnings.warn(f"{share:.0%} of the student's completions end with their first token", stacklevel=2)
        if self.empty_batches >= PATIENCE:
            raise DataError(
                f"step {self.state.global_step}: for {PATIENCE} steps more than {self.args.max_empty_share:.0%} of the student's completions were "
                "empty, nothing is learned from them; lower lmbda to show it completions of the data, or look at the prompts"
            )

    # --- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Divergence of each row from its own teacher, per completion token of the whole step."""
        self.scored_inputs = {name: x for name, x in inputs.items() if name != "targets"}
        forward = self.on_device({name: inputs[name] for name in FORWARD}) | {"use_cache": False}
        # [B, T]: the token that each position predicts; inputs are on the host, where looking at them waits for nothing
        labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
        scored = labels != IGNORE
        labels = torch.where(inputs["own"][:, None], IGNORE, labels) if self.args.ce_weight else labels
        items = max(int(scored.sum()), 1)
        if self.model.training:  # gradients are averaged over ranks
            items = inputs["num_items_in_batch"].clamp_min(1) / self.accelerator.num_processes
        numbers = inputs["teacher"].unique().tolist()
        groups = [(inputs["teacher"] == number).nonzero()[:, 0] for number in numbers]  # rows of each teacher
        ahead = inputs.get("targets")
        parts = []
        for number, rows in zip(numbers, groups, strict=True):
            place = scored[rows].flatten().nonzero()[:, 0]  # [N]
            label = labels[rows].flatten()[place]
            counts = (label != IGNORE).sum().item(), len(label)
            here = self.on_device({"rows": rows, "place": place, "label": label})
            target, head = self.targets_of(number, rows, here["rows"], here["place"], forward, ahead)
            parts.append((*here.values(), target, head, counts))

        def objective(hidden, student):
            return [
                self.objective(hidden[rows], student, place, label, target, items, self.size, head)
                for rows, place, label, target, head, _ in parts
            ]

        terms, balance = balanced_forward(self, model, self.balance, **forward, with_head=objective)
        self.record_loss(numbers, terms, [counts for *_, counts in parts])
        loss = sum(term.loss for term in terms)
        loss = loss if balance is None else loss + balance
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def targets_of(self, number, rows, rows_here, place, forward, ahead):
        """`(targets, LMHead)` of one teacher's rows, from its forward or from the states that it left; `rows` on the host
        and on the device, `place` [N] on the device.
        """
        device, select = self.accelerator.device, Selection("dense", size=self.size)
        if ahead is not None:
            head = head_of(self.teachers[number], self.size)
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
            return select(ahead[rows].to(device, non_blocking=True), None, place), head

        def states(hidden, teacher):
            return select(hidden, teacher, place), head_of(teacher, self.size)

        own = {k: x[rows_here] if torch.is_tensor(x) else x for k, x in forward.items()}
        with self.accelerator.autocast():
            return self.teachers[number](**own, with_head=states)

    @torch.no_grad()
    def record_loss(self, numbers, terms, counts):
        """Metrics of a micro-batch over all ranks, and where there are several teachers of each one's tokens; counts: of
        those that have a label, and of all.
        """
        sums = torch.zeros(len(self.teachers), 5, device=self.accelerator.device)
        for number, term, (labelled, count) in zip(numbers, terms, counts, strict=True):
            parts = (term.kl, term.agreement, term.ce, *(torch.full_like(term.kl, n) for n in (labelled, count)))
            sums[number] = torch.stack([x.detach().float() for x in parts])
        self.readings.note(
            "train" if self.model.training else "eval", self.accelerator.gather(sums[None]).sum(0), self.means
        )

    def means(self, sums):
        """`{metric: value}` of the teachers' sums, five numbers of each."""
        rows = [sums[j : j + 5] for j in range(0, len(sums), 5)]
        kl, agreement, ce, labelled, count = map(sum, zip(*rows, strict=True))
        values = {"divergence": kl / max(count, 1), "top1_agreement": agreement / max(count, 1)}
        if labelled:
            values["ce" if self.args.ce_weight else "nll"] = ce / labelled
        for name, (kl, agreement, _, _, count) in zip(self.names, rows, strict=True):
            if name is not None and count:
                values |= {f"{name}/divergence": kl / count, f"{name}/top1_agreement": agreement / count}
        return values

    def run_facts(self):
        """For `Resumable`: a run with another teacher is another run."""
        return {"teacher": self.teacher_digest}
