# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the gradients of window attention: ∂q, and ∂k with ∂v.

Letters and equations as in `batched_windows`, the order of the tokens and its blocks in `window_plan`. For
blocks of one window `held_gradients` has kernels of its own; those here walk over the tokens of all windows
that a block touches. Groups are launched fastest: heads of one find its keys in the cache. Products of
half-precision tokens take weights and their gradients in that precision too and sum in float32. lse is a
power of two, as `window_kernels` gives it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import launching
from ..scan.kernels.tiles import rows_of
from .held_backward import ANY, KEY_HELD, QUERY_HELD, key_gradient_held_kernel, query_gradient_held_kernel
from .tiles import (
    Tiles,
    is_held,
    keys_held,
    launch_held,
    launch_rest,
    offsets,
    part_of_block,
    shared_arguments,
    sizes_of,
    store_tile,
    tile_at,
    tiles,
    tokens_at,
    turns_of_program,
)

QUERY_GRADIENT = tiles(Tiles(64, 32, 4, 3), Tiles(16, 16, 8, 1))
KEY_GRADIENT = tiles(Tiles(128, 32, 8, 3), Tiles(16, 16, 4, 1))


@triton.jit
def weighted_pairs(
    q_tile,
    g_tile,
    k,
    v,
    TOKEN,
    WINDOW,
    window,
    lse,
    column,
    high,
    k_batch,
    k_token,
    v_batch,
    v_token,
    length,
    scale,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
):
    """For a tile of queries and COLUMNS keys: p_ij, ō_i·v_j, whether i and j share a window, and the keys."""
    row = column + tl.arange(0, COLUMNS)
    seen = row < high
    other, other_window = tokens_at(TOKEN, WINDOW, row, high)
    k_place = offsets(other, length, k_batch, k_token, FLAT)
    v_place = offsets(other, length, v_batch, v_token, FLAT)
    k_tile = tile_at(k, k_place, tl.arange(0, BLOCK_N), seen, N)
    v_tile = tile_at(v, v_place, tl.arange(0, BLOCK_P), seen, P)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    target = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
    weights = tl.exp2(tl.minimum(scores * scale - lse[:, None], 0.0))
    return weights, target, window[:, None] == other_window[None, :], k_tile


