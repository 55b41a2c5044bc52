"""Endless questions about pictures and short videos of handwritten digits.

Item i of a dataset is a pure function of (seed, split, i): any order, batch size or number of workers gives
the same items. Asking for many at once (`__getitems__`, as torch's DataLoader does) is much faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digits import CELL, FRAMES_PER_MOMENT, SPLITS, Warp, render
from .draws import Draws, sample_keys
from .scenes import BUILDERS, Scenes

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

    builders = BUILDERS

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
        if not kinds or set(kinds) - set(self.builders):
            must = f"kinds must be among {tuple(self.builders)}"
            raise ValueError(f"{type(self).__name__}: {must}, got {tuple(kinds)}")
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
        built: list[Any] = [None] * len(indices)
        for rows, kind, scenes, draws in self._scenes(indices):
            pictures = render(self.split, scenes.labels, scenes.things, draws, self.warp)
            for n, row in enumerate(rows):
                t, y, x = scenes.sizes[n]
                block = _vision_block(pictures[n, :t, : y * CELL, : x * CELL])
                messages = conversation(block, scenes.questions[n], scenes.answers[n])
                built[row] = {"kind": kind, "messages": messages}
        return built

    def grids(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return what the pictures of several items show: each (T, Y, X) int64, -1 in blank cells."""
        built: list[Any] = [None] * len(indices)
        for rows, _, scenes, _ in self._scenes(indices):
            for row, labels, (t, y, x) in zip(rows, scenes.labels, scenes.sizes, strict=True):
                built[row] = labels[:t, :y, :x]
        return built

    def texts(self, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Return question and answer of several items, without drawing their pictures."""
        built: list[Any] = [None] * len(indices)
        for rows, _, scenes, _ in self._scenes(indices):
            for row, question, answer in zip(rows, scenes.questions, scenes.answers, strict=True):
                built[row] = question, answer
        return built

    def _scenes(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, str, Scenes, Draws]]:
        """Yield, kind by kind: places among the indices, the kind, its scenes, draws for their pictures."""
        draws = Draws(sample_keys(self.seed, SPLITS.index(self.split), np.asarray(indices, np.int64)))
        which = draws.integers(0, len(self.asked))
        for place in np.unique(which):
            rows = np.flatnonzero(which == place)
            own = draws.take(rows)
            yield rows, self.asked[place], self.builders[self.asked[place]](own), own


def _vision_block(moments: np.ndarray) -> dict[str, Any]:
    """Make an image of one moment, a video of several: (T, height, width) uint8, grey."""
    colour = np.repeat(moments[..., None], 3, axis=-1)
    if len(colour) == 1:
        return {"type": "image", "image": Image.fromarray(colour[0])}
    frames = np.repeat(colour, FRAMES_PER_MOMENT, axis=0)
    return {"type": "video", "video": frames, "fps": FRAMES_PER_SECOND}


def conversation(block: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """Return a user turn that asks and shows, and the assistant turn that answers.

    Choice: the question comes first, so that a model can look at the picture with the question in mind. A
    model that keeps a state of constant size must know what to keep.
    """
    return [
        {"role": "user", "content": [{"type": "text", "text": question}, block]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
