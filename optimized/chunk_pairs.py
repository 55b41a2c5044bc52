"""The weights of the pairs of tokens of a chunk, one (C, C) matrix a head, of the torch engine of the scan.

Letters as in `chunk_layout`; eq. (2) as in `chunked_scan`: row i reads, column j writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_layout import Chunks, Direction


@dataclass(frozen=True)
class Pairs:
    """Which pairs meet in both directions: 1 or 0 in the accumulation dtype, a token itself among neither."""

    before: Tensor  # (C, C): j < i
    after: Tensor  # (K, B, 1, C, C): j > i and of one segment
    gates: Tensor  # (K, B, H, C, C): gF_i [j<i] + gB_i [j>i, one segment], and gF + gB = 1 on the diagonal

    @classmethod
    def of(cls, slab: Chunks) -> Pairs | None:
        """The pairs of a slab; None where all is text: j ≤ i, with gate 1."""
        if slab.backward is None:
            return None
        size = slab.C.shape[3]
        before = slab.C.new_ones(size, size).tril_(-1)
        together = slab.segment[..., :, None] == slab.segment[..., None, :]
        after = before.mT * (together & (slab.segment >= 0)[..., None])
        gates = slab.forward.gate[..., None] * before
        gates.addcmul_(slab.backward.gate[..., None], after).diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(before, after, gates)


def gate_pairs(tensor: Tensor, pairs: Pairs | None) -> Tensor:
    """(K, B, H, C, C) times the gates of its pairs, 0 where none meet; in place."""
    return tensor.tril_() if pairs is None else tensor.mul_(pairs.gates)


def pair_decays(slab: Chunks) -> Tensor:
    """The exponentials of eq. (2), (K, B, H, C, C); where all is text, anything up to 1 above the diagonal.

    f_i - f_j ≤ 0 for j ≤ i and ≥ 0 for j ≥ i, and b_j - b_i the other way round: the exponent is the lesser.
    """
    exponent = differences(slab.forward)
    if slab.backward is not None:
        exponent = torch.minimum(exponent, differences(slab.backward), out=exponent)
    return exponent.clamp_max_(0).exp_()


def differences(side: Direction) -> Tensor:
    """s_i - s_j, (K, B, H, C, C), as exact as float64's rounded: the difference of what two sums were rounded
    to errs by its own last digit at most, and what the rounding had left follows.
    """
    rounded, rest = side.sum, side.rest
    return (rounded[..., :, None] - rounded[..., None, :]).add_(rest[..., :, None]).sub_(rest[..., None, :])
