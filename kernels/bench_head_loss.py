"""How fast the head loss is, beside what it replaces. `python kernels/bench_head_loss.py --help`.

One process, one thread, CPU time of the process; every round runs all candidates on the same tensors and a ratio is the
median of the rounds' ratios. Nothing is timed before values and gradients have been checked against float64. Peak
memory is what forward and backward need beyond their inputs, the gradients included, measured in a process of its own
for each candidate.

Dims: N tokens, D hidden size, V vocabulary, M teacher entries kept. The loss is 0.9 CE + 0.1 forward KL.

    dense         KL to the teacher's whole distribution, whose logits are given, on full logits
    gathered      log_softmax of full logits and a gather, with the rest as 1 - sum: the usual code, and the baseline
    checkpointed  the same on 128 rows at a time, logits calculated again in the backward
    fused         `head_loss`;  frozen: with a head that wants no gradient
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import roofline
import torch
import torch.nn.functional as F
from bench import cost, error, finish, peak_of, refuse_wrong, show_work, surroundings
from torch.utils.checkpoint import checkpoint
from xlstm_kernels import head_loss

SIZES = {"N": 2048, "D": 1024, "V": 128256}
CE, KL = 0.9, 0.1
ROWS = 128  # of the checkpointed chunks
TOLERANCE = 2e-5  # of the largest entry, float32 against float64
TIME, EXTRA = 1.0, 100.0  # targets: time of `fused` over `gathered` at most, MiB beyond the head's gradient at most


def tensors(M, N, D, V, dtype=torch.float32, whole=False):
    """Hidden states, head, labels and a teacher's M entries by name; `whole` adds the teacher's logits [N, V]."""
    make = torch.Generator().manual_seed(M)
    x = {
        "hidden": torch.randn(N, D, generator=make),
        "weight": torch.randn(V, D, generator=make) * (2 / D**0.5),
        "labels": torch.randint(0, V, (N,), generator=make),
    }
    if whole:
        x["teacher"] = 3 * torch.randn(N, V, generator=make)
        logp = x["teacher"].double().log_softmax(-1)
        top, x["top_ids"] = logp.topk(M, -1)
        rest = logp.scatter(-1, x["top_ids"], float("-inf")).logsumexp(-1)
    else:  # distinct ids, spread over the vocabulary
        x["top_ids"] = (torch.randint(0, V, (N, 1), generator=make) + torch.arange(M) * (V // M)) % V
        logp = torch.cat([4 * torch.randn(N, M, generator=make), torch.full((N, 1), 4.0)], 1).log_softmax(-1)
        top, rest = logp[:, :-1], logp[:, -1]
    x |= {"top_logp": top, "rest_logp": rest}
    return {name: a.to(dtype) if a.is_floating_point() else a for name, a in x.items()}


def gathered_kl(logits, x, rows=slice(None)):
    """0.9 CE + 0.1 KL summed over `rows`, whose logits these are."""
    logq = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    q, p, rest = logq.gather(-1, x["top_ids"][rows]), x["top_logp"][rows], x["rest_logp"][rows]
    kl = (p.exp() * (p - q)).sum() + (rest.exp() * (rest - torch.log1p(-q.exp().sum(-1).clamp(max=1 - 1e-6)))).sum()
    return CE * F.nll_loss(logq, x["labels"][rows], reduction="sum") + KL * kl


def dense(x):
    logq, logp = (x["hidden"] @ x["weight"].T).log_softmax(-1), x["teacher"].log_softmax(-1)
    return CE * F.nll_loss(logq, x["labels"]) + KL * F.kl_div(logq, logp, reduction="sum", log_target=True) / len(logq)


def gathered(x):
    return gathered_kl(x["hidden"] @ x["weight"].T, x) / len(x["hidden"])


def checkpointed(x):
    def part(hidden, weight, rows):
        return gathered_kl(hidden @ weight.T, x, rows)

    N = len(x["hidden"])
    pieces = [slice(begin, begin + ROWS) for begin in range(0, N, ROWS)]
    return sum(checkpoint(part, x["hidden"][rows], x["weight"], rows, use_reentrant=False) for rows in pieces) / N


def fused(x, backend="auto"):
    teacher = (x[name][None] for name in ("top_ids", "top_logp", "rest_logp"))
    terms = {"ce_weight": CE, "forward_kl_weight": KL, "shift": False, "backend": backend}
    return head_loss(x["hidden"][None], x["weight"], x["labels"][None], *teacher, **terms).loss


CANDIDATES = {"dense": dense, "gathered": gathered, "checkpointed": checkpointed, "fused": fused, "frozen": fused}


def step(name, x):
    """Forward and backward of a candidate; the loss and the gradients of hidden and head (None where it is frozen)."""
    leaves = {n: x[n].detach().requires_grad_(n == "hidden" or name != "frozen") for n in ("hidden", "weight")}
    loss = CANDIDATES[name](x | leaves)
    loss.backward()
    return {"loss": loss.detach(), **{n: a.grad for n, a in leaves.items()}}


def check(N=300, D=64, V=4001, M=64):
    """{candidate: largest error of loss and gradients against the definition in float64}; raises if one is red."""
    errors = {}
    for name in CANDIDATES:
        kept = V if name == "dense" else M  # with every id stored the two divergences are one
        x = tensors(kept, N, D, V, torch.float64, whole=True)
        leaves = {n: x[n].clone().requires_grad_() for n in ("hidden", "weight")}
        loss = fused(x | leaves, backend="dense")
        loss.backward()
        got = step(name, tensors(kept, N, D, V, whole=True))
        want = {"loss": loss.detach(), **{n: a.grad for n, a in leaves.items()}}
        errors[name] = max(error(a, want[n]) for n, a in got.items() if a is not None)
    return refuse_wrong(errors, TOLERANCE)


def bench_time(M, rounds, names, sizes):
    """Row of the table: median seconds of each candidate, and the median over the rounds of candidate / gathered."""
    x = tensors(M, **sizes)
    if "dense" in names:
        x["teacher"] = torch.randn(sizes["N"], sizes["V"])
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(cost(lambda name=name: step(name, x)) / 1e3)
    base = times.get("gathered")
    over = {name: statistics.median(a / b for a, b in zip(t, base, strict=True)) for name, t in times.items() if base}
    result = {"operation": "head_loss", "pass": "forward+backward", "M": M, **sizes, "rounds": rounds}
    result["over_gathered"] = {name: round(ratio, 3) for name, ratio in over.items()}
    seconds = {name: round(statistics.median(t), 3) for name, t in times.items()}
    work = {name: roofline.head_loss(**sizes, M=M, size=4, frozen=name == "frozen") for name in seconds}
    reached = {name: work[name].figures(s) for name, s in seconds.items()}
    return result | {"s": seconds, "work": reached}


def peak(name, M, sizes):
    """MiB that forward and backward of a candidate need beyond inputs, in this process: call it in a fresh one."""
    step(name, tensors(16, 64, 32, 1000, whole=True))  # loads what the first call loads
    x = tensors(M, **sizes)
    if name == "dense":
        x["teacher"] = torch.randn(sizes["N"], sizes["V"])
    return peak_of(lambda: step(name, x))[1]


def bench_memory(M, names, sizes):
    command = [sys.executable, __file__, "--sizes", json.dumps(sizes), "--peak"]
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    mib = {name: round(float(run([*command, name, str(M)]).stdout), 1) for name in names}
    head = round(sizes["V"] * sizes["D"] * 4 / 2**20, 1)
    result = {"operation": "head_loss memory", "pass": "forward+backward", "M": M, **sizes}
    return result | {"mib": mib, "head_gradient_mib": head}


def verdicts(rows):
    """Each target that was measured: figure, must, met."""
    targets = []
    for r in rows:
        if "fused" in r.get("over_gathered", {}):
            targets.append((f"fused over gathered (time), M {r['M']}", r["over_gathered"]["fused"], TIME))
        if "fused" in r.get("mib", {}):
            beyond = round(r["mib"]["fused"] - r["head_gradient_mib"], 1)
            targets.append((f"fused: MiB beyond the head's gradient, M {r['M']}", beyond, EXTRA))
    return [{"target": what, "figure": figure, "must": must, "met": figure <= must} for what, figure, must in targets]


def bench(kept=(64, 256), rounds=3, names=tuple(CANDIDATES), memory=tuple(CANDIDATES), sizes=None):
    """Rows of the table, after a check of the candidates."""
    errors, sizes = check(), SIZES if sizes is None else sizes
    print("errors against float64 " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True)
    for M in kept:
        if rounds:
            yield bench_time(M, rounds, names, sizes)
        if memory:
            yield bench_memory(M, memory, sizes)


def show(r):
    values, unit = (r["s"], "s") if "s" in r else (r["mib"], "MiB")
    ratio = r.get("over_gathered", {})
    cells = "  ".join(f"{n} {v:.4g}" + (f" ({ratio[n]:.2f}x)" if n in ratio else "") for n, v in values.items())
    print(f"{r['operation']:17} N {r['N']} D {r['D']} V {r['V']} M {r['M']:4} {unit}:  {cells}", flush=True)
    show_work(r.get("work", {}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    add, names = parser.add_argument, tuple(CANDIDATES)
    integers = lambda text: [int(M) for M in text.split(",")]  # noqa: E731
    add("--kept", type=integers, default=[64, 256], help="M, teacher entries kept")
    add("--rounds", type=int, default=3)
    add("--candidates", type=listed, default=names, help="to time; some minutes a round for all")
    add("--memory", type=listed, default=names, help="candidates whose peak is measured")
    add("--sizes", type=json.loads, default=SIZES, help="JSON with N, D, V")
    add("--out", type=Path, help="JSON file")
    add("--peak", nargs=2, metavar=("CANDIDATE", "M"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1]), args.sizes))
        return
    result = surroundings() | {"rows": []}
    for r in bench(args.kept, args.rounds, args.candidates, args.memory, args.sizes):
        result["rows"].append(r)
        show(r)
    result["targets"] = verdicts(result["rows"])
    finish(result, args.out)


if __name__ == "__main__":
    main()
