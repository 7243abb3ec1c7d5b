"""Whether drafts make a student's decoding faster. `python benchmarks/draft.py STUDENT --help`.

A way of drafting guesses n tokens, the student reads them in one pass, keeps those that it would have written itself, and
takes the others back; all of it is transformers' assisted decoding. The ways:

  window     the student with its window alone (`mixer_branches="window"`), the same weights, a cache of its own
  window:K   the same with its first K layers and the head
  early:K    the first K layers with both branches (`assistant_early_exit`)
  lookup     what followed the last two tokens earlier in the text (`prompt_lookup_num_tokens`): no model drafts

Before anything is timed every way has to give the tokens of plain greedy decoding; else there are no figures. Then
rounds: each runs all ways one after the other, prompt included, and the ratio is the median of the rounds' ratios. On a
CPU it is CPU time of one thread, which other work on the machine disturbs least; on a GPU the clock.

A draft pays if what is accepted in a round, and one token more, costs less than as many steps:
n x `draft step` + `pass` < `tokens per pass`, in steps of the student; `expected` is the ratio that follows from these, which
were timed alone, for the decoding without the prompt. Weights that a draft step reads, as a share of those
that a step of the student reads, are `draft step` where memory is what limits (GPU, one row). Source of the idea of
drafting with one branch: arXiv 2605.01106, which accepts .68.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.errors import XLSTMHybridError
from xlstm_hybrid.evaluation.efficiency_checks import PER_LAYER
from xlstm_hybrid.model.cache_names import cache_of, named
from xlstm_hybrid.state import remember

TEXT = Path(__file__).parents[1] / "docs/method.md"
CHAT = "Explain in a few sentences what a cache is, and write a short Python function that caches its results."
STEPS = 5  # passes of each kind that are timed, after one that is not


def view(model, layers):
    """A student of the first `layers` of a student's layers and its window alone, with the same parameters."""
    draft = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    draft.model.layers = draft.model.layers[:layers]
    for name in PER_LAYER:
        if (entries := getattr(draft.config, name)) is not None:
            setattr(draft.config, name, entries[:layers])
    draft.config.num_hidden_layers, draft.config.mixer_branches = layers, "window"
    return draft


def settings_of(model, way, n):
    """`generate`'s arguments for a way of drafting n tokens; "plain" drafts none."""
    kind, _, layers = way.partition(":")
    if kind == "lookup":
        return {"prompt_lookup_num_tokens": n}
    if kind == "plain":
        return {}
    drafts = model if kind == "early" else view(model, int(layers or model.config.num_hidden_layers))
    # always n tokens, however sure the draft is of them
    drafts.generation_config.num_assistant_tokens, drafts.generation_config.num_assistant_tokens_schedule = (
        n,
        "constant",
    )
    drafts.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_early_exit": int(layers)} if kind == "early" else {"assistant_model": drafts}


