"""How prompts show images and videos, from processor output to segments: what the families have in common.

Letters: grid T Y X in tokens, after the teacher's own merge; s tokens on a side of a square tile.

    Qwen2-VL, Qwen2.5-VL    an image or video is one run, T·Y·X
    Qwen3-VL                likewise, but a run per frame of a video, a timestamp before each
    LLaVA-OneVision         an image is its base view, s·s, and the whole at full resolution, a newline token
                            after each row; one of several is s·s and a newline; a video T·⌈s/2⌉² and one
    InternVL                a run of square tiles; a video is a run of one tile per frame
    Idefics3, SmolVLM       rows and columns of square tiles, a marker before each, then the whole as a tile

Choice: where tiles are numbered in the prompt, they are one segment, tokens next to each other in the image
next to each other in its grid. InternVL does not say how its tiles lie, and neither InternVL nor SmolVLM
tells frames of a video from images except in words; there each tile and each frame is a segment of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .grids import Placement


class PromptLayout:
    """Where the prompts of a family have images and videos; a subclass defines `arguments` and `placements`.

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
    def argument_names(self) -> tuple[str, ...]:
        """All arguments that bring images or videos."""
        return tuple(name for names in self.arguments.values() for name in names)

    def has_vision(self, inputs: dict[str, Any]) -> bool:
        """Say whether the arguments of a forward bring images or videos."""
        return any(inputs.get(name) is not None for name in self.argument_names)

    def rows_per_item(self, config: PreTrainedConfig, name: str, tokens: Tensor) -> Tensor:
        """(items,) rows of an argument that belong to each item, from the items' tokens (items,)."""
        return torch.ones_like(tokens)

    def drop_cached(
        self, config: PreTrainedConfig, placements: list[Placement], past: int, inputs: dict[str, Any]
    ) -> None:
        """Drop from `inputs` the images and videos that begin in the cache's `past` tokens."""
        self.select_items(
            config, placements, inputs, lambda first: [p.item for p in first if p.start >= past]
        )

    def repeat_rows(
        self, config: PreTrainedConfig, placements: list[Placement], times: int, inputs: dict[str, Any]
    ) -> None:
        """Repeat every row's images and videos `times` times, as `repeat_interleave` repeats input_ids."""

        def repeated(first: list[Placement]) -> list[int]:
            rows = [[p.item for p in first if p.row == row] for row in sorted({p.row for p in first})]
            return [item for items in rows for item in items * times]

        self.select_items(config, placements, inputs, repeated)

    def select_items(
        self,
        config: PreTrainedConfig,
        placements: list[Placement],
        inputs: dict[str, Any],
        choose: Callable[[list[Placement]], list[int]],
    ) -> None:
        """Reduce `inputs` to some of its images, then of its videos.

        Args:
            config: the teacher's or student's.
            placements: the segments of the batch.
            inputs: the arguments of forward, changed in place.
            choose: the first segment of every item -> the indices of those to keep, repetitions allowed.
        """
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
