# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the logit loss: one program a token, the vocabulary in blocks, nothing kept but two
sums.

Letters and equations as in `torch_engine`. Tokens that are not supervised are skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import as_bytes, power_of_2, rows_of
from .operator import LossGrads, LossInputs, LossOutputs

BLOCK = 2048


@triton.jit
def log_sum(LOGITS, inverse, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """log Σ exp(logits · inverse) of one row."""
    place = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        logits = tl.load(LOGITS + start + place, mask=start + place < SIZE, other=-float("inf"))
        logits = logits.to(tl.float32) * inverse
        highest = tl.maximum(largest, logits)
        safe = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(largest - safe) + tl.exp(logits - safe)
        largest = highest
    top = tl.max(largest, 0)
    return top + tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def divergence_kernel(
    STUDENT, TEACHER, MASK, OUT, s_batch, s_token, t_batch, t_token, length, inverse,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Σ_v p_t (log p_t - log p_s) of one token, 0 if it is not supervised: eq. (2) of the reference."""
    row = tl.cast(tl.program_id(0), tl.int64)
    supervised = row >= 0
    if HAS_MASK:
        supervised = tl.load(MASK + row) != 0
    total = 0.0
    if supervised:
        student = STUDENT + (row // length) * s_batch + (row % length) * s_token
        teacher = TEACHER + (row // length) * t_batch + (row % length) * t_token
        sum_s = log_sum(student, inverse, SIZE, BLOCK)
        sum_t = log_sum(teacher, inverse, SIZE, BLOCK)
        place = tl.arange(0, BLOCK)
        parts = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            inside = start + place < SIZE
            log_s = tl.load(student + start + place, mask=inside, other=0.0).to(tl.float32) * inverse - sum_s
            log_t = tl.load(teacher + start + place, mask=inside, other=0.0).to(tl.float32) * inverse - sum_t
            parts += tl.where(inside, tl.exp(log_t) * (log_t - log_s), 0.0)
        total = tl.sum(parts, 0)
    tl.store(OUT + row, total)


@triton.jit
def gradient_kernel(
    STUDENT, TEACHER, MASK, FACTOR, GRAD, s_batch, s_token, t_batch, t_token, length, inverse,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """factor · (p_s - p_t) of one token, 0 if it is not supervised."""
    row = tl.cast(tl.program_id(0), tl.int64)
    supervised = row >= 0
    if HAS_MASK:
        supervised = tl.load(MASK + row) != 0
    place = tl.arange(0, BLOCK)
    out = GRAD + row * SIZE
    if supervised:
        student = STUDENT + (row // length) * s_batch + (row % length) * s_token
        teacher = TEACHER + (row // length) * t_batch + (row % length) * t_token
        sum_s = log_sum(student, inverse, SIZE, BLOCK)
        sum_t = log_sum(teacher, inverse, SIZE, BLOCK)
        factor = tl.load(FACTOR)
        for start in range(0, SIZE, BLOCK):
            inside = start + place < SIZE
            log_s = tl.load(student + start + place, mask=inside, other=0.0).to(tl.float32) * inverse - sum_s
            log_t = tl.load(teacher + start + place, mask=inside, other=0.0).to(tl.float32) * inverse - sum_t
            grad = factor * (tl.exp(log_s) - tl.exp(log_t))
            tl.store(out + start + place, grad.to(GRAD.dtype.element_ty), mask=inside)
    else:
        for start in range(0, SIZE, BLOCK):
            nothing = tl.zeros([BLOCK], GRAD.dtype.element_ty)
            tl.store(out + start + place, nothing, mask=start + place < SIZE)


def arguments(inputs: LossInputs, student: Tensor, teacher: Tensor) -> dict:
    """What both kernels take."""
    return {
        "STUDENT": student,
        "TEACHER": teacher,
        "MASK": as_bytes(inputs.mask),
        "s_batch": student.stride(0),
        "s_token": student.stride(1),
        "t_batch": teacher.stride(0),
        "t_token": teacher.stride(1),
        "length": student.shape[1],
        "inverse": 1 / inputs.temperature,
        "SIZE": student.shape[2],
        "BLOCK": min(BLOCK, power_of_2(student.shape[2])),
        "HAS_MASK": inputs.mask is not None,
        "num_warps": 8,
    }


def supervised_count(student: Tensor, mask: Tensor | None) -> Tensor:
    """n of eq. (1), at least 1, left on the device."""
    if mask is None:
        return torch.full((), student.shape[0] * student.shape[1], device=student.device)
    return mask.sum().clamp_min(1)


def forward(inputs: LossInputs) -> Tensor:
    """The operator on a Triton kernel: a float32 scalar."""
    student, teacher = rows_of(inputs.student), rows_of(inputs.teacher)
    rows = student.new_empty(student.shape[:2], dtype=torch.float32)
    divergence_kernel[(rows.numel(),)](**arguments(inputs, student, teacher), OUT=rows)
    return rows.sum() * inputs.temperature**2 / supervised_count(student, inputs.mask)


def backward(inputs: LossInputs, outputs: LossOutputs, grads: LossOutputs) -> LossGrads:
    """Its gradient on a Triton kernel, in the dtype of the student."""
    student, teacher = rows_of(inputs.student), rows_of(inputs.teacher)
    factor = grads.loss.float() * inputs.temperature / supervised_count(student, inputs.mask)
    grad, tokens = student.new_empty(student.shape), student.shape[0] * student.shape[1]
    gradient_kernel[(tokens,)](**arguments(inputs, student, teacher), FACTOR=factor, GRAD=grad)
    return LossGrads(grad)
