# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the read side of the scan's gradient: that of C, and the scalars of their pairs.

Letters and equations as in `torch_engine.backward`. Its eq. (3), the products that span a token, is summed
from the left as (row sum - column sum) of the pairs off the diagonal, row sums here, column sums with the
writers: without the diagonal, which both sums would hold, what cancels is no larger than what stays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import stride_arguments, tile_size
from ..kernels.scalars import Scalars
from ..kernels.tiles import (
    add_product,
    gate_of,
    head_of,
    load_tile,
    pair_decay,
    pair_gates,
    pair_masks,
    pair_products,
    state_products,
    step_size,
    token_rows,
)


@triton.jit
def reader_kernel(
    X, B, C, Y_GRAD, DT, FORWARD_SUM, REVERSE_SUM, FORWARD_GATE, REVERSE_GATE, SEGMENT, BEGIN, VALID,
    FORWARD_READ_DECAY, REVERSE_READ_DECAY, FORWARD_STATE, REVERSE_STATE, C_GRAD, SKIP_GRAD, GATE_GRAD,
    FORWARD_SPANS, REVERSE_SPANS, FORWARD_READ_PRODUCT, REVERSE_READ_PRODUCT,
    x_batch, x_token, x_head, b_batch, b_token, b_head, c_batch, c_token, c_head, g_batch, g_token, g_head,
    length, chunks,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP_N: tl.constexpr, STEP_P: tl.constexpr, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """The gradient of C, and the scalars of a chunk of one head: `inside_chunk` and `read_side` of the torch
    engine."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_N)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    place = tl.arange(0, CHUNK)
    at = at_chunk * CHUNK + place
    rows, valid = token_rows(VALID, batch, chunk * CHUNK, length, CHUNK, HAS_VALID)
    q = head_of(C, batch, c_batch, head, c_head)
    k = head_of(B, batch, b_batch, head // RATIO, b_head)
    v = head_of(X, batch, x_batch, head // RATIO, x_head)
    grad = head_of(Y_GRAD, batch, g_batch, head, g_head)
    q_tile = load_tile(q, rows, c_token, columns, valid, N).to(tl.float32)
    state = FORWARD_STATE + at_chunk * (N * P)
    pulled = state_products(grad, g_token, rows, valid, state, columns, P, N, 1, P, BLOCK_N, STEP_P, CHUNK)
    read = tl.load(FORWARD_READ_DECAY + at)
    tl.store(FORWARD_READ_PRODUCT + at, tl.sum(pulled * q_tile, 1) * read)
    c_grad = pulled * (read * gate_of(FORWARD_GATE, at, HAS_VISION))[:, None]
    if HAS_VISION:
        state = REVERSE_STATE + at_chunk * (N * P)
        pulled = state_products(
            grad, g_token, rows, valid, state, columns, P, N, 1, P, BLOCK_N, STEP_P, CHUNK
        )
        read = tl.load(REVERSE_READ_DECAY + at)
        tl.store(REVERSE_READ_PRODUCT + at, tl.sum(pulled * q_tile, 1) * read)
        c_grad += pulled * (read * tl.load(REVERSE_GATE + at))[:, None]
    i, j = place[:, None], place[None, :]
    target = pair_products(grad, g_token, rows, valid, v, x_token, rows, valid, P, STEP_P, CHUNK)
    tl.store(SKIP_GRAD + at, tl.sum(tl.where(i == j, target, 0.0), 1))
    target *= pair_decay(i, j, FORWARD_SUM, REVERSE_SUM, at[:, None], at[None, :], HAS_VISION)
    target *= tl.load(DT + at)[None, :]
    spent = target * pair_products(q, c_token, rows, valid, k, b_token, rows, valid, N, STEP_N, CHUNK)
    at_segment = (batch * chunks + chunk) * CHUNK
    before, together = pair_masks(i, j, SEGMENT, BEGIN, at_segment, HAS_VISION, HAS_SEQUENCE)
    if HAS_VISION:
        gate_grad = tl.where(before, spent, 0.0) - tl.where(together, spent, 0.0)
        tl.store(GATE_GRAD + at, tl.sum(gate_grad, 1))
    gates = pair_gates(before, together, FORWARD_GATE, REVERSE_GATE, at[:, None], HAS_VISION)
    spent *= gates
    # Pairs that span token k, summed as such: differences of sums would leave the rounding of the largest.
    spans = tl.sum(tl.where(j < i, tl.cumsum(tl.where(j < i, spent, 0.0), 1), 0.0), 0)  # k = j + 1
    tl.store(FORWARD_SPANS + at + 1, spans, mask=place < CHUNK - 1)
    tl.store(FORWARD_SPANS + at, tl.zeros([CHUNK], tl.float32), mask=place == 0)
    if HAS_VISION:
        passed = tl.cumsum(tl.where(j > i, spent, 0.0), 1, reverse=True)
        spans = tl.sum(tl.where(j > i, passed, 0.0), 0)  # k = j - 1
        tl.store(REVERSE_SPANS + at - 1, spans, mask=place > 0)
        tl.store(REVERSE_SPANS + at, tl.zeros([CHUNK], tl.float32), mask=place == CHUNK - 1)
    c_grad = add_product(target * gates, load_tile(k, rows, b_token, columns, valid, N), c_grad)
    out = C_GRAD + ((batch * length + rows) * HEADS + head)[:, None] * N + columns[None, :]
    where = (rows < length)[:, None] & (columns < N)[None, :]
    tl.store(out, c_grad.to(C_GRAD.dtype.element_ty), mask=where)


def read_gradients(
    x: Tensor, B: Tensor, C: Tensor, y_grad: Tensor, scalars: Scalars, states: Tensor
) -> dict[str, Tensor | None]:
    """Run `reader_kernel`.

    Returns:
        C_GRAD (B, L, H, N), and (B, K, H, C) float32, None for a direction that is not there: SKIP_GRAD, that
        of D; GATE_GRAD without what passes through the states; FORWARD_SPANS and REVERSE_SPANS, for each
        token the sum of eq. (3)'s terms whose decay contains its own; FORWARD_READ_PRODUCT and
        REVERSE_READ_PRODUCT, ȳ_i · read_i Sᵀ C_i without the gate.
    """
    has_vision = scalars.gates is not None
    always = ("SKIP_GRAD", "FORWARD_SPANS", "FORWARD_READ_PRODUCT")
    sometimes = ("GATE_GRAD", "REVERSE_SPANS", "REVERSE_READ_PRODUCT")
    results = {name: torch.empty_like(scalars.dt) for name in always}
    results |= {name: torch.empty_like(scalars.dt) if has_vision else None for name in sometimes}
    results["C_GRAD"] = C.new_empty(C.shape)
    batch, chunks, heads, _ = scalars.dt.shape
    state, head_dim = C.shape[3], x.shape[3]
    reader_kernel[(heads * chunks, batch)](
        x,
        B,
        C,
        y_grad,
        **scalars.arguments(),
        **scalars.by_direction("READ_DECAY", scalars.read_decay),
        **scalars.by_direction("STATE", states),
        **stride_arguments(x=x, b=B, c=C, g=y_grad),
        **results,
        length=x.shape[1],
        RATIO=heads // x.shape[2],
        N=state,
        P=head_dim,
        BLOCK_N=tile_size(state),
        STEP_N=step_size(state, x.dtype),
        STEP_P=step_size(head_dim, x.dtype),
        num_warps=8,
        num_stages=1,
    )
    return results
