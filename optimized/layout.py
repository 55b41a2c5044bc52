"""`reference/layout.py` without loops over tokens: sorts and scatters on the device of the coordinates.

Letters: B batch, L tokens, S segments, W windows. One value per layout is asked from the device, whether it
is well formed; the number of segments and windows too where windows are numbered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference.layout import SCAN_AXES, inverse_order
from ..reference.layout import check_coords as explain_coords
from . import operators
from .checks import require, require_int64
from .scan_masks import interleaved_row

__all__ = ["VisionLayout", "check_coords", "inverse_order", "permute_tokens", "scan_order", "window_ids"]


def check_coords(coords: Tensor, where: str = "coords") -> None:
    """Raise ValueError unless `coords` is (B, L, 4) int64, -1 throughout on text, no segments interleaved."""
    require_int64(where, "coords", coords, (None, None, 4), "B, L, 4")
    well_formed = bool(((coords == -1).all(-1) | (coords >= 0).all(-1)).all())
    if not well_formed or (coords.shape[1] and interleaved_row(coords[..., 0]) is not None):
        explain_coords(coords, where)


def scan_order(coords: Tensor, layer_index: int) -> Tensor:
    """`linmu.reference.scan_order`: arguments, result and errors are the same."""
    check_coords(coords, "scan_order")
    require(layer_index >= 0, "scan_order", "layer_index must be >= 0", layer_index)
    return ranked_order(coords, layer_index)


def ranked_order(coords: Tensor, layer_index: int) -> Tensor:
    """(B, L): text is a segment whose keys are all equal, so a stable sort leaves it where it was."""
    position = coords[..., 0].argsort(dim=1, stable=True)  # segment by segment, in prompt order
    token = torch.arange(coords.shape[1], device=coords.device).expand(coords.shape[:2])
    for axis in (*reversed(SCAN_AXES[layer_index % 4]), 0):  # the most significant key last
        token = token.gather(1, coords[..., axis].gather(1, token).argsort(dim=1, stable=True))
    return torch.empty_like(position).scatter_(1, position, token)


def permute_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Gather along the token axis: tensor (B, L, ...), order (B, L) -> out[b, i] = tensor[b, order[b, i]]."""
    start = torch.arange(tensor.shape[0], device=tensor.device)[:, None] * tensor.shape[1]
    return tensor.flatten(0, 1).index_select(0, (order + start).flatten()).view(tensor.shape)


def window_ids(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """`linmu.reference.window_ids`: arguments, result, its numbering too, and errors are the same."""
    check_coords(coords, "window_ids")
    sizes_valid = len(window_thw) == 3 and min(window_thw) >= 1
    require(sizes_valid, "window_ids", "window_thw must be three sizes >= 1 (T, Y, X)", window_thw)
    return numbered_windows(coords, window_thw, shifted)


def numbered_windows(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """(B, L): windows of a row numbered by their first token; eq. (1) of the reference."""
    row, place = (coords[..., 0] >= 0).nonzero(as_tuple=True)  # (n,) each
    found = coords[row, place]  # (n, 4)
    ids = torch.full_like(coords[..., 0], -1)
    if not len(found):
        return ids
    segment = number(torch.stack([row, found[:, 0]], dim=1))
    grid, width = found[:, 1:], found.new_tensor(window_thw)
    extent = reduce_by(segment, grid, "amax") - reduce_by(segment, grid, "amin") + 1  # (S, 3)
    shift = torch.where(extent > width, width // 2, 0) if shifted else torch.zeros_like(extent)
    cell = (grid + shift[segment]) // width
    window = number(torch.cat([segment[:, None], cell], dim=1))
    first = reduce_by(window, torch.arange(len(window), device=coords.device), "amin")  # (W,)
    rank = first.argsort().argsort()  # over all rows, in order of the first token
    windows_before = torch.zeros_like(coords[:, 0, 0]).index_add_(0, row[first], torch.ones_like(first))
    windows_before = windows_before.cumsum(0) - windows_before  # (B,)
    ids[row, place] = rank[window] - windows_before[row]
    return ids


def number(keys: Tensor) -> Tensor:
    """(n, columns) -> (n,): equal rows get equal numbers from 0."""
    return keys.unique(dim=0, return_inverse=True)[1]


def reduce_by(group: Tensor, values: Tensor, how: str) -> Tensor:
    """The minimum or maximum of `values` (n, ...) over each group (n,)."""
    out = values.new_zeros(int(group.max()) + 1, *values.shape[1:])
    index = group.view(-1, *(1,) * (values.ndim - 1)).expand_as(values)
    return out.scatter_reduce(0, index, values, how, include_self=False)


@dataclass(frozen=True, eq=False)
class VisionLayout(reference.VisionLayout):
    """`linmu.reference.VisionLayout`, checked once, sorted on the device."""

    def __post_init__(self) -> None:
        check_coords(self.coords, "VisionLayout")

    def order(self, layer_index: int) -> Tensor:
        """`scan_order` of this layer, (B, L) int64."""
        return self._once(("order", layer_index % 4), lambda: ranked_order(self.coords, layer_index))

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """`window_ids` of this layer, (B, L) int64; odd layers are shifted."""
        shifted = layer_index % 2 == 1
        key = ("windows", window_thw, shifted)
        return self._once(key, lambda: numbered_windows(self.coords, window_thw, shifted))

    def window_plan(self, window_thw: tuple[int, int, int], layer_index: int) -> tuple[Tensor, Tensor]:
        """The order in which kernels take the tokens of these windows, `operators.window_plan`."""
        windows = self.windows(window_thw, layer_index)
        key = ("window plan", window_thw, layer_index % 2 == 1)
        return self._once(key, lambda: operators.window_plan(windows))


def fast(layout: reference.VisionLayout | None) -> VisionLayout | None:
    """The same layout as our `VisionLayout`, made once per layout: a caller may bring the reference's."""
    if layout is None or isinstance(layout, VisionLayout):
        return layout
    return layout._once("optimized", lambda: VisionLayout(layout.coords))
