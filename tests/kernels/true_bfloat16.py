"""bfloat16 in Triton's interpreter. As it comes, the interpreter keeps the 16 bits as an unsigned integer: it multiplies and
adds the integers (`tl.dot`, every operator), cuts digits off where a cast should round to the nearest, and casts between
bfloat16 and anything but float32 convert the integer.

Here such a tile is float32 numbers that bfloat16 has: a load widens, an operation calculates in float32 and rounds to the
nearest even, a store writes the 16 bits. That is what a GPU does; products of two such numbers are exact in float32.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPE = tl.bfloat16


def rounded(x):
    """The nearest bfloat16 of numbers, as float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    up = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), x, (up & np.uint32(0xFFFF0000)).view(np.float32)).astype(np.float32)


def bits_of(x):
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def numbers_of(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@pytest.fixture
def true_bfloat16(monkeypatch):
    """The interpreter calculates in bfloat16 as a GPU does; nothing where there is a GPU."""
    if torch.cuda.is_available():
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    kept = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_fabs")}
    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    cast, bitcast, dtype_of = builder.cast_impl, builder.create_bitcast, interpreter._get_np_dtype
    fits = interpreter._validate_np_data_size

    def of(x):
        return x.dtype.scalar

    def np_dtype(kind):
        return np.dtype(np.float32) if kind.scalar == TYPE else dtype_of(kind)

    def load(self, pointers, mask, other, *rest):
        if pointers.get_element_ty() != TYPE:
            return kept["create_masked_load"](self, pointers, mask, other, *rest)
        filling = np.zeros_like(pointers.data, dtype=np.uint16) if other is None else bits_of(other.data)
        read = interpreter._interpreter.load(pointers.data, mask.data, filling, np.dtype(np.uint16))
        return handle(numbers_of(read), TYPE)

    def store(self, pointers, value, *rest):
        value = handle(bits_of(value.data), tl.uint16) if of(value) == TYPE else value
        return kept["create_masked_store"](self, pointers, value, *rest)

    def cast_to(self, x, kind):
        if kind.scalar == TYPE:
            return handle(rounded(x.data.astype(np.float32)), TYPE)
        return cast(self, x, kind) if of(x) != TYPE else handle(x.data.astype(dtype_of(kind)), kind.scalar)

    def fp_to_fp(self, x, kind, rounding):
        if TYPE in (of(x), kind.scalar):
            return cast_to(self, x, kind)
        return convert(self, x, kind, rounding)

    def calculated(operation):
        def of_numbers(self, *inputs):
            found = operation(self, *inputs)
            # comparisons give bool
            number = found.dtype.scalar == TYPE and found.data.dtype != np.bool_
            return handle(rounded(found.data), TYPE) if number else found

        return of_numbers

    def reinterpreted(self, x, kind):
        if of(x) == TYPE:
            x = handle(bits_of(x.data), tl.uint16)
        if kind.scalar == TYPE:
            return handle(numbers_of(x.data.view(np.uint16)), TYPE)
        return bitcast(self, x, kind)

    def absolute(self, x):
        return handle(np.abs(x.data), TYPE) if of(x) == TYPE else kept["create_fabs"](self, x)

    convert = builder.create_fp_to_fp
    changed = {"create_masked_load": load, "create_masked_store": store, "create_fabs": absolute}
    changed |= {"cast_impl": cast_to, "create_fp_to_fp": fp_to_fp, "create_bitcast": reinterpreted}
    changed |= {"binary_op": calculated(binary), "unary_op": calculated(unary), "ternary_op": calculated(ternary)}
    for name, function in changed.items():
        monkeypatch.setattr(builder, name, function)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
    widened = lambda data, kind: data.itemsize <= 4 if kind.scalar == TYPE else fits(data, kind)  # noqa: E731
    monkeypatch.setattr(interpreter, "_validate_np_data_size", widened)
