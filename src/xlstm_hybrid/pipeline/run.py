"""A recipe's run: the list of its stages, from the teacher to the student's card, and what the report shows of them."""

import hashlib
import json
import math
import resource
import shutil
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, staged, write_json, write_manifest
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation.comparison import paired_verdict, record_comparison
from xlstm_hybrid.evaluation.equivalence import checks_as_json, verify_checkpoint, wrapping_length
from xlstm_hybrid.evaluation.scores import named_contradictions, own_results
from xlstm_hybrid.model.generation_checks import GENERATION
from xlstm_hybrid.pipeline.evaluation import (
    MISSING,
    check_evaluation,
    compare_with_teacher,
    domain_scores,
    evaluate,
    harness_installed,
    long_context_rows,
    mean_gates,
    measure_efficiency,
    run_lm_eval,
    sample,
    units_of,
)
from xlstm_hybrid.pipeline.merging import base_of, expert_statistics, merge_experts
from xlstm_hybrid.pipeline.runner import Runner, Stage, checkpoint_stage
from xlstm_hybrid.pipeline.settings import Parser, batch_of, processes
from xlstm_hybrid.pipeline.stages import align, distill, multi_teacher, on_policy
from xlstm_hybrid.recipe.merge_settings import NEED_STATISTICS, ON_POLICY
from xlstm_hybrid.recipe.schema import FINAL, MIXES, resolve_teacher
from xlstm_hybrid.reports.card import write_card
from xlstm_hybrid.reports.efficiency import draw_efficiency, picture_name, record_efficiency, write_efficiency
from xlstm_hybrid.reports.plots import as_png
from xlstm_hybrid.reports.run import score_table, write_report
from xlstm_hybrid.reports.sections import time_rows
from xlstm_hybrid.reports.text import terminal_table

# What a student passes before anything is scored
CHECKS = {*GENERATION, "cached decoding = uncached", "left padding, beside another row = none"}


def check_settings(recipe):
    """Raise ConfigError, before anything runs, for a setting that the trainers do not have."""
    from xlstm_hybrid.training.alignment import AlignmentConfig
    from xlstm_hybrid.training.distillation import SparseKDConfig

    sections = {"align": AlignmentConfig, "distill": SparseKDConfig}
    found = {name: getattr(recipe, name) for name in (*sections, "on_policy")} | {
        "merge.on_policy": (recipe.merge or {}).get("on_policy")
    }
    if found["on_policy"] is not None or found["merge.on_policy"] is not None:
        from xlstm_hybrid.training.on_policy import OnPolicyKDConfig

        sections |= {name: OnPolicyKDConfig for name in ("on_policy", "merge.on_policy") if found[name] is not None}
    base_of(recipe, recipe.path)  # raises for a path that is not there
    for name, config in sections.items():
        parser, settings = Parser(config), found[name]
        parser.check(settings, f"{recipe.path.name}, {name}")
        parser.typed(settings, name)
        batch_of(settings, name)


