"""How far each form of the mLSTM is from the float64 recurrence, as the Markdown table of kernels/README.md.

    python kernels/precision.py                                     CPU forms; minutes, for the recurrence takes 131,072
                                                                    steps
    TRITON_INTERPRET=1 python kernels/precision.py --forms triton   the kernels in Triton's interpreter, float32 and
                                                                    float16 only

Errors are the largest difference of h on the scale of its largest entry, inputs rounded first, so that the truth has
the candidate's inputs.
"""

import argparse

import torch
from xlstm_kernels import mlstm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def inputs(T, gate, dtype, device, d=32):
    """q and k in the domain of the feature maps, gate pre-activations up to +-gate.

    a third of the sequence long runs of one sign.
    """
    make = torch.Generator().manual_seed(T)
    q, k = ((3 * torch.randn(1, T, 1, d, generator=make, dtype=torch.float64)).softmax(-1) for _ in range(2))
    v = torch.randn(1, T, 1, d, generator=make, dtype=torch.float64)
    i, f = (gate * (2 * torch.rand(1, T, 1, generator=make, dtype=torch.float64) - 1) for _ in range(2))
    f[:, T // 3 : 2 * T // 3].abs_()  # hardly anything is forgotten here: the longest memory
    return [x.to(dtype).to(device) for x in (q, k, v)] + [x.float().to(device) for x in (i, f)]


@torch.no_grad()
def error(form, T, gate, dtype, device):
    x = inputs(T, gate, dtype, device)
    want, _ = mlstm(*(a.double() for a in x), backend="recurrent")
    got, _ = mlstm(*x, backend=form)
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--forms", default="streaming,chunkwise,recurrent")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--lengths", default="1000,8192,131072")
    args = parser.parse_args()
    lengths = [int(T) for T in args.lengths.split(",")]
    cases = [(T, gate) for T in lengths for gate in (2.0, 50.0)]
    print("| form, dtype of q, k, v | " + " | ".join(f"T {T:,}, gates ±{gate:g}" for T, gate in cases) + " |")
    print("|---|" + "---|" * len(cases))
    for dtype in args.dtypes.split(","):
        for form in args.forms.split(","):
            errors = [error(form, T, gate, DTYPES[dtype], args.device) for T, gate in cases]
            print(f"| {form}, {dtype} | " + " | ".join(f"{e:.1e}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
