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

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, staged, write_json, write_manifest
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.gguf import is_gguf, package_of
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation.comparison import paired_verdict, record_comparison
from xlstm_hybrid.evaluation.equivalence import checks_as_json, verify_checkpoint, wrapping_length
from xlstm_hybrid.evaluation.results import own_results
from xlstm_hybrid.evaluation.scores import named_contradictions
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
    sample_text,
    units_of,
)
from xlstm_hybrid.pipeline.merging import expert_statistics, merge_base, merge_experts
from xlstm_hybrid.pipeline.runner import Runner, Stage
from xlstm_hybrid.pipeline.settings import Parser, batch_of, processes
from xlstm_hybrid.pipeline.stages import align, calibrate, calibration_tokens, distill, multi_teacher, on_policy
from xlstm_hybrid.recipe.merge_settings import NEED_STATISTICS, ON_POLICY
from xlstm_hybrid.recipe.schema import FINAL, MIXES, resolve_teacher
from xlstm_hybrid.reports.card import write_card
from xlstm_hybrid.reports.efficiency import draw_efficiency, picture_name, record_efficiency, write_efficiency
from xlstm_hybrid.reports.plots import as_png
from xlstm_hybrid.reports.run import score_table, write_report
from xlstm_hybrid.reports.sections import time_rows
from xlstm_hybrid.reports.text import terminal_table

NO_STAGE_I = "No stage I (align.max_steps is 0): stage II began with the {} student."
# What a student passes before anything is scored
CHECKS = {*GENERATION, "cached decoding = uncached", "left padding, beside another row = none"}


