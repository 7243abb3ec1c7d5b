"""What shared steps gain: tokens per second of the server's engine beside `generate` for one request after the other.

    python benchmarks/serve.py --clients 1,8,32                  random weights in SmolLM2-135M's shape
    python benchmarks/serve.py --student STUDENT --clients 1,8,32 --prompt 64 --new 64

Every client sends one prompt and waits for its greedy answer. HTTP has no part in it. Both sides take turns, and a gain is
the median of the rounds' ratios; seconds are those of the process, prompts included. No figure is printed for answers that
`generate` does not give, unless `--near` allows for ties of random weights: then the share of equal tokens stands beside it.
"""

import argparse
import queue
import statistics
from pathlib import Path

import torch
from model import SHAPES  # with the small ones
from transformers import AutoTokenizer, GenerationConfig

from xlstm_hybrid.conversion.load import load
from xlstm_hybrid.evaluation.efficiency import Meter
from xlstm_hybrid.evaluation.efficiency_pairs import random_model
from xlstm_hybrid.serving.engine import Engine

TINY = Path(__file__).parents[1] / "recipes/tiny_teacher/tiny-llama"


def settings(model, new):
    """Greedy, and nothing ends an answer before it has its `new` tokens."""
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=model.config.vocab_size)


def one_by_one(model, prompts, new):
    """Answers, lists of ids."""
    rows = (model.generate(torch.tensor([ids]), generation_config=settings(model, new))[0] for ids in prompts)
    return [row[len(ids) :].tolist() for ids, row in zip(prompts, rows, strict=True)]


def together(model, tokenizer, prompts, new):
    engine, ended = Engine(model, tokenizer, max_rows=len(prompts), queue=0), queue.Queue()
    engine.start()
    requests = [
        engine.submit(ids, settings(model, new), lambda _, reason: reason and ended.put(reason)) for ids in prompts
    ]
    reasons = {ended.get() for _ in requests}
    engine.stop()
    assert reasons == {"length"}, reasons
    return [request.tokens[request.prompt :] for request in requests]


def measure(model, tokenizer, clients, args):
    """One line: tokens per second of both sides, and the gain."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (clients, args.prompt), generator=draw).tolist()
    meter, answers, seconds = Meter(model.device), {}, {"alone": [], "shared": []}
    ways = {
        "alone": lambda: one_by_one(model, prompts, args.new),
        "shared": lambda: together(model, tokenizer, prompts, args.new),
    }
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(meter.cost(lambda name=name, way=way: answers.update({name: way()}))[0])
    pairs = [
        (a, b) for x, y in zip(answers["alone"], answers["shared"], strict=True) for a, b in zip(x, y, strict=True)
    ]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    if equal < 1 and not args.near:
        raise SystemExit(
            f"{clients} clients: {equal:.1%} of the tokens are those of generate, expected all; see --near"
        )
    gain = statistics.median(a / b for a, b in zip(seconds["alone"], seconds["shared"], strict=True))
    speed = {name: clients * args.new / statistics.median(values) for name, values in seconds.items()}
    return f"{clients:3d} clients: {speed['alone']:7.1f} -> {speed['shared']:7.1f} tokens/s, {gain:.2f}x, equal tokens {equal:.1%}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", help="checkpoint; without one, random weights")
    add("--shape", default="smollm2-135m", help=f"random weights: one of {', '.join(SHAPES)}")
    add("--window", type=int, default=64)
    add("--clients", default="1,8,32")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--new", type=int, default=32, help="tokens of each answer")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--near", action="store_true", help="print figures where answers differ from those of generate")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.student:
        model, tokenizer = load(args.student, "float32")
    else:  # the text of ids that this tokenizer does not have is empty
        model = random_model(args.shape, "student", "float32", "cpu", sliding_window=args.window)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
    together(model, tokenizer, [[3, 4]], 2)  # what is compiled or checked once
    for clients in map(int, args.clients.split(",")):
        print(measure(model, tokenizer, clients, args), flush=True)


if __name__ == "__main__":
    main()
