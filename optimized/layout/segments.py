"""What both engines of the scan need to know about segments: (B, L) integers, a few torch calls, no loop."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST, LONGEST = 16, 128  # chunks, in tokens: all are powers of two between


def vision_mask(segment: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """(B, L) bool, True on vision tokens that are not padding; None if there is no segment at all."""
    if segment is None:
        return None
    return segment >= 0 if valid is None else (segment >= 0) & valid


def next_segment(segment: Tensor, vision: Tensor, chunk: int, after: Tensor | None = None) -> Tensor:
    """The segment of the first vision token at or after the start of each chunk, and after the end.

    A chunk's tokens of segment `next_segment[k + 1]` read the reverse state that enters from its right;
    those of segment `next_segment[k]` write to what leaves at its left; it passes through where the two are
    equal.

    Args:
        segment: (B, L) int64; no two segments interleave.
        vision: (B, L) bool.
        chunk: tokens per chunk.
        after: (B,) int64, the segment of the first vision token behind these L; None = none follows.
    Returns:
        (B, K + 1) int64, -1 where no vision token follows.
    """
    return following(torch.where(vision, segment, -1), chunk, after=after)


def following(segment: Tensor, chunk: int, beyond: int = 1, after: Tensor | None = None) -> Tensor:
    """`next_segment` of segments that are -1 on all but vision tokens, for so many chunks beyond the end."""
    length = segment.shape[1]
    filled = torch.nn.functional.pad(segment, (0, -length % chunk + beyond * chunk), value=-1)
    last = filled.shape[1] - 1
    if after is not None:
        filled[:, last] = after
    position = torch.where(filled >= 0, torch.arange(last + 1, device=segment.device), last)
    first = position.unflatten(1, (-1, chunk)).amin(2)  # by chunk, as a GPU scans a long row slowly
    return filled.gather(1, first.flip(1).cummin(1).values.flip(1))  # the next vision token, or the last


def openings(segment: Tensor, after: Tensor | None = None) -> Tensor:
    """`next_segment` for chunks of any length, which `openings_of` picks: (B, many + 1) int64; -1 on text."""
    beyond = 1 + LONGEST // SHORTEST  # a longer chunk ends among those beyond
    return following(segment, SHORTEST, beyond, after)


def openings_of(openings: Tensor, length: int, chunk: int) -> Tensor:
    """`next_segment` for chunks of this many tokens."""
    step = chunk // SHORTEST
    return openings[:, : -(-length // chunk) * step + 1 : step]


def interleaved_row(segment: Tensor, valid: Tensor | None = None, begins: Tensor | None = None) -> int | None:
    """The first row in which a segment goes on after another has begun, or None. Waits for the device.

    With `begins`, of `samples.sample_begins`, segments of two samples are two, whatever their ids.
    """
    if begins is not None:
        number = segment.unique(return_inverse=True)[1]
        segment = torch.where(segment >= 0, number + (begins.long() + 1) * segment.numel(), -1)
    bad = interleaved(segment, valid).nonzero()
    return int(bad[0]) if len(bad) else None


def interleaved(segment: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B,) bool: rows in which a segment goes on after another has begun."""
    vision = vision_mask(segment, valid)
    ids, place = torch.where(vision, segment, -1).sort(dim=1, stable=True)
    return parted(ids, vision.cumsum(1).gather(1, place)).any(1)


def parted(ids: Tensor, rank: Tensor) -> Tensor:
    """(B, L - 1) bool: whether a vision token and the next of its segment have others between them.

    Args:
        ids: (B, L), sorted; -1 on text.
        rank: (B, L): how many vision tokens there are up to each of them in the prompt.
    """
    same = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return same & (rank.diff(dim=1) != 1)
