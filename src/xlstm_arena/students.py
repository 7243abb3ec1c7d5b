"""How an arm makes a student: the teacher's checkpoint in, a trained student's checkpoint out, by the public conversion
and trainers.

Every arm reads the same rows for a seed, stage and data; float32 on a CPU. Dims: L tokens of a row.
"""

import contextlib
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback

from xlstm_arena import data
from xlstm_arena.teacher import tokenizer
from xlstm_hybrid.checkpoint.files import add_provenance, digest, staged, write_json, write_manifest
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.data import IGNORE, collate
from xlstm_hybrid.distil_xlstm import convert as convert_distil
from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer
from xlstm_hybrid.errors import ConfigError, DataError
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.model.adapters import lora_config
from xlstm_hybrid.pipeline.settings import batch_of, trainer_config
from xlstm_hybrid.planning.layers import keep_groups, rank_groups, set_kept_groups
from xlstm_hybrid.recipe.merge_settings import NEED_BASE
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment
from xlstm_hybrid.training.calibration import calibrate_model
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

CONFIGS = {"align": AlignmentConfig, "distill": SparseKDConfig, "on_policy": OnPolicyKDConfig, "delta": DeltaKDConfig}
FACTS = "arena.json"  # in a student's directory: what its training cost and what it logged
OURS = {"bf16": False, "disable_tqdm": True, "logging_steps": 25}  # an arm may say otherwise
HELD_OUT_ROWS = 8  # on which an alignment is measured
# rows of stages and tests come from seeds of their own
SEEDS = {
    "calibrate": 5,
    "closing": 6,
    "align": 1,
    "distill": 2,
    "on_policy": 3,
    "delta": 2,
    "held out": 8,
    "ranking": 7,
    "test": 9,
}
RANKING = {"length": 512, "rows": 16}  # on which KV groups are ranked
LOGGED = ("loss", "ce", "kl", "divergence", "nll", "frobenius", "top1_agreement", "kept_mass")
LOGGED = (*LOGGED, "completions/mean_length")


load_float32 = partial(load_model, device="cpu")  # trainers move it


def seed_for(seed, what):
    return 10 * seed + SEEDS[what]


def changed(model, changes):
    """The same weights under a config with other fields.

    Raises:
        ConfigError: fields that describe no model, or one of other parameters.
    """
    if not changes:
        return model
    changes = dict(changes)
    if "kept_groups" in changes:
        model = keep_groups(model, changes.pop("kept_groups"))  # the groups that stay mixed keep their mixers
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    other = type(model)(type(model.config)(**{**values, **changes})).to(model.dtype)
    weights, shapes = model.state_dict(), {name: x.shape for name, x in other.state_dict().items()}
    before = {name: x.shape for name, x in weights.items()}
    if wrong := sorted(name for name in {*before, *shapes} if before.get(name) != shapes.get(name)):
        raise ConfigError(
            f"{changes} changes the parameters of the student ({len(wrong)}, first {wrong[0]}): train an arm of its own"
        )
    other.load_state_dict(weights)
    return other.eval()


# --- stages ----------------------------------------------------------------------------------------------------


