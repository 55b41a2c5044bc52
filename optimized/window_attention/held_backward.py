# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the gradients of window attention in blocks of one window, in half precision.

Letters and equations as in `batched_windows`, the order of the tokens and its blocks in `window_plan`; what
is rounded as in `window_gradients`. No windows are compared. Pairs stand with keys in rows and queries in
columns: then a window's keys fit the registers at once for some queries of one head, whose ō·o is summed
before it is needed, and ∂k and ∂v take the pairs as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import Tiles, held, is_held, offsets, part_of_block, store_tile, tile_at, turns_of_program

HALVES = (torch.bfloat16, torch.float16)
QUERY_HELD = dict.fromkeys(HALVES, Tiles(64, 256, 8, 3))  # queries, and keys, which are held
KEY_HELD = dict.fromkeys(HALVES, Tiles(128, 64, 8, 5))  # keys, and queries, which are loaded two tiles ahead
ANY = 2**30  # keys: more than any window has


@triton.jit
def held_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale):
    """For keys of one window, in rows, and queries of it, in columns: p_ij and ō_i·v_j. Tokens past the
    window's end are 0 and need no mask: their p_ij is finite, all that it is multiplied by is 0."""
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    target = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
    return tl.exp2(tl.minimum(scores * scale - lse[None, :], 0.0)), target


@triton.jit
def token_of_turn(TOKEN, start, end, group, turn, RATIO: tl.constexpr, ROWS: tl.constexpr):
    """The tokens of one of a block's parts and their places; its head; which are real."""
    place = start + turn // RATIO * ROWS + tl.arange(0, ROWS)
    real = place < end
    head = tl.cast(group * RATIO + turn % RATIO, tl.int64)
    return tl.load(TOKEN + place, mask=real, other=0), place, head, real


@triton.jit
def query_gradient_held_kernel(
    Q,
    K,
    V,
    O_GRAD,
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
):
    """Eq. (2), q̄, as `query_gradient_kernel`, for blocks of one window that a tile holds, `held`, and for
    those of no window: `share` of a block's parts and heads of one group in turn, for which keys and values
    are loaded once."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO * (BLOCK // ROWS))
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        start, end, low, high = part_of_block(BLOCKS, block, BLOCK, BLOCK)
        if low == high:
            for turn in range(first, last):
                token, place, head, real = token_of_turn(TOKEN, start, end, group, turn, RATIO, ROWS)
                at = tl.cast(token, tl.int64) * HEADS + head
                store_tile(Q_GRAD + at * N, tl.zeros([ROWS, BLOCK_N], tl.float32), columns_n, real, N)
        elif held(WINDOW, low, high, KEYS, BLOCK):
            row = low + tl.arange(0, COLUMNS)
            seen = row < high
            other = tl.load(TOKEN + row, mask=seen, other=0)
            k_place = offsets(other, length, k_batch, k_token, FLAT)
            v_place = offsets(other, length, v_batch, v_token, FLAT)
            k_tile = tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, seen, N)
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, seen, P)
            for turn in range(first, last):
                token, place, head, real = token_of_turn(TOKEN, start, end, group, turn, RATIO, ROWS)
                q_place = offsets(token, length, q_batch, q_token, FLAT)
                g_place = offsets(token, length, g_batch, g_token, FLAT)
                q_tile = tile_at(Q + head * q_head, q_place, columns_n, real, N)
                g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, real, P)
                at = tl.cast(token, tl.int64) * HEADS + head
                lse = tl.load(LSE + at, mask=real, other=0.0)
                weights, target = held_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale)
                delta = tl.sum(weights * target, 0)
                tl.store(LSE_AT + head * count + place, lse, mask=real)
                tl.store(DELTA_AT + head * count + place, delta, mask=real)
                scores_grad = (weights * (target - delta[None, :])).to(k_tile.dtype)
                q_grad = tl.dot(tl.trans(k_tile), scores_grad, input_precision="ieee") * natural_scale
                where = real[None, :] & (columns_n < N)[:, None]
                pointers = (Q_GRAD + at * N)[None, :] + columns_n[:, None]
                tl.store(pointers, q_grad.to(Q_GRAD.dtype.element_ty), mask=where)


@triton.jit
def key_gradient_held_kernel(
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
    """Eq. (2), k̄ and v̄, as `key_gradient_kernel`, for blocks of one window, however large, and for those of
    no window."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, BLOCK // ROWS)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), last, first)
        for turn in range(first, turns):
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            real = place < end
            token = tl.load(TOKEN + place, mask=real, other=0)
            k_place = offsets(token, length, k_batch, k_token, FLAT)
            v_place = offsets(token, length, v_batch, v_token, FLAT)
            k_tile = tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, real, N)
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, real, P)
            k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
            v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for pair in range(0, RATIO * tl.cdiv(high - low, COLUMNS)):
                head = tl.cast(group * RATIO + pair % RATIO, tl.int64)
                row = low + pair // RATIO * COLUMNS + tl.arange(0, COLUMNS)
                seen = row < high
                other = tl.load(TOKEN + row, mask=seen, other=0)
                q_place = offsets(other, length, q_batch, q_token, FLAT)
                g_place = offsets(other, length, g_batch, g_token, FLAT)
                q_tile = tile_at(Q + head * q_head, q_place, columns_n, seen, N)
                g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, seen, P)
                lse = tl.load(LSE_AT + head * count + row, mask=seen, other=0.0)
                delta = tl.load(DELTA_AT + head * count + row, mask=seen, other=0.0)
                weights, target = held_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale)
                scores_grad = weights * (target - delta[None, :])
                v_grad = tl.dot(weights.to(g_tile.dtype), g_tile, v_grad, input_precision="ieee")
                k_grad = tl.dot(scores_grad.to(q_tile.dtype), q_tile, k_grad, input_precision="ieee")
            at = tl.cast(token, tl.int64) * (HEADS // RATIO) + group
            store_tile(K_GRAD + at * N, k_grad * natural_scale, columns_n, real, N)
            store_tile(V_GRAD + at * P, v_grad, columns_p, real, P)
