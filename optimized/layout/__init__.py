"""`reference/layout.py` without loops over tokens: sorts and scatters on the device of the coordinates.

Letters: B batch, L tokens, n of them. The device is asked once per layout whether it is well formed, and
nothing else, unless its numbers are so large that keys must be numbered before they are joined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linmu import reference

from ...reference.checks import require, require_int64
from ...reference.layout import SCAN_AXES, check_samples, inverse_order, samples_of
from .operator import LayoutPlanInputs, Plan, layout_plan
from .samples import previous, sample_begins
from .segments import openings
from .sorts import Facts, Sorted, by_segment, examine, scan_rows, window_numbers
from .tokens import flat_order, gather_tokens

__all__ = ["VisionLayout", "check_coords", "inverse_order", "permute_tokens", "scan_order", "window_ids"]

NEARLY_ALL = 0.9  # of the tokens: leaving out the rest would not pay for bringing these together


def check_coords(coords: Tensor, where: str = "coords") -> None:
    """Raise ValueError unless `coords` is (B, L, 4) int64, -1 throughout on text, no segments interleaved."""
    examine(coords, where)


def scan_order(coords: Tensor, layer_index: int) -> Tensor:
    """`linmu.reference.scan_order`: arguments, result and errors are the same."""
    facts = examine(coords, "scan_order")
    require(layer_index >= 0, "scan_order", "layer_index must be >= 0", layer_index)
    axes = SCAN_AXES[layer_index % 4]
    return in_rows(scan_rows(by_segment(coords, facts), (axes,)), coords)[0]


def in_rows(orders: Tensor, coords: Tensor) -> Tensor:
    """Tokens (K, n) in the flattened batch, each in its own row -> (K, B, L) in that row."""
    batch, length, _ = coords.shape
    return (orders if batch == 1 else orders % max(1, length)).view(len(orders), batch, length)


def permute_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Gather along the token axis: tensor (B, L, ...), order (B, L) -> out[b, i] = tensor[b, order[b, i]]."""
    return gather_tokens(tensor, flat_order(order)).view(tensor.shape)


