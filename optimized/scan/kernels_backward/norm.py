# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the gradient of the norm of each head, which takes z̄ from token order into scan order.

Letters and equations as in `torch_engine.norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import ceil_div, contiguous, rows_of, stride_arguments, tile_size
from ..kernels.tiles import head_of, load_tile
from ..operator import ScanInputs

ROWS = 32


@triton.jit
def norm_gradient_kernel(
    Z_GRAD, Y, NORM, ORDER, Y_GRAD, WEIGHT_GRAD, z_batch, z_token, z_head, length, eps,
    HEADS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Eq. (1), right, for a block of places of one head, and what it adds to w̄."""
    head = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_P)
    rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    real = rows < length
    token = rows
    if HAS_ORDER:
        token = tl.load(ORDER + batch * length + rows, mask=real, other=0)
    place = (batch * length + rows) * HEADS + head
    base = head_of(Z_GRAD, batch, z_batch, head, z_head)
    z_grad = load_tile(base, token, z_token, columns, real, P).to(tl.float32)
    where = real[:, None] & (columns < P)[None, :]
    y = tl.load(Y + place[:, None] * P + columns[None, :], mask=where, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / P + eps)
    weight = tl.load(NORM + head * P + columns, mask=columns < P, other=0.0).to(tl.float32)
    normed = y * scale[:, None]
    part = (batch * (tl.num_programs(0) // HEADS) + block) * HEADS + head
    tl.store(WEIGHT_GRAD + part * P + columns, tl.sum(normed * z_grad, 0), mask=columns < P)
    weighed = z_grad * weight[None, :]
    y_grad = scale[:, None] * (weighed - normed * (tl.sum(normed * weighed, 1) / P)[:, None])
    out = Y_GRAD + place[:, None] * P + columns[None, :]
    tl.store(out, y_grad.to(Y_GRAD.dtype.element_ty), mask=where)


def norm_backward(inputs: ScanInputs, y: Tensor, z_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Run `norm_gradient_kernel`: the gradients of y, in its dtype and scan order, and of w (H·P,); partial
    sums are added in a fixed order.
    """
    z_grad = rows_of(z_grad)
    batch, length, heads, head_dim = y.shape
    blocks = ceil_div(length, ROWS)
    y_grad = torch.empty_like(y)
    parts = y.new_empty(batch * blocks, heads * head_dim, dtype=torch.float32)
    norm_gradient_kernel[(heads * blocks, batch)](
        z_grad,
        y,
        inputs.norm_weight.contiguous(),
        contiguous(inputs.order),
        y_grad,
        parts,
        **stride_arguments(z=z_grad),
        length=length,
        eps=inputs.eps,
        HEADS=heads,
        P=head_dim,
        BLOCK_P=tile_size(head_dim),
        ROWS=ROWS,
        HAS_ORDER=inputs.order is not None,
        num_warps=4,
    )
    return y_grad, parts.sum(0)
