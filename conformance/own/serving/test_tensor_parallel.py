"""Parts of a block on ranks add up to the block; without vLLM, which only deals out and sums."""

from __future__ import annotations

import pytest
import torch

from linmu.optimized import MMATE, VisionLayout
from linmu.optimized.serving.vllm_plugin.tensor_parallel import part_of_rank, sizes_of_rank
from linmu.reference.config import LinMUConfig

from ..student.tiny_checkpoint import shake

SIZES = LinMUConfig(
    width=24,
    heads=4,
    groups=2,
    head_dim=6,
    qk_norm=True,
    output_bias=True,
    output_gate=True,
    window_thw=(1, 2, 2),
    text_window=3,
)


def test_the_outputs_of_the_ranks_add_up_to_the_block():
    torch.manual_seed(0)
    whole = shake(MMATE(SIZES, 1).double()).requires_grad_(False)
    coords = torch.tensor([[-1] * 4, *([0, 0, y, x] for y in range(3) for x in range(2)), [-1] * 4, [-1] * 4])
    tokens = torch.randn(1, len(coords), SIZES.width, dtype=torch.float64)
    angles = torch.randn(1, len(coords), SIZES.head_dim, dtype=torch.float64)
    given = {"position_embeddings": (angles.cos(), angles.sin())}
    wanted, _ = whole(tokens, VisionLayout(coords[None]), **given)
    found = torch.zeros_like(wanted)
    for rank in range(2):
        part = MMATE(sizes_of_rank(SIZES, 2), 1).double().requires_grad_(False)
        state = {name: part_of_rank(name, t, SIZES, rank, 2) for name, t in whole.state_dict().items()}
        part.load_state_dict(state)
        found += part(tokens, VisionLayout(coords[None]), **given)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_ranks_that_cannot_have_as_many_groups_each_are_refused():
    with pytest.raises(ValueError, match="must divide the 2 groups"):
        sizes_of_rank(SIZES, 4)
