"""The HTTP side: OpenAI's chat completions and completions, whole or as server-sent events, over an `Engine`."""

import asyncio
import contextlib
import copy
import inspect
import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field, FiniteFloat, Json, model_validator
from starlette.exceptions import HTTPException
from transformers import GenerationConfig, PreTrainedTokenizerBase

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.serving.engine import EngineFull, EngineStops

# --- what a request may say ----------------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1)]
Zero = Annotated[float, Field(ge=0, le=0)]  # what clients send that send every field
PENALTY = "expected 0: this penalty is not supported, leave it out or send repetition_penalty"
LIMITS = {  # {field: what is said of a value that it does not take}
    "content": "expected text, or parts of type text: images, audio and files are not supported, leave them out",
    "prompt": "expected one text: lists and token ids are not supported, send one request per prompt, as text",
    "n": "expected 1: several answers are not supported, send several requests",
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
}


class Named(BaseModel, extra="forbid"):
    """A JSON object of whose fields all are named here; null is for a field that was not sent."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data):
        return {name: x for name, x in data.items() if x is not None} if isinstance(data, dict) else data


class Body(Named):
    """What both kinds of requests share. What is not named here is refused."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[int, FiniteFloat] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    generation_config: Json[dict[str, Any]] | None = None  # transformers' own, as JSON: `transformers chat` sends it
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None

    def settings(self, model, tokens):
        """The GenerationConfig: that of the checkpoint, or the request's own, with what else the request says."""
        if self.stream_options and not self.stream:
            raise ConfigError("stream_options: expected beside stream=true only; leave them out")
        settings = copy.deepcopy(model.generation_config)
        if self.generation_config is not None:
            settings = config_of(self.generation_config)
        if self.temperature is not None:
            settings.do_sample = self.temperature > 0
            settings.temperature = self.temperature or None
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                setattr(settings, name, value)
        if self.logit_bias:
            settings.sequence_bias = {(token,): bias for token, bias in self.logit_bias.items()}
        if tokens is not None:
            settings.max_new_tokens = tokens
        return settings

    def stops(self):
        """The strings that end the answer."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


def config_of(fields):
    """The GenerationConfig of a dict; ConfigError for fields that it does not have, or values that it refuses."""
    unknown = sorted(fields.keys() - vars(GenerationConfig()).keys() - {"transformers_version"})
    if unknown:
        raise ConfigError(
            f"generation_config: expected fields of transformers' GenerationConfig, found {', '.join(unknown)}"
        )
    try:
        return GenerationConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_config: {error}") from error


class TextPart(Named):
    type: Literal["text"]
    text: str


# what `chat_template_kwargs` may not name: how the prompt is made of the checkpoint's template is the server's matter
OF_THE_TOKENIZER = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    *("self", "tools", "documents", "add_generation_prompt", "continue_final_message", "kwargs")
}


class Message(Named):
    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self):
        """As a dict whose content is one text."""
        text = self.content if isinstance(self.content, str) else " ".join(part.text for part in self.content)
        return self.model_dump(exclude_none=True) | {"content": text}


class ChatBody(Body):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    chat_template_kwargs: dict = {}

    kind: ClassVar = "chat.completion"
    chunk: ClassVar = "chat.completion.chunk"

    def prompt_ids(self, tokenizer):
        if tokenizer.chat_template is None:
            raise ConfigError(
                "the checkpoint's tokenizer has no chat template: pass a prompt to /v1/completions instead"
            )
        if wrong := sorted(OF_THE_TOKENIZER & self.chat_template_kwargs.keys()):
            raise ConfigError(
                f"chat_template_kwargs: expected variables of the checkpoint's chat template, found {', '.join(wrong)}: leave them out"
            )
        options = {"add_generation_prompt": True} | self.chat_template_kwargs | {"tokenize": True, "return_dict": True}
        try:
            return tokenizer.apply_chat_template([message.plain() for message in self.messages], **options)["input_ids"]
        except Exception as error:  # a template is a program
            raise ConfigError(f"messages: expected what the checkpoint's chat template takes ({error})") from error

    def tokens(self):
        if self.max_completion_tokens and self.max_tokens:
            raise ConfigError("max_tokens and max_completion_tokens mean the same: expected one of them")
        return self.max_completion_tokens or self.max_tokens

    @staticmethod
    def choice(text, reason):
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}

    @staticmethod
    def delta(text, reason, first):
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})
        return {"index": 0, "delta": delta, "finish_reason": reason}


class CompletionBody(Body):
    """Of `/v1/completions`."""

    prompt: str

    kind: ClassVar = "text_completion"
    chunk: ClassVar = kind

    def prompt_ids(self, tokenizer):
        try:
            return tokenizer(self.prompt)["input_ids"]
        except (TypeError, UnicodeError) as error:
            raise ConfigError(f"prompt: expected text, without halves of surrogate pairs ({error})") from error

    def tokens(self):
        return self.max_tokens

    @staticmethod
    def choice(text, reason):
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}

    @staticmethod
    def delta(text, reason, first):
        return {"index": 0, "text": text, "finish_reason": reason}


# --- answers -------------------------------------------------------------------------------------------------------


def failure(status, message, kind="invalid_request_error", headers=None, **more):
    """An error as OpenAI's clients read it."""
    return JSONResponse({"error": {"message": message, "type": kind, "code": status, **more}}, status, headers)


