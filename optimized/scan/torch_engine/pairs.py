"""The weights of the pairs of tokens of a chunk, one (C, C) matrix a head, of the torch engine of the scan.

Letters as in `chunk_layout`; eq. (2) as in `chunked_scan`: row i reads, column j writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import Chunks, Direction


@dataclass(frozen=True)
class Pairs:
    """Which pairs meet, in the accumulation dtype."""

    side: Tensor | None  # (K, B, 1, C, C): 1 if j < i, -1 if j > i and of one segment; None on text alone
    gates: Tensor  # gF_i [j<i] + gB_i [j>i, one segment], (K, B, H, C, C); gF + gB = 1 and, on text, gF = 1

    @classmethod
    def of(cls, slab: Chunks) -> Pairs:
        """The pairs of a slab. No later token is met by text, so gB may be 1 - gF everywhere."""
        size = slab.C.shape[3]
        earlier = slab.C.new_ones(size, size).tril_()  # and the token itself
        if slab.backward is None:
            return cls(None, earlier)
        together = slab.segment[..., :, None] == slab.segment[..., None, :]
        later = (1 - earlier) * (together & (slab.segment >= 0)[..., None])
        side = earlier.tril(-1) - later
        later.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(side, torch.addcmul(later, slab.forward.gate[..., None], side))


def pair_decays(slab: Chunks) -> Tensor:
    """The exponentials of eq. (2), (K, B, H, C, C); where all is text, anything up to 1 above the diagonal.

    f_i - f_j ≤ 0 for j ≤ i and ≥ 0 for j ≥ i, and b_j - b_i the other way round: the exponent is the lesser.
    """
    exponent = differences(slab.forward)
    if slab.backward is not None:
        exponent = torch.minimum(exponent, differences(slab.backward), out=exponent)
    return exponent.clamp_max_(0).exp_()


def differences(side: Direction) -> Tensor:
    """s_i - s_j of sums in two parts, (K, B, H, C, C), see `scan_decays.two_part_sum`."""
    rounded, rest = side.sum, side.rest
    return (rounded[..., :, None] - rounded[..., None, :]).add_(rest[..., :, None]).sub_(rest[..., None, :])
