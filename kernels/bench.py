"""How fast the kernels are, beside what they replace. `python kernels/bench.py --help`.

One process; every round runs all candidates on the same tensors, one after the other, and what is reported is the
median of the rounds' ratios: a busy machine slows the candidates of a round alike. On a CPU: one thread, float32, CPU
time of the process. On a GPU: bfloat16, events around each call after the cache has been flushed. Nothing is timed
before outputs and gradients have been checked against float64. Peak memory is measured in a process of its own for each
candidate.

Bytes and FLOPs are counted from shapes (`roofline.py`); the output says what was reached of them, and on a device whose
peak is known the share of its roofline.

The baseline is causal softmax attention over the whole sequence (`sdpa`), which is what a teacher's layer does.
`hybrid` is mLSTM, window attention and their gated sum on given queries, keys, values and gates; `layer` includes the
two feature maps.
"""

import argparse
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import roofline
import torch
import torch.nn.functional as F
from baselines import all_of, reason_against
from xlstm_kernels import MLSTMState, hybrid_step, mix, mlstm, mlstm_step, window_attention, window_step
from xlstm_kernels.backends.scratch import LOCAL


class Machine(NamedTuple):
    """What is measured on a kind of device. tolerance: of the largest entry, against float64."""

    device: str
    dtype: torch.dtype
    B: int
    H: int
    tolerance: float


SETTINGS = {"cpu": Machine("cpu", torch.float32, 1, 8, 3e-5), "cuda": Machine("cuda", torch.bfloat16, 8, 16, 3e-2)}
HERE = SETTINGS["cpu"]
WINDOW, SINKS = 512, 4
BASELINES = all_of(WINDOW, SINKS)
# the longest sequence that a quadratic or copying one is given
LIMITS = {"native": 8192, "masked": 4096, "sdpa math": 4096, "growing": 32768}
BOTH = "forward+backward"
CPU_TARGETS = [  # (what, operation, pass, T, over, candidate, must, aim), d 64
    ("hybrid over SDPA, forward, 4k", "sequence", "forward", 4096, "sdpa", "hybrid", 1.6, 2.0),
    ("hybrid over SDPA, forward, 8k", "sequence", "forward", 8192, "sdpa", "hybrid", 3.0, 4.5),
    ("hybrid over SDPA, forward+backward, 8k", "sequence", BOTH, 8192, "sdpa", "hybrid", 3.0, 4.5),
    ("mLSTM over transformers' native, forward, 8k", "sequence", "forward", 8192, "native", "mlstm", 2.0, 3.0),
    ("mLSTM over transformers' native, forward+backward, 8k", "sequence", BOTH, 8192, "native", "mlstm", 4.0, 6.0),
    ("SDPA over hybrid (cost), forward, 512", "sequence", "forward", 512, "sdpa", "hybrid", 1 / 1.6, 1 / 1.6),
    ("SDPA over hybrid (cost), forward, 256", "sequence", "forward", 256, "sdpa", "hybrid", 1 / 2.5, 1 / 2.5),
    ("decode over a static KV cache, 8k", "decode", "step", 8192, "static", "hybrid", 5.0, 8.0),
    ("decode over a static KV cache, 32k", "decode", "step", 32768, "static", "hybrid", 20.0, 35.0),
]
CUDA_TARGETS = [  # the same, d 128, as ratios in one run
    ("hybrid over SDPA flash, forward, 8k", "sequence", "forward", 8192, "sdpa flash", "hybrid", 3.0, 3.0),
    ("hybrid over SDPA cuDNN, forward, 8k", "sequence", "forward", 8192, "sdpa cudnn", "hybrid", 1.8, 1.8),
    ("mLSTM over mlstm_kernels, forward, 8k", "sequence", "forward", 8192, "mlstm_kernels", "mlstm", 1.5, 1.5),
    ("mLSTM over mlstm_kernels, forward+backward, 8k", "sequence", BOTH, 8192, "mlstm_kernels", "mlstm", 1.8, 1.8),
    ("mLSTM over simple_gla, forward, 8k", "sequence", "forward", 8192, "simple_gla", "mlstm", 1.0, 1.0),
]
H200_MS = [  # (what, pass, candidate, must, aim): ms at most, T 8192, d 128
    ("mLSTM, forward", "forward", "mlstm", 1.1, 0.8),
    ("mLSTM, forward+backward", BOTH, "mlstm", 4.0, 2.8),
    ("window, forward", "forward", "window", 0.9, 0.65),
    ("hybrid, forward", "forward", "hybrid", 2.0, 1.5),
    ("hybrid, forward+backward", BOTH, "hybrid", 7.3, 5.2),
]


