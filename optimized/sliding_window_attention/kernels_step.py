# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for one token of decoding: attention over the window's state, which then moves up a place.

Letters as in `torch_engine`. A program of the attention takes one head of one row. Its products are sums over
a tile, not products of matrices: what takes the time is reading the state. (With 64 places as the rows of a
product, on four warps, triton 3.6 makes wgmma instructions that gave a wrong o or an illegal memory access on
an H200.) A program of the move takes one group of one row, which nobody else touches. In a pool a ring saves
the move, and one program takes all heads of a group: `kernels_ring`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..engine.launch import as_bytes, rows_of, tile_size
from .kernels import LOG2_E
from .operator import StepInputs, StepOutputs, step_outputs

READ = {False: 128, True: 64}  # places that a program attends to at once, for head dims beyond 128 fewer
WARPS = {True: 4, False: 8}  # for elements of two bytes, and of more
MOVED = 32  # places that a program moves at once


@triton.jit
def attention_kernel(
    Q, K, V, STATE_K, STATE_V, PRESENT, ASKS, VALID, OUT, q_row, q_head, k_row, k_head, v_row, v_head,
    scale,
    PLACES: tl.constexpr, GROUPS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, HAS_ASKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for one token a row."""
    row = tl.cast(tl.program_id(0) // (GROUPS * RATIO), tl.int64)
    head = tl.cast(tl.program_id(0) % (GROUPS * RATIO), tl.int64)
    group = head // RATIO
    valid = tl.load(VALID + row) != 0 if HAS_VALID else row >= 0
    asking = valid & (tl.load(ASKS + row) != 0) if HAS_ASKS else valid
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    real_n, real_p = columns_n < N, columns_p < P
    new_n, new_p = columns_n < tl.where(asking, N, 0), columns_p < tl.where(asking, P, 0)
    q = tl.load(Q + row * q_row + head * q_head + columns_n, mask=new_n, other=0.0).to(tl.float32)
    k = tl.load(K + row * k_row + group * k_head + columns_n, mask=new_n, other=0.0).to(tl.float32)
    out = tl.load(V + row * v_row + group * v_head + columns_p, mask=new_p, other=0.0).to(tl.float32)
    largest = tl.sum(q * k, 0) * scale  # it sees itself
    total = tl.sum(tl.where(columns_n == 0, 1.0, 0.0), 0)
    k_state = STATE_K + row * (PLACES * GROUPS * N) + group * N
    v_state = STATE_V + row * (PLACES * GROUPS * P) + group * P
    for start in range(0, PLACES, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < PLACES
        there = tl.load(PRESENT + row * PLACES + place, mask=inside, other=0) != 0
        k_at = k_state + place[:, None] * (GROUPS * N) + columns_n[None, :]
        v_at = v_state + place[:, None] * (GROUPS * P) + columns_p[None, :]
        k_tile = tl.load(k_at, mask=inside[:, None] & real_n[None, :], other=0.0).to(tl.float32)
        v_tile = tl.load(v_at, mask=inside[:, None] & real_p[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(k_tile * q[None, :], 1) * scale, -1e30)
        v_tile = tl.where(there[:, None], v_tile, 0.0)  # here, so that no load waits for another
        highest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - highest)
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(v_tile * weights[:, None], 0)
        largest = highest
    out = tl.where(asking, out / total, 0.0)
    o_at = (row * (GROUPS * RATIO) + head) * P + columns_p
    tl.store(OUT + o_at, out.to(OUT.dtype.element_ty), mask=real_p)


@triton.jit
def move_kernel(
    K, V, STATE_K, STATE_V, PRESENT, NEXT, VALID, k_row, k_head, v_row, v_head,
    PLACES: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """The state after one token a row: each key and value a place further on, the new ones last."""
    row = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    group = tl.cast(tl.program_id(0) % GROUPS, tl.int64)
    valid = tl.load(VALID + row) != 0 if HAS_VALID else row >= 0
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    real_n, real_p = columns_n < N, columns_p < P
    new_n, new_p = columns_n < tl.where(valid, N, 0), columns_p < tl.where(valid, P, 0)  # none of no token
    k_new = tl.load(K + row * k_row + group * k_head + columns_n, mask=new_n, other=0.0)
    v_new = tl.load(V + row * v_row + group * v_head + columns_p, mask=new_p, other=0.0)
    k_state = STATE_K + row * (PLACES * GROUPS * N) + group * N
    v_state = STATE_V + row * (PLACES * GROUPS * P) + group * P
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
    tl.store(k_state + (PLACES - 1) * (GROUPS * N) + columns_n, k_new, mask=new_n)
    tl.store(v_state + (PLACES - 1) * (GROUPS * P) + columns_p, v_new, mask=new_p)
    if (group == 0) & valid:
        tl.store(NEXT + row * PLACES + (PLACES - 1), 1)


def step(inputs: StepInputs) -> StepOutputs:
    """The operator on Triton."""
    q, k, v = (rows_of(tensor) for tensor in inputs[:3])
    (batch, heads, size), (_, groups, value_size) = q.shape, v.shape
    o, after = step_outputs(inputs)
    present, valid = as_bytes(inputs.present), as_bytes(inputs.valid)
    states, strides = (inputs.state_k, inputs.state_v), (*k.stride()[:2], *v.stride()[:2])
    sizes = {
        "PLACES": after.shape[1],
        "GROUPS": groups,
        "N": size,
        "P": value_size,
        "BLOCK_N": tile_size(size),
        "BLOCK_P": tile_size(value_size),
        "HAS_VALID": valid is not None,
    }
    given = (
        q,
        k,
        v,
        *states,
        present,
        as_bytes(inputs.asks),
        valid,
        o,
        *q.stride()[:2],
        *strides,
        inputs.scale * LOG2_E,
    )
    attention_kernel[(batch * heads,)](
        *given,
        COLUMNS=min(READ[max(size, value_size) > 128], tile_size(after.shape[1])),
        RATIO=heads // groups,
        HAS_ASKS=inputs.asks is not None,
        num_warps=WARPS[q.dtype.itemsize == 2],
        **sizes,
    )
    move_kernel[(batch * groups,)](
        k,
        v,
        *states,
        present,
        as_bytes(after),
        valid,
        *strides,
        COLUMNS=MOVED,
        num_warps=4,
        num_stages=2,
        **sizes,
    )
    return StepOutputs(o, after)
