"""The benchmark's JSON as the Markdown tables of docs/speed.md: `python kernels/bench_table.py benchmarks/cpu.json`."""

import json
import sys
from pathlib import Path

SEQUENCE = ("sdpa", "masked", "native", "window", "mlstm", "hybrid")
DECODE = ("static", "growing", "window", "mlstm", "hybrid")


def table(header, rows):
    head, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([head, "|---|" + "---:|" * (len(header) - 1), *lines])


def number(x):
    return "–" if x is None else f"{x:.3g}" if x < 100 else f"{x:,.0f}"


def sequences(result, d):
    rows = [r for r in result["rows"] if r["operation"] == "sequence" and r["d"] == d]
    lines = [
        [f"{r['pass']}, {r['T']:,}", *(number(r["ms"].get(n)) for n in SEQUENCE), f"**{r['ratio']['hybrid']:.2f}×**"]
        for r in rows
    ]
    return table(["ms; T", *SEQUENCE, "hybrid over sdpa"], lines)


def decoding(result, d):
    rows = [r for r in result["rows"] if r["operation"] == "decode" and r["d"] == d]
    cells = [[number(r["ms"][n] * 1e3 if n in r["ms"] else None) for n in DECODE] for r in rows]
    scaled = [[f"{r['T']:,}", *c, f"**{r['ratio']['hybrid']:.1f}×**"] for r, c in zip(rows, cells, strict=True)]
    return table(["µs per token and layer; context", *DECODE, "hybrid over static"], scaled)


def memory(result):
    rows = [r for r in result["rows"] if r["operation"] == "memory"]
    names = [n for n in ("sdpa", "masked", "window", "mlstm", "hybrid") if any(n in r["mib"] for r in rows)]
    lines = [[f"T {r['T']:,}, d {r['d']}", *(number(r["mib"].get(n)) for n in names)] for r in rows]
    return table(["MiB beyond inputs, output, gradients", *names], lines)


def head_loss(result):
    names = list(dict.fromkeys(n for r in result for n in r.get("s", r.get("mib", {}))))
    lines = []
    for r in result:
        values, unit = (r["s"], "s") if "s" in r else (r["mib"], "MiB beyond inputs")
        lines.append([f"{unit}, k {r['M']}", *(number(values.get(n)) for n in names)])
    return table(["head loss, forward+backward", *names], lines)


def targets(result):
    lines = []
    for t in result["targets"]:
        figures = (f"{t[name]:.3g}" if name in t else "" for name in ("figure", "must", "aim"))
        lines.append([t["target"] + (f", d {t['d']}" if "d" in t else ""), *figures, "yes" if t["met"] else "**no**"])
    return table(["target", "figure", "must", "aim", "met"], lines)


def main():
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dims = sorted({r["d"] for r in result["rows"]})
    for d in dims:
        print(f"Head dim {d}:\n\n{sequences(result, d)}\n\n{decoding(result, d)}\n")
    print(f"{memory(result)}\n")
    if result["head_loss"]:
        print(f"{head_loss(result['head_loss'])}\n")
    print(targets(result))


if __name__ == "__main__":
    main()
