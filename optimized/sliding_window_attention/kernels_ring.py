# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for one token of decoding whose keys and values stand in rings of a pool: RoPE, attention,
and the token's own key and value.

Letters as in `torch_engine`. A program takes all heads of a group of one row, so that keys and values are
read once; filled up to 16 they are the rows of a product, the fewest that tensor cores take. What a program
writes, the oldest place, no program reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import as_bytes, rows_of, tile_size
from .kernels import LOG2_E
from .operator import RingInputs, ring_output


@triton.jit
def turned(X, COS, SIN, columns, real, N: tl.constexpr):
    """RoPE of the heads that X points to, in float32, rounded as X is."""
    other = tl.where(columns < N // 2, columns + N // 2, columns - N // 2)
    sign = tl.where(columns < N // 2, -1.0, 1.0)
    cos = tl.load(COS + columns, mask=columns < N, other=0.0).to(tl.float32)
    sin = tl.load(SIN + columns, mask=columns < N, other=0.0).to(tl.float32) * sign
    x = tl.load(X + columns[None, :], mask=real, other=0.0).to(tl.float32)
    partner = tl.load(X + other[None, :], mask=real, other=0.0).to(tl.float32)
    return (x * cos[None, :] + partner * sin[None, :]).to(X.dtype.element_ty)


@triton.jit
def ring_kernel(
    Q, K, V, COS, SIN, RING_K, RING_V, PRESENT, VALID, PLACE, TURN, LOGIT, OUT,
    q_row, q_head, k_row, k_head, v_row, v_head, cos_row, sin_row, ring_k_row, ring_v_row, present_row,
    logit_row, out_row, scale,
    PLACES: tl.constexpr, GROUPS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_LOGIT: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for one token a row, HEADS heads of a group."""
    row = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    group = tl.program_id(0) % GROUPS
    own, turn = tl.load(PLACE + row), tl.load(TURN + row).to(tl.int32)
    oldest = (turn % PLACES + PLACES) % PLACES
    valid = tl.load(VALID + row) != 0 if HAS_VALID else row >= 0
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    real_n, real_p = columns_n < N, columns_p < P
    ring_k = RING_K + own * ring_k_row + group * N
    ring_v = RING_V + own * ring_v_row + group * P
    present = PRESENT + own * present_row
    each = tl.arange(0, HEADS)
    head = group * RATIO + each
    new_q = (each < RATIO)[:, None] & (columns_n < tl.where(valid, N, 0))[None, :]
    new_k = (tl.arange(0, 1) == 0)[:, None] & (columns_n < tl.where(valid, N, 0))[None, :]
    cos, sin = COS + row * cos_row, SIN + row * sin_row
    q = turned(Q + row * q_row + head[:, None] * q_head, cos, sin, columns_n, new_q, N)
    k = turned(K + row * k_row + group * k_head + tl.arange(0, 1)[:, None], cos, sin, columns_n, new_k, N)
    new_p = columns_p < tl.where(valid, P, 0)
    v = tl.load(V + row * v_row + group * v_head + columns_p, mask=new_p, other=0.0)
    largest = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale  # each sees itself
    total = tl.full([HEADS], 1.0, tl.float32)
    out = tl.zeros([HEADS, BLOCK_P], tl.float32) + v.to(tl.float32)[None, :]
    for start in range(0, PLACES, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < PLACES
        seen = inside & (tl.load(present + place, mask=inside, other=0) != 0) & (place != oldest)
        k_at = ring_k + columns_n[:, None] + place[None, :] * (GROUPS * N)
        v_at = ring_v + place[:, None] * (GROUPS * P) + columns_p[None, :]
        keys = tl.load(k_at, mask=real_n[:, None] & inside[None, :], other=0.0)
        values = tl.load(v_at, mask=inside[:, None] & real_p[None, :], other=0.0)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        values = tl.where(seen[:, None], values, 0.0)
        highest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 1)
        added = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        out = out * shrink[:, None] + added
        largest = highest
    out = out / total[:, None]
    if HAS_LOGIT:
        out *= 1.0 - tl.sigmoid(tl.load(LOGIT + row * logit_row).to(tl.float32))
    out = tl.where(valid, out, 0.0)
    o_at = row * out_row + head[:, None] * P + columns_p[None, :]
    tl.store(OUT + o_at, out.to(OUT.dtype.element_ty), mask=(each < RATIO)[:, None] & real_p[None, :])
    to_k = ring_k + oldest * (GROUPS * N) + tl.arange(0, 1)[:, None] + columns_n[None, :]
    tl.store(to_k, k.to(RING_K.dtype.element_ty), mask=new_k)
    tl.store(ring_v + oldest * (GROUPS * P) + columns_p, v.to(RING_V.dtype.element_ty), mask=new_p)
    if (group == 0) & valid:
        tl.store(present + oldest, 1.0)


def ring(inputs: RingInputs) -> Tensor:
    """The operator on a Triton kernel."""
    q, k, v, cos, sin = (rows_of(tensor) for tensor in inputs[:5])
    (batch, heads, size), (_, groups, value_size) = q.shape, v.shape
    rings, places, ratio = (inputs.ring_k, inputs.ring_v), inputs.ring_k.shape[1], heads // groups
    o, logit = ring_output(inputs), inputs.logit
    out = o if inputs.out is None else inputs.out
    columns, warps, stages = tile_of_ring(max(size, value_size), places)
    ring_kernel[(batch * groups,)](
        q,
        k,
        v,
        cos,
        sin,
        *rings,
        inputs.present,
        as_bytes(inputs.valid),
        inputs.rows.contiguous(),
        inputs.turn.contiguous(),
        logit,
        out,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        *(each.stride(0) for each in (*rings, inputs.present)),
        0 if logit is None else logit.stride(0),
        out.stride(0),
        inputs.scale * LOG2_E,
        PLACES=places,
        GROUPS=groups,
        RATIO=ratio,
        N=size,
        P=value_size,
        BLOCK_N=tile_size(size),
        BLOCK_P=tile_size(value_size),
        COLUMNS=columns,
        HEADS=tile_size(ratio),
        HAS_VALID=inputs.valid is not None,
        HAS_LOGIT=logit is not None,
        num_warps=warps,
        num_stages=stages,
    )
    return o


def tile_of_ring(size: int, places: int) -> tuple[int, int, int]:
    """Return how many places are read at once, by how many warps, and the loop's stages: of eight the fastest
    on an H200 with 64 to 1,024 requests, N = P = 128, bfloat16.
    """
    return min(32 if size <= 128 else 16, tile_size(places)), 4, 3
