"""bfloat16 in Triton's interpreter: it keeps the 16 bits in an integer and computes with them as an integer.

Here every operation on bfloat16 widens to float32, computes, and rounds to the nearest, ties to even, as a
GPU does. Reductions and scans on bfloat16 are refused: on a GPU their rounding depends on the order, so
kernels reduce in float32.
"""

from __future__ import annotations

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from linmu.optimized.engine import allow_interpreter_bfloat16

Handle = interpreter.TensorHandle
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
QUIET_NAN = 0x7FC0


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> the same values in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values -> bits of the nearest bfloat16, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.reshape(-1).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = np.where(np.isnan(values.reshape(-1)), QUIET_NAN, bits)
    return bits.astype(np.uint16).reshape(values.shape)


def is_bfloat16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def as_float32(handle: Handle) -> Handle:
    """A bfloat16 handle in float32; others as they are."""
    return Handle(widened(handle.data), tl.float32) if is_bfloat16(handle) else handle


def as_bfloat16(values: np.ndarray) -> Handle:
    return Handle(rounded(values), tl.bfloat16)


def mend_bfloat16() -> None:
    """Replace the interpreter's operations on bfloat16, for this process."""
    if hasattr(interpreter.InterpreterBuilder.cast_impl, "__wrapped__"):
        return
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = mended_cast(builder.cast_impl)
    builder.create_fp_to_fp = mended_conversion(builder.create_fp_to_fp)
    builder.binary_op = mended_binary(builder.binary_op)
    builder.unary_op = mended_unary(builder.unary_op)
    builder.create_dot = mended_dot(builder.create_dot)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply = refusing_bfloat16(operation.apply)
    allow_interpreter_bfloat16()


def mended_cast(original):
    @wraps(original)
    def cast(self, source, kind):
        if kind.scalar == tl.bfloat16:
            return source if is_bfloat16(source) else as_bfloat16(source.data.astype(np.float32))
        return original(self, as_float32(source), kind)

    return cast


def mended_conversion(original):
    @wraps(original)
    def convert(self, source, kind, rounding):
        if is_bfloat16(source) or kind.scalar == tl.bfloat16:
            return self.cast_impl(source, kind)
        return original(self, source, kind, rounding)

    return convert


def mended_binary(original):
    @wraps(original)
    def binary(self, left, right, operation):
        if not (is_bfloat16(left) and is_bfloat16(right)):
            return original(self, left, right, operation)
        values = operation(widened(left.data), widened(right.data))
        return Handle(values, tl.int1) if operation in COMPARISONS else as_bfloat16(values)

    return binary


def mended_unary(original):
    @wraps(original)
    def unary(self, argument, operation):
        if is_bfloat16(argument):
            return as_bfloat16(operation(widened(argument.data)))
        return original(self, argument, operation)

    return unary


def mended_dot(original):
    @wraps(original)
    def dot(self, left, right, accumulator, *settings):
        return original(self, as_float32(left), as_float32(right), accumulator, *settings)

    return dot


def refusing_bfloat16(original):
    @wraps(original)
    def apply(self, argument, *rest, **named):
        for part in argument if isinstance(argument, tuple) else (argument,):
            if part.dtype.scalar == tl.bfloat16:
                raise TypeError("bfloat16 reduction or scan: cast to float32 first")
        return original(self, argument, *rest, **named)

    return apply