class Answer:
    """A request in the engine, seen from the event loop: its pieces of text arrive in a queue."""

    def __init__(self, engine, name, body, ids):
        self.engine, self.body, self.pieces = engine, body, asyncio.Queue()
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        loop = asyncio.get_running_loop()

        def deliver(*piece):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

        self.request = engine.submit(ids, body.settings(engine.model, body.tokens()), deliver, body.stops(), body.seed)

    async def __aiter__(self):
        """`(text, reason)` up to a reason; whoever stops listening cancels."""
        reason = None
        try:
            while reason is None:
                text, reason = await self.pieces.get()
                yield text, reason
        finally:
            if reason is None:
                self.engine.cancel(self.request)

    def usage(self):
        prompt, new = self.request.prompt, len(self.request.tokens) - self.request.prompt
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def whole(self):
        pieces = [piece async for piece in self]
        text, reason = "".join(text for text, _ in pieces), pieces[-1][1]
        if reason == "error":
            return failure(500, "the answer failed, the server's log says why", "server_error")
        choices = [self.body.choice(text, reason)]
        return JSONResponse(self.head | {"object": self.body.kind, "choices": choices, "usage": self.usage()})

    async def events(self):
        """Server-sent events; the last but the end mark has the usage if `stream_options` ask for it."""
        head, first = self.head | {"object": self.body.chunk}, True
        async for piece, reason in self:
            if reason == "error":
                error = {"message": "the answer failed, the server's log says why", "type": "server_error", "code": 500}
                yield f"data: {json.dumps({'error': error})}\n\n"
                return
            yield f"data: {json.dumps(head | {'choices': [self.body.delta(piece, reason, first)]})}\n\n"
            first = False
        if (self.body.stream_options or {}).get("include_usage"):
            yield f"data: {json.dumps(head | {'choices': [], 'usage': self.usage()})}\n\n"
        yield "data: [DONE]\n\n"


async def unless_gone(http, answer):
    """What `answer`, a coroutine, returns; it is cancelled when the client hangs up, and there is nothing to return, and when
    the server ends before it does.
    """

    async def hung_up():
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else PlainTextResponse("", 499)
    except asyncio.CancelledError:  # it has had its time, and the connection is open
        return failure(503, "the server stops before the answer is complete: ask again", "server_error")
    finally:
        for task in tasks:
            task.cancel()


# --- the application -----------------------------------------------------------------------------------------------

