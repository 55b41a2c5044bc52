# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for what the readers of the scan owe: the gradient of C, and the scalars of pairs of tokens.

Letters and equations as in `chunked_scan_backward`. Its eq. (3), the products that span a token, is summed
from the left as (row sum - column sum) of the pairs off the diagonal: without the diagonal, which both sums
would hold, what cancels is no larger than what stays.
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
def reader_kernel(
    X,
    B,
    C,
    Y_GRAD,
    DT,
    FORWARD,
    BACKWARD,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_READ,
    BACKWARD_READ,
    FORWARD_STATE,
    BACKWARD_STATE,
    C_GRAD,
    DT_GRAD,
    GATE_GRAD,
    FORWARD_PAIRS,
    BACKWARD_PAIRS,
    FORWARD_PULLED,
    BACKWARD_PULLED,
    x_batch,
    x_token,
    x_head,
    b_batch,
    b_token,
    b_head,
    c_batch,
    c_token,
    c_head,
    g_batch,
    g_token,
    g_head,
    length,
    chunks,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_N: tl.constexpr,
    STEP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of C, and the scalars of a chunk's readers: `inside_chunk` and `read_side` of the torch
    engine."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_N)
    place = tl.arange(0, CHUNK)
    rows, taken = chunk_rows(VALID, batch, chunk, length, CHUNK, HAS_VALID)
    at_segment = (batch * chunks + chunk) * CHUNK + place
    at_chunk = (batch * chunks + chunk) * HEADS + head
    at = at_chunk * CHUNK + place
    q = head_of(C, batch, c_batch, head, c_head)
    k = head_of(B, batch, b_batch, head // RATIO, b_head)
    v = head_of(X, batch, x_batch, head // RATIO, x_head)
    grad = head_of(Y_GRAD, batch, g_batch, head, g_head)
    decay, gates, dt, before, together, gate_forward, gate_backward = chunk_pairs(
        DT, FORWARD, BACKWARD, FORWARD_GATE, BACKWARD_GATE, SEGMENT, at, at_segment, True, HAS_VISION, CHUNK
    )
    target = decay * pair_products(grad, g_token, v, x_token, rows, taken, P, STEP_P, CHUNK, PRECISION)
    spent = target * pair_products(q, c_token, k, b_token, rows, taken, N, STEP_N, CHUNK, PRECISION)
    tl.store(DT_GRAD + at, tl.sum(spent * gates, 0))
    spent = spent * dt
    gate_grad = tl.sum(tl.where(before, spent, 0.0), 1)
    pairs = tl.where(place[:, None] > place[None, :], spent * gates, 0.0)
    tl.store(FORWARD_PAIRS + at, tl.sum(pairs, 1) - tl.sum(pairs, 0))
    if HAS_VISION:
        gate_grad -= tl.sum(tl.where(together, spent, 0.0), 1)
        tl.store(GATE_GRAD + at, gate_grad)
        pairs = tl.where(place[:, None] < place[None, :], spent * gates, 0.0)
        tl.store(BACKWARD_PAIRS + at, tl.sum(pairs, 1) - tl.sum(pairs, 0))
    k_tile = load_tile(k, rows, b_token, columns, taken, N).to(tl.float32)
    c_grad = tl.dot(as_factor(target * gates * dt, B), k_tile, input_precision=PRECISION)
    q_tile = load_tile(q, rows, c_token, columns, taken, N).to(tl.float32)
    state = FORWARD_STATE + at_chunk * (N * P)
    pulled = state_products(
        grad, g_token, rows, taken, state, columns, P, N, 1, P, BLOCK_N, STEP_P, CHUNK, PRECISION
    )
    read = tl.load(FORWARD_READ + at)
    c_grad += pulled * (read * gate_forward)[:, None]
    tl.store(FORWARD_PULLED + at, tl.sum(pulled * q_tile, 1) * read)
    if HAS_VISION:
        state = BACKWARD_STATE + at_chunk * (N * P)
        pulled = state_products(
            grad, g_token, rows, taken, state, columns, P, N, 1, P, BLOCK_N, STEP_P, CHUNK, PRECISION
        )
        read = tl.load(BACKWARD_READ + at)
        c_grad += pulled * (read * gate_backward)[:, None]
        tl.store(BACKWARD_PULLED + at, tl.sum(pulled * q_tile, 1) * read)
    out = C_GRAD + ((batch * length + rows) * HEADS + head)[:, None] * N + columns[None, :]
    where = (rows < length)[:, None] & (columns < N)[None, :]
    tl.store(out, c_grad.to(C_GRAD.dtype.element_ty), mask=where)


def read_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    y_grad: Tensor,
    decays: Decays,
    valid: Tensor | None,
    forward_state: Tensor,
    backward_state: Tensor | None,
) -> dict[str, Tensor | None]:
    """Run `reader_kernel`.

    Returns:
        C_GRAD (B, L, H, N), and (B, K, H, C) float32, None for a direction that is not there: DT_GRAD at
        fixed dt A; GATE_GRAD without what passes through the states; FORWARD_PAIRS and BACKWARD_PAIRS of eq.
        (3); FORWARD_PULLED and BACKWARD_PULLED, ȳ_i · read_i Sᵀ C_i without the gate.
    """
    has_vision = decays.segment is not None
    always, sometimes = (
        ("DT_GRAD", "FORWARD_PAIRS", "FORWARD_PULLED"),
        ("GATE_GRAD", "BACKWARD_PAIRS", "BACKWARD_PULLED"),
    )
    results = {name: torch.empty_like(decays.dt) for name in always}
    results |= {name: torch.empty_like(decays.dt) if has_vision else None for name in sometimes}
    results["C_GRAD"] = C.new_empty(C.shape)
    batch, chunks, heads, _ = decays.dt.shape
    state, head_dim = C.shape[3], x.shape[3]
    reader_kernel[(heads * chunks, batch)](
        x,
        B,
        C,
        y_grad,
        **pair_arguments(decays, valid),
        **stride_arguments(x=x, b=B, c=C, g=y_grad),
        **results,
        FORWARD_READ=decays.forward_read(),
        BACKWARD_READ=decays.backward_read() if has_vision else None,
        FORWARD_STATE=forward_state,
        BACKWARD_STATE=backward_state,
        length=x.shape[1],
        RATIO=heads // x.shape[2],
        N=state,
        P=head_dim,
        BLOCK_N=tile_size(state),
        STEP_N=step_size(state, x.dtype),
        STEP_P=step_size(head_dim, x.dtype),
        PRECISION=precision(x.dtype),
        num_warps=8,
        num_stages=1,
    )
    return results
