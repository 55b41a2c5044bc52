"""The weights of the pairs of tokens of a chunk, one (C, C) matrix a head, of the torch engine of the scan.

Letters as in `chunk_layout`; eq. (2) as in `chunked_scan`: row i reads, column j writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_layout import Chunks


@dataclass(frozen=True)
class Pairs:
    """Which pairs meet, 1 or 0 in the accumulation dtype; a token meets itself in neither triangle."""

    before: Tensor  # (C, C): j < i
    after: Tensor | None  # (K, B, 1, C, C): j > i and of one segment; None where all is text

    @classmethod
    def of(cls, slab: Chunks) -> Pairs:
        """The pairs of a slab."""
        size = slab.C.shape[3]
        before = slab.C.new_ones(size, size).tril_(-1)
        if slab.backward is None:
            return cls(before, None)
        together = slab.segment[..., :, None] == slab.segment[..., None, :]
        return cls(before, before.mT * (together & (slab.segment >= 0)[..., None]))

    def gates(self, slab: Chunks) -> Tensor:
        """gF_i [j≤i] + gB_i [j≥i, one segment], (K, B, H, C, C), and 1 on the diagonal: gF + gB = 1."""
        weight = slab.forward.gate[..., None] * self.before
        if self.after is not None:
            weight.addcmul_(slab.backward.gate[..., None], self.after)
        weight.diagonal(dim1=-2, dim2=-1).fill_(1)
        return weight


def pair_decays(slab: Chunks) -> Tensor:
    """The exponentials of eq. (2), (K, B, H, C, C); where all is text, anything up to 1 above the diagonal.

    f_i - f_j ≤ 0 for j ≤ i and ≥ 0 for j ≥ i, and b_j - b_i the other way round: the exponent is the lesser.
    """
    exponent = slab.forward.sum[..., :, None] - slab.forward.sum[..., None, :]
    if slab.backward is not None:
        backward = slab.backward.sum[..., None, :] - slab.backward.sum[..., :, None]
        exponent = torch.minimum(exponent, backward, out=exponent)
    return exponent.to(slab.C.dtype).clamp_max_(0).exp_()
