# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the gradients of the causal convolution: ∂u, and partial sums of ∂weight and ∂bias.

Letters and ranks as in `kernels`:

    ∂s_r = Σ_k weight[k] ∂out_{r+K-1-k}        ∂weight[k] = Σ_r ∂out_r s_{r-K+1+k}                         (1)
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import contiguous, rows_of
from .kernels import age_of_last, as_kernels_take_them, grid, input_of, ranks, shared_arguments
from .operator import ConvGrads, ConvInputs, ConvOutputs
from .torch_engine import ENDLESS, of_each_part


@triton.jit
def backward_kernel(
    U, WEIGHT, OUT_GRAD, RANK, PLACE, ORDER, COUNT, AGE, START, FINAL_GRAD, U_GRAD, WEIGHT_GRAD, BIAS_GRAD,
    u_batch, u_token, g_batch, g_token, length, scale,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Eq. (1), and what a block of tokens adds to the gradients of weight and bias."""
    batch = tl.cast(tl.program_id(2), tl.int64)
    token = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < length
    inside = channel < CHANNELS
    rank = token
    valid = real
    count = tl.cast(length, tl.int64)
    if HAS_MASK:
        rank = tl.load(RANK + batch * length + token, mask=real, other=-1)
        valid = rank >= 0
        count = tl.load(COUNT + batch)
    both = valid[:, None] & inside[None, :]
    part = batch * tl.num_programs(0) + tl.program_id(0)
    grad = tl.load(
        OUT_GRAD + batch * g_batch + token[:, None] * g_token + channel[None, :], mask=both, other=0.0
    )
    grad = grad.to(tl.float32)
    u_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    reads = valid
    if HAS_SEQUENCE:
        age = tl.load(AGE + batch * length + token, mask=real, other=0)
    for tap in tl.static_range(TAPS):  # unrolled: loads of all taps wait at once
        weight = tl.load(WEIGHT + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        later = rank + (TAPS - 1) - tap
        among = valid & (later < count)
        where = later
        if HAS_MASK:
            where = tl.load(PLACE + batch * length + later, mask=among, other=0)
        if HAS_SEQUENCE:
            reads = valid & (age >= TAPS - 1 - tap)
            among = among & (tl.load(AGE + batch * length + where, mask=among, other=0) >= TAPS - 1 - tap)
        tile = OUT_GRAD + batch * g_batch + where[:, None] * g_token + channel[None, :]
        reached = tl.load(tile, mask=among[:, None] & inside[None, :], other=0.0).to(tl.float32)
        u_grad += reached * weight[None, :]
        seen = input_of(
            U,
            PLACE,
            ORDER,
            START,
            rank - (TAPS - 1) + tap,
            reads,
            batch,
            u_batch,
            u_token,
            length,
            channel,
            scale,
            CHANNELS,
            STATES,
            TAPS,
            HAS_MASK,
            HAS_ORDER,
            HAS_START,
            SCALES,
        )
        tl.store(WEIGHT_GRAD + (part * TAPS + tap) * CHANNELS + channel, tl.sum(seen * grad, 0), mask=inside)
    slot = rank - count + (TAPS - 1)  # the place among the last K-1 inputs
    among = valid & (slot >= 0)
    if HAS_SEQUENCE:
        among = among & (count - 1 - rank <= age_of_last(AGE, PLACE, batch, length, count, HAS_MASK))
    tile = FINAL_GRAD + (batch * (TAPS - 1) + slot)[:, None] * CHANNELS + channel[None, :]
    u_grad += tl.load(tile, mask=among[:, None] & inside[None, :], other=0.0)
    if HAS_BIAS:
        tl.store(BIAS_GRAD + part * CHANNELS + channel, tl.sum(grad, 0), mask=inside)
    u_grad = tl.where(valid[:, None], u_grad, 0.0)
    if SCALES:
        u_grad = u_grad * scale
    if HAS_ORDER:
        token = tl.load(ORDER + batch * length + token, mask=real, other=0)
    tile = U_GRAD + (batch * length + token)[:, None] * CHANNELS + channel[None, :]
    tl.store(tile, u_grad.to(U_GRAD.dtype.element_ty), mask=real[:, None] & inside[None, :])


def backward(inputs: ConvInputs, outputs: ConvOutputs, grads: ConvOutputs) -> ConvGrads:
    """The gradients of the operator on a Triton kernel, a launch for each part."""
    inputs = as_kernels_take_them(inputs)
    return of_each_part(partial(part_backward, inputs=inputs, index=ranks(inputs)), inputs, grads)


def part_backward(
    out_grad: Tensor,
    final_grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    scale: float,
    *,
    inputs: ConvInputs,
    index: dict[str, Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of u, weight, bias and start; partial sums are added in a fixed order."""
    u, out_grad = rows_of(u), rows_of(out_grad)
    batch, length, channels = u.shape
    taps, parts = weight.shape[1], grid(u)[0] * batch
    start = contiguous(start)
    u_grad = u.new_empty(u.shape)
    weight_grad = u.new_empty(parts, taps, channels, dtype=torch.float32)
    bias_grad = None if bias is None else u.new_empty(parts, channels, dtype=torch.float32)
    backward_kernel[grid(u)](
        u,
        weight,
        out_grad,
        index["RANK"],
        index["PLACE"],
        inputs.order,
        index["COUNT"],
        index["AGE"],
        start,
        final_grad.float().contiguous(),
        u_grad,
        weight_grad,
        bias_grad,
        g_batch=out_grad.stride(0),
        g_token=out_grad.stride(1),
        STATES=channels,
        **shared_arguments(u, weight, bias, start, scale, inputs),
    )
    start_grad = None if start is None else start_gradient(out_grad, final_grad, weight, index, length)
    bias_grad = None if bias is None else bias_grad.sum(0)
    return u_grad, weight_grad.sum(0).T, bias_grad, start_grad


def start_gradient(
    out_grad: Tensor, final_grad: Tensor, weight: Tensor, index: dict[str, Tensor | None], length: int
) -> Tensor:
    """The gradient of the initial state: through the first K-1 valid tokens, and the final state if there are
    fewer.
    """
    batch, _, channels = out_grad.shape
    taps = weight.shape[1]
    grad = out_grad.new_zeros(batch, taps - 1, channels, dtype=torch.float32)
    row = torch.arange(batch, device=out_grad.device)
    count = torch.full_like(row, length) if index["COUNT"] is None else index["COUNT"]
    age = index["AGE"]
    for place in range(taps - 1):  # rank place - (K-1)
        for rank in range(min(place + 1, length)):
            token = torch.full_like(row, rank) if index["PLACE"] is None else index["PLACE"][:, rank]
            reads = count > rank
            if age is not None:  # of the first sample
                reads = reads & (age[row, token] == ENDLESS)
            reached = torch.where(reads[:, None], out_grad[row, token].float(), 0)
            grad[:, place] += weight[:, place - rank].float() * reached
        slot = place - count
        stays = slot >= 0
        if age is not None:
            last = (count - 1).clamp_min(0)
            last = last if index["PLACE"] is None else index["PLACE"][row, last]
            stays = stays & ((count == 0) | (age[row, last] == ENDLESS))
        passed = final_grad.float()[row, slot.clamp_min(0)]
        grad[:, place] += torch.where(stays[:, None], passed, 0)
    return grad
