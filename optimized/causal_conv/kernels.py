# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the causal convolution over valid tokens.

Letters: B batch, L tokens, K taps. With r the rank of a token among the valid ones of its row and s_r the
input of that rank times the scale, the state standing at ranks 1-K … -1:

    out_r = Σ_k weight[k] s_{r-K+1+k} + bias                                                               (1)

`reference/scan.py`, eq. (4). A kernel finds a rank's place in the sequence by index, and the place's token of
u, so nothing is moved; without a mask rank and place are the same, without an order place and token. A token
of a packed row, whose sample has AGE tokens before it, reads no further back than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..engine.launch import ceil_div, contiguous, power_of_2, rows_of
from .operator import ConvInputs, ConvOutputs
from .torch_engine import ages, begins_by_rank, by_part, each_part

ROWS, COLUMNS = 32, 64


@triton.jit
def input_of(
    U, PLACE, ORDER, START, rank, valid, batch, u_batch, u_token, length, channel, scale,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_START: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """s of eq. (1) at some ranks, those of the state included, 0 where not valid: (ranks, channels)."""
    inside = (channel < CHANNELS)[None, :]
    among = valid & (rank >= 0)
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
        before = valid & (rank < 0)
        tile = START + (batch * (TAPS - 1) + rank + TAPS - 1)[:, None] * STATES + channel[None, :]
        seen += tl.load(tile, mask=before[:, None] & inside, other=0.0)
    return seen


@triton.jit
def forward_kernel(
    U, WEIGHT, BIAS, RANK, PLACE, ORDER, COUNT, AGE, START, OUT, FINAL, u_batch, u_token, length, scale,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, TAPS: tl.constexpr, BEFORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_SEQUENCE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Eq. (1): the loop of the reference's `causal_conv`; RANK is -1 on masked tokens.

    Each of the last K-1 valid tokens puts its input into FINAL; what is older comes from START. A token has
    STATES channels there, these among them.
    """
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
    reads = valid
    if HAS_SEQUENCE:
        age = tl.load(AGE + batch * length + token, mask=real, other=0)
        last_age = age_of_last(AGE, PLACE, batch, length, count, HAS_MASK)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tap in tl.static_range(TAPS):
        if HAS_SEQUENCE:
            reads = valid & (age >= TAPS - 1 - tap)
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
        weight = tl.load(WEIGHT + channel * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        out += seen * weight[None, :]
    if HAS_BIAS:
        out += tl.load(BIAS + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = tl.where(valid[:, None], out, 0.0)
    tile = OUT + (batch * length + token)[:, None] * CHANNELS + channel[None, :]
    tl.store(tile, out.to(OUT.dtype.element_ty), mask=real[:, None] & inside[None, :])
    if TAPS > 1:
        final = FINAL + batch * (TAPS - 1) * STATES + channel[None, :]
        slot = rank - count + (TAPS - 1)  # the place among the last K-1 inputs
        last = valid & (slot >= 0)
        if HAS_SEQUENCE:
            last = last & (count - 1 - rank <= last_age)
        tl.store(final + slot[:, None] * STATES, seen, mask=last[:, None] & inside[None, :])
        if tl.program_id(0) == 0:
            place = tl.arange(0, BEFORE)
            older = place + count < TAPS - 1
            stays = older
            if HAS_SEQUENCE:  # what the last sample does not have is zeros
                missing = (TAPS - 2 - place > last_age) & (place < TAPS - 1)
                stays, older = older & (TAPS - 2 - place <= last_age), older | missing
            before = tl.zeros([BEFORE, COLUMNS], tl.float32)
            if HAS_START:
                start = START + (batch * (TAPS - 1) + place + count)[:, None] * STATES + channel[None, :]
                before = tl.load(start, mask=stays[:, None] & inside[None, :], other=0.0)
            tl.store(final + place[:, None] * STATES, before, mask=older[:, None] & inside[None, :])


@triton.jit
def age_of_last(AGE, PLACE, batch, length, count, HAS_MASK: tl.constexpr):
    """AGE of a row's last valid token; of a row without any, whose state stays, a large one."""
    place = tl.maximum(count - 1, 0)
    if HAS_MASK:
        place = tl.load(PLACE + batch * length + place)
    return tl.where(count > 0, tl.load(AGE + batch * length + place), 1 << 30)


def ranks(inputs: ConvInputs) -> dict[str, Tensor | None]:
    """RANK (B, L), -1 where masked; PLACE (B, L), where each rank stands; COUNT (B,) of valid tokens; AGE
    (B, L) int32, of packed rows, the inputs that each token's sample has before it."""
    mask, begins = inputs.mask, inputs.begins
    if mask is None:
        age = None if begins is None else ages(begins).contiguous()
        return {"RANK": None, "PLACE": None, "COUNT": None, "AGE": age}
    mask = mask.contiguous()  # what is made of it elementwise takes its strides over
    rank = torch.where(mask, mask.cumsum(1) - 1, -1)
    length = mask.shape[1]
    token = torch.arange(length, device=mask.device).expand(mask.shape)
    place = token.new_zeros(len(mask), length + 1)  # masked tokens meet in the last place
    place = place.scatter_(1, torch.where(mask, rank, length), token)[:, :length].contiguous()
    age = None if begins is None else ages(begins_by_rank(begins, rank), rank.int()).contiguous()
    return {"RANK": rank, "PLACE": place, "COUNT": mask.sum(1), "AGE": age}


def grid(u: Tensor) -> tuple[int, int, int]:
    """Blocks of tokens, blocks of channels, rows of the batch."""
    return ceil_div(u.shape[1], ROWS), ceil_div(u.shape[2], COLUMNS), u.shape[0]


def shared_arguments(
    u: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor | None, scale: float, inputs: ConvInputs
) -> dict:
    """What this kernel and that of the gradient take for one part, besides pointers."""
    return {
        "u_batch": u.stride(0),
        "u_token": u.stride(1),
        "length": u.shape[1],
        "scale": scale,
        "CHANNELS": u.shape[2],
        "TAPS": weight.shape[1],
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "HAS_MASK": inputs.mask is not None,
        "HAS_ORDER": inputs.order is not None,
        "HAS_SEQUENCE": inputs.begins is not None,
        "HAS_BIAS": bias is not None,
        "HAS_START": start is not None and weight.shape[1] > 1,
        "SCALES": scale != 1,
        "num_warps": 4,
    }


def forward(inputs: ConvInputs) -> ConvOutputs:
    """The operator on a Triton kernel, a launch for each part, which reads and writes its channels of the
    states.
    """
    inputs = as_kernels_take_them(inputs)
    parts, index, outs, (channels, taps) = each_part(inputs), ranks(inputs), [], inputs.weight.shape
    final = parts[0][0].new_empty(len(parts[0][0]), taps - 1, channels, dtype=torch.float32)
    finals = by_part(final, [part[0].shape[2] for part in parts], 2)
    for (u, weight, bias, start, scale), own_final in zip(parts, finals, strict=True):
        u = rows_of(u)
        outs.append(u.new_empty(u.shape))
        forward_kernel[grid(u)](
            u,
            weight,
            bias,
            index["RANK"],
            index["PLACE"],
            inputs.order,
            index["COUNT"],
            index["AGE"],
            start,
            outs[-1],
            own_final,
            STATES=channels,
            BEFORE=power_of_2(max(taps - 1, 1)),
            **shared_arguments(u, weight, bias, start, scale, inputs),
        )
    return ConvOutputs([out.view(part.shape) for out, part in zip(outs, inputs.parts, strict=True)], final)


def as_kernels_take_them(inputs: ConvInputs) -> ConvInputs:
    """Weight, bias and states contiguous, states in float32."""
    start = None if inputs.initial_state is None else inputs.initial_state.float().contiguous()
    return inputs._replace(
        weight=inputs.weight.contiguous(), bias=contiguous(inputs.bias), initial_state=start
    )
