"""Which tokens a window's kernels take together: they depend on the window ids alone, not on the layer.

Letters: B batch, L tokens. The tokens of all rows stand in one order, window after window: first windows of at
least half a block, cut into blocks of their own, then smaller ones, packed into common blocks, last the tokens
of no window. So blocks waste less than half of their rows or pairs, whatever the windows' sizes, and tokens of
no window cost their zeros. Nothing is asked from the device: the number of blocks has a bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens; a power of two


def most_blocks(tokens: int) -> int:
    """A bound on the number of blocks: windows with blocks of their own hold at least half a block."""
    return 3 * tokens // BLOCK + 2


def window_plan(window_id: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the tokens and its blocks.

    Args:
        window_id: (B, L) int64; -1 = in no window.
    Returns:
        places (3, B·L) int32: for each place of the order its token in the flattened batch, the first place of
        its window and the one after the last, both -1 in no window.
        blocks (most_blocks + 2,) int32: the number of blocks, where each starts, B·L from there on.
    """
    token, first, last, kind = in_order(window_id)
    place = torch.arange(len(token), device=token.device)
    origin = torch.where(kind == 0, first, torch.searchsorted(kind, kind))  # windows of one block or more; kinds
    starts = (place - origin) % BLOCK == 0
    beyond = most_blocks(len(token)) + 2
    blocks = place.new_full((beyond + 1,), len(token))
    blocks.scatter_(0, torch.where(starts, starts.cumsum(0), beyond), place)
    blocks[0] = starts.sum()
    outside = kind == 2
    spans = (first.masked_fill(outside, -1), last.masked_fill(outside, -1))
    return torch.stack([token, *spans]).int(), blocks[:beyond].int()


def in_order(window_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, span of its window and kind for each place, (B·L,) each.

    Kinds: 0 in a window of half a block or more, 1 in a smaller one, 2 in none.
    """
    batch, length = window_id.shape
    ids = window_id.flatten()
    token = ids.argsort(stable=True)
    if batch > 1:
        token = token[(token // length).argsort(stable=True)]
    ids, row = ids[token], token // max(1, length)
    place = torch.arange(len(ids), device=ids.device)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[1:] = (ids[1:] != ids[:-1]) | (row[1:] != row[:-1])
    first = torch.where(starts, place, 0).cummax(0).values
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    last = torch.where(ends, place + 1, len(ids)).flip(0).cummin(0).values.flip(0)
    kind = torch.where(ids < 0, 2, (2 * (last - first) < BLOCK).long())
    order = kind.argsort(stable=True)  # whole windows move
    moved = place - order
    return token[order], first[order] + moved, last[order] + moved, kind[order]
