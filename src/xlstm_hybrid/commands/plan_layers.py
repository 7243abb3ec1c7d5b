"""`xlstm-hybrid plan-layers`: a student's layout for a budget of cache bytes."""

import json
import re
import time
from pathlib import Path
from typing import Annotated

import torch
import yaml
from rich.console import Console
from transformers import AutoConfig
from typer import Argument, Option

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.checkpoint.files import read_json, write_file
from xlstm_hybrid.checkpoint.outputs import check_output
from xlstm_hybrid.conversion.convert import from_teacher
from xlstm_hybrid.conversion.families import student_config
from xlstm_hybrid.conversion.gguf import is_gguf
from xlstm_hybrid.conversion.load import load_tokenizer
from xlstm_hybrid.data.long_context import documents
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.configuration import LINEAR
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM
from xlstm_hybrid.planning.layers import allocate, rank_groups, retrieval_rows
from xlstm_hybrid.planning.run import human, read_config

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan_layers(
    model: Annotated[
        str, Argument(help="Teacher or student, path or hub id; without --measure config.json is enough.")
    ],
    budget: Annotated[str, Option(help="Bytes of cache per sequence, for example 64MB, 1.5GB or 128MiB.")],
    length: Annotated[int, Option(help="Context in tokens at which the budget holds.")],
    window: Annotated[int | None, Option(help="Window, halved until it fits; by default 512 or the student's.")] = None,
    sinks: Annotated[int | None, Option(help="Sink tokens; 4, or the student's own, by default.")] = None,
    dtype: Annotated[str, Option(help="Of keys and values in the cache.")] = "bfloat16",
    windows: Annotated[str, Option(help="Hybrid layers with a window: all, or the first; others remember.")] = "all",
    sparse_share: Annotated[float, Option(help="Share of the spare bytes for a sparse memory; 0: none.")] = 0.0,
    ranking: Annotated[Path | None, Option(exists=True, help="Ranking of an earlier --measure, JSON.")] = None,
    measure: Annotated[bool, Option("--measure", help="Rank groups first, on retrieval rows; needs weights.")] = False,
    kind: Annotated[str, Option(help="Of the rows: needle, multikey, recall or variables.")] = "multikey",
    rows: Annotated[int, Option(help="Number of rows.")] = 16,
    tokens: Annotated[int, Option(help="Tokens of each prompt.")] = 2048,
    haystack: Annotated[Path | None, Option(help="Real text to hide the rows' answers in, as in harness.")] = None,
    method: Annotated[str, Option(help="ablate (all groups but one), add (none but one) or greedy.")] = "ablate",
    steps: Annotated[int | None, Option(help="Groups that greedy chooses one by one.")] = None,
    batch_size: Annotated[int, Option(help="Rows per forward call.")] = 4,
    device: Annotated[str, Option(help="Where to measure, for example cuda.")] = "cpu",
    save_ranking: Annotated[Path | None, Option(help="File for the ranking with its figures, JSON.")] = None,
    out: Annotated[Path | None, Option(help="File of the fields for convert --options: .json, else YAML.")] = None,
    report: Annotated[Path | None, Option("--json", help="File for the whole plan, JSON.")] = None,
):
    """Choose a student's layer types, windows and memories for a cache budget.

    In the order of what recalled more in docs/arena.md: windows, groups that keep the teacher's attention, wider features. Without a ranking the
    kept groups are spread evenly, and the plan says that they are not measured. Of a trained student the features stay as they are.

    Example: xlstm-hybrid plan-layers Qwen/Qwen3-1.7B --budget 64MB --length 32768 --out student.yaml
    """
    for path in filter(None, (save_ranking, out, report)):
        check_output(path, "file", [ranking] if ranking else ())
    if haystack is not None and not measure:
        raise ConfigError("--haystack: read by --measure alone; add it, or leave --haystack out")
    if measure and ranking is not None:
        raise ConfigError("--measure and --ranking: expected one of them; leave --measure out to use the file")
    device = device_of(device)
    chosen = {"sliding_window": window, "num_sink_tokens": sinks}
    config, is_student = student_of(model, **{name: value for name, value in chosen.items() if value is not None})
    found = read_json(ranking, "ranking") if ranking else None
    if measure:
        how = {"method": method, "steps": steps, "batch_size": batch_size}
        found = measured_ranking(model, config, is_student, kind, rows, tokens, device, haystack, **how)
        if save_ranking is not None:
            write_file(save_ranking, json.dumps(found, indent=1).encode())
    how = {"dtype": dtype, "windows": windows, "widen": not is_student, "sparse_share": sparse_share}
    plan = allocate(config, budget_bytes(budget), length, ranking=found, **how)
    for line in layout_lines(plan, found):
        print(line)
    if out is not None:
        write_file(out, fields_text(plan, out.suffix == ".json").encode())
    if report is not None:
        write_file(report, json.dumps(plan.as_dict() | {"ranking": found}, indent=1).encode())


