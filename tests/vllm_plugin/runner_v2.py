"""`pytest -p runner_v2`: the tests with vLLM's second model runner, on a CPU.

It refuses to start there, as Triton has no backend for CPUs (`VllmConfig._validate_v2_model_runner`). Its kernels run in
Triton's interpreter, once vLLM has been told of a backend that is never asked for anything.
"""

import os
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")  # before triton and vllm are imported

import torch  # noqa: F401, Triton looks for it
from triton.backends import backends


class Driver:
    @staticmethod
    def is_active():
        return True


backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)
