"""Stage I with and without stage 0: held-out alignment error against tokens, and scores after stage I and after stage II.

    python benchmarks/calibration.py docs/calibration.json --seeds 0 1 2
    python benchmarks/calibration.py docs/calibration.json --ablate

Every run begins with the converted student of the recipe's teacher, on the CPU in float32. A run is a start and the
learning rate of stage I, "plain:0.01" or "calibrated:0.003"; both read the same rows for a seed. What is measured is
written after each run, and a run that is in the file is not made again. `--ablate` measures stage 0 alone: what its parts
are worth one after the other, and tokens. The figure is beside the file.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from xlstm_hybrid.checkpoint.files import read_json, write_file, write_json
from xlstm_hybrid.conversion.load import load_model, load_tokenizer
from xlstm_hybrid.data import collate, packed_rows
from xlstm_hybrid.data.toy_domains import DOMAINS, test_examples
from xlstm_hybrid.evaluation.scores import exact_match
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
from xlstm_hybrid.pipeline.settings import trainer_config
from xlstm_hybrid.pipeline.stages import batches_of, calibration_tokens, held_out_batches, without_labels
from xlstm_hybrid.recipe.schema import load_recipe, resolve_teacher
from xlstm_hybrid.reports.plots import BLUE, SKY, as_png, figure
from xlstm_hybrid.training import calibration
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer, measure_alignment
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of stage I's steps, after which the error is measured
TOKENS = (2048, 8192, 32768)  # that stage 0 is fitted to
RUNS = ("plain:0.01", "calibrated:0.01", "calibrated:0.005", "calibrated:0.003")
QUIET = {"disable_tqdm": True, "bf16": False, "logging_steps": 50, "save_strategy": "no", "report_to": "none"}


GATES = {"ridge": {}, "ridge .005": {"GATE_RIDGE": 0.005}, "ridge .5": {"GATE_RIDGE": 0.5}}
GATES |= {"1 step": {"GATE_STEPS": 1}, "2 steps": {"GATE_STEPS": 2}}


class Parts(calibration.Calibration):
    """What each part of stage 0 is worth: relative errors on the held-out batches, heads that are worse than their window
    counted as the window.
    """

    def run(self):
        mixer, longest = self.mixer, self.mixer.forget_bias().max()
        target = sum(seen.target for seen in self.held_out)
        found = {"window": (self.alone.sum() / target).item()}

        def note(name, constant=True):
            if constant:
                mixer.ogate_weight.zero_()
                mixer.ogate_bias.copy_(torch.logit(self.constant_gate()[1].clamp(3e-4, 0.98)))
            found[name] = (torch.minimum(self.error(self.held_out), self.alone).sum() / target).item()

        start, scales = mixer.first_map().expand_as(mixer.q_map), calibration.START_SCALES
        self.choose([{"q_map": q * start, "k_map": k * start} for q in scales for k in scales])
        note("identity maps")
        candidates = list(self.feature_maps())
        pairs = [(q, b) for q in calibration.QUERY_SCALES for b in calibration.SHARPNESS]
        for (q, b), candidate in zip(pairs, candidates, strict=True):
            self.choose([candidate])
            note(f"centroids: query scale {q}, sharpness {b}")
        self.choose(candidates)
        note("centroids: the best for each head")
        mixer.igate_weight.zero_()
        mixer.fgate_weight.zero_()
        self.choose([{"fgate_bias": longest.expand_as(mixer.fgate_bias)}])
        note("longest time constant")
        windows = (self.attention.sliding_window * torch.tensor([4.0, 16.0]) - 1).log()
        shorter = [{"fgate_bias": torch.full_like(mixer.fgate_bias, bias)} for bias in windows]
        chosen = self.choose([{"fgate_bias": longest.expand_as(mixer.fgate_bias)}, *shorter]).tolist()
        note("time constants: the best for each head")
        for name, changes in GATES.items():
            own = {key: getattr(calibration, key) for key in changes}
            vars(calibration).update(changes)
            self.fit_gate()
            vars(calibration).update(own)
            note(f"gate: {name}", constant=False)
        self.fit_gate()
        found["linear map before W_o"] = (self.corrected() / target).item()
        found["heads of a shorter time constant"] = sum(choice > 0 for choice in chosen) / len(chosen)
        return found

    def corrected(self, ridge=1e-2):
        """Squared error on the held-out batches after a [V, V] map of each head's mix, by ridge from the identity."""
        gram = cross = 0
        for seen in self.fitted:
            mixed, wanted = self.mixed(seen)
            gram = gram + torch.einsum("nhv,nhw->hvw", mixed, mixed)
            cross = cross + torch.einsum("nhv,nhw->hvw", mixed, wanted - mixed)
        size = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
        change = torch.linalg.solve(gram + torch.diag_embed(size[:, None].expand(-1, gram.shape[-1])), cross)
        total = 0
        for seen in self.held_out:
            mixed, wanted = self.mixed(seen)
            total = total + (wanted - mixed - torch.einsum("nhv,hvw->nhw", mixed, change)).square().sum()
        return total

    def mixed(self, seen):
        """`(mix, the teacher's attention)` at the real tokens, each [n, H, V]."""
        memory, o = self.memory(seen)
        mixed = seen.window + o[..., None] * (memory - seen.window)
        return (x[seen.tokens.real].double() for x in (mixed, seen.window + seen.missing))


