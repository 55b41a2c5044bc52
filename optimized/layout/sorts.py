"""The sorts behind `layout.py`: whole numbers on the device of the coordinates, for all rows in one go.

Letters: B batch, L tokens, n = B·L of them, K scan orders. One stable sort by segment tells whether segments
interleave; orders and windows then sort its places by keys of several digits, the segment first. Every torch
call costs a GPU's host as much as a small kernel runs, and a model's first layers wait for them all: hence
few calls over many numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...reference.checks import require_int64
from ...reference.layout import SCAN_AXES
from ...reference.layout import check_coords as explain_coords
from .segments import parted
from .tokens import flat_order

LARGEST_KEY = 2**62


class Facts(NamedTuple):
    """What is known of coordinates that are well formed."""

    vision: int  # tokens
    largest: list[int]  # number of each column
    place: Tensor  # (B, L) int64: text, then the segments by their numbers, each in prompt order


class Sorted(NamedTuple):
    """The tokens of a prompt row by row: text, then the segments by their numbers, each in prompt order.

    Text is a segment of its row. Keys are joined as they are if `narrow`, see `joined`.
    """

    token: Tensor  # (n,) int64, in the flattened batch
    columns: Tensor  # (4, n), coords
    segment: Tensor  # (n,), never falling: a number for each segment of each row, from -1
    segments: int  # above all of these
    largest: list[int]  # number of each column
    narrow: bool


def examine(coords: Tensor, where: str) -> Facts:
    """`check_coords`, and what the device tells with it: the one question that it is asked."""
    require_int64(where, "coords", coords, (None, None, 4), "B, L, 4")
    ids, place = coords[..., 0].sort(dim=1, stable=True)
    if not coords.numel():
        return Facts(0, [-1] * 4, place)
    inside = coords >= 0
    mixed = (inside != inside[..., :1]).sum()
    rank = inside[..., 0].cumsum(1)
    apart = parted(ids, rank.gather(1, place)).sum()
    lowest, largest = coords.flatten(0, 1).aminmax(dim=0)
    told = torch.cat([mixed[None], apart[None], lowest, largest, rank[:, -1]]).tolist()
    if any(told[:2]) or min(told[2:6]) < -1:
        explain_coords(coords, where)
    return Facts(sum(told[10:]), told[6:10], place)


def by_segment(coords: Tensor, facts: Facts) -> Sorted:
    """The coordinates in the order of their segments; in 32 bits, whose sorts take half as long, if all keys
    fit."""
    batch, largest = len(coords), facts.largest
    segments = batch * (largest[0] + 2)
    widest = len(SCAN_AXES) * (segments + 2) * (max(largest[1:]) + 2) ** 3
    narrow = widest < LARGEST_KEY
    token = flat_order(facts.place)
    columns = coords.flatten(0, 1).t().index_select(1, token)
    if widest < 2**31:
        columns = columns.int()
    segment = columns[0]
    if batch > 1:
        row = torch.arange(batch, dtype=segment.dtype, device=segment.device)[:, None]
        segment = joined([row, segment.view_as(facts.place)], [batch, largest[0] + 2], narrow).flatten()
    if not narrow:
        segment, segments = number(segment), len(segment)
    return Sorted(token, columns, segment, segments, largest, narrow)


def joined(keys: list[Tensor], extents: list[int], narrow: bool) -> Tensor:
    """One key that sorts as several do one after the other, the first counting most. Those after it lie from
    -1 to their extents less two, and where one is -1 all that follow are.

    Unless they are narrow, so that the product of their extents is below 2^62, each is numbered first: one
    sort apiece.
    """
    whole = keys[0]
    for key, extent in zip(keys[1:], extents[1:], strict=True):
        if not narrow:
            whole, key = number(whole), number(key)
            extent = key.numel()
        whole = torch.add(key, whole, alpha=extent)
    return whole


def number(keys: Tensor) -> Tensor:
    """Whole numbers -> their ranks from 0, equal ones alike."""
    return keys.unique(return_inverse=True)[1]


def scan_rows(prompt: Sorted, scans: tuple[tuple[int, ...], ...] = SCAN_AXES) -> Tensor:
    """(K, n) int64: the flattened batch in K scan orders, each given by its columns, most significant first.

    One sort for all: the number of the order leads. Text is a segment whose keys are all equal, so a stable
    sort leaves it where it was.
    """
    columns, extent = prompt.columns, max(prompt.largest[1:]) + 2
    which = torch.arange(len(scans), dtype=columns.dtype, device=columns.device)[:, None]
    digits = torch.stack([columns[axes[digit]] for digit in range(3) for axes in scans]).chunk(3)
    extents = [len(scans), prompt.segments + 1, *[extent] * 3]
    key = joined([which, prompt.segment, *digits], extents, prompt.narrow)  # (K, n)
    place = key.flatten().argsort(stable=True) % max(1, key.shape[1])
    position = prompt.token.expand(key.shape)
    return torch.empty_like(position).scatter_(1, position, prompt.token[place].view(key.shape))


def window_keys(prompt: Sorted, window_thw: tuple[int, int, int], shifted: bool) -> tuple[Tensor, Tensor]:
    """Keys (n,), never falling and equal within a window, and the token of each; text is last, in one window.

    Eq. (1) of the reference; an axis on which every token lies in the first window says nothing.
    """
    axes = [axis for axis, size in enumerate(window_thw) if prompt.largest[1 + axis] >= size]
    keys = [prompt.segment.masked_fill(prompt.columns[0] < 0, prompt.segments)]
    extents = [prompt.segments + 1]
    reach = reaches(prompt) if shifted and axes else None
    for axis in axes:
        column, size = prompt.columns[1 + axis], window_thw[axis]
        if reach is not None:
            column = torch.add(column, reach[axis] >= size, alpha=size // 2)
        keys.append(column.div(size, rounding_mode="floor"))
        extents.append((prompt.largest[1 + axis] + size // 2) // size + 2)
    key, place = joined(keys, extents, prompt.narrow).sort(stable=True)
    return key, prompt.token[place]


def reaches(prompt: Sorted) -> Tensor:
    """(3, n): the largest less the smallest t, y and x in each token's segment."""
    grid = prompt.columns[1:]
    both = torch.cat([grid, -grid])  # (6, n): a smallest is a largest, negated
    first = torch.searchsorted(prompt.segment, prompt.segment).expand_as(both)  # a place for each segment
    found = torch.full_like(both, torch.iinfo(both.dtype).min).scatter_reduce_(1, first, both, "amax")
    return found.view(2, 3, -1).sum(0).gather(1, first[:3])


def window_numbers(prompt: Sorted, vision: Tensor, window_thw: tuple[int, int, int], shifted: bool) -> Tensor:
    """(B, L): windows of a row numbered by their first token, -1 on text; `vision` (B, L) bool."""
    key, token = window_keys(prompt, window_thw, shifted)
    first = torch.searchsorted(key, key)
    first_token = torch.empty_like(token).scatter_(0, token, token[first])  # of each token's window
    opens = (first_token == torch.arange(len(token), device=token.device)).view(vision.shape) & vision
    rank = opens.flatten().cumsum(0)[first_token].view(vision.shape) - 1
    before = opens.sum(1).cumsum(0) - opens.sum(1)  # windows of the rows before, (B,)
    return torch.where(vision, rank - before[:, None], -1)
