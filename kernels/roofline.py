"""What a kernel must move and calculate, counted from shapes, and how near a measured time comes to it.

Bytes: each input is read once and each output written once, whatever a kernel keeps for itself. FLOPs: two for each
multiplication and addition of a matrix product, of the pairs that the definition has; exponentials and gates are left
out. The backward calculates scores again, as every kernel of ours does. The roofline is the larger of the times that
the bytes and the FLOPs take at the device's best; a kernel at 100 % of it cannot be faster.

Dims: B batch, T tokens, H query heads, G key/value heads, K query/key dim, V value dim, W window, S sinks, L tokens of
a chunk, N tokens of a loss, D hidden size.
"""

from typing import NamedTuple

CHUNK = 64  # L that FLOPs of the mLSTM are counted for; the longer the chunk, the more of them
# (bytes per second, FLOP per second in half precision), measured by large copies and matrix products
DEVICES = {"H200": (4.3e12, 790e12)}


class Work(NamedTuple):
    bytes: int
    flops: int

    @classmethod
    def of(cls, parts):
        return cls(*map(sum, zip(*parts, strict=True)))

    def roofline(self, peak):
        """Seconds at least, on a device of `peak` (bytes per second, FLOP per second)."""
        return max(self.bytes / peak[0], self.flops / peak[1])

    def figures(self, seconds, peak=None):
        """What is reported of a time; the share of the roofline where the device's peak is known."""
        found = {"bytes": self.bytes, "flops": self.flops}
        found |= {"GB/s": round(self.bytes / seconds / 1e9, 3), "GFLOP/s": round(self.flops / seconds / 1e9, 3)}
        return found if peak is None else found | {"roofline": round(self.roofline(peak) / seconds, 4)}


def peak_of(name, size):
    """Peak of a device by its name for entries of `size` bytes; None where it was not measured."""
    return next((peak for part, peak in DEVICES.items() if size == 2 and part in name), None)


def pairs(T, W, S):
    """(query, key) pairs of window + sinks in a document: the last W tokens, itself among them, and the first S."""
    return sum(min(t + 1, W + S) for t in range(T))


def attention(B, T, H, G, K, V, W, S, size, backward=False):
    """`window_attention`; all pairs with W >= T, as in causal attention."""
    once, products = T * (H * K + G * K + G * V + H * V), K + V  # q, k, v, h
    if backward:  # reads h and its gradient as well, writes dq, dk, dv; scores again, dV, dP, dQ, dK
        once, products = once + T * (H * V + H * K + G * K + G * V), 3 * K + 2 * V
    return Work(B * once * size, 2 * B * H * pairs(T, W, S) * products)


def mlstm(B, T, H, K, V, size, backward=False, L=CHUNK):
    """`mlstm` in chunks of L: the pairs inside of chunks, and for each token the state's read-out and its update."""
    once, products, state = 2 * K + 2 * V + 2, K + V, 2  # q, k, v, h, i, f
    if backward:  # gradients of h, q, k, v, i, f; the state again, and its gradient by as many products as there are
        once, products, state = once + 2 * K + 2 * V + 2, 3 * K + 2 * V, 5
    inside = T // L * (L * (L + 1) // 2) + T % L * (T % L + 1) // 2
    return Work(B * T * H * once * size, 2 * B * H * (inside * products + T * state * K * V))


def mixed(B, T, H, V, size, backward=False):
    """`mix`: o memory + (1 - o) window."""
    if backward:  # reads both, o and the gradient; writes three gradients
        return Work(B * T * H * (5 * V + 2) * size, 5 * B * T * H * V)
    return Work(B * T * H * (3 * V + 1) * size, 3 * B * T * H * V)


def features(B, T, H, K, size, backward=False):
    """Both feature maps: softmax(x W) of queries and keys."""
    if backward:  # x, phi and the gradient are read, dx written; two products
        return Work(2 * (4 * B * T * H * K + 2 * H * K * K) * size, 8 * B * T * H * K * K)
    return Work(2 * (2 * B * T * H * K + H * K * K) * size, 4 * B * T * H * K * K)


def step_window(B, H, G, K, V, slots, size):
    """`window_step` or a step over a static cache: every slot is read, one is written."""
    moved = B * (H * K + H * V + 2 * G * (K + V) + G * slots * (K + V))
    return Work(moved * size, 2 * B * H * slots * (K + V))


def step_memory(B, H, K, V, size, state_size=4):
    """`mlstm_step`: the state is read and written; decay, update, read-out."""
    moved = B * H * ((2 * K + 2 * V + 2) * size + 2 * (K * V + K + 1) * state_size)
    return Work(moved, 5 * B * H * K * V)


def head_loss(N, D, V, M, size, frozen=False):
    """`head_loss` with its gradients: the head [V, D] is read, its gradient written in float32 unless it is frozen."""
    moved = (2 * N * D + V * D) * size + N * (M * 12 + 12) + (0 if frozen else V * D * 4)
    return Work(moved, 2 * N * D * V * (2 if frozen else 3))


def sequence(name, B, T, H, d, W, S, size, backward=False):
    """`Work` of a candidate of `bench.py` on a sequence, forward and backward together; None where none is counted."""
    if name.startswith("sdpa"):
        W, S = T, 0
    parts = {"hybrid": ("window", "mlstm", "mix"), "layer": ("window", "mlstm", "mix", "features")}
    parts = parts.get(name, ("window",) if name.startswith("sdpa") else (name,))
    counts = {
        "window": lambda back: attention(B, T, H, H, d, d, W, S, size, back),
        "mlstm": lambda back: mlstm(B, T, H, d, d, size, back),
        "mix": lambda back: mixed(B, T, H, d, size, back),
        "features": lambda back: features(B, T, H, d, size, back),
    }
    if not counts.keys() >= set(parts):
        return None
    return Work.of(counts[part](back) for part in parts for back in ((False, True) if backward else (False,)))


def decode(name, B, N, H, d, W, S, size, state_size=4):
    """The same of one token at a context of N."""
    window, memory = step_window(B, H, H, d, d, W + S, size), step_memory(B, H, d, d, size, state_size)
    static = step_window(B, H, H, d, d, N + 1, size)
    joined = Work.of((window, memory, mixed(B, 1, H, d, size)))
    return {"static": static, "window": window, "mlstm": memory, "hybrid": joined}.get(name)
