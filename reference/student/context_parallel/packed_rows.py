"""Packed rows of a split prompt: which samples an edge cuts. Nothing passes from one to the next."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


class Samples:
    """The samples of packed rows, beside where rows are cut.

    Args:
        ids: (B, L) int64, the sample of each token of the prompt; those of invalid tokens say nothing.
        valid: (B, L) bool.
        edges: where slices begin, and L.

    Attributes:
        open: of each edge, (B,): the sample of the last valid token before it, less than all ids if none.
        passes: of each slice, (B,) bool: nothing in it is of another sample than its edge's.
    """

    def __init__(self, ids: Tensor, valid: Tensor, edges: list[int]) -> None:
        self.ids, self.valid = ids, valid
        none = ids.amin() - 1
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(valid, places, -1).cummax(1).values  # the last valid token up to each
        found = torch.where(last < 0, none, ids.gather(1, last.clamp(min=0)))
        self.open = [found[:, edge - 1] if edge else none.expand(len(ids)) for edge in edges]
        slices = [slice(*pair) for pair in pairwise(edges)]
        own = (ids[:, part] == self.open[rank][:, None] for rank, part in enumerate(slices))
        self.passes = [(same | ~valid[:, part]).all(1) for same, part in zip(own, slices, strict=True)]

    def first(self, part: slice) -> Tensor:
        """(B, 1): the sample of a slice's first valid token."""
        return self.ids[:, part].gather(1, self.valid[:, part].int().argmax(1, keepdim=True))
