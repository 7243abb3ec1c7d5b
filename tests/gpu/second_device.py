"""A device "gpu" that is not there: every tensor on it is a CPU tensor in disguise, operations are calculated on the
CPU, and what a real GPU would refuse or wait for is refused or counted.

Refused are operations on tensors of both devices. A wait is an operation whose result the host has to see, which a GPU
would first have to finish everything for: a number read (`item`, `tolist`, `bool`), a tensor copied to the CPU, an output
whose shape depends on values (`nonzero`, a mask as an index). An upload is a copy from the CPU.

It is torch's PrivateUse1 backend, which cannot be taken back: import this file in a process of its own.
"""

import contextlib
import traceback
from collections import Counter

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
NAME = "gpu"
OURS = "/xlstm_hybrid/", "/xlstm_kernels/"
NUMBERS = {"aten::_local_scalar_dense", "aten::item", "aten::equal"}
SHAPES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"}
SHAPES |= {"aten::bincount", "aten::repeat_interleave"}
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Module(backend_registration._DummyBackendModule):
    """What `torch.gpu` has."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def synchronize(self, device=None):
        pass

    def set_device(self, device):
        pass

    def empty_cache(self):
        pass

    def device(self, device):
        return contextlib.nullcontext()


backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
GPU, CPU = torch.device(NAME, 0), torch.device("cpu")
torch.autograd.set_multithreading_enabled(False)  # a backward in another thread would not be seen


class Disguised(torch.Tensor):
    """A tensor on the device; `here` is its CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        x = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=GPU, **shape)
        x.here = here
        return x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return calculate(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):  # tells tensors that share memory from others
        return self.here.untyped_storage()


class Generator(torch.Generator):
    """On the device it is the CPU's."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Watch(TorchDispatchMode):
    """`with Watch() as watch:` tensors are made on the device; `waits` and `uploads` count by what and where.

    Keys are `(operation, "file:function")` of the innermost frame outside of torch.
    """

    active = None

    def __init__(self):
        super().__init__()
        self.waits, self.uploads, self.calls = Counter(), Counter(), 0

    def __enter__(self):
        Watch.active, self.kept = self, (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Generator)
        tensor, as_tensor, *_ = self.kept
        torch.Generator = Generator

        # these make a CPU tensor and copy it where no mode sees it

        def made(make):
            def of(data, *args, device=None, requires_grad=False, **kwargs):
                x = make(data, *args, **kwargs)
                x = x if device is None else x.to(device)
                return x.requires_grad_(requires_grad) if requires_grad else x

            return of

        torch.tensor, torch.as_tensor = made(tensor), made(as_tensor)
        torch.Tensor.new_tensor = lambda x, data, dtype=None, device=None, requires_grad=False: torch.tensor(
            data, dtype=dtype or x.dtype, device=device or x.device, requires_grad=requires_grad
        )
        return super().__enter__()

    def __exit__(self, *reason):
        Watch.active = None
        torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Generator = self.kept
        return super().__exit__(*reason)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return calculate(func, args, kwargs or {})

    def ours(self, counter="waits"):
        """Those that code of ours asked for."""
        return {key: n for key, n in getattr(self, counter).items() if any(part in f"/{key[1]}" for part in OURS)}


def origin():
    """Where the operation was asked for: "package/file.py:function"."""
    frames = [frame for frame in traceback.extract_stack(limit=60) if "/torch/" not in frame.filename]
    frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
    return "/".join(frame.filename.split("/")[-3:]) + f":{frame.name}"


def note(counter, name):
    if Watch.active is not None:
        getattr(Watch.active, counter)[name.removeprefix("aten::"), origin()] += 1


def calculate(func, args, kwargs):
    name = func._schema.name
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    remote = [x for x in flat if isinstance(x, Disguised)]
    asked = kwargs.get("device")
    if not remote and (asked is None or torch.device(asked).type != NAME):
        return func(*args, **kwargs)
    if Watch.active is not None:
        Watch.active.calls += 1
    local = [x for x in flat if not isinstance(x, Disguised) and x.dim()]
    if local and remote and name not in COPIES | INDEXED and "_foreach" not in name and "_fused" not in name:
        shapes = [list(x.shape) for x in flat]
        raise RuntimeError(
            f"{name}: expected all tensors on one device, found {[str(x.device) for x in flat]}, {shapes}"
        )
    there = asked is None or torch.device(asked).type == NAME
    if name in NUMBERS | SHAPES and remote:
        if name != "aten::repeat_interleave" or kwargs.get("output_size") is None:
            note("waits", name)
    elif name in COPIES:
        into, source = (args[0], args[1]) if name == "aten::copy_" else (None, args[0])
        there = isinstance(into, Disguised) if into is not None else there
        if isinstance(source, Disguised) and not there:
            note("waits", f"{name} to the CPU")
        elif not isinstance(source, Disguised) and there and source.dim():
            note("uploads", name)
    elif name in INDEXED:
        for index in tree_flatten(args[1])[0]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                note("waits", f"{name} by a mask")
            elif index is not None and not isinstance(index, Disguised):
                note("uploads", name)
    elif asked is not None and not there:
        note("waits", name)
    outer = {id(x.here): x for x in remote}
    args, kwargs = tree_map_only(Disguised, lambda x: x.here, (args, kwargs))
    if asked is not None:
        kwargs["device"] = CPU
    kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    if not there:
        return out
    return tree_map_only(torch.Tensor, lambda x: outer[id(x)] if id(x) in outer else Disguised(x), out)
