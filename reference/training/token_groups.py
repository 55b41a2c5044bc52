"""The groups of tokens that losses are means over, and the positions whose logits are taught.

Letters: B batch, L tokens, n positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import require
from ..prompts.chat_collator import IGNORED


def token_masks(attention_mask: Tensor, vision: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Masks (B, L) bool of vision, text and answering tokens; padding is in none.

    Args:
        attention_mask: (B, L), 0 = padding.
        vision: (B, L) bool.
        labels: (B, L) int64; None = nothing is supervised.
    """
    valid = attention_mask.bool()
    answering = torch.zeros_like(valid)
    if labels is not None:
        answering[:, :-1] = is_answered(labels)
    return {"vision": valid & vision, "text": valid & ~vision, "answering": valid & answering}


def is_answered(labels: Tensor) -> Tensor:
    """Whether the next token is supervised: (B, L) int64 -> (B, L-1) bool."""
    return labels[:, 1:] != IGNORED


def supervised(labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions whose next token is supervised in some row: (n,) int64, and (B, n) bool, which rows count
    there."""
    require(labels is not None, "Lesson", "labels must be given where logits are taught", None)
    mask = is_answered(labels)
    positions = mask.any(0).nonzero().squeeze(-1)
    return positions, mask[:, positions]
