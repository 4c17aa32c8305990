"""Cures bfloat16 in Triton's interpreter, for tests only.

The stock interpreter multiplies the raw bits of bfloat16 operands in `tl.dot` and truncates where hardware rounds to nearest
even. `tests/kernels/triton/interpreted_attention.py` checks with a canary that the cure is still needed and still works.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(handle: interpreter.TensorHandle) -> np.ndarray:
    """float32 values of a handle that keeps bfloat16 as uint16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        half = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), half)


def cure_bfloat16() -> None:
    """Patch the interpreter of this process; call it once, before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    stock_dot, stock_cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            a, b = (interpreter.TensorHandle(_widened(x), tl.float32) for x in (a, b))
        return stock_dot(self, a, b, *rest)

    def cast_impl(self, source, target):  # type: ignore[no-untyped-def]
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(source), tl.float32)
        return stock_cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
