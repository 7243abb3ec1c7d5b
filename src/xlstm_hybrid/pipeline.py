"""The stages of a recipe, each a checkpoint directory in and one out, and the road that walks them and resumes.

teacher -> convert -> align -> distil (one expert per domain mix) -> merge -> evaluate -> report and card
"""

import hashlib
import json
import os
import random
import resource
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlstm_hybrid import tasks
from xlstm_hybrid.artifacts import add_provenance, read_provenance, staged, verify, write_manifest
from xlstm_hybrid.card import write_card
from xlstm_hybrid.conversion import convert
from xlstm_hybrid.errors import CheckpointError, ConfigError
from xlstm_hybrid.evaluation import exact_match, perplexity, win_and_tie
from xlstm_hybrid.merging import merge
from xlstm_hybrid.recipe import resolve_teacher
from xlstm_hybrid.report import table, write_report

HELD_OUT_SEED = 1_000_003  # added to the seed for data that nothing trains on


# --- data ------------------------------------------------------------------------------------------------------


def packed_rows(tokenizer, mixture, count, length, seed):
    """`count` packed rows of `length` tokens; see `tasks.packed_row`."""
    stream = tasks.documents(random.Random(seed), tokenizer, mixture)
    return [tasks.packed_row(stream, length) for _ in range(count)]


def collate(rows):
    """Rows of equal length to a batch of tensors [B, T]."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def load(checkpoint):
    """`(model, tokenizer)`: float32 weights, in eval mode, on the GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(checkpoint)


# --- stages ----------------------------------------------------------------------------------------------------


def trainer_arguments(settings, work, seed):
    """Fields of a trainer config: the recipe's own over what every stage shares."""
    shared = {
        "output_dir": work,
        "seed": seed,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "packing": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return {**shared, **settings}


def dataset(tokenizer, mixture, recipe, settings, seed):
    """The rows that a training stage will read, as a `datasets.Dataset`."""
    from datasets import Dataset

    batch = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
    return Dataset.from_list(packed_rows(tokenizer, mixture, settings["max_steps"] * batch, recipe.data["sequence_length"], seed))


def save_stage(model, tokenizer, folder, log):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "training_log.json").write_text(json.dumps(log, indent=1))


def align(student, out, recipe, overwrite=False):
    """Stage I: train feature maps and gates of a converted student; returns the figures it also writes."""
    from xlstm_hybrid.trainers.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment

    start = time.time()
    model, tokenizer = load(student)
    held_out = packed_rows(tokenizer, recipe.data["mixture"], 16, recipe.data["sequence_length"], recipe.seed + HELD_OUT_SEED)
    batches = [{k: v for k, v in collate(held_out[j : j + 8]).items() if k != "labels"} for j in (0, 8)]
    before = measure_alignment(model, batches)
    with tempfile.TemporaryDirectory() as work:
        trainer = AlignmentTrainer(
            model=model,
            args=AlignmentConfig(**trainer_arguments(recipe.align, work, recipe.seed)),
            data_collator=collate,
            processing_class=tokenizer,
            train_dataset=dataset(tokenizer, recipe.data["mixture"], recipe, recipe.align, recipe.seed),
        )
        trainer.train()
    after = measure_alignment(model.float(), batches)
    figures = {"relative_error": [{"layer": n, "before": before[n], "after": after[n]} for n in before]}
    finish(model, tokenizer, out, trainer.state.log_history, "align", [student], recipe.align | {"data": recipe.data}, figures, start, overwrite)
    return figures


def distill(student, teacher, out, recipe, mixture, name, overwrite=False):
    """Stage II: one domain expert by sparse knowledge distillation from an online teacher."""
    from xlstm_hybrid.trainers.sparse_kd import SparseKDConfig, SparseKDTrainer

    start = time.time()
    model, tokenizer = load(student)
    teacher_model, _ = load(teacher)
    with tempfile.TemporaryDirectory() as work:
        trainer = SparseKDTrainer(
            model=model,
            teacher=teacher_model,
            args=SparseKDConfig(**trainer_arguments(recipe.distill, work, recipe.seed)),
            data_collator=collate,
            processing_class=tokenizer,
            train_dataset=dataset(tokenizer, mixture, recipe, recipe.distill, f"{recipe.seed}-{name}"),
        )
        trainer.train()
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    figures = {key: float(last[key]) for key in ("loss", "ce", "kl") if key in last}
    finish(
        model,
        tokenizer,
        out,
        trainer.state.log_history,
        f"distill:{name}",
        [student, teacher],
        recipe.distill | {"mixture": mixture},
        figures,
        start,
        overwrite,
    )
    return figures


def finish(model, tokenizer, out, log, stage, parents, config, figures, start, overwrite):
    with staged(out, overwrite=overwrite) as folder:
        save_stage(model, tokenizer, folder, log)
        add_provenance(folder, stage, parent=parents[0], config=config, figures=figures, seconds=round(time.time() - start, 1))
        write_manifest(folder)