def tensors(T, d, dtype=None, grad=False):
    """Queries, keys, values, feature maps and gates as a trained layer has them, by name."""
    make, B, H = torch.Generator().manual_seed(T + d), HERE.B, HERE.H
    shapes = dict.fromkeys("qkv", (B, T, H, d)) | {"o": (B, T, H, 1), "i": (B, T, H), "f": (B, T, H)}
    x = {name: torch.randn(shape, generator=make, dtype=torch.float64) for name, shape in shapes.items()}
    x["phi_q"], x["phi_k"] = x["q"].softmax(-1), x["k"].softmax(-1)
    x["map"] = torch.randn(H, d, d, generator=make, dtype=torch.float64)
    x["o"], x["f"] = x["o"].sigmoid(), 5 + x["f"]
    # float64 sees the numbers that the candidates see
    x = {name: a.to(HERE.dtype).to(dtype or HERE.dtype) for name, a in x.items()}
    return {name: a.to(HERE.device).requires_grad_(grad) for name, a in x.items()}


def window(x, backend="auto"):
    return window_attention(x["q"], x["k"], x["v"], window=WINDOW, sinks=SINKS, backend=backend)


def memory(x, backend="auto"):
    return mlstm(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"], backend=backend)[0]


def hybrid(x, **backends):
    return mix(memory(x, backends.get("mlstm", "auto")), window(x, backends.get("window", "auto")), x["o"][..., 0])


def layer(x, **backends):
    mapped = {f"phi_{name}": torch.einsum("bthk,hkj->bthj", x[name], x["map"]).softmax(-1) for name in "qk"}
    return hybrid({**x, **mapped}, **backends)


SEQUENCE = {**BASELINES, "chunkwise": partial(memory, backend="chunkwise")}
SEQUENCE |= {"window": window, "mlstm": memory, "hybrid": hybrid, "layer": layer}
PLAIN = {"window": "reference", "mlstm": "chunkwise"}
TRUTH = {
    "sdpa": BASELINES["sdpa"],
    "window": partial(window, backend="reference"),
    "mlstm": partial(memory, backend="chunkwise"),
    "hybrid": partial(hybrid, **PLAIN),
    "layer": partial(layer, **PLAIN),
}


class Decode:
    """One token of one layer at a context of N tokens, by each way to remember them."""

    def __init__(self, N, d):
        B, H, like = HERE.B, HERE.H, {"device": HERE.device, "dtype": HERE.dtype}
        self.x, self.N, self.index = tensors(1, d), N, torch.full((B,), N, device=HERE.device)
        self.keys, self.values = torch.randn(B, H, N + 1, d, **like), torch.randn(B, H, N + 1, d, **like)
        self.slots = [torch.randn(B, H, SINKS + WINDOW, d, **like) for _ in range(2)]
        like["dtype"] = torch.promote_types(HERE.dtype, torch.float32)
        self.state = MLSTMState(torch.rand(B, H, d, d, **like), torch.rand(B, H, d, **like), torch.zeros(B, H, **like))

    def static(self):
        """A KV cache that was allocated at its full length."""
        self.keys[:, :, self.N], self.values[:, :, self.N] = self.x["k"][:, 0], self.x["v"][:, 0]
        return F.scaled_dot_product_attention(self.x["q"].transpose(1, 2), self.keys, self.values).transpose(1, 2)

    def growing(self):
        """transformers' default: every step concatenates."""
        q, k, v = (self.x[name].transpose(1, 2) for name in "qkv")
        keys, values = torch.cat([self.keys[:, :, : self.N], k], 2), torch.cat([self.values[:, :, : self.N], v], 2)
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)

    def window(self):
        return window_step(*(self.x[name] for name in "qkv"), *self.slots, self.index, sinks=SINKS)

    def mlstm(self):
        return mlstm_step(*(self.x[name] for name in ("phi_q", "phi_k", "v", "i", "f")), self.state)[0]

    def hybrid(self):
        x = [self.x[name] for name in ("q", "k", "v", "phi_q", "phi_k", "i", "f")]
        return hybrid_step(*x, self.x["o"][..., 0], self.state, *self.slots, self.index, sinks=SINKS)


