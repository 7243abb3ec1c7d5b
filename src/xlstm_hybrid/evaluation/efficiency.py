"""What a student costs beside its teacher: time to first token, decoding speed, peak memory, cache bytes and energy,
against context and batch.

No figure without green checks. Teacher and student take turns in one process and the gain is the median of the rounds'
ratios; peaks come from a process of their own for each model, length and batch. Dims: B rows of a batch, L tokens of
context.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache

from xlstm_hybrid.errors import EvaluationError
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.planning.cache_size import allocated_bytes, storage_bytes

CACHES = ("dynamic", "static")
SIDES = ("teacher", "student")
PIECE = 4096  # tokens per call where a cache is filled before decoding is measured
MIN_ENERGY_SECONDS = 0.1  # counters of energy move in steps of up to this: shorter blocks have no figure
POWERCAP, STATUS, CLEAR_REFS = Path("/sys/class/powercap"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Side:
    """A model under its name. load: a function without arguments that another process can import, returning the model
    on its device.
    """

    name: str
    load: Callable


@dataclass(frozen=True)
class Settings:
    """lengths: L at which prompts are read and continued.  contexts: further L, reached in pieces, for decoding and
    memory only.  batches: B.
    rounds: in which teacher and student take turns.  steps: tokens decoded per round.  cache: "dynamic", which grows as
    `generate`'s default
    does, or "static", allocated at its full length.

    Raises:
        EvaluationError: numbers below 1, named twice, or an unknown cache.
    """

    lengths: tuple = (1024, 4096)
    batches: tuple = (1,)
    contexts: tuple = ()
    rounds: int = 5
    steps: int = 8
    cache: str = "dynamic"
    seed: int = 0

    def __post_init__(self):
        for name, values in (("lengths and contexts", (*self.lengths, *self.contexts)), ("batches", self.batches)):
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise EvaluationError(f"{name}: expected different whole numbers of at least 1, found {list(values)}")
        if min(self.rounds, self.steps) < 1:
            raise EvaluationError(f"rounds={self.rounds}, steps={self.steps}: expected at least 1 of each")
        if self.cache not in CACHES:
            raise EvaluationError(f"cache={self.cache!r}: expected one of {list(CACHES)}")

    @property
    def room(self):
        """Tokens that follow the context: every round's, and those of the round before them that is not counted."""
        return (self.rounds + 1) * self.steps


def token_rows(settings, L, B, vocab_size, device):
    """[B, L] random tokens, the same for both sides and in every process."""
    return torch.randint(vocab_size, (B, L), generator=torch.Generator().manual_seed(settings.seed)).to(device)


def new_cache(model, kind, length):
    config = model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)


def first_token(model, ids, cache):
    """Read a prompt [B, L] in one call; returns the token after it, [B, 1]."""
    return model(ids, **named(cache), use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


def next_tokens(model, token, cache, steps):
    for _ in range(steps):
        token = model(token, **named(cache), use_cache=True).logits.argmax(-1)
    return token


def filled(model, ids, kind, room):
    """`(cache, next token)` after `ids` [B, L], read in pieces. A dynamic cache reads the first row and repeats it:
    steps cost the same.
    """
    rows = ids[:1] if kind == "dynamic" else ids
    cache = new_cache(model, kind, ids.shape[1] + room)
    for part in rows.split(PIECE, 1):
        token = first_token(model, part, cache)
    if len(rows) < len(ids):
        cache.batch_repeat_interleave(len(ids))
    return cache, token.expand(len(ids), -1)


def decoder(model, ids, settings):
    """A function that decodes `steps` tokens after a context [B, L], which its first call reads."""
    state = []

    def decode():
        cache, token = state or filled(model, ids, settings.cache, settings.room)
        state[:] = cache, next_tokens(model, token, cache, settings.steps)

    return decode


# --- clocks and counters -------------------------------------------------------------------------------------------


class Meter:
    """Seconds and joules of a call. source: the counter of energy; None where `absent` says why there is none.

    Seconds are those of the process on a CPU, and from the call to its end on a GPU, launches included, or wherever
    `wall` is asked for. Joules are the whole device's.
    """

    def __init__(self, device, wall=False):
        self.device, self.source, self.absent, self.wall = device, None, None, wall or device.type == "cuda"
        try:
            self.source, self.read, self.spans, self.unit = nvml(device) if device.type == "cuda" else rapl()
        except (ImportError, OSError) as error:
            self.absent = str(error)

    def cost(self, run):
        """`(seconds, joules or None)`."""
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else lambda: None
        wait()
        joules, before = None, self.read() if self.source else None
        begin, used = time.perf_counter(), time.process_time()
        run()
        wait()
        wall, used = time.perf_counter() - begin, time.process_time() - used
        if self.source and wall >= MIN_ENERGY_SECONDS:
            joules = self.unit * sum((b - a) % span for a, b, span in zip(before, self.read(), self.spans, strict=True))
        return (wall if self.wall else used), joules


def nvml(device):
    """`(name, reader, spans, unit)` of a GPU's counter of millijoules."""
    try:
        import pynvml
    except ImportError as error:
        raise ImportError("NVML needs the package nvidia-ml-py, which is not installed") from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise OSError(f"NVML reports no energy of this GPU ({error})") from error
    return "NVML", lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)], [math.inf], 1e-3