class Bench:
    """One teacher, the student that a recipe makes of it, and rows by seed."""

    def __init__(self, recipe, work):
        self.recipe, self.work = recipe, work
        self.teacher = resolve_teacher(recipe)
        self.tokenizer = load_tokenizer(self.teacher, recipe.revision)
        self.held_out = held_out_batches(recipe, self.tokenizer)

    def student(self):
        return XLSTMHybridForCausalLM.from_teacher(self.teacher, **self.recipe.student).eval()

    def calibrated(self, model, seed, tokens=None):
        """Calibrate in place; `(CPU seconds, figures by layer)`."""
        recipe, start = self.seeded(seed), time.process_time()
        count = max(4, -(-(tokens or calibration_tokens(recipe)) // recipe.length))
        parts = (packed_rows(recipe, self.tokenizer, n, test=t) for n, t in ((count, False), (-(-count // 4), True)))
        figures = calibration.calibrate_model(model, *(without_labels(batches_of(rows, 16)) for rows in parts))
        return round(time.process_time() - start, 2), figures

    def seeded(self, seed):
        return replace(self.recipe, seed=self.recipe.seed + 1000 * seed)

    def error(self, model):
        errors = measure_alignment(model, self.held_out).values()
        return sum(errors) / len(errors)

    def trainer(self, cls, config, model, section, seed, expert=None, **settings):
        recipe, settings = self.seeded(seed), getattr(self.recipe, section) | settings | QUIET
        args = trainer_config(config, settings, section, self.work, recipe.seed)
        rows = packed_rows(recipe, self.tokenizer, args.max_steps * args.per_device_train_batch_size, expert)
        shared = {"train_dataset": Dataset.from_list(list(rows)), "data_collator": collate}
        teacher = () if section == "align" else (load_model(self.teacher, device="cpu"),)
        trainer = cls(model, *teacher, args=args, processing_class=self.tokenizer, **shared)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def align(self, model, seed, **settings):
        """Stage I; `[[tokens, held-out error]]`, its own start included."""
        trainer = self.trainer(AlignmentTrainer, AlignmentConfig, model, "align", seed, **settings)
        steps, batch = trainer.args.max_steps, trainer.args.per_device_train_batch_size * self.recipe.length
        curve, at = [[0, self.error(model)]], {max(1, round(share * steps)) for share in SHARES}

        class Measure(TrainerCallback):
            def on_step_end(callback, args, state, control, **kwargs):  # noqa: N805
                if state.global_step in at:
                    curve.append([state.global_step * batch, self.error(model)])

        trainer.add_callback(Measure())
        trainer.train()
        return curve

    def distill(self, model, seed, steps):
        fresh = type(model)(model.config)
        fresh.load_state_dict(model.state_dict())
        expert = list(self.recipe.experts)[-1]
        trainer = self.trainer(SparseKDTrainer, SparseKDConfig, fresh, "distill", seed, expert, max_steps=steps)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)

    def scores(self, model, examples):
        model = model.eval()
        found = {d: exact_match(model, self.tokenizer, test_examples(d, examples)).score for d in DOMAINS}
        return {name: round(value, 4) for name, value in found.items()}

    def run(self, start, rate, seed, stage_two, examples):
        model, result = self.student(), {"seconds": 0.0}
        if start == "calibrated":
            result["seconds"], _ = self.calibrated(model, seed)
        cpu = time.process_time()
        result["curve"] = self.align(model, seed, learning_rate=rate)
        result["align_seconds"] = round(time.process_time() - cpu, 2)
        result["aligned"] = self.scores(model, examples) if examples else None
        if stage_two:
            result["distilled"] = self.scores(self.distill(model, seed, stage_two), examples)
        return result

    def parts(self, seed):
        """{part: mean error over the layers}, see `Parts`."""
        own, calibration.Calibration = calibration.Calibration, Parts
        try:
            layers = list(self.calibrated(self.student(), seed)[1].values())
        finally:
            calibration.Calibration = own
        return {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}

    def tokens(self, seed, count):
        """Held-out error of stage 0 on so many tokens, and its CPU seconds."""
        model = self.student()
        seconds, _ = self.calibrated(model, seed, count)
        return {"error": self.error(model), "seconds": seconds}


def needed(curve, error):
    """Tokens after which a curve reaches an error, linearly between its points; None if it does not."""
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if high <= error:
            return before
        if low <= error:
            return round(before + (after - before) * (high - error) / (high - low))
    return None


def summary(runs):
    """{run: {"curve": [[tokens, mean, least, most]], "tokens_to_plain": for each seed}}."""
    found = {}
    for name, seeds in runs.items():
        curves = [result["curve"] for result in seeds.values()]
        points = zip(*curves, strict=True)
        rows = [[p[0][0], sum(y for _, y in p) / len(p), min(y for _, y in p), max(y for _, y in p)] for p in points]
        ends = {seed: runs.get("plain:0.01", {}).get(seed, {"curve": [[0, None]]})["curve"][-1][1] for seed in seeds}
        reached = [needed(result["curve"], ends[seed]) for seed, result in seeds.items() if ends[seed] is not None]
        found[name] = {"curve": rows, "tokens_to_plain": reached}
    return found


def draw(results):
    picture, (axes,) = figure()
    for name, colour in (("plain:0.01", SKY), ("calibrated:0.01", BLUE)):
        curve = results["summary"].get(name, {}).get("curve")
        if curve:
            tokens, mean, low, high = zip(*curve, strict=True)
            label = {"p": "stage I alone", "c": "stage 0 before it"}[name[0]]
            axes.plot([x / 1000 for x in tokens], mean, color=colour, marker="o", label=label)
            axes.fill_between([x / 1000 for x in tokens], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand tokens of stage I", ylabel="held-out relative error", yscale="log")
    axes.legend()
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--steps", type=int, help="of stage I; the recipe's by default")
    parser.add_argument("--stage-two", type=int, default=0, help="steps of stage II; none by default")
    parser.add_argument("--examples", type=int, default=0, help="prompts per domain; none by default")
    parser.add_argument("--ablate", action="store_true")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if options.steps:
        recipe.align["max_steps"] = options.steps
    bench = Bench(recipe, options.out.parent / f".{options.out.stem}")
    results = read_json(options.out, options.out.name) if options.out.is_file() else {"runs": {}, "ablations": {}}

    def save():
        results["summary"] = summary(results["runs"])
        write_json(options.out, results)

    if options.ablate:
        for seed in map(str, options.seeds):
            for name in ("parts", *TOKENS):
                place = results["ablations"].setdefault(str(name), {})
                if seed not in place:
                    place[seed] = bench.parts(int(seed)) if name == "parts" else bench.tokens(int(seed), name)
                    print(f"{name}, seed {seed}: {place[seed]}", flush=True)
                    save()
        return
    for seed in options.seeds:
        for name in options.runs:
            place, (start, rate) = results["runs"].setdefault(name, {}), name.split(":")
            if str(seed) not in place:
                place[str(seed)] = bench.run(start, float(rate), seed, options.stage_two, options.examples)
                print(f"{name}, seed {seed}: {place[str(seed)]}", flush=True)
                save()
    write_file(options.out.with_suffix(".png"), as_png(draw, results))


if __name__ == "__main__":
    main()
