# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for RoPE, for the mix of the two branches, and their gradients, and for the sum of a narrow
product's parts: every element is read once and written once.

Letters and equations as in `torch_engine`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import ceil_div, power_of_2, rows_of
from .operator import (
    HeadsInputs,
    MixGrads,
    MixInputs,
    MixOutputs,
    RotateGrads,
    RotateInputs,
    RotateOutputs,
)

BLOCK = 1024


@triton.jit
def rope_kernel(
    X, COS, SIN, TOKEN, OUT, x_batch, x_token, x_head, cos_batch, cos_token, sin_batch, sin_token,
    length, angles,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BACKWARD: tl.constexpr, TAKES: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for all heads of one token; if it TAKES angles, by those of TOKEN among rows of so many."""
    token = tl.cast(tl.program_id(0) % length, tl.int64)
    batch = tl.cast(tl.program_id(0) // length, tl.int64)
    angle_token, angle_batch = token, batch
    if TAKES:
        place = tl.load(TOKEN + tl.program_id(0)).to(tl.int32)
        angle_token, angle_batch = tl.cast(place % angles, tl.int64), tl.cast(place // angles, tl.int64)
    head, n = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    real = n < HALF
    cos = COS + angle_batch * cos_batch + angle_token * cos_token + n
    sin = SIN + angle_batch * sin_batch + angle_token * sin_token + n
    first_cos = tl.load(cos, mask=real, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin, mask=real, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    inside = (head < HEADS)[:, None] & real[None, :]
    x = X + batch * x_batch + token * x_token + tl.cast(head, tl.int64)[:, None] * x_head + n[None, :]
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        first, second = a * first_cos + b * second_sin, b * second_cos - a * first_sin
    else:
        first, second = a * first_cos - b * first_sin, b * second_cos + a * second_sin
    out = OUT + ((batch * length + token) * HEADS + head[:, None]) * (2 * HALF) + n[None, :]
    tl.store(out, first.to(OUT.dtype.element_ty), mask=inside)
    tl.store(out + HALF, second.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def parts_kernel(PRODUCT, BIAS, OUT, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Eq. (1) of `narrow_product` for one token: three products side by side, of PARTS columns each."""
    token = tl.cast(tl.program_id(0), tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < COLUMNS
    total = tl.load(BIAS + column, mask=real, other=0.0)
    for part in tl.static_range(3):
        total += tl.load(PRODUCT + token * (3 * PARTS) + part * PARTS + column, mask=real, other=0.0)
    tl.store(OUT + token * COLUMNS + column, total, mask=real)


def sum_parts(product: Tensor, bias: Tensor) -> Tensor:
    """(B, 3n) and (columns,), columns <= n, both float32 -> (B, columns)."""
    out = product.new_empty(len(product), len(bias))
    sizes = {"COLUMNS": len(bias), "PARTS": product.shape[1] // 3, "BLOCK": power_of_2(len(bias))}
    parts_kernel[(len(product),)](product, bias, out, **sizes, num_warps=1)
    return out


def rotate(inputs: RotateInputs) -> Tensor:
    """RoPE on a Triton kernel."""
    x, cos, sin = map(rows_of, inputs[:3])
    batch, length, heads, size = x.shape
    out = x.new_empty(x.shape)
    rope_kernel[(batch * length,)](
        x,
        cos,
        sin,
        inputs.token,
        out,
        *x.stride()[:3],
        *(cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        *(sin.stride(0) if len(sin) > 1 else 0, sin.stride(1)),
        length,
        cos.shape[1],
        HEADS=heads,
        HALF=size // 2,
        BLOCK_HEADS=power_of_2(heads),
        BLOCK_HALF=power_of_2(size // 2),
        BACKWARD=inputs.backward,
        TAKES=inputs.token is not None,
        num_warps=4,
    )
    return out


def rotate_backward(inputs: RotateInputs, outputs: RotateOutputs, grads: RotateOutputs) -> RotateGrads:
    """The gradient of y, which stands in the place of x, rotated back."""
    return RotateGrads(rotate(inputs._replace(backward=not inputs.backward)))


@triton.jit
def mix_kernel(
    FLEX, LOCAL, LOGIT, ROW, OUT, logit_token,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. (2), left, for one token."""
    token = tl.cast(tl.program_id(0), tl.int64)
    row = tl.load(ROW + token)
    is_vision = row >= 0
    mix = tl.sigmoid(tl.load(LOGIT + token * logit_token))
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
def heads_kernel(
    FLEX, LOCAL, LOGIT, ROW, OUT, flex_batch, local_batch, logit_batch,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`torch_engine.scale_heads` for some columns of one token's branch."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token = tl.cast(tl.program_id(0) // (2 * blocks), tl.int64)
    branch = tl.program_id(0) // blocks % 2
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_mixed = tl.load(ROW + token) >= 0
    mix = tl.where(is_mixed, tl.sigmoid(tl.load(LOGIT + token * logit_batch).to(tl.float32)), 1.0)
    if branch == 0:
        heads = tl.load(FLEX + token * flex_batch + column, mask=column < WIDTH, other=0.0)
    else:  # elsewhere it may hold anything
        seen = column < tl.where(is_mixed, WIDTH, 0)
        heads = tl.load(LOCAL + token * local_batch + column, mask=seen, other=0.0)
        mix = 1.0 - mix
    out = (mix * heads.to(tl.float32)).to(OUT.dtype.element_ty)
    tl.store(OUT + (2 * token + branch) * WIDTH + column, out, mask=column < WIDTH)


@triton.jit
def mix_gradient_kernel(
    GRAD, FLEX, LOCAL, LOGIT, ROW, FLEX_GRAD, LOCAL_GRAD, LOGIT_GRAD,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. (2), right, for one token."""
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


def mix(inputs: MixInputs) -> Tensor:
    """The mix on a Triton kernel."""
    flex, local, row = (tensor.contiguous() for tensor in (inputs.flex, inputs.local, inputs.row))
    logit, out, width = inputs.logit.reshape(-1), torch.empty_like(flex), flex.shape[-1]
    sizes = {"WIDTH": width, "BLOCK": block_of(width)}
    mix_kernel[(row.numel(),)](flex, local, logit, row, out, logit.stride(0), **sizes, num_warps=4)
    return out


def scale_heads(inputs: HeadsInputs) -> Tensor:
    """The operator on a Triton kernel."""
    flex, local, width = rows_of(inputs.flex), rows_of(inputs.local), inputs.flex.shape[1]
    out, block = flex.new_empty(len(flex), 2 * width), block_of(width)
    heads_kernel[(2 * len(flex) * ceil_div(width, block),)](
        flex,
        local,
        inputs.logit,
        inputs.row.contiguous(),
        out,
        flex.stride(0),
        local.stride(0),
        inputs.logit.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return out


def mix_backward(inputs: MixInputs, outputs: MixOutputs, grads: MixOutputs) -> MixGrads:
    """Its gradient on a Triton kernel."""
    grad, flex, local, logit, row = (tensor.contiguous() for tensor in (grads.y, *inputs[:4]))
    found = MixGrads(torch.empty_like(flex), torch.zeros_like(local), torch.empty_like(logit))
    width = flex.shape[-1]
    mix_gradient_kernel[(row.numel(),)](
        grad, flex, local, logit, row, *found, WIDTH=width, BLOCK=block_of(width), num_warps=4
    )
    return found
