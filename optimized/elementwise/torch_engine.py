"""The mix of the two branches, the torch engine; and its gradient.

Letters: B batch, L tokens, D width. A token of vision has a row of Local-Swin's output, text has none. With s
the product before the sigmoid, f Flex-MA's output and l the token's row of Local-Swin's, on vision

    m = sigmoid(s)    y = m f + (1 - m) l        f̄ = m ȳ    l̄ = (1 - m) ȳ    s̄ = m (1 - m) Σ_D ȳ (f - l)   (1)

and y = f, f̄ = ȳ, s̄ = 0 on text; l̄ = 0 in rows that no token has, whatever l holds there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import without_autocast


@without_autocast
def forward(flex: Tensor, local: Tensor, logit: Tensor, row: Tensor) -> Tensor:
    """Eq. (1), left: flex (B, L, D), local (..., D) of n rows, logit (B, L, 1), row (B, L) int64, -1 on text
    -> (B, L, D).
    """
    mix = torch.sigmoid(logit)
    mixed = mix * flex + (1 - mix) * taken(local, row)
    return torch.where(row[..., None] >= 0, mixed.to(flex.dtype), flex)


@without_autocast
def gradient(
    grad: Tensor, flex: Tensor, local: Tensor, logit: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (1), right: the gradients of flex, local and logit, flex's and logit's in the dtype of `logit`."""
    vision, mix = row[..., None] >= 0, torch.sigmoid(logit)
    wide = grad.to(logit.dtype)
    through = (wide * (flex.to(wide.dtype) - taken(local, row).to(wide.dtype))).sum(-1, keepdim=True)
    local_grad = local.new_zeros(local.flatten(0, -2).shape[0] + 1, local.shape[-1])
    where = row.flatten() % len(local_grad)  # text goes to the last one, which is cut off
    local_grad[where] = ((1 - mix) * wide).to(local.dtype).flatten(0, 1)
    return (
        torch.where(vision, mix * wide, wide),
        local_grad[:-1].view(local.shape),
        torch.where(vision, mix * (1 - mix) * through, 0),
    )


def taken(local: Tensor, row: Tensor) -> Tensor:
    """Each token's row of `local`, (B, L, D); any row on text."""
    return local.flatten(0, -2).index_select(0, row.clamp_min(0).flatten()).view(*row.shape, -1)
