# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""What the scan's Triton kernels share: tiles of tokens, the weights of pairs, products over long axes.

Letters and equations as in `chunked_scan`. A program works on one chunk of one head. It walks along N and P
in steps, so that no tile outgrows the registers: short ones in float32, whose products are not the tensor
cores'. What is not a token, states and weights of pairs, keeps float32's range and at least tf32's bits in
every product: bfloat16 results then differ from the reference's by their last rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import say_once
from .scan_decays import Decays

CHUNKS = {torch.bfloat16: 64, torch.float32: 16}  # tokens
STEPS = {torch.bfloat16: 32, torch.float32: 16}  # of N or P


@triton.jit
def load_tile(base, rows, stride, columns, mask, SIZE: tl.constexpr):
    """Rows of SIZE elements each, (rows, columns), 0 outside; `rows` in int64."""
    where = mask[:, None] & (columns < SIZE)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=where, other=0.0)


@triton.jit
def rounded_to_tf32(tile):
    """float32 to the nearest that tensor cores take: they would cut the other bits off, all downwards."""
    bits = tile.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def as_factor(tile, PRECISION: tl.constexpr):
    """A float32 tile as products of this precision take it."""
    if PRECISION == "tf32":
        tile = rounded_to_tf32(tile)
    return tile


@triton.jit
def weighed_sum(weights, tile, total, PRECISION: tl.constexpr):
    """total + weights · tile of tokens: tf32 has all the bits that a result in half precision keeps."""
    if PRECISION == "ieee":
        return tl.dot(weights, tile.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(rounded_to_tf32(weights), tile.to(tl.float32), total, input_precision="tf32")


@triton.jit
def head_of(TOKENS, batch, batch_stride, head, head_stride):
    """Where one head of one row of the batch begins; `batch` in int64."""
    return TOKENS + batch * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def chunk_rows(VALID, batch, chunk, length, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr):
    """The tokens of a chunk, in int64, and which of them take part."""
    rows = tl.cast(chunk, tl.int64) * CHUNK + tl.arange(0, CHUNK)
    taken = rows < length
    if HAS_VALID:
        taken = taken & (tl.load(VALID + batch * length + rows, mask=taken, other=0) != 0)
    return rows, taken


@triton.jit
def chunk_pairs(
    DT,
    FORWARD,
    BACKWARD,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    at,
    at_segment,
    READER_IS_ROW: tl.constexpr,
    HAS_VISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Eq. (2) of `chunked_scan` for the pairs of a chunk, rows read and columns write, or the other way.

    Returns the decay, the gates that weigh it, and dt, broadcast along the readers; where a pair is of the
    forward and of the backward direction; and the two gates of each token.
    """
    place = tl.arange(0, CHUNK)
    dt = tl.load(DT + at)
    forward = tl.load(FORWARD + at)
    gate_forward = tl.full([CHUNK], 1.0, tl.float32)
    gate_backward = tl.full([CHUNK], 0.0, tl.float32)
    if READER_IS_ROW:
        before = place[:, None] >= place[None, :]
        after = place[:, None] <= place[None, :]
        exponent = forward[:, None] - forward[None, :]
        dt = dt[None, :]
    else:
        before = place[:, None] <= place[None, :]
        after = place[:, None] >= place[None, :]
        exponent = forward[None, :] - forward[:, None]
        dt = dt[:, None]
    together = after
    gates = tl.where(before, 1.0, 0.0)
    if HAS_VISION:
        gate_forward = tl.load(FORWARD_GATE + at)
        gate_backward = tl.load(BACKWARD_GATE + at)
        backward = tl.load(BACKWARD + at)
        segment = tl.load(SEGMENT + at_segment)
        together = after & (segment[:, None] == segment[None, :])
        if READER_IS_ROW:
            reach = backward[None, :] - backward[:, None]
            gates = tl.where(before, gate_forward[:, None], 0.0)
            gates += tl.where(together, gate_backward[:, None], 0.0)
        else:
            reach = backward[:, None] - backward[None, :]
            gates = tl.where(before, gate_forward[None, :], 0.0)
            gates += tl.where(together, gate_backward[None, :], 0.0)
        exponent = tl.where(before, exponent, reach)
    decay = tl.exp(tl.minimum(exponent, 0.0))
    return decay, gates, dt, before, together, gate_forward, gate_backward


@triton.jit
def pair_products(
    left,
    left_stride,
    right,
    right_stride,
    rows,
    taken,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left_i · right_j of the tokens of a chunk, (CHUNK, CHUNK): never the transpose of a product."""
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, SIZE, STEP):
        columns = start + tl.arange(0, STEP)
        left_tile = load_tile(left, rows, left_stride, columns, taken, SIZE)
        right_tile = load_tile(right, rows, right_stride, columns, taken, SIZE)
        total = tl.dot(left_tile, tl.trans(right_tile), total, input_precision=PRECISION)
    return total


@triton.jit
def state_products(
    tokens,
    stride,
    rows,
    taken,
    STATE,
    outer,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_inner tokens[i, inner] state[inner, outer], (CHUNK, BLOCK_OUTER)."""
    total = tl.zeros([CHUNK, BLOCK_OUTER], tl.float32)
    for start in range(0, INNER, STEP):
        inner = start + tl.arange(0, STEP)
        tile = load_tile(tokens, rows, stride, inner, taken, INNER).to(tl.float32)
        inside = (inner < INNER)[:, None] & (outer < OUTER)[None, :]
        where = STATE + inner[:, None] * INNER_STRIDE + outer[None, :] * OUTER_STRIDE
        state = tl.load(where, mask=inside, other=0.0)
        total = tl.dot(tile, state, total, input_precision=PRECISION)
    return total


def tile_size(size: int) -> int:
    """The power of two, at least 16, that holds `size`: what a matrix product of tiles takes."""
    return max(16, triton.next_power_of_2(size))


def token_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the scan's kernels take tokens in. Float16's own kernels read wild addresses on a GPU with triton
    3.6, so it goes through those of float32."""
    if dtype != torch.float16:
        return dtype
    say_once("float16 scans", "float16 scans run on the float32 kernels")
    return torch.float32


def chunk_size(dtype: torch.dtype) -> int:
    """Tokens per chunk."""
    return CHUNKS[dtype]


def step_size(size: int, dtype: torch.dtype) -> int:
    """How much of an axis of `size` a program takes at once."""
    return min(tile_size(size), STEPS[dtype])


def precision(dtype: torch.dtype) -> str:
    """How products with float32 factors are taken, by the dtype of the tokens: float32 means IEEE."""
    return "ieee" if dtype == torch.float32 else "tf32"


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` with adjacent elements in its last axis; the other strides are free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def pair_arguments(decays: Decays, valid: Tensor | None) -> dict[str, Any]:
    """What `chunk_rows` and `chunk_pairs` read, under the names that all kernels give it."""
    has_vision = decays.segment is not None
    return {
        "DT": decays.dt,
        "FORWARD": decays.forward_sum,
        "BACKWARD": decays.backward_sum,
        "FORWARD_GATE": decays.forward_gate,
        "BACKWARD_GATE": decays.backward_gate,
        "SEGMENT": decays.segment,
        "VALID": as_bytes(valid),
        "chunks": decays.dt.shape[1],
        "HEADS": decays.dt.shape[2],
        "CHUNK": decays.dt.shape[3],
        "HAS_VALID": valid is not None,
        "HAS_VISION": has_vision,
    }


def stride_arguments(**tensors: Tensor) -> dict[str, int]:
    """The strides of (B, L, heads, ·) tensors, as `x_batch`, `x_token`, `x_head` for x."""
    axes = ("batch", "token", "head")
    return {
        f"{name}_{axis}": tensor.stride(i) for name, tensor in tensors.items() for i, axis in enumerate(axes)
    }
