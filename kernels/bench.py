"""How fast the kernels are, beside what they replace. `python kernels/bench.py --help`.

One process and one thread; every round runs all candidates on the same tensors, one after the other, and what is reported is the median of the
rounds' ratios: a busy machine slows the candidates of a round alike. Times are CPU time of this process. Nothing is timed before outputs and
gradients have been checked against float64. Peak memory is measured in a process of its own for each candidate.

The baseline is causal softmax attention over the whole sequence (`sdpa`), which is what a teacher's layer does. `hybrid` is mLSTM, window
attention and their gated sum on given queries, keys, values and gates; `layer` includes the two feature maps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from xlstm_kernels import MLSTMState, mlstm, mlstm_step, window_attention, window_step
from xlstm_kernels.scratch import LOCAL

HEADS, WINDOW, SINKS = 8, 512, 4
TOLERANCE = 3e-5  # of the largest entry, float32 against float64
LIMITS = {"native": 8192, "masked": 4096, "growing": 32768}  # the longest sequence that a quadratic or copying baseline is given
TARGETS = [  # (what, operation, pass, T, over, candidate, must, aim), d 64
    ("hybrid over SDPA, forward, 4k", "sequence", "forward", 4096, "sdpa", "hybrid", 1.6, 2.0),
    ("hybrid over SDPA, forward, 8k", "sequence", "forward", 8192, "sdpa", "hybrid", 3.0, 4.5),
    ("hybrid over SDPA, forward+backward, 8k", "sequence", "forward+backward", 8192, "sdpa", "hybrid", 3.0, 4.5),
    ("mLSTM over transformers' native, forward, 8k", "sequence", "forward", 8192, "native", "mlstm", 2.0, 3.0),
    ("mLSTM over transformers' native, forward+backward, 8k", "sequence", "forward+backward", 8192, "native", "mlstm", 4.0, 6.0),
    ("SDPA over hybrid (cost), forward, 512", "sequence", "forward", 512, "sdpa", "hybrid", 1 / 1.6, 1 / 1.6),
    ("SDPA over hybrid (cost), forward, 256", "sequence", "forward", 256, "sdpa", "hybrid", 1 / 2.5, 1 / 2.5),
    ("decode over a static KV cache, 8k", "decode", "step", 8192, "static", "hybrid", 5.0, 8.0),
    ("decode over a static KV cache, 32k", "decode", "step", 32768, "static", "hybrid", 20.0, 35.0),
]


def native_mlstm():
    """transformers' own chunkwise mLSTM, or None where it is missing. It scales q and clamps the normaliser: timed, not compared."""
    try:
        from transformers.models.xlstm import modeling_xlstm
    except ImportError:
        return None
    return getattr(modeling_xlstm, "mlstm_chunkwise_native_autograd", None)


def tensors(T, d, dtype=torch.float32, grad=False):
    """Queries, keys, values, feature maps and gates as a trained layer has them, by name."""
    make = torch.Generator().manual_seed(T + d)
    shapes = {"q": (1, T, HEADS, d), "k": (1, T, HEADS, d), "v": (1, T, HEADS, d), "o": (1, T, HEADS, 1), "i": (1, T, HEADS), "f": (1, T, HEADS)}
    x = {name: torch.randn(shape, generator=make, dtype=torch.float64) for name, shape in shapes.items()}
    x["phi_q"], x["phi_k"] = x["q"].softmax(-1), x["k"].softmax(-1)
    x["map"] = torch.randn(HEADS, d, d, generator=make, dtype=torch.float64)
    x["o"], x["f"] = x["o"].sigmoid(), 5 + x["f"]
    return {name: a.to(dtype).requires_grad_(grad) for name, a in x.items()}


def sdpa(x):
    return F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in "qkv"), is_causal=True).transpose(1, 2)


def masked(x):
    """Window and sinks as a T x T mask."""
    t = torch.arange(x["q"].shape[1])
    distance = t[:, None] - t
    mask = (distance >= 0) & ((distance < WINDOW) | (t < SINKS))
    return F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in "qkv"), attn_mask=mask).transpose(1, 2)


def window(x):
    return window_attention(x["q"], x["k"], x["v"], window=WINDOW, sinks=SINKS)