def clock(device):
    """Seconds: of this process on a CPU, of the clock elsewhere, once everything is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def decode(model, ids, tokens, settings):
    """`(new tokens, seconds, [tokens drafted in each pass of the student])` of greedy decoding, prompt included."""
    drafted, read, depth = [], ids.shape[1], model.config.num_hidden_layers

    def count(module, args, kwargs):
        nonlocal read
        if model.config.num_hidden_layers == depth:  # else early layers draft
            drafted.append(kwargs["input_ids"].shape[1] - read)
            read = 1

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        begin = clock(model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            disable_compile=True,
            **settings,
        )
        seconds = clock(model.device) - begin
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), seconds, drafted


def behind(model, ids, want, got):
    """Where two texts part, and by how many standard deviations of the logits the first is ahead there."""
    at = next(j for j, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
    logits = model(torch.cat([ids, ids.new_tensor([want[:at]])], 1), use_cache=False, logits_to_keep=1).logits[0, -1]
    gap = (logits[want[at]] - logits[got[at]]) / logits.std()
    return (
        f"new token {at}: {got[at]} instead of {want[at]}, which is {gap:.1e} standard deviations of the logits ahead"
    )


def passes(models, ids, lengths):
    """Seconds of single passes after the prompt: `{name: median}` of a step of every model in `models`, of passes of
    `length` tokens of the first, and of taking all but one of them back.
    """
    (name, student), *_ = models.items()
    kinds = {who: (model, 1, 0) for who, model in models.items()}
    kinds |= {f"pass of {length}": (student, length, 2 * max(lengths)) for length in lengths}
    caches = {
        who: remember(cache_of(m(ids, use_cache=True, logits_to_keep=1)), depth) for who, (m, _, depth) in kinds.items()
    }
    seconds = {who: [] for who in kinds}
    for _ in range(1 + STEPS):
        for who, (model, length, _) in kinds.items():
            begin = clock(model.device)
            model(ids[:, :length], use_cache=True, **named(caches[who]))
            if length > 1:
                caches[who].crop(1 - length)
            seconds[who].append(clock(model.device) - begin)
    return {who: statistics.median(times[1:]) for who, times in seconds.items()}


def weights_read(model, layers, window_alone):
    """Bytes of parameters that a step reads: the layers', without what only the memory reads where it is left out, and
    the head's."""
    whole = [(name, p) for layer in model.model.layers[:layers] for name, p in layer.named_parameters()]
    read = [p for name, p in whole if not (window_alone and ".mlstm." in name)]
    return sum(p.numel() * p.element_size() for p in (*read, *model.lm_head.parameters()))


def bench(model, ids, args):
    """`(rows, seconds of passes)` of one prompt [1, T]; rows is None where a way gives other tokens than greedy."""
    depth, name = model.config.num_hidden_layers, "step"
    cases = [("plain", 0)] + [(way, n) for way in args.ways for n in args.drafts]
    runs, want = {case: [] for case in cases}, None
    for _ in range(1 + args.rounds):  # the first is the check
        for case in cases:
            tokens, seconds, drafted = decode(model, ids, args.tokens, settings_of(model, *case))
            want = want or tokens
            if tokens != want:
                print(f"{case[0]}, {case[1]} drafted: {behind(model, ids, want, tokens)}", file=sys.stderr)
                return None, None
            runs[case].append((seconds, drafted))
    models = {name: model}
    models |= {way: settings_of(model, way, 1)["assistant_model"] for way in args.ways if way.startswith("window")}
    cost, rows = passes(models, ids, sorted({n + 1 for n in args.drafts})), []
    for (way, n), timed in runs.items():
        ratios = [plain[0] / own[0] for plain, own in zip(runs[cases[0]][1:], timed[1:], strict=True)]
        (kind, _, layers), (_, drafted) = way.partition(":"), timed[-1]
        row = {"way": way, "drafted at once": n, "ratio": statistics.median(ratios), "ratios": ratios}
        row |= {"tokens per second": args.tokens / statistics.median(own[0] for own in timed[1:])}
        if way != "plain":
            accepted, guessed = args.tokens - len(drafted), sum(drafted)
            row |= {"drafted": guessed, "accepted": accepted, "acceptance": accepted / guessed if guessed else None}
            row |= {"tokens per pass": args.tokens / len(drafted), "pass": cost[f"pass of {n + 1}"] / cost[name]}
            row |= {"draft step": 0.0 if kind == "lookup" else cost[way] / cost[name] if way in cost else None}
            part = weights_read(model, int(layers or depth), kind == "window") / weights_read(model, depth, False)
            row["weights read"] = 0.0 if kind == "lookup" else part
            if row["draft step"] is not None:  # passes that draft cost `pass`, others a step; the prompt is left out
                extra = guessed / n * (row["pass"] - 1) + guessed * row["draft step"]
                row["expected"] = args.tokens / (len(drafted) + extra)
        rows.append(row)
    return rows, cost


