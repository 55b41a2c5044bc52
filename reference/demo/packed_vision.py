"""Training on many small pictures at once: the vision tower's loops over pictures, done in one go.

The stock tower lays out its positions and attends picture by picture in Python, which for hundreds of tiny
pictures costs more than the arithmetic. Batched operations give the same numbers. Training only; nothing of
this is saved. Letters: S patches of all pictures, F moments (each attends within itself), T Y X grid in
patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

PACKED_ATTENTION = (
    "flash_packed"  # the tower hands all pictures at once to attentions whose name says "flash"
)


def packed_layout(grid_thw: torch.Tensor, merge: int) -> dict[str, Any]:
    """Return the tower's layout for pictures that fit into one attention window.

    Args:
        grid_thw: (pictures, 3) int64, T Y X in patches.
        merge: side of the square of patches that become one token.
    Returns:
        position_ids (S, 2) int64, and both the full and the windowed sequence starts: (F + 1,) int32.
    """
    t, y, x = grid_thw.unbind(1)
    picture = torch.repeat_interleave(t)  # (F,)
    lengths = (y * x)[picture]
    starts = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    moment = torch.repeat_interleave(lengths)  # (S,)
    place = torch.arange(len(moment), device=moment.device) - starts[moment]
    block, inner, columns = place // merge**2, place % merge**2, x[picture][moment] // merge
    row = block // columns * merge + inner // merge
    column = block % columns * merge + inner % merge
    longest = int(lengths.max())
    return {
        "position_ids": torch.stack([row, column], dim=1),
        "cu_seqlens": starts,
        "max_seqlen": longest,
        "window_index": torch.arange(len(moment) // merge**2, device=moment.device),
        "cu_window_seqlens": starts,
        "max_window_seqlen": longest,
    }


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each moment, padded to (F, longest): q, k, v (1, heads, S, dim) to (1, S, heads, dim)."""
    starts = cu_seq_lens_q.long()
    lengths = starts.diff()
    moment = torch.repeat_interleave(lengths)
    slot = torch.arange(query.shape[2], device=query.device) - starts[moment] + moment * max_length_q
    shape = len(lengths), max_length_q, *query.shape[1::2]

    def padded(packed: torch.Tensor) -> torch.Tensor:
        rows = packed[0].transpose(0, 1)  # (S, heads, dim)
        empty = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:])
        return empty.index_copy(0, slot, rows).view(shape).transpose(1, 2)  # (F, heads, longest, dim)

    real = torch.arange(max_length_q, device=query.device) < lengths[:, None]
    out = scaled_dot_product_attention(
        *map(padded, (query, key, value)), attn_mask=real[:, None, None], scale=scaling
    )
    return out.transpose(1, 2).flatten(0, 1)[slot][None], None


def pack_vision(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Make the model's vision tower work on all pictures of a batch at once."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.set_attn_implementation({"vision_config": PACKED_ATTENTION})
    visual = model.model.visual
    merge = visual.spatial_merge_size

    def lay_out(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        if int(grid[:, 1:].max()) * visual.patch_size > visual.window_size:
            return args, kwargs  # several windows: few large pictures, which the stock loops lay out
        return args, kwargs | packed_layout(grid, merge)

    visual.register_forward_pre_hook(lay_out, with_kwargs=True)
