# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for the output of the scan, and the forward pass made of it: chunks side by side.

Letters and equations as in `chunked_scan`; the kernel is its eq. (3), one program a chunk of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launching
from .scan_decays import Decays, scan_decays
from .scan_states import load_tile, precision, rows_of, sweep_states, tile_size

CHUNKS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}  # tokens whose tiles fit the registers


@triton.jit
def pair_weights(
    forward_row,
    forward_column,
    backward_row,
    backward_column,
    segment_row,
    segment_column,
    gate_forward,
    gate_backward,
    READER_IS_ROW: tl.constexpr,
    HAS_VISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Eq. (2) of `chunked_scan` without dt: (decay, gated decay), rows read and columns write, or the other
    way."""
    place = tl.arange(0, CHUNK)
    if READER_IS_ROW:
        before = place[:, None] >= place[None, :]
        after = place[:, None] <= place[None, :]
        exponent = forward_row[:, None] - forward_column[None, :]
    else:
        before = place[:, None] <= place[None, :]
        after = place[:, None] >= place[None, :]
        exponent = forward_column[None, :] - forward_row[:, None]
    if HAS_VISION:
        if READER_IS_ROW:
            backward = backward_column[None, :] - backward_row[:, None]
        else:
            backward = backward_row[:, None] - backward_column[None, :]
        together = after & (segment_row[:, None] == segment_column[None, :])
        exponent = tl.where(before, exponent, backward)
        decay = tl.exp(tl.minimum(exponent, 0.0))
        if READER_IS_ROW:
            gates = tl.where(before, gate_forward[:, None], 0.0) + tl.where(
                together, gate_backward[:, None], 0.0
            )
        else:
            gates = tl.where(before, gate_forward[None, :], 0.0) + tl.where(
                together, gate_backward[None, :], 0.0
            )
    else:
        together = after
        decay = tl.exp(tl.minimum(exponent, 0.0))
        gates = tl.where(before, 1.0, 0.0)
    return decay, gates, before, together


@triton.jit
def scaled(tokens, weight, STATE):
    """Tokens times a weight each, as a product with states of STATE takes them."""
    return (tokens.to(tl.float32) * weight[:, None]).to(STATE.dtype.element_ty)


@triton.jit
def output_kernel(
    X,
    B,
    C,
    DT,
    FORWARD,
    FORWARD_READ,
    BACKWARD,
    BACKWARD_READ,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_STATE,
    BACKWARD_STATE,
    D,
    Y,
    x_batch,
    x_token,
    x_head,
    b_batch,
    b_token,
    b_head,
    c_batch,
    c_token,
    c_head,
    length,
    chunks,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eq. (3) of `chunked_scan`: `bidirectional_scan` and `backward_scan` of the reference, one chunk of one
    head."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    columns_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch = tl.cast(tl.program_id(2), tl.int64)
    columns_n = tl.arange(0, BLOCK_N)
    place = tl.arange(0, CHUNK)
    rows = tl.cast(chunk, tl.int64) * CHUNK + place
    taken = rows < length
    if HAS_VALID:
        taken = taken & (tl.load(VALID + batch * length + rows, mask=taken, other=0) != 0)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    at = at_chunk * CHUNK + place
    group = tl.cast(head // RATIO, tl.int64)
    q = load_tile(C + batch * c_batch + tl.cast(head, tl.int64) * c_head, rows, c_token, columns_n, taken, N)
    k = load_tile(B + batch * b_batch + group * b_head, rows, b_token, columns_n, taken, N)
    v = load_tile(X + batch * x_batch + group * x_head, rows, x_token, columns_p, taken, P)
    forward = tl.load(FORWARD + at)
    gate_forward = tl.full([CHUNK], 1.0, tl.float32)
    gate_backward = gate_forward
    backward = forward
    segment = place
    if HAS_VISION:
        gate_forward = tl.load(FORWARD_GATE + at)
        gate_backward = tl.load(BACKWARD_GATE + at)
        backward = tl.load(BACKWARD + at)
        segment = tl.load(SEGMENT + (batch * chunks + chunk) * CHUNK + place)
    decay, gates, _, _ = pair_weights(
        forward,
        forward,
        backward,
        backward,
        segment,
        segment,
        gate_forward,
        gate_backward,
        True,
        HAS_VISION,
        CHUNK,
    )
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay * gates * tl.load(DT + at)[None, :]
    y = tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
    tile = at_chunk * (N * P) + columns_n[:, None] * P + columns_p[None, :]
    inside = (columns_n < N)[:, None] & (columns_p < P)[None, :]
    state = tl.load(FORWARD_STATE + tile, mask=inside, other=0.0)
    read = scaled(q, tl.load(FORWARD_READ + at) * gate_forward, FORWARD_STATE)
    y = tl.dot(read, state, y, input_precision=PRECISION)
    if HAS_VISION:
        state = tl.load(BACKWARD_STATE + tile, mask=inside, other=0.0)
        read = scaled(q, tl.load(BACKWARD_READ + at) * gate_backward, BACKWARD_STATE)
        y = tl.dot(read, state, y, input_precision=PRECISION)
    if HAS_SKIP:
        y += v.to(tl.float32) * tl.load(D + head).to(tl.float32)
    out = Y + ((batch * length + rows) * HEADS + head)[:, None] * P + columns_p[None, :]
    tl.store(out, y.to(Y.dtype.element_ty), mask=(rows < length)[:, None] & (columns_p < P)[None, :])


@launching
def forward(
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
) -> tuple[Tensor, Tensor]:
    """`chunked_scan.forward` on Triton kernels: y (B, L, H, P) and the final forward state (B, H, N, P)."""
    B, C = B.to(x.dtype), C.to(x.dtype)
    decays = scan_decays(dt, A, gate, segment, valid, CHUNKS[x.dtype], torch.float32, torch.float32)
    forward_state, final_state, _ = sweep_states(
        B, x, decays.forward_write(), decays.forward_kept(), valid, initial_state
    )
    backward_state = None
    if decays.segment is not None:
        write, kept = decays.backward_write(), decays.backward_kept()
        backward_state, _, _ = sweep_states(B, x, write, kept, valid, None, reverse=True)
    return read_out(x, B, C, decays, valid, D, forward_state, backward_state), final_state


def read_out(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    decays: Decays,
    valid: Tensor | None,
    D: Tensor | None,
    forward_state: Tensor,
    backward_state: Tensor | None,
) -> Tensor:
    """Run `output_kernel`: y (B, L, H, P) in the dtype of `x`."""
    batch, length, groups, head_dim = x.shape
    heads, state = C.shape[2:]
    chunks, chunk = decays.dt.shape[1], decays.dt.shape[3]
    y = x.new_empty(batch, length, heads, head_dim)
    x, B, C = rows_of(x), rows_of(B), rows_of(C)
    block = tile_size(head_dim)
    output_kernel[(heads * chunks, triton.cdiv(head_dim, block), batch)](
        x,
        B,
        C,
        **scalar_arguments(decays, valid),
        FORWARD_STATE=forward_state,
        BACKWARD_STATE=backward_state,
        D=D,
        Y=y,
        **stride_arguments(x=x, b=B, c=C),
        length=length,
        chunks=chunks,
        HEADS=heads,
        RATIO=heads // groups,
        N=state,
        P=head_dim,
        BLOCK_N=tile_size(state),
        BLOCK_P=block,
        CHUNK=chunk,
        HAS_SKIP=D is not None,
        PRECISION=precision(x.dtype),
        num_warps=8 if block == 128 else 4,
        num_stages=1,
    )
    return y


def scalar_arguments(decays: Decays, valid: Tensor | None) -> dict[str, Any]:
    """The scalars of one scan under the names that the kernels of both passes give them."""
    has_vision = decays.segment is not None
    return {
        "DT": decays.dt,
        "FORWARD": decays.forward_sum,
        "FORWARD_READ": decays.forward_read(),
        "BACKWARD": decays.backward_sum,
        "BACKWARD_READ": decays.backward_read() if has_vision else None,
        "FORWARD_GATE": decays.forward_gate,
        "BACKWARD_GATE": decays.backward_gate,
        "SEGMENT": decays.segment,
        "VALID": None if valid is None else valid.contiguous().view(torch.uint8),
        "HAS_VALID": valid is not None,
        "HAS_VISION": has_vision,
    }


def stride_arguments(**tensors: Tensor) -> dict[str, int]:
    """The strides of (B, L, heads, ·) tensors, as `x_batch`, `x_token`, `x_head` for x."""
    axes = ("batch", "token", "head")
    return {
        f"{name}_{axis}": tensor.stride(i) for name, tensor in tensors.items() for i, axis in enumerate(axes)
    }