def memory(x):
    return mlstm(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"])[0]


def plain(x):
    return mlstm(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"], backend="chunkwise")[0]


def native(x):
    return native_mlstm()(*(x[name].transpose(1, 2).contiguous() for name in ("phi_q", "phi_k", "v", "i", "f"))).transpose(1, 2)


def hybrid(x):
    return torch.lerp(window(x), memory(x), x["o"])


def layer(x):
    mapped = {f"phi_{name}": torch.einsum("bthk,hkj->bthj", x[name], x["map"]).softmax(-1) for name in "qk"}
    return hybrid({**x, **mapped})


SEQUENCE = {"sdpa": sdpa, "native": native, "chunkwise": plain, "masked": masked, "window": window, "mlstm": memory, "hybrid": hybrid, "layer": layer}


class Decode:
    """One token of one layer at a context of N tokens, by each way to remember them."""

    def __init__(self, N, d):
        x = tensors(1, d)
        self.x, self.N, self.index = x, N, torch.tensor([N])
        self.keys, self.values = torch.randn(1, HEADS, N + 1, d), torch.randn(1, HEADS, N + 1, d)
        self.slots = [torch.randn(1, HEADS, SINKS + WINDOW, d) for _ in range(2)]
        self.state = MLSTMState(torch.rand(1, HEADS, d, d), torch.rand(1, HEADS, d), torch.zeros(1, HEADS))

    def static(self):
        """A KV cache that was allocated at its full length."""
        q, self.keys[:, :, self.N], self.values[:, :, self.N] = self.x["q"].transpose(1, 2), self.x["k"][:, 0], self.x["v"][:, 0]
        return F.scaled_dot_product_attention(q, self.keys, self.values).transpose(1, 2)

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
        return torch.lerp(self.window(), self.mlstm(), self.x["o"])


DECODE = ("static", "growing", "window", "mlstm", "hybrid")


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def check(d, T=1500):
    """{candidate: largest error of output and gradients against float64}; raises if one is red."""
    errors, want = {}, {}
    for dtype in (torch.float64, torch.float32):
        for name in ("sdpa", "masked", "window", "mlstm", "hybrid", "layer"):
            x = tensors(T, d, dtype, grad=True)
            h = SEQUENCE[{"window": "masked", "mlstm": "chunkwise"}.get(name, name) if dtype == torch.float64 else name](x)
            h.backward(tensors(T, d, dtype)["v"].flip(1))
            result = {"h": h.detach(), **{n: a.grad for n, a in x.items() if a.grad is not None}}
            if dtype == torch.float64:
                want[name] = result
            else:
                errors[name] = max(error(a, want[name][n]) for n, a in result.items())
    errors["step"] = check_steps(d)
    red = {name: e for name, e in errors.items() if not e < TOLERANCE}
    if red:
        raise SystemExit(f"d={d}: no numbers, because these are wrong (error against float64, allowed {TOLERANCE}): {red}")
    return errors


@torch.no_grad()
def check_steps(d, T=WINDOW + 20):
    """Largest error of token-by-token decoding against the whole sequence in float64."""
    want, x = hybrid(tensors(T, d, torch.float64)), tensors(T, d)
    case = Decode(1, d)
    case.state = MLSTMState(torch.zeros(1, HEADS, d, d), torch.zeros(1, HEADS, d), torch.full((1, HEADS), float("-inf")))
    h = []
    for t in range(T):
        case.x, case.index = {name: a[:, t : t + 1] if name != "map" else a for name, a in x.items()}, torch.tensor([t])
        h.append(case.hybrid())
    return error(torch.cat(h, 1), want)


def cost(fn):
    """CPU milliseconds of one call."""
    start = time.process_time()
    fn()
    return (time.process_time() - start) * 1e3


def rounds(candidates, seconds, repeat=1):
    """{candidate: ms of each round}: all candidates in turn, first once unmeasured, until the time is up, three rounds at least."""
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
    against = {"native": "mlstm"}
    ratios = {name: statistics.median(a / b for a, b in zip(times[baseline], t, strict=True)) for name, t in times.items()}
    ratios |= {f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)) for a, b in against.items() if a in times}
    return {"operation": operation, "pass": which, "T": T, "d": d, "rounds": len(times[baseline]), "ms": ms,
            "ratio": {name: round(r, 3) for name, r in ratios.items()}}


def allowed(name, T):
    return LIMITS.get(name, T) >= T and (name != "native" or (native_mlstm() is not None and T % 64 == 0))


def bench_sequence(T, d, seconds, skip=()):
    names = [name for name in SEQUENCE if allowed(name, T) and name not in skip]
    x = tensors(T, d)
    with torch.no_grad():
        yield row("sequence", "forward", T, d, rounds({n: lambda n=n: SEQUENCE[n](x) for n in names}, seconds), "sdpa")
    x, dh = tensors(T, d, grad=True), tensors(T, d)["v"].flip(1)
    yield row("sequence", "forward+backward", T, d, rounds({n: lambda n=n: SEQUENCE[n](x).backward(dh) for n in names}, seconds), "sdpa")


@torch.no_grad()
def bench_decode(N, d, seconds):
    case = Decode(N, d)
    names = [name for name in DECODE if allowed(name, N)]
    yield row("decode", "step", N, d, rounds({n: getattr(case, n) for n in names}, seconds, repeat=5), "static")


