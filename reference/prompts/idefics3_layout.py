"""Idefics3 and SmolVLM: numbered tiles, which join to one grid."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..checks import require
from .grids import Placement, assign_placeholders, grid_coordinates
from .layouts import PromptLayout


class Idefics3PromptLayout(PromptLayout):
    """Tiles are s·s tokens after two markers, <fake_token_around_image> and the tile's own.

    `pixel_values` is (B, most tiles of a row, 3, height, width), rows filled up with zeros, which the teacher
    leaves out.
    """

    arguments: ClassVar = {"image": ("pixel_values", "pixel_attention_mask")}

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return two segments per image: its tiles as one grid if it was split, and the whole."""
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        pixels = inputs.get("pixel_values")
        whole = grid_coordinates(1, side, side)
        count = 0 if pixels is None else int((pixels.flatten(2) != 0).any(-1).sum())  # others fill up rows
        tiles = assign_placeholders(input_ids, config.image_token_id, "image", [[whole]] * count)
        placements, item = [], 0
        for row, ids in enumerate(input_ids.tolist()):
            in_row = [tile for tile in tiles if tile.row == row]
            for image in split_images(in_row, ids):
                *parts, last = image
                if parts:
                    placements.append(mosaic(parts, item, side))
                placements.append(Placement(row, "image", item, last.positions, last.coordinates))
                item += 1
        return placements

    def drop_cached(self, config, placements, past, inputs) -> None:
        """Blank the tiles that were seen: the teacher leaves blank ones out."""
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        pixels = inputs["pixel_values"].clone()
        new = 0
        for row in range(len(pixels)):
            in_row = [p for p in placements if p.row == row]
            tiles = [len(p.positions) // side**2 for p in in_row if p.start < past]
            pixels[row, : sum(tiles)] = 0
            new += len(in_row) - len(tiles)
        inputs["pixel_values"] = pixels
        if not new:
            for name in self.argument_names:
                inputs.pop(name, None)

    def repeat_rows(self, config, placements, times, inputs) -> None:
        """Pixels have the rows of the batch."""
        for name in self.argument_names:
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].repeat_interleave(times, dim=0)


def split_images(tiles: list[Placement], ids: list[int]) -> list[list[Placement]]:
    """Group the tiles of one row of a batch by image.

    The last tile of each shows the whole image, under a marker of its own; so does the row's last tile.
    """
    images: list[list[Placement]] = [[]]
    for tile in tiles:
        images[-1].append(tile)
        if ids[tile.start - 1] == ids[tiles[-1].start - 1]:
            images.append([])
    return [image for image in images if image]


def mosaic(tiles: list[Placement], item: int, side: int) -> Placement:
    """Join the tiles of one image; two markers part tiles of one row, more tokens the next row's."""
    rows: list[list[Placement]] = []
    for tile in tiles:
        follows = bool(rows) and tile.start - rows[-1][-1].start == side**2 + 2
        if follows:
            rows[-1].append(tile)
        else:
            rows.append([tile])
    lengths = sorted({len(tiles) for tiles in rows})
    must = "the tiles of an image must stand in rows of equal length, two markers before each"
    require(len(lengths) == 1, "Idefics3PromptLayout", must, f"rows of {lengths}", "pass linmu_coords")
    coordinates = [
        tile.coordinates + torch.tensor([0, y * side, x * side])
        for y, tiles in enumerate(rows)
        for x, tile in enumerate(tiles)
    ]
    positions = torch.cat([tile.positions for tile in tiles])
    return Placement(tiles[0].row, "image", item, positions, torch.cat(coordinates))
