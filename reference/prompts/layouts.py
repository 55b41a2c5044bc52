"""How each family's prompts show images and videos: one class per layout, from processor output to segments.

Letters: grid T Y X in tokens, after the teacher's own merge; s tokens on a side of a square tile.

    Qwen2-VL, Qwen2.5-VL    an image or video is one run, T·Y·X
    Qwen3-VL                likewise, but a run per frame of a video, a timestamp before each
    LLaVA-OneVision         an image is its base view, s·s, and the whole at full resolution, a newline token
                            after each row; one of several is s·s and a newline; a video T·⌈s/2⌉² and one
    InternVL                a run of square tiles; a video is a run of one tile per frame
    Idefics3, SmolVLM       rows and columns of square tiles, a marker before each, then the whole as a tile

Choice: where tiles are numbered in the prompt, they are one segment, tokens next to each other in the image
next to each other in its grid. InternVL does not say how its tiles lie, and neither InternVL nor SmolVLM
tells frames of a video from images but in words; there each tile and each frame is a segment of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from .grids import Placement, grid_cells, place, with_newlines


class Vision:
    """The vision layout of a family; its own define `arguments` and `placements`.

    Attributes:
        arguments: by modality, those arguments of the teacher's forward that bring images or videos, one row
            (or `rows_per_item`) for each.
    """

    arguments: ClassVar[dict[str, tuple[str, ...]]] = {}

    def placements(
        self, config: PreTrainedConfig, input_ids: Tensor, inputs: dict[str, Any]
    ) -> list[Placement]:
        """Return the segments of a batch.

        Args:
            config: the teacher's or student's.
            input_ids: (B, L) int64, prompts with placeholder tokens.
            inputs: the arguments of forward.
        Raises:
            ValueError: if placeholders and inputs do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__}.placements")

    @property
    def names(self) -> tuple[str, ...]:
        """All arguments that bring images or videos."""
        return tuple(name for names in self.arguments.values() for name in names)

    def given(self, inputs: dict[str, Any]) -> bool:
        """Say whether the arguments of a forward bring images or videos."""
        return any(inputs.get(name) is not None for name in self.names)

    def rows_per_item(self, config: PreTrainedConfig, name: str, tokens: Tensor) -> Tensor:
        """(items,) rows of an argument that belong to each item, from the items' tokens (items,)."""
        return torch.ones_like(tokens)

    def drop_cached(
        self, config: PreTrainedConfig, placements: list[Placement], past: int, inputs: dict[str, Any]
    ) -> None:
        """Drop from `inputs` what the cache of `past` tokens has seen: images and videos that begin there."""
        self.take(config, placements, inputs, lambda first: [p.item for p in first if p.start >= past])

    def repeat_rows(
        self, config: PreTrainedConfig, placements: list[Placement], times: int, inputs: dict[str, Any]
    ) -> None:
        """Give each of `times` copies of a row, which follow one another, its images and videos."""

        def repeated(first: list[Placement]) -> list[int]:
            rows = [[p.item for p in first if p.row == row] for row in sorted({p.row for p in first})]
            return [item for items in rows for item in items * times]

        self.take(config, placements, inputs, repeated)

    def take(
        self,
        config: PreTrainedConfig,
        placements: list[Placement],
        inputs: dict[str, Any],
        choose: Callable[[list[Placement]], list[int]],
    ) -> None:
        """Keep in `inputs` what `choose` picks of the images, then of the videos, by their first segments."""
        for modality, names in self.arguments.items():
            own = [p for p in placements if p.modality == modality]
            first = {p.item: p for p in reversed(own)}
            chosen = choose([first[item] for item in sorted(first)])
            tokens = torch.tensor(
                [sum(len(p.positions) for p in own if p.item == item) for item in sorted(first)],
                dtype=torch.int64,
            )
            for name in names:
                value = inputs.pop(name, None)
                if value is None or not chosen:
                    continue
                parts = torch.as_tensor(value).split(self.rows_per_item(config, name, tokens).tolist())
                inputs[name] = torch.cat([parts[item] for item in chosen])


