"""M-RoPE's positions with the coordinates of vision tokens in their high bits.

vLLM hands a forward the positions of its tokens, (3, n) int64, cut and joined as the tokens are: so what
travels in them arrives beside its token.

    row 0    position + (t + 1) << 20 + segment << 40
    row 1    position + (y + 1) << 20 + tokens of the segment << 40
    row 2    position + (x + 1) << 20
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....reference.checks import require

LOW = (1 << 20) - 1
COORDINATE, OTHER = 20, 40


def pack(positions: Tensor, coords: Tensor) -> Tensor:
    """Return positions (3, L) int64 that carry coords (L, 4) int64, [segment, t, y, x], -1 on text."""
    segment, sees = coords[:, 0], coords[:, 0] >= 0
    sizes = torch.zeros_like(segment)
    sizes[sees] = torch.bincount(segment[sees])[segment[sees]]
    require(int(positions.max()) <= LOW, "pack", "positions must be below 2**20", int(positions.max()))
    high = torch.stack([segment.clamp(min=0), sizes, torch.zeros_like(sizes)])
    return positions + ((coords[:, 1:].T + 1) << COORDINATE) + (high << OTHER)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions (3, n), coords (n, 4), and how many tokens a token's segment has, (n,); all int64."""
    coordinates = ((packed >> COORDINATE) & LOW) - 1  # (3, n)
    segment = torch.where(coordinates[0] >= 0, packed[0] >> OTHER, -1)
    return packed & LOW, torch.stack([segment, *coordinates], dim=1), packed[1] >> OTHER


def check_whole(coords: Tensor, sizes: Tensor) -> None:
    """Refuse a chunk of a prompt that ends or begins inside an image or a video.

    Args:
        coords: (n, 4), the chunk's.
        sizes: (n,), of how many tokens each one's segment is.
    Raises:
        ValueError: if a segment has more tokens than there are.
    """
    sees = coords[:, 0] >= 0
    ids = coords[sees, 0]
    cut = ids[torch.bincount(ids)[ids] != sizes[sees]] if len(ids) else ids
    must, hint = "no image or video may be cut", "raise --max-num-batched-tokens"
    require(not len(cut), "linmu in vLLM", must, f"a part of picture {cut[:1].tolist()}", hint)
