"""A run of Distil-xLSTM: teacher -> converted student -> Delta-distillation -> scores and curves (arXiv 2503.18565)."""

import contextlib
import time

from xlstm_hybrid.checkpoint.files import read_json, read_provenance
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import collate, train_dataset
from xlstm_hybrid.distil_xlstm.convert import convert, empty_student, parameters_of, share_frozen, student_config
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.pipeline import evaluate
from xlstm_hybrid.pipeline.settings import batch_of, is_main, processes, trainer_config
from xlstm_hybrid.pipeline.stages import finish, load_teacher, place_of, rows_cache, train, workspace
from xlstm_hybrid.planning.run import read_config
from xlstm_hybrid.recipe.schema import Recipe, faults, read_yaml

NEEDED = {"name", "teacher", "out", "student", "data", "delta"}
OPTIONAL = {"evaluate", "revision", "teacher_dtype", "seed"}
CURVES = (("loss", "ce", "kl", "frobenius"), ("top1_agreement",), ("alpha",), ("temperature",))


def read_delta_recipe(path):
    """`(Recipe, rows)`: a recipe with the section `delta` in the place of align, distill, experts and merge.

    delta: fields of `DeltaKDConfig`, and `rows`, the packed rows of an epoch; with max_steps and no rows, one epoch of
    that length.

    Raises:
        ConfigError: unknown or missing keys, a section that describes no data or no length; all mistakes are listed.
    """
    content = read_yaml(path)
    if (
        not isinstance(content, dict)
        or set(content) - NEEDED - OPTIONAL
        or NEEDED - set(content)
        or not isinstance(content["delta"], dict)
    ):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path.name}: expected the sections {sorted(NEEDED)} and perhaps {sorted(OPTIONAL)}, got {found}"
        )
    settings = dict(content.pop("delta"))
    rows, steps = settings.pop("rows", None), settings.get("max_steps", -1)
    given = {"rows": rows, "max_steps": settings.get("max_steps")}
    wrong = [
        f"delta.{k}={n!r}: expected a number of at least 1"
        for k, n in given.items()
        if n is not None and (not isinstance(n, int) or n < 1)
    ]
    if rows is None and steps == -1:
        wrong.append("delta: expected rows (of an epoch) with num_train_epochs, or max_steps")
    content |= {
        "align": {"max_steps": 1},
        "distill": {"max_steps": 1},
        "experts": {"student": {"text": 1.0}},
    }  # sections of a hybrid's run
    wrong += faults(content)
    if wrong:
        raise ConfigError(f"{path.name}: {'; '.join(wrong)}")
    recipe = Recipe(**content | {"distill": settings}, path=path)
    micro, accumulation = batch_of(settings, "delta")
    return recipe, rows or steps * micro * accumulation * processes()


def distil(converted, teacher, out, recipe, rows, overwrite=False, overrides=None):
    """Delta-distillation of a converted student; returns the trainer's log.

    Args:
        converted: directory of `distil_xlstm.convert`.
        teacher: checkpoint directory or Hub id.
        rows: packed rows of an epoch.
        overrides: fields of `DeltaKDConfig` that go before the recipe's.
    """
    from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer  # needs trl

    start, settings = time.time(), recipe.distill | (overrides or {})
    with workspace(out, settings) as work:
        args = trainer_config(DeltaKDConfig, settings, "delta", work, recipe.seed)
        model, tokenizer = load(converted, device=place_of(args))
        mentor = load_teacher(teacher, recipe, args)
        data = train_dataset(recipe, tokenizer, rows, cache=rows_cache(work))
        trainer = DeltaKDTrainer(
            model, mentor, args=args, data_collator=collate, processing_class=tokenizer, train_dataset=data
        )
        if not trainer.is_fsdp_enabled:
            share(model, trainer.teacher)
        train(trainer, work)
        log = trainer.state.log_history
        last = next((entry for entry in reversed(log) if "loss" in entry), {})
        figures = {key: float(last[key]) for group in CURVES for key in group if key in last}
        finish(trainer, out, "delta-distil", [converted, teacher], settings, recipe.data, figures, start, overwrite)
    return log


