"""A run of Distil-xLSTM: teacher -> converted student -> Delta-distillation -> scores and curves (arXiv 2503.18565)."""

import time

from xlstm_hybrid.checkpoint.files import markdown_table, read_json, read_provenance
from xlstm_hybrid.conversion.convert import empty_student
from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.data import collate, train_dataset
from xlstm_hybrid.distil_xlstm.convert import convert, share_frozen
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM
from xlstm_hybrid.distil_xlstm.transfer import distil_config, parameters_of
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.pipeline import evaluate
from xlstm_hybrid.pipeline.settings import batch_of, is_main, processes, trainer_config
from xlstm_hybrid.pipeline.stages import finish, load_teacher, loading_device, rows_cache, train_from_newest, workspace
from xlstm_hybrid.planning.run import read_config
from xlstm_hybrid.recipe.schema import Recipe, faults, read_yaml
from xlstm_hybrid.training.distributed import first_process_works

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
    sections = set(content) if isinstance(content, dict) else set()
    if sections - NEEDED - OPTIONAL or NEEDED - sections or not isinstance(content["delta"], dict):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path.name}: expected the sections {sorted(NEEDED)} and perhaps {sorted(OPTIONAL)}, got {found}"
        )
    settings = dict(content.pop("delta"))
    rows, steps = settings.pop("rows", None), settings.get("max_steps", -1)
    given = {"rows": rows, "max_steps": settings.get("max_steps")}
    no_count = [(k, n) for k, n in given.items() if n is not None and (not isinstance(n, int) or n < 1)]
    wrong = [f"delta.{k}={n!r}: expected a number of at least 1" for k, n in no_count]
    if rows is None and steps == -1:
        wrong.append("delta: expected rows (of an epoch) with num_train_epochs, or max_steps")
    one_step = {"max_steps": 1}
    content |= {"align": one_step, "distill": one_step, "experts": {"student": {"text": 1.0}}}  # of a hybrid's run
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
    with workspace(out, settings, converted) as work:
        args = trainer_config(DeltaKDConfig, settings, "delta", work, recipe.seed)
        model, tokenizer = load(converted, device=loading_device(args))
        mentor = load_teacher(teacher, recipe, args)
        data = train_dataset(recipe, tokenizer, rows, cache=rows_cache(work))
        trainer = DeltaKDTrainer(
            model, mentor, args=args, data_collator=collate, processing_class=tokenizer, train_dataset=data
        )
        if not trainer.is_fsdp_enabled:
            try:
                share_frozen(model, trainer.teacher)
            except ConfigError as reason:  # a teacher in another dtype has its own
                print(f"there are two copies of the embeddings: {reason}")
        train_from_newest(trainer, work, out)
        log = trainer.state.log_history
        last = next((entry for entry in reversed(log) if "loss" in entry), {})
        figures = {key: float(last[key]) for group in CURVES for key in group if key in last}
        finish(trainer, out, "delta-distil", [converted, teacher], settings, recipe.data, figures, start, overwrite)
    return log


def make_student(recipe, teacher, folder, overwrite):
    """Convert into `folder`/converted, in the first process; the others wait. What an interrupted run has left is kept
    if it was made from the same settings.

    Raises:
        CheckpointError: a finished student is in the way. ConfigError: what is there has other settings.
    """
    out, finished = folder / "converted", folder / "student"
    if finished.exists() and not overwrite:
        raise CheckpointError(
            f"{finished}: exists already; pass --overwrite to replace it once the new one is complete, or another --out"
        )
    revision = {"revision": recipe.revision} if recipe.revision else {}
    if processes() > 1:
        from accelerate import PartialState

        PartialState()  # the group of the processes
    with first_process_works(f"converting {out.name}"):
        if not is_main():
            return
        if not out.exists() or overwrite:
            print(convert(teacher, out, overwrite=overwrite, **recipe.student, **revision))
            return
        before = read_provenance(out)[-1]["config"]
        if other := sorted(k for k, v in (recipe.student | revision).items() if before.get(k) != v):
            raise ConfigError(
                f"{out} was made with another {', '.join(other)} than the recipe's: pass --overwrite, or another --out"
            )
        print(f"{out}: kept from an earlier run")


def draw_log(log, path):
    """Curves of a log: the loss and its terms, agreement with the teacher, alpha and the temperature."""
    from matplotlib.figure import Figure

    log = [entry for entry in log if "loss" in entry]
    picture = Figure(figsize=(4 * len(CURVES), 3.4), layout="constrained")
    for panel, names in zip(picture.subplots(1, len(CURVES)), CURVES, strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name)
        panel.set_xlabel("step")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=120)


def scores(models, recipe, beside=None):
    """{name: evaluation without samples} of checkpoint directories; `beside`, a `results.json` that `xlstm-hybrid run`
    wrote, adds the scores of its student as "hybrid".
    """
    results = {name: evaluate(folder, recipe) for name, folder in models.items()}
    results = {name: {k: v for k, v in each.items() if k != "samples"} for name, each in results.items()}
    if beside:
        students = read_json(beside, "--beside").get("students") or {}
        if "student" not in students:
            raise EvaluationError(
                f"{beside.name}: has no scores of a student; pass the results.json of a finished `xlstm-hybrid run`"
            )
        results["hybrid"] = students["student"]
    return results


def score_table(results):
    """Markdown of {model: scores}: exact match and perplexity per domain, a column per model."""
    rows = [["domain", *results]]
    for kind, text in (("exact_match", "{:.1%}"), ("perplexity", "perplexity {:.3f}")):
        columns = [scores.get(kind, {}) for scores in results.values()]
        for domain in dict.fromkeys(domain for column in columns for domain in column):
            rows.append([domain, *(text.format(column[domain]) if domain in column else "" for column in columns)])
    return markdown_table(rows)


def planned(recipe, teacher, rows, overrides=None):
    """What a run is about, from the teacher's config.json alone: blocks, parameters, tokens, steps."""
    settings = recipe.distill | (overrides or {})
    options = {k: v for k, v in recipe.student.items() if k not in ("dtype", "seed")}
    config = distil_config(read_config(teacher, recipe.revision), **options)
    micro, accumulation = batch_of(settings, "delta")
    per_step, epochs = micro * accumulation * processes(), settings.get("num_train_epochs", 1)
    steps = settings["max_steps"] if settings.get("max_steps", -1) > 0 else -(-rows // per_step) * epochs
    counts = parameters_of(empty_student(config, DistilXLSTMForCausalLM))
    facts = {"blocks": config.block_types, "parameters": counts}
    facts["trainable_share"] = counts["trainable"] / counts["student"]
    facts |= {"tokens_per_epoch": rows * recipe.length, "epochs": epochs, "steps": steps}
    return facts | {"sequences_per_step": per_step}
