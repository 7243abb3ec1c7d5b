"""The checks of `verify`: each yields pairs of hidden states that have to agree, computed in two ways from random
tokens.

Dims: B rows, T tokens, D hidden size.
"""

import copy
import itertools
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from xlstm_kernels import MLSTMState

from xlstm_hybrid.errors import CheckpointError
from xlstm_hybrid.model.cache import HybridCacheLayer
from xlstm_hybrid.model.cache_names import named
from xlstm_hybrid.state import fork, load_state, prefill, remember, rollback, save_state, snapshot

POSITIONS = 64  # of a row, at which logits are compared
PAD = 5  # padding columns of a check


class Subject:
    """A model, random tokens for it, and ways to read them.

    ids: [3, T] without padding tokens.
    """

    def __init__(self, model, length, seed=0):
        self.model, self.config = model, model.config
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.config.vocab_size, (3, length), generator=generator)
        self.ids, self.T = torch.where(ids == (self.config.pad_token_id or 0), 1, ids).to(model.device), length
        self.filler = self.ids[:1, :1].expand(1, PAD)

    def cache(self):
        return DynamicCache(config=self.config)

    def read(self, ids, mask=None, cache=None, **kwargs):
        """Hidden states [B, T, D] of one forward call."""
        kwargs = {"use_cache": cache is not None} | kwargs
        return self.model.get_decoder()(ids, attention_mask=mask, **named(cache), **kwargs).last_hidden_state

    def in_pieces(self, ids, sizes, mask=None, cache=None):
        """The same in several calls; sizes end with the tokens."""
        cache, done, parts = cache or self.cache(), 0, []
        for n in sizes:
            part = ids[:, done : done + n]
            if part.shape[1]:
                parts.append(self.read(part, None if mask is None else mask[:, : done + n], cache))
            done += n
        assert done >= ids.shape[1]
        return torch.cat(parts, 1)

    def difference(self, got, want):
        """Largest difference of the logits in units of their standard deviation."""
        if got.shape != want.shape:
            raise ValueError(f"hidden states {list(got.shape)}, expected {list(want.shape)}")
        T = want.shape[1]
        at = torch.unique(torch.linspace(0, T - 1, min(T, POSITIONS)).round().long()).to(want.device)
        head = self.model.get_output_embeddings()
        got, want = (head(x[:, at].to(head.weight.dtype)).double() for x in (got, want))
        return ((got - want).abs().max() / want.std()).item()


def chunkwise(s):
    """One chunk holds all tokens: the parallel form."""
    want, before = s.read(s.ids[:2]), s.config.mlstm_chunk_size
    try:
        for size in (s.T, 16, 5):
            s.config.mlstm_chunk_size = size
            yield s.read(s.ids[:2]), want
    finally:
        s.config.mlstm_chunk_size = before


