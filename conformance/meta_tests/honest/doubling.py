"""The scan by doubling: an associative scan over pairs (decay, state), as jax.lax.associative_scan is."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import make_operators


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """log2 L rounds; after round k a pair stands for 2^k tokens."""
    decays = (dt * A).exp()[..., None, None]  # (B, L, H, 1, 1)
    states = (dt[..., None] * B)[..., None] * x[..., None, :]  # (B, L, H, N, P)
    states = torch.cat([states[:, :1] + decays[:, :1] * state[:, None], states[:, 1:]], dim=1)
    reach = 1
    while reach < x.shape[1]:
        later = states[:, reach:] + decays[:, reach:] * states[:, :-reach]
        states = torch.cat([states[:, :reach], later], dim=1)
        decays = torch.cat([decays[:, :reach], decays[:, reach:] * decays[:, :-reach]], dim=1)
        reach *= 2
    y = torch.einsum("blhn,blhnp->blhp", C, states)
    return y, states[:, -1]


selective_scan, bidirectional_scan, scan_step = make_operators(scan)
