"""What both engines need to know about the samples of packed rows: a few torch calls, no loop, no question.

Letters: B batch, L tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import vision_mask

FIRST_SAMPLE = -1  # what `sample_begins` says of the sample that goes on from what was before the row


def sample_begins(sequence: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """(B, L) int32: the place of the first valid token of the sample that a token is of.

    -1 in the row's first sample, which goes on from what was before the row. An invalid token is of the
    sample of the valid one before it. It never falls along a row; a token reads those from there on.

    Args:
        sequence: (B, L) int64, an id for each sample; those of invalid tokens say nothing. None = no samples.
        valid: (B, L) bool; None = all valid.
    """
    if sequence is None:
        return None
    if valid is None:
        begins = sequence[:, 1:] != sequence[:, :-1]
        number = F.pad(begins.cumsum(1, dtype=torch.int32), (1, 0))
    else:
        before, earlier = previous(valid)
        begins = valid & earlier & (sequence.gather(1, before) != sequence)
        number = begins.cumsum(1, dtype=torch.int32)
    number = number.contiguous()  # it takes the strides of the ids over
    return torch.searchsorted(number, number, out_int32=True).masked_fill_(number == 0, FIRST_SAMPLE)


def previous(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) int64 and bool: the place of the nearest True before each token, and whether there is one."""
    rank = mask.cumsum(1, dtype=torch.int32).contiguous()
    wanted = rank - mask.int()  # how many are before
    place = torch.searchsorted(rank, wanted.clamp_min(1).contiguous()).clamp_max_(mask.shape[1] - 1)
    return place, wanted > 0


def segments_of_samples(segment: Tensor, begins: Tensor, valid: Tensor | None) -> Tensor:
    """(B, L) int64, -1 on text: the segments of a row numbered anew, so that no two samples share one."""
    vision = vision_mask(segment, valid)
    before, earlier = previous(vision)
    same = (segment.gather(1, before) == segment) & (begins.gather(1, before) == begins)
    return torch.where(vision, (vision & ~(earlier & same)).cumsum(1) - 1, -1)
