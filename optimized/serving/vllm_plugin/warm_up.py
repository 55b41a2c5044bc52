"""Triton kernels of prompts, compiled when a server starts, not when its first requests come.

Triton compiles a kernel anew for every set of options, and for integers that 16 divides. Which of these a
prompt needs follows from its length, from whether it is padded, and from whether it goes on from a state.
By estimate all of them take an H200's host some 20 s, once: Triton keeps them on disk.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ... import MMATE
from ...engine.once import one_forward

LENGTHS = (2048, 2052, 2049, 64, 65)  # swept in several runs and in one; multiples of 16, of 4, and one more


@torch.no_grad()
def warm_up(block: MMATE, prepared: dict[Hashable, Any]) -> None:
    """Compute prompts of text of each kind, of zeros.

    Args:
        block: of any layer.
        prepared: of all layers, for `one_forward`.
    """
    like = block.flex_ma.v_proj.weight
    for length in LENGTHS:
        for rows in (1, 2):
            u = like.new_zeros(rows, length, like.shape[1])
            angles = (like.new_zeros(rows, length, block.config.head_dim),) * 2
            at = torch.arange(length, device=like.device)
            valid = None if rows == 1 else at >= torch.arange(rows, device=like.device)[:, None]
            state = None
            for _ in range(2):  # the second goes on
                with one_forward(dict(prepared)):
                    _, state = block(u, valid=valid, position_embeddings=angles, state=state)