class Training:
    """One arm of an arena on one teacher with one seed. `run()` writes the student; `facts` is what it cost and logged.

    work: a folder of its own. starts: from the name of an arm to the directory of its student.
    """

    def __init__(self, arena, arm, teacher, seed, work, starts, progress=print):
        self.arena, self.arm, self.seed = arena, arm, seed
        self.work, self.starts, self.progress = Path(work), starts, progress
        self.teacher_dir = arena.teacher_dir(teacher)
        self.facts = {"tokens": {}, "seconds": {}, "cpu_seconds": {}, "figures": {}}

    def args_of(self, stage, changes=None):
        """The stage's config, its micro-batches' rows included, for `steps` of its own where `changes` says so."""
        given, _ = self.arena.settings(self.arm, stage)
        settings = {**OURS, **given, **(changes or {})}
        settings["logging_steps"] = min(settings["logging_steps"], settings["max_steps"])
        settings |= {"log_completions": False} if stage == "on_policy" else {}
        where = f"arms.{self.arm.name}.{stage}"
        return trainer_config(CONFIGS[stage], settings, where, self.work / "trainer", self.seed)

    def rows_of(self, stage, changes=None, share=None):
        """The rows that a stage reads, as lists."""
        given, rows = self.arena.settings(self.arm, stage)
        micro, accumulation = batch_of({"per_device_train_batch_size": 8} | given, stage)
        count = {**given, **(changes or {})}["max_steps"] * micro * accumulation
        share = rows["recall_share"] if share is None else share
        return data.rows(seed_for(self.seed, stage), rows["length"], count, recall_share=share)

    @contextlib.contextmanager
    def timed(self, stage, tokens):
        """Wall-clock and CPU seconds of the block, added up per stage, and the tokens that it reads."""
        start, cpu = time.time(), time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="(torch|trl|accelerate).*")
            yield
        spent = {"seconds": time.time() - start, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}
        for name, value in spent.items():
            self.facts[name][stage] = round(self.facts[name].get(stage, 0) + value, 2)
        figures = self.facts["figures"].get(stage, {})
        last = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float))
        self.progress(f"{stage}: {self.facts['cpu_seconds'][stage]:.0f} CPU s, {last}")

    def train(self, trainer, stage):
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
        self.facts["figures"][stage] = {key: float(last[key]) for key in LOGGED if key in last}
        return trainer.accelerator.unwrap_model(trainer.model)

    def shared(self, rows):
        """What every trainer is given."""
        from datasets import Dataset

        return {"train_dataset": Dataset.from_list(rows), "data_collator": collate, "processing_class": tokenizer()}

    def calibrate(self, model):
        """Stage 0: the new parameters in closed form."""
        given, _ = self.arena.settings(self.arm, "calibrate")
        rows = self.rows_of("calibrate")
        length, size = len(rows[0]["input_ids"]), given.get("per_device_train_batch_size", 8)
        held_out = data.rows(seed_for(self.seed, "closing"), length, -(-len(rows) // 4))
        with self.timed("calibrate", length * len(rows)):
            parts = (
                [{"input_ids": collate(x[n : n + size])["input_ids"]} for n in range(0, len(x), size)]
                for x in (rows, held_out)
            )
            figures = calibrate_model(model, *parts)
            self.facts["figures"]["calibrate"] = {"relative_error": [{"layer": n, **x} for n, x in figures.items()]}
        return model

    def align(self, model):
        args, rows = self.args_of("align"), self.rows_of("align")
        held_out = data.rows(seed_for(self.seed, "held out"), len(rows[0]["input_ids"]), HELD_OUT_ROWS)
        batch = {"input_ids": collate(held_out)["input_ids"]}
        before = measure_alignment(model, [batch])
        with self.timed("align", sum(len(r["input_ids"]) for r in rows)):
            self.train(AlignmentTrainer(model=model, args=args, **self.shared(rows)), "align")
        after = measure_alignment(model, [batch])
        errors = [{"layer": n, "before": before[n], "after": after[n]} for n in before]
        self.facts["figures"]["align"]["relative_error"] = errors
        return model

    def distill(self, model, name="distill", changes=None, share=None):
        """Stage II; of an expert with `changes` of the config and a recall share of its own."""
        args, rows = self.args_of("distill", changes), self.rows_of("distill", changes, share)
        peft = None if self.arm.lora is None else lora_config(model, **self.arm.lora)
        with self.timed(name, sum(len(r["input_ids"]) for r in rows)):
            trainer = SparseKDTrainer(
                model, load_float32(self.teacher_dir), args, peft_config=peft, **self.shared(rows)
            )
            for parameter_name, parameter in trainer.model.named_parameters():
                if parameter_name.split(".")[-2] in (self.arm.freeze or ()):
                    parameter.requires_grad_(False)  # the optimiser is made when training begins
            model = self.train(trainer, name)
        return model.merge_and_unload() if peft is not None else model

    def on_policy(self, model, name="on_policy", changes=None, share=None):
        """Distillation on the student's answers to the last question of a row; arguments as of `distill`."""
        args, rows = self.args_of("on_policy", changes), self.rows_of("on_policy", changes, share)
        rows = [row_question(row["input_ids"], row["labels"], args.max_completion_length) for row in rows]
        shared = {k: v for k, v in self.shared(rows).items() if k != "data_collator"}
        with self.timed(name, sum(len(r["prompt"].split()) + args.max_completion_length for r in rows)):
            return self.train(OnPolicyKDTrainer(model, load_float32(self.teacher_dir), args, **shared), name)

    def delta(self, model):
        args, rows = self.args_of("delta"), self.rows_of("delta")
        with self.timed("delta", sum(len(r["input_ids"]) for r in rows)):
            return self.train(DeltaKDTrainer(model, load_float32(self.teacher_dir), args, **self.shared(rows)), "delta")

    def experts(self, model):
        """One student per expert from the same start, each with its part of the steps, merged."""
        start, names = self.save(model, self.work / "start", "start", self.teacher_dir), list(self.arm.experts)
        experts = []
        for number, name in enumerate(names):
            self.seed, seed = self.seed + 1000 * number, self.seed  # experts read rows of their own
            try:
                expert = load_float32(start)
                for stage in self.arm.expert_stages or ("distill",):
                    steps = self.arena.settings(self.arm, stage)[0]["max_steps"] // len(names)
                    share = self.arm.experts[name].get("recall_share")
                    expert = getattr(self, stage)(expert, f"{stage} {name}", {"max_steps": steps}, share)
                    expert = reloaded(expert)
            finally:
                self.seed = seed
            experts.append(self.save(expert, self.work / name, f"distill:{name}", start))
        options = dict(self.arm.merge or {})
        weights = options.pop("weights", None)
        options |= {"base": start} if options.get("method") in NEED_BASE else {}
        merge(
            experts, self.work / "merged", weights=None if weights is None else [weights[n] for n in names], **options
        )
        return load_float32(self.work / "merged")

    def convert(self):
        """The student before training: of a conversion, or another arm's."""
        if self.arm.start is not None:
            return changed(load_float32(self.starts(self.arm.start)), self.arm.student)
        out, options = self.work / "converted", {"dtype": "float32"} | self.arena.student_options(self.arm)
        if self.arm.kind == "hybrid":
            convert(self.teacher_dir, out, overwrite=True, **options)
        else:
            convert_distil(self.teacher_dir, out, overwrite=True, **options | {"seed": self.seed})
        if self.arm.keep:
            convert(self.teacher_dir, out, overwrite=True, **options | self.chosen_groups(load_float32(out)))
        return load_float32(out)

    def chosen_groups(self, student):
        """Options of `convert` that keep the groups which a ranking on rows of their own puts first, or last."""
        by, count = self.arm.keep["by"], self.arm.keep["groups"]
        test = data.tests("multikey", RANKING["length"], RANKING["rows"], seed_for(self.seed, "ranking"))
        answers = torch.zeros_like(test["input_ids"], dtype=torch.bool).scatter(1, test["answer_at"] + 1, True)
        with self.timed("ranking", 0):
            found = rank_groups(student, test["input_ids"], answers, method="ablate" if by == "worst" else by)
        order = [(entry["layer"], entry["group"]) for entry in found["groups"]]
        set_kept_groups(student.config, order[-count:] if by == "worst" else order[:count])
        layout = {"kept_groups": student.config.kept_groups, "layer_types": student.config.layer_types}
        self.facts["figures"]["ranking"] = {**found, **layout}
        return layout

    def save(self, model, folder, stage, parent):
        with staged(folder, overwrite=True) as partial:
            model.save_pretrained(partial)
            figures = self.facts["figures"].get(stage)
            add_provenance(partial, stage, parent=parent, config=self.arena.resolved(self.arm), figures=figures)
            write_manifest(partial)
        return folder

    def run(self, out):
        """Train the student and write it to `out`, facts beside it; returns the facts."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        try:
            torch.manual_seed(self.seed)
            model = self.convert()
            for stage in self.arm.order:
                model = self.experts(model) if stage == "distill" and self.arm.experts else getattr(self, stage)(model)
                model = reloaded(model)
            if self.arm.restore:
                copy_modules(model, load_float32(self.teacher_dir), self.arm.restore)
            self.facts["parameters"] = sum(p.numel() for p in model.parameters())
            with staged(out, overwrite=True) as folder:
                model.save_pretrained(folder)
                config, stage = self.arena.resolved(self.arm), f"arena:{self.arm.name}"
                add_provenance(folder, stage, parent=self.teacher_dir, config=config, figures=self.facts)
                write_json(folder / FACTS, self.facts)
                write_manifest(folder)
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        return self.facts


def reloaded(model):
    """The same student without what a trainer has attached to it."""
    fresh = type(model)(model.config).to(torch.float32)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


@torch.no_grad()
def copy_modules(student, teacher, names):
    """Give modules of these names, in every layer that has them, the teacher's weights."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name.split(".")[-2] in names and name in theirs:
            parameter.copy_(theirs[name])


def row_question(ids, labels, longest):
    """A row as {"prompt", "completion"}: cut before the answer to its last ASK, or else before its last scored words.

    Raises:
        DataError: nothing is scored.
    """
    asked = [t for t in range(3, len(ids)) if labels[t] != IGNORE and ids[t - 2] == data.ASK]
    begins = asked or [t for t in range(1, len(ids)) if labels[t] != IGNORE and labels[t - 1] == IGNORE]
    if not begins:
        raise DataError("a row without a scored word asks nothing: raise its length or its recall_share")
    cut = begins[-1]
    end = next((t for t in range(cut, len(ids)) if labels[t] == IGNORE), len(ids))
    spell = lambda part: " ".join(f"<{j}>" for j in part)  # noqa: E731, in the words of the arena's tokenizer
    return {"prompt": spell(ids[:cut]), "completion": spell(ids[cut : min(end, cut + longest)])}


def teacher_digest(directory):
    """SHA-256 of a teacher's weights."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        expected = "a teacher's checkpoint with safetensors; make one, or correct the arena's teachers"
        raise ConfigError(f"{Path(directory).name}: expected {expected}")
    return [digest(file) for file in files]
