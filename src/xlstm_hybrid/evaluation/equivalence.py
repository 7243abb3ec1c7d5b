"""Proofs on a checkpoint that the student is one function of its tokens, however they reach it.

Each check computes the same hidden states in two ways, or generates, see `generation_checks`; what counts is the largest
difference of the logits, in units of their standard deviation. The bound follows from the dtype, see `bound_of` and
`low_precision`. A check that raises has failed.
"""

import copy
import math
import re
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.conversion.load import DTYPES, check_generation, named_faults
from xlstm_hybrid.environment.precision import warn_if_slow
from xlstm_hybrid.errors import ConfigError, ConfigWarning
from xlstm_hybrid.evaluation.equivalence_checks import CHECKS, FILES, Subject, memory_lost
from xlstm_hybrid.model.generation_checks import GENERATION, bound, bound_of, difference
from xlstm_hybrid.model.layers import ROUTERS, DecoderLayer
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
from xlstm_hybrid.model.trained import edited_fields, recorded_values, told

# the one check whose ways must differ; and a pair of checks named by dtype
MEMORY, LOW = "the mLSTM's memory matters", "low precision"
TRAINED = "configuration = trained"  # fields that differ
DOUBLE_BYTES = 2**32  # a model whose float64 copy is smaller is checked in float64 on a CPU
POWER = 10  # a model whose logits change by less than this many bounds without its memory proves nothing, see `enough`
LOW_FACTOR = 4  # see `low_precision`


def dtype_name(model):
    return str(model.dtype).removeprefix("torch.")


@dataclass
class Result:
    """Outcome of one check.

    difference, allowed: in standard deviations of the logits; the difference is infinite where the check raised `note`.
    at_least: `allowed` is a lower bound: the one check whose two ways must differ.
    """

    name: str
    difference: float
    allowed: float
    dtype: str
    seconds: float
    note: str = ""
    at_least: bool = False

    @property
    def passed(self):
        if self.note and math.isinf(self.difference):
            return False
        return self.difference >= self.allowed if self.at_least else self.difference <= self.allowed  # NaN is neither


def rounded_copy(model, dtype):
    """A copy whose parameters went through `dtype` as `from_pretrained(dtype=)` does it: gates (in float16 feature
    maps, too) stay in float32, buffers as they are.
    """
    model = copy.deepcopy(model)
    wide = [re.compile(rf"(^|\.){pattern}(\.|$)") for pattern in model._get_dtype_plan(dtype)]
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if any(pattern.search(name) for pattern in wide) else dtype)
    return model.eval()


@torch.no_grad()
def run_check(name, pairs, subject, allowed, difference=None, at_least=False):
    """Run one check to its end; only the largest difference counts."""
    begin, worst, note = time.perf_counter(), 0.0, ""
    try:
        differences = [(difference or subject.difference)(got, want) for got, want in pairs()]
        worst = max(differences, key=lambda x: math.inf if math.isnan(x) else x)
    except Exception as error:  # a crash is a verdict too, and the other checks go on
        worst, note = math.inf, f"{type(error).__name__}: {error}"
    return Result(name, worst, allowed, dtype_name(subject.model), time.perf_counter() - begin, note, at_least)


