"""The training stages: a checkpoint directory in, one out.

Each runs in one process, or in every process of `accelerate launch`; the first one writes.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from xlstm_hybrid.checkpoint.digests import TRUSTED, weights_hash
from xlstm_hybrid.checkpoint.files import (
    add_provenance,
    check_space,
    discard,
    not_written,
    owner,
    read_provenance,
    remove,
    remove_abandoned,
    staged,
    write_json,
    write_manifest,
)
from xlstm_hybrid.conversion.convert import load_teaching
from xlstm_hybrid.conversion.load import load, load_tokenizer
from xlstm_hybrid.data import collate, joint_prompts, packed_rows, prompts, train_dataset
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import CheckpointWriteError, ConfigError, StoreError
from xlstm_hybrid.pipeline.settings import is_main, row_count, trainer_config
from xlstm_hybrid.recipe.schema import resolve_path
from xlstm_hybrid.teacher_store.writer import read_index

HELD_OUT_ROWS = 16  # on which an alignment is measured before and after
CALIBRATION_TOKENS = 8192  # that stage 0 is fitted to where nothing else is said
CALIBRATION_BATCH = 4096  # tokens at a time
log = logging.getLogger(__name__)
RESERVED = "reserved"  # file of a workspace that keeps room for the student
SPARE_BYTES = 2**24  # of a student's files beside its weights: tokenizer, log, pictures
LOGGED = ("loss", "ce", "kl", "divergence", "nll", "top1_agreement", "kept_mass")


def loading_device(args):
    """Where a stage loads its student: on the process's device, or in main memory if accelerate will shard it."""
    return "cpu" if sharded(args) else args.device


def sharded(args):
    """Whether accelerate will shard the model: then it is not called outside of training."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def load_teacher(teacher, recipe, args):
    """The teacher of a stage, in the recipe's dtype; at the recipe's revision if it is the recipe's teacher."""
    revision = recipe.revision if str(teacher) == recipe.teacher else None
    warn_if_slow(args.device, recipe.teacher_dtype, "teacher_dtype")
    return load_teaching(teacher, recipe.teacher_dtype, revision, loading_device(args))


