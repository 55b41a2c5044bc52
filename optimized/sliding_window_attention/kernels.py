# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for sliding-window attention, forward; and what it shares with those of the gradients.

Letters and equations as in `torch_engine`, places and spans as in `spans`. A program takes a tile of tokens
of one head and walks over the keys that they read with an online softmax (FlashAttention, arXiv 2205.14135);
a tile that asks nothing writes its zeros at once. Heads of a group are neighbours in the launch: they find
its keys in the cache. Products of half-precision tokens take the softmax's weights in that precision too and
sum in float32. Scores live in powers of two: lse is log2 of softmax's denominator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import (
    as_bytes,
    ceil_div,
    contiguous,
    rows_of,
    shared_memory,
    stride_arguments,
    tile_size,
)
from .operator import SlidingInputs, SlidingOutputs, sliding_outputs

LOG2_E = 1.4426950408889634
NOWHERE = tl.constexpr(2**31 - 1)  # a place behind all keys
LARGE_SHARED_MEMORY = 162 * 1024  # bytes that a program has on large GPUs


class Tiles(NamedTuple):
    """What a program takes at once: its own tokens or keys, and those it walks over."""

    rows: int
    columns: int
    warps: int
    stages: int


Table = dict[tuple[torch.dtype, int], Tiles]


def table(half: Tiles, half_wide: Tiles, full: Tiles) -> Table:
    """Tiles of half precision for head dims up to 128 and up to 256, and of float32."""
    halves = {(dtype, 128): half for dtype in (torch.bfloat16, torch.float16)}
    wide = {(dtype, 256): half_wide for dtype, _ in halves}
    return halves | wide | {(torch.float32, size): full for size in (128, 256)}


FORWARD = table(Tiles(64, 64, 4, 3), Tiles(64, 32, 8, 2), Tiles(16, 16, 4, 1))
SMALL = Tiles(32, 16, 4, 2)  # for half precision on GPUs with less memory


