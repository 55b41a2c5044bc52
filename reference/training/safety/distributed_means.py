"""Means over a global batch whose processes hold different numbers of tokens.

Every process weighs its own mean by what it is a mean over, tokens or the teacher's energy, relative to all:

    mean over r of  (W s_r / Σ s) loss_r  =  (Σ s_r loss_r) / Σ s,      r = 1 … W processes        (1)

The left side is what data-parallel training averages, of losses and of gradients; the right side is the ratio
of sums that one process computes. Processes may hold different numbers of tokens, some of them none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

RAM_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # read by transformers at each from_pretrained


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def weights_on_every_process() -> Iterator[None]:
    """Within, from_pretrained reads weights on every process. Launched for FSDP, transformers reads them on
    the first alone, and the others' stay empty until accelerate shards the model; but a run converts,
    calibrates and measures before that."""
    before = os.environ.get(RAM_EFFICIENT_LOADING)
    os.environ[RAM_EFFICIENT_LOADING] = "false"
    try:
        yield
    finally:
        del os.environ[RAM_EFFICIENT_LOADING]
        if before is not None:
            os.environ[RAM_EFFICIENT_LOADING] = before


def total(values: Tensor) -> Tensor:
    """Sums over all processes, without gradients."""
    sums = values.detach().clone()
    if processes() > 1:
        dist.all_reduce(sums)
    return sums


def share(sizes: Tensor) -> Tensor:
    """The factors of eq. (1) for means over `sizes`, any shape; 1 where a single process trains."""
    if processes() == 1:
        return torch.ones_like(sizes)
    sums = total(sizes)
    return processes() * sizes.detach() / sums.clamp_min(torch.finfo(sums.dtype).tiny)


def energies(teachers: Sequence[Tensor], groups: Sequence[Tensor]) -> Tensor:
    """What hidden losses are relative to: the teacher's squares, summed over a group of tokens.

    Args:
        teachers: each (B, L, D).
        groups: masks (B, L) bool, True = counts.
    Returns:
        (teachers · groups,) float32, without gradients.
    """
    squares = [teacher.detach().float().square().sum(-1) for teacher in teachers]  # (B, L)
    return torch.stack([square.masked_fill(~group, 0).sum() for square in squares for group in groups])
