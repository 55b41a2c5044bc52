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
from .scan_output import pair_weights, scalar_arguments, stride_arguments
from .scan_states import load_tile, precision, tile_size


@triton.jit
def reader_kernel(
    X,
    B,
    C,
    Y_GRAD,
    DT,
    FORWARD,
    FORWARD_READ,
    BACKWARD,
    BACKWARD_READ,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_STATE,
    BACKWARD_STATE,
    C_GRAD,
    DT_GRAD,
    GATE_GRAD,
    FORWARD_PAIRS,
    BACKWARD_PAIRS,
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
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of C, and the scalars of a chunk's pairs: `inside_chunk` and `read_side` of the torch
    engine."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    place = tl.arange(0, CHUNK)
    rows = tl.cast(chunk, tl.int64) * CHUNK + place
    taken = rows < length
    if HAS_VALID:
        taken = taken & (tl.load(VALID + batch * length + rows, mask=taken, other=0) != 0)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    at = at_chunk * CHUNK + place
    group = tl.cast(head // RATIO, tl.int64)
    wide_head = tl.cast(head, tl.int64)
    q = load_tile(C + batch * c_batch + wide_head * c_head, rows, c_token, columns_n, taken, N)
    k = load_tile(B + batch * b_batch + group * b_head, rows, b_token, columns_n, taken, N)
    v = load_tile(X + batch * x_batch + group * x_head, rows, x_token, columns_p, taken, P)
    grad = load_tile(Y_GRAD + batch * g_batch + wide_head * g_head, rows, g_token, columns_p, taken, P)
    dt = tl.load(DT + at)
    forward = tl.load(FORWARD + at)
    gate_forward = tl.full([CHUNK], 1.0, tl.float32)
    gate_backward = gate_forward
    backward = forward
    segment = place
    if HAS_VISION:
        gate_forward = tl.load(FORWARD_GATE + at)
        gate_backward = tl.load(BACKWARD_GATE + at)
        backward = tl.load(BACKWARD + at)
        segment = tl.load(SEGMENT + (batch * chunks + chunk) * CHUNK + place)
    decay, gates, before, together = pair_weights(
        forward,
        forward,
        backward,
        backward,
        segment,
        segment,
        gate_forward,
        gate_backward,
        True,
        HAS_VISION,
        CHUNK,
    )
    target = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    spent = scores * target * decay
    scores_grad = (target * decay * gates * dt[None, :]).to(k.dtype)
    c_grad = tl.dot(scores_grad, k, input_precision=PRECISION)
    tl.store(DT_GRAD + at, tl.sum(spent * gates, 0))
    spent = spent * dt[None, :]
    gate_grad = tl.sum(tl.where(before, spent, 0.0), 1)
    products = spent * gates
    pairs = tl.where(place[:, None] > place[None, :], products, 0.0)
    tl.store(FORWARD_PAIRS + at, tl.sum(pairs, 1) - tl.sum(pairs, 0))
    if HAS_VISION:
        gate_grad -= tl.sum(tl.where(together, spent, 0.0), 1)
        tl.store(GATE_GRAD + at, gate_grad)
        pairs = tl.where(place[:, None] < place[None, :], products, 0.0)
        tl.store(BACKWARD_PAIRS + at, tl.sum(pairs, 1) - tl.sum(pairs, 0))
    tile = at_chunk * (N * P) + columns_n[None, :] * P + columns_p[:, None]
    inside = (columns_n < N)[None, :] & (columns_p < P)[:, None]
    state = tl.load(FORWARD_STATE + tile, mask=inside, other=0.0)
    pulled = tl.dot(grad.to(state.dtype), state, input_precision=PRECISION)
    c_grad += pulled * (tl.load(FORWARD_READ + at) * gate_forward)[:, None]
    if HAS_VISION:
        state = tl.load(BACKWARD_STATE + tile, mask=inside, other=0.0)
        pulled = tl.dot(grad.to(state.dtype), state, input_precision=PRECISION)
        c_grad += pulled * (tl.load(BACKWARD_READ + at) * gate_backward)[:, None]
    out = C_GRAD + ((batch * length + rows) * HEADS + head)[:, None] * N + columns_n[None, :]
    where = (rows < length)[:, None] & (columns_n < N)[None, :]
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
        C_GRAD (B, L, H, N), and (B, K, H, C) float32: DT_GRAD at fixed dt A, GATE_GRAD without what passes
        through the states, FORWARD_PAIRS and BACKWARD_PAIRS of eq. (3); None for what is not
        asked.
    """
    has_vision = decays.segment is not None
    asked = {
        "DT_GRAD": True,
        "FORWARD_PAIRS": True,
        "GATE_GRAD": has_vision,
        "BACKWARD_PAIRS": has_vision,
    }
    results = {name: torch.empty_like(decays.dt) if wanted else None for name, wanted in asked.items()}
    results["C_GRAD"] = C.new_empty(C.shape)
    batch, chunks, heads, chunk = decays.dt.shape
    state, head_dim = C.shape[3], x.shape[3]
    reader_kernel[(heads * chunks, batch)](
        x,
        B,
        C,
        y_grad,
        **scalar_arguments(decays, valid),
        FORWARD_STATE=forward_state,
        BACKWARD_STATE=backward_state,
        **results,
        **stride_arguments(x=x, b=B, c=C, g=y_grad),
        length=x.shape[1],
        chunks=chunks,
        HEADS=heads,
        RATIO=heads // x.shape[2],
        N=state,
        P=head_dim,
        BLOCK_N=tile_size(state),
        BLOCK_P=tile_size(head_dim),
        CHUNK=chunk,
        PRECISION=precision(x.dtype),
        num_warps=8,
        num_stages=1,
    )
    return results
