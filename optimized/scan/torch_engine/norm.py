"""What Flex-MA does with its scan: each head normed, tokens back in their order; the torch engine of both.

Letters: B batch, L tokens, H heads, P head dim. With y the scan's output in scan order, ŷ the normed one, and
z = w ŷ in token order:

    ŷ = σ y,  σ = (mean(y²) + ε)^-½        ȳ = σ (w z̄ - ŷ mean(ŷ w z̄))        w̄ = Σ ŷ z̄                  (1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....reference.numerics import rms_norm_per_head
from ...layout.sorts import flat_order
from ...precision import accumulation_dtype, without_autocast
from . import forward as chunked_scan


@without_autocast
def forward_heads(
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
    order: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked_scan.forward`, then eq. (1).

    Args:
        x, dt, A, B, C, gate, segment, valid, D, initial_state: as there, in scan order.
        order: (B, L), the token at each place of the scan; None = they stand in their order.
        norm_weight: (H·P,); None = no norm.
        eps: ε.
        keep: whether a gradient will be asked for.
    Returns:
        z (B, L, H, P) in token order and the final state (B, H, N, P); for the gradient y (B, L, H, P) in
        `kept_dtype` and scan order, empty unless there is a norm and it is to be kept.
    """
    y, final_state = chunked_scan.forward(x, dt, A, B, C, gate, segment, valid, D, initial_state)
    kept, z = y.new_empty(0, dtype=kept_dtype(y.dtype)), y
    if norm_weight is not None:
        z = rms_norm_per_head(y, norm_weight, eps)
        kept = y.to(kept.dtype) if keep else kept
    if order is not None:
        z = torch.empty_like(z).flatten(0, 1).index_copy_(0, flat_order(order), z.flatten(0, 1)).view(z.shape)
    return z, final_state, kept


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What y and its gradient are handed on in: a norm leaves them all but orthogonal, and float16, whose
    scan runs in float32 on a GPU, would round their product away.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@without_autocast
def norm_gradient(
    z_grad: Tensor, y: Tensor, norm_weight: Tensor, order: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Eq. (1), right: the gradients of y (B, L, H, P), in its dtype and scan order, and of w (H·P,).

    σ is that of y as it was kept: with the one from before its rounding, ŷ would not have the length that
    takes off all that w z̄ has along y, and beside that what is left may be small.
    """
    wide = y.to(accumulation_dtype(y.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    z_grad, normed = in_scan_order(z_grad, order).to(wide.dtype), wide * scale
    weighed = z_grad * norm_weight.to(wide.dtype).view(y.shape[2:])
    y_grad = scale * (weighed - normed * (normed * weighed).mean(-1, keepdim=True))
    return y_grad.to(y.dtype), (normed * z_grad).sum((0, 1)).flatten()


def in_scan_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """(B, L, ·, ·) in token order -> in scan order."""
    if order is None:
        return tensor
    return tensor.reshape(-1, *tensor.shape[2:]).index_select(0, flat_order(order)).view(tensor.shape)
