# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the hidden loss: one program a token, student and teacher read once in each pass.

Letters and equations as in `torch_engine`. Tokens that do not count are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import as_bytes, power_of_2, rows_of
from .operator import ErrorGrads, ErrorInputs, ErrorOutputs, error_outputs

BLOCK = 1024


@triton.jit
def errors_kernel(
    STUDENT, TEACHER, TAKEN, ERROR, SQUARES, s_batch, s_token, t_batch, t_token, length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_TAKEN: tl.constexpr,
):  # fmt: skip
    """Eq. (2), left, of one token: the reference's `hidden_loss` before its sums over tokens."""
    row = tl.cast(tl.program_id(0), tl.int64)
    width = WIDTH
    if HAS_TAKEN:
        width = tl.where(tl.load(TAKEN + row) != 0, WIDTH, 0)
    student = STUDENT + (row // length) * s_batch + (row % length) * s_token
    teacher = TEACHER + (row // length) * t_batch + (row % length) * t_token
    error = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(student + column, mask=column < width, other=0.0).to(tl.float32)
        t = tl.load(teacher + column, mask=column < width, other=0.0).to(tl.float32)
        error += (s - t) * (s - t)
        squares += t * t
    tl.store(ERROR + row, tl.sum(error, 0))
    tl.store(SQUARES + row, tl.sum(squares, 0))


@triton.jit
def errors_gradient_kernel(
    STUDENT, TEACHER, TAKEN, FACTOR, GRAD, s_batch, s_token, t_batch, t_token, length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_TAKEN: tl.constexpr,
):  # fmt: skip
    """Eq. (2), right, of one token, 0 if it does not count."""
    row = tl.cast(tl.program_id(0), tl.int64)
    width = WIDTH
    if HAS_TAKEN:
        width = tl.where(tl.load(TAKEN + row) != 0, WIDTH, 0)
    student = STUDENT + (row // length) * s_batch + (row % length) * s_token
    teacher = TEACHER + (row // length) * t_batch + (row % length) * t_token
    factor = 2 * tl.load(FACTOR + row)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(student + column, mask=column < width, other=0.0).to(tl.float32)
        t = tl.load(teacher + column, mask=column < width, other=0.0).to(tl.float32)
        grad = tl.where(column < width, factor * (s - t), 0.0)
        tl.store(GRAD + row * WIDTH + column, grad.to(GRAD.dtype.element_ty), mask=column < WIDTH)


def arguments(inputs: ErrorInputs) -> dict:
    """What both kernels take."""
    student, teacher = rows_of(inputs.student), rows_of(inputs.teacher)
    width = student.shape[2]
    block = min(BLOCK, power_of_2(width))
    return {
        "STUDENT": student,
        "TEACHER": teacher,
        "TAKEN": as_bytes(inputs.taken),
        "s_batch": student.stride(0),
        "s_token": student.stride(1),
        "t_batch": teacher.stride(0),
        "t_token": teacher.stride(1),
        "length": student.shape[1],
        "WIDTH": width,
        "BLOCK": block,
        "HAS_TAKEN": inputs.taken is not None,
        "num_warps": min(4, max(1, block // 256)),
    }


def errors(inputs: ErrorInputs) -> ErrorOutputs:
    """The operator on a Triton kernel."""
    outputs = error_outputs(inputs)
    errors_kernel[(outputs.error.numel(),)](**arguments(inputs), ERROR=outputs.error, SQUARES=outputs.size)
    return outputs


def errors_backward(inputs: ErrorInputs, outputs: ErrorOutputs, grads: ErrorOutputs) -> ErrorGrads:
    """Its gradient on a Triton kernel, in the dtype of the student."""
    student = inputs.student
    grad: Tensor = student.new_empty(student.shape)
    errors_gradient_kernel[(grad.shape[0] * grad.shape[1],)](
        **arguments(inputs), FACTOR=grads.error.contiguous(), GRAD=grad
    )
    return ErrorGrads(grad)
