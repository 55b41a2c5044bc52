"""`reference/layout.py` without loops over tokens: sorts and scatters on the device of the coordinates.

Letters: B batch, L tokens, n of them. The device is asked once per layout whether it is well formed, and
nothing else, unless its numbers are so large that keys must be numbered before they are joined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.layout import SCAN_AXES, inverse_order
from ..reference.layout import check_coords as explain_coords
from . import operators
from .checks import require, require_int64
from .scan_masks import interleaved, openings, starts_run
from .window_plan import spans, without_text

__all__ = ["VisionLayout", "check_coords", "inverse_order", "permute_tokens", "scan_order", "window_ids"]

LARGEST_KEY = 2**62
NEARLY_ALL = 0.9  # of the tokens: leaving out the rest would not pay for bringing these together


def check_coords(coords: Tensor, where: str = "coords") -> None:
    """Raise ValueError unless `coords` is (B, L, 4) int64, -1 throughout on text, no segments interleaved."""
    examine(coords, where)


class Facts(NamedTuple):
    """What is known of coordinates that are well formed."""

    vision: int  # tokens
    extents: list[int]  # one more than the largest number of each column
    narrow: bool  # whether keys of the columns can be joined as they are, see `joined`


def examine(coords: Tensor, where: str) -> Facts:
    """`check_coords`, and what the device tells with it."""
    require_int64(where, "coords", coords, (None, None, 4), "B, L, 4")
    if not coords.numel():
        return Facts(vision=0, extents=[0] * 4, narrow=True)
    well_formed = ((coords == -1).all(-1) | (coords >= 0).all(-1)).all()
    together = ~interleaved(coords[..., 0]).any()
    vision = (coords[..., 0] >= 0).sum()
    told = torch.cat([torch.stack([well_formed & together, vision]), coords.amax((0, 1))])
    fine, vision, *largest = told.tolist()
    if not fine:
        explain_coords(coords, where)
    widest = math.prod(number + 2 for number in largest) * coords.shape[0] * coords.shape[1]
    return Facts(vision, [number + 1 for number in largest], narrow=widest < LARGEST_KEY)


def scan_order(coords: Tensor, layer_index: int) -> Tensor:
    """`linmu.reference.scan_order`: arguments, result and errors are the same."""
    facts = examine(coords, "scan_order")
    require(layer_index >= 0, "scan_order", "layer_index must be >= 0", layer_index)
    return ranked_order(coords, layer_index, facts, by_segment(coords))


def by_segment(coords: Tensor) -> Tensor:
    """(B, L): the positions of text, then those of each segment, in prompt order."""
    return coords[..., 0].argsort(dim=1, stable=True)


def ranked_order(coords: Tensor, layer_index: int, facts: Facts, position: Tensor) -> Tensor:
    """(B, L): text is a segment whose keys are all equal, so a stable sort leaves it where it was.

    `position` is that of `by_segment`.
    """
    axes = (0, *SCAN_AXES[layer_index % 4])
    extents = [facts.extents[axis] for axis in axes]
    token = joined([coords[..., axis] for axis in axes], extents, facts.narrow).argsort(dim=1, stable=True)
    return torch.empty_like(position).scatter_(1, position, token)


def joined(keys: list[Tensor], extents: list[int], narrow: bool) -> Tensor:
    """One key that sorts as several do one after the other, the first counting most. Each is below its
    extent, and negative only where all are -1.

    Unless they are narrow, so that the product of their ranges is below 2^62, each is numbered first: one
    sort apiece.
    """
    whole = keys[0]
    for key, extent in zip(keys[1:], extents[1:], strict=True):
        if not narrow:
            whole, key = number(whole), number(key)
            extent = key.numel()
        whole = torch.add(key, whole, alpha=extent)
    return whole


def permute_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Gather along the token axis: tensor (B, L, ...), order (B, L) -> out[b, i] = tensor[b, order[b, i]]."""
    return take_rows(tensor, flat_order(order))