class Qwen2Vision(Vision):
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
            items = ([grid_cells(t, y // merge, x // merge)] for t, y, x in grids)
            token_id = getattr(config, f"{modality}_token_id")
            apart = self.frames_apart and modality == "video"
            placements += place(input_ids, token_id, modality, items, text_between=apart)
        return placements

    def rows_per_item(self, config, name, tokens) -> Tensor:
        """Pixels have a row per patch."""
        merge = config.vision_config.spatial_merge_size
        return tokens * merge**2 if name.startswith("pixel_values") else torch.ones_like(tokens)


class Qwen3Vision(Qwen2Vision):
    """Qwen2Vision, but a video's frames stand apart, a timestamp in the text before each."""

    frames_apart = True


class LlavaOnevisionVision(Vision):
    """Newline tokens are placeholders too; `image_sizes` (height, width) say what is left of the padding."""

    arguments: ClassVar = {
        "image": ("pixel_values", "image_sizes"),
        "video": ("pixel_values_videos", "image_sizes_videos"),
    }

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return two segments per image alone in its row, one per other image, one per video."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        sizes = inputs.get("image_sizes")
        sizes = [] if sizes is None else torch.as_tensor(sizes).tolist()
        alone = self.alone(inputs)
        images = (self.image(config, side, size if one else None) for size, one in zip(sizes, alone))  # noqa: B905
        videos = inputs.get("pixel_values_videos")
        pooled = math.ceil(side / 2)
        grids = (grid_cells(len(frames), pooled, pooled) for frames in ([] if videos is None else videos))
        videos = ([with_newlines(cells, len(cells))] for cells in grids)
        return [
            *place(input_ids, config.image_token_id, "image", images),
            *place(input_ids, config.video_token_id, "video", videos),
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """All arguments that bring images or videos, the numbers of images among them."""
        return (*super().names, "batch_num_images")

    @staticmethod
    def alone(inputs: dict[str, Any]) -> list[bool]:
        """Say of each image whether it is the only one of its group, as `batch_num_images` counts them."""
        counts, sizes = inputs.get("batch_num_images"), inputs.get("image_sizes")
        if counts is None:
            return [True] * (0 if sizes is None else len(sizes))
        return [count == 1 for count in torch.as_tensor(counts).flatten().tolist() for _ in range(count)]

    @staticmethod
    def image(config: PreTrainedConfig, side: int, size: list[int] | None) -> list[Tensor]:
        """The segments of an image of that (height, width), or of one shown by its base view only (None)."""
        base = grid_cells(1, side, side)
        if size is None:
            return [with_newlines(base, side * side)]
        tiles = get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        padded = torch.empty(1, *(count * side for count in tiles), device="meta")
        height, width = unpad_image(padded, size).shape[1:]
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return [base, with_newlines(grid_cells(1, height, width), width)]

    def take(self, config, placements, inputs, choose) -> None:
        """Count groups of images anew, so that each stays alone, or one of several, as it was."""
        alone, chosen = self.alone(inputs), []

        def remembered(first: list[Placement]) -> list[int]:
            items = choose(first)
            chosen.extend(item for item in items if first[0].modality == "image")
            return items

        super().take(config, placements, inputs, remembered)
        inputs.pop("batch_num_images", None)
        kept = [alone[item] for item in chosen]
        if all(kept):
            return
        groups = [(one, len([*run])) for one, run in groupby(kept)]
        countable = all(one or count > 1 for one, count in groups[:-1])
        must = "new images that are one of several must come last, or be several"
        require(countable, "generate", must, f"{kept} (alone or not)", "continue row by row")
        counts = [n for one, count in groups for n in ([1] * count if one else [max(count, 2)])]
        inputs["batch_num_images"] = torch.tensor(counts)  # the teacher reads as many as there are sizes


class InternVLVision(Vision):
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
        tiles = [] if pixels is None else [[grid_cells(1, height, width)]] * len(pixels)
        return place(input_ids, config.image_token_id, "image", tiles)


class Idefics3Vision(Vision):
    """Tiles are s·s tokens after two markers, <fake_token_around_image> and the tile's own.

    `pixel_values` is (B, most tiles of a row, 3, height, width), rows filled up with zeros, which the teacher
    leaves out.
    """

    arguments: ClassVar = {"image": ("pixel_values", "pixel_attention_mask")}

    def placements(self, config, input_ids, inputs) -> list[Placement]:
        """Return two segments per image: its tiles as one grid if it was split, and the whole."""
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        pixels = inputs.get("pixel_values")
        whole = grid_cells(1, side, side)
        count = 0 if pixels is None else int((input_ids == config.image_token_id).sum()) // len(whole)
        tiles = place(input_ids, config.image_token_id, "image", [[whole]] * count)
        placements, item = [], 0
        for row, ids in enumerate(input_ids.tolist()):
            in_row = [tile for tile in tiles if tile.row == row]
            for image in split_images(in_row, ids):
                *parts, last = image
                if parts:
                    placements.append(mosaic(parts, item, side))
                placements.append(Placement(row, "image", item, last.positions, last.cells))
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
            for name in self.names:
                inputs.pop(name, None)

    def repeat_rows(self, config, placements, times, inputs) -> None:
        """Pixels have the rows of the batch."""
        for name in self.names:
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
    require(len(lengths) == 1, "Idefics3Vision", must, f"rows of {lengths}", "pass linmu_coords")
    cells = [
        tile.cells + torch.tensor([0, y * side, x * side])
        for y, tiles in enumerate(rows)
        for x, tile in enumerate(tiles)
    ]
    positions = torch.cat([tile.positions for tile in tiles])
    return Placement(tiles[0].row, "image", item, positions, torch.cat(cells))
