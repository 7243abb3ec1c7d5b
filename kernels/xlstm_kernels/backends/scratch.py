"""Scratch memory that outlives a call: on a CPU, page faults of fresh memory cost more than a small multiplication."""

import threading

import torch

LOCAL = threading.local()


class Space:
    """Buffers by name, as large as the largest that was asked for; the next call of the same name overwrites them."""

    def __init__(self, dtype, device):
        self.options, self.buffers = {"dtype": dtype, "device": device}, {}

    def __call__(self, name, *shape):
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, **self.options)
        return self.buffers[name][:size].view(shape)

    def causal(self, L):
        """Ones on and below the diagonal [L, L]."""
        if ("causal", L) not in self.buffers:
            self.buffers["causal", L] = torch.ones(L, L, **self.options).tril()
        return self.buffers["causal", L]

    def product(self, name, x, y):
        """x * y in the shape of x."""
        return torch.mul(x, y, out=self(name, *x.shape))

    def matmul(self, name, x, y):
        return torch.bmm(x, y, out=self(name, len(x), x.shape[1], y.shape[2]))

    def dot(self, x, y):
        """<x, y> over the last dim, which is kept."""
        return self.product("dot", x, y).sum(-1, keepdim=True)


def space_of(operation, dtype, device):
    """This thread's space for an operation, some tens of MB. Tensors made under inference_mode do not leave it."""
    key = operation, dtype, device, torch.is_inference_mode_enabled()
    if key not in LOCAL.__dict__:
        LOCAL.__dict__[key] = Space(dtype, device)
    return LOCAL.__dict__[key]
