# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the output of the scan, and the forward passes made of it: chunks side by side.

Letters and equations as in `chunked_scan`; the kernel is its eq. (3), one program a chunk of one head. The
norm of each head and the way back to token order are part of the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launching
from .scan_decays import scan_decays
from .scan_states import sweep_states
from .scan_tiles import (
    chunk_pairs,
    chunk_rows,
    chunk_size,
    head_of,
    load_tile,
    pair_arguments,
    pair_products,
    precision,
    rows_of,
    state_products,
    step_size,
    stride_arguments,
    tile_size,
    token_dtype,
    weighed_sum,
)


@triton.jit
def output_kernel(
    X,
    B,
    C,
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
    D,
    ORDER,
    NORM,
    Y,
    KEPT,
    SCALE,
    x_batch,
    x_token,
    x_head,
    b_batch,
    b_token,
    b_head,
    c_batch,
    c_token,
    c_head,
    length,
    chunks,
    eps,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (3) of `chunked_scan`: `bidirectional_scan` and `backward_scan` of the reference, one chunk of one
    head; then its `rms_norm_per_head`, and `permute_tokens` back to where ORDER took the tokens from.

    KEEPS says whether the gradient's needs are stored too, in scan order: y, and the norm's factor of it.
    """
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_P)
    rows, taken = chunk_rows(VALID, batch, chunk, length, CHUNK, HAS_VALID)
    at_segment = (batch * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    at = at_chunk * CHUNK + tl.arange(0, CHUNK)
    q = head_of(C, batch, c_batch, head, c_head)
    k = head_of(B, batch, b_batch, head // RATIO, b_head)
    v = head_of(X, batch, x_batch, head // RATIO, x_head)
    decay, gates, dt, _, _, gate_forward, gate_backward = chunk_pairs(
        DT, FORWARD, BACKWARD, FORWARD_GATE, BACKWARD_GATE, SEGMENT, at, at_segment, True, HAS_VISION, CHUNK
    )
    weights = pair_products(q, c_token, k, b_token, rows, taken, N, STEP, CHUNK, PRECISION)
    weights = weights * decay * gates * dt
    v_tile = load_tile(v, rows, x_token, columns, taken, P)
    y = weighed_sum(weights, v_tile, tl.zeros([CHUNK, BLOCK_P], tl.float32), PRECISION)
    if HAS_SKIP:
        y += v_tile.to(tl.float32) * tl.load(D + head).to(tl.float32)
    state = FORWARD_STATE + at_chunk * (N * P)
    pulled = state_products(
        q, c_token, rows, taken, state, columns, N, P, P, 1, BLOCK_P, STEP, CHUNK, PRECISION
    )
    y += pulled * (tl.load(FORWARD_READ + at) * gate_forward)[:, None]
    if HAS_VISION:
        state = BACKWARD_STATE + at_chunk * (N * P)
        pulled = state_products(
            q, c_token, rows, taken, state, columns, N, P, P, 1, BLOCK_P, STEP, CHUNK, PRECISION
        )
        y += pulled * (tl.load(BACKWARD_READ + at) * gate_backward)[:, None]
    real = rows < length
    where = real[:, None] & (columns < P)[None, :]
    place = (batch * length + rows) * HEADS + head
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / P + eps)
        if KEEPS:
            kept = KEPT + place[:, None] * P + columns[None, :]
            tl.store(kept, y.to(KEPT.dtype.element_ty), mask=where)
            tl.store(SCALE + place, scale, mask=real)
        weight = tl.load(NORM + head * P + columns, mask=columns < P, other=0.0).to(tl.float32)
        y = y * scale[:, None] * weight[None, :]
    if HAS_ORDER:
        rows = tl.load(ORDER + batch * length + rows, mask=real, other=0)
        place = (batch * length + rows) * HEADS + head
    tl.store(Y + place[:, None] * P + columns[None, :], y.to(Y.dtype.element_ty), mask=where)


@launching
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunked_scan.forward` on Triton kernels: y (B, L, H, P) and the final forward state (B, H, N, P)."""
    scanned = (x, dt, A, B, C, gate, segment, valid, D, initial_state)
    return forward_heads(*scanned, order=None, norm_weight=None, eps=0.0, keep=False)[:2]


@launching
def forward_heads(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scan_heads.forward_heads` on Triton kernels."""
    dtype = x.dtype
    x, B, C = (rows_of(tensor.to(token_dtype(dtype))) for tensor in (x, B, C))
    decays = scan_decays(dt, A, gate, segment, valid, chunk_size(x.dtype), torch.float32, torch.float32)
    forward_state, final_state, _ = sweep_states(
        B, x, decays.forward_write(), decays.forward_kept(), valid, initial_state
    )
    backward_state = None
    if decays.segment is not None:
        write, kept = decays.backward_write(), decays.backward_kept()
        backward_state, _, _ = sweep_states(B, x, write, kept, valid, None, reverse=True)
    batch, length, groups, head_dim = x.shape
    heads, state = C.shape[2:]
    keep = keep and norm_weight is not None
    y = x.new_empty(batch, length, heads, head_dim, dtype=dtype)
    y_kept = torch.empty_like(y) if keep else y.new_empty(0)
    scale = x.new_empty((batch, length, heads) if keep else 0, dtype=torch.float32)
    output_kernel[(heads * decays.dt.shape[1], batch)](
        x,
        B,
        C,
        **pair_arguments(decays, valid),
        **stride_arguments(x=x, b=B, c=C),
        FORWARD_READ=decays.forward_read(),
        BACKWARD_READ=None if backward_state is None else decays.backward_read(),
        FORWARD_STATE=forward_state,
        BACKWARD_STATE=backward_state,
        D=D,
        ORDER=order,
        NORM=norm_weight,
        Y=y,
        KEPT=y_kept if keep else None,
        SCALE=scale if keep else None,
        length=length,
        eps=eps,
        RATIO=heads // groups,
        N=state,
        P=head_dim,
        BLOCK_P=tile_size(head_dim),
        STEP=step_size(state, x.dtype),
        HAS_SKIP=D is not None,
        HAS_ORDER=order is not None,
        HAS_NORM=norm_weight is not None,
        KEEPS=keep,
        PRECISION=precision(x.dtype),
        num_warps=8 if head_dim > 64 else 4,
        num_stages=1,
    )
    return y, final_state, y_kept, scale
