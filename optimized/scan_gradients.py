"""The gradient of the scan on Triton kernels: states both ways, then readers and writers, chunks side by
side.

Letters and equations as in `chunked_scan_backward`; its scalars are put together here, by the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import launching
from .scan_decays import Decays, join_tokens, reverse_cumsum, scan_decays
from .scan_masks import vision_mask
from .scan_readers import read_gradients
from .scan_states import sweep_states
from .scan_tiles import chunk_size, rows_of, token_dtype
from .scan_writers import write_gradients


@dataclass(frozen=True)
class Passed:
    """One direction's states at the edges of the chunks, and what passed through them."""

    entering: Tensor  # (B, K, H, N, P), what a chunk's tokens read
    leaving_grad: Tensor  # (B, K, H, N, P), the gradient of what the chunk hands on
    handed_on: Tensor  # (B, K, H): <S, S̄> of the state that passes the chunk, with its decay


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
    decays = scan_decays(dt, A, gate, segment, valid, chunk_size(kind), torch.float32, torch.float32)
    tokens = tuple(rows_of(tensor.to(kind)) for tensor in (x, B, C, y_grad))
    has_vision = decays.segment is not None
    front, initial_grad = forward_passed(*tokens, decays, valid, initial_state, final_grad)
    back = backward_passed(*tokens, decays, valid) if has_vision else None
    back_state, back_grad = (back.entering, back.leaving_grad) if has_vision else (None, None)
    pairs = read_gradients(*tokens, decays, valid, front.entering, back_state)
    x_grad, b_grad, *written = write_gradients(*tokens, decays, valid, D, front.leaving_grad, back_grad)
    rate = rate_gradient(decays, pairs, written, front, back)
    dt_grad = pairs["DT_GRAD"] + written[0] * decays.forward_reach() + rate * decays.A[:, None]
    gate_grad = pairs["GATE_GRAD"]
    if has_vision:
        dt_grad += written[1] * decays.backward_reach()
        gate_grad += pairs["FORWARD_PULLED"] - pairs["BACKWARD_PULLED"]

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
    kept, write = decays.forward_kept(), decays.forward_write()
    entering, _, _ = sweep_states(B, x, write, kept, valid, initial_state)
    read = decays.forward_read() * decays.forward_gate
    leaving_grad, initial_grad, product = sweep_states(
        C, y_grad, read, kept, valid, final_grad, reverse=True, partner=entering
    )
    return Passed(entering, leaving_grad, product * kept), initial_grad


def backward_passed(x, B, C, y_grad, decays: Decays, valid) -> Passed:
    """The backward direction."""
    kept, write = decays.backward_kept(), decays.backward_write()
    entering, _, _ = sweep_states(B, x, write, kept, valid, None, reverse=True)
    read = decays.backward_read() * decays.backward_gate
    leaving_grad, _, product = sweep_states(C, y_grad, read, kept, valid, None, partner=entering)
    return Passed(entering, leaving_grad, product * kept)


def rate_gradient(
    decays: Decays, pairs: dict[str, Tensor], written: list[Tensor | None], front: Passed, back: Passed | None
) -> Tensor:
    """The gradient of a = dt A, (B, K, H, C): every product of a write and a read that spans the token."""
    wrote = written[0] * decays.forward_write()
    rate = reverse_cumsum(pairs["FORWARD_PULLED"] * decays.forward_gate + pairs["FORWARD_PAIRS"])
    rate += wrote.cumsum(-1) - wrote + front.handed_on[..., None]
    if back is None:
        return rate
    wrote = written[1] * decays.backward_write()
    other = (pairs["BACKWARD_PULLED"] * decays.backward_gate + pairs["BACKWARD_PAIRS"]).cumsum(-1)
    other += reverse_cumsum(wrote) - wrote + back.handed_on[..., None]
    return rate + other * (decays.segment >= 0)
