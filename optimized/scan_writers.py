# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""Triton kernel for what the writers of the scan owe: the gradients of x and of B.

Letters and equations as in `chunked_scan_backward`. A program loops over the heads that share a group, so
nothing is added atomically, and forms (C Bᵀ)ᵀ = B Cᵀ as a product of its own instead of transposing a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan_decays import Decays
from .scan_output import pair_weights, scalar_arguments, stride_arguments
from .scan_states import load_tile, precision, tile_size


@triton.jit
def writer_kernel(
    OWN,
    CROSS,
    VALUE,
    DT,
    FORWARD,
    FORWARD_WRITE,
    BACKWARD,
    BACKWARD_WRITE,
    FORWARD_GATE,
    BACKWARD_GATE,
    SEGMENT,
    VALID,
    FORWARD_STATE,
    BACKWARD_STATE,
    GRAD,
    own_batch,
    own_token,
    own_head,
    cross_batch,
    cross_token,
    cross_head,
    value_batch,
    value_token,
    value_head,
    length,
    chunks,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VISION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One gradient of a group's writers, head by head: `inside_chunk` and `write_side` of the torch engine.

    With own, cross, value = B, C, ȳ it is that of x; with x, ȳ, C that of B.
    """
    groups = HEADS // RATIO
    group = tl.program_id(0) % groups
    chunk = tl.program_id(0) // groups
    batch = tl.cast(tl.program_id(1), tl.int64)
    inner = tl.arange(0, BLOCK_INNER)
    outer = tl.arange(0, BLOCK_OUTER)
    place = tl.arange(0, CHUNK)
    rows = tl.cast(chunk, tl.int64) * CHUNK + place
    taken = rows < length
    if HAS_VALID:
        taken = taken & (tl.load(VALID + batch * length + rows, mask=taken, other=0) != 0)
    wide_group = tl.cast(group, tl.int64)
    own = load_tile(OWN + batch * own_batch + wide_group * own_head, rows, own_token, inner, taken, INNER)
    inside = (inner < INNER)[:, None] & (outer < OUTER)[None, :]
    grad = tl.zeros([CHUNK, BLOCK_OUTER], tl.float32)
    for member in range(RATIO):
        head = group * RATIO + member
        at_chunk = (batch * chunks + chunk) * HEADS + head
        at = at_chunk * CHUNK + place
        wide_head = tl.cast(head, tl.int64)
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
            False,
            HAS_VISION,
            CHUNK,
        )
        cross = load_tile(
            CROSS + batch * cross_batch + wide_head * cross_head, rows, cross_token, inner, taken, INNER
        )
        value = load_tile(
            VALUE + batch * value_batch + wide_head * value_head, rows, value_token, outer, taken, OUTER
        )
        weights = (
            tl.dot(own, tl.trans(cross), input_precision=PRECISION)
            * decay
            * gates
            * tl.load(DT + at)[:, None]
        )
        grad = tl.dot(weights.to(value.dtype), value, grad, input_precision=PRECISION)
        tile = inner[:, None] * INNER_STRIDE + outer[None, :] * OUTER_STRIDE
        state = tl.load(FORWARD_STATE + at_chunk * (INNER * OUTER) + tile, mask=inside, other=0.0)
        pulled = tl.dot(own.to(state.dtype), state, input_precision=PRECISION)
        grad += pulled * tl.load(FORWARD_WRITE + at)[:, None]
        if HAS_VISION:
            state = tl.load(BACKWARD_STATE + at_chunk * (INNER * OUTER) + tile, mask=inside, other=0.0)
            pulled = tl.dot(own.to(state.dtype), state, input_precision=PRECISION)
            grad += pulled * tl.load(BACKWARD_WRITE + at)[:, None]
    out = GRAD + ((batch * length + rows) * groups + group)[:, None] * OUTER + outer[None, :]
    where = (rows < length)[:, None] & (outer < OUTER)[None, :]
    tl.store(out, grad.to(GRAD.dtype.element_ty), mask=where)


def write_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    y_grad: Tensor,
    decays: Decays,
    valid: Tensor | None,
    D: Tensor | None,
    forward_grad: Tensor,
    backward_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `writer_kernel` twice: the gradients of x (B, L, G, P) and of B (B, L, G, N)."""
    scalars = scalar_arguments(decays, valid)
    del scalars["FORWARD_READ"], scalars["BACKWARD_READ"]
    scalars["FORWARD_WRITE"] = decays.forward_write()
    scalars["BACKWARD_WRITE"] = None if decays.segment is None else decays.backward_write()
    scalars |= {"FORWARD_STATE": forward_grad, "BACKWARD_STATE": backward_grad}
    head_dim = x.shape[3]
    x_strides = {"INNER_STRIDE": head_dim, "OUTER_STRIDE": 1}
    b_strides = {"INNER_STRIDE": 1, "OUTER_STRIDE": head_dim}
    x_grad = write_one(B, C, y_grad, decays, scalars | x_strides)
    if D is not None:
        x_grad = with_skip(x_grad, y_grad, valid, D)
    return x_grad, write_one(x, y_grad, C, decays, scalars | b_strides)


def with_skip(x_grad: Tensor, y_grad: Tensor, valid: Tensor | None, D: Tensor) -> Tensor:
    """Add what D x owes x; in torch, where it takes none of the kernel's registers."""
    groups = x_grad.shape[2]
    by_member = y_grad.unflatten(2, (groups, -1)).unbind(3)  # H/G times (B, L, G, P)
    total = x_grad.float()
    for member, weight in zip(by_member, D.float().view(groups, -1).unbind(1), strict=True):
        total.addcmul_(member, weight[:, None])
    if valid is not None:
        total = torch.where(valid[:, :, None, None], total, 0)
    return total.to(x_grad.dtype)


def write_one(own: Tensor, cross: Tensor, value: Tensor, decays: Decays, arguments: dict) -> Tensor:
    """Launch `writer_kernel`: (B, L, G, inner), (B, L, H, inner), (B, L, H, outer) -> (B, L, G, outer)."""
    batch, chunks, heads, chunk = decays.dt.shape
    length, groups, inner = own.shape[1:]
    outer = value.shape[3]
    grad = own.new_empty(batch, length, groups, outer)
    writer_kernel[(groups * chunks, batch)](
        own,
        cross,
        value,
        GRAD=grad,
        **arguments,
        **stride_arguments(own=own, cross=cross, value=value),
        length=length,
        chunks=chunks,
        HEADS=heads,
        RATIO=heads // groups,
        INNER=inner,
        OUTER=outer,
        BLOCK_INNER=tile_size(inner),
        BLOCK_OUTER=tile_size(outer),
        CHUNK=chunk,
        PRECISION=precision(own.dtype),
        num_warps=8,
        num_stages=1,
    )
    return grad
