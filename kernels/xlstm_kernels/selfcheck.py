"""The small problems that decide whether a Triton kernel is believed, see `trust`. Each compares outputs and all gradients with float64."""

import torch

from xlstm_kernels.gpu.launch import unavailable
from xlstm_kernels.trust import trusted

T = 300  # several chunks and blocks of any table entry, the last one not full


def draw(generator, *shape, dtype, device):
    """Normal numbers that every machine draws alike, rounded to `dtype`."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def compare(kernel, plain, inputs, upstream):
    """{name: largest difference on the scale of the largest entry} of outputs and gradients; inputs are tensors that all want gradients."""
    results = []
    for form, double in ((kernel, False), (plain, True)):
        x = [(a.double() if double else a).detach().clone().requires_grad_() for a in inputs]
        with torch.enable_grad():
            outputs = form(*x)
            loss = sum((y.double() * u).sum() for y, u in zip(outputs, upstream, strict=True))
        results.append([y.detach() for y in outputs] + list(torch.autograd.grad(loss, x)))
    names = [f"output {j}" for j in range(len(upstream))] + [f"gradient {j}" for j in range(len(inputs))]
    return {name: error(a, b) for name, a, b in zip(names, *results, strict=True)}


def error(got, want):
    """inf if anything is not finite."""
    e = ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()
    return e if e == e else float("inf")


def check_mlstm(device, dtype, K, V):
    """h, the state after the last token, and the gradients of q, k, v, i, f and the state before; a document starts in the middle."""
    from xlstm_kernels.gpu.mlstm import mlstm_triton
    from xlstm_kernels.reference import mlstm_chunkwise

    make = torch.Generator().manual_seed(K * 1000 + V)
    q, k = (draw(make, 1, T, 2, K, dtype=torch.float64, device=device).softmax(-1).to(dtype) for _ in range(2))
    v, i, f = draw(make, 1, T, 2, V, dtype=dtype, device=device), *(draw(make, 1, T, 2, dtype=torch.float32, device=device) for _ in range(2))
    f = 4 + f
    f[:, 170, 1] = float("-inf")
    n = 1 + draw(make, 1, 2, K, dtype=torch.float32, device=device).abs()
    C, m = n[..., None] * draw(make, 1, 2, K, V, dtype=torch.float32, device=device), torch.zeros(1, 2, device=device)

    def run(form):
        def results(q, k, v, i, f, C, n):
            h, state = form(q, k, v, i, f, (C, n, m.to(C.dtype)))
            scale = state.m.double().exp()[..., None]  # the true state, whatever its log-scale
            return h, state.C * scale[..., None], state.n * scale

        return results

    upstream = [draw(make, 1, T, 2, V, dtype=torch.float64, device=device), *(1e-2 * torch.ones_like(x, dtype=torch.float64) for x in (C, n))]
    return compare(run(mlstm_triton), run(mlstm_chunkwise), (q, k, v, i, f, C, n), upstream)


def check_window(device, dtype, K, V):
    """h and the gradients of q, k, v; two query heads share keys, documents and padding, and sinks outside of the window."""
    from xlstm_kernels.gpu.window import window_triton
    from xlstm_kernels.window import window_reference

    make = torch.Generator().manual_seed(K * 1000 + V)
    q, k, v = (draw(make, 2, T, heads, d, dtype=dtype, device=device) for heads, d in ((4, K), (2, K), (2, V)))
    index = torch.arange(T).repeat(2, 1)
    document = (index >= 140).long()
    index[1], document[1] = index[1] - 30, 0
    index[0] -= 140 * document[0]
    index[1, :30] = -1
    settings = {"window": 70, "sinks": 4, "scale": K**-0.5}
    upstream = [draw(make, 2, T, 4, V, dtype=torch.float64, device=device)]
    errors = {}
    for name, where in (("plain", (None, None)), ("packed", (index.to(device), document.to(device)))):
        rule = settings | dict(zip(("index", "document"), where, strict=True))
        found = compare(lambda *x, rule=rule: [window_triton(*x, **rule)], lambda *x, rule=rule: [window_reference(*x, **rule)], (q, k, v), upstream)
        errors |= {f"{name} {what}": e for what, e in found.items()}
    return errors


def check_step(device, dtype, K, V, F):
    """h, state and slots after each of a few tokens, before and after the ring is full."""
    from xlstm_kernels.decode import step_both
    from xlstm_kernels.gpu.decode import hybrid_step_triton

    make, (B, H, G, S, W) = torch.Generator().manual_seed(F * 10**6 + K * 1000 + V), (2, 4, 2, 3, 5)
    shapes = {"q": (H, K), "k": (G, K), "v": (G, V), "phi_q": (H, F), "phi_k": (H, F), "i": (H,), "f": (H,), "o": (H,)}
    memory = [torch.zeros(B, H, F, V), torch.zeros(B, H, F), torch.full((B, H), float("-inf"))]
    memory += [torch.zeros(B, G, S + W, K), torch.zeros(B, G, S + W, V)]
    ours = [x.to(device, torch.float32 if j < 3 else dtype) for j, x in enumerate(memory)]
    truth, errors = [x.to(device, torch.float64) for x in memory], {}
    for t in range(2 * W + S):
        x = {name: draw(make, B, 1, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        x |= {name: x[name].double().softmax(-1).to(dtype) for name in ("phi_q", "phi_k")} | {"o": x["o"].double().sigmoid().to(dtype)}
        index = torch.tensor([t, t - 4 if t >= 4 else -1], device=device)
        if t < 4:
            x["i"][1], x["f"][1] = float("-inf"), float("inf")
        got = hybrid_step_triton(*x.values(), *ours, index, sinks=S, scale=K**-0.5)
        want = step_both(*(a.double() for a in x.values()), *truth, index, S, K**-0.5)
        real = (index >= 0).to(device)
        for name, a, b in (("h", got[real], want[real]), ("C", ours[0], truth[0]), ("n", ours[1], truth[1]), ("keys", ours[3], truth[3])):
            errors[name] = max(errors.get(name, 0.0), error(a, b))
    return errors


def check_head_loss(device, dtype, M):
    """The loss and the gradients of hidden states and head, with a teacher of M stored tokens."""
    from xlstm_kernels.head_loss import head_loss

    make, (N, D, V) = torch.Generator().manual_seed(M), (48, 64, max(1000, 2 * M))
    hidden, weight = draw(make, 1, N, D, dtype=dtype, device=device), draw(make, V, D, dtype=dtype, device=device) / 4
    teacher = draw(make, 1, N, V, dtype=torch.float64, device=device).mul_(3).log_softmax(-1)
    logp, ids = teacher.topk(M, -1)
    targets = torch.randint(V, (1, N), generator=make).to(device), ids, logp.float(), teacher.scatter(-1, ids, float("-inf")).logsumexp(-1).float()
    terms = {"ce_weight": 0.5, "forward_kl_weight": 0.3, "reverse_kl_weight": 0.2}

    def run(backend):
        return lambda hidden, weight: [head_loss(hidden, weight, *targets, **terms, backend=backend).loss]

    return compare(run("triton"), run("dense"), (hidden, weight), [torch.ones((), dtype=torch.float64, device=device)])


CHECKS = {"mlstm": check_mlstm, "window_attention": check_window, "hybrid_step": check_step, "head_loss": check_head_loss}


# Both are asked while a graph is compiled, not in the graph.


@torch.compiler.assume_constant_result
def why_not(device):
    """Why no Triton kernel can run on a device, given by its name, or None."""
    return unavailable(torch.empty(0, device=device))


@torch.compiler.assume_constant_result
def believed(operation, device, dtype, *dims):
    """True if the operation's kernel can run on this device, given by its name, and is right there, see `trust.trusted`."""
    if unavailable(torch.empty(0, device=device)):
        return False
    names = {"head_loss": ("M",), "hybrid_step": ("K", "V", "F")}.get(operation, ("K", "V"))
    return trusted(operation, CHECKS[operation], torch.device(device), dtype, **dict(zip(names, dims, strict=True)))
