"""A film of handwritten digits that does not end: scenes of the demo's questions, one after another.

Every frame is a grid of 4 × 4 cells, 32 × 32 pixels, two frames a moment, two frames a second. A scene lasts
one to four moments and has a question of its own: what moved which way, when, what changed, how often. The
scenes are a function of seed and split. Letters: F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .digits import CELL, FRAMES_PER_MOMENT
from .questions import FRAMES_PER_SECOND, DigitsQuestions
from .scenes import VIDEO_GRID

FILM_KINDS = ("moved", "moment", "changed", "count")
# Of images, on which "count" is asked, one in nine is small enough, so that it is drawn nine times as often.
DRAWN_KINDS = (*FILM_KINDS, *("count",) * 8)
DRAWN_AT_ONCE = 256


@dataclass(frozen=True)
class Scene:
    """A part of the film.

    Attributes:
        kind: of its question, one of `FILM_KINDS`.
        question, answer: about this scene.
        frames: (F, 32, 32, 3) uint8.
    """

    kind: str
    question: str
    answer: str
    frames: np.ndarray

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.frames) / FRAMES_PER_SECOND


def digits_film(split: str = "heldout", seed: int = 0) -> Iterator[Scene]:
    """Yield the scenes of an endless film.

    Args:
        split: of the handwriting, "train" or "heldout".
        seed: another seed, another film.
    Raises:
        ValueError: for another split, or a negative seed.
    """
    height, width = (cells * CELL for cells in VIDEO_GRID)
    questions = DigitsQuestions(split, seed, kinds=DRAWN_KINDS)
    for start in range(0, len(questions), DRAWN_AT_ONCE):
        indices = range(start, start + DRAWN_AT_ONCE)
        grids = questions.grids(indices)
        fitting = [
            i
            for i, grid in zip(indices, grids, strict=True)
            if grid.shape[1] <= VIDEO_GRID[0] and grid.shape[2] <= VIDEO_GRID[1]
        ]
        for item in questions.__getitems__(fitting):
            asked, answered = item["messages"]
            text, block = asked["content"]
            still = "image" in block  # shown for one moment
            shown = [np.asarray(block["image"])] * FRAMES_PER_MOMENT if still else block["video"]
            frames = np.zeros((len(shown), height, width, 3), np.uint8)
            frames[:, : shown[0].shape[0], : shown[0].shape[1]] = shown
            yield Scene(item["kind"], text["text"], answered["content"][0]["text"], frames)