def peak(name, T, d):
    """MiB that forward and backward of a candidate need beyond inputs, output and gradients; measured in this process, so call it in a fresh one."""
    x, dh = tensors(T, d, grad=True), tensors(T, d)["v"].flip(1)
    SEQUENCE[name](tensors(WINDOW + 64, d, grad=True)).sum().backward()  # loads what the first call loads
    LOCAL.__dict__.clear()  # but not the scratch memory, which counts
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held = resident("VmRSS")
    h = SEQUENCE[name](x)
    h.backward(dh)
    results = [h, *(a.grad for a in x.values() if a.grad is not None)]
    return (resident("VmHWM") - held) / 1024 - sum(a.numel() * a.element_size() for a in results) / 2**20


def resident(field):
    """A line of /proc/self/status in KiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def bench_memory(T, d):
    names = [name for name in SEQUENCE if allowed(name, T) and name != "native"]
    run = [sys.executable, __file__, "--peak"]
    found = {name: float(subprocess.run([*run, name, str(T), str(d)], check=True, capture_output=True, text=True).stdout) for name in names}
    return {"operation": "memory", "pass": "forward+backward", "T": T, "d": d, "mib": {name: round(mib, 1) for name, mib in found.items()}}


def verdicts(rows):
    """Each target of TARGETS that was measured: figure, must, aim."""
    found = {(r["operation"], r["pass"], r["T"]): r["ratio"] for r in rows if r["d"] == 64 and "ratio" in r}
    out = []
    for what, operation, which, T, over, name, must, aim in TARGETS:
        ratio = found.get((operation, which, T), {}).get(name if over in ("sdpa", "static") else f"{over}/{name}")
        if ratio is not None:
            out.append({"target": what, "ratio": ratio, "must": round(must, 3), "aim": round(aim, 3), "met": ratio >= must, "aim_met": ratio >= aim})
    ms = {key: next(r["ms"] for r in rows if (r["operation"], r["pass"], r["T"], r["d"]) == (*key, 64)) for key in found}
    for which in ("forward", "forward+backward"):
        short, long = (ms.get(("sequence", which, T)) for T in (4096, 8192))
        if short and long:
            growth = round(long["hybrid"] / short["hybrid"], 3)
            out.append({"target": f"hybrid, {which}: 4k to 8k costs at most", "ratio": growth, "must": 2.2, "aim": 2.2, "met": growth <= 2.2,
                        "aim_met": growth <= 2.2})
    return out


def show(r):
    values = r.get("ms") or r["mib"]
    unit = "ms" if "ms" in r else "MiB"
    cells = "  ".join(f"{n} {v:.4g}" + (f" ({r['ratio'][n]:.2f}x)" if "ratio" in r else "") for n, v in values.items())
    print(f"{r['operation']:9} {r['pass']:17} T {r['T']:6} d {r['d']:4} {unit}:  {cells}", flush=True)


def surroundings():
    """Machine, versions, commit."""
    import transformers

    model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")][:1]
    git = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()  # noqa: E731
    return {"machine": {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                        "load_average": os.getloadavg()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
            "commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain", "--", "kernels")),
            "settings": {"B": 1, "H": HEADS, "window": WINDOW, "sinks": SINKS, "dtype": "float32", "clock": "CPU time of the process"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--lengths", type=integers, default=[256, 512, 1024, 2048, 4096, 8192], help="T of the sequence benchmarks")
    parser.add_argument("--contexts", type=integers, default=[1024, 8192, 32768], help="tokens remembered in the decode benchmarks")
    parser.add_argument("--memory", type=integers, default=[8192], help="T of the memory benchmarks")
    parser.add_argument("--dims", type=integers, default=[64, 128], help="head dims")
    parser.add_argument("--seconds", type=float, default=10, help="per line of the table, three rounds at least")
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="candidates to leave out, such as native,masked")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--peak", nargs=3, metavar=("CANDIDATE", "T", "D"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1]), int(args.peak[2])))
        return
    result = surroundings() | {"errors": {}, "rows": []}
    for d in args.dims:
        result["errors"][d] = check(d)
        print(f"d {d}: errors against float64 " + ", ".join(f"{name} {e:.1e}" for name, e in result["errors"][d].items()), flush=True)
        for T in args.lengths:
            for r in bench_sequence(T, d, args.seconds, args.skip):
                result["rows"].append(r)
                show(r)
        for r in [r for N in args.contexts for r in bench_decode(N, d, min(args.seconds, 5))] + [bench_memory(T, d) for T in args.memory]:
            result["rows"].append(r)
            show(r)
    result["targets"] = verdicts(result["rows"])
    for t in result["targets"]:
        print(f"{'met' if t['met'] else 'NOT MET':8} {t['target']}: {t['ratio']} (must {t['must']}, aim {t['aim']})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
