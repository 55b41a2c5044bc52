# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for window attention: tokens gathered window by window, forward, ∂q, and ∂k with ∂v.

Letters and equations as in `batched_windows`, the order of the tokens and its blocks in `window_plan`. A
program takes a block of one head and walks over the tokens of all windows that the block touches. Heads are
launched fastest: those of a group find its keys in the cache. Products of half-precision tokens take the
softmax's weights in that precision too and sum in float32. Scores live in powers of two: lse is log2 of
softmax's denominator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import window_plan
from .launch import launching
from .scan_tiles import rows_of
from .window_tiles import (
    Tiles,
    held,
    keys_held,
    launch,
    launch_held,
    launch_rest,
    offsets,
    part_of_block,
    shared_arguments,
    store_tile,
    tile_at,
    tiles,
    tokens_at,
    turns_of_program,
)

FORWARD = tiles(Tiles(64, 64, 4, 3), Tiles(16, 16, 4, 1))
HELD = dict.fromkeys((torch.bfloat16, torch.float16), Tiles(window_plan.BLOCK, 256, 8, 2))  # all keys at once
QUERY_GRADIENT = tiles(Tiles(64, 64, 4, 3), Tiles(16, 16, 8, 1))
KEY_GRADIENT = tiles(Tiles(128, 32, 8, 3), Tiles(16, 16, 4, 1))


@triton.jit
def attend_held_kernel(
    Q,
    K,
    V,
    TOKEN,
    WINDOW,
    BLOCKS,
    OUT,
    LSE,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    length,
    scale,
    share,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Eq. (1) for blocks of one window that a tile holds, `held`, and for those of no window: `share` heads of
    one group, for which the keys and values are loaded once."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    blocks = tl.load(BLOCKS)
    following = part_of_block(BLOCKS, begin, BLOCK, BLOCK)
    for block in range(begin, blocks, step):
        start, end, low, high = following
        following = part_of_block(BLOCKS, tl.minimum(block + step, blocks - 1), BLOCK, BLOCK)
        place = start + tl.arange(0, BLOCK)
        real = place < end
        token = tl.load(TOKEN + place, mask=real, other=0)
        if low == high:
            for head in range(group * RATIO + first, group * RATIO + last):
                at = tl.cast(token, tl.int64) * HEADS + head
                store_tile(OUT + at * P, tl.zeros([BLOCK, BLOCK_P], tl.float32), columns_p, real, P)
                tl.store(LSE + at, tl.zeros([BLOCK], tl.float32), mask=real)
        elif held(WINDOW, low, high, KEYS, BLOCK):
            count, row = high - low, low + tl.arange(0, KEYS)
            seen = row < high
            other = tl.load(TOKEN + row, mask=seen, other=0)
            k_place, v_place = (
                offsets(other, length, k_batch, k_token, FLAT),
                offsets(other, length, v_batch, v_token, FLAT),
            )
            k_tile = tl.trans(tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, seen, N))
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, seen, P)
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            for head in range(group * RATIO + first, group * RATIO + last):
                q_tile = tile_at(Q + tl.cast(head, tl.int64) * q_head, q_place, columns_n, real, N)
                scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
                if count < KEYS:
                    scores = tl.where((tl.arange(0, KEYS) < count)[None, :], scores, -1e30)
                count += tl.minimum(head, 0)  # 0, but a mask known to stay would fill the registers
                largest = tl.max(scores, 1)
                weights = tl.exp2(scores - largest[:, None])
                total = tl.sum(weights, 1)
                at = tl.cast(token, tl.int64) * HEADS + head
                tl.store(LSE + at, largest + tl.log2(total), mask=real)  # here: the sum ends before the product
                out = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
                store_tile(OUT + at * P, out * (1.0 / total)[:, None], columns_p, real, P)


