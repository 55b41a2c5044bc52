# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the gradients of the scan's scalars: dt, A and the gate.

Letters and equations as in `torch_engine.backward`; every sum is as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import ceil_div, power_of_2
from ..kernels.scalars import HEADS_AT_ONCE, Scalars
from ..kernels.tiles import decayed, token_rows


@triton.jit
def product_at(PRODUCT, WEIGHT, at, there):
    """Gradient of the neighbour's write. Summing neighbours gives the exclusive cumsum directly; subtracting
    the own term from an inclusive one would cancel.
    """
    written = tl.load(PRODUCT + at, mask=there, other=0.0)
    return written * tl.load(WEIGHT + at, mask=there, other=0.0)


@triton.jit
def rates_kernel(
    A, DT, FORWARD_SUM, REVERSE_SUM, FORWARD_GATE, REVERSE_GATE, SEGMENT, BEGIN, VALID, FORWARD_WRITE_WEIGHT,
    REVERSE_WRITE_WEIGHT, FORWARD_CHUNK_DECAY, REVERSE_CHUNK_DECAY, OPENS, FORWARD_STATE_PRODUCT,
    REVERSE_STATE_PRODUCT, FORWARD_SPANS, REVERSE_SPANS, FORWARD_READ_PRODUCT, REVERSE_READ_PRODUCT,
    FORWARD_WRITE_PRODUCT, REVERSE_WRITE_PRODUCT, PAIR_DT, PAIR_GATE, DT_GRAD, A_GRAD, GATE_GRAD,
    length, chunks,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
):  # fmt: skip
    """The gradients of dt, A and the gate for one chunk and a block of heads. That of a = dt A is the sum of
    every product of a write and a read that spans the token: pairs of the chunk, reads of the state that
    enters it, writes to the state that leaves it, and the state that passes through."""
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.cast(tl.program_id(2), tl.int64)
    place = tl.arange(0, CHUNK)[:, None]
    rows, valid = token_rows(VALID, batch, chunk * CHUNK, length, CHUNK, HAS_VALID)
    inside = heads < HEADS
    real = inside[None, :]
    at_chunk = (batch * chunks + chunk) * HEADS + heads
    at = at_chunk[None, :] * CHUNK + place
    forward_sum, dt = tl.load(FORWARD_SUM + at, mask=real, other=0.0), tl.load(DT + at, mask=real, other=0.0)
    read = tl.load(FORWARD_READ_PRODUCT + at, mask=real, other=0.0)
    gated = read
    if HAS_VISION:
        gated = read * tl.load(FORWARD_GATE + at, mask=real, other=0.0)
    written = tl.load(FORWARD_WRITE_PRODUCT + at, mask=real, other=0.0)
    rate = tl.load(FORWARD_SPANS + at, mask=real, other=0.0) + tl.cumsum(gated, 0, reverse=True)
    rate += tl.cumsum(product_at(FORWARD_WRITE_PRODUCT, FORWARD_WRITE_WEIGHT, at - 1, (place > 0) & real), 0)
    chunk_decay = tl.load(FORWARD_CHUNK_DECAY + at_chunk, mask=inside, other=0.0)
    rate += (chunk_decay * tl.load(FORWARD_STATE_PRODUCT + at_chunk, mask=inside, other=0.0))[None, :]
    end = tl.sum(tl.where(place == CHUNK - 1, forward_sum, 0.0), 0)
    reach = decayed(end[None, :] - forward_sum)
    if HAS_SEQUENCE:  # what leaves the chunk is of its last sample
        last = tl.load(BEGIN + (batch * chunks + chunk) * CHUNK + CHUNK - 1)
        reach = tl.where(place >= last, reach, 0.0)
    dt_grad = tl.load(PAIR_DT + at, mask=real, other=0.0) + written * reach
    out = ((batch * length + rows) * HEADS)[:, None] + heads[None, :]
    where = (rows < length)[:, None] & real
    if HAS_VISION:
        segment = tl.load(SEGMENT + (batch * chunks + chunk) * CHUNK + place)
        reverse_sum = tl.load(REVERSE_SUM + at, mask=real, other=0.0)
        read_back = tl.load(REVERSE_READ_PRODUCT + at, mask=real, other=0.0)
        gated = read_back * tl.load(REVERSE_GATE + at, mask=real, other=0.0)
        written = tl.load(REVERSE_WRITE_PRODUCT + at, mask=real, other=0.0)
        other = tl.load(REVERSE_SPANS + at, mask=real, other=0.0) + tl.cumsum(gated, 0)
        after = (place < CHUNK - 1) & real
        other += tl.cumsum(
            product_at(REVERSE_WRITE_PRODUCT, REVERSE_WRITE_WEIGHT, at + 1, after), 0, reverse=True
        )
        chunk_decay = tl.load(REVERSE_CHUNK_DECAY + at_chunk, mask=inside, other=0.0)
        other += (chunk_decay * tl.load(REVERSE_STATE_PRODUCT + at_chunk, mask=inside, other=0.0))[None, :]
        rate += tl.where(segment >= 0, other, 0.0)
        leaves = segment == tl.load(OPENS + batch * (chunks + 1) + chunk).to(tl.int32)
        dt_grad += tl.where(leaves, written * decayed(reverse_sum), 0.0)
        gate_grad = tl.load(PAIR_GATE + at, mask=real, other=0.0) + read - read_back
        tl.store(GATE_GRAD + out, tl.where(segment >= 0, gate_grad, 0.0), mask=where)
    tl.store(A_GRAD + at_chunk, tl.sum(rate * dt, 0), mask=inside)
    dt_grad += rate * tl.load(A + heads, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(DT_GRAD + out, tl.where(valid[:, None], dt_grad, 0.0), mask=where)


def scalar_gradients(
    A: Tensor,
    scalars: Scalars,
    read: dict[str, Tensor | None],
    written: dict[str, Tensor | None],
    products: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run `rates_kernel`: the gradients of dt (B, L, H), A (H,) and the gate (B, L, H), float32."""
    batch, chunks, heads, _ = scalars.dt.shape
    dt_grad = scalars.dt.new_empty(batch, length, heads)
    rate_grad = scalars.dt.new_empty(batch, chunks, heads)
    gate_grad = None if scalars.gates is None else torch.empty_like(dt_grad)
    block = min(HEADS_AT_ONCE, power_of_2(heads))
    rates_kernel[(chunks, ceil_div(heads, block), batch)](
        A.contiguous(),
        **scalars.arguments(),
        **scalars.by_direction("WRITE_WEIGHT", scalars.write_weight),
        **scalars.by_direction("CHUNK_DECAY", scalars.chunk_decay),
        **scalars.by_direction("STATE_PRODUCT", products),
        OPENS=scalars.opens,
        FORWARD_SPANS=read["FORWARD_SPANS"],
        REVERSE_SPANS=read["REVERSE_SPANS"],
        FORWARD_READ_PRODUCT=read["FORWARD_READ_PRODUCT"],
        REVERSE_READ_PRODUCT=read["REVERSE_READ_PRODUCT"],
        FORWARD_WRITE_PRODUCT=written["FORWARD_WRITE_PRODUCT"],
        REVERSE_WRITE_PRODUCT=written["REVERSE_WRITE_PRODUCT"],
        PAIR_DT=written["DT_GRAD"],
        PAIR_GATE=read["GATE_GRAD"],
        DT_GRAD=dt_grad,
        A_GRAD=rate_grad,
        GATE_GRAD=gate_grad,
        length=length,
        BLOCK=block,
        num_warps=8,
    )
    return dt_grad, rate_grad.sum((0, 1)), gate_grad
