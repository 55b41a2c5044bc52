"""The mix of the two branches, the torch engine; and its gradient.

Letters: B batch, L tokens, D width. With s the product before the sigmoid, f Flex-MA's output and l
Local-Swin's, on vision

    m = sigmoid(s)    y = m f + (1 - m) l        f̄ = m ȳ    l̄ = (1 - m) ȳ    s̄ = m (1 - m) Σ_D ȳ (f - l)   (1)

and y = f, f̄ = ȳ, l̄ = s̄ = 0 elsewhere, whatever l holds there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import without_autocast


@without_autocast
def forward(flex: Tensor, local: Tensor, logit: Tensor, is_vision: Tensor) -> Tensor:
    """Eq. (1), left: flex and local (B, L, D), logit (B, L, 1), is_vision (B, L) -> (B, L, D)."""
    mix = torch.sigmoid(logit)
    mixed = mix * flex + (1 - mix) * local
    return torch.where(is_vision[..., None], mixed.to(flex.dtype), flex)


@without_autocast
def gradient(
    grad: Tensor, flex: Tensor, local: Tensor, logit: Tensor, is_vision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (1), right: the gradients of flex, local and logit in the dtype of `logit`."""
    vision, mix = is_vision[..., None], torch.sigmoid(logit)
    wide = grad.to(logit.dtype)
    through = (wide * (flex.to(wide.dtype) - local.to(wide.dtype))).sum(-1, keepdim=True)
    return (
        torch.where(vision, mix * wide, wide),
        torch.where(vision, (1 - mix) * wide, 0),
        torch.where(vision, mix * (1 - mix) * through, 0),
    )
