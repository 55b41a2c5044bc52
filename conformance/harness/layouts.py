"""Token layouts of prompts: text, images and videos on their grids, text between rows or frames, padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor

TEXT = (-1, -1, -1, -1)
MAX_LENGTH = 24


@dataclass(frozen=True)
class Text:
    tokens: int

    def cells(self) -> list[tuple[int, ...]]:
        return [TEXT] * self.tokens

    def valid(self) -> list[bool]:
        return [True] * self.tokens


@dataclass(frozen=True)
class Pad(Text):
    """Padding: the coordinates of text, and not valid."""

    def valid(self) -> list[bool]:
        return [False] * self.tokens


@dataclass(frozen=True)
class Vision:
    """One segment in raster order; `gap` = "row" or "frame" puts `between` between those: one text token, or
    more, or padding."""

    segment: int
    grid_thw: tuple[int, int, int]
    gap: str = ""
    between: Text = Text(1)

    def cells(self) -> list[tuple[int, ...]]:
        frames, rows, columns = self.grid_thw
        cells: list[tuple[int, ...]] = []
        for t in range(frames):
            for y in range(rows):
                new_row, new_frame = bool(cells), bool(cells) and y == 0
                if (self.gap == "row" and new_row) or (self.gap == "frame" and new_frame):
                    cells += self.between.cells()
                cells += [(self.segment, t, y, x) for x in range(columns)]
        return cells

    def valid(self) -> list[bool]:
        """All cells are, and so is what is between unless it is padding."""
        padding = isinstance(self.between, Pad)
        return [not (padding and cell == TEXT) for cell in self.cells()]


Part = Text | Vision


@dataclass(frozen=True)
class Layout:
    """A batch of rows of equal length, each a tuple of parts."""

    rows: tuple[tuple[Part, ...], ...]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return len(self.rows), sum(len(part.cells()) for part in self.rows[0])

    @cached_property
    def coords(self) -> Tensor:
        """(B, L, 4) int64."""
        return torch.tensor([[cell for part in row for cell in part.cells()] for row in self.rows])

    @cached_property
    def segment(self) -> Tensor:
        """(B, L) int64, -1 on text and padding."""
        return self.coords[..., 0]

    @cached_property
    def valid(self) -> Tensor:
        """(B, L) bool."""
        return torch.tensor([[there for part in row for there in part.valid()] for row in self.rows])

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(segment, first position, position after the last) of every segment of a row."""
        found, start = [], 0
        for part in self.rows[row]:
            stop = start + len(part.cells())
            if isinstance(part, Vision):
                found.append((part.segment, start, stop))
            start = stop
        return found

    @cached_property
    def span(self) -> Tensor:
        """(B, L) int64: the segment whose span covers the token, text inside it included; -1 outside."""
        covers = torch.full(self.shape, -1)
        for row in range(self.shape[0]):
            for segment, start, stop in self.spans(row):
                covers[row, start:stop] = segment
        return covers

    def cuts(self) -> list[int]:
        """Positions c where splitting into [:c] and [c:] cuts no span of any row."""
        inside = {c for row in range(self.shape[0]) for _, i, j in self.spans(row) for c in range(i + 1, j)}
        return [c for c in range(1, self.shape[1]) if c not in inside]

    def sees(self) -> Tensor:
        """(B, L, L) bool: whether token i may depend on token j, not after i or in the span of i."""
        position = torch.arange(self.shape[1])
        earlier = position[:, None] >= position[None, :]
        same_span = (self.span[:, :, None] == self.span[:, None, :]) & (self.span >= 0)[:, :, None]
        return (earlier | same_span) & self.valid[:, :, None] & self.valid[:, None, :]

    def only(self, row: int) -> Layout:
        """The layout of one row alone."""
        return Layout((self.rows[row],))

    def padded(self, left: int, right: int) -> Layout:
        """The same rows with more padding on both sides."""
        return Layout(tuple((Pad(left), *row, Pad(right)) for row in self.rows))

    def renumbered(self, numbers: list[int]) -> Layout:
        """The same rows with segment id i replaced by numbers[i]."""

        def rename(part: Part) -> Part:
            return replace(part, segment=numbers[part.segment]) if isinstance(part, Vision) else part

        return Layout(tuple(tuple(map(rename, row)) for row in self.rows))


LONG_PROMPTS = Layout(
    (
        (Text(50), Vision(1, (1, 5, 6), "row"), Text(3), Vision(0, (4, 2, 9), "frame"), Text(6)),
        (Pad(9), Vision(0, (1, 3, 3)), Vision(1, (1, 3, 3)), Text(141)),
    )
)
GRIDS = (
    (1, 1, 1),
    (1, 2, 3),
    (1, 3, 2),
    (1, 1, 5),
    (1, 3, 3),
    (2, 2, 2),
    (3, 1, 2),
    (2, 3, 2),
    (5, 1, 1),
    (3, 2, 2),
)
VISIONS = st.builds(Vision, st.just(0), st.sampled_from(GRIDS), st.sampled_from(("", "row", "frame")))
TEXTS = st.builds(Text, st.integers(1, 5))
PADS = st.builds(Pad, st.integers(1, 3))


@st.composite
def rows_of_parts(draw: st.DrawFn) -> tuple[Part, ...]:
    """Up to five parts and MAX_LENGTH tokens; the segments are numbered in any order."""
    kinds = (VISIONS, TEXTS, VISIONS, TEXTS, VISIONS, PADS)
    parts = draw(st.lists(st.one_of(*kinds), min_size=1, max_size=5))
    while sum(len(part.cells()) for part in parts) > MAX_LENGTH:
        parts.pop()
    segments = draw(st.permutations(range(sum(isinstance(part, Vision) for part in parts))))
    numbers = iter(segments)
    return tuple(replace(part, segment=next(numbers)) if isinstance(part, Vision) else part for part in parts)


@st.composite
def layouts(draw: st.DrawFn, max_rows: int = 3, few: bool = False) -> Layout:
    """Rows of unequal length, padded left, right or on both sides; `few`: two rows of MAX_LENGTH tokens."""
    rows = draw(st.lists(rows_of_parts(), min_size=2 if few else 1, max_size=2 if few else max_rows))
    lengths = [sum(len(part.cells()) for part in row) for row in rows]
    longest = MAX_LENGTH if few else max(lengths)
    padded = []
    for row, length in zip(rows, lengths, strict=True):
        free = longest - length
        left = draw(st.sampled_from((0, free, free // 2)))
        around = ((Pad(left),) if left else ()), ((Pad(free - left),) if free - left else ())
        padded.append((*around[0], *row, *around[1]))
    return Layout(tuple(padded))
