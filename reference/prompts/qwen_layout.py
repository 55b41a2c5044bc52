"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the grids come with the pixels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .grids import Placement, assign_placeholders, grid_coordinates
from .layouts import PromptLayout


class Qwen2PromptLayout(PromptLayout):
    """Grids (T, Y, X) in patches come with the pixels; m·m patches become one token."""

    arguments: ClassVar = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    }
    frames_apart = False

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return one segment per image and per video."""
        merge = config.vision_config.spatial_merge_size
        placements = []
        for modality in self.arguments:
            grids = inputs.get(f"{modality}_grid_thw")
            grids = [] if grids is None else torch.as_tensor(grids).tolist()
            items = ([grid_coordinates(t, y // merge, x // merge)] for t, y, x in grids)
            token_id = getattr(config, f"{modality}_token_id")
            apart = self.frames_apart and modality == "video"
            placements += assign_placeholders(input_ids, token_id, modality, items, text_between=apart)
        return placements

    def has_vision(self, inputs) -> bool:
        """Say whether there are grids; other arguments may outlive them in generate()."""
        return any(inputs.get(f"{modality}_grid_thw") is not None for modality in self.arguments)

    def rows_per_item(self, config, name, tokens) -> Tensor:
        """Pixels have a row per patch."""
        merge = config.vision_config.spatial_merge_size
        return tokens * merge**2 if name.startswith("pixel_values") else torch.ones_like(tokens)


class Qwen3PromptLayout(Qwen2PromptLayout):
    """Qwen2PromptLayout, but a video's frames stand apart, a timestamp in the text before each."""

    frames_apart = True
