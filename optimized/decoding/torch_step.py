"""One token of decoding: the torch engine of `scan_step`, and its gradient for both engines.

Letters: B batch, H query heads, G groups, N state size, P head dim; ȳ is the gradient of y, and so on.

    S' = e^{dt A} S + dt B ⊗ x        y = S'ᵀ C + D x                                                    (1)
    Ḡ = S̄' + C ⊗ ȳ        S̄ = e^{dt A} Ḡ        C̄ = S' ȳ        B̄ = dt Ḡ x     x̄ = dt Ḡᵀ B + D ȳ      (2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulation_dtype, without_autocast


@without_autocast
def advance(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Eq. (1): y (B, H, P) in the dtype of `x`, and the new state (B, H, N, P)."""
    dtype = x.dtype
    state, x, dt, A, B, C = prepare(state, x, dt, A, B, C, valid)
    new_state = following_state(state, x, dt, A, B)
    y = (C[..., None, :] @ new_state).squeeze(-2)  # (B, H, P)
    if D is not None:
        y = y + D.to(x.dtype)[:, None] * x
    return y.to(dtype), new_state


@without_autocast
def gradient(
    y_grad: Tensor,
    new_state_grad: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Eq. (2): gradients of state, x, dt, A, B, C, D in the accumulation dtype."""
    groups = x.shape[1]
    state, x, dt, A, B, C = prepare(state, x, dt, A, B, C, valid)
    y_grad = y_grad.to(x.dtype)
    if valid is not None:
        y_grad = torch.where(valid[:, None, None], y_grad, 0)
    decay = torch.exp(dt * A)
    through = torch.addcmul(new_state_grad.to(x.dtype), C[..., None], y_grad[..., None, :])
    rate_grad = decay * (through * state).sum((-2, -1))  # of dt A, (B, H)
    written = (through @ x[..., None]).squeeze(-1)  # (B, H, N)
    x_grad = dt[..., None] * (B[..., None, :] @ through).squeeze(-2)
    if D is not None:
        x_grad = x_grad + D.to(x.dtype)[:, None] * y_grad
    dt_grad = (written * B).sum(-1) + rate_grad * A
    if valid is not None:
        dt_grad = torch.where(valid[:, None], dt_grad, 0)
    return (
        decay[..., None, None] * through,
        x_grad.unflatten(1, (groups, -1)).sum(2),
        dt_grad,
        (rate_grad * dt).sum(0),
        (dt[..., None] * written).unflatten(1, (groups, -1)).sum(2),
        (following_state(state, x, dt, A, B) @ y_grad[..., None]).squeeze(-1),
        None if D is None else (y_grad * x).sum((0, 2)),
    )


def prepare(state, x, dt, A, B, C, valid: Tensor | None) -> list[Tensor]:
    """In the accumulation dtype, groups repeated, rows that are not valid at rest."""
    accumulate, heads = accumulation_dtype(x.dtype), C.shape[1]
    state, x, dt, A, B, C = (tensor.to(accumulate) for tensor in (state, x, dt, A, B, C))
    if valid is not None:
        x, B, C = (torch.where(valid[:, None, None], tensor, 0) for tensor in (x, B, C))
        dt = torch.where(valid[:, None], dt, 0)
    x, B = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (x, B))
    return [state, x, dt, A, B, C]


def following_state(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """S' of eq. (1), (B, H, N, P)."""
    write = (dt[..., None] * B)[..., None] * x[..., None, :]
    return torch.addcmul(write, torch.exp(dt * A)[..., None, None], state)
