# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the gradients of sliding-window attention: ∂q by tiles of tokens, ∂k and ∂v by keys.

Letters and equations as in `torch_engine`, places and spans as in `spans`. Nothing is added atomically: a
program of keys walks over the tokens that read them and over the heads of their group, so that gradients are
the same in every run. lse is a power of two, as `kernels` gives it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..engine.launch import ceil_div, contiguous, rows_of
from .kernels import (
    NOWHERE,
    Tiles,
    fitting,
    lowest_read,
    of_head,
    shared_arguments,
    store_tile,
    table,
    taken_of,
    tile_at,
    tile_of_program,
    tile_of_tokens,
)
from .operator import SlidingGrads, SlidingInputs, SlidingOutputs

QUERY_GRADIENT = table(Tiles(64, 32, 4, 3), Tiles(64, 32, 8, 2), Tiles(16, 16, 8, 1))
KEY_GRADIENT = table(Tiles(64, 32, 4, 2), Tiles(64, 16, 8, 1), Tiles(16, 16, 8, 1))


@triton.jit
def weighted_pairs(
    q_tile,
    g_tile,
    k,
    v,
    k_token,
    v_token,
    VALID,
    batch,
    keys,
    column,
    end,
    place,
    low,
    lse,
    scale,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """p and ō·v of a tile of tokens and the keys from `column` on, and those keys; p is 0 where not read."""
    key = column + tl.arange(0, COLUMNS)
    there = taken_of(VALID, batch, keys, key, key < end, HAS_VALID)
    k_tile = tile_at(k, key, k_token, tl.arange(0, BLOCK_N), there, N)
    v_tile = tile_at(v, key, v_token, tl.arange(0, BLOCK_P), there, P)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    target = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
    seen = (key[None, :] <= place[:, None]) & (key[None, :] >= low[:, None]) & there[None, :]
    weights = tl.exp2(tl.minimum(scores * scale - lse[:, None], 0.0))
    return tl.where(seen, weights, 0.0), target, k_tile


@triton.jit
def query_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    ASKS,
    VALID,
    LOW,
    LSE,
    OUT,
    DELTA,
    Q_GRAD,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    length,
    keys,
    window,
    scale,
    natural_scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ASKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LOW: tl.constexpr,
    FINE: tl.constexpr,
):
    """Eq. (2), q̄, for a tile of tokens of one head; and ō·o, (B, H, L), for the gradients of keys."""
    batch, tile, head = tile_of_program(tl.cdiv(length, ROWS), HEADS)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    token, real, asking, place, low, first, end = tile_of_tokens(
        ASKS, LOW, batch, tile, length, keys, window, ROWS, HAS_ASKS, HAS_LOW
    )
    k = of_head(K, batch, k_batch, head // RATIO, k_head)
    v = of_head(V, batch, v_batch, head // RATIO, v_head)
    q_tile = tile_at(of_head(Q, batch, q_batch, head, q_head), token, q_token, columns_n, asking, N)
    g_tile = tile_at(of_head(O_GRAD, batch, g_batch, head, g_head), token, g_token, columns_p, asking, P)
    row = (batch * HEADS + head) * length + token
    lse = tl.load(LSE + row, mask=asking, other=0.0)
    delta = tl.zeros([ROWS], tl.float32)
    if FINE:  # ō·o as Σ_j p_tj ō_t·v_j: where keys have a mean, the rounding of o shows
        for column in range(first, end, COLUMNS):
            weights, target, k_tile = weighted_pairs(
                q_tile, g_tile, k, v, k_token, v_token, VALID, batch, keys, column, end, place, low, lse,
                scale, N, P, BLOCK_N, BLOCK_P, COLUMNS, HAS_VALID,
            )  # fmt: skip
            delta += tl.sum(weights * target, 1)
    else:
        o_tile = tile_at(OUT + (batch * length * HEADS + head) * P, token, HEADS * P, columns_p, asking, P)
        delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(DELTA + row, delta, mask=real)
    q_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for column in range(first, end, COLUMNS):
        weights, target, k_tile = weighted_pairs(
            q_tile, g_tile, k, v, k_token, v_token, VALID, batch, keys, column, end, place, low, lse,
            scale, N, P, BLOCK_N, BLOCK_P, COLUMNS, HAS_VALID,
        )  # fmt: skip
        scores_grad = weights * (target - delta[:, None])
        q_grad = tl.dot(scores_grad.to(k_tile.dtype), k_tile, q_grad, input_precision="ieee")
    store_tile(
        Q_GRAD, ((batch * length + token) * HEADS + head) * N, q_grad * natural_scale, columns_n, real, N
    )


@triton.jit
def key_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    ASKS,
    VALID,
    LOW,
    HIGH,
    LSE,
    DELTA,
    K_GRAD,
    V_GRAD,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    length,
    keys,
    window,
    scale,
    natural_scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ASKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """Eq. (2), k̄ and v̄, for a tile of keys of one group, in one loop over tiles of tokens and heads."""
    batch, tile, group = tile_of_program(tl.cdiv(keys, ROWS), HEADS // RATIO)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    before = keys - length
    key = tile * ROWS + tl.arange(0, ROWS)
    real = key < keys
    there = taken_of(VALID, batch, keys, key, real, HAS_VALID)
    last = tl.minimum(tile * ROWS + ROWS, keys) - 1
    end = tl.load(HIGH + batch * keys + last) if HAS_LOW else tl.minimum(last + window, keys)
    first, end = tl.maximum(tile * ROWS - before, 0), end - before  # tokens that may read these keys
    if HAS_ASKS:  # without those at either end that ask nothing: an image between two texts, most often
        begin, final = NOWHERE, 0
        for start in range(first, end, COLUMNS):
            token = start + tl.arange(0, COLUMNS)
            asking = taken_of(ASKS, batch, length, token, token < end, HAS_ASKS)
            begin = tl.minimum(begin, tl.min(tl.where(asking, token, NOWHERE), 0))
            final = tl.maximum(final, tl.max(tl.where(asking, token + 1, 0), 0))
        first, end = tl.minimum(begin, final), final
    k_tile = tile_at(of_head(K, batch, k_batch, group, k_head), key, k_token, columns_n, there, N)
    v_tile = tile_at(of_head(V, batch, v_batch, group, v_head), key, v_token, columns_p, there, P)
    k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
    v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for pair in range(0, RATIO * tl.cdiv(tl.maximum(end - first, 0), COLUMNS)):
        head = tl.cast(group * RATIO + pair % RATIO, tl.int64)
        token = first + pair // RATIO * COLUMNS + tl.arange(0, COLUMNS)
        asking = taken_of(ASKS, batch, length, token, token < end, HAS_ASKS)
        place = token + before
        low = lowest_read(LOW, batch, keys, place, asking, window, HAS_LOW)
        q_tile = tile_at(of_head(Q, batch, q_batch, head, q_head), token, q_token, columns_n, asking, N)
        g_tile = tile_at(of_head(O_GRAD, batch, g_batch, head, g_head), token, g_token, columns_p, asking, P)
        row = (batch * HEADS + head) * length + token
        lse = tl.load(LSE + row, mask=asking, other=0.0)
        delta = tl.load(DELTA + row, mask=asking, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        target = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
        seen = (key[:, None] <= place[None, :]) & (key[:, None] >= low[None, :])
        seen = seen & there[:, None] & asking[None, :]
        weights = tl.exp2(tl.minimum(scores * scale - lse[None, :], 0.0))
        weights = tl.where(seen, weights, 0.0)
        scores_grad = weights * (target - delta[None, :])
        v_grad = tl.dot(weights.to(g_tile.dtype), g_tile, v_grad, input_precision="ieee")
        k_grad = tl.dot(scores_grad.to(q_tile.dtype), q_tile, k_grad, input_precision="ieee")
    at = (batch * keys + key) * (HEADS // RATIO) + group
    store_tile(K_GRAD, at * N, k_grad * natural_scale, columns_n, real, N)
    store_tile(V_GRAD, at * P, v_grad, columns_p, real, P)


def backward(inputs: SlidingInputs, outputs: SlidingOutputs, grads: SlidingOutputs) -> SlidingGrads:
    """The gradients on Triton, in the dtype of q."""
    given = (*inputs[:3], grads.o)
    tensors = tuple(rows_of(tensor.to(inputs.q.dtype)) for tensor in given)
    by_name, (q, k, v) = dict(zip("qkvg", tensors, strict=True)), tensors[:3]
    found = SlidingGrads(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)))
    lse = outputs.lse.contiguous()
    known = {"LSE": lse, "DELTA": torch.empty_like(lse), "natural_scale": inputs.scale}
    batch, length, heads, _ = q.shape
    tiles = fitting(QUERY_GRADIENT, q, v)
    arguments = shared_arguments(by_name, inputs, tiles)
    own = {"OUT": outputs.o.contiguous(), "Q_GRAD": found.q, "FINE": q.dtype != torch.float32}
    grid = (batch * ceil_div(length, tiles.rows) * heads,)
    query_gradient_kernel[grid](*tensors, **arguments, **known, **own)
    tiles = fitting(KEY_GRADIENT, q, v)
    arguments = shared_arguments(by_name, inputs, tiles)
    own = {"HIGH": contiguous(inputs.high), "K_GRAD": found.k, "V_GRAD": found.v}
    grid = (batch * ceil_div(k.shape[1], tiles.rows) * k.shape[2],)
    key_gradient_kernel[grid](*tensors, **arguments, **known, **own)
    return found
