"""What every test shares: offline, quiet, one thread, and a student whose weights are large enough for a broken state
to show.
"""

import copy
import functools
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports triton: the kernels' tests run in its interpreter, or else on the GPU
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--compatibility", metavar="NAME", help="leave a record of this run, see tests/compatibility.py")
    parser.addoption("--compatibility-folder", metavar="DIR", help="where")


def pytest_collection_modifyitems(items):
    import compatibility

    compatibility.mark(items)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    import compatibility

    compatibility.record(terminalreporter, exitstatus, config)


def enlarge(model, seed=0, gain=2.5):
    """Random weights of a scale at which every branch of every layer matters (logits of order 1 to 10)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (gain / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1.0))
    return model


def tiny_config(**changes):
    from xlstm_hybrid import XLSTMHybridConfig

    fields = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 7,
        "num_sink_tokens": 3,
        "mlstm_context": 64,
        "mlstm_chunk_size": 8,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return XLSTMHybridConfig(**(fields | changes))


def tiny_student(dtype=torch.float64, gain=2.5, **changes):
    from xlstm_hybrid import XLSTMHybridForCausalLM

    return enlarge(XLSTMHybridForCausalLM(tiny_config(**changes)).to(dtype), gain=gain).eval()


@torch.no_grad()
def assert_same_model(found, want, ids, **inputs):
    """Bit-equal weights under the same names, and bit-equal outputs once both lie in fresh memory.

    Weights that are mapped from a file lie anywhere, and on some CPUs the last bits of a matrix product depend on that.
    They depend on the shapes of its operands as well: in batches of two sizes a row is close to itself, not equal.
    """
    loaded, weights = found.state_dict(), want.state_dict()
    assert loaded.keys() == weights.keys()
    assert not [
        name for name, x in weights.items() if x.dtype != loaded[name].dtype or not torch.equal(x, loaded[name])
    ]
    found, want = (copy.deepcopy(model)(ids, **inputs)[0] for model in (found, want))
    assert torch.equal(found, want)


def token_ids(batch, length, vocab=61, seed=0):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student():
    return tiny_student()


@pytest.fixture
def rename_cache(monkeypatch):
    """A function: as if transformers had renamed the cache once more, it arrives at our forwards as `kv_store`.

    With `swallowed=True` nothing refuses the name: each step after the first sees its own token and an empty cache.
    """
    from xlstm_hybrid import DistilXLSTMForCausalLM, XLSTMHybridForCausalLM
    from xlstm_hybrid.distil_xlstm import modeling as distil
    from xlstm_hybrid.model import modeling
    from xlstm_hybrid.model.cache_names import CACHE

    def rename(swallowed):
        for module, cls in ((modeling, XLSTMHybridForCausalLM), (distil, DistilXLSTMForCausalLM)):
            original = cls.forward

            @functools.wraps(original)
            def forward(self, *args, original=original, **kwargs):
                return original(self, *args, kv_store=kwargs.pop(CACHE, None), **kwargs)

            monkeypatch.setattr(cls, "forward", forward)
            if swallowed:
                monkeypatch.setattr(module, "refuse_unknown", lambda *_: None)

    return rename
