# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for RoPE and its gradient: every element is read once and written once.

Letters: B batch, L tokens, N head dim. Halves a, b of a head, and their gradients:

    a' = a cos₁ - b sin₁    b' = b cos₂ + a sin₂       ā = ā' cos₁ + b̄' sin₂    b̄ = b̄' cos₂ - ā' sin₁    (1)

`reference/projections.py`, eq. (1).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import launching, power_of_2
from ..scan.kernels.tiles import rows_of


@triton.jit
def rope_kernel(
    X,
    COS,
    SIN,
    TOKEN,
    OUT,
    x_batch,
    x_token,
    x_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    length,
    angles,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    TAKES: tl.constexpr,
):
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


@launching
def rotate(x: Tensor, cos: Tensor, sin: Tensor, token: Tensor | None, backward: bool) -> Tensor:
    """`rope.rotate` on a Triton kernel."""
    x, cos, sin = rows_of(x), rows_of(cos), rows_of(sin)
    batch, length, heads, size = x.shape
    out = x.new_empty(x.shape)
    rope_kernel[(batch * length,)](
        x,
        cos,
        sin,
        token,
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
        BACKWARD=backward,
        TAKES=token is not None,
        num_warps=4,
    )
    return out