def show(rows):
    """A table in Markdown."""
    columns = [
        "drafted at once",
        "acceptance",
        "tokens per pass",
        "draft step",
        "pass",
        "weights read",
        "expected",
        "ratio",
    ]
    print("| way | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for row in rows:
        cells = [row.get(c) if row["way"] != "plain" or c == "ratio" else None for c in columns]
        texts = ["–" if x is None else str(x) if isinstance(x, int) else f"{x:.2f}" for x in cells]
        print(f"| {row['way']} | " + " | ".join(texts) + " |", flush=True)


def prompts(tokenizer, args):
    """`{name: [1, T]}`: the start of the text, and the question in the chat template where there is one."""
    text = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    found = {args.text.name: text[:, : args.prompt]}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": args.chat}]
        chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found["chat"] = chat["input_ids"]
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comma = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]  # noqa: E731
    add = parser.add_argument
    add("student", help="checkpoint directory or hub id")
    add("--ways", type=comma(str), default=["window", "lookup"], help="such as window,window:15,early:15,lookup")
    add("--drafts", type=comma(int), default=[3, 5, 8], help="n: tokens drafted at once")
    add("--tokens", type=int, default=128, help="new tokens of each text")
    add("--rounds", type=int, default=3, help="timed rounds, after the one that checks the tokens")
    add("--text", type=Path, default=TEXT, help="text file, whose start is a prompt")
    add("--prompt", type=int, default=256, help="tokens of it")
    add("--chat", default=CHAT, help="question for the chat template")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    for way in args.ways:
        kind, colon, layers = way.partition(":")
        wanted = {"window": not colon or layers.isdigit(), "early": layers.isdigit(), "lookup": not colon}
        if not wanted.get(kind):
            parser.error(f"--ways: {way!r}, expected window, window:K, early:K or lookup, K a number of layers")
    if min([args.tokens, args.rounds, args.prompt, *args.drafts], default=0) < 1 or not (args.ways and args.drafts):
        parser.error("--tokens, --rounds, --prompt and each of --drafts: expected at least 1, and at least one way")
    return parser, args


def main():
    parser, args = arguments()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.student)
        model = XLSTMHybridForCausalLM.from_pretrained(args.student, dtype=args.dtype, device_map=args.device).eval()
    except (OSError, XLSTMHybridError) as error:
        parser.error(f"{args.student}: {error}")
    depth, branches = model.config.num_hidden_layers, model.config.mixer_branches
    if branches != "both" or model.config.mixer_combine != "gate":
        parser.error(
            f"{args.student}: mixer_branches={branches!r}, expected 'both' and a gate: there is no branch to leave out"
        )
    for way in args.ways:
        if not 0 < int(way.partition(":")[2] or depth) <= depth:
            parser.error(f"--ways: {way!r}, expected 1 to {depth} layers, as many as the student has")
    model.generation_config = (
        transformers.GenerationConfig(  # a checkpoint's sampling and penalties have no part in this
            pad_token_id=model.generation_config.pad_token_id, eos_token_id=model.generation_config.eos_token_id
        )
    )
    machine = {"cpu": platform.processor() or platform.machine(), "load_average": os.getloadavg()}
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"settings": chosen, "machine": machine, "torch": torch.__version__, "prompts": {}}
    result["transformers"] = transformers.__version__
    for name, ids in prompts(tokenizer, args).items():
        rows, cost = bench(model, ids.to(model.device), args)
        if rows is None:
            sys.exit(
                f"{name}: the tokens are not those of greedy decoding: no figures. A gap near 0 is rounding: try --dtype float64"
            )
        result["prompts"][name] = {"prompt tokens": ids.shape[1], "seconds": cost, "rows": rows}
        print(f"\n{name}: {ids.shape[1]} tokens, then {args.tokens}; a step {1e3 * cost['step']:.1f} ms\n")
        show(rows)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
