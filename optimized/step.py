"""One token of decoding: the torch engine of `scan_step`, a few calls on the whole batch and autograd's own
gradient.

Letters: B batch, H query heads, G groups, N state size, P head dim.

    S' = exp(dt A) S + dt B ⊗ x        y = S'ᵀ C + D x                                                    (1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype


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
    dtype, heads = x.dtype, C.shape[1]
    accumulate = accumulation_dtype(dtype)
    state, x, dt, A, B, C = (tensor.to(accumulate) for tensor in (state, x, dt, A, B, C))
    if valid is not None:
        x, B, C = (torch.where(valid[:, None, None], tensor, 0) for tensor in (x, B, C))
        dt = torch.where(valid[:, None], dt, 0)
    x, B = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (x, B))
    decay = torch.exp(dt * A)[..., None, None]
    write = (dt[..., None] * B)[..., None] * x[..., None, :]  # (B, H, N, P)
    state = torch.addcmul(write, decay, state)
    y = (C[..., None, :] @ state).squeeze(-2)  # (B, H, P)
    if D is not None:
        y = y + D.to(accumulate)[:, None] * x
    return y.to(dtype), state
