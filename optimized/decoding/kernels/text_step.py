# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernels for one token of text: the products with its hidden states in one launch, all that lies
between them and the output projection in another, and for few rows this with the other branch's in a third.

Letters as in `torch_engine`. The products read every weight once and share nothing, so each program takes a
few rows of one matrix and walks along the width. A step's program takes one head: its state is read once and
written once, a few rows of it at a time, the next while the ones before are written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...engine.launch import as_bytes, ceil_div, contiguous, power_of_2, rows_of
from ..operator import (
    OutputInputs,
    PooledTextStepInputs,
    ProjectionInputs,
    ProjectionOutputs,
    TextStepInputs,
    TextStepOutputs,
    pooled_output,
    projection_outputs,
    text_step_outputs,
)

ELEMENTS = {1: 4096, 2: 4096, 4: 8192}  # rows of the batch -> of a program's sums
OUTPUTS = {1: 4, 2: 4, 4: 8}  # rows of the batch -> rows of the weight that a program takes
OUTPUTS_AT_ONCE = 4  # of both branches' output weights, which have fewer rows than others but longer ones
FEW_HEADS = 128  # of all requests: with more, programs of few rows at a time keep the memory busier
STATE_ROWS = {True: 64, False: 32}  # of a state at a time, for few heads and for many
SERIES = tl.constexpr(0.1)  # below, log(1 + e) would lose the last bits of a small e