DECODE = ("static", "growing", "window", "mlstm", "hybrid")


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def check(d, T=1500):
    """{candidate: largest error of output and gradients against float64}; raises if one is red."""
    errors, dh = {}, tensors(T, d, torch.float64)["v"].flip(1)
    for name in TRUTH:
        results = []
        for run, dtype in ((TRUTH[name], torch.float64), (SEQUENCE[name], HERE.dtype)):
            x = tensors(T, d, dtype, grad=True)
            h = run(x)
            h.backward(dh.to(h.dtype))
            results.append({"h": h.detach(), **{n: a.grad for n, a in x.items() if a.grad is not None}})
        errors[name] = max(error(a, results[0][n]) for n, a in results[1].items())
    errors["step"] = check_steps(d)
    return refuse_wrong(errors, HERE.tolerance, f"d={d}: ")


def refuse_wrong(errors, allowed, where=""):
    """The errors, if all of them are below what is allowed."""
    if red := {name: e for name, e in errors.items() if not e < allowed}:
        raise SystemExit(
            f"{where}no numbers, because these are wrong (error against float64, allowed {allowed}): {red}"
        )
    return errors


@torch.no_grad()
def check_steps(d, T=WINDOW + 20):
    """Largest error of token-by-token decoding against the whole sequence in float64."""
    want, x, case = TRUTH["hybrid"](tensors(T, d, torch.float64)), tensors(T, d), Decode(1, d)
    C, n, m = case.state
    case.state = MLSTMState(torch.zeros_like(C), torch.zeros_like(n), torch.full_like(m, float("-inf")))
    h = []
    for t in range(T):
        case.x = {name: a[:, t : t + 1] if name != "map" else a for name, a in x.items()}
        case.index = torch.full_like(case.index, t)
        h.append(case.hybrid())
    return error(torch.cat(h, 1), want)


def cost(fn):
    """Milliseconds of one call: CPU time of the process, or between two events on the GPU whose cache holds other
    things.
    """
    if HERE.device == "cpu":
        start = time.process_time()
        fn()
        return (time.process_time() - start) * 1e3
    torch.empty(2**28, dtype=torch.int8, device=HERE.device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def rounds(candidates, seconds, repeat=1):
    """{candidate: ms of each round}: all candidates in turn, first once unmeasured, until the time is up, three rounds
    at least.
    """
    times, begin = {name: [] for name in candidates}, time.perf_counter()
    for fn in candidates.values():
        fn()
    while min(map(len, times.values())) < 3 or time.perf_counter() - begin < seconds:
        for name, fn in candidates.items():
            times[name].append(statistics.median(cost(fn) for _ in range(repeat)))
    return times


def row(operation, which, T, d, times, baseline):
    """One line of the result: median ms of each candidate, and the median over the rounds of baseline / candidate."""
    ms = {name: round(statistics.median(t), 4) for name, t in times.items()}
    over = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))  # noqa: E731
    ratios = {name: over(baseline, name) for name in times}
    targets = [(a, b) for _, _, _, _, a, b, _, _ in CPU_TARGETS + CUDA_TARGETS if a != baseline]
    ratios |= {f"{a}/{b}": over(a, b) for a, b in sorted(set(targets)) if a in times and b in times}
    result = {"operation": operation, "pass": which, "T": T, "d": d, "rounds": len(times[baseline]), "ms": ms}
    result["work"] = {name: found for name in times if (found := reached(operation, which, T, d, name, ms[name]))}
    return result | {"ratio": {name: round(r, 3) for name, r in ratios.items()}}


def reached(operation, which, T, d, name, ms):
    """Bytes and FLOPs of a candidate and what a time of `ms` means for them; None where they are not counted."""
    size, sizes = HERE.dtype.itemsize, (HERE.B, T, HERE.H, d, WINDOW, SINKS)
    if operation == "decode":
        work = roofline.decode(name, *sizes, size, torch.promote_types(HERE.dtype, torch.float32).itemsize)
    else:
        work = roofline.sequence(name, *sizes, size, backward=which == BOTH)
    gpu = torch.cuda.get_device_name() if HERE.device == "cuda" else ""
    return work and work.figures(ms / 1e3, roofline.peak_of(gpu, size))


def once(candidate, x, dh=None):
    """One call, and the gradients of what it read.

    They are not added to earlier ones, as those of activations never are.
    """
    h = candidate(x)
    if dh is not None:
        torch.autograd.grad(h, list(x.values()), dh, allow_unused=True)


