# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for one token of decoding: attention over the window's state, which moves up meanwhile.

Letters as in `torch_engine`. A program takes one group of one row: it reads every key and value anyway, so it
writes each one a place further on and the new ones last; nobody else touches them. A ring would save these
writes, 260 KB a layer and row of a 7B model with a window of 128, and would have to be put in order for
whatever reads more than one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..engine.launch import as_bytes, rows_of, tile_size
from .kernels import LOG2_E
from .operator import StepInputs, StepOutputs, step_outputs

COLUMNS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # places that a program takes at once


@triton.jit
def step_kernel(
    Q,
    K,
    V,
    STATE_K,
    STATE_V,
    PRESENT,
    NEXT,
    ASKS,
    VALID,
    OUT,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ASKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Eq. (1) for one token a row, and the state after it."""
    row = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    group = tl.cast(tl.program_id(0) % GROUPS, tl.int64)
    valid = tl.load(VALID + row) != 0 if HAS_VALID else row >= 0
    asking = valid & (tl.load(ASKS + row) != 0) if HAS_ASKS else valid
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    real_n, real_p = columns_n < N, columns_p < P
    new_n, new_p = columns_n < tl.where(valid, N, 0), columns_p < tl.where(valid, P, 0)  # none of no token
    head = tl.arange(0, BLOCK_H)
    q_at = row * q_row + (group * RATIO + head)[None, :] * q_head + columns_n[:, None]
    q_taken = (head < tl.where(asking, RATIO, 0))[None, :] & real_n[:, None]
    q_tile = tl.load(Q + q_at, mask=q_taken, other=0.0)  # (N, heads), as products of tiles take few heads
    k_new = tl.load(K + row * k_row + group * k_head + columns_n, mask=new_n, other=0.0)
    v_new = tl.load(V + row * v_row + group * v_head + columns_p, mask=new_p, other=0.0)
    largest = tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[:, None], 0) * scale  # it sees itself
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    out = tl.zeros([BLOCK_P, BLOCK_H], tl.float32) + v_new.to(tl.float32)[:, None]
    k_state = STATE_K + (row * PLACES * GROUPS + group) * N
    v_state = STATE_V + (row * PLACES * GROUPS + group) * P
    for start in range(0, PLACES, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < PLACES
        there = tl.load(PRESENT + row * PLACES + place, mask=inside, other=0) != 0
        k_at = k_state + place[:, None] * (GROUPS * N) + columns_n[None, :]
        v_at = v_state + place[:, None] * (GROUPS * P) + columns_p[None, :]
        k_tile = tl.load(k_at, mask=there[:, None] & real_n[None, :], other=0.0)
        v_tile = tl.load(v_at, mask=there[:, None] & real_p[None, :], other=0.0)
        tl.debug_barrier()  # every thread has read before one writes
        to = place - valid.to(tl.int32)  # what is missing turns to zeros, whatever it held
        kept = inside & (to >= 0)
        k_to = k_state + to[:, None] * (GROUPS * N) + columns_n[None, :]
        v_to = v_state + to[:, None] * (GROUPS * P) + columns_p[None, :]
        tl.store(k_to, k_tile, mask=kept[:, None] & real_n[None, :])
        tl.store(v_to, v_tile, mask=kept[:, None] & real_p[None, :])
        if group == 0:
            tl.store(NEXT + row * PLACES + to, there.to(tl.uint8), mask=kept)
        scores = tl.dot(k_tile.to(q_tile.dtype), q_tile, input_precision="ieee") * scale
        scores = tl.where(there[:, None], scores, -1e30)
        highest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - highest[None, :])
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 0)
        values = tl.trans(v_tile.to(q_tile.dtype))
        out = tl.dot(values, weights.to(q_tile.dtype), out * shrink[None, :], input_precision="ieee")
        largest = highest
    tl.store(k_state + (PLACES - 1) * (GROUPS * N) + columns_n, k_new, mask=new_n)
    tl.store(v_state + (PLACES - 1) * (GROUPS * P) + columns_p, v_new, mask=new_p)
    if (group == 0) & valid:
        tl.store(NEXT + row * PLACES + (PLACES - 1), 1)
    out = tl.where(asking, out / total[None, :], 0.0)
    o_at = ((row * GROUPS + group) * RATIO + head)[None, :] * P + columns_p[:, None]
    tl.store(OUT + o_at, out.to(OUT.dtype.element_ty), mask=(head < RATIO)[None, :] & real_p[:, None])


def step(inputs: StepInputs) -> StepOutputs:
    """The operator on Triton."""
    q, k, v = (rows_of(tensor) for tensor in inputs[:3])
    (batch, heads, size), (_, groups, value_size) = q.shape, v.shape
    o, after = step_outputs(inputs)
    step_kernel[(batch * groups,)](
        q,
        k,
        v,
        inputs.state_k,
        inputs.state_v,
        as_bytes(inputs.present),
        as_bytes(after),
        as_bytes(inputs.asks),
        as_bytes(inputs.valid),
        o,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        inputs.scale * LOG2_E,
        PLACES=after.shape[1],
        GROUPS=groups,
        RATIO=heads // groups,
        N=size,
        P=value_size,
        BLOCK_H=tile_size(heads // groups),
        BLOCK_N=tile_size(size),
        BLOCK_P=tile_size(value_size),
        COLUMNS=COLUMNS[q.dtype],
        HAS_ASKS=inputs.asks is not None,
        HAS_VALID=inputs.valid is not None,
        num_warps=4,
        num_stages=2,
    )
    return StepOutputs(o, after)
