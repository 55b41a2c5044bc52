# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the output of the scan: parts of chunks side by side.

Letters and equations as in `torch_engine`; the kernel is its eq. (3), one program a part of a chunk of one
head. The norm of each head and the way back to token order are part of the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import HOPPER, contiguous, shared_memory, stride_arguments, tile_size
from ..operator import ScanInputs, scan_outputs
from .scalars import Scalars
from .tiles import (
    add_product,
    gate_of,
    head_of,
    load_tile,
    pair_decay,
    pair_gates,
    pair_masks,
    pair_products,
    part_size,
    state_products,
    step_size,
    token_rows,
    warps,
)

LARGEST_HELD = 128  # axis of states in bfloat16 that shared memory holds whole
HELD_COLUMNS = 32  # writers at once then
HELD_MEMORY = 115 * 1024  # bytes that it takes at most


@triton.jit(do_not_specialize=["chunks"])
def output_kernel(
    X, B, C, DT, FORWARD_SUM, REVERSE_SUM, FORWARD_GATE, REVERSE_GATE, SEGMENT, BEGIN, VALID,
    FORWARD_READ_DECAY, REVERSE_READ_DECAY, FORWARD_STATE, REVERSE_STATE, D, ORDER, NORM, Y, Y_BEFORE_NORM,
    x_batch, x_token, x_head, b_batch, b_token, b_head, c_batch, c_token, c_head, length, chunks, eps,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    STEP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_NORM: tl.constexpr, SAVES_Y: tl.constexpr,
):  # fmt: skip
    """Eq. (3): both directions of the reference's `bidirectional_scan`, one part of a chunk of one head; then
    its `rms_norm_per_head`, and `permute_tokens` back to where ORDER took the tokens from.

    With SAVES_Y, y before its norm is stored too, in scan order, for the gradient.
    """
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % (CHUNK // ROWS)
    chunk = tl.program_id(0) // (HEADS * (CHUNK // ROWS))
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns = tl.arange(0, BLOCK_P)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    i = part * ROWS + tl.arange(0, ROWS)
    at = at_chunk * CHUNK + i
    rows, valid = token_rows(VALID, batch, chunk * CHUNK + part * ROWS, length, ROWS, HAS_VALID)
    q = head_of(C, batch, c_batch, head, c_head)
    k = head_of(B, batch, b_batch, head // RATIO, b_head)
    v = head_of(X, batch, x_batch, head // RATIO, x_head)
    forward_state = FORWARD_STATE + at_chunk * (N * P)
    y = tl.zeros([ROWS, BLOCK_P], tl.float32)
    if HELD:  # loads of what is used after the pairs, while nothing else waits
        columns_n = tl.arange(0, STEP)
        held_q = load_tile(q, rows, c_token, columns_n, valid, N)
        held_forward = load_tile(forward_state, columns_n, P, columns, columns_n < N, P)
        if HAS_VISION:
            held_reverse = load_tile(
                REVERSE_STATE + at_chunk * (N * P), columns_n, P, columns, columns_n < N, P
            )
    at_segment = (batch * chunks + chunk) * CHUNK
    for other in range(0, CHUNK if HAS_VISION else (part + 1) * ROWS, COLUMNS):
        j = other + tl.arange(0, COLUMNS)
        at_j = at_chunk * CHUNK + j
        writers, written = token_rows(VALID, batch, chunk * CHUNK + other, length, COLUMNS, HAS_VALID)
        weights = pair_products(q, c_token, rows, valid, k, b_token, writers, written, N, STEP, ROWS)
        weights *= pair_decay(
            i[:, None], j[None, :], FORWARD_SUM, REVERSE_SUM, at[:, None], at_j[None, :], HAS_VISION
        )
        before, together = pair_masks(
            i[:, None], j[None, :], SEGMENT, BEGIN, at_segment, HAS_VISION, HAS_SEQUENCE
        )
        weights *= pair_gates(before, together, FORWARD_GATE, REVERSE_GATE, at[:, None], HAS_VISION)
        weights *= tl.load(DT + at_j)[None, :]
        if HAS_SKIP:  # a token writes to itself
            weights += tl.where(i[:, None] == j[None, :], tl.load(D + head).to(tl.float32), 0.0)
        y = add_product(weights, load_tile(v, writers, x_token, columns, written, P), y)
    read = tl.load(FORWARD_READ_DECAY + at) * gate_of(FORWARD_GATE, at, HAS_VISION)
    if HELD:
        pulled = tl.dot(held_q, held_forward, input_precision="ieee")
    else:
        pulled = state_products(
            q, c_token, rows, valid, forward_state, columns, N, P, P, 1, BLOCK_P, STEP, ROWS
        )
    y += pulled * read[:, None]
    if HAS_VISION:
        read = tl.load(REVERSE_READ_DECAY + at) * tl.load(REVERSE_GATE + at)
        if HELD:
            pulled = tl.dot(held_q, held_reverse, input_precision="ieee")
        else:
            state = REVERSE_STATE + at_chunk * (N * P)
            pulled = state_products(q, c_token, rows, valid, state, columns, N, P, P, 1, BLOCK_P, STEP, ROWS)
        y += pulled * read[:, None]
    real = rows < length
    where = real[:, None] & (columns < P)[None, :]
    place = (batch * length + rows) * HEADS + head
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / P + eps)
        if SAVES_Y:
            kept = Y_BEFORE_NORM + place[:, None] * P + columns[None, :]
            tl.store(kept, y.to(Y_BEFORE_NORM.dtype.element_ty), mask=where)
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


def scan_output(
    inputs: ScanInputs, x: Tensor, B: Tensor, C: Tensor, scalars: Scalars, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `output_kernel`: y and y_before_norm of `ScanOutputs`, from tokens as kernels take them."""
    y, _, y_before_norm = scan_outputs(inputs)
    batch, length, groups, head_dim = x.shape
    heads, state = C.shape[2:]
    chunks, chunk = scalars.dt.shape[1], scalars.dt.shape[3]
    tiles, options = output_tiles(state, head_dim, x.dtype, chunk, shared_memory(x))
    saves = y_before_norm.numel() > 0
    output_kernel[(heads * (chunk // tiles["ROWS"]) * chunks, batch)](
        x,
        B,
        C,
        **scalars.arguments(),
        **scalars.by_direction("READ_DECAY", scalars.read_decay),
        **scalars.by_direction("STATE", states),
        **stride_arguments(x=x, b=B, c=C),
        D=contiguous(inputs.D),
        ORDER=contiguous(inputs.order),
        NORM=contiguous(inputs.norm_weight),
        Y=y,
        Y_BEFORE_NORM=y_before_norm if saves else None,
        length=length,
        eps=inputs.eps,
        RATIO=heads // groups,
        N=state,
        P=head_dim,
        BLOCK_P=tile_size(head_dim),
        **tiles,
        HAS_SKIP=inputs.D is not None,
        HAS_ORDER=inputs.order is not None,
        HAS_NORM=inputs.norm_weight is not None,
        SAVES_Y=saves,
        **options,
    )
    return y, y_before_norm
