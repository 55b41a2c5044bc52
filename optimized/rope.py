"""RoPE, the torch engine, and its gradient; letters and equation as in `rope_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import accumulation_dtype, without_autocast


@without_autocast
def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x (B, L, heads, N), cos and sin (B or 1, L, N) -> as x; `backward` takes a gradient back."""
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = (angle.to(wide.dtype)[:, :, None] for angle in (cos, sin))
    turned = wide * sin if backward else wide
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([second, -first] if backward else [-second, first], dim=-1)
    return (wide * cos + (rotated if backward else rotated * sin)).to(x.dtype)