@triton.jit
def taken_of(MASK, batch, length, at, inside, HAS: tl.constexpr):
    """Which of the places `at` of a (B, length) mask are set; all that are `inside` if there is no mask."""
    if HAS:
        inside = inside & (tl.load(MASK + batch * length + at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def lowest_read(LOW, batch, keys, place, real, window, HAS_LOW: tl.constexpr):
    """The first place that the token of each place reads."""
    if HAS_LOW:
        return tl.load(LOW + batch * keys + place, mask=real, other=0)
    else:
        return tl.maximum(place - (window - 1), 0)


@triton.jit
def tile_at(base, at, stride, columns, taken, SIZE: tl.constexpr):
    """Tokens of SIZE elements, 0 where not taken; `columns` hold SIZE or more."""
    where = taken[:, None]
    if columns.shape[0] > SIZE:
        where = where & (columns < SIZE)[None, :]
    return tl.load(base + tl.cast(at, tl.int64)[:, None] * stride + columns[None, :], mask=where, other=0.0)


@triton.jit
def store_tile(base, at, tile, columns, real, SIZE: tl.constexpr):
    """Write tokens of SIZE elements, `at` in elements from `base`."""
    where = real[:, None]
    if columns.shape[0] > SIZE:
        where = where & (columns < SIZE)[None, :]
    tl.store(base + at[:, None] + columns[None, :], tile.to(base.dtype.element_ty), mask=where)


@triton.jit
def of_head(TENSOR, batch, batch_stride, head, head_stride):
    """Where one head of one row of the batch begins; `batch` in int64."""
    return TENSOR + batch * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def tile_of_program(count, LANES: tl.constexpr):
    """(batch in int64, tile, lane) of a program: lanes, heads or groups, are neighbours."""
    lane, rest = tl.program_id(0) % LANES, tl.program_id(0) // LANES
    return tl.cast(rest // count, tl.int64), rest % count, lane


@triton.jit
def tile_of_tokens(
    ASKS, LOW, batch, tile, length, keys, window,
    ROWS: tl.constexpr, HAS_ASKS: tl.constexpr, HAS_LOW: tl.constexpr,
):  # fmt: skip
    """(token, real, asking, place, low, first, end) of a tile: its tokens, and the keys from `first` to `end`
    that those who ask read.
    """
    token = tile * ROWS + tl.arange(0, ROWS)
    real = token < length
    asking = taken_of(ASKS, batch, length, token, real, HAS_ASKS)
    place = token + (keys - length)
    low = lowest_read(LOW, batch, keys, place, asking, window, HAS_LOW)
    end = tl.max(tl.where(asking, place + 1, 0), 0)
    first = tl.minimum(tl.min(tl.where(asking, low, NOWHERE), 0), end)  # prefetching adds to it: no overflow
    return token, real, asking, place, low, first, end


@triton.jit
def attend_kernel(
    Q,
    K,
    V,
    ASKS,
    VALID,
    LOW,
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
    keys,
    window,
    scale,
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
    """Eq. (1) for a tile of tokens of one head."""
    batch, tile, head = tile_of_program(tl.cdiv(length, ROWS), HEADS)
    columns_n, columns_p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    token, real, asking, place, low, first, end = tile_of_tokens(
        ASKS, LOW, batch, tile, length, keys, window, ROWS, HAS_ASKS, HAS_LOW
    )
    k = of_head(K, batch, k_batch, head // RATIO, k_head)
    v = of_head(V, batch, v_batch, head // RATIO, v_head)
    q_tile = tile_at(of_head(Q, batch, q_batch, head, q_head), token, q_token, columns_n, asking, N)
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_P], tl.float32)
    for column in range(first, end, COLUMNS):
        key = column + tl.arange(0, COLUMNS)
        there = taken_of(VALID, batch, keys, key, key < end, HAS_VALID)
        k_tile = tile_at(k, key, k_token, columns_n, there, N)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = (key[None, :] <= place[:, None]) & (key[None, :] >= low[:, None]) & there[None, :]
        scores = tl.where(seen, scores, -1e30)
        highest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])  # wiped out by the first score that counts
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tile_at(v, key, v_token, columns_p, there, P)
        out = tl.dot(weights.to(v_tile.dtype), v_tile, out * shrink[:, None], input_precision="ieee")
        largest = highest
    total = tl.where(asking, total, 1.0)
    out = tl.where(asking[:, None], out / total[:, None], 0.0)
    store_tile(OUT, ((batch * length + token) * HEADS + head) * P, out, columns_p, real, P)
    lse = tl.where(asking, largest + tl.log2(total), 0.0)
    tl.store(LSE + (batch * HEADS + head) * length + token, lse, mask=real)


def forward(inputs: SlidingInputs) -> SlidingOutputs:
    """The operator on Triton: lse is a power of two."""
    q, k, v = tensors = tuple(rows_of(tensor.to(inputs.q.dtype)) for tensor in inputs[:3])
    o, lse = sliding_outputs(inputs)
    tiles = fitting(FORWARD, q, v)
    arguments = shared_arguments({"q": q, "k": k, "v": v}, inputs, tiles)
    grid = (q.shape[0] * ceil_div(q.shape[1], tiles.rows) * q.shape[2],)
    attend_kernel[grid](*tensors, OUT=o, LSE=lse, **arguments)
    return SlidingOutputs(o, lse)


def shared_arguments(tensors: dict[str, Tensor], inputs: SlidingInputs, tiles: Tiles) -> dict:
    """Strides, sizes, spans and options of the launch, which all these kernels take."""
    q, k, v = (tensors[name] for name in "qkv")
    return {
        **stride_arguments(**tensors),
        **{"ASKS": as_bytes(inputs.asks), "HAS_ASKS": inputs.asks is not None},
        **{"VALID": as_bytes(inputs.valid), "HAS_VALID": inputs.valid is not None},
        **{"LOW": contiguous(inputs.low), "HAS_LOW": inputs.low is not None},
        "length": q.shape[1],
        "keys": k.shape[1],
        "window": min(inputs.window, k.shape[1]),  # which 32 bits hold
        "scale": inputs.scale * LOG2_E,
        "HEADS": q.shape[2],
        "RATIO": q.shape[2] // k.shape[2],
        "N": q.shape[3],
        "P": v.shape[3],
        "BLOCK_N": tile_size(q.shape[3]),
        "BLOCK_P": tile_size(v.shape[3]),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def fitting(tiles: Table, q: Tensor, v: Tensor) -> Tiles:
    """The tiles for the dtype and the head dims of these tensors, and for their GPU."""
    chosen = tiles[q.dtype, 128 if max(q.shape[3], v.shape[3]) <= 128 else 256]
    return SMALL if chosen.rows > SMALL.rows and shared_memory(q) < LARGE_SHARED_MEMORY else chosen
