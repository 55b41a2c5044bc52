"""A layout that a graph finds anew in every run, from coordinates in a static buffer.

What a layout sorts depends on values, its shapes on (B, L) alone: so a graph can do it, and the host launches
nothing for it. Two things are asked of the device before, by the `VisionLayout` that a caller brings: whether
it is well formed, and how large its numbers are. Here these have bounds instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import VisionLayout, VisionTokens
from ..layout.operator import Plan
from ..layout.plan import layout_plan
from ..layout.segments import openings
from ..layout.sorts import Facts

MOST_SEGMENTS = 2**20  # of all rows together; with LARGEST_PLACE all keys fit into 62 bits, as `joined` asks
LARGEST_PLACE = 2**13  # of t, y and x


def bounds(batch: int) -> list[int]:
    """The largest number that each column of coordinates (B, L, 4) may have."""
    return [MOST_SEGMENTS // batch - 2, *[LARGEST_PLACE] * 3]


def is_within_bounds(layout: VisionLayout) -> bool:
    """Whether a graph can find this layout."""
    largest = layout.facts.largest
    return all(own <= most for own, most in zip(largest, bounds(len(layout.coords)), strict=True))


class StaticLayout(VisionLayout):
    """A layout over a static buffer. Make a new one inside the captured function: what it derives must be
    derived again in every run.

    Args:
        coords: (B, L, 4) int64, those of a layout within `bounds`, which was checked.
        sequence: (B, L) int64, its samples; None = one a row.
    """

    def __init__(self, coords: Tensor, sequence: Tensor | None = None) -> None:
        segment, place = coords[..., 0].sort(dim=1, stable=True)
        super().__init__(coords, sequence, {"facts": Facts((segment >= 0).sum(), bounds(len(coords)), place)})

    def __post_init__(self) -> None:
        """Check nothing: the layout whose coordinates these are was checked."""

    def openings_among(self, valid: Tensor | None) -> Tensor:
        """Those of the layout's own valid tokens, which are the same in all layers of a forward."""
        if valid is None:
            return self.openings
        return self.once("openings among", lambda: openings(torch.where(valid, self.segment, -1)))

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """(B, L): the same number in a window, -1 in none; the plan's numbers, not the parent's."""
        return self.vision_tokens(window_thw, layer_index).window_id

    def window_plan(self, window_thw: tuple[int, int, int], layer_index: int, text: bool = True) -> Plan:
        """As the parent, of all tokens."""
        shifted = layer_index % 2 == 1

        def make() -> Plan:
            return Plan(*layout_plan(self.sorted, self.facts.vision, window_thw, shifted, text=True))

        return self.once(("window plan", window_thw, shifted), make)

    def vision_tokens(self, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """All tokens: how many are vision is not the same in every run."""
        key = ("vision tokens", window_thw, layer_index % 2 == 1)
        return self.once(key, lambda: VisionTokens.of_all(self, window_thw, layer_index))
