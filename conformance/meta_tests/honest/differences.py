"""The scan in chunks whose sums of logarithms are differences of running sums, begun anew in each chunk."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .chunked import scan
from .common import make_operators


def differences(logs: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): as `segment_sums`, with the rounding of the sums that are subtracted."""
    sums = logs.cumsum(-1)
    later = torch.ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool, device=logs.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf)


selective_scan, bidirectional_scan, scan_step = make_operators(partial(scan, sums=differences))
