# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for the causal convolution over valid tokens: forward, ∂u, and partial sums of ∂weight and
∂bias.

Letters: B batch, L tokens, K taps. With r the rank of a token among the valid ones of its row and s_r the
input of that rank times the scale, the state standing at ranks 1-K … -1:

    out_r = Σ_k weight[k] s_{r-K+1+k} + bias        ∂s_r = Σ_k weight[k] ∂out_{r+K-1-k}                    (1)

`reference/scan.py`, eq. (4). A kernel finds a rank's place in the sequence by index, and the place's token of
u, so nothing is moved; without a mask rank and place are the same, without an order place and token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv import by_part
from .launch import ceil_div, launching, power_of_2
from .scan_tiles import rows_of

ROWS, COLUMNS = 32, 64


@triton.jit
def input_of(
    U,
    PLACE,
    ORDER,
    START,
    rank,
    taken,
    batch,
    u_batch,
    u_token,
    length,
    channel,
    scale,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_START: tl.constexpr,
    SCALES: tl.constexpr,
):
    """s of eq. (1) at some ranks, those of the state included, 0 where not taken: (ranks, channels)."""
    inside = (channel < CHANNELS)[None, :]
    among = taken & (rank >= 0)
    where = rank
    if HAS_MASK:
        where = tl.load(PLACE + batch * length + where, mask=among, other=0)
    if HAS_ORDER:
        where = tl.load(ORDER + batch * length + where, mask=among, other=0)
    tile = U + batch * u_batch + where[:, None] * u_token + channel[None, :]
    seen = tl.load(tile, mask=among[:, None] & inside, other=0.0).to(tl.float32)
    if SCALES:  # rounded as a tensor would be that holds the product
        seen = (seen * scale).to(U.dtype.element_ty).to(tl.float32)
    if HAS_START:
        before = taken & (rank < 0)
        tile = START + (batch * (TAPS - 1) + rank + TAPS - 1)[:, None] * STATES + channel[None, :]
        seen += tl.load(tile, mask=before[:, None] & inside, other=0.0)
    return seen