HELP = {  # of the metrics: {name: (kind, what it counts)}
    "rows": ("gauge", "Requests that share decode steps, or are being read."),
    "rows_limit": ("gauge", "--max-rows."),
    "queue": ("gauge", "Requests that wait."),
    "queue_limit": ("gauge", "--queue."),
    "requests": ("counter", "Requests that were accepted."),
    "prompt_tokens": ("counter", "Tokens of their prompts."),
    "generated_tokens": ("counter", "Tokens of their answers."),
    "steps": ("counter", "Decode steps, each of one token for every row."),
    "request_seconds": ("counter", "Time that ended requests took, queue included."),
    "first_token_seconds": ("counter", "Time until first tokens, queue included."),
    "first_tokens": ("counter", "First tokens."),
}


def prometheus(engine):
    """The metrics in Prometheus' text format."""
    values, lines = engine.metrics(), []
    for name, (kind, text) in HELP.items():
        full = f"xlstm_hybrid_{name}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {values[name]}"]
    full = "xlstm_hybrid_finished_total"
    lines += [f"# HELP {full} Requests by how they ended.", f"# TYPE {full} counter"]
    lines += [f'{full}{{reason="{reason}"}} {count}' for reason, count in engine.finished.items()]
    return "\n".join(lines) + "\n"


def build_app(engine, name):
    """The application that answers for `engine`, whose model requests call `name`; it starts and stops the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_):
        engine.start()
        yield
        engine.stop()

    app, born = FastAPI(title="xlstm-hybrid", lifespan=lifespan), int(time.time())

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error):
        first = error.errors()[0]
        no_json = first["type"] == "json_invalid" and isinstance(first["loc"][-1], int)  # at which character
        if no_json or len(first["loc"]) == 1:
            found = first.get("ctx", {}).get("error", first["msg"])
            return failure(400, f"expected a JSON object, content-type: application/json ({found})")
        path = [str(part) for part in first["loc"][1:]]
        if first["type"] != "missing" and (field := next((part for part in path if part in LIMITS), None)):
            where = ".".join(path[: path.index(field) + 1])
            return failure(400, f"{where}: {LIMITS[field]}", param=where)
        where = ".".join(path)
        accepted = ", ".join({**ChatBody.model_fields, **CompletionBody.model_fields})
        unknown = f"not supported, leave it out; accepted are {accepted}"
        said = unknown if first["type"] == "extra_forbidden" and "." not in where else first["msg"]
        return failure(400, f"{where}: {said}", param=where)

    @app.exception_handler(HTTPException)
    async def elsewhere(_, error):
        return failure(error.status_code, error.detail, headers=error.headers)

    @app.exception_handler(ConfigError)
    async def wrong(_, error):
        return failure(400, str(error))

    @app.exception_handler(EngineFull)
    async def full(_, error):
        headers = {"Retry-After": str(engine.retry_after())}
        return failure(429, str(error), "rate_limit_error", headers, limit=engine.max_rows, queue=engine.queue)

    @app.exception_handler(EngineStops)
    async def stops(_, error):
        return failure(503, str(error), "server_error")

    async def answer(http, body):
        if body.model not in (None, name):
            return failure(404, f"model {body.model!r}: this server has {name!r}", param="model")
        ids = await asyncio.to_thread(body.prompt_ids, engine.tokenizer)  # a long prompt takes seconds
        if await http.is_disconnected():  # nothing is read for it
            return PlainTextResponse("", 499)
        found = Answer(engine, name, body, ids)
        if body.stream:
            return StreamingResponse(found.events(), media_type="text/event-stream")
        return await unless_gone(http, found.whole())

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request, body: ChatBody):
        return await answer(http, body)

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionBody):
        return await answer(http, body)

    @app.get("/v1/models")
    async def models():
        entry = {"id": name, "object": "model", "created": born, "owned_by": "local"}
        return {"object": "list", "data": [entry]}

    @app.post("/load_model")
    async def load_model():
        """`transformers chat` asks for it before the first question: the model is there."""
        ready = json.dumps({"status": "ready", "model": name, "cached": True})
        return PlainTextResponse(f"data: {ready}\n\n", media_type="text/event-stream")

    @app.get("/health")
    async def health():
        alive = engine.thread is not None and engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(prometheus(engine), media_type="text/plain; version=0.0.4")

    return app