def rapl():
    """The same of the CPU packages' counters of microjoules, which wrap around."""
    zones = [
        file.parent
        for file in sorted(POWERCAP.glob("*-rapl:*/name"))
        if file.read_text(encoding="utf-8").startswith("package")
    ]
    if not zones:
        raise OSError("RAPL: this machine shows no counters of its CPU's energy")
    try:
        spans = [int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) for zone in zones]
        int((zones[0] / "energy_uj").read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"RAPL: counters of the CPU's energy cannot be read ({error.strerror})") from error
    return "RAPL", lambda: [int((zone / "energy_uj").read_text(encoding="utf-8")) for zone in zones], spans, 1e-6


@contextmanager
def one_thread(device):
    """On a CPU meanwhile one thread: its CPU seconds are then the work's, whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Peak:
    """Bytes that this process, or on a GPU torch, has held beyond those at the construction; None where the platform
    does not count them.
    """

    def __init__(self, device):
        self.device, self.counts = device, device.type == "cuda" or CLEAR_REFS.exists()
        self.restart()
        self.base = self.now("VmRSS", torch.cuda.memory_allocated)

    def now(self, field, allocated):
        if self.device.type == "cuda":
            return allocated(self.device)
        lines = STATUS.read_text(encoding="utf-8").splitlines() if self.counts else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)

    def restart(self):
        """The next peak counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.counts:
            with suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide in the base
            CLEAR_REFS.write_text("5", encoding="utf-8")

    def read(self):
        return self.now("VmHWM", torch.cuda.max_memory_allocated) - self.base if self.counts else None


def about(model):
    """What a reader has to know of a model: its size, dtype and attention."""
    config, parameters = model.config, list(model.parameters())
    return {
        "model_type": config.model_type,
        "parameters": sum(x.numel() for x in parameters),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": storage_bytes([*parameters, *model.buffers()]),
        "attention": config._attn_implementation,
        "max_position_embeddings": config.max_position_embeddings,
    }


@torch.no_grad()
def memory_of(side, settings, L, B, vocab_size):
    """`{prefill_peak_bytes, decode_peak_bytes, cache_bytes}` of one model beyond its weights; to be called in a fresh
    process.

    Peaks are None where the platform does not count, the first one for contexts that are no prompt.
    """
    model = side.load()
    with one_thread(model.device):
        ids, kind = token_rows(settings, L, B, vocab_size, model.device), settings.cache
        cache = new_cache(model, kind, 16)
        next_tokens(model, first_token(model, ids[:1, :8], cache), cache, 2)  # loads weights and kernels
        del cache
        peak, prompt = Peak(model.device), None
        if L in settings.lengths:
            cache = new_cache(model, kind, L + settings.steps)
            token = first_token(model, ids, cache)
            prompt = peak.read()
        else:
            cache, token = filled(model, ids, kind, settings.steps)
        peak.restart()
        next_tokens(model, token, cache, settings.steps)
        return {"prefill_peak_bytes": prompt, "decode_peak_bytes": peak.read(), "cache_bytes": allocated_bytes(cache)}


# --- measuring -----------------------------------------------------------------------------------------------------


def release():
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def apart(function, *arguments):
    """The result of an importable function in a fresh process, which is gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def attempt(run):
    """`(result, None)`, or `(None, reason)` where memory ran out; any other error is raised."""
    try:
        return run(), None
    except BrokenProcessPool:
        reason = "its process was ended from outside, most likely for want of memory"
    except (torch.OutOfMemoryError, MemoryError):
        reason = "out of memory"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        reason = "out of memory"
    release()  # outside of the handler, whose traceback holds what was allocated
    return None, reason


def take_turns(runs, rounds, meter):
    """`({side: [(seconds, joules or None) per round]}, {side: reason})`; a first round, which loads kernels, is left
    out; who begins alternates.
    """
    costs, absent = {side: [] for side in runs}, {}
    for turn in range(rounds + 1):
        for side in list(runs)[:: 1 if turn % 2 else -1]:
            cost, reason = attempt(partial(meter.cost, runs[side]))
            if reason:
                absent[side] = reason
                del runs[side], costs[side]
            elif turn:
                costs[side].append(cost)
    return costs, absent


def medians_and_gain(costs, tokens, per_second):
    """Medians of each side, and the student's gain: the median over the rounds of teacher / student."""
    part = {}
    for side, pairs in costs.items():
        seconds, joules = ([pair[j] for pair in pairs] for j in (0, 1))
        part[side] = {"seconds": statistics.median(seconds), "rounds": seconds}
        if per_second:
            part[side]["tokens_per_second"] = tokens / part[side]["seconds"]
        if None not in joules:
            part[side]["joules_per_token"] = statistics.median(joules) / tokens
    if len(costs) == len(SIDES):
        ratios = (t[0] / s[0] for t, s in zip(costs["teacher"], costs["student"], strict=True))
        part["gain"] = {"tokens_per_second" if per_second else "seconds": statistics.median(ratios)}
        teacher, student = (part[side].get("joules_per_token") for side in SIDES)
        if teacher is not None and student is not None and student > 0:
            part["gain"]["joules_per_token"] = teacher / student
    return part


