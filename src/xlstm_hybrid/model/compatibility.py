"""Whether a transformers that is newer than the tested ones runs our models right: checked once, remembered on disk.

Names of arguments have moved between two versions, and every generated text was wrong without an error. So the first
load or generation of a process on a newer version generates with a tiny model in every way that users take, and
compares with calls without a cache (see `generation_checks`). The verdict holds for the versions and our sources. This module
knows no model: the class that asks is handed in.
"""

import os
import threading
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from torch.torch_version import TorchVersion
from xlstm_kernels.backends.verified import SOURCES, digest_of, file_of, read_verdicts, save_verdict

from xlstm_hybrid.environment.versions import PACKAGES
from xlstm_hybrid.errors import CompatibilityError, CompatibilityWarning, ConfigError
from xlstm_hybrid.model.configuration import LINEAR, LINEAR_ATTENTION, LINEAR_SIZES
from xlstm_hybrid.model.generation_checks import EVERY_MODEL, bound, difference

NEWEST_TRANSFORMERS = PACKAGES["transformers"].newest  # on which all tests pass
SWITCH = "XLSTM_HYBRID_SELF_CHECK"  # 0 leaves the check out; 1 makes it, whatever the version and what is remembered
ANSWERS = {}  # model type -> None, or why its models may not run; of this process
RUNNING, LOCK = set(), threading.RLock()  # types under check
LAYERS = 3
SHARED = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "mlstm_context": 64, "mlstm_chunk_size": 8}
HYBRID = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 7, "num_sink_tokens": 2}
HYBRID |= {"layer_types": ["hybrid_sliding", "full_attention", "sliding_attention"], "teacher_sliding_window": 5}
HYBRID |= {"teacher_layer_types": ["full_attention", "full_attention", "sliding_attention"]}
RECURRENT = {"num_hidden_layers": 2, "block_pattern": ["mlstm", "slstm"], "slstm_intermediate_size": 32}
# A tiny model of each type, with every kind of layer that it can have
TINY = {"xlstm_hybrid": SHARED | HYBRID | {"num_hidden_layers": LAYERS}, "distil_xlstm": SHARED | RECURRENT}
# and one for each of transformers' modules of linear attention: a student without such layers asks for none of them
BESIDE = {"layer_types": [LINEAR, "hybrid_sliding", LINEAR], "teacher_layer_types": [LINEAR, "full_attention", LINEAR]}
BESIDE |= dict.fromkeys(LINEAR_SIZES, 4) | {"linear_num_key_heads": 2}
WITH_LINEAR = {name: f"xlstm_hybrid with {name}" for name in LINEAR_ATTENTION}
TINY |= {
    kind: TINY["xlstm_hybrid"] | BESIDE | {"linear_attention": name, "teacher_sliding_window": None}
    for name, kind in WITH_LINEAR.items()
}
TOKENS = 16  # of a prompt: the windows wrap
ALLOWED = dict.fromkeys(TINY, bound(torch.float64, LAYERS))
ALLOWED |= dict.fromkeys(WITH_LINEAR.values(), bound(torch.float32, LAYERS))  # see `generation_checks.bound_of`


def dependencies():
    """What a verdict depends on: versions and our sources, in a checkpoint that carries its code those beside it."""
    sources = "-".join(digest_of(folder) for folder in dict.fromkeys((Path(__file__).parent, SOURCES)))
    return {"transformers": transformers.__version__, "torch": torch.__version__, "sources": sources}


def ensure_compatible(cls, linear=None):
    """Return if transformers runs models of a class right, as far as is known or can be seen at once.

    Args:
        cls: a causal language model of ours, with its `config_class`.
        linear: the `linear_attention` of a model's configuration: one with such layers is meant.
    Raises:
        CompatibilityError: it does not.
        ConfigError: the environment variable `SWITCH` has no meaning.
    """
    kind = cls.config_class.model_type if linear is None else WITH_LINEAR[linear]
    if kind in ANSWERS and ANSWERS[kind] is None:
        return
    with LOCK:
        if kind in RUNNING:  # the check itself asks
            return
        if kind not in ANSWERS:
            RUNNING.add(kind)
            try:
                ANSWERS[kind] = answer(cls, kind)
            finally:
                RUNNING.remove(kind)
        if ANSWERS[kind] is not None:
            raise CompatibilityError(ANSWERS[kind])


def answer(cls, kind):
    """Why models of a type may not run, or None."""
    switch, installed = os.environ.get(SWITCH) or None, transformers.__version__
    newer = TorchVersion(installed) > NEWEST_TRANSFORMERS
    if switch not in (None, "0", "1"):
        raise ConfigError(f"{SWITCH}={switch!r}: expected 0 (no check), 1 (a check on every version), or nothing")
    if switch == "0" and newer:
        warnings.warn(
            f"{SWITCH}=0: transformers {installed} is newer than {NEWEST_TRANSFORMERS}, the newest tested with this "
            "xlstm-hybrid, and is not checked; generated text may be wrong. `xlstm-hybrid verify MODEL` checks a model",
            CompatibilityWarning,
            stacklevel=4,
        )
    if switch == "0" or not (newer or switch == "1"):
        return None
    path = file_of(dependencies(), f"transformers-{installed}")
    verdict = None if switch == "1" else read_verdicts(path).get(kind)
    if verdict is None:
        verdict = check_tiny_model(cls, kind)
        save_verdict(path, kind, verdict, dependencies())
    if verdict["right"]:
        return None
    wrong = {name: float(f"{error:.2g}") for name, error in verdict["errors"].items() if not error <= ALLOWED[kind]}
    return (
        f"transformers {transformers.__version__} with torch {torch.__version__} runs {kind} models otherwise than "
        f"this version of xlstm-hybrid expects: of a tiny model, {wrong} differ where {ALLOWED[kind]:.1g} is allowed ("
        "standard deviations of the logits, against calls without a cache). Generated text would be wrong: pip install "
        f"'transformers<={NEWEST_TRANSFORMERS}', the newest tested, or a newer xlstm-hybrid. The verdict is kept in "
        f"{path.name} in the cache folder (XLSTM_KERNELS_CACHE); {SWITCH}=1 checks again, {SWITCH}=0 goes on without"
    )


def check_tiny_model(cls, kind):
    """{"right": bool, "errors": {check: difference}} of the checks that every model passes.

    Raises:
        CompatibilityError: a check does not run to its end; that is no verdict to be remembered.
    """
    errors, name = {}, "a tiny model"
    try:
        with undisturbed():
            model = tiny_model(cls, kind)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(1, model.config.vocab_size, (2, TOKENS), generator=generator)
            for name, check in EVERY_MODEL.items():
                differences = [difference(got, want) for got, want in check(model, ids)]
                errors[name] = max(differences, key=lambda x: float("inf") if x != x else x)
    except Exception as error:  # whatever has moved
        raise CompatibilityError(
            f"transformers {transformers.__version__} cannot run {kind} models of this version of xlstm-hybrid: {name}"
            f": {type(error).__name__}: {error}. pip install 'transformers<={NEWEST_TRANSFORMERS}', the newest tested, "
            f"or a newer xlstm-hybrid; {SWITCH}=0 goes on without a check"
        ) from error
    return {"right": all(error <= ALLOWED[kind] for error in errors.values()), "errors": errors}


@contextmanager
def undisturbed():
    """On the CPU in float32, without gradients and warnings; all that is global is as it was afterwards."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def tiny_model(cls, kind):
    """A float64 model with weights so large that a state which is lost shows in every logit."""
    model, generator = cls(cls.config_class(**TINY[kind])).double().eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        scale = 2.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return model