def flat_order(order: Tensor) -> Tensor:
    """(B, L) -> (B·L,): the same tokens' places in the flattened batch."""
    if len(order) == 1:
        return order[0]
    start = torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]
    return (order + start).flatten()


def take_rows(tensor: Tensor, row: Tensor) -> Tensor:
    """tensor (B, L, ...), row (B·L,) -> its rows of the flattened batch, in the same shape."""
    return tensor.flatten(0, 1).index_select(0, row).view(tensor.shape)


def window_ids(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """`linmu.reference.window_ids`: arguments, result, its numbering too, and errors are the same."""
    facts = examine(coords, "window_ids")
    sizes_valid = len(window_thw) == 3 and min(window_thw) >= 1
    require(sizes_valid, "window_ids", "window_thw must be three sizes >= 1 (T, Y, X)", window_thw)
    return numbered_windows(coords, numbered_segments(coords), window_thw, shifted, facts)


def numbered_segments(coords: Tensor) -> Tensor:
    """(B·L,): which segment of all rows each token is of, from 1; text one more than there are tokens."""
    vision = coords[..., 0] >= 0
    opened = starts_run(coords[..., 0], vision).flatten().cumsum(0)
    return torch.where(vision.flatten(), opened, len(opened) + 1)


def numbered_windows(
    coords: Tensor, segment: Tensor, window_thw: tuple[int, int, int], shifted: bool, facts: Facts
) -> Tensor:
    """(B, L): windows of a row numbered by their first token; eq. (1) of the reference.

    `segment` is that of `numbered_segments`. Text is a window of its own, after all others, until the end.
    """
    vision = coords[..., 0] >= 0
    grid = coords[..., 1:].flatten(0, 1).clamp_min(0)  # (B·L, 3)
    width = torch.stack([grid.new_full((), size) for size in window_thw])  # asks nothing of the device
    if shifted:
        extent = bounds(segment, grid, "amax") - bounds(segment, grid, "amin") + 1
        grid = grid + torch.where(extent > width, width // 2, 0)
    cells = grid.div(width, rounding_mode="floor")
    columns = zip(facts.extents[1:], window_thw, strict=True)
    extents = [len(segment) + 2, *(most // size + 2 for most, size in columns)]
    key, token = joined([segment, *cells.unbind(1)], extents, facts.narrow).sort(stable=True)
    first, _ = spans(F.pad(key[1:] != key[:-1], (1, 0), value=True))  # window by window
    first_token = torch.empty_like(token).scatter_(0, token, token[first])  # of each token's window
    opens = (first_token == torch.arange(len(token), device=token.device)).view(vision.shape) & vision
    rank = opens.flatten().cumsum(0)[first_token].view(vision.shape) - 1
    before = opens.sum(1).cumsum(0) - opens.sum(1)  # windows of the rows before, (B,)
    return torch.where(vision, rank - before[:, None], -1)


def number(keys: Tensor) -> Tensor:
    """Whole numbers -> their ranks from 0, equal ones alike."""
    return keys.unique(return_inverse=True)[1]


def bounds(segment: Tensor, grid: Tensor, how: str) -> Tensor:
    """The minimum or maximum of `grid` (n, 3) over each token's segment, (n, 3)."""
    index = segment[:, None].expand_as(grid)
    found = grid.new_zeros(len(grid) + 2, 3).scatter_reduce_(0, index, grid, how, include_self=False)
    return found.gather(0, index)


def own_rows(vision: Tensor) -> Tensor:
    """(B, L) bool -> int64: each token's place in the flattened batch, -1 where False."""
    return torch.where(vision, torch.arange(vision.numel(), device=vision.device).view_as(vision), -1)


@dataclass(frozen=True)
class VisionTokens:
    """The tokens that Local-Swin computes: n of them, or all, in their order, where nearly all are vision."""

    token: Tensor | None  # (n,) int64 in the flattened batch, window by window; None = all
    row: Tensor  # (B, L) int64: where each token stands among them, -1 on text
    window_id: Tensor  # (1, n), or (B, L)
    plan: tuple[Tensor, Tensor]  # of these windows

    @classmethod
    def of(cls, window_id: Tensor, plan: tuple[Tensor, Tensor], vision: int) -> VisionTokens:
        """From windows (B, L), their plan, and how many tokens have one."""
        if not 0 < vision <= NEARLY_ALL * window_id.numel():
            return cls(None, own_rows(window_id >= 0), window_id, plan)
        place = torch.arange(window_id.numel(), device=window_id.device)
        token, plan = without_text(plan, vision)
        row = torch.full_like(place, -1).scatter_(0, token, place[:vision]).view_as(window_id)
        return cls(token, row, plan[0][1:].long(), plan)

    def taken(self, tensor: Tensor) -> Tensor:
        """(B, L, D) -> (1, n, D), or as it is."""
        return tensor if self.token is None else tensor.flatten(0, 1).index_select(0, self.token)[None]


@dataclass(frozen=True, eq=False)
class VisionLayout(reference.VisionLayout):
    """`linmu.reference.VisionLayout`, checked once, sorted on the device."""

    def __post_init__(self) -> None:
        self._memo["facts"] = examine(self.coords, "VisionLayout")

    @property
    def segment(self) -> Tensor:
        """The reference's, contiguous."""
        return self._once("segment", lambda: self.coords[..., 0].contiguous())

    @property
    def openings(self) -> Tensor:
        """`scan_masks.openings` of this layout."""
        return self._once("openings", lambda: openings(self.segment))

    def order(self, layer_index: int) -> Tensor:
        """`scan_order` of this layer, (B, L) int64."""
        facts, key = self._memo["facts"], ("order", layer_index % 4)
        position = self._once("by segment", lambda: by_segment(self.coords))
        return self._once(key, lambda: ranked_order(self.coords, layer_index, facts, position))

    def in_order(self, tensor: Tensor, layer_index: int) -> Tensor:
        """`permute_tokens` into the order of this layer."""
        row = self._once(("flat order", layer_index % 4), lambda: flat_order(self.order(layer_index)))
        return take_rows(tensor, row)

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """`window_ids` of this layer, (B, L) int64; odd layers are shifted."""
        shifted, facts = layer_index % 2 == 1, self._memo["facts"]
        segment = self._once("numbered segments", lambda: numbered_segments(self.coords))
        given, key = (self.coords, segment, window_thw, shifted, facts), ("windows", window_thw, shifted)
        return self._once(key, lambda: numbered_windows(*given))

    def window_plan(self, window_thw: tuple[int, int, int], layer_index: int) -> tuple[Tensor, Tensor]:
        """The order in which kernels take the tokens of these windows, `operators.window_plan`."""
        windows = self.windows(window_thw, layer_index)
        key = ("window plan", window_thw, layer_index % 2 == 1)
        return self._once(key, lambda: operators.window_plan(windows))

    def vision_tokens(self, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """The tokens of these windows, without text."""
        given, key = (window_thw, layer_index), ("vision tokens", window_thw, layer_index % 2 == 1)
        vision = self._memo["facts"].vision
        return self._once(
            key, lambda: VisionTokens.of(self.windows(*given), self.window_plan(*given), vision)
        )

    @property
    def vision_row(self) -> Tensor:
        """(B, L) int64: where each token stands in the flattened batch, -1 on text."""
        return self._once("vision row", lambda: own_rows(self.is_vision))


def fast(layout: reference.VisionLayout | None) -> VisionLayout | None:
    """The same layout as our `VisionLayout`, made once per layout: a caller may bring the reference's."""
    if layout is None or isinstance(layout, VisionLayout):
        return layout
    return layout._once("optimized", lambda: VisionLayout(layout.coords))
