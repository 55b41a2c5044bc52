"""The scan in chunks, with sums of logarithms of decays: Mamba2's own way (arXiv 2405.21060, listing 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import make_operators

CHUNK = 16


def segment_sums(logs: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): the sum of logs over (s, t], -inf where s > t. Nothing is subtracted."""
    length = logs.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=logs.device).tril(-1)
    sums = torch.where(below, logs[..., None], 0.0).cumsum(-2)
    return sums.masked_fill(~(below | torch.eye(length, dtype=torch.bool, device=logs.device)), -torch.inf)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    sums: Callable[[Tensor], Tensor] = segment_sums,
) -> tuple[Tensor, Tensor]:
    """Inside chunks as a matrix of these sums, between chunks as a matrix over chunks."""
    length = x.shape[1]
    pad = -length % CHUNK
    x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, pad)) for tensor in (x, B, C))
    dt = F.pad(dt, (0, 0, 0, pad))  # steps of 0 leave the state as it is
    x, dt, B, C = (tensor.unflatten(1, (-1, CHUNK)) for tensor in (x, dt, B, C))  # (B, c, T, H, ·)
    logs = (dt * A).permute(0, 3, 1, 2)  # (B, H, c, T)
    written = dt[..., None] * x
    within = sums(logs).exp()
    y = torch.einsum("bcthn,bcshn,bhcts,bcshp->bcthp", C, B, within, written)
    chunk_states = torch.einsum("bcshn,bhcs,bcshp->bchnp", B, within[..., -1, :], written)
    between = segment_sums(F.pad(logs.sum(-1), (1, 0))).exp()  # (B, H, c + 1, c + 1)
    states = torch.einsum("bhzc,bchnp->bzhnp", between, torch.cat([state[:, None], chunk_states], dim=1))
    since_start = logs.cumsum(-1).exp()
    y = y + torch.einsum("bcthn,bchnp,bhct->bcthp", C, states[:, :-1], since_start)
    return y.flatten(1, 2)[:, :length], states[:, -1]


selective_scan, bidirectional_scan, scan_step = make_operators(scan)