def share(student, teacher):
    """Keep one copy of the frozen embeddings in memory, where student and teacher hold them alike; a teacher in another
    dtype has its own.
    """
    try:
        share_frozen(student, teacher)
    except ConfigError as reason:
        print(f"embeddings are held twice: {reason}")


def refuse_finished(student, overwrite):
    """Raise CheckpointError, before anything is trained, if a finished student is in the way."""
    if student.exists() and not overwrite:
        raise CheckpointError(
            f"{student}: exists already; pass --overwrite to replace it once the new one is complete, or another --out"
        )


def make_student(recipe, teacher, out, overwrite):
    """Convert, in the first process; the others wait. What an interrupted run has left is kept if it was made from the
    same settings.
    """
    revision = {"revision": recipe.revision} if recipe.revision else {}
    order = contextlib.nullcontext()
    if processes() > 1:
        from accelerate import PartialState

        order = PartialState().main_process_first()
    with order:
        if not is_main():
            return
        if not out.exists() or overwrite:
            print(convert(teacher, out, overwrite=overwrite, **recipe.student, **revision))
            return
        made = read_provenance(out)[-1]["config"]
        if other := sorted(k for k, v in (recipe.student | revision).items() if made.get(k) != v):
            raise ConfigError(
                f"{out} was made with another {', '.join(other)} than the recipe's: pass --overwrite, or another --out"
            )
        print(f"{out}: kept from an earlier run")


def draw(log, path):
    """Curves of a log: the loss and its terms, agreement with the teacher, alpha and the temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = [entry for entry in log if "loss" in entry]
    made, axes = pyplot.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.4), layout="constrained")
    for panel, names in zip(axes, CURVES, strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name)
        panel.set_xlabel("step")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    made.savefig(path, dpi=120)
    pyplot.close(made)


def scores(models, recipe):
    """{name: evaluation without samples} of checkpoint directories."""
    return {
        name: {k: v for k, v in evaluate(folder, recipe).items() if k != "samples"} for name, folder in models.items()
    }


def table(found):
    """Lines of a Markdown table: exact match and perplexity per domain, a column per model."""
    names = list(found)
    lines = ["| domain | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for kind, text in (("exact_match", "{:.1%}"), ("perplexity", "perplexity {:.3f}")):
        for domain in dict.fromkeys(d for name in names for d in found[name].get(kind, {})):
            cells = (
                text.format(found[name][kind][domain]) if domain in found[name].get(kind, {}) else "" for name in names
            )
            lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return lines


def hybrid_scores(path):
    """{"hybrid": scores of the student} of a `results.json` that `xlstm-hybrid run` wrote."""
    students = read_json(path, "--beside").get("students") or {}
    if "student" not in students:
        raise EvaluationError(
            f"{path.name}: has no scores of a student; pass the results.json of a finished `xlstm-hybrid run`"
        )
    return {"hybrid": students["student"]}


def planned(recipe, teacher, rows, overrides=None):
    """What a run is about, from the teacher's config.json alone: blocks, parameters, tokens, steps."""
    settings = recipe.distill | (overrides or {})
    options = {k: v for k, v in recipe.student.items() if k not in ("dtype", "seed")}
    config = student_config(read_config(teacher, recipe.revision), **options)
    micro, accumulation = batch_of(settings, "delta")
    per_step, epochs = micro * accumulation * processes(), settings.get("num_train_epochs", 1)
    steps = settings["max_steps"] if settings.get("max_steps", -1) > 0 else -(-rows // per_step) * epochs
    counts = parameters_of(empty_student(config))
    return {
        "blocks": config.block_types,
        "parameters": counts,
        "trainable_share": counts["trainable"] / counts["student"],
        "tokens_per_epoch": rows * recipe.length,
        "epochs": epochs,
        "steps": steps,
        "sequences_per_step": per_step,
    }