def bench_sequence(T, d, seconds, skip, absent):
    """Rows of forward and forward+backward; baselines that cannot run are noted in `absent` with the reason."""
    for which in ("forward", "forward+backward"):
        grad = which != "forward"
        x, dh, names = tensors(T, d, grad=grad), tensors(T, d)["v"].flip(1), []
        for name in SEQUENCE:
            if name in skip or LIMITS.get(name, T) < T:
                continue
            reason = reason_against(SEQUENCE[name], x, grad) if name in BASELINES else None
            absent |= {f"{name}, {which}": reason} if reason else {}
            names += [] if reason else [name]
        run = {name: partial(once, SEQUENCE[name], x, dh if grad else None) for name in names}
        with torch.set_grad_enabled(grad):
            yield row("sequence", which, T, d, rounds(run, seconds), "sdpa")


@torch.no_grad()
def bench_decode(N, d, seconds, skip):
    case = Decode(N, d)
    names = [name for name in DECODE if name not in skip and LIMITS.get(name, N) >= N]
    yield row("decode", "step", N, d, rounds({n: getattr(case, n) for n in names}, seconds, repeat=5), "static")


def peak(name, T, d):
    """MiB that forward and backward of a candidate need beyond inputs, output and gradients.

    Measured in this process, so call it in a fresh one.
    """
    x, dh = tensors(T, d, grad=True), tensors(T, d)["v"].flip(1)
    SEQUENCE[name](tensors(WINDOW + 64, d, grad=True)).sum().backward()  # loads what the first call loads
    LOCAL.__dict__.clear()  # but not the scratch memory, which counts

    def run():
        h = SEQUENCE[name](x)
        h.backward(dh)
        return h

    h, most = peak_of(run)
    results = [h, *(a.grad for a in x.values() if a.grad is not None)]
    return most - sum(a.numel() * a.element_size() for a in results) / 2**20


def peak_of(run):
    """What a function returns, and the MiB that it needs beyond what was there."""
    if HERE.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident(field):  # a line of /proc/self/status in KiB
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before = resident("VmRSS")
    return run(), (resident("VmHWM") - before) / 1024


def bench_memory(T, d, skip):
    names = ("sdpa", "masked", "chunkwise", "window", "mlstm", "hybrid", "layer")
    names = [name for name in names if name not in skip and LIMITS.get(name, T) >= T]
    command = [sys.executable, __file__, "--device", HERE.device, "--peak"]
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    mib = {name: round(float(run([*command, name, str(T), str(d)]).stdout), 1) for name in names}
    return {"operation": "memory", "pass": "forward+backward", "T": T, "d": d, "mib": mib}


def target(what, d, figure, must, aim, meets):
    """A target and whether it is met; `meets(figure, bound)` compares."""
    met = {"met": meets(figure, must), "aim_met": meets(figure, aim)}
    return {"target": what, "d": d, "figure": figure, "must": must, "aim": aim, **met}


def verdicts(rows):
    """Each target that was measured: figure, must, aim.

    A CPU's are required of d 64 and told for d 128 as well, a GPU's are for d 128.
    """
    out, cpu = [], HERE.device == "cpu"
    for d in (64, 128) if cpu else (128,):
        found = {(r["operation"], r["pass"], r["T"]): r for r in rows if r["d"] == d and "ratio" in r}
        for what, operation, which, T, over, name, must, aim in CPU_TARGETS if cpu else CUDA_TARGETS:
            ratios = found.get((operation, which, T), {"ratio": {}})["ratio"]
            ratio = ratios.get(name if over in ("sdpa", "static") else f"{over}/{name}")
            if ratio is not None:
                out.append(target(what, d, ratio, round(must, 3), round(aim, 3), operator.ge))
        for which in ("forward", "forward+backward") if cpu else ():
            short, long = (found.get(("sequence", which, T)) for T in (4096, 8192))
            if short and long:
                growth = round(long["ms"]["hybrid"] / short["ms"]["hybrid"], 3)
                out.append(target(f"hybrid, {which}: 4k to 8k costs at most", d, growth, 2.2, 2.2, operator.le))
        for what, which, name, must, aim in () if cpu else H200_MS:
            r = found.get(("sequence", which, 8192))
            if r and name in r["ms"]:
                out.append(target(f"{what}: ms at most", d, r["ms"][name], must, aim, operator.le))
    return out


