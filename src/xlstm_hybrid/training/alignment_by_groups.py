"""Stage I for a teacher that does not fit: n layers are in memory at a time, what enters them lies on disk.

Teacher-forced alignment makes layers independent of each other's training, so that groups of them can be trained one
after the other. The hidden states that enter a group are spooled micro-batch by micro-batch in the order of the joint
run, so that every layer sees what it would have seen there, and optimiser, schedule and data order are the joint run's:
the result is the same. Finished groups are listed in `streaming.json`.

Dims: B batch, T tokens, D hidden size, L layers.
"""

import copy
import json
import logging
import math
import shutil
import time
from itertools import accumulate, chain, islice
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.files import (
    FORMAT_VERSION,
    MANIFEST,
    add_provenance,
    check_space,
    digest,
    discard,
    read_json,
    read_versioned,
    staged,
    staged_file,
    weight_files,
    write_file,
    write_json,
    write_manifest,
)
from xlstm_hybrid.checkpoint.tokenizer import check_rows
from xlstm_hybrid.errors import CheckpointError, ConfigError, DataError
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.model.trained import trained_values, warn_if_edited
from xlstm_hybrid.training.alignment import TRUNK_INPUTS, AlignmentTrainer, new_parameters
from xlstm_hybrid.training.layers_at_a_time import embedded, model_of, read_tensor, trained_files, write_trained
from xlstm_hybrid.training.run_spec import check_run_spec, run_spec, short_digest

PROGRESS = "streaming.json"
log = logging.getLogger(__name__)


# --- what lies on disk -----------------------------------------------------------------------------------------


class Spool:
    """Micro-batches (`batches/<n>.safetensors`) and hidden states that enter a layer (`hidden-<layer>.bin`, mapped).

    shapes: [B, T, D] of each micro-batch.  offsets: where each begins, in elements.
    """

    def __init__(self, folder):
        self.folder, self.shapes, self.offsets, self.dtype, self.mapped = Path(folder), [], [0], None, {}
        (self.folder / "batches").mkdir(parents=True, exist_ok=True)

    def path(self, layer):
        return self.folder / f"hidden-{layer:04}.bin"

    def batch(self, n):
        return load_file(self.folder / "batches" / f"{n:07}.safetensors")

    def add_batch(self, n, batch):
        tensors = {name: batch[name].cpu().contiguous() for name in TRUNK_INPUTS if torch.is_tensor(batch.get(name))}
        write_file(self.folder / "batches" / f"{n:07}.safetensors", save(tensors), tidy=False)  # there are very many

    def write(self, layer, states):
        """Store what enters `layer`, from an iterator of [B, T, D]; complete or not there."""
        shapes, dtype = [], None
        with staged_file(self.path(layer)) as temporary, open(temporary, "wb") as file:
            for x in states:
                x = x.detach().cpu().contiguous()
                dtype = dtype or x.dtype
                if not torch.isfinite(x).all():
                    raise DataError(
                        f"the hidden states that enter layer {layer} are not finite in micro-batch {len(shapes)}: choose a wider dtype"
                    )
                file.write(x.to(dtype).view(torch.uint8).numpy())
                shapes.append(list(x.shape))
        self.lay_out(shapes, dtype)

    def lay_out(self, shapes, dtype):
        self.dtype, self.shapes, self.offsets = dtype, shapes, [0, *accumulate(math.prod(shape) for shape in shapes)]

    def read(self, layer, n):
        """[B, T, D] of micro-batch n, a copy of the mapped file."""
        if layer not in self.mapped:
            expected, path = self.offsets[-1] * self.dtype.itemsize, self.path(layer)
            if not path.is_file() or path.stat().st_size != expected:
                raise CheckpointError(
                    f"{path.name}: expected {expected} bytes of hidden states; remove {self.folder.name} to start again"
                )
            self.mapped = {layer: torch.from_file(str(path), shared=False, size=self.offsets[-1], dtype=self.dtype)}
        return self.mapped[layer][self.offsets[n] : self.offsets[n + 1]].view(self.shapes[n]).clone()

    def drop(self, layer):
        self.mapped = {}
        self.path(layer).unlink(missing_ok=True)


