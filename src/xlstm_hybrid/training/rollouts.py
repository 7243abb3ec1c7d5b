"""What an on-policy trainer writes and reads: sampling from a prompt read once, a replay buffer, the order of the
prompts.

Dims: B rows, T tokens, n completions per prompt. Everything random here is drawn from seeds of its own and leaves the
global state alone, so that a resumed run draws what the uninterrupted one did.
"""

import contextlib
import hashlib
from collections import deque

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl.trainer.utils import RepeatSampler

from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.model.generation_checks import stock_settings
from xlstm_hybrid.state import fork, prefill


def seed_from(*parts):
    """A seed from anything that prints the same in another process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def seeded(seed, device):
    """The global random states of the CPU and of `device` start at `seed` inside, and are outside what they were."""
    cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if cpu else [device], device_type="cuda" if cpu else device.type):
        torch.default_generator.manual_seed(seed)
        if not cpu:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)
        yield


def pad(rows, value, left=False, width=0):
    """[B, T] of lists, filled with `value`; T is `width` or what the longest needs."""
    width = max(width, *map(len, rows))
    filling = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([fill + row if left else row + fill for fill, row in zip(filling, rows, strict=True)])


@torch.no_grad()
def sample_completions(model, prompts, n, generation_config, seed, piece=None, width=0, synced=False):
    """n completions of each prompt, in order: each prompt is read once and its state forked n ways.

    The model writes in eval mode, without dropout and gradient checkpointing, by `generation_config` alone: its own
    generation settings, penalties and shortest lengths have no part. The global random state is left as it was.

    Args:
        prompts: lists of ids, of any lengths above 0.
        generation_config: with `pad_token_id` and `eos_token_id`.
        seed: the same seed, weights and prompts give the same completions.
        piece: as in `state.prefill`.
        width: at least so many columns, padding included.
        synced: other processes sample at the same time from a model that is sharded over them, with the same `width`.
    Returns:
        Lists of ids, each up to and with its first EOS; at least one token each.
    """
    device = model.device
    ids = pad(prompts, generation_config.pad_token_id, left=True, width=width).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=True, width=width).to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)  # of real tokens, as `generate` counts them
    with stock_settings(model):
        cache = None
        if ids.shape[1] > 1:  # the last token is left to `generate`, which needs its logits
            cache = fork(prefill(model, ids[:, :-1], mask[:, :-1], piece=piece, position_ids=positions[:, :-1]), n)
        with seeded(seed, device):
            inputs = {"input_ids": ids.repeat_interleave(n, 0), "attention_mask": mask.repeat_interleave(n, 0)}
            out = model.generate(**inputs, **named(cache), generation_config=generation_config, synced_gpus=synced)
    return [until_eos(row, generation_config.eos_token_id) for row in out[:, ids.shape[1] :].tolist()]


def until_eos(ids, eos):
    """`ids` up to and with the first end; what follows it is padding, even where the pad token is an end itself."""
    eos = {eos} if isinstance(eos, int) else set(eos or ())
    end = next((t for t, id in enumerate(ids) if id in eos), len(ids))
    return ids[: end + 1]


class ReplayBuffer(TrainerCallback, ExportableState):
    """The student's last `size` completions, of all processes. `trainer_state.json` has them for a resumed run."""

    def __init__(self, size):
        self.rows, self.saved = deque(maxlen=size), []

    def state(self):
        return {"args": {"size": self.rows.maxlen}, "attributes": {"saved": [list(row) for row in self.rows]}}

    def on_train_begin(self, args, state, control, **kwargs):
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if stored is not None:
            self.rows.clear()
            self.rows.extend(tuple(row) for row in stored["attributes"]["saved"])

    def add(self, pairs):
        """`(prompt ids, completion ids, number of its teacher)` of this process; all processes come to hold the same."""
        self.rows.extend(tuple(pair) for pair in gather_object(pairs))

    def draw(self, generator, n):
        return generator.choices(self.rows, k=n)


class PromptSampler(RepeatSampler):
    """Order of the prompts by seed and epoch: TRL's counts epochs of this process, anew in a resumed run."""

    def set_epoch(self, epoch):
        if self.shuffle:
            self.generator.manual_seed(seed_from(self.seed, epoch))
