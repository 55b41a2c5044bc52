"""RoPE, the torch engine, and its gradient; letters and equation as in `rope_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulation_dtype, without_autocast


@without_autocast
def rotate(x: Tensor, cos: Tensor, sin: Tensor, token: Tensor | None, backward: bool) -> Tensor:
    """x (B, L, heads, N), cos and sin (B or 1, L, N) -> as x; `backward` takes a gradient back.

    With `token` (n,), x is (1, n, heads, N), the tokens at these places of a flattened batch, and the angles
    are those of its rows.
    """
    if token is not None:
        cos, sin = taken(cos, token), taken(sin, token)
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = (angle.to(wide.dtype)[:, :, None] for angle in (cos, sin))
    turned = wide * sin if backward else wide
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([second, -first] if backward else [-second, first], dim=-1)
    return (wide * cos + (rotated if backward else rotated * sin)).to(x.dtype)


def taken(angle: Tensor, token: Tensor) -> Tensor:
    """(B or 1, L, N) at the places (n,) of the flattened batch -> (1, n, N)."""
    place = token if len(angle) > 1 else token % angle.shape[1]
    return angle.flatten(0, 1).index_select(0, place)[None]
