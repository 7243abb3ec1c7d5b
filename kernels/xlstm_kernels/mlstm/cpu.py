"""The mLSTM for a CPU: chunkwise, streaming, with a backward written out. Dims as in `reference`; L tokens per chunk, N
chunks, n of them at a time.

Inside a chunk, with b_t the sum of log f since its beginning, the weight of token s in row t is
exp(b_t - b_s + i_s - m_t) = exp(a_s - M_t):

    a_s = i_s - b_s      M_t = max(m of the state carried in, max_{s<=t} a_s)      m_t = b_t + M_t

so every row maximum is known before the first product, and since h does not depend on the row's scale, any frame
R_t >= M_t serves as well. Unless the gates swing wildly R is taken constant over the document's part of the chunk:
exp(a_s - R) then belongs to the key alone and what is left is causal linear attention. The backward computes the scores
again from the states that were stored, in a loop from the last chunk to the first:

    dnum = dh / den      dden = -<dnum, num> / den      (never a square of den, which may be tiny)
    di_s = <k_s, dk_s>   as exp(i_s) and k_s only occur as their product
    dlogf_t = sum of the weights' gradients over all pairs of a token before t and a row not before t;
              <q_t, dq_t> = 0 saves half of the sums
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.backends.arguments import schema
from xlstm_kernels.backends.numerics import calculation_dtype, finite, wants_gradients
from xlstm_kernels.backends.scratch import space_of
from xlstm_kernels.mlstm.reference import FORGET_ALL, MLSTMState, fresh_state

ENTRIES = 2**17  # of one tensor that is worked on at once: enough to hide the calls, few enough to stay in the cache
# entries from which one chunk of one row hides the calls: it is then worked on alone, where it lies, its state in place
LARGE = 2**15
SPREAD = 30.0  # R - M may be as large as this: exp(-SPREAD) is far above the smallest float32


class ChunkGates(NamedTuple):
    """What the gates say about every chunk, before any key is looked at.

    Weights in the dtype of the calculation, exponents in float64:
    intra: weight of a token in the rows of its own chunk [N B H, L, 1], None if it differs too much from row to row
        (then a and M are used)
    write: weight of a token in the state after the chunk [N B H, L, 1]
    carry: weight of the state before the chunk in a row [N B H, L, 1], or [N B H, 1, 1] if it is the same in all
    decay: weight of the state before the chunk in the state after it [N, B H]
    a, M: exponents of tokens and rows [N B H, L], None if intra is there; M is finite
    reads: for each chunk, whether any row has a weight for the state before it; the first of all has none
    document: number of the token's document within the chunk [N B H, L], None if no document starts anywhere
    m: log-scale after the last token [B H]
    """

    intra: Tensor | None
    write: Tensor
    carry: Tensor
    decay: Tensor
    reads: list[bool]
    a: Tensor | None
    M: Tensor | None
    document: Tensor | None
    m: Tensor


def into_chunks(x, L, fill):
    """[B, T, H] -> [N, B H, L], the last chunk filled up."""
    B, T, H = x.shape
    x = x.transpose(1, 2).reshape(B * H, T)
    x = F.pad(x, (0, -T % L), value=fill) if T % L else x
    return x.view(B * H, -1, L).transpose(0, 1).contiguous()


def running_max(a, document):
    """max of a over the tokens of the same document up to each one, by doubling."""
    if document is None:
        return a.cummax(-1).values
    step = 1
    while step < a.shape[-1]:
        same = document[..., step:] == document[..., :-step]
        earlier = a[..., :-step].masked_fill(~same, float("-inf"))
        a = torch.cat([a[..., :step], torch.maximum(a[..., step:], earlier)], -1)
        step *= 2
    return a


def carried_scales(decay, peak, m, forgets=True):
    """m before each chunk and after the last [N + 1, B H]: m_{c+1} = max(decay_c + m_c, peak_c), decay and peak [N, B
    H] in float64.

    Closed form where nothing forgets all, m_{c+1} = S_c + max(m_0, max_{j<=c}(peak_j - S_j)) with S the running sum of
    decay; else by doubling.
    """
    if not forgets:
        S = decay.cumsum(0)
        return torch.cat([m[None], S + torch.maximum((peak - S).cummax(0).values, m)])
    step = 1
    while step < len(decay):
        peak = torch.cat([peak[:step], torch.maximum(peak[step:], decay[step:] + peak[:-step])])
        decay = torch.cat([decay[:step], decay[step:] + decay[:-step]])
        step *= 2
    return torch.cat([m[None], torch.maximum(decay + m, peak)])


def chunk_gates(i, f, m, L, dtype):
    """Everything that depends on the gates alone: i, f [B, T, H], m [B, H] of the state carried in."""
    logf, starts = F.logsigmoid(f.double()), None
    if logf.amin() < FORGET_ALL:
        starts = logf < FORGET_ALL
        logf = logf.masked_fill(starts, 0.0)
    b = into_chunks(logf, L, 0.0).cumsum(-1)
    a = into_chunks(i, L, float("-inf")) - b  # [N, B H, L]
    document = None if starts is None else into_chunks(starts.to(torch.int32), L, 0).cumsum(-1)
    own, decay = running_max(a, document), b[..., -1]
    if document is not None:
        decay = decay.masked_fill(document[..., -1] > 0, float("-inf"))
    m = carried_scales(decay, b[..., -1] + own[..., -1], m.double().flatten(), document is not None)
    m_in = m[:-1, :, None]
    if document is None:
        M = torch.maximum(own, m_in)
        R, least = M[..., -1:], M[..., :1]
    else:
        m_in = m_in.masked_fill(document > 0, float("-inf"))
        M = least = torch.maximum(own, m_in)
        # M at the last token of the document in the chunk
        R = M.gather(-1, torch.searchsorted(document, document, right=True) - 1)
    # inf: nothing has been written yet, there is no weight to lose
    if (R - least).nan_to_num_(0.0, posinf=0.0).max() <= SPREAD:
        return alike(a, R, m_in, document, m[-1], dtype)
    return different(a, M, m_in, document, m[-1], dtype)


def alike(a, R, m_in, document, m, dtype):
    """The gates of chunks whose tokens weigh the same in every row, but for a factor of the row."""
    R = finite(R)
    intra, carry = (a - R).exp().to(dtype), (m_in - R).exp().to(dtype)
    write = intra if document is None else intra * (document == document[..., -1:])
    reads, document = carry.flatten(1).any(1).tolist(), None if document is None else document.flatten(0, 1)
    intra, write, carry = (x.flatten(0, 1)[..., None] for x in (intra, write, carry))
    return ChunkGates(intra, write, carry, carry[:, -1, 0].view(a.shape[:2]), reads, None, None, document, m)


def different(a, M, m_in, document, m, dtype):
    """The gates of chunks whose tokens need a weight for every row."""
    M = finite(M)
    write, carry = a - M[..., -1:], (m_in - M).exp().to(dtype)
    if document is not None:
        write = write.masked_fill(document != document[..., -1:], float("-inf"))
        document = document.flatten(0, 1)
    reads = carry.flatten(1).any(1).tolist()
    write, carry = (x.flatten(0, 1)[..., None] for x in (write.exp().to(dtype), carry))
    return ChunkGates(
        None, write, carry, carry[:, -1, 0].view(a.shape[:2]), reads, a.flatten(0, 1), M.flatten(0, 1), document, m
    )


class Segment(NamedTuple):
    """n chunks of L tokens from token t on."""

    t: int
    n: int
    L: int


def rows_at_once(q, v, L):
    """Rows of the batch that are worked on together."""
    entries = L * q.shape[2] * max(q.shape[3], v.shape[3])  # of one chunk of a row
    return 1 if entries >= LARGE else max(1, ENTRIES // entries)


def segments(q, v, L):
    """The pieces that are worked on at once; what does not fill a chunk comes last."""
    B, T, H, K = q.shape
    entries = B * H * max(K, v.shape[-1])  # per token
    # two small segments cost more than a large one
    n = max(1, ENTRIES // (entries * L)) if T * entries > 2 * ENTRIES else T
    n = 1 if entries * L >= LARGE * B else n
    whole = [Segment(t, min(n, T // L - t // L), L) for t in range(0, T - T % L, n * L)]
    return whole + ([Segment(T - T % L, 1, T % L)] if T % L else [])


def cut(space, name, x, segment, weight=None):
    """[B, T, H, K] -> [n B H, L, K] times weight [n B H, L, 1]; one chunk of one row stays where it is or [L, H, K]."""
    if len(x) == segment.n == 1 and x.dtype == space.options["dtype"]:
        x = x[0, segment.t : segment.t + segment.L]
        x = x if weight is None else torch.mul(x, weight.transpose(0, 1), out=space(name, *x.shape))
        return x.transpose(0, 1)
    x = chunk_view(x, segment)
    y = space(name, *x.shape)
    if weight is None:
        y.copy_(x)
    else:
        torch.mul(x, weight.view(*x.shape[:-1], 1), out=y)
    return y.flatten(0, 2)


def chunk_view(x, segment):
    """The segment's part of x [B, T, H, K], seen as [n, B, H, L, K]."""
    t, n, L = segment
    if len(x) == n == 1:
        return x[0, t : t + L].transpose(0, 1)[None, None]
    return x[:, t : t + n * L].unflatten(1, (n, L)).permute(1, 0, 3, 2, 4)


