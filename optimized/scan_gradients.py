# ruff: noqa: N803  Triton's habit: pointers and compile-time constants in capitals
"""The gradient of the scan on Triton kernels: states both ways, then readers and writers, chunks side by
side.

Letters and equations as in `chunked_scan_backward`; its scalars are put together here, by the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launching
from .scan_decays import Decays, join_tokens, reverse_cumsum, scan_decays
from .scan_masks import vision_mask
from .scan_output import CHUNKS, stride_arguments
from .scan_readers import read_gradients
from .scan_states import load_tile, precision, rows_of, sweep_states, tile_size
from .scan_writers import write_gradients


@triton.jit
def probe_kernel(
    LEFT,
    STATE,
    RIGHT,
    VALID,
    OUT,
    left_batch,
    left_token,
    left_head,
    right_batch,
    right_token,
    right_head,
    length,
    chunks,
    HEADS: tl.constexpr,
    LEFT_RATIO: tl.constexpr,
    RIGHT_RATIO: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left_iᵀ S right_i for the tokens of a chunk: the sums of `read_side` and `write_side` of the torch
    engine."""
    head = tl.program_id(0) % HEADS
    chunk = tl.program_id(0) // HEADS
    batch = tl.cast(tl.program_id(1), tl.int64)
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    place = tl.arange(0, CHUNK)
    rows = tl.cast(chunk, tl.int64) * CHUNK + place
    taken = rows < length
    if HAS_VALID:
        taken = taken & (tl.load(VALID + batch * length + rows, mask=taken, other=0) != 0)
    at_chunk = (batch * chunks + chunk) * HEADS + head
    base = LEFT + batch * left_batch + tl.cast(head // LEFT_RATIO, tl.int64) * left_head
    left = load_tile(base, rows, left_token, columns_n, taken, N)
    base = RIGHT + batch * right_batch + tl.cast(head // RIGHT_RATIO, tl.int64) * right_head
    right = load_tile(base, rows, right_token, columns_p, taken, P)
    tile = at_chunk * (N * P) + columns_n[:, None] * P + columns_p[None, :]
    inside = (columns_n < N)[:, None] & (columns_p < P)[None, :]
    state = tl.load(STATE + tile, mask=inside, other=0.0)
    pulled = tl.dot(left.to(state.dtype), state, input_precision=PRECISION)
    tl.store(OUT + at_chunk * CHUNK + place, tl.sum(pulled * right.to(tl.float32), 1))


def probe(left: Tensor, state: Tensor, right: Tensor, valid: Tensor | None, chunk: int) -> Tensor:
    """Run `probe_kernel`: (B, L, ·, N), (B, K, H, N, P), (B, L, ·, P) -> (B, K, H, C) float32."""
    batch, chunks, heads, size, head_dim = state.shape
    out = state.new_empty(batch, chunks, heads, chunk, dtype=torch.float32)
    probe_kernel[(heads * chunks, batch)](
        left,
        state,
        right,
        None if valid is None else valid.contiguous().view(torch.uint8),
        out,
        **stride_arguments(left=left, right=right),
        length=left.shape[1],
        chunks=chunks,
        HEADS=heads,
        LEFT_RATIO=heads // left.shape[2],
        RIGHT_RATIO=heads // right.shape[2],
        N=size,
        P=head_dim,
        BLOCK_N=tile_size(size),
        BLOCK_P=tile_size(head_dim),
        CHUNK=chunk,
        HAS_VALID=valid is not None,
        PRECISION=precision(left.dtype),
        num_warps=8 if max(size, head_dim) > 64 else 4,
        num_stages=1,
    )
    return out


@dataclass(frozen=True)
class Passed:
    """One direction: states at the edges of the chunks, and (B, K, H, C) scalars of what passed through
    them."""

    entering: Tensor  # (B, K, H, N, P), what a chunk's tokens read
    leaving_grad: Tensor  # (B, K, H, N, P), the gradient of what the chunk hands on
    handed_on: Tensor  # (B, K, H): <S, S̄> of the state that passes the chunk, with its decay
    read: Tensor  # ȳ_i · read_i Sᵀ C_i, the gate left out
    written: Tensor  # B_jᵀ S̄ x_j, the write weight left out


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
    decays = scan_decays(dt, A, gate, segment, valid, CHUNKS[x.dtype], torch.float32, torch.float32)
    tokens = tuple(rows_of(tensor.to(x.dtype)) for tensor in (x, B, C, y_grad))
    has_vision = decays.segment is not None
    front, initial_grad = forward_passed(*tokens, decays, valid, initial_state, final_grad)
    back = backward_passed(*tokens, decays, valid) if has_vision else None
    back_state, back_grad = (back.entering, back.leaving_grad) if has_vision else (None, None)
    pairs = read_gradients(*tokens, decays, valid, front.entering, back_state)
    x_grad, b_grad = write_gradients(*tokens, decays, valid, D, front.leaving_grad, back_grad)
    rate = rate_gradient(decays, pairs, front, back)
    dt_grad = pairs["DT_GRAD"] + front.written * decays.forward_reach() + rate * decays.A[:, None]
    gate_grad = pairs["GATE_GRAD"]
    if has_vision:
        dt_grad += back.written * decays.backward_reach()
        gate_grad += front.read - back.read

    def scalars(grad: Tensor, mask: Tensor | None) -> Tensor:
        grad = join_tokens(grad.transpose(2, 3), x.shape[1])
        return grad if mask is None else torch.where(mask[..., None], grad, 0)

    return (
        x_grad,
        scalars(dt_grad, valid),
        (rate * decays.dt).sum((0, 1, 3)),
        b_grad,
        pairs["C_GRAD"],
        scalars(gate_grad, vision_mask(segment, valid)) if has_vision else None,
        None if D is None else skip_gradient(tokens[0], tokens[3], valid),
        None if initial_state is None else initial_grad,
    )


def skip_gradient(x: Tensor, y_grad: Tensor, valid: Tensor | None) -> Tensor:
    """The gradient of D, (H,) float32, one member of each group after the other."""
    members = y_grad.unflatten(2, (x.shape[2], -1)).unbind(3)  # H/G times (B, L, G, P)
    products = torch.stack(
        [(member.float() * x.float()).sum(-1) for member in members], dim=-1
    )  # (B, L, G, H/G)
    if valid is not None:
        products = torch.where(valid[:, :, None, None], products, 0)
    return products.sum((0, 1)).flatten()


def forward_passed(
    x, B, C, y_grad, decays: Decays, valid, initial_state, final_grad
) -> tuple[Passed, Tensor]:
    """The forward direction, and the gradient of the initial state."""
    kept, chunk = decays.forward_kept(), decays.dt.shape[3]
    write = decays.forward_write()
    entering, _, _ = sweep_states(B, x, write, kept, valid, initial_state, exact=True)
    read = decays.forward_read() * decays.forward_gate
    leaving_grad, initial_grad, product = sweep_states(
        C, y_grad, read, kept, valid, final_grad, reverse=True, partner=entering, exact=True
    )
    read = probe(C, entering, y_grad, valid, chunk) * decays.forward_read()
    written = probe(B, leaving_grad, x, valid, chunk)
    return Passed(entering, leaving_grad, product * kept, read, written), initial_grad


def backward_passed(x, B, C, y_grad, decays: Decays, valid) -> Passed:
    """The backward direction."""
    kept, chunk = decays.backward_kept(), decays.dt.shape[3]
    write = decays.backward_write()
    entering, _, _ = sweep_states(B, x, write, kept, valid, None, reverse=True, exact=True)
    read = decays.backward_read() * decays.backward_gate
    leaving_grad, _, product = sweep_states(C, y_grad, read, kept, valid, None, partner=entering, exact=True)
    read = probe(C, entering, y_grad, valid, chunk) * decays.backward_read()
    written = probe(B, leaving_grad, x, valid, chunk)
    return Passed(entering, leaving_grad, product * kept, read, written)


def rate_gradient(decays: Decays, pairs: dict[str, Tensor], front: Passed, back: Passed | None) -> Tensor:
    """The gradient of a = dt A, (B, K, H, C): every product of a write and a read that spans the token."""
    wrote = front.written * decays.forward_write()
    rate = reverse_cumsum(front.read * decays.forward_gate + pairs["FORWARD_PAIRS"])
    rate += wrote.cumsum(-1) - wrote + front.handed_on[..., None]
    if back is None:
        return rate
    wrote = back.written * decays.backward_write()
    other = (back.read * decays.backward_gate + pairs["BACKWARD_PAIRS"]).cumsum(-1)
    other += reverse_cumsum(wrote) - wrote + back.handed_on[..., None]
    return rate + other * (decays.segment >= 0)
