"""The scheduler: one thread in which all requests share a model's decode steps.

A request waits, is read in pieces into a cache of its own, joins the running rows, and leaves them with its last token or
when it is cancelled. Between two decode steps about one piece of prompts is read, by turns of the oldest prompt and of the
one that is nearest to its end, so that a long prompt holds up nobody and many short ones do not keep it waiting.
"""

import logging
import threading
import time
from collections import deque

import torch
from transformers.cache_utils import DynamicCache

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.serving.request import Request
from xlstm_hybrid.serving.rows import Rows

log = logging.getLogger(__name__)
REASONS = "stop", "length", "cancelled", "error", "refused"  # how a request may end
COUNTS = (
    "requests",
    "prompt_tokens",
    "generated_tokens",
    "steps",
    "request_seconds",
    "first_token_seconds",
    "first_tokens",
)


class EngineFull(Exception):
    """As many requests run and wait as may."""


class EngineStops(Exception):
    """The engine takes no more requests."""


class Engine:
    """Continuous batching of one student.

    max_rows: requests that share a step.  queue: requests that wait beside them; one more is refused.
    piece: tokens of prompts that are read between two steps, and at once.
    active: requests that wait, are read or run.  finished: {reason: number of requests}.  counts: see `metrics`.
    """

    def __init__(self, model, tokenizer, max_rows=32, queue=64, piece=512, seed=None):
        for name, value, least in (("max_rows", max_rows, 1), ("queue", queue, 0), ("piece", piece, 1)):
            if value < least:
                raise ConfigError(f"serve: {name}={value}, expected at least {least}")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"serve: {type(tokenizer).__name__} is written in Python, expected a fast tokenizer, which decodes token by token; "
                "save the checkpoint with one (a tokenizer.json)"
            )
        self.model, self.tokenizer, self.rows = model, tokenizer, Rows(model)
        self.max_rows, self.queue, self.piece = max_rows, queue, piece
        self.seed = torch.seed() if seed is None else seed
        self.waiting, self.reading, self.running, self.oldest = deque(), [], [], False
        self.active, self.counts = 0, dict.fromkeys(COUNTS, 0)
        self.finished = dict.fromkeys(REASONS, 0)
        self.changed, self.stopping, self.thread = threading.Condition(), False, None

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self):
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def stop(self):
        """End the thread; what has not been answered ends with "error"."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, ids, settings, deliver, stop=(), seed=None):
        """Let a prompt (a list of ids) be answered; returns its `Request`, whose arguments these are. Without a seed the
        n-th request has the engine's plus n.

        Raises:
            EngineFull: `max_rows` + `queue` requests are there.
            EngineStops: `stop` was called.
            ConfigError: see `Request`.
        """
        with self.changed:
            self.refuse_if_full()
            number = self.counts["requests"]
        seed = (self.seed + number) % 2**63 if seed is None else seed
        request = Request(self.model, self.tokenizer, ids, settings, deliver, stop, seed)
        with self.changed:
            self.refuse_if_full()  # others may have come meanwhile
            request.came = time.monotonic()
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += request.prompt
            self.active += 1
            self.waiting.append(request)
            self.changed.notify()
        return request

    def refuse_if_full(self):
        if self.stopping:
            raise EngineStops("the server is about to stop and takes no more requests; ask another one")
        if self.active >= self.max_rows + self.queue:
            self.finished["refused"] += 1
            raise EngineFull(
                f"{self.active} requests run or wait, which is the limit: {self.max_rows} rows (--max-rows) and a queue of {self.queue} (--queue); "
                "come again later"
            )

    def cancel(self, request):
        """Answer a request no further: its place in the queue is free at once, its row before the next step."""
        with self.changed:
            request.cancelled = True
            waited = request in self.waiting
            if waited:
                self.waiting.remove(request)
        if waited:
            self.finish(request, "cancelled")

    def metrics(self):
        """`{name: number}` of now and of all that was done."""
        with self.changed:
            now = {"rows": len(self.running) + len(self.reading), "queue": len(self.waiting)}
            return now | {"rows_limit": self.max_rows, "queue_limit": self.queue} | self.counts

    def retry_after(self):
        """Whole seconds until a place should be free: what a request has taken so far, shared by the rows."""
        ended = sum(self.finished.values()) - self.finished["refused"]
        return max(1, round(self.counts["request_seconds"] / max(ended, 1) / self.max_rows))

    # --- in the engine's thread ------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self):
        while self.wait():
            try:
                self.leave(["cancelled" if request.cancelled else None for request in self.running])
                self.read()
                self.step()
            except Exception:
                log.exception("a step of %d rows failed; their requests end", len(self.running))
                self.fail(self.running)
                self.running, self.rows = [], Rows(self.model)
        with self.changed:  # who cancels meanwhile finds nothing to take back
            left = [*self.running, *self.reading, *self.waiting]
            self.waiting.clear()
        self.fail(left)

    def fail(self, requests):
        for request in requests:
            self.finish(request, "error")

    def wait(self):
        """Sleep until there is something to do; False once the engine is to stop."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping or self.waiting or self.reading or self.running)
            return not self.stopping

    def next_request(self, joining):
        """The request whose prompt is to be read on, or None; `joining` rows are taken beside those that run."""
        with self.changed:
            while self.waiting and len(self.running) + joining + len(self.reading) < self.max_rows:
                self.reading.append(self.waiting.popleft())
        self.oldest = not self.oldest
        return min(self.reading, key=lambda request: 0 if self.oldest else request.prompt - request.read, default=None)

    def read(self):
        """Read up to a piece of prompts; those that end in it get their first token, and a row."""
        budget, joining = self.piece, []
        for request in [request for request in self.reading if request.cancelled]:
            self.reading.remove(request)
            self.finish(request, "cancelled")
        while budget > 0 and (request := self.next_request(len(joining))):
            ids = request.tokens[request.read : request.read + self.piece]  # cut alike, whoever else is there
            budget -= len(ids)
            try:
                logits = self.read_piece(request, ids)
            except Exception:
                log.exception("a prompt of %d tokens could not be read", request.prompt)
                self.reading.remove(request)
                self.finish(request, "error")
                continue
            if request.read == request.prompt:
                self.reading.remove(request)
                reason = self.follow([request], logits)[0]
                joining += [] if reason else [request]
                if reason:
                    self.finish(request, reason)
        if joining:
            with self.changed:
                self.running = self.running + joining
            self.rows.join([request.cache for request in joining])
            for request in joining:
                request.cache = None

    def read_piece(self, request, ids):
        """Logits [1, vocabulary] after some more tokens of a prompt."""
        if request.cache is None:
            request.cache = DynamicCache(config=self.model.config)
        inputs = torch.tensor([ids], device=self.model.device)
        logits = self.model(inputs, use_cache=True, logits_to_keep=1, **named(request.cache)).logits
        request.read += len(ids)
        return logits[:, -1]

    def step(self):
        """One more token of every row."""
        if self.running:
            logits = self.rows.step([request.tokens[-1] for request in self.running])
            self.counts["steps"] += 1
            self.leave(self.follow(self.running, logits))

    def follow(self, requests, logits):
        """Give each request the token that follows by its row of `logits`; returns why each ends with it, or None."""
        likeliest, reasons = logits.argmax(-1).tolist(), []
        for row, request in enumerate(requests):
            try:
                token = likeliest[row] if request.greedy else request.choose(logits[row])
                reasons.append(request.take(token))
            except Exception:
                log.exception("a request's next token could not be chosen")
                reasons.append("error")
            self.counts["generated_tokens"] += 1
            if len(request.tokens) == request.prompt + 1:
                self.counts["first_token_seconds"] += time.monotonic() - request.came
                self.counts["first_tokens"] += 1
        return reasons

    def leave(self, reasons):
        """Let the rows go whose requests end; `reasons` has one for each of them, or None."""
        if not any(reasons):
            return
        ended = [(request, reason) for request, reason in zip(self.running, reasons, strict=True) if reason]
        self.rows.keep([row for row, reason in enumerate(reasons) if reason is None])
        with self.changed:
            self.running = [request for request, reason in zip(self.running, reasons, strict=True) if reason is None]
        for request, reason in ended:
            self.finish(request, reason)

    def finish(self, request, reason):
        """Count a request that has ended, and tell whoever waits for it: what it took is free by then."""
        with self.changed:
            self.active -= 1
            self.finished[reason] += 1
            self.counts["request_seconds"] += time.monotonic() - request.came
        request.deliver(request.last, reason)