def budget_bytes(budget):
    """Bytes of "64MB"; ConfigError where that is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
    if not match or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise ConfigError(f"budget={budget!r}: expected bytes such as 64000000, 64MB or 61MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def student_of(model, **chosen):
    """`(config, whether MODEL is a student)`: a student's config as it is, or that of a teacher's student; `chosen` fields are set."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):
        config = None  # `read_config` says what is wrong
    if getattr(config, "model_type", None) != "xlstm_hybrid":
        return student_config(read_config(model), **chosen), False
    for name, value in chosen.items():
        setattr(config, name, value)
    config.check()
    return config, True


def measured_ranking(model, config, is_student, kind, count, length, device, haystack=None, **how):
    """`rank_groups` on `long_context.documents`, of a student as it is or of a teacher's fresh one; with its seconds."""
    require_intact(model)
    tokenizer = load_tokenizer(model)
    ids, answers = retrieval_rows(tokenizer, documents(tokenizer, kind, length, count, haystack=haystack))
    # a GGUF file is dequantised
    stored = torch.float32 if is_gguf(model) else AutoConfig.from_pretrained(model, trust_remote_code=False).dtype
    dtype = stored and getattr(torch, dtype_for(device, stored=str(stored).removeprefix("torch.")))
    chosen = {"sliding_window": config.sliding_window, "num_sink_tokens": config.num_sink_tokens}
    if is_student:
        student = XLSTMHybridForCausalLM.from_pretrained(model, config=config, dtype=dtype or "auto")
    else:
        student = from_teacher(XLSTMHybridForCausalLM, model, dtype=dtype, **chosen)
    start = time.time()
    with Console(stderr=True).status("measuring") as status:
        how["progress"] = lambda done, of: status.update(f"measured {done} of about {of}")
        found = rank_groups(student.to(device), ids, answers, **how)
    sizes = {"window": config.sliding_window, "sinks": config.num_sink_tokens}
    told = {"kind": kind, "prompt_tokens": length, "haystack": haystack and haystack.name}
    return found | told | sizes | {"seconds": round(time.time() - start, 1)}


def layout_lines(plan, ranking):
    """The plan as lines."""
    fields, teacher = plan.student, sum(plan.teacher_bytes.values())
    kept = fields["kept_groups"] or []
    whole = [j for j, kind in enumerate(fields["layer_types"]) if kind not in ("hybrid_sliding", LINEAR)]
    if ranking:
        none, every = ranking["none"], ranking["all"]
        yield f"ranking ({ranking['method']}, {ranking['rows']} rows, {ranking['answer_tokens']} answer tokens): NLL {none['nll']:.3f} with no group,"
        yield f"  {every['nll']:.3f} with all; rows answered {none['row_accuracy']:.2f} and {every['row_accuracy']:.2f}"
    where = " in the first hybrid layer alone" if fields["layer_windows"] else ""
    sparse = f", sparse memory {fields['sparse_memory']} per group" if "sparse_memory" in fields else ""
    features = f", {fields['memory_feature_dim']} features per head" if fields["memory_feature_dim"] else ""
    yield f"window {fields['sliding_window']}, sinks {fields['num_sink_tokens']}{where}{features}{sparse}"
    groups = ", ".join(f"layer {j} {mine}" for j, mine in enumerate(kept) if mine)
    linear = [j for j, kind in enumerate(fields["layer_types"]) if kind == LINEAR]
    beside = f"linear layers: {linear}; " if linear else ""
    yield f"{beside}full layers: {whole or 'none'}; kept groups: {groups or 'none'}"
    parts = ", ".join(f"{name} {human(size)}" for name, size in plan.bytes.items() if size)
    yield f"{human(plan.total)} of {human(plan.budget)} per sequence at {plan.length:,} tokens in {plan.dtype} ({parts})"
    yield f"the teacher's cache has {human(teacher)}: this is {plan.total / teacher:.1%} of it"
    yield from (f"note: {note}" for note in plan.notes)


def fields_text(plan, as_json):
    """What `convert --options` and the section `student` of a recipe read; YAML says how it came about."""
    fields = {name: value for name, value in plan.student.items() if value is not None}
    if as_json:
        return json.dumps(fields, indent=1) + "\n"
    size = f"{plan.total:,} of {plan.budget:,} bytes per sequence at {plan.length:,} tokens in {plan.dtype}"
    head = f"plan-layers: {size}; kept groups {'by measurement' if plan.measured else 'not measured'}"
    text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None)
    return "".join(f"# {line}\n" for line in [head, *plan.notes]) + text
