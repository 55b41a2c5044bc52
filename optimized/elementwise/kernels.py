# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the mix of the two branches: every element is read once and written once.

Letters and equation as in `mixing`; the last lines of the reference's `MMATE.forward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import launching, power_of_2

BLOCK = 1024


@triton.jit
def mix_kernel(
    FLEX,
    LOCAL,
    LOGIT,
    ROW,
    OUT,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eq. (1), left, for one token."""
    token = tl.cast(tl.program_id(0), tl.int64)
    row = tl.load(ROW + token)
    is_vision = row >= 0
    mix = tl.sigmoid(tl.load(LOGIT + token))
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = token * WIDTH + column
        flex = tl.load(FLEX + place, mask=column < WIDTH, other=0.0)
        seen = column < tl.where(is_vision, WIDTH, 0)
        local = tl.load(LOCAL + row * WIDTH + column, mask=seen, other=0.0).to(tl.float32)
        mixed = mix * flex.to(tl.float32) + (1.0 - mix) * local
        out = tl.where(is_vision, mixed, flex.to(tl.float32))
        tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def mix_gradient_kernel(
    GRAD,
    FLEX,
    LOCAL,
    LOGIT,
    ROW,
    FLEX_GRAD,
    LOCAL_GRAD,
    LOGIT_GRAD,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eq. (1), right, for one token."""
    token = tl.cast(tl.program_id(0), tl.int64)
    row = tl.load(ROW + token)
    is_vision = row >= 0
    mix = tl.sigmoid(tl.load(LOGIT + token))
    own = tl.where(is_vision, mix, 1.0)
    other = tl.where(is_vision, 1.0 - mix, 0.0)
    seen = tl.where(is_vision, WIDTH, 0)
    through = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = token * WIDTH + column
        grad = tl.load(GRAD + place, mask=column < WIDTH, other=0.0).to(tl.float32)
        flex = tl.load(FLEX + place, mask=column < seen, other=0.0).to(tl.float32)
        there = row * WIDTH + column
        local = tl.load(LOCAL + there, mask=column < seen, other=0.0).to(tl.float32)
        through += grad * (flex - local)
        tl.store(FLEX_GRAD + place, (own * grad).to(FLEX_GRAD.dtype.element_ty), mask=column < WIDTH)
        tl.store(LOCAL_GRAD + there, (other * grad).to(LOCAL_GRAD.dtype.element_ty), mask=column < seen)
    tl.store(LOGIT_GRAD + token, own * other * tl.sum(through, 0))


def block_of(width: int) -> int:
    """Columns that a program takes at a time."""
    return min(BLOCK, power_of_2(width))


@launching
def forward(flex: Tensor, local: Tensor, logit: Tensor, row: Tensor) -> Tensor:
    """`mixing.forward` on a Triton kernel."""
    flex, local, logit, row = (tensor.contiguous() for tensor in (flex, local, logit, row))
    out, width = torch.empty_like(flex), flex.shape[-1]
    mix_kernel[(row.numel(),)](flex, local, logit, row, out, WIDTH=width, BLOCK=block_of(width), num_warps=4)
    return out


@launching
def gradient(
    grad: Tensor, flex: Tensor, local: Tensor, logit: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixing.gradient` on a Triton kernel."""
    grad, flex, local, logit, row = (tensor.contiguous() for tensor in (grad, flex, local, logit, row))
    grads = torch.empty_like(flex), torch.zeros_like(local), torch.empty_like(logit)
    width = flex.shape[-1]
    mix_gradient_kernel[(row.numel(),)](
        grad, flex, local, logit, row, *grads, WIDTH=width, BLOCK=block_of(width), num_warps=4
    )
    return grads