def chunked_prefill(s):
    want, window = s.read(s.ids[:2]), s.config.sliding_window or 8
    for sizes in ([s.T // 2, s.T], [1, 3, *[7] * s.T], [*[max(window - 1, 1)] * (s.T // max(window - 1, 1)), s.T]):
        yield s.in_pieces(s.ids[:2], sizes), want


def cached(s):
    """A prompt, then tokens one by one: what generation does."""
    for begin in (1, s.T // 2, s.T - 3):
        yield s.in_pieces(s.ids[:2], [begin, *[1] * min(s.T - begin, 12), s.T]), s.read(s.ids[:2])


def padded(s, side, beside):
    """Padding columns in one row, alone in its batch or beside a row without them: at once, in pieces, token by token
    at the end.

    Right padding shows only in what comes after it: tokens that follow in later calls.
    """
    n = s.T - PAD
    cut = {"left": 0, "right": n - 4, "inside": n // 2}[side]
    row, want = s.ids[:1, :n], s.read(s.ids[:1, :n])
    batch, mask = torch.cat([row[:, :cut], s.filler, row[:, cut:]], 1), s.ids.new_ones(1, s.T)
    mask[:, cut : cut + PAD] = 0
    real = mask[0].bool()
    if beside:
        batch, mask = torch.cat([s.ids[1:2], batch]), torch.cat([torch.ones_like(mask), mask])
    if side == "right":
        end = cut + PAD
        yield s.read(batch[:, :end], mask[:, :end])[-1:, :cut], want[:, :cut]
        several = ([end, 1, 1, 1, 1], [3, end - 3, 4])
    else:
        yield s.read(batch, mask)[-1:, real], want
        several = ([s.T], [3, s.T // 2, s.T], [s.T - PAD - 3, *[1] * (PAD + 3)])
    for sizes in several:
        yield s.in_pieces(batch, sizes, mask)[-1:, real], want


def packed(s):
    lengths = [1, s.T // 3, 2, 1, s.T - s.T // 3 - 4]
    row, ends = s.ids[:1], [0, *itertools.accumulate(lengths)]
    want = torch.cat([s.read(row[:, a:b]) for a, b in itertools.pairwise(ends)], 1)
    restarts = torch.cat([torch.arange(n) for n in lengths])[None].to(row.device)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(row.device)
    ends = torch.tensor(ends, dtype=torch.int32, device=row.device)
    told = {"position_ids": restarts}, {"cu_seq_lens_q": ends}, {"seq_idx": number}
    for how, use_cache in itertools.product(told, (False, True)):
        yield s.read(row, use_cache=use_cache, **how), want
    yield s.read(row.expand(2, -1), position_ids=restarts.expand(2, -1)), want.expand(2, -1, -1)


def reordered(s):
    """Beams: rows change places, one disappears, one is there twice."""
    begin, order = s.T // 2, torch.tensor([2, 0, 0])
    cache = s.cache()
    s.in_pieces(s.ids[:, :begin], [begin - 2, 1, 1], cache=cache)
    cache.reorder_cache(order)
    chosen = torch.cat([s.ids[order][:, :begin], s.ids[:, begin:]], 1)
    want = s.read(chosen)[:, begin:]
    yield s.in_pieces(chosen[:, begin:], [1, s.T], cache=cache), want


def forked(s):
    begin = s.T // 2
    cache = s.cache()
    s.read(s.ids[:1, :begin], cache=cache)
    rows = torch.cat([s.ids[:1, :begin].expand(3, -1), s.ids[:, begin:]], 1)
    yield s.in_pieces(rows[:, begin:], [1, s.T], cache=fork(cache, 3)), s.read(rows)[:, begin:]
    yield s.in_pieces(rows[:1, begin:], [s.T], cache=snapshot(cache)), s.read(rows[:1])[:, begin:]


def rolled_back(s):
    """Drafted tokens that are refused leave no trace, whether they came in one call or one by one."""
    begin, row, other = s.T // 2, s.ids[:1], s.ids[1:2]
    want = s.read(row)[:, begin:]
    for sizes in ([1, 1, 1, 1], [4], [3, 1]):
        cache = remember(s.cache(), 8)
        s.read(row[:, : begin - 3], cache=cache)
        s.read(row[:, begin - 3 : begin], cache=cache)
        s.in_pieces(other[:, begin : begin + 4], sizes, cache=cache)
        yield s.in_pieces(row[:, begin:], [1, s.T], cache=rollback(cache, 4)), want
    cache = remember(s.cache(), 8)
    # prompt and draft in one call, as assisted decoding begins
    s.read(torch.cat([row[:, :begin], other[:, :5]], 1), cache=cache)
    yield s.in_pieces(row[:, begin:], [s.T], cache=rollback(cache, 5)), want


def memory_lost(s):
    """What the checks can see: the second half of a text with the mLSTM's memory of the first, and without it."""
    begin, cache = s.T // 2, s.cache()
    s.read(s.ids[:2, :begin], cache=cache)
    lost = snapshot(cache)
    for layer in lost.layers:
        if isinstance(layer, HybridCacheLayer):
            layer.state = MLSTMState(
                *(x.new_full(x.shape, empty) for x, empty in zip(layer.state, (0.0, 0.0, float("-inf")), strict=True))
            )
    yield s.read(s.ids[:2, begin:], cache=lost), s.read(s.ids[:2, begin:], cache=cache)


def model_file(s):
    with tempfile.TemporaryDirectory() as folder:
        s.model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=s.model.dtype).to(s.model.device).eval()
    # Copies, in fresh memory: on some CPUs bits depend on where weights lie, and those of a mapped file lie anywhere
    yield tuple(Subject(copy.deepcopy(model), s.T).read(s.ids[:2]) for model in (loaded, s.model))
    for name, x in s.model.state_dict().items():
        found = loaded.state_dict()[name]
        if found.dtype != x.dtype or not torch.equal(found, x):
            raise CheckpointError(
                f"{name} is not what was saved: {x.dtype} {list(x.shape)} became {found.dtype} {list(found.shape)}: report this, "
                "with what `xlstm-hybrid doctor` prints"
            )


def state_file(s):
    begin = s.T // 2
    cache = prefill(s.model, s.ids[:2, :begin])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(cache, path, s.model)
        loaded = load_state(path, s.model)
    yield s.in_pieces(s.ids[:2, begin:], [1, s.T], cache=loaded), s.in_pieces(s.ids[:2, begin:], [1, s.T], cache=cache)


CHECKS = {
    "chunkwise = parallel": chunkwise,
    "token by token = parallel": lambda s: [(s.in_pieces(s.ids[:2], [1] * s.T), s.read(s.ids[:2]))],
    "chunked prefill = full": chunked_prefill,
    "cached decoding = uncached": cached,
    "packed documents = separate": packed,
    "reordered rows = recomputed": reordered,
    "forked state = recomputed": forked,
    "rolled back = never seen": rolled_back,
}
CHECKS |= {
    f"{side} padding, {where} = none": partial(padded, side=side, beside=beside)
    for side in ("left", "right", "inside")
    for where, beside in (("one row", False), ("beside another row", True))
}
# in the model's own dtype, bit for bit
FILES = {"saved and loaded model = same": model_file, "saved and loaded state = same": state_file}