class Progress:
    """`streaming.json`: what the run is, and its finished groups, so that a killed run goes on from there."""

    def __init__(self, folder, spec, allowed=()):
        self.path = Path(folder) / PROGRESS
        self.value = {"format_version": FORMAT_VERSION, "spec": spec, "spool": None, "groups": []}
        if self.path.is_file():
            self.value = read_versioned(self.path, self.path.parent.name)
            check_run_spec(self.value["spec"], spec, allowed, self.path.parent)

    def spooled(self, spool, layer):
        """The hidden states that enter `layer` are complete."""
        self.value["spool"] = {"layer": layer, "dtype": str(spool.dtype).removeprefix("torch."), "shapes": spool.shapes}
        write_json(self.path, self.value)

    def finished(self, entry):
        self.value["groups"].append(entry)
        write_json(self.path, self.value)

    def restore(self, spool):
        """Put back what a spool knows; the layer that its hidden states enter, or None where there are none yet."""
        if self.value["spool"] is None:
            return None
        spool.lay_out(self.value["spool"]["shapes"], getattr(torch, self.value["spool"]["dtype"]))
        return self.value["spool"]["layer"]


# --- the run ---------------------------------------------------------------------------------------------------


class Streaming:
    """A streamed run; see `align_streamed`."""

    def __init__(self, checkpoint, args, train_dataset, data_collator, processing_class, work, dtype, held_out):
        self.args, self.data_collator, self.processing_class, self.dtype = args, data_collator, processing_class, dtype
        self.config = XLSTMHybridConfig.from_json_file(Path(checkpoint) / "config.json")
        self.files, self.work, self.held_out = weight_files(checkpoint), Path(work), list(held_out)
        n, L = args.layers_at_a_time, self.config.num_hidden_layers
        self.groups = [range(j, min(j + n, L)) for j in range(0, L, n)]
        first = next(layers for layers in self.groups if self.aligned(layers))
        joint = self.trainer(self.model_of(first), args, train_dataset, data_collator)
        self.loader = joint.get_train_dataloader()
        self.epochs, per_epoch, _, _, _, _, self.steps = joint.set_initial_training_values(args, self.loader)
        if self.epochs > 1 and self.steps > per_epoch and len(self.loader) % args.gradient_accumulation_steps:
            raise ConfigError(
                f"{len(self.loader)} micro-batches per epoch are no multiple of gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps}: over several epochs steps would be cut differently; drop some rows"
            )
        warn_if_edited(self.config, sorted(set(self.files.values())), Path(checkpoint).name)
        manifest = Path(checkpoint) / MANIFEST
        facts = {
            "checkpoint": digest(manifest) if manifest.is_file() else short_digest(sorted(self.files)),
            "dtype": str(dtype),
            "model": None,
            "held_out": short_digest([batch["input_ids"].tolist() for batch in self.held_out]),
        }
        self.work.mkdir(parents=True, exist_ok=True)
        self.spool = Spool(self.work)
        self.progress = Progress(self.work, run_spec(joint) | facts, tuple(args.allow_changes or ()))
        self.entered = self.progress.restore(self.spool)

    def aligned(self, layers):
        return any(self.config.layer_types[n] == "hybrid_sliding" for n in layers)

    def model_of(self, layers):
        return model_of(self.config, self.files, layers, self.dtype)

    def trainer(self, model, args, dataset, collator):
        given = {"train_dataset": dataset, "data_collator": collator, "processing_class": self.processing_class}
        trainer = AlignmentTrainer(model=model, args=args, **given)
        if trainer.args.world_size > 1:
            raise ConfigError(
                f"world_size={trainer.args.world_size}: a streamed run has one process; align all layers at once with FSDP2 instead"
            )
        return trainer

    def embed(self):
        """Store the micro-batches, in the order of the joint run, and what enters the first layer."""
        table = read_tensor(self.files, "model.embed_tokens.weight", self.dtype)
        count = self.steps * self.args.gradient_accumulation_steps

        def joint_batches():
            for epoch in range(self.epochs):
                if hasattr(self.loader, "set_epoch"):
                    self.loader.set_epoch(epoch)
                yield from self.loader

        def states():
            for n, batch in enumerate(chain(islice(joint_batches(), count), self.held_out)):
                if n == 0:
                    size = batch["input_ids"].numel() * table.shape[1] * table.element_size()
                    # what enters a group, and what leaves it
                    check_space(self.spool.path(0), 2.02 * size * (count + len(self.held_out)))
                self.spool.add_batch(n, batch)
                check_rows(self.processing_class, len(table), "student", batch["input_ids"].flatten().tolist())
                yield embedded(self.config, table, batch["input_ids"])

        self.spool.write(0, states())
        self.progress.spooled(self.spool, 0)
        self.entered = 0

    def inputs(self, layer, n):
        return self.spool.batch(n) | {"hidden_states": self.spool.read(layer, n)}

    def forward(self, trainer, layers):
        """What leaves a group, micro-batch by micro-batch, from the frozen trunk alone, as training calculates it."""
        for n in range(len(self.spool.shapes)):
            batch = {name: x.to(trainer.args.device) for name, x in self.inputs(layers[0], n).items()}
            with torch.no_grad(), trainer.accelerator.autocast():
                yield trainer.model.model.teacher_forced(**batch)["hidden_states"]

    def train_group(self, layers):
        """Train the layers over the spooled data; `(trainer, their errors before and after)`."""
        args, first = copy.copy(self.args), layers[0]
        args.output_dir, args.max_steps = str(self.work / f"group-{first:04}"), self.steps
        args.per_device_train_batch_size = 1
        args.train_sampling_strategy, args.dataloader_num_workers, args.num_train_epochs = "sequential", 0, 1
        rows = Dataset.from_dict({"micro_batch": list(range(len(self.spool.shapes) - len(self.held_out)))})
        model = self.model_of(layers)
        trainer = self.trainer(model, args, rows, lambda picked: self.inputs(first, picked[0]["micro_batch"]))
        before = self.measure(trainer, layers)
        trainer.train(resume_from_checkpoint=True)
        after = self.measure(trainer, layers)
        return trainer, [{"layer": n, "before": before[n], "after": after[n]} for n in after]

    @torch.no_grad()
    def measure(self, trainer, layers):
        """`{layer: relative error}` over the held-out batches; {} without any."""
        error, target = (torch.zeros(self.config.num_hidden_layers, dtype=torch.float64) for _ in range(2))
        for n in range(len(self.spool.shapes) - len(self.held_out), len(self.spool.shapes)):
            batch = {name: x.to(trainer.args.device) for name, x in self.inputs(layers[0], n).items()}
            out = trainer.model.model.teacher_forced(**batch)
            error, target = error + out.error.double().cpu(), target + out.target.double().cpu()
        return {n: (error[n] / target[n]).item() for n in layers if target[n] > 0 and self.aligned([n])}

    def run_group(self, layers):
        """Train a group if there is anything to train, store its tensors, and spool what enters the next one."""
        first, entry = layers[0], {"layers": list(layers), "file": None, "log": None, "relative_error": []}
        if self.aligned(layers):
            trainer, entry["relative_error"] = self.train_group(layers)
            tensors = {name: p.detach().cpu() for name, p in new_parameters(trainer.model).items()}
            entry["file"], entry["log"] = f"group-{first:04}.safetensors", f"group-{first:04}.json"
            write_json(self.work / entry["log"], {"log": trainer.state.log_history})
            write_file(self.work / entry["file"], save(tensors))
            entry["sha256"] = digest(self.work / entry["file"])
        else:  # without a hybrid layer there is nothing to train: what `forward` needs of a trainer
            model, accelerator = self.model_of(layers), Accelerator(mixed_precision=self.args.mixed_precision)
            trainer = SimpleNamespace(model=model.to(self.args.device), args=self.args, accelerator=accelerator)
        following = layers[-1] + 1
        if following < self.config.num_hidden_layers:
            for n in layers:
                trainer.model.model.layers[n].aligned = True  # only the trunk from here on
            self.spool.write(following, self.forward(trainer, layers))
        self.progress.value["spool"] |= {"layer": following, "dtype": str(self.spool.dtype).removeprefix("torch.")}
        self.progress.finished(entry)
        self.spool.drop(first)
        self.entered = following
        shutil.rmtree(self.work / f"group-{first:04}", ignore_errors=True)
        log.warning("layers %d to %d of %d are aligned", first, following - 1, self.config.num_hidden_layers)


