# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for what the writers of the scan owe: the gradients of x and of B.

Letters and equations as in `chunked_scan_backward`. A program loops over the heads that share a group, so
nothing is added atomically, and forms (C Bᵀ)ᵀ = B Cᵀ as a product of its own instead of transposing a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan_decays import Decays
from .scan_tiles import (
    as_factor,
    chunk_pairs,
    chunk_rows,
    head_of,
    load_tile,
    pair_arguments,
    pair_products,
    precision,
    state_products,
    step_size,
    stride_arguments,
    tile_size,
)


@triton.jit
def writer_kernel(
    OWN,
    CROSS,
    VALUE,
    TARGET,
    DT,
    FORWARD,
    BACKWARD,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_WRITE,
    BACKWARD_WRITE,
    FORWARD_STATE,
    BACKWARD_STATE,
    GRAD,
    FORWARD_PULLED,
    BACKWARD_PULLED,
    own_batch,
    own_token,
    own_head,
    cross_batch,
    cross_token,
    cross_head,
    value_batch,
    value_token,
    value_head,
    target_batch,
    target_token,
    target_head,
    length,
    chunks,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    PULLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of TARGET, head by head of a group: `inside_chunk` and `write_side` of the torch engine.

    With own, cross, value, target = B, C, ȳ, x or x, ȳ, C, B. The sums B_jᵀ S̄ x_j come from either; PULLS
    says whether they are stored.
    """
    groups = HEADS // RATIO
    group = tl.program_id(0) % groups
    chunk = tl.program_id(0) // groups
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_OUTER)
    rows, taken = chunk_rows(VALID, batch, chunk, length, CHUNK, HAS_VALID)
    at_segment = (batch * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    own = head_of(OWN, batch, own_batch, group, own_head)
    grad = tl.zeros([CHUNK, BLOCK_OUTER], tl.float32)
    for member in range(RATIO):
        head = group * RATIO + member
        at_chunk = (batch * chunks + chunk) * HEADS + head
        at = at_chunk * CHUNK + tl.arange(0, CHUNK)
        cross = head_of(CROSS, batch, cross_batch, head, cross_head)
        value = head_of(VALUE, batch, value_batch, head, value_head)
        decay, gates, dt, _, _, _, _ = chunk_pairs(
            DT,
            FORWARD,
            BACKWARD,
            FORWARD_GATE,
            BACKWARD_GATE,
            SEGMENT,
            at,
            at_segment,
            False,
            HAS_VISION,
            CHUNK,
        )
        weights = pair_products(
            own, own_token, cross, cross_token, rows, taken, INNER, STEP, CHUNK, PRECISION
        )
        weights = weights * decay * gates * dt
        tile = load_tile(value, rows, value_token, columns, taken, OUTER).to(tl.float32)
        grad = tl.dot(as_factor(weights, VALUE), tile, grad, input_precision=PRECISION)
        state = FORWARD_STATE + at_chunk * (INNER * OUTER)
        pulled = state_products(
            own,
            own_token,
            rows,
            taken,
            state,
            columns,
            INNER,
            OUTER,
            INNER_STRIDE,
            OUTER_STRIDE,
            BLOCK_OUTER,
            STEP,
            CHUNK,
            PRECISION,
        )
        grad += pulled * tl.load(FORWARD_WRITE + at)[:, None]
        if PULLS:
            target = head_of(TARGET, batch, target_batch, group, target_head)
            tile = load_tile(target, rows, target_token, columns, taken, OUTER)
            tl.store(FORWARD_PULLED + at, tl.sum(pulled * tile.to(tl.float32), 1))
        if HAS_VISION:
            state = BACKWARD_STATE + at_chunk * (INNER * OUTER)
            pulled = state_products(
                own,
                own_token,
                rows,
                taken,
                state,
                columns,
                INNER,
                OUTER,
                INNER_STRIDE,
                OUTER_STRIDE,
                BLOCK_OUTER,
                STEP,
                CHUNK,
                PRECISION,
            )
            grad += pulled * tl.load(BACKWARD_WRITE + at)[:, None]
            if PULLS:
                target = head_of(TARGET, batch, target_batch, group, target_head)
                tile = load_tile(target, rows, target_token, columns, taken, OUTER)
                tl.store(BACKWARD_PULLED + at, tl.sum(pulled * tile.to(tl.float32), 1))
    out = GRAD + ((batch * length + rows) * groups + group)[:, None] * OUTER + columns[None, :]
    where = (rows < length)[:, None] & (columns < OUTER)[None, :]
    tl.store(out, grad.to(GRAD.dtype.element_ty), mask=where)


def write_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    y_grad: Tensor,
    decays: Decays,
    valid: Tensor | None,
    D: Tensor | None,
    forward_grad: Tensor,
    backward_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run `writer_kernel` twice.

    Returns:
        The gradients of x (B, L, G, P) and of B (B, L, G, N), and for each direction B_jᵀ S̄ x_j, the write
        weight left out, (B, K, H, C) float32.
    """
    has_vision = backward_grad is not None
    pulled = [torch.empty_like(decays.dt), torch.empty_like(decays.dt) if has_vision else None]
    shared = pair_arguments(decays, valid) | {
        "FORWARD_WRITE": decays.forward_write(),
        "BACKWARD_WRITE": decays.backward_write() if has_vision else None,
        "FORWARD_STATE": forward_grad,
        "BACKWARD_STATE": backward_grad,
        "FORWARD_PULLED": pulled[0],
        "BACKWARD_PULLED": pulled[1],
    }
    head_dim = x.shape[3]
    x_grad = write_one(B, C, y_grad, x, shared, INNER_STRIDE=head_dim, OUTER_STRIDE=1, PULLS=False)
    if D is not None:
        x_grad = with_skip(x_grad, y_grad, valid, D)
    b_grad = write_one(x, y_grad, C, B, shared, INNER_STRIDE=1, OUTER_STRIDE=head_dim, PULLS=True)
    return x_grad, b_grad, *pulled


def with_skip(x_grad: Tensor, y_grad: Tensor, valid: Tensor | None, D: Tensor) -> Tensor:
    """Add what D x owes x; in torch, where it takes none of the kernel's registers."""
    groups = x_grad.shape[2]
    by_member = y_grad.unflatten(2, (groups, -1)).unbind(3)  # H/G times (B, L, G, P)
    total = x_grad.float()
    for member, weight in zip(by_member, D.float().view(groups, -1).unbind(1), strict=True):
        total.addcmul_(member, weight[:, None])
    if valid is not None:
        total = torch.where(valid[:, :, None, None], total, 0)
    return total.to(x_grad.dtype)


def write_one(own: Tensor, cross: Tensor, value: Tensor, target: Tensor, shared: dict, **chosen) -> Tensor:
    """Launch `writer_kernel`: (B, L, G, inner), (B, L, H, inner), (B, L, H, outer) -> (B, L, G, outer)."""
    batch, length, groups, inner = own.shape
    outer = value.shape[3]
    grad = own.new_empty(batch, length, groups, outer)
    writer_kernel[(groups * shared["chunks"], batch)](
        own,
        cross,
        value,
        target,
        GRAD=grad,
        **shared,
        **chosen,
        **stride_arguments(own=own, cross=cross, value=value, target=target),
        length=length,
        RATIO=shared["HEADS"] // groups,
        INNER=inner,
        OUTER=outer,
        BLOCK_OUTER=tile_size(outer),
        STEP=step_size(inner, own.dtype),
        PRECISION=precision(own.dtype),
        num_warps=8,
        num_stages=1,
    )
    return grad
