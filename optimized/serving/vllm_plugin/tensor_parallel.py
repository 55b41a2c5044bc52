"""A block's heads over the ranks of tensor parallelism.

Heads meet one another nowhere between q, k, v and the output product: not in the convolution, the scan, its
norm, or either attention. So a rank holds a part of them in both branches, with the groups that they read,
and the mix, which is linear in the branches, is summed over ranks once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ....reference.checks import require
from ....reference.config import LinMUConfig

WHOLE = ("mix_proj", "q_norm", "k_norm")  # on every rank: over the width, or over one head


def sizes_of_rank(config: LinMUConfig, ranks: int) -> LinMUConfig:
    """Return the sizes of one of so many ranks.

    Raises:
        ValueError: if the groups cannot be dealt out evenly.
    """
    require_groups_for_ranks(config.groups, ranks)
    return dataclasses.replace(config, heads=config.heads // ranks, groups=config.groups // ranks)


def require_groups_for_ranks(groups: int, ranks: int) -> None:
    """Refuse more ranks than can be given as many groups each."""
    must = f"tensor parallel size must divide the {groups} groups of keys and values"
    require(groups % ranks == 0, "linmu in vLLM", must, ranks, "use --data-parallel-size")


def part_of_rank(name: str, tensor: Tensor, config: LinMUConfig, rank: int, ranks: int) -> Tensor:
    """Return what one rank holds of a parameter of the block.

    Args:
        name: within the block.
        tensor: the whole.
        config: sizes of the whole block.
        rank: which one.
        ranks: how many there are.
    """
    kind = next((part for part in name.split(".") if part.endswith(("_proj", "_norm"))), name.split(".")[-1])
    if kind in WHOLE:
        return tensor
    if kind == "o_proj":
        if name.endswith("bias"):  # added once
            return tensor if rank == 0 else torch.zeros_like(tensor)
        return tensor.chunk(ranks, dim=1)[rank]
    if kind in ("conv_weight", "conv_bias"):  # channels [x, B, C]
        grouped, inner = config.groups * config.head_dim, config.heads * config.head_dim
        return torch.cat([part.chunk(ranks)[rank] for part in tensor.split([grouped, grouped, inner])])
    return tensor.chunk(ranks)[rank]  # rows by head or group