@triton.jit
def attend_kernel(
    Q,
    K,
    V,
    TOKEN,
    WINDOW,
    BLOCKS,
    OUT,
    LSE,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    length,
    scale,
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
    """Eq. (1) for the other blocks, for all if KEYS = 0: a program takes `share` of a block's parts and heads
    of one group in turn, and walks over the keys of each."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO * (BLOCK // ROWS))
    k, v = K + tl.cast(group, tl.int64) * k_head, V + tl.cast(group, tl.int64) * v_head
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = last
        if KEYS > 0:
            start, end, low, high = part_of_block(BLOCKS, block, BLOCK, BLOCK)
            if (low == high) | held(WINDOW, low, high, KEYS, BLOCK):
                turns = first
        for turn in range(first, turns):
            head = group * RATIO + turn % RATIO
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn // RATIO, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            token, window = tokens_at(TOKEN, WINDOW, place, end)
            taken = window >= 0
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            q_tile = tile_at(Q + tl.cast(head, tl.int64) * q_head, q_place, columns_n, taken, N)
            largest = tl.full([ROWS], -1e30, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            out = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for column in range(low, high, COLUMNS):
                row = column + tl.arange(0, COLUMNS)
                seen = row < high
                other, other_window = tokens_at(TOKEN, WINDOW, row, high)
                k_tile = tile_at(k, offsets(other, length, k_batch, k_token, FLAT), columns_n, seen, N)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
                scores = tl.where(window[:, None] == other_window[None, :], scores, -1e30)
                highest = tl.maximum(largest, tl.max(scores, 1))
                weights = tl.exp2(scores - highest[:, None])  # wiped out by the first score that counts
                shrink = tl.exp2(largest - highest)
                total = total * shrink + tl.sum(weights, 1)
                v_tile = tile_at(v, offsets(other, length, v_batch, v_token, FLAT), columns_p, seen, P)
                out = tl.dot(weights.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision="ieee")
                largest = highest
            total = tl.where(taken, total, 1.0)
            at = tl.cast(token, tl.int64) * HEADS + head
            out = tl.where(taken[:, None], out / total[:, None], 0.0)
            store_tile(OUT + at * P, out, columns_p, place < end, P)
            tl.store(LSE + at, tl.where(taken, largest + tl.log2(total), 0.0), mask=place < end)


@triton.jit
def query_gradient_kernel(
    Q,
    K,
    V,
    OUT,
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
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Eq. (2), q̄, for blocks of tokens of one head; and lse and ō·o in the order of the places, (H, B·L)."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    q, k, v = Q + head * q_head, K + head // RATIO * k_head, V + head // RATIO * v_head
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    begin, programs = tl.program_id(0) // HEADS, tl.num_programs(0) // HEADS
    items = tl.load(BLOCKS) * (BLOCK // ROWS)
    following = part_of_block(BLOCKS, begin, ROWS, BLOCK)
    for item in range(begin, items, programs):
        start, end, low, high = following
        following = part_of_block(BLOCKS, tl.minimum(item + programs, items - 1), ROWS, BLOCK)
        place = start + tl.arange(0, ROWS)
        token, window = tokens_at(TOKEN, WINDOW, place, end)
        taken = window >= 0
        at = tl.cast(token, tl.int64) * HEADS + head
        g_place = offsets(token, length, g_batch, g_token, FLAT)
        g_tile = tile_at(O_GRAD + head * g_head, g_place, columns_p, taken, P)
        o_tile = tile_at(OUT, at * P, columns_p, taken, P)
        delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
        lse = tl.load(LSE + at, mask=taken, other=0.0)
        tl.store(DELTA_AT + head * count + place, delta, mask=taken)
        tl.store(LSE_AT + head * count + place, lse, mask=taken)
        q_tile = tile_at(q, offsets(token, length, q_batch, q_token, FLAT), columns_n, taken, N)
        q_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for column in range(low, high, COLUMNS):
            row = column + tl.arange(0, COLUMNS)
            seen = row < high
            other, other_window = tokens_at(TOKEN, WINDOW, row, high)
            k_tile = tile_at(k, offsets(other, length, k_batch, k_token, FLAT), columns_n, seen, N)
            v_tile = tile_at(v, offsets(other, length, v_batch, v_token, FLAT), columns_p, seen, P)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            target = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            weights = tl.exp2(tl.minimum(scores * scale - lse[:, None], 0.0))
            together = window[:, None] == other_window[None, :]
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
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Eq. (2), k̄ and v̄, for blocks of tokens of one group: it walks over pairs of tokens and the
    group's heads in one loop, adding nothing atomically."""
    groups = HEADS // RATIO
    group = tl.cast(tl.program_id(0) % groups, tl.int64)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    begin, programs = tl.program_id(0) // groups, tl.num_programs(0) // groups
    items = tl.load(BLOCKS) * (BLOCK // ROWS)
    following = part_of_block(BLOCKS, begin, ROWS, BLOCK)
    for item in range(begin, items, programs):
        start, end, low, high = following
        following = part_of_block(BLOCKS, tl.minimum(item + programs, items - 1), ROWS, BLOCK)
        place = start + tl.arange(0, ROWS)
        token, window = tokens_at(TOKEN, WINDOW, place, end)
        taken = window >= 0
        k_place = offsets(token, length, k_batch, k_token, FLAT)
        v_place = offsets(token, length, v_batch, v_token, FLAT)
        k_tile = tile_at(K + group * k_head, k_place, columns_n, taken, N)
        v_tile = tile_at(V + group * v_head, v_place, columns_p, taken, P)
        k_grad = tl.zeros([ROWS, BLOCK_N], tl.float32)
        v_grad = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for step in range(0, RATIO * tl.cdiv(high - low, COLUMNS)):
            head = group * RATIO + step % RATIO
            row = low + step // RATIO * COLUMNS + tl.arange(0, COLUMNS)
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
        at = tl.cast(token, tl.int64) * groups + group
        store_tile(K_GRAD + at * N, k_grad * natural_scale, columns_n, place < end, N)
        store_tile(V_GRAD + at * P, v_grad, columns_p, place < end, P)


@launching
def forward(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`batched_windows.forward` on Triton kernels: o (B, L, H, P), and lse (B, L, H) as a power of two."""
    q, k, v = (rows_of(tensor.to(q.dtype)) for tensor in (q, k, v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = shared_arguments({"q": q, "k": k, "v": v}, places, blocks, scale)
    arguments |= {"OUT": o, "LSE": lse, "KEYS": keys_held(HELD, q)}
    if arguments["KEYS"]:
        launch_held(attend_held_kernel, HELD, (q, k, v), **arguments)
    launch_rest(attend_kernel, FORWARD, (q, k, v), **arguments)
    return o, lse


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
    q, k, v, o_grad = (rows_of(tensor.to(q.dtype)) for tensor in (q, k, v, o_grad))
    arguments = shared_arguments({"q": q, "k": k, "v": v, "g": o_grad}, places, blocks, scale)
    arguments |= {"natural_scale": scale, "count": places.shape[1]}
    sorted_lse, sorted_delta = lse.new_empty(2, q.shape[2], places.shape[1])
    arguments |= {"LSE_AT": sorted_lse, "DELTA_AT": sorted_delta}
    q_grad, k_grad, v_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    launch(
        query_gradient_kernel,
        QUERY_GRADIENT,
        q.shape[2],
        (q, k, v, o.contiguous(), o_grad),
        LSE=lse.contiguous(),
        Q_GRAD=q_grad,
        **arguments,
    )
    launch(
        key_gradient_kernel,
        KEY_GRADIENT,
        k.shape[2],
        (q, k, v, o_grad),
        K_GRAD=k_grad,
        V_GRAD=v_grad,
        **arguments,
    )
    return q_grad, k_grad, v_grad