@triton.jit
def rows_sum(
    U, WEIGHT, BIAS, block, size, batch, u_batch, weight_batch,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """U WEIGHTᵀ + BIAS for one block of WEIGHT's rows, in float32."""
    row = tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    there, inside = row < batch, output < size
    weights = WEIGHT + tl.cast(output, tl.int64)[None, :, None] * weight_batch
    tokens = U + tl.cast(row, tl.int64)[:, None, None] * u_batch
    total = tl.zeros([ROWS, OUTPUTS, STEP], tl.float32)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        within = (column < WIDTH)[None, None, :]
        weight = tl.load(
            weights + column[None, None, :],
            mask=inside[None, :, None] & within,
            other=0.0,
            eviction_policy="evict_first",
        )
        token = tl.load(tokens + column[None, None, :], mask=there[:, None, None] & within, other=0.0)
        total += token.to(tl.float32) * weight.to(tl.float32)
    out = tl.sum(total, 2)
    if HAS_BIAS:
        out += tl.load(BIAS + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def rows_product(
    U, WEIGHT, BIAS, OUT, block, size, batch, u_batch, out_batch,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """OUT = U WEIGHTᵀ + BIAS for one block of WEIGHT's rows, which lie end to end."""
    row = tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    there, inside = row < batch, output < size
    out = rows_sum(U, WEIGHT, BIAS, block, size, batch, u_batch, WIDTH, WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS)
    place = tl.cast(row, tl.int64)[:, None] * out_batch + output[None, :]
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def project_kernel(
    U, V, K, Q, DT, Z, V_BIAS, K_BIAS, Q_BIAS, DT_BIAS, Z_BIAS, XBC, RATE, GATED, batch, u_batch,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPED: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
):  # fmt: skip
    """`torch_engine.project`: the first programs take V, then K, Q, DT and Z."""
    channels: tl.constexpr = 2 * GROUPED + INNER
    grouped: tl.constexpr = (GROUPED + OUTPUTS - 1) // OUTPUTS  # blocks
    inner: tl.constexpr = (INNER + OUTPUTS - 1) // OUTPUTS
    heads: tl.constexpr = (HEADS + OUTPUTS - 1) // OUTPUTS
    block = tl.program_id(0)
    if block < grouped:
        rows_product(
            U, V, V_BIAS, XBC, block, GROUPED, batch, u_batch, channels,
            WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS,
        )  # fmt: skip
    elif block < 2 * grouped:
        rows_product(
            U, K, K_BIAS, XBC + GROUPED, block - grouped, GROUPED, batch, u_batch, channels,
            WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS,
        )  # fmt: skip
    elif block < 2 * grouped + inner:
        rows_product(
            U, Q, Q_BIAS, XBC + 2 * GROUPED, block - 2 * grouped, INNER, batch, u_batch, channels,
            WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS,
        )  # fmt: skip
    elif block < 2 * grouped + inner + heads:
        rows_product(
            U, DT, DT_BIAS, RATE, block - 2 * grouped - inner, HEADS, batch, u_batch, HEADS,
            WIDTH, ROWS, OUTPUTS, STEP, True,
        )  # fmt: skip
    elif HAS_Z:
        rows_product(
            U, Z, Z_BIAS, GATED, block - 2 * grouped - inner - heads, INNER, batch, u_batch, INNER,
            WIDTH, ROWS, OUTPUTS, STEP, True,
        )  # fmt: skip


@triton.jit
def text_output_kernel(
    FLEX, LOCAL, FLEX_WEIGHT, LOCAL_WEIGHT, FLEX_BIAS, LOCAL_BIAS, LOGIT, ROW, OUT, batch, size,
    flex_batch, local_batch, flex_weight_batch, local_weight_batch, logit_batch,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`torch_engine.output` for one block of the weights' rows."""
    block, row = tl.program_id(0), tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    flex = rows_sum(
        FLEX, FLEX_WEIGHT, FLEX_BIAS, block, size, batch, flex_batch, flex_weight_batch,
        WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS,
    )  # fmt: skip
    local = rows_sum(
        LOCAL, LOCAL_WEIGHT, LOCAL_BIAS, block, size, batch, local_batch, local_weight_batch,
        WIDTH, ROWS, OUTPUTS, STEP, HAS_BIAS,
    )  # fmt: skip
    there = row < batch
    is_mixed = (tl.load(ROW + row, mask=there, other=-1) >= 0)[:, None]
    mix = tl.sigmoid(tl.load(LOGIT + row * logit_batch, mask=there, other=0.0).to(tl.float32))[:, None]
    y = tl.where(is_mixed, mix * flex + (1.0 - mix) * local, flex)
    place = tl.cast(row, tl.int64)[:, None] * size + output[None, :]
    tl.store(OUT + place, y.to(OUT.dtype.element_ty), mask=there[:, None] & (output < size)[None, :])


@triton.jit
def softplus(rate):
    """log(1 + e^rate), the rate itself above 20 as torch has it."""
    e = tl.exp(tl.minimum(rate, 20.0))
    s = tl.minimum(e, SERIES)
    series = s * (1.0 - s * (1 / 2 - s * (1 / 3 - s * (1 / 4 - s * (1 / 5 - s / 6)))))
    return tl.where(rate > 20.0, rate, tl.where(e < SERIES, series, tl.log(1.0 + e)))


@triton.jit
def convolved(
    TOKENS, START, NEXT, WEIGHT, BIAS, place, shift, factor, end, written, turn, valid,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_RING: tl.constexpr,
):  # fmt: skip
    """Eq. (2) at `place`s before `end` of x, B or C, whose first channel is `shift`; the new state at those
    before `written`. START and NEXT are a row's; a ring is both, and no program reads where one writes.
    """
    inside = place < end
    if TAPS == 0:
        out = tl.load(TOKENS + place, mask=inside, other=0.0).to(tl.float32) * factor
    else:  # the window in one tile, the last row the token: loaded once, not by every thread that reads it
        tap = tl.arange(0, ROWS)[:, None]
        channel = shift + place[None, :]
        at = tap
        if IS_RING:
            at = (turn + 1 + tap) % TAPS
        before = inside[None, :] & (tap < TAPS - 1)
        now = inside[None, :] & (tap == TAPS - 1)
        window = tl.load(START + at * CHANNELS + channel, mask=before, other=0.0)
        window += tl.load(TOKENS + place[None, :] + tap * 0, mask=now, other=0.0).to(tl.float32) * factor
        weight = tl.load(WEIGHT + channel * TAPS + tap, mask=before | now, other=0.0).to(tl.float32)
        out = tl.sum(window * weight, 0)
        stored = (place < written)[None, :]
        if IS_RING:
            newest = tap == tl.where(valid, TAPS - 1, -1)
            tl.store(NEXT + at * CHANNELS + channel, window, mask=stored & newest)
        else:
            row = tap - tl.where(valid, 1, 0)  # where a row of the window stands in the new state
            tl.store(NEXT + row * CHANNELS + channel, window, mask=stored & (row >= 0) & (row < TAPS - 1))
        if HAS_BIAS:
            out += tl.load(BIAS + shift + place, mask=inside, other=0.0).to(tl.float32)
    return tl.where(valid, out, 0.0)  # a row at rest may hold anything


@triton.jit
def state_tile(STATE, start, p, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of one head's state from `start` on."""
    n = start + tl.arange(0, BLOCK_N)
    tile = STATE + n[:, None] * P + p[None, :]
    if P == BLOCK_P:  # without a mask the tile's addresses take one register
        return tl.load(tile).to(tl.float32)
    else:
        return tl.load(tile, mask=(n < P)[:, None] & (p < P)[None, :], other=0.0).to(tl.float32)


@triton.jit
def text_step_kernel(
    STATE, PLACE, TURN, START, NEXT, X, B, C, RATE, A_LOG, D, WEIGHT, BIAS, NORM, Z, VALID, LOGIT, Y,
    state_batch, start_batch, x_batch, b_batch, c_batch, rate_batch, logit_batch, y_gap, scale, eps,
    HEADS: tl.constexpr, RATIO: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_VALID: tl.constexpr, HAS_LOGIT: tl.constexpr, IS_POOLED: tl.constexpr,
    IS_RING: tl.constexpr,
):  # fmt: skip
    """`torch_engine.text_step` for one head, N = P, or `pooled_text_step`; STATE is overwritten."""
    head = tl.program_id(0) % HEADS
    batch = tl.cast(tl.program_id(0) // HEADS, tl.int64)
    group = head // RATIO
    grouped: tl.constexpr = HEADS // RATIO * P
    channels: tl.constexpr = 2 * grouped + HEADS * P
    p = tl.arange(0, BLOCK_P)
    at = batch * HEADS + head
    row = tl.load(PLACE + batch) if IS_POOLED else batch
    turn = tl.load(TURN + batch).to(tl.int32) if IS_RING else 0
    before, after = START + row * start_batch, NEXT + row * start_batch
    base = STATE + row * state_batch + head * (P * P)
    following = state_tile(base, 0, p, P, BLOCK_P, BLOCK_N)
    valid = batch >= 0
    if HAS_VALID:
        valid = tl.load(VALID + batch) != 0
    own, last = group * P, (group + 1) * P
    written = tl.where(head % RATIO == 0, last, 0)  # the first head of a group writes its state
    x = convolved(
        X + batch * x_batch, before, after, WEIGHT, BIAS, own + p, 0, 1.0, last, written, turn, valid,
        channels, TAPS, ROWS, HAS_BIAS, IS_RING,
    )  # fmt: skip
    b = convolved(
        B + batch * b_batch, before, after, WEIGHT, BIAS, own + p, grouped, 1.0, last, written, turn, valid,
        channels, TAPS, ROWS, HAS_BIAS, IS_RING,
    )  # fmt: skip
    c = convolved(
        C + batch * c_batch, before, after, WEIGHT, BIAS, head * P + p, 2 * grouped, scale, (head + 1) * P,
        (head + 1) * P, turn, valid, channels, TAPS, ROWS, HAS_BIAS, IS_RING,
    )  # fmt: skip
    dt = tl.where(valid, softplus(tl.load(RATE + batch * rate_batch + head).to(tl.float32)), 0.0)
    decay = tl.exp(-dt * tl.exp(tl.load(A_LOG + head).to(tl.float32)))
    decay = tl.where(valid, decay, 1.0)
    parts: tl.constexpr = BLOCK_P // BLOCK_N
    writes, reads = tl.reshape(dt * b, [parts, BLOCK_N]), tl.reshape(c, [parts, BLOCK_N])
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for start in tl.static_range(0, BLOCK_P, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        state = following
        if start + BLOCK_N < BLOCK_P:  # asked for before this one is written
            following = state_tile(base, start + BLOCK_N, p, P, BLOCK_P, BLOCK_N)
        here = tl.arange(0, parts)[:, None] == start // BLOCK_N
        write, read = tl.sum(tl.where(here, writes, 0.0), 0), tl.sum(tl.where(here, reads, 0.0), 0)
        state = decay * state + write[:, None] * x[None, :]
        tile = base + n[:, None] * P + p[None, :]
        if P == BLOCK_P:
            tl.store(tile, state.to(STATE.dtype.element_ty))
        else:
            tl.store(tile, state.to(STATE.dtype.element_ty), mask=(n < P)[:, None] & (p < P)[None, :])
        total += state * read[:, None]
    y = tl.sum(total, 0) + tl.load(D + head).to(tl.float32) * x
    real = p < P
    if HAS_NORM:
        weight = tl.load(NORM + head * P + p, mask=real, other=0.0).to(tl.float32)
        y = y * (1.0 / tl.sqrt(tl.sum(y * y, 0) / P + eps)) * weight
    if HAS_Z:
        z = tl.load(Z + at * P + p, mask=real, other=0.0).to(tl.float32)
        y = y * z / (1.0 + tl.exp(-z))
    if HAS_LOGIT:
        y *= tl.sigmoid(tl.load(LOGIT + batch * logit_batch).to(tl.float32))
    y = tl.where(valid, y, 0.0)
    place = at * P + batch * y_gap  # batch times a stride and head times P took a third more registers
    tl.store(Y + place + p, y.to(Y.dtype.element_ty), mask=real)


def project(inputs: ProjectionInputs) -> ProjectionOutputs:
    """`text_projection` on a Triton kernel; weights are contiguous, and there are four rows at most."""
    u, weights, biases, dt_weight, dt_bias, z_weight, z_bias, _ = inputs
    (batch, width), heads, u = u.shape, len(dt_weight), rows_of(u)
    (grouped, _), (inner, _) = weights[0].shape, weights[2].shape
    outputs = projection_outputs(inputs)
    rows = power_of_2(batch)
    rows_of_weight = OUTPUTS[rows]
    sizes = (grouped, grouped, inner, heads, 0 if z_weight is None else inner)
    project_kernel[(sum(ceil_div(size, rows_of_weight) for size in sizes),)](
        u,
        *weights,
        dt_weight,
        z_weight,
        *biases,
        dt_bias,
        z_bias,
        *outputs,
        batch,
        u.stride(0),
        WIDTH=width,
        HEADS=heads,
        GROUPED=grouped,
        INNER=inner,
        ROWS=rows,
        OUTPUTS=rows_of_weight,
        STEP=min(ELEMENTS[rows] // (rows * rows_of_weight), power_of_2(width)),
        HAS_BIAS=biases[0] is not None,
        HAS_Z=z_weight is not None,
        num_warps=4,
    )
    return outputs


def output(inputs: OutputInputs) -> Tensor:
    """`text_output` on a Triton kernel; there are four rows at most."""
    flex, local = rows_of(inputs.flex), rows_of(inputs.local)
    (batch, width), (of_flex, of_local) = flex.shape, inputs.weights
    out, rows = flex.new_empty(batch, len(of_flex)), power_of_2(batch)
    text_output_kernel[(ceil_div(len(of_flex), OUTPUTS_AT_ONCE),)](
        flex,
        local,
        of_flex,
        of_local,
        *inputs.biases,
        inputs.logit,
        inputs.row.contiguous(),
        out,
        batch,
        len(of_flex),
        flex.stride(0),
        local.stride(0),
        of_flex.stride(0),
        of_local.stride(0),
        inputs.logit.stride(0),
        WIDTH=width,
        ROWS=rows,
        OUTPUTS=OUTPUTS_AT_ONCE,
        STEP=min(ELEMENTS[rows] // (rows * OUTPUTS_AT_ONCE), power_of_2(width)),
        HAS_BIAS=inputs.biases[0] is not None,
        num_warps=4,
    )
    return out


def text_step(inputs: TextStepInputs) -> TextStepOutputs:
    """The operator on a Triton kernel."""
    outputs = y, new_conv_state = text_step_outputs(inputs)
    start = None if inputs.conv_weight is None else inputs.conv_state.float().contiguous()
    launch_step(inputs, inputs.scan_state, start, new_conv_state, y)
    return outputs


def pooled_text_step(inputs: PooledTextStepInputs) -> Tensor:
    """The operator on a Triton kernel."""
    y, pools = pooled_output(inputs), (inputs.scan_pool, inputs.conv_pool, inputs.conv_pool)
    out = y if inputs.out is None else inputs.out
    launch_step(inputs, *pools, out, inputs.rows, inputs.turn, inputs.logit)
    return y


def launch_step(
    inputs: TextStepInputs | PooledTextStepInputs,
    states: Tensor,
    start: Tensor | None,
    following: Tensor | None,
    y: Tensor,
    rows: Tensor | None = None,
    turn: Tensor | None = None,
    logit: Tensor | None = None,
) -> None:
    """Launch the kernel on states, or on pools of them."""
    heads, size, groups, conv_weight = (
        inputs.C.shape[1],
        inputs.C.shape[2],
        inputs.x.shape[1],
        inputs.conv_weight,
    )
    x, B, C = (rows_of(tensor.flatten(1)) for tensor in (inputs.x, inputs.B, inputs.C))
    taps, rate = 0 if conv_weight is None else conv_weight.shape[1], rows_of(inputs.rate)
    none = states if start is None else start  # what a single tap never reads
    programs = len(x) * heads
    block, warps = tile_of_step(programs, size)
    text_step_kernel[(programs,)](
        states,
        contiguous(rows),
        contiguous(turn),
        none,
        states if following is None else following,
        x,
        B,
        C,
        rate,
        inputs.A_log.contiguous(),
        contiguous(inputs.D),
        contiguous(conv_weight),
        contiguous(inputs.conv_bias),
        contiguous(inputs.norm_weight),
        contiguous(inputs.z),
        as_bytes(inputs.valid),
        logit,
        y,
        states.stride(0),
        none.stride(0) if start is not None else 0,
        x.stride(0),
        B.stride(0),
        C.stride(0),
        rate.stride(0),
        0 if logit is None else logit.stride(0),
        y.stride(0) - heads * size,
        inputs.scale,
        inputs.eps,
        HEADS=heads,
        RATIO=heads // groups,
        P=size,
        BLOCK_P=power_of_2(size),
        BLOCK_N=block,
        TAPS=taps,
        ROWS=power_of_2(max(taps, 1)),
        HAS_BIAS=inputs.conv_bias is not None,
        HAS_NORM=inputs.norm_weight is not None,
        HAS_Z=inputs.z is not None,
        HAS_VALID=inputs.valid is not None,
        HAS_LOGIT=logit is not None,
        IS_POOLED=rows is not None,
        IS_RING=turn is not None and taps > 1,
        num_warps=warps,
    )


def tile_of_step(programs: int, size: int) -> tuple[int, int]:
    """Return how many rows of a state are taken at a time, and by how many warps: the fastest of seven on an
    H200, or a few hundredths off, from 1 to 1,024 requests of 28 heads, N = P = 128.
    """
    return min(power_of_2(size), STATE_ROWS[programs < FEW_HEADS]), 4
