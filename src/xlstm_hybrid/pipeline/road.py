"""The road: all stages of a recipe in one directory. A finished stage is kept, an interrupted one starts again."""

import hashlib
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from xlstm_hybrid.checkpoint.files import add_provenance, read_provenance, staged, verify, write_json, write_manifest
from xlstm_hybrid.checkpoint.locks import held
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.data import toy_domains as tasks
from xlstm_hybrid.errors import CheckpointError, ConfigError, EvaluationError
from xlstm_hybrid.evaluation.comparison import paired_verdict, record
from xlstm_hybrid.evaluation.equivalence import as_json, verify_checkpoint, wrapping_length
from xlstm_hybrid.evaluation.scores import named_contradictions, own_results
from xlstm_hybrid.model.generation_checks import GENERATION
from xlstm_hybrid.pipeline.final import (
    MISSING,
    check_evaluation,
    compare_sides,
    domain_scores,
    harness_installed,
    judge_sides,
    long_context_rows,
    measure_sides,
    units_of,
)
from xlstm_hybrid.pipeline.judge import evaluate, mean_gates, sample
from xlstm_hybrid.pipeline.merging import base_of, expert_statistics, merge_experts
from xlstm_hybrid.pipeline.settings import Parser, batch_of, processes
from xlstm_hybrid.pipeline.stages import align, distill, multi_teacher, on_policy
from xlstm_hybrid.recipe.merge_settings import NEED_STATISTICS, ON_POLICY
from xlstm_hybrid.recipe.schema import FINAL, MIXES, resolve_teacher
from xlstm_hybrid.reports.card import write_card
from xlstm_hybrid.reports.efficiency import draw_efficiency, picture_name, write_efficiency
from xlstm_hybrid.reports.efficiency import record as record_costs
from xlstm_hybrid.reports.run import as_png, table, write_report
from xlstm_hybrid.reports.sections import time_table

# What a student passes before it is judged
CHECKS = {*GENERATION, "cached decoding = uncached", "left padding, beside another row = none"}
RECORDS = ("provenance.json", "training_log.json", "README.md")  # and pictures: how a checkpoint was made, with times that no run repeats


def fingerprint(directory):
    """SHA-256 over the files of a checkpoint as its manifest lists them, records left out, or over config and weight sizes where it has none: what
    a later stage was built from. A stage that is made again with the same outcome has the same one."""
    directory = Path(directory)
    manifest = directory / "manifest.json"
    if manifest.is_file():
        files = json.loads(manifest.read_text())["files"]
        kept = {name: files[name]["sha256"] for name in sorted(files) if name not in RECORDS and not name.endswith(".png")}
    else:
        kept = sorted((p.name, p.stat().st_size) for p in directory.glob("*") if p.is_file())
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def check_settings(recipe):
    """Raise ConfigError, before anything runs, for a setting that the trainers do not have."""
    from xlstm_hybrid.training.alignment import AlignmentConfig
    from xlstm_hybrid.training.distillation import SparseKDConfig

    sections = {"align": AlignmentConfig, "distill": SparseKDConfig}
    found = {name: getattr(recipe, name) for name in (*sections, "on_policy")} | {"merge.on_policy": (recipe.merge or {}).get("on_policy")}
    if found["on_policy"] is not None or found["merge.on_policy"] is not None:
        from xlstm_hybrid.training.on_policy import OnPolicyKDConfig

        sections |= {name: OnPolicyKDConfig for name in ("on_policy", "merge.on_policy") if found[name] is not None}
    base_of(recipe, recipe.path)  # raises for a path that is not there
    for name, config in sections.items():
        parser, settings = Parser(config), found[name]
        parser.check(settings, f"{recipe.path.name}, {name}")
        parser.typed(settings, name)
        batch_of(settings, name)


