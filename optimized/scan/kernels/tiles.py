# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""What the scan's Triton kernels share: tiles of tokens, the weights of pairs, products over long axes.

Letters and equations as in `torch_engine`. A chunk has parts of ROWS tokens, which are what a program holds
at once. Products take the tokens as they are: bfloat16 ones by tensor cores, with weights and states rounded
to bfloat16 as factors and float32 sums; float32 ones in IEEE float32. They take a step of N or P after the
other, so that no tile outgrows the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...engine import say_once
from ...engine.launch import tile_size

CHUNKS = {torch.bfloat16: 128, torch.float32: 16}  # tokens between two states
GRADIENT_CHUNKS = {torch.bfloat16: 64, torch.float32: 16}  # the same in the backward pass
ROWS = {torch.bfloat16: 64, torch.float32: 16}  # tokens of a chunk that a program takes at once
STEPS = {torch.bfloat16: 64, torch.float32: 16}  # of N or P


@triton.jit
def load_tile(base, rows, stride, columns, mask, SIZE: tl.constexpr):
    """Rows of SIZE elements each, (rows, columns), 0 outside; `rows` in int64."""
    where = mask[:, None] & (columns < SIZE)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=where, other=0.0)


@triton.jit
def head_of(TOKENS, batch, batch_stride, head, head_stride):
    """Where one head of one row of the batch begins; `batch` in int64."""
    return TOKENS + batch * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def token_rows(VALID, batch, first, length, COUNT: tl.constexpr, HAS_VALID: tl.constexpr):
    """COUNT tokens from `first` on, in int64, and which of them take part."""
    rows = tl.cast(first, tl.int64) + tl.arange(0, COUNT)
    valid = rows < length
    if HAS_VALID:
        valid = valid & (tl.load(VALID + batch * length + rows, mask=valid, other=0) != 0)
    return rows, valid


@triton.jit
def decayed(exponent):
    """e to a difference of sums, at most 1."""
    return tl.exp(tl.minimum(exponent, 0.0))


@triton.jit
def along(POINTER, at):
    """Scalars of tokens along one axis of pairs, `at` (·, 1) or (1, ·). Loaded in that shape, each would be
    loaded, and held in a register, once for every pair of a thread."""
    if at.shape[0] == 1:
        return tl.load(POINTER + at.reshape(at.shape[1]))[None, :]
    else:
        return tl.load(POINTER + at.reshape(at.shape[0]))[:, None]


@triton.jit
def pair_masks(i, j, SEGMENT, BEGIN, at, HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr):
    """Where readers i and writers j, places of one chunk along either axis, are a pair of the forward and of
    the reverse direction."""
    before, together = j <= i, j >= i
    if HAS_SEQUENCE:
        before = before & (j >= along(BEGIN, at + i))
    if HAS_VISION:
        together = together & (along(SEGMENT, at + i) == along(SEGMENT, at + j))
    return before, together


@triton.jit
def pair_decay(i, j, FORWARD_SUM, REVERSE_SUM, at_i, at_j, HAS_VISION: tl.constexpr):
    """What is left of j's write when i reads, in whichever direction: the exponentials of eq. (2) of
    `torch_engine`."""
    exponent = along(FORWARD_SUM, at_i) - along(FORWARD_SUM, at_j)
    if HAS_VISION:
        exponent = tl.where(j <= i, exponent, along(REVERSE_SUM, at_j) - along(REVERSE_SUM, at_i))
    return decayed(exponent)


@triton.jit
def pair_gates(before, together, FORWARD_GATE, REVERSE_GATE, at_i, HAS_VISION: tl.constexpr):
    """gF_i [j≤i, one sample] + gR_i [j≥i, one segment] of eq. (2)."""
    if HAS_VISION:
        gates = tl.where(before, along(FORWARD_GATE, at_i), 0.0)
        return gates + tl.where(together, along(REVERSE_GATE, at_i), 0.0)
    else:
        return tl.where(before, 1.0, 0.0)


@triton.jit
def gate_of(GATE, at, HAS_VISION: tl.constexpr):
    """A gate of tokens: 1 where there is no vision at all."""
    if HAS_VISION:
        return tl.load(GATE + at)
    else:
        return tl.full(at.shape, 1.0, tl.float32)


@triton.jit
def pair_products(
    left, left_stride, left_rows, left_taken, right, right_stride, right_rows, right_taken,
    SIZE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """left_i · right_j of two parts of a chunk, (ROWS, rows of `right`): never the transpose of a product."""
    total = tl.zeros([ROWS, right_rows.shape[0]], tl.float32)
    for start in range(0, SIZE, STEP):
        columns = start + tl.arange(0, STEP)
        left_tile = load_tile(left, left_rows, left_stride, columns, left_taken, SIZE)
        right_tile = load_tile(right, right_rows, right_stride, columns, right_taken, SIZE)
        total = tl.dot(left_tile, tl.trans(right_tile), total, input_precision="ieee")
    return total


@triton.jit
def add_product(weights, tile, total):
    """total + weights · tile of tokens, the weights rounded as the tokens are."""
    return tl.dot(weights.to(tile.dtype), tile, total, input_precision="ieee")


@triton.jit
def state_products(
    tokens, stride, rows, valid, STATE, outer,
    INNER: tl.constexpr, OUTER: tl.constexpr, INNER_STRIDE: tl.constexpr, OUTER_STRIDE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ_inner tokens[i, inner] state[inner, outer], (ROWS, BLOCK_OUTER)."""
    total = tl.zeros([ROWS, BLOCK_OUTER], tl.float32)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        tile = load_tile(tokens, rows, stride, inner, valid, INNER)
        inside = (inner < INNER)[:, None] & (outer < OUTER)[None, :]
        where = STATE + inner[:, None] * INNER_STRIDE + outer[None, :] * OUTER_STRIDE
        total = tl.dot(tile, tl.load(where, mask=inside, other=0.0), total, input_precision="ieee")
    return total


def token_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the scan's kernels take tokens in: states outgrow float16, so it takes float32's kernels."""
    if dtype != torch.float16:
        return dtype
    say_once("float16 scans", "float16 scans run on the float32 kernels")
    return torch.float32


def chunk_size(dtype: torch.dtype) -> int:
    """Tokens per chunk in the forward pass."""
    return CHUNKS[dtype]


def gradient_chunk_size(dtype: torch.dtype) -> int:
    """Tokens per chunk in the backward pass."""
    return GRADIENT_CHUNKS[dtype]


def part_size(dtype: torch.dtype, chunk: int) -> int:
    """Tokens of a chunk that a program takes at once."""
    return min(ROWS[dtype], chunk)


def step_size(size: int, dtype: torch.dtype) -> int:
    """How much of an axis of `size` a program takes at once."""
    return min(tile_size(size), STEPS[dtype])


def half_step(size: int, dtype: torch.dtype) -> int:
    """`step_size`, but two steps at least where the axis is long enough: a loop holds fewer registers."""
    return max(16, min(step_size(size, dtype), tile_size(size) // 2))


def warps(*sizes: int) -> int:
    """Warps of a program whose tiles are that wide."""
    return 8 if max(sizes) > 64 else 4
