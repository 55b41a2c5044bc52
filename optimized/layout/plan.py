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

from .sorts import Sorted, window_keys
from .tokens import flat_order

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
    ids, place = window_id.sort(dim=1, stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
    return packed(starts.flatten().cumsum(0), flat_order(place), ids.flatten() < 0)


def layout_plan(
    prompt: Sorted, vision: int, window_thw: tuple[int, int, int], shifted: bool, text: bool
) -> tuple[Tensor, Tensor]:
    """`window_plan` of the windows of a layout with so many vision tokens; of these alone without `text`."""
    key, token = window_keys(prompt, window_thw, shifted)
    if not text:
        return packed(key[:vision], token[:vision])
    return packed(key, token, torch.arange(len(key), device=key.device) >= vision)


def packed(key: Tensor, token: Tensor, outside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The plan of tokens (n,) window by window: their keys never fall, and are equal in a window.

    Whole windows move, sorted by kind: 0 of half a block or more, 1 smaller, 2 `outside` (n,) bool, which is
    no window.
    """
    if not len(key):
        return token.new_empty(2, 0).int(), token.new_zeros(1 + most_blocks(0), 4).int()
    first, last = (torch.searchsorted(key, key, right=right, out_int32=True) for right in (False, True))
    kind = (last - first < BLOCK // 2).view(torch.uint8)  # bytes are sorted in one pass
    if outside is not None:
        kind.masked_fill_(outside, 2)
    kind, order = kind.sort(stable=True)
    place = torch.arange(len(key), dtype=torch.int32, device=key.device)
    rows = torch.stack([token.int(), first, last]).index_select(1, order)
    rows[1:].add_(place - order)
    starts, count = block_starts(kind, rows[1], place)
    if outside is None:
        return rows[:2], block_table(starts, count, rows[1:])
    rows[1:].masked_fill_(kind == 2, -1)
    return rows[:2], block_table(starts, count, rows[1:]).clamp_(min=0)


def block_starts(kind: Tensor, first: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """(most_blocks + 1,) int32: where each block starts, n for those that are not there; and how many are.

    A large window is cut into blocks from its `first` place, all smaller ones from theirs, then the rest.
    """
    origin = torch.where(kind == 0, first, torch.searchsorted(kind, kind, out_int32=True))
    begun = ((place - origin) % BLOCK == 0).cumsum(0, dtype=torch.int32)
    nth = torch.arange(1, most_blocks(len(kind)) + 2, dtype=torch.int32, device=kind.device)
    return torch.searchsorted(begun, nth, out_int32=True), begun[-1]


def block_table(starts: Tensor, count: Tensor, spans: Tensor) -> Tensor:
    """The plan's blocks, from `block_starts` and where the window of each place starts and ends, (2, n)."""
    start, end, flat = starts[:-1], starts[1:], spans.flatten()
    low = flat.index_select(0, start)  # of the first place; of a block that is not there, no matter what
    high = flat[spans.shape[1] - 1 :].index_select(0, end)  # of the last place
    table = starts.new_zeros(1 + len(start), 4)
    torch.stack([start, end, low, high], dim=1, out=table[1:])
    table[0, 0] = count
    return table
