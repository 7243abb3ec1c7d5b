"""`xlstm-hybrid serve`: an OpenAI-compatible server for a student."""

from typing import Annotated

import transformers
from typer import Argument, Option

from xlstm_hybrid.checkpoint.digests import require_intact
from xlstm_hybrid.conversion.load import DTYPES, load
from xlstm_hybrid.environment.devices import device_of
from xlstm_hybrid.environment.precision import dtype_for
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.modeling import XLSTMHybridForCausalLM

LEVELS = "debug", "info", "warning", "error"
LAST_SECONDS = 10  # that answers have once the server is told to stop


def serve(
    model: Annotated[str, Argument(help="Student: checkpoint directory or hub id.")],
    host: Annotated[str, Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    device: Annotated[str, Option(help="Where to run: auto, cpu, cuda, cuda:0.")] = "auto",
    dtype: Annotated[str, Option(help="Of the weights; auto: as stored, unless that is slow here.")] = "auto",
    max_rows: Annotated[int, Option(help="Requests that share decode steps.")] = 32,
    queue: Annotated[int, Option(help="Requests that wait beside them; one more gets status 429.")] = 64,
    served_model_name: Annotated[str | None, Option(help="How requests name the model; by default as MODEL.")] = None,
    seed: Annotated[int | None, Option(help="Of sampling: the n-th request has it plus n.")] = None,
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "warning",
):
    """Serve a student to many clients at once, with OpenAI's interface.

    Chat completions and completions, streamed or not; requests that run at the same time share decode steps.

    Example: xlstm-hybrid serve runs/tiny/student --port 8000
    """
    if log_level not in LEVELS:
        raise ConfigError(f"serve: --log-level {log_level}, expected one of {', '.join(LEVELS)}")
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"serve: --dtype {dtype}, expected one of auto, {', '.join(DTYPES)}")
    where = device_of(device)
    require_intact(model)
    import uvicorn  # with packages that not everybody has

    from xlstm_hybrid.serving.engine import Engine
    from xlstm_hybrid.serving.server import build_app

    dtype = dtype_for(where, None if dtype == "auto" else dtype, stored_dtype(model)) or "float32"
    student, tokenizer = load(model, dtype, device=where)
    if not isinstance(student, XLSTMHybridForCausalLM):
        raise ConfigError(
            f"serve: {model} is a model of type {student.config.model_type}, expected a student (xlstm_hybrid); "
            "others have `transformers serve`"
        )
    engine = Engine(student, tokenizer, max_rows=max_rows, queue=queue, seed=seed)
    settings = {"host": host, "port": port, "log_level": log_level, "timeout_graceful_shutdown": LAST_SECONDS}
    print(f"{model}: http://{host}:{port}/v1", flush=True)
    uvicorn.run(build_app(engine, served_model_name or model), **settings)


def stored_dtype(model):
    """Name of a checkpoint's dtype; None where its configuration does not say, or cannot be read."""
    try:
        found = transformers.AutoConfig.from_pretrained(model).dtype
    except (OSError, ValueError):
        return None
    return found and str(found).removeprefix("torch.")
