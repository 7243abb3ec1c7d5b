"""Milliseconds of CPU per decoded step: a student in vLLM, the same student in steps of ours, vLLM's Llama of its shape.

    python benchmarks/vllm_student.py --rows 1,32 --contexts 512,8192        in the environment of `make test-vllm`

Each side has a process of its own, one thread and float32. Nothing is measured before the greedy tokens of vLLM's models
are those of `generate` for real prompts. One prompt of each length is read. The contexts of the rows are not, which would
take ten minutes: pages, slots and caches are as large as after such prompts, and hold random numbers, on which no time
depends. Sides take turns, and a ratio is the median of the rounds' ratios.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.update(VLLM_PLUGINS="xlstm_hybrid", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")

import torch
from model import SHAPES  # with the small ones
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_hybrid.evaluation.efficiency_pairs import random_model
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.state import fork, prefill

SIDES = {"student, vLLM": "student", "student, ours": "student", "Llama, vLLM": "teacher"}
CHECKED, NEW = (3, 40, 17, 90), 8  # lengths of the prompts that are really read, and tokens written after each
PIECE = 2048  # tokens of a prompt that are read at once
ROOM = 512  # tokens that may follow a context


def numbers(length, vocabulary, seed=0):
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Ours:
    """`prefill` and steps with our own cache."""

    def __init__(self, folder, args):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.cache = self.token = None

    def written(self):
        ids = (torch.tensor([numbers(n, self.model.config.vocab_size)]) for n in CHECKED)
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        return [self.model.generate(x, **settings)[0, x.shape[1] :].tolist() for x in ids]

    def fill(self, rows, context):
        """One row is read, in pieces, and repeated: each row has memory of its own."""
        self.cache, self.token = fork(self.read(context), rows), torch.full((rows, 1), 3)

    def read(self, context):
        cache = None
        for part in torch.tensor([numbers(context, self.model.config.vocab_size)]).split(PIECE, 1):
            cache = prefill(self.model, part, cache=cache)
        return cache

    @torch.no_grad()
    def step(self):
        logits = self.model(self.token, **named(self.cache), use_cache=True).logits
        self.token = logits.argmax(-1)

    def empty(self):
        self.cache = None


class InVLLM:
    """vLLM's engine, in this process."""

    def __init__(self, folder, args):
        from vllm import LLM, SamplingParams

        longest, config = max(args.contexts) + ROOM, AutoConfig.from_pretrained(folder)
        pages = 0 if config.model_type == "xlstm_hybrid" else max(args.rows) * longest
        pages *= config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
        self.llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=longest,
            max_num_seqs=max(args.rows),
            max_num_batched_tokens=PIECE,
            kv_cache_memory_bytes=pages + (1 << 30),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=True,
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.model, self.asked = self.runner.model, []
        self.greedy = lambda new: SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=new)

    def add(self, name, length, new):
        ids = numbers(length, self.runner.model_config.hf_config.vocab_size)
        self.engine.add_request(name, {"prompt_token_ids": ids}, self.greedy(new))
        self.asked.append(name)

    def written(self):
        found = {}
        for n in CHECKED:
            self.add(str(n), n, NEW)
        while self.engine.has_unfinished_requests():
            found |= {output.request_id: list(output.outputs[0].token_ids) for output in self.engine.step()}
        self.asked.clear()
        return [found[str(n)] for n in CHECKED]

    def fill(self, rows, context):
        """Let the scheduler read `rows` prompts while the model only counts their tokens; then fill what it holds."""
        from vllm.forward_context import get_forward_context

        states, slots = getattr(self.model, "states", {}), set()

        def count(input_ids, positions, *args, **kwargs):
            for layer in states.values():
                for part in get_forward_context().attn_metadata[layer.name]:
                    slots.update(part.slots.tolist())
                    layer.kv_cache[3][part.slots, 0] = part.tokens.index[:, -1].to(torch.int32) + 1
            return torch.zeros(len(positions), self.runner.model_config.get_hidden_size())

        self.model.forward = count
        for j in range(rows):
            self.add(f"{context} {j}", context, ROOM)
        begun = set()
        while len(begun) < rows:
            begun |= {output.request_id for output in self.engine.step()}
        del self.model.forward
        for layer in states.values():
            C, n, m, _, keys, values = layer.kv_cache
            for x in (C, keys, values):
                x[list(slots)] = torch.randn(len(slots), *x.shape[1:])
            n[list(slots)], m[list(slots)] = 1.0, 0.0
        if not states:
            for x in self.runner.kv_caches:
                x.normal_()

    def read(self, context):
        self.add(f"read {context}", context, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.asked.clear()

    def step(self):
        assert len(self.engine.step()) == len(self.asked), "a row has ended: ROOM is too small"

    def empty(self):
        self.engine.abort_request(self.asked)
        self.engine.step()
        self.asked.clear()


def work(connection, side, folder, args):
    """A side's process: does what it is told, and answers."""
    torch.set_num_threads(1)
    made = (Ours if side.endswith("ours") else InVLLM)(folder, args)
    connection.send(made.written())
    while (order := connection.recv()) is not None:
        begin = time.process_time()
        if isinstance(order, int):
            for _ in range(order):
                made.step()
        elif order == "empty":
            made.empty()
        elif len(order) == 1:
            made.read(*order)
        else:
            made.fill(*order)
        connection.send(time.process_time() - begin)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="smollm2-135m", help=f"one of {', '.join(SHAPES)}")
    add("--layers", type=int, default=12)
    add("--window", type=int, default=512)
    add("--rows", type=lambda text: [*map(int, text.split(","))], default=[1, 32])
    add("--contexts", type=lambda text: [*map(int, text.split(","))], default=[512, 8192])
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=4, help="decoded steps of a round")
    args = parser.parse_args(argv)
    start, sides, answers = multiprocessing.get_context("spawn"), {}, {}
    with tempfile.TemporaryDirectory() as root:
        for role in ("student", "teacher"):
            options = {"sliding_window": args.window} if role == "student" else {}
            model = random_model(args.shape, role, "float32", "cpu", args.layers, **options)
            model.config.max_position_embeddings = max(args.contexts) + ROOM
            model.generation_config.eos_token_id = None
            model.save_pretrained(Path(root) / role)
            if role == "teacher":
                answers[role] = Ours(Path(root) / role, args).written()
            del model
        for side, role in SIDES.items():
            sides[side], other = start.Pipe()
            start.Process(target=work, args=(other, side, Path(root) / role, args), daemon=True).start()
            other.close()  # so that a process that ends is an EOFError here
            found = sides[side].recv()
            answers[side] = found
    for side, wanted in (("student, vLLM", answers["student, ours"]), ("Llama, vLLM", answers["teacher"])):
        if answers[side] != wanted:
            raise SystemExit(
                f"{side}: greedy tokens are {answers[side]}, those of generate {wanted}: nothing is measured"
            )

    def tell(order, rounds=1):
        """{side: [CPU seconds of each round]} of an order to each side."""
        taken = {side: [] for side in sides}
        for turn in range(rounds):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                sides[side].send(order)
                taken[side].append(sides[side].recv())
        return taken

    for context in args.contexts:
        taken = tell((context,), 3)
        seconds = {side: round(statistics.median(found), 2) for side, found in taken.items()}
        print(json.dumps({"context": context, "seconds of one prompt": seconds}), flush=True)
    for context, rows in product(args.contexts, args.rows):
        tell((rows, context))
        tell(2)  # to warm up
        taken = tell(args.steps, args.rounds)
        taken = {side: [seconds / args.steps * 1e3 for seconds in found] for side, found in taken.items()}
        tell("empty")
        line = {"rows": rows, "context": context}
        line |= {side: round(statistics.median(found), 1) for side, found in taken.items()}
        for side in list(sides)[1:]:
            pairs = zip(taken[side], taken["student, vLLM"], strict=True)
            line[f"{side} / student, vLLM"] = round(statistics.median(a / b for a, b in pairs), 2)
        print(json.dumps(line), flush=True)
    for side in sides.values():
        side.send(None)


if __name__ == "__main__":
    main()
