"""LLaVA-OneVision: a base view, and the unpadded image with a newline token after each row."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from ..checks import require
from .grids import Placement, assign_placeholders, grid_coordinates, with_newlines
from .layouts import PromptLayout


class LlavaOnevisionPromptLayout(PromptLayout):
    """Newline tokens are placeholders too; `image_sizes` (height, width) say what is left of the padding."""

    arguments: ClassVar = {
        "image": ("pixel_values", "image_sizes"),
        "video": ("pixel_values_videos", "image_sizes_videos"),
    }

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return two segments per image alone in its row, one per other image, one per video."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = [] if inputs.get("image_sizes") is None else torch.as_tensor(inputs["image_sizes"]).tolist()
        images = [
            image_segments(config, side, size if one else None)
            for size, one in zip(sizes, is_alone(inputs), strict=False)  # the counts may cover padding
        ]
        videos = inputs.get("pixel_values_videos")
        videos = [] if videos is None else [video_segments(len(frames), side) for frames in videos]
        return [
            *assign_placeholders(input_ids, config.image_token_id, "image", images),
            *assign_placeholders(input_ids, config.video_token_id, "video", videos),
        ]

    @property
    def argument_names(self) -> tuple[str, ...]:
        """All arguments that bring images or videos, the numbers of images among them."""
        return (*super().argument_names, "batch_num_images")

    def select_items(self, config, placements, inputs, choose) -> None:
        """Recompute `batch_num_images`, so that an image kept from a group is not treated as a single one."""
        alone, chosen = is_alone(inputs), []

        def choose_and_note(first: list[Placement]) -> list[int]:
            items = choose(first)
            chosen.extend(alone[item] for item in items if first[0].modality == "image")
            return items

        super().select_items(config, placements, inputs, choose_and_note)
        inputs.pop("batch_num_images", None)
        if not all(chosen):
            inputs["batch_num_images"] = torch.tensor(group_sizes(chosen))


def is_alone(inputs: dict[str, Any]) -> list[bool]:
    """Say of each image whether it is the only one of its group, as `batch_num_images` counts them."""
    counts, sizes = inputs.get("batch_num_images"), inputs.get("image_sizes")
    if counts is None:
        return [True] * (0 if sizes is None else len(sizes))
    return [count == 1 for count in torch.as_tensor(counts).flatten().tolist() for _ in range(count)]


def group_sizes(alone: list[bool]) -> list[int]:
    """Return a `batch_num_images` by which each image is alone, or one of several, as said here.

    Raises:
        ValueError: if a single image that is one of several would precede others.
    """
    groups = [(one, len([*run])) for one, run in groupby(alone)]
    countable = all(one or count > 1 for one, count in groups[:-1])
    must = "new images that are one of several must come last, or be several"
    require(countable, "generate", must, f"{alone} (alone or not)", "continue row by row")
    # the teacher reads as many images as there are sizes, so the last group may be counted too large
    return [n for one, count in groups for n in ([1] * count if one else [max(count, 2)])]


def image_segments(config: PreTrainedConfig, side: int, size: list[int] | None) -> list[Tensor]:
    """Return the segments of an image of that (height, width); None = it is shown by its base view only."""
    base = grid_coordinates(1, side, side)
    if size is None:
        return [with_newlines(base, side * side)]
    tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    padded = torch.empty(1, *(count * side for count in tiles), device="meta")
    height, width = unpad_image(padded, size).shape[1:]
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return [base, with_newlines(grid_coordinates(1, height, width), width)]


def video_segments(frames: int, side: int) -> list[Tensor]:
    """Return the segment of a video: every frame pooled to half its side, one newline at the end."""
    pooled = math.ceil(side / 2)
    coordinates = grid_coordinates(frames, pooled, pooled)
    return [with_newlines(coordinates, len(coordinates))]