@contextlib.contextmanager
def workspace(out, settings=None, student=None):
    """A directory beside `out` for what a stage needs while it runs.

    With a `save_strategy` it is `.run-<name of out>`: it stays when the stage is interrupted, so that the same command
    goes on from the newest checkpoint in it. Otherwise each process has its own, which is gone afterwards; only if there
    is a checkpoint in it after all, because the last write failed (`finish`), it stays as `.run-<name of out>`.

    Args:
        student: directory of weights; as much has to be free for those of `out`.
    """
    out = Path(out).absolute()
    resumed = out.with_name(f".run-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if is_main():
            remove_abandoned(out)
            if student is not None:
                check_space(out, sum(path.stat().st_size for path in Path(student).glob("*.safetensors")))
        if (settings or {}).get("save_strategy", "no") != "no":
            resumed.mkdir(exist_ok=True)
        own = not resumed.exists()
        # `remove_abandoned` knows it by its name if this process is killed
        folder = (
            Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-{owner(os.getpid())}-", dir=out.parent)) if own else resumed
        )
    except OSError as error:
        raise not_written(out, error) from error
    try:
        yield folder
    except BaseException:
        release(folder)
        if own and any(folder.glob("checkpoint-*")):
            os.rename(folder, resumed)
        raise
    else:
        if is_main():
            discard(resumed)
    finally:
        if own:
            remove(folder)


def train_from_newest(trainer, work, out):
    """Train, from the newest good checkpoint in `work` if there is one.

    The room that the student will take is reserved before: a disk that others fill meanwhile does not cost the
    training.

    Raises:
        CheckpointWriteError: there is no room for the student, or for the checkpoints of a run that has none yet.
    """
    resumed = any(work.glob("checkpoint-*"))
    if is_main():
        release(work)
        size, file = room_for(trainer), work / RESERVED
        check_space(out, size + (0 if resumed else room_for_checkpoints(trainer, size)))
        try:
            with open(file, "wb") as reserved:
                os.posix_fallocate(reserved.fileno(), 0, size)
        except OSError as error:
            release(work)
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that reserves nothing
                raise not_written(out, error, size) from error
    trainer.train(resume_from_checkpoint=resumed or None)


def release(work):
    """Give back the room that was reserved for the student."""
    with contextlib.suppress(OSError):
        (work / RESERVED).unlink()


def room_for(trainer):
    """Bytes of the student that a trainer will leave: its tensors, each of them once, and a little for its other files."""
    parameters = {id(p): p.numel() * p.element_size() for p in trainer.model.parameters()}
    return int(1.02 * sum(parameters.values())) + SPARE_BYTES


def room_for_checkpoints(trainer, size):
    """Bytes of the checkpoints that will lie beside each other, two moments in float32 for each trained number."""
    if trainer.args.save_strategy == "no":
        return 0
    moments = sum(8 * p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return (size + moments) * ((trainer.args.save_total_limit or 1) + 1)


def rows_cache(work):
    """Where a process keeps its rows."""
    return str(work / f"rows-{os.environ.get('RANK', 0)}")


def calibrate(student, out, recipe, overwrite=False, tokens=None, report=lambda layer, figures: None):
    """Stage 0: feature maps and gates of a converted student in closed form.

    Args:
        tokens: of text that they are fitted to, in the place of the recipe's; a quarter as many are held out.
        report: called with each layer's number and figures.
    Returns:
        {layer: {"window", "before", "after", "closed", "heads"}}, see `calibration.calibrate_model`.
    """
    from xlstm_hybrid.training.calibration import calibrate_streamed

    tokenizer = load_tokenizer(student)
    rows = max(4, -(-(tokens or calibration_tokens(recipe) or CALIBRATION_TOKENS) // recipe.length))
    size = max(1, CALIBRATION_BATCH // recipe.length)
    parts = (packed_rows(recipe, tokenizer, count, test=test) for count, test in ((rows, False), (-(-rows // 4), True)))
    fitted, held_out = (without_labels(batches_of(part, size)) for part in parts)
    device = device_of()
    return calibrate_streamed(student, out, fitted, held_out, device, overwrite=overwrite, report=report)


def calibration_tokens(recipe):
    """Tokens that stage 0 is fitted to; 0: the recipe has none."""
    return 0 if recipe.calibrate is None else recipe.calibrate.get("tokens", CALIBRATION_TOKENS)


def align(student, out, recipe, overwrite=False, overrides=None):
    """Stage I: train feature maps and gates of a converted student.

    Args:
        overrides: fields of `AlignmentConfig` that go before the recipe's.
    Returns:
        The figures that it also writes: {"relative_error": [{"layer", "before", "after"}]}, on rows that nothing trains
        on (of a sharded model: on the first and the last rows that it was trained on).
    """
    from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment

    start, settings = time.time(), recipe.align | (overrides or {})
    count = row_count(settings, "align")
    with workspace(out, settings, student) as work:
        args = trainer_config(AlignmentConfig, settings, "align", work, recipe.seed)
        if args.layers_at_a_time:  # interrupted, it goes on from its own folder beside `out`
            return align_in_groups(student, out, recipe, args, count, work, overwrite)
        model, tokenizer = load(student, device=loading_device(args))
        batches = held_out_batches(recipe, tokenizer)
        before = {} if sharded(args) else measure_alignment(model, batches)
        data = train_dataset(recipe, tokenizer, count, cache=rows_cache(work))
        trainer = AlignmentTrainer(model, args, data_collator=collate, processing_class=tokenizer, train_dataset=data)
        train_from_newest(trainer, work, out)
        log = trainer.state.log_history
        after = {} if sharded(args) else measure_alignment(model.float(), batches)
        if sharded(args):
            before, after = logged_errors(log, 0), logged_errors(log, -1)
        figures = {"relative_error": [{"layer": n, "before": before[n], "after": after[n]} for n in before]}
        finish(trainer, out, "align", [student], settings, recipe.data, figures, start, overwrite)
    return figures


def align_in_groups(student, out, recipe, args, count, work, overwrite):
    """Stage I with `layers_at_a_time` layers in memory."""
    from xlstm_hybrid.training.alignment_by_groups import align_streamed

    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    data = train_dataset(recipe, tokenizer, count, cache=rows_cache(work))
    more = {"dtype": torch.float32, "held_out": held_out_batches(recipe, tokenizer), "overwrite": overwrite}
    figures = align_streamed(student, out, args, data, collate, tokenizer, **more)
    return {"relative_error": figures["relative_error"]}


def held_out_batches(recipe, tokenizer, size=8):
    rows = packed_rows(recipe, tokenizer, HELD_OUT_ROWS, test=True)
    size = min(size, max(1, 2**14 // recipe.length))
    return without_labels(batches_of(rows, size))


def without_labels(batches):
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def batches_of(rows, size):
    return [collate(rows[j : j + size]) for j in range(0, len(rows), size)]


def logged_errors(log, which):
    """`{layer: relative error}` of the first (0) or last (-1) entry of a log that has them."""
    ending = "/relative_error"
    entry = [e for e in log if any(key.endswith(ending) for key in e)][which]
    return {int(k.removeprefix("layer_").removesuffix(ending)): v for k, v in entry.items() if k.endswith(ending)}


def distill(student, teacher, out, recipe, expert, overwrite=False, overrides=None):
    """Stage II: one domain expert by sparse knowledge distillation; returns the figures that it also writes.

    Args:
        teacher: checkpoint directory or Hub id. It is loaded unless the setting `teacher` names a store of its targets
            for these rows.
        expert: its name in the recipe.
        overrides: fields of `SparseKDConfig` that go before the recipe's.
    """
    from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

    start, settings = time.time(), recipe.distill | (overrides or {})
    if (store := settings.get("teacher", "online")) != "online":
        settings["teacher"] = str(resolve_path(recipe, store) or store)
        check_store_teacher(settings["teacher"], teacher)
    with workspace(out, settings, student) as work:
        args = trainer_config(SparseKDConfig, settings, "distill", work, recipe.seed)
        model, tokenizer = load(student, device=loading_device(args))
        data = train_dataset(recipe, tokenizer, row_count(settings, "distill"), expert, cache=rows_cache(work))
        mentor = load_teacher(teacher, recipe, args) if args.teacher == "online" else None
        trainer = SparseKDTrainer(
            model, mentor, args=args, data_collator=collate, processing_class=tokenizer, train_dataset=data
        )
        train_from_newest(trainer, work, out)
        figures, mix = last_figures(trainer.state.log_history), recipe.experts[expert]
        finish(trainer, out, f"distill:{expert}", [student, teacher], settings, mix, figures, start, overwrite)
    return figures


def check_store_teacher(store, teacher):
    """Raise StoreError where the targets of a store are another teacher's than the one beside it."""
    spec, name = read_index(store)["spec"], Path(store).name
    if Path(teacher).is_dir():
        made, expected = spec["weights"], weights_hash(teacher)
    else:  # a hub id, known by its name where the store's teacher came from the hub, too
        made, expected = (spec["teacher"] if spec["revision"] else teacher), str(teacher)
    if made == expected:
        return
    text = f"{name} holds the targets of {spec['teacher']} ({made[:12]}), the teacher beside it is {Path(teacher).name} ({expected[:12]})"
    if TRUSTED.get():
        log.warning("%s: used all the same (--trust)", text)
        return
    raise StoreError(f"{text}: name the store's teacher, or make a store of this one with `xlstm-hybrid cache-teacher`")


def on_policy(student, teacher, out, recipe, expert, overwrite=False, overrides=None):
    """Distillation on the student's own samples, after stage II; returns the figures that it also writes.

    Args:
        expert: its name in the recipe; its data give the prompts.
        overrides: fields of `OnPolicyKDConfig` that go before the recipe's.
    Raises:
        ConfigError: the recipe has no section on_policy.
    """
    from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

    if recipe.on_policy is None:
        raise ConfigError(
            f"{recipe.path.name}: no section on_policy, expected the fields of OnPolicyKDConfig, max_steps among them"
        )
    start, settings = time.time(), recipe.on_policy | (overrides or {})
    with workspace(out, settings, student) as work:
        args = trainer_config(OnPolicyKDConfig, settings, "on_policy", work, recipe.seed)
        model, tokenizer = load(student, device=loading_device(args))
        mentor, rows = load_teacher(teacher, recipe, args), row_count(settings, "on_policy")
        data = prompts(recipe, tokenizer, rows, expert)
        trainer = OnPolicyKDTrainer(model, mentor, args=args, train_dataset=data, processing_class=tokenizer)
        train_from_newest(trainer, work, out)
        figures, mix = last_figures(trainer.state.log_history), recipe.experts[expert]
        finish(trainer, out, f"on-policy:{expert}", [student, teacher], settings, mix, figures, start, overwrite)
    return figures


def multi_teacher(student, experts, out, recipe, overwrite=False, overrides=None):
    """The experts teach one student on its own samples, each on the prompts of its domain; returns the figures that it
    also writes.

    Args:
        student: the aligned start of the experts, or what they were merged into.
        experts: {name in the recipe: checkpoint directory}; prompts come in the recipe's merge weights, in equal shares
            where it has none.
        overrides: fields of `OnPolicyKDConfig` that go before those of the recipe's section merge.on_policy.
    Raises:
        ConfigError: no number of steps, an expert that the recipe does not have, a tokenizer that is not the student's.
    """
    from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

    section, where = recipe.merge or {}, "merge.on_policy"
    start, settings = time.time(), section.get("on_policy", {}) | (overrides or {})
    if "max_steps" not in settings:
        raise ConfigError(
            f"{recipe.path.name}: no section {where}, expected the fields of OnPolicyKDConfig, max_steps among them; or give --max_steps"
        )
    shares = {name: section.get("weights", {}).get(name, 1.0) for name in experts if recipe.mix(name)}
    taught = {name: share for name, share in shares.items() if share > 0}
    if not taught:
        raise ConfigError(
            f"{where}: the experts {sorted(experts)} have no share of the prompts; give one of them a weight above 0"
        )
    with workspace(out, settings, student) as work:
        args = trainer_config(OnPolicyKDConfig, settings, where, work, recipe.seed)
        model, tokenizer = load(student, device=loading_device(args))
        warn_if_slow(args.device, recipe.teacher_dtype, "teacher_dtype")
        place = "cpu" if args.teacher_offload else loading_device(args)
        loaded = {name: load(experts[name], recipe.teacher_dtype, device=place) for name in taught}
        trainer = OnPolicyKDTrainer(
            model,
            {name: teacher for name, (teacher, _) in loaded.items()},
            args=args,
            train_dataset=joint_prompts(recipe, tokenizer, row_count(settings, where), taught),
            processing_class=tokenizer,
            teacher_tokenizer={name: its for name, (_, its) in loaded.items()},
        )
        train_from_newest(trainer, work, out)
        parts = [f"{name}/{key}" for name in taught for key in ("divergence", "top1_agreement")]
        figures, total = last_figures(trainer.state.log_history, parts), sum(taught.values())
        data = {name: {"share": taught[name] / total, "reads": recipe.experts[name]} for name in taught}
        known = read_provenance(student)  # and what the experts went through since then
        known += [stage for name in experts for stage in read_provenance(experts[name]) if stage not in known]
        parents, data = [student, *experts.values()], {"experts": data}
        finish(trainer, out, "multi-teacher", parents, settings, data, figures, start, overwrite, known)
    return figures


def last_figures(log, more=()):
    """The newest figures of a training log, and the newest of `more`: of a teacher that the last step had no prompts
    of, those of an earlier step.
    """
    last = next((entry for entry in reversed(log) if "loss" in entry), {})
    latest = {key: entry[key] for entry in log for key in more if key in entry}
    return {key: float(value) for key, value in ({key: last[key] for key in LOGGED if key in last} | latest).items()}


def finish(trainer, out, stage, parents, settings, data, figures, start, overwrite, stages=None):
    """Write the student of a finished stage: all processes gather it, the first one writes, and the others wait until
    it is there.
    """
    from xlstm_hybrid.training.checkpoints import collect_weights, shared
    from xlstm_hybrid.training.distributed import first_process_works
    from xlstm_hybrid.training.metrics import PLOTS

    accelerator, failed = trainer.accelerator, None
    state, _ = collect_weights(trainer)  # None unless the model is sharded
    model = accelerator.unwrap_model(trainer.model)
    if state is None and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    accelerator.wait_for_everyone()
    with first_process_works(f"writing {Path(out).name}"):
        if accelerator.is_main_process:
            try:
                size = room_for(trainer)
                release(Path(trainer.args.output_dir))
                with staged(out, overwrite=overwrite, needed=size) as folder:
                    model.save_pretrained(folder, state_dict=state)
                    trainer.processing_class.save_pretrained(folder)
                    for picture in sorted((Path(trainer.args.output_dir) / PLOTS).glob("*.png")):
                        shutil.copyfile(picture, folder / picture.name)
                    write_json(folder / "training_log.json", trainer.state.log_history)
                    record = {
                        "data": data,
                        "figures": figures,
                        "seconds": round(time.time() - start, 1),
                        "stages": stages,
                    }
                    record["config"] = {**settings, "bf16": trainer.args.bf16, "seed": trainer.args.seed}
                    add_provenance(folder, stage, parent=parents[0], **record)
                    write_manifest(folder)
            except CheckpointWriteError as error:  # all processes learn of it, and keep the training
                failed = str(error)
    if failed := shared(trainer, failed):
        raise CheckpointWriteError(f"{failed}; {kept(trainer, out)}")


def kept(trainer, out):
    """Words for what is kept of a training whose student could not be written: its newest checkpoint, or one made now.
    All processes take part.
    """
    step = trainer.state.global_step
    again = f"make room or allow writing there and start the same command again, it goes on from step {step} of {step}"
    try:
        if not (Path(trainer.args.output_dir) / f"checkpoint-{step}").is_dir():
            trainer._save_checkpoint(trainer.model, None)
    except CheckpointWriteError as error:
        return f"the training is lost from the newest checkpoint on, {error}"
    return f"the training is finished and kept in .run-{Path(out).name}: {again}"


def prepare(tokenizer, out, recipe, expert=None, count=None, overwrite=False):
    """Write the rows of stage I, or of one expert, as a `datasets` directory, for `cache-teacher` and for a look at
    them; returns their number.

    Args:
        tokenizer: checkpoint directory or Hub id.
        count: rows; what the recipe's steps read by default.
    """
    from datasets import Dataset

    if not is_main():
        return 0
    section = "align" if expert is None else "distill"
    count = count or row_count(getattr(recipe, section), section)
    revision = recipe.revision if tokenizer == recipe.teacher else None
    tokenizer = load_tokenizer(tokenizer, revision)
    with workspace(out) as work, staged(out, overwrite=overwrite) as folder:
        found = train_dataset(recipe, tokenizer, count, expert, cache=rows_cache(work))
        if not isinstance(found, Dataset):
            how = {"features": found.features, "cache_dir": str(work), "fingerprint": f"rows-{count}"}
            found = Dataset.from_generator(found.__iter__, **how)
        found.save_to_disk(folder)
        return len(found)
