# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the output of the scan, and the forward passes made of it: parts of chunks side by side.

Letters and equations as in `chunked_scan`; the kernel is its eq. (3), one program a part of a chunk of one
head. The norm of each head and the way back to token order are part of the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import HOPPER, launching, shared_memory
from ..torch_engine.norm import kept_dtype
from .scalars import scan_scalars
from .states import sweep_states
from .tiles import (
    add_product,
    chunk_size,
    gate_of,
    head_of,
    load_tile,
    pair_decay,
    pair_gates,
    pair_masks,
    pair_products,
    part_size,
    rows_of,
    state_products,
    step_size,
    stride_arguments,
    tile_size,
    token_dtype,
    token_rows,
    warps,
)

LARGEST_HELD = 128  # axis of states in bfloat16 that shared memory holds whole
HELD_COLUMNS = 32  # writers at once then
HELD_MEMORY = 115 * 1024  # bytes that it takes at most


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HELD: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Eq. (3) of `chunked_scan`: `bidirectional_scan` and `reverse_scan` of the reference, one part of a
    chunk of one head; then its `rms_norm_per_head`, and `permute_tokens` back to where ORDER took
    the tokens from.

    KEEPS says whether the gradient's needs are stored too: y, in scan order.
    """
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % (CHUNK // ROWS)
    chunk = tl.program_id(0) // (HEADS * (CHUNK // ROWS))
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_P)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    i = part * ROWS + tl.arange(0, ROWS)
    at = at_chunk * CHUNK + i
    rows, taken = token_rows(VALID, batch, chunk * CHUNK + part * ROWS, length, ROWS, HAS_VALID)
    q = head_of(C, batch, c_batch, head, c_head)
    k = head_of(B, batch, b_batch, head // RATIO, b_head)
    v = head_of(X, batch, x_batch, head // RATIO, x_head)
    forward_state = FORWARD_STATE + at_chunk * (N * P)
    y = tl.zeros([ROWS, BLOCK_P], tl.float32)
    if HELD:  # loads of what is used after the pairs, while nothing else waits
        columns_n = tl.arange(0, STEP)
        held_q = load_tile(q, rows, c_token, columns_n, taken, N)
        held_forward = load_tile(forward_state, columns_n, P, columns, columns_n < N, P)
        if HAS_VISION:
            held_backward = load_tile(
                BACKWARD_STATE + at_chunk * (N * P), columns_n, P, columns, columns_n < N, P
            )
    at_segment = (batch * chunks + chunk) * CHUNK
    for other in range(0, CHUNK if HAS_VISION else (part + 1) * ROWS, COLUMNS):
        j = other + tl.arange(0, COLUMNS)
        at_j = at_chunk * CHUNK + j
        writers, written = token_rows(VALID, batch, chunk * CHUNK + other, length, COLUMNS, HAS_VALID)
        weights = pair_products(q, c_token, rows, taken, k, b_token, writers, written, N, STEP, ROWS)
        weights *= pair_decay(
            i[:, None], j[None, :], FORWARD, BACKWARD, at[:, None], at_j[None, :], HAS_VISION
        )
        before, together = pair_masks(i[:, None], j[None, :], SEGMENT, at_segment, HAS_VISION)
        weights *= pair_gates(before, together, FORWARD_GATE, BACKWARD_GATE, at[:, None], HAS_VISION)
        weights *= tl.load(DT + at_j)[None, :]
        if HAS_SKIP:  # a token writes to itself
            weights += tl.where(i[:, None] == j[None, :], tl.load(D + head).to(tl.float32), 0.0)
        y = add_product(weights, load_tile(v, writers, x_token, columns, written, P), y)
    read = tl.load(FORWARD_READ + at) * gate_of(FORWARD_GATE, at, HAS_VISION)
    if HELD:
        pulled = tl.dot(held_q, held_forward, input_precision="ieee")
    else:
        pulled = state_products(
            q, c_token, rows, taken, forward_state, columns, N, P, P, 1, BLOCK_P, STEP, ROWS
        )
    y += pulled * read[:, None]
    if HAS_VISION:
        read = tl.load(BACKWARD_READ + at) * tl.load(BACKWARD_GATE + at)
        if HELD:
            pulled = tl.dot(held_q, held_backward, input_precision="ieee")
        else:
            state = BACKWARD_STATE + at_chunk * (N * P)
            pulled = state_products(q, c_token, rows, taken, state, columns, N, P, P, 1, BLOCK_P, STEP, ROWS)
        y += pulled * read[:, None]
    real = rows < length
    where = real[:, None] & (columns < P)[None, :]
    place = (batch * length + rows) * HEADS + head
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / P + eps)
        if KEEPS:
            kept = KEPT + place[:, None] * P + columns[None, :]
            tl.store(kept, y.to(KEPT.dtype.element_ty), mask=where)
        weight = tl.load(NORM + head * P + columns, mask=columns < P, other=0.0).to(tl.float32)
        y = y * scale[:, None] * weight[None, :]
    if HAS_ORDER:
        rows = tl.load(ORDER + batch * length + rows, mask=real, other=0)
        place = (batch * length + rows) * HEADS + head
    tl.store(Y + place[:, None] * P + columns[None, :], y.to(Y.dtype.element_ty), mask=where)


def output_tiles(
    state: int, head_dim: int, dtype: torch.dtype, chunk: int, shared: int = HOPPER
) -> tuple[dict, dict]:
    """Constants and options of `output_kernel`, for a part of a chunk and `shared` bytes of shared memory.

    States that fit are loaded at once and held in shared memory. Others go by steps of N. Either way two
    programs share a multiprocessor and hide each other's loads: by few warps, or by few registers.
    """
    part, fits = part_size(dtype, chunk), max(state, head_dim) <= LARGEST_HELD and shared >= HELD_MEMORY
    held = fits and dtype == torch.bfloat16
    if held:
        columns, step, options = min(part, HELD_COLUMNS), tile_size(state), {"num_warps": 4, "num_stages": 2}
    else:
        few = 128 if dtype == torch.bfloat16 and warps(head_dim) == 8 else None
        columns, step = part, step_size(state, dtype)
        options = {"num_warps": warps(head_dim), "num_stages": 1, "maxnreg": few}
    return {"ROWS": part, "COLUMNS": columns, "STEP": step, "HELD": held}, options


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
    openings: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scan_heads.forward_heads` on Triton kernels."""
    dtype = x.dtype
    x, B, C = (rows_of(tensor.to(token_dtype(dtype))) for tensor in (x, B, C))
    scalars = scan_scalars(dt, A, gate, segment, valid, chunk_size(x.dtype), openings)
    states, final_state, _ = sweep_states(B, x, scalars.write, scalars.kept, scalars.valid, initial_state)
    batch, length, groups, head_dim = x.shape
    heads, state = C.shape[2:]
    keep = keep and norm_weight is not None
    y = x.new_empty(batch, length, heads, head_dim, dtype=dtype)
    y_kept = y.new_empty(y.shape if keep else 0, dtype=kept_dtype(dtype))
    chunks, chunk = scalars.dt.shape[1], scalars.dt.shape[3]
    tiles, options = output_tiles(state, head_dim, x.dtype, chunk, shared_memory(x))
    output_kernel[(heads * (chunk // tiles["ROWS"]) * chunks, batch)](
        x,
        B,
        C,
        **scalars.arguments(),
        **scalars.by_direction("READ", scalars.read),
        **scalars.by_direction("STATE", states),
        **stride_arguments(x=x, b=B, c=C),
        D=None if D is None else D.contiguous(),
        ORDER=None if order is None else order.contiguous(),
        NORM=None if norm_weight is None else norm_weight.contiguous(),
        Y=y,
        KEPT=y_kept if keep else None,
        length=length,
        eps=eps,
        RATIO=heads // groups,
        N=state,
        P=head_dim,
        BLOCK_P=tile_size(head_dim),
        **tiles,
        HAS_SKIP=D is not None,
        HAS_ORDER=order is not None,
        HAS_NORM=norm_weight is not None,
        KEEPS=keep,
        **options,
    )
    return y, final_state[0], y_kept