class Run(Runner):
    """A recipe in its run directory. `run` makes all of its stages, or goes on where it was interrupted.

    Args:
        redo: make stages again whose settings or inputs have changed; otherwise that is a ConfigError.
        start: an aligned student from elsewhere, in the place of the recipe's own convert and align.
    Attributes:
        training: the stages up to the student, in order.  experts: {name: its last stage}.  models: {name: what is
            evaluated under it}.
    Raises:
        ConfigError: settings that no trainer has; more than one process.
    """

    def __init__(self, recipe, out=None, redo=False, console=None, start=None):
        if processes() > 1:
            raise ConfigError(
                "a whole recipe runs in one process: launch its training stages (align, distill, on-policy) as commands of their own"
            )
        super().__init__(out or recipe.out, recipe.seed, redo, console)
        self.recipe, self.teacher, self.begin = recipe, resolve_teacher(recipe), time.time()
        self.revision = {"revision": recipe.revision} if recipe.revision else {}
        self.training, self.models = self.training_stages(start and Path(start))

    # --- the stages --------------------------------------------------------------------------------------------

    def stages(self):
        """All stages of the recipe, in the order in which they are made."""
        return [*self.training, *self.evaluation_stages()]

    def named(self, *names):
        """The stages up to the student that have one of these names."""
        return [stage for stage in self.training if stage.name in names]

    def training_stages(self, start=None):
        """`(stages from the teacher to the student, {name: the models that are evaluated})`."""
        recipe, teacher, models = self.recipe, self.teacher, {"teacher": self.teacher}
        stages, aligned = [], start
        if start is None:
            converted = checkpoint_stage(
                "convert", (teacher,), self.convert, recipe.student | self.revision, "converted"
            )
            aligned = checkpoint_stage(
                "align",
                (converted,),
                lambda out, again, student: align(student, out, recipe, overwrite=again),
                recipe.align | {"data": recipe.data},
                "aligned",
            )
            stages += [converted, aligned]
            models |= {"converted": converted}
        self.aligned, self.experts = aligned, {}

        shared = {"length": recipe.length} | {
            key: recipe.data[key] for key in ("held_out", "shuffle_buffer") if key in recipe.data
        }
        shared |= {"teacher_dtype": recipe.teacher_dtype} if recipe.teacher_dtype != "float32" else {}
        for name, mixture in recipe.experts.items():
            reads = shared | {"mixture": mixture}
            stages.append(
                checkpoint_stage(
                    f"distill:{name}",
                    (aligned, teacher),
                    lambda out, again, student, teacher, name=name: distill(
                        student, teacher, out, recipe, name, overwrite=again
                    ),
                    recipe.distill | reads,
                    f"experts/{name}",
                )
            )
            if recipe.on_policy is not None:
                stages.append(
                    checkpoint_stage(
                        f"on-policy:{name}",
                        (stages[-1], teacher),
                        lambda out, again, student, teacher, name=name: on_policy(
                            student, teacher, out, recipe, name, overwrite=again
                        ),
                        recipe.on_policy | reads,
                        f"on_policy/{name}",
                    )
                )
            self.experts[name] = stages[-1]

        models |= {"aligned": aligned}
        if recipe.merge is None:  # the only expert is the student
            return stages, models | {"student": stages[-1]}
        models |= {f"expert {name}": stage for name, stage in self.experts.items()}
        section, experts, student = recipe.merge, tuple(self.experts.values()), aligned
        if section["method"] != ON_POLICY:
            base = base_of(recipe, aligned)
            inputs = (*experts, *([] if base is None else [base]), *([teacher] if "search" in section else []))
            settings = {key: value for key, value in section.items() if key != "on_policy"}
            student = checkpoint_stage("merge", inputs, partial(self.merge, settings), settings, "merged")
            stages.append(student)
        if "on_policy" in section:
            reads = {"weights": section.get("weights"), "experts": recipe.experts}
            student = checkpoint_stage(
                "multi-teacher",
                (student, *experts),
                lambda out, again, student, *teachers: multi_teacher(
                    student, dict(zip(self.experts, teachers, strict=True)), out, recipe, overwrite=again
                ),
                section["on_policy"] | reads | {key: value for key, value in recipe.data.items() if key not in MIXES},
                "taught",
            )
            stages.append(student)
        return stages, models | {"student": student}

    def evaluation_stages(self):
        """What follows when the student is there: checks, scores, the comparison with the teacher, and its folder
        `student`.
        """
        recipe, section, models = self.recipe, self.recipe.evaluate, self.models
        teacher, student = models["teacher"], models["student"]
        versions = {name: version(name) for name in ("transformers", "torch")}
        checks = {"checks": sorted(CHECKS), **versions}
        stages = [Stage("verify", (student,), self.verify, checks, note="stages/verify.json", check=require_passed)]
        if section is not None:
            asked = bool(units_of(section))
            if asked and harness_installed():
                for side in ("teacher", "student"):
                    stages.append(
                        Stage(
                            f"harness:{side}",
                            (models[side],),
                            partial(self.harness, side),
                            folder=f"evaluation/harness/{side}",
                        )
                    )
            for name, model in models.items():
                settings, note = partial(self.evaluation_settings, name), f"evaluation/{name}.json"
                stages.append(Stage(f"evaluate:{name}", (model,), partial(self.evaluate, name), settings, note=note))
            stages.append(Stage("contradictions", (), self.refuse_contradictions))
            if asked:
                stages.append(Stage("compare", (), self.compare, folder="comparison"))
            if "efficiency" in section:
                settings = section["efficiency"] | {"dtype": recipe.teacher_dtype}
                note = "stages/efficiency.json"
                stages.append(
                    Stage("efficiency", (teacher, student), self.measure, settings, "efficiency", note, require_report)
                )
        return [
            *stages,
            Stage("report", (student,), self.report),
            Stage("card", (student,), self.card, folder="student"),
        ]

    def check(self):
        """Raise, before anything runs, for what would fail later; say what will be left out."""
        check_settings(self.recipe)
        check_evaluation(self.recipe)
        if self.recipe.evaluate and units_of(self.recipe.evaluate) and not harness_installed():
            self.console.print(MISSING, style="yellow", markup=False, soft_wrap=True)  # its [eval] is no markup

    def run(self):
        """Make all stages; returns the results that the report shows."""
        self.begin = time.time()
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        self.make(*self.stages())
        return self.found["report"]

    # --- how they are made -------------------------------------------------------------------------------------

    def convert(self, out, again, teacher):
        self.console.print(str(convert(teacher, out, overwrite=again, **self.recipe.student, **self.revision)))

    def merge(self, settings, out, again, *inputs):
        """Statistics and candidates of a search are kept beside the stages' notes: an interrupted merge goes on from
        them.
        """
        section, files = self.recipe.merge, None
        experts = {name: self.path(stage) for name, stage in self.experts.items()}
        if section["method"] in NEED_STATISTICS:
            asked = {"method": section["method"], **section.get("statistics", {})}
            files = [
                expert_statistics(
                    self.recipe,
                    name,
                    expert,
                    self.out / "statistics" / f"{name}.safetensors",
                    self.spec(asked, [expert]),
                )
                for name, expert in experts.items()
            ]
        spec = json.dumps(self.spec(settings, inputs), sort_keys=True)
        candidates = self.out / "stages" / f"search-{hashlib.sha256(spec.encode()).hexdigest()[:8]}.json"
        found = merge_experts(
            self.recipe,
            experts,
            out,
            self.path(self.aligned),
            self.teacher,
            files,
            candidates,
            again,
            self.say_candidate,
        )
        if found is not None:
            self.console.print(f"weights of {', '.join(experts)}: {', '.join(f'{w:.3f}' for w in found.weights)}")

    def say_candidate(self, found):
        weights = ", ".join(f"{w:.3f}" for w in found.weights)
        self.console.print(
            f"  {weights}: alpha* {found.alpha_star:.4f}, C_0 {found.c_0:.2f}, recovery {found.recovery:.4f}"
        )

    def verify(self, student):
        """Whether the student generates what it is; texts of one that does not are never scored."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        results = verify_checkpoint(student, length=wrapping_length, device=device, only=CHECKS)
        return checks_as_json(results, student=Path(student).name)

    def harness(self, side, out, again, model):
        """One side by lm-eval: what it found, and the part of it that `evaluate` need not measure again. Finished tasks
        are kept.
        """
        found = run_lm_eval(self.recipe, side, model, out, self.redo, partial(self.say, side))
        self.seconds[f"harness:{side}"] = round(
            sum(unit["seconds"] for unit in found.values()), 1
        )  # as they were made, in whichever run
        return {"units": found, "known": domain_scores(out, found)}

    def evaluation_settings(self, name):
        settings = {key: value for key, value in self.recipe.evaluate.items() if key not in FINAL}
        known = self.known(name)
        return settings | ({"known": known["exact_match"]} if known else {})

    def known(self, name):
        return self.found[f"harness:{name}"]["known"] if f"harness:{name}" in self.found else None

    def evaluate(self, name, model):
        return {
            "result": evaluate(
                model, self.recipe, lambda what, score: self.say(name, f"{what:<12} {score}"), self.known(name)
            )
        }

    def evaluations(self):
        """{model: what `evaluate` found}."""
        return {
            name: self.found[f"evaluate:{name}"]["result"] for name in self.models if f"evaluate:{name}" in self.found
        }

    def refuse_contradictions(self):
        """Stop at scores that contradict the models that they are of; the report says which.

        Raises:
            EvaluationError: there are some.
        """
        if found := contradictions_in(self.evaluations()):
            self.report(self.path(self.models["student"]))
            again = f"Then remove {self.out.name}/evaluation and start the run again"
            raise EvaluationError(f"{named_contradictions(found)}. {again}")

    def compare(self, out, again):
        sides = {
            side: self.found[f"harness:{side}"]["units"]
            for side in ("teacher", "student")
            if f"harness:{side}" in self.found
        }
        return compare_with_teacher(self.recipe, self.teacher, self.out / "evaluation", out, sides.get("teacher"))

    def measure(self, out, again, teacher, student):
        found = measure_efficiency(self.recipe, teacher, student, report=partial(self.say, "efficiency"))
        image = as_png(draw_efficiency, {"efficiency": found})
        write_efficiency(found, out, {picture_name(0): image} if image else {})

    # --- the report and the folder `student` -------------------------------------------------------------------

    def report(self, student):
        """Write results.json, report.md and pictures; returns the results."""
        results, this_call = self.results(student), time.time() - self.begin
        rest = max(
            0.0, this_call - (sum(self.seconds.values()) - sum(self.kept.values()))
        )  # comparing, gates, a sample, loading
        results["seconds"] |= {
            "everything else": round(rest, 1),
            "whole run": round(sum(self.seconds.values()) + rest, 1),
        }
        results["seconds"] |= {"this call": round(this_call, 1)} if self.kept else {}
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        return results

    def results(self, student):
        aligned = self.path(self.aligned)
        log = json.loads((aligned / "training_log.json").read_text())
        layers = next(s for s in read_provenance(aligned) if s["stage"] == "align")["figures"]["relative_error"]
        keys = [f"layer_{layer['layer']}/relative_error" for layer in layers]
        curve = [{"step": e["step"], "error": [e[k] for k in keys]} for e in log if keys and keys[0] in e]
        logs = {
            name: json.loads((self.path(stage) / "training_log.json").read_text())
            for name, stage in self.experts.items()
        }
        results = {
            "title": f"{self.recipe.name}: a Transformer becomes a hybrid xLSTM",
            "teacher": Path(str(self.teacher)).name,
            **scores_of(self.evaluations()),
            "alignment": {"layers": layers, "curve": curve},
            "distillation": {name: [entry for entry in entries if "loss" in entry] for name, entries in logs.items()},
            "gates": mean_gates(student, self.recipe),
            "seconds": dict(self.seconds),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if self.recipe.evaluate and "examples" in self.recipe.evaluate:
            results["sample"] = sample(student, tasks.test_examples("strings", 1)[0].prompt)
        return results | self.against_the_teacher()

    def against_the_teacher(self):
        """The parts of the results that lm-eval, the comparison and the efficiency report bring."""
        section, found = self.recipe.evaluate or {}, {}
        if units_of(section) and not harness_installed():
            found["notes"] = [MISSING]
        if "harness:student" in self.found:
            rows = long_context_rows(*(self.found[f"harness:{side}"]["units"] for side in ("teacher", "student")))
            found |= {"long_context": rows} if rows else {}
        if comparison := self.found.get("compare"):
            found["comparison"] = comparison
        if "efficiency" in self.found:
            found["efficiency"] = json.loads((self.out / "efficiency/efficiency.json").read_text())
        return found

    def card(self, out, again, student):
        """The folder `student`: the last checkpoint with its evaluation in the record, its card and the pictures."""
        results = self.found["report"]
        with staged(out, overwrite=True) as folder:
            for file in [*student.iterdir(), *self.out.glob("*.png")]:
                if file.name != "manifest.json":
                    shutil.copy(file, folder / file.name)
            if results.get("students"):
                seconds = results["seconds"].get("whole run")
                config = self.recipe.evaluate | (
                    {"lm_eval": version("lm_eval")} if "harness:student" in self.found else {}
                )
                add_provenance(
                    folder, "evaluate", parent=student, config=config, figures=figures_of(results), seconds=seconds
                )
            if results.get("comparison"):
                record_comparison(results["comparison"], "student", folder)
            if results.get("efficiency"):
                record_efficiency(results["efficiency"], folder)
            write_card(folder, results if results.get("students") else None)
            write_manifest(folder)
        if results.get("win_and_tie"):
            self.console.print(score_table(results))
        if rows := time_rows(results):
            self.console.print(terminal_table(rows, "Where the time went"))
        self.console.print(f"report: {self.out / 'report.md'}   student: {out}")


def require_passed(folder, note):
    """Raise EvaluationError for a note of the stage `verify` with checks that failed."""
    if failed := [r for r in note["checks"] if not r["passed"]]:
        differences = [math.inf if r["difference"] is None else r["difference"] for r in failed]
        reasons = [
            r["note"] or f"{d:.2g}, at most {r['allowed']:.1g}" for r, d in zip(failed, differences, strict=True)
        ]
        found = "; ".join(f"{r['name']} ({reason})" for r, reason in zip(failed, reasons, strict=True))
        raise EvaluationError(
            f"{note.get('student', 'the student')}: no scores, because {len(failed)} of {len(note['checks'])} checks failed: {found}. What "
            "generates is not what was trained; `xlstm-hybrid doctor` says which versions were tested, `xlstm-hybrid verify` checks again"
        )


def require_report(folder, note):
    """Raise CheckpointError where the efficiency report is gone."""
    if not (folder / "efficiency.json").is_file():
        raise CheckpointError(f"{folder.name}/efficiency.json is gone")


def contradictions_in(evaluations):
    """{model: {domain: samples}} of evaluations that cannot be, see `scores.contradictions`."""
    return {name: result["contradictions"] for name, result in evaluations.items() if result.get("contradictions")}


def scores_of(evaluations):
    """The part of the results that comes from evaluations; {} where there is none."""
    scores = {name: {k: result[k] for k in ("exact_match", "perplexity")} for name, result in evaluations.items()}
    if not scores:
        return {}
    teacher, wrong = scores.pop("teacher"), contradictions_in(evaluations)
    found = {"contradictions": wrong} if wrong else {}
    found |= {"teacher_scores": teacher, "students": scores}
    if teacher["exact_match"] and not wrong:
        sides = {name: own_results(result, Path(name)) for name, result in evaluations.items()}
        found["win_and_tie"] = {name: paired_verdict(sides["teacher"], sides[name]) for name in scores}
    return found


def figures_of(results):
    """What the provenance keeps of the final student's evaluation."""
    student, verdict = results["students"]["student"], results.get("win_and_tie", {}).get("student", {})
    figures = {
        "exact_match": student["exact_match"],
        "perplexity": student["perplexity"],
        "teacher_exact_match": results["teacher_scores"]["exact_match"],
        "teacher_perplexity": results["teacher_scores"]["perplexity"],
        **{k: verdict[k] for k in ("alpha_star", "c_0", "recovery", "resampled") if verdict.get(k) is not None},
        "long_context": results.get("long_context", {}),
    }
    return {k: v for k, v in figures.items() if v != {}}