def window_ids(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """`linmu.reference.window_ids`: arguments, result, its numbering too, and errors are the same."""
    facts = examine(coords, "window_ids")
    sizes_valid = len(window_thw) == 3 and min(window_thw) >= 1
    require(sizes_valid, "window_ids", "window_thw must be three sizes >= 1 (T, Y, X)", window_thw)
    return window_numbers(by_segment(coords, facts), coords[..., 0] >= 0, window_thw, shifted)


def rows_where(mask: Tensor | None, tensor: Tensor) -> Tensor:
    """(B, L) int64: where each token of (B, L, ...) stands in the flattened batch; -1 where not `mask`."""
    batch, length = tensor.shape[:2]
    rows = torch.arange(batch * length, device=tensor.device).view(batch, length)
    return rows if mask is None else torch.where(mask, rows, -1)


@dataclass(frozen=True)
class VisionTokens:
    """The tokens that Local-Swin computes: n of them, or all, in their order, where nearly all are vision."""

    token: Tensor | None  # (n,) int64 in the flattened batch, window by window; None = all
    row: Tensor  # (B, L) int64: where each token stands among them, -1 on text
    window_id: Tensor  # (1, n), or (B, L): the same number in a window, -1 in none
    plan: Plan  # of these windows

    @classmethod
    def of(cls, layout: VisionLayout, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """Without text, unless there is hardly any, or nothing else."""
        segment, vision = layout.segment, layout.facts.vision
        if 0 < vision <= NEARLY_ALL * segment.numel():
            (token, window), blocks = layout.window_plan(window_thw, layer_index, text=False)
            token, place = token.long(), torch.arange(vision, device=token.device)
            row = torch.full_like(segment, -1)
            row.view(-1).scatter_(0, token, place)
            return cls(token, row, window[None], Plan(torch.stack([place.int(), window]), blocks))
        return cls.of_all(layout, window_thw, layer_index)

    @classmethod
    def of_all(cls, layout: VisionLayout, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """Text and all: its tokens are in no window."""
        segment, plan = layout.segment, layout.window_plan(window_thw, layer_index)
        token, window = plan[0]
        window_id = torch.empty_like(window).scatter_(0, token.long(), window)
        return cls(None, layout.vision_row, window_id.view_as(segment), plan)

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, L, D) -> (1, n, D), or as it is."""
        return tensor if self.token is None else gather_tokens(tensor, self.token)[None]


@dataclass(frozen=True, eq=False)
class VisionLayout(reference.VisionLayout):
    """`linmu.reference.VisionLayout`, checked once, sorted on the device."""

    def __post_init__(self) -> None:
        _ = self.facts  # refuses malformed coordinates
        if self.sequence is not None:
            refuse_split_segments(self)

    @property
    def facts(self) -> Facts:
        """What is known of the coordinates."""
        return self.once("facts", lambda: examine(self.coords, "VisionLayout"))

    @property
    def has_vision(self) -> bool:
        """The reference's, known without asking again."""
        return self.facts.vision > 0

    @property
    def segment(self) -> Tensor:
        """The reference's, contiguous."""
        return self.once("segment", lambda: self.coords[..., 0].contiguous())

    @property
    def is_vision(self) -> Tensor:
        """The reference's, made once."""
        return self.once("vision", lambda: self.segment >= 0)

    @property
    def openings(self) -> Tensor:
        """`segments.openings` of this layout."""
        return self.once("openings", lambda: openings(self.segment))

    def openings_among(self, valid: Tensor | None) -> Tensor | None:
        """`segments.openings` of valid tokens (B, L) bool, where they serve every layer: None = not known."""
        return self.openings if valid is None else None

    @property
    def begins(self) -> Tensor | None:
        """`samples.sample_begins` of this layout, all tokens valid; None = one sample a row."""
        return self.once("begins", lambda: sample_begins(self.sequence, None))

    @property
    def sorted(self) -> Sorted:
        """The coordinates in the order of their segments."""
        return self.once("sorted", lambda: by_segment(self.coords, self.facts))

    @property
    def scan_rows(self) -> Tensor:
        """(4, B·L) int64: the tokens of the flattened batch in the four scan orders, made all at once."""
        return self.once("scan rows", lambda: scan_rows(self.sorted))

    def order(self, layer_index: int) -> Tensor:
        """`scan_order` of this layer, (B, L) int64."""
        return self.once("orders", lambda: in_rows(self.scan_rows, self.coords))[layer_index % 4]

    def in_order(self, tensor: Tensor, layer_index: int) -> Tensor:
        """`permute_tokens` into the order of this layer."""
        return gather_tokens(tensor, self.scan_rows[layer_index % 4]).view(tensor.shape)

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """`window_ids` of this layer, (B, L) int64; odd layers are shifted."""
        shifted = layer_index % 2 == 1
        return self.once(
            ("windows", window_thw, shifted),
            lambda: window_numbers(self.sorted, self.is_vision, window_thw, shifted),
        )

    def window_plan(self, window_thw: tuple[int, int, int], layer_index: int, text: bool = True) -> Plan:
        """The order in which kernels take the tokens of these windows, `plan.window_plan`; `text` has a place
        in it, or none."""
        shifted = layer_index % 2 == 1

        def make() -> Plan:
            kind = (self.facts.vision, list(window_thw), shifted, text)
            return layout_plan(LayoutPlanInputs(*self.sorted, *kind))

        return self.once(("window plan", window_thw, shifted, text), make)

    def vision_tokens(self, window_thw: tuple[int, int, int], layer_index: int) -> VisionTokens:
        """The tokens of these windows, without text."""
        key = ("vision tokens", window_thw, layer_index % 2 == 1)
        return self.once(key, lambda: VisionTokens.of(self, window_thw, layer_index))

    @property
    def vision_row(self) -> Tensor:
        """(B, L) int64: where each token stands in the flattened batch, -1 on text."""
        return self.once("vision row", lambda: rows_where(self.is_vision, self.is_vision))


def refuse_split_segments(layout: VisionLayout) -> None:
    """The reference's `check_samples`, in one question to the device; loops only say what is wrong."""
    sequence, segment = layout.sequence, layout.segment
    require_int64("VisionLayout", "sequence", sequence, segment.shape, "B, L")
    before, earlier = previous(layout.is_vision)
    goes_on = layout.is_vision & earlier & (segment.gather(1, before) == segment)
    if bool((goes_on & (sequence.gather(1, before) != sequence)).any()):
        check_samples(layout.coords, sequence, "VisionLayout")


def begins_of(
    where: str, layout: VisionLayout | None, sequence: Tensor | None, valid: Tensor | None
) -> Tensor | None:
    """`samples.sample_begins` of a module's arguments; a layout keeps it for all layers."""
    sequence = samples_of(where, layout, sequence)
    return layout.begins if layout is not None and valid is None else sample_begins(sequence, valid)


def fast(layout: reference.VisionLayout | None) -> VisionLayout | None:
    """The same layout as our `VisionLayout`, made once per layout: a caller may bring the reference's."""
    if layout is None or isinstance(layout, VisionLayout):
        return layout
    return layout.once("optimized", lambda: VisionLayout(layout.coords, layout.sequence))