def put(x, segment, y, weight=None):
    """Write y [n B H, L, K], times weight [n B H, L, 1], to where `cut` takes it from; y may be lost."""
    x = chunk_view(x, segment)
    if weight is None or x.dtype != y.dtype:
        x.copy_((y if weight is None else y.mul_(weight)).view(x.shape))
    else:
        torch.mul(y.view(x.shape), weight.view(*x.shape[:-1], 1), out=x)


def scan(x, new, decay, start, backwards=False):
    """x [n + 1, ...] from x_0 = start, x_{c+1} = decay_c x_c + new_c, or x_n = start, x_c = decay_c x_{c+1} + new_c."""
    x, steps = x.unbind(), list(zip(new.unbind(), decay.unbind(), strict=True))
    if backwards:
        x, steps = x[::-1], steps[::-1]
    x[0].copy_(start)
    for c, (new_c, decay_c) in enumerate(steps):
        torch.addcmul(new_c, decay_c, x[c], out=x[c + 1])


def inverse(den):
    """1 / den, 0 where nothing has been written, as in `numerics.ratio`."""
    return den.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)


class SegmentProducts:
    """The chunks of one segment as matrices [n B H, ...]: loaded, weighted, multiplied, forward and again backward."""

    def __init__(self, q, k, v, gates, segment, L, space):
        t, self.n, size = segment
        lanes = gates.decay.shape[1]
        self.chunks, self.here = slice(t // L, t // L + self.n), slice(t // L * lanes, (t // L + self.n) * lanes)
        self.gates, self.space, self.decay = gates, space, gates.decay[self.chunks]
        self.write, self.carry = gates.write[self.here, :size], gates.carry[self.here, :size]
        self.intra = None if gates.intra is None else gates.intra[self.here, :size]
        # a token weighs as much in its chunk as in the state after it
        self.same = self.intra is not None and gates.document is None
        self.q, self.v = cut(space, "q", q, segment), cut(space, "v", v, segment)
        self.k_write = cut(space, "k_write", k, segment, self.write)
        self.k_intra = self.k_write if self.same else cut(space, "k_intra", k, segment, self.intra)

    def pattern(self):
        """Factors of the scores, [L, L] or [n B H, L, L]: the causal mask, and the weights that are not in k_intra."""
        g, size = self.gates, self.q.shape[1]
        causal = self.space.causal(size)
        same = None
        if g.document is not None:
            document = g.document[self.here, :size]
            same = document[:, :, None] == document[:, None, :]
        if g.intra is not None:
            return causal if same is None else torch.mul(causal, same, out=self.space("pattern", *same.shape))
        hidden = causal == 0 if same is None else (causal == 0) | ~same
        a, M = g.a[self.here, :size], g.M[self.here, :size]
        return (a[:, None, :] - M[:, :, None]).masked_fill_(hidden, float("-inf")).to(self.q.dtype).exp_()

    def states(self, C, n):
        """C and n before each chunk and after the last, [n + 1, B H, K, V] and [n + 1, B H, K]."""
        new_C = self.space.matmul("new", self.k_write.transpose(1, 2), self.v)
        return self.scanned("C", new_C, C), self.scanned("n", self.k_write.sum(1), n)

    def scanned(self, name, new, start, backwards=False):
        """A state around each chunk [n + 1, B H, ...] from what each chunk adds to it [n B H, ...]."""
        new = new.unflatten(0, (self.n, -1))
        x = self.space(name, self.n + 1, *new.shape[1:])
        scan(x, new, self.decay.view(self.decay.shape + (1,) * (new.dim() - 2)), start, backwards)
        return x

    def decayed(self, name, new, x):
        """decay_c x_c of each chunk [n B H, ...] and the last x, x_{c+1} = decay_c x_c + new_c; `new` is lost."""
        new = new.unflatten(0, (self.n, -1))
        y, decay = self.space(name, *new.shape), self.decay.view(self.decay.shape + (1,) * (new.dim() - 2))
        for y_c, new_c, decay_c in zip(y.unbind(), new.unbind(), decay.unbind(), strict=True):
            torch.mul(x, decay_c, out=y_c)
            x = new_c.add_(y_c)
        return y.flatten(0, 1), x.clone()

    def forward(self, C, n):
        """The numerator of h, 1 / den, and the state after the last chunk; C and n may be lost."""
        return self.one_chunk(C, n) if self.n == 1 else self.many_chunks(C, n)

    def one_chunk(self, C, n):
        space, decay, q = self.space, self.decay[0, :, None], self.q
        scores = space.matmul("scores", q, self.k_intra.transpose(1, 2)).mul_(self.pattern())
        num, den = space.matmul("num", scores, self.v), scores.sum(-1, keepdim=True)
        alike = self.carry.shape[1] == 1  # all rows see the state as decayed as the next state does
        if alike:
            C, n = C.mul_(decay[..., None]), n.mul_(decay)
        if self.gates.reads[self.chunks.start]:
            q = q if alike else space.product("q_carry", q, self.carry)
            num, den = num.baddbmm_(q, C), den.baddbmm_(q, n[..., None])
        if not alike:
            C, n = C.mul_(decay[..., None]), n.mul_(decay)
        return num, inverse(den), C.baddbmm_(self.k_write.transpose(1, 2), self.v), n.add_(self.k_write.sum(1))

    def many_chunks(self, C, n):
        space = self.space
        scores = space.matmul("scores", self.q, self.k_intra.transpose(1, 2)).mul_(self.pattern())
        # all rows see the state as decayed as the next state does
        if self.carry.shape[1] == 1 and C.shape[-1] <= self.q.shape[1]:
            new_C, new_n, q = space.matmul("new", self.k_write.transpose(1, 2), self.v), self.k_write.sum(1), self.q
            (Cs, C), (ns, n) = self.decayed("C", new_C, C), self.decayed("n", new_n, n)
        else:
            Cs, ns = self.states(C, n)
            q = space.product("q_carry", self.q, self.carry)
            (Cs, C), (ns, n) = ((x[:-1].flatten(0, 1), x[-1]) for x in (Cs, ns))
        num = space.matmul("num", scores, self.v).baddbmm_(q, Cs)
        inverse_den = inverse(scores.sum(-1, keepdim=True) + space.dot(q, ns[:, None]))
        return num, inverse_den, C, n

    def backward(self, dnum, inverse_den, C, n, dC, dn):
        """From dnum = dh / den, the state before and the gradient of the state after to those of the piece.

        Returns dq, dk, dv, each with a weight or None, the gradient of the state before, and what `gate_gradients`
        needs of each token.
        """
        space, pattern, q_carry = self.space, self.pattern(), self.space.product("q_carry", self.q, self.carry)
        if self.n > 1:
            C, n = (x[:-1].flatten(0, 1) for x in self.states(C, n))
        scores = space.matmul("scores", self.q, self.k_intra.transpose(1, 2)).mul_(pattern)
        dscores = space.matmul("dscores", dnum, self.v.transpose(1, 2))
        dq = space.matmul("dq", dnum, C.transpose(1, 2))  # through the carried state, without its weight yet
        dden = (space.dot(scores, dscores) + space.dot(q_carry, dq)).mul_(-inverse_den)
        dscores.add_(dden).mul_(pattern)
        dq.addcmul_(dden, n[:, None]).mul_(self.carry).baddbmm_(dscores, self.k_intra)

        if self.n > 1:
            dCs = self.scanned("dC", space.matmul("new", q_carry.transpose(1, 2), dnum), dC, backwards=True)
            dns = self.scanned("dn", space.product("dot", q_carry, dden).sum(1), dn, backwards=True)
            dC, dn, before = dCs[1:].flatten(0, 1), dns[1:].flatten(0, 1), (dCs[0], dns[0])
        through = self.decay.flatten()[:, None] * (space.dot(C, dC).sum(1) + space.dot(n, dn))  # [n B H, 1]

        own = space.matmul("own", dscores.transpose(1, 2), self.q)
        later = space.matmul("later", self.v, dC.transpose(1, 2)).add_(dn[:, None])
        dv = space.matmul("dv", scores.transpose(1, 2), dnum).baddbmm_(self.k_write, dC)
        per_token = space.dot(own, self.k_intra), space.dot(later, self.k_write), through[..., None].expand_as(dden)
        if not self.same:
            own, later = own if self.intra is None else own.mul_(self.intra), later.mul_(self.write)
        if self.n == 1:
            decay = self.decay[0, :, None]
            dn = dn.mul_(decay).add_(space.product("dot", q_carry, dden).sum(1))
            before = dC.mul_(decay[..., None]).baddbmm_(q_carry.transpose(1, 2), dnum), dn
        return ((dq, None), (later.add_(own), self.write if self.same else None), (dv, None)), before, per_token


def streaming_forward(q, k, v, i, f, C, n, m, L, keep):
    """h, the state after (C, n, m), and for the backward: what rounding m was worth, 1 / den, states before."""
    (B, _, H, _), dtype = q.shape, C.dtype
    gates, pieces, space = chunk_gates(i, f, m, L, dtype), segments(q, v, L), space_of("mlstm", dtype, q.device)
    h = torch.empty_like(v, memory_format=torch.contiguous_format)
    inverse_den = gates.write.new_zeros(gates.write.shape if keep else 0)
    C, n = C.flatten(0, 1).clone(), n.flatten(0, 1).clone()
    stored_C, stored_n = (x.new_empty(len(pieces) if keep else 0, *x.shape) for x in (C, n))
    for j, segment in enumerate(pieces):
        if keep:
            stored_C[j], stored_n[j] = C, n
        x = SegmentProducts(q, k, v, gates, segment, L, space)
        num, weight, C, n = x.forward(C, n)
        put(h, segment, num, weight)
        if keep:
            inverse_den[x.here, : segment[2]] = weight
    m = gates.m.to(dtype, copy=True)
    rounded = (gates.m - finite(m).double()).exp().to(dtype)  # what rounding m loses goes into C and n
    state = (C * rounded[:, None, None]).unflatten(0, (B, H)), (n * rounded[:, None]).unflatten(0, (B, H)), m.view(B, H)
    return [h, *state, rounded, inverse_den, stored_C, stored_n]


streaming_op = torch.library.custom_op(
    "xlstm_kernels::mlstm_streaming",
    streaming_forward,
    mutates_args=(),
    schema=schema("q k v i f C n m", "SymInt L, bool keep", "Tensor[]"),
)


@streaming_op.register_fake
def _(q, k, v, i, f, C, n, m, L, keep):
    (B, T, H, K), V = q.shape, v.shape[3]
    N, stored = -(-T // L), len(segments(q, v, L)) if keep else 0
    weights = (N * B * H, L, 1) if keep else (0,)
    shapes = (B, H, K, V), (B, H, K), (B, H), (B * H,), weights, (stored, B * H, K, V), (stored, B * H, K)
    return [v.new_empty(v.shape), *(C.new_empty(shape) for shape in shapes)]


@torch.library.custom_op(
    "xlstm_kernels::mlstm_streaming_backward",
    mutates_args=(),
    schema=schema("q k v i f m rounded inverse_den stored_C stored_n dh dC dn", "SymInt L", "Tensor[]"),
)
def streaming_backward(q, k, v, i, f, m, rounded, inverse_den, stored_C, stored_n, dh, dC, dn, L):
    """The gradients of q, k, v, i, f, C, n."""
    B, _, H, _ = q.shape
    gates, space = chunk_gates(i, f, m, L, stored_C.dtype), space_of("mlstm", stored_C.dtype, q.device)
    totals = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    per_token = [torch.zeros_like(gates.write) for _ in range(3)]
    dC, dn = dC.flatten(0, 1) * rounded[:, None, None], dn.flatten(0, 1) * rounded[:, None]
    for j, segment in reversed(list(enumerate(segments(q, v, L)))):
        x, size = SegmentProducts(q, k, v, gates, segment, L, space), segment[2]
        weight = inverse_den[x.here, :size]
        dnum = cut(space, "dnum", dh, segment, weight)
        grads, (dC, dn), of_tokens = x.backward(dnum, weight, stored_C[j], stored_n[j], dC, dn)
        for total, y in zip(totals, grads, strict=True):
            put(total, segment, *y)
        for total, y in zip(per_token, of_tokens, strict=True):
            total[x.here, :size] = y
    di, df = gate_gradients(*per_token, f)
    gates = di.to(i.dtype).contiguous(), df.to(f.dtype).contiguous()
    return [*totals, *gates, *(x.unflatten(0, (B, H)).clone() for x in (dC, dn))]


@streaming_backward.register_fake
def _(q, k, v, i, f, m, rounded, inverse_den, stored_C, stored_n, dh, dC, dn, L):
    return [x.new_empty(x.shape) for x in (q, k, v, i, f, dC, dn)]


def save(ctx, inputs, output):
    q, k, v, i, f, _, _, m, ctx.L, _ = inputs
    ctx.save_for_backward(q, k, v, i, f, m, *output[4:])


def differentiate(ctx, grads):
    dh, dC, dn = grads[:3]  # the others are not handed out
    with torch.autocast(dh.device.type, enabled=False):
        return *streaming_backward(*ctx.saved_tensors, dh, dC, dn, ctx.L), None, None, None


streaming_op.register_autograd(differentiate, setup_context=save)


def gate_gradients(own, later, through, f):
    """di and df [B, T, H] from what weights contributed [N B H, L, 1]: in the own chunk, later, and of carried states.

    Summed inside a chunk only: sums over the sequence would lose the small differences that df is.
    """
    B, T, H = f.shape
    own, later, through = (x.view(-1, B * H, x.shape[1]) for x in (own, later, through))
    after = own.flip(-1).double().cumsum(-1).flip(-1)  # of the tokens from t on, in rows not before them
    before = later.double().cumsum(-1) - later
    sums = own + later, before - after + through
    di, dlogf = (x.transpose(0, 1).reshape(B, H, -1)[..., :T].transpose(1, 2) for x in sums)
    f = f.double()
    return di, (dlogf * torch.sigmoid(-f)).masked_fill_(F.logsigmoid(f) < FORGET_ALL, 0.0)


def mlstm_streaming(q, k, v, i, f, state=None, chunk_size=64):
    """The chunkwise form for a CPU, with its own backward: O(T) time, memory for one state per segment."""
    dtype, T = calculation_dtype(q, k, v, i, f, *(state or ())), q.shape[1]
    L = T if 2 * chunk_size >= T else chunk_size  # a second chunk costs more calls than one twice as long has work
    C, n, m = fresh_state(q, v, dtype) if state is None else (x.to(dtype) for x in state)
    keep = wants_gradients(q, k, v, i, f, C, n)
    inputs, rows = (q, k, v, i, f, C, n, m.detach()), rows_at_once(q, v, L)
    # of the batch, for the cache's sake
    parts = [inputs] if rows >= len(q) else zip(*(x.split(rows) for x in inputs), strict=True)
    plain = type(q) is Tensor and not keep and not torch.compiler.is_compiling()
    forward = streaming_forward if plain else streaming_op  # nobody watches: the dispatcher's 0.1 ms are spared
    h, C, n, m = zip(*(forward(*part, L, keep)[:4] for part in parts), strict=True)
    join = (lambda x: x[0]) if len(h) == 1 else torch.cat
    return join(h), MLSTMState(join(C), join(n), join(m).detach())
