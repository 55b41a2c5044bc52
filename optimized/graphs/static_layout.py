"""A layout in static buffers: what the layers of one forward read of it, in shapes of (B, L) alone.

Sorts and checks wait for the device and depend on where pictures are; so a real `VisionLayout` is made before
a graph runs, and its tensors are copied into these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import VisionLayout, VisionTokens
from ..layout.operator import Plan
from ..layout.segments import openings
from ..layout.sorts import Facts

Window = tuple[tuple[int, int, int], bool]  # window_thw, and whether shifted


def padded_layout(layout: VisionLayout, pad: int) -> VisionLayout:
    """The layout behind so many tokens of padding, without asking the device again."""
    if not pad:
        return layout
    coords = F.pad(layout.coords, (0, 0, pad, 0), value=-1)
    vision, largest, place = layout.facts
    first = torch.arange(pad, device=place.device).expand(len(place), pad)
    place = torch.cat([first, place + pad], dim=1)  # padding is text, which comes first
    return VisionLayout(coords, None, {"facts": Facts(vision, largest, place)})


def layout_tensors(
    layout: VisionLayout, valid: Tensor | None, windows: Iterable[Window]
) -> dict[Any, Tensor]:
    """What layers with these windows read of a layout, by names that `StaticLayout` knows.

    Args:
        layout: of all (B, L) tokens.
        valid: (B, L) bool; None = all.
        windows: those of the layers.
    """
    segment = layout.segment
    read = {
        "segment": segment,
        "scan rows": layout.scan_rows,
        "openings": layout.openings if valid is None else openings(torch.where(valid, segment, -1)),
    }
    for window_thw, shifted in windows:
        plan = layout.window_plan(window_thw, int(shifted))
        read["places", window_thw, shifted], read["blocks", window_thw, shifted] = plan
    return read


class StaticLayout(VisionLayout):
    """A layout over static buffers. Make a new one inside the captured function: what it derives from them
    must be derived again in every run.

    Args:
        tensors: of `layout_tensors`.
    """

    DERIVED = ("vision", "orders", "vision row")  # and "vision tokens": of segment and scan rows alone

    def __init__(self, tensors: dict[Any, Tensor]) -> None:
        coords = tensors["segment"][..., None].expand(-1, -1, 4)  # for its shape
        known = {name: tensors[name] for name in ("segment", "scan rows", "openings")}
        super().__init__(coords, None, known | {"begins": None})  # packed rows run without graphs
        for name, tensor in tensors.items():
            if name[0] == "places":
                window = name[1:]
                self._memo["window plan", *window, True] = Plan(tensor, tensors["blocks", *window])

    def __post_init__(self) -> None:
        """Check nothing: the layout whose tensors these are was checked."""

    def openings_among(self, valid: Tensor | None) -> Tensor:
        """They were made with `valid`."""
        return self.openings

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """(B, L): the same number in a window, -1 in none; the plan's numbers, not the parent's."""
        return self.vision_tokens(window_thw, layer_index).window_id

    def vision_tokens(self, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """All tokens: how many are vision is not the same in every run."""
        key = ("vision tokens", window_thw, layer_index % 2 == 1)
        return super().once(key, lambda: VisionTokens.of_all(self, window_thw, layer_index))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As the parent; what no run may compute from values is refused.

        Raises:
            RuntimeError: if it is not in the buffers and cannot be derived from them.
        """
        if key not in self._memo and key not in self.DERIVED:
            raise RuntimeError(
                f"StaticLayout: {key!r} must be among the tensors copied before, got {[*self._memo]}"
            )
        return super().once(key, make)
