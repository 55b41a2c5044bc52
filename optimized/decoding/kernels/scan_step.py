# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for one token of decoding: every element of the state is read once and written once.

Letters and equation as in `torch_engine`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...engine.launch import as_bytes, ceil_div, contiguous, power_of_2, rows_of
from ..operator import StepInputs, StepOutputs, step_outputs

BLOCK_P = 32


@triton.jit
def step_kernel(
    STATE, X, DT, A, B, C, D, VALID, NEW_STATE, Y, x_batch, x_head, b_batch, b_head, c_batch, c_head,
    HEADS: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Eq. (1) for a block of P of one head: `advance` of the reference."""
    head = tl.program_id(0) % HEADS
    batch = tl.cast(tl.program_id(0) // HEADS, tl.int64)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = batch * HEADS + head
    group = tl.cast(head // RATIO, tl.int64)
    x = tl.load(X + batch * x_batch + group * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(B + batch * b_batch + group * b_head + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C + batch * c_batch + tl.cast(head, tl.int64) * c_head + n, mask=n < N, other=0.0).to(
        tl.float32
    )
    dt = tl.load(DT + at).to(tl.float32)
    if HAS_VALID:  # a row at rest may hold anything
        valid = tl.load(VALID + batch) != 0
        x = tl.where(valid, x, 0.0)
        b = tl.where(valid, b, 0.0)
        c = tl.where(valid, c, 0.0)
        dt = tl.where(valid, dt, 0.0)
    decay = tl.exp(dt * tl.load(A + head).to(tl.float32))
    tile = at * (N * P) + n[:, None] * P + p[None, :]
    inside = (n < N)[:, None] & (p < P)[None, :]
    state = tl.load(STATE + tile, mask=inside, other=0.0)
    state = decay * state + (dt * b)[:, None] * x[None, :]
    tl.store(NEW_STATE + tile, state, mask=inside)
    y = tl.sum(state * c[:, None], 0)
    if HAS_SKIP:
        y += tl.load(D + head).to(tl.float32) * x
    tl.store(Y + at * P + p, y.to(Y.dtype.element_ty), mask=p < P)


def scan_step(inputs: StepInputs) -> StepOutputs:
    """The operator on a Triton kernel."""
    batch, heads, size, head_dim = inputs.state.shape
    state, x, B, C = inputs.state.float().contiguous(), *map(rows_of, (inputs.x, inputs.B, inputs.C))
    outputs = y, new_state = step_outputs(inputs)
    block = min(power_of_2(head_dim), BLOCK_P)
    step_kernel[(batch * heads, ceil_div(head_dim, block))](
        state,
        x,
        inputs.dt.contiguous(),
        inputs.A.contiguous(),
        B,
        C,
        contiguous(inputs.D),
        as_bytes(inputs.valid),
        new_state,
        y,
        *x.stride()[:2],
        *B.stride()[:2],
        *C.stride()[:2],
        HEADS=heads,
        RATIO=heads // x.shape[1],
        N=size,
        P=head_dim,
        BLOCK_N=power_of_2(size),
        BLOCK_P=block,
        HAS_SKIP=inputs.D is not None,
        HAS_VALID=inputs.valid is not None,
        num_warps=4,
    )
    return outputs
