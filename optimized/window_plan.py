"""Which tokens a window's kernels take together: they depend on the window ids alone, not on the layer.

Letters: B batch, L tokens. The tokens of all rows stand in one order, window after window: first windows of
at least half a block, cut into blocks of their own, then smaller ones, packed into common blocks, last the
tokens of no window, which cost their zeros. Windows of any sizes thus fill their blocks by half at least, and
a block walks over one window, or over twice its own length at most. Nothing is asked from the device: the
number of blocks has a bound.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128  # tokens; a power of two


def most_blocks(tokens: int) -> int:
    """A bound on the number of blocks: windows with blocks of their own hold at least half a block."""
    return 3 * tokens // BLOCK + 2


def window_plan(window_id: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the tokens and its blocks.

    Args:
        window_id: (B, L) int64; -1 = in no window.
    Returns:
        places (2, B·L) int32: for each place of the order its token in the flattened batch, and the first
        place of its window, -1 in no window.
        blocks (1 + most_blocks, 4) int32: the number of blocks in the first row; then for each block where it
        starts and ends, and where the windows that it touches start and end; both 0 in no window.
    """
    token, first, last, kind = in_order(window_id)
    tokens, most = len(token), most_blocks(len(token))
    place = torch.arange(tokens, device=token.device)
    of_kind = torch.searchsorted(kind, kind)
    origin = torch.where(kind == 0, first, of_kind)
    begins = (place - origin) % BLOCK == 0
    number = torch.where(begins, begins.cumsum(0) - 1, most + 1)
    edges = place.new_full((most + 2,), tokens).scatter_(0, number, place)
    start, end = edges[:most], edges[1 : most + 1]
    first, last = (span.masked_fill(kind == 2, 0) for span in (first, last))
    low, high = pad(first, (0, 1))[start], pad(last, (1, 0))[end]
    blocks = torch.stack([start, end, low, high], dim=1)
    how_many = pad(begins.sum()[None], (0, 3))
    places = torch.stack([token, first.masked_fill(kind == 2, -1)])
    return places.int(), torch.cat([how_many[None], blocks]).int()


def without_text(plan: tuple[Tensor, Tensor], vision: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which `vision` tokens have a window, (n,) int64 in the plan's order, and the plan of these alone."""
    places, blocks = plan
    token, window = places[:, :vision]
    how_many = pad((blocks[1:, :1] < vision).sum(0), (0, 3))
    own = torch.stack([torch.arange(vision, device=token.device, dtype=token.dtype), window])
    return token.long(), (own, torch.cat([how_many[None].int(), blocks[1:]]))


def in_order(window_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, span of its window and kind for each place, (B·L,) each.

    Kinds: 0 in a window of half a block or more, 1 in a smaller one, 2 in none.
    """
    batch, length = window_id.shape
    ids, token = window_id.flatten().sort(stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    if batch > 1:
        row, by_row = (token // max(1, length)).sort(stable=True)
        ids, token = ids[by_row], token[by_row]
        starts[1:] = (ids[1:] != ids[:-1]) | (row[1:] != row[:-1])
    else:
        torch.ne(ids[1:], ids[:-1], out=starts[1:])
    place = torch.arange(len(ids), device=ids.device)
    first, last = spans(starts)
    kind = torch.where(ids < 0, 2, (2 * (last - first) < BLOCK).byte())
    order = kind.argsort(stable=True)  # whole windows move; bytes are sorted in one pass
    moved = place - order
    return token[order], first[order] + moved, last[order] + moved, kind[order]


def spans(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run that each place belongs to starts and ends; (n,) bool, the first True -> (n,), (n,)."""
    n, run = len(starts), starts.cumsum(0) - 1
    place = torch.arange(n, device=starts.device)
    edges = place.new_full((n + 2,), n).scatter_(0, torch.where(starts, run, n + 1), place)
    return edges[run], edges[run + 1]