def merged_log(work, groups):
    """One log of all groups, as a joint run writes it: entries of the same step are one, losses add up."""
    steps = {}
    for group in groups:
        for entry in read_json(work / group["log"], work.name)["log"] if group["log"] else ():
            if "loss" not in entry:
                continue
            merged = steps.setdefault(entry["step"], {})
            merged.update(entry, loss=merged.get("loss", 0.0) + float(entry["loss"]))
            merged.pop("grad_norm", None)
    return [steps[step] for step in sorted(steps)]


def align_streamed(
    checkpoint,
    out,
    args,
    train_dataset,
    data_collator,
    processing_class,
    work=None,
    dtype=None,
    held_out=(),
    overwrite=False,
):
    """Align a student directory with `args.layers_at_a_time` layers in memory; write another one.

    Started again after an interruption, it goes on with the group, and from the training checkpoint (`save_steps`) that
    it was at. The disk holds two sets of hidden states at a time, each (tokens of the run) x D in the dtype of the
    weights.

    Args:
        checkpoint: a converted student.  out: directory of the aligned one; it appears complete or not at all.
        args: `AlignmentConfig`.  train_dataset, data_collator, processing_class: as for `AlignmentTrainer`.
        work: directory for hidden states and progress, removed at the end; beside `out` by default.
        dtype: of weights and hidden states in memory; None: as stored.
        held_out: batches of model inputs on which each layer is measured before and after.
    Returns:
        `{"relative_error": [{"layer", "before", "after"}], "log": [...]}`; the log is that of a joint run, without the
        norm of all gradients.
    Raises:
        ConfigError: no layers at a time, several processes, or a work directory of another run.
        CheckpointError, CheckpointWriteError: a damaged checkpoint or spool, or no room for the hidden states.
    """
    if not args.layers_at_a_time:
        raise ConfigError("layers_at_a_time=0: expected how many layers are in memory at a time")
    started, out = time.time(), Path(out)
    work = Path(work or out.with_name(f"{out.name}.streaming"))
    require_intact(checkpoint)
    needed = sum(path.stat().st_size for path in set(weight_files(checkpoint).values()))
    check_space(out, needed)
    run = Streaming(checkpoint, args, train_dataset, data_collator, processing_class, work, dtype, held_out)
    if run.entered is None:
        run.embed()
    groups = run.progress.value["groups"]
    for layers in run.groups[len(groups) :]:
        run.run_group(layers)
    errors = [entry for group in groups for entry in group["relative_error"]]
    figures = {"relative_error": errors, "log": merged_log(work, groups)}
    with staged(out, overwrite, needed) as folder:
        write_trained(Path(checkpoint), folder, trained_files(work, groups), trained_values(run.config))
        write_file(folder / "training_log.json", json.dumps(figures["log"], indent=1).encode())
        recorded = ("learning_rate", "max_steps", "layers_at_a_time", "loss_form", "bf16")
        settings = {name: value for name, value in args.to_dict().items() if name in recorded}
        seconds, shown = round(time.time() - started, 1), {"relative_error": errors}
        add_provenance(folder, "align", parent=checkpoint, config=settings, figures=shown, seconds=seconds)
        write_manifest(folder)
    discard(work)
    return figures
