"""What a rank runs on its own tokens: operators of any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...causal_conv import causal_conv
from ...numerics import (
    full_precision_linear,
)
from ...projections import apply_rope
from ...scan import bidirectional_scan
from ...sliding_window_attention import sliding_window_attention
from ...window_attention import window_attention


def narrow_products(u: Tensor, linears: list[nn.Linear]) -> list[Tensor]:
    """`full_precision_linear` of u (B, n, D) by each."""
    return [full_precision_linear(u, linear) for linear in linears]


def mix_branches(y: Tensor, local: Tensor, logit: Tensor, mixes: Tensor | None) -> Tensor:
    """The branches (B, n, D) mixed by sigmoid(logit), (B, n, 1), where `mixes` (B, n), else y; None = all."""
    mix = torch.sigmoid(logit)
    mixed = (mix * y + (1 - mix) * local).to(y.dtype)
    return mixed if mixes is None else torch.where(mixes[..., None], mixed, y)


@dataclass(frozen=True)
class Operators:
    """The operators each rank runs on its own tokens: the reference's, or those of another backend.

    `m_mate` is another backend's `m_mate` for calls without gradients and packed rows; None = there is none.
    """

    causal_conv: Callable = causal_conv
    bidirectional_scan: Callable = bidirectional_scan
    sliding_window_attention: Callable = sliding_window_attention
    window_attention: Callable = window_attention
    apply_rope: Callable = apply_rope
    narrow_products: Callable = narrow_products
    mix_branches: Callable = mix_branches
    m_mate: Callable | None = None