def show(r):
    values = r.get("ms") or r["mib"]
    unit = "ms" if "ms" in r else "MiB"
    cells = "  ".join(f"{n} {v:.4g}" + (f" ({r['ratio'][n]:.2f}x)" if "ratio" in r else "") for n, v in values.items())
    print(f"{r['operation']:9} {r['pass']:17} T {r['T']:6} d {r['d']:4} {unit}:  {cells}", flush=True)
    show_work(r.get("work", {}))


def show_work(work):
    """A line for what was reached: GB/s, GFLOP/s, and the share of the roofline where it is known."""
    shares = {name: f", {x['roofline']:.0%} of the roofline" if "roofline" in x else "" for name, x in work.items()}
    cells = "  ".join(f"{n} {x['GB/s']:.3g} GB/s, {x['GFLOP/s']:.3g} GFLOP/s{shares[n]}" for n, x in work.items())
    if work:
        print(f"{'':10}reached:  {cells}", flush=True)


def surroundings():
    """Machine, versions, commit."""
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())

    def git(*command):
        run = subprocess.run(["git", *command], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        return run.stdout.strip()

    versions = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
    settings = {"B": HERE.B, "H": HERE.H, "window": WINDOW, "sinks": SINKS, "dtype": str(HERE.dtype)[len("torch.") :]}
    settings["clock"] = "CPU time of the process" if HERE.device == "cpu" else "GPU events, cache flushed"
    machine = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if HERE.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "machine": machine | {"load_average": os.getloadavg()},
        "versions": {"python": platform.python_version(), **versions},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "kernels")),
        "settings": settings,
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    add, lengths = parser.add_argument, [256, 512, 1024, 2048, 4096, 8192]
    add("--device", choices=sorted(SETTINGS), default="cpu")
    add("--lengths", type=integers, default=lengths, help="T of the sequence benchmarks, up to 32768")
    add("--contexts", type=integers, default=[1024, 8192, 32768], help="tokens remembered in the decode benchmarks")
    add("--memory", type=integers, default=[8192], help="T of the memory benchmarks")
    add("--dims", type=integers, default=[64, 128], help="head dims")
    kept = "teacher entries of the head loss benchmark, such as 64,256 (minutes each)"
    add("--kept", type=integers, default=[], help=kept)
    add("--seconds", type=float, default=10, help="per line of the table, three rounds at least")
    skip = "candidates to leave out, separated by commas; 'sdpa math,flex' by default, which take minutes"
    add("--skip", type=lambda text: text.split(","), default=["sdpa math", "flex"], help=skip)
    add("--out", type=Path, help="JSON file")
    add("--peak", nargs=3, metavar=("CANDIDATE", "T", "D"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    global HERE
    args = arguments()
    HERE = SETTINGS[args.device]
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1]), int(args.peak[2])))
        return
    result = surroundings() | {"errors": {}, "rows": [], "absent": {}}
    for d in args.dims:
        result["errors"][d] = check(d)
        listed = ", ".join(f"{name} {e:.1e}" for name, e in result["errors"][d].items())
        print(f"d {d}: errors against float64 {listed}", flush=True)
        rows = [(bench_sequence, (T, d, args.seconds, args.skip, result["absent"])) for T in args.lengths]
        rows += [(bench_decode, (N, d, min(args.seconds, 5), args.skip)) for N in args.contexts]
        for bench, settings in rows:
            for r in bench(*settings):
                result["rows"].append(r)
                show(r)
        for T in args.memory:
            result["rows"].append(bench_memory(T, d, args.skip))
            show(result["rows"][-1])
    result["head_loss"] = []
    if args.kept and args.device == "cpu":
        import bench_head_loss as head

        for r in head.bench(args.kept):
            result["head_loss"].append(r)
            head.show(r)
    for name, reason in result["absent"].items():
        print(f"not timed: {name}: {reason}")
    result["targets"] = verdicts(result["rows"]) + (head.verdicts(result["head_loss"]) if result["head_loss"] else [])
    finish(result, args.out)


def finish(result, out):
    """Print which targets are met, and write the result to a JSON file if one is named."""
    for t in result["targets"]:
        width = f", d {t['d']}" if "d" in t else ""
        print(f"{'met' if t['met'] else 'NOT MET':8} {t['target']}{width}: {t['figure']} (must {t['must']})")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
