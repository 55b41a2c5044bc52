"""Where every token sits: Rotary-Major Scan order and 3-D windows (LinMU, arXiv 2601.01322).

    coords (B, L, 4) int64 = [segment, t, y, x]; text and padding are -1 in all four.

Letters: B batch, L tokens, (T, Y, X) a segment's grid.
Segment: one image (or tile of one), or one video; each of its tokens has a place [t, y, x] on a grid. Newline
or timestamp text may stand between its tokens.
Span: all positions from a segment's first token to its last, such text included.
Sample: several may share a row; segments are numbered per row, and each lies in one sample.

(1) Scan order: within a segment, tokens are sorted by a key that rotates with the layer; layer_index % 4 ->
        0: (t, y, x)    1: (t, x, y)    2: (y, x, t)    3: (x, y, t)
(2) Windows: two tokens of a segment share one  <=>  floor((c + s) / w) agrees on all three axes,
        with shift s = w // 2 in odd layers on axes longer than w, else 0 (Swin's rule);
        c as given, not from the segment's corner, but an axis is as long as its c go: max - min + 1

Choice, after LinGen (arXiv 2412.09856): these four keys. The alternative is raster order, key 0 in all
layers.
Choice: windows at a border are smaller. The alternative, Swin's own, is to wrap them around and to mask.

These loops run over rows and segments, O(L log L) each, and ask the device for values: build once per
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import require, require_int64

SCAN_AXES = ((1, 2, 3), (1, 3, 2), (2, 3, 1), (3, 2, 1))  # columns of coords, most significant first


def check_coords(coords: Tensor, where: str = "coords") -> None:
    """Raise ValueError unless `coords` is (B, L, 4) int64, -1 throughout on text, no segments interleaved."""
    require_int64(where, "coords", coords, (None, None, 4), "B, L, 4")
    is_text = (coords == -1).all(-1)
    is_vision = (coords >= 0).all(-1)
    require(
        bool((is_text | is_vision).all()),
        where,
        "coords must be -1 in all four columns (text) or >= 0 in all four (vision)",
        coords[~(is_text | is_vision)][:1].tolist(),
    )
    for row in range(coords.shape[0]):
        last_end, last_id = -1, -1
        for segment, positions in segments(coords, row):
            start, end = int(positions[0]), int(positions[-1])
            require(
                start > last_end,
                where,
                "two segments must never interleave",
                f"row {row}: segment {segment} starts at {start} before segment {last_id} ends at {last_end}",
            )
            last_end, last_id = end, segment


def check_samples(coords: Tensor, sequence: Tensor | None, where: str = "sequence") -> None:
    """Raise ValueError unless `sequence` is (B, L) int64, and the tokens of a segment are of one sample."""
    require_int64(where, "sequence", sequence, coords.shape[:2], "B, L")
    if sequence is None:
        return
    for row in range(coords.shape[0]):
        for segment, positions in segments(coords, row):
            samples = sequence[row, positions].unique().tolist()
            must, got = "a segment must lie in one sample", f"row {row}: segment {segment} in {samples[:4]}"
            require(len(samples) == 1, where, must, got, "number the segments of a row, not of each sample")


def samples_of(where: str, layout: VisionLayout | None, sequence: Tensor | None) -> Tensor | None:
    """The samples of packed rows, (B, L) int64: the layout's where there is one, else `sequence`.

    Raises:
        ValueError: if both say something, which need not be the same.
    """
    if layout is None:
        return sequence
    must, hint = "sequence must be given by the layout where there is one", "VisionLayout(coords, sequence)"
    same = sequence is None or sequence is layout.sequence
    require(same, where, must, "a sequence beside a layout", hint)
    return layout.sequence


def segments(coords: Tensor, row: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (segment id, positions (n,) ascending) of one row, in order of first appearance."""
    ids = coords[row, :, 0]
    seen = [int(i) for i in dict.fromkeys(ids.tolist()) if i >= 0]
    for segment in seen:
        yield segment, (ids == segment).nonzero().squeeze(-1)