@torch.no_grad()
def timed(models, settings, meter, row, vocab_size):
    """Fill in `prefill` and `decode` of a row, for the sides whose memory sufficed before."""
    L, B, device = row["length"], row["batch"], meter.device
    ids = token_rows(settings, L, B, vocab_size, device)
    able = {side: model for side, model in models.items() if side in row.get("memory", SIDES)}

    def read(model):
        first_token(model, ids, new_cache(model, settings.cache, L))

    def rounds(part, runs, tokens, name, **how):
        costs, absent = take_turns(runs, settings.rounds, meter)
        row[part] = medians_and_gain(costs, tokens, **how)
        row["absent"] |= {f"{side}, {name}": reason for side, reason in absent.items()}

    if L in settings.lengths:
        runs = {side: partial(read, model) for side, model in able.items()}
        rounds("prefill", runs, B * L, "prompt", per_second=False)
    runs = {side: decoder(model, ids, settings) for side, model in able.items()}
    rounds("decode", runs, B * settings.steps, "decoding", per_second=True)


def with_memory(sides, settings, L, B, vocab_size):
    """A row with its `memory`; a side that ran out of it is in `absent` and is not timed."""
    memory, absent = {}, {}
    for name, side in sides.items():
        figures, reason = attempt(partial(apart, memory_of, side, settings, L, B, vocab_size))
        absent |= {name: reason} if reason else {}
        memory |= {name: figures} if figures else {}
    if len(memory) == len(SIDES):
        teacher, student = (memory[side] for side in SIDES)
        memory["gain"] = {field: teacher[field] / x for field, x in student.items() if teacher[field] and x}
    return {"length": L, "batch": B, "memory": memory, "absent": absent}


def checked(models, checks):
    """The checks' results as JSON holds them; EvaluationError where one is red, or where the two sides cannot be
    compared.
    """
    student, teacher = models["student"], models["teacher"]
    for what in ("dtype", "device"):
        if (a := getattr(student, what)) != (b := getattr(teacher, what)):
            raise EvaluationError(
                f"{what}: the student's is {a}, the teacher's {b}; load both alike, or the ratios say nothing"
            )
    if not (results := list(checks(student, teacher))):
        raise EvaluationError("checks: expected at least one result, found none; no figure without a check")
    if red := [result for result in results if not result.passed]:
        names = "; ".join(f"{r.name} ({r.note or f'{r.difference:.2e}, allowed {r.allowed:.2e}'})" for r in red)
        raise EvaluationError(
            f"no figures, because {len(red)} of {len(results)} checks failed: {names}; run xlstm-hybrid verify on the student"
        )
    return [{key: getattr(r, key) for key in ("name", "dtype", "difference", "allowed", "passed")} for r in results]


def measure_pair(student, teacher, settings, checks, report=lambda text: None, memory=True, keep=lambda pair: None):
    """Measure a student beside its teacher.

    Args:
        student, teacher: `Side`.
        checks: called with both models; returns results as `xlstm_hybrid.evaluation.equivalence` does. They come first.
        report: called with a line on what is under way.
        memory: measure peaks and cache as well, for which every model is loaded anew per length and batch.
        keep: called after each row with all that is returned in the end; rows that are still to come have no times.
    Returns:
        dict of `teacher`, `student` (see `about`), `checks`, `settings`, `energy` and `rows`, one per length and batch:
        `memory`, `prefill` and `decode`, each with figures per side and the student's `gain` (above 1: cheaper, or
        quicker), and `absent`, {what: why}.
    Raises:
        EvaluationError: a red check, or models that cannot be compared.
    """
    sides, rows = {"teacher": teacher, "student": student}, []
    models = {name: side.load() for name, side in sides.items()}
    device = models["student"].device
    vocab_size = min(model.config.vocab_size for model in models.values())  # padded vocabularies differ
    report("checks")
    pair = {name: {"name": sides[name].name} | about(model) for name, model in models.items()}
    pair["checks"] = checked(models, checks)
    places = list(product(settings.batches, (*settings.lengths, *settings.contexts)))
    if memory:
        del models
        release()  # a GPU is empty for what is measured apart
        for B, L in places:
            report(f"memory, {L} tokens, batch {B}")
            rows.append(with_memory(sides, settings, L, B, vocab_size))
        models = {name: side.load() for name, side in sides.items()}
    else:
        rows = [{"length": L, "batch": B, "absent": {}} for B, L in places]
    meter = Meter(device)
    pair |= {"settings": asdict(settings), "energy": {"source": meter.source, "absent": meter.absent}, "rows": rows}
    with one_thread(device):
        for row in rows:
            report(f"time, {row['length']} tokens, batch {row['batch']}")
            timed(models, settings, meter, row, vocab_size)
            keep(pair)
    return pair
