"""Where the tokens of a call stand in their documents. Dims: B batch, T tokens."""

from dataclasses import dataclass, field

import torch


@dataclass
class Tokens:
    """Where the T tokens of a forward call stand in their documents.

    real: [B, T] bool, False where padding.  start: [B, T] bool, first real token of a document that begins in this
    call.
    index: [B, T] position among the real tokens of its document, -1 at padding.
    document: [B, T]; 0 continues what the cache holds, each start in the call adds one.
    plain: True if every row is known to be one document without padding.
    uneven: whether padding stands between tokens, so that their distance is not that of their columns; looked at where a
    layer's window counts columns.
    blind: [B] bool, rows that have to do without their window in this call (window dropout); None: no row.
    count: [B] tokens of each row's document after a call of one token; None after a longer one.
    compiled: [B] index of a call of one token whose layers may run compiled, see `one_token`.
    runs: `[(row, columns [n], whether a document begins with them)]`, see `find_runs`; None: all rows may go at once.
    places: which slots the tokens take, found once for all cache layers that are alike: the kernels' `place_token` by slots
    and sinks, `HybridCacheLayer.placing` by what it depends on.
    """

    real: torch.Tensor
    start: torch.Tensor
    index: torch.Tensor
    document: torch.Tensor
    plain: bool = False
    blind: torch.Tensor | None = None
    uneven: bool = False
    count: torch.Tensor | None = None
    compiled: torch.Tensor | None = None
    runs: list | None = None
    places: dict = field(default_factory=dict)

    @classmethod
    def locate(
        cls,
        shape,
        device,
        *,
        attention_mask=None,
        position_ids=None,
        cu_seq_lens=None,
        seq_idx=None,
        seen=None,
        look=True,
    ):
        """Find padding and document starts.

        A document starts where `position_ids` of consecutive real tokens do not increase, where `seq_idx` changes, or
        at an inner entry of `cu_seq_lens`; the first real token of a call starts one if its position is 0 although the
        row has seen tokens.

        Args:
            shape: (B, T).
            attention_mask: [B, T or more], 0 at padding; its last T columns belong to this call.
            position_ids: [B or 1, T] as the caller gave them, or None: then nothing restarts.
            cu_seq_lens: [documents + 1] cumulative lengths, for a batch of one row.
            seq_idx: [B, T] number of each token's document.
            seen: [B] real tokens that the row's present document has in the cache.
            look: whether to see if all rows are plain, which waits for a GPU; never for one token.
        """
        B, T = shape
        real = torch.ones(B, T, dtype=torch.bool, device=device)
        real = real if attention_mask is None else attention_mask[:, -T:].to(device, torch.bool)
        seen = torch.zeros(B, dtype=torch.long, device=device) if seen is None else seen
        if T == 1:
            return cls.of_one(real, position_ids, seen, attention_mask is None and position_ids is None)
        order, start = torch.arange(T, device=device), torch.zeros_like(real)
        restarts = any(x is not None for x in (position_ids, cu_seq_lens, seq_idx))
        if not restarts and attention_mask is None:
            return cls(real, start, seen[:, None] + order, start.long(), True)
        if restarts:
            latest = torch.where(real, order, -1).cummax(-1).values  # last real token up to here
            previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], -1)
            first, previous = previous < 0, previous.clamp_min(0)
        if position_ids is not None:
            position = position_ids.to(device).expand(B, T)
            start = torch.where(first, (position == 0) & (seen > 0)[:, None], position <= position.gather(1, previous))
        if seq_idx is not None:
            number = seq_idx.to(device).expand(B, T)
            start = start | (~first & (number != number.gather(1, previous)))
        if cu_seq_lens is not None:
            start = start | (torch.isin(order, cu_seq_lens[1:-1].to(device)) & ~first)
        start = start & real
        document, index = start.long().cumsum(-1), real.long().cumsum(-1) - 1
        if restarts:
            index = index - torch.where(start, index, 0).cummax(-1).values
        index = index + torch.where(document == 0, seen[:, None], 0)
        plain = look and not torch.compiler.is_compiling() and not bool((start | ~real).any())
        return cls(real, start, torch.where(real, index, -1), document, plain)

    @classmethod
    def of_one(cls, real, position_ids, seen, plain):
        """The same of one token per row, which is the first of its call: it starts a document if its position is 0
        although the row has seen tokens. `plain`: nothing says otherwise; else a CPU looks, which waits for nothing.
        """
        if not plain:
            start = torch.zeros_like(real)
            if position_ids is not None:
                start = (position_ids.to(real.device) == 0) & (seen > 0)[:, None] & real
            if real.device.type == "cpu" and not torch.compiler.is_compiling():
                plain = not bool((start | ~real).any())
        if plain:
            index = seen[:, None].clone()  # `seen` is a layer's own count, which moves on before other layers read
            nowhere = torch.zeros_like(index)
            return cls(real, nowhere.bool(), index, nowhere, True, count=seen + 1)
        index = torch.where(real, torch.where(start, 0, seen[:, None]), -1)
        count = torch.where(real, index + 1, seen[:, None])[:, 0]
        return cls(real, start, index, start.long(), False, count=count)

    def gaps(self, before=None):
        """`(after, between)`, [B, T] bool: padding that stands after a token of its row, and what of it stands before
        one of the same call; `before` [B] is the number of tokens in the cache, None: none.
        """
        seen = 0 if before is None else before[:, None]
        after = ~self.real & (self.real.cumsum(-1) + seen > 0)
        return after, after & (self.real.flip(-1).cumsum(-1).flip(-1) > 0)

    def find_runs(self, before, cached):
        """Set `runs` if a recurrence that can do no more than leave out padding before a row's first token has to take the
        documents of the rows one by one: where one begins in the call, or where padding stands between tokens.

        Args:
            before: [B] tokens in the cache, or None; cached: whether what follows will go on from this call, whose
                padding behind tokens then stands between them.
        """
        after, between = self.gaps(before)
        if bool((self.start | (after if cached else between)).any()):
            self.set_runs()

    def set_runs(self):
        real, document, self.runs = self.real.cpu(), self.document.cpu(), []
        for row in range(len(real)):
            for number in document[row][real[row]].unique():
                columns = (real[row] & (document[row] == number)).nonzero()[:, 0]
                self.runs.append((row, columns, bool(number > 0)))

    def slice(self, begin, end):
        """The same of the tokens `begin` to `end`, as a call of its own would have it."""
        documents = self.document[:, begin - 1 : begin] if begin else 0
        parts = (x[:, begin:end] for x in (self.real, self.start, self.index, self.document - documents))
        return self.with_runs(Tokens(*parts, self.plain, self.blind, self.uneven))

    def map(self, change):
        parts = (change(x) for x in (self.real, self.start, self.index, self.document))
        blind, count = (None if x is None else change(x) for x in (self.blind, self.count))
        return self.with_runs(Tokens(*parts, self.plain, blind, self.uneven, count))

    def with_runs(self, other):
        """Tokens that were made of these, with runs of their own where these have them: rows may be other ones."""
        if self.runs is not None:
            other.set_runs()
        return other

    def to(self, device, **kwargs):
        """The same on another device: accelerate calls it where a model's layers are on several."""
        return self.map(lambda x: x.to(device, **kwargs))

    def visible(self, window, sinks):
        """[B, T, T] bool: which of the call's tokens (last dim) each of them attends to; padding sees everything,
        nobody sees padding.
        """
        q, k = self.index[:, :, None], self.index[:, None, :]
        near = (q >= k) & ((q - k < window) | (k < sinks)) & (self.document[:, :, None] == self.document[:, None])
        return (near & self.real[:, None]) | ~self.real[:, :, None]
