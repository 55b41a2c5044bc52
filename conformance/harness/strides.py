"""The same numbers in other places of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def oddly_strided(value: Any) -> Any:
    """The same values, last axis first in memory, every second element of a larger buffer."""
    return in_wider_rows(value, 2, swapped=lambda axes: axes[::-1])


def cut_from_wider_rows(value: Any) -> Any:
    """The same values, the last axis whole in memory but its rows apart, the axes before it swapped: what a
    fused projection gives, seen as (B, H, L, N)."""
    return in_wider_rows(value, 1, swapped=lambda axes: (0, 2, 1, *axes[3:]) if len(axes) > 3 else axes)


def in_wider_rows(value: Any, step: int, swapped: Callable[[Sequence[int]], Sequence[int]]) -> Any:
    """A tensor's values as every `step`-th element of rows of a buffer that have room for more.

    Args:
        value: anything; what has no axes comes back as it is.
        step: 1 or 2.
        swapped: the order of the axes in memory, its own inverse.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    order = swapped(range(value.ndim))
    *rows, last = value.permute(*order).shape
    view = value.new_zeros(*rows, 2 * last + 1)[..., : step * last : step].permute(*order)
    view.copy_(value)
    return view
