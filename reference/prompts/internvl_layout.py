"""InternVL: every tile is alike, and a frame is a tile."""

from __future__ import annotations

from typing import ClassVar

from .grids import Placement, assign_placeholders, grid_coordinates
from .layouts import PromptLayout


class InternVLPromptLayout(PromptLayout):
    """Every tile of every image, every frame of every video is s·s tokens and one row of `pixel_values`."""

    arguments: ClassVar = {"image": ("pixel_values",)}

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return one segment per tile."""
        pixels = inputs.get("pixel_values")
        height, width = (
            int(size // patch * config.downsample_ratio)
            for size, patch in zip(
                config.vision_config.image_size, config.vision_config.patch_size, strict=True
            )
        )
        tiles = [] if pixels is None else [[grid_coordinates(1, height, width)]] * len(pixels)
        return assign_placeholders(input_ids, config.image_token_id, "image", tiles)
