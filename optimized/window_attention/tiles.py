# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""What the kernels of window attention share: blocks of the plan, tiles of gathered tokens, how to launch.

Letters as in `torch_engine`, blocks and places as in `layout.plan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import ceil_div, properties, shared_memory, stride_arguments, tile_size
from ..layout import plan as window_plan
from .operator import AttentionInputs

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """What a program takes at once: its own tokens, at most a plan's block, and those it walks over."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiles(half: Tiles, full: Tiles) -> dict[torch.dtype, Tiles]:
    """Tiles by the dtype of the tokens."""
    return {torch.bfloat16: half, torch.float16: half, torch.float32: full}


SHARED_MEMORY = 162 * 1024  # bytes that a table's tiles take at most: more than a small GPU has
SMALL = Tiles(64, 16, 4, 3)  # what fits there
HELD_MEMORY = 225 * 1024  # bytes that keys and values held at once take at most: GPUs before Hopper have less
HELD_PROGRAMS = 1  # for each multiprocessor, of those that hold a window's keys
REST_PROGRAMS = 4  # and of the others


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
def tile_at(base, offset, columns, valid, SIZE: tl.constexpr):
    """A tile of gathered tokens, 0 where not valid; `columns` hold SIZE or more."""
    where = valid[:, None]
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


@triton.jit
def turns_of_program(share, GROUPS: tl.constexpr, TURNS: tl.constexpr):
    """A program's group; the `share` of TURNS that it takes, [first, last); its first block, and the step to
    its next."""
    shares = tl.cdiv(TURNS, share)
    lanes = GROUPS * shares
    lane = tl.program_id(0) % lanes
    first = lane % shares * share
    begin, step = tl.program_id(0) // lanes, tl.num_programs(0) // lanes
    return lane // shares, first, tl.minimum(first + share, TURNS), begin, step


@triton.jit
def held(WINDOW, low, high, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Say whether [low, high) are the places of one window, not fewer than a block's and KEYS at most."""
    count = high - low
    fits = (count >= BLOCK) & (count <= KEYS)
    return fits & (tl.load(WINDOW + high - 1, mask=fits, other=-1) == low)


@triton.jit
def is_held(WINDOW, BLOCKS, block, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Say whether kernels for one window take a block: its window is `held`, or it has none."""
    low, high = part_of_block(BLOCKS, block, BLOCK, BLOCK)[2:]
    return (low == high) | held(WINDOW, low, high, KEYS, BLOCK)


def is_flat(tensor: Tensor) -> bool:
    """Say whether the rows of (B, L, ...) follow each other as evenly as their tokens do."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def shared_arguments(tensors: dict[str, Tensor], inputs: AttentionInputs) -> dict:
    """Sizes, strides and the order of the tokens, which all kernels take."""
    q, k, v = (tensors[name] for name in "qkv")
    token, window = inputs.places
    return {
        **stride_arguments(**tensors),
        "TOKEN": token,
        "WINDOW": window,
        "BLOCKS": inputs.blocks,
        "BLOCK": window_plan.BLOCK,
        "length": q.shape[1],
        "scale": inputs.scale * LOG2_E,
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
    return SMALL if chosen.rows > SMALL.rows and shared_memory(tensor) < SHARED_MEMORY else chosen


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the GPU; of a CPU, whose interpreter runs programs in turn, a few."""
    return properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def keys_held(table: dict[torch.dtype, Tiles], tensor: Tensor) -> int:
    """How many keys a program may hold at once; 0 where dtype or GPU do not allow it."""
    fits = tensor.dtype in table and shared_memory(tensor) >= HELD_MEMORY
    return table[tensor.dtype].columns if fits else 0


def launch_held(kernel, table: dict, heads: int, tensors: tuple[Tensor, ...], **arguments) -> None:
    """A program for each block and group, or more of fewer turns while there are processors for them. A
    block's turns are its parts, one without ROWS, times `heads`."""
    parts = window_plan.BLOCK // arguments.get("ROWS", window_plan.BLOCK)
    share, lanes, blocks = shares(tensors, parts * heads, HELD_PROGRAMS * processors(tensors[0]))
    kernel[(lanes * blocks,)](*tensors, share=share, **arguments, **table[tensors[0].dtype].options)


def launch_rest(kernel, table: dict, heads: int, tensors: tuple[Tensor, ...], KEYS: int, **arguments) -> None:
    """A program for each turn, as above; if others take most blocks, few programs, which look at all."""
    chosen = fitting(table, tensors[0])
    sizes = sizes_of(chosen)
    programs = REST_PROGRAMS * processors(tensors[0]) if KEYS else 2**62
    share, lanes, blocks = shares(tensors, window_plan.BLOCK // sizes["ROWS"] * heads, programs)
    grid = (lanes * max(1, min(blocks, programs // lanes)),)
    kernel[grid](*tensors, share=share, KEYS=KEYS, **arguments, **sizes, **chosen.options)


def sizes_of(chosen: Tiles) -> dict[str, int]:
    """The tiles as a kernel takes them, no larger than a block."""
    return {"ROWS": min(chosen.rows, window_plan.BLOCK), "COLUMNS": chosen.columns}


def shares(tensors: tuple[Tensor, ...], turns: int, programs: int) -> tuple[int, int, int]:
    """How many of a block's and group's turns one of about so many `programs` takes, one after the other, how
    many programs that makes for each block, and about how many blocks there are."""
    q, k = tensors[:2]
    blocks = max(1, ceil_div(q.shape[0] * q.shape[1], window_plan.BLOCK))
    share = ceil_div(turns, min(turns, max(1, programs // (k.shape[2] * blocks))))
    return share, k.shape[2] * ceil_div(turns, share), blocks