def scan_order(coords: Tensor, layer_index: int) -> Tensor:
    """Rotary-Major Scan: which token stands at each position of the scan; eq. (1) (LinMU, arXiv 2601.01322).

    "Rotary" says that the axis order rotates with the layer; it has nothing to do with RoPE. Text and padding
    keep their positions. Within a segment, tokens are re-sorted among the positions the segment already
    occupies; ties keep their order.

    Args:
        coords: (B, L, 4) int64, [segment, t, y, x], -1 on text and padding.
        layer_index: index of the decoder layer, >= 0.
    Returns:
        (B, L) int64: position i of the scan holds token `order[b, i]`.
    Raises:
        ValueError: if coords are malformed or two segments interleave.
    """
    check_coords(coords, "scan_order")
    require(layer_index >= 0, "scan_order", "layer_index must be >= 0", layer_index)
    batch, length, _ = coords.shape
    axes = SCAN_AXES[layer_index % 4]
    order = torch.arange(length).repeat(batch, 1)  # (B, L)
    for row in range(batch):
        for _, positions in segments(coords, row):
            keys = coords[row, positions][:, axes].tolist()
            ranked = sorted(range(len(keys)), key=keys.__getitem__)
            order[row, positions.cpu()] = positions.cpu()[ranked]  # eq. (1)
    return order.to(coords.device)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: inverse[b, order[b, i]] = i.

    Args:
        order: (B, L) int64, each row a permutation of 0 ... L-1.
    Returns:
        (B, L) int64.
    Raises:
        ValueError: if `order` is not (B, L) int64.
    """
    require_int64("inverse_order", "order", order, (None, None), "B, L")
    return order.argsort(dim=1)


def permute_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Put tokens in order: tensor (B, L, ...), order (B, L) int64 -> out[b, i] = tensor[b, order[b, i]]."""
    rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[rows, order]


def window_ids(coords: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """Number the 3-D windows of every row; eq. (2) (LinMU, arXiv 2601.01322, after Swin, arXiv 2103.14030).

    Args:
        coords: (B, L, 4) int64, [segment, t, y, x], -1 on text and padding.
        window_thw: window size in tokens (T, Y, X), each >= 1.
        shifted: move the partition by half a window on each axis on which the segment exceeds the window.
    Returns:
        (B, L) int64, -1 on text; equal in one row iff the tokens share segment and window.
    Raises:
        ValueError: if coords are malformed or a window size is below 1.
    """
    check_coords(coords, "window_ids")
    sizes_valid = len(window_thw) == 3 and min(window_thw) >= 1
    require(sizes_valid, "window_ids", "window_thw must be three sizes >= 1 (T, Y, X)", window_thw)
    ids = torch.full(coords.shape[:2], -1, dtype=torch.int64)
    for row in range(coords.shape[0]):
        numbers: dict[tuple[int, ...], int] = {}
        for segment, positions in segments(coords, row):
            grid = coords[row, positions, 1:]  # (n, 3)
            extent = (grid.amax(0) - grid.amin(0) + 1).tolist()
            shift = [w // 2 if shifted and e > w else 0 for w, e in zip(window_thw, extent, strict=True)]
            windows = (grid + grid.new_tensor(shift)) // grid.new_tensor(window_thw)  # eq. (2)
            found = [numbers.setdefault((segment, *window), len(numbers)) for window in windows.tolist()]
            ids[row, positions.cpu()] = torch.tensor(found)
    return ids.to(coords.device)


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """The layout of one forward pass, shared by all layers: each order and each windowing is computed once.

    Args:
        coords: (B, L, 4) int64, [segment, t, y, x], -1 on text and padding.
        sequence: (B, L) int64, which sample of a packed row a token belongs to; the tokens of one follow each
            other. None = one a row.
    Raises:
        ValueError: if coords are malformed, two segments interleave or one lies in two samples.
    """

    coords: Tensor
    sequence: Tensor | None = None
    _memo: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_coords(self.coords, "VisionLayout")
        check_samples(self.coords, self.sequence, "VisionLayout")

    @property
    def segment(self) -> Tensor:
        """(B, L) int64 segment ids, -1 on text; the same in token order and in every scan order."""
        return self.coords[..., 0]

    @property
    def is_vision(self) -> Tensor:
        """(B, L) bool, True on vision tokens."""
        return self.segment >= 0

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision token."""
        return bool(self.is_vision.any())

    def order(self, layer_index: int) -> Tensor:
        """`scan_order` of this layer, (B, L) int64."""
        return self.once(("order", layer_index % 4), lambda: scan_order(self.coords, layer_index))

    def inverse(self, layer_index: int) -> Tensor:
        """The inverse of `order(layer_index)`, (B, L) int64."""
        return self.once(("inverse", layer_index % 4), lambda: inverse_order(self.order(layer_index)))

    def windows(self, window_thw: tuple[int, int, int], layer_index: int) -> Tensor:
        """`window_ids` of this layer, (B, L) int64; odd layers are shifted."""
        shifted = layer_index % 2 == 1
        key = ("windows", window_thw, shifted)
        return self.once(key, lambda: window_ids(self.coords, window_thw, shifted))

    def to(self, device: torch.device | str, **kwargs) -> VisionLayout:
        """Return a copy on `device`, cached per device: layers may be on several."""
        coords = self.coords.to(device, **kwargs)
        if coords is self.coords:
            return self
        sequence = None if self.sequence is None else self.sequence.to(device, **kwargs)
        return self.once(("on", coords.device), lambda: type(self)(coords, sequence))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, computed once per `key` and kept with the layout."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
