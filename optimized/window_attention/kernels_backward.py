# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the gradients of window attention: ∂q, and ∂k with ∂v.

Letters and equations as in `torch_engine`, the order of the tokens and its blocks in `layout.plan`. Blocks of
one window in half precision go to launches of their own, where no windows are compared. Pairs stand there
with keys in rows and queries in columns: then a window's keys fit the registers at once for some queries of
one head, whose ō·o is summed before it is needed, and ∂k and ∂v take the pairs as they are. The other
launches walk over the tokens of all windows that a block touches. Groups are launched fastest: heads of one
find its keys in the cache. Products of half-precision tokens take weights and their gradients in that
precision too and sum in float32. lse is a power of two, as `kernels` gives it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..engine.launch import rows_of
from .operator import AttentionGrads, AttentionInputs, AttentionOutputs
from .tiles import (
    Tiles,
    held,
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
HALVES = (torch.bfloat16, torch.float16)
QUERY_HELD = dict.fromkeys(HALVES, Tiles(64, 256, 8, 3))  # queries, and keys, which are held
KEY_HELD = dict.fromkeys(HALVES, Tiles(128, 64, 8, 5))  # keys, and queries, which are loaded two tiles ahead
ANY = 2**30  # keys: more than any window has


@triton.jit
def turned_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale):
    """For keys in rows and queries in columns: p_ij and ō_i·v_j. Tokens past the end of a window are 0 and
    need no mask: their p_ij is finite, all that it is multiplied by is 0."""
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
    Q, K, V, O_GRAD, TOKEN, WINDOW, BLOCKS, LSE, LSE_AT, DELTA_AT, Q_GRAD,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    length, count, scale, natural_scale, share,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
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
                weights, target = turned_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale)
                delta = tl.sum(weights * target, 0)
                tl.store(LSE_AT + head * count + place, lse, mask=real)
                tl.store(DELTA_AT + head * count + place, delta, mask=real)
                scores_grad = (weights * (target - delta[None, :])).to(k_tile.dtype)
                q_grad = tl.dot(tl.trans(k_tile), scores_grad, input_precision="ieee") * natural_scale
                where = real[None, :] & (columns_n < N)[:, None]
                pointers = (Q_GRAD + at * N)[None, :] + columns_n[:, None]
                tl.store(pointers, q_grad.to(Q_GRAD.dtype.element_ty), mask=where)


