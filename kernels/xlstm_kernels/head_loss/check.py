"""The small problem that decides whether the Triton kernel gives right results here, see `backends.verified`."""

import torch

from xlstm_kernels.backends.numerics import calculation_dtype
from xlstm_kernels.backends.verified import compare_forms, draw_numbers
from xlstm_kernels.head_loss.chunks import chunked
from xlstm_kernels.head_loss.reference import Rule, Task, dense


def check_kernel(device, dtype, M):
    """The loss and the gradients of hidden states and head, with a teacher of M stored tokens."""
    from xlstm_kernels.head_loss.triton import rows_step  # needs triton

    make, (N, D, V) = torch.Generator().manual_seed(M), (48, 64, max(1000, 2 * M))
    hidden = draw_numbers(make, 1, N, D, dtype=dtype, device=device)
    weight = draw_numbers(make, V, D, dtype=dtype, device=device) / 4
    teacher = draw_numbers(make, 1, N, V, dtype=torch.float64, device=device).mul_(3).log_softmax(-1)
    logp, ids = teacher.topk(M, -1)
    labels = torch.randint(V, (1, N), generator=make).to(device)
    rest = teacher.scatter(-1, ids, float("-inf")).logsumexp(-1)
    entries, weights = (ids, logp.float(), rest.float()), (0.5, 0.3, 0.2)

    def run(backend):
        def loss(hidden, weight):
            task = Task(labels, entries, None, True, weights, "tail", None, calculation_dtype(hidden, weight))
            return [backend(hidden[0], weight, None, task, Rule(False, 1.0, None), None).loss]

        return loss

    upstream = [torch.ones((), dtype=torch.float64, device=device)]
    return compare_forms(run(chunked(rows_step)), run(dense), (hidden, weight), upstream)
