"""Where a prompt's images and videos are: from placeholder tokens to token coordinates.

Every family marks vision by placeholder tokens, and fills them image by image, video by video, in the order
of the batch. What one image or video puts there is a list of segments, each a tensor of coordinates (n, 3),
[t, y, x], one per placeholder token, in order; -1 throughout where a placeholder holds a newline token.

    a video of Qwen2-VL         [(T·Y·X, 3)]
    an image of LLaVA-OneVision [(Y·X, 3), the base view; (Y·(X+1), 3), a -1 after each row]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import require


@dataclass(frozen=True, eq=False)
class Placement:
    """One segment of a batch: an image, a tile, a mosaic of tiles, or a video.

    Args:
        row: index in the batch.
        modality: "image" or "video".
        item: index of the image or video it belongs to, among those of this modality in the batch.
        positions: (n,) int64, where its tokens are in the row, ascending.
        coordinates: (n, 3) int64, the [t, y, x] of each.
    """

    row: int
    modality: str
    item: int
    positions: Tensor
    coordinates: Tensor

    @property
    def start(self) -> int:
        """The position of its first token."""
        return int(self.positions[0])


def grid_coordinates(frames: int, height: int, width: int) -> Tensor:
    """(T·Y·X, 3): the coordinates of a grid, row by row, t slowest, x fastest."""
    return torch.cartesian_prod(*(torch.arange(size) for size in (frames, height, width)))


def with_newlines(coordinates: Tensor, every: int) -> Tensor:
    """(n, 3) -> (n + n / every, 3): a newline, -1 throughout, after every so many tokens."""
    lines = coordinates.view(-1, every, 3)
    return torch.nn.functional.pad(lines, (0, 0, 0, 1), value=-1).flatten(0, 1)


def assign_placeholders(
    input_ids: Tensor,
    token_id: int,
    modality: str,
    items: Iterable[Sequence[Tensor]],
    *,
    text_between: bool = False,
) -> list[Placement]:
    """Give the placeholder tokens of a batch to its images or videos.

    Args:
        input_ids: (B, L) int64.
        token_id: the placeholder.
        modality: "image" or "video".
        items: the images or videos in the order of the batch, each a list of segments (n, 3) as above.
        text_between: whether text may stand between the tokens of one item, timestamps between frames.
    Returns:
        the segments, row by row, by position.
    Raises:
        ValueError: if placeholders and items do not fit, as when a prompt is cut inside a span.
    """
    placements: list[Placement] = []
    remaining = enumerate(items)
    for row, ids in enumerate(input_ids.cpu()):
        free = (ids == token_id).nonzero().flatten()
        while len(free):
            index, segments = next(remaining, (None, None))
            must = f"every run of {modality} tokens must have a grid"
            got = f"none left for {len(free)} tokens from position {int(free[0])} of row {row}"
            hint = f"pass the {modality}s, or linmu_coords"
            require(segments is not None, "assign_placeholders", must, got, hint)
            needed = sum(map(len, segments))
            run = len(free) if text_between else run_length(free)
            must = f"a span must be whole: {modality} {index} needs {needed} {modality} tokens"
            got = f"{run} from position {int(free[0])} of row {row}"
            hint = "a prompt may be split anywhere but inside an image or video"
            require(0 < needed <= run, "assign_placeholders", must, got, hint)
            for coordinates in segments:
                own, free = free[: len(coordinates)], free[len(coordinates) :]
                seen = coordinates[:, 0] >= 0  # no newline
                placements.append(Placement(row, modality, index, own[seen], coordinates[seen]))
    left = len(list(remaining))
    must = f"every {modality} grid must have its placeholder tokens in input_ids"
    require(left == 0, "assign_placeholders", must, f"{left} grids too many")
    return placements


def run_length(positions: Tensor) -> int:
    """The number of positions (n,) that follow the first without a gap, itself included."""
    return int((positions == positions[0] + torch.arange(len(positions))).cumprod(0).sum())


def placement_coords(placements: Sequence[Placement], shape: Sequence[int], device: torch.device) -> Tensor:
    """Token coordinates of a batch of `shape` (B, L): (B, L, 4) int64, [segment, t, y, x], -1 on text."""
    coords = torch.full((*shape, 4), -1, dtype=torch.int64)
    for row in range(shape[0]):
        in_row = sorted((p for p in placements if p.row == row), key=lambda placement: placement.start)
        for segment, placement in enumerate(in_row):
            coords[row, placement.positions, 0] = segment
            coords[row, placement.positions, 1:] = placement.coordinates
    return coords.to(device)


def cuts_a_span(coords: Tensor, position: int) -> bool:
    """Say whether a split of coords (B, L, 4) before `position` has tokens of one segment on both sides."""
    ids = coords[..., 0].tolist()
    return any((set(row[:position]) & set(row[position:])) - {-1} for row in ids)