@triton.jit
def forward_kernel(
    U,
    WEIGHT,
    BIAS,
    RANK,
    PLACE,
    ORDER,
    COUNT,
    START,
    OUT,
    FINAL,
    u_batch,
    u_token,
    length,
    scale,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TAPS: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Eq. (1), left: the loop of the reference's `causal_conv`; RANK is -1 on masked tokens.

    Each of the last K-1 valid tokens puts its input into FINAL; what is older comes from START. A token has
    STATES channels there, these among them.
    """
    batch = tl.cast(tl.program_id(2), tl.int64)
    token = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < length
    inside = channel < CHANNELS
    rank = token
    taken = real
    count = tl.cast(length, tl.int64)
    if HAS_MASK:
        rank = tl.load(RANK + batch * length + token, mask=real, other=-1)
        taken = rank >= 0
        count = tl.load(COUNT + batch)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in tl.static_range(TAPS):
        seen = input_of(
            U,
            PLACE,
            ORDER,
            START,
            rank - (TAPS - 1) + tap,
            taken,
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
        weight = tl.load(WEIGHT + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        out += seen * weight[None, :]
    if HAS_BIAS:
        out += tl.load(BIAS + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = tl.where(taken[:, None], out, 0.0)
    tile = OUT + (batch * length + token)[:, None] * CHANNELS + channel[None, :]
    tl.store(tile, out.to(OUT.dtype.element_ty), mask=real[:, None] & inside[None, :])
    if TAPS > 1:
        final = FINAL + batch * (TAPS - 1) * STATES + channel[None, :]
        kept = rank - count + (TAPS - 1)  # the place among the last K-1 inputs
        last = (taken & (kept >= 0))[:, None] & inside[None, :]
        tl.store(final + kept[:, None] * STATES, seen, mask=last)
        if tl.program_id(0) == 0:
            place = tl.arange(0, BEFORE)
            older = (place + count < TAPS - 1)[:, None] & inside[None, :]
            before = tl.zeros([BEFORE, COLUMNS], tl.float32)
            if HAS_START:
                start = START + (batch * (TAPS - 1) + place + count)[:, None] * STATES + channel[None, :]
                before = tl.load(start, mask=older, other=0.0)
            tl.store(final + place[:, None] * STATES, before, mask=older)


@triton.jit
def backward_kernel(
    U,
    WEIGHT,
    OUT_GRAD,
    RANK,
    PLACE,
    ORDER,
    COUNT,
    START,
    FINAL_GRAD,
    U_GRAD,
    WEIGHT_GRAD,
    BIAS_GRAD,
    u_batch,
    u_token,
    g_batch,
    g_token,
    length,
    scale,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Eq. (1), right, and what a block of tokens adds to the gradients of weight and bias."""
    batch = tl.cast(tl.program_id(2), tl.int64)
    token = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < length
    inside = channel < CHANNELS
    rank = token
    taken = real
    count = tl.cast(length, tl.int64)
    if HAS_MASK:
        rank = tl.load(RANK + batch * length + token, mask=real, other=-1)
        taken = rank >= 0
        count = tl.load(COUNT + batch)
    both = taken[:, None] & inside[None, :]
    part = batch * tl.num_programs(0) + tl.program_id(0)
    grad = tl.load(
        OUT_GRAD + batch * g_batch + token[:, None] * g_token + channel[None, :], mask=both, other=0.0
    )
    grad = grad.to(tl.float32)
    u_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in range(TAPS):
        weight = tl.load(WEIGHT + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        later = rank + (TAPS - 1) - tap
        among = taken & (later < count)
        where = later
        if HAS_MASK:
            where = tl.load(PLACE + batch * length + later, mask=among, other=0)
        tile = OUT_GRAD + batch * g_batch + where[:, None] * g_token + channel[None, :]
        reached = tl.load(tile, mask=among[:, None] & inside[None, :], other=0.0).to(tl.float32)
        u_grad += reached * weight[None, :]
        seen = input_of(
            U,
            PLACE,
            ORDER,
            START,
            rank - (TAPS - 1) + tap,
            taken,
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
    kept = rank - count + (TAPS - 1)  # the place among the last K-1 inputs
    among = taken & (kept >= 0)
    tile = FINAL_GRAD + (batch * (TAPS - 1) + kept)[:, None] * CHANNELS + channel[None, :]
    u_grad += tl.load(tile, mask=among[:, None] & inside[None, :], other=0.0)
    if HAS_BIAS:
        tl.store(BIAS_GRAD + part * CHANNELS + channel, tl.sum(grad, 0), mask=inside)
    u_grad = tl.where(taken[:, None], u_grad, 0.0)
    if SCALES:
        u_grad = u_grad * scale
    if HAS_ORDER:
        token = tl.load(ORDER + batch * length + token, mask=real, other=0)
    tile = U_GRAD + (batch * length + token)[:, None] * CHANNELS + channel[None, :]
    tl.store(tile, u_grad.to(U_GRAD.dtype.element_ty), mask=real[:, None] & inside[None, :])


def ranks(mask: Tensor | None) -> dict[str, Tensor | None]:
    """RANK (B, L), -1 where masked; PLACE (B, L), where each rank stands; COUNT (B,) of valid tokens."""
    if mask is None:
        return {"RANK": None, "PLACE": None, "COUNT": None}
    rank = torch.where(mask, mask.cumsum(1) - 1, -1)
    length = mask.shape[1]
    token = torch.arange(length, device=mask.device).expand(mask.shape)
    place = token.new_zeros(len(mask), length + 1)  # masked tokens meet in the last place
    place = place.scatter_(1, torch.where(mask, rank, length), token)[:, :length].contiguous()
    return {"RANK": rank, "PLACE": place, "COUNT": mask.sum(1)}


def flags(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    start: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> dict:
    """The compile-time constants that both kernels share."""
    taps = weight.shape[1]
    return {
        "CHANNELS": u.shape[2],
        "TAPS": taps,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "HAS_MASK": mask is not None,
        "HAS_ORDER": order is not None,
        "HAS_BIAS": bias is not None,
        "HAS_START": start is not None and taps > 1,
        "SCALES": scale != 1,
        "num_warps": 4,
    }


def grid(u: Tensor) -> tuple[int, int, int]:
    """Blocks of tokens, blocks of channels, rows of the batch."""
    return ceil_div(u.shape[1], ROWS), ceil_div(u.shape[2], COLUMNS), u.shape[0]


def forward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`conv.forward` on a Triton kernel: out (B, L, channels) and the last K-1 valid inputs, float32."""
    (out,), final = forward_parts([u], weight, bias, mask, initial_state, order, (scale,))
    return out, final


@launching
def forward_parts(
    parts: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scales: tuple[float, ...],
) -> tuple[list[Tensor], Tensor]:
    """`conv.forward_parts`, a launch for each part, which reads and writes its channels of the states."""
    sizes, (channels, taps) = [part.shape[2] for part in parts], weight.shape
    final = parts[0].new_empty(parts[0].shape[0], taps - 1, channels, dtype=torch.float32)
    start = None if initial_state is None else initial_state.float().contiguous()
    weights, biases = by_part(weight.contiguous(), sizes, 0), by_part(bias, sizes, 0)
    states = by_part(start, sizes, 2), by_part(final, sizes, 2)
    given, index = zip(map(rows_of, parts), weights, biases, *states, scales, strict=True), ranks(mask)
    return [convolve(*each, channels, mask, index, order) for each in given], final


def convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    final: Tensor,
    scale: float,
    states: int,
    mask: Tensor | None,
    index: dict[str, Tensor | None],
    order: Tensor | None,
) -> Tensor:
    """`forward_kernel` for one part; tokens of `start` and `final` have so many `states`."""
    out = u.new_empty(u.shape)
    forward_kernel[grid(u)](
        u,
        weight,
        bias,
        index["RANK"],
        index["PLACE"],
        order,
        index["COUNT"],
        start,
        out,
        final,
        *u.stride()[:2],
        u.shape[1],
        scale,
        STATES=states,
        BEFORE=power_of_2(max(weight.shape[1] - 1, 1)),
        **flags(u, weight, bias, mask, start, order, scale),
    )
    return out


@launching
def gradient(
    out_grad: Tensor,
    final_grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """`conv.gradient` on a Triton kernel; partial sums are added in a fixed order."""
    u, out_grad = rows_of(u), rows_of(out_grad)
    batch, length, channels = u.shape
    taps, parts = weight.shape[1], ceil_div(length, ROWS) * batch
    start = None if initial_state is None else initial_state.float().contiguous()
    u_grad = u.new_empty(u.shape)
    weight_grad = u.new_empty(parts, taps, channels, dtype=torch.float32)
    bias_grad = None if bias is None else u.new_empty(parts, channels, dtype=torch.float32)
    index = ranks(mask)
    backward_kernel[grid(u)](
        u,
        weight.contiguous(),
        out_grad,
        index["RANK"],
        index["PLACE"],
        order,
        index["COUNT"],
        start,
        final_grad.float().contiguous(),
        u_grad,
        weight_grad,
        bias_grad,
        *u.stride()[:2],
        *out_grad.stride()[:2],
        length,
        scale,
        STATES=channels,
        **flags(u, weight, bias, mask, start, order, scale),
    )
    start_grad = None if start is None else start_gradient(out_grad, final_grad, weight, index, length)
    bias_grad = None if bias is None else bias_grad.sum(0)
    return u_grad, weight_grad.sum(0).T, bias_grad, start_grad


def start_gradient(
    out_grad: Tensor, final_grad: Tensor, weight: Tensor, index: dict[str, Tensor | None], length: int
) -> Tensor:
    """What the first K-1 valid tokens, and the final state if there are fewer, owe the initial state."""
    batch, _, channels = out_grad.shape
    taps = weight.shape[1]
    grad = out_grad.new_zeros(batch, taps - 1, channels, dtype=torch.float32)
    row = torch.arange(batch, device=out_grad.device)
    count = torch.full_like(row, length) if index["COUNT"] is None else index["COUNT"]
    for place in range(taps - 1):  # rank place - (K-1)
        for rank in range(min(place + 1, length)):
            token = torch.full_like(row, rank) if index["PLACE"] is None else index["PLACE"][:, rank]
            reached = torch.where((count > rank)[:, None], out_grad[row, token].float(), 0)
            grad[:, place] += weight[:, place - rank].float() * reached
        kept = place - count
        passed = final_grad.float()[row, kept.clamp_min(0)]
        grad[:, place] += torch.where((kept >= 0)[:, None], passed, 0)
    return grad
