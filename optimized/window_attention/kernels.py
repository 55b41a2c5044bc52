# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for window attention, forward: tokens gathered window by window.

Letters and equations as in `torch_engine`, the order of the tokens and its blocks in `layout.plan`. For a
block of one window that fits a tile, a program holds the window's keys and values, takes the heads of their
group one after the other, each with a softmax in one go, and loads the next head's queries meanwhile.
Elsewhere, in small windows, large ones and float32, it walks over the tokens of all windows that the block
touches. Products of half-precision tokens take the softmax's weights in that precision too and sum in
float32. Scores live in powers of two: lse is log2 of softmax's denominator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..engine.launch import rows_of
from ..layout import plan as window_plan
from .operator import AttentionInputs, AttentionOutputs, attention_outputs
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
    store_tile,
    tile_at,
    tiles,
    tokens_at,
    turns_of_program,
)

FORWARD = tiles(Tiles(64, 64, 4, 3), Tiles(16, 16, 4, 1))
HELD = dict.fromkeys((torch.bfloat16, torch.float16), Tiles(window_plan.BLOCK, 256, 8, 2))  # at once


@triton.jit
def attend_held_kernel(
    Q, K, V, TOKEN, WINDOW, BLOCKS, OUT, LSE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, length, scale, share,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for blocks of one window that a tile holds, `held`, and for those of no window: `share` heads
    of one group, for which keys and values are loaded once."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        start, end, low, high = part_of_block(BLOCKS, block, BLOCK, BLOCK)
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
            k_place = offsets(other, length, k_batch, k_token, FLAT)
            v_place = offsets(other, length, v_batch, v_token, FLAT)
            k_tile = tl.trans(tile_at(K + tl.cast(group, tl.int64) * k_head, k_place, columns_n, seen, N))
            v_tile = tile_at(V + tl.cast(group, tl.int64) * v_head, v_place, columns_p, seen, P)
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            for head in range(group * RATIO + first, group * RATIO + last):
                q_tile = tile_at(Q + tl.cast(head, tl.int64) * q_head, q_place, columns_n, real, N)
                scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
                if count < KEYS:
                    scores = tl.where((tl.arange(0, KEYS) < count)[None, :], scores, -1e30)
                count += tl.minimum(head, 0)  # + 0, unknown to the compiler: a mask kept would fill registers
                largest = tl.max(scores, 1)
                weights = tl.exp2(scores - largest[:, None])
                total = tl.sum(weights, 1)
                at = tl.cast(token, tl.int64) * HEADS + head
                # Stored before the product, or the sum would wait for it with its terms in registers.
                tl.store(LSE + at, largest + tl.log2(total), mask=real)
                out = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
                store_tile(OUT + at * P, out * (1.0 / total)[:, None], columns_p, real, P)


@triton.jit
def attend_kernel(
    Q, K, V, TOKEN, WINDOW, BLOCKS, OUT, LSE,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, length, scale, share,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for the other blocks, for all if KEYS = 0: a program takes `share` of a block's parts and heads
    of one group in turn, and walks over the keys of each."""
    group, first, last, begin, step = turns_of_program(share, HEADS // RATIO, RATIO * (BLOCK // ROWS))
    k, v = K + tl.cast(group, tl.int64) * k_head, V + tl.cast(group, tl.int64) * v_head
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    for block in range(begin, tl.load(BLOCKS), step):
        turns = last
        if KEYS > 0:
            turns = tl.where(is_held(WINDOW, BLOCKS, block, KEYS, BLOCK), first, last)
        for turn in range(first, turns):
            head = group * RATIO + turn % RATIO
            start, end, low, high = part_of_block(BLOCKS, BLOCK // ROWS * block + turn // RATIO, ROWS, BLOCK)
            place = start + tl.arange(0, ROWS)
            token, window = tokens_at(TOKEN, WINDOW, place, end)
            valid = window >= 0
            q_place = offsets(token, length, q_batch, q_token, FLAT)
            q_tile = tile_at(Q + tl.cast(head, tl.int64) * q_head, q_place, columns_n, valid, N)
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
            total = tl.where(valid, total, 1.0)
            at = tl.cast(token, tl.int64) * HEADS + head
            out = tl.where(valid[:, None], out / total[:, None], 0.0)
            store_tile(OUT + at * P, out, columns_p, place < end, P)
            tl.store(LSE + at, tl.where(valid, largest + tl.log2(total), 0.0), mask=place < end)


def forward(inputs: AttentionInputs) -> AttentionOutputs:
    """The operator on Triton kernels."""
    q, k, v = (rows_of(tensor.to(inputs.q.dtype)) for tensor in inputs[:3])
    o, lse = attention_outputs(inputs)
    arguments = shared_arguments({"q": q, "k": k, "v": v}, inputs)
    arguments |= {"OUT": o, "LSE": lse, "KEYS": keys_held(HELD, q)}
    heads = q.shape[2] // k.shape[2]
    if arguments["KEYS"]:
        launch_held(attend_held_kernel, HELD, heads, (q, k, v), **arguments)
    launch_rest(attend_kernel, FORWARD, heads, (q, k, v), **arguments)
    return AttentionOutputs(o, lse)
