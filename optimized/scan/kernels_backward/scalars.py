# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""The gradient of the scan on Triton kernels: states both ways, then readers and writers, parts of chunks
side by side, and at last the scalars.

Letters and equations as in `chunked_scan_backward`; a kernel puts its scalars together, by the same sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import ceil_div, launching, power_of_2
from ..kernels.scalars import HEADS_AT_ONCE, Scalars, scan_scalars
from ..kernels.states import sweep_states
from ..kernels.tiles import decayed, gradient_chunk_size, rows_of, token_dtype, token_rows
from .readers import read_gradients
from .writers import write_gradients


@triton.jit
def product_at(WRITTEN, WRITE, at, there):
    """What tokens owe for their write, of the neighbour: sums of these leave the token itself out. Taken off
    afterwards, a large product would leave the rounding of its sum.
    """
    written = tl.load(WRITTEN + at, mask=there, other=0.0)
    return written * tl.load(WRITE + at, mask=there, other=0.0)


@triton.jit
def rates_kernel(
    A,
    DT,
    FORWARD,
    BACKWARD,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_WRITE,
    BACKWARD_WRITE,
    FORWARD_KEPT,
    BACKWARD_KEPT,
    OPENS,
    FORWARD_PRODUCT,
    BACKWARD_PRODUCT,
    FORWARD_SPANS,
    BACKWARD_SPANS,
    FORWARD_READ,
    BACKWARD_READ,
    FORWARD_WRITTEN,
    BACKWARD_WRITTEN,
    PAIR_DT,
    PAIR_GATE,
    DT_GRAD,
    A_GRAD,
    GATE_GRAD,
    length,
    chunks,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
):
    """The gradients of dt, A and the gate for one chunk and a block of heads. That of a = dt A is the sum of
    every product of a write and a read that spans the token: pairs of the chunk, reads of the state that
    enters it, writes to the state that leaves it, and the state that passes through."""
    chunk = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.cast(tl.program_id(2), tl.int64)
    place = tl.arange(0, CHUNK)[:, None]
    rows, taken = token_rows(VALID, batch, chunk * CHUNK, length, CHUNK, HAS_VALID)
    inside = heads < HEADS
    real = inside[None, :]
    at_chunk = (batch * chunks + chunk) * HEADS + heads
    at = at_chunk[None, :] * CHUNK + place
    forward, dt = tl.load(FORWARD + at, mask=real, other=0.0), tl.load(DT + at, mask=real, other=0.0)
    read = tl.load(FORWARD_READ + at, mask=real, other=0.0)
    gated = read
    if HAS_VISION:
        gated = read * tl.load(FORWARD_GATE + at, mask=real, other=0.0)
    written = tl.load(FORWARD_WRITTEN + at, mask=real, other=0.0)
    rate = tl.load(FORWARD_SPANS + at, mask=real, other=0.0) + tl.cumsum(gated, 0, reverse=True)
    rate += tl.cumsum(product_at(FORWARD_WRITTEN, FORWARD_WRITE, at - 1, (place > 0) & real), 0)
    kept = tl.load(FORWARD_KEPT + at_chunk, mask=inside, other=0.0)
    rate += (kept * tl.load(FORWARD_PRODUCT + at_chunk, mask=inside, other=0.0))[None, :]
    end = tl.sum(tl.where(place == CHUNK - 1, forward, 0.0), 0)
    dt_grad = tl.load(PAIR_DT + at, mask=real, other=0.0) + written * decayed(end[None, :] - forward)
    out = ((batch * length + rows) * HEADS)[:, None] + heads[None, :]
    where = (rows < length)[:, None] & real
    if HAS_VISION:
        segment = tl.load(SEGMENT + (batch * chunks + chunk) * CHUNK + place)
        backward = tl.load(BACKWARD + at, mask=real, other=0.0)
        read_back = tl.load(BACKWARD_READ + at, mask=real, other=0.0)
        gated = read_back * tl.load(BACKWARD_GATE + at, mask=real, other=0.0)
        written = tl.load(BACKWARD_WRITTEN + at, mask=real, other=0.0)
        other = tl.load(BACKWARD_SPANS + at, mask=real, other=0.0) + tl.cumsum(gated, 0)
        after = (place < CHUNK - 1) & real
        other += tl.cumsum(product_at(BACKWARD_WRITTEN, BACKWARD_WRITE, at + 1, after), 0, reverse=True)
        kept = tl.load(BACKWARD_KEPT + at_chunk, mask=inside, other=0.0)
        other += (kept * tl.load(BACKWARD_PRODUCT + at_chunk, mask=inside, other=0.0))[None, :]
        rate += tl.where(segment >= 0, other, 0.0)
        leaves = segment == tl.load(OPENS + batch * (chunks + 1) + chunk).to(tl.int32)
        dt_grad += tl.where(leaves, written * decayed(backward), 0.0)
        gate_grad = tl.load(PAIR_GATE + at, mask=real, other=0.0) + read - read_back
        tl.store(GATE_GRAD + out, tl.where(segment >= 0, gate_grad, 0.0), mask=where)
    tl.store(A_GRAD + at_chunk, tl.sum(rate * dt, 0), mask=inside)
    dt_grad += rate * tl.load(A + heads, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(DT_GRAD + out, tl.where(taken[:, None], dt_grad, 0.0), mask=where)


@launching
def backward(
    y_grad: Tensor,
    final_grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`chunked_scan_backward.backward` on Triton kernels: gradients of x, dt, A, B, C, gate, D,
    initial_state."""
    kind = token_dtype(x.dtype)
    x, B, C, y_grad = (rows_of(tensor.to(kind)) for tensor in (x, B, C, y_grad))
    A, D = A.contiguous(), None if D is None else D.contiguous()
    scalars = scan_scalars(dt, A, gate, segment, valid, gradient_chunk_size(kind))
    states, _, _ = sweep_states(B, x, scalars.write, scalars.kept, scalars.valid, initial_state)
    state_grads, initial_grad, products = sweep_states(
        C,
        y_grad,
        scalars.gated_read,
        scalars.kept,
        scalars.valid,
        final_grad,
        turned=True,
        partner=states,
    )
    read = read_gradients(x, B, C, y_grad, scalars, states)
    written = write_gradients(x, B, C, y_grad, scalars, D, state_grads)
    dt_grad, rate_grad, gate_grad = scalar_gradients(A, scalars, read, written, products, x.shape[1])
    return (
        written["X_GRAD"],
        dt_grad,
        rate_grad,
        written["B_GRAD"],
        read["C_GRAD"],
        gate_grad,
        None if D is None else read["SKIP_GRAD"].sum((0, 1, 3)),
        None if initial_state is None else initial_grad[0],
    )


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
        A,
        **scalars.arguments(),
        **scalars.by_direction("WRITE", scalars.write),
        **scalars.by_direction("KEPT", scalars.kept),
        **scalars.by_direction("PRODUCT", products),
        OPENS=scalars.opens,
        FORWARD_SPANS=read["FORWARD_SPANS"],
        BACKWARD_SPANS=read["BACKWARD_SPANS"],
        FORWARD_READ=read["FORWARD_PULLED"],
        BACKWARD_READ=read["BACKWARD_PULLED"],
        FORWARD_WRITTEN=written["FORWARD_PULLED"],
        BACKWARD_WRITTEN=written["BACKWARD_PULLED"],
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