@triton.jit
def weighted_pairs(
    q_tile, g_tile, k, v, TOKEN, WINDOW, window, lse, column, high, k_batch, k_token, v_batch, v_token,
    length, scale,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
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
    Q, K, V, O_GRAD, OUT, TOKEN, WINDOW, BLOCKS, LSE, LSE_AT, DELTA_AT, Q_GRAD,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    length, count, scale, natural_scale, share,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
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
            valid = window >= 0
            at = tl.cast(token, tl.int64) * HEADS + head
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            g_place = offsets(token, length, g_batch, g_token, FLAT)
            g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, valid, P)
            lse = tl.load(LSE + at, mask=valid, other=0.0)
            q_tile = tile_at(Q + head * q_head, q_place, columns_n, valid, N)
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
                o_tile = tile_at(OUT, at * P, columns_p, valid, P)
                delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
            tl.store(DELTA_AT + head * count + place, delta, mask=valid)
            tl.store(LSE_AT + head * count + place, lse, mask=valid)
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
    Q, K, V, O_GRAD, TOKEN, WINDOW, BLOCKS, LSE_AT, DELTA_AT, K_GRAD, V_GRAD,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    length, count, scale, natural_scale, share,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, ONE_WINDOW: tl.constexpr,
):  # fmt: skip
    """Eq. (2), k̄ and v̄: `share` of a block's parts for one group. It walks over pairs of tokens and the
    group's heads in one loop, adding nothing atomically. With ONE_WINDOW for blocks of one window, however
    large, and those of no window, and no windows are compared; without it for the other blocks, for all if
    KEYS = 0."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, BLOCK // ROWS)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = last
        if ONE_WINDOW:
            turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), last, first)
        elif KEYS > 0:
            turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), first, last)
        for turn in range(first, turns):
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            if ONE_WINDOW:
                valid = place < end
                token = tl.load(TOKEN + place, mask=valid, other=0)
            else:
                token, window = tokens_at(TOKEN, WINDOW, place, end)
                valid = window >= 0
            k_place = offsets(token, length, k_batch, k_token, FLAT)
            v_place = offsets(token, length, v_batch, v_token, FLAT)
            k_tile = tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, valid, N)
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, valid, P)
            k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
            v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for pair in range(0, RATIO * tl.cdiv(high - low, COLUMNS)):
                head = tl.cast(group * RATIO + pair % RATIO, tl.int64)
                row = low + pair // RATIO * COLUMNS + tl.arange(0, COLUMNS)
                seen = row < high
                if ONE_WINDOW:
                    other = tl.load(TOKEN + row, mask=seen, other=0)
                else:
                    other, other_window = tokens_at(TOKEN, WINDOW, row, high)
                q_place = offsets(other, length, q_batch, q_token, FLAT)
                g_place = offsets(other, length, g_batch, g_token, FLAT)
                q_tile = tile_at(Q + head * q_head, q_place, columns_n, seen, N)
                g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, seen, P)
                lse = tl.load(LSE_AT + head * count + row, mask=seen, other=0.0)
                delta = tl.load(DELTA_AT + head * count + row, mask=seen, other=0.0)
                weights, target = turned_pairs(k_tile, v_tile, q_tile, g_tile, lse, scale)
                if not ONE_WINDOW:
                    weights = tl.where(window[:, None] == other_window[None, :], weights, 0.0)
                scores_grad = weights * (target - delta[None, :])
                v_grad = tl.dot(weights.to(g_tile.dtype), g_tile, v_grad, input_precision="ieee")
                k_grad = tl.dot(scores_grad.to(q_tile.dtype), q_tile, k_grad, input_precision="ieee")
            at = tl.cast(token, tl.int64) * (HEADS // RATIO) + group
            store_tile(K_GRAD + at * N, k_grad * natural_scale, columns_n, place < end, N)
            store_tile(V_GRAD + at * P, v_grad, columns_p, place < end, P)


def backward(inputs: AttentionInputs, outputs: AttentionOutputs, grads: AttentionOutputs) -> AttentionGrads:
    """The gradients of the operator on Triton kernels, in the dtype of `q`."""
    dtype = inputs.q.dtype
    q, k, v, o_grad = tensors = tuple(rows_of(tensor.to(dtype)) for tensor in (*inputs[:3], grads.o))
    count, lse = inputs.places.shape[1], outputs.lse
    arguments = shared_arguments({"q": q, "k": k, "v": v, "g": o_grad}, inputs)
    sorted_lse, sorted_delta = lse.new_empty(2, q.shape[2], count)
    arguments |= {
        "LSE_AT": sorted_lse,
        "DELTA_AT": sorted_delta,
        "natural_scale": inputs.scale,
        "count": count,
    }
    found = AttentionGrads(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)))
    keys, heads = keys_held(QUERY_HELD, q), q.shape[2] // k.shape[2]
    of_queries = arguments | {"LSE": lse.contiguous(), "Q_GRAD": found.q, "KEYS": keys}
    of_keys = arguments | {"K_GRAD": found.k, "V_GRAD": found.v, "KEYS": ANY if keys else 0}
    if keys:
        sizes = sizes_of(QUERY_HELD[dtype])
        launch_held(query_gradient_held_kernel, QUERY_HELD, heads, tensors, **of_queries, **sizes)
    fine = {"OUT": outputs.o.contiguous(), "FINE": dtype != torch.float32}
    launch_rest(query_gradient_kernel, QUERY_GRADIENT, heads, tensors, **of_queries, **fine)
    if keys:
        sizes = sizes_of(KEY_HELD[dtype])
        launch_held(key_gradient_kernel, KEY_HELD, 1, tensors, **of_keys, **sizes, ONE_WINDOW=True)
    launch_rest(key_gradient_kernel, KEY_GRADIENT, 1, tensors, **of_keys, ONE_WINDOW=False)
    return found