def check_trainer_settings(recipe):
    """Raise ConfigError, before anything runs, for a setting that the trainers do not have."""
    from xlstm_hybrid.training.alignment import AlignmentConfig
    from xlstm_hybrid.training.distillation import SparseKDConfig

    sections = {"align": (recipe.align, AlignmentConfig), "distill": (recipe.distill, SparseKDConfig)}
    spoken = {"on_policy": recipe.on_policy, "merge.on_policy": (recipe.merge or {}).get("on_policy")}
    if any(settings is not None for settings in spoken.values()):
        from xlstm_hybrid.training.on_policy import OnPolicyKDConfig

        sections |= {name: (settings, OnPolicyKDConfig) for name, settings in spoken.items() if settings is not None}
    merge_base(recipe, recipe.path)  # raises for a path that is not there
    for name, (settings, config) in sections.items():
        parser = Parser(config)
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
        recipe, teacher, stages, models = self.recipe, self.teacher, [], {"teacher": self.teacher}

        def intact(folder, note):
            require_intact(folder, listed=True)

        def add(name, inputs, build, settings, folder):
            note = f"stages/{name.replace(':', '-')}.json"
            stages.append(Stage(name, inputs, build, settings, folder, note, check=intact))
            return stages[-1]

        def train(stage, *expert):  # how a training stage is built: from its inputs into its folder, as the recipe says
            return lambda out, again, *inputs: stage(*inputs, out, recipe, *expert, overwrite=again)

        aligned = start
        if start is None:
            settings = recipe.student | self.revision
            models["converted"] = add("convert", (teacher,), self.convert, settings, "converted")
            aligned = models["converted"]
            if calibration_tokens(recipe):
                settings = {"tokens": calibration_tokens(recipe), "data": recipe.data}
                aligned = models["calibrated"] = add("calibrate", (aligned,), self.calibrate, settings, "calibrated")
            if recipe.align["max_steps"]:
                settings = recipe.align | {"data": recipe.data}
                aligned = add("align", (aligned,), train(align), settings, "aligned")
        self.aligned, self.experts = aligned, {}
        if aligned not in models.values():
            models["aligned"] = aligned

        shared = {key: recipe.data[key] for key in ("held_out", "shuffle_buffer") if key in recipe.data}
        shared |= {"length": recipe.length}
        shared |= {"teacher_dtype": recipe.teacher_dtype} if recipe.teacher_dtype != "float32" else {}
        for name, mixture in recipe.experts.items():
            reads = shared | {"mixture": mixture}
            settings = recipe.distill | reads
            expert = add(f"distill:{name}", (aligned, teacher), train(distill, name), settings, f"experts/{name}")
            if recipe.on_policy is not None:
                settings, folder = recipe.on_policy | reads, f"on_policy/{name}"
                expert = add(f"on-policy:{name}", (expert, teacher), train(on_policy, name), settings, folder)
            self.experts[name] = expert

        section, student, experts = recipe.merge, aligned, tuple(self.experts.values())
        if section is None:  # the only expert is the student
            return stages, models | {"student": stages[-1]}
        models |= {f"expert {name}": stage for name, stage in self.experts.items()}
        if section["method"] != ON_POLICY:
            base = merge_base(recipe, aligned)
            inputs = (*experts, *([] if base is None else [base]), *([teacher] if "search" in section else []))
            settings = {key: value for key, value in section.items() if key != "on_policy"}
            student = add("merge", inputs, partial(self.merge, settings), settings, "merged")
        if "on_policy" in section:
            settings = section["on_policy"] | {"weights": section.get("weights"), "experts": recipe.experts}
            settings |= {key: value for key, value in recipe.data.items() if key not in MIXES}
            student = add("multi-teacher", (student, *experts), self.teach, settings, "taught")
        return stages, models | {"student": student}

    def evaluation_stages(self):
        """What follows when the student is there: checks, scores, the comparison with the teacher, and its folder
        `student`.
        """
        section, models, teacher, student = self.recipe.evaluate, self.models, self.teacher, self.models["student"]
        checks = {"checks": sorted(CHECKS), **{name: version(name) for name in ("transformers", "torch")}}
        stages = [Stage("verify", (student,), self.verify, checks, note="stages/verify.json", check=require_passed)]
        if section is not None:
            asked = bool(units_of(section))
            for side in ("teacher", "student") if asked and harness_installed() else ():
                build, folder = partial(self.harness, side), f"evaluation/harness/{side}"
                stages.append(Stage(f"harness:{side}", (models[side],), build, folder=folder))
            for name, model in models.items():
                settings, note = partial(self.evaluation_settings, name), f"evaluation/{name}.json"
                stages.append(Stage(f"evaluate:{name}", (model,), partial(self.evaluate, name), settings, note=note))
            stages.append(Stage("contradictions", (), self.refuse_contradictions))
            if asked:
                stages.append(Stage("compare", (), self.compare, folder="comparison"))
            if "efficiency" in section:
                settings = section["efficiency"] | {"dtype": self.recipe.teacher_dtype}
                sides, note = (teacher, student), "stages/efficiency.json"
                stages.append(Stage("efficiency", sides, self.measure, settings, "efficiency", note, require_report))
        stages.append(Stage("report", (student,), self.report))
        return [*stages, Stage("card", (student,), self.card, folder="student")]

    def check(self):
        """Raise, before anything runs, for what would fail later; say what will be left out, and which of two teachers it
        is.
        """
        check_trainer_settings(self.recipe)
        check_evaluation(self.recipe)
        if package := self.recipe.teacher_package:
            held = package_of(self.teacher) if is_gguf(self.teacher) else None
            place = (
                f"{self.teacher.name} of the package {held}" if held else f"from the hub, as {package} is not installed"
            )
            self.console.print(f"teacher: {self.recipe.teacher}, {place}", markup=False, soft_wrap=True)
        if self.recipe.evaluate and units_of(self.recipe.evaluate) and not harness_installed():
            self.console.print(MISSING, style="yellow", markup=False, soft_wrap=True)  # its [eval] is no markup

    def run(self):
        """Make all stages; returns the results that the report shows."""
        self.begin = time.time()
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        self.make(*self.stages())
        return self.outcomes["report"]

    # --- how they are built ------------------------------------------------------------------------------------

    def convert(self, out, again, teacher):
        self.console.print(str(convert(teacher, out, overwrite=again, **self.recipe.student, **self.revision)))

    def calibrate(self, out, again, converted):
        def report(layer, figures):
            self.say(
                f"layer {layer}",
                "relative error {before:.3f} -> {after:.3f}, window alone {window:.3f}".format(**figures),
            )

        calibrate(converted, out, self.recipe, overwrite=again, report=report)

    def merge(self, settings, out, again, *inputs):
        """Statistics and candidates of a search are stored beside the stages' notes: an interrupted merge goes on from
        them.
        """
        section, files = self.recipe.merge, None
        experts = {name: self.path(stage) for name, stage in self.experts.items()}
        if section["method"] in NEED_STATISTICS:
            asked, files = {"method": section["method"], **section.get("statistics", {})}, []
            for name, expert in experts.items():
                file = self.out / "statistics" / f"{name}.safetensors"
                files.append(expert_statistics(self.recipe, name, expert, file, self.spec(asked, [expert])))
        spec = json.dumps(self.spec(settings, inputs), sort_keys=True)
        table = self.out / "stages" / f"search-{hashlib.sha256(spec.encode()).hexdigest()[:8]}.json"
        say, aligned = self.say_candidate, self.path(self.aligned)
        found = merge_experts(self.recipe, experts, out, aligned, self.teacher, files, table, again, say)
        if found is not None:
            self.console.print(f"weights of {', '.join(experts)}: {', '.join(f'{w:.3f}' for w in found.weights)}")

    def say_candidate(self, found):
        weights, verdict = ", ".join(f"{w:.3f}" for w in found.weights), f"alpha* {found.alpha_star:.4f}"
        self.console.print(f"  {weights}: {verdict}, C_0 {found.c_0:.2f}, recovery {found.recovery:.4f}")

    def teach(self, out, again, student, *experts):
        multi_teacher(student, dict(zip(self.experts, experts, strict=True)), out, self.recipe, overwrite=again)

    def verify(self, student):
        """Whether the student generates what it is; texts of one that does not are never scored."""
        device = device_of()
        results = verify_checkpoint(student, length=wrapping_length, device=device, only=CHECKS)
        return checks_as_json(results, student=Path(student).name)

    def harness(self, side, out, again, model):
        """One side by lm-eval: its results, and the part of them that `evaluate` need not measure again. Finished tasks
        are not run again.
        """
        units = run_lm_eval(self.recipe, side, model, out, self.redo, partial(self.say, side))
        # as they took in whichever run
        self.seconds[f"harness:{side}"] = round(sum(unit["seconds"] for unit in units.values()), 1)
        return {"units": units, "known": domain_scores(out, units)}

    def known(self, name):
        return self.outcomes.get(f"harness:{name}", {}).get("known")

    def evaluation_settings(self, name):
        settings = {key: value for key, value in self.recipe.evaluate.items() if key not in FINAL}
        return settings | ({"known": known["exact_match"]} if (known := self.known(name)) else {})

    def evaluate(self, name, model):
        def progress(what, score):
            self.say(name, f"{what:<12} {score}")

        beside = None if name == "teacher" else self.teacher
        return {"result": evaluate(model, self.recipe, progress, self.known(name), beside)}

    def evaluations(self):
        """{model: what `evaluate` found}."""
        stages = {name: f"evaluate:{name}" for name in self.models}
        return {name: self.outcomes[stage]["result"] for name, stage in stages.items() if stage in self.outcomes}

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
        units = self.outcomes.get("harness:teacher", {}).get("units")
        return compare_with_teacher(self.recipe, self.teacher, self.out / "evaluation", out, units)

    def measure(self, out, again, teacher, student):
        found = measure_efficiency(self.recipe, teacher, student, report=partial(self.say, "efficiency"))
        image = as_png(draw_efficiency, {"efficiency": found})
        write_efficiency(found, out, {picture_name(0): image} if image else {})

    # --- the report and the folder `student` -------------------------------------------------------------------

    def report(self, student):
        """Write results.json, report.md and pictures; returns the results."""
        results, this_call = self.results(student), time.time() - self.begin
        stages, earlier = sum(self.seconds.values()), sum(self.reused.values())
        rest = max(0.0, this_call - (stages - earlier))  # comparing, gates, a sample, loading
        results["seconds"] |= {"everything else": round(rest, 1), "whole run": round(stages + rest, 1)}
        results["seconds"] |= {"this call": round(this_call, 1)} if self.reused else {}
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        return results

    def log(self, stage):
        return json.loads((self.path(stage) / "training_log.json").read_text(encoding="utf-8"))

    def results(self, student):
        records = [s for s in read_provenance(self.path(self.aligned)) if s["stage"] == "align"]
        layers = records[0]["figures"]["relative_error"] if records else []
        keys = [f"layer_{layer['layer']}/relative_error" for layer in layers]
        logged = [entry for entry in self.log(self.aligned) if keys[0] in entry] if keys else []
        curve = [{"step": entry["step"], "error": [entry[key] for key in keys]} for entry in logged]
        logs = {name: [e for e in self.log(stage) if "loss" in e] for name, stage in self.experts.items()}
        results = {
            "title": f"{self.recipe.name}: a Transformer becomes a hybrid xLSTM",
            "teacher": Path(str(self.teacher)).name,
            **report_scores(self.evaluations()),
            "alignment": {"layers": layers, "curve": curve},
            "distillation": logs,
            "gates": mean_gates(student, self.recipe),
            "seconds": dict(self.seconds),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if self.recipe.evaluate and "examples" in self.recipe.evaluate:
            results["sample"] = sample_text(student, tasks.test_examples("strings", 1)[0].prompt)
        return results | self.against_the_teacher()

    def against_the_teacher(self):
        """The parts of the results that lm-eval, the comparison and the efficiency report bring."""
        section = self.recipe.evaluate or {}
        notes = [] if self.recipe.align["max_steps"] else [NO_STAGE_I.format(self.path(self.aligned).name)]
        notes += [MISSING] * (bool(units_of(section)) and not harness_installed())
        found = {"notes": notes} if notes else {}
        if "harness:student" in self.outcomes:
            rows = long_context_rows(*(self.outcomes[f"harness:{side}"]["units"] for side in ("teacher", "student")))
            found |= {"long_context": rows} if rows else {}
        if comparison := self.outcomes.get("compare"):
            found["comparison"] = comparison
        if "efficiency" in self.outcomes:
            found["efficiency"] = json.loads((self.out / "efficiency/efficiency.json").read_text(encoding="utf-8"))
        return found

    def card(self, out, again, student):
        """The folder `student`: the last checkpoint with its evaluation in the record, its card and the pictures."""
        results = self.outcomes["report"]
        with staged(out, overwrite=True) as folder:
            for file in [*student.iterdir(), *self.out.glob("*.png")]:
                if file.name != "manifest.json":
                    shutil.copy(file, folder / file.name)
            if results.get("students"):
                tools = {"lm_eval": version("lm_eval")} if "harness:student" in self.outcomes else {}
                record = {"config": self.recipe.evaluate | tools, "figures": figures_of(results)}
                seconds = results["seconds"].get("whole run")
                add_provenance(folder, "evaluate", parent=student, seconds=seconds, **record)
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
        found = []
        for r in failed:
            difference = math.inf if r["difference"] is None else r["difference"]
            reason = r["note"] or f"{difference:.2g}, at most {r['allowed']:.1g}"
            found.append(f"{r['name']} ({reason})")
        raise EvaluationError(
            f"{note.get('student', 'the student')}: no scores, because {len(failed)} of {len(note['checks'])} checks failed: "
            f"{'; '.join(found)}. What generates is not what was trained; `xlstm-hybrid doctor` says which versions were "
            "tested, `xlstm-hybrid verify` checks again"
        )


def require_report(folder, note):
    """Raise CheckpointError where the efficiency report is gone."""
    if not (folder / "efficiency.json").is_file():
        raise CheckpointError(
            f"{folder.name}/efficiency.json is gone, expected the report that was measured: it is measured again"
        )


def contradictions_in(evaluations):
    """{model: {domain: samples}} of evaluations that cannot be, see `scores.contradictions`."""
    return {name: result["contradictions"] for name, result in evaluations.items() if result.get("contradictions")}


def report_scores(evaluations):
    """The part of the results that comes from evaluations; {} where there is none."""
    scores = {
        name: {k: result[k] for k in ("exact_match", "perplexity")}
        | {
            k: {source: a[k] for source, a in found.items()}
            for k in ("kl", "top1")
            if (found := result.get("agreement"))
        }
        for name, result in evaluations.items()
    }
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
        **{k: student[k] for k in ("kl", "top1") if k in student},
        "teacher_exact_match": results["teacher_scores"]["exact_match"],
        "teacher_perplexity": results["teacher_scores"]["perplexity"],
        **{k: verdict[k] for k in ("alpha_star", "c_0", "recovery", "resampled") if verdict.get(k) is not None},
        "long_context": results.get("long_context", {}),
    }
    return {k: v for k, v in figures.items() if v != {}}