@contextmanager
def rounding(model, dtype):
    """Meanwhile what goes into and comes out of linear layers, norms and decoder layers is rounded to `dtype`; all else
    stays as wide as it is.
    """

    def narrow(x):
        return x.to(dtype).to(x.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    hooks = []
    for name, module in model.named_modules():
        linear, norm = isinstance(module, torch.nn.Linear), "norm" in name.rpartition(".")[2]
        if linear:
            hooks.append(module.register_forward_pre_hook(lambda _, args: tuple(map(narrow, args))))
        if linear or norm or isinstance(module, torch.nn.Embedding | DecoderLayer):
            hooks.append(module.register_forward_hook(lambda _, args, out: narrow(out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def held_experts(model, chosen):
    """Meanwhile the first forward of a router notes in `chosen` {its name: [B, T, k]} which experts it chooses; where they
    are noted, its tokens go through those, in one call or piece by piece, with the weights that it gives them itself.
    """
    hooks = []

    def hold(name, module, args, out):
        (logits, _, found), held = out, chosen.get(name)
        if held is None:
            chosen[name] = found.view(2, -1, module.top_k)
            return out
        first = seen.get(name, 0)
        seen[name] = first + len(found) // len(held)
        held = held[:, first : seen[name]].flatten(0, 1)
        weights = torch.nn.functional.linear(args[0], module.weight).softmax(-1, torch.float32).gather(-1, held)
        if module.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(args[0].dtype), held

    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, ROUTERS):
            hooks.append(module.register_forward_hook(partial(hold, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def low_precision(low, exact):
    """Checks of a bfloat16 or float16 model against the same rounded weights in a wider dtype: `(name, pairs, bound)`.

    The bound is `LOW_FACTOR` times the error that rounding between the modules alone would cause: it knows how well the
    model is conditioned. Tokens go through the same experts in all runs: which are chosen where two are about as good is
    for any rounding to say, and another one is no error of the model's.
    """
    dtype, chosen = low.model.dtype, {}
    with held_experts(exact.model, chosen):
        want = exact.read(exact.ids[:2])
    with held_experts(exact.model, chosen), rounding(exact.model, dtype):
        ideal = exact.read(exact.ids[:2])
    allowed = LOW_FACTOR * exact.difference(ideal, want)

    def forward():
        with held_experts(low.model, chosen):
            yield low.read(low.ids[:2]), want

    def steps():
        with held_experts(low.model, chosen):
            yield low.in_pieces(low.ids[:2], [low.T // 2, *[1] * low.T]), want

    name = dtype_name(low.model)
    return [(f"{name}, one forward = exact", forward, allowed), (f"{name}, cached decoding = exact", steps, allowed)]


def wrapping_length(config):
    """Tokens that fill the widest window and push the sinks out of it."""
    return max((config.window_of(j) or 0) + config.sinks_of(j) for j in range(config.num_hidden_layers)) + 33


def default_length(config):
    """Tokens that do so and need several chunks."""
    return max(wrapping_length(config), 2 * config.mlstm_chunk_size + 3)


def verify(model, *, length=None, dtype=None, seed=0, only=None, report=lambda result: None):
    """Run every check on a model. Returns a list of `Result`; the model itself is not changed.

    Args:
        length: T of the random rows; by default enough for the window to wrap, see `default_length`.
        dtype: of the copy on which the checks run; by default float64 on a CPU for a model of less than `DOUBLE_BYTES`,
            else float32.
        only: names of the checks to run; None runs all.
        report: called with each result as it comes.
    Raises:
        ConfigError: a length or dtype that cannot be used.
    """
    length = default_length(model.config) if length is None else length
    if length < 24:
        raise ConfigError(
            f"length={length}: expected at least 24 tokens, which the checks cut into documents and pieces"
        )
    if dtype is None:
        double = model.device.type == "cpu" and 8 * sum(p.numel() for p in model.parameters()) < DOUBLE_BYTES
        dtype = torch.float64 if double else torch.float32
    elif dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype}: expected one of {list(DTYPES)}")
    training, results = model.training, []
    for name, *arguments in planned_checks(model.eval(), length, dtype, seed, only, results):
        results.append(run_check(name, *arguments))
        report(results[-1])
    model.train(training)
    return results


def enough(allowed, model, results):
    """What a lost memory has to change. Float64 with layers that calculate in float32 has float32's bound, which covers
    recurrences longer than these: there the differences that the checks before this one found say what they would have seen.
    """
    found = [result.difference for result in results] or [allowed]
    return POWER * min(allowed, max(bound(model.dtype, model.config.num_hidden_layers), *found))


def planned_checks(model, length, dtype, seed, only, results):
    """Arguments of `run_check`, one check after the other; copies of the model are made when they are needed.

    Args:
        results: those of the checks so far.
    """
    config = model.config
    own = subject = Subject(model, length, seed)
    if any(p.dtype != dtype for p in model.parameters()):
        subject = Subject(rounded_copy(model, dtype), length, seed)
    allowed = bound_of(subject.model)

    def asked(name):
        return only is None or name in only

    for name, check in CHECKS.items():
        if asked(name):
            yield name, partial(check, subject), subject, allowed
    for name, check in GENERATION.items():
        if asked(name):
            yield name, partial(check, subject.model, subject.ids), subject, allowed, difference
    if asked(MEMORY) and "hybrid_sliding" in config.layer_types and config.mixer_branches != "window":
        yield MEMORY, partial(memory_lost, subject), subject, enough(allowed, subject.model, results), None, True
    for name, check in FILES.items():
        if asked(name):
            yield name, partial(check, own), own, 0.0
    if asked(LOW):
        low = Subject(rounded_copy(model, model.dtype if model.dtype.itemsize < 4 else torch.bfloat16), length, seed)
        exact = Subject(rounded_copy(low.model, dtype if dtype.itemsize >= 4 else torch.float32), length, seed)
        for name, pairs, limit in low_precision(low, exact):
            yield name, pairs, low, limit, exact.difference


def verify_checkpoint(
    path, *, length=None, dtype=None, device="cpu", seed=0, only=None, accept_config=False, report=lambda result: None
):
    """`verify` for a directory or hub id, after two checks of what is stored: no tensor is missing, too many, or of
    another shape, and the configuration is the one that the weights were trained with, where they tell it.

    Args:
        length: a number of tokens, or a function from the configuration to one.
        accept_config: let a configuration pass that was edited after training; what it changes is noted.
    Raises:
        ConfigError: the checkpoint is no student, or dtype is no known name.
        CheckpointError: it cannot be loaded, or is not what its manifest says.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {list(DTYPES)}")
    with named_faults(path, "the weights"):  # they tell an edited configuration themselves, in a row of its own
        tell = recorded_values(Path(path).glob("*.safetensors"))
    require_intact(path, but=("config.json",) if tell else ())
    begin = time.perf_counter()
    with named_faults(path, "the model"):
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "xlstm_hybrid":
            raise ConfigError(
                f"{Path(path).name}: a {config.model_type} model, expected xlstm_hybrid; convert it first (xlstm-hybrid convert)"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)  # it has a row of its own
            model, info = XLSTMHybridForCausalLM.from_pretrained(
                path, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    check_generation(path, model)
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    count, note = (
        sum(map(len, wrong.values())),
        "; ".join(f"{key}: {names[0]}" for key, names in wrong.items() if names),
    )
    loaded = Result("every tensor loaded", float(count), 0.0, dtype_name(model), time.perf_counter() - begin, note)
    stored = [loaded]
    if model.trained_with:  # else nothing is known
        edited = edited_fields(model.config, model.trained_with)
        count = float(len(edited))
        stored.append(Result(TRAINED, count, count if accept_config else 0.0, loaded.dtype, 0.0, told(edited)))
    for result in stored:
        report(result)
    warn_if_slow(device, dtype, "--dtype")
    length = length(model.config) if callable(length) else length
    settings = {"length": length, "dtype": DTYPES.get(dtype), "seed": seed, "only": only, "report": report}
    return [*stored, *verify(model.to(device), **settings)]


def checks_as_json(results, **about):
    """What `--json` writes: the verdict, whatever the caller tells about the run, and each result; an infinite
    difference is null.
    """
    checks = [asdict(r) | {"passed": r.passed} for r in results]
    for check in checks:
        check["difference"] = check["difference"] if math.isfinite(check["difference"]) else None
    return {"passed": all(r.passed for r in results), **about, "checks": checks}