def evaluate(model_dir, recipe, progress=None):
    """Exact match (greedy, batched, through the cache) and perplexity of one checkpoint on every domain; plus perplexity of real text."""
    model, tokenizer = load(model_dir)
    settings, result = recipe.evaluate, {"exact_match": {}, "perplexity": {}, "samples": {}}
    for domain in tasks.DOMAINS:
        examples = tasks.test_examples(domain, settings["examples"])
        judged = exact_match(model, tokenizer, examples, batch_size=settings["batch_size"])
        result["exact_match"][domain] = judged.score
        result["samples"][domain] = [asdict(s) if not isinstance(s, dict) else s for s in judged.samples]
        result["perplexity"][domain] = perplexity(model, [tasks.encode(tokenizer, e) for e in examples])
        if progress:
            progress(domain, judged.score)
    chunks = tasks.text_chunks("test", size=300)
    rows = [tasks.encode_text(tokenizer, c) for c in chunks[:: max(1, len(chunks) // settings["text_chunks"])][: settings["text_chunks"]]]
    result["perplexity"]["text"] = perplexity(model, rows)
    return result


@torch.no_grad()
def mean_gates(model_dir, recipe):
    """Mean output gate per layer and head (1: mLSTM, 0: window) over held-out rows: [hybrid layers][heads]."""
    model, tokenizer = load(model_dir)
    rows = packed_rows(tokenizer, recipe.data["mixture"], 8, recipe.data["sequence_length"], recipe.seed + HELD_OUT_SEED)
    batch = {k: v.to(model.device) for k, v in collate(rows).items() if k != "labels"}
    return [gate.mean((0, 1)).tolist() for gate in model(**batch, use_cache=False, output_gates=True)["gates"]]


def sample(model_dir, prompt):
    """A greedy continuation, as a user would ask for it."""
    model, tokenizer = load(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=24, do_sample=False)
    return {"prompt": prompt, "output": tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)}


# --- the road --------------------------------------------------------------------------------------------------


def fingerprint(directory):
    """SHA-256 of a checkpoint's manifest, or of its config and weight sizes where it has none: what a later stage was built from."""
    directory = Path(directory)
    manifest = directory / "manifest.json"
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    sizes = sorted((p.name, p.stat().st_size) for p in directory.glob("*") if p.is_file())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


class Road:
    """Walks a recipe in `out`; a finished stage is kept, an interrupted one starts again.

    Args:
        redo: make stages again whose settings or parents have changed; otherwise that is a ConfigError.
    """

    def __init__(self, recipe, out=None, redo=False, console=None):
        self.recipe, self.out, self.redo = recipe, Path(out or recipe.out), redo
        self.console, self.seconds = console or Console(emoji=False), {}
        self.teacher = resolve_teacher(recipe)
        self.folder = {"convert": self.out / "converted", "align": self.out / "aligned", "merge": self.out / "merged"}
        self.folder |= {f"distill:{name}": self.out / "experts" / name for name in recipe.experts}

    def spec(self, settings, parents):
        parents = [fingerprint(p) if Path(p).is_dir() else str(p) for p in parents]
        return json.loads(json.dumps({"settings": settings, "seed": self.recipe.seed, "parents": parents}, default=str))

    def stage(self, name, settings, parents, build):
        """Run `build(directory, overwrite)` unless its directory is there, verified, and made from the same settings and parents."""
        directory, spec = self.folder[name], self.spec(settings, parents)
        note, redo = self.out / "stages" / f"{name.replace(':', '-')}.json", False
        if directory.exists() and note.is_file():
            before = json.loads(note.read_text())
            changed = sorted(k for k in spec if spec[k] != before["spec"].get(k))
            if changed and not self.redo:
                raise ConfigError(
                    f"{directory.name} was made with other {', '.join(changed)}: pass --redo to make it again, or another --out to keep it"
                )
            if not changed:
                try:
                    verify(directory, level="size")
                    self.seconds[name] = before["seconds"]
                    self.console.print(f"[dim]{name}: kept from an earlier run ({before['seconds']:.0f} s)[/dim]")
                    return directory
                except CheckpointError as error:
                    self.console.print(f"[yellow]{name}: made again, {error}[/yellow]")
            redo = True
        self.console.rule(f"{name}")
        start = time.time()
        build(directory, redo or directory.exists())
        self.seconds[name] = round(time.time() - start, 1)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"spec": spec, "seconds": self.seconds[name]}, indent=1))
        self.console.print(f"{name}: {self.seconds[name]:.0f} s")
        return directory

    def judge(self, name, directory):
        """Evaluation of one model, kept in a file so that an interrupted run does not judge it twice."""
        spec = self.spec(self.recipe.evaluate, [directory])
        path = self.out / "evaluation" / f"{name}.json"
        if path.is_file() and (kept := json.loads(path.read_text()))["spec"] == spec:
            self.seconds[f"evaluate:{name}"] = kept["seconds"]
            return kept["result"]
        start = time.time()
        result = evaluate(directory, self.recipe, progress=lambda domain, score: self.console.print(f"  {name:>12}  {domain:<12} {score:6.1%}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.seconds[f"evaluate:{name}"] = round(time.time() - start, 1)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"spec": spec, "seconds": self.seconds[f"evaluate:{name}"], "result": result}, indent=1))
        os.replace(temporary, path)
        return result

    def walk(self):
        """All stages; returns the results that the report shows."""
        recipe, start = self.recipe, time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        converted = self.stage("convert", recipe.student, [self.teacher], self.build_converted)
        aligned = self.stage("align", recipe.align | {"data": recipe.data}, [converted], lambda d, o: align(converted, d, recipe, overwrite=o))
        experts = {
            name: self.stage(
                f"distill:{name}",
                recipe.distill | {"mixture": mixture, "length": recipe.data["sequence_length"]},
                [aligned, self.teacher],
                lambda d, o, name=name, mixture=mixture: distill(aligned, self.teacher, d, recipe, mixture, name, overwrite=o),
            )
            for name, mixture in recipe.experts.items()
        }
        weights = [recipe.merge["weights"][name] for name in experts]
        merged = self.stage(
            "merge",
            recipe.merge,
            list(experts.values()),
            lambda d, o: merge(list(experts.values()), d, weights=weights, method=recipe.merge["method"], overwrite=o),
        )
        self.console.rule("evaluate")
        models = {
            "teacher": self.teacher,
            "converted": converted,
            "aligned": aligned,
            **{f"expert {n}": d for n, d in experts.items()},
            "student": merged,
        }
        judged = {name: self.judge(name, directory) for name, directory in models.items()}
        results = self.results(judged, aligned, experts, merged)
        results["seconds"] |= {"whole run": round(sum(self.seconds.values()), 1), "this call": round(time.time() - start, 1)}
        self.conclude(results, merged)
        return results

    def build_converted(self, directory, overwrite):
        report = convert(self.teacher, directory, overwrite=overwrite, **self.recipe.student)
        self.console.print(str(report))

    def results(self, judged, aligned, experts, merged):
        scores = {name: {k: result[k] for k in ("exact_match", "perplexity")} for name, result in judged.items()}
        teacher = scores.pop("teacher")
        log = json.loads((aligned / "training_log.json").read_text())
        layers = next(s for s in read_provenance(aligned) if s["stage"] == "align")["figures"]["relative_error"]
        keys = [f"layer_{layer['layer']}/relative_error" for layer in layers]
        curve = [{"step": e["step"], "error": [e[k] for k in keys]} for e in log if keys[0] in e]
        losses = {name: [e for e in json.loads((d / "training_log.json").read_text()) if "loss" in e] for name, d in experts.items()}
        return {
            "title": f"{self.recipe.name}: a Transformer becomes a hybrid xLSTM",
            "teacher": Path(str(self.teacher)).name,
            "teacher_scores": teacher,
            "students": scores,
            "win_and_tie": {name: asdict(win_and_tie(s["exact_match"], teacher["exact_match"])) for name, s in scores.items()},
            "alignment": {"layers": layers, "curve": curve},
            "distillation": losses,
            "gates": mean_gates(merged, self.recipe),
            "sample": sample(merged, tasks.test_examples("strings", 1)[0].prompt),
            "seconds": dict(self.seconds),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }

    def conclude(self, results, merged):
        """Report and pictures; `student/` is the merged checkpoint with its evaluation in the provenance, its card and the pictures."""
        temporary = self.out / "results.json.tmp"
        temporary.write_text(json.dumps(results, indent=1))
        os.replace(temporary, self.out / "results.json")
        write_report(results, self.out)
        student, verdict = results["students"]["student"], results["win_and_tie"]["student"]
        figures = {
            "exact_match": student["exact_match"],
            "perplexity": student["perplexity"],
            "teacher_exact_match": results["teacher_scores"]["exact_match"],
            "teacher_perplexity": results["teacher_scores"]["perplexity"],
            **{k: verdict[k] for k in ("alpha_star", "c_0", "recovery")},
        }
        with staged(self.out / "student", overwrite=True) as folder:
            for file in [*merged.iterdir(), *self.out.glob("*.png")]:
                if file.name != "manifest.json":
                    shutil.copy(file, folder / file.name)
            add_provenance(
                folder, "evaluate", parent=merged, config=self.recipe.evaluate, figures=figures, seconds=results["seconds"].get("whole run")
            )
            write_card(folder, results)
            write_manifest(folder)
        self.console.print(table(results))
        self.console.print(f"report: {self.out / 'report.md'}   student: {self.out / 'student'}")
