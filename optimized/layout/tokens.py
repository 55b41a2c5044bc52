"""Tokens of a flattened batch: rows of (B·L, ...), gathered by their places."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_order(order: Tensor) -> Tensor:
    """(B, L) -> (B·L,): the same tokens' places in the flattened batch."""
    if len(order) == 1:
        return order[0]
    start = torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]
    return (order + start).flatten()


def gather_tokens(tensor: Tensor, place: Tensor) -> Tensor:
    """tensor (B, L, ...), place (n,) in the flattened batch -> (n, ...)."""
    return tensor.flatten(0, 1).index_select(0, place)
