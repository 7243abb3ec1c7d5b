"""Compile every Triton kernel for a GPU that is not there, and say what each entry of the tile tables costs on it.

    python kernels/aot.py --chips 90                 every entry for sm_90
    python kernels/aot.py --chips 80,100 --one       one entry per kernel
    python kernels/aot.py --chips 90 --json -        the same as JSON on standard output

An entry fails if it spills registers (STACK > 0, or > 32 bytes where Triton is older than 3.9), wants more shared
memory than the chip has, or multiplies half-precision matrices without tensor cores. Exit code 1 if any does.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from xlstm_kernels.backends.launch import SHARED, Tile, recording

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}
# bytes let pass: 3.7 leaves 8 to 24 in a few entries
SPILL = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 32
OPERATIONS = ("mlstm", "window", "step", "head_loss", "slstm")
TENSOR_CORES = {80: r"mma\.sync", 86: r"mma\.sync", 90: r"wgmma|mma\.sync", 100: r"tcgen05|wgmma|mma\.sync"}


def cases(operation):
    """[(name, function)]: each function calls the operation's wrappers on meta tensors of one head dim and dtype,
    forward and backward.
    """
    return importlib.import_module(f"xlstm_kernels.{operation}.triton").aot_cases()


def signature_of(launch):
    """(signature, constants, attributes) as triton's compiler wants them, specialised as at a real start."""
    signature, constants, attributes, args = {}, {}, {}, iter(launch.args)
    for j, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[j,] = "constexpr", launch.constants[name]
            continue
        value = next(args)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name], constants[j,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[j,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[j,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    assert next(args, None) is None, f"{launch.kernel.__name__}: more arguments than parameters"
    return signature, constants, attributes


def compiled(launch, capability):
    """What one kernel needs on a chip: registers, bytes of stack and shared memory, and if it uses tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *signature_of(launch))
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, usage = result.asm["ptx"], resources(result.asm["cubin"])
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": result.metadata.shared,
        "tensor_cores": bool(re.search(TENSOR_CORES[capability], ptx)),
        "wgmma": "wgmma" in ptx,
        "dots": "tt.dot" in result.asm["ttir"],
    }


def resources(cubin):
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(REG|STACK):(\d+)", text))


def launches_of(operation, capability, one):
    """{case: its starts that no case before it made}; with `one`, the first start of each kernel."""
    seen, found = set(), {}
    for name, case in cases(operation):
        with recording(capability) as launches:
            case()
        for launch in launches:
            key = launch.kernel.__name__ if one else (launch.kernel, repr((signature_of(launch), launch.tile)))
            if key not in seen:
                seen.add(key)
                found.setdefault(name, []).append(launch)
    return found


def examine(job):
    """Rows of one case on one chip."""
    operation, name, capability, one = job
    rows = []
    for launch in launches_of(operation, capability, one)[name]:
        row = {"operation": operation, "case": name, "kernel": launch.kernel.__name__, "chip": capability}
        row |= launch.tile._asdict() | compiled(launch, capability)
        half = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in launch.args)
        red = [f"STACK {row['stack']}"] if row["stack"] > SPILL else []
        room = SHARED[capability] * 1024
        red += [f"shared {row['shared']} of {room}"] if row["shared"] > room else []
        red += ["no tensor cores"] if half and row["dots"] and not row["tensor_cores"] else []
        rows.append(row | {"red": red})
    return rows


def never_reached(operation, capability):
    """Entries of the operation's tables for a chip that none of its cases looks up."""
    with recording(capability) as launches:
        for _, case in cases(operation):
            case()
    # the tile tables of the operation, wherever they stand
    values = list(vars(importlib.import_module(f"xlstm_kernels.{operation}.triton")).values())
    values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
    tables = {id(x): x for x in values if isinstance(x, dict) and x}
    missing = []
    for table in tables.values():
        if not all(isinstance(k, tuple) and isinstance(tile, Tile) for k, tile in table.items()):
            continue
        row = capability if any(c == capability for c, _, _ in table) else 80
        missing += [key for key in table if key[0] == row and (id(table), key) not in launches.entries]
    return missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="90", help="compute capabilities, such as 80,90,100")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--one", action="store_true", help="one entry per kernel")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", help="file, or - for standard output")
    args = parser.parse_args()
    pairs = [(o, int(c)) for o in args.operations.split(",") for c in args.chips.split(",")]
    jobs = [(o, name, c, args.one) for o, c in pairs for name in launches_of(o, c, args.one)]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = [row for found in pool.map(examine, jobs) for row in found]
    out = sys.stderr if args.json == "-" else sys.stdout
    for r in rows:
        verdict = "RED  " + ", ".join(r["red"]) if r["red"] else "ok"
        cores = "wgmma" if r["wgmma"] else "mma" if r["tensor_cores"] else "-"
        kernel = f"sm_{r['chip']:<4} {r['operation']:10} {r['case']:28} {r['kernel']:28} {r['sizes']!s:44}"
        kernel += f" warps {r['num_warps']} stages {r['num_stages']}"
        needs = f"reg {r['registers']:3} stack {r['stack']} shared {r['shared']:6} {cores:5}"
        print(kernel, needs, verdict, file=out)
    for operation, c in [] if args.one else pairs:
        for entry in never_reached(operation, c):
            rows.append({"operation": operation, "chip": c, "entry": entry, "red": ["no case reaches this entry"]})
            print(f"sm_{c:<4} {operation:10} RED  no case reaches the entry {entry}", file=out)
    if args.json:
        text = json.dumps(rows, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n", encoding="utf-8")
    sys.exit(any(r["red"] for r in rows))


if __name__ == "__main__":
    main()
