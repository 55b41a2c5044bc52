"""Endless questions about pictures and short videos of handwritten digits.

Item i of a dataset is a pure function of (seed, split, i): any order, batch size or number of workers gives
the same items. Asking for many at once (`__getitems__`, as torch's DataLoader does) is much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digits import FRAMES_PER_MOMENT, SPLITS, Warp, render
from .draws import Draws, sample_keys
from .scenes import BUILDERS

KINDS = tuple(BUILDERS)
FRAMES_PER_SECOND = 2.0  # with a temporal patch of two frames: one second a moment


class DigitsQuestions(Dataset):
    """Questions in the format of users' data: items {"kind": str, "messages": [user turn, assistant turn]}.

    Args:
        split: "train" (varied handwriting) or "heldout" (other images, as they are).
        seed: another seed, other questions.
        length: number of items, items beyond it exist but are not counted.
        kinds: question kinds, drawn equally often; one named twice is drawn twice as often.
        warp: variation of training digits; None shows the images as they are.
    Raises:
        ValueError: for an unknown split or kind, or a negative seed.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        length: int = 1_000_000,
        kinds: Sequence[str] = KINDS,
        warp: Warp | None = Warp(),  # noqa: B008 (frozen)
    ):
        if split not in SPLITS:
            raise ValueError(f"DigitsQuestions: split must be one of {SPLITS}, got {split!r}")
        if unknown := sorted(set(kinds) - set(KINDS)) or not kinds:
            raise ValueError(f"DigitsQuestions: kinds must be among {KINDS}, got {unknown or 'none'}")
        if seed < 0:
            raise ValueError(f"DigitsQuestions: seed must be >= 0, got {seed}")
        self.split, self.seed, self.length = split, seed, length
        self.asked = tuple(kinds)
        self.warp = warp if split == "train" else None

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of questions asked."""
        return self.asked

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.length <= index < self.length:
            raise IndexError(f"DigitsQuestions: index must be below {self.length}, got {index}")
        return self.__getitems__([index % self.length])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of several indices."""
        return [item for item, _ in self._build(indices)]

    def grids(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return what the pictures of several items show: each (T, Y, X) int64, -1 in blank cells."""
        return [grid for _, grid in self._build(indices)]

    def _build(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], np.ndarray]]:
        draws = Draws(sample_keys(self.seed, SPLITS.index(self.split), np.asarray(indices, np.int64)))
        which = draws.integers(0, len(self.asked))
        built: list[Any] = [None] * len(indices)
        for place in np.unique(which):
            rows = np.flatnonzero(which == place)
            for row, pair in zip(rows, self._build_kind(self.asked[place], draws.take(rows)), strict=True):
                built[row] = pair
        return built

    def _build_kind(self, kind: str, draws: Draws) -> list[tuple[dict[str, Any], np.ndarray]]:
        scenes = BUILDERS[kind](draws)
        pictures = render(self.split, scenes.labels, scenes.things, draws, self.warp)
        cell = pictures.shape[2] // scenes.labels.shape[2]
        pairs = []
        for n, (t, y, x) in enumerate(scenes.sizes):
            block = _vision_block(pictures[n, :t, : y * cell, : x * cell])
            messages = conversation(block, scenes.questions[n], scenes.answers[n])
            pairs.append(({"kind": kind, "messages": messages}, scenes.labels[n, :t, :y, :x]))
        return pairs


def _vision_block(moments: np.ndarray) -> dict[str, Any]:
    """Make an image of one moment, a video of several: (T, height, width) uint8, grey."""
    colour = np.repeat(moments[..., None], 3, axis=-1)
    if len(colour) == 1:
        return {"type": "image", "image": Image.fromarray(colour[0])}
    frames = np.repeat(colour, FRAMES_PER_MOMENT, axis=0)
    return {"type": "video", "video": frames, "fps": FRAMES_PER_SECOND}


def conversation(block: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """Return a user turn that shows and asks, and the assistant turn that answers."""
    return [
        {"role": "user", "content": [block, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
