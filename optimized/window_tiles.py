# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""What the kernels of window attention share: blocks of the plan, tiles of gathered tokens, how to launch.

Letters as in `batched_windows`, blocks and places as in `window_plan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import window_plan
from .scan_tiles import stride_arguments, tile_size

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """What a program takes at once: its own tokens, at most a plan's block, and those it walks over."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles(half: Tiles, full: Tiles) -> dict[torch.dtype, Tiles]:
    """Tiles by the dtype of the tokens."""
    return {torch.bfloat16: half, torch.float16: half, torch.float32: full}


SHARED_MEMORY = 162 * 1024  # bytes that a table's tiles take at most: more than a small GPU has
SMALL = Tiles(64, 16, 4, 3)  # what fits there


@triton.jit
def part_of_block(BLOCKS, item, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One of a block's parts of ROWS places: [start, end), and [low, high), which its windows cover."""
    parts = BLOCK // ROWS
    block = BLOCKS + 4 * (1 + item // parts)
    start = tl.load(block) + item % parts * ROWS
    end = tl.minimum(tl.load(block + 1), start + ROWS)
    low, high = tl.load(block + 2), tl.load(block + 3)
    return start, end, low, tl.where(start < end, high, low)


@triton.jit
def tokens_at(TOKEN, WINDOW, place, end):
    """(token, window) of places below `end`; a window is called by its first place, -1 = none."""
    token = tl.load(TOKEN + place, mask=place < end, other=0)
    window = tl.load(WINDOW + place, mask=place < end, other=-1)
    return token, window


@triton.jit
def offsets(token, length, batch_stride, token_stride, FLAT: tl.constexpr):
    """Where tokens of the flattened (B, L) begin; FLAT says that its rows follow each other evenly."""
    if FLAT:
        return tl.cast(token, tl.int64) * token_stride
    row = token // length
    return tl.cast(row, tl.int64) * batch_stride + tl.cast(token - row * length, tl.int64) * token_stride


@triton.jit
def tile_at(base, offset, columns, taken, SIZE: tl.constexpr):
    """A tile of gathered tokens, 0 where not taken; `columns` hold SIZE or more."""
    where = taken[:, None]
    if columns.shape[0] > SIZE:
        where = where & (columns < SIZE)[None, :]
    return tl.load(base + offset[:, None] + columns[None, :], mask=where, other=0.0)


@triton.jit
def store_tile(base, tile, columns, real, SIZE: tl.constexpr):
    """Write tokens of SIZE elements to their pointers."""
    where = real[:, None]
    if columns.shape[0] > SIZE:
        where = where & (columns < SIZE)[None, :]
    tl.store(base[:, None] + columns[None, :], tile.to(base.dtype.element_ty), mask=where)


def is_flat(tensor: Tensor) -> bool:
    """Say whether the rows of (B, L, ...) follow each other as evenly as their tokens do."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def shared_arguments(tensors: dict[str, Tensor], places: Tensor, blocks: Tensor, scale: float) -> dict:
    """Sizes, strides and the order of the tokens, which all three kernels take."""
    q, k, v = (tensors[name] for name in "qkv")
    return {
        **stride_arguments(**tensors),
        **dict(zip(("TOKEN", "WINDOW"), places, strict=True)),
        "BLOCKS": blocks,
        "BLOCK": window_plan.BLOCK,
        "length": q.shape[1],
        "scale": scale * LOG2_E,
        "HEADS": q.shape[2],
        "RATIO": q.shape[2] // k.shape[2],
        "N": q.shape[3],
        "P": v.shape[3],
        "BLOCK_N": tile_size(q.shape[3]),
        "BLOCK_P": tile_size(v.shape[3]),
        "FLAT": all(map(is_flat, tensors.values())),
    }


def fitting(table: dict[torch.dtype, Tiles], tensor: Tensor) -> Tiles:
    """The tiles of a table for the dtype and the device of `tensor`."""
    chosen = table[tensor.dtype]
    if tensor.is_cuda and chosen.rows > SMALL.rows:
        there = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
        return chosen if there >= SHARED_MEMORY else SMALL
    return chosen


def launch(kernel, table: dict, heads: int, tensors: tuple[Tensor, ...], **arguments) -> None:
    """As many programs as there are blocks at least: some take two, for only the device knows how many."""
    chosen = fitting(table, tensors[0])
    blocks = triton.cdiv(tensors[0].shape[0] * tensors[0].shape[1], window_plan.BLOCK)
    rows = min(chosen.rows, window_plan.BLOCK)
    sizes = {"ROWS": rows, "COLUMNS": chosen.columns}
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    kernel[(heads * blocks * (window_plan.BLOCK // rows),)](*tensors, **arguments, **sizes, **options)