class Road:
    """Walks a recipe in `out`.

    Args:
        redo: make stages again whose settings or parents have changed; otherwise that is a ConfigError.
        start: an aligned student from elsewhere, in the place of the recipe's own convert and align.
    Raises:
        ConfigError: settings that no trainer has; more than one process.
    """

    def __init__(self, recipe, out=None, redo=False, console=None, start=None):
        if processes() > 1:
            raise ConfigError("a whole recipe walks in one process: launch its training stages (align, distill, on-policy) as verbs of their own")
        self.recipe, self.out, self.redo = recipe, Path(out or recipe.out), redo
        self.console, self.seconds, self.kept, self.harness = console or Console(emoji=False), {}, {}, None
        self.teacher, self.given = resolve_teacher(recipe), start and Path(start)
        self.folder = {
            "convert": self.out / "converted",
            "align": self.out / "aligned",
            "merge": self.out / "merged",
            "multi-teacher": self.out / "taught",
        }
        self.folder |= {f"distill:{name}": self.out / "experts" / name for name in recipe.experts}
        self.folder |= {f"on-policy:{name}": self.out / "on_policy" / name for name in recipe.experts}

    def spec(self, settings, parents):
        parents = [fingerprint(p) if Path(p).is_dir() else str(p) for p in parents]
        return json.loads(json.dumps({"settings": settings, "seed": self.recipe.seed, "parents": parents}, default=str))

    def stage(self, name, settings, parents, build):
        """Run `build(directory, overwrite)` unless its directory is there, verified, and made from the same settings and parents.

        Of several launches in one run directory one builds a stage, and the others wait for it and keep it.
        """
        directory, spec = self.folder[name], self.spec(settings, parents)
        note = self.out / "stages" / f"{name.replace(':', '-')}.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        with held(note.with_name(f".claim-{note.stem}"), lambda who: self.console.print(f"{name}: waiting for another launch (process {who})")):
            if directory.exists() and note.is_file() and self.keep(name, directory, json.loads(note.read_text()), spec):
                return directory
            self.console.rule(f"{name}")
            start = time.time()
            build(directory, directory.exists())
            self.seconds[name] = round(time.time() - start, 1)
            write_json(note, {"spec": spec, "seconds": self.seconds[name]})
        self.console.print(f"{name}: {self.seconds[name]:.0f} s")
        return directory

    def keep(self, name, directory, before, spec):
        """Whether a stage that was made `before` can stay; ConfigError where it was made otherwise and must not be made again."""
        if self.changed(directory.name, before["spec"], spec):
            return False
        try:
            verify(directory, level="size")
        except CheckpointError as error:
            self.console.print(f"[yellow]{name}: made again, {error}[/yellow]")
            return False
        self.seconds[name] = self.kept[name] = before["seconds"]
        self.console.print(f"[dim]{name}: kept from an earlier run ({before['seconds']:.0f} s)[/dim]")
        return True

    def changed(self, what, before, spec):
        """Whether `what` was made otherwise and has to be made again; ConfigError where it must not be."""
        names = sorted(k for k in spec if spec[k] != before.get(k))
        if names and not self.redo:
            raise ConfigError(f"{what} was made with other {', '.join(names)}: pass --redo to make it again, or another --out to keep it")
        return bool(names)

    def say(self, who, what):
        self.console.print(f"  {who:>12}  {what}", markup=False, highlight=False, soft_wrap=True)

    def prove(self, student):
        """Check that the student generates what it is, before anything judges its texts; kept like a stage.

        Raises:
            EvaluationError: it does not.
        """
        note = self.out / "stages" / "verify.json"
        versions = {name: version(name) for name in ("transformers", "torch")}
        spec = self.spec({"checks": sorted(CHECKS), **versions}, [student])
        before = json.loads(note.read_text()) if note.is_file() else {}
        if before.get("spec") == spec and before["passed"]:
            self.seconds["verify"] = self.kept["verify"] = before["seconds"]
            return
        self.console.rule("verify")
        start, device = time.time(), "cuda" if torch.cuda.is_available() else "cpu"
        results = verify_checkpoint(student, length=wrapping_length, device=device, only=CHECKS)
        self.seconds["verify"] = round(time.time() - start, 1)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, as_json(results, spec=spec, seconds=self.seconds["verify"]))
        if failed := [r for r in results if not r.passed]:
            found = "; ".join(f"{r.name} ({r.note or f'{r.difference:.2g}, at most {r.allowed:.1g}'})" for r in failed)
            raise EvaluationError(
                f"{Path(student).name}: no scores, because {len(failed)} of {len(results)} checks failed: {found}. What "
                "generates is not what was trained; `xlstm-hybrid doctor` says which versions were tested, `xlstm-hybrid "
                "verify` checks again"
            )
        self.console.print(f"verify: {len(results)} checks passed, {self.seconds['verify']:.0f} s")

    def judge(self, name, directory, known=None):
        """Evaluation of one model, kept in a file so that an interrupted run does not judge it twice; `known`: see `evaluate`."""
        settings = {k: v for k, v in self.recipe.evaluate.items() if k not in FINAL}
        spec = self.spec(settings | ({"known": known["exact_match"]} if known else {}), [directory])
        path = self.out / "evaluation" / f"{name}.json"
        if path.is_file() and (kept := json.loads(path.read_text()))["spec"] == spec:
            self.seconds[f"evaluate:{name}"] = self.kept[f"evaluate:{name}"] = kept["seconds"]
            return kept["result"]
        start = time.time()
        result = evaluate(directory, self.recipe, lambda what, score: self.say(name, f"{what:<12} {score}"), known)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.seconds[f"evaluate:{name}"] = round(time.time() - start, 1)
        write_json(path, {"spec": spec, "seconds": self.seconds[f"evaluate:{name}"], "result": result})
        return result

    def by_harness(self, student):
        """`({"teacher", "student": what lm-eval found on the domains}, parts of the results)`; nothing where the recipe does not ask for lm-eval."""
        folder = self.out / "evaluation" / "harness"
        if not units_of(self.recipe.evaluate):
            return {}, {}
        if not harness_installed():
            self.console.print(MISSING, style="yellow", markup=False, soft_wrap=True)  # its [eval] is no markup
            return {}, {"notes": [MISSING]}
        sides = {"teacher": self.teacher, "student": student}
        self.harness = judge_sides(self.recipe, sides, folder, self.redo, lambda side, line: self.say(side, line))
        self.seconds |= {f"harness:{side}": round(sum(unit["seconds"] for unit in found.values()), 1) for side, found in self.harness.items()}
        rows = long_context_rows(self.harness)
        return {side: domain_scores(folder / side, found) for side, found in self.harness.items()}, {"long_context": rows} if rows else {}

    def beside_the_teacher(self, student):
        """The comparison with the teacher where the recipe names tasks of lm-eval, the costs where it asks for them."""
        found, folder = {}, self.out / "evaluation"
        if units_of(self.recipe.evaluate) and (comparison := compare_sides(self.recipe, self.teacher, folder, self.harness)):
            found["comparison"] = comparison
        if "efficiency" in self.recipe.evaluate:
            found["efficiency"] = self.costs(student)
        return found

    def costs(self, student):
        """The efficiency report of teacher and student, kept like a stage."""
        folder, note = self.out / "efficiency", self.out / "stages" / "efficiency.json"
        spec = self.spec(self.recipe.evaluate["efficiency"] | {"dtype": self.recipe.teacher_dtype}, [self.teacher, student])
        if (folder / "efficiency.json").is_file() and note.is_file():
            before = json.loads(note.read_text())
            if not self.changed("efficiency", before["spec"], spec):
                self.seconds["efficiency"] = self.kept["efficiency"] = before["seconds"]
                return json.loads((folder / "efficiency.json").read_text())
        start = time.time()
        found = measure_sides(self.recipe, self.teacher, student, report=lambda what: self.say("efficiency", what))
        image = as_png(draw_efficiency, {"efficiency": found})
        write_efficiency(found, folder, {picture_name(0): image} if image else {})
        self.seconds["efficiency"] = round(time.time() - start, 1)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"spec": spec, "seconds": self.seconds["efficiency"]})
        return json.loads((folder / "efficiency.json").read_text())

    def walk(self):
        """All stages; returns the results that the report shows."""
        recipe, start = self.recipe, time.time()
        check_settings(recipe)
        check_evaluation(recipe)
        self.out.mkdir(parents=True, exist_ok=True)
        converted, aligned = self.start()
        experts = {name: self.expert(name, aligned) for name in recipe.experts}
        student = self.merged(experts, aligned)
        self.prove(student)
        models = {"teacher": self.teacher, "converted": converted, "aligned": aligned, **{f"expert {n}": d for n, d in experts.items()}}
        if recipe.merge is None:
            models.pop(f"expert {next(iter(experts))}")
        judged, measured = {}, {}
        if recipe.evaluate is not None:
            self.console.rule("evaluate")
            known, measured = self.by_harness(student)
            judged = {name: self.judge(name, directory, known.get(name)) for name, directory in (models | {"student": student}).items()}
            if not contradictions_in(judged):
                measured |= self.beside_the_teacher(student)
        results = self.results(judged, aligned, experts, student) | measured
        this_call = time.time() - start
        rest = max(0.0, this_call - (sum(self.seconds.values()) - sum(self.kept.values())))  # comparing, gates, a sample, loading
        results["seconds"] |= {"everything else": round(rest, 1), "whole run": round(sum(self.seconds.values()) + rest, 1)}
        results["seconds"] |= {"this call": round(this_call, 1)} if self.kept else {}
        self.conclude(results, student)
        return results

    def start(self):
        """`(converted, aligned)`: what all experts start from; of a start from elsewhere, which has its record, the second alone."""
        recipe = self.recipe
        if self.given is not None:
            verify(self.given)
            return None, self.given
        converted = self.stage("convert", recipe.student | self.revision(), [self.teacher], self.build_converted)
        return converted, self.stage(
            "align", recipe.align | {"data": recipe.data}, [converted], lambda d, o: align(converted, d, recipe, overwrite=o)
        )

    def revision(self):
        return {"revision": self.recipe.revision} if self.recipe.revision else {}

    def build_converted(self, directory, overwrite):
        report = convert(self.teacher, directory, overwrite=overwrite, **self.recipe.student, **self.revision())
        self.console.print(str(report))

    def expert(self, name, aligned):
        """One expert: distilled, then on its own samples if the recipe asks for it."""
        recipe, mixture = self.recipe, self.recipe.experts[name]
        reads = {"mixture": mixture, "length": recipe.length} | {k: v for k, v in recipe.data.items() if k in ("held_out", "shuffle_buffer")}
        reads |= {"teacher_dtype": recipe.teacher_dtype} if recipe.teacher_dtype != "float32" else {}
        expert = self.stage(
            f"distill:{name}",
            recipe.distill | reads,
            [aligned, self.teacher],
            lambda d, o: distill(aligned, self.teacher, d, recipe, name, overwrite=o),
        )
        if recipe.on_policy is None:
            return expert
        return self.stage(
            f"on-policy:{name}",
            recipe.on_policy | reads,
            [expert, self.teacher],
            lambda d, o: on_policy(expert, self.teacher, d, recipe, name, overwrite=o),
        )

    def expert_folder(self, name):
        """Where a finished expert is: after its last stage."""
        return self.folder[f"distill:{name}" if self.recipe.on_policy is None else f"on-policy:{name}"]

    def merged(self, experts, aligned):
        """The student: the experts merged as the recipe says, what they taught on its own samples, or the only expert."""
        recipe, section = self.recipe, self.recipe.merge
        if section is None:
            return next(iter(experts.values()))
        settings, student = {k: v for k, v in section.items() if k != "on_policy"}, aligned
        if section["method"] != ON_POLICY:
            base, parents = base_of(recipe, aligned), list(experts.values())
            parents += [base] * (base is not None) + [self.teacher] * ("search" in section)
            spec = self.spec(settings, parents)
            student = self.stage("merge", settings, parents, lambda d, o: self.build_merged(d, o, experts, aligned, spec))
        if "on_policy" not in section:
            return student
        reads = {"weights": section.get("weights"), "experts": recipe.experts} | {k: v for k, v in self.recipe.data.items() if k not in MIXES}
        return self.stage(
            "multi-teacher",
            section["on_policy"] | reads,
            [student, *experts.values()],
            lambda d, o: multi_teacher(student, experts, d, recipe, overwrite=o),
        )

    def build_merged(self, directory, overwrite, experts, aligned, spec):
        """Statistics and candidates of a search are kept beside the stages' notes: an interrupted merge goes on from them."""
        section, files = self.recipe.merge, None
        if section["method"] in NEED_STATISTICS:
            settings = {"method": section["method"], **section.get("statistics", {})}
            files = [
                expert_statistics(self.recipe, n, d, self.out / "statistics" / f"{n}.safetensors", self.spec(settings, [d]))
                for n, d in experts.items()
            ]
        table = self.out / "stages" / f"search-{hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]}.json"
        found = merge_experts(
            self.recipe, experts, directory, aligned, self.teacher, files, table, overwrite, lambda c: self.console.print(f"  {candidate(c)}")
        )
        if found is not None:
            self.console.print(f"weights of {', '.join(experts)}: {', '.join(f'{w:.3f}' for w in found.weights)}")

    def results(self, judged, aligned, experts, student):
        log = json.loads((aligned / "training_log.json").read_text())
        layers = next(s for s in read_provenance(aligned) if s["stage"] == "align")["figures"]["relative_error"]
        keys = [f"layer_{layer['layer']}/relative_error" for layer in layers]
        curve = [{"step": e["step"], "error": [e[k] for k in keys]} for e in log if keys and keys[0] in e]
        losses = {name: [e for e in json.loads((d / "training_log.json").read_text()) if "loss" in e] for name, d in experts.items()}
        results = {
            "title": f"{self.recipe.name}: a Transformer becomes a hybrid xLSTM",
            "teacher": Path(str(self.teacher)).name,
            **scores_of(judged),
            "alignment": {"layers": layers, "curve": curve},
            "distillation": losses,
            "gates": mean_gates(student, self.recipe),
            "seconds": dict(self.seconds),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if judged and "examples" in self.recipe.evaluate:
            results["sample"] = sample(student, tasks.test_examples("strings", 1)[0].prompt)
        return results

    def conclude(self, results, last):
        """Report and pictures; `student/` is the last checkpoint with its evaluation in the provenance, its card and the
        pictures.

        Raises:
            EvaluationError: scores contradict the models that they are of; the report says so, and `student/` is not made.
        """
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        if found := results.get("contradictions"):
            again = f"Then remove {self.out.name}/evaluation and start the run again"
            raise EvaluationError(f"{named_contradictions(found)}. {again}")
        with staged(self.out / "student", overwrite=True) as folder:
            for file in [*last.iterdir(), *self.out.glob("*.png")]:
                if file.name != "manifest.json":
                    shutil.copy(file, folder / file.name)
            if results.get("students"):
                seconds = results["seconds"].get("whole run")
                config = self.recipe.evaluate | ({"lm_eval": version("lm_eval")} if self.harness else {})
                add_provenance(folder, "evaluate", parent=last, config=config, figures=figures_of(results), seconds=seconds)
            if results.get("comparison"):
                record(results["comparison"], "student", folder)
            if results.get("efficiency"):
                record_costs(results["efficiency"], folder)
            write_card(folder, results if results.get("students") else None)
            write_manifest(folder)
        if results.get("win_and_tie"):
            self.console.print(table(results))
        if results.get("seconds"):
            self.console.print(time_table(results))
        self.console.print(f"report: {self.out / 'report.md'}   student: {self.out / 'student'}")


def candidate(found):
    """A candidate of a search in few words."""
    return f"{', '.join(f'{w:.3f}' for w in found.weights)}: alpha* {found.alpha_star:.4f}, C_0 {found.c_0:.2f}, recovery {found.recovery:.4f}"


def contradictions_in(judged):
    """{model: {domain: samples}} of evaluations that cannot be, see `evaluation.contradictions`."""
    return {name: result["contradictions"] for name, result in judged.items() if result.get("contradictions")}


def scores_of(judged):
    """The part of the results that comes from evaluations; {} where there is none."""
    scores = {name: {k: result[k] for k in ("exact_match", "perplexity")} for name, result in judged.items()}
    if not scores:
        return {}
    teacher, wrong = scores.pop("teacher"), contradictions_in(judged)
    found = {"contradictions": wrong} if wrong else {}
    found |= {"teacher_scores": teacher, "students": scores}
    if teacher["exact_match"] and not wrong:
        sides = {name: own_results(result, Path(name)) for name, result in judged.items()}
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