@triton.jit
def query_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    OUT,
    TOKEN,
    WINDOW,
    BLOCKS,
    LSE,
    LSE_AT,
    DELTA_AT,
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
    count,
    scale,
    natural_scale,
    share,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    FINE: tl.constexpr,
):
    """Eq. (2), q̄, for the blocks that `query_gradient_held_kernel` leaves, for all if KEYS = 0, in the turns
    of `attend_kernel`; and lse and ō·o in the order of the places, (H, B·L)."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO * (BLOCK // ROWS))
    k, v = K + tl.cast(group, tl.int64) * k_head, V + tl.cast(group, tl.int64) * v_head
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = last
        if KEYS > 0:
            turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), first, last)
        for turn in range(first, turns):
            head = tl.cast(group * RATIO + turn % RATIO, tl.int64)
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn // RATIO, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            token, window = tokens_at(TOKEN, WINDOW, place, end)
            taken = window >= 0
            at = tl.cast(token, tl.int64) * HEADS + head
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            g_place = offsets(token, length, g_batch, g_token, FLAT)
            g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, taken, P)
            lse = tl.load(LSE + at, mask=taken, other=0.0)
            q_tile = tile_at(Q + head * q_head, q_place, columns_n, taken, N)
            if FINE:  # ō·o as Σ_j p_ij ō_i·v_j: where keys have a mean, the rounding of o shows
                delta = tl.zeros([ROWS], tl.float32)
                for column in range(low, high, COLUMNS):
                    weights, target, together, k_tile = weighted_pairs(
                        q_tile, g_tile, k, v, TOKEN, WINDOW, window, lse, column, high,
                        k_batch, k_token, v_batch, v_token, length, scale, N, P, BLOCK_N, BLOCK_P, COLUMNS,
                        FLAT,
                    )  # fmt: skip
                    delta += tl.sum(tl.where(together, weights * target, 0.0), 1)
            else:
                o_tile = tile_at(OUT, at * P, columns_p, taken, P)
                delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
            tl.store(DELTA_AT + head * count + place, delta, mask=taken)
            tl.store(LSE_AT + head * count + place, lse, mask=taken)
            q_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for column in range(low, high, COLUMNS):
                weights, target, together, k_tile = weighted_pairs(
                    q_tile, g_tile, k, v, TOKEN, WINDOW, window, lse, column, high,
                    k_batch, k_token, v_batch, v_token, length, scale, N, P, BLOCK_N, BLOCK_P, COLUMNS, FLAT,
                )  # fmt: skip
                scores_grad = tl.where(together, weights * (target - delta[:, None]), 0.0)
                q_grad = tl.dot(scores_grad.to(k_tile.dtype), k_tile, q_grad, input_precision="ieee")
            store_tile(Q_GRAD + at * N, q_grad * natural_scale, columns_n, place < end, N)


@triton.jit
def key_gradient_kernel(
    Q,
    K,
    V,
    O_GRAD,
    TOKEN,
    WINDOW,
    BLOCKS,
    LSE_AT,
    DELTA_AT,
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
    count,
    scale,
    natural_scale,
    share,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Eq. (2), k̄ and v̄, for the blocks that `key_gradient_held_kernel` leaves, for all if KEYS = 0: `share`
    of a block's parts for one group. It walks over pairs of tokens and the group's heads in one loop, adding
    nothing atomically."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, BLOCK // ROWS)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = last
        if KEYS > 0:
            turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), first, last)
        for turn in range(first, turns):
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            token, window = tokens_at(TOKEN, WINDOW, place, end)
            taken = window >= 0
            k_place = offsets(token, length, k_batch, k_token, FLAT)
            v_place = offsets(token, length, v_batch, v_token, FLAT)
            k_tile = tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, taken, N)
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, taken, P)
            k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
            v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for pair in range(0, RATIO * tl.cdiv(high - low, COLUMNS)):
                head = tl.cast(group * RATIO + pair % RATIO, tl.int64)
                row = low + pair // RATIO * COLUMNS + tl.arange(0, COLUMNS)
                seen = row < high
                other, other_window = tokens_at(TOKEN, WINDOW, row, high)
                q_place = offsets(other, length, q_batch, q_token, FLAT)
                g_place = offsets(other, length, g_batch, g_token, FLAT)
                q_tile = tile_at(Q + head * q_head, q_place, columns_n, seen, N)
                g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, seen, P)
                lse = tl.load(LSE_AT + head * count + row, mask=seen, other=0.0)
                delta = tl.load(DELTA_AT + head * count + row, mask=seen, other=0.0)
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                target = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                weights = tl.exp2(tl.minimum(scores * scale - lse[None, :], 0.0))
                weights = tl.where(window[:, None] == other_window[None, :], weights, 0.0)
                scores_grad = weights * (target - delta[None, :])
                v_grad = tl.dot(weights.to(g_tile.dtype), g_tile, v_grad, input_precision="ieee")
                k_grad = tl.dot(scores_grad.to(q_tile.dtype), q_tile, k_grad, input_precision="ieee")
            at = tl.cast(token, tl.int64) * (HEADS // RATIO) + group
            store_tile(K_GRAD + at * N, k_grad * natural_scale, columns_n, place < end, N)
            store_tile(V_GRAD + at * P, v_grad, columns_p, place < end, P)


@launching
def backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    blocks: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batched_windows.backward` on Triton kernels: the gradients of q, k and v in the dtype of `q`."""
    q, k, v, o_grad = tensors = tuple(rows_of(tensor.to(q.dtype)) for tensor in (q, k, v, o_grad))
    arguments = shared_arguments({"q": q, "k": k, "v": v, "g": o_grad}, places, blocks, scale)
    sorted_lse, sorted_delta = lse.new_empty(2, q.shape[2], places.shape[1])
    arguments |= {"LSE_AT": sorted_lse, "DELTA_AT": sorted_delta, "natural_scale": scale}
    arguments |= {"count": places.shape[1]}
    q_grad, k_grad, v_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    keys, heads = keys_held(QUERY_HELD, q), q.shape[2] // k.shape[2]
    of_queries = arguments | {"LSE": lse.contiguous(), "Q_GRAD": q_grad, "KEYS": keys}
    of_keys = arguments | {"K_GRAD": k_grad, "V_GRAD": v_grad, "KEYS": ANY if keys else 0}
    if keys:
        sizes = sizes_of(QUERY_HELD[q.dtype])
        launch_held(query_gradient_held_kernel, QUERY_HELD, heads, tensors, **of_queries, **sizes)
    fine = {"OUT": o.contiguous(), "FINE": q.dtype != torch.float32}
    launch_rest(query_gradient_kernel, QUERY_GRADIENT, heads, tensors, **of_queries, **fine)
    if keys:
        launch_held(key_gradient_held_kernel, KEY_HELD, 1, tensors, **of_keys, **sizes_of(KEY_HELD[q.dtype]))
    launch_rest(key_gradient_kernel, KEY_GRADIENT, 1, tensors, **of_keys)
    return q_grad, k_grad, v_grad
