"""vLLM's engine in this process over tiny students, and what ours writes for the same prompts."""

import gc
import os

# before vllm is imported: no process of its own, quiet, and no other plugin
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ["VLLM_PLUGINS"] = "xlstm_hybrid"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # it would want a core for each process and one more

import torch
from conftest import enlarge
from tiny_teachers import WINDOWED, model_class, teacher_config
from vllm import LLM, SamplingParams

from xlstm_hybrid import XLSTMHybridForCausalLM

NEW = 16  # tokens that are written
GREEDY = {"temperature": 0, "ignore_eos": True, "detokenize": False}


def student(family="llama", kinds=None, teacher=None, **changes):
    """A student of three layers in float32 with large weights; the head dim is one that vLLM's attention knows. teacher:
    fields of its teacher's configuration.
    """
    if kinds == "mixed":
        kinds = ["hybrid_sliding", "full_attention", "sliding_attention" if family in WINDOWED else "hybrid_sliding"]
    chosen = {"sliding_window": 7, "num_sink_tokens": 2, "mlstm_context": 64, "mlstm_chunk_size": 8}
    fields = {"window": 5, "head_dim": 32, "max_position_embeddings": 256} | (teacher or {})
    large = enlarge(model_class(family)(teacher_config(family, **fields)))
    made = XLSTMHybridForCausalLM.from_teacher(large, layer_types=kinds, **(chosen | changes))
    return enlarge(made.float(), gain=2.0).eval()


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def ours(model, prompt, new=NEW):
    """Greedy tokens of our own `generate`, one row at a time."""
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()


class Engine:
    """vLLM over a student that is written to `folder`; the settings are vLLM's."""

    def __init__(self, model, folder, **settings):
        model.save_pretrained(folder)
        usual = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 32, "dtype": "float32"}
        usual |= {"kv_cache_memory_bytes": 2**26, "enable_prefix_caching": False}
        usual |= {"skip_tokenizer_init": True, "enforce_eager": True}
        self.llm = LLM(str(folder), **(usual | settings))
        self.engine, self.written = self.llm.llm_engine, {}

    @property
    def core(self):
        return self.engine.engine_core.engine_core

    @property
    def scheduler(self):
        return self.core.scheduler

    @property
    def runner(self):
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def free(self):
        """Slots and pages that no request holds."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def running(self):
        """Names of the requests that the runner, the first or the second, holds something of."""
        runner = self.runner
        return set(runner.req_states.req_id_to_index if hasattr(runner, "req_states") else runner.requests)

    def add(self, name, prompt, new=NEW):
        self.engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=new, **GREEDY))

    def step(self):
        for output in self.engine.step():
            self.written[output.request_id] = list(output.outputs[0].token_ids)

    def finish(self):
        """{name: tokens} of all requests, once none is left."""
        while self.engine.has_unfinished_requests():
            self.step()
        return self.written

    def write(self, texts, new=NEW):
        """Tokens for each of several prompts that come at once."""
        for j, prompt in enumerate(texts):
            self.add(str(j), prompt, new)
        self.finish()
        return [self.written.pop(str(j)) for j in range(len(texts))]

    def close(self):
        self.engine.engine_core.shutdown()
        del self.llm, self.engine
        gc.collect()
