"""Where a prompt's images and videos are: from placeholder tokens and grids to token coordinates.

The processor gives, per image or video in the order of the batch, a grid (T, Y, X) of patches; after the
teacher's m×m merge it fills T · Y/m · X/m placeholder tokens, row by row: t slowest, x fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import require

MODALITIES = ("image", "video")


@dataclass(frozen=True)
class Placement:
    """One image or video in a batch.

    Args:
        row: index in the batch.
        start: position of its first token.
        modality: "image" or "video".
        grid_thw: its size in tokens, (T, Y, X).
    """

    row: int
    start: int
    modality: str
    grid_thw: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Its number of tokens."""
        frames, height, width = self.grid_thw
        return frames * height * width


def find_placements(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
) -> list[Placement]:
    """Match placeholder tokens to grids.

    Args:
        input_ids: (B, L) int64.
        image_grid_thw: (images, 3) int64 in patches, in the order of the batch; None = no images.
        video_grid_thw: (videos, 3), likewise.
        image_token_id: the placeholder of images.
        video_token_id: the placeholder of videos.
        merge_size: m, patches per token on the y and the x axis.
    Returns:
        the images and videos, row by row, by position.
    Raises:
        ValueError: if placeholders and grids do not fit, as when a prompt is cut inside a block.
    """
    token_ids = dict(zip(MODALITIES, (image_token_id, video_token_id), strict=True))
    given = dict(zip(MODALITIES, (image_grid_thw, video_grid_thw), strict=True))
    grids = {modality: merged_grids(given[modality], merge_size) for modality in MODALITIES}
    placements = []
    for row, ids in enumerate(input_ids.cpu()):
        runs = [(start, end, m) for m in MODALITIES for start, end in placeholder_runs(ids == token_ids[m])]
        for start, end, modality in sorted(runs):
            placements += fill_run(row, start, end, modality, grids[modality])
    for modality in MODALITIES:
        left = len(list(grids[modality]))
        must = f"every {modality} grid must have its placeholder tokens in input_ids"
        require(left == 0, "find_placements", must, f"{left} grids too many")
    return placements


def merged_grids(grid_thw: Tensor | None, merge_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the grids in tokens."""
    for frames, height, width in [] if grid_thw is None else grid_thw.tolist():
        yield frames, height // merge_size, width // merge_size


def placeholder_runs(is_placeholder: Tensor) -> list[tuple[int, int]]:
    """Return the (start, end) of every run of True in a (L,) bool."""
    edges = torch.nn.functional.pad(is_placeholder.to(torch.int8), (1, 1)).diff()  # (L + 1,)
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def fill_run(row: int, start: int, end: int, modality: str, grids: Iterator) -> Iterator[Placement]:
    """Yield the images or videos that make up one run of placeholders."""
    while start < end:
        grid_thw = next(grids, None)
        must = f"every run of {modality} tokens must have a grid"
        got = f"none left for tokens {start} to {end} of row {row}"
        hint = f"pass {modality}_grid_thw, or linmu_coords"
        require(grid_thw is not None, "find_placements", must, got, hint)
        placement = Placement(row, start, modality, grid_thw)
        require(
            0 < placement.length <= end - start,
            "find_placements",
            f"a block must be whole: grid {grid_thw} (T, Y, X) needs {placement.length} {modality} tokens",
            f"{end - start} at position {start} of row {row}",
            "a prompt may be split anywhere but inside an image or video",
        )
        yield placement
        start += placement.length


def placement_coords(placements: Sequence[Placement], shape: Sequence[int], device: torch.device) -> Tensor:
    """Token coordinates of a batch of `shape` (B, L): (B, L, 4) int64, [segment, t, y, x], -1 on text."""
    coords = torch.full((*shape, 4), -1, dtype=torch.int64)
    for row in range(shape[0]):
        in_row = [placement for placement in placements if placement.row == row]
        for segment, placement in enumerate(in_row):
            axes = [torch.arange(size) for size in placement.grid_thw]
            cells = torch.cartesian_prod(*axes)  # (T·Y·X, 3), row-major
            block = coords[row, placement.start : placement.start + placement.length]
            block[:, 0], block[:, 1:] = segment, cells
    return coords.to(device)


def cuts_a_block(coords: Tensor, position: int) -> bool:
    """Say whether a split of coords (B, L, 4) before `position` has tokens of one segment on both sides."""
    ids = coords[..., 0].tolist()
    return any((set(row[:position]) & set(row[position:])) - {-1} for row in ids)
